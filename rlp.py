"""RLP: reinforcement as a pretraining objective (arXiv 2510.01265).

Before it predicts the next token x_t, the model samples a thought c. The thought's reward is its
information gain: the nats by which it raises the log-probability of the true token above that of a
teacher phi, which does not think.

    r(c) = log p_theta(x_t | x_<t, c) - log p_phi(x_t | x_<t)                          (eq. 3 to 5)
    A_i  = G / (G - 1) (r_i - mean of the group)                                             (eq. 6)
    L_i  = -1/|c_i| sum_u min(rho_u A_i, clip(rho_u, 1 - eps_low, 1 + eps_high) A_i)      (eq. 7, 8)
    phi  <- tau phi + (1 - tau) theta                              after every optimizer step

rho_u is the likelihood ratio of the thought's u-th token, now over before the batch's first update.
The gradient reaches theta through the thought's tokens only; there is no next-token loss. The
thoughts of a group share log p_phi, so the teacher cancels in the advantages: it serves to measure,
and for the reward's floor. With one update from each batch rho = 1, and the clip is idle.

How to read: the functions down to `kl_estimate` take log-probabilities, not models. To try another
reward change `reward`, or `RLP.prepare`, which has the thoughts too: `information_gain` stays what
is reported. `RLP` is Algorithm 1.

Where it differs from the paper: neither scorer has the think tags in its softmax (else a base that
likes to open a thought would seem to predict badly, and gains would look larger); rewards have a
floor (`rlp.reward_floor`); positions may be answers of problems (`rlp.positions`); elsewhere a
thought stands some tokens before the one it is for (`rlp.back`), since the break that it makes in a
text spoils whatever is predicted right behind it; both scorers may read an instruction first
(`rlp.prompt`). `rlp.predictor` weighs the half of the gradient that the paper leaves out:

    grad E_c[log p(x_t | x_<t, c)] = E_c[log p grad log pi(c)] + E_c[grad log p(x_t | x_<t, c)]
"""

import functools
import statistics
from collections import deque

import torch
from torch import Tensor, nn

from kernels import mask_banned, selected_logp, wide
from model import LanguageModel
from system import lora, parallel
from system.config import RLPConfig
from system.errors import require
from system.objective import Metrics, Objective
from text.batches import KINDS
from text.tokenizer import Tokenizer
from thoughts import Prefix, Sampling, prefill, sample_thoughts, score_context, score_thoughts

LOOK_BACK = 20  # steps after which a run that learns nothing is told so


def information_gain(logp_pred_BG: Tensor, logp_ema_B: Tensor) -> Tensor:
    """r = S_pred - S_ema (eq. 5): nats that each thought adds to the observed next token.
    Args: logp_pred_BG: S_pred (eq. 3), log p of it after thought g; logp_ema_B: S_ema (eq. 4), by
    the teacher without a thought. Returns gain_BG, detached: no gradient reaches a scorer."""
    return (logp_pred_BG - logp_ema_B[:, None]).detach()


def reward(gain_BG: Tensor, floor: float) -> Tensor:
    """What is optimised: the information gain, raised to the floor where it is below. Without one a
    confidently wrong thought costs many nats, and its group teaches nothing else."""
    return gain_BG.clamp(min=floor)


def match(answer_RX: Tensor, target_BX: Tensor) -> Tensor:
    """RPT's reward (arXiv 2506.08007, in one step): 1 for each thought after which the likeliest
    tokens are the observed ones. At the answers of problems it is RLVR's. Returns reward_BG."""
    answer_BGX = answer_RX.unflatten(0, (len(target_BX), -1))
    return (answer_BGX == target_BX[:, None]).all(-1).float()


def group_advantages(reward_BG: Tensor) -> Tensor:
    """A_i = G / (G - 1) (r_i - r_bar) within each group (eq. 6), detached. They sum to 0.
    r_bar contains r_i itself, which shrinks r_i - r_bar by (G - 1) / G on average; the factor makes
    the gradient unbiased: A_i is r_i minus the mean of the others (leave-one-out). Nothing is
    divided by a deviation. Raises ValueError if G is 1."""
    G = reward_BG.shape[1]
    require(G >= 2, f"a group has {G} thought; rlp.group_size must be at least 2, to compare them")
    r_bar_B1 = reward_BG.mean(dim=1, keepdim=True)
    return (G / (G - 1) * (reward_BG - r_bar_B1)).detach()


def clipped_surrogate(logp_RL: Tensor, old_logp_RL: Tensor, advantage_R: Tensor, length_R: Tensor,
                      eps_low: float, eps_high: float) -> Tensor:
    """L_i, the loss of each thought (eq. 7 and 8): minus the mean of min(rho A, clip(rho) A).
    Args: logp_RL, old_logp_RL: log pi of the thoughts' tokens, by the policy and the one that drew;
    length_R: tokens that count, >= 1. Returns loss_R: at rho = 1 its gradient is -A / length."""
    A_R1 = advantage_R[:, None]
    rho_RL = torch.exp(logp_RL - old_logp_RL)
    clipped_RL = rho_RL.clamp(1 - eps_low, 1 + eps_high)
    return -thought_mean(torch.minimum(rho_RL * A_R1, clipped_RL * A_R1), length_R)


def kl_estimate(logp_RL: Tensor, reference_logp_RL: Tensor) -> Tensor:
    """KL(policy || reference) of whole thoughts in nats: E_c[d], d = log policy(c) / reference(c).

    Where c is drawn from the policy, value and gradient of each estimate are unbiased. The value is
    the sum over tokens of exp(-d_u) - 1 + d_u: never negative, and less noisy than d. Its own
    derivative would be that of KL(reference || policy), blind to how c is drawn; the gradient is
    that of d^2 / 2, since grad E_c[d] = E_c[d grad log policy(c)]. Returns kl_R."""
    d_RL = logp_RL - reference_logp_RL
    value_R = (torch.exp(-d_RL) - 1 + d_RL).sum(dim=1).detach()
    half_R = d_RL.sum(dim=1).square() / 2
    return value_R + half_R - half_R.detach()


def thought_mean(value_RL: Tensor, length_R: Tensor) -> Tensor:
    """Mean over the first `length` tokens of each row."""
    inside_RL = torch.arange(value_RL.shape[1], device=value_RL.device) < length_R[:, None]
    return value_RL.where(inside_RL, 0).sum(dim=1) / length_R


@torch.no_grad()
def ema_update(teacher: nn.Module, model: nn.Module, tau: float) -> None:
    """phi <- tau phi + (1 - tau) theta, in phi's dtype: fp32, for bf16 would lose such steps."""
    shared = lora.shared(model)
    pairs = [(p, q) for (name, p), q in
             zip(model.named_parameters(), teacher.parameters(), strict=True) if name not in shared]
    phi = [parallel.local(q) for _, q in pairs]
    theta = [parallel.local(p.detach()).to(q.dtype) for p, q in pairs]
    torch._foreach_lerp_(phi, theta, 1 - tau)


def thought_logp(model: LanguageModel, batch: dict, tokens_RL: Tensor, length_R: Tensor, think: int,
                 temperature: float, n_buckets: int | None = None, prefix: Prefix | None = None,
                 wanted_R: Tensor | None = None) -> Tensor:
    """log pi(c_u | x_<t, <think>, c_<u) of every thought token, with gradients.

    Each context is run once, and its G thoughts go on from its cache: T + G L tokens instead of
    G (T + L). Args: batch: context_BT and ids_BT; tokens_RL, length_R: R = B G thoughts, those of a
    context in a row; think: id of <think>; n_buckets: passes, over thoughts of like length: if None
    3, or 1 where that pads little; prefix: the contexts, if they were run; wanted_R: which thoughts
    to run, if not all. Returns logp_RL, 0 past the ends and where not wanted.
    """
    R, L = tokens_RL.shape
    G = R // len(batch["ids_BT"])
    cache = prefix.cache if prefix else model(batch["context_BT"], ids_BT=batch["ids_BT"])[1]
    # 1. Buckets. A single one is in order, and then the contexts are repeated, which is faster.
    #    What is looked up where is planned by the host: a card is waited for once, for lengths.
    length = (length_R if wanted_R is None else length_R * wanted_R).cpu()
    order = length.argsort()
    order = order[length[order] > 0]
    if n_buckets is None:
        n_buckets = 1 if length.sum() > 0.8 * len(order) * length[order[-1]] else 3
    hidden, places = [], []
    for planned in [order.sort().values] if n_buckets == 1 else order.chunk(n_buckets):
        # 2. Run <think> and the thoughts without their last token.
        n, rows = int(length[planned].max()), parallel.sent(planned, tokens_RL.device)
        token_rl = tokens_RL[rows, :n]
        fed_rl = torch.cat([torch.full_like(token_rl[:, :1], think), token_rl[:, :-1]], dim=1)
        start = cache.fork(G) if len(rows) == R else cache.select(rows // G)
        hidden_rlD, _ = model(fed_rl, start)
        r, u = (torch.arange(n) < length[planned, None]).nonzero(as_tuple=True)
        at = parallel.sent(r * n + u, rows.device)
        hidden.append(hidden_rlD.flatten(0, 1).index_select(0, at))
        places.append(planned[r] * L + u)
    # 3. Logits only where a token follows.
    place = parallel.sent(torch.cat(places), tokens_RL.device)
    logp = selected_logp(torch.cat(hidden), model.output_matrix, tokens_RL.flatten()[place],
                         (think,), temperature)
    return logp.new_zeros(R * L).index_copy(0, place, logp).view(R, L)


def summed(value: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | int]:
    """Sum and number of values; of (value_BG, kept_B) those of the rows that are kept. No card is
    waited for."""
    if isinstance(value, Tensor):
        return value.sum(), value.numel()
    value_BG, kept_B = value
    return value_BG.where(kept_B[:, None], 0).sum(), kept_B.sum() * value_BG.shape[1]


class RLP(Objective):
    """Algorithm 1 of the paper. networks: "teacher" is phi; "reference", only for a KL term, the
    policy at the start. Both are set to theta at the first batch."""

    headline = "gain_ema_nats"

    def __init__(self, config: RLPConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.n_updates = config.inner_epochs
        self.recent, self.warned = deque(maxlen=LOOK_BACK), False

    def start(self, model: LanguageModel) -> None:
        """phi <- theta."""
        for name in ("teacher", "reference") if self.config.kl > 0 else ("teacher",):
            self.networks[name] = parallel.frozen_copy(model)

    def prepare(self, model: LanguageModel, batch: dict[str, Tensor], step: int,
                generator: torch.Generator) -> dict:
        """Sample G thoughts for each context, and reward them. Returns the batch with both."""
        c, tokenizer = self.config, self.tokenizer
        if "teacher" not in self.networks:
            self.start(model)
        whole = functools.partial(parallel.whole, for_sampling=True)
        sampling = Sampling(c.group_size, c.thought_len, c.temperature)
        sampler = whole(model)
        # The contexts are run once, for the thoughts and for their gradient, unless another network
        # samples, or the graphs of several parts would fill the memory.
        prefix = None
        if sampler is model and c.accumulate == 1:
            with torch.enable_grad():
                prefix = prefill(model, batch)
        thoughts = sample_thoughts(sampler, batch, tokenizer, sampling, generator, prefix=prefix)
        teacher = whole(self.networks["teacher"])
        logp_ema_B, _, read = score_context(teacher, batch, tokenizer.tags)
        gain_BG = information_gain(thoughts.logp_target_R.view(-1, c.group_size), logp_ema_B)
        is_right_BG = match(thoughts.answer_RX, batch["target_BX"])
        reward_BG = is_right_BG if c.reward == "match" else reward(gain_BG, c.reward_floor)
        if c.min_entropy > 0:
            logits_BV = mask_banned(wide(teacher.logits(read.hidden_BD)), tokenizer.tags)
            entropy_B = torch.special.entr(logits_BV.softmax(-1)).sum(-1)
            reward_BG = reward_BG.where(entropy_B[:, None] >= c.min_entropy, 0)
        advantage_BG = group_advantages(reward_BG)
        batch = {**batch, "prefix": prefix, "thoughts": thoughts, "gain_R": gain_BG.flatten(),
                 "is_right_BG": is_right_BG, "reward_BG": reward_BG,
                 "advantage_R": advantage_BG.flatten(),
                 "signal_B": advantage_BG.abs().amax(dim=1) > 1e-5}
        if c.kl > 0:
            with torch.no_grad():
                reference = whole(self.networks["reference"])
                batch["reference_logp_RL"] = self.policy_logp(reference, batch)
        return batch

    def loss(self, model: LanguageModel, batch: dict) -> tuple[Tensor, int, Metrics]:
        """Sum over the thoughts of the clipped surrogate and the terms of kl and predictor, their
        number, metrics."""
        c, thoughts, advantage_R = self.config, batch["thoughts"], batch["advantage_R"]
        length_R = thoughts.length_R
        # Without advantages there is nothing to learn, and the sampler's log p is good enough for
        # the metrics. FSDP wants as many passes of all processes.
        wanted_R = batch["signal_B"].repeat_interleave(c.group_size)
        if c.kl > 0 or parallel.is_dressed(model) or not wanted_R.any():
            wanted_R = torch.ones_like(wanted_R)
        prefix = batch.pop("prefix", None)
        logp_RL = self.policy_logp(model, batch, prefix, wanted_R)
        logp_RL = logp_RL.where(wanted_R[:, None], thoughts.logp_RL)
        # The first update notes the old policy: rho begins at 1, however the sampler had rounded.
        old_logp_RL = batch.setdefault("old_logp_RL", logp_RL.detach())
        loss_R = clipped_surrogate(
            logp_RL, old_logp_RL, advantage_R, length_R, c.eps_low, c.eps_high)
        metrics = self.metrics(batch)
        if c.kl > 0:
            kl_R = kl_estimate(logp_RL, batch["reference_logp_RL"])
            loss_R, metrics["kl_nats"] = loss_R + c.kl * kl_R, kl_R.detach()
        loss = loss_R.sum()
        if c.predictor > 0:  # after one thought of each group, which stands for all G
            first_BL = thoughts.tokens_RL[:: c.group_size]
            logp_B, _ = score_thoughts(model, batch, self.tokenizer, first_BL, prefix)
            loss = loss - c.predictor * c.group_size * logp_B.sum()
            metrics["predictor_nats"] = -logp_B.detach()
        with torch.no_grad():
            rho_RL, A_R1 = torch.exp(logp_RL - old_logp_RL), advantage_R[:, None]
            cut_RL = torch.where(A_R1 > 0, rho_RL > 1 + c.eps_high,
                                 (rho_RL < 1 - c.eps_low) & (A_R1 < 0))
            off_RL = (torch.exp(old_logp_RL - thoughts.logp_RL) - 1).abs()
            metrics |= {"clipped": thought_mean(cut_RL, length_R),
                        "sampler_off": thought_mean(off_RL, length_R)}
        return loss, len(loss_R), {name: summed(t) for name, t in metrics.items()}

    def metrics(self, batch: dict) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """What is logged of thoughts and rewards, as one value for each thought or each group; or
        of the contexts that a mask names."""
        t, kind_B, reward_BG = batch["thoughts"], batch["kind_B"], batch["reward_BG"]
        gain_BG = batch["gain_R"].view_as(reward_BG)
        own_BG = t.logp_target_R.view(gain_BG.shape) - t.logp_plain_B[:, None]
        return {
            "gain_ema_nats": gain_BG,
            "gain_own_nats": own_BG,  # above what the model itself predicts without a thought
            **{f"gain_{kind}_nats": (gain_BG, kind_B == i) for i, kind in enumerate(KINDS)},
            "correct": (batch["is_right_BG"], kind_B == 0),  # the likeliest token at answers
            "reward_std_nats": reward_BG.std(dim=1),  # within each group
            "no_signal": ~batch["signal_B"],  # share of groups
            "floored": gain_BG < self.config.reward_floor,
            "thought_tokens": t.length_R,
            "context_tokens": torch.full_like(kind_B, batch["context_BT"].shape[1]),  # padded
            "closed": t.closed_R,
            "entropy_nats": -thought_mean(t.logp_RL, t.length_R),
        }

    def warning(self, metrics: dict[str, float]) -> str | None:
        """Once, if hardly a group of the last LOOK_BACK steps taught anything: why, what helps."""
        self.recent.append(metrics)
        share, floored, right, n_tokens = (
            statistics.fmean(found) if (found := [m[name] for m in self.recent if name in m])
            else float("nan") for name in ("no_signal", "floored", "correct", "thought_tokens"))
        if self.warned or len(self.recent) < LOOK_BACK or share < 0.95:
            return None
        self.warned = True
        if self.config.reward == "match" and right > 0.9:
            why = (f"{right:.0%} of the answers are right already; give harder problems, such as "
                   "those of --rlp.more-steps 1")
        elif self.config.reward == "match" and right < 0.1:
            why = f"only {right:.0%} of the answers are right; train the base longer"
        elif self.config.reward != "match" and floored > 0.9:
            why = (f"nearly all gains are below rlp.reward_floor ({self.config.reward_floor}); "
                   "lower it, or train the base longer")
        else:
            why = (f"the thoughts of a group are all alike ({n_tokens:.1f} tokens on the mean; 1 "
                   "is an empty thought); raise rlp.temperature, or start from a base whose "
                   "thoughts differ")
        return (f"rlp learns nothing: in {share:.0%} of the groups of the last {LOOK_BACK} steps "
                f"all rewards were equal; likely {why}")

    def sample(self, prepared: dict) -> dict:
        """The first context's thoughts, each with its gain."""
        t, decode = prepared["thoughts"], self.tokenizer.decode
        inside_T = prepared["ids_BT"][0] >= 0
        return {"context": decode(prepared["context_BT"][0][inside_T].tolist())[-100:],
                "target": decode([i for i in prepared["target_BX"][0].tolist() if i >= 0]),
                "thoughts": [{"text": decode(t.tokens_RL[r, : t.length_R[r]].tolist()),
                              "gain_nats": round(float(prepared["gain_R"][r]), 4)}
                             for r in range(self.config.group_size)]}

    def after_step(self, model: LanguageModel) -> None:
        """The teacher follows."""
        ema_update(self.networks["teacher"], model, self.config.tau)

    def policy_logp(self, model: LanguageModel, batch: dict, prefix: Prefix | None = None,
                    wanted_R: Tensor | None = None) -> Tensor:
        """`thought_logp` of the batch's thoughts."""
        thoughts, n_buckets = batch["thoughts"], 3 if parallel.is_dressed(model) else None
        return thought_logp(model, batch, thoughts.tokens_RL, thoughts.length_R,
                            self.tokenizer.think, self.config.temperature, n_buckets, prefix,
                            wanted_R)
