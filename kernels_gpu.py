"""The hot operations of kernels.py as Triton kernels, for CUDA GPUs; kernels.py chooses who runs.

How to read, knowing PyTorch. A kernel is a program for one tile of the result: `kernel[grid](...)`
starts it once for each point of the grid, in no order; `_program(axis)` is its point. A tensor
comes as the address of its first number: `start + offsets` is a tile of addresses, which is loaded
into registers, worked on in fp32, and stored. Sizes of tiles are powers of two, known when a kernel
is compiled (`constexpr`), at least 16 in a matrix product. So P is cut into tiles of P2; `p < P`
masks what lies outside: loaded as 0, not stored. Names end in the letters of their tile.

Row (b, t) of a tensor [B, T, ...] begins at (b T + t) stride. Where a tile begins is one number of
64 bits (61,000 tokens of a wide model pass 2^31); places inside a tile take 32 bits, for registers
are scarce. No atomics and no autotuning: a result does not depend on timing.

Unlike PyTorch's forms: a chunk always has 64 tokens; no fp64; products of fp32 numbers are as exact
as torch's own (torch.set_float32_matmul_precision); states between chunks are in the dtype of x.
"""

from __future__ import annotations  # `tl.constexpr` is no name where triton is missing

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from system.errors import require

try:
    import triton
    import triton.language as tl
    from triton.backends.nvidia.compiler import get_ptxas_version
except ImportError:  # the kernels below stay plain functions, which nobody calls
    triton = tl = None
jit = triton.jit if triton else lambda function: function

TILE = 64  # tokens of a chunk
TILES = {  # card, product: N in scan and dx; P and N in states; P, N in dbc. With larger ones
    (8, "half"): (64, 64, 32, 32),  # registers spill, or a program's memory on the card ends
    (8, "tf32"): (32, 64, 32, 32),
    (8, "tf32x3"): (32, 32, 32, 16),
    (9, "half"): (128, 64, 128, 32),
    (9, "tf32"): (64, 64, 64, 32),
    (9, "tf32x3"): (32, 64, 32, 32),
    (10, "half"): (128, 64, 128, 32),
    (10, "tf32"): (64, 64, 64, 32),
    (10, "tf32x3"): (32, 64, 32, 16)}
MAX_P, MAX_TOKENS = 128, TILE * 65_535  # a head in one tile; tiles on an axis of the grid
CONV_TILE = 64, 64  # tokens and channels
NORM_ROWS = 32  # tokens whose part of a weight gradient is summed in registers
VOCABULARY_TILE = 4096  # ids whose logits are made at a time


def require_triton(can_launch: bool, what: str) -> None:
    """Raises ValueError unless Triton is installed and can run: on CUDA, or in its interpreter."""
    require(triton, "kernels (triton) needs Triton: pip install triton (or choose kernels auto)")
    require(can_launch or not isinstance(_program, triton.JITFunction),
            f"kernels (triton) needs CUDA, and {what}; choose kernels auto, or set "
            "TRITON_INTERPRET=1 before Python starts (slow, for tests)")


@jit
def _program(axis: tl.constexpr):
    """This program's point on an axis of the grid, in 64 bits; so is every address made of it."""
    return tl.program_id(axis).to(tl.int64)


@jit
def _load(start, i, j, inside_i, inside_j):
    """The tile start[i, j] of row and column offsets; [j, i] where the arguments are swapped."""
    places = start + (i[:, None] + j[None, :])
    return tl.load(places, mask=inside_i[:, None] & inside_j[None, :], other=0.0)


@jit
def _store(start, i, j, value, inside_i, inside_j):
    """The reverse, in the dtype of what is stored to."""
    places = start + (i[:, None] + j[None, :])
    tl.store(places, value.to(start.dtype.element_ty), mask=inside_i[:, None] & inside_j[None, :])


@jit
def _document(ids, batch, t, T):
    """The document of position t, beyond the ends that of the nearest; 0 where there are no ids."""
    t = tl.maximum(tl.minimum(t, T - 1), 0)
    return t * 0 if ids is None else tl.load(ids + batch * T + t)


def _rows(t: Tensor) -> tuple[Tensor, int]:
    """The tensor, and the s with which its row (b, t) begins at (b T + t) s; else a copy."""
    if t.numel() == 0:
        return t, 0
    stride = t.stride(1) if t.shape[1] > 1 else t.stride(0)
    if t[0, 0].is_contiguous() and t.stride(0) == t.shape[1] * stride:
        return t, stride
    return t.contiguous(), t[0, 0].numel()


def _tile(n: int) -> int:
    """Size of the tile that n entries fit in, for a matrix product."""
    return max(16, triton.next_power_of_2(n))


def _card(t: Tensor) -> int:
    """The row of TILES: Hopper is 9, Blackwell 10, and others have at least what 8 (Ampere) has."""
    major = torch.cuda.get_device_capability(t.device)[0] if t.is_cuda else 8
    return major if major in (9, 10) else 8


def _launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Starts a kernel on the card that holds its tensors; nothing where the grid is empty, or where
    a compiler only asks for shapes."""
    if not isinstance(arguments[0], FakeTensor) and 0 not in grid:
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **constants)


def constant(look: Callable) -> Callable:
    """Compilers call this function instead of following it, and take what it returns for good. It
    is `torch.compiler.assume_constant_result`, without the second that importing that takes."""
    look._dynamo_marked_constant = True
    return look


def operation(run: Callable, fake: Callable | None = None) -> torch._ops.OpOverload:
    """`run` as an operation of PyTorch, which compilers do not look into. Where they ask what it
    returns, `fake` runs; or the same code, which launches nothing then: shapes, strides and types
    come out right. (A `custom_op` would import the compiler at its first call, for 1.2 s.)"""
    name = f"mamba2::{run.__name__}"
    torch.library.define(name, torch.library.infer_schema(run, mutates_args=()))
    torch.library.impl(name, "default", run)
    torch.library.register_fake(name, fake or run)
    return getattr(torch.ops.mamba2, run.__name__).default


def passed_file(device: torch.device, *case) -> tuple[Path, str]:
    """The file that is there once a case was found right, and words for the card and what compiles:
    another card, Triton, ptxas, torch or version of this file is another file."""
    on_gpu = device.type == "cuda"
    major, minor = torch.cuda.get_device_capability(device) if on_gpu else (8, 0)
    ptxas = get_ptxas_version(10 * major + minor).split("release ")[-1].split("\n")[0]
    card = torch.cuda.get_device_name(device) if on_gpu else "the interpreter"
    words = f"{card}, Triton {triton.__version__}, ptxas {ptxas}"
    key = repr((words, torch.__version__, Path(__file__).read_bytes(), case))
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Path(triton.knobs.cache.dir) / f"passed-{name}", words


def _require_size(P: int, T: int) -> None:
    """Raises ValueError for sizes that the kernels cannot take, before anything is launched."""
    require(P <= MAX_P, f"kernels (triton) takes heads of at most {MAX_P} channels, and these have "
                        f"{P}; make the heads smaller, or choose kernels reference")
    require(T <= MAX_TOKENS, f"kernels (triton) takes at most {MAX_TOKENS} tokens at a time, and "
                             f"these are {T}; pass them in parts, each with the state so far")


@constant
def precision() -> str:
    """Of products of fp32 numbers: three tf32 products are as good as fp32."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# ---------------------------------------------------------------------------------------------- SSD


@jit
def _chunk(dt, a, ids, batch, head, chunk, T, H: tl.constexpr, Q: tl.constexpr):
    """What the tokens of one chunk of a head share: dt; l, the running sum of dt a; exp(l_Q - l),
    exp(l) and exp(l_Q), the decays to the chunk's end, since its start and over all of it, 0 where
    documents change. Exponents end at 0: rounding can pass it, and the upper triangle overflow."""
    # 1. Tokens past the end have a step size of 0: they neither write nor decay.
    q = tl.arange(0, Q)
    start = dt + (batch * T + chunk * Q) * H + head
    dt_Q = tl.load(start + q * H, mask=q < T - chunk * Q, other=0.0)
    l_Q = tl.cumsum(dt_Q * tl.load(a + head), 0)
    total = tl.sum(tl.where(q == Q - 1, l_Q, 0.0), 0)  # a register cannot be indexed: l_Q[Q - 1]
    # 2. Documents, counted within the chunk from 0, that of the token before and of the state.
    changes_Q, n_changes = q * 0, 0
    if ids is not None:
        own_Q = _document(ids, batch, chunk * Q + q, T)
        changed_Q = (own_Q != _document(ids, batch, chunk * Q + q - 1, T)).to(tl.int32)
        changes_Q, n_changes = tl.cumsum(changed_Q, 0), tl.sum(changed_Q, 0)
    # 3. The decays.
    to_end_Q = tl.where(changes_Q == n_changes, tl.exp(tl.minimum(total - l_Q, 0.0)), 0.0)
    from_start_Q = tl.where(changes_Q == 0, tl.exp(tl.minimum(l_Q, 0.0)), 0.0)
    carry = tl.where(n_changes == 0, tl.exp(tl.minimum(total, 0.0)), 0.0)
    return changes_Q, dt_Q, l_Q, to_end_Q, from_start_Q, carry


@jit
def _decay(l_Q, changes_Q, TRANSPOSED: tl.constexpr, Q: tl.constexpr):
    """exp(l_q - l_s) where token q sees token s, else 0: [q, s], or [s, q] if TRANSPOSED."""
    i_Q = tl.arange(0, Q)
    seen_QQ, difference_QQ = i_Q[:, None] >= i_Q[None, :], l_Q[:, None] - l_Q[None, :]
    if TRANSPOSED:
        seen_QQ, difference_QQ = i_Q[None, :] >= i_Q[:, None], l_Q[None, :] - l_Q[:, None]
    seen_QQ = seen_QQ & (changes_Q[:, None] == changes_Q[None, :])
    return tl.where(seen_QQ, tl.exp(tl.minimum(difference_QQ, 0.0)), 0.0)


@jit
def ssd_states_kernel(x, dt, a, b, ids, first, states, last, stride_x, stride_b, T,
                      BACKWARD: tl.constexpr, H: tl.constexpr, J: tl.constexpr, P: tl.constexpr,
                      N: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr, Q: tl.constexpr,
                      PRECISION: tl.constexpr):
    """h <- exp(l_Q) h + sum over s of exp(l_Q - l_s) dt_s x_s b_s^T: walks along the chunks with
    one tile of one head's state in registers; stores it before each chunk, and at the end.
    BACKWARD is the mirror, from the last chunk to the first: x is dy, b is c, and the gradient of
    the state after each chunk is stored: g <- exp(l_Q) g + sum over q of exp(l_q) dy_q c_q^T."""
    batch, head = _program(0) // H, _program(0) % H
    q, n_chunks = tl.arange(0, Q), tl.cdiv(T, Q)
    p = (_program(1) * P2).to(tl.int32) + tl.arange(0, P2)
    n = (_program(2) * N2).to(tl.int32) + tl.arange(0, N2)
    state_PN = tl.zeros([P2, N2], tl.float32)
    if first is not None:
        state_PN += _load(first + _program(0) * P * N, p * N, n, p < P, n < N)
    for i in range(n_chunks):
        chunk = n_chunks - 1 - i if BACKWARD else i
        # 1. The state before the chunk, for the kernels that do all chunks at once.
        at_chunk = (batch * n_chunks + chunk) * H + head
        _store(states + at_chunk * P * N, p * N, n, state_PN, p < P, n < N)
        # 2. What the chunk adds: x is loaded transposed, so that the sum over s is one product.
        _, dt_Q, _, to_end_Q, from_start_Q, carry = _chunk(dt, a, ids, batch, head, chunk, T, H, Q)
        row, inside_Q = batch * T + chunk * Q, q < T - chunk * Q
        x_PQ = _load(x + row * stride_x + head * P, p, q * stride_x, p < P, inside_Q)
        b_QN = _load(b + row * stride_b + head // J * N, q * stride_b, n, inside_Q, n < N)
        x_PQ = x_PQ * (from_start_Q if BACKWARD else to_end_Q * dt_Q)[None, :]
        state_PN = carry * state_PN + tl.dot(
            x_PQ.to(x.dtype.element_ty), b_QN, input_precision=PRECISION)
    _store(last + _program(0) * P * N, p * N, n, state_PN, p < P, n < N)


@jit
def ssd_scan_kernel(x, dt, a, b, c, d, ids, states, y, stride_x, stride_b, stride_c, T,
                    H: tl.constexpr, J: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                    P2: tl.constexpr, N2: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr):
    """y_q = sum over s <= q of (c_q . b_s) exp(l_q - l_s) dt_s x_s + exp(l_q) h c_q + d x_q."""
    batch, head, chunk = _program(0) // H, _program(0) % H, _program(1)
    q, p = tl.arange(0, Q), tl.arange(0, P2)
    row, inside_Q = batch * T + chunk * Q, q < T - chunk * Q
    at_chunk = ((batch * tl.num_programs(1) + chunk) * H + head) * P * N
    # 1. From N2 entries after the other: c_q . b_s, and what is read of the state before the chunk.
    weights_QQ, y_QP = tl.zeros([Q, Q], tl.float32), tl.zeros([Q, P2], tl.float32)
    for first in range(0, N, N2):
        n = first + tl.arange(0, N2)
        b_NQ = _load(b + row * stride_b + head // J * N, n, q * stride_b, n < N, inside_Q)
        c_QN = _load(c + row * stride_c + head // J * N, q * stride_c, n, inside_Q, n < N)
        weights_QQ += tl.dot(c_QN, b_NQ, input_precision=PRECISION)
        state_NP = _load(states + at_chunk, n, p * N, n < N, p < P)
        y_QP += tl.dot(c_QN, state_NP, input_precision=PRECISION)
    # 2. The weights of the chunk's tokens in each other's outputs, the weighted inputs, the skip.
    changes_Q, dt_Q, l_Q, _, from_start_Q, _ = _chunk(dt, a, ids, batch, head, chunk, T, H, Q)
    weights_QQ *= _decay(l_Q, changes_Q, False, Q) * dt_Q[None, :]
    x_QP = _load(x + row * stride_x + head * P, q * stride_x, p, inside_Q, p < P)
    y_QP = from_start_Q[:, None] * y_QP + tl.dot(
        weights_QQ.to(x.dtype.element_ty), x_QP, input_precision=PRECISION)
    y_QP += tl.load(d + head) * x_QP
    _store(y + (row * H + head) * P, q * (H * P), p, y_QP, inside_Q, p < P)


@jit
def ssd_dx_kernel(x, dt, a, b, c, d, ids, dy, dstates, dx, ddt, dd, stride_x, stride_b, stride_c, T,
                  H: tl.constexpr, J: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                  P2: tl.constexpr, N2: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr):
    """dx of one chunk of one head, its part of dd, and the gradient of dt but for the decays.
    Token s is read by the tokens q >= s of its chunk and by the state after it: u_s = sum over q of
    (c_q . b_s) exp(l_q - l_s) dy_q + exp(l_Q - l_s) dstate b_s. Then dx_s = dt_s u_s + d dy_s, dt_s
    has the gradient x_s . u_s, and d the sum of x_s . dy_s."""
    batch, head, chunk = _program(0) // H, _program(0) % H, _program(1)
    q, p = tl.arange(0, Q), tl.arange(0, P2)
    row, inside_Q = batch * T + chunk * Q, q < T - chunk * Q
    at_chunk = (batch * tl.num_programs(1) + chunk) * H + head
    # 1. The products, as in the scan: there c, b and the state are what b, c and dstate are here.
    weights_QQ, u_QP = tl.zeros([Q, Q], tl.float32), tl.zeros([Q, P2], tl.float32)
    for first in range(0, N, N2):
        n = first + tl.arange(0, N2)
        b_QN = _load(b + row * stride_b + head // J * N, q * stride_b, n, inside_Q, n < N)
        c_NQ = _load(c + row * stride_c + head // J * N, n, q * stride_c, n < N, inside_Q)
        weights_QQ += tl.dot(b_QN, c_NQ, input_precision=PRECISION)
        dstate_NP = _load(dstates + at_chunk * P * N, n, p * N, n < N, p < P)
        u_QP += tl.dot(b_QN, dstate_NP, input_precision=PRECISION)
    # 2. u: from the state after the chunk, and from its tokens by the weights, [s, q].
    changes_Q, dt_Q, l_Q, to_end_Q, _, _ = _chunk(dt, a, ids, batch, head, chunk, T, H, Q)
    weights_QQ *= _decay(l_Q, changes_Q, True, Q)
    dy_QP = _load(dy + (row * H + head) * P, q * (H * P), p, inside_Q, p < P)
    u_QP = to_end_Q[:, None] * u_QP + tl.dot(
        weights_QQ.to(dy.dtype.element_ty), dy_QP, input_precision=PRECISION)
    # 3. The three gradients.
    x_QP = _load(x + row * stride_x + head * P, q * stride_x, p, inside_Q, p < P).to(tl.float32)
    dx_QP = dt_Q[:, None] * u_QP + tl.load(d + head) * dy_QP
    _store(dx + (row * H + head) * P, q * (H * P), p, dx_QP, inside_Q, p < P)
    tl.store(ddt + row * H + head + q * H, tl.sum(x_QP * u_QP, 1), mask=inside_Q)
    tl.store(dd + at_chunk, tl.sum(x_QP * dy_QP))


@jit
def ssd_dbc_kernel(x, dt, a, b, c, ids, dy, states, dstates, db, dc, dda, stride_x, stride_b,
                   stride_c, T, H: tl.constexpr, J: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                   P2: tl.constexpr, N2: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr):
    """db and dc of one chunk of one group and N2 of its N entries, and parts of dda, the gradient
    of dt a. With w_qs = (dy_q . x_s) exp(l_q - l_s) dt_s, summed over the heads of the group:

        dc_q = sum over s of w_qs b_s + exp(l_q) h^T dy_q
        db_s = sum over q of w_qs c_q + exp(l_Q - l_s) dt_s dstate^T x_s

    dda_t sums all that crosses from before t to t or later. Of the chunk's own pairs that is z_qs =
    w_qs (c_q . b_s) over s < t <= q: row sums minus column sums, from t on, of the same fp32 tile,
    for they nearly cancel. All sum over N and P: programs take parts of N, the loop parts of P.
    The weights are computed twice, [q, s] and [s, q]: transposing a product in registers to use it
    in the next one has given wrong results on Hopper. And only one product is added straight to
    each sum: two in a loop have given wrong results on Blackwell."""
    K: tl.constexpr = H // J
    PARTS: tl.constexpr = (P + P2 - 1) // P2
    batch, group, chunk = _program(0) // K, _program(0) % K, _program(1)
    q, n = tl.arange(0, Q), (_program(2) * N2).to(tl.int32) + tl.arange(0, N2)
    row, inside_Q = batch * T + chunk * Q, q < T - chunk * Q
    b_QN = _load(b + row * stride_b + group * N, q * stride_b, n, inside_Q, n < N)
    c_QN = _load(c + row * stride_c + group * N, q * stride_c, n, inside_Q, n < N)
    db_QN, dc_QN = tl.zeros([Q, N2], tl.float32), tl.zeros([Q, N2], tl.float32)
    for i in range(J * PARTS):
        # 1. One head and P2 of its channels; what the state hands on over the whole chunk.
        head, p = group * J + i // PARTS, i % PARTS * P2 + tl.arange(0, P2)
        changes_Q, dt_Q, l_Q, to_end_Q, from_start_Q, carry = _chunk(
            dt, a, ids, batch, head, chunk, T, H, Q)
        at_chunk = ((batch * tl.num_programs(1) + chunk) * H + head) * P * N
        state_PN = _load(states + at_chunk, p * N, n, p < P, n < N)
        dstate_PN = _load(dstates + at_chunk, p * N, n, p < P, n < N)
        kept = carry * tl.sum(state_PN.to(tl.float32) * dstate_PN)
        x_QP = _load(x + row * stride_x + head * P, q * stride_x, p, inside_Q, p < P)
        dy_QP = _load(dy + (row * H + head) * P, q * (H * P), p, inside_Q, p < P)
        # 2. dc, from w as [q, s]; of dda, the chunk's pairs and what is read of the state.
        weights_QQ = tl.dot(dy_QP, tl.trans(x_QP), input_precision=PRECISION)
        weights_QQ *= _decay(l_Q, changes_Q, False, Q) * dt_Q[None, :]
        read_QN = from_start_Q[:, None] * tl.dot(dy_QP, state_PN, input_precision=PRECISION)
        dc_QN += tl.dot(weights_QQ.to(x.dtype.element_ty), b_QN, input_precision=PRECISION)
        dc_QN += read_QN
        products_QQ = tl.dot(c_QN, tl.trans(b_QN), input_precision=PRECISION)  # kept, it spills
        z_QQ = weights_QQ * products_QQ
        ahead_Q = tl.sum(z_QQ, 1) - tl.sum(z_QQ, 0) + tl.sum(read_QN * c_QN, 1)
        # 3. db, from w as [s, q]; of dda, what is sent to the state.
        weights_QQ = tl.dot(x_QP, tl.trans(dy_QP), input_precision=PRECISION)
        weights_QQ *= _decay(l_Q, changes_Q, True, Q) * dt_Q[:, None]
        sent_QN = (to_end_Q * dt_Q)[:, None] * tl.dot(x_QP, dstate_PN, input_precision=PRECISION)
        db_QN += tl.dot(weights_QQ.to(x.dtype.element_ty), c_QN, input_precision=PRECISION)
        db_QN += sent_QN
        behind_Q = tl.sum(sent_QN * b_QN, 1)
        # 4. dda: from t on what is ahead, before t what was sent, and what passes through.
        dda_Q = tl.cumsum(ahead_Q, 0, reverse=True) + tl.cumsum(behind_Q, 0) - behind_Q + kept
        at_part = (_program(2) * PARTS + i % PARTS) * (tl.num_programs(0) // K) * T
        tl.store(dda + (at_part + row) * H + head + q * H, dda_Q, mask=inside_Q)
    _store(db + (row * K + group) * N, q * (K * N), n, db_QN, inside_Q, n < N)
    _store(dc + (row * K + group) * N, q * (K * N), n, dc_QN, inside_Q, n < N)


def _scan_sizes(x_BTHP: Tensor, b_BTKN: Tensor) -> tuple[dict, tuple[int, int, int, int]]:
    """The constants of every kernel of a scan, and its row of TILES."""
    (H, P), (K, N) = x_BTHP.shape[2:], b_BTKN.shape[2:]
    product = precision() if x_BTHP.dtype == torch.float32 else "half"
    sizes = {"H": H, "J": H // K, "P": P, "N": N, "Q": TILE, "PRECISION": precision()}
    return sizes, TILES[_card(x_BTHP), product]


def _walk(x_BTHP, dt_BTH, a_H, b_BTKN, ids_BT, first_BHPN, at_x, at_b, backward, sizes, tile):
    """States before the chunks in the dtype of x, the last one in fp32; or their gradients."""
    (B, T, H, P), N = x_BTHP.shape, b_BTKN.shape[-1]
    states_BCHPN = x_BTHP.new_empty(B, triton.cdiv(T, TILE), H, P, N)
    last_BHPN = dt_BTH.new_empty(B, H, P, N)
    first_BHPN = None if first_BHPN is None else first_BHPN.contiguous()
    P2, N2 = (min(tile, _tile(n)) for n in (P, N))
    _launch(
        ssd_states_kernel, (B * H, triton.cdiv(P, P2), triton.cdiv(N, N2)), x_BTHP, dt_BTH, a_H,
        b_BTKN, ids_BT, first_BHPN, states_BCHPN, last_BHPN, at_x, at_b, T, backward, **sizes,
        P2=P2, N2=N2, num_warps=4, num_stages=2)
    return states_BCHPN, last_BHPN


@operation
def ssd_scan(x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTKN: Tensor, c_BTKN: Tensor,
             d_H: Tensor, state_BHPN: Tensor | None, ids_BT: Tensor | None
             ) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the states before the chunks: `states` walks along these, `scan` does
    all at once. dt, a, d and the state in fp32, b and c in the dtype of x."""
    (x_BTHP, at_x), (b_BTKN, at_b), (c_BTKN, at_c) = _rows(x_BTHP), _rows(b_BTKN), _rows(c_BTKN)
    (B, T, H, P), N = x_BTHP.shape, b_BTKN.shape[-1]
    sizes, tiles = _scan_sizes(x_BTHP, b_BTKN)
    states_BCHPN, last_BHPN = _walk(x_BTHP, dt_BTH, a_H, b_BTKN, ids_BT, state_BHPN, at_x, at_b,
                                    False, sizes, tiles[1])
    y_BTHP = x_BTHP.new_empty(B, T, H, P)
    _launch(
        ssd_scan_kernel, (B * H, states_BCHPN.shape[1]), x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H,
        ids_BT, states_BCHPN, y_BTHP, at_x, at_b, at_c, T, **sizes, P2=_tile(P),
        N2=min(tiles[0], _tile(N)), num_warps=4, num_stages=1)
    return y_BTHP, last_BHPN, states_BCHPN


@operation
def ssd_scan_gradients(x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTKN: Tensor, c_BTKN: Tensor,
                       d_H: Tensor, ids_BT: Tensor | None, states_BCHPN: Tensor, dy_BTHP: Tensor,
                       dlast_BHPN: Tensor | None
                       ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of x, dt, a, b, c, d and the first state: the mirror of `states`, `dx`, `dbc`. PyTorch adds
    up the parts that programs leave."""
    (x_BTHP, at_x), (b_BTKN, at_b), (c_BTKN, at_c) = _rows(x_BTHP), _rows(b_BTKN), _rows(c_BTKN)
    (B, C, H, P, N), (T, K) = states_BCHPN.shape, b_BTKN.shape[1:3]
    sizes, tiles = _scan_sizes(x_BTHP, b_BTKN)
    strides, dy_BTHP = (at_x, at_b, at_c, T), dy_BTHP.contiguous()
    dstates_BCHPN, dstate_BHPN = _walk(dy_BTHP, dt_BTH, a_H, c_BTKN, ids_BT, dlast_BHPN, H * P,
                                       at_c, True, sizes, tiles[1])
    dx_BTHP, ddt_BTH = torch.empty_like(dy_BTHP), torch.empty_like(dt_BTH)
    dd_BCH = dt_BTH.new_empty(B, C, H)
    _launch(
        ssd_dx_kernel, (B * H, C), x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, ids_BT, dy_BTHP,
        dstates_BCHPN, dx_BTHP, ddt_BTH, dd_BCH, *strides, **sizes, P2=_tile(P),
        N2=min(tiles[0], _tile(N)), num_warps=4 if P <= 64 else 8, num_stages=1)
    P2, N2 = min(tiles[2], _tile(P)), min(tiles[3], _tile(N))
    db_BTKN, dc_BTKN = (x_BTHP.new_empty(B, T, K, N) for _ in "bc")
    dda = dt_BTH.new_empty(triton.cdiv(N, N2), triton.cdiv(P, P2), B, T, H)
    _launch(
        ssd_dbc_kernel, (B * K, C, len(dda)), x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, ids_BT, dy_BTHP,
        states_BCHPN, dstates_BCHPN, db_BTKN, dc_BTKN, dda, *strides, **sizes, P2=P2, N2=N2,
        num_warps=8, num_stages=1)
    dda_BTH = dda.sum((0, 1))
    ddt_BTH += dda_BTH * a_H
    return (dx_BTHP, ddt_BTH, (dda_BTH * dt_BTH).sum((0, 1)), db_BTKN, dc_BTKN, dd_BCH.sum((0, 1)),
            dstate_BHPN)


def _save_scan(ctx, inputs, output) -> None:
    *tensors, _, ids_BT = inputs
    ctx.save_for_backward(*tensors, ids_BT, output[2])
    ctx.set_materialize_grads(False)


def _scan_backward(ctx, dy_BTHP, dlast_BHPN, _):
    saved = ctx.saved_tensors  # read once: what is recomputed is there for one reading
    dy_BTHP = torch.zeros_like(saved[0]) if dy_BTHP is None else dy_BTHP
    *found, dstate_BHPN = ssd_scan_gradients(*saved, dy_BTHP, dlast_BHPN)
    return (*found, dstate_BHPN if ctx.needs_input_grad[6] else None, None)


torch.library.register_autograd(ssd_scan, _scan_backward, setup_context=_save_scan)


def ssd_triton(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, state_BHPN=None, ids_BT=None, chunk=64):
    """`kernels.ssd_reference` from Triton kernels. `chunk` is ignored: chunks have TILE tokens."""
    _require_size(x_BTHP.shape[3], x_BTHP.shape[1])
    dt_BTH = dt_BTH.float() if ids_BT is None else dt_BTH.float() * (ids_BT >= 0)[..., None]
    state_BHPN = None if state_BHPN is None else state_BHPN.float()
    ids_BT = None if ids_BT is None else ids_BT.contiguous()
    b_BTKN, c_BTKN = b_BTKN.to(x_BTHP.dtype), c_BTKN.to(x_BTHP.dtype)
    a_H, d_H = a_H.float().contiguous(), d_H.float().contiguous()
    return ssd_scan(
        x_BTHP, dt_BTH.contiguous(), a_H, b_BTKN, c_BTKN, d_H, state_BHPN, ids_BT)[:2]


@jit
def ssd_step_kernel(x, dt, a, b, c, d, first, last, y, stride_x, stride_b, stride_c,
                    H: tl.constexpr, J: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                    P2: tl.constexpr, N2: tl.constexpr):
    """h <- exp(dt a) h + dt x b^T and y = h c + d x, for one token and P2 channels of one head."""
    batch, head = _program(0) // H, _program(0) % H
    p, n = (_program(1) * P2).to(tl.int32) + tl.arange(0, P2), tl.arange(0, N2)
    step, at_bc = tl.load(dt + _program(0)), head // J * N
    x_P = tl.load(x + batch * stride_x + head * P + p, mask=p < P, other=0.0).to(tl.float32)
    b_N = tl.load(b + batch * stride_b + at_bc + n, mask=n < N, other=0.0).to(tl.float32)
    c_N = tl.load(c + batch * stride_c + at_bc + n, mask=n < N, other=0.0).to(tl.float32)
    state_PN = tl.exp(step * tl.load(a + head)) * _load(
        first + _program(0) * P * N, p * N, n, p < P, n < N)
    state_PN += (step * x_P)[:, None] * b_N[None, :]
    _store(last + _program(0) * P * N, p * N, n, state_PN, p < P, n < N)
    y_P = tl.sum(state_PN * c_N[None, :], 1) + tl.load(d + head) * x_P
    tl.store(y + _program(0) * P + p, y_P.to(y.dtype.element_ty), mask=p < P)


@operation
def ssd_one_step(x_BHP: Tensor, dt_BH: Tensor, a_H: Tensor, b_BKN: Tensor, c_BKN: Tensor,
                 d_H: Tensor, state_BHPN: Tensor) -> tuple[Tensor, Tensor]:
    """y and the state after one token."""
    (B, H, P), (K, N) = x_BHP.shape, b_BKN.shape[1:]
    (x, at_x), (b, at_b), (c, at_c) = (_rows(t[:, None]) for t in (x_BHP, b_BKN, c_BKN))
    y_BHP, last_BHPN = x_BHP.new_empty(B, H, P), x_BHP.new_empty(B, H, P, N, dtype=torch.float32)
    dt_BH, a_H, d_H, state_BHPN = (
        t.float().contiguous() for t in (dt_BH, a_H, d_H, state_BHPN))
    _launch(
        ssd_step_kernel, (B * H, triton.cdiv(P, 16)), x, dt_BH, a_H, b, c, d_H, state_BHPN,
        last_BHPN, y_BHP, at_x, at_b, at_c, H=H, J=H // K, P=P, N=N, P2=16, N2=_tile(N),
        num_warps=4)
    return y_BHP, last_BHPN


def ssd_step_triton(x_BHP, dt_BH, a_H, b_BKN, c_BKN, d_H, state_BHPN):
    """`kernels.ssd_step_reference` in one kernel; with gradients it is a scan of one token."""
    inputs = x_BHP, dt_BH, a_H, b_BKN, c_BKN, d_H, state_BHPN
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        return ssd_one_step(*inputs)
    y_BTHP, state_BHPN = ssd_triton(
        x_BHP[:, None], dt_BH[:, None], a_H, b_BKN[:, None], c_BKN[:, None], d_H, state_BHPN)
    return y_BTHP[:, 0], state_BHPN


# -------------------------------------------------------------------------------------- convolution


@jit
def _conv_input(x, tail, batch, z, i, e, stride_x, T, E, W: tl.constexpr):
    """Inputs z + i: the W - 1 of the tail (zeros without one), then token t as z = t + W - 1."""
    in_x = (z + i >= W - 1) & (z + i < T + W - 1)
    start = x + (batch * T + z - (W - 1)) * stride_x
    x_ZE = _load(start, i * stride_x, e, in_x, e < E).to(tl.float32)
    if tail is not None:
        x_ZE += _load(tail + (batch * (W - 1) + z) * E, i * E, e, z + i < W - 1, e < E)
    return x_ZE


@jit
def conv_kernel(x, weight, bias, tail, ids, y, left, stride_x, T, E, W: tl.constexpr,
                Y2: tl.constexpr, T2: tl.constexpr, E2: tl.constexpr):
    """y_t = bias + sum over j of weight_j x_{t - (W-1) + j}, for T2 tokens and E2 channels."""
    t, i, parts = _program(1) * T2, tl.arange(0, T2), tl.cdiv(E, E2)
    batch, e = _program(0) // parts, (_program(0) % parts * E2).to(tl.int32) + tl.arange(0, E2)
    own_T = _document(ids, batch, t + i, T)
    y_TE = tl.zeros([T2, E2], tl.float32) + tl.load(bias + e, mask=e < E, other=0.0)[None, :]
    # 1. Tap by tap the tile of inputs moves on by one token; the card's cache holds what overlaps.
    for j in tl.static_range(W):
        from_T = _document(ids, batch, t + i + j - (W - 1), T)
        seen_T1 = ((from_T == own_T) & (own_T >= 0))[:, None]
        x_TE = tl.where(seen_T1, _conv_input(x, tail, batch, t + j, i, e, stride_x, T, E, W), 0.0)
        y_TE += x_TE * tl.load(weight + e * W + j, mask=e < E, other=0.0)[None, :]
    _store(y + (batch * T + t) * E, i * E, e, y_TE, t + i < T, e < E)
    # 2. A sequence's last tile writes the W - 1 inputs to go on from, of the last token's document.
    if W > 1:  # noqa: SIM102 (this is known when the kernel is compiled, the next is not)
        if _program(1) == tl.num_programs(1) - 1:
            k = tl.arange(0, Y2)
            own_Y = _document(ids, batch, T + k - (W - 1), T)
            kept_Y1 = ((own_Y == _document(ids, batch, T, T)) & (own_Y >= 0))[:, None]
            x_YE = _conv_input(x, tail, batch, T, k, e, stride_x, T, E, W)
            x_YE = tl.where(kept_Y1, x_YE, 0.0)
            _store(left + batch * (W - 1) * E, k * E, e, x_YE, k < W - 1, e < E)


@jit
def conv_grad_kernel(x, weight, tail, ids, dy, dleft, dx, dw, stride_x, T, E, W: tl.constexpr,
                     T2: tl.constexpr, E2: tl.constexpr):
    """dx_z = sum over j of weight_j dy_{z - j}, for T2 of the T + W - 1 inputs (the tail first),
    and this tile's parts of dweight_j = sum over z of x_z dy_{z - j} and of dbias."""
    z, i, parts = _program(1) * T2, tl.arange(0, T2), tl.cdiv(E, E2)
    batch, e = _program(0) // parts, (_program(0) % parts * E2).to(tl.int32) + tl.arange(0, E2)
    own_Z = _document(ids, batch, z + i - (W - 1), T)
    x_ZE = _conv_input(x, tail, batch, z, i, e, stride_x, T, E, W)
    dx_ZE = tl.zeros([T2, E2], tl.float32)
    dw += (batch * tl.num_programs(1) + _program(1)) * (W + 1) * E
    # 1. Through the outputs: input z is tap j of output z - j, and each output has one tap 0.
    for j in tl.static_range(W):
        t = z - j
        dy_ZE = _load(dy + (batch * T + t) * E, i * E, e, (t + i >= 0) & (t + i < T), e < E)
        dy_ZE = dy_ZE.to(tl.float32)
        if j == 0:
            tl.store(dw + W * E + e, tl.sum(dy_ZE, 0), mask=e < E)
        seen_Z = (_document(ids, batch, t + i, T) == own_Z) & (own_Z >= 0)
        dy_ZE = tl.where(seen_Z[:, None], dy_ZE, 0.0)
        dx_ZE += dy_ZE * tl.load(weight + e * W + j, mask=e < E, other=0.0)[None, :]
        tl.store(dw + j * E + e, tl.sum(dy_ZE * x_ZE, 0), mask=e < E)
    # 2. Through the inputs that were left to go on from.
    if dleft is not None:
        kept_Z = (z + i >= T) & (own_Z == _document(ids, batch, T, T)) & (own_Z >= 0)
        kept_Z &= z + i < T + W - 1
        dx_ZE += _load(dleft + (batch * (W - 1) + z - T) * E, i * E, e, kept_Z, e < E)
    _store(dx + (batch * (T + W - 1) + z) * E, i * E, e, dx_ZE, z + i < T + W - 1, e < E)


@operation
def convolution(x_BTE: Tensor, weight_EW: Tensor, bias_E: Tensor, tail_BYE: Tensor | None,
                ids_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """The convolution and the inputs it leaves behind. Of one token too: the step of decoding."""
    (B, T, E), W = x_BTE.shape, weight_EW.shape[1]
    x_BTE, at_x = _rows(x_BTE)
    y_BTE, left_BYE = x_BTE.new_empty(B, T, E), x_BTE.new_empty(B, W - 1, E)
    T2 = min(CONV_TILE[0], triton.next_power_of_2(T))
    _launch(
        conv_kernel, (B * triton.cdiv(E, CONV_TILE[1]), triton.cdiv(T, T2)), x_BTE, weight_EW,
        bias_E, tail_BYE, ids_BT, y_BTE, left_BYE, at_x, T, E, W=W, Y2=triton.next_power_of_2(W),
        T2=T2, E2=CONV_TILE[1], num_warps=8)
    return y_BTE, left_BYE


@operation
def convolution_gradients(x_BTE: Tensor, weight_EW: Tensor, tail_BYE: Tensor | None,
                          ids_BT: Tensor | None, dy_BTE: Tensor, dleft_BYE: Tensor | None
                          ) -> tuple[Tensor, Tensor]:
    """Of the tail and x, one behind the other; of the weights and the bias, [W + 1, E] in fp32."""
    (B, T, E), W = x_BTE.shape, weight_EW.shape[1]
    (x_BTE, at_x), dy_BTE = _rows(x_BTE), dy_BTE.contiguous()
    dleft_BYE = None if dleft_BYE is None else dleft_BYE.contiguous()
    dx_BZE = x_BTE.new_empty(B, T + W - 1, E)
    n_tiles = triton.cdiv(T + W - 1, CONV_TILE[0])
    dw = x_BTE.new_empty(B * n_tiles, W + 1, E, dtype=torch.float32)
    _launch(
        conv_grad_kernel, (B * triton.cdiv(E, CONV_TILE[1]), n_tiles), x_BTE, weight_EW, tail_BYE,
        ids_BT, dy_BTE, dleft_BYE, dx_BZE, dw, at_x, T, E, W=W, T2=CONV_TILE[0], E2=CONV_TILE[1],
        num_warps=8)
    return dx_BZE, dw.sum(0)


def _save_convolution(ctx, inputs, output) -> None:
    x_BTE, weight_EW, _, tail_BYE, ids_BT = inputs
    ctx.save_for_backward(x_BTE, weight_EW, tail_BYE, ids_BT)
    ctx.set_materialize_grads(False)


def _convolution_backward(ctx, dy_BTE, dleft_BYE):
    x_BTE, weight_EW, tail_BYE, ids_BT = ctx.saved_tensors  # read once, as above
    dy_BTE, W = torch.zeros_like(x_BTE) if dy_BTE is None else dy_BTE, weight_EW.shape[1]
    dx_BZE, dw = convolution_gradients(x_BTE, weight_EW, tail_BYE, ids_BT, dy_BTE, dleft_BYE)
    dw = dw.to(weight_EW.dtype)
    return (dx_BZE[:, W - 1 :], dw[:W].t(), dw[W],
            None if tail_BYE is None else dx_BZE[:, : W - 1], None)


torch.library.register_autograd(convolution, _convolution_backward, setup_context=_save_convolution)


def causal_conv_triton(x_BTE, weight_EW, bias_E, tail_BYE=None, ids_BT=None):
    """`kernels.causal_conv_reference` from Triton kernels."""
    _require_size(1, x_BTE.shape[1])
    tail_BYE = None if tail_BYE is None else tail_BYE.to(x_BTE.dtype).contiguous()
    if x_BTE.shape[1] == 0:
        zeros_BYE = x_BTE.new_zeros(len(x_BTE), weight_EW.shape[1] - 1, x_BTE.shape[2])
        return x_BTE, zeros_BYE if tail_BYE is None else tail_BYE
    ids_BT = None if ids_BT is None else ids_BT.contiguous()
    weight_EW, bias_E = weight_EW.contiguous(), bias_E.contiguous()
    return convolution(x_BTE, weight_EW, bias_E, tail_BYE, ids_BT)


# ---------------------------------------------------------------- gated norm, passes over logits


@jit
def _gated(y, z, row, i, group, stride_y, stride_z, eps, GROUP: tl.constexpr):
    """y, z and sigmoid(z) of one group of a token's channels, g = y silu(z), and 1 / rms(g)."""
    y_I = tl.load(y + row * stride_y + group * GROUP + i, mask=i < GROUP, other=0.0).to(tl.float32)
    z_I = tl.load(z + row * stride_z + group * GROUP + i, mask=i < GROUP, other=0.0).to(tl.float32)
    gate_I = tl.sigmoid(z_I)
    g_I = y_I * z_I * gate_I
    return y_I, z_I, gate_I, g_I, tl.rsqrt(tl.sum(g_I * g_I, 0) / GROUP + eps)


@jit
def norm_kernel(y, z, weight, out, stride_y, stride_z, I, eps, GROUP: tl.constexpr,
                I2: tl.constexpr):
    """weight g / rms(g) for one group of one token, GROUP channels."""
    row, group, i = _program(0), _program(1), tl.arange(0, I2)
    _, _, _, g_I, scale = _gated(y, z, row, i, group, stride_y, stride_z, eps, GROUP)
    w_I = tl.load(weight + group * GROUP + i, mask=i < GROUP, other=0.0)
    tl.store(out + row * I + group * GROUP + i, (w_I * g_I * scale).to(out.dtype.element_ty),
             mask=i < GROUP)


@jit
def norm_grad_kernel(y, z, weight, dout, dy, dz, dw, stride_y, stride_z, n_rows, I, eps,
                     GROUP: tl.constexpr, I2: tl.constexpr, T2: tl.constexpr):
    """With n = g / rms(g) and dn = weight dout: dg = (dn - n mean(n dn)) / rms(g), and from it dy
    and dz, for one group of T2 tokens, one after the other; and their part of dweight."""
    first, group, i = _program(0) * T2, _program(1), tl.arange(0, I2)
    w_I = tl.load(weight + group * GROUP + i, mask=i < GROUP, other=0.0).to(tl.float32)
    dw_I = tl.zeros([I2], tl.float32)
    for t in range(tl.minimum(T2, n_rows - first)):
        row = first + t
        y_I, z_I, gate_I, g_I, scale = _gated(y, z, row, i, group, stride_y, stride_z, eps, GROUP)
        at = row * I + group * GROUP
        dout_I = tl.load(dout + at + i, mask=i < GROUP, other=0.0).to(tl.float32)
        n_I = g_I * scale
        dn_I = dout_I * w_I
        dg_I = scale * (dn_I - n_I * (tl.sum(dn_I * n_I, 0) / GROUP))
        tl.store(dy + at + i, (dg_I * z_I * gate_I).to(dy.dtype.element_ty), mask=i < GROUP)
        dz_I = dg_I * y_I * gate_I * (1 + z_I * (1 - gate_I))
        tl.store(dz + at + i, dz_I.to(dz.dtype.element_ty), mask=i < GROUP)
        dw_I += dout_I * n_I
    tl.store(dw + _program(0) * I + group * GROUP + i, dw_I, mask=i < GROUP)


@operation
def norm(y_BTI: Tensor, z_BTI: Tensor, weight_I: Tensor, n_groups: int, eps: float) -> Tensor:
    """The gate and the grouped norm: a program for each token and group."""
    B, T, I = y_BTI.shape
    (y_BTI, at_y), (z_BTI, at_z), size = _rows(y_BTI), _rows(z_BTI), I // n_groups
    out_BTI = y_BTI.new_empty(B, T, I)
    _launch(
        norm_kernel, (B * T, n_groups), y_BTI, z_BTI, weight_I, out_BTI, at_y, at_z, I, eps,
        GROUP=size, I2=triton.next_power_of_2(size), num_warps=4 if size <= 2048 else 8)
    return out_BTI


@operation
def norm_gradients(y_BTI: Tensor, z_BTI: Tensor, weight_I: Tensor, n_groups: int, eps: float,
                   dout_BTI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of y, z and the weights, with the statistics computed again."""
    B, T, I = y_BTI.shape
    (y_BTI, at_y), (z_BTI, at_z), size = _rows(y_BTI), _rows(z_BTI), I // n_groups
    dy_BTI, dz_BTI = y_BTI.new_empty(B, T, I), z_BTI.new_empty(B, T, I)
    n_tiles = triton.cdiv(B * T, NORM_ROWS)
    dw = y_BTI.new_empty(n_tiles, I, dtype=torch.float32)
    _launch(
        norm_grad_kernel, (n_tiles, n_groups), y_BTI, z_BTI, weight_I, dout_BTI.contiguous(),
        dy_BTI, dz_BTI, dw, at_y, at_z, B * T, I, eps, T2=NORM_ROWS, GROUP=size,
        I2=triton.next_power_of_2(size), num_warps=4 if size <= 2048 else 8)
    return dy_BTI, dz_BTI, dw.sum(0).to(weight_I.dtype)


def _save_norm(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:]


def _norm_backward(ctx, dout_BTI):
    return (*norm_gradients(*ctx.saved_tensors, *ctx.rest, dout_BTI), None, None)


torch.library.register_autograd(norm, _norm_backward, setup_context=_save_norm)


def gated_norm_triton(y_BTI, z_BTI, weight_I, n_groups, eps):
    """`kernels.gated_norm_reference` from Triton kernels."""
    return norm(y_BTI, z_BTI, weight_I.contiguous(), n_groups, eps)


@jit
def _row_logits(logits, row, v_V, width, scale):
    """A row of a part's logits / temperature in fp32, -inf beyond its width."""
    l_V = tl.load(logits + row * width + v_V, mask=v_V < width, other=float("-inf"))
    return l_V.to(tl.float32) * scale


@jit
def add_part_kernel(logits, at, lse, chosen, width, scale, V2: tl.constexpr):
    """`kernels._add_part` for one row of a part: its logits join the running log-sum-exp."""
    row, v_V = _program(0), tl.arange(0, V2)
    l_V = _row_logits(logits, row, v_V, width, scale)
    before, token = tl.load(lse + row), tl.load(at + row)
    top = tl.maximum(tl.maximum(before, tl.max(l_V, 0)), -3e38)  # finite, were all banned
    tl.store(lse + row, top + tl.log(tl.exp(before - top) + tl.sum(tl.exp(l_V - top), 0)))
    tl.store(chosen + row, tl.sum(tl.where(v_V == token, l_V, 0.0), 0),
             mask=(token >= 0) & (token < width))


@jit
def part_gradient_kernel(logits, at, lse, grad, width, scale, V2: tl.constexpr):
    """`kernels._part_gradient` for one row of a part, in place."""
    row, v_V = _program(0), tl.arange(0, V2)
    l_V = _row_logits(logits, row, v_V, width, scale)
    is_token_V = (v_V == tl.load(at + row)) & (l_V > float("-inf"))
    d_V = tl.where(is_token_V, 1.0, 0.0) - tl.exp(l_V - tl.load(lse + row))
    d_V = d_V * tl.load(grad + row) * scale
    tl.store(logits + row * width + v_V, d_V.to(logits.dtype.element_ty), mask=v_V < width)


def add_part_triton(logits, at_T, temperature, lse_T, chosen_T):
    """`kernels._add_part` as one kernel."""
    n_rows, width = logits.shape
    _launch(add_part_kernel, (n_rows,), logits, at_T, lse_T, chosen_T, width, 1 / temperature,
            V2=VOCABULARY_TILE, num_warps=8)


def part_gradient_triton(logits, at_T, temperature, lse_T, grad_T):
    """`kernels._part_gradient` as one kernel."""
    (n_rows, width), grad_T = logits.shape, grad_T.contiguous()
    _launch(part_gradient_kernel, (n_rows,), logits, at_T, lse_T, grad_T, width, 1 / temperature,
            V2=VOCABULARY_TILE, num_warps=8)
    return logits
