"""What a layer is made of, and what it costs: weights, FLOPs a token, bytes of cache.

`WEIGHTS` is the one table of a model's weights: for each kind of layer, the axes of each weight. To
count them (here), to permute, cut, mask and widen them (nested.py) and to name them as others do
(huggingface.py) are loops over it. Closed forms; nothing is built.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from system.config import ModelConfig

# Kind "" is what is in no layer. D model width, V vocabulary; "-": F neurons; "*": I channels of
# all query heads, KP of all key heads, P of one head; "M": H heads, I channels of all heads, E
# channels and W taps of the convolution, O rows of in_proj.
WEIGHTS = {
    "": {"embed.weight": "V D", "norm.weight": "D", "head.weight": "V D"},
    "-": {"norm.weight": "D", "mixer.up_proj.weight": "F D", "mixer.gate_proj.weight": "F D",
          "mixer.down_proj.weight": "D F"},
    "*": {"norm.weight": "D", "mixer.q_proj.weight": "I D", "mixer.k_proj.weight": "KP D",
          "mixer.v_proj.weight": "KP D", "mixer.o_proj.weight": "D I", "mixer.q_proj.bias": "I",
          "mixer.k_proj.bias": "KP", "mixer.v_proj.bias": "KP",
          "mixer.q_norm.weight": "P", "mixer.k_norm.weight": "P"},
    "M": {"norm.weight": "D", "mixer.in_proj.weight": "O D", "mixer.conv_weight": "E W",
          "mixer.conv_bias": "E", "mixer.A_log": "H", "mixer.D": "H", "mixer.dt_bias": "H",
          "mixer.norm_weight": "I", "mixer.out_proj.weight": "D I"},
}


def in_proj_rows(config: ModelConfig) -> dict[str, int]:
    """The blocks of Mamba-2's in_proj in order, with their rows; the convolution's are x, B, C."""
    I, KN = config.mamba_heads * config.mamba_head_dim, config.mamba_groups * config.d_state
    return {"z": I, "x": I, "B": KN, "C": KN, "dt": config.mamba_heads}


def axis_sizes(kind: str, config: ModelConfig) -> dict[str, int]:
    """The size of every axis of a layer, with K groups (key heads) and N numbers of a state."""
    c, sizes = config, {"V": config.vocab_size, "D": config.d_model, "F": config.d_ff}
    if kind == "*":
        H, K, P = c.n_heads, c.n_kv_heads, c.attn_head_dim
        return sizes | {"H": H, "K": K, "P": P, "I": H * P, "KP": K * P}
    if kind == "M":
        rows = in_proj_rows(c)
        sizes |= {"H": c.mamba_heads, "K": c.mamba_groups, "P": c.mamba_head_dim, "N": c.d_state,
                  "W": c.conv_width, "I": rows["x"], "E": rows["x"] + rows["B"] + rows["C"],
                  "O": sum(rows.values())}
    return sizes


def part_weights(kind: str, config: ModelConfig) -> dict[str, dict[str, int]]:
    """The weights that a layer of this shape has, each with its axes and their sizes."""
    sizes, has = axis_sizes(kind, config), {
        "head.weight": not config.tie_embeddings, "mixer.gate_proj.weight": config.ffn == "swiglu",
        "mixer.q_norm.weight": config.qk_norm, "mixer.k_norm.weight": config.qk_norm,
        **{f"mixer.{part}_proj.bias": config.qkv_bias for part in "qkv"}}
    return {name: {axis: sizes[axis] for axis in axes.split()}
            for name, axes in WEIGHTS[kind].items() if has.get(name, True)}


class Weight(NamedTuple):
    """Where a weight is, and of what shape."""

    layer: int | None  # None: in no layer
    name: str  # in that layer
    axes: dict[str, int]  # with their sizes

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes alone."""
        return tuple(self.axes.values())


def weights_of(config: ModelConfig) -> dict[str, Weight]:
    """Every weight of a model by its full name."""
    found = {name: Weight(None, name, axes) for name, axes in part_weights("", config).items()}
    for i, kind in enumerate(config.pattern):
        found |= {f"layers.{i}.{name}": Weight(i, name, axes)
                  for name, axes in part_weights(kind, config.layer(i)).items()}
    return found


def count_parameters(model: nn.Module) -> int:
    """Number of distinct weights (tied ones once)."""
    return sum(p.numel() for p in model.parameters())


def sum_of_parts(measure: Callable[[str, ModelConfig], float], config: ModelConfig) -> float:
    """A measure such as those below, of what is in no layer (kind "") and of every layer, added."""
    layers = [measure(kind, config.layer(i)) for i, kind in enumerate(config.pattern)]
    return measure("", config) + sum(layers)


def part_parameters(kind: str, config: ModelConfig) -> int:
    """Weights of a layer with its norm, or (kind "") of what is in no layer."""
    return sum(math.prod(axes.values()) for axes in part_weights(kind, config).values())


def matrices(kind: str, config: ModelConfig) -> list[tuple[int, ...]]:
    """The shape of each matrix of a layer."""
    return [tuple(axes.values()) for name, axes in part_weights(kind, config).items()
            if name.endswith("_proj.weight")]


def matrix_parameters(kind: str, config: ModelConfig) -> int:
    """Weights of the matrices of a layer."""
    return sum(map(math.prod, matrices(kind, config)))


def adapter_parameters(kind: str, config: ModelConfig, rank: int) -> int:
    """Weights of the adapters of a layer's matrices (lora.py): rank (in + out) each."""
    return sum(rank * sum(shape) for shape in matrices(kind, config))


def part_flops(kind: str, config: ModelConfig, n_tokens: int) -> float:
    """Floating-point operations of a forward pass per token, averaged over a sequence of n_tokens.

    Two per weight of a matrix; attention adds 4 P per query head and position seen, n_tokens / 2 on
    average; Mamba-2 adds 2 per convolution tap, and 5 per number of its state (decay, write, read).
    """
    s, more = axis_sizes(kind, config), 0
    if kind == "":
        return 2.0 * s["V"] * s["D"]
    if kind == "*":
        more = 2 * s["I"] * n_tokens
    elif kind == "M":
        more = 2 * s["W"] * s["E"] + 5 * s["I"] * s["N"]
    return 2.0 * matrix_parameters(kind, config) + more


def part_cache_bytes(kind: str, config: ModelConfig, n_tokens: int, n_bytes: int) -> int:
    """Bytes that a layer keeps of n_tokens, at n_bytes a number (Mamba-2's state is in fp32)."""
    s = axis_sizes(kind, config)
    if kind == "*":
        return 2 * s["KP"] * n_tokens * n_bytes
    if kind == "M":
        return 4 * s["I"] * s["N"] + n_bytes * (s["W"] - 1) * s["E"]
    return 0
