"""A model whose layers have widths of their own, and the same filled up to one width: equal, in fp64."""

import dataclasses
import json

import hf_models  # noqa: F401  # before transformers
import pytest
import torch
from conftest import TINY
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from model import HybridLM
from nested import Widths, full_widths, kept_units, take, widen
from system.checkpoint import load_weights, save
from system.config import Config, ModelConfig
from system.huggingface import load_hf, save_hf
from tools import export

PATTERN = "M-*M-*M"
# Heads come in two groups, of 2, 4 and 6 heads; layer 3 has one channel a head, and so a sixth of the widest one's.
WIDTHS = ((2, 3), (5,), (2,), (4, 1), (12,), (6,), (6, 4))
BASE = ModelConfig(**TINY | {"pattern": PATTERN, "tie_embeddings": False, "widths": WIDTHS})


def layered(config):
    """A model with weights around 1 (vectors) and 0 (matrices), in fp64."""
    model = HybridLM(config).double()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype) + (p.dim() == 1)
    return model


@torch.no_grad()
def logits(model, n_tokens=11):
    tokens_BT = torch.arange(2 * n_tokens).view(2, n_tokens) * 5 % 12
    return model.logits(model(tokens_BT)[0])


def logits_of_both(config):
    """Of the layered model and of the filled one, and the filled one's shape."""
    model = layered(config)
    wide, tensors = widen(config, model.state_dict())
    filled = HybridLM(wide).double()
    load_weights(filled, tensors, "filled")
    return logits(model), logits(filled), wide


@pytest.mark.parametrize("ffn", ["relu2", "swiglu"])
@pytest.mark.parametrize("options", [{}, {"rope_theta": 100.0, "qk_norm": True}, {"qkv_bias": True}], ids=str)
def test_filling_with_zeros_changes_nothing_where_eps_is_negligible(ffn, options):
    base = dataclasses.replace(BASE, ffn=ffn, norm_eps=1e-30, **options)
    before, after, wide = logits_of_both(base)
    assert (wide.mamba_heads, wide.mamba_head_dim, wide.n_heads, wide.d_ff, wide.widths) == (6, 4, 6, 12, ())
    assert_close(after, before, rtol=1e-12, atol=1e-12)


def test_layers_without_mamba_stay_equal_whatever_eps_is():
    base = dataclasses.replace(BASE, pattern="*-*-", norm_eps=0.1, widths=((2,), (1,), (8,), (3,)))
    before, after, _ = logits_of_both(base)
    assert_close(after, before, rtol=1e-12, atol=1e-12)


def test_a_filled_mamba_layer_computes_as_if_its_eps_were_larger():
    """By new / old channels: 12 of 4. With eps = 0.1 that shows; an eps three times as large in the layered model is it."""
    base = dataclasses.replace(BASE, pattern="MM", norm_eps=0.1, widths=((2, 2), (6, 2)))
    before, after, _ = logits_of_both(base)
    assert (after - before).abs().max() > 1e-3
    model = layered(base)
    model.layers[0].mixer.norm_eps = 0.1 * 12 / 4
    assert_close(after, logits(model), rtol=1e-12, atol=1e-12)


def test_with_the_usual_eps_the_difference_is_small():
    """Not nothing: 0.9 % of the logits' deviation at worst here, where layer 3 keeps a sixth of the channels."""
    before, after, _ = logits_of_both(BASE)
    assert 1e-3 < (after - before).abs().max() / before.std() < 1e-2


def test_a_model_of_one_width_comes_back_bit_for_bit():
    base = dataclasses.replace(BASE, widths=())
    model = layered(base)
    wide, tensors = widen(base, model.state_dict())
    assert wide == base
    assert_close(tensors, dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("options", [{}, {"ffn": "swiglu", "qk_norm": True}, {"qkv_bias": True}], ids=str)
def test_what_is_taken_out_of_the_wide_model_is_the_old_one_bit_for_bit_and_the_rest_is_zero(tied, options):
    """But for the gated norm of Mamba-2: sqrt(old / new channels) times the old weights."""
    config = dataclasses.replace(BASE, tie_embeddings=tied, **options)
    old = dict(layered(config).state_dict())
    wide, new = widen(config, old)
    assert new.keys() == old.keys() == dict(HybridLM(wide).state_dict()).keys()
    back = take(new, wide, kept_units(wide, Widths(8, WIDTHS)))
    for i, channels in ((0, 6), (3, 4), (6, 24)):
        old[f"layers.{i}.mixer.norm_weight"] = old[f"layers.{i}.mixer.norm_weight"] * (channels / 24) ** 0.5
    assert_close(back, old, rtol=0, atol=0)
    assert all((new[name] != 0).sum() == (old[name] != 0).sum() for name in old)


# -------------------------------------------------------------------------------------------------------------- export


def save_run(folder, config, model):
    """A run folder with these weights and settings."""
    save(folder, 0, {"model": model}, [], {})
    (folder / "config.json").write_text(json.dumps({"config": Config(model=config).to_dict()}))
    return str(folder)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_export_fills_up_what_the_format_cannot_say(tmp_path, tied):
    """transformers then computes what the layered model does; what we read again is the wide one."""
    model = layered(dataclasses.replace(BASE, norm_eps=1e-8, tie_embeddings=tied)).float()
    run = save_run(tmp_path / "run", dataclasses.replace(model.config, vocab_size=0), model)
    assert export.main([run, "--out", str(tmp_path / "out"), "--widths", "padded"]) == 0
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert_close(theirs(torch.arange(22).view(2, 11) * 5 % 12).logits.detach(), logits(model), rtol=1e-3, atol=1e-3)
    wide, tensors = widen(model.config, model.state_dict())
    config, again = load_hf(tmp_path / "out")
    assert config == dataclasses.replace(wide, tie_embeddings=False)
    assert_close({name: again[name] for name in tensors}, tensors, rtol=0, atol=0)


def test_an_export_says_how_much_larger_padding_makes_it(tmp_path, capsys):
    """The sizes before and after, counted on models that are built; nothing where nothing is padded."""
    model = layered(BASE)
    small, large = (sum(p.numel() for p in m.parameters()) for m in (model, HybridLM(widen(BASE, model.state_dict())[0])))
    run = save_run(tmp_path / "run", BASE, model)
    assert export.main([run, "--out", str(tmp_path / "padded"), "--widths", "padded"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"padding brings {small:,} parameters to {large:,} ({large / small:.3f} times as many)" in said
    assert export.main([run, "--out", str(tmp_path / "listed"), "--widths", "listed"]) == 0
    assert "padding" not in capsys.readouterr().out


def test_layers_of_different_widths_are_padded_on_request_alone(tmp_path, capsys):
    run = save_run(tmp_path / "run", BASE, layered(BASE))
    assert export.main([run, "--out", str(tmp_path / "out")]) == 2
    assert "widths of their own; give --widths padded" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_layers_of_different_widths_are_written_only_as_lists(tmp_path):
    model = layered(BASE)
    with pytest.raises(ValueError, match=r"model.widths .* differ by layer.* nested.widen, or write lists"):
        save_hf(tmp_path / "out", model.config, model.state_dict())
    assert not (tmp_path / "out").exists()
    run = save_run(tmp_path / "run", BASE, model.float())
    assert export.main([run, "--out", str(tmp_path / "out"), "--widths", "listed"]) == 0
    assert load_hf(tmp_path / "out")[0].widths == WIDTHS


def test_weights_that_do_not_fit_the_widths_are_refused_before_anything_is_written(tmp_path, capsys):
    run = save_run(tmp_path / "run", dataclasses.replace(BASE, widths=((4, 3), *WIDTHS[1:])), layered(BASE))
    assert export.main([run, "--out", str(tmp_path / "out"), "--widths", "padded"]) == 2
    assert "layers.0.mixer.in_proj.weight has shape" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_weight_that_no_model_has_is_refused_when_it_is_cut():
    config = dataclasses.replace(BASE, widths=())
    weights = HybridLM(config).state_dict() | {"layers.0.mixer.extra": torch.ones(1)}
    with pytest.raises(KeyError, match="extra"):
        take(weights, config, kept_units(config, full_widths(config)))
