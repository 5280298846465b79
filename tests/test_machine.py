"""The machine: threads are measured, saved with a run and set again; bf16 that is slower is warned of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from system import machine
from system.checkpoint import newest
from system.config import ParallelConfig

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


@pytest.mark.parametrize(
    ("asked", "saved", "low", "dtype", "says"),
    [
        (
            "bf16",
            "",
            30.0,
            "bf16",
            "takes 30 ms in bf16 and 10 ms in fp32 on this processor; leave --parallel.dtype at fp32",
        ),
        ("bf16", "", 9.0, "bf16", ""),
        ("fp32", "", 9.0, "fp32", ""),
        (
            "auto",
            "",
            9.0,
            "bf16",
            "takes 9 ms in bf16 and 10 ms in fp32 on this processor: bf16 (--parallel.dtype sets it)",
        ),
        ("auto", "", 30.0, "fp32", "takes 30 ms in bf16 and 10 ms in fp32 on this processor: fp32"),
        ("auto", "fp32", 9.0, "fp32", ""),
        ("auto", "bf16", 30.0, "bf16", ""),
        ("bf16", "fp32", 9.0, "bf16", ""),
    ],
)
def test_bf16_is_measured_where_it_is_asked_for_or_may_be_chosen(make_model, monkeypatch, asked, saved, low, dtype, says):
    """auto takes the faster one, and a run that goes on what it was begun with; bf16 that is slower is warned of."""
    monkeypatch.setattr(machine, "pass_ms", lambda model: low if torch.is_autocast_enabled("cpu") else 10.0)
    found, said = machine.pick_dtype(make_model(), ParallelConfig(dtype=asked), saved, CPU)
    assert found == dtype
    assert (says in said) if says else said == ""


@pytest.mark.parametrize(("asked", "dtype"), [("auto", "bf16"), ("bf16", "bf16"), ("fp32", "fp32")])
def test_a_card_computes_in_bf16_without_being_measured(make_model, monkeypatch, asked, dtype):
    monkeypatch.setattr(machine, "pass_ms", lambda model: pytest.fail("measured"))
    assert machine.pick_dtype(make_model(), ParallelConfig(dtype=asked), "", torch.device("cuda")) == (dtype, "")


def test_a_run_saves_what_it_computes_in_and_goes_on_with_it(program, tmp_path, monkeypatch, capsys):
    """Measured once: bf16 is faster here, in the test; the run that goes on does not measure again."""
    monkeypatch.setattr(machine, "pass_ms", lambda model: 9.0 if torch.is_autocast_enabled("cpu") else 10.0)
    words = ("--mode", "cpt", "--parallel.dtype", "auto")
    assert program(tmp_path, *words, "--cpt.steps", 2) == 0
    assert "9 ms in bf16 and 10 ms in fp32" in " ".join(capsys.readouterr().out.split())
    assert json.loads((newest(tmp_path).path / "meta.json").read_text())["dtype"] == "bf16"
    assert json.loads((tmp_path / "config.json").read_text())["config"]["parallel"]["dtype"] == "bf16"
    monkeypatch.setattr(machine, "pass_ms", lambda model: pytest.fail("measured"))
    assert program(tmp_path, *words, "--cpt.steps", 2, "--resume") == 0


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
