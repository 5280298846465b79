"""Talk to a trained model and see its thought: `python generate.py RUN "prompt"`."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import tyro
from torch import Tensor

from elastic import load_family, widths_for
from model import HybridLM
from nested import Widths, hand_over, submodel
from system.config import HEAT, SEED, ModelConfig, RLPConfig
from system.errors import exit_code, require
from system.rundir import load_model
from text.tokenizer import Tokenizer, valid
from thoughts import Prefix, show_thought


def talk(run: tyro.conf.Positional[Path], prompt: tyro.conf.Positional[str],
         temperature: float | None = None, seed: int = 0, thought_len: int | None = None,
         back: int = 0, budget: tuple[float, ...] = (), read: float | None = None) -> None:
    """Talk to a trained model and see its thought.

    Args:
        run: Folder of a run, such as runs/rlp-cpu-seed0, or a Hugging Face directory.
        prompt: Text to go on from; for a problem, end it with 'Answer:'.
        temperature: Of the thought; 0 is greedy. The run's own, if left out.
        seed: Of the sampling.
        thought_len: Longest thought, in tokens. The run's own, if left out.
        back: Tokens of the prompt that the thought stands before, as rlp.back: 2 suits text.
        budget: Sizes of an elastic run to answer with, in turn, such as 1 0.5; none: all of it.
        read: Size that reads the prompt; those of budget go on from its states.
    """
    require(prompt, f"prompt ({prompt!r}) is empty, and a thought needs a token before it; give "
            "some text")
    prompt = valid(prompt)
    require(thought_len is None or thought_len >= 1,
            f"thought-len ({thought_len}) must be at least 1: the closing tag is a token of it")
    require(temperature is None or temperature == 0 or HEAT.holds(temperature),
            f"temperature ({temperature}) must be 0 (greedy), or {HEAT.text.removeprefix('must ')}")
    require(SEED.holds(seed), f"seed ({seed}) {SEED.text}")
    require(back >= 0, f"back ({back}) must be 0 (the thought stands at the end) or more")
    require(read is None or budget, f"read ({read}) needs budget: the sizes that go on")

    def answer(model: HybridLM, tokenizer: Tokenizer, c: RLPConfig,
               reads: Callable[[dict[str, Tensor]], Prefix] | None = None) -> str:
        heat = c.temperature if temperature is None else temperature
        c = replace(c, temperature=heat, thought_len=thought_len or c.thought_len)
        return prompt + show_thought(model, tokenizer, prompt, c, seed, back, reads)

    if not budget:
        print(answer(*load_model(run)))
        return
    family, router, tokenizer, config = load_family(run)
    sizes = {b: widths_for(router, b) for b in (*budget, *([read] if read is not None else []))}
    reader = submodel(family, sizes[read]) if read is not None else None
    for b in budget:  # each size is known before one answers
        small = submodel(family, sizes[b])  # in place of the one before: one at a time in memory
        reads = reader and partial(
            handed_over, family.config, (reader, sizes[read]), (small, sizes[b]))
        print(f"[{b:g}] {answer(small, tokenizer, config.rlp, reads)}")


def handed_over(family: ModelConfig, first: tuple[HybridLM, Widths],
                second: tuple[HybridLM, Widths], batch: dict[str, Tensor]) -> Prefix:
    """A prompt that one size has read but for the last token, or `back` tokens: those the other
    reads, from states that are handed over (nested.hand_over), and goes on."""
    context_BT, back = batch["context_BT"], int(batch["back_B"])
    n = max(1, back)
    require(context_BT.shape[1] > n, f"read needs a prompt of more than {n} tokens: the size that "
            "goes on reads the last")
    _, cache = first[0](context_BT[:, :-n])
    early = hand_over(cache, family, first[1], second[1])
    hidden_BTD, cache = second[0](context_BT[:, -n:], early)
    return Prefix(hidden_BTD[:, -1], cache, early if back else cache)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 if refused."""
    return exit_code(lambda: tyro.cli(talk, args=argv, prog="generate.py"))


if __name__ == "__main__":
    sys.exit(main())
