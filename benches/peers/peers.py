"""Queries per second at equal recall, of several graph indexes over the same files, interleaved. See README.md."""

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import time

import numpy as np

EFS = [10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320, 448]
# vexfs is asked as its users ask, by the recalls that it is calibrated for.
TARGETS = [0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999]
RECALLS = [0.90, 0.95, 0.99]


class Hnswlib:
    name = "hnswlib"

    def build(self, base, metric, m, efc, cores):
        import hnswlib

        self.index = hnswlib.Index(space={"l2": "l2", "ip": "ip", "cosine": "cosine"}[metric], dim=base.shape[1])
        self.index.init_index(max_elements=len(base), ef_construction=efc, M=m)
        self.index.add_items(base, num_threads=cores)

    def search(self, queries, k, ef, threads):
        self.index.set_ef(max(ef, k))
        return self.index.knn_query(queries, k=k, num_threads=threads)[0]


class Faiss:
    name = "faiss HNSW SQ8"

    def build(self, base, metric, m, efc, cores):
        import faiss

        self.faiss = faiss
        faiss.omp_set_num_threads(cores)
        kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        self.index = faiss.IndexHNSWSQ(base.shape[1], faiss.ScalarQuantizer.QT_8bit, m, kind)
        self.index.hnsw.efConstruction = efc
        self.index.train(base)
        self.index.add(base)

    def search(self, queries, k, ef, threads):
        self.faiss.omp_set_num_threads(threads)
        self.index.hnsw.efSearch = max(ef, k)
        return self.index.search(queries, k)[1]


class Usearch:
    name = "usearch i8"

    def build(self, base, metric, m, efc, cores):
        from usearch.index import Index

        self.index = Index(
            ndim=base.shape[1], metric={"l2": "l2sq", "ip": "ip", "cosine": "cos"}[metric],
            dtype="i8", connectivity=m, expansion_add=efc,
        )
        self.scale = 127 / float(np.abs(base).max())
        self.index.add(np.arange(len(base)), self.codes(base), threads=cores)

    def codes(self, rows):
        return np.clip(np.round(rows * self.scale), -127, 127).astype(np.int8)

    def search(self, queries, k, ef, threads):
        self.index.expansion_search = max(ef, k)
        return self.index.search(self.codes(queries), k, threads=threads).keys


class Glass:
    def __init__(self, quantizer, refine):
        self.quantizer, self.refine = quantizer, refine
        self.name = f"glass HNSW {quantizer}" + (f" + {refine}" if refine else "")

    def build(self, base, metric, m, efc, cores):
        import glass

        glass.set_num_threads(cores)
        kind = "L2" if metric == "l2" else "IP"
        self.graph = glass.Index("HNSW", metric=kind, quant="SQ8U" if self.quantizer != "FP32" else "FP32", R=2 * m, L=efc).build(base)
        self.searcher = glass.Searcher(self.graph, base, kind, self.quantizer, self.refine)
        self.searcher.optimize(1)

    def search(self, queries, k, ef, threads):
        self.searcher.set_ef(max(ef, k))
        return np.asarray(self.searcher.batch_search(queries, k, threads)[0]).reshape(len(queries), k)


class Svs:
    """In full precision: its LVQ codes run on Intel's processors only."""

    name = "SVS Vamana f32"

    def build(self, base, metric, m, efc, cores):
        import svs

        kind = svs.DistanceType.L2 if metric == "l2" else svs.DistanceType.MIP
        alpha = 1.2 if metric == "l2" else 0.95
        params = svs.VamanaBuildParameters(graph_max_degree=2 * m, window_size=efc, alpha=alpha)
        self.index = svs.Vamana.build(params, base, kind, num_threads=cores)

    def search(self, queries, k, ef, threads):
        self.index.num_threads = threads
        self.index.search_window_size = max(ef, k)
        return self.index.search(queries, k)[0]


class Vsag:
    """Has no batch call: its rate on one thread holds Python's cost of a call, and it is not asked on several."""

    name = "VSAG HGraph sq8 + fp32"
    threads = (1,)

    def build(self, base, metric, m, efc, cores):
        import pyvsag

        params = {"base_quantization_type": "sq8", "max_degree": 2 * m, "ef_construction": efc, "use_reorder": True,
                  "precise_quantization_type": "fp32", "build_thread_count": cores}
        self.index = pyvsag.Index("hgraph", json.dumps({
            "dtype": "float32", "metric_type": "l2" if metric == "l2" else "ip", "dim": base.shape[1],
            "index_param": params}))
        self.index.build(vectors=base, ids=np.arange(len(base)), num_elements=len(base), dim=base.shape[1])

    def search(self, queries, k, ef, threads):
        params = json.dumps({"hgraph": {"ef_search": max(ef, k)}})
        return [self.index.knn_search(vector=query, k=k, parameters=params)[0] for query in queries]


def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def recall(found, truth, k):
    return sum(len(set(f[:k]) & set(t[:k])) for f, t in zip(found.tolist(), truth.tolist())) / (len(truth) * k)


def at(curve, target):
    """QPS where the curve of (recall, QPS) crosses the target, straight in log QPS between two points."""
    curve = sorted(curve)
    best = None
    for (r0, q0), (r1, q1) in zip(curve, curve[1:]):
        if r0 <= target <= r1 and r1 > r0:
            share = (target - r0) / (r1 - r0)
            best = math.exp(math.log(q0) * (1 - share) + math.log(q1) * share)
    if best is None and curve and curve[0][0] >= target:
        best = curve[0][1]
    return best


def vexfs(args, threads, rows):
    """One run gives both rates: of one query at a time on one thread, and of a batch on all."""
    command = args.vexfs.split() + [
        "--base", args.base, "--queries", args.queries, "--truth", args.truth, "--metric", args.metric, "-k", str(args.k),
        "--m", str(args.m), "--ef-construction", str(args.ef_construction), "--rows", str(rows),
        "--recall", ",".join(map(str, TARGETS)), "--threads", str(threads), "--repeat", "3", "--json",
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def svg(path, curves, title):
    width, height, left, bottom = 720, 440, 70, 50
    low, high = 0.8, 1.0
    speeds = [q for c in curves.values() for r, q in c if r >= low]
    lo, hi = math.log10(min(speeds)) - 0.05, math.log10(max(speeds)) + 0.05
    x = lambda r: left + (r - low) / (high - low) * (width - left - 180)
    y = lambda q: height - bottom - (math.log10(q) - lo) / (hi - lo) * (height - bottom - 40)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/><text x="{left}" y="22" font-size="14">{title}</text>']
    for r in [0.8, 0.85, 0.9, 0.95, 1.0]:
        out.append(f'<path d="M{x(r):.0f} 40V{height - bottom}" stroke="#ddd"/><text x="{x(r):.0f}" y="{height - bottom + 18}" text-anchor="middle">{r:.2f}</text>')
    for power in range(math.floor(lo), math.ceil(hi) + 1):
        for step in (1, 2, 5):
            q = step * 10**power
            if lo <= math.log10(q) <= hi:
                out.append(f'<path d="M{left} {y(q):.0f}H{x(high):.0f}" stroke="#ddd"/><text x="{left - 6}" y="{y(q) + 4:.0f}" text-anchor="end">{q:g}</text>')
    colours = ["#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf"]
    for n, (name, curve) in enumerate(curves.items()):
        points = [f"{x(r):.1f},{y(q):.1f}" for r, q in sorted(curve) if r >= low]
        colour = colours[n % len(colours)]
        out.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="{3 if name == "vexfs" else 1.5}"/>')
        out.append(f'<text x="{x(high) + 12:.0f}" y="{60 + 18 * n}" fill="{colour}">{name}</text>')
    out.append(f'<text x="{(left + x(high)) / 2:.0f}" y="{height - 10}" text-anchor="middle">recall</text></svg>')
    with open(path, "w") as f:
        f.write("\n".join(out))


def main():
    parser = argparse.ArgumentParser()
    for name in ("base", "queries", "truth"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--metric", choices=["l2", "ip", "cosine"], default="l2")
    parser.add_argument("--rows", type=int)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--m", type=int, default=16)
    parser.add_argument("--ef-construction", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="names of peers that contain one of these, comma-separated")
    parser.add_argument("--vexfs", default="target/release/vexfs bench index")
    parser.add_argument("--out", default="peers")
    args = parser.parse_args()

    base = np.load(args.base, mmap_mode="r")[: args.rows].astype(np.float32)
    queries = np.load(args.queries).astype(np.float32)
    truth = np.load(args.truth)
    if args.metric == "cosine":
        base /= np.linalg.norm(base, axis=1, keepdims=True)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    cores = os.cpu_count()

    peers, build, size = [], {}, {}
    for peer in [Hnswlib(), Glass("SQ8U", "FP32"), Glass("FP32", ""), Svs(), Vsag(), Faiss(), Usearch()]:
        if args.only and not any(part in peer.name for part in args.only.split(",")):
            continue
        gc.collect()
        before, begun = resident(), time.perf_counter()
        try:
            peer.build(base, args.metric, args.m, args.ef_construction, cores)
        except Exception as e:
            print(f"{peer.name} is left out: {e}")
            continue
        build[peer.name] = [time.perf_counter() - begun]
        size[peer.name] = (resident() - before) / len(base)
        peers.append(peer)
        print(f"{peer.name} built in {build[peer.name][0]:.1f} s", flush=True)

    # For each thread count and name: for each ef or target (recall, [QPS]).
    measured = {threads: {} for threads in sorted({1, cores})}
    for _ in range(args.rounds):
        report = vexfs(args, cores, len(base))
        build.setdefault("vexfs", []).append(report["build_seconds"])
        size["vexfs"] = report["bytes_per_vector_full"]
        for threads, by_name in measured.items():
            points = by_name.setdefault("vexfs", {})
            for target, run in zip(TARGETS, report["results"], strict=True):
                rate = run["qps_one_thread"] if threads == 1 else run["qps"]
                points.setdefault(target, (run["recall"], []))[1].append(rate)
            for peer in peers:
                if threads not in getattr(peer, "threads", measured):
                    continue
                points = by_name.setdefault(peer.name, {})
                peer.search(queries[:100], args.k, 50, threads)
                for ef in EFS:
                    begun = time.perf_counter()
                    found = peer.search(queries, args.k, ef, threads)
                    qps = len(queries) / (time.perf_counter() - begun)
                    points.setdefault(ef, (recall(np.asarray(found), truth, args.k), []))[1].append(qps)

    curves = {
        threads: {name: [(r, statistics.median(q)) for r, q in points.values()] for name, points in by_name.items()}
        for threads, by_name in measured.items()
    }
    lines = [f"{len(base):,} x {base.shape[1]}, {args.metric}, k = {args.k}, {cores} cores, medians of {args.rounds} rounds", ""]
    header = ["", f"build s, {cores} threads", "bytes/vector"]
    header += [f"QPS, {threads} thread{'s' if threads > 1 else ''}, recall {r:.2f}" for threads in curves for r in RECALLS]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name in curves[1]:
        cells = [name, f"{statistics.median(build[name]):.1f}", f"{size[name]:.0f}"]
        for threads in curves:
            for r in RECALLS:
                qps = at(curves[threads].get(name, []), r)
                cells.append("-" if qps is None else f"{qps:,.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    with open(args.out + ".md", "w") as f:
        f.write(text)
    svg(args.out + ".svg", curves[1], lines[0].replace("medians", "one thread, medians"))


if __name__ == "__main__":
    main()
