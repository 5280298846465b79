"""LoRA (arXiv 2106.09685): the weights stay as they are, and linear maps learn a thin difference.

    h = W x + (alpha / r) B A x        W [out, in] frozen, A [r, in], B [out, r]

A begins random and B at 0, so a run begins with the base bit for bit, and a network with B = 0 is
the base again. Every linear map inside the layers has a pair; embedding, head, norms and all that
is no linear map stay frozen. Gradients are those of the weight W + (alpha / r) B A, projected:
dL/dB = (alpha / r) dL/dW A^T and dL/dA = (alpha / r) B^T dL/dW. Copies (a teacher, a reference)
share what is frozen: `parallel.frozen_copy`. Checkpoints hold W, A and B; `merged` is what a run
hands on. Not here: dropout, other ranks for other layers, adapters of embeddings.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from system.config import LoRAConfig


class LoRALinear(nn.Module):
    """A linear map with its adapter. It keeps the names `weight` and `bias`."""

    def __init__(self, base: nn.Linear, settings: LoRAConfig):
        super().__init__()
        (n_out, n_in), rank = base.weight.shape, settings.rank
        self.weight, self.bias, self.scale = base.weight, base.bias, settings.alpha / rank
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, n_in).normal_(0.0, n_in**-0.5))
        self.lora_b = nn.Parameter(base.weight.new_zeros(n_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        """h, [..., in] to [..., out]."""
        return linear(x, self.weight, self.bias, *adapter(self))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, a: Tensor | None = None,
           b: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """W x + bias, and where there is an adapter scale B A x. A frozen W may be in bf16: it works in
    the dtype of x, as autocast has it do by itself."""
    if a is None:
        return F.linear(x, weight, bias)
    if not torch.is_autocast_enabled(x.device.type):
        weight = weight.to(x.dtype)
    return F.linear(x, weight, bias) + F.linear(scale * F.linear(x, a), b)


def adapter(module: nn.Module) -> tuple:
    """(A, B, alpha / r) of a linear map; () if it has none."""
    if isinstance(module, LoRALinear):
        return module.lora_a, module.lora_b, module.scale
    return ()


def adapt(model: nn.Module, settings: LoRAConfig, low: bool = False) -> nn.Module:
    """Freeze the model, in place, and give each linear map in its layers an adapter, which trains.
    low: the frozen matrices of those maps are kept in bf16. Returns the model."""
    model.requires_grad_(False)
    model.lora = settings
    for parent in list(model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, settings))
                child.weight.data = child.weight.data.bfloat16() if low else child.weight.data
    return model


def loses(model: nn.Module) -> bool:
    """Whether a matrix that `adapt` would keep in bf16 has digits that bf16 lacks."""
    return any((m.weight.bfloat16() != m.weight).any() for m in model.layers.modules()
               if isinstance(m, nn.Linear))


def shared(network: nn.Module) -> set[str]:
    """Names of the weights that copies of a network share: those that an adapted one freezes."""
    names = network.state_dict() if hasattr(network, "lora") else ()
    return {name for name in names if "lora_" not in name}


@torch.no_grad()
def reset(network: nn.Module) -> nn.Module:
    """B <- 0: the base. Returns the network."""
    for name, p in network.named_parameters():
        if name.endswith("lora_b"):
            p.zero_()
    return network


def merged(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A state dict with W + (alpha / r) B A in the place of W, A and B."""
    found = {}
    for name, weight in tensors.items():
        stem = name.removesuffix("weight")
        if (a := tensors.get(f"{stem}lora_a")) is not None:
            weight = weight.to(a.dtype) + alpha / len(a) * tensors[f"{stem}lora_b"] @ a
        if "lora_" not in name:
            found[name] = weight
    return found
