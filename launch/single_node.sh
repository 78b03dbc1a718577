#!/usr/bin/env bash
# Trains on this machine: one process per GPU, or a single process where there is none.
#
#   bash launch/single_node.sh CONFIG [OVERRIDES...]     for example configs/higgs_lora.yaml --optim.lr 1e-5
#
#   NPROC=2                number of processes (default: the number of GPUs that CUDA_VISIBLE_DEVICES leaves)
#   PYTHON=python3         the interpreter that has rawloop (default: .venv/bin/python, which setup.sh makes)
#   OMP_NUM_THREADS=8      CPU threads per process (default: the number of cores divided by NPROC)
#   MAX_RESTARTS=3         how often to restart all processes when one has died; they resume from the newest
#                          checkpoint (default: 0)
#   COMMAND=launch-check   compare the processes instead of training (docs/launching.md)
#   SHUTDOWN_TIMEOUT=300   seconds from SIGTERM to SIGKILL for the processes (torchrun's default: 30)
#
# The exit code is rawloop's: 75 after SIGTERM, SIGUSR1 or a file named STOP in the run folder (docs/checkpoints.md).
set -euo pipefail
if [ $# -eq 0 ]; then
    echo "usage: bash launch/single_node.sh CONFIG [OVERRIDES...]" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "single_node: no $python: run 'bash launch/setup.sh', or name the interpreter that has rawloop in PYTHON" >&2
    exit 2
fi

nproc=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
# Without OMP_NUM_THREADS torchrun gives each process one thread; torch alone gives each process all cores.
cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}

# A scheduler sends SIGUSR1 to every process of a job. It would kill python before torchrun.py blocks it.
trap '' USR1
# --standalone uses a free port, so several runs can share a machine.
exec "$python" "$root/launch/torchrun.py" \
    --standalone --nproc-per-node="$nproc" --max-restarts="${MAX_RESTARTS:-0}" \
    ${SHUTDOWN_TIMEOUT:+--shutdown-timeout="$SHUTDOWN_TIMEOUT"} -m rawloop "${COMMAND:-train}" --config "$@"
