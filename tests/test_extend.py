"""What a reader adds from outside, in as many places as the project promises: a mode, a score, a reward, a family."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from conftest import metrics_of, summary_of, weights_of

import importance
import rlp
import train
from system.config import Config, FitConfig
from system.objective import NextToken
from text import problems
from text.batches import cpt_batch

WORDS = ("--preset", "smoke", "--data.vocab-size", "512")


# ------------------------------------------------------------------------------------- a mode, in three places


@dataclass(frozen=True)
class MildConfig(FitConfig):  # 1. its settings
    """Next-token prediction whose loss counts less."""

    # Factor on the loss.
    share: float = 0.5


@dataclass(frozen=True)
class OwnConfig(Config):  # 2. their place among all settings
    """All settings, and those of `mild`."""

    # Next-token prediction whose loss counts less.
    mild: MildConfig = field(default_factory=MildConfig)


class Mild(NextToken):
    def __init__(self, share):
        super().__init__()
        self.share = share

    def loss(self, model, batch):
        total, count, metrics = super().loss(model, batch)
        return self.share * total, count, metrics


@pytest.fixture
def own_mode(monkeypatch):
    mode = train.Mode(  # 3. its entry
        batch=lambda corpus, config, step: cpt_batch(corpus, config, step),
        objective=lambda model, corpus, config: Mild(config.mild.share),
        figures=train.figures_of_one,
    )
    monkeypatch.setitem(train.MODES, "mild", mode)


def test_a_mode_takes_three_places(own_mode, corpus_read_once, tmp_path):
    """It trains from the base, is measured, resumes and is estimated, like those that are built in."""
    words = [
        *WORDS,
        "--data.cache-dir",
        str(tmp_path / "cache"),
        "--mode",
        "mild",
        "--mild.steps",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    assert train.main([*words, "--mild.share", "0.25"], OwnConfig) == 0
    first = metrics_of(tmp_path / "run")
    assert summary_of(tmp_path / "run")["mode"] == "mild"
    assert train.main([*words, "--mild.share", "0.25", "--resume"], OwnConfig) == 0
    assert train.main([*words, "--mild.share", "0.5", "--resume"], OwnConfig) == 2
    assert train.main([*words[:-1], str(tmp_path / "other"), "--mild.share", "0.5"], OwnConfig) == 0
    assert metrics_of(tmp_path / "other")[0]["loss"] == pytest.approx(2 * first[0]["loss"], rel=1e-6)
    assert train.main([*words[:-1], str(tmp_path / "dry"), "--dry-run"], OwnConfig) == 0


def test_a_mode_without_an_entry_is_refused(corpus_read_once, tmp_path, capsys):
    words = [*WORDS, "--data.cache-dir", str(tmp_path / "cache"), "--mode", "mild", "--out", str(tmp_path / "run")]
    assert train.main(words) == 2
    assert "mode ('mild') is unknown; choose one of" in " ".join(capsys.readouterr().out.split())


# ----------------------------------------------------------------------------------- a score, in two places


def first_units(model, sums, i):
    """The units as they stand."""
    return torch.arange(model.layers[i].mixer.up_proj.weight.shape[0], 0, -1).double()


def test_a_score_takes_two_places(monkeypatch, corpus_read_once, tmp_path):
    monkeypatch.setitem(importance.SCORES["ffn"], "as-they-stand", first_units)
    words = [*WORDS, "--data.cache-dir", str(tmp_path / "cache"), "--mode", "elastic", "--elastic.score-ffn"]
    assert train.main([*words, "as-they-stand", "--out", str(tmp_path / "run")]) == 0
    assert train.main([*words, "unheard-of", "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------------ a reward, in one place


def test_a_reward_takes_one_place(monkeypatch, corpus_read_once, tmp_path):
    """It is what is optimised; the gain that is reported stays what it was."""
    words = [*WORDS, "--data.cache-dir", str(tmp_path / "cache"), "--rlp.steps", "1", "--out"]
    assert train.main([*words, str(tmp_path / "plain")]) == 0
    monkeypatch.setattr(rlp, "reward", lambda gain_BG, floor: -gain_BG)
    assert train.main([*words, str(tmp_path / "own")]) == 0
    (plain,), (own,) = metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "own")
    assert own["gain_ema_nats"] == plain["gain_ema_nats"]
    assert weights_of(tmp_path / "own") != weights_of(tmp_path / "plain")


# ------------------------------------------------------------------------------------ a family, in one place


def double_problem(rng: random.Random) -> problems.Problem:
    n = rng.randint(1, 49_999)
    return problems.Problem("double", f"Twice {n}?", (f" {n}", f" + {n}"), f" {2 * n % 10}")


def test_a_family_takes_one_place(monkeypatch, tmp_path):
    monkeypatch.setitem(problems.FAMILIES, "double", double_problem)
    words = [*WORDS, "--data.cache-dir", str(tmp_path / "cache"), "--rlp.steps", "1", "--out", str(tmp_path / "run")]
    assert train.main(words) == 0
    summary = summary_of(tmp_path / "run")
    assert summary["accuracy"]["sampled"]["double"]["rlp"]["n"] == 4
    assert "[double]" in (tmp_path / "run" / "samples.txt").read_text()
