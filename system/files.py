"""Files: written whole or not at all, named by what they hold."""

import contextlib
import errno
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from system.errors import require


def fingerprint(value: Any) -> str:
    """Twelve hexadecimal digits that depend on the JSON form of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def read_json(file: Path, object_hook: Callable[[dict], dict] | None = None) -> dict[str, Any]:
    """The object in a JSON file that others made. Raises ValueError if it cannot be read, whatever
    is in it; numbers in it can be infinite, NaN, or of up to 4,300 digits."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_hook=object_hook)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: of too many digits, too
        if file.is_file():
            require_content(file)
        why = str(error).split(";")[0]
        raise ValueError(f"{file} cannot be read as JSON ({why}); copy it again") from error
    require(isinstance(content, dict), f"{file} holds no JSON object; copy it again")
    return content


def write_json(file: Path, content: Any, indent: int | None = 1) -> None:
    """A value as a JSON file, whole or not at all."""
    write_whole(file, lambda f: f.write((json.dumps(content, indent=indent) + "\n").encode()))


def write_figures(file: Path, figures: dict[str, Any], indent: int | None = 1) -> None:
    """Figures as JSON. One observation has no interval: its bounds are NaN, which is no JSON, so
    null stands there."""
    plain = json.loads(json.dumps(figures), parse_constant=lambda _: None)
    write_json(file, plain, indent)


def read_figures(file: Path) -> dict[str, Any]:
    """What `write_figures` wrote, such bounds as NaN again. Raises as `read_json` does."""
    return read_json(file, lambda leaf: leaf | {
        bound: math.nan for bound in ("low", "high") if leaf.get(bound, 0) is None})


def read_log(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects in the lines of a log of steps, and how many lines hold none: a crash leaves half
    a line, a blank one or zero bytes, also before a line that is whole."""
    found, lines = [], file.read_bytes().splitlines()
    for line in lines:
        try:
            value = json.loads(line.strip(b"\0"))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and type(value.get("step")) is int:
            found.append(value)
    return found, len(lines) - len(found)


def require_content(file: Path) -> None:
    """Raises ValueError if a file is only the pointer that Git LFS puts in a large file's place."""
    with open(file, "rb") as f:
        pointer = f.read(30).startswith(b"version https://git-lfs")
    require(not pointer, f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` "
            "where it was cloned, or copy the file")


def sha256(file: Path) -> str:
    """Checksum of a file's bytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises OSError, which names the folder, for what libraries raise where a disk is full."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        why = f"cannot be written ({str(error).splitlines()[0]}); is the disk full?"
        raise OSError(errno.EIO, why, str(folder)) from error


def write_whole(file: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file aside and rename it: whoever looks for it finds all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{random.randrange(10**9)}.partial")
    with open(partial, "wb") as f:
        write(f)
    partial.replace(file)
