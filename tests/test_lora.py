"""Adapters: the paper's equation, what is frozen and shared, and whole runs: resumed, merged, exported, gone on with."""

import copy

import pytest
import torch
from conftest import contents, disturb, metrics_of, press_ctrl_c, summary_of, tiny_model, weights_of
from safetensors.torch import load_file
from torch.testing import assert_close

import generate
import train
from kernels import token_logp
from rlp import ema_update
from system import checkpoint, loop, lora, parallel, rundir
from system.config import Config, LoRAConfig, ParallelConfig, PretrainConfig
from tools import export

SETTINGS = LoRAConfig(rank=3, alpha=6.0)
ALL_KINDS = {"pattern": "M*-", "ffn": "swiglu", "qkv_bias": True, "rope_theta": 1e4, "qk_norm": True}
N_MAPS = 2 + 4 + 3  # in_proj and out_proj; q, k, v and o; up, gate and down
TOKENS_BT = torch.arange(22).view(2, 11) % 12


def adapted(trained=True, **changes):
    """A tiny fp64 model with adapters; `trained`: B is not 0."""
    model = lora.adapt(tiny_model(**ALL_KINDS | changes), SETTINGS)
    for name, p in model.named_parameters():
        if trained and name.endswith("lora_b"):
            p.data.normal_()
    return model


def loss_of(model):
    hidden_BTD, _ = model(TOKENS_BT)
    return -token_logp(model.logits(hidden_BTD), TOKENS_BT.roll(-1, 1)).mean()


@pytest.fixture(autouse=True)
def alone():
    yield
    parallel.stop()


# ------------------------------------------------------------------------------------------------------- the equation


def test_a_map_with_an_adapter_by_hand():
    """W x = 2 x 5 - 3 = 7, A x = 5 + 4 x -3 = -7, B = 10, alpha / r = 3 / 1: 7 + 3 x 10 x -7 = -203."""
    base = torch.nn.Linear(2, 1, bias=False)
    made = lora.LoRALinear(base, LoRAConfig(rank=1, alpha=3.0))
    for p, value in ((made.weight, [[2.0, 1.0]]), (made.lora_a, [[1.0, 4.0]]), (made.lora_b, [[10.0]])):
        p.data = torch.tensor(value)
    assert made(torch.tensor([5.0, -3.0])).item() == -203


def test_gradients_of_every_adapter_are_those_of_the_merged_weight():
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW with s = alpha / r = 2, in fp64."""
    model = adapted()
    merged = tiny_model(**ALL_KINDS)
    merged.load_state_dict(lora.merged(model.state_dict(), SETTINGS.alpha))
    losses = [loss_of(network) for network in (model, merged)]
    assert_close(*losses, rtol=1e-12, atol=1e-12)
    for loss in losses:
        loss.backward()
    maps = {name: m for name, m in model.named_modules() if isinstance(m, lora.LoRALinear)}
    assert len(maps) == N_MAPS
    for name, m in maps.items():
        dweight = merged.get_parameter(f"{name}.weight").grad
        assert dweight.abs().max() > 1e-6
        assert_close(m.lora_b.grad, 2 * dweight @ m.lora_a.T, rtol=1e-9, atol=1e-12)
        assert_close(m.lora_a.grad, 2 * m.lora_b.T @ dweight, rtol=1e-9, atol=1e-12)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"{name}.lora_{pair}" for name in maps for pair in "ab"
    }


def test_training_begins_with_the_base_bit_for_bit():
    base, model = (m.float() for m in (tiny_model(**ALL_KINDS), adapted(trained=False)))
    assert torch.equal(base(TOKENS_BT)[0], model(TOKENS_BT)[0])
    assert model.layers[0].mixer.in_proj.lora_a.std() > 0.1


# ------------------------------------------------------------------------------------------------- frozen and shared


def test_only_adapters_train_by_adamw_whatever_rate_muon_has():
    model = adapted()
    (optimizer,) = loop.build_optimizers(model, PretrainConfig(muon_lr=0.02))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for name, p in model.named_parameters() if "lora_" in name}
    assert len(trained) == 2 * N_MAPS


def test_copies_share_what_is_frozen_and_the_teacher_is_a_mean_of_adapters():
    model = adapted()
    teacher = parallel.frozen_copy(model)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(1)
    ema_update(teacher, model, 0.75)
    for (name, p), q in zip(model.named_parameters(), teacher.parameters(), strict=True):
        assert (p.data_ptr() == q.data_ptr()) == ("lora_" not in name), name
        assert_close(q.data, before[name] + 0.25 * ("lora_" in name))
        assert not q.requires_grad


def test_a_copy_without_its_adapters_is_the_base_again():
    base, model = tiny_model(**ALL_KINDS), adapted()
    left = loss_of(model)
    reset = lora.reset(parallel.frozen_copy(model))
    assert torch.equal(loss_of(reset), loss_of(base))
    assert torch.equal(loss_of(model), left)


def test_recomputed_layers_give_the_same_gradients_and_train_adapters_alone():
    plain = adapted()
    parallel.start(ParallelConfig(activation_checkpointing=True), torch.device("cpu"))
    dressed = parallel.shard(adapted())
    dressed.load_state_dict(plain.state_dict())
    for network in (plain, dressed):
        loss_of(network).backward()
    for (name, p), q in zip(plain.named_parameters(), dressed.named_parameters(), strict=True):
        assert q[1].requires_grad == ("lora_" in name)
        assert p.grad is None is q[1].grad or torch.equal(p.grad, q[1].grad), name


def test_bf16_keeps_matrices_of_layers_once_in_bf16_and_everything_else_in_fp32():
    """Rollouts share them, figures (which are taken in fp32) and updates run on them."""
    parallel.start(ParallelConfig(dtype="bf16"), torch.device("cpu"))
    model = lora.adapt(tiny_model(**ALL_KINDS).float(), SETTINGS, low=True)
    low = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert len(low) == N_MAPS
    assert all(name.endswith("_proj.weight") for name in low)
    sampler = parallel.whole(model, for_sampling=True)
    assert all(sampler.get_parameter(n).data_ptr() == model.get_parameter(n).data_ptr() for n in low)
    exact = loss_of(model)
    with parallel.compute():
        loss_of(model).backward()
        assert loss_of(sampler).item() == pytest.approx(exact.item(), rel=0.02)
    assert model.layers[0].mixer.out_proj.lora_b.grad.dtype == torch.float32


def test_digits_that_bf16_lacks_are_seen():
    model = tiny_model(**ALL_KINDS).float()
    assert lora.loses(model)
    model.to(torch.bfloat16).float()
    assert not lora.loses(model)


# --------------------------------------------------------------------------------------------------------- whole runs

WORDS = ["--lora.rank", 4, "--rlp.kl", 0.1, "--rlp.lr", 1e-2, "--rlp.checkpoint-every", 1]


@pytest.fixture(scope="module")
def finished(program, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "run"
    assert program(out, *WORDS) == 0
    return out


def test_a_run_trains_adapters_and_nothing_else(finished):
    found = checkpoint.newest(finished)
    base = checkpoint.newest(rundir.Path(summary_of(finished)["base_dir"])).tensors("model")
    tensors, teacher, start = (found.tensors(name) for name in ("model", "teacher", "reference"))
    assert all(torch.equal(tensors[name], weight) for name, weight in base.items())
    moved = {name for name in tensors if not torch.equal(tensors[name], start[name])}
    assert moved == {name for name in tensors if "lora_" in name} == tensors.keys() - base.keys()
    assert any(not torch.equal(teacher[name], start[name]) for name in moved)
    assert metrics_of(finished)[-1]["kl_nats"] > 0
    assert summary_of(finished)["parameters"] == sum(t.numel() for t in base.values())


def test_an_interrupted_run_resumes_bit_for_bit(program, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        disturb(patch, "rlp", 1, press_ctrl_c)
        assert program(tmp_path / "run", *WORDS) == 130
    assert len(metrics_of(tmp_path / "run")) == 2
    assert program(tmp_path / "run", *WORDS, "--resume") == 0
    assert weights_of(tmp_path / "run") == weights_of(finished)
    assert metrics_of(tmp_path / "run") == metrics_of(finished)


def test_other_adapters_cannot_resume_it(program, finished, capsys):
    before = contents(finished)
    assert program(finished, *WORDS[2:], "--resume") == 2
    assert "lora was {'rank': 4, 'alpha': 16.0}, now None" in " ".join(capsys.readouterr().out.split())
    assert contents(finished) == before


def test_export_generate_and_init_take_the_merged_weights(program, finished, tmp_path, capsys):
    found = checkpoint.newest(finished)
    expected = lora.merged(found.tensors("model"), 16.0)
    name = "layers.0.mixer.in_proj"
    a, b, weight = (found.tensors("model")[f"{name}.{part}"] for part in ("lora_a", "lora_b", "weight"))
    assert_close(expected[f"{name}.weight"], weight + 16 / 4 * b @ a)
    model, *_ = rundir.load_model(finished)
    assert all(torch.equal(t, expected[k]) for k, t in model.state_dict().items())
    assert expected.keys() == model.state_dict().keys()
    assert export.main([str(finished), "--out", str(tmp_path / "hf")]) == 0
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert any(t.shape == weight.shape and torch.equal(t, expected[f"{name}.weight"]) for t in written.values())
    assert generate.main([str(finished), "Tens digit of 12 + 34?\nAnswer:", "--thought-len", "4"]) == 0
    assert "</think>" in capsys.readouterr().out
    assert program(tmp_path / "on", "--mode", "cpt", "--init", finished, "--cpt.steps", 0) == 0
    onward = checkpoint.newest(tmp_path / "on").tensors("model")
    assert all(torch.equal(onward[k], t) for k, t in expected.items())


def test_continued_pretraining_has_adapters_too(program, finished, tmp_path):
    words = ["--mode", "cpt", "--init", finished, "--lora.rank", 2, "--cpt.lr", 1e-2]
    assert program(tmp_path / "run", *words) == 0
    tensors, base = checkpoint.newest(tmp_path / "run").tensors("model"), checkpoint.newest(finished).weights()
    assert all(torch.equal(tensors[name], weight) for name, weight in base.items())
    thin = [t for name, t in tensors.items() if name.endswith("lora_b")]
    assert thin
    assert all(t.shape[1] == 2 and t.abs().max() > 0 for t in thin)


def test_adapters_are_refused_where_all_weights_would_be_warmed_up_first(program, tmp_path, capsys):
    """A run that was pretrained alone; after a warm-up they are welcome (see above)."""
    assert program(tmp_path / "base", "--mode", "pretrain", "--pretrain.steps", 1) == 0
    words = ("--init", tmp_path / "base", "--lora.rank", 2)
    for dry in ((), ("--dry-run",)):
        assert program(tmp_path / "run", *words, *dry) == 2
        shown = " ".join(capsys.readouterr().out.split())
        assert "needs warmup.steps 0, for that warm-up trains all weights; warm up by --mode warmup first" in shown
        assert not (tmp_path / "run").exists()
    assert program(tmp_path / "run", *words, "--warmup.steps", 0, "--rlp.steps", 0) == 0


def test_adapters_are_refused_where_weights_are_sharded(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "shards", lambda n: True)
    assert program(tmp_path / "run", *WORDS) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "lora.rank (4) must be 0 where weights are sharded; set it to 0, or parallel.mode to data" in shown
    assert not (tmp_path / "run").exists()


def test_phases_before_the_run_have_no_adapters(finished):
    """The base is found by runs with and without adapters."""
    base = rundir.Path(summary_of(finished)["base_dir"])
    assert rundir.saved_config(base).lora == train.LoRAConfig()
    assert not [name for name in checkpoint.newest(base).tensors("model") if "lora_" in name]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "elastic"}, r"lora\.rank \(4\) must be 0 in mode elastic, which orders and cuts whole weights"),
        ({"mode": "pretrain"}, r"lora\.rank \(4\) must be 0 where pretraining begins with random weights.*or give --init"),
    ],
)
def test_modes_that_adapters_do_not_suit_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        Config(lora=LoRAConfig(rank=4), **changes).check()
    Config(**changes).check()
    Config(lora=LoRAConfig(rank=4), **changes | {"mode": "warmup"}).check()
