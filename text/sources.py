"""Texts as people have them on disk: what `--data.path` and `tools.shards build` read.

    *.jsonl, *.json, *.parquet    a document a line, element or row, under `data.text_key`
    any other file                UTF-8 text, cut at END and at blank lines

*.ndjson and *.jl are other names of *.jsonl.

Both also as *.gz and *.zst, but for Parquet; capitals in a name are as good as small letters.
Whatever is read is valid text: see `valid` in tokenizer.py.
"""

import contextlib
import gzip
import importlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from system.errors import require
from system.files import require_content
from text.tokenizer import END, valid


def input_files(path: Path, name: str) -> tuple[list[Path], list[str]]:
    """The files named or in the folder named, and a line for each that is skipped there: hidden
    and empty ones, links to folders or to nothing. Raises ValueError if none are left. name: of the
    setting, for messages."""
    require(path.exists(), f"{name} ({path}) does not exist; give a file of text, *.jsonl or "
            "*.parquet, or a folder of them")
    if not path.is_dir():
        return [path], []
    files, skipped = [], []
    for file in sorted(p for p in path.rglob("*") if p.is_file() or p.is_symlink()):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        why = ("hidden" if hidden else "a link to a folder" if file.is_dir() else
               "a link to nothing" if not file.exists() else
               "empty" if not file.stat().st_size else "")
        if why:
            skipped.append(f"{name}: {file} is {why}; skipped")
        else:
            files.append(file)
    require(files, f"{name} ({path}) is a folder without files that hold text; put some into it")
    return files, skipped


def require_key_read(files: Iterable[Path], key: str) -> None:
    """Raises ValueError for a key of its own where no file is JSON or Parquet, which have keys."""
    require(key == "text" or any(map(_reader, files)),
            f"text-key ({key}) is for JSON and Parquet, and no file is called so (*.jsonl, *.json, "
            "*.parquet); leave it out, or rename a file that holds them")


def read_texts(files: Iterable[Path], key: str, size: int, root: Path | None = None
               ) -> Iterator[tuple[str, str]]:
    """(name, text) of every document of some files that is not blank.

    key: what the text stands under in JSON and Parquet; size: characters of the pieces that other
    files are cut into; root: the folder in which names begin, of files of equal name in several
    folders. Raises ValueError with file and line for what is no text, and where a format needs a
    package that is not installed.
    """
    for file in files:
        require_content(file)
        n = -1
        read = _reader(file)
        texts = read(file, key) if read else _pieces(_lines(file, key), size)
        for n, text in enumerate(t for t in texts if t.strip()):
            yield f"{file.relative_to(root) if root else file.name} {n}", text
        require(n >= 0, f"{file} is empty: it holds no text; leave it out")


def _reader(file: Path) -> Callable[[Path, str], Iterator[str]] | None:
    """What reads a file of documents; None for a file of text."""
    name = file.name.lower().removesuffix(".gz").removesuffix(".zst")
    return next((read for ending, read in READERS.items() if name.endswith(ending)), None)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raises ValueError, which names the file, for whatever comes of one that is damaged."""
    try:
        yield
    except Exception as error:  # the packages raise nothing narrower
        if str(file) in str(error):
            raise
        raise ValueError(f"{file} cannot be read ({error}); copy it again") from error


def _needed(package: str, file: Path) -> Any:
    """An optional package. Raises ValueError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"{file} needs the package {package}, which is not installed; "
                         f"`pip install {package}`, or convert the file") from None


def _decoded(file: Path) -> Iterator[str]:
    """UTF-8 lines, unpacked, without the mark that some programs begin a file with."""
    with _reading(file), _open(file) as f:
        for i, line in enumerate(f, 1):
            try:
                yield line.decode("utf-8-sig" if i == 1 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} line {i} is not UTF-8 text (byte {error.start}); convert "
                                 "it or leave it out") from None


def _lines(file: Path, key: str) -> Iterator[str]:
    """Of a file of text. Raises ValueError where that is not text, or JSON under another name."""
    for i, line in enumerate(_decoded(file), 1):
        require("\0" not in line, f"{file} line {i} holds zero bytes, so it is not text; "
                "convert the file or leave it out")
        require(i > 1 or not _is_object(line, key), f"{file} begins with a JSON object that has "
                f"{key!r}; if there is one in each line, call it .jsonl")
        yield line


def _is_object(line: str, key: str) -> bool:
    try:
        value = json.loads(line) if line.startswith("{") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and key in value


def _pieces(lines: Iterable[str], size: int) -> Iterator[str]:
    """A text in pieces of `size` characters or more: END is a boundary, and so is the next blank
    line; where none comes within as many again, the last end of a line there, a space, or none."""
    text = ""
    for line in lines:
        for i, part in enumerate(line.split(END)):
            if i:
                yield text
                text = ""
            for at in range(0, len(part), size):
                text += part[at : at + size]
                if len(text) > 2 * size:
                    ends = (text.rfind(sign, size, 2 * size) + 1 for sign in "\n ")
                    cut = next((end for end in ends if end), 2 * size)
                    yield text[:cut]
                    text = text[cut:]
        if len(text) >= size and not line.strip():
            yield text
            text = ""
    yield text


def json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """`FILE line N` and the value there, of each line that is not blank. Raises ValueError for what
    is no JSON."""
    for i, line in enumerate(_decoded(file), 1):
        if line.strip():
            try:
                yield f"{file} line {i}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file} line {i} is not JSON ({error}); mend it") from None


def _json_lines(file: Path, key: str) -> Iterator[str]:
    """Of a file with a JSON object in each line."""
    return (_text_of(value, key, where) for where, value in json_lines(file))


def _json(file: Path, key: str) -> Iterator[str]:
    """Of a file that is one list of JSON objects, or one object."""
    text = "".join(_decoded(file))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); mend it, or call it .jsonl if there is an "
                         "object in each line") from None
    for i, one in enumerate(value if isinstance(value, list) else [value], 1):
        yield _text_of(one, key, f"{file} element {i}")


def _open(file: Path) -> BinaryIO:
    """The file's bytes, unpacked; of *.zst all frames, also those of a long window."""
    suffix = file.suffix.lower()
    if suffix != ".zst":
        return gzip.open(file) if suffix == ".gz" else open(file, "rb")
    unpacker = _needed("zstandard", file).ZstdDecompressor(max_window_size=2**31)
    return io.BufferedReader(Frames(open(file, "rb"), unpacker))


class Frames(io.RawIOBase):
    """The bytes of all frames of a *.zst file, unpacked. The package's own reader ends quietly
    inside a frame that was cut short; here that is a ValueError."""

    def __init__(self, packed: BinaryIO, unpacker: Any):
        self.raw, self.unpacker, self.frame = packed, unpacker, None
        self.packed, self.ready = b"", memoryview(b"")

    def readable(self) -> bool:
        """As `io.RawIOBase` has it."""
        return True

    def readinto(self, room: memoryview) -> int:
        """Number of bytes that were put into a buffer; 0 at the end."""
        while not self.ready:
            self.packed = self.packed or self.raw.read(2**16)
            if not self.packed:
                require(self.frame is None, "it ends inside a frame")
                return 0
            self.frame = self.frame or self.unpacker.decompressobj()
            self.ready = memoryview(self.frame.decompress(self.packed))
            self.packed = self.frame.unused_data if self.frame.eof else b""
            self.frame = None if self.frame.eof else self.frame
        n = min(len(room), len(self.ready))
        room[:n], self.ready = self.ready[:n], self.ready[n:]
        return n

    def close(self) -> None:
        """Close the packed file."""
        self.raw.close()
        super().close()


def _parquet(file: Path, key: str) -> Iterator[str]:
    """Of a *.parquet file, some rows at a time."""
    _needed("pyarrow", file)
    parquet = importlib.import_module("pyarrow.parquet")
    with _reading(file), parquet.ParquetFile(file) as table:
        columns = [key] if key in table.schema_arrow.names else table.schema_arrow.names
        rows = (row for batch in table.iter_batches(1000, columns=columns)
                for row in batch.to_pylist())
        yield from (_text_of(row, key, f"{file} row {i}") for i, row in enumerate(rows, 1))


def _text_of(value: Any, key: str, where: str) -> str:
    """The text under a key, with U+FFFD for what no text holds."""
    if isinstance(value, dict) and key in value:
        if isinstance(text := value[key], str):
            return valid(text).replace("\0", "\ufffd")
        raise ValueError(f'{where}: "{key}" ({text!r:.60}) is no string; mend it, or leave it out')
    others = f"it has {', '.join(value)}" if isinstance(value, dict) else "it is no object"
    raise ValueError(f'{where} has no "{key}" that is a string ({others[:200]}); name the key with '
                     "--data.text-key (of tools.shards: --text-key)")


READERS = {**dict.fromkeys((".jsonl", ".ndjson", ".jl"), _json_lines), ".json": _json,
           ".parquet": _parquet}
