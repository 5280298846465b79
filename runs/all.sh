#!/usr/bin/env bash
# All of RESULTS.md but speed: every arm of RLP and Elastic and its seeds, two processes at a time;
# then the tables. What has ended is kept, so it can be given again. Some thirteen hours on two cores.
#   runs/all.sh quick    RLP, CPT and Elastic (a third of its steps) of seed 0, about half an hour;
#                        results/ stay as they are
# PRESET=smoke: every part in minutes, nothing is learned. OUT: another folder. WORDS: of train.py.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/rivals} preset=${PRESET:-cpu}

# seeds "0 1 2" --what elastic ...: the same arms for each seed, two seeds at a time
seeds() {
    printf '%s\n' $1 | xargs -P 2 -I SEED python -m tools.rivals --seeds SEED \
        --preset "$preset" --out "$out" --words="--threads 1 ${WORDS:-}" "${@:2}"
}

if [ "${1:-all}" = quick ]; then
    seeds 0 --arms rlp cpt & thinking=$!
    if [ "$preset" = cpu ]; then WORDS="${WORDS:-} --elastic.steps 300"; fi
    seeds 0 --what elastic --arms elastic
    wait $thinking
    exit
fi
seeds "0 1 2 3 4" --arms rlp cpt rlp-longer cpt-longer rlp-distractors cpt-distractors
seeds "0 1 2"
if [ "$preset" = cpu ]; then  # random positions, where thinking pays
    preset=computed seeds "0 1 2 3 4" --arms rlp
    preset=computed seeds "0 1 2" --arms cpt rlp-paper
fi
seeds "0 1 2 3 4" --what elastic --arms elastic elastic-third
seeds "0 1 2" --what elastic --arms elastic-five elastic-sensitivity elastic-drawn elastic-full \
    elastic-hand elastic-unturned elastic-units elastic-order
seeds "0" --what elastic & others=$!
seeds "0" --what rates
wait $others
seeds "0 1" --what ablations
shopt -s nullglob
python -m tools.report "$out"/*-{"$preset",computed}-seed* "$out"/rates-"$preset".json
