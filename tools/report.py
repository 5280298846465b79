"""What a person sees: plots and tables, made from results and never by hand.

    python -m tools.report                          rewrite the tables and figures of README.md from results/
    python -m tools.report runs/rlp-cpu-seed0       take a run into results/ first

`plot_run` and `print_summary` serve train.py at the end of each run. A table in README.md stands
between the lines `<!-- table NAME -->` and `<!-- end -->`; a test compares what stands there with
what this file would write.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import matplotlib

from views.plots import plot_accuracy, plot_sizes, plot_widths
from views.tables import budget_rows, cell, percent, rival_rows, total_minutes

matplotlib.use("Agg")


BENCHES = ("ssd", "mixer", "decode", "logp", "rlp-step", "elastic-step")  # of bench.py


def main_table(summaries: list[dict]) -> str:
    """README: what the default run reaches, a column a seed."""
    rows = [("gain against the frozen base, nats", lambda s: cell(s["gain_nats"]["frozen_base"]))]
    for name, kind, family, who in (
        ("accuracy, base without a thought", "no_think", "all", "base"),
        ("accuracy, base with its own thoughts", "sampled", "all", "base"),
        ("accuracy, base, greedy thought", "greedy", "all", "base"),
        ("**accuracy after RLP, sampled thoughts**", "sampled", "all", "rlp"),
        ("accuracy after RLP, greedy thought", "greedy", "all", "rlp")):
        rows.append((name, lambda s, k=kind, f=family, w=who: cell(s["accuracy"][k][f][w])))
    for family in [f for f in summaries[0]["accuracy"]["sampled"] if f != "all"]:
        rows.append(
            (
                f"&nbsp;&nbsp;{family}: base → RLP, sampled",
                lambda s, f=family: " → ".join(
                    f"{s['accuracy']['sampled'][f][w]['mean']:.2f}" for w in ("base", "rlp")),
            )
        )
    rows += [
        ("gain against the EMA teacher", lambda s: cell(s["gain_nats"]["ema"])),
        ("gain against its own no-think prediction",
         lambda s: cell(s["gain_nats"]["own_no_think"])),
        ("gain against an empty thought", lambda s: cell(s["gain_nats"]["empty_thought"])),
        (
            "base, worked style forced, accuracy at temperature 0 / 0.7 / 1",
            lambda s: " / ".join(
                f"{v['all']['mean']:.2f}" for v in s["forced_style_base"].values()),
        ),
        ("no-think loss on ordinary text, change",
         lambda s: percent(s["loss_nats"]["no_think_text_change"])),
        ("gain at ordinary-text positions, nats",
         lambda s: cell(s["text_positions"]["rlp"]["gain_nats"]["frozen_base"])),
        ("the same for the base's own thoughts",
         lambda s: cell(s["text_positions"]["base"]["gain_nats"]["frozen_base"])),
        (
            "thought length in tokens, base → RLP",
            lambda s: " → ".join(
                f"{s['thought_tokens']['all'][w]['mean']:.1f}" for w in ("base", "rlp")),
        ),
        ("time with the base, peak memory",
         lambda s: f"{total_minutes(s):.1f} min, {s['peak_memory_gib']:.1f} GiB"),
    ]
    head = ["n = " + str(summaries[0]["gain_nats"]["frozen_base"]["n"]),
            *(f"seed {s['seed']}" for s in summaries)]
    return markdown([head, *[[name, *(f(s) for s in summaries)] for name, f in rows]])


def rival_table(rlp: dict, cpt: dict) -> str:
    """README: the base, RLP, and the same base pretrained on its own mixture for about as long."""
    rows = [
        ["n = " + str(rlp["gain_nats"]["frozen_base"]["n"]) + f", seed {rlp['seed']}", "base",
         "RLP", "CPT, about equal time"]
    ]
    for kind, label in (("sampled", "sampled thoughts"), ("greedy", "greedy thought"),
                        ("no_think", "without a thought")):
        leaves = rlp["accuracy"][kind]["all"], cpt["accuracy"][kind]["all"]
        rows.append(
            [f"accuracy, {label}", cell(leaves[0]["base"]), cell(leaves[0]["rlp"]),
             cell(leaves[1]["cpt"])]
        )
    gains = [s["gain_nats"]["frozen_base"] for s in (rlp, cpt)]
    rows.append(
        ["gain against the frozen base, nats", cell(rlp["gain_nats_before"]["frozen_base"]),
         *map(cell, gains)]
    )
    text = [s["loss_nats"]["no_think_text_change"] for s in (rlp, cpt)]
    rows.append(["no-think loss on text, change", "", *map(percent, text)])
    return markdown(rows)


def bench_table(found: dict) -> str:
    """README: one benchmark of bench.py, a row a contestant, and what it was measured on."""
    rows = [[found["title"], "ms", "times ours", "thousand tokens/s", "peak MiB"]]
    for row in found["rows"]:
        cells = [row["note"], "", "", ""]
        if "ms" in row:
            times = f"{row['times_ours']:.2f}"
            cells = [f"{row['ms']:.4g}", times, f"{row['tokens_per_s'] / 1e3:.3g}",
                     f"{row['peak_bytes'] / 2**20:.3g}"]
        rows.append([row["name"], *cells])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    threads = "" if found["device"] == "cuda" else f", threads: {found['threads']}"
    text = f"{markdown(rows)}\n\n{found['machine']}{threads}, fp32 ({found['precision']}), {versions}; medians."
    text += f"\n\n{growth_table(found['growth'])}" if "growth" in found else ""
    return text + (
        f"\n\n{step_shares(found['rows'])}" if found["title"].startswith("Elastic step") else "")


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


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def load_results(folder: Path, prefix: str) -> list[dict]:
    """Summaries in results/ whose name begins with the prefix, in the order of their seeds."""
    found = [json.loads(f.read_text()) for f in sorted(folder.glob(f"{prefix}-seed*.json"))]
    return sorted(found, key=lambda s: s["seed"])


def samples(file: Path) -> str:
    """README: the first problem of each family in a run's samples.txt, with a thought before and
    after."""
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
    """Every generated part of README.md by its name; `Not run.` where results/ has nothing for
    it."""
    out = {}
    for name in ("rlp-cpu", "rlp-cpu-random"):
        summaries = load_results(folder, name)
        out[name] = main_table(summaries) if summaries else "Not run."
    pair = [load_results(folder, name)[:1] for name in ("rlp-cpu", "cpt-cpu")]
    out["cpt-cpu"] = rival_table(*pair[0], *pair[1]) if all(pair) else "Not run."
    summaries = load_results(folder, "elastic-cpu")
    out["elastic-cpu"] = markdown(budget_rows(summaries[0])) if summaries else "Not run."
    out["elastic-cpu-rivals"] = (
        "\n\n".join(
            f"Seed {s['seed']}, whose family trained for {s['train_s']['elastic']:.0f} s:\n\n{markdown(rival_rows(s))}"
            for s in summaries
            if s["baselines"]
        )
        or "Not run."
    )
    for name in BENCHES:
        files = sorted(folder.glob(f"bench-{name}-*.json"))
        out[f"bench-{name}"] = (
            "\n\n".join(bench_table(json.loads(f.read_text())) for f in files) or "Not run.")
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
    here = Path(__file__).parent.parent
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
