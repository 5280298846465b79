"""Settings of every test, the tiny model that most of them run, and the corpus."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from config import DataConfig, ModelConfig
from data import Corpus
from model import HybridLM

torch.set_num_threads(1)

TINY = {"pattern": "M-M*-", "vocab_size": 12, "d_model": 8, "d_ff": 12, "n_heads": 4, "n_kv_heads": 2, "attn_head_dim": 4,
        "mamba_heads": 4, "mamba_head_dim": 3, "mamba_groups": 2, "d_state": 5, "chunk": 4,
        "tie_embeddings": True}  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    """Random tensors of a test are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def make_model():
    """Builds a tiny fp64 model; keywords change its ModelConfig. Its weights do not depend on `reset_parameters`.

    Vectors (norms, rates, biases) are drawn around 1 and matrices around 0: none is at a value that would hide its use.
    """

    def make(**changes):
        model = HybridLM(ModelConfig(**TINY | changes)).double()
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.data = 0.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype) + (p.dim() == 1)
        return model

    return make


# Property tests draw the same examples on every machine, and a busy machine fails none of them.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("repeatable")


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
