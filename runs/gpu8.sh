#!/usr/bin/env bash
# All GPUs of one machine (GPUS, default 8). Usage: runs/gpu8.sh OUT [train.py options]; run it again to go on.
# A batch must be a multiple of the number of GPUs, so the options say how large, for example --rlp.batch 64.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: runs/gpu8.sh OUT [options]}
shift
resume=$(compgen -G "$out/checkpoint/step_*[0-9]" > /dev/null && echo --resume || true)
exec torchrun --standalone --shutdown-timeout 240 --nproc-per-node "${GPUS:-8}" train.py --out "$out" --parallel.dtype bf16 $resume "$@"
