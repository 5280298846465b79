"""The Triton kernels in Triton's interpreter, on the CPU, against the references. test_triton.py runs this file.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests need a process of their own:

    TRITON_INTERPRET=1 pytest tests/interpreted.py

The references run in fp64 on the same inputs, rounded to the dtype under test. bf16 is left to a GPU: the interpreter
gets its matrix products wrong.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import bytes_kept
from test_kernels import conv_inputs, conv_torch, run
from torch.utils.checkpoint import checkpoint

import kernels
import kernels_gpu
from model import attention_mask
from system.config import ModelConfig
from views import estimate

Q = kernels_gpu.TILE
TOLERANCE = {torch.float32: 5e-5, torch.float16: 1e-2}  # of the norm
DOCUMENTS = {  # of 2 Q + 3 tokens, in two rows
    "one": [[0] * (2 * Q + 3)] * 2,
    "ends of chunks": [[0] * Q + [1] * Q + [2] * 3, [0] * (2 * Q) + [1] * 3],
    "inside chunks": [[0] * 5 + [1] * (Q - 6) + [2] * (Q + 4), [0] * 1 + [1] * 2 + [2] * (2 * Q)],
    "one token each": [list(range(2 * Q + 3)), [0] * (2 * Q) + [1, 2, 3]],
    "padding": [[-1] * 7 + [0] * Q + [1] * (Q - 4), [0] * (Q - 1) + [1] * 9 + [-1] * (Q - 5)],
    "padded chunk": [[-1] * (Q + 1) + [0] * (Q + 2), [0] * 3 + [-1] * (2 * Q)],
}


def assert_near(route, reference, inputs, dtype=torch.float32, scale=1.0, **options):
    """Values and every gradient of the route, in dtype, are those of the reference in fp64, up to a share of the norm."""
    inputs = {name: t.to(dtype) for name, t in inputs.items()}
    expected = run(reference, {name: t.double() for name, t in inputs.items()}, **options)
    for name, t in run(route, inputs, **options).items():
        error = (t.double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)
        assert error < scale * TOLERANCE[dtype], f"{name} is off by {error:.1e}"


def ssd_inputs(T, H=4, P=3, K=2, N=5, rate=0.1, with_state=True):
    """Random inputs of the scan, with decays slow enough that a state outlives a chunk."""
    generator = torch.Generator().manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    inputs = {
        "x_BTHP": randn(2, T, H, P),
        "dt_BTH": F.softplus(randn(2, T, H)),
        "a_H": -rate * torch.exp(randn(H)),
        "b_BTKN": randn(2, T, K, N),
        "c_BTKN": randn(2, T, K, N),
        "d_H": randn(H),
    }
    return inputs | ({"state_BHPN": randn(2, H, P, N)} if with_state else {})


# ------------------------------------------------------------------------------------------------------------ SSD


@pytest.mark.parametrize(("T", "K"), [(1, 2), (Q - 1, 1), (Q, 4), (Q + 1, 2), (2 * Q + 3, 1), (2 * Q + 3, 2)])
def test_scan_equals_the_recurrence(T, K):
    assert_near(kernels.ssd_triton, kernels.ssd_reference, ssd_inputs(T, K=K))


@pytest.mark.parametrize("T", [1, Q + 1])
def test_scan_without_an_initial_state_equals_the_recurrence(T):
    assert_near(kernels.ssd_triton, kernels.ssd_reference, ssd_inputs(T, with_state=False))


@pytest.mark.parametrize("T", [1, Q + 1, 2 * Q + 3])
def test_scan_in_fp16_equals_the_recurrence(T):
    assert_near(kernels.ssd_triton, kernels.ssd_reference, ssd_inputs(T), torch.float16)


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_packed_scan_equals_the_recurrence(documents):
    ids_BT = torch.tensor(DOCUMENTS[documents])
    assert_near(kernels.ssd_triton, kernels.ssd_reference, ssd_inputs(2 * Q + 3), ids_BT=ids_BT)


@pytest.mark.parametrize(("P", "N"), [(72, 5), (3, 40), (16, 16), (80, 72)])
def test_heads_and_states_larger_than_a_tile_are_done_in_parts(P, N):
    assert_near(kernels.ssd_triton, kernels.ssd_reference, ssd_inputs(Q + 1, H=2, P=P, K=1, N=N))


@pytest.mark.parametrize("chunk", [1, 48])
def test_a_chunk_length_that_is_no_power_of_two_changes_nothing(chunk):
    inputs = {name: t.float() for name, t in ssd_inputs(9).items()}
    torch.testing.assert_close(kernels.ssd_triton(**inputs, chunk=chunk), kernels.ssd_triton(**inputs), rtol=0, atol=0)


@pytest.mark.parametrize("rate", [1.0, 1e3, 1e6])
def test_strong_decay_stays_finite(rate):
    """Above the diagonal the log decay is positive, up to 64 * rate: its exp must not reach values or gradients."""
    inputs = {name: t.float() for name, t in ssd_inputs(Q + 1, rate=rate).items()}
    assert all(t.isfinite().all() for t in run(kernels.ssd_triton, inputs).values())


@pytest.mark.parametrize("unused", [0, 1])
def test_gradients_are_right_where_only_y_or_only_the_last_state_is_used(unused):
    def of(route):
        return lambda **inputs: [t.detach() if i == unused else t for i, t in enumerate(route(**inputs))]

    inputs = {name: t for name, t in ssd_inputs(Q + 1).items() if unused == 1 or name not in ("c_BTKN", "d_H")}
    rest = {name: t for name, t in ssd_inputs(Q + 1).items() if name not in inputs}
    assert_near(
        lambda **kept: of(kernels.ssd_triton)(**kept, **{k: v.float() for k, v in rest.items()}),
        lambda **kept: of(kernels.ssd_reference)(**kept, **rest),
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_through_slow_decays_survive_the_cancellation(dtype):
    """The gradient of a log decay is row sums minus column sums that nearly cancel; rates of 1e-4 leave little else."""
    inputs = ssd_inputs(2 * Q + 3, rate=1e-4)
    assert_near(kernels.ssd_triton, kernels.ssd_reference, inputs, dtype)


def strided(t, row=40):
    """The same values as a part of a wider projection, as mamba.py has them."""
    wide = torch.full((*t.shape[:2], row), 9.0, dtype=t.dtype)
    part = wide[:, :, 7 : 7 + t[0, 0].numel()]
    part.copy_(t.flatten(2))
    return part.view(t.shape)


def test_parts_of_a_projection_are_read_where_they_are():
    inputs = {name: t.float() for name, t in ssd_inputs(Q + 1).items()}
    views = {name: strided(t) if name in ("x_BTHP", "b_BTKN", "c_BTKN") else t for name, t in inputs.items()}
    assert all(kernels_gpu._rows(views[name])[0] is views[name] for name in ("x_BTHP", "b_BTKN", "c_BTKN"))
    torch.testing.assert_close(kernels.ssd_triton(**views), kernels.ssd_triton(**inputs), rtol=0, atol=0)


def test_rows_of_another_sequence_than_their_stride_says_are_copied():
    x_BTHP = torch.arange(2.0 * 9 * 4 * 3).view(2, 9, 4, 3)
    for view in (x_BTHP[:, 2:7], x_BTHP.transpose(0, 1), x_BTHP.transpose(2, 3), x_BTHP[:1, 3:4], x_BTHP[:, ::2]):
        rows, stride = kernels_gpu._rows(view)
        (B, T), n = view.shape[:2], view[0, 0].numel()
        assert torch.equal(rows.as_strided((B, T, n), (T * stride, stride, 1)).view(view.shape), view)


def apart(t):
    """The same numbers with others between them, as a column of a matrix has them."""
    return torch.stack([t, torch.full_like(t, 9.0)], dim=-1)[..., 0]


@pytest.mark.parametrize("operation", ["scan", "step", "convolution", "norm"])
def test_vectors_of_parameters_need_not_lie_side_by_side(operation):
    if operation == "convolution":
        inputs, route = conv_inputs(5), kernels.causal_conv_triton
    elif operation == "norm":
        inputs, route = norm_inputs(), as_pair(functools.partial(kernels.gated_norm_triton, n_groups=2, eps=0.1))
    else:
        inputs, route = ssd_inputs(1 if operation == "step" else 9), kernels.ssd_triton
        if operation == "step":
            inputs = {k.replace("T", ""): t[:, 0] if "T" in k else t for k, t in inputs.items()}
            route = torch.no_grad()(kernels.ssd_step_triton)
    inputs = {name: t.float() for name, t in inputs.items()}
    spread = {name: apart(t) if name in ("a_H", "d_H", "bias_E", "weight_I") else t for name, t in inputs.items()}
    assert sum(not t.is_contiguous() for t in spread.values()) in (1, 2)
    work = route if operation == "step" else functools.partial(run, route)
    results = [work(**given) if operation == "step" else work(given) for given in (spread, inputs)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_no_sequences_or_no_tokens_give_empty_results_and_the_state_as_it_was(packed):
    for B, T in ((0, 3), (2, 0)):
        ids_BT = torch.zeros(B, T, dtype=torch.long) if packed else None
        inputs = {k: t.float()[:B] if k.startswith("state") else t.float() for k, t in ssd_inputs(3).items()}
        inputs = {k: (t[:B, :T] if "BT" in k else t).requires_grad_() for k, t in inputs.items()}
        y_BTHP, last_BHPN = kernels.ssd_triton(**inputs, ids_BT=ids_BT)
        assert y_BTHP.shape == (B, T, 4, 3)
        assert torch.equal(last_BHPN, inputs["state_BHPN"])
        (y_BTHP.sum() + last_BHPN.sum()).backward()
        assert (inputs["state_BHPN"].grad == 1).all()
        assert all((t.grad == 0).all() for k, t in inputs.items() if k != "state_BHPN")
        inputs = {k: (t[:B, :T] if "BT" in k else t[:B] if "B" in k else t).float() for k, t in conv_inputs(3).items()}
        y_BTE, left_BYE = kernels.causal_conv_triton(**inputs, ids_BT=ids_BT)
        assert y_BTE.shape == inputs["x_BTE"].shape
        assert torch.equal(left_BYE, inputs["tail_BYE"])
        inputs = {k: (t[:B, :T] if "B" in k else t).float().requires_grad_() for k, t in norm_inputs().items()}
        kernels.gated_norm_triton(**inputs, n_groups=2, eps=0.1).sum().backward()
        assert (inputs["weight_I"].grad == 0).all()


def scan_fault(dtype=torch.float32, H=4, P=16, K=2, N=24, aligned=True, with_state=True, packed=True, gradients=True):
    kernels._scan_fault.cache_clear()
    sizes = H, P, K, N, aligned, with_state, packed, gradients
    return kernels._scan_fault(torch.device("cpu"), dtype, "tf32x3", *sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("plain", [False, True])
def test_the_check_of_a_card_finds_right_kernels_right(dtype, plain, tmp_path, monkeypatch):
    """Exactly: so its whole numbers are as exact in the kernels as they are in fp64."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    allclose = torch.allclose
    monkeypatch.setattr(torch, "allclose", lambda *pair, rtol, atol: allclose(*pair, rtol=1e-6, atol=1e-6))
    options = {"aligned": False, "with_state": False, "packed": False} if plain else {}
    assert scan_fault(dtype, **options) == ""
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("result", range(9))
def test_the_check_of_a_card_notices_a_wrong_number_anywhere(result, tmp_path, monkeypatch):
    """In y, the last state and seven gradients. What was found wrong is looked at again, what was right is not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    both = kernels._values_and_gradients

    def wrong(scan, *rest):
        found = list(both(kernels.ssd_chunked, *rest))
        if scan is kernels.ssd_triton:
            found[result].flatten()[-1] += 1
        return found

    monkeypatch.setattr(kernels, "_values_and_gradients", wrong)
    assert "wrong here (the interpreter, Triton " in scan_fault()
    assert "TRITON_PTXAS_PATH" in scan_fault()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(kernels, "_values_and_gradients", lambda scan, *rest: both(kernels.ssd_chunked, *rest))
    assert scan_fault() == ""
    monkeypatch.setattr(kernels, "_values_and_gradients", wrong)
    assert scan_fault() == ""
    assert "wrong here" in scan_fault(N=16)


# ----------------------------------------------------------------------------------------------------------- one token


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize(("P", "N", "K"), [(3, 5, 2), (33, 20, 1), (16, 16, 4)])
def test_step_equals_the_recurrence(P, N, K, with_gradients):
    inputs = ssd_inputs(1, P=P, N=N, K=K)
    token = {name.replace("T", ""): t[:, 0] if "T" in name else t for name, t in inputs.items()}
    if with_gradients:
        assert_near(kernels.ssd_step_triton, kernels.ssd_step_reference, token)
    else:
        y_BHP, state_BHPN = kernels.ssd_step_triton(**{name: t.float() for name, t in token.items()})
        expected = kernels.ssd_step_reference(**token)
        torch.testing.assert_close((y_BHP.double(), state_BHPN.double()), expected, rtol=1e-5, atol=1e-5)


def test_a_scan_goes_on_in_steps():
    inputs = {name: t.float() for name, t in ssd_inputs(6).items()}
    a_H, d_H, state_BHPN = inputs.pop("a_H"), inputs.pop("d_H"), inputs.pop("state_BHPN")
    y_list = []
    left_BHPN = state_BHPN
    for t in range(6):
        x, dt, b, c = (strided(v)[:, t] if v.dim() > 3 else v[:, t] for v in inputs.values())
        y_BHP, left_BHPN = kernels.ssd_step_triton(x, dt, a_H, b, c, d_H, left_BHPN)
        y_list.append(y_BHP)
    expected = kernels.ssd_triton(**inputs, a_H=a_H, d_H=d_H, state_BHPN=state_BHPN)
    torch.testing.assert_close((torch.stack(y_list, dim=1), left_BHPN), expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------- causal convolution


@pytest.mark.parametrize("with_tail", [True, False])
@pytest.mark.parametrize(("T", "W"), [(1, 4), (2, 4), (3, 4), (4, 4), (5, 1), (9, 2), (Q - 3, 4), (Q, 4), (2 * Q + 3, 4)])
def test_convolution_equals_its_sum(T, W, with_tail):
    """T < W - 1 included: there the new tail, and the gradient that comes through it, hold a piece of the old one."""
    assert_near(kernels.causal_conv_triton, kernels.causal_conv_reference, conv_inputs(T, W, with_tail))


@pytest.mark.parametrize(("T", "W"), [(2, 4), (Q + 1, 3)])
def test_convolution_equals_torch_conv1d(T, W):
    assert_near(kernels.causal_conv_triton, conv_torch, conv_inputs(T, W))


def test_convolution_in_fp16_equals_its_sum():
    assert_near(kernels.causal_conv_triton, kernels.causal_conv_reference, conv_inputs(Q + 1), torch.float16)


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_packed_convolution_equals_its_sum(documents):
    ids_BT = torch.tensor(DOCUMENTS[documents])
    assert_near(kernels.causal_conv_triton, kernels.causal_conv_reference, conv_inputs(2 * Q + 3), ids_BT=ids_BT)


@pytest.mark.parametrize("ids", [[[0, 0], [-1, 0]], [[0, 1], [-1, -1]]])
def test_packed_convolution_of_a_few_tokens_equals_its_sum(ids):
    ids_BT = torch.tensor(ids)
    assert_near(kernels.causal_conv_triton, kernels.causal_conv_reference, conv_inputs(2), ids_BT=ids_BT)


def test_channels_wider_than_a_tile_are_all_convolved():
    E = kernels_gpu.CONV_TILE[1] + 6
    inputs = {"x_BTE": torch.randn(2, 5, E), "weight_EW": torch.randn(E, 4), "bias_E": torch.randn(E)}
    assert_near(kernels.causal_conv_triton, kernels.causal_conv_reference, inputs)


# -------------------------------------------------------------------------------------------- gated norm, log-probs


def norm_inputs(I=12):
    y_BTI, z_BTI = torch.randn(2, 2, 35, I, dtype=torch.float64)
    return {"y_BTI": y_BTI, "z_BTI": z_BTI, "weight_I": torch.randn(I, dtype=torch.float64)}


def as_pair(route):
    """For `run`, which wants two outputs."""
    return lambda **inputs: (route(**inputs), torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n_groups", [1, 2, 4])
def test_gated_norm_equals_its_formula(n_groups, dtype):
    """70 tokens: the last tile of the weights' gradient is not full."""
    triton, reference = (
        as_pair(functools.partial(f, n_groups=n_groups, eps=0.1))
        for f in (kernels.gated_norm_triton, kernels.gated_norm_reference)
    )
    assert_near(triton, reference, norm_inputs(), dtype)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("banned", [(), (2,), (0, 33, *range(16, 32))])
def test_selected_logp_equals_token_logp_of_all_logits(monkeypatch, banned, temperature):
    """Three full parts of the vocabulary and a short one; one part may be banned as a whole."""
    monkeypatch.setattr(kernels_gpu, "VOCABULARY_TILE", 16)
    token = torch.tensor([[1, 15, 32], [47, 48, 49]])
    triton, reference = (
        as_pair(functools.partial(f, token=token, banned=banned, temperature=temperature))
        for f in (kernels.selected_logp_triton, kernels.selected_logp_reference)
    )
    inputs = {"hidden": torch.randn(2, 3, 8), "weight_VD": torch.randn(50, 8)}
    assert_near(triton, reference, inputs)


def test_a_banned_token_has_log_probability_minus_infinity_and_no_gradient_of_its_own():
    hidden_TD, weight_VD = torch.randn(2, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    logp_T = kernels.selected_logp_triton(hidden_TD, weight_VD, torch.tensor([3, 4]), (3,))
    logp_T.sum().backward()
    assert logp_T[0] == -torch.inf
    assert logp_T[1].isfinite()
    assert (weight_VD.grad[3] == 0).all()
    assert weight_VD.grad.isfinite().all()


# --------------------------------------------------------------------------------------------------- compilers

OPERATIONS = [name for name, value in vars(kernels_gpu).items() if isinstance(value, torch._ops.OpOverload)]


@pytest.mark.parametrize("packed", [False, True])
def test_operations_keep_what_compilers_rely_on(packed, monkeypatch):
    """PyTorch's own check of each: its schema, shapes and strides without data, gradients, and sizes that vary."""
    calls = []
    for name in OPERATIONS:
        operation = getattr(kernels_gpu, name)

        def recorded(*args, operation=operation):
            calls.append((operation, args))
            return operation(*args)

        monkeypatch.setattr(kernels_gpu, name, recorded)
    options = {"ids_BT": torch.tensor([[-1] * 3 + [0] * 40 + [1] * 24, [0] * 67])} if packed else {}
    norm = as_pair(functools.partial(kernels.gated_norm_triton, n_groups=2, eps=0.1))
    for route, inputs, given in (
        (kernels.ssd_triton, ssd_inputs(67, with_state=packed), options),
        (kernels.causal_conv_triton, conv_inputs(67, 4, packed), options),
        (norm, norm_inputs(), {}),
    ):
        run(route, {name: t.float() for name, t in inputs.items()}, **given)
    token = {k.replace("T", ""): t[:, 0] if "T" in k else t for k, t in ssd_inputs(1).items()}
    with torch.no_grad():
        kernels.ssd_step_triton(**{name: t.float() for name, t in token.items()})
    monkeypatch.undo()
    assert {operation._name for operation, _ in calls} == {f"mamba2::{name}" for name in OPERATIONS}
    for operation, args in calls:
        grad = not operation._name.endswith("_gradients")
        copies = [t.detach().clone().requires_grad_(grad and t.requires_grad) if isinstance(t, torch.Tensor) else t
                  for t in args]  # fmt: skip
        torch.library.opcheck(operation, copies)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["M", "*", "-"])
def test_a_step_of_a_block_is_one_graph(kind, packed, make_model, triton_everywhere):
    """`fullgraph` raises at the first break. Values and gradients are those of the block as it is."""
    block = make_model(pattern="M" + kind).float().layers[1]
    x_BTD, ids_BT = torch.randn(2, 9, 8), torch.tensor([[-1] * 2 + [0] * 7, [0] * 4 + [1] * 5])
    mask = attention_mask(ids_BT, 9, 0, ids_BT.device)
    context = None if not packed else mask if kind == "*" else ids_BT

    def step(forward):
        x = x_BTD.clone().requires_grad_()
        y_BTD, left = forward(x, None, context)
        loss = y_BTD.square().sum() + sum(t.float().sum() for t in left)
        return y_BTD, *torch.autograd.grad(loss, [x, *block.parameters()])

    compiled = torch.compile(block.run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled), step(block.run), rtol=1e-5, atol=1e-6)


def test_the_check_of_a_card_breaks_no_graph(tmp_path, monkeypatch):
    """It is made while the compiler follows the call, and what it found is a constant of the graph."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels._scan_fault.cache_clear()
    compiled = torch.compile(lambda **inputs: (inputs["d_H"] + 1, kernels.ssd_fault(**inputs)), fullgraph=True,
                             backend="eager")  # fmt: skip
    assert compiled(**{name: t.float() for name, t in ssd_inputs(9).items()})[1] == ""
    assert len(list(tmp_path.glob("passed-*"))) == 1
    monkeypatch.setattr(kernels, "_scan_fault", lambda *case: f"{case[7]}")  # whether 16 divides T
    found = [compiled(**{name: t.float() for name, t in ssd_inputs(T).items()})[1] for T in (10, 16, 33, 48, 11)]
    assert found == ["False", "True", "False", "True", "False"]


# ---------------------------------------------------------------------------------------------------- together


def far_apart(t):
    """A copy of [1, T, ...] in fp16 with rows 2^24 entries apart: row 128 begins at 2^31. Unused pages take no memory."""
    T, n = t.shape[1], t[0, 0].numel()
    memory = torch.empty((T - 1) * 2**24 + n, dtype=torch.float16)
    return memory.as_strided((1, T, n), (T * 2**24, 2**24, 1)).copy_(t.reshape(1, T, n)).view(t.shape)


@pytest.mark.parametrize("operation", ["scan", "convolution", "norm"])
def test_places_beyond_two_to_the_31_are_reached(operation):
    """In 32 bits they would wrap to negative ones. Gradients read the same rows."""
    T = 130
    if operation == "scan":
        inputs = {name: t[:1].half() if t.dim() > 1 else t.half() for name, t in ssd_inputs(T, H=1, K=1).items()}
        near, name, route = inputs, "x_BTHP", kernels.ssd_triton
    elif operation == "convolution":
        near = {name: t[:1].half() if "B" in name else t.half() for name, t in conv_inputs(T).items()}
        name, route = "x_BTE", kernels.causal_conv_triton
    else:
        near = {name: t.half() for name, t in zip(("y_BTI", "z_BTI"), torch.randn(2, 1, T, 3), strict=True)}
        near["weight_I"], name = torch.randn(3), "z_BTI"
        route = as_pair(functools.partial(kernels.gated_norm_triton, n_groups=1, eps=0.1))
    far = near | {name: far_apart(near[name])}
    assert kernels_gpu._rows(far[name])[1] == 2**24

    def outputs(inputs):
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        y, left = route(**leaves)
        return [y, left, *torch.autograd.grad(y.float().sum() + left.float().sum(), leaves.values())]

    torch.testing.assert_close(outputs(far), outputs(near), rtol=0, atol=0)


@pytest.fixture
def triton_everywhere():
    kernels.use("triton")
    yield
    kernels.use("auto")


def test_a_model_gives_the_same_with_triton_everywhere(make_model, triton_everywhere):
    """Hidden states and the gradient of every weight: packed documents, then going on from the cache in two ways."""

    def work(model):
        tokens_BT, ids_BT = torch.arange(22).view(2, 11) % 12, torch.tensor([[0] * 4 + [1] * 7, [-1] * 3 + [0] * 8])
        hidden_BTD, cache = model(tokens_BT, ids_BT=ids_BT)
        more_BTD, _ = model(torch.tensor([[1], [2]]), cache)
        last_BTD, _ = model(torch.tensor([[3, 4], [5, 6]]), cache.select(torch.tensor([1, 0])))
        loss = sum(h.square().sum() for h in (hidden_BTD * (ids_BT >= 0)[..., None], more_BTD, last_BTD))
        return [hidden_BTD[:, 4:], more_BTD, last_BTD, *torch.autograd.grad(loss, model.parameters())]

    results = work(make_model().float())
    kernels.use("reference")
    for t, expected in zip(results, work(make_model()), strict=True):
        assert (t.double() - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("packed", [False, True])
def test_recomputed_layers_give_the_same_gradients_in_the_first_step_too(packed, make_model, tmp_path, monkeypatch,
                                                                         triton_everywhere):  # fmt: skip
    """What is saved for backward is there for one reading; the check at the first use of a scan saves things of its own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels._scan_fault.cache_clear()
    block = make_model(pattern="M").float().layers[0]
    x_BTD = torch.randn(2, 11, block.norm.weight.shape[0], requires_grad=True)
    ids_BT = torch.tensor([[0] * 4 + [1] * 7, [-1] * 3 + [0] * 8]) if packed else None

    def layer(x_BTD):
        T = torch.zeros(2, 11, 2, 2)
        assert kernels.ssd_fault(T, T[..., 0], T[0, 0, :, 0], T, T, T[0, 0, :, 0]) == ""
        return block.run(x_BTD, None, ids_BT)[0]

    def gradients(hidden_BTD):
        return torch.autograd.grad(hidden_BTD.square().sum(), [x_BTD, *block.parameters()])

    found = gradients(checkpoint(layer, x_BTD, use_reentrant=False))
    torch.testing.assert_close(found, gradients(layer(x_BTD)), rtol=0, atol=0)


def test_fp64_is_refused_with_the_remedy(triton_everywhere):
    with pytest.raises(ValueError, match=r"works in fp32 or less, .* fp64; choose kernels auto"):
        kernels.ssd(**ssd_inputs(3))


def test_the_whole_step_of_decoding_takes_two_kernels(monkeypatch, make_model, triton_everywhere):
    """One for the convolution with its tail, one for the state, beside the norm."""
    names = []
    for name in ("conv_kernel", "ssd_step_kernel", "norm_kernel", "ssd_scan_kernel"):
        kernel = getattr(kernels_gpu, name)
        monkeypatch.setattr(kernels_gpu, name, Counted(kernel, names))
    model = make_model(pattern="M").float()
    with torch.no_grad():
        _, cache = model(torch.zeros(1, 3, dtype=torch.long))
        names.clear()
        model(torch.zeros(1, 1, dtype=torch.long), cache)
    assert names == ["conv_kernel", "ssd_step_kernel", "norm_kernel"]


def test_a_mixer_in_bf16_keeps_what_the_estimate_says(make_model, triton_everywhere):
    """Within a twentieth, casts of weights left out."""
    block = make_model(pattern="M", d_model=64, mamba_heads=8, mamba_head_dim=16, d_state=16).float().layers[0]
    shape = ModelConfig(pattern="M", d_model=64, mamba_heads=8, mamba_head_dim=16, d_state=16,
                        mamba_groups=block.mixer.n_groups)  # fmt: skip
    x_BTD = torch.randn(3, 2 * Q, 64, requires_grad=True)
    assert estimate.kept_bytes("M", shape, low=True) == pytest.approx(bytes_kept(block, x_BTD), rel=0.05)


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel, names):
        self.kernel, self.names = kernel, names

    def __getitem__(self, grid):
        self.names.append(self.kernel.__name__)
        return self.kernel[grid]
