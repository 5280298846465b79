"""Compile every Triton kernel ahead of time, without a GPU, as the model would launch it; as a program, print a table.

    python tests/aot.py            registers, spills, shared memory and memory traffic of every kernel, shape and card
    python tests/aot.py sizes      what the scan's kernels need for small and large heads, by card and kind of product; with
                                   words behind it (256 bf16 tf32x3) for states and products among them

The operations run forward and backward on tensors of PyTorch's `meta` device, which have shapes and no data. Launches are
recorded instead of made, so what is compiled here is what a GPU would run: the same constants, types and alignments.
"""

import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent))
import kernels
import kernels_gpu

COPY_BYTES_PER_NS = 3000.0  # an H100's 3.0 TB/s, read plus written
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}  # that a card has for one program
PRODUCTS = {  # of matrices: the dtype, and torch's precision of fp32 products
    "bf16": (torch.bfloat16, "high"),
    "fp16": (torch.float16, "high"),
    "tf32": (torch.float32, "high"),
    "tf32x3": (torch.float32, "highest"),
}
SIZES = [(*size, product) for size in ((64, 128), (128, 256)) for product in ("bf16", "tf32x3")]
SIZES += [(128, 256, "fp16"), (128, 256, "tf32")]  # P, N and product
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


@dataclasses.dataclass
class Shape:
    """Sizes of a Mamba-2 mixer and of a batch, in the letters of kernels.py."""

    B: int
    T: int
    D: int
    H: int
    P: int
    K: int
    N: int
    V: int
    W: int = 4


SHAPES = {
    "cpu preset": Shape(B=8, T=256, D=128, H=8, P=32, K=1, N=32, V=1024),
    "width 1024": Shape(B=8, T=2048, D=1024, H=32, P=64, K=1, N=128, V=32768),
    "Nano 12B v2": Shape(B=1, T=8192, D=5120, H=128, P=80, K=8, N=128, V=131072),
}


@dataclasses.dataclass
class Launch:
    """A kernel with its arguments, by name, and its options (num_warps, num_stages)."""

    kernel: triton.JITFunction
    arguments: dict
    options: dict

    def __str__(self) -> str:
        return self.kernel.__name__ + (", mirror" if self.arguments.get("BACKWARD") else "")

    def nanoseconds(self) -> float:
        """Time that moving every tensor once takes at the speed of a copy: a floor."""
        tensors = [t for t in self.arguments.values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors) / COPY_BYTES_PER_NS


def record(work: Callable[[], None]) -> list[Launch]:
    """The launches that `work` would make."""
    launches = []

    def run(self, *args, grid, warmup, **kwargs):
        named = dict(zip(self.arg_names, args, strict=False))
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in self.arg_names}
        launches.append(Launch(self, named | kwargs, options))

    with mock.patch.object(triton.JITFunction, "run", run):
        work()
    return launches


def compile_launch(launch: Launch, capability: int) -> triton.compiler.CompiledKernel:
    """The kernel, compiled for the types, constants and alignments of its launch."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[i,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True} | launch.options)


def resources(compiled: triton.compiler.CompiledKernel) -> tuple[int, int, int]:
    """Registers a thread, bytes a thread spilled to memory, bytes of shared memory a program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", shown).groups()
    return int(registers), int(stack), compiled.metadata.shared


def launches_of(s: Shape, dtype: torch.dtype, precision: str = "high", card: int = 90) -> dict[str, tuple[Launch, int]]:
    """Every kernel, once, as a mixer and an output layer of this shape launch it, with the tokens that it works on.

    Matrix products of fp32 numbers are in tf32 unless the precision is "highest".
    """

    def tensor(*shape: int, dtype: torch.dtype = dtype, grad: bool = True) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)

    wide, inner, groups = torch.float32, s.H * s.P, s.K * s.N
    rates, state = tensor(s.H, dtype=wide), tensor(s.B, s.H, s.P, s.N, dtype=wide)
    weight, bias, scale = (
        tensor(*sizes, dtype=wide) for sizes in ((inner + 2 * groups, s.W), (inner + 2 * groups,), (inner,))
    )
    old_tail = tensor(s.B, s.W - 1, len(bias))

    def mixer(T: int, ids_BT: torch.Tensor | None) -> torch.Tensor:
        """As in mamba.py: x, B and C are parts of the convolution's output, which is a part of a projection."""
        z, xbc, dt = tensor(s.B, T, 2 * inner + 2 * groups + s.H).split([inner, len(bias), s.H], dim=-1)
        xbc, tail = kernels.causal_conv_triton(xbc, weight, bias, old_tail, ids_BT)
        x, b, c = xbc.split([inner, groups, groups], dim=-1)
        x, b, c = x.unflatten(-1, (s.H, s.P)), b.unflatten(-1, (s.K, s.N)), c.unflatten(-1, (s.K, s.N))
        if T == 1:
            y, last = kernels.ssd_step_triton(x[:, 0], dt[:, 0], rates, b[:, 0], c[:, 0], rates, state)
        else:
            y, last = kernels.ssd_triton(x, dt, rates, b, c, rates, state, ids_BT)
        out = kernels.gated_norm_triton(y.reshape(s.B, T, inner), z, scale, s.K, 1e-5)
        return out.sum() + last.sum() + tail.sum()

    def logp() -> None:
        token = tensor(s.B, s.T, dtype=torch.int64, grad=False)
        kernels.selected_logp_triton(tensor(s.B, s.T, s.D), tensor(s.V, s.D), token, (3,), 0.7).sum().backward()

    found = {}
    precise = mock.patch.object(torch, "get_float32_matmul_precision", return_value=precision)
    on_card = mock.patch.object(kernels_gpu, "_card", return_value=card // 10)
    with precise, on_card:
        for launch in record(lambda: mixer(s.T, tensor(s.B, s.T, dtype=torch.int64, grad=False)).backward()) + record(logp):
            found[str(launch)] = launch, s.B * s.T
        with torch.no_grad():
            for launch in record(lambda: mixer(1, None)):
                found[f"{launch}, one token"] = launch, s.B
    return found


def compile_table() -> None:
    """Print what every kernel needs, for three shapes, two dtypes and three cards."""
    print("Registers a thread / bytes a thread spilled / KiB of shared memory a program.\n")
    print("| shape | dtype | kernel | floor, ns/token | A100 | H100 | B200 |\n" + "| --- " * 7 + "|")
    for name, shape in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            on_cards = {card: launches_of(shape, dtype, card=card) for card in (80, 90, 100)}
            for label, (launch, n_tokens) in on_cards[90].items():
                row = [name, str(dtype)[6:], label, f"{launch.nanoseconds() / n_tokens:.2f}"]
                for card, launches in on_cards.items():
                    registers, spilled, shared = resources(compile_launch(launches[label][0], card))
                    row.append(f"{registers} / {spilled} / {shared / 1024:.0f}")
                print("|", " | ".join(row), "|", flush=True)


def chosen_sizes(words: list[str]) -> list[tuple[int, int, str]]:
    """Those of SIZES whose N and product are among the words; all without any."""
    return [size for size in SIZES if not words or {str(size[1]), size[2]} <= set(words)]


def size_table(words: list[str]) -> None:
    """Print a row for each kernel of the scan, card and size. Tensor memory is Blackwell's: columns of 512."""
    print("triton card product P N kernel registers spilled shared_kib tensor_memory".replace(" ", "\t"))
    for card in SHARED_KIB:
        for P, N, product in chosen_sizes(words):
            dtype, precision = PRODUCTS[product]
            shape = Shape(B=2, T=2048, D=64, H=8, P=P, K=1, N=N, V=64)
            for label, (launch, _) in launches_of(shape, dtype, precision, card).items():
                if label.startswith("ssd") and "one token" not in label:
                    compiled = compile_launch(launch, card)
                    registers, spilled, shared = resources(compiled)
                    row = triton.__version__, card, product, P, N, label, registers, spilled, shared / 1024
                    print(*row, getattr(compiled.metadata, "tmem_size", None) or 0, sep="\t", flush=True)


if __name__ == "__main__":
    size_table(sys.argv[2:]) if sys.argv[1:2] == ["sizes"] else compile_table()
