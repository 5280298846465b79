"""Train: parse the settings, build the parts, run the one loop, measure, report.

    python train.py --mode rlp                       train a small base, run RLP on it, measure it (CPU, minutes)
    python train.py --mode pretrain                  the base alone
    python train.py --mode cpt                       the rival: the base's own pretraining goes on for as long as RLP takes
    python train.py --mode rlp --preset smoke        every part in seconds
    python train.py --mode rlp --rlp.positions random --out runs/random

How to read: `main`, `run`, then `fit`. An objective gives `fit` four things: `prepare(model, batch, generator)` makes
what the updates need (RLP samples thoughts here), `loss(model, batch) -> (sum, count, metrics)`, `n_updates` of each
batch, and `after_step(model)`. The loss is divided by the total count of a step, so accumulation cannot change it.

All randomness is a function of (seed, step): a resumed run repeats the uninterrupted one bit for bit.
"""

import dataclasses
import json
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import checkpoint
import evals
import report
from config import PRESETS, Config, FitConfig, fingerprint, from_dict, require
from data import Corpus, cpt_batch, held_out_problems, pretrain_batch, rlp_batch
from generate import show_thoughts
from model import HybridLM, count_parameters
from rlp import RLP

console = Console(highlight=False)


class NextToken:
    """Plain next-token prediction, as an objective for `fit`."""

    n_updates = 1

    def prepare(self, model: HybridLM, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Nothing to do."""
        return batch

    def loss(self, model: HybridLM, batch: dict[str, Tensor]) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Sum of the cross-entropies in nats, number of targets (those of -100 count for nothing), metrics."""
        hidden_BTD, _ = model(batch["tokens_BT"], ids_BT=batch["ids_BT"])
        target = batch["targets_BT"].flatten()
        loss = F.cross_entropy(model.logits(hidden_BTD).flatten(0, 1), target, ignore_index=-100, reduction="sum")
        return loss, int((target != -100).sum()), {}

    def after_step(self, model: HybridLM) -> None:
        """Nothing to do."""

    def networks(self) -> dict[str, HybridLM]:
        """No network beside the model."""
        return {}


# ------------------------------------------------------------------------------------------------------- the loop


def fit(
    model: HybridLM,
    objective: NextToken | RLP,
    make_batch: Callable[[int], dict[str, Tensor]],
    settings: FitConfig,
    run_dir: Path,
    seed: int,
    meta: dict,
    label: str,
    start: checkpoint.Checkpoint | None = None,
) -> None:
    """The training loop of every mode: batch, prepare, update, log, save.

    Args: make_batch: the batch of a step; meta: goes into every checkpoint; start: where to go on from.
    Raises KeyboardInterrupt after Ctrl-C, once the step is finished and saved; FloatingPointError if a gradient is not
    finite, with the weights before it saved.
    """
    device = next(model.parameters()).device
    optimizers = build_optimizers(model, settings)
    step = 0
    if start is not None:
        step = start.meta["step"]
        restore(start, model, objective, optimizers)
    trim_log(run_dir / "metrics.jsonl", step)

    def save() -> Path:
        networks = {"model": model, **objective.networks()}
        return checkpoint.save(run_dir, step, networks, [o.state_dict() for o in optimizers], meta)

    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with (
        Interrupt() as interrupt,
        Progress(*columns, console=console) as progress,
        open(run_dir / "metrics.jsonl", "a") as log,
    ):
        task = progress.add_task(label, total=settings.steps, completed=step, note="")
        began = time.perf_counter()
        while step < settings.steps:
            generator = torch.Generator(device).manual_seed(int(fingerprint([seed, step, label]), 16))
            batch = {k: v.to(device, non_blocking=True) for k, v in make_batch(step).items()}
            parts = [objective.prepare(model, part, generator) for part in split_batch(batch, settings.accumulate)]
            for _ in range(objective.n_updates):
                metrics = update(model, objective, parts, optimizers, settings, step)
                if not np.isfinite(metrics["grad_norm"]):
                    raise FloatingPointError(
                        f"step {step}: the gradient is not finite (loss {metrics['loss']}); the weights before it are in "
                        f"{save()}; go on from there with a smaller {label}.lr or {label}.clip_norm"
                    )
                objective.after_step(model)
            step += 1
            if step % settings.log_every == 0:
                log.write(json.dumps({"step": step, **metrics, "seconds": time.perf_counter() - began}) + "\n")
                log.flush()
                began = time.perf_counter()
            shown = "gain_ema_nats" if "gain_ema_nats" in metrics else "loss"
            progress.update(task, completed=step, note=f"{shown} {metrics[shown]:.3f}")
            if interrupt.asked:
                raise KeyboardInterrupt(f"stopped after step {step}; saved in {save()}; go on with --resume")
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                save()
        if settings.steps == 0:
            save()


def update(
    model: HybridLM, objective: NextToken | RLP, parts: list[dict], optimizers: list, settings: FitConfig, step: int
) -> dict[str, float]:
    """One optimizer step on the mean loss over all parts; skipped if the gradient is not finite. Returns metrics."""
    total_loss, total_count, totals = 0.0, 0, {}
    for part in parts:
        loss, count, metrics = objective.loss(model, part)
        loss.backward()
        total_loss, total_count = total_loss + float(loss.detach()), total_count + count
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + float(value) * count
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_div_(grads, total_count)
    grad_norm = float(nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm))
    rate = schedule(step, settings)
    if np.isfinite(grad_norm):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    means = {name: total / total_count for name, total in totals.items() if np.isfinite(total)}
    return {
        "loss": total_loss / total_count,
        **means,
        "grad_norm": grad_norm,
        "lr": settings.lr * rate,
        "count": total_count,
    }


def schedule(step: int, settings: FitConfig) -> float:
    """Share of the peak rate at a step: linear warm-up, constant, linear to zero over the last `decay` of the steps."""
    up = (step + 1) / max(1, settings.warmup)
    down = (settings.steps - step) / max(1e-9, settings.decay * settings.steps)
    return min(1.0, up, down)


def build_optimizers(model: HybridLM, settings: FitConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices inside the layers where `muon_lr` is set."""
    inner = {id(p): p for n, p in model.layers.named_parameters() if p.dim() == 2 and "conv" not in n}
    muon = list(inner.values()) if settings.muon_lr > 0 else []
    adam = [p for p in model.parameters() if not (muon and id(p) in inner)]
    groups = [
        {"params": [p for p in adam if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in adam if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=settings.muon_lr, weight_decay=settings.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def split_batch(batch: dict[str, Tensor], n: int) -> list[dict[str, Tensor]]:
    """n equal parts of a batch, by rows."""
    pieces = {k: v.chunk(n) for k, v in batch.items()}
    return [{k: v[i] for k, v in pieces.items()} for i in range(n)]


def restore(start: checkpoint.Checkpoint, model: HybridLM, objective: NextToken | RLP, optimizers: list) -> None:
    """Networks and optimizers as they were when the checkpoint was written."""
    checkpoint.load_weights(model, start.tensors("model"), start.path)
    if isinstance(objective, RLP) and (start.path / "teacher.safetensors").exists():
        objective.start(model)
    for name, network in objective.networks().items():
        checkpoint.load_weights(network, start.tensors(name), start.path)
    for optimizer, state in zip(optimizers, start.optimizer(), strict=True):
        optimizer.load_state_dict(state)


def trim_log(file: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl that a resumed run will write again, and a last one that a crash cut short."""
    if file.exists():
        whole = file.read_text().split("\n")[:-1]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        file.write_text("".join(line + "\n" for line in kept))


class Interrupt:
    """Turns the first Ctrl-C into a flag, so that a step is finished and saved; the second one stops at once."""

    asked = False

    def __enter__(self) -> "Interrupt":
        """Start listening."""
        self.previous = signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, *_: object) -> None:
        """The handler."""
        self.asked = True
        signal.signal(signal.SIGINT, self.previous)

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        signal.signal(signal.SIGINT, self.previous)


# --------------------------------------------------------------------------------------------------------- a run


def build_model(config: Config, n_vocab: int, device: torch.device, seed: int) -> HybridLM:
    """A freshly initialised model. Raises ValueError if model.vocab_size is too small for the tokenizer."""
    shape = config.model
    require(
        shape.vocab_size == 0 or shape.vocab_size >= n_vocab,
        f"model.vocab_size ({shape.vocab_size}) is smaller than the tokenizer's {n_vocab}; use 0 for the tokenizer's",
    )
    torch.manual_seed(seed)
    return HybridLM(dataclasses.replace(shape, vocab_size=shape.vocab_size or n_vocab)).to(device)


def base_weights(config: Config, corpus: Corpus, model: HybridLM) -> dict:
    """Load the base into the model: from `init`, else from the cache, else by pretraining it now.

    Returns, for summary.json: its folder, whether it was there already, and the seconds that its training steps took.
    """
    was_cached = True
    if config.init:
        folder = Path(config.init)
        found = checkpoint.newest(folder) if folder.is_dir() else None
        require(found, f"init ({config.init}) holds no checkpoint; give the run folder of an earlier run")
    else:
        key = fingerprint([config.base_fingerprint(), corpus.key])
        folder = Path(config.data.cache_dir) / f"base-{key}"
        found = checkpoint.newest(folder) if folder.exists() else None
        if found is None or found.meta["step"] < config.pretrain.steps:
            was_cached = False
            console.print(f"training the base once; it is kept in {escape(str(folder))}")
            train_base(dataclasses.replace(config, mode="pretrain", out=str(folder)), corpus, model, found)
            found = checkpoint.newest(folder)
    warn(found.warning)
    checkpoint.load_weights(model, found.tensors("model"), found.path)
    steps = (folder / "metrics.jsonl").read_text().splitlines()
    seconds = sum(json.loads(line)["seconds"] for line in steps)
    return {"base_dir": str(folder), "base_was_cached": was_cached, "base_train_s": seconds}


def train_base(config: Config, corpus: Corpus, model: HybridLM, start: checkpoint.Checkpoint | None) -> None:
    """Pretraining, into config.out."""
    run_dir = prepare_run_dir(config)
    fit(model, NextToken(), lambda step: pretrain_batch(corpus, config, step), config.pretrain, run_dir, config.seed,
        run_meta(config, corpus), "pretrain", start)  # fmt: skip


def run(config: Config) -> dict:
    """A whole run: data, base, training, held-out figures, plots. Returns what summary.json holds."""
    began = time.perf_counter()
    config.check()
    device = pick_device(config)
    run_dir = config.run_dir()
    start = resume_point(config, run_dir)
    if config.dry_run:
        return dry_run(config)
    corpus = Corpus.load(config.data)
    check_text(start, corpus)
    prepare_run_dir(config)
    model = build_model(config, corpus.tokenizer.n_vocab, device, config.seed)
    console.print(
        f"{config.mode}: {count_parameters(model):,} parameters, {config.model.pattern}, on {device}; "
        f"results in {escape(str(run_dir))}"
    )
    if config.mode == "pretrain":
        if config.init:
            base_weights(config, corpus, model)
        train_base(config, corpus, model, start)
        results = evaluate_base(model, corpus, config)
    else:
        base_facts = base_weights(config, corpus, model)
        base = build_model(config, corpus.tokenizer.n_vocab, device, config.seed).requires_grad_(False)
        base.load_state_dict(model.state_dict())
        objective = RLP(config.rlp, corpus.tokenizer) if config.mode == "rlp" else NextToken()
        make_batch, settings = {"rlp": (rlp_batch, config.rlp), "cpt": (cpt_batch, config.cpt)}[config.mode]
        fit(model, objective, lambda step: make_batch(corpus, config, step), settings, run_dir, config.seed,
            run_meta(config, corpus), config.mode, start)  # fmt: skip
        results = {**base_facts, **evaluate_both(model, base, objective.networks().get("teacher"), corpus, config)}
        write_samples(model, base, corpus, config, run_dir)
    summary = {
        "mode": config.mode,
        "preset": config.preset,
        "seed": config.seed,
        "parameters": count_parameters(model),
        **results,
        "wall_s": time.perf_counter() - began,
        "peak_memory_gib": peak_memory_gib(device),
        "versions": versions(),
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    report.plot_run(run_dir)
    report.print_summary(summary, console)
    console.print(f"wrote {escape(str(run_dir))}/summary.json, metrics.jsonl, samples.txt, checkpoint/ and plots")
    return summary


def evaluate_base(model: HybridLM, corpus: Corpus, config: Config) -> dict:
    """Held-out figures of a pretrained model."""
    problems = evals.evaluate_problems(model, None, None, corpus, config)
    text = evals.text_losses(model, corpus, config)
    return {
        "accuracy": {kind: {k: {"base": v} for k, v in fams.items()} for kind, fams in problems["accuracy"].items()},
        "gain_nats": problems["gain_nats"],
        "forced_style": evals.evaluate_forced_style(model, corpus, config),
        "loss_nats": {"no_think_text": {"base": evals.interval(text)}},
    }


def evaluate_both(model: HybridLM, base: HybridLM, teacher: HybridLM | None, corpus: Corpus, config: Config) -> dict:
    """Held-out figures before (`base`) and after (named by the mode, `rlp` or `cpt`)."""

    def side_by_side(before: dict, after: dict) -> dict:
        return {key: {"base": before[key], config.mode: after[key]} for key in after}

    after = evals.evaluate_problems(model, base, teacher, corpus, config)
    before = evals.evaluate_problems(base, base, None, corpus, config)
    loss_before, loss_after = (evals.text_losses(m, corpus, config) for m in (base, model))
    return {
        "gain_nats": after["gain_nats"],
        "gain_nats_by_family": after["gain_nats_by_family"],
        "gain_nats_before": before["gain_nats"],
        "accuracy": {kind: side_by_side(before["accuracy"][kind], after["accuracy"][kind]) for kind in after["accuracy"]},
        "thought_tokens": side_by_side(before["thought_tokens"], after["thought_tokens"]),
        "closed": side_by_side(before["closed"], after["closed"]),
        "forced_style_base": evals.evaluate_forced_style(base, corpus, config),
        "loss_nats": {
            "no_think_text": {"base": evals.interval(loss_before), config.mode: evals.interval(loss_after)},
            "no_think_text_change": evals.interval((loss_after - loss_before) / loss_before.mean()),
        },
        "text_positions": {
            config.mode: evals.evaluate_text(model, base, teacher, corpus, config),
            "base": evals.evaluate_text(base, base, None, corpus, config),
        },
    }


def write_samples(model: HybridLM, base: HybridLM, corpus: Corpus, config: Config, run_dir: Path) -> None:
    """samples.txt: two held-out problems of each family with a thought of the base and one of the trained model."""
    problems = held_out_problems("test", 2, config.seed, corpus.held_out_percent)
    lines = []
    for problem in problems:
        lines.append(f"[{problem.family}] {problem.prompt}   (right:{problem.answer})")
        for name, network in (("base", base), (config.mode, model)):
            c = config.rlp
            (text,) = show_thoughts(network, corpus.tokenizer, [problem.prompt], c.thought_len, c.temperature, config.seed)
            lines.append(f"  {name:>4}: {text}")
    (run_dir / "samples.txt").write_text("\n".join(lines) + "\n")


def resume_point(config: Config, run_dir: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, None to start anew.

    Raises ValueError if the folder holds a run and resume was not asked for (nothing saved is overwritten), if there is
    nothing to resume, or if the checkpoint was made with other settings.
    """
    found = checkpoint.newest(run_dir) if run_dir.exists() else None
    if not config.resume:
        require(
            found is None, f"out ({run_dir}) already holds a run; add --resume to go on with it, or choose another --out"
        )
        return None
    require(found, f"resume: {run_dir} holds no checkpoint; leave --resume out to start")
    warn(found.warning)
    theirs, ours = found.meta["config"], shared_settings(config)
    different = [name for name in sorted(ours) if theirs.get(name) != ours[name]]
    require(
        not different,
        f"resume: {found.path} was made with other settings: "
        + "; ".join(f"{name} was {theirs.get(name)}, now {ours[name]}" for name in different[:5])
        + "; use its settings, or choose another --out",
    )
    return found


def check_text(start: checkpoint.Checkpoint | None, corpus: Corpus) -> None:
    """Raises ValueError if a run would go on with another text than it was started with."""
    same = start is None or start.meta.get("corpus", corpus.key) == corpus.key  # older checkpoints do not say
    require(
        same,
        "resume: the text is not what the run was started with (that of data.path, or what ships with this Python); "
        "restore it, or choose another --out",
    )


def shared_settings(config: Config) -> dict:
    """The settings that a resumed run must share, flat.

    Those of pretraining are among them unless the weights came from `init`: the run's base was made with them.
    """
    groups = ["model", "data", config.mode] + ([] if config.init else ["pretrain"])
    free = ("cache_dir", "checkpoint_every", "log_every")
    flat = {}
    for name, value in json.loads(json.dumps(config.to_dict())).items():
        if name in groups:
            flat |= {f"{name}.{k}": v for k, v in value.items() if k not in free}
        elif name in ("mode", "seed", "init"):
            flat[name] = value
    return flat


def run_meta(config: Config, corpus: Corpus) -> dict:
    """What a checkpoint says of its run: settings, text and versions."""
    return {"config": shared_settings(config), "corpus": corpus.key, "versions": versions()}


def prepare_run_dir(config: Config) -> Path:
    """Make the run folder and write config.json. Raises ValueError if it cannot be written to."""
    run_dir = config.run_dir()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        text = {"command": " ".join(sys.argv), "versions": versions(), "config": config.to_dict()}
        (run_dir / "config.json").write_text(json.dumps(text, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"out ({run_dir}) cannot be written to: {error.strerror}; choose another --out") from error
    return run_dir


def dry_run(config: Config) -> dict:
    """Print the resolved settings and the size of the model; train nothing."""
    corpus = Corpus.load(config.data)
    with torch.device("meta"):
        model = HybridLM(dataclasses.replace(config.model, vocab_size=config.model.vocab_size or corpus.tokenizer.n_vocab))
    console.print_json(json.dumps(config.to_dict()))
    tokens = config.pretrain.steps * config.pretrain.batch * config.pretrain.seq_len
    console.print(f"{count_parameters(model):,} parameters; base: {tokens:,} tokens; rlp: "
                  f"{config.rlp.steps * config.rlp.batch * config.rlp.group_size:,} thoughts")  # fmt: skip
    return {"parameters": count_parameters(model), "base_tokens": tokens}


def pick_device(config: Config) -> torch.device:
    """The device asked for, or CUDA where there is one. Raises ValueError if CUDA is asked for and missing."""
    has_cuda = torch.cuda.is_available()
    require(config.device != "cuda" or has_cuda, "device (cuda) is not available on this machine; use --device cpu or auto")
    return torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")


def peak_memory_gib(device: torch.device) -> float:
    """The largest memory so far: of the GPU if there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def versions() -> dict[str, str]:
    """Of Python and the libraries that results may depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def warn(message: str) -> None:
    """Print a warning, if there is one."""
    if message:
        console.print(f"[yellow]warning:[/yellow] {escape(message)}")


def parse(argv: list[str]) -> Config:
    """Settings from the command line, over those of the preset. Raises ValueError for an unknown preset."""
    name = "cpu"
    for i, word in enumerate(argv):
        if word == "--preset" and i + 1 < len(argv):
            name = argv[i + 1]
        elif word.startswith("--preset="):
            name = word.split("=", 1)[1]
    require(name in PRESETS, f"preset ({name!r}) is unknown; choose one of {', '.join(PRESETS)}")
    return tyro.cli(Config, default=PRESETS[name], args=argv, prog="train.py", description=__doc__)


def load_run(run_dir: Path) -> tuple[HybridLM, Corpus, Config]:
    """The model, corpus and settings of a finished or interrupted run. Raises ValueError if there is none."""
    found = checkpoint.newest(run_dir) if run_dir.is_dir() else None
    require(found, f"{run_dir} holds no checkpoint; give the folder of a run, such as runs/rlp-cpu-seed0")
    config = from_dict(Config, json.loads((run_dir / "config.json").read_text())["config"])
    corpus = Corpus.load(config.data)
    model = build_model(config, corpus.tokenizer.n_vocab, pick_device(config), config.seed)
    checkpoint.load_weights(model, found.tensors("model"), found.path)
    return model, corpus, config


def main(argv: list[str] | None = None) -> int:
    """The program: 0 for success, 2 for unusable settings, 130 after Ctrl-C."""
    try:
        run(parse(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return 2
    except (KeyboardInterrupt, FloatingPointError) as stop:
        console.print(f"[yellow]{escape(str(stop)) or 'stopped'}[/yellow]", soft_wrap=True)
        return 130 if isinstance(stop, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
