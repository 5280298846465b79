"""Draw what a thought does, from a finished run of RLP: `python -m tools.picture RUN` makes
results/hero.png.

The problem is chosen by a rule, not by eye: in one family (chain, whose questions are short) the
first held-out problem that the base answers wrongly, at once as well as after a thought. Thoughts
are sampled as in samples.txt: the run's temperature, the run's seed.

From top to bottom: the question; the five likeliest next tokens of the trained model without a
thought and after it; its thought and the base's, each token shaded by the nats that it adds,

    log p(answer | question, thought up to this token) - the same one token earlier,

with the closing tag forced after each prefix (the first box is the empty thought against none, so
the boxes add up to the whole thought's gain); and the gain in problems over the training steps.
"""

import json
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch

from kernels import mask_banned
from system.errors import exit_code, require
from system.files import read_json
from system.rundir import load_model, load_run
from text.problems import held_out_problems
from thoughts import show_thoughts

INK, PALE, GREY, CARD, BOX = map(to_rgb, ("#f2f5fa", "#a9b7cb", "#66758e", "#1d2534", "#2b3547"))
GOOD, BAD = to_rgb("#2dd4a0"), to_rgb("#f45476")


@torch.no_grad()
def think(model, tokenizer, problem, config) -> dict:
    """A thought about a problem: its words, the nats that each adds, log p of the next token [V] at
    once and after it, as RLP scores it, and whether the likeliest is right."""
    c, device = config.rlp, next(model.parameters()).device
    (text,) = show_thoughts(model, tokenizer, [problem.prompt], c.thought_len, c.temperature,
                            config.seed, before=c.prompt)
    thought = tokenizer.encode(text.removeprefix("<think>").split("</think>")[0])
    context = [*tokenizer.begin, *tokenizer.encode(c.prompt), *tokenizer.encode(problem.prompt)]
    ends = [[], *([tokenizer.think, *thought[:n], tokenizer.close]
                  for n in range(len(thought) + 1))]
    hidden_ED = torch.cat([model(torch.tensor([context + e], device=device))[0][:, -1] for e in ends])
    logp_EV = mask_banned(model.logits(hidden_ED).float(), tokenizer.tags).log_softmax(-1).cpu()
    answer, words = tokenizer.encode(problem.answer)[0], [tokenizer.decode([t]) for t in thought]
    return {"words": ["think:", *(w.strip() for w in words)], "nats": np.diff(logp_EV[:, answer]),
            "at once": logp_EV[0], "after": logp_EV[-1], "answer": answer,
            "right": [int(logp_EV[i].argmax()) == answer for i in (0, -1)]}


def draw(problem, rlp: dict, base: dict, tokenizer, gain_nats: list[float], out: Path) -> None:
    """The picture, laid out in inches on a card of its own colour, which suits light and dark pages;
    8 wide, so that type of 14 points is legible on a phone."""
    question = [*textwrap.wrap(problem.question, 47), "Answer: ?"]
    height = 7.9 + 0.33 * len(question)
    figure = plt.figure(figsize=(8, height))
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, 8), ylim=(height, 0))
    page.axis("off")

    def box(x, y, wide, high, color, r=0.06, **more):
        style = f"round,pad=0,rounding_size={r}"
        page.add_patch(FancyBboxPatch((x, y - high / 2), wide, high, style, fc=color, **more))

    def write(x, y, text, size=14, color=INK, mono=False, **more):
        family = "DejaVu Sans Mono" if mono else "DejaVu Sans"
        page.text(x, y, text, fontsize=size, color=color, va="center", family=family, **more)

    # 1. the question
    box(0.06, height / 2, 7.88, height - 0.12, CARD, 0.25, ec="none")
    for y, line in enumerate(question):
        write(0.4, 0.48 + 0.33 * y, line, 17, mono=True, weight="bold")
    # 2. the likeliest next tokens, at once and after the thought
    y = 0.6 + 0.33 * len(question)
    for x, end, title in ((0.4, "at once", "Answering at once"), (4.2, "after", "After a thought")):
        write(x, y, title, 15, PALE)
        for i, (logp, token) in enumerate(zip(*rlp[end].topk(5), strict=True)):
            at, wide = y + 0.42 + 0.36 * i, 0.06 + 1.75 * float(logp.exp())
            true = token == rlp["answer"]
            write(x + 0.5, at, tokenizer.decode([token]).strip(), 16, ha="right", mono=True)
            box(x + 0.62, at, wide, 0.26, GOOD if true else GREY, 0.03, ec="none")
            write(x + 0.72 + wide, at, f"{100 * float(logp.exp()):.0f} %" + " true" * true, 14,
                  GOOD if true else PALE)
    # 3. the thoughts: one scale of widths, one of colours
    y, rows = y + 2.6, []
    for found in (rlp, base):
        answer = tokenizer.decode([int(found["after"].argmax())]).strip()
        rows.append([*zip(found["words"], found["nats"], strict=True), ("→", 0), (answer, 0)])
    unit = min(0.155, 7.2 / max(sum(len(word) + 0.9 for word, _ in row) for row in rows))
    most = max(abs(n) for row in rows for _, n in row)
    titles = "The thought, and the nats that each token adds to the true answer", "Before RLP"
    for row, found, title in zip(rows, (rlp, base), titles, strict=True):
        write(0.4, y, title, 15, PALE)
        x, y = 0.4, y + 0.44
        for i, (word, n) in enumerate(row):
            wide, last = unit * (len(word) + 0.9), i == len(row) - 1
            sign = GOOD if n > 0 or (last and found["right"][1]) else BAD
            shade = 0.85 * (abs(n) / most) ** 0.5
            color = [b + shade * (s - b) for b, s in zip(BOX, sign, strict=True)]
            if word != "→":
                box(x + 0.02, y, wide - 0.04, 0.38, color, ec=sign if last else "none", lw=2.5)
            write(x + wide / 2, y, word, 100 * unit, ha="center", mono=True)
            if abs(n) >= 0.95:
                write(x + wide / 2, y + 0.32, f"{n:+.0f}", 12, sign, ha="center")
            x += wide
        y += 0.8
    # 4. the gain over training
    write(0.4, y, f"Gain of its thoughts over {len(gain_nats)} training steps, nats", 15, PALE)
    axis = figure.add_axes((0.085, 0.42 / height, 0.87, (height - y - 0.65) / height), fc="none")
    n = max(1, len(gain_nats) // 15)
    axis.plot(gain_nats, color=GOOD, alpha=0.3, linewidth=1)
    axis.plot(range(n - 1, len(gain_nats)), np.convolve(gain_nats, np.ones(n) / n, "valid"),
              color=GOOD, linewidth=3)
    axis.axhline(0, color=PALE, linewidth=0.8)
    axis.tick_params(colors=PALE, labelsize=13, length=0)
    axis.spines[:].set_visible(False)
    figure.savefig(out, dpi=200, transparent=True)
    plt.close(figure)


def picture(run: tyro.conf.Positional[Path], family: str = "chain",
            out: Path = Path("results/hero.png")) -> None:
    """Draw what a thought does in one held-out problem, and the gain over training.

    Args:
        run: Folder of a finished run of --mode rlp.
        family: Family of the problem.
        out: File to write.
    """
    summary = read_json(run / "summary.json")
    require(summary["mode"] == "rlp", f"{run} is of --mode {summary['mode']}; give a run of rlp")
    (model, tokenizer, c), base = load_run(run), load_model(Path(summary["base_dir"]))[0]
    for problem in held_out_problems("test", c.eval.problems_per_family, c.seed,
                                     c.data.held_out_percent):
        if problem.family == family:
            before = think(base, tokenizer, problem, c)
            if not any(before["right"]):
                break
    else:
        require(False, f"family ({family}) has no held-out problem that the base gets wrong; give "
                       "another --family")
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    draw(problem, think(model, tokenizer, problem, c), before, tokenizer,
         [line["gain_problems_nats"] for line in log], out)
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(picture, prog="python -m tools.picture")))
