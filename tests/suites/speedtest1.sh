#!/bin/sh
# SQLite's own speedtest1 on the source file system and on the mount, with a rollback journal and a write-ahead log, by
# calls and by a mapping: the hash of all that its queries answered is compared, the integrity checked, and the time told.
#   tests/suites/speedtest1.sh SPEEDTEST1 SOURCE-FS-DIR MOUNT-DIR [SIZE, default 100]
# SPEEDTEST1 is built from test/speedtest1.c of SQLite's source, e.g. of `apt-get source sqlite3`:
#   cc -O2 -o speedtest1 test/speedtest1.c -lsqlite3
set -eu
program=$(realpath "$1") size=${4:-100}
for mode in delete wal; do
    for mapped in 0 1073741824; do
        for dir in "$2" "$3"; do
            db=$dir/speedtest1-$mode.db
            rm -f "$db" "$db"-*
            "$program" --journal "$mode" --mmap "$mapped" --size "$size" --verify "$db" >"$dir/said"
            grep Hash "$dir/said" >"$dir/hash"
            sqlite3 "$db" 'PRAGMA integrity_check;' >>"$dir/hash"
            sqlite3 "$db" .dump | sha256sum >>"$dir/hash"
            echo "$dir, $mode, mapped $mapped:$(grep TOTAL "$dir/said" | sed 's/.*\.\.//')"
            rm -f "$db" "$db"-*
        done
        cmp "$2/hash" "$3/hash"
        grep -qx ok "$3/hash"
        test "$(wc -l <"$3/hash")" = 3
    done
done
rm -f "$2/said" "$2/hash" "$3/said" "$3/hash"
echo "no difference"
