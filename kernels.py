"""The model's hot operations: the slow, obvious reference of each beside the form that runs fast.

The state-space duality (SSD) of Mamba-2 (arXiv 2405.21060) is the main one. For one head, with a step size dt_t > 0
and a negative rate a, a state h of shape [P, N] follows

    h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T          y_t = h_t c_t + d x_t

`ssd_reference` is these two lines in a loop. `ssd_chunked` cuts the sequence into chunks of Q tokens: inside a chunk the
recurrence is a masked, decayed attention (matrix products), and only C = T/Q states are passed from chunk to chunk.

How to read: the references first; they are the specification. Then `ssd_chunked`. The tests hold each pair equal, in
values, final states and every gradient. Conventions shared by all operations here:

* `ids_BT` holds a document id per token. Tokens of different documents do not see each other; id -1 is padding, a
  document of its own that writes nothing. `None` means one document and no padding.
* A state or convolution tail that is passed in belongs to the document of the first token.
* Decays are computed in fp32 or wider, whatever the dtype of x.

Shape letters (the whole repo): B sequences, T tokens, D model width, F FFN width, V vocabulary, H heads, P channels per
head, K groups, R heads per group (H = K R), N state size, Q chunk length, C chunks, S cached positions, W conv width,
E conv channels, G thoughts, M tokens of a thought, L layers.

Not here yet: Triton kernels.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------ SSD


def ssd_reference(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTKN: Tensor,
    c_BTKN: Tensor,
    d_H: Tensor,
    state_BHPN: Tensor | None = None,
    ids_BT: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The recurrence of SSD, one token at a time (arXiv 2405.21060, eq. 1 and 2). `chunk` is ignored.

    Args: x_BTHP: inputs; dt_BTH: step sizes after the softplus, >= 0; a_H: rates, < 0; b_BTKN, c_BTKN: input and output
    maps, shared by the R heads of a group; d_H: skip weights; state_BHPN: initial state, zeros if None.
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
        state_BHPN = decay_BH[..., None, None] * state_BHPN + torch.einsum("bh,bhp,bhn->bhpn", dt_BH, x_BHP, b_BHN)
        y_list.append(torch.einsum("bhpn,bhn->bhp", state_BHPN, c_BHN) + d_H[:, None] * x_BHP)
    return torch.stack(y_list, dim=1).to(x_BTHP.dtype), state_BHPN


def ssd_chunked(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTKN: Tensor,
    c_BTKN: Tensor,
    d_H: Tensor,
    state_BHPN: Tensor | None = None,
    ids_BT: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same function as `ssd_reference` from matrix products over chunks (arXiv 2405.21060, section 6).

    With l the running sum of dt a inside a chunk, token q receives from token s <= q of its chunk the weight
    (c_q . b_s) exp(l_q - l_s) dt_s, and from the state at the chunk's start exp(l_q) h c_q. Cost is linear in T.
    c_q . b_s is computed once per group; the chunk state and its read-out are one matrix product per group. Half precision
    is widened to fp32 first.
    """
    B, T, H, P = x_BTHP.shape
    Q = min(chunk, T)
    C = -(-T // Q)
    if ids_BT is not None:
        dt_BTH = dt_BTH * (ids_BT >= 0)[..., None]
    x, dt, b, c = (_wide(t) for t in (x_BTHP, dt_BTH, b_BTKN, c_BTKN))
    if C * Q != T:  # padding with dt = 0 leaves the state as it is
        x, dt, b, c = (F.pad(t, [0, 0] * (t.dim() - 2) + [0, C * Q - T]) for t in (x, dt, b, c))

    # l: log decay since the chunk's start. m = l - log dt: the step size of token s rides along in exp(l_q - m_s).
    dt_BCHQ = rearrange(dt, "b (c q) h -> b c h q", q=Q)
    l_BCHQ = (dt_BCHQ * a_H[:, None]).cumsum(-1)
    m_BCHQ = l_BCHQ - dt_BCHQ.clamp(min=1e-30).log()
    to_end_BCHQ, from_start_BCHQ = torch.exp(l_BCHQ[..., -1:] - m_BCHQ), torch.exp(l_BCHQ)
    carry_BCH = from_start_BCHQ[..., -1]
    seen = l_BCHQ.new_ones(Q, Q).tril()  # a token sees itself and those before it, of its own document
    if ids_BT is not None:
        ids_BCQ = torch.cat([ids_BT, ids_BT[:, -1:].expand(B, C * Q - T)], dim=1).view(B, C, Q)
        last_BC = ids_BCQ[..., -1]
        before_BC = torch.cat([ids_BT[:, :1], last_BC[:, :-1]], dim=1)  # the document that a chunk's start state is of
        seen = seen * (ids_BCQ[..., :, None] == ids_BCQ[..., None, :])[:, :, None]
        to_end_BCHQ = to_end_BCHQ * (ids_BCQ == last_BC[..., None])[:, :, None]
        from_start_BCHQ = from_start_BCHQ * (ids_BCQ == before_BC[..., None])[:, :, None]
        carry_BCH = carry_BCH * (last_BC == before_BC)[..., None]

    x_BCQHP = rearrange(x, "b (c q) h p -> b c q h p", q=Q)
    b_BCKQN, c_BCKQN = (rearrange(t, "b (c q) k n -> b c k q n", q=Q) for t in (b, c))
    state_BHPN = l_BCHQ.new_zeros(B, H, P, b.shape[-1]) if state_BHPN is None else state_BHPN.to(l_BCHQ.dtype)
    y_BCQHP, state_BHPN = ChunkProducts.apply(
        x_BCQHP, b_BCKQN, c_BCKQN, l_BCHQ, m_BCHQ, seen, to_end_BCHQ, from_start_BCHQ, carry_BCH, d_H, state_BHPN
    )
    return y_BCQHP.flatten(1, 2)[:, :T].to(x_BTHP.dtype), state_BHPN


class ChunkProducts(torch.autograd.Function):
    """The heavy part of `ssd_chunked`: its matrix products, and the recurrence over chunks, with a backward pass.

    Time goes into passes over large tensors as much as into the products. Autograd would make twice as many passes, most of
    them into new memory. Two more traps of speed on CPU: the exp of -inf takes twice as long, so what is not seen is 0
    before the exp (above the diagonal the difference is positive and could overflow) and multiplied by 0 after it; and an
    exp that underflows takes ten to thirty times as long, so differences end at -80, where nothing is left.
    """

    @staticmethod
    def forward(
        ctx,
        x_BCQHP: Tensor,
        b_BCKQN: Tensor,
        c_BCKQN: Tensor,
        l_BCHQ: Tensor,
        m_BCHQ: Tensor,
        seen: Tensor,
        to_end_BCHQ: Tensor,
        from_start_BCHQ: Tensor,
        carry_BCH: Tensor,
        d_H: Tensor,
        state_BHPN: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Args: seen: 1 or 0, of the shape [Q, Q] or [B, C, 1, Q, Q]. Returns y_BCQHP and the last state."""
        B, C, K, Q, N = b_BCKQN.shape
        to_end, from_start = (t.transpose(2, 3)[..., None] for t in (to_end_BCHQ, from_start_BCHQ))
        # Inside a chunk.
        scores = (c_BCKQN @ b_BCKQN.mT)[:, :, :, None]
        decay_BCHQQ = (l_BCHQ[..., :, None] - m_BCHQ[..., None, :]).tril_().clamp_(min=-80).exp_().mul_(seen)
        weights_BCHQQ = (scores * decay_BCHQQ.unflatten(2, (K, -1))).flatten(2, 3)
        weights_BCHQQ.diagonal(dim1=-2, dim2=-1).add_(d_H[:, None])  # the skip: a token's weight in its own output
        x_BCHQP = x_BCQHP.transpose(2, 3).contiguous()
        inside_BCHQP = weights_BCHQQ @ x_BCHQP
        # Between chunks: what each adds to the state, the recurrence, and what is read of the state. The R heads of a group
        # share their matrices: they are one product.
        xend = _by_group(x_BCQHP * to_end, K)
        added_BCHPN = (xend.mT @ b_BCKQN).view(B, C, -1, x_BCQHP.shape[-1], N)
        start_BCHPN, state_BHPN = _walk(added_BCHPN, carry_BCH, state_BHPN, range(C))
        read_BCQHP = _by_head(c_BCKQN @ start_BCHPN.view(B, C, K, -1, N).mT, x_BCQHP)
        y_BCQHP = torch.addcmul(inside_BCHQP.transpose(2, 3), read_BCQHP, from_start, out=torch.empty_like(x_BCQHP))
        ctx.save_for_backward(x_BCQHP, x_BCHQP, b_BCKQN, c_BCKQN, scores, decay_BCHQQ, weights_BCHQQ, to_end, from_start,
                              carry_BCH, xend, start_BCHPN, read_BCQHP)  # fmt: skip
        return y_BCQHP, state_BHPN

    @staticmethod
    def backward(ctx, dy_BCQHP: Tensor, dstate_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        """The same steps in reverse. Gradients of l and m are row and column sums of one matrix: what cancels, cancels."""
        (x_BCQHP, x_BCHQP, b_BCKQN, c_BCKQN, scores, decay_BCHQQ, weights_BCHQQ, to_end, from_start,
         carry_BCH, xend, start_BCHPN, read_BCQHP) = ctx.saved_tensors  # fmt: skip
        B, C, K, Q, N = b_BCKQN.shape
        dread = _by_group(dy_BCQHP * from_start, K)
        dfrom_start = (dy_BCQHP * read_BCQHP).sum(-1).transpose(2, 3)
        dc_BCKQN = dread @ start_BCHPN.view(B, C, K, -1, N)
        dstart_BCHPN = (dread.mT @ c_BCKQN).view(start_BCHPN.shape)
        dadded_BCHPN, dstate_BHPN = _walk(dstart_BCHPN, carry_BCH, dstate_BHPN, reversed(range(C)))
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
        return (dx_BCQHP, db_BCKQN, dc_BCKQN, dl_BCHQ, dm_BCHQ, None, dto_end, dfrom_start, dcarry_BCH, dd_H, dstate_BHPN)


def _walk(added_BCHPN: Tensor, carry_BCH: Tensor, state_BHPN: Tensor, chunks: Iterable[int]) -> tuple[Tensor, Tensor]:
    """The recurrence state <- carry state + added: the state before each chunk, and the one after all.

    Walked from the last chunk to the first it is its own gradient: from those of the states before the chunks to those of
    what the chunks add.
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


ssd = ssd_chunked


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, a_H: Tensor, b_BKN: Tensor, c_BKN: Tensor, d_H: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: the new y_BHP and the new state. Differentiable; nothing is changed in place."""
    B, H, P = x_BHP.shape
    K, N = b_BKN.shape[1:]
    decay_BH = torch.exp(_wide(dt_BH) * a_H)
    xdt_BHP = _wide(x_BHP * dt_BH[..., None].to(x_BHP.dtype))
    # The R heads of a group are one matrix [R P, N]: B and C need no copy a head.
    state = (state_BHPN * decay_BH[..., None, None]).view(B, K, -1, N)
    state = torch.addcmul(state, xdt_BHP.view(B, K, -1, 1), _wide(b_BKN)[:, :, None])
    y = _wide(c_BKN)[:, :, None] @ state.mT  # a row times a matrix; a matrix times a column takes eight times as long
    y_BHP = y.view(B, H, P).to(x_BHP.dtype)
    return torch.addcmul(y_BHP, x_BHP, d_H[:, None].to(x_BHP.dtype)), state.view(B, H, P, N)


# --------------------------------------------------------------------------------------------- causal convolution


def causal_conv_reference(
    x_BTE: Tensor, weight_EW: Tensor, bias_E: Tensor, tail_BXE: Tensor | None = None, ids_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution written as its sum: y_t = bias + sum over j of weight_j x_{t - (W-1) + j}.

    Args: tail_BXE: the W - 1 inputs before x, zeros if None (X = W - 1). ids_BT: documents, see the module's docstring.
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


def causal_conv(
    x_BTE: Tensor, weight_EW: Tensor, bias_E: Tensor, tail_BXE: Tensor | None = None, ids_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`causal_conv_reference` as W shifted multiply-adds over whole sequences (faster on CPU than F.conv1d)."""
    B, T, E = x_BTE.shape
    W = weight_EW.shape[1]
    tail_BXE = x_BTE.new_zeros(B, W - 1, E) if tail_BXE is None else tail_BXE
    x_BUE, cuts = torch.cat([tail_BXE, x_BTE], dim=1), None
    tail_BXE = x_BUE[:, T:]
    if T == 1 and ids_BT is None:  # a step of decoding is too small for W passes
        return (x_BUE * weight_EW.t()).sum(dim=1, keepdim=True) + bias_E, tail_BXE
    if ids_BT is not None:
        ids_BU = torch.cat([ids_BT[:, :1].expand(B, W - 1), ids_BT], dim=1)
        cuts = [((ids_BU[:, j : j + T] != ids_BT) | (ids_BT < 0)).nonzero(as_tuple=True) for j in range(W)]
        tail_BXE = tail_BXE * _kept(ids_BU[:, T:], ids_BT)[..., None].to(x_BTE.dtype)
    return ShiftedSum.apply(x_BUE, weight_EW, bias_E, cuts), tail_BXE


def _kept(ids_BX: Tensor, ids_BT: Tensor) -> Tensor:
    """Which of the last W - 1 inputs the next token may read: those of the last token's document, unless it is padding."""
    return (ids_BX == ids_BT[:, -1:]) & (ids_BX >= 0)


class ShiftedSum(torch.autograd.Function):
    """y_t = bias + sum over j of weight_j x_{t+j}: the convolution, with a backward pass that adds in place.

    Autograd would make a padded copy of the gradient for each of the W taps; this makes one. Two traps of speed: rows of
    weight_EW are strided, which keeps the multiply-adds from being vectorised; and so would a mask over documents, while
    boundaries are few: `cuts` lists, for each tap, the (row, token) pairs that it must not reach.
    """

    @staticmethod
    def forward(ctx, x_BUE: Tensor, weight_EW: Tensor, bias_E: Tensor, cuts: list[tuple[Tensor, Tensor]] | None) -> Tensor:
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


# -------------------------------------------------------------------------------------------- gated norm, log-probs


def gated_norm(y_BTE: Tensor, z_BTE: Tensor, weight_E: Tensor, n_groups: int, eps: float) -> Tensor:
    """Mamba-2's gate and grouped RMSNorm: g = y silu(z); g / sqrt(mean over its group of g^2 + eps) * weight.

    The gate comes before the norm, as in NVIDIA's Nemotron-H. Statistics are taken in fp32 or wider.
    """
    return GatedNorm.apply(_wide(y_BTE), _wide(z_BTE), weight_E, n_groups, eps).to(y_BTE.dtype)


class GatedNorm(torch.autograd.Function):
    """`gated_norm` in fp32 or wider, with half as many passes over large tensors as autograd makes, most of them in place.

    With n = g / rms(g): dg = (dn - n mean(n dn)) / rms(g), the mean being over a group.
    """

    @staticmethod
    def forward(ctx, y_BTE: Tensor, z_BTE: Tensor, weight_E: Tensor, n_groups: int, eps: float) -> Tensor:
        """The gate, the norm, the weight."""
        n_BTE = y_BTE * F.silu(z_BTE)
        groups = n_BTE.unflatten(-1, (n_groups, -1))
        scale = torch.rsqrt(torch.linalg.vector_norm(groups, dim=-1, keepdim=True).square() / groups.shape[-1] + eps)
        groups.mul_(scale)
        ctx.n_groups = n_groups
        ctx.save_for_backward(y_BTE, z_BTE, weight_E, n_BTE, scale)
        return weight_E * n_BTE

    @staticmethod
    def backward(ctx, grad_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients of y, z and the weight. One buffer serves n grad, then n dn, then dn and at last dg."""
        y_BTE, z_BTE, weight_E, n_BTE, scale = ctx.saved_tensors
        buffer_BTE = grad_BTE * n_BTE
        dweight_E = buffer_BTE.sum(dim=(0, 1))
        groups, normed = (t.unflatten(-1, (ctx.n_groups, -1)) for t in (buffer_BTE.mul_(weight_E), n_BTE))
        mean = groups.mean(-1, keepdim=True)
        torch.mul(grad_BTE, weight_E, out=buffer_BTE)
        groups.addcmul_(normed, mean, value=-1).mul_(scale)
        dy_BTE = F.silu(z_BTE).mul_(buffer_BTE)
        return dy_BTE, torch.ops.aten.silu_backward(buffer_BTE.mul_(y_BTE), z_BTE), dweight_E, None, None


def token_logp(logits: Tensor, token: Tensor, banned: tuple[int, ...] = (), temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token], the softmax taken over the vocabulary without the `banned` ids.

    Leading dimensions are free: logits [..., V] and token [...] give [...]. A banned token itself gets -inf.
    """
    logits = mask_banned(_wide(logits), banned) / temperature
    return logits.gather(-1, token[..., None])[..., 0] - logits.logsumexp(-1)


def mask_banned(logits: Tensor, banned: tuple[int, ...]) -> Tensor:
    """A copy of the logits with -inf at the banned ids (the same tensor where none is banned)."""
    if not banned:
        return logits
    index = torch.tensor(banned, device=logits.device)
    return logits.index_fill(-1, index, float("-inf"))


def _wide(t: Tensor) -> Tensor:
    """fp32 for half precision, the tensor itself for fp32 and fp64."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
