"""The hybrid language model: a stack of Mamba-2, attention and feed-forward layers, written as a
pattern.

`M` is a Mamba-2 mixer, `*` attention, `-` a feed-forward network, as in Nemotron-H (arXiv
2504.03624). Every layer is y = x + mixer(norm(x)), with one RMSNorm before it; a last norm and the
output matrix follow. One `Cache` holds what each layer needs to go on: it is made by every forward
pass, carries gradients, and can be forked.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Attention, attention_mask
from mamba import Mamba2
from system.config import ModelConfig


class FeedForward(nn.Module):
    """down(relu(up(x))^2) (`relu2`, Nemotron) or down(silu(gate(x)) up(x)) (`swiglu`, Qwen and
    Llama)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.gate_proj = (
            nn.Linear(config.d_model, config.d_ff, bias=False) if config.ffn == "swiglu" else None)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(
        self, x_BTD: Tensor, cached: tuple[()] | None, ids_BT: Tensor | None
    ) -> tuple[Tensor, tuple[()]]:
        """Tokens are independent here: nothing is cached, nothing can leak. Returns y_BTD and
        ()."""
        up_BTF = self.up_proj(x_BTD)
        if self.gate_proj is None:
            h_BTF = F.relu(up_BTF).square()
        else:
            h_BTF = F.silu(self.gate_proj(x_BTD)) * up_BTF
        return self.down_proj(h_BTF), ()


MIXERS = {"M": Mamba2, "*": Attention, "-": FeedForward}


@dataclass
class Cache:
    """What a model remembers of the tokens it has seen.

    layers: a tuple per layer. `*`: keys and values, [B, K, S, P] each; `M`: the convolution's tail
    [B, W-1, E] and the state [B, H, P, N]; `-`: nothing. ids_BS: document ids of the S positions
    (-1 padding), None if none is padded.
    """

    layers: list[tuple[Tensor, ...]]
    n_tokens: int
    ids_BS: Tensor | None = None

    def select(self, rows: Tensor) -> "Cache":
        """The cache of the named rows, in that order: to fork, to drop, to sort. Gradients add up
        over repeated rows."""
        layers = [tuple(t.index_select(0, rows) for t in layer) for layer in self.layers]
        return Cache(layers, self.n_tokens,
                     None if self.ids_BS is None else self.ids_BS.index_select(0, rows))

    def fork(self, n: int) -> "Cache":
        """Each row n times in a row: B rows become B n, to be continued in n ways."""
        some = self.layers[next(i for i, layer in enumerate(self.layers) if layer)][0]
        return self.select(torch.arange(some.shape[0], device=some.device).repeat_interleave(n))


class Block(nn.Module):
    """y = x + mixer(norm(x))."""

    def __init__(self, kind: str, config: ModelConfig):
        super().__init__()
        self.kind = kind
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = MIXERS[kind](config)

    def forward(
        self, x_BTD: Tensor, cached: tuple | None, context: Tensor | None) -> tuple[Tensor, tuple]:
        """context: the attention mask for `*`, the document ids for `M`."""
        y_BTD, cached = self.mixer(self.norm(x_BTD), cached, context)
        return x_BTD + y_BTD, cached


class HybridLM(nn.Module):
    """Tokens to final hidden states; `logits` applies the output matrix where it is wanted, and
    only there."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        config.check()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            Block(kind, config.layer(i)) for i, kind in enumerate(config.pattern))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = (None
                     if config.tie_embeddings
                     else nn.Linear(config.d_model, config.vocab_size, bias=False))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Embeddings N(0, 1); matrices N(0, 1/fan_in); those that write to the residual stream 0,
        and the head N(0, 0.02).

        The stream begins as the tokens themselves, not buried under the noise of untrained layers.
        Tied embeddings also serve as head, so they are N(0, 0.02).
        """
        for name, p in self.named_parameters():
            if p.dim() < 2 or "conv" in name:
                continue
            elif name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                p.zero_()
            elif name == "embed.weight":
                p.normal_(0.0, 0.02 if self.head is None else 1.0)
            else:
                p.normal_(0.0, 0.02 if name == "head.weight" else p.shape[1] ** -0.5)

    def forward(
        self, tokens_BT: Tensor, cache: Cache | None = None, ids_BT: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        """Args: tokens_BT: token ids; cache: of the tokens before, or None; ids_BT: document ids,
        -1 for padding, None for one document without padding. A sequence that goes on from a cache
        goes on with its document.

        Returns: hidden_BTD after the last norm, and the cache after these tokens. The cache given
        is not changed.
        """
        B, T = tokens_BT.shape
        n_cached = 0 if cache is None else cache.n_tokens
        ids_BS = _join_ids(ids_BT, cache, B, T, tokens_BT.device)
        mask = attention_mask(ids_BS, T, n_cached, tokens_BT.device)
        x_BTD = self.embed(tokens_BT)
        layers = []
        for i, block in enumerate(self.layers):
            context = mask if block.kind == "*" else ids_BT
            x_BTD, left = block(x_BTD, None if cache is None else cache.layers[i], context)
            layers.append(left)
        return self.norm(x_BTD), Cache(layers, n_cached + T, ids_BS)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden states, [..., D] to [..., V]."""
        return F.linear(hidden, self.output_matrix)

    @property
    def output_matrix(self) -> Tensor:
        """The matrix that makes logits of hidden states, [V, D]."""
        return (self.embed if self.head is None else self.head).weight


def _join_ids(
    ids_BT: Tensor | None, cache: Cache | None, B: int, T: int, device: torch.device
) -> Tensor | None:
    """Document ids of cached and new positions; None where both are plain (all of document 0, no
    padding)."""
    old = None if cache is None else cache.ids_BS
    if ids_BT is None and old is None:
        return None
    parts = []
    if cache is not None:
        parts.append(
            torch.zeros(B, cache.n_tokens, dtype=torch.long, device=device) if old is None else old)
    new = (torch.zeros(B, T, dtype=torch.long, device=device)
           if old is None
           else old[:, -1:].clamp(min=0).expand(B, T))
    parts.append(new if ids_BT is None else ids_BT)
    return torch.cat(parts, dim=1)
