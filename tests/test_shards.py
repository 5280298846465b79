"""Shards: what comes out is what went in, windows as of a corpus in memory, every kind of damage by name."""

import dataclasses
import json
import os
import random
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import paragraphs

import train
from system import rundir
from system.config import DataConfig
from system.presets import PRESETS
from text.batches import pretrain_batch, rlp_batch
from text.corpus import Corpus
from text.documents import Documents, join
from text.held_out import SPLITS, bucket_of
from text.shards import LIST, ShardSet, build
from text.sources import read_texts
from text.tokenizer import FileTokenizer
from tools import shards as shards_program

END = 256


def fake(n_vocab=300, encode=lambda text: list(text.encode())):
    """A tokenizer of bytes."""
    return SimpleNamespace(encode=encode, end=END, n_vocab=n_vocab, fingerprint="abc", json="")


def bucket(text):
    return bucket_of(text.strip())


def texts(n, seed=0):
    """n different texts of 1 to 60 letters."""
    rng = random.Random(seed)
    return [f"{i} " + "".join(rng.choices("abcdef", k=rng.randrange(60))) for i in range(n)]


@pytest.fixture
def folder(tmp_path):
    """300 documents in several shards."""
    assert len(build(texts(300), tmp_path / "set", fake(), "x", shard_tokens=2000)) > 3
    return tmp_path / "set"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A folder that the program built from a *.jsonl and a *.txt file, with a vocabulary of its own."""
    tmp = tmp_path_factory.mktemp("shards")
    lines = [json.dumps({"text": p, "id": i}) + "\n" for i, p in enumerate(paragraphs(80))]
    (tmp / "in").mkdir()
    (tmp / "in" / "a.jsonl").write_text("".join(lines) + "\n")
    (tmp / "in" / "b.txt").write_text("A text of its own.\n")
    (tmp / "in" / ".left.out").write_text("No text.\n")
    words = ["build", tmp / "in", "--out", tmp / "set", "--vocab-size", "512", "--shard-tokens", "30000"]
    assert shards_program.main([*map(str, words)]) == 0
    return tmp / "set"


# ----------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(("n_vocab", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_every_document_comes_back_once_in_the_bucket_of_its_text(tmp_path, n_vocab, dtype):
    build(texts(300), tmp_path / "set", fake(n_vocab), "x", shard_tokens=2000)
    found = ShardSet(tmp_path / "set")
    assert {tokens.dtype.type for tokens, _, _ in found.shards} == {dtype}
    for buckets in (range(100), range(1), range(7, 31), range(31, 100)):
        documents = found.documents(buckets)
        expected = sorted(t for t in texts(300) if bucket(t) in buckets)
        assert all(d[-1] == END for d in documents)
        assert sorted(bytes(d[:-1].astype(np.uint8)).decode() for d in documents) == expected
        assert len(documents) == len(expected)
        assert documents.n_tokens == sum(len(t) + 1 for t in expected)
    found.check()


def test_copies_of_a_text_are_in_one_bucket_whatever_space_surrounds_them(tmp_path):
    build([" b c\n", *texts(300), "b c"], tmp_path / "set", fake(), "x", shard_tokens=2000)
    own = bucket_of("b c")
    found = [bytes(d[:-1].tolist()).decode() for d in ShardSet(tmp_path / "set").documents(range(own, own + 1))]
    assert [text for text in found if text.strip() == "b c"] == [" b c\n", "b c"]
    assert len({bucket(t) for t in texts(2000)}) == 100


def test_a_window_is_what_the_same_documents_in_memory_give(folder):
    """Three routes: parts in several memory maps, one part in memory, and a loop over the documents."""
    on_disk = ShardSet(folder).documents(range(10, 90))
    in_memory = Documents([join(list(on_disk))])
    assert len(in_memory) == len(on_disk)
    assert in_memory.n_tokens == on_disk.n_tokens
    for length in (1, 7, 40, 1000):
        for seed in range(60):
            rng = random.Random(seed)
            at = rng.randrange(sum(map(len, on_disk)))
            for document in on_disk:
                if at < len(document):
                    break
                at -= len(document)
            start = rng.randrange(max(1, len(document) - length + 1))
            for documents in (in_memory, on_disk):
                window = documents.window(random.Random(seed), length)
                assert window.tolist() == document[start : start + length].tolist()
                assert window.dtype == np.int32


def test_a_position_is_what_the_same_documents_in_memory_give(folder):
    """And its document is the one of that index."""
    on_disk = ShardSet(folder).documents(range(10, 90))
    in_memory = Documents([join(list(on_disk))])
    for seed in range(100):
        i, context, target = on_disk.position(random.Random(seed), 7, 2)
        again = in_memory.position(random.Random(seed), 7, 2)
        assert (i, context.tolist(), target.tolist()) == (again[0], again[1].tolist(), again[2].tolist())
        both, document = [*context.tolist(), *target.tolist()], on_disk[i].tolist()
        assert both in [document[t : t + len(both)] for t in range(len(document))]
        assert context.dtype == target.dtype == np.int32


def test_an_index_outside_is_refused_and_an_empty_split_is_empty(folder):
    documents = ShardSet(folder).documents(range(100))
    for i in (-1, len(documents)):
        with pytest.raises(IndexError):
            documents[i]
    assert len(ShardSet(folder).documents(range(3, 3))) == 0


def test_a_shard_is_two_arrays_that_numpy_reads(tmp_path):
    """By hand: two documents of 2 + 1 and 1 + 1 tokens."""
    build(["ab", "c"], tmp_path / "set", fake(), "x")
    tokens, starts = (np.load(tmp_path / "set" / f"00000.{part}.npy") for part in ("tokens", "starts"))
    first, second = sorted(["ab", "c"], key=bucket)
    assert (tokens.dtype, starts.dtype) == (np.uint16, np.int64)
    assert tokens.tolist() == [*first.encode(), END, *second.encode(), END]
    assert starts.tolist() == [0, len(first) + 1, 5]
    listed = json.loads((tmp_path / "set" / LIST).read_text())
    assert listed["tokenizer"] == {"source": "x", "n_vocab": 300, "fingerprint": "abc"}
    (entry,) = listed["shards"]
    assert (listed["version"], listed["dtype"], entry["n_tokens"], entry["n_documents"]) == (2, "uint16", 5, 2)
    assert entry["bucket_documents"] == [sum(bucket(t) == i for t in ("ab", "c")) for i in range(100)]


def test_building_again_gives_the_same_bytes(tmp_path, folder):
    build(texts(300), tmp_path / "again", fake(), "x", shard_tokens=2000)
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


# ------------------------------------------------------------------------------------------------------------- inputs


def test_long_files_are_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    text = "".join(f"line {i}\n" + "\n" * (i % 5 == 0) for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    pieces = [text for _, text in read_texts([tmp_path / "a.txt"], "text", size=200)]
    assert len(pieces) > 3
    assert "".join(pieces) == text
    assert all(p.endswith("\n\n") for p in pieces[:-1])


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"txt": "a"}\n', 'a.jsonl line 1 has no "text" that is a string'),
        ("a.jsonl", b'["text"]\n', 'a.jsonl line 1 has no "text" that is a string'),
        ("a.txt", b"fine\n\xff\xfe\n", "a.txt line 2 is not UTF-8 text"),
        ("a.txt", b" \n", "a.txt is empty: it holds no text"),
        (None, b"", "does not exist"),
    ],
)
def test_inputs_that_cannot_be_read_are_refused_by_name_and_leave_no_data_set(tmp_path, capsys, name, content, problem):
    if name:
        (tmp_path / name).write_bytes(content)
    assert shards_program.main(["build", str(tmp_path / (name or "a.txt")), "--out", str(tmp_path / "set")]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "set" / LIST).exists()


def test_a_folder_that_holds_shards_is_not_written_over(program, capsys):
    assert shards_program.main(["build", str(program.parent / "in"), "--out", str(program)]) == 2
    assert f"already holds {LIST}; choose another --out" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- damage


def change_list(file, i=1, **changes):
    """Another entry in shards.json, of the set or of its shard i."""
    listed = json.loads((file.parent / LIST).read_text())
    listed["shards"][i] |= {k: v for k, v in changes.items() if k in listed["shards"][i]}
    listed |= {k: v for k, v in changes.items() if k in listed}
    (file.parent / LIST).write_text(json.dumps(listed))


def zip_up(file):
    tokens = np.load(file)
    with open(file, "wb") as f:
        np.savez(f, tokens=tokens)


DAMAGE = {
    "missing": (lambda f: f.unlink(), "is missing"),
    "empty": (lambda f: f.write_bytes(b""), "is cut short or damaged"),
    "zeros": (lambda f: f.write_bytes(bytes(9000)), "is cut short or damaged"),
    "cut in the header": (lambda f: f.write_bytes(f.read_bytes()[:100]), "is cut short or damaged"),
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "is cut short or damaged"),
    "longer": (lambda f: f.write_bytes(f.read_bytes() + b"a"), "bytes instead of .*: damaged"),
    "header without a bracket": (lambda f: f.write_bytes(f.read_bytes().replace(b"(", b" ")), "is cut short or damaged"),
    "pickle": (lambda f: np.save(f, np.array([{}]), allow_pickle=True), "is cut short or damaged"),
    "a zip file": (zip_up, "is damaged: it holds no array"),
    "one token less": (lambda f: np.save(f, np.load(f)[:-1]), r"holds uint16\[\d+\], in shards.json uint16\["),
    "two dimensions": (lambda f: np.save(f, np.load(f)[None]), r"holds uint16\[1, \d+\], in shards.json uint16\["),
    "other dtype": (lambda f: np.save(f, np.load(f).astype(np.int8)), r"holds int8\[\d+\], in shards.json uint16\["),
    "other counts": (lambda f: change_list(f, n_tokens=1), r"holds uint16\[\d+\], in shards.json uint16\[1\]"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_refused_with_its_name_what_is_wrong_and_a_remedy(folder, kind):
    damage, problem = DAMAGE[kind]
    damage(folder / "00001.tokens.npy")
    with pytest.raises(ValueError, match=rf"00001.tokens.npy.*({problem})") as refused:
        ShardSet(folder)
    assert "build again" in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda f: f.unlink(), "00001.starts.npy is missing"),
        (lambda f: np.save(f, np.load(f) + 1), "00001.starts.npy is damaged: its documents do not cover the tokens"),
        (lambda f: np.save(f, np.load(f)[1:]), r"00001.starts.npy holds int64\[\d+\], in shards.json int64"),
        (lambda f: np.save(f, np.load(f).astype(np.int32)), r"00001.starts.npy holds int32\[\d+\], in shards.json int64"),
        (lambda f: change_list(f, bucket_documents=[1] * 100), "shards.json is damaged: 00001 has other buckets"),
        (lambda f: change_list(f, bucket_documents=[]), "shards.json is damaged: 00001 has other buckets"),
        (lambda f: change_list(f, sha256={}), "shards.json cannot be read .*'tokens'"),
        (lambda f: change_list(f, version=1), "shards.json has the format version 1; this program reads 2"),
    ],
)
def test_starts_and_entries_that_do_not_fit_are_refused_by_name(folder, damage, problem):
    damage(folder / "00001.starts.npy")
    with pytest.raises(ValueError, match=problem) as refused:
        ShardSet(folder)
    assert "build again" in str(refused.value)


def test_a_shard_of_another_build_is_found_before_the_first_use(folder, tmp_path):
    """Its counts fit, so only its checksum tells: here the tokens of another tokenizer."""
    file = folder / "00001.tokens.npy"
    np.save(file, np.load(file) % 250)
    with pytest.raises(ValueError, match=r"00001.tokens.npy is damaged: its content has another checksum"):
        ShardSet(folder).check_once(tmp_path / "cache")


@pytest.mark.parametrize(("part", "at"), [("tokens", 999), ("tokens", -1), ("starts", -12), ("tokens", "header")])
def test_a_single_changed_byte_is_found_by_the_check_and_before_the_first_use(folder, tmp_path, capsys, part, at):
    """In numpy's header a blank may become a tab, which changes nothing that is read."""
    name = f"00002.{part}.npy"
    content = bytearray((folder / name).read_bytes())
    ShardSet(folder).check_once(tmp_path / "cache")
    if at == "header":
        content[content.index(b" ", 100)] = ord("\t")
    else:
        content[at] ^= 1
    (folder / name).write_bytes(content)
    assert shards_program.main(["check", str(folder)]) == 2
    assert f"{name} is damaged: its content has another checksum" in capsys.readouterr().err
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        ShardSet(folder).check_once(tmp_path / "cache")


def test_what_was_checked_is_not_read_again_until_it_changes(folder, tmp_path, monkeypatch):
    found = ShardSet(folder)
    found.check_once(tmp_path / "cache")
    monkeypatch.setattr(ShardSet, "check", lambda _: pytest.fail("read again"))
    ShardSet(folder).check_once(tmp_path / "cache")
    os.utime(folder / "00000.tokens.npy", ns=(1, 1))
    with pytest.raises(pytest.fail.Exception):
        ShardSet(folder).check_once(tmp_path / "cache")


@pytest.mark.parametrize(
    "content", ["", "{}", '{"version": 2}', '{"version": 2, "tokenizer": {}, "dtype": 1, "shards": 1}', "[]"]
)
def test_a_damaged_list_is_refused_by_name(folder, content):
    (folder / LIST).write_text(content)
    with pytest.raises(ValueError, match=r"shards.json (cannot be read|has the format version None|holds no JSON object)"):
        ShardSet(folder)


def test_a_build_that_was_cut_short_is_no_data_set(folder, tmp_path):
    (folder / LIST).unlink()
    with pytest.raises(ValueError, match=rf"set holds shards but no {LIST}: it was lost, or the build did not end"):
        Corpus.load(DataConfig(path=str(folder), cache_dir=str(tmp_path / "cache")))
    assert build(texts(300), folder, fake(), "x", shard_tokens=2000)


# ------------------------------------------------------------------------------------------------------------- corpus


def load(folder, cache_dir, **changes):
    return Corpus.load(DataConfig(path=str(folder), cache_dir=str(cache_dir), held_out_percent=10, **changes))


def test_a_corpus_of_shards_has_all_texts_each_in_one_split(program, tmp_path):
    corpus = load(program, tmp_path)
    found = {s: {corpus.tokenizer.decode(d.tolist()[:-1]) for d in corpus.documents[s]} for s in SPLITS}
    assert set().union(*found.values()) == {*paragraphs(80), "A text of its own.\n"}
    assert sum(map(len, found.values())) == 81
    assert {s: {bucket(t) // 10 for t in found[s]} for s in ("val", "test")} == {"val": {0}, "test": {1}}
    assert corpus.tokenizer.n_vocab == 512


def test_batches_are_functions_of_seed_and_step_and_ranks_take_rows_of_one_batch(program, tmp_path):
    """Two processes that open the shards anew make the same batch at any step, so each can keep its own rows of it."""
    config = dataclasses.replace(PRESETS["smoke"], data=DataConfig(text_share=1.0))
    ranks = [load(program, tmp_path) for _ in range(2)]
    assert ranks[0].key == ranks[1].key
    for make in (pretrain_batch, rlp_batch):
        for step in (700, 3):
            whole, again = (make(corpus, config, step) for corpus in ranks)
            assert all(torch.equal(whole[k], again[k]) for k in whole)
            assert not torch.equal(whole[next(iter(whole))], make(ranks[0], config, step + 1)[next(iter(whole))])


def test_nothing_of_the_documents_is_held_but_memory_maps(program, tmp_path):
    corpus = load(program, tmp_path)
    for documents in corpus.documents.values():
        assert isinstance(documents, Documents)
        mapped = [array for part in documents.parts for array in part]
        assert all(isinstance(array, np.memmap) and array.mode == "r" for array in mapped)
        assert documents.tokens_before.nbytes + documents.documents_before.nbytes < 20 * (len(documents.parts) + 1)


def test_memory_does_not_grow_with_the_data(tmp_path):
    """27 million tokens (55 MB) and half a million documents (4 MB of starts): a thousand reads allocate less than 1 MiB
    at any time; a copy of the tokens, or of the starts, would be more. Pages of the map are the system's.
    """
    long, short = [7] * 639, [7] * 3
    lengths = [str(i) for i in range(40_000)] + ["x" + str(i) for i in range(460_000)]
    tokenizer = fake(encode=lambda t: short if t[0] == "x" else long)
    build(lengths, tmp_path / "set", tokenizer, "x", shard_tokens=2**22)
    documents = ShardSet(tmp_path / "set").documents(range(100))
    assert documents.n_tokens > 27e6
    rng = random.Random(0)
    tracemalloc.start()
    try:
        for _ in range(1000):
            documents.window(rng, 64)
            documents.position(rng, 64, 2)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_another_tokenizer_is_refused_and_a_damaged_one_too(program, tmp_path, monkeypatch):
    other = Corpus.load(DataConfig(vocab_size=300, cache_dir=str(tmp_path))).tokenizer
    monkeypatch.setattr("text.shards.named_tokenizer", lambda name: other)
    with pytest.raises(ValueError, match=r"data.tokenizer \(gpt2\) is not the one that .*set was built with \(corpus, "):
        load(program, tmp_path, tokenizer="gpt2")
    own = FileTokenizer(program / "hf")
    (program / "hf" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json .*cannot be read"):
        load(program, tmp_path)
    other.save(program / "hf")
    with pytest.raises(ValueError, match=r"the tokenizer in .*set is not the one"):
        load(program, tmp_path)
    own.save(program / "hf")


def test_too_few_documents_are_refused(tmp_path, program):
    (tmp_path / "a.txt").write_text("One text only.\n")
    assert shards_program.main(["build", str(tmp_path), "--out", str(tmp_path / "set"), "--vocab-size", "400"]) == 0
    with pytest.raises(ValueError, match=r"leaves no document for the \w+ split; add documents or raise"):
        load(tmp_path / "set", tmp_path)


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("One text only.\n")
    assert shards_program.main(["build", str(tmp_path), "--out", str(tmp_path / "set"), "--vocab-size", "2"]) == 2
    assert "vocab-size (2) must be at least 300" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_a_run_on_shards_trains_measures_resumes_and_is_found_again(program, tmp_path):
    words = ["--preset", "smoke", "--mode", "pretrain", "--data.path", str(program), "--data.cache-dir", str(tmp_path),
             "--data.held-out-percent", "10", "--out", str(tmp_path / "run")]  # fmt: skip
    assert train.main([*words, "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()
    assert train.main(words) == 0
    assert train.main([*words, "--resume"]) == 0
    model, tokenizer, _ = rundir.load_run(tmp_path / "run")
    assert model.config.vocab_size == tokenizer.n_vocab == 512


def test_building_refuses_what_it_would_not_read(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("text " * 100)
    build_it = ["build", str(tmp_path / "t.txt"), "--out", str(tmp_path / "out")]
    assert shards_program.main([*build_it, "--tokenizer", "gpt2", "--vocab-size", "400"]) == 2
    assert "vocab-size (400) is for tokenizer corpus" in capsys.readouterr().err
    assert shards_program.main(["build", "--out", str(tmp_path / "out")]) == 2
    assert "no input is named" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
