"""Files: written whole or not at all, named by what they hold."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from system.errors import require


def fingerprint(value: Any) -> str:
    """Twelve hexadecimal digits that depend on the JSON form of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file that others made. Raises ValueError if it cannot be read, whatever
    is in it; numbers in it can be infinite, NaN, or of up to 4,300 digits."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: of too many digits, too
        if file.is_file():
            require_content(file)
        why = str(error).split(";")[0]
        raise ValueError(f"{file} cannot be read as JSON ({why}); copy it again") from error
    require(isinstance(content, dict), f"{file} holds no JSON object; copy it again")
    return content


def require_content(file: Path) -> None:
    """Raises ValueError if Git has left a pointer in place of a large file."""
    with open(file, "rb") as f:
        require(not f.read(40).startswith(b"version https://git-lfs"), f"{file} is a Git LFS "
                "pointer and not the file itself; run `git lfs pull` in its folder")


def sha256(file: Path) -> str:
    """Checksum of a file's bytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_whole(file: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file aside and rename it: whoever looks for it finds all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{random.randrange(10**9)}.partial")
    with open(partial, "wb") as f:
        write(f)
    partial.replace(file)
