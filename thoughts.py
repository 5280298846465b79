"""Thoughts: prefill a context once, fork its cache, sample G thoughts, score what follows them.

`sample_thoughts` is the rollout of RLP. After a context x_<t it feeds `<think>`, samples up to L
tokens for each of G thoughts, closes them, and reads log p(x_t | x_<t, c) from the state behind the
closing tag: scoring costs no forward pass of its own, but where thoughts of the batch stand some
tokens before their target. Rows that are done leave the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import mask_banned, token_logp, wide
from model import Cache, LanguageCache, LanguageModel
from system import parallel
from system.config import RLPConfig
from system.errors import require
from text.tokenizer import Tokenizer


class Sampling(NamedTuple):
    """How thoughts are sampled."""

    group_size: int  # thoughts of a context, G
    thought_len: int  # longest thought in tokens, L
    temperature: float = 1.0  # 0 takes the likeliest tokens


@dataclass
class Thoughts:
    """R = B G thoughts, those of one context in a row; L tokens of the longest, X of the target."""

    tokens_RL: Tensor  # sampled ids; past a thought's end closing tags, which count for nothing
    logp_RL: Tensor  # log-probability of each at the sampling temperature, 0 past the end
    length_R: Tensor  # how many were sampled, at least 1
    closed_R: Tensor  # whether the thought closed itself; if not, it was closed to score the target
    logp_target_R: Tensor  # log p(target | context, thought) in nats, summed over the target
    answer_RX: Tensor  # likeliest token at each place of the target, after the thought
    logp_plain_B: Tensor  # log p(target | context) without a thought, from the same prefill
    answer_plain_BX: Tensor  # likeliest tokens without a thought


# Where a row stands: it samples; it ended without a closing tag, and is fed its last token; from 0
# on it has been fed the tag and so many tokens of the target, and reads the next one.
THINKING, CUT = -2, -1
ASK_EVERY = {"cpu": 1}  # tokens after which rows that are done are dropped; a card has to be asked


@torch.no_grad()
def sample_thoughts(model: LanguageModel, batch: dict[str, Tensor], tokenizer: Tokenizer,
                    sampling: Sampling, generator: torch.Generator | None = None,
                    forced_Rl: Tensor | None = None, prefix: "Prefix | None" = None) -> Thoughts:
    """Sample G thoughts for each context and score the target after each of them.

    Nothing in the loop hangs on a value but how many rows are done. A card is asked for that at
    every eighth token alone, for it must be waited for; until then rows that are done are fed on,
    and what they say counts for nothing. No other row's noise hangs on that.

    Args: batch: context_BT and ids_BT, padded on the left (ids -1), and target_BX, the observed
    next tokens (see `collate_contexts`); tokenizer: for its tags and end-of-text, which ends a
    thought too; forced_Rl: tokens that each thought begins with, to try out a style; prefix: that
    of `prefill`, if it was run.
    """
    G, L, temperature = sampling
    target_BX, think, close = batch["target_BX"], tokenizer.think, tokenizer.close
    (B, X), device = target_BX.shape, target_BX.device
    R, ends = B * G, torch.tensor(tokenizer.ends, device=device)
    target_RX, every = target_BX.repeat_interleave(G, dim=0), ASK_EVERY.get(device.type, 8)
    # Where thoughts stand some tokens before the target, they are read there, in a pass of its own.
    n_read = 0 if batch["back_B"].any() else X

    # 1. Prefill: run each context once, score its target without a thought, fork its cache.
    logp_plain_B, answer_plain_BX, prefix = score_context(model, batch, tokenizer.tags, prefix)
    cache = prefix.cache.fork(G)
    tokens_RL = torch.full((R, L), close, device=device)
    logp_RL = logp_plain_B.new_zeros(R, L)
    length_R = torch.zeros(R, dtype=torch.long, device=device)
    closed_R = torch.zeros(R, dtype=torch.bool, device=device)
    hidden_RxD = prefix.hidden_BD.new_zeros(R, n_read, prefix.hidden_BD.shape[-1])
    # For each row in the batch: whose thought it is, what it is fed next, where it stands.
    rows = torch.arange(R, device=device)
    feed, phase = torch.full_like(rows, think), torch.full_like(rows, THINKING)
    n_steps, graphs = L + n_read + (n_read > 0), parallel.team.settings.cuda_graphs
    decode = Replayed(model, cache, feed, n_steps) if graphs else Growing(model, cache)

    for step in range(n_steps):
        # 2. Feed every row its next token, and sample one. It counts where the row is thinking.
        hidden_rD = decode(feed)
        logits_rV = model.logits(hidden_rD)
        uniform_R1 = torch.rand(R, 1, generator=generator, device=device)  # whoever is still there
        token, logp = sample(logits_rV, (think,), temperature, uniform_R1[rows])
        if forced_Rl is not None and step < forced_Rl.shape[1]:
            token = forced_Rl[rows, step]
            logp = token_logp(logits_rV, token, (think,), temperature or 1.0)
        thinking, u = phase == THINKING, min(step, L - 1)
        tokens_RL[rows, u] = torch.where(thinking, token, tokens_RL[rows, u])
        logp_RL[rows, u] = torch.where(thinking, logp, logp_RL[rows, u])
        length_R[rows] += thinking
        # 3. Keep the states from which the target is read.
        x = phase.clamp(0, X - 1)
        if n_read:
            reading = (phase >= 0) & (phase < X)
            hidden_RxD[rows, x] = torch.where(reading[:, None], hidden_rD, hidden_RxD[rows, x])
        # 4. Who goes on: a thought ends with its closing tag, or is cut and gets one a step later.
        closed = thinking & (token == close)
        closed_R[rows] |= closed
        cut = torch.isin(token, ends) | (step == L - 1)
        given = torch.where(phase == CUT, close, target_RX[rows, x].clamp(min=0))
        feed = torch.where(thinking, token, given)
        begun = torch.where(closed, 0, torch.where(cut, CUT, THINKING))
        phase = torch.where(thinking, begun, phase + 1)
        # 5. Drop the rows that are done. That copies the cache: it pays once a fifth of them is.
        if (step + 1) % every == 0:
            busy = phase < n_read if n_read else phase == THINKING
            n_busy = int(busy.sum())
            if n_busy == 0:
                break
            if n_busy <= 0.8 * len(rows) and not graphs:
                live = busy.nonzero()[:, 0]
                rows, feed, phase = rows[live], feed[live], phase[live]
                decode.cache = decode.cache.select(live)

    # 6. Score the targets.
    longest = int(length_R.max())
    if n_read:
        logp_target_R, answer_RX = read_targets(model, hidden_RxD, target_RX, tokenizer.tags)
    else:
        logp_target_R, answer_RX = score_thoughts(
            model, batch, tokenizer, tokens_RL[:, :longest], prefix)
    return Thoughts(tokens_RL[:, :longest], logp_RL[:, :longest], length_R, closed_R,
                    logp_target_R, answer_RX, logp_plain_B, answer_plain_BX)


@dataclass
class Growing:
    """One more token for each row, hidden_RD = decode(feed_R), behind a cache that grows."""

    model: LanguageModel
    cache: LanguageCache

    def __call__(self, feed_R: Tensor) -> Tensor:
        """The states after these tokens."""
        hidden_R1D, self.cache = self.model(feed_R[:, None], self.cache)
        return hidden_R1D[:, 0]


class Replayed:
    """The same in memory that stays where it is: the first token runs as it is, the second is
    recorded as a CUDA graph, and every token from there on is one launch of that. So rows cannot be
    dropped, and what a call returned is overwritten by the next."""

    def __init__(self, model: LanguageModel, cache: LanguageCache, feed_R: Tensor, n_tokens: int):
        require(isinstance(cache, Cache), "parallel.cuda_graphs replays a HybridLM, and this model "
                                          f"is a {type(model).__name__}; leave it out")
        self.model, self.cache = model, cache.with_room(feed_R, n_tokens)
        self.feed_R, self.run, self.n_calls = feed_R.clone(), self.step, 0

    def __call__(self, feed_R: Tensor) -> Tensor:
        """The states after these tokens."""
        self.feed_R.copy_(feed_R)
        if self.n_calls == 1:  # what a first call compiles or chooses is there now
            self.run = record(self.step)
        self.n_calls += 1
        return self.run()

    def step(self) -> Tensor:
        """What is recorded: no size, place or branch in it hangs on a value."""
        hidden_R1D, left = self.model(self.feed_R[:, None], self.cache)
        self.cache.overwrite(left)
        return hidden_R1D[:, 0]


def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What `step` launches on the card, recorded without being run; running it is a call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = step()

    def replay() -> Tensor:
        graph.replay()
        return found

    return replay


class Prefix(NamedTuple):
    """Contexts that were run: what follows them is read and continued from here."""

    hidden_BD: Tensor  # after the last token
    cache: LanguageCache  # behind it
    early: LanguageCache  # the one `back` tokens before


def prefill(model: LanguageModel, batch: dict[str, Tensor]) -> Prefix:
    """Run the contexts once: context_BT, padded on the left (ids_BT -1), and back_B, of which those
    that are not 0 are alike."""
    context_BT, ids_BT = batch["context_BT"], batch["ids_BT"]
    cut = context_BT.shape[1] - int(batch["back_B"].max())
    hidden_BtD, early = model(context_BT[:, :cut], ids_BT=ids_BT[:, :cut])
    cache = early
    if cut < context_BT.shape[1]:
        hidden_BtD, cache = model(context_BT[:, cut:], early, ids_BT[:, cut:])
    return Prefix(hidden_BtD[:, -1], cache, early)


@torch.no_grad()
def score_context(model: LanguageModel, batch: dict[str, Tensor], tags: tuple[int, int],
                  prefix: Prefix | None = None) -> tuple[Tensor, Tensor, Prefix]:
    """log p(target) right after the contexts, without a thought, summed over its X tokens; the
    likeliest token at each place; and what was run for it, if it was not given.

    The first token is read from the state behind the context, the others are teacher forced from
    the cache, at temperature 1. The softmax leaves the think tags out: a model that likes to think
    would else seem to predict the text badly. Returns logp_B in fp32 or wider, answer_BX.
    """
    prefix, target_BX = prefix or prefill(model, batch), batch["target_BX"]
    hidden_BXD = prefix.hidden_BD[:, None]
    if target_BX.shape[1] > 1:
        rest, _ = model(target_BX[:, :-1].clamp(min=0), prefix.cache)
        hidden_BXD = torch.cat([hidden_BXD, rest], dim=1)
    return *read_targets(model, hidden_BXD, target_BX, tags), prefix


def read_targets(model: LanguageModel, hidden_BXD: Tensor, target_BX: Tensor, tags: tuple[int, int]
                 ) -> tuple[Tensor, Tensor]:
    """log p(target) and the likeliest tokens, each from its state, think tags left out. Places
    filled up (-100) add nothing and are right."""
    logits_BXV = mask_banned(model.logits(hidden_BXD), tags)
    is_filled_BX = target_BX < 0
    logp_BX = token_logp(logits_BXV, target_BX.clamp(min=0)).masked_fill(is_filled_BX, 0)
    return logp_BX.sum(-1), torch.where(is_filled_BX, target_BX, logits_BXV.argmax(-1))


def score_thoughts(model: LanguageModel, batch: dict[str, Tensor], tokenizer: Tokenizer,
                   tokens_RL: Tensor, prefix: Prefix | None = None) -> tuple[Tensor, Tensor]:
    """log p(target | context, thought) of given thoughts, as `score_context` has it, in one pass
    over all their tokens, with gradients.

    Where back_B is not 0, the thought stands so many tokens before the target: it has read them,
    and they follow it once more, as their only copy. So the break in the text, which costs any
    prediction right behind it, lies some tokens away from the one that counts.

    Args: tokens_RL: R = B G thoughts, a context's in a row; past its end, up to the width, each has
    closing tags, and one that does not close itself is closed. The empty thought is a closing tag
    alone. prefix: that of `prefill`, if it was run. Returns logp_R and answer_RX.
    """
    hidden_RXD = states_after(model, batch, tokenizer, tokens_RL, prefix)
    target_RX = batch["target_BX"].repeat_interleave(len(tokens_RL) // len(batch["ids_BT"]), dim=0)
    return read_targets(model, hidden_RXD, target_RX, tokenizer.tags)


def states_after(model: LanguageModel, batch: dict[str, Tensor], tokenizer: Tokenizer,
                 tokens_RL: Tensor, prefix: Prefix | None = None) -> Tensor:
    """hidden_RXD, from which `score_thoughts` reads each token of the target after each thought."""
    (B, X), T, close = batch["target_BX"].shape, batch["context_BT"].shape[1], tokenizer.close
    G, (_, cache, early) = len(tokens_RL) // B, prefix or prefill(model, batch)
    found = []
    for back in batch["back_B"].unique().tolist():
        is_here_B = batch["back_B"] == back
        rows, contexts = is_here_B.repeat_interleave(G).nonzero()[:, 0], is_here_B.nonzero()[:, 0]
        of_r = contexts.repeat_interleave(G)
        # 1. <think>, the thought, </think>, the text from where it stands to the target's last
        #    token but one. What is behind is not read.
        target_rX = batch["target_BX"][of_r]
        text = batch["context_BT"][of_r, T - back :], target_rX[:, :-1].clamp(min=0)
        after_rY = torch.cat(text, dim=1)
        fed_rT = F.pad(tokens_RL[rows], (1, 1 + after_rY.shape[1]), value=close)
        fed_rT[:, 0] = tokenizer.think
        closed_r1 = (fed_rT == close).int().argmax(1, keepdim=True)
        at_rZ = closed_r1 + torch.arange(back + X, device=rows.device)
        fed_rT.scatter_(1, at_rZ[:, 1:], after_rY)
        # 2. From the cache; each token of the target is read from the place before it.
        begin = (early if back else cache).select(contexts).fork(G)
        hidden_rtD, _ = model(fed_rT[:, : int(at_rZ.max()) + 1], begin)
        read_rX = at_rZ[:, back:]
        index_rXD = read_rX[..., None].expand(-1, -1, hidden_rtD.shape[-1])
        found.append((rows, hidden_rtD.gather(1, index_rXD)))
    rows, hidden = (torch.cat(parts) for parts in zip(*found, strict=True))
    return hidden[rows.argsort()]


def sample(logits_RV: Tensor, banned: tuple[int, ...], temperature: float, uniform_R1: Tensor
           ) -> tuple[Tensor, Tensor]:
    """A token per row from softmax(logits / temperature) without the banned ids; its log p there.
    Temperature 0 takes the likeliest token, with its log p at temperature 1. Sampling inverts the
    cumulative distribution: the first id at which it reaches a uniform share, above 0, of its own
    last value, however that was rounded. So no id of probability 0 is drawn. fp32 or wider.
    Args: uniform_R1: random numbers in [0, 1)."""
    p_RV = torch.softmax(mask_banned(wide(logits_RV), banned) / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token_R1 = p_RV.argmax(-1, keepdim=True)
    else:
        sum_RV = p_RV.cumsum(-1)
        share_R1 = 1 - uniform_R1.to(p_RV)  # in (0, 1]
        token_R1 = torch.searchsorted(sum_RV, share_R1 * sum_RV[:, -1:])
        token_R1.clamp_(max=p_RV.shape[1] - 1)  # where logits are not finite
    return token_R1[:, 0], p_RV.gather(-1, token_R1)[:, 0].log()


@torch.no_grad()
def show_thought(model: LanguageModel, tokenizer: Tokenizer, prompt: str, c: RLPConfig, seed: int,
                 back: int = 0, read: Callable[[dict[str, Tensor]], Prefix] | None = None) -> str:
    """`<think> thought </think> continuation`, which is greedy, after c.prompt and a prompt. The
    continuation is predicted with the thought `back` tokens before the prompt's end, or after its
    first token. read: what runs the prompt, in place of `prefill` by the model."""
    device = parallel.device_of(model)
    ids = [*tokenizer.begin, *tokenizer.encode(c.prompt), *tokenizer.encode(prompt)]
    context_BT, back = torch.tensor([ids], device=device), min(back, len(ids) - 1)
    batch = {"context_BT": context_BT, "ids_BT": torch.zeros_like(context_BT),
             "target_BX": context_BT[:, :1],  # any: its score is not shown
             "back_B": torch.tensor([back], device=device)}
    sampling, generator = Sampling(1, c.thought_len, c.temperature), torch.Generator(device)
    prefix = read(batch) if read else prefill(model, batch)
    t = sample_thoughts(model, batch, tokenizer, sampling, generator.manual_seed(seed),
                        prefix=prefix)
    shown = [tokenizer.think, *t.tokens_RL[0].tolist()]
    if not t.closed_R[0]:
        shown.append(tokenizer.close)
    after = torch.tensor([shown + ids[len(ids) - back :]], device=device)
    hidden_BTD, cache = model(after, prefix.early)
    for _ in range(8):
        token = int(mask_banned(model.logits(hidden_BTD[:, -1]), tokenizer.tags).argmax())
        if token in tokenizer.ends:
            break
        shown.append(token)
        hidden_BTD, cache = model(torch.tensor([[token]], device=device), cache)
    return tokenizer.decode(shown)
