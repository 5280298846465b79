"""Tables of runs, for the terminal and for Markdown."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

# ------------------------------------------------------------------------------------------- tables


def cell(leaf: dict[str, Any]) -> str:
    """`0.93 (0.91 to 0.95)`: a mean with its 95 % interval."""
    return f"{leaf['mean']:.2f} ({leaf['low']:.2f} to {leaf['high']:.2f})"


def percent(leaf: dict[str, Any]) -> str:
    """`+1.2 % (+0.9 to +1.5)`: a relative change with its 95 % interval."""
    return f"{100 * leaf['mean']:+.1f} % ({100 * leaf['low']:+.1f} to {100 * leaf['high']:+.1f})"


def print_summary(summary: dict, console: Console) -> None:
    """The closing tables of a run."""
    if summary["mode"] == "elastic":
        for rows in (budget_rows(summary), rival_rows(summary)):
            table = Table(
                *rows[0], title=f"held-out figures, mean (95 % interval), seed {summary['seed']}")
            for row in rows[1:]:
                table.add_row(*row)
            console.print(table)
        console.print(
            f"{summary['wall_s']:.0f} s, {summary['peak_memory_gib']:.2f} GiB at the peak")
        return
    table = Table(title=f"held-out figures, mean (95 % interval), seed {summary['seed']}")
    who = [w for w in ("base", "rlp", "cpt") if w in summary["accuracy"]["sampled"]["all"]]
    for column in ("", *who):
        table.add_column(column)
    for kind, label in (("no_think", "without a thought"), ("sampled", "sampled thoughts"),
                        ("greedy", "greedy thought")):
        for family, leaves in summary["accuracy"][kind].items():
            name = f"accuracy, {label}" if family == "all" else f"  {family}"
            table.add_row(name, *(cell(leaves[w]) for w in who))
    table.add_row("loss on text, no thought (nats a token)",
                  *(cell(summary["loss_nats"]["no_think_text"][w]) for w in who))
    for key, label in (("thought_tokens", "thought length (tokens)"),
                       ("closed", "thoughts that close")):
        if key in summary:
            table.add_row(label, *(cell(summary[key]["all"][w]) for w in who))
    for reference, leaf in summary["gain_nats"].items():
        table.add_row(f"gain against {reference} (nats)", *([""] * (len(who) - 1)), cell(leaf))
    console.print(table)
    console.print(f"{summary['wall_s']:.0f} s, {summary['peak_memory_gib']:.2f} GiB at the peak")


def print_estimate(facts: dict, console: Console) -> None:
    """What a run would take (see estimate.py), as tables for the terminal."""
    console.print(f"{facts['parameters']:,} parameters; {facts['total_tokens']:,} tokens"
                  + (f"; {facts['thoughts']:,} thoughts" if "thoughts" in facts else ""))
    table = Table("step of", "steps", "tokens a step", "FLOPs a step", "of which")
    for p in facts["phases"]:
        step, n = sum(p["flops"].values()), p["steps"]
        shares = ", ".join(f"{name} {100 * v / step:.0f} %" for name, v in p["flops"].items())
        table.add_row(p["name"], f"{n:,}", f"{p['tokens']:,}", f"{step:.3g}", shares)
    console.print(table)
    console.print(
        f"{facts['total_flops']:.3g} FLOPs in all: {facts['h100_hours']:,.3g} H100 hours at 40 % of its peak"
    )
    n, kept = facts["n_gpus"], facts["memory"]
    table = Table(
        f"GB on each of {n} GPU{'s' * (n > 1)}", *(f"activations: {name}" for name in kept))
    for part in kept["all kept"]:
        if any(memory[part] for memory in kept.values()):
            table.add_row(part, *(f"{memory[part] / 1e9:,.3g}" for memory in kept.values()))
    console.print(table)
    if "family" in facts:
        model, router, separate = (
            facts["family"][name] / 1e9 for name in ("model", "router", "separate"))
        console.print(
            f"all sizes in bf16: {model + router:,.3g} GB as one checkpoint ({100 * router / model:.2g} % is the "
            f"router), {separate:,.3g} GB as one for each"
        )


def fine(leaf: dict[str, Any]) -> str:
    """`1.551 (1.540 to 1.562)`."""
    return f"{leaf['mean']:.3f} ({leaf['low']:.3f} to {leaf['high']:.3f})"


def signed(leaf: dict[str, Any]) -> str:
    """`+0.021 (+0.015 to +0.027)`."""
    return f"{leaf['mean']:+.3f} ({leaf['low']:+.3f} to {leaf['high']:+.3f})"


def budget_rows(summary: dict) -> list[list[str]]:
    """What each budget of an elastic run reaches; the first row is the head."""
    entries = summary["budgets"]
    rows = [
        [f"n = {entries[0]['loss_nats']['n']}", "parent",
         *(f"{100 * e['fraction']:.0f} %" for e in entries)]
    ]

    def add(name: str, f: Callable[[dict], str], of_parent: bool = True) -> None:
        rows.append([name, f(summary["teacher"]) if of_parent else "", *map(f, entries)])

    add("parameters", lambda e: f"{e['parameters']:,}")
    add("cost, of its target", lambda e: f"{100 * cost_share(e):.1f} %", False)
    add("MFLOPs a token", lambda e: f"{e['flops_per_token'] / 1e6:.2f}")
    add("MB of weights", lambda e: f"{e['bytes'] / 1e6:.2f}")
    add("tokens a second, forward", lambda e: f"{e['tokens_per_second']:,.0f}")
    add("loss, nats a token", lambda e: fine(e["loss_nats"]))
    add("of text alone", lambda e: fine(e["text_loss_nats"]))
    add("of problems alone", lambda e: fine(e["problem_loss_nats"]))
    add("against the parent", lambda e: percent(e["loss_change"]), False)
    add("KL from the parent, nats", lambda e: fine(e["kl_nats"]), False)
    add("same likeliest token as the parent", lambda e: cell(e["top1"]), False)
    if summary["stage1"]:
        long = [s["long_loss_nats"]["mean"] for s in summary["stage1"]]
        rows.append(
            ["loss on long text, after stage 1",
             f"{summary['teacher']['long_loss_nats']['mean']:.3f} (parent)",
             *(f"{x:.3f}" for x in long)]
        )
        rows.append(
            ["loss on long text, after stage 2", "",
             *(f"{e['long_loss_nats']['mean']:.3f}" for e in entries)]
        )
    return rows


def cost_share(entry: dict) -> float:
    """Cost over target, for a budget in parameters."""
    return entry["cost"] / entry["target"]


def rival_rows(summary: dict) -> list[list[str]]:
    """Loss of the elastic family and its rivals, and how far each is from the family, paired; the
    first row is the head."""
    entries = summary["budgets"]
    heads = [f"{100 * e['fraction']:.0f} %" for e in entries]
    rows = [
        [f"loss, nats a token, n = {entries[0]['loss_nats']['n']}",
         *(h for head in heads for h in (head, "minus elastic"))]
    ]
    for name, family in {"elastic": entries, **summary["baselines"]}.items():
        cells = [(fine(e["loss_nats"]), "" if name == "elastic" else signed(e["difference_nats"]))
                 for e in family]
        rows.append([RIVALS.get(name, name), *(text for pair in cells for text in pair)])
    return rows


SHORT = {
    "separate": "alone, 1/n of the tokens",
    "minitron": "alone, n times the cost",
    "scratch": "from scratch, n times the cost",
    "fixed": "widths by hand",
    "random-order": "random order",
    "uniform": "uniform in stage 2",
}


RIVALS = {
    "elastic": "**elastic**, one run",
    "separate": "each size distilled alone, 1/n of the tokens",
    "minitron": "each size distilled alone, all the tokens (n times the cost)",
    "scratch": "each size from scratch, all the tokens (n times the cost)",
    "random-order": "elastic, units in random order",
    "fixed": "elastic, widths by hand",
    "uniform": "elastic, uniform sampling in stage 2",
}


def total_minutes(summary: dict) -> float:
    """Minutes of the whole job: of the run, and of the base's training where the run found it in
    the cache."""
    return (summary["wall_s"] + summary["base_train_s"] * summary["base_was_cached"]) / 60
