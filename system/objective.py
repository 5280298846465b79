"""What an objective is: it says what is learned, and `loop.fit` does the rest. In a step:

    prepare(model, batch, step, generator)   makes of a part of the batch what the updates need.
                                             All sampling belongs here, from the generator given
    loss(model, prepared)                    (sum, count, metrics) at each of n_updates steps: what
                                             is minimised is all parts' sums over all their counts
    after_step(model)                        follows every optimizer step

    sample(prepared), warning(metrics)       what to write of a batch, what to say of a step

A batch is a dict of tensors whose rows are cut into parts. A metric is a sum and its own count: the
loop logs all parts' sums over all their counts, so that the number of parts cannot change it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kernels import selected_logp
from model import LanguageModel

Metrics = dict[str, tuple[Tensor, int]]


class Objective:
    """The defaults do nothing: an objective replaces what it needs."""

    n_updates = 1  # optimizer steps from each batch
    headline = "loss"  # the metric that the progress bar shows

    def __init__(self):
        # Those beside the model, by their names in a checkpoint: what is not here is not saved,
        # restored or collected. One that is made during training is a `parallel.frozen_copy` of the
        # model: a resumed run makes it again before it loads its weights.
        self.networks: dict[str, nn.Module] = {}

    def prepare(self, model: LanguageModel, batch: dict[str, Tensor], step: int,
                generator: torch.Generator) -> dict:
        """What the updates need of a batch, made once."""
        return batch

    def loss(self, model: LanguageModel, batch: dict) -> tuple[Tensor, int, Metrics]:
        """A sum, the count that belongs to it, and metrics."""
        raise NotImplementedError

    def after_step(self, model: LanguageModel) -> None:
        """Called after every optimizer step."""

    def enough(self, model: LanguageModel, step: int) -> str:
        """Why training is over after this step, although steps are left; "" if it is not."""
        return ""

    def sample(self, prepared: dict) -> dict[str, Any] | None:
        """Rows of a part to look at, for thoughts.jsonl."""

    def warning(self, metrics: dict[str, float]) -> str | None:
        """What the reader must know, told after each step its metrics over all processes."""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimizers of weights that train beside the model's."""
        return []


class NextToken(Objective):
    """Cross-entropy of the next token."""

    def loss(self, model: LanguageModel, batch: dict) -> tuple[Tensor, int, Metrics]:
        """Sum of the cross-entropies in nats, and number of targets (those of -100 are none)."""
        hidden_BTD, _ = model(batch["tokens_BT"], ids_BT=batch["ids_BT"])
        inside = batch["targets_BT"] != -100
        logp = selected_logp(hidden_BTD[inside], model.output_matrix, batch["targets_BT"][inside])
        return -logp.sum(), len(logp), {}
