#!/usr/bin/env bash
# All checks of a change: ruff, mypy (strict), and the tests, with warnings as errors.
#
#   bash launch/test.sh [--slow] [--gpu] [PYTEST ARGUMENTS...]
#
#   --slow    also the tests that take minutes
#   --gpu     also the tests that need a CUDA device
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

slow="not slow" gpu="not gpu" arguments=()
for argument in "$@"; do
    case $argument in
        --slow) slow="" ;;
        --gpu) gpu="" ;;
        *) arguments+=("$argument") ;;
    esac
done
marks="$slow${slow:+${gpu:+ and }}$gpu"

bash launch/setup.sh dev
python=.venv/bin/python
run() {
    echo "+ $*"
    "$@"
}
run $python -m ruff check .
run $python -m ruff format --check .
run $python -m mypy
# One process per core, with one thread each: the tests are many and small. A GPU is shared by all of them.
workers=$($python -c 'import os; print(min(8, os.cpu_count()))')
export OMP_NUM_THREADS=1
run $python -m pytest -n "$workers" -m "$marks" ${arguments[@]+"${arguments[@]}"}
