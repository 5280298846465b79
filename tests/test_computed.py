"""Documents with results: each result is worked out again here, from the text alone.

The checks read a document as a person would: they know nothing of how documents are made.
"""

import ast
import contextlib
import decimal
import doctest
import io
import random
import re
from collections import Counter

import pytest

from text import computed
from text.computed import GENERATED, KINDS, Computed, computed_examples, doctests, draw_computed
from text.held_out import SPLITS

# At least this share of a document's tokens are results, on the mean.
SHARES = {"ledger": 1 / 8, "session": 1 / 12, "trace": 1 / 6}


def drawn(kind: str, n: int = 1000) -> list[Computed]:
    rng = random.Random(f"test {kind}")
    return [KINDS[kind](rng) for _ in range(n)]


def results(document: Computed):
    """(text before, result, thought) of each result."""
    before = ""
    for text, thought in document.pieces:
        if thought:
            yield before, text, thought
        before += text


# ------------------------------------------------------------------------------------------------------------- results


def test_balances_of_ledgers_are_those_that_the_amounts_lead_to():
    for document in drawn("ledger"):
        head, *lines = document.text.split("\n")
        balance = {name: int(b) for name, b in re.findall(r"([A-Z][a-z]+) (\d)(?= |$)", head.removeprefix("Ledger modulo 10:"))}
        assert len(balance) == 3
        assert len(lines) >= 7
        for line in lines:
            giver, taker, amounts, *after = re.fullmatch(r"(\w+) to (\w+) ([\d ]+): (\w+) (\d) (\w+) (\d)", line).groups()
            moved = sum(map(int, amounts.split()))
            balance[giver] = (balance[giver] - moved) % 10
            balance[taker] = (balance[taker] + moved) % 10
            assert after == [giver, str(balance[giver]), taker, str(balance[taker])]


def run_examples(text: str) -> tuple[int, str]:
    """The number of examples of an interpreter's session with an answer, and what doctest says against them."""
    test = doctest.DocTestParser().get_doctest(text + "\n", {}, "document", None, None)
    complaints: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=complaints.append)
    return sum(bool(e.want) for e in test.examples), "".join(complaints)


def test_sessions_print_what_python_prints():
    for document in drawn("session"):
        assert run_examples(document.text) == (5, "")


def test_a_session_with_one_wrong_digit_would_be_noticed():
    document = drawn("session", 1)[0]
    assert document.text[-1] in "]0123456789"
    wrong = re.sub(r"\d(?=\]?$)", lambda found: str((int(found[0]) + 1) % 10), document.text)
    assert "Expected" in run_examples(wrong)[1]


def test_traces_are_what_their_programs_print():
    for document in drawn("trace"):
        program, shown = re.fullmatch(r"(.*print\([^\n]*\))\n(.*)", document.text, re.DOTALL).groups()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(program, {})
        assert printed.getvalue() == shown + "\n"


def test_no_two_rounds_of_a_trace_end_alike():
    for document in drawn("trace"):
        rounds = re.findall(r"^(?:[a-z] \d ?)+$", document.text, re.MULTILINE)
        assert len(set(rounds)) == len(rounds) >= 8


@pytest.mark.parametrize("kind", GENERATED)
def test_all_digits_that_are_printed_are_results_of_one_digit(kind):
    printed = {"ledger": r"[A-Z][a-z]+( \d)(?= [A-Z]|\n|$)", "session": r"^>>>.*\n(.*)", "trace": r"\b[a-z]( \d)(?= [a-z] |\n|$)"}
    for document in drawn(kind, 300):
        text = document.text.split("\n", 1)[1] if kind == "ledger" else document.text
        digits = re.findall(r"\d", " ".join(re.findall(printed[kind], text, re.MULTILINE)).split("lambda")[-1])
        assert [r.strip() for _, r, _ in results(document)] == [d for d in digits if kind != "session"] or kind == "session"
        assert all(re.fullmatch(r" ?\d", result) for _, result, _ in results(document))
