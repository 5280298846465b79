"""Tiny random models of transformers, for the tests that compare with it. Odd sizes: no two dimensions are equal."""

import transformers.utils
import transformers.utils.import_utils

# transformers takes this repository's kernels.py for the package of that name where that package is installed too, and
# cannot find in it what it wants; a test of its own shows it. So it must not look.
transformers.utils.is_kernels_available = transformers.utils.import_utils.is_kernels_available = lambda *_: False

import torch  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"vocab_size": 37, "hidden_size": 20, "intermediate_size": 23, "head_dim": 6, **NO_IDS}
# time_step_min: transformers clamps step sizes there in prefill, and only there; here that does nothing.
NEMOTRON = SIZES | {
    "mamba_num_heads": 6, "mamba_head_dim": 5, "n_groups": 3, "ssm_state_size": 7, "conv_kernel": 3, "chunk_size": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "time_step_min": 1e-12,
    "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"],
}  # fmt: skip
HEADS = {"num_hidden_layers": 3, "num_attention_heads": 5, "num_key_value_heads": 1}


def rope(theta, kind="default", **scaling):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}


# Lengths of a few turns, so that of three pairs one stays, one is divided and one lies between.
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
YARN = {"factor": 4.0, "original_max_position_embeddings": 300}


MAKE = {
    "nemotron_h": lambda: NemotronHForCausalLM(NemotronHConfig(**NEMOTRON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES | HEADS | {"num_attention_heads": 7}, **rope(1e6))),
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES | HEADS, **rope(1e4), tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | HEADS, **rope(500.0))),
    "llama-3": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES | HEADS, **rope(9.0, "llama3", **LLAMA3), tie_word_embeddings=True)
    ),
    "llama-linear": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | HEADS, **rope(500.0, "linear", factor=3.0))),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES | HEADS, **rope(1e6))),
    "qwen2-tied": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES | HEADS, **rope(9.0, "yarn", **YARN), tie_word_embeddings=True)
    ),
}


def tiny(name):
    """A model of that name. Vectors are drawn around 1, matrices around 0: no weight is without effect."""
    model = MAKE[name]()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        scale = 0.5 if "embed" in name else 1.5  # small, or a tied model would say the same token again and again
        p.data = torch.randn(p.shape, generator=generator) * (scale * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3)
        p.data += p.dim() == 1
    model.tie_weights()
    return model.eval()
