"""The whole model as a Hugging Face model: saved, loaded and trained on, with its head; losses of padded rows."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import error_of, fit
from safetensors.torch import load_file, save_file
from test_backbones import MODELS
from test_model import tiny_batch
from test_objectives import golden
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    Trainer,
    TrainingArguments,
)

import condenser
from condenser import CondenserForPreTraining
from condenser.cli import main
from condenser.export import find_checkpoint
from condenser.hub import load_export
from condenser.models.backbones.base import backbone_of, build_masked_lm
from condenser.models.cocondenser import CoCondenser
from condenser.models.condenser import Condenser
from condenser.models.objective import COUNTS, Objective
from condenser.models.padded import before_masking, flattened
from condenser.models.retromae import DupMAE, RetroMAE
from condenser.runs import checkpoints
from condenser.training.passes import pass_loss

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = GOLDEN / "reference-checkpoint"
OBJECTIVES = {
    "condenser": (Condenser, {"skip_from": 2, "n_head_layers": 1}),
    "plain": (Condenser, {"skip_from": 2, "n_head_layers": 0}),
    "cocondenser": (CoCondenser, {"skip_from": 2, "temperature": 0.5, "similarity": "cosine", "mlm_weight": 0.5}),
    "retromae": (RetroMAE, {"decoder_mask_rate": 0.7}),
    "dupmae": (DupMAE, {"bag_of_words_weight": 0.2}),
}


CASES = [("condenser", family) for family in MODELS] + [(name, "bert") for name in OBJECTIVES if name != "condenser"]
CASES += [("retromae", "modernbert"), ("retromae", "roberta")]


def equal_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def tied(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_saved_model_loads_with_its_head_and_settings_and_loses_the_same(name, family, tmp_path):
    objective, settings = OBJECTIVES[name]
    model = CondenserForPreTraining.of(objective.from_masked_lm(MODELS[family](0.0), **settings)).eval()
    model.save_pretrained(tmp_path)
    again = CondenserForPreTraining.from_pretrained(tmp_path)
    assert type(again.model) is objective
    assert equal_state(model, again)
    assert again.config.settings == model.model.settings
    assert settings.items() <= again.config.settings.items()
    assert tied(again) == tied(model)
    assert not again.training
    batch = {key: rows[:2] for key, rows in tiny_batch().items()}
    assert torch.equal(model(**batch).loss, again(**batch).loss)
    auto = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert type(auto) is CondenserForPreTraining
    assert torch.equal(model(**batch).loss, auto(**batch).loss)
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 32


def test_the_masked_lm_that_is_passed_in_is_kept_as_it_is():
    lm = MODELS["bert"](0.0)
    before = copy.deepcopy(lm.state_dict())
    objective = Condenser.from_masked_lm(lm, skip_from=2)
    head = copy.deepcopy(objective.c_head.state_dict())
    model = CondenserForPreTraining.of(objective)
    assert model.model.lm is lm
    assert all(torch.equal(before[name], weight) for name, weight in lm.state_dict().items())
    assert all(torch.equal(head[name], weight) for name, weight in objective.c_head.state_dict().items())


def test_losses_of_a_contrast_are_those_of_the_authors_code():
    model, about, tensors, _ = golden()
    inputs = {name: tensors[f"inputs.{name}"] for name in ("input_ids", "attention_mask", "labels")}
    found = CondenserForPreTraining.of(model).eval()(**inputs)
    assert found.loss.item() == pytest.approx(float(about["loss"]), rel=1e-4)
    assert found.contrast_loss.item() == pytest.approx(float(about["contrastive_loss"]), rel=1e-4)


@pytest.mark.parametrize("name", ["condenser", "retromae", "dupmae"])
def test_losses_are_those_of_the_training_step(name):
    objective, settings = OBJECTIVES[name]
    model = CondenserForPreTraining.of(objective.from_masked_lm(MODELS["bert"](0.0), **settings)).eval()
    rows = tiny_batch()
    batch = flattened(model.model.backbone, rows["input_ids"], rows["attention_mask"], rows["labels"])
    batch |= before_masking(batch)
    scale = 1 / torch.tensor([batch[name] for name in COUNTS], dtype=torch.float32)
    torch.testing.assert_close(model(**rows).loss, pass_loss(model.model, batch, scale, False).loss)


def test_in_double_precision_as_lightning_sets_it_dupmae_has_its_losses():
    torch.manual_seed(0)
    model, batch = CondenserForPreTraining.of(DupMAE.from_masked_lm(MODELS["bert"](0.0))).eval(), tiny_batch()
    expected = model(**batch).loss.item()
    torch.set_default_dtype(torch.float64)
    try:
        assert model.double()(**batch).loss.item() == pytest.approx(expected, rel=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_in_training_a_decoder_sees_others_in_each_batch_and_else_always_the_same():
    model = CondenserForPreTraining.of(RetroMAE.from_masked_lm(MODELS["bert"](0.0))).eval()
    losses = [model(**tiny_batch()).decoder_loss.item() for _ in range(3)]
    assert len(set(losses)) == 1
    model.train()
    assert len({model(**tiny_batch()).decoder_loss.item() for _ in range(3)}) == 3
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(model(**tiny_batch()).decoder_loss.item())
    assert drawn[0] == drawn[1]


def test_the_text_before_masking_is_made_of_labels_without_special_tokens():
    input_ids = torch.tensor([[2, 50, 4, 51, 3], [2, 4, 3, 0, 0]])
    labels = torch.tensor([[-100, -100, 60, 51, -100], [-100, 70, -100, -100, -100]])
    batch = flattened(
        Condenser.from_masked_lm(MODELS["bert"](0.0), skip_from=2).backbone, input_ids, input_ids.ne(0).long(), labels
    )
    found = before_masking(batch)
    assert found["original_ids"].tolist() == [-100, 50, 60, 51, -100, -100, 70, -100]
    assert found["n_ordinary"] == 4


def test_an_export_and_its_model_saved_again_are_the_run_s_model(tiny_export, tmp_path):
    model = CondenserForPreTraining.from_pretrained(tiny_export)
    assert equal_state(model.model, load_export(tiny_export))
    assert model.config.skip_from == 1
    assert model.config.n_head_layers == 2
    model.save_pretrained(tmp_path)
    assert equal_state(CondenserForPreTraining.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("how", [{"max_shard_size": "40KB"}, {"dtype": torch.bfloat16}], ids=["sharded", "half"])
def test_files_in_several_parts_or_half_precision_load(how, tiny_export, tmp_path):
    model = CondenserForPreTraining.from_pretrained(tiny_export)
    dtype = how.pop("dtype", torch.float32)
    model.to(dtype).save_pretrained(tmp_path, **how)
    assert len(list(tmp_path.glob("*.safetensors"))) > (1 if how else 0)
    again = CondenserForPreTraining.from_pretrained(tmp_path, dtype=dtype)
    assert again.dtype is dtype
    assert equal_state(model, again)


@pytest.mark.parametrize("family", ["modernbert", "bert"])
def test_in_half_precision_weights_and_rotations_are_what_hugging_face_makes_of_them(family, tmp_path):
    MODELS[family](0.0).save_pretrained(tmp_path)
    ours = CondenserForPreTraining.from_pretrained(tmp_path, dtype="bfloat16", skip_from=1).model.lm
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tensors = ([*lm.parameters(), *lm.buffers()] for lm in (ours, theirs))
    for found, expected in zip(*tensors, strict=True):
        assert found.dtype is expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("ours", [True, False])
def test_compiled_by_torch_it_gives_what_it_gives(ours):
    model = Condenser.from_masked_lm(MODELS["bert"](0.0), skip_from=2).eval()
    model = CondenserForPreTraining.of(model) if ours else model
    found = [run(**tiny_batch()) for run in (model, torch.compile(model, backend="eager"))]
    for name in ("loss", "mlm_loss", "head_mlm_loss"):
        assert torch.equal(*(getattr(output, name) for output in found))


@pytest.fixture
def said(monkeypatch):
    """What is said by warnings."""
    lines = []
    monkeypatch.setattr("condenser.models.pretraining.warn", lines.append)
    return lines


def test_a_masked_lm_gets_a_fresh_head_and_hears_of_it(tmp_path, said):
    MODELS["bert"](0.0).save_pretrained(tmp_path)
    model = CondenserForPreTraining.from_pretrained(tmp_path, skip_from=2, n_head_layers=1)
    assert len(model.model.c_head) == 1
    assert said == [f"c_head of {tmp_path} begins with random weights"]
    decoder = CondenserForPreTraining.from_pretrained(tmp_path, objective=RetroMAE, decoder_mask_rate=0.6)
    assert decoder.config.objective == "condenser.models.retromae.RetroMAE"
    with pytest.raises(ValueError, match="Condenser has no setting heads; it has skip_from"):
        CondenserForPreTraining.from_pretrained(tmp_path, heads=3)


def test_the_backbone_inside_masks_padding_as_ever(tiny_export, tmp_path):
    rows = {name: value[:, :16] for name, value in tiny_batch(rows=3).items() if name != "labels"}
    expected = AutoModelForMaskedLM.from_pretrained(tiny_export)(**rows).logits
    model = CondenserForPreTraining.from_pretrained(tiny_export)
    model.save_pretrained(tmp_path)
    real = rows["attention_mask"].bool()
    for each in (model, CondenserForPreTraining.from_pretrained(tmp_path)):
        torch.testing.assert_close(each.model.lm(**rows).logits[real], expected[real])


def test_a_saved_model_goes_on_as_another_objective_with_its_head(tmp_path, said):
    model = CondenserForPreTraining.of(Condenser.from_masked_lm(MODELS["bert"](0.0), skip_from=2, n_head_layers=1))
    model.save_pretrained(tmp_path)
    co = CondenserForPreTraining.from_pretrained(tmp_path, objective="CoCondenser", temperature=0.5)
    assert type(co.model) is CoCondenser
    assert equal_state(model, co)
    assert (co.model.skip_from, co.model.temperature) == (2, 0.5)
    other = CondenserForPreTraining.from_pretrained(tmp_path, skip_from=3, late_mlm=False)
    assert (other.model.skip_from, other.model.late_mlm) == (3, False)
    assert not said
    CondenserForPreTraining.from_pretrained(tmp_path, n_head_layers=0)
    assert said == [f"c_head of {tmp_path} is left out: a Condenser like this has none"]
    with pytest.raises(ValueError, match="3 rows: a contrast takes pairs"):
        co(**tiny_batch(rows=3))


def test_a_vocabulary_is_resized_in_the_whole_model(tmp_path):
    model = CondenserForPreTraining.of(Condenser.from_masked_lm(MODELS["bert"](0.0), skip_from=2))
    model.resize_token_embeddings(96)
    assert model.config.vocab_size == 96
    model.save_pretrained(tmp_path)
    assert equal_state(CondenserForPreTraining.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "Nothing"}, "objective='Nothing' is not known: Condenser, CoCondenser"),
        ({"dtype": "float7"}, "dtype='float7' is no type of torch's"),
        ({"dtype": "int8"}, "dtype='int8' is no type of torch's for weights"),
        ({"device_map": "auto"}, "Condenser has no setting device_map"),
    ],
)
def test_options_that_are_not_known_are_named(options, message, tiny_export):
    with pytest.raises(ValueError, match=message):
        CondenserForPreTraining.from_pretrained(tiny_export, **options)
    assert CondenserForPreTraining.from_pretrained(tiny_export, dtype="float16").dtype is torch.float16
    assert CondenserForPreTraining.from_pretrained(tiny_export, dtype="auto").dtype is torch.float32


def test_a_run_and_rows_that_are_too_long_are_refused_by_what_to_do(run, recipe, tiny_export, tmp_path, capsys):
    for name in (run, run / "checkpoints", find_checkpoint(str(run))):
        with pytest.raises(
            ValueError, match=f"is a run or its checkpoint: export it first, `condenser export {name} --o"
        ):
            CondenserForPreTraining.from_pretrained(name)
    for name in (run, find_checkpoint(str(run))):
        code = fit(recipe, tmp_path, "a", "--model.backbone", str(name))
        error_of(capsys, code, f"{name} is a run or its checkpoint: export it first")
    model, ids = CondenserForPreTraining.from_pretrained(tiny_export), torch.ones(1, 41, dtype=torch.long)
    with pytest.raises(ValueError, match="a row of 41 tokens, and a backbone that takes 40"):
        model(input_ids=ids, labels=ids)


def test_what_is_damaged_or_nowhere_is_refused_in_one_line(tiny_export, tmp_path):
    CondenserForPreTraining.from_pretrained(tiny_export).save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        CondenserForPreTraining.from_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text("{")
    for name in (tmp_path / "nowhere", tmp_path / "saved", "me/nowhere"):
        with pytest.raises(ValueError, match=f"no configuration could be loaded from '{name}': .*") as caught:
            CondenserForPreTraining.from_pretrained(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"settings": [1]}, {"backbone_config": {"hidden_size": 32}}, {"backbone_config": 3}], ids=str
)
def test_a_configuration_that_is_none_is_named_in_one_line(changes, tiny_export, tmp_path):
    CondenserForPreTraining.from_pretrained(tiny_export).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError, match=f"no configuration could be loaded from .*{tmp_path.name}.*: .") as caught:
        CondenserForPreTraining.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_saved_model_without_some_weight_is_refused_by_the_weights_name(tiny_export, tmp_path):
    CondenserForPreTraining.from_pretrained(tiny_export).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "c_head.0" in name)
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"1 are missing, {name}"):
        CondenserForPreTraining.from_pretrained(tmp_path)


def test_gradients_are_the_same_with_hugging_faces_gradient_checkpointing(tiny_export):
    gradients = []
    for checkpointing in (False, True):
        model = CondenserForPreTraining.from_pretrained(tiny_export)
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert model.model.gradient_checkpointing is checkpointing
        model(**{name: value[:, :16] for name, value in tiny_batch().items()}).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


OTHER_SHAPE = r"9 are of another shape, bert\.\S+ is \[64\] there and \[65\] here"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"intermediate_size": 65}, OTHER_SHAPE),
        ({"hidden_act": "foo"}, "backbone_config makes no model of .*export: KeyError: 'foo'"),
        ({"num_attention_heads": 0}, "backbone_config makes no model of .*export: ZeroDivisionError"),
        ({"pad_token_id": 10_000}, "backbone_config makes no model of .*export: AssertionError: Padding_idx"),
        ({"model_type": "roberta"}, "BertConfig has no setting 'model_type'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: the backbone has no layer"),
    ],
)
def test_settings_that_make_no_model_are_named_and_no_file_is_blamed(settings, message, tiny_export):
    with pytest.raises(ValueError, match=message) as caught:
        backbone_of(build_masked_lm(str(tiny_export), settings))
    assert "cannot be read" not in str(caught.value)


@pytest.mark.parametrize("content", ["x", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_of_weights_is_named(content, tiny_export, tmp_path):
    CondenserForPreTraining.from_pretrained(tiny_export).save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged"):
        CondenserForPreTraining.from_pretrained(tmp_path)


class OnesOwn(Condenser):
    def __init__(self, lm, strength: float = 1.0, **options):
        super().__init__(lm, **options)
        self.strength = strength


def test_an_objective_of_one_s_own_is_saved_and_one_that_is_not_imported_is_read_as_a_condenser(tmp_path, said):
    model = CondenserForPreTraining.of(OnesOwn.from_masked_lm(MODELS["bert"](0.0), strength=3.0, skip_from=2))
    model.save_pretrained(tmp_path)
    again = CondenserForPreTraining.from_pretrained(tmp_path)
    assert isinstance(again.model, OnesOwn)
    assert again.model.strength == 3.0
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"objective": "os.system"}))
    other = CondenserForPreTraining.from_pretrained(tmp_path)
    assert type(other.model) is Condenser
    assert equal_state(other, model)
    assert any("the objective os.system is not imported" in line for line in said)


def test_training_starts_from_a_saved_model_with_its_head(recipe, tiny_export, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("condenser.reports.estimate.on_gpus", lambda *_: [])  # which takes a while
    model = CondenserForPreTraining.from_pretrained(tiny_export)
    model.save_pretrained(tmp_path / "saved")
    options = ["--model.backbone", str(tmp_path / "saved"), "--model.backbone_config", "{hidden_dropout_prob: 0.2}"]
    options += ["--trainer.max_steps", "1", "--model.optimizer.learning_rate", "1e-12"]
    assert fit(recipe, tmp_path, "on", *options) == 0
    assert "random weights" not in capsys.readouterr().out
    state = torch.load(checkpoints(tmp_path / "on")[0], weights_only=True)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(state["state_dict"][name], weight, rtol=0, atol=1e-8)
    assert json.loads(state["condenser"]["config"])["hidden_dropout_prob"] == 0.2
    assert main(["estimate", "--config", str(recipe), *options[:4]]) == 0


def test_the_hugging_face_trainer_trains_it(tmp_path):
    model = CondenserForPreTraining.of(Condenser.from_masked_lm(MODELS["bert"](0.0), skip_from=2, n_head_layers=1))
    before = copy.deepcopy(model.model.c_head.state_dict())
    rows = [{name: value[0] for name, value in tiny_batch().items()}] * 4
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(before["0.attention.self.query.weight"], model.model.c_head[0].attention.self.query.weight)
    assert equal_state(CondenserForPreTraining.from_pretrained(next(tmp_path.glob("checkpoint-2"))), model)


def test_the_package_gives_away_what_users_import():
    assert condenser.CondenserForPreTraining is CondenserForPreTraining
    assert issubclass(Condenser, Objective)
    with pytest.raises(AttributeError, match="no attribute 'Elsewhere'"):
        condenser.Elsewhere  # noqa: B018
