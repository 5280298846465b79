"""Checkpoints that survive crashes: written aside and renamed, verified on loading, the last ones kept.

    RUN/checkpoint/step_000200/
        meta.json                what the caller says of it, and the size and SHA-256 of every file
        model.safetensors        and one such file for each other network (the EMA teacher)
        optimizer.pt             optimizer states, read back with weights_only=True: no code is ever unpickled

A folder without a complete meta.json, or with a file that does not match it, is not a checkpoint: loading names it and
takes the one before.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KEEP = 2


@dataclass
class Checkpoint:
    """A verified checkpoint: its folder and what its meta.json says."""

    path: Path
    meta: dict[str, Any]
    warning: str = ""  # which newer checkpoint is damaged, if any

    def tensors(self, name: str) -> dict[str, Tensor]:
        """State dict of a network."""
        return load_file(self.path / f"{name}.safetensors")

    def optimizer(self) -> Any:
        """What was given to `save` as optimizer state."""
        return torch.load(self.path / "optimizer.pt", weights_only=True)


def save(run_dir: Path, step: int, networks: dict[str, nn.Module], optimizer: Any, meta: dict[str, Any]) -> Path:
    """Write RUN/checkpoint/step_N whole or not at all, then drop all but the newest KEEP. Returns its folder."""
    folder = run_dir / "checkpoint"
    final, partial = folder / f"step_{step:06d}", folder / f"step_{step:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, network in networks.items():
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, partial / f"{name}.safetensors")
    torch.save(optimizer, partial / "optimizer.pt")
    files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(partial.iterdir())}
    with open(partial / "meta.json", "w") as f:
        json.dump({"step": step, "files": files, **meta}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in _folders(run_dir)[KEEP:]:
        shutil.rmtree(old)
    return final


def newest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, None if there never was one.

    Raises ValueError, naming the damage, if there are checkpoints and none of them is whole.
    """
    damage = []
    for path in _folders(run_dir):
        problem = _problem(path)
        if problem is None:
            meta = json.loads((path / "meta.json").read_text())
            warning = f"{'; '.join(damage)}: going on from {path} instead" if damage else ""
            return Checkpoint(path, meta, warning)
        damage.append(problem)
    if damage:
        raise ValueError(f"no usable checkpoint in {run_dir}: {'; '.join(damage)}; train again into another folder")
    return None


def load_weights(network: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy a state dict into a network. Raises ValueError that names missing, unknown or misshapen tensors."""
    shapes = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    check_shapes(tensors, shapes, source, "use the settings it was made with")
    network.load_state_dict(tensors)


def check_shapes(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], source: Path, remedy: str) -> None:
    """Raises ValueError that names the first five tensors of `source` that are missing, unknown or misshapen."""
    wrong = [f"{k} is missing" for k in shapes if k not in tensors]
    wrong += [f"{k} is unknown" for k in tensors if k not in shapes]
    wrong += [
        f"{k} has shape {list(tensors[k].shape)}, the model needs {list(shape)}"
        for k, shape in shapes.items()
        if k in tensors and tuple(tensors[k].shape) != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{source} does not fit the model: {'; '.join(wrong[:5])}{more}; {remedy}")


def _folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in (run_dir / "checkpoint").glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, None if nothing is."""
    try:
        files = json.loads((path / "meta.json").read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"{path} has no readable meta.json"
    for name, expected in files.items():
        file = path / name
        if not file.exists():
            return f"{file} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{file} has {file.stat().st_size} bytes instead of {expected['bytes']} (truncated)"
        if _sha256(file) != expected["sha256"]:
            return f"{file} does not match its checksum"
    return None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()
