#!/bin/sh
# fio's jobs that verify what they wrote, in a directory of the source file system and in one of the mount:
#   tests/suites/fio.sh SOURCE-FS-DIR MOUNT-DIR [MIB, default 256]
# Sequential and random writes, by write(2), mappings, O_DIRECT and Linux's asynchronous calls, each block with a crc32c.
# (Not with blocks of several sizes: where they overlap fio finds fault with itself, on any file system.)
set -eu
size=${3:-256}
failed=0
for dir in "$1" "$2"; do
    for rw in write:128k randwrite:4k randwrite:64k randrw:4k; do
        for how in psync mmap direct libaio; do
            case $how in
                direct) set -- --ioengine=psync --direct=1 ;;
                libaio) set -- --ioengine=libaio --iodepth=16 --direct=1 ;;
                *) set -- --ioengine="$how" ;;
            esac
            if said=$(fio --name="$how" --filename="$dir/fio.verify" --size="${size}M" --rw="${rw%:*}" --bs="${rw#*:}" \
                --verify=crc32c --verify_fatal=1 --verify_state_save=0 --do_verify=1 --fsync=64 "$@" 2>&1); then
                echo "verified $dir $rw $how"
            else
                failed=$((failed + 1))
                echo "FAILED $dir $rw $how: $(echo "$said" | grep -iE 'error|verify' | head -3)"
            fi
            rm -f "$dir/fio.verify"
        done
    done
done
echo "$failed failed"
test "$failed" = 0
