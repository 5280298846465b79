"""Text as documents of token ids, split by what is held out: Python's own, your files, or shards.

The default text is the language reference, the docstrings and the sources of the running Python.
What is made of a text is kept in data.cache_dir, under a fingerprint of the text and the settings.
"""

import ast
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from system.config import DataConfig
from system.errors import require
from system.files import fingerprint
from text.computed import computed_examples
from text.documents import Documents, join
from text.held_out import SPLITS, bucket_of, buckets_of, clusters_of
from text.problem_sources import load_families
from text.problems import FAMILIES, Families, Problem, held_out_problems, tokenizer_examples
from text.shards import ShardSet, is_shards, write_cached
from text.sources import input_files, read_texts, require_key_read
from text.tokenizer import CorpusTokenizer, Tokenizer, named_tokenizer


def python_documents() -> Iterator[tuple[str, str]]:
    """(name, text) of the reference topics, and of each standard module's docstrings and source.

    Both documents of a module carry the module's name: they land in the same split.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        docstrings = [ast.get_docstring(node) for node in ast.walk(ast.parse(source))
                      if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        yield f"module {path.stem}", "\n\n".join(d for d in docstrings if d)
        yield f"module {path.stem}", source


@dataclass
class Corpus:
    """The tokenizer, for each split all text documents as token ids, and the problems' families."""

    tokenizer: Tokenizer
    documents: dict[str, Documents]
    held_out_percent: int
    key: str = ""  # fingerprint of the splits' texts and problems, and of the settings
    notes: tuple[str, ...] = ()  # what was skipped, in words
    families: Families = field(default_factory=lambda: FAMILIES)

    def held_out(self, split: str, n_per_family: int, seed: int) -> list[Problem]:
        """Its `held_out_problems`."""
        return held_out_problems(split, n_per_family, seed, self.held_out_percent, self.families)

    @staticmethod
    def load(config: DataConfig) -> "Corpus":
        """The text, or what an earlier run made of it. Raises ValueError for unusable text."""
        families, origin = load_families(config.problems)
        if config.path and is_shards(Path(config.path)):
            return Corpus._of_shards(config, families, origin)
        # 1. Every text once: of copies under two names the first stays, else they could land in
        #    two splits.
        first: dict[str, tuple[str, str]] = {}
        if config.path:
            path = Path(config.path)
            files, notes = input_files(path, "data.path")
            require_key_read(files, config.text_key)
            root = path if path.is_dir() else None
            named_texts = read_texts(files, config.text_key, 2000, root)
        else:
            named_texts, notes = python_documents(), []
        for name, text in named_texts:
            first.setdefault(text.strip(), (name, text))
        named = [pair for stripped, pair in first.items() if stripped]
        n_characters = sum(len(text) for _, text in named)
        require(n_characters >= 20_000, f"data.path ({config.path}) holds {n_characters} "
                "characters; at least 20000 are needed to train and hold out")
        # 2. The splits, by the clusters of the texts.
        percent, texts, cluster = config.held_out_percent, {}, clusters_of(named)
        for split in SPLITS:
            buckets = buckets_of(split, percent)
            texts[split] = [text for name, text in named if bucket_of(cluster[name]) in buckets]
            _require_some(texts[split], split, config, f"; its {len(named)} texts are "
                          f"{len(set(cluster.values()))} clusters that share no passages")
        # 3. What an earlier run kept. Its key has all that the tokens depend on; of a folder with
        #    a tokenizer.json that is the content, which may change under the same name.
        examples = tokenizer_examples(percent, families) + computed_examples(percent)
        tokenizer = None if config.tokenizer == "corpus" else named_tokenizer(config.tokenizer)
        own = tokenizer is not None and tokenizer.json
        source = [tokenizer.json, tokenizer.end] if own else config.tokenizer
        key = fingerprint(
            [texts, examples, source, config.vocab_size, percent, CorpusTokenizer.pattern, *origin])
        file = Path(config.cache_dir) / f"corpus-{key}.npz"
        kept = _load_arrays(file)
        # 4. The tokenizer of the corpus: kept, or trained on the training texts.
        if tokenizer is None:
            tokenizer = (CorpusTokenizer(kept["tokenizer"].item().decode()) if kept else
                         CorpusTokenizer.train(texts["train"] + examples, config.vocab_size))
        # 5. The tokens: kept, or encoded now; END closes every document.
        if not kept:
            kept = {"tokenizer": np.array(tokenizer.json.encode())}
            for split in SPLITS:
                kept[f"{split}_tokens"], kept[f"{split}_starts"] = join(
                    [np.array([*tokenizer.encode(text), tokenizer.end], dtype=np.int32)
                     for text in texts[split]])
            write_cached(file, lambda f: np.savez(f, **kept))
        for split in SPLITS:
            require(np.diff(kept[f"{split}_starts"]).max() > 1, f"data.tokenizer "
                    f"({config.tokenizer}) makes no tokens of the {split} split; give one that "
                    f"knows the letters of data.path ({config.path})")
        if own and (lost := _share_lost(tokenizer, texts["train"])) > 0.01:
            notes += [f"data.tokenizer ({config.tokenizer}) loses {lost:.0%} of the characters"]
        documents = {s: Documents([(kept[f"{s}_tokens"], kept[f"{s}_starts"])]) for s in SPLITS}
        return Corpus(tokenizer, documents, percent, key, tuple(notes), families)

    @staticmethod
    def _of_shards(config: DataConfig, families: Families, origin: list[str]) -> "Corpus":
        """Documents that stay on disk. Every byte is checked once."""
        found, percent = ShardSet(Path(config.path)), config.held_out_percent
        tokenizer = found.open_tokenizer(config.tokenizer)
        found.check_once(Path(config.cache_dir))
        documents = {split: found.documents(buckets_of(split, percent)) for split in SPLITS}
        for split in SPLITS:
            _require_some(documents[split], split, config)
        key = fingerprint([found.key, percent, tokenizer_examples(percent, families), *origin])
        return Corpus(tokenizer, documents, percent, key, families=families)


def _require_some(documents: Documents | list[str], split: str, config: DataConfig,
                  why: str = "") -> None:
    require(len(documents), f"data.path ({config.path}) leaves no document for the {split} split; "
            f"add documents or raise data.held_out_percent{why}; long documents are cut, at blank "
            "lines, where they are plain text (*.txt)")


def _share_lost(tokenizer: Tokenizer, texts: list[str], n: int = 50) -> float:
    """The share of their characters that a tokenizer does not give back, of the first n texts."""
    some = [text[:1000] for text in texts[:n]]
    back = sum(len(tokenizer.decode(tokenizer.encode(text))) for text in some)
    return 1 - back / sum(map(len, some))


def _load_arrays(file: Path) -> dict[str, np.ndarray] | None:
    """What `Corpus.load` kept; None if it is missing or damaged, for it can be made again."""
    names = ["tokenizer", *(f"{s}_{what}" for s in SPLITS for what in ("tokens", "starts"))]
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile):
        return None
