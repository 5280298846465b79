"""Hugging Face directories against transformers: the same logits and tokens, and files that come back bit for bit."""

import ast
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import hf_models
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM

from model import HybridLM
from system import checkpoint, huggingface
from system.config import ModelConfig, RopeScaling
from system.huggingface import add_rows, family_of, load_hf, names, read_config, save_hf
from tools import export

ROOT = Path(__file__).parent.parent
NEAR = {"rtol": 0, "atol": 1e-4}
FAMILIES = list(hf_models.MAKE)
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each family's tiny model, and the folder that transformers wrote it to."""
    root, found = tmp_path_factory.mktemp("hf"), {}
    for name in FAMILIES:
        model = hf_models.tiny(name)
        model.save_pretrained(root / name)
        found[name] = model, root / name
    return found


@pytest.fixture(params=FAMILIES)
def pair(request, saved):
    return saved[request.param]


@pytest.fixture
def edited(saved, tmp_path):
    """A copy of a family's folder with other things in its config.json; None takes one away."""

    def make(name, **changes):
        _, source = saved[name]
        hf = json.loads((source / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in hf.items() if v is not None}))
        (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
        return tmp_path

    return make


def ours(folder):
    """Our model with the weights of a folder."""
    config, tensors = load_hf(folder)
    model = HybridLM(config)
    checkpoint.load_weights(model, tensors, folder)
    return model


def tokens(*shape):
    return torch.randint(0, 37, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def our_logits(model, tokens_BT):
    return model.logits(model(tokens_BT)[0])


def weights_in(folder):
    """Every tensor of every safetensors file of a folder."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


# ---------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("n_tokens", [1, 3, 4, 5, 19])
@torch.no_grad()
def test_logits_equal_those_of_transformers(pair, n_tokens):
    """Around the chunk length of 4, too."""
    theirs, folder = pair
    tokens_BT = tokens(2, n_tokens)
    assert_close(our_logits(ours(folder), tokens_BT), theirs(tokens_BT).logits, **NEAR)


@torch.no_grad()
def test_left_padded_rows_equal_those_of_transformers_without_padding(pair):
    """Also token by token from the cache. Positions count from the first token there, from the padding here."""
    theirs, folder = pair
    model, tokens_BT = ours(folder), tokens(2, 9)
    ids_BT = torch.tensor([[-1] * 4 + [0] * 5, [0] * 9])
    hidden_BTD, cache = model(tokens_BT, ids_BT=ids_BT)
    made = [hidden_BTD]
    for t in range(3):
        hidden_BTD, cache = model(tokens_BT[:, t : t + 1], cache)
        made.append(hidden_BTD)
    logits_BTV = model.logits(torch.cat(made, dim=1))
    for row, n_padded in ((0, 4), (1, 0)):
        alone_BT = torch.cat([tokens_BT[row, n_padded:], tokens_BT[row, :3]])[None]
        assert_close(logits_BTV[row : row + 1, n_padded:], theirs(alone_BT).logits, **NEAR)


@torch.no_grad()
def test_greedy_generation_equals_that_of_transformers(pair):
    """Both from their caches, one token at a time."""
    theirs, folder = pair
    model, tokens_BT = ours(folder), tokens(2, 7)
    expected = theirs.generate(tokens_BT, attention_mask=torch.ones_like(tokens_BT), do_sample=False, max_new_tokens=20)
    hidden_BTD, cache = model(tokens_BT)
    made = [tokens_BT]
    for _ in range(20):
        made.append(model.logits(hidden_BTD[:, -1:]).argmax(-1))
        hidden_BTD, cache = model(made[-1], cache)
    assert torch.cat(made, dim=1).tolist() == expected.tolist()
    assert len(set(expected[:, 7:].flatten().tolist())) > 3, "else equality would say little"


@torch.no_grad()
def test_gradients_equal_those_of_transformers(pair):
    """Through our name table: the weights of both are the same ones."""
    theirs, folder = pair
    model, tokens_BT = ours(folder), tokens(2, 9)
    for network, logits in ((model, lambda: model.logits(model(tokens_BT)[0])), (theirs, lambda: theirs(tokens_BT).logits)):
        network.zero_grad()
        with torch.enable_grad():
            logits().square().mean().backward()
    own = dict(model.named_parameters())
    other = {
        k.replace("model.", "backbone.", 1) if "nemotron" in folder.name else k: p for k, p in theirs.named_parameters()
    }
    for name, (theirs_name, shape) in names(model.config, read_config(folder)[1]).items():
        assert_close(own[name].grad.reshape(shape), other[theirs_name].grad, rtol=1e-3, atol=1e-5)
    theirs.zero_grad()


def test_transformers_clamps_step_sizes_in_prefill_and_we_do_not(edited):
    """Why what we write says a tiny time_step_min: with 2.0 the same weights give other logits there, not here."""
    theirs, folder = hf_models.tiny("nemotron_h"), edited("nemotron_h", time_step_min=2.0, time_step_max=3.0)
    clamped = NemotronHForCausalLM(NemotronHConfig(**hf_models.NEMOTRON | {"time_step_min": 2.0, "time_step_max": 3.0}))
    clamped.load_state_dict(theirs.state_dict())
    tokens_BT = tokens(1, 9)
    assert_close(our_logits(ours(folder), tokens_BT), theirs(tokens_BT).logits.detach(), **NEAR)
    assert (clamped.eval()(tokens_BT).logits - theirs(tokens_BT).logits).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------- the way and back


@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_checkpoint_comes_back_bit_for_bit(pair, tmp_path, dtype, shard_bytes):
    """Names, shapes, types and bits; through fp32 weights of our own, from one file or many."""
    theirs, _ = pair
    copy = type(theirs)(theirs.config).to(dtype)
    copy.load_state_dict(theirs.state_dict())
    copy.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    config, tensors = load_hf(tmp_path / "theirs")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    save_hf(tmp_path / "ours", config, tensors, dtype, shard_bytes=shard_bytes)
    before, after = weights_in(tmp_path / "theirs"), weights_in(tmp_path / "ours")
    assert_close(after, {k: before[k] for k in after}, **EXACT)
    assert before.keys() == after.keys()
    many = len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    assert many == (tmp_path / "ours" / "model.safetensors.index.json").exists() == (shard_bytes == 3000)


@torch.no_grad()
def test_transformers_reads_what_we_write(pair, tmp_path):
    theirs, folder = pair
    save_hf(tmp_path / "out", *load_hf(folder), shard_bytes=3000)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert type(again) is type(theirs)
    assert_close(again(tokens(2, 19)).logits, theirs(tokens(2, 19)).logits, **EXACT)


def test_both_prefixes_of_nemotron_h_are_read_and_written(saved, tmp_path):
    config, tensors = load_hf(saved["nemotron_h"][1])
    for prefix in ("backbone.", "model."):
        save_hf(tmp_path / prefix, config, tensors, prefix=prefix)
        assert {k.split(".")[0] + "." for k in weights_in(tmp_path / prefix)} == {prefix, "lm_head."}
        again_config, again = load_hf(tmp_path / prefix)
        assert again_config == config
        assert_close(again, tensors, **EXACT)
        assert not any(AutoModelForCausalLM.from_pretrained(tmp_path / prefix, output_loading_info=True)[1].values())


OWN = {
    "nemotron_h": {"pattern": "M-M*-", "tie_embeddings": True},
    "no attention": {"pattern": "MM-", "qk_norm": True, "rope_theta": 9.0},
    "plain transformer": {"pattern": "*-*-"},
    "llama": {"pattern": "*-*-", "ffn": "swiglu", "rope_theta": 100.0, "tie_embeddings": True},
    "qwen2": {"pattern": "*-", "ffn": "swiglu", "rope_theta": 100.0, "qkv_bias": True},
    "qwen3": {"pattern": "*-", "ffn": "swiglu", "rope_theta": 100.0, "qk_norm": True},
    **{
        f"{kind} scaling": {"pattern": "*-", "ffn": "swiglu", "rope_theta": 9.0, "rope_scaling": scaling}
        for kind, scaling in {
            "linear": RopeScaling("linear", 3.0),
            "llama3": RopeScaling("llama3", 8.0, 24, 1.0, 4.0),
            "yarn": RopeScaling("yarn", 4.0, 300, 1.5, 40.0, 1.2),
        }.items()
    },
}


@pytest.mark.parametrize("shape", OWN.values(), ids=OWN)
@torch.no_grad()
def test_transformers_computes_the_same_from_an_export_of_our_own_models(make_model, tmp_path, shape):
    """Nemotron-H has no tied embeddings: there the head is written out."""
    model = make_model(**shape, chunk=3, conv_width=2).float()
    save_hf(tmp_path / "out", model.config, model.state_dict())
    assert load_hf(tmp_path / "out")[0].rope_scaling == model.config.rope_scaling
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    tokens_BT = tokens(2, 11) % 12
    theirs_BTV = theirs(tokens_BT, use_cache=False).logits  # its cache cannot count tokens without an attention layer
    assert_close(theirs_BTV, our_logits(model, tokens_BT), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("pattern", "changes", "lists"),
    [
        ("M-*-M", {"widths": ((4, 3), (7,), (2,), (11,), (2, 5)), "tie_embeddings": False},
         {"intermediate_size": [7, 11], "num_attention_heads": [2], "mamba_num_heads": [4, 2], "mamba_head_dim": [3, 5]}),
        ("*-*-", {"widths": ((4,), (7,), (2,), (11,)), "ffn": "swiglu", "rope_theta": 9.0, "qk_norm": True},
         {"intermediate_size": [7, 11], "num_attention_heads": [4, 2]}),
    ],
)  # fmt: skip
def test_widths_can_be_listed_instead_of_padded(make_model, tmp_path, pattern, changes, lists):
    """Bit for bit, and no weight more than there was; a width that all layers share is a list too."""
    model = make_model(pattern=pattern, **changes)
    save_hf(tmp_path / "out", model.config, model.state_dict(), torch.float64, listed=True)
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: hf[key] for key in lists} == lists
    config, tensors = load_hf(tmp_path / "out", torch.float64)
    assert (config.pattern, config.widths) == (pattern, changes["widths"])
    assert_close(tensors, dict(model.state_dict()), **EXACT)
    again = HybridLM(config).double()
    again.load_state_dict(tensors)
    assert_close(our_logits(again, tokens(2, 11) % 12), our_logits(model, tokens(2, 11) % 12), **EXACT)


# ------------------------------------------------------------------------------------------------------------- config


def write_config(folder, **hf):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    return folder


NANO_12B = {
    "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 20480, "mlp_bias": False,
    "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 80,
    "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "chunk_size": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
}  # fmt: skip
H_8B = NANO_12B | {
    "hidden_size": 4096, "intermediate_size": 21504, "num_attention_heads": 32, "mamba_head_dim": 64,
    "head_dim": None, "attention_head_dim": 128,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
}  # fmt: skip
PUBLISHED = {  # configurations of released models (shape only), and their numbers of parameters
    "Nemotron-Nano-12B-v2": (NANO_12B, 12_310_001_152),
    "Nemotron-Nano-9B-v2": (NANO_12B | {
        "hidden_size": 4480, "intermediate_size": 15680,
        "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    }, 8_888_227_328),
    "Nemotron-H-8B": (H_8B, 8_100_852_736),
    "Nemotron-H-4B": (H_8B | {"hidden_size": 3072, "intermediate_size": 12288, "mamba_num_heads": 112}, 4_489_223_040),
    "Nemotron-3-Nano-4B": (NANO_12B | {
        "hidden_size": 3136, "intermediate_size": 12544, "mamba_num_heads": 96,
        "hybrid_override_pattern": "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
    }, 3_973_556_832),
    "Qwen3-1.7B-Base": ({
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
        "rope_scaling": None, "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False,
    }, 1_720_574_976),
    "Qwen2-7B": ({
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28,
        "tie_word_embeddings": False, "hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02,
    }, 7_615_616_512),
    "Llama-3.2-1B": ({
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": True, "hidden_act": "silu", "max_position_embeddings": 131072,
        "rope_scaling": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    }, 1_235_814_400),
    "Llama-2-7b": ({
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5, "rope_scaling": None,
        "tie_word_embeddings": False, "hidden_act": "silu", "pretraining_tp": 1,
    }, 6_738_415_616),
}  # fmt: skip


@pytest.mark.parametrize(("hf", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_released_shapes_have_their_published_number_of_parameters(tmp_path, hf, expected):
    """By the table of names, and by the model itself on no device."""
    config, family = read_config(write_config(tmp_path, **hf))
    assert sum(math.prod(shape) for _, shape in names(config, family).values()) == expected
    with torch.device("meta"):
        model = HybridLM(config)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert {k: tuple(p.shape) for k, p in model.state_dict().items()}.keys() == names(config, family).keys()


def test_the_spellings_of_a_pattern_are_one(edited):
    """Letters on the hub, two generations of words in transformers; the list counts where both are there."""
    expected, _ = read_config(edited("nemotron_h"))
    assert expected.pattern == "M-M*-"
    words = ["mamba", "mlp", "mamba", "attention", "mlp"]
    for changes in ({"layers_block_type": words}, {"layers_block_type": None, "hybrid_override_pattern": "M-M*-"},
                    {"hybrid_override_pattern": "MMMMM"}):  # fmt: skip
        assert read_config(edited("nemotron_h", **changes))[0] == expected


def test_what_config_json_leaves_out_is_what_transformers_takes(tmp_path):
    """Llama of the first generations: heads not grouped, head_dim of the quotient, theta of 10,000."""
    hf = {k: v for k, v in PUBLISHED["Llama-2-7b"][0].items() if k not in ("num_key_value_heads", "rms_norm_eps")}
    config, _ = read_config(write_config(tmp_path, **hf))
    assert (config.n_kv_heads, config.attn_head_dim, config.rope_theta, config.norm_eps) == (32, 128, 10000.0, 1e-6)
    assert not config.tie_embeddings


@pytest.mark.parametrize("theta", [{"rope_theta": 7.0}, {"rope_parameters": {"rope_theta": 7.0}},
                                   {"rope_theta": 7.0, "rope_scaling": {"type": "default"}}], ids=str)  # fmt: skip
def test_theta_is_read_from_either_place(edited, theta):
    assert read_config(edited("llama", **{"rope_parameters": None} | theta))[0].rope_theta == 7.0


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
REFUSED = [  # family, what config.json says, what the message must say
    ("llama", {"model_type": "gpt2"}, r"model_type \('gpt2'\) is not supported; choose one of nemotron_h, qwen2, qwen3"),
    ("llama", {"model_type": ["llama"]}, r"model_type \(\['llama'\]\) is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, r"rope_type \('dynamic'\) is not supported; .* default, "),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_parameters and rope_scaling must be one"),
    ("llama", {"rope_parameters": 5}, "rope_parameters and rope_scaling must be one"),
    ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": None}, "original_.* is None, and must"),
    ("llama", {"rope_parameters": LLAMA3 | {"factor": 0, "original_max_position_embeddings": 9}}, r"factor \(0\) must be"),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0, "original_max_position_embeddings": 9}},
     r"rope_scaling.low \(4.0\) must be below model.rope_scaling.high \(4.0\)"),
    ("qwen3", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1}, "rope_parameters": None}, "mscale of rope"),
    ("qwen2", {"use_mrope": True}, r"use_mrope \(True\) is not supported, only False"),
    ("llama", {"rope_interleaved": True}, r"rope_interleaved \(True\) is not supported, only False"),
    ("llama", {"logit_scale": 0.5}, r"logit_scale \(0.5\) is not supported; choose another checkpoint, or take the"),
    ("llama", {"original_max_position_embeddings": 9, "rope_parameters": LLAMA3}, r"original_\S* \(9\) is not supported"),
    ("llama", {"sliding_window": 64}, r"sliding_window \(64\) is not supported"),
    ("nemotron_h", {"sliding_window": 64}, r"sliding_window \(64\) is not supported"),
    ("nemotron_h", {"residual_in_fp32": True}, r"residual_in_fp32 \(True\) is not supported, only False"),
    ("nemotron_h", {"time_step_limit": [0.001, 0.1]}, r"time_step_limit \(\[0.001, 0.1\]\) is not supported, only \[0, "),
    ("nemotron_h", {"mamba_d_conv": 2}, r"mamba_d_conv \(2\) is not supported"),
    ("nemotron_h", {"layers_block_type": 5}, r"the layers \(5\) must be a string, or a list of words"),
    ("llama", {"num_attention_heads": 0, "head_dim": None}, r"num_attention_heads \(0\) must be positive"),
    ("llama", {"num_attention_heads": 0}, r"model.n_heads \(0\) must be at least 1"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and must be a whole number of usual size"),
    ("llama", {"hidden_size": 20.5}, "hidden_size is 20.5, and must be a whole number"),
    ("llama", {"vocab_size": 10**4000}, "vocab_size is 10000.*0, and must be a whole number of usual size"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, and must be a number of usual size"),
    ("llama", {"tie_word_embeddings": "false"}, r"tie_word_embeddings \('false'\) must be true or false"),
    ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor \(0.5\) is not supported, only 1"),
    ("llama", {"attention_bias": True}, r"attention_bias \(True\) is not supported, only False"),
    ("llama", {"mlp_bias": True}, r"mlp_bias \(True\) is not supported"),
    ("qwen3", {"hidden_act": "gelu"}, r"hidden_act \('gelu'\) is not supported, only 'silu'"),
    ("qwen3", {"use_sliding_window": True}, r"use_sliding_window \(True\) is not supported"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types \(\['full_attention', 's.*\) is not"),
    ("qwen3", {"quantization_config": {"bits": 4}}, r"quantization_config \(\{'bits': 4\}\) is not supported"),
    ("qwen3", {"hidden_size": None}, r"hidden_size is None, and must be a whole number"),
    ("nemotron_h", {"intermediate_size": [23, 9, 5]}, r"intermediate_size \(\[23, 9, 5\]\) must be a number, or list"),
    ("nemotron_h", {"hidden_size": [23, 11]}, r"hidden_size is \[23, 11\], and must be a whole number .*every layer"),
    ("nemotron_h", {"num_attention_heads": 5}, r"model.n_heads \(5\) must be a multiple of model.n_kv_heads \(2\)"),
    ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "MEM*"}, "layer 1 is a mixture of experts"),
    ("nemotron_h", {"layers_block_type": ["mamba", "moe"]}, "layer 1 is a mixture of experts"),
    ("nemotron_h", {"layers_block_type": ["mamba", "conv"]}, "has the unknown letters 'cnov'"),
    ("nemotron_h", {"layers_block_type": None}, "has neither layers_block_type nor hybrid_override_pattern"),
    ("nemotron_h", {"mlp_hidden_act": "silu"}, r"mlp_hidden_act \('silu'\) is not supported, only 'relu2'"),
    ("nemotron_h", {"use_conv_bias": False}, r"use_conv_bias \(False\) is not supported, only True"),
    ("nemotron_h", {"tie_word_embeddings": True}, r"tie_word_embeddings \(True\) is not supported"),
    *(("nemotron_h", {key: True}, rf"{key} \(True\) is not supported, only False")
      for key in ("use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_model_that_ours_cannot_be_is_refused_by_name(edited, name, changes, said):
    with pytest.raises(ValueError, match=said):
        load_hf(edited(name, **changes))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"
UNREADABLE = {
    "cut off": (b"{", "cannot be read as JSON .*; copy it again"),
    "a list": (b"[1]", "holds no JSON object; copy it again"),
    "deep": (b'{"a": ' + b"[" * 10**5, r"cannot be read as JSON \(maximum recursion depth.*; copy it again"),
    "many digits": (b'{"a": ' + b"7" * 5000 + b"}", "cannot be read as JSON .*5000 digits.; copy it again"),
    "no UTF-8": (b'{"a": "\xff"}', "cannot be read as JSON .*; copy it again"),
    "a pointer": (POINTER.encode(), "config.json is a Git LFS pointer, not the file itself; run `git lfs pull`"),
}


@pytest.mark.parametrize(("content", "said"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_config_json_that_is_none_is_refused(tmp_path, content, said):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json {said.removeprefix('config.json ')}"):
        load_hf(tmp_path)


def test_a_byte_order_mark_before_json_is_passed_over(edited):
    file = edited("llama") / "config.json"
    expected, _ = read_config(file.parent)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_config(file.parent)[0] == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_fields_that_change_nothing_are_passed_over(edited, name):
    """Those of released files, by name; the same model comes out."""
    notes = {"_name_or_path": "x", "torch_dtype": "bfloat16", "attention_dropout": 0.1, "new_field_of_theirs": None}
    notes |= {"hidden_act": "silu", "use_sliding_window": False} if "nemotron" not in name else {
        "time_step_limit": [0.0, float("inf")], "residual_in_fp32": False, "sliding_window": None, "time_step_rank": 256,
        "moe_intermediate_size": 5, "num_query_groups": 2,
    }  # fmt: skip
    expected = read_config(edited(name))
    assert read_config(edited(name, **notes)) == expected


# ------------------------------------------------------------------------------------------------------------ weights


def change_weights(folder, **changes):
    """Replace tensors by name, a None takes one away; `__` stands for a dot."""
    tensors = load_file(folder / "model.safetensors") | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backbone__layers__0__mixer__A_log": None}, r"backbone.layers.0.mixer.A_log is missing"),
        ({"backbone__layers__3__mixer__q_proj__bias": torch.ones(20)}, r"backbone.layers.3.mixer.q_proj.bias is unknown"),
        ({"backbone__layers__0__mixer__conv1d__weight": torch.ones(72, 3)},
         r"backbone.layers.0.mixer.conv1d.weight has shape \[72, 3\], the model needs \[72, 1, 3\]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(edited, changes, said):
    with pytest.raises(ValueError, match=rf"does not fit the model: {said}; config.json and weights must be of the same"):
        load_hf(change_weights(edited("nemotron_h"), **changes))


NOT_WEIGHTS = {
    "int8": (torch.ones(20, dtype=torch.int8), "is torch.int8, which holds no weights without their scales"),
    "fp8": (torch.ones(20).to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, which holds no weights without"),
    "NaN": (torch.full((20,), float("nan")), "has NaN or infinite values; copy it again"),
    "infinite": (torch.full((20,), float("-inf")), "has NaN or infinite values; copy it again"),
}


@pytest.mark.parametrize(("t", "said"), NOT_WEIGHTS.values(), ids=NOT_WEIGHTS)
def test_tensors_that_hold_no_weights_are_named(edited, t, said):
    with pytest.raises(ValueError, match=f"model.safetensors: model.norm.weight {said}"):
        load_hf(change_weights(edited("llama"), model__norm__weight=t))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_what_wrappers_put_before_names_is_taken_off(edited, prefix):
    folder = edited("qwen2")
    expected = load_hf(folder)[1]
    tensors = load_file(folder / "model.safetensors")
    inner = {name.replace("layers.1.", "layers.1._orig_mod."): t for name, t in tensors.items()}
    save_file({prefix + name: t for name, t in inner.items()}, folder / "model.safetensors")
    assert_close(load_hf(folder)[1], expected, **EXACT)
    save_file(tensors | {f"{prefix}model.norm.weight": torch.ones(20)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight is there twice"):
        load_hf(folder)


def test_a_missing_head_is_followed_by_a_hint(edited):
    with pytest.raises(ValueError, match=r"lm_head.weight is missing; .* set tie_word_embeddings to true"):
        load_hf(change_weights(edited("llama"), lm_head__weight=None))


@pytest.mark.parametrize("places", [None, [], {}, {"a": 5}, {"a": ["b"]}, {"a": "../b.safetensors"}], ids=str)
def test_an_index_that_names_no_files_is_refused(edited, places):
    folder = edited("llama")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"index.json: weight_map must give each tensor a file of this folder"):
        load_hf(folder)


def test_a_pointer_in_place_of_weights_is_called_one(edited):
    folder = edited("llama")
    (folder / "model.safetensors").write_text(POINTER)
    with pytest.raises(
        ValueError, match=r"model.safetensors is a Git LFS pointer, not the file itself; run `git lfs pull`"
    ):
        load_hf(folder)


def test_heads_for_several_tokens_and_old_constants_are_passed_over(edited):
    folder = edited("nemotron_h")
    expected = load_hf(folder)[1]
    extra = {"mtp__layers__0__norm__weight": torch.ones(3), "backbone__layers__0__rotary_emb__inv_freq": torch.ones(3)}
    assert_close(load_hf(change_weights(folder, **extra))[1], expected, **EXACT)


def test_a_head_beside_tied_embeddings_must_equal_them(edited):
    folder = edited("qwen3-tied")
    config, expected = load_hf(folder)
    head_VD = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert_close(load_hf(change_weights(folder, lm_head__weight=head_VD.clone()))[1], expected, **EXACT)
    with pytest.raises(
        ValueError, match=r"tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens"
    ):
        load_hf(change_weights(folder, lm_head__weight=head_VD + 1))


def test_files_that_are_missing_or_damaged_are_named(edited, saved, tmp_path):
    folder = edited("llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read \(.*\); copy it again"):
        load_hf(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors does not exist; weights must be safetensors files"):
        load_hf(folder)
    save_hf(tmp_path / "sharded", *load_hf(saved["llama"][1]), shard_bytes=3000)
    (tmp_path / "sharded" / "model-00002-of-00018.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00018.safetensors does not exist"):
        load_hf(tmp_path / "sharded")


def test_new_rows_are_the_mean_of_those_before_them():
    tensors = {"embed.weight": torch.tensor([[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]]), "other": torch.ones(1)}
    assert add_rows(tensors, []) is tensors
    assert add_rows(tensors, [3, 4])["embed.weight"].tolist()[3:] == [pytest.approx([13 / 3, 17 / 3])] * 2
    assert add_rows(tensors, [2, 3])["embed.weight"].tolist() == [[1, 2], [3, 6], [2, 4], [2, 4]]
    assert add_rows({"head.weight": tensors["embed.weight"]}, [1])["head.weight"].tolist() == [[1, 2], [1, 2], [9, 9]]


# -------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (
            {"pattern": "M*-", "ffn": "swiglu"},
            r"no family has the pattern 'M\*-' with model.ffn \('swiglu'\): Nemotron-H has",
        ),
        ({"pattern": "M*-", "rope_theta": 1e4, "qk_norm": True}, r"with model.rope_theta \(10000.0\) and model.qk_norm"),
        ({"pattern": "*-", "ffn": "swiglu"}, r"model.ffn \('swiglu'\)"),
        (
            {"pattern": "*-", "ffn": "swiglu", "rope_theta": 1e4, "n_heads": 6, "n_kv_heads": 2},
            "no multiple of model.n_heads",
        ),
        ({"pattern": "M*-", "qkv_bias": True}, r"'M\*-' with model.qkv_bias \(True\)"),
        (
            {"pattern": "*-", "ffn": "swiglu", "rope_theta": 1e4, "qk_norm": True, "qkv_bias": True},
            "model.qk_norm and model.qkv_bias are set, and no family has both",
        ),
    ],
)
def test_a_model_that_no_family_has_is_refused(shape, said):
    with pytest.raises(ValueError, match=said):
        family_of(ModelConfig(**shape))


def test_qwen2_needs_no_multiple_of_its_heads():
    shape = {"pattern": "*-", "ffn": "swiglu", "rope_theta": 1e4, "n_heads": 6, "n_kv_heads": 2, "qkv_bias": True}
    assert family_of(ModelConfig(**shape)) == "qwen2"


def test_an_export_onto_a_full_disk_names_the_folder(make_model, tmp_path, monkeypatch):
    def full(*of, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model = make_model()
    monkeypatch.setattr(huggingface, "save_file", full)
    with pytest.raises(OSError, match=r"cannot be written .*No space left.*; is the disk full") as caught:
        save_hf(tmp_path / "out", model.config, model.state_dict())
    assert caught.value.filename.startswith(str(tmp_path))


def test_an_export_overwrites_nothing_and_fits_its_settings(make_model, tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match=r"layers.0.mixer.in_proj.weight has shape .*; give the settings that the weights"):
        save_hf(tmp_path / "out", dataclasses.replace(model.config, mamba_heads=2), model.state_dict())
    assert not (tmp_path / "out").exists()
    save_hf(tmp_path / "out", model.config, model.state_dict())
    with pytest.raises(ValueError, match=r"out \(.*\) already holds a model; choose another --out"):
        save_hf(tmp_path / "out", model.config, model.state_dict())


def test_exporting_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert export.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert f"error: {tmp_path} holds no checkpoint" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- beside transformers


@pytest.mark.parametrize(
    ("first", "with_package", "works"),
    [("", False, True), ("", True, False), ("import hf_models", True, True)],
    ids=["without the package", "with it", "with it, switched off"],
)
def test_transformers_can_be_imported_beside_our_kernels(tmp_path, first, with_package, works):
    """Ours bears the name of a package that transformers imports where the metadata of a fitting version are installed.

    Then it finds our file, and fails. No run imports transformers; the tests switch that import off.
    """
    info = tmp_path / "packages" / "kernels-0.18.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n")
    path = [str(ROOT), str(ROOT / "tests")] + [str(info.parent)] * with_package
    script = f"import kernels\n{first}\nfrom transformers import NemotronHForCausalLM\nprint(kernels.ssd.__name__)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=240
    )
    assert (done.returncode == 0 and "ssd" in done.stdout) == works, done.stderr
    assert works or "from 'kernels'" in done.stderr


def test_nothing_but_tests_and_benchmarks_imports_transformers():
    for file in {f for f in ROOT.rglob("*.py") if f.parent.name != "tests"} - {ROOT / "tools/bench.py"}:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
            assert not any(m.split(".")[0] == "transformers" for m in modules), file


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "model.safetensors.index.json"])
def test_an_export_over_a_model_without_its_config_is_refused_and_leaves_it(tmp_path, capsys, name):
    (tmp_path / name).write_text("kept")
    assert export.main([str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert f"holds {name}, which would be written over" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "kept"
