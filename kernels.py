"""The model's hot operations: an obvious reference, a fast PyTorch form, and one dispatcher.

The main one is the state-space duality (SSD) of Mamba-2 (arXiv 2405.21060). For one head, with a
step size dt_t > 0 and a rate a < 0, a state h of shape [P, N] follows

    h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T          y_t = h_t c_t + d x_t

`ssd_reference` is these two lines in a loop. `ssd_chunked` cuts the sequence into C = T/Q chunks:
inside one the recurrence is a masked, decayed attention (matrix products), and only states are
passed from chunk to chunk. kernels_gpu.py does the same in Triton.

The model calls the operations at the end of the file. `use` chooses their form: "auto" runs Triton
on CUDA tensors and the fast PyTorch form on others, "reference" and "triton" run that form
everywhere. The references are the specification: tests hold all forms equal to them, in values,
final states and every gradient. Conventions:

* `ids_BT` holds a document id per token. Tokens of different documents do not see each other; id -1
is padding, a document of its own that writes nothing. `None` means one document and no padding.
* A state or convolution tail that is passed in belongs to the document of the first token.
* Decays are computed in fp32 or wider, whatever the dtype of x.

Shape letters of the whole repo. `x_BTD` has the shape [B, T, D]; a small letter is a part of what
the capital counts (`token_rL`: some of the rows), a digit is a size.

    B  sequences               K  groups: KV heads; of B and C   C  chunks
    T  tokens                  J  heads of a group (H = K J)     W  taps of the convolution
    U  cached positions        P  channels of a head             Y  its W - 1 inputs that are kept
    S  all positions, U + T    I  channels of all heads (H P)    Z  its inputs, T + Y
    D  width of the model      N  size of a state                E  its channels
    F  width of an FFN         Q  tokens of a chunk              O  rows of in_proj (z|x|B|C|dt)
    V  vocabulary              G  thoughts of a context          L  tokens of a thought
    H  heads                   R  thoughts of a batch (B G)      X  observed tokens after a thought
"""

import functools
import warnings
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import kernels_gpu
from kernels_gpu import causal_conv_triton, gated_norm_triton, ssd_step_triton, ssd_triton
from system.errors import require


def wide(t: Tensor) -> Tensor:
    """fp32 for half precision, the tensor itself for fp32 and fp64."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


# ---------------------------------------------------------------------------------------------- SSD


def ssd_reference(x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTKN: Tensor, c_BTKN: Tensor,
                  d_H: Tensor, state_BHPN: Tensor | None = None, ids_BT: Tensor | None = None,
                  chunk: int = 64) -> tuple[Tensor, Tensor]:
    """The recurrence of SSD, one token at a time (arXiv 2405.21060, eq. 1 and 2).

    Args: dt_BTH: step sizes after the softplus, >= 0; a_H: rates, < 0; b_BTKN, c_BTKN: input and
    output maps, shared by the J heads of a group; d_H: skip weights; state_BHPN: initial state,
    zeros if None; chunk: ignored.
    Returns: y_BTHP in the dtype of x, and the final state in fp32 (or wider)."""
    B, T, H, P = x_BTHP.shape
    J, N = H // b_BTKN.shape[2], b_BTKN.shape[3]
    state_BHPN = wide(x_BTHP.new_zeros(B, H, P, N) if state_BHPN is None else state_BHPN)
    y_list = []
    for t in range(T):
        dt_BH, x_BHP = wide(dt_BTH[:, t]), wide(x_BTHP[:, t])
        b_BHN, c_BHN = (wide(m[:, t]).repeat_interleave(J, dim=1) for m in (b_BTKN, c_BTKN))
        if ids_BT is not None:
            dt_BH = dt_BH * (ids_BT[:, t, None] >= 0)
            if t > 0:
                state_BHPN = state_BHPN * (ids_BT[:, t] == ids_BT[:, t - 1])[:, None, None, None]
        added_BHPN = torch.einsum("bh,bhp,bhn->bhpn", dt_BH, x_BHP, b_BHN)
        state_BHPN = torch.exp(dt_BH * a_H)[..., None, None] * state_BHPN + added_BHPN
        y_list.append(torch.einsum("bhpn,bhn->bhp", state_BHPN, c_BHN) + d_H[:, None] * x_BHP)
    y_BTHP = torch.stack(y_list, dim=1) if y_list else x_BTHP
    return y_BTHP.to(x_BTHP.dtype), state_BHPN


def ssd_chunked(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, state_BHPN=None, ids_BT=None, chunk=64):
    """`ssd_reference` from matrix products over chunks (arXiv 2405.21060, section 6), linear in T.
    With l the running sum of dt a inside a chunk, token q receives from token s <= q of its chunk
    the weight (c_q . b_s) exp(l_q - l_s) dt_s, and from the state at the chunk's start exp(l_q) h
    c_q. c_q . b_s, the chunk's state and its read-out are one matrix product per group."""
    if not x_BTHP.numel():  # no chunk
        return ssd_reference(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, state_BHPN, ids_BT)
    B, T, H, P = x_BTHP.shape
    Q = min(chunk, T)
    C = -(-T // Q)
    if ids_BT is not None:
        dt_BTH = dt_BTH * (ids_BT >= 0)[..., None]
    x, dt, b, c = (wide(t) for t in (x_BTHP, dt_BTH, b_BTKN, c_BTKN))
    if C * Q != T:  # padding with dt = 0 leaves the state as it is
        x, dt, b, c = (F.pad(t, [0, 0] * (t.dim() - 2) + [0, C * Q - T]) for t in (x, dt, b, c))
    # 1. The decays. l: log decay since the chunk's start. m = l - log dt: exp(l_q - m_s) has dt_s.
    dt_BCHQ = rearrange(dt, "b (c q) h -> b c h q", q=Q)
    l_BCHQ = (dt_BCHQ * a_H[:, None]).cumsum(-1)
    m_BCHQ = l_BCHQ - dt_BCHQ.clamp(min=1e-30).log()
    to_end_BCHQ, from_start_BCHQ = torch.exp(l_BCHQ[..., -1:] - m_BCHQ), torch.exp(l_BCHQ)
    carry_BCH = from_start_BCHQ[..., -1]
    # 2. A token sees its own document, up to itself; `before`: the document of the start state.
    seen = l_BCHQ.new_ones(Q, Q).tril()
    if ids_BT is not None:
        ids_BCQ = torch.cat([ids_BT, ids_BT[:, -1:].expand(B, C * Q - T)], dim=1).view(B, C, Q)
        last_BC = ids_BCQ[..., -1]
        before_BC = torch.cat([ids_BT[:, :1], last_BC[:, :-1]], dim=1)
        seen = seen * (ids_BCQ[..., :, None] == ids_BCQ[..., None, :])[:, :, None]
        to_end_BCHQ = to_end_BCHQ * (ids_BCQ == last_BC[..., None])[:, :, None]
        from_start_BCHQ = from_start_BCHQ * (ids_BCQ == before_BC[..., None])[:, :, None]
        carry_BCH = carry_BCH * (last_BC == before_BC)[..., None]
    # 3. The products.
    x_BCQHP = rearrange(x, "b (c q) h p -> b c q h p", q=Q)
    b_BCKQN, c_BCKQN = (rearrange(t, "b (c q) k n -> b c k q n", q=Q) for t in (b, c))
    first_BHPN = l_BCHQ.new_zeros(B, H, P, b.shape[-1]) if state_BHPN is None else state_BHPN
    with torch.autocast(x.device.type, enabled=False):
        y_BCQHP, state_BHPN = ChunkProducts.apply(
            x_BCQHP, b_BCKQN, c_BCKQN, l_BCHQ, m_BCHQ, seen, to_end_BCHQ, from_start_BCHQ,
            carry_BCH, d_H, first_BHPN.to(l_BCHQ.dtype))
    return y_BCQHP.flatten(1, 2)[:, :T].to(x_BTHP.dtype), state_BHPN


class ChunkProducts(torch.autograd.Function):
    """The heavy part of `ssd_chunked`: its matrix products and the recurrence over chunks.
    Autograd would make twice as many passes over large tensors, most into new memory, and they take
    as long as the products. Two traps on CPU: the exp of -inf takes twice as long, so what is not
    seen is 0 before the exp (above the diagonal it could overflow) and multiplied by 0 after it; an
    exp that underflows takes ten to thirty times as long, so differences end at -80."""

    @staticmethod
    def forward(ctx, x_BCQHP, b_BCKQN, c_BCKQN, l_BCHQ, m_BCHQ, seen, to_end_BCHQ, from_start_BCHQ,
                carry_BCH, d_H, state_BHPN):
        """seen: 1 or 0, [Q, Q] or [B, C, 1, Q, Q]. Returns y_BCQHP and the last state."""
        B, C, K, Q, N = b_BCKQN.shape
        to_end, from_start = (t.transpose(2, 3)[..., None] for t in (to_end_BCHQ, from_start_BCHQ))
        # 1. Inside a chunk. The skip is a token's weight in its own output.
        scores = (c_BCKQN @ b_BCKQN.mT)[:, :, :, None]
        log_BCHQQ = l_BCHQ[..., :, None] - m_BCHQ[..., None, :]
        decay_BCHQQ = log_BCHQQ.tril_().clamp_(min=-80).exp_().mul_(seen)
        weights_BCHQQ = (scores * decay_BCHQQ.unflatten(2, (K, -1))).flatten(2, 3)
        weights_BCHQQ.diagonal(dim1=-2, dim2=-1).add_(d_H[:, None])
        x_BCHQP = x_BCQHP.transpose(2, 3).contiguous()
        inside_BCHQP = weights_BCHQQ @ x_BCHQP
        # 2. Between chunks: what each adds to the state, the recurrence, what is read of the state.
        xend = _by_group(x_BCQHP * to_end, K)
        added_BCHPN = (xend.mT @ b_BCKQN).view(B, C, -1, x_BCQHP.shape[-1], N)
        start_BCHPN, state_BHPN = _recur(added_BCHPN, carry_BCH, state_BHPN, range(C))
        read = c_BCKQN @ start_BCHPN.view(B, C, K, -1, N).mT
        read_BCQHP = read.transpose(2, 3).reshape(x_BCQHP.shape)
        y_BCQHP = torch.empty_like(x_BCQHP)
        y_BCQHP.copy_(inside_BCHQP.transpose(2, 3)).addcmul_(read_BCQHP, from_start)
        ctx.save_for_backward(
            x_BCQHP, x_BCHQP, b_BCKQN, c_BCKQN, scores, decay_BCHQQ, weights_BCHQQ, to_end,
            from_start, carry_BCH, xend, start_BCHPN, read_BCQHP)
        return y_BCQHP, state_BHPN

    @staticmethod
    def backward(ctx, dy_BCQHP, dstate_BHPN):
        """The same in reverse. Gradients of l and m come from one matrix: they nearly cancel."""
        (x_BCQHP, x_BCHQP, b_BCKQN, c_BCKQN, scores, decay_BCHQQ, weights_BCHQQ, to_end, from_start,
         carry_BCH, xend, start_BCHPN, read_BCQHP) = ctx.saved_tensors
        B, C, K, Q, N = b_BCKQN.shape
        # 2. Between chunks.
        dread = _by_group(dy_BCQHP * from_start, K)
        dfrom_start = (dy_BCQHP * read_BCQHP).sum(-1).transpose(2, 3)
        dc_BCKQN = dread @ start_BCHPN.view(B, C, K, -1, N)
        dstart_BCHPN = (dread.mT @ c_BCKQN).view(start_BCHPN.shape)
        dadded_BCHPN, dstate_BHPN = _recur(dstart_BCHPN, carry_BCH, dstate_BHPN, reversed(range(C)))
        dcarry_BCH = (dadded_BCHPN * start_BCHPN).sum((-2, -1))
        dadded = dadded_BCHPN.view(B, C, K, -1, N)
        db_BCKQN = xend @ dadded
        dxend_BCQHP = (b_BCKQN @ dadded.mT).transpose(2, 3).reshape(x_BCQHP.shape)
        dto_end = (dxend_BCQHP * x_BCQHP).sum(-1).transpose(2, 3)
        # 1. Inside a chunk.
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


def _recur(added_BCHPN, carry_BCH, state_BHPN, chunks: Iterable[int]) -> tuple[Tensor, Tensor]:
    """state <- carry state + added, chunk by chunk: the state before each, and the one after all.
    Run from the last chunk to the first it is its own gradient."""
    before_BCHPN, state_BHPN = torch.empty_like(added_BCHPN), state_BHPN.clone()
    for i in chunks:
        before_BCHPN[:, i] = state_BHPN
        state_BHPN.mul_(carry_BCH[:, i, :, None, None]).add_(added_BCHPN[:, i])
    return before_BCHPN, state_BHPN


def _by_group(t_BCQHP: Tensor, K: int) -> Tensor:
    """[B, C, K, Q, J P]: the channels of a group's J heads in a row."""
    return t_BCQHP.unflatten(3, (K, -1)).flatten(4).transpose(2, 3)


def ssd_step_reference(x_BHP: Tensor, dt_BH: Tensor, a_H: Tensor, b_BKN: Tensor, c_BKN: Tensor,
                       d_H: Tensor, state_BHPN: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: y_BHP and the new state, nothing changed in place."""
    x_BTHP, dt_BTH, b_BTKN, c_BTKN = (t[:, None] for t in (x_BHP, dt_BH, b_BKN, c_BKN))
    y_BTHP, state_BHPN = ssd_reference(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, state_BHPN)
    return y_BTHP[:, 0], state_BHPN


def ssd_step_torch(x_BHP, dt_BH, a_H, b_BKN, c_BKN, d_H, state_BHPN):
    """The same with as few passes over the state as PyTorch allows: a group's heads are one matrix
    [J P, N]. It is read by a row times a matrix: a matrix times a column takes 8 times as long."""
    B, H, P = x_BHP.shape
    K, N = b_BKN.shape[1:]
    if B == 0:
        return ssd_step_reference(x_BHP, dt_BH, a_H, b_BKN, c_BKN, d_H, state_BHPN)
    decay_BH = torch.exp(wide(dt_BH) * a_H)
    xdt_BHP = wide(x_BHP * dt_BH[..., None].to(x_BHP.dtype))
    state = (state_BHPN * decay_BH[..., None, None]).view(B, K, -1, N)
    state.addcmul_(xdt_BHP.view(B, K, -1, 1), wide(b_BKN)[:, :, None])
    y_BHP = (wide(c_BKN)[:, :, None] @ state.mT).view(B, H, P).to(x_BHP.dtype)
    return torch.addcmul(y_BHP, x_BHP, d_H[:, None].to(x_BHP.dtype)), state.view(B, H, P, N)


# ------------------------------------------------------------------------------- causal convolution


def causal_conv_reference(
        x_BTE: Tensor, weight_EW: Tensor, bias_E: Tensor, tail_BYE: Tensor | None = None,
        ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution as its sum: y_t = bias + sum over j of weight_j x_{t-(W-1)+j}.
    tail_BYE: the W - 1 inputs before x, zeros if None. Returns y_BTE (before the SiLU), and the
    W - 1 last inputs, to go on from."""
    B, T, E = x_BTE.shape
    W = weight_EW.shape[1]
    if T == 0:
        return x_BTE, x_BTE.new_zeros(B, W - 1, E) if tail_BYE is None else tail_BYE
    ids_BT = torch.zeros(B, T, dtype=torch.long, device=x_BTE.device) if ids_BT is None else ids_BT
    x_BZE, ids_BZ, left_BYE = _with_tail(x_BTE, tail_BYE, ids_BT, W)
    rows = []
    for t in range(T):
        y_BE = bias_E.expand(B, E)
        for j in range(W):
            same_B = (ids_BZ[:, t + j] == ids_BT[:, t]) & (ids_BT[:, t] >= 0)
            y_BE = y_BE + weight_EW[:, j] * x_BZE[:, t + j] * same_B[:, None]
        rows.append(y_BE)
    return torch.stack(rows, dim=1), left_BYE


def causal_conv_torch(x_BTE, weight_EW, bias_E, tail_BYE=None, ids_BT=None):
    """The same as W multiply-adds over whole shifted sequences, on CPU faster than F.conv1d."""
    T, W = x_BTE.shape[1], weight_EW.shape[1]
    if T == 0:
        return causal_conv_reference(x_BTE, weight_EW, bias_E, tail_BYE, ids_BT)
    x_BZE, ids_BZ, left_BYE = _with_tail(x_BTE, tail_BYE, ids_BT, W)
    if T == 1 and ids_BT is None:  # a step of decoding is too small for W passes
        return (x_BZE * weight_EW.t()).sum(dim=1, keepdim=True) + bias_E, left_BYE
    return shifted_sum(x_BZE, weight_EW, bias_E, ids_BZ), left_BYE


def _with_tail(x_BTE: Tensor, tail_BYE: Tensor | None, ids_BT: Tensor | None, W: int):
    """The inputs behind the W - 1 before them; the documents of them all; the W - 1 last inputs, 0
    where the next token may not read them: of other documents than the last, and padding."""
    (B, T, E), ids_BZ = x_BTE.shape, None
    tail_BYE = x_BTE.new_zeros(B, W - 1, E) if tail_BYE is None else tail_BYE
    x_BZE = torch.cat([tail_BYE, x_BTE], dim=1)
    left_BYE = x_BZE[:, T:]
    if ids_BT is not None:
        ids_BZ = torch.cat([ids_BT[:, :1].expand(-1, W - 1), ids_BT], dim=1)
        kept_BY = (ids_BZ[:, T:] == ids_BT[:, -1:]) & (ids_BT[:, -1:] >= 0)
        left_BYE = left_BYE * kept_BY[..., None].to(x_BTE.dtype)
    return x_BZE, ids_BZ, left_BYE


def _summed_shape(x_BZE, weight_EW, bias_E, ids_BZ):
    (B, Z, E), dtype = x_BZE.shape, torch.promote_types(x_BZE.dtype, weight_EW.dtype)
    return x_BZE.new_empty(B, Z - weight_EW.shape[1] + 1, E, dtype=dtype)


@functools.partial(kernels_gpu.operation, fake=_summed_shape)
def shifted_sum(x_BZE: Tensor, weight_EW: Tensor, bias_E: Tensor, ids_BZ: Tensor | None) -> Tensor:
    """y_t = bias + sum over j of weight_j x_{t+j}: T + W - 1 inputs give T outputs. Strided rows of
    weight_EW, or a mask over documents, would keep the multiply-adds from being vectorised."""
    W = weight_EW.shape[1]
    T, weight_WE = x_BZE.shape[1] - W + 1, weight_EW.t().contiguous()
    cuts = _cuts(ids_BZ, W)
    y_BTE = torch.addcmul(bias_E, _cut(x_BZE[:, -T:], cuts[-1]), weight_WE[-1])
    for j in range(W - 1):
        y_BTE.addcmul_(_cut(x_BZE[:, j : j + T], cuts[j]), weight_WE[j])
    return y_BTE


@functools.partial(kernels_gpu.operation, fake=lambda x_BZE, weight_EW, ids_BZ, dy_BTE: (
    torch.empty_like(x_BZE), torch.empty_like(weight_EW)))
def shifted_sum_gradients(x_BZE: Tensor, weight_EW: Tensor, ids_BZ: Tensor | None, dy_BTE: Tensor
                          ) -> tuple[Tensor, Tensor]:
    """Of the inputs and the weights. Autograd would make a padded copy of the gradient for each
    tap; this makes one."""
    T, W, weight_WE = dy_BTE.shape[1], weight_EW.shape[1], weight_EW.t().contiguous()
    dx_BZE, dweight_EW = torch.zeros_like(x_BZE), torch.empty_like(weight_EW)
    cuts, products_BTE = _cuts(ids_BZ, W), torch.empty_like(dy_BTE)
    for j in range(W):
        tap_BTE = _cut(dy_BTE, cuts[j])
        dx_BZE[:, j : j + T].addcmul_(tap_BTE, weight_WE[j])
        torch.mul(tap_BTE, x_BZE[:, j : j + T], out=products_BTE)
        dweight_EW[:, j] = products_BTE.sum(dim=(0, 1))
    return dx_BZE, dweight_EW


def _save_shifted_sum(ctx, inputs, output) -> None:
    x_BZE, weight_EW, _, ids_BZ = inputs
    ctx.save_for_backward(x_BZE, weight_EW, ids_BZ)


def _shifted_sum_backward(ctx, dy_BTE):
    dx_BZE, dweight_EW = shifted_sum_gradients(*ctx.saved_tensors, dy_BTE)
    return dx_BZE, dweight_EW, dy_BTE.sum(dim=(0, 1)), None


torch.library.register_autograd(shifted_sum, _shifted_sum_backward, setup_context=_save_shifted_sum)


def _cuts(ids_BZ: Tensor | None, W: int) -> list[tuple[Tensor, ...] | None]:
    """For each tap, the few (row, token) pairs at which it would reach into another document, or
    there is padding: None where there is none."""
    if ids_BZ is None:
        return [None] * W
    ids_BT = ids_BZ[:, W - 1 :]
    T = ids_BT.shape[1]
    found = [((ids_BZ[:, j : j + T] != ids_BT) | (ids_BT < 0)).nonzero(as_tuple=True)
             for j in range(W)]
    return [pairs if len(pairs[0]) else None for pairs in found]


def _cut(t_BTE: Tensor, pairs: tuple[Tensor, ...] | None) -> Tensor:
    """The tensor with zeros at these (row, token) pairs."""
    return t_BTE if pairs is None else t_BTE.index_put(pairs, t_BTE.new_zeros(()))


# ---------------------------------------------------------------------------- gated norm, log-probs


def gated_norm_reference(
        y_BTI: Tensor, z_BTI: Tensor, weight_I: Tensor, n_groups: int, eps: float) -> Tensor:
    """weight g / sqrt(mean of g^2 over its group + eps), g = y silu(z): gate, then norm."""
    groups = (wide(y_BTI) * F.silu(wide(z_BTI))).unflatten(-1, (n_groups, -1))
    n_BTI = (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
    return (weight_I * n_BTI).to(y_BTI.dtype)


def gated_norm_torch(
        y_BTI: Tensor, z_BTI: Tensor, weight_I: Tensor, n_groups: int, eps: float) -> Tensor:
    """`gated_norm_reference` in few passes."""
    return GatedNorm.apply(wide(y_BTI), wide(z_BTI), weight_I, n_groups, eps).to(y_BTI.dtype)


class GatedNorm(torch.autograd.Function):
    """`gated_norm` with half as many passes over large tensors as autograd makes, most in place.
    With n = g / rms(g): dg = (dn - n mean(n dn)) / rms(g), the mean being over a group."""

    @staticmethod
    def forward(ctx, y_BTI, z_BTI, weight_I, n_groups, eps):
        """The gate, the norm, the weight."""
        n_BTI = y_BTI * F.silu(z_BTI)
        groups = n_BTI.unflatten(-1, (n_groups, -1))
        square = torch.linalg.vector_norm(groups, dim=-1, keepdim=True).square()
        scale = torch.rsqrt(square / groups.shape[-1] + eps)
        groups.mul_(scale)
        ctx.n_groups = n_groups
        ctx.save_for_backward(y_BTI, z_BTI, weight_I, n_BTI, scale)
        return weight_I * n_BTI

    @staticmethod
    def backward(ctx, grad_BTI):
        """One buffer serves n grad, then n dn, then dn and at last dg."""
        y_BTI, z_BTI, weight_I, n_BTI, scale = ctx.saved_tensors
        buffer_BTI = grad_BTI * n_BTI
        dweight_I = buffer_BTI.sum(dim=(0, 1))
        buffer_BTI.mul_(weight_I)
        groups, normed = (t.unflatten(-1, (ctx.n_groups, -1)) for t in (buffer_BTI, n_BTI))
        mean = groups.mean(-1, keepdim=True)
        torch.mul(grad_BTI, weight_I, out=buffer_BTI)
        groups.addcmul_(normed, mean, value=-1).mul_(scale)
        dy_BTI = F.silu(z_BTI).mul_(buffer_BTI)
        dz_BTI = torch.ops.aten.silu_backward(buffer_BTI.mul_(y_BTI), z_BTI)
        return dy_BTI, dz_BTI, dweight_I, None, None


def for_products(t: Tensor) -> Tensor:
    """In the dtype that autocast gives to matrix products, where it is on: cast once, not at each.
    """
    device = t.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return t.to(torch.get_autocast_dtype(device))
    return t


def mask_banned(logits: Tensor, banned: tuple[int, ...]) -> Tensor:
    """A copy of the logits with -inf at the banned ids (the same tensor where none is banned)."""
    if not banned:
        return logits
    return logits.index_fill(-1, _on(logits.device, banned), float("-inf"))


@functools.cache
def _on(device: torch.device, ids: tuple[int, ...]) -> Tensor:
    """Ids on a device: copied there once, not with every token."""
    return torch.tensor(ids, device=device)


def token_logp(logits: Tensor, token: Tensor, banned: tuple[int, ...] = (),
               temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token] over the ids not banned: logits [..., V] and token
    [...] give [...]. A banned token itself gets -inf."""
    logits = mask_banned(wide(logits), banned) / temperature
    return logits.gather(-1, token[..., None])[..., 0] - logits.logsumexp(-1)


def selected_logp_reference(hidden: Tensor, weight_VD: Tensor, token: Tensor,
                            banned: tuple[int, ...] = (), temperature: float = 1.0) -> Tensor:
    """`token_logp` of the logits hidden W^T, all made at once: hidden [..., D], token [...]."""
    return token_logp(F.linear(hidden, weight_VD), token, banned, temperature)


class SelectedLogp(torch.autograd.Function):
    """Log-probabilities of given tokens without a tensor of [tokens, vocabulary], there and back.
    For each part of VOCABULARY_TILE ids forward adds to a running log-sum-exp; backward computes
    its logits again and turns them into their gradient. The matrix products are PyTorch's, on a GPU
    too: beside them the passes over the logits are cheap, and in Triton one kernel each."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, token_T, banned, temperature, add_part, part_gradient):
        """add_part and part_gradient: the two passes over a part, from PyTorch or from Triton."""
        lse_T = wide(hidden_TD[:, 0]).new_full(token_T.shape, float("-inf"))
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


def _vocabulary_parts(hidden_TD: Tensor, weight_VD: Tensor, banned: tuple[int, ...]):
    """Yields the first id and the logits of each part of the vocabulary, -inf at the banned ids."""
    for first in range(0, len(weight_VD), kernels_gpu.VOCABULARY_TILE):
        logits = hidden_TD @ weight_VD[first : first + kernels_gpu.VOCABULARY_TILE].t()
        inside = tuple(i - first for i in banned if 0 <= i - first < logits.shape[1])
        if inside:
            logits.index_fill_(1, _on(logits.device, inside), float("-inf"))
        yield first, logits


def _add_part(logits: Tensor, at_T: Tensor, temperature: float, lse_T: Tensor, chosen_T: Tensor):
    """In place: a part's logits join the running log-sum-exp; those of tokens in it are noted."""
    logits = wide(logits).div_(temperature)
    rows = ((at_T >= 0) & (at_T < logits.shape[1])).nonzero()[:, 0]
    chosen_T[rows] = logits[rows, at_T[rows]]
    least = torch.finfo(lse_T.dtype).min  # finite, were all banned
    top_T = torch.maximum(logits.amax(-1), lse_T).clamp(min=least)
    total_T = logits.sub_(top_T[:, None]).exp_().sum(-1) + torch.exp(lse_T - top_T)
    torch.add(top_T, total_T.log(), out=lse_T)


def _part_gradient(logits: Tensor, at_T: Tensor, temperature: float, lse_T: Tensor, grad_T: Tensor):
    """Gradient of a part's logits: (1 at the token - softmax) grad / temperature; banned ids 0."""
    rows = ((at_T >= 0) & (at_T < logits.shape[1])).nonzero()[:, 0]
    rows = rows[logits[rows, at_T[rows]] > float("-inf")]
    p = wide(logits).div_(temperature).sub_(lse_T[:, None]).exp_()
    p[rows, at_T[rows]] -= 1
    return p.mul_(grad_T[:, None] / -temperature).to(logits.dtype)


def selected_logp_torch(hidden, weight_VD, token, banned=(), temperature=1.0,
                        passes=(_add_part, _part_gradient)):
    """The same in parts of the vocabulary, with these two passes over a part."""
    hidden, weight_VD = for_products(hidden), for_products(weight_VD)  # so that backward is, too
    return SelectedLogp.apply(hidden.reshape(-1, hidden.shape[-1]), weight_VD, token.reshape(-1),
                              banned, temperature, *passes).view(token.shape)


selected_logp_triton = functools.partial(
    selected_logp_torch, passes=(kernels_gpu.add_part_triton, kernels_gpu.part_gradient_triton))


# ----------------------------------------------------------------------------------- the dispatcher

_chosen = "auto"


def use(choice: str) -> None:
    """Choose the form of every operation. Raises ValueError for an unknown one, or no Triton."""
    global _chosen
    require(choice in ("auto", "reference", "triton"),
            f"kernels ({choice!r}) is unknown; choose auto, reference or triton")
    if choice == "triton":
        kernels_gpu.require_triton(torch.cuda.is_available(), "this machine has no CUDA device")
    _chosen = choice


def ssd_fault(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, state_BHPN=None, ids_BT=None, chunk=64):
    """Why Triton must not run this scan: "", or a sentence. Looks once at each compiled kernel.
    `not` makes a compiler settle whether 16 divides T, where it follows T as a variable."""
    gradients = torch.is_grad_enabled()
    return _known_fault(
        x_BTHP.device, x_BTHP.dtype, kernels_gpu.precision(), *x_BTHP.shape[2:], *b_BTKN.shape[2:],
        not x_BTHP.shape[1] % 16, state_BHPN is not None, ids_BT is not None, gradients)


@kernels_gpu.constant
def _known_fault(*case) -> str:
    """`_scan_fault`, which looks at files and runs kernels: nothing that a compiler can follow."""
    return _scan_fault(*case)


@functools.cache
def _scan_fault(device, dtype, precision, H, P, K, N, aligned, with_state, packed, gradients):
    """Compilers have got these kernels wrong on a card and right on others: ptxas before 13.3 may
    overwrite an operand that Hopper still reads (Triton's issues 10486, 11366). So the kernels that
    a call needs (`aligned`: 16 divides T) work on small integers first, with decays of 1 or 0.
    Every sum is exact then, in bf16 too, and must be that of `ssd_chunked` in fp64."""
    passed, words = kernels_gpu.passed_file(
        device, dtype, precision, H, P, K, N, aligned, with_state, packed, gradients)
    if passed.exists():
        return ""
    T, generator = 144 if aligned else 145, torch.Generator().manual_seed(0)

    def integers(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator).to(device, dtype)

    ids_BT = torch.tensor([[-1] * 5 + [0] * 70 + [1] * (T - 75)], device=device)
    b_BTKN, c_BTKN = integers(2, 1, T, K, N)
    rest = [ids_BT] if packed else []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)  # not the caller's
    with keep, torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        inputs = [integers(1, T, H, P), integers(1, T, H).fill_(1),
                  -200.0 * (torch.arange(H, device=device) % 2), b_BTKN, c_BTKN, integers(H),
                  integers(1, H, P, N, dtype=torch.float32) if with_state else None]
        found, expected = (
            _values_and_gradients(form, [t if t is None else t.to(to or t.dtype) for t in inputs],
                                  rest, gradients)
            for form, to in ((ssd_triton, None), (ssd_chunked, torch.float64)))
    if all(torch.allclose(t.double(), right.to(t.dtype).double(), rtol=1e-6, atol=0.5)
           for t, right in zip(found, expected, strict=True)):
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()
        return ""
    return (f"Triton's scan of {dtype} is wrong here ({words}); set TRITON_PTXAS_PATH (Blackwell: "
            "TRITON_PTXAS_BLACKWELL_PATH) to ptxas 13.3 or newer, or install a newer Triton")


def _values_and_gradients(scan, inputs: list[Tensor | None], rest: list[Tensor], gradients: bool):
    """The scan's two results, and if asked for the gradient of each input, given whole numbers."""
    leaves = [t.detach().requires_grad_(gradients) for t in inputs if t is not None]
    with torch.set_grad_enabled(gradients):
        results = scan(*leaves, *inputs[len(leaves):], *rest)
    if not gradients:
        return results
    to_add = [(torch.arange(t.numel()) % 3 - 1).view(t.shape).to(t) for t in results]
    return [*results, *torch.autograd.grad(results, leaves, to_add)]


def _operation(reference: Callable, fast: Callable, fused: Callable,
               fault: Callable = lambda *_, **__: "") -> Callable:
    """One function for the three forms; each call runs the one that `use` chose. On a card `fault`
    says why the fused form must not: "triton" raises that, "auto" warns and runs the fast one."""

    @functools.wraps(reference)
    def operation(*args, **kwargs):
        if _chosen == "reference":
            return reference(*args, **kwargs)
        t = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        on_gpu = t.is_cuda and t.dtype != torch.float64 and kernels_gpu.triton is not None
        why = fault(*args, **kwargs) if on_gpu else ""
        if _chosen == "triton":
            kernels_gpu.require_triton(t.is_cuda, f"these tensors are on {t.device}")
            require(t.dtype != torch.float64, "kernels (triton) works in fp32 or less, and these "
                                              "tensors are in fp64; choose kernels auto")
            require(not why, f"{why}; or choose kernels auto")
            return fused(*args, **kwargs)
        if why:
            warnings.warn(f"{why}; until then PyTorch's form runs", stacklevel=2)
        return (fused if on_gpu and not why else fast)(*args, **kwargs)

    return operation


ssd = _operation(ssd_reference, ssd_chunked, ssd_triton, ssd_fault)
ssd_step = _operation(ssd_step_reference, ssd_step_torch, ssd_step_triton)
causal_conv = _operation(causal_conv_reference, causal_conv_torch, causal_conv_triton)
gated_norm = _operation(gated_norm_reference, gated_norm_torch, gated_norm_triton)
selected_logp = _operation(selected_logp_reference, selected_logp_torch, selected_logp_triton)
