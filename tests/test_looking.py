"""`condenser inspect` of a model: what its heads predict, where its [CLS] looks, texts drawn as they should be."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_of
from test_backbones import MODELS
from test_pretraining import REFERENCE
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from condenser.cli import main
from condenser.evaluation.looking import attention, gibbs, logits_at_masks, predictions, whole_model
from condenser.hub import load_export
from condenser.models.condenser import Condenser
from condenser.models.padded import flattened
from condenser.models.retromae import RetroMAE

TEXT = "the encoder [MASK] dense [MASK]"


@pytest.fixture(scope="module")
def tokenizer(tiny_export):
    return AutoTokenizer.from_pretrained(tiny_export)


def test_predictions_are_those_of_the_masked_lm_and_of_the_head(tiny_export, tokenizer):
    model = whole_model(str(tiny_export))
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    masked = ids == tokenizer.mask_token_id
    found = logits_at_masks(model, ids, masked)
    with torch.no_grad():
        logits = AutoModelForMaskedLM.from_pretrained(tiny_export)(ids).logits[masked]
        batch = flattened(model.backbone, ids, torch.ones_like(ids), torch.where(masked, ids, -100))
        head = model.backbone.mlm_head(load_export(tiny_export).states(batch)[2][batch["masked_slot"]])
    assert list(found) == ["mlm", "head_mlm"]
    torch.testing.assert_close(found["mlm"], logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["head_mlm"], head)
    (_, first), (title, second) = predictions(model, tokenizer, TEXT, 3)
    assert title.endswith("mask 2")
    for rows, of_mask in ((first, logits[0]), (second, logits[1])):
        best = tokenizer.convert_ids_to_tokens(of_mask.topk(3).indices.tolist())
        assert [row.split()[1] for row in rows["mlm"]] == best
        assert [float(row.split("%")[0]) for row in rows["mlm"]] == pytest.approx(
            (100 * of_mask.softmax(-1).topk(3).values).tolist(), abs=0.06
        )


def test_a_decoder_predicts_at_the_masks_too():
    model = RetroMAE.from_masked_lm(MODELS["bert"](0.0)).eval()
    ids = torch.randint(5, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    masked = torch.arange(9)[None] == 4
    found = logits_at_masks(model, ids, masked)
    assert {name: logits.shape for name, logits in found.items()} == {"mlm": (1, 90), "decoder": (1, 90)}
    assert model.mlm_terms.__func__ is RetroMAE.mlm_terms


def test_attention_of_cls_is_the_encoder_s(tiny_export, tokenizer):
    tokens, weights = attention(whole_model(str(tiny_export)), tokenizer, "Dense retrieval with masked tokens.")
    rows = tokenizer("Dense retrieval with masked tokens.", return_tensors="pt")
    encoder = AutoModel.from_pretrained(tiny_export, attn_implementation="eager")
    with torch.no_grad():
        expected = [each[0, :, 0].mean(0) for each in encoder(**rows, output_attentions=True).attentions]
    torch.testing.assert_close(weights, torch.stack(expected))
    assert tokens[0] == "[CLS]"
    torch.testing.assert_close(weights.sum(1), torch.ones(3))


def test_texts_are_drawn_as_often_as_the_head_says_and_hold_no_special_tokens(tokenizer):
    """Of a head that knows nothing but how frequent a token is."""
    lm = MODELS["bert"](0.0)
    lm.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        lm.get_output_embeddings().weight.zero_()
        bias = lm.get_output_embeddings().bias
        bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(0)))
    model = Condenser.from_masked_lm(lm, n_head_layers=0).eval()
    one, two = (gibbs(model, tokenizer, n=400, length=10, sweeps=1, temperature=1.0, seed=3) for _ in range(2))
    assert torch.equal(one, two)
    drawn = one[:, 1:-1].numpy()
    shares = bias.detach().clone()
    shares[tokenizer.all_special_ids] = -torch.inf
    shares = shares.softmax(-1).numpy()
    counts = np.bincount(drawn.flatten(), minlength=len(tokenizer))
    expected = shares * drawn.size
    often = expected > 5
    chi_squared = ((counts - expected) ** 2 / np.where(often, expected, 1))[often].sum()
    assert chi_squared < often.sum() + 4 * np.sqrt(2 * often.sum())
    assert not counts[tokenizer.all_special_ids].any()


def test_the_command_shows_a_model_from_a_run_an_export_or_the_authors(run, tiny_export, tmp_path, capsys):
    picture = tmp_path / "attention.svg"
    options = ["--fill", TEXT + " [/b]", "--attend", "Dense [/b] retrieval.", "--picture", str(picture)]
    options += ["--generate", "2", "--length", "5", "--sweeps", "2"]
    for model in (run, tiny_export):
        assert main(["inspect", str(model), *options]) == 0
        said = capsys.readouterr().out
        for part in ("bert, 3 layers of 32", "Condenser", "head_mlm", "mask 2", "[CLS] attends to"):
            assert part in said
        assert said.count("\n- ") == 2
        assert picture.read_text().startswith("<?xml")
        picture.unlink()
    shutil.copytree(REFERENCE, tmp_path / "authors")
    assert "no tokenizer" in error_of(capsys, main(["inspect", str(tmp_path / "authors"), "--fill", TEXT]))


def test_a_model_without_a_head_is_shown_without_one(roberta, capsys):
    assert main(["inspect", str(roberta), "--fill", "the encoder [MASK] dense <mask>"]) == 0
    said = capsys.readouterr().out
    assert "n_head_layers 0" in said
    assert "head_mlm" not in said
    assert "mask 2" in said


def test_a_text_that_is_too_long_is_cut(tiny_export, capsys):
    assert main(["inspect", str(tiny_export), "--attend", "masking heads " * 300]) == 0
    assert "[CLS] attends to" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "message"), [(250, None), (100, "smaller than its tokenizer's")])
def test_a_vocabulary_of_another_size_than_the_tokenizer_s(size, message, tiny_export, tmp_path, capsys):
    model = AutoModelForMaskedLM.from_pretrained(tiny_export)
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_export).save_pretrained(tmp_path)
    code = main(["inspect", str(tmp_path), "--fill", "a [MASK]", "--top", str(size)])
    said = capsys.readouterr()
    assert code == (1 if message else 0)
    assert message in said.err if message else "(no token)" in said.out


BAD = {
    "no mask": ("MODEL", ["--fill", "the encoder"], "there is no [MASK] in what the model reads"),
    "a mask too far": ("MODEL", ["--fill", "masking " * 300 + "[MASK]"], "there is no [MASK] in what the model reads"),
    "a store": ("STORE", ["--fill", TEXT], "--fill is for a model, and"),
    "options of a model": ("STORE", ["--top", "3"], "--top is for a model, and"),
    "a model": ("MODEL", ["--fill", TEXT, "--mask-unit", "span"], "--mask-unit is for a token store, and"),
    "a picture of nothing": ("MODEL", ["--picture", "a.svg"], "--picture is of --attend"),
    "no predictions": ("MODEL", ["--fill", TEXT, "--top", "0"], "--top 0 must be at least 1"),
    "cold": ("MODEL", ["--generate", "1", "--temperature", "0"], "--temperature 0.0 must be positive"),
    "fewer than none": ("MODEL", ["--generate", "-1"], "--generate -1 must be at least 0"),
    "too long": ("MODEL", ["--generate", "1", "--length", "400"], "--length 400: the model takes texts of 40 tokens"),
    "an unknown picture": ("MODEL", ["--attend", "a", "--picture", "a.xyz"], "--picture a.xyz"),
    "more than there are": ("MODEL", ["--fill", TEXT, "--top", "100000"], "--top 100000"),
    "nothing there": ("nowhere", [], "no token store or model at nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_in_one_line(case, tiny_export, store, capsys):
    what, options, message = BAD[case]
    what = {"MODEL": str(tiny_export), "STORE": str(store)}.get(what, what)
    assert message in error_of(capsys, main(["inspect", what, *options]))
    assert not Path("a.svg").exists()
