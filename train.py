"""Train: settings -> parts -> ONE loop -> figures. `MODES` has what differs between the modes.

    python train.py --mode rlp              train a small base, run RLP on it, measure it (CPU)
    python train.py --mode pretrain         the base alone
    python train.py --mode elastic          make the base elastic: one model that holds smaller ones
    python train.py --mode cpt              the rival: the base's own pretraining goes on
    python train.py --mode sft --init RUN   what a run became learns from worked thoughts
    python train.py --preset smoke          every part in seconds
    python train.py --init Qwen3-1.7B-Base  begin with a Hugging Face directory, or with a run
    torchrun --nproc-per-node 8 train.py    eight GPUs (system/parallel.py)

How to read: `MODES`, then `run`. The training loop is `fit` in system/loop.py.

To add a mode: a settings class, derived from FitConfig, its field in `Config`, an entry in `MODES`.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from rich.markup import escape
from torch import Tensor

import elastic
import evals
import importance
import kernels
import nested
import routers
from model import HybridLM
from rlp import RLP
from system import checkpoint, huggingface, lora, parallel, rundir
from system.config import Config, LoRAConfig, ModelConfig, require_known
from system.costs import count_parameters
from system.errors import path_and_reason, require
from system.files import fingerprint, read_figures, write_figures
from system.loop import check_rows, console, fit, split_batch, warn
from system.machine import hardware, peak_memory_gib, pick_device, pick_dtype, set_threads, versions
from system.objective import NextToken, Objective
from system.presets import PAPERS, PRESETS
from text import batches
from text.corpus import Corpus
from text.lengths import with_horizon, worked_lengths
from text.shards import ShardSet, is_shards
from text.tokenizer import named_tokenizer
from thoughts import show_thought
from views import estimate, plots, tables


class Trained(NamedTuple):
    """What figures are made from, once the loop has ended."""

    model: HybridLM
    objective: Objective
    corpus: Corpus
    config: Config
    run_dir: Path


@dataclass(frozen=True)
class Mode:
    """What one mode needs beside its settings, which are the group of its name in `Config`."""

    batch: Callable[[Corpus, Config, int], dict[str, Tensor]]  # of (seed, step) alone
    objective: Callable[[HybridLM, Corpus, Config], Objective]  # may prepare the model
    figures: Callable[[Trained], dict | None]  # for summary.json; None where `parallel.part` ends
    # Raises ValueError for what cannot work with this model, before anything is written.
    refuse: Callable[[ModelConfig, Config, torch.device], None] = lambda *_: None
    needs_base: bool = True  # whether training begins with the base's weights


# ------------------------------------------------------------------------------------------ a run


def run(config: Config) -> dict:
    """A run: data, base, training, held-out figures, plots. Returns what summary.json holds.
    Of several processes the first measures, alone; the others return an empty dict."""
    began = time.perf_counter()
    config = fitting(config)
    if config.dry_run:
        return dry_run(config)
    mode, run_dir = MODES[config.mode], config.run_dir()
    # 1. The machine: processes, device, the form of the hot operations.
    kernels.use(config.kernels)
    device = parallel.start(config.parallel, pick_device(config))
    console.quiet = not parallel.is_first()
    check_rows(getattr(config, config.mode), config.mode)
    # 2. The parts. Whatever does not fit together is refused before anything is written.
    start = rundir.resume_point(config, run_dir)
    require(start or not config.init or Path(config.init).exists(), f"init ({config.init}) does "
            "not exist; give the folder of an earlier run, or a Hugging Face directory")
    corpus = parallel.in_turn(lambda: Corpus.load(config.data))
    require(len(set(parallel.everyone(corpus.key))) == 1, "data: the processes read different "
            "texts or problems; give all of them the same files, and let families draw from lists, "
            "not from sets, whose order is another in each process")
    if not corpus.tokenizer.json:  # tiktoken's: the run keeps its name, which shards may have said
        named = replace(config.data, tokenizer=corpus.tokenizer.encoding.name)
        config = replace(config, data=named)
    past = start.meta if start else {"config": {}}
    config, said = with_horizon(config, corpus, {
        p.name: p.row_tokens for p in estimate.next_token_phases_of(config)},
        past["config"].get("rlp.horizon", 0))
    if start:
        rundir.require_same(start, config, corpus.key)
    model = rundir.build_model(config, corpus.tokenizer.n_vocab, device, config.seed)
    n_parameters = count_parameters(model)
    require(config.lora.rank == 0 or not parallel.shards(n_parameters), f"lora.rank "
            f"({config.lora.rank}) must be 0 where weights are sharded; set it to 0, or "
            "parallel.mode to data")
    mode.refuse(model.config, config, device)
    # With other threads sums would round otherwise.
    threads = set_threads(model, config.threads or past.get("threads", 0), device)
    dtype, about_dtype = pick_dtype(model, config.parallel, past.get("dtype", ""), device)
    config = replace(config, parallel=replace(config.parallel, dtype=dtype))
    parallel.team.settings = config.parallel
    parallel.on_first(lambda: rundir.prepare_run_dir(config, corpus.tokenizer))
    for note in (*corpus.notes, *said, *about_warmup(config)):
        warn(note)
    others = f" and {parallel.team.world - 1} more" if parallel.team.world > 1 else ""
    console.print(f"{config.mode}: {n_parameters:,} parameters, {config.model.pattern},"
                  f" on {device}{others}; results in {escape(str(run_dir))}")
    for line in filter(None, (threads, about_dtype)):
        console.print(line)
    # 3. Training.
    base_facts = base_weights(config, corpus, model) if mode.needs_base or config.init else {}
    if config.lora.rank:
        torch.manual_seed(config.seed)
        if (low := config.parallel.dtype == "bf16") and lora.loses(model):
            warn("in bf16 the weights that adapters leave as they are lose digits, here and in "
                 "what the run hands on; --parallel.dtype fp32 keeps them")
        lora.adapt(model, config.lora, low)
        n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        console.print(f"adapters of rank {config.lora.rank} train: {n_trained:,} parameters")
    objective = train(config.mode, model, corpus, config, run_dir, start)
    # 4. Figures, plots, samples.
    found = mode.figures(Trained(model, objective, corpus, config, run_dir))
    if found is None:
        return {}
    sizes = found.pop("sizes", None)  # of a family the shape of each, which FLOPs are counted by
    summary = {
        "mode": config.mode, "preset": config.preset, "seed": config.seed,
        "split": config.eval.split,
        "parameters": n_parameters, **base_facts, **found,
        "seconds_to_90": rundir.seconds_to(run_dir, "correct", 0.9),
        "steps_s": rundir.logged_seconds(run_dir), "steps_flops": estimate.steps_flops(
            replace(config, model=model.config), rundir.logged_mean(run_dir, "thought_tokens"),
            1 - (rundir.logged_mean(run_dir, "no_signal") or 0), sizes,
            rundir.logged_mean(run_dir, "context_tokens")),
        "wall_s": time.perf_counter() - began, "peak_memory_gib": peak_memory_gib(device),
        **hardware(device), "versions": versions()}
    write_figures(run_dir / "summary.json", summary)
    plots.plot_run(run_dir)
    tables.print_summary(summary, console)
    samples = "samples.txt, " if (run_dir / "samples.txt").exists() else ""
    console.print(f"wrote {escape(str(run_dir))}/summary.json, metrics.jsonl, {samples}checkpoint/ "
                  "and plots")
    return summary


def train(name: str, model: HybridLM, corpus: Corpus, config: Config, run_dir: Path,
          start: checkpoint.Checkpoint | None, objective: Objective | None = None) -> Objective:
    """Train in a mode, or with another objective on its batches. Returns the objective."""
    mode = MODES[name]
    # What a checkpoint brings need not be made again.
    objective = objective or mode.objective(
        model, corpus, replace(config, resume=start is not None))
    run_dir.mkdir(parents=True, exist_ok=True)
    meta = {"config": rundir.shared_settings(config), "corpus": corpus.key, "versions": versions(),
            "threads": torch.get_num_threads(), "dtype": config.parallel.dtype}
    fit(model, objective, lambda step: mode.batch(corpus, config, step), getattr(config, name),
        run_dir, config.seed, meta, name, start, config.log)
    return objective


def base_weights(config: Config, corpus: Corpus, model: HybridLM) -> dict:
    """Load into the model what training begins with: a Hugging Face directory or a run (`init`), or
    a base that is pretrained once and kept; where either is warmed up, what became of it.
    Returns its folder, whether it was there already, and the seconds that its steps took."""
    def kept(name: str, *more: str) -> Path:
        """In the cache; where weights come from `init`, which may change, in the run's folder."""
        origin = [config.init] if config.init else []
        key = fingerprint([config.base_fingerprint(*more), corpus.key, *origin])
        return Path(config.run_dir() if origin else config.data.cache_dir) / f"{name}-{key}"

    folder, was_cached, seconds = Path(config.init), True, 0.0
    if config.init and huggingface.is_hf(folder):
        rundir.load_hf_weights(model, folder, corpus.tokenizer)
    elif config.init:
        found = rundir.newest(folder)
        require(found, f"init ({config.init}) holds no checkpoint; give the folder of an earlier "
                "run, or a Hugging Face directory")
        warn(found.warning)
        checkpoint.load_weights(model, found.weights(), found.path)
    else:
        folder = kept("base")
        was_cached = phase("pretrain", folder, config, corpus, model)
        seconds += rundir.logged_seconds(folder)
    if warms_up(config):
        folder = kept("warmed", "warmup")
        was_cached &= phase("warmup", folder, config, corpus, model)
        seconds += rundir.logged_seconds(folder)
    return {"base_dir": str(folder), "base_was_cached": was_cached, "base_train_s": seconds}


def warms_up(config: Config) -> bool:
    """Whether what training begins with is warmed up first: not a run whose settings say it was."""
    is_phase = config.mode in ("pretrain", "warmup")
    return not is_phase and config.warmup.steps > 0 and not rundir.was_warmed(config.init)


def phase(name: str, folder: Path, config: Config, corpus: Corpus, model: HybridLM) -> bool:
    """Train the model in another mode first, unless that was done, and load what it became.
    Returns whether it was done already."""
    own = replace(config, mode=name, out=str(folder), lora=LoRAConfig())
    was_done = True

    def ended() -> checkpoint.Checkpoint | None:
        found = rundir.newest(folder)
        return found if found and found.meta["ended"] else None

    try:
        found = ended()
    except ValueError as error:
        raise ValueError(f"{error}, so delete {folder}: it is made again") from error
    if not found:
        with rundir.alone_in(folder):  # another program may have trained it meanwhile
            if not (found := ended()):
                was_done = False
                console.print(f"{name}, once; it is kept in {escape(str(folder))}")
                parallel.on_first(lambda: rundir.prepare_run_dir(own, corpus.tokenizer))
                train(name, model, corpus, own, folder, rundir.newest(folder))
                found = ended()
    warn(found.warning)
    checkpoint.load_weights(model, found.tensors("model"), found.path)
    return was_done


# ---------------------------------------------------------------------------- figures of the modes


def figures_of_one(t: Trained) -> dict | None:
    """Held-out figures of a pretrained model."""
    if not parallel.part(t.model):
        return None
    with evals.visiting(t.model, t.config) as model:
        return evals.evaluate_base(model, t.corpus, t.config)


def figures_before_and_after(t: Trained) -> dict | None:
    """Held-out figures of the base and of what it has become, and samples of both."""
    if not parallel.part(t.model):
        return None
    config, device = t.config, parallel.device_of(t.model)
    if config.lora.rank:
        base = lora.reset(parallel.frozen_copy(t.model))
    else:
        base = rundir.build_model(config, t.corpus.tokenizer.n_vocab, device, config.seed)
        base_weights(config, t.corpus, base)  # from disk: training had no room to spare for it
    teacher = t.objective.networks.get("teacher")
    found = evals.evaluate_both(t.model, base.requires_grad_(False), teacher, t.corpus, config)
    write_samples({"base": base, config.mode: t.model}, t)
    return found


def write_samples(networks: dict[str, HybridLM], t: Trained) -> None:
    """samples.txt: two held-out problems of each family, and what each network thinks of them."""
    c, lines, said = t.config, [], {}
    problems = t.corpus.held_out(c.eval.split, 2, c.seed)
    for name, waiting in networks.items():
        with evals.visiting(waiting, c) as network:
            said[name] = [show_thought(network, t.corpus.tokenizer, p.prompt, c.rlp, c.seed)
                          for p in problems]
    for i, problem in enumerate(problems):
        lines.append(f"[{problem.family}] {problem.prompt}   (right:{problem.answer})")
        lines += [f"  {name:>4}: {thoughts[i]}" for name, thoughts in said.items()]
    (t.run_dir / "samples.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def thinking(_: HybridLM, corpus: Corpus, config: Config) -> RLP:
    """RLP's objective, in mode rlvr with the reward of that."""
    return RLP(config.rollouts(), corpus.tokenizer)


def refuse_rlp(shape: ModelConfig, config: Config, device: torch.device) -> None:
    """Raises ValueError where processes would need different numbers of passes."""
    sharded = parallel.shards(estimate.parameters(shape))
    require(config.rollouts().predictor == 0 or not sharded, f"rlp.predictor "
            f"({config.rlp.predictor}) must be 0 where weights are sharded; set it to 0, or "
            "parallel.mode to data")


# ------------------------------------------------------------------------------------- elastic


def refuse_elastic(shape: ModelConfig, config: Config, device: torch.device) -> None:
    """Raises ValueError for choices and budgets that do not fit the model."""
    n, world = config.elastic.calibration_rows, parallel.team.world
    require(n >= world, f"elastic.calibration_rows ({n}) must be at least the number of processes "
            f"({world}); give {world} or more")
    if not config.resume:  # else the checkpoint's costs are what was met
        routers.build_router(shape, config.elastic, None, device)
    require(not config.init or "scratch" not in config.elastic.baseline, "elastic.baseline: "
            f"scratch trains each size as the base of init ({config.init}) was, and how that was "
            "is not known here; leave it out")


def make_elastic(model: HybridLM, corpus: Corpus, config: Config) -> elastic.Elastic:
    """Order the parent's units, in place, but for a run that goes on: its weights and its routers
    have the order. Returns the objective that trains both."""
    c, parent, device = config.elastic, parallel.frozen_twin(model), parallel.device_of(model)
    if config.resume:
        return elastic.Elastic(c, routers.unmeasured_router(model.config, c).to(device), parent)
    pieces = calibration(model, corpus, config)
    depth = order_parent(model, pieces, config).depth
    torch.manual_seed(config.seed)
    made = elastic.Elastic(c, routers.build_router(model.config, c, depth, device), parent)
    made.begin(model, pieces)
    return made


def calibration(model: HybridLM, corpus: Corpus, config: Config) -> list[dict[str, Tensor]]:
    """Training sequences that no step will see: this process's share of them, in pieces of 8 at
    most, or of 16384 tokens, so that memory does not grow with their number."""
    c, rank, world = config.elastic, parallel.team.rank, parallel.team.world
    batch = batches.mixture(corpus, config, 10**6, c.calibration_rows, c.seq_len)
    mine = evals.to_device({name: t[rank::world] for name, t in batch.items()}, model)
    rows = max(1, min(8, 2**14 // c.seq_len))
    return split_batch(mine, -(-len(mine["tokens_BT"]) // rows))


def order_parent(model: HybridLM, pieces: list[dict[str, Tensor]], config: Config
                 ) -> importance.Ranking:
    """Rank units by calibration sequences; order the weights, in place."""
    ranking = importance.rank(model, pieces, config.elastic, config.seed)
    importance.order_weights(model, ranking)
    return ranking


def figures_of_family(t: Trained) -> dict | None:
    """Train the rivals asked for, then measure family and rivals on the same held-out sequences."""
    config, c, router = t.config, t.config.elastic, t.objective.router
    # 1. The models: of each family one for each budget, and what lies between trained budgets.
    widths = {b: router.choose(b) for b in c.budgets}
    midway = {(a + b) / 2: w for a, b in itertools.pairwise(c.budgets)
              if (w := router.choose((a + b) / 2, or_none=True))}
    earlier = t.run_dir / "summary.json"  # a resumed run keeps the rivals that it had
    had = read_figures(earlier)["baselines"] if config.resume and earlier.exists() else {}
    rivals = list(dict.fromkeys([*had, *c.baseline]))
    kept = parallel.whole if rivals else parallel.in_host_memory
    parent = t.objective.teacher = kept(t.objective.teacher)
    alone, flops = {}, {}
    for name in rivals:
        console.print(f"baseline {name}")
        folder = t.run_dir / "baselines" / name
        alone[name] = train_rival(name, t, widths, folder)
        flops[name] = rival_flops(name, t, widths, folder)
    if not parallel.part(t.model):
        return None
    stages = {"elastic": t.model, "stage1": t.objective.networks.get("stage1")}
    families = {name: [nested.submodel(m, w) for w in widths.values()]
                for name, m in stages.items() if m is not None} | alone
    # 2. Their figures. The parent is compared with itself, the family with the parent, everything
    #    else with the family at its budget.
    sizes = [(name, b, m) for name, family in families.items()
             for b, m in zip(c.budgets, family, strict=True)]
    sizes += [("between", b, nested.submodel(t.model, w)) for b, w in midway.items()]
    costs = {b: router.costs.exact(router.choice(b), router.depth_order) for b in widths | midway}
    chosen = ("elastic", "between")  # by the router, and compared with the parent
    references = [0, *(0 if name in chosen else 1 + c.budgets.index(b) for name, b, _ in sizes)]
    models = [parent, *(m for _, _, m in sizes)]
    losses = evals.evaluate_sizes(models, references, t.corpus, config)
    accuracies = evals.size_accuracies(models, t.corpus, config)
    teacher, *figures = (a | b for a, b in zip(losses, accuracies, strict=True))
    entries: dict[str, list[dict]] = {}
    for (name, b, size), found in zip(sizes, figures, strict=True):
        own = (widths | midway)[b] if name in chosen else nested.full_widths(size.config)
        entries.setdefault(name, []).append({
            "budget": b, "fraction": router.fraction(b),
            "target": router.fraction(b) * router.full_cost,
            "cost": costs[b],
            "widths": asdict(own), **evals.size_facts(size, config), **found})
    write_family(t, entries["elastic"], widths)
    named = {f"{b:g}": m for b, m in zip(c.budgets, families["elastic"], strict=True)}
    write_samples(named, t)
    with contextlib.ExitStack() as stack:
        here = [stack.enter_context(evals.visiting(m, config)) for m in families["elastic"]]
        handed_over = evals.handed_over(here, list(widths.values()), t.model.config, t.corpus,
                                        config)
    seconds = {name: rundir.logged_seconds(t.run_dir / "baselines" / name) for name in rivals}
    full = asdict(nested.full_widths(parent.config))
    facts = {"pattern": parent.config.pattern, "widths": full, **evals.size_facts(parent, config)}
    return {
        "teacher": {**facts, **teacher}, "budgets": entries.pop("elastic"),
        "stage1": entries.pop("stage1", []), "between": entries.pop("between", []),
        "baselines": entries,
        "curves": {f"{b:g}": rundir.logged_curve(t.run_dir, f"loss_{b:g}") for b in c.budgets},
        "train_s": {"elastic": rundir.logged_seconds(t.run_dir), **seconds},
        "baselines_flops": flops,
        "sizes": [m.config for m in families["elastic"]],
        "hand_over": handed_over,
        "memory": evals.family_bytes(t.model, router, families["elastic"]),
        "n_tokens": c.n_tokens()}


def write_family(t: Trained, entries: list[dict], widths: dict[float, nested.Widths]) -> None:
    """family.json: what each budget has, costs and reached, and how to cut it out of the weights
    with no code of ours (tools/slicer.py)."""
    told = ("fraction", "cost", "parameters", "widths", "loss_nats", "accuracy")
    family = {f"{e['budget']:g}": {
        **{name: e[name] for name in told},
        "cuts": nested.cuts(t.model.config, widths[e["budget"]])}
        for e in entries}
    write_figures(t.run_dir / "family.json", family, indent=None)


def train_rival(name: str, t: Trained, widths: dict[float, nested.Widths],
                run_dir: Path) -> list[HybridLM]:
    """The models of a baseline (see `elastic.baseline`), one for each budget; the full one is the
    parent, which is there already."""
    c, parent, router = t.config.elastic, t.objective.teacher, t.objective.router
    model, sizes = parallel.frozen_copy(parent), []
    shapes = {b: nested.shrink(parent.config, w) for b, w in widths.items()}
    n_alone = sum(not router.is_full(b) for b in widths)
    if name != "scratch":
        order_parent(model, calibration(model, t.corpus, t.config), t.config)

    def fit_alone(mode: str, size: HybridLM, folder: Path, config: Config,
                  objective: Objective | None = None) -> None:
        start = rundir.newest(folder) if t.config.resume else None
        train(mode, size, t.corpus, config, folder, start, objective)

    for b, w in widths.items():
        if router.is_full(b):
            sizes.append(parent)
            continue
        folder = run_dir / f"{b:g}"
        if name == "scratch":
            torch.manual_seed(t.config.seed)
            size = HybridLM(shapes[b]).to(parallel.device_of(parent))
            for mode in ("pretrain", "warmup"):
                fit_alone(mode, size, folder / mode, t.config)
        else:
            size = parallel.frozen_copy(nested.submodel(model, w)).requires_grad_(True)
            steps = (equal_flops(t.config, parent.config, b, n_alone, shapes)
                     if name == "separate" else c.steps)
            config = one_size(t.config, 1.0, steps=steps)
            fit_alone("elastic", size, folder, config,
                      elastic.Distillation(config.elastic, parent))
        sizes.append(size.requires_grad_(False))
    return sizes


def equal_flops(config: Config, shape: ModelConfig, budget: float, n_alone: int,
                shapes: dict[float, ModelConfig] | None = None) -> int:
    """Steps that distil a budget's size alone, for one of n_alone equal shares of the FLOPs that
    the family takes. shapes: of each budget; until they are known see `estimate.family`."""
    c, whole = config.elastic, replace(config, mode="elastic", model=shape)
    family = estimate.steps_flops(whole, sizes=shapes and [*shapes.values()])
    size = estimate.steps_flops(one_size(whole, budget), sizes=shapes and [shapes[budget]])
    return round(c.steps * family / n_alone / size) if c.steps else 0


def rival_flops(name: str, t: Trained, widths: dict[float, nested.Widths], run_dir: Path) -> float:
    """FLOPs that a baseline took for all its sizes, by the steps of its checkpoints; the parent's,
    which is its full size, left out."""
    whole, total = replace(t.config, mode="elastic", model=t.objective.teacher.config), 0.0
    for b, w in widths.items():
        shape = nested.shrink(whole.model, w)
        own, small = run_dir / f"{b:g}", replace(whole, model=shape)
        phases = {own: one_size(whole, b)} if name != "scratch" else {
            own / mode: replace(small, mode=mode) for mode in ("pretrain", "warmup")}
        for folder, c in phases.items():
            if ended := rundir.newest(folder):
                taken = replace(getattr(c, c.mode), steps=ended.meta["step"])
                total += estimate.steps_flops(replace(c, **{c.mode: taken}), sizes=[shape])
    return total


def one_size(config: Config, budget: float, **more: int) -> Config:
    """Settings of a run that distils one size by itself; more: what else changes of elastic."""
    return replace(config, elastic=replace(config.elastic, budgets=(budget,), long_weights=(1.0,),
                                           self_kl=0.0, choose="fixed", **more))


class Pretraining(NextToken):
    """Next-token prediction until the base can think: see `pretrain.enough`."""

    def __init__(self, corpus: Corpus, config: Config):
        super().__init__()
        self.corpus, self.config = corpus, worked_lengths(config, corpus)

    def enough(self, model: HybridLM, step: int) -> str:
        """Greedy accuracy of each family on validation problems, if the worst is good enough; if it
        is not after the last step, that is printed."""
        c = self.config.pretrain
        if step < c.steps and (step < c.intro_share * c.steps or step % c.enough_every):
            return ""
        with parallel.compute():
            whole = parallel.whole(model, for_sampling=True)
            found = evals.validate(whole, self.corpus, self.config)
        said = "accuracy by family: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items())
        if min(found.values()) >= c.enough:
            return said
        if step == c.steps and parallel.is_first():
            console.print(f"pretrain took all its {step} steps; {said}")
        return ""


MODES: dict[str, Mode] = {
    "pretrain": Mode(batches.pretrain_batch, lambda _, *data: Pretraining(*data), figures_of_one,
                     needs_base=False),
    "warmup": Mode(batches.warmup_batch, lambda *_: NextToken(), figures_of_one),
    "rlp": Mode(batches.rlp_batch, thinking, figures_before_and_after, refuse_rlp),
    "cpt": Mode(batches.cpt_batch, lambda *_: NextToken(), figures_before_and_after),
    "sft": Mode(batches.sft_batch, lambda *_: NextToken(), figures_before_and_after),
    "rlvr": Mode(batches.rlp_batch, thinking, figures_before_and_after, refuse_rlp),
    "elastic": Mode(batches.elastic_batch, make_elastic, figures_of_family, refuse_elastic),
}


# ------------------------------------------------------------------------------------- the program


def fitting(config: Config) -> Config:
    """The settings with what files say. Raises ValueError for all that can be seen not to fit
    together before there are processes, data or a model."""
    config = rundir.resolve(config.check())
    importance.chosen_scores(config.elastic)  # refuses unknown ones
    require_known("mode", config.mode, MODES)
    if config.mode == "elastic" and config.elastic.score_d_model == "pca":
        nested.require_untied(config.model)
    require(config.lora.rank == 0 or not config.init or not warms_up(config), f"lora.rank "
            f"({config.lora.rank}) with init ({config.init}) needs warmup.steps 0, for that "
            "warm-up trains all weights; warm up by --mode warmup first, with adapters too, and "
            "give its folder as --init")
    return config


def about_warmup(config: Config) -> list[str]:
    """A line where init was warmed up already; or where a released model would read thoughts in
    text that it was not warmed up for."""
    gap, steps, init = config.warmup.gap, config.warmup.steps, f"init ({config.init})"
    if steps > 0 and config.mode not in ("pretrain", "warmup") and not warms_up(config):
        return [f"{init} is warmed up: the {steps} steps of warmup.steps are not taken again; "
                "--mode warmup would take more"]
    reads = config.mode == "elastic" or (config.mode == "cpt" and config.cpt.thoughts)
    if reads and gap and steps == 0 and huggingface.is_hf(Path(config.init)):
        return [f"text will have a thought about every {gap} tokens, and the model of {init} is "
                "not warmed up for that; --warmup.gap 0 leaves them out"]
    return []


def dry_run(config: Config) -> dict:
    """Print the settings and the run's estimate, and return it; read nothing but a tokenizer.json.
    A vocabulary still to be made from the text counts as full: a short text's is smaller."""
    n_vocab, name = config.model.vocab_size, config.data.tokenizer
    if n_vocab == 0 and name == "corpus" and config.data.path and is_shards(Path(config.data.path)):
        n_vocab = ShardSet(Path(config.data.path)).tokenizer["n_vocab"]
    elif n_vocab == 0:
        n_vocab = config.data.vocab_size if name == "corpus" else named_tokenizer(name).n_vocab
    config = replace(config, model=replace(config.model, vocab_size=n_vocab))
    if config.init and not Path(config.init).is_dir():
        warn(f"init ({config.init}) is not here: the shape is that of model.*")
    console.print_json(json.dumps(config.to_dict()))
    facts = estimate.facts(config)
    tables.print_estimate(facts, console)
    return facts


def parse(argv: list[str], settings: type[Config] = Config) -> Config:
    """Settings from the command line, over the preset's. Raises ValueError if that is unknown, or
    for one that the mode does not read. Args: settings: `Config`, or a class derived from it that
    has settings of more modes."""
    early, known = argparse.ArgumentParser(add_help=False, allow_abbrev=False), PRESETS | PAPERS
    early.add_argument("--preset", nargs="?", const="", default="cpu")
    name = early.parse_known_args(argv)[0].preset
    require_known("preset", name, known)
    preset = settings(**vars(known[name]))
    given = tyro.cli(settings, default=preset, args=argv, prog="train.py", description=__doc__)
    return given.check_read(preset)


def main(argv: list[str] | None = None, settings: type[Config] = Config) -> int:
    """0: success, 1: the run broke off, 2: unusable settings, 130: stopped by Ctrl-C or SIGTERM."""
    config, before = None, signal.getsignal(signal.SIGTERM)
    try:
        if os.environ.get("WORLD_SIZE", "1") == "1":  # who waits for others hears no handler
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        config = parse(sys.argv[1:] if argv is None else argv, settings)
        run(config)
    except ValueError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return 2
    except FloatingPointError as stop:
        console.print(f"[yellow]{escape(str(stop))}[/yellow]", soft_wrap=True)
        return 1
    except KeyboardInterrupt as stop:
        how = f"; go on {TO_GO_ON[has_saved(config)]}" if config else ""
        console.print(f"[yellow]{escape(str(stop)) or 'stopped'}{how}[/yellow]", soft_wrap=True)
        return 130
    except OSError as error:
        return give_up(f"[red]error:[/red] {escape(path_and_reason(error))}; mend that, or give "
                       "another path; what was saved goes on with --resume")
    except (RuntimeError, MemoryError) as error:
        known = config and broke_off(error, config)
        if not known and parallel.team.world == 1:
            raise
        return give_up(f"[red]{escape(known or traceback.format_exc())}[/red]")
    finally:
        signal.signal(signal.SIGTERM, before)
        parallel.stop()
    return 0


def give_up(message: str) -> int:
    """Say why, on whichever process knows. The others may wait for this one: no clean-up."""
    console.quiet = False
    console.print(message, soft_wrap=True)
    return parallel.leave(1)


TO_GO_ON = ("with the same command", "with --resume")  # before a run has saved steps, and then


def has_saved(config: Config) -> bool:
    """Whether a run has saved steps of its own; its base's are elsewhere."""
    return any((config.run_dir() / "checkpoint").glob("step_*[0-9]"))


def broke_off(error: Exception, config: Config) -> str:
    """What to say of a run that ran out of memory or lost a process; '' for any other error."""
    who = f"process {parallel.team.rank}: " if parallel.team.world > 1 else ""
    first_line = str(error).strip().split("\n")[0][:200]
    saved = has_saved(config)
    how, go_on = TO_GO_ON[saved], (f"what was saved in {config.run_dir()} stays usable" if saved
                                   else "no step of this run was saved yet")
    is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if is_memory or "DefaultCPUAllocator: can't allocate" in str(error):
        return (f"{who}out of memory ({first_line}); {go_on}; go on {how} and a larger "
                f"--{config.mode}.accumulate (while the base trains: --pretrain.accumulate), more "
                "processes, or --parallel.activation-checkpointing; a smaller "
                f"--{config.mode}.batch is another run, with another --out")
    slow = ", and a larger --parallel.timeout-s if it was at work on files"
    lost = (f"{who}another process was lost ({first_line}); {go_on}; go on {how}, on any number of "
            f"processes{slow * ('imed out' in first_line)}")
    return lost if parallel.is_lost(error) else ""


if __name__ == "__main__":
    sys.exit(parallel.leave(main()))
