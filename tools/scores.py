"""Compare the importance scores of every axis on a trained model: `python -m tools.scores RUN`."""

import sys
from pathlib import Path

import tyro

from evals import score_table
from system.errors import exit_code
from system.rundir import load_run
from text.corpus import Corpus


def scores(run: tyro.conf.Positional[Path]) -> None:
    """Compare the importance scores of every axis on a trained model (a base, or any other run).

    Args:
        run: Folder of the run.
    """
    model, _, config = load_run(run)
    for axis, losses in score_table(model, Corpus.load(config.data), config).items():
        print(f"{axis:>15}  " + "  ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items()))


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 if refused."""
    return exit_code(lambda: tyro.cli(scores, args=argv, prog="python -m tools.scores"))


if __name__ == "__main__":
    sys.exit(main())
