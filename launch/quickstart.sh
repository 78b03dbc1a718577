#!/usr/bin/env bash
# From nothing to a fine-tuned model and its voice: installs rawloop, builds the demo checkpoint, encodes the bundled
# speech, fine-tunes on it with LoRA, on all GPUs or in 2 processes on the CPU, and writes a clip of the result. It is
# noise: the demo's weights are random. A second call reuses .venv and .demo, and trains in a new run folder.
#
#   bash launch/quickstart.sh [OVERRIDES...]     for example --optim.lr 1e-3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh tensorboard
.venv/bin/python -m rawloop demo --folder .demo

gpus=0
if nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/nvidia0 ] || [ -e /dev/kfd ]; then # else skip the slow import of torch
    gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
fi
[ "$gpus" -gt 0 ] || export NPROC=2 # to show that processes share the work
run=runs/demo-$(date +%Y%m%d-%H%M%S)
bash launch/single_node.sh configs/demo.yaml --output "$run" "$@"
[ -d "$run" ] || exit 0 # another --output was given
.venv/bin/python -m rawloop generate "$run" --text "Hello from the demo." --output "$run/hello.wav" --max_seconds 5
