"""What a dry run says: counts against what is built, FLOPs and bytes by hand, the presets of the papers."""

import dataclasses
import itertools
import json
import re
import time
from pathlib import Path

import pytest
import torch
from conftest import bytes_kept
from torch import nn
from two_processes import TOKENIZER, make_batch

import nested
import routers
import train
from elastic import Elastic
from model import Block, HybridLM
from rlp import RLP
from system import loop, lora, parallel, presets, rundir
from system.config import (
    Config,
    CPTConfig,
    ElasticConfig,
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    PretrainConfig,
    RLPConfig,
    RLVRConfig,
    WarmupConfig,
    from_dict,
)
from system.costs import count_parameters, matrix_parameters, part_parameters
from system.objective import NextToken
from system.presets import NEMOTRON_12B, PAPERS, PRESETS, QWEN3_1_7B
from tools.bench import peak_bytes
from views import estimate

# Two layers whose numbers are easy: no attention, so f does not depend on the length.
PLAIN = ModelConfig(pattern="M-", vocab_size=100, d_model=10, d_ff=20, mamba_heads=2, mamba_head_dim=5, d_state=4)
# "-": 2 (2 x 10 x 20) = 800. "M": inner 10, conv 18; matrices 10 (30 + 8 + 2) = 400; 800 + 2 x 4 x 18 + 5 x 10 x 4 = 1144.
BODY, HEAD = 800 + 1144, 2 * 100 * 10
# The released 9B: the 12B without one M, two * and three -, narrower.
NANO_9B = dataclasses.replace(
    NEMOTRON_12B, pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", d_model=4480, d_ff=15680
)


def run_of(mode, **changes) -> Config:
    """A run of one phase."""
    return dataclasses.replace(Config(mode=mode, model=PLAIN, init="x", warmup=WarmupConfig(steps=0)), **changes)


# ------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(("ffn", "qk_norm"), list(itertools.product(("relu2", "swiglu"), (False, True))))
@pytest.mark.parametrize("kind", "M*-")
def test_counts_in_closed_form_equal_those_of_the_layer_that_is_built(kind, ffn, qk_norm):
    shape = ModelConfig(
        pattern="M*-", vocab_size=11, d_model=10, d_ff=7, ffn=ffn, n_heads=6, n_kv_heads=3, attn_head_dim=5,
        qk_norm=qk_norm, mamba_heads=4, mamba_head_dim=3, mamba_groups=2, d_state=5, conv_width=3,
    )  # fmt: skip
    block = Block(kind, shape)
    assert part_parameters(kind, shape) == count_parameters(block)
    assert matrix_parameters(kind, shape) == sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_equal_those_of_the_model_that_is_built_where_layers_differ(tied):
    shape = ModelConfig(pattern="M*-M", vocab_size=11, d_model=10, tie_embeddings=tied, widths=((4, 2), (2,), (5,), (8, 1)))
    assert estimate.parameters(shape) == count_parameters(HybridLM(shape))


@pytest.mark.parametrize(
    ("name", "count"),
    [("qwen3-1.7b-rlp", 1_720_574_976), ("nemotron-12b-rlp", 12_310_001_152), ("nemotron-12b-elastic", 12_310_001_152)],
)
def test_a_papers_preset_builds_on_the_meta_device_with_the_released_models_count(name, count):
    with torch.device("meta"):
        assert count_parameters(HybridLM(PAPERS[name].model)) == count
    assert estimate.parameters(PAPERS[name].model) == count


# -------------------------------------------------------------------------------------------------------------- FLOPs


def test_flops_of_pretraining_by_hand():
    """Three forward passes of 2 sequences of 8 tokens."""
    (phase,) = estimate.phases(run_of("pretrain", pretrain=PretrainConfig(steps=5, batch=2, seq_len=8)))
    assert (phase.n_steps, phase.n_tokens) == (5, 16)
    assert phase.flops == {"train": 3 * 16 * (BODY + HEAD)}


def test_flops_of_attention_count_the_positions_that_are_seen():
    """8 query heads of 16: 4 x 16 x 8 a position. 6 tokens after 10 cached ones see 10 + 3 on average; from none, 3."""
    shape = ModelConfig(pattern="*", vocab_size=10, d_model=4, n_heads=8, n_kv_heads=2, attn_head_dim=16)
    matrices = 2 * 4 * 2 * (8 + 2) * 16
    assert estimate.body_flops(shape, 6) == 6 * (matrices + 512 * 3)
    assert estimate.body_flops(shape, 6, 10) == 6 * (matrices + 512 * 13)
    whole, first = estimate.body_flops(shape, 16), estimate.body_flops(shape, 10)
    assert whole - first == estimate.body_flops(shape, 6, 10)


def test_flops_of_rlp_by_hand():
    """2 contexts of 8 tokens, 3 thoughts of 4, horizon 1: 16 context tokens and 24 of thoughts, run once for the rollout
    and three times for each of 2 updates; scored are 16 context tokens with 2 logits, and 6 closing tags with theirs.
    """
    c = RLPConfig(batch=2, context_len=8, group_size=3, thought_len=4, inner_epochs=2, steps=7, back=0)
    (phase,) = estimate.phases(run_of("rlp", rlp=c))
    sampled = 16 * BODY + 24 * (BODY + HEAD)
    assert phase.flops == {
        "rollout": sampled, "scoring": 16 * BODY + 2 * HEAD + 6 * (BODY + HEAD), "policy": 6 * sampled
    }  # fmt: skip
    assert phase.n_tokens == 16
    with_kl = estimate.phases(run_of("rlp", rlp=dataclasses.replace(c, kl=0.1)))[0]
    assert with_kl.flops["reference"] == sampled


@pytest.mark.parametrize(("positions", "n_back"), [("answer", 2), ("random", 4)])
def test_flops_of_reading_thoughts_some_tokens_back_by_hand(positions, n_back):
    """4 contexts of 8 tokens, 3 thoughts of 4, horizon 2; thoughts of half of the contexts (of all, at random positions)
    stand 5 tokens back. Each is read again from there: <think>, 4 tokens, the 5 and the target's first are 11 (without the
    5, 6), with 2 logits. A query sees what is before it: in a layer of attention after 3 tokens of context 3 + 11 / 2.
    """
    c = RLPConfig(batch=4, context_len=8, group_size=3, thought_len=4, horizon=2, text_share=0.375, computed_share=0.125)
    shape = ModelConfig(pattern="*", vocab_size=10, d_model=4, n_heads=8, n_kv_heads=2, attn_head_dim=16)
    matrices, seen, head = 2 * 4 * 2 * (8 + 2) * 16, 4 * 16 * 8, 2 * 10 * 4
    scoring = [
        estimate.phases(run_of("rlp", model=shape, rlp=dataclasses.replace(c, positions=positions, back=back)))[0].flops
        for back in (0, 5)
    ]
    again = n_back * 11 * (matrices + seen * 8.5) + (4 - n_back) * 6 * (matrices + seen * 11) + 4 * 2 * head
    assert scoring[1]["scoring"] - scoring[0]["scoring"] == pytest.approx(3 * again)
    assert {**scoring[1], "scoring": 0} == {**scoring[0], "scoring": 0}


def test_without_text_and_computed_documents_no_thought_is_read_again():
    c = RLPConfig(text_share=0.0, computed_share=0.0, back=5)
    first, second = (estimate.phases(run_of("rlp", rlp=dataclasses.replace(c, back=back)))[0].flops for back in (0, 5))
    assert first == second


def test_flops_of_elastic_are_those_of_the_teacher_and_of_the_budgets_as_they_are_drawn():
    """10 steps: 4 of search at full size, 2 of stage 1, 4 of stage 2. Of the full size f and of about half of it, g:
    3 f while searching, 3 (f + g) / 2 in stage 1, 3 (0.9 f + 0.1 g) in stage 2.
    """
    c = ElasticConfig(
        steps=10, batch=4, seq_len=16, long_len=32, long_share=0.4, search_share=0.4, budgets=(1.0, 0.49),
        long_weights=(9.0, 1.0), d_model_choices=(10, 5), ffn_choices=(20, 10, 5), mamba_head_choices=(2, 1),
    )  # fmt: skip
    config = run_of("elastic", elastic=c)
    full, half = estimate.family(PLAIN, c)
    assert full.d_model == 10
    f, g = (64 * (estimate.body_flops(s, 1) + estimate.head_flops(s, 1)) for s in (full, half))
    assert g < 0.8 * f
    search, short, long = estimate.phases(config)
    assert [(p.name, p.n_steps, p.n_tokens) for p in (search, short, long)] == [
        ("stage 1, search", 4, 64), ("stage 1", 2, 64), ("stage 2", 4, 64)
    ]  # fmt: skip
    assert [p.flops["teacher"] for p in (search, short, long)] == [f, f, f]
    students = [p.flops["student"] for p in (search, short, long)]
    assert students == pytest.approx([3 * f, 1.5 * (f + g), 3 * (0.9 * f + 0.1 * g)])
    with_self = estimate.phases(run_of("elastic", elastic=dataclasses.replace(c, self_kl=0.5)))
    assert [p.flops["teacher"] for p in with_self] == pytest.approx([1.5 * f, 1.5 * f, 1.1 * f])  # not for the full budget


def test_sequences_that_train_all_budgets_share_the_parents_pass():
    """f and g are passes of the full model and of half of it: f for the parent, 3 f and 3 g. Of the default preset a step
    at 50 %, with its third of the parent's pass, takes less than .55 of a full step with a pass of its own."""
    c = ElasticConfig(steps=10, batch=4, seq_len=16, long_share=0.0, search_share=0.0, budgets=(1.0, 0.49), self_kl=1.0,
                      long_weights=(1, 1), d_model_choices=(10, 5), ffn_choices=(20, 10, 5), mamba_head_choices=(2, 1),
                      together=True)  # fmt: skip
    f, g = (64 * (estimate.body_flops(s, 1) + estimate.head_flops(s, 1)) for s in estimate.family(PLAIN, c))
    (phase,) = estimate.phases(run_of("elastic", elastic=c))
    assert phase.flops == pytest.approx({"teacher": f, "student": 3 * f + 3 * g})
    shape = dataclasses.replace(PRESETS["cpu"].model, vocab_size=1024)
    c = ElasticConfig(steps=10, batch=4, seq_len=256, long_share=0.0, search_share=0.0, budgets=(1.0, 0.8, 0.65, 0.5),
                      long_weights=(1, 1, 1, 1), together=True)  # fmt: skip
    sizes = [estimate.forward_flops(s, 4, 256) for s in estimate.family(shape, c)]
    (phase,) = estimate.phases(dataclasses.replace(run_of("elastic", elastic=c), model=shape))
    assert phase.flops["student"] == pytest.approx(3 * (sizes[0] + (sizes[1] + sizes[2]) / 2 + sizes[3]))  # one is drawn
    f, _, g = (estimate.forward_flops(s, 1, 256) for s in estimate.family(shape, PRESETS["cpu"].elastic))
    assert (f / 3 + 3 * g) / (f + 3 * f) < 0.55


ALONE = {"pretrain": ["pretrain"], "warmup": ["warmup"], "cpt": ["cpt"], "rlp": ["rlp"],
         "sft": ["sft"], "rlvr": ["rlvr"], "elastic": ["stage 1, search", "stage 1", "stage 2"]}  # fmt: skip


@pytest.mark.parametrize(
    ("init", "warmup_steps", "before"),
    [
        (
            "",
            3,
            {"pretrain": [], "warmup": ["pretrain"]}
            | {key: ["pretrain", "warmup"] for key in ("cpt", "rlp", "sft", "rlvr", "elastic")},
        ),
        (
            "",
            0,
            {"pretrain": [], "warmup": ["pretrain"]}
            | {key: ["pretrain"] for key in ("cpt", "rlp", "sft", "rlvr", "elastic")},
        ),
        ("x", 3, {"pretrain": [], "warmup": []} | {key: ["warmup"] for key in ("cpt", "rlp", "sft", "rlvr", "elastic")}),
        ("x", 0, {key: [] for key in ALONE}),
    ],
)
def test_a_base_that_init_does_not_bring_and_the_warm_up_are_counted(init, warmup_steps, before):
    """Where there is something to warm up, and steps for it. The estimate's phases are those that a run goes through."""
    for mode, own in ALONE.items():
        found = estimate.phases(run_of(mode, init=init, warmup=WarmupConfig(steps=warmup_steps)))
        assert [p.name for p in found] == before[mode] + own


def test_phases_of_next_token_prediction_have_their_own_lengths():
    """Sequences of 8 tokens, then 4 of 32; continued pretraining goes on with the warm-up's length, 5 at a time."""
    config = run_of("cpt", init="", pretrain=PretrainConfig(steps=5, batch=2, seq_len=8),
                    warmup=WarmupConfig(steps=7, batch=4, seq_len=32), cpt=CPTConfig(steps=9, batch=5))  # fmt: skip
    found = estimate.phases(config)
    assert [(p.name, p.n_steps, p.n_tokens) for p in found] == [("pretrain", 5, 16), ("warmup", 7, 128), ("cpt", 9, 160)]
    assert [p.flops["train"] for p in found] == [3 * n * (BODY + HEAD) for n in (16, 128, 160)]
    assert estimate.facts(config)["total_tokens"] == 5 * 16 + 7 * 128 + 9 * 160


# ------------------------------------------------------------------------------------------------------------- memory


def test_memory_of_the_12b_by_hand():
    """12.31 billion weights in bf16 are 24.6 GB. In fp32 weights and gradients take 49.2 GB each, AdamW twice that."""
    assert 2 * estimate.parameters(NEMOTRON_12B) / 1e9 == pytest.approx(24.6, abs=0.05)
    kept = estimate.memory(PAPERS["nemotron-12b-rlp"], n_gpus=32)
    assert kept["weights"] * 32 / 1e9 == pytest.approx(49.24, abs=0.01)
    assert kept["gradients"] == kept["weights"] == kept["EMA teacher"] == kept["optimizer"] / 2
    assert kept["optimizer"] * 32 == 8 * 12_310_001_152


def test_muon_keeps_one_number_for_each_weight_of_a_layers_matrices():
    """The matrices of layers hold 2 x 10 x 20 and 10 (30 + 8 + 2) weights: 4 bytes each instead of 8."""
    config = run_of("pretrain", pretrain=PretrainConfig(muon_lr=0.01))
    n, inner = estimate.parameters(PLAIN), 400 + 400
    assert estimate.memory(config)["optimizer"] == 8 * (n - inner) + 4 * inner


def test_the_family_takes_what_its_largest_takes_and_separate_models_their_sum():
    """The paper: 24 GB for 12B, 9B and 6B in one, 42 GB for the released 12B and 9B (24.62 + 17.78)."""
    found = estimate.family_bytes(NEMOTRON_12B, PAPERS["nemotron-12b-elastic"].elastic)
    assert found["model"] / 1e9 == pytest.approx(24.6, abs=0.05)
    assert found["router"] < 0.02 * found["model"]
    assert found["separate"] / 1e9 == pytest.approx(24.6 + 18.0 + 12.0, rel=0.01)
    assert estimate.parameters(NANO_9B) == 8_888_227_328
    assert 2 * (estimate.parameters(NEMOTRON_12B) + estimate.parameters(NANO_9B)) / 1e9 == pytest.approx(42.4, abs=0.05)


def test_caches_of_the_12b_by_hand():
    """Keys and values: 6 layers x 2 x 8 heads x 128 x 2 bytes = 24,576 a token; Mamba: 140 MiB of fp32 states a sequence,
    and 28 x 3 x 12,288 x 2 bytes of convolution tails.
    """
    assert estimate.cache_bytes(NEMOTRON_12B, 1) - estimate.cache_bytes(NEMOTRON_12B, 0) == 24_576
    assert estimate.cache_bytes(NEMOTRON_12B, 0) == 140 * 2**20 + 28 * 3 * 12_288 * 2


@pytest.mark.parametrize("rank", [0, 8, 32])
@pytest.mark.parametrize("changes", [{}, {"ffn": "swiglu", "rope_theta": 1e4, "qk_norm": True}], ids=["nemotron", "qwen"])
@pytest.mark.parametrize("kind", "M*-")
def test_activations_are_within_a_tenth_of_what_autograd_keeps(kind, changes, rank):
    shape = ModelConfig(
        pattern=kind if kind != "-" else "M-", vocab_size=10, d_model=64, d_ff=256, n_heads=8, n_kv_heads=2,
        attn_head_dim=16, mamba_heads=8, mamba_head_dim=16, mamba_groups=2, d_state=16, chunk=16, **changes,
    )  # fmt: skip
    block, x_BTD = Block(kind, shape), torch.randn(2, 64, 64, requires_grad=True)
    if rank:
        network = nn.Module()
        network.layers = nn.ModuleList([block])
        lora.adapt(network, LoRAConfig(rank=rank))
    found = bytes_kept(block, x_BTD, enabled=False)
    assert estimate.kept_bytes(kind, shape, rank, low=False) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("changes", [{}, {"ffn": "swiglu", "rope_theta": 1e4, "qk_norm": True}], ids=["nemotron", "qwen"])
@pytest.mark.parametrize("kind", "*-")
def test_activations_in_bf16_are_within_an_eighth_of_what_autograd_keeps(kind, changes):
    """Casts of weights left out, of which each is made once. Mamba-2 keeps what its kernels do: see interpreted.py."""
    shape = ModelConfig(pattern="M" + kind, vocab_size=10, d_model=64, d_ff=256, n_heads=8, n_kv_heads=2,
                        attn_head_dim=16, **changes)  # fmt: skip
    block, x_BTD = Block(kind, shape), torch.randn(2, 72, 64, requires_grad=True)
    assert estimate.kept_bytes(kind, shape, low=True) == pytest.approx(bytes_kept(block, x_BTD), rel=0.125)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pattern", ["*-" * 8, "M-M*-M-M-M*-"], ids=["attention", "hybrid"])
def test_a_step_of_rlp_with_adapters_peaks_within_a_tenth_of_the_estimate(pattern, recompute):
    """What stays between steps is equal but for AdamW's counters of steps."""
    shape = ModelConfig(
        pattern=pattern, vocab_size=512, ffn="swiglu", rope_theta=1e4, qk_norm=True, tie_embeddings=True, d_state=16
    )  # fmt: skip
    c = RLPConfig(batch=2, accumulate=2, context_len=64, thought_len=32, back=0)
    config = run_of("rlp", model=shape, rlp=c, lora=LoRAConfig(rank=32))
    parallel.start(ParallelConfig(activation_checkpointing=recompute), torch.device("cpu"))
    model, objective = parallel.shard(lora.adapt(HybridLM(shape), config.lora)), RLP(c, TOKENIZER)
    optimizers = loop.build_optimizers(model, c)
    batch = {k: v[:2] for k, v in make_batch("rlp", 0).items()}
    batch |= {"context_BT": torch.randint(0, 28, (2, 64)), "ids_BT": torch.zeros(2, 64, dtype=torch.long),
              "target_BX": batch["target_BX"][:, :1], "back_B": torch.zeros(2, dtype=torch.long)}  # fmt: skip

    def step():
        pieces = enumerate(loop.split_batch(batch, 2))
        parts = [objective.prepare(model, piece, 0, torch.Generator().manual_seed(i)) for i, piece in pieces]
        loop.update(model, objective, parts, optimizers, c, 0)
        objective.after_step(model)

    step()
    peak = peak_bytes(step, torch.device("cpu"))
    parallel.stop()
    moments = [t for o in optimizers for state in o.state.values() for t in state.values()]
    tensors = [*model.parameters(), *objective.networks["teacher"].parameters(), *moments]
    stays = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    kept = estimate.memory(config, 1, recompute)
    names = "frozen weights", "weights", "optimizer", "EMA teacher"
    assert stays == pytest.approx(sum(kept[name] for name in names), rel=1e-3)
    assert kept["at the peak"] == pytest.approx(stays + peak, rel=0.1)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ["cpt", "elastic", "rlp"])
def test_a_step_of_all_weights_peaks_within_a_tenth_of_the_estimate(mode, recompute):
    """Elastic at its full budget, which takes most, with the divergence from its parent."""
    shape = ModelConfig(pattern="M-M*-M-M-M*-", vocab_size=512)
    fits = {"cpt": {"warmup": WarmupConfig(seq_len=96), "cpt": CPTConfig(batch=8)},
            "elastic": {"elastic": ElasticConfig(batch=8, seq_len=96, long_share=0.0, choose="fixed")},
            "rlp": {"rlp": RLPConfig(batch=8, accumulate=2, context_len=64, thought_len=32, back=0)}}  # fmt: skip
    config = run_of(mode, model=shape, **fits[mode])
    c = getattr(config, mode)
    parallel.start(ParallelConfig(activation_checkpointing=recompute), torch.device("cpu"))
    model = HybridLM(shape)
    frozen = [parallel.frozen_copy(model) for _ in range(mode == "elastic")]
    router = routers.build_router(shape, config.elastic, list(range(12)), torch.device("cpu"))
    objective = {"cpt": NextToken, "rlp": lambda: RLP(c, TOKENIZER), "elastic": lambda: Elastic(c, router, *frozen)}[mode]()
    model = parallel.shard(model)
    if mode == "rlp":
        batch = {k: v[:4] for k, v in make_batch("rlp", 0).items()}
        batch |= {"context_BT": torch.randint(0, 28, (4, 64)), "ids_BT": torch.zeros(4, 64, dtype=torch.long),
                  "target_BX": batch["target_BX"][:, :1], "back_B": torch.zeros(4, dtype=torch.long)}  # fmt: skip
    else:
        tokens = torch.randint(0, 28, (8, 97))
        batch = {"tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], "ids_BT": torch.zeros(8, 96, dtype=torch.long),
                 "budget_B": torch.zeros(8, dtype=torch.long)}  # fmt: skip
    optimizers = loop.build_optimizers(model, c)

    def step():
        parts = [objective.prepare(model, batch, 0, torch.Generator().manual_seed(i)) for i in range(c.accumulate)]
        loop.update(model, objective, parts, optimizers, c, 0)
        objective.after_step(model)

    step()
    peak = peak_bytes(step, torch.device("cpu"))
    parallel.stop()
    teachers = [objective.networks["teacher"]] if mode == "rlp" else frozen
    moments = [t for o in optimizers for state in o.state.values() for t in state.values()]
    tensors = [*model.parameters(), *moments, *(p for teacher in teachers for p in teacher.parameters())]
    stays = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    kept = estimate.memory(config, 1, recompute)
    assert kept["at the peak"] == pytest.approx(stays + peak, rel=0.1)


def test_memory_of_adapters_by_hand():
    """Rank 2. Matrices: 10 to 20, 20 to 10, 10 to 30 and 10 to 10; their adapters have 2 (30 + 30 + 40 + 20) = 240
    numbers. The 800 weights of matrices are frozen in bf16, the others in fp32; two GPUs have all of it each.
    """
    c = RLPConfig(batch=2, context_len=8, group_size=2, thought_len=4, kl=0.1)
    config = run_of("rlp", rlp=c, lora=LoRAConfig(rank=2), parallel=ParallelConfig(dtype="bf16"))
    kept = estimate.memory(config, n_gpus=2)
    assert kept["frozen weights"] == 4 * (estimate.parameters(PLAIN) - 800) + 2 * 800
    states = kept["weights"], kept["gradients"], kept["EMA teacher"], kept["starting weights"], kept["optimizer"] / 2
    assert states == (4 * 240,) * 5
    assert kept["whole weights"] == 2 * 3 * (240 + 100 * 10)
    assert kept["gathered layers"] == 0


def test_frozen_weights_take_two_forward_passes_of_training_instead_of_three():
    for mode, part in (("rlp", "policy"), ("cpt", "train")):
        full, thin = (estimate.phases(run_of(mode, lora=LoRAConfig(rank=rank)))[0].flops for rank in (0, 2))
        assert {**full, part: 0} == {**thin, part: 0}
        assert thin[part] == pytest.approx(full[part] * 2 / 3)


def test_adapters_of_rank_64_train_qwen3_1_7b_on_a_card_of_20_gb():
    """G 16, contexts of 2,048 tokens, thoughts of 512, one context at a time, layers recomputed."""
    c = dataclasses.replace(PAPERS["qwen3-1.7b-rlp"].rlp, thought_len=512, accumulate=512)
    assert (c.group_size, c.context_len) == (16, 2048)
    config = dataclasses.replace(PAPERS["qwen3-1.7b-rlp"], rlp=c, lora=LoRAConfig(rank=64))
    assert estimate.memory(config, 1, recompute=True)["at the peak"] < 20e9
    assert estimate.memory(dataclasses.replace(config, lora=LoRAConfig()), 1, recompute=True)["at the peak"] > 35e9


def test_more_gpus_share_the_states_and_the_batch_and_recomputing_keeps_less():
    config = PAPERS["nemotron-12b-elastic"]
    one, two = (estimate.memory(config, n) for n in (128, 256))
    assert two["weights"] == one["weights"] / 2
    assert two["activations"] == pytest.approx(one["activations"] / 2, rel=0.05)
    assert two["parent"] == one["parent"] / 2
    assert estimate.memory(config, 256, recompute=True)["at the peak"] < two["at the peak"]


def test_the_peak_of_rlp_is_that_of_rollouts_or_of_the_update():
    """12.31 billion weights in fp32, a fifth part for each of five states; whole, in bf16, twice for the rollouts.
    Thoughts of half the length leave the update less than the rollouts."""
    config, n = PAPERS["nemotron-12b-rlp"], 12_310_001_152
    short = dataclasses.replace(config, rlp=dataclasses.replace(config.rlp, thought_len=1024))
    kept = estimate.memory(short, 32, recompute=True)
    assert kept["whole weights"] == 2 * 2 * n
    rollouts = kept["whole weights"] + kept["caches"]
    update = kept["gathered layers"] + kept["forked contexts"] + kept["activations"]
    assert rollouts > update
    assert kept["at the peak"] == pytest.approx(5 * 4 * n / 32 + rollouts)
    alone = estimate.memory(config, 32)
    update = alone["gathered layers"] + alone["forked contexts"] + alone["activations"]
    assert alone["at the peak"] == pytest.approx(5 * 4 * n / 32 + update)


def test_elastic_shares_out_its_parent_and_gathers_layers_of_both():
    """Of 64 GPUs each has 1/64 of 49.2 GB of weights and as much of the parent; of both a layer and the next are there at
    once, in bf16, beside embeddings and head."""
    kept = estimate.memory(PAPERS["nemotron-12b-elastic"], 64, recompute=True)
    assert kept["parent"] == kept["weights"] == 4 * 12_310_001_152 / 64
    assert kept["gathered layers"] == 2 * estimate.memory(PAPERS["nemotron-12b-rlp"], 64)["gathered layers"]
    assert "whole weights" not in kept
    alone = estimate.memory(PAPERS["nemotron-12b-elastic"], 1)
    assert (alone["gathered layers"], alone["parent"]) == (0, 4 * 12_310_001_152)


# ------------------------------------------------------------------------------------------------- presets, a dry run


@pytest.mark.parametrize("name", PAPERS)
def test_presets_of_the_papers_are_accepted_saved_and_named_once(name):
    preset = PAPERS[name]
    assert train.parse(["--preset", name]).check() == preset
    assert preset.preset == name not in PRESETS
    assert from_dict(Config, json.loads(json.dumps(preset.to_dict()))) == preset


def test_presets_have_the_papers_numbers():
    """RLP: 170M and 250M input tokens, G = 16. Elastic: 65B and 45B tokens, 9B and 6B beside the 12B."""
    for name, tokens in (("qwen3-1.7b-rlp", 170e6), ("nemotron-12b-rlp", 250e6)):
        c = PAPERS[name].rlp
        assert c.steps * c.batch * c.context_len == pytest.approx(tokens, rel=0.005)
        assert (c.batch, c.group_size, c.thought_len, c.context_len, c.temperature) == (512, 16, 2048, 2048, 0.7)
        assert (c.lr, c.decay, c.kl, c.tau, c.positions, c.horizon) == (1e-6, 0.0, 0.0, 0.999, "random", 1)
    c = PAPERS["nemotron-12b-elastic"].elastic
    assert c.stage_1_steps() * 1536 * 8192 == pytest.approx(65e9, rel=0.001)
    assert c.n_tokens() - c.stage_1_steps() * 1536 * 8192 == pytest.approx(45e9, rel=0.001)
    assert (c.batch, c.long_rows(), c.long_len, c.lr, c.router_lr, c.warmup) == (1536, 512, 49152, 9e-5, 1e-2, 60)
    assert c.long_weights == (0.5, 0.3, 0.2)
    assert [b * 12.310e9 for b in c.budgets[1:]] == pytest.approx([9e9, 6e9], rel=0.001)


@pytest.mark.parametrize("choose", ["fixed", "router"])
def test_9b_and_6b_are_met_within_two_per_cent_within_seconds(choose):
    """Also 8.9B and 6.2B; a router that has learned nothing yet is repaired to meet them too."""
    c = dataclasses.replace(PAPERS["nemotron-12b-elastic"].elastic, choose=choose, budgets=(1.0, 9e9 / 12.31e9, 0.487))
    began = time.process_time()
    router = routers.build_router(NEMOTRON_12B, c, list(range(62)), torch.device("cpu"))
    if choose == "fixed":
        router.settle({b: routers.by_hand(router, b) for b in c.budgets[1:]})
    sizes = {b: estimate.parameters(nested.shrink(NEMOTRON_12B, router.choose(b))) for b in (9e9, 8.9e9, 6.2e9, 6e9)}
    assert time.process_time() - began < 30
    assert sizes == pytest.approx({b: b for b in sizes}, rel=0.02)


@pytest.mark.parametrize("name", PAPERS)
def test_a_dry_run_of_a_paper_needs_no_text_no_tokenizer_and_no_weights(name, monkeypatch, capsys):
    for loader in ((train, "Corpus"), (rundir, "FileTokenizer"), (train, "named_tokenizer"), (rundir, "HybridLM")):
        monkeypatch.setattr(*loader, None)
    began = time.process_time()
    assert train.main(["--preset", name, "--dry-run"]) == 0
    assert time.process_time() - began < 30
    shown = " ".join(re.sub(r"[^\w.,%-]", " ", capsys.readouterr().out).split())
    assert f"{estimate.parameters(PAPERS[name].model):,} parameters" in shown
    for part in (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "H100 hours",
        f"on each of {PAPERS[name].dry_run_gpus}",
    ):
        assert part in shown


def test_a_dry_run_counts_the_gpus_it_is_told(capsys):
    assert train.main(["--preset", "smoke", "--dry-run", "--dry-run-gpus", "4"]) == 0
    assert "GB on each of 4 GPUs" in capsys.readouterr().out
    assert train.main(["--preset", "smoke", "--dry-run", "--dry-run-gpus", "0"]) == 2
    assert "dry_run_gpus (0) must be at least 1" in capsys.readouterr().out


def test_costs_of_presets_are_what_their_comments_say():
    """EFLOP in all and GPU hours, as in presets.py."""
    said = {"qwen3-1.7b-rlp": (48, 33, QWEN3_1_7B), "nemotron-12b-rlp": (408, 287, NEMOTRON_12B),
            "nemotron-12b-elastic": (9609, 6750, NEMOTRON_12B)}  # fmt: skip
    for name, (eflop, hours, shape) in said.items():
        found = estimate.facts(PAPERS[name])
        assert PAPERS[name].model is shape
        assert found["total_flops"] / 1e18 == pytest.approx(eflop, rel=0.02)
        assert found["h100_hours"] == pytest.approx(hours, rel=0.02)


def test_flops_of_a_runs_own_steps_count_thoughts_as_long_as_they_were():
    """For three steps of RLP with thoughts of 2 tokens instead of 9 at most; RLVR's are those of RLP at answers alone."""
    c = RLPConfig(steps=3, batch=2, group_size=2, thought_len=9, context_len=8, text_share=0.0)
    short = dataclasses.replace(c, thought_len=2)
    expected = 3 * sum(estimate.phases(run_of("rlp", rlp=short))[-1].flops.values())
    assert estimate.steps_flops(run_of("rlp", rlp=c), 2.1) == pytest.approx(expected)
    assert estimate.steps_flops(run_of("rlp", rlp=c), 2.1) < estimate.steps_flops(run_of("rlp", rlp=c), None)
    padded = dataclasses.replace(c, context_len=5)
    assert estimate.steps_flops(run_of("rlp", rlp=c), None, context_tokens=5.4) == pytest.approx(
        3 * sum(estimate.phases(run_of("rlp", rlp=padded))[-1].flops.values()))  # fmt: skip
    same = run_of("rlvr", rlp=dataclasses.replace(c, steps=9, text_share=0.5), rlvr=RLVRConfig(steps=3, batch=2))
    assert estimate.steps_flops(same, 2.1) == pytest.approx(expected)
    cpt = run_of("cpt")
    own = estimate.phases(cpt)[-1]
    assert estimate.steps_flops(cpt) == estimate.steps_flops(cpt, 2.0, 0.5) == own.n_steps * sum(own.flops.values())


def test_flops_of_a_run_that_has_ended_leave_out_groups_that_taught_nothing():
    """A quarter of the groups taught: of the policy's three passes over thoughts a quarter is left, those over contexts
    stay. A KL term runs them all. The predictor's term reads one thought of each group again."""
    c = RLPConfig(steps=2, batch=2, group_size=4, thought_len=9, context_len=8, text_share=0.0)
    (whole,) = estimate.rlp_phases(run_of("rlp", rlp=c))
    (part,) = estimate.rlp_phases(run_of("rlp", rlp=c), 0.25)
    longer = estimate.rlp_phases(run_of("rlp", rlp=dataclasses.replace(c, thought_len=10)), 1.0)[0]
    assert part.flops["rollout"] == whole.flops["rollout"]
    thoughts = 2 * 4 * (estimate.body_flops(PLAIN, 9, 8) + estimate.head_flops(PLAIN, 9))
    assert whole.flops["policy"] - part.flops["policy"] == pytest.approx(3 * 0.75 * thoughts)
    assert longer.flops["policy"] > whole.flops["policy"]
    assert estimate.steps_flops(run_of("rlp", rlp=c), None, 0.25) == pytest.approx(2 * sum(part.flops.values()))
    with_kl = run_of("rlp", rlp=dataclasses.replace(c, kl=0.1))
    assert estimate.rlp_phases(with_kl, 0.25) == estimate.rlp_phases(with_kl)
    with_term = estimate.rlp_phases(run_of("rlp", rlp=dataclasses.replace(c, predictor=0.1)), 0.25)[0]
    after = 2 * (estimate.body_flops(PLAIN, c.horizon, 17) + estimate.head_flops(PLAIN, c.horizon))
    assert with_term.flops["policy"] - part.flops["policy"] == pytest.approx(3 * after)


def test_figures_at_the_end_need_room_for_one_network():
    """Sharded, for the trained one as it is gathered in fp32, or for all sizes of a family in bf16; else all in fp32."""
    rlp, family = PAPERS["nemotron-12b-rlp"], PAPERS["nemotron-12b-elastic"]
    n = estimate.parameters(rlp.model)
    assert [estimate.figures_bytes(rlp, k) for k in (32, 1)] == [4 * n, 12 * n]
    assert [estimate.figures_bytes(dataclasses.replace(rlp, mode=m), 1) for m in ("cpt", "pretrain")] == [8 * n, 4 * n]
    assert estimate.figures_bytes(dataclasses.replace(rlp, lora=LoRAConfig(rank=8)), 1) == 4 * n
    sizes = estimate.family_bytes(family.model, family.elastic)["separate"]
    assert estimate.figures_bytes(family, 64) == sizes < 72e9
    assert estimate.figures_bytes(family, 1) == 4 * n + 2 * sizes


def test_presets_say_what_their_figures_at_the_end_need():
    said = re.findall(r"last figures need[\s#]+(\d+) GB on the first", Path(presets.__file__).read_text())
    assert said == [f"{estimate.figures_bytes(c, c.dry_run_gpus) / 1e9:.0f}" for c in PAPERS.values()]
