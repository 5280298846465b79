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
    c_q . b_s is computed once per group; the chunk state and its read-out are one matrix product per group.
    """
    B, T, H, P = x_BTHP.shape
    K, N = b_BTKN.shape[2:]
    R, Q = H // K, min(chunk, T)
    C = -(-T // Q)
    x_in = x_BTHP
    if ids_BT is not None:
        dt_BTH = dt_BTH * (ids_BT >= 0)[..., None]
    if C * Q != T:  # padding with dt = 0 leaves the state as it is
        pad = C * Q - T
        x_BTHP, b_BTKN, c_BTKN = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x_BTHP, b_BTKN, c_BTKN))
        dt_BTH = F.pad(dt_BTH, (0, 0, 0, pad))
        if ids_BT is not None:
            ids_BT = torch.cat([ids_BT, ids_BT[:, -1:].expand(B, pad)], dim=1)

    # l: log decay since the chunk's start. m = l - log dt: the step size of token s rides along in exp(l_q - m_s).
    dt_BCHQ = rearrange(_wide(dt_BTH), "b (c q) h -> b c h q", q=Q)
    l_BCHQ = (dt_BCHQ * a_H[:, None]).cumsum(-1)
    m_BCHQ = l_BCHQ - dt_BCHQ.clamp(min=1e-30).log()
    x_BCHQP = rearrange(x_BTHP, "b (c q) h p -> b c h q p", q=Q)
    b_BCKQN = rearrange(b_BTKN, "b (c q) k n -> b c k q n", q=Q)
    c_BCKQN = rearrange(c_BTKN, "b (c q) k n -> b c k q n", q=Q)

    # Inside a chunk. Masked before the exp: above the diagonal the difference is positive and would overflow.
    hidden = torch.ones(Q, Q, dtype=torch.bool, device=x_BTHP.device).triu(1)
    to_end_BCHQ, from_start_BCHQ = torch.exp(l_BCHQ[..., -1:] - m_BCHQ), torch.exp(l_BCHQ)
    carry_BCH = from_start_BCHQ[..., -1]
    if ids_BT is not None:
        ids_BCQ = ids_BT.view(B, C, Q)
        last_BC = ids_BCQ[..., -1]
        before_BC = torch.cat([ids_BT[:, :1], last_BC[:, :-1]], dim=1)  # the document that a chunk's start state is of
        hidden = hidden | (ids_BCQ[..., :, None] != ids_BCQ[..., None, :])[:, :, None]
        to_end_BCHQ = to_end_BCHQ * (ids_BCQ == last_BC[..., None])[:, :, None]
        from_start_BCHQ = from_start_BCHQ * (ids_BCQ == before_BC[..., None])[:, :, None]
        carry_BCH = carry_BCH * (last_BC == before_BC)[..., None]
    decay_BCHQQ = torch.exp((l_BCHQ[..., :, None] - m_BCHQ[..., None, :]).masked_fill(hidden, float("-inf")))
    scores_BCKQQ = c_BCKQN @ b_BCKQN.transpose(-1, -2)
    weights = scores_BCKQQ[:, :, :, None] * decay_BCHQQ.view(B, C, K, R, Q, Q).to(scores_BCKQQ.dtype)
    y_BCHQP = weights.view(B, C, H, Q, Q) @ x_BCHQP

    # Between chunks: what each chunk adds to the state, then the recurrence over chunks, then the read-out.
    xend_BCHQP = x_BCHQP * to_end_BCHQ[..., None].to(x_in.dtype)
    xend = rearrange(xend_BCHQP, "b c (k r) q p -> b c k (r p) q", k=K)
    added_BCHPN = rearrange(_wide(xend @ b_BCKQN), "b c k (r p) n -> b c (k r) p n", r=R)
    state_BHPN = torch.zeros_like(added_BCHPN[:, 0]) if state_BHPN is None else state_BHPN.to(added_BCHPN.dtype)
    starts = []
    for i in range(C):
        starts.append(state_BHPN)
        state_BHPN = carry_BCH[:, i, :, None, None] * state_BHPN + added_BCHPN[:, i]
    start = rearrange(torch.stack(starts, dim=1).to(c_BCKQN.dtype), "b c (k r) p n -> b c k n (r p)", k=K)
    read = rearrange(c_BCKQN @ start, "b c k q (r p) -> b c (k r) q p", r=R)
    y_BCHQP = torch.addcmul(y_BCHQP, read, from_start_BCHQ[..., None].to(read.dtype))
    y = rearrange(y_BCHQP, "b c h q p -> b (c q) (h p)")[:, :T]
    d_I = d_H.repeat_interleave(P).to(x_in.dtype)  # one long row: [H, 1] against [H, P] would not be vectorised
    return torch.addcmul(y, x_in.reshape(B, T, H * P), d_I).view(B, T, H, P), state_BHPN


ssd = ssd_chunked


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, a_H: Tensor, b_BKN: Tensor, c_BKN: Tensor, d_H: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: the new y_BHP and the new state. Differentiable; nothing is changed in place."""
    B, H, P = x_BHP.shape
    N, R = b_BKN.shape[-1], H // b_BKN.shape[1]
    decay_BH = torch.exp(_wide(dt_BH) * a_H)
    xdt_BHP = _wide(x_BHP * dt_BH[..., None].to(x_BHP.dtype))
    b_BHN = _wide(b_BKN).repeat_interleave(R, dim=1)
    c_BHN = _wide(c_BKN).repeat_interleave(R, dim=1)
    state = torch.baddbmm(
        (state_BHPN * decay_BH[..., None, None]).view(B * H, P, N), xdt_BHP.reshape(B * H, P, 1), b_BHN.view(B * H, 1, N)
    )
    y_BHP = (state @ c_BHN.view(B * H, N, 1)).view(B, H, P).to(x_BHP.dtype)
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
        for j in range(len(weight_WE)):
            tap_BTE = _cut(grad_BTE, ctx.cuts, j)
            dx_BUE[:, j : j + T].addcmul_(tap_BTE, weight_WE[j])
            dw.append((tap_BTE * x_BUE[:, j : j + T]).sum(dim=(0, 1)))
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
    B, T, E = y_BTE.shape
    g_BTE = _wide(y_BTE) * F.silu(_wide(z_BTE))
    g_BTE = F.rms_norm(g_BTE.view(B, T, n_groups, E // n_groups), (E // n_groups,), eps=eps).view(B, T, E)
    return (weight_E * g_BTE).to(y_BTE.dtype)


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
