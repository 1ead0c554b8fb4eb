#!/bin/sh
# fsx (crate fsx 0.3) with mappings: seeds 1 to SEEDS, OPERATIONS each, in a directory of the mount:
#   tests/suites/fsx.sh SEEDS OPERATIONS MOUNT-DIR
set -eu
config=$(dirname "$0")/fsx.toml
failed=0
for seed in $(seq "$1"); do
    artifacts=$(mktemp -d)
    if fsx -q -f "$config" -S "$seed" -N "$2" -P "$artifacts" "$3/fsx.$seed" >"$artifacts/said" 2>&1; then
        rm -rf "$artifacts" "$3/fsx.$seed"
    else
        failed=$((failed + 1))
        echo "seed $seed failed (see $artifacts): $(tail -3 "$artifacts/said")"
    fi
done
echo "$1 seeds x $2 operations: $failed failed"
test "$failed" = 0
