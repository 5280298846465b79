"""Held-out figures, each with its n and a 95 % interval.

Information gain is measured against four references, because one alone can flatter:

    frozen_base     the base that RLP started from, without a thought: the honest one
    ema             the teacher, without a thought: what training rewards
    own_no_think    the trained model itself, without a thought: high also when its no-think prediction has collapsed
    empty_thought   the trained model after `<think></think>`: what is left is due to the thought's content

Accuracy is that of the likeliest answer token after sampled thoughts, after the greedy thought, and
without a thought. Intervals treat problems (not thoughts) as the independent observations: mean +-
1.96 standard errors over problems.
"""

import dataclasses
import itertools
import math
import random
import time

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import selected_logp, token_logp
from model import HybridLM
from system.config import Config
from system.costs import count_parameters, part_cache_bytes, part_flops, sum_of_parts
from text.batches import collate_contexts, mixture, text_position
from text.corpus import Corpus
from text.problems import FAMILIES, Problem, held_out_problems
from thoughts import sample_thoughts, score_context


def evaluate_base(model: HybridLM, corpus: Corpus, config: Config) -> dict:
    """Held-out figures of a pretrained model."""
    problems = evaluate_problems(model, None, None, corpus, config)
    text = text_losses(model, corpus, config)
    return {
        "accuracy": {kind: {k: {"base": v} for k, v in fams.items()}
                     for kind, fams in problems["accuracy"].items()},
        "gain_nats": problems["gain_nats"],
        "forced_style": evaluate_forced_style(model, corpus, config),
        "loss_nats": {"no_think_text": {"base": interval(text)}},
    }


def evaluate_both(
    model: HybridLM, base: HybridLM, teacher: HybridLM | None, corpus: Corpus, config: Config
) -> dict:
    """Held-out figures before (`base`) and after (named by the mode, `rlp` or `cpt`)."""

    def side_by_side(before: dict, after: dict) -> dict:
        return {key: {"base": before[key], config.mode: after[key]} for key in after}

    after = evaluate_problems(model, base, teacher, corpus, config)
    before = evaluate_problems(base, base, None, corpus, config)
    loss_before, loss_after = (text_losses(m, corpus, config) for m in (base, model))
    return {
        "gain_nats": after["gain_nats"],
        "gain_nats_by_family": after["gain_nats_by_family"],
        "gain_nats_before": before["gain_nats"],
        "accuracy": {kind: side_by_side(before["accuracy"][kind], after["accuracy"][kind])
                     for kind in after["accuracy"]},
        "thought_tokens": side_by_side(before["thought_tokens"], after["thought_tokens"]),
        "closed": side_by_side(before["closed"], after["closed"]),
        "forced_style_base": evaluate_forced_style(base, corpus, config),
        "loss_nats": {
            "no_think_text": {"base": interval(loss_before), config.mode: interval(loss_after)},
            "no_think_text_change": interval((loss_after - loss_before) / loss_before.mean())},
        "text_positions": {config.mode: evaluate_text(model, base, teacher, corpus, config),
                           "base": evaluate_text(base, base, None, corpus, config)},
    }


PROBLEMS_AT_ONCE = 64  # or fewer, for their caches hold no more tokens than this:


TOKENS_AT_ONCE = 2**17


def together(most: int, n_tokens: int) -> int:
    """How many contexts to work on together, each of which takes n_tokens with its thoughts."""
    return max(1, min(most, TOKENS_AT_ONCE // n_tokens))


def interval(values: Tensor) -> dict[str, float | int]:
    """Mean, 95 % interval (normal approximation) and number of independent observations."""
    n = len(values)
    mean = float(values.double().mean())
    half = 1.96 * float(values.double().std()) / math.sqrt(n) if n > 1 else math.nan
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


@torch.no_grad()
def measure_thoughts(model: HybridLM, contexts: list[list[int]], targets: list[list[int]],
                     corpus: Corpus, config: Config, temperature: float, samples: int,
                     forced: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Sample thoughts for each context and score the target: per-context means over the samples.

    Args: forced: for each context, ids that its thoughts must begin with.
    Returns: logp (after the thought), correct, length, closed, logp_plain, correct_plain; all of
    shape [contexts].
    """
    tk, c = corpus.tokenizer, config.rlp
    generator = torch.Generator(next(model.parameters()).device).manual_seed(config.seed + 10_000)
    found: dict[str, list[Tensor]] = {}
    n = together(PROBLEMS_AT_ONCE, samples * (c.context_len + c.thought_len))
    for start in range(0, len(contexts), n):
        part = slice(start, start + n)
        batch = to_device(collate_contexts(tk, contexts[part], targets[part], c), model)
        begin = None
        if forced is not None:
            begin = (torch.stack(forced[part])
                     .to(batch["context_BT"].device)
                     .repeat_interleave(samples, dim=0))
        t = sample_thoughts(model, batch["context_BT"], batch["ids_BT"], batch["target_BX"],
                            tk.tags, tk.end, samples, c.thought_len, temperature, generator, begin)
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
def plain_logp(model: HybridLM, contexts: list[list[int]], targets: list[list[int]], corpus: Corpus,
               config: Config, empty_thought: bool = False) -> Tensor:
    """log p(target | context) without a thought, or after an empty one; shape [contexts]."""
    tk, parts = corpus.tokenizer, []
    if empty_thought:
        contexts = [[*c, tk.think, tk.close] for c in contexts]
    n = together(4 * PROBLEMS_AT_ONCE, config.rlp.context_len)
    for start in range(0, len(contexts), n):
        part = slice(start, start + n)
        batch = to_device(collate_contexts(tk, contexts[part], targets[part], config.rlp), model)
        logp_B, _, _ = score_context(
            model, batch["context_BT"], batch["ids_BT"], batch["target_BX"], tk.tags)
        parts.append(logp_B.cpu())
    return torch.cat(parts)


@torch.no_grad()
def text_losses(model: HybridLM, corpus: Corpus, config: Config, split: str = "test") -> Tensor:
    """Next-token loss in nats a token of held-out text, without thoughts: one mean per window of
    256 tokens."""
    rng, length = random.Random(f"text-{split}-{config.seed}"), 256
    device, begin = next(model.parameters()).device, corpus.tokenizer.begin
    losses = []
    for _ in range(max(2, config.eval.text_tokens // length)):
        window = torch.tensor(
            [[*begin, *corpus.text_window(rng, split, length + 1).tolist()]], device=device)
        hidden_BTD, _ = model(window[:, :-1])
        logits_BTV, target_BT = (model.logits(hidden_BTD[:, len(begin) :]),
                                 window[:, 1 + len(begin) :])
        losses.append(-token_logp(logits_BTV, target_BT, corpus.tokenizer.tags).mean().cpu())
    return torch.stack(losses)


def evaluate_problems(model: HybridLM, base: HybridLM | None, teacher: HybridLM | None,
                      corpus: Corpus, config: Config, split: str = "test") -> dict:
    """Gains, accuracies, thought length and share closed on held-out problems.

    Args: base, teacher: references for the gain; None leaves those gains out.
    Returns: gain_nats.REFERENCE, gain_nats_by_family.FAMILY (against the base), accuracy.KIND.{all,
    FAMILY}, thought_tokens, closed; leaves are those of `interval`.
    """
    problems = held_out_problems(
        split, config.eval.problems_per_family, config.seed, corpus.held_out_percent)
    contexts, targets = problem_contexts(problems, corpus)
    sampled = measure_thoughts(
        model, contexts, targets, corpus, config, config.rlp.temperature, config.eval.samples)
    greedy = measure_thoughts(model, contexts, targets, corpus, config, 0.0, 1)
    families = [p.family for p in problems]
    gain_nats = gains(model, base, teacher, sampled, contexts, targets, corpus, config)
    out = {
        "gain_nats": {name: interval(gain) for name, gain in gain_nats.items()},
        "accuracy": {"sampled": by_family(sampled["correct"], families),
                     "greedy": by_family(greedy["correct"], families),
                     "no_think": by_family(sampled["correct_plain"], families)},
        "thought_tokens": by_family(sampled["length"], families),
        "closed": by_family(sampled["closed"], families),
    }
    if base is not None:
        out["gain_nats_by_family"] = by_family(gain_nats["frozen_base"], families)
    return out


def evaluate_text(model: HybridLM, base: HybridLM | None, teacher: HybridLM | None, corpus: Corpus,
                  config: Config, split: str = "test") -> dict:
    """The same gains at uniformly random positions of ordinary held-out text."""
    rng = random.Random(f"text-positions-{split}-{config.seed}")
    pairs = [
        text_position(corpus, config.rlp, split, rng) for _ in range(config.eval.text_positions)]
    contexts, targets = [c for c, _ in pairs], [t for _, t in pairs]
    sampled = measure_thoughts(
        model, contexts, targets, corpus, config, config.rlp.temperature, config.eval.samples)
    gain_nats = gains(model, base, teacher, sampled, contexts, targets, corpus, config)
    return {"gain_nats": {name: interval(gain) for name, gain in gain_nats.items()},
            "thought_tokens": {"all": interval(sampled["length"])},
            "closed": {"all": interval(sampled["closed"])}}


def evaluate_forced_style(
    model: HybridLM, corpus: Corpus, config: Config, split: str = "test") -> dict:
    """Accuracy by temperature when every thought must begin with the first two tokens of the worked
    thought.

    What the model could do if it only chose to think in steps: part of RLP's gain is that choice,
    and only what lies beyond this is better thinking.
    """
    problems = held_out_problems(
        split, config.eval.problems_per_family, config.seed, corpus.held_out_percent)
    contexts, targets = problem_contexts(problems, corpus)
    forced = [torch.tensor(corpus.tokenizer.encode(p.thought)[:2]) for p in problems]
    families = [p.family for p in problems]
    out = {}
    for temperature in (0.0, 0.7, 1.0):
        m = measure_thoughts(model, contexts, targets, corpus, config, temperature, 1, forced)
        out[f"temperature_{temperature:g}"] = by_family(m["correct"], families)
    return out


def gains(model: HybridLM, base: HybridLM | None, teacher: HybridLM | None,
          sampled: dict[str, Tensor], contexts: list[list[int]], targets: list[list[int]],
          corpus: Corpus, config: Config) -> dict[str, Tensor]:
    """Gain of the sampled thoughts in nats, a value a context, against each reference (see the
    module's docstring)."""
    plain = {"own_no_think": sampled["logp_plain"],
             "empty_thought": plain_logp(model, contexts, targets, corpus, config, True)}
    if base is not None:
        plain["frozen_base"] = plain_logp(base, contexts, targets, corpus, config)
    if teacher is not None:
        plain["ema"] = plain_logp(teacher, contexts, targets, corpus, config)
    return {name: sampled["logp"] - logp for name, logp in plain.items()}


def problem_contexts(
    problems: list[Problem], corpus: Corpus) -> tuple[list[list[int]], list[list[int]]]:
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


# ----------------------------------------------------------------------------- models of many sizes


@torch.no_grad()
def evaluate_sizes(models: list[HybridLM], references: list[int], corpus: Corpus, config: Config,
                   split: str = "test") -> list[dict]:
    """Models of any size on the same held-out sequences of the training mixture, and on long texts.

    Half of the sequences are text and half are problems, weighted as training weighs them: see
    `stratified`.
    Args: models: the first is the parent; references: for each model the index of the one that it
    is compared with.
    Returns for each: loss_nats, also of text_ and problem_ sequences alone; difference_nats (from
    its reference, paired by sequence); loss_change (against the parent, relative, paired); kl_nats
    (KL from the parent); top1 (share of tokens where both find the same one likeliest);
    long_loss_nats (of text, at the positions that stage 1 never had).
    """
    n_rows, n_logits = (config.eval.elastic_rows // 2,
                        config.elastic.seq_len * models[0].config.vocab_size)
    at_once = max(1, min(16, 2**28 // n_logits))
    found: list[dict[str, dict[str, Tensor]]] = [{"text": {}, "problem": {}} for _ in models]
    for kind, text_share in (("text", 1.0), ("problem", 0.0)):
        alone = dataclasses.replace(
            config, data=dataclasses.replace(config.data, text_share=text_share))
        for step in range(-(-n_rows // at_once)):
            batch = to_device(
                mixture(corpus, alone, step, at_once, config.elastic.seq_len, split), models[0])
            inside_BT, wanted_BTV = (batch["targets_BT"] != -100).double(), None
            for model, parts in zip(models, found, strict=True):
                logp_BTV, loss_B = _logp_and_loss(model, batch)
                wanted_BTV = logp_BTV if wanted_BTV is None else wanted_BTV
                kl_BT = F.kl_div(logp_BTV, wanted_BTV, reduction="none", log_target=True).sum(-1)
                same_BT = (logp_BTV.argmax(-1) == wanted_BTV.argmax(-1)).double()
                rows = {"loss_nats": loss_B, "kl_nats": _row_mean(kl_BT, inside_BT),
                        "top1": _row_mean(same_BT, inside_BT)}
                for name, value in rows.items():
                    before = parts[kind].get(name)
                    parts[kind][name] = value if before is None else torch.cat([before, value])
    out, share = [], config.data.text_share
    parent_loss = stratified(
        found[0]["text"]["loss_nats"], found[0]["problem"]["loss_nats"], share)["mean"]
    for model, parts, reference in zip(models, found, references, strict=True):
        text, problem, other = parts["text"], parts["problem"], found[reference]
        figures = {name: stratified(text[name], problem[name], share) for name in text}
        figures |= {f"{kind}_loss_nats": interval(parts[kind]["loss_nats"]) for kind in parts}
        change, difference = (
            [(parts[kind]["loss_nats"] - theirs[kind]["loss_nats"]) / unit for kind in parts]
            for theirs, unit in ((found[0], parent_loss), (other, 1.0)))
        figures |= {"loss_change": stratified(*change, share),
                    "difference_nats": stratified(*difference, share)}
        out.append(
            {**figures, "long_loss_nats": interval(long_losses(model, corpus, config, split))})
    return out


def stratified(text: Tensor, problem: Tensor, text_share: float) -> dict[str, float | int]:
    """Mean of a mixture of two kinds of sequences from a sample of each, with its 95 % interval.

    mean = s m_text + (1 - s) m_problem; its variance is s^2 v_text / n_text + (1 - s)^2 v_problem /
    n_problem. A sequence of text costs five times as much as one of problems: in one sample their
    difference would drown all others.
    """
    parts = [(text_share, interval(text)), (1 - text_share, interval(problem))]
    mean = sum(w * i["mean"] for w, i in parts)
    half = math.sqrt(sum((w * (i["high"] - i["mean"])) ** 2 for w, i in parts))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(text) + len(problem)}


def _logp_and_loss(model: HybridLM, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all tokens everywhere, and the mean loss of each sequence."""
    hidden_BTD, _ = model(batch["tokens_BT"], ids_BT=batch["ids_BT"])
    logp_BTV, targets_BT = (torch.log_softmax(model.logits(hidden_BTD).float(), dim=-1),
                            batch["targets_BT"])
    loss_BT = -logp_BTV.gather(-1, targets_BT.clamp(min=0)[..., None])[..., 0]
    return logp_BTV, _row_mean(loss_BT, (targets_BT != -100).double())


def _row_mean(value_BT: Tensor, inside_BT: Tensor) -> Tensor:
    return ((value_BT * inside_BT).sum(1) / inside_BT.sum(1)).cpu()


@torch.no_grad()
def long_losses(model: HybridLM, corpus: Corpus, config: Config, split: str) -> Tensor:
    """Mean loss of each held-out text of elastic.long_len tokens, after its first
    elastic.seq_len."""
    c, device, losses = config.elastic, next(model.parameters()).device, []
    found = (d[i : i + c.long_len + 1]
             for d in corpus.documents[split]
             for i in range(0, len(d) - c.long_len, c.long_len))
    texts = list(itertools.islice(found, config.eval.elastic_rows))
    for start in range(0, len(texts), 4):
        tokens_BT = torch.stack([torch.from_numpy(t).long() for t in texts[start : start + 4]]).to(
            device)
        hidden_BTD, _ = model(tokens_BT[:, :-1])
        logp_BT = selected_logp(
            hidden_BTD[:, c.seq_len - 1 :], model.output_matrix, tokens_BT[:, c.seq_len :])
        losses.append(-logp_BT.mean(1).cpu())
    return torch.cat(losses) if losses else torch.full((2,), math.nan)


def size_facts(model: HybridLM, config: Config) -> dict[str, float]:
    """Parameters, bytes (of weights as they are here; of the caches of one sequence), FLOPs a
    token, tokens a second."""
    c = config.elastic
    batch = torch.zeros(8, c.seq_len, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        model(batch)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            model(batch)[0][0, 0, 0].item()
            times.append(time.perf_counter() - began)
    return {
        "parameters": count_parameters(model),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "cache_bytes": sum_of_parts(
            lambda kind, shape: part_cache_bytes(kind, shape, c.cost_len, 4), model.config),
        "flops_per_token": sum_of_parts(
            lambda kind, shape: part_flops(kind, shape, c.cost_len), model.config),
        "tokens_per_second": batch.numel() / sorted(times)[2],
    }


def family_bytes(model: HybridLM, router: torch.nn.Module, sizes: list[HybridLM]) -> dict[str, int]:
    """What a family takes, as one checkpoint with its router and as a checkpoint for each size:
    files, and memory.

    In memory the family is the full model, the router, and what the largest of its submodels does
    not share with it.
    """

    def file_bytes(*networks: torch.nn.Module) -> int:
        return sum(
            len(safetensors.torch.save({k: v.contiguous() for k, v in n.state_dict().items()}))
            for n in networks)

    def storage_bytes(*networks: torch.nn.Module) -> int:
        tensors = [t for n in networks for t in (*n.parameters(), *n.buffers())]
        return sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
        )

    return {
        "family_file": file_bytes(model, router),
        "separate_files": sum(file_bytes(s) for s in sizes),
        "family_memory": max(storage_bytes(model, router, s) for s in sizes),
        "separate_memory": sum(s.numel() * s.element_size() for m in sizes for s in m.parameters()),
        "router_parameters": count_parameters(router),
    }
