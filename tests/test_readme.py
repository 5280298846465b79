"""README and docs are true: their commands run, their tables are generated, README is short and its picture comes early."""

import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import paragraphs
from PIL import Image

import routers
import train
from tools import picture, report, shards

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [README, *((ROOT / "docs" / f"{name}.md").read_text() for name in ("commands", "real-models", "scale"))]


def commands() -> list[list[str]]:
    """Every python or torchrun command of README and docs, as words from `python` on. A quoted argument may span lines;
    comments are dropped, and variables of the same block are filled in."""
    blocks = [filled(block) for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page, flags=re.S)]
    text = re.sub(r"\s#.*", "", "\n".join(blocks)).replace(" && ", "\n").replace("\\\n", " ")
    text = re.sub(r"^torchrun --nproc-per-node \d+ ", "python ", text, flags=re.M)
    found = re.findall(r'^python (?:[^"\n]|"[^"]*")*', text, flags=re.M)
    return [shlex.split(command) for command in found]


def filled(block: str) -> str:
    """The block with its variables' values, as a shell has them."""
    for name, value in re.findall(r'^(\w+)="([^"]*)"$', block, flags=re.M):
        block = block.replace(f"${name} ", f"{value} ")
    return block


def run(words: list[str], folder: Path) -> str:
    """The output of a command in a folder."""
    words = [str(ROOT / w) if (ROOT / w).is_file() and w.endswith(".py") else w for w in words[1:]]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_readme_is_short_and_its_first_command_and_picture_come_early():
    lines = README.splitlines()
    assert len(README.encode()) <= 11_000
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("pip install")) <= 15
    assert next(i for i, line in enumerate(lines, 1) if "results/hero.png" in line) <= 40


def test_every_page_and_picture_that_is_linked_exists():
    for folder, page in zip((ROOT, *[ROOT / "docs"] * 3), PAGES, strict=True):
        for link in re.findall(r'\]\((?!http)([^)#]+)\)|src="([^"]+)"', page):
            name = link[0] or link[1]
            # generated at the end of all runs
            assert name == "RESULTS.md" or (folder / name).exists(), name


def test_generated_parts_are_what_report_writes():
    assert report.fill(README, report.tables(ROOT / "results")) == README


@pytest.mark.parametrize("words", [c for c in commands() if c[1] == "train.py" and "--help" not in c], ids=" ".join)
def test_every_training_command_is_valid(words):
    """An elastic one asks for budgets that its choices can meet."""
    config = train.parse(words[2:]).check()
    assert config.mode in train.MODES
    if config.mode == "elastic":
        shape = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or config.data.vocab_size)
        assert routers.build_router(shape, config.elastic, None, torch.device("cpu"))


def test_training_commands_in_a_row_do_not_meet_in_a_folder():
    """In the order of the pages each begins in a folder of its own, or goes on with --resume where one has been."""
    begun = set()
    for words in commands():
        if words[1] == "train.py" and not {"--help", "--dry-run"} & set(words):
            config = train.parse(words[2:])
            assert (config.run_dir() in begun) == config.resume, words
            begun.add(config.run_dir())


def test_every_program_that_is_named_exists():
    programs = {name for page in PAGES for name in re.findall(r"python -m ([\w.]+)", page)}
    assert len(programs) >= 6
    assert all(importlib.util.find_spec(name) for name in programs), programs


def test_every_file_that_is_named_exists():
    names = {name for page in PAGES for name in re.findall(r"`((?:\w+/)?\w+\.py)`", page)}
    assert len(names) > 20
    assert all((ROOT / name).exists() for name in names - {"own_family.py", "FILE.py"}), names


def test_the_reading_order_takes_an_evening_at_forty_lines_a_minute():
    """Each file's minutes are its lines / 40, but for a minute and a tenth; together they are two hours at most."""
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, flags=re.M)
    lines = {name: len((ROOT / name).read_text().splitlines()) for name, _ in rows}
    told = {name: int(minutes) for name, minutes in rows}
    assert {"rlp.py", "elastic.py", "mamba.py", "model.py"} <= set(told)
    right = {name: max(1, round(n / 40)) for name, n in lines.items()}
    assert all(abs(told[name] - right[name]) <= 1 + right[name] // 10 for name in told), (
        f"README has {told}, right is {right}"
    )
    assert sum(lines.values()) / 40 <= 120


def test_the_smoke_run_a_talk_with_it_and_its_export_work_as_written(tmp_path):
    smoke = next(c for c in commands() if "smoke" in c)
    talk, export = (next(c for c in commands() if name in c) for name in ("generate.py", "tools.export"))
    outputs = [run(words, tmp_path) for words in (smoke, talk, export)]
    assert "held-out figures" in outputs[0]
    assert (tmp_path / "runs/smoke/summary.json").exists()
    assert re.search(r"Answer:<think>.*</think>", outputs[1], flags=re.S)
    assert outputs[2] == "wrote exported (nemotron_h)\n"
    assert {p.name for p in (tmp_path / "exported").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    drawn = run(["python", "-m", "tools.picture", "runs/smoke", "--out", "hero.png"], tmp_path)
    assert drawn == "wrote hero.png\n"
    assert Image.open(tmp_path / "hero.png").width == 1600


def test_a_familys_script_runs_as_shown(tmp_path):
    """README's own_family.py, to the letter, with the preset smoke: the new family is trained, measured and shown."""
    (script,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len([line for line in script.splitlines() if line.strip()]) <= 25
    (tmp_path / "own_family.py").write_text(script)
    run(["python", "own_family.py", "--preset", "smoke"], tmp_path)
    assert "[stack] Stack: 0. " in (tmp_path / "runs/stack/samples.txt").read_text()
    assert '"stack"' in (tmp_path / "runs/stack/summary.json").read_text()


def test_ones_own_text_is_read_as_shown(tmp_path):
    """The command for one's own text, with the preset smoke: text alone is trained on, and thoughts stand inside it."""
    words = next(c for c in commands() if "--rlp.text-share" in c)
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts" / "mine.txt").write_text("".join(paragraphs(100)))
    run([*words, "--preset", "smoke"], tmp_path)
    log = (tmp_path / "runs/mine/metrics.jsonl").read_text()
    assert "gain_text_nats" in log
    assert "gain_problems_nats" not in log
    assert "gain_computed_nats" not in log


def test_shards_are_built_and_checked_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts" / "a.jsonl").write_text('{"text": "One text."}\n{"text": "Another one."}\n')
    (build, check) = (c[3:] for c in commands() if c[2] == "tools.shards")
    assert shards.main(build) == shards.main(check) == 0


def test_the_boxes_of_the_picture_add_up_to_the_thoughts_gain(corpus):
    """The nats of all boxes are log p(answer) after the thought minus that at once."""
    config = train.parse(["--preset", "smoke", "--data.vocab-size", "512"])
    torch.manual_seed(0)
    model = train.HybridLM(dataclasses.replace(config.model, vocab_size=corpus.tokenizer.n_vocab))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    problem = corpus.held_out("test", 1, 0)[0]
    found = picture.think(model, corpus.tokenizer, problem, config)
    answer, nats = found["answer"], found["nats"]
    assert len(nats) == len(found["words"])
    assert abs(nats).max() > 0.01
    assert float(sum(nats)) == pytest.approx(float(found["after"][answer] - found["at once"][answer]), abs=1e-4)
    assert float(found["at once"].exp().sum()) == pytest.approx(1, abs=1e-4)
    assert all(float(found["after"][tag].exp()) == 0 for tag in corpus.tokenizer.tags)


def test_the_picture_refuses_runs_without_thoughts(tmp_path):
    (tmp_path / "summary.json").write_text('{"mode": "elastic"}')
    with pytest.raises(ValueError, match="--mode elastic; give a run of rlp"):
        picture.picture(tmp_path)


@pytest.mark.parametrize("line", ["", '{"step": 1, "gain_text_nats": 0.5}\n'])
def test_the_picture_refuses_runs_of_rlp_without_a_gain_at_problems(tmp_path, line):
    """No steps, or none that read problems."""
    (tmp_path / "summary.json").write_text('{"mode": "rlp"}')
    (tmp_path / "metrics.jsonl").write_text(line)
    with pytest.raises(ValueError, match="has logged no gain at answers of problems"):
        picture.picture(tmp_path)


def test_pip_installs_what_the_commands_name():
    assert "pip install -r requirements-dev.txt && pytest -n auto --dist loadfile`" in README
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text()
