"""Text as shards of tokens on disk: built once, then read through memory maps, of any size.

    python -m tools.shards build TEXTS... --out DIR --tokenizer MODEL    from files of sources.py
    python -m tools.shards check DIR                          compare the checksum of every file
    python train.py --data.path DIR                           any mode

A shard is two `.npy` files: the tokens of its documents, each closed by END, as uint16 or uint32,
and where each document starts, as int64. `shards.json` lists the shards with their counts and
checksums. It is written last, so a build that was cut short is no data set.

Held out: every document has the bucket of its text (see held_out.py), so copies are in one bucket
(near duplicates are not looked for), and a shard's documents are sorted by bucket. Whatever the
share that is held out, a split is one range of documents of each shard, and all that is held in
memory are 100 counts a shard.

Reading is random access, by random numbers that depend on (seed, step) alone: resuming needs no
state, and every process can make any row. Building holds a shard in memory, twice while writing.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from system.config import SHARD_LIST
from system.errors import require
from system.files import fingerprint, read_json, sha256, write_json, write_whole
from text.documents import Documents, join
from text.held_out import N_BUCKETS, bucket_of
from text.problems import FAMILIES, tokenizer_examples
from text.tokenizer import CorpusTokenizer, FileTokenizer, Tokenizer, named_tokenizer

VERSION, LIST = 2, SHARD_LIST
AGAIN = "copy it again from where it was built, or build again"


def shard_tokenizer(name: str, vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer to build with. "corpus" is trained on problems and the first 20 million
    characters of texts that no setting holds out: val and test have at most 25 per cent each."""
    if name != "corpus":
        return named_tokenizer(name)
    require(vocab_size >= 300, f"vocab-size ({vocab_size}) must be at least 300: there are 256 "
            "bytes and the special tokens")
    sample, n = [], 0
    for text in (t for t in texts if bucket_of(t.strip()) >= N_BUCKETS // 2):
        sample.append(text)
        n += len(text)
        if n >= 20_000_000:
            break
    return CorpusTokenizer.train(sample + tokenizer_examples(5, FAMILIES), vocab_size)


def build(texts: Iterable[str], out: Path, tokenizer: Tokenizer, source: str,
          shard_tokens: int = 2**26) -> list[dict]:
    """Write texts as shards of about shard_tokens tokens, and the tokenizer in `hf/`.

    source: the name by which the tokenizer was asked for.
    Returns the shards' entries in shards.json. Raises ValueError without text, or if `out` has one.
    """
    require_new(out)
    require(shard_tokens >= 1, f"shard_tokens ({shard_tokens}) must be at least 1; 2**26 is usual")
    if tokenizer.json:
        tokenizer.save(out / "hf")
    dtype = "uint16" if tokenizer.n_vocab <= 2**16 else "uint32"
    shards, documents, n = [], [], 0
    for text in texts:
        tokens = np.array([*tokenizer.encode(text), tokenizer.end], dtype=dtype)
        documents.append((bucket_of(text.strip()), tokens))
        n += len(tokens)
        if n >= shard_tokens:
            shards.append(_write_shard(out, f"{len(shards):05d}", documents))
            documents, n = [], 0
    if documents:
        shards.append(_write_shard(out, f"{len(shards):05d}", documents))
    require(shards, "the inputs hold no text; give files with some")
    kept = {"source": source, "n_vocab": tokenizer.n_vocab, "fingerprint": tokenizer.fingerprint}
    listed = {"version": VERSION, "dtype": dtype, "tokenizer": kept, "shards": shards}
    write_json(out / LIST, listed, indent=None)
    return shards


def require_new(out: Path) -> None:
    """Raises ValueError if a folder holds a data set."""
    require(not (out / LIST).exists(),
            f"out ({out}) already holds {LIST}; choose another --out, or delete it")


def _write_shard(out: Path, name: str, documents: list[tuple[int, np.ndarray]]) -> dict:
    """Write (bucket, tokens) of documents as one shard. Returns its entry in shards.json."""
    documents.sort(key=lambda document: document[0])  # stable: in the order read within a bucket
    counts = np.bincount([bucket for bucket, _ in documents], minlength=N_BUCKETS)
    tokens, starts = join([tokens for _, tokens in documents])
    entry = {"name": name, "n_documents": len(documents), "n_tokens": len(tokens),
             "bucket_documents": counts.tolist(), "sha256": {}}
    for part, array in (("tokens", tokens), ("starts", starts)):
        file = out / f"{name}.{part}.npy"
        write_whole(file, lambda f, array=array: np.save(f, array))
        entry["sha256"][part] = sha256(file)
    return entry


def is_shards(path: Path) -> bool:
    """Whether a folder holds shards. Raises ValueError if their build was cut short."""
    found = (path / LIST).is_file()
    require(found or not any(path.glob("*.tokens.npy")), f"{path} holds shards but no {LIST}: it "
            "was lost, or the build did not end; build again")
    return found


def write_cached(file: Path, write: Callable[[BinaryIO], Any]) -> None:
    """`write_whole` in data.cache_dir. Raises ValueError if that cannot be written to."""
    try:
        write_whole(file, write)
    except OSError as error:
        raise ValueError(f"data.cache_dir ({file.parent}) cannot be written to: {error.strerror}; "
                         "choose another --data.cache-dir") from error


class ShardSet:
    """A folder of shards.

    shards: of each its tokens and where its documents start, both memory-mapped, and which document
    is the first of each bucket. sha256: checksums of all files.
    """

    def __init__(self, folder: Path):
        """Raises ValueError for what is missing, cut short or of another make; bytes: `check`."""
        self.folder, listed = folder, read_json(folder / LIST)
        version = listed.get("version")
        require(version == VERSION, f"{folder / LIST} has the format version {version}; this "
                f"program reads {VERSION}: build again")
        self.shards, self.sha256 = [], {}
        try:
            self.tokenizer = listed["tokenizer"]
            for entry in listed["shards"]:
                self._open(entry, listed["dtype"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / LIST} cannot be read ({error!r}); {AGAIN}") from error
        self.key = fingerprint([self.tokenizer, [*self.sha256.values()]])

    def _open(self, entry: dict, dtype: str) -> None:
        """Map an entry's shard. Refuses files that are not as it says, by headers and sizes."""
        n_tokens, counts = entry["n_tokens"], entry["bucket_documents"]
        files = {part: self.folder / f"{entry['name']}.{part}.npy" for part in ("tokens", "starts")}
        tokens = _mapped(files["tokens"], dtype, n_tokens)
        starts = _mapped(files["starts"], "int64", entry["n_documents"] + 1)
        require((starts[0], starts[-1]) == (0, n_tokens),
                f"{files['starts']} is damaged: its documents do not cover the tokens; {AGAIN}")
        require(len(counts) == N_BUCKETS and sum(counts) == entry["n_documents"],
                f"{self.folder / LIST} is damaged: {entry['name']} has other buckets; {AGAIN}")
        self.shards.append((tokens, starts, np.cumsum([0, *counts])))
        self.sha256 |= {file: entry["sha256"][part] for part, file in files.items()}

    def documents(self, buckets: range) -> Documents:
        """Of some buckets of all shards."""
        return Documents([(tokens, starts[first[buckets.start] : first[buckets.stop] + 1])
                          for tokens, starts, first in self.shards])

    def open_tokenizer(self, name: str) -> Tokenizer:
        """The tokenizer of a name; "corpus" is the shards' own. Raises ValueError for another."""
        theirs, source = self.tokenizer["fingerprint"], self.tokenizer["source"]
        folder, kept, own = self.folder, self.folder / "hf", name == "corpus"
        if own and (kept.is_dir() or source == "corpus"):
            tokenizer = FileTokenizer(kept)
        else:
            tokenizer = named_tokenizer(source if own else name)
        wrong = (f"the tokenizer in {folder} is not the one that it was built with; {AGAIN}" if own
                 else f"data.tokenizer ({name}) is not the one that {folder} was built with "
                 f"({source}, fingerprint {theirs}): tokens would be read as other text; build "
                 "again with this one, or leave data.tokenizer and init out to use that one")
        require(tokenizer.fingerprint == theirs, wrong)
        return tokenizer

    def check(self) -> None:
        """Read every byte. Raises ValueError for the first file that is not as it was written."""
        for file, digest in self.sha256.items():
            require(sha256(file) == digest,
                    f"{file} is damaged: its content has another checksum; {AGAIN}")

    def check_once(self, cache_dir: Path) -> None:
        """`check`, unless a note in cache_dir says that files of these sizes and times passed."""
        stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in self.sha256]
        known = fingerprint([str(self.folder.resolve()), self.key, stats])
        note = cache_dir / f"shards-{known}.checked"
        if not note.exists():
            self.check()
            write_cached(note, lambda f: None)


def _mapped(file: Path, dtype: str, n: int) -> np.ndarray:
    """The array of a .npy file, of a type and a length, read where it is used."""
    require(file.is_file(), f"{file} is missing: {LIST} lists it; {AGAIN}")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header raises almost anything
        raise ValueError(f"{file} is cut short or damaged ({error}); {AGAIN}") from None
    require(isinstance(array, np.memmap), f"{file} is damaged: it holds no array; {AGAIN}")
    found = f"{array.dtype}{list(array.shape)}"
    require(found == f"{dtype}[{n}]", f"{file} holds {found}, in {LIST} {dtype}[{n}]; {AGAIN}")
    size, expected = file.stat().st_size, array.offset + array.nbytes
    require(size == expected, f"{file} has {size} bytes instead of {expected}: damaged; {AGAIN}")
    return array
