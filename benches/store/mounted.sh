#!/bin/bash
# A large .npy copied into a mount, in rounds with the build of the same rows in process: until close returned and it is
# found, until it is linked, and the ratio; what 20 searches find straight after close beside what exact ones do when it
# is linked. Then the daemon is killed, and the time from mount to the first answer. Beside it, the store alone (`vexfs
# bench store`): bulk, open, open with 64 MiB, churn. Needs root, and 100,000 rows or more.
# Usage: mounted.sh VEXFS EMPTY_DIR BASE.npy [rows of the churn, default 200000; 0: only the mount] [rounds, default 2]
set -euo pipefail
vexfs=$(realpath "$1") dir=$(realpath "$2") base=$(realpath "$3") churn=${4:-200000} rounds=${5:-2}
mkdir "$dir/source" "$dir/mnt"
trap 'umount -l "$dir/mnt" 2>/dev/null || true' EXIT
ms() { echo $(($(date +%s%N) / 1000000)); }
pid() { sed -n 's/^ *"pid": \([0-9]*\).*/\1/p' "$dir/mnt/.vexfs/stats.json"; }
ask() { "$vexfs" search "$dir/mnt" --like "$dir/mnt/base.npy#7" -k 1 --json | grep -q '"path"'; }

# Distances of the ten nearest of each of 20 rows; of rows that are as near either may be told.
distances() {
    for row in $(seq 7 5000 99999); do
        "$vexfs" search "$dir/mnt" --like "$dir/mnt/base.npy#$row" -k 10 --tsv "$@" | cut -f3
    done
}
alone() { "$vexfs" bench store build --dir "$dir" --base "$base" | sed 's/.*"build_alone_s":\([0-9.]*\).*/\1/'; }

for round in $(seq "$rounds"); do
    [ "$round" = 1 ] || { "$vexfs" umount "$dir/mnt" && rm -r "$dir/source" && mkdir "$dir/source"; }
    "$vexfs" mount "$dir/source" "$dir/mnt"
    printf 'metric = "l2"\n' > "$dir/mnt/.vexfs.toml"
    start=$(ms)
    cp "$base" "$dir/mnt/base.npy"
    closed=$(ms)
    "$vexfs" search "$dir/mnt" --like "$dir/mnt/base.npy#7" -k 1 > /dev/null
    found=$(ms)
    after_close=$(distances)
    pending=$("$vexfs" status "$dir/mnt" --json | sed -n 's/.*"pending": *\([0-9]*\).*/\1/p' | tail -1)
    "$vexfs" sync "$dir/mnt" --indexed
    linked=$(ms)
    # That grep finds none is no failure: it prints 0.
    differ=$(diff <(echo "$after_close") <(distances --exact) | grep -c '^[<>]' || true)
    build=$(alone)
    echo "{\"pending_when_asked\":$pending,\"hits_after_close\":$(wc -l <<< "$after_close"),\"not_exact\":$differ}"
    echo "{\"cp_ms\":$((closed - start)),\"found_after_close_ms\":$((found - closed)),\"linked_ms\":$((linked - start))," \
        "\"build_alone_s\":$build,\"ratio\":$(awk "BEGIN { print ($linked - $start) / 1000 / $build }")}"
done

for n in $(seq 1000); do cp "$dir/mnt/.vexfs.toml" "$dir/mnt/$n.txt"; done
kills=()
for round in 1 2 3 4 5; do
    head -c 128 "$base" > "$dir/mnt/half-$round.npy" || true
    daemon=$(pid)
    kill -9 "$daemon"
    umount -l "$dir/mnt"
    # The volume is locked as long as any of its threads is in a system call.
    while kill -0 "$daemon" 2>/dev/null; do sleep 0.01; done
    start=$(ms)
    "$vexfs" mount "$dir/source" "$dir/mnt"
    ask
    kills+=($(($(ms) - start)))
done
echo "{\"first_answer_after_kill_ms\":[$(IFS=,; echo "${kills[*]}")]}"
"$vexfs" umount "$dir/mnt"
rm -r "$dir/source"
[ "$churn" != 0 ] || exit 0

"$vexfs" bench store bulk --dir "$dir/bulk" --base "$base"
"$vexfs" bench store open --dir "$dir/bulk" --base "$base"
"$vexfs" bench store open --dir "$dir/bulk" --base "$base" --memory 64M
"$vexfs" bench store churn --dir "$dir/churn" --base "$base" --rows "$churn"
