"""Checkpoints come back exactly, and whatever damage is found is named and passed over."""

import json
import pickle
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from system.checkpoint import KEEP, _write_shards, load_weights, newest, save
from system.files import sha256


def network(seed=0, width=3):
    torch.manual_seed(seed)
    return nn.Linear(width, 2)


def optimizer_state(seed=0):
    """AdamW's state after one step."""
    net = network(seed)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def write(run_dir, *steps, **meta):
    """A checkpoint for each step; its weights have the step as seed."""
    for step in steps:
        save(run_dir, step, {"model": network(step), "teacher": network(step + 1000)}, [optimizer_state(step)], meta)
    return run_dir / "checkpoint" / f"step_{steps[-1]:06d}"


def step_and_weights(found):
    return found.meta["step"], found.tensors("model")["weight"].tolist()


# ------------------------------------------------------------------------------------------------------------- intact


def test_networks_optimizer_and_meta_come_back_exactly(tmp_path):
    write(tmp_path, 7, config={"seed": 3})
    found = newest(tmp_path)
    assert (found.meta["step"], found.meta["config"], found.warning) == (7, {"seed": 3}, "")
    for name, seed in (("model", 7), ("teacher", 1007)):
        torch.testing.assert_close(found.tensors(name), dict(network(seed).state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(found.optimizer(), [optimizer_state(7)], rtol=0, atol=0)


def test_the_newest_is_the_one_of_the_highest_step(tmp_path):
    write(tmp_path, 999_999, 1_000_000)
    assert newest(tmp_path).meta["step"] == 1_000_000


def test_only_the_last_ones_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 4)
    assert [p.name for p in sorted((tmp_path / "checkpoint").iterdir())] == [f"step_{n:06d}" for n in range(5 - KEEP, 5)]


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 5, note="first")
    write(tmp_path, 5, note="second")
    assert newest(tmp_path).meta["note"] == "second"


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "missing") is None


# ------------------------------------------------------------------------------------------------------------- damage


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "name", "said"),
    [
        (truncate, "model.safetensors", r"bytes instead of \d+ \(truncated\)"),
        (truncate, "optimizer.pt", r"bytes instead of \d+ \(truncated\)"),
        (flip_a_bit, "teacher.safetensors", "does not match its checksum"),
        (Path.unlink, "teacher.safetensors", "is missing"),
        (Path.unlink, "meta.json", ""),
        (truncate, "meta.json", ""),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, harm, name, said):
    path = write(tmp_path, 1, 2)
    harm(path / name)
    found = newest(tmp_path)
    assert step_and_weights(found) == (1, network(1).weight.tolist())
    named = path / name if name != "meta.json" else f"{path} has no readable meta.json"
    assert str(named) in found.warning
    assert f"going on from {found.path} instead" in found.warning
    assert re.search(said, found.warning)


def test_if_all_are_damaged_all_are_named(tmp_path):
    paths = [write(tmp_path, step) for step in (1, 2)]
    for path in paths:
        truncate(path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"no usable checkpoint in {tmp_path}: {paths[1]}.*{paths[0]}.*train again"):
        newest(tmp_path)


def test_a_crash_before_the_rename_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    """And the next save is not disturbed by what the crash left behind."""
    write(tmp_path, 1)

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2)
    assert (tmp_path / "checkpoint" / "step_000002.partial").is_dir()
    assert (newest(tmp_path).meta["step"], newest(tmp_path).warning) == (1, "")
    write(tmp_path, 2)
    assert step_and_weights(newest(tmp_path)) == (2, network(2).weight.tolist())


def test_other_files_in_the_folder_are_ignored(tmp_path):
    path = write(tmp_path, 1)
    shutil.copytree(path, path.parent / "step_000009.backup")
    (path.parent / "notes.txt").write_text("mine")
    assert newest(tmp_path).meta["step"] == 1


class Malice:
    """Unpickling it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_reading_an_optimizer_never_runs_code(tmp_path):
    """The file is intact as far as its checksum goes: it was saved with the checkpoint."""
    mark = tmp_path / "ran"
    save(tmp_path, 1, {}, [Malice(mark)], {})
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        newest(tmp_path).optimizer()
    assert not mark.exists()
    torch.load(newest(tmp_path).path / "optimizer.pt", weights_only=False)
    assert mark.exists(), "the file would have run code"


# ------------------------------------------------------------------------------------------------------- into a model


def test_weights_are_loaded_exactly(tmp_path):
    write(tmp_path, 3)
    net = network(0)
    load_weights(net, newest(tmp_path).tensors("model"), tmp_path)
    torch.testing.assert_close(net.state_dict(), network(3).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": None}, "weight is missing"),
        ({"scale": torch.ones(2)}, "scale is unknown"),
        ({"weight": torch.ones(2, 4)}, r"weight has shape \[2, 4\], the model needs \[2, 3\]"),
        ({"weight": None, "bias": torch.ones(5), "a": torch.ones(1)}, "weight is missing; a is unknown; bias has shape"),
        ({f"w{i}": torch.ones(1) for i in range(8)}, "w4 is unknown and 3 more"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(change, said):
    net = network()
    before = net.weight.tolist()
    tensors = {k: v for k, v in {**network(1).state_dict(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=rf"RUN does not fit the model: .*{said}.*; use the settings it was made with"):
        load_weights(net, tensors, Path("RUN"))
    assert net.weight.tolist() == before


def test_meta_lists_every_file_with_its_size_and_checksum(tmp_path):
    path = write(tmp_path, 1)
    files = json.loads((path / "meta.json").read_text())["files"]
    assert set(files) | {"meta.json"} == {p.name for p in path.iterdir()}
    for name, entry in files.items():
        assert entry == {"bytes": (path / name).stat().st_size, "sha256": sha256(path / name)}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_shards_onto_a_full_disk_say_so_and_what_was_saved_stays(tmp_path):
    """No file may be longer than 4 KiB: the shards of the second checkpoint do not fit."""
    networks, optimizer = {"model": network(width=9000)}, [{"state": {}, "param_groups": []}]
    whole = save(tmp_path, 1, networks, optimizer, {})
    partial = tmp_path / "checkpoint" / "step_000002.partial"
    partial.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="is the disk full") as caught:
            _write_shards(partial, networks, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(partial)
    assert newest(tmp_path).path == whole
