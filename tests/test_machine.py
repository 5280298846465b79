"""The machine: threads are measured, saved with a run and set again; bf16 that is slower is warned of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from system import machine, parallel
from system.checkpoint import newest

CPU = torch.device("cpu")


@pytest.fixture
def threads(monkeypatch):
    """Set by the code under test, put back afterwards; a pass takes 10 ms with two threads and 16 otherwise."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine, "pass_ms", lambda model: 10.0 if torch.get_num_threads() == 2 else 16.0)
    yield
    torch.set_num_threads(before)


def test_the_fastest_number_of_threads_is_taken_and_said(threads, make_model):
    said = machine.set_threads(make_model(), 0, CPU)
    assert torch.get_num_threads() == 2
    assert said == "CPU threads: 2 (a forward pass with 1: 16 ms, 2: 10 ms, 4: 16 ms; --threads N sets it)"


@pytest.mark.parametrize("how", ["asked", "environment"])
def test_a_number_that_is_given_is_not_measured(threads, make_model, monkeypatch, how):
    monkeypatch.setattr(machine, "pass_ms", lambda model: pytest.fail("measured"))
    if how == "environment":
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(3)
    assert machine.set_threads(make_model(), 3 * (how == "asked"), CPU) == ""
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("dtype", "low", "warns"), [("bf16", 30.0, True), ("bf16", 9.0, False), ("fp32", 30.0, False)])
def test_bf16_that_is_slower_is_warned_of(make_model, monkeypatch, dtype, low, warns):
    class Settings:
        pass

    settings = Settings()
    settings.dtype = dtype
    monkeypatch.setattr(parallel.team, "settings", settings)
    monkeypatch.setattr(machine, "pass_ms", lambda model: low if torch.is_autocast_enabled("cpu") else 10.0)
    said = machine.bf16_warning(make_model(), CPU)
    assert (said == "") is not warns
    assert not warns or "takes 30 ms in bf16 and 10 ms in fp32" in said


def test_a_pass_takes_some_time(make_model):
    assert machine.pass_ms(make_model().float()) > 0


def test_a_run_saves_its_threads_and_goes_on_with_them(program, tmp_path, monkeypatch):
    """Another number would round sums otherwise, and the resumed run would not repeat the uninterrupted one."""
    assert program(tmp_path, "--mode", "cpt", "--cpt.steps", 2) == 0
    meta = json.loads((newest(tmp_path).path / "meta.json").read_text())
    assert meta["threads"] == 1
    asked = []
    monkeypatch.setattr("train.set_threads", lambda model, n, device: asked.append(n) or "")
    assert program(tmp_path, "--mode", "cpt", "--cpt.steps", 2, "--threads", 0, "--resume") == 0
    assert asked == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_peak_of_a_process_does_not_count_that_of_its_starter():
    """A process that has held 2 GiB starts another, which needs a quarter of that for torch."""
    held = torch.ones(2**29)
    del held
    assert machine.peak_memory_gib(CPU) > 2
    code = "import torch; from system import machine; print(machine.peak_memory_gib(torch.device('cpu')))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(machine.__file__).parents[1], capture_output=True, text=True
    )
    assert 0.1 < float(ran.stdout) < 1.5
