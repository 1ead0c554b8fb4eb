#!/usr/bin/env bash
# A real sample in a temporary volume, the same question asked three ways, and what a rename and a delete do to the
# answers. Leaves nothing behind.
set -euo pipefail
vexfs=$(realpath "${1:?usage: demo.sh PATH-TO-VEXFS}")
here=$(realpath "$(dirname "$0")")
texts=$here/glosses/glosses.txt
work=$(mktemp -d)
volume=$work/volume
mnt=$work/mnt
mkdir "$volume" "$mnt"
end() {
    cd /
    if grep -q " $mnt fuse.vexfs " /proc/self/mounts; then "$vexfs" umount "$mnt" || umount -l "$mnt"; fi
    rm -rf "$work"
}
trap end EXIT

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
# rank, score, distance, row, path -> a table with the text that the row stands for
table() {
    printf '  %4s  %7s  %-28s %s\n' rank score where text
    while IFS=$'\t' read -r rank score _ row path; do
        printf '  %4s  %7.4f  %-28s %.70s\n' "$rank" "$score" "${path#"$mnt/"}#$row" "$(sed -n "$((row + 1))p" "$texts")"
    done
}

say "Mount a directory, copy 2,000 dictionary entries in (a .npy of 384-dimensional embeddings)"
"$vexfs" mount "$volume" "$mnt"
mkdir "$mnt/words"
cp "$here/glosses/glosses.npy" "$mnt/words/"
"$vexfs" status "$mnt"

row=859
say "What is like row $row: \"$(sed -n "$((row + 1))p" "$texts" | cut -c1-60)…\"?"

say "1. The command: vexfs search --like words/glosses.npy#$row"
"$vexfs" search "$mnt" --like "$mnt/words/glosses.npy#$row" -k 5 --tsv | tee "$work/one" | table

say "2. Links: ls words/.vexfs/similar/glosses.npy#$row?k=5"
ls -1 "$mnt/words/.vexfs/similar/glosses.npy#$row?k=5" | tee "$work/two" | sed 's/^/  /'

say "3. The query file: echo '{\"like\": \"words/glosses.npy#$row\", \"k\": 5}' into .vexfs/query"
exec 3<>"$mnt/.vexfs/query"
printf '{"like": "words/glosses.npy#%s", "k": 5}\n' "$row" >&3
cat <&3 | tee "$work/three" | cut -c1-300 | sed 's/^/  /'
exec 3>&-

one=$(cut -f4 "$work/one" | xargs)
two=$(sed 's/.*#//' "$work/two" | xargs)
three=$(grep -o '"row":[0-9]*' "$work/three" | cut -d: -f2 | xargs)
if [ "$one" != "$two" ] || [ "$one" != "$three" ]; then
    echo "the three answers differ: $one / $two / $three" >&2
    exit 1
fi
echo "  The three answers agree: rows $one"

say "Recall of the default search against exact search, over 100 rows"
right=0
for n in $(seq 0 19 1899); do
    like="$mnt/words/glosses.npy#$n"
    "$vexfs" search "$mnt" --like "$like" --tsv | cut -f4 | sort >"$work/found"
    "$vexfs" search "$mnt" --like "$like" --tsv --exact | cut -f4 | sort >"$work/exact"
    right=$((right + $(comm -12 "$work/found" "$work/exact" | wc -l)))
done
printf '  recall@10 = %d.%03d\n' $((right / 1000)) $((right % 1000))

say "Rename the directory: the next search shows the new path"
mv "$mnt/words" "$mnt/dictionary"
"$vexfs" search "$mnt" --like "$mnt/dictionary/glosses.npy#$row" -k 2 --tsv | table

say "A second file, found as soon as it is closed; deleted, it is gone"
mkdir "$mnt/mine"
cat >"$work/to_vec.awk" <<'A'
BEGIN { for (n = 0; n < 384; n++) printf "%s%.4f", n ? "," : "", sin(n + 1) }
A
awk -f "$work/to_vec.awk" >"$mnt/mine/note.vec"
"$vexfs" search "$mnt" --vector-file "$mnt/mine/note.vec" -k 1
rm "$mnt/mine/note.vec"
awk -f "$work/to_vec.awk" >"$work/note.vec"
"$vexfs" search "$mnt" --vector-file "$work/note.vec" -k 1 --tsv | table

say "Unmount; the files are plain files in the directory below"
"$vexfs" umount "$mnt"
ls -l "$volume/dictionary"
