"""Every setting, in frozen dataclasses: its comment is its help, its type holds its rule.

`python train.py --mode rlp --preset cpu --rlp.group-size 16` builds a `Config`. `Config.check`
refuses what cannot work, naming the value, the rule and the remedy. `to_dict` and `from_dict` keep
a run's settings beside its weights, and `base_fingerprint` is the key under which a trained base is
found again. Every group of settings for the training loop (a `FitConfig`) is a mode.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from system.errors import require
from system.files import fingerprint, read_json

# The kinds of layers, by their letters in a pattern, with the widths that each has.
WIDTH_FIELDS = {"M": ("mamba_heads", "mamba_head_dim"), "*": ("n_heads",), "-": ("d_ff",)}
SHARD_LIST = "shards.json"  # what a folder of shards of tokens has (text/shards.py)
N_VALIDATION = 48  # validation problems of a family, at most


class Rule(NamedTuple):
    """What a number must be, in its type: `Annotated[int, at_least(16)]`."""

    text: str  # follows name and value in a message
    holds: Callable[[float], bool]  # false for NaN, as comparisons are


def at_least(least: int, note: str = "") -> Rule:
    """A number is `least` or more, and finite; the note says why."""
    bound = f"at least {least}" if least else "0 or more"
    return Rule(f"must be {bound}{note}", lambda value: least <= value < math.inf)


def within(low: int, high: int, note: str = "") -> Rule:
    """A number lies between two others, or is one of them; the note says what is usual."""
    return Rule(f"must lie in [{low}, {high}]{note}", lambda value: low <= value <= high)


def positive(note: str = "") -> Rule:
    """A number is above 0, and finite; the note says what is usual."""
    return Rule(f"must be positive{note}", lambda value: 0 < value < math.inf)


SEED = Rule("must be 0 or more, and below 4294967296", lambda n: 0 <= n < 2**32)
# fp32 logits divided by less overflow, and 1 / more is 0: what is sampled then is the last token.
HEAT = Rule("must be positive, from 1e-6 to 1e6; 0.7 and 1 are usual",
            lambda value: 1e-6 <= value <= 1e6)
Count = Annotated[int, at_least(1)]
Length = Annotated[int, at_least(16)]
Weight = Annotated[float, at_least(0)]
Positive = Annotated[float, positive()]
Share = Annotated[float, within(0, 1)]
Seed = Annotated[int, SEED]


@dataclass(frozen=True)
class Settings:
    """A group of settings. The rules of single settings stand in their types."""

    def check(self, group: str = "") -> None:
        """Raises ValueError for a setting that breaks the rule in its type, or is no choice there.
        Subclasses add the rules between settings."""
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            value, path = getattr(self, name), f"{group}.{name}".lstrip(".")
            rules = [m for m in getattr(kind, "__metadata__", ()) if isinstance(m, Rule)]
            while get_origin(kind) is tuple:
                kind = get_args(kind)[0]
            for one in value if isinstance(value, tuple) else (value,):
                for text, holds in rules:
                    require(isinstance(one, int | float) and holds(one), f"{path} ({one}) {text}")
                if get_origin(kind) is Literal:
                    require_known(path, one, get_args(kind))


@dataclass(frozen=True)
class RopeScaling(Settings):
    """How RoPE is stretched for texts longer than those of pretraining (attention.frequencies)."""

    kind: Literal["default", "linear", "llama3", "yarn"] = "default"  # "default" is not at all.
    factor: Positive = 1.0  # What the frequencies of slow pairs are divided by.
    length: Count = 8192  # Tokens of the texts before.
    low: Positive = 1.0  # Pairs that turn less often in that length are slow.
    high: Positive = 4.0  # Pairs that turn more often stay as they are.
    amplitude: Positive = 1.0  # Factor of queries and keys (yarn).

    def check(self, group: str = "model.rope_scaling") -> None:
        """Raises ValueError for numbers that cannot work."""
        super().check(group)
        require(self.low < self.high, f"{group}.low ({self.low}) must be below {group}.high "
                f"({self.high}); 1 and 4 are usual, 1 and 32 for yarn")


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Shape of the hybrid model."""

    pattern: str = "M*-M*-"  # Layers in order: M Mamba-2, * attention, - feed-forward.
    # Rows of the embedding; 0 means as many as the tokenizer has.
    vocab_size: Annotated[int, at_least(0, "; 0 takes the tokenizer's")] = 0
    d_model: Count = 128  # Width of the residual stream.
    d_ff: Count = 384  # Neurons of a feed-forward layer.
    ffn: Literal["relu2", "swiglu"] = "relu2"  # Feed-forward activation: squared ReLU or SwiGLU.
    n_heads: Count = 4  # Query heads of attention.
    n_kv_heads: Count = 2  # Key-value heads, each shared by n_heads / n_kv_heads query heads.
    attn_head_dim: Count = 32  # Channels of an attention head.
    # Base of the rotary embedding; 0 means no positional embedding.
    rope_theta: Annotated[float, at_least(0, "; 0 is no positional embedding")] = 0.0
    rope_scaling: RopeScaling = RopeScaling()
    qk_norm: bool = False  # RMSNorm on queries and keys.
    qkv_bias: bool = False  # Biases of queries, keys and values.
    mamba_heads: Count = 8  # Heads of a Mamba-2 mixer.
    mamba_head_dim: Count = 32  # Channels of a Mamba-2 head.
    mamba_groups: Count = 1  # Groups of heads that share B and C.
    d_state: Count = 32  # State size of a Mamba-2 head, per channel.
    conv_width: Count = 4  # Taps of the causal convolution.
    chunk: Count = 32  # Chunk length of the scan; any value gives the same result.
    tie_embeddings: bool = False  # Use the embedding as output matrix.
    norm_eps: Annotated[float, positive("; 1e-5 is usual")] = 1e-5  # Epsilon of every RMSNorm.
    # Widths layer by layer, if not all alike: M heads and channels, * query heads, - neurons.
    widths: tuple[tuple[int, ...], ...] = ()

    def layer(self, i: int) -> "ModelConfig":
        """The shape of layer i: this one, with the widths that are the layer's own."""
        own = self.widths[i] if self.widths else ()
        own = dict(zip(WIDTH_FIELDS[self.pattern[i]], own, strict=False))
        return replace(self, widths=(), **own)

    def check(self, group: str = "model") -> None:
        """Raises ValueError for a shape that cannot be built."""
        super().check(group)
        pattern, n_widths = self.pattern, len(self.widths)
        unknown = "".join(sorted(set(pattern) - set(WIDTH_FIELDS)))
        require(pattern, "model.pattern is empty: it needs at least one layer, such as 'M-M*-'")
        require(not unknown, f"model.pattern ({pattern!r}) has the unknown letters {unknown!r}; a "
                f"layer is one of {' '.join(WIDTH_FIELDS)}, such as M (Mamba-2), * (attention) or "
                "- (feed-forward)")
        require(set(pattern) != {"-"}, f"model.pattern ({pattern!r}) has no layer but -, so no "
                "token would see another; add M or *")
        require(n_widths in (0, len(pattern)), f"model.widths has {n_widths} entries; it needs one "
                f"for each of {len(pattern)} layers, or none")
        for i in range(n_widths):
            self.layer(i).check()
        _divides("model.n_heads", self.n_heads, "model.n_kv_heads", self.n_kv_heads)
        _divides("model.mamba_heads", self.mamba_heads, "model.mamba_groups", self.mamba_groups)
        self.rope_scaling.check(f"{group}.rope_scaling")
        require(self.rope_scaling.kind == "default" or self.rope_theta > 1, f"model.rope_theta "
                f"({self.rope_theta}) must be above 1 where model.rope_scaling.kind is "
                f"{self.rope_scaling.kind!r}; 10000 is usual")
        if self.rope_theta:
            _divides("model.attn_head_dim", self.attn_head_dim, "the pairs that RoPE turns", 2)


@dataclass(frozen=True)
class DataConfig(Settings):
    """What the model reads."""

    # A file of UTF-8 text, *.jsonl, *.json (these also .gz, .zst) or *.parquet, a folder of such
    # files, or one that `tools.shards` wrote; empty: Python's texts.
    path: str = ""
    text_key: str = "text"  # What the text stands under in JSON and Parquet.
    # "corpus" trains a vocabulary on the text; a folder has one in its tokenizer.json; other names,
    # such as "gpt2", are tiktoken's and may download. A Hugging Face `init` brings its own.
    tokenizer: str = "corpus"
    # Size of the vocabulary that "corpus" trains, special tokens included.
    vocab_size: Annotated[int, at_least(300, ": 256 bytes, 3 special tokens, merges")] = 1024
    # Share of training tokens that are ordinary text; the rest are problems.
    text_share: Share = 0.25
    # "built-in" families; a .jsonl file of question, answer and, if there are, thought and family;
    # a .py file of your own functions; or "reasoning_gym:chain_sum,...": tasks of that package.
    problems: str = "built-in"
    held_out_percent: Annotated[int, within(1, 25)] = 5  # Per cent in each of the splits val, test.
    cache_dir: str = "runs/cache"  # Where the tokenizer, the tokens and trained bases are kept.


@dataclass(frozen=True)
class FitConfig(Settings):
    """Settings of the one training loop, whatever the objective."""

    steps: Annotated[int, at_least(0)] = 1000  # Optimizer steps; 0 keeps the model as it is.
    batch: Count = 32  # Sequences a step (contexts, for RLP).
    # Parts that each process runs its share of a step's batch in, in turn. Next-token prediction
    # gives the same result in any number; RLP and elastic draw their noise part by part, so one
    # process with 2 parts equals two processes with one part each.
    accumulate: Count = 1
    lr: Weight = 3e-3  # Peak learning rate of AdamW.
    muon_lr: Weight = 0.0  # Peak rate of Muon for matrices inside layers; 0 leaves them to AdamW.
    weight_decay: Weight = 0.0  # Decoupled weight decay of matrices.
    warmup: Annotated[int, at_least(0)] = 20  # Steps of linear warm-up.
    decay: Share = 0.0  # Last share of the steps, over which the rate falls linearly to zero.
    clip_norm: Positive = 1.0  # Largest norm of the gradient.
    checkpoint_every: Count = 200  # Steps between checkpoints (one is always written at the end).
    log_every: Count = 1  # Steps between lines of metrics.jsonl.

    def fewest_rows(self) -> int:
        """Sequences of the smallest batch: the processes and parts must divide it."""
        return self.batch

    def check(self, group: str = "") -> None:
        """Raises ValueError for settings that cannot work."""
        super().check(group)
        _divides(f"{group}.batch", self.batch, f"{group}.accumulate", self.accumulate)


@dataclass(frozen=True)
class PretrainConfig(FitConfig):
    """Next-token prediction on packed documents with worked thoughts: the base's first phase. It
    ends as soon as the base can think, or after all its steps, and says which."""

    seq_len: Length = 256  # Tokens of a packed training sequence.
    # First share of the steps: problems of the first family alone. In-context look-up forms in 100
    # to 150 steps of the preset alone, and in 600 among the others.
    intro_share: Share = 0.08
    think: Share = 0.85  # Share of problems with a thought.
    # Enough: on validation problems the likeliest thoughts of every family lead to so many right
    # answers. 2 is out of reach: all steps are taken.
    enough: Annotated[float, within(0, 2)] = 0.85
    enough_every: Count = 250  # Steps between two such measurements, once all families are in.


@dataclass(frozen=True)
class WarmupConfig(FitConfig):
    """Next-token prediction on documents with thoughts inside: the base's last phase, or the first
    of a released model. It learns to go on after thoughts of any kind, and that not all are good.
    """

    seq_len: Length = 256  # Tokens of a packed training sequence.
    # Share of tokens in documents with results to be computed, here and in what reads the same
    # mixture (cpt, elastic). Read any earlier, they keep the families from forming.
    computed_share: Share = 0.0
    think: Share = 0.6  # Share of problems with a thought.
    # Share of those, and of results' thoughts, worked out; the others stop half-way or are filler.
    worked: Share = 0.5
    # Text often repeats its last two tokens. Share of those places with a thought that quotes how
    # they went on before, of the same kinds as a result's.
    recall: Share = 0.0
    # Tokens from a thought to the next, on average, in text and in computed documents; 0: these
    # have none, for a released model that is not warmed up.
    gap: Annotated[int, Rule(
        "must be at least 2, or 0 for no thoughts", lambda n: n == 0 or n >= 2)] = 12

    def check(self, group: str = "warmup") -> None:
        """Raises ValueError for settings that cannot work."""
        super().check(group)
        require(self.gap or not self.recall, f"warmup.recall ({self.recall}) puts thoughts into "
                "text, and warmup.gap 0 leaves them out; give a gap of 2 or more, or recall 0")


@dataclass(frozen=True)
class RLPConfig(FitConfig):
    """Reinforcement as a pretraining objective (arXiv 2510.01265)."""

    # The token to predict: the first of a problem's answer, or a random one (the paper's choice).
    positions: Literal["answer", "random"] = "answer"
    text_share: Share = 0.25  # Share of contexts in text, at random positions.
    computed_share: Share = 0.0  # Share in computed documents, at random positions.
    # Built-in problems have up to so many steps more than any with a worked thought: nobody shows
    # how to work those. For modes that read problems without thoughts: rlp, rlvr, and cpt so.
    more_steps: Annotated[int, within(0, 3)] = 0
    # Or they have lines that lead nowhere, as no problem with a worked thought has; same modes.
    distractors: bool = False
    # Tokens from where a thought stands to the token that it is for, in text and in computed
    # documents: the thought has read them, and they follow it once more. 0 is the paper's; at the
    # answers of problems it is always 0.
    back: Annotated[int, at_least(0)] = 2
    context_len: Annotated[int, at_least(8)] = 128  # Longer contexts lose their beginning.
    prompt: str = ""  # Instruction before every context, for a base that was not taught the tags.
    prompt_file: str = ""  # UTF-8 file to take that text from, such as prompts/think.txt.
    # Thoughts per context, G; the paper uses 16.
    group_size: Annotated[int, at_least(2, ": advantages compare the thoughts of a group")] = 8
    # Longest thought in tokens, its closing tag included.
    thought_len: Annotated[int, at_least(1, ": the closing tag is a token of the thought")] = 40
    # gain: the information gain. match, the rival's (RPT, arXiv 2506.08007): 1 where the likeliest
    # tokens after the thought are the observed ones, 0 elsewhere.
    reward: Literal["gain", "match"] = "gain"
    # Groups teach nothing where the teacher, without a thought, has an entropy of fewer nats (RPT).
    min_entropy: Weight = 0.0
    # Observed tokens after a thought that the reward looks at; 1 is the paper's. Where positions
    # are answers it is raised to the longest answer's, and a line says so.
    horizon: Count = 1
    # Temperature of thoughts, in training and after; the paper's.
    temperature: Annotated[float, HEAT] = 0.7
    eps_low: Share = 0.2  # Lower clip of the likelihood ratio: 1 - eps_low.
    eps_high: Weight = 0.2  # Upper clip of the likelihood ratio: 1 + eps_high.
    inner_epochs: Count = 1  # Updates from each batch of thoughts.
    # Weight of -log p(target | context, thought), which trains the predictor too; the paper has 0.
    predictor: Weight = 0.0
    kl: Weight = 0.0  # Weight of a thought's KL from the starting policy; the paper uses 0.
    # Decay of the teacher's moving average.
    tau: Annotated[float, within(0, 1, "; the paper's is 0.999")] = 0.999
    # Rewards below this are raised to it; -inf (the paper) leaves them as they are.
    reward_floor: Annotated[
        float, Rule("must be 0 or less: it would hide gains", lambda value: value <= 0)] = -2.0

    def check(self, group: str = "rlp") -> None:
        """Raises ValueError for settings that cannot work."""
        super().check(group)
        _shares("rlp", self.text_share, "rlp", self.computed_share)
        require(self.back <= self.context_len, f"rlp.back ({self.back}) must be at most "
                f"rlp.context_len ({self.context_len}): the thought stands inside the context")

    def reads_problems(self) -> bool:
        """Whether texts and computed documents leave contexts for problems."""
        return self.text_share + self.computed_share < 1


# Those that every mode's figures are made by, or that have a rule of their own for modes.
MEASURED = ("back", "context_len", "distractors", "horizon", "more_steps", "positions", "prompt",
            "prompt_file", "temperature", "thought_len")


@dataclass(frozen=True)
class CPTConfig(FitConfig):
    """Continued pretraining of the base on its last mixture: RLP's rival at equal FLOPs."""

    # Whether its documents have written thoughts, as in the warm-up. Without them it reads what RLP
    # reads, text and problems with their answers, as the paper's rival does.
    thoughts: bool = True


@dataclass(frozen=True)
class SFTConfig(FitConfig):
    """Supervised fine-tuning on problems with worked thoughts: loss on thought and answer alone."""


@dataclass(frozen=True)
class RLVRConfig(FitConfig):
    """Reinforcement by right answers: RLP's loop at the answers of problems alone, with the reward
    `match`. How thoughts are sampled and clipped stands in rlp.*, the other settings here."""


@dataclass(frozen=True)
class LoRAConfig(Settings):
    """Adapters in place of all weights (LoRA, arXiv 2106.09685)."""

    # Rank r of the adapter of each linear map inside the layers: only adapters train, by AdamW at
    # the mode's lr; muon_lr has no part in it. 0 trains all weights.
    rank: Annotated[int, at_least(0, "; 0 trains all weights")] = 0
    alpha: Positive = 16.0  # An adapter adds alpha / rank times its product.


@dataclass(frozen=True)
class ElasticConfig(FitConfig):
    """Nested models in one, and routers that choose them (Nemotron Elastic, arXiv 2511.16664)."""

    # Budgets, as fractions of the full model's cost, or (above 1) in units of elastic.cost.
    budgets: Annotated[tuple[float, ...], Rule(
        "must lie in (0, 1] as a fraction, or above 1 as an absolute cost",
        lambda value: value > 0)] = (1.0, 0.75, 0.5)
    # What a budget limits. memory: bytes of weights and caches; latency: measured, ns to read a
    # token and to generate one.
    cost: Literal["parameters", "memory", "flops", "latency"] = "parameters"
    cost_batch: Count = 8  # Sequences that are served at once, for memory and latency.
    cost_len: Count = 1024  # Tokens of a served sequence, for memory and FLOPs.
    d_model_choices: tuple[int, ...] = ()  # Widths of the stream; empty: eighths, down to half.
    ffn_choices: tuple[int, ...] = ()  # Numbers of FFN neurons; empty: 24ths, down to a quarter.
    # Numbers of Mamba heads, multiples of model.mamba_groups; empty: eighths or groups, to half.
    mamba_head_choices: tuple[int, ...] = ()
    mamba_channel_choices: tuple[int, ...] = ()  # Channels of a head; empty: all, 3/4, half.
    # Numbers of query heads, multiples of model.n_kv_heads; empty: every multiple, to about half.
    attn_head_choices: tuple[int, ...] = ()
    depth_choices: tuple[int, ...] = ()  # Numbers of layers that are kept; empty: all.
    # Axes on which each layer has its own choice; on the others all layers of a kind share one.
    heterogeneous: tuple[Literal["ffn", "mamba_heads", "mamba_channels", "attn_heads"], ...] = (
        "ffn", "mamba_heads", "mamba_channels", "attn_heads")
    # Widths from the router; or, before the first step, fixed: alike on all axes; random; search:
    # of 50 random ones those that cost least loss untrained (Minitron-SSM, arXiv 2504.11409);
    # sensitivity: those whose losses, each measured alone, have the least sum.
    choose: Literal["router", "fixed", "random", "search", "sensitivity"] = "router"
    # What a router begins with: a head start of the full widths, or a vote for sensitivity's.
    router_start: Literal["full", "sensitivity"] = "full"
    router_vote: Weight = 2.0  # That vote, in logits.
    choose_seed: Seed = 0  # Which random ones.
    # A router's choice while it learns: the weighted sum of all masks (soft, the paper's mode 2),
    # the likeliest mask times its probability (top1, mode 1), or with the gradient of the sum.
    mask: Literal["soft", "top1", "straight-through"] = "soft"
    search_share: Share = 0.3  # Share of the steps on masks; then choices are settled and cut out.
    router_width: Count = 256  # Width of a router's hidden layer; the paper uses 256.
    router_lr: Weight = 1e-2  # Learning rate of the routers; the paper's.
    router_bias: Weight = 1.0  # Head start of the largest choices, in logits.
    router_weight: Weight = 5.0  # Weight of the budget loss, lambda; the paper's has another form.
    # Order of the stream's channels: pca turns them onto its principal axes, the parent's function
    # unchanged, and the first hold most of it; paper is equation 1, output weighs that by what
    # reads a channel. This and the next four have random too: see importance.SCORES.
    score_d_model: str = "pca"
    score_ffn: str = "output"  # Of neurons: paper is eq. 2, output what one adds to the stream.
    score_mamba: str = "output"  # Of heads and channels: paper is eq. 3 and 4, output as for ffn.
    score_attn: str = "paper"  # Of query heads: paper is the queries' size, output what one adds.
    score_depth: str = "paper"  # Of layers: paper is eq. 5, once does not score the rest again.
    calibration_rows: Count = 32  # Sequences of training text that importance is measured on.
    kl: Weight = 1.0  # Weight of the forward KL divergence from the frozen parent.
    self_kl: Weight = 0.0  # Weight of the KL from the full model as it trains (smaller budgets).
    ce: Weight = 0.0  # Weight of the cross-entropy, for every budget.
    full_ce: Weight = 0.0  # Weight of the full model's cross-entropy (alpha), as it is a teacher.
    # Temperature T of both distributions in the divergences, which get no factor T^2.
    kl_temperature: Positive = 1.0
    seq_len: Length = 256  # Tokens of a training sequence in stage 1.
    long_len: Length = 512  # Tokens of a training sequence in stage 2, a multiple of seq_len.
    # Sequences of a step in stage 2; 0: as many as make a step of as many tokens as in stage 1.
    long_batch: Annotated[int, at_least(0, "; 0 is as many tokens as in stage 1")] = 0
    long_share: Share = 0.4  # Share of the steps that stage 2 takes.
    # Budgets drawn for a step, each for as many sequences of every part: all processes run the same
    # models in the same order.
    draws: Count = 1
    # Every sequence trains several budgets, weighted by their probabilities, for one pass of the
    # parent: the largest, the least, and `draws` of those between (slimmable networks' sandwich
    # rule, arXiv 1903.05134); so the default's three are all trained.
    together: bool = False
    # Probability of each budget in stage 2 (in stage 1 all are alike).
    long_weights: Annotated[tuple[float, ...], at_least(0, ", and not all 0")] = (0.5, 0.3, 0.2)
    # Rivals to train and measure too: each size alone, of the family's widths; the full one is the
    # parent. separate, minitron: cut from the parent and distilled, with as many FLOPs in all as
    # the family takes, or each with all of its tokens; scratch: as the parent was trained.
    baseline: tuple[Literal["separate", "minitron", "scratch"], ...] = ()

    def check(self, group: str = "elastic") -> None:
        """Raises ValueError for settings that cannot work."""
        super().check(group)
        budgets, weights = self.budgets, self.long_weights
        require(budgets, "elastic.budgets is empty: give at least one, such as 1.0")
        require(budgets == tuple(sorted(budgets, reverse=True))
                and len({f"{b:g}" for b in budgets}) == len(budgets), f"elastic.budgets {budgets} "
                "must be different and fall, the largest first; six digits of each count")
        require(budgets[0] <= 1 or budgets[-1] > 1, f"elastic.budgets {budgets} mixes absolute "
                "costs and fractions; give either, for example all as fractions")
        require(len(weights) == len(budgets), f"elastic.long_weights {weights} must have one entry "
                f"for each of the {len(budgets)} budgets")
        require(any(weights), f"elastic.long_weights {weights} must be 0 or more, and not all 0")
        require(self.kl + self.self_kl + self.ce > 0, "elastic.kl, elastic.self_kl and elastic.ce "
                "are all 0: nothing would be learned; give one a weight")
        require(self.router_width >= len(budgets), f"elastic.router_width ({self.router_width}) "
                f"must be at least the number of elastic.budgets ({len(budgets)}): a unit keeps "
                "what is chosen for each before the first step")
        require(self.self_kl == 0 or self.full_ce + self.ce + self.kl > 0, "elastic.self_kl needs "
                "elastic.full_ce, elastic.ce or elastic.kl above 0, or nothing teaches the teacher")
        require(self.kl + self.ce > 0 or not set(self.baseline) & {"separate", "minitron"},
                "elastic.baseline: separate and minitron learn by elastic.kl and elastic.ce, and "
                "both are 0; give one a weight")
        if self.has_stage_2():
            _divides("elastic.long_len", self.long_len, "elastic.seq_len", self.seq_len)
        if self.has_stage_2() and self.long_batch == 0:
            times = self.long_len // self.seq_len
            _divides("elastic.batch", self.batch, "elastic.long_len / elastic.seq_len", times)
        most = max(1, len(budgets) - 2)
        require(self.draws <= most or not self.together, f"elastic.draws ({self.draws}) must be "
                f"{most} at most with elastic.together, which trains the largest and the least of "
                f"{len(budgets)} budgets anyway")
        n, names = self.accumulate * self.shared_by(), "elastic.accumulate x elastic.draws"
        _divides("elastic.batch", self.batch, names, n)
        if self.has_stage_2():
            _divides("the sequences of stage 2", self.long_rows(), names, n)

    def fewest_rows(self) -> int:
        """The most parts that the batches of both stages can be dealt out to evenly."""
        rows = math.gcd(self.batch, self.long_rows()) if self.has_stage_2() else self.batch
        return rows // self.shared_by()

    def shared_by(self) -> int:
        """How many budgets share the sequences of a step."""
        return 1 if self.together else self.draws

    def stage_1_steps(self) -> int:
        """How many steps have short sequences; the rest is stage 2."""
        return self.steps - round(self.long_share * self.steps)

    def has_stage_2(self) -> bool:
        """Whether any step has long sequences."""
        return self.stage_1_steps() < self.steps

    def search_steps(self) -> int:
        """How many steps run on masks while routers learn; none where nothing is left to them."""
        return round(self.search_share * self.steps) if self.choose == "router" else 0

    def budget_weights(self, step: int) -> tuple[float, ...]:
        """How often each budget is drawn at a step, counted from 0 (eq. 18 and 19)."""
        return self.long_weights if step >= self.stage_1_steps() else (1.0,) * len(self.budgets)

    def between(self, step: int) -> dict[int, float]:
        """With elastic.together: the budgets between the largest and the least, by number, each
        with the probability that a draw takes it; none where all of them train anyway."""
        weights = self.budget_weights(step)
        inner = range(1, len(weights) - 1)
        total = sum(weights[n] for n in inner)
        some = total and self.draws < len(inner)
        return {n: weights[n] / total for n in inner if weights[n]} if some else {}

    def passes(self, step: int) -> list[float]:
        """How often a sequence passes through each budget at a step, on the mean over draws."""
        weights, drawn = self.budget_weights(step), self.between(step)
        if not self.together:
            return [w / sum(weights) for w in weights]
        return [1 - (1 - drawn[n]) ** self.draws if n in drawn else float(w > 0)
                for n, w in enumerate(weights)]

    def long_rows(self) -> int:
        """Sequences of a step in stage 2."""
        return self.long_batch or self.batch * self.seq_len // self.long_len

    def n_tokens(self) -> int:
        """Tokens of the whole run."""
        n, n_long = self.stage_1_steps(), self.long_rows() * self.long_len
        return n * self.batch * self.seq_len + (self.steps - n) * n_long


Interval = Annotated[int, at_least(2, " to give an interval")]


@dataclass(frozen=True)
class EvalConfig(Settings):
    """What is measured on held-out documents at the end of a run."""

    # Documents and problems that figures are of. Choose settings by val: test is to report.
    split: Literal["test", "val"] = "test"

    problems_per_family: Interval = 150  # Held-out problems of each family.
    samples: Annotated[int, at_least(1, " to give an interval")] = 4  # Thoughts per problem.
    # Random positions of text, and as many of computed documents, where thoughts are measured.
    text_positions: Interval = 512
    text_tokens: Interval = 65536  # Tokens of held-out text for the no-think loss.
    elastic_rows: Interval = 512  # Sequences of the mixture on which budgets are compared.


@dataclass(frozen=True)
class ParallelConfig(Settings):
    """How work is shared out among processes (torchrun). A run may go on with others of these."""

    # data keeps the whole model on every process and adds gradients up; fsdp also shards weights,
    # optimizer states and the teacher (FSDP2); auto takes fsdp from 500 million parameters on.
    mode: Literal["auto", "data", "fsdp"] = "auto"
    # Numbers of matrix products. Weights, optimizer states and the teacher are fp32 in any case.
    # auto: bf16 on a GPU, on a CPU the faster of the two, as measured at the start.
    dtype: Literal["fp32", "bf16", "auto"] = "fp32"
    # Compute each block's inside again in the backward pass, to save memory (elastic: a budget's).
    activation_checkpointing: bool = False
    # Compile each block for updates: a CPU needs a C++ compiler for that. It pays where lengths are
    # always the same, as in pretrain and cpt; for new ones, as rlp has, it compiles again.
    compile: bool = False
    # Sample thoughts by replaying a CUDA graph for each token. No card has run this yet; what it is
    # worth there, `python -m tools.gpu_check` measures.
    cuda_graphs: bool = False
    # Seconds after which a process that does not answer counts as lost, also while the first reads,
    # encodes and checks the text, which the others wait for.
    timeout_s: Annotated[int, at_least(1, "; 1800 is usual")] = 1800


@dataclass(frozen=True)
class Config(Settings):
    """All settings of a run."""

    mode: str = "rlp"  # What to train with: a group of settings below that has steps.
    preset: str = "cpu"  # Named settings that the other options change; they stand in presets.py.
    out: str = ""  # Run folder; empty means runs/MODE-PRESET-seedN.
    seed: Seed = 0  # Seed of the weights, the batches and the sampling.
    resume: bool = False  # Go on from the newest checkpoint of the run folder.
    # Starting weights: a run folder or a Hugging Face directory. Its shape replaces model.*, its
    # tokenizer data.tokenizer. Empty: a base that is trained once and kept in data.cache_dir.
    init: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"  # Device: auto, cpu or cuda.
    # Threads of the CPU; 0: OMP_NUM_THREADS, or else as many as are fastest at the start.
    threads: Annotated[int, within(0, 1024, "; 0 measures which number is fastest")] = 0
    # The hot operations: auto (Triton on CUDA, else fast PyTorch), reference (slow) or triton.
    kernels: Literal["auto", "reference", "triton"] = "auto"
    # Where each step's metrics go: metrics.jsonl alone, or TensorBoard's event files beside it too.
    log: Literal["jsonl", "tensorboard"] = "jsonl"
    dry_run: bool = False  # Print what the run would take, then stop: no GPU, data or download.
    dry_run_gpus: Count = 1  # GPUs that a dry run divides weights and batches among.
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    rlp: RLPConfig = field(default_factory=RLPConfig)
    cpt: CPTConfig = field(default_factory=CPTConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    rlvr: RLVRConfig = field(default_factory=RLVRConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def groups(self) -> dict[str, Settings]:
        """The groups of settings, by name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Settings)}

    def modes(self) -> list[str]:
        """The values of `mode`: the groups for the training loop."""
        return [name for name, group in self.groups().items() if isinstance(group, FitConfig)]

    def rollouts(self) -> RLPConfig:
        """How the mode samples and rewards thoughts: rlp.*, but for what rlvr has of its own."""
        if self.mode != "rlvr":
            return self.rlp
        return replace(self.rlp, **vars(self.rlvr), reward="match", predictor=0.0,
                       positions="answer", text_share=0.0, computed_share=0.0)

    def check_read(self, preset: "Config") -> "Config":
        """Itself, if no setting that differs from a preset goes unread. Raises ValueError for one
        on which nothing hangs."""
        for name, value in vars(self).items():
            if isinstance(value, Settings):
                self._check_group(name, value, getattr(preset, name))
            elif value != getattr(preset, name):
                self._check_needs(name, value)
        return self

    def _check_group(self, group: str, ours: Settings, theirs: Settings) -> None:
        where = "where init is given" if group == "pretrain" else f"in mode {self.mode}"
        is_mode, own = {group, self.mode} <= set(self.modes()), getattr(self, self.mode, None)
        for name, value in vars(ours).items():
            if value == getattr(theirs, name):
                continue
            known = group != "pretrain" and hasattr(own, name)
            require(not is_mode or self.reads(group, name), f"{group}.{name} ({value}) is not read "
                    f"{where}; leave it out" + f", or give {self.mode}.{name}" * known)
            self._check_needs(f"{group}.{name}", value)

    def _check_needs(self, path: str, value: Any) -> None:
        what, holds = NEEDS.get(path, ("", lambda _: True))
        require(holds(self), f"{path} ({value}) is for {what}; leave it out, or give that")

    def reads(self, group: str, name: str) -> bool:
        """Whether anything hangs on a setting of a mode: of this one, of the phases in which its
        base is trained or, of rlp, how thoughts are sampled and measured."""
        if group == self.mode:
            return True
        if group == "rlp" and self.mode in ("pretrain", "warmup", "cpt", "sft", "elastic"):
            return name in MEASURED
        if group == "rlp":  # rlvr has some of its own
            return getattr(self.rollouts(), name) == getattr(self.rlp, name)
        phases = {"pretrain": not self.init, "warmup": self.mode != "pretrain"}
        return phases.get(group, False)

    def check(self, group: str = "") -> "Config":
        """Itself, if everything fits together. Raises ValueError otherwise."""
        super().check(group)
        require_known("mode", self.mode, self.modes())
        require(self.log != "tensorboard" or find_spec("tensorboard"), "log (tensorboard) needs "
                "the package tensorboard; run: pip install tensorboard, or leave --log out")
        for name, settings in self.groups().items():
            settings.check(name)
        _shares("data", self.data.text_share, "warmup", self.warmup.computed_share)
        for name in ("more_steps", "distractors"):
            if value := getattr(self.rlp, name):
                self._check_unworked(f"rlp.{name} ({value})")
        if self.lora.rank:
            said = f"lora.rank ({self.lora.rank})"
            require(self.mode != "elastic", f"{said} must be 0 in mode elastic, which orders and "
                    "cuts whole weights")
            require(self.init or self.mode != "pretrain", f"{said} must be 0 where pretraining "
                    "begins with random weights, which adapters leave as they are; or give --init")
        return self

    def _check_unworked(self, said: str) -> None:
        reads = self.mode in ("rlp", "rlvr") or (self.mode == "cpt" and not self.cpt.thoughts)
        require(reads, f"{said} is for problems without written thoughts, and mode {self.mode} "
                "reads some that have them; leave it out, or choose rlp, rlvr, or cpt with "
                "--cpt.no-thoughts")
        require(self.mode != "rlp" or self.rlp.reads_problems(), f"{said} is for problems, and "
                "rlp.text_share and rlp.computed_share leave none; leave it out, or lower them")
        require(self.data.problems == "built-in", f"{said} is for the built-in problems, not those "
                f"of data.problems ({self.data.problems}); leave it out")

    def run_dir(self) -> Path:
        """The run folder, with its default name if none was given."""
        return Path(self.out or f"runs/{self.mode}-{self.preset}-seed{self.seed}")

    def base_fingerprint(self, *more: str) -> str:
        """Key of the base's settings: equal exactly when the same text would give the same base,
        but for rounding, which processes and bf16 change.
        more: "warmup", for the base that was warmed up; what follows thoughts `rlp.back` says."""
        # accumulate: next-token prediction gives the same in any number of parts
        free = ("cache_dir", "text_key", "checkpoint_every", "log_every", "accumulate")
        d, n = self.to_dict(), self.eval.problems_per_family
        groups = [{name: value for name, value in d[group].items() if name not in free}
                  for group in ("model", "data", "pretrain", *more)]
        few = [n] * (n < N_VALIDATION)  # which say when it is good enough
        return fingerprint([*groups, self.seed, *[self.rlp.back] * len(more), *few])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def of_shards(config: Config) -> bool:
    """Whether the texts of data.path are shards of tokens."""
    return bool(config.data.path) and (Path(config.data.path) / SHARD_LIST).is_file()


# Settings on which nothing hangs without others, and those.
NEEDS: dict[str, tuple[str, Callable[[Config], bool]]] = {
    "dry_run_gpus": ("dry_run", lambda c: c.dry_run),
    "eval.text_positions": ("modes that think", lambda c: c.mode not in (
        "pretrain", "warmup", "elastic")),
    "eval.text_tokens": ("modes other than elastic", lambda c: c.mode != "elastic"),
    "eval.elastic_rows": ("mode elastic", lambda c: c.mode == "elastic"),
    "data.text_key": ("texts in data.path", lambda c: bool(c.data.path) and not of_shards(c)),
    "data.vocab_size": ("a tokenizer that is trained: data.tokenizer corpus, and no init or shards",
                        lambda c: c.data.tokenizer == "corpus" and not c.init
                        and not of_shards(c)),
    "lora.alpha": ("adapters: lora.rank", lambda c: c.lora.rank > 0),
    **dict.fromkeys(("rlp.eps_low", "rlp.eps_high"), (
        "rlp.inner_epochs of 2 or more: until then all ratios are 1",
        lambda c: c.rlp.inner_epochs > 1)),
    "rlp.reward_floor": ("the reward gain", lambda c: c.rollouts().reward == "gain"),
    **dict.fromkeys(("elastic.long_len", "elastic.long_batch"), (
        "stage 2: elastic.long_share", lambda c: c.elastic.long_share > 0)),
    "elastic.cost_batch": ("elastic.cost memory or latency",
                           lambda c: c.elastic.cost in ("memory", "latency")),
    "elastic.kl_temperature": ("elastic.kl or elastic.self_kl",
                               lambda c: c.elastic.kl + c.elastic.self_kl > 0),
    "elastic.choose_seed": ("elastic.choose random or search",
                            lambda c: c.elastic.choose in ("random", "search")),
    **{f"elastic.{name}": ("elastic.choose router", lambda c: c.elastic.choose == "router")
       for name in ("router_start", "router_lr", "router_weight", "mask", "search_share")},
    "elastic.router_bias": ("elastic.choose router that starts full", lambda c: (
        c.elastic.choose, c.elastic.router_start) == ("router", "full")),
    "elastic.router_vote": ("elastic.choose router and elastic.router_start sensitivity",
                            lambda c: (c.elastic.choose, c.elastic.router_start)
                            == ("router", "sensitivity"))}


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The dataclass that `to_dict` wrote. Raises ValueError for a field of another version."""
    require(isinstance(values, dict),
            f"saved settings of {cls.__name__} ({values!r}) are no JSON object; copy them again")
    default = cls()
    unknown = ", ".join(sorted(set(values) - {f.name for f in dataclasses.fields(cls)}))
    require(not unknown, f"the saved settings have fields that {cls.__name__} lacks: {unknown}; "
            "use the version that wrote them")
    groups = {name: from_dict(type(getattr(default, name)), value)
              for name, value in values.items() if isinstance(getattr(default, name), Settings)}
    return replace(default, **{name: _tuples(value) for name, value in values.items()} | groups)


def saved_config(run_dir: Path) -> Config:
    """The settings in a run's config.json. Raises ValueError if they cannot be read."""
    file = run_dir / "config.json"
    content = read_json(file)
    require("config" in content, f"{file} holds no settings of a run; copy it again from the run")
    return from_dict(Config, content["config"])


def require_known(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError unless a setting is one of its choices."""
    require(value in choices, f"{name} ({value!r}) is unknown; choose one of {', '.join(choices)}")


def _tuples(value: Any) -> Any:
    """Lists, as JSON has them, to tuples, at every depth."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _shares(texts: str, text: float, group: str, computed: float) -> None:
    """Raises ValueError if problems would have less than nothing."""
    require(text + computed <= 1, f"{texts}.text_share ({text}) and {group}.computed_share "
            f"({computed}) must add up to 1 at most; the rest is problems")


def _divides(name: str, value: int, by_name: str, by: int) -> None:
    """Raises ValueError unless `by` divides `value`, with the nearest value that would do."""
    nearest = max(by, round(value / by) * by)
    require(value % by == 0,
            f"{name} ({value}) must be a multiple of {by_name} ({by}); nearest is {nearest}")
