"""What is measured on held-out documents, on a smoke-sized model."""

import dataclasses

import pytest

import evals
from config import PRESETS
from model import HybridLM


@pytest.fixture(scope="module")
def networks(corpus):
    shape = dataclasses.replace(PRESETS["smoke"].model, vocab_size=corpus.tokenizer.n_vocab)
    return [HybridLM(shape) for _ in range(3)]


def test_every_reference_is_run_once(corpus, networks, monkeypatch):
    """The trained model after an empty thought, the base and the teacher without one: gains by family cost no pass more."""
    calls, plain_logp = [], evals.plain_logp

    def counted(network, *args):
        calls.append(networks.index(network))
        return plain_logp(network, *args)

    monkeypatch.setattr(evals, "plain_logp", counted)
    found = evals.evaluate_problems(*networks, corpus, PRESETS["smoke"])
    assert sorted(calls) == [0, 1, 2]
    assert found["gain_nats_by_family"]["all"] == found["gain_nats"]["frozen_base"]
