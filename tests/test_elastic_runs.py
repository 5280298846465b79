"""Elastic training as a run: its batches, the loop it shares with the other modes, the program, and what is reported.

One smoke run with two baselines (`finished`) serves most tests. What a step computes is in test_elastic.py.
"""

import collections
import copy
import gc
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import contents, die, disturb, metrics_of, press_ctrl_c, summary_of, weights_of
from safetensors.torch import load_file
from torch.testing import assert_close

import elastic
import evals
import generate
import importance
import nested
import routers
import train
from nested import Widths
from system import checkpoint, rundir
from system.config import Config, from_dict
from system.costs import count_parameters, part_cache_bytes, part_parameters, sum_of_parts
from system.objective import NextToken
from system.presets import PRESETS
from text import batches
from text.batches import elastic_batch
from text.problems import FAMILIES
from tools import extract, scores, slicer
from views import estimate

CPU, ROOT = torch.device("cpu"), Path(__file__).parent.parent
SMOKE = PRESETS["smoke"]
LEAF = {"mean", "low", "high", "n"}
PROMPT = "Tens digit of 12 + 34?\nAnswer:"


def with_elastic(**changes) -> Config:
    """The smoke preset with other elastic settings."""
    return replace(SMOKE, elastic=replace(SMOKE.elastic, **changes))


# ------------------------------------------------------------------------------------------------------------- batches


def test_stage_2_has_longer_sequences_and_as_many_tokens(corpus):
    """Six steps, stage 2 from the fifth on: 4 x 32 tokens, then 2 x 64."""
    assert SMOKE.elastic.stage_1_steps() == 4
    for step, shape in ((0, (4, 32)), (3, (4, 32)), (4, (2, 64)), (5, (2, 64))):
        batch = elastic_batch(corpus, SMOKE, step)
        assert all(batch[name].shape == shape for name in ("tokens_BT", "targets_BT", "ids_BT"))
        assert len(batch["budget_B"]) == shape[0]


@pytest.mark.parametrize(("share", "first"), [(0.0, 6), (1.0, 0), (0.5, 3)])
def test_long_share_is_the_share_of_stage_2(corpus, share, first):
    config = with_elastic(long_share=share)
    lengths = [elastic_batch(corpus, config, step)["tokens_BT"].shape[1] for step in range(6)]
    assert lengths == [32] * first + [64] * (6 - first)


def test_a_batch_is_a_function_of_seed_and_step(corpus):
    first, again = (elastic_batch(corpus, SMOKE, 3) for _ in range(2))
    assert_close(first, again, rtol=0, atol=0)
    for other in (elastic_batch(corpus, SMOKE, 2), elastic_batch(corpus, replace(SMOKE, seed=1), 3)):
        assert not torch.equal(other["tokens_BT"], first["tokens_BT"])


def test_documents_go_on_where_the_base_stopped(corpus):
    """The warm-up had two steps, so the first elastic batch is the mixture of step 2."""
    fit = replace(SMOKE.warmup, seq_len=32)
    expected = batches.warmup_batch(corpus, replace(SMOKE, warmup=fit), 2)
    found = elastic_batch(corpus, SMOKE, 0)
    assert_close({k: found[k] for k in expected}, expected, rtol=0, atol=0)


def test_budgets_are_drawn_alike_in_stage_1_and_by_weight_in_stage_2(corpus, monkeypatch):
    """2000 steps of 4 draws: shares within 2 per cent (four standard errors) of 1/3 each, then of 5 : 3 : 2."""
    monkeypatch.setattr(batches, "mixture", lambda _, __, ___, n_rows, *a: {"tokens_BT": torch.zeros(n_rows, 1)})
    config = with_elastic(steps=4000, batch=8, draws=4, long_share=0.5, long_weights=(5, 3, 2))
    for steps, weights in ((range(2000), (1 / 3, 1 / 3, 1 / 3)), (range(2000, 4000), (0.5, 0.3, 0.2))):
        drawn = collections.Counter()
        for step in steps:
            drawn.update(elastic_batch(corpus, config, step)["budget_B"].tolist())
        assert [drawn[i] / drawn.total() for i in range(3)] == pytest.approx(weights, abs=0.02)


def test_all_parts_of_a_batch_have_the_same_budgets(corpus):
    """Two draws a step: every pair of sequences has them, in the same order; with one draw all sequences have it."""
    for draws in (1, 2):
        config, seen = with_elastic(steps=50, batch=4, draws=draws, long_len=32), set()
        for step in range(50):
            budgets = elastic_batch(corpus, config, step)["budget_B"].tolist()
            assert budgets == budgets[:draws] * (4 // draws)
            seen.add(tuple(budgets[:draws]))
        assert len(seen) == 3**draws


def test_no_budget_is_drawn_where_every_sequence_trains_all(corpus):
    assert "budget_B" not in elastic_batch(corpus, with_elastic(together=True), 3)
    with pytest.raises(ValueError, match=r"elastic.draws \(2\) must be 1 at most with elastic.together"):
        with_elastic(together=True, draws=2).check()


def test_budgets_between_the_ends_are_drawn_for_sequences_that_train_several(corpus):
    """Alike in stage 1, by their weights in stage 2, one of which is 0 here; every row has the same."""
    config = with_elastic(
        together=True, draws=2, budgets=(1.0, 0.9, 0.75, 0.6, 0.5), steps=120, long_share=0.5,
        long_weights=(0.2, 0.0, 0.2, 0.2, 0.2),
    )  # fmt: skip
    assert config.elastic.check() is None
    seen = {False: collections.Counter(), True: collections.Counter()}
    for step in range(0, 120, 2):
        drawn_Bk = elastic_batch(corpus, config, step)["drawn_Bk"]
        assert drawn_Bk.shape == ((2, 2) if step >= 60 else (4, 2))
        assert (drawn_Bk == drawn_Bk[0]).all()
        seen[step >= 60].update(drawn_Bk[0].tolist())
    assert seen[False].keys() == {1, 2, 3}
    assert seen[True].keys() == {2, 3}
    for counts in seen.values():
        assert min(counts.values()) > 60 / len(counts) / 2
    no_weight = replace(config, elastic=replace(config.elastic, long_weights=(0.5, 0, 0, 0, 0.5)))
    assert "drawn_Bk" not in elastic_batch(corpus, no_weight, 119)


@pytest.mark.parametrize(("long_batch", "rows", "n_tokens"), [(0, 2, 4 * 128 + 2 * 128), (3, 3, 4 * 128 + 2 * 192)])
def test_a_step_of_stage_2_may_have_a_size_of_its_own(corpus, long_batch, rows, n_tokens):
    """Four steps of 4 x 32 tokens, two of `rows` x 64; 0 rows means as many as make 128 tokens."""
    config = with_elastic(long_batch=long_batch)
    assert len(elastic_batch(corpus, config, 3)["tokens_BT"]) == 4
    assert elastic_batch(corpus, config, 4)["tokens_BT"].shape == (rows, 64)
    assert config.elastic.n_tokens() == n_tokens


def test_budgets_without_weight_are_not_drawn_in_stage_2(corpus):
    config = with_elastic(long_share=1.0, long_weights=(0, 1, 0))
    assert {n for step in range(6) for n in elastic_batch(corpus, config, step)["budget_B"].tolist()} == {1}


# ------------------------------------------------------------------------------------------------------------ the loop

NINE = {"steps": 9, "search_share": 0.34, "long_share": 0.34, "checkpoint_every": 2, "ce": 0.1, "lr": 1e-3, "muon_lr": 1e-3}


def noisy_model(config, corpus):
    """Of the smoke shape; layers that write nothing, as new ones do, would hide much."""
    model = rundir.build_model(config, corpus.tokenizer.n_vocab, CPU, seed=1)
    torch.manual_seed(1)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def fit(corpus, run_dir, start=None, dtype=torch.float32, **changes):
    """Nine steps: three of search, three on slices, three of stage 2; a checkpoint every two. Model and objective."""
    config = with_elastic(**NINE | changes)
    config.check()
    model = noisy_model(config, corpus).to(dtype)
    return model, train.train("elastic", model, corpus, config, run_dir, start)


def stop_at(step, action, corpus, run_dir, monkeypatch):
    """The same run, disturbed when the batch of a step is made."""
    with monkeypatch.context() as patch:
        disturb(patch, "elastic", step, action)
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            fit(corpus, run_dir)


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("elastic")
    fit(corpus, run_dir)
    return run_dir


@pytest.mark.parametrize(
    ("action", "at", "saved"),
    [(die, 2, 2), (press_ctrl_c, 0, 1), (die, 5, 4), (die, 7, 6), (press_ctrl_c, 6, 7)],
    ids=["search, killed", "search, ctrl-c", "slices, killed", "end of stage 1, killed", "stage 2, ctrl-c"],
)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    uninterrupted, corpus, tmp_path, monkeypatch, action, at, saved
):
    """Weights of model, router and end of stage 1, optimizer states and metrics."""
    stop_at(at, action, corpus, tmp_path, monkeypatch)
    start = checkpoint.newest(tmp_path)
    assert start.meta["step"] == saved
    assert (start.path / "stage1.safetensors").exists() == (saved >= 6)
    fit(corpus, tmp_path, start=start)
    assert weights_of(tmp_path).keys() == {"model.safetensors", "router.safetensors", "stage1.safetensors"}
    assert weights_of(tmp_path) == weights_of(uninterrupted)
    assert metrics_of(tmp_path) == metrics_of(uninterrupted)
    states = [checkpoint.newest(run_dir).optimizer() for run_dir in (tmp_path, uninterrupted)]
    assert_close(*states, rtol=0, atol=0)


def test_such_runs_change_model_and_router(uninterrupted):
    """Else the test above would say little. The router stands still after the search, the end of stage 1 after it."""
    older, newer = (
        {f.name: f.read_bytes() for f in p.glob("*.safetensors")} for p in sorted(uninterrupted.glob("checkpoint/*"))
    )
    assert {name for name in newer if newer[name] != older[name]} == {"model.safetensors"}
    assert newer["stage1.safetensors"] != newer["model.safetensors"]
    router = checkpoint.newest(uninterrupted).tensors("router")
    biases = [v for k, v in router.items() if k.endswith("2.bias")]
    assert len(biases) == 6
    assert all(len(set(b.tolist())) > 2 for b in biases if len(b) > 2)


def test_the_end_of_stage_1_is_the_model_after_its_last_step(uninterrupted, corpus, tmp_path, monkeypatch):
    stop_at(5, press_ctrl_c, corpus, tmp_path, monkeypatch)
    stopped = checkpoint.newest(tmp_path)
    assert stopped.meta["step"] == 6
    assert_close(checkpoint.newest(uninterrupted).tensors("stage1"), stopped.tensors("model"), rtol=0, atol=0)


def test_the_budget_loss_is_logged_while_there_is_a_search(uninterrupted):
    lines = metrics_of(uninterrupted)
    assert [("budget_loss" in line) for line in lines] == [True] * 3 + [False] * 6
    assert {line["count"] > 0 for line in lines} == {True}
    named = {name for line in lines for name in line if name.startswith("loss_")}
    assert named == {"loss_1", "loss_0.75", "loss_0.5"}


def test_a_curve_has_means_of_stretches_and_ends_with_the_run(tmp_path):
    """Steps 1 to 25, to 50, to 100, to 200: a run of 120 ends in the last."""
    lines = [{"step": step, "loss_1": float(step)} for step in range(1, 121)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = rundir.logged_curve(tmp_path, "loss_1")
    assert [(at["until"], at["mean"]) for at in found] == [(25, 13.0), (50, 38.0), (100, 75.5), (120, 110.5)]


def test_choices_of_a_finished_run_are_those_it_trained(corpus, tmp_path):
    """What the router says at the end is what the slices were, in fp32 and from the checkpoint."""
    model, objective = fit(corpus, tmp_path, draws=2)
    assert objective.settled.keys() == {0.75, 0.5}
    other = routers.build_router(model.config, objective.c, objective.router.depth_order[::-1], CPU)
    checkpoint.load_weights(other, checkpoint.newest(tmp_path).tensors("router"), tmp_path)
    tokens_BT = torch.arange(12)[None]
    for b, inside in objective.settled.items():
        assert other.choose(b) == objective.router.choose(b)
        hidden_BTd, _ = model(tokens_BT, inside=inside)
        assert_close(hidden_BTd, nested.submodel(model, other.choose(b))(tokens_BT)[0])


@pytest.mark.parametrize(("rows", "length", "pieces"), [(20, 32, [7, 7, 6]), (5, 8192, [2, 2, 1]), (2, 20_000, [1, 1])])
def test_calibration_runs_in_pieces_of_a_few_rows_and_tokens(corpus, rows, length, pieces):
    config = with_elastic(calibration_rows=rows, seq_len=length)
    found = train.calibration(noisy_model(SMOKE, corpus), corpus, config)
    assert [tuple(piece["tokens_BT"].shape) for piece in found] == [(n, length) for n in pieces]


def test_fewer_calibration_rows_than_processes_are_refused(monkeypatch):
    """Each process ranks on its own rows: one without any would wait for nobody's sums."""
    monkeypatch.setattr(train.parallel.team, "world", 5)
    with pytest.raises(
        ValueError, match=r"elastic.calibration_rows \(4\) must be at least .* processes \(5\); give 5 or more"
    ):
        train.refuse_elastic(SMOKE.model, SMOKE, CPU)


def test_running_a_batch_in_parts_changes_nothing_once_the_choices_are_fixed(corpus, tmp_path):
    """In fp64, without a search: in one, each part has Gumbel noise of its own."""
    runs = {n: fit(corpus, tmp_path / str(n), None, torch.float64, search_share=0.0, accumulate=n)[0] for n in (1, 2)}
    assert_close(runs[1].state_dict(), runs[2].state_dict(), rtol=1e-6, atol=1e-9)
    for first, second in zip(metrics_of(tmp_path / "1"), metrics_of(tmp_path / "2"), strict=True):
        for name in ("loss", "grad_norm", "count"):
            assert first[name] == pytest.approx(second[name], rel=1e-9)


def test_a_search_runs_in_parts_too(corpus, tmp_path):
    fit(corpus, tmp_path, steps=3, search_share=1.0, accumulate=2)
    assert all(math.isfinite(line["budget_loss"]) for line in metrics_of(tmp_path))


def test_ordering_for_training_leaves_the_parents_function(corpus, tmp_path):
    """With zero steps the model is the parent, its units in another order."""
    config = with_elastic(steps=0)
    parent = noisy_model(config, corpus)
    model = copy.deepcopy(parent)
    train.train("elastic", model, corpus, config, tmp_path, None)
    tokens_BT = torch.arange(40).view(2, 20)
    assert not torch.equal(model.embed.weight, parent.embed.weight)
    logits = [m.logits(m(tokens_BT)[0]) for m in (model, parent)]
    assert_close(*logits, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- baselines


def rivals_of(name, corpus, monkeypatch, tmp_path, **changes):
    """What `train_rival` would train, without training it: of every fit model, objective, settings, folder; the models."""
    config = with_elastic(baseline=(name,), **changes)
    parent, fits = noisy_model(config, corpus).requires_grad_(False), []

    def recorded(model, objective, make_batch, settings, run_dir, *_):
        fits.append((copy.deepcopy(model), objective, settings, run_dir.relative_to(tmp_path)))

    monkeypatch.setattr(train, "fit", recorded)
    whole = copy.deepcopy(parent)
    objective = train.train("elastic", whole, corpus, config, tmp_path, None)
    widths = {b: objective.router.choose(b) for b in config.elastic.budgets}
    fits.clear()
    trained = train.Trained(whole, objective, corpus, config, tmp_path)
    sizes = train.train_rival(name, trained, widths, tmp_path / name)
    return parent, widths, fits, sizes


@pytest.mark.parametrize(("name", "steps"), [("separate", [3, 4]), ("minitron", [6, 6])])
def test_a_baseline_of_single_sizes_has_their_shapes_and_its_share_of_the_steps(corpus, monkeypatch, tmp_path, name, steps):
    """Two sizes below the full one, which is the parent itself. Separate: half of the family's FLOPs each."""
    parent, widths, fits, sizes = rivals_of(name, corpus, monkeypatch, tmp_path)
    assert [str(folder) for *_, folder in fits] == [f"{name}/0.75", f"{name}/0.5"]
    assert [settings.steps for _, _, settings, _ in fits] == steps
    assert all((s.budgets, s.choose, s.self_kl) == ((1.0,), "fixed", 0.0) for _, _, s, _ in fits)
    for (model, objective, _, _), size, w in zip(fits, sizes[1:], list(widths.values())[1:], strict=True):
        assert model.config == size.config == nested.shrink(parent.config, w)
        assert (objective.c.kl, objective.c.ce) == (1.0, 0.0)
        assert not any(p.requires_grad for p in size.parameters())
    tokens_BT = torch.arange(40).view(2, 20)
    assert_close(*(m.logits(m(tokens_BT)[0]) for m in (sizes[0], parent)), rtol=1e-4, atol=1e-4)


def test_sizes_alone_take_the_flops_of_the_family_in_all(corpus):
    """Steps times FLOPs of a step, of both sizes: within 1 per cent of the family's, from many steps."""
    config = with_elastic(steps=1000)
    config = replace(config, mode="elastic", model=replace(config.model, vocab_size=corpus.tokenizer.n_vocab))
    family, total = estimate.steps_flops(config, None), 0.0
    for b in (0.75, 0.5):
        steps = train.equal_flops(config, config.model, b, 2)
        alone = replace(config.elastic, steps=steps, budgets=(b,), long_weights=(1.0,), choose="fixed")
        total += estimate.steps_flops(replace(config, elastic=alone), None)
    assert total == pytest.approx(family, rel=0.01)


@pytest.mark.parametrize(("name", "spent"), [("separate", {"": 3}), ("scratch", {"pretrain": 2, "warmup": 5})])
def test_a_rival_costs_what_its_checkpoints_say(corpus, tmp_path, monkeypatch, name, spent):
    """Steps of each phase, times a step's FLOPs at the size, in both budgets; the parent counts for nothing."""
    config = with_elastic(baseline=(name,))
    parent = noisy_model(config, corpus)
    objective = train.train("elastic", parent, corpus, config, tmp_path / "run", None)
    trained = train.Trained(parent, objective, corpus, config, tmp_path)
    widths = {b: objective.router.choose(b) for b in (1.0, 0.75, 0.5)}
    done = {f"{b}/{phase}".rstrip("/"): n for b in (0.75, 0.5) for phase, n in spent.items()}

    def newest(folder):
        steps = done.get(str(folder.relative_to(tmp_path)))
        return steps and checkpoint.Checkpoint(folder, {"step": steps})

    monkeypatch.setattr(train.rundir, "newest", newest)
    expected = 0.0
    for b in (0.75, 0.5):
        small, rows = nested.shrink(parent.config, widths[b]), config.elastic.batch
        if name == "scratch":
            expected += sum(
                3 * n * estimate.forward_flops(small, fit.batch, fit.seq_len)
                for fit, n in ((config.pretrain, 2), (config.warmup, 5))
            )
        else:
            both = [estimate.forward_flops(m, rows, config.elastic.seq_len) for m in (parent.config, small)]
            expected += 3 * (both[0] + 3 * both[1])
    found = train.rival_flops(name, trained, widths, tmp_path)
    assert found == pytest.approx(expected, rel=1e-6 if name == "scratch" else 0.05)  # widths by hand there


def test_a_size_from_scratch_is_trained_as_the_parent_was(corpus, monkeypatch, tmp_path):
    """Both phases of the base, with its settings, from weights of its own."""
    parent, widths, fits, sizes = rivals_of("scratch", corpus, monkeypatch, tmp_path)
    assert [str(folder) for *_, folder in fits] == [
        f"scratch/{b}/{phase}" for b in (0.75, 0.5) for phase in ("pretrain", "warmup")
    ]
    assert [settings for _, _, settings, _ in fits] == [SMOKE.pretrain, SMOKE.warmup] * 2
    assert [type(objective) for _, objective, *_ in fits] == [train.Pretraining, NextToken] * 2
    assert [size.config for size in sizes[1:]] == [nested.shrink(parent.config, w) for w in list(widths.values())[1:]]
    assert not torch.equal(sizes[1].embed.weight, parent.embed.weight[:, : sizes[1].config.d_model])


def test_scratch_is_refused_where_nobody_knows_how_the_parent_was_trained():
    config = replace(with_elastic(baseline=("scratch",)), init="somewhere")
    with pytest.raises(ValueError, match=r"scratch trains each size as the base of init \(somewhere\) was"):
        train.refuse_elastic(SMOKE.model, config, CPU)


@pytest.mark.parametrize("choose", ["fixed", "random", "search"])
def test_widths_without_a_search_are_settled_before_the_first_step_and_stay_after_resuming(corpus, choose):
    """No optimizer for the router; what goes on takes the choice from its checkpoint."""
    config = with_elastic(choose=choose)
    model = noisy_model(config, corpus)
    objective = train.make_elastic(model, corpus, config)
    assert objective.optimizers() == []
    again = train.make_elastic(noisy_model(config, corpus), corpus, replace(config, resume=True))
    again.router.load_state_dict(objective.router.state_dict())
    for budget in (0.75, 0.6, 0.5):
        assert again.router.choose(budget) == objective.router.choose(budget)
        small = nested.shrink(model.config, objective.router.choose(budget))
        cost = sum_of_parts(routers.cost_measure(config.elastic, CPU), small)
        assert cost / objective.router.full_cost == pytest.approx(budget, rel=0.02)


def test_a_run_that_goes_on_does_not_measure_latencies_again(program, tmp_path, monkeypatch):
    """The clock may say otherwise now, and budgets that were met would be refused: the checkpoint's costs count."""
    words = ("--mode", "elastic", "--elastic.cost", "latency", "--elastic.checkpoint-every", 1)
    monkeypatch.setattr(routers, "part_latency_ns", lambda kind, shape, *_: float(part_parameters(kind, shape)))
    with monkeypatch.context() as patch:
        disturb(patch, "elastic", 2, press_ctrl_c)
        assert program(tmp_path, *words) == 130
    before = checkpoint.newest(tmp_path).tensors("router")
    monkeypatch.setattr(train.routers, "build_router", lambda *_: pytest.fail("measured again"))
    assert program(tmp_path, *words, "--resume") == 0
    after = checkpoint.newest(tmp_path).tensors("router")
    assert all(torch.equal(after[name], before[name]) for name in before if "cost" in name)


def test_a_baseline_trains_weights_of_its_own(corpus, monkeypatch, tmp_path):
    """Not those of the parent, nor of the family that a size was cut out of."""
    parent, _, fits, sizes = rivals_of("minitron", corpus, monkeypatch, tmp_path)
    storages = [{p.untyped_storage().data_ptr() for p in m.parameters()} for m in (parent, *sizes)]
    assert len(set().union(*storages)) == sum(map(len, storages))


# ------------------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def finished(program, tmp_path_factory):
    """The folder of a whole elastic run with two baselines."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert program(out, "--mode", "elastic", "--elastic.baseline", "scratch", "separate") == 0
    return out


def test_a_run_leaves_settings_metrics_figures_samples_plots_and_checkpoints(finished):
    assert {p.name for p in finished.iterdir()} == {
        "config.json", "metrics.jsonl", "summary.json", "samples.txt", "checkpoint", "baselines", "hf", "family.json",
        "loss.png", "widths.png", "sizes.png"}  # fmt: skip
    assert all((finished / f"{plot}.png").read_bytes().startswith(b"\x89PNG") for plot in ("loss", "widths", "sizes"))
    assert {p.name for p in (finished / "baselines").iterdir()} == {"scratch", "separate"}
    assert from_dict(Config, json.loads((finished / "config.json").read_text())["config"]).mode == "elastic"
    assert [line["step"] for line in metrics_of(finished)] == [1, 2, 3, 4, 5, 6]


def test_summary_holds_every_budget_with_its_figures(finished):
    summary = summary_of(finished)
    model, router, *_ = elastic.load_family(finished)
    full = summary["teacher"]["parameters"]
    assert full == count_parameters(model) == summary["parameters"]
    for entry, budget in zip(summary["budgets"], (1.0, 0.75, 0.5), strict=True):
        assert entry["budget"] == entry["fraction"] == budget
        assert entry["target"] == budget * full
        assert entry["cost"] == entry["parameters"] == pytest.approx(entry["target"], rel=0.02)
        widths = Widths(entry["widths"]["d_model"], tuple(map(tuple, entry["widths"]["layers"])))
        assert widths == router.choose(budget)
        assert entry["parameters"] == count_parameters(nested.submodel(model, widths))
        assert entry["bytes"] == 4 * entry["parameters"]
        for name in ("loss_nats", "kl_nats", "top1", "loss_change", "long_loss_nats"):
            assert entry[name].keys() == LEAF | ({"n_documents"} if name == "long_loss_nats" else set())
            assert entry[name]["low"] <= entry[name]["mean"] <= entry[name]["high"]
        assert 0 <= entry["top1"]["mean"] <= 1
        assert entry["kl_nats"]["mean"] > 0
        assert entry["tokens_per_second"] > 0
    assert summary["teacher"]["loss_nats"]["mean"] > 0
    assert summary["teacher"]["kl_nats"]["mean"] == pytest.approx(0, abs=1e-6)
    assert summary["teacher"]["top1"]["mean"] == 1.0
    assert summary["teacher"]["widths"]["layers"] == [[4, 16], [2], [64]]
    assert [s["parameters"] for s in summary["stage1"]] == [b["parameters"] for b in summary["budgets"]]
    assert summary["n_tokens"] == 6 * 4 * 32
    for kind in ("text", "problem"):
        assert all(e[f"{kind}_loss_nats"].keys() == LEAF for e in (summary["teacher"], *summary["budgets"]))
    for entry in (summary["teacher"], *summary["budgets"], *summary["stage1"], *summary["baselines"]["separate"]):
        for how in ("sampled", "greedy"):
            assert entry["accuracy"][how].keys() == {"all", *FAMILIES}
            assert all(leaf.keys() == LEAF for leaf in entry["accuracy"][how].values())
        test = entry["mcnemar"]
        lead = entry["accuracy"]["greedy"]["all"]["mean"] - summary["teacher"]["accuracy"]["greedy"]["all"]["mean"]
        assert test["won"] - test["lost"] == pytest.approx(lead * SMOKE.eval.problems_per_family * len(FAMILIES))
    assert summary["teacher"]["mcnemar"] == {"won": 0, "lost": 0, "p": 1.0}


def test_summary_holds_what_lies_between_trained_budgets(finished):
    """Half-way between neighbours; compared with the parent, as those of trained budgets."""
    summary = summary_of(finished)
    model, router, *_ = elastic.load_family(finished)
    assert [e["budget"] for e in summary["between"]] == [0.875, 0.625]
    for entry in summary["between"]:
        small = nested.submodel(model, router.choose(entry["budget"]))
        assert entry["parameters"] == entry["cost"] == count_parameters(small) == pytest.approx(entry["target"], rel=0.02)
        difference = entry["loss_nats"]["mean"] - summary["teacher"]["loss_nats"]["mean"]
        assert entry["difference_nats"]["mean"] == pytest.approx(difference, abs=1e-5)
        assert entry["accuracy"]["greedy"].keys() == {"all", *FAMILIES}


@pytest.mark.parametrize("budget", ["1", "0.75", "0.5"])
def test_the_slicer_without_this_project_gives_the_bits_of_extraction(finished, tmp_path, budget):
    """In an empty folder, where nothing of the project can be imported; family.json says what each size has and reached."""
    family, summary = json.loads((finished / "family.json").read_text()), summary_of(finished)
    entry = next(e for e in summary["budgets"] if f"{e['budget']:g}" == budget)
    assert {name: family[budget][name] for name in family[budget] if name != "cuts"} == {
        name: entry[name] for name in ("fraction", "cost", "parameters", "widths", "loss_nats", "accuracy")
    }
    weights = checkpoint.newest(finished).path / "model.safetensors"
    slicer = (tmp_path / "slicer.py").write_text((ROOT / "tools" / "slicer.py").read_text()) and tmp_path / "slicer.py"
    words = [sys.executable, "-I", str(slicer), weights, finished / "family.json", budget, tmp_path / "cut.safetensors"]
    said = subprocess.run(list(map(str, words)), cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert f"{entry['parameters']:,} parameters" in said
    assert extract.main([str(finished), "--budget", budget, "--out", str(tmp_path / "size")]) == 0
    expected = load_file(checkpoint.newest(tmp_path / "size").path / "model.safetensors")
    found = load_file(tmp_path / "cut.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_extracted_size_cannot_be_resumed(program, extracted, capsys):
    assert program(extracted, "--mode", "elastic", "--resume") == 2
    assert "holds an extracted size, which was not trained there; give it as --init" in " ".join(
        capsys.readouterr().out.split()
    )


def test_without_steps_rivals_have_none_either(program, tmp_path):
    words = ("--mode", "elastic", "--elastic.steps", 0, "--elastic.baseline", "separate")
    assert program(tmp_path / "run", *words) == 0
    assert summary_of(tmp_path / "run")["baselines_flops"] == {"separate": 0}


def test_without_stage_2_nothing_is_said_of_it(program, tmp_path):
    """Its length may be any, no copy of stage 1 is kept, and of texts that are too short there is no figure."""
    words = ("--mode", "elastic", "--elastic.long-share", 0, "--elastic.seq-len", 48, "--elastic.batch", 3)
    assert program(tmp_path / "run", *words) == 0
    summary = summary_of(tmp_path / "run")
    assert summary["stage1"] == []
    assert "stage1" not in checkpoint.newest(tmp_path / "run").networks()


@pytest.mark.parametrize("cost", ["latency", "flops"])
def test_a_size_costs_what_its_router_says_and_its_steps_what_its_widths_do(program, tmp_path, monkeypatch, cost):
    """Also by a clock, which would tell another time now; FLOPs are those of the widths that were chosen."""
    late = itertools.count(1e4)
    monkeypatch.setattr(
        routers, "part_latency_ns", lambda kind, shape, *_: next(late) * routers.part_flops(kind, shape, 64)
    )
    words = ("--mode", "elastic", "--elastic.cost", cost, "--elastic.choose", "random", "--elastic.steps", 4)
    assert program(tmp_path / "run", *words) == 0
    summary, (model, router, *_) = summary_of(tmp_path / "run"), elastic.load_family(tmp_path / "run")
    full, *smaller = summary["budgets"]
    assert full["cost"] == full["target"] == router.full_cost
    assert [e["cost"] for e in smaller] == [router.costs.exact(router.choice(b), router.depth_order) for b in (0.75, 0.5)]
    sizes = [nested.shrink(model.config, router.choose(b)) for b in (1.0, 0.75, 0.5)]
    expected = 0.0  # of three short steps, each at one of the budgets, and of a long one
    for n_steps, n_rows, length, weights in ((3, 4, 32, (1 / 3, 1 / 3, 1 / 3)), (1, 2, 64, (0.5, 0.3, 0.2))):
        parent, *students = (estimate.forward_flops(shape, n_rows, length) for shape in (model.config, *sizes))
        expected += n_steps * (parent + 3 * sum(w * f for w, f in zip(weights, students, strict=True)))
    assert summary["steps_flops"] == pytest.approx(expected, rel=1e-6)


def test_the_slicer_refuses_a_budget_that_was_not_trained(finished, tmp_path):
    with pytest.raises(SystemExit, match=r"budget \(0.6\) is not in .*; it has 1, 0.75, 0.5"):
        slicer.cut("", str(finished / "family.json"), "0.6", "")


def test_summary_holds_every_baseline_at_every_budget(finished):
    summary = summary_of(finished)
    assert summary["baselines"].keys() == {"scratch", "separate"}
    assert summary["train_s"].keys() == {"elastic", "scratch", "separate"}
    assert min(summary["train_s"].values()) > 0
    assert summary["baselines_flops"].keys() == {"scratch", "separate"}
    assert summary["baselines_flops"]["separate"] == pytest.approx(summary["steps_flops"], rel=0.2)  # of whole steps
    for entries in summary["baselines"].values():
        for ours, theirs in zip(summary["budgets"], entries, strict=True):  # paired differences from the family
            difference = theirs["loss_nats"]["mean"] - ours["loss_nats"]["mean"]
            assert theirs["difference_nats"]["mean"] == pytest.approx(difference, abs=1e-5)
        assert [e["budget"] for e in entries] == [1.0, 0.75, 0.5]
        assert all(e["loss_nats"].keys() == LEAF for e in entries)
        assert all(e["parameters"] == pytest.approx(e["target"], rel=0.02) for e in entries)
        assert [e["parameters"] for e in entries] == [b["parameters"] for b in summary["budgets"]]


def test_a_family_takes_less_than_its_sizes_apart(finished):
    """One file instead of three; in memory the full model, the router, and copies of the largest submodel's rest."""
    memory, summary = summary_of(finished)["memory"], summary_of(finished)
    sizes = [b["bytes"] for b in summary["budgets"]]
    assert memory["separate_memory"] == sum(sizes)
    assert sizes[0] < memory["family_memory"] < memory["separate_memory"]
    assert memory["family_file"] < memory["separate_files"]
    assert memory["separate_files"] > sum(sizes)
    assert memory["router_parameters"] == count_parameters(elastic.load_family(finished)[1])


def test_samples_show_a_thought_of_every_budget(finished):
    text = (finished / "samples.txt").read_text()
    assert all(text.count(f"[{family}]") == 2 for family in FAMILIES)
    assert [text.count(f" {name}: <think>") for name in ("1", "0.75", "0.5")] == [2 * len(FAMILIES)] * 3


def test_a_run_that_goes_on_does_not_rank_again(program, tmp_path, monkeypatch):
    """Its checkpoint has the ordered weights, and the router the order of layers."""
    words = ("--mode", "elastic", "--elastic.depth-choices", 3, 2, "--elastic.checkpoint-every", 1)
    with monkeypatch.context() as patch:
        disturb(patch, "elastic", 2, press_ctrl_c)
        assert program(tmp_path, *words) == 130
    before = checkpoint.newest(tmp_path).tensors("router")["depth"]
    monkeypatch.setattr(train.importance, "rank", lambda *_: pytest.fail("ranked again"))
    assert program(tmp_path, *words, "--resume") == 0
    assert torch.equal(checkpoint.newest(tmp_path).tensors("router")["depth"], before)


def test_a_run_stopped_in_a_baseline_and_resumed_equals_the_uninterrupted_one(program, finished, tmp_path, monkeypatch):
    """After the six steps of the family and two of the first size alone: neither is trained again."""
    words, steps = ("--mode", "elastic", "--elastic.baseline", "separate"), []

    def batch(corpus, config, step):
        steps.append(step)
        if len(steps) == 8:
            press_ctrl_c()
        return elastic_batch(corpus, config, step)

    entry = replace(train.MODES["elastic"], batch=batch)
    monkeypatch.setitem(train.MODES, "elastic", entry)
    assert program(tmp_path, *words) == 130
    assert steps == [0, 1, 2, 3, 4, 5, 0, 1]
    assert program(tmp_path, *words, "--resume") == 0
    assert steps[8:] == [2, *range(4)]
    assert weights_of(tmp_path) == weights_of(finished)
    assert metrics_of(tmp_path) == metrics_of(finished)
    ours, theirs = ([*s["budgets"], *s["baselines"]["separate"]] for s in map(summary_of, (tmp_path, finished)))
    for found, expected in zip(ours, theirs, strict=True):
        assert {k for k in found if found[k] != expected[k]} <= {"tokens_per_second"}


def test_a_family_without_the_full_budget_is_measured_and_drawn(program, tmp_path, capsys):
    """0.8 and 0.5 by FLOPs and by hand; what was not trained is not given out."""
    words = ("--elastic.budgets", 0.9, 0.8, "--elastic.long-weights", 1, 1, "--elastic.cost", "flops")
    assert program(tmp_path, "--mode", "elastic", *words, "--elastic.choose", "fixed", "--elastic.long-share", 0) == 0
    summary = summary_of(tmp_path)
    assert [b["fraction"] for b in summary["budgets"]] == [0.9, 0.8]
    assert all(b["cost"] == pytest.approx(b["target"], rel=0.03) for b in summary["budgets"])
    assert (tmp_path / "widths.png").exists()
    capsys.readouterr()
    assert generate.main([str(tmp_path), PROMPT, "--budget", "1"]) == 2
    assert "error: budget (1) is unknown: this model was trained for 0.9, 0.8 of the full flops" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- extraction, generation


@pytest.fixture(scope="module")
def extracted(finished, tmp_path_factory):
    """The folder of the model of a budget between two trained ones."""
    out = tmp_path_factory.mktemp("runs") / "small"
    assert extract.main([str(finished), "--budget", "0.6", "--out", str(out)]) == 0
    return out


def test_a_size_that_nobody_trained_comes_with_a_warning(finished, tmp_path, capsys):
    """It names the next smaller one that was trained; trained ones come without."""
    for budget, warning in (("0.6", "budget (0.6) lies between trained ones"), ("0.75", ""), ("1", "")):
        assert extract.main([str(finished), "--budget", budget, "--out", str(tmp_path / budget)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert (warning in said) if warning else ("warning" not in said)
        assert ("may do worse than 0.5, which was trained" in said) == bool(warning)
    assert generate.main([str(finished), PROMPT, "--budget", "0.8", "0.5"]) == 0
    assert "may do worse than 0.75, which was trained" in " ".join(capsys.readouterr().out.split())


def test_an_extracted_model_is_the_submodel_of_its_family(finished, extracted):
    small, *_ = rundir.load_run(extracted)
    model, router, *_ = elastic.load_family(finished)
    inside = nested.submodel(model, router.choose(0.6))
    tokens_BT = torch.arange(40).view(2, 20)
    assert small.config == inside.config
    assert_close(small(tokens_BT)[0], inside(tokens_BT)[0], rtol=0, atol=0)
    assert_close(small.state_dict(), inside.state_dict(), rtol=0, atol=0)
    assert count_parameters(small) == pytest.approx(0.6 * count_parameters(model), rel=0.02)


def test_an_extracted_run_says_where_it_comes_from(finished, extracted):
    facts = json.loads((extracted / "config.json").read_text())
    small, *_ = rundir.load_run(extracted)
    assert (facts["extracted_from"], facts["budget"]) == (str(finished), 0.6)
    assert facts["parameters"] == count_parameters(small)
    assert facts["widths"]["d_model"] == small.config.d_model
    assert checkpoint.newest(extracted).meta["budget"] == 0.6


def test_extraction_prints_size_time_and_widths(finished, tmp_path, capsys):
    assert extract.main([str(finished), "--budget", "0.5", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    size = summary_of(finished)["budgets"][2]
    assert f"{tmp_path / 'out'}: {size['parameters']:,} parameters in " in shown
    assert f"'d_model': {size['widths']['d_model']}" in shown


def test_generate_talks_to_an_extracted_model_and_to_any_size_of_its_family(finished, extracted, capsys):
    assert generate.main([str(extracted), PROMPT, "--thought-len", "4"]) == 0
    assert capsys.readouterr().out.startswith(PROMPT + "<think>")
    assert generate.main([str(finished), PROMPT, "--thought-len", "4", "--budget", "1", "0.5"]) == 0
    first, second = capsys.readouterr().out.split("\n[0.5] ")
    assert first.startswith(f"[1] {PROMPT}<think>")
    assert second.startswith(f"{PROMPT}<think>")


def test_a_size_of_the_family_says_what_its_extracted_model_says(finished, extracted, capsys):
    words = [PROMPT, "--thought-len", "6", "--temperature", "0"]
    assert generate.main([str(extracted), *words]) == 0
    alone = capsys.readouterr().out
    assert generate.main([str(finished), *words, "--budget", "0.6"]) == 0
    warned, said = capsys.readouterr().out.split("[0.6] ")  # nobody trained that size
    assert said == alone
    assert "warning" in warned


@pytest.mark.parametrize("back", [0, 3])
def test_a_size_goes_on_from_what_another_has_read(finished, back, capsys):
    """From its own states it says what it says alone, and from another size's what it says with these."""
    words = [str(finished), PROMPT, "--thought-len", "6", "--temperature", "0", "--back", str(back)]

    def said(*more):
        assert generate.main([*words, *more]) == 0
        return capsys.readouterr().out

    assert said("--budget", "0.5", "1", "--read", "0.5").startswith(said("--budget", "0.5"))
    family, router, tokenizer, config = elastic.load_family(finished)
    full, half = (router.choose(b) for b in (1.0, 0.5))
    first, second = (nested.submodel(family, w).requires_grad_(False) for w in (full, half))
    ids_BT = torch.tensor([tokenizer.encode(PROMPT)])
    n = max(1, back)
    _, cache = first(ids_BT[:, :-n])
    handed = nested.hand_over(cache, family.config, full, half)
    hidden_BTD, cache = second(ids_BT[:, -n:], handed)
    made = generate.handed_over(
        family.config, (first, full), (second, half), {"context_BT": ids_BT, "back_B": torch.tensor([back])}
    )
    torch.testing.assert_close(made.hidden_BD, hidden_BTD[:, -1])
    assert (made.early.n_tokens, made.cache.n_tokens) == (ids_BT.shape[1] - back, ids_BT.shape[1])
    assert said("--budget", "0.5", "--read", "1").startswith("[0.5] " + PROMPT)


def test_reading_needs_a_size_that_goes_on(finished, capsys):
    assert generate.main([str(finished), PROMPT, "--read", "1"]) == 2
    assert "read (1.0) needs budget" in capsys.readouterr().err


def test_sizes_take_turns_in_constant_memory(finished, monkeypatch):
    """One smaller model is there at a time."""
    alive, counts = weakref.WeakSet(), []

    def show(model, *_, **__):
        alive.add(model)
        gc.collect()
        counts.append(len(alive))
        return ""

    monkeypatch.setattr(generate, "show_thought", show)
    assert generate.main([str(finished), PROMPT, "--budget", "1", "0.5", "0.75", "0.5"]) == 0
    assert counts == [1, 1, 1, 1]


@pytest.mark.parametrize("budget", ["0.49", "0.3", "-1", "1e9"])
def test_an_unknown_budget_is_refused_before_anything_is_written_or_said(finished, tmp_path, capsys, budget):
    known = "is unknown: this model was trained for 1, 0.75, 0.5 of the full parameters"
    assert extract.main([str(finished), "--budget", budget, "--out", str(tmp_path / "out")]) == 2
    assert known in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert generate.main([str(finished), PROMPT, "--budget", "1", budget]) == 2
    shown = capsys.readouterr()
    assert known in shown.err
    assert shown.out == ""


def test_a_run_without_a_router_is_refused(finished, extracted, tmp_path, capsys):
    """An extracted one, and the base."""
    for folder in (str(extracted), summary_of(finished)["base_dir"]):
        assert extract.main([folder, "--budget", "0.5", "--out", str(tmp_path / "out")]) == 2
        assert f"error: {folder} has no router, so it holds one size only" in capsys.readouterr().err
        assert generate.main([folder, PROMPT, "--budget", "0.5"]) == 2
        assert "give the folder of a run of --mode elastic" in capsys.readouterr().err
    assert extract.main([str(tmp_path), "--budget", "0.5", "--out", str(tmp_path / "out")]) == 2
    assert f"{tmp_path} holds no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_extraction_into_a_folder_in_use_is_refused_and_leaves_it(finished, extracted, capsys):
    before = contents(extracted)
    assert extract.main([str(finished), "--budget", "0.5", "--out", str(extracted)]) == 2
    assert f"error: out ({extracted}) already holds a run; choose another --out" in capsys.readouterr().err
    assert contents(extracted) == before


def test_paths_of_no_use_are_refused_by_name(finished, tmp_path, capsys):
    """An out folder that is a file, and a run whose settings are gone or are not settings."""
    (tmp_path / "file").touch()
    for out in ("file", "file/out"):
        assert extract.main([str(finished), "--budget", "0.5", "--out", str(tmp_path / out)]) == 2
        assert f"error: {tmp_path / out}: " in capsys.readouterr().err
    run_dir = shutil.copytree(finished, tmp_path / "run")
    for text, message in (("{}", "holds no settings of a run"), ("{", "cannot be read as JSON"), (None, "No such file")):
        (run_dir / "config.json").unlink() if text is None else (run_dir / "config.json").write_text(text)
        assert extract.main([str(run_dir), "--budget", "0.5", "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["checkpoint", "hf"])
def test_an_extraction_over_parts_of_a_run_is_refused_before_anything_is_written(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"holds {name}, and no config.json"):
        elastic.extract(tmp_path / "none", 1.0, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_run_that_stopped_early_says_so_when_it_is_cut(finished, tmp_path, capsys):
    """Its routers may not have settled."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    elastic.load_family(run_dir)
    assert "warning" not in capsys.readouterr().out
    saved = json.loads((run_dir / "config.json").read_text())
    saved["config"]["elastic"]["steps"] += 3
    (run_dir / "config.json").write_text(json.dumps(saved))
    elastic.load_family(run_dir)
    n = saved["config"]["elastic"]["steps"]
    assert f"has made {n - 3} of its {n} steps; --resume goes on with it" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("mode", ["pretrain", "rlp"])
def test_init_goes_on_from_an_extracted_model_in_its_own_shape(program, extracted, tmp_path, mode):
    assert program(tmp_path / "run", "--mode", mode, "--init", extracted, f"--{mode}.steps", 1) == 0
    small, *_ = rundir.load_run(extracted)
    trained, *_ = rundir.load_run(tmp_path / "run")
    assert trained.config == small.config
    assert not torch.equal(trained.norm.weight, small.norm.weight)
    if mode == "rlp":
        assert summary_of(tmp_path / "run")["base_train_s"] == 0


def test_an_extracted_model_is_refused_as_a_parent(program, extracted, tmp_path, capsys):
    assert program(tmp_path / "run", "--mode", "elastic", "--init", extracted) == 2
    assert "layers have widths of their own" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("budgets 1 0", "elastic.budgets (0.0) must lie in (0, 1] as a fraction, or above 1 as an absolute cost"),
        ("budgets 1 -0.5", "elastic.budgets (-0.5) must lie in (0, 1]"),
        ("budgets 0.5 1", "elastic.budgets (0.5, 1.0) must be different and fall, the largest first"),
        ("budgets 1 1", "elastic.budgets (1.0, 1.0) must be different and fall"),
        ("budgets 30000 1", "elastic.budgets (30000.0, 1.0) mixes absolute costs and fractions; give either"),
        ("budgets 1 0.1", "elastic.budgets (0.1) is below the smallest model that the choices can make"),
        ("budgets 90000 30000", "elastic.budgets (90000) is more than the full model's 47324 parameters; lower it"),
        ("long-weights 1 1 1", "elastic.long_weights (1.0, 1.0, 1.0) must have one entry for each of the 2 budgets"),
        ("long-weights 0 0", "elastic.long_weights (0.0, 0.0) must be 0 or more, and not all 0"),
        ("ffn-choices 32 16", "elastic.ffn_choices (32, 16) must contain the full model's 64"),
        ("d-model-choices 32 33", "elastic.d_model_choices (33) must lie between 1 and the full model's 32"),
        ("attn-head-choices 4 3", "elastic.attn_head_choices (3) must be a multiple of the number of groups (2), "
                                  "so that all groups keep the same count; nearest is 4"),
        ("mamba-head-choices 4 1", "elastic.mamba_head_choices (1) must be a multiple of the number of groups (2)"),
        ("score-ffn activation", "elastic.score_ffn ('activation') is unknown; choose one of paper, output, random"),
        ("score-depth output", "elastic.score_depth ('output') is unknown; choose one of paper, once, random"),
        ("score-d-model pca", "elastic.score_d_model (pca) turns the residual stream, which a model with tied embeddings"),
    ],
    ids=lambda v: v if v[0] != "e" else "",
)  # fmt: skip
def test_unusable_settings_are_refused_before_a_base_is_trained(program, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(train, "base_weights", lambda *_: pytest.fail("work was begun"))
    name, *values = words.split()
    options = {"--elastic.budgets": (1, 0.5), "--elastic.long-weights": (1, 1)} | {f"--elastic.{name}": values}
    if "head-choices" in name:  # groups of two
        options |= {"--model.n-heads": [4], "--model.n-kv-heads": [2], "--model.mamba-groups": [2]}
    if values == ["pca"]:
        options |= {"--model.tie-embeddings": []}
    assert program(tmp_path / "run", "--mode", "elastic", *(w for k, v in options.items() for w in (k, *v))) == 2
    assert message in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mode", "said"), [("elastic", "('activation') is unknown"), ("rlp", "(activation) is not read in mode rlp")]
)
def test_a_dry_run_refuses_an_unknown_score_too(program, tmp_path, capsys, mode, said):
    assert program(tmp_path, "--mode", mode, "--dry-run", "--elastic.score-attn", "activation") == 2
    assert f"elastic.score_attn {said}" in " ".join(capsys.readouterr().out.split())


def test_a_dry_run_refuses_to_turn_a_tied_stream_too(program, tmp_path, capsys):
    words = ("--dry-run", "--model.tie-embeddings")
    assert program(tmp_path, "--mode", "elastic", *words) == 2
    assert "a model with tied embeddings cannot follow" in " ".join(capsys.readouterr().out.split())
    assert program(tmp_path, "--mode", "elastic", *words, "--elastic.score-d-model", "output") == 0


def test_resuming_with_other_elastic_settings_is_refused_by_name(program, finished, tmp_path, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    words = ("--mode", "elastic", "--elastic.baseline", "scratch", "separate", "--resume")
    assert program(run_dir, *words, "--elastic.mask", "top1") == 2
    assert "elastic.mask was soft, now top1" in capsys.readouterr().out


def test_a_rival_can_be_added_to_a_finished_run(program, finished, tmp_path):
    """The family is measured again, and not trained."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    assert program(run_dir, "--mode", "elastic", "--elastic.baseline", "minitron", "--resume") == 0
    ours, theirs = summary_of(run_dir), summary_of(finished)
    assert list(ours["baselines"]) == [*theirs["baselines"], "minitron"]
    for name, entries in theirs["baselines"].items():  # those that it had are measured again too
        assert [b["loss_nats"] for b in ours["baselines"][name]] == [b["loss_nats"] for b in entries]
    assert [b["loss_nats"] for b in ours["budgets"]] == [b["loss_nats"] for b in theirs["budgets"]]
    assert metrics_of(run_dir) == metrics_of(finished)


# ------------------------------------------------------------------------------------------------------ measuring sizes


def test_sizes_are_measured_against_their_parent_on_the_same_sequences(corpus):
    """The parent has KL 0, agrees with itself everywhere, and its loss does not change; a blunted copy is worse."""
    parent = noisy_model(SMOKE, corpus)
    parent.head.weight.data.mul_(20)
    blunt = copy.deepcopy(parent)
    blunt.head.weight.data.zero_()
    same, other, third = evals.evaluate_sizes([parent, blunt, blunt], [0, 0, 1], corpus, SMOKE)
    for name in ("kl_nats", "loss_change", "difference_nats"):
        assert same[name]["mean"] == pytest.approx(0, abs=1e-6)
    assert same["top1"]["mean"] == 1.0
    assert other["loss_nats"]["mean"] == pytest.approx(math.log(corpus.tokenizer.n_vocab), rel=1e-5)
    difference = other["loss_nats"]["mean"] - same["loss_nats"]["mean"]
    assert other["difference_nats"]["mean"] == pytest.approx(difference, abs=1e-5)
    assert other["loss_change"]["mean"] == pytest.approx(difference / same["loss_nats"]["mean"], abs=1e-5)
    assert third["difference_nats"]["mean"] == pytest.approx(0, abs=1e-6)
    assert third["kl_nats"] == other["kl_nats"]
    assert other["kl_nats"]["mean"] > 0.1
    assert other["top1"]["mean"] < 0.5


def test_kl_and_loss_of_a_size_are_means_over_targets_by_hand(corpus, monkeypatch):
    """From whole logits of one batch, one mean a sequence; targets of -100 count for nothing."""
    batch = batches.mixture(corpus, SMOKE, 0, 16, 32, "test")
    batch["targets_BT"][:, ::3] = -100
    monkeypatch.setattr(evals, "mixture", lambda *_: batch)
    parent, model = noisy_model(SMOKE, corpus), rundir.build_model(SMOKE, corpus.tokenizer.n_vocab, CPU, seed=2)
    _, found = evals.evaluate_sizes([parent, model], [0, 0], corpus, SMOKE)
    with torch.no_grad():
        p, q = (
            m.logits(m(batch["tokens_BT"], ids_BT=batch["ids_BT"])[0]).double().log_softmax(-1) for m in (parent, model)
        )
    kl_B, loss_B = [], []
    for row, target in enumerate(batch["targets_BT"]):
        at = (target != -100).nonzero()[:, 0]
        kl_B.append(float((p[row, at].exp() * (p[row, at] - q[row, at])).sum(-1).mean()))
        loss_B.append(-float(q[row, at, target[at]].mean()))
    assert found["kl_nats"]["mean"] == pytest.approx(sum(kl_B) / 16, rel=1e-4)
    for name in ("text_loss_nats", "problem_loss_nats"):
        assert found[name]["mean"] == pytest.approx(found["loss_nats"]["mean"], rel=1e-12)
    assert found["loss_nats"]["mean"] == pytest.approx(sum(loss_B) / 16, rel=1e-5)


def test_kinds_are_measured_apart_and_weighted_as_in_training(corpus):
    """A quarter text, a fifth computed documents, the rest problems; and their losses differ."""
    model, data = noisy_model(SMOKE, corpus), replace(SMOKE.data, text_share=0.25)
    model.head.weight.data.mul_(20)
    config = replace(SMOKE, data=data, warmup=replace(SMOKE.warmup, computed_share=0.2))
    (found,) = evals.evaluate_sizes([model], [0], corpus, config)
    text, computed, problem = (found[f"{kind}_loss_nats"] for kind in ("text", "computed", "problem"))
    means = sorted(kind["mean"] for kind in (text, computed, problem))
    assert min(means[1] - means[0], means[2] - means[1]) > 0.02
    expected = 0.25 * text["mean"] + 0.2 * computed["mean"] + 0.55 * problem["mean"]
    assert found["loss_nats"]["mean"] == pytest.approx(expected, rel=1e-6)
    assert found["loss_nats"]["n"] == text["n"] + computed["n"] + problem["n"]


@pytest.mark.parametrize(("text", "computed", "kinds"), [(1.0, 0.0, {"text"}), (0.0, 0.4, {"computed", "problem"})])
def test_kinds_that_training_does_not_read_are_not_measured(corpus, text, computed, kinds):
    """All rows are of the others."""
    data, warmup = replace(SMOKE.data, text_share=text), replace(SMOKE.warmup, computed_share=computed)
    model = noisy_model(SMOKE, corpus)
    (found,) = evals.evaluate_sizes([model], [0], corpus, replace(SMOKE, data=data, warmup=warmup))
    measured = {name.removesuffix("_loss_nats"): found[name]["n"] for name in found if name.endswith("_loss_nats")}
    del measured["long"]
    assert measured.keys() == kinds
    assert found["loss_nats"]["n"] == sum(measured.values()) >= SMOKE.eval.elastic_rows


def test_a_stratified_mean_and_its_interval_by_hand():
    """1, 3 (mean 2, variance 2, squared error 2 / 2 = 1), a quarter; 0, 0, 3, 3 (1.5, 3, 3 / 4), a half; 4, 8 (6, 8, 4).

    Mean 2 / 4 + 1.5 / 2 + 6 / 4 = 2.75; error^2 = 1 / 16 + 3 / 16 + 4 / 16 = 1 / 2; 1.96 x its root = 1.38593.
    """
    values = {"a": torch.tensor([1.0, 3]), "b": torch.tensor([0.0, 0, 3, 3]), "c": torch.tensor([4.0, 8])}
    found = evals.stratified(values, {"b": 0.5, "a": 0.25, "c": 0.25})
    assert found == pytest.approx({"mean": 2.75, "low": 2.75 - 1.38593, "high": 2.75 + 1.38593, "n": 8}, abs=1e-4)


def test_scores_of_every_axis_are_compared_on_a_trained_model(finished, capsys):
    """`tools.scores BASE`: a row an axis, a loss near ln V for each score of the hardly trained smoke base."""
    assert scores.main([summary_of(finished)["base_dir"]]) == 0
    shown = capsys.readouterr().out
    for axis in ("d_model", "depth", *routers.KIND_OF):
        (line,) = [line for line in shown.splitlines() if axis in line.split()]
        losses = [float(x) for x in re.findall(r"\d\.\d+", line)]
        assert len(losses) == (4 if axis == "d_model" else 3)
        assert all(abs(loss - math.log(512)) < 0.5 for loss in losses)


@pytest.mark.parametrize(
    ("changes", "axes"),
    [
        ({"n_heads": 3, "n_kv_heads": 1, "mamba_heads": 6, "mamba_groups": 2}, {"d_model", "depth", *routers.KIND_OF}),
        ({"n_heads": 2, "n_kv_heads": 2, "mamba_heads": 2, "mamba_groups": 2},
         {"d_model", "depth", *routers.KIND_OF} - {"attn_heads", "mamba_heads"}),
        ({"pattern": "*"}, {"d_model", "attn_heads"}),
        ({"pattern": "MM"}, {"d_model", "depth", "mamba_heads", "mamba_channels"}),
    ],
)  # fmt: skip
def test_scores_are_of_what_a_model_can_lose(corpus, changes, axes):
    """Whole groups of heads; an axis that it lacks, or of which nothing can go, has no row."""
    config = replace(SMOKE, model=replace(SMOKE.model, **changes), elastic=replace(SMOKE.elastic, calibration_rows=2))
    assert set(scores.table_of(noisy_model(config, corpus), corpus, config)) == axes


def test_scores_of_one_size_of_a_family_are_refused(extracted, capsys):
    assert scores.main([str(extracted)]) == 2
    assert f"error: {extracted} is one size of a family, which has no widths left to choose" in capsys.readouterr().err


def test_scores_of_a_model_with_tied_embeddings_leave_out_the_one_that_it_cannot_have(corpus):
    tied = replace(SMOKE, model=replace(SMOKE.model, tie_embeddings=True))
    table = scores.table_of(noisy_model(tied, corpus), corpus, tied)
    assert list(table["d_model"]) == ["paper", "output", "random"]
    assert set(table) == {"d_model", "depth", *routers.KIND_OF}


def test_long_losses_are_of_what_follows_the_first_part(corpus):
    """Texts of 64 tokens after whose first 32 the loss counts; a model that knows nothing has ln V everywhere."""
    model = noisy_model(SMOKE, corpus)
    model.head.weight.data.zero_()
    losses, _ = evals.long_losses(model, corpus, SMOKE)
    assert len(losses) == 8
    assert_close(losses, torch.full((8,), math.log(corpus.tokenizer.n_vocab)))
    seen = []
    model.register_forward_hook(lambda _, args, out: seen.append(args[0].shape))
    evals.long_losses(model, corpus, SMOKE)
    assert seen == [(4, 64), (4, 64)]


def two_mamba_sizes(corpus):
    """A model of one Mamba layer, it and its half, their widths, and settings for both."""
    model = noisy_model(replace(SMOKE, model=replace(SMOKE.model, pattern="M")), corpus)
    model.head.weight.data.mul_(30)
    widths = [nested.full_widths(model.config), nested.Widths(32, ((2, 16),))]
    sizes, config = [model, nested.submodel(model, widths[1])], with_elastic(budgets=(1.0, 0.5), long_weights=(0.5, 0.5))
    return model, sizes, widths, config


def test_what_a_hand_over_costs(corpus):
    """One Mamba layer: the full size's states hold the half's, so that loses nothing; the other way something is lost.
    What each size has read itself is answered as in its other figures."""
    model, sizes, widths, config = two_mamba_sizes(corpus)
    down, up = evals.handed_over(sizes, widths, model.config, corpus, config)
    assert (down["read"], down["goes_on"], up["read"], up["goes_on"]) == (1.0, 0.5, 0.5, 1.0)
    assert abs(down["more_nats"]["mean"]) < 1e-5
    assert down["own"] == down["handed"]
    assert abs(up["more_nats"]["mean"]) > 1e-3
    accuracies = evals.size_accuracies(sizes, corpus, config)
    for found, size in zip((up, down), accuracies, strict=True):
        assert found["own"] == size["accuracy"]["greedy"]["all"]


def test_what_a_hand_over_costs_by_hand(corpus, monkeypatch):
    """From the half to the full size: of each problem, the answer's -log p after states of the half minus that after its
    own, and both answers, which count here as right if they are even."""
    monkeypatch.setattr(evals.Positions, "right", lambda self, said_RX, target_BX, first: (said_RX[:, 0] % 2 == 0).float())
    model, sizes, widths, config = two_mamba_sizes(corpus)
    _, up = evals.handed_over(sizes, widths, model.config, corpus, config)
    positions, sampling = evals.problem_positions(corpus, config), evals.Sampling(1, config.rlp.thought_len, 0.0)
    (batch,) = positions.batches(model, 10**3)
    own, half = (evals.prefill(size, batch) for size in sizes)
    cache = nested.hand_over(half.cache, model.config, widths[1], widths[0])
    alone, handed = (evals.sample_thoughts(model, batch, corpus.tokenizer, sampling, prefix=prefix)
                     for prefix in (own, own._replace(cache=cache, early=cache)))  # fmt: skip
    assert up["more_nats"]["mean"] == pytest.approx(float((alone.logp_target_R - handed.logp_target_R).mean()), rel=1e-4)
    even = [float((found.answer_RX[:, 0] % 2 == 0).float().mean()) for found in (alone, handed)]
    assert [up["own"]["mean"], up["handed"]["mean"]] == pytest.approx(even)
    assert even[0] != even[1]


def test_scores_of_layers_lose_the_least_important_and_of_units_three_random_orders(corpus, monkeypatch):
    """A layer that writes nothing can go at no cost. The loss here is a size's distance from the model."""
    rank, drawn = importance.rank, []
    monkeypatch.setattr(importance, "rank", lambda *of: drawn.append((of[2].score_ffn, of[3])) or rank(*of))
    config = replace(SMOKE, model=replace(SMOKE.model, pattern="M-*-"))
    model = noisy_model(config, corpus)
    model.layers[1].mixer.down_proj.weight.data.zero_()
    batch = batches.mixture(corpus, config, 0, 4, 32)

    def logits(size):
        return size.logits(size(batch["tokens_BT"], ids_BT=batch["ids_BT"])[0])

    def loss(size):
        return float((logits(size) - logits(model)).abs().max().detach())

    table = importance.score_table(model, [batch], config.elastic, loss)
    assert table["depth"]["paper"] < 1e-5 < table["depth"]["random"]
    assert [seed for score, seed in drawn if score == "random"] == [0, 1, 2]


def test_no_text_is_long_enough_for_a_long_loss(corpus):
    losses, documents = evals.long_losses(noisy_model(SMOKE, corpus), corpus, with_elastic(long_len=10**7))
    assert math.isnan(evals.over_documents(losses, documents)["mean"])


def test_facts_of_a_size_by_another_count(corpus):
    model = noisy_model(SMOKE, corpus)
    facts = evals.size_facts(model, SMOKE)
    flops = sum_of_parts(routers.cost_measure(replace(SMOKE.elastic, cost="flops"), CPU), model.config)
    assert facts["parameters"] == count_parameters(model)
    assert facts["bytes"] == 4 * facts["parameters"]
    assert facts["flops_per_token"] == pytest.approx(flops)
    assert facts["cache_bytes"] == sum(part_cache_bytes(kind, model.config, 1024, 4) for kind in "M*-")
