"""Speed and memory beside the code of others: the same work, held to the same result, in one
process, in turns.

    python -m tools.bench NAME          one of `BENCHES`
    python -m tools.bench all           each in a process of its own

Each contestant runs once before a clock is started, and its values and gradients must be ours, or
it is not timed. Then all take turns, so that a noisy neighbour disturbs all alike, and the medians
count. On one CPU thread the time is the processor's: blind to programs that take the core.

Memory is the most that torch's allocator had handed out at one time during a run, beyond what it
had before (weights and inputs). The size of the process would also show what others left behind.

An older processor is seen with `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2` before the
command. Results go to results/bench-NAME-DEVICE.json; report.py makes tables of them.

How to read: `BENCHES` and one of its functions; `compare`; then the contestants written out here.
"""

import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from kernels import token_logp
from mamba import Mamba2
from model import HybridLM
from rlp import RLP, clipped_surrogate, group_advantages, information_gain, reward
from system.config import ModelConfig, RLPConfig
from system.errors import exit_code, require
from system.loop import build_optimizers, update
from system.machine import versions
from system.objective import NextToken
from system.presets import PRESETS
from thoughts import Sampling, Thoughts, sample, sample_thoughts
from views.tables import bench_table

PIP = {"transformers": "transformers==5.23.0", "mambapy": "mambapy", "mamba_ssm": "mamba-ssm",
       "fla": "flash-linear-attention"}
LIMIT = {"cpu": 1e-4, "cuda": 2e-2}  # largest difference allowed; Triton kernels multiply in tf32
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)  # tokens, for the cost by length
ENOUGH_S = 5.0  # a contestant that has run this long sits out, once it has had three turns
CPU_MODEL = PRESETS["cpu"].model

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
    """What a benchmark does. contestants: ours first; growth: ours by number of tokens, where the
    cost is measured over length too."""

    title: str
    n_tokens: int
    contestants: list[Contestant]
    growth: dict[int, Run] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------- measuring


def compare(work: Work, repeats: int, device: torch.device) -> dict:
    """Check, time in turns and weigh every contestant. Returns what results/ holds of it."""
    rows = check(work.contestants, LIMIT[device.type])
    runs = {c.name: c.run for c, row in zip(work.contestants, rows, strict=True) if not row["note"]}
    seconds = take_turns(runs, repeats, device)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    for row in (row for row in rows if row["name"] in runs):
        name, s = row["name"], median[row["name"]]
        row |= {"ms": 1e3 * s, "turns": len(seconds[name]), "tokens_per_s": work.n_tokens / s,
                "times_ours": s / median[rows[0]["name"]],
                "peak_bytes": peak_bytes(runs[name], device)}
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
        except Exception as error:  # someone else's code on an unknown machine: say so, and go on
            row["note"] = f"fails: {error!r}"
        else:
            if not row["difference"] <= max(limit, c.rounding):
                row["note"] = f"not timed: differs from ours by {row['difference']:.1e}"
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
    """The most memory that a run had allocated at one time, beyond what there was before it: on a
    CPU the sum of what the profiler records."""
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
    tokens = list(runs)
    peaks = [peak_bytes(run, device) for run in runs.values()]
    ms = [1e3 * statistics.median(s) for s in take_turns(runs, repeats, device).values()]
    exponent, _ = np.polyfit(np.log(tokens), np.log(ms), 1)
    return {"tokens": tokens, "ms": ms, "peak_bytes": peaks, "exponent": exponent}


# --------------------------------------------------------------------------------------- benchmarks


def ssd_work(device: torch.device, B=4, T=512, H=16, P=32, K=1, N=64, chunk=64,
             default=256) -> Work:
    """The scan alone. Rates are mild: where a decay underflows, exp gets very slow for others,
    which would flatter us."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, H, P), (B, T, H), (H,), (B, T, K, N), (B, T, K, N), (H,)]
    x, dt, a, b, c, d = (torch.randn(shape, generator=generator) for shape in shapes)
    dt, a = nn.functional.softplus(dt - 4), -torch.linspace(0.25, 2.0, H)
    leaves = [t.to(device).requires_grad_() for t in (x, dt, a, b, c, d)]

    def contestant(scan: Callable, *args) -> Run:
        return with_gradients(lambda: scan(*leaves, *args), leaves)

    def ours(chunk: int) -> Contestant:
        scan = contestant(lambda *inputs: kernels.ssd(*inputs, chunk=chunk)[0])
        return Contestant(f"ours, chunk {chunk}", scan)

    def from_transformers(chunk: int) -> Run:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

        return contestant(lambda x, dt, a, b, c, d: mamba2_chunk_scan(x, dt, a, b, c, chunk, D=d))

    def from_mamba_ssm() -> Run:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        return contestant(
            lambda x, dt, a, b, c, d: mamba_chunk_scan_combined(x, dt, a, b, c, default, D=d))

    token_by_token = contestant(lambda *inputs: kernels.ssd_reference(*inputs)[0])
    return Work(f"scan, forward and backward, b{B} t{T} h{H} p{P} g{K} n{N}", B * T, [
        ours(chunk), ours(chunk // 2),
        *(peer(f"transformers, chunk {q}{note}", "transformers",
               functools.partial(from_transformers, q))
          for q, note in ((chunk, ""), (default, " (its default)"))),
        Contestant(f"the paper's listing, chunk {chunk}", contestant(ssd_listing, chunk)),
        Contestant("token by token", token_by_token),
        peer("mambapy, Mamba-1's parallel scan", "mambapy", lambda: contestant(ssd_mambapy)),
        peer(f"mamba-ssm, chunk {default}", "mamba_ssm", from_mamba_ssm, device),
        peer("flash-linear-attention", "fla", lambda: contestant(ssd_fla), device)])


def mixer_work(device: torch.device, B=4, T=512, D=256, H=8, P=64, N=64, chunk=64,
               lengths=LENGTHS) -> Work:
    """The whole mixer: projections, convolution, scan, gated norm. For `growth` one sequence of
    every length."""
    mixer = _mixer(device, D, H, P, N, chunk)

    def sequences(B: int, T: int) -> Tensor:
        u_BTD = torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))
        return u_BTD.to(device).requires_grad_()

    def ours(u_BTD: Tensor) -> Run:
        return with_gradients(lambda: mixer(u_BTD, None, None)[0], [u_BTD, *mixer.parameters()])

    def from_transformers(chunk: int) -> Run:
        theirs, _ = transformers_mixer(mixer, chunk)
        leaves = [theirs.get_parameter(their_name(name)) for name, _ in mixer.named_parameters()]
        return with_gradients(lambda: theirs(u_BTD), [u_BTD, *leaves])

    u_BTD = sequences(B, T)
    return Work(f"mixer, forward and backward, b{B} t{T} d{D} h{H} p{P} n{N}", B * T, [
        Contestant(f"ours, chunk {chunk}", ours(u_BTD)),
        *(peer(f"transformers NemotronH, chunk {q}{note}", "transformers",
               functools.partial(from_transformers, q))
          for q, note in ((128, " (its default)"), (chunk, "")))],
        {T: ours(sequences(1, T)) for T in lengths})


def decode_work(device: torch.device, B=16, T=64, D=256, H=8, P=64, N=64, n_steps=20) -> Work:
    """The mixer on one token at a time, after a prefix of T tokens: each run goes on from where the
    last one stopped."""
    mixer = _mixer(device, D, H, P, N, 64)
    generator = torch.Generator().manual_seed(1)
    prefix_BTD, u_B1D = (torch.randn(B, t, D, generator=generator).to(device) for t in (T, 1))

    def ours() -> Run:
        _, cached = mixer(prefix_BTD, None, None)

        def run() -> list[Tensor]:
            nonlocal cached
            for _ in range(n_steps):
                y_B1D, cached = mixer(u_B1D, cached, None)
            return [y_B1D]

        return torch.no_grad()(run)

    def from_transformers() -> Run:
        from transformers import DynamicCache

        theirs, settings = transformers_mixer(mixer, 128)
        cache = DynamicCache(config=settings)
        with torch.no_grad():
            theirs(prefix_BTD, cache_params=cache)
        return torch.no_grad()(
            lambda: [theirs(u_B1D, cache_params=cache) for _ in range(n_steps)][-1:])

    return Work(f"{n_steps} tokens of the mixer, one at a time, b{B} d{D} h{H} p{P} n{N}",
                B * n_steps, [Contestant("ours", ours()),
                              peer("transformers NemotronH", "transformers", from_transformers)])


def logp_work(device: torch.device, T=2048, D=128, V=8192, factor=8) -> Work:
    """Log-probabilities of T tokens and the gradient of their hidden states, for a vocabulary and
    for a larger one."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(T, D, generator=generator).to(device).requires_grad_()
    token_T = torch.randint(V, (T,), generator=generator).to(device)
    contestants = []
    for n in (V, factor * V):
        matrix_VD = torch.randn(n, D, generator=generator).to(device) / D**0.5
        for name, logp in (("ours", kernels.selected_logp),
                           ("all logits at once", kernels.selected_logp_reference)):
            forward = functools.partial(logp, hidden_TD, matrix_VD, token_T)
            contestants.append(Contestant(f"{name}, V = {n}", with_gradients(forward, [hidden_TD]),
                                          is_other_work=n != V))
    return Work(f"log-probabilities of {T} tokens, with the gradient of hidden states, d{D}", T,
                contestants)


def base_step_work(device: torch.device, B=8, T=256, V=1024, model=CPU_MODEL) -> Work:
    """A training step of the base as the loop takes it, each contestant on weights of its own.

    Muon's steps in bf16 differ by rounding; where bf16 is emulated they take most of the time.
    """
    settings, batch = PRESETS["cpu"].pretrain, _text(device, B, T, V)

    def contestant(muon_lr: float, muon: type[torch.optim.Muon] | None = None) -> Run:
        network = _network(device, model, V)
        optimizers = build_optimizers(network, replace(settings, muon_lr=muon_lr))
        if muon:
            weights = optimizers[1].param_groups[0]["params"]
            optimizers[1] = muon(weights, lr=muon_lr, weight_decay=settings.weight_decay)
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["peak_lr"] = group["lr"]

        def run() -> list[Tensor]:
            update(network, NextToken(), [batch], optimizers, settings, settings.warmup)
            return [p.detach() for p in network.parameters()]

        return run

    lr = settings.muon_lr
    return Work(f"training step of the base, optimizer included, b{B} t{T}, {model.pattern}, "
                f"d{model.d_model}, V = {V}", B * T, [
        Contestant("ours", contestant(lr)),
        Contestant("with torch.optim.Muon, steps in bf16", contestant(lr, torch.optim.Muon),
                   rounding=5e-2),
        Contestant("AdamW alone", contestant(0.0), is_other_work=True)])


def rlp_step_work(device: torch.device, B=4, T=256, G=8, L=32, V=1024, model=CPU_MODEL,
                  dtype=torch.float32) -> Work:
    """A step of RLP: sampled thoughts, their reward, and the gradient of every weight. Contexts are
    random tokens."""
    network = _network(device, model, V, dtype)
    tokenizer = SimpleNamespace(think=V - 3, close=V - 2, end=V - 1, tags=(V - 3, V - 2))
    objective = RLP(RLPConfig(group_size=G, thought_len=L), tokenizer)
    objective.start(network)
    context_BT, target_BX = (torch.randint(V - 3, (B, n), device=device) for n in (T, 1))
    batch = {"context_BT": context_BT, "ids_BT": torch.zeros_like(context_BT),
             "target_BX": target_BX, "is_text_B": torch.zeros(B, dtype=torch.bool, device=device)}

    def generator() -> torch.Generator:
        return torch.Generator(device).manual_seed(0)

    def ours() -> list[Tensor]:
        prepared = objective.prepare(network, batch, 0, generator())
        loss, _, _ = objective.loss(network, prepared)
        return [prepared["gain_R"], prepared["thoughts"].logp_RL,
                *torch.autograd.grad(loss, list(network.parameters()))]

    thoughts = sample_thoughts(network, batch, tokenizer,
                               Sampling(G, L, objective.config.temperature), generator())
    return Work(f"RLP step, {B} contexts of {T} tokens, G = {G} thoughts of up to {L}, "
                f"{model.pattern}, V = {V}", B * G * L, [
        Contestant("ours", ours),
        Contestant("the plain way", lambda: plain_rlp_step(network, objective, batch, thoughts,
                                                           generator()))])


def elastic_step_work(device: torch.device, B=8, T=256, V=1024, budget=0.5,
                      model=CPU_MODEL) -> Work:
    """A step of Elastic for a budget, after the search: the teacher's pass, the loss, and the
    gradient of every weight.

    The teacher is the full model whatever the budget; a step on the text alone shows what the
    budget itself saves. In the preset the full model that trains is a second teacher of the smaller
    ones.
    """
    network, teacher = _network(device, model, V), _network(device, model, V, seed=1)
    settings = replace(PRESETS["cpu"].elastic, choose="fixed", budgets=(1.0, budget))
    router = routers.build_router(network.config, settings, list(range(len(model.pattern))), device)
    objective = elastic.Elastic(settings, router, teacher.requires_grad_(False))
    weights, batch = dict(network.named_parameters()), _text(device, B, T, V)
    masks = nested.hard_masks(network.config, router.choose(budget))

    def step(hidden_BTD: Tensor, head_VD: Tensor, kl: float = settings.kl,
             self_kl: float = 0.0) -> list[Tensor]:
        teachers = [(kl, teacher), (self_kl, network)]
        total, n_tokens = objective.task(hidden_BTD, head_VD, batch, teachers, settings.ce)
        found = torch.autograd.grad(total / n_tokens, list(weights.values()), allow_unused=True,
                                    materialize_grads=True)
        return [total.detach() / n_tokens, *found]

    def on_slices(budget: float, **options: float) -> Run:
        return lambda: step(*objective.run(network, weights, None, budget, batch), **options)

    def on_masks() -> list[Tensor]:
        masked = nested.mask_weights(weights, network.config, masks)
        skeleton = nested.masked_skeleton(network.config, masks)
        hidden_BTD, _ = torch.func.functional_call(
            skeleton, masked, (batch["tokens_BT"],), {"ids_BT": batch["ids_BT"]})
        return step(hidden_BTD, masked.get("head.weight", masked["embed.weight"]))

    percent = f"{100 * budget:g} %"
    other = ((f"{percent}, two teachers", budget, {"self_kl": 1.0}), ("100 %", 1.0, {}),
             (f"{percent}, on the text alone", budget, {"kl": 0.0}),
             ("100 %, on the text alone", 1.0, {"kl": 0.0}))
    return Work(f"Elastic step, {B} sequences of {T} tokens, {model.pattern}, d{model.d_model}, "
                f"V = {V}", B * T, [
        Contestant(f"{percent} of the parameters, on slices", on_slices(budget)),
        Contestant(f"{percent}, on masks (the paper's way)", on_masks),
        *(Contestant(name, on_slices(b, **options), is_other_work=True)
          for name, b, options in other)])


BENCHES: dict[str, Callable[..., Work]] = {
    "ssd": ssd_work, "mixer": mixer_work, "decode": decode_work, "logp": logp_work,
    "base-step": base_step_work, "rlp-step": rlp_step_work, "elastic-step": elastic_step_work}


# -------------------------------------------------------------------------------------- contestants


def peer(name: str, package: str, make: Callable[[], Run],
         device: torch.device | None = None) -> Contestant:
    """A contestant from another package, or the reason why it does not run. Those that need a GPU
    are told the device."""
    if find_spec(package) is None:
        return Contestant(name, None, f"not installed: pip install {PIP[package]}")
    if device is not None and device.type != "cuda":
        return Contestant(name, None, "needs a GPU")
    made = functools.cache(make)
    return Contestant(name, lambda: made()())


def with_gradients(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Run:
    """A run that returns y and the gradient of one random linear function of it for every leaf."""

    @functools.cache
    def weight(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(leaves[0].device)

    def run() -> list[Tensor]:
        y = forward()
        return [y.detach(), *torch.autograd.grad(y, leaves, weight(y.shape))]

    return run


def _network(device: torch.device, model: ModelConfig, V: int, dtype: torch.dtype = torch.float32,
             seed: int = 0) -> HybridLM:
    """A model with noise on its weights: at the start some matrices are zero, and their layers
    would have no gradient."""
    torch.manual_seed(seed)
    network = HybridLM(replace(model, vocab_size=V)).to(device, dtype)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return network


def _text(device: torch.device, B: int, T: int, V: int) -> dict[str, Tensor]:
    """A batch of random tokens."""
    tokens_BT, targets_BT = torch.randint(V, (2, B, T), device=device)
    return {"tokens_BT": tokens_BT, "targets_BT": targets_BT, "ids_BT": torch.zeros_like(tokens_BT)}


def _mixer(device: torch.device, D: int, H: int, P: int, N: int, chunk: int) -> Mamba2:
    torch.manual_seed(0)
    return Mamba2(
        ModelConfig(d_model=D, mamba_heads=H, mamba_head_dim=P, d_state=N, chunk=chunk)).to(device)


def ssd_listing(x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTKN: Tensor, c_BTKN: Tensor,
                d_H: Tensor, chunk: int) -> Tensor:
    """The scan as the paper lists it (arXiv 2405.21060, listing 1): four contractions over chunks,
    and segment sums. T must be a multiple of the chunk."""
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
    """From v of [..., Q] the sums of v over s < i <= q for every pair [..., q, s]; -inf where s >
    q. Every sum is a sum of its own, not a difference of two running sums: nothing cancels, and it
    costs Q times as much."""
    Q = v.shape[-1]
    lower_QQ = torch.ones(Q, Q, dtype=torch.bool, device=v.device).tril()
    terms = v[..., :, None].expand(*v.shape, Q).masked_fill(~lower_QQ.tril(-1), 0)
    return terms.cumsum(-2).masked_fill(~lower_QQ, -torch.inf)


def ssd_mambapy(x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTKN: Tensor, c_BTKN: Tensor,
                d_H: Tensor) -> Tensor:
    """The same scan through the one of Mamba-1, which keeps a state for every token and channel."""
    from mambapy.pscan import pscan

    B, T, H, P = x_BTHP.shape
    J, N = H // b_BTKN.shape[2], b_BTKN.shape[3]
    b_BTHN, c_BTHN = (t.repeat_interleave(J, dim=2) for t in (b_BTKN, c_BTKN))
    decay = (dt_BTH * a_H).exp()[..., None, None].expand(B, T, H, P, N)
    added = (dt_BTH[..., None] * x_BTHP)[..., None] * b_BTHN[..., None, :]
    state_BTHPN = pscan(decay.flatten(2, 3), added.flatten(2, 3)).view(B, T, H, P, N)
    return (state_BTHPN @ c_BTHN[..., None])[..., 0] + d_H[:, None] * x_BTHP


def ssd_fla(x_BTHP: Tensor, dt_BTH: Tensor, a_H: Tensor, b_BTKN: Tensor, c_BTKN: Tensor,
            d_H: Tensor) -> Tensor:
    """The same scan as gated linear attention: queries c, keys b, values dt x, gates dt a."""
    from fla.ops.simple_gla import chunk_simple_gla

    J = x_BTHP.shape[2] // b_BTKN.shape[2]
    b_BTHN, c_BTHN = (t.repeat_interleave(J, dim=2) for t in (b_BTKN, c_BTKN))
    y_BTHP, _ = chunk_simple_gla(c_BTHN, b_BTHN, x_BTHP * dt_BTH[..., None], g=dt_BTH * a_H,
                                 scale=1.0)
    return y_BTHP + d_H[:, None] * x_BTHP


def their_name(name: str) -> str:
    """What transformers calls a weight of the mixer."""
    return name.replace("conv_", "conv1d.").replace("norm_", "norm.")


def transformers_mixer(ours: Mamba2, chunk: int) -> tuple[nn.Module, object]:
    """The Mamba-2 mixer of transformers' NemotronH with our weights, and its settings."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    config = NemotronHConfig(hidden_size=ours.in_proj.in_features, mamba_num_heads=ours.n_heads,
                             mamba_head_dim=ours.head_dim, ssm_state_size=ours.d_state,
                             n_groups=ours.n_groups, layers_block_type=["linear_attention"],
                             chunk_size=chunk, time_step_min=0.0, layer_norm_epsilon=ours.norm_eps)
    theirs = NemotronHMamba2Mixer(config, 0).to(ours.D.device)
    weights = {their_name(name): p.detach() for name, p in ours.named_parameters()}
    theirs.load_state_dict(weights | {"conv1d.weight": ours.conv_weight.detach()[:, None]})
    return theirs, config


def plain_rlp_step(network: HybridLM, objective: RLP, batch: dict[str, Tensor], thoughts: Thoughts,
                   generator: torch.Generator) -> list[Tensor]:
    """A step of RLP with nothing shared: every thought brings a copy of its context, and all logits
    are computed.

    What is sampled is replaced by the thoughts given, so that the results can be compared. Returns
    the gain and the sampled log-probabilities of every thought, and the gradients.
    """
    c, tags = objective.config, objective.tokenizer.tags
    context_RT, ids_RT, target_RX = (batch[name].repeat_interleave(c.group_size, dim=0)
                                     for name in ("context_BT", "ids_BT", "target_BX"))
    tokens_RL, length_R = thoughts.tokens_RL, thoughts.length_R
    (R, L), T = tokens_RL.shape, context_RT.shape[1]
    think_R1, close_R1 = (torch.full_like(context_RT[:, :1], tag) for tag in tags)
    # past its end a thought is closing tags
    full_RS = torch.cat([context_RT, think_R1, tokens_RL, close_R1], dim=1)

    def logits(model: HybridLM, tokens_RS: Tensor) -> Tensor:
        ids_RS = torch.cat([ids_RT, ids_RT.new_zeros(R, tokens_RS.shape[1] - T)], dim=1)
        return model.logits(model(tokens_RS, ids_BT=ids_RS)[0])

    def logp_of_thoughts(logits_RLV: Tensor) -> Tensor:
        inside_RL = torch.arange(L, device=length_R.device) < length_R[:, None]
        return token_logp(logits_RLV, tokens_RL, tags[:1], c.temperature).where(inside_RL, 0)

    with torch.no_grad():
        # 1. the copies are run to sample
        hidden_RTD, cache = network(context_RT, ids_BT=ids_RT)
        network.logits(hidden_RTD)
        steps = []
        for i in range(L):
            hidden_R1D, cache = network(full_RS[:, T + i, None], cache)
            steps.append(network.logits(hidden_R1D[:, 0]))
            sample(steps[-1], tags[:1], c.temperature, generator)
        old_logp_RL = logp_of_thoughts(torch.stack(steps, dim=1))
        # 2. once more in full, to score the target at the tag that closes the thought
        closing_R = T + length_R + (~thoughts.closed_R).long()
        logits_RV = logits(network, full_RS)[torch.arange(R, device=length_R.device), closing_R]
        logp_target_R = token_logp(logits_RV, target_RX[:, 0], tags)
        logp_teacher_R = token_logp(logits(objective.networks["teacher"], context_RT)[:, -1],
                                    target_RX[:, 0], tags)
        gain_BG = information_gain(logp_target_R.view(-1, c.group_size),
                                   logp_teacher_R.view(-1, c.group_size)[:, 0])
        advantage_BG = group_advantages(reward(gain_BG, c.reward_floor))
    # 3. and in full again for the gradient
    logp_RL = logp_of_thoughts(logits(network, full_RS)[:, T : T + L])
    loss_R = clipped_surrogate(logp_RL, old_logp_RL, advantage_BG.flatten(), length_R, c.eps_low,
                               c.eps_high)
    gradients = torch.autograd.grad(loss_R.sum(), list(network.parameters()))
    return [gain_BG.flatten(), old_logp_RL, *gradients]


# -------------------------------------------------------------------------------------- the program


def measure(name: str, device: torch.device, repeats: int, **sizes) -> dict:
    """Run one benchmark; `sizes` are those of its function. Returns what its file in results/
    holds."""
    work = BENCHES[name](device, **sizes)
    return {"bench": name, **compare(work, repeats, device), **surroundings(device),
            "repeats": repeats}


def surroundings(device: torch.device) -> dict:
    """What a figure is worth only together with: the machine, the instructions that torch uses of
    it, the threads, the precision, the versions and the commit."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    machine = named[1] if named else platform.machine()
    peers = {name: getattr(sys.modules[name], "__version__", "")
             for name in PIP if name in sys.modules}
    return {"device": device.type,
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else machine,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "precision": torch.get_float32_matmul_precision(), "versions": versions() | peers}


def bench(name: tyro.conf.Positional[Literal[(*BENCHES, "all")]], repeats: int = 15,
          threads: int = 1, device: Literal["auto", "cpu", "cuda"] = "auto",
          out: Path = Path(__file__).parent.parent / "results") -> None:
    """Measure speed and memory beside the code of others, on equal work.

    Args:
        name: Which benchmark, or all of them, one after the other.
        repeats: Turns of every contestant; those that take long get fewer, but at least three.
        threads: Of the CPU.
        device: auto is CUDA where there is one.
        out: Folder of the results; report.py makes tables of results/.
    """
    require(repeats >= 1, f"repeats ({repeats}) must be at least 1")
    require(device != "cuda" or torch.cuda.is_available(),
            "device (cuda) is not available on this machine; use cpu")
    torch.set_num_threads(threads)
    on_cuda = torch.cuda.is_available() and device != "cpu"
    out.mkdir(parents=True, exist_ok=True)
    found = measure(name, torch.device("cuda" if on_cuda else "cpu"), repeats)
    file = out / f"bench-{name}-{found['device']}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{bench_table(found)}\n\nwrote {file}\n")


def main(argv: list[str] | None = None) -> int:
    """`python -m tools.bench NAME`: a table, and results/bench-NAME-DEVICE.json. Returns 0, or 2 if
    it cannot."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["all"]:  # a process each: what malloc learns from one would change the next
        program = [sys.executable, "-m", "tools.bench"]
        return max(subprocess.run([*program, name, *words[1:]]).returncode for name in BENCHES)
    os.environ["KINETO_LOG_LEVEL"] = "99"  # else the profiler tells of every start and stop
    return exit_code(lambda: tyro.cli(bench, args=words, prog="python -m tools.bench"))


if __name__ == "__main__":
    sys.exit(main())
