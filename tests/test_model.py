"""The model against the authors' code: golden losses, hidden states and gradients, pruned and not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from condenser.models.backbones.base import backbone_of
from condenser.models.condenser import Condenser
from condenser.models.losses import FUSED_AVAILABLE

GOLDEN = sorted((Path(__file__).parent / "golden").glob("condenser-*.safetensors"))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


WAYS = ["whole", "pruned", "fused", "recomputed"]  # each of ours beside the authors'; the last three pruned


def load_case(path, objective=Condenser, **settings):
    """A model of the authors' with its weights, what is known of it, and tensors by part and name."""
    with safe_open(path, "pt") as file:
        meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    torch.manual_seed(0)
    lm = BertForMaskedLM(BertConfig(**json.loads(meta["config"]) | {"attention_probs_dropout_prob": 0.0}))
    settings |= {"skip_from": int(meta["skip_from"]), "n_head_layers": int(meta["n_head_layers"])}
    model = objective.from_masked_lm(lm, late_mlm=meta.get("late_mlm", "True") == "True", **settings).eval()
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("decoder" in key for key in missing), missing
    model.lm.tie_weights()
    return model, meta, tensors


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_losses_states_and_gradients_equal_those_of_the_authors_code(path, way):
    pruned = way != "whole"
    if way == "fused" and not FUSED_AVAILABLE:
        pytest.skip("torch before 2.13 has no linear_cross_entropy")
    model, meta, tensors = load_case(path, pruned=pruned)
    model.fused_loss = way == "fused"
    batch = {key.removeprefix("inputs."): value for key, value in tensors.items() if key.startswith("inputs.")}
    if way == "recomputed":
        model.train().gradient_checkpointing = True
        for module in model.modules():
            module.p = 0.0  # of dropout
    out = model(**batch)
    assert out.loss.item() == pytest.approx(float(meta["loss"]), rel=1e-4)
    assert out.head_mlm_loss.item() == pytest.approx(float(meta["head_mlm_loss"]), rel=1e-4)
    if meta["late_mlm"] == "True":
        assert out.mlm_loss.item() == pytest.approx(float(meta["late_mlm_loss"]), rel=1e-4)
    else:
        assert out.mlm_loss is None
    real = batch["attention_mask"].bool()
    for name in ("last_hidden_state", "skip_hidden_state", "head_hidden_state"):
        if pruned:
            assert getattr(out, name) is None
        else:
            torch.testing.assert_close(
                getattr(out, name)[real], tensors[f"expected.{name}"][real], rtol=1e-4, atol=1e-5
            )
    out.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    checked = 0
    for key, reference in tensors.items():
        if key.startswith("grads."):
            gradient = gradients[key.removeprefix("grads.")]
            gradient = torch.zeros_like(reference) if gradient is None else gradient
            assert (gradient - reference).norm() <= 1e-3 * reference.norm() + 1e-4, key
            checked += 1
    assert checked >= len(gradients)


def tiny_config(config_class=BertConfig, **settings):
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 40}
    return config_class(**sizes | settings)


def tiny_batch(device="cpu", rows=5, length=17):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, 90, (rows, length), generator=generator)
    lengths = torch.randint(4, length + 1, (rows,), generator=generator)
    attention_mask = (torch.arange(length) < lengths[:, None]).long()
    scored = (torch.rand(rows, length, generator=generator) < 0.3) & attention_mask.bool()
    scored[:, 0], scored[:, 1] = False, True
    labels = torch.where(scored, input_ids, -100)
    batch = {
        "input_ids": input_ids * attention_mask + (1 - attention_mask),
        "attention_mask": attention_mask,
        "labels": labels,
    }
    return {key: value.to(device) for key, value in batch.items()}


def test_without_a_head_the_loss_is_hugging_faces_own_mlm_loss():
    lm = BertForMaskedLM(tiny_config()).eval()
    model = Condenser.from_masked_lm(lm, n_head_layers=0)
    batch = tiny_batch()
    out = model(**batch)
    assert out.head_mlm_loss is None
    torch.testing.assert_close(out.loss, lm(**batch).loss)


def test_the_backbone_is_kept_and_each_head_layer_has_its_own_draw():
    lm = BertForMaskedLM(tiny_config(hidden_size=128, intermediate_size=256, num_attention_heads=4))
    model = Condenser.from_masked_lm(lm, skip_from=2, n_head_layers=2)
    assert model.lm is lm
    assert all(type(layer) is type(backbone_of(lm).layers[0]) for layer in model.c_head)
    first, second = (layer.intermediate.dense.weight for layer in model.c_head)
    assert not torch.equal(first, second)
    assert abs(first.std().item() - 0.02) < 0.001  # 32,768 draws: 3 sigma is 0.0003
    assert all(layer.intermediate.dense.bias.abs().sum() == 0 for layer in model.c_head)


@pytest.mark.parametrize("pruned", [False, True])
def test_gradient_checkpointing_recomputes_every_layer_once_and_keeps_the_dropout(pruned):
    torch.manual_seed(0)
    model = Condenser.from_masked_lm(BertForMaskedLM(tiny_config()), skip_from=2, pruned=pruned).train()
    batch = tiny_batch()
    calls = []
    for layer in [*backbone_of(model.lm).layers, *model.c_head]:
        layer.intermediate.intermediate_act_fn.register_forward_hook(lambda *_: calls.append(1))

    def gradients():
        model.zero_grad()
        calls.clear()
        torch.manual_seed(3)
        model(**batch).loss.backward()
        return [p.grad.clone() for p in model.parameters()], len(calls)

    plain, n_plain = gradients()
    model.gradient_checkpointing = True
    recomputed, n_recomputed = gradients()
    assert (n_plain, n_recomputed) == (6, 12)
    torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model_class", "config_class"), [(BertForMaskedLM, BertConfig), (RobertaForMaskedLM, RobertaConfig)]
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_states_are_hugging_faces_own_wherever_the_padding_is(side, model_class, config_class):
    torch.manual_seed(0)
    lm = model_class(tiny_config(config_class)).eval()
    batch = tiny_batch()
    if side == "left":
        batch = {name: value.flip(1) for name, value in batch.items()}
    types = torch.ones_like(batch["input_ids"]) if config_class is BertConfig else None
    out = Condenser.from_masked_lm(lm, skip_from=2, pruned=False)(**batch, token_type_ids=types)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = lm(**inputs, token_type_ids=types, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    for ours, theirs in ((out.last_hidden_state, expected[-1]), (out.skip_hidden_state, expected[2])):
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-5)
        assert (ours[~real] == 0).all()


def test_rows_without_labels_are_refused():
    with pytest.raises(ValueError, match="labels are needed"):
        Condenser.from_masked_lm(BertForMaskedLM(tiny_config()), skip_from=2)(tiny_batch()["input_ids"])


def test_masks_and_labels_may_be_of_other_types():
    lm, batch = RobertaForMaskedLM(tiny_config(RobertaConfig)), tiny_batch()
    model = Condenser.from_masked_lm(lm, skip_from=2).eval()
    other = {"attention_mask": batch["attention_mask"].float(), "labels": batch["labels"].int()}
    torch.testing.assert_close(model(**batch | other).loss, model(**batch).loss)


def test_a_row_without_a_token_is_refused():
    batch = tiny_batch()
    batch["attention_mask"][3] = 0
    with pytest.raises(ValueError, match="row 3 of attention_mask has no token"):
        Condenser.from_masked_lm(BertForMaskedLM(tiny_config()), skip_from=2)(**batch)


@pytest.mark.parametrize("skip_from", [0, 1.5, 4, -1])
def test_a_layer_that_there_is_not_is_refused_and_a_whole_number_is_one_of_any_type(skip_from):
    lm = BertForMaskedLM(tiny_config()).eval()
    with pytest.raises(ValueError, match=f"skip_from={skip_from} must be in 1..3: the backbone has 4 layers"):
        Condenser.from_masked_lm(lm, skip_from=skip_from)
    assert Condenser.from_masked_lm(lm, skip_from=lm.config.num_hidden_layers / 2).skip_from == 2
