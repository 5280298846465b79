"""What the methods ask of a model (`model.LanguageModel`), proved by a model that shares nothing with HybridLM.

A GRU whose hidden state is its cache. Left padding leaves the state at zero; a document begins from zero again.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import elastic
import rlp
from kernels import token_logp
from system.config import ElasticConfig, RLPConfig
from system.objective import NextToken

EXACT = {"rtol": 1e-10, "atol": 1e-10}
THINK, CLOSE, END = 9, 10, 11
TOKENIZER = SimpleNamespace(think=THINK, close=CLOSE, end=END, ends=(END,), tags=(THINK, CLOSE))


@dataclasses.dataclass
class State:
    """A GRU's memory of each row, and the document that its last token is of."""

    state_BD: torch.Tensor
    ids_B: torch.Tensor

    def select(self, rows):
        return State(self.state_BD[rows], self.ids_B[rows])

    def fork(self, n):
        return self.select(torch.arange(len(self.state_BD)).repeat_interleave(n))


class GRU(nn.Module):
    """The smallest `LanguageModel`: an embedding, which also makes the logits, and one recurrent cell."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed, self.cell = nn.Embedding(config.vocab_size, config.width), nn.GRUCell(config.width, config.width)

    def forward(self, tokens_BT, cache=None, ids_BT=None):
        x_BTD = self.embed(tokens_BT)
        if cache is None:
            cache = State(torch.zeros_like(x_BTD[:, 0]), torch.zeros_like(tokens_BT[:, 0]))
        state_BD, last_B, hidden = cache.state_BD, cache.ids_B, []
        for t in range(tokens_BT.shape[1]):
            ids_B = last_B.clamp(min=0) if ids_BT is None else ids_BT[:, t]
            state_BD = self.cell(x_BTD[:, t], state_BD * (ids_B == last_B)[:, None]) * (ids_B >= 0)[:, None]
            last_B = ids_B
            hidden.append(state_BD)
        return torch.stack(hidden, dim=1), State(state_BD, last_B)

    def logits(self, hidden):
        return F.linear(hidden, self.output_matrix)

    @property
    def output_matrix(self):
        return self.embed.weight


@pytest.fixture
def model():
    return GRU(SimpleNamespace(vocab_size=12, width=8)).double()


@pytest.fixture
def contexts():
    """Two contexts, one of them padded, and the two tokens after each."""
    return {
        "context_BT": torch.tensor([[9, 9, 1, 2, 3], [4, 5, 6, 7, 8]]),
        "ids_BT": torch.tensor([[-1, -1, 0, 0, 0], [0] * 5]),
        "target_BX": torch.tensor([[1, 2], [3, 4]]),
        "kind_B": torch.tensor([1, 0]),
        "back_B": torch.tensor([2, 0]),
    }


def packed():
    """Two documents in each row; the last token of the first has no target."""
    tokens_BT = torch.arange(24).view(2, 12) % 9
    targets_BT = tokens_BT[:, 1:].clone()
    targets_BT[:, 3] = -100
    return {"tokens_BT": tokens_BT[:, :-1], "targets_BT": targets_BT, "ids_BT": torch.tensor([[0] * 4 + [1] * 7] * 2)}


def logits_alone(model, batch):
    """Logits at the places of `packed` that have a target, each document run without the other; and the targets."""
    hidden_BTD = torch.cat([model(part_BT)[0] for part_BT in batch["tokens_BT"].split([4, 7], dim=1)], dim=1)
    inside = batch["targets_BT"] != -100
    return hidden_BTD[inside] @ model.embed.weight.T, batch["targets_BT"][inside]


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def thoughts_of(prepared):
    """Of each thought its tokens, their log-probabilities when sampled, and whether it closed itself."""
    found = {**prepared, **vars(prepared.get("thoughts", SimpleNamespace()))}
    found = {name.rsplit("_", 1)[0]: value for name, value in found.items()}
    tokens, logp = found["tokens"], found["old_logp" if "old_logp" in found else "logp"]
    lengths = found["length"].tolist()
    rows = [(tokens[r, :n], logp[r, :n]) for r, n in enumerate(lengths)]
    return [(*row, bool(closed)) for row, closed in zip(rows, found["closed"], strict=True)]


def logp_of(model, text, target):
    """log p of the last tokens of one sequence, by one pass over all of it, without the tags in the softmax."""
    logits_BTV = model.logits(model(torch.cat([text, target])[None, :-1])[0])
    return token_logp(logits_BTV[0, -len(target) :], target, TOKENIZER.tags).sum()


def test_rlp_samples_rewards_and_trains_a_model_of_another_make(model, contexts):
    """What comes from caches, forked and selected, equals one pass over each sequence; so do the gradients of the loss."""
    objective = rlp.RLP(RLPConfig(group_size=3, thought_len=6, horizon=2, kl=0.1, temperature=0.7), TOKENIZER)
    prepared = objective.prepare(model, contexts, 0, torch.Generator().manual_seed(3))
    losses, closes = [], []
    for r, (thought, old_logp, closed) in enumerate(thoughts_of(prepared)):
        context, target = (contexts[name][r // 3] for name in ("context_BT", "target_BX"))
        context = context[contexts["ids_BT"][r // 3] >= 0]  # padding is as if it were not there
        text = torch.cat([context, torch.tensor([THINK]), thought])
        logits_BTV = model.logits(model(text[None, :-1])[0])
        logp = token_logp(logits_BTV[0, len(context) :], thought, (THINK,), 0.7)
        assert_close(logp, old_logp, **EXACT)
        losses.append(-prepared["advantage_R"][r] * logp.mean())
        closing = torch.tensor([] if closed else [CLOSE], dtype=torch.long)
        stands = len(context) - int(contexts["back_B"][r // 3])  # the text behind the thought follows it
        before = torch.cat([context[:stands], torch.tensor([THINK]), thought, closing, context[stands:]])
        gain = logp_of(model, before, target) - logp_of(model, context, target)
        assert_close(prepared["gain_R"][r], gain, **EXACT)
        closes.append(closed)
    assert set(closes) == {True, False}
    assert prepared["advantage_R"].abs().min() > 0
    loss, count, _ = objective.loss(model, prepared)
    assert count == 6
    assert_close(gradients(model, loss), gradients(model, sum(losses)), **EXACT)
    objective.after_step(model)


def test_next_token_prediction_trains_a_model_of_another_make(model):
    batch = packed()
    loss, count, _ = NextToken().loss(model, batch)
    expected = F.cross_entropy(*logits_alone(model, batch), reduction="sum")
    assert count == 20
    assert_close(loss, expected, **EXACT)
    assert_close(gradients(model, loss), gradients(model, expected), **EXACT)


def test_a_model_of_another_make_is_distilled_from_another(model):
    batch, teacher, c = packed(), GRU(model.config).double(), ElasticConfig(kl=1.0, ce=0.5, kl_temperature=2.0)
    loss, count, _ = elastic.Distillation(c, teacher).loss(model, batch)
    logits_TV, target_T = logits_alone(model, batch)
    wanted_TV = logits_alone(teacher, batch)[0].detach()
    divergence = F.kl_div((logits_TV / 2).log_softmax(-1), (wanted_TV / 2).softmax(-1), reduction="sum")
    expected = divergence + 0.5 * F.cross_entropy(logits_TV, target_T, reduction="sum")
    assert count == 20
    assert_close(loss, expected, **EXACT)
    assert_close(gradients(model, loss), gradients(model, expected), **EXACT)
