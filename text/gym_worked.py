"""Three tasks of reasoning-gym with a worked thought each, for data.problems.

The questions, answers and scorers are the package's; the thoughts are ours, written from its
metadata. Numbers are kept small, so that a thought has at most some 40 tokens.
"""

import reasoning_gym

from text.problems import Problem

SUMS = reasoning_gym.create_dataset("chain_sum", seed=0, min_terms=2, max_terms=4, min_digits=1,
                                    max_digits=2)
PAIRS = reasoning_gym.create_dataset("gcd", seed=0, max_numbers=2, max_value=100)
TEXTS = reasoning_gym.create_dataset("letter_counting", seed=0, max_words=10)


def _made(tasks, rng, thought):
    entry = tasks[rng.randrange(2**31)]
    return Problem("", entry["question"], tuple(thought(entry["metadata"])),
                   f" {entry['answer']}",
                   scorer=lambda said: tasks.score_answer(answer=said, entry=entry))


def chain_sum_problem(rng):
    """15 - 43 - 75: " 15", " - 43 = -28", " - 75 = -103"."""
    def thought(found):
        first, *rest = found["expression"].split()
        total, steps = int(first), [f" {first}"]
        for sign, term in zip(rest[::2], rest[1::2], strict=True):
            total += int(sign + term)
            steps.append(f" {sign} {term} = {total}")
        return steps
    return _made(SUMS, rng, thought)


def gcd_problem(rng):
    """Euclid: 33, 78: " 78 mod 33 = 12", " 33 mod 12 = 9", " 12 mod 9 = 3", " 9 mod 3 = 0"."""
    def thought(found):
        small, large = sorted(found["numbers"])
        steps = [f" {large}, {small}"]
        while small:
            steps.append(f" {large} mod {small} = {large % small}")
            large, small = small, large % small
        return steps
    return _made(PAIRS, rng, thought)


def letter_counting_problem(rng):
    """The words that hold the letter, each with the number counted so far: " hundred 1"."""
    def thought(found):
        total, steps = 0, [f" {found['target_letter']}"]
        for word in found["span"]:
            count = word.lower().count(found["target_letter"].lower())
            total += count
            if count:
                steps.append(f" {word} {total}")
        return steps if len(steps) > 1 else [*steps, " 0"]
    return _made(TEXTS, rng, thought)
