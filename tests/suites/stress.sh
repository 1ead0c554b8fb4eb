#!/bin/sh
# stress-ng's file system stressors, with their own verification, in two directories one after the other:
#   tests/suites/stress.sh SECONDS SOURCE-FS-DIR MOUNT-DIR [STRESSOR…]
# Prints each stressor that says something else on the mount than on the source file system.
set -eu
seconds=$1 native=$2 mount=$3
shift 3
test $# -gt 0 || set -- access chattr chdir chmod chown copy-file dentry dir dirdeep dirmany dnotify fallocate fanotify \
    fcntl fiemap file-ioctl filename flock fpunch fsize fstat getdent handle hdd inode-flags inotify io iomix ioprio \
    lease link locka lockf lockofd mknod open rename symlink sync-file touch utime verity xattr
said=$(mktemp -d)
trap 'rm -rf "$said"' EXIT

once() { # stressor directory: its status and what it complains of
    mkdir -p "$2/stress"
    status=0
    (cd "$2/stress" && stress-ng --"$1" 1 --timeout "${seconds}s" --verify --temp-path "$2/stress") >"$said/all" 2>&1 ||
        status=$?
    rm -rf "$2/stress"
    echo "status $status"
    grep -E 'fail|skip|unsupported|not supported' "$said/all" | sed 's/^.*\] //; s/[0-9][0-9]*/N/g' | sort -u
}

differ=0
for stressor; do
    once "$stressor" "$native" >"$said/native" || :
    once "$stressor" "$mount" >"$said/mount" || :
    if cmp -s "$said/native" "$said/mount"; then
        echo "same    $stressor ($(head -1 "$said/mount"))"
    else
        differ=$((differ + 1))
        echo "DIFFERS $stressor"
        sed 's/^/  source /' "$said/native"
        sed 's/^/  mount  /' "$said/mount"
    fi
done
echo "$differ differ"
test "$differ" = 0
