#!/usr/bin/env bash
# One GPU (or none): no torchrun. Usage: runs/gpu1.sh OUT [train.py options]; run it again to go on.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: runs/gpu1.sh OUT [options]}
shift
resume=$(compgen -G "$out/checkpoint/step_*[0-9]" > /dev/null && echo --resume || true)
exec python train.py --out "$out" --parallel.dtype bf16 $resume "$@"
