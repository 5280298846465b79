"""Shards: what comes out is what went in, windows as of a corpus in memory, every kind of damage by name."""

import dataclasses
import json
import os
import random
import resource

import numpy as np
import pytest
import torch
from conftest import paragraphs

import train
from system import rundir
from system.config import DataConfig
from system.presets import PRESETS
from text import shards
from text.batches import pretrain_batch, rlp_batch
from text.corpus import Corpus
from text.held_out import SPLITS, bucket_of
from text.shards import HEADER_BYTES, LIST, Documents, ShardSet, build, read_documents
from text.tokenizer import FileTokenizer
from tools import shards as shards_program

TOKENIZER = {"source": "x", "n_vocab": 300, "fingerprint": "abc"}
END = 256


def encode(text):
    return list(text.encode())


def texts(n, seed=0):
    """n different texts of 1 to 60 letters."""
    rng = random.Random(seed)
    return [f"{i} " + "".join(rng.choices("abcdef", k=rng.randrange(60))) for i in range(n)]


@pytest.fixture
def folder(tmp_path):
    """300 documents in several shards."""
    listed = build(texts(300), tmp_path / "set", encode, END, TOKENIZER, shard_tokens=2000)
    assert len(listed["shards"]) > 3
    return tmp_path / "set"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A folder that the program built from a *.jsonl and a *.txt file, with a vocabulary of its own."""
    tmp = tmp_path_factory.mktemp("shards")
    lines = [json.dumps({"text": p, "id": i}) + "\n" for i, p in enumerate(paragraphs(80))]
    (tmp / "in").mkdir()
    (tmp / "in" / "a.jsonl").write_text("".join(lines) + "\n")
    (tmp / "in" / "b.txt").write_text("A text of its own.\n")
    (tmp / "in" / "left.out").write_text("No text.\n")
    words = ["build", tmp / "in", "--out", tmp / "set", "--vocab-size", "512", "--shard-tokens", "30000"]
    assert shards_program.main([*map(str, words)]) == 0
    return tmp / "set"


# ----------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(("n_vocab", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_every_document_comes_back_once_in_the_bucket_of_its_text(tmp_path, n_vocab, dtype):
    build(texts(300), tmp_path / "set", encode, END, {**TOKENIZER, "n_vocab": n_vocab}, shard_tokens=2000)
    found = ShardSet(tmp_path / "set")
    assert {s.tokens.dtype.type for s in found.shards} == {dtype}
    for low, high in ((0, 100), (0, 1), (7, 31), (31, 100)):
        documents = found.documents(low, high)
        expected = sorted(t for t in texts(300) if low <= bucket_of(t) < high)
        assert all(d[-1] == END for d in documents)
        assert sorted(bytes(d[:-1].astype(np.uint8)).decode() for d in documents) == expected
        assert len(documents) == len(expected)
        assert documents.n_tokens == sum(len(t) + 1 for t in expected)
    found.check()


def test_copies_of_a_text_are_in_one_bucket_whatever_space_surrounds_them():
    assert bucket_of("a b\n") == bucket_of("  a b")
    assert len({bucket_of(t) for t in texts(2000)}) == 100


def test_a_window_is_what_the_same_documents_in_memory_give(folder):
    """Two routes: the binary search in memory maps, and the corpus that holds lists of arrays."""
    documents = ShardSet(folder).documents(10, 90)
    in_memory = Corpus(None, {"train": list(documents)}, 5)
    on_disk = Corpus(None, {"train": documents}, 5)
    for length in (1, 7, 40, 1000):
        for seed in range(60):
            windows = [c.text_window(random.Random(seed), "train", length) for c in (in_memory, on_disk)]
            assert windows[0].tolist() == windows[1].tolist()


def test_an_index_outside_is_refused_and_an_empty_split_is_empty(folder):
    documents = ShardSet(folder).documents(0, 100)
    for i in (-1, len(documents)):
        with pytest.raises(IndexError):
            documents[i]
    assert len(ShardSet(folder).documents(3, 3)) == 0


def test_the_bytes_of_a_shard_by_hand(tmp_path):
    """Two documents of 2 + 1 and 1 + 1 tokens: 5 x 2 bytes, 6 of zeros, and where they begin."""
    build(["ab", "c"], tmp_path / "set", encode, END, TOKENIZER)
    content = (tmp_path / "set" / "00000.shard").read_bytes()
    header = json.loads(content[:HEADER_BYTES])
    first, second = sorted(["ab", "c"], key=bucket_of)
    assert (header["magic"], header["version"], header["dtype"]) == ("token shard", 1, "uint16")
    assert (header["n_tokens"], header["n_documents"]) == (5, 2)
    assert np.frombuffer(content[HEADER_BYTES:][:10], np.uint16).tolist() == [*first.encode(), END, *second.encode(), END]
    assert content[HEADER_BYTES + 10 :][:6] == bytes(6)
    assert np.frombuffer(content[HEADER_BYTES + 16 :], np.int64).tolist() == [0, len(first) + 1, 5]


def test_building_again_gives_the_same_bytes(tmp_path, folder):
    build(texts(300), tmp_path / "again", encode, END, TOKENIZER, shard_tokens=2000)
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


# ------------------------------------------------------------------------------------------------------------- inputs


def test_long_files_are_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    text = "".join(f"line {i}\n" + "\n" * (i % 5 == 0) for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    pieces = list(read_documents([tmp_path / "a.txt"], piece=200))
    assert len(pieces) > 3
    assert "".join(pieces) == text
    assert all(p.endswith("\n\n") for p in pieces[:-1])


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"txt": "a"}\n', 'a.jsonl line 1 has no "text" that is a string'),
        ("a.jsonl", b'["text"]\n', 'a.jsonl line 1 has no "text" that is a string'),
        ("a.txt", b"fine\n\xff\xfe\n", "a.txt is not UTF-8 text"),
        ("a.txt", b" \n", "the inputs hold no text"),
        ("a.csv", b"a,b\n", "is or holds no *.jsonl and no *.txt file"),
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


def change_header(file, **changes):
    content = file.read_bytes()
    header = json.loads(content[:HEADER_BYTES]) | changes
    file.write_bytes(json.dumps(header).encode().ljust(HEADER_BYTES - 1) + b"\n" + content[HEADER_BYTES:])


DAMAGE = {
    "missing": (lambda f: f.unlink(), "is missing"),
    "empty": (lambda f: f.write_bytes(b""), "does not begin with a shard's header"),
    "zeros": (lambda f: f.write_bytes(bytes(9000)), "does not begin with a shard's header"),
    "cut in the header": (lambda f: f.write_bytes(f.read_bytes()[:100]), "does not begin with a shard's header"),
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "bytes instead of .*: it is cut short or damaged"),
    "longer": (lambda f: f.write_bytes(f.read_bytes() + b"a"), "bytes instead of .*: it is cut short or damaged"),
    "other magic": (lambda f: change_header(f, magic="x"), "does not begin with a shard's header"),
    "other version": (lambda f: change_header(f, version=2), "format version 2; this program reads 1"),
    "other tokenizer": (lambda f: change_header(f, tokenizer="x"), "tokens of the tokenizer x"),
    "other counts": (lambda f: change_header(f, n_tokens=1), "n_tokens is 1, in shards.json"),
    "other dtype": (lambda f: change_header(f, dtype="int8"), "header contradicts itself"),
    "other buckets": (lambda f: change_header(f, bucket_documents=[1] * 100), "header contradicts itself"),
    "other starts": (lambda f: f.write_bytes(f.read_bytes()[:-8] + bytes(8)), "documents do not cover its tokens"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_refused_with_its_name_what_is_wrong_and_a_remedy(folder, kind):
    damage, problem = DAMAGE[kind]
    damage(folder / "00001.shard")
    with pytest.raises(ValueError, match=rf"00001.shard.*{problem}") as refused:
        ShardSet(folder)
    assert "build again" in str(refused.value)


@pytest.mark.parametrize("at", [HEADER_BYTES, HEADER_BYTES + 999, -12])
def test_a_single_changed_byte_is_found_by_the_check_and_before_the_first_use(folder, tmp_path, capsys, at):
    content = bytearray((folder / "00002.shard").read_bytes())
    content[at] ^= 1
    ShardSet(folder).check_once(tmp_path / "cache")
    (folder / "00002.shard").write_bytes(content)
    assert shards_program.main(["check", str(folder)]) == 2
    assert "00002.shard is damaged: its content has another checksum" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"00002.shard is damaged"):
        ShardSet(folder).check_once(tmp_path / "cache")


def test_what_was_checked_is_not_read_again_until_it_changes(folder, tmp_path, monkeypatch):
    found = ShardSet(folder)
    found.check_once(tmp_path / "cache")
    monkeypatch.setattr(shards.Shard, "check", lambda _: pytest.fail("read again"))
    ShardSet(folder).check_once(tmp_path / "cache")
    os.utime(folder / "00000.shard", ns=(1, 1))
    with pytest.raises(pytest.fail.Exception):
        ShardSet(folder).check_once(tmp_path / "cache")


@pytest.mark.parametrize("content", ["", "{}", '{"magic": "x", "version": 1}', "[]"])
def test_a_damaged_list_is_refused_by_name(folder, content):
    (folder / LIST).write_text(content)
    with pytest.raises(ValueError, match=r"shards.json cannot be read"):
        ShardSet(folder)


def test_a_build_that_was_cut_short_is_no_data_set(folder, tmp_path):
    (folder / LIST).unlink()
    with pytest.raises(ValueError, match=rf"set holds shards but no {LIST}: it was lost, or the build did not end"):
        Corpus.load(DataConfig(path=str(folder), cache_dir=str(tmp_path / "cache")))
    assert build(texts(300), folder, encode, END, TOKENIZER, shard_tokens=2000)


# ------------------------------------------------------------------------------------------------------------- corpus


def load(folder, cache_dir, **changes):
    return Corpus.load(DataConfig(path=str(folder), cache_dir=str(cache_dir), held_out_percent=10, **changes))


def test_a_corpus_of_shards_has_all_texts_each_in_one_split(program, tmp_path):
    corpus = load(program, tmp_path)
    found = {s: {corpus.tokenizer.decode(d.tolist()[:-1]) for d in corpus.documents[s]} for s in SPLITS}
    assert set().union(*found.values()) == {*paragraphs(80), "A text of its own.\n"}
    assert sum(map(len, found.values())) == 81
    assert {s: {bucket_of(t) // 10 for t in found[s]} for s in ("val", "test")} == {"val": {0}, "test": {1}}
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
        held = [v for s in documents.shards for v in vars(s).values() if isinstance(v, np.ndarray)]
        held += [documents.first, documents.token_starts, documents.document_starts]
        assert sum(v.nbytes for v in held if not isinstance(v, np.memmap)) < 1000 * (len(documents.shards) + 1)
        assert all(v.mode == "r" for v in held if isinstance(v, np.memmap))


def test_memory_does_not_grow_with_the_data(tmp_path):
    """27 million tokens (55 MB) and half a million documents: a thousand windows raise the peak by less than 16 MiB, pages
    of the map included; one copy of the tokens, or of `starts` every time, would be more.
    """
    long, short = [7] * 639, [7] * 3
    lengths = [str(i) for i in range(40_000)] + ["x" + str(i) for i in range(460_000)]
    build(lengths, tmp_path / "set", lambda t: short if t[0] == "x" else long, END, TOKENIZER, shard_tokens=2**22)
    documents = ShardSet(tmp_path / "set").documents(0, 100)
    assert documents.n_tokens > 27e6
    before, rng = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, random.Random(0)
    traced = [documents.window(rng, 64) for _ in range(1000)]
    assert len(traced) == 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 2**10


def test_another_tokenizer_is_refused_and_a_damaged_one_too(program, tmp_path, monkeypatch):
    other = Corpus.load(DataConfig(vocab_size=300, cache_dir=str(tmp_path))).tokenizer
    monkeypatch.setattr("text.corpus.named_tokenizer", lambda name: other)
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


def test_a_run_on_shards_trains_measures_resumes_and_is_found_again(program, tmp_path):
    words = ["--preset", "smoke", "--mode", "pretrain", "--data.path", str(program), "--data.cache-dir", str(tmp_path),
             "--data.held-out-percent", "10", "--out", str(tmp_path / "run")]  # fmt: skip
    assert train.main([*words, "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()
    assert train.main(words) == 0
    assert train.main([*words, "--resume"]) == 0
    model, tokenizer, _ = rundir.load_run(tmp_path / "run")
    assert model.config.vocab_size == tokenizer.n_vocab == 512
