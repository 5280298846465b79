"""Hugging Face directories in and out: Nemotron-H, Qwen3 and Llama.

    DIR/config.json          the shape, under the names of `FIELDS`; what else it says is in `NEEDS`
    DIR/model.safetensors    the weights, named by `names`; or model.safetensors.index.json, shards
    DIR/tokenizer.json       see text/tokenizer.py

The tables are read in both directions. A layer of Nemotron-H (arXiv 2504.03624) is one of ours. A
layer of Qwen3 (arXiv 2505.09388) or Llama is two of ours, `*-`, each with its own norm. Weights are
loaded as fp32, in which they are trained; bf16 values survive the way in and out bit for bit.

How to read: the tables, `names`, then `load_hf` and `save_hf`. The formats know one width for all
layers of a kind; a model whose layers have their own is brought to that by `nested.widen` first, or
its widths are written as lists, which we read again.

Step sizes of Mamba-2 are not clamped here, nor in Megatron's training. transformers 5.23 raises
them to config.json's time_step_min when it reads a prompt and not when it decodes; what is written
here says one that does nothing. Refused by name: RoPE scaling, biases, sliding windows, experts,
quantised weights.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from system import checkpoint
from system.config import WIDTH_FIELDS, ModelConfig
from system.costs import weights_of
from system.errors import require
from system.files import read_json

FAMILIES = {"nemotron_h": "NemotronH", "qwen3": "Qwen3", "llama": "Llama"}

# By the kind of a layer ("": in no layer), how names of ours and theirs begin where they differ.
TRANSFORMER = {"": {"embed.": "embed_tokens.", "head.": "lm_head."},
               "*": {"norm.": "input_layernorm.", "mixer.": "self_attn."},
               "-": {"norm.": "post_attention_layernorm.", "mixer.": "mlp."}}
RENAMED = {"nemotron_h": {"": {"embed.": "embeddings.", "norm.": "norm_f.", "head.": "lm_head."},
                          "M": {"mixer.conv_": "mixer.conv1d.", "mixer.norm_": "mixer.norm."}},
           "qwen3": TRANSFORMER, "llama": TRANSFORMER}

# Our settings and their names in config.json.
SHARED = {"vocab_size": "vocab_size", "d_model": "hidden_size", "d_ff": "intermediate_size",
          "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
          "attn_head_dim": "head_dim"}
FIELDS = {
    "nemotron_h": SHARED | {"norm_eps": "layer_norm_epsilon", "mamba_heads": "mamba_num_heads",
                            "mamba_head_dim": "mamba_head_dim", "mamba_groups": "n_groups",
                            "d_state": "ssm_state_size", "conv_width": "conv_kernel",
                            "chunk": "chunk_size"},
    "qwen3": SHARED | {"norm_eps": "rms_norm_eps"}, "llama": SHARED | {"norm_eps": "rms_norm_eps"}}

# What config.json must say, or leave out, for model.py to be its model. Every export says it.
ROTARY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
          "use_sliding_window": False}
NEEDS = {
    "nemotron_h": {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "use_conv_bias": True,
                   "use_bias": False, "attention_bias": False, "mlp_bias": False,
                   "mamba_proj_bias": False, "tie_word_embeddings": False},
    "qwen3": ROTARY, "llama": ROTARY}

# Their words for a layer; the last one of each kind is written.
LAYER_TYPES = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*",
               "mlp": "-", "moe": "E"}

# No part of the model: heads that predict several tokens ahead, constants of old Llama files.
IGNORED = re.compile(r"^mtp\.|\.rotary_emb\.inv_freq$")


def names(
    config: ModelConfig, family: str, prefix: str = "") -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our name of each tensor -> its name and shape in a checkpoint of that family. prefix: of all
    names but lm_head's; Nemotron-H has "backbone." on the hub, "model." in transformers 5."""
    rotary, found = family != "nemotron_h", {}
    prefix = prefix or ("model." if rotary else "backbone.")
    for ours, (i, theirs, axes) in weights_of(config).items():
        kind, place, shape = "", prefix, tuple(axes.values())
        if i is not None:  # one of theirs is one of ours, or two
            kind, place = config.pattern[i], f"{prefix}layers.{i // (1 + rotary)}."
        if theirs == "mixer.conv_weight":  # theirs is [E, 1, W]
            shape = (shape[0], 1, shape[1])
        for begin, other in RENAMED[family].get(kind, {}).items():
            if theirs.startswith(begin):
                theirs = other + theirs.removeprefix(begin)
        found[ours] = (theirs if ours == "head.weight" else place + theirs, shape)
    return found


def is_hf(folder: Path) -> bool:
    """Whether a folder is a Hugging Face directory: it holds a config.json that is not a run's."""
    return (folder / "config.json").is_file() and "config" not in read_json(folder / "config.json")


def load_hf(
    folder: Path, dtype: torch.dtype = torch.float32) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Shape and state dict of a Hugging Face directory. Raises ValueError that names what is wrong:
    the file, and in it a setting that is not supported, or tensors that do not fit."""
    # 1. config.json, the tensors, and what they should be called
    config, family = read_config(folder)
    theirs = {name: t for name, t in _read_tensors(folder).items() if not IGNORED.search(name)}
    prefix = "backbone." if any(name.startswith("backbone.") for name in theirs) else "model."
    table = names(config, family, prefix)
    # 2. a head beside tied embeddings is redundant, or says that they are not tied
    if config.tie_embeddings and "lm_head.weight" in theirs:
        name = table["embed.weight"][0]
        head_VD, embed_VD = theirs.pop("lm_head.weight"), theirs.get(name)
        require(embed_VD is None or torch.equal(head_VD, embed_VD),
                f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from {name}; "
                "set tie_word_embeddings to false in config.json if both are meant")
    # 3. all there, of the right shapes: under our names
    remedy = "config.json and weights must be of the same model"
    checkpoint.check_shapes(theirs, dict(table.values()), folder, remedy)
    return config, {ours: theirs[table[ours][0]].reshape(weight.shape).to(dtype)
                    for ours, weight in weights_of(config).items()}


def read_config(folder: Path) -> tuple[ModelConfig, str]:
    """The shape and the family that config.json tells. Raises ValueError for what we have not."""
    # 1. the family, and what rules a model out: RoPE too that is scaled, partial, in some layers
    file, known = folder / "config.json", ", ".join(FAMILIES)
    hf = {key: value for key, value in read_json(file).items() if value is not None}
    family = hf.get("model_type")
    require(family in FAMILIES,
            f"{file}: model_type ({family!r}) is not supported; choose one of {known}")
    needs, rotary = NEEDS[family] | {"quantization_config": None}, family != "nemotron_h"
    if rotary:
        hf |= hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        hf |= {"rope_type": hf.get("rope_type", hf.get("type", "default")),
               "layer_types": sorted(set(hf.get("layer_types", ["full_attention"])))}
        needs |= {"rope_type": "default", "partial_rotary_factor": 1,
                  "layer_types": ["full_attention"]}
    for key, needed in needs.items():
        value = hf.get(key, needed)
        require(value == needed, f"{file}: {key} ({value!r}) is not supported, only {needed!r}; "
                "choose another checkpoint")
    # 2. what transformers takes where a setting is left out
    hf.setdefault("rope_theta", 10000.0)
    hf.setdefault("num_key_value_heads", hf.get("num_attention_heads"))
    hf.setdefault("layer_norm_epsilon", hf.get("rms_norm_eps", 1e-5))
    hf.setdefault("rms_norm_eps", 1e-6)
    if family == "llama":
        d_model, n = (_number(hf, key, file) for key in ("hidden_size", "num_attention_heads"))
        hf.setdefault("head_dim", d_model // n)
    hf.setdefault("head_dim", hf.get("attention_head_dim", 128))
    # 3. layers, widths, the rest
    pattern = "*-" * _number(hf, "num_hidden_layers", file) if rotary else _pattern(hf, file)
    widths = _widths(hf, pattern, FIELDS[family], file)
    config = ModelConfig(
        **{ours: _number(hf, theirs, file) for ours, theirs in FIELDS[family].items()},
        pattern=pattern, widths=widths, ffn="swiglu" if rotary else "relu2",
        rope_theta=float(_number(hf, "rope_theta", file)) if rotary else 0.0,
        qk_norm=family == "qwen3", tie_embeddings=hf.get("tie_word_embeddings", False))
    config.check()
    return config, family


def _pattern(hf: dict[str, Any], file: Path) -> str:
    """Nemotron-H's layers as our letters, from whichever of its two spellings is there."""
    types = hf.get("layers_block_type", hf.get("hybrid_override_pattern"))
    require(types, f"{file} has neither layers_block_type nor hybrid_override_pattern; one of them "
            "must name the layers")
    pattern = "".join(LAYER_TYPES.get(kind, kind) for kind in types)
    require("E" not in pattern,
            f"{file}: layer {pattern.find('E')} is a mixture of experts, which is not supported")
    return pattern


def _widths(hf: dict[str, Any], pattern: str, keys: dict[str, str], file: Path) -> tuple:
    """All layers' widths, () where config.json lists none. Puts the largest where it has a list."""
    rows, is_listed = {}, False
    for kind, fields in WIDTH_FIELDS.items():
        n, columns = pattern.count(kind), []
        for key in map(keys.get, fields):
            given = hf.get(key)
            if isinstance(given, list):
                require(len(given) == n > 0 and all(isinstance(width, int) for width in given),
                        f"{file}: {key} ({given}) must be a number, or list {n}, one a layer")
                hf[key], is_listed = max(given), True
            columns.append(given if isinstance(given, list) else [given] * n)
        rows[kind] = zip(*columns, strict=True)
    return tuple(next(rows[kind]) for kind in pattern) if is_listed else ()


def _number(hf: dict[str, Any], key: str, file: Path) -> Any:
    """A number of config.json. Raises ValueError if it is missing or something else."""
    value = hf.get(key)
    require(isinstance(value, int | float) and not isinstance(value, bool),
            f"{file}: {key} is {value!r}, and must be a number; every layer has the same")
    return value


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards of its index. Raises ValueError."""
    index, shards = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        require((folder / shard).is_file(),
                f"{folder / shard} does not exist; weights must be safetensors files")
        try:
            tensors |= load_file(folder / shard)
        except SafetensorError as error:
            raise ValueError(f"{folder / shard} cannot be read ({error}); copy it again") from error
    return tensors


def add_rows(tensors: dict[str, Tensor], new_ids: list[int]) -> dict[str, Tensor]:
    """The state dict with rows for tokens that are new, in a row: the mean of those before them.

    A table that ends before them grows; rows after them stay.
    """
    if not new_ids:
        return tensors
    grown, first, end = dict(tensors), new_ids[0], new_ids[-1] + 1
    for name in {"embed.weight", "head.weight"} & tensors.keys():
        old_VD = tensors[name]
        new = old_VD[:first].mean(dim=0, keepdim=True).expand(end - first, -1)
        grown[name] = torch.cat([old_VD[:first], new, old_VD[end:]])
    return grown


def save_hf(folder: Path, config: ModelConfig, tensors: dict[str, Tensor],
            dtype: torch.dtype = torch.float32, prefix: str = "",
            more: dict[str, Any] | None = None, shard_bytes: int = 5 * 10**9,
            listed: bool = False) -> None:
    """Write a model as a Hugging Face directory of the one family that it can be (see `family_of`).

    Args: dtype: of the weights; prefix: of their names, instead of the hub's; more: what
    config.json shall say beside the shape, such as eos_token_id; shard_bytes: size over which the
    weights are split; listed: config.json lists the widths of the layers of a kind, in their order.
    Raises ValueError if no family has such a model, if its layers differ in width and that is not
    to be listed, if the weights are not of that shape, or if the folder is in use.
    """
    # 1. refusals, before anything is written
    require(not (folder / "config.json").exists(),
            f"out ({folder}) already holds a model; choose another --out")
    require(listed or not config.widths,
            f"model.widths {config.widths} differ by layer, and config.json has one width for all; "
            "bring the layers to one by nested.widen, or write lists (listed)")
    family, config = family_of(config), replace(config, vocab_size=len(tensors["embed.weight"]))
    shapes = {name: weight.shape for name, weight in weights_of(config).items()}
    checkpoint.check_shapes(
        tensors, shapes, folder, "give the settings that the weights were made with")
    # 2. the weights; Nemotron-H has no tied embeddings, so its head is written out
    rotary = family != "nemotron_h"
    if config.tie_embeddings and not rotary:
        config = replace(config, tie_embeddings=False)
        tensors = {**tensors, "head.weight": tensors["embed.weight"].clone()}
    theirs = {name: tensors[ours].reshape(shape).to(dtype).contiguous()
              for ours, (name, shape) in names(config, family, prefix).items()}
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder, theirs, shard_bytes)
    # 3. config.json
    hf = {"architectures": [f"{FAMILIES[family]}ForCausalLM"], "model_type": family,
          "torch_dtype": str(dtype).removeprefix("torch."),
          **{theirs: _one_or_all(config, ours) for ours, theirs in FIELDS[family].items()},
          "num_hidden_layers": len(config.pattern) // (1 + rotary),
          "tie_word_embeddings": config.tie_embeddings, **NEEDS[family],
          "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **(more or {})}
    if rotary:
        hf |= {"rope_theta": config.rope_theta,
               "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    else:
        words = {kind: word for word, kind in LAYER_TYPES.items()}
        hf |= {"hybrid_override_pattern": config.pattern,
               "layers_block_type": [words[kind] for kind in config.pattern],
               "time_step_min": 1e-12}
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")


def _one_or_all(config: ModelConfig, field: str) -> Any:
    """A setting; where layers have widths of their own, those of all layers that have it."""
    own = [i for i, kind in enumerate(config.pattern)
           if config.widths and field in WIDTH_FIELDS[kind]]
    return [getattr(config.layer(i), field) for i in own] or getattr(config, field)


def family_of(config: ModelConfig) -> str:
    """The one family that a model can be written as. Raises ValueError where there is none."""
    if re.fullmatch(r"(\*-)+", config.pattern) and config.ffn == "swiglu" and config.rope_theta > 0:
        require(config.qk_norm or config.d_model % config.n_heads == 0,
                f"model.d_model ({config.d_model}) is no multiple of model.n_heads "
                f"({config.n_heads}), and Llama needs that; set model.qk_norm, which is Qwen3")
        return "qwen3" if config.qk_norm else "llama"
    is_wrong = {"ffn": "-" in config.pattern and config.ffn != "relu2",
                "rope_theta": "*" in config.pattern and config.rope_theta,
                "qk_norm": "*" in config.pattern and config.qk_norm}
    wrong = [f"model.{key} ({getattr(config, key)!r})" for key, bad in is_wrong.items() if bad]
    require(not wrong,
            f"no family has the pattern {config.pattern!r} with {' and '.join(wrong)}: Nemotron-H "
            "has any pattern, with relu2 and plain attention; Qwen3 and Llama have '*-' repeated, "
            "with swiglu and RoPE")
    return "nemotron_h"


def _write_tensors(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    """One safetensors file, or several of at most shard_bytes (or one tensor) and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, t in tensors.items():
        size = sum(other.nbytes for other in shards[-1].values())
        if shards[-1] and size + t.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = t
    n, places = len(shards), {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    if n > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                 "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
