"""The command that proves a card: its parts at small sizes on a CPU, what it notices, and how it ends."""

import json
import subprocess
import sys
import time

import pytest
import torch

import kernels
from tools import gpu_check as check
from tools import report


def part_of(code, limit_s=60):
    """A part whose process runs this code."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    return check.finish("this", process, check.Part(list, limit_s), time.time())


def test_parts_end_right_failed_or_stopped():
    row = {"what": "a", "ok": True}
    assert part_of(f"print('noise'); print('''{json.dumps([row])}''')")["status"] == "right"
    wrong = [row, {"what": "b", "ok": False}, {"what": "c", "ok": False}]
    assert part_of(f"print('''{json.dumps(wrong)}''')")["status"] == "failed: b, c"
    assert part_of("raise KeyError('lost')")["status"].endswith("KeyError: 'lost'")
    began = time.time()
    assert part_of("import time; time.sleep(60)", limit_s=1)["status"] == "failed: longer than 1 s"
    assert time.time() - began < 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a card it takes minutes")
def test_without_a_card_every_part_that_needs_none_runs_and_the_others_say_so(tmp_path, capfd):
    assert check.main(["--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "checked-cpu.json").read_text())
    found = {p["part"]: p for p in facts["parts"]}
    assert list(found) == list(check.PARTS)
    for name, part in check.PARTS.items():
        assert found[name]["status"] == ("needs a card" if part.needs_card else "right"), found[name]
    rows = found["values tf32x3"]["rows"]
    assert {row["what"].split(" ")[0] for row in rows} == {"scan", "step", "convolution", "norm", "log-probabilities"}
    assert all(0 < row["error"] < row["bound"] for row in rows)
    assert {row["what"] for row in found["speed"]["rows"]} >= {"scan", "its backward", "convolution", "norm"}
    assert found["decoding"]["rows"][0]["waits a step"] > 0
    assert [row["what"] for row in found["compiled"]["rows"]] == ["block M", "block *", "block -"]
    assert all(0 <= row["error"] < 1e-6 for row in found["compiled"]["rows"])
    assert found["sharded"]["rows"][0]["codes"] == [0, 0]
    assert "| values bf16 | needs a card | 0 |  |" in capfd.readouterr().out
    head, row = report.checked_rows([facts])
    assert head[4:] == ["right", "failed", "needs a card"]
    assert row[4:] == ["values tf32x3, repeats, speed, decoding, compiled, memory, rlp, sharded", "none",
                       "values bf16, values fp16, values tf32, integers, assemblers"]  # fmt: skip


@pytest.mark.parametrize("name", ["ssd", "ssd_step", "causal_conv", "gated_norm", "selected_logp"])
def test_an_operation_that_is_a_thousandth_off_is_noticed(monkeypatch, name):
    right = getattr(kernels, name)

    def off(*args, **kwargs):
        found = right(*args, **kwargs)
        return (found[0] * 1.001, *found[1:]) if isinstance(found, tuple) else found * 1.001

    monkeypatch.setattr(kernels, name, off)
    assert {row["ok"] for row in check.values("tf32x3")} == {True, False}


def test_repeats_that_differ_in_a_bit_are_noticed(monkeypatch):
    right, calls = kernels.ssd, []

    def unsteady(*args, **kwargs):
        calls.append(0)
        y, state = right(*args, **kwargs)
        return y + (len(calls) == 3) * 1e-6, state

    monkeypatch.setattr(kernels, "ssd", unsteady)
    (row,) = check.repeats()
    assert not row["ok"]
    assert row["same"] == 2


def test_waits_are_counted_by_hand():
    """Reading a number, taking rows by a mask, and looking whether any is set; sums and comparisons wait for nothing."""
    t = torch.arange(5.0)
    with check.Waits() as counted:
        (t + 1).sum()
        assert counted.n == 0
        t.sum().item()
        t[t > 2]
        bool((t > 9).any())
    assert counted.n == 3


def test_unknown_parts_are_refused(capsys):
    assert check.main(["--part", "magic"]) == 2
    assert "part (magic) is unknown; choose from values bf16" in capsys.readouterr().err


def test_of_a_gradient_that_cancels_a_fifth_of_the_error_counts():
    """y = a b, both 3 long; a wrong by 1e-3 in its gradient alone."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx, grad):
            a, b = ctx.saved_tensors
            return 1.001 * grad * b, grad * a

    inputs = [check.random(3), check.random(3) + 5]
    found = [check.worst(Off.apply, torch.mul, inputs, torch.float64, i) for i in (None, 0, 1)]
    assert found == pytest.approx([1e-3, 2e-4, 1e-3])
