"""README is true: its commands run, its tables are what report.py writes, its first command comes early."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import routers
import train
from tools import report, shards

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)


def commands() -> list[list[str]]:
    """Every python command of README, as words. A quoted argument may span lines; comments are dropped."""
    text = re.sub(r"\s#.*", "", "\n".join(BLOCKS)).replace(" && ", "\n").replace("\\\n", " ")
    found = re.findall(r'^python (?:[^"\n]|"[^"]*")*', text, flags=re.M)
    return [shlex.split(command) for command in found]


def test_the_first_command_stands_within_fifteen_lines():
    lines = README.splitlines()
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("pip install")) <= 15


def test_generated_parts_are_what_report_writes():
    assert report.fill(README, report.tables(ROOT / "results")) == README


@pytest.mark.parametrize("words", [c for c in commands() if c[1] == "train.py" and "--help" not in c], ids=" ".join)
def test_every_training_command_is_valid(words):
    """An elastic one asks for budgets that its choices can meet."""
    config = train.parse(words[2:]).check()
    assert config.mode in ("pretrain", "rlp", "cpt", "elastic")
    if config.mode == "elastic":
        shape = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or config.data.vocab_size)
        assert routers.build_router(shape, config.elastic, None, torch.device("cpu"))


def test_training_commands_in_a_row_do_not_meet_in_a_folder():
    """In the order of README each begins in a folder of its own, or goes on with --resume where one has been."""
    begun = set()
    for words in commands():
        if words[1] == "train.py" and not {"--help", "--dry-run"} & set(words):
            config = train.parse(words[2:])
            assert (config.run_dir() in begun) == config.resume, words
            begun.add(config.run_dir())


def test_every_file_of_the_reading_order_exists():
    names = re.findall(r"`((?:\w+/)?\w+\.py)`", README)
    assert len(names) > 10
    assert all((ROOT / name).exists() for name in names)


def test_the_smoke_run_a_talk_with_it_and_its_export_work_as_written(tmp_path):
    smoke = next(c for c in commands() if "smoke" in c)
    talk, export = (next(c for c in commands() if name in c) for name in ("generate.py", "tools.export"))
    outputs, env = [], os.environ | {"PYTHONPATH": str(ROOT)}
    for words in (smoke, talk, export):
        words = [str(ROOT / w) if w.endswith(".py") else w for w in words]
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=240, env=env
        )
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    assert "held-out figures" in outputs[0]
    assert (tmp_path / "runs/smoke/summary.json").exists()
    assert re.search(r"Answer:<think>.*</think>", outputs[1], flags=re.S)
    assert outputs[2] == "wrote exported (nemotron_h)\n"
    assert {p.name for p in (tmp_path / "exported").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_shards_are_built_and_checked_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts" / "a.jsonl").write_text('{"text": "One text."}\n{"text": "Another one."}\n')
    (build, check) = (c[3:] for c in commands() if c[2] == "tools.shards")
    assert shards.main(build) == shards.main(check) == 0


def test_pip_installs_what_the_commands_name():
    assert "pip install -r requirements-dev.txt && pytest" in README
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text()
