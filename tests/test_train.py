"""The loop and the program, on runs of a few steps: resuming, interrupting, refusing, and what a run leaves behind."""

import dataclasses
import fcntl
import functools
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import tiktoken
import torch
from conftest import contents, die, disturb, metrics_of, paragraphs, press_ctrl_c, summary_of, weights_of
from safetensors import SafetensorError

import evals
import generate
import train
from rlp import RLP
from system import checkpoint, loop, parallel, rundir
from system.config import Config, DataConfig, FitConfig, PretrainConfig, from_dict, saved_config
from system.files import fingerprint
from system.presets import PRESETS
from text import corpus as corpus_module
from text.batches import pretrain_batch, rlp_batch
from text.problems import FAMILIES, held_out_problems
from text.tokenizer import THINK
from tools import shards as shards_program

CPU = torch.device("cpu")
LEAF = {"mean", "low", "high", "n"}


@pytest.fixture(scope="module")
def finished(program, tmp_path_factory):
    """The folder of a whole RLP run of three steps."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert program(out) == 0
    return out


# ----------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.25), (1, 0.5), (3, 1.0), (5, 1.0), (6, 1.0), (7, 0.75), (8, 0.5), (9, 0.25)]
)
def test_schedule_by_hand(step, rate):
    """Ten steps: four of warm-up, then constant, then over the last four linear to what would be 0 at step 10."""
    assert loop.schedule(step, FitConfig(steps=10, warmup=4, decay=0.4)) == pytest.approx(rate)


def test_without_warmup_and_decay_the_rate_is_constant():
    assert {loop.schedule(step, FitConfig(steps=10, warmup=0, decay=0.0)) for step in range(10)} == {1.0}


# --------------------------------------------------------------------------------------------------------- the loop


def counting_batch(step):
    """Four rows of 16 tokens that count by row and step, modulo 11: a batch that no version of anything changes."""
    tokens_BT = (torch.arange(4)[:, None] * 3 + torch.arange(17) * (step + 2)) % 11
    return {"tokens_BT": tokens_BT[:, :-1], "targets_BT": tokens_BT[:, 1:], "ids_BT": torch.zeros(4, 16, dtype=torch.long)}


def pretrain_on_counting(run_dir, dtype=torch.float32, objective=None, **changes):
    """Eight steps of AdamW on a smoke-sized model of 16 tokens."""
    settings = dataclasses.replace(PretrainConfig(steps=8, batch=4, warmup=2, lr=1e-2), **changes)
    run_dir.mkdir(exist_ok=True)
    model = rundir.build_model(PRESETS["smoke"], 16, CPU, seed=0).to(dtype)
    loop.fit(model, objective or train.NextToken(), counting_batch, settings, run_dir, 0, {}, "pretrain")
    return model


def test_what_follows_the_weights_does_so_after_every_update_of_a_batch(tmp_path):
    """As RLP's teacher with several inner epochs: two updates a batch, three batches."""
    followed = []

    class Twice(train.NextToken):
        n_updates = 2

        def after_step(self, model):
            followed.append(model.head.weight.detach().clone())

    pretrain_on_counting(tmp_path / "run", objective=Twice(), steps=3)
    assert len(followed) == 6
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(followed))


@pytest.mark.parametrize(
    ("muon_lr", "expected"),
    [
        (0.0, [2.74511, 2.78268, 2.80138, 2.77370, 2.74907, 2.70623, 2.61269, 2.59521]),
        (0.02, [2.74511, 2.77979, 2.80833, 2.79730, 2.81713, 2.83094, 2.80540, 2.89294]),
    ],
)
def test_golden_losses_of_eight_steps(tmp_path, muon_lr, expected):
    """A change here means that training computes something else than it did: wanted or not, it must be noticed."""
    pretrain_on_counting(tmp_path, muon_lr=muon_lr)
    assert [line["loss"] for line in metrics_of(tmp_path)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("parts", [2, 4])
def test_running_a_batch_in_parts_changes_nothing(tmp_path, parts):
    """In fp64; some targets are -100, so that parts differ in how many they hold."""

    class Uneven(train.NextToken):
        def loss(self, model, batch):
            targets_BT = batch["targets_BT"].masked_fill(batch["tokens_BT"] == 3, -100)
            return super().loss(model, {**batch, "targets_BT": targets_BT})

    whole, divided = (pretrain_on_counting(tmp_path / str(n), torch.float64, Uneven(), accumulate=n) for n in (1, parts))
    torch.testing.assert_close(whole.state_dict(), divided.state_dict(), rtol=1e-6, atol=1e-9)
    for first, second in zip(metrics_of(tmp_path / "1"), metrics_of(tmp_path / str(parts)), strict=True):
        assert first == pytest.approx(second, rel=1e-9)


def test_a_metric_is_the_parts_sums_over_their_own_counts(tmp_path):
    """Two parts of 32 targets: one value of 3 in the first alone is 3; 30 of 10 values and 5 of 30 are 35 / 40."""

    class Reports(train.NextToken):
        def loss(self, model, batch):
            loss, count, _ = super().loss(model, batch)
            first = int(batch["tokens_BT"][0, 0]) == 0
            return (
                loss,
                count,
                {
                    "both": (torch.tensor(30.0), 10) if first else (torch.tensor(5.0), 30),
                    "one": (torch.tensor(3.0 * first), first),
                },
            )

    pretrain_on_counting(tmp_path, objective=Reports(), steps=1, accumulate=2)
    (line,) = metrics_of(tmp_path)
    assert (line["one"], line["both"], line["count"]) == (3.0, 0.875, 64)


def test_the_progress_bar_shows_the_headline_of_the_objective(tmp_path, monkeypatch):
    """The loss, a metric of its own, and `nan` where no part has that metric."""
    shown = []
    monkeypatch.setattr(loop.Progress, "update", lambda self, task, note, **_: shown.append(note))
    for name, metrics in (
        ("loss", {}),
        ("gain", {"gain": (torch.tensor(0.5), 2)}),
        ("gain", {"gain": (torch.tensor(0.0), 0)}),
    ):

        class Named(train.NextToken):
            headline, found = name, metrics

            def loss(self, model, batch):
                return *super().loss(model, batch)[:2], self.found

        pretrain_on_counting(tmp_path, objective=Named(), steps=1)
    assert shown == ["loss 2.745", "gain 0.250", "gain nan"]


def test_a_non_finite_gradient_stops_the_run_with_the_weights_before_it_saved(tmp_path):
    """The fourth loss is NaN: what is saved is what three steps alone would have made."""

    class Explodes(train.NextToken):
        n_calls = 0

        def loss(self, model, batch):
            self.n_calls += 1
            loss, count, metrics = super().loss(model, batch)
            return loss * (float("nan") if self.n_calls == 4 else 1.0), count, metrics

    with pytest.raises(FloatingPointError, match=r"step 3: the gradient is not finite \(loss nan\).*smaller pretrain.lr"):
        pretrain_on_counting(tmp_path / "stopped", objective=Explodes())
    pretrain_on_counting(tmp_path / "three", steps=3)
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "three")
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "three")


def test_a_non_finite_gradient_of_a_router_stops_the_run_too(tmp_path):
    """A number beside the model learns as well; its gradient is NaN at the fourth step, the model's is not."""

    class Routed(train.NextToken):
        n_calls = 0

        def __init__(self):
            super().__init__()
            self.networks["router"] = self.router = torch.nn.Linear(1, 1, bias=False)
            torch.nn.init.zeros_(self.router.weight)

        def optimizers(self):
            return [torch.optim.SGD(self.router.parameters(), lr=0.1)]

        def loss(self, model, batch):
            self.n_calls += 1
            loss, count, metrics = super().loss(model, batch)
            own = self.router.weight.sum() * (float("nan") if self.n_calls == 4 else 1.0)
            return loss + own - own.detach(), count, metrics

    with pytest.raises(FloatingPointError, match=r"step 3: the gradient is not finite"):
        pretrain_on_counting(tmp_path / "stopped", objective=Routed())
    pretrain_on_counting(tmp_path / "three", steps=3, objective=Routed())
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "three")
    assert checkpoint.newest(tmp_path / "stopped").tensors("router")["weight"].isfinite().all()


def fit(mode, corpus, run_dir, before_step=None, start=None, log_to="jsonl"):
    """Six steps from noise, a checkpoint every two. For RLP with everything that has a state: teacher and reference."""
    config = PRESETS["smoke"]
    rlp = dataclasses.replace(config.rlp, kl=0.1, inner_epochs=2, reward_floor=-9.0, lr=1e-2, tau=0.9)
    config = dataclasses.replace(config, rlp=rlp)
    settings = dataclasses.replace(getattr(config, mode), steps=6, checkpoint_every=2)
    model = rundir.build_model(config, corpus.tokenizer.n_vocab, CPU, seed=1)
    torch.manual_seed(1)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    make = functools.partial(pretrain_batch if mode == "pretrain" else rlp_batch, corpus, config)
    objective = train.NextToken() if mode == "pretrain" else RLP(config.rlp, corpus.tokenizer)
    run_dir.mkdir(exist_ok=True)

    def batch_of(step):
        if before_step is not None:
            before_step(step)
        return make(step)

    loop.fit(model, objective, batch_of, settings, run_dir, 0, {}, mode, start, log_to)


@pytest.fixture(scope="module", params=["pretrain", "rlp"])
def uninterrupted(request, corpus, tmp_path_factory):
    """Mode and folder of a run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp(request.param)
    fit(request.param, corpus, run_dir)
    return request.param, run_dir


@pytest.mark.parametrize(
    ("action", "error", "saved"), [(press_ctrl_c, KeyboardInterrupt, 4), (die, RuntimeError, 2)], ids=["ctrl-c", "killed"]
)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(uninterrupted, corpus, tmp_path, action, error, saved):
    """Weights of every network, optimizer states and metrics. Ctrl-C in step 3 finishes and saves it; a kill loses it."""
    mode, expected = uninterrupted
    with pytest.raises(error):
        fit(mode, corpus, tmp_path, lambda step: action() if step == 3 else None)
    start = checkpoint.newest(tmp_path)
    assert start.meta["step"] == saved
    fit(mode, corpus, tmp_path, start=start)
    assert weights_of(tmp_path) == weights_of(expected)
    assert metrics_of(tmp_path) == metrics_of(expected)
    states = [checkpoint.newest(run_dir).optimizer() for run_dir in (tmp_path, expected)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_tensorboard_shows_what_the_log_holds_also_after_a_resume(corpus, tmp_path):
    """Six steps, of which the third is run again: what stopped the run lost it."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(RuntimeError):
        fit("pretrain", corpus, tmp_path, lambda step: die() if step == 3 else None, log_to="tensorboard")
    fit("pretrain", corpus, tmp_path, start=checkpoint.newest(tmp_path), log_to="tensorboard")
    board = EventAccumulator(str(tmp_path)).Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    for name in lines[0]:
        shown = [(e.step, e.value) for e in board.Scalars(name)]
        assert shown == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name


def test_tensorboard_that_is_missing_is_refused_before_any_work(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert program(tmp_path / "run", "--log", "tensorboard") != 0
    assert "log (tensorboard) needs the package tensorboard; run: pip install tensorboard" in " ".join(
        "".join(capsys.readouterr()).split()
    )
    assert not (tmp_path / "run").exists()


@pytest.fixture
def ctrl_c_interrupts():
    """As in a terminal: the shell starts jobs in the background, which a machine's tests may be, with Ctrl-C ignored."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_a_second_ctrl_c_stops_at_once(corpus, tmp_path):
    """In step 3, whose work is lost; the checkpoint of step 2 stays, and Ctrl-C means again what it meant before."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit("pretrain", corpus, tmp_path, lambda step: [press_ctrl_c(), press_ctrl_c()] if step == 3 else None)
    assert checkpoint.newest(tmp_path).meta["step"] == 2
    assert signal.getsignal(signal.SIGINT) == before


def test_such_runs_change_their_weights(uninterrupted):
    """Else the test above would say little: every network but the reference of RLP moves between the checkpoints."""
    mode, run_dir = uninterrupted
    older, newer = ({f.name: f.read_bytes() for f in p.glob("*.safetensors")} for p in sorted(run_dir.glob("checkpoint/*")))
    same = {name for name in newer if newer[name] == older[name]}
    assert len(newer) == (1 if mode == "pretrain" else 3)
    assert same == (set() if mode == "pretrain" else {"reference.safetensors"})


def test_a_half_written_line_of_the_log_does_not_stop_a_resumed_run(tmp_path):
    """A crash may cut the last line anywhere."""
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    loop.trim_log(log, 1)
    assert log.read_text() == '{"step": 1}\n'


def test_lines_of_the_log_that_hold_no_step_are_skipped_with_a_warning_and_nothing_else_is_lost(tmp_path, capsys):
    """Blank ones, zero bytes, alone and before a line that is whole, what is no step; other readers skip them too."""
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(
        b'{"step": 1, "seconds": 2.0}\n\n\0\0\0\n\0\0{"step": 2, "seconds": 3.0}\n[]\n{"step": ""}\n{"step": 3}\n'
    )
    assert rundir.logged_seconds(tmp_path) == 5.0
    loop.trim_log(log, 2)
    assert log.read_text() == '{"step": 1, "seconds": 2.0}\n{"step": 2, "seconds": 3.0}\n'
    assert "warning: " in capsys.readouterr().out
    loop.trim_log(log, 2)
    assert not capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- enough


class EnoughAt(train.NextToken):
    """Has learned enough after so many steps."""

    def __init__(self, n):
        super().__init__()
        self.n, self.asked = n, []

    def enough(self, model, step):
        self.asked.append(step)
        return "it [knows] it" if step == self.n else ""


def test_training_that_has_learned_enough_is_saved_says_so_and_does_not_go_on(tmp_path, capsys):
    """After 3 of 8 steps, between two checkpoints; saved is what three steps alone make, and a resumed run keeps it."""
    objective = EnoughAt(3)
    pretrain_on_counting(tmp_path / "enough", objective=objective, checkpoint_every=2)
    assert objective.asked == [1, 2, 3]
    assert "pretrain ends after 3 of 8 steps: it [knows] it" in " ".join(capsys.readouterr().out.split())
    pretrain_on_counting(tmp_path / "three", steps=3)
    assert weights_of(tmp_path / "enough") == weights_of(tmp_path / "three")
    start = checkpoint.newest(tmp_path / "enough")
    assert (start.meta["step"], start.meta["ended"]) == (3, True)
    before = contents(tmp_path / "enough")
    settings = PretrainConfig(steps=8, batch=4, warmup=2, lr=1e-2)
    model = rundir.build_model(PRESETS["smoke"], 16, CPU, seed=0)
    loop.fit(model, train.NextToken(), lambda step: pytest.fail("went on"), settings, tmp_path / "enough", 0, {},
             "pretrain", start)  # fmt: skip
    assert contents(tmp_path / "enough") == before
    torch.testing.assert_close(model.state_dict(), dict(start.tensors("model")), rtol=0, atol=0)


def test_only_the_last_checkpoint_says_that_training_has_ended(tmp_path):
    pretrain_on_counting(tmp_path, objective=EnoughAt(9), checkpoint_every=3)
    metas = [json.loads((p / "meta.json").read_text()) for p in sorted(tmp_path.glob("checkpoint/step_*"))]
    assert [(meta["step"], meta["ended"]) for meta in metas] == [(6, False), (8, True)]


def test_pretraining_is_enough_when_the_worst_family_is_and_looks_now_and_then(corpus, monkeypatch, capsys):
    """All families are in after 40 of 98 steps; every 10th step is measured. The worst has .79, once .8. The last step
    says what was reached."""
    found = {"easy": 1.0, "hard": 0.79}
    steps = []
    monkeypatch.setattr(train.evals, "validate", lambda *_: (steps.append(step), found)[1])
    fit = dataclasses.replace(PRESETS["smoke"].pretrain, steps=98, intro_share=0.4, enough=0.8, enough_every=10)
    objective = train.Pretraining(corpus, dataclasses.replace(PRESETS["smoke"], pretrain=fit))
    said = []
    for step in range(1, 99):
        found["hard"] = 0.8 if step == 90 else 0.79
        said.append(objective.enough(torch.nn.Linear(1, 1), step))
    assert steps == [40, 50, 60, 70, 80, 90, 98]
    assert said[89] == "accuracy by family: easy 1.00, hard 0.80"
    assert "took all its 98 steps; accuracy by family: easy 1.00, hard 0.79" in capsys.readouterr().out
    assert not any(said[:89] + said[90:])


def test_whether_a_base_is_good_enough_hangs_on_no_setting_of_rlp(corpus, monkeypatch):
    """It is kept for all of them. Thoughts may be as long as the longest that is worked, with its closing tag; questions
    and answers are whole."""
    seen, plain = [], PRESETS["cpu"]
    monkeypatch.setattr(train.evals, "validate", lambda _, __, config: (seen.append(config), {"all": 1.0})[1])
    other = dataclasses.replace(plain, rlp=dataclasses.replace(
        plain.rlp, thought_len=3, context_len=9, horizon=7, temperature=0.1, prompt="Think."))  # fmt: skip
    for config in (plain, other):
        train.Pretraining(corpus, config).enough(torch.nn.Linear(1, 1), config.pretrain.steps)
    assert seen[0].rlp == seen[1].rlp
    assert plain.base_fingerprint() == other.base_fingerprint()
    problems = held_out_problems("val", 48, plain.seed, corpus.held_out_percent, corpus.families)
    lengths = [[len(corpus.tokenizer.encode(text)) for text in (p.prompt, p.thought, p.answer)] for p in problems]
    prompt, thought, answer = map(max, zip(*lengths, strict=True))
    assert (seen[0].rlp.thought_len, seen[0].rlp.horizon) == (thought + 1, answer)
    assert seen[0].rlp.context_len == max(prompt, 128)


def test_a_base_that_is_good_enough_is_taken_as_it_is(program, tmp_path, monkeypatch, capsys):
    """No accuracy is asked for, after 2 of 4 steps: the base has two, a second run does not go on with it."""
    words = ("--data.cache-dir", tmp_path / "cache", "--pretrain.enough", 0, "--pretrain.enough-every", 2,
             "--pretrain.intro-share", 0)  # fmt: skip
    assert program(tmp_path / "first", *words, "--rlp.steps", 1) == 0
    assert "pretrain ends after 2 of 4 steps: accuracy by family: lookup " in " ".join(capsys.readouterr().out.split())
    (base,) = (tmp_path / "cache").glob("base-*")
    assert checkpoint.newest(base).meta["step"] == len(metrics_of(base)) == 2
    monkeypatch.setattr(rundir, "alone_in", lambda *_: pytest.fail("trained a base again"))
    assert program(tmp_path / "second", *words, "--rlp.steps", 1) == 0
    assert program(tmp_path / "alone", *words, "--mode", "pretrain") == 0
    assert weights_of(tmp_path / "alone") == weights_of(base)
    assert program(tmp_path / "alone", *words, "--mode", "pretrain", "--resume") == 0
    assert checkpoint.newest(tmp_path / "alone").meta["step"] == 2


# ------------------------------------------------------------------------------------------------------------- phases


@pytest.fixture
def phases(monkeypatch):
    """The names of the modes that are trained in, in order."""
    names, train_one = [], train.train
    monkeypatch.setattr(train, "train", lambda name, *rest: (names.append(name), train_one(name, *rest))[1])
    return names


def test_a_base_is_trained_once_and_warmed_up_once_for_each_warm_up(program, phases, tmp_path):
    """A second run takes both from the cache; other settings of the warm-up make another warmed base from the same base."""
    words = ("--data.cache-dir", tmp_path / "cache", "--rlp.steps", 1)
    assert program(tmp_path / "first", *words) == 0
    assert phases == ["pretrain", "warmup", "rlp"]
    first = summary_of(tmp_path / "first")
    assert (first["base_was_cached"], Path(first["base_dir"]).parent) == (False, tmp_path / "cache")
    assert program(tmp_path / "second", *words) == 0
    assert phases[3:] == ["rlp"]
    assert summary_of(tmp_path / "second")["base_was_cached"]
    assert summary_of(tmp_path / "second")["base_dir"] == first["base_dir"]
    for changes in (("--warmup.lr", 1e-3), ("--rlp.back", 3)):
        phases.clear()
        assert program(tmp_path / changes[0], *words, *changes) == 0
        assert phases == ["warmup", "rlp"]
        assert not summary_of(tmp_path / changes[0])["base_was_cached"]
    assert len([*(tmp_path / "cache").glob("base-*")]) == 1
    assert len([*(tmp_path / "cache").glob("warmed-*")]) == 3


def test_the_seconds_of_a_base_are_those_of_both_phases(program, tmp_path):
    cache = tmp_path / "cache"
    assert program(tmp_path / "run", "--data.cache-dir", cache, "--rlp.steps", 0) == 0
    lines = [json.loads(line) for f in cache.glob("*/metrics.jsonl") for line in f.read_text().splitlines()]
    assert len(lines) == 4 + 2
    assert summary_of(tmp_path / "run")["base_train_s"] == pytest.approx(sum(line["seconds"] for line in lines))


def test_without_steps_there_is_no_warm_up(program, phases, tmp_path):
    assert program(tmp_path / "run", "--data.cache-dir", tmp_path / "cache", "--warmup.steps", 0, "--rlp.steps", 0) == 0
    assert phases == ["pretrain", "rlp"]
    (base,) = (tmp_path / "cache").glob("base-*")
    assert not [*(tmp_path / "cache").glob("warmed-*")]
    assert summary_of(tmp_path / "run")["base_dir"] == str(base)
    assert weights_of(tmp_path / "run")["model.safetensors"] == weights_of(base)["model.safetensors"]


def test_a_warm_up_can_be_a_run_of_its_own(program, finished, phases, tmp_path):
    """From the base, as the phase is; or from the weights of a run."""
    assert program(tmp_path / "alone", "--mode", "warmup") == 0
    assert phases == ["warmup"]  # the base is there
    assert weights_of(tmp_path / "alone") == weights_of(Path(summary_of(finished)["base_dir"]))
    assert summary_of(tmp_path / "alone")["accuracy"]["greedy"]["all"]["base"]["n"] == 16
    assert program(tmp_path / "next", "--mode", "warmup", "--init", finished) == 0
    assert phases == ["warmup", "warmup"]
    assert summary_of(tmp_path / "next")["base_dir"] == str(finished)
    assert program(tmp_path / "kept", "--mode", "warmup", "--init", finished, "--warmup.steps", 0) == 0
    assert weights_of(tmp_path / "kept")["model.safetensors"] == weights_of(finished)["model.safetensors"]
    assert weights_of(tmp_path / "next") != weights_of(tmp_path / "kept")


@pytest.fixture
def unwarmed(program, tmp_path):
    """A run that was pretrained, and no more."""
    assert program(tmp_path / "unwarmed", "--mode", "pretrain", "--pretrain.steps", 1) == 0
    return tmp_path / "unwarmed"


def test_a_run_is_warmed_up_once(program, finished, unwarmed, phases, tmp_path, capsys):
    """Whatever comes after a warm-up does not repeat it; asked for by name it goes on."""
    assert program(tmp_path / "first", "--mode", "sft", "--init", unwarmed) == 0
    assert phases == ["warmup", "sft"]
    assert "is warmed up" not in capsys.readouterr().out
    for run, mode in ((tmp_path / "first", "rlp"), (finished, "cpt")):
        phases.clear()
        assert program(tmp_path / mode, "--mode", mode, "--init", run) == 0
        assert phases == [mode]
        assert "is warmed up: the 2 steps of warmup.steps are not taken again" in " ".join(capsys.readouterr().out.split())


def test_what_began_with_a_warmed_model_is_warmed_up(program, finished, phases, tmp_path):
    """Also where the run between had no warm-up of its own, and where the first one is gone."""
    first = shutil.copytree(finished, tmp_path / "first")
    assert program(tmp_path / "between", "--init", first, "--warmup.steps", 0) == 0
    shutil.rmtree(first)
    phases.clear()
    assert program(tmp_path / "last", "--mode", "rlvr", "--init", tmp_path / "between") == 0
    assert phases == ["rlvr"]
    assert rundir.was_warmed(str(tmp_path / "last"))
    assert not rundir.was_warmed("")


def test_resume_without_the_weights_that_the_run_began_with_says_so(program, finished, tmp_path, capsys):
    """The figures compare with them."""
    first = shutil.copytree(finished, tmp_path / "first")
    words = ("--mode", "sft", "--init", first)
    assert program(tmp_path / "run", *words) == 0
    shutil.rmtree(first)
    assert program(tmp_path / "run", *words, "--resume") == 2
    assert f"resume: init ({first}), which" in " ".join(capsys.readouterr().out.split()).replace("- ", "-")


def test_rows_beyond_the_vocabulary_are_no_text(program, tmp_path):
    """As in models whose number of rows is rounded up: an untrained one thinks of them too."""
    words = ("--model.vocab-size", 640, "--pretrain.steps", 0, "--warmup.steps", 0, "--rlp.steps", 10)
    assert program(tmp_path / "run", *words) == 0
    assert (tmp_path / "run/thoughts.jsonl").exists()


def test_a_run_from_given_weights_keeps_its_warm_up_in_its_folder_and_resumes_with_it(
    program, unwarmed, phases, tmp_path, monkeypatch
):
    """Stopped in the warm-up and started again, then stopped in RLP and resumed: all is as if nothing had stopped it."""
    words, run = ("--init", unwarmed), tmp_path / "run"
    assert program(tmp_path / "whole", *words) == 0
    assert phases == ["warmup", "rlp"]
    with monkeypatch.context() as patch:
        disturb(patch, "warmup", 0, press_ctrl_c)
        assert program(run, *words) == 130
    (kept,) = run.glob("warmed-*")
    assert checkpoint.newest(kept).meta["step"] == 1
    with monkeypatch.context() as patch:
        disturb(patch, "rlp", 0, press_ctrl_c)
        assert program(run, *words) == 130
    phases.clear()
    assert program(run, *words, "--resume") == 0
    assert phases == ["rlp"]
    assert weights_of(kept) == weights_of(Path(summary_of(tmp_path / "whole")["base_dir"]))
    assert weights_of(run) == weights_of(tmp_path / "whole")
    assert metrics_of(run) == metrics_of(tmp_path / "whole")
    assert summary_of(run)["base_dir"] == str(kept)


def test_a_warm_up_that_was_stopped_is_not_gone_on_with_under_other_settings(program, unwarmed, tmp_path, monkeypatch):
    """Nor from other weights: it is another one, in a folder of its own."""
    with monkeypatch.context() as patch:
        disturb(patch, "warmup", 0, press_ctrl_c)
        assert program(tmp_path / "run", "--init", unwarmed) == 130
    assert program(tmp_path / "run", "--init", unwarmed, "--warmup.lr", 1e-4, "--rlp.steps", 0) == 0
    assert program(tmp_path / "whole", "--init", unwarmed, "--warmup.lr", 1e-4, "--rlp.steps", 0) == 0
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert len([*(tmp_path / "run").glob("warmed-*")]) == 2


def test_pretraining_from_given_weights_begins_with_them(program, finished, phases, tmp_path):
    """Without a warm-up: that comes after it."""
    assert program(tmp_path / "run", "--mode", "pretrain", "--init", finished, "--pretrain.steps", 0) == 0
    assert phases == ["pretrain"]
    assert weights_of(tmp_path / "run")["model.safetensors"] == weights_of(finished)["model.safetensors"]


# -------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_settings_metrics_figures_samples_plots_and_a_checkpoint(finished):
    names = {p.name for p in finished.iterdir()}
    plots = {"gain.png", "accuracy.png", "thoughts.png"}
    assert names == {"config.json", "metrics.jsonl", "summary.json", "samples.txt", "checkpoint", "hf"} | plots
    assert all((finished / plot).read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert checkpoint.newest(finished).meta["step"] == 3
    assert [line["step"] for line in metrics_of(finished)] == [1, 2, 3]


def test_a_run_keeps_its_tokenizer_whatever_becomes_of_the_text(finished, corpus, text_file, monkeypatch):
    """To talk to it no text is needed, and a run that begins with its weights reads other text with its tokens."""
    monkeypatch.setattr(corpus_module, "python_documents", lambda: pytest.fail("text was read"))
    _, tokenizer, _ = rundir.load_run(finished)
    text = "How many apples has Tom?" + THINK
    assert tokenizer.encode(text) == corpus.tokenizer.encode(text)
    config = PRESETS["smoke"]
    other = dataclasses.replace(config, init=str(finished), data=dataclasses.replace(config.data, path=str(text_file)))
    assert rundir.resolve(other).data.tokenizer == str(finished / "hf")


def test_a_run_of_another_machines_device_is_opened_on_this_ones(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    file.write_text(re.sub('"device": "[a-z]+"', '"device": "cuda"', file.read_text()))
    assert rundir.saved_config(tmp_path / "run").device == "cuda"
    model, *_ = rundir.load_run(tmp_path / "run")
    assert parallel.device_of(model) == rundir.pick_device(PRESETS["smoke"])


def test_a_second_program_waits_for_the_base_that_another_one_trains(program, corpus, tmp_path, monkeypatch):
    """While another holds the folder's lock nothing is trained; once it is free the base is, once."""
    config = dataclasses.replace(PRESETS["smoke"], data=DataConfig(cache_dir=str(tmp_path)))
    model = rundir.build_model(config, corpus.tokenizer.n_vocab, torch.device("cpu"), 0)
    folder = tmp_path / f"base-{fingerprint([config.base_fingerprint(), corpus.key])}"
    events, train_one, inside = [], train.train, threading.Event()
    monkeypatch.setattr(train, "train", lambda *a: (events.append("trained"), train_one(*a)))

    def another() -> None:
        with rundir.alone_in(folder):
            inside.set()
            time.sleep(0.5)
            events.append("left")

    threading.Thread(target=another).start()
    assert inside.wait(10)
    assert not train.base_weights(config, corpus, model)["base_was_cached"]
    assert train.base_weights(config, corpus, model)["base_was_cached"]
    assert events == ["left", "trained", "trained"]  # the base, and warmed up


def test_who_waits_for_a_base_asks_again_and_again(tmp_path, monkeypatch):
    """So that the other processes, which wait for its answer, do not take it for lost."""
    (tmp_path / "base").mkdir()
    other, asked, on_first = os.open(tmp_path / "base" / "lock", os.O_CREAT | os.O_RDWR), [], parallel.on_first
    fcntl.flock(other, fcntl.LOCK_EX)
    monkeypatch.setattr(rundir.parallel, "on_first", lambda f: asked.append(f) or on_first(f))
    monkeypatch.setattr(rundir.time, "sleep", lambda _: len(asked) == 3 and os.close(other))
    with rundir.alone_in(tmp_path / "base"):
        assert len(asked) == 4


def test_a_base_that_broke_off_keeps_nobody_out(tmp_path):
    with pytest.raises(ZeroDivisionError), rundir.alone_in(tmp_path / "base"):
        _ = 1 / 0
    with rundir.alone_in(tmp_path / "base"):
        assert (tmp_path / "base" / "lock").exists()


def test_a_run_without_its_tokenizer_is_refused(finished, tmp_path):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run_dir / "hf")
    said = r"run/hf, the run's tokenizer, is missing; copy it"
    with pytest.raises(ValueError, match=said):
        rundir.load_run(run_dir)
    with pytest.raises(ValueError, match=said):
        rundir.resolve(train.parse(["--init", str(run_dir)]))


def test_init_from_a_run_brings_the_name_of_its_tokenizer(finished, tmp_path):
    """tiktoken's vocabularies are kept by name alone; another one beside it is refused."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run_dir / "hf")
    saved = json.loads((run_dir / "config.json").read_text())
    saved["config"]["data"]["tokenizer"] = "gpt2"
    (run_dir / "config.json").write_text(json.dumps(saved))
    assert rundir.resolve(train.parse(["--init", str(run_dir)])).data.tokenizer == "gpt2"
    with pytest.raises(ValueError, match=r"data.tokenizer \(r50k_base\) is not read where init brings one, gpt2"):
        rundir.resolve(train.parse(["--init", str(run_dir), "--data.tokenizer", "r50k_base"]))


def test_a_vocabulary_of_tiktokens_is_kept_by_its_name(text_file, tmp_path, monkeypatch):
    """Whether it was given or is that of shards; what begins with the run has it too."""
    bytes_alone = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks={bytes([i]): i for i in range(256)},
                                    special_tokens={})  # fmt: skip
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: bytes_alone)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs(40)))
    build = ["build", tmp_path / "texts.jsonl", "--out", tmp_path / "set", "--tokenizer", "gpt2"]
    assert shards_program.main([*map(str, build)]) == 0
    cache = ["--preset", "smoke", "--data.cache-dir", str(tmp_path / "cache"), "--data.held-out-percent", "25"]
    own, shared = ["--data.path", str(text_file)], ["--data.path", str(tmp_path / "set")]
    cache += ["--data.text-share", "1"]
    pretrain = ["--mode", "pretrain", "--pretrain.steps", "1"]
    assert train.main([*cache, *own, *pretrain, "--data.tokenizer", "gpt2", "--out", str(tmp_path / "a")]) == 0
    assert train.main([*cache, *shared, *pretrain, "--out", str(tmp_path / "b")]) == 0
    for run in ("a", "b"):
        assert rundir.load_run(tmp_path / run)[1].n_vocab == 259
        more = ["--mode", "cpt", "--cpt.steps", "1", "--init", str(tmp_path / run), "--out", str(tmp_path / f"of_{run}")]
        assert train.main([*cache, *own, *more]) == 0
        assert saved_config(tmp_path / f"of_{run}").data.tokenizer == "gpt2"
    assert train.main([*cache, *shared, *pretrain, "--pretrain.steps", "2", "--out", str(tmp_path / "b"), "--resume"]) == 2


@pytest.mark.parametrize(("name", "error"), [("save_file", SafetensorError), ("torch.save", RuntimeError)])
def test_a_full_disk_is_said_and_what_was_saved_stays(program, tmp_path, monkeypatch, capsys, name, error):
    """The checkpoint at the end cannot be written; the one in the middle goes on."""
    owner, attribute = (torch, "save") if name == "torch.save" else (checkpoint, name)
    real = getattr(owner, attribute)

    def write(what, file, *more, **options):
        if "step_000003" in str(file):
            raise error("No space left on device (os error 28)\nmore")
        return real(what, file, *more, **options)

    monkeypatch.setattr(owner, attribute, write)
    assert program(tmp_path / "run", "--rlp.checkpoint-every", 2) == 1
    said = capsys.readouterr().out.replace("\n", " ")
    assert "cannot be written (No space left on device (os error 28)); is the disk full?" in said
    assert "what was saved goes on with --resume" in said
    assert checkpoint.newest(tmp_path / "run").meta["step"] == 2


def test_a_damaged_base_that_was_kept_says_what_to_delete(finished, tmp_path):
    folder = shutil.copytree(summary_of(finished)["base_dir"], tmp_path / "base-1")
    for weights in folder.rglob("model.safetensors"):
        weights.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"no usable checkpoint in {folder}.*, so delete {folder}: it is made again"):
        train.phase("pretrain", folder, train.parse([]), None, None)


def test_config_json_holds_the_resolved_settings(finished, cache_dir):
    saved = json.loads((finished / "config.json").read_text())
    data = dataclasses.replace(PRESETS["smoke"].data, cache_dir=str(cache_dir))
    assert from_dict(Config, saved["config"]) == dataclasses.replace(PRESETS["smoke"], data=data, out=str(finished))
    assert saved["versions"]["torch"] == torch.__version__


def test_summary_holds_every_figure_with_its_interval_and_n(finished):
    summary = summary_of(finished)
    for reference in ("frozen_base", "ema", "own_no_think", "empty_thought"):
        assert summary["gain_nats"][reference].keys() == LEAF
        assert summary["gain_nats"][reference]["n"] == 4 * len(FAMILIES)
    for kind in ("sampled", "greedy", "no_think"):
        for family in ("all", *FAMILIES):
            for who in ("base", "rlp"):
                leaf = summary["accuracy"][kind][family][who]
                assert leaf.keys() == LEAF
                assert leaf["n"] == (4 * len(FAMILIES) if family == "all" else 4)
                assert leaf["low"] <= leaf["mean"] <= leaf["high"]
    assert all(summary["loss_nats"]["no_think_text"][who].keys() == LEAF | {"n_documents"} for who in ("base", "rlp"))
    assert (summary["mode"], summary["preset"], summary["seed"]) == ("rlp", "smoke", 0)
    assert summary["wall_s"] > 0
    assert summary["peak_memory_gib"] > 0
    assert (summary["threads"], summary["seconds_to_90"]) == (1, None)
    assert summary["machine"]
    assert summary["instructions"]


def test_seconds_to_a_value_end_with_the_first_steps_in_a_row_whose_mean_has_it(tmp_path):
    """Of .9 over two steps: after .8 and 1, at 1 + 2 + 4 seconds. A step without the metric counts as 0."""
    values = [0.9, 0.8, 1.0, None, 0.95, 0.95]
    lines = [{"step": i + 1, "seconds": 2**i} | ({} if v is None else {"correct": v}) for i, v in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert rundir.seconds_to(tmp_path, "correct", 0.9, n=2) == 7
    assert rundir.seconds_to(tmp_path, "correct", 0.94, n=2) == 63
    assert rundir.seconds_to(tmp_path, "correct", 0.96, n=2) is None
    assert rundir.seconds_to(tmp_path, "no such", 0.1) is None


def test_samples_show_two_thoughts_of_each_model_for_every_family(finished):
    text = (finished / "samples.txt").read_text()
    assert all(text.count(f"[{family}]") == 2 for family in FAMILIES)
    assert text.count(" base: <think>") == text.count(" rlp: <think>") == 2 * len(FAMILIES)


def test_continued_pretraining_is_measured_beside_its_base(program, tmp_path):
    assert program(tmp_path / "run", "--mode", "cpt") == 0
    summary = summary_of(tmp_path / "run")
    assert summary["accuracy"]["greedy"]["all"].keys() == {"base", "cpt"}
    assert summary["gain_nats"]["frozen_base"].keys() == LEAF


def test_a_pretraining_run_leaves_a_plot_of_its_loss_and_the_figures_of_the_base(program, tmp_path):
    assert program(tmp_path / "run", "--mode", "pretrain") == 0
    summary = summary_of(tmp_path / "run")
    assert (tmp_path / "run" / "loss.png").exists()
    assert summary["accuracy"]["sampled"]["all"]["base"].keys() == LEAF
    assert summary["loss_nats"]["no_think_text"]["base"]["mean"] > 0


def test_a_second_run_takes_the_base_from_the_cache(program, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "alone_in", lambda *_: pytest.fail("trained a base again"))
    assert program(tmp_path / "run", "--rlp.lr", 1e-3) == 0
    assert summary_of(tmp_path / "run")["base_dir"] == summary_of(finished)["base_dir"]


def test_a_base_is_not_reused_after_its_text_has_changed(program, text_file, tmp_path):
    words = ("--data.path", text_file, "--data.held-out-percent", 25, "--rlp.steps", 0, "--pretrain.steps", 1,
             "--warmup.steps", 1)  # fmt: skip
    assert program(tmp_path / "first", *words) == 0
    text_file.write_text("".join(paragraphs(20, seed=1)))
    assert program(tmp_path / "second", *words) == 0
    assert summary_of(tmp_path / "first")["base_dir"] != summary_of(tmp_path / "second")["base_dir"]


@pytest.mark.parametrize("mode", ["pretrain", "rlp", "cpt", "sft", "rlvr"])
def test_init_starts_from_another_runs_weights_and_zero_steps_keep_them(program, finished, tmp_path, mode):
    assert program(tmp_path / "run", "--mode", mode, "--init", finished, f"--{mode}.steps", 0) == 0
    assert weights_of(tmp_path / "run")["model.safetensors"] == weights_of(finished)["model.safetensors"]


def test_a_dry_run_prints_settings_and_size_and_writes_nothing(program, finished, cache_dir, tmp_path, capsys):
    before = contents(cache_dir, tmp_path)
    assert program(tmp_path / "run", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert contents(cache_dir, tmp_path) == before
    assert '"thought_len": 8' in shown
    assert f"{summary_of(finished)['parameters']:,} parameters" in shown
    assert not (tmp_path / "run").exists()


def test_generate_shows_a_thought_of_a_finished_run(finished, capsys):
    prompt = "Tens digit of 12 + 34?\nAnswer:"
    assert generate.main([str(finished), prompt, "--thought-len", "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(prompt + "<think>")
    assert "</think>" in shown


def test_generate_refuses_an_empty_prompt(finished, capsys):
    assert generate.main([str(finished), ""]) == 2
    assert "error: prompt ('') is empty" in capsys.readouterr().err
    assert generate.main([str(finished), "Tens", "--thought-len", "0"]) == 2
    assert "error: thought-len (0) must be at least 1" in capsys.readouterr().err


def test_square_brackets_in_a_message_are_printed_as_they_are(capsys):
    rundir.warn("runs/a[b] is damaged")
    assert "warning: runs/a[b] is damaged" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- interrupted whole runs


def test_a_run_stopped_by_ctrl_c_and_resumed_equals_the_uninterrupted_one(program, finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the first of three steps: exit code 130 and where it was saved; then weights and figures are the same."""
    with monkeypatch.context() as patch:
        disturb(patch, "rlp", 0, press_ctrl_c)
        assert program(tmp_path) == 130
    assert "stopped after step 1; saved in" in capsys.readouterr().out
    assert program(tmp_path, "--resume") == 0
    assert weights_of(tmp_path) == weights_of(finished)
    assert metrics_of(tmp_path) == metrics_of(finished)
    differing = {k for k, v in summary_of(tmp_path).items() if v != summary_of(finished)[k]}
    assert differing <= {"wall_s", "steps_s", "peak_memory_gib", "base_was_cached"}


@pytest.mark.parametrize(("mode", "said"), [("rlp", "go on with --resume"), ("pretrain", "go on with the same command")])
def test_a_stopped_run_says_how_to_go_on(program, tmp_path, monkeypatch, capsys, mode, said):
    """In its base there is nothing yet that --resume finds."""
    disturb(monkeypatch, mode, 0, press_ctrl_c)
    assert program(tmp_path / "run", "--data.cache-dir", tmp_path / "cache") == 130
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("ctrl_c_interrupts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_run_that_is_stopped_in_its_figures_says_how_to_go_on(program, tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(evals, "evaluate_both", lambda *_: os.kill(os.getpid(), number))
    assert program(tmp_path / "run") == 130
    assert "stopped; go on with --resume" in " ".join(capsys.readouterr().out.split())
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_base_stopped_by_ctrl_c_is_finished_by_the_next_run(program, finished, tmp_path, monkeypatch):
    """In a cache of its own. The base is then the one that was never stopped, and so is what it becomes in the warm-up."""
    words = ("--data.cache-dir", tmp_path / "cache")
    with monkeypatch.context() as patch:
        disturb(patch, "pretrain", 1, press_ctrl_c)
        assert program(tmp_path / "run", *words) == 130
    (base,) = (tmp_path / "cache").glob("base-*")
    assert checkpoint.newest(base).meta["step"] == 2
    assert program(tmp_path / "run", *words) == 0
    (warmed,) = (tmp_path / "cache").glob("warmed-*")
    original = Path(summary_of(finished)["base_dir"])
    assert warmed.name == original.name
    for own, other in ((base, original.parent / base.name), (warmed, original)):
        assert weights_of(own) == weights_of(other)
        assert metrics_of(own) == metrics_of(other)


def test_a_cache_inside_the_text_is_refused(tmp_path, monkeypatch):
    """What the first run keeps there the next would read."""
    monkeypatch.chdir(tmp_path)
    config = Config(data=DataConfig(path="."), out=str(tmp_path.parent / "run"))
    with pytest.raises(ValueError, match=r"data.cache_dir \(runs/cache\) is or lies in data.path \(\.\).*--data.cache-dir"):
        rundir.resume_point(config, config.run_dir())
    free = dataclasses.replace(config, data=DataConfig(path=".", cache_dir=str(tmp_path.parent / "cache")))
    assert rundir.resume_point(free, free.run_dir()) is None


def test_a_run_that_explodes_ends_with_1_and_says_what_to_lower(program, tmp_path, capsys):
    assert program(tmp_path, "--rlp.lr", 1e38, "--rlp.warmup", 0) == 1
    shown = capsys.readouterr().out
    assert "the gradient is not finite" in shown
    assert "rlp.lr or rlp.clip_norm" in shown


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_run_folder_in_use_is_refused_and_left_as_it_is(program, finished, capsys):
    before = contents(finished)
    assert program(finished) == 2
    assert f"out ({finished}) already holds a run; add --resume" in capsys.readouterr().out
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("option", "value", "change"),
    [
        ("--seed", 1, "seed was 0, now 1"),
        ("--rlp.group-size", 2, "rlp.group_size was 4, now 2"),
        ("--rlp.steps", 9, "rlp.steps was 3, now 9"),
        ("--model.d-ff", 32, "model.d_ff was 64, now 32"),
        ("--data.text-share", 0.5, "data.text_share was 0.25, now 0.5"),
        ("--init", "elsewhere", "now elsewhere"),
        ("--pretrain.lr", 1.0, "pretrain.lr was 0.003, now 1.0"),
        ("--warmup.lr", 1.0, "warmup.lr was 0.003, now 1.0"),
        ("--rlp.back", 3, "rlp.back was 2, now 3"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(program, finished, tmp_path, capsys, option, value, change):
    """Those of the base too: the figures before RLP would be of a base that the run did not start from."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    assert program(run_dir, "--resume", option, value) == 2
    assert change in capsys.readouterr().out
    assert [*contents(run_dir).values()] == [*contents(finished).values()]


def test_resuming_with_another_text_is_refused(program, text_file, tmp_path, monkeypatch, capsys):
    """The settings are the same: only the file that data.path names has changed. With the old text it goes on."""
    words = ("--mode", "pretrain", "--data.path", text_file, "--data.held-out-percent", 25)
    before = text_file.read_text()
    with monkeypatch.context() as patch:
        disturb(patch, "pretrain", 1, press_ctrl_c)
        assert program(tmp_path / "run", *words) == 130
    saved = contents(tmp_path / "run")
    text_file.write_text("".join(paragraphs(20, seed=1)))
    assert program(tmp_path / "run", *words, "--resume") == 2
    assert "resume: the text or the problems are not what the run was started with" in capsys.readouterr().out
    assert contents(tmp_path / "run") == saved
    text_file.write_text(before)
    assert program(tmp_path / "run", *words, "--resume") == 0


def test_resuming_with_other_logging_and_measuring_is_allowed(program, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        disturb(patch, "rlp", 0, press_ctrl_c)
        assert program(tmp_path) == 130
    free = ("--rlp.log-every", 2, "--rlp.checkpoint-every", 1, "--pretrain.log-every", 2, "--eval.text-positions", 6)
    assert program(tmp_path, "--resume", *free) == 0
    assert weights_of(tmp_path) == weights_of(finished)


@pytest.mark.parametrize("name", ["hf", "metrics.jsonl", "samples.txt", "summary.json"])
def test_a_folder_with_other_peoples_files_is_left_as_it_is(program, tmp_path, capsys, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    assert program(tmp_path / "run") == 2
    assert f"holds {name}, and no config.json of a run: they would be written over" in capsys.readouterr().out
    assert contents(tmp_path / "run") == {tmp_path / "run" / name: b"mine"}


@pytest.mark.parametrize("below", ["", "run"])
def test_the_texts_are_no_place_for_a_run(program, text_file, tmp_path, capsys, below):
    texts = tmp_path / "texts"
    texts.mkdir()
    shutil.copy(text_file, texts)
    assert program(texts / below, "--data.path", texts) == 2
    assert "and would be read as text; choose another --out" in capsys.readouterr().out.replace("\n", " ")


def test_resuming_nothing_is_refused(program, tmp_path, capsys):
    assert program(tmp_path / "run", "--resume") == 2
    assert f"resume: {tmp_path / 'run'} holds no checkpoint; leave --resume out to start" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_init_without_a_checkpoint_is_refused(program, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert program(tmp_path / "run", "--init", tmp_path / "empty") == 2
    assert f"init ({tmp_path / 'empty'}) holds no checkpoint" in capsys.readouterr().out


def test_init_that_does_not_exist_is_refused_before_anything_is_written(program, tmp_path, capsys):
    assert program(tmp_path / "run", "--init", tmp_path / "nowhere") == 2
    assert f"init ({tmp_path / 'nowhere'}) does not exist; give the folder of" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["out", "data.cache_dir"])
def test_a_folder_that_cannot_be_written_is_refused_by_name(program, text_file, tmp_path, capsys, option):
    """Below a file there is no folder."""
    blocked = tmp_path / "file" / "folder"
    blocked.parent.write_text("in the way")
    words = ("--data.path", text_file, "--data.held-out-percent", 25, "--data.cache-dir", tmp_path / "cache")
    assert program(tmp_path / "run", *words, f"--{option.replace('_', '-')}", blocked) == 2
    assert f"{option} ({blocked}) cannot be written to" in capsys.readouterr().out


def test_a_model_with_too_few_tokens_is_refused(program, tmp_path, capsys):
    assert program(tmp_path, "--model.vocab-size", 100) == 2
    assert "model.vocab_size (100) is smaller than the tokenizer's 512" in capsys.readouterr().out
