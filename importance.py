"""Which units of a model matter: scores, ranks, the same model with its best units first (arXiv
2511.16664, eq. 1 to 5)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import HybridLM
from nested import Units, named_dims, rotate, take
from system.config import ElasticConfig

# --------------------------------------------------------------------------------------- importance


@dataclass
class Ranking:
    """Units of every axis, the most important first (heads within their groups), and layers, the
    least important first.

    axes_DD: an orthonormal basis to turn the residual stream to (its columns), None to leave it.
    """

    units: Units
    depth: list[int]
    axes_DD: Tensor | None = None


@torch.no_grad()
def rank(
    model: HybridLM, batches: list[dict[str, Tensor]], c: ElasticConfig, seed: int = 0) -> Ranking:
    """Rank all units by the scores that the settings name, from forward passes over calibration
    batches.

    Layers, which take a pass each, are ranked only where `depth_choices` can drop some.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    is_turned = c.score_d_model == "pca"
    sums = activation_sums(model, batches, with_stream=is_turned)

    def order(scores: Tensor, kind: str, n_groups: int = 1) -> Tensor:
        if kind == "random":
            scores = torch.rand(scores.shape, generator=generator)
        within = scores.view(n_groups, -1).argsort(dim=1, descending=True, stable=True)
        return (within + torch.arange(n_groups)[:, None] * within.shape[1]).flatten()

    layers: list[dict[str, Tensor] | None] = []
    for i, kind in enumerate(config.pattern):
        if kind == "-":
            layers.append({"F": order(ffn_scores(model, sums, i, c.score_ffn), c.score_ffn)})
        elif kind == "*":
            layers.append(
                {
                    "A": order(
                        attn_scores(model, sums, i, c.score_attn), c.score_attn, config.n_kv_heads)
                }
            )
        else:
            heads, channels = mamba_scores(model, sums, i, c.score_mamba)
            layers.append(
                {"H": order(heads, c.score_mamba, config.mamba_groups),
                 "P": order(channels, c.score_mamba)}
            )
    if is_turned:
        stream, axes_DD = torch.arange(config.d_model), principal_axes(sums)
    else:
        stream, axes_DD = order(stream_scores(model, sums, c.score_d_model), c.score_d_model), None
    n = len(layers)
    is_elastic = any(depth < n for depth in c.depth_choices)
    depth = list(range(n))
    if is_elastic:
        depth = rank_layers(model, batches, c.score_depth, generator)
        # The last to go is one that mixes tokens: without any a model could not read its context.
        last = [i for i in depth if config.pattern[i] != "-"][-1]
        depth = [i for i in depth if i != last] + [last]
    return Ranking(Units(stream, layers), depth, axes_DD)


@torch.no_grad()
def order_weights(model: HybridLM, ranking: Ranking) -> None:
    """Turn and permute the weights of a model, in place: the best units come first, and its
    function does not change."""
    weights = model.state_dict()
    if ranking.axes_DD is not None:
        weights = rotate(weights, model.config, ranking.axes_DD)
    model.load_state_dict(take(weights, model.config, ranking.units))


def activation_sums(
    model: HybridLM, batches: list[dict[str, Tensor]], with_stream: bool = False
) -> dict[str, Tensor]:
    """Over all tokens, for each channel: sums of |x| of what the norms give, and of x^2 of what
    matrices read and give.

    Keys: `layers.I.norm` and `norm`; `layers.I.mixer.NAME.in` and `.out` for each matrix of a
    mixer; `....abs` for |x|. If asked for, `stream`: sum of x x^T over all norms, x = what the norm
    reads / its rms, [D, D].
    """
    sums: dict[str, Tensor] = {}

    def add(key: str, x_BTE: Tensor) -> None:
        x = x_BTE.detach().flatten(0, 1).double()
        for name, value in ((key, x.square().sum(0)), (f"{key}.abs", x.abs().sum(0))):
            sums[name] = sums.get(name, 0) + value.cpu()

    def add_stream(norm: nn.RMSNorm, args: tuple[Tensor]) -> None:
        x_XD = F.rms_norm(args[0].flatten(0, 1).double(), norm.normalized_shape, eps=norm.eps)
        sums["stream"] = sums.get("stream", 0) + (x_XD.T @ x_XD).cpu()

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("layers."):
            hooks.append(
                module.register_forward_pre_hook(lambda _, args, n=name: add(f"{n}.in", args[0])))
            hooks.append(
                module.register_forward_hook(lambda _, args, out, n=name: add(f"{n}.out", out)))
        elif name.split(".")[-1] == "norm":
            hooks.append(module.register_forward_hook(lambda _, args, out, n=name: add(n, out)))
            if with_stream:
                hooks.append(module.register_forward_pre_hook(add_stream))
    for batch in batches:
        model(batch["tokens_BT"], ids_BT=batch["ids_BT"])
    for hook in hooks:
        hook.remove()
    return sums


def principal_axes(sums: dict[str, Tensor]) -> Tensor:
    """Eigenvectors of the stream's sum of x x^T, as columns, the largest value first.

    Of all the bases, each prefix of this one keeps most of what the layers read (as in SliceGPT,
    arXiv 2401.15024, which turns the stream anew for every layer; with one basis for all of them
    the residual connections stay as they are).
    """
    return torch.linalg.eigh(sums["stream"]).eigenvectors.flip(1)


def stream_scores(model: HybridLM, sums: dict[str, Tensor], kind: str) -> Tensor:
    """Channels of the stream. paper: sum of |norm(x)_i| over all norms (eq. 1); output: times the
    size of what reads i."""
    readers = {"norm": [model.output_matrix]}
    for name, i, _, dims in named_dims(
        [n for n, _ in model.named_parameters()], model.config.pattern):
        if i is not None and dims[1:] == ["D"]:
            readers.setdefault(f"layers.{i}.norm", []).append(model.get_parameter(name))
    total = torch.zeros(model.config.d_model, dtype=torch.float64)
    for norm, matrices in readers.items():
        size = torch.cat(matrices).double().norm(dim=0).cpu() if kind == "output" else 1.0
        total += sums[f"{norm}.abs"] * size
    return total


def ffn_scores(model: HybridLM, sums: dict[str, Tensor], i: int, kind: str) -> Tensor:
    """FFN neurons. paper: sum of |X W1_i^T| before the activation (eq. 2); output: size of what it
    adds to the stream."""
    if kind == "output":
        return _contribution(model, sums, i, "down_proj")
    return sums[f"layers.{i}.mixer.up_proj.out.abs"]


def mamba_scores(
    model: HybridLM, sums: dict[str, Tensor], i: int, kind: str) -> tuple[Tensor, Tensor]:
    """Mamba heads and head channels, from a size per (head, channel).

    paper: of s = norm(X) W_x^T; a channel's score is its norm over all heads (eq. 3), a head's is
    its norm over the better half of the channels (eq. 4). output: the same from what each adds to
    the stream.
    """
    config = model.config
    if kind == "output":
        square = _contribution(model, sums, i, "out_proj").square()
    else:
        inner = config.mamba_heads * config.mamba_head_dim
        square = sums[f"layers.{i}.mixer.in_proj.out"][inner : 2 * inner]
    square_HP = square.view(config.mamba_heads, config.mamba_head_dim)
    channels = square_HP.sum(0).sqrt()
    top = channels.argsort(descending=True)[: -(-len(channels) // 2)]
    return square_HP[:, top].sum(1).sqrt(), channels


def attn_scores(model: HybridLM, sums: dict[str, Tensor], i: int, kind: str) -> Tensor:
    """Query heads. paper: size of the head's queries; output: size of what the head adds to the
    stream."""
    square = (_contribution(model, sums, i, "o_proj").square()
              if kind == "output"
              else sums[f"layers.{i}.mixer.q_proj.out"])
    return square.view(model.config.n_heads, model.config.attn_head_dim).sum(1).sqrt()


def _contribution(model: HybridLM, sums: dict[str, Tensor], i: int, matrix: str) -> Tensor:
    """Root of the sum over tokens of |x_j W_j|^2: how much input j of the matrix that writes to the
    stream adds to it."""
    weight = getattr(model.layers[i].mixer, matrix).weight
    return sums[f"layers.{i}.mixer.{matrix}.in"].sqrt() * weight.detach().double().norm(dim=0).cpu()


def rank_layers(
    model: HybridLM, batches: list[dict[str, Tensor]], kind: str, generator: torch.Generator
) -> list[int]:
    """Layers, the least important first. s_j = sum (M_full - M_-j)^2 / sum M_full^2 on the logits
    (eq. 5)."""
    n = len(model.layers)
    if kind == "random":
        return torch.randperm(n, generator=generator).tolist()
    full = [_logits(model, batch, set()) for batch in batches]
    size = sum(f.square().sum() for f in full)

    def score(without: set[int]) -> float:
        changed = (_logits(model, batch, without) for batch in batches)
        return float(sum((f - c).square().sum() for f, c in zip(full, changed, strict=True)) / size)

    if kind == "paper":
        return sorted(range(n), key=lambda j: score({j}))
    removed: list[int] = []
    while len(removed) < n:
        removed.append(
            min((j for j in range(n) if j not in removed), key=lambda j: score({*removed, j})))
    return removed


def _logits(model: HybridLM, batch: dict[str, Tensor], without: set[int]) -> Tensor:
    """Logits with some layers skipped."""
    kept = [block for i, block in enumerate(model.layers) if i not in without]
    whole = model.layers
    model.layers = nn.ModuleList(kept)
    try:
        hidden_BTD, _ = model(batch["tokens_BT"], ids_BT=batch["ids_BT"])
    finally:
        model.layers = whole
    return model.logits(hidden_BTD)
