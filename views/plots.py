"""Plots of runs, as PNG files."""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from system.files import read_log
from views.tables import RIVALS

matplotlib.use("Agg")  # no window, also where there is a screen

BLUE, ORANGE, GREY = "#2f6db3", "#e07b39", "#9a9a9a"


def plot_run(run_dir: Path) -> None:
    """Of RLP gain, accuracy and thoughts as PNGs, else loss; of elastic widths and sizes too."""
    lines, _ = read_log(run_dir / "metrics.jsonl")
    summary = json.loads((run_dir / "summary.json").read_text())
    if summary["mode"] == "elastic":
        plot_widths(summary, run_dir / "widths.png")
        plot_sizes(summary, run_dir / "sizes.png")
    if summary["mode"] not in ("rlp", "rlvr"):
        _plot_series(run_dir / "loss.png", lines, {"loss": ""}, "training loss (nats a token)")
        return
    gains = {"gain_problems_nats": "in problems", "gain_text_nats": "in ordinary text"}
    length = {"thought_tokens": ""}
    _plot_series(run_dir / "gain.png", lines, gains, "information gain (nats)")
    _plot_series(run_dir / "thoughts.png", lines, length, "length of sampled thoughts (tokens)")
    plot_accuracy([summary], run_dir / "accuracy.png")


def plot_accuracy(summaries: list[dict], file: Path) -> None:
    """Held-out accuracy by family, before and after RLP, with 95 % intervals over problems; of runs
    with several seeds the bars are means, and a dot is a seed."""
    mode = summaries[0]["mode"]
    families = [k for k in summaries[0]["accuracy"]["sampled"] if k != "all"] + ["all"]
    kinds = (("no_think", "base", GREY, "base, no thought"),
             ("sampled", "base", BLUE, "base, its own thoughts"),
             ("sampled", mode, ORANGE, f"after {mode.upper()}, sampled thoughts"))
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for i, (kind, who, color, label) in enumerate(kinds):
        leaves = [[s["accuracy"][kind][f][who] for s in summaries] for f in families]
        means = np.array([[leaf["mean"] for leaf in row] for row in leaves])  # [families, seeds]
        sides = np.array([[(leaf["mean"] - leaf["low"], leaf["high"] - leaf["mean"])
                           for leaf in row] for row in leaves])
        at = np.arange(len(families)) + 0.27 * (i - 1)
        axis.bar(at, means.mean(1), 0.25, color=color, label=label, capsize=2,
                 yerr=sides.mean(1).T / len(summaries) ** 0.5)
        if len(summaries) > 1:
            for values, x in zip(means.T, np.linspace(-0.06, 0.06, len(summaries)), strict=True):
                axis.plot(at + x, values, ".", color="black", markersize=3)
    axis.set_xticks(range(len(families)), families)
    axis.set(ylim=(0, 1.02), ylabel="accuracy on held-out problems")
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
    for k, budget in enumerate(budgets):
        at = np.arange(len(names)) + 0.8 * ((k + 0.5) / len(budgets) - 0.5)
        axis.bar(at, [s[k] for s in series], 0.75 / len(budgets),
                 color=plt.cm.Blues(0.9 - 0.6 * k / max(1, len(budgets) - 1)),
                 label=f"{100 * budget['fraction']:.0f} %")
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set(xlabel="layer: M Mamba-2, * attention, - FFN", ylabel="share that is kept")
    axis.legend(title="budget", frameon=False, fontsize=8, ncols=len(budgets), loc="upper center",
                bbox_to_anchor=(0.5, 1.3))
    _finish(figure, axis, file)


def plot_sizes(summary: dict, file: Path) -> None:
    """Held-out loss against size: the family and its rivals, a little apart to show intervals."""
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    axis.axhline(summary["teacher"]["loss_nats"]["mean"], color=GREY, linewidth=0.8, linestyle=":",
                 label="parent")
    families = {"elastic": summary["budgets"], **summary["baselines"]}
    for i, (name, entries) in enumerate(families.items()):
        leaves = [e["loss_nats"] for e in entries]
        ours = {"color": ORANGE, "linewidth": 2, "zorder": 9}
        style = ours if name == "elastic" else {"color": plt.cm.viridis(i / 7)}
        apart = 1 + 0.006 * (i - (len(families) - 1) / 2)
        axis.errorbar([apart * e["parameters"] / 1e6 for e in entries],
                      [leaf["mean"] for leaf in leaves],
                      [leaf["high"] - leaf["mean"] for leaf in leaves], marker="o", markersize=3,
                      capsize=2, elinewidth=1, label=RIVALS.get(name, name), **style)
    axis.set(xlabel="parameters (millions)", ylabel="held-out loss (nats a token)")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _finish(figure, axis, file)


def _plot_series(file: Path, lines: list[dict], labels: dict[str, str], axis_label: str) -> None:
    """Metrics over steps: each pale, a running mean over about a twentieth of the run on top."""
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
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axis.set(xlabel="step", ylabel=axis_label)
    _finish(figure, axis, file)


def _finish(figure: plt.Figure, axis: plt.Axes, file: Path) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
    plt.close(figure)
