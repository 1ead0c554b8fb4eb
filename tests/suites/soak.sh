#!/bin/sh
# Files and vectors changed and looked at for long under one daemon, every answer checked (`vexfs bench soak`), in rounds
# that each end with an empty directory: the daemon's memory and descriptors after each. The first round is the warm-up.
#   tests/suites/soak.sh VEXFS EMPTY-DIR ROUNDS OPERATIONS
# Needs root. SOAK_BY is put before each round's command.
set -eu
vexfs=$(realpath "$1") dir=$(realpath "$2")
mkdir "$dir/source" "$dir/mnt"
trap 'umount -l "$dir/mnt" 2>/dev/null || :; rm -rf "$dir/source" "$dir/mnt" "$dir/held"' EXIT
"$vexfs" mount "$dir/source" "$dir/mnt"
tell() { sed -n "s/^ *\"$1\": \"*\([a-z0-9]*\).*/\1/p" "$dir/mnt/.vexfs/stats.json" | head -1; }
while [ "$(tell beneath)" = walking ]; do sleep 0.1; done
pid=$(tell pid)
descriptors() { ls "/proc/$pid/fd" | wc -l; }
held() { # round: KiB of memory, of that anonymous, open descriptors
    echo "$1 $(awk '/^VmRSS|^RssAnon/ { printf "%s ", $2 }' "/proc/$pid/status") $(descriptors)" | tee -a "$dir/held"
}
: >"$dir/held"
held 0
start=$(descriptors)
for round in $(seq "$3"); do
    ${SOAK_BY:-} "$vexfs" bench soak --mount "$dir/mnt" --operations "$4" --seed "$round"
    # What is behind is done, and forgetting is asynchronous.
    "$vexfs" sync --indexed "$dir/mnt"
    tries=0
    until [ "$(descriptors)" -le "$start" ] || [ "$tries" -ge 10 ]; do
        tries=$((tries + 1))
        sleep 1
    done
    # The daemon gives back what was freed when it has been quiet for a second.
    sleep 2
    held "$round"
done
test "$(tell panics)" = 0
grep last_error "$dir/mnt/.vexfs/stats.json"
"$vexfs" umount "$dir/mnt"
"$vexfs" check "$dir/source"
awk '$1 == 0 { open = $4 } $1 == 1 { warm = $2 } { memory = $2; last = $4 }
    END { printf "memory %.3f of that after the first round, descriptors %d of %d at the start\n", memory / warm, last, open
          exit memory > 1.02 * warm || last > open }' "$dir/held"
