"""Models inside a model: what a smaller one consists of; to permute, cut and mask (Nemotron
Elastic, arXiv 2511.16664).

Every unit of the model belongs to an axis: channels of the residual stream (D), FFN neurons (F),
Mamba heads (H) and their channels (P), query heads (A), layers. `DIMS` says along which axis each
dimension of each weight runs. To permute, to cut and to mask a model are then three loops over that
one table. A smaller model is the first units of every axis.

A masked model equals the sliced one exactly: masked channels are zero in the residual stream, and
the mean in every RMSNorm is taken over the active ones. With a share s of the channels active that
is the same as the norm over all of them with weight sqrt(s) w and epsilon s eps, so masks touch
weights only, and the model's code does not know of them.

How to read: `DIMS`; `take`, which permutes and cuts; `rotate`, which turns the stream;
`mask_weights`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model import HybridLM
from system.config import WIDTH_FIELDS, ModelConfig
from system.errors import require

# The axis of every dimension of every weight ("." has none); a mask multiplies the dimensions with
# a star. Derived axes: I, the heads' channels (H x P); E, the convolution's (I and B, C); X, the
# rows of in_proj (z and x over I, B and C, dt over H); Q, the query heads' channels. Norms take the
# square root of the active share besides.
OUTER = {"embed.weight": ". D*", "norm.weight": "D*", "head.weight": ". D"}


DIMS = {
    "-": {
        "norm.weight": "D*",
        "mixer.up_proj.weight": "F D",
        "mixer.gate_proj.weight": "F D",
        "mixer.down_proj.weight": "D* F*",
    },
    "*": {
        "norm.weight": "D*",
        "mixer.q_proj.weight": "Q* D",
        "mixer.k_proj.weight": ". D",
        "mixer.v_proj.weight": ". D",
        "mixer.o_proj.weight": "D* Q*",
        "mixer.q_norm.weight": ".",
        "mixer.k_norm.weight": ".",
    },
    "M": {
        "norm.weight": "D*",
        "mixer.in_proj.weight": "X* D",
        "mixer.conv_weight": "E .",
        "mixer.conv_bias": "E*",
        "mixer.A_log": "H",
        "mixer.D": "H",
        "mixer.dt_bias": "H",
        "mixer.norm_weight": "I",
        "mixer.out_proj.weight": "D* I",
    },
}


NORMS = {"norm.weight": "D", "mixer.norm_weight": "I"}


WRITERS = ("mixer.down_proj.weight", "mixer.o_proj.weight", "mixer.out_proj.weight")


@dataclass(frozen=True)
class Widths:
    """What is active: channels of the residual stream; of each layer its widths as in
    `WIDTH_FIELDS`, () if skipped."""

    d_model: int
    layers: tuple[tuple[int, ...], ...]


def full_widths(config: ModelConfig) -> Widths:
    """Everything."""
    shapes = [(kind, config.layer(i)) for i, kind in enumerate(config.pattern)]
    return Widths(
        config.d_model,
        tuple(tuple(getattr(shape, f) for f in WIDTH_FIELDS[kind]) for kind, shape in shapes))


def shrink(config: ModelConfig, widths: Widths) -> ModelConfig:
    """The shape of the model that holds only what is active."""
    kept = [(kind, w) for kind, w in zip(config.pattern, widths.layers, strict=True) if w]
    return replace(config, d_model=widths.d_model, pattern="".join(k for k, _ in kept),
                   widths=tuple(w for _, w in kept))


@dataclass
class Units:
    """Indices of units, to permute by or to keep: of the stream, and of each layer by axis (None:
    left out)."""

    d_model: Tensor
    layers: list[dict[str, Tensor] | None]


def in_groups(n: int, total: int, n_groups: int) -> Tensor:
    """Indices of n of the total heads: the first n / n_groups of each group, for a group shares
    what its heads read."""
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
            layers.append(
                {"H": in_groups(w[0], config.mamba_heads, config.mamba_groups),
                 "P": torch.arange(w[1])}
            )
    return Units(torch.arange(widths.d_model), layers)


def derived(kind: str, config: ModelConfig, units: dict[str, Tensor]) -> dict[str, Tensor]:
    """Indices along every axis of a layer, from those of its units."""
    if kind == "-":
        return units
    if kind == "*":
        return {
            "Q": (
                units["A"][:, None] * config.attn_head_dim + torch.arange(config.attn_head_dim)
            ).flatten()
        }
    inner, n_bc = (config.mamba_heads * config.mamba_head_dim,
                   2 * config.mamba_groups * config.d_state)
    i = (units["H"][:, None] * config.mamba_head_dim + units["P"]).flatten()
    bc = torch.arange(n_bc)
    x = torch.cat([i, inner + i, 2 * inner + bc, 2 * inner + n_bc + units["H"]])
    return {"H": units["H"], "I": i, "E": torch.cat([i, inner + bc]), "X": x}


def named_dims(names: list[str], pattern: str) -> Iterator[tuple[str, int | None, str, list[str]]]:
    """For each weight: its name, its layer (None if outside), its name in there, and the axes of
    its dimensions."""
    for name in names:
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            yield name, int(i), rest, DIMS[pattern[int(i)]][rest].split()
        else:
            yield name, None, name, OUTER[name].split()


def take(weights: dict[str, Tensor], config: ModelConfig, units: Units) -> dict[str, Tensor]:
    """The weights at the given units, in their order: a permutation if all are given, else a
    smaller model.

    Differentiable. Where the first units of an axis are kept, the result is a view; where a layer
    is left out, the ones after it move up.
    """
    inside = [u and {"D": units.d_model, **derived(kind, config, u)}
              for kind, u in zip(config.pattern, units.layers, strict=True)]
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


def rotate(weights: dict[str, Tensor], config: ModelConfig, axes_DD: Tensor) -> dict[str, Tensor]:
    """The weights of the same function with a residual stream x Q in place of x, Q orthonormal (the
    columns of axes_DD).

    The mean square of a row is that of any turn of it, so norms stay, once their weights have gone
    into the matrices that read them: W' = W diag(w) Q. What writes to the stream becomes Q^T W.
    Raises ValueError for tied embeddings, for one matrix cannot be turned as what writes and as
    what reads the last norm.
    """
    require_untied(config)
    out = {}
    for name, i, _, dims in named_dims(list(weights), config.pattern):
        norm = weights["norm.weight" if i is None else f"layers.{i}.norm.weight"].double()
        Q_DD, t = axes_DD.to(norm), weights[name].double()
        if dims == ["D*"]:
            t = torch.ones_like(t)
        elif dims[0] == "D*":
            t = Q_DD.T @ t
        elif dims[1:] == ["D"]:
            t = t * norm @ Q_DD
        elif dims[1:] == ["D*"]:
            t = t @ Q_DD
        out[name] = t.to(weights[name])
    return out


def require_untied(config: ModelConfig) -> None:
    """Raises ValueError for a model whose stream cannot be turned."""
    require(
        not config.tie_embeddings,
        "elastic.score_d_model (pca) turns the residual stream, which a model with tied embeddings cannot follow; "
        "choose paper or output",
    )


def _pick(t: Tensor, dim: int, index: Tensor) -> Tensor:
    """index_select, as a view where the index is 0, 1, 2, ..."""
    if torch.equal(index, torch.arange(len(index))):
        return t.narrow(dim, 0, len(index))
    return t.index_select(dim, index.to(t.device))


@dataclass
class Masks:
    """Masks in [0, 1]: of the stream, of each layer by axis, and gamma, the weight of each layer's
    output."""

    d_model: Tensor
    layers: list[dict[str, Tensor]]
    gamma: list[Tensor]


def hard_masks(config: ModelConfig, widths: Widths) -> Masks:
    """1 for what is active, 0 for the rest."""

    def mask(n: int, index: Tensor) -> Tensor:
        return torch.zeros(n, dtype=torch.float64).index_fill(0, index, 1.0)

    units = kept_units(config, widths)
    size = {
        "F": config.d_ff,
        "A": config.n_heads,
        "H": config.mamba_heads,
        "P": config.mamba_head_dim,
    }
    axes = {"-": "F", "*": "A", "M": "HP"}
    layers = [{a: mask(size[a], u[a] if u else torch.arange(size[a])) for a in axes[kind]}
              for kind, u in zip(config.pattern, units.layers, strict=True)]
    gamma = [torch.tensor(float(u is not None), dtype=torch.float64) for u in units.layers]
    return Masks(mask(config.d_model, units.d_model), layers, gamma)


def derived_masks(kind: str, config: ModelConfig, m: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masks along every axis of a layer, from those of its units (`derived` does the same for
    indices)."""
    if kind == "-":
        return m
    if kind == "*":
        return {"Q": m["A"].repeat_interleave(config.attn_head_dim)}
    i = torch.outer(m["H"], m["P"]).flatten()
    ones = i.new_ones(2 * config.mamba_groups * config.d_state)
    return {"H": m["H"], "I": i, "E": torch.cat([i, ones]), "X": torch.cat([i, i, ones, m["H"]])}


def mask_weights(
    weights: dict[str, Tensor], config: ModelConfig, masks: Masks) -> dict[str, Tensor]:
    """Weights whose full-size model computes what the masked one would (eq. 20 to 51).
    Differentiable in both arguments.

    Masked are what the norms give and what the blocks write (D), z, x and dt of Mamba (X) with the
    convolution's bias (E), queries and what o_proj reads (Q), and the FFN's hidden layer (F). Norms
    are rescaled, see the module's docstring.
    """
    inside = [{"D": masks.d_model, **derived_masks(kind, config, m)}
              for kind, m in zip(config.pattern, masks.layers, strict=True)]
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
    """A model of a shape whose weights take no memory: for `functional_call`, or to be given
    weights."""
    with torch.device("meta"):
        return HybridLM(config)


def submodel(model: HybridLM, widths: Widths) -> HybridLM:
    """The smaller model inside a model, sharing its memory wherever a view can."""
    small = bare_model(shrink(model.config, widths)).requires_grad_(False)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    small.load_state_dict(
        take(weights, model.config, kept_units(model.config, widths)), assign=True)
    return small
