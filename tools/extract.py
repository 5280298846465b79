"""Cut a size out of an elastic run: `python -m tools.extract RUN --budget B --out DIR`."""

import sys
from pathlib import Path

import tyro

import elastic
from system.errors import exit_code


def extract(run: tyro.conf.Positional[Path], budget: float, out: Path) -> None:
    """Cut the model of one budget out of an elastic run; nothing is trained.

    Args:
        run: Folder of a run of --mode elastic.
        budget: A fraction of the full model's cost, or above 1 an absolute cost.
        out: Folder to write; generate.py and --init take it like any run.
    """
    f = elastic.extract(run, budget, out)
    print(f"{out}: {f['parameters']:,} parameters in {f['seconds']:.2f} s, {f['widths']}")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 if refused."""
    return exit_code(lambda: tyro.cli(extract, args=argv, prog="python -m tools.extract"))


if __name__ == "__main__":
    sys.exit(main())
