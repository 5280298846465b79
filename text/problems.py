"""Generated problems whose answers need several steps in a row, each with a worked thought.

    lookup   Ring: Max calls Bob. Bob calls Ann. ... Start at Max, 2 calls on?
             thought: 1 Max calls Bob 2 Bob calls Ann                          answer: Ann
    chain    Modulo 10: u = 5. u to t -2. t to e +8. Value of e?
             thought: u 5 u to t -2 5 -2 3 t to e +8 3 +8 1 e                  answer: 1
    word     Count: Bob has 9 books. On Monday Bob sells 5. ... How many books has Bob?
             thought: start 9 Monday -5 4 Tuesday +1 5                         answer: 5
    sum      Tens digit of 85 + 79?
             thought: 5 +9 14, 1 +8 9 +7 16                                    answer: 6

A family is a function from a random generator to a `Problem`, and its entry in `FAMILIES`: batches,
figures and samples read that table, and the base reads the first of them alone at first. Tables of
other people's problems come from problem_sources.py (`data.problems`).

Twins, questions that differ in names alone (sums: in order), share a canonical form, and with it
the split. Rings are alike but for their order, so those that differ in it are no twins. Different
forms there are: lookup 17,640, chain 1.1 million, word .66 million, sum 3.0 million.
"""

import functools
import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from system.config import RLPConfig
from system.errors import require
from text.held_out import draw_of_split


@dataclass(frozen=True)
class Problem:
    """A question with one right answer, and the steps that lead to it.

    Each step and the answer begin with a space or a sign: they are put together as they are.
    No steps: nobody wrote a thought. canonical: what twins have in common, for the split; by
    default the question itself. scorer: gives 1 to what is right, if that is not the answer alone.
    Raises ValueError for one step: a thought must be able to stop half-way.
    """

    family: str
    question: str
    steps: tuple[str, ...]
    answer: str
    canonical: str = ""
    scorer: Callable[[str], float] | None = field(default=None, compare=False)

    def __post_init__(self):
        require(len(self.steps) != 1, f"problem family {self.family!r}: {self.question!r} has "
                f"{len(self.steps)} steps; give it at least two, or none")
        object.__setattr__(self, "canonical", self.canonical or self.question)

    @property
    def prompt(self) -> str:
        """What stands before the answer; the next token is the answer's first."""
        return f"{self.question}\nAnswer:"

    @property
    def thought(self) -> str | None:
        """The worked thought, if there is one."""
        return "".join(self.steps) or None


NAMES = ("Ann", "Bob", "Eve", "Tom", "Kim", "Max", "Sue", "Leo", "Zoe", "Ian", "Amy", "Dan")
THINGS = ("apples", "books", "coins", "cards", "shells", "stamps")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
GAINS, LOSSES = ("buys", "finds", "gets"), ("sells", "loses", "gives")
LETTERS = "abcdefghijkmnpqrstuvwxyz"
FILLER = (" Let me think.", " Hmm.", " This looks easy.", " I am not sure.",
          " It could be anything.", " One moment.", " Well, well.", " A good question.",
          " Let us see what comes next.", " I would guess.")


def chain_problem(rng: random.Random, more: int = 0, aside: bool = False) -> Problem:
    """Variables defined one from another; every sum counts modulo 10, so that digits suffice.
    The last step names what is asked for once more: whether to stop is easiest told at a name.
    Aside: the chain goes on for two variables after the one that is asked for."""
    n = 5 + more if more else rng.randint(3, 5)
    names = rng.sample(LETTERS, n + 2 * aside)
    value = answer = rng.randrange(10)
    lines, steps = [f"Modulo 10: {names[0]} = {value}."], [f" {names[0]} {value}"]
    canonical = str(value)
    for before, name in itertools.pairwise(names):
        sign, operand = rng.choice("+-"), rng.randint(1, 9)
        line, old = f"{before} to {name} {sign}{operand}", value
        value = (value + operand if sign == "+" else value - operand) % 10
        if len(lines) < n:  # the line leads to what is asked for
            steps.append(f" {line} {old} {sign}{operand} {value}")
            answer = value
        lines.append(f"{line}.")
        canonical += f" {sign}{operand}"
    steps[-1] += f" {names[n - 1]}"
    question = f"{' '.join(lines)} Value of {names[n - 1]}?"
    return Problem("chain", question, tuple(steps), f" {answer}", canonical)


def word_problem(rng: random.Random, more: int = 0, aside: bool = False) -> Problem:
    """A stock of things that changes from day to day and stays within 0 to 9. Aside: somebody else
    buys and sells too."""
    name, thing, value = rng.choice(NAMES), rng.choice(THINGS), rng.randrange(10)
    lines, steps = [f"Count: {name} has {value} {thing}."], [f" start {value}"]
    n_days = 5 + more if more else rng.randint(2, 5)
    for day in (DAYS * 2)[:n_days]:
        new = rng.choice([n for n in range(10) if n != value])
        sign, verb = ("+", rng.choice(GAINS)) if new > value else ("-", rng.choice(LOSSES))
        lines.append(f"On {day} {name} {verb} {abs(new - value)}.")
        if aside:
            other, verb = rng.choice([a for a in NAMES if a != name]), rng.choice(GAINS + LOSSES)
            lines.append(f"On {day} {other} {verb} {rng.randint(1, 9)}.")
        steps.append(f" {day} {sign}{abs(new - value)} {new}")
        value = new
    question = f"{' '.join(lines)} How many {thing} has {name}?"
    return Problem("word", question, tuple(steps), f" {value}", "".join(steps))


def lookup_problem(rng: random.Random, more: int = 0, aside: bool = False) -> Problem:
    """Who calls whom, in one ring; follow it some steps from a start. Aside: there is another ring.
    """
    n = rng.randint(5, 7)
    names = rng.sample(NAMES, n + 4 * aside)
    hops = 4 + more if more else rng.randint(2, 4)
    ring, other = names[:n], names[n:]
    calls = [f"{a} calls {b}." for those in (ring, other)
             for a, b in zip(those, those[1:] + those[:1], strict=True)]
    rng.shuffle(calls)
    path = [ring[i % n] for i in range(hops + 1)]
    steps = tuple(f" {i} {path[i - 1]} calls {path[i]}" for i in range(1, hops + 1))
    question = f"Ring: {' '.join(calls)} Start at {ring[0]}, {hops} calls on?"
    canonical = re.sub("[A-Z][a-z]+", lambda found: str(names.index(found[0])), " ".join(calls))
    return Problem("lookup", question, steps, f" {path[hops]}", f"{canonical} {hops}")


def sum_problem(rng: random.Random, more: int = 0) -> Problem:
    """The tens digit of a sum of two-digit numbers: the units first, for their carry."""
    n = 4 + more if more else rng.randint(2, 4)
    numbers = [rng.randint(10, 99) for _ in range(n)]
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
    canonical = " + ".join(map(str, sorted(numbers)))
    return Problem("sum", question, tuple(steps), f" {total % 10}", canonical)


Families = dict[str, Callable[[random.Random], Problem]]
FAMILIES: Families = {
    "lookup": lookup_problem, "chain": chain_problem, "sum": sum_problem, "word": word_problem}

# The same families, to be measured alone: as trained, with more steps than were ever trained, with
# lines that lead nowhere.
LEVELS: dict[str, Families] = {
    "as trained": FAMILIES,
    **{f"{k} more": {name: functools.partial(family, more=k) for name, family in FAMILIES.items()}
       for k in (1, 2, 3)},
    "distractors": {name: functools.partial(family, aside=True)
                    for name, family in FAMILIES.items() if name != "sum"}}


def unworked(c: RLPConfig) -> list[str]:
    """The levels that are read although nobody shows how to work them."""
    return [f"{k} more" for k in range(1, c.more_steps + 1)] + ["distractors"] * c.distractors


def any_level(families: Families, others: Sequence[str], rng: random.Random) -> Families:
    """The families as they are or, as often as that, at any one of other levels."""
    k = rng.randint(0, len(others)) if others else 0
    return LEVELS[others[k - 1]] if k else families


def draw_problem(
    rng: random.Random, split: str, held_out_percent: int, families: Families,
    family: str | None = None) -> Problem:
    """A random problem of a split, of any family or of one (see `draw_of_split`)."""
    name = family or rng.choice(list(families))
    return draw_of_split(lambda: families[name](rng), split, held_out_percent,
                         f"problem family {name!r} makes no problem", "questions")


def held_out_problems(
    split: str, n_per_family: int, seed: int, held_out_percent: int, families: Families
) -> list[Problem]:
    """n problems of each family, no two of them twins, the same for every run with this seed.
    Raises ValueError if 10,000 draws in a row make none that is new."""
    problems = []
    for family in families:
        rng = random.Random(f"problems-{split}-{family}-{seed}")
        found: dict[str, Problem] = {}
        n_idle = 0
        while len(found) < n_per_family:
            problem = draw_problem(rng, split, held_out_percent, families, family)
            n_idle = n_idle + 1 if problem.canonical in found else 0
            require(n_idle < 10_000, f"problem family {family!r} makes only {len(found)} different "
                    f"problems of the {split} split, not {n_per_family}; let it make more, or ask "
                    "for fewer (eval.problems_per_family)")
            found[problem.canonical] = problem
        problems += found.values()
    return problems


def tokenizer_examples(held_out_percent: int, families: Families) -> list[str]:
    """Enough training problems for their words to become tokens of a tokenizer trained on them."""
    rng = random.Random("tokenizer")
    problems = [draw_problem(rng, "train", held_out_percent, families) for _ in range(8000)]
    return [p.prompt + (p.thought or "") + p.answer for p in problems] + list(FILLER) * 200


def thought_for(problem: Problem, rng: random.Random, worked: float) -> str:
    """A worked thought with probability `worked`; else, evenly, one that stops early, or filler.
    Where nobody wrote a thought, filler."""
    if not problem.thought:
        return filler(rng)
    steps = some_of(problem.steps, rng, worked)
    return filler(rng) if steps is None else "".join(steps)


def some_of(steps: Sequence, rng: random.Random, worked: float) -> Sequence | None:
    """All steps with probability `worked`; else, evenly, the first ones, or None, for filler."""
    if rng.random() < worked:
        return steps
    return steps[: rng.randint(1, len(steps) - 1)] if rng.random() < 0.5 else None


def filler(rng: random.Random) -> str:
    """A thought that says nothing of the problem."""
    return "".join(rng.sample(FILLER, rng.randint(1, 2)))
