#!/bin/sh
# The same transactions of SQLite on the source file system and on the mount, in both journal modes, with an integrity
# check; then what the two databases hold is compared:
#   tests/suites/sqlite.sh SOURCE-FS-DIR MOUNT-DIR [TRANSACTIONS, default 2000]
set -eu
transactions=${3:-2000}
work() { # journal mode
    echo "PRAGMA journal_mode = $1; PRAGMA synchronous = NORMAL; PRAGMA mmap_size = 67108864; PRAGMA cache_size = 50;"
    echo "CREATE TABLE t (id INTEGER PRIMARY KEY, k INTEGER, v TEXT); CREATE INDEX by_k ON t (k); CREATE VIRTUAL TABLE f USING fts4 (v);"
    # Inserts, updates and removals of rows that follow from their numbers; each tenth is rolled back.
    awk -v n="$transactions" 'BEGIN {
        for (i = 1; i <= n; i++) {
            print "BEGIN;"
            print "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 40) INSERT INTO t (k, v)" \
                  " SELECT (x * 7919 + " i ") % 1009, hex(zeroblob(x * 5)) || " i " FROM c;"
            print "INSERT INTO f SELECT v FROM t WHERE id % 97 = " i % 97 " LIMIT 5;"
            print "UPDATE t SET v = v || k WHERE k = " (i * 31) % 1009 ";"
            print "DELETE FROM t WHERE k = " (i * 17) % 1009 ";"
            print i % 10 ? "COMMIT;" : "ROLLBACK;"
            if (i % 500 == 0) print "VACUUM; PRAGMA wal_checkpoint(TRUNCATE);"
        }
    }'
    echo "PRAGMA integrity_check; SELECT count(*), sum(k), sum(length(v)) FROM t; SELECT count(*) FROM f WHERE f MATCH '0*';"
}
for mode in DELETE WAL; do
    for dir in "$1" "$2"; do
        rm -f "$dir/$mode.db"
        work "$mode" | sqlite3 -bail "$dir/$mode.db" >"$dir/$mode.said"
        # By another process, from the file.
        sqlite3 "$dir/$mode.db" 'PRAGMA integrity_check;' .dump | sha256sum >>"$dir/$mode.said"
        tail -4 "$dir/$mode.said" | tr '\n' ' '
        echo "$dir $mode"
    done
    cmp "$1/$mode.said" "$2/$mode.said"
    grep -qx ok "$2/$mode.said"
    rm -f "$1/$mode".* "$2/$mode".*
done
echo "no difference"
