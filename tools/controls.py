"""What is behind the figures of a run that thinks: `python -m tools.controls RUN [RUN ...]`.

Writes controls.json into each run's folder, of the base that it began with and of what it became:

    levels    accuracy of the likeliest thought by level: as trained, with one to three steps more
              than were ever trained, with distractors. Thoughts may be twice as long as in training
    pass      pass@k: share of problems that at least one of k sampled thoughts solves
    thoughts  gain over the frozen base of the model's own thoughts, and of what is left of them:
              another context's thought, its own with its tokens in random order, the first half of
              it, none
    changed   share of positions where the likeliest token after a thought is not the base's without
              one; its rank there; how often each is right
    text      loss at random positions of held-out text, with a thought and without, in nats
    gate      gain over the frozen base at random positions of text and of computed documents: after
              a thought, without one, and of a mixture of both by a learned gate; and its weight
"""

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import evals
from evals import Leaf, Positions
from kernels import mask_banned
from model import HybridLM
from system.config import Config
from system.errors import exit_code, require
from system.files import read_figures, read_json, write_figures
from system.rundir import load_model, load_run
from text.corpus import Corpus
from text.problems import LEVELS
from thoughts import Sampling, prefill, read_targets, sample_thoughts, score_context, states_after

K = (1, 2, 4, 8, 16, 32)  # of pass@k; the largest is how many thoughts are sampled
Part = Literal["levels", "pass", "thoughts", "changed", "text", "gate"]
PARTS: tuple[Part, ...] = get_args(Part)


def controls(run: Path, parts: tuple[Part, ...] = PARTS) -> dict:
    """These parts. Raises ValueError for a folder that is no finished run of a mode that thinks."""
    require((run / "summary.json").is_file(), f"{run} holds no summary.json, so no run has ended "
            "there; give the folder of a finished run")
    summary = read_json(run / "summary.json")
    require("gain_nats_before" in summary, f"{run} is of --mode {summary['mode']}, which has no "
            "figures before and after; give a run of rlp, rlvr, sft or cpt")
    (model, _, config), (base, *_) = load_run(run), load_model(Path(summary["base_dir"]))
    corpus, models = Corpus.load(config.data), {"base": base, config.mode: model}

    @functools.cache  # made once, if a part asks for them
    def problems() -> Positions:
        return evals.problem_positions(corpus, config)

    @functools.cache
    def text() -> Positions:
        return evals.text_positions(corpus, config)

    def of_both(measure: Callable[[HybridLM, Corpus, Config], dict]) -> dict:
        return evals.side_by_side({name: measure(m, corpus, config) for name, m in models.items()})

    make = {"levels": lambda: of_both(levels), "pass": lambda: of_both(pass_at_k),
            "thoughts": lambda: remains(model, base, problems()),
            "changed": lambda: {"problems": changed(model, base, problems()),
                                "text": changed(model, base, text())},
            "text": lambda: text_losses(model, base, text()),
            "gate": lambda: gated(model, base, corpus, config)}
    return {"mode": config.mode, "seed": config.seed, "versions": summary["versions"],
            **{part: make[part]() for part in parts}}


def levels(model: HybridLM, corpus: Corpus, config: Config) -> dict[str, dict[str, Leaf]]:
    """Accuracy of the likeliest thought, by level and family; nothing for problems of others."""
    config = replace(config, rlp=replace(config.rlp, thought_len=2 * config.rlp.thought_len,
                                         context_len=2 * config.rlp.context_len))
    found = {}
    for level, families in LEVELS.items() if config.data.problems == "built-in" else ():
        positions = evals.problem_positions(replace(corpus, families=families), config)
        correct = evals.measure_thoughts(model, positions, 0.0, 1)["correct"]
        found[level] = positions.by_kind(correct, 1)
    return found


def pass_at_k(model: HybridLM, corpus: Corpus, config: Config) -> dict[str, Leaf]:
    """1 - C(n - c, k) / C(n, k) of n thoughts of which c are right: unbiased (Chen et al. 2021). On
    half of the problems that figures are of."""
    few = replace(config.eval, problems_per_family=max(2, config.eval.problems_per_family // 2))
    positions, n = evals.problem_positions(corpus, replace(config, eval=few)), max(K)
    share = evals.measure_thoughts(model, positions, config.rlp.temperature, n)["correct"]
    n_right = (share * n).round().int().tolist()
    return {str(k): evals.interval(torch.tensor(
        [1 - math.comb(n - c, k) / math.comb(n, k) for c in n_right])) for k in K}


def remains(model: HybridLM, base: HybridLM, positions: Positions) -> dict[str, Leaf]:
    """Gain over the frozen base of thoughts at problems, and of what is left of them."""
    c, close = positions.config, positions.tokenizer.close
    own = evals.measure_thoughts(model, positions, c.rlp.temperature, c.eval.samples)
    plain, thought_BGL = evals.plain_logp(base, positions), own["thought_BGL"]
    others = {"swapped": evals.swapped(thought_BGL, c.seed),
              "shuffled": shuffled(thought_BGL, close, c.seed),
              "first half": halved(thought_BGL, close),
              "empty": torch.full_like(thought_BGL[:, :1, :1], close)}
    logp = {"own": own["logp"], **{name: evals.logp_after(model, positions, thoughts)
                                   for name, thoughts in others.items()}}
    return {name: positions.leaf(values - plain) for name, values in logp.items()}


def shuffled(thought_BGL: Tensor, close: int, seed: int) -> Tensor:
    """The tokens of each thought before its closing tag in random order."""
    generator = torch.Generator().manual_seed(seed)
    key_BGL = torch.rand(thought_BGL.shape, generator=generator)
    behind_BGL = (thought_BGL == close).cumsum(-1) > 0
    return thought_BGL.gather(-1, (key_BGL + 2 * behind_BGL).argsort(-1))


def halved(thought_BGL: Tensor, close: int) -> Tensor:
    """The first half of each thought, rounded down; then closing tags."""
    n_BG1 = ((thought_BGL == close).cumsum(-1) == 0).sum(-1, keepdim=True)
    place = torch.arange(thought_BGL.shape[-1])
    return thought_BGL.masked_fill(place >= n_BG1 // 2, close)


@torch.no_grad()
def changed(model: HybridLM, base: HybridLM, positions: Positions) -> dict[str, Leaf]:
    """The likeliest first token after the likeliest thought beside the base's without a thought."""
    c, tags = positions.config.rlp, positions.tokenizer.tags
    found: dict[str, list[Tensor]] = {"changed": [], "rank": [], "right": [], "base_right": []}
    for batch in positions.batches(model, 32):
        t = sample_thoughts(model, batch, positions.tokenizer, Sampling(1, c.thought_len, 0.0))
        said_B, true_B = t.answer_RX[:, 0], batch["target_BX"][:, 0]
        _, answer_BX, read = score_context(base, batch, tags)
        logits_BV = mask_banned(base.logits(read.hidden_BD), tags)
        above_BV = logits_BV > logits_BV.gather(1, said_B[:, None])
        base_B = answer_BX[:, 0]
        for name, values in (("changed", said_B != base_B), ("rank", 1 + above_BV.sum(1)),
                             ("right", said_B == true_B), ("base_right", base_B == true_B)):
            found[name].append(values.float().cpu())
    together = {name: torch.cat(values) for name, values in found.items()}
    is_changed = together["changed"] > 0
    leaves = {name: positions.leaf(values, int(name != "rank"))
              for name, values in together.items()}
    ranks = together["rank"][is_changed]
    return leaves | {"median_rank_where_changed": float(ranks.median()) if len(ranks) else None}


def text_losses(model: HybridLM, base: HybridLM, positions: Positions) -> dict[str, Leaf]:
    """Minus log p of the next token, the mean over random positions: its exp is a perplexity."""
    c = positions.config
    own = evals.measure_thoughts(model, positions, c.rlp.temperature, c.eval.samples)
    logp = {"base": evals.plain_logp(base, positions), "no thought": own["logp_plain"],
            "thought": own["logp"]}
    return {name: positions.leaf(-values) for name, values in logp.items()}


def gated(model: HybridLM, base: HybridLM, corpus: Corpus, config: Config
          ) -> dict[str, dict[str, Leaf]]:
    """A gate between the prediction without a thought, p_0, and after it, p_c, as Quiet-STaR's
    mixing head (arXiv 2403.09629), for a trained model that stays as it is:

        p = (1 - w) p_0 + w p_c,        w = sigmoid(a . [h_0, h_c] + b)

    h_0, h_c: the states that both are read from. a and b minimise -log p at random positions of
    training documents, of text and of computed ones alike; figures are of held-out ones."""
    kinds = {"text": evals.text_positions, "computed": evals.computed_positions}
    more = replace(config.eval, split="train", text_positions=4 * config.eval.text_positions)
    trained_on = replace(config, eval=more)
    seen = [both_ways(model, make(corpus, trained_on)) for make in kinds.values()]
    gate = fit_gate(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
    found = {}
    for kind, make in kinds.items():
        positions = make(corpus, config)
        state_RE, plain_R, thought_R = both_ways(model, positions)
        with torch.no_grad():
            logit_R = gate(state_RE)[:, 0]
        gain = {"thought": thought_R, "no thought": plain_R,
                "gated": mixed(logit_R, plain_R, thought_R), "weight": logit_R.sigmoid()}
        base_B = evals.plain_logp(base, positions)
        means = {name: values.view(len(base_B), -1).mean(1) for name, values in gain.items()}
        found[kind] = {name: positions.leaf(values - base_B * (name != "weight"))
                       for name, values in means.items()}
    return found


@torch.no_grad()
def both_ways(model: HybridLM, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """Of R sampled thoughts: the states without and after it, in a row, and log p of the target."""
    c, tokenizer, n, found = positions.config, positions.tokenizer, 32, []
    G = c.eval.samples
    own = evals.measure_thoughts(model, positions, c.rlp.temperature, G)
    for i, batch in enumerate(positions.batches(model, n)):
        tokens_RL = own["thought_BGL"][i * n : (i + 1) * n].flatten(0, 1).to(batch["ids_BT"].device)
        prefix = prefill(model, batch)
        hidden_RXD = states_after(model, batch, tokenizer, tokens_RL, prefix)
        target_RX = batch["target_BX"].repeat_interleave(G, dim=0)
        thought_R, _ = read_targets(model, hidden_RXD, target_RX, tokenizer.tags)
        h_0 = prefix.hidden_BD.repeat_interleave(G, dim=0)
        found.append([t.cpu() for t in (torch.cat([h_0, hidden_RXD[:, 0]], dim=-1), thought_R)])
    state_RE, thought_R = (torch.cat(parts) for parts in zip(*found, strict=True))
    return state_RE, own["logp_plain"].repeat_interleave(G), thought_R


def mixed(logit_R: Tensor, plain_R: Tensor, thought_R: Tensor) -> Tensor:
    """log((1 - w) p_0 + w p_c), w = sigmoid(logit)."""
    return torch.logaddexp(F.logsigmoid(-logit_R) + plain_R, F.logsigmoid(logit_R) + thought_R)


def fit_gate(state_RE: Tensor, plain_R: Tensor, thought_R: Tensor) -> nn.Linear:
    """a and b, from w = 1/2 everywhere; a is held small: 0.01 |a|^2 is added to the mean loss."""
    gate = nn.Linear(state_RE.shape[1], 1)
    nn.init.zeros_(gate.weight)
    nn.init.zeros_(gate.bias)
    optimizer = torch.optim.LBFGS(gate.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        nats = -mixed(gate(state_RE)[:, 0], plain_R, thought_R).mean()
        loss = nats + 0.01 * gate.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(loss)
    return gate


def write(runs: tyro.conf.Positional[tuple[Path, ...]], parts: tuple[Part, ...] = PARTS) -> None:
    """What is behind the figures of runs that think: controls.json in each run's folder.

    Args:
        runs: Folders of finished runs of rlp, rlvr, sft or cpt, whose base is still there.
        parts: Which parts of it; others that were measured before stay.
    """
    require(runs, "no run is named; give the folder of one")
    for run in runs:
        file = run / "controls.json"
        kept = read_figures(file) if file.exists() else {}
        write_figures(file, {**kept, **controls(run, parts)})
        print(f"wrote {file}")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 if refused."""
    return exit_code(lambda: tyro.cli(write, args=argv, prog="python -m tools.controls"))


if __name__ == "__main__":
    sys.exit(main())
