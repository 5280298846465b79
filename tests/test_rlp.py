"""RLP against the paper's numbers and propositions, against brute-force enumeration, and against plain forward passes.

The first half needs no model: the four pure functions take log-probabilities. The second half runs the objective on a
tiny fp64 model that knows six tokens, three of them special, so that every thought of two tokens can be enumerated.
"""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import plain_logp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import rlp
from rlp import RLP, clipped_surrogate, ema_update, group_advantages, information_gain, kl_estimate, thought_logp
from system import loop
from system.config import RLPConfig, RLVRConfig
from system.presets import PRESETS
from text.batches import Position, collate_contexts
from thoughts import Sampling, prefill, sample_thoughts

THINK, CLOSE, END = 3, 4, 5
TAGS = {"think": THINK, "close": CLOSE, "tags": (THINK, CLOSE)}
TOKENIZER = SimpleNamespace(**TAGS, end=END, ends=(END,), begin=(), encode=lambda text: [])
CONTEXTS, TARGETS = [[0, 1, 2, 0, 1], [2, 1, 1]], [[2, 0], [1, END]]
NEAR = {"rtol": 1e-9, "atol": 1e-9}
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_logp(*shape, seed=0):
    """Log-probabilities of random distributions over the last dimension."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)


# ------------------------------------------------------------------------------------------ the paper's golden numbers

ITERATIONS = [  # section 9.2, row by row: rewards, advantages, policy afterwards; their mean, J before and after
    ((-0.80, -0.60, -0.50, -0.30), (-0.3333, -0.0667, 0.0667, 0.3333), (0.2101, 0.2401, 0.2566, 0.2932)),
    ((-0.80, -0.60, -0.35, -0.10), (-0.4500, -0.1833, 0.1500, 0.4833), (0.1618, 0.2113, 0.2668, 0.3601)),
    ((-0.80, -0.60, -0.20, 0.05), (-0.5500, -0.2833, 0.2500, 0.5833), (0.1127, 0.1681, 0.2772, 0.4420)),
]
MEANS = [(-0.5500, -0.5500, -0.5284), (-0.4625, -0.4313, -0.3856), (-0.3875, -0.2916, -0.2244)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_golden_iterations_of_section_9_2(n):
    """pi <- pi exp(0.5 A) / Z from the uniform policy, J = sum pi r; the policy is carried from iteration to iteration."""
    policy = f64(0.25, 0.25, 0.25, 0.25)
    for reward, *_ in ITERATIONS[:n]:
        before, reward_BG = policy, f64(*reward)[None]
        advantage = group_advantages(reward_BG)[0]
        policy = (before.log() + 0.5 * advantage).softmax(-1)
    found = (advantage, policy, torch.stack([reward_BG.mean(), before @ reward_BG[0], policy @ reward_BG[0]]))
    expected = (*ITERATIONS[n - 1][1:], MEANS[n - 1])
    assert_close(found, tuple(f64(*values) for values in expected), rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------- the propositions


def cross_entropy(p_V, logp_V):
    return -(p_V * logp_V).sum(-1)


@pytest.mark.parametrize("seed", range(5))
def test_expected_gain_is_the_drop_of_cross_entropy(seed):
    """Proposition 1, exactly: the observed token runs over the whole vocabulary, weighted by p*. Three thoughts."""
    p_true_V = random_logp(7, seed=seed).exp()
    logp_thought_GV, logp_plain_V = random_logp(3, 7, seed=seed + 10), random_logp(7, seed=seed + 20)
    gain_VG = information_gain(logp_thought_GV.T, logp_plain_V)
    drop_G = cross_entropy(p_true_V, logp_plain_V) - cross_entropy(p_true_V, logp_thought_GV)
    assert_close(p_true_V @ gain_VG, drop_G, **EXACT)


@pytest.mark.parametrize("seed", range(5))
def test_expected_gain_is_below_the_gain_of_the_expected_prediction(seed):
    """Proposition 2: E_c[r] < log E_c[p(x | c)] - log p_phi(x), strictly where the thoughts predict differently."""
    policy_G, logp_thought_BG, logp_plain_B = random_logp(4, seed=seed).exp(), random_logp(9, 4, seed=1), random_logp(9)
    expected_B = information_gain(logp_thought_BG, logp_plain_B) @ policy_G
    assert (expected_B < (logp_thought_BG.exp() @ policy_G).log() - logp_plain_B).all()


def test_expected_gain_reaches_that_bound_when_the_predictor_ignores_the_thought():
    """Proposition 2, the case of equality."""
    policy_G, logp_B, logp_plain_B = random_logp(4).exp(), random_logp(9, seed=1), random_logp(9)
    logp_thought_BG = logp_B[:, None].expand(9, 4)
    bound_B = (logp_thought_BG.exp() @ policy_G).log() - logp_plain_B
    assert_close(information_gain(logp_thought_BG, logp_plain_B) @ policy_G, bound_B, **EXACT)


def test_mean_over_positions_of_expected_gains_is_the_drop_of_the_sequence_cross_entropy():
    """Proposition 3. All 27 sequences of three tokens from a vocabulary of three, one thought a position.

    Left: position by position, weighted by p*(x_<=t). Right: from the joint probabilities of whole sequences.
    """
    T, V = 3, 3
    tables = [[random_logp(*[V] * (t + 1), seed=10 * who + t) for t in range(T)] for who in range(3)]
    sequences = list(itertools.product(range(V), repeat=T))
    true_ST, thought_ST, plain_ST = (torch.stack([torch.stack([who[t][x[: t + 1]] for t in range(T)]) for x in sequences])
                                     for who in tables)  # fmt: skip
    p_S = true_ST.sum(1).exp()
    expected_T = torch.stack([p_S @ information_gain(thought_ST[:, t, None], plain_ST[:, t])[:, 0] for t in range(T)])
    drop_nats = -(p_S @ plain_ST.sum(1)) / T + (p_S @ thought_ST.sum(1)) / T
    assert_close(expected_T.mean(), drop_nats, **EXACT)


# --------------------------------------------------------------------------------------------------------- advantages


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=16))
def test_advantages_of_a_group_sum_to_zero(rewards):
    assert abs(float(group_advantages(f64(rewards)).sum())) < 1e-10


def test_advantages_compare_within_a_group_only():
    """2/(2-1) * (r - mean): (1, 3) gives (-2, 2), and (10, 10) gives (0, 0)."""
    assert group_advantages(f64([1.0, 3.0], [10.0, 10.0])).tolist() == [[-2.0, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("G", [2, 3])
def test_expected_advantage_of_a_thought_is_its_reward_minus_the_policys_mean(G):
    """Section 9: E[A_i | c_i] = r_i - mu, the other G - 1 thoughts running over everything the policy may draw."""
    policy_C, reward_C = random_logp(5).exp(), f64(-3.0, 0.5, 0.0, 1.0, -0.2)
    groups_NG = torch.tensor(list(itertools.product(range(5), repeat=G)))
    others_N = policy_C[groups_NG[:, 1:]].prod(1)
    weighted_N = others_N * group_advantages(reward_C[groups_NG])[:, 0]
    expected_C = torch.zeros(5, dtype=torch.float64).index_add(0, groups_NG[:, 0], weighted_N)
    assert_close(expected_C, reward_C - policy_C @ reward_C, **EXACT)


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match=r"1 thought.*group_size must be at least 2"):
        group_advantages(torch.zeros(3, 1))


def test_the_teacher_cancels_in_the_advantages():
    logp_thought_BG, plain_B, other_B = random_logp(6, 4), random_logp(6, seed=1), random_logp(6, seed=2)
    first_BG, second_BG = (group_advantages(information_gain(logp_thought_BG, logp_B)) for logp_B in (plain_B, other_B))
    assert_close(first_BG, second_BG, **EXACT)


def test_no_gradient_flows_through_gain_or_advantages():
    logp_thought_BG, logp_plain_B = random_logp(2, 3).requires_grad_(), random_logp(2).requires_grad_()
    gain_BG = information_gain(logp_thought_BG, logp_plain_B)
    assert not gain_BG.requires_grad
    assert not group_advantages(logp_thought_BG).requires_grad


# ---------------------------------------------------------------------------------------------------------- surrogate


def test_gradient_is_minus_advantage_over_length_on_thought_tokens_and_zero_elsewhere():
    """At rho = 1. Lengths 1, 3 and 4 of at most 4."""
    logp_RL, advantage_R, length_R = random_logp(3, 4).requires_grad_(), f64(2.0, -3.0, 0.5), torch.tensor([1, 3, 4])
    clipped_surrogate(logp_RL, logp_RL.detach(), advantage_R, length_R, 0.2, 0.2).sum().backward()
    expected_RL = f64([-2.0, 0, 0, 0], [1.0, 1.0, 1.0, 0], [-0.125] * 4)
    assert_close(logp_RL.grad, expected_RL, **EXACT)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 1.0, -1.1, -1.1),  # inside
        (1.5, 1.0, -1.3, 0.0),  # likely enough already: no more
        (0.5, 1.0, -0.5, -0.5),  # good and unlikely: the lower bound does not hold it back
        (0.9, -2.0, 1.8, 1.8),  # inside
        (0.5, -2.0, 1.6, 0.0),  # unlikely enough already: no more
        (1.5, -2.0, 3.0, 3.0),  # bad and likely: the upper bound does not hold it back
    ],
)
def test_clip_by_hand(ratio, advantage, loss, slope):
    """-min(rho A, clip(rho, 0.8, 1.3) A) and its derivative by log pi, which is -rho A or 0: eps_low 0.2, eps_high 0.3."""
    logp_RL = f64([ratio]).log().requires_grad_()
    loss_R = clipped_surrogate(logp_RL, torch.zeros_like(logp_RL), f64(advantage), torch.tensor([1]), 0.2, 0.3)
    loss_R.sum().backward()
    assert_close(torch.stack([loss_R[0], logp_RL.grad[0, 0]]), f64(loss, slope), **EXACT)


@pytest.mark.parametrize("G", [2, 3])
def test_expected_gradient_over_all_groups_is_that_of_the_expected_reward(G):
    """A table of logits is the policy: thoughts of two tokens from a vocabulary of three, nine in all.

    Every group of G thoughts is enumerated and weighted by its probability. All thoughts have the length L = 2, so the
    1/|c| of eq. 7 makes the expected gradient of the surrogate -grad E[r] / L, exactly.
    """
    first_V, second_VV = (random_logp(*shape, seed=len(shape)).requires_grad_() for shape in ((3,), (3, 3)))
    thoughts_CL = torch.tensor(list(itertools.product(range(3), repeat=2)))
    reward_C = random_logp(9, seed=3)
    logp_CL = torch.stack([first_V.log_softmax(-1)[thoughts_CL[:, 0]],
                           second_VV.log_softmax(-1)[thoughts_CL[:, 0], thoughts_CL[:, 1]]], dim=1)  # fmt: skip
    policy_C = logp_CL.sum(1).exp()
    exact = torch.autograd.grad(policy_C @ reward_C, (first_V, second_VV), retain_graph=True)

    groups_NG = torch.tensor(list(itertools.product(range(9), repeat=G)))
    advantage_NG, logp_RL = group_advantages(reward_C[groups_NG]), logp_CL[groups_NG.flatten()]
    length_R = torch.full((groups_NG.numel(),), 2)
    loss_R = clipped_surrogate(logp_RL, logp_RL.detach(), advantage_NG.flatten(), length_R, 0.2, 0.2)
    probability_N = policy_C.detach()[groups_NG].prod(1)
    found = torch.autograd.grad(probability_N @ loss_R.view(-1, G).mean(1), (first_V, second_VV))
    assert_close(found, tuple(-g / 2 for g in exact), **EXACT)


# ------------------------------------------------------------------------------------------------------ KL and teacher


@given(st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0)), min_size=1, max_size=5))
def test_kl_estimate_is_never_negative(pairs):
    logp_RL, reference_logp_RL = (f64(side) for side in zip(*pairs, strict=True))
    assert kl_estimate(logp_RL, reference_logp_RL) > -1e-14


def test_kl_estimate_is_zero_for_equal_policies():
    logp_RL = random_logp(3, 4)
    assert kl_estimate(logp_RL, logp_RL).tolist() == [0, 0, 0]


def test_kl_estimate_has_the_value_and_the_gradient_of_the_kl_of_whole_thoughts():
    """All 7 thoughts of one token (2 ends them) or two, weighed by their probability, against sum pi log(pi / reference).

    The derivative of KL(reference || policy) is another one: a test that could not tell them apart would be worth nothing.
    """
    tables = [(random_logp(3, seed=seed), random_logp(2, 3, seed=seed + 1)) for seed in (0, 5)]
    policy, reference = [[t.clone().requires_grad_() for t in pair] for pair in tables]
    thoughts = [[2], *([a, b] for a in range(2) for b in range(3))]

    def logp(tables):
        first_V, second_VV = (t.log_softmax(-1) for t in tables)
        rows = [[first_V[c[0]], second_VV[tuple(c)] if len(c) == 2 else first_V.new_zeros(())] for c in thoughts]
        return torch.stack([torch.stack(row) for row in rows])

    logp_CL, reference_logp_CL = logp(policy), logp(reference).detach()
    logp_C, reference_logp_C = logp_CL.sum(1), reference_logp_CL.sum(1)
    estimate = logp_C.detach().exp() @ kl_estimate(logp_CL, reference_logp_CL)
    forward = logp_C.exp() @ (logp_C - reference_logp_C)
    reverse = reference_logp_C.exp() @ (reference_logp_C - logp_C)
    assert_close(estimate, forward, **EXACT)
    found, exact, other = (torch.autograd.grad(t, policy, retain_graph=True) for t in (estimate, forward, reverse))
    assert_close(found, exact, **EXACT)
    assert (other[0] - exact[0]).abs().max() > 0.05


def scalar(value, dtype=torch.float32):
    """A network with one weight."""
    network = nn.Linear(1, 1, bias=False, dtype=dtype).requires_grad_(False)
    network.weight.fill_(value)
    return network


@pytest.mark.parametrize(("tau", "expected"), [(0.75, 1.5), (0.0, 3.0), (1.0, 1.0)])
def test_teacher_moves_by_hand(tau, expected):
    """tau * 1 + (1 - tau) * 3."""
    teacher = scalar(1.0)
    ema_update(teacher, scalar(3.0), tau)
    assert teacher.weight.item() == expected


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 0.05 + 1e-3 * (1 - 0.999**1000)), (torch.bfloat16, 0.05)])
def test_a_step_of_a_millionth_is_kept_in_fp32_and_lost_in_bf16(dtype, expected):
    """The gap of 0.001 closes by 0.1 % a step: to 37 % in 1000 steps."""
    teacher, model = scalar(0.05, dtype), scalar(0.051)
    for _ in range(1000):
        ema_update(teacher, model, 0.999)
    assert teacher.weight.item() == pytest.approx(expected, abs=2e-5 if dtype == torch.float32 else 2e-4)
    assert (teacher.weight == torch.tensor(0.05, dtype=dtype)).item() == (dtype == torch.bfloat16)


# ---------------------------------------------------------------------------------------------------- log pi(thought)


@pytest.fixture
def model(make_model):
    return make_model(vocab_size=6, pattern="M-*", tie_embeddings=False)


def batch_of(contexts=CONTEXTS, targets=TARGETS, horizon=1):
    """Contexts padded on the left, as in training; the first is said to be of ordinary text, the others of problems."""
    positions = [Position(context, target) for context, target in zip(contexts, targets, strict=True)]
    kind_B = (torch.arange(len(contexts)) == 0).long()
    return {**collate_contexts(TOKENIZER, positions, RLPConfig(horizon=horizon)), "kind_B": kind_B}


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, model.parameters()), strict=True))


@pytest.mark.parametrize("n_buckets", [1, 2, 3, None])
@pytest.mark.parametrize("pattern", ["M-*", "M", "*", "*-M"])
def test_thought_logp_and_all_its_gradients_equal_plain_passes(make_model, pattern, n_buckets):
    """Two contexts, one padded; three thoughts each, of 1 to 4 tokens, in buckets of like length; any linear function.

    The gradients reach the shared context through the states of Mamba layers and through keys and values.
    """
    model = make_model(vocab_size=6, pattern=pattern, tie_embeddings=False)
    thoughts = [[CLOSE], [0, 2, 1, CLOSE], [1, 1], [2, END], [0, 0, 0, 0], [1, 0, CLOSE]]
    length_R = torch.tensor([len(c) for c in thoughts])
    tokens_RL = torch.tensor([c + [CLOSE] * (4 - len(c)) for c in thoughts])
    weight_RL = random_logp(6, 4)
    b = batch_of()
    found_RL = thought_logp(model, b, tokens_RL, length_R, THINK, 0.7, n_buckets)
    plain = [plain_logp(model, [*CONTEXTS[r // 3], THINK], c, (THINK,), 0.7) for r, c in enumerate(thoughts)]
    expected_RL = torch.stack([nn.functional.pad(logp, (0, 4 - len(logp))) for logp in plain])
    assert_close(found_RL, expected_RL, **EXACT)
    found, expected = (gradients(model, (weight_RL * logp_RL).sum()) for logp_RL in (found_RL, expected_RL))
    assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("wanted", [[True] * 6, [False, True, True, False, True, False]])
@pytest.mark.parametrize("pattern", ["M-*", "*-M"])
def test_gradients_through_the_contexts_that_were_run_to_sample_equal_those_of_running_them_again(
    make_model, pattern, wanted
):
    """Sampling goes on from them first, without gradients, and leaves the graph's tensors as they are; of some rows too."""
    model, b, wanted_R = make_model(vocab_size=6, pattern=pattern, tie_embeddings=False), batch_of(), torch.tensor(wanted)
    prefix = prefill(model, b)
    thoughts = sample_thoughts(model, b, TOKENIZER, Sampling(3, 4), generator(), prefix=prefix)
    assert_close(vars(thoughts), vars(sample_thoughts(model, b, TOKENIZER, Sampling(3, 4), generator())), **EXACT)
    weight_RL = random_logp(*thoughts.tokens_RL.shape) * wanted_R[:, None]
    given = model, b, thoughts.tokens_RL, thoughts.length_R, THINK, 1.0
    found_RL, expected_RL = thought_logp(*given, None, prefix, wanted_R), thought_logp(*given)
    assert_close(found_RL, expected_RL.where(wanted_R[:, None], 0), **EXACT)
    found, expected = (gradients(model, (weight_RL * logp_RL).sum()) for logp_RL in (found_RL, expected_RL))
    assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("pattern", ["M", "*"])
def test_gradients_of_a_thought_reach_the_shared_context(make_model, pattern):
    """Token 2 stands in the first context only and in no thought: its embedding gets its gradient through the cache."""
    model = make_model(vocab_size=6, pattern=pattern, tie_embeddings=False)
    b = batch_of([[0, 2, 1, 0, 1], [1, 1, 0]])
    tokens_RL, length_R = torch.tensor([[0, 1], [1, CLOSE]] * 2), torch.tensor([2] * 4)
    logp_RL = thought_logp(model, b, tokens_RL, length_R, THINK, 0.7)
    plain = torch.stack([plain_logp(model, [0, 2, 1, 0, 1, THINK], c, (THINK,), 0.7) for c in ([0, 1], [1, CLOSE])])
    found, expected = (gradients(model, logp.sum())["embed.weight"][2] for logp in (logp_RL, plain))
    assert found.abs().max() > 1e-3
    assert_close(found, expected, **EXACT)


def test_policy_is_a_distribution_over_every_token_but_the_opening_tag(model):
    b = batch_of([CONTEXTS[0]], [TARGETS[0]])
    logp_RL = thought_logp(model, b, torch.arange(6)[:, None], torch.ones(6).long(), THINK, 0.7)
    assert logp_RL[THINK, 0] == -torch.inf
    assert float(logp_RL.detach().exp().sum()) == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------- the objective


def objective_of(**changes):
    settings = {"group_size": 3, "thought_len": 3, "temperature": 1.0, "reward_floor": -torch.inf, **changes}
    return RLP(RLPConfig(**settings), TOKENIZER)


def generator():
    return torch.Generator().manual_seed(0)


def force(monkeypatch, thoughts):
    """Let the sampler draw these thoughts, one a row; what follows a thought's end is never looked at."""
    longest = max(len(c) for c in thoughts)
    forced_Rl = torch.tensor([c + [CLOSE] * (longest - len(c)) for c in thoughts])
    monkeypatch.setattr(rlp, "sample_thoughts", functools.partial(sample_thoughts, forced_Rl=forced_Rl))


def shift(network, seed=1):
    """Other weights."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=noise, dtype=p.dtype))


@pytest.mark.parametrize("horizon", [1, 2])
def test_gain_of_a_thought_equals_plain_passes_over_all_tokens_of_the_horizon(model, monkeypatch, horizon):
    """log p(targets | context <think> thought </think>) by the model, minus log p(targets | context) by the teacher.

    The second context's thoughts do not close themselves: they are read in full, then closed.
    """
    thoughts = [[CLOSE], [0, CLOSE], [2, 1, CLOSE], [2, 1, 0], [0, 2, 2], [1, END]]
    force(monkeypatch, thoughts)
    objective = objective_of(horizon=horizon)
    objective.start(model)
    shift(objective.networks["teacher"])
    gain_R = objective.prepare(model, batch_of(horizon=horizon), 0, generator())["gain_R"]
    for r, thought in enumerate(thoughts):
        context, target = CONTEXTS[r // 3], TARGETS[r // 3][:horizon]
        closed = thought if thought[-1] == CLOSE else [*thought, CLOSE]
        after = plain_logp(model, [*context, THINK, *closed], target, TOKENIZER.tags).sum()
        before = plain_logp(objective.networks["teacher"], context, target, TOKENIZER.tags).sum()
        assert_close(gain_R[r], after - before, **NEAR)


def test_liking_to_open_or_close_thoughts_changes_no_gain(model, monkeypatch):
    """Both scorers leave the tags out of their softmax: the tags' rows of the output matrix do not matter."""
    force(monkeypatch, [[0, CLOSE], [CLOSE], [2, 1, CLOSE]] * 2)
    objective = objective_of()
    before = objective.prepare(model, batch_of(), 0, generator())["gain_R"]
    for network in (model, objective.networks["teacher"]):
        network.head.weight.data[list(TOKENIZER.tags)] += 3.0
    assert_close(objective.prepare(model, batch_of(), 0, generator())["gain_R"], before)


def test_expected_gradient_over_all_groups_of_real_thoughts_is_exact(model, monkeypatch):
    """All 17 thoughts of at most two tokens in all 289 groups of two, through `prepare` and `loss`.

    The surrogate is linear in A, so a group is weighed by its probability through its advantages. A thought may end at
    once: lengths are 1 and 2. Eq. 7 divides by them, so the expected gradient is not -grad E[r] / L (as above, for one
    common length) but exactly -sum_c pi(c) (r(c) - mu) / |c| grad log pi(c), with mu = E[r].
    """
    thoughts = [[CLOSE], [END], *([a, b] for a in range(3) for b in (0, 1, 2, CLOSE, END))]
    groups = list(itertools.product(range(17), repeat=2))
    force(monkeypatch, [thoughts[i] for group in groups for i in group])
    objective = objective_of(group_size=2, thought_len=2)
    prepared = objective.prepare(model, batch_of([CONTEXTS[0]] * 289, [TARGETS[0]] * 289), 0, generator())
    probability_N = prepared["thoughts"].logp_RL.sum(1).view(289, 2).sum(1).exp()
    assert float(probability_N.sum()) == pytest.approx(1, rel=1e-6)
    prepared["advantage_R"] = prepared["advantage_R"] * probability_N.repeat_interleave(2) / 2
    loss, _, _ = objective.loss(model, prepared)

    logp_C = torch.stack([plain_logp(model, [*CONTEXTS[0], THINK], c, (THINK,)).sum() for c in thoughts])
    length_C = torch.tensor([len(c) for c in thoughts])
    reward_C, policy_C = prepared["gain_R"].view(17, 17, 2)[:, 0, 0].double(), logp_C.detach().exp()
    assert reward_C.std() > 0.01
    expected = -(policy_C * (reward_C - policy_C @ reward_C) / length_C * logp_C).sum()
    assert_close(gradients(model, loss), gradients(model, expected), **NEAR)


def means(metrics):
    return {name: float(total) / n for name, (total, n) in metrics.items() if n}


def test_gains_of_each_kind_are_logged_apart(model):
    """The first context is text, the second of a computed document; two are of problems. Three thoughts each."""
    objective = objective_of()
    batch = {**batch_of([*CONTEXTS, *CONTEXTS], [*TARGETS, *TARGETS]), "kind_B": torch.tensor([1, 2, 0, 0])}
    prepared = objective.prepare(model, batch, 0, generator())
    metrics = objective.loss(model, prepared)[2]
    gain_BG = prepared["gain_R"].view(4, 3)
    for kind, rows in (("text", [0]), ("computed", [1]), ("problems", [2, 3]), ("ema", [0, 1, 2, 3])):
        assert metrics[f"gain_{kind}_nats"][1] == 3 * len(rows)
        assert means(metrics)[f"gain_{kind}_nats"] == pytest.approx(float(gain_BG[rows].mean()))


def test_right_answers_are_counted_at_problems_alone(model, monkeypatch):
    """Everything is right; of four contexts two are of problems, with three thoughts each."""

    def sampled(model, batch, *rest, **shared):
        found = sample_thoughts(model, batch, *rest, **shared)
        found.answer_RX = batch["target_BX"].repeat_interleave(3, dim=0)
        found.answer_RX[:6] += 1  # wrong at text and at the computed document
        return found

    monkeypatch.setattr(rlp, "sample_thoughts", sampled)
    objective = objective_of()
    batch = {**batch_of([*CONTEXTS, *CONTEXTS], [*TARGETS, *TARGETS]), "kind_B": torch.tensor([1, 2, 0, 0])}
    total, n = objective.loss(model, objective.prepare(model, batch, 0, generator()))[2]["correct"]
    assert (float(total), n) == (6, 6)


def test_metrics_do_not_depend_on_the_number_of_parts(model, monkeypatch):
    """Four contexts, three of them text, in 1, 2 and 4 parts, which draw the same thoughts: the last part has no text."""
    thoughts_Gl = torch.tensor([[0, CLOSE, CLOSE], [CLOSE] * 3, [2, 1, 0]])

    def sampled(model, batch, *rest, **shared):
        forced_Rl = thoughts_Gl.repeat(len(batch["target_BX"]), 1)
        return sample_thoughts(model, batch, *rest, forced_Rl=forced_Rl, **shared)

    monkeypatch.setattr(rlp, "sample_thoughts", sampled)
    whole = batch_of([*CONTEXTS, [1, 0, 2], [0, 0]], [*TARGETS, [1, 1], [2, 2]])
    whole["kind_B"] = torch.tensor([1, 1, 1, 0])
    settings, lines = RLPConfig(lr=0.0, kl=0.1), []
    for n in (1, 2, 4):
        objective = objective_of(kl=0.1, reward_floor=-0.5)
        objective.start(model)
        for seed, name in enumerate(objective.networks):
            shift(objective.networks[name], seed + 2)
        parts = [objective.prepare(model, part, 0, generator()) for part in loop.split_batch(whole, n)]
        lines.append(loop.update(model, objective, parts, loop.build_optimizers(model, settings), settings, 0))
    assert lines[0]["gain_text_nats"] != pytest.approx(lines[0]["gain_problems_nats"])
    assert lines[1] == pytest.approx(lines[0])
    assert lines[2] == pytest.approx(lines[0])


def test_what_is_logged_of_rewards_by_hand(model, monkeypatch):
    """Two groups of two. log p after the thoughts (-3, -1), (-4, -9); without, the model -2 and -2, the teacher -1 and -1.

    Gains over the teacher -2, 0 and -3, -8; over the model -1, 1 and -2, -7, on the mean -9/4. Floor -2.5: rewards -2, 0
    (deviation sqrt 2) and twice -2.5 (0: a group of two without signal, both at the floor). Thoughts of 1, 2, 1 and 2
    tokens, -log pi of a token 1, 3, 5 and 2 on the mean; the last does not close itself.
    """

    def sampled(*args, **shared):
        found = sample_thoughts(*args, **shared)
        found.logp_target_R, found.logp_plain_B = f64(-3.0, -1.0, -4.0, -9.0), f64(-2.0, -2.0)
        found.length_R, found.closed_R = torch.tensor([1, 2, 1, 2]), torch.tensor([True, True, True, False])
        found.tokens_RL = torch.tensor([[CLOSE, CLOSE], [0, CLOSE], [CLOSE, CLOSE], [2, 1]])
        found.logp_RL = f64([-1.0, 0.0], [-2.0, -4.0], [-5.0, 0.0], [-1.0, -3.0])
        return found

    monkeypatch.setattr(rlp, "sample_thoughts", sampled)
    monkeypatch.setattr(rlp, "score_context", lambda *_: (f64(-1.0, -1.0), None, None))
    objective = objective_of(group_size=2, reward_floor=-2.5)
    found = means(objective.loss(model, objective.prepare(model, batch_of(), 0, generator()))[2])
    expected = {"gain_ema_nats": -3.25, "gain_own_nats": -2.25, "gain_text_nats": -1.0, "gain_problems_nats": -5.5,
                "reward_std_nats": 2**0.5 / 2, "no_signal": 0.5, "floored": 0.5,
                "closed": 0.75, "entropy_nats": (1 + 3 + 5 + 2) / 4, "thought_tokens": 1.5}  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("floored", "said"), [(0.95, "below rlp.reward_floor"), (0.0, "all alike (1.0")])
def test_a_run_without_signal_says_so_once_with_the_reason(floored, said):
    """19 steps are too few; the 20th speaks, and later ones do not."""
    objective = objective_of()
    step = {"no_signal": 0.97, "floored": floored, "thought_tokens": 1.0}
    heard = [objective.warning(step) for _ in range(60)]
    assert heard[:19] == [None] * 19
    assert said in heard[19]
    assert "97%" in heard[19]
    assert heard[20:] == [None] * 40


@pytest.mark.parametrize(
    ("correct", "said"),
    [({"correct": 0.97}, "97% of the answers are right already"), ({"correct": 0.04}, "only 4% of the answers are right"),
     ({"correct": 0.5}, "all alike (9.0"), ({}, "all alike (9.0")],
)  # fmt: skip
def test_a_run_by_right_answers_without_signal_says_whether_they_are_right_or_wrong(correct, said):
    """However low the gains are, for the floor is not in this reward; `correct` is missing where there are no answers."""
    objective = objective_of(reward="match")
    step = {"no_signal": 0.97, "floored": 0.95, "thought_tokens": 9.0, **correct}
    heard = [objective.warning(step) for _ in range(20)]
    assert said in heard[19]


def test_a_run_with_signal_in_a_tenth_of_its_groups_is_left_in_peace():
    objective = objective_of()
    step = {"no_signal": 0.9, "floored": 0.0, "thought_tokens": 1.0}
    assert [objective.warning(step) for _ in range(60)] == [None] * 60


def test_a_sample_holds_the_first_context_without_its_padding_and_each_thought_with_its_gain(model, monkeypatch):
    force(monkeypatch, [[0, CLOSE], [2, 1, 0], [CLOSE]] * 2)
    objective = objective_of()
    objective.tokenizer = SimpleNamespace(**vars(TOKENIZER), decode=lambda ids: "".join(map(str, ids)))
    prepared = objective.prepare(model, batch_of(CONTEXTS[::-1], TARGETS), 0, generator())
    gains = [round(float(gain), 4) for gain in prepared["gain_R"][:3]]
    thoughts = [{"text": text, "gain_nats": gain} for text, gain in zip(["04", "210", "4"], gains, strict=True)]
    assert objective.sample(prepared) == {"context": "211", "target": "2", "thoughts": thoughts}


def test_the_teacher_cancels_in_the_gradient(model):
    """The same thoughts, rewarded against two different teachers, without a floor."""
    objective, found = objective_of(thought_len=4), []
    objective.start(model)
    for _ in range(2):
        prepared = objective.prepare(model, batch_of(), 0, generator())
        found.append((prepared["gain_R"], gradients(model, objective.loss(model, prepared)[0])))
        shift(objective.networks["teacher"])
    (first_gain_R, first), (second_gain_R, second) = found
    assert (first_gain_R - second_gain_R).abs().min() > 0.01
    assert_close(first, second, **NEAR)


def test_a_group_of_equal_thoughts_teaches_nothing(model, monkeypatch):
    """There is no next-token loss: without differences in reward no weight gets a gradient."""
    force(monkeypatch, [[1, 2, CLOSE]] * 6)
    objective = objective_of()
    loss, _, _ = objective.loss(model, objective.prepare(model, batch_of(), 0, generator()))
    assert all(g.abs().max() < 1e-6 for g in gradients(model, loss).values())


def test_thoughts_without_advantage_are_not_run_and_change_neither_loss_nor_gradient(model, monkeypatch):
    """Two groups, the first of equal thoughts: three rows go through the model; a KL term wants all six."""
    force(monkeypatch, [[1, 2, CLOSE]] * 3 + [[0, CLOSE], [CLOSE], [2, 1, 0]])
    n_rows, found = [], []
    model.register_forward_hook(lambda module, args, output: n_rows.append(len(args[0])))
    for kl in (0.0, 1e-300):
        objective = objective_of(kl=kl)
        prepared = objective.prepare(model, batch_of(), 0, generator())
        n_rows.clear()
        loss, n, metrics = objective.loss(model, prepared)
        found.append((sum(n_rows), gradients(model, loss)))
        assert (n, metrics["thought_tokens"][1]) == (6, 6)
    assert [n for n, _ in found] == [3, 6]
    assert_close(found[0][1], found[1][1], **NEAR)


def test_teacher_is_the_model_at_the_first_batch_then_follows_every_step_by_tau(model):
    objective = objective_of(tau=0.75)
    assert objective.networks == {}
    shift(model)
    objective.prepare(model, batch_of(), 0, generator())
    first = {name: p.clone() for name, p in model.named_parameters()}
    assert_close(dict(objective.networks["teacher"].named_parameters()), first, rtol=0, atol=0)
    shift(model)
    objective.after_step(model)
    expected = {name: 0.75 * first[name] + 0.25 * p for name, p in model.named_parameters()}
    assert_close(dict(objective.networks["teacher"].named_parameters()), expected, **EXACT)
    assert not any(p.requires_grad for p in objective.networks["teacher"].parameters())


def test_the_first_inner_update_is_not_clipped_and_a_later_one_is(model):
    """rho = 1 at the first, even where the clip allows a ten-thousandth; after a large step it is not."""
    objective = objective_of(inner_epochs=2, temperature=0.7, eps_low=1e-4, eps_high=1e-4)
    prepared = objective.prepare(model, batch_of(), 0, generator())
    loss, n_thoughts, first = objective.loss(model, prepared)
    shift(model)
    _, _, second = objective.loss(model, prepared)
    assert (objective.n_updates, n_thoughts) == (2, 6)
    assert (means(first)["clipped"], float(loss.detach())) == (
        0,
        pytest.approx(-float(prepared["advantage_R"].sum()), abs=1e-5),
    )
    assert means(second)["clipped"] > 0.1


def test_clipped_counts_the_tokens_whose_gradient_the_clip_takes(model, monkeypatch):
    """Ratios 2, .8 and 1/2 with advantages of both signs: the clip takes a likely good token and unlikely bad ones."""
    objective = objective_of(group_size=2, eps_low=0.3, eps_high=0.1)
    prepared = objective.prepare(model, batch_of([CONTEXTS[0]], [TARGETS[0]]), 0, generator())
    prepared["thoughts"].length_R = torch.tensor([3, 2])
    prepared["advantage_R"], prepared["old_logp_RL"] = f64(1.0, -1.0), torch.zeros(2, 3).double()
    logp_RL = f64([2.0, 0.5, 1.0], [0.8, 0.5, 1.1]).log().requires_grad_()
    monkeypatch.setattr(objective, "policy_logp", lambda *_: logp_RL)
    prepared["thoughts"].logp_RL = torch.zeros(2, 3).double()
    loss, _, metrics = objective.loss(model, prepared)
    (grad_RL,) = torch.autograd.grad(loss, logp_RL)
    assert (grad_RL == 0).tolist() == [[True, False, False], [False, True, True]]  # the last is behind its thought
    assert means(metrics)["clipped"] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_the_first_ratio_is_one_whatever_the_sampler_rounded_and_the_difference_is_logged(model):
    """The sampler's log-probabilities are off by log 1.03, as in bf16: gradient and ratio are as if they were not."""
    objective = objective_of()
    exact = gradients(model, objective.loss(model, objective.prepare(model, batch_of(), 0, generator()))[0])
    prepared = objective.prepare(model, batch_of(), 0, generator())
    thoughts = prepared["thoughts"]
    thoughts.logp_RL = thoughts.logp_RL - torch.tensor(1.03).log().double()
    loss, _, metrics = objective.loss(model, prepared)
    assert_close(gradients(model, loss), exact, rtol=0, atol=0)
    assert means(metrics)["sampler_off"] == pytest.approx(0.03)
    assert means(metrics)["clipped"] == 0


@pytest.mark.parametrize(("floor", "advantages"), [(-torch.inf, [-10.0, 10.0]), (-2.0, [-2.0, 2.0])])
def test_rewards_below_the_floor_are_raised_to_it_and_gains_are_reported_as_they_are(model, monkeypatch, floor, advantages):
    """Gains (-10, 0): A = 2 (r - mean) = (-10, 10); raised to (-2, 0), A = (-2, 2)."""

    def sampled(*args, **shared):
        found = sample_thoughts(*args, **shared)
        found.logp_target_R = f64(-11.0, -1.0)  # one thought confidently wrong
        return found

    monkeypatch.setattr(rlp, "sample_thoughts", sampled)
    monkeypatch.setattr(rlp, "score_context", lambda *_: (f64(-1.0), None, None))
    objective = objective_of(group_size=2, reward_floor=floor)
    prepared = objective.prepare(model, batch_of([CONTEXTS[0]], [TARGETS[0]]), 0, generator())
    assert prepared["gain_R"].tolist() == [-10.0, 0.0]
    assert prepared["advantage_R"].tolist() == advantages


def test_matches_by_hand():
    """Two contexts with two targets each and three thoughts; filled-up places count for nothing: they are right."""
    answer_RX = torch.tensor([[1, 2], [1, 3], [0, 2], [4, -100], [4, -100], [5, -100]])
    found = rlp.match(answer_RX, torch.tensor([[1, 2], [4, -100]]))
    assert found.tolist() == [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]


def test_a_positions_entropy_is_that_of_the_prediction_whatever_the_thoughts_temperature(model, monkeypatch):
    """.9 and .1 have .33 nats; at the thoughts' temperature of .7 they would have .17. At least .25 are asked for."""
    objective = objective_of(group_size=2, reward="match", min_entropy=0.25, temperature=0.7)
    objective.start(model)
    sure = SimpleNamespace(logits=lambda hidden_BD: f64(*[[0.9, 0.1, 0, 0, 0, 0]] * 2).log())
    monkeypatch.setattr(rlp, "score_context", lambda *_: (f64(-1.0, -1.0), None, SimpleNamespace(hidden_BD=None)))
    monkeypatch.setattr(rlp, "match", lambda *_: f64([1.0, 0.0], [1.0, 0.0]))
    monkeypatch.setitem(objective.networks, "teacher", sure)
    monkeypatch.setattr(rlp.parallel, "whole", lambda network, **_: network)
    assert objective.prepare(model, batch_of(), 0, generator())["signal_B"].all()


def test_a_group_whose_rewards_are_equal_teaches_where_its_advantages_are_not_zero(model, monkeypatch):
    """As with another baseline than the group's mean, here the batch's: A = (1/4, 1/4), (-3/4, 1/4)."""
    monkeypatch.setattr(rlp, "group_advantages", lambda reward_BG: (reward_BG - reward_BG.mean()).detach())
    monkeypatch.setattr(rlp, "match", lambda *_: f64([1.0, 1.0], [0.0, 1.0]))
    objective = objective_of(group_size=2, reward="match")
    prepared = objective.prepare(model, batch_of(), 0, generator())
    assert prepared["signal_B"].tolist() == [True, True]
    found = gradients(model, objective.loss(model, prepared)[0])
    thoughts = prepared["thoughts"]
    logp_RL = rlp.thought_logp(model, prepared, thoughts.tokens_RL, thoughts.length_R, THINK, 1.0)
    loss_R = clipped_surrogate(logp_RL, logp_RL.detach(), prepared["advantage_R"], thoughts.length_R, 0.2, 0.2)
    assert_close(found, gradients(model, loss_R.sum()))


@pytest.mark.parametrize("min_entropy", [0.0, 1.0, 1.5])
def test_the_rivals_reward_is_whether_the_answer_is_right_where_the_teacher_is_unsure(model, monkeypatch, min_entropy):
    """Of two groups of two, one thought each is right: A = (1, -1). The teacher's prediction without a thought has the
    entropies log 2 = .69 and log 4 = 1.39: a least one of 1 leaves the second group, 1.5 none."""

    def sampled(model, batch, *rest, **shared):
        found = sample_thoughts(model, batch, *rest, **shared)
        found.answer_RX = batch["target_BX"].repeat_interleave(2, dim=0) + torch.tensor([[0], [1], [0], [1]])
        return found

    class Unsure:
        def logits(self, hidden_BD):
            p_BV = f64(*[[0.5, 0.5, 0, 0, 0, 0.0]], *[[0.25, 0.25, 0.25, 0, 0, 0.25]])
            return p_BV.log() + 3.0 * torch.eye(6, dtype=p_BV.dtype)[[THINK, CLOSE]].sum(0).masked_fill(p_BV > 0, 0)

    monkeypatch.setattr(rlp, "sample_thoughts", sampled)
    objective = objective_of(group_size=2, reward="match", min_entropy=min_entropy)
    objective.start(model)
    read = SimpleNamespace(hidden_BD=None)
    monkeypatch.setattr(rlp, "score_context", lambda *_: (f64(-1.0, -2.0), None, read))
    monkeypatch.setitem(objective.networks, "teacher", Unsure())
    monkeypatch.setattr(rlp.parallel, "whole", lambda network, **_: network)
    prepared = objective.prepare(model, batch_of(), 0, generator())
    expected = [[1.0, -1.0] if entropy >= min_entropy else [0.0, 0.0] for entropy in (0.69, 1.39)]
    assert prepared["advantage_R"].view(2, 2).tolist() == expected
    assert prepared["signal_B"].tolist() == [row != [0.0, 0.0] for row in expected]
    gain_BG = prepared["thoughts"].logp_target_R.view(2, 2) - f64([-1.0], [-2.0])
    assert_close(prepared["gain_R"].view(2, 2), gain_BG)  # is still what is reported


def test_reinforcement_by_right_answers_is_rlp_with_that_reward_at_answers():
    config = dataclasses.replace(PRESETS["cpu"], mode="rlvr", rlvr=RLVRConfig(steps=7, lr=0.5, batch=3))
    c = config.rollouts()
    assert (c.steps, c.lr, c.batch, c.reward, c.positions, c.predictor) == (7, 0.5, 3, "match", "answer", 0.0)
    assert c.text_share == c.computed_share == 0
    assert (c.group_size, c.thought_len, c.temperature) == tuple(
        getattr(config.rlp, name) for name in ("group_size", "thought_len", "temperature")
    )
    assert PRESETS["cpu"].rollouts() is PRESETS["cpu"].rlp


def test_a_reward_from_outside_is_what_is_optimised_and_the_gain_is_still_what_is_reported(model, monkeypatch):
    """One function in one place: here +1 for a gain and -1 for a loss, whose group of two then has A = 2 (r - mean)."""
    before = objective_of(group_size=2, thought_len=4).prepare(model, batch_of(), 0, generator())
    monkeypatch.setattr(rlp, "reward", lambda gain_BG, floor: gain_BG.sign())
    after = objective_of(group_size=2, thought_len=4).prepare(model, batch_of(), 0, generator())
    assert_close(after["gain_R"], before["gain_R"], rtol=0, atol=0)
    sign_BG = before["gain_R"].sign().view(2, 2)
    assert_close(after["advantage_R"].view(2, 2), 2 * (sign_BG - sign_BG.mean(1, keepdim=True)))
    assert (after["advantage_R"] != before["advantage_R"]).any()


def test_kl_term_pulls_to_the_starting_policy_which_stays(model):
    """At the first batch it adds nothing; once the model has moved, it adds kl times the estimate against the start."""
    objective = objective_of(kl=0.5, tau=0.0)
    prepared = objective.prepare(model, batch_of(), 0, generator())
    del prepared["prefix"]  # of the weights before
    start = {name: p.clone() for name, p in model.named_parameters()}
    assert_close(prepared["reference_logp_RL"], prepared["thoughts"].logp_RL, **NEAR)
    shift(model)
    objective.after_step(model)
    assert_close(dict(objective.networks["reference"].named_parameters()), start, rtol=0, atol=0)
    expected_R = kl_estimate(objective.policy_logp(model, prepared), prepared["reference_logp_RL"])
    added = objective.loss(model, prepared)[0] - objective_of(kl=0.0).loss(model, prepared)[0]
    assert expected_R.min() > 1e-3
    assert_close(added, 0.5 * expected_R.sum(), **NEAR)


def test_predictor_term_is_the_loss_of_the_target_after_each_groups_first_thought(model, monkeypatch):
    """It stands for all three thoughts of its group; nothing of it reaches the thought's own log p."""
    thoughts = [[0, CLOSE], [CLOSE], [2, 1, CLOSE], [2, 1, 0], [0, 2, 2], [1, END]]
    force(monkeypatch, thoughts)
    objective, plain = objective_of(predictor=0.5), objective_of()
    prepared = [o.prepare(model, batch_of(), 0, generator()) for o in (objective, plain)]
    found, n, metrics = objective.loss(model, prepared[0])
    added = gradients(model, found - plain.loss(model, prepared[1])[0])
    logp_B = torch.stack(
        [
            plain_logp(model, [*context, THINK, *c, *[CLOSE] * (c[-1] != CLOSE)], target[:1], TOKENIZER.tags).sum()
            for context, target, c in zip(CONTEXTS, TARGETS, thoughts[::3], strict=True)
        ]
    )
    assert n == 6
    assert_close(added, gradients(model, -0.5 * 3 * logp_B.sum()), **NEAR)
    assert means(metrics)["predictor_nats"] == pytest.approx(-float(logp_B.detach().mean()), rel=1e-4)
    assert "predictor_nats" not in plain.loss(model, plain.prepare(model, batch_of(), 0, generator()))[2]
