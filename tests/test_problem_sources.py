"""Problems that others made: every format of `data.problems`, what is refused, and a run of RLP on a file."""

import gzip
import json
import random
import re
import sys

import pytest
import torch
from conftest import disturb, paragraphs, summary_of

import evals
import thoughts
import train
from system import checkpoint
from system.config import Config, DataConfig, RLPConfig, saved_config
from text.batches import Position, collate_contexts, pretrain_batch, warmup_batch
from text.corpus import Corpus
from text.held_out import SPLITS
from text.problem_sources import load_families
from text.problems import FAMILIES, FILLER, Problem, draw_problem, held_out_problems
from text.tokenizer import CLOSE, THINK


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a text of one's own, and what runs on it keep."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text("".join(paragraphs(20)))
    return folder


@pytest.fixture(scope="module")
def corpus(made):
    return Corpus.load(DataConfig(str(made / "text.txt"), vocab_size=512, held_out_percent=25, cache_dir=str(made)))


@pytest.fixture
def program(made):
    def run(out, *words):
        text = ["--data.path", str(made / "text.txt"), "--data.held-out-percent", "25", "--data.cache-dir", str(made)]
        return train.main(["--preset", "smoke", *text, "--out", str(out), *words])

    return run


def lines_of(file, *values):
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(file)


def two_families(file, n=400):
    """Doubles, with thoughts and answers of two to four tokens; names, without thoughts, called by the file's name."""
    doubles = [
        {"question": f"Twice {i}?", "answer": 2 * i, "thought": f"{i} + {i}", "family": "double"} for i in range(50, 50 + n)
    ]
    return lines_of(file, *doubles, *({"question": f"Who has the number {i}?", "answer": "Ann"} for i in range(n)))


PROGRAM = """
from text.problems import Problem

def twice_problem(rng):
    n = rng.randrange(10_000)
    return Problem("any", f"Twice {n}?", (f" {n}", f" + {n}"), f" {2 * n}", scorer=lambda said: said == f"{2 * n}.0")

def no_problem_at_all(rng):
    return None

def _worked_problem(question, answer):
    return None
"""


def program_of(file, text):
    file.write_text(text)
    return str(file)


# -------------------------------------------------------------------------------------------------------- the formats


def test_built_in_families_are_the_default():
    assert load_families(DataConfig().problems) == (FAMILIES, [])


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz"])
def test_a_file_of_lines_holds_problems_by_family(tmp_path, name):
    plain = two_families(tmp_path / "mine.jsonl", 3)
    (tmp_path / "mine.jsonl.gz").write_bytes(gzip.compress((tmp_path / "mine.jsonl").read_bytes()))
    families, _ = load_families(str(tmp_path / name))
    assert plain.endswith("mine.jsonl")
    assert list(families) == ["double", "mine"]
    found = {p.question: p for p in (families["double"](random.Random(i)) for i in range(50))}
    assert set(found) == {"Twice 50?", "Twice 51?", "Twice 52?"}
    assert found["Twice 51?"] == Problem("double", "Twice 51?", (" 51", " +", " 51"), " 102", "twice 51?")
    assert families["mine"](random.Random(0)).thought is None


@pytest.mark.parametrize(("name", "pack"), [("cut.jsonl.gz", lambda b: gzip.compress(b)[:-20]), ("plain.jsonl.gz", bytes)])
def test_a_damaged_file_of_lines_is_refused_by_name(tmp_path, name, pack):
    two_families(tmp_path / "mine.jsonl")
    (tmp_path / name).write_bytes(pack((tmp_path / "mine.jsonl").read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(.*\); copy it again"):
        load_families(str(tmp_path / name))


def test_a_python_file_may_define_classes_and_import_what_lies_beside_it(tmp_path):
    program_of(tmp_path / "words_beside.py", "WORDS = ['one', 'two']\n")
    text = ("from __future__ import annotations\nfrom dataclasses import dataclass\n"
            "from text.problems import Problem\nfrom words_beside import WORDS\n"
            "@dataclass\nclass Case:\n    n: int\n"
            "def say_problem(rng):\n    case = Case(rng.randrange(2))\n"
            "    return Problem('say', f'Say {case.n}?', (), f' {WORDS[case.n]}')\n")  # fmt: skip
    families, _ = load_families(program_of(tmp_path / "own.py", text))
    assert families["say"](random.Random(0)).answer in (" one", " two")


def test_functions_of_a_python_file_are_families(tmp_path):
    families, _ = load_families(program_of(tmp_path / "own.py", PROGRAM))
    assert list(families) == ["twice"]
    problem = families["twice"](random.Random(0))
    n = int(problem.question[6:-1])
    assert (problem.family, problem.answer, problem.thought) == ("twice", f" {2 * n}", f" {n} + {n}")
    assert problem.scorer(f"{2 * n}.0")


def test_tasks_of_reasoning_gym_are_families_with_their_own_scorers():
    pytest.importorskip("reasoning_gym")
    families, _ = load_families("reasoning_gym:chain_sum,leg_counting")
    assert list(families) == ["chain_sum", "leg_counting"]
    for name, make in families.items():
        first, again, other = (make(random.Random(seed)) for seed in (0, 0, 1))
        assert first == again != other
        assert first.family == name
        assert first.scorer(first.answer.strip()) == 1
        assert first.scorer("no answer") < 1
        assert len(held_out_problems("test", 5, 0, 5, {name: make})) == 5
    with pytest.raises(ValueError, match=r"data.problems: 'no_such' is no task of reasoning_gym; choose from .*chain_sum"):
        load_families("reasoning_gym:no_such")


def test_worked_thoughts_of_reasoning_gyms_tasks_end_at_their_answers():
    pytest.importorskip("reasoning_gym")
    families, _ = load_families("text/gym_worked.py")
    assert list(families) == ["chain_sum", "gcd", "letter_counting"]
    for family, make in families.items():
        for seed in range(20):
            problem = make(random.Random(seed))
            last = {"gcd": problem.steps[-1].split(" mod ")[-1].split(" = ")[0]}.get(family, problem.steps[-1].split()[-1])
            assert f" {last}" == problem.answer
            assert problem.scorer(problem.answer.strip()) == 1


def test_reasoning_gym_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    message = r"the package reasoning-gym, which cannot be imported \(.*\); `pip install reasoning-gym`, or give a .jsonl"
    with pytest.raises(ValueError, match=message):
        load_families("reasoning_gym:chain_sum")


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q"', "mine.jsonl line 2 is not JSON"),
        ('["q", "a"]', "mine.jsonl line 2 is no JSON object; it needs question and answer"),
        ('{"answer": "a"}', "mine.jsonl line 2: \"question\" ('') must be text that is not blank, or a number; mend"),
        ('{"question": "q", "answer": null}', "mine.jsonl line 2: \"answer\" ('') must be text"),
        ('{"question": "q", "answer": ["a"]}', "mine.jsonl line 2: \"answer\" (['a']) must be text"),
        ('{"question": "q", "answer": true}', 'mine.jsonl line 2: "answer" (True) must be text'),
        ('{"question": "q", "answer": NaN}', 'mine.jsonl line 2: "answer" (nan) must be text'),
        ('{"question": "q", "answer": "a", "family": NaN}', 'mine.jsonl line 2: "family" (nan) must be text'),
        ('{"question": "q", "answer": 1e999}', 'mine.jsonl line 2: "answer" (inf) must be text'),
        ('{"question": "q", "answer": "a", "thought": "one"}', "mine.jsonl line 2: \"thought\" ('one') is one word; give"),
        ('{"question": "q", "answer": "a", "thought": {}}', 'mine.jsonl line 2: "thought" ({}) must be text'),
        ('{"question": "q", "answer": "a", "family": "all"}', "the family 'all' must have a name of letters"),
        ('{"question": "q", "answer": "a", "family": "mean"}', "the family 'mean' must have a name of letters"),
        ('{"question": "q", "answer": "a", "family": "a/b"}', "the family 'a/b' must have a name of letters"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line(tmp_path, line, message):
    (tmp_path / "mine.jsonl").write_text('{"question": "q", "answer": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_families(str(tmp_path / "mine.jsonl"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def one_problem(rng:\n", "own.py line 1: SyntaxError"),
        ("x = 1\nimport no_such_module\n", "own.py line 2: ModuleNotFoundError: No module named 'no_such_module'; mend"),
        ("def one_problem(rng):\n    return 1 / 0\n", "own.py line 2: ZeroDivisionError: division by zero; mend it"),
        ("def one_problem(rng):\n    return 7\n", "own.py: one_problem made 7; it must return a text.problems.Problem"),
        ("x = 1\n", "own.py) holds no problems; put some into it"),
        ("import sys\nsys.exit(0)\n", "own.py line 2: SystemExit: 0; mend it"),
        *(
            (
                f"from text.problems import Problem\ndef one_problem(rng):\n    return Problem('one', {rest})\n",
                "own.py: one_problem made Problem(",
            )
            for rest in (
                "'q', (1, 2), ' a'",
                "'q', ' steps', ' a'",
                "'q', (' ',' x'), ' a'",
                "'q\\ud800', (), ' a'",
                "'q', (), ' a', 7",
            )
        ),
        (
            "import random\nfrom text.problems import Problem\n"
            "def one_problem(rng):\n    return Problem('one', f'{random.random()}', (), ' a')\n",
            "own.py): the family 'one' makes different problems from the same generator; let it draw from that",
        ),
    ],
)
def test_bad_functions_are_refused_by_file_and_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_families(program_of(tmp_path / "own.py", text))


@pytest.mark.parametrize(
    ("scorer", "message"),
    [("lambda said: None", "the scorer of one_problem made None of 'said'; it must return a number, 1 for what is right"),
     ("float", "own.py line 1: ValueError: could not convert string to float: 'said'; mend it"),
     ("lambda said: 1 / 0", "own.py line 3: ZeroDivisionError: division by zero; mend it")],
)  # fmt: skip
def test_a_scorer_that_fails_is_refused_by_file(tmp_path, scorer, message):
    body = f"    return Problem('one', 'q', (), ' a', '', {scorer})\n"
    made = f"from text.problems import Problem\ndef one_problem(rng):\n{body}"
    families, _ = load_families(program_of(tmp_path / "own.py", made))
    with pytest.raises(ValueError, match=re.escape(message)):
        families["one"](random.Random(0)).scorer("said")


MADE = """from text.problems import Problem
def one_problem(rng):
    return Problem("one", f"Which, {rng.randrange(10**6)}?", (" t", "he"), " a")
def two_problem(rng):
    return Problem("two", f"What, {rng.randrange(10**6)}?", (" then", " it"), " b", scorer=SCORER)
"""


def test_a_thought_of_one_token_has_no_forced_style(program, tmp_path):
    """That is two tokens: the figures are of the other families."""
    file = program_of(tmp_path / "own.py", MADE.replace("SCORER", "None"))
    assert program(tmp_path / "run", "--data.problems", file) == 0
    assert set(summary_of(tmp_path / "run")["forced_style_base"]["temperature_1"]) == {"all", "two"}


def test_a_scorer_that_fails_is_refused_before_the_run(program, tmp_path, capsys):
    """What is no answer is asked of it first; mended, the run begins."""
    file = program_of(tmp_path / "own.py", MADE.replace("SCORER", "lambda said: float(int(said) > 2)"))
    assert program(tmp_path / "run", "--mode", "sft", "--data.problems", file) == 2
    assert "invalid literal for int()" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()


def test_a_reward_that_scorers_have_no_say_in_is_told(program, tmp_path, capsys):
    file = program_of(tmp_path / "own.py", MADE.replace("SCORER", "lambda said: float(len(said) > 2)"))
    assert program(tmp_path / "run", "--mode", "rlvr", "--data.problems", file, "--rlvr.steps", "1") == 0
    assert "the reward of mode rlvr is for the answers themselves" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sums", "data.problems (sums) is unknown; choose built-in, a file *.jsonl, *.jsonl.gz, *.jsonl.zst, *.py, or"),
        ("none.jsonl", "data.problems (none.jsonl) is no file; give the path of one"),
    ],
)
def test_an_unknown_source_is_refused(source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_families(source)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no problems; put some into it"):
        load_families(lines_of(tmp_path / "mine.jsonl"))


def test_too_few_problems_are_refused_before_anything_is_written(program, tmp_path, capsys):
    mine = two_families(tmp_path / "mine.jsonl", 8)
    assert program(tmp_path / "run", "--data.problems", mine) == 2
    assert "problem family 'double' makes" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()


def test_a_file_that_fails_after_some_steps_leaves_the_weights_before_it(program, tmp_path, monkeypatch, capsys):
    """A rare error of somebody's program: the base's steps before it are saved, and the message says where."""
    fails = tmp_path / "now"
    made = (
        PROGRAM
        + f"""
import os

def rare_problem(rng):
    if os.path.exists({str(fails)!r}):
        raise ZeroDivisionError("rare")
    n = rng.randrange(10_000)
    return Problem("rare", f"Is it {{n}}?", (), f" {{n % 10}}")
"""
    )
    words = ["--data.problems", program_of(tmp_path / "own.py", made.replace("no_problem", "_no_problem"))]
    words += ["--mode", "pretrain", "--pretrain.intro-share", "0", "--data.text-share", "0", "--pretrain.steps", "9"]
    disturb(monkeypatch, "pretrain", 3, lambda: fails.write_text(""))
    assert program(tmp_path / "run", *words) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "step 3:" in said
    assert "ZeroDivisionError: rare; mend it; the weights before it are in" in said
    assert checkpoint.newest(tmp_path / "run").meta["step"] == 3


def test_questions_longer_than_a_sequence_are_refused_and_longer_problems_are_said(program, tmp_path, capsys):
    """Before anything is written. Each question takes some 40 tokens, its thought as many; contexts see all of it."""
    words = " ".join(f"w{i}" for i in range(16))
    lines = [{"question": f"{i} {words}?", "answer": i % 10, "thought": f"{words} {i}"} for i in range(400)]
    mine = ["--data.problems", lines_of(tmp_path / "long.jsonl", *lines), "--rlp.context-len", "256"]
    assert program(tmp_path / "run", *mine, "--pretrain.seq-len", "16") == 2
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"error: pretrain cuts problems after \d+ tokens; .* give a longer pretrain.seq_len", said)
    assert not (tmp_path / "run").exists()
    assert program(tmp_path / "run", *mine, "--pretrain.seq-len", "256", "--rlp.steps", "0") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"warmup cuts problems after \d+ tokens; .* with thought and answer; give a longer warmup.seq_len", said
    )
    assert "pretrain cuts" not in said
    capsys.readouterr()
    text = tmp_path / "text.txt"
    text.write_text("".join(paragraphs(40)))
    alone = ["--mode", "sft", "--data.path", str(text), "--data.text-share", "1", "--data.held-out-percent", "25"]
    assert program(tmp_path / "sft", *mine, *alone, "--warmup.seq-len", "16") == 2  # sft reads problems all the same
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"error: sft cuts problems after \d+ tokens; .* give a longer warmup.seq_len", said)


def test_a_run_goes_on_with_its_horizon_whatever_its_figures_are_of(program, tmp_path, capsys):
    """One answer in twenty has many tokens: among few held-out problems there is none, among many there are some."""
    lines = [{"question": f"Is it {i}?", "answer": "2 3 5 7 9" if i % 20 == 0 else "7"} for i in range(1500)]
    words = ["--data.problems", lines_of(tmp_path / "rare.jsonl", *lines), "--rlp.steps", "2"]
    assert program(tmp_path / "run", *words, "--eval.problems-per-family", "40") == 0
    assert re.search(r"rlp.horizon is \d+ instead of 1", " ".join(capsys.readouterr().out.split()))
    before = saved_config(tmp_path / "run").rlp.horizon
    assert before > 1
    for n in ("2", "60"):
        assert program(tmp_path / "run", *words, "--eval.problems-per-family", n, "--resume") == 0
        assert saved_config(tmp_path / "run").rlp.horizon == before


# ------------------------------------------------------------------------------------------------ how they are used


def test_copies_of_a_question_are_in_one_split(tmp_path):
    """Forty questions, each in three spellings."""
    mine = lines_of(
        tmp_path / "mine.jsonl",
        *(
            {"question": form.format(i), "answer": i}
            for i in range(40)
            for form in ("Say it: {}", "say  it: {}", " SAY IT: {}\n")
        ),
    )
    families, _ = load_families(mine)
    rng = random.Random(0)
    found = [{draw_problem(rng, s, 25, families).question.casefold().split()[2] for _ in range(400)} for s in SPLITS]
    assert sum(map(len, found)) == len(set.union(*found)) == 40


def documents(corpus, batch):
    return corpus.tokenizer.decode(batch["tokens_BT"].flatten().tolist())


def test_problems_without_thoughts_are_read_without_and_beside_filler(tmp_path, corpus):
    families, _ = load_families(two_families(tmp_path / "mine.jsonl"))
    own = Corpus(corpus.tokenizer, corpus.documents, 5, families={"mine": families["mine"]})
    config = Config(data=DataConfig(text_share=0.0))
    assert THINK not in documents(own, pretrain_batch(own, config, 0))
    rows = map(corpus.tokenizer.decode, warmup_batch(own, config, 0)["tokens_BT"].tolist())
    inside = [thought for row in rows for thought in re.findall(f"{THINK}(.*?){CLOSE}", row)]
    assert len(inside) > 20
    assert all(thought.startswith(FILLER) for thought in inside)


def test_places_behind_a_short_answer_count_for_nothing(corpus, make_model):
    """An answer of one token, beside one of three: its score is that of the answer and END alone, after any thought."""
    tk, config = corpus.tokenizer, RLPConfig(context_len=16, horizon=4)
    model = make_model(vocab_size=tk.n_vocab)
    short, long = Position([5, 6, 7], [8]), Position([9, 10], [11, 12, 13, 14])
    batch = collate_contexts(tk, [short, long], config)
    alone = collate_contexts(tk, [short], RLPConfig(context_len=16, horizon=2))
    given = torch.tensor([[20, tk.close]])
    for found, expected in (
        (thoughts.score_context(model, batch, tk.tags), thoughts.score_context(model, alone, tk.tags)),
        (thoughts.score_thoughts(model, batch, tk, given.repeat(2, 1)), thoughts.score_thoughts(model, alone, tk, given)),
    ):
        torch.testing.assert_close(found[0][0], expected[0][0])
        assert found[1][0].tolist() == [*expected[1][0].tolist(), -100, -100]
        assert (found[1][1] >= 0).all()


def test_what_a_scorer_accepts_is_right_up_to_the_first_token_that_differs(corpus):
    """By hand: 12 is asked for; the scorer takes 12 and 13. `125` differs at its third token, which it does not take."""
    tk = corpus.tokenizer
    answer, other, third = (tk.encode(text) for text in (" 12", " 13", " 125"))
    assert [len(t) for t in (answer, other, third)] == [2, 2, 3]
    problems = [Problem("x", "q", (), " 12", scorer=lambda said: float(said in ("12", "13"))), Problem("x", "q", (), " 12")]
    positions = evals.Positions([], tk, Config(), ["x", "x"], problems=problems)
    said_RX = torch.tensor([[*t, tk.end][:3] for t in (answer, other, third)] * 2)
    target_BX = torch.tensor([[*answer, tk.end]] * 2)
    assert positions.right(said_RX, target_BX, 0).tolist() == [1, 1, 0, 1, 0, 0]


def test_rlp_trains_on_a_file_of_two_families_and_measures_both(program, tmp_path, capsys):
    """Answers of several tokens: the horizon follows them, and the run goes on with it."""
    mine = two_families(tmp_path / "mine.jsonl")
    words = ["--mode", "rlp", "--data.problems", mine, "--rlp.text-share", "0"]
    assert program(tmp_path / "run", *words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    horizon = json.loads((tmp_path / "run/config.json").read_text())["config"]["rlp"]["horizon"]
    assert horizon > 1
    assert f"answers take up to {horizon} tokens of this tokenizer: rlp.horizon is {horizon} instead of 1" in shown
    assert program(tmp_path / "text", *words[:-1], "1", "--rlp.steps", "1") == 0  # which reads no problem
    assert f"rlp.horizon (1) looks at the first; with --rlp.horizon {horizon}" in " ".join(capsys.readouterr().out.split())
    accuracy = summary_of(tmp_path / "run")["accuracy"]
    for how in ("sampled", "greedy", "no_think"):
        assert set(accuracy[how]) == {"all", "double", "mine"}
    samples = (tmp_path / "run/samples.txt").read_text()
    assert samples.count("[double] Twice") == samples.count("[mine] Who has") == 2
    assert program(tmp_path / "run", *words, "--resume") == 0
    with open(mine, "a") as file:
        file.write('{"question": "One more?", "answer": "Yes"}\n')
    capsys.readouterr()
    assert program(tmp_path / "run", *words, "--resume") == 2
    assert "the text or the problems are not what the run was started with" in " ".join(capsys.readouterr().out.split())
