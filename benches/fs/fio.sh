#!/bin/sh
# fio on the source file system and on the mount in turn, and the mount's part of the native rate:
#   benches/fs/fio.sh SOURCE-FS-DIR MOUNT-DIR [ROUNDS [SECONDS [MIB]]]
# The file fits the page cache: what is measured is the path to it, not the disk.
set -eu
native=$1 mount=$2 rounds=${3:-3} seconds=${4:-3} size=${5:-256}
once() { # name directory options…
    job=$1 dir=$2
    shift 2
    fio --name="$job" --filename="$dir/fio.bench" --size="${size}M" --runtime="$seconds" --time_based --ioengine=psync \
        --randrepeat=1 --invalidate=0 --output-format=terse --terse-version=3 "$@" |
        # Bytes per second in KiB: of reads the 7th field, of writes the 48th.
        awk -F';' '{ print $7 + $48 }'
}
median() { sort -n | awk '{ a[NR] = $1 } END { print a[int((NR + 1) / 2)] }'; }
for dir in "$native" "$mount"; do
    dd if=/dev/urandom of="$dir/fio.bench" bs=1M count="$size" status=none
done
printf '%-18s%14s%14s%8s\n' '' 'native KiB/s' 'mount KiB/s' ratio
measure() { # name options…
    name=$1
    shift
    results=$(mktemp)
    for round in $(seq "$rounds"); do
        case $((round % 2)) in
            1) n=$(once "$name" "$native" "$@"); m=$(once "$name" "$mount" "$@") ;;
            *) m=$(once "$name" "$mount" "$@"); n=$(once "$name" "$native" "$@") ;;
        esac
        echo "$n $m" >>"$results"
    done
    awk '{ print $1 }' "$results" | median >"$results.n"
    awk '{ print $2 }' "$results" | median >"$results.m"
    awk '{ print $2 / $1 }' "$results" | median >"$results.r"
    printf '%-18s%14.0f%14.0f%8.2f\n' "$name" "$(cat "$results.n")" "$(cat "$results.m")" "$(cat "$results.r")"
    rm -f "$results" "$results".?
}
measure sequential-read --rw=read --bs=128k
measure random-read --rw=randread --bs=4k
measure sequential-write --rw=write --bs=128k --overwrite=1
measure random-write --rw=randwrite --bs=4k --overwrite=1
measure mmap-read --rw=randread --bs=4k --ioengine=mmap
rm -f "$native/fio.bench" "$mount/fio.bench"
