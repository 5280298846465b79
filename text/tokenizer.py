"""Text to token ids and back: a vocabulary trained on the corpus, a tokenizer.json, or one that
tiktoken knows."""

import json
from pathlib import Path

import tiktoken
from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.trainers import BpeTrainer

from system.errors import require
from system.files import fingerprint

END, THINK, CLOSE = "<|endoftext|>", "<think>", "</think>"


# A word, a digit or a run of signs, each with at most one space before it: digits stay single, so
# sums can be learned.
TOKEN_PATTERN = r"""'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


# ---------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """A tiktoken vocabulary with the three special tokens END, THINK and CLOSE."""

    begin: tuple[int, ...] = ()  # what stands before every document
    new_ids: tuple[int, ...] = ()  # tokens that the vocabulary's own model does not know
    json: str = ""  # its tokenizer.json, where it has one
    settings: dict = {}  # and the config.json beside it

    def __init__(self, base: tiktoken.Encoding):
        ranks = base._mergeable_ranks
        special = dict(base._special_tokens)
        for text in (END, THINK, CLOSE):
            special.setdefault(text, max([len(ranks) - 1, *ranks.values(), *special.values()]) + 1)
        self.encoding = tiktoken.Encoding(
            base.name, pat_str=base._pat_str, mergeable_ranks=ranks, special_tokens=special)
        self.end, self.think, self.close = (special[t] for t in (END, THINK, CLOSE))
        self.n_vocab = self.encoding.n_vocab

    @property
    def fingerprint(self) -> str:
        """Equal exactly where the same text becomes the same tokens, as far as the vocabulary
        says."""
        if self.json:
            return fingerprint([json.loads(self.json), self.end])
        e = self.encoding
        return fingerprint(
            [e._pat_str, {k.hex(): rank for k, rank in e._mergeable_ranks.items()},
             e._special_tokens]
        )

    @property
    def tags(self) -> tuple[int, int]:
        """The think tags: scorers leave them out of their softmax."""
        return self.think, self.close

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; a special token written out in the text is plain text too."""
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens included; bytes that are no UTF-8 become the
        replacement character."""
        return self.encoding.decode([int(t) for t in tokens])

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, with the tags, and the config.json beside it: what FileTokenizer
        reads, and an export."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.json, encoding="utf-8")
        (folder / "config.json").write_text(
            json.dumps(self.settings, indent=1) + "\n", encoding="utf-8")


class FileTokenizer(Tokenizer):
    """The tokenizer.json of a Hugging Face directory, as `Tokenizer`.

    END is the eos_token_id (the first, if several) of the config.json beside it, or the token
    `<|endoftext|>`. THINK and CLOSE are its tokens of that name; if it has none, they become new
    tokens after its last one, listed in `new_ids`.
    Raises ValueError if a file cannot be used, or nothing says what ends a text.
    """

    def __init__(self, folder: Path):
        file, beside = folder / "tokenizer.json", folder / "config.json"
        require(
            file.is_file(),
            f"{file} does not exist; a model of Hugging Face needs the tokenizer that it was trained with",
        )
        self.json = file.read_text(encoding="utf-8")
        try:
            self.settings = (
                json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {})
            base = HFTokenizer.from_str(self.json)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"{file} or {beside} cannot be read ({error}); copy it again") from error
        missing = [text for text in (THINK, CLOSE) if base.token_to_id(text) is None]
        if missing:
            base.add_tokens([AddedToken(text, normalized=False) for text in missing])
            self.json = base.to_str(pretty=True)
        self.new_ids = tuple(base.token_to_id(text) for text in missing)
        self.think, self.close = base.token_to_id(THINK), base.token_to_id(CLOSE)
        eos = self.settings.get("eos_token_id")
        self.end = ((eos[0] if isinstance(eos, list) else eos)
                    if eos not in (None, [])
                    else base.token_to_id(END))
        require(self.end is not None,
                f"{beside} has no eos_token_id and {file} no {END}; set eos_token_id to end a text")
        self.n_vocab = max(base.get_vocab().values()) + 1
        require(
            self.end < self.n_vocab,
            f"{beside}: eos_token_id ({self.end}) is none of the {self.n_vocab} tokens of {file}")
        content = json.loads(self.json)
        for token in content[
            "added_tokens"]:  # what `encode` shall read as text where a text spells it
            token["special"] = token["special"] or token["content"] in (END, THINK, CLOSE)
        self.file = HFTokenizer.from_str(json.dumps(content))
        self.file.encode_special_tokens = True
        framed, plain = self.file.encode("a").ids, self.encode("a")
        self.begin = tuple(framed[: framed.index(plain[0])])

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; a special token written out in the text is plain text too."""
        return self.file.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens included; ids beyond the vocabulary are left out."""
        return self.file.decode([int(t) for t in tokens], skip_special_tokens=False)


# The `tokenizers` library writes a byte as a printable character: the printable ones as themselves,
# others from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]


CHARACTER = {b: chr(b) for b in PRINTABLE}


CHARACTER |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}


def byte_pairs(model: BPE) -> HFTokenizer:
    """The library's tokenizer on bytes, split by TOKEN_PATTERN."""
    made = HFTokenizer(model)
    split = Split(Regex(TOKEN_PATTERN), behavior="isolated")
    made.pre_tokenizer = PreTokenizers([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = ByteLevelDecoder()
    return made


def train_tokenizer(texts: list[str], vocab_size: int) -> dict[str, int]:
    """Byte-pair ranks {hexadecimal bytes: rank} for tiktoken, trained by the `tokenizers`
    library."""
    trainable, byte_of = byte_pairs(BPE()), {c: b for b, c in CHARACTER.items()}
    trainer = BpeTrainer(
        vocab_size=vocab_size - 3, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    trainable.train_from_iterator(texts, trainer)
    by_id = sorted(trainable.get_vocab().items(), key=lambda item: item[1])
    return {bytes(byte_of[c] for c in token).hex(): rank for token, rank in by_id}


class CorpusTokenizer(Tokenizer):
    """What `train_tokenizer` gave, run by tiktoken. Its tokenizer.json makes the same tokens, and
    goes with every run."""

    def __init__(self, ranks: dict[str, int]):
        merges = {bytes.fromhex(k): rank for k, rank in ranks.items()}
        super().__init__(
            tiktoken.Encoding(
                "corpus", pat_str=TOKEN_PATTERN, mergeable_ranks=merges, special_tokens={})
        )
        # tiktoken joins any two neighbours that make a token, the lowest rank first: all of them
        # are merges.
        word = {token: "".join(CHARACTER[b] for b in token) for token in merges}
        pairs = [(t[:i], t[i:]) for t in sorted(merges, key=merges.get) for i in range(1, len(t))]
        pairs = [
            (word[left], word[right]) for left, right in pairs if left in merges and right in merges
        ]
        file = byte_pairs(
            BPE({word[t]: rank for t, rank in merges.items()}, pairs, ignore_merges=True))
        file.add_special_tokens(
            [AddedToken(text, normalized=False) for text in (END, THINK, CLOSE)])
        self.json, self.settings = file.to_str(pretty=True), {"eos_token_id": self.end}


def named_tokenizer(name: str) -> Tokenizer:
    """The tokenizer.json of a folder, or tiktoken's own vocabulary. Raises ValueError if there is
    none of that name."""
    if Path(name).is_dir():
        return FileTokenizer(Path(name))
    known = tiktoken.list_encoding_names()
    require(name in known,
            f"data.tokenizer ({name!r}) is unknown; choose 'corpus' or one of {', '.join(known)}, "
            "or give a folder that holds a tokenizer.json")
    try:
        return Tokenizer(tiktoken.get_encoding(name))
    except OSError as error:
        raise ValueError(
            f"data.tokenizer ({name!r}) must be downloaded once by tiktoken, and that failed ({type(error).__name__}); "
            "use 'corpus' when offline"
        ) from error
