"""Hugging Face directories in and out: Nemotron-H, Qwen2, Qwen3 and Llama.

    DIR/config.json          the shape, under the names of `FIELDS`; what else it may say is in
                             `NEEDS`, `NEEDS_IF_SAID` and `HARMLESS`; other fields are refused
    DIR/model.safetensors    the weights, named by `names`; or model.safetensors.index.json, shards
    DIR/tokenizer.json       see text/tokenizer.py

The tables are read in both directions. A layer of Nemotron-H (arXiv 2504.03624) is one of ours. A
layer of Qwen2 (arXiv 2407.10671), Qwen3 (arXiv 2505.09388) or Llama is two of ours, `*-`, each with
its own norm. Weights are loaded as fp32, in which they are trained; bf16 values survive the way in
and out bit for bit.

How to read: the tables, `names`, then `load_hf` and `save_hf`. The formats know one width for all
layers of a kind; a model whose layers have their own is brought to that by `nested.widen` first, or
its widths are written as lists, which we read again.

Step sizes of Mamba-2 are not clamped here, nor in Megatron's training. transformers 5.23 raises
them to config.json's time_step_min when it reads a prompt and not when it decodes; what is written
here says one that does nothing. Refused by name: other RoPE scaling than linear, llama3 and yarn,
other biases than Qwen2's, sliding windows, experts, quantised weights.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from system import checkpoint
from system.config import WIDTH_FIELDS, ModelConfig, RopeScaling
from system.costs import weights_of
from system.errors import require
from system.files import read_json, require_content, write_json, writing

FAMILIES = {"nemotron_h": "NemotronH", "qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}

# By the kind of a layer ("": in no layer), how names of ours and theirs begin where they differ.
TRANSFORMER = {"": {"embed.": "embed_tokens.", "head.": "lm_head."},
               "*": {"norm.": "input_layernorm.", "mixer.": "self_attn."},
               "-": {"norm.": "post_attention_layernorm.", "mixer.": "mlp."}}
RENAMED = {"nemotron_h": {"": {"embed.": "embeddings.", "norm.": "norm_f.", "head.": "lm_head."},
                          "M": {"mixer.conv_": "mixer.conv1d.", "mixer.norm_": "mixer.norm."}},
           "qwen2": TRANSFORMER, "qwen3": TRANSFORMER, "llama": TRANSFORMER}

# Our settings and their names in config.json.
SHARED = {"vocab_size": "vocab_size", "d_model": "hidden_size", "d_ff": "intermediate_size",
          "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
          "attn_head_dim": "head_dim"}
FIELDS = {
    "nemotron_h": SHARED | {"norm_eps": "layer_norm_epsilon", "mamba_heads": "mamba_num_heads",
                            "mamba_head_dim": "mamba_head_dim", "mamba_groups": "n_groups",
                            "d_state": "ssm_state_size", "conv_width": "conv_kernel",
                            "chunk": "chunk_size"},
    **dict.fromkeys(("qwen2", "qwen3", "llama"), SHARED | {"norm_eps": "rms_norm_eps"})}
# Of RoPE, by its kind.
SCALING = {"factor": "factor", "length": "original_max_position_embeddings"}
SCALINGS = {
    "default": {}, "linear": {"factor": "factor"},
    "llama3": SCALING | {"low": "low_freq_factor", "high": "high_freq_factor"},
    "yarn": SCALING | {"low": "beta_slow", "high": "beta_fast", "amplitude": "attention_factor"}}

# What config.json must say, or leave out, for model.py to be its model. Every export says it.
ROTARY = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False}
NEEDS = {
    "nemotron_h": {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "use_conv_bias": True,
                   "use_bias": False, "attention_bias": False, "mlp_bias": False,
                   "mamba_proj_bias": False, "tie_word_embeddings": False},
    "qwen2": ROTARY, **dict.fromkeys(("qwen3", "llama"), ROTARY | {"attention_bias": False})}
# The same, but no export says it.
PLAIN = {"layer_types": ["full_attention"], "partial_rotary_factor": 1, "rope_interleaved": False,
         "use_mrope": False}
NEEDS_IF_SAID = {"nemotron_h": {"time_step_limit": [0, math.inf], "residual_in_fp32": False},
                 "qwen2": PLAIN, "qwen3": PLAIN, "llama": PLAIN}

# What changes nothing that model.py computes.
ANY = """architectures auto_map model_type dtype torch_dtype transformers_version _name_or_path
    _model_name_or_path name_or_path _attn_implementation attn_implementation unsloth_version
    unsloth_fixed _attn_implementation_autoset transformers.js_config is_llama_config
    tokenizer_class initializer_range attention_dropout hidden_dropout use_cache
    output_attentions return_dict output_hidden_states is_encoder_decoder is_decoder
    chunk_size_feed_forward id2label label2id problem_type bos_token_id eos_token_id
    pad_token_id unk_token_id max_position_embeddings pretraining_tp num_hidden_layers
    tie_word_embeddings head_dim"""
ROPE = "rope_theta rope_parameters rope_scaling"
HARMLESS = {family: set(f"{ANY} {ROPE} {more}".split()) for family, more in {
    "nemotron_h": """layers_block_type hybrid_override_pattern attention_head_dim rms_norm_eps
        expand partial_rotary_factor num_query_groups num_logits_to_keep use_mamba_kernels
        time_step_min time_step_max time_step_floor time_step_rank rescale_prenorm_residual
        mamba_ssm_cache_dtype n_routed_experts n_shared_experts moe_intermediate_size
        moe_shared_expert_intermediate_size moe_shared_expert_overlap moe_latent_size
        num_experts_per_tok routed_scaling_factor n_group topk_group norm_topk_prob
        output_router_logits num_nextn_predict_layers mtp_layers_block_type
        mtp_hybrid_override_pattern""",
    "qwen2": "sliding_window max_window_layers attention_bias",  # its biases are always there
    "qwen3": "sliding_window max_window_layers", "llama": ""}.items()}

# Their words for a layer; the last one of each kind is written.
LAYER_TYPES = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*",
               "mlp": "-", "moe": "E"}

# No part of the model: heads that predict several tokens ahead, constants of old Llama files.
IGNORED = re.compile(r"^mtp\.|\.rotary_emb\.inv_freq$")
# What torch.compile and data parallelism put into names.
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    theirs = _read_tensors(folder)
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
    if family != "nemotron_h" and not config.tie_embeddings and "lm_head.weight" not in theirs:
        remedy += "; if the embedding is the head too, set tie_word_embeddings to true"
    checkpoint.check_shapes(theirs, dict(table.values()), folder, remedy)
    return config, {ours: theirs[table[ours][0]].reshape(weight.shape).to(dtype)
                    for ours, weight in weights_of(config).items()}


def read_config(folder: Path) -> tuple[ModelConfig, str]:
    """The shape and the family that config.json tells. Raises ValueError for what we have not."""
    # 1. the family, what rules a model out, and what nobody here has heard of
    file, known = folder / "config.json", ", ".join(FAMILIES)
    hf = {key: value for key, value in read_json(file).items() if value is not None}
    family = hf.get("model_type")
    require(isinstance(family, str) and family in FAMILIES,
            f"{file}: model_type ({family!r:.60}) is not supported; choose one of {known}")
    rotary = family != "nemotron_h"
    rope = _rope(hf, file) if rotary else {}
    said = dict(hf)
    hf |= rope
    for key in ("layer_types", "time_step_limit"):  # one of each; how transformers writes infinity
        if isinstance(hf.get(key), list):
            hf[key] = [math.inf if one == {"__float__": "Infinity"} else one
                       for i, one in enumerate(hf[key]) if key[0] == "t" or one not in hf[key][:i]]
    needs = NEEDS[family] | NEEDS_IF_SAID[family]
    for key, value in hf.items():
        if key in needs:
            require(value == needs[key], f"{file}: {key} ({value!r:.60}) is not supported, only "
                    f"{needs[key]!r}; choose another checkpoint")
        else:
            require(key not in said or key in {*FIELDS[family].values(), *HARMLESS[family]},
                    f"{file}: {key} ({said.get(key)!r:.60}) is not supported; choose another "
                    "checkpoint, or take the field out if it changes nothing that is computed")
    # 2. what transformers takes where a setting is left out
    hf.setdefault("num_key_value_heads", hf.get("num_attention_heads"))
    hf.setdefault("layer_norm_epsilon", hf.get("rms_norm_eps", 1e-5))
    hf.setdefault("rms_norm_eps", 1e-6)
    if family in ("llama", "qwen2") and "head_dim" not in hf:
        d_model, n = (_number(hf, key, file) for key in ("hidden_size", "num_attention_heads"))
        require(n > 0, f"{file}: num_attention_heads ({n}) must be positive; copy it again")
        hf["head_dim"] = d_model // n
    hf.setdefault("head_dim", hf.get("attention_head_dim", 128))
    # 3. layers, widths, the rest
    pattern = "*-" * _number(hf, "num_hidden_layers", file) if rotary else _pattern(hf, file)
    widths = _widths(hf, pattern, FIELDS[family], file)
    tied = hf.get("tie_word_embeddings", False)
    require(isinstance(tied, bool), f"{file}: tie_word_embeddings ({tied!r:.60}) must be true or "
            "false; mend it")
    config = ModelConfig(
        **{ours: _number(hf, theirs, file, whole=ours != "norm_eps")
           for ours, theirs in FIELDS[family].items()},
        pattern=pattern, widths=widths, ffn="swiglu" if rotary else "relu2",
        rope_theta=float(rope.get("rope_theta", 0)), rope_scaling=_scaling(rope),
        qk_norm=family == "qwen3", qkv_bias=family == "qwen2", tie_embeddings=tied)
    config.check()
    return config, family


def _rope(hf: dict[str, Any], file: Path) -> dict[str, Any]:
    """What config.json says of RoPE, in either of two places or beside them, under one set of keys.
    Raises ValueError for a kind that is not in `SCALINGS`, and for what is no number."""
    given = [hf[key] for key in ("rope_parameters", "rope_scaling") if hf.get(key)]
    require(all(isinstance(one, dict) and one == given[0] for one in given),
            f"{file}: rope_parameters and rope_scaling must be one JSON object, or leave one out")
    rope = {key: value for key, value in (given or [{}])[0].items() if value is not None}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    require(isinstance(kind, str) and kind in SCALINGS, f"{file}: rope_type ({kind!r:.60}) is not "
            f"supported; choose a checkpoint with one of {', '.join(SCALINGS)}")
    rope.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
    if "partial_rotary_factor" in hf:
        rope.setdefault("partial_rotary_factor", hf["partial_rotary_factor"])
    keys = SCALINGS[kind].values()
    unknown = sorted(rope.keys() - {*keys, "rope_theta", "partial_rotary_factor"})
    require(not unknown, f"{file}: {', '.join(unknown)} of rope_type {kind!r} is not supported; "
            "choose another checkpoint")
    if "original_max_position_embeddings" in keys:
        rope.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    if kind == "yarn":
        factor = _number(rope, "factor", file, whole=False)
        rope = {"beta_slow": 1, "beta_fast": 32,
                "attention_factor": 0.1 * math.log(max(factor, 1)) + 1} | rope
    for key in ("rope_theta", *keys):
        _number(rope, key, file, whole=key.startswith("original"))
    return rope | {"rope_type": kind}


def _scaling(rope: dict[str, Any]) -> RopeScaling:
    """The setting that `_rope` found."""
    kind = rope.get("rope_type", "default")
    return RopeScaling(kind, **{ours: rope[key] for ours, key in SCALINGS[kind].items()})


def _pattern(hf: dict[str, Any], file: Path) -> str:
    """Nemotron-H's layers as our letters, from whichever of its two spellings is there."""
    types = hf.get("layers_block_type", hf.get("hybrid_override_pattern"))
    require(types, f"{file} has neither layers_block_type nor hybrid_override_pattern; one of them "
            "must name the layers")
    require(isinstance(types, str | list) and all(isinstance(kind, str) for kind in types),
            f"{file}: the layers ({types!r:.60}) must be a string, or a list of words; mend it")
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
                require(len(given) == n > 0 and all(type(width) is int for width in given),
                        f"{file}: {key} ({given}) must be a number, or list {n}, one a layer")
                hf[key], is_listed = max(given), True
            columns.append(given if isinstance(given, list) else [given] * n)
        rows[kind] = zip(*columns, strict=True)
    return tuple(next(rows[kind]) for kind in pattern) if is_listed else ()


def _number(hf: dict[str, Any], key: str, file: Path, whole: bool = True) -> Any:
    """A number of config.json. Raises ValueError if it is missing, something else, or no size."""
    value, kinds = hf.get(key), (int,) if whole else (int, float)
    most = 10_000 if key == "num_hidden_layers" else 2**31
    require(type(value) in kinds and abs(value) < (most if whole else 1e30),
            f"{file}: {key} is {value!r:.60}, and must be a {'whole ' * whole}number of usual "
            "size; every layer has the same")
    return value


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the model in model.safetensors, or in the shards of its index, by their bare
    names. Raises ValueError for a file that cannot be read, and a tensor that holds no weights."""
    # 1. the files
    index, shards = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        places = read_json(index).get("weight_map")
        require(isinstance(places, dict) and places and all(
            isinstance(shard, str) and Path(shard).name == shard for shard in places.values()),
            f"{index}: weight_map must give each tensor a file of this folder; copy it again")
        shards = sorted(set(places.values()))
    # 2. their tensors
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        require((folder / shard).is_file(),
                f"{folder / shard} does not exist; weights must be safetensors files")
        require_content(folder / shard)
        try:
            found = load_file(folder / shard)
        except SafetensorError as error:
            raise ValueError(f"{folder / shard} cannot be read ({error}); copy it again") from error
        for name, t in found.items():
            bare = WRAPPERS.sub("", name)
            require(bare not in tensors, f"{folder / shard}: {name} is there twice; take one out")
            if IGNORED.search(bare):
                continue
            require(t.dtype in FLOATS, f"{folder / shard}: {name} is {t.dtype}, which holds no "
                    "weights without their scales; choose a checkpoint that is not quantised")
            require(t.isfinite().all(), f"{folder / shard}: {name} has NaN or infinite values; "
                    "copy it again, or choose another checkpoint")
            tensors[bare] = t
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
        s = config.rope_scaling
        rope = {"rope_type": s.kind, "rope_theta": config.rope_theta,
                **{theirs: getattr(s, ours) for ours, theirs in SCALINGS[s.kind].items()}}
        hf |= {"rope_theta": config.rope_theta, "rope_parameters": rope}
        hf |= {"rope_scaling": rope} if s.kind != "default" else {}  # for transformers 4
    else:
        words = {kind: word for word, kind in LAYER_TYPES.items()}
        hf |= {"hybrid_override_pattern": config.pattern,
               "layers_block_type": [words[kind] for kind in config.pattern],
               "time_step_min": 1e-12}
    write_json(folder / "config.json", hf, indent=2)


def _one_or_all(config: ModelConfig, field: str) -> Any:
    """A setting; where layers have widths of their own, those of all layers that have it."""
    own = [i for i, kind in enumerate(config.pattern)
           if config.widths and field in WIDTH_FIELDS[kind]]
    return [getattr(config.layer(i), field) for i in own] or getattr(config, field)


def family_of(config: ModelConfig) -> str:
    """The one family that a model can be written as. Raises ValueError where there is none."""
    if re.fullmatch(r"(\*-)+", config.pattern) and config.ffn == "swiglu" and config.rope_theta > 0:
        require(config.qk_norm or config.qkv_bias or config.d_model % config.n_heads == 0,
                f"model.d_model ({config.d_model}) is no multiple of model.n_heads "
                f"({config.n_heads}), and Llama needs that; choose widths of which one is the "
                "other's multiple (elastic.d_model_choices), or train with model.qk_norm, which is "
                "Qwen3")
        require(not (config.qk_norm and config.qkv_bias), "model.qk_norm and model.qkv_bias are "
                "set, and no family has both; leave one out")
        return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    is_wrong = {"ffn": "-" in config.pattern and config.ffn != "relu2",
                "rope_theta": "*" in config.pattern and config.rope_theta,
                "qk_norm": "*" in config.pattern and config.qk_norm,
                "qkv_bias": "*" in config.pattern and config.qkv_bias}
    wrong = [f"model.{key} ({getattr(config, key)!r})" for key, bad in is_wrong.items() if bad]
    require(not wrong,
            f"no family has the pattern {config.pattern!r} with {' and '.join(wrong)}: Nemotron-H "
            "has any pattern, with relu2 and plain attention; Qwen2, Qwen3 and Llama have '*-' "
            "repeated, with swiglu and RoPE")
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
        with writing(folder):
            save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    if n > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                 "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index, indent=2)
