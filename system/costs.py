"""What a layer costs: parameters, FLOPs a token, bytes of cache; closed forms, nothing is built."""

from collections.abc import Callable

from torch import nn

from system.config import ModelConfig


def count_parameters(model: nn.Module) -> int:
    """Number of distinct weights (tied ones once)."""
    return sum(p.numel() for p in model.parameters())


def sum_of_parts(measure: Callable[[str, ModelConfig], float], config: ModelConfig) -> float:
    """A measure of a part, such as those below, added up over a model: what is in no layer (kind
    ""), and every layer."""
    return measure("", config) + sum(
        measure(kind, config.layer(i)) for i, kind in enumerate(config.pattern))


def in_proj_rows(config: ModelConfig) -> dict[str, int]:
    """The blocks of Mamba-2's in_proj in their order, and how many rows each has. The convolution's
    channels are x, B and C."""
    I, KN = config.mamba_heads * config.mamba_head_dim, config.mamba_groups * config.d_state
    return {"z": I, "x": I, "B": KN, "C": KN, "dt": config.mamba_heads}


def matrix_parameters(kind: str, config: ModelConfig) -> int:
    """Weights of the matrices of a layer, a closed form: nothing is built (a test holds it to what
    is built)."""
    D, inner = config.d_model, config.mamba_heads * config.mamba_head_dim
    return {
        "-": D * config.d_ff * (2 if config.ffn == "relu2" else 3),
        "*": D * 2 * (config.n_heads + config.n_kv_heads) * config.attn_head_dim,
        "M": D * (3 * inner + 2 * config.mamba_groups * config.d_state + config.mamba_heads)}[kind]


def part_parameters(kind: str, config: ModelConfig) -> int:
    """Weights of a layer with its norm, or (kind "") of what is not in a layer: embedding, last
    norm, output matrix."""
    if kind == "":
        return (config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
                + config.d_model)
    inner = config.mamba_heads * config.mamba_head_dim
    conv = inner + 2 * config.mamba_groups * config.d_state
    extra = {
        "-": 0,
        "*": 2 * config.attn_head_dim * config.qk_norm,
        "M": conv * (config.conv_width + 1)
        + 3 * config.mamba_heads
        + inner,  # A, D and dt of each head; the gated norm
    }
    return config.d_model + matrix_parameters(kind, config) + extra[kind]


def part_flops(kind: str, config: ModelConfig, n_tokens: int) -> float:
    """Floating-point operations of a forward pass per token, averaged over a sequence of n_tokens;
    parts as above.

    Two per weight of a matrix; attention adds 4 P per query head and position seen, of which there
    are n_tokens / 2 on average; Mamba-2 adds 2 per convolution tap, and 5 per number of its state
    (decay, write, read).
    """
    if kind == "":
        return 2.0 * config.vocab_size * config.d_model
    inner = config.mamba_heads * config.mamba_head_dim
    extra = {
        "-": 0,
        "*": 2 * config.n_heads * config.attn_head_dim * n_tokens,
        "M": 2 * config.conv_width * (inner + 2 * config.mamba_groups * config.d_state)
        + 5 * inner * config.d_state,
    }
    return 2.0 * matrix_parameters(kind, config) + extra[kind]


def part_cache_bytes(kind: str, config: ModelConfig, n_tokens: int, n_bytes: int) -> int:
    """Bytes that a layer keeps of one sequence of n_tokens, at n_bytes a number (the state of
    Mamba-2 is kept in fp32)."""
    inner = config.mamba_heads * config.mamba_head_dim
    return {
        "": 0,
        "-": 0,
        "*": 2 * config.n_kv_heads * config.attn_head_dim * n_tokens * n_bytes,
        "M": 4 * inner * config.d_state
        + n_bytes * (config.conv_width - 1) * (inner + 2 * config.mamba_groups * config.d_state),
    }[kind]
