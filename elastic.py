"""Nemotron Elastic: one model that holds smaller ones, and routers that choose them (arXiv 2511.16664).

A trained parent becomes elastic in four steps, which are the sections of this file:

1. Axes. Every unit of the model belongs to an axis: channels of the residual stream (D), FFN neurons (F), Mamba heads (H)
   and their channels (P), query heads (A), layers. `DIMS` says along which axis each dimension of each weight runs.
   To permute, to cut and to mask a model are then three loops over that one table.
2. Importance (eq. 1 to 5). Units are ranked once, and the weights permuted: the parent computes the same function as
   before, and the best w units of an axis are its first w, so every smaller model is a slice of the parent.
3. Routers (eq. 6 to 12). For a budget b they give logits over the widths of every axis, for every layer; Gumbel-softmax
   makes masks of them, and the budget loss |C(a) / (b C_full) - 1| keeps their expected cost C near the budget.
4. Distillation (eq. 13 to 19). Each sequence has a budget. The chosen model learns from the frozen parent,
   KL(parent || chosen), or from the full model, or from the text. First short sequences and all budgets alike; then long
   ones, the larger budgets more often.

`extract` then cuts a model for any budget out of one checkpoint; nothing is trained again.

A masked model equals the sliced one exactly: masked channels are zero in the residual stream, and the mean in every
RMSNorm is taken over the active ones. With a share s of the channels active that is the same as the norm over all of them
with weight sqrt(s) w and epsilon s eps, so masks touch weights only, and the model's code does not know of them.

Where it differs from the paper: masks multiply weights instead of activations (the same function, for fewer
multiplications); once the routers have settled (`elastic.search_share`) their choice is fixed and budgets run on slices,
which costs in proportion to their size; the budget loss is relative, with a dead zone; the routers begin at the full model;
mode 1 multiplies by the likeliest choice's probability, since its logit is NaN-prone; the full budget is always the
full model; keys and values have no elastic heads under grouped queries. The last choice is repaired to meet its budget
(`fit_to_budget`), which also serves budgets that were never trained.
"""

import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint as recompute

import checkpoint
import parallel
from config import WIDTH_FIELDS, Config, ElasticConfig, ModelConfig, exit_code, require
from data import Corpus
from kernels import selected_logp
from model import Block, HybridLM, count_parameters, part_cache_bytes, part_flops, part_parameters, sum_of_parts
from objective import Objective

# --------------------------------------------------------------------------------------------------------- 1. axes

# The axis of every dimension of every weight ("." has none); a mask multiplies the dimensions with a star. Derived axes:
# I, the heads' channels (H x P); E, the convolution's (I and B, C); X, the rows of in_proj (z and x over I, B and C, dt
# over H); Q, the query heads' channels. Norms take the square root of the active share besides.
OUTER = {"embed.weight": ". D*", "norm.weight": "D*", "head.weight": ". D"}
DIMS = {
    "-": {
        "norm.weight": "D*", "mixer.up_proj.weight": "F D", "mixer.gate_proj.weight": "F D",
        "mixer.down_proj.weight": "D* F*",
    },
    "*": {
        "norm.weight": "D*", "mixer.q_proj.weight": "Q* D", "mixer.k_proj.weight": ". D", "mixer.v_proj.weight": ". D",
        "mixer.o_proj.weight": "D* Q*", "mixer.q_norm.weight": ".", "mixer.k_norm.weight": ".",
    },
    "M": {
        "norm.weight": "D*", "mixer.in_proj.weight": "X* D", "mixer.conv_weight": "E .", "mixer.conv_bias": "E*",
        "mixer.A_log": "H", "mixer.D": "H", "mixer.dt_bias": "H", "mixer.norm_weight": "I", "mixer.out_proj.weight": "D* I",
    },
}  # fmt: skip
NORMS = {"norm.weight": "D", "mixer.norm_weight": "I"}
WRITERS = ("mixer.down_proj.weight", "mixer.o_proj.weight", "mixer.out_proj.weight")


@dataclass(frozen=True)
class Widths:
    """What is active: channels of the residual stream; of each layer its widths as in `WIDTH_FIELDS`, () if skipped."""

    d_model: int
    layers: tuple[tuple[int, ...], ...]


def full_widths(config: ModelConfig) -> Widths:
    """Everything."""
    shapes = [(kind, config.layer(i)) for i, kind in enumerate(config.pattern)]
    return Widths(config.d_model, tuple(tuple(getattr(shape, f) for f in WIDTH_FIELDS[kind]) for kind, shape in shapes))


def shrink(config: ModelConfig, widths: Widths) -> ModelConfig:
    """The shape of the model that holds only what is active."""
    kept = [(kind, w) for kind, w in zip(config.pattern, widths.layers, strict=True) if w]
    return replace(config, d_model=widths.d_model, pattern="".join(k for k, _ in kept), widths=tuple(w for _, w in kept))


@dataclass
class Units:
    """Indices of units, to permute by or to keep: of the stream, and of each layer by axis (None: left out)."""

    d_model: Tensor
    layers: list[dict[str, Tensor] | None]


def in_groups(n: int, total: int, n_groups: int) -> Tensor:
    """Indices of n of the total heads: the first n / n_groups of each group, for a group shares what its heads read."""
    return torch.arange(total).view(n_groups, -1)[:, : n // n_groups].flatten()


def kept_units(config: ModelConfig, widths: Widths) -> Units:
    """The first units of every axis, of every group for heads."""
    layers: list[dict[str, Tensor] | None] = []
    for kind, w in zip(config.pattern, widths.layers, strict=True):
        if not w:
            layers.append(None)
        elif kind == "-":
            layers.append({"F": torch.arange(w[0])})
        elif kind == "*":
            layers.append({"A": in_groups(w[0], config.n_heads, config.n_kv_heads)})
        else:
            layers.append({"H": in_groups(w[0], config.mamba_heads, config.mamba_groups), "P": torch.arange(w[1])})
    return Units(torch.arange(widths.d_model), layers)


def derived(kind: str, config: ModelConfig, units: dict[str, Tensor]) -> dict[str, Tensor]:
    """Indices along every axis of a layer, from those of its units."""
    if kind == "-":
        return units
    if kind == "*":
        return {"Q": (units["A"][:, None] * config.attn_head_dim + torch.arange(config.attn_head_dim)).flatten()}
    inner, n_bc = config.mamba_heads * config.mamba_head_dim, 2 * config.mamba_groups * config.d_state
    i = (units["H"][:, None] * config.mamba_head_dim + units["P"]).flatten()
    bc = torch.arange(n_bc)
    x = torch.cat([i, inner + i, 2 * inner + bc, 2 * inner + n_bc + units["H"]])
    return {"H": units["H"], "I": i, "E": torch.cat([i, inner + bc]), "X": x}


def named_dims(names: list[str], pattern: str) -> Iterator[tuple[str, int | None, str, list[str]]]:
    """For each weight: its name, its layer (None if outside), its name in there, and the axes of its dimensions."""
    for name in names:
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            yield name, int(i), rest, DIMS[pattern[int(i)]][rest].split()
        else:
            yield name, None, name, OUTER[name].split()


def take(weights: dict[str, Tensor], config: ModelConfig, units: Units) -> dict[str, Tensor]:
    """The weights at the given units, in their order: a permutation if all are given, else a smaller model.

    Differentiable. Where the first units of an axis are kept, the result is a view; where a layer is left out, the ones
    after it move up.
    """
    inside = [
        u and {"D": units.d_model, **derived(kind, config, u)} for kind, u in zip(config.pattern, units.layers, strict=True)
    ]
    place = {i: n for n, i in enumerate(i for i, u in enumerate(inside) if u)}
    out = {}
    for name, i, rest, dims in named_dims(list(weights), config.pattern):
        if i is not None and not inside[i]:
            continue
        index, t = {"D": units.d_model} if i is None else inside[i], weights[name]
        for dim, axis in enumerate(dims):
            if axis[0] in index:
                t = _pick(t, dim, index[axis[0]])
        out[name if i is None else f"layers.{place[i]}.{rest}"] = t
    return out


def _pick(t: Tensor, dim: int, index: Tensor) -> Tensor:
    """index_select, as a view where the index is 0, 1, 2, ..."""
    if torch.equal(index, torch.arange(len(index))):
        return t.narrow(dim, 0, len(index))
    return t.index_select(dim, index.to(t.device))


@dataclass
class Masks:
    """Masks in [0, 1]: of the stream, of each layer by axis, and gamma, the weight of each layer's output."""

    d_model: Tensor
    layers: list[dict[str, Tensor]]
    gamma: list[Tensor]


def hard_masks(config: ModelConfig, widths: Widths) -> Masks:
    """1 for what is active, 0 for the rest."""

    def mask(n: int, index: Tensor) -> Tensor:
        return torch.zeros(n, dtype=torch.float64).index_fill(0, index, 1.0)

    units = kept_units(config, widths)
    size = {"F": config.d_ff, "A": config.n_heads, "H": config.mamba_heads, "P": config.mamba_head_dim}
    axes = {"-": "F", "*": "A", "M": "HP"}
    layers = [
        {a: mask(size[a], u[a] if u else torch.arange(size[a])) for a in axes[kind]}
        for kind, u in zip(config.pattern, units.layers, strict=True)
    ]
    gamma = [torch.tensor(float(u is not None), dtype=torch.float64) for u in units.layers]
    return Masks(mask(config.d_model, units.d_model), layers, gamma)


def derived_masks(kind: str, config: ModelConfig, m: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masks along every axis of a layer, from those of its units (`derived` does the same for indices)."""
    if kind == "-":
        return m
    if kind == "*":
        return {"Q": m["A"].repeat_interleave(config.attn_head_dim)}
    i = torch.outer(m["H"], m["P"]).flatten()
    ones = i.new_ones(2 * config.mamba_groups * config.d_state)
    return {"H": m["H"], "I": i, "E": torch.cat([i, ones]), "X": torch.cat([i, i, ones, m["H"]])}


def mask_weights(weights: dict[str, Tensor], config: ModelConfig, masks: Masks) -> dict[str, Tensor]:
    """Weights whose full-size model computes what the masked one would (eq. 20 to 51). Differentiable in both arguments.

    Masked are what the norms give and what the blocks write (D), z, x and dt of Mamba (X) with the convolution's bias
    (E), queries and what o_proj reads (Q), and the FFN's hidden layer (F). Norms are rescaled, see the module's docstring.
    """
    inside = [
        {"D": masks.d_model, **derived_masks(kind, config, m)} for kind, m in zip(config.pattern, masks.layers, strict=True)
    ]
    out = {}
    for name, i, rest, dims in named_dims(list(weights), config.pattern):
        mask, t = {"D": masks.d_model} if i is None else inside[i], weights[name]
        for dim, axis in enumerate(dims):
            if axis.endswith("*"):
                m = mask[axis[0]].to(t)
                m = m * masks.gamma[i].to(t) if rest in WRITERS and dim == 0 else m
                t = t * (m[:, None] if t.dim() == 2 and dim == 0 else m)
        if rest in NORMS:
            t = t * share(mask[NORMS[rest]]).sqrt().to(t)
        out[name] = t
    return out


def share(mask: Tensor) -> Tensor:
    """The share of an axis that is active; for a soft mask, as much as its mean square."""
    return mask.square().mean()


def masked_skeleton(config: ModelConfig, masks: Masks) -> HybridLM:
    """A full-size model without weights whose norms have the epsilon that goes with the masks."""
    skeleton = bare_model(config)
    for block, m in zip(skeleton.layers, masks.layers, strict=True):
        block.norm.eps = config.norm_eps * float(share(masks.d_model).detach())
        if block.kind == "M":
            block.mixer.norm_eps = config.norm_eps * float((share(m["H"]) * share(m["P"])).detach())
    skeleton.norm.eps = config.norm_eps * float(share(masks.d_model).detach())
    return skeleton


def bare_model(config: ModelConfig) -> HybridLM:
    """A model of a shape whose weights take no memory: for `functional_call`, or to be given weights."""
    with torch.device("meta"):
        return HybridLM(config)


def submodel(model: HybridLM, widths: Widths) -> HybridLM:
    """The smaller model inside a model, sharing its memory wherever a view can."""
    small = bare_model(shrink(model.config, widths)).requires_grad_(False)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    small.load_state_dict(take(weights, model.config, kept_units(model.config, widths)), assign=True)
    return small


# --------------------------------------------------------------------------------------------------- 2. importance


@dataclass
class Ranking:
    """Units of every axis, the most important first (heads within their groups), and layers, the least important first."""

    units: Units
    depth: list[int]


@torch.no_grad()
def rank(model: HybridLM, batches: list[dict[str, Tensor]], c: ElasticConfig, seed: int = 0) -> Ranking:
    """Rank all units by the scores that the settings name, from forward passes over calibration batches.

    Layers, which take a pass each, are ranked only where `depth_choices` can drop some.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    sums = activation_sums(model, batches)

    def order(scores: Tensor, kind: str, n_groups: int = 1) -> Tensor:
        if kind == "random":
            scores = torch.rand(scores.shape, generator=generator)
        within = scores.view(n_groups, -1).argsort(dim=1, descending=True, stable=True)
        return (within + torch.arange(n_groups)[:, None] * within.shape[1]).flatten()

    layers: list[dict[str, Tensor] | None] = []
    for i, kind in enumerate(config.pattern):
        if kind == "-":
            layers.append({"F": order(ffn_scores(model, sums, i, c.score_ffn), c.score_ffn)})
        elif kind == "*":
            layers.append({"A": order(attn_scores(model, sums, i, c.score_attn), c.score_attn, config.n_kv_heads)})
        else:
            heads, channels = mamba_scores(model, sums, i, c.score_mamba)
            layers.append({"H": order(heads, c.score_mamba, config.mamba_groups), "P": order(channels, c.score_mamba)})
    units = Units(order(stream_scores(model, sums, c.score_d_model), c.score_d_model), layers)
    n = len(layers)
    is_elastic = any(depth < n for depth in c.depth_choices)
    return Ranking(units, rank_layers(model, batches, c.score_depth, generator) if is_elastic else list(range(n)))


@torch.no_grad()
def order_weights(model: HybridLM, ranking: Ranking) -> None:
    """Permute the weights of a model, in place, so that the best units come first. Its function does not change."""
    model.load_state_dict(take(model.state_dict(), model.config, ranking.units))


def activation_sums(model: HybridLM, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Over all tokens, for each channel: sums of |x| of what the norms give, and of x^2 of what matrices read and give.

    Keys: `layers.I.norm` and `norm`; `layers.I.mixer.NAME.in` and `.out` for each matrix of a mixer; `....abs` for |x|.
    """
    sums: dict[str, Tensor] = {}

    def add(key: str, x_BTE: Tensor) -> None:
        x = x_BTE.detach().flatten(0, 1).double()
        for name, value in ((key, x.square().sum(0)), (f"{key}.abs", x.abs().sum(0))):
            sums[name] = sums.get(name, 0) + value.cpu()

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("layers."):
            hooks.append(module.register_forward_pre_hook(lambda _, args, n=name: add(f"{n}.in", args[0])))
            hooks.append(module.register_forward_hook(lambda _, args, out, n=name: add(f"{n}.out", out)))
        elif name.split(".")[-1] == "norm":
            hooks.append(module.register_forward_hook(lambda _, args, out, n=name: add(n, out)))
    for batch in batches:
        model(batch["tokens_BT"], ids_BT=batch["ids_BT"])
    for hook in hooks:
        hook.remove()
    return sums


def stream_scores(model: HybridLM, sums: dict[str, Tensor], kind: str) -> Tensor:
    """Channels of the stream. paper: sum of |norm(x)_i| over all norms (eq. 1); output: times the size of what reads i."""
    readers = {"norm": [model.output_matrix]}
    for name, i, _, dims in named_dims([n for n, _ in model.named_parameters()], model.config.pattern):
        if i is not None and dims[1:] == ["D"]:
            readers.setdefault(f"layers.{i}.norm", []).append(model.get_parameter(name))
    total = torch.zeros(model.config.d_model, dtype=torch.float64)
    for norm, matrices in readers.items():
        size = torch.cat(matrices).double().norm(dim=0).cpu() if kind == "output" else 1.0
        total += sums[f"{norm}.abs"] * size
    return total


def ffn_scores(model: HybridLM, sums: dict[str, Tensor], i: int, kind: str) -> Tensor:
    """FFN neurons. paper: sum of |X W1_i^T| before the activation (eq. 2); output: size of what it adds to the stream."""
    if kind == "output":
        return _contribution(model, sums, i, "down_proj")
    return sums[f"layers.{i}.mixer.up_proj.out.abs"]


def mamba_scores(model: HybridLM, sums: dict[str, Tensor], i: int, kind: str) -> tuple[Tensor, Tensor]:
    """Mamba heads and head channels, from a size per (head, channel).

    paper: of s = norm(X) W_x^T; a channel's score is its norm over all heads (eq. 3), a head's is its norm over the better
    half of the channels (eq. 4). output: the same from what each adds to the stream.
    """
    config = model.config
    if kind == "output":
        square = _contribution(model, sums, i, "out_proj").square()
    else:
        inner = config.mamba_heads * config.mamba_head_dim
        square = sums[f"layers.{i}.mixer.in_proj.out"][inner : 2 * inner]
    square_HP = square.view(config.mamba_heads, config.mamba_head_dim)
    channels = square_HP.sum(0).sqrt()
    top = channels.argsort(descending=True)[: -(-len(channels) // 2)]
    return square_HP[:, top].sum(1).sqrt(), channels


def attn_scores(model: HybridLM, sums: dict[str, Tensor], i: int, kind: str) -> Tensor:
    """Query heads. paper: size of the head's queries; output: size of what the head adds to the stream."""
    square = _contribution(model, sums, i, "o_proj").square() if kind == "output" else sums[f"layers.{i}.mixer.q_proj.out"]
    return square.view(model.config.n_heads, model.config.attn_head_dim).sum(1).sqrt()


def _contribution(model: HybridLM, sums: dict[str, Tensor], i: int, matrix: str) -> Tensor:
    """Root of the sum over tokens of |x_j W_j|^2: how much input j of the matrix that writes to the stream adds to it."""
    weight = getattr(model.layers[i].mixer, matrix).weight
    return sums[f"layers.{i}.mixer.{matrix}.in"].sqrt() * weight.detach().double().norm(dim=0).cpu()


def rank_layers(model: HybridLM, batches: list[dict[str, Tensor]], kind: str, generator: torch.Generator) -> list[int]:
    """Layers, the least important first. s_j = sum (M_full - M_-j)^2 / sum M_full^2 on the logits (eq. 5)."""
    n = len(model.layers)
    if kind == "random":
        return torch.randperm(n, generator=generator).tolist()
    full = [_logits(model, batch, set()) for batch in batches]
    size = sum(f.square().sum() for f in full)

    def score(without: set[int]) -> float:
        changed = (_logits(model, batch, without) for batch in batches)
        return float(sum((f - c).square().sum() for f, c in zip(full, changed, strict=True)) / size)

    if kind == "paper":
        return sorted(range(n), key=lambda j: score({j}))
    removed: list[int] = []
    while len(removed) < n:
        removed.append(min((j for j in range(n) if j not in removed), key=lambda j: score({*removed, j})))
    return removed


def _logits(model: HybridLM, batch: dict[str, Tensor], without: set[int]) -> Tensor:
    """Logits with some layers skipped."""
    kept = [block for i, block in enumerate(model.layers) if i not in without]
    whole = model.layers
    model.layers = nn.ModuleList(kept)
    try:
        hidden_BTD, _ = model(batch["tokens_BT"], ids_BT=batch["ids_BT"])
    finally:
        model.layers = whole
    return model.logits(hidden_BTD)


# ------------------------------------------------------------------------------------------------------ 3. routers

AXES = ("d_model", "depth", "ffn", "mamba_heads", "mamba_channels", "attn_heads")
KIND_OF = {"ffn": "-", "mamba_heads": "M", "mamba_channels": "M", "attn_heads": "*"}
TABLES = {"-": "ffn", "*": "attention", "M": "mamba"}
Choice = dict[str, list[int]]  # for each axis the index of the width chosen, one for all layers or one for each of its kind


class Space:
    """Everything that can be chosen: for each axis its widths, the largest first, and how many decisions it takes."""

    def __init__(self, config: ModelConfig, c: ElasticConfig):
        require(
            not config.widths,
            "elastic cannot start from a model whose layers have widths of their own, as one cut out of a family has; "
            "start from its parent",
        )
        n = len(config.pattern)
        self.config = config
        self.layers = {axis: [i for i, k in enumerate(config.pattern) if k == kind] for axis, kind in KIND_OF.items()}
        self.choices = {
            "d_model": _choices("d_model", c.d_model_choices, config.d_model, 8, 4),
            "depth": _choices("depth", c.depth_choices or (n,), n, 1, 1),
            "ffn": _choices("ffn", c.ffn_choices, config.d_ff, 24, 6),
            "mamba_heads": _choices("mamba_head", c.mamba_head_choices, config.mamba_heads, 8, 4, config.mamba_groups),
            "mamba_channels": _choices("mamba_channel", c.mamba_channel_choices, config.mamba_head_dim, 4, 2),
            "attn_heads": _choices("attn_head", c.attn_head_choices, config.n_heads, config.n_heads, config.n_heads // 2,
                                   config.n_kv_heads),
        }  # fmt: skip
        self.choices = {a: w for a, w in self.choices.items() if self.layers.get(a, [0])}
        self.shared = {a: a not in c.heterogeneous for a in self.choices}

    def n_decisions(self, axis: str) -> int:
        """One for the stream, for the depth and for an axis whose layers share their width, else one for each layer."""
        return 1 if axis not in KIND_OF or self.shared[axis] else len(self.layers[axis])

    def extreme(self, smallest: bool = False) -> Choice:
        """The full model, or the smallest one."""
        return {a: [len(w) - 1 if smallest else 0] * self.n_decisions(a) for a, w in self.choices.items()}

    def decision(self, axis: str, i: int) -> int:
        """Which decision of an axis holds for layer i."""
        return 0 if self.shared[axis] else self.layers[axis].index(i)

    def axes_of(self, i: int) -> tuple[str, ...]:
        """The axes that layer i has, in the order of `WIDTH_FIELDS`."""
        return tuple(axis for axis, kind in KIND_OF.items() if kind == self.config.pattern[i])

    def widths(self, choice: Choice, depth_order: list[int]) -> Widths:
        """What a choice keeps. depth_order: layers, the first to go first."""
        gone = set(depth_order[: len(self.config.pattern) - self.choices["depth"][choice["depth"][0]]])
        layers = tuple(
            () if i in gone else tuple(self.choices[a][choice[a][self.decision(a, i)]] for a in self.axes_of(i))
            for i in range(len(self.config.pattern))
        )
        return Widths(self.choices["d_model"][choice["d_model"][0]], layers)

    def gamma(self, p_depth: Tensor, depth_order: list[int]) -> list[Tensor]:
        """Probability that each layer is kept, from that of each depth."""
        n = len(depth_order)
        kept = [torch.tensor([float(depth_order.index(i) >= n - d) for d in self.choices["depth"]]) for i in range(n)]
        return [p_depth @ k.to(p_depth) for k in kept]

    def masks(self, p: dict[str, Tensor], depth_order: list[int]) -> Masks:
        """Sum of the masks of all widths, weighted by p: probabilities, or 1 for the width that is chosen."""
        c = self.config
        groups = {"mamba_heads": (c.mamba_heads, c.mamba_groups), "attn_heads": (c.n_heads, c.n_kv_heads)}
        sizes = {"d_model": c.d_model, "ffn": c.d_ff, "mamba_channels": c.mamba_head_dim}

        def table(axis: str) -> Tensor:
            n, k = groups.get(axis, (sizes.get(axis, 0), 1))
            return torch.stack([torch.zeros(n).index_fill(0, in_groups(w, n, k), 1.0) for w in self.choices[axis]])

        def mask(axis: str, i: int) -> Tensor:
            weight = p[axis][self.decision(axis, i)]
            return weight @ table(axis).to(weight)

        letter = {"ffn": "F", "mamba_heads": "H", "mamba_channels": "P", "attn_heads": "A"}
        layers = [{letter[a]: mask(a, i) for a in self.axes_of(i)} for i in range(len(c.pattern))]
        stream = p["d_model"][0] @ table("d_model").to(p["d_model"])
        return Masks(stream, layers, self.gamma(p["depth"][0], depth_order))


def _choices(name: str, given: tuple[int, ...], full: int, n_steps: int, n_least: int, unit: int = 1) -> tuple[int, ...]:
    """Widths to choose from, the largest first: those given, checked, or k / n_steps of the full width from n_least on.

    unit: what every width must be a multiple of. Raises ValueError for a width that does not fit.
    """
    if not given:
        steps = {max(unit, full * k // n_steps // unit * unit) for k in range(max(1, n_least), n_steps + 1)}
        return tuple(sorted(steps, reverse=True))
    for w in given:
        require(1 <= w <= full, f"elastic.{name}_choices ({w}) must lie between 1 and the full model's {full}")
        require(
            w % unit == 0,
            f"elastic.{name}_choices ({w}) must be a multiple of the number of groups ({unit}), so that all groups keep "
            f"the same count; nearest is {max(unit, round(w / unit) * unit)}",
        )
    require(full in given, f"elastic.{name}_choices {given} must contain the full model's {full}")
    return tuple(sorted(set(given), reverse=True))


class Costs(nn.Module):
    """What each choice costs, as tables: for each width of the stream, of what is outside the layers, and of each layer.

    A layer's table has an axis for the stream and one for each of its own axes, so any cost will do, a measured one too.
    The expected cost under independent choices is exact: tables weighted by products of probabilities.
    """

    def __init__(self, space: Space, measure: Callable[[str, ModelConfig], float]):
        super().__init__()
        self.space = space
        config, streams = space.config, space.choices["d_model"]
        outside = [measure("", replace(config, d_model=d)) for d in streams]
        self.register_buffer("outside", torch.tensor(outside, dtype=torch.float64))
        for kind in sorted(set(config.pattern)):
            axes = [a for a in KIND_OF if KIND_OF[a] == kind]
            shape = [len(streams), *(len(space.choices[a]) for a in axes)]
            table = torch.zeros(shape, dtype=torch.float64)
            for at in torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, len(shape)).tolist():
                own = {WIDTH_FIELDS[kind][j]: space.choices[a][at[1 + j]] for j, a in enumerate(axes)}
                table[tuple(at)] = measure(kind, replace(config, d_model=streams[at[0]], **own))
            self.register_buffer(TABLES[kind], table)

    def table(self, i: int) -> Tensor:
        """Of layer i."""
        return getattr(self, TABLES[self.space.config.pattern[i]])

    def expected(self, p: dict[str, Tensor], depth_order: list[int]) -> Tensor:
        """Expected cost under probabilities [decisions, widths] of every axis."""
        stream = p["d_model"][0].double()
        total = stream @ self.outside
        for i, gamma in enumerate(self.space.gamma(p["depth"][0], depth_order)):
            t = torch.tensordot(stream, self.table(i), dims=1)
            for axis in self.space.axes_of(i):
                t = torch.tensordot(p[axis][self.space.decision(axis, i)].double(), t, dims=1)
            total = total + gamma.double() * t
        return total

    def exact(self, choice: Choice, depth_order: list[int]) -> float:
        """Cost of one choice."""
        return self.pricer(depth_order)(choice)

    def pricer(self, depth_order: list[int]) -> Callable[[Choice], float]:
        """The cost of a choice as a function, for many choices: it looks up plain lists, not tensors."""
        s, outside = self.space, self.outside.tolist()
        lists = {kind: getattr(self, TABLES[kind]).tolist() for kind in set(s.config.pattern)}
        layers = [(lists[kind], [(a, s.decision(a, i)) for a in s.axes_of(i)]) for i, kind in enumerate(s.config.pattern)]

        def price(choice: Choice) -> float:
            d, total = choice["d_model"][0], 0.0
            for i in depth_order[len(depth_order) - s.choices["depth"][choice["depth"][0]] :]:
                table, axes = layers[i]
                cost = table[d]
                for axis, j in axes:
                    cost = cost[choice[axis][j]]
                total += cost
            return outside[d] + total

        return price


def cost_measure(c: ElasticConfig, device: torch.device) -> Callable[[str, ModelConfig], float]:
    """Cost of a part of the model in the unit of `elastic.cost`: parameters, bytes, FLOPs a token, microseconds a token."""
    if c.cost == "parameters":
        return lambda kind, shape: float(part_parameters(kind, shape))
    if c.cost == "flops":
        return lambda kind, shape: part_flops(kind, shape, c.cost_len)
    if c.cost == "memory":
        return lambda kind, shape: float(
            part_parameters(kind, shape) * c.cost_bytes
            + c.cost_batch * part_cache_bytes(kind, shape, c.cost_len, c.cost_bytes)
        )
    return lambda kind, shape: part_latency_us(kind, shape, c.cost_batch, device)


def total_cost(config: ModelConfig, c: ElasticConfig, device: torch.device) -> float:
    """Cost of a whole model, of any shape."""
    return sum_of_parts(cost_measure(c, device), config)


@torch.no_grad()
def part_latency_us(kind: str, shape: ModelConfig, n_rows: int, device: torch.device, n_tokens: int = 64) -> float:
    """Measured microseconds a token of a forward pass of a layer (kind "": of the output matrix); median of seven."""
    part = Block(kind, shape) if kind else nn.Linear(shape.d_model, shape.vocab_size, bias=False)
    part, x_BTD = part.to(device), torch.randn(n_rows, n_tokens, shape.d_model, device=device)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        part(x_BTD, None, None) if kind else part(x_BTD)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[3] * 1e6 / (n_rows * n_tokens)


class Router(nn.Module):
    """For a budget, logits over the widths of every axis: one-hot budget -> Linear -> LeakyReLU -> Linear, an MLP an axis.

    It carries all that a checkpoint needs to choose: budgets, cost tables, and the order in which layers go.
    """

    def __init__(self, space: Space, c: ElasticConfig, costs: Costs, depth_order: list[int]):
        super().__init__()
        self.space, self.costs, self.settings = space, costs, c
        self.register_buffer("depth", torch.tensor(depth_order))
        self.mlps = nn.ModuleDict()
        for axis, widths in space.choices.items():
            n = space.n_decisions(axis)
            last = nn.Linear(c.router_width, n * len(widths))
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            with torch.no_grad():
                last.bias.view(n, -1)[:, 0] = c.router_bias
            self.mlps[axis] = nn.Sequential(nn.Linear(len(c.budgets), c.router_width), nn.LeakyReLU(0.1), last)

    @property
    def depth_order(self) -> list[int]:
        """Layers, the first to go first."""
        return self.depth.tolist()

    def forward(self, budget: float) -> dict[str, Tensor]:
        """Logits [decisions, widths] of every axis."""
        x = self.one_hot(budget).to(self.mlps["d_model"][0].weight)
        return {a: mlp(x).view(self.space.n_decisions(a), -1) for a, mlp in self.mlps.items()}

    def one_hot(self, budget: float) -> Tensor:
        """The budget as the routers read it: one-hot for a trained one, a mixture of its two neighbours in between.

        Raises ValueError for a budget outside of the trained ones.
        """
        trained = [self.fraction(b) for b in self.settings.budgets]
        b = self.fraction(budget)
        require(
            trained[-1] - 1e-9 <= b <= trained[0] + 1e-9,
            f"budget ({budget:g}) is unknown: this model was trained for {', '.join(f'{t:g}' for t in trained)} of the "
            f"full {self.settings.cost}, and for what lies between; choose one of those",
        )
        x = torch.zeros(len(trained))
        above = max(i for i, t in enumerate(trained) if t >= b - 1e-9)
        below = min(above + 1, len(trained) - 1)
        weight = 1.0 if above == below else (b - trained[below]) / (trained[above] - trained[below])
        x[above] += weight
        x[below] += 1 - weight
        return x

    def fraction(self, budget: float) -> float:
        """A budget as a fraction of the full model's cost; above 1 it is an absolute cost."""
        return budget if budget <= 1 else budget / self.full_cost

    @property
    def full_cost(self) -> float:
        """Cost of the full model."""
        return self.costs.exact(self.space.extreme(), self.depth_order)

    def check_budgets(self) -> None:
        """Raises ValueError for a budget above the full model, or below the smallest that can be reached."""
        full, least = self.full_cost, self.costs.exact(self.space.extreme(smallest=True), self.depth_order)
        for b in self.settings.budgets:
            require(
                self.fraction(b) <= 1 + 1e-9,
                f"elastic.budgets ({b:g}) is more than the full model's {full:g} {self.settings.cost}; lower it",
            )
            require(
                self.fraction(b) >= least / full,
                f"elastic.budgets ({b:g}) is below the smallest model that the choices can make: {least:g} "
                f"{self.settings.cost}, {least / full:.3f} of the full model (above 1 a budget is an absolute cost); "
                "raise it, or give smaller choices",
            )

    def is_full(self, budget: float) -> bool:
        """Whether a budget is that of the full model, which needs no router."""
        return self.fraction(budget) >= 1 - 1e-9

    @torch.no_grad()
    def choose(self, budget: float) -> Widths:
        """The widths for a budget: the likeliest choice, without noise, repaired to meet the budget.

        Raises ValueError for a budget outside of the trained ones.
        """
        self.one_hot(budget)
        if self.is_full(budget):
            return full_widths(self.space.config)
        if self.settings.choose == "fixed":
            choice = by_hand(self, budget)
        else:
            choice = fit_to_budget({a: v.log_softmax(-1) for a, v in self(budget).items()}, self, budget)
        return self.space.widths(choice, self.depth_order)


def fit_to_budget(logp: dict[str, Tensor], router: Router, budget: float, tolerance: float = 0.005) -> Choice:
    """The likeliest choice, changed where it must be to cost what the budget says.

    The steps of the stream's width and of the depth are too coarse to aim with: for each of these, the widths inside the
    layers are brought near the budget. The likeliest result within the tolerance is taken, and where there is none, the
    nearest one, after changing two widths at once where one alone came no nearer.
    """
    scores = {a: v.tolist() for a, v in logp.items()}
    likeliest = {a: [max(range(len(row)), key=row.__getitem__) for row in rows] for a, rows in scores.items()}
    target = router.fraction(budget) * router.full_cost
    near = tolerance * target

    def price(result: tuple[Choice, float]) -> tuple[float, float]:
        choice, gap = result
        return max(gap, near), -sum(row[k] for a in scores for row, k in zip(scores[a], choice[a], strict=True))

    cost = router.costs.pricer(router.depth_order)
    for n_at_once in (1, 2):
        results = []
        for d, n in itertools.product(range(len(scores["d_model"][0])), range(len(scores["depth"][0]))):
            start = {**likeliest, "d_model": [d], "depth": [n]}
            results.append(_approach(start, scores, cost, target, near, n_at_once))
        choice, gap = min(results, key=price)
        if gap <= near:
            break
    return choice


def _approach(
    choice: Choice, scores: dict[str, list], cost: Callable[[Choice], float], target: float, near: float, n_at_once: int
) -> tuple[Choice, float]:
    """Change what is chosen inside the layers until its cost is within `near` of the target, or nothing comes nearer.

    Each time, of all changes of up to n_at_once decisions, that one is made which loses least log-probability for each
    unit that it comes nearer. Returns the choice, and its distance from the target.
    """
    single = [(a, j, k) for a in scores if a in KIND_OF for j, row in enumerate(scores[a]) for k in range(len(row))]
    gap = abs(cost(choice) - target)
    while gap > near:
        best = None
        for n in range(1, n_at_once + 1):
            for changes in itertools.combinations(single, n) if best is None else ():
                changed = {a: list(v) for a, v in choice.items()}
                for a, j, k in changes:
                    changed[a][j] = k
                new_gap = abs(cost(changed) - target)
                if new_gap < gap - 1e-9:
                    loss = sum(scores[a][j][choice[a][j]] - scores[a][j][changed[a][j]] for a, j, _ in changes)
                    if best is None or loss / (gap - new_gap) < best[0]:
                        best = (loss / (gap - new_gap), changed, new_gap)
        if best is None:
            break
        _, choice, gap = best
    return choice, gap


def by_hand(router: Router, budget: float) -> Choice:
    """Every width by about the same factor, all layers kept: what one would choose without a router."""
    space, cost = router.space, router.costs.pricer(router.depth_order)
    full_cost, fraction = router.full_cost, router.fraction(budget)

    def logp(factor: float) -> dict[str, Tensor]:
        full = {a: float(w[0]) for a, w in space.choices.items()}
        aim = {a: (1.0, 1e6) if a == "depth" else (factor, 10.0) for a in full}
        rows = {a: -(torch.tensor(w) / full[a] - aim[a][0]).abs() * aim[a][1] for a, w in space.choices.items()}
        return {a: row.expand(space.n_decisions(a), -1) for a, row in rows.items()}

    def off(factor: float) -> float:
        choice = {a: v.argmax(-1).tolist() for a, v in logp(factor).items()}
        return abs(cost(choice) / full_cost - fraction)

    return fit_to_budget(logp(min((k / 100 for k in range(1, 101)), key=off)), router, budget)


def probabilities(logits: dict[str, Tensor], noise: dict[str, Tensor], scale: float, tau: float) -> dict[str, Tensor]:
    """Gumbel-softmax: softmax((scale logits + noise) / tau) over the widths of each decision (eq. 8 to 10)."""
    return {a: torch.softmax((scale * v + noise[a]) / tau, dim=-1) for a, v in logits.items()}


def mask_weighting(p: dict[str, Tensor], mode: str) -> dict[str, Tensor]:
    """How much each width's mask counts: see `elastic.mask`."""
    if mode == "soft":
        return p
    hard = {a: F.one_hot(v.argmax(-1), v.shape[-1]).to(v) for a, v in p.items()}
    if mode == "top1":
        return {a: hard[a] * v for a, v in p.items()}
    return {a: hard[a] + v - v.detach() for a, v in p.items()}


def budget_loss(router: Router, p: dict[str, Tensor], budget: float) -> Tensor:
    """|E C(a) / (b C_full) - 1| beyond the dead zone: the relative form of eq. 11 and 12, on all axes jointly."""
    ratio = router.costs.expected(p, router.depth_order) / (router.fraction(budget) * router.full_cost)
    return F.relu((ratio - 1).abs() - router.settings.dead_zone)


# ------------------------------------------------------------------------------------------------- 4. distillation


class Distillation(Objective):
    """A model learns from a frozen teacher, from the text, or from both (eq. 13 to 16)."""

    def __init__(self, c: ElasticConfig, teacher: HybridLM | None):
        self.c, self.teacher = c, teacher

    def loss(self, model: HybridLM, batch: dict) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Sum over tokens of kl KL(teacher || model) + ce CE."""
        hidden_BTD, _ = model(batch["tokens_BT"], ids_BT=batch["ids_BT"])
        total, n_tokens = self.task(hidden_BTD, model.output_matrix, batch, [(self.c.kl, self.teacher)], self.c.ce)
        return total, n_tokens, {}

    def task(
        self, hidden_BTd: Tensor, head_Vd: Tensor, batch: dict, teachers: list[tuple[float, HybridLM]], ce: float
    ) -> tuple[Tensor, int]:
        """Sum over tokens of the weighted divergences from the teachers and of the cross-entropy; number of targets."""
        target = batch["targets_BT"].flatten()
        inside = target != -100
        hidden_Xd, total = hidden_BTd.flatten(0, 1)[inside], hidden_BTd.new_zeros(())
        for weight, teacher in teachers:
            if weight:
                with torch.no_grad():
                    wanted_XD = teacher(batch["tokens_BT"], ids_BT=batch["ids_BT"])[0].flatten(0, 1)[inside]
                matrix_VD = teacher.output_matrix.detach()
                total = total + weight * kl_divergence(wanted_XD, matrix_VD, hidden_Xd, head_Vd, self.c.kl_temperature)
        if ce:
            total = total - ce * selected_logp(hidden_Xd, head_Vd, target[inside]).sum()
        return total, int(inside.sum())


class Elastic(Distillation):
    """L = L_task(theta) + lambda L_router(psi) (eq. 17), each sequence at its own budget, as an objective for `loop.fit`.

    In the first `search_share` of the steps routers and weights learn together, on masks; afterwards the routers' choices
    stay as they are, and each budget runs on its slice of the weights.
    """

    runs_whole = True

    def __init__(self, c: ElasticConfig, router: Router, teacher: HybridLM):
        super().__init__(c, teacher)
        ours, theirs = router.space.config.vocab_size, teacher.config.vocab_size
        require(
            ours == theirs, f"the teacher has {theirs} tokens in its vocabulary, the model {ours}; they must be the same"
        )
        self.router, self.step = router, 0
        self.n_search = round(c.search_share * c.steps) if c.choose == "router" else 0
        self.stage1: HybridLM | None = None  # the weights at the end of stage 1, to see what stage 2 brings
        self.widths: dict[float, Widths] = {}
        self.bare: dict[float, HybridLM] = {}

    def prepare(self, model: HybridLM, batch: dict[str, Tensor], generator: torch.Generator) -> dict:
        """Draw the Gumbel noise of every decision, for every budget."""

        def gumbel(*shape: int) -> Tensor:
            return -torch.empty(shape, device=generator.device).exponential_(generator=generator).log()

        space = self.router.space
        noise = {b: {a: gumbel(space.n_decisions(a), len(w)) for a, w in space.choices.items()} for b in self.c.budgets}
        return {**batch, "noise": noise}

    def loss(self, model: HybridLM, batch: dict) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Sum over tokens of the task loss at each sequence's budget, plus lambda times the budget loss of all budgets."""
        c, self.step = self.c, int(batch["step_B"][0])
        weights, count, total, metrics = dict(model.named_parameters()), 0, 0.0, {}
        p = self.choices(batch["noise"]) if self.step < self.n_search else {}
        for n, budget in enumerate(c.budgets):
            rows = (batch["budget_B"] == n).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            part = {k: batch[k][rows] for k in ("tokens_BT", "targets_BT", "ids_BT")}
            hidden_BTD, head_VD = self.run(model, weights, p.get(budget), budget, part)
            is_full = self.router.is_full(budget)
            teachers = [(c.kl, self.teacher), (0.0 if is_full else c.self_kl, model)]
            part_loss, n_tokens = self.task(hidden_BTD, head_VD, part, teachers, c.ce + is_full * c.full_ce)
            total, count = total + part_loss, count + n_tokens
            metrics[f"loss_{budget:g}"] = part_loss.detach() / n_tokens
        if p:
            with parallel.exactly():
                off = torch.stack([budget_loss(self.router, p[b], b) for b in p])
            total = total + c.router_weight * off.sum() * count
            metrics["budget_loss"] = off.mean().detach()
        return total, count, metrics

    def choices(self, noise: dict) -> dict[float, dict[str, Tensor]]:
        """Probabilities of all widths at this step, for every budget but the full one."""
        c, at = self.c, self.step / max(1, self.n_search - 1)
        tau = c.gumbel_tau[0] * (c.gumbel_tau[1] / c.gumbel_tau[0]) ** at
        scale = c.logit_scale[0] + (c.logit_scale[1] - c.logit_scale[0]) * at
        smaller = [b for b in c.budgets if not self.router.is_full(b)]
        with parallel.exactly():
            return {b: probabilities(self.router(b), noise[b], scale, tau) for b in smaller}

    def run(self, model: HybridLM, weights: dict, p: dict | None, budget: float, batch: dict) -> tuple[Tensor, Tensor]:
        """Final hidden states of the model of a budget, and its output matrix: masked where p is given, else sliced."""
        network = model
        if p is not None:
            with parallel.exactly():
                masks = self.router.space.masks(mask_weighting(p, self.c.mask), self.router.depth_order)
                weights, network = mask_weights(weights, model.config, masks), masked_skeleton(model.config, masks)
        elif not self.router.is_full(budget):
            if budget not in self.widths:
                self.widths[budget] = self.router.choose(budget)
                self.bare[budget] = bare_model(shrink(model.config, self.widths[budget]))
            network = self.bare[budget]
            weights = take(weights, model.config, kept_units(model.config, self.widths[budget]))
        call = parallel.recomputed(functional_call)
        hidden_BTD, _ = call(network, weights, (batch["tokens_BT"],), {"ids_BT": batch["ids_BT"]})
        return hidden_BTD, weights.get("head.weight", weights["embed.weight"])

    def after_step(self, model: HybridLM) -> None:
        """Keep the weights at the end of stage 1."""
        if self.step + 1 == self.c.stage_1_steps():
            self.stage1 = parallel.frozen_copy(model)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The routers have a rate of their own."""
        if self.n_search == 0:
            return []
        return [torch.optim.AdamW(self.router.parameters(), lr=self.c.router_lr, weight_decay=0.0)]

    def networks(self) -> dict[str, nn.Module]:
        """The router, and the weights at the end of stage 1 once that has come."""
        return {"router": self.router} | ({} if self.stage1 is None else {"stage1": self.stage1})

    def expect(self, model: HybridLM, names: list[str]) -> None:
        """A checkpoint of stage 2 holds the end of stage 1."""
        if "stage1" in names:
            self.stage1 = parallel.frozen_copy(model)


def kl_divergence(
    teacher_XD: Tensor, teacher_VD: Tensor, student_Xd: Tensor, student_Vd: Tensor, temperature: float, at_once: int = 2**24
) -> Tensor:
    """Sum over positions of KL(teacher || student), both softmax(logits / temperature), in nats (eq. 14).

    Takes hidden states and output matrices: logits are made for at most `at_once` numbers at a time, and made again in
    the backward pass if that takes more than one piece.
    """

    def piece(teacher_xD: Tensor, student_xd: Tensor) -> Tensor:
        wanted = F.log_softmax(F.linear(teacher_xD, teacher_VD) / temperature, dim=-1)
        given = F.log_softmax(F.linear(student_xd, student_Vd) / temperature, dim=-1)
        return F.kl_div(given, wanted, reduction="sum", log_target=True)

    n = max(1, math.ceil(len(teacher_XD) * len(teacher_VD) / at_once))
    if n == 1:
        return piece(teacher_XD, student_Xd)
    pairs = zip(teacher_XD.chunk(n), student_Xd.chunk(n), strict=True)
    return sum(recompute(piece, t, s, use_reentrant=False) for t, s in pairs)


# --------------------------------------------------------------------------------------------------- 5. deployment


def build_router(config: ModelConfig, c: ElasticConfig, depth_order: list[int], device: torch.device) -> Router:
    """A router over the choices of a model. Raises ValueError for choices or budgets that do not fit."""
    space = Space(config, c)
    router = Router(space, c, Costs(space, cost_measure(c, device)), depth_order).to(device)
    router.check_budgets()
    return router


def unmeasured_router(config: ModelConfig, c: ElasticConfig) -> Router:
    """A router that knows no costs yet: to be loaded, or to be counted."""
    space = Space(config, c)
    return Router(space, c, Costs(space, lambda *_: 0.0), list(range(len(config.pattern))))


def load_family(run_dir: Path) -> tuple[HybridLM, Router, Corpus, Config]:
    """An elastic run's model, router, corpus and settings. Raises ValueError for a run without a router."""
    from train import load_run

    model, corpus, config = load_run(run_dir)
    found = checkpoint.newest(run_dir)
    require(
        "router" in found.networks(),
        f"{run_dir} has no router, so it holds one size only; give the folder of a run of --mode elastic",
    )
    router = unmeasured_router(model.config, config.elastic)
    checkpoint.load_weights(router, found.tensors("router"), found.path)
    return model, router, corpus, config


def extract(run_dir: Path, budget: float, out: Path) -> dict:
    """Write the model of a budget as a run folder of its own. Returns its facts. Raises ValueError before it writes."""
    require(not (out / "config.json").exists(), f"out ({out}) already holds a run; choose another --out")
    model, router, _, config = load_family(run_dir)
    began = time.perf_counter()
    widths = router.choose(budget)
    small = submodel(model, widths)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(out, 0, {"model": small}, [], {"extracted_from": str(run_dir), "budget": budget})
    facts = {"extracted_from": str(run_dir), "budget": budget, "parameters": count_parameters(small),
             "widths": asdict(widths), "seconds": time.perf_counter() - began}  # fmt: skip
    text = {**facts, "config": replace(config, model=small.config, init=str(run_dir)).to_dict()}
    (out / "config.json").write_text(json.dumps(text, indent=1) + "\n")
    if (run_dir / "hf").is_dir():  # the tokenizer, where it is not one that the corpus brings
        shutil.copytree(run_dir / "hf", out / "hf")
    return facts


def main(argv: list[str] | None = None) -> int:
    """`python elastic.py extract RUN --budget B --out DIR`, `python elastic.py scores RUN`. Returns 0, or 2 if refused."""
    import tyro

    def run_extract(run: tyro.conf.Positional[Path], budget: float, out: Path) -> None:
        """Cut the model of one budget out of an elastic run; nothing is trained.

        Args:
            run: Folder of a run of --mode elastic.
            budget: A fraction of the full model's cost, or above 1 an absolute cost.
            out: Folder to write; generate.py and --init take it like any run.
        """
        facts = extract(run, budget, out)
        print(f"{out}: {facts['parameters']:,} parameters in {facts['seconds']:.2f} s, {facts['widths']}")

    def run_scores(run: tyro.conf.Positional[Path]) -> None:
        """Compare the importance scores of every axis on a trained model (a base, or any other run).

        Args:
            run: Folder of the run.
        """
        from evals import score_table
        from train import load_run

        for axis, losses in score_table(*load_run(run)).items():
            print(f"{axis:>15}  " + "  ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items()))

    commands = {"extract": run_extract, "scores": run_scores}
    return exit_code(lambda: tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog="elastic.py"))


if __name__ == "__main__":
    sys.exit(main())
