#!/bin/sh
# A million files looked up through a mount, then the kernel told to forget them: the daemon's memory and descriptors
# before, at the most, and after. Needs root and a file system with so many inodes:
#   tests/suites/forget.sh VEXFS EMPTY-DIR [FILES, default 1000000]
set -eu
vexfs=$(realpath "$1") dir=$(realpath "$2") files=${3:-1000000}
mkdir "$dir/source" "$dir/mnt"
trap 'umount -l "$dir/mnt" 2>/dev/null || :; rm -rf "$dir/source" "$dir/mnt"' EXIT
seq -f "$dir/source/%.0f" 0 $((files / 1000 - 1)) | xargs mkdir
seq 0 $((files - 1)) | awk -v dir="$dir/source" '{ print dir "/" int($1 / 1000) "/" $1 }' | xargs touch
"$vexfs" mount "$dir/source" "$dir/mnt"
tell() { sed -n "s/^ *\"$1\": \"*\([a-z0-9]*\).*/\1/p" "$dir/mnt/.vexfs/stats.json" | head -1; }
while [ "$(tell beneath)" = walking ]; do sleep 0.1; done
pid=$(tell pid)
held() { # what: KiB of memory and open descriptors
    echo "$1 $(awk '/^VmRSS/ { print $2 }' "/proc/$pid/status") $(ls "/proc/$pid/fd" | wc -l)" | tee -a "$dir/held"
}
: >"$dir/held"
# As it is when it has served: its loops' stacks and buffers are in use.
find "$dir/mnt" -maxdepth 1 >/dev/null
echo 2 >/proc/sys/vm/drop_caches
sleep 1
held before
find "$dir/mnt" -printf '%s\n' | wc -l
held "looked-up"
for round in 1 2 3; do
    echo 2 >/proc/sys/vm/drop_caches
    sleep 1
done
# Forgetting is asynchronous.
until [ "$(ls "/proc/$pid/fd" | wc -l)" -le 200 ] || [ "${tries:=0}" -ge 60 ]; do
    tries=$((tries + 1))
    sleep 1
done
held after
"$vexfs" umount "$dir/mnt"
awk '{ memory[$1] = $2; open[$1] = $3 }
    END { printf "memory %.2f, descriptors %.2f of before\n", memory["after"] / memory["before"], open["after"] / open["before"]
          exit memory["after"] > 1.1 * memory["before"] || open["after"] > 1.1 * open["before"] }' "$dir/held"
