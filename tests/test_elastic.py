"""Elastic models by two routes (masked and sliced, table and count, expectation and enumeration), and by hand.

A tiny fp64 model runs everywhere. `settings` gives it odd widths to choose from; `Size` is a random model with a random
choice of what is active. The program, its runs and what they leave behind are in test_elastic_runs.py.
"""

import copy
import functools
import itertools
import math
import re
import weakref
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import elastic
import importance
import kernels
import nested
import routers
from elastic import Distillation, Elastic
from importance import Ranking
from model import Block, HybridLM
from nested import Units, Widths
from routers import Costs, Router, Space
from system import parallel
from system.config import ElasticConfig, ParallelConfig
from system.costs import count_parameters, part_cache_bytes, part_flops, part_parameters, sum_of_parts
from system.presets import PRESETS

CPU = torch.device("cpu")
EXACT = {"rtol": 1e-9, "atol": 1e-10}
CHOICES = {"d_model_choices": (8, 6, 5, 3), "ffn_choices": (12, 7, 5, 1), "mamba_channel_choices": (3, 2, 1)}
AXES = ("ffn", "mamba_heads", "mamba_channels", "attn_heads")
VARIANTS = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "swiglu": {"ffn": "swiglu"},
    "qk_norm": {"qk_norm": True},
    "rope": {"rope_theta": 100.0},
    "biases": {"qkv_bias": True},
    "one group": {"mamba_groups": 1, "n_kv_heads": 1},
    "four groups": {"mamba_heads": 8, "mamba_groups": 4, "n_heads": 8, "n_kv_heads": 4},
    "epsilon 1": {"norm_eps": 1.0},
}
TOKENS_BT = torch.randint(12, (2, 11), generator=torch.Generator().manual_seed(0))
PACKED_BT = torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [1] + [2]])


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def settings(**changes):
    """Odd widths, a small router, and what the test changes."""
    return ElasticConfig(**CHOICES | {"router_width": 8, "depth_choices": (5, 4, 3)} | changes)


def make_router(model, depth_order=None, **changes) -> Router:
    return routers.build_router(model.config, settings(**changes), depth_order or list(range(len(model.layers))), CPU)


def random_weights(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits_inside(model, inside, tokens_BT=TOKENS_BT, ids_BT=None):
    hidden_BTd, _ = model(tokens_BT, ids_BT=ids_BT, inside=inside)
    return F.linear(hidden_BTd, model.output_matrix[:, : hidden_BTd.shape[-1]])


def by_masks(model, widths, tokens_BT=TOKENS_BT, ids_BT=None):
    """Logits of the full-size model in which only some units are active."""
    inside = nested.masked_inside(model.config, nested.hard_masks(model.config, widths))
    return logits_inside(model, inside, tokens_BT, ids_BT)


def by_slices(model, widths, tokens_BT=TOKENS_BT, ids_BT=None):
    """Logits of the small model, made of slices of the full one's weights."""
    return logits_inside(model, nested.cut_inside(model.config, widths), tokens_BT, ids_BT)


def gradients(model, logits):
    """Of a random linear function of the logits, for every weight by its name."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    scalar = (logits * random_weights(logits.shape)).sum()
    return dict(zip(names, torch.autograd.grad(scalar, parameters, materialize_grads=True), strict=True))


@st.composite
def choices(draw, space):
    """For every decision of a space, one of its widths."""
    return {
        a: draw(st.lists(st.integers(0, len(w) - 1), min_size=space.n_decisions(a), max_size=space.n_decisions(a)))
        for a, w in space.choices.items()
    }


@dataclass
class Size:
    """A model and what of it is active."""

    variant: str
    model: HybridLM
    space: Space
    choice: routers.Choice
    depth_order: list[int]
    ids_BT: torch.Tensor | None

    @property
    def widths(self) -> Widths:
        return self.space.widths(self.choice, self.depth_order)

    def __repr__(self):
        return f"{self.variant}: {self.widths}, packed {self.ids_BT is not None}"


@st.composite
def sizes(draw):
    """Any variant, any order of the layers, choices shared by all layers of a kind or one for each."""
    variant = draw(st.sampled_from(sorted(VARIANTS)))
    model = tiny_model(**VARIANTS[variant])
    space = Space(model.config, settings(heterogeneous=draw(st.sampled_from([(), AXES, ("ffn", "mamba_heads")]))))
    depth_order = draw(st.permutations(range(5)))
    return Size(variant, model, space, draw(choices(space)), depth_order, draw(st.sampled_from([None, PACKED_BT])))


# ------------------------------------------------------------------------------------------------------------- order


def plain_model(**changes):
    """Tokens 0 and 1 are (1, 1) and (1, -1), of root mean square 1; no layer writes, so every norm reads just these."""
    model = tiny_model(vocab_size=2, d_model=2, norm_eps=1e-15, tie_embeddings=False, **changes)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.data.fill_(1.0)
        elif name.endswith(nested.WRITERS):
            p.data.zero_()
    model.embed.weight.data = f64([1, 1], [1, -1])
    return model


def scores(model, axis, score, *args):
    sums = importance.activation_sums(model, [{"tokens_BT": torch.tensor([[0, 1]]), "ids_BT": None}])
    return importance.SCORES[axis][score](model, sums, *args)


def test_scores_of_the_stream_by_hand():
    """|x| is 1 at both tokens. Norms weigh the channels by (1, 2), (1, 1) and, the last one, (3, 1).

    paper (eq. 1): 2 (1 + 1 + 3) = 10 and 2 (2 + 1 + 1) = 8. output: the columns that read them have norms (0, 10) in q (k
    and v are 0), (1, 1) in the FFN and (5, 0) in the head: 2 (0 + 1 + 15) = 32 and 2 (20 + 1 + 0) = 42.
    """
    model = plain_model(pattern="*-", d_ff=2)
    model.layers[0].norm.weight.data, model.layers[1].norm.weight.data = f64(1, 2), f64(1, 1)
    model.norm.weight.data = f64(3, 1)
    attention, ffn = model.layers[0].mixer, model.layers[1].mixer
    for matrix in (attention.q_proj, attention.k_proj, attention.v_proj):
        matrix.weight.data.zero_()
    attention.q_proj.weight.data[3] = f64(0, 10)
    ffn.up_proj.weight.data = f64([1, 0], [0, 1])
    model.head.weight.data = f64([4, 0], [3, 0])
    assert_close(scores(model, "d_model", "paper"), f64(10, 8))
    assert_close(scores(model, "d_model", "output"), f64(32, 42))


def test_scores_of_ffn_neurons_by_hand():
    """Before the activation the neurons read (1, 1), (2, 0) and (-2, 2) at the two tokens.

    paper (eq. 2): 2, 2 and 4. output: squared ReLU makes (1, 1), (4, 0) and (0, 4), of norms sqrt 2, 4 and 4, times the
    norms of the columns that they write, 5, 1 and 1/2: 7.07, 4 and 2. The two orders are opposite.
    """
    model = plain_model(pattern="*-", d_ff=3)
    model.layers[1].mixer.up_proj.weight.data = f64([1, 0], [1, 1], [0, -2])
    model.layers[1].mixer.down_proj.weight.data = f64([3, 0, 0], [4, 1, 0.5])
    assert_close(scores(model, "ffn", "paper", 1), f64(2, 2, 4))
    assert_close(scores(model, "ffn", "output", 1), f64(5 * math.sqrt(2), 4, 2))


def test_scores_of_mamba_heads_and_channels_by_hand():
    """Two heads of two channels; x reads (1, 1), (3, 1) in the first head and (3, -1), (0, 0) in the second.

    Sums of squares: 2 and 10, then 10 and 0. Channels (eq. 3): sqrt(2 + 10) and sqrt(10 + 0). The better half is channel
    0, so heads (eq. 4) have sqrt 2 and sqrt 10; over both channels the first head would have been the larger.
    """
    model = plain_model(pattern="M", mamba_heads=2, mamba_head_dim=2, mamba_groups=1)
    model.layers[0].mixer.in_proj.weight.data[4:8] = f64([1, 0], [2, 1], [1, 2], [0, 0])
    heads, channels = scores(model, "mamba", "paper", 0)
    assert_close(channels, f64(12, 10).sqrt())
    assert_close(heads, f64(2, 10).sqrt())


def test_scores_of_query_heads_by_hand():
    """Queries are ((1, 2), (1, 0)) in the first head and ((3, 0), (-3, 0)) in the second: sqrt 6 and sqrt 18."""
    model = plain_model(pattern="*", n_heads=2, n_kv_heads=1, attn_head_dim=2)
    model.layers[0].mixer.q_proj.weight.data = f64([1, 0], [1, 1], [0, 3], [0, 0])
    assert_close(scores(model, "attn", "paper", 0), f64(6, 18).sqrt())


def test_scores_of_query_heads_are_those_of_the_function_under_qk_norm():
    """QK-norm takes the size of a head's rows away again, so they may have any: the scores stay, as the logits do."""
    model, found = tiny_model(qk_norm=True, norm_eps=1e-15), []
    attention, batch = model.layers[3].mixer, {"tokens_BT": TOKENS_BT, "ids_BT": PACKED_BT}
    for size in (1.0, 100.0):
        attention.q_proj.weight.data[:4] *= size  # of the first head
        score = importance.SCORES["attn"]["paper"](model, importance.activation_sums(model, [batch]), 3)
        found.append((score, model.logits(model(TOKENS_BT)[0])))
    assert_close(*found, **EXACT)


@pytest.mark.parametrize(
    ("i", "matrix", "score"), [(0, "out_proj", "mamba"), (1, "down_proj", "ffn"), (3, "o_proj", "attn")]
)
def test_output_scores_are_the_size_of_what_each_unit_adds_to_the_stream(i, matrix, score):
    """Every product of an input of the matrix and its column is written out, token by token."""
    model, seen = tiny_model(), []
    writer = getattr(model.layers[i].mixer, matrix)
    hook = writer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = {"tokens_BT": TOKENS_BT, "ids_BT": PACKED_BT}
    found = importance.SCORES[score]["output"](model, importance.activation_sums(model, [batch]), i)
    hook.remove()
    square = torch.einsum("bti,di->btid", seen[0], writer.weight).square().sum((0, 1, 3))
    if score == "ffn":
        expected = square.sqrt()
    elif score == "attn":
        expected = square.view(4, 4).sum(1).sqrt()
    else:
        channels = square.view(4, 3).sum(0).sqrt()
        best = channels.argsort(descending=True)[:2]
        expected = square.view(4, 3)[:, best].sum(1).sqrt(), channels
    assert_close(found, expected, **EXACT)


def test_units_with_the_largest_scores_come_first():
    """By the FFN neurons above, of scores (2, 2, 4) and (7.07, 4, 2): equal ones stay in their order."""
    model = plain_model(pattern="*-", d_ff=3)
    model.layers[1].mixer.up_proj.weight.data = f64([1, 0], [1, 1], [0, -2])
    model.layers[1].mixer.down_proj.weight.data = f64([3, 0, 0], [4, 1, 0.5])
    batch = [{"tokens_BT": torch.tensor([[0, 1]]), "ids_BT": None}]
    for kind, order in (("paper", [2, 0, 1]), ("output", [0, 1, 2])):
        assert importance.rank(model, batch, ElasticConfig(score_ffn=kind)).units.layers[1]["F"].tolist() == order


def test_scores_add_up_over_batches():
    model = tiny_model()
    batches = [{"tokens_BT": TOKENS_BT[i : i + 1], "ids_BT": PACKED_BT[i : i + 1]} for i in range(2)]
    whole = importance.activation_sums(model, [{"tokens_BT": TOKENS_BT, "ids_BT": PACKED_BT}])
    assert_close(importance.activation_sums(model, batches), whole, **EXACT)


def ranked(model, kind):
    """A ranking with every score of that kind."""
    c = ElasticConfig(**{f"score_{name}": kind for name in ("d_model", "ffn", "mamba", "attn")})
    return importance.rank(model, [{"tokens_BT": TOKENS_BT, "ids_BT": PACKED_BT}], c)


@pytest.mark.parametrize("kind", ["paper", "output", "random"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ordering_permutes_the_weights_and_leaves_the_logits(variant, kind):
    model = tiny_model(**VARIANTS[variant])
    ordered = copy.deepcopy(model)
    importance.order_weights(ordered, ranked(model, kind))
    for (name, before), after in zip(model.named_parameters(), ordered.parameters(), strict=True):
        assert_close(after.flatten().sort()[0], before.flatten().sort()[0], rtol=0, atol=0)
        if name.endswith(("in_proj.weight", "up_proj.weight", "q_proj.weight", "embed.weight")):
            assert not torch.equal(after, before)
    logits = [m.logits(m(TOKENS_BT, ids_BT=PACKED_BT)[0]) for m in (model, ordered)]
    assert_close(*logits, **EXACT)


def ranked_by_axes(model):
    """The default ranking: the stream turned onto its principal axes."""
    return importance.rank(model, [{"tokens_BT": TOKENS_BT, "ids_BT": PACKED_BT}], ElasticConfig())


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "tied"])
def test_principal_axes_turn_the_stream_and_leave_the_logits(variant):
    """Over all that norms read, each token at length 1, the turned stream's channels are uncorrelated and fall in size."""
    model = tiny_model(**VARIANTS[variant] | {"tie_embeddings": False})
    turned, seen = copy.deepcopy(model), []
    importance.order_weights(turned, ranked_by_axes(model))
    for norm in [*(block.norm for block in turned.layers), turned.norm]:
        assert_close(norm.weight, torch.ones_like(norm.weight), rtol=0, atol=0)
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    logits = [m.logits(m(TOKENS_BT, ids_BT=PACKED_BT)[0]) for m in (model, turned)]
    assert_close(*logits, **EXACT)
    x_TD = torch.cat(seen)
    x_TD = x_TD / (x_TD.square().mean(1, keepdim=True) + model.config.norm_eps).sqrt()
    together_DD = x_TD.T @ x_TD
    sizes = together_DD.diagonal()
    assert (sizes.diff() <= 1e-9).all()
    assert sizes[0] > 2 * sizes[-1]
    assert_close(together_DD, torch.diag(sizes), **EXACT)


def test_a_stream_of_two_dimensions_is_in_the_first_two_channels():
    """Layers that write nothing, and embeddings in a plane of the eight dimensions: two turned channels say it all. Their
    mean square is four times that of all eight, so the norm gives half as much."""
    model = tiny_model(tie_embeddings=False, norm_eps=1e-30)
    for block in model.layers:
        for name, p in block.mixer.named_parameters():
            if f"mixer.{name}" in nested.WRITERS:
                p.data.zero_()
    plane = torch.randn(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.embed.weight.data = model.embed.weight[:, :2] @ plane
    wanted = model.logits(model(TOKENS_BT)[0])
    importance.order_weights(model, ranked_by_axes(model))
    small = nested.submodel(model, replace(nested.full_widths(model.config), d_model=2))
    assert_close(2 * small.logits(small(TOKENS_BT)[0]), wanted, **EXACT)


def test_tied_embeddings_cannot_be_turned():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"score_d_model \(pca\) .* tied embeddings .* choose paper or output"):
        importance.order_weights(model, ranked_by_axes(model))


@pytest.mark.parametrize("kind", ["paper", "output"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_ordered_model_is_ranked_as_it_stands(variant, kind):
    """The best unit of every axis is the first one, of every group for heads: so every prefix holds the best."""
    model = tiny_model(**VARIANTS[variant])
    importance.order_weights(model, ranked(model, kind))
    units = ranked(model, kind).units
    for index in [units.d_model, *(index for layer in units.layers for index in layer.values())]:
        assert index.tolist() == list(range(len(index)))


@pytest.mark.parametrize("kind", ["paper", "output", "random"])
def test_heads_are_ranked_within_their_groups(kind):
    """Eight heads in four groups, two each: positions 2 g and 2 g + 1 stay with group g."""
    units = ranked(tiny_model(**VARIANTS["four groups"]), kind).units
    heads = [layer["H"] for layer in units.layers if "H" in layer]
    assert len(heads) == 3
    for index in heads:
        assert index.sort()[0].tolist() == list(range(8))
        assert (index // 2).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_channels_of_all_heads_take_one_order_by_hand():
    """Heads (1, 0) and channels (2, 0, 1): head 1's rows 5, 3, 4 of x come first, then head 0's rows 2, 0, 1.

    in_proj holds z and x of six rows each, B and C of ten, dt of two; the column order of the stream is (1, 0, 2, ..., 7).
    """
    model = tiny_model(pattern="M", mamba_heads=2, mamba_groups=1)
    before = copy.deepcopy(model)
    stream, i = torch.tensor([1, 0, *range(2, 8)]), torch.tensor([5, 3, 4, 2, 0, 1])
    units = Units(stream, [{"H": torch.tensor([1, 0]), "P": torch.tensor([2, 0, 1])}])
    importance.order_weights(model, Ranking(units, [0]))
    rows = torch.cat([i, 6 + i, torch.arange(12, 22), torch.tensor([23, 22])])
    old, new = before.layers[0].mixer, model.layers[0].mixer
    assert_close(new.in_proj.weight, old.in_proj.weight[rows][:, stream], rtol=0, atol=0)
    assert_close(new.out_proj.weight, old.out_proj.weight[:, i][stream], rtol=0, atol=0)
    assert_close(new.conv_weight, old.conv_weight[torch.cat([i, torch.arange(6, 16)])], rtol=0, atol=0)
    assert_close(new.A_log, old.A_log[[1, 0]], rtol=0, atol=0)


@pytest.mark.parametrize("axis", importance.SCORES)
def test_an_unknown_score_is_refused_with_those_that_are_known(axis):
    c = ElasticConfig(**{f"score_{axis}": "activation"})
    known = ", ".join([*importance.SCORES[axis], "random"])
    with pytest.raises(ValueError, match=rf"elastic.score_{axis} \('activation'\) is unknown; choose one of {known}"):
        importance.rank(tiny_model(), [], c)


def test_a_random_order_depends_on_the_seed_alone():
    model, batch = tiny_model(), [{"tokens_BT": TOKENS_BT, "ids_BT": None}]
    names = ("d_model", "ffn", "mamba", "attn", "depth")
    c = ElasticConfig(**{f"score_{name}": "random" for name in names}, depth_choices=(5, 4))
    first, again, other = (importance.rank(model, batch, c, seed) for seed in (3, 3, 4))
    assert_close(first.units.d_model, again.units.d_model)
    assert first.depth == again.depth
    assert not torch.equal(first.units.d_model, other.units.d_model)


def test_layers_are_ranked_only_where_some_can_go(monkeypatch):
    """In the order of the model they stay elsewhere, without a pass for each."""
    monkeypatch.setattr(importance, "rank_layers", lambda *_: [4, 3, 2, 1, 0])
    batches = [{"tokens_BT": TOKENS_BT, "ids_BT": None}]
    for depths, order in (((), [0, 1, 2, 3, 4]), ((5,), [0, 1, 2, 3, 4]), ((5, 4), [4, 3, 2, 1, 0])):
        assert importance.rank(tiny_model(), batches, ElasticConfig(depth_choices=depths)).depth == order


@pytest.mark.parametrize("ranked", [[0, 1, 2, 3], [2, 0, 1, 3], [1, 3, 2, 0], [1, 3, 0, 2]])
def test_the_last_layer_to_go_mixes_tokens(monkeypatch, ranked):
    """A model of feed-forward layers alone could not read its context; the rest of the order stays."""
    monkeypatch.setattr(importance, "rank_layers", lambda *_: ranked)
    model, batches = tiny_model(pattern="M-*-"), [{"tokens_BT": TOKENS_BT, "ids_BT": None}]
    depth = importance.rank(model, batches, ElasticConfig(depth_choices=(4, 1))).depth
    best = max((0, 2), key=ranked.index)
    assert depth == [i for i in ranked if i != best] + [best]


# ------------------------------------------------------------------------------------------------- order of the layers


def rank_layers(model, kind):
    with torch.no_grad():
        return importance.rank_layers(model, [{"tokens_BT": TOKENS_BT, "ids_BT": PACKED_BT}], kind, torch.Generator())


@pytest.mark.parametrize("kind", ["paper", "once"])
def test_a_layer_that_writes_nothing_goes_first_and_the_one_that_writes_most_last(kind):
    """What layers write is scaled by 0.01, but by 0 in layer 2 and by 1 in layer 3."""
    model = tiny_model(pattern="-M-*M")
    for i, scale in enumerate([0.01, 0.01, 0.0, 1.0, 0.01]):
        for name, p in model.layers[i].named_parameters():
            p.data.mul_(scale if name in nested.WRITERS else 1.0)
    order = rank_layers(model, kind)
    assert (order[0], order[-1]) == (2, 3)
    assert sorted(order) == [0, 1, 2, 3, 4]


def test_layers_are_sorted_by_equation_5_computed_with_masks():
    """s_j = sum (M - M_-j)^2 / sum M^2 on the logits, layer j removed by gamma_j = 0 instead of leaving it out."""
    model, distance = tiny_model(), []
    full = nested.full_widths(model.config)
    whole = by_slices(model, full, ids_BT=PACKED_BT)
    for j in range(5):
        without = by_masks(model, replace(full, layers=(*full.layers[:j], (), *full.layers[j + 1 :])), ids_BT=PACKED_BT)
        distance.append(float(((whole - without).square().sum() / whole.square().sum()).detach()))
    assert min(abs(a - b) for a, b in itertools.combinations(distance, 2)) > 1e-3
    assert rank_layers(model, "once") == sorted(range(5), key=distance.__getitem__)
    assert rank_layers(model, "paper")[0] == rank_layers(model, "once")[0]


def test_the_papers_order_keeps_one_of_two_layers_that_stand_in_for_each_other():
    """The stream starts as e0. A writes 10 e1, B would write 10.4 e1 but little once A has, C adds 5 e2 to whatever has e1.

    Without A or without B nearly the same comes out; without C the angle is 27 degrees; with neither A nor B all is lost.
    So scored once A and B (and the idle attention) go before C; scored again without the first, C goes before the second.
    """
    model = tiny_model(pattern="*---", d_model=4, d_ff=1, tie_embeddings=False, norm_eps=1e-9)
    for name, p in model.named_parameters():
        p.data.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    model.embed.weight.data[:, 0] = 1.0
    model.embed.weight.data[:, 3] = 0.1 * torch.randn(12, dtype=torch.float64)
    model.head.weight.data.normal_()
    for i, (read, write, size) in enumerate([(0, 1, 2.5), (0, 1, 2.6), (1, 2, 1.25)], start=1):
        model.layers[i].mixer.up_proj.weight.data[0, read] = 1.0
        model.layers[i].mixer.down_proj.weight.data[write, 0] = size
    once, paper = rank_layers(model, "once"), rank_layers(model, "paper")
    assert set(once[:3]) == {0, 1, 2}
    assert once[3] == 3
    assert paper[0] == 0
    assert paper[1] in (1, 2)
    assert paper[2] == 3


@pytest.mark.parametrize("kind", ["paper", "once"])
def test_ranking_layers_keeps_the_logits_of_one_batch_at_a_time(monkeypatch, kind):
    """Those of six batches are made, and at most two of them, the full model's and the changed one's, live at once."""
    model, plain, made, most = tiny_model(), HybridLM.logits, [], 0

    def counted(self, hidden):
        nonlocal most
        logits = plain(self, hidden)
        made.append(weakref.ref(logits))
        most = max(most, sum(r() is not None for r in made))
        return logits

    monkeypatch.setattr(HybridLM, "logits", counted)
    batches = [{"tokens_BT": TOKENS_BT, "ids_BT": None}] * 6
    with torch.no_grad():
        importance.rank_layers(model, batches, kind, torch.Generator())
    assert len(made) > 6
    assert most <= 2


# --------------------------------------------------------------------------------------------- masked, sliced, extracted


@examples(max_examples=50)
@given(sizes())
def test_masked_sliced_and_extracted_models_agree_in_logits_and_in_every_gradient(size):
    model, widths = size.model, size.widths
    masked, sliced = (route(model, widths, ids_BT=size.ids_BT) for route in (by_masks, by_slices))
    assert_close(masked, sliced, **EXACT)
    of_masked, of_sliced = gradients(model, masked), gradients(model, sliced)
    assert_close(of_masked, of_sliced, **EXACT)

    small = nested.submodel(model, widths)
    extracted = small.requires_grad_(True).logits(small(TOKENS_BT, ids_BT=size.ids_BT)[0])
    assert_close(extracted, sliced, **EXACT)
    inside = nested.take(of_sliced, model.config, nested.kept_units(model.config, widths))
    assert_close(gradients(small, extracted), inside, **EXACT)


@examples(max_examples=30)
@given(sizes(), st.sampled_from([[1] * 11, [4, 1, 6], [1, 10]]))
def test_a_submodel_goes_on_from_its_cache_as_in_one_pass(size, pieces):
    small, cache, hidden = nested.submodel(size.model, size.widths), None, []
    for piece_BT in TOKENS_BT.split(pieces, dim=1):
        hidden_BTD, cache = small(piece_BT, cache)
        hidden.append(hidden_BTD)
    assert_close(torch.cat(hidden, dim=1), small(TOKENS_BT)[0], **EXACT)


FULL, HALF = Widths(8, ((4, 3),)), Widths(8, ((2, 2),))  # of a single Mamba layer


@torch.no_grad()
def test_a_smaller_size_goes_on_from_states_that_are_handed_over(make_model):
    """A first Mamba layer reads what both sizes read, so the full one's states hold the smaller one's: nothing is lost.
    The other way the smaller one's lack the rest, which is zero; and back again they are as they were."""
    model = make_model(pattern="M")
    assert nested.full_widths(model.config) == FULL
    small = nested.submodel(model, HALF)
    _, cache = model(TOKENS_BT[:, :6])
    handed = nested.hand_over(cache, model.config, FULL, HALF)
    whole_BTD, own = small(TOKENS_BT)
    assert_close(small(TOKENS_BT[:, 6:], handed)[0], whole_BTD[:, 6:], **EXACT)
    back = nested.hand_over(own, model.config, HALF, FULL)
    assert back.layers[0][1].shape == cache.layers[0][1].shape
    assert (back.layers[0][1] == 0).double().mean() == pytest.approx(1 - 2 / 4 * 2 / 3)
    assert_close(nested.hand_over(back, model.config, FULL, HALF).layers, own.layers, rtol=0, atol=0)


@examples(max_examples=15)
@given(sizes())
@torch.no_grad()
def test_a_cache_handed_over_to_any_size_has_that_sizes_shapes(size):
    full = nested.full_widths(size.model.config)
    small = nested.submodel(size.model, size.widths)
    _, cache = size.model(TOKENS_BT[:, :6])
    if not all(size.widths.layers):
        with pytest.raises(ValueError, match="these sizes keep different layers"):
            nested.hand_over(cache, size.model.config, full, size.widths)
        return
    handed = nested.hand_over(cache, size.model.config, full, size.widths)
    own = small(TOKENS_BT[:, :6])[1]
    assert [[t.shape for t in layer] for layer in handed.layers] == [[t.shape for t in layer] for layer in own.layers]
    same = nested.hand_over(own, size.model.config, size.widths, size.widths)
    assert_close(small(TOKENS_BT[:, 6:], same)[0], small(TOKENS_BT)[0][:, 6:], **EXACT)


@pytest.mark.parametrize(
    "widths",
    [Widths(5, ((2, 3), (12,), (4, 3), (4,), (12,))), Widths(8, ((2, 1), (), (), (), (5,)))],
    ids=["stream", "mamba"],
)
def test_what_is_masked_would_show_without_the_scaled_epsilon(monkeypatch, widths):
    """With an epsilon of 1 the norms of the masked model need it times the active share; as it is, the logits are wrong."""
    model = tiny_model(norm_eps=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(nested, "scale_epsilons", lambda *_: None)
        with_plain_epsilon = by_masks(model, widths)
    assert_close(by_masks(model, widths), by_slices(model, widths), **EXACT)
    assert (with_plain_epsilon - by_slices(model, widths)).abs().max() > 0.01


def test_full_widths_are_the_model_itself():
    model = tiny_model()
    full = nested.full_widths(model.config)
    assert full == Widths(8, ((4, 3), (12,), (4, 3), (4,), (12,)))
    assert_close(by_slices(model, full), model.logits(model(TOKENS_BT)[0]), rtol=0, atol=0)
    assert_close(by_masks(model, full), model.logits(model(TOKENS_BT)[0]), **EXACT)


def test_masked_hidden_states_are_zero_outside_of_the_stream_that_is_kept():
    model = tiny_model()
    masks = nested.hard_masks(model.config, Widths(5, ((2, 2), (7,), (4, 3), (2,), (12,))))
    hidden_BTD, _ = model(TOKENS_BT, inside=nested.masked_inside(model.config, masks))
    assert (hidden_BTD[..., 5:] == 0).all()
    assert (hidden_BTD[..., :5] != 0).all()


def test_units_that_are_kept_by_hand():
    """Two of four heads in two groups are heads 0 and 2; two of their three channels; layers 1 and 3 are gone."""
    units = nested.kept_units(tiny_model().config, Widths(3, ((2, 2), (), (4, 1), (), (5,))))
    assert units.d_model.tolist() == [0, 1, 2]
    assert [u and {a: index.tolist() for a, index in u.items()} for u in units.layers] == [
        {"H": [0, 2], "P": [0, 1]}, None, {"H": [0, 1, 2, 3], "P": [0]}, None, {"F": [0, 1, 2, 3, 4]}]  # fmt: skip


def test_the_shape_of_a_small_model_by_hand():
    small = nested.shrink(tiny_model().config, Widths(3, ((2, 2), (), (4, 1), (2,), (5,))))
    assert (small.pattern, small.d_model, small.widths) == ("MM*-", 3, ((2, 2), (4, 1), (2,), (5,)))
    assert small.layer(0).mamba_heads == 2
    assert small.layer(3).d_ff == 5


def storages(model):
    return {name: p.untyped_storage().data_ptr() for name, p in model.named_parameters()}


def test_a_submodel_shares_memory_wherever_its_units_come_first():
    """All but the rows of Mamba's in_proj and convolution, whose z, x, B, C and dt lie apart."""
    model = tiny_model(**VARIANTS["one group"], tie_embeddings=False)
    small = nested.submodel(model, Widths(5, ((3, 3), (7,), (3, 3), (2,), (5,))))
    shared = {name for name, where in storages(small).items() if where == storages(model)[name]}
    assert storages(small).keys() - shared == {
        f"layers.{i}.mixer.{name}" for i in (0, 2) for name in ("in_proj.weight", "conv_weight", "conv_bias")
    }
    model.embed.weight.data.zero_()
    assert (small.embed.weight == 0).all()
    assert not any(p.requires_grad for p in small.parameters())


def test_heads_of_several_groups_and_cut_channels_are_copies_of_their_own():
    model = tiny_model()
    small = nested.submodel(model, Widths(8, ((2, 2), (12,), (4, 3), (2,), (12,))))
    own = {name for name, where in storages(small).items() if where not in storages(model).values()}
    mamba = ("in_proj.weight", "conv_weight", "conv_bias", "A_log", "D", "dt_bias", "norm_weight", "out_proj.weight")
    assert own == {f"layers.0.mixer.{n}" for n in mamba} | {f"layers.3.mixer.{n}.weight" for n in ("q_proj", "o_proj")}


def under_soft_masks(model, masks, tokens_BT):
    """The model with masks on its activations, where the paper has them; no part of `nested` is used."""
    c, mask_D, x = model.config, masks.d_model, model.embed(tokens_BT) * masks.d_model

    def norm(x, weight_D):
        return weight_D * mask_D * x * torch.rsqrt(x.square().sum(-1, keepdim=True) / mask_D.square().sum() + c.norm_eps)

    for block, m, gamma in zip(model.layers, masks.layers, masks.gamma, strict=True):
        h, mixer = norm(x, block.norm.weight), block.mixer
        if block.kind == "-":
            y = mixer.down_proj(F.relu(mixer.up_proj(h)).square() * m["F"])
        elif block.kind == "*":
            q, k, v = (f(h).unflatten(-1, (-1, c.attn_head_dim)).transpose(1, 2)
                       for f in (mixer.q_proj, mixer.k_proj, mixer.v_proj))  # fmt: skip
            k, v = (t.repeat_interleave(c.n_heads // c.n_kv_heads, 1) for t in (k, v))
            y = F.scaled_dot_product_attention(q * m["H"][:, None, None], k, v, is_causal=True)
            y = mixer.o_proj((y * m["H"][:, None, None]).transpose(1, 2).flatten(2))
        else:
            inside_E = torch.outer(m["H"], m["P"]).flatten()
            z, xbc, dt = mixer.in_proj(h).split(mixer.rows, -1)
            xs, b, cc = kernels.causal_conv(xbc, mixer.conv_weight, mixer.conv_bias, None, None)[0].split(
                mixer.conv_rows, -1
            )
            xs, z = (F.silu(t * inside_E) for t in (xs, z))
            b, cc = (F.silu(t).unflatten(-1, (mixer.n_groups, mixer.d_state)) for t in (b, cc))
            dt = F.softplus(dt * m["H"] + mixer.dt_bias)
            y = kernels.ssd(xs.unflatten(-1, (mixer.n_heads, mixer.head_dim)), dt, -mixer.A_log.exp(), b, cc, mixer.D, None,
                            None, mixer.chunk)[0]  # fmt: skip
            y = (y.flatten(2) * z).unflatten(-1, (mixer.n_groups, -1))
            count_G1 = inside_E.square().view(mixer.n_groups, -1).sum(-1)[:, None]
            y = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) / count_G1 + c.norm_eps)).flatten(-2)
            y = mixer.out_proj(y * mixer.norm_weight)
        x = x + gamma * mask_D * y
    return norm(x, model.norm.weight)


def test_soft_masks_on_weights_are_those_on_activations():
    """Values between 0 and 1 everywhere, heads alike in every group: a mask put on twice, or left out, shows."""
    model, noise = tiny_model(tie_embeddings=False), torch.Generator().manual_seed(0)
    full = nested.hard_masks(model.config, nested.full_widths(model.config))

    def soft(mask):
        return 0.3 + 0.7 * torch.rand(mask.shape, generator=noise, dtype=torch.float64)

    layers = [{axis: soft(mask) for axis, mask in own.items()} for own in full.layers]
    for kind, own in zip(model.config.pattern, layers, strict=True):
        if kind == "M":
            n = model.config.mamba_groups
            own["H"] = own["H"][: len(own["H"]) // n].repeat(n)
    masks = nested.Masks(soft(full.d_model), layers, [soft(gamma) for gamma in full.gamma])
    found, _ = model(TOKENS_BT, inside=nested.masked_inside(model.config, masks))
    assert_close(found, under_soft_masks(model, masks, TOKENS_BT), rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------------------------------- choices and masks


def test_default_choices_of_the_cpu_preset():
    """Eighths of 128 and of 8 heads, 24ths of 384, halves and quarters of channels, heads by group, all six layers."""
    preset = PRESETS["cpu"]
    space = Space(replace(preset.model, vocab_size=1024), preset.elastic)
    assert space.choices == {
        "d_model": (128, 112, 96, 80, 64), "depth": (6,), "ffn": tuple(range(384, 95, -16)),
        "mamba_heads": (8, 7, 6, 5, 4), "mamba_channels": (32, 24, 16), "attn_heads": (4, 2)}  # fmt: skip


@pytest.mark.parametrize("pattern", ["M", "M-M*-"])
def test_all_layers_are_kept_unless_depths_are_given(pattern):
    assert Space(tiny_model(pattern=pattern).config, ElasticConfig()).choices["depth"] == (len(pattern),)


def test_choices_are_sorted_and_axes_without_a_layer_are_left_out():
    space = Space(tiny_model(pattern="*-").config, settings(ffn_choices=(5, 12, 5), depth_choices=()))
    assert space.choices["ffn"] == (12, 5)
    assert space.choices.keys() == {"d_model", "depth", "ffn", "attn_heads"}


@pytest.mark.parametrize(
    ("name", "given_", "message"),
    [
        ("d_model", (8, 9), "elastic.d_model_choices (9) must lie between 1 and the full model's 8"),
        ("ffn", (12, 0), "elastic.ffn_choices (0) must lie between 1 and the full model's 12"),
        ("ffn", (7, 5), "elastic.ffn_choices (7, 5) must contain the full model's 12"),
        ("depth", (4, 3), "elastic.depth_choices (4, 3) must contain the full model's 5"),
        ("mamba_head", (4, 3), "elastic.mamba_head_choices (3) must be a multiple of the number of groups (2)"),
        ("attn_head", (4, 1), "must be a multiple of the number of groups (2), so that all groups keep the same count; "
                              "nearest is 2"),
    ],
)  # fmt: skip
def test_choices_that_do_not_fit_are_refused_by_name(name, given_, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Space(tiny_model().config, settings(**{f"{name}_choices": given_}))


def test_a_parent_that_was_itself_cut_out_is_refused():
    small = nested.shrink(tiny_model().config, Widths(8, ((2, 2), (), (4, 1), (2,), (5,))))
    with pytest.raises(ValueError, match=r"whose layers have widths of their own.*start from its parent"):
        Space(small, ElasticConfig())


@pytest.mark.parametrize("heterogeneous", [(), ("ffn",), AXES])
def test_layers_share_a_decision_unless_their_axis_is_heterogeneous(heterogeneous):
    """M-M*-: two layers have neurons, two have Mamba heads and channels, one has query heads."""
    space = Space(tiny_model().config, settings(heterogeneous=heterogeneous))
    n = {"ffn": 2, "mamba_heads": 2, "mamba_channels": 2, "attn_heads": 1}
    assert {a: space.n_decisions(a) for a in AXES} == {a: n[a] if a in heterogeneous else 1 for a in AXES}
    assert space.n_decisions("d_model") == space.n_decisions("depth") == 1
    choice = space.extreme() | {"ffn": [3, 1][: space.n_decisions("ffn")]}
    widths = space.widths(choice, [0, 1, 2, 3, 4]).layers
    assert [widths[1], widths[4]] == [(1,), (7,) if "ffn" in heterogeneous else (1,)]


def test_a_depth_drops_the_first_layers_of_the_order():
    space = Space(tiny_model().config, settings())
    widths = space.widths(space.extreme() | {"depth": [2]}, [3, 0, 1, 2, 4]).layers
    assert [bool(w) for w in widths] == [False, True, True, False, True]


def test_gamma_is_the_probability_that_a_layer_is_kept_by_hand():
    """Depths 5, 4 and 3 with 1/2, 1/3 and 1/6: the first to go stays with 1/2, the second with 1/2 + 1/3, others always."""
    space = Space(tiny_model().config, settings())
    gamma = space.gamma(f64(1 / 2, 1 / 3, 1 / 6), [3, 0, 1, 2, 4])
    assert_close(torch.stack(gamma), f64(5 / 6, 1, 1, 1 / 2, 1))


def test_soft_masks_are_weighted_sums_of_the_masks_by_hand():
    """Stream 8, 6, 5, 3 with 0.4, 0.3, 0.2, 0.1; heads 4 and 2 (heads 0 and 2, of two groups) with 0.7 and 0.3."""
    space = Space(tiny_model().config, settings())
    p = {a: torch.full((space.n_decisions(a), len(w)), 1 / len(w), dtype=torch.float64) for a, w in space.choices.items()}
    p["d_model"], p["mamba_heads"] = f64([0.4, 0.3, 0.2, 0.1]), f64([0.7, 0.3], [0.2, 0.8])
    masks = space.masks(p, [0, 1, 2, 3, 4])
    assert_close(masks.d_model, f64(1, 1, 1, 0.9, 0.9, 0.7, 0.4, 0.4))
    assert_close(masks.layers[0]["H"], f64(1, 0.7, 1, 0.7))
    assert_close(masks.layers[2]["H"], f64(1, 0.2, 1, 0.2))


def test_the_active_share_of_a_mask_by_hand():
    """Three of four channels are 3/4; a soft mask counts by its square, so (1, 1/2) has (1 + 1/4) / 2."""
    assert_close(nested.share(f64(1, 1, 1, 0)), f64(3 / 4)[0])
    assert_close(nested.share(f64(1, 0.5)), f64(5 / 8)[0])


def one_hot(space, choice):
    return {a: F.one_hot(torch.tensor(choice[a]), len(w)).double() for a, w in space.choices.items()}


@examples(max_examples=30)
@given(sizes())
def test_masks_of_a_certain_choice_are_those_of_its_widths(size):
    """But for what is inside a skipped layer, which gamma = 0 silences."""
    found = size.space.masks(one_hot(size.space, size.choice), size.depth_order)
    expected = nested.hard_masks(size.model.config, size.widths)
    assert_close((found.d_model, found.gamma), (expected.d_model, expected.gamma))
    kept = [i for i, w in enumerate(size.widths.layers) if w]
    assert kept
    assert_close([found.layers[i] for i in kept], [expected.layers[i] for i in kept])


# ------------------------------------------------------------------------------------------------------------- costs


@functools.cache
def tiny_family(cost="parameters", heterogeneous=AXES):
    """A router of the tiny model, made once."""
    return make_router(tiny_model(), [3, 0, 1, 2, 4], cost=cost, heterogeneous=heterogeneous, cost_len=10, cost_batch=3)


@pytest.mark.parametrize("heterogeneous", [AXES, ()], ids=["heterogeneous", "homogeneous"])
@given(data=st.data())
def test_exact_cost_is_the_count_of_the_submodels_parameters(heterogeneous, data):
    router = tiny_family(heterogeneous=heterogeneous)
    choice = data.draw(choices(router.space))
    small = nested.submodel(tiny_model(), router.space.widths(choice, router.depth_order))
    assert router.costs.exact(choice, router.depth_order) == count_parameters(small)


@pytest.mark.parametrize("cost", ["parameters", "memory", "flops"])
@examples(max_examples=20)
@given(data=st.data())
def test_exact_cost_is_the_cost_of_the_small_models_shape(cost, data):
    router = tiny_family(cost)
    choice = data.draw(choices(router.space))
    shape = nested.shrink(router.space.config, router.space.widths(choice, router.depth_order))
    expected = sum_of_parts(routers.cost_measure(router.settings, CPU), shape)
    assert router.costs.exact(choice, router.depth_order) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("heterogeneous", [AXES, ()], ids=["heterogeneous", "homogeneous"])
@examples(max_examples=30)
@given(data=st.data())
def test_a_change_of_some_decisions_costs_what_their_layers_cost_more(heterogeneous, data):
    """Of layers that are gone nothing, of a layer with two of the decisions once."""
    router = tiny_family(heterogeneous=heterogeneous)
    before, other = data.draw(choices(router.space)), data.draw(choices(router.space))
    pairs = data.draw(st.sets(st.sampled_from([(a, j) for a in routers.KIND_OF for j in range(len(before[a]))])))
    after = {a: [other[a][j] if (a, j) in pairs else k for j, k in enumerate(v)] for a, v in before.items()}
    price = router.costs.pricer(router.depth_order)
    assert price(after, pairs) - price(before, pairs) == price(after) - price(before)


@examples(max_examples=30)
@given(st.data())
def test_expected_cost_of_a_certain_choice_is_its_exact_cost(data):
    router = tiny_family()
    choice = data.draw(choices(router.space))
    expected = router.costs.expected(one_hot(router.space, choice), router.depth_order)
    assert float(expected) == pytest.approx(router.costs.exact(choice, router.depth_order), rel=1e-12)


@pytest.mark.parametrize("heterogeneous", [AXES, ()], ids=["heterogeneous", "homogeneous"])
def test_expected_cost_is_the_mean_over_all_choices(heterogeneous):
    """M-*-, two widths on every axis: all 128 (or 64) choices, each with the product of its probabilities."""
    two = {"d_model_choices": (8, 5), "ffn_choices": (12, 7), "mamba_channel_choices": (3, 1), "depth_choices": (4, 3)}
    router = make_router(tiny_model(pattern="M-*-"), [2, 0, 1, 3], heterogeneous=heterogeneous, **two)
    space, order = router.space, router.depth_order
    p = {a: random_weights((space.n_decisions(a), len(w))).softmax(-1) for a, w in space.choices.items()}
    decisions = [(a, j) for a in p for j in range(len(p[a]))]
    mean, n = 0.0, 0
    for picked in itertools.product((0, 1), repeat=len(decisions)):
        choice = {a: [0] * len(p[a]) for a in p}
        for (a, j), k in zip(decisions, picked, strict=True):
            choice[a][j] = k
        probability = math.prod(float(p[a][j, k]) for (a, j), k in zip(decisions, picked, strict=True))
        mean, n = mean + probability * router.costs.exact(choice, order), n + 1
    assert n == (128 if heterogeneous else 64)
    assert float(router.costs.expected(p, order)) == pytest.approx(mean, rel=1e-12)


def test_memory_of_a_layer_by_hand():
    """Three sequences of ten tokens, two bytes a number.

    Attention: 128 + 64 + 64 + 128 + 8 weights; keys and values are 2 x 2 heads x 4 channels x 10 tokens a sequence:
    392 x 2 + 3 x 160 x 2 = 1744. Mamba: E = 12 + 20 convolution channels; 48 x 8 (in) + 32 x 4 + 32 (convolution) + 3 x 4
    + 12 + 12 x 8 (out) + 8 = 672 weights; a state of 12 x 5 in four bytes and 3 x 32 taps in two:
    672 x 2 + 3 (240 + 192) = 2640. The FFN keeps nothing: (2 x 96 + 8) x 2 = 400.
    """
    measure = routers.cost_measure(settings(cost="memory", cost_batch=3, cost_len=10), CPU)
    config = tiny_model().config
    assert [measure(kind, config) for kind in "*M-"] == [1744, 2640, 400]
    assert part_cache_bytes("", config, 10, 2) == 0


def test_flops_of_a_layer_by_hand():
    """A sequence of ten tokens; numbers a token.

    Attention: 2 x 384 for the matrices; scores and values 4 x 4 channels x 4 heads x 10 / 2 seen: 768 + 320 = 1088.
    Mamba: 2 x 480 + 2 x 4 taps x 32 + 5 x 60 = 1516. FFN: 2 x 192. The head: 2 x 12 x 8.
    """
    config = tiny_model().config
    assert [part_flops(kind, config, 10) for kind in ("*", "M", "-", "")] == [1088, 1516, 384, 192]


@pytest.mark.parametrize(("kind", "extra"), [("-", 0), ("*", 2 * 4 * 4 * 64), ("M", 2 * 4 * 32 + 5 * 12 * 5)])
def test_flops_of_matrices_are_those_that_torch_counts(kind, extra):
    """On 64 tokens. `extra` is what no matrix of weights does, see above; torch counts it for attention, without the mask
    that hides half of it.
    """
    block, x_BTD = Block(kind, tiny_model().config), torch.randn(1, 64, 8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        block(x_BTD, None, None)
    counted = counter.get_flop_counts()["Global"]
    assert counted[torch.ops.aten.mm] / 64 == part_flops(kind, block_config(kind), 64) - extra
    if kind == "*":
        assert counted[torch.ops.aten.bmm] / 64 == 2 * extra


def block_config(kind):
    return tiny_model(pattern="M" + kind).config


@pytest.mark.parametrize("cost", ["parameters", "memory", "flops"])
def test_costs_fall_with_every_width(cost):
    costs = tiny_family(cost).costs
    assert (costs.outside.diff() < 0).all()
    for table in (costs.ffn, costs.attention, costs.mamba):
        assert (table > 0).all()
        assert all((table.diff(dim=d) < 0).all() for d in range(table.dim()))


def test_latency_is_measured_for_every_shape():
    """Nanoseconds, positive."""
    c = settings(cost="latency", cost_batch=1, d_model_choices=(8, 5), ffn_choices=(12, 7), mamba_channel_choices=(3, 1))
    costs = Costs(Space(tiny_model().config, c), routers.cost_measure(c, CPU))
    for table, shape in ((costs.outside, [2]), (costs.ffn, [2, 2]), (costs.attention, [2, 2]), (costs.mamba, [2, 2, 2])):
        assert list(table.shape) == shape
        assert ((table > 0) & (table < 1e9)).all()


@pytest.mark.parametrize("kind", ["M", "*", "-"])
def test_latency_is_that_of_a_token_read_and_of_one_generated(monkeypatch, kind):
    """On a clock that only running moves: 128 ns for the two rows' 64 tokens, 100 for one token from their cache."""
    clock, plain, seen = [0.0], Block.forward, []

    def forward(self, x_BTD, cached, context):
        left = plain(self, x_BTD, cached, context)
        clock[0] += (128e-9, 100e-9)[x_BTD.shape[1] == 1]
        seen.append((x_BTD.shape[1], bool(cached)))
        return left

    monkeypatch.setattr(Block, "forward", forward)
    monkeypatch.setattr(routers.time, "perf_counter", lambda: clock[0])
    found = routers.part_latency_ns.__wrapped__(kind, tiny_model().config, 2, CPU)
    assert found == pytest.approx(128 / 128 + 100 / 2)
    assert seen == [(64, False)] * 9 + [(1, kind != "-")] * 8


def test_latency_is_the_median_of_seven_runs_after_the_first(monkeypatch):
    """Of 50, 9, 1, 8, 2, 7, 3, 4 ns: 4, for 128 tokens and for 2."""
    clock, plain, times = [0.0], Block.forward, itertools.cycle([50, 9, 1, 8, 2, 7, 3, 4])

    def forward(self, x_BTD, cached, context):
        clock[0] += next(times) * 1e-9
        return plain(self, x_BTD, cached, context)

    monkeypatch.setattr(Block, "forward", forward)
    monkeypatch.setattr(routers.time, "perf_counter", lambda: clock[0])
    found = routers.part_latency_ns.__wrapped__("-", tiny_model().config, 2, CPU)
    assert found == pytest.approx(4 / 128 + 4 / 2)


def test_a_wider_part_never_costs_less_whatever_the_clock_says():
    """The measure below gives every narrower part a longer time; each then costs as much as the dearest that it holds."""
    c = settings(d_model_choices=(8, 5), ffn_choices=(12, 7), mamba_channel_choices=(3, 1))
    costs = Costs(Space(tiny_model().config, c), lambda kind, shape: 1e6 / (shape.d_model * shape.d_ff))
    assert_close(costs.ffn, torch.full_like(costs.ffn, 1e6 / (5 * 7)))


@pytest.mark.parametrize("d_ff", [12, 60])
def test_the_narrowest_order_drops_the_dearest_layers_first(d_ff):
    """Of the pattern M-M*- at its smallest choices: no order that keeps three layers has a cheaper smallest model. Of 60
    channels an FFN is the dearest layer at its largest, and not at its smallest, of one."""
    model = tiny_model(d_ff=d_ff)
    costs = routers.build_router(model.config, settings(ffn_choices=(d_ff, 1)), None, CPU).costs
    choice = costs.space.extreme(smallest=True)
    orders = itertools.permutations(range(5))
    assert costs.exact(choice, costs.dearest_first()) == min(costs.exact(choice, list(order)) for order in orders)


def test_parts_add_up_to_the_parameters_of_the_model():
    config = tiny_model(tie_embeddings=False).config
    parts = sum(part_parameters(kind, config) for kind in ["", *config.pattern])
    assert parts == count_parameters(tiny_model(tie_embeddings=False))


# ----------------------------------------------------------------------------------------------------------- routers


@functools.cache
def cpu_router() -> Router:
    """Of the cpu preset's shape with its 1024 tokens, made once."""
    preset = PRESETS["cpu"]
    return routers.build_router(replace(preset.model, vocab_size=1024), preset.elastic, [4, 0, 3, 1, 2, 5], CPU)


def test_routers_start_with_a_head_start_for_the_largest_widths():
    """With a head start of b logits, of n widths the largest has e^b / (e^b + n - 1)."""
    start = math.exp(PRESETS["cpu"].elastic.router_bias)
    assert start > 1
    for budget in (0.75, 0.6, 0.5):
        for axis, logits in cpu_router()(budget).items():
            n = len(cpu_router().space.choices[axis])
            assert logits.shape == (cpu_router().space.n_decisions(axis), n)
            assert_close(logits.softmax(-1)[:, 0], torch.full((len(logits),), start / (start + n - 1)))


def test_routers_take_less_than_two_per_cent_of_the_parameters():
    assert count_parameters(cpu_router()) < 0.02 * cpu_router().full_cost


def test_routers_are_two_layers_with_a_leaky_relu_between_them():
    router = make_router(tiny_model())
    first, _, last = router.mlps["ffn"]
    last.weight.data.normal_()
    x = torch.tensor([0.0, 0.4, 0.6])
    h = first.weight @ x + first.bias
    expected = last.weight @ torch.where(h > 0, h, 0.1 * h) + last.bias
    assert_close(router(0.6)["ffn"], expected.view(2, 4))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1.0, [1, 0, 0]), (0.75, [0, 1, 0]), (0.5, [0, 0, 1]), (0.6, [0, 0.4, 0.6]), (0.95, [0.8, 0.2, 0])],
)
def test_a_budget_is_one_hot_or_a_mixture_of_its_neighbours_by_hand(budget, expected):
    """0.6 lies 0.1 above 0.5 and 0.15 below 0.75: 0.1 / 0.25 = 0.4 of the larger."""
    assert_close(make_router(tiny_model()).one_hot(budget), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("budget", [0.49, 0.0, -1.0, 1e9])
def test_an_unknown_budget_is_refused_with_those_that_are_known(budget):
    with pytest.raises(ValueError, match=r"budget \(.*\) is unknown.* 1, 0.75, 0.5 of the full parameters.*choose one of"):
        make_router(tiny_model()).choose(budget)


def test_the_whole_model_is_refused_where_it_was_not_trained():
    router = make_router(tiny_model(), budgets=(0.75, 0.5), long_weights=(1, 1))
    with pytest.raises(ValueError, match=r"budget \(1\) is unknown"):
        router.choose(1.0)
    assert router.choose(0.75)


def test_absolute_budgets_are_fractions_of_the_full_cost():
    full = count_parameters(tiny_model())
    absolute = make_router(tiny_model(), budgets=(float(full), 0.75 * full, 0.5 * full))
    relative = make_router(tiny_model())
    assert absolute.full_cost == full
    assert [absolute.is_full(b) for b in absolute.settings.budgets] == [True, False, False]
    assert_close(absolute.one_hot(0.6 * full), relative.one_hot(0.6))
    assert absolute.choose(0.6 * full) == absolute.choose(0.6) == relative.choose(0.6)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ((1.0, 0.01), r"elastic.budgets \(0.01\) is below the smallest model that the choices can make: .*"
                      r"raise it, or give smaller choices"),
        ((10.0**6, 1000.0), r"elastic.budgets \(1e\+06\) is more than the full model's 2\d+ parameters; lower it"),
        ((2000.0, 2.0), r"elastic.budgets \(2\) is below the smallest"),
    ],
)  # fmt: skip
def test_budgets_out_of_reach_are_refused(budgets, message):
    with pytest.raises(ValueError, match=message):
        make_router(tiny_model(), budgets=budgets, long_weights=(1, 1))


COARSE = {"d_model_choices": (8, 4), "depth_choices": (5,), "ffn_choices": (12,), "mamba_head_choices": (4,),
          "mamba_channel_choices": (3,), "attn_head_choices": (4,)}  # fmt: skip


def test_a_budget_that_no_choice_comes_near_is_refused_with_the_nearest():
    """With the stream as the only axis a model has all or about half of the parameters."""
    half = make_router(tiny_model(), **COARSE, budgets=(1.0,), long_weights=(1,))
    cost = half.costs.exact(half.space.extreme(smallest=True), half.depth_order) / half.full_cost
    router = make_router(tiny_model(), **COARSE, budgets=(1.0, cost), long_weights=(1, 1))
    assert router.choose(cost).d_model == 4
    with pytest.raises(
        ValueError, match=rf"budget \(0.8\) cannot be met within 2 %: .* has (1.0000|{cost:.4f}) of the full"
    ):
        router.choose(0.8)
    assert router.choose(0.8, or_none=True) is None
    assert router.choose(cost, or_none=True).d_model == 4
    with pytest.raises(ValueError, match=r"budget \(0.8\) cannot be met"):
        make_router(tiny_model(), **COARSE, budgets=(1.0, 0.8), long_weights=(1, 1))


def test_the_full_model_must_train_where_it_teaches():
    """An absolute budget may say so too."""
    full = float(count_parameters(tiny_model()))
    make_router(tiny_model(), self_kl=1.0, budgets=(full, 0.5 * full), long_weights=(1, 1))
    for budgets, remedy in (((0.9, 0.5), "begin them with 1,"), ((0.9 * full, 0.5 * full), f"begin them with {full:.0f},")):
        with pytest.raises(ValueError, match=r"elastic.self_kl \(0.5\) makes the full model a teacher.*" + remedy):
            make_router(tiny_model(), self_kl=0.5, budgets=budgets, long_weights=(1, 1))


@functools.cache
def noise_like(space, seed):
    generator = torch.Generator().manual_seed(seed)
    return {a: torch.randn(space.n_decisions(a), len(w), generator=generator) for a, w in space.choices.items()}


@pytest.mark.parametrize(("scale", "tau"), [(1.0, 1.0), (10.0, 0.05)])
def test_probabilities_are_softmax_of_scaled_and_noisy_logits(scale, tau):
    router = tiny_family()
    logits, noise = router(0.5), noise_like(router.space, 0)
    for axis, p in routers.probabilities(logits, noise, scale, tau).items():
        weight = torch.exp((scale * logits[axis] + noise[axis]).double() / tau)
        assert_close(p.double(), weight / weight.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
        assert_close(p.sum(-1), torch.ones(len(p)))


def test_each_mode_weighs_the_masks_as_it_says():
    """p = (0.2, 0.5, 0.3): soft keeps it, top1 keeps 0.5 at the likeliest, straight-through puts 1 there.

    With L = w . weighting, the gradient in p is w for soft and straight-through, and w at the likeliest for top1.
    """
    w = f64(3, 5, 7)
    values = {"soft": f64(0.2, 0.5, 0.3), "top1": f64(0, 0.5, 0), "straight-through": f64(0, 1, 0)}
    slopes = {"soft": w, "top1": f64(0, 5, 0), "straight-through": w}
    for mode, value in values.items():
        p = f64([0.2, 0.5, 0.3]).requires_grad_()
        weighting = routers.mask_weighting({"ffn": p}, mode)["ffn"]
        assert_close(weighting[0], value)
        (weighting[0] @ w).backward()
        assert_close(p.grad[0], slopes[mode])


def test_budget_loss_by_hand():
    """At the full model the cost is 1 / b of the budget: for one half it is off by 1, less the dead zone of 0.01."""
    router = tiny_family()
    full = one_hot(router.space, router.space.extreme())
    assert_close(routers.budget_loss(router, full, 0.5), f64(0.99)[0])
    assert_close(routers.budget_loss(router, full, 0.8), f64(0.24)[0])
    least = router.costs.exact(router.space.extreme(smallest=True), router.depth_order) / router.full_cost
    assert_close(routers.budget_loss(router, one_hot(router.space, router.space.extreme(smallest=True)), 0.5),
                 f64(1 - least / 0.5 - 0.01)[0])  # fmt: skip


@pytest.mark.parametrize(("off", "loss"), [(0.009, 0.0), (-0.009, 0.0), (0.03, 0.02), (-0.03, 0.02)])
def test_budget_loss_has_a_dead_zone_without_gradient(off, loss):
    """The expected cost is (1 + off) times the budget; within 1 per cent there is nothing to learn."""
    router = tiny_family()
    p = {a: random_weights(v.shape).softmax(-1).requires_grad_() for a, v in router(0.5).items()}
    cost = float(router.costs.expected(p, router.depth_order).detach())
    found = routers.budget_loss(router, p, cost / (1 + off) / router.full_cost)
    assert float(found.detach()) == pytest.approx(loss, abs=1e-9)
    found.backward()
    moved = max(float(v.grad.abs().max()) for v in p.values())
    assert (moved > 0) == (loss > 0)


@pytest.mark.parametrize("seed", [None, 0, 1], ids=["at the start", "random", "random again"])
def test_repaired_choices_meet_every_budget_of_the_cpu_preset_within_a_per_cent(seed):
    router = cpu_router()
    for per_cent in range(50, 101, 2):
        budget = per_cent / 100
        noise = 0 if seed is None else noise_like(router.space, seed)
        logp = {a: (v + (noise and 3 * noise[a])).log_softmax(-1).detach() for a, v in router(budget).items()}
        choice = routers.fit_to_budget(logp, router, budget)
        assert router.costs.exact(choice, router.depth_order) / router.full_cost == pytest.approx(budget, rel=0.01)


@given(st.integers(0, 1000), st.floats(0.35, 1.0), st.sampled_from([AXES, ()]))
def test_a_repair_never_goes_further_from_the_budget(seed, budget, heterogeneous):
    """And leaves the likeliest choice as it is where it is near enough."""
    router = tiny_family(heterogeneous=heterogeneous)
    generator = torch.Generator().manual_seed(seed)
    logp = {a: torch.randn(v.shape, generator=generator).log_softmax(-1) for a, v in router(0.5).items()}
    likeliest = {a: v.argmax(-1).tolist() for a, v in logp.items()}
    repaired = routers.fit_to_budget(logp, router, budget)
    before, after = (
        abs(router.costs.exact(c, router.depth_order) / router.full_cost - budget) for c in (likeliest, repaired)
    )
    assert after <= max(before, 0.005 * budget) + 1e-12
    if before <= 0.005 * budget:
        assert repaired == likeliest


def test_a_budget_that_can_be_met_is_met_from_any_scores():
    """Few coarse widths: from the likeliest ones no single change and no two come near .8, from the full ones they do."""
    shape = replace(
        PRESETS["smoke"].model, pattern="M-", d_model=128, d_ff=384, mamba_heads=2, mamba_head_dim=32, vocab_size=512
    )
    c = replace(PRESETS["smoke"].elastic, d_model_choices=(128, 64), ffn_choices=(384, 288, 192), heterogeneous=("ffn",),
                budgets=(1.0, 0.9, 0.8))  # fmt: skip
    router = routers.build_router(shape, c, [0, 1], CPU)
    for choice in (routers.by_hand(router, 0.8), *(routers.at_random(router, 0.8, seed) for seed in range(6))):
        router.check_met(choice, 0.8)


def test_a_repair_changes_what_costs_least_likelihood():
    """Of two FFN layers the second is nearly indifferent between 12 and 1 neurons, so that one is cut."""
    router = make_router(tiny_model(), ffn_choices=(12, 1))
    logp = {a: torch.full_like(v, -100.0).detach() for a, v in router(0.5).items()}
    for v in logp.values():
        v[:, 0] = 0.0
    logp["ffn"][1] = torch.tensor([-0.6, -0.8])
    without = router.full_cost - 11 * 16
    choice = routers.fit_to_budget(logp, router, without / router.full_cost)
    assert choice == router.space.extreme() | {"ffn": [0, 1]}


def test_a_repair_changes_two_widths_where_one_comes_no_nearer():
    """Two FFN layers at 7 neurons of (12, 7, 4), two neurons below the budget: 12 is 3 too many and 4 is 5 too few, but
    12 in one and 4 in the other meet it. The second layer likes 12 better.
    """
    few = {"d_model_choices": (8,), "mamba_channel_choices": (3,), "mamba_head_choices": (4,), "attn_head_choices": (4,),
           "depth_choices": (5,), "ffn_choices": (12, 7, 4), "budgets": (1.0, 0.95), "long_weights": (1, 1)}  # fmt: skip
    router = make_router(tiny_model(), **few)
    logp = {a: torch.zeros_like(v) for a, v in router(0.95).items()} | {"ffn": torch.tensor([[-3.0, 0, -2], [-2.0, 0, -2]])}
    target = router.full_cost - (5 + 5 - 2) * 16
    choice = routers.fit_to_budget(logp, router, target / router.full_cost)
    assert choice["ffn"] == [2, 0]
    assert router.costs.exact(choice, router.depth_order) == target


def test_the_full_budget_is_the_full_model_whatever_the_router_says():
    router = make_router(tiny_model())
    for mlp in router.mlps.values():
        mlp[-1].bias.data.copy_(-mlp[-1].bias)
    assert router.choose(1.0) == nested.full_widths(tiny_model().config)


def test_by_hand_keeps_all_layers_and_cuts_every_axis_alike():
    """Within 1 per cent of the budget, and no width further than 0.3 of the full one from the mean of all."""
    router = cpu_router()
    for budget in (0.5, 0.6, 0.75, 0.9):
        choice = routers.by_hand(router, budget)
        assert choice["depth"] == [0]
        assert router.costs.exact(choice, router.depth_order) / router.full_cost == pytest.approx(budget, rel=0.01)
        w = router.space.choices
        shares = torch.tensor([w[a][k] / w[a][0] for a, picked in choice.items() for k in picked if a != "depth"])
        assert (shares - shares.mean()).abs().max() < 0.3


def test_a_router_that_was_told_chooses_that():
    """Also for an interpolated budget it stays near what it costs; another budget's choice is another's."""
    router = make_router(tiny_model())
    told = {b: routers.at_random(router, b, seed=3) for b in (0.75, 0.5)}
    router.settle(told)
    for b, choice in told.items():
        assert router.choose(b) == router.space.widths(choice, router.depth_order)
    assert router.choose(0.75) != router.choose(0.5)
    votes = router(0.6)  # 0.4 of the one and 0.6 of the other: 4 and 6 of 10 logits
    for axis, logits in votes.items():
        for j, row in enumerate(logits):
            expected = torch.zeros_like(row)
            expected[told[0.75][axis][j]] += 4.0
            expected[told[0.5][axis][j]] += 6.0
            assert_close(row, expected)


@pytest.mark.parametrize("seed", range(6))
def test_between_two_budgets_no_width_is_below_both_neighbours(seed):
    """Such a cut was trained in neither. Nor above both, where the full model is one; else where coarse steps of the stream
    leave nothing between them, units above were trained by larger sizes."""
    router = cpu_router()
    told = {b: routers.at_random(router, b, seed) for b in (0.75, 0.5)}
    router.settle(told)
    full = router.choice(1.0)
    assert full == router.space.extreme()
    assert {b: router.choice(b) for b in told} == told
    for budget, larger, smaller in ((0.9375, full, told[0.75]), (0.875, full, told[0.75]),
                                    (0.6875, told[0.75], told[0.5]), (0.5625, told[0.75], told[0.5])):  # fmt: skip
        choice = router.choice(budget)
        assert router.off(choice, budget) < 0.02
        for axis, picked in choice.items():
            for k, one, other in zip(picked, larger[axis], smaller[axis], strict=True):
                assert (min(one, other) if larger is full else 0) <= k <= max(one, other)


def test_random_widths_meet_their_budget_and_differ_by_seed():
    router = cpu_router()
    for budget in (0.5, 0.75):
        choices = [routers.at_random(router, budget, seed) for seed in range(8)]
        costs = [router.costs.exact(choice, router.depth_order) / router.full_cost for choice in choices]
        assert costs == pytest.approx([budget] * 8, rel=0.01)
        assert len({str(choice) for choice in choices}) == 8
        assert choices[0] == routers.at_random(router, budget, 0)


def loss_of_slices(model, widths, batch):
    logits_BTV = by_slices(model, widths, batch["tokens_BT"], batch["ids_BT"])
    return F.cross_entropy(logits_BTV.flatten(0, 1), batch["targets_BT"].flatten(), reduction="sum")


@pytest.mark.parametrize("changes", [{"choose": "sensitivity"}, {"router_start": "sensitivity"}], ids=str)
def test_sensitivity_is_what_each_choice_costs_alone_and_the_least_sum_is_chosen(changes):
    """A router begins there too, with a vote of two logits, and learns on."""
    model = tiny_model()
    batch = {k: v for k, v in batch_of([0, 0], 0).items() if k.endswith("_BT")}
    objective = make_objective(model, 10, **changes)
    router = objective.router
    full, lost = router.space.extreme(), {}
    for axis, widths in router.space.choices.items():
        lost[axis] = torch.zeros(router.space.n_decisions(axis), len(widths))
        for j in range(router.space.n_decisions(axis)):
            for k in range(1, len(widths)):
                one = copy.deepcopy(full)
                one[axis][j] = k
                losses = [loss_of_slices(model, router.space.widths(c, router.depth_order), batch) for c in (one, full)]
                lost[axis][j, k] = losses[0] - losses[1]
    assert max(rows.max() for rows in lost.values()) > 0.01
    objective.begin(model, [batch])
    for b in (0.75, 0.5):
        choice = routers.fit_to_budget({a: -rows for a, rows in lost.items()}, router, b)
        assert router.choose(b) == router.space.widths(choice, router.depth_order)
    vote = 2.0 if "router_start" in changes else routers.FULL_VOTE
    assert {logits.max().item() for logits in router(0.5).values()} == {vote}
    if "router_start" in changes:
        loss_of(objective, model, batch_of([1, 2], 3), step=3)[0].backward()
        assert all(mlp[-1].weight.grad.abs().max() > 0 for axis, mlp in router.mlps.items() if axis != "depth")


def test_search_takes_the_candidate_with_the_least_loss_untrained(monkeypatch):
    """Of five candidates; and choose_seed 1 looks at the next five."""
    monkeypatch.setattr(elastic, "N_CANDIDATES", 5)
    model = tiny_model()
    batch = {k: v for k, v in batch_of([0, 0], 0).items() if k.endswith("_BT")}
    for seed in (0, 1):
        objective = make_objective(model, 10, choose="search", choose_seed=seed)
        objective.begin(model, [batch])
        router = objective.router
        for b in (0.75, 0.5):
            losses = {}
            for i in range(5 * seed, 5 * seed + 5):
                widths = router.space.widths(routers.at_random(router, b, i), router.depth_order)
                losses[widths] = loss_of_slices(model, widths, batch)
            assert router.choose(b) == min(losses, key=losses.get)


# ------------------------------------------------------------------------------------------------- the objective


def make_objective(model, n_search=0, teacher=None, **changes) -> Elastic:
    """Ten steps, of which the first n_search are the search; the teacher is the model with other weights."""
    c = settings(**{"steps": 10, "search_share": n_search / 10} | changes)
    if teacher is None:
        teacher = copy.deepcopy(model).requires_grad_(False)
        for i, p in enumerate(teacher.parameters()):
            p.add_(0.3 * random_weights(p.shape, seed=i).to(p))
    torch.manual_seed(0)
    depth_order = [i for i in (3, 0, 1, 2, 4) if i < len(model.layers)]
    return Elastic(c, routers.build_router(model.config, c, depth_order, CPU), teacher)


def batch_of(budgets, step=0):
    """A packed sequence for each of the budgets (by index), some targets left out."""
    tokens_BT = torch.randint(12, (len(budgets), 12), generator=torch.Generator().manual_seed(step))
    targets_BT = tokens_BT[:, 1:].clone()
    targets_BT[:, 3] = -100
    ids_BT = torch.tensor([[0] * 4 + [1] * 7]).expand(len(budgets), -1)
    return {"tokens_BT": tokens_BT[:, :-1], "targets_BT": targets_BT, "ids_BT": ids_BT,
            "budget_B": torch.tensor(budgets)}  # fmt: skip


def loss_of(objective, model, batch, seed=0, step=0):
    """The loss with its count and metrics; gradients of the model and of the router afterwards are its own."""
    model.zero_grad()
    objective.router.zero_grad()
    return objective.loss(model, objective.prepare(model, batch, step, torch.Generator().manual_seed(seed)))


def gradient_of(objective, model, batch):
    loss_of(objective, model, batch)[0].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("n_search", [1, 5, 10])
def test_temperature_and_scale_go_from_their_first_to_their_last_values(n_search):
    """Without noise p = softmax(scale v / tau): (1, 1) at the first step, (10, 0.05) at the last; half-way scale is the
    mean, 5.5, and tau the geometric mean, sqrt(0.05). A search of one step has the first values.
    """
    objective = make_objective(tiny_model(), n_search)
    for mlp in objective.router.mlps.values():
        mlp[-1].bias.data.mul_(0.01)  # small logits: at 10 / 0.05 they would all be 0 or 1
    silence = {b: {a: torch.zeros_like(v) for a, v in objective.router(b).items()} for b in (1.0, 0.75, 0.5)}
    expected = {0: (1.0, 1.0)}
    if n_search > 1:
        expected[n_search - 1] = (10.0, 0.05)
    if n_search == 5:
        expected[2] = (5.5, math.sqrt(0.05))
    for step, (scale, tau) in expected.items():
        objective.step = step
        found = objective.choices(silence)
        assert found.keys() == {0.75, 0.5}
        for axis, p in found[0.5].items():
            assert_close(p, torch.softmax(objective.router(0.5)[axis] * scale / tau, dim=-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["soft", "top1", "straight-through"])
def test_the_task_alone_moves_every_router_in_each_mode(mode):
    """Without the budget loss, from a row of each budget."""
    model = tiny_model()
    objective = make_objective(model, 10, mask=mode, router_weight=0.0)
    loss_of(objective, model, batch_of([0, 1, 2]))[0].backward()
    for axis, mlp in objective.router.mlps.items():
        assert mlp[-1].bias.grad.abs().max() > 1e-6, axis
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("mode", ["soft", "top1", "straight-through"])
def test_the_search_runs_under_the_masks_of_its_mode(mode):
    model, batch = tiny_model(), batch_of([1])
    objective = make_objective(model, 10, mask=mode)
    space = objective.router.space
    p = {a: random_weights((space.n_decisions(a), len(w))).softmax(-1) for a, w in space.choices.items()}
    masks = space.masks(routers.mask_weighting(p, mode), objective.router.depth_order)
    expected, _ = model(batch["tokens_BT"], ids_BT=batch["ids_BT"], inside=nested.masked_inside(model.config, masks))
    assert_close(objective.run(model, p, 0.75, batch)[0], expected)


def test_the_noise_of_choices_is_gumbels():
    """Its mean is Euler's constant."""
    objective, generator = make_objective(tiny_model(), 10), torch.Generator().manual_seed(0)
    drawn = [objective.prepare(None, {}, 0, generator)["noise"].values() for _ in range(200)]
    values = torch.cat([v.flatten() for noise in drawn for of_budget in noise for v in of_budget.values()])
    assert float(values.mean()) == pytest.approx(0.5772, abs=0.05)


@pytest.mark.parametrize("mode", ["soft", "top1", "straight-through"])
def test_twenty_steps_of_the_search_stay_finite_and_move_the_routers(mode):
    """With the paper's rate for routers, in fp32, to the end of the annealing."""
    model = tiny_model(pattern="M*-").float()
    objective = make_objective(model, depth_choices=(3, 2), mask=mode, steps=20, search_share=1.0)
    weights = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = copy.deepcopy(objective.router.state_dict())
    for step in range(20):
        loss, count, metrics = loss_of(objective, model, batch_of([0, 1, 2], step), seed=step, step=step)
        (loss / count).backward()
        for optimizer in (weights, *objective.optimizers()):
            optimizer.step()
        assert math.isfinite(float(loss.detach()))
        assert all(math.isfinite(total) and n > 0 for total, n in metrics.values())
    after = objective.router.state_dict()
    assert all(after[k].isfinite().all() for k in after)
    assert all(not torch.equal(after[k], before[k]) for k in after if k.endswith("2.bias"))
    assert all(p.isfinite().all() for p in model.parameters())


def test_routers_learn_to_meet_their_budgets():
    """The cpu preset's, from the budget loss alone, through a whole annealing of 100 steps: the likeliest choices cost what
    they should before any repair.
    """
    c, space = replace(PRESETS["cpu"].elastic, steps=100, search_share=1.0), cpu_router().space
    torch.manual_seed(0)
    router = Router(space, c, cpu_router().costs, cpu_router().depth_order)
    objective, generator = Elastic(c, router, HybridLM(space.config)), torch.Generator().manual_seed(0)
    (optimizer,) = objective.optimizers()
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert optimizer.param_groups[0]["weight_decay"] == 0
    for step in range(100):
        p = objective.choices(objective.prepare(None, {}, step, generator)["noise"])
        optimizer.zero_grad()
        sum(routers.budget_loss(router, p[b], b) for b in p).backward()
        optimizer.step()
    likeliest = {b: {a: v.argmax(-1).tolist() for a, v in router(b).items()} for b in (1.0, 0.95, 0.8, 0.75, 0.5)}
    cost = {b: router.costs.exact(choice, router.depth_order) / router.full_cost for b, choice in likeliest.items()}
    assert (cost[0.75], cost[0.5]) == (pytest.approx(0.75, rel=0.03), pytest.approx(0.5, rel=0.03))
    # Between two budgets it is between their choices, and the nearer to the full one the more of that.
    assert cost[1.0] == 1
    assert 1 >= cost[0.95] > cost[0.8] >= cost[0.75]
    for budget in (0.95, 0.9, 0.8, 0.6):
        widths = router.choose(budget)
        small = nested.shrink(space.config, widths)
        assert sum_of_parts(routers.cost_measure(c, CPU), small) == pytest.approx(budget * router.full_cost, rel=0.006)
    assert all(
        most >= some >= least
        for own in ("ffn", "mamba_heads", "mamba_channels", "attn_heads", "d_model")
        for most, some, least in zip(
            *([space.choices[own][k] for k in likeliest[b][own]] for b in (1.0, 0.95, 0.75)), strict=True
        )
    )


def test_the_loss_of_a_search_step_is_the_task_plus_the_budget_loss_of_all_budgets():
    """Budgets without a row in the batch count too, and the full one never."""
    model = tiny_model()
    batch = batch_of([1, 1])
    plain, weighted = (loss_of(make_objective(model, 10, router_weight=w), model, batch) for w in (0.0, 3.0))
    objective = make_objective(model, 10)
    p = objective.choices(objective.prepare(model, batch, 0, torch.Generator().manual_seed(0))["noise"])
    off = sum(float(routers.budget_loss(objective.router, p[b], b).detach()) for b in (0.75, 0.5))
    assert plain[1] == weighted[1] == 20
    assert float(weighted[0].detach() - plain[0].detach()) == pytest.approx(3 * off * 20, rel=1e-6)
    total, n = weighted[2]["budget_loss"]
    assert (float(total), n) == (pytest.approx(off, rel=1e-6), 2)


def test_the_search_ends_and_its_choice_stays():
    """After it the router has no gradient, and what it would say now no longer counts."""
    model = tiny_model()
    objective = make_objective(model, 4)
    assert objective.n_search == 4
    loss_of(objective, model, batch_of([1], 3), step=3)[0].backward()
    assert objective.router.mlps["ffn"][-1].bias.grad is not None
    assert objective.settled == {}
    first = loss_of(objective, model, batch_of([1, 2], 4), step=4)
    first[0].backward()
    assert "budget_loss" not in first[2]
    assert all(p.grad is None for p in objective.router.parameters())
    assert set(objective.settled) == {0.75, 0.5}
    for b, inside in objective.settled.items():
        assert_close(logits_inside(model, inside), by_slices(model, objective.router.choose(b)), rtol=0, atol=0)
    for mlp in objective.router.mlps.values():
        mlp[-1].bias.data.normal_()
    assert_close(loss_of(objective, model, batch_of([1, 2], 4), step=4)[0], first[0], rtol=0, atol=0)


def test_widths_by_hand_need_no_search():
    objective = make_objective(tiny_model(), 10, choose="fixed")
    assert objective.n_search == 0
    assert objective.optimizers() == []


@functools.cache
def searching():
    """A model with a large epsilon, and its objective; made once."""
    model = tiny_model(norm_eps=1.0)
    return model, make_objective(model, 10)


@examples(max_examples=20)
@given(data=st.data())
def test_a_search_step_that_is_certain_runs_the_sliced_model(data):
    """One-hot probabilities, as soft masks: the masks that training uses are those of the slices."""
    model, objective = searching()
    space, order = objective.router.space, objective.router.depth_order
    choice, batch = data.draw(choices(space)), batch_of([1])
    hidden_BTD, head_VD = objective.run(model, one_hot(space, choice), 0.75, batch)
    sliced = by_slices(model, space.widths(choice, order), batch["tokens_BT"], batch["ids_BT"])
    assert_close(F.linear(hidden_BTD, head_VD), sliced, **EXACT)


def test_a_soft_mask_weighs_tied_embeddings_as_it_weighs_a_head_of_their_own():
    """One function, written with a tied matrix and with two equal ones: the same logits under the same soft masks."""
    tied, untied, found = tiny_model(), tiny_model(tie_embeddings=False), []
    untied.load_state_dict({**tied.state_dict(), "head.weight": tied.embed.weight.detach()})
    for model in (tied, untied):
        objective = make_objective(model, 10)
        space = objective.router.space
        p = {a: torch.full((space.n_decisions(a), len(w)), 1 / len(w)) for a, w in space.choices.items()}
        hidden_BTD, head_VD = objective.run(model, p, 0.75, batch_of([1]))
        found.append(F.linear(hidden_BTD, head_VD))
    assert_close(*found, **EXACT)


@pytest.mark.parametrize("budget", [1.0, 0.5])
@pytest.mark.parametrize("searching", [False, True])
def test_a_budget_is_recomputed_block_by_block_with_the_same_gradients(monkeypatch, budget, searching):
    """From the last block to the first, so that the insides of one are kept at a time; as one segment the first begins."""
    model, plain, ran, found = tiny_model(pattern="-*M"), Block.forward, [], []
    objective = make_objective(model, 10, budgets=(1.0, 0.5), depth_choices=())
    space, batch = objective.router.space, batch_of([1])
    p = {a: torch.full((space.n_decisions(a), len(w)), 1 / len(w)) for a, w in space.choices.items()}

    def forward(self, x_BTD, cached, context, part=None):
        if part is None:  # else a block of the smaller model runs in this one's place
            ran.append(self.kind)
        return plain(self, x_BTD, cached, context, part)

    monkeypatch.setattr(Block, "forward", forward)
    for asked in (False, True):
        monkeypatch.setattr(parallel.team, "settings", ParallelConfig(activation_checkpointing=asked))
        ran.clear()
        network = parallel.shard(model)
        hidden_BTd, head_Vd = objective.run(network, p if searching else None, budget, batch)
        found.append(gradients(network, F.linear(hidden_BTd, head_Vd)))
        assert "".join(ran) == ("-*MM*-" if asked else "-*M")
    assert_close(*found, **EXACT)


# -------------------------------------------------------------------------------------------------------- distillation


def test_divergence_by_hand():
    """The teacher gives 3/4 and 1/4, the student 1/2 each: 3/4 ln(3/2) + 1/4 ln(1/2) = 0.13081 nats.

    At temperature 2 a teacher with logits ln 9 and 0 says the same, and so does the student. Two positions add up.
    """
    for temperature, logit in ((1.0, math.log(3)), (2.0, math.log(9))):
        teacher_TD, student_TD = f64([logit], [logit]), f64([0.0], [0.0])
        matrix_VD = f64([1.0], [0.0])
        found = elastic.distillation_loss(
            [(1.0, teacher_TD, matrix_VD)], student_TD, matrix_VD, torch.tensor([0, 1]), 0.0, temperature
        )
        assert float(found) == pytest.approx(2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), rel=1e-12)
    assert float(found) == pytest.approx(2 * 0.13081, abs=1e-5)


@pytest.mark.parametrize("at_once", [1, 10, 11, 34, 35])
def test_a_divergence_in_pieces_equals_the_whole_with_its_gradients(at_once):
    """Seven positions, five tokens: 35 numbers, in 35, 4, 4, 2 pieces and in one."""
    teachers = [(w, random_weights((7, d), d), random_weights((5, d), d + 2)) for w, d in ((0.3, 3), (1.1, 1))]
    student_Td, student_Vd = random_weights((7, 2), 3).requires_grad_(), random_weights((5, 2), 4).requires_grad_()
    results, token_T = [], torch.arange(7) % 5
    for n in (10**6, at_once):
        loss = elastic.distillation_loss(teachers, student_Td, student_Vd, token_T, 0.7, 1.3, at_once=n)
        results.append((loss, *torch.autograd.grad(loss, [student_Td, student_Vd])))
    assert_close(*results, **EXACT)


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("n_teachers", [1, 2])
@pytest.mark.parametrize("ce", [0.0, 0.7])
def test_one_mixed_target_is_the_sum_of_divergences_and_cross_entropy(temperature, n_teachers, ce):
    """With its gradients; the cross-entropy is at temperature 1, whatever that of the divergences."""
    teachers = [(0.5 + i, random_weights((7, 3), i), random_weights((5, 3), 2 + i)) for i in range(n_teachers)]
    student_Td, student_Vd = random_weights((7, 2), 5).requires_grad_(), random_weights((5, 2), 6).requires_grad_()
    token_T, logits_TV = torch.arange(7) % 5, F.linear(student_Td, student_Vd)
    expected = ce * F.cross_entropy(logits_TV, token_T, reduction="sum")
    for weight, hidden_TD, matrix_VD in teachers:
        p, q = ((t / temperature).softmax(-1) for t in (F.linear(hidden_TD, matrix_VD), logits_TV))
        expected = expected + weight * (p * (p / q).log()).sum()
    found = elastic.distillation_loss(teachers, student_Td, student_Vd, token_T, ce, temperature)
    assert_close(found, expected, **EXACT)
    assert_close(*(torch.autograd.grad(loss, [student_Td, student_Vd]) for loss in (found, expected)), **EXACT)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_small_divergence_of_bf16_logits_is_taken_in_fp32(autocast):
    """Of the same rounded logits, value and gradient are those of fp64: .004 nats a token, which bf16 sums lose.

    What still differs in the gradient is its rounding to the students' bf16.
    """
    matrix_VD, hidden_TD, moved_TD = (
        random_weights(s, i).bfloat16() for i, s in enumerate([(512, 64), (64, 64), (64, 64)])
    )
    student_TD, token_T = hidden_TD + 0.01 * moved_TD, torch.arange(64)
    rounded = [F.linear(t, matrix_VD).double() for t in (hidden_TD, student_TD)]
    logits_TV = rounded[1].requires_grad_()
    exact = F.kl_div(logits_TV.log_softmax(-1), rounded[0].log_softmax(-1), reduction="sum", log_target=True)
    exact.backward()
    student_TD = student_TD.to(torch.float32 if autocast else torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = elastic.distillation_loss([(1.0, hidden_TD, matrix_VD)], student_TD, matrix_VD, token_T, 0.0, 1.0)
    found.backward()
    wanted_TD = logits_TV.grad @ matrix_VD.double()
    assert found.dtype == torch.float32
    assert_close(found.double(), exact, rtol=1e-3, atol=0.0)
    assert float((student_TD.grad.double() - wanted_TD).norm() / wanted_TD.norm()) < 0.01


def test_the_loss_of_no_positions_is_zero():
    nothing, ones, none = torch.zeros(0, 3), torch.ones(5, 3), torch.zeros(0, dtype=torch.long)
    assert float(elastic.distillation_loss([(1.0, nothing, ones)], nothing, ones, none, 1.0, 1.0)) == 0.0


def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient():
    model = tiny_model()
    objective = make_objective(model, teacher=copy.deepcopy(model))
    loss = loss_of(objective, model, batch_of([0, 0]))[0]
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-12


@pytest.mark.parametrize("weight", [0.7, 0.0], ids=["both", "text alone"])
def test_the_task_is_the_weighted_sum_of_its_parts(weight):
    """0.7 KL + 0.3 CE, each computed here from whole logits, over the 20 positions that have a target."""
    model, batch = tiny_model(), batch_of([0, 0])
    objective = make_objective(model, kl=weight, ce=0.3, full_ce=0.5, kl_temperature=2.0)
    wanted, given_ = (m.logits(m(batch["tokens_BT"], ids_BT=batch["ids_BT"])[0]) for m in (objective.teacher, model))
    inside = batch["targets_BT"] != -100
    wanted, given_, target = (t[inside] for t in (wanted, given_, batch["targets_BT"]))
    p, q = (wanted / 2).softmax(-1), (given_ / 2).softmax(-1)
    kl, ce = (p * (p / q).log()).sum(), -given_.log_softmax(-1).gather(-1, target[:, None]).sum()
    alone = Distillation(objective.c, objective.teacher).loss(model, batch)
    assert (alone[1], alone[2]) == (20, {})
    assert_close(alone[0], weight * kl + 0.3 * ce, **EXACT)
    total, count, metrics = loss_of(objective, model, batch)
    assert count == 20
    assert_close(total, weight * kl + (0.3 + 0.5) * ce, **EXACT)
    assert_close(metrics["loss_1"], (total.detach(), 20), **EXACT)


def test_alpha_counts_for_the_full_model_only():
    model = tiny_model()
    for row, differs in ((0, True), (1, False)):
        without, with_ = (loss_of(make_objective(model, full_ce=a), model, batch_of([row]))[0] for a in (0.0, 1.0))
        assert (float(with_.detach() - without.detach()) > 0.1) == differs


def test_the_teacher_that_trains_is_the_full_model_without_a_gradient_of_its_own():
    """Only 0.5 has a row: its loss is KL(full model || slice), and outside of the slice there is no gradient."""
    model, batch = tiny_model(), batch_of([2])
    objective = make_objective(model, kl=0.0, self_kl=1.0, full_ce=1.0)
    found = gradient_of(objective, model, batch)
    frozen = make_objective(model, kl=1.0, teacher=copy.deepcopy(model))
    assert_close(found, gradient_of(frozen, model, batch), **EXACT)
    assert outside_of_slice(model, objective.router.choose(0.5), found)


def test_the_full_model_does_not_run_again_to_teach_itself():
    """Its divergence from itself would be 0: one pass for its own row, and one more as the teacher of a smaller budget."""
    model, calls = tiny_model(), []
    objective = make_objective(model, kl=0.0, self_kl=1.0, full_ce=1.0)
    model.register_forward_pre_hook(lambda _, args, how: calls.extend([1] * (how.get("inside") is None)), with_kwargs=True)
    for budgets, n in (([0], 1), ([2], 1), ([0, 2], 2)):
        calls.clear()
        loss_of(objective, model, batch_of(budgets))
        assert len(calls) == n


@pytest.mark.parametrize("step", [3, 7])
def test_sequences_that_train_all_budgets_weigh_their_losses_by_hand(step):
    """Alike in stage 1, .2, .3 and .5 in stage 2, for all terms; gradients too. The count is that of the sequences."""
    model, batch = tiny_model(), batch_of([0, 0])
    changes = {
        "together": True,
        "self_kl": 0.7,
        "ce": 0.3,
        "full_ce": 0.5,
        "long_share": 0.4,
        "long_weights": (0.2, 0.3, 0.5),
    }
    objective = make_objective(model, **changes)
    alone = make_objective(model, **changes | {"together": False})
    total, count, metrics = loss_of(objective, model, {k: v for k, v in batch.items() if k != "budget_B"}, step=step)
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    expected, sums = 0.0, {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n, weight in enumerate((0.2, 0.3, 0.5) if step == 7 else (1 / 3,) * 3):
        one, one_count, _ = loss_of(alone, model, batch | {"budget_B": torch.tensor([n, n])}, step=step)
        (weight * one).backward()
        expected += weight * one.detach()
        sums = {name: sums[name] + (0 if p.grad is None else p.grad) for name, p in model.named_parameters()}
        assert count == one_count == 20
    assert_close(total.detach(), expected, **EXACT)
    assert_close(found, sums, **EXACT)
    assert {name for name in metrics if name.startswith("loss_")} == {"loss_1", "loss_0.75", "loss_0.5"}


@pytest.mark.parametrize("draws", [1, 2])
def test_the_mean_over_draws_between_the_largest_and_the_least_is_the_loss_of_all(draws):
    """Five budgets, .2 .1 .3 .15 .25 in stage 2: by enumeration of what is drawn of the three between, with its
    probability. A step trains the ends and no more than was drawn, for one pass of the parent."""
    model, batch = tiny_model(), batch_of([0, 0])
    weights = (0.2, 0.1, 0.3, 0.15, 0.25)
    changes = {"together": True, "budgets": (1.0, 0.85, 0.75, 0.6, 0.5), "long_share": 1.0, "long_weights": weights}
    every, some = (make_objective(model, **changes, draws=n) for n in (3, draws))
    assert every.c.between(7) == {}
    drawn_with = some.c.between(7)
    assert drawn_with == pytest.approx({1: 0.1 / 0.55, 2: 0.3 / 0.55, 3: 0.15 / 0.55})
    assert some.c.passes(7) == pytest.approx([1, *(1 - (1 - p) ** draws for p in drawn_with.values()), 1])
    expected = loss_of(every, model, batch, step=7)[0].detach()
    mean = 0.0
    for drawn in itertools.product((1, 2, 3), repeat=draws):
        total, _, metrics = loss_of(some, model, batch | {"drawn_Bk": torch.tensor([drawn, drawn])}, step=7)
        assert {name for name in metrics if name.startswith("loss_")} == {
            f"loss_{some.c.budgets[n]:g}" for n in (0, 4, *drawn)
        }
        mean += math.prod(drawn_with[n] for n in drawn) * total.detach()
    assert_close(mean, expected, **EXACT)


@pytest.mark.parametrize(("weights", "trained"), [((0.4, 0, 0.3, 0, 0.3), (0, 2, 4)), ((0.5, 0, 0, 0, 0.5), (0, 4))])
def test_a_budget_of_weight_0_is_passed_over(weights, trained):
    """In stage 2, where what is drawn of those between is always the one that has a weight, if there is one."""
    model = tiny_model()
    changes = {"together": True, "budgets": (1.0, 0.85, 0.75, 0.6, 0.5), "long_share": 1.0, "long_weights": weights}
    objective = make_objective(model, **changes, draws=1)
    batch = batch_of([0, 0]) | {"drawn_Bk": torch.full((2, 1), 2)}
    total, _, metrics = loss_of(objective, model, batch, step=7)
    assert torch.isfinite(total)
    assert {name for name in metrics if name.startswith("loss_")} == {f"loss_{objective.c.budgets[n]:g}" for n in trained}
    assert objective.c.passes(7) == [float(n in trained) for n in range(5)]


@pytest.mark.parametrize(("together", "n_full"), [(True, 1), (False, 2)])
def test_one_pass_of_the_parent_serves_all_budgets_and_the_full_model_teaches_with_its_own(together, n_full):
    """Together: one pass of either. Apart: one of the parent too, for the sequences of all budgets at once."""
    model, calls = tiny_model(), []
    objective = make_objective(model, together=together, self_kl=1.0)
    model.register_forward_pre_hook(
        lambda _, args, how: calls.extend(["full"] * (how.get("inside") is None)), with_kwargs=True
    )
    objective.teacher.register_forward_pre_hook(lambda *_: calls.append("parent"))
    loss_of(objective, model, batch_of([0, 2]))
    assert calls.count("parent") == 1
    assert calls.count("full") == n_full


def outside_of_slice(model, widths, gradient):
    """For every weight that is cut, its gradient outside of the slice; all must be 0 for the test to go on."""
    inside = {name: torch.zeros_like(p).requires_grad_() for name, p in model.named_parameters()}
    kept = nested.take(inside, model.config, nested.kept_units(model.config, widths))
    marks = torch.autograd.grad(sum(t.sum() for t in kept.values()), list(inside.values()), materialize_grads=True)
    cut = {name: mark == 0 for name, mark in zip(inside, marks, strict=True) if (mark == 0).any()}
    for name, where in cut.items():
        if name in gradient:
            assert (gradient[name][where] == 0).all(), name
            assert where.all() or (gradient[name][~where] != 0).any(), name
    return cut


def test_a_small_budget_trains_its_slice_alone():
    """In every weight that is cut, gradients are 0 outside of the slice and not all 0 inside."""
    model = tiny_model()
    objective = make_objective(model)
    found = gradient_of(objective, model, batch_of([2]))
    cut = outside_of_slice(model, objective.router.choose(0.5), found)
    assert len(cut) > 10
    assert "embed.weight" in cut


@pytest.mark.parametrize("budgets", [[1], [2], [2, 0, 1, 2]], ids=str)
def test_slices_have_the_gradients_of_masks(budgets):
    """The whole loss, with KL and CE: hard mode's gradients against those of masked full-size models."""
    model, batch = tiny_model(norm_eps=0.1), batch_of(budgets)
    objective = make_objective(model, ce=0.5)
    sliced = gradient_of(objective, model, batch)
    model.zero_grad()
    for row, n in enumerate(budgets):
        one = {k: v[row : row + 1] for k, v in batch.items()}
        masks = nested.hard_masks(model.config, objective.router.choose(objective.c.budgets[n]))
        inside = nested.masked_inside(model.config, masks)
        hidden_BTD, _ = model(one["tokens_BT"], ids_BT=one["ids_BT"], inside=inside)
        objective.task(hidden_BTD, model.output_matrix, one, [(1.0, *elastic.told(objective.teacher, one))], 0.5)[
            0
        ].backward()
    masked = {name: p.grad for name, p in model.named_parameters()}
    assert_close({k: masked[k] for k in sliced}, sliced, **EXACT)
    assert all((masked[k] == 0).all() for k in masked.keys() - sliced.keys())


@pytest.mark.parametrize("step", [0, 9], ids=["search", "hard"])
def test_each_sequence_trains_its_own_budget_only(step):
    """The loss of a budget is that of its rows alone, and all losses add up to the loss of the batch."""
    model = tiny_model()
    objective = make_objective(model, 5, router_weight=0.0)
    batch = batch_of([2, 0, 2, 1], step)
    total, count, metrics = loss_of(objective, model, batch, step=step)
    added = 0.0
    for n, rows in enumerate([[1], [3], [0, 2]]):
        alone = loss_of(objective, model, {k: v[rows] for k, v in batch.items()}, step=step)
        assert_close(alone[2][f"loss_{objective.c.budgets[n]:g}"], metrics[f"loss_{objective.c.budgets[n]:g}"], **EXACT)
        assert alone[1] == 10 * len(rows)
        added = added + alone[0]
    assert count == 40
    assert_close(added, total, **EXACT)


def test_a_teacher_with_another_vocabulary_is_refused():
    with pytest.raises(
        ValueError, match="the teacher has 13 tokens in its vocabulary, the model 12; they must be the same"
    ):
        make_objective(tiny_model(), teacher=tiny_model(vocab_size=13))


def test_a_teacher_of_another_shape_may_teach():
    model = tiny_model()
    objective = make_objective(model, teacher=tiny_model(d_model=6, pattern="M*", tie_embeddings=False))
    assert float(loss_of(objective, model, batch_of([2]))[0].detach()) > 0


@pytest.mark.parametrize(("step", "kept"), [(5, False), (6, True), (7, False)])
def test_the_end_of_stage_1_is_kept_once(step, kept):
    """Ten steps, stage 2 from the seventh on (0.3): after step 6 of 0 to 9."""
    model = tiny_model()
    objective = make_objective(model, long_share=0.3)
    assert objective.c.stage_1_steps() == 7
    objective.step = step
    objective.after_step(model)
    assert ("stage1" in objective.networks) == kept
    if kept:
        model.embed.weight.data.zero_()
        assert (objective.networks["stage1"].embed.weight != 0).all()
