"""Two processes compute what one computes; runs go on with another number of them; what breaks off says how to go on.

One process with two parts equals two processes with one part each: in fp64, but for the order of sums.
"""

import dataclasses
import json
import math
import pickle
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import two_processes
from conftest import metrics_of
from torch import nn
from two_processes import CPU, MODES, ROOT, TOKENIZER, launch, make_batch, options, run

import generate
import train
from rlp import RLP
from system import checkpoint, loop, parallel, rundir
from system.config import Config, ParallelConfig
from system.presets import PRESETS

ROUNDED = ("muon", "bf16")  # both compute in bf16 (Muon its updates): a last bit may become a rounding of 0.4 %
NETWORKS = {"rlp": {"model", "teacher", "reference"}, "elastic": {"model", "router", "stage1"}}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(autouse=True)
def alone():
    """Whatever a test sets up is gone after it."""
    yield
    parallel.stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs: MODE-one by one process with two parts, the others by two processes (see `everything`)."""
    folder = tmp_path_factory.mktemp("parallel")
    for mode in (*MODES, "lora"):
        parallel.start(options(mode), CPU)
        run(mode, folder / f"{mode}-one", accumulate=2)
    for mode in ("rlp", "elastic"):
        copy_up_to(2, folder / f"{mode}-one", folder / f"{mode}-resumed")
    parallel.stop()
    (folder / "null").write_text("as it was")
    processes = launch("everything", folder, port=free_port())
    outputs = [p.communicate(timeout=900)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)
    return folder


def copy_up_to(step, run_dir, target):
    """A run as a crash after that step's checkpoint leaves it."""
    shutil.copytree(run_dir, target)
    for path in (target / "checkpoint").glob("step_*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def assert_same_run(one, other):
    """Networks, AdamW's moments by way of the weights they make, and every line of metrics."""
    found = [checkpoint.newest(run_dir) for run_dir in (one, other)]
    assert found[0].networks() == found[1].networks()
    assert found[0].meta["step"] == found[1].meta["step"] == two_processes.STEPS
    for name in found[0].networks():
        torch.testing.assert_close(found[0].tensors(name), found[1].tensors(name), rtol=1e-9, atol=1e-9)
    lines = [metrics_of(run_dir) for run_dir in (one, other)]
    assert len(lines[0]) == two_processes.STEPS
    for first, second in zip(*lines, strict=True):
        assert first == pytest.approx(second, rel=1e-9, abs=1e-12)


def deviation(runs, mode):
    """Mean distance of the sharded run's weights from those of one process, over how far training moved them on average."""
    flat = [
        torch.cat([t.flatten().double() for _, t in sorted(checkpoint.Checkpoint(path, {}).tensors("model").items())])
        for path in (runs / f"{mode}-{name}" / "checkpoint" / step for name, step in
                     (("one", "step_000002"), ("one", "step_000004"), ("fsdp", "step_000004")))
    ]  # fmt: skip
    return float((flat[2] - flat[1]).abs().mean() / (flat[1] - flat[0]).abs().mean())


# ------------------------------------------------------------------------------------------------- the same computation


@pytest.mark.parametrize("sharing", ["data", "fsdp"])
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_make_the_losses_and_weights_of_one(runs, mode, sharing):
    """What runs in bf16 is equal with the data shared out; sharded, its losses are close, and its weights on average."""
    if mode in ROUNDED and sharing == "fsdp":
        for first, second in zip(metrics_of(runs / f"{mode}-one"), metrics_of(runs / f"{mode}-fsdp"), strict=True):
            assert first == pytest.approx(second, rel=5e-3)
        assert deviation(runs, mode) < 0.1
    else:
        assert_same_run(runs / f"{mode}-one", runs / f"{mode}-{sharing}")
    assert set(checkpoint.newest(runs / f"{mode}-{sharing}").networks()) == NETWORKS.get(mode, {"model"})


def test_two_processes_train_adapters_as_one_does(runs):
    """Weights, teacher and reference, which share what is frozen; and adapters do change."""
    assert_same_run(runs / "lora-one", runs / "lora-data")
    tensors = checkpoint.newest(runs / "lora-one").tensors("model")
    assert all(t.abs().max() > 0 for name, t in tensors.items() if name.endswith("lora_b"))
    assert tensors.keys() - checkpoint.newest(runs / "rlp-one").tensors("model").keys()


@pytest.mark.parametrize("mode", MODES)
def test_sharded_runs_write_sharded_checkpoints_and_leave_whole_weights(runs, mode):
    data, fsdp = (checkpoint.newest(runs / f"{mode}-{sharing}") for sharing in ("data", "fsdp"))
    assert (data.is_sharded, fsdp.is_sharded) == (False, True)
    assert {"shards/__0_0.distcp", "shards/__1_0.distcp", "shards/.metadata"} <= fsdp.meta["files"].keys()
    for sharing, found in (("data", data), ("fsdp", fsdp)):
        left = torch.load(runs / f"{mode}-{sharing}" / "left.pt", weights_only=True)
        torch.testing.assert_close(left, found.tensors("model"), rtol=0, atol=0)


def test_only_the_first_process_writes_a_log(runs):
    """The others once wrote theirs over the null device."""
    assert (runs / "null").read_text() == "as it was"
    assert not list(runs.glob("null.*"))


def test_such_runs_change_their_weights(runs):
    """Else the tests above would say little."""
    for mode in MODES:
        older, newer = (checkpoint.Checkpoint(p, {}) for p in sorted((runs / f"{mode}-one" / "checkpoint").iterdir()))
        for name in set(older.networks()) - {"reference", "stage1"}:
            before, after = older.tensors(name), newer.tensors(name)
            assert any(not torch.equal(before[k], after[k]) for k in before), (mode, name)


def test_bf16_keeps_weights_and_moments_in_fp32(runs):
    for sharing in ("one", "fsdp"):
        found = checkpoint.newest(runs / f"bf16-{sharing}")
        assert {t.dtype for t in found.tensors("model").values()} == {torch.float32}
    moments = checkpoint.newest(runs / "bf16-one").optimizer()[0]["state"][0]
    assert moments["exp_avg"].dtype == moments["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("mode", ["pretrain", "rlp", "elastic"])
def test_bf16_computes_in_bf16_what_is_close_to_the_full_precision(tmp_path, mode):
    lines = []
    for dtype in ("bf16", "fp32"):
        parallel.start(ParallelConfig(dtype=dtype), CPU)
        run(mode, tmp_path / dtype)
        lines.append(metrics_of(tmp_path / dtype))
    assert all(math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0 for line in lines[0])
    if mode != "rlp":  # whose thoughts may differ from the first token on
        assert lines[0][0]["loss"] == pytest.approx(lines[1][0]["loss"], rel=2e-2)
    assert lines[0] != lines[1]


def test_rollouts_in_bf16_come_from_bf16_matrices_and_leave_the_weights_alone():
    parallel.start(options("bf16"), CPU)
    model = rundir.build_model(PRESETS["smoke"], 32, CPU, seed=0)
    sampled = parallel.whole(model, for_sampling=True)
    dtypes = {name: p.dtype for name, p in sampled.named_parameters()}
    assert dtypes["layers.0.mixer.in_proj.weight"] == dtypes["head.weight"] == torch.bfloat16
    assert dtypes["embed.weight"] == dtypes["layers.0.mixer.A_log"] == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    batch = make_batch("rlp", 0)
    config = dataclasses.replace(PRESETS["smoke"].rlp, horizon=2)
    with parallel.compute():
        prepared = RLP(config, TOKENIZER).prepare(model, batch, 0, torch.Generator().manual_seed(0))
    assert prepared["gain_R"].isfinite().all()


def test_rollouts_in_bf16_read_a_tied_head_in_bf16_and_embed_in_fp32():
    parallel.start(options("bf16"), CPU)
    tied = dataclasses.replace(PRESETS["smoke"].model, tie_embeddings=True)
    model = rundir.build_model(dataclasses.replace(PRESETS["smoke"], model=tied), 32, CPU, seed=0)
    sampled, tokens_BT = parallel.whole(model, for_sampling=True), torch.arange(10).view(2, 5)
    assert sampled.output_matrix.dtype == torch.bfloat16
    assert torch.equal(sampled.embed.weight, model.embed.weight)
    with torch.no_grad(), parallel.compute():
        expected_BTV, found_BTV = (network.logits(network(tokens_BT)[0]) for network in (model, sampled))
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["pretrain", "rlp", "elastic"])
def test_activation_checkpointing_changes_nothing(runs, tmp_path, mode):
    parallel.start(options(mode, activation_checkpointing=True), CPU)
    run(mode, tmp_path, accumulate=2)
    assert_same_run(runs / f"{mode}-one", tmp_path)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("mode", ["pretrain", "elastic"])
def test_compiled_blocks_compute_the_same(runs, tmp_path, mode):
    """Of elastic the full model: what is cut out of a block or masked in it runs as it is. The rest stays compiled to the
    end: at its limit of graphs the compiler gives up."""
    parallel.start(options(mode, compile=True), CPU)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        run(mode, tmp_path, accumulate=2)
    assert_same_run(runs / f"{mode}-one", tmp_path)


def test_activation_checkpointing_keeps_less(tmp_path):
    """Tensors saved for the backward pass, counted."""
    kept = []
    for asked in (False, True):
        parallel.start(options("pretrain", activation_checkpointing=asked), CPU)
        model = parallel.shard(rundir.build_model(PRESETS["smoke"], 32, CPU, seed=0))
        kept.append(0)

        def keep(t):
            kept[-1] += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            train.NextToken().loss(model, make_batch("pretrain", 0))
    assert kept[1] < kept[0] / 2


def test_weights_are_gathered_once_a_step():
    parallel.start(options("pretrain", activation_checkpointing=True), CPU)
    model = parallel.shard(rundir.build_model(PRESETS["smoke"], 32, CPU, seed=0))
    with parallel.gathering_once():
        assert parallel.whole(model) is parallel.whole(model) is not model
    assert parallel.whole(model) is not parallel.whole(model)


# ------------------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("sharing", ["data", "fsdp"])
@pytest.mark.parametrize("mode", ["pretrain", "rlp", "elastic"])
def test_a_run_of_two_processes_goes_on_with_one(runs, tmp_path, mode, sharing):
    copy_up_to(2, runs / f"{mode}-{sharing}", tmp_path / "run")
    parallel.start(options(mode), CPU)
    run(mode, tmp_path / "run", accumulate=2, start=checkpoint.newest(tmp_path / "run"))
    assert_same_run(runs / f"{mode}-one", tmp_path / "run")


@pytest.mark.parametrize("mode", ["rlp", "elastic"])
def test_a_run_of_one_process_goes_on_sharded_over_two(runs, mode):
    assert_same_run(runs / f"{mode}-one", runs / f"{mode}-resumed")


def test_a_damaged_shard_is_named_and_the_checkpoint_before_is_taken(runs, tmp_path):
    shutil.copytree(runs / "pretrain-fsdp", tmp_path / "run")
    shard = checkpoint.newest(tmp_path / "run").path / "shards" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    found = checkpoint.newest(tmp_path / "run")
    assert found.meta["step"] == 2
    assert f"{shard} has" in found.warning


def test_reading_shards_never_runs_code(tmp_path):
    """Their description is a pickle: only torch's classes for it are looked up."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / ".metadata").write_bytes(pickle.dumps(print))
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print does not belong"):
        checkpoint.Checkpoint(tmp_path, {}).networks()


def test_a_lost_process_ends_the_other_and_the_run_goes_on_alone(runs, tmp_path):
    """The second is killed in the third step. One process with two parts then makes the run that nothing disturbed."""
    processes = launch("lose_one", tmp_path, port=free_port())
    outputs = [p.communicate(timeout=900)[0] for p in processes]
    assert [p.returncode for p in processes] == [1, -9], outputs[0]
    shown = " ".join(outputs[0].split())
    assert "process 0: another process was lost" in shown
    assert f"what was saved in {tmp_path} stays usable; go on with --resume, on any number of processes" in shown
    start = checkpoint.newest(tmp_path)
    assert (start.meta["step"], start.warning) == (2, "")
    parallel.start(options("pretrain"), CPU)
    run("pretrain", tmp_path, accumulate=2, start=start)
    assert_same_run(runs / "pretrain-one", tmp_path)


def test_processes_that_find_different_things_end_together(tmp_path):
    """The first decides what is enough. Where only one cannot go on, it says so and ends, and does not wait to save."""
    processes = launch("apart", tmp_path, port=free_port())
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert [line["step"] for line in metrics_of(tmp_path / "enough")] == [1, 2]
    assert checkpoint.newest(tmp_path / "enough").meta["step"] == 2
    said = " ".join(outputs[1].split())
    assert "step 2: mine.py, line 3: no answer; mend it; the weights before it are in the newest checkpoint" in said
    assert "another process was lost" not in said
    assert all(p.returncode for p in processes)


def test_processes_that_read_different_problems_are_refused(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        parallel, "everyone", lambda value: [value, f"other {value}"] if isinstance(value, str) else [value]
    )
    assert program(tmp_path / "run") == 2
    assert "the processes read different texts or problems; give all of them" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()


def test_memory_that_runs_out_ends_with_what_to_change_and_a_usable_checkpoint(runs, tmp_path, monkeypatch, capsys):
    def exhaust(step):
        if step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "run", lambda config: run("pretrain", config.run_dir(), 2, before_step=exhaust))
    assert train.main(["--preset", "smoke", "--mode", "pretrain", "--out", str(tmp_path)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "out of memory (CUDA out of memory. Tried",
        "--pretrain.accumulate",
        "--parallel.activation-checkpointing",
    ):
        assert part in shown
    start = checkpoint.newest(tmp_path)
    assert start.meta["step"] == 2
    run("pretrain", tmp_path, 2, start=start)
    assert_same_run(runs / "pretrain-one", tmp_path)


def test_other_errors_are_raised_as_they_are(monkeypatch):
    def fail(config):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(train, "run", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train.main([])


# ----------------------------------------------------------------------------------------------------------- the rules


def test_a_process_that_is_alone_trains_the_model_it_was_given():
    model = nn.Linear(2, 2)
    assert parallel.shard(model) is parallel.whole(model) is model
    assert parallel.everyone(3) == [3]
    assert parallel.is_first()


def test_parts_of_a_batch_are_dealt_out_in_order(monkeypatch):
    dealt = []
    for world, accumulate in ((1, 4), (2, 2), (4, 1)):
        monkeypatch.setattr(parallel.team, "world", world)
        settings = dataclasses.replace(PRESETS["smoke"].cpt, accumulate=accumulate)
        for rank in range(world):
            monkeypatch.setattr(parallel.team, "rank", rank)
            dealt.append(list(parallel.parts_of(settings)))
    assert [i for parts in dealt for i in parts] == [0, 1, 2, 3] * 3


def test_the_first_parts_noise_is_that_of_the_whole_step():
    """Runs with one part stay what they were; parts differ."""
    draws = [torch.rand(3, generator=loop.noise(CPU, 0, 5, "rlp", part)).tolist() for part in (0, 1, 2)]
    seed = int(train.fingerprint([0, 5, "rlp"]), 16)
    assert draws[0] == torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
    assert len({tuple(d) for d in draws}) == 3


def test_a_batch_that_cannot_be_dealt_out_is_refused(monkeypatch):
    monkeypatch.setattr(parallel.team, "world", 3)
    told = r"pretrain: 8 equal parts .* 3 processes x pretrain.accumulate \(1\); nearest is 9"
    with pytest.raises(ValueError, match=told):
        loop.check_rows(PRESETS["cpu"].pretrain, "pretrain")
    monkeypatch.setattr(parallel.team, "world", 8)
    with pytest.raises(ValueError, match="elastic: 4 equal parts"):
        loop.check_rows(PRESETS["cpu"].elastic, "elastic")


def test_means_weigh_the_parts_of_all_processes():
    """Two processes, the second without text: loss (6 + 2) / (3 + 1), gain_text 5 / 2."""
    totals = loop.add_up([{"loss": (6.0, 3), "gain_text": (5.0, 2)}, {"loss": (2.0, 1)}])
    assert {name: total / count for name, (total, count) in totals.items()} == {"loss": 2.0, "gain_text": 2.5}


def test_sums_and_counts_are_read_as_numbers_whatever_holds_them():
    metrics = {
        "loss": (torch.tensor(1.5), 3),
        "some": (torch.tensor(0.1, dtype=torch.float64), torch.tensor(4)),
        "none": (0, 0),
    }
    found = loop.numbers(metrics)
    assert found == {"loss": (1.5, 3), "some": (0.1, 4), "none": (0.0, 0)}
    assert all(isinstance(total, float) and isinstance(n, int) for total, n in found.values())


def test_parallel_settings_do_not_make_another_base_or_another_run():
    plain, other = Config(), Config(parallel=ParallelConfig(mode="fsdp", dtype="bf16", compile=True))
    assert plain.base_fingerprint() == other.base_fingerprint()
    assert rundir.shared_settings(plain) == rundir.shared_settings(other)


def test_a_predictor_term_is_refused_where_weights_are_sharded(monkeypatch):
    """Processes whose thoughts stand at other places would run other numbers of passes."""
    config = PRESETS["smoke"]
    with_term = dataclasses.replace(config, rlp=dataclasses.replace(config.rlp, predictor=0.1))
    refuse, shape = train.MODES["rlp"].refuse, dataclasses.replace(config.model, vocab_size=512)
    refuse(shape, with_term, CPU)
    monkeypatch.setattr(parallel.team, "world", 2)
    refuse(shape, with_term, CPU)  # too small for auto to shard
    monkeypatch.setattr(parallel.team, "settings", ParallelConfig(mode="fsdp"))
    refuse(shape, config, CPU)
    with pytest.raises(ValueError, match=r"rlp\.predictor \(0\.1\) must be 0 .* set it to 0, or parallel\.mode to data"):
        refuse(shape, with_term, CPU)


def test_errors_of_the_network_mean_a_lost_process_only_where_there_are_others(monkeypatch):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    assert not parallel.is_lost(error)
    monkeypatch.setattr(parallel.team, "world", 2)
    assert parallel.is_lost(error)
    assert not parallel.is_lost(RuntimeError("shapes differ"))


def test_the_norm_of_the_gradient_is_clipped_as_torch_does():
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    weights[0].grad = torch.full((3,), 2.0)
    assert parallel.clip_gradients(weights, 1.0) == pytest.approx(math.sqrt(12))
    assert float(weights[0].grad.norm()) == pytest.approx(1.0, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- a whole run


def test_torchrun_of_the_program_leaves_a_run_like_any_other(corpus, cache_dir, tmp_path, capsys):
    """Base, RLP and figures, weights sharded; then generate.py talks to it, alone."""
    words = ["--preset", "smoke", "--data.cache-dir", cache_dir, "--out", tmp_path / "run", "--parallel.mode", "fsdp"]
    words += ["--pretrain.muon-lr", 0, "--eval.text-tokens", 256, "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    done = subprocess.run(
        [*map(str, [*torchrun, ROOT / "train.py", *words])], capture_output=True, text=True, timeout=900, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("held-out figures") == 1
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["gain_nats"]["ema"]["n"] > 0
    assert checkpoint.newest(tmp_path / "run").is_sharded
    assert generate.main([str(tmp_path / "run"), "Tens digit of 12 + 34?\nAnswer:", "--thought-len", "4"]) == 0
    assert "</think>" in capsys.readouterr().out
