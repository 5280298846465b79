"""Write what a run has trained as a Hugging Face directory: `python -m tools.export RUN --out
DIR`."""

import shutil
import sys
from pathlib import Path
from typing import Literal

import torch
import tyro

from system import checkpoint
from system.config import saved_config
from system.errors import exit_code, require
from system.files import read_json
from system.huggingface import family_of, save_hf

# ------------------------------------------------------------------------------------------ program


def export(run: tyro.conf.Positional[Path], out: Path,
           dtype: Literal["float32", "bfloat16"] = "float32",
           widths: Literal["padded", "listed"] = "padded") -> None:
    """Write what a run has trained as a Hugging Face directory.

    Args:
        run: Folder of a run, such as runs/rlp-cpu-seed0.
        out: Folder to write; it must not hold a model yet.
        dtype: Of the weights.
        widths: Layers of different widths are padded with zeros to one, which all programs read; or they stay as they
            are, and config.json lists their widths, as vLLM reads intermediate_size; transformers reads no lists.
    """
    found = checkpoint.newest(run)
    require(
        found, f"{run} holds no checkpoint; give the folder of a run, such as runs/rlp-cpu-seed0")
    config = saved_config(run).model
    source, kept = (run / "hf",
                    ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"))
    theirs = read_json(source / "config.json") if source.is_dir() else {}
    more = {key: theirs[key] for key in kept if key in theirs}
    save_hf(out, config, found.tensors("model"), getattr(torch, dtype), more=more,
            listed=widths == "listed")
    if source.is_dir():
        shutil.copyfile(source / "tokenizer.json", out / "tokenizer.json")
    print(f"wrote {out} ({family_of(config)})")


def main(argv: list[str] | None = None) -> int:
    """`python -m tools.export RUN --out DIR`. Returns 0, or 2 for what cannot be written."""
    return exit_code(lambda: tyro.cli(export, args=argv, prog="python -m tools.export"))


if __name__ == "__main__":
    sys.exit(main())
