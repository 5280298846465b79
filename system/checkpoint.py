"""Checkpoints that survive crashes: written aside and renamed, verified on loading, two kept.

    RUN/checkpoint/step_000200/
        meta.json                what the caller says of it, and the size and SHA-256 of every file
        model.safetensors        and one such file for each other network (the EMA teacher)
        optimizer.pt             optimizer states, read with weights_only=True: no code is run

A folder without a complete meta.json, or with a file that does not match it, is not a checkpoint:
loading names it and takes the one before. Where weights are sharded over processes (parallel.py),
each writes its part, as torch.distributed.checkpoint does, and the first meta.json at the end:

        shards/                  every tensor, as NETWORK/NAME and optimizer/N/PARAMETER/NAME
        optimizer.pt             the rest of the optimizer states: rates and other settings

Either format is read by any number of processes, sharded or not, into the tensors that are there.
All processes must see the same run folder.
"""

import json
import os
import pickle
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from system import lora, parallel
from system.errors import require
from system.files import read_json, sha256, writing

KEEP = 2
# What torch's description of shards is made of, beside dtypes.
DESCRIPTION = {
    "collections.OrderedDict", "pathlib.PosixPath", "pathlib.WindowsPath", "torch.Size",
    "torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout",
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in (
        "Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata",
        "BytesStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"))}


@dataclass
class Checkpoint:
    """A verified checkpoint: its folder and what its meta.json says."""

    path: Path
    meta: dict[str, Any]
    warning: str = ""  # which newer checkpoint is damaged, if any

    def networks(self) -> list[str]:
        """Names of the networks that it holds."""
        if self.is_sharded:
            return sorted({key.split("/")[0] for key in self._sizes()} - {"optimizer"})
        return sorted(file.stem for file in self.path.glob("*.safetensors"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """State dict of a network, whole, on the CPU."""
        if not self.is_sharded:
            return load_file(self.path / f"{name}.safetensors")
        tensors = self._empty(name)
        self._read({f"{name}/{k}": t for k, t in tensors.items()}, alone=True)
        return tensors

    def weights(self) -> dict[str, Tensor]:
        """State dict of the model that was trained, with its adapters merged if it has any."""
        settings = self.meta.get("config", {}).get("lora")
        tensors = self.tensors("model")
        return lora.merged(tensors, settings["alpha"]) if settings else tensors

    def optimizer(self) -> Any:
        """What was given to `save` as optimizer state; without the tensors, if they are sharded."""
        return torch.load(self.path / "optimizer.pt", weights_only=True, map_location="cpu")

    def fill(self, network: nn.Module, name: str) -> None:
        """Copy weights into a network, sharded or not. Raises ValueError if the shapes differ."""
        targets = network.state_dict()
        if self.is_sharded:
            shapes = {k: tuple(t.shape) for k, t in targets.items()}
            check_shapes(self._empty(name, "meta"), shapes, self.path)
            self._read({f"{name}/{k}": t for k, t in targets.items()})
        elif not any(isinstance(t, DTensor) for t in targets.values()):
            load_weights(network, self.tensors(name), self.path)
        else:
            with safe_open(self.path / f"{name}.safetensors", "pt") as file, torch.no_grad():
                for key, target in targets.items():
                    target.copy_(parallel.like(file.get_tensor(key), target))

    def fill_optimizers(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Give optimizers the states that they had, sharded as their parameters are now."""
        for n, (optimizer, saved) in enumerate(zip(optimizers, self.optimizer(), strict=True)):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for i, values in saved["state"].items():  # empty if they are sharded
                p = parameters[i]
                state[i] = {k: parallel.like(t, p) if t.shape == p.shape else t
                            for k, t in values.items()}
            if self.is_sharded:
                for key, held in self._sizes(f"optimizer/{n}/").items():
                    place, name = key.split("/")
                    p = parameters[int(place)]
                    like = p if held.size == p.shape else torch.empty(held.size)
                    value = torch.zeros_like(like, dtype=held.properties.dtype).detach()
                    state.setdefault(int(place), {})[name] = value
                self._read({f"optimizer/{n}/{i}/{k}": t
                            for i, values in state.items() for k, t in values.items()})
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})

    @property
    def is_sharded(self) -> bool:
        """Whether processes wrote parts of it."""
        return (self.path / "shards").is_dir()

    def _sizes(self, prefix: str = "") -> dict[str, TensorStorageMetadata]:
        """What shards hold under a prefix, by the rest of the name."""
        sizes = _SafeReader(self.path / "shards").read_metadata().state_dict_metadata
        return {k.removeprefix(prefix): v for k, v in sizes.items() if k.startswith(prefix)}

    def _empty(self, name: str, device: str = "cpu") -> dict[str, Tensor]:
        """Room for the whole tensors of a network."""
        return {k: torch.empty(v.size, dtype=v.properties.dtype, device=device)
                for k, v in self._sizes(f"{name}/").items()}

    def _read(self, targets: dict[str, Tensor], alone: bool = False) -> None:
        """Into the tensors, each process its part; alone: one process asks without the others."""
        if targets:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(targets, storage_reader=_SafeReader(self.path / "shards"),
                     no_dist=alone or parallel.team.world == 1)


class _Unpickler(pickle.Unpickler):
    """Reads torch's description of shards: no other class is ever looked up, no other code runs."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises UnpicklingError for what does not belong there."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or f"{module}.{name}" in DESCRIPTION:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"{module}.{name} does not belong into the description of a checkpoint")


class _SafeReader(dcp.FileSystemReader):
    """Of torch, but for the unpickling."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The description of all shards."""
        with open(Path(self.path) / ".metadata", "rb") as f:
            metadata = _Unpickler(f).load()
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def save(run_dir: Path, step: int, networks: dict[str, nn.Module], optimizer: list[dict],
         meta: dict[str, Any]) -> Path:
    """All processes write RUN/checkpoint/step_N, whole or not at all; drop all but the newest KEEP.
    Returns the folder. Args: optimizer: a state dict of each optimizer."""
    final = run_dir / "checkpoint" / f"step_{step:06d}"
    partial = final.with_suffix(".partial")
    sharded = any(isinstance(p, DTensor) for net in networks.values() for p in net.parameters())

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write_whole() -> None:
        weights = {name: {k: v.contiguous() for k, v in network.state_dict().items()}
                   for name, network in networks.items()}
        with writing(partial):
            for name, tensors in weights.items():
                save_file(tensors, partial / f"{name}.safetensors")
            torch.save(optimizer, partial / "optimizer.pt")

    def finish() -> None:
        named = {str(f.relative_to(partial)) for f in partial.rglob("*") if f.is_file()}
        files = {name: known.get(name) or _file_facts(partial / name) for name in sorted(named)}
        with open(partial / "meta.json", "w") as f:
            json.dump({"step": step, "files": files, **meta}, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in _folders(run_dir)[KEEP:]:
            shutil.rmtree(old)

    known: dict[str, dict] = {}
    parallel.on_first(begin)
    if sharded:
        for facts in parallel.everyone(_write_shards(partial, networks, optimizer)):
            known |= facts
    else:
        parallel.on_first(write_whole)
    parallel.on_first(finish)
    return final


def _write_shards(partial: Path, networks: dict[str, nn.Module],
                  optimizer: list[dict]) -> dict[str, dict]:
    """This process's part of a checkpoint. Returns its files' facts: hashing is shared out too."""
    tensors = {f"{name}/{k}": t for name, network in networks.items()
               for k, t in network.state_dict().items()}
    for n, state in enumerate(optimizer):
        tensors |= {f"optimizer/{n}/{i}/{k}": t for i, values in state["state"].items()
                    for k, t in values.items()}
    with writing(partial):
        try:
            dcp.save(tensors, checkpoint_id=partial / "shards")
        except CheckpointException as error:  # no Exception: by process, what went wrong there
            raise next(iter(error.failures.values()))[0] from None
        if parallel.is_first():
            torch.save([{"state": {}, "param_groups": state["param_groups"]}
                        for state in optimizer], partial / "optimizer.pt")
    mine = (partial / "shards").glob(f"__{parallel.team.rank}_*")
    return {f"shards/{file.name}": _file_facts(file) for file in mine}


def newest(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint, None if there are none. Raises ValueError if all are damaged."""
    damage = []
    for path in _folders(run_dir):
        problem = _problem(path)
        if problem is None:
            meta = read_json(path / "meta.json")
            warning = f"{'; '.join(damage)}: going on from {path} instead" if damage else ""
            return Checkpoint(path, meta, warning)
        damage.append(problem)
    require(not damage, f"no usable checkpoint in {run_dir}: {'; '.join(damage)}; train again into "
            "another folder")
    return None


def load_weights(network: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy a state dict into a network. Raises ValueError if they do not fit (`check_shapes`)."""
    shapes = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    check_shapes(tensors, shapes, source)
    network.load_state_dict(tensors)


def check_shapes(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], source: Path,
                 remedy: str = "use the settings it was made with") -> None:
    """Raises ValueError that names the first five tensors that are missing, unknown, misshapen."""
    wrong = [f"{k} is missing" for k in shapes if k not in tensors]
    wrong += [f"{k} is unknown" for k in tensors if k not in shapes]
    wrong += [f"{k} has shape {list(tensors[k].shape)}, the model needs {list(shape)}"
              for k, shape in shapes.items() if k in tensors and tuple(tensors[k].shape) != shape]
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    require(not wrong, f"{source} does not fit the model: {'; '.join(wrong[:5])}{more}; {remedy}")


def _folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = (run_dir / "checkpoint").glob("step_*")
    whole = (p for p in found if re.fullmatch(r"step_\d+", p.name))
    return sorted(whole, key=lambda p: int(p.name[5:]), reverse=True)


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, None if nothing is."""
    try:
        files = read_json(path / "meta.json")["files"]
    except (ValueError, KeyError):
        return f"{path} has no readable meta.json"
    for name, expected in files.items():
        file = path / name
        if not file.exists():
            return f"{file} is missing"
        if (n_bytes := file.stat().st_size) != expected["bytes"]:
            return f"{file} has {n_bytes} bytes instead of {expected['bytes']} (truncated)"
        if sha256(file) != expected["sha256"]:
            return f"{file} does not match its checksum"
    return None


def _file_facts(file: Path) -> dict[str, Any]:
    """What meta.json says of a file."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}
