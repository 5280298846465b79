"""Text to token ids and back, with three special tokens: what ends a document, and the think tags.

Three kinds, one interface: byte pairs trained on the corpus itself (`CorpusTokenizer`), the
tokenizer.json of a Hugging Face directory (`FileTokenizer`), and one that tiktoken knows by name
(`Tokenizer`). The first two are tokenizer.json files, which a run keeps.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import tiktoken
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from system.errors import require
from system.files import fingerprint, read_json, write_json, write_whole

END, THINK, CLOSE = "<|endoftext|>", "<think>", "</think>"
LONGEST = 10_000  # characters in a row, all space or none: more may overflow a tokenizer's stack
RUNS = re.compile(rf"((?<!\s)\s{{{LONGEST},}}|(?<!\S)\S{{{LONGEST},}})")


def valid(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which no UTF-8 can hold: what JSON
    may spell, and what a command line becomes that is not UTF-8."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def parts(text: str) -> Iterator[str]:
    """The valid text, in parts that any tokenizer takes: cut inside very long runs alone."""
    for i, part in enumerate(RUNS.split(valid(text))):
        size = LONGEST if i % 2 else max(1, len(part))
        yield from (part[at : at + size] for at in range(0, len(part), size))


class Tokenizer:
    """A tiktoken vocabulary with the three special tokens END, THINK and CLOSE."""

    begin: tuple[int, ...] = ()  # what stands before every document
    new_ids: tuple[int, ...] = ()  # tokens that the vocabulary's own model does not know
    json: str = ""  # its tokenizer.json, where it has one
    settings: dict = {}  # and the config.json beside it

    def __init__(self, base: tiktoken.Encoding):
        ranks, special = base._mergeable_ranks, dict(base._special_tokens)
        for text in (END, THINK, CLOSE):
            special.setdefault(text, max([*ranks.values(), *special.values()]) + 1)
        self.encoding = tiktoken.Encoding(
            base.name, pat_str=base._pat_str, mergeable_ranks=ranks, special_tokens=special)
        self.end, self.think, self.close = (special[t] for t in (END, THINK, CLOSE))
        self.ends, self.n_vocab = (self.end,), self.encoding.n_vocab
        self.known = {*ranks.values(), *special.values()}

    @property
    def fingerprint(self) -> str:
        """Equal where the same text becomes the same tokens, as far as the vocabulary says."""
        if self.json:
            return fingerprint([json.loads(self.json), self.end])
        e = self.encoding
        ranks = {k.hex(): rank for k, rank in e._mergeable_ranks.items()}
        return fingerprint([e._pat_str, ranks, e._special_tokens])

    @property
    def tags(self) -> tuple[int, int]:
        """The think tags: scorers leave them out of their softmax."""
        return self.think, self.close

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; a special token written out in the text is plain text too."""
        return [t for part in parts(text) for t in self.encode_part(part)]

    def encode_part(self, text: str) -> list[int]:
        """Token ids of valid text without very long runs."""
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens included; what is no UTF-8 becomes U+FFFD. Ids beyond
        the vocabulary, for which a model may have rows, are left out."""
        return self.encoding.decode([t for t in map(int, tokens) if t in self.known])

    def save(self, folder: Path) -> None:
        """Write what FileTokenizer reads: tokenizer.json, with the tags, and its config.json."""
        write_whole(folder / "tokenizer.json", lambda f: f.write(self.json.encode()))
        write_json(folder / "config.json", self.settings)


class FileTokenizer(Tokenizer):
    """The tokenizer.json of a Hugging Face directory, run by the `tokenizers` library.

    END is the first eos_token_id of the config.json or generation_config.json beside it, or the
    token `<|endoftext|>`; `ends` are all of them. Think tags that it lacks become tokens after its
    last one, listed in `new_ids`. Truncation and padding are switched off: they would cut every
    text, and fill it up.
    Raises ValueError if a file cannot be used, or nothing says what ends a text.
    """

    def __init__(self, folder: Path):
        file, (beside, more) = folder / "tokenizer.json", (
            folder / name for name in ("config.json", "generation_config.json"))
        require(file.is_file(), f"{file} does not exist; a model of Hugging Face needs the "
                "tokenizer that it was trained with")
        # 1. the files
        content, self.json = read_json(file), file.read_text(encoding="utf-8")
        self.settings, generation = (read_json(f) if f.is_file() else {} for f in (beside, more))
        if content.get("truncation") or content.get("padding"):
            self.json = json.dumps(content | {"truncation": None, "padding": None}, indent=2)
        try:
            base = HFTokenizer.from_str(self.json)
        except Exception as e:  # the library raises nothing narrower
            raise ValueError(f"{file} cannot be read ({e}); copy it again") from e
        # 2. the tags
        missing = [text for text in (THINK, CLOSE) if base.token_to_id(text) is None]
        if missing:
            base.add_tokens([AddedToken(text, normalized=False) for text in missing])
            self.json = base.to_str(pretty=True)
        self.new_ids = tuple(base.token_to_id(text) for text in missing)
        self.think, self.close = base.token_to_id(THINK), base.token_to_id(CLOSE)
        self.n_vocab = max(base.get_vocab().values()) + 1
        # 3. what ends a text
        ends: list[int] = []
        for source, said in ((beside, self.settings), (more, generation)):
            eos = said.get("eos_token_id")
            for one in eos if isinstance(eos, list) else [eos] * (eos is not None):
                require(type(one) is int and 0 <= one < self.n_vocab, f"{source}: eos_token_id "
                        f"({one!r:.60}) is none of the {self.n_vocab} tokens of {file}; mend it")
                if one not in ends:
                    ends.append(one)
        if ends:  # a copy has no generation_config.json
            self.settings = self.settings | {"eos_token_id": ends if len(ends) > 1 else ends[0]}
        ends = ends or [i for i in [base.token_to_id(END)] if i is not None]
        require(ends,
                f"{beside} has no eos_token_id and {file} no {END}; set eos_token_id to end a text")
        self.end, self.ends = ends[0], tuple(ends)
        # 4. what encodes: where a text spells one of the three or a special token, it is text
        content = json.loads(self.json)
        for token in content.get("added_tokens", []):
            token["special"] = token["special"] or token["content"] in (END, THINK, CLOSE)
        self.file = self.going_on = _plain(content)
        #    Some put a space before every text; none belongs before what goes on with one.
        going_on = content | {name: _without_space(content.get(name))
                              for name in ("normalizer", "pre_tokenizer")}
        if going_on != content:
            self.going_on = _plain(going_on)
        # 5. what it puts before every text: all that stands before the first token of "a"
        try:
            framed, plain = self.file.encode("a").ids, self.encode("a")
        except Exception:  # as above: a library that lacks a token says so in many ways
            plain = []
        require(plain, f"{file} has no token for the letter a, nor one for what it does not know: "
                "text would be lost; use another tokenizer")
        self.begin = tuple(framed[: framed.index(plain[0])])
        for text in (THINK, CLOSE, END):
            require(base.token_to_id(text) not in self.encode(text), f"{file} makes the control "
                    f"token of a {text} that stands in a text: it is an ordinary entry of the "
                    "vocabulary; move it to added_tokens alone")

    def encode_part(self, text: str) -> list[int]:
        """Token ids of valid text without very long runs."""
        file = self.going_on if text[:1].isspace() else self.file
        return file.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens included; ids beyond the vocabulary are left out."""
        return self.file.decode([int(t) for t in tokens], skip_special_tokens=False)


def _plain(content: dict) -> HFTokenizer:
    """What a tokenizer.json says, but to it a special token that a text spells out is text."""
    made = HFTokenizer.from_str(json.dumps(content))
    made.encode_special_tokens = True
    return made


def _without_space(step: dict | None) -> dict | None:
    """A step of a tokenizer.json, without the space that it puts before every text."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        (name, steps), = ((name, steps) for name, steps in step.items() if name != "type")
        return step | {name: [kept for one in steps if (kept := _without_space(one))]}
    without = {"prepend_scheme": "never", "add_prefix_space": False}
    return step | {name: value for name, value in without.items() if name in step}


class CorpusTokenizer(Tokenizer):
    """Byte pairs trained on a corpus: a tokenizer.json, run by tiktoken in a fifth of the time.

    Why the tokens are the same: tiktoken joins any two neighbours that make a token, the file only
    the pairs that were trained. But between two places that no pair crosses, text is joined in one
    way only, in training as here, so neighbours that make a token are such a pair.
    """

    # A word, a digit or a run of signs, after at most one space. Single digits make sums learnable.
    pattern = r"""'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

    def __init__(self, text: str):
        # In the file a byte is a character: printable ones are themselves, the other 68 U+0100 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
        ranks = {bytes(byte_of[c] for c in token): rank
                 for token, rank in json.loads(text)["model"]["vocab"].items()}
        super().__init__(tiktoken.Encoding(
            "corpus", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}))
        self.json, self.settings = text, {"eos_token_id": self.end}

    @classmethod
    def train(cls, texts: list[str], vocab_size: int) -> "CorpusTokenizer":
        """Of at most vocab_size tokens, the three special ones included."""
        made = HFTokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(cls.pattern), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        made.decoder = decoders.ByteLevel()
        made.train_from_iterator((p for t in texts for p in parts(t)), trainers.BpeTrainer(
            vocab_size=vocab_size - 3, initial_alphabet=to_bytes.alphabet(), show_progress=False))
        made.add_special_tokens([AddedToken(t, normalized=False) for t in (END, THINK, CLOSE)])
        return cls(made.to_str(pretty=True))


def named_tokenizer(name: str) -> Tokenizer:
    """A folder's tokenizer.json, or tiktoken's vocabulary. Raises ValueError if there is none."""
    if Path(name).is_dir():
        return FileTokenizer(Path(name))
    known = tiktoken.list_encoding_names()
    require(name in known, f"data.tokenizer ({name!r}) is unknown; choose 'corpus' or one of "
            f"{', '.join(known)}, or give a folder that holds a tokenizer.json")
    try:
        return Tokenizer(tiktoken.get_encoding(name))
    except OSError as error:
        raise ValueError(f"data.tokenizer ({name!r}) must be downloaded once by tiktoken, and that "
                         f"failed ({type(error).__name__}); use 'corpus' when offline") from error
