"""Compare the importance scores of every axis on a trained model: `python -m tools.scores RUN`."""

import sys
from pathlib import Path

import torch
import tyro

from evals import _logp_and_loss, to_device
from importance import score_table
from model import HybridLM
from system.config import Config
from system.errors import exit_code
from system.rundir import load_run
from text.batches import mixture
from text.corpus import Corpus


def table_of(
    model: HybridLM, corpus: Corpus, config: Config, n_random: int = 3
) -> dict[str, dict[str, float]]:
    """`score_table`, ranked on training text, measured on the validation split."""
    c = config.elastic
    ranked_on = [to_device(mixture(corpus, config, 10**6, c.calibration_rows, c.seq_len), model)]
    held_out = [
        to_device(mixture(corpus, config, i, 16, c.seq_len, "val"), model) for i in range(6)]

    @torch.no_grad()
    def loss(small: HybridLM) -> float:
        return float(torch.cat([_logp_and_loss(small, batch)[1] for batch in held_out]).mean())

    return score_table(model, ranked_on, c, loss, n_random)


def scores(run: tyro.conf.Positional[Path]) -> None:
    """Compare the importance scores of every axis on a trained model (a base, or any other run).

    Args:
        run: Folder of the run.
    """
    model, _, config = load_run(run)
    for axis, losses in table_of(model, Corpus.load(config.data), config).items():
        print(f"{axis:>15}  " + "  ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items()))


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 if refused."""
    return exit_code(lambda: tyro.cli(scores, args=argv, prog="python -m tools.scores"))


if __name__ == "__main__":
    sys.exit(main())
