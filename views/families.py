"""Elastic beside its rivals, as rows of tables: means over seeds, ± half of Student's interval.

Made from what `tools.rivals --what elastic` measures. A difference is paired by seed.
"""

import statistics

import numpy as np

from views.rivals import Found, difference, now_or_before, spread
from views.tables import RIVALS, budget_heads, figure

FAMILIES = {f"elastic-{name}-cpu": told for name, told in {  # arms by their names in results/
    "sensitivity": "widths by sensitivity", "searched": "widths of the best of 50, untrained",
    "fifth": "two thirds of the steps", "drawn": "a budget a sequence, equal FLOPs"}.items()}
THIRDS = {f"elastic-{name}-cpu": told for name, told in {  # at a third of the steps
    "third": "the router", "alike": "stage 2, budgets alike",
    "large": "stage 2, the full one most, as in the paper", "short": "short texts alone",
    "long": "long texts alone", "self": "and taught by the full model", "text": "and by the text",
    "depth": "the router, layers may go too", "full": "the router, begun at full widths",
    "search": "the best of 50 random widths, untrained", "hand": "widths by hand",
    "unturned": "by hand, stream not turned", "units": "by hand, units in random order",
    "order": "by hand, units and stream in random order"}.items()}
ORDERS = [f"elastic-{name}-cpu" for name in ("hand", "unturned", "units", "order")]
GROWN = "elastic-grown-cpu"  # of a parent that read ten times the family's tokens
FIVE = "elastic-five-cpu"  # sizes, of which each sequence trains three
WHOLE = {"elastic-widths-cpu": "widths alone", "elastic-layers-cpu": "whole layers alone"}
RANDOM = [f"elastic-random{i}-cpu" for i in range(8)]


Arm = dict[int, list[dict]]  # by seed the entries of all budgets


def arm(runs: list[dict], name: str = "") -> Arm:
    """Of the family of each run, or of a rival that it has."""
    return {run["seed"]: run["baselines"][name] if name else run["budgets"] for run in runs
            if not name or name in run["baselines"]}


def with_rival(found: Found, name: str) -> tuple[list[dict], str]:
    """The families that were trained beside a rival, and of when (`rivals.now_or_before`)."""
    return now_or_before(lambda then: [
        run for run in found[f"{then}elastic-cpu"] if name in run["baselines"]])


def _at(entries: Arm, i: int, path: str) -> dict[int, float]:
    """By seed the mean at a path of budget i."""
    leaves = {seed: figure(own[i], path, "") for seed, own in entries.items()}
    return {seed: leaf["mean"] for seed, leaf in leaves.items() if leaf}


def arm_rows(first: tuple[str, list[dict]], others: dict[str, Arm]) -> list[list[str]]:
    """Right answers at every budget; the loss of the first arm, and the others' minus that, paired
    by seed."""
    name, runs = first
    if not runs:
        return [[]]
    heads, ours = budget_heads(runs[0]), arm(runs)
    n = range(len(heads))
    greedy, loss = "accuracy/greedy/all", "loss_nats"
    rows = [["", "seeds", *(f"greedy, {h}" for h in heads), *(f"loss, {h}" for h in heads)]]
    parent = {run["seed"]: [run["teacher"]] for run in runs}
    same = [spread(_at(parent, 0, path), form)
            for path, form in ((greedy, ".2f"), (loss, ".3f"))]
    rows.append(["parent", str(len(runs)), *(x for x in same for _ in heads)])
    for told, entries in {name: ours, **others}.items():
        losses = [list(_at(ours, i, loss).values()) if entries is ours else
                  difference(_at(entries, i, loss), _at(ours, i, loss)) for i in n]
        if entries:
            rows.append([told, str(len(entries)),
                         *(spread(_at(entries, i, greedy)) for i in n),
                         *(spread(x, ".3f" if entries is ours else "+.3f") for x in losses)])
    return rows


def beside_rivals(runs: list[dict], others: dict[str, Arm]) -> list[list[str]]:
    """`arm_rows` of families, the rivals that they were trained beside, and others."""
    rivals = {told: arm(runs, name) for name, told in RIVALS.items() if name != "elastic"}
    return arm_rows((RIVALS["elastic"], runs), rivals | others)


def family_rows(found: Found) -> list[list[str]]:
    """The default family, its rivals, and families that were trained otherwise."""
    return beside_rivals(found["elastic-cpu"], {
        told: arm(found[kind]) for kind, told in FAMILIES.items()})


def five_rows(found: Found) -> list[list[str]]:
    """Five sizes for about the cost of three, beside those below the full one alone."""
    return beside_rivals(found[FIVE], {})


def grown_rows(found: Found) -> list[list[str]]:
    """The same family of a parent that was trained three times as long."""
    return arm_rows((RIVALS["elastic"], found[GROWN]), {})


def cost_rows(found: Found) -> list[list[str]]:
    """What families and the rivals that were trained beside them took, each for all its sizes."""
    runs = [run for run in found["elastic-cpu"] if run.get("baselines_flops")]
    rows = [["", "seeds", "TFLOP", "of the family's", "seconds"]]
    for name, told in RIVALS.items():
        costs = [(flops / 1e12, flops / run["steps_flops"], run["train_s"][name]) for run in runs
                 if (flops := (run["baselines_flops"] | {"elastic": run["steps_flops"]}).get(name))]
        if costs:
            forms = zip(zip(*costs, strict=True), (".1f", ".2f", ".0f"), strict=True)
            rows.append([told, str(len(costs)), *(spread(list(x), form) for x, form in forms)])
    return rows


def third_rows(found: Found) -> list[list[str]]:
    """At a third of the steps: the router, other ways to choose widths, other orders of units; of
    the router the seeds that some other has, for right answers stand there side by side."""
    first, *others = THIRDS
    arms = {THIRDS[kind]: arm(found[kind]) for kind in others}
    shared = set().union(*arms.values())
    return arm_rows((THIRDS[first], [
        run for run in found[first] if run["seed"] in shared or not shared]), arms)


def layer_rows(found: Found) -> list[list[str]]:
    """At a third of the steps, narrower layers or fewer, at sizes that whole layers can have."""
    (first, told), (other, fewer) = WHOLE.items()
    return arm_rows((told, found[first]), {fewer: arm(found[other])})


def router_rows(found: Found) -> list[list[str]]:
    """The router's rank among random sets of widths that were trained alike, 1 for the least loss;
    and how much more they lose on the mean."""
    runs = [run for run in found["elastic-third-cpu"] if all(
        run["seed"] in {other["seed"] for other in found[kind]} for kind in RANDOM)]
    if not runs:
        return [[]]
    rows = [[f"the router, of {len(RANDOM) + 1}", "seeds", *budget_heads(runs[0])[1:]]]
    ranks, leads = [], []
    for i in range(1, len(runs[0]["budgets"])):
        ranks.append([])
        leads.append([])
        for run in runs:
            mine = run["budgets"][i]["loss_nats"]["mean"]
            others = [other["budgets"][i]["loss_nats"]["mean"] for kind in RANDOM
                      for other in found[kind] if other["seed"] == run["seed"]]
            ranks[-1].append(1.0 + sum(loss < mine for loss in others))
            leads[-1].append(statistics.mean(others) - mine)
    rows.append(["rank by loss", str(len(runs)), *(spread(r, ".1f") for r in ranks)])
    rows.append(["mean of random sets minus the router's, nats", str(len(runs)),
                 *(spread(x, "+.3f") for x in leads)])
    return rows


def curve_rows(found: Found) -> list[list[str]]:
    """What the smaller budgets lose while they train, KL from the parent, by the order of units."""
    kinds = {THIRDS[kind]: found[kind] for kind in ORDERS if found[kind]}
    if not kinds:
        return [[]]
    curves = next(iter(kinds.values()))[0]["curves"]
    budgets = list(curves)[1:]
    stretches = [at["until"] for at in curves[budgets[0]]]
    rows = [["training loss, up to step", "seeds", *map(str, stretches)]]
    for name, runs in kinds.items():
        for budget in budgets:
            by_stretch = [{at["until"]: at["mean"] for at in run["curves"][budget]} for run in runs]
            rows.append([f"{name}, {100 * float(budget):.0f} %", str(len(runs)), *(
                spread([run[until] for run in by_stretch if until in run], ".3f")
                for until in stretches)])
    return rows


def steps_rows(found: Found) -> list[list[str]]:
    """How many times the steps of units in order it takes to come as low as they did in each
    stretch, by seed. Between stretches a curve is straight in logarithms of steps and loss."""
    first = {run["seed"]: run for run in found[ORDERS[0]]}
    rows = [[]]
    for kind in ORDERS[1:]:
        pairs = [(first[run["seed"]], run) for run in found[kind] if run["seed"] in first]
        for budget in [*pairs[0][0]["curves"]][1:] if pairs else ():
            times = [_times_as_many(*(run["curves"][budget] for run in pair)) for pair in pairs]
            stretches = sorted(set.intersection(*map(set, times)))
            rows[0] = rows[0] or ["times the steps of units in order, to their loss up to step",
                                  "seeds", *map(str, stretches)]
            rows.append([f"{THIRDS[kind]}, {100 * float(budget):.0f} %", str(len(pairs)), *(
                "not reached" if np.inf in (x := [of_seed[until] for of_seed in times]) else
                spread(x, ".2f") for until in stretches)])
    return rows


def _times_as_many(first: list[dict], other: list[dict]) -> dict[int, float]:
    """By stretch of the first curve; `inf` where the other never comes as low."""
    until, mean = np.log([(at["until"], at["mean"]) for at in other]).T
    lowest = np.minimum.accumulate(mean)
    return {at["until"]: float(np.exp(np.interp(
        -np.log(at["mean"]), -lowest, until, right=np.inf))) / at["until"] for at in first}


def hand_over_rows(found: Found) -> list[list[str]]:
    """What it costs to read a problem with one size and to go on with another."""
    runs = [run for run in found["elastic-cpu"] if run.get("hand_over")]
    if not runs:
        return [[]]
    rows = [["right, greedy", "seeds", "read by itself", "handed over",
             "-log p of the answer, nats more"]]
    for i, pair in enumerate(runs[0]["hand_over"]):
        told = " → ".join(f"{100 * pair[side]:.0f} %" for side in ("read", "goes_on"))
        rows.append([told, str(len(runs)), *(
            spread([run["hand_over"][i][name]["mean"] for run in runs], form) for name, form in (
                ("own", ".2f"), ("handed", ".2f"), ("more_nats", "+.3f")))])
    return rows
