"""Compare the importance scores of every axis on a trained model: `python -m tools.scores RUN`."""

import sys
from pathlib import Path

import torch
import tyro

from evals import compare, to_device
from importance import score_table
from model import HybridLM
from system.config import Config
from system.errors import exit_code, require
from system.rundir import load_run
from text.batches import mixture
from text.corpus import Corpus


def table_of(model: HybridLM, corpus: Corpus, config: Config) -> dict[str, dict[str, float]]:
    """`score_table`, ranked on training text, measured on the validation split."""
    c, n = config.elastic, config.elastic.seq_len
    ranked_on = to_device(mixture(corpus, config, 10**6, c.calibration_rows, n), model)
    held_out = [to_device(mixture(corpus, config, i, 16, n, "val"), model) for i in range(6)]

    def loss(small: HybridLM) -> float:
        return float(torch.cat([compare([small], b)[0]["loss_nats"] for b in held_out]).mean())

    return score_table(model, [ranked_on], c, loss)


def scores(run: tyro.conf.Positional[Path]) -> None:
    """Compare the importance scores of every axis on a trained model (a base, or any other run).

    Args:
        run: Folder of the run.
    """
    model, _, config = load_run(run)
    require(not config.model.widths, f"{run} is one size of a family, which has no widths left to "
            "choose; give the run that it was cut from")
    for axis, losses in table_of(model, Corpus.load(config.data), config).items():
        print(f"{axis:>15}  " + "  ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items()))


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 if refused."""
    return exit_code(lambda: tyro.cli(scores, args=argv, prog="python -m tools.scores"))


if __name__ == "__main__":
    sys.exit(main())
