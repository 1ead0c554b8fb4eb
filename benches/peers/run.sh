#!/bin/sh
# Runs other libraries and `vexfs bench index` on the same files, interleaved. See README.md.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=${VENV:-$here/.venv}
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet numpy
    # A library that doesn't install on this machine is left out of the table.
    for peer in hnswlib faiss-cpu usearch pyglass-portable scalable-vs pyvsag; do
        "$venv/bin/pip" install --quiet "$peer" || echo "$peer does not install here" >&2
    done
fi
exec "$venv/bin/python" "$here/peers.py" "$@"
