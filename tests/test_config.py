"""Every refusal of config.py by its message, modes of one's own, the saved form, the key of the base; and by `ast`:
no setting is ignored.
"""

import ast
import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

import train
from system import config, rundir
from system.config import Config, FitConfig, Rule, Settings, WarmupConfig, from_dict
from system.presets import PRESETS
from views import estimate

ROOT = Path(__file__).parent.parent


def override(start: Config, **changes) -> Config:
    """The settings with others in their place; `rlp__tau=2.0` is `rlp.tau`."""
    for name, value in changes.items():
        group, _, field = name.rpartition("__")
        if group:
            start = dataclasses.replace(start, **{group: dataclasses.replace(getattr(start, group), **{field: value})})
        else:
            start = dataclasses.replace(start, **{field: value})
    return start


# ----------------------------------------------------------------------------------------------------------- refusals

SIZES = "d_model d_ff n_heads n_kv_heads attn_head_dim mamba_heads mamba_head_dim mamba_groups d_state conv_width chunk"
REFUSED = [  # setting, value, the rule that the message must give
    ("model__pattern", "", "needs at least one layer"),
    ("model__pattern", "M?*X", r"unknown letters '\?X'.*M \(Mamba-2\), \* \(attention\) or - \(feed-forward\)"),
    ("model__pattern", "--", r"no layer but -, so no token would see another; add M or \*"),
    *((f"model__{name}", 0, "must be at least 1") for name in SIZES.split()),
    ("model__vocab_size", -1, "must be 0 or more; 0 takes the tokenizer's"),
    ("model__ffn", "gelu", "is unknown; choose one of relu2, swiglu"),
    ("model__norm_eps", 0.0, "must be positive; 1e-5 is usual"),
    ("model__rope_theta", -1.0, "must be 0 or more; 0 is no positional embedding"),
    ("data__vocab_size", 299, "must be at least 300"),
    ("data__text_share", -0.1, r"must lie in \[0, 1\]"),
    ("data__text_share", 1.1, r"must lie in \[0, 1\]"),
    ("data__held_out_percent", 0, r"must lie in \[1, 25\]"),
    ("data__held_out_percent", 26, r"must lie in \[1, 25\]"),
    *(
        (f"{group}__{name}", value, rule)
        for group in Config().modes()
        for name, value, rule in [
            ("steps", -1, "must be 0 or more"),
            ("batch", 0, "must be at least 1"),
            ("accumulate", 0, "must be at least 1"),
            ("checkpoint_every", 0, "must be at least 1"),
            ("log_every", 0, "must be at least 1"),
            ("lr", -1e-3, "must be 0 or more"),
            ("lr", float("nan"), "must be 0 or more"),
            ("muon_lr", -1e-3, "must be 0 or more"),
            ("weight_decay", -0.1, "must be 0 or more"),
            ("warmup", -1, "must be 0 or more"),
            ("clip_norm", 0.0, "must be positive"),
            ("decay", 1.5, r"must lie in \[0, 1\]"),
        ]
    ),
    ("pretrain__seq_len", 15, "must be at least 16"),
    ("warmup__seq_len", 15, "must be at least 16"),
    *(
        (name, value, r"must lie in \[0, 1\]")
        for name in (
            "pretrain__intro_share",
            "pretrain__think",
            "warmup__think",
            "warmup__worked",
            "data__text_share",
            "warmup__computed_share",
            "rlp__computed_share",
        )
        for value in (-0.1, 1.5)
    ),
    ("pretrain__enough", -0.1, r"must lie in \[0, 2\]"),
    ("pretrain__enough", 2.1, r"must lie in \[0, 2\]"),
    ("pretrain__enough_every", 0, "must be at least 1"),
    ("warmup__gap", 1, "must be at least 2"),
    ("rlp__back", -1, "must be 0 or more"),
    ("rlp__back", 97, r"must be at most rlp.context_len \(96\): the thought stands inside the context"),
    ("rlp__group_size", 1, "must be at least 2: advantages compare the thoughts of a group"),
    ("rlp__thought_len", 0, "must be at least 1: the closing tag is a token of the thought"),
    ("rlp__horizon", 0, "must be at least 1"),
    ("rlp__context_len", 7, "must be at least 8"),
    ("rlp__temperature", 0.0, "must be positive"),
    ("rlp__temperature", math.inf, "must be positive"),
    ("rlp__tau", -0.1, r"must lie in \[0, 1\]"),
    ("rlp__tau", 1.001, r"must lie in \[0, 1\]; the paper's is 0.999"),
    ("rlp__text_share", 2.0, r"must lie in \[0, 1\]"),
    ("rlp__eps_low", 1.1, r"must lie in \[0, 1\]"),
    ("rlp__eps_high", -0.1, "must be 0 or more"),
    ("rlp__kl", -0.1, "must be 0 or more"),
    ("rlp__inner_epochs", 0, "must be at least 1"),
    ("elastic__budgets", (), "is empty: give at least one, such as 1.0"),
    ("elastic__budgets", (1.0, 0.5, 0.0), r"must lie in \(0, 1\] as a fraction, or above 1 as an absolute cost"),
    ("elastic__budgets", (1.0, 0.5, -2.0), r"must lie in \(0, 1\] as a fraction, or above 1 as an absolute cost"),
    ("elastic__budgets", (0.5, 0.75, 1.0), "must be different and fall, the largest first"),
    ("elastic__budgets", (1.0, 0.5, 0.5), "must be different and fall, the largest first"),
    ("elastic__budgets", (1.0, 0.5000001, 0.5), "must be different and fall, the largest first; six digits of each count"),
    (
        "elastic__budgets",
        (5000.0, 1.0, 0.5),
        "mixes absolute costs and fractions; give either, for example all as fractions",
    ),
    ("elastic__long_weights", (1.0, 1.0), "must have one entry for each of the 3 budgets"),
    ("elastic__long_weights", (1.0, 1.0, -1.0), "must be 0 or more, and not all 0"),
    ("elastic__long_weights", (math.inf, 1.0, 1.0), "must be 0 or more, and not all 0"),
    ("elastic__long_weights", (0.0, 0.0, 0.0), "must be 0 or more, and not all 0"),
    *(
        (f"elastic__{name}", 0, "must be at least 1")
        for name in ("cost_batch", "cost_len", "router_width", "calibration_rows")
    ),
    *(
        (f"elastic__{name}", -0.1, "must be 0 or more")
        for name in ("kl", "self_kl", "ce", "full_ce", "router_lr", "router_weight")
    ),
    ("elastic__kl", 0.0, "elastic.self_kl and elastic.ce are all 0: nothing would be learned; give one a weight"),
    ("elastic__kl_temperature", 0.0, "must be positive"),
    ("elastic__seq_len", 15, "must be at least 16"),
    ("elastic__long_len", 0, "must be at least 16"),
    ("elastic__long_batch", -1, "must be 0 or more; 0 is as many tokens as in stage 1"),
    *(
        (f"elastic__{name}", value, r"must lie in \[0, 1\]")
        for name in ("search_share", "long_share")
        for value in (-0.1, 1.5)
    ),
    *(
        (f"eval__{f.name}", 1 - (f.name == "samples"), "to give an interval")
        for f in dataclasses.fields(config.EvalConfig)
        if f.name != "split"
    ),
    ("rlp__reward_floor", 0.5, "must be 0 or less"),
    ("elastic__baseline", ("separate", "alone"), r"\('alone'\) is unknown; choose one of separate, minitron, scratch"),
    ("parallel__timeout_s", 0, "must be at least 1; 1800 is usual"),
    ("kernels", "fast", "is unknown; choose one of auto, reference, triton"),
    ("seed", -1, "must be 0 or more"),
    ("seed", 2**32, "must be 0 or more, and below 4294967296"),
    ("threads", 1025, r"must lie in \[0, 1024\]; 0 measures which number is fastest"),
    ("mode", "model", "is unknown; choose one of pretrain, warmup, rlp, cpt, sft, rlvr, elastic"),
    ("model__d_model", "128", "must be at least 1"),
]


@pytest.mark.parametrize(("name", "value", "rule"), REFUSED)
def test_a_value_that_cannot_work_is_refused_with_its_name_and_the_rule(name, value, rule):
    with pytest.raises(ValueError, match=rf"^{name.replace('__', '[.]')}\b.*{rule}"):
        override(PRESETS["smoke"], **{name: value}).check()


def typed_fields():
    """(name as in `override`, value in the smoke preset, type) of every setting."""
    for group, settings in {"": PRESETS["smoke"], **PRESETS["smoke"].groups()}.items():
        for name, kind in get_type_hints(type(settings), include_extras=True).items():
            yield f"{group}__{name}".removeprefix("__"), getattr(settings, name), kind


RULED = [(name, value) for name, value, kind in typed_fields()
         if any(isinstance(rule, Rule) for rule in getattr(kind, "__metadata__", ()))]  # fmt: skip
CHOSEN = [name for name, _, kind in typed_fields() if Literal in (get_origin(kind), *map(get_origin, get_args(kind)))]


@pytest.mark.parametrize(("name", "value"), RULED)
def test_nan_is_refused_wherever_a_setting_has_a_rule(name, value):
    nan = float("nan")
    changed = (*value[:-1], nan) if isinstance(value, tuple) else nan
    with pytest.raises(ValueError, match=rf"^{name.replace('__', '[.]')} \(nan\) must"):
        override(PRESETS["smoke"], **{name: changed}).check()


@pytest.mark.parametrize("name", CHOSEN)
def test_what_is_no_choice_is_refused_also_where_no_command_line_is_parsed(name):
    value = ("none",) if name in ("elastic__heterogeneous", "elastic__baseline") else "none"
    with pytest.raises(ValueError, match=rf"^{name.replace('__', '[.]')} \('none'\) is unknown; choose one of "):
        override(PRESETS["smoke"], **{name: value}).check()


def test_every_number_has_a_rule():
    """So that the tests above test something."""
    numbers = {name for name, value, _ in typed_fields() if isinstance(value, int | float) and not isinstance(value, bool)}
    assert len(numbers) > 80
    assert not numbers - {name for name, _ in RULED}
    assert len(CHOSEN) > 10


# -------------------------------------------------------------------------------------------------- a mode of one's own


@dataclass(frozen=True)
class DreamConfig(FitConfig):
    """A mode that is not there yet."""

    depth: config.Count = 3


@dataclass(frozen=True)
class Dreaming(Config):
    """All settings, and those of the new mode."""

    dream: DreamConfig = field(default_factory=lambda: DreamConfig(steps=7, batch=2))


def test_a_group_for_the_training_loop_is_a_mode_that_is_checked_saved_and_estimated():
    ours = Dreaming(
        mode="dream",
        init="x",
        warmup=WarmupConfig(steps=0),
        model=dataclasses.replace(PRESETS["smoke"].model, vocab_size=512),
    )
    assert ours.check() is ours
    assert ours.modes() == [*Config().modes(), "dream"]
    for changes, message in [
        ({"dream__depth": 0}, r"^dream.depth \(0\) must be at least 1"),
        ({"dream__batch": 3, "dream__accumulate": 2}, r"^dream.batch \(3\) must be a multiple of dream.accumulate \(2\)"),
        ({"mode": "sleep"}, "choose one of pretrain, warmup, rlp, cpt, sft, rlvr, elastic, dream$"),
    ]:
        with pytest.raises(ValueError, match=message):
            override(ours, **changes).check()
    assert from_dict(Dreaming, json.loads(json.dumps(ours.to_dict()))) == ours
    assert "dream.depth" in rundir.shared_settings(ours)
    (phase,) = estimate.phases(ours)
    assert (phase.name, phase.n_steps, phase.n_tokens) == ("dream", 7, 2 * ours.warmup.seq_len)
    assert estimate.memory(ours)["at the peak"] > 0


def test_the_kinds_of_layers_stand_in_one_table(monkeypatch):
    monkeypatch.setitem(config.WIDTH_FIELDS, "+", ("d_ff",))
    override(PRESETS["smoke"], model__pattern="+-").check()


# ------------------------------------------------------------------------------------------------- two that do not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__n_heads": 4, "model__n_kv_heads": 3}, "n_heads (4) must be a multiple of model.n_kv_heads (3); nearest"),
        ({"model__mamba_groups": 3}, "mamba_heads (4) must be a multiple of model.mamba_groups (3); nearest is 3"),
        ({"model__rope_theta": 1e4, "model__attn_head_dim": 7}, "attn_head_dim (7) must be a multiple of the pairs"),
        ({"pretrain__batch": 10, "pretrain__accumulate": 4}, "batch (10) must be a multiple of pretrain.accumulate (4)"),
        ({"warmup__recall": 0.5, "warmup__gap": 0}, "warmup.recall (0.5) puts thoughts into text, and warmup.gap 0 leaves"),
        (
            {"rlp__more_steps": 1, "mode": "sft"},
            "rlp.more_steps (1) is for problems without written thoughts, and mode sft reads",
        ),
        ({"rlp__more_steps": 1, "mode": "cpt"}, "leave it out, or choose rlp, rlvr, or cpt with --cpt.no-thoughts"),
        ({"rlp__distractors": True, "mode": "sft"}, "rlp.distractors (True) is for problems without written thoughts"),
        (
            {"rlp__more_steps": 1, "rlp__text_share": 1.0},
            "is for problems, and rlp.text_share and rlp.computed_share leave",
        ),
        ({"rlp__more_steps": 1, "data__problems": "a.jsonl"}, "built-in problems, not those of data.problems (a.jsonl)"),
        ({"elastic__long_len": 80}, "elastic.long_len (80) must be a multiple of elastic.seq_len (32); nearest is 64"),
        ({"elastic__long_len": 16}, "elastic.long_len (16) must be a multiple of elastic.seq_len (32); nearest is 32"),
        (
            {"elastic__batch": 3},
            "elastic.batch (3) must be a multiple of elastic.long_len / elastic.seq_len (2); nearest is 4",
        ),
        (
            {"elastic__batch": 4, "elastic__accumulate": 4},
            "the sequences of stage 2 (2) must be a multiple of elastic.accumulate x elastic.draws (4); nearest is 4",
        ),
        (
            {"elastic__long_batch": 3, "elastic__accumulate": 2},
            "the sequences of stage 2 (3) must be a multiple of elastic.accumulate x elastic.draws (2); nearest is 4",
        ),
        (
            {"elastic__batch": 8, "elastic__draws": 3},
            "elastic.batch (8) must be a multiple of elastic.accumulate x elastic.draws (3); nearest is 9",
        ),
        ({"elastic__self_kl": 1.0, "elastic__kl": 0.0}, "elastic.self_kl needs elastic.full_ce, elastic.ce or elastic.kl"),
        (
            {"elastic__self_kl": 1.0, "elastic__full_ce": 1.0, "elastic__kl": 0.0, "elastic__baseline": ("separate",)},
            "elastic.baseline: separate and minitron learn by elastic.kl and elastic.ce, and both are 0",
        ),
        (
            {"data__text_share": 0.75, "warmup__computed_share": 0.5},
            "data.text_share (0.75) and warmup.computed_share (0.5) must add up to 1 at most",
        ),
        (
            {"rlp__text_share": 0.75, "rlp__computed_share": 0.5},
            "rlp.text_share (0.75) and rlp.computed_share (0.5) must add up to 1 at most",
        ),
        ({"rlp__batch": 1, "rlp__accumulate": 4}, "batch (1) must be a multiple of rlp.accumulate (4); nearest is 4"),
    ],
    ids=str,
)
def test_two_settings_that_do_not_fit_are_refused_with_the_nearest_value_that_does(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        override(PRESETS["smoke"], **changes).check()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_accepted(preset):
    assert PRESETS[preset].check() is PRESETS[preset]
    assert PRESETS[preset].preset == preset


@pytest.mark.parametrize(
    "extreme",
    [
        {"rlp__tau": 0.0},
        {"rlp__tau": 1.0},
        {"rlp__steps": 0},
        {"rlp__reward_floor": float("-inf")},
        {"rlp__thought_len": 1, "rlp__group_size": 2},
        {"data__held_out_percent": 25, "data__text_share": 1.0, "warmup__computed_share": 0.0},
        {"rlp__text_share": 0.5, "rlp__computed_share": 0.5, "rlp__back": 96},
        {"pretrain__enough": 2.0},
        {"rlp__batch": 12, "rlp__accumulate": 4},
        {"elastic__budgets": (0.5,), "elastic__long_weights": (1.0,)},
        {"elastic__budgets": (40000.0, 30000.0), "elastic__long_weights": (1.0, 0.0)},
        {"elastic__steps": 0, "elastic__search_share": 0.0, "elastic__long_share": 0.0},
        {"elastic__search_share": 1.0, "elastic__long_share": 1.0},
        {"elastic__long_share": 0.0, "elastic__accumulate": 4},
        {"elastic__long_batch": 3, "elastic__batch": 7, "elastic__accumulate": 1},
        {"elastic__long_len": 32, "elastic__batch": 3},
        {"elastic__batch": 8, "elastic__accumulate": 4},
        {"elastic__self_kl": 1.0, "elastic__full_ce": 1.0, "elastic__kl": 0.0, "elastic__baseline": ("scratch",)},
    ],
    ids=str,
)
def test_extremes_that_work_are_accepted(extreme):
    assert override(PRESETS["smoke"], **extreme).check()


# ------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """The current folder, empty, with no way to load a corpus: whoever refuses must do it before any work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.Corpus, "load", lambda _: pytest.fail("work was begun"))
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "huge"], "preset ('huge') is unknown; choose one of cpu, smoke, computed"),
        (["--preset=huge"], "preset ('huge') is unknown; choose one of cpu, smoke, computed"),
        (["--mode", "dream"], "mode ('dream') is unknown; choose one of pretrain, warmup, rlp, cpt, sft, rlvr, elastic"),
        (["--rlp.group-size", "1"], "rlp.group_size (1) must be at least 2"),
        (["--rlp.lr", "nan"], "rlp.lr (nan) must be 0 or more"),
        (["--rlp.tau", "1.5"], "rlp.tau (1.5) must lie in [0, 1]"),
        (["--init", "nowhere", "--resume"], "resume: runs/rlp-cpu-seed0 holds no checkpoint"),
        (["--model.pattern", "M[b]"], "model.pattern ('M[b]') has the unknown letters '[]b'"),
        pytest.param(
            ["--kernels", "triton"],
            "kernels (triton) needs",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can run here"),
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_unusable_settings_end_the_program_with_2_a_message_and_no_files(empty_folder, capsys, argv, message):
    assert train.main(argv) == 2
    assert message in capsys.readouterr().out
    assert not list(empty_folder.iterdir())


@pytest.mark.parametrize(
    ("argv", "named"),
    [(["--rlp.gruop-size", "4"], "gruop-size"), (["--rlp.lr", "fast"], "fast"), (["--model.ffn", "gelu"], "gelu")],
)
def test_unknown_fields_and_what_is_no_number_or_choice_end_the_program_with_2_and_no_files(
    empty_folder, capsys, argv, named
):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    assert named in "".join(capsys.readouterr())
    assert not list(empty_folder.iterdir())


def test_command_line_changes_the_preset_it_names():
    words = "--preset smoke --mode elastic --rlp.back 3 --seed 3 --elastic.budgets 1 .6 --elastic.baseline separate"
    changes = {"rlp__back": 3, "seed": 3, "elastic__budgets": (1.0, 0.6), "elastic__baseline": ("separate",)}
    assert train.parse(words.split()) == override(PRESETS["smoke"], mode="elastic", **changes)
    assert train.parse(["--rlp.group-size", "6"]) == override(PRESETS["cpu"], rlp__group_size=6)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--mode sft --rlp.lr 1e-4", "rlp.lr (0.0001) is not read in mode sft; leave it out, or give sft.lr"),
        ("--mode cpt --rlp.tau .5", "rlp.tau (0.5) is not read in mode cpt; leave it out"),
        ("--mode rlp --elastic.ce 1", "elastic.ce (1.0) is not read in mode rlp; leave it out"),
        ("--mode elastic --cpt.steps 3", "cpt.steps (3) is not read in mode elastic; leave it out, or give elastic.steps"),
        ("--mode rlvr --rlp.batch 8", "rlp.batch (8) is not read in mode rlvr; leave it out, or give rlvr.batch"),
        ("--mode rlvr --rlp.predictor 1", "rlp.predictor (1.0) is not read in mode rlvr; leave it out"),
        ("--mode pretrain --warmup.gap 3", "warmup.gap (3) is not read in mode pretrain; leave it out"),
        ("--init x --pretrain.lr 1", "pretrain.lr (1.0) is not read where init is given; leave it out"),
        ("--lora.alpha 8", "lora.alpha (8.0) is for adapters: lora.rank; leave it out, or give that"),
        ("--data.text-key t", "data.text_key (t) is for texts in data.path; leave it out, or give that"),
        *(
            (
                f"--data.vocab-size 700 {other}",
                "data.vocab_size (700) is for a tokenizer that is trained: data.tokenizer corpus, and no init or shards; "
                "leave it out, or give that",
            )
            for other in ("--init x", "--data.tokenizer gpt2")
        ),
        ("--dry-run-gpus 2", "dry_run_gpus (2) is for dry_run; leave it out, or give that"),
        (
            "--mode elastic --eval.text-positions 9",
            "eval.text_positions (9) is for modes that think; leave it out, or give that",
        ),
        (
            "--mode elastic --eval.text-tokens 9",
            "eval.text_tokens (9) is for modes other than elastic; leave it out, or give that",
        ),
        (
            "--mode elastic --elastic.kl 0 --elastic.ce 1 --elastic.kl-temperature 2",
            "elastic.kl_temperature (2.0) is for elastic.kl or elastic.self_kl; leave it out, or give that",
        ),
        ("--eval.elastic-rows 9", "eval.elastic_rows (9) is for mode elastic; leave it out, or give that"),
        (
            "--rlp.eps-high .3",
            "rlp.eps_high (0.3) is for rlp.inner_epochs of 2 or more: until then all ratios are 1; "
            "leave it out, or give that",
        ),
        (
            "--rlp.reward match --rlp.reward-floor -1",
            "rlp.reward_floor (-1.0) is for the reward gain; leave it out, or give that",
        ),
        (
            "--mode elastic --elastic.long-share 0 --elastic.long-len 1024",
            "elastic.long_len (1024) is for stage 2: elastic.long_share; leave it out, or give that",
        ),
        (
            "--mode elastic --elastic.cost-batch 3",
            "elastic.cost_batch (3) is for elastic.cost memory or latency; leave it out, or give that",
        ),
        (
            "--mode elastic --elastic.choose-seed 1",
            "elastic.choose_seed (1) is for elastic.choose random or search; leave it out, or give that",
        ),
        (
            "--mode elastic --elastic.choose-seed 1 --elastic.choose sensitivity",
            "elastic.choose_seed (1) is for elastic.choose random or search; leave it out, or give that",
        ),
        (
            "--mode elastic --preset smoke --elastic.choose fixed --elastic.router-start sensitivity",
            "elastic.router_start (sensitivity) is for elastic.choose router; leave it out, or give that",
        ),
        (
            "--mode elastic --elastic.choose sensitivity --elastic.search-share .5",
            "elastic.search_share (0.5) is for elastic.choose router; leave it out, or give that",
        ),
        (
            "--mode elastic --elastic.choose search --elastic.router-lr .5",
            "elastic.router_lr (0.5) is for elastic.choose router; leave it out, or give that",
        ),
        (
            "--mode elastic --elastic.choose fixed --elastic.router-weight 2",
            "elastic.router_weight (2.0) is for elastic.choose router; leave it out, or give that",
        ),
        (
            "--mode elastic --elastic.choose random --elastic.mask top1",
            "elastic.mask (top1) is for elastic.choose router; leave it out, or give that",
        ),
        (
            "--mode elastic --preset smoke --elastic.router-vote 1",
            "elastic.router_vote (1.0) is for elastic.choose router and elastic.router_start sensitivity; "
            "leave it out, or give that",
        ),
        (
            "--mode elastic --preset smoke --elastic.router-start sensitivity --elastic.router-bias 2",
            "elastic.router_bias (2.0) is for elastic.choose router that starts full; leave it out, or give that",
        ),
    ],
)
def test_settings_that_the_mode_does_not_read_are_refused(empty_folder, capsys, argv, said):
    assert train.main(argv.split()) == 2
    assert f"error: {said}\n" in capsys.readouterr().out
    assert not list(empty_folder.iterdir())


@pytest.mark.parametrize(
    "argv",
    [
        "--mode cpt --rlp.thought-len 9 --pretrain.steps 9 --warmup.steps 9",
        "--mode rlvr --rlp.kl .1 --rlp.back 3",
        "--mode pretrain --init x --pretrain.steps 9 --rlp.positions random",
        "--mode rlp --rlp.positions random --lora.rank 4 --lora.alpha 8",
        "--preset qwen3-1.7b-rlp --mode sft",
        "--preset qwen3-1.7b-rlp --rlp.reward match",
        "--rlp.inner-epochs 2 --rlp.eps-low .1 --data.path x --data.text-key t --dry-run --dry-run-gpus 2",
        "--mode elastic --elastic.cost memory --elastic.cost-batch 3 --elastic.long-len 1024",
        "--mode elastic --elastic.choose fixed",
        "--mode elastic --elastic.choose random --elastic.choose-seed 3",
        "--mode elastic --elastic.router-start sensitivity --elastic.router-vote 3 --elastic.search-share .5",
    ],
)
def test_what_the_base_and_all_figures_hang_on_is_read_in_every_mode(argv):
    train.parse(argv.split()).check()


def test_help_fits_80_columns_and_says_what_a_setting_is(capsys, monkeypatch):
    """Comments beside a field and above it, types that carry rules, and what groups are for."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    shown = capsys.readouterr().out
    options = shown[shown.index("--mode STR") :]
    assert len(options.splitlines()) > 300
    assert max(map(len, options.splitlines())) <= 80
    words = " ".join(re.sub("[│╭╰─]", " ", options).split())
    for said in (
        "--rlp.lr FLOAT Peak learning rate of AdamW. (default: 0.0002)",
        "--rlp.tau FLOAT Decay of the teacher's moving average. (default: 0.999)",
        "--pretrain.steps INT Optimizer steps; 0 keeps the model as it is. (default: 1900)",
        "--elastic.budgets [FLOAT [FLOAT ...]] Budgets, as fractions",
        "--model.ffn {relu2,swiglu} Feed-forward activation",
        "Nested models in one, and routers that choose them (Nemotron Elastic, arXiv 2511.16664).",
    ):
        assert said in words


@pytest.mark.parametrize(
    ("changes", "n"),
    [
        ({}, 2),  # 4 sequences, then 4 x 32 / 64
        ({"elastic__long_share": 0.0}, 4),
        ({"elastic__long_batch": 1}, 1),
        ({"elastic__batch": 6, "elastic__long_batch": 4}, 2),
    ],
    ids=str,
)
def test_elastic_batches_of_both_stages_can_be_dealt_out_to_so_many(changes, n):
    assert override(PRESETS["smoke"], **changes).elastic.fewest_rows() == n


def test_no_preset_named_is_the_cpu_preset():
    assert train.parse([]) == PRESETS["cpu"]


# --------------------------------------------------------------------------------------------------------- saved form


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_survive_being_saved(preset):
    saved = override(PRESETS[preset], rlp__reward_floor=float("-inf"), out="somewhere")
    assert from_dict(Config, json.loads(json.dumps(saved.to_dict()))) == saved


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": 1}, "Config lacks: colour; use the version that wrote them"),
        ({"rlp": {"x": 1}}, "RLPConfig lacks: x; use the version that wrote them"),
        ({"rlp": {"betas": [0.9, 0.95]}}, "RLPConfig lacks: betas; use the version that wrote them"),
        ({"rlp": [1]}, r"saved settings of RLPConfig \(\[1\]\) are no JSON object"),
    ],
)
def test_saved_settings_that_this_version_cannot_read_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Config, values)


def test_settings_of_an_older_version_get_todays_defaults_for_what_they_lack():
    assert from_dict(Config, {"seed": 3, "rlp": {"tau": 0.5}}) == override(Config(), seed=3, rlp__tau=0.5)


def test_run_folders_are_named_by_mode_preset_and_seed_unless_given():
    assert Config(mode="pretrain", preset="smoke", seed=2).run_dir() == Path("runs/pretrain-smoke-seed2")
    assert Config(out="here").run_dir() == Path("here")


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"model__d_ff": 100}, {"data__text_share": 0.5}, {"data__path": "a.txt"}, {"pretrain__lr": 1.0},
     {"pretrain__enough": 0.5}, {"pretrain__enough_every": 9}, {"eval__problems_per_family": 47},
     {"model__widths": ((8, 32), (4,), (384,)) * 2}],
    ids=str,
)  # fmt: skip
def test_the_key_of_the_base_changes_with_what_makes_its_weights(change):
    """And so does that of the warmed base, which begins with it."""
    for more in ((), ("warmup",)):
        assert override(PRESETS["cpu"], **change).base_fingerprint(*more) != PRESETS["cpu"].base_fingerprint(*more)


@pytest.mark.parametrize(
    "change", [{"warmup__steps": 9}, {"warmup__worked": 0.4}, {"warmup__computed_share": 0.1}, {"rlp__back": 3}], ids=str
)
def test_the_key_of_the_warmed_base_changes_with_what_makes_its_weights(change):
    """That of the base does not: it is trained once for all of them."""
    plain, other = PRESETS["cpu"], override(PRESETS["cpu"], **change)
    assert other.base_fingerprint("warmup") != plain.base_fingerprint("warmup")
    assert other.base_fingerprint() == plain.base_fingerprint()


@pytest.mark.parametrize(
    "change",
    [{"rlp__lr": 1.0}, {"elastic__lr": 1.0}, {"elastic__budgets": (1.0,)},
     {"mode": "elastic"}, {"eval__samples": 9}, {"out": "x"}, {"mode": "pretrain"}, {"preset": "x"}, {"resume": True},
     {"eval__problems_per_family": 48}, {"rlp__thought_len": 48},
     {"data__cache_dir": "x"}, {"pretrain__log_every": 9}, {"pretrain__checkpoint_every": 9}, {"kernels": "reference"},
     {"pretrain__accumulate": 2}, {"warmup__accumulate": 2}, {"warmup__log_every": 9}],
    ids=str,
)  # fmt: skip
def test_the_key_of_the_base_does_not_change_with_anything_else(change):
    for more in ((), ("warmup",)):
        assert override(PRESETS["cpu"], **change).base_fingerprint(*more) == PRESETS["cpu"].base_fingerprint(*more)


@pytest.mark.parametrize("change", [{"warmup__steps": 9}, {"rlp__back": 3}, {"pretrain__lr": 1.0}], ids=str)
@pytest.mark.parametrize("mode", ["warmup", "rlp", "cpt", "sft", "rlvr", "elastic"])
def test_a_run_shares_the_settings_of_the_phases_before_it(mode, change):
    """Else a resumed run would compare with a base that it did not begin with, or read another mixture."""
    first, second = (rundir.shared_settings(override(PRESETS["cpu"], mode=mode, **c)) for c in ({}, change))
    assert first != second


@pytest.mark.parametrize("change", [{"rlp__more_steps": 2}, {"rlp__distractors": True}], ids=str)
def test_continued_pretraining_shares_the_settings_of_the_problems_that_it_reads(change):
    plain, other = (rundir.shared_settings(override(PRESETS["cpu"], mode="cpt", **c)) for c in ({}, change))
    (name,) = change
    assert (plain[name.replace("__", ".")], other[name.replace("__", ".")]) == (None, change[name])


def test_pretraining_shares_no_settings_of_what_comes_after_it():
    first, second = (override(PRESETS["cpu"], mode="pretrain", **c) for c in ({}, {"warmup__steps": 9, "rlp__back": 3}))
    assert rundir.shared_settings(first) == rundir.shared_settings(second)


def test_a_run_can_be_resumed_with_other_kernels():
    assert rundir.shared_settings(override(PRESETS["cpu"], kernels="triton")) == rundir.shared_settings(PRESETS["cpu"])


# ------------------------------------------------------------------------------------------------- rules of the house


def attributes_read(tree):
    """Patterns of the names X of every `something.X` and `getattr(something, f"...")` that is read, other than in checks
    and in the key of the base.
    """
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    checks = [f for f in functions if f.name in ("check", "base_fingerprint")]
    skipped = {id(inner) for f in checks for inner in ast.walk(f)}
    nodes = [n for n in ast.walk(tree) if id(n) not in skipped]
    calls = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "getattr"]
    made = [n.args[1].values for n in calls if isinstance(n.args[1], ast.JoinedStr)]
    patterns = {"".join(part.value if isinstance(part, ast.Constant) else ".+" for part in parts) for parts in made}
    assert ".+" not in patterns
    return patterns | {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


def test_every_setting_is_read_somewhere():
    """By name: a field that no file reads would be an option without effect."""
    files = [f for f in ROOT.rglob("*.py") if not {"tests", ".venv", "build"} & set(f.relative_to(ROOT).parts)]
    assert {f.parent.name for f in files} >= {ROOT.name, "system", "text", "views", "tools"}
    read = set().union(*(attributes_read(ast.parse(f.read_text())) for f in files))
    classes = [c for c in vars(config).values() if isinstance(c, type) and issubclass(c, Settings)]
    fields = {f"{c.__name__}.{f.name}" for c in classes for f in dataclasses.fields(c)}
    assert len(fields) > 60
    assert not {f for f in fields if not any(re.fullmatch(pattern, f.split(".")[1]) for pattern in read)}
