"""Text as shards of tokens on disk: built once, then read through memory maps, however large they
are.

    python -m tools.shards build TEXTS... --out DIR --tokenizer MODEL     from *.jsonl ({"text": ...} a line) and *.txt
    python -m tools.shards check DIR                                      read every byte again and compare its checksum
    python train.py --data.path DIR                                 any mode

A shard is one file: 4096 bytes of JSON (what it is, counts, checksum), the tokens of its documents,
each closed by END, as uint16 or uint32, zeros up to a multiple of 8, and where each document
begins, as int64. `shards.json` is written last: it lists the shards, so a build that was cut short
is no data set.

Held out: every document has a bucket from 0 to 99, the checksum of its text modulo 100, so copies
are in one bucket. A shard's documents are sorted by bucket. Whatever the share that is held out, a
split is then one range of documents and one range of tokens of each shard, and to find a token is a
binary search in a memory map: all that is held are 100 counts a shard.

Reading is random access: a window is a function of the random numbers that ask for it, hence of
(seed, step). To resume needs no state, and every rank can make the rows of any batch. Building
holds one shard at a time.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from system.errors import require
from system.files import fingerprint
from text.held_out import N_BUCKETS, bucket_of

MAGIC, VERSION, HEADER_BYTES, LIST = "token shard", 1, 4096, "shards.json"


DTYPES = {"uint16": np.uint16, "uint32": np.uint32}


def input_files(inputs: list[Path]) -> list[Path]:
    """The *.jsonl and *.txt files named, and those in the folders named. Raises ValueError if there
    are none."""
    files: list[Path] = []
    for path in inputs:
        require(path.exists(),
                f"input ({path}) does not exist; give *.jsonl or *.txt files, or folders of them")
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        found = [p for p in inside if p.suffix in (".jsonl", ".txt")]
        require(
            found, f"input ({path}) is or holds no *.jsonl and no *.txt file; rename or convert it")
        files += found
    return files


def read_documents(files: list[Path], piece: int = 1_000_000) -> Iterator[str]:
    """Every text that is not blank: of each line of a *.jsonl file, and of each *.txt file.

    piece: characters after which a *.txt file is cut at the next blank line, so that none has to
    fit into memory.
    Raises ValueError for what is not UTF-8, not JSON, or has no text, with the file and the line.
    """
    for file in files:
        try:
            with open(file, encoding="utf-8") as lines:
                texts = (
                    _json_texts(file, lines) if file.suffix == ".jsonl" else _pieces(lines, piece))
                yield from (text for text in texts if text.strip())
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file} is not UTF-8 text ({error.reason}); convert it or leave it out") from None


def _json_texts(file: Path, lines: Iterable[str]) -> Iterator[str]:
    for i, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{file} line {i} is not JSON ({error.msg}); mend it or leave the line out"
                ) from None
            text = value.get("text") if isinstance(value, dict) else None
            require(isinstance(text, str),
                    f'{file} line {i} has no "text" that is a string; a line is {{"text": "..."}}')
            yield text


def _pieces(lines: Iterable[str], piece: int) -> Iterator[str]:
    kept: list[str] = []
    n = 0
    for line in lines:
        kept.append(line)
        n += len(line)
        if n >= piece and not line.strip():
            yield "".join(kept)
            kept, n = [], 0
    yield "".join(kept)


def build(texts: Iterable[str], out: Path, encode: Callable[[str], list[int]], end: int,
          tokenizer: dict, shard_tokens: int = 2**26) -> dict:
    """Write texts as shards of about shard_tokens tokens. Returns what shards.json holds.

    Args: encode, end: of the tokenizer; tokenizer: what is kept of it, with its n_vocab and its
    fingerprint.
    Raises ValueError if there is no text, or if `out` holds a data set.
    """
    require(not (out / LIST).exists(),
            f"out ({out}) already holds {LIST}; choose another --out, or delete it")
    require(
        shard_tokens >= 1, f"shard_tokens ({shard_tokens}) must be at least 1; 67108864 is usual")
    out.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if tokenizer["n_vocab"] <= 2**16 else "uint32"
    buckets: list[list[np.ndarray]] = [[] for _ in range(N_BUCKETS)]
    shards, n = [], 0

    def flush() -> None:
        nonlocal n
        shards.append(
            write_shard(out / f"{len(shards):05d}.shard", buckets, dtype, tokenizer["fingerprint"]))
        for bucket in buckets:
            bucket.clear()
        n = 0

    for text in texts:
        buckets[bucket_of(text)].append(np.array([*encode(text), end], dtype=DTYPES[dtype]))
        n += len(buckets[bucket_of(text)][-1])
        if n >= shard_tokens:
            flush()
    if n:
        flush()
    require(shards, "the inputs hold no text; give files with some")
    listed = {"magic": MAGIC, "version": VERSION, "tokenizer": tokenizer, "shards": shards}
    _write_whole(out / LIST, [(json.dumps(listed, indent=1) + "\n").encode()])
    return listed


def write_shard(file: Path, buckets: list[list[np.ndarray]], dtype: str, tokenizer: str) -> dict:
    """Write documents by bucket as one shard. Returns its entry in shards.json."""
    documents = [document for bucket in buckets for document in bucket]
    starts = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum([len(d) for d in documents], out=starts[1:])
    pieces = [*documents, bytes(-int(starts[-1]) * np.dtype(DTYPES[dtype]).itemsize % 8), starts]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    header = {
        "magic": MAGIC,
        "version": VERSION,
        "dtype": dtype,
        "n_documents": len(documents),
        "n_tokens": int(starts[-1]),
        "sha256": digest.hexdigest(),
        "tokenizer": tokenizer,
        "bucket_documents": [len(bucket) for bucket in buckets],
    }
    _write_whole(file, [json.dumps(header).encode().ljust(HEADER_BYTES - 1) + b"\n", *pieces])
    return {"file": file.name, **{k: header[k] for k in ("n_documents", "n_tokens", "sha256")}}


def _write_whole(file: Path, pieces: list) -> None:
    """Write a file of these bytes whole or not at all."""
    partial = file.with_suffix(".partial")
    with open(partial, "wb") as f:
        for piece in pieces:
            f.write(piece)
    partial.replace(file)


# ------------------------------------------------------------------------------------------ reading


def is_shards(path: Path) -> bool:
    """Whether a folder holds shards. Raises ValueError if their build was cut short."""
    if (path / LIST).is_file():
        return True
    cut_short = path.is_dir() and any(path.glob("*.shard"))
    require(
        not cut_short,
        f"{path} holds shards but no {LIST}: it was lost, or the build did not end; build again")
    return False


class Shard:
    """One file, mapped: its tokens, where its documents begin, and how many documents each bucket
    has."""

    def __init__(self, file: Path, entry: dict, tokenizer: str):
        """Raises ValueError for a file that is not what its entry in shards.json says, short of
        reading all of it."""
        again = "copy it again from where it was built, or build again"
        require(file.is_file(), f"{file} is missing: {LIST} lists it; {again}")
        with open(file, "rb") as f:
            start = f.read(HEADER_BYTES)
        try:
            header = json.loads(start)
            require(header["magic"] == MAGIC, "")
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{file} is damaged or no shard: it does not begin with a shard's header; {again}"
            ) from None
        version = header.get("version")
        require(
            version == VERSION,
            f"{file} has the format version {version}; this program reads {VERSION}: build again")
        theirs = header.get("tokenizer")
        require(theirs == tokenizer,
                f"{file} has tokens of the tokenizer {theirs}, {LIST} of {tokenizer}; {again}")
        for key in ("n_documents", "n_tokens", "sha256"):
            require(header.get(key) == entry[key],
                    f"{file}: {key} is {header.get(key)}, in {LIST} {entry[key]}; {again}")
        counts, dtype = header.get("bucket_documents", []), DTYPES.get(header.get("dtype"))
        good = (
            len(counts) == N_BUCKETS and sum(counts) == entry["n_documents"] and dtype is not None)
        require(good, f"{file} is damaged: its header contradicts itself; {again}")
        self.file, self.sha256 = file, entry["sha256"]
        n_tokens, n_documents = entry["n_tokens"], entry["n_documents"]
        at = HEADER_BYTES + -(-n_tokens * np.dtype(dtype).itemsize // 8) * 8
        size, expected = file.stat().st_size, at + 8 * (n_documents + 1)
        require(
            size == expected,
            f"{file} has {size} bytes instead of {expected}: it is cut short or damaged; {again}")
        self.tokens = np.memmap(file, dtype, "r", HEADER_BYTES, (n_tokens,))
        self.starts = np.memmap(file, np.int64, "r", at, (n_documents + 1,))
        ends = int(self.starts[0]), int(self.starts[-1])
        require(ends == (0, n_tokens),
                f"{file} is damaged: its documents do not cover its tokens; {again}")
        self.bucket_starts = np.concatenate([[0], np.cumsum(counts)])

    def check(self) -> None:
        """Read all of it. Raises ValueError if a byte is not as it was written."""
        digest = hashlib.sha256()
        with open(self.file, "rb") as f:
            f.seek(HEADER_BYTES)
            while block := f.read(2**20):
                digest.update(block)
        require(
            digest.hexdigest() == self.sha256,
            f"{self.file} is damaged: its content has another checksum than when it was written; copy it again from where "
            "it was built, or build again",
        )


@dataclass
class Documents:
    """The documents of some buckets of all shards, as a sequence of arrays of tokens, each read
    when it is asked for.

    first: the first document of each shard; token_starts, document_starts: tokens and documents in
    all shards before.
    """

    shards: list[Shard]
    first: np.ndarray
    token_starts: np.ndarray
    document_starts: np.ndarray

    @staticmethod
    def of(shards: list[Shard], low: int, high: int) -> "Documents":
        """Those of the buckets low to high - 1."""
        first, last = (np.array([s.bucket_starts[bucket] for s in shards], dtype=np.int64)
                       for bucket in (low, high))
        n_tokens = [
            int(s.starts[b] - s.starts[a]) for s, a, b in zip(shards, first, last, strict=True)]
        return Documents(shards, first, _sums(n_tokens), _sums(last - first))

    @property
    def n_tokens(self) -> int:
        """Tokens of all of them."""
        return int(self.token_starts[-1])

    def __len__(self) -> int:
        return int(self.document_starts[-1])

    def __getitem__(self, i: int) -> np.ndarray:
        """Tokens of document i, a copy."""
        shard, start, end = self._place(i)
        return shard.tokens[start:end].astype(np.int32)

    def window(self, rng: random.Random, length: int) -> np.ndarray:
        """Up to `length` tokens in a row from one document, documents chosen in proportion to their
        length."""
        at = rng.randrange(self.n_tokens)
        k = int(np.searchsorted(self.token_starts, at, side="right")) - 1
        starts, first = self.shards[k].starts, int(self.first[k])
        token = np.int64(
            at - self.token_starts[k] + starts[first]
        )  # an int64: anything else would copy `starts`
        i = int(np.searchsorted(starts, token, side="right")) - 1 - first
        shard, start, end = self._place(int(self.document_starts[k]) + i)
        start += rng.randrange(max(1, end - start - length + 1))
        return shard.tokens[start : min(end, start + length)].astype(np.int32)

    def _place(self, i: int) -> tuple[Shard, int, int]:
        """The shard of document i, and where in it the document begins and ends."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        k = int(np.searchsorted(self.document_starts, i, side="right")) - 1
        j = int(self.first[k] + i - self.document_starts[k])
        return self.shards[k], int(self.shards[k].starts[j]), int(self.shards[k].starts[j + 1])


def _sums(n: Iterable[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(n, dtype=np.int64)])


class ShardSet:
    """A folder of shards."""

    def __init__(self, folder: Path):
        """Raises ValueError for what is missing, cut short or of another make; see `check` for
        single bytes."""
        try:
            listed = json.loads((folder / LIST).read_text(encoding="utf-8"))
            made = listed["magic"], listed["version"]
            require(
                made == (MAGIC, VERSION),
                f"{folder / LIST} cannot be read: it says {made}, this program reads {(MAGIC, VERSION)}; build again",
            )
            self.tokenizer = listed["tokenizer"]
            self.shards = [Shard(folder / e["file"], e, self.tokenizer["fingerprint"])
                           for e in listed["shards"]]
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / LIST} cannot be read ({error!r}); copy it again, or build again"
            ) from error
        self.folder, self.key = (folder,
                                 fingerprint([self.tokenizer, [s.sha256 for s in self.shards]]))

    def documents(self, low: int, high: int) -> Documents:
        """Those of the buckets low to high - 1."""
        return Documents.of(self.shards, low, high)

    def check(self) -> None:
        """Read every byte. Raises ValueError for the first shard that is damaged."""
        for shard in self.shards:
            shard.check()

    def check_once(self, cache_dir: Path) -> None:
        """`check`, unless a note in cache_dir says that it was done and no file has changed its
        size or time since."""
        stats = [
            [s.file.name, s.file.stat().st_size, s.file.stat().st_mtime_ns] for s in self.shards]
        note = (cache_dir
                / f"shards-{fingerprint([str(self.folder.resolve()), self.key, stats])}.checked")
        if not note.exists():
            self.check()
            try:
                cache_dir.mkdir(parents=True, exist_ok=True)
                note.touch()
            except OSError as error:
                raise ValueError(
                    f"data.cache_dir ({cache_dir}) cannot be written to: {error.strerror}; choose another --data.cache-dir"
                ) from error
