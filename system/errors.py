"""What a user can cause ends in one sentence: the value, the rule, the remedy."""

import sys
from collections.abc import Callable
from typing import Any


def require(condition: Any, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def exit_code(program: Callable[[], Any]) -> int:
    """Run a command line. Returns 0, or 2 after a message for a ValueError or an unusable path."""
    try:
        program()
    except (ValueError, OSError) as error:
        remedy = "; give another path, or mend this one" if isinstance(error, OSError) else ""
        print(f"error: {path_and_reason(error)}{remedy}", file=sys.stderr)
        return 2
    return 0


def path_and_reason(error: Exception) -> str:
    """`FILE: reason` of an error that names its file, else its own text."""
    return f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
