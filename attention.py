"""Grouped-query attention with a key-value cache, optional RoPE, QK-norm and biases.

H query heads share K key-value heads (arXiv 2305.13245): head h reads group h // J, J = H / K.
Nemotron-H has no positional embedding at all (the Mamba layers tell the order), Qwen3 has RoPE
(arXiv 2104.09864) and QK-norm (arXiv 2302.05442), Qwen2 biases; all are switches here.
`attention_mask` is the one rule for padding, packing and causality.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from system.config import ModelConfig, RopeScaling

UNSCALED = RopeScaling()


class KeyValues(NamedTuple):
    """Keys and values of a row's earlier tokens, [B, K, S, P] each."""

    keys: Tensor
    values: Tensor

    @property
    def n_tokens(self) -> int:
        """S."""
        return self.keys.shape[2]

    def select(self, rows: Tensor) -> "KeyValues":
        """The named rows."""
        return KeyValues(*(t.index_select(0, rows) for t in self))

    def fork(self, n: int) -> "Forked":
        """Each row n times in a row: what is there so far stays as it is, and all n read it."""
        rows = torch.arange(len(self.keys) * n, device=self.keys.device)
        return Forked(self, KeyValues(*(t.new_empty(len(rows), t.shape[1], 0, t.shape[3])
                                        for t in self)), rows, n)

    def append(self, new: "KeyValues") -> "KeyValues":
        """With those of the next tokens behind them."""
        return KeyValues(*map(append, self, new))


class Fixed(NamedTuple):
    """Keys and values, [B, K, U, P] each, in memory that stays where it is: there is room for U
    tokens, and the next one is written in place. No size hangs on how many there are, nor does the
    processor know that, so a card can replay the step (`thoughts.Replayed`)."""

    keys: Tensor
    values: Tensor
    first: int  # place in the sequence of what is first here
    next_1: Tensor  # that of the next token: all layers read this one

    @property
    def n_tokens(self) -> Tensor:
        """How many there are."""
        return self.next_1 - self.first

    @property
    def end(self) -> int:
        """The place behind the last one that there is room for."""
        return self.first + self.keys.shape[2]

    def append(self, new: KeyValues) -> "Fixed":
        """This, with those of the next token behind the others."""
        for room, t in zip((self.keys, self.values), new, strict=True):
            room.index_copy_(2, self.n_tokens, t)
        return self


class Forked(NamedTuple):
    """Keys and values of R rows, the forks of B contexts: what forks share is kept once."""

    shared: KeyValues  # of the contexts, [B, K, S, P]
    own: KeyValues | Fixed  # of what came after the fork, [R, K, U, P]
    place_R: Tensor  # row r is fork number place % n of context place // n; no two are alike
    n: int

    @property
    def n_tokens(self) -> int:
        """S + U."""
        return self.shared.n_tokens + self.own.n_tokens

    def select(self, rows: Tensor) -> "KeyValues | Forked":
        """The named rows. Contexts without a fork are dropped."""
        if len(rows.unique()) < len(rows):
            return self.whole().select(rows)
        place_R = self.place_R.index_select(0, rows)
        left, of_R = (place_R // self.n).unique(return_inverse=True)
        return Forked(self.shared.select(left), self.own.select(rows),
                      of_R * self.n + place_R % self.n, self.n)

    def fork(self, n: int) -> "Forked":
        """Each row n times in a row, of a copy of all that it reads."""
        return self.whole().fork(n)

    def whole(self) -> KeyValues:
        """A copy for each row of all that it reads."""
        (B, *_), place_R = self.shared.keys.shape, self.place_R
        shared = (t.repeat_interleave(self.n, dim=0) if len(place_R) == B * self.n else
                  t.index_select(0, place_R // self.n) for t in self.shared)
        return KeyValues(*(torch.cat(pair, dim=2) for pair in zip(shared, self.own, strict=True)))

    def append(self, new: KeyValues) -> "Forked":
        """With those of the next tokens behind them."""
        return self._replace(own=self.own.append(new))

    def with_room(self, n: int, next_1: Tensor) -> "Forked":
        """Right after the fork: with room for the next n tokens."""
        keys, values = (t.new_zeros(*t.shape[:2], n, t.shape[3]) for t in self.own)
        return self._replace(own=Fixed(keys, values, self.shared.n_tokens, next_1))


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

    def forward(self, x_BTD: Tensor, cached: KeyValues | Forked | None, mask: Tensor | None
                ) -> tuple[Tensor, KeyValues | Forked]:
        """cached: keys and values of earlier tokens, or None; mask: that of `attention_mask`.
        Returns y_BTD, and the keys and values of the earlier and these tokens."""
        # 1. Queries, keys and values of the new tokens; the keys and values of all behind them.
        heads = "b t (h p) -> b h t p"
        q_BHTP = self.q_norm(rearrange(self.q_proj(x_BTD), heads, p=self.head_dim))
        k_BKTP = self.k_norm(rearrange(self.k_proj(x_BTD), heads, p=self.head_dim))
        v_BKTP = rearrange(self.v_proj(x_BTD), heads, p=self.head_dim)
        if self.rope[0]:
            start = 0 if cached is None else cached.n_tokens
            end = cached.own.end if isinstance(start, Tensor) else None
            q_BHTP, k_BKTP = (rope(t, start, *self.rope, end) for t in (q_BHTP, k_BKTP))
        new = KeyValues(k_BKTP, v_BKTP)
        left = new if cached is None else cached.append(new)
        # 2. Attend. One new token a fork reads the context in place; more of them read a copy.
        if isinstance(left, KeyValues):
            y_BHTP = attend(q_BHTP, left, mask)
        elif x_BTD.shape[1] > 1 or torch.is_grad_enabled():
            y_BHTP = attend(q_BHTP, left.whole(), mask)
        else:
            y_BHTP = attend_forked(q_BHTP, left, mask)
        return self.o_proj(rearrange(y_BHTP, "b h t p -> b t (h p)")), left


def attend_forked(q_RH1P: Tensor, left: Forked, mask: Tensor | None) -> Tensor:
    """`attend` of one query in each fork: the queries of a context's n forks are a matrix, so its
    keys are read once for all. A place whose fork is gone has zeros."""
    (B, K, n_shared, P), n, place_R = left.shared.keys.shape, left.n, left.place_R
    q_RKJP = q_RH1P.view(len(place_R), K, -1, P) * P**-0.5

    def side_by_side(rows_RKJX: Tensor) -> Tensor:
        """[R, K, J, X] to [B, K, n J, X]."""
        all_rows = rows_RKJX
        if len(place_R) < B * n:
            all_rows = rows_RKJX.new_zeros(B * n, *rows_RKJX.shape[1:])
            all_rows = all_rows.index_copy(0, place_R, rows_RKJX)
        return rearrange(all_rows, "(b n) k j x -> b k (n j) x", n=n)

    def apart(found: Tensor) -> Tensor:
        """And back."""
        found = rearrange(found, "b k (n j) x -> (b n) k j x", n=n)
        return found.index_select(0, place_R) if len(place_R) < B * n else found

    score_RKJS = torch.cat([apart(side_by_side(q_RKJP) @ left.shared.keys.mT),
                            q_RKJP @ left.own.keys.mT], dim=-1)
    if mask is not None:
        score_RKJS = score_RKJS.masked_fill(~mask, float("-inf"))
    wide = torch.promote_types(score_RKJS.dtype, torch.float32)
    p_RKJS = score_RKJS.softmax(-1, dtype=wide).to(score_RKJS.dtype)
    y_RKJP = apart(side_by_side(p_RKJS[..., :n_shared]) @ left.shared.values)
    return (y_RKJP + p_RKJS[..., n_shared:] @ left.own.values).reshape(q_RH1P.shape)


def attend(q_BHTP: Tensor, left: KeyValues, mask: Tensor | None) -> Tensor:
    """Every query over the keys that the mask lets it see: y_BHTP."""
    k_BKSP, v_BKSP = left
    (_, H, T, P), K = q_BHTP.shape, k_BKSP.shape[1]
    if T == 1 and not q_BHTP.is_cuda:  # flash attention on a CPU is for many queries
        q_BKJP = q_BHTP.view(-1, K, H // K, P) * P**-0.5
        score_BKJS = q_BKJP @ k_BKSP.mT
        if mask is not None:
            score_BKJS = score_BKJS.masked_fill(~mask, float("-inf"))
        return (score_BKJS.softmax(-1) @ v_BKSP).view(q_BHTP.shape)
    causal = mask is None and bool(T > 1)  # a bool, though the compiler keeps T open
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


def attention_mask(ids_BS: Tensor | None, n_tokens: int, n_cached: int | Tensor,
                   device: torch.device) -> Tensor | None:
    """True where query t may read position s: of the same document, and not later.
    ids_BS: document ids of the cached positions and the new tokens (-1 padding), None for one
    document without padding. n_cached: as a tensor [1], where there is room for later tokens and
    each is of the last document. Returns [B or 1, 1, T, S], or None where plain causality says it
    all. A padded query sees padding only, so that its row is finite."""
    if isinstance(n_cached, Tensor):
        is_there_S = torch.arange(ids_BS.shape[1], device=device) <= n_cached
        return ((ids_BS == ids_BS[:, -1:]) & is_there_S)[:, None, None]
    if ids_BS is None and (n_cached == 0 or n_tokens == 1):
        return None
    size = n_tokens, n_cached + n_tokens
    mask = torch.ones(size, dtype=torch.bool, device=device).tril(n_cached)[None]
    if ids_BS is not None:
        mask = mask & (ids_BS[:, n_cached:, None] == ids_BS[:, None, :])
    return mask[:, None]


def rope(x_BHTP: Tensor, start: int | Tensor, theta: float, scaling: RopeScaling = UNSCALED,
         end: int | None = None) -> Tensor:
    """Rotate channel pairs (i, i + P/2) of token t by (start + t) f_i, f of `frequencies` (arXiv
    2104.09864, eq. 34), times the scaling's amplitude. Scores depend on differences of positions
    only: left padding and packing need no own positions. end: where start is a tensor [1], for one
    token, a place that it stays below."""
    (T, P), like = x_BHTP.shape[-2:], (theta, scaling, x_BHTP.dtype, x_BHTP.device)
    if end is None:
        cos_TP, sin_TP = rope_tables(start, T, P, *like)
    else:
        cos_TP, sin_TP = (t.index_select(0, start) for t in rope_tables(0, end, P, *like))
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
