"""A run's folder: what is written into it, what can be read out of it, and where a run goes on.

It holds config.json (settings, versions, command), metrics.jsonl, checkpoint/, hf/ (the tokenizer),
of RLP thoughts.jsonl (samples with their gains), and at the end summary.json. `load_run` reads it;
`load_model` takes a Hugging Face directory too.
"""

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from model import HybridLM
from system import checkpoint, huggingface, parallel
from system.config import Config, RLPConfig, of_shards, saved_config
from system.errors import require
from system.files import read_json, read_log, write_json
from system.loop import warn
from system.machine import pick_device, versions
from text.tokenizer import FileTokenizer, Tokenizer, named_tokenizer, valid

WRITTEN = ("hf", "metrics.jsonl", "samples.txt", "summary.json")  # beside config.json, checkpoint/


def build_model(config: Config, n_vocab: int, device: torch.device, seed: int) -> HybridLM:
    """A freshly initialised model. Raises ValueError if model.vocab_size is below n_vocab."""
    n = config.model.vocab_size or n_vocab
    require(n >= n_vocab, f"model.vocab_size ({n}) is smaller than the tokenizer's {n_vocab}; use "
            "0 for the tokenizer's")
    torch.manual_seed(seed)
    return HybridLM(replace(config.model, vocab_size=n)).to(device)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other program is inside, and keep others out, at most until this one ends."""
    held = []

    def take() -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        held[:] = held or [os.open(folder / "lock", os.O_CREAT | os.O_RDWR)]
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    while not parallel.on_first(take):  # again and again: the other processes wait only so long
        time.sleep(1)
    try:
        yield
    finally:
        for file in held:
            os.close(file)


def load_hf_weights(model: HybridLM, folder: Path, tokenizer: Tokenizer) -> None:
    """Load a Hugging Face directory into a model, which may have more rows than it (`resolve`)."""
    _, tensors = huggingface.load_hf(folder)
    n_known = len(tensors["embed.weight"])
    beyond = [i for i in range(n_known, model.config.vocab_size) if i not in tokenizer.new_ids]
    if beyond:
        warn(f"{folder}: the tokenizer has {len(beyond)} tokens that the weights have no rows for; "
             "they get new ones, which know nothing: is it this model's?")
    tensors = huggingface.add_rows(tensors, sorted([*tokenizer.new_ids, *beyond]))
    checkpoint.load_weights(model, tensors, folder)


def resolve(config: Config) -> Config:
    """The settings with what files say: the text of rlp.prompt_file, shape and tokenizer of `init`.

    The weights in `init` fit one shape only, so it replaces model.*; data.tokenizer becomes that of
    a Hugging Face directory, or of a run that began with one. Raises ValueError for unusable files.
    """
    if config.rlp.prompt_file:
        require(not config.rlp.prompt, "rlp.prompt and rlp.prompt_file are given; leave one out")
        try:
            text = Path(config.rlp.prompt_file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"rlp.prompt_file ({config.rlp.prompt_file}) cannot be read as UTF-8 "
                             f"text: {error}") from error
        config = replace(config, rlp=replace(config.rlp, prompt=text))
    config = replace(config, rlp=replace(config.rlp, prompt=valid(config.rlp.prompt)))
    folder = Path(config.init)
    if not config.init or not (folder / "config.json").is_file():
        return config
    is_hf = huggingface.is_hf(folder)
    saved = None if is_hf else saved_config(folder)
    shape = huggingface.read_config(folder)[0] if is_hf else saved.model
    named = str(folder) if is_hf else kept_tokenizer(saved, folder)
    require(config.data.tokenizer in ("corpus", named), f"data.tokenizer ({config.data.tokenizer}) "
            f"is not read where init brings one, {named}; leave it out")
    if Path(named).is_dir():
        n_vocab = max(shape.vocab_size, FileTokenizer(Path(named)).n_vocab)
        shape = replace(shape, vocab_size=n_vocab)
    return replace(config, model=shape, data=replace(config.data, tokenizer=named))


def kept_tokenizer(saved: Config, run_dir: Path) -> str:
    """What `data.tokenizer` has for a run's own: its hf/ or, where it keeps no tokenizer.json, its
    name, such as tiktoken's. Raises ValueError for a run that should keep one."""
    if (run_dir / "hf").is_dir():
        return str(run_dir / "hf")
    require(saved.data.tokenizer != "corpus", f"{run_dir / 'hf'}, the run's tokenizer, is missing; "
            "copy it from where the run was made, or train again")
    return saved.data.tokenizer


def was_warmed(init: str) -> bool:
    """Whether a run is a warm-up, or began with one, or with what was warmed up."""
    file = Path(init) / "config.json"
    if not init or huggingface.is_hf(Path(init)) or not file.is_file():
        return False
    saved = saved_config(Path(init))
    if saved.mode in ("pretrain", "warmup") or saved.warmup.steps > 0:
        return saved.mode != "pretrain"
    began = read_json(file).get("warmed")  # what it began with may be gone
    return was_warmed(saved.init) if began is None else began


def logged_seconds(run_dir: Path) -> float:
    """Seconds of training in the log of a run, or of all runs in a folder; 0 without one."""
    own = run_dir / "metrics.jsonl"
    logs = [own] if own.exists() else run_dir.rglob("metrics.jsonl")
    return sum(line.get("seconds", 0) for log in logs for line in read_log(log)[0])


def logged_mean(run_dir: Path, name: str) -> float | None:
    """Mean of a metric over the log of a run, None if it has none."""
    values = [line[name] for line in read_log(run_dir / "metrics.jsonl")[0] if name in line]
    return sum(values) / len(values) if values else None


def logged_curve(run_dir: Path, name: str) -> list[dict[str, float]]:
    """Means of a metric over steps 1 to 25, then always twice as far: `until` and `mean` of each
    stretch that has any."""
    lines = [line for line in read_log(run_dir / "metrics.jsonl")[0] if name in line]
    found, low, high = [], 0, 25
    while any(line["step"] > low for line in lines):
        if values := [line[name] for line in lines if low < line["step"] <= high]:
            found.append({"until": min(high, lines[-1]["step"]),
                          "mean": sum(values) / len(values)})
        low, high = high, 2 * high
    return found


def seconds_to(run_dir: Path, name: str, enough: float, n: int = 10) -> float | None:
    """Seconds of training until the mean of a metric over n steps reached a value, or None."""
    lines, _ = read_log(run_dir / "metrics.jsonl")
    values = [line.get(name, 0.0) for line in lines]
    reached = (i for i in range(n, len(lines) + 1) if sum(values[i - n : i]) >= n * enough)
    end = next(reached, None)
    return None if end is None else sum(line["seconds"] for line in lines[:end])


def newest(folder: Path) -> checkpoint.Checkpoint | None:
    """The newest checkpoint in a folder that may not exist, as the first process finds it."""
    return parallel.on_first(lambda: checkpoint.newest(folder) if folder.is_dir() else None)


def require_none_foreign(folder: Path, names: Iterable[str]) -> None:
    """Raises ValueError if a folder has some of these files, and no run that they are of."""
    foreign = [] if (folder / "config.json").exists() else [
        name for name in names if (folder / name).exists()]
    require(not foreign, f"out ({folder}) holds {', '.join(foreign)}, and no config.json of a run: "
            "they would be written over; choose another --out")


def resume_point(config: Config, run_dir: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, None to start anew. Raises ValueError if the folder holds a run
    and resume was not asked for (nothing saved is overwritten), or if there is nothing to resume.
    """
    found = newest(run_dir)
    require(not huggingface.is_hf(run_dir), f"out ({run_dir}) holds a config.json that no run "
            "wrote, such as that of a Hugging Face directory; choose another --out")
    if not config.resume:
        require(not found, f"out ({run_dir}) already holds a run; add --resume to go on with it, "
                "or choose another --out")
        texts = Path(config.data.path).resolve()
        kept = {} if of_shards(config) else {"data.cache_dir": config.data.cache_dir}
        for name, folder in {"out": run_dir, **kept}.items():
            own = Path(folder).resolve()
            require(not config.data.path or texts not in (own, *own.parents), f"{name} ({folder}) "
                    f"is or lies in data.path ({config.data.path}), and would be read as text; "
                    f"choose another --{name.replace('_', '-')}")
        require_none_foreign(run_dir, WRITTEN)
        return None
    require(found, f"resume: {run_dir} holds no checkpoint; leave --resume out to start")
    require("config" in found.meta, f"resume: {run_dir} holds an extracted size, which was not "
            "trained there; give it as --init")
    warn(found.warning)
    return found


def require_same(start: checkpoint.Checkpoint, config: Config, corpus_key: str) -> None:
    """Raises ValueError if a run to be resumed was made with other settings, or from other data."""
    theirs, ours = start.meta["config"], shared_settings(config)
    gone = config.init == theirs.get("init") and config.init and not Path(config.init).exists()
    require(not gone, f"resume: init ({config.init}), which {start.path} began with, is gone: its "
            "shape and its figures are needed; put it back")
    different = [name for name in sorted(ours) if theirs.get(name) != ours[name]]
    changes = [f"{name} was {theirs.get(name)}, now {ours[name]}" for name in different[:5]]
    require(not different, f"resume: {start.path} was made with other settings: "
            f"{'; '.join(changes)}; use its settings, or choose another --out")
    require(start.meta["corpus"] == corpus_key,
            "resume: the text or the problems are not what the run was started with (data.path, or "
            "what ships with this Python; data.problems, which differ each time if drawn from a "
            "set); restore them, or choose another --out")


def shared_settings(config: Config) -> dict:
    """The settings that a resumed run must share, flat. Those of the phases before it are among
    them: of the run's base, and of the mixture that some modes go on with."""
    groups = {"model", "data", "pretrain", config.mode}
    if config.mode == "rlvr":
        groups.add("rlp")
    if config.mode != "pretrain":
        groups.add("warmup")
    # accumulate: on fewer processes it makes up for them; baseline: rivals can be added later;
    # text_key: the text itself is compared.
    free = ("cache_dir", "text_key", "checkpoint_every", "log_every", "accumulate", "baseline")
    flat = {"rlp.back": config.rlp.back} if "warmup" in groups else {}
    for name in ("more_steps", "distractors") if config.mode == "cpt" else ():
        flat[f"rlp.{name}"] = getattr(config.rlp, name) or None  # as runs have it that lack it
    flat["lora"] = vars(config.lora) if config.lora.rank else None  # as runs have it that lack it
    for name, value in json.loads(json.dumps(config.to_dict())).items():
        if name in groups:
            flat |= {f"{name}.{k}": v for k, v in value.items() if k not in free}
        elif name in ("mode", "seed", "init"):
            flat[name] = value
    return flat


def prepare_run_dir(config: Config, tokenizer: Tokenizer) -> None:
    """Make the run folder, with settings and tokenizer. Raises ValueError if that fails."""
    run_dir = config.run_dir()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        text = {"command": " ".join(sys.argv), "versions": versions(),
                "warmed": was_warmed(config.init), "config": config.to_dict()}
        write_json(run_dir / "config.json", text)
        if tokenizer.json:  # from files or from the text, which may change
            tokenizer.save(run_dir / "hf")
    except OSError as error:
        raise ValueError(f"out ({run_dir}) cannot be written to: {error.strerror}; choose another "
                         "--out") from error


def load_run(run_dir: Path) -> tuple[HybridLM, Tokenizer, Config]:
    """Model, tokenizer, settings of a finished or interrupted run, on the device of this machine,
    which may be another's. Raises ValueError if there is none."""
    found = newest(run_dir)
    require(found, f"{run_dir} holds no checkpoint; give a run's folder, like runs/rlp-cpu-seed0")
    config = saved_config(run_dir)
    named = kept_tokenizer(config, run_dir)
    config = replace(config, device="auto", data=replace(config.data, tokenizer=named))
    tokenizer = named_tokenizer(named)
    model = build_model(config, tokenizer.n_vocab, pick_device(config), config.seed)
    checkpoint.load_weights(model, found.weights(), found.path)
    return model, tokenizer, config


def load_model(folder: Path) -> tuple[HybridLM, Tokenizer, RLPConfig]:
    """Model, tokenizer and how it thinks, of a run or a Hugging Face directory, else ValueError."""
    if not huggingface.is_hf(folder):
        model, tokenizer, config = load_run(folder)
        return model, tokenizer, config.rlp
    config, tokenizer = resolve(Config(init=str(folder))), FileTokenizer(folder)
    model = build_model(config, tokenizer.n_vocab, pick_device(config), config.seed)
    load_hf_weights(model, folder, tokenizer)
    return model, tokenizer, config.rlp
