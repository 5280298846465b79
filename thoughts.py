"""Decoding: prefill a context once, fork its cache, sample thoughts, read what they make of the
next token.

`sample_thoughts` is the rollout of RLP. After a context x_<t it forces `<think>`, samples up to M
tokens for each of G thoughts, closes them, and reads log p(x_t | x_<t, c) from the decode state
that the closing tag leaves behind: scoring a thought costs no forward pass of its own. Rows that
are done leave the batch.

As a program, `python generate.py RUN "prompt"` talks to a trained model, or to one of Hugging Face,
and shows its thought.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import mask_banned, token_logp, wide
from model import Cache, HybridLM
from text.tokenizer import Tokenizer

# Where a row stands: sampling; ended without a closing tag, its last token being fed; the tag being
# fed; scored.
THINKING, CUT, CLOSING, DONE = range(4)


@dataclass
class Thoughts:
    """R = B G thoughts, those of one context in a row; M = the longest thought, X = the horizon."""

    tokens_RM: (
        Tensor  # sampled ids; past a thought's end they are the closing tag and count for nothing
    )
    logp_RM: Tensor  # log-probability of each at the sampling temperature, 0 past the end
    length_R: Tensor  # how many were sampled, at least 1
    closed_R: Tensor  # whether the thought closed itself; the others were closed for scoring, without reward or blame
    logp_target_R: Tensor  # log p(target | context, thought), summed over the horizon, at temperature 1, in nats
    answer_RX: Tensor  # most likely tokens after the thought, over the horizon
    logp_plain_B: Tensor  # log p(target | context) without a thought, from the same prefill
    answer_plain_BX: Tensor  # most likely tokens without a thought


@torch.no_grad()
def sample_thoughts(model: HybridLM, context_BT: Tensor, ids_BT: Tensor, target_BX: Tensor,
                    tags: tuple[int, int], end: int, group_size: int, thought_len: int,
                    temperature: float = 1.0, generator: torch.Generator | None = None,
                    forced_RY: Tensor | None = None) -> Thoughts:
    """Sample G thoughts for each context and score the target after each of them.

    Args: context_BT, ids_BT: contexts padded on the left (ids -1); target_BX: the observed next
    tokens, X the horizon; tags: ids of <think> and </think>; end: id of end-of-text, which ends a
    thought too; temperature: 0 means greedy; generator: source of randomness; forced_RY: ids that
    each thought begins with (to try out a style).
    Returns: Thoughts. Targets are teacher forced and scored at temperature 1, without the tags in
    the softmax.
    """
    B, X = target_BX.shape
    R, device = B * group_size, context_BT.device
    think, close = tags
    logp_plain_B, answer_plain_BX, cache = score_context(model, context_BT, ids_BT, target_BX, tags)
    cache = cache.fork(group_size)
    tokens_RM = torch.full((R, thought_len), close, device=device)
    logp_RM = logp_plain_B.new_zeros(R, thought_len)
    length_R = torch.zeros(R, dtype=torch.long, device=device)
    closed_R = torch.zeros(R, dtype=torch.bool, device=device)
    logp_target_R = logp_plain_B.new_zeros(R)
    answer_RX = torch.zeros(R, X, dtype=torch.long, device=device)

    rows = torch.arange(
        R, device=device)  # the rows in the batch, what each is fed next, and how far each has come
    feed = torch.full((R,), think, device=device)
    phase = torch.full((R,), THINKING, device=device)
    for step in range(thought_len + 2):
        hidden, cache = model(feed[:, None], cache)
        hidden = hidden[:, 0]
        closing = phase == CLOSING
        if closing.any():
            at, live = rows[closing], closing.nonzero()[:, 0]
            kept = cache.select(live) if X > 1 else None
            scored = score_targets(model, hidden[live], kept, target_BX[at // group_size], tags)
            logp_target_R[at], answer_RX[at] = scored
            phase = phase.masked_fill(closing, DONE)
        busy = phase < CLOSING
        if not busy.any():
            break
        if busy.sum() <= 0.8 * len(
            rows):  # dropping rows copies the cache: it pays once a fifth of them is done
            live = busy.nonzero()[:, 0]
            rows, hidden, phase, cache = rows[live], hidden[live], phase[live], cache.select(live)
        logits = model.logits(hidden)
        token, logp = sample(logits, (think,), temperature, generator)
        if forced_RY is not None and step < forced_RY.shape[1]:
            token = forced_RY[rows, step]
            logp = token_logp(logits, token, (think,), temperature or 1.0)
        thinking, was_cut = phase == THINKING, phase == CUT
        at, place = (rows[thinking],
                     min(step, thought_len - 1))  # past the last place no row is thinking any more
        tokens_RM[at, place], logp_RM[at, place] = token[thinking], logp[thinking].to(logp_RM.dtype)
        length_R[at] += 1
        closed = thinking & (token == close)
        closed_R[rows[closed]] = True
        phase = phase.masked_fill(thinking & ((token == end) | (step == thought_len - 1)), CUT)
        phase = phase.masked_fill(closed | was_cut, CLOSING)
        feed = token.masked_fill(phase == CLOSING, close)
    M = int(length_R.max())
    return Thoughts(tokens_RM[:, :M], logp_RM[:, :M], length_R, closed_R, logp_target_R, answer_RX,
                    logp_plain_B, answer_plain_BX)


@torch.no_grad()
def score_context(
    model: HybridLM, context_BT: Tensor, ids_BT: Tensor, target_BX: Tensor, tags: tuple[int, int]
) -> tuple[Tensor, Tensor, Cache]:
    """Run the contexts and score what follows them, without a thought: what `score_targets`
    returns, and the cache."""
    hidden_BTD, cache = model(context_BT, ids_BT=ids_BT)
    return *score_targets(model, hidden_BTD[:, -1], cache, target_BX, tags), cache


@torch.no_grad()
def score_targets(model: HybridLM, hidden_BD: Tensor, cache: Cache | None, target_BX: Tensor,
                  tags: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """log p(target) after a state that has been reached, summed over the horizon, and the likeliest
    token at each place.

    The first target is read from `hidden_BD`; the others are teacher forced from the cache (unused
    when X = 1). The think tags are left out of the softmax: a model that likes to think would else
    seem to predict the text badly.
    """
    hidden_BXD = hidden_BD[:, None]
    if target_BX.shape[1] > 1:
        rest, _ = model(target_BX[:, :-1], cache)
        hidden_BXD = torch.cat([hidden_BXD, rest], dim=1)
    logits_BXV = mask_banned(model.logits(hidden_BXD), tags)
    return token_logp(logits_BXV, target_BX).sum(-1), logits_BXV.argmax(-1)


def sample(logits_RV: Tensor, banned: tuple[int, ...], temperature: float,
           generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A token per row from softmax(logits / temperature) without the banned ids, and its
    log-probability there.

    Temperature 0 takes the likeliest token, with its log-probability at temperature 1. Sampling
    divides the probabilities by exponential noise and takes the largest: one pass, and exact.
    """
    logp_RV = torch.log_softmax(
        mask_banned(wide(logits_RV), banned) / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token_R = logp_RV.argmax(-1)
    else:
        noise_RV = torch.empty_like(logp_RV).exponential_(generator=generator)
        token_R = (logp_RV.exp() / noise_RV).argmax(-1)
    return token_R, logp_RV.gather(-1, token_R[:, None])[:, 0]


def show_thoughts(model: HybridLM, tokenizer: Tokenizer, prompts: list[str], thought_len: int,
                  temperature: float, seed: int, n_after: int = 8, before: str = "") -> list[str]:
    """For each prompt the text `<think> thought </think> continuation`, the continuation greedy and
    up to end-of-text.

    Args: before: text that the model reads before each prompt (`rlp.prompt`).
    """
    texts = []
    for prompt in prompts:
        device = next(model.parameters()).device
        ids = [*tokenizer.begin, *tokenizer.encode(before), *tokenizer.encode(prompt)]
        context_BT = torch.tensor([ids], device=device)
        generator = torch.Generator(device).manual_seed(seed)
        dummy_BX = torch.full((1, 1), tokenizer.end, device=device)
        t = sample_thoughts(model, context_BT, torch.zeros_like(context_BT), dummy_BX,
                            tokenizer.tags, tokenizer.end, 1, thought_len, temperature, generator)
        thought = t.tokens_RM[0, : int(t.length_R[0])].tolist()
        if not bool(t.closed_R[0]):
            thought.append(tokenizer.close)
        so_far = context_BT[0].tolist() + [tokenizer.think, *thought]
        after = continue_greedily(model, torch.tensor([so_far], device=device), tokenizer, n_after)
        texts.append(tokenizer.decode([tokenizer.think, *thought, *after]))
    return texts


@torch.no_grad()
def continue_greedily(
    model: HybridLM, tokens_BT: Tensor, tokenizer: Tokenizer, n: int) -> list[int]:
    """Up to n likeliest next tokens of one sequence, without think tags, stopping at
    end-of-text."""
    hidden_BTD, cache = model(tokens_BT)
    out: list[int] = []
    while len(out) < n:
        token = int(mask_banned(model.logits(hidden_BTD[:, -1]), tokenizer.tags).argmax())
        if token == tokenizer.end:
            break
        out.append(token)
        hidden_BTD, cache = model(torch.tensor([[token]], device=tokens_BT.device), cache)
    return out
