"""Train: parse the settings, build the parts, run the one loop, measure, report.

    python train.py --mode rlp                       train a small base, run RLP on it, measure it (CPU, minutes)
    python train.py --mode pretrain                  the base alone
    python train.py --mode elastic                   make the base elastic: one model that holds smaller ones
    python train.py --mode cpt                       the rival: the base's own pretraining goes on, about as long as RLP
    python train.py --mode rlp --preset smoke        every part in seconds
    python train.py --mode rlp --rlp.positions random --out runs/random
    python train.py --mode rlp --init Qwen3-1.7B-Base --rlp.horizon 2        from a Hugging Face directory
    torchrun --nproc-per-node 8 train.py --mode rlp                          on eight GPUs (parallel.py)

How to read: `main`, then `run`. The training loop is `loop.fit`; what an objective gives to it is
in objective.py.
"""

import dataclasses
import json
import resource
import sys
import time
import traceback
from pathlib import Path

import torch
import tyro
from rich.markup import escape

import elastic
import evals
import importance
import kernels
import nested
import routers
from evals import evaluate_base, evaluate_both
from model import HybridLM
from rlp import RLP
from system import checkpoint, huggingface, parallel
from system.config import Config
from system.costs import count_parameters
from system.errors import path_and_reason, require
from system.files import fingerprint
from system.loop import check_rows, console, fit, split_batch
from system.objective import NextToken
from system.presets import PAPERS, PRESETS
from system.rundir import (
    alone_in,
    build_model,
    check_text,
    load_hf_weights,
    logged_seconds,
    newest,
    pick_device,
    prepare_run_dir,
    resolve,
    resume_point,
    run_meta,
    versions,
    warn,
)
from text.batches import (
    cpt_batch,
    elastic_batch,
    mixture,
    pretrain_batch,
    problem_tokens,
    rlp_batch,
)
from text.corpus import Corpus
from text.problems import held_out_problems
from text.shards import ShardSet, is_shards
from text.tokenizer import Tokenizer, named_tokenizer
from thoughts import show_thoughts
from views import estimate, plots, tables


def base_weights(config: Config, corpus: Corpus, model: HybridLM) -> dict:
    """Load the base into the model: from `init`, else from the cache, else by pretraining it now.

    Returns, for summary.json: its folder, whether it was there already, and the seconds that its
    training steps took.
    """
    was_cached = True
    if config.init and huggingface.is_hf(Path(config.init)):
        load_hf_weights(model, Path(config.init), corpus.tokenizer)
        return {"base_dir": config.init, "base_was_cached": True, "base_train_s": 0.0}
    if config.init:
        folder = Path(config.init)
        found = newest(folder)
        require(
            found,
            f"init ({config.init}) holds no checkpoint; give the run folder of an earlier run, or a Hugging Face directory",
        )
    else:
        key = fingerprint([config.base_fingerprint(), corpus.key])
        folder = Path(config.data.cache_dir) / f"base-{key}"

        def is_trained(found: checkpoint.Checkpoint | None) -> bool:
            return found is not None and found.meta["step"] >= config.pretrain.steps

        found = newest(folder)
        if not is_trained(found):
            with alone_in(folder):
                found = newest(folder)  # another program may have trained it meanwhile
                if not is_trained(found):
                    was_cached = False
                    console.print(f"training the base once; it is kept in {escape(str(folder))}")
                    train_base(dataclasses.replace(config, mode="pretrain", out=str(folder)),
                               corpus, model, found)
                    found = newest(folder)
    warn(found.warning)
    checkpoint.load_weights(model, found.tensors("model"), found.path)
    return {"base_dir": str(folder), "base_was_cached": was_cached,
            "base_train_s": logged_seconds(folder)}


def train_base(
    config: Config, corpus: Corpus, model: HybridLM, start: checkpoint.Checkpoint | None) -> None:
    """Pretraining, into config.out."""
    run_dir = parallel.on_first(lambda: prepare_run_dir(config, corpus.tokenizer))
    fit(model, NextToken(), lambda step: pretrain_batch(corpus, config, step), config.pretrain,
        run_dir, config.seed, run_meta(config, corpus), "pretrain", start)


def run(config: Config) -> dict:
    """A whole run: data, base, training, held-out figures, plots. Returns what summary.json holds.

    Of several processes the first measures, alone; the others return an empty dict after training.
    """
    began = time.perf_counter()
    config = resolve(config.check())
    if config.dry_run:
        return dry_run(config)
    kernels.use(config.kernels)
    device = parallel.start(config.parallel, pick_device(config))
    console.quiet = not parallel.is_first()
    check_rows(getattr(config, config.mode), config.mode)
    run_dir = config.run_dir()
    start = resume_point(config, run_dir)
    corpus = parallel.in_turn(lambda: Corpus.load(config.data))
    check_text(start, corpus)
    model = build_model(config, corpus.tokenizer.n_vocab, device, config.seed)
    if (
        config.mode == "elastic"
    ):  # refuse choices and budgets that do not fit before anything is written or trained
        routers.build_router(model.config, config.elastic, None, device)
        if config.elastic.score_d_model == "pca":
            nested.require_untied(model.config)
    parallel.on_first(lambda: prepare_run_dir(config, corpus.tokenizer))
    warn_of_answers(corpus.tokenizer, config)
    console.print(
        f"{config.mode}: {count_parameters(model):,} parameters, {config.model.pattern}, on {device}"
        f"{f' and {parallel.team.world - 1} more' if parallel.team.world > 1 else ''}; "
        f"results in {escape(str(run_dir))}"
    )
    if config.mode == "pretrain":
        if config.init:
            base_weights(config, corpus, model)
        train_base(config, corpus, model, start)
        if not parallel.part():
            return {}
        results = evaluate_base(model, corpus, config)
    elif config.mode == "elastic":
        base_facts, found = (base_weights(config, corpus, model),
                             run_elastic(model, corpus, config, run_dir, start))
        if not found:
            return {}
        results = {**base_facts, **found}
    else:
        base_facts = base_weights(config, corpus, model)
        objective = RLP(config.rlp, corpus.tokenizer) if config.mode == "rlp" else NextToken()
        make_batch, settings = {"rlp": (rlp_batch, config.rlp), "cpt": (cpt_batch, config.cpt)}[
            config.mode]
        fit(model, objective, lambda step: make_batch(corpus, config, step), settings, run_dir,
            config.seed, run_meta(config, corpus), config.mode, start)
        if not parallel.part():
            return {}
        base = build_model(config, corpus.tokenizer.n_vocab, device, config.seed).requires_grad_(
            False)
        base_weights(config, corpus, base)  # from disk: training had no room to spare for it
        results = {
            **base_facts,
            **evaluate_both(model, base, objective.networks().get("teacher"), corpus, config)}
        write_samples({"base": base, config.mode: model}, corpus, config, run_dir)
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
    plots.plot_run(run_dir)
    tables.print_summary(summary, console)
    samples = "samples.txt, " if (run_dir / "samples.txt").exists() else ""
    console.print(
        f"wrote {escape(str(run_dir))}/summary.json, metrics.jsonl, {samples}checkpoint/ and plots")
    return summary


def run_elastic(model: HybridLM, corpus: Corpus, config: Config, run_dir: Path,
                start: checkpoint.Checkpoint | None) -> dict:
    """Make the parent elastic, train the rivals asked for, and measure all of them on the same
    held-out sequences.

    Returns an empty dict on all processes but the first.
    """
    c, device = config.elastic, next(model.parameters()).device
    objective = train_elastic(model, corpus, config, run_dir, start)
    parent, router = objective.teacher, objective.router
    widths = {b: router.choose(b) for b in c.budgets}
    families = {"elastic": [nested.submodel(model, w) for w in widths.values()]}
    if objective.stage1 is not None:
        families["stage1"] = [nested.submodel(objective.stage1, w) for w in widths.values()]
    earlier = run_dir / "summary.json"  # a resumed run keeps the rivals that it had
    had = json.loads(earlier.read_text())["baselines"] if config.resume and earlier.exists() else {}
    rivals = list(dict.fromkeys([*had, *c.baseline]))
    for name in rivals:
        console.print(f"baseline {name}")
        families[name] = train_rival(
            name, parent, widths, corpus, config, run_dir / "baselines" / name)
    if not parallel.part():
        return {}
    sizes = [(name, b, m)
             for name, family in families.items()
             for b, m in zip(c.budgets, family, strict=True)]
    # the parent is compared with itself, the family with the parent, everything else with the
    # family at its budget
    references = [0, *(0 if name == "elastic" else 1 + c.budgets.index(b) for name, b, _ in sizes)]
    teacher, *figures = evals.evaluate_sizes(
        [parent, *(m for _, _, m in sizes)], references, corpus, config)
    entries: dict[str, list[dict]] = {}
    for (name, b, size), found in zip(sizes, figures, strict=True):
        facts = {"budget": b, "fraction": router.fraction(b),
                 "target": router.fraction(b) * router.full_cost}
        facts["cost"] = routers.total_cost(size.config, c, device)
        facts["widths"] = dataclasses.asdict(
            widths[b] if name == "elastic" else nested.full_widths(size.config))
        entries.setdefault(name, []).append({**facts, **evals.size_facts(size, config), **found})
    write_samples({f"{b:g}": m for b, m in zip(c.budgets, families["elastic"], strict=True)},
                  corpus, config, run_dir)
    return {
        "teacher": {
            "pattern": parent.config.pattern,
            "widths": dataclasses.asdict(nested.full_widths(parent.config)),
            **evals.size_facts(parent, config),
            **teacher,
        },
        "budgets": entries.pop("elastic"),
        "stage1": entries.pop("stage1", []),
        "baselines": entries,
        "train_s": {
            name: logged_seconds(run_dir / ("" if name == "elastic" else f"baselines/{name}"))
            for name in ("elastic", *rivals)},
        "memory": evals.family_bytes(model, router, families["elastic"]),
        "n_tokens": c.n_tokens(),
    }


def train_elastic(model: HybridLM, corpus: Corpus, config: Config, run_dir: Path,
                  start: checkpoint.Checkpoint | None) -> elastic.Elastic:
    """Rank and order the parent's units, in place, and train it with its routers. Returns the
    objective."""
    c, parent = config.elastic, parallel.frozen_copy(model)
    ranking = order_parent(model, corpus, config)
    torch.manual_seed(config.seed)
    router = routers.build_router(model.config, c, ranking.depth, next(model.parameters()).device)
    objective = elastic.Elastic(c, router, parent)
    run_dir.mkdir(parents=True, exist_ok=True)
    fit(model, objective, lambda step: elastic_batch(corpus, config, step), c, run_dir, config.seed,
        run_meta(config, corpus), "elastic", start)
    return objective


def order_parent(model: HybridLM, corpus: Corpus, config: Config) -> importance.Ranking:
    """Rank the parent's units on training sequences that no step will see, and order its weights,
    in place."""
    c = config.elastic
    batch = evals.to_device(mixture(corpus, config, 10**6, c.calibration_rows, c.seq_len), model)
    calibration = split_batch(
        batch, -(-c.calibration_rows // 8))  # in pieces: memory does not grow with their number
    ranking = parallel.on_first(
        lambda: importance.rank(model, calibration, c, config.seed)
    )  # axes may differ in their signs
    importance.order_weights(model, ranking)
    return ranking


def train_rival(name: str, parent: HybridLM, widths: dict[float, nested.Widths], corpus: Corpus,
                config: Config, run_dir: Path) -> list[HybridLM]:
    """The models of a baseline (see `elastic.baseline`), one for each budget; where `resume` is
    set, from what is there."""
    c = config.elastic
    scores = [f.name for f in dataclasses.fields(c) if f.name.startswith("score_")]
    family = {"random-order": dict.fromkeys(scores, "random"), "fixed": {"choose": "fixed"},
              "uniform": {"long_weights": (1.0,) * len(c.budgets)}}
    model = parallel.frozen_copy(parent).requires_grad_(True)
    if name in family:
        changed = dataclasses.replace(config, elastic=dataclasses.replace(c, **family[name]))
        objective = train_elastic(
            model, corpus, changed, run_dir, newest(run_dir) if config.resume else None)
        return [nested.submodel(model, objective.router.choose(b)) for b in c.budgets]
    order_parent(model, corpus, config)
    changed = {"steps": c.steps // len(c.budgets) if name == "separate" else c.steps,
               "budgets": (1.0,), "long_weights": (1.0,)}
    if name == "scratch":
        changed |= {"kl": 0.0, "ce": 1.0}
    alone = dataclasses.replace(config, elastic=dataclasses.replace(c, **changed))
    sizes = {b: nested.submodel(model, w) for b, w in widths.items()}
    return [train_alone(size, parent, name, corpus, alone, run_dir / f"{b:g}")
            for b, size in sizes.items()]


def train_alone(
    size: HybridLM, parent: HybridLM, name: str, corpus: Corpus, config: Config, run_dir: Path
) -> HybridLM:
    """One size by itself, in weights of its own: distilled from the parent, or from scratch on the
    text alone."""
    size = parallel.frozen_copy(size).requires_grad_(True)
    if name == "scratch":
        torch.manual_seed(config.seed)
        size = HybridLM(size.config).to(next(parent.parameters()).device)
    objective = elastic.Distillation(config.elastic, parent)
    run_dir.mkdir(parents=True, exist_ok=True)
    fit(size, objective, lambda step: elastic_batch(corpus, config, step), config.elastic, run_dir,
        config.seed, run_meta(config, corpus), "elastic",
        newest(run_dir) if config.resume else None)
    return size.requires_grad_(False)


def write_samples(
    networks: dict[str, HybridLM], corpus: Corpus, config: Config, run_dir: Path) -> None:
    """samples.txt: two held-out problems of each family, with a thought and an answer of each
    network."""
    problems = held_out_problems("test", 2, config.seed, corpus.held_out_percent)
    lines = []
    for problem in problems:
        lines.append(f"[{problem.family}] {problem.prompt}   (right:{problem.answer})")
        for name, network in networks.items():
            c = config.rlp
            (text,) = show_thoughts(network, corpus.tokenizer, [problem.prompt], c.thought_len,
                                    c.temperature, config.seed, before=c.prompt)
            lines.append(f"  {name:>4}: {text}")
    (run_dir / "samples.txt").write_text("\n".join(lines) + "\n")


def warn_of_answers(tokenizer: Tokenizer, config: Config) -> None:
    """Say where a tokenizer does not suit the problems."""
    problems = held_out_problems("train", 4, config.seed, config.data.held_out_percent)
    longest = max(len(problem_tokens(tokenizer, p)[1]) for p in problems) - 1
    if longest > config.rlp.horizon:
        warn(
            f"answers take up to {longest} tokens of this tokenizer, and rlp.horizon ({config.rlp.horizon}) looks at the "
            f"first; with --rlp.horizon {longest} accuracy and reward are those of the whole answer"
        )


def dry_run(config: Config) -> dict:
    """Print the resolved settings and what the run would take; train nothing, load nothing but a
    tokenizer.json.

    Where model.vocab_size is 0 and data.tokenizer is "corpus", the vocabulary counts as full: a
    short text makes a smaller one. Returns what is printed, see estimate.py.
    """
    n_vocab, name = config.model.vocab_size, config.data.tokenizer
    if n_vocab == 0 and name == "corpus" and config.data.path and is_shards(Path(config.data.path)):
        n_vocab = ShardSet(Path(config.data.path)).tokenizer["n_vocab"]
    elif n_vocab == 0:
        n_vocab = config.data.vocab_size if name == "corpus" else named_tokenizer(name).n_vocab
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=n_vocab))
    if config.init and not Path(config.init).is_dir():
        warn(f"init ({config.init}) is not here: the shape is that of model.*")
    console.print_json(json.dumps(config.to_dict()))
    facts = estimate.facts(config)
    tables.print_estimate(facts, console)
    return facts


def peak_memory_gib(device: torch.device) -> float:
    """The largest memory so far: of the GPU if there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**30 if sys.platform == "darwin" else 2**20)


def parse(argv: list[str]) -> Config:
    """Settings from the command line, over those of the preset. Raises ValueError for an unknown
    preset."""
    name = "cpu"
    for i, word in enumerate(argv):
        if word == "--preset" and i + 1 < len(argv):
            name = argv[i + 1]
        elif word.startswith("--preset="):
            name = word.split("=", 1)[1]
    known = PRESETS | PAPERS
    require(name in known, f"preset ({name!r}) is unknown; choose one of {', '.join(known)}")
    return tyro.cli(Config, default=known[name], args=argv, prog="train.py", description=__doc__)


def main(argv: list[str] | None = None) -> int:
    """The program: 0 for success, 1 for a run that broke off, 2 for unusable settings, 130 after
    Ctrl-C or SIGTERM."""
    config = None
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        run(config)
    except ValueError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return 2
    except (KeyboardInterrupt, FloatingPointError) as stop:
        console.print(f"[yellow]{escape(str(stop)) or 'stopped'}[/yellow]", soft_wrap=True)
        return 130 if isinstance(stop, KeyboardInterrupt) else 1
    except OSError as error:
        console.quiet = False
        console.print(
            f"[red]error:[/red] {escape(path_and_reason(error))}; mend that, or give another path; what was "
            "saved goes on with --resume",
            soft_wrap=True,
        )
        return parallel.leave(1)
    except (RuntimeError, MemoryError) as error:
        message = config and broke_off(error, config)
        if not message and parallel.team.world == 1:
            raise
        message = (
            message or traceback.format_exc())  # the others may wait for this process: no clean-up
        console.quiet = False  # any process may be the one that knows
        console.print(f"[red]{escape(message)}[/red]", soft_wrap=True)
        return parallel.leave(1)
    finally:
        parallel.stop()
    return 0


def broke_off(error: Exception, config: Config) -> str:
    """What to say of a run that ran out of memory or lost a process, and how to go on; '' for any
    other error."""
    who = f"process {parallel.team.rank}: " if parallel.team.world > 1 else ""
    first_line = str(error).strip().split("\n")[0][:200]
    is_saved = any((config.run_dir() / "checkpoint").glob("step_*[0-9]"))
    how = "with --resume" if is_saved else "with the same command"
    go_on = (f"what was saved in {config.run_dir()} stays usable"
             if is_saved
             else "no step of this run was saved yet")
    if isinstance(
        error, torch.OutOfMemoryError | MemoryError
    ) or "DefaultCPUAllocator: can't allocate" in str(error):
        return (
            f"{who}out of memory ({first_line}); {go_on}; go on {how} and a larger --{config.mode}.accumulate (while the "
            "base trains: --pretrain.accumulate), more processes, or --parallel.activation-checkpointing; a smaller "
            f"--{config.mode}.batch is another run, with another --out"
        )
    if parallel.is_lost(error):
        return f"{who}another process was lost ({first_line}); {go_on}; go on {how}, on any number of processes"
    return ""


if __name__ == "__main__":
    sys.exit(parallel.leave(main()))
