"""What is measured on held-out documents, on a smoke-sized model."""

import dataclasses

import pytest
from torch.testing import assert_close

import evals
from model import HybridLM
from system.presets import PRESETS


@pytest.fixture(scope="module")
def networks(corpus):
    shape = dataclasses.replace(PRESETS["smoke"].model, vocab_size=corpus.tokenizer.n_vocab)
    return [HybridLM(shape) for _ in range(3)]


def test_every_reference_is_run_once(corpus, networks, monkeypatch):
    """For problems and for text: trained model and base after an empty thought, base and teacher without a thought.

    The base's plain prediction serves its own gains and the trained model's; gains by family cost no pass more.
    """
    calls, plain_logp = [], evals.plain_logp

    def counted(network, *args, **options):
        calls.append(networks.index(network))
        return plain_logp(network, *args, **options)

    monkeypatch.setattr(evals, "plain_logp", counted)
    found = evals.evaluate_both(*networks, corpus, PRESETS["smoke"])
    assert sorted(calls) == sorted(2 * [0, 1, 1, 2])
    assert found["gain_nats_by_family"]["all"] == found["gain_nats"]["frozen_base"]


@pytest.mark.parametrize(("most", "n_tokens", "n"), [(64, 4 * 168, 64), (64, 4 * 4096, 8), (256, 2048, 64), (64, 10**9, 1)])
def test_long_contexts_are_measured_a_few_at_once(most, n_tokens, n):
    """At most 131,072 tokens in their caches, at least one context."""
    assert evals.together(most, n_tokens, evals.TOKENS_AT_ONCE) == n


def test_how_many_are_measured_at_once_changes_no_figure(corpus, networks, monkeypatch):
    """Greedy thoughts and plain predictions of five problems, one by one and all together."""
    problems = evals.problem_positions(corpus, PRESETS["smoke"])
    five = problems._replace(pairs=problems.pairs[:5])

    def figures():
        return evals.measure_thoughts(networks[0], five, temperature=0.0, samples=1), evals.plain_logp(networks[0], five)

    together = figures()
    monkeypatch.setattr(evals, "TOKENS_AT_ONCE", 1)
    assert_close(figures(), together)
