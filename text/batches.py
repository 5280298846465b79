"""Batches: packed documents for next-token prediction, contexts for RLP.

A document is a window of text; one with results that must be computed; or a problem: question,
sometimes a thought between the think tags, answer. First the base reads worked thoughts. Then, in
the warm-up, good ones mixed with poor ones, so that it thinks badly, as a real base does, and
learns to go on after any of them. RLP never sees a written thought.

Every batch is a function of (seed, step): resuming needs no state. Read `pack` first.
Shapes: B sequences, T tokens, X tokens after a thought (rlp.horizon).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from system.config import Config, RLPConfig
from text.computed import Computed, draw_computed
from text.corpus import Corpus
from text.problems import Problem, any_level, draw_problem, filler, some_of, thought_for, unworked
from text.tokenizer import Tokenizer

# ------------------------------------------------------------------------------ documents to read

Marked = list[tuple[int, bool]] | np.ndarray  # tokens, and whether each is to be predicted


def all_wanted(tokens_T: np.ndarray) -> np.ndarray:
    """All tokens are to be predicted: [T, 2]."""
    return np.stack((tokens_T.astype(np.int64), np.ones(len(tokens_T), dtype=np.int64)), axis=1)


def place_thoughts(tokenizer: Tokenizer, document: list[int], thoughts: dict[int, list[int]],
                   back: int = 0) -> Marked:
    """The document with thoughts: the one for token t, between its tags, before token t - back.
    If that is not token t itself, nobody can foretell a thought that has read the tokens up to t:
    it is there to be read, and not to be predicted. An opening tag never is."""
    found: Marked = []
    for i, token in enumerate(document):
        if (thought := thoughts.get(i + back)) is not None:
            found += [(tokenizer.think, False)]
            found += [(inside, back == 0) for inside in (*thought, tokenizer.close)]
        found.append((token, True))
    return found


def problem_tokens(tokenizer: Tokenizer, problem: Problem) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer with END."""
    return tokenizer.encode(problem.prompt), [*tokenizer.encode(problem.answer), tokenizer.end]


def problem_document(tokenizer: Tokenizer, problem: Problem, thought: str | None,
                     foretell: bool = True) -> Marked:
    """Prompt, thought if there is one, answer. The prompt is to be predicted only if `foretell`."""
    prompt, answer = problem_tokens(tokenizer, problem)
    thoughts = {} if thought is None else {0: tokenizer.encode(thought)}
    return [(t, foretell) for t in prompt] + place_thoughts(tokenizer, answer, thoughts)


def recalled(document: list[int], n: int = 2, ahead: int = 2) -> dict[int, list[int]]:
    """What a thought may quote of a text, by place: where its last n tokens stood before, these and
    the `ahead` tokens that followed the last time, as far as they had been read."""
    seen, found = {}, {}
    for t in range(n, len(document)):
        last = tuple(document[t - n : t])
        if (i := seen.get(last)) is not None:
            found[t] = document[i - n : min(i + ahead, t)]
        seen[last] = t
    return found


def computed_tokens(
    tokenizer: Tokenizer, found: Computed) -> tuple[list[int], dict[int, list[int]]]:
    """Token ids of a computed document, and by the places of its results their worked thoughts."""
    document, worked = [], {}
    for text, thought in found.pieces:
        if thought:
            worked[len(document)] = tokenizer.encode(thought)
        document += tokenizer.encode(text)
    return [*document, tokenizer.end], worked


def pack(n_rows: int, seq_len: int, shares: dict[str, float],
         draw: Callable[[str], Marked], begin: tuple[int, ...]) -> dict[str, Tensor]:
    """Rows of documents: tokens_BT, targets_BT (-100 where none follows) and ids_BT (the document
    of each token, counted in its row). `draw` makes a document of a kind; the next one is of the
    kind that lacks most of its share of the batch's tokens."""
    tokens_BT = np.zeros((n_rows, seq_len + 1), dtype=np.int64)
    ids_BT, wanted_BT = np.zeros_like(tokens_BT), np.zeros(tokens_BT.shape, dtype=bool)
    begin_T2 = np.array([(token, True) for token in begin], dtype=np.int64).reshape(-1, 2)
    n_tokens = dict.fromkeys(shares, 0)  # of each kind so far
    for row in range(n_rows):
        n = i = 0  # tokens and documents of the row so far
        while n <= seq_len:
            # 1. The kind: with the token to come, so that a share of 1 begins.
            n_next = sum(n_tokens.values()) + 1
            kind = max(shares, key=lambda k: shares[k] * n_next - n_tokens[k])
            # 2. The document, into the row as far as there is room.
            document_T2 = np.concatenate([begin_T2, draw(kind)])[: seq_len + 1 - n]
            place = slice(n, n + len(document_T2))
            tokens_BT[row, place], wanted_BT[row, place] = document_T2.T
            ids_BT[row, place] = i
            n, i = n + len(document_T2), i + 1
            n_tokens[kind] += len(document_T2)
    # 3. A target is the next token of the same document, if it is to be predicted.
    tokens_BT, ids_BT, wanted_BT = map(torch.from_numpy, (tokens_BT, ids_BT, wanted_BT))
    other = (ids_BT[:, 1:] != ids_BT[:, :-1]) | ~wanted_BT[:, 1:]
    targets_BT = tokens_BT[:, 1:].masked_fill(other, -100)
    return {"tokens_BT": tokens_BT[:, :-1], "targets_BT": targets_BT, "ids_BT": ids_BT[:, :-1]}


def shares_of(config: Config) -> dict[str, float]:
    """Of the tokens of the warm-up's mixture, by kind of document that it has."""
    text, computed = config.data.text_share, config.warmup.computed_share
    shares = {"text": text, "computed": computed, "problem": 1 - text - computed}
    return {kind: share for kind, share in shares.items() if share > 1e-9}


def pretrain_batch(corpus: Corpus, config: Config, step: int) -> dict[str, Tensor]:
    """The first family alone, then all of them and text. Thoughts are worked. Questions are read,
    not predicted: nobody can foretell the names and numbers that they draw, and to try drowns what
    little there is to learn from the steps of a thought."""
    fit, tokenizer, percent = config.pretrain, corpus.tokenizer, corpus.held_out_percent
    rng = random.Random(f"pretrain-{config.seed}-{step}")
    intro = step < fit.intro_share * fit.steps and config.data.text_share < 1
    families = list(corpus.families)

    def draw(kind: str) -> Marked:
        if kind == "text":
            return all_wanted(corpus.documents["train"].window(rng, fit.seq_len))
        family = families[0] if intro else rng.choice(families)
        problem = draw_problem(rng, "train", percent, corpus.families, family)
        thought = problem.thought if rng.random() < fit.think else None
        return problem_document(tokenizer, problem, thought, foretell=False)

    text = config.data.text_share
    shares = {"problem": 1.0} if intro else {"text": text, "problem": 1 - text}
    return pack(fit.batch, fit.seq_len, shares, draw, tokenizer.begin)


def warmup_batch(corpus: Corpus, config: Config, step: int) -> dict[str, Tensor]:
    """All kinds of documents, with thoughts of all kinds."""
    return mixture(corpus, config, step, config.warmup.batch, config.warmup.seq_len)


def mixture(corpus: Corpus, config: Config, step: int, n_rows: int, seq_len: int,
            split: str = "train", levels: Sequence[str] = ()) -> dict[str, Tensor]:
    """Rows of what the base reads last.

    Thoughts of problems are worked, stop half-way or are filler. In half of the other documents
    they stand before the token that they are for, to learn what to think; in the others
    `rlp.back` tokens before it, to learn to go on after them. Those for a result, and those that
    quote (`warmup.recall`), are of the same kinds as those of problems; elsewhere they are empty or
    filler. Without `warmup.gap` there are none in the other documents.
    """
    fit, tokenizer, percent = config.warmup, corpus.tokenizer, corpus.held_out_percent
    rng = random.Random(f"warmup-{config.seed}-{step}" + f"-{split}" * (split != "train"))

    def draw(kind: str) -> Marked:
        if kind == "problem":
            families = any_level(corpus.families, levels, rng)
            problem = draw_problem(rng, split, percent, families)
            has_thought = rng.random() < fit.think
            return problem_document(
                tokenizer, problem, thought_for(problem, rng, fit.worked) if has_thought else None)
        if kind == "text":
            window = corpus.documents[split].window(rng, seq_len)
            if not fit.gap:
                return all_wanted(window)
            document = window.tolist()
            worked, often = recalled(document) if fit.recall else {}, fit.recall
        else:
            document, worked = computed_tokens(tokenizer, draw_computed(rng, split, percent))
            often = 0.75
        # Places about `gap` tokens apart, three of four results, and where text repeats.
        if not fit.gap:
            return [(t, True) for t in document]
        thoughts, t = {}, rng.randrange(2 * fit.gap)
        while t < len(document):
            thoughts[t] = [] if rng.random() < 0.85 else tokenizer.encode(filler(rng))
            t += rng.randrange(1, 2 * fit.gap)
        for t, thought in worked.items():
            if rng.random() < often:
                some = some_of(thought, rng, fit.worked)
                thoughts[t] = tokenizer.encode(filler(rng)) if some is None else some
        return place_thoughts(tokenizer, document, thoughts, rng.choice((0, config.rlp.back)))

    return pack(n_rows, seq_len, shares_of(config), draw, tokenizer.begin)


def cpt_batch(corpus: Corpus, config: Config, step: int) -> dict[str, Tensor]:
    """The warm-up's mixture goes on, with new documents; see `cpt.thoughts`."""
    fit, seq_len = config.cpt, config.warmup.seq_len
    if not fit.thoughts:
        config = replace(config, warmup=replace(config.warmup, think=0.0, gap=0))
    return mixture(corpus, config, config.warmup.steps + step, fit.batch, seq_len,
                   levels=unworked(config.rlp))


def sft_batch(corpus: Corpus, config: Config, step: int) -> dict[str, Tensor]:
    """Problems with their worked thoughts, to predict thought and answer."""
    tokenizer, percent = corpus.tokenizer, corpus.held_out_percent
    rng = random.Random(f"sft-{config.seed}-{step}")

    def draw(_: str) -> Marked:
        problem = draw_problem(rng, "train", percent, corpus.families)
        return problem_document(tokenizer, problem, problem.thought, foretell=False)

    return pack(config.sft.batch, config.warmup.seq_len, {"problem": 1.0}, draw, tokenizer.begin)


def elastic_batch(corpus: Corpus, config: Config, step: int) -> dict[str, Tensor]:
    """The base's last mixture in short sequences, then (stage 2) in long ones.

    budget_B: the index in elastic.budgets that each sequence trains, drawn uniformly in stage 1, by
    elastic.long_weights in stage 2 (eq. 18 and 19): `elastic.draws` of them, over and over, so that
    every part of a batch has the same ones. With elastic.together each sequence trains several:
    drawn_Bk are, in every row, those between the largest and the least, if not all of them train.
    """
    c = config.elastic
    is_long = step >= c.stage_1_steps()
    n_rows, seq_len = (c.long_rows(), c.long_len) if is_long else (c.batch, c.seq_len)
    batch = mixture(corpus, config, config.warmup.steps + step, n_rows, seq_len)
    among = c.between(step) if c.together else dict(enumerate(c.budget_weights(step)))
    if not among:
        return batch
    rng = random.Random(f"budget-{config.seed}-{step}")
    drawn = torch.tensor(rng.choices(list(among), list(among.values()), k=c.draws))
    return {**batch, **({"drawn_Bk": drawn.expand(n_rows, -1)} if c.together else
                        {"budget_B": drawn.repeat(n_rows // c.draws)})}


# ----------------------------------------------------------------------- contexts to think about

KINDS = ("problems", "text", "computed")  # of documents, in the order of `kind_B`


class Position(NamedTuple):
    """A place in a document: what stands before it, what follows, and which document it is."""

    context: list[int]
    target: list[int]
    document: int = 0  # positions of one document are not independent
    back: int = 0  # tokens of the context that the thought stands before (`rlp.back`)


def rlp_batch(corpus: Corpus, config: Config, step: int) -> dict[str, Tensor]:
    """Contexts, the tokens that follow them (see `collate_contexts`), and kind_B."""
    fit = config.rollouts()
    rng = random.Random(f"{config.mode}-{config.seed}-{step}")
    shares = [1 - fit.text_share - fit.computed_share, fit.text_share, fit.computed_share]
    kinds = rng.choices(range(len(KINDS)), shares, k=fit.batch)
    positions = [POSITIONS[KINDS[kind]](corpus, fit, "train", rng) for kind in kinds]
    return {**collate_contexts(corpus.tokenizer, positions, fit), "kind_B": torch.tensor(kinds)}


def problem_position(corpus: Corpus, fit: RLPConfig, split: str, rng: random.Random) -> Position:
    """In a problem without a thought: at the answer, or anywhere."""
    families = any_level(corpus.families, unworked(fit), rng)
    problem = draw_problem(rng, split, corpus.held_out_percent, families)
    prompt, answer = problem_tokens(corpus.tokenizer, problem)
    if fit.positions == "random":
        return random_position(prompt + answer, fit, rng)
    return Position(prompt, answer[: fit.horizon])


def text_position(corpus: Corpus, fit: RLPConfig, split: str, rng: random.Random) -> Position:
    """At a uniformly random token of the split's text."""
    document, context, target = corpus.documents[split].position(rng, fit.context_len, fit.horizon)
    back = fit.back if len(context) >= fit.back else 0
    return Position(context.tolist(), target.tolist(), document, back)


def computed_position(corpus: Corpus, fit: RLPConfig, split: str, rng: random.Random) -> Position:
    """At a uniformly random token of a computed document."""
    found = draw_computed(rng, split, corpus.held_out_percent)
    return random_position(computed_tokens(corpus.tokenizer, found)[0], fit, rng)


def random_position(document: list[int], fit: RLPConfig, rng: random.Random) -> Position:
    """Uniform over the tokens that `horizon` tokens follow and `back` tokens stand before, at least
    one; in a document too short for that, over those from 1 on."""
    n_after = fit.horizon if fit.horizon < len(document) else 1
    last = len(document) - n_after
    t = rng.randint(max(1, fit.back) if fit.back <= last else 1, last)
    return Position(document[:t], document[t : t + fit.horizon], back=fit.back * (t >= fit.back))


POSITIONS = {"problems": problem_position, "text": text_position, "computed": computed_position}


def collate_contexts(
    tokenizer: Tokenizer, positions: list[Position], fit: RLPConfig) -> dict[str, Tensor]:
    """context_BT (padded on the left), ids_BT (-1 at the padding, 0 elsewhere), target_BX, back_B.

    A context longer than rlp.context_len loses its beginning; a target shorter than the horizon
    ends with END and is filled up with -100, which counts for nothing. Before each context stand
    what the tokenizer begins a document with and the instruction `rlp.prompt`, for thoughts and for
    predictions without one. back_B counts tokens: 0, or the same number in all other rows.
    """
    before = [*tokenizer.begin, *tokenizer.encode(fit.prompt)]
    contexts = [before + p.context[-fit.context_len :] for p in positions]
    T = max(*(len(c) for c in contexts), *(p.back + 1 for p in positions))
    context_BT = torch.full((len(contexts), T), tokenizer.end)
    ids_BT = torch.full((len(contexts), T), -1)
    for i, c in enumerate(contexts):
        context_BT[i, T - len(c) :] = torch.tensor(c)
        ids_BT[i, T - len(c) :] = 0
    ends = ([tokenizer.end] * (p.target[-1:] != [tokenizer.end]) for p in positions)
    target_BX = torch.tensor([[*p.target, *end, *[-100] * fit.horizon][: fit.horizon]
                              for p, end in zip(positions, ends, strict=True)])
    back_B = torch.tensor([p.back for p in positions])
    return {"context_BT": context_BT, "ids_BT": ids_BT, "target_BX": target_BX, "back_B": back_B}
