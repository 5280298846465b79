"""The Triton kernels without a GPU: values in Triton's interpreter, resources and code by compiling for GPUs; and who runs.

Values and gradients are checked in tests/interpreted.py, in a process of its own. The compiler's output is read for what
the interpreter cannot show: spilled registers, and code that some card is known to get wrong. Tests marked `gpu` need one.
"""

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_kernels import conv_inputs, run
from test_names import traced
from torch import nn
from torch.testing import assert_close

import attention
import kernels
import kernels_gpu
from mamba import Mamba2
from system.config import ModelConfig

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(kernels_gpu.triton is None, reason="Triton is not installed")
if kernels_gpu.triton is not None:
    import aot


def python(*words, **environment):
    """Runs Python in the repository; returns its exit status and what it printed."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=1800
    )
    return done.returncode, done.stdout + done.stderr


# --------------------------------------------------------------------------------------------------- the interpreter


@needs_triton
def test_kernels_equal_their_references_in_the_interpreter():
    status, shown = python("-m", "pytest", "tests/interpreted.py", TRITON_INTERPRET="1")
    assert status == 0, shown
    assert int(re.search(r"(\d+) passed", shown)[1]) > 60
    assert "skipped" not in shown


# ------------------------------------------------------------------------------------------------------ the compiler

SHAPES = ["cpu preset", "width 1024", "Nano 12B v2"]
DTYPES = [torch.bfloat16, torch.float32]


@functools.cache
def launches_of(shape, dtype):
    return aot.launches_of(aot.SHAPES[shape], dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_kernel_spills_registers_on_an_h100(shape, dtype):
    """Nor needs more shared memory than it has; bf16 kernels fit a card of 99 KiB."""
    found = {
        label: aot.resources(aot.compile_launch(launch, 90)) for label, (launch, _) in launches_of(shape, dtype).items()
    }
    assert len(found) == 14
    assert {label: spilled for label, (_, spilled, _) in found.items() if spilled} == {}
    assert max(shared for _, _, shared in found.values()) <= (99 if dtype == torch.bfloat16 else 227) * 1024


@pytest.fixture
def grids(monkeypatch):
    """Of the launches that work on meta tensors would make."""
    found = []
    monkeypatch.setattr(kernels_gpu, "_launch", lambda kernel, grid, *_, **__: found.append((kernel.__name__, grid)))
    return found


@needs_triton
def test_batches_beyond_the_second_axis_of_a_grid_are_convolved(grids):
    """A card takes 65,535 programs on the second and third axis, and 2^31 - 1 on the first."""
    x_BTE = torch.empty(70_000, 3, 80, device="meta", requires_grad=True)
    kernels.causal_conv_triton(x_BTE, torch.empty(80, 4, device="meta"), torch.empty(80, device="meta"))[0].sum().backward()
    assert grids == [("conv_kernel", (140_000, 1)), ("conv_grad_kernel", (140_000, 1))]


@needs_triton
@pytest.mark.parametrize(("P", "T", "remedy"), [
    (129, 4, r"at most 128 channels, and these have 129; make the heads smaller"),
    (16, 4_194_241, r"at most 4194240 tokens at a time, and these are 4194241; pass them in parts")])  # fmt: skip
def test_sizes_that_no_card_takes_are_refused_before_a_launch(grids, P, T, remedy):
    x_BTHP, dt_BTH, b_BTKN = (torch.empty(1, T, *sizes, device="meta") for sizes in ((2, P), (2,), (1, 16)))
    a_H = torch.empty(2, device="meta")
    with pytest.raises(ValueError, match=remedy):
        kernels.ssd_triton(x_BTHP, dt_BTH, a_H, b_BTKN, b_BTKN, a_H)
    if T > 4:
        with pytest.raises(ValueError, match=remedy):
            kernels.causal_conv_triton(x_BTHP[..., 0], torch.empty(2, 4, device="meta"), a_H)
    assert grids == []


def test_a_kernel_starts_on_the_card_of_its_tensors_and_not_at_all_without_work(monkeypatch):
    entered, t = [], torch.zeros(1)

    class Card:
        def __init__(self, tensor):
            assert tensor is t

        def __enter__(self):
            entered.append("card")

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", Card)
    kernel = {(2, 1): lambda *arguments, size: entered.append((arguments, size))}
    kernels_gpu._launch(kernel, (2, 1), t, 5, size=16)
    assert entered == ["card", ((t, 5), 16), "left"]
    kernels_gpu._launch(kernel, (2, 0), t, 5, size=16)
    assert len(entered) == 3


@pytest.fixture(scope="session")
def triton_of_torch(tmp_path_factory):
    """A folder with the Triton that torch 2.13's wheels for CUDA bring, beside the one that is installed."""
    folder = tmp_path_factory.mktemp("triton")
    status, shown = python("-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "triton==3.7.1")
    if status != 0:
        pytest.skip(f"triton 3.7.1 cannot be installed, there may be no network: {shown[-200:]}")
    return str(folder)


@needs_triton
@pytest.mark.parametrize("version", ["installed", "3.7.1"])
def test_every_size_fits_every_card_and_half_precision_hardly_spills(version, request):
    """The largest sizes, in the two kinds of products that runs have by default; aot.py knows more. fp32's, three tf32
    products, are allowed to spill. A kernel of a few registers would be a bare trap."""
    words = ["256", "bf16", "tf32x3"]
    path = [] if version == "installed" else [request.getfixturevalue("triton_of_torch")]
    status, shown = python("tests/aot.py", "sizes", *words, PYTHONPATH=os.pathsep.join(path))
    assert status == 0, shown
    rows = [dict(zip(shown.split("\n")[0].split("\t"), line.split("\t"), strict=True)) for line in shown.split("\n")[1:-1]]
    assert len(rows) == len(aot.SHARED_KIB) * len(aot.chosen_sizes(words)) * 5
    assert version in ("installed", rows[0]["triton"])
    for row in rows:
        assert float(row["shared_kib"]) <= aot.SHARED_KIB[int(row["card"])], row
        assert int(row["tensor_memory"]) <= 512, row
        assert int(row["registers"]) > 16, row
        assert int(row["spilled"]) <= 256 or row["product"].startswith("tf32"), row


def definitions(ttir):
    """What each name of Triton's intermediate code stands for: the right side of its definition."""
    return dict(re.findall(r"^ *(%\w+)(?::\d+)? = (.*)$", ttir, flags=re.M))


@functools.cache
def scan_code():
    """Intermediate code of the scan's kernels, the launch's own types and constants in it."""
    launches = launches_of("Nano 12B v2", torch.bfloat16).items()
    return {label: aot.compile_launch(launch, 90).asm["ttir"] for label, (launch, _) in launches if "ssd" in label}


@needs_triton
def test_only_loaded_tiles_are_transposed():
    """A product that is transposed in registers and used in another product has given wrong gradients on Hopper."""
    n_transposed = 0
    for label, ttir in scan_code().items():
        named = definitions(ttir)
        for operand in re.findall(r"= tt\.trans (%\w+)", ttir):
            n_transposed += 1
            assert named[operand].startswith("tt.load"), f"{label}: {named[operand]}"
    assert n_transposed == 3


@needs_triton
def test_every_exponent_is_cut_off_at_zero():
    """exp of a difference above 0, by rounding or above the diagonal, would add weight or overflow."""
    n_exponents = 0
    for label in ("ssd_states_kernel", "ssd_states_kernel, mirror", "ssd_scan_kernel", "ssd_dx_kernel", "ssd_dbc_kernel"):
        named = definitions(scan_code()[label])
        for right in named.values():
            if right.startswith("math.exp "):
                n_exponents += 1
                assert re.match(r"arith\.min\w*f ", named[right.split()[1]]), f"{label}: {right}"
    assert n_exponents >= 11


@needs_triton
def test_places_in_memory_are_computed_in_64_bits():
    """By the only function that asks for a program's place, and by what the compiler makes of each place."""
    source = (ROOT / "kernels_gpu.py").read_text()
    assert source.count("tl.program_id(") == 1
    assert "tl.program_id(axis).to(tl.int64)" in source
    for label, ttir in scan_code().items():
        places = [name for name, right in definitions(ttir).items() if right.startswith("tt.get_program_id")]
        assert places, label
        for name in places:
            uses = re.findall(rf"= (\S+) {re.escape(name)}\b(.{{14}})", ttir)
            assert set(uses) == {("arith.extsi", " : i32 to i64 ")}, label


@needs_triton
def test_no_kernel_adds_to_memory_that_another_program_writes():
    assert not re.search(r"tl\.atomic|autotune", (ROOT / "kernels_gpu.py").read_text())
    assert all("tt.atomic" not in ttir for ttir in scan_code().values())


@needs_triton
def test_shape_suffixes_around_the_kernels_are_true():
    with traced() as found:
        aot.launches_of(aot.SHAPES["cpu preset"], torch.bfloat16)
    assert found == {}


@needs_triton
def test_the_table_of_resources_has_a_row_for_every_kernel(monkeypatch, capsys):
    monkeypatch.setattr(aot, "SHAPES", {"cpu preset": aot.SHAPES["cpu preset"]})
    monkeypatch.setattr(aot, "compile_launch", lambda launch, capability: capability)
    monkeypatch.setattr(aot, "resources", lambda capability: (capability, 0, 2048))
    aot.compile_table()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| cpu preset")]
    assert len(rows) == 28
    assert rows[0].endswith("| 0.44 | 80 / 0 / 2 | 90 / 0 / 2 | 100 / 0 / 2 |")


# ------------------------------------------------------------------------------------------------------- who runs


class OnCuda(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


@pytest.fixture
def operation():
    """An operation whose three forms give their names; what was chosen is put back."""
    yield kernels._operation(*(functools.partial(lambda name, t: name, form) for form in ("reference", "fast", "fused")))
    kernels.use("auto")


def gpu_tensor(dtype=torch.float32):
    return torch.zeros(1, dtype=dtype).as_subclass(OnCuda)


@pytest.mark.parametrize(("dtype", "masked", "grouped"), [
    (torch.float32, False, False), (torch.bfloat16, True, False), (torch.bfloat16, False, True)])  # fmt: skip
def test_attention_on_a_gpu_asks_for_groups_only_where_flash_attention_takes_them(monkeypatch, dtype, masked, grouped):
    """Elsewhere keys and values are repeated for their heads, and the result is the same."""
    torch.manual_seed(0)
    layer = attention.Attention(ModelConfig(d_model=16, n_heads=4, n_kv_heads=2, attn_head_dim=4)).to(dtype)
    x_BTD, sdpa, asked = torch.randn(2, 5, 16, dtype=dtype), F.scaled_dot_product_attention, []
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if masked else None
    expected = layer(x_BTD, None, mask)[0]

    def recorded(q, k, v, **options):
        asked.append((k.shape[1], options["enable_gqa"]))
        return sdpa(*(t.as_subclass(torch.Tensor) for t in (q, k, v)), **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    found = layer(x_BTD.as_subclass(OnCuda), None, mask)[0].as_subclass(torch.Tensor)
    assert asked == [(2 if grouped else 4, grouped)]
    assert_close(found, expected)


@needs_triton
def test_auto_runs_triton_on_cuda_tensors_and_pytorch_on_others(operation):
    kernels.use("auto")
    assert operation(torch.zeros(1)) == "fast"
    assert operation(t=gpu_tensor()) == "fused"
    assert operation(gpu_tensor(torch.float64)) == "fast"


@needs_triton
def test_where_triton_is_wrong_auto_falls_back_aloud_and_triton_refuses(operation, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    forms = (functools.partial(lambda name, t: name, form) for form in ("reference", "fast", "fused"))
    faulty = kernels._operation(*forms, lambda t: "Triton's scan is wrong here; install a newer Triton")
    with pytest.warns(UserWarning, match=r"install a newer Triton; until then PyTorch's form runs"):
        assert faulty(gpu_tensor()) == "fast"
    assert faulty(torch.zeros(1)) == "fast"
    kernels.use("triton")
    with pytest.raises(ValueError, match=r"install a newer Triton; or choose kernels auto"):
        faulty(gpu_tensor())
    kernels.use("reference")
    assert faulty(gpu_tensor()) == "reference"


def test_auto_runs_pytorch_on_cuda_tensors_where_triton_is_missing(operation, monkeypatch):
    monkeypatch.setattr(kernels_gpu, "triton", None)
    assert operation(gpu_tensor()) == "fast"


def test_reference_runs_the_references_everywhere(operation):
    kernels.use("reference")
    assert operation(torch.zeros(1)) == operation(gpu_tensor()) == "reference"


def test_operations_are_their_references_after_use_reference(operation):
    kernels.use("reference")
    inputs = conv_inputs(5)
    assert torch.equal(kernels.causal_conv(**inputs)[0], kernels.causal_conv_reference(**inputs)[0])
    assert kernels.causal_conv.__wrapped__ is kernels.causal_conv_reference


@needs_triton
def test_triton_on_the_cpu_is_refused_with_the_remedy(operation, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^kernels \(triton\) needs CUDA, and this machine has no .* TRITON_INTERPRET=1"):
        kernels.use("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernels.use("triton")
    assert operation(gpu_tensor()) == "fused"
    with pytest.raises(ValueError, match=r"these tensors are on cpu; choose kernels auto"):
        operation(torch.zeros(1))


def test_triton_without_the_package_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(kernels_gpu, "triton", None)
    with pytest.raises(ValueError, match=r"^kernels \(triton\) needs .*: pip install triton "):
        kernels.use("triton")


@pytest.mark.parametrize("choice", ["cuda", "Triton", "", None])
def test_an_unknown_choice_is_refused_with_those_that_exist(choice):
    with pytest.raises(ValueError, match=rf"^kernels \({choice!r}\) is unknown; choose auto, reference or triton$"):
        kernels.use(choice)


def test_kernels_import_and_run_without_triton():
    status, shown = python(
        "-c",
        "import sys, torch; sys.modules['triton'] = None; import kernels, kernels_gpu; "
        "print(kernels_gpu.triton, kernels.causal_conv(torch.ones(1, 2, 1), torch.ones(1, 2), torch.ones(1))[0].tolist())",
    )
    assert (status, shown) == (0, "None [[[2.0], [3.0]]]\n")


def test_kernels_have_no_version_to_be_taken_for_the_package_of_that_name():
    assert not hasattr(kernels, "__version__")
    names = [n.id for n in ast.walk(ast.parse((ROOT / "kernels.py").read_text())) if isinstance(n, ast.Name)]
    assert "__version__" not in names


def test_step_sizes_far_below_zero_do_not_vanish_before_the_scan():
    """log(1 + exp(x)) is 0 in fp32 for x below -17; the softplus of mamba.py must not be."""
    mixer = Mamba2(ModelConfig(d_model=8, mamba_heads=2, mamba_head_dim=4, d_state=4))
    nn.init.zeros_(mixer.in_proj.weight[-2:].detach())
    nn.init.constant_(mixer.dt_bias, -30.0)
    nn.init.constant_(mixer.conv_bias, 1.0)
    _, (_, state_BHPN) = mixer(torch.randn(1, 3, 8), None, None)
    state_BHPN.sum().backward()
    assert 0 < state_BHPN.abs().max() < 1e-11
    assert (mixer.dt_bias.grad != 0).all()


# --------------------------------------------------------------------------------------------------------- selected_logp


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("banned", [(), (2,), (0, 33, *range(16, 32))])
def test_selected_logp_in_parts_equals_token_logp_of_all_logits(monkeypatch, banned, temperature):
    """Parts of 16 ids: one of them may be banned as a whole, and one token is banned itself."""
    monkeypatch.setattr(kernels_gpu, "VOCABULARY_TILE", 16)
    token, keep = torch.tensor([[1, 15, 32], [47, 48, 2]]), torch.tensor([[True] * 3, [True, True, 2 not in banned]])
    inputs = {"hidden": torch.randn(2, 3, 8).double(), "weight_VD": torch.randn(50, 8).double()}

    def of(route):
        def kept(**inputs):
            logp = route(token=token, banned=banned, temperature=temperature, **inputs)
            assert (logp.isinf() == ~keep).all()
            return logp.where(keep, 0 * logp.nan_to_num()), torch.zeros(1)

        return kept

    result = run(of(kernels.selected_logp), inputs)
    torch.testing.assert_close(result, run(of(kernels.selected_logp_reference), inputs), rtol=1e-9, atol=1e-9)


def test_selected_logp_needs_no_memory_that_grows_with_the_vocabulary():
    """The largest tensor made on the way, apart from the weights' gradient, has a part's logits."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, torch.Tensor) and not function.is_view:
                sizes.append(result.numel())
            return result

    n_tokens, part = 12, kernels_gpu.VOCABULARY_TILE
    hidden_TD, weight_VD = torch.randn(n_tokens, 2, requires_grad=True), torch.randn(5 * part, 2)
    with Watch():
        kernels.selected_logp(hidden_TD, weight_VD, torch.arange(n_tokens) * part // 3).sum().backward()
    assert max(sizes) == n_tokens * part


@pytest.mark.parametrize("form", [kernels.selected_logp_torch, kernels.selected_logp_reference])
def test_selected_logp_of_bf16_is_in_fp32(form):
    logp_T = form(torch.randn(3, 8).bfloat16(), torch.randn(9, 8).bfloat16(), torch.tensor([1, 2, 3]))
    assert logp_T.dtype == torch.float32
    assert (logp_T < 0).all()


def test_selected_logp_under_autocast_goes_the_same_way_back():
    """The logits of the backward pass must be those of the forward pass, or probabilities do not sum to 1."""
    hidden_TD, weight_VD = (8 * torch.randn(64, 32)).requires_grad_(), torch.randn(20, 32)
    with torch.autocast("cpu", torch.bfloat16):
        kernels.selected_logp(hidden_TD, weight_VD, torch.zeros(64, dtype=torch.long)).sum().backward()
    gradient_TD, hidden_TD.grad = hidden_TD.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        kernels.selected_logp_reference(hidden_TD, weight_VD, torch.zeros(64, dtype=torch.long)).sum().backward()
    assert (gradient_TD - hidden_TD.grad).norm() < 0.01 * hidden_TD.grad.norm()


# ------------------------------------------------------------------------------------------------------------ on a GPU


def gpu_case(name, dtype):
    """Inputs, options, and the two routes of an operation, at sizes that fill tiles and leave some half empty."""
    randn = functools.partial(torch.randn, dtype=torch.float64)
    B, T, H, P, K, N, E, I = 2, 200, 4, 80, 2, 128, 640, 320
    ids_BT = torch.tensor([[-1] * 9 + [0] * 90 + [1] * 101, [0] * 64 + [1] * 64 + [2] * 72]).cuda()
    if name == "scan":
        inputs = {"x_BTHP": randn(B, T, H, P), "dt_BTH": torch.rand(B, T, H).double() * 0.1, "a_H": -torch.rand(H).double(),
                  "b_BTKN": randn(B, T, K, N), "c_BTKN": randn(B, T, K, N), "d_H": randn(H),
                  "state_BHPN": randn(B, H, P, N)}  # fmt: skip
        routes, options = (kernels.ssd_triton, kernels.ssd_reference), {"ids_BT": ids_BT}
    elif name == "convolution":
        inputs = {"x_BTE": randn(B, T, E), "weight_EW": randn(E, 4), "bias_E": randn(E), "tail_BYE": randn(B, 3, E)}
        routes, options = (kernels.causal_conv_triton, kernels.causal_conv_reference), {"ids_BT": ids_BT}
    elif name == "norm":
        inputs = {"y_BTI": randn(B, T, I), "z_BTI": randn(B, T, I), "weight_I": randn(I)}
        forms, options = (kernels.gated_norm_triton, kernels.gated_norm_reference), {"n_groups": K, "eps": 1e-5}
    else:
        inputs = {"hidden": randn(B, T, 64), "weight_VD": randn(9000, 64) / 8}
        forms = kernels.selected_logp_triton, kernels.selected_logp_reference
        options = {"token": torch.randint(5, 9000, (B, T)).cuda(), "banned": (3, 4), "temperature": 0.7}
    if name in ("norm", "log-probabilities"):
        routes = [lambda f=f, **kwargs: (f(**kwargs), torch.zeros(1)) for f in forms]
    return {k: v.cuda().to(dtype) for k, v in inputs.items()}, options, routes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["scan", "convolution", "norm", "log-probabilities"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_values_and_gradients_on_a_gpu_equal_the_reference(name, dtype):
    """Against fp64 on the same inputs. Compilers have got such kernels wrong on one card and right on another."""
    inputs, options, (route, reference) = gpu_case(name, dtype)
    expected = run(reference, {k: v.double() for k, v in inputs.items()}, **options)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}[dtype]
    for key, t in run(route, inputs, **options).items():
        assert (t.double() - expected[key]).norm() <= tolerance * expected[key].norm(), key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["pretrain", "rlp", "cpt", "rlvr", "elastic"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_whole_runs_on_a_gpu_end_resume_and_can_be_used(mode, dtype, tmp_path):
    run_dir = str(tmp_path / "run")
    words = ("train.py", "--preset", "smoke", "--mode", mode, "--device", "cuda", "--out", run_dir, "--data.cache-dir",
             str(tmp_path), "--parallel.dtype", dtype)  # fmt: skip
    talk = ("generate.py", run_dir, "Value of q?") + (("--budget", "1", "0.5") if mode == "elastic" else ())
    for command in (words, (*words, "--resume"), talk, ("-m", "tools.scores", run_dir)):
        status, shown = python(*command)
        assert status == 0, shown
