"""Several processes, one run: the process group, sharding from outside, sums over all processes.

`torchrun --nproc-per-node 8 train.py ...` starts the same program once per GPU and tells each copy
its rank through the environment, which only this file reads. For a process that is alone every
function here does nothing.

    rows        rank r of n takes the r-th part of every batch, which is a function of (seed, step)
    loss        sums of losses and gradients over all processes, divided by the count over all
    rollouts    sampled from unsharded weights, gathered once a step: ranks decode for different
                numbers of tokens, and FSDP's own gathering would wait for the shortest for ever

How to read: `start`, then `shard`, which gives `loop.fit` the network that it trains. Two ways:

* data: all weights on every process; `sum_gradients` adds up what the backward passes left.
* fsdp: FSDP2 keeps 1/W of every matrix, its optimizer state and the teacher on each process, and
gathers a block while it works; vectors stay whole. Elastic cuts a smaller model's block out of what
was gathered, with the same budgets in the same order on every process.

Weights, optimizer states and teacher are fp32. With dtype bf16, matrix products run in bf16
(`compute`): a step of 1e-6 moves 2 % of bf16 weights, and a moving average of 0.999 none. Not here:
tensor, pipeline, sequence or expert parallelism.
"""

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint as recompute

from system import lora
from system.config import FitConfig, ParallelConfig
from system.costs import count_parameters
from system.errors import require

FSDP_FROM = 500_000_000  # parameters from which mode "auto" shards
# Graphs of `Block.run` that the compiler keeps, of all kinds of blocks and shapes together. After
# its default of 8 it gives up, and the rest of the run is not compiled.
GRAPHS = 64


@dataclass
class Team:
    """The processes of the run, as this one sees them."""

    rank: int
    world: int
    device: torch.device
    settings: ParallelConfig
    gathered: dict | None = None  # what `whole` has found, inside `gathering_once`


team = Team(0, 1, torch.device("cpu"), ParallelConfig())


# -------------------------------------------------------------------------------- the process group


def start(settings: ParallelConfig, device: torch.device) -> torch.device:
    """Join the processes that torchrun started. Returns this one's device, of the type given.
    Raises ValueError if there are more processes than GPUs on a machine, or none for its graphs."""
    require(not settings.cuda_graphs or device.type == "cuda",
            f"parallel.cuda_graphs needs a GPU, and this run is on {device.type}; leave it out")
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    rank, world, local = (int(os.environ.get(name, value)) for name, value in defaults.items())
    if device.type == "cuda" and world > 1:
        n = torch.cuda.device_count()
        if local >= n:
            raise ValueError(f"torchrun started process {local + 1} on a machine with {n} GPUs; "
                             f"lower --nproc-per-node to {n}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank,
                                world_size=world, timeout=timedelta(seconds=settings.timeout_s))
    team.rank, team.world, team.device, team.settings = rank, world, device, settings
    return device


def stop() -> None:
    """Leave the others, without waiting. A later run in the same process is alone."""
    if dist.is_initialized():
        dist.destroy_process_group()
    team.rank, team.world, team.settings = 0, 1, ParallelConfig()


def leave(code: int) -> int:
    """End this process with the code if torchrun started it, else return it. There is no clean-up:
    after an error the others may never answer, and threads of the group may still run, which C++
    turns into an abort."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def part(network: nn.Module) -> bool:
    """After training: whether this process goes on, to measure and write. Only the first does; what
    was sharded waits in host memory from here on, until it is `visiting`."""
    goes_on = is_first()
    if shards(count_parameters(network)):
        network.to("cpu" if goes_on else "meta")
    barrier()
    stop()
    return goes_on


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return team.rank == 0


def barrier() -> None:
    """Wait for all processes."""
    everyone(None)


def everyone(value: Any) -> list[Any]:
    """The value of every process, by rank: small plain things only."""
    if team.world == 1:
        return [value]
    values: list[Any] = [None] * team.world
    dist.all_gather_object(values, value)
    return values


def on_first(function: Callable[[], Any]) -> Any:
    """What the function returns or raises (ValueError, OSError) on the first process, on all."""
    if team.world == 1:
        return function()
    answer: list[Any] = [None, None]
    if is_first():
        try:
            answer[0] = function()
        except (ValueError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, device=team.device)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def in_turn(function: Callable[[], Any]) -> Any:
    """Call the function on the first process, then on the others, which find the files it left."""
    mine = []
    on_first(lambda: mine.append(function()))
    return mine[0] if mine else function()


def is_lost(error: Exception) -> bool:
    """Whether an error says that another process has ended or does not answer."""
    signs = "closed by peer", "reset by peer", "Broken pipe", "gloo", "NCCL", "imed out", "TCPStore"
    said = isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
    return team.world > 1 and said


def parts_of(settings: FitConfig) -> range:
    """The parts of a step's batch that this process runs: `accumulate` of them."""
    return range(team.rank * settings.accumulate, (team.rank + 1) * settings.accumulate)


# -------------------------------------------------------------------------------- dressing networks


def compute() -> contextlib.AbstractContextManager:
    """Inside, matrix products run in the dtype of the settings. Not one context for sampling and
    the loss: autocast would reuse in the loss the casts that were made without gradients."""
    if team.settings.dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(team.device.type, torch.bfloat16)


def exactly() -> contextlib.AbstractContextManager:
    """Inside `compute`, for what must not be rounded to bf16."""
    return torch.autocast(team.device.type, enabled=False)


def shards(n_parameters: int) -> bool:
    """Whether a network of so many parameters is sharded."""
    mode = team.settings.mode
    return team.world > 1 and (mode == "fsdp" or (mode == "auto" and n_parameters >= FSDP_FROM))


def shard(network: nn.Module) -> nn.Module:
    """The network to train in place of this: itself, or dressed (recomputed, compiled, sharded).
    All get the first process's weights. A dressed one shares memory with the one given; a sharded
    one takes the weights over until `collect` brings them back."""
    c, is_sharded = team.settings, shards(count_parameters(network))
    broadcast(network)
    if not (is_sharded or c.activation_checkpointing or c.compile):
        return network
    dressed = undressed(network, network.state_dict(), trains=True)
    dressed.dressed = True
    for block in dressed.layers:
        if c.activation_checkpointing:
            block.forward = functools.partial(recompute, block.forward, use_reentrant=False)
        if c.compile:
            block.run = torch.compile(block.run, recompile_limit=GRAPHS)
    if is_sharded:
        network.to("meta")
        take_shares(dressed)
    return dressed


def take_shares(network: nn.Module) -> None:
    """Keep this process's share of the matrices, in place; the whole is gathered block by block."""
    # The warning is of in-place changes to a block's output: there are none here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    options = {"mesh": init_device_mesh(team.device.type, (team.world,)),
               "ignored_params": {p for p in network.parameters() if p.dim() < 2}}
    is_low = team.settings.dtype == "bf16"
    low, sums = (torch.bfloat16, torch.float32) if is_low else (None, None)
    cast = MixedPrecisionPolicy(low, sums, cast_forward_inputs=False)
    for block in network.layers:
        fully_shard(block, mp_policy=cast, **options)
    # Embedding and head stay: `logits` needs them after forward, and so may another pass.
    fully_shard(network, reshard_after_forward=False, **options)
    network.set_reshard_after_backward(False, recurse=False)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the sum: `fit` divides by the count
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def frozen_twin(network: nn.Module) -> nn.Module:
    """A frozen copy, to run beside a network that `shard` is still to be given: sharded if that
    will be, without ever being there twice as a whole."""
    if not shards(count_parameters(network)):
        return frozen_copy(network)
    weights = {name: p if p.dim() > 1 else p.clone() for name, p in network.state_dict().items()}
    twin = undressed(network, weights, trains=False)
    take_shares(twin)
    twin.dressed = True
    return twin


def undressed(network: nn.Module, weights: dict[str, Tensor], trains: bool) -> nn.Module:
    """An undressed network of the same shape that takes these weights over."""
    plain = next(c for c in type(network).__mro__ if not issubclass(c, FSDPModule))
    with torch.device("meta"):
        made = plain(network.config)
        if hasattr(network, "lora"):
            lora.adapt(made, network.lora)
    made.load_state_dict(weights, assign=True)
    return made if trains else made.requires_grad_(False)


def sent(t: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on a device. A card is not waited for: it copies pinned memory
    when it gets there."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def reshard(network: nn.Module) -> None:
    """Give up what FSDP has gathered."""
    if isinstance(network, FSDPModule):
        network.reshard()


def is_dressed(network: nn.Module) -> bool:
    """Whether `shard` has changed it, or it is a copy of such a one."""
    return getattr(network, "dressed", False)


@torch.no_grad()
def whole(network: nn.Module, for_sampling: bool = False) -> nn.Module:
    """The network undressed and unsharded: itself, or one that shares or gathers its weights; those
    of layers and head, for_sampling, in the dtype of `compute`, so that no step casts them."""
    low = for_sampling and team.settings.dtype == "bf16"
    if not is_dressed(network) and not low:
        return network
    known = {} if team.gathered is None else team.gathered

    if (network, low) not in known:
        weights = ((name, full_weight(p)) for name, p in network.state_dict().items())
        known[network, low] = ready(network, weights, low)
    return known[network, low]


def full_weight(p: Tensor) -> Tensor:
    """A weight as a whole, gathered if it is sharded."""
    return p.full_tensor() if isinstance(p, DTensor) else p


def ready(network: nn.Module, weights: Iterable[tuple[str, Tensor]], low: bool) -> nn.Module:
    """A frozen network of these weights, by name, one after the other; low: matrices that products
    read, of layers and the head, are bf16. A tied head has one of its own then, for the embedding
    stays fp32."""
    made = undressed(network, {
        name: t.bfloat16() if low and t.dim() == 2 and "conv" not in name
        and not name.startswith("embed") else t for name, t in weights}, trains=False)
    if low and getattr(made, "head", made) is None:
        made.head = nn.Linear(*made.embed.weight.shape[::-1], bias=False, device="meta")
        made.head.weight = nn.Parameter(made.embed.weight.bfloat16(), requires_grad=False)
    return made


@torch.no_grad()
def in_host_memory(network: nn.Module) -> nn.Module:
    """A frozen copy of a sharded network, whole: in the first process's host memory, gathered
    weight by weight; on the others without data. What is not sharded stays on its device."""
    if not any(isinstance(p, DTensor) for p in network.parameters()):
        return whole(network)
    home = "cpu" if is_first() else "meta"
    weights = {name: full_weight(p).to(home) for name, p in network.state_dict().items()}
    return undressed(network, weights, trains=False)


def waits(network: nn.Module) -> bool:
    """Whether the network is in host memory, and this process's device is another."""
    return device_of(network).type == "cpu" != team.device.type


@contextlib.contextmanager
def visiting(network: nn.Module, low: bool) -> Iterator[nn.Module]:
    """Inside, the network on this process's device: itself, in fp32, or a frozen copy of one that
    waits in host memory, so that the device needs no room for all at once. low: the copy computes
    in bf16."""
    if not waits(network):
        yield network
        return
    weights = ((name, t.to(team.device)) for name, t in network.state_dict().items())
    with torch.autocast(team.device.type, torch.bfloat16, enabled=low):
        yield ready(network, weights, low)


@contextlib.contextmanager
def gathering_once() -> Iterator[None]:
    """Inside, while weights do not change, `whole` gathers each network once."""
    team.gathered = {}
    try:
        yield
    finally:
        team.gathered = None


@torch.no_grad()
def frozen_copy(network: nn.Module) -> nn.Module:
    """A copy in memory of its own that does not train; sharded like the network, to be gathered. It
    shares what adapters leave as it is."""
    shared = lora.shared(network)
    weights = {name: p.detach() if name in shared else p.detach().clone()
               for name, p in network.state_dict().items()}
    copied = undressed(network, weights, trains=False)
    copied.dressed = is_dressed(network)
    return copied


def collect(trained: nn.Module, network: nn.Module, others: dict[str, nn.Module]) -> None:
    """After training: the weights back into what `shard` was given; the others whole, in place."""
    for name, other in others.items():
        others[name] = in_host_memory(other)
    if any(p.is_meta for p in network.parameters()):
        network.load_state_dict(whole(trained).state_dict(), assign=True)


@torch.no_grad()
def broadcast(network: nn.Module) -> None:
    """The first process's weights and buffers for all: sums in another order may differ."""
    if team.world > 1:
        for t in network.state_dict().values():
            dist.broadcast(t, 0)


# ---------------------------------------------------------------------------------------- gradients


def device_of(network: nn.Module) -> torch.device:
    """Where its weights are."""
    return next(network.parameters()).device


def local(t: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory: elementwise work needs no more."""
    return t.to_local() if isinstance(t, DTensor) else t


def like(full: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, which all processes have, as the target is: sharded, on its device."""
    if not isinstance(target, DTensor):
        return full.to(target.device)
    return distribute_tensor(
        full.to(team.device), target.device_mesh, target.placements, src_data_rank=None)


def total(t: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on all."""
    if team.world == 1:
        return t
    summed = t.to(team.device, copy=True)
    dist.all_reduce(summed)
    return summed.to(t.device)


@torch.no_grad()
def sum_gradients(parameters: list[nn.Parameter], at_once: int = 2**26) -> None:
    """Sum the gradients of all processes where FSDP has not; None stays None if all have None."""
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    if team.world == 1 or not plain:
        return
    has = total(torch.tensor([float(p.grad is not None) for p in plain]))
    bucket: list[nn.Parameter] = []
    used = [p for p, n in zip(plain, has.tolist(), strict=True) if n > 0]
    for i, p in enumerate(used):
        bucket.append(p)
        is_last = i + 1 == len(used) or used[i + 1].dtype != p.dtype
        if is_last or sum(q.numel() for q in bucket) >= at_once:
            flat = torch.cat([(torch.zeros_like(q) if q.grad is None else q.grad).flatten()
                              for q in bucket])
            dist.all_reduce(flat)
            for q, grad in zip(bucket, flat.split([q.numel() for q in bucket]), strict=True):
                q.grad = grad.view_as(q)
            bucket = []


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], largest: float) -> float:
    """Scale the gradients to a norm over all weights of at most `largest`. Returns that before."""
    if not any(isinstance(p, DTensor) for p in parameters):
        return float(nn.utils.clip_grad_norm_(parameters, largest))
    trained = [p for p in parameters if p.grad is not None]
    sharded = [local(p.grad) for p in trained if isinstance(p, DTensor)]
    plain = [p.grad for p in trained if not isinstance(p, DTensor)]
    square = total(torch.stack([g.double().square().sum() for g in sharded]).sum())
    norm = float((square + sum(g.double().square().sum() for g in plain)).sqrt())
    torch._foreach_mul_(sharded + plain, min(1.0, largest / (norm + 1e-6)))
    return norm
