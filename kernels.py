"""The model's hot operations, each in three forms under one signature: reference, PyTorch, Triton.

The state-space duality (SSD) of Mamba-2 (arXiv 2405.21060) is the main one. For one head, with a
step size dt_t > 0 and a negative rate a, a state h of shape [P, N] follows

    h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T          y_t = h_t c_t + d x_t

`ssd_reference` is these two lines in a loop. `ssd_chunked` cuts the sequence into chunks of Q
tokens: inside a chunk the recurrence is a masked, decayed attention (matrix products), and only C =
T/Q states are passed from chunk to chunk.

`ssd`, `ssd_step`, `causal_conv`, `gated_norm` and `selected_logp`, at the end of the file, are what
the model calls. `use` chooses their form: "auto" runs Triton on CUDA tensors and the fast PyTorch
form on others, "reference" and "triton" run that form everywhere.

How to read: the references first; they are the specification. Then `ssd_chunked`, then the Triton
kernels, which follow it. The tests hold the forms equal, in values, final states and every
gradient. Conventions shared by all operations here:

* `ids_BT` holds a document id per token. Tokens of different documents do not see each other; id -1
is padding, a document of its own that writes nothing. `None` means one document and no padding.
* A state or convolution tail that is passed in belongs to the document of the first token.
* Decays are computed in fp32 or wider, whatever the dtype of x.

Shape letters (the whole repo): B sequences, T tokens, D model width, F FFN width, V vocabulary, H
heads, P channels per head, K groups, R heads per group (H = K R), N state size, Q chunk length, C
chunks, S cached positions, W conv width, E conv channels, G thoughts, M tokens of a thought, L
layers.

Where the Triton kernels differ: their chunk is always 64 tokens; fp64 is left to PyTorch; matrix
products of fp32 numbers are exact only as far as torch's own are
(torch.set_float32_matmul_precision). The states between chunks are kept in memory in the dtype of
x. One token's state update has a gradient through the scan.

Not here: convolution and SiLU in one kernel, fp8, clusters or warp specialisation of newer cards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:
    triton = tl = None

    def jit(function: Callable) -> Callable:
        """Leaves the kernels below plain functions, which nobody calls."""
        return function


# ---------------------------------------------------------------------------------------------- SSD


def ssd_reference(x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTKN: Tensor, c_BTKN: Tensor,
                  d_H: Tensor, state_BHPN: Tensor | None = None, ids_BT: Tensor | None = None,
                  chunk: int = 64) -> tuple[Tensor, Tensor]:
    """The recurrence of SSD, one token at a time (arXiv 2405.21060, eq. 1 and 2). `chunk` is
    ignored.

    Args: x_BTHP: inputs; dt_BTH: step sizes after the softplus, >= 0; a_H: rates, < 0; b_BTKN,
    c_BTKN: input and output maps, shared by the R heads of a group; d_H: skip weights; state_BHPN:
    initial state, zeros if None.
    Returns: y_BTHP in the dtype of x, and the final state in fp32 (or wider).
    """
    B, T, H, P = x_BTHP.shape
    R, N = H // b_BTKN.shape[2], b_BTKN.shape[3]
    if state_BHPN is None:
        state_BHPN = x_BTHP.new_zeros(B, H, P, N)
    state_BHPN = _wide(state_BHPN)
    y_list = []
    for t in range(T):
        dt_BH, x_BHP = _wide(dt_BTH[:, t]), _wide(x_BTHP[:, t])
        b_BHN = _wide(b_BTKN[:, t]).repeat_interleave(R, dim=1)
        c_BHN = _wide(c_BTKN[:, t]).repeat_interleave(R, dim=1)
        if ids_BT is not None:
            dt_BH = dt_BH * (ids_BT[:, t, None] >= 0)
            if t > 0:
                state_BHPN = state_BHPN * (ids_BT[:, t] == ids_BT[:, t - 1])[:, None, None, None]
        decay_BH = torch.exp(dt_BH * a_H)
        state_BHPN = decay_BH[..., None, None] * state_BHPN + torch.einsum(
            "bh,bhp,bhn->bhpn", dt_BH, x_BHP, b_BHN)
        y_list.append(torch.einsum("bhpn,bhn->bhp", state_BHPN, c_BHN) + d_H[:, None] * x_BHP)
    return torch.stack(y_list, dim=1).to(x_BTHP.dtype), state_BHPN


def ssd_chunked(x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTKN: Tensor, c_BTKN: Tensor,
                d_H: Tensor, state_BHPN: Tensor | None = None, ids_BT: Tensor | None = None,
                chunk: int = 64) -> tuple[Tensor, Tensor]:
    """The same function as `ssd_reference` from matrix products over chunks (arXiv 2405.21060,
    section 6).

    With l the running sum of dt a inside a chunk, token q receives from token s <= q of its chunk
    the weight (c_q . b_s) exp(l_q - l_s) dt_s, and from the state at the chunk's start exp(l_q) h
    c_q. Cost is linear in T. c_q . b_s is computed once per group; the chunk state and its read-out
    are one matrix product per group. Half precision is widened to fp32 first.
    """
    B, T, H, P = x_BTHP.shape
    Q = min(chunk, T)
    C = -(-T // Q)
    if ids_BT is not None:
        dt_BTH = dt_BTH * (ids_BT >= 0)[..., None]
    x, dt, b, c = (_wide(t) for t in (x_BTHP, dt_BTH, b_BTKN, c_BTKN))
    if C * Q != T:  # padding with dt = 0 leaves the state as it is
        x, dt, b, c = (F.pad(t, [0, 0] * (t.dim() - 2) + [0, C * Q - T]) for t in (x, dt, b, c))

    # l: log decay since the chunk's start. m = l - log dt: the step size of token s rides along in
    # exp(l_q - m_s).
    dt_BCHQ = rearrange(dt, "b (c q) h -> b c h q", q=Q)
    l_BCHQ = (dt_BCHQ * a_H[:, None]).cumsum(-1)
    m_BCHQ = l_BCHQ - dt_BCHQ.clamp(min=1e-30).log()
    to_end_BCHQ, from_start_BCHQ = torch.exp(l_BCHQ[..., -1:] - m_BCHQ), torch.exp(l_BCHQ)
    carry_BCH = from_start_BCHQ[..., -1]
    seen = l_BCHQ.new_ones(
        Q, Q).tril()  # a token sees itself and those before it, of its own document
    if ids_BT is not None:
        ids_BCQ = torch.cat([ids_BT, ids_BT[:, -1:].expand(B, C * Q - T)], dim=1).view(B, C, Q)
        last_BC = ids_BCQ[..., -1]
        before_BC = torch.cat(
            [ids_BT[:, :1], last_BC[:, :-1]], dim=1
        )  # the document that a chunk's start state is of
        seen = seen * (ids_BCQ[..., :, None] == ids_BCQ[..., None, :])[:, :, None]
        to_end_BCHQ = to_end_BCHQ * (ids_BCQ == last_BC[..., None])[:, :, None]
        from_start_BCHQ = from_start_BCHQ * (ids_BCQ == before_BC[..., None])[:, :, None]
        carry_BCH = carry_BCH * (last_BC == before_BC)[..., None]

    x_BCQHP = rearrange(x, "b (c q) h p -> b c q h p", q=Q)
    b_BCKQN, c_BCKQN = (rearrange(t, "b (c q) k n -> b c k q n", q=Q) for t in (b, c))
    state_BHPN = (l_BCHQ.new_zeros(B, H, P, b.shape[-1])
                  if state_BHPN is None
                  else state_BHPN.to(l_BCHQ.dtype))
    with torch.autocast(x.device.type, enabled=False):
        y_BCQHP, state_BHPN = ChunkProducts.apply(x_BCQHP, b_BCKQN, c_BCKQN, l_BCHQ, m_BCHQ, seen,
                                                  to_end_BCHQ, from_start_BCHQ, carry_BCH, d_H,
                                                  state_BHPN)
    return y_BCQHP.flatten(1, 2)[:, :T].to(x_BTHP.dtype), state_BHPN


class ChunkProducts(torch.autograd.Function):
    """The heavy part of `ssd_chunked`: its matrix products, and the recurrence over chunks, with a
    backward pass.

    Time goes into passes over large tensors as much as into the products. Autograd would make twice
    as many passes, most of them into new memory. Two more traps of speed on CPU: the exp of -inf
    takes twice as long, so what is not seen is 0 before the exp (above the diagonal the difference
    is positive and could overflow) and multiplied by 0 after it; and an exp that underflows takes
    ten to thirty times as long, so differences end at -80, where nothing is left.
    """

    @staticmethod
    def forward(ctx, x_BCQHP: Tensor, b_BCKQN: Tensor, c_BCKQN: Tensor, l_BCHQ: Tensor,
                m_BCHQ: Tensor, seen: Tensor, to_end_BCHQ: Tensor, from_start_BCHQ: Tensor,
                carry_BCH: Tensor, d_H: Tensor, state_BHPN: Tensor) -> tuple[Tensor, Tensor]:
        """Args: seen: 1 or 0, of the shape [Q, Q] or [B, C, 1, Q, Q]. Returns y_BCQHP and the last
        state."""
        B, C, K, Q, N = b_BCKQN.shape
        to_end, from_start = (t.transpose(2, 3)[..., None] for t in (to_end_BCHQ, from_start_BCHQ))
        # Inside a chunk.
        scores = (c_BCKQN @ b_BCKQN.mT)[:, :, :, None]
        decay_BCHQQ = (
            (l_BCHQ[..., :, None] - m_BCHQ[..., None, :]).tril_().clamp_(min=-80).exp_().mul_(seen))
        weights_BCHQQ = (scores * decay_BCHQQ.unflatten(2, (K, -1))).flatten(2, 3)
        weights_BCHQQ.diagonal(dim1=-2, dim2=-1).add_(
            d_H[:, None])  # the skip: a token's weight in its own output
        x_BCHQP = x_BCQHP.transpose(2, 3).contiguous()
        inside_BCHQP = weights_BCHQQ @ x_BCHQP
        # Between chunks: what each adds to the state, the recurrence, and what is read of the
        # state. The R heads of a group share their matrices: they are one product.
        xend = _by_group(x_BCQHP * to_end, K)
        added_BCHPN = (xend.mT @ b_BCKQN).view(B, C, -1, x_BCQHP.shape[-1], N)
        start_BCHPN, state_BHPN = _recur(added_BCHPN, carry_BCH, state_BHPN, range(C))
        read_BCQHP = _by_head(c_BCKQN @ start_BCHPN.view(B, C, K, -1, N).mT, x_BCQHP)
        y_BCQHP = torch.addcmul(
            inside_BCHQP.transpose(2, 3), read_BCQHP, from_start, out=torch.empty_like(x_BCQHP))
        ctx.save_for_backward(x_BCQHP, x_BCHQP, b_BCKQN, c_BCKQN, scores, decay_BCHQQ,
                              weights_BCHQQ, to_end, from_start, carry_BCH, xend, start_BCHPN,
                              read_BCQHP)
        return y_BCQHP, state_BHPN

    @staticmethod
    def backward(ctx, dy_BCQHP: Tensor, dstate_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        """The same steps in reverse. Gradients of l and m are row and column sums of one matrix:
        what cancels, cancels."""
        (x_BCQHP, x_BCHQP, b_BCKQN, c_BCKQN, scores, decay_BCHQQ, weights_BCHQQ, to_end, from_start,
         carry_BCH, xend, start_BCHPN, read_BCQHP) = ctx.saved_tensors
        B, C, K, Q, N = b_BCKQN.shape
        dread = _by_group(dy_BCQHP * from_start, K)
        dfrom_start = (dy_BCQHP * read_BCQHP).sum(-1).transpose(2, 3)
        dc_BCKQN = dread @ start_BCHPN.view(B, C, K, -1, N)
        dstart_BCHPN = (dread.mT @ c_BCKQN).view(start_BCHPN.shape)
        dadded_BCHPN, dstate_BHPN = _recur(dstart_BCHPN, carry_BCH, dstate_BHPN, reversed(range(C)))
        dcarry_BCH = (dadded_BCHPN * start_BCHPN).sum((-2, -1))
        dadded = dadded_BCHPN.view(B, C, K, -1, N)
        db_BCKQN = xend @ dadded
        dxend_BCQHP = _by_head(b_BCKQN @ dadded.mT, x_BCQHP)
        dto_end = (dxend_BCQHP * x_BCQHP).sum(-1).transpose(2, 3)

        dy_BCHQP = dy_BCQHP.transpose(2, 3).contiguous()
        dx_BCQHP = dxend_BCQHP.mul_(to_end).add_((weights_BCHQQ.mT @ dy_BCHQP).transpose(2, 3))
        dweights_BCHQQ = dy_BCHQP @ x_BCHQP.mT
        dd_H = dweights_BCHQQ.diagonal(dim1=-2, dim2=-1).sum((0, 1, 3))
        dweights = dweights_BCHQQ.mul_(decay_BCHQQ).unflatten(2, (K, -1))
        dscores_BCKQQ = dweights.sum(3)
        db_BCKQN += dscores_BCKQQ.mT @ c_BCKQN
        dc_BCKQN += dscores_BCKQQ @ b_BCKQN
        dlog_BCHQQ = dweights.mul_(scores).flatten(2, 3)
        dl_BCHQ, dm_BCHQ = dlog_BCHQQ.sum(-1), dlog_BCHQQ.sum(-2).neg_()
        return (dx_BCQHP, db_BCKQN, dc_BCKQN, dl_BCHQ, dm_BCHQ, None, dto_end, dfrom_start,
                dcarry_BCH, dd_H, dstate_BHPN)


def _recur(
    added_BCHPN: Tensor, carry_BCH: Tensor, state_BHPN: Tensor, chunks: Iterable[int]
) -> tuple[Tensor, Tensor]:
    """The recurrence state <- carry state + added: the state before each chunk, and the one after
    all.

    Walked from the last chunk to the first it is its own gradient: from those of the states before
    the chunks to those of what the chunks add.
    """
    before_BCHPN, state_BHPN = torch.empty_like(added_BCHPN), state_BHPN.clone()
    for i in chunks:
        before_BCHPN[:, i] = state_BHPN
        state_BHPN.mul_(carry_BCH[:, i, :, None, None]).add_(added_BCHPN[:, i])
    return before_BCHPN, state_BHPN


def _by_group(t_BCQHP: Tensor, K: int) -> Tensor:
    """[B, C, K, Q, R P]: the channels of a group's R heads in a row."""
    return t_BCQHP.unflatten(3, (K, -1)).flatten(4).transpose(2, 3)


def _by_head(t: Tensor, like_BCQHP: Tensor) -> Tensor:
    """From [B, C, K, Q, R P] back."""
    return t.transpose(2, 3).reshape(like_BCQHP.shape)


def ssd_step_reference(x_BHP: Tensor, dt_BH: Tensor, a_H: Tensor, b_BKN: Tensor, c_BKN: Tensor,
                       d_H: Tensor, state_BHPN: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: the new y_BHP and the new state. Differentiable; nothing is
    changed in place."""
    x_BTHP, dt_BTH, b_BTKN, c_BTKN = (t[:, None] for t in (x_BHP, dt_BH, b_BKN, c_BKN))
    y_BTHP, state_BHPN = ssd_reference(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, state_BHPN)
    return y_BTHP[:, 0], state_BHPN


def ssd_step_torch(x_BHP: Tensor, dt_BH: Tensor, a_H: Tensor, b_BKN: Tensor, c_BKN: Tensor,
                   d_H: Tensor, state_BHPN: Tensor) -> tuple[Tensor, Tensor]:
    """`ssd_step_reference` with as few passes over the state as PyTorch allows."""
    B, H, P = x_BHP.shape
    K, N = b_BKN.shape[1:]
    decay_BH = torch.exp(_wide(dt_BH) * a_H)
    xdt_BHP = _wide(x_BHP * dt_BH[..., None].to(x_BHP.dtype))
    # The R heads of a group are one matrix [R P, N]: B and C need no copy a head.
    state = (state_BHPN * decay_BH[..., None, None]).view(B, K, -1, N)
    state = torch.addcmul(state, xdt_BHP.view(B, K, -1, 1), _wide(b_BKN)[:, :, None])
    y = (
        _wide(c_BKN)[:, :, None] @ state.mT
    )  # a row times a matrix; a matrix times a column takes eight times as long
    y_BHP = y.view(B, H, P).to(x_BHP.dtype)
    return torch.addcmul(y_BHP, x_BHP, d_H[:, None].to(x_BHP.dtype)), state.view(B, H, P, N)


# ------------------------------------------------------------------------------- causal convolution


def causal_conv_reference(x_BTE: Tensor, weight_EW: Tensor, bias_E: Tensor,
                          tail_BXE: Tensor | None = None,
                          ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution written as its sum: y_t = bias + sum over j of weight_j x_{t -
    (W-1) + j}.

    Args: tail_BXE: the W - 1 inputs before x, zeros if None (X = W - 1). ids_BT: documents, see the
    module's docstring.
    Returns: y_BTE (before the SiLU), and the W - 1 last inputs, to go on from.
    """
    B, T, E = x_BTE.shape
    W = weight_EW.shape[1]
    ids_BT = torch.zeros(B, T, dtype=torch.long, device=x_BTE.device) if ids_BT is None else ids_BT
    tail_BXE = x_BTE.new_zeros(B, W - 1, E) if tail_BXE is None else tail_BXE
    x_all = torch.cat([tail_BXE, x_BTE], dim=1)
    ids_all = torch.cat([ids_BT[:, :1].expand(B, W - 1), ids_BT], dim=1)
    rows = []
    for t in range(T):
        y_BE = bias_E.expand(B, E)
        for j in range(W):
            same_B = (ids_all[:, t + j] == ids_BT[:, t]) & (ids_BT[:, t] >= 0)
            y_BE = y_BE + weight_EW[:, j] * x_all[:, t + j] * same_B[:, None]
        rows.append(y_BE)
    return torch.stack(rows, dim=1), x_all[:, T:] * _kept(ids_all[:, T:], ids_BT)[..., None]


def causal_conv_torch(x_BTE: Tensor, weight_EW: Tensor, bias_E: Tensor,
                      tail_BXE: Tensor | None = None,
                      ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`causal_conv_reference` as W shifted multiply-adds over whole sequences (faster on CPU than
    F.conv1d)."""
    B, T, E = x_BTE.shape
    W = weight_EW.shape[1]
    tail_BXE = x_BTE.new_zeros(B, W - 1, E) if tail_BXE is None else tail_BXE
    x_BUE, cuts = torch.cat([tail_BXE, x_BTE], dim=1), None
    tail_BXE = x_BUE[:, T:]
    if T == 1 and ids_BT is None:  # a step of decoding is too small for W passes
        return (x_BUE * weight_EW.t()).sum(dim=1, keepdim=True) + bias_E, tail_BXE
    if ids_BT is not None:
        ids_BU = torch.cat([ids_BT[:, :1].expand(B, W - 1), ids_BT], dim=1)
        cuts = [((ids_BU[:, j : j + T] != ids_BT) | (ids_BT < 0)).nonzero(as_tuple=True)
                for j in range(W)]
        tail_BXE = tail_BXE * _kept(ids_BU[:, T:], ids_BT)[..., None].to(x_BTE.dtype)
    return ShiftedSum.apply(x_BUE, weight_EW, bias_E, cuts), tail_BXE


def _kept(ids_BX: Tensor, ids_BT: Tensor) -> Tensor:
    """Which of the last W - 1 inputs the next token may read: those of the last token's document,
    unless it is padding."""
    return (ids_BX == ids_BT[:, -1:]) & (ids_BX >= 0)


class ShiftedSum(torch.autograd.Function):
    """y_t = bias + sum over j of weight_j x_{t+j}: the convolution, with a backward pass that adds
    in place.

    Autograd would make a padded copy of the gradient for each of the W taps; this makes one. Two
    traps of speed: rows of weight_EW are strided, which keeps the multiply-adds from being
    vectorised; and so would a mask over documents, while boundaries are few: `cuts` lists, for each
    tap, the (row, token) pairs that it must not reach.
    """

    @staticmethod
    def forward(ctx, x_BUE: Tensor, weight_EW: Tensor, bias_E: Tensor,
                cuts: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        """U = T + W - 1 inputs give T outputs."""
        weight_WE = weight_EW.t().contiguous()
        ctx.save_for_backward(x_BUE, weight_WE)
        ctx.cuts = cuts
        T = x_BUE.shape[1] - len(weight_WE) + 1
        y_BTE = torch.addcmul(bias_E, _cut(x_BUE[:, -T:], cuts, -1), weight_WE[-1])
        for j in range(len(weight_WE) - 1):
            y_BTE.addcmul_(_cut(x_BUE[:, j : j + T], cuts, j), weight_WE[j])
        return y_BTE

    @staticmethod
    def backward(ctx, grad_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of the inputs, the weights and the bias."""
        x_BUE, weight_WE = ctx.saved_tensors
        T, dx_BUE, dw = grad_BTE.shape[1], torch.zeros_like(x_BUE), []
        products_BTE = torch.empty_like(grad_BTE)
        for j in range(len(weight_WE)):
            tap_BTE = _cut(grad_BTE, ctx.cuts, j)
            dx_BUE[:, j : j + T].addcmul_(tap_BTE, weight_WE[j])
            dw.append(torch.mul(tap_BTE, x_BUE[:, j : j + T], out=products_BTE).sum(dim=(0, 1)))
        return dx_BUE, torch.stack(dw, dim=1), grad_BTE.sum(dim=(0, 1)), None


def _cut(t_BTE: Tensor, cuts: list[tuple[Tensor, Tensor]] | None, j: int) -> Tensor:
    """The tensor with zeros where tap j would reach into another document."""
    if cuts is None or len(cuts[j][0]) == 0:
        return t_BTE
    t_BTE = t_BTE.clone()
    t_BTE[cuts[j]] = 0
    return t_BTE


# ---------------------------------------------------------------------------- gated norm, log-probs


def gated_norm_reference(
    y_BTE: Tensor, z_BTE: Tensor, weight_E: Tensor, n_groups: int, eps: float) -> Tensor:
    """Mamba-2's gate and grouped RMSNorm: g = y silu(z); g / sqrt(mean over its group of g^2 + eps)
    * weight.

    The gate comes before the norm, as in NVIDIA's Nemotron-H. Statistics are taken in fp32 or
    wider.
    """
    return GatedNorm.apply(_wide(y_BTE), _wide(z_BTE), weight_E, n_groups, eps).to(y_BTE.dtype)


class GatedNorm(torch.autograd.Function):
    """`gated_norm` in fp32 or wider, with half as many passes over large tensors as autograd makes,
    most of them in place.

    With n = g / rms(g): dg = (dn - n mean(n dn)) / rms(g), the mean being over a group.
    """

    @staticmethod
    def forward(
        ctx, y_BTE: Tensor, z_BTE: Tensor, weight_E: Tensor, n_groups: int, eps: float) -> Tensor:
        """The gate, the norm, the weight."""
        n_BTE = y_BTE * F.silu(z_BTE)
        groups = n_BTE.unflatten(-1, (n_groups, -1))
        scale = torch.rsqrt(
            torch.linalg.vector_norm(groups, dim=-1, keepdim=True).square() / groups.shape[-1] + eps
        )
        groups.mul_(scale)
        ctx.n_groups = n_groups
        ctx.save_for_backward(y_BTE, z_BTE, weight_E, n_BTE, scale)
        return weight_E * n_BTE

    @staticmethod
    def backward(ctx, grad_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients of y, z and the weight. One buffer serves n grad, then n dn, then dn and at
        last dg."""
        y_BTE, z_BTE, weight_E, n_BTE, scale = ctx.saved_tensors
        buffer_BTE = grad_BTE * n_BTE
        dweight_E = buffer_BTE.sum(dim=(0, 1))
        groups, normed = (
            t.unflatten(-1, (ctx.n_groups, -1)) for t in (buffer_BTE.mul_(weight_E), n_BTE))
        mean = groups.mean(-1, keepdim=True)
        torch.mul(grad_BTE, weight_E, out=buffer_BTE)
        groups.addcmul_(normed, mean, value=-1).mul_(scale)
        dy_BTE = F.silu(z_BTE).mul_(buffer_BTE)
        return (dy_BTE, torch.ops.aten.silu_backward(buffer_BTE.mul_(y_BTE), z_BTE), dweight_E,
                None, None)


def token_logp(
    logits: Tensor, token: Tensor, banned: tuple[int, ...] = (), temperature: float = 1.0
) -> Tensor:
    """log softmax(logits / temperature)[token], the softmax taken over the vocabulary without the
    `banned` ids.

    Leading dimensions are free: logits [..., V] and token [...] give [...]. A banned token itself
    gets -inf.
    """
    logits = mask_banned(_wide(logits), banned) / temperature
    return logits.gather(-1, token[..., None])[..., 0] - logits.logsumexp(-1)


def selected_logp_reference(hidden: Tensor, weight_VD: Tensor, token: Tensor,
                            banned: tuple[int, ...] = (), temperature: float = 1.0) -> Tensor:
    """`token_logp` of the logits hidden W^T, made and kept as a whole: hidden [..., D] and token
    [...] give [...]."""
    return token_logp(F.linear(hidden, weight_VD), token, banned, temperature)


def mask_banned(logits: Tensor, banned: tuple[int, ...]) -> Tensor:
    """A copy of the logits with -inf at the banned ids (the same tensor where none is banned)."""
    if not banned:
        return logits
    index = torch.tensor(banned, device=logits.device)
    return logits.index_fill(-1, index, float("-inf"))


class SelectedLogp(torch.autograd.Function):
    """Log-probabilities of given tokens without a tensor of [tokens, vocabulary], forward or
    backward.

    The vocabulary is cut into parts of VOCABULARY_TILE ids. Forward keeps a running log-sum-exp;
    backward computes each part's logits again and turns them into their gradient. The matrix
    products are PyTorch's, on a GPU too: beside them the passes over a part's logits are cheap, and
    in Triton they are one kernel each.
    """

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, token_T, banned, temperature, add_part, part_gradient):
        """add_part and part_gradient: the two passes over a part's logits, from PyTorch or from
        Triton."""
        lse_T = _wide(hidden_TD[:, 0]).new_full(token_T.shape, float("-inf"))
        chosen_T = lse_T.clone()
        for first, logits in _vocabulary_parts(hidden_TD, weight_VD, banned):
            add_part(logits, token_T - first, temperature, lse_T, chosen_T)
        ctx.save_for_backward(hidden_TD, weight_VD, token_T, lse_T)
        ctx.rest = banned, temperature, part_gradient
        return chosen_T - lse_T

    @staticmethod
    def backward(ctx, grad_T):
        """Gradients of the hidden states, summed in fp32 or wider, and of the weights."""
        hidden_TD, weight_VD, token_T, lse_T = ctx.saved_tensors
        banned, temperature, part_gradient = ctx.rest
        dhidden_TD = torch.zeros_like(hidden_TD, dtype=lse_T.dtype)
        dweight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        for first, logits in _vocabulary_parts(hidden_TD, weight_VD, banned):
            end = first + logits.shape[1]
            dlogits = part_gradient(logits, token_T - first, temperature, lse_T, grad_T)
            dhidden_TD += dlogits @ weight_VD[first:end]
            if dweight_VD is not None:
                torch.mm(dlogits.t(), hidden_TD, out=dweight_VD[first:end])
        return dhidden_TD.to(hidden_TD.dtype), dweight_VD, None, None, None, None, None


VOCABULARY_TILE = 4096  # ids


def _vocabulary_parts(hidden_TD: Tensor, weight_VD: Tensor, banned: tuple[int, ...]):
    """Yields the first id and the logits of each part of the vocabulary, -inf at the banned ids."""
    for first in range(0, len(weight_VD), VOCABULARY_TILE):
        logits = hidden_TD @ weight_VD[first : first + VOCABULARY_TILE].t()
        inside = tuple(i - first for i in banned if 0 <= i - first < logits.shape[1])
        if inside:
            logits[:, inside] = float("-inf")
        yield first, logits


def _add_part(
    logits: Tensor, at_T: Tensor, temperature: float, lse_T: Tensor, chosen_T: Tensor) -> None:
    """Adds a part's logits to the running log-sum-exp, and notes those of the tokens that lie in
    it, in place."""
    logits = _wide(logits).div_(temperature)
    rows = ((at_T >= 0) & (at_T < logits.shape[1])).nonzero()[:, 0]
    chosen_T[rows] = logits[rows, at_T[rows]]
    top_T = torch.maximum(logits.amax(-1), lse_T).clamp(
        min=torch.finfo(lse_T.dtype).min)  # finite, were all banned
    total_T = logits.sub_(top_T[:, None]).exp_().sum(-1) + torch.exp(lse_T - top_T)
    torch.add(top_T, total_T.log(), out=lse_T)


def _part_gradient(
    logits: Tensor, at_T: Tensor, temperature: float, lse_T: Tensor, grad_T: Tensor) -> Tensor:
    """Gradient of a part's logits: (1 at the token - softmax) grad / temperature, 0 at banned
    ids."""
    rows = ((at_T >= 0) & (at_T < logits.shape[1])).nonzero()[:, 0]
    rows = rows[logits[rows, at_T[rows]] > float("-inf")]
    p = _wide(logits).div_(temperature).sub_(lse_T[:, None]).exp_()
    p[rows, at_T[rows]] -= 1
    return p.mul_(grad_T[:, None] / -temperature).to(logits.dtype)


def selected_logp_torch(hidden: Tensor, weight_VD: Tensor, token: Tensor,
                        banned: tuple[int, ...] = (), temperature: float = 1.0) -> Tensor:
    """`selected_logp_reference` in parts of the vocabulary."""
    return _selected_logp(hidden, weight_VD, token, banned, temperature, _add_part, _part_gradient)


def _selected_logp(hidden, weight_VD, token, banned, temperature, *passes):
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(
        device):  # so that backward is in it too
        dtype = torch.get_autocast_dtype(device)
        hidden, weight_VD = hidden.to(dtype), weight_VD.to(dtype)
    hidden_TD, token_T = hidden.reshape(-1, hidden.shape[-1]), token.reshape(-1)
    return SelectedLogp.apply(hidden_TD, weight_VD, token_T, banned, temperature, *passes).view(
        token.shape)


def _wide(t: Tensor) -> Tensor:
    """fp32 for half precision, the tensor itself for fp32 and fp64."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


# ---------------------------------------------------------------------------- Triton: shared pieces

# How to read a kernel: it runs once per point of its grid, on whole tiles whose sizes are powers of
# two (TILE tokens, P2 and N2 at least 16: a matrix product takes no less); what lies outside is
# loaded as 0 and not stored. Names end in the letters of the tile. Row (b, t) of a tensor [B, T,
# ...] begins at (b T + t) stride. Where a tile begins is one number of 64 bits (61,000 tokens of a
# wide model pass 2^31); places inside a tile take 32 bits, for registers are scarce. No atomics and
# no autotuning: a result does not depend on timing.

TILE = 64  # tokens of a chunk


DBC_TILE = 32  # entries of the state that `ssd_dbc_kernel` holds; with more, or more than 256 bytes of x, registers spill


CONV_TILE = 64, 64  # tokens and channels


NORM_ROWS = 32  # tokens whose part of a weight gradient is summed in registers


@jit
def _program(axis: tl.constexpr):
    """This program's place in the grid, in 64 bits, and with it every place in memory that is
    computed from it."""
    return tl.program_id(axis).to(tl.int64)


@jit
def _load(start, i, j, inside_i, inside_j):
    """The tile start[i, j] of row and column offsets, 0 outside. Swapping the arguments loads the
    transposed tile."""
    return tl.load(
        start + (i[:, None] + j[None, :]), mask=inside_i[:, None] & inside_j[None, :], other=0.0)


@jit
def _store(start, i, j, value_IJ, inside_i, inside_j):
    """The reverse, in the dtype of what is stored to."""
    tile = start + (i[:, None] + j[None, :])
    tl.store(tile, value_IJ.to(start.dtype.element_ty), mask=inside_i[:, None] & inside_j[None, :])


@jit
def _document(ids, batch, t, T):
    """Document of position t, that of the nearest position outside [0, T); 0 where there are no
    ids."""
    t = tl.maximum(tl.minimum(t, T - 1), 0)
    return t * 0 if ids is None else tl.load(ids + batch * T + t)


def _rows(t: Tensor) -> tuple[Tensor, int]:
    """The tensor and the stride s with which its row (b, t) begins at (b T + t) s. Copied only if
    there is no such s.

    The parts of a split projection pass as they are.
    """
    stride = t.stride(1) if t.shape[1] > 1 else t.stride(0)
    if t[0, 0].is_contiguous() and t.stride(0) == t.shape[1] * stride:
        return t, stride
    return t.contiguous(), t[0, 0].numel()


def _tile(n: int) -> int:
    """Size of the tile that n entries fit in."""
    return max(16, triton.next_power_of_2(n))


def _ceil(n: int, by: int) -> int:
    return -(-n // by)


def _precision() -> str:
    """Of matrix products of fp32 numbers: as torch's own, tf32 only after
    torch.set_float32_matmul_precision."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# -------------------------------------------------------------------------------------- Triton: SSD


@jit
def _chunk(dt, a, ids, batch, head, chunk, T, H: tl.constexpr, Q: tl.constexpr):
    """What the tokens of one chunk share: see `ssd_chunked`, whose names these are; l is the log
    decay.

    Every exponent is cut off at 0: rounding can leave a difference of equal sums a little above,
    and far above the diagonal it would overflow. Tokens past the end have a step size of 0: they
    neither write nor decay.
    """
    q = tl.arange(0, Q)
    dt_Q = tl.load(
        dt + (batch * T + chunk * Q) * H + head + q * H, mask=q < T - chunk * Q, other=0.0)
    l_Q = tl.cumsum(dt_Q * tl.load(a + head), 0)
    total = tl.sum(tl.where(q == Q - 1, l_Q, 0.0), 0)
    changes_Q, n_changes = q * 0, 0
    if ids is not None:
        changed_Q = _document(ids, batch, chunk * Q + q, T) != _document(
            ids, batch, chunk * Q + q - 1, T)
        changes_Q, n_changes = (tl.cumsum(changed_Q.to(tl.int32), 0),
                                tl.sum(changed_Q.to(tl.int32), 0))
    to_end_Q = tl.where(changes_Q == n_changes, tl.exp(tl.minimum(total - l_Q, 0.0)), 0.0)
    from_start_Q = tl.where(changes_Q == 0, tl.exp(tl.minimum(l_Q, 0.0)), 0.0)
    carry = tl.where(n_changes == 0, tl.exp(tl.minimum(total, 0.0)), 0.0)
    return changes_Q, dt_Q, l_Q, to_end_Q, from_start_Q, carry


@jit
def _decay(l_Q, changes_Q, TRANSPOSED: tl.constexpr, Q: tl.constexpr):
    """exp(l_q - l_s) where token q sees token s: [q, s], or [s, q] if TRANSPOSED."""
    i_Q = tl.arange(0, Q)
    if TRANSPOSED:
        seen_QQ, difference_QQ = i_Q[None, :] >= i_Q[:, None], l_Q[None, :] - l_Q[:, None]
    else:
        seen_QQ, difference_QQ = i_Q[:, None] >= i_Q[None, :], l_Q[:, None] - l_Q[None, :]
    return tl.where(seen_QQ & (changes_Q[:, None] == changes_Q[None, :]),
                    tl.exp(tl.minimum(difference_QQ, 0.0)), 0.0)


@jit
def ssd_states_kernel(x, dt, a, b, ids, first, states, last, stride_x, stride_b, T,
                      BACKWARD: tl.constexpr, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
                      N: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr, Q: tl.constexpr,
                      PRECISION: tl.constexpr):
    """Walks along the chunks with one tile of one head's state: stores it before each chunk, and at
    the end.

    BACKWARD is the mirror: x is the gradient of y, b is c, and what is stored is the gradient of
    the state after each chunk; the walk is from the last to the first.
    """
    batch, head = _program(0) // H, _program(0) % H
    q, n_chunks = tl.arange(0, Q), tl.cdiv(T, Q)
    p, n = ((_program(1) * P2).to(tl.int32) + tl.arange(0, P2),
            (_program(2) * N2).to(tl.int32) + tl.arange(0, N2))
    state_PN = tl.zeros([P2, N2], tl.float32)
    if first is not None:
        state_PN += _load(first + _program(0) * P * N, p * N, n, p < P, n < N)
    for i in range(n_chunks):
        chunk = n_chunks - 1 - i if BACKWARD else i
        _store(states + ((batch * n_chunks + chunk) * H + head) * P * N, p * N, n, state_PN, p < P,
               n < N)
        _, dt_Q, _, to_end_Q, from_start_Q, carry = _chunk(dt, a, ids, batch, head, chunk, T, H, Q)
        row, inside_Q = batch * T + chunk * Q, q < T - chunk * Q
        x_PQ = _load(x + row * stride_x + head * P, p, q * stride_x, p < P, inside_Q)
        b_QN = _load(b + row * stride_b + head // R * N, q * stride_b, n, inside_Q, n < N)
        x_PQ = x_PQ * (from_start_Q if BACKWARD else to_end_Q * dt_Q)[None, :]
        state_PN = carry * state_PN + tl.dot(
            x_PQ.to(x.dtype.element_ty), b_QN, input_precision=PRECISION)
    _store(last + _program(0) * P * N, p * N, n, state_PN, p < P, n < N)


@jit
def ssd_scan_kernel(x, dt, a, b, c, d, ids, states, y, stride_x, stride_b, stride_c, T,
                    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                    P2: tl.constexpr, N2: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr):
    """y of one chunk of one head: from the tokens of the chunk, from the state before it, and the
    skip."""
    batch, head, chunk = _program(0) // H, _program(0) % H, _program(1)
    q, p, n = tl.arange(0, Q), tl.arange(0, P2), tl.arange(0, N2)
    row, inside_Q = batch * T + chunk * Q, q < T - chunk * Q
    changes_Q, dt_Q, l_Q, _, from_start_Q, _ = _chunk(dt, a, ids, batch, head, chunk, T, H, Q)
    b_NQ = _load(b + row * stride_b + head // R * N, n, q * stride_b, n < N, inside_Q)
    c_QN = _load(c + row * stride_c + head // R * N, q * stride_c, n, inside_Q, n < N)
    weights_QQ = (tl.dot(c_QN, b_NQ, input_precision=PRECISION)
                  * _decay(l_Q, changes_Q, False, Q)
                  * dt_Q[None, :])
    at_chunk = (batch * tl.num_programs(1) + chunk) * H + head
    state_NP = _load(states + at_chunk * P * N, n, p * N, n < N, p < P)
    y_QP = from_start_Q[:, None] * tl.dot(c_QN, state_NP, input_precision=PRECISION)
    x_QP = _load(x + row * stride_x + head * P, q * stride_x, p, inside_Q, p < P)
    y_QP += tl.dot(weights_QQ.to(x.dtype.element_ty), x_QP, input_precision=PRECISION)
    y_QP += tl.load(d + head) * x_QP
    _store(y + (row * H + head) * P, q * (H * P), p, y_QP, inside_Q, p < P)


@jit
def ssd_dx_kernel(x, dt, a, b, c, d, ids, dy, dstates, dx, ddt, dd, stride_x, stride_b, stride_c, T,
                  H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                  P2: tl.constexpr, N2: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr):
    """dx of one chunk of one head, the gradient of dt other than through the decays, and the
    chunk's part of dd.

    Token s is read by the tokens q >= s of its chunk and by the state after it: u_s = sum over q of
    (c_q . b_s) exp(l_q - l_s) dy_q + exp(l_Q - l_s) dstate b_s. Then dx_s = dt_s u_s + d dy_s, and
    dt_s has the gradient x_s . u_s.
    """
    batch, head, chunk = _program(0) // H, _program(0) % H, _program(1)
    q, p, n = tl.arange(0, Q), tl.arange(0, P2), tl.arange(0, N2)
    row, inside_Q = batch * T + chunk * Q, q < T - chunk * Q
    changes_Q, dt_Q, l_Q, to_end_Q, _, _ = _chunk(dt, a, ids, batch, head, chunk, T, H, Q)
    b_QN = _load(b + row * stride_b + head // R * N, q * stride_b, n, inside_Q, n < N)
    c_NQ = _load(c + row * stride_c + head // R * N, n, q * stride_c, n < N, inside_Q)
    weights_QQ = tl.dot(b_QN, c_NQ, input_precision=PRECISION) * _decay(l_Q, changes_Q, True, Q)
    at_chunk = (batch * tl.num_programs(1) + chunk) * H + head
    dstate_NP = _load(dstates + at_chunk * P * N, n, p * N, n < N, p < P)
    u_QP = to_end_Q[:, None] * tl.dot(b_QN, dstate_NP, input_precision=PRECISION)
    dy_QP = _load(dy + (row * H + head) * P, q * (H * P), p, inside_Q, p < P)
    u_QP += tl.dot(weights_QQ.to(dy.dtype.element_ty), dy_QP, input_precision=PRECISION)
    x_QP = _load(x + row * stride_x + head * P, q * stride_x, p, inside_Q, p < P).to(tl.float32)
    dx_QP = dt_Q[:, None] * u_QP + tl.load(d + head) * dy_QP
    _store(dx + (row * H + head) * P, q * (H * P), p, dx_QP, inside_Q, p < P)
    tl.store(ddt + row * H + head + q * H, tl.sum(x_QP * u_QP, 1), mask=inside_Q)
    tl.store(dd + at_chunk, tl.sum(x_QP * dy_QP))


@jit
def ssd_dbc_kernel(x, dt, a, b, c, ids, dy, states, dstates, db, dc, dda, stride_x, stride_b,
                   stride_c, T, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                   P2: tl.constexpr, N2: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr):
    """db and dc of one chunk of one group and N2 of its N entries, in a loop over the group's
    heads; and parts of dda.

    dda_t is the gradient of dt_t a: a sum over all that crosses from before t to t or later. Of the
    chunk's own pairs that is the sum of z_qs over s < t <= q: row sums minus column sums, from t
    on. They must come from the same fp32 tile, for they nearly cancel. All of it is a sum over N
    and P, so programs take parts of N, and the loop takes parts of P. The weights are needed as [q,
    s] and as [s, q], and computed twice: transposing a product in registers to use it in the next
    one has given wrong results on Hopper. And only one product is added straight to each sum: two
    in a loop have given wrong results on Blackwell.
    """
    K: tl.constexpr = H // R
    PARTS: tl.constexpr = (P + P2 - 1) // P2
    batch, group, chunk = _program(0) // K, _program(0) % K, _program(1)
    q, n = tl.arange(0, Q), (_program(2) * N2).to(tl.int32) + tl.arange(0, N2)
    row, inside_Q = batch * T + chunk * Q, q < T - chunk * Q
    b_QN = _load(b + row * stride_b + group * N, q * stride_b, n, inside_Q, n < N)
    c_QN = _load(c + row * stride_c + group * N, q * stride_c, n, inside_Q, n < N)
    db_QN, dc_QN = tl.zeros([Q, N2], tl.float32), tl.zeros([Q, N2], tl.float32)
    for i in range(R * PARTS):
        head, p = group * R + i // PARTS, i % PARTS * P2 + tl.arange(0, P2)
        changes_Q, dt_Q, l_Q, to_end_Q, from_start_Q, carry = _chunk(
            dt, a, ids, batch, head, chunk, T, H, Q)
        at_chunk = ((batch * tl.num_programs(1) + chunk) * H + head) * P * N
        state_PN = _load(states + at_chunk, p * N, n, p < P, n < N)
        dstate_PN = _load(dstates + at_chunk, p * N, n, p < P, n < N)
        kept = carry * tl.sum(state_PN.to(tl.float32) * dstate_PN)
        x_QP = _load(x + row * stride_x + head * P, q * stride_x, p, inside_Q, p < P)
        dy_QP = _load(dy + (row * H + head) * P, q * (H * P), p, inside_Q, p < P)

        weights_QQ = tl.dot(dy_QP, tl.trans(x_QP), input_precision=PRECISION)
        weights_QQ *= _decay(l_Q, changes_Q, False, Q) * dt_Q[None, :]
        read_QN = from_start_Q[:, None] * tl.dot(dy_QP, state_PN, input_precision=PRECISION)
        dc_QN += tl.dot(weights_QQ.to(x.dtype.element_ty), b_QN, input_precision=PRECISION)
        dc_QN += read_QN
        z_QQ = weights_QQ * tl.dot(
            c_QN, tl.trans(b_QN), input_precision=PRECISION)  # again: kept, it would spill
        ahead_Q = tl.sum(z_QQ, 1) - tl.sum(z_QQ, 0) + tl.sum(read_QN * c_QN, 1)

        weights_QQ = tl.dot(x_QP, tl.trans(dy_QP), input_precision=PRECISION)
        weights_QQ *= _decay(l_Q, changes_Q, True, Q) * dt_Q[:, None]
        sent_QN = (to_end_Q * dt_Q)[:, None] * tl.dot(x_QP, dstate_PN, input_precision=PRECISION)
        db_QN += tl.dot(weights_QQ.to(x.dtype.element_ty), c_QN, input_precision=PRECISION)
        db_QN += sent_QN
        behind_Q = tl.sum(sent_QN * b_QN, 1)

        dda_Q = tl.cumsum(ahead_Q, 0, reverse=True) + tl.cumsum(behind_Q, 0) - behind_Q + kept
        at_part = (_program(2) * PARTS + i % PARTS) * (tl.num_programs(0) // K) * T
        tl.store(dda + (at_part + row) * H + head + q * H, dda_Q, mask=inside_Q)
    _store(db + (row * K + group) * N, q * (K * N), n, db_QN, inside_Q, n < N)
    _store(dc + (row * K + group) * N, q * (K * N), n, dc_QN, inside_Q, n < N)


class TritonSSD(torch.autograd.Function):
    """The scan: `states` walks along the chunks, `scan` does all at once. Backward: the mirror of
    the walk, `dx`, `dbc`."""

    @staticmethod
    def forward(ctx, x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, state_BHPN, ids_BT):
        """Takes dt, a, d and the state in fp32, and b and c in the dtype of x."""
        (B, T, H, P), (K, N) = x_BTHP.shape, b_BTKN.shape[2:]
        (x_BTHP, at_x), (b_BTKN, at_b), (c_BTKN, at_c) = _rows(x_BTHP), _rows(b_BTKN), _rows(c_BTKN)
        ctx.sizes = {"H": H, "R": H // K, "P": P, "N": N, "Q": TILE, "PRECISION": _precision()}
        ctx.strides = at_x, at_b, at_c, T
        states_BCHPN, last_BHPN = _walk(
            x_BTHP, dt_BTH, a_H, b_BTKN, ids_BT, state_BHPN, at_x, at_b, ctx.sizes, False)
        y_BTHP = x_BTHP.new_empty(B, T, H, P)
        ssd_scan_kernel[B * H, states_BCHPN.shape[1]](x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H,
                                                      ids_BT, states_BCHPN, y_BTHP, *ctx.strides,
                                                      **ctx.sizes, P2=_tile(P), N2=_tile(N),
                                                      num_warps=4, num_stages=1)
        ctx.save_for_backward(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, ids_BT, states_BCHPN)
        ctx.set_materialize_grads(False)
        return y_BTHP, last_BHPN

    @staticmethod
    def backward(ctx, dy_BTHP, dlast_BHPN):
        """Gradients of the first seven inputs. The parts that programs leave behind are summed by
        PyTorch."""
        x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, ids_BT, states_BCHPN = ctx.saved_tensors
        (B, C, H, P, N), (T, K), at_c = states_BCHPN.shape, b_BTKN.shape[1:3], ctx.strides[2]
        dy_BTHP = x_BTHP.new_zeros(B, T, H, P) if dy_BTHP is None else dy_BTHP.contiguous()
        dstates_BCHPN, dstate_BHPN = _walk(
            dy_BTHP, dt_BTH, a_H, c_BTKN, ids_BT, dlast_BHPN, H * P, at_c, ctx.sizes, True)
        dx_BTHP, ddt_BTH, dd_BCH = (torch.empty_like(dy_BTHP), torch.empty_like(dt_BTH),
                                    dt_BTH.new_empty(B, C, H))
        ssd_dx_kernel[B * H, C](x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, ids_BT, dy_BTHP,
                                dstates_BCHPN, dx_BTHP, ddt_BTH, dd_BCH, *ctx.strides, **ctx.sizes,
                                P2=_tile(P), N2=_tile(N), num_warps=4 if P <= 64 else 8,
                                num_stages=1)
        P2, N2 = min(256 // x_BTHP.element_size(), _tile(P)), min(DBC_TILE, _tile(N))
        db_BTKN, dc_BTKN = x_BTHP.new_empty(2, B, T, K, N)
        dda = dt_BTH.new_empty(_ceil(N, N2), _ceil(P, P2), B, T, H)
        ssd_dbc_kernel[B * K, C, len(dda)](x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, ids_BT, dy_BTHP,
                                           states_BCHPN, dstates_BCHPN, db_BTKN, dc_BTKN, dda,
                                           *ctx.strides, **ctx.sizes, P2=P2, N2=N2, num_warps=8,
                                           num_stages=1)
        dda_BTH = dda.sum((0, 1))
        ddt_BTH += dda_BTH * a_H
        da_H, dd_H = (dda_BTH * dt_BTH).sum((0, 1)), dd_BCH.sum((0, 1))
        return (dx_BTHP, ddt_BTH, da_H, db_BTKN, dc_BTKN, dd_H,
                dstate_BHPN if ctx.needs_input_grad[6] else None, None)


def _walk(x_BTHP, dt_BTH, a_H, b_BTKN, ids_BT, first_BHPN, at_x, at_b, sizes, backward):
    """The state before each chunk in the dtype of x, and the last one in fp32; or their gradients,
    see the kernel."""
    (B, T, H, P), N = x_BTHP.shape, b_BTKN.shape[-1]
    states_BCHPN, last_BHPN = (x_BTHP.new_empty(B, _ceil(T, TILE), H, P, N),
                               dt_BTH.new_empty(B, H, P, N))
    first_BHPN = None if first_BHPN is None else first_BHPN.contiguous()
    P2, N2 = min(TILE, _tile(P)), min(TILE, _tile(N))
    ssd_states_kernel[B * H, _ceil(P, P2), _ceil(N, N2)](x_BTHP, dt_BTH, a_H, b_BTKN, ids_BT,
                                                         first_BHPN, states_BCHPN, last_BHPN, at_x,
                                                         at_b, T, backward, **sizes, P2=P2, N2=N2,
                                                         num_warps=4, num_stages=2)
    return states_BCHPN, last_BHPN


def ssd_triton(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, state_BHPN=None, ids_BT=None, chunk=64):
    """`ssd_reference` from Triton kernels. `chunk` is ignored: chunks have TILE tokens."""
    dt_BTH = dt_BTH.float() if ids_BT is None else dt_BTH.float() * (ids_BT >= 0)[..., None]
    state_BHPN = None if state_BHPN is None else state_BHPN.float()
    ids_BT = None if ids_BT is None else ids_BT.contiguous()
    b_BTKN, c_BTKN = b_BTKN.to(x_BTHP.dtype), c_BTKN.to(x_BTHP.dtype)
    return TritonSSD.apply(
        x_BTHP, dt_BTH.contiguous(), a_H.float(), b_BTKN, c_BTKN, d_H.float(), state_BHPN, ids_BT)


@jit
def ssd_step_kernel(x, dt, a, b, c, d, first, last, y, stride_x, stride_b, stride_c,
                    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                    P2: tl.constexpr, N2: tl.constexpr):
    """One token for P2 channels of one head."""
    batch, head = _program(0) // H, _program(0) % H
    p, n = (_program(1) * P2).to(tl.int32) + tl.arange(0, P2), tl.arange(0, N2)
    step, at_bc = tl.load(dt + _program(0)), head // R * N
    x_P = tl.load(x + batch * stride_x + head * P + p, mask=p < P, other=0.0).to(tl.float32)
    b_N = tl.load(b + batch * stride_b + at_bc + n, mask=n < N, other=0.0).to(tl.float32)
    c_N = tl.load(c + batch * stride_c + at_bc + n, mask=n < N, other=0.0).to(tl.float32)
    state_PN = tl.exp(step * tl.load(a + head)) * _load(
        first + _program(0) * P * N, p * N, n, p < P, n < N)
    state_PN += (step * x_P)[:, None] * b_N[None, :]
    _store(last + _program(0) * P * N, p * N, n, state_PN, p < P, n < N)
    y_P = tl.sum(state_PN * c_N[None, :], 1) + tl.load(d + head) * x_P
    tl.store(y + _program(0) * P + p, y_P.to(y.dtype.element_ty), mask=p < P)


def ssd_step_triton(x_BHP, dt_BH, a_H, b_BKN, c_BKN, d_H, state_BHPN):
    """`ssd_step_reference` as one kernel; where gradients are wanted, as a scan of one token."""
    inputs = x_BHP, dt_BH, a_H, b_BKN, c_BKN, d_H, state_BHPN
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        y_BTHP, state_BHPN = ssd_triton(
            x_BHP[:, None], dt_BH[:, None], a_H, b_BKN[:, None], c_BKN[:, None], d_H, state_BHPN)
        return y_BTHP[:, 0], state_BHPN
    (B, H, P), (K, N) = x_BHP.shape, b_BKN.shape[1:]
    (x, at_x), (b, at_b), (c, at_c) = (_rows(x_BHP[:, None]), _rows(b_BKN[:, None]),
                                       _rows(c_BKN[:, None]))
    y_BHP, last_BHPN = x_BHP.new_empty(B, H, P), x_BHP.new_empty(B, H, P, N, dtype=torch.float32)
    ssd_step_kernel[B * H, _ceil(P, 16)](x, dt_BH.float().contiguous(), a_H.float(), b, c,
                                         d_H.float(), state_BHPN.float().contiguous(), last_BHPN,
                                         y_BHP, at_x, at_b, at_c, H=H, R=H // K, P=P, N=N, P2=16,
                                         N2=_tile(N), num_warps=4)
    return y_BHP, last_BHPN


# ------------------------------------------------------------------------------ Triton: convolution


@jit
def _conv_input(x, tail, batch, u, i, e, stride_x, T, E, W: tl.constexpr):
    """Rows u + i of the sequence that begins with the W - 1 inputs of the tail (zeros without one):
    u = t + W - 1."""
    in_x = (u + i >= W - 1) & (u + i < T + W - 1)
    x_IE = _load(x + (batch * T + u - (W - 1)) * stride_x, i * stride_x, e, in_x, e < E).to(
        tl.float32)
    if tail is not None:
        x_IE += _load(tail + (batch * (W - 1) + u) * E, i * E, e, u + i < W - 1, e < E)
    return x_IE


@jit
def conv_kernel(x, weight, bias, tail, ids, y, left, stride_x, T, E, W: tl.constexpr,
                W2: tl.constexpr, T2: tl.constexpr, E2: tl.constexpr):
    """A tile of T2 tokens and E2 channels; the last tile of a sequence also writes the W - 1 inputs
    to go on from."""
    batch, t, i = _program(2), _program(1) * T2, tl.arange(0, T2)
    e = (_program(0) * E2).to(tl.int32) + tl.arange(0, E2)
    own_T = _document(ids, batch, t + i, T)
    y_TE = tl.zeros([T2, E2], tl.float32) + tl.load(bias + e, mask=e < E, other=0.0)[None, :]
    for j in tl.static_range(W):
        seen_T = (_document(ids, batch, t + i + j - (W - 1), T) == own_T) & (own_T >= 0)
        x_TE = tl.where(
            seen_T[:, None], _conv_input(x, tail, batch, t + j, i, e, stride_x, T, E, W), 0.0)
        y_TE += x_TE * tl.load(weight + e * W + j, mask=e < E, other=0.0)[None, :]
    _store(y + (batch * T + t) * E, i * E, e, y_TE, t + i < T, e < E)
    if W > 1:  # noqa: SIM102 (this is known when the kernel is compiled, the next is not)
        if _program(1) == tl.num_programs(1) - 1:
            k = tl.arange(0, W2)
            own_X = _document(ids, batch, T + k - (W - 1), T)
            kept_X = (own_X == _document(ids, batch, T, T)) & (own_X >= 0)
            x_XE = tl.where(
                kept_X[:, None], _conv_input(x, tail, batch, T, k, e, stride_x, T, E, W), 0.0)
            _store(left + batch * (W - 1) * E, k * E, e, x_XE, k < W - 1, e < E)


@jit
def conv_grad_kernel(x, weight, tail, ids, dy, dleft, dx, dw, stride_x, T, E, W: tl.constexpr,
                     T2: tl.constexpr, E2: tl.constexpr):
    """Gradient of T2 of the T + W - 1 inputs, the tail first, and this tile's part of those of the
    weights and the bias."""
    batch, u, i = _program(2), _program(1) * T2, tl.arange(0, T2)
    e = (_program(0) * E2).to(tl.int32) + tl.arange(0, E2)
    own_U = _document(ids, batch, u + i - (W - 1), T)
    x_UE = _conv_input(x, tail, batch, u, i, e, stride_x, T, E, W)
    dx_UE = tl.zeros([T2, E2], tl.float32)
    dw += (batch * tl.num_programs(1) + _program(1)) * (W + 1) * E
    for j in tl.static_range(W):  # input u is tap j of output u - j
        t = u - j
        dy_UE = _load(dy + (batch * T + t) * E, i * E, e, (t + i >= 0) & (t + i < T), e < E).to(
            tl.float32)
        if j == 0:
            tl.store(dw + W * E + e, tl.sum(dy_UE, 0), mask=e < E)
        seen_U = (_document(ids, batch, t + i, T) == own_U) & (own_U >= 0)
        dy_UE = tl.where(seen_U[:, None], dy_UE, 0.0)
        dx_UE += dy_UE * tl.load(weight + e * W + j, mask=e < E, other=0.0)[None, :]
        tl.store(dw + j * E + e, tl.sum(dy_UE * x_UE, 0), mask=e < E)
    if dleft is not None:
        kept_U = ((u + i >= T)
                  & (own_U == _document(ids, batch, T, T))
                  & (own_U >= 0)
                  & (u + i < T + W - 1))
        dx_UE += _load(dleft + (batch * (W - 1) + u - T) * E, i * E, e, kept_U, e < E)
    _store(dx + (batch * (T + W - 1) + u) * E, i * E, e, dx_UE, u + i < T + W - 1, e < E)


class TritonConv(torch.autograd.Function):
    """The convolution and the inputs it leaves behind."""

    @staticmethod
    def forward(ctx, x_BTE, weight_EW, bias_E, tail_BXE, ids_BT):
        """Of one token too: then it is the step of decoding."""
        (B, T, E), W = x_BTE.shape, weight_EW.shape[1]
        x_BTE, at_x = _rows(x_BTE)
        y_BTE, left_BXE = x_BTE.new_empty(B, T, E), x_BTE.new_empty(B, W - 1, E)
        T2 = min(CONV_TILE[0], triton.next_power_of_2(T))
        conv_kernel[_ceil(E, CONV_TILE[1]), _ceil(T, T2), B](x_BTE, weight_EW, bias_E, tail_BXE,
                                                             ids_BT, y_BTE, left_BXE, at_x, T, E,
                                                             W=W, W2=triton.next_power_of_2(W),
                                                             T2=T2, E2=CONV_TILE[1], num_warps=8)
        ctx.save_for_backward(x_BTE, weight_EW, tail_BXE, ids_BT)
        ctx.at_x = at_x
        ctx.set_materialize_grads(False)
        return y_BTE, left_BXE

    @staticmethod
    def backward(ctx, dy_BTE, dleft_BXE):
        """Gradients of the inputs, the weights, the bias and the tail."""
        x_BTE, weight_EW, tail_BXE, ids_BT = ctx.saved_tensors
        (B, T, E), W = x_BTE.shape, weight_EW.shape[1]
        dy_BTE = x_BTE.new_zeros(B, T, E) if dy_BTE is None else dy_BTE.contiguous()
        dleft_BXE = None if dleft_BXE is None else dleft_BXE.contiguous()
        dx_BUE = x_BTE.new_empty(B, T + W - 1, E)
        n_tiles = _ceil(T + W - 1, CONV_TILE[0])
        dw = x_BTE.new_empty(B * n_tiles, W + 1, E, dtype=torch.float32)
        conv_grad_kernel[_ceil(E, CONV_TILE[1]), n_tiles, B](x_BTE, weight_EW, tail_BXE, ids_BT,
                                                             dy_BTE, dleft_BXE, dx_BUE, dw,
                                                             ctx.at_x, T, E, W=W, T2=CONV_TILE[0],
                                                             E2=CONV_TILE[1], num_warps=8)
        dw = dw.sum(0).to(weight_EW.dtype)
        return (dx_BUE[:, W - 1 :], dw[:W].t(), dw[W],
                None if tail_BXE is None else dx_BUE[:, : W - 1], None)


def causal_conv_triton(x_BTE, weight_EW, bias_E, tail_BXE=None, ids_BT=None):
    """`causal_conv_reference` from Triton kernels."""
    tail_BXE = None if tail_BXE is None else tail_BXE.to(x_BTE.dtype).contiguous()
    ids_BT = None if ids_BT is None else ids_BT.contiguous()
    return TritonConv.apply(x_BTE, weight_EW.contiguous(), bias_E, tail_BXE, ids_BT)


# --------------------------------------------------------------- Triton: gated norm, softmax pieces


@jit
def _gated(y, z, row, e, group, stride_y, stride_z, eps, G: tl.constexpr):
    """y, z and sigmoid(z) of G entries of one group, y silu(z), and one over its root mean
    square."""
    y_E = tl.load(y + row * stride_y + group * G + e, mask=e < G, other=0.0).to(tl.float32)
    z_E = tl.load(z + row * stride_z + group * G + e, mask=e < G, other=0.0).to(tl.float32)
    gate_E = tl.sigmoid(z_E)
    g_E = y_E * z_E * gate_E
    return y_E, z_E, gate_E, g_E, tl.rsqrt(tl.sum(g_E * g_E, 0) / G + eps)


@jit
def norm_kernel(y, z, weight, out, stride_y, stride_z, E, eps, G: tl.constexpr, G2: tl.constexpr):
    """One group of one token."""
    row, group, e = _program(0), _program(1), tl.arange(0, G2)
    _, _, _, g_E, scale = _gated(y, z, row, e, group, stride_y, stride_z, eps, G)
    w_E = tl.load(weight + group * G + e, mask=e < G, other=0.0)
    tl.store(
        out + row * E + group * G + e, (w_E * g_E * scale).to(out.dtype.element_ty), mask=e < G)


@jit
def norm_grad_kernel(y, z, weight, dout, dy, dz, dw, stride_y, stride_z, n_rows, E, eps,
                     G: tl.constexpr, G2: tl.constexpr, M2: tl.constexpr):
    """One group of M2 tokens, one after the other, and their part of the weights' gradient."""
    first, group, e = _program(0) * M2, _program(1), tl.arange(0, G2)
    w_E = tl.load(weight + group * G + e, mask=e < G, other=0.0).to(tl.float32)
    dw_E = tl.zeros([G2], tl.float32)
    for i in range(tl.minimum(M2, n_rows - first)):
        row = first + i
        y_E, z_E, gate_E, g_E, scale = _gated(y, z, row, e, group, stride_y, stride_z, eps, G)
        at = row * E + group * G
        dout_E = tl.load(dout + at + e, mask=e < G, other=0.0).to(tl.float32)
        n_E = g_E * scale
        dn_E = dout_E * w_E
        dg_E = scale * (dn_E - n_E * (tl.sum(dn_E * n_E, 0) / G))
        tl.store(dy + at + e, (dg_E * z_E * gate_E).to(dy.dtype.element_ty), mask=e < G)
        tl.store(dz + at + e,
                 (dg_E * y_E * gate_E * (1 + z_E * (1 - gate_E))).to(dz.dtype.element_ty),
                 mask=e < G)
        dw_E += dout_E * n_E
    tl.store(dw + _program(0) * E + group * G + e, dw_E, mask=e < G)


class TritonNorm(torch.autograd.Function):
    """The gate and the grouped norm; the backward pass computes the statistics again rather than
    store them."""

    @staticmethod
    def forward(ctx, y_BTE, z_BTE, weight_E, n_groups, eps):
        """A program for each token and group."""
        B, T, E = y_BTE.shape
        (y_BTE, at_y), (z_BTE, at_z) = _rows(y_BTE), _rows(z_BTE)
        G = E // n_groups
        ctx.sizes = {"G": G, "G2": triton.next_power_of_2(G), "num_warps": 4 if G <= 2048 else 8}
        ctx.rest = at_y, at_z, n_groups, eps
        ctx.save_for_backward(y_BTE, z_BTE, weight_E)
        out_BTE = y_BTE.new_empty(B, T, E)
        norm_kernel[B * T, n_groups](
            y_BTE, z_BTE, weight_E, out_BTE, at_y, at_z, E, eps, **ctx.sizes)
        return out_BTE

    @staticmethod
    def backward(ctx, dout_BTE):
        """Gradients of y, z and the weights."""
        y_BTE, z_BTE, weight_E = ctx.saved_tensors
        (B, T, E), (at_y, at_z, n_groups, eps) = y_BTE.shape, ctx.rest
        dy_BTE, dz_BTE = y_BTE.new_empty(B, T, E), z_BTE.new_empty(B, T, E)
        n_tiles = _ceil(B * T, NORM_ROWS)
        dw = y_BTE.new_empty(n_tiles, E, dtype=torch.float32)
        norm_grad_kernel[n_tiles, n_groups](y_BTE, z_BTE, weight_E, dout_BTE.contiguous(), dy_BTE,
                                            dz_BTE, dw, at_y, at_z, B * T, E, eps, M2=NORM_ROWS,
                                            **ctx.sizes)
        return dy_BTE, dz_BTE, dw.sum(0).to(weight_E.dtype), None, None


def gated_norm_triton(y_BTE, z_BTE, weight_E, n_groups, eps):
    """`gated_norm_reference` from Triton kernels."""
    return TritonNorm.apply(y_BTE, z_BTE, weight_E, n_groups, eps)


@jit
def add_part_kernel(logits, at, lse, chosen, width, scale, V2: tl.constexpr):
    """`_add_part` for one row of a part: its logits join the running log-sum-exp."""
    row, v_V = _program(0), tl.arange(0, V2)
    l_V = (tl.load(logits + row * width + v_V, mask=v_V < width, other=float("-inf")).to(tl.float32)
           * scale)
    before, token = tl.load(lse + row), tl.load(at + row)
    top = tl.maximum(tl.maximum(before, tl.max(l_V, 0)), -3e38)  # finite, were all banned
    tl.store(lse + row, top + tl.log(tl.exp(before - top) + tl.sum(tl.exp(l_V - top), 0)))
    tl.store(chosen + row, tl.sum(tl.where(v_V == token, l_V, 0.0), 0),
             mask=(token >= 0) & (token < width))


@jit
def part_gradient_kernel(logits, at, lse, grad, width, scale, V2: tl.constexpr):
    """`_part_gradient` for one row of a part, in place."""
    row, v_V = _program(0), tl.arange(0, V2)
    l_V = (tl.load(logits + row * width + v_V, mask=v_V < width, other=float("-inf")).to(tl.float32)
           * scale)
    is_token_V = (v_V == tl.load(at + row)) & (l_V > float("-inf"))
    d_V = ((tl.where(is_token_V, 1.0, 0.0) - tl.exp(l_V - tl.load(lse + row)))
           * tl.load(grad + row)
           * scale)
    tl.store(logits + row * width + v_V, d_V.to(logits.dtype.element_ty), mask=v_V < width)


def _add_part_triton(logits, at_T, temperature, lse_T, chosen_T):
    n_rows, width = logits.shape
    add_part_kernel[n_rows,](
        logits, at_T, lse_T, chosen_T, width, 1 / temperature, V2=VOCABULARY_TILE, num_warps=8)


def _part_gradient_triton(logits, at_T, temperature, lse_T, grad_T):
    (n_rows, width), grad_T = logits.shape, grad_T.contiguous()
    part_gradient_kernel[n_rows,](
        logits, at_T, lse_T, grad_T, width, 1 / temperature, V2=VOCABULARY_TILE, num_warps=8)
    return logits


def selected_logp_triton(hidden, weight_VD, token, banned=(), temperature=1.0):
    """`selected_logp_reference` in parts of the vocabulary, with the passes over the logits in
    Triton."""
    return _selected_logp(
        hidden, weight_VD, token, banned, temperature, _add_part_triton, _part_gradient_triton)


# ----------------------------------------------------------------------------------- the dispatcher

_chosen = "auto"


def use(choice: str) -> None:
    """Choose the form of every operation from now on: "auto", "reference" or "triton", see the
    module's docstring.

    Raises ValueError for another word, and for "triton" where it cannot run.
    """
    global _chosen
    if choice not in ("auto", "reference", "triton"):
        raise ValueError(f"kernels ({choice!r}) is unknown; choose auto, reference or triton")
    if choice == "triton":
        _check_triton(torch.cuda.is_available(), "this machine has no CUDA device")
    _chosen = choice


def _check_triton(can_launch: bool, what: str) -> None:
    """Raises ValueError unless Triton is installed and can run: on a CUDA device, or in its
    interpreter."""
    if triton is None:
        raise ValueError(
            "kernels (triton) needs the package of that name: pip install triton (or choose kernels auto)"
        )
    if not can_launch and isinstance(_program, triton.JITFunction):
        raise ValueError(
            f"kernels (triton) needs CUDA, and {what}; choose kernels auto, or set TRITON_INTERPRET=1 before Python starts "
            "(slow, for tests)"
        )


def _operation(reference: Callable, fast: Callable, fused: Callable) -> Callable:
    """One function for the three forms; each call runs the one that `use` chose."""

    @functools.wraps(reference)
    def operation(*args, **kwargs):
        t = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if _chosen == "triton":
            _check_triton(t.is_cuda, f"these tensors are on {t.device}")
            if t.dtype == torch.float64:
                raise ValueError(
                    "kernels (triton) works in fp32 or less, and these tensors are in fp64; choose kernels auto"
                )
            return fused(*args, **kwargs)
        if _chosen == "reference":
            return reference(*args, **kwargs)
        on_gpu = t.is_cuda and t.dtype != torch.float64 and triton is not None
        return (fused if on_gpu else fast)(*args, **kwargs)

    return operation


ssd = _operation(ssd_reference, ssd_chunked, ssd_triton)


ssd_step = _operation(ssd_step_reference, ssd_step_torch, ssd_step_triton)


causal_conv = _operation(causal_conv_reference, causal_conv_torch, causal_conv_triton)


gated_norm = _operation(gated_norm_reference, gated_norm_reference, gated_norm_triton)


selected_logp = _operation(selected_logp_reference, selected_logp_torch, selected_logp_triton)
