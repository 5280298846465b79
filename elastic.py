"""Nemotron Elastic: one model that holds smaller ones, and routers that choose them (arXiv 2511.16664).

A trained parent becomes elastic in four steps:

1. Axes (nested.py): one table says which units each weight belongs to. Permuting, cutting and masking follow from it.
2. Importance (eq. 1 to 5). Units are ranked once, and the weights permuted: the parent computes the same function as
   before, and the best w units of an axis are its first w, so every smaller model is a slice of the parent. The channels
   of the residual stream are turned onto its principal axes, for no channel of it is unimportant.
3. Routers (routers.py, eq. 6 to 12). For a budget they choose the widths of every layer, on masks that carry gradients.
4. Distillation (eq. 13 to 19). Each sequence has a budget. The chosen model learns from the frozen parent,
   KL(parent || chosen), or from the full model, or from the text. First short sequences and all budgets alike; then long
   ones, the larger budgets more often.

`extract` then cuts a model for any budget out of one checkpoint; nothing is trained again.

Where it differs from the paper: the stream is turned, not only put in order; masks multiply weights instead of activations
(the same function, for fewer multiplications); once the routers have settled (`elastic.search_share`) their choice is fixed
and budgets run on slices, which cost less the smaller they are; the budget loss is relative, with a dead zone; the routers
begin with a head start for the largest widths; mode 1 multiplies by the likeliest choice's probability, since its logit is
NaN-prone; the full budget is always the full model; keys and values have no elastic heads under grouped queries.
"""

import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint as recompute

import checkpoint
import parallel
from config import Config, ElasticConfig, exit_code, require
from data import Corpus, Tokenizer
from kernels import selected_logp
from model import HybridLM, count_parameters
from nested import (
    Units,
    Widths,
    bare_model,
    kept_units,
    mask_weights,
    masked_skeleton,
    named_dims,
    rotate,
    shrink,
    submodel,
    take,
)
from objective import Objective
from routers import Router, budget_loss, mask_weighting, probabilities, unmeasured_router

# ---------------------------------------------------------------------------------------------------- importance


@dataclass
class Ranking:
    """Units of every axis, the most important first (heads within their groups), and layers, the least important first.

    axes_DD: an orthonormal basis to turn the residual stream to (its columns), None to leave it.
    """

    units: Units
    depth: list[int]
    axes_DD: Tensor | None = None


@torch.no_grad()
def rank(model: HybridLM, batches: list[dict[str, Tensor]], c: ElasticConfig, seed: int = 0) -> Ranking:
    """Rank all units by the scores that the settings name, from forward passes over calibration batches.

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
            layers.append({"A": order(attn_scores(model, sums, i, c.score_attn), c.score_attn, config.n_kv_heads)})
        else:
            heads, channels = mamba_scores(model, sums, i, c.score_mamba)
            layers.append({"H": order(heads, c.score_mamba, config.mamba_groups), "P": order(channels, c.score_mamba)})
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
    """Turn and permute the weights of a model, in place: the best units come first, and its function does not change."""
    weights = model.state_dict()
    if ranking.axes_DD is not None:
        weights = rotate(weights, model.config, ranking.axes_DD)
    model.load_state_dict(take(weights, model.config, ranking.units))


def activation_sums(model: HybridLM, batches: list[dict[str, Tensor]], with_stream: bool = False) -> dict[str, Tensor]:
    """Over all tokens, for each channel: sums of |x| of what the norms give, and of x^2 of what matrices read and give.

    Keys: `layers.I.norm` and `norm`; `layers.I.mixer.NAME.in` and `.out` for each matrix of a mixer; `....abs` for |x|. If
    asked for, `stream`: sum of x x^T over all norms, x = what the norm reads / its rms, [D, D].
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
            hooks.append(module.register_forward_pre_hook(lambda _, args, n=name: add(f"{n}.in", args[0])))
            hooks.append(module.register_forward_hook(lambda _, args, out, n=name: add(f"{n}.out", out)))
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

    Of all the bases, each prefix of this one keeps most of what the layers read (as in SliceGPT, arXiv 2401.15024, which
    turns the stream anew for every layer; with one basis for all of them the residual connections stay as they are).
    """
    return torch.linalg.eigh(sums["stream"]).eigenvectors.flip(1)


def stream_scores(model: HybridLM, sums: dict[str, Tensor], kind: str) -> Tensor:
    """Channels of the stream. paper: sum of |norm(x)_i| over all norms (eq. 1); output: times the size of what reads i."""
    readers = {"norm": [model.output_matrix]}
    for name, i, _, dims in named_dims([n for n, _ in model.named_parameters()], model.config.pattern):
        if i is not None and dims[1:] == ["D"]:
            readers.setdefault(f"layers.{i}.norm", []).append(model.get_parameter(name))
    total = torch.zeros(model.config.d_model, dtype=torch.float64)
    for norm, matrices in readers.items():
        size = torch.cat(matrices).double().norm(dim=0).cpu() if kind == "output" else 1.0
        total += sums[f"{norm}.abs"] * size
    return total


def ffn_scores(model: HybridLM, sums: dict[str, Tensor], i: int, kind: str) -> Tensor:
    """FFN neurons. paper: sum of |X W1_i^T| before the activation (eq. 2); output: size of what it adds to the stream."""
    if kind == "output":
        return _contribution(model, sums, i, "down_proj")
    return sums[f"layers.{i}.mixer.up_proj.out.abs"]


def mamba_scores(model: HybridLM, sums: dict[str, Tensor], i: int, kind: str) -> tuple[Tensor, Tensor]:
    """Mamba heads and head channels, from a size per (head, channel).

    paper: of s = norm(X) W_x^T; a channel's score is its norm over all heads (eq. 3), a head's is its norm over the better
    half of the channels (eq. 4). output: the same from what each adds to the stream.
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
    """Query heads. paper: size of the head's queries; output: size of what the head adds to the stream."""
    square = _contribution(model, sums, i, "o_proj").square() if kind == "output" else sums[f"layers.{i}.mixer.q_proj.out"]
    return square.view(model.config.n_heads, model.config.attn_head_dim).sum(1).sqrt()


def _contribution(model: HybridLM, sums: dict[str, Tensor], i: int, matrix: str) -> Tensor:
    """Root of the sum over tokens of |x_j W_j|^2: how much input j of the matrix that writes to the stream adds to it."""
    weight = getattr(model.layers[i].mixer, matrix).weight
    return sums[f"layers.{i}.mixer.{matrix}.in"].sqrt() * weight.detach().double().norm(dim=0).cpu()


def rank_layers(model: HybridLM, batches: list[dict[str, Tensor]], kind: str, generator: torch.Generator) -> list[int]:
    """Layers, the least important first. s_j = sum (M_full - M_-j)^2 / sum M_full^2 on the logits (eq. 5)."""
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
        removed.append(min((j for j in range(n) if j not in removed), key=lambda j: score({*removed, j})))
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


# ---------------------------------------------------------------------------------------------------- distillation


class Distillation(Objective):
    """A model learns from a frozen teacher, from the text, or from both (eq. 13 to 16)."""

    def __init__(self, c: ElasticConfig, teacher: HybridLM | None):
        self.c, self.teacher = c, teacher

    def loss(self, model: HybridLM, batch: dict) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Sum over tokens of kl KL(teacher || model) + ce CE."""
        hidden_BTD, _ = model(batch["tokens_BT"], ids_BT=batch["ids_BT"])
        total, n_tokens = self.task(hidden_BTD, model.output_matrix, batch, [(self.c.kl, self.teacher)], self.c.ce)
        return total, n_tokens, {}

    def task(
        self, hidden_BTd: Tensor, head_Vd: Tensor, batch: dict, teachers: list[tuple[float, HybridLM]], ce: float
    ) -> tuple[Tensor, int]:
        """Sum over tokens of the weighted divergences from the teachers and of the cross-entropy; number of targets."""
        target = batch["targets_BT"].flatten()
        inside = target != -100
        hidden_Xd, token_X = hidden_BTd.flatten(0, 1)[inside], target[inside]
        with torch.no_grad():
            wanted = [
                (weight, t(batch["tokens_BT"], ids_BT=batch["ids_BT"])[0].flatten(0, 1)[inside], t.output_matrix)
                for weight, t in teachers
                if weight
            ]
        if wanted:
            total = distillation_loss(wanted, hidden_Xd, head_Vd, token_X, ce, self.c.kl_temperature)
        else:
            total = -ce * selected_logp(hidden_Xd, head_Vd, token_X).sum()
        return total, len(token_X)


class Elastic(Distillation):
    """L = L_task(theta) + lambda L_router(psi) (eq. 17), each sequence at its own budget, as an objective for `loop.fit`.

    In the first `search_share` of the steps routers and weights learn together, on masks; afterwards the routers' choices
    stay as they are, and each budget runs on its slice of the weights.
    """

    runs_whole = True

    def __init__(self, c: ElasticConfig, router: Router, teacher: HybridLM):
        super().__init__(c, teacher)
        ours, theirs = router.space.config.vocab_size, teacher.config.vocab_size
        require(
            ours == theirs, f"the teacher has {theirs} tokens in its vocabulary, the model {ours}; they must be the same"
        )
        self.router, self.step = router, 0
        self.n_search = round(c.search_share * c.steps) if c.choose == "router" else 0
        self.stage1: HybridLM | None = None  # the weights at the end of stage 1, to see what stage 2 brings
        self.widths: dict[float, Widths] = {}
        self.bare: dict[float, HybridLM] = {}

    def prepare(self, model: HybridLM, batch: dict[str, Tensor], generator: torch.Generator) -> dict:
        """Draw the Gumbel noise of every decision, for every budget."""

        def gumbel(*shape: int) -> Tensor:
            return -torch.empty(shape, device=generator.device).exponential_(generator=generator).log()

        space = self.router.space
        noise = {b: {a: gumbel(space.n_decisions(a), len(w)) for a, w in space.choices.items()} for b in self.c.budgets}
        return {**batch, "noise": noise}

    def loss(self, model: HybridLM, batch: dict) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Sum over tokens of the task loss at each sequence's budget, plus lambda times the budget loss of all budgets."""
        c, self.step = self.c, int(batch["step_B"][0])
        weights, count, total, metrics = dict(model.named_parameters()), 0, 0.0, {}
        p = self.choices(batch["noise"]) if self.step < self.n_search else {}
        for n, budget in enumerate(c.budgets):
            rows = (batch["budget_B"] == n).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            part = {k: batch[k][rows] for k in ("tokens_BT", "targets_BT", "ids_BT")}
            hidden_BTD, head_VD = self.run(model, weights, p.get(budget), budget, part)
            is_full = self.router.is_full(budget)
            teachers = [(c.kl, self.teacher), (0.0 if is_full else c.self_kl, model)]
            part_loss, n_tokens = self.task(hidden_BTD, head_VD, part, teachers, c.ce + is_full * c.full_ce)
            total, count = total + part_loss, count + n_tokens
            metrics[f"loss_{budget:g}"] = part_loss.detach() / n_tokens
        if p:
            with parallel.exactly():
                off = torch.stack([budget_loss(self.router, p[b], b) for b in p])
            total = total + c.router_weight * off.sum() * count
            metrics["budget_loss"] = off.mean().detach()
        return total, count, metrics

    def choices(self, noise: dict) -> dict[float, dict[str, Tensor]]:
        """Probabilities of all widths at this step, for every budget but the full one."""
        c, at = self.c, self.step / max(1, self.n_search - 1)
        tau = c.gumbel_tau[0] * (c.gumbel_tau[1] / c.gumbel_tau[0]) ** at
        scale = c.logit_scale[0] + (c.logit_scale[1] - c.logit_scale[0]) * at
        smaller = [b for b in c.budgets if not self.router.is_full(b)]
        with parallel.exactly():
            return {b: probabilities(self.router(b), noise[b], scale, tau) for b in smaller}

    def run(self, model: HybridLM, weights: dict, p: dict | None, budget: float, batch: dict) -> tuple[Tensor, Tensor]:
        """Final hidden states of the model of a budget, and its output matrix: masked where p is given, else sliced."""
        network = model
        if p is not None:
            with parallel.exactly():
                masks = self.router.space.masks(mask_weighting(p, self.c.mask), self.router.depth_order)
                weights, network = mask_weights(weights, model.config, masks), masked_skeleton(model.config, masks)
        elif not self.router.is_full(budget):
            if budget not in self.widths:
                self.widths[budget] = self.router.choose(budget)
                self.bare[budget] = bare_model(shrink(model.config, self.widths[budget]))
            network = self.bare[budget]
            weights = take(weights, model.config, kept_units(model.config, self.widths[budget]))
        call = parallel.recomputed(functional_call)
        hidden_BTD, _ = call(network, weights, (batch["tokens_BT"],), {"ids_BT": batch["ids_BT"]})
        return hidden_BTD, weights.get("head.weight", weights["embed.weight"])

    def after_step(self, model: HybridLM) -> None:
        """Keep the weights at the end of stage 1."""
        if self.step + 1 == self.c.stage_1_steps():
            self.stage1 = parallel.frozen_copy(model)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The routers have a rate of their own."""
        if self.n_search == 0:
            return []
        return [torch.optim.AdamW(self.router.parameters(), lr=self.c.router_lr, weight_decay=0.0)]

    def networks(self) -> dict[str, nn.Module]:
        """The router, and the weights at the end of stage 1 once that has come."""
        return {"router": self.router} | ({} if self.stage1 is None else {"stage1": self.stage1})

    def expect(self, model: HybridLM, names: list[str]) -> None:
        """A checkpoint of stage 2 holds the end of stage 1."""
        if "stage1" in names:
            self.stage1 = parallel.frozen_copy(model)


def distillation_loss(
    teachers: list[tuple[float, Tensor, Tensor]],
    student_Xd: Tensor,
    student_Vd: Tensor,
    token_X: Tensor,
    ce: float,
    temperature: float,
    at_once: int = 2**24,
) -> Tensor:
    """sum_X (sum_i w_i KL(p_i || q) - ce log q(token)), in nats (eq. 13 to 16).

    p_i and q are softmax(logits / temperature), q(token) is at temperature 1. Each teacher is (w_i, its hidden states
    [X, D], its output matrix [V, D]), and learns nothing here. All of them and the token share one softmax of the student,
    and its gradient, as one mixed target: sum_i w_i KL(p_i || q) is sum_i w_i p_i log p_i - (sum_i w_i p_i) log q. Logits
    are made for at most `at_once` numbers at a time, and made again in the backward pass if that takes more than one piece.
    """

    def piece(student_xd: Tensor, token_x: Tensor, *teacher_xD: Tensor) -> Tensor:
        logits_xV = F.linear(student_xd / temperature, student_Vd)
        total, wanted_xV = logits_xV.new_zeros(()), None
        with torch.no_grad():
            for (weight, _, matrix_VD), hidden_xD in zip(teachers, teacher_xD, strict=True):
                logp_xV = F.log_softmax(F.linear(hidden_xD / temperature, matrix_VD), dim=-1)
                p_xV = logp_xV.exp()
                total = total + weight * logp_xV.mul_(p_xV).sum()
                wanted_xV = p_xV.mul_(weight) if wanted_xV is None else wanted_xV.add_(p_xV, alpha=weight)
            if temperature == 1:
                wanted_xV.scatter_(1, token_x[:, None], ce, reduce="add")
        if ce and temperature != 1:
            total = total - ce * F.log_softmax(logits_xV * temperature, dim=-1).gather(1, token_x[:, None]).sum()
        return total - (wanted_xV * F.log_softmax(logits_xV, dim=-1)).sum()

    n = max(1, math.ceil(len(student_Xd) * len(student_Vd) / at_once))
    hidden = [hidden_XD for _, hidden_XD, _ in teachers]
    if n == 1:
        return piece(student_Xd, token_X, *hidden)
    pieces = zip(*(t.chunk(n) for t in (student_Xd, token_X, *hidden)), strict=True)
    return sum(recompute(piece, *each, use_reentrant=False) for each in pieces)


# ------------------------------------------------------------------------------------------------------ deployment


def load_family(run_dir: Path) -> tuple[HybridLM, Router, Tokenizer, Config]:
    """An elastic run's model, router, tokenizer and settings. Raises ValueError for a run without a router."""
    from train import load_run, warn

    model, tokenizer, config = load_run(run_dir)
    found = checkpoint.newest(run_dir)
    step, steps = found.meta["step"], config.elastic.steps
    require(
        "router" in found.networks(),
        f"{run_dir} has no router, so it holds one size only; give the folder of a run of --mode elastic",
    )
    router = unmeasured_router(model.config, config.elastic)
    checkpoint.load_weights(router, found.tensors("router"), found.path)
    warn(f"{run_dir} has made {step} of its {steps} steps; --resume goes on with it" if step < steps else "")
    return model, router, tokenizer, config


def extract(run_dir: Path, budget: float, out: Path) -> dict:
    """Write the model of a budget as a run folder of its own. Returns its facts. Raises ValueError before it writes."""
    require(not (out / "config.json").exists(), f"out ({out}) already holds a run; choose another --out")
    model, router, _, config = load_family(run_dir)
    began = time.perf_counter()
    widths = router.choose(budget)
    small = submodel(model, widths)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(out, 0, {"model": small}, [], {"extracted_from": str(run_dir), "budget": budget})
    facts = {"extracted_from": str(run_dir), "budget": budget, "parameters": count_parameters(small),
             "widths": asdict(widths), "seconds": time.perf_counter() - began}  # fmt: skip
    text = {**facts, "config": replace(config, model=small.config, init=str(run_dir)).to_dict()}
    (out / "config.json").write_text(json.dumps(text, indent=1) + "\n")
    if (run_dir / "hf").is_dir():  # the tokenizer, where it is not one that the corpus brings
        shutil.copytree(run_dir / "hf", out / "hf")
    return facts


def main(argv: list[str] | None = None) -> int:
    """`python elastic.py extract RUN --budget B --out DIR`, `python elastic.py scores RUN`. Returns 0, or 2 if refused."""
    import tyro

    def run_extract(run: tyro.conf.Positional[Path], budget: float, out: Path) -> None:
        """Cut the model of one budget out of an elastic run; nothing is trained.

        Args:
            run: Folder of a run of --mode elastic.
            budget: A fraction of the full model's cost, or above 1 an absolute cost.
            out: Folder to write; generate.py and --init take it like any run.
        """
        facts = extract(run, budget, out)
        print(f"{out}: {facts['parameters']:,} parameters in {facts['seconds']:.2f} s, {facts['widths']}")

    def run_scores(run: tyro.conf.Positional[Path]) -> None:
        """Compare the importance scores of every axis on a trained model (a base, or any other run).

        Args:
            run: Folder of the run.
        """
        from evals import score_table
        from train import load_run

        model, _, config = load_run(run)
        for axis, losses in score_table(model, Corpus.load(config.data), config).items():
            print(f"{axis:>15}  " + "  ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items()))

    commands = {"extract": run_extract, "scores": run_scores}
    return exit_code(lambda: tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog="elastic.py"))


if __name__ == "__main__":
    sys.exit(main())
