"""Settings of every test, the tiny model that most of them run, the corpus, and what tests of whole runs share."""

import dataclasses
import json
import random
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import train
from model import HybridLM
from system import checkpoint
from system.config import DataConfig, ModelConfig
from text.corpus import Corpus

torch.set_num_threads(1)

TINY = {"pattern": "M-M*-", "vocab_size": 12, "d_model": 8, "d_ff": 12, "n_heads": 4, "n_kv_heads": 2, "attn_head_dim": 4,
        "mamba_heads": 4, "mamba_head_dim": 3, "mamba_groups": 2, "d_state": 5, "chunk": 4,
        "tie_embeddings": True}  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    """Random tensors of a test are the same in every run."""
    torch.manual_seed(0)


def tiny_model(**changes):
    """A tiny fp64 model; keywords change its ModelConfig. Its weights do not depend on `reset_parameters`.

    Vectors (norms, rates, biases) are drawn around 1 and matrices around 0: none is at a value that would hide its use.
    """
    model = HybridLM(ModelConfig(**TINY | changes)).double()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype) + (p.dim() == 1)
    return model


@pytest.fixture
def make_model():
    """`tiny_model`, which a property test calls itself."""
    return tiny_model


# Property tests draw the same examples on every machine, and a busy machine fails none of them.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("repeatable")


def bytes_kept(block, x_BTD, **autocast) -> float:
    """Bytes a token that autograd keeps of a block's pass, weights and their casts to bf16 left out."""
    masters, kept = {p.untyped_storage().data_ptr() for p in block.parameters()}, {}
    casts = {s for p in block.parameters() if p.dim() == 2 for s in (p.shape, p.T.shape)}

    def keep(t):
        at = t.untyped_storage().data_ptr()
        if at not in masters and not (t.dtype == torch.bfloat16 and t.shape in casts):
            kept.setdefault(at, t)
        return t

    low = torch.autocast("cpu", torch.bfloat16, **autocast)
    with low, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        _ = block(x_BTD, None, None)
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / x_BTD[..., 0].numel()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """Where the tokenizer, the corpus and trained bases are kept: made once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def corpus(cache_dir) -> Corpus:
    """The text that ships with Python, with a small vocabulary."""
    return Corpus.load(DataConfig(vocab_size=512, cache_dir=str(cache_dir)))


def paragraphs(n: int, seed: int = 0) -> list[str]:
    """n different paragraphs of a little over 2,000 characters: each becomes a document."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(50)]
    return ["\n".join(" ".join(rng.choices(words, k=10)) for _ in range(34)) + "\n\n" for _ in range(n)]


@pytest.fixture
def text_file(tmp_path) -> Path:
    """A user's own text: twenty documents, just enough for a corpus."""
    file = tmp_path / "text.txt"
    file.write_text("".join(paragraphs(20)))
    return file


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def corpus_read_once(corpus):
    """Reading the text that ships with Python takes seconds; a user's own text is still read."""
    load = Corpus.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Corpus, "load", staticmethod(lambda config: load(config) if config.path else corpus))
        yield


@pytest.fixture(scope="module")
def program(corpus_read_once, cache_dir):
    """`python train.py --preset smoke --out OUT ...`: the exit code."""

    def run(out, *words):
        return train.main(["--preset", "smoke", "--data.cache-dir", str(cache_dir), "--out", str(out), *map(str, words)])

    return run


def plain_logits(model, tokens, banned):
    """Next-token logits [T, V] of one plain pass over the whole sequence, no cache."""
    logits_TV = model.logits(model(torch.tensor([tokens]))[0])[0]
    return logits_TV.index_fill(-1, torch.tensor(banned, dtype=torch.long), -torch.inf)


def plain_logp(model, before, tokens, banned, temperature=1.0):
    """Log-probability of each of the tokens, one after the other, after those before."""
    logits_TV = plain_logits(model, before + tokens, banned)[len(before) - 1 : -1]
    return (logits_TV / temperature).log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def contents(*folders):
    """Every file below the folders."""
    return {p: p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file()}


def summary_of(run_dir):
    return json.loads((run_dir / "summary.json").read_text())


def metrics_of(run_dir):
    """The lines of metrics.jsonl without their times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def weights_of(run_dir):
    """Bytes of every network in the newest checkpoint."""
    return {f.name: f.read_bytes() for f in checkpoint.newest(run_dir).path.glob("*.safetensors")}


def disturb(monkeypatch, mode, at, action):
    """Call `action` when the batch of step `at` of that mode is made."""
    entry = train.MODES[mode]

    def made(corpus, config, step):
        if step == at:
            action()
        return entry.batch(corpus, config, step)

    monkeypatch.setitem(train.MODES, mode, dataclasses.replace(entry, batch=made))


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def die():
    raise RuntimeError("killed")
