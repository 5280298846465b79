"""Four generated families of problems whose answers need several steps in a row, each with a worked
thought:

    chain    Let k = 3. Let b = k + 4. Let m = b - 6. Value of m?     k 3, b +4 7, m -6 1
    word     Tom has 3 apples. On Monday Tom buys 4. ...              start 3, Monday +4 7
    lookup   Ann calls Bob. Eve calls Ann. ... 2 calls from Eve?      1 Ann 2 Bob
    sum      Tens digit of 47 + 85 + 36?                              7 +5 12 +6 18, 1 +4 5 +8 13 +3 16

A family is one function in `FAMILIES`: to add one, write it and put it there.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from text.held_out import split_of

# ----------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """A question with one right answer, and the steps that lead to it."""

    family: str
    question: str
    steps: tuple[str, ...]
    answer: str

    @property
    def prompt(self) -> str:
        """What stands before the answer; the next token is the answer's first."""
        return f"{self.question}\nAnswer:"

    @property
    def thought(self) -> str:
        """The worked thought."""
        return "".join(self.steps)


NAMES = ("Ann", "Bob", "Eve", "Tom", "Kim", "Max", "Sue", "Leo", "Zoe", "Ian", "Amy", "Dan")


THINGS = ("apples", "books", "coins", "cards", "shells", "stamps")


DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")


GAINS = ("buys", "finds", "gets")


LOSSES = ("sells", "loses", "gives")


LETTERS = "abcdefghijkmnpqrstuvwxyz"


def chain_problem(rng: random.Random) -> Problem:
    """Variables defined one from another; every sum counts modulo 10, so that digits suffice."""
    names = rng.sample(LETTERS, rng.randint(3, 5))
    value = rng.randrange(10)
    lines, steps = [f"Modulo 10: {names[0]} = {value}."], [f" {names[0]} {value}"]
    for before, name in itertools.pairwise(names):
        sign, operand = rng.choice("+-"), rng.randint(1, 9)
        value = (value + operand if sign == "+" else value - operand) % 10
        lines.append(f"{before} to {name} {sign} {operand}.")
        steps.append(f" {name} {sign} {operand} {value}")
    return Problem("chain", f"{' '.join(lines)} Value of {names[-1]}?", tuple(steps), f" {value}")


def word_problem(rng: random.Random) -> Problem:
    """A stock of things that changes from day to day and stays within 0 to 9."""
    name, thing, value = rng.choice(NAMES), rng.choice(THINGS), rng.randrange(10)
    lines, steps = [f"Count: {name} has {value} {thing}."], [f" start {value}"]
    for day in DAYS[: rng.randint(2, 5)]:
        new = rng.choice([n for n in range(10) if n != value])
        sign, verb = ("+", rng.choice(GAINS)) if new > value else ("-", rng.choice(LOSSES))
        lines.append(f"On {day} {name} {verb} {abs(new - value)}.")
        steps.append(f" {day} {sign}{abs(new - value)} {new}")
        value = new
    return Problem(
        "word", f"{' '.join(lines)} How many {thing} has {name}?", tuple(steps), f" {value}")


def lookup_problem(rng: random.Random) -> Problem:
    """Who calls whom, in one ring; follow it some steps from a start."""
    ring = rng.sample(NAMES, rng.randint(5, 7))
    hops = rng.randint(2, 4)
    calls = [f"{a} calls {b}." for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
    rng.shuffle(calls)
    steps = tuple(f" {i} {ring[i - 1]} calls {ring[i]}" for i in range(1, hops + 1))
    return Problem("lookup", f"Ring: {' '.join(calls)} Start at {ring[0]}, {hops} calls on?", steps,
                   f" {ring[hops]}")


def sum_problem(rng: random.Random) -> Problem:
    """The tens digit of a sum of two-digit numbers: the units first, for their carry."""
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(2, 4))]
    total = numbers[0] % 10
    steps = [f" {total}"]
    for n in numbers[1:]:
        total += n % 10
        steps.append(f" +{n % 10} {total}")
    total //= 10
    steps.append(f", {total}")
    for n in numbers:
        total += n // 10
        steps.append(f" +{n // 10} {total}")
    question = f"Tens digit of {' + '.join(map(str, numbers))}?"
    return Problem("sum", question, tuple(steps), f" {total % 10}")


FAMILIES: dict[str, Callable[[random.Random], Problem]] = {
    "lookup": lookup_problem,
    "chain": chain_problem,
    "word": word_problem,
    "sum": sum_problem,
}


FILLER = (" Let me think.", " Hmm.", " This looks easy.", " I am not sure.",
          " It could be anything.", " One moment.", " Well, well.", " A good question.",
          " Let us see what comes next.", " I would guess.")


def draw_problem(
    rng: random.Random, split: str, held_out_percent: int, family: str | None = None) -> Problem:
    """A random problem of a split: drawn again until its checksum says so."""
    make = FAMILIES[family or rng.choice(list(FAMILIES))]
    while True:
        problem = make(rng)
        if split_of(problem.question, held_out_percent) == split:
            return problem


def held_out_problems(
    split: str, n_per_family: int, seed: int, held_out_percent: int) -> list[Problem]:
    """n different problems of each family, the same for every run with this seed."""
    problems = []
    for family in FAMILIES:
        rng = random.Random(f"problems-{split}-{family}-{seed}")
        found: dict[str, Problem] = {}
        while len(found) < n_per_family:
            problem = draw_problem(rng, split, held_out_percent, family)
            found[problem.question] = problem
        problems += found.values()
    return problems


def thought_for(problem: Problem, rng: random.Random, worked: float) -> str:
    """A worked thought with probability `worked`; otherwise, evenly, one that stops half-way, or
    filler."""
    if rng.random() < worked:
        return problem.thought
    if rng.random() < 0.5:
        return "".join(problem.steps[: rng.randint(1, len(problem.steps) - 1)])
    return filler(rng)


def filler(rng: random.Random) -> str:
    """A thought that helps nobody."""
    return "".join(rng.sample(FILLER, rng.randint(1, 2)))
