"""Speed and memory beside the code of others: equal work, equal results, in one process, in turns.

    python -m tools.bench NAME          one of `BENCHES`
    python -m tools.bench all           each in a process of its own

Each contestant first runs once without a clock, and its values and gradients must be ours, or it is
not timed. Then all take turns, so that a noisy neighbour disturbs all alike, and the medians count.
On one CPU thread the time is the processor's, which is blind to programs that take the core. Memory
is the most that torch's allocator had handed out at one time during a run, beyond what it had
before: the size of the process would also show what others left behind, and what malloc keeps.
`ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2` before the command shows an older processor.
`rlp-trl --model DIR` is of a real model: each contestant has a process of its own, which is weighed
whole, and results are not compared.

How to read: `BENCHES` and one of its functions; `compare`; then the contestants written out here.
"""

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import tyro
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import elastic
import kernels
import nested
import routers
from mamba import Mamba2
from model import HybridLM
from rlp import RLP, clipped_surrogate, group_advantages, information_gain, reward
from system.config import ModelConfig, RLPConfig
from system.errors import exit_code, require
from system.files import write_json
from system.huggingface import load_hf, names, read_config, save_hf
from system.loop import build_optimizers, update
from system.machine import hardware, peak_memory_gib, pick_device, versions
from system.objective import NextToken
from system.presets import PRESETS
from thoughts import Sampling, Thoughts, sample, sample_thoughts
from views.tables import bench_table

PIP = {"transformers": "transformers==5.23.0", "mambapy": "mambapy", "mamba_ssm": "mamba-ssm",
       "fla": "flash-linear-attention", "trl": "trl==1.16.0"}
LIMIT = {"cpu": 1e-4, "cuda": 2e-2}  # largest difference allowed; Triton kernels multiply in tf32
ENOUGH_S = 5.0  # a contestant that has run this long sits out, once it has had three turns
CPU_MODEL = PRESETS["cpu"].model
LLAMA = ModelConfig(pattern="*-" * 4, ffn="swiglu", rope_theta=10000.0)

Run = Callable[[], list[Tensor]]


@dataclass
class Contestant:
    """Someone's code for a piece of work. `run` returns the results."""

    name: str
    run: Run | None
    note: str = ""  # why it does not run
    is_other_work: bool = False  # its results are not ours, and only its time is of interest
    rounding: float = 0.0  # a difference that its number format explains


@dataclass
class Work:
    """What a benchmark does."""

    title: str
    n_tokens: int
    contestants: list[Contestant]  # ours first
    growth: dict[int, Run] = field(default_factory=dict)  # ours by number of tokens


# ---------------------------------------------------------------------------------------- measuring


def compare(work: Work, repeats: int, device: torch.device,
            apart: Callable[[str], tuple[list[float], int]] | None = None) -> dict:
    """Check, time in turns and weigh every contestant. Returns what results/ holds of it.
    apart: seconds and peak of a contestant by its name, instead of all that."""
    rows = ([{"name": c.name, "note": c.note} for c in work.contestants] if apart
            else check(work.contestants, LIMIT[device.type]))
    runs = {c.name: c.run for c, row in zip(work.contestants, rows, strict=True) if not row["note"]}
    if apart:
        found = {name: apart(name) for name in runs}
    else:
        turns = take_turns(runs, repeats, device)
        found = {name: (turns[name], peak_bytes(run, device)) for name, run in runs.items()}
    median = {name: statistics.median(seconds) for name, (seconds, _) in found.items()}
    for row in (row for row in rows if row["name"] in runs):
        s, (seconds, peak) = median[row["name"]], found[row["name"]]
        row |= {"ms": 1e3 * s, "turns": len(seconds), "times_ours": s / median[rows[0]["name"]],
                "tokens_per_s": work.n_tokens / s, "peak_bytes": peak}
    found = {"title": work.title, "n_tokens": work.n_tokens, "rows": rows}
    return found | ({"growth": growth(work.growth, repeats, device)} if work.growth else {})


def check(contestants: list[Contestant], limit: float) -> list[dict]:
    """A row for each contestant: its difference from ours, and in `note` why it is not timed."""
    rows, ours = [], contestants[0].run()
    for c in contestants:
        rows.append(row := {"name": c.name, "note": c.note})
        if c.run is None or c is contestants[0] or c.is_other_work:
            continue
        try:
            row["difference"] = difference(c.run(), ours)
            if not row["difference"] <= max(limit, c.rounding):
                row["note"] = f"not timed: differs from ours by {row['difference']:.1e}"
        except Exception as error:  # someone else's code on an unknown machine: say so, and go on
            row["note"] = f"fails: {error!r}"
    return rows


def take_turns(runs: dict, repeats: int, device: torch.device) -> dict:
    """Seconds of every turn of every run, by its name."""
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if one_thread else time.perf_counter
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = {name: [] for name in runs}
    for turn in range(repeats):
        for name, run in runs.items():
            if turn < 3 or sum(seconds[name]) < ENOUGH_S:
                wait()
                began = now()
                run()
                wait()
                seconds[name].append(now() - began)
    return seconds


def difference(found: list[Tensor], ours: list[Tensor]) -> float:
    """Largest difference of any result, relative to the largest value of ours in it."""
    return max(float((f.flatten() - o.flatten()).abs().max() / o.abs().max().clamp(min=1e-30))
               for f, o in zip(found, ours, strict=True))


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most that a run had allocated at one time; on a CPU the sum of the profiler's records."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return int(np.cumsum([e.nbytes() for e in events]).max())  # a release counts negative


def growth(runs: dict[int, Run], repeats: int, device: torch.device) -> dict:
    """Time and memory by number of tokens, and the exponent of a power law through the times."""
    peaks = [peak_bytes(run, device) for run in runs.values()]
    ms = [1e3 * statistics.median(s) for s in take_turns(runs, repeats, device).values()]
    exponent, _ = np.polyfit(np.log(list(runs)), np.log(ms), 1)
    return {"tokens": list(runs), "ms": ms, "peak_bytes": peaks, "exponent": exponent}


# --------------------------------------------------------------------------------------- benchmarks


def ssd_work(device: torch.device, B=4, T=512, H=16, P=32, K=1, N=64, Q=64, default=256) -> Work:
    """The scan alone, at mild rates: where decays underflow, exp is very slow for the others."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, H, P), (B, T, H), (H,), (B, T, K, N), (B, T, K, N), (H,)]
    x, dt, a, b, c, d = (torch.randn(shape, generator=generator) for shape in shapes)
    dt, a = nn.functional.softplus(dt - 4), -torch.linspace(0.25, 2.0, H)
    leaves = [t.to(device).requires_grad_() for t in (x, dt, a, b, c, d)]

    def contestant(name: str, scan: Callable, *chunk: int, package: str = "") -> Contestant:
        run = with_gradients(lambda: scan(*leaves, *chunk), leaves)
        return peer(name, package, device, lambda: run) if package else Contestant(name, run)

    return Work(f"scan, forward and backward, b{B} t{T} h{H} p{P} g{K} n{N}", B * T, [
        *(contestant(f"ours, chunk {q}", partial(kernels.ssd, chunk=q)) for q in (Q, Q // 2)),
        *(contestant(f"transformers, chunk {q}{note}", ssd_transformers, q, package="transformers")
          for q, note in ((Q, ""), (default, " (its default)"))),
        contestant(f"the paper's listing, chunk {Q}", ssd_listing, Q),
        contestant("token by token", kernels.ssd_reference),
        contestant("mambapy, Mamba-1's parallel scan", ssd_mambapy, package="mambapy"),
        contestant(f"mamba-ssm, chunk {default}", ssd_mamba_ssm, default, package="mamba_ssm"),
        contestant("flash-linear-attention", ssd_fla, package="fla")])


def mixer_work(device: torch.device, B=4, T=512, D=256, H=8, P=64, N=64, Q=64,
               lengths=(256, 512, 1024, 2048, 4096, 8192)) -> Work:
    """The whole mixer: projections, convolution, scan, gated norm; one sequence for `growth`."""
    mixer = _mixer(device, D, H, P, N, Q)

    def run(B: int, T: int, forward: Callable, weights: Iterable[Tensor], *_) -> Run:
        u_BTD = torch.randn(B, T, D, generator=torch.Generator().manual_seed(1)).to(device)
        return with_gradients(lambda: forward(u_BTD), [u_BTD.requires_grad_(), *weights])

    def ours(B: int, T: int) -> Run:
        return run(B, T, lambda u_BTD: mixer(u_BTD, None, None), mixer.parameters())

    def theirs(q: int, note: str) -> Contestant:
        name = f"transformers NemotronH, chunk {q}{note}"
        return peer(name, "transformers", device, lambda: run(B, T, *transformers_mixer(mixer, q)))

    return Work(f"mixer, forward and backward, b{B} t{T} d{D} h{H} p{P} n{N}", B * T, [
        Contestant(f"ours, chunk {Q}", ours(B, T)), theirs(128, " (its default)"), theirs(Q, "")],
        {T: ours(1, T) for T in lengths})


def decode_work(device: torch.device, B=16, T=64, D=256, H=8, P=64, N=64, n_steps=20) -> Work:
    """The mixer a token at a time, after T tokens: each run goes on where the last one stopped."""
    mixer = _mixer(device, D, H, P, N, 64)
    generator = torch.Generator().manual_seed(1)
    prefix_BTD, u_B1D = (torch.randn(B, t, D, generator=generator).to(device) for t in (T, 1))
    _, cached = mixer(prefix_BTD, None, None)

    @torch.no_grad()
    def ours() -> list[Tensor]:
        nonlocal cached
        for _ in range(n_steps):
            y_B1D, cached = mixer(u_B1D, cached, None)
        return [y_B1D]

    @torch.no_grad()
    def theirs() -> Run:
        from transformers import DynamicCache

        forward, _, settings = transformers_mixer(mixer, 128)
        step = partial(forward, cache_params=DynamicCache(config=settings))
        step(prefix_BTD)
        return torch.no_grad()(lambda: [step(u_B1D) for _ in range(n_steps)][-1:])

    title = f"{n_steps} tokens of the mixer, one at a time, b{B} d{D} h{H} p{P} n{N}"
    return Work(title, B * n_steps, [
        Contestant("ours", ours), peer("transformers NemotronH", "transformers", device, theirs)])


def logp_work(device: torch.device, T=2048, D=128, V=8192) -> Work:
    """Log-probabilities of T tokens and their hidden states' gradient, for two vocabularies."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(T, D, generator=generator).to(device).requires_grad_()
    token_T = torch.randint(V, (T,), generator=generator).to(device)
    forms = {"ours": kernels.selected_logp, "all logits at once": kernels.selected_logp_reference}
    contestants = []
    for n in (V, 8 * V):
        matrix_VD = torch.randn(n, D, generator=generator).to(device) / D**0.5
        for name, logp in forms.items():
            forward = partial(logp, hidden_TD, matrix_VD, token_T)
            run = with_gradients(forward, [hidden_TD])
            contestants.append(Contestant(f"{name}, V = {n}", run, is_other_work=n != V))
    title = f"log-probabilities of {T} tokens, with the gradient of hidden states, d{D}"
    return Work(title, T, contestants)


def base_step_work(device: torch.device, B=8, T=256, V=1024, model=CPU_MODEL) -> Work:
    """A training step of the base as the loop takes it, each contestant on weights of its own.
    Muon's steps in bf16 differ by rounding; where bf16 is emulated they take most of the time."""
    settings, batch = PRESETS["cpu"].pretrain, _text(device, B, T, V)

    def contestant(muon_lr: float, muon: type[torch.optim.Muon] | None = None) -> Run:
        network = noisy_network(device, model, V)
        optimizers = build_optimizers(network, replace(settings, muon_lr=muon_lr))
        if muon:
            weights = optimizers[1].param_groups[0]["params"]
            optimizers[1] = muon(weights, lr=muon_lr, weight_decay=settings.weight_decay)

        def run() -> list[Tensor]:
            update(network, NextToken(), [batch], optimizers, settings, settings.warmup)
            return [p.detach() for p in network.parameters()]

        return run

    torchs = contestant(settings.muon_lr, torch.optim.Muon)
    sizes = f"b{B} t{T}, {model.pattern}, d{model.d_model}, V = {V}"
    return Work(f"training step of the base, optimizer included, {sizes}", B * T, [
        Contestant("ours", contestant(settings.muon_lr)),
        Contestant("with torch.optim.Muon, steps in bf16", torchs, rounding=5e-2),
        Contestant("AdamW alone", contestant(0.0), is_other_work=True)])


def rlp_step_work(device: torch.device, B=4, T=256, G=8, L=32, V=1024, model=CPU_MODEL,
                  dtype=torch.float32) -> Work:
    """A step of RLP: sampled thoughts, their reward, every weight's gradient; random contexts."""
    network, objective, batch = rlp_case(
        device, RLPConfig(batch=B, context_len=T, group_size=G, thought_len=L), V, model, dtype)
    generator = torch.Generator(device)

    def ours() -> list[Tensor]:
        prepared = objective.prepare(network, batch, 0, generator.manual_seed(0))
        loss, _, _ = objective.loss(network, prepared)
        return [prepared["gain_R"], prepared["thoughts"].logp_RL,
                *torch.autograd.grad(loss, list(network.parameters()))]

    sampling = Sampling(G, L, objective.config.temperature)
    thoughts = sample_thoughts(network, batch, objective.tokenizer, sampling,
                               generator.manual_seed(0))
    plain = partial(plain_rlp_step, network, objective, batch, thoughts, generator)
    sizes = f"{B} contexts of {T} tokens, G = {G} thoughts of up to {L}, {model.pattern}, V = {V}"
    return Work(f"RLP step, {sizes}", B * G * L, [
        Contestant("ours", ours), Contestant("the plain way", plain)])


def rlp_trl_work(device: torch.device, B=2, T=256, G=8, L=32, V=4096, model=LLAMA,
                 folder: Path | None = None) -> Work:
    """A whole training step of RLP, AdamW included, by the loop and by TRL's GRPOTrainer.

    TRL samples, and gets our thoughts in place of its own, so its rewards and gradients must be
    ours. folder: of a Llama from Hugging Face, instead of a random one; there TRL keeps its own
    thoughts. Every turn does the same, for the rate is 0. Nobody can do less: no thought ends
    early, and without a floor hardly two rewards are equal. TRL has no teacher; ours follows."""
    shape, family = read_config(folder) if folder else (replace(model, vocab_size=V), "llama")
    require(family == "llama", f"model ({folder}) is of the family {family}; give a Llama")
    table = {ours: name for ours, (name, _) in names(shape, "llama").items()}
    V, tags = shape.vocab_size, (shape.vocab_size - 3, shape.vocab_size - 2)
    tokenizer = SimpleNamespace(think=tags[0], close=tags[1], end=-1, ends=(), tags=tags)
    settings = RLPConfig(group_size=G, thought_len=L, reward_floor=-math.inf, lr=0.0,
                         clip_norm=math.inf)
    torch.manual_seed(0)
    batch = random_contexts(device, B, T, V)

    def load() -> HybridLM:
        network = HybridLM(shape).to(device) if folder else noisy_network(device, model, V)
        if folder:
            network.load_state_dict(load_hf(folder)[1])
        else:  # rewards that differ in their first digits: advantages are their differences
            network.output_matrix.data.mul_(10)
        return network

    @cache
    def begin() -> tuple[Run, list[list[int]]]:
        """Our step, and its thoughts: those of the first seed of which none ends early."""
        network, objective, gradients = load(), RLP(settings, tokenizer), []
        optimizers, generator = build_optimizers(network, settings), torch.Generator(device)
        optimizers[0].register_step_pre_hook(
            lambda *_: gradients.extend(network.get_parameter(ours).grad for ours in table))

        def prepare(seed: int) -> dict:
            return objective.prepare(network, batch, 0, generator.manual_seed(seed))

        def step() -> list[Tensor]:
            prepared = prepare(seed)
            update(network, objective, [prepared], optimizers, settings, settings.warmup)
            objective.after_step(network)
            found = [prepared["gain_R"], *gradients]
            gradients.clear()
            return found

        drawn = ((seed, prepare(seed)["thoughts"]) for seed in itertools.count())
        seed, thoughts = next(found for found in drawn if (found[1].length_R == L).all())
        return step, thoughts.tokens_RL.tolist()

    def theirs(name: str, checkpoints: bool) -> Contestant:
        def make() -> Run:
            given = None if folder else begin()[1]
            with tempfile.TemporaryDirectory() as made:
                if not folder:
                    save_hf(Path(made, "hf"), shape, load().state_dict())
                where, weights = folder or Path(made, "hf"), list(table.values())
                return trl_step(where, weights, batch, settings, tags, given, checkpoints)

        return peer(name, "trl", device, make)

    sizes = f"{B} contexts of {T} tokens, G = {G} thoughts of {L}, {len(shape.pattern) // 2} layers"
    return Work(f"RLP step of a Llama, AdamW included, {sizes}, d{shape.d_model}, V = {V}",
                B * G * L, [Contestant("ours", lambda: begin()[0]()),
                            theirs("TRL GRPOTrainer", False),
                            theirs("TRL GRPOTrainer with its gradient checkpoints", True)])


def elastic_step_work(device: torch.device, B=8, T=256, V=1024, model=CPU_MODEL) -> Work:
    """A step of Elastic for half of the parameters, after the search: teacher, loss, gradients.
    The teacher is the full model whatever the budget; a step on the text alone shows what the
    budget itself saves. The preset's step is the one of three budgets. The second teacher, where
    there is one, is the full model that trains."""
    network, teacher = noisy_network(device, model, V), noisy_network(device, model, V, seed=1)
    settings = replace(PRESETS["cpu"].elastic, choose="fixed")
    router = routers.build_router(network.config, settings, list(range(len(model.pattern))), device)
    router.settle({budget: routers.by_hand(router, budget) for budget in settings.budgets[1:]})
    objective = elastic.Elastic(settings, router, teacher.requires_grad_(False))
    weights, batch = dict(network.named_parameters()), _text(device, B, T, V)
    masks = nested.hard_masks(network.config, router.choose(0.5))

    def step(hidden_BTD: Tensor, head_VD: Tensor, kl=settings.kl, self_kl=0.0) -> list[Tensor]:
        teachers = [(w, *elastic.told(t, batch))
                    for w, t in ((kl, teacher), (self_kl, network)) if w]
        total, n_tokens = objective.task(hidden_BTD, head_VD, batch, teachers, settings.ce)
        return gradients(total / n_tokens)

    def gradients(loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(
            loss, list(weights.values()), allow_unused=True, materialize_grads=True)]

    def of_all() -> list[Tensor]:
        total, n_tokens, _ = objective.loss(network, batch)
        return gradients(total / n_tokens)

    def on_slices(budget: float, **options: float) -> Run:
        return lambda: step(*objective.run(network, None, budget, batch), **options)

    def on_masks() -> list[Tensor]:
        inside = nested.masked_inside(network.config, masks)
        return step(*elastic.outputs(network, batch, inside=inside))

    other = {"50 %, two teachers": on_slices(0.5, self_kl=1.0), "100 %": on_slices(1.0),
             "50 %, on the text alone": on_slices(0.5, kl=0.0),
             "100 %, on the text alone": on_slices(1.0, kl=0.0),
             "100, 75 and 50 %, one pass of the parent": of_all,
             "100, 75 and 50 %, each with its own": lambda: [
                 t for budget in settings.budgets for t in on_slices(budget)()]}
    sizes = f"{B} sequences of {T} tokens, {model.pattern}, d{model.d_model}, V = {V}"
    return Work(f"Elastic step, {sizes}", B * T, [
        Contestant("50 % of the parameters, on slices", on_slices(0.5)),
        Contestant("50 %, on masks (the paper's way)", on_masks),
        *(Contestant(name, run, is_other_work=True) for name, run in other.items())])


BENCHES: dict[str, Callable[..., Work]] = {
    "ssd": ssd_work, "mixer": mixer_work, "decode": decode_work, "logp": logp_work,
    "base-step": base_step_work, "rlp-step": rlp_step_work, "rlp-trl": rlp_trl_work,
    "elastic-step": elastic_step_work}


# -------------------------------------------------------------------------------------- contestants


def peer(name: str, package: str, device: torch.device, make: Callable[[], Run]) -> Contestant:
    """A contestant from another package, or the reason why it does not run."""
    if find_spec(package) is None:
        return Contestant(name, None, f"not installed: pip install {PIP[package]}")
    if package in ("mamba_ssm", "fla") and device.type != "cuda":
        return Contestant(name, None, "needs a GPU")
    made = cache(make)
    return Contestant(name, lambda: made()())


def with_gradients(forward: Callable[[], Tensor | tuple], leaves: list[Tensor]) -> Run:
    """A run that returns the first output and the gradients of a random linear function of it."""

    @cache
    def weight(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(leaves[0].device)

    def run() -> list[Tensor]:
        y = forward()
        y = y[0] if isinstance(y, tuple) else y
        return [y.detach(), *torch.autograd.grad(y, leaves, weight(y.shape))]

    return run


def noisy_network(device: torch.device, model: ModelConfig, V: int, seed=0) -> HybridLM:
    """A model with noise on its weights: matrices that begin at zero would pass no gradient on."""
    torch.manual_seed(seed)
    network = HybridLM(replace(model, vocab_size=V)).to(device)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return network


def _text(device: torch.device, B: int, T: int, V: int) -> dict[str, Tensor]:
    """A batch of random tokens."""
    tokens_BT, targets_BT = torch.randint(V, (2, B, T), device=device)
    return {"tokens_BT": tokens_BT, "targets_BT": targets_BT, "ids_BT": torch.zeros_like(tokens_BT)}


def rlp_case(device: torch.device, c: RLPConfig, V=1024, model=CPU_MODEL, dtype=torch.float32
             ) -> tuple[HybridLM, RLP, dict[str, Tensor]]:
    """A model, RLP on it, and a batch of random contexts."""
    network = noisy_network(device, model, V).to(dtype)
    tokenizer = SimpleNamespace(
        think=V - 3, close=V - 2, end=V - 1, ends=(V - 1,), tags=(V - 3, V - 2))
    objective = RLP(c, tokenizer)
    objective.start(network)
    return network, objective, random_contexts(device, c.batch, c.context_len, V)


def random_contexts(device: torch.device, B: int, T: int, V: int) -> dict[str, Tensor]:
    """Random contexts and targets for thoughts, without the last three tokens of the vocabulary."""
    context_BT, target_BX = (torch.randint(V - 3, (B, n), device=device) for n in (T, 1))
    return {"context_BT": context_BT, "ids_BT": torch.zeros_like(context_BT),
            "target_BX": target_BX, **{name: torch.zeros(B, dtype=torch.long, device=device)
                                       for name in ("kind_B", "back_B")}}


def _mixer(device: torch.device, D: int, H: int, P: int, N: int, Q: int) -> Mamba2:
    torch.manual_seed(0)
    config = ModelConfig(d_model=D, mamba_heads=H, mamba_head_dim=P, d_state=N, chunk=Q)
    return Mamba2(config).to(device)


def ssd_listing(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, chunk: int) -> Tensor:
    """The paper's listing 1 (arXiv 2405.21060), from segment sums. T must be a multiple of Q."""
    J = x_BTHP.shape[2] // b_BTKN.shape[2]
    b_BTHN, c_BTHN = (t.repeat_interleave(J, dim=2) for t in (b_BTKN, c_BTKN))
    x, b, c = (rearrange(t, "b (c q) h n -> b c q h n", q=chunk)
               for t in (x_BTHP * dt_BTH[..., None], b_BTHN, c_BTHN))
    da_BHCQ = rearrange(dt_BTH * a_H, "b (c q) h -> b h c q", q=chunk)
    l_BHCQ = da_BHCQ.cumsum(-1)
    # 1. inside each chunk, from every token to the later ones
    inside = einsum(c, b, segment_sums(da_BHCQ).exp(), x,
                    "b c q h n, b c s h n, b h c q s, b c s h p -> b c q h p")
    # 2. what each chunk adds to the state at its end
    added = einsum(b, (l_BHCQ[..., -1:] - l_BHCQ).exp(), x,
                   "b c s h n, b h c s, b c s h p -> b c h p n")
    # 3. the state at the start of each chunk, from all chunks before it
    added = torch.cat([torch.zeros_like(added[:, :1]), added], dim=1)
    between = segment_sums(nn.functional.pad(l_BHCQ[..., -1], (1, 0))).exp()
    starts = einsum(between, added, "b h z c, b c h p n -> b z h p n")[:, :-1]
    # 4. what its tokens read of that state
    read = einsum(c, starts, l_BHCQ.exp(), "b c q h n, b c h p n, b h c q -> b c q h p")
    return rearrange(inside + read, "b c q h p -> b (c q) h p") + d_H[:, None] * x_BTHP


def segment_sums(v: Tensor) -> Tensor:
    """Sums of v [..., Q] over s < i <= q for each [..., q, s]; -inf where s > q. Each is summed
    alone, not a difference of running sums: nothing cancels, and it costs Q times as much."""
    Q = v.shape[-1]
    lower_QQ = torch.ones(Q, Q, dtype=torch.bool, device=v.device).tril()
    terms = v[..., :, None].expand(*v.shape, Q).masked_fill(~lower_QQ.tril(-1), 0)
    return terms.cumsum(-2).masked_fill(~lower_QQ, -torch.inf)


def ssd_transformers(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, chunk: int) -> Tensor:
    """The scan of transformers, in PyTorch."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return mamba2_chunk_scan(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, chunk, D=d_H)


def ssd_mamba_ssm(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H, chunk: int) -> Tensor:
    """The scan of Mamba's authors, in Triton."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, chunk, D=d_H)


def ssd_mambapy(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H) -> Tensor:
    """The same scan through the one of Mamba-1, which keeps a state for every token and channel."""
    from mambapy.pscan import pscan

    B, T, H, P = x_BTHP.shape
    J, N = H // b_BTKN.shape[2], b_BTKN.shape[3]
    b_BTHN, c_BTHN = (t.repeat_interleave(J, dim=2) for t in (b_BTKN, c_BTKN))
    decay = (dt_BTH * a_H).exp()[..., None, None].expand(B, T, H, P, N)
    added = (dt_BTH[..., None] * x_BTHP)[..., None] * b_BTHN[..., None, :]
    state_BTHPN = pscan(decay.flatten(2, 3), added.flatten(2, 3)).view(B, T, H, P, N)
    return (state_BTHPN @ c_BTHN[..., None])[..., 0] + d_H[:, None] * x_BTHP


def ssd_fla(x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, d_H) -> Tensor:
    """The same scan as gated linear attention: queries c, keys b, values dt x, gates dt a."""
    from fla.ops.simple_gla import chunk_simple_gla

    J, xdt_BTHP = x_BTHP.shape[2] // b_BTKN.shape[2], x_BTHP * dt_BTH[..., None]
    b_BTHN, c_BTHN = (t.repeat_interleave(J, dim=2) for t in (b_BTKN, c_BTKN))
    y_BTHP, _ = chunk_simple_gla(c_BTHN, b_BTHN, xdt_BTHP, g=dt_BTH * a_H, scale=1.0)
    return y_BTHP + d_H[:, None] * x_BTHP


def transformers_mixer(ours: Mamba2, chunk: int) -> tuple[nn.Module, list[Tensor], object]:
    """The mixer of transformers' NemotronH with our weights; they, in our order; its settings."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    config = NemotronHConfig(hidden_size=ours.in_proj.in_features, mamba_num_heads=ours.n_heads,
                             mamba_head_dim=ours.head_dim, ssm_state_size=ours.d_state,
                             n_groups=ours.n_groups, layers_block_type=["linear_attention"],
                             chunk_size=chunk, time_step_min=0.0, layer_norm_epsilon=ours.norm_eps)
    theirs = NemotronHMamba2Mixer(config, 0).to(ours.D.device)
    weights = {name.replace("conv_", "conv1d.").replace("norm_", "norm."): p.detach()
               for name, p in ours.named_parameters()}
    theirs.load_state_dict(weights | {"conv1d.weight": ours.conv_weight.detach()[:, None]})
    return theirs, [theirs.get_parameter(name) for name in weights], config


def plain_rlp_step(network: HybridLM, objective: RLP, batch: dict[str, Tensor], thoughts: Thoughts,
                   generator: torch.Generator) -> list[Tensor]:
    """A step of RLP with nothing shared: a copy of its context a thought, and all logits.
    The thoughts given take the place of those sampled, so that results can be compared. Returns
    the gain and the sampled log-probabilities of every thought, and the gradients."""
    c, tags = objective.config, objective.tokenizer.tags
    context_RT, ids_RT, target_RX = (batch[name].repeat_interleave(c.group_size, dim=0)
                                     for name in ("context_BT", "ids_BT", "target_BX"))
    tokens_RL, length_R = thoughts.tokens_RL, thoughts.length_R
    (R, L), T = tokens_RL.shape, context_RT.shape[1]
    rows_R, columns_L = (torch.arange(n, device=length_R.device) for n in (R, L))
    think_R1, close_R1 = (torch.full_like(context_RT[:, :1], tag) for tag in tags)
    full_RS = torch.cat([context_RT, think_R1, tokens_RL, close_R1], dim=1)  # closed past the ends

    def logits(model: HybridLM, tokens_RS: Tensor) -> Tensor:
        ids_RS = torch.cat([ids_RT, ids_RT.new_zeros(R, tokens_RS.shape[1] - T)], dim=1)
        return model.logits(model(tokens_RS, ids_BT=ids_RS)[0])

    def logp_of_thoughts(logits_RLV: Tensor) -> Tensor:
        logp_RL = kernels.token_logp(logits_RLV, tokens_RL, tags[:1], c.temperature)
        return logp_RL.where(columns_L < length_R[:, None], 0)

    with torch.no_grad():
        # 1. the copies are run to sample
        hidden_RTD, cached = network(context_RT, ids_BT=ids_RT)
        network.logits(hidden_RTD)
        steps = []
        for i in range(L):
            hidden_R1D, cached = network(full_RS[:, T + i, None], cached)
            steps.append(network.logits(hidden_R1D[:, 0]))
            uniform_R1 = torch.rand(len(steps[-1]), 1, generator=generator,
                                    device=context_RT.device)
            sample(steps[-1], tags[:1], c.temperature, uniform_R1)
        old_logp_RL = logp_of_thoughts(torch.stack(steps, dim=1))
        # 2. once more in full, to score the target at the tag that closes the thought
        closing_R = T + length_R + (~thoughts.closed_R).long()
        thought_RV = logits(network, full_RS)[rows_R, closing_R]
        plain_RV = logits(objective.networks["teacher"], context_RT)[:, -1]
        with_BG, without_BG = (
            kernels.token_logp(t, target_RX[:, 0], tags).view(-1, c.group_size)
            for t in (thought_RV, plain_RV))
        gain_BG = information_gain(with_BG, without_BG[:, 0])
        advantage_R = group_advantages(reward(gain_BG, c.reward_floor)).flatten()
    # 3. and in full again for the gradient
    logp_RL = logp_of_thoughts(logits(network, full_RS)[:, T : T + L])
    loss_R = clipped_surrogate(logp_RL, old_logp_RL, advantage_R, length_R, c.eps_low, c.eps_high)
    gradients = torch.autograd.grad(loss_R.sum(), list(network.parameters()))
    return [gain_BG.flatten(), old_logp_RL, *gradients]


def trl_step(folder: Path, table: list[str], batch: dict[str, Tensor], c: RLPConfig,
             tags: tuple[int, int], given: list[list[int]] | None, checkpoints: bool) -> Run:
    """A step of TRL's GRPOTrainer with the information gain as its reward function.

    given: thoughts that take the place of those sampled. Its tokenizer's words are our ids, and a
    bias keeps `<think>` out of its softmax, as ours does. TRL subtracts the group's mean from the
    rewards, so eq. 6 is met by rewards that are G / (G - 1) times the gain. Returns the gains, and
    the gradients in the order of ours."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    G, context_BT, target_B = c.group_size, batch["context_BT"], batch["target_BX"][:, 0]
    device = context_BT.device
    # 1. The model, the tokenizer, the prompts.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    bias_V = torch.zeros(V := model.config.vocab_size, device=device)
    bias_V[tags[0]] = -1e9
    model.lm_head.bias = nn.Parameter(bias_V, requires_grad=False)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"{V - 1}")
    rows = [{"prompt": " ".join(map(str, [*ids, tags[0]]))} for ids in context_BT.tolist()]
    gains: list[Tensor] = []

    # 2. The reward: the model with each thought, closed, against the model without one.
    @torch.no_grad()
    def information_gain_reward(completion_ids: list[list[int]], **_) -> list[float]:
        thought_RL = torch.tensor(completion_ids, device=device)
        context_RT, target_R = (t.repeat_interleave(G, dim=0) for t in (context_BT, target_B))
        think_R1, close_R1 = (torch.full_like(thought_RL[:, :1], tag) for tag in tags)
        full_RS = torch.cat([context_RT, think_R1, thought_RL, close_R1], dim=1)
        with_R, without_B = (
            kernels.token_logp(model(ids, logits_to_keep=1).logits[:, -1], target, tags)
            for ids, target in ((full_RS, target_R), (context_BT, target_B)))
        gains[:] = [with_R - without_B.repeat_interleave(G)]
        return (gains[0] * G / (G - 1)).tolist()

    # 3. The trainer, and its step as its loop takes it.
    class Trainer(GRPOTrainer):
        def _generate_single_turn(self, *args):
            sampled = super()._generate_single_turn(*args)
            return (given, None) if given else sampled

    with tempfile.TemporaryDirectory() as made:
        options = GRPOConfig(
            made, per_device_train_batch_size=len(rows) * G, num_generations=G,
            max_completion_length=c.thought_len, temperature=c.temperature, beta=0.0,
            scale_rewards="none", loss_type="grpo", learning_rate=c.lr, max_grad_norm=c.clip_norm,
            generation_kwargs={"min_new_tokens": c.thought_len}, bf16=False, report_to="none",
            gradient_checkpointing=checkpoints, use_cpu=device.type == "cpu")
        trainer = Trainer(model, information_gain_reward, options, Dataset.from_list(rows),
                          processing_class=words)
    trainer.current_gradient_accumulation_steps = 1
    if checkpoints:
        model.activation_checkpointing_enable()
    optimizer = trainer.create_optimizer()
    weights = [model.get_parameter(name) for name in table]

    def run() -> list[Tensor]:
        trainer.training_step(model, [row for row in rows for _ in range(G)], None)
        nn.utils.clip_grad_norm_(weights, c.clip_norm)
        optimizer.step()
        found = [gains[0], *(p.grad for p in weights)]
        model.zero_grad()
        return found

    return run


# -------------------------------------------------------------------------------------- the program


def measure(name: str, device: torch.device, repeats: int, **sizes) -> dict:
    """Run one benchmark, `sizes` as its function takes them. Returns what its file will hold."""
    folder = sizes.get("folder")
    apart = partial(measure_apart, name, folder, device, repeats) if folder else None
    found = compare(BENCHES[name](device, **sizes), repeats, device, apart)
    used = {"transformers", "trl"} if folder else set(sys.modules)
    peers = {p: version(PIP[p].split("==")[0]) for p in PIP if p in used and find_spec(p)}
    return {"bench": f"{name}-{folder.name}" if folder else name, **found, "device": device.type,
            **hardware(device), "precision": torch.get_float32_matmul_precision(),
            "versions": versions() | peers, "repeats": repeats, "is_apart": bool(folder)}


def measure_apart(name: str, folder: Path, device: torch.device, repeats: int,
                  contestant: str) -> tuple[list[float], int]:
    """Seconds of each turn, after one without a clock, and peak bytes of a contestant's process."""
    words = [name, "--model", folder, "--alone", contestant, "--device", device.type,
             "--threads", torch.get_num_threads(), "--repeats", repeats]
    ran = subprocess.run([sys.executable, "-m", "tools.bench", *map(str, words)],
                         stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def bench(name: tyro.conf.Positional[Literal[(*BENCHES, "all")]], repeats: int = 15,
          threads: int = 1, device: Literal["auto", "cpu", "cuda"] = "auto",
          model: Path | None = None, alone: str = "",
          out: Path = Path(__file__).parent.parent / "results") -> None:
    """Measure speed and memory beside the code of others, on equal work.

    Args:
        name: Which benchmark, or all of them, one after the other.
        repeats: Turns of every contestant; those that take long get fewer, but at least three.
        threads: Of the CPU.
        device: auto is CUDA where there is one.
        model: For rlp-trl, the Hugging Face directory of a Llama instead of a small random one.
        alone: With --model, a contestant to measure in this process. Its turns in seconds and the
            peak memory in bytes are printed, and nothing is written.
        out: Folder of the results; report.py makes tables of results/.
    """
    require(repeats >= 1, f"repeats ({repeats}) must be at least 1")
    require(name == "rlp-trl" or model is None, f"model ({model}) is for rlp-trl, not for {name}")
    require(model or not alone, f"alone ({alone}) needs --model, the directory of a Llama")
    where = pick_device(replace(PRESETS["cpu"], device=device))
    torch.set_num_threads(threads)
    if alone:
        runs = {c.name: c.run for c in rlp_trl_work(where, folder=model).contestants}
        require(runs.get(alone), f"alone ({alone}) does not run; choose one of {list(runs)}")
        runs[alone]()  # the first step makes AdamW's moments
        turns = take_turns({alone: runs[alone]}, repeats, where)
        print(json.dumps([turns[alone], round(peak_memory_gib(where) * 2**30)]))
        return
    out.mkdir(parents=True, exist_ok=True)
    found = measure(name, where, repeats, **{"folder": model} if model else {})
    file = out / f"bench-{found['bench']}-{found['device']}.json"
    write_json(file, found)
    print(f"{bench_table(found)}\n\nwrote {file}\n")


def main(argv: list[str] | None = None) -> int:
    """`python -m tools.bench NAME`: a table and its file. Returns 0, or 2 if it cannot."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["all"]:  # a process each: what malloc learns from one would change the next
        program = [sys.executable, "-m", "tools.bench"]
        return max(subprocess.run([*program, name, *words[1:]]).returncode for name in BENCHES)
    os.environ["KINETO_LOG_LEVEL"] = "99"  # else the profiler tells of every start and stop
    return exit_code(lambda: tyro.cli(bench, args=words, prog="python -m tools.bench"))


if __name__ == "__main__":
    sys.exit(main())
