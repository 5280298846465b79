"""Named settings: a preset is a `Config`, and its comment says what it takes and what it reaches.

    python train.py --preset qwen3-1.7b-rlp --dry-run     needs no GPU, no download and no data

`PRESETS` run on two CPU cores. `PAPERS` are for hardware that most readers do not have: the shapes
are those of the released models, so their weights fit (`init`), and text is read from shards (see
shards.py) in `data.path`. None of them has been run here. GPU hours are the FLOPs of the dry run at
40 % of an H100's 989 TFLOP/s in bf16; they count every thought at its full length, and no time for
decoding token by token, which is bound by memory. Where a paper does not say, as far as we know,
the default stays: RLP's clip, and the schedule, sampling and widths of Nemotron Elastic's search.
"""

from dataclasses import replace

from system.config import (
    Config,
    CPTConfig,
    DataConfig,
    ElasticConfig,
    EvalConfig,
    ModelConfig,
    ParallelConfig,
    PretrainConfig,
    RLPConfig,
    RLVRConfig,
    SFTConfig,
    WarmupConfig,
)

PRESETS: dict[str, Config] = {
    # The default: a base is trained once and kept; RLP, CPT and Elastic start from it.
    # Command:   python train.py --mode rlp    (or cpt, or elastic)
    # Hardware:  two CPU cores, 1.2 GiB of memory.
    # Cost:      RLP 43 TFLOP, 10 to 14 minutes, 6 to 9 of them for the base; Elastic 50,
    #            by a hundred timed steps 20 to 22 minutes where there is AVX2 only.
    # Expected:  RLP raises the accuracy of sampled thoughts from .73 to .95 on made-up problems
    #            (five seeds); 75 and 50 % of Elastic keep 100 and 98 % of the parent's greedy.
    # Source:    settings of this project, for 777 thousand parameters; figures from results/.
    "cpu": Config(
        pretrain=PretrainConfig(steps=1900, batch=8, lr=3e-3, muon_lr=0.02, checkpoint_every=500),
        warmup=WarmupConfig(steps=1100, batch=8, lr=3e-3, muon_lr=0.02, warmup=0, decay=1.0),
        rlp=RLPConfig(steps=150, batch=32, lr=2e-4, decay=0.5, back=4, checkpoint_every=50),
        cpt=CPTConfig(steps=700, batch=8, lr=7.5e-4, muon_lr=0.01, decay=1.0),
        sft=SFTConfig(steps=200, batch=8, lr=2e-3, muon_lr=0.005, decay=1.0, checkpoint_every=50),
        rlvr=RLVRConfig(steps=150, batch=32, lr=2e-4, decay=0.5, checkpoint_every=50),
        elastic=ElasticConfig(steps=900, batch=8, lr=3e-3, muon_lr=0.02, decay=1.0,
                              router_start="sensitivity", search_share=0.1, router_width=64,
                              together=True, long_weights=(0.2, 0.3, 0.5))),
    # Every part runs, nothing is learned: for tests and for a first look at the code.
    # Command:   python train.py --mode rlp --preset smoke
    # Hardware:  one CPU core, for seconds.
    "smoke": Config(
        preset="smoke", threads=1,
        model=ModelConfig(pattern="M*-", d_model=32, d_ff=64, n_heads=2, n_kv_heads=1,
                          attn_head_dim=16, mamba_heads=4, mamba_head_dim=16, d_state=8, chunk=16),
        data=DataConfig(vocab_size=512),
        pretrain=PretrainConfig(steps=4, batch=4, seq_len=64, warmup=2, lr=3e-3, muon_lr=0.02),
        warmup=WarmupConfig(steps=2, batch=4, seq_len=64, warmup=0, lr=3e-3, muon_lr=0.02),
        rlp=RLPConfig(steps=3, batch=4, group_size=4, thought_len=8, context_len=96, warmup=1,
                      lr=3e-4),
        cpt=CPTConfig(steps=3, batch=4, warmup=1),
        sft=SFTConfig(steps=3, batch=4, warmup=1),
        rlvr=RLVRConfig(steps=3, batch=4, warmup=1, lr=3e-4),
        elastic=ElasticConfig(steps=6, batch=4, warmup=1, router_width=8, seq_len=32, long_len=64,
                              long_share=0.34, calibration_rows=4),
        eval=EvalConfig(problems_per_family=4, samples=2, text_positions=8, text_tokens=512,
                        elastic_rows=8)),
}
# Documents in which thinking pays at ordinary positions: the base of `cpu` learns in a longer
# warm-up to think where a ledger, an interpreter's session or a program's trace has a result to be
# computed; RLP has three of five contexts there, at random positions, and nobody says where results
# are.
# Command:   python train.py --mode rlp --preset computed
# Hardware:  two CPU cores, 1.5 GiB of memory.
# Cost:      about twelve minutes more than `cpu`; the base's first phase is the same.
# Expected:  the gain there, over the frozen base without a thought, rises from .05 to .28 nats, and
#            accuracy of sampled thoughts on problems from .73 to .94 (five seeds).
# Source:    settings of this project; the paper's random positions, on documents made up for them.
PRESETS["computed"] = replace(
    PRESETS["cpu"], preset="computed",
    warmup=replace(PRESETS["cpu"].warmup, steps=3500, computed_share=0.45, decay=0.6),
    rlp=replace(PRESETS["cpu"].rlp, steps=300, text_share=0.15, computed_share=0.6, back=2,
                predictor=0.1),
    cpt=replace(PRESETS["cpu"].cpt, steps=1150))

# Qwen3-1.7B-Base: 1,720,574,976 parameters.
QWEN3_1_7B = ModelConfig(pattern="*-" * 28, vocab_size=151936, d_model=2048, d_ff=6144,
                         ffn="swiglu", n_heads=16, n_kv_heads=8, attn_head_dim=128, rope_theta=1e6,
                         qk_norm=True, tie_embeddings=True, norm_eps=1e-6)
# Nemotron-Nano-12B-v2 and its base: 12,310,001,152 parameters.
NEMOTRON_12B = ModelConfig(pattern="M-M-M-M*-" * 6 + "M-M-M-M-", vocab_size=131072, d_model=5120,
                           d_ff=20480, n_heads=40, n_kv_heads=8, attn_head_dim=128, mamba_heads=128,
                           mamba_head_dim=80, mamba_groups=8, d_state=128, conv_width=4, chunk=128)
# Ordinary text alone, from shards, and no mixture with thoughts that the small base is taught;
# products in bf16, layers recomputed.
TEXT = {"data": DataConfig(path="data/shards", text_share=1.0),
        "warmup": WarmupConfig(steps=0, gap=0),
        "parallel": ParallelConfig(dtype="bf16", activation_checkpointing=True)}
# The setup of arXiv 2510.01265: one random position a document, no floor under the reward. 32 GPUs
# hold 16 contexts each, one at a time with its 16 thoughts.
RLP_OF_THE_PAPER = RLPConfig(batch=512, accumulate=16, lr=1e-6, warmup=0, positions="random",
                             text_share=1.0, back=0, context_len=2048,
                             prompt_file="prompts/think.txt", group_size=16, thought_len=2048,
                             temperature=0.7, kl=0.0, tau=0.999, reward_floor=float("-inf"),
                             checkpoint_every=20)

PAPERS: dict[str, Config] = {
    # RLP on Qwen3-1.7B-Base, 170M input tokens (162 steps of 512 x 2048).
    # Command:   python -m tools.shards build TEXTS --out data/shards \
    #                --tokenizer models/Qwen3-1.7B-Base
    #            python train.py --preset qwen3-1.7b-rlp
    # Hardware:  32 H100-80GB (the paper's).
    # Cost:      0.29 EFLOP a step, 48 in all: 33 GPU hours (18 at the paper's 12.47 s a step).
    # Memory:    24 GB a GPU with layers recomputed, as here; 119 GB without. The last figures need
    #            7 GB on the first GPU.
    # Expected:  the paper's average over its benchmarks goes from 30.32 to 36.03 %.
    # Source:    arXiv 2510.01265, setup and results on Qwen3-1.7B-Base.
    "qwen3-1.7b-rlp": Config(
        mode="rlp", preset="qwen3-1.7b-rlp", init="models/Qwen3-1.7B-Base", dry_run_gpus=32,
        model=QWEN3_1_7B, rlp=replace(RLP_OF_THE_PAPER, steps=162), **TEXT),
    # RLP on Nemotron-Nano-12B-v2, 250M input tokens (238 steps of 512 x 2048).
    # Command:   python -m tools.shards build TEXTS --out data/shards \
    #                --tokenizer models/NVIDIA-Nemotron-Nano-12B-v2-Base
    #            python train.py --preset nemotron-12b-rlp
    # Hardware:  32 H100-80GB.
    # Cost:      1.7 EFLOP a step, 408 EFLOP in all: 287 GPU hours.
    # Memory:    66 GB a GPU with layers recomputed, 60 while thoughts are sampled; 389 GB without.
    #            The last figures need 49 GB on the first GPU.
    # Expected:  the paper's average over its benchmarks goes from 42.81 to 61.32 %.
    # Source:    arXiv 2510.01265, results on Nemotron-Nano-12B-v2; the rest as for Qwen3.
    "nemotron-12b-rlp": Config(
        mode="rlp", preset="nemotron-12b-rlp", init="models/NVIDIA-Nemotron-Nano-12B-v2-Base",
        dry_run_gpus=32, model=NEMOTRON_12B, rlp=replace(RLP_OF_THE_PAPER, steps=238), **TEXT),
    # Nemotron Elastic: 12B, 9B and 6B in one. Stage 1: 65B tokens, 1536 x 8192, budgets alike;
    # stage 2: 45B tokens, 512 x 49152, the larger budgets more often. (The paper's own widths are
    # not published; ours are steps of a tenth or less. Its routers search through both stages, ours
    # settle after elastic.search_share of the steps.)
    # Command:   python -m tools.shards build TEXTS --out data/shards \
    #                --tokenizer models/NVIDIA-Nemotron-Nano-12B-v2
    #            python train.py --preset nemotron-12b-elastic
    #            python -m tools.extract runs/elastic-nemotron-12b-elastic-seed0 --budget 9e9 \
    #                --out runs/9b
    # Hardware:  256 GPUs (ours; two long sequences each).
    # Cost:      1.0 to 2.3 EFLOP a step, 9,609 EFLOP in all: 6,750 GPU hours.
    # Memory:    45 GB a GPU in stage 1, 82 GB in stage 2, a sequence at a time: more than an
    #            H100-80GB has, most of it the fp32 stream before each of 62 layers. On 64 GPUs with
    #            accumulate 8 stage 1 takes 48 GB. The last figures need 55 GB on the first GPU.
    # Expected:  the paper's averages are 77.41, 75.95 and 70.61 % for 12B, 9B and 6B.
    # Source:    arXiv 2511.16664, recipe and results.
    "nemotron-12b-elastic": Config(
        mode="elastic", preset="nemotron-12b-elastic", init="models/NVIDIA-Nemotron-Nano-12B-v2",
        dry_run_gpus=256, model=NEMOTRON_12B, **TEXT,
        elastic=ElasticConfig(
            steps=5166 + 1788, batch=1536, seq_len=8192, accumulate=2, checkpoint_every=100,
            long_share=1788 / (5166 + 1788), long_batch=512, long_len=49152,
            long_weights=(0.5, 0.3, 0.2), lr=9e-5, router_lr=1e-2, router_width=256, warmup=60,
            budgets=(1.0, 0.731, 0.4875),  # 9.0B and 6.0B of 12.31B parameters
            d_model_choices=(5120, 4800, 4480, 4160, 3840),
            ffn_choices=(20480, 18432, 16384, 14336, 12288, 10240),
            mamba_head_choices=(128, 120, 112, 104, 96), mamba_channel_choices=(80, 72, 64),
            attn_head_choices=(40, 32, 24), score_d_model="paper", score_ffn="paper",
            calibration_rows=1024)),
}
