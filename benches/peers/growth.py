"""How a query's time grows with the number of rows at equal recall, against the machine's caches. See README.md."""

import argparse
import json
import math
import re
import subprocess
from pathlib import Path

import peers

SIZES = [10_000, 31_623, 100_000, 316_228, 1_000_000]
RECALLS = [0.90, 0.95, 0.99]
UNITS = {"K": 1 << 10, "M": 1 << 20}


def caches():
    """Bytes of the first core's second and third level."""
    sizes = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, size = (index / "level").read_text().strip(), (index / "size").read_text().strip()
        if level in "23":
            sizes[f"L{level}"] = int(size[:-1]) * UNITS[size[-1]]
    return sizes


def svg(path, times, bytes_per_row, title):
    width, height, left, bottom, right = 720, 420, 70, 50, 150
    ns = sorted(next(iter(times.values())))
    low, high = math.log10(ns[0]) - 0.1, math.log10(ns[-1]) + 0.1
    top = max(t for curve in times.values() for t in curve.values()) * 1.1
    x = lambda n: left + (math.log10(n) - low) / (high - low) * (width - left - right)
    y = lambda t: height - bottom - t / top * (height - bottom - 40)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/><text x="{left}" y="22" font-size="14">{title}</text>']
    for n in ns:
        out.append(f'<path d="M{x(n):.0f} 40V{height - bottom}" stroke="#ddd"/>'
                   f'<text x="{x(n):.0f}" y="{height - bottom + 18}" text-anchor="middle">{n:,}</text>')
    for name, size in caches().items():
        rows = size / bytes_per_row
        if low < math.log10(rows) < high:
            out.append(f'<path d="M{x(rows):.0f} 40V{height - bottom}" stroke="#888" stroke-dasharray="4"/>'
                       f'<text x="{x(rows) + 3:.0f}" y="52" fill="#888">{name} full</text>')
    for step in range(0, int(top) + 1, max(1, int(top / 6))):
        out.append(f'<path d="M{left} {y(step):.0f}H{width - right}" stroke="#eee"/>'
                   f'<text x="{left - 6}" y="{y(step) + 4:.0f}" text-anchor="end">{step}</text>')
    for (r, curve), colour in zip(times.items(), ["#2ca02c", "#1f77b4", "#d62728"]):
        points = " ".join(f"{x(n):.1f},{y(t):.1f}" for n, t in sorted(curve.items()))
        last = curve[ns[-1]]
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
                   f'<text x="{x(ns[-1]) + 12:.0f}" y="{y(last) + 4:.0f}" fill="{colour}">recall {r:.2f}</text>')
    out.append(f'<text x="{left}" y="36">µs a query</text>'
               f'<text x="{(left + width - right) / 2:.0f}" y="{height - 10}" text-anchor="middle">rows</text></svg>')
    Path(path).write_text("\n".join(out))


def main():
    parser = argparse.ArgumentParser()
    for name in ("base", "queries"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--metric", choices=["l2", "ip", "cosine"], default="l2")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--vexfs", default="target/release/vexfs bench index")
    parser.add_argument("--out", default="growth")
    args = parser.parse_args()
    total = int(re.search(rb"'shape': \((\d+)", Path(args.base).open("rb").read(256)).group(1))
    sizes = [n for n in SIZES if n <= total]
    times = {r: {} for r in RECALLS}
    lines = ["| rows | build s | index bytes/row | " + " | ".join(f"µs at {r:.2f}" for r in RECALLS) + " |", "|" + "---|" * 6]
    for n in sizes:
        command = args.vexfs.split() + [
            "--base", args.base, "--queries", args.queries, "--metric", args.metric, "--rows", str(n), "--threads", "2",
            "--recall", ",".join(map(str, peers.TARGETS)), "--repeat", str(args.repeat), "--json"]
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        curve = [(run["recall"], run["qps_one_thread"]) for run in report["results"]]
        for r in RECALLS:
            times[r][n] = 1e6 / peers.at(curve, r)
        per_row = report["bytes_per_vector_index"]
        cells = [f"{n:,}", f"{report['build_seconds']:.1f}", f"{per_row:.0f}"]
        lines.append("| " + " | ".join(cells + [f"{times[r][n]:.1f}" for r in RECALLS]) + " |")
        print(lines[-1], flush=True)
    Path(args.out + ".md").write_text("\n".join(lines) + "\n")
    svg(args.out + ".svg", times, per_row, f"{args.metric}, one query at a time on one thread")


if __name__ == "__main__":
    main()
