"""Nemotron Elastic (arXiv 2511.16664): one model holds smaller ones, and routers choose them.

A trained parent becomes elastic in four steps:

1. Axes (nested.py). One table says along which units each weight runs; permuting, cutting and
   masking follow from it.
2. Importance (importance.py, eq. 1 to 5). Units are ranked once, and the weights permuted: the
   parent's function stays, and every smaller model is the first units of every axis. The residual
   stream is turned onto its principal axes, for none of its channels is unimportant.
3. Routers (routers.py, eq. 6 to 12). For a budget they choose the widths of every layer, on masks
   that carry gradients.
4. Distillation (eq. 13 to 19). Each sequence has a budget; a step draws `elastic.draws` of them.
   (With `elastic.together` each has the largest, the least and those, and the parent reads it once
   for all.) The chosen model learns from the frozen parent, KL(parent || chosen), or from the full
   model, or from the text. First short sequences and all budgets alike; then long ones, with
   weights of their own.

`extract` then cuts a model for any budget out of one checkpoint; nothing is trained again.

Where it differs from the paper: the stream is turned, not only put in order; masks multiply weights
instead of activations (the same function, for fewer multiplications); once the routers have settled
(`elastic.search_share`) budgets run on slices, which cost less the smaller they are; the budget
loss is relative, with a dead zone, and weighs 5; routers begin with a head start for the largest
widths, or for those that cost the loss least (`elastic.router_start`); mode 1 multiplies by the
likeliest choice's probability, since its logit is NaN-prone; the full budget is always the full
model; queries have elastic heads only where several share keys and values, which have none. By
default neurons and Mamba heads are scored by what they add to the stream (`output`), and layers
stay; preset `cpu` trains the smallest budget most in stage 2, where the paper trains the largest
(.5, .3, .2).
"""

import itertools
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

import nested
from kernels import for_products, selected_logp, wide
from model import HybridLM, Inside
from routers import (
    FULL_VOTE,
    Choice,
    Router,
    at_random,
    budget_loss,
    by_hand,
    fit_to_budget,
    mask_weighting,
    probabilities,
    unmeasured_router,
)
from system import checkpoint, parallel
from system.config import Config, ElasticConfig, ModelConfig
from system.costs import count_parameters
from system.errors import require
from system.files import write_json
from system.loop import warn
from system.objective import Metrics, Objective
from system.rundir import load_run, require_none_foreign, was_warmed
from text.tokenizer import Tokenizer

N_CANDIDATES = 50  # sets of widths that `elastic.choose search` compares, as many as Minitron-SSM


def distillation_loss(teachers: list[tuple[float, Tensor, Tensor]], student_Td: Tensor,
                      student_Vd: Tensor, token_T: Tensor, ce: float, temperature: float,
                      at_once: int = 2**24) -> Tensor:
    """sum_T (sum_i w_i KL(p_i || q) - ce log q(token)), in nats (eq. 13 to 16).

    p_i and q are softmax(logits / temperature), q(token) is at temperature 1. Each teacher is (w_i,
    its hidden states [T, D], its output matrix [V, D]), and learns nothing here. All of them and
    the token share one softmax of the student, and its gradient, as one mixed target: sum_i w_i
    KL(p_i || q) is sum_i w_i p_i log p_i - (sum_i w_i p_i) log q. Logits in bf16 are widened before
    softmax and sums, whose differences are small. At most `at_once` logits are made at a time;
    where that takes several pieces, they are made again in the backward pass.
    """
    teachers = [(w, hidden_TD, for_products(matrix_VD)) for w, hidden_TD, matrix_VD in teachers]

    def piece(student_td: Tensor, token_t: Tensor, *teacher_tD: Tensor) -> Tensor:
        logits_tV = wide(F.linear(student_td / temperature, student_Vd))
        total, wanted_tV = logits_tV.new_zeros(()), None
        # 1. the mixed target, and the teachers' own sums p log p
        with torch.no_grad():
            for (w, _, matrix_VD), hidden_tD in zip(teachers, teacher_tD, strict=True):
                teacher_tV = wide(F.linear(hidden_tD / temperature, matrix_VD))
                logp_tV = F.log_softmax(teacher_tV, dim=-1)
                p_tV = logp_tV.exp()
                total = total + w * logp_tV.mul_(p_tV).sum()
                wanted_tV = p_tV.mul_(w) if wanted_tV is None else wanted_tV.add_(p_tV, alpha=w)
            if temperature == 1:
                wanted_tV.scatter_(1, token_t[:, None], ce, reduce="add")
        # 2. the cross-entropy, where it is at another temperature than the divergences
        if ce and temperature != 1:
            logp_tV = F.log_softmax(logits_tV * temperature, dim=-1)
            total = total - ce * logp_tV.gather(1, token_t[:, None]).sum()
        return total - (wanted_tV * F.log_softmax(logits_tV, dim=-1)).sum()

    n = max(1, math.ceil(len(student_Td) * len(student_Vd) / at_once))
    whole = (student_Td, token_T, *(hidden_TD for _, hidden_TD, _ in teachers))
    if n == 1:
        return piece(*whole)
    pieces = zip(*(t.chunk(n) for t in whole), strict=True)
    return sum(recompute(piece, *each, use_reentrant=False) for each in pieces)


class Distillation(Objective):
    """A model learns from a frozen teacher, from the text, or from both (eq. 13 to 16)."""

    def __init__(self, c: ElasticConfig, teacher: nn.Module | None):
        super().__init__()
        self.c, self.teacher = c, teacher

    def loss(self, model: nn.Module, batch: dict) -> tuple[Tensor, int, Metrics]:
        """Sum over tokens of kl KL(teacher || model) + ce CE."""
        teachers = [(self.c.kl, *told(self.teacher, batch))] if self.c.kl else []
        return *self.task(*outputs(model, batch), batch, teachers, self.c.ce), {}

    def task(self, hidden_BTd: Tensor, head_Vd: Tensor, batch: dict,
             teachers: list[tuple[float, Tensor, Tensor]], ce: float) -> tuple[Tensor, int]:
        """Sum over targets of the weighted divergences and cross-entropy; number of targets.
        Each teacher is its weight, its hidden states [B, T, D], its output matrix [V, D]."""
        target = batch["targets_BT"].flatten()
        inside = target != -100  # from here on one position after the other
        student_td, token_t = hidden_BTd.flatten(0, 1)[inside], target[inside]
        if not teachers:
            return -ce * selected_logp(student_td, head_Vd, token_t).sum(), len(token_t)
        wanted = [(w, hidden_BTD.flatten(0, 1)[inside], head_VD)
                  for w, hidden_BTD, head_VD in teachers]
        tau = self.c.kl_temperature
        return distillation_loss(wanted, student_td, head_Vd, token_t, ce, tau), len(token_t)


def outputs(model: nn.Module, batch: dict, **inside: Inside | None) -> tuple[Tensor, Tensor]:
    """Last hidden states of a batch, [B, T, d], and the output matrix that reads them, [V, d]. d is
    less than D where a smaller model is cut out; under masks the last norm masks what is read."""
    hidden_BTd, _ = model(batch["tokens_BT"], ids_BT=batch["ids_BT"], **inside)
    return hidden_BTd, model.output_matrix[:, : hidden_BTd.shape[-1]]


@torch.no_grad()
def told(teacher: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    """`outputs` of a teacher, which learns nothing from them."""
    return outputs(teacher, batch)


def sensitivities(router: Router, loss: Callable[[Choice], float]) -> dict[str, Tensor]:
    """What a model loses by each choice alone, with all others at their full widths: by axis
    [decisions, widths], 0 for the full one. The sum over the choices of a smaller model stands for
    what it loses before it is trained."""
    full = router.space.extreme()
    least, found = loss(full), {}
    for axis, widths in router.space.choices.items():
        rows = found[axis] = torch.zeros(router.space.n_decisions(axis), len(widths))
        for j, k in itertools.product(range(len(rows)), range(1, len(widths))):
            one = [k if other == j else 0 for other in range(len(rows))]
            rows[j, k] = loss({**full, axis: one}) - least
    return found


class Elastic(Distillation):
    """L = L_task(theta) + lambda L_router(psi) (eq. 17), each sequence at its own budget.

    In the first `search_share` of the steps routers and weights learn together, on masks; then the
    routers' choices stay as they are, and each budget runs on its slice of the weights.
    """

    def __init__(self, c: ElasticConfig, router: Router, teacher: nn.Module):
        super().__init__(c, teacher)
        ours, theirs = router.space.config.vocab_size, len(teacher.output_matrix)
        require(ours == theirs, f"the teacher has {theirs} tokens in its vocabulary, the model "
                                f"{ours}; they must be the same")
        self.router, self.step = router, 0
        self.networks["router"] = router
        self.n_search = c.search_steps()
        self.settled: dict[float, Inside] = {}

    @torch.no_grad()
    def begin(self, model: HybridLM, batches: list[dict[str, Tensor]]) -> None:
        """Choose the widths of all budgets before the first step, as `elastic.choose` says, or let
        the router begin with a vote for them; the batches of all processes are measured on."""
        c, router = self.c, self.router
        how = c.router_start if c.choose == "router" else c.choose
        if how == "full":
            return

        def loss(choice: Choice) -> float:
            widths, total = router.space.widths(choice, router.depth_order), 0.0
            inside = nested.cut_inside(model.config, widths)
            for batch in batches:
                found = outputs(model, batch, inside=inside)
                total = total + self.task(*found, batch, [], 1.0)[0]
            return float(parallel.total(total))

        def chosen(budget: float) -> Choice:
            if how == "sensitivity":
                return fit_to_budget({a: -d for a, d in lost.items()}, router, budget)
            if how == "fixed":
                return by_hand(router, budget)
            n = N_CANDIDATES if how == "search" else 1
            candidates = [at_random(router, budget, c.choose_seed * n + i) for i in range(n)]
            return min(candidates, key=loss) if n > 1 else candidates[0]

        lost = sensitivities(router, loss) if how == "sensitivity" else {}
        vote = c.router_vote if c.choose == "router" else FULL_VOTE
        choices = {b: chosen(b) for b in c.budgets if not router.is_full(b)}
        for b, choice in choices.items():
            router.check_met(choice, b)
        router.settle(choices, vote)

    def prepare(self, model: HybridLM, batch: dict[str, Tensor], step: int,
                generator: torch.Generator) -> dict:
        """Draw the Gumbel noise of every decision, for every budget."""

        def gumbel(*shape: int) -> Tensor:
            uniform = torch.empty(shape, device=generator.device)
            return -uniform.exponential_(generator=generator).log()

        self.step, space = step, self.router.space
        noise = {b: {a: gumbel(space.n_decisions(a), len(w)) for a, w in space.choices.items()}
                 for b in self.c.budgets}
        return {**batch, "noise": noise}

    def loss(self, model: HybridLM, batch: dict) -> tuple[Tensor, int, Metrics]:
        """Sum over tokens of the task loss, plus lambda times the sum of all budget losses."""
        c, total, metrics = self.c, 0.0, {}
        p = self.choices(batch["noise"]) if self.step < self.n_search else {}
        parent = told(self.teacher, batch) if c.kl else None  # one pass serves all budgets
        full: tuple[Tensor, Tensor] | None = None
        # 1. the sequences of each budget through its model
        for n, budget in enumerate(c.budgets):
            rows, weight = self.share(batch, n)
            if len(rows) == 0 or weight == 0:
                continue
            part = {k: batch[k][rows] for k in ("tokens_BT", "targets_BT", "ids_BT")}
            student = self.run(model, p.get(budget), budget, part)
            is_full = self.router.is_full(budget)
            teachers = [(c.kl, parent[0][rows], parent[1])] if parent else []
            if is_full and c.together:
                full = tuple(t.detach() for t in student)
            elif c.self_kl and not is_full:
                teachers.append((c.self_kl, *(full or told(model, part))))
            part_loss, n_tokens = self.task(*student, part, teachers, c.ce + is_full * c.full_ce)
            total = total + weight * part_loss
            metrics[f"loss_{budget:g}"] = part_loss.detach(), n_tokens
        count = int((batch["targets_BT"] != -100).sum())
        # 2. how far the routers are from their budgets; times count, for the loop divides by it
        if p:
            with parallel.exactly():
                off = torch.stack([budget_loss(self.router, p[b], b) for b in p])
            total = total + c.router_weight * off.sum() * count
            metrics["budget_loss"] = off.sum().detach(), len(off)
        return total, count, metrics

    def share(self, batch: dict, n: int) -> tuple[Tensor, float]:
        """The sequences that budget n trains on, and the weight of their loss: what is drawn seldom
        weighs the more, so that the mean over draws is the loss of all."""
        if not self.c.together:
            return (batch["budget_B"] == n).nonzero()[:, 0], 1.0
        weights = self.c.budget_weights(self.step)
        rows = torch.arange(len(batch["tokens_BT"]), device=batch["tokens_BT"].device)
        drawn, weight = self.c.between(self.step), weights[n] / sum(weights)
        if n in drawn:
            weight *= float((batch["drawn_Bk"][0] == n).double().mean()) / drawn[n]
        return rows, weight

    def choices(self, noise: dict) -> dict[float, dict[str, Tensor]]:
        """Probabilities of all widths at this step, for every budget but the full one."""
        at = self.step / max(1, self.n_search - 1)  # how far the search is, from 0 to 1
        tau, scale = 0.05**at, 1.0 + 9.0 * at  # temperature 1 to 0.05, the logits' factor 1 to 10
        smaller = [b for b in self.c.budgets if not self.router.is_full(b)]
        with parallel.exactly():
            return {b: probabilities(self.router(b), noise[b], scale, tau) for b in smaller}

    def run(self, model: HybridLM, p: dict[str, Tensor] | None, budget: float, batch: dict
            ) -> tuple[Tensor, Tensor]:
        """`outputs` of a budget's model."""
        return outputs(model, batch, inside=self.inside(model.config, p, budget))

    def inside(self, shape: ModelConfig, p: dict[str, Tensor] | None, budget: float
               ) -> Inside | None:
        """A budget's model in the weights of the full one: under masks if p is given, else cut out;
        None is the full one itself."""
        if p is not None:
            with parallel.exactly():
                weighting = mask_weighting(p, self.c.mask)
                return nested.masked_inside(
                    shape, self.router.space.masks(weighting, self.router.depth_order))
        if self.router.is_full(budget):
            return None
        if budget not in self.settled:
            self.settled[budget] = nested.cut_inside(shape, self.router.choose(budget))
        return self.settled[budget]

    def after_step(self, model: HybridLM) -> None:
        """Keep the weights at the end of stage 1, to see what stage 2 brings."""
        if self.c.has_stage_2() and self.step + 1 == self.c.stage_1_steps():
            self.networks["stage1"] = parallel.frozen_copy(model)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The routers have a rate of their own."""
        own = torch.optim.AdamW(self.router.parameters(), lr=self.c.router_lr, weight_decay=0.0)
        return [own] if self.n_search else []


def load_family(run_dir: Path) -> tuple[HybridLM, Router, Tokenizer, Config]:
    """Of an elastic run: model, router, tokenizer, settings. Raises ValueError for another run."""
    model, tokenizer, config = load_run(run_dir)
    found = checkpoint.newest(run_dir)
    require("router" in found.networks(), f"{run_dir} has no router, so it holds one size only; "
            "give the folder of a run of --mode elastic")
    router = unmeasured_router(model.config, config.elastic)
    checkpoint.load_weights(router, found.tensors("router"), found.path)
    step, steps = found.meta["step"], config.elastic.steps
    if step < steps:
        warn(f"{run_dir} has made {step} of its {steps} steps; --resume goes on with it")
    return model, router, tokenizer, config


def widths_for(router: Router, budget: float) -> nested.Widths:
    """`Router.choose`, with a warning where nobody trained what it chooses."""
    widths, share = router.choose(budget), router.one_hot(budget)
    if share.max() < 1:
        less = router.settings.budgets[int(share.nonzero()[-1])]
        warn(f"budget ({budget:g}) lies between trained ones: nobody trained its widths, and it "
             f"may do worse than {less:g}, which was trained")
    return widths


def extract(run_dir: Path, budget: float, out: Path) -> dict:
    """Write the model of a budget as a run. Returns its facts. Raises ValueError before writing."""
    # 1. load and cut
    file = out / "config.json"
    require(not file.exists(), f"out ({out}) already holds a run; choose another --out")
    require_none_foreign(out, ("checkpoint", "hf"))
    model, router, _, config = load_family(run_dir)
    began, widths = time.perf_counter(), widths_for(router, budget)
    small = nested.submodel(model, widths)
    # 2. write: the weights, where they come from, their settings
    origin = {"extracted_from": str(run_dir), "budget": budget}
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(out, 0, {"model": small}, [], origin)
    facts = {**origin, "parameters": count_parameters(small), "widths": asdict(widths),
             "seconds": time.perf_counter() - began}
    settings = replace(config, model=small.config, init=str(run_dir))
    text = {**facts, "warmed": was_warmed(str(run_dir)), "config": settings.to_dict()}
    write_json(file, text)
    if (run_dir / "hf").is_dir():  # the tokenizer, where it is not one that the corpus brings
        shutil.copytree(run_dir / "hf", out / "hf")
    return facts
