"""Routers (arXiv 2511.16664, eq. 6 to 12): widths for a budget, and what each choice costs.

For a budget b a `Router` gives logits over the widths of every axis, for every layer.
Gumbel-softmax turns them into weights of masks, and the budget loss |E C / (b C_full) - 1| keeps
their expected cost C near the budget. `Costs` has it in tables, of parameters, memory, FLOPs or
measured latency. `fit_to_budget` repairs the last choice, for budgets that were never trained too.

How to read: `Space`, what can be chosen; `cost_measure` and `Costs`; `Router`; `probabilities`,
`mask_weighting` and `budget_loss`, a step of the search.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Block
from nested import UNITS, Masks, Widths, in_groups
from system import parallel
from system.config import WIDTH_FIELDS, ElasticConfig, ModelConfig
from system.costs import part_cache_bytes, part_flops, part_parameters
from system.errors import require

# Beside the stream and the depth, the axes of each kind of layer, in the order of `WIDTH_FIELDS`
# and of `nested.UNITS`.
AXES_OF = {"-": ("ffn",), "M": ("mamba_heads", "mamba_channels"), "*": ("attn_heads",)}
KIND_OF = {axis: kind for kind, axes in AXES_OF.items() for axis in axes}
SERVED_BYTES = 2  # of a weight and of a cached key or value, where memory is the cost: bf16
FULL_VOTE = 10.0  # logit of the full width at the full budget
# Nats that a width above or below both neighbours' loses, for all of its axis: what is above was
# trained by the larger ones, what is cut below was cut in none.
ABOVE, BELOW = 1e2, 1e3
DEAD_ZONE = 0.01  # relative distance from the budget that costs nothing
MET = 0.02  # relative distance up to which a budget is met
TABLES = {"-": "ffn", "*": "attention", "M": "mamba"}
Choice = dict[str, list[int]]  # of each axis: the index of a width, for all its layers or for each


class Space:
    """What can be chosen: for each axis its widths, the largest first, and how many decisions."""

    def __init__(self, config: ModelConfig, c: ElasticConfig):
        require(not config.widths, "elastic cannot start from a model that was cut out, whose "
                "layers have widths of their own; start from its parent")
        self.config, queries = config, config.n_heads
        self.layers = {axis: [i for i, k in enumerate(config.pattern) if k == kind]
                       for axis, kind in KIND_OF.items()}
        # Full width; where no choices are given, steps in all and of the smallest width; unit.
        axes = {"d_model": (config.d_model, 8, 4, 1), "depth": (len(config.pattern), 1, 1, 1),
                "ffn": (config.d_ff, 24, 6, 1),
                "mamba_heads": (config.mamba_heads, 8, 4, config.mamba_groups),
                "mamba_channels": (config.mamba_head_dim, 4, 2, 1),
                "attn_heads": (queries, queries, queries // 2, config.n_kv_heads)}
        choices = {a: _choices(c, a.removesuffix("s"), *numbers) for a, numbers in axes.items()}
        self.choices = {a: w for a, w in choices.items() if self.layers.get(a, [0])}
        self.n_groups = {a: unit for a, (*_, unit) in axes.items()}
        self.shared = {a: a not in c.heterogeneous for a in self.choices}

    def n_decisions(self, axis: str) -> int:
        """One for the stream, the depth and an axis that layers share, else one for each layer."""
        return 1 if self.shared[axis] else len(self.layers[axis])

    def decision(self, axis: str, i: int) -> int:
        """Which decision of an axis holds for layer i."""
        return 0 if self.shared[axis] else self.layers[axis].index(i)

    def about(self, axis: str, j: int) -> list[int]:
        """The layers for which decision j of an axis holds."""
        return self.layers[axis] if self.shared[axis] else self.layers[axis][j : j + 1]

    def extreme(self, smallest: bool = False) -> Choice:
        """The full model, or the smallest one."""
        return {a: [len(w) - 1 if smallest else 0] * self.n_decisions(a)
                for a, w in self.choices.items()}

    def widths(self, choice: Choice, depth_order: list[int]) -> Widths:
        """What a choice keeps. depth_order: layers, the first to go first."""
        (d,), (n,) = choice["d_model"], choice["depth"]
        kept = depth_order[len(depth_order) - self.choices["depth"][n] :]
        layers = tuple(
            tuple(self.choices[a][choice[a][self.decision(a, i)]] for a in AXES_OF[kind])
            if i in kept else () for i, kind in enumerate(self.config.pattern))
        return Widths(self.choices["d_model"][d], layers)

    def gamma(self, p_depth: Tensor, depth_order: list[int]) -> list[Tensor]:
        """Probability that each layer is kept, from that of each depth."""
        n, depths = len(depth_order), self.choices["depth"]
        kept = [torch.tensor([depth_order.index(i) >= n - d for d in depths]) for i in range(n)]
        return [p_depth @ k.to(p_depth) for k in kept]

    def masks(self, p: dict[str, Tensor], depth_order: list[int]) -> Masks:
        """Sum of the masks of all widths, weighted by p."""

        def mask(axis: str, weight: Tensor) -> Tensor:
            widths, n_groups = self.choices[axis], self.n_groups[axis]
            kept = [in_groups(w, widths[0], n_groups) for w in widths]
            one_each = torch.stack([torch.zeros(widths[0]).index_fill(0, k, 1.0) for k in kept])
            return weight @ one_each.to(weight)

        layers = [{unit: mask(a, p[a][self.decision(a, i)])
                   for unit, a in zip(UNITS[kind], AXES_OF[kind], strict=True)}
                  for i, kind in enumerate(self.config.pattern)]
        gamma = self.gamma(p["depth"][0], depth_order)
        return Masks(mask("d_model", p["d_model"][0]), layers, gamma)


def _choices(c: ElasticConfig, axis: str, full: int, n_steps: int, n_least: int, unit: int
             ) -> tuple[int, ...]:
    """Widths to choose from, multiples of the unit, the largest first: those given, or k / n_steps
    of the full width for k from n_least on. Raises ValueError for a width that does not fit."""
    name, given = f"elastic.{axis}_choices", getattr(c, f"{axis}_choices")
    for w in given:
        require(1 <= w <= full, f"{name} ({w}) must lie between 1 and the full model's {full}")
        require(w % unit == 0,
                f"{name} ({w}) must be a multiple of the number of groups ({unit}), so that all "
                f"groups keep the same count; nearest is {max(unit, round(w / unit) * unit)}")
    require(not given or full in given, f"{name} {given} must contain the full model's {full}")
    steps = range(max(1, n_least), n_steps + 1)
    widths = given or [max(unit, full * k // n_steps // unit * unit) for k in steps]
    return tuple(sorted(set(widths), reverse=True))


# -------------------------------------------------------------------------------------------- costs


@functools.cache  # a run builds its router twice: to refuse choices early, and to train it
@torch.no_grad()
def part_latency_ns(kind: str, shape: ModelConfig, n_rows: int, device: torch.device) -> float:
    """Measured nanoseconds of a layer (kind "": the output matrix) for a token that is read with 63
    others, and for one that is generated behind them; the sum of both medians of seven."""
    part = Block(kind, shape) if kind else nn.Linear(shape.d_model, shape.vocab_size, bias=False)
    part, x_BTD = part.to(device), torch.randn(n_rows, 64, shape.d_model, device=device)
    cached = part(x_BTD, None, None)[1] if kind else None
    total = 0.0
    for x_BtD, past in ((x_BTD, None), (x_BTD[:, :1], cached)):
        times = []
        for _ in range(8):
            began = time.perf_counter()
            left = part(x_BtD, past, None)[1] if kind else part(x_BtD)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
            past = past and left  # generating goes on where it was
        total += sorted(times[1:])[3] * 1e9 / x_BtD[..., 0].numel()
    return total


def cost_measure(c: ElasticConfig, device: torch.device) -> Callable[[str, ModelConfig], float]:
    """What a part of a model costs, by its kind and shape, in the unit of `elastic.cost`."""

    def measure(kind: str, shape: ModelConfig) -> float:
        if c.cost == "latency":
            return parallel.on_first(lambda: part_latency_ns(kind, shape, c.cost_batch, device))
        if c.cost == "flops":
            return part_flops(kind, shape, c.cost_len)
        n = part_parameters(kind, shape)
        if c.cost == "memory":  # bytes of weights and caches
            cache = part_cache_bytes(kind, shape, c.cost_len, SERVED_BYTES)
            n = n * SERVED_BYTES + c.cost_batch * cache
        return float(n)

    return measure


class Costs(nn.Module):
    """What each choice costs, as tables: of each kind of layer, and of what is outside the layers.

    A table has an axis for the stream and for each of the layer's own, so any cost will do, also a
    measured one. Choices are independent: probabilities times tables is exactly the expected cost.
    """

    def __init__(self, space: Space, measure: Callable[[str, ModelConfig], float]):
        super().__init__()
        self.space = space
        config, streams = space.config, space.choices["d_model"]
        outside = [measure("", replace(config, d_model=d)) for d in streams]
        self.register_buffer("outside", torch.tensor(outside, dtype=torch.float64))
        for kind in sorted(set(config.pattern)):
            # 1. every combination of widths of the stream and of the layer
            names = ["d_model", *WIDTH_FIELDS[kind]]
            widths = [streams, *(space.choices[a] for a in AXES_OF[kind])]
            found = [measure(kind, replace(config, **dict(zip(names, each, strict=True))))
                     for each in itertools.product(*widths)]
            table = torch.tensor(found, dtype=torch.float64).view([len(w) for w in widths])
            # 2. a wider part costs no less, whatever the clock says
            for axis in range(len(widths)):
                table = table.flip(axis).cummax(axis).values.flip(axis)
            self.register_buffer(TABLES[kind], table)

    def table(self, i: int) -> Tensor:
        """Of layer i."""
        return getattr(self, TABLES[self.space.config.pattern[i]])

    def dearest_first(self) -> list[int]:
        """Layers by the cost of their smallest form: no order makes the smallest model cheaper."""
        n = len(self.space.config.pattern)
        return sorted(range(n), key=lambda i: -float(self.table(i).min()))

    def expected(self, p: dict[str, Tensor], depth_order: list[int]) -> Tensor:
        """Expected cost under probabilities [decisions, widths] of every axis."""
        return p["d_model"][0].double() @ self.outside + self.by_layer(p, depth_order).sum()

    def by_layer(self, p: dict[str, Tensor], depth_order: list[int]) -> Tensor:
        """Expected cost of each layer."""
        stream, found = p["d_model"][0].double(), []
        for i, gamma in enumerate(self.space.gamma(p["depth"][0], depth_order)):
            t = torch.tensordot(stream, self.table(i), dims=1)
            for axis in AXES_OF[self.space.config.pattern[i]]:
                t = torch.tensordot(p[axis][self.space.decision(axis, i)].double(), t, dims=1)
            found.append(gamma.double() * t)
        return torch.stack(found)

    def exact(self, choice: Choice, depth_order: list[int]) -> float:
        """Cost of one choice."""
        return self.pricer(depth_order)(choice)

    def pricer(self, depth_order: list[int]) -> Callable[..., float]:
        """The cost of a choice as a function, for many choices: it looks up lists, not tensors.
        Given (axis, decision) pairs too, only what the layers cost that these are about."""
        s, outside = self.space, self.outside.tolist()
        lists = {kind: getattr(self, TABLES[kind]).tolist() for kind in set(s.config.pattern)}
        layers = [(lists[kind], [(a, s.decision(a, i)) for a in AXES_OF[kind]])
                  for i, kind in enumerate(s.config.pattern)]

        def price(choice: Choice, pairs: Iterable[tuple[str, int]] | None = None) -> float:
            d, total = choice["d_model"][0], 0.0
            kept = depth_order[len(depth_order) - s.choices["depth"][choice["depth"][0]] :]
            if pairs is not None:
                kept = {i for a, j in pairs for i in s.about(a, j)}.intersection(kept)
            for i in kept:
                table, axes = layers[i]
                cost = table[d]
                for axis, j in axes:
                    cost = cost[choice[axis][j]]
                total += cost
            return total if pairs is not None else outside[d] + total

        return price


# ----------------------------------------------------------------------------------------- a router


class Router(nn.Module):
    """Budget -> logits over the widths of every axis: one-hot -> Linear -> LeakyReLU -> Linear.

    It carries all that a checkpoint needs to choose: cost tables, and the order in which layers go.
    """

    def __init__(self, space: Space, c: ElasticConfig, costs: Costs, depth_order: list[int]):
        super().__init__()
        self.space, self.costs, self.settings = space, costs, c
        self.register_buffer("depth", torch.tensor(depth_order))
        self.mlps = nn.ModuleDict()
        for axis, widths in space.choices.items():
            n = space.n_decisions(axis)
            last = nn.Linear(c.router_width, n * len(widths))
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            last.bias.detach().view(n, -1)[:, 0] = c.router_bias
            first = nn.Linear(len(c.budgets), c.router_width)
            self.mlps[axis] = nn.Sequential(first, nn.LeakyReLU(0.1), last)

    @property
    def depth_order(self) -> list[int]:
        """Layers, the first to go first."""
        return self.depth.tolist()

    @property
    def full_cost(self) -> float:
        """Cost of the full model."""
        return self.costs.exact(self.space.extreme(), self.depth_order)

    def fraction(self, budget: float) -> float:
        """A budget as a fraction of the full model's cost; above 1 it is an absolute cost."""
        return budget if budget <= 1 else budget / self.full_cost

    def is_full(self, budget: float) -> bool:
        """Whether a budget is that of the full model, which needs no router."""
        return self.fraction(budget) >= 1 - 1e-9

    def forward(self, budget: float) -> dict[str, Tensor]:
        """Logits [decisions, widths] of every axis. What a budget has of the full one, which is the
        full model and learns no choice, counts as a strong vote for the full widths."""
        x = self.one_hot(budget).to(self.mlps["d_model"][0].weight)
        full = float(x[0]) if self.is_full(self.settings.budgets[0]) else 0.0
        if full:
            x = F.one_hot(torch.tensor(1 % len(x)), len(x)).to(x)  # the other neighbour
        logits = {a: mlp(x).view(self.space.n_decisions(a), -1) for a, mlp in self.mlps.items()}
        return {a: (1 - full) * v + full * FULL_VOTE * F.one_hot(
            torch.zeros_like(v[:, 0], dtype=torch.long), v.shape[-1]) for a, v in logits.items()}

    def one_hot(self, budget: float) -> Tensor:
        """A budget as routers read it: one-hot, or in between a mixture of its two neighbours.
        Raises ValueError for a budget outside of the trained ones."""
        b, trained = self.fraction(budget), [self.fraction(b) for b in self.settings.budgets]
        known = ", ".join(f"{t:g}" for t in trained)
        require(trained[-1] - 1e-9 <= b <= trained[0] + 1e-9,
                f"budget ({budget:g}) is unknown: this model was trained for {known} of the full "
                f"{self.settings.cost}, and for what lies between; choose one of those")
        x = torch.zeros(len(trained))
        above = max(i for i, t in enumerate(trained) if t >= b - 1e-9)
        below = min(above + 1, len(trained) - 1)
        weight = 1.0 if above == below else (b - trained[below]) / (trained[above] - trained[below])
        x[above] += weight
        x[below] += 1 - weight
        return x

    @torch.no_grad()
    def choice(self, budget: float) -> Choice:
        """The likeliest, repaired to meet a budget; between two trained budgets with widths between
        theirs, or above both, as far as that can be. Raises ValueError for one outside of all."""
        around = [self.settings.budgets[i] for i in self.one_hot(budget).nonzero()]
        if self.is_full(budget):
            return self.space.extreme()
        logp = {a: v.log_softmax(-1) for a, v in self(budget).items()}
        if len(around) == 1:
            return fit_to_budget(logp, self, budget)
        larger, smaller = map(self.choice, around)
        away = {a: torch.zeros_like(v) for a, v in logp.items()}
        for a, widths in self.space.choices.items():
            w = torch.tensor(widths) / widths[0]
            for j, ends in enumerate(zip(larger[a], smaller[a], strict=True)):
                above, below = w - w[min(ends)], w[max(ends)] - w
                away[a][j] = ABOVE * above.clamp(0) + BELOW * below.clamp(0)
        logp = {a: v - away[a] for a, v in logp.items()}
        tries = [fit_to_budget(logp, self, min(1.0, (1 - less * MET) * self.fraction(budget)))
                 for less in (0.0, 0.5, 0.75, -0.5, -0.75)]
        lost = {a: v.tolist() for a, v in away.items()}
        return min(tries, key=lambda choice: score_of(lost, choice))  # the first of equals

    @torch.no_grad()
    def choose(self, budget: float, or_none: bool = False) -> Widths | None:
        """The widths of that choice. Raises ValueError for a budget outside of all, and for one
        that no widths come near, unless None will do."""
        choice = self.choice(budget)
        if or_none and self.off(choice, budget) > MET:
            return None
        self.check_met(choice, budget)
        return self.space.widths(choice, self.depth_order)

    def off(self, choice: Choice, budget: float) -> float:
        """How far the cost of a choice is from its budget, relative to that."""
        share = self.costs.exact(choice, self.depth_order) / self.full_cost
        return abs(share / self.fraction(budget) - 1)

    @torch.no_grad()
    def settle(self, choices: dict[float, Choice], vote: float = FULL_VOTE) -> None:
        """From now on choose these, for trained budgets, until more is learned: each leads through
        a hidden unit of its own to a vote, in logits. In between, votes mix as learned ones do."""
        n_own = len(self.settings.budgets)
        for axis, (first, _, last) in self.mlps.items():
            first.weight[:n_own] = torch.eye(n_own)
            first.bias[:n_own] = 0.0
            for p in last.parameters():
                p.zero_()
            votes = last.weight.view(self.space.n_decisions(axis), -1, last.in_features)
            for n, budget in enumerate(self.settings.budgets):
                for j, k in enumerate(choices[budget][axis] if budget in choices else ()):
                    votes[j, k, n] = vote

    def check_met(self, choice: Choice, budget: float) -> None:
        """Raises ValueError for a choice that costs something else than its budget says."""
        share = self.costs.exact(choice, self.depth_order) / self.full_cost
        require(self.off(choice, budget) <= MET,
                f"budget ({budget:g}) cannot be met within 2 %: the nearest choice has {share:.4f} "
                f"of the full {self.settings.cost}; ask for that, or give finer elastic.*_choices")


def build_router(config: ModelConfig, c: ElasticConfig, depth_order: list[int] | None,
                 device: torch.device) -> Router:
    """A router over the choices of a model. Raises ValueError for choices or budgets of no use.

    depth_order: layers, the first to go first; None where they are not ranked yet: only what no
    order can reach is refused.
    """
    # 1. the router
    space = Space(config, c)
    costs = Costs(space, cost_measure(c, device))
    router = Router(space, c, costs, depth_order or costs.dearest_first()).to(device)
    # 2. its budgets
    is_ranked = depth_order is not None or len(space.choices["depth"]) == 1
    indifferent = {a: torch.zeros(space.n_decisions(a), len(w)) for a, w in space.choices.items()}
    full, unit, largest = router.full_cost, c.cost, c.budgets[0]
    least = costs.exact(space.extreme(smallest=True), router.depth_order)
    for b in c.budgets:
        require(router.fraction(b) <= 1 + 1e-9,
                f"elastic.budgets ({b:g}) is more than the full model's {full:g} {unit}; lower it")
        require(router.fraction(b) >= least / full,
                f"elastic.budgets ({b:g}) is below the smallest model that the choices can make: "
                f"{least:g} {unit}, {least / full:.3f} of the full model (above 1 a budget is an "
                "absolute cost); raise it, or give smaller choices")
        if is_ranked and not router.is_full(b):
            router.check_met(fit_to_budget(indifferent, router, b), b)
    require(c.self_kl == 0 or router.is_full(largest),
            f"elastic.self_kl ({c.self_kl:g}) makes the full model a teacher: it must train, and "
            f"the largest of elastic.budgets is {largest:g}; begin them with "
            f"{1 if largest <= 1 else full:.15g}, or set elastic.self_kl to 0")
    return router


def unmeasured_router(config: ModelConfig, c: ElasticConfig) -> Router:
    """A router that knows no costs yet: to be loaded, or to be counted."""
    space = Space(config, c)
    return Router(space, c, Costs(space, lambda *_: 0.0), list(range(len(config.pattern))))


# ------------------------------------------------------------------------------ choosing for a cost


def score_of(scores: dict[str, list[list[float]]], choice: Choice) -> float:
    """The sum over all decisions of what is chosen; scores: of each axis, decision and width."""
    return sum(row[k] for a in scores for row, k in zip(scores[a], choice[a], strict=True))


def fit_to_budget(logp: dict[str, Tensor], router: Router, budget: float) -> Choice:
    """The likeliest choice, changed where it must be to cost what the budget says.

    The steps of the stream's width and of the depth are too coarse to aim with: for each of these,
    the widths inside the layers are brought near the budget. The likeliest result within 0.5 % is
    taken, else the nearest, after changing two widths at once where one alone came no nearer.
    """
    # 1. plain lists, for there are many look-ups: log-probabilities, the likeliest, the target
    scores = {a: v.tolist() for a, v in logp.items()}
    likeliest = {a: [row.index(max(row)) for row in rows] for a, rows in scores.items()}
    target = router.fraction(budget) * router.full_cost
    near, cost = 0.005 * target, router.costs.pricer(router.depth_order)

    def rank(result: tuple[Choice, float]) -> tuple[float, float]:
        choice, gap = result
        return max(gap, near), -score_of(scores, choice)

    # 2. from every width of the stream and every depth towards the target; the best of them
    starts = [{**likeliest, "d_model": [d], "depth": [n]} for d in range(len(scores["d_model"][0]))
              for n in range(len(scores["depth"][0]))]
    results = []
    for n_at_once in (1, 2):
        results += [_approach(start, scores, cost, target, near, n_at_once) for start in starts]
        if (best := min(results, key=rank))[1] <= near:
            break
    # 3. Stuck: from the full widths, whatever is likely, as `build_router` has tried before.
    if best[1] > MET * target:
        alike = {a: [[0.0] * len(row) for row in rows] for a, rows in scores.items()}
        results += [_approach(router.space.extreme() | {a: start[a] for a in ("d_model", "depth")},
                              alike, cost, target, near, n) for start in starts for n in (1, 2)]
        best = min(results, key=rank)
    return best[0]


def _approach(choice: Choice, scores: dict[str, list], cost: Callable[[Choice], float],
              target: float, near: float, n_at_once: int) -> tuple[Choice, float]:
    """Change widths inside the layers until the cost is within `near` of the target, or stuck.

    Each time, of all changes of up to n_at_once decisions, that one is made which loses least
    log-probability for each unit that it comes nearer. Returns the choice, and how far it is off.
    """
    gap = abs((total := cost(choice)) - target)
    while gap > near:
        single = [(a, j, k) for a in scores if a in KIND_OF for j, row in enumerate(scores[a])
                  for k in range(len(row)) if k != choice[a][j]]
        best = None
        for n in range(1, n_at_once + 1):
            for changes in itertools.combinations(single, n) if best is None else ():
                pairs = [(a, j) for a, j, _ in changes]
                changed = {a: list(v) for a, v in choice.items()}
                for a, j, k in changes:
                    changed[a][j] = k
                new_total = total + (cost(changed, pairs) - cost(choice, pairs))
                new_gap = abs(new_total - target)
                if new_gap < gap - 1e-9:
                    loss = sum(scores[a][j][choice[a][j]] - scores[a][j][changed[a][j]]
                               for a, j in pairs)
                    if best is None or loss / (gap - new_gap) < best[0]:
                        best = (loss / (gap - new_gap), changed, new_total)
        if best is None:
            break
        _, choice, total = best
        gap = abs(total - target)
    return choice, gap


def at_random(router: Router, budget: float, seed: int) -> Choice:
    """Random widths and depth that meet a budget: a choice by random scores, repaired as a router's
    is."""
    generator = torch.Generator().manual_seed(seed)
    scores = {a: torch.rand(router.space.n_decisions(a), len(w), generator=generator)
              for a, w in router.space.choices.items()}
    return fit_to_budget(scores, router, budget)


def by_hand(router: Router, budget: float) -> Choice:
    """Every width by about the same factor, as one chooses without a router. Layers go where that
    comes nearer to the budget."""
    space, cost = router.space, router.costs.pricer(router.depth_order)
    full_cost, fraction = router.full_cost, router.fraction(budget)

    def logp(factor: float) -> dict[str, Tensor]:
        """The nearer to that factor the likelier; layers go last."""
        rows = {}
        for a, w in space.choices.items():
            aim, weight = (1.0, 1e6) if a == "depth" else (factor, 10.0)
            row = -(torch.tensor(w) / float(w[0]) - aim).abs() * weight
            rows[a] = row.expand(space.n_decisions(a), -1)
        return rows

    def off(factor: float) -> float:
        choice = {a: v.argmax(-1).tolist() for a, v in logp(factor).items()}
        return abs(cost(choice) / full_cost - fraction)

    return fit_to_budget(logp(min((k / 100 for k in range(1, 101)), key=off)), router, budget)


# --------------------------------------------------------------------------- a step of the search


def probabilities(logits: dict[str, Tensor], noise: dict[str, Tensor], scale: float, tau: float
                  ) -> dict[str, Tensor]:
    """Gumbel-softmax (eq. 8 to 10): softmax((scale logits + noise) / tau) of each decision."""
    return {a: torch.softmax((scale * v + noise[a]) / tau, dim=-1) for a, v in logits.items()}


def mask_weighting(p: dict[str, Tensor], mode: str) -> dict[str, Tensor]:
    """How much each width's mask counts: see `elastic.mask`."""
    if mode == "soft":
        return p
    likeliest = {a: F.one_hot(v.argmax(-1), v.shape[-1]).to(v) for a, v in p.items()}
    if mode == "top1":
        return {a: likeliest[a] * v for a, v in p.items()}
    return {a: likeliest[a] + v - v.detach() for a, v in p.items()}  # straight-through


def budget_loss(router: Router, p: dict[str, Tensor], budget: float) -> Tensor:
    """|E C(a) / (b C_full) - 1| beyond the dead zone: eq. 11 and 12, relative, all axes at once."""
    target = router.fraction(budget) * router.full_cost
    ratio = router.costs.expected(p, router.depth_order) / target
    return F.relu((ratio - 1).abs() - DEAD_ZONE)
