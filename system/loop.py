"""The one training loop. What is learned is up to an `Objective`. Read `fit`, then `update`.

The loss is divided by a step's total count, so accumulation and processes cannot change it. All
randomness is a function of (seed, step): a resumed run repeats the whole one, on a CPU bit for bit.
"""

import contextlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from model import HybridLM
from system import checkpoint, parallel
from system.config import FitConfig
from system.errors import require
from system.files import fingerprint, read_log, write_whole
from system.muon import Muon
from system.objective import Objective

console = Console(highlight=False)
ADAM_BETAS = (0.9, 0.95)  # in every mode
SAMPLE_EVERY = 10  # lines of metrics.jsonl to one of thoughts.jsonl


def fit(model: HybridLM, objective: Objective, make_batch: Callable[[int], dict[str, Tensor]],
        settings: FitConfig, run_dir: Path, seed: int, meta: dict, label: str,
        start: checkpoint.Checkpoint | None = None, log_to: str = "jsonl") -> None:
    """The training loop of every mode: batch, prepare, update, log, save.

    Args: make_batch: of a step; meta: goes into every checkpoint; start: where to go on from;
    log_to: `Config.log`.
    Raises KeyboardInterrupt after Ctrl-C or SIGTERM, once the step is finished and saved;
    FloatingPointError if a gradient is not finite, with the weights before it saved; ValueError if
    the processes and parts do not divide the batch.
    """
    check_rows(settings, label)
    # 1. All processes begin alike; a resumed run begins where the checkpoint was written.
    parallel.barrier()  # nobody may take what is written from here on for an earlier run's
    for network in objective.networks.values():
        parallel.broadcast(network)
    device, plain, model = parallel.device_of(model), model, parallel.shard(model)
    optimizers = build_optimizers(model, settings) + objective.optimizers()
    step, ended = (start.meta["step"], start.meta["ended"]) if start else (0, False)
    first, ended = step, ended or settings.steps == 0
    if start:
        restore(start, model, objective, optimizers)
    log_file, sample_file = run_dir / "metrics.jsonl", run_dir / "thoughts.jsonl"
    for file in (log_file, sample_file) if parallel.is_first() else ():
        trim_log(file, step)

    def save() -> Path:
        networks = {"model": model, **objective.networks}
        return checkpoint.save(run_dir, step, networks, [o.state_dict() for o in optimizers],
                               {**meta, "ended": ended})

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with (Interrupt() as interrupt,
          open(log_file, "a") if parallel.is_first() else contextlib.nullcontext() as log,
          open_board(run_dir, step, log_to) as board,
          Progress(*columns, console=console, disable=not parallel.is_first()) as progress):
        task = progress.add_task(label, total=settings.steps, completed=step, note="")
        began = time.perf_counter()
        while not ended:
            # 2. The batch is cut into equal parts; this process prepares its own.
            try:
                batch = make_batch(step)
            except ValueError as error:  # problems are made by programs of others
                if step == first:
                    raise
                # Several processes save together, and this one may be alone in failing.
                saved = save() if parallel.team.world == 1 else "the newest checkpoint"
                raise ValueError(f"step {step}: {error}; the weights before it are in {saved}, to "
                                 "begin another run from with --init and --out") from error
            pieces = split_batch(batch, parallel.team.world * settings.accumulate)
            parts = []
            with parallel.gathering_once(), parallel.compute():
                for i in parallel.parts_of(settings):
                    part = {k: v.to(device, non_blocking=True) for k, v in pieces[i].items()}
                    generator = noise(device, seed, step, label, i)
                    parts.append(objective.prepare(model, part, step, generator))
            # 3. Learn from them, once or several times.
            for _ in range(objective.n_updates):
                metrics = update(model, objective, parts, optimizers, settings, step)
                if not np.isfinite(metrics["grad_norm"]):
                    raise FloatingPointError(
                        f"step {step}: the gradient is not finite (loss {metrics['loss']}); the "
                        f"weights before it are in {save()}; begin a run from them with --init and "
                        f"--out, and a smaller {label}.lr or {label}.clip_norm")
                objective.after_step(model)
            step += 1
            said = parallel.everyone((interrupt.asked, objective.enough(model, step)))
            enough = said[0][1]  # all end where the first does, though they may measure otherwise
            ended = bool(enough) or step == settings.steps
            # 4. Write a line, say what must be said, show the headline.
            if log and step % settings.log_every == 0:
                line = {"step": step, **metrics, "seconds": time.perf_counter() - began}
                log.write(json.dumps(line) + "\n")
                log.flush()
                for name, value in line.items() if board else ():
                    board.add_scalar(name, value, step)
                if step % (SAMPLE_EVERY * settings.log_every) == 0:
                    write_sample(sample_file, step, objective.sample(parts[0]))
                began = time.perf_counter()
            if parallel.is_first():
                warn(objective.warning(metrics))
            shown = metrics.get(objective.headline, np.nan)
            progress.update(task, completed=step, note=f"{objective.headline} {shown:.3f}")
            # 5. Stop if any process was asked to; save what is due.
            if any(asked for asked, _ in said):
                raise KeyboardInterrupt(f"stopped after step {step}; saved in {save()}")
            if step % settings.checkpoint_every == 0 or ended:
                save()
            if enough:
                console.print(f"{label} ends after {step} of {settings.steps} steps: "
                              f"{escape(enough)}")
        if settings.steps == 0:
            save()
    parallel.collect(model, plain, objective.networks)


def check_rows(settings: FitConfig, label: str) -> None:
    """Raises ValueError if a batch cannot be dealt out evenly."""
    n, rows = parallel.team.world * settings.accumulate, settings.fewest_rows()
    require(rows % n == 0, f"{label}: {rows} equal parts (the most that all batches have) cannot "
            f"be dealt out to {parallel.team.world} processes x {label}.accumulate "
            f"({settings.accumulate}); nearest is {max(1, round(rows / n)) * n}")


def noise(device: torch.device, seed: int, step: int, label: str, part: int) -> torch.Generator:
    """Of a part of a step's batch: two processes draw what one with two parts would."""
    key = fingerprint([seed, step, label] + [part] * (part > 0))
    return torch.Generator(device).manual_seed(int(key, 16))


def update(model: HybridLM, objective: Objective, parts: list[dict], optimizers: list,
           settings: FitConfig, step: int) -> dict[str, float]:
    """One optimizer step on the mean loss over all parts and processes, if the gradient is finite.
    Returns metrics: sums over counts, of those that have counted anything."""
    # 1. Gradients of the summed loss of this process's parts.
    sums = []
    for part in parts:
        with parallel.compute():
            loss, count, metrics = objective.loss(model, part)
        loss.backward()
        parallel.reshard(model)
        metrics = {"loss": (loss.detach(), count), **metrics}
        sums.append(numbers(metrics))
    # 2. Over all processes: summed gradients over summed counts are the gradient of the mean.
    totals = add_up(parallel.everyone(add_up(sums)))
    total_count = totals["loss"][1]
    require(total_count > 0, f"step {step}: nothing in the batch is to be predicted; documents are "
            "cut before the first token that is: give a larger seq_len")
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    parallel.sum_gradients(trained)
    gradients = [parallel.local(p.grad) for p in trained if p.grad is not None]
    torch._foreach_div_(gradients, total_count)
    grad_norm = parallel.clip_gradients(list(model.parameters()), settings.clip_norm)
    others = set(trained) - set(model.parameters())  # routers, whose gradients are not clipped
    if not all(p.grad.isfinite().all() for p in others if p.grad is not None):
        grad_norm = np.nan
    # 3. Step at this step's share of the peak rates.
    rate = schedule(step, settings)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * rate
        if np.isfinite(grad_norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    means = {name: total / n for name, (total, n) in totals.items() if n}
    return {**means, "grad_norm": grad_norm, "lr": settings.lr * rate, "count": total_count}


def numbers(metrics: dict[str, tuple]) -> dict[str, tuple[float, int]]:
    """Sums and counts as Python's numbers: all tensors in one transfer, for each waits for a card.
    """
    tensors = [x.detach().double() for pair in metrics.values() for x in pair if torch.is_tensor(x)]
    read = iter(torch.stack(tensors).tolist())
    pairs = {k: [next(read) if torch.is_tensor(x) else x for x in pair]
             for k, pair in metrics.items()}
    return {name: (float(total), int(n)) for name, (total, n) in pairs.items()}


def add_up(parts: list[dict[str, tuple[float, int]]]) -> dict[str, tuple[float, int]]:
    """(sum, count) of each name over the parts that have it."""
    totals: dict[str, tuple[float, int]] = {}
    for part in parts:
        for name, (value, count) in part.items():
            total, n = totals.get(name, (0.0, 0))
            totals[name] = (total + value, n + count)
    return totals


def schedule(step: int, settings: FitConfig) -> float:
    """Share of the peak rate: linear warm-up, constant, linear to 0 over the last `decay` steps."""
    up = (step + 1) / max(1, settings.warmup)
    down = (settings.steps - step) / max(1e-9, settings.decay * settings.steps)
    return min(1.0, up, down)


def build_optimizers(model: HybridLM, settings: FitConfig) -> list[torch.optim.Optimizer]:
    """For what trains: AdamW, and Muon for matrices inside the layers where `muon_lr` is set."""
    inner = [p for n, p in model.layers.named_parameters()
             if p.dim() == 2 and "conv" not in n and "lora_" not in n]
    muon = {id(p): p for p in inner if settings.muon_lr > 0 and p.requires_grad}
    adam = [p for p in model.parameters() if id(p) not in muon and p.requires_grad]
    decay = settings.weight_decay
    groups = [{"params": [p for p in adam if p.dim() >= 2], "weight_decay": decay},
              {"params": [p for p in adam if p.dim() < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=ADAM_BETAS, fused=True)
    return [adamw, Muon(muon.values(), settings.muon_lr, decay)] if muon else [adamw]


def split_batch(batch: dict[str, Tensor], n: int) -> list[dict[str, Tensor]]:
    """n equal parts of a batch, by rows."""
    pieces = {k: v.chunk(n) for k, v in batch.items()}
    return [{k: v[i] for k, v in pieces.items()} for i in range(n)]


def restore(start: checkpoint.Checkpoint, model: HybridLM, objective: Objective,
            optimizers: list) -> None:
    """Networks and optimizers as they were when the checkpoint was written."""
    for name in start.networks():
        if name not in ("model", *objective.networks):  # made in a step that is not run again
            objective.networks[name] = parallel.frozen_copy(model)
    for name, network in {"model": model, **objective.networks}.items():
        start.fill(network, name)
    start.fill_optimizers(optimizers)


def warn(message: str | None) -> None:
    """Print a warning, if there is one."""
    if message:
        console.print(f"[yellow]warning:[/yellow] {escape(message)}")


def write_sample(file: Path, step: int, sample: dict | None) -> None:
    """Add a line to thoughts.jsonl, if the objective has anything to show."""
    if sample:
        with open(file, "a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n")


def open_board(run_dir: Path, step: int, log_to: str) -> contextlib.AbstractContextManager:
    """TensorBoard's writer, or None: its files hide what others say of the steps after this one."""
    if log_to != "tensorboard" or not parallel.is_first():
        return contextlib.nullcontext()
    from torch.utils.tensorboard import SummaryWriter  # optional: `Config.check` has looked for it
    return SummaryWriter(run_dir, purge_step=step + 1)


def trim_log(file: Path, step: int) -> None:
    """Drop the lines that a resumed run writes again, and with a warning those that hold none."""
    if file.exists():
        lines, n_bad = read_log(file)
        warn(n_bad and f"{file}: lines that hold no step were skipped: {n_bad}")
        kept = [json.dumps(line, ensure_ascii=False) for line in lines if line["step"] <= step]
        write_whole(file, lambda f: f.write("".join(line + "\n" for line in kept).encode()))


class Interrupt:
    """The first Ctrl-C or SIGTERM sets a flag: the step is finished and saved. Another stops it."""

    asked = False

    def __enter__(self) -> "Interrupt":
        self.previous = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, *_: object) -> None:
        """Handle a signal."""
        self.asked = True
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for s, handler in self.previous.items():
            signal.signal(s, handler)
