"""Muon for matrices (Jordan et al. 2024): momentum, made orthogonal by five Newton-Schulz steps.

torch.optim.Muon takes them in bf16 on every device. A processor without bf16 emulates it: 148 ms
instead of 5 for a [1024, 128] matrix, most of a training step at our size. So here they are in fp32
on a CPU, in bf16 on a GPU. States and rates are torch's.
"""

import math

import torch
from torch import Tensor


def orthogonalized(update: Tensor, coefficients: tuple, steps: int, eps: float) -> Tensor:
    """Newton-Schulz: X <- a X + (b X X^T + c (X X^T)^2) X, from X = update [rows, columns] / norm.
    The singular values end near 1 (.7 to 1.2 with torch's coefficients), the directions stay."""
    a, b, c = coefficients
    x = update.float() if update.device.type == "cpu" else update.bfloat16()
    is_tall = x.shape[0] > x.shape[1]  # the smaller of X X^T and X^T X
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class Muon(torch.optim.Muon):
    """torch.optim.Muon with `orthogonalized` for its Newton-Schulz steps."""

    @torch.no_grad()
    def step(self) -> None:
        """W <- W - lr sqrt(max(1, rows / columns)) orthogonalized(Nesterov momentum)."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            weights, gradients, buffers = [], [], []
            self._init_group(group, weights, gradients, buffers)
            for p, gradient, buffer in zip(weights, gradients, buffers, strict=True):
                buffer.lerp_(gradient, 1 - momentum)
                update = orthogonalized(gradient.lerp(buffer, momentum), group["ns_coefficients"],
                                        group["ns_steps"], group["eps"])
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * math.sqrt(max(1, p.shape[0] / p.shape[1])))
