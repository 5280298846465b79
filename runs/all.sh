#!/usr/bin/env bash
# All of RESULTS.md but speed: every arm of RLP and Elastic, and its seeds, two processes at a time;
# then the tables. What has ended is kept, so it can be given again. On two quick cores:
#   runs/all.sh quick    RLP, CPT and Elastic (a third of its steps) of seed 0, about half an hour;
#                        results/ stay as they are
#   runs/all.sh          five seeds of README's tables, one of all else: a night
#   runs/all.sh seeds    that, and two more seeds of most of the rest, four hours more
# PRESET=smoke: every part in minutes, nothing is learned. OUT: another folder. WORDS: of train.py.
set -euo pipefail
cd "$(dirname "$0")/.."
export out=${OUT:-runs/rivals} preset=${PRESET:-cpu} words="--threads 1 ${WORDS:-}"

# seeds PRESET "0 1 2" --what elastic ...: a line for each seed, words of tools.rivals
seeds() { for seed in $2; do echo --preset "$1" --seeds "$seed" "${@:3}"; done; }
# Such lines, two at a time.
run() { xargs -P 2 -L 1 bash -c 'exec python -m tools.rivals --out "$out" --words="$words" "$@"' run; }

if [ "${1:-all}" = quick ]; then
    seeds "$preset" 0 --arms rlp cpt | run & thinking=$!
    if [ "$preset" = cpu ]; then words="$words --elastic.steps 300"; fi
    seeds "$preset" 0 --what elastic --arms elastic | run
    wait $thinking
    exit
fi
{
    seeds "$preset" "0 1 2 3 4" --arms rlp cpt rlp-longer cpt-longer rlp-distractors cpt-distractors
    seeds "$preset" "0 1 2 3 4" --what elastic --arms elastic elastic-grown
    seeds "$preset" 0 --what elastic
    seeds "$preset" 0
    if [ "$preset" = cpu ]; then  # random positions, where thinking pays
        seeds computed "0 1 2 3 4" --arms rlp
        seeds computed 0 --arms cpt rlp-paper
    fi
    seeds "$preset" 0 --what rates
    seeds "$preset" 0 --what ablations
    if [ "${1:-all}" = seeds ]; then
        seeds "$preset" "1 2"
        if [ "$preset" = cpu ]; then seeds computed "1 2" --arms cpt rlp-paper; fi
        seeds "$preset" "1 2" --what elastic --arms elastic-third elastic-sensitivity elastic-full \
            elastic-hand elastic-unturned elastic-units elastic-order elastic-five elastic-drawn
        seeds "$preset" "1 2" --what ablations
    fi
} | run
shopt -s nullglob
python -m tools.report "$out"/*-{"$preset",computed}-seed* "$out"/rates-"$preset".json
