"""Every benchmark at tiny sizes: its contestants agree, and its table shows what it returns. No time is asserted."""

import dataclasses
import json
import subprocess

import pytest
import torch
from torch.testing import assert_close

import kernels
from model import HybridLM
from system.config import ModelConfig
from system.huggingface import save_hf
from tools import bench
from views import tables

CPU = torch.device("cpu")
TINY_MODEL = ModelConfig(pattern="M*-", d_model=16, d_ff=24, n_heads=2, n_kv_heads=1, attn_head_dim=8, mamba_heads=4,
                         mamba_head_dim=4, d_state=6, chunk=4)  # fmt: skip
TINY_LLAMA = dataclasses.replace(TINY_MODEL, pattern="*-*-", ffn="swiglu", rope_theta=10000.0)
TINY = {
    "ssd": {"B": 2, "T": 16, "H": 4, "P": 3, "N": 5, "Q": 4, "default": 8},
    "mixer": {"B": 2, "T": 16, "D": 8, "H": 4, "P": 3, "N": 5, "Q": 4, "lengths": (8, 16, 32)},
    "decode": {"B": 2, "T": 6, "D": 8, "H": 4, "P": 3, "N": 5, "n_steps": 3},
    "logp": {"T": 7, "D": 5, "V": 11},
    "base-step": {"B": 2, "T": 9, "V": 20, "model": TINY_MODEL},
    "rlp-step": {"B": 2, "T": 9, "G": 3, "L": 5, "V": 20, "model": TINY_MODEL},
    "rlp-trl": {"B": 2, "T": 9, "G": 3, "L": 5, "V": 20, "model": TINY_LLAMA},
    "elastic-step": {"B": 2, "T": 9, "V": 20, "model": dataclasses.replace(TINY_MODEL, pattern="MM--*")},
}


@pytest.fixture(scope="module", params=TINY)
def found(request):
    """What a benchmark returns."""
    return bench.measure(request.param, CPU, repeats=1, **TINY[request.param])


def test_every_contestant_that_can_run_here_has_the_result_of_ours(found):
    """To 1e-4 of the largest value, in every output and gradient; those that cannot run say why."""
    ours, *others = found["rows"]
    assert ours["note"] == ""
    assert any("difference" in row for row in others) or found["bench"] in ("mixer", "decode", "rlp-trl")  # all peers
    for row in others:
        assert row.get("difference", 0.0) < (5e-2 if row["name"].endswith("bf16") else 1e-4)
        other_work = ("V = 88", "on the text alone", "two teachers", "AdamW alone")
        is_other_work = row["name"].startswith(("100 %", "100, 75")) or row["name"].endswith(other_work)
        assert ("difference" in row) != (is_other_work or row["note"] != ""), row
        assert row["note"] == "" or row["note"].startswith(("not installed: pip install ", "needs a GPU"))


def test_every_contestant_that_ran_has_a_time_a_ratio_and_a_memory(found):
    for row in found["rows"]:
        assert ("ms" in row) == (row["note"] == "")
        if "ms" in row:
            assert row["ms"] > 0
            assert row["peak_bytes"] > 0
            assert row["times_ours"] == pytest.approx(row["ms"] / found["rows"][0]["ms"])


def test_what_a_benchmark_returns_is_what_its_table_shows(found):
    """Through JSON, as in results/."""
    table = tables.bench_table(json.loads(json.dumps(found)))
    assert all(f"| {row['name']} |" in table for row in found["rows"])
    assert found["title"] in table
    assert ("tokens | 8 | 16 | 32" in table) == ("growth" in found)
    assert f"commit {found['versions']['commit'] or 'before'}" in table
    assert torch.backends.cpu.get_cpu_capability() in table


def test_tests_run_every_benchmark():
    assert set(bench.BENCHES) == set(TINY)


# ------------------------------------------------------------------------------------------------------- the harness


def contestants(*values):
    return [bench.Contestant(f"number {i}", lambda v=v: [torch.tensor([v])]) for i, v in enumerate(values)]


def test_a_contestant_with_another_result_is_not_timed():
    """0.3 % off; a difference of 0.003 % passes; NaN does not."""
    work = bench.Work("work", 1, contestants(1.0, 1.003, 1.00003, float("nan")))
    rows = bench.compare(work, 1, CPU)["rows"]
    assert [("ms" in row) for row in rows] == [True, False, True, False]
    assert rows[1]["note"] == "not timed: differs from ours by 3.0e-03"


def test_a_contestant_that_fails_is_reported_and_ours_must_not_fail():
    def fail():
        raise RuntimeError("no such kernel")

    broken = bench.Contestant("broken", fail)
    row = bench.compare(bench.Work("work", 1, [*contestants(1.0), broken]), 1, CPU)["rows"][1]
    assert row["note"] == "fails: RuntimeError('no such kernel')"
    with pytest.raises(RuntimeError, match="no such kernel"):
        bench.compare(bench.Work("work", 1, [broken]), 1, CPU)


def test_a_peer_that_is_missing_is_named_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    found = bench.measure("ssd", CPU, 1, **TINY["ssd"])
    notes = [row["note"] for row in found["rows"] if row["note"]]
    expected = {f"not installed: pip install {pip}" for name, pip in bench.PIP.items() if name != "trl"}
    assert set(notes) == expected
    assert all(note in tables.bench_table(found) for note in notes)


def test_peak_memory_by_hand():
    """1 MB; then 2 MB beside it; the first one is let go before 4 MB come: 1 + 2 at most, then 2 + 4."""

    def run():
        a = torch.ones(250_000)
        b = torch.ones(500_000)
        del a
        return [b, torch.ones(1_000_000)]

    assert bench.peak_bytes(run, CPU) == 6_000_000


def test_turns_are_taken_in_rounds_and_one_that_takes_long_sits_out_after_three(monkeypatch):
    monkeypatch.setattr(bench, "ENOUGH_S", 0.0)
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = bench.take_turns(runs, 5, CPU)
    assert order == ["a", "b"] * 3
    assert [len(s) for s in seconds.values()] == [3, 3]


def test_the_power_of_growth_by_hand(monkeypatch):
    """5 ns times the tokens to the power 1.5."""
    tokens = (1000, 2000, 4000, 8000)
    monkeypatch.setattr(bench, "take_turns", lambda runs, *_: {n: [5e-9 * n**1.5] for n in runs})
    found = bench.growth({n: lambda: [torch.ones(1)] for n in tokens}, 1, CPU)
    assert found["exponent"] == pytest.approx(1.5)
    assert found["ms"] == pytest.approx([5e-6 * n**1.5 for n in tokens])


def test_a_training_step_of_the_base_is_the_loops_own_and_its_contestants_differ_by_their_optimizer():
    """One step from the same weights: torch's Muon differs from ours by the rounding of bf16, AdamW alone by a step."""
    ours, torchs, adam = (c.run() for c in bench.base_step_work(CPU, **TINY["base-step"]).contestants)
    assert 0 < bench.difference(torchs, ours) < 5e-2
    assert bench.difference(adam, ours) > 5e-2


# ---------------------------------------------------------------------------------- contestants that are written here


def test_the_papers_listing_equals_the_recurrence_in_fp64():
    B, T, H, P, K, N = 2, 12, 4, 3, 2, 5
    shapes = [(B, T, H, P), (B, T, H), (H,), (B, T, K, N), (B, T, K, N), (H,)]
    x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    inputs = x_BTHP, dt_BTH.exp(), -a_H.exp(), b_BTKN, c_BTKN, d_H
    expected_BTHP, _ = kernels.ssd_reference(*inputs)
    assert_close(bench.ssd_listing(*inputs, chunk=4), expected_BTHP, rtol=1e-9, atol=1e-9)


def test_segment_sums_by_hand():
    """Of (1, 2, 4): 2 from 0 to 1, 6 from 0 to 2, 4 from 1 to 2; nothing from a place to itself."""
    inf = float("inf")
    assert bench.segment_sums(torch.tensor([1.0, 2.0, 4.0])).tolist() == [[0, -inf, -inf], [2, 0, -inf], [6, 4, 0]]


@pytest.mark.parametrize("pattern", ["M", "*", "M*-"])
def test_the_plain_way_of_rlp_has_the_gradients_of_ours_in_fp64(pattern):
    """A context that is run once for G thoughts gets the gradients of G copies, through Mamba states and through attention.

    Nothing on the way may be in fp32: rewards and the log-probabilities of sampling neither.
    """
    model = dataclasses.replace(TINY_MODEL, pattern=pattern)
    work = bench.rlp_step_work(CPU, **TINY["rlp-step"] | {"model": model, "dtype": torch.float64})
    ours, plain = (contestant.run() for contestant in work.contestants)
    assert {t.dtype for t in (*ours, *plain)} == {torch.float64}
    assert min(t.abs().max() for t in ours[2:]) > 0
    assert bench.difference(plain, ours) < 1e-10


# --------------------------------------------------------------------------------------------------------- the program


def test_the_program_writes_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "BENCHES", {"decode": lambda device: bench.decode_work(device, **TINY["decode"])})
    assert bench.main(["decode", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name == "bench-decode-cpu.json"
    assert tables.bench_table(json.loads(file.read_text())) in capsys.readouterr().out


def test_all_runs_every_benchmark_with_the_options_given(tmp_path, monkeypatch):
    """Each in a process of its own; one that fails does not stop the others, and is told."""
    commands = []

    def run(words):
        commands.append(words[1:])
        return subprocess.CompletedProcess(words, int(words[3] == "mixer"))

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert bench.main(["all", "--repeats", "3", "--out", str(tmp_path)]) == 1
    assert commands == [["-m", "tools.bench", name, "--repeats", "3", "--out", str(tmp_path)] for name in bench.BENCHES]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ssd", "--repeats", "0"], "repeats (0) must be at least 1"),
        (["ssd", "--model", "DIR"], "model (DIR) is for rlp-trl, not for ssd"),
        (["rlp-trl", "--alone", "ours"], "alone (ours) needs --model, the directory of a Llama"),
    ],
)
def test_options_that_say_nothing_are_refused(words, message, capsys):
    assert bench.main(words) == 2
    assert f"error: {message}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- a directory's model


@pytest.fixture
def llama(tmp_path):
    """The directory of a tiny Llama. Of 512 tokens drawn from 4,096 hardly one closes its thought."""
    model = HybridLM(dataclasses.replace(TINY_LLAMA, vocab_size=4096))
    save_hf(tmp_path / "llama", model.config, model.state_dict())
    return tmp_path / "llama"


def test_with_a_directory_every_contestant_is_measured_in_a_process_of_its_own(llama, tmp_path, monkeypatch, capsys):
    """Seconds 1, 2, 6 of ours: median 2; of TRL 8: 4 times ours. Nothing is run here, not even to compare results."""
    monkeypatch.setattr(bench, "find_spec", lambda name: True)
    monkeypatch.setattr(bench, "version", lambda name: f"{name} of today")
    lines = {"ours": "[[1, 2, 6], 30]", "TRL GRPOTrainer": "TRL says hello\n[[8], 70]"}
    commands = []

    def run(words, **_):
        commands.append(words[1:])
        return subprocess.CompletedProcess(words, 0, lines.get(words[words.index("--alone") + 1], "[[6], 50]"))

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench, "RLP", None)
    out = str(tmp_path / "out")
    assert bench.main(["rlp-trl", "--model", str(llama), "--repeats", "3", "--device", "cpu", "--out", out]) == 0
    found = json.loads((tmp_path / "out" / "bench-rlp-trl-llama-cpu.json").read_text())
    rows = [(row["ms"], row["times_ours"], row["peak_bytes"]) for row in found["rows"]]
    assert rows == [(2000, 1, 30), (8000, 4, 70), (6000, 3, 50)]
    options = ["--model", str(llama), "--alone", "ours", "--device", "cpu", "--threads", "1", "--repeats", "3"]
    assert commands[0] == ["-m", "tools.bench", "rlp-trl", *options]
    assert found["versions"]["trl"] == "trl of today"
    assert "Each in a process of its own" in capsys.readouterr().out


def test_a_contestant_alone_tells_its_seconds_and_the_peak_of_its_process(llama, capsys):
    assert bench.main(["rlp-trl", "--model", str(llama), "--alone", "ours", "--repeats", "2", "--device", "cpu"]) == 0
    seconds, peak = json.loads(capsys.readouterr().out)
    assert len(seconds) == 2
    assert min(seconds) > 0
    assert peak > 2**27  # torch alone is more
    assert bench.main(["rlp-trl", "--model", str(llama), "--alone", "theirs"]) == 2
    assert "alone (theirs) does not run; choose one of ['ours', " in capsys.readouterr().err


def test_a_step_of_a_llama_is_the_loops_own_with_full_thoughts_and_leaves_the_weights(monkeypatch):
    """Its gradients are those of the prepared batch, divided by its R = B G thoughts, and a second step has them too."""
    prepared = []
    whole = bench.RLP.prepare
    monkeypatch.setattr(bench.RLP, "prepare", lambda *args: prepared.append((args, whole(*args))) or prepared[-1][1])
    ours = bench.rlp_trl_work(CPU, **TINY["rlp-trl"]).contestants[0]
    first, second = ours.run(), ours.run()
    (objective, network, *_), batch = prepared[-1]
    assert (batch["thoughts"].length_R == 5).all()
    assert_close(second, first, rtol=0, atol=0)
    batch.pop("old_logp_RL", None)
    loss, n_thoughts, _ = objective.loss(network, batch)
    assert n_thoughts == 6
    names = list(bench.names(network.config, "llama"))
    expected = torch.autograd.grad(loss / n_thoughts, [network.get_parameter(name) for name in names])
    assert_close(first, [batch["gain_R"], *expected], rtol=1e-5, atol=1e-7)
    assert max(float(g.abs().max()) for g in expected) > 0
