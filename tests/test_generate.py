"""Sampled thoughts against plain forward passes over whole sequences, one row at a time.

The model knows 12 tokens, three of them special. Three contexts, two of them padded on the left, get eight thoughts each.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import plain_logits, plain_logp
from torch.testing import assert_close

import generate
import thoughts
from system import parallel
from system.config import ParallelConfig, RLPConfig
from thoughts import Sampling, Thoughts, prefill, sample, sample_thoughts, score_thoughts
from tools.gpu_check import Waits

THINK, CLOSE, END = 9, 10, 11
TAGS = (THINK, CLOSE)
TOKENIZER = SimpleNamespace(think=THINK, close=CLOSE, end=END, ends=(END,), tags=TAGS)
CONTEXTS = [[1, 2, 3, 4, 5, 6, 7], [8, 1, 8, 2, 8], [3, 0, 4]]
TARGETS = [[4, 2, 7], [1, 1, 0], [6, END, 8]]
G, N = 8, 6  # thoughts a context, longest thought
NEAR = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(params=["M-*", "M", "*"])
def model(request, make_model):
    return make_model(pattern=request.param)


def batch_of(contexts=CONTEXTS, targets=TARGETS, horizon=1, back=None):
    """Contexts of any lengths, padded with a token that would be noticed; back: of each, 0 if not given."""
    T = max([len(c) for c in contexts] + [n + 1 for n in back or []])
    return {
        "context_BT": torch.tensor([[7] * (T - len(c)) + c for c in contexts]),
        "ids_BT": torch.tensor([[-1] * (T - len(c)) + [0] * len(c) for c in contexts]),
        "target_BX": torch.tensor([t[:horizon] for t in targets]),
        "back_B": torch.tensor(back or [0] * len(contexts)),
    }


def think(model, contexts=CONTEXTS, targets=TARGETS, horizon=1, seed=0, forced_Rl=None, **changes) -> Thoughts:
    """`sample_thoughts`; changes are of Sampling."""
    sampling, generator = Sampling(G, N)._replace(**changes), torch.Generator().manual_seed(seed)
    return sample_thoughts(model, batch_of(contexts, targets, horizon), TOKENIZER, sampling, generator, forced_Rl)


def rows(thoughts):
    """For each thought: its row, its context and target, and its tokens."""
    for r, (tokens, n) in enumerate(zip(thoughts.tokens_RL.tolist(), thoughts.length_R.tolist(), strict=True)):
        yield r, CONTEXTS[r // G], TARGETS[r // G], tokens[:n]


@pytest.mark.parametrize("back", [0, 2, 20])
@pytest.mark.parametrize("longest", [1, 6])
def test_what_is_shown_is_the_thought_and_the_likeliest_tokens_behind_it(model, back, longest):
    """By plain passes over whole sequences; a thought that does not close itself is closed; the thought stands behind the
    first token at least."""
    tokenizer = SimpleNamespace(**vars(TOKENIZER), begin=(), encode=lambda s: [*map(int, s)], decode=tuple)
    config, prompt, closed = RLPConfig(thought_len=longest, temperature=1.0), CONTEXTS[0], set()
    for seed in range(6):
        shown = thoughts.show_thought(model, tokenizer, "".join(map(str, prompt)), config, seed, back)
        end = shown.index(CLOSE)
        assert shown[0] == THINK
        assert end <= longest + 1
        closed.add(end <= longest)
        split = len(prompt) - min(back, len(prompt) - 1)
        read, expected = [*prompt[:split], *shown[: end + 1], *prompt[split:]], []
        for _ in range(8):
            token = int(plain_logits(model, read, TAGS)[-1].argmax())
            if token == END:
                break
            expected.append(token)
            read.append(token)
        assert list(shown[end + 1 :]) == expected
    assert False in closed
    assert longest == 1 or True in closed


@torch.no_grad()
def one_row(found, r):
    """All that is known of thought r of context r, cut to its length."""
    n = int(found.length_R[r])
    return {name: t[r, :n] if name.endswith("L") else t[r] for name, t in vars(found).items()}


def greedy_thought(model, context):
    """The likeliest thought, the whole sequence run again for every token."""
    thought = []
    while len(thought) < N and not {CLOSE, END} & set(thought):
        thought.append(int(plain_logits(model, [*context, THINK, *thought], (THINK,))[-1].argmax()))
    return thought


# -------------------------------------------------------------------------------------------- sampled log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_of_a_thought_equals_a_full_forward_pass(model, temperature):
    """At the sampling temperature, <think> left out, and 0 past the thought's end."""
    thoughts = think(model, temperature=temperature)
    for r, context, _, thought in rows(thoughts):
        expected = plain_logp(model, [*context, THINK], thought, (THINK,), temperature)
        assert_close(thoughts.logp_RL[r, : len(thought)], expected, **NEAR)
        assert (thoughts.logp_RL[r, len(thought) :] == 0).all()


def test_what_an_fp64_model_thinks_stays_fp64(model):
    thoughts = think(model, horizon=3)
    assert {t.dtype for t in vars(thoughts).values() if t.is_floating_point()} == {torch.float64}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_of_forced_tokens_is_that_of_the_forced_tokens(model, temperature):
    thoughts = think(model, temperature=temperature, forced_Rl=torch.tensor([[3, 5]] * 3 * G))
    for r, context, _, thought in rows(thoughts):
        expected = plain_logp(model, [*context, THINK], thought, (THINK,), temperature)
        assert_close(thoughts.logp_RL[r, : len(thought)], expected, **NEAR)


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "unclosed"])
@pytest.mark.parametrize("horizon", [1, 3])
def test_logp_of_the_target_equals_a_full_forward_pass_after_the_thought(model, horizon, closed):
    """Both tags left out of the softmax; a thought that did not close itself is read in full, then closed."""
    thoughts = think(model, horizon=horizon)
    chosen = [row for row in rows(thoughts) if thoughts.closed_R[row[0]] == closed]
    assert chosen
    for r, context, target, thought in chosen:
        before = [*context, THINK, *thought] + ([] if closed else [CLOSE])
        expected = plain_logp(model, before, target[:horizon], TAGS).sum()
        assert_close(thoughts.logp_target_R[r], expected, **NEAR)


@pytest.mark.parametrize("horizon", [1, 3])
def test_answer_is_the_likeliest_token_at_each_place_of_the_target(model, horizon):
    thoughts = think(model, horizon=horizon)
    closed = [row for row in rows(thoughts) if thoughts.closed_R[row[0]]]
    assert closed
    for r, context, target, thought in closed:
        before = [*context, THINK, *thought]
        logits_TV = plain_logits(model, before + target[: horizon - 1], TAGS)[len(before) - 1 :]
        assert thoughts.answer_RX[r].tolist() == logits_TV.argmax(-1).tolist()


@pytest.mark.parametrize("horizon", [1, 3])
def test_plain_logp_equals_a_full_forward_pass_without_thought(model, horizon):
    thoughts = think(model, horizon=horizon)
    for b, (context, target) in enumerate(zip(CONTEXTS, TARGETS, strict=True)):
        assert_close(thoughts.logp_plain_B[b], plain_logp(model, context, target[:horizon], TAGS).sum(), **NEAR)


# ---------------------------------------------------------------------------------------------------- given thoughts

# Two a context: one that closes itself, at once or later; one that ends the text; ones that are cut at N tokens.
GIVEN = [[CLOSE], [3, 5, CLOSE], [1, 2, 3, 4, 5, 6], [0, END], [8, 8, 8, 8, 8, CLOSE], [END]]


def given(thoughts=GIVEN, width=N):
    """Filled up with closing tags."""
    return torch.tensor([c + [CLOSE] * (width - len(c)) for c in thoughts])


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_given_thoughts_are_scored_as_by_full_forward_passes(model, horizon):
    """Two thoughts for each context: log p of the target after each, closed where it is not, and the likeliest tokens."""
    logp_R, answer_RX = score_thoughts(model, batch_of(horizon=horizon), TOKENIZER, given())
    for r, thought in enumerate(GIVEN):
        before = [*CONTEXTS[r // 2], THINK, *thought] + [CLOSE] * (thought[-1] != CLOSE)
        target = TARGETS[r // 2][:horizon]
        assert_close(logp_R[r], plain_logp(model, before, target, TAGS).sum(), **NEAR)
        logits_TV = plain_logits(model, before + target[:-1], TAGS)[len(before) - 1 :]
        assert answer_RX[r].tolist() == logits_TV.argmax(-1).tolist()


@pytest.mark.parametrize("horizon", [1, 3])
def test_sampled_thoughts_are_scored_alike_while_sampled_and_when_given(model, horizon):
    thoughts = think(model, horizon=horizon)
    logp_R, answer_RX = score_thoughts(model, batch_of(horizon=horizon), TOKENIZER, thoughts.tokens_RL)
    assert_close(logp_R, thoughts.logp_target_R, **NEAR)
    assert_close(answer_RX, thoughts.answer_RX)


def test_the_width_of_given_thoughts_does_not_matter(model):
    narrow, wide = (score_thoughts(model, batch_of(horizon=2), TOKENIZER, given(width=n)) for n in (N, N + 5))
    assert_close(narrow, wide, **NEAR)


def test_gradients_of_scored_thoughts_are_those_of_plain_passes(model):
    batch = batch_of(horizon=2)
    score_thoughts(model, batch, TOKENIZER, given())[0].sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for r, thought in enumerate(GIVEN):
        before = [*CONTEXTS[r // 2], THINK, *thought] + [CLOSE] * (thought[-1] != CLOSE)
        tokens = before + TARGETS[r // 2][:2]
        logits_TV = model.logits(model(torch.tensor([tokens]))[0])[0].index_fill(-1, torch.tensor(TAGS), -torch.inf)
        logp_TV = logits_TV.log_softmax(-1)
        (logp_TV[len(before) - 1, tokens[-2]] + logp_TV[len(before), tokens[-1]]).backward()
    assert_close(found, {name: p.grad for name, p in model.named_parameters()}, rtol=1e-8, atol=1e-8)


# ------------------------------------------------------------------------- thoughts some tokens before their target

BACK = [
    ([0, 0, 0], CONTEXTS),
    ([3, 3, 3], CONTEXTS),  # the last context is all behind the thought: only padding is before it
    ([5, 5, 0], CONTEXTS),  # so is the second
    ([0, 2, 0], CONTEXTS),
    ([4, 0, 4], [[1, 2, 3, 4], [8, 1], [3, 0, 4, 2]]),  # only padding, in all rows
]


def with_thought(context, thought, back):
    """`context[:-back] <think> thought </think> context[-back:]`."""
    stands = len(context) - back
    return [*context[:stands], THINK, *thought, *[CLOSE] * (thought[-1] != CLOSE), *context[stands:]]


def padded(back, contexts, extra):
    """A batch with so many more places of padding in front."""
    batch = batch_of(contexts, TARGETS, 3, back)
    return {
        **batch,
        "context_BT": torch.nn.functional.pad(batch["context_BT"], (extra, 0), value=7),
        "ids_BT": torch.nn.functional.pad(batch["ids_BT"], (extra, 0), value=-1),
    }


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize(("back", "contexts"), BACK, ids=str)
def test_thoughts_are_read_where_they_stand_as_by_full_forward_passes(model, back, contexts, horizon):
    """Two thoughts for each context, rows with and without `back` in one batch: values, likeliest tokens, and the
    gradients of all weights. Another place for the thought would give other numbers."""
    weights = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logp_R, answer_RX = score_thoughts(model, batch_of(contexts, TARGETS, horizon, back), TOKENIZER, given())
    found = torch.autograd.grad(weights @ logp_R, model.parameters())
    expected, elsewhere = [], []
    for r, thought in enumerate(GIVEN):
        context, target = contexts[r // 2], TARGETS[r // 2][:horizon]
        for stands, values in ((back[r // 2], expected), (0, elsewhere)):
            before = with_thought(context, thought, stands)
            tokens = torch.tensor([before + target[:-1]])
            logits_TV = model.logits(model(tokens)[0])[0, len(before) - 1 :].index_fill(-1, torch.tensor(TAGS), -torch.inf)
            values.append(logits_TV.log_softmax(-1)[torch.arange(horizon), torch.tensor(target)].sum())
            if values is expected:
                assert answer_RX[r].tolist() == logits_TV.argmax(-1).tolist()
    expected_R, elsewhere_R = torch.stack(expected), torch.stack(elsewhere)
    assert_close(logp_R, expected_R, **NEAR)
    assert_close(found, torch.autograd.grad(weights @ expected_R, model.parameters()), rtol=1e-8, atol=1e-8)
    moved_R = torch.tensor(back).repeat_interleave(2) > 0
    assert ((expected_R - elsewhere_R).abs()[moved_R] > 1e-6).all()


@pytest.mark.parametrize(("back", "contexts"), BACK, ids=str)
def test_padding_in_front_changes_no_score_of_a_thought_that_stands_back(model, back, contexts):
    found = [score_thoughts(model, padded(back, contexts, extra), TOKENIZER, given()) for extra in (0, 1, 6)]
    assert_close(found[1], found[0], **NEAR)
    assert_close(found[2], found[0], **NEAR)


@pytest.mark.parametrize(("back", "contexts"), BACK, ids=str)
@pytest.mark.parametrize("horizon", [1, 3])
def test_sampled_thoughts_that_stand_back_are_scored_as_when_given(model, horizon, back, contexts):
    """They are sampled after the whole context, so they are those of a batch without `back`; and so is what is predicted
    without a thought."""
    batch = batch_of(contexts, TARGETS, horizon, back)
    found, plain = (
        sample_thoughts(model, b, TOKENIZER, Sampling(G, N), torch.Generator().manual_seed(0))
        for b in (batch, batch_of(contexts, TARGETS, horizon))
    )
    logp_R, answer_RX = score_thoughts(model, batch, TOKENIZER, found.tokens_RL)
    assert_close(found.logp_target_R, logp_R, **NEAR)
    assert_close(found.answer_RX, answer_RX)
    same = {name: t for name, t in vars(plain).items() if name not in ("logp_target_R", "answer_RX")}
    assert_close({name: getattr(found, name) for name in same}, same, **NEAR)
    moved_R = torch.tensor(back).repeat_interleave(G) > 0
    assert_close(found.logp_target_R[~moved_R], plain.logp_target_R[~moved_R], **NEAR)
    if any(back):
        assert (found.logp_target_R - plain.logp_target_R)[moved_R].abs().min() > 1e-9


def test_a_prefill_in_two_parts_ends_as_one_in_one_part(model):
    """What follows is the same whether the context was cut `back` tokens before its end or not."""
    whole, cut = (prefill(model, batch_of(back=back)) for back in ([0, 0, 0], [4, 4, 0]))
    assert_close(cut.hidden_BD, whole.hidden_BD, **NEAR)
    token_B1 = torch.tensor([[1], [2], [3]])
    assert_close(model(token_B1, cut.cache)[0], model(token_B1, whole.cache)[0], **NEAR)
    assert whole.early is whole.cache


# ------------------------------------------------------------------------------------------------- shapes of thoughts


def test_a_thought_ends_with_a_tag_or_end_of_text_or_at_its_longest(model):
    thoughts = think(model)
    for r, _, _, thought in rows(thoughts):
        assert not {CLOSE, END, THINK} & set(thought[:-1])
        assert thoughts.closed_R[r] == (thought[-1] == CLOSE)
        assert thought[-1] in (CLOSE, END) or len(thought) == N


def test_thoughts_end_in_all_three_ways_here(model):
    """Else the tests above would say less than they seem to."""
    ends = {thought[-1] if thought[-1] in (CLOSE, END) else len(thought) for *_, thought in rows(think(model))}
    assert ends == {CLOSE, END, N}


def test_past_its_end_a_thought_is_filled_with_closing_tags(model):
    thoughts = think(model)
    assert all((thoughts.tokens_RL[r, len(thought) :] == CLOSE).all() for r, *_, thought in rows(thoughts))


def test_a_thought_of_length_one_is_one_token(model):
    thoughts = think(model, thought_len=1)
    assert thoughts.tokens_RL.shape == thoughts.logp_RL.shape == (3 * G, 1)
    assert (thoughts.length_R == 1).all()
    assert thoughts.closed_R.tolist() == (thoughts.tokens_RL[:, 0] == CLOSE).tolist()


def test_thoughts_are_stored_as_wide_as_the_longest(model):
    thoughts = think(model, forced_Rl=torch.tensor([[3, CLOSE]] * 3 * G))
    assert thoughts.tokens_RL.shape == thoughts.logp_RL.shape == (3 * G, 2)


def test_forced_tokens_begin_every_thought(model):
    forced_Rl = torch.arange(3 * G * 2).view(3 * G, 2) % THINK
    assert think(model, forced_Rl=forced_Rl).tokens_RL[:, :2].tolist() == forced_Rl.tolist()


def test_greedy_thoughts_are_made_of_the_likeliest_tokens(model):
    for _, context, _, thought in rows(think(model, temperature=0.0)):
        assert thought == greedy_thought(model, context)


def test_thoughts_of_one_context_stand_in_a_row(model):
    """Greedy thoughts of one context are all the same."""
    logp_target_BG = think(model, temperature=0.0).logp_target_R.view(3, G)
    assert_close(logp_target_BG, logp_target_BG[:, :1].expand(3, G))
    assert len(set(logp_target_BG[:, 0].tolist())) == 3


def test_greedy_thoughts_do_not_depend_on_the_seed(model):
    first, second = (think(model, temperature=0.0, seed=seed) for seed in (0, 1))
    assert_close(vars(first), vars(second), rtol=0, atol=0)


def test_the_same_seed_gives_the_same_thoughts_and_another_seed_others(model):
    first, again, other = (think(model, seed=seed) for seed in (0, 0, 1))
    assert_close(vars(first), vars(again), rtol=0, atol=0)
    assert first.tokens_RL.tolist() != other.tokens_RL.tolist()


@pytest.fixture
def forced_Rl():
    """Thoughts that end after 5, 1, 6, 3, 2 and 4 tokens, one of them with the end of the text."""
    forced_Rl = torch.tensor([[1, 2, 3, 4, 5, 6][:n] + [CLOSE] + [0] * (5 - n) for n in (4, 0, 5, 2, 1, 3)])
    forced_Rl[5, 3] = END
    return forced_Rl


def test_finished_rows_leave_the_batch(model, forced_Rl):
    n_rows = []
    model.register_forward_hook(lambda module, args, output: n_rows.append(len(args[0])))
    think(model, CONTEXTS * 2, TARGETS * 2, group_size=1, forced_Rl=forced_Rl)
    assert n_rows == sorted(n_rows, reverse=True)
    assert n_rows[-1] == 1


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("back", [[0, 0, 0], [3, 0, 3]])
def test_thoughts_do_not_hang_on_how_often_finished_rows_are_looked_for(model, monkeypatch, horizon, back):
    """Each row has noise of its own, whoever else is still there; rows that are done and fed on change nothing."""
    found = []
    for every in (1, 2, 8):
        monkeypatch.setitem(thoughts.ASK_EVERY, "cpu", every)
        batch = batch_of(CONTEXTS, TARGETS, horizon, back)
        found.append(vars(sample_thoughts(model, batch, TOKENIZER, Sampling(G, N), torch.Generator().manual_seed(1))))
    assert len(set(found[0]["length_R"].tolist())) > 2
    for other in found[1:]:
        assert_close(other, found[0], **NEAR)


@pytest.mark.parametrize("horizon", [1, 3])
def test_a_card_is_waited_for_once_in_eight_tokens(make_model, monkeypatch, horizon):
    """Of 40 tokens: five times in the loop, and four around it: one tag each, thoughts' stand, longest, width."""
    model = make_model(pattern="*-")
    batch = batch_of(CONTEXTS, TARGETS, horizon)
    monkeypatch.setitem(thoughts.ASK_EVERY, "cpu", 8)
    forced_Rl = torch.full((3 * G, 40), 3)
    with Waits() as counted:
        found = sample_thoughts(model, batch, TOKENIZER, Sampling(G, 40), torch.Generator().manual_seed(0), forced_Rl)
    assert found.length_R.tolist() == [40] * 3 * G
    assert counted.n <= 40 // 8 + 4


def compiled_once(step):
    """In place of a CUDA graph: raises where the step is no single graph, and where a value of a token changes it."""

    def run():
        with torch._dynamo.config.patch(error_on_recompile=True):
            return one_graph()

    torch._dynamo.reset()
    one_graph = torch.compile(step, fullgraph=True, dynamic=False, backend="eager")
    return run


@pytest.mark.parametrize("recorder", [lambda step: step, compiled_once])
@pytest.mark.parametrize(("horizon", "back"), [(1, None), (3, [3, 0, 3])])
@pytest.mark.parametrize("changes", [{"pattern": "M-*"}, {"pattern": "*", "rope_theta": 100.0, "qk_norm": True}], ids=str)
def test_a_replayed_step_says_what_a_growing_cache_says(make_model, monkeypatch, changes, horizon, back, recorder):
    model, batch = make_model(**changes), batch_of(CONTEXTS, TARGETS, horizon, back)
    found = []
    for graphs in (False, True):
        monkeypatch.setattr(parallel.team, "settings", ParallelConfig(cuda_graphs=graphs))
        monkeypatch.setattr(thoughts, "record", recorder)
        found.append(vars(sample_thoughts(model, batch, TOKENIZER, Sampling(G, N), torch.Generator().manual_seed(1))))
    assert len(set(found[0]["length_R"].tolist())) > 2
    assert_close(found[1], found[0], **NEAR)


def test_a_step_is_recorded_once_after_a_first_one_and_waits_for_nothing(make_model, monkeypatch):
    """Two tokens of the same step take the same memory: recorded, they would be right wherever they run."""
    model, places, counts = make_model(pattern="M*"), [], []

    def record(step):
        counts.append(len(places))
        return step

    monkeypatch.setattr(thoughts, "record", record)
    with torch.no_grad():
        _, cache = model(torch.tensor([[1, 2, 3]]))
        growing = thoughts.Growing(model, cache.fork(4))
        decode = thoughts.Replayed(model, cache.fork(4), torch.arange(4), 5)
        for token in range(5):
            feed_R = torch.arange(4) + token
            with Waits() as counted:
                hidden_RD = decode(feed_R)
            assert counted.n == 0
            assert_close(hidden_RD, growing(feed_R), **NEAR)
            (tail, state), keys = decode.cache.layers
            places.append([t.data_ptr() for t in (tail, state, *keys.own[:2], decode.feed_R, decode.cache.n_tokens)])
    assert counts == [1]
    assert places == places[:1] * 5
    assert decode.cache.n_tokens.tolist() == [8]


def test_graphs_are_refused_without_a_card_and_for_models_of_another_make():
    with pytest.raises(ValueError, match=r"parallel.cuda_graphs needs a GPU, and this run is on cpu; leave it out"):
        parallel.start(ParallelConfig(cuda_graphs=True), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"replays a HybridLM, and this model is a SimpleNamespace"):
        thoughts.Replayed(SimpleNamespace(), None, torch.zeros(1), 1)


def test_a_thought_and_an_answer_end_with_any_of_the_tokens_that_end_a_text(model, monkeypatch):
    """Released models have several: here 5 too. Without it the thought would go on."""
    forced_Rl = torch.tensor([[3, 5, 3, 3, 3, 3]])
    assert think(model, CONTEXTS[:1], TARGETS[:1], group_size=1, forced_Rl=forced_Rl).length_R.tolist() == [6]
    monkeypatch.setattr(TOKENIZER, "ends", (END, 5))
    thoughts = think(model, CONTEXTS[:1], TARGETS[:1], group_size=1, forced_Rl=forced_Rl)
    assert thoughts.tokens_RL.tolist() == [[3, 5]]
    assert not thoughts.closed_R.any()


@pytest.mark.parametrize("horizon", [1, 3])
def test_dropping_finished_rows_changes_nothing(model, horizon, forced_Rl):
    """A batch of one row drops none."""
    contexts, targets = CONTEXTS * 2, TARGETS * 2
    together = think(model, contexts, targets, horizon, group_size=1, temperature=0.0, forced_Rl=forced_Rl)
    assert sorted(together.length_R.tolist()) == [1, 2, 3, 4, 5, 6]
    for r in range(6):
        one = slice(r, r + 1)
        alone = think(model, contexts[one], targets[one], horizon, group_size=1, temperature=0.0, forced_Rl=forced_Rl[one])
        assert_close(one_row(together, r), one_row(alone, 0), **NEAR)


# ------------------------------------------------------------------------------------------------- the program that talks


@pytest.fixture
def talked(monkeypatch):
    """What the program asks to be thought: a run's model or, by budget, the models of its family; .3, 5 tokens."""
    asked, settings = [], RLPConfig(temperature=0.3, thought_len=5, back=3)
    router = SimpleNamespace(choose=lambda budget: f"widths of {budget:g}", one_hot=lambda _: torch.ones(1))
    config = SimpleNamespace(rlp=settings)

    def show(model, tokenizer, prompt, c, seed, back, read):
        asked.append((model, prompt, c.temperature, c.thought_len, seed, back))
        assert read is None
        return ""

    monkeypatch.setattr(generate, "show_thought", show)
    monkeypatch.setattr(generate, "load_model", lambda run: ("all of it", None, settings))
    monkeypatch.setattr(generate, "load_family", lambda run: ("family", router, None, config))
    monkeypatch.setattr(generate, "submodel", lambda family, widths: f"{family}, {widths}")
    return asked


def test_a_prompt_that_is_not_utf8_is_asked_and_shown_with_replacement_characters(talked, capsys):
    """A command line holds such bytes as halves of surrogate pairs, which nothing can print."""
    assert generate.main(["run", b"H\xffm".decode("utf-8", "surrogateescape")]) == 0
    assert talked[0][1] == "H\ufffdm"
    assert capsys.readouterr().out == "H\ufffdm\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (0.3, 5, 0, 0)),
        (["--temperature", "0", "--seed", "7"], (0.0, 5, 7, 0)),
        (["--temperature", "2", "--thought-len", "9", "--back", "2"], (2.0, 9, 0, 2)),
    ],
)
def test_the_program_thinks_as_its_run_or_as_it_is_told(talked, words, expected):
    """Temperature, longest thought, seed and where the thought stands: right at the end, if it is not told."""
    assert generate.main(["run", "Hm", *words]) == 0
    assert talked == [("all of it", "Hm", *expected)]


def test_the_program_thinks_with_the_model_of_each_budget(talked):
    assert generate.main(["run", "Hm", "--budget", "1", "0.5"]) == 0
    assert [model for model, *_ in talked] == ["family, widths of 1", "family, widths of 0.5"]


# ----------------------------------------------------------------------------------------------------------- one token


def uniform(n):
    return torch.rand(n, 1, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("temperature", "banned"), list(itertools.product([1.0, 0.5, 2.0], [(), (1, 4)])))
def test_frequencies_of_sampled_tokens_match_the_softmax(temperature, banned):
    """With 20000 draws the standard error of a frequency is at most 0.0036."""
    logits_V = torch.tensor([0.0, 2.0, 1.0, -1.0, 0.5, 1.5])
    token_R, _ = sample(logits_V.expand(20000, 6), banned, temperature, uniform(20000))
    kept_V = logits_V.index_fill(0, torch.tensor(banned, dtype=torch.long), -torch.inf)
    assert_close(token_R.bincount(minlength=6) / 20000, (kept_V / temperature).softmax(-1), rtol=0, atol=0.015)


@pytest.mark.parametrize("share", [0.0, 0.3, 1 - 2**-24])
def test_a_token_of_probability_zero_is_never_drawn_from_150000(share):
    """Whatever the uniform number, and however fp32 rounds the sum: 300 ids can be drawn, never first or last."""
    logits_V = torch.full((150_000,), -torch.inf)
    logits_V[500::499] = torch.randn(300, generator=torch.Generator().manual_seed(0))
    token_R, logp_R = sample(logits_V.expand(3, -1), (0, 999), 1.0, torch.full((3, 1), share))
    assert logp_R.isfinite().all()
    assert ((token_R - 500) % 499 == 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_banned_tokens_are_never_drawn(temperature):
    logits_RV = torch.zeros(5000, 4)
    logits_RV[:, 2] = 50.0
    token_R, logp_R = sample(logits_RV, (0, 2), temperature, uniform(5000))
    assert set(token_R.tolist()) <= {1, 3}
    assert logp_R.isfinite().all()


@pytest.mark.parametrize(("temperature", "of_logp"), [(1.0, 1.0), (0.5, 0.5), (0.0, 1.0)])
def test_logp_of_a_sampled_token_is_at_its_temperature_and_for_greedy_at_one(temperature, of_logp):
    logits_RV = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    token_R, logp_R = sample(logits_RV, (3,), temperature, uniform(50))
    kept_RV = logits_RV.index_fill(1, torch.tensor([3]), -torch.inf) / of_logp
    assert_close(logp_R, kept_RV.log_softmax(-1)[torch.arange(50), token_R])


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--seed", "99999999999999999999", "must be 0 or more, and below"),
        ("--seed", "-1", "must be 0 or more, and below"),
        ("--temperature", "inf", "must be 0 (greedy), or"),
        ("--temperature", "1e-40", "must be 0 (greedy), or"),
    ],
)
def test_numbers_that_sampling_cannot_bear_are_refused_by_name(capsys, option, value, rule):
    assert generate.main(["nowhere", "hello", option, value]) == 2
    said = capsys.readouterr().err
    assert f"{option[2:]} (" in said
    assert rule in said


@pytest.mark.parametrize("value", [1e-40, 1e39])
def test_a_temperature_beyond_fp32_is_refused(value):
    """What is sampled there is the last token, with log p = NaN."""
    with pytest.raises(ValueError, match=r"rlp\.temperature"):
        RLPConfig(temperature=value).check("rlp")
