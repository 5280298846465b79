"""A method beside what a reader would try instead: from one base a seed, each at a tuned rate.

    python -m tools.rivals --seeds 0 1 2 3 4      every arm below; what has ended is kept
    python -m tools.rivals --preset smoke         the same in minutes, nothing is learned
    python -m tools.rivals --what rates --seeds 0        choose rates, on validation documents
    python -m tools.rivals --what ablations --seeds 0 1 2       one setting of RLP at a time
    python -m tools.rivals --what elastic         Elastic beside sizes alone, and its parts changed

Each run is `python train.py` with the words of its arm, in OUT/ARM-PRESET-seedN; of those in
CONTROLS `tools.controls` shows what is behind the figures. `python -m tools.report OUT/*` takes all
into results/. One seed takes about two hours on a core; two commands may share out seeds.
"""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import tyro

import train
from system.errors import exit_code, require
from system.files import read_json
from system.presets import PRESETS
from system.rundir import newest
from tools import controls, report

# `--init ARM` begins with what that arm became. cpt takes as many FLOPs as rlp, cpt-more half as
# many again, in about its time. Arms that are longer read problems of up to a step more than were
# ever worked, and nobody works them; distractors stand in those of the last three. CPT beside those
# takes about twice RLP's FLOPs, a quarter of them on text, and one more arm reads worked ones of as
# many steps as ever. Where most worked thoughts go wrong, a floor of 0 keeps RLP from fleeing into
# filler, which costs nothing.
MATCH = "--mode rlp --rlp.reward match --rlp.min-entropy 1 --rlp.lr 4e-4"
PLAIN = "--mode cpt --cpt.no-thoughts --cpt.muon-lr 0"
MORE = "--rlp.more-steps 1 --rlp.thought-len 48"
UNWORKED = "--rlp.steps 400 --rlp.text-share 0"
LONGER, ASIDE = f"{MORE} {UNWORKED}", f"--rlp.distractors {UNWORKED}"
ARMS = {
    "rlp": "--mode rlp",
    "match": MATCH,
    "cpt": "--mode cpt",
    "cpt-more": "--mode cpt --cpt.steps 1000",
    "cpt-plain": f"{PLAIN} --cpt.lr 1e-4",
    "cpt-tokens": "--mode cpt --cpt.steps 130",  # as many as rlp reads in contexts
    "sft": "--mode sft",
    "rlvr": "--mode rlvr --init sft",
    "rlp-sft": "--mode sft --init rlp",
    "rlp-rlvr": "--mode rlvr --init rlp-sft",
    "cpt-sft": "--mode sft --init cpt-more",
    "cpt-rlvr": "--mode rlvr --init cpt-sft",
    "rlp-longer": f"--mode rlp {LONGER}",
    "match-longer": f"{MATCH} {LONGER}",
    "cpt-longer": f"{PLAIN} --cpt.lr 3e-5 {MORE} --cpt.steps 2700",
    "cpt-worked-longer": "--mode cpt --rlp.thought-len 48 --cpt.steps 2700",
    "rlp-distractors": f"--mode rlp {ASIDE} --rlp.reward-floor 0 --rlp.lr 4e-4",
    "match-distractors": f"{MATCH} {ASIDE}",
    "cpt-distractors": f"{PLAIN} --cpt.lr 1e-5 --rlp.distractors --cpt.steps 2500",
}
# What `tools.controls` measures of which arm.
CONTROLS = dict.fromkeys(("rlp", "match", "cpt"), controls.PARTS) | dict.fromkeys(
    ("rlp-longer", "match-longer", "cpt-longer", "cpt-worked-longer", "rlp-distractors",
     "match-distractors", "cpt-distractors"), ("levels",))
# One setting of rlp at a time; the default stands in system/presets.py.
ABLATIONS = {
    f"rlp-{name}": f"--mode rlp {words}" for name, words in {
        "g2": "--rlp.group-size 2", "g4": "--rlp.group-size 4", "g16": "--rlp.group-size 16",
        "len20": "--rlp.thought-len 20", "len80": "--rlp.thought-len 80",
        "kl3": "--rlp.kl 1e-3", "kl2": "--rlp.kl 1e-2",
        "tau99": "--rlp.tau 0.99", "tau1": "--rlp.tau 1", "hot": "--rlp.temperature 1",
        "random": "--rlp.positions random", "back0": "--rlp.back 0",
        "answers": "--rlp.text-share 0",
        "predictor": "--rlp.predictor 0.1",
        "predictor1": "--rlp.predictor 1",
        "nofloor": "--rlp.reward-floor -inf"}.items()}
COMPUTED = {"rlp-paper": "--mode rlp --rlp.predictor 0"}  # of preset computed, which has the term
# Elastic, other ways to choose widths, shorter, and a budget a sequence; then, at a third of its
# steps, one setting at a time, and units in other orders at equal widths, by hand.
UNITS = " ".join(f"--elastic.score-{axis} random" for axis in ("ffn", "mamba", "attn", "depth"))
THIRD = "--elastic.steps 300 --eval.problems-per-family 75 --eval.samples 1"
WHOLE = "--elastic.budgets 1 .796 .606"  # what whole layers come nearest to 75 and 50 % by
ELASTIC = {"elastic": "--mode elastic --elastic.baseline separate minitron"} | {
    f"elastic-{name}": f"--mode elastic {words}" for name, words in {
        "sensitivity": "--elastic.choose sensitivity", "searched": "--elastic.choose search",
        "fifth": "--elastic.steps 600",
        "grown": "--warmup.steps 7100",  # a parent of ten times the family's tokens
        "drawn": "--elastic.no-together --elastic.steps 2250",  # as many FLOPs
        "five": "--elastic.budgets 1 .875 .75 .625 .5 --elastic.long-weights .2 .1 .1 .1 .5 "
                "--elastic.baseline separate",
        "third": THIRD,
        **{name: f"{THIRD} {words}" for name, words in {
            "alike": "--elastic.long-weights 1 1 1", "large": "--elastic.long-weights .5 .3 .2",
            "short": "--elastic.long-share 0", "long": "--elastic.long-share 1",
            "self": "--elastic.self-kl 1", "text": "--elastic.ce 1",
            "depth": "--elastic.depth-choices 6 5 4", "widths": WHOLE,
            "layers": f"{WHOLE} --elastic.depth-choices 6 4 2 --elastic.d-model-choices 128 "
                      "--elastic.ffn-choices 384 --elastic.mamba-head-choices 8 "
                      "--elastic.mamba-channel-choices 32 --elastic.attn-head-choices 4",
            "full": "--elastic.router-start full --elastic.search-share .3",
            "search": "--elastic.choose search",
            **{f"random{i}": f"--elastic.choose random --elastic.choose-seed {i}"
               for i in range(8)},
            "hand": "--elastic.choose fixed",
            "unturned": "--elastic.choose fixed --elastic.score-d-model output",
            "units": f"--elastic.choose fixed {UNITS}",
            "order": f"--elastic.choose fixed {UNITS} --elastic.score-d-model random"}.items()},
    }.items()}
SETS = {"rlp": ARMS, "ablations": ABLATIONS, "elastic": ELASTIC}
# As many tries for each: its arm with every rate, Muon's in proportion, and half of the problems.
RATES = {"rlp": ("--rlp.lr", (1e-4, 2e-4, 4e-4)), "match": ("--rlp.lr", (1e-4, 2e-4, 4e-4)),
         "cpt": ("--cpt.lr", (3.75e-4, 7.5e-4, 1.5e-3)),
         "cpt-longer": ("--cpt.lr", (1e-5, 3e-5, 1e-4)),
         "cpt-distractors": ("--cpt.lr", (1e-5, 3e-5, 1e-4)),
         "sft": ("--sft.lr", (1e-3, 2e-3, 4e-3)), "rlvr": ("--rlvr.lr", (1e-4, 2e-4, 4e-4))}


def rivals(seeds: tuple[int, ...] = (0, 1, 2, 3, 4), preset: str = "cpu",
           out: Path = Path("runs/rivals"),
           what: Literal["rlp", "ablations", "elastic", "rates"] = "rlp",
           arms: tuple[str, ...] = (), words: str = "") -> None:
    """Run every arm from the base of each seed.

    Args:
        seeds: Seeds of bases and runs.
        preset: Settings that arms change.
        out: Folder for the runs.
        what: Arms to run; rates tries the rates of RATES, on validation documents, and writes
            OUT/rates-PRESET.json.
        arms: Only these, and what they begin with.
        words: More words for every run, such as --words="--threads 1".
    """
    known = ARMS | ABLATIONS | ELASTIC | COMPUTED
    for name in arms:
        require(name in known, f"arms ({name}) is unknown; choose from {', '.join(known)}")
        require(what != "rates" or name in RATES, f"arms ({name}) has no rates to try; choose from "
                f"{', '.join(RATES)}")
    common = ["--preset", preset, *shlex.split(words)]

    def run(name: str, seed: int, folder: Path | None = None, more: tuple[str, ...] = ()) -> Path:
        """An arm's folder, once it has ended: what was stopped goes on, and what the arm begins
        with is run before it. Raises ValueError if that fails."""
        folder = folder or out / f"{name}-{preset}-seed{seed}"
        if (folder / "summary.json").exists():
            return folder
        own = known[name].split()
        if "--init" in own:
            at = own.index("--init") + 1
            own[at] = str(run(own[at], seed))
        going_on = ["--resume"] * (newest(folder) is not None)
        code = train.main([*common, "--seed", str(seed), *own, *more, "--out", str(folder),
                           *going_on])
        require(code == 0, f"{folder}: train.py ended with {code}; mend what it says, and give the "
                "command again")
        return folder

    if what == "rates":
        try_rates(run, arms or tuple(RATES), seeds, out, preset)
        return
    for seed in seeds:
        for name in arms or SETS[what]:
            folder = run(name, seed)
            if name in CONTROLS:
                measure(folder, CONTROLS[name])


def measure(folder: Path, parts: tuple[str, ...]) -> Path:
    """The file of a run's controls, which is written where it is missing."""
    if not (folder / "controls.json").exists():
        controls.write((folder,), parts)
    return folder / "controls.json"


def try_rates(run: Callable[..., Path], arms: tuple[str, ...], seeds: tuple[int, ...], out: Path,
              preset: str) -> None:
    """Every rate of these arms, and what it gave on half as many validation problems:
    OUT/rates-PRESET.json, in which other tries stay. run: see `rivals`."""
    found = []
    few = max(2, PRESETS[preset].eval.problems_per_family // 2)
    measured = "--eval.split", "val", "--eval.problems-per-family", str(few)
    for name in arms:
        setting, rates = RATES[name]
        config = train.parse(["--preset", preset, *ARMS[name].split()])
        own = getattr(config, config.mode)
        for rate in rates:
            muon = f"--{config.mode}.muon-lr", f"{own.muon_lr * rate / own.lr:g}"
            for seed in seeds:
                folder = out / "rates" / f"{name}-{rate:g}-{preset}-seed{seed}"
                run(name, seed, folder, (*measured, setting, str(rate), *muon * (own.muon_lr > 0)))
                summary = read_json(folder / "summary.json")
                mode = summary["mode"]
                found.append({"arm": name, "setting": setting, "rate": rate, "seed": seed, **{
                    how: summary["accuracy"][how]["all"][mode]["mean"]
                    for how in ("sampled", "greedy")}})
                if CONTROLS.get(name) == ("levels",):  # what it is tried for is not as trained
                    levels = read_json(measure(folder, ("levels",)))["levels"]
                    found[-1] |= {level: of["all"][mode]["mean"] for level, of in levels.items()}
    report.add_tries(out / f"rates-{preset}.json", found)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 if refused."""
    return exit_code(lambda: tyro.cli(rivals, args=argv, prog="python -m tools.rivals"))


if __name__ == "__main__":
    sys.exit(main())
