"""Runs that begin with a Hugging Face directory: its shape, its tokenizer, its weights, and the way back out."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import hf_models
import pytest
import torch
from conftest import paragraphs
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM, Qwen3Config, Qwen3ForCausalLM

import generate
import train
from evals import text_losses
from system import checkpoint, huggingface, rundir
from system.config import DataConfig, RLPConfig
from text.batches import Position, collate_contexts, pretrain_batch
from text.corpus import Corpus
from text.problems import FAMILIES, tokenizer_examples
from text.tokenizer import CLOSE, END, THINK, FileTokenizer
from thoughts import show_thought
from tools import export, extract

EXACT = {"rtol": 0, "atol": 0}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7031645\n"
WITHOUT_A = Tokenizer(models.BPE({"b": 0, END: 1}, [])).to_str()
WITHOUT_UNKNOWN = Tokenizer(models.WordLevel({"b": 0, END: 1}, unk_token="[UNK]")).to_str()
TAGGED = "a b <think> c </think> d <|endoftext|> e"


def write_tokenizer(folder, tags=(), begins=False, vocab_size=400):
    """A byte-level vocabulary in the manner of Qwen's: digits stand alone, a space before a number is a token."""
    made = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2 - len(tags),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    made.train_from_iterator(paragraphs(3) + tokenizer_examples(25, FAMILIES)[:500], trainer)
    made.add_special_tokens([END])
    made.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return made.get_vocab_size()


def write_model(folder, n_rows, end):
    """A tiny Qwen3 with tied embeddings, of so many rows."""
    sizes = hf_models.SIZES | hf_models.HEADS | {"vocab_size": n_rows, "hidden_size": 16, "eos_token_id": end}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **hf_models.rope(1e4), tie_word_embeddings=True)).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A directory whose tokenizer lacks the tags, and whose model has exactly the tokenizer's rows."""
    folder = tmp_path_factory.mktemp("models") / "hf"
    n_vocab = write_tokenizer(folder)
    write_model(folder, n_vocab, n_vocab - 1)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Options of a run on a user's text, with a cache of its own."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("".join(paragraphs(20)))
    return ["--preset", "smoke", "--data.path", str(folder / "text.txt"), "--data.held-out-percent", "25",
            "--data.cache-dir", str(folder / "cache"), "--rlp.horizon", "2"]  # fmt: skip


@pytest.fixture
def program(words, tmp_path):
    """`python train.py ... --out tmp/NAME`: the exit code."""

    def run(name, *more):
        return train.main([*words, "--out", str(tmp_path / name), *map(str, more)])

    return run


@pytest.fixture(scope="module")
def finished(words, hf, tmp_path_factory):
    """An RLP run that began with the directory."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main([*words, "--init", str(hf), "--out", str(out)]) == 0
    return out


def trained(run_dir):
    return checkpoint.newest(run_dir).tensors("model")


def test_a_run_is_not_written_over_a_model(program, hf, tmp_path, capsys):
    """Its config.json would be lost, and with it the model."""
    shutil.copytree(hf, tmp_path / "copy")
    before = {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()}
    for more in (["--init", tmp_path / "copy"], [], ["--resume"]):
        assert program("copy", *more) == 2
        said = " ".join(capsys.readouterr().out.split())
        assert "holds a config.json that no run wrote, such as that of a Hugging Face directory; choose another" in said
    assert {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()} == before


def test_the_tokenizer_of_a_larger_model_is_warned_of(program, hf, tmp_path, capsys):
    """Of 100 tokens more than the model has rows; the directory's own lacks the two tags alone."""
    larger = tmp_path / "larger"
    shutil.copytree(hf, larger)
    own = Tokenizer.from_file(str(larger / "tokenizer.json"))
    own.add_tokens([f"|x{i}|" for i in range(100)])
    own.save(str(larger / "tokenizer.json"))
    for init, warned in ((hf, False), (larger, True)):
        capsys.readouterr()
        steps = ("--warmup.steps", 0, "--rlp.steps", 0)
        assert program(f"of_{init.name}", "--init", init, *steps) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("the tokenizer has 100 tokens that the weights have no rows for" in said) == warned


# ----------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(("letters", "said"), [("ab ", []), ("abcde ", ["loses 50%"]), ("cdef", None)])
def test_a_tokenizer_that_drops_letters_is_said_or_refused(tmp_path, letters, said):
    """It knows a, b, spaces, and the end of a text. A byte-level one drops nothing."""
    (tmp_path / "tk").mkdir()
    known = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["a", "b", " ", END])}, []))
    known.decoder = decoders.Fuse()
    known.save(str(tmp_path / "tk" / "tokenizer.json"))
    write_tokenizer(tmp_path / "whole")
    draws = random.Random(0)
    pieces = ["".join(draws.choices(letters, k=2500)) for _ in range(120)]
    (tmp_path / "text.txt").write_text("\n\n".join(pieces))
    config = DataConfig(path=str(tmp_path / "text.txt"), held_out_percent=25, tokenizer=str(tmp_path / "tk"),
                        cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert not Corpus.load(dataclasses.replace(config, tokenizer=str(tmp_path / "whole"))).notes
    if said is None:
        with pytest.raises(ValueError, match=r"data.tokenizer \(.*tk\) makes no tokens of the \w+ split; give"):
            Corpus.load(config)
    else:
        notes = Corpus.load(config).notes
        assert len(notes) == len(said)
        assert all(part in note for part, note in zip(said, notes, strict=True))


@pytest.mark.parametrize("tags", [(), (THINK,), (THINK, CLOSE)], ids=len)
def test_the_tags_are_the_tokenizers_own_or_new_tokens_after_its_last(tmp_path, tags):
    n_before = write_tokenizer(tmp_path, tags)
    tk = FileTokenizer(tmp_path)
    assert tk.n_vocab == n_before + 2 - len(tags)
    assert list(tk.new_ids) == list(range(n_before, tk.n_vocab))
    assert len({tk.think, tk.close, tk.end}) == 3
    assert tk.decode([tk.think, *tk.encode(" so"), tk.close, tk.end]) == f"{THINK} so{CLOSE}{END}"
    assert tk.tags == (tk.think, tk.close)


@pytest.mark.parametrize("tags", [(), (THINK, CLOSE)], ids=len)
def test_special_tokens_spelled_in_a_text_are_text(tmp_path, tags):
    write_tokenizer(tmp_path, tags, begins=True)
    tk = FileTokenizer(tmp_path)
    assert not {tk.think, tk.close, tk.end} & set(tk.encode(TAGGED))
    assert tk.decode(tk.encode(TAGGED)) == TAGGED
    assert tk.decode([5, tk.n_vocab + 3]) == tk.decode([5])


def test_a_saved_tokenizer_is_the_same_and_has_no_new_tokens(tmp_path):
    write_tokenizer(tmp_path / "a", begins=True)
    (tmp_path / "a" / "config.json").write_text('{"eos_token_id": [3, 5]}')
    first = FileTokenizer(tmp_path / "a")
    first.save(tmp_path / "b")
    again = FileTokenizer(tmp_path / "b")
    assert (again.tags, again.end, again.begin, again.n_vocab) == (first.tags, 3, (0,), first.n_vocab)
    assert (first.new_ids, again.new_ids) == ((399, 400), ())
    assert again.encode(TAGGED) == first.encode(TAGGED)


@pytest.mark.parametrize(
    ("config", "generation", "ends"), [(None, 7, [7]), (5, [5, 7], [5, 7]), ([5, 7], [7, 3], [5, 7, 3]), ([], [], None)]
)
def test_what_ends_a_text_are_the_ids_of_both_files(tmp_path, config, generation, ends):
    """Those of config.json first. A copy, which has one file, knows them all."""
    write_tokenizer(tmp_path / "a")
    for name, eos in (("config", config), ("generation_config", generation)):
        (tmp_path / "a" / f"{name}.json").write_text(json.dumps({"eos_token_id": eos}))
    first = FileTokenizer(tmp_path / "a")
    assert list(first.ends) == (ends or [first.file.token_to_id(END)])
    assert first.end == first.ends[0]
    first.save(tmp_path / "b")
    assert FileTokenizer(tmp_path / "b").ends == first.ends


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer.json": None}, r"tokenizer.json does not exist; a model of Hugging Face needs the tokenizer"),
        ({"tokenizer.json": "{"}, r"tokenizer.json cannot be read as JSON \(.*\); copy it again"),
        ({"tokenizer.json": "{}"}, r"tokenizer.json cannot be read \(.*\); copy it again"),
        ({"tokenizer.json": POINTER}, r"tokenizer.json is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        ({"tokenizer.json": WITHOUT_A}, r"tokenizer.json has no token for the letter a, nor one for what it does not know"),
        ({"tokenizer.json": WITHOUT_UNKNOWN}, r"tokenizer.json has no token for the letter a, nor one for what it does"),
        ({"config.json": "{"}, r"config.json cannot be read as JSON \(.*\); copy it again"),
        ({"generation_config.json": "[]"}, r"generation_config.json holds no JSON object; copy it again"),
        (
            {"generation_config.json": '{"eos_token_id": [3, -1]}'},
            r"generation_config.json: eos_token_id \(-1\) is none of",
        ),
        ({"config.json": '{"eos_token_id": "</s>"}'}, r"eos_token_id \('</s>'\) is none of the 401 tokens of .*; mend it"),
        ({"config.json": '{"eos_token_id": [[3]]}'}, r"eos_token_id \(\[3\]\) is none of the 401 tokens"),
        ({"config.json": '{"eos_token_id": true}'}, r"eos_token_id \(True\) is none of the 401 tokens"),
        ({"config.json": '{"eos_token_id": 5000}'}, r"eos_token_id \(5000\) is none of the 401 tokens of .*tokenizer.json"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused_by_file(tmp_path, files, said):
    write_tokenizer(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text) if text is not None else (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=said):
        FileTokenizer(tmp_path)


def test_truncation_and_padding_are_switched_off_in_the_copy_of_a_run_too(tmp_path):
    """The vocabulary is the same, so the tokens are those of the file without either."""
    write_tokenizer(tmp_path / "plain")
    write_tokenizer(tmp_path / "cut")
    made = Tokenizer.from_file(str(tmp_path / "cut" / "tokenizer.json"))
    made.enable_truncation(12)
    made.enable_padding(length=16)
    made.save(str(tmp_path / "cut" / "tokenizer.json"))
    first = FileTokenizer(tmp_path / "cut")
    first.save(tmp_path / "copy")
    text = "one two three " * 20
    expected = FileTokenizer(tmp_path / "plain").encode(text)
    assert len(expected) > 16
    assert first.encode(text) == FileTokenizer(tmp_path / "copy").encode(text) == expected
    copied = Tokenizer.from_file(str(tmp_path / "copy" / "tokenizer.json"))
    assert copied.truncation is copied.padding is None
    assert first.fingerprint == FileTokenizer(tmp_path / "plain").fingerprint


def vocabulary_of_pieces(folder):
    """In the manner of Llama 2: every text begins with a space, and a piece with the space before it."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    words = list("abcdefghijklmnopqrstuvwxyzAnswr:?0123456789\n\u2581")
    trainer = trainers.BpeTrainer(vocab_size=90, initial_alphabet=words, special_tokens=["<unk>", END], show_progress=False)
    made.train_from_iterator(["an answer", "the end"], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))


def pieces_of_metaspace(folder):
    """The same by the step before the model, as newer files have it."""
    vocabulary_of_pieces(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False}
    (folder / "tokenizer.json").write_text(json.dumps(content | {"normalizer": None, "pre_tokenizer": step}))


@pytest.mark.parametrize("write", [vocabulary_of_pieces, pieces_of_metaspace])
def test_a_text_in_parts_has_no_space_that_it_lacks(tmp_path, write):
    """A tokenizer that puts a space before every text does not put one before what goes on with one, or with a line."""
    write(tmp_path)
    tk = FileTokenizer(tmp_path)
    assert tk.encode("Answer: 7\n3 5") == tk.encode("Answer:") + tk.encode(" 7") + tk.encode("\n3 5")
    assert tk.encode("a") == tk.encode(" a")  # at the beginning there is one


def test_a_tag_that_is_an_ordinary_word_is_refused(tmp_path):
    """Text that spells it would become the tag."""
    words = {"[UNK]": 0, "a": 1, THINK: 2, CLOSE: 3, END: 4}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"makes the control token of a <think> that stands in a text"):
        FileTokenizer(tmp_path)


def test_halves_of_surrogate_pairs_become_replacement_characters(tmp_path):
    write_tokenizer(tmp_path)
    tk = FileTokenizer(tmp_path)
    assert tk.decode(tk.encode("a\ud800b\udcff")) == "a\ufffdb\ufffd"


def test_a_tokenizer_that_knows_no_end_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace(END, "<|pad|>"))
    with pytest.raises(ValueError, match=r"config.json has no eos_token_id and .*tokenizer.json no <\|endoftext\|>"):
        FileTokenizer(tmp_path)


def test_the_encoded_text_is_kept_by_the_content_of_tokenizer_json(tmp_path, text_file):
    """The same folder with another vocabulary is another corpus; the same vocabulary elsewhere is the same one."""
    config = DataConfig(
        path=str(text_file), tokenizer=str(tmp_path / "tk"), held_out_percent=25, cache_dir=str(tmp_path / "c")
    )
    write_tokenizer(tmp_path / "tk")
    first = Corpus.load(config)
    shutil.copytree(tmp_path / "tk", tmp_path / "copy")
    write_tokenizer(tmp_path / "tk", vocab_size=300)
    second = Corpus.load(config)
    third = Corpus.load(dataclasses.replace(config, tokenizer=str(tmp_path / "copy")))
    assert first.key == third.key != second.key
    texts = [c.tokenizer.decode(c.documents["test"][0].tolist()) for c in (first, second, third)]
    assert texts[0] == texts[1] == texts[2]
    assert len(second.documents["test"][0]) > len(first.documents["test"][0])


@torch.no_grad()
def test_what_begins_a_document_stands_before_every_document_and_context(tmp_path, text_file, make_model):
    write_tokenizer(tmp_path / "tk", begins=True)
    config = dataclasses.replace(
        train.PRESETS["smoke"],
        data=DataConfig(path=str(text_file), tokenizer=str(tmp_path / "tk"), held_out_percent=25, cache_dir=str(tmp_path)),
    )
    corpus = Corpus.load(config.data)
    assert corpus.tokenizer.begin == (0,)
    batch = pretrain_batch(corpus, config, 3)
    starts = torch.cat([torch.ones(4, 1, dtype=torch.bool), batch["ids_BT"].diff(dim=1) != 0], dim=1)
    assert (batch["tokens_BT"][starts] == 0).all()
    assert (batch["tokens_BT"][~starts] != 0).all()
    contexts = collate_contexts(corpus.tokenizer, [Position([5], [1]), Position([6, 7], [1])], config.rlp)["context_BT"]
    assert contexts.tolist() == [[corpus.tokenizer.end, 0, 5], [0, 6, 7]]
    model = make_model(vocab_size=corpus.tokenizer.n_vocab)
    losses, _ = text_losses(model, corpus, config)
    corpus.tokenizer.begin = ()
    without, _ = text_losses(model, corpus, config)
    assert len(losses) == len(without)
    assert not torch.equal(losses, without)


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("mode", ["pretrain", "rlp", "cpt"])
def test_every_mode_begins_with_the_directorys_weights(program, hf, tmp_path, mode):
    """Two rows for the tags come after them: the mean of the others. Settings of the model that differ are replaced."""
    plain = () if mode == "pretrain" else ("--warmup.steps", 0)
    assert program("run", "--mode", mode, "--init", hf, f"--{mode}.steps", 0, *plain, "--model.d-model", 64) == 0
    _, expected = huggingface.load_hf(hf)
    found = trained(tmp_path / "run")
    rows_VD = expected.pop("embed.weight")
    assert_close(found.pop("embed.weight"), torch.cat([rows_VD, rows_VD.mean(0).expand(2, -1)]), **EXACT)
    assert_close(found, expected, **EXACT)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert saved["model"]["pattern"] == "*-*-*-"
    assert (saved["model"]["d_model"], saved["model"]["vocab_size"]) == (16, len(rows_VD) + 2)
    assert saved["data"]["tokenizer"] == str(hf)


@pytest.mark.parametrize(
    ("mode", "more", "warned"),
    [("cpt", (), True), ("cpt", ("--warmup.gap", 0), False), ("cpt", ("--cpt.no-thoughts",), False), ("rlp", (), False)],
)
def test_thoughts_in_text_that_a_model_was_not_warmed_up_for_are_told(program, hf, capsys, mode, more, warned):
    """Where the mode reads the warm-up's mixture."""
    words = "--mode", mode, "--init", hf, f"--{mode}.steps", 0, "--warmup.steps", 0, *more
    assert program("run", *words) == 0
    assert ("--warmup.gap 0 leaves them out" in " ".join(capsys.readouterr().out.split())) == warned


def test_another_tokenizer_than_that_of_the_weights_is_refused(program, hf, capsys):
    assert program("run", "--mode", "cpt", "--init", hf, "--data.tokenizer", "gpt2") == 2
    assert "data.tokenizer (gpt2) is not read where init brings one" in " ".join(capsys.readouterr().out.split())


def test_an_rlp_run_trains_measures_and_keeps_its_tokenizer(finished, hf):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["gain_nats"]["frozen_base"]["n"] == 16
    assert Path(summary["base_dir"]).parent == finished  # warmed up first
    assert Path(summary["base_dir"]).name.startswith("warmed-")
    assert {p.name for p in (finished / "hf").iterdir()} == {"tokenizer.json", "config.json"}
    assert not torch.equal(
        trained(finished)["layers.0.mixer.q_proj.weight"], huggingface.load_hf(hf)[1]["layers.0.mixer.q_proj.weight"]
    )
    assert THINK in (finished / "samples.txt").read_text()


def test_a_run_goes_on_without_the_directory_that_it_began_with(finished, words, tmp_path, capsys):
    """To talk, and as the start of another run, whose tags are then no new tokens."""
    run = shutil.copytree(finished, tmp_path / "moved")
    config = json.loads((run / "config.json").read_text())
    config["config"]["data"]["tokenizer"] = config["config"]["init"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    assert generate.main([str(run), "Tens digit of 12 + 34?\nAnswer:", "--thought-len", "4"]) == 0
    assert "Answer:<think>" in capsys.readouterr().out
    assert (
        train.main(
            [
                *words,
                "--mode",
                "cpt",
                "--init",
                str(run),
                "--out",
                str(tmp_path / "next"),
                "--cpt.steps",
                "0",
                "--warmup.steps",
                "0",
            ]
        )
        == 0
    )
    assert_close(trained(tmp_path / "next"), trained(run), **EXACT)


def test_a_dry_run_shows_the_directorys_shape(program, hf, tmp_path, capsys):
    assert program("run", "--init", hf, "--dry-run") == 0
    assert '"pattern": "*-*-*-"' in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_generate_talks_to_the_directory_itself(hf, capsys):
    assert generate.main([str(hf), "Tens digit of 12 + 34?\nAnswer:", "--thought-len", "4"]) == 0
    assert "Answer:<think>" in capsys.readouterr().out


def test_resuming_such_a_run_is_possible_and_another_directory_is_refused(program, finished, hf, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(hf, tmp_path / "elsewhere")
    assert program("run", "--init", hf, "--resume") == 0
    assert program("run", "--init", tmp_path / "elsewhere", "--resume") == 2
    assert "data.tokenizer was" in " ".join(capsys.readouterr().out.split())


@torch.no_grad()
def test_an_export_of_a_run_is_what_it_trained_and_transformers_computes_the_same(finished, hf, tmp_path, capsys):
    """With its tokenizer, in which the tags are single tokens, and the ids that the directory came with."""
    out = tmp_path / "out"
    assert export.main([str(finished), "--out", str(out)]) == 0
    assert "(qwen3)" in capsys.readouterr().out
    assert_close(huggingface.load_hf(out)[1], trained(finished), **EXACT)
    settings = json.loads((out / "config.json").read_text())
    assert settings["eos_token_id"] == json.loads((hf / "config.json").read_text())["eos_token_id"]
    model, tk, _ = rundir.load_model(finished)
    assert (FileTokenizer(out).tags, FileTokenizer(out).new_ids) == (tk.tags, ())
    tokens_BT = torch.tensor([[tk.think, 5, 6, tk.close, 7, tk.end]])
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert_close(theirs(tokens_BT).logits, model.logits(model(tokens_BT)[0]), rtol=1e-4, atol=1e-4)
    assert export.main([str(finished), "--out", str(out)]) == 2


def test_an_export_in_bf16_has_the_rounded_weights(finished, tmp_path):
    assert export.main([str(finished), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert_close(found, trained(finished)["norm.weight"].bfloat16(), **EXACT)


def test_a_size_cut_out_of_an_elastic_run_goes_out_and_is_trained_on(words, tmp_path):
    """From Nemotron-H to layers of different widths, to Nemotron-H of one width, and to another run."""
    n_vocab = write_tokenizer(tmp_path / "hf")
    sizes = {"vocab_size": n_vocab, "eos_token_id": n_vocab - 1, "hidden_size": 16, "intermediate_size": 24}
    sizes |= {"mamba_head_dim": 8, "num_attention_heads": 8}
    NemotronHForCausalLM(NemotronHConfig(**hf_models.NEMOTRON | sizes)).save_pretrained(tmp_path / "hf")
    names = ("hf", "elastic", "half", "out", "rlp")
    hf, whole, half, out, rlp = (str(tmp_path / name) for name in names)
    assert train.main([*words, "--mode", "elastic", "--init", hf, "--out", whole, "--elastic.steps", "3"]) == 0
    assert extract.main([whole, "--budget", "0.5", "--out", half]) == 0
    assert export.main([half, "--out", out, "--widths", "padded"]) == 0
    model, tk, _ = rundir.load_model(Path(half))
    assert model.config.widths
    assert FileTokenizer(Path(out)).tags == tk.tags
    tokens_BT = torch.tensor([[1, 2, 3, tk.think, 5, tk.close] * 3])
    logits_BTV = AutoModelForCausalLM.from_pretrained(out)(tokens_BT).logits
    assert_close(logits_BTV, model.logits(model(tokens_BT)[0]), rtol=1e-3, atol=1e-5)
    assert logits_BTV.std() > 0.01
    assert (
        train.main([*words, "--mode", "rlp", "--init", half, "--out", rlp, "--rlp.steps", "0", "--warmup.steps", "0"]) == 0
    )
    assert_close(trained(Path(rlp)), trained(Path(half)), **EXACT)


def test_tags_that_the_tokenizer_has_keep_their_rows_and_unused_rows_get_the_tags(tmp_path):
    """A directory with more rows than tokens: the tags take the first of them, no row is added."""
    n_vocab = write_tokenizer(tmp_path / "a")
    write_model(tmp_path / "a", n_vocab + 7, n_vocab - 1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_tokenizer(tmp_path / "b", (THINK, CLOSE))
    rows_VD = huggingface.load_hf(tmp_path / "a")[1]["embed.weight"]
    (with_new, _, _), (with_own, _, _) = (rundir.load_model(tmp_path / name) for name in "ab")
    assert_close(with_own.embed.weight.data, rows_VD, **EXACT)
    changed = (with_new.embed.weight.data != rows_VD).any(dim=1).nonzero()[:, 0].tolist()
    assert changed == [n_vocab, n_vocab + 1]
    assert_close(with_new.embed.weight.data[n_vocab], rows_VD[:n_vocab].mean(0), **EXACT)


def test_a_directory_without_tokenizer_is_refused_by_file(program, hf, tmp_path, capsys):
    folder = shutil.copytree(hf, tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    assert program("run", "--init", folder) == 2
    assert f"{folder}/tokenizer.json does not exist" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("positions", "said", "horizon"),
    [
        ("answer", "answers take up to 2 tokens of this tokenizer: rlp.horizon is 2 instead of 1, so that", 2),
        ("random", "answers take up to 2 tokens of this tokenizer, and rlp.horizon (1) looks at the first; with", 1),
    ],
)
def test_the_horizon_is_that_of_the_answers_where_thoughts_stand_before_them(
    program, hf, tmp_path, capsys, positions, said, horizon
):
    words = ["--mode", "pretrain", "--init", hf, "--pretrain.steps", 0, "--rlp.horizon", 1, "--rlp.positions", positions]
    assert program("run", *words) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "run/config.json").read_text())["config"]["rlp"]["horizon"] == horizon


# ------------------------------------------------------------------------------------------------------------- prompt


def test_the_instruction_stands_before_every_context_and_none_is_cut_for_it(corpus):
    """On the left of it only padding; `context_len` counts the document's own tokens."""
    tk = corpus.tokenizer
    fit = RLPConfig(context_len=8, prompt="Think first.\n")
    before = tk.encode(fit.prompt)
    batch = collate_contexts(tk, [Position([1, 2], [3]), Position(list(range(10, 30)), [4])], fit)
    assert batch["context_BT"].tolist() == [[tk.end] * 6 + before + [1, 2], before + list(range(22, 30))]
    assert batch["ids_BT"].tolist() == [[-1] * 6 + [0] * (len(before) + 2), [0] * (len(before) + 8)]


def test_the_instruction_is_read_from_its_file_and_kept_with_the_run(program, words, tmp_path, capsys):
    file = tmp_path / "instruction.txt"
    file.write_text("Think first.\n", encoding="utf-8-sig")
    assert program("run", "--mode", "rlp", "--rlp.steps", 1, "--pretrain.steps", 1, "--rlp.prompt-file", file) == 0
    _, _, thinking = rundir.load_model(tmp_path / "run")
    assert thinking.prompt == "Think first.\n"
    file.write_text("Do not.\n")
    assert (
        program("run", "--mode", "rlp", "--rlp.steps", 1, "--pretrain.steps", 1, "--rlp.prompt-file", file, "--resume") == 2
    )
    assert "rlp.prompt was Think first." in capsys.readouterr().out
    file.unlink()
    assert program("other", "--rlp.prompt-file", file) == 2
    assert f"rlp.prompt_file ({file}) cannot be read as UTF-8 text" in capsys.readouterr().out


def test_the_instruction_changes_what_a_shown_thought_is_sampled_from(corpus, make_model):
    model = make_model(vocab_size=corpus.tokenizer.n_vocab, tie_embeddings=False).float()
    settings = [RLPConfig(thought_len=12, temperature=1.0, prompt=text) for text in ("", "Think.")]
    plain, led = (show_thought(model, corpus.tokenizer, "Tom", c, 0) for c in settings)
    assert plain != led


def test_the_instruction_that_ships_is_a_short_text():
    text = (Path(train.__file__).parent / "prompts" / "think.txt").read_text()
    assert len(text) < 400
    assert THINK in text
    assert CLOSE in text
