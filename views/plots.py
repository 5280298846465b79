"""Plots of runs."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from views.tables import SHORT

BLUE, ORANGE, GREY = "#2f6db3", "#e07b39", "#9a9a9a"


# -------------------------------------------------------------------------------------------- plots


def plot_run(run_dir: Path) -> None:
    """gain.png, accuracy.png and thoughts.png for an RLP run; loss.png for the others, elastic:
    widths.png, sizes.png."""
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
    _plot_series(
        run_dir / "thoughts.png", lines, {"thought_tokens": ""}, "sampled thought (tokens)")
    plot_accuracy([summary], run_dir / "accuracy.png")


def plot_accuracy(summaries: list[dict], file: Path) -> None:
    """Held-out accuracy by family, before and after RLP, with 95 % intervals over problems.

    Of runs with several seeds the bars are means, and a dot is a seed.
    """
    families = [k for k in summaries[0]["accuracy"]["sampled"] if k != "all"] + ["all"]
    kinds = (("no_think", "base", GREY, "base, no thought"),
             ("sampled", "base", BLUE, "base, its own thoughts"),
             ("sampled", "rlp", ORANGE, "after RLP, sampled thoughts"))
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for i, (kind, who, color, label) in enumerate(kinds):
        cells = [[s["accuracy"][kind][f][who] for s in summaries] for f in families]
        means = [np.mean([c["mean"] for c in cell]) for cell in cells]
        half = [np.mean([c["high"] - c["mean"] for c in cell]) / len(cell) ** 0.5 for cell in cells]
        at = np.arange(len(families)) + 0.27 * (i - 1)
        axis.bar(at, means, 0.25, yerr=half, color=color, label=label, capsize=2)
        if len(summaries) > 1:
            for k, x in enumerate(np.linspace(-0.06, 0.06, len(summaries))):
                axis.plot(
                    at + x, [cell[k]["mean"] for cell in cells], ".", color="black", markersize=3)
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
        axis.bar(at, [s[k] for s in series], 0.75 / len(budgets), color=color,
                 label=f"{100 * budget['fraction']:.0f} %")
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_ylabel("share that is kept")
    axis.legend(title="budget", frameon=False, fontsize=8, ncols=len(budgets), loc="upper center",
                bbox_to_anchor=(0.5, 1.3))
    _finish(figure, axis, file)


def plot_sizes(summary: dict, file: Path) -> None:
    """Held-out loss against size, for the elastic family and every baseline, with 95 %
    intervals."""
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    teacher = summary["teacher"]["loss_nats"]["mean"]
    axis.axhline(teacher, color=GREY, linewidth=0.8, linestyle=":", label="parent")
    families = {"elastic": summary["budgets"], **summary["baselines"]}
    for i, (name, entries) in enumerate(families.items()):
        x, leaves = [e["parameters"] / 1e6 for e in entries], [e["loss_nats"] for e in entries]
        half = [leaf["high"] - leaf["mean"] for leaf in leaves]
        style = ({"color": ORANGE, "linewidth": 2, "zorder": 9}
                 if name == "elastic"
                 else {"color": plt.cm.viridis(i / 7)})
        axis.errorbar(x, [leaf["mean"] for leaf in leaves], half, marker="o", markersize=3,
                      capsize=2, label=SHORT.get(name, name), **style)
    axis.set_xlabel("parameters (millions)")
    axis.set_ylabel("held-out loss (nats a token)")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _finish(figure, axis, file)


def _shades(n: int) -> list:
    return [plt.cm.Blues(0.9 - 0.6 * i / max(1, n - 1)) for i in range(n)]


def _plot_series(file: Path, lines: list[dict], labels: dict[str, str], axis_label: str) -> None:
    """Metrics over steps: each step pale, a running mean over about a twentieth of the run on
    top."""
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
