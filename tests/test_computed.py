"""Documents with results: each result is worked out again here, from the text alone.

The checks read a document as a person would: they know nothing of how documents are made.
"""

import contextlib
import doctest
import io
import itertools
import random
import re
from collections import Counter

import pytest

from text import computed
from text.computed import GENERATED, Computed, computed_examples, draw_computed
from text.held_out import SPLITS

# At least this share of a document's tokens are results, on the mean.
SHARES = {"ledger": 1 / 6, "session": 1 / 9, "trace": 1 / 8}


def drawn(kind: str, n: int = 1000) -> list[Computed]:
    rng = random.Random(f"test {kind}")
    return [GENERATED[kind](rng) for _ in range(n)]


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
        balance = int(head.removeprefix("Ledger modulo 10, balances last: "))
        assert len(lines) >= 12
        for line in lines:
            *payments, after = map(int, re.fullmatch(r"(\d) (\d) (\d)", line).groups())
            balance = (balance + sum(payments)) % 10
            assert after == balance


def run_examples(text: str) -> tuple[int, str]:
    """The number of examples of an interpreter's session with an answer, and what doctest says against them."""
    test = doctest.DocTestParser().get_doctest(text + "\n", {}, "document", None, None)
    complaints: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=complaints.append)
    return sum(bool(e.want) for e in test.examples), "".join(complaints)


def test_sessions_print_what_python_prints():
    for document in drawn("session"):
        assert run_examples(document.text) == (2, "")


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


# What of a document is worked out: the last digit of each row.
OUTPUT = {"ledger": r"^\d \d (\d)$", "session": r"^\d (\d)$", "trace": r"^\d (\d)$"}


@pytest.mark.parametrize("kind", GENERATED)
def test_every_digit_that_is_worked_out_is_a_piece_with_a_thought(kind):
    for document in drawn(kind):
        output = re.findall(OUTPUT[kind], document.text, re.MULTILINE)
        found = [result for _, result, _ in results(document)]
        assert [result[-1] for result in found] == re.findall(r"\d", "".join(output))
        assert all(re.fullmatch(r" ?\d", result) for result in found)


@pytest.mark.parametrize("kind", GENERATED)
def test_results_are_not_to_be_guessed(kind):
    """No digit makes up a fifth of the results, and the result before is right less often than that."""
    found = [[result[-1] for _, result, _ in results(document)] for document in drawn(kind)]
    digits = Counter(digit for row in found for digit in row)
    assert len(digits) == 10
    assert max(digits.values()) < digits.total() / 5
    again = [a == b for row in found for a, b in itertools.pairwise(row)]
    assert sum(again) < len(again) / 5


# ------------------------------------------------------------------------------------------------------------ thoughts


def start_of_thought(kind: str, before: str) -> str:
    """What the text before a result says that its thought begins with."""
    first, *rows = before.split("\n")
    if kind == "session":  # the number of the row
        return f" {rows[-1]} "
    # What the row before ends with, or the first line.
    return f" {rows[-2][-1]} " if re.fullmatch(r"[\d ]+", (rows[-2:-1] or [""])[0]) else f" {first[-1]} "


@pytest.mark.parametrize("kind", GENERATED)
def test_thoughts_begin_in_the_text_and_end_in_the_result(kind):
    for document in drawn(kind):
        for before, result, thought in results(document):
            assert thought.startswith(start_of_thought(kind, before))
            assert thought[-1] == result[-1]


@pytest.mark.parametrize("kind", GENERATED)
def test_every_step_of_a_thought_is_right_and_there_are_two(kind):
    for document in drawn(kind):
        for _, _, thought in results(document):
            steps = re.findall(r"(?<= )(\d) ([+-]\d) (?=(\d))", thought)
            assert [(int(a) + int(change)) % 10 for a, change, _ in steps] == [int(b) for *_, b in steps]
            assert len(steps) == 2
            assert len(thought.split()) == 5


# -------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("kind", GENERATED)
def test_pieces_are_tokenized_as_the_whole_and_results_are_dense(corpus, kind):
    """Also the sizes: 60 to 250 tokens a document, 3 to 25 tokens a thought."""
    encode = corpus.tokenizer.encode
    n_results = n_tokens = 0
    for document in drawn(kind, 300):
        tokens = encode(document.text)
        assert [t for text, _ in document.pieces for t in encode(text)] == tokens
        thoughts = [thought for _, _, thought in results(document)]
        assert 60 <= len(tokens) <= 250
        assert all(3 <= len(encode(thought)) <= 25 for thought in thoughts)
        n_results, n_tokens = n_results + len(thoughts), n_tokens + len(tokens)
    assert n_results / n_tokens >= SHARES[kind]


def test_examples_for_the_tokenizer_are_training_documents_of_each_kind_with_their_thoughts(monkeypatch):
    drawn_now, draw = [], computed.draw_computed

    def watched(rng, split, held_out_percent):
        assert (split, held_out_percent) == ("train", 7)
        drawn_now.append(draw(rng, split, held_out_percent))
        return drawn_now[-1]

    monkeypatch.setattr(computed, "draw_computed", watched)
    examples = computed_examples(7)
    assert {document.kind for document in drawn_now} == set(GENERATED)
    assert len(examples) == len(drawn_now) >= 500
    for example, document in zip(examples, drawn_now, strict=True):
        for _, result, thought in results(document):
            at = example.index(thought + result)
            example = example[:at] + example[at + len(thought) :]
        assert example == document.text


# -------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("kind", GENERATED)
def test_splits_share_no_canonical_form(kind):
    rng = random.Random(0)
    forms = [{draw_computed(rng, split, 20, kind).canonical for _ in range(60)} for split in SPLITS]
    assert all(forms)
    assert sum(map(len, forms)) == len(set().union(*forms))


@pytest.mark.parametrize("kind", ["session", "trace"])
def test_renamed_twins_share_their_canonical_form(kind, monkeypatch):
    """The same random numbers with other names to choose from, in which no name stays."""
    plain = [GENERATED[kind](random.Random(i)) for i in range(50)]
    monkeypatch.setattr(computed, "LETTERS", computed.LETTERS[3:] + computed.LETTERS[:3])
    twins = [GENERATED[kind](random.Random(i)) for i in range(50)]
    assert not {document.text for document in plain} & {document.text for document in twins}
    assert [document.canonical for document in plain] == [document.canonical for document in twins]
    assert len({document.canonical for document in plain}) >= 45


def test_a_document_without_a_canonical_form_is_its_own():
    assert Computed("x", (("a", ""), (" 1", " 0 +1 1"))).canonical == "a 1"


def test_draws_are_repeatable_and_of_every_generated_kind():
    first, again = ([draw_computed(rng, "val", 5) for _ in range(30)] for rng in (random.Random(3), random.Random(3)))
    assert first == again
    assert {document.kind for document in first} == set(GENERATED)


def test_a_kind_that_cannot_be_drawn_for_a_split_is_named(monkeypatch):
    """`a` has the bucket 7: with 3 per cent held out, a training document."""
    monkeypatch.setattr(computed, "GENERATED", {"one": lambda rng: Computed("one", (("a", ""),))})
    assert draw_computed(random.Random(0), "train", 3, "one").text == "a"
    message = "kind 'one': none of the test split in 10,000 draws; let it make more than 1 different"
    with pytest.raises(ValueError, match=message):
        draw_computed(random.Random(0), "test", 3, "one")
