"""Held-out figures, each with its n and a 95 % interval.

Information gain is measured against five references, because one alone can flatter:

    frozen_base      the base that RLP started from, without a thought: the honest one
    ema              the teacher, without a thought: what training rewards
    own_no_think     the trained model, without a thought: high also if it forgot to predict so
    empty_thought    the trained model after `<think></think>`: what is left is the content's merit
    swapped_thought  the trained model after a thought that it had elsewhere: what is left is what a
                     thought owes to its own context

Accuracy is that of the likeliest answer after sampled thoughts, the greedy one, and none.

Problems are independent, thoughts on one of them are not; positions and windows of one document of
text are not either. So there are three intervals: `interval` of means over problems, `share` of
shares of right answers and the like, `over_documents` of means over text. Held-out documents of
text count alike, as far as they are long enough: else the two longest would be half of it. Elastic
draws windows of text as in training, longer documents more often, and counts each by itself: its
intervals of one seed are too narrow there, those over seeds are not.
"""

import itertools
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import selected_logp, token_logp, wide
from model import HybridLM
from nested import Widths, hand_over
from system import parallel
from system.config import N_VALIDATION, Config, ModelConfig
from system.costs import count_parameters, part_cache_bytes, part_flops, sum_of_parts
from text.batches import (
    Position,
    collate_contexts,
    computed_tokens,
    mixture,
    random_position,
    shares_of,
)
from text.computed import GENERATED, draw_computed
from text.corpus import Corpus
from text.documents import Documents
from text.problems import Problem
from text.tokenizer import Tokenizer
from thoughts import Sampling, prefill, sample_thoughts, score_context, score_thoughts

# How much is worked on together: tokens in caches, numbers in a tensor of logits.
TOKENS_AT_ONCE, LOGITS_AT_ONCE = 2**17, 2**28


def evaluate_base(model: HybridLM, corpus: Corpus, config: Config) -> dict:
    """Held-out figures of a pretrained model."""
    problems = problem_positions(corpus, config)
    found = evaluate_thoughts(model, problems, {})
    loss_nats = over_documents(*text_losses(model, corpus, config))
    return {
        "accuracy": side_by_side({"base": found["accuracy"]}), "gain_nats": found["gain_nats"],
        "forced_style": evaluate_forced_style(model, problems),
        "loss_nats": {"no_think_text": {"base": loss_nats}}}


def evaluate_both(model: HybridLM, base: HybridLM, teacher: HybridLM | None, corpus: Corpus,
                  config: Config) -> dict:
    """Held-out figures before (`base`) and after (named by the mode); one network
    after the other, for a device may not have room for all."""
    places = {"problems": problem_positions(corpus, config), "text": text_positions(corpus, config),
              "computed": computed_positions(corpus, config)}
    with visiting(base, config) as here:
        plain = {name: {"frozen_base": plain_logp(here, p)} for name, p in places.items()}
        of_base = {name: evaluate_thoughts(here, p, plain[name]) for name, p in places.items()}
        forced_style = evaluate_forced_style(here, places["problems"])
        loss_before, documents = text_losses(here, corpus, config)
    if teacher is not None:
        with visiting(teacher, config) as here:
            for name, p in places.items():
                plain[name]["ema"] = plain_logp(here, p)
    with visiting(model, config) as here:
        of_model = {name: evaluate_thoughts(here, p, plain[name]) for name, p in places.items()}
        loss_after, _ = text_losses(here, corpus, config)
    before, after = of_base.pop("problems"), of_model.pop("problems")
    change = (loss_after - loss_before) / loss_before.mean()
    return {
        "gain_nats": after["gain_nats"], "gain_nats_by_kind": after["gain_nats_by_kind"],
        "gain_nats_before": before["gain_nats"],
        **{key: side_by_side({"base": before[key], config.mode: after[key]})
           for key in ("accuracy", "thought_tokens", "closed", "share_not_empty")},
        "forced_style_base": forced_style,
        "loss_nats": {
            "no_think_text": {"base": over_documents(loss_before, documents),
                              config.mode: over_documents(loss_after, documents)},
            "no_think_text_change": over_documents(change, documents)},
        "positions": {name: {config.mode: of_model[name], "base": of_base[name]}
                      for name in of_base}}


Leaf = dict[str, float | int]  # mean, low and high of its 95 % interval, n; n_documents of text


def interval(values: Tensor) -> Leaf:
    """Mean of independent observations, and its interval: mean +- 1.96 standard errors."""
    n, mean = len(values), float(values.double().mean())
    half = 1.96 * float(values.double().std()) / math.sqrt(n) if n > 1 else math.nan
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def share(values: Tensor, samples: int = 1, documents: Tensor | None = None) -> Leaf:
    """Mean of values in [0, 1], each itself the share of so many samples, and Wilson's interval:

        (p + z^2 / 2m +- z sqrt(p (1 - p) / m + z^2 / 4m^2)) / (1 + z^2 / m),        z = 1.96

    It stays in [0, 1], and is never of width 0 (E. B. Wilson 1927). m = p (1 - p) / v is how many
    independent yes-or-no trials would leave p the variance v that it has between the values, or the
    documents where they are given (the effective sample size of surveys; Korn and Graubard 1998):
    n for one sample each, at most n times samples. Where all values are 0 or all are 1, it is n,
    or n^2 / (sum over documents of n_d^2).
    """
    n, p = len(values), float(values.double().mean())
    of_value = np.arange(n) if documents is None else _numbered(documents)
    off = np.bincount(of_value, weights=values.double().numpy() - p)
    variance = (off**2).sum() / n**2
    if 0 < p < 1:
        m = min(n * samples, p * (1 - p) / variance if variance else math.inf)
    else:
        m = n**2 / (np.bincount(of_value) ** 2).sum()
    z2_m = 1.96**2 / m
    middle = (p + z2_m / 2) / (1 + z2_m)
    half = math.sqrt(z2_m * p * (1 - p) + z2_m**2 / 4) / (1 + z2_m)
    # However it is rounded, 0 and 1 are inside.
    low, high = min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))
    leaf = {"mean": p, "low": low, "high": high, "n": n}
    return leaf if documents is None else {**leaf, "n_documents": len(documents.unique())}


def over_documents(values: Tensor, documents: Tensor) -> Leaf:
    """Mean over positions or windows of text, and its interval by a bootstrap over documents.

    Of N documents N - 1 are drawn, with replacement, 2,000 times: so few, and the variance is
    unbiased (Rao and Wu 1988). Low and high are the quantiles .025 and .975 of the means.
    """
    leaf = {"mean": float(values.double().mean()), "low": math.nan, "high": math.nan,
            "n": len(values), "n_documents": len(documents.unique())}
    if (N := leaf["n_documents"]) > 1:
        of_value = _numbered(documents)
        total, n = np.bincount(of_value, values.double().numpy()), np.bincount(of_value)
        times = np.random.default_rng(0).multinomial(N - 1, np.full(N, 1 / N), size=2000)
        low, high = np.quantile((times @ total) / (times @ n), [0.025, 0.975])
        leaf |= {"low": float(low), "high": float(high)}
    return leaf


def _numbered(documents: Tensor) -> np.ndarray:
    """The document of each value, counted from 0."""
    return documents.unique(return_inverse=True)[1].numpy()


def side_by_side(trees: dict[str, dict]) -> dict:
    """Trees of equal shape as one, in whose leaves their intervals stand by the trees' names."""
    first = next(iter(trees.values()))
    if "mean" in first:
        return trees
    return {key: side_by_side({name: tree[key] for name, tree in trees.items()}) for key in first}


# ------------------------------------------------------------------- thoughts at held-out positions


class Positions(NamedTuple):
    """Held-out contexts, the tokens that follow each, and how they are read."""

    places: list[Position]
    tokenizer: Tokenizer
    config: Config
    kinds: list[str]  # by which figures are told apart: the family of each problem, for example
    documents: Tensor | None = None  # the document of each; None for problems: one each
    problems: list[Problem] = []  # whose they are; empty if they are of text

    def batches(self, model: HybridLM, n: int) -> Iterator[dict[str, Tensor]]:
        """n positions at a time, on the model's device (see `collate_contexts`)."""
        for i in range(0, len(self.places), n):
            batch = collate_contexts(self.tokenizer, self.places[i : i + n], self.config.rlp)
            yield to_device(batch, model)

    def leaf(self, values: Tensor, samples: int = 0, kind: str | None = None) -> Leaf:
        """The mean over all positions, or those of a kind, with the interval that is right for it.
        samples: the values are shares of so many yes-or-no answers; 0 if they are no shares."""
        rows = [i for i, own in enumerate(self.kinds) if kind in (None, own)]
        values = values[rows]
        documents = None if self.documents is None else self.documents[rows]
        if samples:
            return share(values, samples, documents)
        return interval(values) if documents is None else over_documents(values, documents)

    def by_kind(self, values: Tensor, samples: int = 0) -> dict[str, Leaf]:
        """`leaf` over all positions, and over those of each kind."""
        kinds = dict.fromkeys(self.kinds)
        return {"all": self.leaf(values, samples),
                **{kind: self.leaf(values, samples, kind) for kind in kinds}}

    def right(self, said_RX: Tensor, target_BX: Tensor, first: int) -> Tensor:
        """Whether each answer is right: 1 if the likeliest tokens are the target, or if the
        problem's own scorer accepts them up to the first that differs: so far the model would write
        them. first: the index of the first position."""
        G = len(said_RX) // len(target_BX)
        same_RX = said_RX == target_BX.repeat_interleave(G, dim=0)
        right_R = same_RX.all(-1)
        for r in (~right_R).nonzero()[:, 0].tolist() if self.problems else []:
            if scorer := self.problems[first + r // G].scorer:
                said = said_RX[r, : int(same_RX[r].int().argmin()) + 1].tolist()
                said = [token for token in said if token not in self.tokenizer.ends]
                right_R[r] = scorer(self.tokenizer.decode(said).strip()) >= 1
        return right_R.float()


def problem_positions(corpus: Corpus, config: Config) -> Positions:
    """At the answers of held-out problems."""
    c, encode = config.eval, corpus.tokenizer.encode
    problems = corpus.held_out(c.split, c.problems_per_family, config.seed)
    places = [Position(encode(p.prompt), encode(p.answer)) for p in problems]
    families = [p.family for p in problems]
    return Positions(places, corpus.tokenizer, config, families, problems=problems)


def validate(model: HybridLM, corpus: Corpus, config: Config, most: int = N_VALIDATION
             ) -> dict[str, float]:
    """Accuracy of greedy thoughts by family, on validation problems, and not more than for figures.
    """
    n = min(most, config.eval.problems_per_family)
    config = replace(config, eval=replace(config.eval, problems_per_family=n, split="val"))
    positions = problem_positions(corpus, config)
    correct = positions.by_kind(measure_thoughts(model, positions, 0.0, 1)["correct"], 1)
    return {family: leaf["mean"] for family, leaf in correct.items() if family != "all"}


def text_positions(corpus: Corpus, config: Config) -> Positions:
    """Random positions of held-out documents; `repeats` where the last two tokens of the context
    stand in it before: there it may say what comes next."""
    fit, rng = config.rlp, random.Random(f"text-positions-{config.eval.split}-{config.seed}")
    places, kinds, documents = [], [], corpus.documents[config.eval.split]
    chosen = deal(documents, config.eval.text_positions, rng)
    for i in chosen:
        places.append(random_position(documents[i].tolist(), fit, rng))
        context = places[-1].context[-fit.context_len :]
        earlier = itertools.pairwise(context[:-1])
        kinds.append("repeats" if tuple(context[-2:]) in earlier else "no_repeat")
    return Positions(places, corpus.tokenizer, config, kinds, torch.tensor(chosen))


def computed_positions(corpus: Corpus, config: Config) -> Positions:
    """Random positions of held-out documents with results to be computed, a document each."""
    fit, split = config.rlp, config.eval.split
    rng = random.Random(f"computed-positions-{split}-{config.seed}")
    places, kinds, documents = [], [], {}
    while len(places) < config.eval.text_positions:
        kind = list(GENERATED)[len(places) % len(GENERATED)]
        found = draw_computed(rng, split, corpus.held_out_percent, kind)
        if found.canonical not in documents:
            documents[found.canonical] = len(documents)
            document, _ = computed_tokens(corpus.tokenizer, found)
            places.append(random_position(document, fit, rng))
            kinds.append(kind)
    return Positions(places, corpus.tokenizer, config, kinds, torch.arange(len(places)))


def deal(documents: Documents, n: int, rng: random.Random, least: int = 2) -> list[int]:
    """n times the index of a document of at least so many tokens: each equally often, as nearly as
    can be. Empty if there is none."""
    lengths = np.concatenate([np.diff(starts) for _, starts in documents.parts])
    fit = np.flatnonzero(lengths >= least)
    order = [int(fit[k]) for k in rng.sample(range(len(fit)), min(n, len(fit)))]
    return list(itertools.islice(itertools.cycle(order), n))


def together(most: int, each: int, limit: int) -> int:
    """How many to work on together: at most `most`, and as many as `limit` holds of `each`."""
    return max(1, min(most, limit // each))


def evaluate_thoughts(model: HybridLM, positions: Positions, plain: dict[str, Tensor]) -> dict:
    """Gains, lengths, shares closed and not empty of sampled thoughts; at problems accuracies too.

    Args: plain: log p(target | context) by each network to compare with, without a thought.
    Returns: gain_nats.REFERENCE (leaves) and, with a base, gain_nats_by_kind against it;
    thought_tokens, closed, share_not_empty; at problems accuracy.HOW (leaves by kind).
    """
    c, n = positions.config, positions.config.eval.samples
    sampled = measure_thoughts(model, positions, c.rlp.temperature, n)
    thought_BGL, close = sampled["thought_BGL"], positions.tokenizer.close
    empty_BGL = torch.full_like(thought_BGL[:, :1, :1], close)
    plain = {"own_no_think": sampled["logp_plain"],
             "empty_thought": logp_after(model, positions, empty_BGL),
             "swapped_thought": logp_after(model, positions, swapped(thought_BGL, c.seed)), **plain}
    gain_nats = {name: sampled["logp"] - logp for name, logp in plain.items()}
    out = {"gain_nats": {name: positions.leaf(gain) for name, gain in gain_nats.items()},
           "thought_tokens": positions.by_kind(sampled["length"]),
           "closed": positions.by_kind(sampled["closed"], n),
           "share_not_empty": positions.by_kind(sampled["not_empty"], n)}
    if "frozen_base" in plain:
        out["gain_nats_by_kind"] = positions.by_kind(gain_nats["frozen_base"])
    if positions.problems:
        greedy = measure_thoughts(model, positions, 0.0, 1)
        out["accuracy"] = {"sampled": positions.by_kind(sampled["correct"], n),
                           "greedy": positions.by_kind(greedy["correct"], 1),
                           "no_think": positions.by_kind(sampled["correct_plain"], 1)}
    return out


def evaluate_forced_style(model: HybridLM, positions: Positions) -> dict:
    """Accuracy by temperature if every thought must begin as the problem's worked thought does.
    Part of RLP's gain is the choice to think in steps: only accuracy beyond is better thinking.
    Of problems with a worked thought of two tokens or more; nothing if there are none."""
    begins = [positions.tokenizer.encode(p.thought or "")[:2] for p in positions.problems]
    rows = [i for i, begin in enumerate(begins) if len(begin) > 1]
    if not rows:
        return {}
    positions = positions._replace(**{name: [getattr(positions, name)[i] for i in rows]
                                      for name in ("places", "kinds", "problems")})
    forced_Bl = torch.tensor([begins[i] for i in rows])
    found = {f"temperature_{t:g}": measure_thoughts(model, positions, t, 1, forced_Bl)["correct"]
             for t in (0.0, 0.7, 1.0)}
    return {name: positions.by_kind(correct, 1) for name, correct in found.items()}


def measure_thoughts(model: HybridLM, positions: Positions, temperature: float, samples: int,
                     forced_Bl: Tensor | None = None) -> dict[str, Tensor]:
    """Sample thoughts at each position, score its target, take means over the samples. Args:
    forced_Bl: tokens that a position's thoughts must begin with. Returns a value a position: logp
    (after the thought), correct, length, closed, not_empty, logp_plain, correct_plain; and the
    thoughts, thought_BGL, filled up with closing tags."""
    c, close = positions.config, positions.tokenizer.close
    generator = torch.Generator(parallel.device_of(model)).manual_seed(c.seed + 10_000)
    sampling = Sampling(samples, c.rlp.thought_len, temperature)
    n = together(64, samples * (c.rlp.context_len + c.rlp.thought_len), TOKENS_AT_ONCE)
    found = []
    for i, batch in enumerate(positions.batches(model, n)):
        begin = None if forced_Bl is None else (
            forced_Bl[i * n : (i + 1) * n].repeat_interleave(samples, dim=0).to(generator.device))
        t = sample_thoughts(model, batch, positions.tokenizer, sampling, generator, begin)
        target_BX = batch["target_BX"]
        of_thoughts = {"logp": t.logp_target_R,
                       "correct": positions.right(t.answer_RX, target_BX, i * n),
                       "length": t.length_R.float(), "closed": t.closed_R.float(),
                       "not_empty": (t.tokens_RL[:, 0] != close).float()}
        means = {name: v.view(-1, samples).mean(dim=1) for name, v in of_thoughts.items()}
        padded_RL = F.pad(t.tokens_RL, (0, c.rlp.thought_len - t.tokens_RL.shape[1]), value=close)
        found.append({**means, "logp_plain": t.logp_plain_B,
                      "correct_plain": positions.right(t.answer_plain_BX, target_BX, i * n),
                      "thought_BGL": padded_RL.unflatten(0, (-1, samples))})
    return {name: torch.cat([part[name] for part in found]).cpu() for name in found[0]}


def plain_logp(model: HybridLM, positions: Positions) -> Tensor:
    """log p(target | context) without a thought: a value a position."""
    n = together(256, positions.config.rlp.context_len, TOKENS_AT_ONCE)
    return torch.cat([score_context(model, batch, positions.tokenizer.tags)[0].cpu()
                      for batch in positions.batches(model, n)])


@torch.no_grad()
def logp_after(model: HybridLM, positions: Positions, thought_BGL: Tensor) -> Tensor:
    """log p(target | context, thought), the mean over the G thoughts given for each position."""
    c, (_, G, L), found = positions.config.rlp, thought_BGL.shape, []
    n = together(64, G * (c.context_len + L), TOKENS_AT_ONCE)
    for i, batch in enumerate(positions.batches(model, n)):
        tokens_RL = thought_BGL[i * n : (i + 1) * n].flatten(0, 1).to(batch["context_BT"].device)
        logp_R, _ = score_thoughts(model, batch, positions.tokenizer, tokens_RL)
        found.append(logp_R.view(-1, G).mean(dim=1).cpu())
    return torch.cat(found)


def swapped(thought_BGL: Tensor, seed: int) -> Tensor:
    """The thoughts of each position moved to another one: along one random ring of them all."""
    ring = torch.randperm(len(thought_BGL), generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(thought_BGL).index_copy(0, ring, thought_BGL[ring.roll(1)])


def text_windows(documents: Documents, n: int, length: int, rng: random.Random, least: int = 2
                 ) -> list[tuple[int, np.ndarray]]:
    """At most n windows of length + 1 tokens that have no target in common, with the index of their
    document: of each document as many, if it is so long. One that is shorter, and has at least
    `least` tokens, is a window itself."""
    found = []
    for i, most in Counter(deal(documents, n, rng, least)).items():
        document = documents[i]
        starts = range(0, max(1, len(document) - length), length)
        found += [(i, document[start : start + length + 1])
                  for start in rng.sample(starts, min(most, len(starts)))]
    return found


@torch.no_grad()
def text_losses(model: HybridLM, corpus: Corpus, config: Config) -> tuple[Tensor, Tensor]:
    """Next-token loss of held-out text without thoughts, in nats: the mean of each window of 256
    tokens, at least two windows; and the document of each."""
    split, length, begin = config.eval.split, 256, corpus.tokenizer.begin
    rng = random.Random(f"text-{split}-{config.seed}")
    n, losses = max(2, config.eval.text_tokens // length), []
    windows = text_windows(corpus.documents[split], n, length, rng)
    for _, window in windows:
        tokens_BT = torch.tensor([[*begin, *window]], device=parallel.device_of(model))
        hidden_BTD, _ = model(tokens_BT[:, :-1])
        logits = model.logits(hidden_BTD[:, len(begin) :])
        logp = token_logp(logits, tokens_BT[:, len(begin) + 1 :], corpus.tokenizer.tags)
        losses.append(-logp.mean().cpu())
    return torch.stack(losses), torch.tensor([i for i, _ in windows])


def visiting(network: HybridLM, config: Config) -> AbstractContextManager[HybridLM]:
    """Inside, the network on this process's device (`parallel.visiting`): in fp32, but what was
    sharded in the run's dtype."""
    return parallel.visiting(network, config.parallel.dtype == "bf16")


def to_device(batch: dict[str, Tensor], model: HybridLM) -> dict[str, Tensor]:
    """The batch on the model's device."""
    return {k: v.to(parallel.device_of(model), non_blocking=True) for k, v in batch.items()}


# ----------------------------------------------------------------------------- models of many sizes


def evaluate_sizes(models: list[HybridLM], references: list[int], corpus: Corpus,
                   config: Config) -> list[dict]:
    """Models of any size on the same held-out sequences: of each kind of documents as many.

    Args: models: the first is the parent; references: the index of what each is compared with.
    Returns for each, weighted as training weighs the kinds (see `stratified`): loss_nats, also as
    KIND_loss_nats; difference_nats (from its reference, paired by sequence); loss_change (against
    the parent, relative, paired); kl_nats (from the parent); top1 (share of tokens where both find
    the same one likeliest); long_loss_nats (see `long_losses`), if there are texts so long.
    """
    seq_len, shares = config.elastic.seq_len, shares_of(config)
    n = together(16, seq_len * models[0].config.vocab_size, LOGITS_AT_ONCE)
    n_batches = math.ceil(config.eval.elastic_rows / len(shares) / n)
    kinds = {}
    for kind in shares:
        alone = replace(
            config, data=replace(config.data, text_share=float(kind == "text")),
            warmup=replace(config.warmup, computed_share=float(kind == "computed")))
        made = [mixture(corpus, alone, i, n, seq_len, config.eval.split) for i in range(n_batches)]
        kinds[kind] = compare_all(models, made, config)
    # By model, name and kind: a value for each sequence.
    found = [{name: {kind: torch.cat([figures[name] for figures in own[m]])
                     for kind, own in kinds.items()}
              for name in next(iter(kinds.values()))[m][0]} for m in range(len(models))]
    parent, out = found[0]["loss_nats"], []
    parent_loss = stratified(parent, shares)["mean"]
    for model, figures, reference in zip(models, found, references, strict=True):
        loss, other = figures["loss_nats"], found[reference]["loss_nats"]
        figures["loss_change"] = {k: (loss[k] - parent[k]) / parent_loss for k in shares}
        figures["difference_nats"] = {k: loss[k] - other[k] for k in shares}
        with visiting(model, config) as here:
            long = long_losses(here, corpus, config)
        out.append({name: stratified(by_kind, shares) for name, by_kind in figures.items()} | {
            **{f"{kind}_loss_nats": interval(values) for kind, values in loss.items()},
            **({"long_loss_nats": over_documents(*long)} if len(long[0]) else {})})
    return out


def size_accuracies(models: list[HybridLM], corpus: Corpus, config: Config) -> list[dict]:
    """Models of any size on the same held-out problems, by family: accuracy.sampled and .greedy, of
    sampled and of the likeliest thoughts; and of the latter `mcnemar` against the first model."""
    positions, n = problem_positions(corpus, config), config.eval.samples
    sampled, greedy = [], []
    for model in models:
        with visiting(model, config) as here:
            for found, *how in ((sampled, config.rlp.temperature, n), (greedy, 0.0, 1)):
                found.append(measure_thoughts(here, positions, *how)["correct"])
    return [{"accuracy": {"sampled": positions.by_kind(s, n), "greedy": positions.by_kind(g, 1)},
             "mcnemar": mcnemar(greedy[0], g)} for s, g in zip(sampled, greedy, strict=True)]


def mcnemar(first: Tensor, second: Tensor) -> dict[str, float | int]:
    """McNemar's exact test of two models on the same problems (Q. McNemar 1947): of those that one
    alone has right, how many each; and p, the two-sided probability of a split as uneven as this by
    chance."""
    won, lost = int((second > first).sum()), int((second < first).sum())
    tail = sum(math.comb(won + lost, i) for i in range(min(won, lost) + 1))
    return {"won": won, "lost": lost, "p": min(1.0, 2 * tail / 2 ** (won + lost))}


def compare_all(models: list[HybridLM], batches: list[dict[str, Tensor]], config: Config
                ) -> list[list[dict[str, Tensor]]]:
    """By model and batch, what `compare` finds: of all models at once, or where they wait in host
    memory, of each beside the first."""
    found, at_once = [], 1 if parallel.waits(models[0]) else len(models)
    with visiting(models[0], config) as parent:
        for i in range(1, max(2, len(models)), at_once):
            with ExitStack() as stack:
                here = [stack.enter_context(visiting(m, config)) for m in models[i : i + at_once]]
                by_batch = [compare([parent, *here], to_device(b, parent)) for b in batches]
                found += list(zip(*by_batch, strict=True))[bool(found) :]
    return found


@torch.no_grad()
def compare(models: list[HybridLM], batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """For each model loss_nats, and kl_nats and top1 against the first one: a value a sequence."""
    inside_BT, wanted_BTV, found = (batch["targets_BT"] != -100).double(), None, []
    for model in models:
        logp_BTV, loss_B = _logp_and_loss(model, batch)
        wanted_BTV = logp_BTV if wanted_BTV is None else wanted_BTV
        kl_BT = F.kl_div(logp_BTV, wanted_BTV, reduction="none", log_target=True).sum(-1)
        same_BT = (logp_BTV.argmax(-1) == wanted_BTV.argmax(-1)).double()
        found.append({"loss_nats": loss_B, "kl_nats": _row_mean(kl_BT, inside_BT),
                      "top1": _row_mean(same_BT, inside_BT)})
    return found


def stratified(values: dict[str, Tensor], shares: dict[str, float]) -> dict[str, float | int]:
    """Mean of a mixture of kinds of sequences from a sample of each, with its 95 % interval.

    m is the sum of s_k m_k over the kinds, with their shares s_k; its variance that of s_k^2 v_k /
    n_k. Text costs five times as many nats: in one sample that would drown all differences.
    """
    parts = [(shares[kind], interval(own)) for kind, own in values.items()]
    mean = sum(w * i["mean"] for w, i in parts)
    half = math.sqrt(sum((w * (i["high"] - i["mean"])) ** 2 for w, i in parts))
    n = sum(i["n"] for _, i in parts)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def _logp_and_loss(model: HybridLM, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all tokens everywhere, and the mean loss of each sequence."""
    targets_BT = batch["targets_BT"]
    hidden_BTD, _ = model(batch["tokens_BT"], ids_BT=batch["ids_BT"])
    logp_BTV = torch.log_softmax(wide(model.logits(hidden_BTD)), dim=-1)
    loss_BT = -logp_BTV.gather(-1, targets_BT.clamp(min=0)[..., None])[..., 0]
    return logp_BTV, _row_mean(loss_BT, (targets_BT != -100).double())


def _row_mean(value_BT: Tensor, inside_BT: Tensor) -> Tensor:
    return ((value_BT * inside_BT).sum(1) / inside_BT.sum(1)).cpu()


@torch.no_grad()
def long_losses(model: HybridLM, corpus: Corpus, config: Config) -> tuple[Tensor, Tensor]:
    """Mean loss of each held-out text of long_len tokens, at positions that stage 1 never had; and
    the document of each."""
    c, device, losses = config.elastic, parallel.device_of(model), []
    split, n = config.eval.split, config.eval.elastic_rows
    rng = random.Random(f"long-{split}-{config.seed}")
    texts = []
    if c.long_len > c.seq_len:
        texts = text_windows(corpus.documents[split], n, c.long_len, rng, least=c.long_len + 1)
    for i in range(0, len(texts), 4):
        window = np.stack([tokens for _, tokens in texts[i : i + 4]])
        tokens_BT = torch.from_numpy(window).long().to(device)
        hidden_BTD = model(tokens_BT[:, :-1])[0][:, c.seq_len - 1 :]
        logp_BT = selected_logp(hidden_BTD, model.output_matrix, tokens_BT[:, c.seq_len :])
        losses.append(-logp_BT.mean(1).cpu())
    return torch.cat(losses) if losses else torch.empty(0), torch.tensor([i for i, _ in texts])


@torch.no_grad()
def handed_over(models: list[HybridLM], widths: list[Widths], family: ModelConfig, corpus: Corpus,
                config: Config) -> list[dict]:
    """Held-out problems that one size has read and another thinks about and answers, from states
    that were handed over (nested.hand_over), for all pairs of sizes that keep the same layers.

    Returns for each the budgets of both, `read` and `goes_on`; own and handed, the accuracies of
    the likeliest thought if the size has read the problem itself, and if not; more_nats, how much
    more -log p of the answer is then, paired by problem."""
    positions, L = problem_positions(corpus, config), config.rlp.thought_len
    n = together(64, config.rlp.context_len + L, TOKENS_AT_ONCE)
    kept = [[bool(w) for w in own.layers] for own in widths]
    pairs = [(a, b) for a in range(len(models)) for b in range(len(models)) if kept[a] == kept[b]]
    right, logp = defaultdict(list), defaultdict(list)
    for i, batch in enumerate(positions.batches(models[0], n)):
        read = [prefill(model, batch) for model in models]
        for a, b in pairs:
            cache = hand_over(read[a].cache, family, widths[a], widths[b])
            prefix = read[b]._replace(cache=cache, early=cache)
            t = sample_thoughts(models[b], batch, corpus.tokenizer, Sampling(1, L, 0.0),
                                prefix=prefix)
            right[a, b].append(positions.right(t.answer_RX, batch["target_BX"], i * n).cpu())
            logp[a, b].append(t.logp_target_R.cpu())
    found, budgets = [], config.elastic.budgets
    for a, b in pairs:
        own, handed = (torch.cat(right[reader, b]) for reader in (b, a))
        less = torch.cat(logp[b, b]) - torch.cat(logp[a, b])
        if a != b:
            found.append({"read": budgets[a], "goes_on": budgets[b], "own": positions.leaf(own, 1),
                          "handed": positions.leaf(handed, 1), "more_nats": positions.leaf(less)})
    return found


def size_facts(model: HybridLM, config: Config) -> dict[str, float]:
    """Parameters, bytes of weights and of a sequence's caches, FLOPs a token, tokens a second."""
    c = config.elastic
    batch = torch.zeros(8, c.seq_len, dtype=torch.long, device=parallel.team.device)
    with visiting(model, config) as here, torch.no_grad():
        here(batch)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            here(batch)[0][0, 0, 0].item()
            times.append(time.perf_counter() - began)
    shape, n = model.config, c.cost_len
    return {
        "parameters": count_parameters(model),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "cache_bytes": sum_of_parts(lambda kind, s: part_cache_bytes(kind, s, n, 4), shape),
        "flops_per_token": sum_of_parts(lambda kind, s: part_flops(kind, s, n), shape),
        "tokens_per_second": batch.numel() / sorted(times)[2]}


def family_bytes(model: HybridLM, router: torch.nn.Module, sizes: list[HybridLM]) -> dict[str, int]:
    """What a family takes as one checkpoint with its router, and as one checkpoint a size. Its
    memory is the full model, the router, and what the largest submodel does not share."""

    def file_bytes(*networks: torch.nn.Module) -> int:
        states = [{k: v.contiguous() for k, v in n.state_dict().items()} for n in networks]
        return sum(len(safetensors.torch.save(state)) for state in states)

    def storage_bytes(*networks: torch.nn.Module) -> int:
        storages = [t.untyped_storage() for n in networks for t in (*n.parameters(), *n.buffers())]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    return {
        "family_file": file_bytes(model, router),
        "separate_files": sum(file_bytes(s) for s in sizes),
        "family_memory": max(storage_bytes(model, router, s) for s in sizes),
        "separate_memory": sum(p.numel() * p.element_size() for s in sizes for p in s.parameters()),
        "router_parameters": count_parameters(router)}
