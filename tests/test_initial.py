"""How models begin: near log V, truncated where asked, with a vocabulary that is filled up."""

import json
import math

import pytest
import torch
from conftest import error_of, fit
from safetensors.torch import load_file
from test_backbones import MODELS
from test_model import tiny_batch, tiny_config
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from condenser.cli import main
from condenser.hub import load_export
from condenser.models.backbones.base import build_masked_lm
from condenser.models.condenser import Condenser
from condenser.models.initial import cut_vocabulary, draw_truncated, fill_vocabulary
from condenser.runs import checkpoints


@pytest.mark.parametrize("truncated", [False, True])
def test_the_first_losses_of_random_weights_are_log_v(truncated):
    torch.manual_seed(0)
    model = Condenser.from_masked_lm(BertForMaskedLM(tiny_config(BertConfig, hidden_size=128)).eval(), skip_from=2)
    if truncated:
        draw_truncated(model, 0.02)
    out = model(**tiny_batch(rows=64))
    half_variance = 0.02**2 * 128 / 2  # of logits, which the mean of their exponentials adds
    for loss in (out.mlm_loss, out.head_mlm_loss):
        assert loss.item() == pytest.approx(math.log(90) + half_variance, abs=0.06)


@pytest.mark.parametrize("family", MODELS)
def test_truncated_weights_have_nothing_beyond_two_deviations(family):
    model = Condenser.from_masked_lm(MODELS[family](0.0), skip_from=2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.manual_seed(0)
    draw_truncated(model, 0.05)
    drawn = [w.flatten() for name, w in model.named_parameters() if w.ndim == 2 and not torch.equal(w, before[name])]
    values = torch.cat(drawn)
    assert values.abs().max() <= 0.1
    assert values[values != 0].std().item() == pytest.approx(0.05 * 0.88, rel=0.02)  # of what is left of the normal
    for name, weight in model.state_dict().items():
        if weight.ndim == 1:
            assert torch.equal(weight, before[name])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", MODELS)
def test_a_vocabulary_that_is_filled_up_and_cut_back_is_what_it_was(family, tied, tmp_path):
    config = MODELS[family](0.0).config
    config.tie_word_embeddings = tied
    lm = AutoModelForMaskedLM.from_config(config).eval()
    before, config = {name: weight.clone() for name, weight in lm.state_dict().items()}, lm.config.to_dict()
    fill_vocabulary(lm, 64)
    assert lm.config.vocab_size == 128
    assert lm.get_output_embeddings().weight.shape[0] == lm.get_output_embeddings().bias.shape[0] == 128
    batch, fresh = tiny_batch(), AutoModelForMaskedLM.from_config(lm.config).state_dict()
    assert all(weight.shape == fresh[name].shape for name, weight in lm.state_dict().items())  # or none reads it back
    Condenser.from_masked_lm(lm, skip_from=2)(**batch).loss.backward()
    cut_vocabulary(lm)
    assert lm.config.to_dict() == config
    after = lm.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert tied == (lm.get_input_embeddings().weight is lm.get_output_embeddings().weight)
    lm.save_pretrained(tmp_path)
    again = build_masked_lm(str(tmp_path), {}).state_dict()
    assert all(torch.equal(again[name], before[name]) for name in before)


@pytest.mark.slow
def test_a_run_with_a_filled_vocabulary_is_resumed_and_exported_without_it(recipe, store, tmp_path):
    options = [
        "--model.vocabulary_multiple",
        "64",
        "--model.truncated_normal",
        "true",
        "--model.objective_options",
        "{}",
    ]
    for steps in ("3", "5"):
        assert fit(recipe, tmp_path, "a", *options, "--trainer.max_steps", steps) == 0
    state = torch.load(checkpoints(tmp_path / "a")[0], weights_only=True)["state_dict"]
    assert main(["export", str(tmp_path / "a"), "--output", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    n_ids = json.loads((store / "manifest.json").read_text())["tokenizer"]["vocabulary"]
    assert n_ids % 64
    assert len(state["model.lm.bert.embeddings.word_embeddings.weight"]) == n_ids + 64 - n_ids % 64
    assert config["vocab_size"] == n_ids
    assert "vocab_size_before_filling" not in config
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in weights.items():
        trained = state[f"model.lm.{name}"]
        assert torch.equal(weight, trained[: len(weight)])
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").config.vocab_size == n_ids
    assert len(load_export(tmp_path / "out").c_head) == 2
    assert main(["estimate", "--config", str(recipe), *options]) == 0


def test_weights_that_are_loaded_are_not_drawn_truncated(recipe, tiny_export, tmp_path, capsys):
    warm = ["--model.backbone", str(tiny_export), "--model.backbone_config", "{}", "--model.truncated_normal", "true"]
    error_of(capsys, fit(recipe, tmp_path, "a", *warm), "model.truncated_normal is for random weights")
