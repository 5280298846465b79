"""Held-out figures, each with its n and a 95 % interval.

Information gain is measured against four references, because one alone can flatter:

    frozen_base     the base that RLP started from, without a thought: the honest one
    ema             the teacher, without a thought: what training rewards
    own_no_think    the trained model itself, without a thought: high also when its no-think prediction has collapsed
    empty_thought   the trained model after `<think></think>`: what is left is due to the thought's content

Accuracy is that of the likeliest answer token after sampled thoughts, after the greedy thought, and without a thought.
Intervals treat problems (not thoughts) as the independent observations: mean +- 1.96 standard errors over problems.
"""

import math
import random

import torch
from torch import Tensor

from config import Config
from data import FAMILIES, Corpus, Problem, collate_contexts, held_out_problems, text_position
from generate import sample_thoughts, score_context
from kernels import token_logp
from model import HybridLM

PROBLEMS_AT_ONCE = 64


def interval(values: Tensor) -> dict[str, float | int]:
    """Mean, 95 % interval (normal approximation) and number of independent observations."""
    n = len(values)
    mean = float(values.double().mean())
    half = 1.96 * float(values.double().std()) / math.sqrt(n) if n > 1 else math.nan
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


@torch.no_grad()
def measure_thoughts(
    model: HybridLM,
    contexts: list[list[int]],
    targets: list[list[int]],
    corpus: Corpus,
    config: Config,
    temperature: float,
    samples: int,
    forced: list[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Sample thoughts for each context and score the target: per-context means over the samples.

    Args: forced: for each context, ids that its thoughts must begin with.
    Returns: logp (after the thought), correct, length, closed, logp_plain, correct_plain; all of shape [contexts].
    """
    tk, c = corpus.tokenizer, config.rlp
    generator = torch.Generator(next(model.parameters()).device).manual_seed(config.seed + 10_000)
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(contexts), PROBLEMS_AT_ONCE):
        part = slice(start, start + PROBLEMS_AT_ONCE)
        batch = to_device(collate_contexts(tk, contexts[part], targets[part], c), model)
        begin = None
        if forced is not None:
            begin = torch.stack(forced[part]).to(batch["context_BT"].device).repeat_interleave(samples, dim=0)
        t = sample_thoughts(model, batch["context_BT"], batch["ids_BT"], batch["target_BX"], tk.tags, tk.end, samples,
                            c.thought_len, temperature, generator, begin)  # fmt: skip
        target_RX = batch["target_BX"].repeat_interleave(samples, dim=0)
        by_row = {
            "logp": t.logp_target_R,
            "correct": (t.answer_RX == target_RX).all(-1).float(),
            "length": t.length_R.float(),
            "closed": t.closed_R.float(),
        }
        parts = {k: v.view(-1, samples).mean(dim=1) for k, v in by_row.items()}
        parts["logp_plain"] = t.logp_plain_B
        parts["correct_plain"] = (t.answer_plain_BX == batch["target_BX"]).all(-1).float()
        for k, v in parts.items():
            found.setdefault(k, []).append(v.cpu())
    return {k: torch.cat(v) for k, v in found.items()}


@torch.no_grad()
def plain_logp(
    model: HybridLM,
    contexts: list[list[int]],
    targets: list[list[int]],
    corpus: Corpus,
    config: Config,
    empty_thought: bool = False,
) -> Tensor:
    """log p(target | context) without a thought, or after an empty one; shape [contexts]."""
    tk, parts = corpus.tokenizer, []
    if empty_thought:
        contexts = [[*c, tk.think, tk.close] for c in contexts]
    for start in range(0, len(contexts), 4 * PROBLEMS_AT_ONCE):
        part = slice(start, start + 4 * PROBLEMS_AT_ONCE)
        batch = to_device(collate_contexts(tk, contexts[part], targets[part], config.rlp), model)
        logp_B, _, _ = score_context(model, batch["context_BT"], batch["ids_BT"], batch["target_BX"], tk.tags)
        parts.append(logp_B.cpu())
    return torch.cat(parts)


@torch.no_grad()
def text_losses(model: HybridLM, corpus: Corpus, config: Config, split: str = "test") -> Tensor:
    """Next-token loss in nats a token of held-out text, without thoughts: one mean per window of 256 tokens."""
    rng, length = random.Random(f"text-{split}-{config.seed}"), 256
    losses = []
    for _ in range(max(2, config.eval.text_tokens // length)):
        window = (
            torch.from_numpy(corpus.text_window(rng, split, length + 1)).long()[None].to(next(model.parameters()).device)
        )
        hidden_BTD, _ = model(window[:, :-1])
        losses.append(-token_logp(model.logits(hidden_BTD), window[:, 1:], corpus.tokenizer.tags).mean().cpu())
    return torch.stack(losses)


def evaluate_problems(
    model: HybridLM, base: HybridLM | None, teacher: HybridLM | None, corpus: Corpus, config: Config, split: str = "test"
) -> dict:
    """Gains, accuracies, thought length and share closed on held-out problems.

    Args: base, teacher: references for the gain; None leaves those gains out.
    Returns: gain_nats.REFERENCE, gain_nats_by_family.FAMILY (against the base), accuracy.KIND.{all, FAMILY},
    thought_tokens, closed; leaves are those of `interval`.
    """
    problems = held_out_problems(split, config.eval.problems_per_family, config.seed, corpus.held_out_percent)
    contexts, targets = problem_contexts(problems, corpus)
    sampled = measure_thoughts(model, contexts, targets, corpus, config, config.rlp.temperature, config.eval.samples)
    greedy = measure_thoughts(model, contexts, targets, corpus, config, 0.0, 1)
    families = [p.family for p in problems]
    gain_nats = gains(model, base, teacher, sampled, contexts, targets, corpus, config)
    out = {
        "gain_nats": {name: interval(gain) for name, gain in gain_nats.items()},
        "accuracy": {
            "sampled": by_family(sampled["correct"], families),
            "greedy": by_family(greedy["correct"], families),
            "no_think": by_family(sampled["correct_plain"], families),
        },
        "thought_tokens": by_family(sampled["length"], families),
        "closed": by_family(sampled["closed"], families),
    }
    if base is not None:
        out["gain_nats_by_family"] = by_family(gain_nats["frozen_base"], families)
    return out


def evaluate_text(
    model: HybridLM, base: HybridLM | None, teacher: HybridLM | None, corpus: Corpus, config: Config, split: str = "test"
) -> dict:
    """The same gains at uniformly random positions of ordinary held-out text."""
    rng = random.Random(f"text-positions-{split}-{config.seed}")
    pairs = [text_position(corpus, config.rlp, split, rng) for _ in range(config.eval.text_positions)]
    contexts, targets = [c for c, _ in pairs], [t for _, t in pairs]
    sampled = measure_thoughts(model, contexts, targets, corpus, config, config.rlp.temperature, config.eval.samples)
    gain_nats = gains(model, base, teacher, sampled, contexts, targets, corpus, config)
    return {
        "gain_nats": {name: interval(gain) for name, gain in gain_nats.items()},
        "thought_tokens": {"all": interval(sampled["length"])},
        "closed": {"all": interval(sampled["closed"])},
    }


def evaluate_forced_style(model: HybridLM, corpus: Corpus, config: Config, split: str = "test") -> dict:
    """Accuracy by temperature when every thought must begin with the first two tokens of the worked thought.

    What the model could do if it only chose to think in steps: part of RLP's gain is that choice, and only what lies
    beyond this is better thinking.
    """
    problems = held_out_problems(split, config.eval.problems_per_family, config.seed, corpus.held_out_percent)
    contexts, targets = problem_contexts(problems, corpus)
    forced = [torch.tensor(corpus.tokenizer.encode(p.thought)[:2]) for p in problems]
    families = [p.family for p in problems]
    out = {}
    for temperature in (0.0, 0.7, 1.0):
        m = measure_thoughts(model, contexts, targets, corpus, config, temperature, 1, forced)
        out[f"temperature_{temperature:g}"] = by_family(m["correct"], families)
    return out


def gains(
    model: HybridLM,
    base: HybridLM | None,
    teacher: HybridLM | None,
    sampled: dict[str, Tensor],
    contexts: list[list[int]],
    targets: list[list[int]],
    corpus: Corpus,
    config: Config,
) -> dict[str, Tensor]:
    """Gain of the sampled thoughts in nats, a value a context, against each reference (see the module's docstring)."""
    plain = {
        "own_no_think": sampled["logp_plain"],
        "empty_thought": plain_logp(model, contexts, targets, corpus, config, True),
    }
    if base is not None:
        plain["frozen_base"] = plain_logp(base, contexts, targets, corpus, config)
    if teacher is not None:
        plain["ema"] = plain_logp(teacher, contexts, targets, corpus, config)
    return {name: sampled["logp"] - logp for name, logp in plain.items()}


def problem_contexts(problems: list[Problem], corpus: Corpus) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts and of the answers."""
    encode = corpus.tokenizer.encode
    return [encode(p.prompt) for p in problems], [encode(p.answer) for p in problems]


def by_family(values: Tensor, families: list[str]) -> dict[str, dict]:
    """`interval` over all values and over each family's."""
    out = {"all": interval(values)}
    for family in FAMILIES:
        out[family] = interval(values[torch.tensor([f == family for f in families])])
    return out


def to_device(batch: dict[str, Tensor], model: HybridLM) -> dict[str, Tensor]:
    """The batch on the model's device."""
    device = next(model.parameters()).device
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}
