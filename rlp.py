"""RLP: reinforcement as a pretraining objective (arXiv 2510.01265).

Before it predicts the next token x_t, the model samples a thought c. The thought is rewarded by the
information gain that it brings on the true token, against a slowly moving copy phi of the model
that does not think:

    r(c) = log p_theta(x_t | x_<t, c) - log p_phi(x_t | x_<t)                                      (eq. 3 to 5)
    A_i  = G / (G - 1) (r_i - mean of the group)                                                   (eq. 6)
    L_i  = -1/|c_i| sum_u min(rho_u A_i, clip(rho_u, 1 - eps_low, 1 + eps_high) A_i)               (eq. 7, 8)
    phi  <- tau phi + (1 - tau) theta        after every optimizer step

with rho_u the likelihood ratio of the thought's u-th token under the policy now and when it was
sampled. The gradient reaches the model through the thought's tokens only; there is no next-token
loss.

How to read: the four pure functions take log-probabilities, not models; `RLP` at the end wires them
to one. Facts worth knowing, each held by a test:

* The teacher cancels: all thoughts of a group share log p_phi, so the advantages, and with them the
gradient, do not depend on it. It serves for measuring, and for the reward floor. (With a floor it
matters again, for low rewards.)
* With one update per batch, rho = 1 and the clip is idle.
* One network is policy and predictor. The context is run once for the G thoughts, in sampling and
in the update.

Where it differs from the paper: both scorers leave the think tags out of their softmax (else a base
that likes to open a thought seems to predict badly, and the gain is inflated); rewards may be
floored (`rlp.reward_floor`, off in the paper); targets may be placed at answers (`rlp.positions`,
the paper's is `random`); an instruction (`rlp.prompt`), if there is one, stands before what both
scorers read.
"""

import torch
from torch import Tensor, nn

from kernels import selected_logp
from model import HybridLM
from system import parallel
from system.config import RLPConfig
from system.objective import Objective
from text.tokenizer import Tokenizer
from thoughts import sample_thoughts, score_context


def information_gain(logp_thought_BG: Tensor, logp_plain_B: Tensor) -> Tensor:
    """Nats of log-likelihood that each thought adds to the observed next token (RLP eq. 5).

    Args: logp_thought_BG: of the true token after thought g; logp_plain_B: of the same token, by
    the teacher, no thought.
    Returns: reward_BG, detached: the policy learns through the thought's tokens, never through the
    scorer.
    """
    return (logp_thought_BG - logp_plain_B[:, None]).detach()


def group_advantages(reward_BG: Tensor) -> Tensor:
    """A_i = G/(G-1) (r_i - r_bar) within each group, detached (RLP eq. 6). Not divided by the
    standard deviation.

    r_bar contains r_i itself, which shrinks r_i - r_bar by (G-1)/G on average; the factor undoes
    it, so that the gradient estimate is unbiased. The advantages of a group sum to 0. Raises
    ValueError for a group of one.
    """
    G = reward_BG.shape[1]
    if G < 2:
        raise ValueError(
            f"a group has {G} thought; advantages compare thoughts, so rlp.group_size must be at least 2"
        )
    return (G / (G - 1) * (reward_BG - reward_BG.mean(dim=1, keepdim=True))).detach()


def clipped_surrogate(logp_RM: Tensor, old_logp_RM: Tensor, advantage_R: Tensor, length_R: Tensor,
                      eps_low: float, eps_high: float) -> Tensor:
    """Loss of each thought: minus the mean over its tokens of min(rho A, clip(rho) A) (RLP eq. 7
    and 8).

    Args: logp_RM, old_logp_RM: log-probabilities of the thought's tokens now and when sampled;
    advantage_R; length_R: tokens of each thought, >= 1: what lies beyond is ignored; eps_low,
    eps_high: the clip's bounds.
    Returns: loss_R. Its gradient with respect to logp at rho = 1 is -A / length on every token of
    the thought.
    """
    ratio_RM = torch.exp(logp_RM - old_logp_RM)
    advantage_R1 = advantage_R[:, None]
    clipped_RM = ratio_RM.clamp(1 - eps_low, 1 + eps_high)
    gain_RM = torch.minimum(ratio_RM * advantage_R1, clipped_RM * advantage_R1)
    return -thought_mean(gain_RM, length_R)


def kl_estimate(logp_RM: Tensor, reference_logp_RM: Tensor, length_R: Tensor) -> Tensor:
    """Mean over a thought's tokens of KL(policy || reference), estimated by exp(d) - 1 - d with d =
    reference - policy.

    Never negative, unbiased for tokens sampled from the policy. Returns kl_R in nats per token.
    """
    d_RM = reference_logp_RM - logp_RM
    return thought_mean(torch.exp(d_RM) - 1 - d_RM, length_R)


def thought_mean(value_RM: Tensor, length_R: Tensor) -> Tensor:
    """Mean over the first `length` tokens of each row."""
    inside_RM = torch.arange(value_RM.shape[1], device=value_RM.device) < length_R[:, None]
    return value_RM.where(inside_RM, 0).sum(dim=1) / length_R


@torch.no_grad()
def ema_update(teacher: nn.Module, model: nn.Module, tau: float) -> None:
    """phi <- tau phi + (1 - tau) theta, in the teacher's own dtype (fp32: in bf16 a step of 0.001
    would be lost)."""
    phi = [parallel.local(q) for q in teacher.parameters()]
    theta = [
        parallel.local(p.detach()).to(q.dtype) for p, q in zip(model.parameters(), phi, strict=True)
    ]
    torch._foreach_lerp_(phi, theta, 1 - tau)


def thought_logp(model: HybridLM, context_BT: Tensor, ids_BT: Tensor, tokens_RM: Tensor,
                 length_R: Tensor, think: int, temperature: float, n_buckets: int = 3) -> Tensor:
    """log pi(c_u | x_<t, <think>, c_<u) of every thought token, with gradients, the context being
    run once.

    The G thoughts of a context go on from its cache: T + G M tokens are run instead of G (T + M).
    Logits are made of thought tokens only, in parts of the vocabulary. Thoughts are run in buckets
    of like length.
    Args: tokens_RM, length_R: R = B G thoughts, those of a context in a row. Returns: logp_RM, 0
    beyond each length.
    """
    R, M = tokens_RM.shape
    _, cache = model(context_BT, ids_BT=ids_BT)
    hidden, places = [], []
    for rows in length_R.argsort().chunk(n_buckets):
        n = int(length_R[rows].max())
        token_rM = tokens_RM[rows, :n]
        opening_r1 = torch.full_like(token_rM[:, :1], think)
        hidden_rMD, _ = model(torch.cat([opening_r1, token_rM[:, :-1]], dim=1),
                              cache.select(rows // (R // len(context_BT))))
        place_1M = torch.arange(n, device=rows.device)[None]
        inside_rM = place_1M < length_R[rows, None]
        hidden.append(hidden_rMD[inside_rM])
        places.append((rows[:, None] * M + place_1M)[inside_rM])
    place = torch.cat(places)
    logp = selected_logp(
        torch.cat(hidden), model.output_matrix, tokens_RM.flatten()[place], (think,), temperature)
    return logp.new_zeros(R * M).index_copy(0, place, logp).view(R, M)


class RLP(Objective):
    """Algorithm 1 of the paper, as an objective for `loop.fit`: prepare, loss, and after each step
    the teacher."""

    def __init__(self, config: RLPConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.n_updates = config.inner_epochs
        self.teacher: HybridLM | None = None  # phi, set to theta at the first batch
        self.reference: HybridLM | None = None  # the starting policy, kept only for the KL term

    def prepare(
        self, model: HybridLM, batch: dict[str, Tensor], step: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Sample and reward G thoughts for each context. Returns the batch with what the updates
        need, by row.

        Rewards are clamped from below at `reward_floor`: one confidently wrong thought costs many
        nats, and a group that holds it would teach nothing else.
        """
        c = self.config
        if self.teacher is None:
            self.start(model)
        tags, context_BT, ids_BT, target_BX = (self.tokenizer.tags, batch["context_BT"],
                                               batch["ids_BT"], batch["target_BX"])
        thoughts = sample_thoughts(parallel.whole(model, for_sampling=True), context_BT, ids_BT,
                                   target_BX, tags, self.tokenizer.end, c.group_size, c.thought_len,
                                   c.temperature, generator)
        teacher = parallel.whole(self.teacher, for_sampling=True)
        logp_teacher_B, _, _ = score_context(teacher, context_BT, ids_BT, target_BX, tags)
        gain_BG = information_gain(thoughts.logp_target_R.view(-1, c.group_size), logp_teacher_B)
        advantage_BG = group_advantages(gain_BG.clamp(min=c.reward_floor))
        prepared = {
            "context_BT": context_BT,
            "ids_BT": ids_BT,
            "tokens_RM": thoughts.tokens_RM,
            "length_R": thoughts.length_R,
            "old_logp_RM": thoughts.logp_RM,
            "advantage_R": advantage_BG.flatten(),
            "gain_R": gain_BG.flatten(),
            "closed_R": thoughts.closed_R,
            "is_text_R": batch["is_text_B"].repeat_interleave(c.group_size),
        }
        if self.reference is not None:
            with torch.no_grad():
                prepared["reference_logp_RM"] = self._logp(
                    parallel.whole(self.reference, for_sampling=True), prepared)
        return prepared

    def loss(
        self, model: HybridLM, batch: dict[str, Tensor]) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Sum over the thoughts of the clipped surrogate (and the KL term), their number, and what
        to log."""
        c = self.config
        logp_RM = self._logp(model, batch)
        loss_R = clipped_surrogate(logp_RM, batch["old_logp_RM"], batch["advantage_R"],
                                   batch["length_R"], c.eps_low, c.eps_high)
        if c.kl > 0:
            loss_R = loss_R + c.kl * kl_estimate(
                logp_RM, batch["reference_logp_RM"], batch["length_R"])
        with torch.no_grad():
            ratio_RM = torch.exp(logp_RM - batch["old_logp_RM"])
            clipped_RM = ((ratio_RM < 1 - c.eps_low) | (ratio_RM > 1 + c.eps_high)).float()
            metrics = {
                "gain_ema_nats": batch["gain_R"].mean(),
                "gain_problems_nats": batch["gain_R"][~batch["is_text_R"]].mean(),
                "gain_text_nats": batch["gain_R"][batch["is_text_R"]].mean(),
                "thought_tokens": batch["length_R"].float().mean(),
                "closed": batch["closed_R"].float().mean(),
                "clipped": thought_mean(clipped_RM, batch["length_R"]).mean(),
                "entropy_nats": -thought_mean(batch["old_logp_RM"], batch["length_R"]).mean(),
            }
        return loss_R.sum(), len(loss_R), metrics

    def after_step(self, model: HybridLM) -> None:
        """The teacher follows after EVERY optimizer step."""
        ema_update(self.teacher, model, self.config.tau)

    def start(self, model: HybridLM) -> None:
        """phi <- theta (and the reference for the KL term, if there is one)."""
        self.teacher = parallel.frozen_copy(model)
        self.reference = parallel.frozen_copy(model) if self.config.kl > 0 else None

    def expect(self, model: HybridLM, names: list[str]) -> None:
        """A checkpoint of a run that has begun holds the teacher."""
        if "teacher" in names:
            self.start(model)

    def networks(self) -> dict[str, HybridLM]:
        """Networks beside the model that a checkpoint must hold."""
        found = {"teacher": self.teacher, "reference": self.reference}
        return {name: network for name, network in found.items() if network is not None}

    def _logp(self, model: HybridLM, batch: dict[str, Tensor]) -> Tensor:
        return thought_logp(model, batch["context_BT"], batch["ids_BT"], batch["tokens_RM"],
                            batch["length_R"], self.tokenizer.think, self.config.temperature)
