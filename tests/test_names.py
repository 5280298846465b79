"""Shape letters are claims: `x_BTHP` has four dimensions, and the T of `x_BTHP` is the T of `dt_BTH`.

A tracer looks at every function of the repo's own modules as it returns, while tiny versions of the real work are done.
The letters after a name's last underscore give its rank; equal letters in one frame mean equal sizes; a digit is a size.
Every letter stands in the one legend of the repo, in the docstring of kernels.py.
"""

import ast
import contextlib
import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import elastic
import evals
import importance
import kernels
import nested
import rlp
import routers
from system.config import ElasticConfig, RLPConfig
from system.presets import PRESETS
from thoughts import Sampling, sample_thoughts, score_thoughts
from tools import bench

ROOT = Path(__file__).parent.parent
SHAPE = re.compile(r"_(?=[a-z]*[A-Z0-9])([A-Za-z0-9]{1,6})$")  # at least one capital or digit, so that `n_heads` is none


LEGEND = re.findall(r" {3}([A-Z])  (\S+(?: \S+)*)", kernels.__doc__)
LETTERS = {letter for letter, _ in LEGEND}


def unknown_letters(source):
    """The names in this Python source, and strings like them (keys of a batch), with a letter that the legend lacks."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        for name in (getattr(node, field, None) for field in ("id", "arg", "attr", "name", "value")):
            letters = SHAPE.search(name) if isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9]*(_\w+)+", name) else None
            if letters and letters[1].lower() != letters[1] and not set(letters[1].upper()) <= {*LETTERS, *"0123456789"}:
                found.add(name)
    return found


def false_names(names):
    """What is wrong with the tensors among these names and values: '' where every name is true."""
    found, size_of = [], {}
    for name, value in names.items():
        letters = SHAPE.search(name)
        if letters is None or not isinstance(value, Tensor):
            continue
        shape = tuple(value.shape)
        if len(letters[1]) != len(shape):
            found.append(f"{name} has the shape {shape}")
            continue
        for letter, size in zip(letters[1], shape, strict=True):
            known, owner = (int(letter), "its name") if letter.isdigit() else size_of.setdefault(letter, (size, name))
            if size != known:
                found.append(f"{letter} is {size} in {name} but {known} in {owner}")
    return "; ".join(found)


@contextlib.contextmanager
def traced():
    """Yields a dict that receives each function of the repo that returns with a false name, and the first case of it."""
    found = {}

    def on_event(frame, event, arg):
        path = Path(frame.f_code.co_filename)
        if path.parent not in (ROOT, *(ROOT / f for f in ("system", "text", "views", "tools"))):
            return None
        frame.f_trace_lines = False
        if event == "return" and (wrong := false_names(frame.f_locals)):
            found.setdefault(f"{path.name}:{frame.f_code.co_firstlineno} {frame.f_code.co_name}", wrong)
        return on_event

    before = sys.gettrace()
    sys.settrace(on_event)
    try:
        yield found
    finally:
        sys.settrace(before)


# ------------------------------------------------------------------------------------------ work that the tracer sees

GENERATOR = torch.Generator()
BATCH = {
    "context_BT": torch.tensor([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8], [0, 1, 2, 3, 4]]),
    "ids_BT": torch.tensor([[-1, -1, 0, 0, 0], [0] * 5, [-1, 0, 0, 0, 0]]),
    "target_BX": torch.tensor([[1, 2], [3, 4], [5, 6]]),
    "kind_B": torch.tensor([1, 0, 2]),
    "back_B": torch.tensor([2, 0, 2]),
}
TOKENIZER = SimpleNamespace(think=9, close=10, end=11, ends=(11,), tags=(9, 10))


def training_step(model):
    """Packed documents of 11 tokens, which is no multiple of the chunk, and then one token from the cache."""
    hidden_BTD, cache = model(torch.arange(22).view(2, 11) % 12, ids_BT=torch.tensor([[0] * 4 + [1] * 7] * 2))
    kernels.token_logp(model.logits(hidden_BTD), torch.zeros(2, 11, dtype=torch.long)).sum().backward()
    model(torch.tensor([[1], [2]]), cache.select(torch.tensor([1, 0])))


def sampling(model):
    sample_thoughts(model, BATCH, TOKENIZER, Sampling(4, 7), GENERATOR.manual_seed(0))


def scoring(model):
    tokens_RL = torch.arange(6 * 7).view(6, 7) % 9
    length_R = torch.tensor([1, 7, 3, 2, 5, 5])
    rlp.thought_logp(model, BATCH, tokens_RL, length_R, TOKENIZER.think, 0.7).sum().backward()
    score_thoughts(model, BATCH, TOKENIZER, tokens_RL)[0].sum().backward()


def rlp_step(model):
    objective = rlp.RLP(RLPConfig(group_size=4, thought_len=7, horizon=2, kl=0.1), TOKENIZER)
    batch = objective.prepare(model, BATCH, 0, GENERATOR.manual_seed(0))
    objective.loss(model, batch)[0].backward()
    objective.after_step(model)


ELASTIC = ElasticConfig(d_model_choices=(8, 5), ffn_choices=(12, 7), router_width=4, steps=4, search_share=0.5, ce=0.5,
                        self_kl=0.5, kl_temperature=2.0)  # fmt: skip


def elastic_batch():
    """Packed documents, a sequence for each of three budgets."""
    tokens_BT = torch.arange(36).view(3, 12) % 12
    return {"tokens_BT": tokens_BT[:, 1:], "targets_BT": tokens_BT[:, :-1], "ids_BT": torch.tensor([[0] * 4 + [1] * 7] * 3),
            "budget_B": torch.arange(3)}  # fmt: skip


def ranking(model):
    """With every score, then measured costs, by which routers may go too."""
    for kind, depth in (("paper", "paper"), ("output", "once")):
        scores = {f"score_{name}": kind for name in ("d_model", "ffn", "mamba", "attn")}
        ranking = importance.rank(
            model, [elastic_batch()], ElasticConfig(**scores, score_depth=depth, depth_choices=(3, 2))
        )
        importance.order_weights(model, ranking)
    routers.part_latency_ns("M", model.config, 2, torch.device("cpu"))


def elastic_step(model):
    """In the search, in each mode, and on slices."""
    router = routers.build_router(model.config, ELASTIC, [0, 1, 2], torch.device("cpu"))
    for mask, step in (("soft", 0), ("top1", 0), ("straight-through", 0), ("soft", 3)):
        objective = elastic.Elastic(dataclasses.replace(ELASTIC, mask=mask), router, model)
        objective.loss(model, objective.prepare(model, elastic_batch(), step, GENERATOR.manual_seed(0)))[0].backward()
        objective.after_step(model)


def extraction(model):
    """A small model, its figures beside the parent's, and one step of distilling it alone."""
    router = routers.build_router(model.config, ELASTIC, [0, 1, 2], torch.device("cpu"))
    small = nested.submodel(model, router.choose(0.5))
    small(torch.tensor([[1], [2]]), small(elastic_batch()["tokens_BT"][:2])[1])
    evals._logp_and_loss(small, elastic_batch())
    evals.size_facts(small, PRESETS["smoke"])
    elastic.Distillation(ELASTIC, model).loss(small, elastic_batch())


def references(model):
    """The slow forms, with K = 2 groups of two heads."""
    x_BTHP, b_BTKN, ids_BT = torch.randn(2, 5, 4, 3), torch.randn(2, 5, 2, 6), torch.tensor([[-1, 0, 0, 1, 1]] * 2)
    kernels.ssd_reference(x_BTHP, torch.rand(2, 5, 4), -torch.rand(4), b_BTKN, b_BTKN, torch.rand(4), ids_BT=ids_BT)
    kernels.causal_conv_reference(torch.randn(2, 5, 3), torch.randn(3, 4), torch.randn(3), ids_BT=ids_BT)
    hidden_TD, weight_VD = torch.randn(5, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    kernels.selected_logp(hidden_TD, weight_VD, torch.arange(5), (8,)).sum().backward()


def benchmarks(model):
    """The contestants that are written out in bench.py."""
    sizes = {"B": 2, "T": 8, "H": 4, "P": 3, "N": 6}
    bench.check(bench.ssd_work(torch.device("cpu"), **sizes, K=2, Q=4).contestants, 1e-4)
    bench.check(bench.rlp_step_work(torch.device("cpu"), 2, 9, 3, 5, 20, model.config).contestants, 1e-4)


WORK = [training_step, sampling, scoring, rlp_step, ranking, elastic_step, extraction, references, benchmarks]


@pytest.mark.parametrize("work", WORK, ids=lambda f: f.__name__)
def test_every_shape_suffix_is_true(make_model, work):
    model = make_model(pattern="M*-", rope_theta=1e4, qk_norm=True, ffn="swiglu")
    with traced() as found:
        work(model)
    assert found == {}


# ---------------------------------------------------------------------------------------------------------- the legend


def test_every_letter_of_a_shape_suffix_is_in_the_legend():
    """This file has false names on purpose."""
    folders = [ROOT / name for name in ("", "system", "text", "views", "tools", "tests")]
    sources = [file for folder in folders for file in folder.glob("*.py") if file.name != "test_names.py"]
    found = {f"{file.name}: {name}" for file in sources for name in unknown_letters(file.read_text())}
    assert found == set()


def test_the_legend_names_each_letter_once_and_for_one_thing():
    assert sorted(letter for letter, _ in LEGEND) == sorted("BTUSDFVHKJPINQCWYZEOGRLX")
    assert len({meaning for _, meaning in LEGEND}) == len(LEGEND)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x_BTD, token_rL, n_heads, A_log, CONV_TILE, advantage_R1 = 1, 2, 3, 4, 5, 6", set()),
        ("def f(x_BA): return {'y_BT': self.mean_A}", {"x_BA", "mean_A"}),
        ("batch['tokens_BM'].sum()", {"tokens_BM"}),
    ],
)
def test_a_letter_that_is_not_in_the_legend_is_found(source, found):
    assert unknown_letters(source) == found


# --------------------------------------------------------------------------------------------------- the tracer itself


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        ({"x_BT": torch.zeros(2, 3), "y_BTD": torch.zeros(2, 3, 5)}, ""),
        ({"x_BT": torch.zeros(2)}, "x_BT has the shape (2,)"),
        ({"x_BT": torch.zeros(2, 3), "y_BT": torch.zeros(2, 4)}, "T is 4 in y_BT but 3 in x_BT"),
        ({"scores_QQ": torch.zeros(2, 3)}, "Q is 3 in scores_QQ but 2 in scores_QQ"),
        ({"token_rM": torch.zeros(2, 3), "logp_RM": torch.zeros(4, 3)}, ""),
        ({"advantage_R1": torch.zeros(4, 1)}, ""),
        ({"advantage_R1": torch.zeros(4, 2)}, "1 is 2 in advantage_R1 but 1 in its name"),
        ({"n_heads": torch.tensor(3), "A_log": torch.zeros(4), "B": 7, "x": torch.zeros(2)}, ""),
    ],
    ids=lambda value: value or "true" if isinstance(value, str) else ", ".join(value),
)
def test_false_names_are_found_and_true_ones_are_not(names, wrong):
    assert false_names(names) == wrong


def test_the_tracer_sees_a_false_name_in_a_function_of_the_repo():
    with traced() as found:
        kernels.gated_norm(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), weight_I=torch.zeros(1), n_groups=2, eps=0.1)
    assert set(found.values()) == {"I is 1 in weight_I but 4 in y_BTI"}
