"""Documents in which some tokens follow, in several steps, from what stands before them.

RLP puts a thought before a random token of a document. Here many of those tokens cannot be guessed
without work, and a short worked thought gives them away:

    ledger   Ledger modulo 10, balances last: 4
             7 5 6                                  thought: " 4 +7 1 +5 6"
    session  >>> f = lambda p, q: (p - q + 9) % 10
             >>> x = [4, 1, 8, 3, 0, 9, 2, 6]
             >>> for n in x: print(n, f(n, 7))
             4 6                                    thought: " 4 -7 7 +9 6"
    trace    a program that changes a variable and prints it in each round of a loop, and what it
             prints

About one token in 5 of a ledger, in 8 of a session and in 7 of a trace is a result. Every thought
has two steps or more. A session's and a trace's results are what Python gave for that very text.

A kind is a function from a random generator to a `Computed`, and its entry in `GENERATED`.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from text.held_out import draw_of_split
from text.problems import LETTERS


@dataclass(frozen=True)
class Computed:
    """A document in pieces; a piece with a thought is a result, of one digit.

    pieces: (text, thought); the thought, where there is one, stands before its piece and ends in
        the same digit. The pieces' tokens are those of the whole text.
    canonical: what renamed twins have in common, for the split; by default the text itself.
    """

    kind: str
    pieces: tuple[tuple[str, str], ...]
    canonical: str = ""

    def __post_init__(self):
        object.__setattr__(self, "canonical", self.canonical or self.text)

    @property
    def text(self) -> str:
        """The document, without thoughts."""
        return join(self.pieces)


def join(pieces: Iterable[tuple[str, str]]) -> str:
    """The texts of the pieces in a row."""
    return "".join(text for text, _ in pieces)


def worked(start: int, changes: list[str]) -> str:
    """A start, then each change (such as -5) with the value that it leads to, modulo 10."""
    thought = f" {start}"
    for change in changes:
        start = (start + int(change)) % 10
        thought += f" {change} {start}"
    return thought


def renamed(text: str, names: list[str]) -> str:
    """The text with the n-th of the names, in order of appearance, written as n in brackets."""
    new: dict[str, str] = {}
    return re.sub("[A-Za-z]+", lambda word: new.setdefault(word[0], f"<{len(new)}>")
                  if word[0] in names else word[0], text)


def ledger(rng: random.Random) -> Computed:
    """Two payments in each line, and the balance after them."""
    balance = rng.randrange(10)
    pieces = [(f"Ledger modulo 10, balances last: {balance}", "")]
    for _ in range(rng.randint(14, 22)):
        payments = rng.choices(range(1, 10), k=2)
        thought = worked(balance, [f"+{n}" for n in payments])
        balance = int(thought[-1])
        pieces += [(f"\n{' '.join(map(str, payments))}", ""), (f" {balance}", thought)]
    return Computed("ledger", tuple(pieces))


@dataclass(frozen=True)
class Sum:
    """`(p - q + 3) % 10` of any two numbers: the sign of the second, and a change (such as +3)."""

    sign: str
    change: str

    def of(self, first: str, second: str) -> str:
        """The expression in Python."""
        return f"({first} {self.sign} {second} {self.change[0]} {self.change[1]}) % 10"

    def thought(self, first: int, second: int) -> str:
        """The way to its value."""
        return worked(first, [f"{self.sign}{second}", self.change])


def draw_sum(rng: random.Random) -> Sum:
    """One of 36 sums."""
    return Sum(rng.choice("+-"), f"{rng.choice('+-')}{rng.randint(1, 9)}")


def session(rng: random.Random) -> Computed:
    """An interpreter's session: a function, a list of numbers, and two questions to each."""
    f, p, q, many, item = names = rng.sample(LETTERS, 5)
    sum_, numbers = draw_sum(rng), rng.sample(range(10), 8)
    lines = [f"{f} = lambda {p}, {q}: {sum_.of(p, q)}", f"{many} = {numbers}"]
    values: dict = {}
    exec("\n".join(lines), values)
    pieces = [("\n".join(f">>> {line}" for line in lines), "")]
    for x in rng.sample(range(10), 2):
        called = f"{f}({item}, {x})"
        pieces.append((f"\n>>> for {item} in {many}: print({item}, {called})", ""))
        for n in numbers:  # the answers are Python's
            answer = eval(called, values | {item: n})
            pieces += [(f"\n{n}", ""), (f" {answer}", sum_.thought(n, x))]
    return Computed("session", tuple(pieces), renamed(join(pieces), names))


def trace(rng: random.Random) -> Computed:
    """A loop over numbers, and what it prints: each of them, and a variable that it changes."""
    name, item = names = rng.sample(LETTERS, 2)
    sum_, value, numbers = draw_sum(rng), rng.randrange(10), rng.choices(range(10), k=16)
    program = (f"{name} = {value}\nfor {item} in {', '.join(map(str, numbers))}:\n"
               f"    {name} = {sum_.of(name, item)}\n    print({item}, {name})")
    shown: list[tuple[int, int]] = []
    exec(program, {"print": lambda *row: shown.append(row)})
    pieces = [(program, "")]
    for n, after in shown:
        pieces += [(f"\n{n}", ""), (f" {after}", sum_.thought(value, n))]
        value = after
    return Computed("trace", tuple(pieces), renamed(join(pieces), names))


GENERATED: dict[str, Callable[[random.Random], Computed]] = {
    "ledger": ledger, "session": session, "trace": trace}


def draw_computed(rng: random.Random, split: str, held_out_percent: int,
                  kind: str | None = None) -> Computed:
    """A random document of a split, of any kind or of one (see `draw_of_split`)."""
    name = kind or rng.choice(list(GENERATED))
    return draw_of_split(
        lambda: GENERATED[name](rng), split, held_out_percent,
        f"computed documents of the kind {name!r}: none", "ones, or raise data.held_out_percent")


def computed_examples(held_out_percent: int) -> list[str]:
    """Enough training documents, with thoughts, for their words to become tokens."""
    rng = random.Random("computed examples")
    documents = [draw_computed(rng, "train", held_out_percent) for _ in range(1000)]
    return ["".join(thought + text for text, thought in d.pieces) for d in documents]
