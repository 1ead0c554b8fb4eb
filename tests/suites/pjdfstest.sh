#!/bin/sh
# pjdfstest (crate pjdfstest 0.2) as root on the source file system and on the mount, and what differs:
#   tests/suites/pjdfstest.sh SOURCE-FS-DIR MOUNT-DIR
# Needs the users nobody and tests. With some lengths of path 14 of its `enametoolong_path` tests fail in themselves
# ("capacity overflow"): give directories whose paths are equally long. Above ext4 one more is skipped, `link_count_max`:
# the C library answers pathconf(_PC_LINK_MAX) by the kind of file system, and for FUSE says 127.
set -eu
config=$(dirname "$0")/pjdfstest.toml
said=$(mktemp -d)
trap 'rm -rf "$said"' EXIT
once() {
    mkdir -p "$1/pjd"
    chmod 755 "$1/pjd"
    pjdfstest -c "$config" -p "$1/pjd" >"$said/all" 2>&1 || :
    rm -rf "$1/pjd"
    sed -n 's/\x1b\[[0-9;]*m//g; /failed\|skipped\|FAILED/p' "$said/all" | sort
    tail -1 "$said/all"
}
once "$1" >"$said/source"
once "$2" >"$said/mount"
echo "source: $(tail -1 "$said/source")"
echo "mount:  $(tail -1 "$said/mount")"
diff "$said/source" "$said/mount"
