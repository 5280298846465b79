"""Problems that others made, as families like those of problems.py: what `data.problems` reads.

    built-in                 the families of problems.py
    FILE.jsonl               a problem a line (also .gz, .zst): {"question": ..., "answer": ...},
                             and, if there are, "thought" and "family"
    FILE.py                  your own functions (see `_of_functions`)
    reasoning_gym:TASK,...   tasks of the package reasoning-gym, with their own scorers

Every problem has its split by its question, whatever its capitals and spaces (of a function, by the
problem's own canonical form): so copies of a question are in one split.
"""

import functools
import importlib.metadata
import importlib.util
import math
import random
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from system.errors import require
from system.files import require_content, sha256
from text.problems import FAMILIES, Families, Problem
from text.sources import json_lines
from text.tokenizer import valid

GYM = "reasoning_gym"


def load_families(source: str) -> tuple[Families, list[str]]:
    """The families of a source, and what tells it from others; for the built-in ones that is empty.
    Each has made a problem twice. Raises ValueError, with file and line, for what is unusable."""
    if source == "built-in":
        return FAMILIES, []
    file, (package, _, tasks) = Path(source), source.partition(":")
    if package == GYM:
        families, origin = _of_gym(tasks.split(","))
    else:
        kinds = [read for ending, read in READERS.items() if file.name.lower().endswith(ending)]
        require(kinds, f"data.problems ({source}) is unknown; choose built-in, a file "
                f"{', '.join('*' + ending for ending in READERS)}, or {GYM}:TASK,TASK")
        require(file.is_file(), f"data.problems ({source}) is no file; give the path of one")
        require_content(file)
        families, origin = kinds[0](file), sha256(file)
    require(families, f"data.problems ({source}) holds no problems; put some into it")
    for name, make in families.items():
        require(re.fullmatch(r"[\w .-]+", name) and name not in ("all", "mean"), "data.problems "
                f"({source}): the family {name!r} must have a name of letters, digits, spaces and "
                "_.-, but not all or mean, which figures have; give it another")
        first, again = (make(random.Random(0)) for _ in range(2))
        require(first == again, f"data.problems ({source}): the family {name!r} makes different "
                "problems from the same generator; let it draw from that generator alone")
    return families, [source, origin]


def _canonical(question: str) -> str:
    """What copies of a question have in common."""
    return " ".join(question.split()).casefold()


# ------------------------------------------------------------------------------------ JSON lines


def _of_lines(file: Path) -> Families:
    """The problems of a file by family; without one in the line, it is the file's name."""
    found: dict[str, list[Problem]] = {}
    default = {"question": "", "answer": "", "thought": "", "family": file.name.split(".")[0]}
    for where, value in json_lines(file):
        require(isinstance(value, dict), f"{where} is no JSON object; it needs question and answer")
        said = {}
        for name, missing in default.items():
            one = missing if value.get(name) is None else value[name]
            is_text = isinstance(one, str | int | float) and not isinstance(one, bool) and (
                not isinstance(one, float) or math.isfinite(one))
            said[name] = valid(str(one)).replace("\0", "\ufffd").strip()
            require(is_text and (said[name] or name == "thought"), f'{where}: "{name}" '
                    f"({one!r:.60}) must be text that is not blank, or a number; mend the line or "
                    "leave it out")
        steps = tuple(re.findall(r"\s*\S+", f" {said['thought']}"))  # it can stop after any word
        require(len(steps) != 1, f'{where}: "thought" ({said["thought"]!r:.60}) is one word; give '
                "two or more, or leave it out")
        question, family = said["question"], said["family"]
        found.setdefault(family, []).append(
            Problem(family, question, steps, f" {said['answer']}", _canonical(question)))
    return {family: functools.partial(_one_of, many) for family, many in found.items()}


def _one_of(problems: list[Problem], rng: random.Random) -> Problem:
    return rng.choice(problems)


# ------------------------------------------------------------------------------ Python functions


def _of_functions(file: Path) -> Families:
    """Every function NAME_problem in a Python file is the family NAME; _NAME_problem is a helper.

    It takes a random.Random, draws from that alone, and returns a `text.problems.Problem`, as those
    of problems.py do. Family: NAME, whatever the problem says. Answer and steps begin with a space.
    Without worked thoughts, steps are (). What copies or renamed twins of a question share is its
    `canonical`; where more than the answer is right, `scorer` gives 1 for it. The file is run: it
    is your own code, and can import what lies beside it.
    """
    spec = importlib.util.spec_from_file_location(f"problems_of_{file.stem}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    if (beside := str(file.parent.resolve())) not in sys.path:
        sys.path.append(beside)
    _run(file, lambda: spec.loader.exec_module(module))
    return {name.removesuffix("_problem"): functools.partial(_made_by, file, name, function)
            for name, function in vars(module).items()
            if name.endswith("_problem") and not name.startswith("_") and callable(function)}


def _made_by(file: Path, name: str, function: Callable[[random.Random], Problem],
             rng: random.Random) -> Problem:
    """What a function makes, under its own family's name."""
    found = _run(file, lambda: function(rng))
    require(isinstance(found, Problem) and isinstance(found.steps, tuple | list) and all(
        isinstance(text, str) and text.strip() and text == valid(text)
        for text in (found.question, found.answer, found.canonical, *found.steps)),
        f"{file}: {name} made {found!r:.200}; it must return a text.problems.Problem whose "
        "question, answer and canonical are text, and its steps a tuple of texts")

    def scorer(said: str) -> float:
        score = _run(file, lambda: found.scorer(said))
        require(isinstance(score, int | float), f"{file}: the scorer of {name} made {score!r:.60} "
                f"of {said!r:.60}; it must return a number, 1 for what is right")
        return score

    return Problem(name.removesuffix("_problem"), found.question, tuple(found.steps), found.answer,
                   found.canonical, found.scorer and scorer)


def _run(file: Path, call: Callable[[], Any]) -> Any:
    """What a file's code returns. Raises ValueError with the line at which it fails."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        raise ValueError(f"{file} line {line}: {type(error).__name__}: {error}; mend it") from error


# ------------------------------------------------------------------------------------ reasoning-gym


def _of_gym(tasks: list[str]) -> tuple[Families, str]:
    """Tasks of reasoning-gym by name, and its version."""
    try:
        gym = importlib.import_module(GYM)
    except ImportError as error:
        raise ValueError(f"data.problems ({GYM}:...) needs the package reasoning-gym, which cannot "
                         f"be imported ({error}); `pip install reasoning-gym`, or give a .jsonl "
                         "file") from None
    known = gym.factory.DATASETS
    for task in tasks:
        require(task in known, f"data.problems: {task!r} is no task of {GYM}; choose from "
                f"{', '.join(sorted(known))}")
    families = {task: functools.partial(_of_task, task, gym.create_dataset(task, seed=0))
                for task in tasks}
    return families, importlib.metadata.version("reasoning-gym")


def _of_task(task: str, tasks: Any, rng: random.Random) -> Problem:
    """A problem of a task: one of 2^31, each made from its number alone."""
    entry = tasks[rng.randrange(2**31)]
    require(isinstance(entry["answer"], str) and entry["answer"].strip(), "data.problems: the task "
            f"{task!r} of {GYM} has no one right answer; choose another")

    def scorer(said: str) -> float:
        try:
            return tasks.score_answer(answer=said, entry=entry)
        except Exception:  # it cannot be read as an answer
            return 0.0

    question = entry["question"].strip()
    return Problem(task, question, (), f" {entry['answer'].strip()}", _canonical(question), scorer)


READERS = {".jsonl": _of_lines, ".jsonl.gz": _of_lines, ".jsonl.zst": _of_lines,
           ".py": _of_functions}
