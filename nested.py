"""Models inside a model (arXiv 2511.16664): to permute, cut, mask and widen.

Every unit of a model belongs to an axis: channels of the residual stream (D), FFN neurons (F),
heads (H) and their channels (P), layers. `costs.WEIGHTS` says along which axes each weight runs. To
permute, cut, mask and widen are loops over that one table. A smaller model is the first units of
every axis.

A masked model equals the sliced one exactly: masked channels are zero in the residual stream, and
the mean in every RMSNorm is over the active ones. With a share s of the channels active that is the
norm over all of them with weight sqrt(s) w and epsilon s eps, so masks touch weights and epsilons
only, and the model's code does not know of them.

How to read: `UNITS` and `along`, the units of a layer and what runs along them; `take`, which
permutes and cuts, and `widen`, its inverse; `rotate`, which turns the stream; `cut_inside`
and `masked_inside`, which run a smaller model in the weights of the larger one.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from model import Cache, HybridLM, Inside, Part
from system import parallel
from system.checkpoint import check_shapes
from system.config import WIDTH_FIELDS, ModelConfig
from system.costs import WEIGHTS, axis_sizes, in_proj_rows, weights_of
from system.errors import require

# The units of a layer, in the order of `WIDTH_FIELDS`; other axes follow from them, see `along`.
UNITS = {"-": "F", "*": "H", "M": "HP"}

# Which dimensions a mask multiplies: what norms give and blocks write (D), Mamba's z, x, dt (O) and
# the convolution's bias (E), queries and what o_proj reads (I), the FFN's hidden layer (F).
MASKED = {"embed.weight": "D", "norm.weight": "D", "mixer.down_proj.weight": "DF",
          "mixer.q_proj.weight": "I", "mixer.q_proj.bias": "I", "mixer.o_proj.weight": "DI",
          "mixer.in_proj.weight": "O", "mixer.conv_bias": "E", "mixer.out_proj.weight": "D"}
NORMS = {"norm.weight": "D", "mixer.norm_weight": "I"}  # what their mean is taken over
WRITERS = tuple(name for kind in UNITS for name, axes in WEIGHTS[kind].items() if axes[:2] == "D ")


@dataclass(frozen=True)
class Widths:
    """What is active."""

    d_model: int  # channels of the residual stream
    layers: tuple[tuple[int, ...], ...]  # widths of each as in `WIDTH_FIELDS`, () if left out


def full_widths(config: ModelConfig) -> Widths:
    """Everything."""
    return Widths(config.d_model, tuple(
        tuple(getattr(config.layer(i), field) for field in WIDTH_FIELDS[kind])
        for i, kind in enumerate(config.pattern)))


def shrink(config: ModelConfig, widths: Widths) -> ModelConfig:
    """The shape of the model that holds only what is active."""
    kept = [(kind, w) for kind, w in zip(config.pattern, widths.layers, strict=True) if w]
    return replace(config, d_model=widths.d_model, pattern="".join(k for k, _ in kept),
                   widths=tuple(w for _, w in kept))


@dataclass
class Units:
    """Indices of units, to permute by or to keep."""

    d_model: Tensor
    layers: list[dict[str, Tensor] | None]  # of each layer by axis; None: left out


@dataclass
class Masks:
    """Masks in [0, 1]."""

    d_model: Tensor
    layers: list[dict[str, Tensor]]  # of each layer by axis
    gamma: list[Tensor]  # weight of each layer's output


def in_groups(n: int, total: int, n_groups: int) -> Tensor:
    """Indices of n heads, the first of each group, for a group shares what its heads read."""
    return torch.arange(total).view(n_groups, -1)[:, : n // n_groups].flatten()


def kept_units(config: ModelConfig, widths: Widths) -> Units:
    """The first units of every axis, of every group for heads."""
    layers = []
    for kind, w in zip(config.pattern, widths.layers, strict=True):
        size = axis_sizes(kind, config)
        own = {a: in_groups(n, size[a], size["K"] if a == "H" else 1)
               for a, n in zip(UNITS[kind], w, strict=False)}
        layers.append(own or None)
    return Units(torch.arange(widths.d_model), layers)


def along(kind: str, config: ModelConfig, units: dict[str, Tensor]) -> dict[str, Tensor]:
    """Indices along every axis that a layer's units lie on, from those of the units."""
    if kind == "-":
        return units
    P = axis_sizes(kind, config)["P"]
    i = (units["H"][:, None] * P + units.get("P", torch.arange(P))).flatten()
    if kind == "*":
        return {"H": units["H"], "I": i}
    # Rows of in_proj: z and x, all channels of the heads; B and C, which stay; dt, the heads.
    own, blocks, start = {"z": i, "x": i, "dt": units["H"]}, {}, 0
    for name, n in in_proj_rows(config).items():
        blocks[name] = start + own.get(name, torch.arange(n))
        start += n
    E = torch.cat([blocks["x"], blocks["B"], blocks["C"]]) - in_proj_rows(config)["z"]
    return {"H": units["H"], "I": i, "E": E, "O": torch.cat(list(blocks.values()))}


def along_all(config: ModelConfig, parts: Units | Masks, extend: Callable = along
              ) -> dict[int | None, dict[str, Tensor] | None]:
    """Along every axis, by layer (None if left out) and, under None, of what is in no layer."""
    stream = {"D": parts.d_model}
    return {None: stream} | {i: p and {**stream, **extend(config.pattern[i], config, p)}
                             for i, p in enumerate(parts.layers)}


def picks(config: ModelConfig, units: Units) -> dict[str, tuple[str, dict[int, Tensor]] | None]:
    """What the given units are of each weight: by its name, the name in a model of these units, for
    where a layer is left out the ones after it move up, and indices by dimension; None of a layer
    that is left out."""
    lines, out = along_all(config, units), {}
    place = {i: n for n, i in enumerate(i for i, own in lines.items() if i is not None and own)}
    for name, (i, rest, axes) in weights_of(config).items():
        own = lines[i]
        out[name] = own and (name if i is None else f"layers.{place[i]}.{rest}",
                             {dim: own[a] for dim, a in enumerate(axes) if a in own})
    return out


def take(weights: dict[str, Tensor], config: ModelConfig, units: Units) -> dict[str, Tensor]:
    """The weights at the given units: permuted if all are given, else a smaller model.
    Differentiable. Where the first units of an axis are kept, the result is a view."""
    table = picks(config, units)
    found = {name: pick for name in weights if (pick := table[name])}
    return {new: cut_one(weights[name], index) for name, (new, index) in found.items()}


def cut_one(t: Tensor, picked: dict[int, Tensor]) -> Tensor:
    """A weight at the given indices of its dimensions; a view where they are the first."""
    for dim, index in picked.items():
        t = (t.narrow(dim, 0, len(index)) if torch.equal(index, torch.arange(len(index)))
             else t.index_select(dim, parallel.sent(index, t.device)))
    return t


def hand_over(cache: Cache, config: ModelConfig, old: Widths, new: Widths) -> Cache:
    """What the size `old` of a model has read, for the size `new` to go on from: switched in the
    middle of a text, at no cost. Of Mamba-2 the states of units that both have, zeros for what only
    the new one has; keys and values serve every size. It is an approximation, for the new size
    would have made states of its own. Raises ValueError where one has layers that the other lacks.
    """
    require(list(map(bool, old.layers)) == list(map(bool, new.layers)), "these sizes keep different"
            " layers, and nobody has the states of a layer that was left out; read the text again "
            "with the new size")
    sides = [(along_all(config, units), units.layers)
             for units in (kept_units(config, widths) for widths in (old, new))]

    def moved(t: Tensor, i: int, axes: str) -> Tensor:
        for dim, axis in enumerate(axes, 1):
            of_old, of_new = ((lines[i] | units[i])[axis].to(t.device) for lines, units in sides)
            n = axis_sizes(config.pattern[i], config)[axis]
            full = t.new_zeros(*t.shape[:dim], n, *t.shape[dim + 1 :])
            t = full.index_copy(dim, of_old, t).index_select(dim, of_new)
        return t

    layers = list(cache.layers)
    for place, i in enumerate(i for i, w in enumerate(old.layers) if w):
        if config.pattern[i] == "M":
            tail_BYE, state_BHPN = layers[place]
            layers[place] = moved(tail_BYE.mT, i, "E").mT, moved(state_BHPN, i, "HP")
    return Cache(layers, cache.n_tokens, cache.ids_BS)


def cuts(config: ModelConfig, widths: Widths) -> dict[str, dict]:
    """`picks` of a smaller model for programs without this code (tools/slicer.py), as JSON has it:
    by the name in that model, which weight it is `of`, and by dimension the [start, stop) kept."""
    def runs(index: Tensor) -> list[list[int]]:
        ends = [0, *(1 + (index.diff() != 1).nonzero()[:, 0]).tolist(), len(index)]
        return [[int(index[a]), int(index[b - 1]) + 1] for a, b in itertools.pairwise(ends)]

    found = picks(config, kept_units(config, widths)).items()
    return {pick[0]: {"of": name, "keep": {str(d): runs(index) for d, index in pick[1].items()}}
            for name, pick in found if pick}


def widen(config: ModelConfig, weights: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same function with one width for all layers of a kind, the widest. `take` undoes it.

    A model that was cut out may have its own width in every layer; the formats of Hugging Face know
    one for all. Zeros are added, to heads inside their group, so that every old head reads the
    keys, or the B and C, that it read before. In a feed-forward or attention layer nothing changes.
    In a Mamba-2 layer they shrink the mean that the gated norm divides by, s = old / new channels:

        w g / sqrt(mean + eps) = (w sqrt(s)) g / sqrt(s mean + s eps)

    sqrt(s) goes into the norm's weight w. But eps is one number for the whole model: the widened
    layer computes as if its eps were eps / s, which matters only where mean is not far above eps.
    Raises ValueError for weights that are not of that shape.
    """
    # 1. the widest layer of each kind
    narrow = weights_of(config)
    check_shapes(weights, {name: w.shape for name, w in narrow.items()}, "the state dict",
                 "give the settings that the weights were made with")
    layers = [(kind, config.layer(i)) for i, kind in enumerate(config.pattern)]
    wide = replace(config, widths=(), **{
        field: max(getattr(own, field) for k, own in layers if k == kind)
        for kind in set(config.pattern) for field in WIDTH_FIELDS[kind]})
    # 2. zeros, and in them the old weights where `take` would find them
    lines, out = along_all(wide, kept_units(wide, full_widths(config))), {}
    for name, (i, rest, axes) in weights_of(wide).items():
        t = weights[name]
        for dim, (axis, n) in enumerate(axes.items()):
            if axis in lines[i]:
                zeros = t.new_zeros(*t.shape[:dim], n, *t.shape[dim + 1 :])
                t = zeros.index_copy(dim, lines[i][axis].to(t.device), t)
        if rest == "mixer.norm_weight":
            t = t * (narrow[name].axes["I"] / axes["I"]) ** 0.5
        out[name] = t
    return wide, out


def rotate(weights: dict[str, Tensor], config: ModelConfig, axes_DD: Tensor) -> dict[str, Tensor]:
    """Weights of the same function with a stream x Q in place of x, Q orthonormal (axes_DD).

    The mean square of a row is that of any turn of it, so norms stay, once their weights have gone
    into the matrices that read them: W' = W diag(w) Q. What writes to the stream becomes Q^T W.
    Raises ValueError for tied embeddings: one matrix cannot be turned as a writer and as a reader.
    """
    require_untied(config)
    table, out = weights_of(config), {}
    for name, before in weights.items():
        i, rest, axes = table[name]
        norm = weights["norm.weight" if i is None else f"layers.{i}.norm.weight"].double()
        Q_DD, t = axes_DD.to(norm), before.double()
        if list(axes) == ["D"]:
            t = torch.ones_like(t)
        elif rest in WRITERS:
            t = Q_DD.T @ t
        elif name == "embed.weight":
            t = t @ Q_DD
        elif "D" in axes:
            t = t * norm @ Q_DD
        out[name] = t.to(before)
    return out


def require_untied(config: ModelConfig) -> None:
    """Raises ValueError for a model whose stream cannot be turned."""
    require(not config.tie_embeddings,
            "elastic.score_d_model (pca) turns the residual stream, which a model with tied "
            "embeddings cannot follow; choose paper or output")


def hard_masks(config: ModelConfig, widths: Widths) -> Masks:
    """1 for what is active, else 0; inside a layer that is left out 1 too, for its gamma is 0."""

    def mask(units: Tensor, kept: Tensor) -> Tensor:
        return torch.zeros(len(units), dtype=torch.float64).index_fill(0, kept, 1.0)

    full, some = kept_units(config, full_widths(config)), kept_units(config, widths)
    layers = [{a: mask(index, (own or units)[a]) for a, index in units.items()}
              for units, own in zip(full.layers, some.layers, strict=True)]
    gamma = [torch.tensor(float(own is not None), dtype=torch.float64) for own in some.layers]
    return Masks(mask(full.d_model, some.d_model), layers, gamma)


def masks_along(kind: str, config: ModelConfig, m: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masks along every axis of a layer, from those of its units: `along` for masks."""
    if kind == "-":
        return m
    if kind == "*":
        return {"I": m["H"].repeat_interleave(config.attn_head_dim)}
    i = torch.outer(m["H"], m["P"]).flatten()
    own = {"z": i, "x": i, "dt": m["H"]}
    blocks = {name: own.get(name, i.new_ones(n)) for name, n in in_proj_rows(config).items()}
    return {"I": i, "E": torch.cat([blocks["x"], blocks["B"], blocks["C"]]),
            "O": torch.cat(list(blocks.values()))}


def mask_one(t: Tensor, rest: str, axes: dict[str, int], masks: dict[str, Tensor],
             gamma: Tensor | None) -> Tensor:
    """A weight with which the full-size layer computes what the masked one would (eq. 20 to 51).

    Differentiable, in the masks too. Args: rest, axes: see `costs.Weight`; masks: along its axes;
    gamma: of its layer, None in none. `MASKED` says what is masked; norms are rescaled, see above.
    """
    for dim, axis in enumerate(axes):
        if axis in MASKED.get(rest, ""):
            m = masks[axis].to(t)
            m = m * gamma.to(t) if rest in WRITERS and dim == 0 else m
            t = t * (m[:, None] if t.dim() == 2 and dim == 0 else m)
    return t * share(masks[NORMS[rest]]).sqrt().to(t) if rest in NORMS else t


def share(mask: Tensor) -> Tensor:
    """The share of an axis that is active; for a soft mask, as much as its mean square."""
    return mask.square().mean()


# ---------------------------------------------------------------- to run it in the larger one


def part(bare: nn.Module, change: Callable[[str, Tensor], Tensor]) -> Part:
    """What runs in place of a module of the larger model: a bare one, on its weights changed."""
    def run(module: nn.Module, *args: Any) -> Any:
        own = {name: change(name, p) for name, p in module.named_parameters()}
        return functional_call(bare, own, args)

    return run


def inside(bare: HybridLM, kept: Iterable[int], change: Callable[[str, Tensor], Tensor]) -> Inside:
    """A smaller model in the weights of a larger one, block by block: so sharded ones need not be
    whole at once. bare: the smaller model; kept: which layers of the larger one it has; change: a
    weight's full name in the larger one, and the weight, to what the smaller one has of it."""
    def at(prefix: str, module: nn.Module) -> Part:
        return part(module, lambda name, t: change(f"{prefix}.{name}", t))

    layers = {i: at(f"layers.{i}", block) for i, block in zip(kept, bare.layers, strict=True)}
    return Inside(at("embed", bare.embed), layers, at("norm", bare.norm))


def cut_inside(config: ModelConfig, widths: Widths) -> Inside:
    """The smaller model of these widths, cut out of each weight when it is used."""
    table = picks(config, kept_units(config, widths))
    kept = [i for i, w in enumerate(widths.layers) if w]
    return inside(bare_model(shrink(config, widths)), kept,
                  lambda name, t: cut_one(t, table[name][1]))


def masked_inside(config: ModelConfig, masks: Masks) -> Inside:
    """The model under masks: of full size, its norms with the epsilons that go with the masks."""
    bare, table = bare_model(config), weights_of(config)
    scale_epsilons(bare, masks)
    lines = along_all(config, masks, masks_along)

    def change(name: str, t: Tensor) -> Tensor:
        i, rest, axes = table[name]
        return mask_one(t, rest, axes, lines[i], None if i is None else masks.gamma[i])

    return inside(bare, range(len(config.pattern)), change)


def scale_epsilons(network: HybridLM, masks: Masks) -> None:
    """The epsilons of the norms, times the share of what each takes its mean over."""
    eps = network.config.norm_eps
    for norm in (network.norm, *(block.norm for block in network.layers)):
        norm.eps = eps * float(share(masks.d_model).detach())
    for block, m in zip(network.layers, masks.layers, strict=True):
        if block.kind == "M":
            block.mixer.norm_eps = eps * float((share(m["H"]) * share(m["P"])).detach())


def bare_model(config: ModelConfig) -> HybridLM:
    """A model whose weights take no memory: for `functional_call`, or to be given weights."""
    with torch.device("meta"):
        return HybridLM(config)


def submodel(model: HybridLM, widths: Widths) -> HybridLM:
    """The smaller model inside a model, sharing its memory wherever a view can."""
    small = bare_model(shrink(model.config, widths)).requires_grad_(False)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    kept = kept_units(model.config, widths)
    small.load_state_dict(take(weights, model.config, kept), assign=True)
    return small
