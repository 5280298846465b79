"""Routers: widths for a budget, and what each choice costs (Nemotron Elastic, arXiv 2511.16664, eq.
6 to 12).

For a budget b a `Router` gives logits over the widths of every axis, for every layer.
Gumbel-softmax turns them into weights of masks, and the budget loss |E C / (b C_full) - 1| keeps
their expected cost C near the budget. `Costs` has it as sums over tables, for parameters, memory,
FLOPs or measured latency. The last choice is repaired to meet its budget (`fit_to_budget`), which
also serves budgets that were never trained.

How to read: `Space`, what can be chosen; `COSTS` and `Costs`; `Router`; `probabilities`,
`mask_weighting` and `budget_loss`, a step of the search.
"""

import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Block
from nested import Masks, Widths, full_widths, in_groups
from system import parallel
from system.config import WIDTH_FIELDS, ElasticConfig, ModelConfig
from system.costs import axis_sizes, part_cache_bytes, part_flops, part_parameters, sum_of_parts
from system.errors import require

# Beside the stream and the depth, the axes of each kind of layer, in the order of `WIDTH_FIELDS`;
# each with its letter in nested.py.
KIND_OF = {"ffn": "-", "mamba_heads": "M", "mamba_channels": "M", "attn_heads": "*"}
LETTER = {"d_model": "D", "ffn": "F", "mamba_heads": "H", "mamba_channels": "P", "attn_heads": "H"}
AXES = ("d_model", "depth", *KIND_OF)
SERVED_BYTES = 2  # of a weight and of a cached key or value, where memory is the cost: bf16
DEAD_ZONE = 0.01  # relative distance from the budget that costs nothing
TABLES = {"-": "ffn", "*": "attention", "M": "mamba"}

# For each axis the index of the width chosen, one for all layers or one for each of its kind.
Choice = dict[str, list[int]]


class Space:
    """Everything that can be chosen: for each axis its widths, the largest first, and how many
    decisions it takes."""

    def __init__(self, config: ModelConfig, c: ElasticConfig):
        require(not config.widths,
                "elastic cannot start from a model whose layers have widths of their own, as one "
                "cut out of a family has; start from its parent")
        self.config, n = config, len(config.pattern)
        self.layers = {axis: [i for i, k in enumerate(config.pattern) if k == kind]
                       for axis, kind in KIND_OF.items()}
        # setting, values, full width; without values: steps in all, of the smallest width; unit
        heads, queries = config.mamba_heads, config.n_heads
        choices = {
            "d_model": _choices("d_model", c.d_model_choices, config.d_model, 8, 4),
            "depth": _choices("depth", c.depth_choices or (n,), n, 1, 1),
            "ffn": _choices("ffn", c.ffn_choices, config.d_ff, 24, 6),
            "mamba_heads": _choices(
                "mamba_head", c.mamba_head_choices, heads, 8, 4, config.mamba_groups),
            "mamba_channels": _choices(
                "mamba_channel", c.mamba_channel_choices, config.mamba_head_dim, 4, 2),
            "attn_heads": _choices("attn_head", c.attn_head_choices, queries, queries, queries // 2,
                                   config.n_kv_heads)}
        self.choices = {a: w for a, w in choices.items() if self.layers.get(a, [0])}
        self.shared = {a: a not in c.heterogeneous for a in self.choices}

    def n_decisions(self, axis: str) -> int:
        """One for the stream, for the depth and for an axis whose layers share their width, else
        one for each layer."""
        return 1 if axis not in KIND_OF or self.shared[axis] else len(self.layers[axis])

    def decision(self, axis: str, i: int) -> int:
        """Which decision of an axis holds for layer i."""
        return 0 if self.shared[axis] else self.layers[axis].index(i)

    def axes_of(self, i: int) -> list[str]:
        """The axes that layer i has, in the order of `WIDTH_FIELDS`."""
        return [axis for axis, kind in KIND_OF.items() if kind == self.config.pattern[i]]

    def extreme(self, smallest: bool = False) -> Choice:
        """The full model, or the smallest one."""
        return {a: [len(w) - 1 if smallest else 0] * self.n_decisions(a)
                for a, w in self.choices.items()}

    def indifferent(self) -> dict[str, Tensor]:
        """A logit of 0 for every width of every decision."""
        return {a: torch.zeros(self.n_decisions(a), len(w)) for a, w in self.choices.items()}

    def widths(self, choice: Choice, depth_order: list[int]) -> Widths:
        """What a choice keeps. depth_order: layers, the first to go first."""
        n_kept = self.choices["depth"][choice["depth"][0]]
        kept = set(depth_order[len(depth_order) - n_kept :])
        layers = tuple(
            tuple(self.choices[a][choice[a][self.decision(a, i)]] for a in self.axes_of(i))
            if i in kept else () for i in range(len(self.config.pattern)))
        return Widths(self.choices["d_model"][choice["d_model"][0]], layers)

    def gamma(self, p_depth: Tensor, depth_order: list[int]) -> list[Tensor]:
        """Probability that each layer is kept, from that of each depth."""
        n = len(depth_order)
        kept = [torch.tensor([float(depth_order.index(i) >= n - d) for d in self.choices["depth"]])
                for i in range(n)]
        return [p_depth @ k.to(p_depth) for k in kept]

    def masks(self, p: dict[str, Tensor], depth_order: list[int]) -> Masks:
        """Sum of the masks of all widths, weighted by p: probabilities, or 1 for the width that is
        chosen."""

        def mask(axis: str, weight: Tensor) -> Tensor:
            size = axis_sizes(KIND_OF.get(axis, ""), self.config)
            n, n_groups = size[LETTER[axis]], size["K"] if LETTER[axis] == "H" else 1
            one_each = [torch.zeros(n).index_fill(0, in_groups(w, n, n_groups), 1.0)
                        for w in self.choices[axis]]
            return weight @ torch.stack(one_each).to(weight)

        layers = [{LETTER[a]: mask(a, p[a][self.decision(a, i)]) for a in self.axes_of(i)}
                  for i in range(len(self.config.pattern))]
        return Masks(
            mask("d_model", p["d_model"][0]), layers, self.gamma(p["depth"][0], depth_order))


def _choices(name: str, given: tuple[int, ...], full: int, n_steps: int, n_least: int,
             unit: int = 1) -> tuple[int, ...]:
    """Widths to choose from, the largest first: those given, checked, or k / n_steps of the full
    width from n_least on.

    unit: what every width must be a multiple of. Raises ValueError for a width that does not fit.
    """
    if not given:
        steps = {max(unit, full * k // n_steps // unit * unit)
                 for k in range(max(1, n_least), n_steps + 1)}
        return tuple(sorted(steps, reverse=True))
    for w in given:
        require(1 <= w <= full,
                f"elastic.{name}_choices ({w}) must lie between 1 and the full model's {full}")
        require(w % unit == 0,
                f"elastic.{name}_choices ({w}) must be a multiple of the number of groups ({unit}),"
                " so that all groups keep the same count; nearest is "
                f"{max(unit, round(w / unit) * unit)}")
    require(full in given, f"elastic.{name}_choices {given} must contain the full model's {full}")
    return tuple(sorted(set(given), reverse=True))


# -------------------------------------------------------------------------------------------- costs


@functools.cache  # a run builds its router twice: to refuse choices early, and to train it
@torch.no_grad()
def part_latency_ns(kind: str, shape: ModelConfig, n_rows: int, device: torch.device,
                    n_tokens: int = 64) -> float:
    """Measured nanoseconds a token of a forward pass of a layer (kind "": of the output matrix);
    median of seven."""
    part = Block(kind, shape) if kind else nn.Linear(shape.d_model, shape.vocab_size, bias=False)
    part, x_BTD = part.to(device), torch.randn(n_rows, n_tokens, shape.d_model, device=device)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        part(x_BTD, None, None) if kind else part(x_BTD)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[3] * 1e9 / (n_rows * n_tokens)


# The values of `elastic.cost`: of a part of the model, its cost in parameters, FLOPs a token, bytes
# of weights and caches, nanoseconds a token.
COSTS: dict[str, Callable[[str, ModelConfig, ElasticConfig, torch.device], float]] = {
    "parameters": lambda kind, shape, c, device: float(part_parameters(kind, shape)),
    "flops": lambda kind, shape, c, device: part_flops(kind, shape, c.cost_len),
    "memory": lambda kind, shape, c, device: float(
        part_parameters(kind, shape) * SERVED_BYTES
        + c.cost_batch * part_cache_bytes(kind, shape, c.cost_len, SERVED_BYTES)),
    "latency": lambda kind, shape, c, device: parallel.on_first(
        lambda: part_latency_ns(kind, shape, c.cost_batch, device)),
}


def cost_measure(c: ElasticConfig, device: torch.device) -> Callable[[str, ModelConfig], float]:
    """The cost of a part of the model in the unit of `elastic.cost`."""
    return lambda kind, shape: COSTS[c.cost](kind, shape, c, device)


def total_cost(config: ModelConfig, c: ElasticConfig, device: torch.device) -> float:
    """Cost of a whole model, of any shape."""
    return sum_of_parts(cost_measure(c, device), config)


class Costs(nn.Module):
    """What each choice costs, as tables: for each width of the stream, of what is outside the
    layers, and of each layer.

    A layer's table has an axis for the stream and one for each of its own axes, so any cost will
    do, a measured one too. The expected cost under independent choices is exact: tables weighted by
    products of probabilities.
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
            widths = [streams, *(space.choices[a] for a in KIND_OF if KIND_OF[a] == kind)]
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
        """Layers, the one first whose smallest form costs most: the order in which the smallest
        models are cheapest."""
        return sorted(
            range(len(self.space.config.pattern)), key=lambda i: -float(self.table(i).min()))

    def expected(self, p: dict[str, Tensor], depth_order: list[int]) -> Tensor:
        """Expected cost under probabilities [decisions, widths] of every axis."""
        stream = p["d_model"][0].double()
        total = stream @ self.outside
        for i, gamma in enumerate(self.space.gamma(p["depth"][0], depth_order)):
            t = torch.tensordot(stream, self.table(i), dims=1)
            for axis in self.space.axes_of(i):
                t = torch.tensordot(p[axis][self.space.decision(axis, i)].double(), t, dims=1)
            total = total + gamma.double() * t
        return total

    def exact(self, choice: Choice, depth_order: list[int]) -> float:
        """Cost of one choice."""
        return self.pricer(depth_order)(choice)

    def pricer(self, depth_order: list[int]) -> Callable[[Choice], float]:
        """The cost of a choice as a function, for many choices: it looks up plain lists, not
        tensors."""
        s, outside = self.space, self.outside.tolist()
        lists = {kind: getattr(self, TABLES[kind]).tolist() for kind in set(s.config.pattern)}
        layers = [(lists[kind], [(a, s.decision(a, i)) for a in s.axes_of(i)])
                  for i, kind in enumerate(s.config.pattern)]

        def price(choice: Choice) -> float:
            d, total = choice["d_model"][0], 0.0
            for i in depth_order[len(depth_order) - s.choices["depth"][choice["depth"][0]] :]:
                table, axes = layers[i]
                cost = table[d]
                for axis, j in axes:
                    cost = cost[choice[axis][j]]
                total += cost
            return outside[d] + total

        return price


# ----------------------------------------------------------------------------------------- a router


class Router(nn.Module):
    """For a budget, logits over the widths of every axis: one-hot budget -> Linear -> LeakyReLU ->
    Linear, an MLP an axis.

    It carries all that a checkpoint needs to choose: budgets, cost tables, and the order in which
    layers go.
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
            with torch.no_grad():
                last.bias.view(n, -1)[:, 0] = c.router_bias
            self.mlps[axis] = nn.Sequential(
                nn.Linear(len(c.budgets), c.router_width), nn.LeakyReLU(0.1), last)

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
        """Logits [decisions, widths] of every axis."""
        x = self.one_hot(budget).to(self.mlps["d_model"][0].weight)
        return {a: mlp(x).view(self.space.n_decisions(a), -1) for a, mlp in self.mlps.items()}

    def one_hot(self, budget: float) -> Tensor:
        """The budget as the routers read it: one-hot for a trained one, a mixture of its two
        neighbours in between.

        Raises ValueError for a budget outside of the trained ones.
        """
        trained = [self.fraction(b) for b in self.settings.budgets]
        b = self.fraction(budget)
        require(trained[-1] - 1e-9 <= b <= trained[0] + 1e-9,
                f"budget ({budget:g}) is unknown: this model was trained for "
                f"{', '.join(f'{t:g}' for t in trained)} of the full {self.settings.cost}, and for "
                "what lies between; choose one of those")
        x = torch.zeros(len(trained))
        above = max(i for i, t in enumerate(trained) if t >= b - 1e-9)
        below = min(above + 1, len(trained) - 1)
        weight = 1.0 if above == below else (b - trained[below]) / (trained[above] - trained[below])
        x[above] += weight
        x[below] += 1 - weight
        return x

    @torch.no_grad()
    def choose(self, budget: float) -> Widths:
        """The widths for a budget: the likeliest choice, without noise, repaired to meet the
        budget.

        Raises ValueError for a budget outside of the trained ones.
        """
        self.one_hot(budget)
        if self.is_full(budget):
            return full_widths(self.space.config)
        if self.settings.choose == "fixed":
            choice = by_hand(self, budget)
        else:
            logp = {a: v.log_softmax(-1) for a, v in self(budget).items()}
            choice = fit_to_budget(logp, self, budget)
        self.check_met(choice, budget)
        return self.space.widths(choice, self.depth_order)

    def check_met(self, choice: Choice, budget: float, within: float = 0.02) -> None:
        """Raises ValueError for a choice that costs something else than its budget says."""
        reached = self.costs.exact(choice, self.depth_order) / self.full_cost
        require(abs(reached / self.fraction(budget) - 1) <= within,
                f"budget ({budget:g}) cannot be met within {100 * within:g} %: the nearest model "
                f"that the choices make has {reached:.4f} of the full {self.settings.cost}; ask "
                "for that, or train with finer elastic.*_choices")

    def check_budgets(self, is_ranked: bool) -> None:
        """Raises ValueError for a budget above the full model or out of reach, and where the full
        one must be among them.

        is_ranked: whether the order is known in which layers go; if not, only the least that any
        order makes counts.
        """
        kl, budgets, unit = self.settings.self_kl, self.settings.budgets, self.settings.cost
        full = self.full_cost
        least = self.costs.exact(self.space.extreme(smallest=True), self.depth_order)
        for b in budgets:
            require(self.fraction(b) <= 1 + 1e-9,
                    f"elastic.budgets ({b:g}) is more than the full model's {full:g} {unit}; lower "
                    "it")
            require(self.fraction(b) >= least / full,
                    f"elastic.budgets ({b:g}) is below the smallest model that the choices can "
                    f"make: {least:g} {unit}, {least / full:.3f} of the full model (above 1 a "
                    "budget is an absolute cost); raise it, or give smaller choices")
            if is_ranked and not self.is_full(b):
                self.check_met(fit_to_budget(self.space.indifferent(), self, b), b)
        require(kl == 0 or self.is_full(budgets[0]),
                f"elastic.self_kl ({kl:g}) makes the full model a teacher, so it must be trained, "
                f"and the largest of elastic.budgets is {budgets[0]:g}; begin them with "
                f"{1 if budgets[0] <= 1 else full:.15g}, or set elastic.self_kl to 0")


def build_router(config: ModelConfig, c: ElasticConfig, depth_order: list[int] | None,
                 device: torch.device) -> Router:
    """A router over the choices of a model. Raises ValueError for choices or budgets that do not
    fit.

    depth_order: layers, the first to go first; None where they are not ranked yet: only what no
    order can reach is refused.
    """
    space = Space(config, c)
    costs = Costs(space, cost_measure(c, device))
    router = Router(space, c, costs, depth_order or costs.dearest_first()).to(device)
    router.check_budgets(is_ranked=depth_order is not None or len(space.choices["depth"]) == 1)
    return router


def unmeasured_router(config: ModelConfig, c: ElasticConfig) -> Router:
    """A router that knows no costs yet: to be loaded, or to be counted."""
    space = Space(config, c)
    return Router(space, c, Costs(space, lambda *_: 0.0), list(range(len(config.pattern))))


# ------------------------------------------------------------------------------ choosing for a cost


def fit_to_budget(
    logp: dict[str, Tensor], router: Router, budget: float, tolerance: float = 0.005) -> Choice:
    """The likeliest choice, changed where it must be to cost what the budget says.

    The steps of the stream's width and of the depth are too coarse to aim with: for each of these,
    the widths inside the layers are brought near the budget. The likeliest result within the
    tolerance is taken, and where there is none, the nearest one, after changing two widths at once
    where one alone came no nearer.
    """
    # 1. plain lists, for there are many look-ups: log-probabilities, the likeliest, the target
    scores = {a: v.tolist() for a, v in logp.items()}
    likeliest = {a: [max(range(len(row)), key=row.__getitem__) for row in rows]
                 for a, rows in scores.items()}
    target = router.fraction(budget) * router.full_cost
    near, cost = tolerance * target, router.costs.pricer(router.depth_order)

    def rank(result: tuple[Choice, float]) -> tuple[float, float]:
        choice, gap = result
        return max(gap, near), -sum(
            row[k] for a in scores for row, k in zip(scores[a], choice[a], strict=True))

    # 2. from every width of the stream and every depth towards the target; the best of them
    coarse = list(itertools.product(
        range(len(scores["d_model"][0])), range(len(scores["depth"][0]))))
    for n_at_once in (1, 2):
        results = [_approach({**likeliest, "d_model": [d], "depth": [n]}, scores, cost, target,
                             near, n_at_once) for d, n in coarse]
        choice, gap = min(results, key=rank)
        if gap <= near:
            break
    return choice


def _approach(choice: Choice, scores: dict[str, list], cost: Callable[[Choice], float],
              target: float, near: float, n_at_once: int) -> tuple[Choice, float]:
    """Change what is chosen inside the layers until its cost is within `near` of the target, or
    nothing comes nearer.

    Each time, of all changes of up to n_at_once decisions, that one is made which loses least
    log-probability for each unit that it comes nearer. Returns the choice, and its distance from
    the target.
    """
    single = [(a, j, k) for a in scores if a in KIND_OF
              for j, row in enumerate(scores[a]) for k in range(len(row))]
    gap = abs(cost(choice) - target)
    while gap > near:
        best = None
        for n in range(1, n_at_once + 1):
            for changes in itertools.combinations(single, n) if best is None else ():
                changed = {a: list(v) for a, v in choice.items()}
                for a, j, k in changes:
                    changed[a][j] = k
                new_gap = abs(cost(changed) - target)
                if new_gap < gap - 1e-9:
                    loss = sum(scores[a][j][choice[a][j]] - scores[a][j][changed[a][j]]
                               for a, j, _ in changes)
                    if best is None or loss / (gap - new_gap) < best[0]:
                        best = (loss / (gap - new_gap), changed, new_gap)
        if best is None:
            break
        _, choice, gap = best
    return choice, gap


def by_hand(router: Router, budget: float) -> Choice:
    """Every width by about the same factor, all layers kept: what one would choose without a
    router."""
    space, cost = router.space, router.costs.pricer(router.depth_order)
    full_cost, fraction = router.full_cost, router.fraction(budget)

    def logp(factor: float) -> dict[str, Tensor]:
        """The nearer to that factor the likelier; depth must not change."""
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
    """Gumbel-softmax: softmax((scale logits + noise) / tau) over the widths of each decision (eq. 8
    to 10)."""
    return {a: torch.softmax((scale * v + noise[a]) / tau, dim=-1) for a, v in logits.items()}


# The values of `elastic.mask`: weights of the masks from probabilities p, and 1 for the likeliest.
MASK_MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "soft": lambda p, likeliest: p,
    "top1": lambda p, likeliest: likeliest * p,
    "straight-through": lambda p, likeliest: likeliest + p - p.detach(),
}


def mask_weighting(p: dict[str, Tensor], mode: str) -> dict[str, Tensor]:
    """How much each width's mask counts: see `elastic.mask`."""
    return {a: MASK_MODES[mode](v, F.one_hot(v.argmax(-1), v.shape[-1]).to(v))
            for a, v in p.items()}


def budget_loss(router: Router, p: dict[str, Tensor], budget: float) -> Tensor:
    """|E C(a) / (b C_full) - 1| beyond the dead zone: the relative form of eq. 11 and 12, on all
    axes jointly."""
    ratio = router.costs.expected(p, router.depth_order) / (
        router.fraction(budget) * router.full_cost)
    return F.relu((ratio - 1).abs() - DEAD_ZONE)
