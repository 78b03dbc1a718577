#!/usr/bin/env bash
# Checks rawloop on the GPU of this machine, in under 8 minutes after the installation: the tests that need a GPU, then
# benchmarks (the loop against its peers, saves, memory by precision mode, tokens per second and MFU of large models).
# Writes gpu_check.json and gpu_check.md. Other programs on the GPU make the figures wrong.
#
#   bash launch/gpu_check.sh [--cpu] [OUTPUT]      OUTPUT: a folder (default: runs/gpu_check-DATE)
#
#   --cpu                  rehearse on the CPU, with tiny sizes and a few of the tests
#   PYTHON=python3         an interpreter that has rawloop with dev and bench (default: .venv, which setup.sh fills)
#
# The exit code is 0, 1 if a test or a benchmark failed, and 2 without a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cpu="" output=runs/gpu_check-$(date +%Y%m%d-%H%M%S)
for argument in "$@"; do
    case $argument in
        --cpu) cpu=--cpu ;;
        -*) echo "gpu_check: no option '$argument': usage: bash launch/gpu_check.sh [--cpu] [OUTPUT]" >&2 && exit 2 ;;
        *) output=$argument ;;
    esac
done
if [ -z "$cpu" ] && ! nvidia-smi -L >/dev/null 2>&1 && [ ! -e /dev/nvidia0 ]; then
    echo "gpu_check: no GPU on this machine (nvidia-smi lists none): run it where one is, or rehearse with --cpu" >&2
    exit 2
fi
[ -n "${PYTHON:-}" ] || bash launch/setup.sh dev,bench
python=${PYTHON:-.venv/bin/python}
mkdir -p "$output"

SECONDS=0 # bash counts from here
# With setup.sh's folder of bitsandbytes for the tests, which skip what it is missing for. The benchmarks go without.
apart=$("$python" -c 'import os, sys; print(os.path.join(sys.prefix, "apart"))')
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD
mapfile -t files < <(grep -rlE 'mark\.gpu' tests --include='test_*.py')
tests=(-m gpu -n 4 "${files[@]}")
few="float64 or a_copy_on_the_device or (stored_state and lion)" # the last needs bitsandbytes
[ -z "$cpu" ] || tests=(-m "not gpu" tests/test_gpu.py tests/test_optimizers.py -k "$few")
rm -f "$output/tests.xml"
# INT lets pytest write its report; a failure is in it, and in the exit code of the benchmark.
PYTHONPATH=$PWD:$apart timeout --signal=INT --kill-after=10 170 \
    "$python" -m pytest -q --junitxml="$output/tests.xml" "${tests[@]}" || true
"$python" tests/benchmarks/gpu_bench.py $cpu --output "$output" --tests "$output/tests.xml" \
    --seconds $((420 - SECONDS))
