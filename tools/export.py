"""A run as a Hugging Face directory: `python -m tools.export RUN --out DIR`."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from nested import widen
from system import checkpoint
from system.config import saved_config
from system.errors import exit_code, require
from system.files import read_json
from system.huggingface import family_of, save_hf
from system.loop import warn

KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


def export(run: tyro.conf.Positional[Path], out: Path,
           dtype: Literal["float32", "bfloat16"] = "float32",
           widths: Literal["padded", "listed"] | None = None) -> None:
    """Write what a run has trained as a Hugging Face directory.

    Args:
        run: Folder of a run, such as runs/rlp-cpu-seed0.
        out: Folder to write; it must not hold a model yet.
        dtype: Of the weights.
        widths: Must be said where layers differ: padded with zeros to one, which all programs read
            and which undoes part of the compression, or listed in config.json, where vLLM reads a
            list for intermediate_size and transformers none.
    """
    there = sorted(p.name for p in out.glob("*") if p.name == "tokenizer.json"
                   or p.name.endswith((".safetensors", ".safetensors.index.json")))
    require((out / "config.json").exists() or not there, f"out ({out}) holds {', '.join(there)}, "
            "which would be written over; choose another --out")
    found, hf = checkpoint.newest(run), run / "hf"
    require(found, f"{run} holds no checkpoint; give a run's folder, such as runs/rlp-cpu-seed0")
    config, tensors = saved_config(run).model, found.weights()
    require(widths or not config.widths, f"layers of {run} have widths of their own; give --widths "
            "padded, which all programs read and which is larger, or --widths listed")
    if config.widths and widths == "padded":
        config = replace(config, vocab_size=len(tensors["embed.weight"]))
        n = sum(t.numel() for t in tensors.values())
        config, tensors = widen(config, tensors)
        wide = sum(t.numel() for t in tensors.values())
        norm = "; the eps of a gated norm grows with its channels" * ("M" in config.pattern)
        warn(f"padding brings {n:,} parameters to {wide:,} ({wide / n:.3f} times as many): layers "
             "that differ get the widths of the widest; --widths listed keeps them as they are"
             f"{norm}" if wide > n else None)
    theirs = read_json(hf / "config.json") if hf.is_dir() else {}
    more = {key: theirs[key] for key in KEPT if key in theirs}
    save_hf(out, config, tensors, getattr(torch, dtype), more=more, listed=widths == "listed")
    if hf.is_dir():
        shutil.copyfile(hf / "tokenizer.json", out / "tokenizer.json")
    print(f"wrote {out} ({family_of(config)})")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 for what cannot be written."""
    return exit_code(lambda: tyro.cli(export, args=argv, prog="python -m tools.export"))


if __name__ == "__main__":
    sys.exit(main())
