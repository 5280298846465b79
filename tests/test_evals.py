"""What is measured on held-out documents, on a smoke-sized model."""

import dataclasses

import pytest
from torch.testing import assert_close

import evals
from model import HybridLM
from system.presets import PRESETS
from text.problems import held_out_problems


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


@pytest.mark.parametrize(("most", "n_tokens", "n"), [(64, 4 * 168, 64), (64, 4 * 4096, 8), (256, 2048, 64), (64, 10**9, 1)])
def test_long_contexts_are_measured_a_few_at_once(most, n_tokens, n):
    """At most 131,072 tokens in their caches, at least one context."""
    assert evals.together(most, n_tokens) == n


def test_how_many_are_measured_at_once_changes_no_figure(corpus, networks, monkeypatch):
    """Greedy thoughts and plain predictions of five problems, one by one and all together."""
    contexts, targets = evals.problem_contexts(held_out_problems("test", 2, 0, corpus.held_out_percent)[:5], corpus)
    words = (networks[0], contexts, targets, corpus, PRESETS["smoke"])

    def figures():
        return evals.measure_thoughts(*words, temperature=0.0, samples=1), evals.plain_logp(*words)

    together = figures()
    monkeypatch.setattr(evals, "TOKENS_AT_ONCE", 1)
    assert_close(figures(), together)
