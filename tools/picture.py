"""README's picture, from a run of RLP: `python -m tools.picture RUN` draws results/hero.png.

A rule chooses the problem: of one family, the first held-out problem that the base gets wrong, at
once as well as after a thought. Thoughts are sampled as in samples.txt. Each token is shaded by

    log p(answer | question, thought up to this token) - the same one token earlier,

in nats, with the closing tag forced after each prefix. The first box is the empty thought against
none, so the boxes add up to the gain of the whole thought.
"""

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
from system import parallel
from system.errors import exit_code, require
from system.files import read_json, read_log
from system.rundir import load_model, load_run
from text.problem_sources import load_families
from text.problems import held_out_problems
from thoughts import show_thought

INK, PALE, GREY, CARD, BOX, GOOD, BAD = (np.array(to_rgb(f"#{color}")) for color in (
    "f2f5fa", "a9b7cb", "66758e", "1d2534", "2b3547", "2dd4a0", "f45476"))


@torch.no_grad()
def think(model, tokenizer, problem, config) -> dict:
    """One thought about a problem: its words, the nats that each adds, and log p of the next token
    ([V], scored as RLP does) at once and after it."""
    c, device = config.rlp, parallel.device_of(model)
    text = show_thought(model, tokenizer, problem.prompt, c, config.seed)
    thought = tokenizer.encode(text.removeprefix("<think>").split("</think>")[0])
    context = [*tokenizer.begin, *tokenizer.encode(c.prompt), *tokenizer.encode(problem.prompt)]
    prefixes = [context] + [[*context, tokenizer.think, *thought[:n], tokenizer.close]
                            for n in range(len(thought) + 1)]
    hidden_BD = torch.cat([model(torch.tensor([p], device=device))[0][:, -1] for p in prefixes])
    logp_BV = mask_banned(model.logits(hidden_BD).float(), tokenizer.tags).log_softmax(-1).cpu()
    answer, words = tokenizer.encode(problem.answer)[0], [tokenizer.decode([t]) for t in thought]
    return {"words": ["think:", *(w.strip() for w in words)], "nats": np.diff(logp_BV[:, answer]),
            "at once": logp_BV[0], "after": logp_BV[-1], "answer": answer,
            "right": bool((logp_BV[[0, -1]].argmax(-1) == answer).any())}


def draw(question: str, thoughts: tuple, tokenizer, gain_nats: list[float]) -> plt.Figure:
    """Everything is placed in inches, y downwards. A card of its own colour suits light and dark
    pages; 14 points on 8 inches are legible on a phone."""
    lines = [*textwrap.wrap(question, 47), "Answer: ?"]
    high, y, after = 7.7 + 0.33 * len(lines), 0.6 + 0.33 * len(lines), thoughts[0]
    figure = plt.figure(figsize=(8, high))
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, 8), ylim=(high, 0))
    page.axis("off")

    def box(x, y, w, h, color, r=0.04):
        page.add_patch(FancyBboxPatch(
            (x, y - h / 2), w, h, f"round,pad=0,rounding_size={r}", fc=color, ec="none"))

    def write(x, y, text, size=14.5, color=PALE, **more):
        page.text(x, y, text, size=size, color=color, va="center", family="monospace",
                  parse_math=False, **more)

    box(0.06, high / 2, 7.88, high - 0.12, CARD, 0.25)
    write(0.4, (y - 0.1) / 2 + 0.05, "\n".join(lines), 17, INK, weight="bold", linespacing=1.35)
    for x, end, title in (0.4, "at once", "At once"), (4.2, "after", "After a thought"):
        p = float(after[end][after["answer"]].exp())
        write(x, y, f"{title}: {p:.0%} right", 16, INK, weight="bold")
        for i, (logp, token) in enumerate(zip(*after[end].topk(5), strict=True)):
            at, p = y + 0.42 + 0.36 * i, float(logp.exp())
            write(x + 0.5, at, tokenizer.decode([token]).strip(), 16, INK, ha="right")
            box(x + 0.62, at, 0.06 + 2 * p, 0.26, GOOD if token == after["answer"] else GREY)
            write(x + 0.78 + 2 * p, at, f"{p:.0%}")
    y, longest = y + 2.5, max(sum(len(w) + 0.9 for w in t["words"]) for t in thoughts)
    unit, most = min(0.155, 6.8 / longest), max(abs(t["nats"]).max() for t in thoughts)
    titles = "The thought: nats that each token adds to the true answer", "Before RLP"
    for title, found in zip(titles, thoughts, strict=True):
        write(0.4, y, title)
        x, y, best = 0.4, y + 0.44, int(found["after"].argmax())
        for word, n in zip(found["words"], found["nats"], strict=True):
            w, sign = unit * (len(word) + 0.9), GOOD if n > 0 else BAD
            box(x + 0.02, y, w - 0.04, 0.38, BOX + 0.85 * (abs(n) / most)**0.5 * (sign - BOX))
            write(x + w / 2, y, word, 100 * unit, INK, ha="center")
            write(x + w / 2, y + 0.32, f"{n:+.0f}" if abs(n) >= 0.95 else "", 13, sign, ha="center")
            x += w
        write(x + 0.1, y, f"→ {tokenizer.decode([best]).strip()}", 17,
              GOOD if best == found["answer"] else BAD, weight="bold")
        y += 0.8
    write(0.4, y, f"Gain of its thoughts in nats, over {len(gain_nats)} training steps")
    axis = figure.add_axes((0.085, 0.42 / high, 0.87, (high - y - 0.65) / high), fc="none")
    axis.plot(gain_nats, color=GOOD, lw=2.5)
    axis.set_ylim(min(0, *gain_nats), 1.05 * max(gain_nats))
    axis.tick_params(colors=PALE, labelsize=13, length=0)
    axis.spines[:].set_visible(False)
    return figure


def picture(run: tyro.conf.Positional[Path], family: str = "word",
            out: Path = Path("results/hero.png")) -> None:
    """Draw what a thought does in a held-out problem of a family, from a finished run of RLP."""
    summary = read_json(run / "summary.json")
    mode = summary.get("mode")
    require(mode == "rlp", f"{run} is of --mode {mode}; give a run of rlp")
    log, _ = read_log(run / "metrics.jsonl")
    gain_nats = [line["gain_problems_nats"] for line in log if "gain_problems_nats" in line]
    require(gain_nats, f"{run} has logged no gain at answers of problems; give a run of rlp that "
            "has taken steps, and reads problems")
    (model, tokenizer, c), (base, *_) = load_run(run), load_model(Path(summary["base_dir"]))
    problems = held_out_problems("test", c.eval.problems_per_family, c.seed,
                                 c.data.held_out_percent, load_families(c.data.problems)[0])
    tried = ((p, think(base, tokenizer, p, c)) for p in problems if p.family == family)
    problem, before = next((pair for pair in tried if not pair[1]["right"]), (None, None))
    require(problem, f"family ({family}) has no problem that the base gets wrong; give another")
    thoughts = think(model, tokenizer, problem, c), before
    draw(problem.question, thoughts, tokenizer, gain_nats).savefig(out, dpi=200, transparent=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(picture, prog="python -m tools.picture")))
