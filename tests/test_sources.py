"""Texts as people have them: every format, every boundary, and what is no text by file and line."""

import gzip
import json
import random
import re
import sys

import pytest
from conftest import paragraphs

import train
from text.sources import input_files, read_texts
from text.tokenizer import END
from tools import shards as shards_program

TEXTS = [f"text {i} é" for i in range(5)]


def texts_of(file, key="text", size=2000):
    return [text for _, text in read_texts([file], key, size)]


def json_lines(key="text"):
    return "".join(json.dumps({key: text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def write_zst(file, key):
    """In two frames, as parallel programs write them."""
    half = json_lines(key).index(b"\n") + 1
    file.write_bytes(
        b"".join(map(pytest.importorskip("zstandard").compress, (json_lines(key)[:half], json_lines(key)[half:])))
    )


def write_parquet(file, key):
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table({"id": range(5), key: TEXTS}), file)


WRITE = {
    "a.jsonl": lambda file, key: file.write_bytes(json_lines(key)),
    "A.JSONL": lambda file, key: file.write_bytes(json_lines(key)),
    "a.ndjson": lambda file, key: file.write_bytes(json_lines(key)),
    "a.json": lambda file, key: file.write_text(json.dumps([{key: text, "id": i} for i, text in enumerate(TEXTS)])),
    "a.jsonl.gz": lambda file, key: file.write_bytes(gzip.compress(json_lines(key))),
    "a.jsonl.zst": write_zst,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("key", ["text", "content"])
@pytest.mark.parametrize("name", WRITE)
def test_a_document_a_line_or_row_is_read_under_its_key_and_another_key_is_refused(tmp_path, name, key):
    file = tmp_path / name
    WRITE[name](file, key)
    assert texts_of(file, key) == TEXTS
    said = rf'{name} (line|element|row) 1 has no "body" that is a string \(it has .*{key}.*--data.text-key'
    with pytest.raises(ValueError, match=said):
        texts_of(file, "body")


def test_text_is_unpacked_and_lines_of_json_under_another_name_are_said_to_be_that(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(TEXTS).encode()))
    assert texts_of(tmp_path / "a.txt.gz") == ["\n".join(TEXTS)]
    (tmp_path / "a.json").write_bytes(json_lines())
    with pytest.raises(ValueError, match=r"a.json is not JSON .* call it .jsonl if there is an object in each line"):
        texts_of(tmp_path / "a.json")
    (tmp_path / "a.json.txt").write_bytes(json_lines())
    with pytest.raises(ValueError, match=r"a.json.txt begins with a JSON object that has 'text'; .* call it .jsonl"):
        texts_of(tmp_path / "a.json.txt")
    assert texts_of(tmp_path / "a.json.txt", "body") == [json_lines().decode()]


@pytest.mark.parametrize("name", ["a.txt.zst", "a.jsonl.zst", "a.jsonl.gz"])
def test_a_packed_file_that_was_cut_short_is_refused_though_its_beginning_can_be_read(tmp_path, name):
    """Of thousands of lines; whole it is read, over several frames and long lines too."""
    pack = gzip.compress if name.endswith("gz") else pytest.importorskip("zstandard").compress
    rng = random.Random(0)
    lines = [json.dumps({"text": rng.randbytes(500).hex()}) + "\n" for _ in range(2000)]
    parts = ["".join(lines).encode(), json.dumps({"text": "x" * 3_000_000}).encode()]
    (tmp_path / name).write_bytes(b"".join(map(pack, parts)))
    if "jsonl" in name:
        assert len(texts_of(tmp_path / name)) == 2001
    for share in (0.3, 0.6, 0.99999):
        whole = b"".join(map(pack, parts))
        (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=f"{name} cannot be read .*; copy it again"):
            texts_of(tmp_path / name, "other" if "txt" in name else "text")


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(ValueError, match=f"{name} needs the package {package}, which is not installed; `pip install"):
        texts_of(tmp_path / name)


@pytest.mark.parametrize("name", WRITE)
def test_a_damaged_file_is_refused_by_name(tmp_path, name):
    WRITE[name](tmp_path / name, "text")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match=rf"{name}.*(is not JSON|cannot be read|is empty)"):
        texts_of(tmp_path / name)


def test_a_folder_of_several_formats_trains_and_says_what_it_skipped(tmp_path, capsys):
    """Hidden files and empty ones; the same folder is built into shards."""
    folder, pieces = tmp_path / "in", paragraphs(40)
    folder.mkdir()
    lines = [json.dumps({"body": text}) + "\n" for text in pieces]
    (folder / "a.jsonl").write_text("".join(lines[:20]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[20:39]).encode()))
    (folder / "c.txt").write_text(pieces[39])
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1\0")
    (folder / "empty.txt").write_text("")
    words = ["--preset", "smoke", "--mode", "pretrain", "--pretrain.steps", "1", "--data.text-key", "body",
             "--data.path", folder, "--data.cache-dir", tmp_path / "cache", "--data.held-out-percent", "25"]  # fmt: skip
    assert train.main([*map(str, words), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert ".DS_Store is hidden; skipped" in said
    assert "empty.txt is empty; skipped" in said
    words = ["build", folder, "--out", tmp_path / "set", "--text-key", "body", "--vocab-size", "400"]
    assert shards_program.main([*map(str, words)]) == 0
    said = capsys.readouterr().out
    assert ".DS_Store is hidden; skipped" in said
    assert ": 40 documents" in said


def test_a_key_is_refused_where_every_file_is_plain_text(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a text")
    key = ["--data.path", tmp_path / "a.txt", "--data.text-key", "body", "--data.cache-dir", tmp_path / "cache"]
    words = ["--preset", "smoke", "--mode", "pretrain", "--out", tmp_path / "run", *key]
    assert train.main([*map(str, words)]) == 2
    words = ["build", tmp_path / "a.txt", "--out", tmp_path / "set", "--text-key", "body"]
    assert shards_program.main([*map(str, words)]) == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert said.count("text-key (body) is for JSON and Parquet, and no file is called so") == 2, said
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "set").exists()


def test_a_folder_of_nothing_but_hidden_and_empty_files_is_refused(tmp_path):
    (tmp_path / ".hidden").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"data.path .*is a folder without files that hold text"):
        input_files(tmp_path, "data.path")


def test_links_to_folders_and_to_nothing_are_skipped_with_a_line(tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for one in (folder, elsewhere):
        one.mkdir()
        (one / "a.txt").write_text("text")
    for name, target in (("more", elsewhere), ("gone.txt", tmp_path / "nowhere"), ("b.txt", elsewhere / "a.txt")):
        (folder / name).symlink_to(target)
    files, skipped = input_files(folder, "data.path")
    assert [file.name for file in files] == ["a.txt", "b.txt"]
    assert [line.split(" is ", 1)[1] for line in skipped] == ["a link to nothing; skipped", "a link to a folder; skipped"]


def test_files_of_equal_name_in_several_folders_are_told_apart(tmp_path):
    """By their folder, below the one that is given: by name alone all of them would be one cluster of documents."""
    for name in ("a", "b/c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "text.txt").write_text(f"of {name}")
    files, _ = input_files(tmp_path, "data.path")
    assert dict(read_texts(files, "text", 100, tmp_path)) == {"a/text.txt 0": "of a", "b/c/text.txt 0": "of b/c"}


@pytest.mark.parametrize("value", [None, ["a", "b"], 3])
def test_what_stands_under_the_key_and_is_no_text_is_named(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": value}) + "\n")
    with pytest.raises(ValueError, match=r'a.jsonl line 1: "text" \(.*\) is no string; mend it, or leave it out'):
        texts_of(tmp_path / "a.jsonl")


def test_end_of_text_is_a_boundary(tmp_path):
    """By hand: on a line of its own, within a line, and twice."""
    (tmp_path / "a.txt").write_text(f"one\n{END}\ntwo{END}three\n{END}{END}\n")
    assert [text.strip() for text in texts_of(tmp_path / "a.txt")] == ["one", "two", "three"]


BOOKS = {
    "lines": "".join(f"line {i} of a book without any blank one\n" for i in range(3000)),
    "words": "".join(f"word{i} " for i in range(20_000)),
    "neither": "".join(f"{i:06}" for i in range(20_000)),
}


@pytest.mark.parametrize("kind", BOOKS)
def test_a_book_without_blank_lines_is_cut_at_lines_else_words_and_nothing_is_lost(tmp_path, kind):
    (tmp_path / "a.txt").write_text(BOOKS[kind])
    pieces = texts_of(tmp_path / "a.txt")
    assert "".join(pieces) == BOOKS[kind]
    assert all(2000 <= len(piece) <= 4000 for piece in pieces[:-1])
    assert {piece[-1] for piece in pieces[:-1]} <= {"lines": {"\n"}, "words": {" "}, "neither": set("0123456789")}[kind]


def test_the_mark_at_the_beginning_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    assert texts_of(tmp_path / "a.txt") == ["one\ntwo"]
    assert texts_of(tmp_path / "a.jsonl") == ["one"]


def test_halves_of_surrogate_pairs_and_zeros_in_json_become_replacement_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b\u0000c\ud83d\ude00"}')
    assert texts_of(tmp_path / "a.jsonl") == ["a\ufffdb\ufffdc😀"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"fine\n\xff\xfe\n", r"a.txt line 2 is not UTF-8 text \(byte 0\)"),
        ("a.txt", b"fine\n\nno\0\n", "a.txt line 3 holds zero bytes"),
        ("a.txt", b" \n\n", "a.txt is empty: it holds no text"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "a.txt is a Git LFS pointer.*`git lfs pull`"),
        ("a.jsonl", b'{"text": "a"}\n\xff\n', "a.jsonl line 2 is not UTF-8 text"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl line 1 is not JSON"),
        ("a.jsonl", b'["text"]\n', r'a.jsonl line 1 has no "text" that is a string \(it is no object\)'),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}\n", "a.jsonl line 1 is not JSON"),
    ],
)
def test_what_is_no_text_is_refused_by_file_and_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + ".*" + said):
        texts_of(tmp_path / name)
