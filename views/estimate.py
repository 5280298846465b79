"""What a run would take: FLOPs and tokens of a step, memory of a GPU. Arithmetic on shapes.

With f(t) the FLOPs of a forward pass per token (`costs.part_flops`: two per weight of a matrix, and
what attention and the scan add at length t), a backward pass is 2 f, a training step 3 f per token
(1 f and 2 f under adapters, whose own are left out: frozen weights have no gradient):

    next token  3 f; every mode that is not below
    rlp, rlvr   rollout: the context once and G thoughts of L tokens from its cache, 1 f each;
                scoring: the teacher on the context, and the closing tag and the targets after
                every thought, 1 f (with `rlp.back` the thoughts and the text behind them as well);
                policy: the context once and the thoughts, 3 f, each epoch; of a run that has ended
                only the thoughts of groups whose rewards differ, for others are not run
                (`rlp.kl` runs them all); with `rlp.predictor` one thought of each group once more
    elastic     the parent 1 f, the full model as a teacher of smaller budgets 1 f; student 3 f of
                the model of each budget, weighted by how often it is drawn; the full model for
                every budget while routers search on masks

A token that goes on from a cache of T tokens sees T more positions than one that begins; contexts
and thoughts count at their full length, an upper bound; those of a run that has ended as long as
they were on the mean, contexts with what pads them to one length. Not counted: optimizer, norms and
activation functions, what pads thoughts of a pass, the logits that losses make twice, and held-out
evaluation.

Memory counts what stays between steps in fp32 (weights, gradients, optimizer, moving averages and
frozen copies), divided among the GPUs, and what a step needs: whole weights for rollouts, layers
that are gathered from the other GPUs, caches, and what layers keep for the backward pass. In bf16
(`parallel.dtype`) that is what the kernels of a card keep, and the stream between layers and its
norms stay fp32; in fp32 what PyTorch's fast forms in kernels.py keep. A step of RLP needs its
rollouts' part or its update's, whichever is larger. With adapters (`lora.rank`) every GPU has the
frozen weights once, matrices of layers in the dtype of the products, and all else is the adapters'.
Not counted: weights under a mask (elastic, while routers search), what the allocator wastes.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass, replace

import torch

import nested
import routers
from kernels_gpu import TILE, VOCABULARY_TILE
from system import costs
from system.config import Config, ElasticConfig, ModelConfig

STATE_BYTES = 4  # of a weight, a gradient, each of AdamW's two moments, an average, the stream
H100_FLOPS = 989e12  # a second, bf16, dense: the data sheet of the H100 SXM
MFU = 0.4  # the share of it that counts as reached


@dataclass(frozen=True)
class Phase:
    """Steps of one kind: how many, the sequences and tokens that one reads, its FLOPs by part."""

    name: str
    n_steps: int
    n_rows: int
    row_tokens: int
    flops: dict[str, float]
    thought_tokens: int = 0  # sampled for each sequence; the loss is taken on them alone

    @property
    def n_tokens(self) -> int:
        """Tokens that a step reads."""
        return self.n_rows * self.row_tokens


def phases(config: Config) -> list[Phase]:
    """The steps that a run would take, in order: those of `phases_before`, then its own."""
    return phases_before(config) + own_phases(config)


def phases_before(config: Config) -> list[Phase]:
    """The steps of a run's base, unless `init` brings one, and of the warm-up. Training of the base
    may end earlier (`pretrain.enough`)."""
    before = {"pretrain": [], "warmup": ["pretrain"]}.get(config.mode, ["pretrain", "warmup"])
    if config.init:
        before = before[1:]
    found = [p for mode in before for p in next_token_phases(replace(config, mode=mode))]
    return [p for p in found if p.n_steps]


def next_token_phases_of(config: Config) -> list[Phase]:
    """Those in which whole documents are read, and every token of them predicted."""
    own = [] if config.mode in PHASES else next_token_phases(config)
    return phases_before(config) + own


def own_phases(config: Config) -> list[Phase]:
    """Those of the run's own mode alone."""
    return PHASES.get(config.mode, next_token_phases)(config)


def thinks(config: Config) -> bool:
    """Whether the mode samples thoughts."""
    return PHASES.get(config.mode) is rlp_phases


def steps_flops(config: Config, thought_tokens: float | None = None, signal: float = 1.0,
                sizes: list[ModelConfig] | None = None, context_tokens: float | None = None
                ) -> float:
    """FLOPs of a run's own steps, its base left out, with thoughts as long as they were, and with
    contexts as long as the longest of a batch was; signal: the share of groups whose rewards
    differed; sizes: see `elastic_phases`."""
    if thinks(config):
        known = {"thought_len": thought_tokens, "context_len": context_tokens}
        known = {name: round(value) for name, value in known.items() if value}
        config = replace(config, rlp=replace(config.rlp, **known))
    found = (rlp_phases(config, signal) if thinks(config) else elastic_phases(config, sizes)
             if config.mode == "elastic" else own_phases(config))
    return sum(p.n_steps * sum(p.flops.values()) for p in found)


def facts(config: Config) -> dict:
    """All of it, for `train.py --dry-run`: of the run, of its phases, of a GPU."""
    found, n = phases(config), config.dry_run_gpus
    total = sum(p.n_steps * sum(p.flops.values()) for p in found)
    out = {"parameters": parameters(config.model),
           "phases": [{"name": p.name, "steps": p.n_steps, "tokens": p.n_tokens, "flops": p.flops}
                      for p in found],
           "total_tokens": sum(p.n_steps * p.n_tokens for p in found), "total_flops": total,
           "h100_hours": total / (MFU * H100_FLOPS) / 3600, "n_gpus": n,
           "memory": {"all kept": memory(config, n), "layers recomputed": memory(config, n, True)}}
    out["figures"] = figures_bytes(config, n)
    if thinks(config):
        c = config.rollouts()
        out["thoughts"] = c.steps * c.batch * c.group_size
    if config.mode == "elastic":
        out["family"] = family_bytes(config.model, config.elastic)
    return out


# -------------------------------------------------------------------------------------------- FLOPs


def parts(shape: ModelConfig) -> Counter:
    """(kind, shape) of every layer, with how many are alike."""
    return Counter((kind, shape.layer(i)) for i, kind in enumerate(shape.pattern))


def body_flops(shape: ModelConfig, n_tokens: int, n_before: int = 0) -> float:
    """FLOPs of n_tokens through the layers, after n_before cached ones; no output matrix."""
    # part_flops(t) is for t / 2 positions seen on average; here they are n_before + n_tokens / 2
    seen = 2 * n_before + n_tokens
    return n_tokens * sum(n * costs.part_flops(*part, seen) for part, n in parts(shape).items())


def head_flops(shape: ModelConfig, n_tokens: int) -> float:
    """FLOPs of the logits of n_tokens."""
    return n_tokens * costs.part_flops("", shape, n_tokens)


def forward_flops(shape: ModelConfig, n_rows: int, n_tokens: int) -> float:
    """FLOPs of n_rows sequences of n_tokens, with logits everywhere."""
    return n_rows * (body_flops(shape, n_tokens) + head_flops(shape, n_tokens))


def next_token_phases(config: Config) -> list[Phase]:
    """Next-token prediction."""
    fit = getattr(config, config.mode)
    seq_len = getattr(fit, "seq_len", config.warmup.seq_len)
    n_passes = 2 if config.lora.rank else 3
    flops = {"train": n_passes * forward_flops(config.model, fit.batch, seq_len)}
    return [Phase(config.mode, fit.steps, fit.batch, seq_len, flops)]


def rlp_phases(config: Config, signal: float = 1.0) -> list[Phase]:
    """RLP: the context is run once for its G thoughts, in the rollout and in the update. signal:
    the share of groups that teach something."""
    shape, c = config.model, config.rollouts()
    B, G, T, L, X = c.batch, c.group_size, c.context_len, c.thought_len, c.horizon
    context = B * body_flops(shape, T)
    thoughts = B * G * (body_flops(shape, L, T) + head_flops(shape, L))
    after = B * G * (body_flops(shape, X, T + L) + head_flops(shape, X))
    n_back = (1 if c.positions == "random" else c.text_share + c.computed_share) * B
    if c.back and n_back:  # all thoughts are read again, where they stand
        again = ((B - n_back) * body_flops(shape, L + X, T)
                 + n_back * body_flops(shape, L + c.back + X, T - c.back))
        after += G * (again + B * head_flops(shape, X))
    plain = context + B * (body_flops(shape, X - 1, T) + head_flops(shape, X))
    taught = (1.0 if c.kl > 0 else signal) * thoughts + (c.predictor > 0) * after / G
    flops = {"rollout": context + thoughts, "scoring": plain + after,
             "policy": (2 if config.lora.rank else 3) * c.inner_epochs * (context + taught)}
    if c.kl > 0:
        flops["reference"] = context + thoughts
    return [Phase(config.mode, c.steps, B, T, flops, G * L)]


def elastic_phases(config: Config, sizes: list[ModelConfig] | None = None) -> list[Phase]:
    """Nemotron Elastic: short sequences, then long ones, each first while routers search.
    sizes: the shape of each budget, once it is known; until then see `family`."""
    c, full = config.elastic, config.model
    sizes, found = sizes or family(full, c), []
    n_short, n_search = c.stage_1_steps(), c.search_steps()
    for stage, begin, end, n_rows, seq_len in (
            ("stage 1", 0, n_short, c.batch, c.seq_len),
            ("stage 2", n_short, c.steps, c.long_rows(), c.long_len)):
        weights = c.passes(begin)
        whole = forward_flops(full, n_rows, seq_len)
        n_teachers = int(c.kl > 0)
        if c.self_kl > 0 and not c.together:  # together, the full model's pass is there already
            has_full = parameters(sizes[0]) == parameters(full)  # which needs none
            n_teachers += sum(weights[has_full:])
        settled = min(max(n_search, begin), end)
        for name, n_steps, students in (
                (f"{stage}, search", settled - begin, [whole] * len(sizes)),
                (stage, end - settled, [forward_flops(s, n_rows, seq_len) for s in sizes])):
            student = 3 * sum(w * f for w, f in zip(weights, students, strict=True))
            if n_steps:
                teacher = {"teacher": n_teachers * whole} if n_teachers else {}
                found.append(Phase(name, n_steps, n_rows, seq_len, teacher | {"student": student}))
    return found


# Of modes that do more than next-token prediction.
PHASES = {"rlp": rlp_phases, "rlvr": rlp_phases, "elastic": elastic_phases}


@functools.cache
def family(full: ModelConfig, c: ElasticConfig) -> list[ModelConfig]:
    """The shape of each budget, with widths by hand. What a router will choose has as many weights
    and other FLOPs: at 50 % of the small model a fifth more."""
    if c.cost == "latency":  # is not measured here: the full model is an upper bound
        return [full] * len(c.budgets)
    router = routers.build_router(full, c, None, torch.device("cpu"))
    return [nested.shrink(full, router.space.widths(routers.by_hand(router, b), router.depth_order))
            for b in c.budgets]


# ------------------------------------------------------------------------------------------- memory


def parameters(shape: ModelConfig) -> int:
    """Weights of a model."""
    return costs.sum_of_parts(costs.part_parameters, shape)


def family_bytes(full: ModelConfig, c: ElasticConfig) -> dict[str, float]:
    """bf16 bytes of a family's weights: in one checkpoint with its router, in one for each size."""
    n_router = costs.count_parameters(routers.unmeasured_router(full, c))
    counts = {"model": parameters(full), "router": n_router,
              "separate": sum(parameters(size) for size in family(full, c))}
    return {name: routers.SERVED_BYTES * n for name, n in counts.items()}


def memory(config: Config, n_gpus: int = 1, recompute: bool = False) -> dict[str, float]:
    """Bytes on one of n_gpus by part, and at the peak, of the largest step of the run's own mode
    (its base takes no more). recompute: of all layers but one at a time only the input is kept.
    """
    shape, layers = config.model, parts(config.model)
    c = config.rollouts() if thinks(config) else getattr(config, config.mode)
    n, rank, low = parameters(shape), config.lora.rank, config.parallel.dtype != "fp32"
    product = product_bytes(low)
    inner, thin = (sum(k * count(*part) for part, k in layers.items()) for count in (
        costs.matrix_parameters, lambda *part: costs.adapter_parameters(*part, rank)))
    # 1. Between steps, of what trains. AdamW keeps two moments of a weight, Muon one.
    n_trained, muon, n_shares = (thin, 0, 1) if rank else (n, (c.muon_lr > 0) * inner, n_gpus)
    share = STATE_BYTES * n_trained / n_shares
    moments = STATE_BYTES * (2 * n_trained - muon) / n_shares
    frozen = (rank > 0) * (STATE_BYTES * (n - inner) + product * inner)
    states = {"frozen weights": frozen, "weights": share, "gradients": share, "optimizer": moments}
    # 2. In an update: one part of a step on one GPU is batch / (GPUs x accumulate) sequences.
    sequences = [(math.ceil(p.n_rows / (n_gpus * c.accumulate)), p) for p in own_phases(config)]
    n_tokens = max(rows * (p.row_tokens + p.thought_tokens) for rows, p in sequences)
    n_at_once = max(rows * max(p.row_tokens, p.thought_tokens) for rows, p in sequences)
    n_scored = max(rows * (p.thought_tokens or p.row_tokens) for rows, p in sequences)
    n_logits = n_scored * min(shape.vocab_size, VOCABULARY_TILE)  # that are there at one time
    largest = max(costs.part_parameters(*layer) for layer in layers)
    gathered = product * (costs.part_parameters("", shape) + 2 * largest)
    rollouts, update = {}, {"gathered layers": (n_shares > 1) * gathered}
    # 3. What the modes add: frozen networks, rollouts on whole weights, a parent's own layers.
    if thinks(config):
        states |= {"EMA teacher": share, "starting weights": (c.kl > 0) * share}
        n_contexts = sequences[0][0]
        n_caches = n_contexts * c.group_size
        n_cast = thin + shape.vocab_size * shape.d_model if rank else n  # with a head in any case
        rollouts = {"whole weights": (low or n_shares > 1) * product * (2 + (c.kl > 0)) * n_cast,
                    "caches": n_contexts * cache_bytes(shape, c.context_len, low)
                    + n_caches * cache_bytes(shape, c.thought_len, low)}
        # a thought's backward pass keeps what it has read of its context
        update["forked contexts"] = n_caches * cache_bytes(shape, c.context_len, low)
    elif config.mode == "elastic":  # the parent is teacher, and reference of the figures
        states |= {"parent": share, "end of stage 1": c.has_stage_2() * share}
        update["gathered layers"] *= 2
        divergence = min(n_scored * shape.vocab_size, 2 * 2**24)  # see elastic.distillation_loss
        n_logits = max(divergence, (c.ce + c.full_ce > 0) * n_logits)
    update["activations"] = activation_bytes(
        shape, n_tokens, n_logits, recompute * n_at_once, rank, low)
    at_once = sum(states.values()) + max(sum(rollouts.values()), sum(update.values()))
    return {**states, **rollouts, **update, "at the peak": at_once}


def figures_bytes(config: Config, n_gpus: int) -> float:
    """Bytes of weights on the first GPU while held-out figures are made: of every network in fp32;
    where they were sharded, of the trained one as it is gathered, or of those that visit together
    (`parallel.visiting`): one, or parent and a size, or all sizes. No rivals (`elastic.baseline`).
    """
    shape, low = config.model, product_bytes(config.parallel.dtype != "fp32")
    whole, is_elastic = STATE_BYTES * parameters(shape), config.mode == "elastic"
    sizes = sum(map(parameters, family(shape, config.elastic))) if is_elastic else 0
    if n_gpus > 1 and not config.lora.rank:
        return max(whole, low * (1 + is_elastic) * parameters(shape), low * sizes)
    if is_elastic:
        return whole + STATE_BYTES * sizes
    n_networks = 1 if config.lora.rank or config.mode in ("pretrain", "warmup") else 2
    return whole * (n_networks + (thinks(config) and not config.lora.rank))


def product_bytes(low: bool) -> int:
    """Of a number that matrix products read or write: bf16 or fp32."""
    return 2 if low else 4


def cache_bytes(shape: ModelConfig, n_tokens: int, low: bool = True) -> float:
    """Bytes of the cache of one sequence."""
    return costs.sum_of_parts(
        lambda kind, own: costs.part_cache_bytes(kind, own, n_tokens, product_bytes(low)), shape)


def activation_bytes(shape: ModelConfig, n_tokens: int, n_logits: int, n_recomputed: int,
                     rank: int, low: bool) -> float:
    """Bytes kept for the backward pass of n_tokens, and those of n_logits logits: in bf16 these are
    widened, and have log-softmax and gradient beside them; in fp32 they become their gradient.
    n_recomputed: tokens that a layer computes again at a time; 0 if none does."""
    kept = {part: kept_bytes(*part, rank, low) for part in parts(shape)}
    logits = (3 * 4 if low else 4) * n_logits
    if n_recomputed:  # the logits are gone when the first layer is computed again
        stream = STATE_BYTES * n_tokens * len(shape.pattern) * shape.d_model
        return stream + max(n_recomputed * max(kept.values()), logits)
    return n_tokens * sum(n * kept[part] for part, n in parts(shape).items()) + logits


def kept_bytes(kind: str, shape: ModelConfig, rank: int = 0, low: bool = True) -> float:
    """Bytes a token that a layer with its norm keeps for its backward pass. A norm keeps what it
    reads and what it has divided, in fp32, the latter for its weight's gradient; in bf16 each
    matrix has its input's cast beside it. Each adapter keeps `rank` numbers more."""
    D, F, H, K, P = shape.d_model, shape.d_ff, shape.n_heads, shape.n_kv_heads, shape.attn_head_dim
    own, n_norm = D, 1 if rank else 2  # numbers of products; what norms keep
    thin = rank * len(costs.matrices(kind, shape))
    wide = n_norm * D  # numbers in fp32 in any case
    if kind == "-":
        own += 2 * F + low * (shape.ffn == "swiglu") * D
    elif kind == "*":  # queries, keys, values and the output; RoPE and QK-norm keep what they read
        own += (2 * H + 2 * K) * P + low * 2 * D
        if low:
            wide += n_norm * (H + K) * P * shape.qk_norm + H
        else:
            own += (n_norm + 1) / 2 * (H + K) * P * (shape.qk_norm + (shape.rope_theta > 0))
    else:
        H, K, N, Q = shape.mamba_heads, shape.mamba_groups, shape.d_state, shape.chunk
        I, E = H * shape.mamba_head_dim, H * shape.mamba_head_dim + 2 * K * N
        if low:  # z, xBC and dt; xBC convolved, and activated; y twice; states; dt twice in fp32
            own += (I + E + H) + 2 * E + 2 * I + I * N / TILE
            wide += 2 * H
        else:  # 7 I of x, z and y on their way; chunk states; decays
            own += 7 * I + 4 * E + I * N / Q + 2 * H * Q + K * Q + 7 * H
    return STATE_BYTES * wide + product_bytes(low) * (own + thin)
