"""Every held-out figure against a value by hand: plain passes over whole sequences, and arithmetic that is written out.

The models are tiny ones of fp64. What they think is written down by a spy around the sampler (itself tested in
test_generate.py); everything that is said of these thoughts is computed again here, one sequence at a time.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import plain_logits, tiny_model
from torch.testing import assert_close

import evals
from evals import interval, over_documents, share
from system import parallel
from system.files import read_figures, write_figures
from system.presets import PRESETS
from text.computed import draw_computed
from text.documents import Documents, join
from text.problems import held_out_problems
from thoughts import sample_thoughts
from views.tables import cell, short

SMOKE = PRESETS["smoke"]
SEED, SAMPLES, CONTEXT, LONGEST, HORIZON, BACK = SMOKE.seed, 3, 40, 5, 2, 3
SEEDS = (14, 29, 727)  # of the weights: whose thoughts are of all sorts
CONFIG = dataclasses.replace(
    SMOKE,
    rlp=dataclasses.replace(SMOKE.rlp, context_len=CONTEXT, thought_len=LONGEST, horizon=HORIZON, back=BACK),
    eval=dataclasses.replace(SMOKE.eval, problems_per_family=6, samples=SAMPLES, text_positions=40, text_tokens=20 * 256),
)


def near(expected):
    return pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)


# ----------------------------------------------------------------------------------------------------------- intervals


def test_an_interval_of_means_by_hand():
    """1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3 = 14 / 3, standard error sqrt(14 / 3 / 4) = 1.080123."""
    found = interval(torch.tensor([1.0, 2, 3, 6]))
    assert found == near({"mean": 3.0, "low": 3 - 1.96 * 1.080123, "high": 3 + 1.96 * 1.080123, "n": 4})


def wilson(p, m):
    """Wilson's interval as the roots of (p - x)^2 = z^2 x (1 - x) / m, found by halving; z = 1.96."""

    def root(outside, inside):
        for _ in range(100):
            x = (outside + inside) / 2
            outside, inside = (x, inside) if (p - x) ** 2 > 1.96**2 * x * (1 - x) / m else (outside, x)
        return inside

    return root(0.0, p), root(1.0, p)


@pytest.mark.parametrize(("n_right", "n"), [(0, 10), (3, 10), (10, 10), (299, 300), (1, 1)])
def test_an_interval_of_a_share_is_wilsons(n_right, n):
    """The roots of a quadratic equation, found here without its formula."""
    found = share(torch.tensor([1.0] * n_right + [0.0] * (n - n_right)))
    low, high = wilson(n_right / n, n)
    assert found == near({"mean": n_right / n, "low": low, "high": high, "n": n})
    assert 0 <= found["low"] < found["high"] <= 1


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_share_lies_inside_its_interval_however_that_is_rounded(p):
    """Of 20 right ones the formula gives 0.9999999999999999 as the upper end: an error bar below 0."""
    found = [share(torch.full((n,), p)) for n in range(1, 100)]
    assert all(leaf["low"] <= p <= leaf["high"] for leaf in found)


def test_three_of_ten_by_wilsons_formula():
    """z^2 = 3.8416. (.3 + .19208) / 1.38416 = .355508; 1.96 sqrt(.021 + .009604) / 1.38416 = .247719."""
    found = share(torch.tensor([1.0] * 3 + [0.0] * 7))
    assert (found["low"], found["high"]) == near((0.355508 - 0.247719, 0.355508 + 0.247719))


@pytest.mark.parametrize(
    ("values", "m"),
    [
        ([1.0, 1.0, 0.0, 0.0], 4),  # samples agree: as many trials as problems. p (1 - p) = 1/4, v = 4 (1/4) / 16
        ([1.0, 0.5, 0.5, 0.0], 8),  # v = (1/4 + 1/4) / 16 = 1/32
        ([0.5, 0.5, 0.5, 0.5], 16),  # no variance: not more than the number of samples
        ([1.0, 1.0, 1.0, 1.0], 4),  # all right: as many as problems
    ],
)
def test_samples_of_a_problem_count_as_far_as_they_differ(values, m):
    """Four problems of four samples each; m = p (1 - p) / v."""
    low, high = wilson(sum(values) / 4, m)
    assert share(torch.tensor(values), samples=4) == near({"mean": sum(values) / 4, "low": low, "high": high, "n": 4})


def test_positions_of_a_document_count_as_far_as_they_differ():
    """Documents 7 and 2 hold 3 and 1 positions: 1, 1, 0 and 0. p = 1/2, off by 1/2 and -1/2: v = (1/4 + 1/4) / 16, so
    m = (1/4) / (1/32) = 8, but there are 4 samples. All right: m = 16 / (9 + 1)."""
    documents = torch.tensor([7, 7, 7, 2])
    for values, m in (([1.0, 1, 0, 0], 4), ([1.0, 1, 1, 1], 1.6), ([1.0, 1, 1, 0], 0.75 * 0.25 / (2 * 0.75**2 / 16))):
        low, high = wilson(sum(values) / 4, m)
        expected = {"mean": sum(values) / 4, "low": low, "high": high, "n": 4, "n_documents": 2}
        assert share(torch.tensor(values), 1, documents) == near(expected)


def test_a_bootstrap_over_two_documents_by_hand():
    """Of two documents one is drawn at a time: the means are 2 (of 1 and 3) and 8, each in about half of the draws."""
    found = over_documents(torch.tensor([1.0, 8.0, 3.0]), torch.tensor([4, 9, 4]))
    assert found == {"mean": 4.0, "low": 2.0, "high": 8.0, "n": 3, "n_documents": 2}


def test_a_bootstrap_over_documents_against_resamples_of_positions_written_out():
    """Twelve documents of 1 to 6 positions: eleven are drawn, all their positions put in a row, the mean taken."""
    rng = random.Random(0)
    values, documents = [], []
    for d in range(12):
        level, n = rng.gauss(0, 1), rng.randint(1, 6)
        values += [level + rng.gauss(0, 0.3) for _ in range(n)]
        documents += [d] * n
    inside = [[v for v, own in zip(values, documents, strict=True) if own == d] for d in range(12)]
    means = []
    for _ in range(20000):
        row = [v for values in rng.choices(inside, k=11) for v in values]
        means.append(sum(row) / len(row))
    means.sort()
    found = over_documents(torch.tensor(values), torch.tensor(documents))
    assert found["mean"] == near(sum(values) / len(values))
    assert (found["low"], found["high"]) == pytest.approx((means[500], means[19500]), abs=0.06)
    assert (found["n"], found["n_documents"]) == (len(values), 12)


def test_one_document_has_no_interval():
    found = over_documents(torch.tensor([1.0, 2.0]), torch.tensor([3, 3]))
    assert found["mean"] == 1.5
    assert math.isnan(found["low"])
    assert math.isnan(found["high"])


def test_a_figure_without_an_interval_is_written_as_json(tmp_path):
    """NaN is no JSON: other programs refuse the whole file."""
    figures = {"text": over_documents(torch.tensor([1.0, 2.0]), torch.tensor([3, 3])), "never": None, "s": [0.5]}
    write_figures(tmp_path / "summary.json", figures)
    plain = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert (plain["text"]["low"], plain["text"]["mean"], plain["never"], plain["s"]) == (None, 1.5, None, [0.5])
    again = read_figures(tmp_path / "summary.json")
    assert again == figures | {"text": near(figures["text"])}
    assert cell(again["text"]) == short(again["text"]) == "1.50"


def coverage(truth, draw, n=1000):
    """How often an interval holds the truth."""
    return sum(leaf["low"] <= truth <= leaf["high"] for leaf in (draw() for _ in range(n))) / n


def test_means_are_covered_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    assert 0.93 < coverage(2.0, lambda: interval(2 + torch.randn(50, generator=generator))) < 0.97


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (3.0, 0.1), (8.0, 1.0)])
def test_shares_are_covered_95_times_in_100(a, b):
    """150 problems of four samples; how often a problem is solved is Beta(a, b): its mean is a / (a + b), .5 to .97."""
    rng = np.random.default_rng(0)

    def draw():
        solved = rng.binomial(4, rng.beta(a, b, size=150)) / 4
        return share(torch.tensor(solved), samples=4)

    assert 0.93 < coverage(a / (a + b), draw) < 0.98


@pytest.mark.parametrize("leaf_of", ["over_documents", "share"])
def test_text_is_covered_95_times_in_100_although_documents_agree_with_themselves(leaf_of):
    """40 documents of 2 to 12 positions that share a level: the plain interval would hold the truth 66 times in 100."""
    rng = np.random.default_rng(0)

    def sample():
        documents = np.repeat(np.arange(40), rng.integers(2, 13, size=40))
        level = rng.normal(size=40)[documents]
        if leaf_of == "share":
            return torch.tensor((level + rng.normal(size=len(level)) > 0).astype(float)), torch.tensor(documents)
        return torch.tensor(level + 0.5 * rng.normal(size=len(level))), torch.tensor(documents)

    truth = 0.5 if leaf_of == "share" else 0.0
    own = over_documents if leaf_of == "over_documents" else lambda v, d: share(v, 1, d)
    assert 0.91 < coverage(truth, lambda: own(*sample()), 400) < 0.97
    assert coverage(truth, lambda: interval(sample()[0]), 400) < 0.88


# -------------------------------------------------------------------------------------- where text is read, by hand


def corpus_of(*lengths, held_out=5):
    """A corpus whose test documents are runs of numbers, none of them twice: 0, 1, 2, ...; a tokenizer with three tags."""
    ends = np.cumsum(lengths)
    documents = [np.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    tokenizer = SimpleNamespace(begin=(), encode=lambda text: [], end=0, ends=(0,), think=1, close=2, tags=(1, 2))
    return SimpleNamespace(documents={"test": Documents([join(documents)])}, tokenizer=tokenizer, held_out_percent=held_out)


def test_text_positions_are_dealt_evenly_to_documents_and_read_all_that_stands_before():
    """40 positions in 3 documents: 13 or 14 each. As no token stands twice, the target says where a position is."""
    lengths = (500, 30, 4000)
    found = evals.text_positions(corpus_of(*lengths), CONFIG)
    assert sorted(found.documents.bincount().tolist()) == [13, 13, 14]
    for (context, target, _, back), d in zip(found.places, found.documents.tolist(), strict=True):
        first = sum(lengths[:d])
        t = target[0]
        assert target == [t, t + 1]
        assert context == list(range(first, t))
        assert len(context) >= back == BACK
        assert t + 1 < first + lengths[d]
    assert min(len(place.context) for place in found.places) < CONTEXT
    assert found.problems == []


def test_text_positions_are_uniform_in_their_document():
    """2,000 positions after 3 to 11 tokens of 13, for two follow: each about 222 times, standard deviation 14."""
    config = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, text_positions=2000))
    counts = np.bincount([len(place.context) for place in evals.text_positions(corpus_of(13), config).places])
    assert BACK == 3
    assert len(counts) == 12
    assert counts[:3].sum() == 0
    assert (abs(counts[3:] - 222) < 60).all()


def test_a_context_repeats_where_its_last_two_tokens_stand_in_it_before():
    """The document 5 6 7 5 6 8 8 8 9, by the position of the target; a context of 8 tokens at most."""
    corpus = corpus_of(9)
    corpus.documents["test"] = Documents([join([np.array([5, 6, 7, 5, 6, 8, 8, 8, 9])])])
    config = dataclasses.replace(
        CONFIG,
        rlp=dataclasses.replace(CONFIG.rlp, context_len=8, horizon=1, back=0),
        eval=dataclasses.replace(CONFIG.eval, text_positions=200),
    )
    found = evals.text_positions(corpus, config)
    by_length = {len(place.context): kind for place, kind in zip(found.places, found.kinds, strict=True)}
    # 5 6 stands twice before position 5; 8 8 before position 8, its first pair being places 5 and 6.
    assert by_length == {n: "repeats" if n in (5, 8) else "no_repeat" for n in range(1, 9)}


def test_a_pair_that_has_left_the_context_is_no_repeat():
    """8 9 stands at the document's beginning, more than eight tokens before it comes again."""
    corpus = corpus_of(1)
    corpus.documents["test"] = Documents([join([np.array([8, 9, *range(10, 20), 8, 9, 7])])])
    config = dataclasses.replace(CONFIG, rlp=dataclasses.replace(CONFIG.rlp, context_len=8, horizon=1))
    found = evals.text_positions(corpus, config)
    assert [7] in [place.target for place in found.places]
    assert set(found.kinds) == {"no_repeat"}


def test_computed_positions_are_one_in_each_of_different_held_out_documents(corpus, monkeypatch):
    """20 of the three kinds in turn; by their documents, drawn again where one is not new."""
    drawn = []

    def draw(rng, split, percent, kind):
        assert (split, percent) == ("test", 5)
        found = draw_computed(rng, split, percent, kind)
        drawn.append(drawn[-1] if len(drawn) == 3 else found)  # the fourth comes again: it is no new one
        return drawn[-1]

    monkeypatch.setattr(evals, "draw_computed", draw)
    config = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, text_positions=20))
    found = evals.computed_positions(corpus, config)
    drawn.pop(3)
    assert found.documents.tolist() == list(range(20))
    assert found.kinds == [*(["ledger", "session", "trace"] * 7)[:20]]
    assert [d.kind for d in drawn] == found.kinds
    for document, (context, target, _, back) in zip(drawn, found.places, strict=True):
        tokens = [*corpus.tokenizer.encode(document.text), corpus.tokenizer.end]
        assert context + target == tokens[: len(context) + HORIZON]
        assert back == BACK
    assert found.problems == []


def test_validation_is_greedy_accuracy_by_family_on_the_validation_split(corpus, networks):
    """By hand: the likeliest thought of each problem of `val`, and whether the likeliest tokens after it are the answer."""
    model, tk, right = networks[1], corpus.tokenizer, {}
    for p in held_out_problems("val", 5, SEED, corpus.held_out_percent, corpus.families):
        context, target = tk.encode(p.prompt)[-CONTEXT:], (tk.encode(p.answer) + [tk.end] * HORIZON)[:HORIZON]
        thought = greedy_by_hand(model, context, tk, [])
        right.setdefault(p.family, []).append(float(logp_after_by_hand(model, tk, context, thought, target)[1]))
    assert 0 < sum(map(sum, right.values())) < 20
    expected = {family: sum(values) / 5 for family, values in right.items()}
    assert evals.validate(model, corpus, CONFIG, 5) == pytest.approx(expected)


def test_windows_of_text_have_no_target_in_common_and_are_dealt_evenly():
    """Windows of 10 targets from documents of 95, 7 and 400 tokens: 9, 1 and 39 to choose from, 8 wanted of each."""
    documents = corpus_of(95, 7, 400).documents["test"]
    found = evals.text_windows(documents, 24, 10, random.Random(0))
    assert sorted(i for i, _ in found) == [0] * 8 + [1] + [2] * 8
    targets = [t for _, window in found for t in window[1:].tolist()]
    assert len(targets) == len(set(targets))
    for i, window in found:
        assert window.tolist() == list(range(window[0], window[0] + (7 if i == 1 else 11)))
        assert (window[0] - sum((95, 7, 400)[:i])) % 10 == 0


def test_documents_that_are_too_short_are_left_out():
    """Of 95, 7, 11 and 1 tokens; a window of 10 targets has 11 tokens, a position one before it."""
    documents = corpus_of(95, 7, 11, 1).documents["test"]
    assert {i for i, _ in evals.text_windows(documents, 8, 10, random.Random(0), least=11)} == {0, 2}
    assert evals.text_windows(documents, 8, 100, random.Random(0), least=101) == []
    assert set(evals.deal(documents, 8, random.Random(0))) == {0, 1, 2}


def test_of_many_documents_as_many_are_chosen_as_there_are_windows():
    documents = corpus_of(*[30] * 50).documents["test"]
    found = evals.text_windows(documents, 20, 10, random.Random(0))
    assert len({i for i, _ in found}) == len(found) == 20


def test_each_position_is_given_thoughts_of_another_one():
    """All thoughts are there once, none at its own place; another seed moves them elsewhere."""
    thought_BGL = torch.arange(7 * 2 * 3).view(7, 2, 3)
    found = evals.swapped(thought_BGL, 0)
    assert sorted(found.flatten().tolist()) == list(range(42))
    assert (found[:, 0, 0] % 6 == 0).all()
    assert (found != thought_BGL).all()
    assert not torch.equal(found, evals.swapped(thought_BGL, 1))


# ------------------------------------------------------------------------------------------------- plain passes by hand


@torch.no_grad()
def logp_by_hand(model, before, target, tags):
    """log p of the target's tokens after those before, summed; whether each is the likeliest."""
    logits_TV = plain_logits(model, before + target, tags)
    logp, right = 0.0, True
    for i, token in enumerate(target):
        row = logits_TV[len(before) - 1 + i]
        logp += float(row[token] - row.logsumexp(-1))
        right = right and int(row.argmax()) == token
    return logp, right


def with_thought(context, thought, back, tk):
    """The context with the thought, closed, before its last `back` tokens."""
    closed = thought if thought[-1] == tk.close else [*thought, tk.close]
    stands = len(context) - back
    return [*context[:stands], tk.think, *closed, *context[stands:]]


def logp_after_by_hand(model, tokenizer, context, thought, target, back=0):
    """`logp_by_hand` after a thought that stands `back` tokens before the end of the context."""
    return logp_by_hand(model, with_thought(context, thought, back, tokenizer), target, tokenizer.tags)


def greedy_by_hand(model, context, tokenizer, begin):
    """The likeliest thought, the whole sequence run again for every token."""
    thought = list(begin)
    while len(thought) < LONGEST and not {tokenizer.close, tokenizer.end} & set(thought):
        thought.append(int(plain_logits(model, [*context, tokenizer.think, *thought], (tokenizer.think,))[-1].argmax()))
    return thought


@pytest.fixture(scope="module")
def networks(corpus):
    """Three models with different weights that like digits and the closing tag, and the end after a digit: some answers
    are right, thoughts end early, late and at once."""
    tk, ones = corpus.tokenizer, torch.ones(8, dtype=torch.float64)
    digits = [tk.encode(f" {i}")[0] for i in range(10)]
    made = []
    for seed in SEEDS:
        model = tiny_model(vocab_size=tk.n_vocab, pattern="M*-", tie_embeddings=False)
        noise = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=noise, dtype=p.dtype)
        head_VD = model.head.weight.data
        head_VD -= head_VD.mean(1, keepdim=True)  # of the direction of ones, which a digit brings, only END knows
        head_VD[digits] *= 5
        head_VD[tk.close] *= 7
        head_VD[tk.end] = 1.4 * ones
        model.embed.weight.data[digits] += 8 * ones
        made.append(model.requires_grad_(False))
    return made


class Spy:
    """Writes down every call of the sampler: by which model, how, and the thoughts of each position."""

    def __init__(self):
        self.calls = []

    def __call__(self, model, batch, tokenizer, sampling, generator=None, forced_Rl=None):
        t = sample_thoughts(model, batch, tokenizer, sampling, generator, forced_Rl)
        thoughts = [row[:n] for row, n in zip(t.tokens_RL.tolist(), t.length_R.tolist(), strict=True)]
        G = sampling.group_size
        groups = [thoughts[i : i + G] for i in range(0, len(thoughts), G)]
        self.calls.append(SimpleNamespace(model=model, sampling=sampling, forced=forced_Rl, groups=groups,
                                          first=batch["target_BX"][0].tolist()))  # fmt: skip
        return t


@pytest.fixture(scope="module")
def run(corpus, networks):
    """`evaluate_both` of three models, the contexts that it should read, and the thoughts that were sampled."""
    spy, (model, base, teacher) = Spy(), networks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evals, "sample_thoughts", spy)
        found = evals.evaluate_both(model, base, teacher, corpus, CONFIG)
    problems = held_out_problems("test", 6, SEED, corpus.held_out_percent, corpus.families)
    encode, end = corpus.tokenizer.encode, corpus.tokenizer.end
    read = {
        "problems": [(encode(p.prompt)[-CONTEXT:], (encode(p.answer) + [end] * HORIZON)[:HORIZON], 0) for p in problems]
    }
    others = {"text": evals.text_positions(corpus, CONFIG), "computed": evals.computed_positions(corpus, CONFIG)}
    for name, positions in others.items():
        targets = [(place.target + [end] * HORIZON)[:HORIZON] for place in positions.places]
        read[name] = [(p.context[-CONTEXT:], t, p.back) for p, t in zip(positions.places, targets, strict=True)]
    return SimpleNamespace(found=found, spy=spy, model=model, base=base, teacher=teacher, problems=problems,
                           tokenizer=corpus.tokenizer, read=read, **others)  # fmt: skip


def calls_of(run, temperature, group_size, forced=False, kind="problems"):
    """By model, the groups of thoughts that were sampled in this way at positions of a kind."""
    first = run.read[kind][0][1]
    return {
        call.model: call.groups
        for call in run.spy.calls
        if call.sampling == (group_size, LONGEST, temperature)
        and (call.forced is not None) == forced
        and len(call.groups) == len(run.read[kind])
        and call.first == first
    }


@dataclasses.dataclass
class ByHand:
    """What plain passes say at each position: values, one a position."""

    logp: list
    plain: dict
    empty: list
    right: list
    right_plain: list
    length: list
    closed: list
    not_empty: list
    groups: list


def by_hand(run, who, pairs, groups):
    """All values of a model's sampled thoughts."""
    tk, model = run.tokenizer, getattr(run, who)

    def mean(values):
        return sum(values) / len(values)

    scored = [
        [logp_after_by_hand(model, tk, x, c, t, back) for c in group]
        for (x, t, back), group in zip(pairs, groups, strict=True)
    ]
    plain = {
        name: [logp_by_hand(getattr(run, name), c, t, tk.tags) for c, t, _ in pairs] for name in ("base", "teacher", who)
    }
    return ByHand(
        logp=[mean([logp for logp, _ in row]) for row in scored],
        plain={name: [logp for logp, _ in rows] for name, rows in plain.items()},
        empty=[logp_after_by_hand(model, tk, x, [tk.close], t, back)[0] for x, t, back in pairs],
        right=[mean([float(right) for _, right in row]) for row in scored],
        right_plain=[float(right) for _, right in plain[who]],
        length=[mean([len(c) for c in group]) for group in groups],
        closed=[mean([float(c[-1] == tk.close) for c in group]) for group in groups],
        not_empty=[mean([float(c[0] != tk.close) for c in group]) for group in groups],
        groups=groups,
    )


@pytest.fixture(scope="module")
def hand(run):
    """By (model, kind of positions)."""
    made = {}
    for who in ("model", "base"):
        for kind, pairs in run.read.items():
            groups = calls_of(run, CONFIG.rlp.temperature, SAMPLES, kind=kind)[getattr(run, who)]
            made[who, kind] = by_hand(run, who, pairs, groups)
    return made


def normal(values):
    """Mean +- 1.96 standard errors."""
    n, mean = len(values), sum(values) / len(values)
    half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def wilson_of(values, samples, documents=None):
    """Wilson's interval over problems or documents, m from their variance."""
    n, p, off, size = len(values), sum(values) / len(values), {}, {}
    for d, v in zip(documents or range(n), values, strict=True):
        off[d], size[d] = off.get(d, 0) + v - p, size.get(d, 0) + 1
    if p in (0, 1):
        m = n**2 / sum(k**2 for k in size.values())
    else:
        square = sum(x**2 for x in off.values())
        m = min(n * samples, p * (1 - p) * n**2 / square) if square else n * samples
    low, high = wilson(p, m)
    return {"mean": p, "low": low, "high": high, "n": n} | ({"n_documents": len(size)} if documents else {})


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def families(run):
    """The places of all problems, and of those of each family: six in a row."""
    names = list(dict.fromkeys(p.family for p in run.problems))
    return {"all": range(24), **{name: range(6 * i, 6 * i + 6) for i, name in enumerate(names)}}


def test_the_thoughts_that_are_measured_are_of_all_sorts(run, hand):
    """Else the tests below would say less than they seem to: empty, closed, cut; answers right and wrong, by each model."""
    shares = [
        sum(hand[who, kind].not_empty) / len(hand[who, kind].not_empty)
        for who in ("model", "base")
        for kind in ("problems", "text")
    ]
    assert min(shares) > 0
    assert sum(share < 1 for share in shares) >= 3
    for who in ("model", "base"):
        at_problems, at_text = hand[who, "problems"], hand[who, "text"]
        for h in (at_problems, at_text):
            assert 0 < sum(h.closed) < len(h.closed)
        assert {1, 3, LONGEST} <= {len(c) for group in at_problems.groups + at_text.groups for c in group}
        assert 0 < sum(at_problems.right) < 24
        assert 0 < sum(at_problems.right_plain) < 24
    assert any(0 < v < 1 for v in at_problems.right)
    assert set(run.text.kinds) == {"repeats", "no_repeat"}
    for kind, backs in (("problems", {0}), ("text", {BACK}), ("computed", {BACK})):
        assert max(len(context) for context, *_ in run.read[kind]) == CONTEXT
        assert {back for *_, back in run.read[kind]} == backs


def test_thoughts_are_sampled_as_the_settings_say(run):
    """At .7, three a position, by both models for every kind; greedy ones of problems; three forced styles."""
    for kind in run.read:
        assert calls_of(run, 0.7, SAMPLES, kind=kind).keys() == {run.model, run.base}
    assert calls_of(run, 0.0, 1).keys() == {run.model, run.base}
    for temperature in (0.0, 0.7, 1.0):
        assert calls_of(run, temperature, 1, forced=True).keys() == {run.base}
    assert len(run.spy.calls) == 6 + 2 + 3


def logp_of(h, who):
    """By reference: log p at each position."""
    plain = {"frozen_base": h.plain["base"], "ema": h.plain["teacher"], "own_no_think": h.plain[who]}
    return {**plain, "empty_thought": h.empty}


@pytest.mark.parametrize("reference", ["frozen_base", "ema", "own_no_think", "empty_thought"])
@pytest.mark.parametrize(("key", "who"), [("gain_nats", "model"), ("gain_nats_before", "base")])
def test_gain_at_problems_by_hand(run, hand, key, who, reference):
    """log p after the thought, mean over samples, minus log p of the reference: a normal interval over 24 problems."""
    h = hand[who, "problems"]
    if (key, reference) == ("gain_nats_before", "ema"):
        assert reference not in run.found[key]
        return
    assert run.found[key][reference] == near(normal(minus(h.logp, logp_of(h, who)[reference])))


def swapped_by_hand(run, who, pairs, h):
    """Minus the mean log p after the thoughts of the next position on a ring."""
    n, tk = len(pairs), run.tokenizer
    ring = torch.randperm(n, generator=torch.Generator().manual_seed(SEED)).tolist()
    from_place = {ring[k]: ring[k - 1] for k in range(n)}
    logp = []
    for place, (context, target, back) in enumerate(pairs):
        others = h.groups[from_place[place]]
        scored = [logp_after_by_hand(getattr(run, who), tk, context, c, target, back)[0] for c in others]
        logp.append(sum(scored) / SAMPLES)
    return minus(h.logp, logp)


@pytest.mark.parametrize(("key", "who"), [("gain_nats", "model"), ("gain_nats_before", "base")])
def test_gain_over_another_problems_thought_by_hand(run, hand, key, who):
    expected = normal(swapped_by_hand(run, who, run.read["problems"], hand[who, "problems"]))
    assert run.found[key]["swapped_thought"] == near(expected)


def test_gain_by_family_by_hand(run, hand):
    """Against the frozen base, of the trained model."""
    h = hand["model", "problems"]
    gain = minus(h.logp, h.plain["base"])
    expected = {name: near(normal([gain[i] for i in rows])) for name, rows in families(run).items()}
    assert run.found["gain_nats_by_kind"] == expected


@pytest.mark.parametrize("who", ["model", "base"])
@pytest.mark.parametrize(
    ("path", "values", "samples"),
    [
        (("accuracy", "sampled"), "right", SAMPLES),
        (("accuracy", "no_think"), "right_plain", 1),
        (("closed",), "closed", SAMPLES),
        (("share_not_empty",), "not_empty", SAMPLES),
        (("thought_tokens",), "length", 0),
    ],
)
def test_shares_and_lengths_at_problems_by_hand(run, hand, who, path, values, samples):
    """Of all problems and of each family, before (`base`) and after (`rlp`)."""
    found = run.found
    for key in path:
        found = found[key]
    values = getattr(hand[who, "problems"], values)
    assert found.keys() == families(run).keys()
    for name, rows in families(run).items():
        own = [values[i] for i in rows]
        expected = wilson_of(own, samples) if samples else normal(own)
        assert found[name].keys() == {"base", "rlp"}
        assert found[name]["rlp" if who == "model" else "base"] == near(expected)


@pytest.mark.parametrize("who", ["model", "base"])
def test_greedy_accuracy_by_hand(run, who):
    """Every thought is made of the likeliest tokens, run again from the start for each."""
    model, tk, right = getattr(run, who), run.tokenizer, []
    for context, target, _ in run.read["problems"]:
        thought = greedy_by_hand(model, context, tk, [])
        right.append(float(logp_after_by_hand(model, tk, context, thought, target)[1]))
    for name, rows in families(run).items():
        found = run.found["accuracy"]["greedy"][name]["rlp" if who == "model" else "base"]
        assert found == near(wilson_of([right[i] for i in rows], 1))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_accuracy_with_the_style_forced_by_hand(run, temperature):
    """Two tokens are those of the worked thought, the base goes on by itself; a greedy one goes on as by hand."""
    tk, right = run.tokenizer, []
    groups = calls_of(run, temperature, 1, forced=True)[run.base]
    for (context, target, _), problem, (thought,) in zip(run.read["problems"], run.problems, groups, strict=True):
        begin = tk.encode(problem.thought)[:2]
        assert thought[:2] == begin
        if temperature == 0:
            assert thought == greedy_by_hand(run.base, context, tk, begin)
        right.append(float(logp_after_by_hand(run.base, tk, context, thought, target)[1]))
    assert any(thought[2:5] != tk.encode(p.thought)[2:5] for p, (thought,) in zip(run.problems, groups, strict=True))
    found = run.found["forced_style_base"][f"temperature_{temperature:g}"]
    assert found == {n: near(wilson_of([right[i] for i in rows], 1)) for n, rows in families(run).items()}


def bootstrap_of(values, documents):
    """Quantiles of means over documents drawn with the same numbers, position by position."""
    names = sorted(set(documents))
    N = len(names)
    means = []
    for times in np.random.default_rng(0).multinomial(N - 1, [1 / N] * N, size=2000):
        weight = [times[names.index(d)] for d in documents]
        means.append(sum(w * v for w, v in zip(weight, values, strict=True)) / sum(weight))
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": sum(values) / len(values), "low": low, "high": high, "n": len(values), "n_documents": N}


@pytest.mark.parametrize("reference", ["frozen_base", "ema", "own_no_think", "empty_thought", "swapped_thought"])
@pytest.mark.parametrize("who", ["model", "base"])
@pytest.mark.parametrize("kind", ["text", "computed"])
def test_gain_in_documents_by_hand(run, hand, kind, who, reference):
    """As at problems, the thoughts three tokens back, with a bootstrap over documents."""
    h, found = hand[who, kind], run.found["positions"][kind]["rlp" if who == "model" else "base"]["gain_nats"]
    if (who, reference) == ("base", "ema"):
        assert reference not in found
        return
    gain = (
        swapped_by_hand(run, who, run.read[kind], h)
        if reference == "swapped_thought"
        else minus(h.logp, logp_of(h, who)[reference])
    )
    assert found[reference] == near(bootstrap_of(gain, getattr(run, kind).documents.tolist()))


@pytest.mark.parametrize("who", ["model", "base"])
@pytest.mark.parametrize("kind", ["text", "computed"])
def test_gain_lengths_and_shares_in_documents_by_hand(run, hand, kind, who):
    """Of all positions and by kind: in text those whose context repeats and the others, else by kind of document."""
    h, found = hand[who, kind], run.found["positions"][kind]["rlp" if who == "model" else "base"]
    gain, positions = minus(h.logp, h.plain["base"]), getattr(run, kind)
    kinds = {"text": ("repeats", "no_repeat"), "computed": ("ledger", "session", "trace")}[kind]
    assert set(positions.kinds) == set(kinds)
    for kind in ("all", *kinds):
        rows = [i for i, own in enumerate(positions.kinds) if kind in ("all", own)]
        of = [positions.documents.tolist()[i] for i in rows]
        assert found["gain_nats_by_kind"][kind] == near(bootstrap_of([gain[i] for i in rows], of))
        assert found["thought_tokens"][kind] == near(bootstrap_of([h.length[i] for i in rows], of))
        for key, values in (("closed", h.closed), ("share_not_empty", h.not_empty)):
            own = [values[i] for i in rows]
            assert found[key][kind] == near(wilson_of(own, SAMPLES, of))
    assert found.keys() == {"gain_nats", "gain_nats_by_kind", "thought_tokens", "closed", "share_not_empty"}


def text_losses_by_hand(model, corpus):
    """The mean loss of each window, one pass each, and its document."""
    rng = random.Random(f"text-test-{SEED}")
    windows = evals.text_windows(corpus.documents["test"], 20, 256, rng)
    losses = []
    for _, window in windows:
        logp_TV = plain_logits(model, window[:-1].tolist(), corpus.tokenizer.tags).log_softmax(-1)
        losses.append(-sum(float(logp_TV[t, token]) for t, token in enumerate(window[1:])) / (len(window) - 1))
    return losses, [i for i, _ in windows]


def test_loss_on_text_by_hand(run, corpus):
    """Of each model; and the change, relative to the base's mean."""
    before, documents = text_losses_by_hand(run.base, corpus)
    after, _ = text_losses_by_hand(run.model, corpus)
    found, mean = run.found["loss_nats"], sum(before) / len(before)
    assert found["no_think_text"]["base"] == near(bootstrap_of(before, documents))
    assert found["no_think_text"]["rlp"] == near(bootstrap_of(after, documents))
    change = [(a - b) / mean for a, b in zip(after, before, strict=True)]
    assert found["no_think_text_change"] == near(bootstrap_of(change, documents))


def test_every_figure_of_a_run_is_looked_at_here(run):
    """A figure that is new needs a test."""
    assert run.found.keys() == {"gain_nats", "gain_nats_by_kind", "gain_nats_before", "accuracy", "thought_tokens",
                                "closed", "share_not_empty", "forced_style_base", "loss_nats", "positions"}  # fmt: skip
    assert run.found["accuracy"].keys() == {"sampled", "greedy", "no_think"}
    assert run.found["gain_nats"].keys() == {"frozen_base", "ema", "own_no_think", "empty_thought", "swapped_thought"}
    assert run.found["loss_nats"].keys() == {"no_think_text", "no_think_text_change"}
    assert run.found["positions"].keys() == {"text", "computed"}


def test_figures_of_continued_pretraining_are_the_same_without_a_teacher(run, corpus):
    """It has no teacher and is called `cpt`; all else is what RLP's figures are."""
    found = evals.evaluate_both(run.model, run.base, None, corpus, dataclasses.replace(CONFIG, mode="cpt"))

    def renamed(tree):
        if not isinstance(tree, dict):
            return tree
        return {("cpt" if key == "rlp" else key): renamed(value) for key, value in tree.items() if key != "ema"}

    assert found == renamed(run.found)


def test_figures_of_a_base_are_those_that_it_has_before(run, corpus):
    """Pretraining's: the same problems, thoughts and text as those of `base` in an RLP run."""
    found = evals.evaluate_base(run.base, corpus, CONFIG)
    gains = {name: leaf for name, leaf in run.found["gain_nats_before"].items() if name != "frozen_base"}
    assert found["gain_nats"] == gains
    for how, leaves in run.found["accuracy"].items():
        assert found["accuracy"][how] == {name: {"base": leaf["base"]} for name, leaf in leaves.items()}
    assert found["forced_style"] == run.found["forced_style_base"]
    assert found["loss_nats"] == {"no_think_text": {"base": run.found["loss_nats"]["no_think_text"]["base"]}}
    assert found.keys() == {"accuracy", "gain_nats", "forced_style", "loss_nats"}


# ------------------------------------------------------------------------------------------------- how the work is done


def test_every_reference_is_run_once(corpus, networks, monkeypatch):
    """At every kind of positions: base and teacher once without a thought, for the gains of base and trained model; both
    after empty and after swapped thoughts."""
    calls = {"plain_logp": [], "logp_after": []}

    def counting(name, function):
        def counted(network, *args):
            calls[name].append(networks.index(network))
            return function(network, *args)

        return counted

    for name in calls:
        monkeypatch.setattr(evals, name, counting(name, getattr(evals, name)))
    found = evals.evaluate_both(*networks, corpus, SMOKE)
    assert sorted(calls["plain_logp"]) == 3 * [1] + 3 * [2]
    assert sorted(calls["logp_after"]) == 6 * [0] + 6 * [1]
    assert found["gain_nats_by_kind"]["all"] == found["gain_nats"]["frozen_base"]


@pytest.fixture
def guests(monkeypatch):
    """As if all networks waited in host memory: how many were on the device together, at most so far."""
    visiting, here, most = parallel.visiting, [], []

    @contextlib.contextmanager
    def counted(network, low):
        with visiting(network, low) as guest:
            assert guest is not network
            here.append(guest)
            most.append(len(here))
            yield guest
            here.remove(guest)

    monkeypatch.setattr(parallel, "waits", lambda network: True)
    monkeypatch.setattr(parallel, "visiting", counted)
    return lambda: max(most)


def test_networks_that_wait_are_measured_one_after_the_other(corpus, networks, request):
    at_once = evals.evaluate_both(*networks, corpus, SMOKE)
    guests = request.getfixturevalue("guests")
    assert evals.evaluate_both(*networks, corpus, SMOKE) == at_once
    assert guests() == 1


def test_sizes_that_wait_are_measured_in_pairs(corpus, networks, request):
    """Each beside the first, from which it has its divergence."""
    sizes, references = [*networks, networks[1]], [0, 0, 1, 2]
    at_once = evals.evaluate_sizes(sizes, references, corpus, SMOKE)
    own = evals.size_accuracies(sizes, corpus, SMOKE)
    guests = request.getfixturevalue("guests")
    assert evals.evaluate_sizes(sizes, references, corpus, SMOKE) == at_once
    assert guests() == 2
    assert evals.size_accuracies(sizes, corpus, SMOKE) == own


def test_a_guest_computes_in_the_dtype_of_the_run(networks, monkeypatch):
    """Its matrices are bf16, and the network that waits is as it was."""
    tokens_BT = torch.arange(8)[None]
    monkeypatch.setattr(parallel, "waits", lambda network: True)
    model = copy.deepcopy(networks[0]).float()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad(), evals.visiting(model, SMOKE) as guest:
        wanted = guest.logits(guest(tokens_BT)[0])
        assert_close(wanted, model.logits(model(tokens_BT)[0]), rtol=0, atol=0)
    low = dataclasses.replace(SMOKE, parallel=dataclasses.replace(SMOKE.parallel, dtype="bf16"))
    with torch.no_grad(), evals.visiting(model, low) as guest:
        assert guest.output_matrix.dtype == torch.bfloat16
        found = guest.logits(guest(tokens_BT)[0])
    assert 0 < (found.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(("most", "n_tokens", "n"), [(64, 4 * 168, 64), (64, 4 * 4096, 8), (256, 2048, 64), (64, 10**9, 1)])
def test_long_contexts_are_measured_a_few_at_once(most, n_tokens, n):
    """At most 131,072 tokens in their caches, at least one context."""
    assert evals.together(most, n_tokens, evals.TOKENS_AT_ONCE) == n


def test_how_many_are_measured_at_once_changes_no_figure(corpus, networks, monkeypatch):
    """Greedy thoughts, plain predictions and given thoughts of five problems, one by one and all together."""
    problems = evals.problem_positions(corpus, CONFIG)
    five = problems._replace(places=problems.places[:5])
    thought_BGL = torch.arange(5 * 2 * 3).view(5, 2, 3)

    def figures():
        model = networks[0]
        return (evals.measure_thoughts(model, five, temperature=0.0, samples=1), evals.plain_logp(model, five),
                evals.logp_after(model, five, thought_BGL))  # fmt: skip

    together = figures()
    monkeypatch.setattr(evals, "TOKENS_AT_ONCE", 1)
    assert_close(figures(), together)


def test_how_many_are_measured_at_once_changes_no_beginning_and_no_scorer(corpus, networks, monkeypatch):
    """Five problems, each with a beginning of its own for its thoughts, and a scorer that accepts everything of every other
    problem."""
    found = evals.problem_positions(corpus, CONFIG)
    problems = [dataclasses.replace(p, scorer=lambda _, i=i: float(i % 2)) for i, p in enumerate(found.problems[:5])]
    five, forced_Bl = found._replace(places=found.places[:5], problems=problems), torch.arange(10).view(5, 2)

    def figures():
        return evals.measure_thoughts(networks[0], five, 0.0, 1, forced_Bl)

    together = figures()
    assert together["correct"][1::2].tolist() == [1.0, 1.0]
    assert together["thought_BGL"][:, 0, :2].tolist() == forced_Bl.tolist()
    monkeypatch.setattr(evals, "TOKENS_AT_ONCE", 1)
    assert_close(figures(), together)


# ---------------------------------------------------------------------------------------------------- models of many sizes

SEQ_LEN, LONG_LEN, ROWS = 6, 14, 60
SIZES = dataclasses.replace(
    SMOKE,
    data=dataclasses.replace(SMOKE.data, text_share=0.25),
    warmup=dataclasses.replace(SMOKE.warmup, computed_share=0.2),
    elastic=dataclasses.replace(SMOKE.elastic, seq_len=SEQ_LEN, long_len=LONG_LEN),
    eval=dataclasses.replace(SMOKE.eval, elastic_rows=ROWS),
)


def packed_batch(kind, step, n):
    """n rows of two documents each, of 2 to 4 tokens and the rest; the last token of a document has no target."""
    rng = random.Random(f"{kind}-{step}")
    batch = {name: torch.zeros(n, SEQ_LEN, dtype=torch.long) for name in ("tokens_BT", "targets_BT", "ids_BT")}
    for b in range(n):
        cut = rng.randint(2, 4)
        row = torch.tensor([rng.randrange(12) for _ in range(SEQ_LEN + 1)])
        batch["tokens_BT"][b], batch["targets_BT"][b] = row[:-1], row[1:]
        batch["targets_BT"][b, cut - 1] = -100
        batch["ids_BT"][b, cut:] = 1
    return batch


@pytest.fixture(scope="module")
def sizes():
    """A parent, two smaller models and their figures; the smaller ones are compared with the parent and with each other.

    Long texts: documents of 40, 5 and 15 tokens have 2, 0 and 1 of 14 tokens and the next.
    """
    models = [tiny_model(pattern=pattern, tie_embeddings=False).requires_grad_(False) for pattern in ("M*-", "M-", "*-")]
    corpus = corpus_of(1)
    texts = [np.random.default_rng(n).integers(0, 12, size=n) for n in (40, 5, 15)]
    corpus.documents["test"] = Documents([join(texts)])
    asked = []

    def mixture(_, config, step, n_rows, seq_len, split):
        shares = (config.data.text_share, config.warmup.computed_share)
        asked.append((*shares, step, n_rows, seq_len, split))
        return packed_batch(shares, step, n_rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evals, "mixture", mixture)
        found = evals.evaluate_sizes(models, [0, 0, 1], corpus, SIZES)
    return SimpleNamespace(models=models, found=found, asked=asked, texts=texts, corpus=corpus)


def sequence_by_hand(model, parent, batch, b):
    """Loss, KL from the parent and share of equal likeliest tokens of a sequence, each document in a pass of its own."""
    loss, kl, same = [], [], []
    tokens, targets, ids = (batch[name][b].tolist() for name in ("tokens_BT", "targets_BT", "ids_BT"))
    cut = ids.index(1)
    for part in (slice(0, cut), slice(cut, SEQ_LEN)):
        q_TV, p_TV = (plain_logits(m, tokens[part], []).log_softmax(-1).tolist() for m in (model, parent))
        for q, p, target in zip(q_TV, p_TV, targets[part], strict=True):
            if target != -100:
                loss.append(-q[target])
                kl.append(sum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True)))
                same.append(float(q.index(max(q)) == p.index(max(p))))
    return [sum(values) / len(values) for values in (loss, kl, same)]


@pytest.fixture(scope="module")
def sequences(sizes):
    """By model and kind: loss, KL and agreement of each of the 32 sequences, in two batches of 16."""

    def of(model, shares):
        rows = [(packed_batch(shares, step, 16), b) for step in range(2) for b in range(16)]
        return [list(v) for v in zip(*(sequence_by_hand(model, sizes.models[0], *row) for row in rows), strict=True)]

    return [{kind: of(model, shares) for kind, shares in ALONE.items()} for model in sizes.models]


ALONE = {"text": (1.0, 0.0), "computed": (0.0, 1.0), "problem": (0.0, 0.0)}  # shares of text and of computed documents


def weighted(text, computed, problem):
    """m = .25 m_text + .2 m_computed + .55 m_problem; its squared error is the sum of w^2 e^2."""
    mean, error2 = 0.0, 0.0
    for weight, values in ((0.25, text), (0.2, computed), (0.55, problem)):
        n, own = len(values), sum(values) / len(values)
        mean += weight * own
        error2 += weight**2 * sum((v - own) ** 2 for v in values) / (n - 1) / n
    half = 1.96 * math.sqrt(error2)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 3 * len(text)}


def test_sizes_are_measured_on_each_kind_of_held_out_documents_alone(sizes):
    """60 rows: 20 of each kind, in batches of 16."""
    assert (SIZES.data.text_share, SIZES.warmup.computed_share) == (0.25, 0.2)
    assert sizes.asked == [(*shares, step, 16, SEQ_LEN, "test") for shares in ALONE.values() for step in (0, 1)]


@pytest.mark.parametrize("m", [0, 1, 2])
def test_figures_of_a_size_by_hand(sizes, sequences, m):
    """Losses, KL and agreement; differences from the parent or from the model that it is compared with, paired."""
    own, parent, other = sequences[m], sequences[0], sequences[(0, 0, 1)[m]]
    found = sizes.found[m]
    for name, i in (("loss_nats", 0), ("kl_nats", 1), ("top1", 2)):
        assert found[name] == near(weighted(*(own[kind][i] for kind in ALONE)))
    for kind in ALONE:
        assert found[f"{kind}_loss_nats"] == near(normal(own[kind][0]))
    parent_loss = sum(w * np.mean(parent[kind][0]) for w, kind in zip((0.25, 0.2, 0.55), ALONE, strict=True))
    change = [[x / parent_loss for x in minus(own[kind][0], parent[kind][0])] for kind in ALONE]
    assert found["loss_change"] == near(weighted(*change))
    assert found["difference_nats"] == near(weighted(*[minus(own[k][0], other[k][0]) for k in ALONE]))
    assert found.keys() == {"loss_nats", "kl_nats", "top1", "text_loss_nats", "computed_loss_nats", "problem_loss_nats",
                            "loss_change", "difference_nats", "long_loss_nats"}  # fmt: skip
    if m:
        assert 0 < found["top1"]["mean"] < 1


@pytest.mark.parametrize("m", [0, 1, 2])
def test_loss_of_long_text_by_hand(sizes, m):
    """Of 14 tokens those after the sixth count, each read after all before: targets 6 to 14; a bootstrap over documents."""
    losses = []
    for document, start in ((0, 0), (0, 14), (2, 0)):
        text = sizes.texts[document][start : start + LONG_LEN + 1].tolist()
        logp_TV = plain_logits(sizes.models[m], text[:-1], []).log_softmax(-1)
        losses.append(-sum(float(logp_TV[t - 1, text[t]]) for t in range(SEQ_LEN, LONG_LEN + 1)) / 9)
    assert sizes.found[m]["long_loss_nats"] == near(bootstrap_of(losses, [0, 0, 2]))


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (0, 5), (3, 4), (6, 1), (2, 2)])
def test_mcnemar_counts_the_splits_that_are_as_uneven_by_enumeration(won, lost):
    """Every way in which a fair coin deals the problems that one of two models alone has right; others have no say."""
    first = torch.tensor([0.0] * won + [1.0] * lost + [1.0, 0.0, 1.0])
    second = torch.tensor([1.0] * won + [0.0] * lost + [1.0, 0.0, 1.0])
    n = won + lost
    splits = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
    as_uneven = [abs(2 * k - n) >= abs(won - lost) for k in splits]
    p = sum(as_uneven) / len(as_uneven)
    assert evals.mcnemar(first, second) == {"won": won, "lost": lost, "p": pytest.approx(p)}


def test_sizes_answer_the_same_held_out_problems(corpus, monkeypatch):
    """Each model sampled at the setting's temperature, then greedily; McNemar's test is against the first one."""
    asked, right = [], {("a", 0.7): [1.0, 0.5], ("b", 0.7): [0.0, 0.5], ("a", 0.0): [1.0, 0.0], ("b", 0.0): [1.0, 1.0]}
    config = dataclasses.replace(SIZES, eval=dataclasses.replace(SIZES.eval, samples=2))

    def measured(model, positions, temperature, samples):
        asked.append((model, temperature, samples))
        return {"correct": torch.tensor(right[model, temperature])}

    positions = evals.Positions([None, None], None, config, ["sum", "word"])
    monkeypatch.setattr(evals, "problem_positions", lambda *_: positions)
    monkeypatch.setattr(evals, "measure_thoughts", measured)
    monkeypatch.setattr(evals, "visiting", lambda model, _: contextlib.nullcontext(model))
    first, second = evals.size_accuracies(["a", "b"], corpus, config)
    assert asked == [("a", 0.7, 2), ("a", 0.0, 1), ("b", 0.7, 2), ("b", 0.0, 1)]
    assert [leaf["mean"] for leaf in first["accuracy"]["sampled"].values()] == [0.75, 1.0, 0.5]
    assert [leaf["mean"] for leaf in second["accuracy"]["greedy"].values()] == [1.0, 1.0, 1.0]
    assert first["mcnemar"] == {"won": 0, "lost": 0, "p": 1.0}
    assert second["mcnemar"] == {"won": 1, "lost": 0, "p": 1.0}


def test_facts_of_a_size_by_hand(monkeypatch):
    """M*-, D 8, V 12, tied. M: 4 heads of 3 channels (I 12), 2 groups of N 5, so in_proj has 2 x 12 + 2 x 10 + 4 = 48 rows
    and the convolution 32 channels of 4 taps; *: 4 heads of 4 on 2 keys; -: 12 neurons.

    Weights: 12 x 8 + 8 = 104; M 8 + 384 + 128 + 32 + 3 x 4 + 12 + 96 = 672; * 8 + 128 + 64 + 64 + 128 = 392; - 8 + 2 x 96 =
    200; in all 1,368 of 8 bytes. Cache of 1,024 tokens at 4 bytes: 2 x 8 x 1024 x 4 + 4 x 12 x 5 + 4 x 3 x 32 = 66,160.
    FLOPs: 2 x 96 + (2 x 480 + 2 x 4 x 32 + 5 x 60) + (2 x 384 + 2 x 16 x 1024) + 2 x 192 = 35,628.
    8 sequences of 6 tokens in 2 s, the median of 5, 1, 2, 9 and 2: 24 tokens a second.
    """
    times = iter([0, 5, 10, 11, 20, 22, 30, 39, 40, 42])
    monkeypatch.setattr(evals, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert evals.size_facts(tiny_model(pattern="M*-"), SIZES) == {
        "parameters": 1368,
        "bytes": 10944,
        "cache_bytes": 66160,
        "flops_per_token": 35628,
        "tokens_per_second": 24,
    }


def test_bytes_of_a_family_by_hand(tmp_path):
    """A model of 4 x 3 weights and 4 biases, 64 bytes of fp32; a router of 2 weights, 8 bytes.

    The larger size has two of its rows and copies of two biases: 8 bytes more; the smaller one a row and its bias, no
    byte more. So the family takes 64 + 8 + 8, apart they would take 32 + 16. Files are as long as safetensors writes them.
    """
    model, router = torch.nn.Linear(3, 4), torch.nn.Linear(1, 1)
    larger, smaller = torch.nn.Linear(3, 2), torch.nn.Linear(3, 1)
    larger.weight, larger.bias = torch.nn.Parameter(model.weight.data[:2]), torch.nn.Parameter(model.bias.data[:2].clone())
    smaller.weight, smaller.bias = torch.nn.Parameter(model.weight.data[:1]), torch.nn.Parameter(model.bias.data[:1])
    found = evals.family_bytes(model, router, [smaller, larger])

    def file_bytes(network):
        safetensors.torch.save_file({k: v.clone() for k, v in network.state_dict().items()}, tmp_path / "file")
        return (tmp_path / "file").stat().st_size

    assert found == {
        "family_file": file_bytes(model) + file_bytes(router), "separate_files": file_bytes(larger) + file_bytes(smaller),
        "family_memory": 80, "separate_memory": 48, "router_parameters": 2}  # fmt: skip
