"""Tables of runs and benchmarks: rows of text, shown in a terminal of 80 columns or as Markdown.

A figure is a dict of mean, low, high and n; low and high bound its 95 % interval. Read `cell` and
`over_seeds`, the rows that are made of them, then what is printed.
"""

import math
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

RIVALS = {  # what tables and plots call an elastic family and each `elastic.baseline`
    "elastic": "elastic, one run", "separate": "alone, equal FLOPs in all",
    "minitron": "alone, all tokens each", "scratch": "from scratch, as the parent"}
# What tables call the sets of positions of a summary.
POSITIONS = {"text": "ordinary text", "computed": "computed documents"}
AT_POSITIONS = (("gain at", ", nats", "gain_nats/frozen_base"),  # around such a name; path
                ("  over another's thought at", ", nats", "gain_nats/swapped_thought"),
                ("  thoughts not empty at", "", "share_not_empty/all"))


def cell(leaf: dict[str, Any] | None, form: str = ".2f") -> str:
    """`0.93 (0.91 to 0.95)`: a mean and its interval, which one observation does not have; "" for a
    figure that a run lacks."""
    if leaf is None:
        return ""
    if math.isnan(leaf["low"]):
        return f"{leaf['mean']:{form}}"
    return f"{leaf['mean']:{form}} ({leaf['low']:{form}} to {leaf['high']:{form}})"


def short(leaf: dict[str, Any] | None, form: str = ".2f") -> str:
    """`0.93 ±0.02`: a mean and the longer side of its interval."""
    if leaf is None:
        return ""
    if math.isnan(leaf["low"]):
        return f"{leaf['mean']:{form}}"
    side = max(leaf["high"] - leaf["mean"], leaf["mean"] - leaf["low"])
    return f"{leaf['mean']:{form}} ±{side:{form.lstrip('+')}}"


def over_seeds(leaves: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Of several seeds the mean, with the smallest and the largest as bounds; of one its figure;
    None where a seed has none."""
    if len(leaves) < 2 or None in leaves:
        return leaves[0] if len(leaves) == 1 else None
    means = [leaf["mean"] for leaf in leaves]
    return {"mean": sum(means) / len(means), "low": min(means), "high": max(means)}


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def figures(families: list[str]) -> dict[str, tuple[str, str]]:
    """Where a summary of a mode with thoughts has each figure: of its model, and of the base that
    it began with. WHO stands for `base` or the mode."""
    gains = {"frozen_base": "the frozen base", "ema": "the EMA teacher",
             "own_no_think": "no thought", "empty_thought": "an empty thought",
             "swapped_thought": "another's thought"}
    alike = {"accuracy, sampled thoughts": "accuracy/sampled/all/WHO",
             "accuracy, greedy thought": "accuracy/greedy/all/WHO",
             "accuracy, no thought": "accuracy/no_think/all/WHO",
             **{f"  {name}, sampled thoughts": f"accuracy/sampled/{name}/WHO" for name in families},
             "loss on text, no thought, nats": "loss_nats/no_think_text/WHO",
             **{f"{label} {name}{unit}": f"positions/{key}/WHO/{path}"
                for key, name in POSITIONS.items() for label, unit, path in AT_POSITIONS},
             "gain where text repeats, nats": "positions/text/WHO/gain_nats_by_kind/repeats",
             "thought, tokens": "thought_tokens/all/WHO", "thoughts that close": "closed/all/WHO"}
    forced = "forced_style_base/temperature_{}/all"
    return {**{f"gain over {name}, nats": (f"gain_nats/{key}", f"gain_nats_before/{key}")
               for key, name in gains.items()},
            **{label: (path, path) for label, path in alike.items()},
            "change of the loss on text": ("loss_nats/no_think_text_change", ""),
            **{f"accuracy, style forced, T = {t}": ("", forced.format(t)) for t in (0, 0.7, 1)}}


def figure(summary: dict, path: str, who: str) -> dict[str, Any] | None:
    """The leaf of a summary at a path of `figures`, None if it has none."""
    found: Any = summary
    for key in path.replace("WHO", who).split("/"):
        found = found.get(key) if found else None
    return found


def thought_rows(columns: dict[str, tuple[list[dict], str]], labels: list[str] | None = None,
                 show: Callable[..., str] = cell) -> list[list[str]]:
    """Figures, those named or all that are there, by columns: runs of several seeds, and whose."""
    accuracy = next(iter(columns.values()))[0][0]["accuracy"]
    paths = figures([name for name in accuracy["sampled"] if name != "all"])
    rows = [[f"{accuracy['greedy']['all']['base']['n']} problems", *columns]]
    for label in labels or paths:
        leaves = []
        for runs, who in columns.values():
            path = paths[label][who == "base" and "gain_nats_before" in runs[0]]
            leaves.append(over_seeds([figure(run, path, who) for run in runs]))
        if any(leaves):
            form = "+.1%" if label.startswith("change") else ".2f"
            rows.append([label, *(show(leaf, form) for leaf in leaves)])
    return rows


def pass_rows(columns: dict[str, tuple[list[dict], str]]) -> list[list[str]]:
    """pass@k by columns: controls of runs of several seeds, and whose."""
    rows = [["pass@k", *columns]]
    measured = (run["pass"] for runs, _ in columns.values() for run in runs if "pass" in run)
    for k in next(measured, ()):
        leaves = [over_seeds([figure(run, f"pass/{k}/WHO", who) for run in runs])
                  for runs, who in columns.values()]
        rows.append([k, *map(cell, leaves)])
    return rows


def budget_heads(summary: dict) -> list[str]:
    """`75 %` for each budget of an elastic run."""
    return [f"{100 * e['fraction']:.0f} %" for e in summary["budgets"]]


def accuracies(summary: dict, show: Callable[..., str]) -> dict[str, Callable[[dict], str]]:
    """Rows of right answers; none for a result that is older than they are."""
    if "accuracy" not in summary["teacher"]:
        return {}
    families = [name for name in summary["teacher"]["accuracy"]["greedy"] if name != "all"]
    return {
        "right, sampled": lambda e: show(e["accuracy"]["sampled"]["all"]),
        "right, greedy": lambda e: show(e["accuracy"]["greedy"]["all"]),
        **{f"  {name}": lambda e, name=name: show(e["accuracy"]["greedy"][name])
           for name in families},
        "  won, lost (p)": lambda e: "{won}, {lost} ({p:.1g})".format(**e["mcnemar"])}


def budget_rows(summary: dict, show: Callable[..., str] = cell) -> list[list[str]]:
    """What each budget of an elastic run reaches."""
    facts: dict[str, Callable[[dict], str]] = {
        "loss, nats a token": lambda e: show(e["loss_nats"], ".3f"),
        "against the parent": lambda e: show(e["loss_change"], "+.1%"),
        **{f"loss on {told}": lambda e, kind=kind: show(e[f"{kind}_loss_nats"], ".3f")
           for kind, told in (("text", "text"), ("problem", "problems"))
           if f"{kind}_loss_nats" in summary["teacher"]},
        **accuracies(summary, show),
        "KL from the parent": lambda e: show(e["kl_nats"], ".3f"),
        "same likeliest token": lambda e: show(e["top1"]),
        "parameters": lambda e: f"{e['parameters']:,}",
        "cost, of its target": lambda e: f"{e['cost'] / e['target']:.1%}" if "cost" in e else "",
        "MFLOPs a token": lambda e: f"{e['flops_per_token'] / 1e6:.2f}",
        "MB of weights": lambda e: f"{e['bytes'] / 1e6:.2f}",
        "tokens a second": lambda e: f"{e['tokens_per_second']:,.0f}"}
    parent, entries = summary["teacher"], summary["budgets"]
    rows = [[f"{parent['loss_nats']['n']} sequences", "parent", *budget_heads(summary)],
            *([name, *map(f, [parent, *entries])] for name, f in facts.items())]
    stages = {1: summary["stage1"], 2: entries}
    for stage, sizes in stages.items() if stages[1] and "long_loss_nats" in parent else ():
        losses = [f"{e['long_loss_nats']['mean']:.3f}" for e in [parent, *sizes]]
        rows.append([f"long text, stage {stage}", *losses])
    return rows


def between_rows(summary: dict, show: Callable[..., str] = cell) -> list[list[str]]:
    """What budgets reach that lie half-way between trained ones."""
    entries = summary.get("between", [])
    rows = [["never trained", *(f"{100 * e['fraction']:.3g} %" for e in entries)],
            ["loss, nats a token", *(show(e["loss_nats"], ".3f") for e in entries)],
            ["right, greedy", *(show(e["accuracy"]["greedy"]["all"]) for e in entries)],
            ["cost, of its target", *(f"{e['cost'] / e['target']:.1%}" for e in entries)]]
    return rows if entries else []


def rival_rows(summary: dict, show: Callable[..., str] = cell) -> list[list[str]]:
    """How far each rival's loss is from the family's, paired by sequence; and its right answers."""
    rows = [["nats minus elastic", *budget_heads(summary)]]
    for name, family in summary["baselines"].items():
        rows.append([RIVALS.get(name, name), *(show(e["difference_nats"], "+.3f") for e in family)])
        if "accuracy" in family[0]:
            rows.append(["  right, greedy",
                         *(show(e["accuracy"]["greedy"]["all"]) for e in family)])
    return rows


def bench_table(found: dict) -> str:
    """One benchmark of bench.py in Markdown: a row a contestant, and what it was measured on."""
    rows = [[found["title"], "ms", "times ours", "thousand tokens/s", "peak MiB"]]
    for row in found["rows"]:
        rows.append([row["name"], row["note"], "", "", ""] if "ms" not in row else [
            row["name"], f"{row['ms']:.4g}", f"{row['times_ours']:.2f}",
            f"{row['tokens_per_s'] / 1e3:.3g}", f"{row['peak_bytes'] / 2**20:.3g}"])
    shown = ("torch", "transformers", "trl")
    versions = [f"{k} {v}" for k, v in found["versions"].items() if k in shown]
    on_cpu = [found.get("instructions", ""), f"threads: {found['threads']}"]
    words = [found["machine"], *on_cpu * (found["device"] == "cpu"),
             f"fp32 ({found['precision']})", *versions, f"commit {commit(found)}"]
    parts = [markdown(rows), ", ".join(filter(None, words)) + "; medians."]
    if found.get("is_apart"):
        parts.append("Each in a process of its own; memory is its peak, weights and libraries "
                     "included. Results are compared with a small model.")
    if g := found.get("growth"):
        rows = [["tokens", *map(str, g["tokens"])], ["ms", *(f"{ms:.4g}" for ms in g["ms"])],
                ["peak MiB", *(f"{n / 2**20:.3g}" for n in g["peak_bytes"])]]
        parts += [markdown(rows), f"Time grows with the power {g['exponent']:.2f} of the length."]
    return "\n\n".join(parts)


def commit(found: dict) -> str:
    """The commit that a result is from; older results do not name it."""
    return found["versions"].get("commit") or "before 2026-11-26"


def print_rows(rows: list[list[str]], console: Console) -> None:
    """Rows as a table in the terminal's own colours; words that do not fit go on below."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    console.print()


def print_summary(summary: dict, console: Console) -> None:
    """The closing tables of a run; summary.json has the rest."""
    console.print(f"\nheld-out figures, seed {summary['seed']}: mean ± the longer side of its 95 % "
                  "interval\n")
    if summary["mode"] == "elastic":
        print_rows(budget_rows(summary, short), console)
        if between := between_rows(summary, short):
            print_rows(between, console)
        if summary["baselines"]:
            print_rows(rival_rows(summary, short), console)
    else:
        who = dict.fromkeys(["base", summary["mode"]][: 1 + ("gain_nats_before" in summary)])
        print_rows(thought_rows({w: ([summary], w) for w in who}, show=short), console)
    console.print(f"{summary['wall_s']:.0f} s, {summary['peak_memory_gib']:.2f} GiB at the peak; "
                  "all figures are in summary.json")


def print_estimate(facts: dict, console: Console) -> None:
    """What a run would take (see estimate.py), as tables for the terminal."""
    thoughts = f", {facts['thoughts']:,} thoughts" if "thoughts" in facts else ""
    console.print(f"\n{facts['parameters']:,} parameters, {facts['total_tokens']:,} tokens"
                  f"{thoughts}\n{facts['total_flops']:.3g} FLOPs: {facts['h100_hours']:,.3g} H100 "
                  "hours at 40 % of its peak\n")
    rows = [["phase", "steps", "tokens/step", "FLOPs/step", "of which"]]
    for p in facts["phases"]:
        step = sum(p["flops"].values())
        shares = ", ".join(f"{name} {100 * v / step:.0f} %" for name, v in p["flops"].items())
        rows.append([p["name"], f"{p['steps']:,}", f"{p['tokens']:,}", f"{step:.3g}", shares])
    print_rows(rows, console)
    n, kept = facts["n_gpus"], facts["memory"]
    rows = [[f"GB on each of {n} GPU{'s' * (n > 1)}", *(f"activations: {name}" for name in kept)]]
    for part in kept["all kept"]:
        if any(memory[part] for memory in kept.values()):
            rows.append([part, *(f"{memory[part] / 1e9:,.3g}" for memory in kept.values())])
    print_rows(rows, console)
    console.print(f"held-out figures at the end: {facts['figures'] / 1e9:,.3g} GB of weights on "
                  "the first GPU")
    if "family" in facts:
        model, router, apart = (facts["family"][k] / 1e9 for k in ("model", "router", "separate"))
        console.print(f"all sizes, bf16: {model + router:,.3g} GB in one checkpoint, {apart:,.3g} "
                      f"GB in one for each\nthe router is {100 * router / model:.2g} % of it")
