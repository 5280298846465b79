"""RLP beside its rivals, as rows of tables: means over seeds, ± half of Student's 95 % interval.

Made from what `tools.rivals` and `tools.controls` measure. A difference is paired by seed.
"""

import statistics
from collections.abc import Callable

from views.tables import POSITIONS, figure

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # of a 95 % interval from so many seeds, Student's t

ARMS = {  # by their names in results/, what tables call them
    "rlp-cpu": "RLP", "rlp-paper-cpu": "RLP without the predictor's term (the paper's)",
    "match-cpu": "the reward of RPT", "cpt-cpu": "CPT, FLOPs of RLP",
    "cpt-more-cpu": "CPT, half as many FLOPs again",
    "cpt-plain-cpu": "CPT on what RLP reads, its FLOPs", "cpt-tokens-cpu": "CPT, tokens of RLP",
    "sft-cpu": "SFT", "rlvr-cpu": "SFT, RLVR", "rlp-sft-cpu": "RLP, SFT",
    "rlp-rlvr-cpu": "RLP, SFT, RLVR", "cpt-sft-cpu": "more CPT, SFT",
    "cpt-rlvr-cpu": "more CPT, SFT, RLVR",
    "rlp-longer-cpu": "RLP, problems a step longer too",
    "match-longer-cpu": "the reward of RPT, problems a step longer too",
    "cpt-worked-longer-cpu": "CPT of worked problems as long as ever, for longer",
    "cpt-longer-cpu": "CPT without worked ones, problems a step longer too",
    "rlp-distractors-cpu": "RLP, lines that lead nowhere too",
    "match-distractors-cpu": "the reward of RPT, lines that lead nowhere too",
    "cpt-distractors-cpu": "CPT without worked ones, lines that lead nowhere too"}
BEGINS = {  # arms that begin with what another became, and that
    "rlvr-cpu": "sft-cpu", "rlp-sft-cpu": "rlp-cpu", "rlp-rlvr-cpu": "rlp-sft-cpu",
    "cpt-sft-cpu": "cpt-more-cpu", "cpt-rlvr-cpu": "cpt-sft-cpu"}
ABLATIONS = {f"rlp-{name}-cpu": told for name, told in {
    "g2": "2 thoughts a context", "g4": "4 thoughts a context", "g16": "16 thoughts a context",
    "len20": "thoughts of 20 tokens, figures too",
    "len80": "thoughts of 80 tokens, figures too", "kl3": "KL 0.001", "kl2": "KL 0.01",
    "tau99": "tau 0.99", "tau1": "tau 1, the teacher stands still",
    "hot": "temperature 1, figures too", "random": "random positions of problems",
    "back0": "back 0", "answers": "no text", "predictor": "predictor's term 0.1",
    "predictor1": "predictor's term 1", "nofloor": "no floor under rewards"}.items()}
SAMPLED, GREEDY = "accuracy/sampled/all/WHO", "accuracy/greedy/all/WHO"
GAIN, TEXT_LOSS = "positions/text/WHO/gain_nats/frozen_base", "loss_nats/no_think_text/WHO"

Found = dict[str, list[dict]]  # what results/ holds: by kind, a summary a seed


def half_width(values: list[float]) -> float | None:
    """Half of the interval of a mean over seeds; None from one seed."""
    if len(values) < 2:
        return None
    return T95[min(len(values), 5)] * statistics.stdev(values) / len(values) ** 0.5


def spread(values: list[float] | dict[int, float], form: str = ".2f") -> str:
    """`0.92 ±0.03`: the mean over seeds; of one seed its value; "" for none. values: by seed, or
    as they come."""
    values = [*values.values()] if isinstance(values, dict) else values
    if not values:
        return ""
    half = half_width(values)
    return f"{statistics.mean(values):{form}}" + (
        "" if half is None else f" ±{half:{form.lstrip('+')}}")


def means(runs: list[dict], path: str, who: str = "") -> dict[int, float]:
    """By seed the mean at a path of a summary; of its own mode if it is not said whose."""
    leaves = {run["seed"]: figure(run, path, who or run["mode"]) for run in runs}
    return {seed: leaf["mean"] for seed, leaf in leaves.items() if leaf}


def difference(first: dict[int, float], second: dict[int, float]) -> list[float]:
    """first - second, of the seeds that both have."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def now_or_before(of: Callable[[str], list]) -> tuple[list, str]:
    """What a function finds of runs named with "" or "before-"; and "", or " (before)" where fewer
    than three, and fewer than of those, are from after the default changed."""
    sides = [(of(then), told) for then, told in (("", ""), ("before-", " (before)"))]
    return max(sides, key=lambda side: min(3, len(side[0])))


def pair(found: Found, ours: str, theirs: str) -> tuple[list[dict], list[dict], str]:
    """The runs of two arms on the seeds that both have, in one order, and of when
    (`now_or_before`)."""
    shared, told = now_or_before(lambda then: [
        (a, b) for a in found[then + ours] for b in found[then + theirs] if a["seed"] == b["seed"]])
    return [a for a, _ in shared], [b for _, b in shared], told


def arm_rows(found: Found) -> list[list[str]]:
    """What every arm reached, beside the base that the first of its chain began with, and what its
    chain took. The gain over that base is measured where the chain is one run."""
    rows = [["", "seeds", "sampled", "greedy", "gain at text, nats", "loss on text", "TFLOP", "s"]]
    runs = found["rlp-cpu"]
    if runs:
        base = [spread(means(runs, path, "base")) for path in (SAMPLED, GREEDY)]
        rows.append(["base", str(len(runs)), *base, "", "", "", ""])
    for kind, name in ARMS.items():
        if not (runs := found[kind]):
            continue
        chain, seeds = [runs], {run["seed"] for run in runs}
        while kind := BEGINS.get(kind, ""):
            chain.append([run for run in found[kind] if run["seed"] in seeds])
        gain, change = means(runs, GAIN), means(runs, "loss_nats/no_think_text_change")
        if chain[1:]:
            begun, gain = means(chain[-1], TEXT_LOSS, "base"), {}
            change = {seed: loss / begun[seed] - 1
                      for seed, loss in means(runs, TEXT_LOSS).items() if seed in begun}
        figures = ((means(runs, SAMPLED), ".2f"), (means(runs, GREEDY), ".2f"), (gain, "+.2f"),
                   (change, "+.1%"))
        rows.append([name, str(len(runs)), *(spread(of_seed, form) for of_seed, form in figures),
                     *cost(*chain)])
    return rows


def cost(*chain: list[dict]) -> list[str]:
    """Mean TFLOP and seconds of the steps of runs, and of those that they began with."""
    cells = []
    for name, unit, form in (("steps_flops", 1e12, ".1f"), ("steps_s", 1, ".0f")):
        known = [[run[name] / unit for run in runs if name in run] for runs in chain]
        cells.append(f"{sum(map(statistics.mean, known)):{form}}" if all(known) else "")
    return cells


def ablation_rows(found: Found) -> list[list[str]]:
    """RLP with one setting changed, and how far from the default it ends, paired by seed."""
    rows = [["", "seeds", "sampled", "greedy", "gain at text, nats", "sampled, minus RLP",
             "greedy, minus RLP"]]
    for kind, name in ABLATIONS.items():
        if runs := found[kind]:
            columns = [(SAMPLED, ".2f"), (GREEDY, ".2f"), (GAIN, "+.2f")]
            gaps = (difference(means(runs, path), means(found["rlp-cpu"], path))
                    for path in (SAMPLED, GREEDY))
            rows.append([name, str(len(runs)),
                         *(spread(means(runs, path), form) for path, form in columns),
                         *(spread(gap, "+.3f") for gap in gaps)])
    return rows


def lead_rows(found: Found) -> list[list[str]]:
    """RLP minus each arm, in accuracy, and what began with RLP minus what began with another. Said
    where that is of runs before the default changed."""
    rows = [["accuracy", "seeds", "sampled", "greedy"]]
    pairs = [("rlp-cpu", f"{name}-cpu")
             for name in ("match", "cpt", "cpt-more", "cpt-plain", "cpt-tokens", "sft", "rlvr")]
    pairs += [("rlp-sft-cpu", "sft-cpu"), ("rlp-rlvr-cpu", "rlvr-cpu"),
              ("rlp-sft-cpu", "cpt-sft-cpu"), ("rlp-rlvr-cpu", "cpt-rlvr-cpu")]
    for ours, theirs in pairs:
        mine, others, told = pair(found, ours, theirs)
        gaps = [difference(means(mine, path), means(others, path)) for path in (SAMPLED, GREEDY)]
        if gaps[0]:
            rows.append([f"({ARMS[ours]}) minus ({ARMS[theirs]}){told}", str(len(gaps[0])),
                         *(spread(g, "+.3f") for g in gaps)])
    return rows


def position_rows(found: Found) -> list[list[str]]:
    """Preset `computed`: thoughts at random positions, where no one says which tokens need them;
    and after CPT of the same base, where that was run."""
    runs, cpt = found["rlp-computed"], found["cpt-computed"]
    rows = [["random positions, preset computed", "base", "RLP", "RLP - base"]]
    if cpt:
        rows[0] += [f"CPT, {len(cpt)} of the {len(runs)} seeds", "RLP - CPT, of the same"]
    there, text = "positions/computed/WHO", "positions/text/WHO"
    kinds = list(runs[0]["positions"]["computed"]["base"]["gain_nats_by_kind"]) if runs else []
    paths = {"gain over the frozen base, nats": f"{there}/gain_nats/frozen_base",
             **{f"  {kind}": f"{there}/gain_nats_by_kind/{kind}" for kind in kinds[1:]},
             "gain over an empty thought, nats": f"{there}/gain_nats/empty_thought",
             "gain over another's thought, nats": f"{there}/gain_nats/swapped_thought",
             "thoughts not empty": f"{there}/share_not_empty/all",
             "gain at ordinary text, nats": f"{text}/gain_nats/frozen_base",
             "loss on text, no thought, nats": "loss_nats/no_think_text/WHO",
             "problems right, sampled": SAMPLED, "problems right, greedy": GREEDY}
    for name, path in paths.items() if runs else ():
        base, ours = means(runs, path, "base"), means(runs, path)
        rows.append([name, spread(base), spread(ours), spread(difference(ours, base), "+.3f")])
        if cpt:
            theirs = means(cpt, path)
            rows[-1] += [spread(theirs), spread(difference(ours, theirs), "+.3f")]
    if tflop := cost(runs)[0]:
        rows.append(["TFLOP", "", tflop, "", *([cost(cpt)[0], ""] if cpt else [])])
    return rows


def gate_rows(found: Found) -> list[list[str]]:
    """Preset `computed`: a learned gate between the prediction without a thought and after it, of
    RLP and of CPT of equal FLOPs."""
    columns = {"thought": "after a thought", "no thought": "without one",
               "gated": "through the gate", "weight": "weight of the thought"}
    rows = [["gain over the frozen base, nats", "seeds", *columns.values()]]
    for arm in ("rlp", "cpt"):
        runs = [run for run in found[f"controls-{arm}-computed"] if "gate" in run]
        for kind, name in POSITIONS.items() if runs else ():
            rows.append([f"{arm.upper()}, {name}", str(len(runs)), *(
                spread(means(runs, f"gate/{kind}/{key}")) for key in columns)])
    return rows


def _controls(found: Found) -> Callable[[str, str, str], dict[int, float]]:
    return lambda kind, path, who="": means(found[f"controls-{kind}"], path, who)


COMPARED = {"rlp-cpu": "RLP", "match-cpu": "RPT's reward", "cpt-cpu": "CPT"}
# Problems that nobody worked, by the last part of the names of arms that read them: in a word, what
# they are, and their level.
UNWORKED = {"longer": ("longer ones", "of a step more", "1 more"),
            "distractors": ("distractors", "with lines that lead nowhere", "distractors")}


def _level(found: Found, kinds: list[str], path: str, others: tuple[str, ...] = ()
           ) -> tuple[dict[int, float], list[str]]:
    """Accuracy at a level: the base's by seed; and as cells the base's, that of each kind, and the
    first kind's lead over the base and over others of them."""
    at = _controls(found)
    base, sides = at(kinds[0], path, "base"), {kind: at(kind, path) for kind in kinds}
    behind = base, *(sides[kind] for kind in others)
    return base, [*map(spread, (base, *sides.values())),
                  *(spread(difference(sides[kinds[0]], side), "+.3f") for side in behind)]


def unworked_rows(found: Found, what: str) -> list[list[str]]:
    """By level and family, of arms that read problems of a kind that the base was never taught to
    work, with the number of seeds; and how far RLP is ahead of the base, of CPT of worked ones as
    ever, and of CPT of what RLP reads."""
    ours = f"rlp-{what}-cpu"
    kinds = {ours: "RLP", f"match-{what}-cpu": "RPT's reward",
             "cpt-worked-longer-cpu": "CPT of worked ones", f"cpt-{what}-cpu": "CPT of these"}
    kinds = {kind: told for kind, told in kinds.items() if found[f"controls-{kind}"]}
    cpt = tuple(kind for kind in kinds if kind.startswith("cpt"))
    rows = [[f"greedy; problems {UNWORKED[what][1]} read too", "base",
             *(f"{told} ({len(found[f'controls-{kind}'])})" for kind, told in kinds.items()),
             "RLP - base", *(f"RLP - {kinds[kind]}" for kind in cpt)]]
    levels = next((run["levels"] for run in found[f"controls-{ours}"]), {})
    for level, family in [(n, f) for n in levels for f in levels[n]]:
        _, cells = _level(found, list(kinds), f"levels/{level}/{family}/WHO", cpt)
        rows.append([level if family == "all" else f"  {family}", *cells])
    return rows


def level_rows(found: Found) -> list[list[str]]:
    """Accuracy of the likeliest thought by level, and how far RLP is ahead."""
    rows = [["greedy, all families", "base", *COMPARED.values(), "RLP - base", "RLP - CPT"]]
    for level in next((run["levels"] for run in found["controls-rlp-cpu"]), {}):
        path = f"levels/{level}/all/WHO"
        rows.append([level, *_level(found, list(COMPARED), path, ("cpt-cpu",))[1]])
    return rows


def hard_rows(found: Found, low: float = 0.3, high: float = 0.8) -> list[list[str]]:
    """Levels, and single families of them, at which the base's mean is neither near 0 nor near 1:
    of the default, of arms that read problems that nobody worked too, and of `computed`, which
    trains twice as long."""
    rows = [[f"greedy, base between {low} and {high}", "base", *COMPARED.values(), "RLP - base",
             "RLP - CPT"]]
    read_too = ((f"{told} read too: ", f"-{what}-cpu") for what, (told, *_) in UNWORKED.items())
    for told, suffix in (("", "-cpu"), *read_too, ("preset computed: ", "-computed")):
        kinds = [kind.removesuffix("-cpu") + suffix for kind in COMPARED]
        levels = next((run["levels"] for run in found[f"controls-{kinds[0]}"]), {})
        for level, family in [(n, f) for n in levels for f in levels[n]]:
            path = f"levels/{level}/{family}/WHO"
            base, cells = _level(found, kinds, path, (f"cpt{suffix}",))
            if low <= statistics.mean(base.values()) <= high:
                rows.append([f"{told}{level}, {family}", *cells])
    return rows


def pass_rows(found: Found) -> list[list[str]]:
    """pass@k before and after."""
    at, runs = _controls(found), found["controls-rlp-cpu"]
    rows = [["pass@k", "base", *COMPARED.values(), "RLP - base"]]
    for k in runs[0]["pass"] if runs else ():
        path = f"pass/{k}/WHO"
        base, ours = at("rlp-cpu", path, "base"), at("rlp-cpu", path)
        rows.append([k, spread(base, ".3f"), *(spread(at(kind, path), ".3f") for kind in COMPARED),
                     spread(difference(ours, base), "+.3f")])
    return rows


def remains_rows(found: Found) -> list[list[str]]:
    """Gain over the frozen base at answers, of thoughts and of what is left of them."""
    at, runs = _controls(found), found["controls-rlp-cpu"]
    rows = [["gain at answers, nats", *COMPARED.values()]]
    for name in runs[0]["thoughts"] if runs else ():
        rows.append([f"{name} thought",
                     *(spread(at(kind, f"thoughts/{name}")) for kind in COMPARED)])
    return rows


def changed_rows(found: Found) -> list[list[str]]:
    """How often a thought changes the likeliest token, to which rank of the base, and who is right;
    and the loss on text with thoughts and without."""
    at, runs = _controls(found), found["controls-rlp-cpu"]

    def of(kind: str, where: str, key: str) -> dict[int, float]:
        by_seed = at(kind, f"changed/{where}/{key}")
        if key != "rank":
            return by_seed
        share = at(kind, f"changed/{where}/changed")  # the others' rank is 1
        return {seed: 1 + (by_seed[seed] - 1) / share[seed] for seed in by_seed if share[seed]}

    names = {"changed": "likeliest token changed", "rank": "its rank in the base, where changed",
             "right": "right", "base_right": "the base's without a thought right"}
    rows = [["", *COMPARED.values()]]
    for where in runs[0]["changed"] if runs else ():
        rows += [[f"{name}, {where}", *(spread(of(kind, where, key)) for kind in COMPARED)]
                 for key, name in names.items()]
    for name in runs[0]["text"] if runs else ():
        rows.append([f"loss at random text positions, {name}, nats",
                     *(spread(at(kind, f"text/{name}"), ".3f") for kind in COMPARED)])
    return rows


def rate_rows(tries: list[dict]) -> list[list[str]]:
    """Every rate that was tried, on validation problems; of arms that read unworked ones, greedy
    on those too."""
    heads = {level: head for _, head, level in UNWORKED.values() if any(level in t for t in tries)}
    rows = [["arm", "rate", "seeds", "sampled", "greedy", *heads.values()]]
    order = [*ARMS].index
    for arm, rate in sorted({(t["arm"], t["rate"]) for t in tries},
                            key=lambda tried: (order(f"{tried[0]}-cpu"), tried[1])):
        own = [t for t in tries if (t["arm"], t["rate"]) == (arm, rate)]
        rows.append([ARMS[f"{arm}-cpu"], f"{rate:g}", str(len(own)),
                     *(spread([t[how] for t in own if how in t])
                       for how in ("sampled", "greedy", *heads))])
    return rows
