"""Talk to a trained model and see its thought: `python generate.py RUN "prompt"`."""

import sys
from dataclasses import replace
from pathlib import Path

import tyro

from elastic import load_family
from model import HybridLM
from nested import submodel
from system.config import RLPConfig
from system.errors import exit_code, require
from system.rundir import load_model
from text.tokenizer import Tokenizer, valid
from thoughts import show_thought


def talk(run: tyro.conf.Positional[Path], prompt: tyro.conf.Positional[str],
         temperature: float | None = None, seed: int = 0, thought_len: int | None = None,
         back: int = 0, budget: tuple[float, ...] = ()) -> None:
    """Talk to a trained model and see its thought.

    Args:
        run: Folder of a run, such as runs/rlp-cpu-seed0, or a Hugging Face directory.
        prompt: Text to go on from; for a problem, end it with 'Answer:'.
        temperature: Of the thought; 0 is greedy. The run's own, if left out.
        seed: Of the sampling.
        thought_len: Longest thought, in tokens. The run's own, if left out.
        back: Tokens of the prompt that the thought stands before, as rlp.back: 2 suits text.
        budget: Sizes of an elastic run to answer with, in turn, such as 1 0.5; none: all of it.
    """
    require(prompt, f"prompt ({prompt!r}) is empty, and a thought needs a token before it; give "
            "some text")
    prompt = valid(prompt)
    require(thought_len is None or thought_len >= 1,
            f"thought-len ({thought_len}) must be at least 1: the closing tag is a token of it")
    require(temperature is None or temperature >= 0,
            f"temperature ({temperature}) must be 0 (greedy) or more")
    require(back >= 0, f"back ({back}) must be 0 (the thought stands at the end) or more")

    def answer(model: HybridLM, tokenizer: Tokenizer, c: RLPConfig) -> str:
        heat = c.temperature if temperature is None else temperature
        c = replace(c, temperature=heat, thought_len=thought_len or c.thought_len)
        return prompt + show_thought(model, tokenizer, prompt, c, seed, back)

    if not budget:
        print(answer(*load_model(run)))
        return
    family, router, tokenizer, config = load_family(run)
    for b, widths in [(b, router.choose(b)) for b in budget]:  # each is known before one answers
        small = submodel(family, widths)  # in place of the one before: one at a time in memory
        print(f"[{b:g}] {answer(small, tokenizer, config.rlp)}")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 if refused."""
    return exit_code(lambda: tyro.cli(talk, args=argv, prog="generate.py"))


if __name__ == "__main__":
    sys.exit(main())
