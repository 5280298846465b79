"""Every setting, in frozen dataclasses: a field's comment is its help on the command line, a preset is an instance.

`python train.py --mode rlp --preset cpu --rlp.group-size 16` builds a `Config`. `Config.check` refuses what cannot work,
naming the value, the rule and the remedy. `to_dict` and `from_dict` keep a run's settings beside its weights, and
`base_fingerprint` is the key under which a trained base is found again.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal


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

    def check(self) -> None:
        """Raises ValueError for a shape that cannot be built."""
        unknown = sorted(set(self.pattern) - set("M*-"))
        require(self.pattern != "", "model.pattern is empty: it needs at least one layer, for example 'M-M*-'")
        require(
            not unknown,
            f"model.pattern ({self.pattern!r}) has the unknown letters {''.join(unknown)!r}; "
            "a layer is M (Mamba-2), * (attention) or - (feed-forward)",
        )
        require(
            set(self.pattern) & set("M*"),
            f"model.pattern ({self.pattern!r}) has no M and no *, so no token would see another; add one",
        )
        sizes = "d_model d_ff n_heads n_kv_heads attn_head_dim mamba_heads mamba_head_dim mamba_groups d_state conv_width"
        for name in [*sizes.split(), "chunk"]:
            require(getattr(self, name) >= 1, f"model.{name} ({getattr(self, name)}) must be at least 1")
        require(self.vocab_size >= 0, f"model.vocab_size ({self.vocab_size}) must be positive, or 0 for the tokenizer's")
        _divides("model.n_heads", self.n_heads, "model.n_kv_heads", self.n_kv_heads)
        _divides("model.mamba_heads", self.mamba_heads, "model.mamba_groups", self.mamba_groups)
        require(self.ffn in ("relu2", "swiglu"), f"model.ffn ({self.ffn!r}) is unknown; choose relu2 or swiglu")
        require(self.norm_eps > 0, f"model.norm_eps ({self.norm_eps}) must be positive; 1e-5 is usual")
        require(
            self.rope_theta >= 0, f"model.rope_theta ({self.rope_theta}) must be positive, or 0 for no positional embedding"
        )
        if self.rope_theta:
            _divides("model.attn_head_dim", self.attn_head_dim, "the pairs that RoPE turns", 2)


@dataclass(frozen=True)
class DataConfig:
    """What the model reads."""

    # A UTF-8 file or a folder of such files; empty means the text that ships with Python.
    path: str = ""
    # tiktoken vocabulary; "corpus" trains one on the text, other names ("gpt2") are tiktoken's own and may download.
    tokenizer: str = "corpus"
    # Size of the vocabulary that "corpus" trains, special tokens included.
    vocab_size: int = 1024
    # Share of training tokens that is ordinary text, the rest being generated reasoning problems; in the first, clean part
    # of pretraining it is pretrain.clean_text_share instead.
    text_share: float = 0.3
    # Per cent of the documents, and of the problems, in each of the two held-out splits (val and test).
    held_out_percent: int = 5
    # Where the tokenizer, the encoded text and trained bases are kept.
    cache_dir: str = "runs/cache"

    def check(self) -> None:
        """Raises ValueError for settings that cannot work."""
        require(
            self.vocab_size >= 300,
            f"data.vocab_size ({self.vocab_size}) must be at least 300: 256 bytes, 3 special tokens, some merges",
        )
        require(0 <= self.text_share <= 1, f"data.text_share ({self.text_share}) must lie in [0, 1]")
        require(1 <= self.held_out_percent <= 25, f"data.held_out_percent ({self.held_out_percent}) must lie in 1 to 25")


@dataclass(frozen=True)
class FitConfig:
    """Settings of the one training loop, whatever the objective."""

    # Optimizer steps; 0 keeps the model as it is.
    steps: int = 1000
    # Sequences a step (contexts, for RLP).
    batch: int = 32
    # Parts that a step's batch is run in, one after the other. Next-token prediction gives the same result; RLP samples its
    # thoughts part by part, so it gets other thoughts.
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

    def check_fit(self, group: str) -> None:
        """Raises ValueError for settings that cannot work; `group` names them in the message."""
        require(self.steps >= 0, f"{group}.steps ({self.steps}) must be 0 or more")
        for name in ("batch", "accumulate", "checkpoint_every", "log_every"):
            require(getattr(self, name) >= 1, f"{group}.{name} ({getattr(self, name)}) must be at least 1")
        _divides(f"{group}.batch", self.batch, f"{group}.accumulate", self.accumulate)
        for name in ("lr", "muon_lr", "weight_decay", "warmup"):
            require(getattr(self, name) >= 0, f"{group}.{name} ({getattr(self, name)}) must be 0 or more")
        require(self.clip_norm > 0, f"{group}.clip_norm ({self.clip_norm}) must be positive")
        require(0 <= self.decay <= 1, f"{group}.decay ({self.decay}) is a share of the steps: it must lie in [0, 1]")


@dataclass(frozen=True)
class PretrainConfig(FitConfig):
    """Next-token prediction on packed documents: it makes the base that RLP starts from."""

    # Tokens of a packed training sequence.
    seq_len: int = 256
    # First share of the steps in which the families enter one by one, look-up first, always worked out and without text:
    # in-context look-up forms within 0.4 M tokens alone, and not within 2 M in the whole mixture.
    intro_share: float = 0.32
    # Share of the steps after which thoughts are no longer always worked out: the mixture below follows.
    clean_share: float = 0.65
    # Share of text tokens in the clean part between the two (data.text_share afterwards).
    clean_text_share: float = 0.3
    # Share of problem documents with a thought in the clean part.
    clean_think: float = 0.85
    # Share of problem documents with a thought afterwards.
    think: float = 0.4
    # Of those thoughts, the share that is worked out; the others stop half-way or are filler.
    worked: float = 0.35
    # Share of text windows with a filler thought at a random place afterwards: text can go on after a thought.
    text_think: float = 0.4

    def check(self) -> None:
        """Raises ValueError for settings that cannot work."""
        self.check_fit("pretrain")
        require(self.seq_len >= 16, f"pretrain.seq_len ({self.seq_len}) must be at least 16")
        for name in ("intro_share", "clean_share", "clean_text_share", "clean_think", "think", "worked", "text_think"):
            require(0 <= getattr(self, name) <= 1, f"pretrain.{name} ({getattr(self, name)}) must lie in [0, 1]")


@dataclass(frozen=True)
class RLPConfig(FitConfig):
    """Reinforcement as a pretraining objective (arXiv 2510.01265)."""

    # Where the token to predict is: the first of a problem's answer, or one uniformly random position a document (the
    # paper's choice).
    positions: Literal["answer", "random"] = "answer"
    # Share of contexts taken from ordinary text, at random positions (the rest are problems).
    text_share: float = 0.25
    # Longest context, in tokens; longer ones lose their beginning.
    context_len: int = 128
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
        require(0 <= self.tau <= 1, f"rlp.tau ({self.tau}) must lie in [0, 1]; the paper's is 0.999")
        require(0 <= self.text_share <= 1, f"rlp.text_share ({self.text_share}) must lie in [0, 1]")
        require(0 <= self.eps_low <= 1, f"rlp.eps_low ({self.eps_low}) must lie in [0, 1]")
        require(self.eps_high >= 0, f"rlp.eps_high ({self.eps_high}) must be 0 or more")
        require(self.kl >= 0, f"rlp.kl ({self.kl}) must be 0 or more")
        require(self.inner_epochs >= 1, f"rlp.inner_epochs ({self.inner_epochs}) must be at least 1")


@dataclass(frozen=True)
class CPTConfig(FitConfig):
    """Continued pretraining of the base on its own last mixture: the rival that RLP has to beat at equal time."""

    def check(self) -> None:
        """Raises ValueError for settings that cannot work."""
        self.check_fit("cpt")


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

    def check(self) -> None:
        """Raises ValueError for settings that cannot work."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            require(value >= 2, f"eval.{f.name} ({value}) must be at least 2 to give an interval")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    # What to train with.
    mode: Literal["pretrain", "rlp", "cpt"] = "rlp"
    # Named settings that the other options change; see `PRESETS` in config.py.
    preset: str = "cpu"
    # Run folder; empty means runs/MODE-PRESET-seedN.
    out: str = ""
    # Seed of the weights, the batches and the sampling.
    seed: int = 0
    # Go on from the newest checkpoint of the run folder.
    resume: bool = False
    # Run folder to take the starting weights from; empty means a base that is trained once and kept in data.cache_dir.
    init: str = ""
    # Device: auto, cpu or cuda.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Form of the hot operations: auto (Triton on CUDA, else fast PyTorch), reference (slow and obvious) or triton.
    kernels: Literal["auto", "reference", "triton"] = "auto"
    # Print the resolved settings and counts, then stop.
    dry_run: bool = False
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
    # What is measured at the end.
    eval: EvalConfig = field(default_factory=EvalConfig)

    def check(self) -> "Config":
        """Returns itself if everything fits together. Raises ValueError otherwise."""
        for part in (self.model, self.data, self.pretrain, self.rlp, self.cpt, self.eval):
            part.check()
        return self

    def run_dir(self) -> Path:
        """The run folder, with its default name if none was given."""
        return Path(self.out or f"runs/{self.mode}-{self.preset}-seed{self.seed}")

    def base_fingerprint(self) -> str:
        """Key of the base's settings: equal exactly when pretraining on the same text would give the same weights."""
        d = self.to_dict()
        d["data"].pop("cache_dir")
        for name in ("checkpoint_every", "log_every"):
            d["pretrain"].pop(name)
        return fingerprint([d["model"], d["data"], d["pretrain"], d["seed"]])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


PRESETS: dict[str, Config] = {
    # The main job: two CPU cores, about 12 minutes, see README for what it reaches.
    "cpu": Config(
        pretrain=PretrainConfig(steps=3000, batch=8, lr=3e-3, muon_lr=0.02, decay=0.4, checkpoint_every=500),
        rlp=RLPConfig(steps=150, batch=32, lr=2e-4, decay=0.5),
        cpt=CPTConfig(steps=900, batch=8, lr=1.5e-3, muon_lr=0.01, decay=1.0),
    ),
    # Seconds instead of minutes: every part runs, nothing is learned. For tests and for a first look at the code.
    "smoke": Config(
        preset="smoke",
        model=ModelConfig(
            pattern="M*-",
            d_model=32,
            d_ff=64,
            n_heads=2,
            n_kv_heads=1,
            attn_head_dim=16,
            mamba_heads=4,
            mamba_head_dim=16,
            d_state=8,
            chunk=16,
        ),
        data=DataConfig(vocab_size=512),
        pretrain=PretrainConfig(steps=4, batch=4, seq_len=64, warmup=2, lr=3e-3, muon_lr=0.02),
        rlp=RLPConfig(steps=3, batch=4, group_size=4, thought_len=8, context_len=96, warmup=1, lr=3e-4),
        cpt=CPTConfig(steps=3, batch=4, warmup=1),
        eval=EvalConfig(problems_per_family=4, samples=2, text_positions=8, text_tokens=512),
    ),
}


def fingerprint(value: Any) -> str:
    """Twelve hexadecimal digits that depend on the JSON form of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The dataclass that `to_dict` wrote. Raises ValueError for a field that does not exist (a run of another version)."""
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
        kept[name] = tuple(value) if isinstance(value, list) else value
    return replace(default, **kept)


def require(condition: Any, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def _divides(name: str, value: int, by_name: str, by: int) -> None:
    """Raises ValueError unless `by` divides `value`, with the nearest value that would do."""
    nearest = max(by, round(value / by) * by)
    require(value % by == 0, f"{name} ({value}) must be a multiple of {by_name} ({by}); nearest is {nearest}")
