"""What the model reads: real text, reasoning problems, a tokenizer trained on both, and batches that can be resumed.

Text: the language reference, the docstrings and the sources of the running Python, or any UTF-8 files, or shards of tokens
(`data.path`; see shards.py).
Problems: four generated families whose answers need several steps in a row, each with a worked thought:

    chain    Let k = 3. Let b = k + 4. Let m = b - 6. Value of m?     k 3, b +4 7, m -6 1
    word     Tom has 3 apples. On Monday Tom buys 4. ...              start 3, Monday +4 7
    lookup   Ann calls Bob. Eve calls Ann. ... 2 calls from Eve?      1 Ann 2 Bob
    sum      Tens digit of 47 + 85 + 36?                              7 +5 12 +6 18, 1 +4 5 +8 13 +3 16

A document is a question, sometimes a thought between the think tags, and the answer. `pretrain_batch` mixes worked
thoughts with useless ones, so that the base thinks badly, as a real base does. RLP never sees a written thought.

Held out: documents and problems are dealt to train, val and test by a checksum of their name or question, so no problem
and no document can be on two sides; files of your own are cut into documents of about 2,000 characters. Every batch is
a function of (seed, step): resuming needs no state.
"""

import ast
import dataclasses
import itertools
import json
import random
import re
import sysconfig
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from config import Config, DataConfig, RLPConfig, fingerprint, require
from shards import N_BUCKETS, Documents, ShardSet, bucket_of, is_shards

END, THINK, CLOSE = "<|endoftext|>", "<think>", "</think>"
# A word, a digit or a run of signs, each with at most one space before it: digits stay single, so sums can be learned.
TOKEN_PATTERN = r"""'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
SPLITS = ("train", "val", "test")


# ------------------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """A question with one right answer, and the steps that lead to it."""

    family: str
    question: str
    steps: tuple[str, ...]
    answer: str

    @property
    def prompt(self) -> str:
        """What stands before the answer; the next token is the answer's first."""
        return f"{self.question}\nAnswer:"

    @property
    def thought(self) -> str:
        """The worked thought."""
        return "".join(self.steps)


NAMES = ("Ann", "Bob", "Eve", "Tom", "Kim", "Max", "Sue", "Leo", "Zoe", "Ian", "Amy", "Dan")
THINGS = ("apples", "books", "coins", "cards", "shells", "stamps")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
GAINS = ("buys", "finds", "gets")
LOSSES = ("sells", "loses", "gives")
LETTERS = "abcdefghijkmnpqrstuvwxyz"


def chain_problem(rng: random.Random) -> Problem:
    """Variables defined one from another; every sum counts modulo 10, so that digits suffice."""
    names = rng.sample(LETTERS, rng.randint(3, 5))
    value = rng.randrange(10)
    lines, steps = [f"Modulo 10: {names[0]} = {value}."], [f" {names[0]} {value}"]
    for before, name in itertools.pairwise(names):
        sign, operand = rng.choice("+-"), rng.randint(1, 9)
        value = (value + operand if sign == "+" else value - operand) % 10
        lines.append(f"{before} to {name} {sign} {operand}.")
        steps.append(f" {name} {sign} {operand} {value}")
    return Problem("chain", f"{' '.join(lines)} Value of {names[-1]}?", tuple(steps), f" {value}")


def word_problem(rng: random.Random) -> Problem:
    """A stock of things that changes from day to day and stays within 0 to 9."""
    name, thing, value = rng.choice(NAMES), rng.choice(THINGS), rng.randrange(10)
    lines, steps = [f"Count: {name} has {value} {thing}."], [f" start {value}"]
    for day in DAYS[: rng.randint(2, 5)]:
        new = rng.choice([n for n in range(10) if n != value])
        sign, verb = ("+", rng.choice(GAINS)) if new > value else ("-", rng.choice(LOSSES))
        lines.append(f"On {day} {name} {verb} {abs(new - value)}.")
        steps.append(f" {day} {sign}{abs(new - value)} {new}")
        value = new
    return Problem("word", f"{' '.join(lines)} How many {thing} has {name}?", tuple(steps), f" {value}")


def lookup_problem(rng: random.Random) -> Problem:
    """Who calls whom, in one ring; follow it some steps from a start."""
    ring = rng.sample(NAMES, rng.randint(5, 7))
    hops = rng.randint(2, 4)
    calls = [f"{a} calls {b}." for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
    rng.shuffle(calls)
    steps = tuple(f" {i} {ring[i - 1]} calls {ring[i]}" for i in range(1, hops + 1))
    return Problem("lookup", f"Ring: {' '.join(calls)} Start at {ring[0]}, {hops} calls on?", steps, f" {ring[hops]}")


def sum_problem(rng: random.Random) -> Problem:
    """The tens digit of a sum of two-digit numbers: the units first, for their carry."""
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(2, 4))]
    total = numbers[0] % 10
    steps = [f" {total}"]
    for n in numbers[1:]:
        total += n % 10
        steps.append(f" +{n % 10} {total}")
    total //= 10
    steps.append(f", {total}")
    for n in numbers:
        total += n // 10
        steps.append(f" +{n // 10} {total}")
    question = f"Tens digit of {' + '.join(map(str, numbers))}?"
    return Problem("sum", question, tuple(steps), f" {total % 10}")


FAMILIES: dict[str, Callable[[random.Random], Problem]] = {
    "lookup": lookup_problem,
    "chain": chain_problem,
    "word": word_problem,
    "sum": sum_problem,
}
FILLER = (
    " Let me think.", " Hmm.", " This looks easy.", " I am not sure.", " It could be anything.", " One moment.",
    " Well, well.", " A good question.", " Let us see what comes next.", " I would guess.",
)  # fmt: skip


def draw_problem(rng: random.Random, split: str, held_out_percent: int, family: str | None = None) -> Problem:
    """A random problem of a split: drawn again until its checksum says so."""
    make = FAMILIES[family or rng.choice(list(FAMILIES))]
    while True:
        problem = make(rng)
        if split_of(problem.question, held_out_percent) == split:
            return problem


def held_out_problems(split: str, n_per_family: int, seed: int, held_out_percent: int) -> list[Problem]:
    """n different problems of each family, the same for every run with this seed."""
    problems = []
    for family in FAMILIES:
        rng = random.Random(f"problems-{split}-{family}-{seed}")
        found: dict[str, Problem] = {}
        while len(found) < n_per_family:
            problem = draw_problem(rng, split, held_out_percent, family)
            found[problem.question] = problem
        problems += found.values()
    return problems


def thought_for(problem: Problem, rng: random.Random, worked: float) -> str:
    """A worked thought with probability `worked`; otherwise, evenly, one that stops half-way, or filler."""
    if rng.random() < worked:
        return problem.thought
    if rng.random() < 0.5:
        return "".join(problem.steps[: rng.randint(1, len(problem.steps) - 1)])
    return filler(rng)


def filler(rng: random.Random) -> str:
    """A thought that helps nobody."""
    return "".join(rng.sample(FILLER, rng.randint(1, 2)))


def split_of(name: str, held_out_percent: int) -> str:
    """`train`, `val` or `test`, by the checksum of a document's name or a problem's question."""
    bucket = zlib.crc32(name.encode()) % 100
    return "val" if bucket < held_out_percent else "test" if bucket < 2 * held_out_percent else "train"


# ----------------------------------------------------------------------------------------------------------- text


def python_documents() -> Iterator[tuple[str, str]]:
    """(name, text) of the reference topics, and of each standard module: its docstrings, and its source.

    Both documents of a module carry the module's name: they land in the same split.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        yield f"module {path.stem}", "\n\n".join(d for d in (ast.get_docstring(n) for n in nodes) if d)
        yield f"module {path.stem}", source


def user_documents(path: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of a UTF-8 file, cut at blank lines into pieces of about 2,000 characters, or of a folder's files.

    Raises ValueError for a path that does not exist, or a file that is empty or not UTF-8 text.
    """
    require(path.exists(), f"data.path ({path}) does not exist; give a UTF-8 text file, a folder of them, or nothing")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    require(files, f"data.path ({path}) is a folder without files; put UTF-8 text files into it")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data.path: {file} is not UTF-8 text (byte {error.start}); convert it or leave it out"
            ) from None
        require("\0" not in text, f"data.path: {file} holds zero bytes, so it is not text; leave it out")
        require(text.strip(), f"data.path: {file} is empty; leave it out or give another file")
        pieces, piece = [], ""
        for paragraph in re.split(r"(?<=\n)\s*\n", text):
            piece += paragraph + "\n"
            if len(piece) >= 2000:
                pieces.append(piece)
                piece = ""
        pieces.append(piece)
        yield from ((f"{file.name} {i}", p) for i, p in enumerate(pieces) if p.strip())


# ------------------------------------------------------------------------------------------------------ tokenizer


class Tokenizer:
    """A tiktoken vocabulary with the three special tokens END, THINK and CLOSE."""

    begin: tuple[int, ...] = ()  # what stands before every document
    new_ids: tuple[int, ...] = ()  # tokens that the vocabulary's own model does not know
    json: str = ""  # its tokenizer.json, where it has one
    settings: dict = {}  # and the config.json beside it

    def __init__(self, base: tiktoken.Encoding):
        ranks = base._mergeable_ranks
        special = dict(base._special_tokens)
        for text in (END, THINK, CLOSE):
            special.setdefault(text, max([len(ranks) - 1, *ranks.values(), *special.values()]) + 1)
        self.encoding = tiktoken.Encoding(base.name, pat_str=base._pat_str, mergeable_ranks=ranks, special_tokens=special)
        self.end, self.think, self.close = (special[t] for t in (END, THINK, CLOSE))
        self.n_vocab = self.encoding.n_vocab

    @property
    def fingerprint(self) -> str:
        """Equal exactly where the same text becomes the same tokens, as far as the vocabulary says."""
        if self.json:
            return fingerprint([json.loads(self.json), self.end])
        e = self.encoding
        return fingerprint([e._pat_str, {k.hex(): rank for k, rank in e._mergeable_ranks.items()}, e._special_tokens])

    @property
    def tags(self) -> tuple[int, int]:
        """The think tags: scorers leave them out of their softmax."""
        return self.think, self.close

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; a special token written out in the text is plain text too."""
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens included; bytes that are no UTF-8 become the replacement character."""
        return self.encoding.decode([int(t) for t in tokens])

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, with the tags, and the config.json beside it: what FileTokenizer reads, and an export."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.json, encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(self.settings, indent=1) + "\n", encoding="utf-8")


class FileTokenizer(Tokenizer):
    """The tokenizer.json of a Hugging Face directory, as `Tokenizer`.

    END is the eos_token_id (the first, if several) of the config.json beside it, or the token `<|endoftext|>`. THINK and
    CLOSE are its tokens of that name; if it has none, they become new tokens after its last one, listed in `new_ids`.
    Raises ValueError if a file cannot be used, or nothing says what ends a text.
    """

    def __init__(self, folder: Path):
        file, beside = folder / "tokenizer.json", folder / "config.json"
        require(
            file.is_file(), f"{file} does not exist; a model of Hugging Face needs the tokenizer that it was trained with"
        )
        self.json = file.read_text(encoding="utf-8")
        try:
            self.settings = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
            base = HFTokenizer.from_str(self.json)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{file} or {beside} cannot be read ({error}); copy it again") from error
        missing = [text for text in (THINK, CLOSE) if base.token_to_id(text) is None]
        if missing:
            base.add_tokens([AddedToken(text, normalized=False) for text in missing])
            self.json = base.to_str(pretty=True)
        self.new_ids = tuple(base.token_to_id(text) for text in missing)
        self.think, self.close = base.token_to_id(THINK), base.token_to_id(CLOSE)
        eos = self.settings.get("eos_token_id")
        self.end = (eos[0] if isinstance(eos, list) else eos) if eos not in (None, []) else base.token_to_id(END)
        require(self.end is not None, f"{beside} has no eos_token_id and {file} no {END}; set eos_token_id to end a text")
        self.n_vocab = max(base.get_vocab().values()) + 1
        require(
            self.end < self.n_vocab, f"{beside}: eos_token_id ({self.end}) is none of the {self.n_vocab} tokens of {file}"
        )
        content = json.loads(self.json)
        for token in content["added_tokens"]:  # what `encode` shall read as text where a text spells it
            token["special"] = token["special"] or token["content"] in (END, THINK, CLOSE)
        self.file = HFTokenizer.from_str(json.dumps(content))
        self.file.encode_special_tokens = True
        framed, plain = self.file.encode("a").ids, self.encode("a")
        self.begin = tuple(framed[: framed.index(plain[0])])

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; a special token written out in the text is plain text too."""
        return self.file.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens included; ids beyond the vocabulary are left out."""
        return self.file.decode([int(t) for t in tokens], skip_special_tokens=False)


# The `tokenizers` library writes a byte as a printable character: the printable ones as themselves, others from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHARACTER = {b: chr(b) for b in PRINTABLE}
CHARACTER |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}


def byte_pairs(model: BPE) -> HFTokenizer:
    """The library's tokenizer on bytes, split by TOKEN_PATTERN."""
    made = HFTokenizer(model)
    split = Split(Regex(TOKEN_PATTERN), behavior="isolated")
    made.pre_tokenizer = PreTokenizers([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = ByteLevelDecoder()
    return made


def train_tokenizer(texts: list[str], vocab_size: int) -> dict[str, int]:
    """Byte-pair ranks {hexadecimal bytes: rank} for tiktoken, trained by the `tokenizers` library."""
    trainable, byte_of = byte_pairs(BPE()), {c: b for b, c in CHARACTER.items()}
    trainer = BpeTrainer(vocab_size=vocab_size - 3, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    trainable.train_from_iterator(texts, trainer)
    by_id = sorted(trainable.get_vocab().items(), key=lambda item: item[1])
    return {bytes(byte_of[c] for c in token).hex(): rank for token, rank in by_id}


class CorpusTokenizer(Tokenizer):
    """What `train_tokenizer` gave, run by tiktoken. Its tokenizer.json makes the same tokens, and goes with every run."""

    def __init__(self, ranks: dict[str, int]):
        merges = {bytes.fromhex(k): rank for k, rank in ranks.items()}
        super().__init__(tiktoken.Encoding("corpus", pat_str=TOKEN_PATTERN, mergeable_ranks=merges, special_tokens={}))
        # tiktoken joins any two neighbours that make a token, the lowest rank first: all of them are merges.
        word = {token: "".join(CHARACTER[b] for b in token) for token in merges}
        pairs = [(t[:i], t[i:]) for t in sorted(merges, key=merges.get) for i in range(1, len(t))]
        pairs = [(word[left], word[right]) for left, right in pairs if left in merges and right in merges]
        file = byte_pairs(BPE({word[t]: rank for t, rank in merges.items()}, pairs, ignore_merges=True))
        file.add_special_tokens([AddedToken(text, normalized=False) for text in (END, THINK, CLOSE)])
        self.json, self.settings = file.to_str(pretty=True), {"eos_token_id": self.end}


def named_tokenizer(name: str) -> Tokenizer:
    """The tokenizer.json of a folder, or tiktoken's own vocabulary. Raises ValueError if there is none of that name."""
    if Path(name).is_dir():
        return FileTokenizer(Path(name))
    known = tiktoken.list_encoding_names()
    require(
        name in known,
        f"data.tokenizer ({name!r}) is unknown; choose 'corpus' or one of {', '.join(known)}, "
        "or give a folder that holds a tokenizer.json",
    )
    try:
        return Tokenizer(tiktoken.get_encoding(name))
    except OSError as error:
        raise ValueError(
            f"data.tokenizer ({name!r}) must be downloaded once by tiktoken, and that failed ({type(error).__name__}); "
            "use 'corpus' when offline"
        ) from error


def shard_tokenizer(name: str, vocab_size: int, texts: Iterable[str], out: Path) -> tuple[Tokenizer, dict]:
    """The tokenizer to build shards with, kept in their folder, and what shards.json says of it.

    "corpus" is trained on problems and on the first 20 million characters of texts that no setting holds out.
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
    return tokenizer, {"source": name, "n_vocab": tokenizer.n_vocab, "fingerprint": tokenizer.fingerprint}


def tokenizer_of_shards(found: ShardSet, name: str) -> Tokenizer:
    """The tokenizer that data.tokenizer names for shards; "corpus" is their own. Raises ValueError if it is another one."""
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


# --------------------------------------------------------------------------------------------------------- corpus


@dataclass
class Corpus:
    """The tokenizer and, for each split, all text documents as token ids."""

    tokenizer: Tokenizer
    documents: dict[str, Sequence[np.ndarray] | Documents]
    held_out_percent: int
    key: str = ""  # fingerprint of the text and of the settings that it was read with

    @staticmethod
    def load(config: DataConfig) -> "Corpus":
        """Read the text, or what an earlier run made of the same text and settings. Raises ValueError for unusable text."""
        if config.path and is_shards(Path(config.path)):
            return Corpus._of_shards(config)
        first: dict[str, tuple[str, str]] = {}  # a text under two names keeps the first: copies must not land in two splits
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
        source = [tokenizer.json, tokenizer.end] if is_file else config.tokenizer  # content: a folder may change
        key = fingerprint([named, examples, source, config.vocab_size, config.held_out_percent, TOKEN_PATTERN])
        file = Path(config.cache_dir) / f"corpus-{key}.npz"
        cached = _load_arrays(file)
        if tokenizer is None:
            if cached is None:
                train_texts = [text for name, text in named if split_of(name, config.held_out_percent) == "train"]
                ranks = train_tokenizer(train_texts + examples, config.vocab_size)
            else:
                ranks = dict(zip(cached["ranks"].tolist(), range(len(cached["ranks"])), strict=True))
            tokenizer = CorpusTokenizer(ranks)
        if cached is None:
            arrays = {"ranks": np.array(list(ranks) if config.tokenizer == "corpus" else [])}
            for split in SPLITS:
                kept = [text for name, text in named if split_of(name, config.held_out_percent) == split]
                require(
                    kept,
                    f"data.path ({config.path}) leaves no document for the {split} split; "
                    "add documents or raise data.held_out_percent",
                )
                encoded = [np.array([*tokenizer.encode(text), tokenizer.end], dtype=np.int32) for text in kept]
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
        ranges = {"train": (2 * percent, N_BUCKETS), "val": (0, percent), "test": (percent, 2 * percent)}  # as `split_of`
        documents = {split: found.documents(*ranges[split]) for split in SPLITS}
        for split in SPLITS:
            require(
                len(documents[split]),
                f"data.path ({config.path}) leaves no document for the {split} split; "
                "add documents or raise data.held_out_percent",
            )
        return Corpus(tokenizer, documents, percent, fingerprint([found.key, percent]))

    def text_window(self, rng: random.Random, split: str, length: int) -> np.ndarray:
        """Up to `length` tokens in a row from one document, documents chosen in proportion to their length."""
        if isinstance(self.documents[split], Documents):
            return self.documents[split].window(rng, length)
        lengths = self._lengths(split)
        i = int(np.searchsorted(lengths, rng.randrange(int(lengths[-1])), side="right"))
        document = self.documents[split][i]
        start = rng.randrange(max(1, len(document) - length + 1))
        return document[start : start + length]

    def _lengths(self, split: str) -> np.ndarray:
        if not hasattr(self, "_cumulative"):
            self._cumulative = {s: np.cumsum([len(d) for d in docs]) for s, docs in self.documents.items()}
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


# -------------------------------------------------------------------------------------------------------- batches


def with_thought(tokenizer: Tokenizer, document: list[int], thought: str, t: int) -> list[int]:
    """The document with a thought, between its tags, before token t."""
    return [*document[:t], tokenizer.think, *tokenizer.encode(thought), tokenizer.close, *document[t:]]


def problem_tokens(tokenizer: Tokenizer, problem: Problem, thought: str | None = None) -> tuple[list[int], list[int]]:
    """Token ids of the prompt (with the thought between its tags, if there is one) and of the answer with END."""
    prompt = tokenizer.encode(problem.prompt)
    if thought is not None:
        prompt = with_thought(tokenizer, prompt, thought, len(prompt))
    return prompt, [*tokenizer.encode(problem.answer), tokenizer.end]


class Stage(NamedTuple):
    """What a part of pretraining reads. All but the families are shares, from 0 to 1."""

    families: list[str]
    text: float  # of tokens that are ordinary text
    think: float  # of problem documents with a thought
    worked: float  # of those thoughts that are worked out
    text_think: float | None  # of text windows with a filler thought; None draws no random number


def stage_of(config: Config, step: int) -> Stage:
    """Families enter one by one, worked out and without text; then all of them, still worked out; then the mixture."""
    fit, families = config.pretrain, list(FAMILIES)
    if step < fit.intro_share * fit.steps:
        n = 1 + int(len(families) * step / (fit.intro_share * fit.steps))
        return Stage(families[:n], text=0.0, think=1.0, worked=1.0, text_think=None)
    if step < fit.clean_share * fit.steps:
        return Stage(families, fit.clean_text_share, fit.clean_think, worked=1.0, text_think=None)
    return Stage(families, config.data.text_share, fit.think, fit.worked, fit.text_think)


def pretrain_batch(corpus: Corpus, config: Config, step: int, split: str = "train") -> dict[str, Tensor]:
    """Packed documents for next-token prediction: tokens_BT, targets_BT and ids_BT (the document of each token).

    Each document is text if the batch has less text so far than its share of the tokens, else a problem.
    A function of (seed, step) alone. Raises nothing: the settings were checked.
    """
    fit, stage = config.pretrain, stage_of(config, step)
    n_text = n_all = 0
    rng = random.Random(f"pretrain-{config.seed}-{step}" + ("" if split == "train" else f"-{split}"))
    tokens_BT = np.zeros((fit.batch, fit.seq_len + 1), dtype=np.int64)
    ids_BT = np.zeros((fit.batch, fit.seq_len + 1), dtype=np.int64)
    for row in range(fit.batch):
        n, i = 0, 0
        while n <= fit.seq_len:
            is_text = n_text < stage.text * (n_all + 1)  # with the token to come: a share of 1 begins with text
            if is_text:
                document = corpus.text_window(rng, split, fit.seq_len).tolist()
                if stage.text_think is not None and rng.random() < stage.text_think:
                    document = with_thought(corpus.tokenizer, document, filler(rng), rng.randrange(1, len(document) + 1))
            else:
                problem = draw_problem(rng, split, corpus.held_out_percent, rng.choice(stage.families))
                thought = thought_for(problem, rng, stage.worked) if rng.random() < stage.think else None
                prompt, answer = problem_tokens(corpus.tokenizer, problem, thought)
                document = prompt + answer
            document = [*corpus.tokenizer.begin, *document][: fit.seq_len + 1 - n]
            n_text, n_all = n_text + is_text * len(document), n_all + len(document)
            tokens_BT[row, n : n + len(document)] = document
            ids_BT[row, n : n + len(document)] = i
            n, i = n + len(document), i + 1
    tokens_BT, ids_BT = torch.from_numpy(tokens_BT), torch.from_numpy(ids_BT)
    same = ids_BT[:, 1:] == ids_BT[:, :-1]
    targets_BT = tokens_BT[:, 1:].masked_fill(~same, -100)
    return {"tokens_BT": tokens_BT[:, :-1], "targets_BT": targets_BT, "ids_BT": ids_BT[:, :-1]}


def cpt_batch(corpus: Corpus, config: Config, step: int) -> dict[str, Tensor]:
    """`pretrain_batch` after the base's last step: the same mixture goes on, with new documents."""
    return mixture(corpus, config, step, config.cpt.batch, config.pretrain.seq_len)


def elastic_batch(corpus: Corpus, config: Config, step: int) -> dict[str, Tensor]:
    """The base's last mixture in short sequences, then (stage 2) in long ones.

    budget_B: the index in elastic.budgets that each sequence trains: drawn uniformly in stage 1, by elastic.long_weights in
    stage 2 (eq. 18 and 19); step_B: the step. A function of (seed, step) alone.
    """
    c = config.elastic
    is_long = step >= c.stage_1_steps()
    n_rows, seq_len = (c.long_rows(), c.long_len) if is_long else (c.batch, c.seq_len)
    batch = mixture(corpus, config, step, n_rows, seq_len)
    weights = c.long_weights if is_long else [1.0] * len(c.budgets)
    n = len(batch["tokens_BT"])
    drawn = random.Random(f"budget-{config.seed}-{step}").choices(range(len(c.budgets)), weights, k=n)
    return {**batch, "budget_B": torch.tensor(drawn), "step_B": torch.full((n,), step)}


def mixture(
    corpus: Corpus, config: Config, step: int, n_rows: int, seq_len: int, split: str = "train"
) -> dict[str, Tensor]:
    """Rows of the base's last mixture, `step` batches after its own end."""
    fit = dataclasses.replace(config.pretrain, batch=n_rows, seq_len=seq_len)
    return pretrain_batch(corpus, dataclasses.replace(config, pretrain=fit), fit.steps + step, split)


def rlp_batch(corpus: Corpus, config: Config, step: int) -> dict[str, Tensor]:
    """Contexts, the tokens that follow them (see `collate_contexts`) and is_text_B: a function of (seed, step) alone."""
    fit = config.rlp
    rng = random.Random(f"rlp-{config.seed}-{step}")
    is_text, pairs = [], []
    for _ in range(fit.batch):
        is_text.append(rng.random() < fit.text_share)
        pairs.append(text_position(corpus, fit, "train", rng) if is_text[-1] else problem_position(corpus, fit, rng))
    batch = collate_contexts(corpus.tokenizer, [c for c, _ in pairs], [t for _, t in pairs], fit)
    return {**batch, "is_text_B": torch.tensor(is_text)}


def problem_position(corpus: Corpus, fit: RLPConfig, rng: random.Random) -> tuple[list[int], list[int]]:
    """Context and following tokens in a problem document without a thought: at the answer, or at a random position."""
    problem = draw_problem(rng, "train", corpus.held_out_percent)
    prompt, answer = problem_tokens(corpus.tokenizer, problem)
    document = prompt + answer
    t = len(prompt) if fit.positions == "answer" else _random_position(document, fit.horizon, rng)
    return document[:t], document[t : t + fit.horizon]


def text_position(corpus: Corpus, fit: RLPConfig, split: str, rng: random.Random) -> tuple[list[int], list[int]]:
    """Context and following tokens at a uniformly random position of a text window."""
    document = corpus.text_window(rng, split, fit.context_len + fit.horizon).tolist()
    t = _random_position(document, fit.horizon, rng)
    return document[:t], document[t : t + fit.horizon]


def _random_position(document: list[int], horizon: int, rng: random.Random) -> int:
    """Uniform over the positions that `horizon` tokens follow; over all from 1 on if the document is too short for any."""
    n_after = horizon if horizon < len(document) else 1
    return rng.randrange(1, len(document) - n_after + 1)


def collate_contexts(
    tokenizer: Tokenizer, contexts: list[list[int]], targets: list[list[int]], fit: RLPConfig
) -> dict[str, Tensor]:
    """context_BT (padded on the left), ids_BT (-1 at the padding, 0 elsewhere), target_BX (X = horizon tokens).

    A context longer than rlp.context_len loses its beginning; a target shorter than the horizon is filled up with END.
    Before each context stand what the tokenizer begins a document with and the instruction `rlp.prompt`.
    """
    before = instruction(tokenizer, fit)
    contexts = [before + c[-fit.context_len :] for c in contexts]
    T = max(len(c) for c in contexts)
    context_BT = torch.full((len(contexts), T), tokenizer.end)
    ids_BT = torch.full((len(contexts), T), -1)
    for i, c in enumerate(contexts):
        context_BT[i, T - len(c) :] = torch.tensor(c)
        ids_BT[i, T - len(c) :] = 0
    target_BX = torch.tensor([(t + [tokenizer.end] * fit.horizon)[: fit.horizon] for t in targets])
    return {"context_BT": context_BT, "ids_BT": ids_BT, "target_BX": target_BX}


def instruction(tokenizer: Tokenizer, fit: RLPConfig) -> list[int]:
    """What stands before every context of RLP, for thoughts and for predictions without one; usually nothing."""
    return [*tokenizer.begin, *(tokenizer.encode(fit.prompt) if fit.prompt else [])]
