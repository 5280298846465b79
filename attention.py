"""Grouped-query attention with a key-value cache, optional RoPE, QK-norm and biases.

H query heads share K key-value heads (arXiv 2305.13245): head h reads group h // J, J = H / K.
Nemotron-H has no positional embedding at all (the Mamba layers tell the order), Qwen3 has RoPE
(arXiv 2104.09864) and QK-norm (arXiv 2302.05442), Qwen2 biases; all are switches here.
`attention_mask` is the one rule for padding, packing and causality.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from system.config import ModelConfig, RopeScaling

UNSCALED = RopeScaling()


class Attention(nn.Module):
    """y = softmax(q k^T / sqrt(P) + mask) v, projected back to the model's width."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim, self.rope = config.attn_head_dim, (config.rope_theta, config.rope_scaling)
        n, m, bias = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, config.qkv_bias
        self.q_proj = nn.Linear(config.d_model, n, bias=bias)
        self.k_proj = nn.Linear(config.d_model, m, bias=bias)
        self.v_proj = nn.Linear(config.d_model, m, bias=bias)
        self.o_proj = nn.Linear(n, config.d_model, bias=False)
        norm = HeadNorm if config.qk_norm else nn.Identity  # which takes any arguments
        self.q_norm, self.k_norm = (norm(self.head_dim, eps=config.norm_eps) for _ in "qk")

    def forward(self, x_BTD: Tensor, cached: tuple[Tensor, Tensor] | None, mask: Tensor | None
                ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """cached: keys and values of earlier tokens, [B, K, U, P] each, or None; mask: that of
        `attention_mask`. Returns y_BTD, and the keys and values of the earlier and these tokens."""
        # 1. Queries, keys and values of the new tokens; the keys and values of all behind them.
        heads = "b t (h p) -> b h t p"
        q_BHTP = self.q_norm(rearrange(self.q_proj(x_BTD), heads, p=self.head_dim))
        k_BKTP = self.k_norm(rearrange(self.k_proj(x_BTD), heads, p=self.head_dim))
        v_BKTP = rearrange(self.v_proj(x_BTD), heads, p=self.head_dim)
        if self.rope[0]:
            start = 0 if cached is None else cached[0].shape[2]
            q_BHTP, k_BKTP = (rope(t, start, *self.rope) for t in (q_BHTP, k_BKTP))
        k_BKSP, v_BKSP = (k_BKTP, v_BKTP) if cached is None else (
            append(past, new) for past, new in zip(cached, (k_BKTP, v_BKTP), strict=True))
        # 2. Attend.
        y_BHTP = attend(q_BHTP, k_BKSP, v_BKSP, mask)
        return self.o_proj(rearrange(y_BHTP, "b h t p -> b t (h p)")), (k_BKSP, v_BKSP)


def attend(q_BHTP: Tensor, k_BKSP: Tensor, v_BKSP: Tensor, mask: Tensor | None) -> Tensor:
    """Every query over the keys that the mask lets it see: y_BHTP."""
    (_, H, T, P), K = q_BHTP.shape, k_BKSP.shape[1]
    if T == 1 and not q_BHTP.is_cuda:  # flash attention on a CPU is for many queries
        q_BKJP = q_BHTP.view(-1, K, H // K, P) * P**-0.5
        score_BKJS = q_BKJP @ k_BKSP.mT
        if mask is not None:
            score_BKJS = score_BKJS.masked_fill(~mask, float("-inf"))
        return (score_BKJS.softmax(-1) @ v_BKSP).view(q_BHTP.shape)
    causal = mask is None and T > 1
    grouped = H != K
    if grouped and q_BHTP.is_cuda and (mask is not None or q_BHTP.dtype == torch.float32):
        # Flash attention takes no mask and no fp32; the other without all scores, no groups.
        grouped = False
        k_BKSP, v_BKSP = (t.repeat_interleave(H // K, dim=1) for t in (k_BKSP, v_BKSP))
    return F.scaled_dot_product_attention(
        q_BHTP, k_BKSP, v_BKSP, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the channels of a head, in the dtype of its weights."""

    def forward(self, x_BHTP: Tensor) -> Tensor:
        """x / rms(x) * weight, in the dtype of x, for the cache."""
        return super().forward(x_BHTP.to(self.weight.dtype)).to(x_BHTP.dtype)


def append(past_BKUP: Tensor, new_BKTP: Tensor) -> Tensor:
    """The new positions behind those of the past, which stays as it is.
    Without gradients the result is the front of a longer buffer, and the next call writes into its
    room, instead of copying the past for every token. Whoever goes on first takes the room; a
    second continuation of the same past copies."""
    if torch.is_grad_enabled():
        return torch.cat([past_BKUP, new_BKTP], dim=2)
    B, K, U, P = past_BKUP.shape
    S, buffer = U + new_BKTP.shape[2], getattr(past_BKUP, "buffer", None)
    if buffer is None or buffer.n_taken != U or buffer.shape[2] < S:
        buffer = past_BKUP.new_empty(B, K, S + 64, P)  # room for 64 positions more
        buffer[:, :, :U] = past_BKUP
    buffer[:, :, U:S] = new_BKTP
    buffer.n_taken = S
    all_BKSP = buffer[:, :, :S]
    all_BKSP.buffer = buffer
    return all_BKSP


def attention_mask(ids_BS: Tensor | None, n_tokens: int, n_cached: int,
                   device: torch.device) -> Tensor | None:
    """True where query t may read position s: of the same document, and not later.
    ids_BS: document ids of the cached positions and the new tokens (-1 padding), None for one
    document without padding. Returns [B or 1, 1, T, S], or None where plain causality says it all.
    A padded query sees padding only, so that its row is finite."""
    if ids_BS is None and (n_cached == 0 or n_tokens == 1):
        return None
    size = n_tokens, n_cached + n_tokens
    mask = torch.ones(size, dtype=torch.bool, device=device).tril(n_cached)[None]
    if ids_BS is not None:
        mask = mask & (ids_BS[:, n_cached:, None] == ids_BS[:, None, :])
    return mask[:, None]


def rope(x_BHTP: Tensor, start: int, theta: float, scaling: RopeScaling = UNSCALED) -> Tensor:
    """Rotate channel pairs (i, i + P/2) of token t by (start + t) f_i, f of `frequencies` (arXiv
    2104.09864, eq. 34), times the scaling's amplitude. Scores depend on differences of positions
    only: left padding and packing need no own positions."""
    T, P = x_BHTP.shape[-2:]
    cos_TP, sin_TP = rope_tables(start, T, P, theta, scaling, x_BHTP.dtype, x_BHTP.device)
    left, right = x_BHTP.chunk(2, dim=-1)
    return x_BHTP * cos_TP + torch.cat([-right, left], dim=-1) * sin_TP


@functools.lru_cache(maxsize=2)
def rope_tables(start: int, T: int, P: int, theta: float, scaling: RopeScaling, dtype: torch.dtype,
                device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `rope`, made once for all layers of a pass."""
    like = {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}
    angle = torch.arange(start, start + T, **like)[:, None] * frequencies(P, theta, scaling, **like)
    cos_TP, sin_TP = (torch.cat([t * scaling.amplitude] * 2, dim=-1).to(dtype)
                      for t in (angle.cos(), angle.sin()))
    return cos_TP, sin_TP


def frequencies(P: int, theta: float, s: RopeScaling, **like: Any) -> Tensor:
    """f_i = theta^(-2i/P) of pair i, in radians a token. Scaling makes it f_i (k_i + (1 - k_i) /
    factor): pair i turns n_i = length f_i / 2 pi times in a text of pretraining, and what is kept
    of it, k_i, is 0 for all pairs (linear, arXiv 2306.15595), or rises from 0 at n_i = low to 1 at
    high: evenly in n_i (llama3, arXiv 2407.21783), evenly in i, from whole i to whole i (yarn,
    arXiv 2309.00071)."""
    frequency = theta ** (-torch.arange(0, P, 2, **like) / P)
    if s.kind == "default":
        return frequency
    kept = torch.zeros_like(frequency)
    if s.kind == "llama3":
        kept = (s.length * frequency / (2 * math.pi) - s.low) / (s.high - s.low)
    elif s.kind == "yarn":
        first, last = (P * math.log(s.length / (2 * math.pi * n)) / (2 * math.log(theta))
                       for n in (s.high, s.low))
        first, last = max(math.floor(first), 0), min(math.ceil(last), P - 1)
        kept = 1 - (torch.arange(P // 2, **like) - first) / (last - first or 0.001)
    kept = kept.clamp(0, 1)
    return frequency * (kept + (1 - kept) / s.factor)
