"""Batches: packed documents for next-token prediction, contexts for RLP.

A document is a window of text, or a problem: question, sometimes a thought between the think tags,
answer. The base reads worked thoughts mixed with unfinished ones and filler, so that it thinks
badly, as a real base does. RLP never sees a written thought.

Every batch is a function of (seed, step): resuming needs no state. Read `pretrain_batch` first.
Shapes: B sequences, T tokens, X tokens after a thought (rlp.horizon).
"""

import dataclasses
import random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from system.config import Config, RLPConfig
from text.corpus import Corpus
from text.problems import FAMILIES, Problem, draw_problem, filler, thought_for
from text.tokenizer import Tokenizer


def with_thought(tokenizer: Tokenizer, document: list[int], thought: str, t: int) -> list[int]:
    """The document with a thought, between its tags, before token t."""
    inside = [tokenizer.think, *tokenizer.encode(thought), tokenizer.close]
    return document[:t] + inside + document[t:]


def problem_tokens(tokenizer: Tokenizer, problem: Problem,
                   thought: str | None = None) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, with the thought if there is one, and of the answer with END."""
    prompt = tokenizer.encode(problem.prompt)
    if thought is not None:
        prompt = with_thought(tokenizer, prompt, thought, len(prompt))
    return prompt, [*tokenizer.encode(problem.answer), tokenizer.end]


class Stage(NamedTuple):
    """What a part of pretraining reads. All but the families are shares, from 0 to 1."""

    families: list[str]
    text: float  # of tokens that are ordinary text
    think: float  # of problem documents with a thought
    worked: float  # of those thoughts that are worked out
    text_think: float | None  # of text windows with a filler thought; None draws no random number


def stage_of(config: Config, step: int) -> Stage:
    """Families enter one by one, worked out, without text; all of them, worked out; the mixture."""
    fit, families = config.pretrain, list(FAMILIES)
    if step < fit.intro_share * fit.steps:
        n = 1 + int(len(families) * step / (fit.intro_share * fit.steps))
        return Stage(families[:n], text=0.0, think=1.0, worked=1.0, text_think=None)
    if step < fit.clean_share * fit.steps:
        return Stage(families, fit.clean_text_share, fit.clean_think, worked=1.0, text_think=None)
    return Stage(families, config.data.text_share, fit.think, fit.worked, fit.text_think)


def pretrain_batch(
    corpus: Corpus, config: Config, step: int, split: str = "train") -> dict[str, Tensor]:
    """Packed documents for next-token prediction: tokens_BT, targets_BT (-100 where none follows)
    and ids_BT (the document of each token, counted in its row).

    Each document is text if the batch has less text so far than its share, else a problem.
    """
    fit, stage, tokenizer = config.pretrain, stage_of(config, step), corpus.tokenizer
    rng = random.Random(f"pretrain-{config.seed}-{step}" + f"-{split}" * (split != "train"))
    tokens_BT = np.zeros((fit.batch, fit.seq_len + 1), dtype=np.int64)
    ids_BT = np.zeros_like(tokens_BT)
    n_text = n_all = 0  # tokens of the batch so far
    for row in range(fit.batch):
        n = i = 0  # tokens and documents of the row so far
        while n <= fit.seq_len:
            # 1. Text or problem: with the token to come, so that a share of 1 begins with text.
            is_text = n_text < stage.text * (n_all + 1)
            # 2. The document, with a thought or without.
            if is_text:
                document = corpus.text_window(rng, split, fit.seq_len).tolist()
                if stage.text_think is not None and rng.random() < stage.text_think:
                    document = with_thought(
                        tokenizer, document, filler(rng), rng.randrange(1, len(document) + 1))
            else:
                family = rng.choice(stage.families)
                problem = draw_problem(rng, split, corpus.held_out_percent, family)
                has_thought = rng.random() < stage.think
                thought = thought_for(problem, rng, stage.worked) if has_thought else None
                prompt, answer = problem_tokens(tokenizer, problem, thought)
                document = prompt + answer
            # 3. Into the row, as far as there is room.
            document = [*tokenizer.begin, *document][: fit.seq_len + 1 - n]
            tokens_BT[row, n : n + len(document)] = document
            ids_BT[row, n : n + len(document)] = i
            n, i = n + len(document), i + 1
            n_text, n_all = n_text + is_text * len(document), n_all + len(document)
    # 4. A target is the next token of the same document.
    tokens_BT, ids_BT = torch.from_numpy(tokens_BT), torch.from_numpy(ids_BT)
    targets_BT = tokens_BT[:, 1:].masked_fill(ids_BT[:, 1:] != ids_BT[:, :-1], -100)
    return {"tokens_BT": tokens_BT[:, :-1], "targets_BT": targets_BT, "ids_BT": ids_BT[:, :-1]}


def cpt_batch(corpus: Corpus, config: Config, step: int) -> dict[str, Tensor]:
    """`pretrain_batch` after the base's last step: the same mixture goes on, with new documents."""
    return mixture(corpus, config, step, config.cpt.batch, config.pretrain.seq_len)


def elastic_batch(corpus: Corpus, config: Config, step: int) -> dict[str, Tensor]:
    """The base's last mixture in short sequences, then (stage 2) in long ones.

    budget_B: the index in elastic.budgets that each sequence trains, drawn uniformly in stage 1, by
    elastic.long_weights in stage 2 (eq. 18 and 19).
    """
    c = config.elastic
    is_long = step >= c.stage_1_steps()
    n_rows, seq_len = (c.long_rows(), c.long_len) if is_long else (c.batch, c.seq_len)
    batch = mixture(corpus, config, step, n_rows, seq_len)
    weights = c.long_weights if is_long else [1.0] * len(c.budgets)
    rng = random.Random(f"budget-{config.seed}-{step}")
    drawn = rng.choices(range(len(c.budgets)), weights, k=n_rows)
    return {**batch, "budget_B": torch.tensor(drawn)}


def mixture(corpus: Corpus, config: Config, step: int, n_rows: int, seq_len: int,
            split: str = "train") -> dict[str, Tensor]:
    """Rows of the base's last mixture, `step` batches after its own end."""
    fit = dataclasses.replace(config.pretrain, batch=n_rows, seq_len=seq_len)
    config = dataclasses.replace(config, pretrain=fit)
    return pretrain_batch(corpus, config, fit.steps + step, split)


def rlp_batch(corpus: Corpus, config: Config, step: int) -> dict[str, Tensor]:
    """Contexts and the tokens that follow them (see `collate_contexts`), and is_text_B."""
    fit = config.rlp
    rng = random.Random(f"rlp-{config.seed}-{step}")
    is_text, pairs = [], []
    for _ in range(fit.batch):
        is_text.append(rng.random() < fit.text_share)
        pairs.append(text_position(corpus, fit, "train", rng) if is_text[-1] else
                     problem_position(corpus, fit, rng))
    batch = collate_contexts(corpus.tokenizer, [c for c, _ in pairs], [t for _, t in pairs], fit)
    return {**batch, "is_text_B": torch.tensor(is_text)}


def problem_position(
    corpus: Corpus, fit: RLPConfig, rng: random.Random) -> tuple[list[int], list[int]]:
    """Context and following tokens in a problem without a thought: at the answer, or anywhere."""
    problem = draw_problem(rng, "train", corpus.held_out_percent)
    prompt, answer = problem_tokens(corpus.tokenizer, problem)
    document = prompt + answer
    t = len(prompt) if fit.positions == "answer" else random_position(document, fit.horizon, rng)
    return document[:t], document[t : t + fit.horizon]


def text_position(
    corpus: Corpus, fit: RLPConfig, split: str, rng: random.Random) -> tuple[list[int], list[int]]:
    """Context and following tokens at a uniformly random position of the split's text."""
    _, context, target = corpus.documents[split].position(rng, fit.context_len, fit.horizon)
    return context.tolist(), target.tolist()


def random_position(document: list[int], horizon: int, rng: random.Random) -> int:
    """Uniform over the positions from 1 on that `horizon` tokens follow; over all if none does."""
    n_after = horizon if horizon < len(document) else 1
    return rng.randrange(1, len(document) - n_after + 1)


def collate_contexts(tokenizer: Tokenizer, contexts: list[list[int]], targets: list[list[int]],
                     fit: RLPConfig) -> dict[str, Tensor]:
    """context_BT (padded on the left), ids_BT (-1 at the padding, 0 elsewhere) and target_BX.

    A context longer than rlp.context_len loses its beginning; a target shorter than the horizon is
    filled up with END. Before each context stand what the tokenizer begins a document with and the
    instruction `rlp.prompt`, for thoughts and for predictions without one.
    """
    before = [*tokenizer.begin, *tokenizer.encode(fit.prompt)]
    contexts = [before + c[-fit.context_len :] for c in contexts]
    T = max(len(c) for c in contexts)
    context_BT = torch.full((len(contexts), T), tokenizer.end)
    ids_BT = torch.full((len(contexts), T), -1)
    for i, c in enumerate(contexts):
        context_BT[i, T - len(c) :] = torch.tensor(c)
        ids_BT[i, T - len(c) :] = 0
    target_BX = torch.tensor([(t + [tokenizer.end] * fit.horizon)[: fit.horizon] for t in targets])
    return {"context_BT": context_BT, "ids_BT": ids_BT, "target_BX": target_BX}
