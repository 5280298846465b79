"""Muon: torch's steps in fp32 on a CPU, orthogonal results, states that torch's own can read."""

import pytest
import torch
from torch.testing import assert_close

from system.muon import Muon, orthogonalized

SHAPES = [(48, 16), (16, 48), (24, 24)]
COEFFICIENTS = (3.4445, -4.775, 2.0315)


def gradients(shape, n=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(n)]


def train(kind, shape):
    p = torch.nn.Parameter(torch.ones(shape))
    optimizer = kind([p], lr=0.1, weight_decay=0.2)
    for g in gradients(shape):
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), optimizer


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_torch_but_for_its_bf16(shape):
    """Three steps with momentum and decay; bf16 has 8 bits, of which five products keep about 5."""
    (ours, _), (theirs, _) = train(Muon, shape), train(torch.optim.Muon, shape)
    moved = (theirs - 0.98**3).norm()
    assert 0 < (ours - theirs).norm() < 0.03 * moved


@pytest.mark.parametrize("shape", SHAPES)
def test_every_product_on_a_cpu_is_of_fp32_numbers(shape):
    """A processor without bf16 instructions emulates them, thirty times slower."""
    seen = []

    class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            seen.extend([str(function), t.dtype] for t in (*args, out) if isinstance(t, torch.Tensor))
            return out

    with Recorded():
        train(Muon, shape)
    assert sum("mm" in name for name, _ in seen) > 30
    assert {dtype for _, dtype in seen} == {torch.float32}


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_near_one_and_directions_stay(shape):
    update = gradients(shape, 1)[0]
    found = orthogonalized(update, COEFFICIENTS, 5, 1e-7)
    values = torch.linalg.svdvals(found)
    assert found.shape == update.shape
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    inside = left.T @ found @ right.T
    assert_close(inside - torch.diag(inside.diagonal()), torch.zeros_like(inside), rtol=0, atol=1e-4)


def test_states_are_those_of_torch():
    _, ours = train(Muon, SHAPES[0])
    _, theirs = train(torch.optim.Muon, SHAPES[0])
    theirs.load_state_dict(ours.state_dict())
    assert_close(theirs.state_dict()["state"], ours.state_dict()["state"])
