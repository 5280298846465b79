"""Every setting, in frozen dataclasses: a field's comment is its help on the command line, a preset
is an instance.

`python train.py --mode rlp --preset cpu --rlp.group-size 16` builds a `Config`. `Config.check`
refuses what cannot work, naming the value, the rule and the remedy. `to_dict` and `from_dict` keep
a run's settings beside its weights, and `base_fingerprint` is the key under which a trained base is
found again.
"""

import dataclasses
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from system.errors import require
from system.files import fingerprint, read_json

# The widths that a layer of each kind has.
WIDTH_FIELDS = {"M": ("mamba_heads", "mamba_head_dim"), "*": ("n_heads",), "-": ("d_ff",)}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the hybrid model."""

    # Layers in order: M Mamba-2, * attention, - feed-forward.
    pattern: str = "M*-M*-"
    # Rows of the embedding; 0 means as many as the tokenizer has.
    vocab_size: int = 0
    # Width of the residual stream.
    d_model: int = 128
    # Neurons of a feed-forward layer.
    d_ff: int = 384
    # Feed-forward activation: relu2 (squared ReLU) or swiglu.
    ffn: Literal["relu2", "swiglu"] = "relu2"
    # Query heads of attention.
    n_heads: int = 4
    # Key-value heads, each shared by n_heads / n_kv_heads query heads.
    n_kv_heads: int = 2
    # Channels of an attention head.
    attn_head_dim: int = 32
    # Base of the rotary embedding; 0 means no positional embedding.
    rope_theta: float = 0.0
    # RMSNorm on queries and keys.
    qk_norm: bool = False
    # Heads of a Mamba-2 mixer.
    mamba_heads: int = 8
    # Channels of a Mamba-2 head.
    mamba_head_dim: int = 32
    # Groups of heads that share B and C.
    mamba_groups: int = 1
    # State size of a Mamba-2 head, per channel.
    d_state: int = 32
    # Taps of the causal convolution.
    conv_width: int = 4
    # Chunk length of the scan; any value gives the same result.
    chunk: int = 32
    # Use the embedding as output matrix.
    tie_embeddings: bool = False
    # Epsilon of every RMSNorm.
    norm_eps: float = 1e-5
    # Widths of each layer where they differ: M heads and head channels, * query heads, - neurons.
    # Empty: all as above.
    widths: tuple[tuple[int, ...], ...] = ()

    def layer(self, i: int) -> "ModelConfig":
        """The shape of layer i: this one, with the widths that are the layer's own."""
        own = self.widths[i] if self.widths else ()
        return replace(
            self, widths=(), **dict(zip(WIDTH_FIELDS[self.pattern[i]], own, strict=False)))

    def check(self) -> None:
        """Raises ValueError for a shape that cannot be built."""
        unknown = sorted(set(self.pattern) - set("M*-"))
        require(self.pattern != "",
                "model.pattern is empty: it needs at least one layer, for example 'M-M*-'")
        require(not unknown,
                f"model.pattern ({self.pattern!r}) has the unknown letters {''.join(unknown)!r}; "
                "a layer is M (Mamba-2), * (attention) or - (feed-forward)")
        require(
            set(self.pattern) & set("M*"),
            f"model.pattern ({self.pattern!r}) has no M and no *, so no token would see another; add one",
        )
        require(
            len(self.widths) in (0, len(self.pattern)),
            f"model.widths has {len(self.widths)} entries; it needs one for each of {len(self.pattern)} layers, or none",
        )
        for i in range(len(self.widths)):
            self.layer(i).check()
        sizes = "d_model d_ff n_heads n_kv_heads attn_head_dim mamba_heads mamba_head_dim mamba_groups d_state conv_width"
        for name in [*sizes.split(), "chunk"]:
            require(
                getattr(self, name) >= 1, f"model.{name} ({getattr(self, name)}) must be at least 1"
            )
        require(self.vocab_size >= 0,
                f"model.vocab_size ({self.vocab_size}) must be positive, or 0 for the tokenizer's")
        _divides("model.n_heads", self.n_heads, "model.n_kv_heads", self.n_kv_heads)
        _divides("model.mamba_heads", self.mamba_heads, "model.mamba_groups", self.mamba_groups)
        require(self.ffn in ("relu2", "swiglu"),
                f"model.ffn ({self.ffn!r}) is unknown; choose relu2 or swiglu")
        require(
            self.norm_eps > 0, f"model.norm_eps ({self.norm_eps}) must be positive; 1e-5 is usual")
        require(
            self.rope_theta >= 0,
            f"model.rope_theta ({self.rope_theta}) must be positive, or 0 for no positional embedding",
        )
        if self.rope_theta:
            _divides("model.attn_head_dim", self.attn_head_dim, "the pairs that RoPE turns", 2)


@dataclass(frozen=True)
class DataConfig:
    """What the model reads."""

    # A UTF-8 file, a folder of such files, or a folder that shards.py wrote; empty means the text
    # that ships with Python.
    path: str = ""
    # "corpus" trains a vocabulary on the text; a folder has one in its tokenizer.json; other names
    # ("gpt2") are tiktoken's own and may download. A Hugging Face directory in `init` brings its
    # own.
    tokenizer: str = "corpus"
    # Size of the vocabulary that "corpus" trains, special tokens included.
    vocab_size: int = 1024
    # Share of training tokens that is ordinary text, the rest being generated reasoning problems;
    # in the first, clean part of pretraining it is pretrain.clean_text_share instead.
    text_share: float = 0.3
    # Per cent of the documents, and of the problems, in each of the two held-out splits (val and
    # test).
    held_out_percent: int = 5
    # Where the tokenizer, the encoded text and trained bases are kept.
    cache_dir: str = "runs/cache"

    def check(self) -> None:
        """Raises ValueError for settings that cannot work."""
        require(
            self.vocab_size >= 300,
            f"data.vocab_size ({self.vocab_size}) must be at least 300: 256 bytes, 3 special tokens, some merges",
        )
        require(
            0 <= self.text_share <= 1, f"data.text_share ({self.text_share}) must lie in [0, 1]")
        require(1 <= self.held_out_percent <= 25,
                f"data.held_out_percent ({self.held_out_percent}) must lie in 1 to 25")


@dataclass(frozen=True)
class FitConfig:
    """Settings of the one training loop, whatever the objective."""

    # Optimizer steps; 0 keeps the model as it is.
    steps: int = 1000
    # Sequences a step (contexts, for RLP).
    batch: int = 32
    # Parts that each process runs its share of a step's batch in, one after the other. Next-token
    # prediction gives the same result in any number. RLP and elastic draw their noise part by part:
    # 1 process with 2 parts equals 2 with 1 each.
    accumulate: int = 1
    # Peak learning rate of AdamW.
    lr: float = 3e-3
    # Peak learning rate of Muon for the matrices inside the layers; 0 leaves them to AdamW.
    muon_lr: float = 0.0
    # AdamW's betas.
    betas: tuple[float, float] = (0.9, 0.95)
    # Decoupled weight decay of matrices.
    weight_decay: float = 0.0
    # Steps of linear warm-up.
    warmup: int = 20
    # After the warm-up: constant, or linear to zero over the last `decay` share of the steps.
    decay: float = 0.0
    # Largest norm of the gradient.
    clip_norm: float = 1.0
    # Steps between checkpoints (one is always written at the end).
    checkpoint_every: int = 200
    # Steps between lines of metrics.jsonl.
    log_every: int = 1

    def fewest_rows(self) -> int:
        """Sequences of the smallest batch: the processes and parts must divide it."""
        return self.batch

    def check_fit(self, group: str) -> None:
        """Raises ValueError for settings that cannot work; `group` names them in the message."""
        require(self.steps >= 0, f"{group}.steps ({self.steps}) must be 0 or more")
        for name in ("batch", "accumulate", "checkpoint_every", "log_every"):
            require(getattr(self, name) >= 1,
                    f"{group}.{name} ({getattr(self, name)}) must be at least 1")
        _divides(f"{group}.batch", self.batch, f"{group}.accumulate", self.accumulate)
        for name in ("lr", "muon_lr", "weight_decay", "warmup"):
            require(getattr(self, name) >= 0,
                    f"{group}.{name} ({getattr(self, name)}) must be 0 or more")
        require(self.clip_norm > 0, f"{group}.clip_norm ({self.clip_norm}) must be positive")
        require(0 <= self.decay <= 1,
                f"{group}.decay ({self.decay}) is a share of the steps: it must lie in [0, 1]")


@dataclass(frozen=True)
class PretrainConfig(FitConfig):
    """Next-token prediction on packed documents: it makes the base that RLP starts from."""

    # Tokens of a packed training sequence.
    seq_len: int = 256
    # First share of the steps in which the families enter one by one, look-up first, always worked
    # out and without text: in-context look-up forms within 0.4 M tokens alone, and not within 2 M
    # in the whole mixture.
    intro_share: float = 0.32
    # Share of the steps after which thoughts are no longer always worked out: the mixture below
    # follows.
    clean_share: float = 0.65
    # Share of text tokens in the clean part between the two (data.text_share afterwards).
    clean_text_share: float = 0.3
    # Share of problem documents with a thought in the clean part.
    clean_think: float = 0.85
    # Share of problem documents with a thought afterwards.
    think: float = 0.4
    # Of those thoughts, the share that is worked out; the others stop half-way or are filler.
    worked: float = 0.35
    # Share of text windows with a filler thought at a random place afterwards: text can go on after
    # a thought.
    text_think: float = 0.4

    def check(self) -> None:
        """Raises ValueError for settings that cannot work."""
        self.check_fit("pretrain")
        require(self.seq_len >= 16, f"pretrain.seq_len ({self.seq_len}) must be at least 16")
        for name in ("intro_share", "clean_share", "clean_text_share", "clean_think", "think",
                     "worked", "text_think"):
            require(0 <= getattr(self, name) <= 1,
                    f"pretrain.{name} ({getattr(self, name)}) must lie in [0, 1]")


@dataclass(frozen=True)
class RLPConfig(FitConfig):
    """Reinforcement as a pretraining objective (arXiv 2510.01265)."""

    # Where the token to predict is: the first of a problem's answer, or one uniformly random
    # position a document (the paper's choice).
    positions: Literal["answer", "random"] = "answer"
    # Share of contexts taken from ordinary text, at random positions (the rest are problems).
    text_share: float = 0.25
    # Longest context, in tokens; longer ones lose their beginning.
    context_len: int = 128
    # Text before every context, with a thought and without: an instruction, for a base that was
    # never taught the tags.
    prompt: str = ""
    # UTF-8 file to take that text from, such as prompts/think.txt.
    prompt_file: str = ""
    # Thoughts per context, G; the paper uses 16.
    group_size: int = 8
    # Longest thought in tokens, its closing tag included.
    thought_len: int = 40
    # Observed tokens that the reward looks at after a thought; the paper uses 1.
    horizon: int = 1
    # Sampling temperature of thoughts, in training and in evaluation; the paper's.
    temperature: float = 0.7
    # Lower clip of the likelihood ratio: 1 - eps_low.
    eps_low: float = 0.2
    # Upper clip of the likelihood ratio: 1 + eps_high.
    eps_high: float = 0.2
    # Updates from each batch of thoughts.
    inner_epochs: int = 1
    # Weight of the KL divergence from the starting policy, on thought tokens; the paper uses 0.
    kl: float = 0.0
    # Decay of the teacher's moving average.
    tau: float = 0.999
    # Rewards below this are raised to it; -inf (the paper) leaves them as they are.
    reward_floor: float = -2.0

    def check(self) -> None:
        """Raises ValueError for settings that cannot work."""
        self.check_fit("rlp")
        require(
            self.group_size >= 2,
            f"rlp.group_size ({self.group_size}) must be at least 2: advantages compare the thoughts of a group",
        )
        require(
            self.thought_len >= 1,
            f"rlp.thought_len ({self.thought_len}) must be at least 1: the closing tag is a token of the thought",
        )
        require(self.horizon >= 1, f"rlp.horizon ({self.horizon}) must be at least 1")
        require(self.context_len >= 8, f"rlp.context_len ({self.context_len}) must be at least 8")
        require(self.temperature > 0, f"rlp.temperature ({self.temperature}) must be positive")
        require(
            0 <= self.tau <= 1, f"rlp.tau ({self.tau}) must lie in [0, 1]; the paper's is 0.999")
        require(0 <= self.text_share <= 1, f"rlp.text_share ({self.text_share}) must lie in [0, 1]")
        require(0 <= self.eps_low <= 1, f"rlp.eps_low ({self.eps_low}) must lie in [0, 1]")
        require(self.eps_high >= 0, f"rlp.eps_high ({self.eps_high}) must be 0 or more")
        require(self.kl >= 0, f"rlp.kl ({self.kl}) must be 0 or more")
        require(self.reward_floor <= 0,
                f"rlp.reward_floor ({self.reward_floor}) must be 0 or less: it would hide gains")
        require(
            self.inner_epochs >= 1, f"rlp.inner_epochs ({self.inner_epochs}) must be at least 1")


@dataclass(frozen=True)
class CPTConfig(FitConfig):
    """Continued pretraining of the base on its own last mixture: the rival that RLP has to beat at
    about equal time."""

    def check(self) -> None:
        """Raises ValueError for settings that cannot work."""
        self.check_fit("cpt")


@dataclass(frozen=True)
class ElasticConfig(FitConfig):
    """Nested models in one, and routers that choose them (Nemotron Elastic, arXiv 2511.16664)."""

    # Budgets, as fractions of the full model's cost, or (above 1) as absolute costs in the unit of
    # `cost`.
    budgets: tuple[float, ...] = (1.0, 0.75, 0.5)
    # What a budget limits: parameters, memory (bytes of weights and caches), flops (a token),
    # latency (measured, ns/token).
    cost: Literal["parameters", "memory", "flops", "latency"] = "parameters"
    # Sequences that are served at once, for memory and latency.
    cost_batch: int = 8
    # Tokens of a served sequence, for memory and FLOPs.
    cost_len: int = 1024
    # Bytes of a weight and of a cached key or value, for memory (bf16 has 2).
    cost_bytes: int = 2
    # Widths of the residual stream to choose from; empty: eighths of the full width, from all of it
    # down to half.
    d_model_choices: tuple[int, ...] = ()
    # Numbers of FFN neurons; empty: 24ths of all, down to a quarter.
    ffn_choices: tuple[int, ...] = ()
    # Numbers of Mamba heads, multiples of model.mamba_groups; empty: every eighth (or group) from
    # all down to half.
    mamba_head_choices: tuple[int, ...] = ()
    # Numbers of channels of a Mamba head; empty: all, three quarters, half.
    mamba_channel_choices: tuple[int, ...] = ()
    # Numbers of query heads, multiples of model.n_kv_heads; empty: every multiple down to half
    # (with as many key-value heads as query heads there is no choice).
    attn_head_choices: tuple[int, ...] = ()
    # Numbers of layers that are kept; empty: all of them, no layer is skipped.
    depth_choices: tuple[int, ...] = ()
    # Axes on which each layer has a choice of its own; on the others all layers of a kind share
    # one.
    heterogeneous: tuple[Literal["ffn", "mamba_heads", "mamba_channels", "attn_heads"], ...] = (
        "ffn", "mamba_heads", "mamba_channels", "attn_heads")
    # How widths are chosen: by the trained router, or by hand, every axis by about the same factor.
    choose: Literal["router", "fixed"] = "router"
    # How a router's choice becomes a mask while it learns: the weighted sum of all masks (soft, the
    # paper's mode 2), the likeliest mask times its probability (top1, mode 1), or the likeliest
    # mask with the gradient of the sum.
    mask: Literal["soft", "top1", "straight-through"] = "soft"
    # Share of the steps in which routers learn on masks; afterwards their choices stay, and small
    # models run on slices.
    search_share: float = 0.3
    # Width of a router's hidden layer; the paper uses 256.
    router_width: int = 256
    # Learning rate of the routers; the paper's.
    router_lr: float = 1e-2
    # Head start of the largest choices, in logits: training begins above the smaller budgets.
    router_bias: float = 1.0
    # Gumbel-softmax temperature at the first and at the last step of the search, exponential in
    # between.
    gumbel_tau: tuple[float, float] = (1.0, 0.05)
    # Factor on the routers' logits at the first and at the last step of the search, linear in
    # between.
    logit_scale: tuple[float, float] = (1.0, 10.0)
    # Weight of the budget loss (lambda); the paper's is 1, for another form of the loss.
    router_weight: float = 5.0
    # Relative distance from the budget that costs nothing.
    dead_zone: float = 0.01
    # Channels of the residual stream: pca turns the stream onto its principal axes, the parent's
    # function unchanged, and the first channels hold most of it. The others only put them in order:
    # paper is equation 1, output weighs that by what reads the channel. For this and the next four
    # random is a score too, and importance.SCORES has them all.
    score_d_model: str = "pca"
    # Order of FFN neurons: paper is equation 2 (before the activation), output what a neuron adds
    # to the stream.
    score_ffn: str = "output"
    # Order of Mamba heads and channels: paper is equations 3 and 4, output what they add to the
    # stream.
    score_mamba: str = "output"
    # Order of query heads: paper is the size of the queries, output what a head adds to the stream.
    score_attn: str = "paper"
    # Order of layers: paper is equation 5, greedy scores the rest again after each removal.
    score_depth: str = "paper"
    # Sequences of training text that importance is measured on.
    calibration_rows: int = 32
    # Weight of the forward KL divergence from the frozen parent.
    kl: float = 1.0
    # Weight of the forward KL divergence from the full model itself, as a teacher that trains (not
    # for the full budget).
    self_kl: float = 0.0
    # Weight of the cross-entropy, for every budget.
    ce: float = 0.0
    # Weight of the full model's cross-entropy (alpha), which keeps it from collapsing when it
    # teaches.
    full_ce: float = 0.0
    # Temperature of both distributions in the divergences.
    kl_temperature: float = 1.0
    # Tokens of a training sequence in stage 1.
    seq_len: int = 256
    # Tokens of a training sequence in stage 2.
    long_len: int = 512
    # Sequences of a step in stage 2; 0: as many as make a step of as many tokens as in stage 1.
    long_batch: int = 0
    # Share of the steps that stage 2 takes.
    long_share: float = 0.4
    # Probability of each budget in stage 2 (in stage 1 all are alike).
    long_weights: tuple[float, ...] = (0.5, 0.3, 0.2)
    # Rivals to train and measure too. scratch: each size alone from random weights; separate,
    # minitron: each size cut from the parent and distilled alone, with 1/n or all of the family's
    # tokens; random-order, fixed, uniform: the family with random ranks, with widths by hand, with
    # uniform sampling in stage 2.
    baseline: tuple[
        Literal["scratch", "separate", "minitron", "random-order", "fixed", "uniform"], ...] = ()

    def check(self) -> None:
        """Raises ValueError for settings that cannot work."""
        self.check_fit("elastic")
        require(self.budgets, "elastic.budgets is empty: give at least one, such as 1.0")
        for b in self.budgets:
            require(
                b > 0,
                f"elastic.budgets ({b}) must lie in (0, 1] as a fraction, or above 1 as an absolute cost",
            )
        require(len(set(self.budgets)) == len(self.budgets)
                and self.budgets == tuple(sorted(self.budgets, reverse=True)),
                f"elastic.budgets {self.budgets} must be different and fall, the largest first")
        require(
            self.budgets[0] <= 1 or self.budgets[-1] > 1,
            f"elastic.budgets {self.budgets} mixes absolute costs and fractions; give either, for example all as fractions",
        )
        require(
            len(self.long_weights) == len(self.budgets),
            f"elastic.long_weights {self.long_weights} must have one entry for each of the {len(self.budgets)} budgets",
        )
        require(min(self.long_weights) >= 0 and sum(self.long_weights) > 0,
                f"elastic.long_weights {self.long_weights} must be 0 or more, and not all 0")
        for name in ("cost_batch", "cost_len", "cost_bytes", "router_width", "calibration_rows"):
            require(getattr(self, name) >= 1,
                    f"elastic.{name} ({getattr(self, name)}) must be at least 1")
        for name in ("kl", "self_kl", "ce", "full_ce", "router_lr", "router_weight", "dead_zone"):
            require(getattr(self, name) >= 0,
                    f"elastic.{name} ({getattr(self, name)}) must be 0 or more")
        require(
            self.kl + self.self_kl + self.ce > 0,
            "elastic.kl, elastic.self_kl and elastic.ce are all 0: nothing would be learned; give one a weight",
        )
        require(
            self.self_kl == 0 or self.full_ce + self.ce + self.kl > 0,
            "elastic.self_kl needs elastic.full_ce, elastic.ce or elastic.kl above 0: else nothing teaches the teacher",
        )
        require(
            self.kl + self.ce > 0 or not set(self.baseline) & {"separate", "minitron"},
            "elastic.baseline: separate and minitron learn by elastic.kl and elastic.ce, and both are 0; give one a weight",
        )
        for name in ("gumbel_tau", "logit_scale"):
            require(min(getattr(self, name)) > 0,
                    f"elastic.{name} {getattr(self, name)} must be positive")
        require(self.kl_temperature > 0,
                f"elastic.kl_temperature ({self.kl_temperature}) must be positive")
        require(self.seq_len >= 16, f"elastic.seq_len ({self.seq_len}) must be at least 16")
        for name in ("search_share", "long_share"):
            require(0 <= getattr(self, name) <= 1,
                    f"elastic.{name} ({getattr(self, name)}) must lie in [0, 1]")
        _divides("elastic.long_len", self.long_len, "elastic.seq_len", self.seq_len)
        require(self.long_batch >= 0,
                f"elastic.long_batch ({self.long_batch}) must be positive, or 0 for as many tokens")
        if self.long_batch == 0:
            _divides("elastic.batch", self.batch, "elastic.long_len / elastic.seq_len",
                     self.long_len // self.seq_len)
        if self.stage_1_steps() < self.steps:
            _divides(
                "the sequences of stage 2", self.long_rows(), "elastic.accumulate", self.accumulate)

    def fewest_rows(self) -> int:
        """The most parts that the batches of both stages can be dealt out to evenly."""
        return (self.batch
                if self.stage_1_steps() == self.steps
                else math.gcd(self.batch, self.long_rows()))

    def stage_1_steps(self) -> int:
        """How many steps have short sequences; the rest is stage 2."""
        return self.steps - round(self.long_share * self.steps)

    def long_rows(self) -> int:
        """Sequences of a step in stage 2."""
        return self.long_batch or self.batch * self.seq_len // self.long_len

    def n_tokens(self) -> int:
        """Tokens of the whole run."""
        n_short = self.stage_1_steps()
        return (n_short * self.batch * self.seq_len
                + (self.steps - n_short) * self.long_rows() * self.long_len)


@dataclass(frozen=True)
class EvalConfig:
    """What is measured on held-out documents at the end of a run."""

    # Held-out problems of each family.
    problems_per_family: int = 150
    # Sampled thoughts per problem.
    samples: int = 4
    # Positions of ordinary text at which the gain of a thought is measured.
    text_positions: int = 256
    # Tokens of held-out text for the no-think loss.
    text_tokens: int = 65536
    # Held-out sequences of the training mixture on which elastic budgets are compared.
    elastic_rows: int = 512

    def check(self) -> None:
        """Raises ValueError for settings that cannot work."""
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), 1 if f.name == "samples" else 2
            require(value >= least,
                    f"eval.{f.name} ({value}) must be at least {least} to give an interval")


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is shared out among the processes that torchrun starts. A run may go on with
    other settings of these."""

    # data keeps the whole model on every process and adds gradients up; fsdp also shards weights,
    # optimizer states and the teacher (FSDP2); auto takes fsdp from 500 million parameters on. A
    # process that is alone shares nothing out.
    mode: Literal["auto", "data", "fsdp"] = "auto"
    # Numbers of matrix products. Weights, optimizer states and the teacher are fp32 in any case.
    dtype: Literal["fp32", "bf16"] = "fp32"
    # Compute the inside of each block again in the backward pass instead of keeping it (elastic: of
    # each budget).
    activation_checkpointing: bool = False
    # Compile each block with torch.compile for the updates of pretrain and cpt: rlp would compile
    # again for every length, and elastic runs uncompiled. It takes a while, and on a CPU a C++
    # compiler.
    compile: bool = False
    # Seconds after which a process that does not answer counts as lost.
    timeout_s: int = 1800

    def check(self) -> None:
        """Raises ValueError for settings that cannot work."""
        require(self.timeout_s >= 1,
                f"parallel.timeout_s ({self.timeout_s}) must be at least 1; 1800 is usual")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    # What to train with.
    mode: Literal["pretrain", "rlp", "cpt", "elastic"] = "rlp"
    # Named settings that the other options change; see `PRESETS` in config.py and `PAPERS` in
    # presets.py.
    preset: str = "cpu"
    # Run folder; empty means runs/MODE-PRESET-seedN.
    out: str = ""
    # Seed of the weights, the batches and the sampling.
    seed: int = 0
    # Go on from the newest checkpoint of the run folder.
    resume: bool = False
    # Where the starting weights are: a run folder, or a Hugging Face directory. Its shape replaces
    # model.*; if it holds a tokenizer, that replaces data.tokenizer. Empty means a base that is
    # trained once and kept in data.cache_dir.
    init: str = ""
    # Device: auto, cpu or cuda.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Threads of the CPU; 0: OMP_NUM_THREADS, or else as many as are fastest at the start.
    threads: int = 0
    # Form of the hot operations: auto (Triton on CUDA, else fast PyTorch), reference (slow and
    # obvious) or triton.
    kernels: Literal["auto", "reference", "triton"] = "auto"
    # Print the resolved settings and what the run would take, then stop: needs no GPU, no data and
    # no download.
    dry_run: bool = False
    # GPUs that a dry run divides weights and batches among.
    dry_run_gpus: int = 1
    # Shape of the hybrid model.
    model: ModelConfig = field(default_factory=ModelConfig)
    # What the model reads.
    data: DataConfig = field(default_factory=DataConfig)
    # Next-token prediction: it makes the base.
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    # Reinforcement as a pretraining objective (arXiv 2510.01265).
    rlp: RLPConfig = field(default_factory=RLPConfig)
    # Continued pretraining, the rival of RLP.
    cpt: CPTConfig = field(default_factory=CPTConfig)
    # Nested models in one, chosen by routers (Nemotron Elastic, arXiv 2511.16664).
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    # What is measured at the end.
    eval: EvalConfig = field(default_factory=EvalConfig)
    # How the work is shared out among several processes.
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def check(self) -> "Config":
        """Returns itself if everything fits together. Raises ValueError otherwise."""
        for part in (self.model, self.data, self.pretrain, self.rlp, self.cpt, self.elastic,
                     self.eval, self.parallel):
            part.check()
        require(self.threads >= 0,
                f"threads ({self.threads}) must be 1 or more, or 0 to measure which number is fastest")
        require(self.dry_run_gpus >= 1, f"dry_run_gpus ({self.dry_run_gpus}) must be at least 1")
        return self

    def run_dir(self) -> Path:
        """The run folder, with its default name if none was given."""
        return Path(self.out or f"runs/{self.mode}-{self.preset}-seed{self.seed}")

    def base_fingerprint(self) -> str:
        """Key of the base's settings: equal exactly when pretraining on the same text would give
        the same weights."""
        d = self.to_dict()
        d["data"].pop("cache_dir")
        d["model"] = {
            name: value for name, value in d["model"].items() if name != "widths" or value}
        for name in ("checkpoint_every", "log_every"):
            d["pretrain"].pop(name)
        d["pretrain"]["accumulate"] = (
            1  # processes are parts too, and next-token prediction is the same in any number
        )
        return fingerprint([d["model"], d["data"], d["pretrain"], d["seed"]])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The dataclass that `to_dict` wrote. Raises ValueError for a field that does not exist (a run
    of another version)."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    require(
        not unknown,
        f"the saved settings have fields that {cls.__name__} lacks: {', '.join(unknown)}; use the version that wrote them",
    )
    default = cls()
    kept = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(getattr(default, name)):
            value = from_dict(type(getattr(default, name)), value)
        kept[name] = _tuples(value)
    return replace(default, **kept)


def saved_config(run_dir: Path) -> Config:
    """The settings in a run's config.json. Raises ValueError if they cannot be read."""
    file = run_dir / "config.json"
    content = read_json(file)
    require("config" in content, f"{file} holds no settings of a run; copy it again from the run")
    return from_dict(Config, content["config"])


def _tuples(value: Any) -> Any:
    """Lists, as JSON has them, to tuples, at every depth."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _divides(name: str, value: int, by_name: str, by: int) -> None:
    """Raises ValueError unless `by` divides `value`, with the nearest value that would do."""
    nearest = max(by, round(value / by) * by)
    require(value % by == 0,
            f"{name} ({value}) must be a multiple of {by_name} ({by}); nearest is {nearest}")
