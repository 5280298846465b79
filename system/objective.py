"""What `loop.fit` asks of a training objective, and the plainest one: next-token prediction."""

import torch
from torch import Tensor

from kernels import selected_logp
from model import HybridLM


class Objective:
    """The defaults do nothing; an objective replaces what it needs.

    n_updates: optimizer steps from each batch. runs_whole: the loss takes the weights apart, so
    that sharded ones must be gathered for it (see parallel.py).
    """

    n_updates = 1
    runs_whole = False

    def prepare(
        self, model: HybridLM, batch: dict[str, Tensor], step: int, generator: torch.Generator) -> dict:
        """What the updates need of a batch, made once: all sampling belongs here."""
        return batch

    def loss(self, model: HybridLM, batch: dict) -> tuple[Tensor, int, dict[str, Tensor]]:
        """A sum, the count to divide it by, and means to log. `loop.fit` divides by the count of
        the whole step."""
        raise NotImplementedError

    def after_step(self, model: HybridLM) -> None:
        """Called after every optimizer step."""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimizers of weights that train beside the model's."""
        return []

    def networks(self) -> dict[str, torch.nn.Module]:
        """Networks beside the model that a checkpoint must hold."""
        return {}

    def expect(self, model: HybridLM, names: list[str]) -> None:
        """Make the networks that a checkpoint holds under these names, so that their weights can be
        loaded."""


class NextToken(Objective):
    """Cross-entropy of the next token."""

    def loss(
        self, model: HybridLM, batch: dict[str, Tensor]) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Sum of the cross-entropies in nats, number of targets (those of -100 count for nothing),
        metrics."""
        hidden_BTD, _ = model(batch["tokens_BT"], ids_BT=batch["ids_BT"])
        inside = batch["targets_BT"] != -100
        logp = selected_logp(hidden_BTD[inside], model.output_matrix, batch["targets_BT"][inside])
        return -logp.sum(), len(logp), {}
