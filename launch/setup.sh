#!/usr/bin/env bash
# Makes .venv and installs rawloop into it, editable. quickstart.sh and test.sh call it first. It may be called again at
# any time, also after an interrupted installation. If everything is installed it ends in well under a second.
#
#   bash launch/setup.sh [EXTRAS]    EXTRAS of setup.cfg, such as dev or dev,bench
#
#   PYTHON=python3.12                the interpreter for .venv (3.11 or later; default: the first one found)
#   RAWLOOP_TORCH_INDEX=URL          take torch and torchaudio from this package index, with no upper bound;
#                                    https://download.pytorch.org/whl/cpu saves a CPU-only machine several GB
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-}
python=.venv/bin/python
unfinished=.venv/unfinished # exists while pip works, to detect an installation that was killed
stamp=.venv/installed-${extras:-base}

fail() {
    echo "setup: $*" >&2
    exit 2
}
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has_gpu() { nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/nvidia0 ]; }

find_python() { # prints the first interpreter that is recent enough
    local candidate seen="" candidates=(python3 python3.14 python3.13 python3.12 python3.11 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if recent "$candidate"; then
            echo "$candidate"
            return
        fi
        seen+="${seen:+, }$candidate ($(version "$candidate" || echo "does not run"))"
    done
    fail "rawloop needs Python 3.11 or later, found: $seen. Install one, or name it: PYTHON=/path/to/python3.12"
}

make_venv() {
    local base
    if [ ! -e "$unfinished" ] && "$python" -m pip --version >/dev/null 2>&1; then
        recent "$python" || fail ".venv has Python $(version $python), rawloop needs 3.11 or later: delete .venv"
        [ -n "${PYTHON:-}" ] || return 0
        base=$(find_python)
        [ "$(version "$base")" = "$(version $python)" ] ||
            fail ".venv has Python $(version $python), PYTHON names $(version "$base"): delete .venv first"
        return 0
    fi
    # .venv is missing or incomplete. pip takes a half-copied package for complete: start again, with pip's cache.
    base=$(find_python)
    echo "setup: making .venv with $base ($(version "$base"))"
    "$base" -m venv --clear .venv || fail "'$base -m venv' failed (Debian and Ubuntu: apt install python3-venv)"
}

fingerprint() { # of the settings and of the packages in .venv, to notice a package that was changed by hand
    {
        echo "$PWD ${RAWLOOP_TORCH_INDEX:-} $(version $python) $(has_gpu && echo gpu)"
        cat setup.cfg pyproject.toml launch/setup.sh launch/constraints-cpu.txt
        ls -d .venv/lib/python3*/site-packages/*.dist-info .venv/lib/python3*/site-packages/torchaudio/lib/* \
            .venv/apart/*.dist-info 2>/dev/null || true # which only dev has
    } | cksum
}

install() {
    local options=(--editable ".${extras:+[$extras]}")
    if [ -n "${RAWLOOP_TORCH_INDEX:-}" ]; then
        "$python" -m pip install --index-url "$RAWLOOP_TORCH_INDEX" "torch>=2.11" "torchaudio>=2.11" || return
    elif ! has_gpu; then
        options+=(--constraint launch/constraints-cpu.txt)
    fi
    "$python" -m pip install "${options[@]}" || return
    [[ ",$extras," == *,dev,* ]] || return 0
    # Where PEFT finds bitsandbytes, each start takes a second more: only the tests that need it look here.
    rm -rf .venv/apart # else pip keeps what is there, also of an interrupted installation
    "$python" -m pip install --no-deps --target .venv/apart "$(grep -om1 'bitsandbytes[>=].*' setup.cfg)"
}

mend_torchaudio() {
    # PyPI's torchaudio has libraries for one version of CUDA. With another torch its import fails, and so does every
    # model of transformers. rawloop needs only the part that is plain PyTorch, which works without the libraries.
    "$python" -c 'import torchaudio' 2>/dev/null || rm -f .venv/lib/python3*/site-packages/torchaudio/lib/*.so
    "$python" -c 'import torchaudio' 2>/dev/null ||
        fail "'import torchaudio' fails in .venv: $("$python" -c 'import torchaudio' 2>&1 | tail -n 1)"
}

if command -v flock >/dev/null; then # two scripts started at once take turns
    exec 9<launch/setup.sh
    flock -n 9 || { echo "setup: waiting for another setup.sh" && flock 9; }
fi
make_venv
[ "$(cat "$stamp" 2>/dev/null)" != "$(fingerprint)" ] || exit 0
trap 'exit 130' INT TERM # Ctrl-C reaches pip too: exit, and leave the file `unfinished`
touch "$unfinished"
echo "setup: installing rawloop${extras:+ with $extras} into .venv; the first time takes minutes"
status=0
install || status=$?
rm "$unfinished" # complete, or rolled back by pip
[ $status -eq 0 ] || fail "pip could not install rawloop (its message stands above)"
mend_torchaudio
fingerprint >"$stamp"
