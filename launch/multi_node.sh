#!/usr/bin/env bash
# Trains on several machines. Start the same command on each of them, in any order. The machines find each other at
# RDZV_ENDPOINT, and torchrun assigns the ranks. All machines share the file system of the run folder. Repository, data
# and model are shared too, or have the same paths on every machine.
#
#   NNODES=2 RDZV_ENDPOINT=node0:29500 RDZV_ID=run7 bash launch/multi_node.sh CONFIG [OVERRIDES...]
#
#   NNODES=2               number of machines
#   RDZV_ENDPOINT=h:p      host and port of one of the machines, reachable from all of them
#   RDZV_ID=run7           any name that all machines share and no other run uses
#   NPROC=8                processes on this machine (default: its GPUs, or 1)
#   JOIN_TIMEOUT=600       seconds to wait for the other machines
#   PYTHON, OMP_NUM_THREADS, MAX_RESTARTS, COMMAND, SHUTDOWN_TIMEOUT and the exit code as in single_node.sh
#   LOCAL_ADDR=10.0.0.1    the address of this machine for the others (default: the one that leads to RDZV_ENDPOINT)
#   GLOO_SOCKET_IFNAME=eth0, NCCL_SOCKET_IFNAME=eth0
#                          the network interface to the others (`ip -br addr` lists them). Default for gloo, which
#                          carries rawloop's agreements: the one that leads to RDZV_ENDPOINT. NCCL chooses by itself
#
# launch/slurm.sbatch, launch/kubernetes.yaml and launch/skypilot.yaml set these for their clusters; docs/launching.md.
set -euo pipefail
fail() {
    echo "multi_node: $*" >&2
    exit 2
}
[ $# -gt 0 ] || fail "usage: NNODES=2 RDZV_ENDPOINT=host:port RDZV_ID=x bash launch/multi_node.sh CONFIG [OVERRIDES...]"
# What Kubeflow's operators set.
NNODES=${NNODES:-${PET_NNODES:-}}
RDZV_ENDPOINT=${RDZV_ENDPOINT:-${PET_MASTER_ADDR:+$PET_MASTER_ADDR:${PET_MASTER_PORT:-29500}}}
for name in NNODES RDZV_ENDPOINT RDZV_ID; do
    [ -n "${!name:-}" ] || fail "$name is not set (the head of launch/multi_node.sh says what belongs into it)"
done
[[ $RDZV_ENDPOINT =~ :[0-9]+$ ]] || fail "RDZV_ENDPOINT is '$RDZV_ENDPOINT', which lacks a port: say host:port"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || fail "no $python: run 'bash launch/setup.sh', or name the right one in PYTHON"

nproc=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}

# A scheduler sends SIGUSR1 to every process of a job. It would kill python before torchrun.py blocks it.
trap '' USR1
exec "$python" "$root/launch/torchrun.py" \
    --nnodes="$NNODES" --nproc-per-node="$nproc" --max-restarts="${MAX_RESTARTS:-0}" \
    --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT" --rdzv-id="$RDZV_ID" \
    ${LOCAL_ADDR:+--local-addr="$LOCAL_ADDR"} --rdzv-conf=join_timeout="${JOIN_TIMEOUT:-600}" \
    ${SHUTDOWN_TIMEOUT:+--shutdown-timeout="$SHUTDOWN_TIMEOUT"} -m rawloop "${COMMAND:-train}" --config "$@"
