"""Layers of different widths brought to one width, without changing what the model computes.

A model cut out by Nemotron Elastic (arXiv 2511.16664) may have its own width in every layer;
Hugging Face's formats know one for all. Narrow layers are filled with zeros up to the widest.
Heads, and channels of heads, are added inside their group, so that every old head reads the keys,
or the B and C, that it read before.

In a feed-forward or attention layer nothing changes. In a Mamba-2 layer the zeros shrink the mean
that the gated norm divides by, s = old channels / new channels:

    w g / sqrt(mean + eps) = (w sqrt(s)) g / sqrt(s mean + s eps)

sqrt(s) goes into the norm's weight w. But eps is one number for the whole model and stays what it
is: the filled layer computes as if its eps were eps / s. That matters only where mean is not far
above eps.
"""

import dataclasses

import torch
from torch import Tensor

from system.config import WIDTH_FIELDS, ModelConfig


def homogeneous(
    config: ModelConfig, tensors: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same function with one width for all layers (but for eps, see above).

    Args: config: the model, with `widths`; tensors: its state dict.
    Returns: the shape without `widths` and the state dict of the wider model.
    """
    layers = [config.layer(i) for i in range(len(config.pattern))]
    largest = {
        name: max(getattr(layer, name)
                  for layer, letter in zip(layers, config.pattern, strict=True)
                  if letter == kind)
        for kind, fields in WIDTH_FIELDS.items()
        if kind in config.pattern
        for name in fields
    }
    wide, out = dataclasses.replace(config, widths=(), **largest), dict(tensors)
    for i, (kind, layer) in enumerate(zip(config.pattern, layers, strict=True)):
        prefix = f"layers.{i}.mixer."
        mixer = {
            name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        out |= {prefix + name: t for name, t in WIDEN[kind](mixer, layer, wide).items()}
    return wide, out


def _widen_ffn(mixer: dict[str, Tensor], old: ModelConfig, new: ModelConfig) -> dict[str, Tensor]:
    """Neurons that read nothing and write nothing."""
    before, after = (old.d_ff,), (new.d_ff,)
    out = {name: _fill(t, before, after) for name, t in mixer.items() if name != "down_proj.weight"}
    return {**out, "down_proj.weight": _fill(mixer["down_proj.weight"].T, before, after).T}


def _widen_attention(
    mixer: dict[str, Tensor], old: ModelConfig, new: ModelConfig) -> dict[str, Tensor]:
    """Query heads whose scores are all 0, at the end of each group; nothing reads what they
    find."""
    before, after = ((c.n_kv_heads, c.n_heads // c.n_kv_heads, c.attn_head_dim) for c in (old, new))
    q_QD, o_QD = mixer["q_proj.weight"], mixer["o_proj.weight"].T
    return {**mixer, "q_proj.weight": _fill(q_QD, before, after),
            "o_proj.weight": _fill(o_QD, before, after).T}


def _widen_mamba(mixer: dict[str, Tensor], old: ModelConfig, new: ModelConfig) -> dict[str, Tensor]:
    """Channels with x = z = 0, at the end of each head, and heads of such channels, at the end of
    each group."""
    before, after = (
        (c.mamba_groups, c.mamba_heads // c.mamba_groups, c.mamba_head_dim) for c in (old, new))
    d_inner, d_bc = old.mamba_heads * old.mamba_head_dim, 2 * old.mamba_groups * old.d_state
    share = d_inner / (new.mamba_heads * new.mamba_head_dim)
    z, x, bc, dt = mixer["in_proj.weight"].split([d_inner, d_inner, d_bc, old.mamba_heads])
    in_proj = [_fill(z, before, after), _fill(x, before, after), bc,
               _fill(dt, before[:2], after[:2])]
    out = {"in_proj.weight": torch.cat(in_proj)}
    for name in ("conv_weight", "conv_bias"):
        x, bc = mixer[name].split([d_inner, d_bc])
        out[name] = torch.cat([_fill(x, before, after), bc])
    out |= {name: _fill(mixer[name], before[:2], after[:2]) for name in ("A_log", "D", "dt_bias")}
    out["norm_weight"] = _fill(mixer["norm_weight"], before, after) * share**0.5
    return {**out, "out_proj.weight": _fill(mixer["out_proj.weight"].T, before, after).T}


WIDEN = {"M": _widen_mamba, "*": _widen_attention, "-": _widen_ffn}


def _fill(t: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
    """The first dimension holds the axes `before`; zeros behind each of them make it hold
    `after`."""
    wide = t.new_zeros(*after, *t.shape[1:])
    wide[tuple(slice(n) for n in before)] = t.reshape(*before, *t.shape[1:])
    return wide.flatten(0, len(after) - 1)
