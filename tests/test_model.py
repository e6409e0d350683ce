"""The model against the authors' code: golden losses, hidden states and gradients, pruned and not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from condenser.data.collate import pack
from condenser.models.attention import flat_positions
from condenser.models.backbones.base import parts
from condenser.models.condenser import Condenser
from condenser.models.losses import FUSED_AVAILABLE

GOLDEN = sorted((Path(__file__).parent / "golden").glob("condenser-*.safetensors"))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


WAYS = ["whole", "pruned", "packed", "fused", "recomputed"]  # each of ours beside the authors'; the last four pruned


def load_case(path, pruned):
    with safe_open(path, "pt") as file:
        meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    torch.manual_seed(0)
    model = Condenser.from_masked_lm(
        BertForMaskedLM(BertConfig(**json.loads(meta["config"]) | {"attention_probs_dropout_prob": 0.0})),
        skip_from=int(meta["skip_from"]),
        n_head_layers=int(meta["n_head_layers"]),
        late_mlm=meta["late_mlm"] == "True",
        pruned=pruned,
    ).eval()
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
    model, meta, tensors = load_case(path, pruned)
    model.fused_loss = way == "fused"
    batch = {key.removeprefix("inputs."): value for key, value in tensors.items() if key.startswith("inputs.")}
    inputs = batch
    if way == "packed":
        model.pack()
        inputs = packed(batch)
    if way == "recomputed":
        model.train().gradient_checkpointing = True
        for module in model.modules():
            module.p = 0.0  # of dropout
    out = model(**inputs)
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


def packed(batch):
    """The real tokens of a padded batch, one row after the other."""
    arrays = (batch[name].numpy() for name in ("input_ids", "labels", "attention_mask"))
    input_ids, labels, real = arrays
    fields = {name: torch.from_numpy(array) for name, array in pack(input_ids, labels, real.astype(bool)).items()}
    longest = {"max_seqlen": input_ids.shape[1], "max_query": input_ids.shape[1]}  # bounds suffice
    return fields | longest


def tiny_config(config_class=BertConfig, **settings):
    return config_class(
        **{
            "vocab_size": 90,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 40,
            **settings,
        }
    )


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("model_class", "config_class"), [(BertForMaskedLM, BertConfig), (RobertaForMaskedLM, RobertaConfig)]
)
@pytest.mark.parametrize("n_head_layers", [0, 1, 2])
def test_pruned_layers_give_the_loss_and_gradients_of_whole_layers(
    device, attention, model_class, config_class, n_head_layers
):
    torch.manual_seed(0)
    lm = model_class(tiny_config(config_class, attn_implementation=attention))
    model = Condenser.from_masked_lm(lm, skip_from=2, n_head_layers=n_head_layers).to(device).eval()
    results = []
    for model.pruned in (True, False):
        model.zero_grad()
        out = model(**tiny_batch(device))
        out.loss.backward()
        results.append((out.loss, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


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
    assert all(type(layer) is type(parts(lm).layers[0]) for layer in model.c_head)
    first, second = (layer.intermediate.dense.weight for layer in model.c_head)
    assert not torch.equal(first, second)
    assert abs(first.std().item() - 0.02) < 0.001  # 32,768 draws: 3 sigma is 0.0003
    assert all(layer.intermediate.dense.bias.abs().sum() == 0 for layer in model.c_head)


def test_the_head_sees_the_last_layers_other_tokens_only_through_cls():
    lm = BertForMaskedLM(tiny_config()).eval()
    model = Condenser.from_masked_lm(lm, skip_from=2, pruned=False)
    batch = tiny_batch()
    before = model(**batch).head_hidden_state

    def disturb(layer, args, output):
        return torch.cat([output[:, :1], output[:, 1:] + 1], dim=1)

    with torch.no_grad():
        hook = parts(lm).layers[-1].register_forward_hook(disturb)
        torch.testing.assert_close(model(**batch).head_hidden_state, before)
        hook.remove()
        hook = parts(lm).layers[1].register_forward_hook(disturb)
        assert not torch.allclose(model(**batch).head_hidden_state, before)
        hook.remove()


@pytest.mark.parametrize("pruned", [False, True])
def test_gradient_checkpointing_recomputes_every_layer_once_and_keeps_the_dropout(pruned):
    torch.manual_seed(0)
    model = Condenser.from_masked_lm(BertForMaskedLM(tiny_config()), skip_from=2, pruned=pruned).train()
    batch = tiny_batch()
    calls = []
    for layer in [*parts(model.lm).layers, *model.c_head]:
        layer.intermediate.register_forward_hook(lambda *_: calls.append(1))

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


def test_flat_positions_point_at_the_masked_tokens_in_the_padded_and_in_the_pruned_layout():
    labels = tiny_batch()["labels"]
    masked_index, query_index, masked_slot = flat_positions(labels)
    assert torch.equal(masked_index, (labels.flatten() != -100).nonzero().flatten())
    assert (query_index[:, 0] == 0).all()
    flat = torch.arange(labels.numel()).view(labels.shape).gather(1, query_index).flatten()
    assert torch.equal(flat[masked_slot], masked_index)


@pytest.mark.parametrize("skip_from", [0, 4, -1, 7])
def test_skip_from_outside_the_layers_is_refused(skip_from):
    with pytest.raises(ValueError, match=rf"skip_from={skip_from} must be in 1\.\.3"):
        Condenser.from_masked_lm(BertForMaskedLM(tiny_config()), skip_from=skip_from)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no loss to train on"):
        Condenser.from_masked_lm(BertForMaskedLM(tiny_config()), n_head_layers=0, late_mlm=False)
