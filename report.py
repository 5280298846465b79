"""What a person sees: plots and tables, made from results and never by hand.

    python report.py                          rewrite the tables and figures of README.md from results/
    python report.py runs/rlp-cpu-seed0       take a run into results/ first

`plot_run` and `print_summary` serve train.py at the end of each run. A table in README.md stands between the lines
`<!-- table NAME -->` and `<!-- end -->`; a test compares what stands there with what this file would write.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

BENCHES = ("ssd", "mixer", "decode", "logp", "rlp-step", "elastic-step")  # of bench.py
BLUE, ORANGE, GREY = "#2f6db3", "#e07b39", "#9a9a9a"


# ----------------------------------------------------------------------------------------------------------- plots


def plot_run(run_dir: Path) -> None:
    """gain.png, accuracy.png and thoughts.png for an RLP run; loss.png for the others, elastic: widths.png, sizes.png."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run_dir / "summary.json").read_text())
    if summary["mode"] == "elastic":
        plot_widths(summary, run_dir / "widths.png")
        plot_sizes(summary, run_dir / "sizes.png")
    if summary["mode"] != "rlp":
        _plot_series(run_dir / "loss.png", lines, {"loss": ""}, "training loss (nats a token)")
        return
    gains = {"gain_problems_nats": "in problems", "gain_text_nats": "in ordinary text"}
    _plot_series(run_dir / "gain.png", lines, gains, "information gain (nats)")
    _plot_series(run_dir / "thoughts.png", lines, {"thought_tokens": ""}, "sampled thought (tokens)")
    plot_accuracy([summary], run_dir / "accuracy.png")


def plot_accuracy(summaries: list[dict], file: Path) -> None:
    """Held-out accuracy by family, before and after RLP, with 95 % intervals over problems.

    Of runs with several seeds the bars are means, and a dot is a seed.
    """
    families = [k for k in summaries[0]["accuracy"]["sampled"] if k != "all"] + ["all"]
    kinds = (("no_think", "base", GREY, "base, no thought"), ("sampled", "base", BLUE, "base, its own thoughts"),
             ("sampled", "rlp", ORANGE, "after RLP, sampled thoughts"))  # fmt: skip
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for i, (kind, who, color, label) in enumerate(kinds):
        cells = [[s["accuracy"][kind][f][who] for s in summaries] for f in families]
        means = [np.mean([c["mean"] for c in cell]) for cell in cells]
        half = [np.mean([c["high"] - c["mean"] for c in cell]) / len(cell) ** 0.5 for cell in cells]
        at = np.arange(len(families)) + 0.27 * (i - 1)
        axis.bar(at, means, 0.25, yerr=half, color=color, label=label, capsize=2)
        if len(summaries) > 1:
            for k, x in enumerate(np.linspace(-0.06, 0.06, len(summaries))):
                axis.plot(at + x, [cell[k]["mean"] for cell in cells], ".", color="black", markersize=3)
    axis.set_xticks(range(len(families)), families)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("accuracy on held-out problems")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3, frameon=False, fontsize=8)
    _finish(figure, axis, file)


def plot_widths(summary: dict, file: Path) -> None:
    """For each budget the share of every layer's parts that is kept, in the order of the layers."""
    budgets, full = summary["budgets"], summary["teacher"]["widths"]
    kinds = {"M": ("heads", "channels"), "*": ("heads",), "-": ("neurons",)}
    names, series = ["stream"], [[b["widths"]["d_model"] / full["d_model"] for b in budgets]]
    for i, kind in enumerate(summary["teacher"]["pattern"]):
        for j, name in enumerate(kinds[kind]):
            names.append(f"{i} {kind}\n{name}")
            kept = [b["widths"]["layers"][i] for b in budgets]
            series.append([(w[j] / full["layers"][i][j] if w else 0.0) for w in kept])
    figure, axis = plt.subplots(figsize=(max(6, 0.75 * len(names)), 3), layout="constrained")
    for k, (budget, color) in enumerate(zip(budgets, _shades(len(budgets)), strict=True)):
        at = np.arange(len(names)) + 0.8 * ((k + 0.5) / len(budgets) - 0.5)
        axis.bar(at, [s[k] for s in series], 0.75 / len(budgets), color=color, label=f"{100 * budget['fraction']:.0f} %")
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_ylabel("share that is kept")
    axis.legend(
        title="budget", frameon=False, fontsize=8, ncols=len(budgets), loc="upper center", bbox_to_anchor=(0.5, 1.3)
    )
    _finish(figure, axis, file)


def plot_sizes(summary: dict, file: Path) -> None:
    """Held-out loss against size, for the elastic family and every baseline, with 95 % intervals."""
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    teacher = summary["teacher"]["loss_nats"]["mean"]
    axis.axhline(teacher, color=GREY, linewidth=0.8, linestyle=":", label="parent")
    families = {"elastic": summary["budgets"], **summary["baselines"]}
    for i, (name, entries) in enumerate(families.items()):
        x, leaves = [e["parameters"] / 1e6 for e in entries], [e["loss_nats"] for e in entries]
        half = [leaf["high"] - leaf["mean"] for leaf in leaves]
        style = {"color": ORANGE, "linewidth": 2, "zorder": 9} if name == "elastic" else {"color": plt.cm.viridis(i / 7)}
        axis.errorbar(
            x,
            [leaf["mean"] for leaf in leaves],
            half,
            marker="o",
            markersize=3,
            capsize=2,
            label=SHORT.get(name, name),
            **style,
        )
    axis.set_xlabel("parameters (millions)")
    axis.set_ylabel("held-out loss (nats a token)")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _finish(figure, axis, file)


def _shades(n: int) -> list:
    return [plt.cm.Blues(0.9 - 0.6 * i / max(1, n - 1)) for i in range(n)]


def _plot_series(file: Path, lines: list[dict], labels: dict[str, str], axis_label: str) -> None:
    """Metrics over steps: each step pale, a running mean over about a twentieth of the run on top."""
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    for (key, label), color in zip(labels.items(), (BLUE, ORANGE), strict=False):
        points = [(line["step"], line[key]) for line in lines if np.isfinite(line.get(key, np.nan))]
        if points:
            step, value = map(np.array, zip(*points, strict=True))
            width = max(1, len(value) // 20)
            axis.plot(step, value, color=color, alpha=0.25, linewidth=0.8)
            mean = np.convolve(value, np.ones(width) / width, mode="valid")
            axis.plot(step[width - 1 :], mean, color=color, label=label or None)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False, fontsize=8)
    axis.set_xlabel("step")
    axis.set_ylabel(axis_label)
    _finish(figure, axis, file)


def _finish(figure: plt.Figure, axis: plt.Axes, file: Path) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------- tables


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
            table = Table(*rows[0], title=f"held-out figures, mean (95 % interval), seed {summary['seed']}")
            for row in rows[1:]:
                table.add_row(*row)
            console.print(table)
        console.print(f"{summary['wall_s']:.0f} s, {summary['peak_memory_gib']:.2f} GiB at the peak")
        return
    table = Table(title=f"held-out figures, mean (95 % interval), seed {summary['seed']}")
    who = [w for w in ("base", "rlp", "cpt") if w in summary["accuracy"]["sampled"]["all"]]
    for column in ("", *who):
        table.add_column(column)
    for kind, label in (("no_think", "without a thought"), ("sampled", "sampled thoughts"), ("greedy", "greedy thought")):
        for family, leaves in summary["accuracy"][kind].items():
            name = f"accuracy, {label}" if family == "all" else f"  {family}"
            table.add_row(name, *(cell(leaves[w]) for w in who))
    table.add_row("loss on text, no thought (nats a token)", *(cell(summary["loss_nats"]["no_think_text"][w]) for w in who))
    for key, label in (("thought_tokens", "thought length (tokens)"), ("closed", "thoughts that close")):
        if key in summary:
            table.add_row(label, *(cell(summary[key]["all"][w]) for w in who))
    for reference, leaf in summary["gain_nats"].items():
        table.add_row(f"gain against {reference} (nats)", *([""] * (len(who) - 1)), cell(leaf))
    console.print(table)
    console.print(f"{summary['wall_s']:.0f} s, {summary['peak_memory_gib']:.2f} GiB at the peak")


def print_estimate(facts: dict, console: Console) -> None:
    """What a run would take (see estimate.py), as tables for the terminal."""
    console.print(f"{facts['parameters']:,} parameters; {facts['total_tokens']:,} tokens"
                  + (f"; {facts['thoughts']:,} thoughts" if "thoughts" in facts else ""))  # fmt: skip
    table = Table("step of", "steps", "tokens a step", "FLOPs a step", "of which")
    for p in facts["phases"]:
        step, n = sum(p["flops"].values()), p["steps"]
        shares = ", ".join(f"{name} {100 * v / step:.0f} %" for name, v in p["flops"].items())
        table.add_row(p["name"], f"{n:,}", f"{p['tokens']:,}", f"{step:.3g}", shares)
    console.print(table)
    console.print(f"{facts['total_flops']:.3g} FLOPs in all: {facts['h100_hours']:,.3g} H100 hours at 40 % of its peak")
    n, kept = facts["n_gpus"], facts["memory"]
    table = Table(f"GB on each of {n} GPU{'s' * (n > 1)}", *(f"activations: {name}" for name in kept))
    for part in kept["all kept"]:
        if any(memory[part] for memory in kept.values()):
            table.add_row(part, *(f"{memory[part] / 1e9:,.3g}" for memory in kept.values()))
    console.print(table)
    if "family" in facts:
        model, router, separate = (facts["family"][name] / 1e9 for name in ("model", "router", "separate"))
        console.print(f"all sizes in bf16: {model + router:,.3g} GB as one checkpoint ({100 * router / model:.2g} % is the "
                      f"router), {separate:,.3g} GB as one for each")  # fmt: skip


def main_table(summaries: list[dict]) -> str:
    """README: what the default run reaches, a column a seed."""
    rows = [("gain against the frozen base, nats", lambda s: cell(s["gain_nats"]["frozen_base"]))]
    for name, kind, family, who in (
        ("accuracy, base without a thought", "no_think", "all", "base"),
        ("accuracy, base with its own thoughts", "sampled", "all", "base"),
        ("accuracy, base, greedy thought", "greedy", "all", "base"),
        ("**accuracy after RLP, sampled thoughts**", "sampled", "all", "rlp"),
        ("accuracy after RLP, greedy thought", "greedy", "all", "rlp"),
    ):
        rows.append((name, lambda s, k=kind, f=family, w=who: cell(s["accuracy"][k][f][w])))
    for family in [f for f in summaries[0]["accuracy"]["sampled"] if f != "all"]:
        rows.append((f"&nbsp;&nbsp;{family}: base → RLP, sampled", lambda s, f=family: " → ".join(
            f"{s['accuracy']['sampled'][f][w]['mean']:.2f}" for w in ("base", "rlp"))))  # fmt: skip
    rows += [
        ("gain against the EMA teacher", lambda s: cell(s["gain_nats"]["ema"])),
        ("gain against its own no-think prediction", lambda s: cell(s["gain_nats"]["own_no_think"])),
        ("gain against an empty thought", lambda s: cell(s["gain_nats"]["empty_thought"])),
        ("base, worked style forced, accuracy at temperature 0 / 0.7 / 1", lambda s: " / ".join(
            f"{v['all']['mean']:.2f}" for v in s["forced_style_base"].values())),
        ("no-think loss on ordinary text, change", lambda s: percent(s["loss_nats"]["no_think_text_change"])),
        ("gain at ordinary-text positions, nats", lambda s: cell(s["text_positions"]["rlp"]["gain_nats"]["frozen_base"])),
        ("the same for the base's own thoughts", lambda s: cell(s["text_positions"]["base"]["gain_nats"]["frozen_base"])),
        ("thought length in tokens, base → RLP", lambda s: " → ".join(
            f"{s['thought_tokens']['all'][w]['mean']:.1f}" for w in ("base", "rlp"))),
        ("time with the base, peak memory", lambda s: f"{total_minutes(s):.1f} min, {s['peak_memory_gib']:.1f} GiB"),
    ]  # fmt: skip
    head = ["n = " + str(summaries[0]["gain_nats"]["frozen_base"]["n"]), *(f"seed {s['seed']}" for s in summaries)]
    return markdown([head, *[[name, *(f(s) for s in summaries)] for name, f in rows]])


def rival_table(rlp: dict, cpt: dict) -> str:
    """README: the base, RLP, and the same base pretrained on its own mixture for about as long."""
    rows = [
        [
            "n = " + str(rlp["gain_nats"]["frozen_base"]["n"]) + f", seed {rlp['seed']}",
            "base",
            "RLP",
            "CPT, about equal time",
        ]
    ]
    for kind, label in (("sampled", "sampled thoughts"), ("greedy", "greedy thought"), ("no_think", "without a thought")):
        leaves = rlp["accuracy"][kind]["all"], cpt["accuracy"][kind]["all"]
        rows.append([f"accuracy, {label}", cell(leaves[0]["base"]), cell(leaves[0]["rlp"]), cell(leaves[1]["cpt"])])
    gains = [s["gain_nats"]["frozen_base"] for s in (rlp, cpt)]
    rows.append(["gain against the frozen base, nats", cell(rlp["gain_nats_before"]["frozen_base"]), *map(cell, gains)])
    text = [s["loss_nats"]["no_think_text_change"] for s in (rlp, cpt)]
    rows.append(["no-think loss on text, change", "", *map(percent, text)])
    return markdown(rows)


def fine(leaf: dict[str, Any]) -> str:
    """`1.551 (1.540 to 1.562)`."""
    return f"{leaf['mean']:.3f} ({leaf['low']:.3f} to {leaf['high']:.3f})"


def signed(leaf: dict[str, Any]) -> str:
    """`+0.021 (+0.015 to +0.027)`."""
    return f"{leaf['mean']:+.3f} ({leaf['low']:+.3f} to {leaf['high']:+.3f})"


def budget_rows(summary: dict) -> list[list[str]]:
    """What each budget of an elastic run reaches; the first row is the head."""
    entries = summary["budgets"]
    rows = [[f"n = {entries[0]['loss_nats']['n']}", "parent", *(f"{100 * e['fraction']:.0f} %" for e in entries)]]

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
        rows.append(["loss on long text, after stage 1", f"{summary['teacher']['long_loss_nats']['mean']:.3f} (parent)",
                     *(f"{x:.3f}" for x in long)])  # fmt: skip
        rows.append(["loss on long text, after stage 2", "", *(f"{e['long_loss_nats']['mean']:.3f}" for e in entries)])
    return rows


def cost_share(entry: dict) -> float:
    """Cost over target, for a budget in parameters."""
    return entry["cost"] / entry["target"]


def rival_rows(summary: dict) -> list[list[str]]:
    """Loss of the elastic family and its rivals, and how far each is from the family, paired; the first row is the head."""
    entries = summary["budgets"]
    heads = [f"{100 * e['fraction']:.0f} %" for e in entries]
    rows = [
        [f"loss, nats a token, n = {entries[0]['loss_nats']['n']}", *(h for head in heads for h in (head, "minus elastic"))]
    ]
    for name, family in {"elastic": entries, **summary["baselines"]}.items():
        cells = [(fine(e["loss_nats"]), "" if name == "elastic" else signed(e["difference_nats"])) for e in family]
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


def bench_table(found: dict) -> str:
    """README: one benchmark of bench.py, a row a contestant, and what it was measured on."""
    rows = [[found["title"], "ms", "times ours", "thousand tokens/s", "peak MiB"]]
    for row in found["rows"]:
        cells = [row["note"], "", "", ""]
        if "ms" in row:
            times = f"{row['times_ours']:.2f}"
            cells = [f"{row['ms']:.4g}", times, f"{row['tokens_per_s'] / 1e3:.3g}", f"{row['peak_bytes'] / 2**20:.3g}"]
        rows.append([row["name"], *cells])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    threads = "" if found["device"] == "cuda" else f", threads: {found['threads']}"
    text = f"{markdown(rows)}\n\n{found['machine']}{threads}, fp32 ({found['precision']}), {versions}; medians."
    text += f"\n\n{growth_table(found['growth'])}" if "growth" in found else ""
    return text + (f"\n\n{step_shares(found['rows'])}" if found["title"].startswith("Elastic step") else "")


def step_shares(rows: list[dict]) -> str:
    """README: what a step of the smaller budget takes of the full model's."""
    ms = {row["name"]: row["ms"] for row in rows}
    alone = ms["50 %, on the text alone"] / ms["100 %, on the text alone"]
    taught = ms["50 % of the parameters, on slices"] / ms["100 %"]
    return (
        f"A step at 50 % takes {alone:.2f} of one at 100 % on the text alone, and {taught:.2f} with the pass of the "
        "parent, which is the full model for every budget."
    )


def growth_table(growth: dict) -> str:
    """README: cost by length, and how straight the line is."""
    rows = [["tokens", *map(str, growth["tokens"])], ["ms", *(f"{ms:.4g}" for ms in growth["ms"])]]
    rows.append(["peak MiB", *(f"{n / 2**20:.3g}" for n in growth["peak_bytes"])])
    return (
        f"{markdown(rows)}\n\nTime grows with the power {growth['exponent']:.2f} of the length. The line "
        f"{growth['fixed_ms']:.2g} ms + {growth['ms_per_thousand_tokens']:.3g} ms per thousand tokens is within "
        f"{100 * growth['largest_deviation']:.0f} % of every point."
    )


def total_minutes(summary: dict) -> float:
    """Minutes of the whole job: of the run, and of the base's training where the run found it in the cache."""
    return (summary["wall_s"] + summary["base_train_s"] * summary["base_was_cached"]) / 60


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def load_results(folder: Path, prefix: str) -> list[dict]:
    """Summaries in results/ whose name begins with the prefix, in the order of their seeds."""
    found = [json.loads(f.read_text()) for f in sorted(folder.glob(f"{prefix}-seed*.json"))]
    return sorted(found, key=lambda s: s["seed"])


def samples(file: Path) -> str:
    """README: the first problem of each family in a run's samples.txt, with a thought before and after."""
    blocks = re.split(r"(?m)^(?=\[)", file.read_text())
    first = {block.split("]")[0]: block for block in reversed(blocks) if block.startswith("[")}
    return "```text\n" + "".join(first[name] for name in sorted(first)) + "```"


def collect(run_dir: Path, folder: Path) -> None:
    """Copy what results/ keeps of a run: NAME.json from its summary, NAME.txt from its samples."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(run_dir / "summary.json", folder / f"{run_dir.name}.json")
    if (run_dir / "samples.txt").exists():  # pretraining has none
        shutil.copyfile(run_dir / "samples.txt", folder / f"{run_dir.name}.txt")


def tables(folder: Path) -> dict[str, str]:
    """Every generated part of README.md by its name; `Not run.` where results/ has nothing for it."""
    out = {}
    for name in ("rlp-cpu", "rlp-cpu-random"):
        summaries = load_results(folder, name)
        out[name] = main_table(summaries) if summaries else "Not run."
    pair = [load_results(folder, name)[:1] for name in ("rlp-cpu", "cpt-cpu")]
    out["cpt-cpu"] = rival_table(*pair[0], *pair[1]) if all(pair) else "Not run."
    summaries = load_results(folder, "elastic-cpu")
    out["elastic-cpu"] = markdown(budget_rows(summaries[0])) if summaries else "Not run."
    out["elastic-cpu-rivals"] = "\n\n".join(
        f"Seed {s['seed']}, whose family trained for {s['train_s']['elastic']:.0f} s:\n\n{markdown(rival_rows(s))}"
        for s in summaries if s["baselines"]
    ) or "Not run."  # fmt: skip
    for name in BENCHES:
        files = sorted(folder.glob(f"bench-{name}-*.json"))
        out[f"bench-{name}"] = "\n\n".join(bench_table(json.loads(f.read_text())) for f in files) or "Not run."
    shown = folder / "rlp-cpu-seed0.txt"
    out["samples"] = samples(shown) if shown.exists() else "Not run."
    return out


def fill(text: str, made: dict[str, str]) -> str:
    """The text with every generated part replaced."""
    for name, made_text in made.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, t=made_text: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
    return text


def main(argv: list[str]) -> int:
    """Collect the runs named, then rewrite README.md and results/accuracy.png from results/."""
    here = Path(__file__).parent
    for run_dir in argv:
        collect(Path(run_dir), here / "results")
    readme = here / "README.md"
    readme.write_text(fill(readme.read_text(), tables(here / "results")))
    summaries = load_results(here / "results", "rlp-cpu")
    if summaries:
        plot_accuracy(summaries, here / "results" / "accuracy.png")
    summaries = load_results(here / "results", "elastic-cpu")
    if summaries:
        plot_widths(summaries[0], here / "results" / "widths.png")
        plot_sizes(summaries[0], here / "results" / "sizes.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
