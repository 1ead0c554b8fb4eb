#!/bin/sh
# What people run on a file system: git, rsync and tar there and back, SQLite. Needs git, rsync, sqlite3, attr and acl:
#   tests/suites/tools.sh GIT-REPOSITORY SOURCE-FS-DIR MOUNT-DIR
# Stops at the first difference.
set -eu
repository=$1 native=$(mktemp -d "$2/tools.XXXXXX") mount=$(mktemp -d "$3/tools.XXXXXX")
trap 'rm -rf "$native" "$mount"' EXIT

echo "git: clone, fsck, gc, fsck, a commit"
git clone --quiet --no-local "$repository" "$mount/clone"
cd "$mount/clone"
git fsck --full --strict --no-dangling
git gc --quiet --aggressive --prune=now
git fsck --full --strict --no-dangling
test -z "$(git status --porcelain)"
echo changed >>README.md
git -c user.name=a -c user.email=a@b commit --quiet --all --message=changed
test -z "$(git status --porcelain)"
cd / && git -C "$mount/clone" diff --quiet HEAD

echo "a tree of all kinds: hard and symbolic links, holes, modes, owners, times, attributes, lists, strange names, a pipe"
tree=$native/tree
mkdir -p "$tree/deep/er/still" "$tree/empty"
cp -r "$mount/clone/." "$tree/git"
printf 'x' >"$tree/$(printf 'tab\there \303\050 \377')"
truncate -s 600M "$tree/sparse" && printf end | dd of="$tree/sparse" bs=1 seek=300M conv=notrunc status=none
ln "$tree/sparse" "$tree/deep/hard"
ln -s ../nowhere "$tree/deep/dangling"
mkfifo "$tree/deep/pipe"
printf set >"$tree/setid" && chmod 6755 "$tree/setid" && mkdir -m 3777 "$tree/sticky"
printf mine >"$tree/owned" && chown 1234:5678 "$tree/owned" && touch -d '1999-12-31 23:59:59.987654321' "$tree/owned"
setfattr -n user.note -v kept "$tree/owned" && setfacl -m u:4321:r-- "$tree/owned" && setfacl -d -m g:77:rwx "$tree/empty"
seq 200000 | sed 's/$/.5/' >"$tree/deep/er/numbers"

same() { # copy: contents, links, modes, owners, times, attributes and lists as in the tree
    rsync -aHAXnic --delete "$tree/" "$1/" >"$native/differs"
    cat "$native/differs"
    test ! -s "$native/differs"
}

echo "rsync -aHAX there and back"
rsync -aHAXS "$tree/" "$mount/rsync/"
rsync -aHAXS "$mount/rsync/" "$native/rsync/"
same "$mount/rsync"
same "$native/rsync"

echo "tar there and back"
mkdir "$mount/tar" "$native/tar"
tar --create --xattrs --acls --sparse -C "$tree" . | tar --extract --xattrs --acls -p -C "$mount/tar"
tar --create --xattrs --acls --sparse -C "$mount/tar" . | tar --extract --xattrs --acls -p -C "$native/tar"
same "$mount/tar"
same "$native/tar"

echo "SQLite in both journal modes, two writers"
for mode in DELETE WAL; do
    sqlite3 "$mount/$mode.db" "PRAGMA journal_mode = $mode; CREATE TABLE t (id INTEGER PRIMARY KEY, who INTEGER, v BLOB);" >/dev/null
    for who in 1 2; do
        {
            echo ".timeout 60000"
            for _ in $(seq 100); do
                echo "BEGIN IMMEDIATE; WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100)
                      INSERT INTO t (who, v) SELECT $who, randomblob(200) FROM n; COMMIT;"
            done
        } | sqlite3 "$mount/$mode.db" &
    done
    wait
    test "$(sqlite3 "$mount/$mode.db" 'PRAGMA integrity_check; SELECT count(*) FROM t; VACUUM; PRAGMA integrity_check;')" = "ok
20000
ok"
done
echo "no difference"
