"""Figures of README.md and RESULTS.md, made from results/ and never by hand.

    python -m tools.report                          write them anew
    python -m tools.report runs/rlp-cpu-seed0       take a run into results/ first (its controls
                                                    too), or a rates-*.json of tools.rivals

RESULTS.md is written as a whole, README.md's tables between the lines `<!-- table NAME -->` and
`<!-- end -->`. A test compares both with what this file would write.
"""

import re
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import tyro

from system.errors import exit_code, require
from system.files import read_figures, read_json, write_figures
from system.presets import PRESETS
from views import families, plots, rivals
from views import tables as view


def load(folder: Path) -> dict[str, list[dict]]:
    """What results/ holds: by kind (`rlp-cpu`) the summaries by seed; `bench-cpu`, `bench-cuda`."""
    found = defaultdict(list)
    for file in sorted(folder.glob("*.json"), key=lambda file: (len(file.stem), file.stem)):
        kind = re.sub(r"-seed\d+$", "", re.sub(r"^bench-.*-", "bench-", file.stem))
        kind = re.sub(r"^checked-.*", "checked", kind)
        found[kind].append(read_figures(file))
    return found


# --------------------------------------------------------------------------------- tables of README


def tables(folder: Path) -> dict[str, str]:
    """Every generated part of README.md by its name; `Not run.` where results/ lacks it."""
    found, shown = load(folder), folder / "rlp-cpu-seed0.txt"
    made = {"rlp": found["rlp-cpu"] and rlp_table(found),
            "elastic": found["elastic-cpu"] and elastic_table(found["elastic-cpu"]),
            "positions": found["rlp-computed"] and position_table(found),
            "speed": speed_table(found["bench-cpu"]), "samples": shown.exists() and samples(shown)}
    return {name: text or "Not run." for name, text in made.items()}


def rlp_table(found: dict[str, list[dict]]) -> str:
    """The base, RLP, and the same base pretrained with as many FLOPs as RLP took."""
    kinds = (("base", "rlp-cpu", "base"), ("RLP", "rlp-cpu", "rlp"),
             ("CPT, equal FLOPs", "cpt-cpu", "cpt"))
    columns = {f"{name}, {n_seeds(found[kind])}": (found[kind], who)
               for name, kind, who in kinds if found[kind]}
    return view.markdown(view.thought_rows(columns, [
        "gain over the frozen base, nats", "accuracy, sampled thoughts", "accuracy, greedy thought",
        "loss on text, no thought, nats", "gain at ordinary text, nats"]))


def position_table(found: dict[str, list[dict]]) -> str:
    """What thoughts gain at random positions of documents with results to be computed."""
    head, *rows = rivals.position_rows(found)
    shown = ("gain over the frozen base, nats", "gain over another's thought, nats",
             "gain at ordinary text, nats", "problems right, sampled")
    head[0] += f", {n_seeds(found['rlp-computed'])}"
    return view.markdown([head[:4], *(row[:4] for row in rows if row[0] in shown)])


def elastic_table(runs: list[dict]) -> str:
    """A family over its seeds, and how far sizes alone are from it."""
    sizes = [run["budgets"] for run in runs]
    rows = [[n_seeds(runs), *view.budget_heads(runs[0])],
            ["parameters, mean", *(f"{statistics.mean(e['parameters'] for e in size):,.0f}"
                                   for size in zip(*sizes, strict=True))],
            ["loss, of the parent's", *over_sizes(sizes, "loss_change", "+.1%")],
            *([f"{how} accuracy, of the parent's", *(
                view.cell(view.over_seeds(size), ".0%") for size in shares)]
              for how in ("sampled", "greedy") if (shares := kept(runs, how)))]
    if beside := [run for run in runs if "separate" in run["baselines"]]:
        fewer = f" ({n_seeds(beside)})" if len(beside) < len(runs) else ""
        told, alone = view.RIVALS["separate"], [run["baselines"]["separate"] for run in beside]
        if shares := kept(beside, "greedy", "separate"):
            rows.append([f"{told}: greedy accuracy{fewer}", *(
                view.cell(view.over_seeds(size), ".0%") for size in shares)])
        rows.append([f"{told}: nats minus elastic{fewer}",
                     *over_sizes(alone, "difference_nats", "+.3f")])
    return view.markdown(rows)


def kept(runs: list[dict], how: str, rival: str = "") -> list[list[dict]]:
    """For each budget, and in it each seed, the share of the parent's accuracy that the family
    keeps, or a rival; nothing where a run did not measure it."""
    if not runs or not all("accuracy" in run["teacher"] for run in runs):
        return []
    parents = [run["teacher"]["accuracy"][how]["all"]["mean"] for run in runs]
    if not all(parents):  # one that answers nothing keeps nothing
        return []
    sizes = [run["baselines"][rival] if rival else run["budgets"] for run in runs]
    shares = [[e["accuracy"][how]["all"]["mean"] / parent for e in family]
              for family, parent in zip(sizes, parents, strict=True)]
    return [[exact(x) for x in size] for size in zip(*shares, strict=True)]


def exact(x: float) -> dict:
    """A figure without an interval of its own."""
    return {"mean": x, "low": x, "high": x}


def over_sizes(families: list[list[dict]], key: str, form: str) -> list[str]:
    """For each budget a figure over the seeds; `families` has a family for each seed."""
    return [view.cell(view.over_seeds([e[key] for e in size]), form)
            for size in zip(*families, strict=True)]


def speed_table(found: list[dict]) -> str:
    """A row a benchmark: ours beside the fastest of the others that do the same work. Left out are
    decoding, a part of the RLP step, and the base's step, of which all but an optimizer is ours.
    Where each has a process of its own, results were compared on a small model."""
    rows = [["one CPU thread, if not said otherwise", "ours, ms", "the fastest other", "ms",
             "times as long", "times the memory"]]
    for bench in found:
        ours, *others = bench["rows"]
        compared = [r for r in others if "difference" in r or bench.get("is_apart")]
        same = [r for r in compared if "ms" in r and not r["name"].startswith("ours")]
        if same and bench["bench"] not in ("decode", "base-step"):
            best = min(same, key=lambda row: row["ms"])
            threads = f", {bench['threads']} threads" * (bench["threads"] > 1)
            rows.append([bench["title"].split(", ")[0] + threads, f"{ours['ms']:.4g}", best["name"],
                         f"{best['ms']:.4g}", f"{best['times_ours']:.1f}",
                         f"{best['peak_bytes'] / ours['peak_bytes']:.1f}"])
    return view.markdown(rows) if rows[1:] else ""


def samples(file: Path) -> str:
    """The first problem of each family in a run's samples.txt, with a thought before and after;
    without those at which the thought stayed as it was."""
    blocks = re.split(r"(?m)^(?=\[)", file.read_text())
    first = {block.split("]")[0]: block for block in reversed(blocks) if block.startswith("[")}
    changed = [first[name] for name in sorted(first) if len({
        line.split(": ", 1)[1] for line in first[name].splitlines() if "<think>" in line}) > 1]
    return "```text\n" + "".join(changed) + "```"


def n_seeds(runs: list) -> str:
    """`3 seeds`."""
    return f"{len(runs)} seed{'s' * (len(runs) != 1)}"


# ------------------------------------------------------------------------------------------- claims

RULE = """A claim is reproduced where all its checks hold, in part where some do. A check is of a
95 % interval: over seeds (Student's t, paired), or over problems or sequences where there is one
seed. Every seed must hold by itself for the loss without a thought, the loss beside the parent's
(at most 1 % above), budgets (within 1 %) and memory. As good as a rival is at most 1 % of the
parent's loss behind. What `results/` lacks is not tested here. Sizes stand in order, the largest
first."""
TERM = "with the predictor's term, which the paper leaves out: "


def above(leaves: list[dict], others: list[dict] | None = None) -> bool:
    """Whether figures are surely larger than others, or than 0 if there are none: see RULE."""
    if len(leaves) < 2:
        return bool(leaves) and leaves[0]["low"] > (others[0]["high"] if others else 0)
    others = others or [exact(0)] * len(leaves)
    d = [a["mean"] - b["mean"] for a, b in zip(leaves, others, strict=True)]
    return statistics.mean(d) > rivals.half_width(d)


def lower(found: dict[str, list[dict]], ours: str, theirs: str, key: str, first: int = 0
          ) -> tuple[list[dict], list[bool], str, str]:
    """Two arms of Elastic on the seeds that both have, by a loss at each budget from the first on:
    the second's runs, whether ours is surely lower, how far, and of when (`rivals.pair`)."""
    *pairs, then = rivals.pair(found, ours, theirs)
    sizes = list(zip(*([[e[key] for e in size] for size in zip(
        *(run["budgets"][first:] for run in side), strict=True)] for side in pairs), strict=True))
    shown = ", ".join(rivals.spread([b["mean"] - a["mean"] for a, b in zip(
        *size, strict=True)], "+.3f") for size in sizes)
    return pairs[1], [above(others, mine) for mine, others in sizes], shown, then


def claims(found: dict[str, list[dict]]) -> list[list[str]]:
    """The table of claims; the first row is its head."""
    head = ["claim of the paper", "here", "figure", "seeds", "command", "commit"]
    methods = {"RLP": rlp_claims, "Elastic": elastic_claims}
    return [head, *([f"{method}: {claim}", *cells] for method, rows in methods.items()
                    for claim, *cells in rows(found))]


def judged(claim: str, command: str, runs: list[dict] = (), checks: list[bool] = (),
           figures: str = "") -> list[str]:
    """A row of that table: a claim, what the checks say of it, and the runs that it is judged by.
    """
    verdict = ("not tested here" if not runs else "reproduced" if all(checks) else
               "in part" if any(checks) else "**not reproduced**")
    seeds = ", ".join(str(run["seed"]) for run in runs)
    commits = ", ".join(sorted({view.commit(run) for run in runs}))
    program = "" if command.startswith("-m") else "train.py "
    return [claim, verdict, figures if runs else "", seeds, f"`python {program}{command}`", commits]


def rlp_claims(found: dict[str, list[dict]]) -> Iterator[list[str]]:
    """Of RLP."""
    def get(path: str, runs: list[dict], who: str = "rlp") -> list[dict]:
        return [view.figure(run, path, who) for run in runs]

    def text(path: str, runs: list[dict], who: str = "rlp", form: str = ".2f") -> str:
        return view.cell(view.over_seeds(get(path, runs, who)), form)

    def against(*sides: list[dict]) -> str:
        return " against ".join(view.cell(view.over_seeds(side)) for side in sides if side)

    rlp = found["rlp-cpu"]
    ours, cpt, told = rivals.pair(found, "rlp-cpu", "cpt-cpu")
    sampled, greedy = "accuracy/sampled/all/WHO", "accuracy/greedy/all/WHO"
    gain, change = "positions/{}/WHO/gain_nats/frozen_base", "loss_nats/no_think_text_change"
    yield judged("thoughts learn to answer where thinking is needed", "--mode rlp", rlp,
        [above(get(sampled, rlp), get(sampled, rlp, "base"))],
        f"accuracy {text(sampled, rlp, 'base')} → {text(sampled, rlp)}")
    yield judged("thoughts gain over the EMA teacher, which does not think", "--mode rlp", rlp,
        [above(get("gain_nats/ema", rlp))], f"{text('gain_nats/ema', rlp)} nats at answers")
    for kind, arm, note, words in (
            ("text", "rlp-cpu", "", "cpu"),
            ("computed", "rlp-paper-computed", "", "computed --rlp.predictor 0"),
            ("computed", "rlp-computed", TERM, "computed")):
        runs, name = [run for run in found[arm] if kind in run["positions"]], view.POSITIONS[kind]
        before, there = (get(gain.format(kind), runs, who) for who in ("base", "rlp"))
        for claim, sides in (("thoughts gain at random positions of", [there]),
                             ("it raises what thoughts gain in", [there, before])):
            yield judged(f"{note}{claim} {name}", f"--mode rlp --preset {words}", runs,
                [above(*sides)], f"{against(*sides)} nats")
    yield judged("better than continued pretraining at equal compute", "--mode cpt", cpt,
        [above(get(path, ours), get(path, cpt, "cpt")) for path in (sampled, greedy)],
        f"accuracy {text(sampled, ours)} against {text(sampled, cpt, 'cpt')}; with a greedy "
        f"thought {text(greedy, ours)} against {text(greedy, cpt, 'cpt')}{told}")
    yield judged("prediction without a thought does not collapse; it gets better", "--mode rlp",
        rlp, [all(leaf["high"] < bound for leaf in get(change, rlp)) for bound in (0.05, 0)],
        f"loss on text {text(change, rlp, form='+.1%')}")
    for claim, kind, path in (
            ("better than the reward of RPT", "match-cpu", greedy),
            ("still ahead after SFT and RLVR, of the base with both", "rlvr-cpu", greedy),
            ("still ahead after SFT and RLVR, of CPT of half as many FLOPs again with both",
             "cpt-rlvr-cpu", greedy)):
        mine = "rlp-cpu" if kind == "match-cpu" else "rlp-rlvr-cpu"
        *sides, told = rivals.pair(found, mine, kind)
        leaves = [[view.figure(run, path, run["mode"]) for run in side] for side in sides]
        yield judged(claim, "-m tools.rivals", sides[1], [above(*leaves)],
            f"greedy {against(*leaves)}{told}")
    behind = found["controls-rlp-cpu"]
    for claim, path, other in (
            ("what a thought gains hangs on its context", "thoughts/own", "thoughts/swapped"),
            ("thinking carries further than what was shown: three steps more",
             "levels/3 more/all/WHO", "levels/3 more/all/base"),
            ("solves what 32 thoughts of the base do not", "pass/32/WHO", "pass/32/base")):
        ours_there, others = (get(p, behind) for p in (path, other))
        yield judged(claim, "-m tools.controls runs/rlp-cpu-seed0", behind,
            [above(ours_there, others)], against(ours_there, others))
    for what, (_, told, level) in rivals.UNWORKED.items():
        ours, others = f"rlp-{what}", f"cpt-{what}"
        mine, theirs, _ = rivals.pair(found, f"controls-{ours}-cpu", f"controls-{others}-cpu")
        there = f"levels/{level}/all/WHO"
        sides = [get(there, mine), get(there, mine, "base"), get(there, theirs, "cpt")]
        yield judged(f"it learns from problems {told}, which nobody worked; CPT of them does not",
            f"-m tools.rivals --arms {ours} {others}", mine,
            [*(above(sides[0], other) for other in sides[1:]), not above(sides[2], sides[1])],
            f"there greedy {text(there, mine)}, base {text(there, mine, 'base')}, CPT "
            f"{text(there, theirs, 'cpt')}")
    yield judged("it holds for models of 1.7B and 12B", "--preset qwen3-1.7b-rlp")


def elastic_claims(found: dict[str, list[dict]]) -> Iterator[list[str]]:
    """Of Nemotron Elastic."""
    runs, alone = found["elastic-cpu"], "--mode elastic"
    sizes = [run["budgets"] for run in runs]
    off = max((abs(e["cost"] / e["target"] - 1) for size in sizes for e in size), default=0)
    yield judged("one run gives all sizes, and each meets its budget", alone, runs, [off < 0.01],
        f"off by {off:.1%} at most")
    yield judged("sizes are cut out with no further training, as good as the parent", alone, runs,
        [e["loss_change"]["high"] < 0.01 for size in sizes for e in size],
        f"loss {', '.join(over_sizes(sizes, 'loss_change', '+.1%'))}")
    for claim, name, margin in (
            ("better than sizes distilled alone, equal FLOPs in all", "separate", 0),
            ("as good as sizes distilled alone, each on as many tokens", "minitron", 0.01),
            ("better than sizes trained from scratch, as the parent was", "scratch", 0)):
        theirs, then = families.with_rival(found, name)
        others = [[e for e in run["baselines"][name] if e["parameters"] < run["teacher"][
            "parameters"]] for run in theirs]  # the full one is the parent
        shown = ", ".join(over_sizes(others, "difference_nats", "+.3f"))
        least = [exact(-margin * run["teacher"]["loss_nats"]["mean"]) for run in theirs]
        yield judged(claim, f"{alone} --elastic.baseline {name}", theirs,
            [above([e["difference_nats"] for e in size], least)
             for size in zip(*others, strict=True)],
            f"{view.RIVALS[name]} minus elastic: {shown} nats{then}")
    for name, how, times in (("scratch", "from scratch", 360), ("minitron", "alone", 7)):
        ratios = {run["seed"]: run["baselines_flops"][name] / run["steps_flops"] for run in runs
                  if name in run.get("baselines_flops", {})}
        yield judged(f"sizes {how} take {times} times as much (there, of tokens)",
            f"{alone} --elastic.baseline {name}", [run for run in runs if run["seed"] in ratios],
            [ratio >= times for ratio in ratios.values()],
            f"{rivals.spread([*ratios.values()])} times the FLOPs, to the losses above")
    for claim, ours, kind in (
            ("the order of importance matters", "elastic-hand-cpu", "elastic-units-cpu"),
            ("so does that of the stream, here turned", "elastic-units-cpu", "elastic-order-cpu"),
            ("the larger budgets more often in stage 2", "elastic-large-cpu", "elastic-alike-cpu"),
            *((f"the router, begun at {begun}, beats {told}", f"elastic-{ours}-cpu",
               f"elastic-{theirs}-cpu")
              for begun, ours in (("full widths, as the paper's", "full"),
                                  ("widths by sensitivity", "third"))
              for told, theirs in (("widths by hand", "hand"),
                                   ("the best of 50 sets of widths", "search"))),
            ("the router beats widths by sensitivity", "elastic-cpu", "elastic-sensitivity-cpu")):
        full_too = kind == "elastic-alike-cpu"  # weights of budgets change the full one as well
        *compared, shown, then = lower(found, ours, kind, "loss_nats", first=int(not full_too))
        yield judged(claim, "-m tools.rivals --what elastic", *compared,
            f"{(families.FAMILIES | families.THIRDS)[kind]}, minus that: {shown} nats{then}")
    # Both with budgets weighed alike: else the weights of stage 2 would pass for its long texts.
    *compared, shown, _ = lower(found, "elastic-alike-cpu", "elastic-short-cpu", "long_loss_nats")
    yield judged("the second stage, of long texts, helps on them", "-m tools.rivals --what elastic",
        *compared, f"there, short texts alone minus that: {shown} nats")
    memory = [[run["memory"][f"{k}_memory"] / 1e6 for k in ("family", "separate")] for run in runs]
    yield judged("a family needs the memory of its largest model and of routers", alone, runs,
        [family < 0.6 * separate for family, separate in memory],
        "; ".join(f"{family:.2f} MB, apart {separate:.2f}" for family, separate in memory[:1]))
    for kind, claim, words in (
            ("elastic-cpu", "accuracy is kept: 97 % of the parent's at 75 %, 90 % at 50 %", ""),
            (families.GROWN, "as much is kept in a tenth of the parent's tokens",
             " --warmup.steps 7100")):
        sizes_kept = kept(found[kind], "greedy")
        yield judged(claim, alone + words, sizes_kept and found[kind],
            [above(size, [exact(least)] * len(size)) for size, least in
             zip(sizes_kept[1:], (0.97, 0.9), strict=False)],
            ", ".join(view.cell(view.over_seeds(size), ".0%") for size in sizes_kept))
    yield judged("it holds for a model of 12B", "--preset nemotron-12b-elastic")


# --------------------------------------------------------------------------------------- RESULTS.md


def whole_seconds(run: dict) -> float:
    """Of a run with its base, whether or not that was trained in it."""
    return run["wall_s"] + run["base_train_s"] * run["base_was_cached"]


def speedrun_rows(runs: list[dict]) -> list[list[str]]:
    """How long each default run took to a base, and to .90 right with sampled thoughts."""
    rows = [["seed", "base, s", "to .90, base included, s", "whole run, s", "machine", "commit"]]
    for run in runs:
        base, reached = run["base_train_s"], run["seconds_to_90"]
        rows.append([str(run["seed"]), f"{base:.0f}",
                     "not reached" if reached is None else f"{base + reached:.0f}",
                     f"{whole_seconds(run):.0f}",
                     f"{run['machine']}, {run['instructions']}, threads: {run['threads']}",
                     view.commit(run)])
    return rows


INTRO = """# Results

Made from `results/` by `python -m tools.report`, never by hand. In brackets stands the 95 %
interval of a figure; of a mean over seeds, the smallest and the largest. The base is small, and was
not trained to its end.

## Claims of the papers

"""
RLP = """## RLP

Targets are answers of problems, and tokens at random places of ordinary text and of documents whose
results need thinking; gains there are against the frozen base without a thought. CPT is the base,
trained on with as many FLOPs; beside problems that nobody worked, with about twice as many, a
quarter of them on text. FLOPs of RLP are those of the groups that taught something; of arms that
begin with another, those of both. `python -m tools.rivals` runs all arms.
"(before)" marks runs of the default as it was before 2026-11-28, both of a pair.

![Accuracy by family, before and after RLP; a dot is a seed](results/accuracy.png)"""
RELEASED = """## A released model

SmolLM2-135M-Instruct, warmed up so that it resumes after worked thoughts, then each arm with
adapters from there, on three tasks of reasoning-gym; no arm but CPT reads text. The frozen base is
the warmed-up model; a seed draws held-out problems of its own, the same for every arm. RLP and RLVR
have 150 steps, CPT 300. Commands: [docs/real-models.md](docs/real-models.md)."""
RELEASED_ARMS = {"as released": ("smol-as", "base"), "warmed up": ("smol-rlp", "base"),
                 "RLP": ("smol-rlp", "rlp"), "RLVR": ("smol-rlvr", "rlvr"),
                 "CPT": ("smol-cpt", "cpt")}
RELEASED_FAMILIES = {
    "Elastic on the model as released: order of units alone, tied": "smol-order",
    "Elastic on the model as released: turned stream, untied": "smol-untied"}
RELEASED_ROWS = ("loss on text", "against the parent", "KL from the parent", "same likeliest token",
                 "parameters", "cost, of its target", "MFLOPs a token", "tokens a second")
BEFORE = """### Before a chain's thought ended with the name that is asked for

Until 2026-11-28, when thoughts in text stood two tokens early and RLP's default had the predictor's
term at .1; bases of another kind of processor. What has not been run again since stands here beside
RLP and CPT of that time, and Elastic, which drew one budget for each sequence then."""
SPEEDRUN = """## Speedrun

Seconds from random weights until nine of ten training problems are right, with sampled thoughts,
over ten steps; then to the end of the run and of its held-out figures. `python train.py`"""
ELASTIC = """## Elastic

Held-out text and problems, weighted as in training. In the first tables a difference is the loss
minus the family's of the same seed, with the interval over seeds; below, of a seed, it is paired by
sequence, and too narrow: windows of one text count one by one. Sizes alone have the widths of the
family's routers; their full size is the parent. "won, lost" are problems that a size has right
and its parent wrong, and the other way (McNemar's p).
`python -m tools.rivals --what elastic` runs all.

![What each budget keeps, layer by layer](results/widths.png)

![Loss against size](results/sizes.png)"""
SPEED = """## Speed

`python -m tools.bench all`: each must give our values and gradients, then all take turns in one
process. On one CPU thread the time is the processor's."""


CHECKED = """## What was checked where

`python -m tools.gpu_check` on each machine: values and gradients against fp64, exact sums, repeats,
several assemblers, speed beside what memory allows, memory beside the estimate, whole runs. Tests
compile every kernel for cards of compute capability 8.0 to 10.0, and run all in an interpreter."""


def checked_rows(found: list[dict]) -> list[list[str]]:
    """A row a machine: how many parts were right, which failed, which it could not run."""
    rows = [["machine", "date", "torch", "commit", "right", "failed", "needs a card"]]
    for facts in found:
        m, parts = facts["machine"], facts["parts"]
        named = {status: ", ".join(p["part"] for p in parts if p["status"].startswith(status))
                 for status in ("right", "failed", "needs a card")}
        rows.append([m.get("card and compiler", f"{m['machine']}, {m['instructions']}"), m["date"],
                     m["torch"], m["commit"], *(text or "none" for text in named.values())])
    return rows


def before_parts(found: dict[str, list[dict]]) -> list[str]:
    """Arms and ablations of runs before the default changed, among themselves."""
    then = defaultdict(list, {kind.removeprefix("before-"): runs for kind, runs in found.items()
                              if kind.startswith("before-")})
    makes = (rivals.arm_rows, rivals.lead_rows, rivals.ablation_rows, families.family_rows,
             families.third_rows, families.router_rows, families.curve_rows,
             families.steps_rows)
    made = [rows for make in makes if (rows := make(then))[1:]]
    return [BEFORE, *map(view.markdown, made)] if made else []


def took(run: dict) -> str:
    """What a run of a released model took."""
    return f"{run['steps_s'] / 60:.0f} min of steps, {run['peak_memory_gib']:.1f} GiB"


def released_parts(found: dict[str, list[dict]]) -> list[str]:
    """What a released model became: by problems, and made elastic."""
    if not found["smol-rlp"]:
        return []

    def of_arms(prefix: str = "") -> dict[str, tuple[list[dict], str]]:
        return {f"{name}, {n_seeds(runs)}": (runs, who)
                for name, (kind, who) in RELEASED_ARMS.items() if (runs := found[prefix + kind])}

    columns = of_arms()
    tasks = next(iter(columns.values()))[0][0]["accuracy"]["greedy"]
    labels = ["gain over the frozen base, nats", "gain over no thought, nats",
              "gain over an empty thought, nats", "gain over another's thought, nats",
              "accuracy, sampled thoughts", "accuracy, greedy thought", "accuracy, no thought",
              *(f"  {name}, sampled thoughts" for name in tasks if name != "all"),
              "thought, tokens", "thoughts that close", "loss on text, no thought, nats",
              "gain at ordinary text, nats"]
    parts = [RELEASED, view.markdown(view.thought_rows(columns, labels)), "; ".join(
        f"{name} {took(found[kind][0])}"
        for name, (kind, who) in RELEASED_ARMS.items() if found[kind] and who != "base")]
    if (rows := view.pass_rows(of_arms("controls-")))[1:]:
        parts.append(view.markdown(rows))
    if text := found["smol-text"]:
        columns = {"before RLP": (text, "base"), f"RLP, {n_seeds(text)}": (text, "rlp")}
        rows = view.thought_rows(columns, [
            *(f"{label} ordinary text{unit}" for label, unit, _ in view.AT_POSITIONS),
            "gain where text repeats, nats", "loss on text, no thought, nats"])
        rows[0][0] = "at random positions of text"
        parts += ["### The same model at random positions of text", view.markdown(rows),
                  took(text[0])]
    for title, kind in RELEASED_FAMILIES.items():
        for run in found[kind]:
            head, *rows = view.budget_rows(run)
            rows = [row for row in rows if row[0] in RELEASED_ROWS]
            parts += [f"### {title}", view.markdown([head, *rows]), took(run)]
    return parts


def results(folder: Path) -> str:
    """All of RESULTS.md."""
    found = load(folder)
    parts = [INTRO + RULE, view.markdown(claims(found)), RLP]
    kinds = {"RLP": "rlp-cpu", "CPT": "cpt-cpu"}
    for title, rows in (
            ("Arms, from one base a seed", rivals.arm_rows(found)),
            ("How far RLP is ahead", rivals.lead_rows(found)),
            ("Thoughts at random positions of documents with results to be computed",
             rivals.position_rows(found)), ("", rivals.gate_rows(found)),
            ("By level", rivals.level_rows(found)), ("", rivals.hard_rows(found)),
            *((f"Problems {told}, which nobody worked", rivals.unworked_rows(found, what))
              for what, (_, told, _) in rivals.UNWORKED.items()),
            ("Sharpening or more", rivals.pass_rows(found)),
            ("What is left of a thought", rivals.remains_rows(found)),
            ("What thoughts change", rivals.changed_rows(found)),
            ("One setting at a time", rivals.ablation_rows(found)),
            ("Rates that were tried, on validation problems",
             rivals.rate_rows([t for rates in found["rates-cpu"] for t in rates["tries"]]))):
        if rows[1:]:
            parts += [f"### {title}"] * bool(title) + [view.markdown(rows)]
    parts += before_parts(found)
    for seed in sorted({run["seed"] for kind in kinds.values() for run in found[kind]}):
        runs = {name: run for name, kind in kinds.items() for run in found[kind]
                if run["seed"] == seed}
        columns = {"base": ([next(iter(runs.values()))], "base"),
                   **{name: ([run], run["mode"]) for name, run in runs.items()}}
        costs = []
        for name, run in runs.items():
            costs.append(f"{name} {whole_seconds(run) / 60:.1f} min with the base, "
                         f"{run['peak_memory_gib']:.1f} GiB, commit {view.commit(run)}")
        parts += [f"### Seed {seed}", view.markdown(view.thought_rows(columns)), "; ".join(costs)]
    parts += released_parts(found)
    if timed := [run for run in found["rlp-cpu"] if "seconds_to_90" in run]:
        parts += [SPEEDRUN, view.markdown(speedrun_rows(timed))]
    parts.append(ELASTIC)
    for title, rows in (("Elastic beside its rivals and variants", families.family_rows(found)),
                        ("What each took, for all its sizes", families.cost_rows(found)),
                        ("Of a parent that read ten times the family's tokens",
                         families.grown_rows(found)),
                        ("Five sizes, of which each sequence trains three",
                         families.five_rows(found)),
                        *((f"Between those five, seed {run['seed']}", view.between_rows(run))
                          for run in found[families.FIVE]),
                        ("Single settings, at a third of the steps", families.third_rows(found)),
                        ("The router among random widths, at a third", families.router_rows(found)),
                        ("Narrower layers or fewer, at a third", families.layer_rows(found)),
                        ("The order of units, while budgets train", families.curve_rows(found)),
                        ("How much longer other orders train", families.steps_rows(found)),
                        ("Read by one size, answered by another",
                         families.hand_over_rows(found))):
        if rows[1:]:
            parts += [f"### {title}", view.markdown(rows)]
    for run in found["elastic-cpu"]:
        between = view.between_rows(run)
        parts += [f"### Seed {run['seed']}", view.markdown(view.budget_rows(run)),
                  *([view.markdown(between)] if between else []),
                  *[view.markdown(view.rival_rows(run))] * bool(run["baselines"]),
                  f"Family: {run['train_s']['elastic']:.0f} s, commit {view.commit(run)}"]
    parts.append(SPEED)
    for device in ("cpu", "cuda"):
        for bench in found[f"bench-{device}"]:
            parts += [f"### {bench['bench']}, {device}", view.bench_table(bench)]
    if found["checked"]:
        parts += [CHECKED, view.markdown(checked_rows(found["checked"]))]
    return "\n\n".join(parts) + "\n"


def fill(text: str, made: dict[str, str]) -> str:
    """The text with every generated part replaced. Raises ValueError for one that nobody makes."""
    def put(match: re.Match) -> str:
        require(match[2] in made, f"README.md has a table {match[2]!r}, which is not made; take it "
                f"out, or name one of {', '.join(made)}")
        return f"{match[1]}{made[match[2]]}\n<!-- end -->"

    return re.sub(r"(<!-- table (\S+) -->\n).*?<!-- end -->", put, text, flags=re.S)


def add_tries(file: Path, tries: list[dict]) -> None:
    """Rates that were tried into a file: those of before stay, the same ones are taken anew."""
    known = read_json(file)["tries"] if file.exists() else []
    by_try = {(t["arm"], t["rate"], t["seed"]): t for t in (*known, *tries)}
    write_figures(file, {"tries": list(by_try.values())})


def report(run_dirs: list[str], root: Path = Path(__file__).parent.parent) -> None:
    """Copy summary and samples of the runs named, then write README.md, RESULTS.md and the plots
    from results/. Raises ValueError for a folder that holds no finished run."""
    folder, readme = root / "results", root / "README.md"
    folder.mkdir(exist_ok=True)
    for run_dir in map(Path, run_dirs):
        if run_dir.match("rates-*.json"):
            add_tries(folder / run_dir.name, read_json(run_dir)["tries"])
            continue
        require((run_dir / "summary.json").is_file(), f"{run_dir} holds no summary.json, so no run "
                "has ended there; give the folder of a finished run")
        summary = read_figures(run_dir / "summary.json")
        *_, named, number = ["", "", *run_dir.resolve().name.split("-")]
        preset, seed = summary.get("preset", named), summary.get("seed")
        require(number == f"seed{seed}" and (named == preset or named not in PRESETS),
                f"{run_dir} holds a run of preset {preset} and seed {seed}, which its name does "
                "not say; results are known as ARM-PRESET-seedN: rename the folder")
        require(summary.get("split", "test") == "test", f"{run_dir} was measured on validation "
                "documents, to choose settings; give a run without --eval.split val")
        summary.pop("base_dir", None)  # a path of one machine
        write_figures(folder / f"{run_dir.name}.json", summary)
        if (run_dir / "controls.json").exists():
            shutil.copyfile(run_dir / "controls.json", folder / f"controls-{run_dir.name}.json")
        if (run_dir / "samples.txt").exists():  # pretraining has none
            shutil.copyfile(run_dir / "samples.txt", folder / f"{run_dir.name}.txt")
    found = load(folder)
    readme.write_text(fill(readme.read_text(), tables(folder)))
    (root / "RESULTS.md").write_text(results(folder))
    if found["rlp-cpu"]:
        plots.plot_accuracy(found["rlp-cpu"], folder / "accuracy.png")
    for run in found["elastic-cpu"][:1]:
        plots.plot_widths(run, folder / "widths.png")
        plots.plot_sizes(run, folder / "sizes.png")


def command(runs: tyro.conf.Positional[tuple[str, ...]] = ()) -> None:
    """Keep figures of runs in results/, then write README.md, RESULTS.md and the plots from there.

    Args:
        runs: Folders of finished runs, named ARM-PRESET-seedN, and files rates-PRESET.json.
    """
    report([*runs])


def main(argv: list[str] | None = None) -> int:
    """`python -m tools.report [RUN ...]`. Returns 0, or 2 for a run that cannot be read."""
    return exit_code(lambda: tyro.cli(command, args=argv, prog="python -m tools.report"))


if __name__ == "__main__":
    sys.exit(main())
