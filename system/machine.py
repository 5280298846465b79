"""The machine that a run is on: device, threads, memory, versions."""

import functools
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from system import parallel
from system.config import Config, ParallelConfig
from system.costs import count_parameters
from system.errors import require

PASSES = 3  # timed, after one to warm up


def pick_device(config: Config) -> torch.device:
    """The device asked for, or CUDA where there is one. Raises ValueError if it is missing."""
    has_cuda = torch.cuda.is_available()
    require(config.device != "cuda" or has_cuda,
            "device (cuda) is not available on this machine; use --device cpu or auto")
    if has_cuda and config.device != "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def set_threads(model: nn.Module, asked: int, device: torch.device) -> str:
    """Use the number of threads asked for, the fastest if that is 0. Returns what to say of it.
    More are not always faster: on cores that others use, the threads of a matrix product wait for
    each other; a step took five times as long. OMP_NUM_THREADS, as torchrun sets it, counts too."""
    if device.type != "cpu":
        return ""
    if asked or "OMP_NUM_THREADS" in os.environ or parallel.team.world > 1:
        torch.set_num_threads(asked or torch.get_num_threads())
        return ""
    ms = {}
    for n in [2**i for i in range((os.cpu_count() or 1).bit_length())]:
        torch.set_num_threads(n)
        ms[n] = pass_ms(model)
    best = min(ms, key=ms.get)
    torch.set_num_threads(best)
    shown = ", ".join(f"{n}: {t:.0f} ms" for n, t in ms.items())
    return f"CPU threads: {best} (a forward pass with {shown}; --threads N sets it)"


def pick_dtype(model: nn.Module, settings: ParallelConfig, saved: str, device: torch.device
               ) -> tuple[str, str]:
    """What to compute in, and what to say of it. For auto that of the run that goes on, if it is
    `saved`; else bf16 on a GPU, and on a CPU, which may emulate it, whichever is faster."""
    asked = saved or "auto" if settings.dtype == "auto" else settings.dtype
    if asked == "fp32" or device.type != "cpu" or saved == asked:
        return "bf16" if asked == "auto" else asked, ""

    def measure() -> tuple[float, float]:
        plain = pass_ms(model)
        with torch.autocast(device.type, torch.bfloat16):
            return plain, pass_ms(model)

    plain, low = parallel.on_first(measure)
    times = (f"a forward pass takes {low:.0f} ms in bf16 and {plain:.0f} ms in fp32 on this "
             "processor")
    if asked == "auto":
        dtype = "bf16" if low < plain else "fp32"
        return dtype, f"{times}: {dtype} (--parallel.dtype sets it)"
    return asked, f"{times}; leave --parallel.dtype at fp32, or give auto" if low > plain else ""


@torch.no_grad()
def pass_ms(model: nn.Module) -> float:
    """The shortest of a few forward passes over 512 tokens, or over 64 for a large model."""
    n_rows = 8 if count_parameters(model) < 10**8 else 1
    tokens_BT = torch.zeros(n_rows, 64, dtype=torch.long)
    times = []
    for _ in range(1 + PASSES):
        began = time.perf_counter()
        hidden_BTD, _ = model(tokens_BT)
        model.logits(hidden_BTD)
        times.append(1e3 * (time.perf_counter() - began))
    return min(times[1:])


def peak_memory_gib(device: torch.device) -> float:
    """The largest memory so far: of the GPU if there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")  # Linux; its ru_maxrss is never below the starter's memory
    if found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text() if status.exists() else ""):
        return int(found[1]) / 2**20
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def hardware(device: torch.device) -> dict[str, str | int]:
    """What a time depends on: the chip's name, the CPU's instructions, the threads."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    chip = named[1] if named else platform.machine()
    return {"machine": torch.cuda.get_device_name(device) if device.type == "cuda" else chip,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Of Python and the libraries that results may depend on, and the commit of the code."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "commit": commit()}


@functools.cache
def commit() -> str:
    """Short hash of the code's commit, with "+" if a .py file differs from it; "" without git."""
    root, options = Path(__file__).parent.parent, {"capture_output": True, "text": True}

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", root, *words], **options, timeout=60)

    if not (root / ".git").exists():  # a folder above may belong to another project
        return ""
    try:
        differs = git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1
        return git("rev-parse", "--short", "HEAD").stdout.strip() + "+" * differs
    except (OSError, subprocess.SubprocessError):
        return ""
