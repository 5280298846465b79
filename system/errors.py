"""What a user can cause ends in one sentence: the value, the rule, the remedy."""

import sys
from collections.abc import Callable
from typing import Any


def require(condition: Any, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def exit_code(program: Callable[[], Any]) -> int:
    """Run a command line: 0, or 2 and a message on stderr for what a user can cause: a ValueError,
    a path of no use."""
    try:
        program()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {path_and_reason(error)}; give another path, or mend this one", file=sys.stderr
        )
        return 2
    return 0


def path_and_reason(error: OSError) -> str:
    """`FILE: reason` of an error that names its file, else its own text."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
