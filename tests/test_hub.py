"""Models in and out: exported = live in four ways, the authors' checkpoints, warm starts, and refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import error_of, fit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from condenser import hub
from condenser.cli import main
from condenser.export import model_card
from condenser.hub import load_authors_checkpoint, load_checkpoint, load_export
from condenser.models.backbones.base import backbone_of
from condenser.models.cocondenser import CoCondenser
from condenser.models.condenser import Condenser
from condenser.models.retromae import RetroMAE
from condenser.runs import checkpoints

REFERENCE = Path(__file__).parent / "golden" / "reference-checkpoint"
TEXTS = ["The encoder attends.", "Dense retrieval with masked tokens and a head, ranked and indexed."]


@pytest.fixture(scope="module")
def live(run):
    return load_checkpoint(checkpoints(run)[0])[0]


@pytest.fixture(scope="module")
def batch(tiny_export):
    return AutoTokenizer.from_pretrained(tiny_export)(TEXTS, return_tensors="pt", padding=True)


def test_the_export_loads_in_four_ways_and_equals_the_live_model(tiny_export, live, batch):
    with torch.inference_mode():
        states = live.lm.bert(**batch).last_hidden_state
        torch.testing.assert_close(AutoModel.from_pretrained(tiny_export)(**batch).last_hidden_state, states)
        logits = AutoModelForMaskedLM.from_pretrained(tiny_export)(**batch).logits
        torch.testing.assert_close(logits, backbone_of(live.lm).mlm_head(states))
        labels = torch.where(torch.arange(batch["input_ids"].shape[1]) == 2, batch["input_ids"], -100)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        torch.testing.assert_close(load_export(tiny_export)(**inputs).head_mlm_loss, live(**inputs).head_mlm_loss)
    vectors = SentenceTransformer(str(tiny_export), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(vectors, states[:, 0].numpy(), rtol=1e-4, atol=1e-5)  # [CLS], not the mean


def test_the_export_holds_no_pickles_and_says_where_it_came_from(tiny_export, run):
    names = {path.name for path in tiny_export.rglob("*")}
    assert not {name for name in names if name.endswith((".bin", ".pt", ".ckpt", ".pkl"))}
    assert all(key.startswith("c_head.") for key in load_file(tiny_export / "condenser_head.safetensors"))
    assert yaml.safe_load((tiny_export / "training_config.yaml").read_text())["name"] == "tiny"
    assert "[CLS]" in (tiny_export / "README.md").read_text()
    assert json.loads((tiny_export / "condenser.json").read_text())["source"]["step"] == 8


def test_the_model_card_says_what_a_reader_of_the_hub_needs(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    row = {"collection": "scifact", "model": "pre-trained", "trained_on": "scifact", "ndcg@10": 0.4321}
    (copy / "evaluation").mkdir()
    (copy / "evaluation" / "results.json").write_text(json.dumps({"rows": [row, {"task": "attention"}]}))
    assert main(["export", str(copy), "--output", str(tmp_path / "export")]) == 0
    _, head, text = (tmp_path / "export" / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["library_name"] == "sentence-transformers"
    assert about["language"] == "en"
    assert "base_model" not in about
    final = json.loads((run / "summary.json").read_text())
    for promised in (
        "started from: random weights",
        "not fine-tuned for retrieval",
        "docs/fine-tuning.md",
        "documents.jsonl",
        f"tokens seen: {final['tokens_seen']:,}",
        f"`val/mlm_loss_at_mask` {final['final']['val/mlm_loss_at_mask']:.3f}",
        "scifact, pre-trained, fine-tuned: scifact, nDCG@10: 0.432",
        "compared by dot product",
    ):
        assert promised in text
    card = {**json.loads((tmp_path / "export" / "condenser.json").read_text()), "measured": {}}
    lone = model_card(load_export(tmp_path / "export"), card, "bert-base-uncased")
    assert yaml.safe_load(lone.split("---\n")[1])["base_model"] == "bert-base-uncased"
    assert "Validation losses at this step: not recorded" in lone


def test_an_export_that_was_read_as_another_class_is_not_taken_for_this_one(tiny_export, run, capsys):
    about = tiny_export / "condenser.json"
    kept = about.read_text()
    about.write_text(kept.replace("condenser.models.condenser.Condenser", "my_objective.Weighted"))
    assert main(["export", str(run), "--output", str(tiny_export)]) == 1
    assert "exists, of a model that was read as my_objective.Weighted; remove it first" in capsys.readouterr().err
    about.write_text(kept)


ONE = torch.zeros(1)
NO_HEADS = [{"c_head.1000000000.a": ONE}, {"c_head.x.y": ONE}, {"c_head.0.a": "text"}, {7: ONE}, {"weight": ONE}, [ONE]]


@pytest.mark.parametrize("state", NO_HEADS)
def test_a_head_that_is_none_is_one_line_at_once(state, tiny_export, tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(tiny_export / file, tmp_path)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt( holds no head|: what it holds as c_head)"):
        load_authors_checkpoint(tmp_path, skip_from=1)


def test_whoever_may_read_a_files_folder_may_read_all_of_an_export(tiny_export):
    modes = {path.stat().st_mode for path in tiny_export.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_exporting_again_does_nothing_and_other_options_or_something_else_there_is_refused(
    tiny_export, run, tmp_path, capsys
):
    for name in ("notes/mine.txt", "mine/condenser.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    assert main(["export", str(run), "--output", str(tiny_export)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    for output, *options in ([tiny_export, "--normalize"], [tmp_path / "notes"], [tmp_path / "mine"]):
        assert main(["export", str(run), "--output", str(output), *options]) == 1
        assert "is not this checkpoint's export with these options" in capsys.readouterr().err


def with_nan(content):
    key = next(key for key in content["state_dict"] if "c_head.0.output.dense.weight" in key)
    content["state_dict"][key][0, 0] = float("nan")
    return content


def of_another_shape(content):
    config = json.loads(content["condenser"]["config"]) | {"hidden_size": 64}
    content["condenser"]["config"] = json.dumps(config)
    return content


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path, content: None, "no such checkpoint"),
        (lambda path, content: path.write_bytes(b"x" * 100), "is damaged, or no checkpoint"),
        (lambda path, content: torch.save({"state_dict": {}}, path), "is not a checkpoint of a Condenser run"),
        (lambda path, content: torch.save(with_nan(content), path), "not finite"),
        (lambda path, content: torch.save(of_another_shape(content), path), "do not belong together"),
    ],
)
def test_what_is_no_checkpoint_or_a_broken_one_is_refused(make, message, run, tmp_path, capsys):
    make(tmp_path / "a.ckpt", torch.load(checkpoints(run)[0], weights_only=True))
    assert message in error_of(capsys, main(["export", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("compared unequal")

    monkeypatch.setattr("condenser.export.compare_with_live", fail)
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 1
    assert list(tmp_path.iterdir()) == []


def warm(recipe, runs, *options, backbone=None):
    of_backbone = ["--model.backbone", str(backbone), "--model.backbone_config", "{}"] if backbone else []
    return fit(recipe, runs, "warm", *of_backbone, *options)


def test_training_goes_on_from_an_export_with_its_head(tiny_export, live):
    tokenizer = AutoTokenizer.from_pretrained(tiny_export)
    model = hub.warm_start(str(tiny_export), {}, tokenizer, skip_from=1, n_head_layers=2, late_mlm=True)
    for key, value in live.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)


def test_weights_that_were_loaded_train_with_dropout(recipe, tiny_export, tmp_path):
    """Hugging Face hands loaded models over in evaluation mode."""
    weights = []
    for dropout in ("0.0", "0.5"):
        options = ["--model.backbone_config", f"{{hidden_dropout_prob: {dropout}}}", "--trainer.max_steps", "2"]
        assert warm(recipe, tmp_path / dropout, *options, backbone=tiny_export) == 0
        state = torch.load(checkpoints(tmp_path / dropout / "warm")[0], weights_only=True)["state_dict"]
        weights.append(state["model.c_head.0.output.dense.weight"])
    assert not torch.equal(*weights)


class OfTheReference:
    pad_token_id = 0

    def get_vocab(self):
        return {str(number): number for number in range(128)}


@pytest.mark.parametrize("objective", [None, Condenser, CoCondenser])
def test_the_authors_checkpoint_gives_the_authors_loss_and_training_starts_from_it_head_included(objective):
    model = load_authors_checkpoint(REFERENCE, skip_from=2)
    if objective:
        model = hub.warm_start(str(REFERENCE), {}, OfTheReference(), objective, skip_from=2, n_head_layers=2)
    assert len(model.c_head) == 2
    tensors = load_file(REFERENCE / "batch.safetensors")
    assert model.eval()(**tensors).loss.item() == pytest.approx(9.97518539428711, rel=1e-4)


def test_a_decoder_starts_from_the_authors_checkpoint_and_one_line_says_that_it_is_new():
    said = []
    model = hub.warm_start(str(REFERENCE), {}, OfTheReference(), RetroMAE, said.append)
    weights = torch.load(REFERENCE / "pytorch_model.bin", weights_only=True)
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(model.lm.state_dict()[name], weights[name])
    assert len(said) == 1
    assert "(c_head), so decoder of RetroMAE begins with random weights" in said[0]


def test_a_head_of_another_depth_is_refused(recipe, tiny_export, tmp_path, capsys):
    assert warm(recipe, tmp_path, "--model.n_head_layers", "1", backbone=tiny_export) == 1
    assert "has another shape than that of a Condenser with" in capsys.readouterr().err


def test_a_store_made_with_another_tokenizer_is_refused(recipe, tiny_export, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_export, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False}))
    assert "made with another tokenizer" in error_of(capsys, warm(recipe, tmp_path, backbone=other))


@pytest.mark.parametrize("how", ["cut", "of other weights"])
def test_an_export_with_a_damaged_head_is_refused(how, tiny_export, tmp_path):
    shutil.copytree(tiny_export, tmp_path / "damaged")
    head = tmp_path / "damaged" / "condenser_head.safetensors"
    if how == "cut":
        head.write_bytes(head.read_bytes()[:-100])
    else:
        with safe_open(head, "pt") as file:
            about = file.metadata()
        save_file({"other": torch.zeros(1)}, head, metadata=about)
    with pytest.raises(ValueError, match="head.safetensors cannot be read" if how == "cut" else "it lacks c_head"):
        load_export(tmp_path / "damaged")
