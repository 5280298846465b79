"""The hybrid language model: Mamba-2, attention and feed-forward layers in the order of a pattern.

`M` is a Mamba-2 mixer, `*` attention, `-` a feed-forward network, as in Nemotron-H (arXiv
2504.03624). Every layer is y = x + mixer(norm(x)); a last norm and the output matrix follow.
`LanguageModel` says what the methods ask of a model: they train a network of another make too
(tests/test_contract.py: a GRU). A new kind of layer has four places to train: `MIXERS` here,
`WIDTH_FIELDS` in system/config.py, the tables of system/costs.py, the names in
system/huggingface.py; views/estimate.py has what it keeps. To be made elastic, its units stand in
nested.py, importance.py and routers.py.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from attention import Attention, Forked, KeyValues, attention_mask
from mamba import Mamba2
from system import lora
from system.config import ModelConfig


class LanguageCache(Protocol):
    """What a `LanguageModel` remembers of the tokens that it has seen, a row for each sequence.
    Going on makes a new one: a prefix can be continued in many ways, one after the other, and
    gradients flow back into it from every continuation."""

    def select(self, rows: Tensor) -> "LanguageCache":
        """The cache of the named rows, in that order, repeated ones too."""

    def fork(self, n: int) -> "LanguageCache":
        """Each row n times in a row: B rows become B n."""


class LanguageModel(Protocol):
    """What all methods but Elastic's routers and slices, which want a `HybridLM`, ask of a model.
    It is an `nn.Module`, and `type(model)(model.config)` builds another of its shape, for frozen
    copies as teachers. Its vocabulary is `config.vocab_size` ids."""

    config: Any

    def __call__(self, tokens_BT: Tensor, cache: LanguageCache | None = None,
                 ids_BT: Tensor | None = None) -> tuple[Tensor, LanguageCache]:
        """cache: that of the tokens before, or None; ids_BT: the document of each token, -1 for
        padding; None for one document without padding, or for a cache's last one. Tokens see no
        other document and no later token. Contexts to be continued are padded on the left, and
        their padding is as if it were not there. Returns hidden_BTD, from which `logits` predicts
        each next token, and the cache after them."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden states, [..., D] to [..., V]: hidden W^T."""

    @property
    def output_matrix(self) -> Tensor:
        """W, [V, D], for methods that make logits in parts, or only where they are wanted."""


class FeedForward(nn.Module):
    """down(relu(up(x))^2) (`relu2`, Nemotron) or down(silu(gate(x)) up(x)) (`swiglu`, Qwen)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.gate_proj = (
            nn.Linear(config.d_model, config.d_ff, bias=False) if config.ffn == "swiglu" else None)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor, cached: tuple[()] | None, ids_BT: Tensor | None
                ) -> tuple[Tensor, tuple[()]]:
        """Tokens are independent here: nothing is cached, nothing can leak."""
        up_BTF = self.up_proj(x_BTD)
        if self.gate_proj is None:
            return self.down_proj(F.relu(up_BTF).square()), ()
        gate_BTF = self.gate_proj(x_BTD)
        if not torch.is_grad_enabled():
            return self.down_proj(F.silu(gate_BTF) * up_BTF), ()
        # Of four tensors as wide as F backward is given two, and makes the others again.
        return recompute(swiglu_down, gate_BTF, up_BTF, self.down_proj.weight, None,
                         *lora.adapter(self.down_proj),
                         use_reentrant=False, preserve_rng_state=False), ()


def swiglu_down(gate_BTF: Tensor, up_BTF: Tensor, *down: Tensor | float | None) -> Tensor:
    """down(silu(gate) up): y_BTD. down: what `lora.linear` asks for."""
    return lora.linear(F.silu(gate_BTF) * up_BTF, *down)


MIXERS = {"M": Mamba2, "*": Attention, "-": FeedForward}


@dataclass
class Cache:
    """The `LanguageCache` of a `HybridLM`.
    layers: a tuple per layer. `*`: attention's `KeyValues`, or `Forked`; `M`: the convolution's
    tail [B, W-1, E] and the state [B, H, P, N]; `-`: nothing. ids_BS: None if none is padded.
    With room for tokens to come, n_tokens is a tensor [1] and ids_BS has their places too."""

    layers: list[tuple[Tensor, ...]]
    n_tokens: int | Tensor
    ids_BS: Tensor | None = None

    def select(self, rows: Tensor) -> "Cache":
        """The named rows, in that order. Gradients add up over repeated rows."""
        layers = [layer.select(rows) if isinstance(layer, KeyValues | Forked) else
                  tuple(t.index_select(0, rows) for t in layer) for layer in self.layers]
        ids_BS = None if self.ids_BS is None else self.ids_BS.index_select(0, rows)
        return Cache(layers, self.n_tokens, ids_BS)

    def fork(self, n: int) -> "Cache":
        """Each row n times in a row. The keys and values of the forks' past are kept once."""
        layers = [layer.fork(n) if isinstance(layer, KeyValues | Forked) else
                  tuple(t.repeat_interleave(n, dim=0) for t in layer) for layer in self.layers]
        ids_BS = None if self.ids_BS is None else self.ids_BS.repeat_interleave(n, dim=0)
        return Cache(layers, self.n_tokens, ids_BS)

    def with_room(self, feed_R: Tensor, n: int) -> "Cache":
        """Of a cache that was just forked: one of its own memory, for n tokens more (feed_R and so
        on), one at a time and without gradients. `overwrite` it with what follows each."""
        next_1 = torch.full((1,), self.n_tokens, device=feed_R.device)
        layers = [layer.with_room(n, next_1) if isinstance(layer, Forked) else
                  tuple(t.clone() for t in layer) for layer in self.layers]
        old = self.ids_BS
        if old is None:
            old = feed_R.new_zeros(len(feed_R), self.n_tokens)
        more = old[:, -1:].clamp(min=0).expand(-1, n)
        return Cache(layers, next_1, torch.cat([old, more], dim=1))

    def overwrite(self, left: "Cache") -> None:
        """Go on to the cache after the next token, in this one's memory."""
        for layer, new in zip(self.layers, left.layers, strict=True):
            if not isinstance(layer, Forked):  # these have written in place
                for t, t_new in zip(layer, new, strict=True):
                    t.copy_(t_new)
        self.n_tokens += 1


Part = Callable[..., Any]  # runs in place of a module: given that, and what that would be given


@dataclass
class Inside:
    """A smaller model in the weights of a larger one, which runs it (nested.py)."""

    embed: Part
    layers: dict[int, Part]  # the others are left out
    norm: Part


class Block(nn.Module):
    """y = x + mixer(norm(x))."""

    def __init__(self, kind: str, config: ModelConfig):
        super().__init__()
        self.kind = kind
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = MIXERS[kind](config)

    def forward(self, x_BTD: Tensor, cached: tuple | None, context: Tensor | None,
                part: Part | None = None) -> tuple[Tensor, tuple]:
        """context: the attention mask for attention, the document ids for other mixers. part: what
        runs instead, on the weights of this block (sharded ones are whole only while it runs)."""
        run = self.run if part is None else functools.partial(part, self)
        return run(x_BTD, cached, context)

    def run(self, x_BTD: Tensor, cached: tuple | None, context: Tensor | None
            ) -> tuple[Tensor, tuple]:
        """The block itself: what is compiled, where that is asked for."""
        y_BTD, cached = self.mixer(self.norm(x_BTD), cached, context)
        return x_BTD + y_BTD, cached


class HybridLM(nn.Module):
    """A `LanguageModel`: tokens to final hidden states, through the layers of a pattern."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        config.check()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(k, config.layer(i)) for i, k in enumerate(config.pattern))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = (None if config.tie_embeddings
                     else nn.Linear(config.d_model, config.vocab_size, bias=False))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Embeddings N(0, 1), tied ones and the head N(0, 0.02^2); matrices N(0, 1/fan_in); 0
        biases of attention and what writes to the residual stream, which begins as the tokens."""
        for name, p in self.named_parameters():
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight", "proj.bias")):
                p.zero_()
            elif p.dim() < 2 or "conv" in name:
                continue
            elif name == "embed.weight":
                p.normal_(0.0, 0.02 if self.head is None else 1.0)
            else:
                p.normal_(0.0, 0.02 if name == "head.weight" else p.shape[1] ** -0.5)

    def forward(self, tokens_BT: Tensor, cache: Cache | None = None, ids_BT: Tensor | None = None,
                inside: Inside | None = None) -> tuple[Tensor, Cache]:
        """Hidden states after the last norm, and the cache: see `LanguageModel`. inside: a smaller
        model in these weights, to run instead; it takes no cache."""
        T, n_cached = tokens_BT.shape[1], 0 if cache is None else cache.n_tokens
        ids_BS = _join_ids(ids_BT, cache, tokens_BT)
        mask = attention_mask(ids_BS, T, n_cached, tokens_BT.device)
        x_BTD = self.embed(tokens_BT) if inside is None else inside.embed(self.embed, tokens_BT)
        layers = []
        for i, block in enumerate(self.layers):
            if inside is not None and i not in inside.layers:
                continue
            context = mask if isinstance(block.mixer, Attention) else ids_BT
            x_BTD, left = block(x_BTD, None if cache is None else cache.layers[i], context,
                                inside and inside.layers[i])
            layers.append(left)
        x_BTD = self.norm(x_BTD) if inside is None else inside.norm(self.norm, x_BTD)
        return x_BTD, Cache(layers, n_cached + T, ids_BS)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden states, [..., D] to [..., V]."""
        return F.linear(hidden, self.output_matrix)

    @property
    def output_matrix(self) -> Tensor:
        """[V, D]: the head, or the embedding where it serves as head."""
        return (self.embed if self.head is None else self.head).weight


def _join_ids(ids_BT: Tensor | None, cache: Cache | None, tokens_BT: Tensor) -> Tensor | None:
    """Document ids of cached and new positions; None where all are of document 0, none padded."""
    old = None if cache is None else cache.ids_BS
    if cache is None or (ids_BT is None and old is None):
        return ids_BT
    if isinstance(cache.n_tokens, Tensor):
        return old
    if ids_BT is None:
        ids_BT = old[:, -1:].clamp(min=0).expand(tokens_BT.shape)
    old = ids_BT.new_zeros(len(tokens_BT), cache.n_tokens) if old is None else old
    return torch.cat([old, ids_BT], dim=1)
