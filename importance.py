"""Which units of a model matter (arXiv 2511.16664, eq. 1 to 5): scores, ranks, best units first.

`SCORES` names the scores of every axis. A score of your own is a function and its entry there;
`--elastic.score-ffn NAME` then takes it. A score looks at sums over calibration tokens
(`activation_sums`) and at the weights: the channels of a layer are good where much goes through
them (paper), or where what they add to the residual stream is large (output).

How to read: `SCORES`, `rank`, `order_weights`; `score_table` compares the scores on a model.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model import HybridLM
from nested import UNITS, Units, Widths, full_widths, rotate, submodel, take
from system import parallel
from system.config import ElasticConfig, require_known
from system.costs import axis_sizes, in_proj_rows, weights_of

Sums = dict[str, Tensor]  # see `activation_sums`


@dataclass
class Ranking:
    """How a model is put in order."""

    units: Units  # the most important first, heads within their groups
    depth: list[int]  # layers, the least important first
    axes_DD: Tensor | None = None  # columns: an orthonormal basis to turn the stream to


def activation_sums(
    model: HybridLM, batches: list[dict[str, Tensor]], with_stream: bool = False) -> Sums:
    """Over all tokens, for each channel: sums of x^2 and, under `....abs`, of |x|.

    Keys: `layers.I.norm` and `norm`, what the norms give; `layers.I.mixer.q_norm`, queries as they
    are compared with keys; `layers.I.mixer.NAME.in` and `.out` of each matrix of a mixer. If asked
    for, `stream`: sum of x x^T over all norms, x = what the norm reads / its rms, [D, D].
    """
    sums: Sums = {}

    def add(key: str, x_BTE: Tensor) -> None:
        x_tE = x_BTE.detach().flatten(0, 1)
        for name, values_tE in ((key, x_tE.square()), (f"{key}.abs", x_tE.abs())):
            sums[name] = sums.get(name, 0) + values_tE.sum(0, dtype=torch.float64).cpu()

    def see(name: str, module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        if isinstance(module, nn.Linear):
            add(f"{name}.in", args[0])
            add(f"{name}.out", out)
            return
        if name.endswith("q_norm"):
            add(name, rearrange(out, "b h t p -> b t (h p)"))
            return
        add(name, out)
        if with_stream:
            x_TD = args[0].flatten(0, 1).double()
            x_TD = F.rms_norm(x_TD, module.normalized_shape, eps=module.eps)
            sums["stream"] = sums.get("stream", 0) + (x_TD.T @ x_TD).cpu()

    hooks = [module.register_forward_hook(partial(see, name))
             for name, module in model.named_modules() if name.split(".")[-1] in ("norm", "q_norm")
             or (name.startswith("layers.") and isinstance(module, nn.Linear))]
    for batch in batches:
        model(batch["tokens_BT"], ids_BT=batch["ids_BT"])
    for hook in hooks:
        hook.remove()
    return sums


def principal_axes(model: HybridLM, sums: Sums) -> Tensor:
    """Eigenvectors of the stream's sum of x x^T, as columns, the largest value first: each prefix
    keeps most of what the layers read. SliceGPT (arXiv 2401.15024) turns the stream anew for every
    layer; with one basis for all of them the residual connections stay as they are."""
    return torch.linalg.eigh(sums["stream"]).eigenvectors.flip(1)


def stream_paper(model: HybridLM, sums: Sums) -> Tensor:
    """Sum of |norm(x)_i| over all norms (eq. 1)."""
    norms = ["norm", *(f"layers.{i}.norm" for i in range(len(model.layers)))]
    return sum(sums[f"{norm}.abs"] for norm in norms)


def stream_output(model: HybridLM, sums: Sums) -> Tensor:
    """The same, at every norm times the size of what reads channel i."""
    readers = {"norm": [model.output_matrix]}
    for name, weight in weights_of(model.config).items():
        if weight.layer is not None and list(weight.axes)[1:] == ["D"]:
            readers.setdefault(f"layers.{weight.layer}.norm", []).append(model.get_parameter(name))
    return sum(sums[f"{norm}.abs"] * torch.cat(matrices).double().norm(dim=0).cpu()
               for norm, matrices in readers.items())


def ffn_paper(model: HybridLM, sums: Sums, i: int) -> Tensor:
    """Sum of |X W1_i^T| before the activation (eq. 2)."""
    return sums[f"layers.{i}.mixer.up_proj.out.abs"]


def mamba_paper(model: HybridLM, sums: Sums, i: int) -> tuple[Tensor, Tensor]:
    """Of s = norm(X) W_x^T (eq. 3 and 4), see `by_heads`."""
    rows = in_proj_rows(model.config)
    square_I = sums[f"layers.{i}.mixer.in_proj.out"][rows["z"] : rows["z"] + rows["x"]]
    return by_heads("M", model, square_I)


def attn_paper(model: HybridLM, sums: Sums, i: int) -> Tensor:
    """Size of a head's queries, behind QK-norm: what it takes away counts for nothing."""
    return by_heads("*", model, sums[f"layers.{i}.mixer.q_norm"])


def output(model: HybridLM, sums: Sums, i: int) -> Tensor | tuple[Tensor, Tensor]:
    """Size of what a unit adds to the stream: sqrt(sum_T |x_j W_j|^2), W the matrix that writes."""
    kind = model.config.pattern[i]
    matrix = {"-": "down_proj", "*": "o_proj", "M": "out_proj"}[kind]
    weight = getattr(model.layers[i].mixer, matrix).weight.detach().double()
    size = sums[f"layers.{i}.mixer.{matrix}.in"].sqrt() * weight.norm(dim=0).cpu()
    return size if kind == "-" else by_heads(kind, model, size.square())


def by_heads(kind: str, model: HybridLM, square_I: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """From a sum of squares per channel the norms of attention's heads; or those of Mamba-2's heads
    over the better half of the channels (eq. 4), and of its channels over all heads (eq. 3)."""
    square_HP = square_I.view(-1, axis_sizes(kind, model.config)["P"])
    if kind == "*":
        return square_HP.sum(1).sqrt()
    channels = square_HP.sum(0).sqrt()
    top = channels.argsort(descending=True)[: -(-len(channels) // 2)]
    return square_HP[:, top].sum(1).sqrt(), channels


def depth_once(n: int, score: Callable[[set[int]], float]) -> list[int]:
    """By s_j, what the logits change by without layer j, each scored with all others there."""
    return sorted(range(n), key=lambda j: score({j}))


def depth_paper(n: int, score: Callable[[set[int]], float]) -> list[int]:
    """By s_j (eq. 5), again and again: the least important layer goes first, and the rest are
    scored without it."""
    gone: list[int] = []
    while len(gone) < n:
        gone.append(min((j for j in range(n) if j not in gone), key=lambda j: score({*gone, j})))
    return gone


# The values of `elastic.score_AXIS`, beside "random". ffn, mamba, attn: scores of layer i's units,
# a tensor for each axis in `UNITS`; d_model: scores of the stream, or a basis; depth: the order.
SCORES: dict[str, dict[str, Callable]] = {
    "d_model": {"pca": principal_axes, "paper": stream_paper, "output": stream_output},
    "ffn": {"paper": ffn_paper, "output": output},
    "mamba": {"paper": mamba_paper, "output": output},
    "attn": {"paper": attn_paper, "output": output},
    "depth": {"paper": depth_paper, "once": depth_once},
}
AXIS_OF = {"-": "ffn", "M": "mamba", "*": "attn"}


def chosen_scores(c: ElasticConfig) -> dict[str, str]:
    """The name of each axis's score. Raises ValueError for one that is not in `SCORES`."""
    chosen = {axis: getattr(c, f"score_{axis}") for axis in SCORES}
    for axis, score in chosen.items():
        require_known(f"elastic.score_{axis}", score, [*SCORES[axis], "random"])
    return chosen


@torch.no_grad()
def rank(
    model: HybridLM, batches: list[dict[str, Tensor]], c: ElasticConfig, seed: int = 0) -> Ranking:
    """Rank units by the scores that the settings name, from forward passes over the batches of all
    processes, and layers, by more of them, if `depth_choices` drops some. Raises ValueError for an
    unknown score."""
    chosen, config = chosen_scores(c), model.config
    generator = torch.Generator().manual_seed(seed)
    sums = activation_sums(model, batches, with_stream=chosen["d_model"] == "pca")
    sums = {name: parallel.total(s) for name, s in sums.items()}

    def order(scores: Tensor, n_groups: int = 1) -> Tensor:
        within = scores.view(n_groups, -1).argsort(dim=1, descending=True, stable=True)
        return (within + torch.arange(n_groups)[:, None] * within.shape[1]).flatten()

    # 1. inside the layers, heads within their group
    layers: list[dict[str, Tensor] | None] = []
    for i, kind in enumerate(config.pattern):
        name, size = chosen[AXIS_OF[kind]], axis_sizes(kind, config)
        scores = ([torch.rand(size[a], generator=generator) for a in UNITS[kind]]
                  if name == "random" else SCORES[AXIS_OF[kind]][name](model, sums, i))
        scores = [scores] if isinstance(scores, Tensor) else scores
        layers.append({a: order(score, size["K"] if a == "H" else 1)
                       for a, score in zip(UNITS[kind], scores, strict=True)})
    # 2. the stream: scores [D], or a basis [D, D]
    name = chosen["d_model"]
    scores = (torch.rand(config.d_model, generator=generator) if name == "random"
              else SCORES["d_model"][name](model, sums))
    axes_DD = scores if scores.dim() == 2 else None
    stream = order(scores) if axes_DD is None else torch.arange(config.d_model)
    # 3. the layers; the last to go is one that mixes tokens: a model without reads no context
    depth = list(range(len(layers)))
    if any(n < len(layers) for n in c.depth_choices):
        depth = rank_layers(model, batches, chosen["depth"], generator)
        last = [i for i in depth if config.pattern[i] != "-"][-1]
        depth = [i for i in depth if i != last] + [last]
    # Principal axes may come out with other signs elsewhere: all take those of the first process.
    return parallel.on_first(lambda: Ranking(Units(stream, layers), depth, axes_DD))


def rank_layers(model: HybridLM, batches: list[dict[str, Tensor]], kind: str,
                generator: torch.Generator) -> list[int]:
    """Layers, the least important first. The score of a set of layers is sum (M_full - M)^2 / sum
    M_full^2 on the logits M without them (eq. 5)."""
    n = len(model.layers)
    if kind == "random":
        return torch.randperm(n, generator=generator).tolist()
    # Hidden states are kept, not logits, which are larger by V / D.
    full = [_hidden(model, batch, set()) for batch in batches]
    size = parallel.total(sum(model.logits(f).square().sum() for f in full))

    def score(without: set[int]) -> float:
        changed = (_hidden(model, batch, without) for batch in batches)
        off = sum((model.logits(f) - model.logits(c)).square().sum()
                  for f, c in zip(full, changed, strict=True))
        return float(parallel.total(off) / size)

    return SCORES["depth"][kind](n, score)


def _hidden(model: HybridLM, batch: dict[str, Tensor], without: set[int]) -> Tensor:
    """Last hidden states with some layers skipped."""
    whole = model.layers
    model.layers = nn.ModuleList(block for i, block in enumerate(whole) if i not in without)
    try:
        hidden_BTD, _ = model(batch["tokens_BT"], ids_BT=batch["ids_BT"])
    finally:
        model.layers = whole
    return hidden_BTD


@torch.no_grad()
def order_weights(model: HybridLM, ranking: Ranking) -> None:
    """Turn and permute a model's weights in place: best units first, and the same function."""
    weights = model.state_dict()
    if ranking.axes_DD is not None:
        weights = rotate(weights, model.config, ranking.axes_DD)
    model.load_state_dict(take(weights, model.config, ranking.units))


# What `score_table` halves: for each axis its score, the kind of layer, the shares of its widths.
HALVES = {"d_model": ("d_model", "", ()), "depth": ("depth", "", ()), "ffn": ("ffn", "-", (0.5,)),
          "mamba_heads": ("mamba", "M", (0.5, 1)), "mamba_channels": ("mamba", "M", (1, 0.5)),
          "attn_heads": ("attn", "*", (0.5,))}


def score_table(model: HybridLM, batches: list[dict[str, Tensor]], c: ElasticConfig,
                loss: Callable[[HybridLM], float]) -> dict[str, dict[str, float]]:
    """How well each score orders each axis: the loss with half of it (one layer less), untrained.

    Of groups all keep as many. Axes that the model lacks, or of which nothing can go, are left out.
    Args: batches: to rank on; loss: a model's, on held-out text. `random` is the mean of three.
    """
    config, full = model.config, full_widths(model.config)
    units = {"mamba_heads": config.mamba_groups, "attn_heads": config.n_kv_heads}

    def halved(axis: str) -> list[tuple[int, ...]]:
        """The widths of every layer."""
        _, kind, shares = HALVES[axis]
        unit = units.get(axis, 1)
        return [tuple(w if share == 1 else max(unit, int(w * share) // unit * unit)
                      for w, share in zip(own, shares, strict=True)) if k == kind else own
                for k, own in zip(config.pattern, full.layers, strict=True)]

    def half(axis: str, score: str, seed: int) -> float:
        field = HALVES[axis][0]
        # 1. rank by that score; pca is not for all models, and no other axis depends on it
        ordered, n = copy.deepcopy(model), len(full.layers)
        depths = (n, n - 1) if axis == "depth" else ()
        changes = {"score_d_model": "paper", "depth_choices": depths, f"score_{field}": score}
        ranking = rank(ordered, batches, replace(c, **changes), seed)
        order_weights(ordered, ranking)
        # 2. cut
        layers = halved(axis)
        if axis == "depth":
            layers[ranking.depth[0]] = ()
        d_model = full.d_model // (2 if axis == "d_model" else 1)
        return loss(submodel(ordered, Widths(d_model, tuple(layers))))

    table = {}
    for axis, (field, kind, _) in HALVES.items():
        if halved(axis) == list(full.layers) if kind else axis == "depth" and len(full.layers) == 1:
            continue
        known = [s for s in SCORES[field] if s != "pca" or not config.tie_embeddings]
        table[axis] = {score: half(axis, score, 0) for score in known}
        table[axis]["random"] = sum(half(axis, "random", seed) for seed in range(3)) / 3
    return table
