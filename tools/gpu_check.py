"""Prove on a card that all is right, and say how fast it is: `python -m tools.gpu_check`.

Runs every part of `PARTS` in a process of its own, with a time limit; one that fails does not stop
the rest. Prints a table and writes OUT/checked-DEVICE.json, of which `tools.report` makes one in
RESULTS.md. The exit code is 0 if no part failed. Nothing is downloaded. Within 8 minutes on an H100
by design; on a machine without a card the parts that need none run, and the others say so.

    python -m tools.gpu_check --part speed          one part, its rows as JSON

How to read: `PARTS`, then the part of interest. Sizes are (P, N), channels of a head and its state.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import kernels_gpu
import train
from attention import attention_mask
from model import HybridLM
from rlp import RLP
from system import parallel
from system.config import ParallelConfig
from system.costs import count_parameters
from system.errors import exit_code, require
from system.files import read_json, read_log, write_json
from system.machine import hardware, versions
from system.presets import PRESETS
from thoughts import Sampling, Thoughts, sample_thoughts
from tools import bench
from views import estimate
from views.tables import markdown

ON_CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CARD else "cpu")
SIZES = [(P, N) for P in (16, 32, 64, 80, 128) for N in (16, 64, 128, 256)]
FEW = [(16, 16), (80, 128)]  # on a CPU
# Numbers, how fp32 is multiplied, and the largest error allowed, as a share of the norm.
NUMBERS = {"bf16": (torch.bfloat16, "highest", 1e-2), "fp16": (torch.float16, "highest", 2e-3),
           "tf32": (torch.float32, "high", 5e-3), "tf32x3": (torch.float32, "highest", 1e-5)}
MAIN = [(64, 64), (64, 128), (80, 128), (128, 256)]
PTXAS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")  # newer Tritons read the second alone
HIDDEN = ("what", "ok")  # of a row, in the table
Rows = list[dict[str, Any]]


# ------------------------------------------------------------------------------------- right or not


def random(*shape: int) -> Tensor:
    """Normal numbers in fp64, the same in every run."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def scan_inputs(P: int, N: int, B=2, T=130, H=4, K=2) -> list[Tensor]:
    """Of the scan, with decays that outlive a chunk."""
    return [random(B, T, H, P), 0.1 * random(B, T, H).abs(), -random(H).abs(), random(B, T, K, N),
            random(B, T, K, N), random(H), random(B, H, P, N)]


def one_token(inputs: list[Tensor]) -> list[Tensor]:
    """Of the scan's inputs those of a decode step."""
    return [t[:, 0].contiguous() if i in (0, 1, 3, 4) else t for i, t in enumerate(inputs)]


def results(run: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """What an operation gives, and the gradients of a fixed random sum of it."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    found = run(*leaves)
    found = [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]
    weights = [random(*t.shape).to(t.dtype) for t in found]
    return [*found, *torch.autograd.grad(found, leaves, weights, materialize_grads=True)]


def worst(run: Callable, reference: Callable, inputs: list[Tensor], dtype: torch.dtype,
          cancelling: int | None = None) -> float:
    """The largest error of a value or gradient, as a share of its norm, against fp64 on the same
    inputs, rounded to the dtype. cancelling: the input whose gradient is a sum over all tokens of
    terms that cancel, so that right kernels are off by more: a fifth of its error counts."""
    rounded = [t.to(dtype) for t in inputs]
    expected = results(reference, [t.double() for t in rounded])
    errors = [((t.double() - right).norm() / right.norm().clamp(min=1e-30)).item()
              for t, right in zip(results(run, rounded), expected, strict=True)]
    if cancelling is not None:
        errors[cancelling - len(inputs)] /= 5
    return max(errors)


def values(name: str) -> Rows:
    """Values and all gradients of every operation against the fp64 reference; documents packed."""
    dtype, precision, bound = NUMBERS[name]
    bound = bound if ON_CARD else 1e-4  # PyTorch's form in fp32
    torch.set_float32_matmul_precision(precision)
    ids_BT = torch.tensor([[-1] * 9 + [0] * 60 + [1] * 61, [0] * 64 + [1] * 66], device=DEVICE)
    rows, packed = [], {"ids_BT": ids_BT}

    def add(what: str, error: float) -> None:
        rows.append({"what": what, "error": error, "bound": bound, "ok": error <= bound})

    def look(what: str, run: Callable, reference: Callable, inputs: list[Tensor],
             cancelling: int | None = None) -> None:
        add(what, worst(run, reference, inputs, dtype, cancelling))

    for P, N in SIZES if ON_CARD else FEW:
        look(f"scan {P}, {N}", functools.partial(kernels.ssd, **packed),
             functools.partial(kernels.ssd_reference, **packed), scan_inputs(P, N), cancelling=2)
        step = [t.to(dtype) for t in one_token(scan_inputs(P, N))]
        (y, _), (right, _) = (kernels.ssd_step(*step),
                              kernels.ssd_step_reference(*(t.double() for t in step)))
        add(f"step {P}, {N}", ((y.double() - right).norm() / right.norm()).item())
    look("convolution", functools.partial(kernels.causal_conv, **packed),
         functools.partial(kernels.causal_conv_reference, **packed),
         [random(2, 130, 640), random(640, 4), random(640), random(2, 3, 640)])
    more = {"n_groups": 2, "eps": 1e-5}
    look("norm", functools.partial(kernels.gated_norm, **more),
         functools.partial(kernels.gated_norm_reference, **more),
         [random(2, 130, 320), random(2, 130, 320), random(320)])
    if dtype == torch.float32:  # the logits of fewer bits differ by more than log p may
        token_T = torch.arange(260, device=DEVICE) * 30
        look("log-probabilities", lambda h, w: kernels.selected_logp(h, w, token_T, (3, 4)),
             lambda h, w: kernels.selected_logp_reference(h, w, token_T, (3, 4)),
             [random(260, 64), random(9000, 64) / 8])
    return rows


def integers() -> Rows:
    """Small whole numbers, of which every sum is exact: what a call looks at before its first use.
    Here where 16 divides the tokens; `values` has been through the others."""
    rows = []
    for name, (dtype, precision, _) in NUMBERS.items():
        torch.set_float32_matmul_precision(precision)
        for P, N in MAIN:
            why = kernels._scan_fault(DEVICE, dtype, kernels_gpu.precision(), 4, P, 2, N,
                                      True, True, True, True)
            rows.append({"what": f"{name} {P}, {N}", "ok": not why, "why": why})
    return rows


def repeats() -> Rows:
    """The same scan again and again: bit for bit the same, with thousands of programs at once."""
    sizes = {"B": 8, "T": 1024, "H": 32} if ON_CARD else {"B": 1, "T": 130, "H": 2}
    inputs = [t.to(torch.bfloat16 if ON_CARD else torch.float32)
              for t in scan_inputs(64, 128, **sizes, K=1)]
    first, n = results(kernels.ssd, inputs), 50 if ON_CARD else 3
    same = sum(all(map(torch.equal, results(kernels.ssd, inputs), first)) for _ in range(n))
    return [{"what": f"{n} repeats, {sizes}", "same": same, "ok": same == n}]


def assemblers() -> Rows:
    """The same kernels through every ptxas that is there: equal results."""
    found = {"Triton's": "", "of PATH": shutil.which("ptxas") or "",
             "of CUDA": "/usr/local/cuda/bin/ptxas"}
    code = ("import torch; from tools import gpu_check as g; import kernels; "
            "r = [t for d in (torch.bfloat16, torch.float32) for t in g.results(kernels.ssd, "
            "[t.to(d) for t in g.scan_inputs(64, 128)])]; "
            "print(sum(float(t.double().abs().sum()) for t in r).hex())")
    rows: Rows = []
    for name, path in found.items():
        if name != "Triton's" and not Path(path).is_file():
            continue
        with tempfile.TemporaryDirectory() as cache:
            own = dict.fromkeys(PTXAS, path) if path else {}
            said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                  env={**os.environ, "TRITON_CACHE_DIR": cache, **own})
        sums = said.stdout.strip() or said.stderr[-300:]
        rows.append({"what": f"ptxas {name}", "sum": sums,
                     "ok": said.returncode == 0 and (not rows or sums == rows[0]["sum"])})
    return rows


# ----------------------------------------------------------------------------------------- how fast


def seconds(run: Callable) -> float:
    """The median of some turns, after one without a clock."""
    run()
    turns = sorted(bench.take_turns({"": run}, 20 if ON_CARD else 3, DEVICE)[""])
    return turns[len(turns) // 2]


def speed() -> Rows:
    """Nanoseconds a token at width 1024 in bf16, beside the bytes that must move at the bandwidth
    of a copy; then the scan beside other people's, where they are installed."""
    B, T, H, P, N = (8, 4096, 32, 64, 128) if ON_CARD else (1, 128, 4, 16, 16)
    dtype, I = torch.bfloat16 if ON_CARD else torch.float32, H * P
    large = torch.empty(2**29 if ON_CARD else 2**22, dtype=torch.bfloat16, device=DEVICE)
    bandwidth = 2 * large.nbytes / seconds(large.clone)
    *scan, state = scan_inputs(P, N, B, T, H, 1)
    scan = [t.to(dtype).requires_grad_() for t in scan]
    x_BTE, weight, bias = (t.to(dtype) for t in (random(B, T, I + 2 * N), random(I + 2 * N, 4),
                                                 random(I + 2 * N)))
    y, z, scale = (t.to(dtype) for t in (random(B, T, I), random(B, T, I), random(I)))
    step, found = one_token([*(t.detach() for t in scan), state.float()]), kernels.ssd(*scan)[0]
    grad = torch.ones_like(found)
    each, size = dtype.itemsize, lambda *ts: sum(t.nbytes for t in ts) / (B * T)
    states = 2 * 4 * H * P * N / 64  # fp32, written and read once in 64 tokens
    runs = {
        "scan": (lambda: kernels.ssd(*(t.detach() for t in scan)),
                 2 * size(*scan[:5]) + I * each + states),
        "its backward": (lambda: torch.autograd.grad(found, scan, grad, retain_graph=True),
                         3 * size(*scan[:5]) + 2 * I * each + 2 * states),
        "convolution": (lambda: kernels.causal_conv(x_BTE, weight, bias), 2 * size(x_BTE)),
        "norm": (lambda: kernels.gated_norm(y, z, scale, 1, 1e-5), 3 * size(y))}
    rows = []
    for name, (run, n_bytes) in runs.items():
        with contextlib.nullcontext() if "backward" in name else torch.no_grad():
            ns = 1e9 * seconds(run) / (B * T)
        rows.append({"what": name, "ns a token": ns, "floor": 1e9 * n_bytes / bandwidth,
                     "ok": True})
    us, floor = 1e6 * seconds(lambda: kernels.ssd_step(*step)), 2e6 * step[6].nbytes / bandwidth
    rows.append({"what": f"step of {B} rows", "us": us, "floor": floor, "ok": True})
    rows.append({"what": "copy, GB/s", "GB/s": bandwidth / 1e9, "ok": True})
    for row in bench.measure("ssd", DEVICE, 5)["rows"] if ON_CARD else ():
        rows.append({"what": f"scan, b4 t512: {row['name']}", "ms": row.get("ms"),
                     "note": row["note"], "ok": True})
    return rows


class Waits(TorchDispatchMode):
    """Counts what would wait for a card: numbers that Python reads, shapes that depend on values.
    """

    OPS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")
    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put_", "index_put") else ()
        self.n += name in self.OPS or any(t is not None and t.dtype == torch.bool for t in masks)
        return function(*args, **kwargs or {})


def rollout() -> tuple[HybridLM, RLP, dict, torch.Generator]:
    """A model of the default size, RLP on it, and a batch of random contexts."""
    B, T = (32, 128) if ON_CARD else (2, 32)
    case = bench.rlp_case(DEVICE, replace(PRESETS["cpu"].rlp, batch=B, context_len=T))
    return *case, torch.Generator(DEVICE)


def decoding() -> Rows:
    """Thoughts that are sampled: tokens a second, and waits for the card a token. With a step that
    is replayed as a CUDA graph nine in ten must be the same: rounding may tip single tokens."""
    network, objective, batch, generator = rollout()
    rows, first = [], None
    for graphs in (False, True) if ON_CARD else (False,):
        parallel.team.settings = ParallelConfig(cuda_graphs=graphs)
        thoughts, row = sampled(network, objective, batch, generator)
        first = first or thoughts
        width = min(t.tokens_RL.shape[1] for t in (first, thoughts))
        is_same_RL = first.tokens_RL[:, :width] == thoughts.tokens_RL[:, :width]
        same = float((is_same_RL.all(-1) & (first.length_R == thoughts.length_R)).float().mean())
        how = "a graph replayed" if graphs else "launch by launch"
        rows.append({"what": f"{len(thoughts.length_R)} thoughts at once, {how}", **row,
                     "same": same, "ok": same >= 0.9})
    return rows


def sampled(network: HybridLM, objective: RLP, batch: dict, generator: torch.Generator
            ) -> tuple[Thoughts, dict[str, float]]:
    """Thoughts, how fast they were sampled, and how often the card was waited for."""
    c = objective.config

    def run() -> Any:
        sampling = Sampling(c.group_size, c.thought_len, c.temperature)
        return sample_thoughts(network, batch, objective.tokenizer, sampling,
                               generator.manual_seed(0))

    thoughts, took = run(), seconds(run)
    n_steps = thoughts.tokens_RL.shape[1]
    if ON_CARD:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            run()
        torch.cuda.set_sync_debug_mode("default")
        n = sum("synchroniz" in str(w.message) for w in waits)
    else:
        with Waits() as counted:
            run()
        n = counted.n
    tokens = float(thoughts.length_R.sum())
    return thoughts, {"tokens/s": tokens / took, "waits a step": n / n_steps}


def compiled() -> Rows:
    """A block of each kind as one graph of PyTorch's compiler, beside itself: the result and the
    gradient of what it reads. It raises where a graph would break."""
    def step(run: Callable, x_BTD: Tensor, context: Tensor | None) -> list[Tensor]:
        return results(lambda x: run(x, None, context)[0], [x_BTD])

    torch.set_float32_matmul_precision("highest")
    B, T, rows = 8, 256, []
    ids_BT = (torch.arange(T, device=DEVICE) // 100).expand(B, T) if ON_CARD else None
    for kind in "M*-":
        model = replace(bench.CPU_MODEL, pattern="M" + kind)
        block = bench.noisy_network(DEVICE, model, 64).layers[1]
        context = attention_mask(ids_BT, T, 0, DEVICE) if kind == "*" else ids_BT
        backend = "inductor" if ON_CARD else "aot_eager"  # the first needs a C++ compiler
        one = torch.compile(block.run, fullgraph=True, backend=backend)
        steps = [functools.partial(step, run, random(B, T, model.d_model).float(), context)
                 for run in (block.run, one)]
        plain, fast = (run() for run in steps)
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(fast, plain, strict=True)]
        times = [1e3 * seconds(run) for run in steps]
        rows.append({"what": f"block {kind}", "error": max(errors), "bound": 1e-4,
                     "ms": times[1], "uncompiled, ms": times[0], "ok": max(errors) < 1e-4})
    return rows


def memory() -> Rows:
    """The peak of a step of RLP in bf16 beside the estimate's, by which runs are planned."""
    network, objective, batch, generator = rollout()
    c = objective.config
    config = replace(PRESETS["cpu"], rlp=c, init="x", model=network.config,
                     parallel=ParallelConfig(dtype="bf16"))
    stays = 4 * count_parameters(network) * 4  # weights, teacher, two moments, in fp32

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            prepared = objective.prepare(network, batch, 0, generator.manual_seed(0))
            loss, _, _ = objective.loss(network, prepared)
        loss.backward()

    peak = bench.peak_bytes(step, DEVICE) + stays
    expected = estimate.memory(config)["at the peak"]
    return [{"what": "RLP step, MB", "measured": peak / 1e6, "estimated": expected / 1e6,
             "ratio": peak / expected, "ok": True}]


# --------------------------------------------------------------------------------------- whole runs


def whole_run(*words: str) -> tuple[dict, Path]:
    """The summary of `train.py WORDS`, and its folder. Raises RuntimeError if it fails."""
    out = Path(tempfile.mkdtemp()) / "run"
    words = ("--out", str(out), "--data.cache-dir", str(out.parent), *words)
    if train.main([*words, "--device", DEVICE.type]) != 0:
        raise RuntimeError(f"train.py {' '.join(words)} failed")
    return read_json(out / "summary.json"), out


def rlp_run() -> Rows:
    """The default preset's RLP with its base, and what it reaches (on a CPU the smoke preset)."""
    summary, _ = whole_run("--preset", "cpu" if ON_CARD else "smoke", "--mode", "rlp")
    sampled = summary["accuracy"]["sampled"]["all"]
    return [{"what": f"--preset {summary['preset']}, base and RLP", "s": summary["wall_s"],
             "base": sampled["base"]["mean"], "RLP": sampled["rlp"]["mean"], "ok": True}]


def sharded() -> Rows:
    """Two processes share one card, weights sharded by FSDP2: their losses are those of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp())
    words = ["--preset", "smoke", "--device", DEVICE.type, "--data.cache-dir", str(folder)]
    alone = [*words, "--rlp.accumulate", "2", "--out", str(folder / "alone")]
    if train.main(alone) != 0:
        raise RuntimeError(f"train.py {' '.join(alone)} failed")
    two = json.dumps([*words, "--parallel.mode", "fsdp", "--out", str(folder / "two")])
    common = {**os.environ, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, "-m", "tools.gpu_check", "--rank", two],
                                env={**common, "RANK": str(rank)}) for rank in range(2)]
    codes = [process.wait() for process in started]
    losses = [[line["loss"] for line in read_log(folder / name / "metrics.jsonl")[0]]
              for name in ("alone", "two")]
    off = max(abs(a - b) for a, b in zip(*losses, strict=True))
    is_right = codes == [0, 0] and off < 1e-3
    return [{"what": "steps of RLP", "codes": codes, "off": off, "ok": is_right}]


# ---------------------------------------------------------------------------------------- all of it


@dataclass(frozen=True)
class Part:
    """One of the checks, and the seconds after which it is stopped."""

    run: Callable[[], Rows]
    limit_s: int
    needs_card: bool = False


PARTS = {
    **{f"values {name}": Part(functools.partial(values, name), 240, name != "tf32x3")
       for name in NUMBERS},
    "integers": Part(integers, 240, True), "repeats": Part(repeats, 60),
    "assemblers": Part(assemblers, 90, True), "speed": Part(speed, 60),
    "decoding": Part(decoding, 120), "compiled": Part(compiled, 120), "memory": Part(memory, 60),
    "rlp": Part(rlp_run, 240), "sharded": Part(sharded, 120)}


def machine() -> dict[str, str]:
    """What the results depend on."""
    found = {**hardware(DEVICE), **versions(), "date": time.strftime("%Y-%m-%d")}
    if ON_CARD:
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(ask, capture_output=True, text=True).stdout
        found |= {"driver": said.split("\n")[0],
                  "card and compiler": kernels_gpu.passed_file(DEVICE, "")[1]}
    return found


def finish(name: str, process: subprocess.Popen, part: Part, began: float) -> dict:
    """Wait for a part; what it found, or why it found nothing."""
    try:
        out, error = process.communicate(timeout=max(1, part.limit_s - time.time() + began))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it has started
        process.communicate()
        return {"part": name, "status": f"failed: longer than {part.limit_s} s", "rows": []}
    took = time.time() - began
    try:
        rows = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        return {"part": name, "status": f"failed: {error.strip()[-500:]}", "seconds": took,
                "rows": []}
    wrong = [row["what"] for row in rows if not row["ok"]]
    status = f"failed: {', '.join(wrong)}" if wrong else "right"
    return {"part": name, "status": status, "seconds": took, "rows": rows}


def start(name: str) -> subprocess.Popen:
    """A part in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "tools.gpu_check", "--part", name], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def check(part: str = "", rank: str = "", out: Path = Path("results"),
          parts: tuple[str, ...] = tuple(PARTS)) -> None:
    """Check kernels, speed, memory and whole runs on this machine's card.

    Args:
        part: Run this part alone, in this process, and print its rows.
        rank: Words of train.py for one of two processes on a card; used by the part `sharded`.
        out: Folder for checked-DEVICE.json.
        parts: Which parts to run.
    """
    if rank:
        dist.init_process_group("gloo")  # NCCL refuses two processes on one card
        sys.exit(parallel.leave(train.main(json.loads(rank))))
    for name in (*parts, *[part] * bool(part)):
        require(name in PARTS, f"part ({name}) is unknown; choose from {', '.join(PARTS)}")
    if part:
        with contextlib.redirect_stdout(sys.stderr):
            rows = PARTS[part].run()
        print(json.dumps(rows))
        return
    # 1. Values side by side: most of their time is the compiler's. The rest alone, for the clock.
    found, began = {}, time.time()
    able = [name for name in parts if ON_CARD or not PARTS[name].needs_card]
    together = {name: start(name) for name in able if name.startswith("values")}
    for name in able:
        since = began if name in together else time.time()
        found[name] = finish(name, together.get(name) or start(name), PARTS[name], since)
        print(f"{name}: {found[name]['status']}", flush=True)
    needs = {"status": "needs a card", "rows": []}
    facts = {"machine": machine(),
             "parts": [{"part": n, **needs, **found.get(n, {})} for n in parts]}
    # 2. The file, and the same as a table.
    file = out / f"checked-{DEVICE.type}.json"
    write_json(file, facts)
    print(f"\n{table(facts)}\n\nwrote {file}")
    failed = [n for n, p in found.items() if p["status"] != "right"]
    require(not failed, f"failed: {', '.join(failed)}")


def table(facts: dict) -> str:
    """Of one machine: every part, how it ended, and its figures."""
    rows = [["part", "", "s", "figures"]]
    for p in facts["parts"]:
        shown = [", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                           for k, v in row.items() if k not in HIDDEN and v not in (None, ""))
                 for row in p["rows"]]
        errors = [row["error"] for row in p["rows"] if "error" in row]
        figures = (f"{len(errors)} cases, largest error {max(errors):.1e}" if errors else
                   "; ".join(f"{row['what']}: {text}" for row, text in
                             zip(p["rows"], shown, strict=True) if text))
        rows.append([p["part"], p["status"], f"{p.get('seconds', 0):.0f}", figures])
    words = ", ".join(f"{k} {v}" for k, v in facts["machine"].items())
    return f"{markdown(rows)}\n\n{words}."


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 if a part failed."""
    return exit_code(lambda: tyro.cli(check, args=argv, prog="python -m tools.gpu_check"))


if __name__ == "__main__":
    sys.exit(main())
