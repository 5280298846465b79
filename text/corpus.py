"""Text as documents of token ids: what ships with Python, files of your own, or shards; held-out
documents kept apart.

The default text is the language reference, the docstrings and the sources of the running Python.
"""

import ast
import random
import re
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from system.config import DataConfig
from system.errors import require
from system.files import fingerprint
from text.held_out import N_BUCKETS, SPLITS, bucket_of, split_of
from text.problems import FILLER, draw_problem
from text.shards import Documents, ShardSet, is_shards
from text.tokenizer import (
    TOKEN_PATTERN,
    CorpusTokenizer,
    FileTokenizer,
    Tokenizer,
    named_tokenizer,
    train_tokenizer,
)

# --------------------------------------------------------------------------------------------- text


def python_documents() -> Iterator[tuple[str, str]]:
    """(name, text) of the reference topics, and of each standard module: its docstrings, and its
    source.

    Both documents of a module carry the module's name: they land in the same split.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        nodes = [n
                 for n in ast.walk(ast.parse(source))
                 if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        yield (f"module {path.stem}",
               "\n\n".join(d for d in (ast.get_docstring(n) for n in nodes) if d))
        yield f"module {path.stem}", source


def user_documents(path: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of a UTF-8 file, cut at blank lines into pieces of about 2,000 characters, or of
    a folder's files.

    Raises ValueError for a path that does not exist, or a file that is empty or not UTF-8 text.
    """
    require(
        path.exists(),
        f"data.path ({path}) does not exist; give a UTF-8 text file, a folder of them, or nothing")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    require(files, f"data.path ({path}) is a folder without files; put UTF-8 text files into it")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data.path: {file} is not UTF-8 text (byte {error.start}); convert it or leave it out"
            ) from None
        require(
            "\0" not in text, f"data.path: {file} holds zero bytes, so it is not text; leave it out"
        )
        require(text.strip(), f"data.path: {file} is empty; leave it out or give another file")
        pieces, piece = [], ""
        for paragraph in re.split(r"(?<=\n)\s*\n", text):
            piece += paragraph + "\n"
            if len(piece) >= 2000:
                pieces.append(piece)
                piece = ""
        pieces.append(piece)
        yield from ((f"{file.name} {i}", p) for i, p in enumerate(pieces) if p.strip())


def shard_tokenizer(
    name: str, vocab_size: int, texts: Iterable[str], out: Path) -> tuple[Tokenizer, dict]:
    """The tokenizer to build shards with, kept in their folder, and what shards.json says of it.

    "corpus" is trained on problems and on the first 20 million characters of texts that no setting
    holds out.
    """
    if name == "corpus":
        sample, n = [], 0
        for text in texts:
            if n >= 20_000_000:
                break
            if bucket_of(text) >= N_BUCKETS // 2:  # at most 25 % are held out in each of two splits
                sample.append(text)
                n += len(text)
        ranks = train_tokenizer(sample + _example_problems(5), vocab_size)
        tokenizer = CorpusTokenizer(ranks)
    else:
        tokenizer = named_tokenizer(name)
    if tokenizer.json:
        tokenizer.save(out / "hf")
    return tokenizer, {"source": name, "n_vocab": tokenizer.n_vocab,
                       "fingerprint": tokenizer.fingerprint}


def tokenizer_of_shards(found: ShardSet, name: str) -> Tokenizer:
    """The tokenizer that data.tokenizer names for shards; "corpus" is their own. Raises ValueError
    if it is another one."""
    source, kept = found.tokenizer["source"], found.folder / "hf"
    if name != "corpus":
        tokenizer = named_tokenizer(name)
    elif kept.is_dir() or source == "corpus":
        tokenizer = FileTokenizer(kept)
    else:
        tokenizer = named_tokenizer(source)
    theirs, folder = found.tokenizer["fingerprint"], found.folder
    require(
        name == "corpus" or tokenizer.fingerprint == theirs,
        f"data.tokenizer ({name}) is not the one that {folder} was built with ({source}, fingerprint {theirs}): tokens "
        "would be read as other text; build again with this one, or leave data.tokenizer and init out to use that one",
    )
    require(
        tokenizer.fingerprint == theirs,
        f"the tokenizer in {folder} is not the one that it was built with (fingerprint {theirs}): it is damaged; copy it "
        "again from where it was built, or build again",
    )
    return tokenizer


# ------------------------------------------------------------------------------------------- corpus


@dataclass
class Corpus:
    """The tokenizer and, for each split, all text documents as token ids."""

    tokenizer: Tokenizer
    documents: dict[str, Sequence[np.ndarray] | Documents]
    held_out_percent: int
    key: str = ""  # fingerprint of the text and of the settings that it was read with

    @staticmethod
    def load(config: DataConfig) -> "Corpus":
        """Read the text, or what an earlier run made of the same text and settings. Raises
        ValueError for unusable text."""
        if config.path and is_shards(Path(config.path)):
            return Corpus._of_shards(config)
        first: dict[
            str, tuple[str, str]
        ] = {}  # a text under two names keeps the first: copies must not land in two splits
        for name, text in user_documents(Path(config.path)) if config.path else python_documents():
            first.setdefault(text.strip(), (name, text))
        named = [pair for stripped, pair in first.items() if stripped]
        n_characters = sum(len(text) for _, text in named)
        require(
            n_characters >= 20_000,
            f"data.path ({config.path}) holds {n_characters} characters; at least 20000 are needed to train and hold out",
        )
        examples = _example_problems(config.held_out_percent)
        tokenizer = None if config.tokenizer == "corpus" else named_tokenizer(config.tokenizer)
        is_file = tokenizer is not None and tokenizer.json
        source = (
            [tokenizer.json, tokenizer.end] if is_file else config.tokenizer
        )  # content: a folder may change
        key = fingerprint(
            [named, examples, source, config.vocab_size, config.held_out_percent, TOKEN_PATTERN])
        file = Path(config.cache_dir) / f"corpus-{key}.npz"
        cached = _load_arrays(file)
        if tokenizer is None:
            if cached is None:
                train_texts = [text
                               for name, text in named
                               if split_of(name, config.held_out_percent) == "train"]
                ranks = train_tokenizer(train_texts + examples, config.vocab_size)
            else:
                ranks = dict(
                    zip(cached["ranks"].tolist(), range(len(cached["ranks"])), strict=True))
            tokenizer = CorpusTokenizer(ranks)
        if cached is None:
            arrays = {"ranks": np.array(list(ranks) if config.tokenizer == "corpus" else [])}
            for split in SPLITS:
                kept = [
                    text for name, text in named if split_of(name, config.held_out_percent) == split
                ]
                require(kept,
                        f"data.path ({config.path}) leaves no document for the {split} split; "
                        "add documents or raise data.held_out_percent")
                encoded = [np.array([*tokenizer.encode(text), tokenizer.end], dtype=np.int32)
                           for text in kept]
                arrays[f"{split}_tokens"] = np.concatenate(encoded)
                arrays[f"{split}_lengths"] = np.array([len(e) for e in encoded])
            _save_arrays(file, arrays)
            cached = arrays
        documents = {}
        for split in SPLITS:
            ends = np.cumsum(cached[f"{split}_lengths"])
            documents[split] = np.split(cached[f"{split}_tokens"], ends[:-1])
        return Corpus(tokenizer, documents, config.held_out_percent, key)

    @staticmethod
    def _of_shards(config: DataConfig) -> "Corpus":
        """Documents that stay on disk. Every byte is checked once."""
        found, percent = ShardSet(Path(config.path)), config.held_out_percent
        tokenizer = tokenizer_of_shards(found, config.tokenizer)
        found.check_once(Path(config.cache_dir))
        ranges = {"train": (2 * percent, N_BUCKETS), "val": (0, percent),
                  "test": (percent, 2 * percent)}  # as `split_of`
        documents = {split: found.documents(*ranges[split]) for split in SPLITS}
        for split in SPLITS:
            require(len(documents[split]),
                    f"data.path ({config.path}) leaves no document for the {split} split; "
                    "add documents or raise data.held_out_percent")
        return Corpus(tokenizer, documents, percent, fingerprint([found.key, percent]))

    def text_window(self, rng: random.Random, split: str, length: int) -> np.ndarray:
        """Up to `length` tokens in a row from one document, documents chosen in proportion to their
        length."""
        if isinstance(self.documents[split], Documents):
            return self.documents[split].window(rng, length)
        lengths = self._lengths(split)
        i = int(np.searchsorted(lengths, rng.randrange(int(lengths[-1])), side="right"))
        document = self.documents[split][i]
        start = rng.randrange(max(1, len(document) - length + 1))
        return document[start : start + length]

    def _lengths(self, split: str) -> np.ndarray:
        if not hasattr(self, "_cumulative"):
            self._cumulative = {
                s: np.cumsum([len(d) for d in docs]) for s, docs in self.documents.items()}
        return self._cumulative[split]


def _example_problems(held_out_percent: int) -> list[str]:
    """Enough training problems for their words to become tokens."""
    rng = random.Random("tokenizer")
    problems = [draw_problem(rng, "train", held_out_percent) for _ in range(8000)]
    return [p.prompt + p.thought + p.answer for p in problems] + list(FILLER) * 200


def _load_arrays(file: Path) -> dict[str, np.ndarray] | None:
    """What `_save_arrays` wrote; None if it is missing or damaged, for it can be made again."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile):
        return None


def _save_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the file whole or not at all. Raises ValueError if its folder cannot be written to."""
    partial = file.with_suffix(f".{random.randrange(10**9)}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as f:
            np.savez(f, **arrays)
        partial.replace(file)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir ({file.parent}) cannot be written to: {error.strerror}; choose another --data.cache-dir"
        ) from error
