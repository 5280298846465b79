"""What a run would take, before it runs: FLOPs and tokens of a step, memory of a GPU. Arithmetic on
shapes; no weights.

With f(t) the FLOPs of a forward pass per token (`model.part_flops`: two per weight of a matrix, and
what attention and the scan add at length t), a backward pass is 2 f, so a training step costs 3 f
per token:

    pretrain, cpt   3 f
    rlp             rollout: the context once and G thoughts of M tokens from its cache, 1 f each
                    scoring: the teacher on the context, and the closing tag and the targets after every thought, 1 f
                    policy:  the context once and the G thoughts from its cache, 3 f, for every inner epoch
    elastic         the parent 1 f, the full model as a teacher of smaller budgets 1 f; student 3 f of the model of each
                    budget, weighted by how often it is drawn; the full model for every budget while routers search on masks

A token that goes on from a cache of T tokens sees T more positions than one that begins; contexts
and thoughts count at their full length, an upper bound. Not counted: optimizer, norms and
activation functions, the logits that losses make twice, and held-out evaluation.

Memory counts what stays between steps in fp32 (weights, gradients, optimizer, moving averages and
frozen copies), divided among the GPUs but for elastic's parent, and what a step needs: whole
weights, layers that are gathered from the other GPUs, caches, and activations as the reference
forms of kernels.py keep them for the backward pass (fused kernels keep less). That is in bf16, but
for the whole weights and gradients on which Elastic works. A step of RLP needs its rollouts' part
or its update's, whichever is larger. A run in fp32 takes twice the activations. Not counted: copies
of weights under a mask (elastic, while routers search), what the allocator wastes.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass, replace

import torch

import nested
import routers
from kernels_gpu import VOCABULARY_TILE
from system.config import Config, ElasticConfig, FitConfig, ModelConfig
from system.costs import (
    matrix_parameters,
    part_cache_bytes,
    part_flops,
    part_parameters,
    sum_of_parts,
)

STATE_BYTES = 4  # of a weight, a gradient, each of AdamW's two moments, and an average


COMPUTE_BYTES = 2  # of an activation and a cached number: bf16


LOGIT_BYTES = (
    3 * 4
)  # of a logit while its loss is taken, at most: itself, its log-softmax and its gradient, in fp32


H100_FLOPS = 989e12  # a second, bf16, dense: the data sheet of the H100 SXM


MFU = 0.4  # the share of it that counts as reached


@dataclass(frozen=True)
class Phase:
    """Steps of one kind: how many, the tokens that one reads, and its FLOPs by part."""

    name: str
    n_steps: int
    n_tokens: int
    flops: dict[str, float]

    @property
    def step_flops(self) -> float:
        """FLOPs of a step."""
        return sum(self.flops.values())


def phases(config: Config) -> list[Phase]:
    """The steps that a run would take, in order; of its base too, unless `init` brings one."""
    found = []
    if config.mode == "pretrain" or not config.init:
        found.append(
            next_token_phase("pretrain", config.model, config.pretrain, config.pretrain.seq_len))
    if config.mode == "cpt":
        found.append(next_token_phase("cpt", config.model, config.cpt, config.pretrain.seq_len))
    elif config.mode == "rlp":
        found.append(rlp_phase(config))
    elif config.mode == "elastic":
        found += elastic_phases(config)
    return found


def facts(config: Config) -> dict:
    """All of it, for `train.py --dry-run`: of the run, of its phases, of a GPU."""
    found = phases(config)
    total = sum(p.n_steps * p.step_flops for p in found)
    n = config.dry_run_gpus
    out = {
        "parameters": parameters(config.model),
        "phases": [{"name": p.name, "steps": p.n_steps, "tokens": p.n_tokens, "flops": p.flops}
                   for p in found],
        "total_tokens": sum(p.n_steps * p.n_tokens for p in found),
        "total_flops": total,
        "h100_hours": total / (MFU * H100_FLOPS) / 3600,
        "n_gpus": n,
        "memory": {"all kept": memory(config, n),
                   "layers recomputed": memory(config, n, recompute=True)},
    }
    if config.mode == "rlp":
        out["thoughts"] = config.rlp.steps * config.rlp.batch * config.rlp.group_size
    if config.mode == "elastic":
        out["family"] = family_bytes(config.model, config.elastic)
    return out


# -------------------------------------------------------------------------------------------- FLOPs


def parts(shape: ModelConfig) -> Counter:
    """(kind, shape) of every layer, with how many are alike."""
    return Counter((kind, shape.layer(i)) for i, kind in enumerate(shape.pattern))


def body_flops(shape: ModelConfig, n_tokens: int, n_before: int = 0) -> float:
    """FLOPs of n_tokens through the layers, after n_before that are cached; without the output
    matrix.

    `part_flops` averages over positions 0 to t, so over t / 2 that are seen; here it is n_before +
    n_tokens / 2 of them.
    """
    seen = 2 * n_before + n_tokens
    return n_tokens * sum(
        n * part_flops(kind, own, seen) for (kind, own), n in parts(shape).items())


def head_flops(shape: ModelConfig, n_tokens: int) -> float:
    """FLOPs of the logits of n_tokens."""
    return n_tokens * part_flops("", shape, n_tokens)


def forward_flops(shape: ModelConfig, n_rows: int, n_tokens: int) -> float:
    """FLOPs of n_rows sequences of n_tokens, with logits everywhere."""
    return n_rows * (body_flops(shape, n_tokens) + head_flops(shape, n_tokens))


def next_token_phase(name: str, shape: ModelConfig, fit: FitConfig, seq_len: int) -> Phase:
    """Next-token prediction."""
    return Phase(name, fit.steps, fit.batch * seq_len,
                 {"train": 3 * forward_flops(shape, fit.batch, seq_len)})


def rlp_phase(config: Config) -> Phase:
    """RLP: the context is run once for its G thoughts, in the rollout and in the update."""
    shape, c = config.model, config.rlp
    B, G, T, M = c.batch, c.group_size, c.context_len, c.thought_len
    context = B * body_flops(shape, T)
    thoughts = B * G * (body_flops(shape, M, T) + head_flops(shape, M))
    after = B * G * (body_flops(shape, c.horizon, T + M) + head_flops(shape, c.horizon))
    plain = context + B * (body_flops(shape, c.horizon - 1, T) + head_flops(shape, c.horizon))
    flops = {"rollout": context + thoughts, "scoring": plain + after,
             "policy": 3 * c.inner_epochs * (context + thoughts)}
    if c.kl > 0:
        flops["reference"] = context + thoughts
    return Phase("rlp", c.steps, B * T, flops)


def elastic_phases(config: Config) -> list[Phase]:
    """Nemotron Elastic: short sequences while routers search, short ones afterwards, then long
    ones."""
    c, full = config.elastic, config.model
    sizes = family(full, c)
    search, stage_1 = (round(c.search_share * c.steps) if c.choose == "router" else 0,
                       c.stage_1_steps())
    alike, drawn = [1 / len(sizes)] * len(sizes), [w / sum(c.long_weights) for w in c.long_weights]
    found = []
    for name, begin, end, searching, n_rows, seq_len, weights in (
        ("stage 1, search", 0, min(search, stage_1), True, c.batch, c.seq_len, alike),
        ("stage 1", min(search, stage_1), stage_1, False, c.batch, c.seq_len, alike),
        ("stage 2, search", stage_1, max(search, stage_1), True, c.long_rows(), c.long_len, drawn),
        ("stage 2", max(search, stage_1), c.steps, False, c.long_rows(), c.long_len, drawn)):
        if begin < end:
            whole = forward_flops(full, n_rows, seq_len)
            costs = [whole if searching else forward_flops(size, n_rows, seq_len) for size in sizes]
            student = 3 * sum(w * f for w, f in zip(weights, costs, strict=True))
            n_teachers = (c.kl > 0) + (c.self_kl > 0) * sum(
                w for w, b in zip(weights, c.budgets, strict=True) if b != 1)
            flops = {"teacher": n_teachers * whole, "student": student}
            found.append(
                Phase(name, end - begin, n_rows * seq_len, {k: v for k, v in flops.items() if v}))
    return found


@functools.cache
def family(full: ModelConfig, c: ElasticConfig) -> list[ModelConfig]:
    """The shape of each budget, with widths by hand: what a router will choose costs the same, by
    its budget.

    A budget of latency is not measured here: each of its models counts as the full one, an upper
    bound.
    """
    if c.cost == "latency":
        return [full] * len(c.budgets)
    router = routers.build_router(full, replace(c, choose="fixed"), None, torch.device("cpu"))
    return [nested.shrink(full, router.choose(b)) for b in c.budgets]


# ------------------------------------------------------------------------------------------- memory


def parameters(shape: ModelConfig) -> int:
    """Weights of a model."""
    return sum_of_parts(part_parameters, shape)


def family_bytes(full: ModelConfig, c: ElasticConfig, n_bytes: int = 2) -> dict[str, float]:
    """Bytes of the weights of a family: in one checkpoint with its router, and in one for each
    size."""
    router = routers.unmeasured_router(full, c)
    return {"model": n_bytes * parameters(full),
            "router": n_bytes * sum(p.numel() for p in router.parameters()),
            "separate": n_bytes * sum(parameters(size) for size in family(full, c))}


def memory(config: Config, n_gpus: int = 1, recompute: bool = False) -> dict[str, float]:
    """Bytes on one of n_gpus by part, and at the peak, of the largest step of the run's own mode
    (its base takes no more).

    recompute: only the input of each layer is kept for the backward pass, and one layer's
    activations are there at a time.
    """
    n, fit = parameters(config.model), getattr(config, config.mode)
    muon = (sum(n * matrix_parameters(*part) for part, n in parts(config.model).items())
            if fit.muon_lr > 0
            else 0)
    largest = max(part_parameters(kind, own) for kind, own in parts(config.model))
    gathered = part_parameters("", config.model) + 2 * largest if n_gpus > 1 else 0
    caches, activations = step_bytes(config, n_gpus, recompute)
    states = {
        "weights": STATE_BYTES * n / n_gpus,
        "gradients": STATE_BYTES * n / n_gpus,
        "optimizer": STATE_BYTES * (2 * n - muon) / n_gpus,  # AdamW keeps two moments, Muon one
        **{name: STATE_BYTES * k * n / (1 if name == "parent" else n_gpus)
           for name, k in copies(config).items()},
    }
    rollouts, update = {}, {"gathered layers": COMPUTE_BYTES * gathered, "activations": activations}
    if config.mode == "rlp":
        rollouts = {"whole weights": COMPUTE_BYTES * (1 + sum(copies(config).values())) * n,
                    "caches": caches}
    elif config.mode == "elastic":
        update = {"whole weights": (n_gpus > 1) * 2 * STATE_BYTES * n, "activations": activations}
    at_once = sum(states.values()) + max(sum(rollouts.values()), sum(update.values()))
    return {**states, **rollouts, **update, "at the peak": at_once}


def copies(config: Config) -> dict[str, int]:
    """How many frozen networks of the model's size a run keeps beside it."""
    if config.mode == "rlp":
        return {"EMA teacher": 1, "starting weights": int(config.rlp.kl > 0)}
    if (
        config.mode == "elastic"
    ):  # the parent, teacher and reference of the figures, and the end of stage 1
        return {"parent": 1,
                "end of stage 1": int(config.elastic.stage_1_steps() < config.elastic.steps)}
    return {}


def step_bytes(config: Config, n_gpus: int, recompute: bool) -> tuple[float, float]:
    """Bytes of caches and of activations of one part of a step on one GPU: batch / (GPUs x
    accumulate) sequences."""
    shape, fit = config.model, getattr(config, config.mode)
    n_ids = min(shape.vocab_size, VOCABULARY_TILE)  # logits that a token has at one time

    def rows(batch: int) -> int:
        return math.ceil(batch / (n_gpus * fit.accumulate))

    if config.mode == "rlp":
        c, b = config.rlp, rows(config.rlp.batch)
        n_thoughts = b * c.group_size
        caches = n_thoughts * cache_bytes(shape, c.context_len + c.thought_len)
        n_tokens = b * c.context_len + n_thoughts * c.thought_len
        return caches, activation_bytes(
            shape, n_tokens, n_thoughts * c.thought_len * n_ids, recompute)
    if config.mode == "elastic":
        c = config.elastic
        n_tokens = max(rows(c.batch) * c.seq_len,
                       rows(c.long_rows()) * c.long_len * (c.stage_1_steps() < c.steps))
        divergence = min(n_tokens * shape.vocab_size, 2 * 2**24)  # see elastic.distillation_loss
        n_logits = max(divergence, (c.ce + c.full_ce > 0) * n_tokens * n_ids)
        return 0.0, activation_bytes(shape, n_tokens, n_logits, recompute)
    n_tokens = rows(fit.batch) * config.pretrain.seq_len
    return 0.0, activation_bytes(shape, n_tokens, n_tokens * n_ids, recompute)


def cache_bytes(shape: ModelConfig, n_tokens: int) -> float:
    """Bytes of the cache of one sequence."""
    return sum_of_parts(
        lambda kind, own: part_cache_bytes(kind, own, n_tokens, COMPUTE_BYTES), shape)


def activation_bytes(shape: ModelConfig, n_tokens: int, n_logits: int, recompute: bool) -> float:
    """Bytes kept for the backward pass of n_tokens, and those of n_logits logits."""
    layers = [(kept_numbers(kind, own), n) for (kind, own), n in parts(shape).items()]
    if recompute:
        numbers = len(shape.pattern) * shape.d_model + max(kept for kept, _ in layers)
    else:
        numbers = sum(kept * n for kept, n in layers)
    return COMPUTE_BYTES * n_tokens * numbers + LOGIT_BYTES * n_logits


def kept_numbers(kind: str, shape: ModelConfig) -> float:
    """Numbers a token that a layer keeps for its backward pass, with its norm (3 D); a test
    compares it with autograd."""
    D, F, H, K, P = shape.d_model, shape.d_ff, shape.n_heads, shape.n_kv_heads, shape.attn_head_dim
    if kind == "-":
        return 3 * D + (2 if shape.ffn == "relu2" else 4) * F
    if kind == "*":  # queries, keys, values and the output; RoPE and QK-norm keep what they read
        return (3 * D
                + (2 * H + 2 * K) * P
                + 1.5 * (H + K) * P * (shape.qk_norm + (shape.rope_theta > 0)))
    H, K, N, Q = shape.mamba_heads, shape.mamba_groups, shape.d_state, shape.chunk
    inner = (
        H * shape.mamba_head_dim
    )  # I; 7 I of x, z and y on their way, I N / Q of chunk states, 2 H Q of decays
    conv = inner + 2 * K * N
    return 3 * D + 7 * inner + 4 * conv + inner * N / Q + 2 * H * Q + K * Q + 7 * H
