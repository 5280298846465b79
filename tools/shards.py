"""Build and check shards of tokens, see text/shards.py: `python -m tools.shards build TEXTS --out
DIR`, `python -m tools.shards check DIR`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import tyro

from system.errors import exit_code, require
from text import shards
from text.sources import input_files, read_texts, require_key_read

PIECE = 50_000  # characters of the pieces that plain text is cut into: more than a long sequence


def run_build(inputs: tyro.conf.Positional[list[Path]], out: Path, tokenizer: str = "corpus",
              vocab_size: int | None = None, shard_tokens: int = 2**26,
              text_key: str = "text") -> None:
    """Write texts as shards.

    Args:
        inputs: Files and folders of them: *.jsonl, *.json, text (these also .gz, .zst), *.parquet.
        out: Folder to write.
        tokenizer: A folder with a tokenizer.json, or a name that tiktoken knows; "corpus" trains
            one on the texts.
        vocab_size: Size of the vocabulary that "corpus" trains; 32768, if left out.
        shard_tokens: Tokens of a shard; one shard is held in memory.
        text_key: What the text stands under in JSON and Parquet.
    """
    def texts() -> Iterator[str]:
        return (text for _, text in read_texts(files, text_key, PIECE))

    require(inputs, "no input is named; give files of text, or folders of them")
    require(vocab_size is None or tokenizer == "corpus", f"vocab-size ({vocab_size}) is for "
            f"tokenizer corpus, which is trained, and not for {tokenizer}; leave it out")
    vocab_size = 32768 if vocab_size is None else vocab_size
    found = [input_files(path, "input") for path in inputs]
    files = [file for own, _ in found for file in own]
    require_key_read(files, text_key)
    for note in (note for _, notes in found for note in notes):
        print(note)
    shards.require_new(out)
    made = shards.shard_tokenizer(tokenizer, vocab_size, texts())
    built = shards.build(texts(), out, made, tokenizer, shard_tokens)
    n_tokens, n_documents = (sum(s[k] for s in built) for k in ("n_tokens", "n_documents"))
    print(f"{out}: {n_documents:,} documents, {n_tokens:,} tokens in {len(built)} shards")


def run_check(folder: tyro.conf.Positional[Path]) -> None:
    """Read every byte of a folder of shards and compare checksums."""
    require(shards.is_shards(folder), f"{folder} holds no {shards.LIST}; give a folder that "
            "`python -m tools.shards build` wrote")
    found = shards.ShardSet(folder)
    found.check()
    print(f"{folder}: {len(found.shards)} shards are as they were written")


def main(argv: list[str] | None = None) -> int:
    """`python -m tools.shards`. Returns 0, or 2 if refused."""
    return exit_code(lambda: tyro.extras.subcommand_cli_from_dict(
        {"build": run_build, "check": run_check}, args=argv, prog="python -m tools.shards"))


if __name__ == "__main__":
    sys.exit(main())
