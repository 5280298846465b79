"""Each hot operation against its slow reference, against itself on parts of the input, or against a formula.

Most tests compare two routes that share a signature: `run` gives the values of a route, and the gradient of one random
linear function of all its outputs with respect to every input. Documents alone, padded input and split sequences are
routes too, so that "nothing leaks" is checked for values and gradients alike.
"""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import kernels

EXACT = {"rtol": 1e-9, "atol": 1e-9}
Q = 4  # chunk length of most tests
DOCUMENTS = [  # of 12 tokens, that is of three chunks
    [0] * 12,
    [0] * 4 + [1] * 8,  # ends where a chunk ends
    [0] * 3 + [1] * 2 + [2] * 7,  # ends inside chunks
    [0] * 5 + [1] * 3 + [2] * 4,
    [*range(9), 9, 9, 9],  # one token each, then as many as a convolution's tail holds
]


def run(route, inputs, **options):
    """Outputs of a route, and the gradient of a fixed random linear function of them for every input."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    outputs = route(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device) for t in outputs]
    loss = sum((t.double() * n).sum() for t, n in zip(outputs, noise, strict=True))
    gradients = torch.autograd.grad(loss, leaves.values(), materialize_grads=True)
    named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"y": outputs[0].detach(), "left": outputs[1].detach(), **named}


def spans(ids_BT):
    """Start and end of each document of the first row."""
    ids = ids_BT[0].tolist()
    starts = [t for t in range(len(ids)) if t == 0 or ids[t] != ids[t - 1]]
    return list(zip(starts, [*starts[1:], len(ids)], strict=True))


# ------------------------------------------------------------------------------------------------------------ SSD


def ssd_inputs(T, n_groups=2, with_state=True, dtype=torch.float64):
    """Random inputs of the scan: B = 2, H = 4, P = 3, N = 5."""
    generator = torch.Generator().manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    inputs = {
        "x_BTHP": randn(2, T, 4, 3),
        "dt_BTH": F.softplus(randn(2, T, 4)),
        "a_H": -torch.exp(randn(4)),
        "b_BTKN": randn(2, T, n_groups, 5),
        "c_BTKN": randn(2, T, n_groups, 5),
        "d_H": randn(4),
    }
    if with_state:
        inputs["state_BHPN"] = randn(2, 4, 3, 5)
    return {name: t.to(dtype) for name, t in inputs.items()}


def ssd_parts(borders, x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, state_BHPN, carry, **options):
    """The scan over [start, end) of each border; `carry` hands the state on, else every part begins without one."""
    y_list = []
    for start, end in borders:
        x, dt, b, c = (t[:, start:end] for t in (x_BTHP, dt_BTH, b_BTKN, c_BTKN))
        y, left_BHPN = kernels.ssd(x, dt, a_H, b, c, d_H, state_BHPN, **options)
        y_list.append(y)
        state_BHPN = left_BHPN if carry else None
    return torch.cat(y_list, dim=1), left_BHPN


def ssd_steps(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, state_BHPN=None, chunk=None):
    B, T, H, P = x_BTHP.shape
    if state_BHPN is None:
        dtype = torch.promote_types(x_BTHP.dtype, torch.float32)
        state_BHPN = x_BTHP.new_zeros(B, H, P, b_BTKN.shape[-1], dtype=dtype)
    y_list = []
    for t in range(T):
        x_BHP, dt_BH, b_BKN, c_BKN = x_BTHP[:, t], dt_BTH[:, t], b_BTKN[:, t], c_BTKN[:, t]
        y_BHP, state_BHPN = kernels.ssd_step(x_BHP, dt_BH, a_H, b_BKN, c_BKN, d_H, state_BHPN)
        y_list.append(y_BHP)
    return torch.stack(y_list, dim=1), state_BHPN


def ssd_split(at, state_BHPN=None, **inputs):
    T = inputs["x_BTHP"].shape[1]
    return ssd_parts([(0, at), (at, T)], state_BHPN=state_BHPN, carry=True, chunk=Q, **inputs)


def ssd_each_document_alone(ids_BT, state_BHPN=None, **inputs):
    return ssd_parts(spans(ids_BT), state_BHPN=state_BHPN, carry=False, chunk=Q, **inputs)


def ssd_padded(n, **inputs):
    """Puts n padding tokens full of nines on the left, and drops their outputs."""
    padded = {k: F.pad(t, [*[0, 0] * (t.dim() - 2), n, 0], value=9.0) for k, t in inputs.items() if "BT" in k}
    ids_BT = torch.zeros(padded["x_BTHP"].shape[:2], dtype=torch.long)
    ids_BT[:, :n] = -1
    y_BTHP, state_BHPN = kernels.ssd(**inputs | padded, ids_BT=ids_BT, chunk=Q)
    return y_BTHP[:, n:], state_BHPN


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("T", [1, Q - 1, Q, Q + 1, 3 * Q, 3 * Q + 2])
@pytest.mark.parametrize("route", [kernels.ssd_chunked, ssd_steps])
def test_chunked_scan_and_single_steps_equal_the_recurrence(route, T, n_groups, with_state):
    inputs = ssd_inputs(T, n_groups, with_state)
    assert_close(run(route, inputs, chunk=Q), run(kernels.ssd_reference, inputs), **EXACT)


@pytest.mark.parametrize("chunk", [1, 3, 5, 7, 12, 100])
def test_any_chunk_length_gives_the_same_result(chunk):
    inputs = ssd_inputs(T=23)
    assert_close(run(kernels.ssd_chunked, inputs, chunk=chunk), run(kernels.ssd_reference, inputs), **EXACT)


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_packed_scan_equals_the_recurrence_and_each_document_alone(documents):
    inputs, ids_BT = ssd_inputs(T=12), torch.tensor([documents] * 2)
    packed = run(kernels.ssd_chunked, inputs, ids_BT=ids_BT, chunk=Q)
    assert_close(packed, run(kernels.ssd_reference, inputs, ids_BT=ids_BT), **EXACT)
    assert_close(packed, run(ssd_each_document_alone, inputs, ids_BT=ids_BT), **EXACT)


@pytest.mark.parametrize(("first", "second"), list(itertools.pairwise(DOCUMENTS)))
def test_packed_scan_equals_the_recurrence_for_rows_packed_differently(first, second):
    """Eleven tokens, so that the last chunk is filled up; the second row begins with padding."""
    inputs, ids_BT = ssd_inputs(T=11), torch.tensor([first[:11], [-1, -1, *second[:9]]])
    chunked = run(kernels.ssd_chunked, inputs, ids_BT=ids_BT, chunk=Q)
    assert_close(chunked, run(kernels.ssd_reference, inputs, ids_BT=ids_BT), **EXACT)


@pytest.mark.parametrize("n", [1, Q, Q + 3])
def test_left_padding_changes_nothing_in_the_scan(n):
    inputs = ssd_inputs(T=7, with_state=False)
    assert_close(run(ssd_padded, inputs, n=n), run(kernels.ssd_reference, inputs), **EXACT)


@pytest.mark.parametrize("at", [1, Q - 1, Q, Q + 1, 10])
def test_scan_split_in_two_calls_equals_one_call(at):
    inputs = ssd_inputs(T=11)
    assert_close(run(ssd_split, inputs, at=at), run(kernels.ssd_chunked, inputs, chunk=Q), **EXACT)


@pytest.mark.parametrize("rate", [1.0, 1e3, 1e6])
def test_strong_decay_over_a_long_chunk_stays_finite_in_fp32(rate):
    """Above the diagonal l_q - l_s is positive, up to 256 * rate here: its exp must not reach values or gradients."""
    inputs = ssd_inputs(T=256, dtype=torch.float32)
    inputs["a_H"] = inputs["a_H"] * rate
    assert all(t.isfinite().all() for t in run(kernels.ssd_chunked, inputs, chunk=256).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("route", [kernels.ssd_chunked, kernels.ssd_reference, ssd_steps])
def test_state_of_the_scan_is_kept_in_fp32(route, dtype):
    y_BTHP, state_BHPN = route(**ssd_inputs(T=6, with_state=False, dtype=dtype))
    assert (y_BTHP.dtype, state_BHPN.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("route", [kernels.ssd_chunked, kernels.ssd_reference, ssd_steps])
def test_a_state_decays_in_fp32_in_a_bf16_scan(route):
    """Inputs of 0 leave nothing but the decay: h_T = exp(a times the sum of dt) h_0."""
    inputs, state_BHPN = ssd_inputs(T=6, with_state=False, dtype=torch.bfloat16), torch.randn(2, 4, 3, 5)
    inputs["x_BTHP"].zero_()
    _, last_BHPN = route(**inputs, state_BHPN=state_BHPN)
    decay_BH = torch.exp(inputs["dt_BTH"].float().sum(1) * inputs["a_H"].float())
    assert_close(last_BHPN, decay_BH[..., None, None] * state_BHPN)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_scan_in_low_precision_stays_close_to_fp64(dtype, tolerance):
    inputs = ssd_inputs(T=23, dtype=dtype)
    y_BTHP, _ = kernels.ssd_chunked(**inputs, chunk=Q)
    expected_BTHP, _ = kernels.ssd_reference(**{name: t.double() for name, t in inputs.items()})
    assert (y_BTHP - expected_BTHP).norm() < tolerance * expected_BTHP.norm()


# --------------------------------------------------------------------------------------------- causal convolution


def conv_inputs(T, W=4, with_tail=True):
    """Random inputs of the convolution: B = 2, E = 3."""
    generator = torch.Generator().manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    inputs = {"x_BTE": randn(2, T, 3), "weight_EW": randn(3, W), "bias_E": randn(3)}
    return inputs | ({"tail_BYE": randn(2, W - 1, 3)} if with_tail else {})


def conv_parts(borders, x_BTE, weight_EW, bias_E, tail_BYE, carry):
    y_list = []
    for start, end in borders:
        y_BTE, left_BYE = kernels.causal_conv(x_BTE[:, start:end], weight_EW, bias_E, tail_BYE)
        y_list.append(y_BTE)
        tail_BYE = left_BYE if carry else None
    return torch.cat(y_list, dim=1), left_BYE


def conv_each_document_alone(ids_BT, tail_BYE=None, **inputs):
    return conv_parts(spans(ids_BT), tail_BYE=tail_BYE, carry=False, **inputs)


def conv_split(at, tail_BYE=None, **inputs):
    return conv_parts([(0, at), (at, inputs["x_BTE"].shape[1])], tail_BYE=tail_BYE, carry=True, **inputs)


def conv_torch(x_BTE, weight_EW, bias_E, tail_BYE):
    E, W = weight_EW.shape
    x_all = torch.cat([tail_BYE, x_BTE], dim=1)
    y_BET = F.conv1d(x_all.transpose(1, 2), weight_EW[:, None], bias_E, groups=E)
    return y_BET.transpose(1, 2), x_all[:, x_all.shape[1] - (W - 1) :]


@pytest.mark.parametrize("with_tail", [True, False])
@pytest.mark.parametrize(("T", "W"), [(1, 4), (2, 4), (3, 4), (4, 4), (9, 4), (9, 2), (5, 1)])
def test_convolution_equals_its_sum(T, W, with_tail):
    """T < W - 1 included: there the new tail still holds a piece of the old one."""
    inputs = conv_inputs(T, W, with_tail)
    assert_close(run(kernels.causal_conv, inputs), run(kernels.causal_conv_reference, inputs), **EXACT)


@pytest.mark.parametrize(("T", "W"), [(1, 4), (2, 4), (9, 4), (9, 2)])
def test_convolution_equals_torch_conv1d(T, W):
    inputs = conv_inputs(T, W)
    assert_close(run(kernels.causal_conv, inputs), run(conv_torch, inputs), **EXACT)


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_packed_convolution_equals_its_sum_and_each_document_alone(documents):
    inputs, ids_BT = conv_inputs(T=12), torch.tensor([documents] * 2)
    packed = run(kernels.causal_conv, inputs, ids_BT=ids_BT)
    assert_close(packed, run(kernels.causal_conv_reference, inputs, ids_BT=ids_BT), **EXACT)
    assert_close(packed, run(conv_each_document_alone, inputs, ids_BT=ids_BT), **EXACT)


@pytest.mark.parametrize(("first", "second"), list(itertools.pairwise(DOCUMENTS)))
def test_packed_convolution_equals_its_sum_for_rows_packed_differently(first, second):
    """The first row ends with padding, the second begins with it."""
    inputs, ids_BT = conv_inputs(T=12), torch.tensor([[*first[:10], -1, -1], [-1, -1, *second[:10]]])
    packed = run(kernels.causal_conv, inputs, ids_BT=ids_BT)
    assert_close(packed, run(kernels.causal_conv_reference, inputs, ids_BT=ids_BT), **EXACT)


@pytest.mark.parametrize("conv", [kernels.causal_conv, kernels.causal_conv_reference])
@pytest.mark.parametrize("n", [1, 2])
def test_tail_holds_nothing_of_the_document_before_a_short_last_one(conv, n):
    """A tail belongs to the document it goes on with: what is older than that document's n tokens must be zero."""
    ids_BT = torch.tensor([[0] * 5 + [1] * n] * 2)
    inputs = conv_inputs(T=5 + n, with_tail=False)
    _, tail_BYE = conv(**inputs, ids_BT=ids_BT)
    _, alone_BYE = conv_each_document_alone(ids_BT, **inputs)
    assert_close(tail_BYE, alone_BYE, **EXACT)


@pytest.mark.parametrize("conv", [kernels.causal_conv, kernels.causal_conv_reference])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_left_padding_changes_nothing_in_the_convolution(conv, n):
    inputs = conv_inputs(T=2, with_tail=False)
    padded = inputs | {"x_BTE": torch.cat([torch.full((2, n, 3), 9.0), inputs["x_BTE"]], dim=1)}
    y_BTE, tail_BYE = conv(**padded, ids_BT=torch.tensor([[-1] * n + [0] * 2] * 2))
    assert_close((y_BTE[:, n:], tail_BYE), conv(**inputs), **EXACT)


@pytest.mark.parametrize("at", [1, 2, 3, 7])
def test_convolution_split_in_two_calls_equals_one_call(at):
    inputs = conv_inputs(T=8)
    assert_close(run(conv_split, inputs, at=at), run(kernels.causal_conv, inputs), **EXACT)


# -------------------------------------------------------------------------------------------- gated norm, log-probs


@pytest.mark.parametrize("n_groups", [1, 2, 3])
def test_gated_norm_gates_first_and_then_divides_by_each_groups_rms(n_groups):
    y_BTI, z_BTI = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    weight_I = torch.randn(6, dtype=torch.float64)
    gated_BTI = y_BTI * z_BTI / (1 + torch.exp(-z_BTI))
    parts = [g / (g.square().mean(-1, keepdim=True) + 0.1).sqrt() for g in gated_BTI.chunk(n_groups, dim=-1)]
    assert_close(kernels.gated_norm(y_BTI, z_BTI, weight_I, n_groups, eps=0.1), weight_I * torch.cat(parts, -1), **EXACT)


def gated_norm_by_autograd(y_BTI, z_BTI, weight_I, n_groups):
    g = (y_BTI * F.silu(z_BTI)).unflatten(-1, (n_groups, -1))
    return weight_I * (g / (g.square().mean(-1, keepdim=True) + 0.1).sqrt()).flatten(-2)


@pytest.mark.parametrize("n_groups", [1, 2, 3])
def test_gated_norm_has_the_gradients_of_its_formula(n_groups):
    """The gate is a slice of a wider tensor, as in the mixer."""
    y_BTI, wide_BTI, weight_I, grad_BTI = (torch.randn(*shape, dtype=torch.float64, requires_grad=True)
                                           for shape in ((2, 5, 6), (2, 5, 8), (6,), (2, 5, 6)))  # fmt: skip
    found, expected = (
        torch.autograd.grad(norm(y_BTI, wide_BTI[..., 1:7], weight_I, n_groups), (y_BTI, wide_BTI, weight_I), grad_BTI)
        for norm in (functools.partial(kernels.gated_norm, eps=0.1), gated_norm_by_autograd)
    )
    assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("banned", [(), (2,), (0, 6)])
def test_token_logp_is_the_log_softmax_over_the_ids_that_are_kept(banned, temperature):
    logits_BTV = torch.randn(2, 3, 7, dtype=torch.float64)
    kept = [v for v in range(7) if v not in banned]
    expected = (logits_BTV[..., kept] / temperature).log_softmax(-1)
    for i, token in enumerate(kept):
        logp_BT = kernels.token_logp(logits_BTV, torch.full((2, 3), token), banned, temperature)
        assert_close(logp_BT, expected[..., i], **EXACT)


def test_a_banned_token_has_log_probability_minus_infinity():
    logp_B = kernels.token_logp(torch.randn(2, 5), torch.tensor([3, 1]), banned=(3,))
    assert logp_B[0] == -torch.inf
    assert logp_B[1].isfinite()


def test_banned_ids_receive_no_gradient():
    logits_BV = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    kernels.token_logp(logits_BV, torch.tensor([0, 1, 4]), banned=(2, 3)).sum().backward()
    assert logits_BV.grad.isfinite().all()
    assert (logits_BV.grad[:, 2:4] == 0).all()


@pytest.mark.parametrize("packed", [False, True])
def test_what_autograd_runs_of_the_convolution_keeps_what_compilers_rely_on(packed):
    """PyTorch's own check: schema, shapes and strides without data, gradients, and sizes that vary."""
    ids_BZ = torch.tensor([[-1] * 5 + [0] * 4, [0] * 5 + [1] * 4]) if packed else None
    inputs = torch.randn(2, 9, 6), torch.randn(6, 4), torch.randn(6)
    low = inputs[0].bfloat16().requires_grad_()  # as autocast has it
    for x_BZE in (inputs[0].requires_grad_(), low):
        torch.library.opcheck(kernels.shifted_sum, (x_BZE, *(t.requires_grad_() for t in inputs[1:]), ids_BZ))
        x_BZE, weight_EW = x_BZE.detach(), inputs[1].detach()
        torch.library.opcheck(kernels.shifted_sum_gradients, (x_BZE, weight_EW, ids_BZ, torch.randn(2, 6, 6)))


@pytest.mark.parametrize("packed", [False, True])
def test_a_mamba_block_is_one_graph_without_a_card_too(packed, make_model):
    """`fullgraph` raises at the first break; Triton's forms have their test in interpreted.py."""
    block = make_model(pattern="M").layers[0]
    x_BTD, ids_BT = torch.randn(2, 9, 8).to(block.norm.weight), torch.tensor([[-1] * 2 + [0] * 7, [0] * 4 + [1] * 5])

    def step(forward):
        x = x_BTD.clone().requires_grad_()
        y_BTD, left = forward(x, None, ids_BT if packed else None)
        loss = y_BTD.square().sum() + sum(t.sum() for t in left)
        return y_BTD, *torch.autograd.grad(loss, [x, *block.parameters()])

    compiled = torch.compile(block.run, fullgraph=True, backend="aot_eager")
    assert_close(step(compiled), step(block.run), **EXACT)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("B", "T"), [(2, 0), (0, 5), (0, 0)])
def test_no_sequences_or_no_tokens_give_empty_results_and_the_state_as_it_was(B, T, packed):
    """In every form, as in Triton's; with a state, and without one, which is then 0."""
    ids_BT = torch.zeros(B, T, dtype=torch.long) if packed else None
    scan = torch.randn(B, T, 4, 3), torch.rand(B, T, 4), -torch.rand(4), *torch.randn(2, B, T, 2, 5), torch.randn(4)
    state_BHPN, conv = torch.randn(B, 4, 3, 5), (torch.randn(B, T, 6), torch.randn(6, 4), torch.randn(6))
    tail_BYE = torch.randn(B, 3, 6)
    for form in (kernels.ssd_reference, kernels.ssd_chunked):
        for first in (state_BHPN, None):
            y_BTHP, last_BHPN = form(*scan, first, ids_BT)
            assert y_BTHP.shape == (B, T, 4, 3)
            assert torch.equal(last_BHPN, torch.zeros_like(state_BHPN) if first is None else state_BHPN)
    if B == 0 < T:
        step = [t[:, 0] if i in (0, 1, 3, 4) else t for i, t in enumerate(scan)]
        for form in (kernels.ssd_step_reference, kernels.ssd_step_torch):
            assert [t.shape for t in form(*step, state_BHPN)] == [(0, 4, 3), (0, 4, 3, 5)]
    for form in (kernels.causal_conv_reference, kernels.causal_conv_torch):
        for tail in (tail_BYE, None):
            y_BTE, left_BYE = form(*conv, tail, ids_BT)
            assert y_BTE.shape == (B, T, 6)
            assert torch.equal(left_BYE, torch.zeros_like(tail_BYE) if tail is None else tail_BYE)


def test_a_model_reads_no_tokens_and_goes_on(make_model):
    model, tokens_BT = make_model(), torch.tensor([[1, 2, 3]])
    hidden_BTD, cache = model(tokens_BT[:, :0])
    assert hidden_BTD.shape == (1, 0, model.config.d_model)
    torch.testing.assert_close(model(tokens_BT, cache)[0], model(tokens_BT)[0])
