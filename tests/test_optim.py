"""The optimizer's settings do what they say."""

import math

import numpy as np
import pytest
import torch
from conftest import fit
from test_training import STOP, assert_same_weights, final_state, tiny_condenser
from torch import nn

from condenser.hub import load_export
from condenser.models.backbones.base import backbone_of
from condenser.training.optim import Optimization, build_optimizer, build_schedule


def optimizer_of(model, **settings):
    settings = Optimization(**settings)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return build_optimizer(nn.ModuleDict({"model": model}), settings, start), settings


def rates(schedule_settings, total_steps=100):
    optimizer, settings = optimizer_of(tiny_condenser(), learning_rate=1.0, **schedule_settings)
    schedule, found = build_schedule(optimizer, settings, total_steps), []
    for _ in range(total_steps):
        found.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    return np.array(found)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "linear"}, lambda step: (100 - step) / 90),
        ({"schedule": "cosine"}, lambda step: 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))),
        ({"schedule": "constant"}, lambda step: 1.0),
        ({"schedule": "wsd", "decay_fraction": 0.2}, lambda step: min(1.0, (100 - step) / 20)),
    ],
)
def test_after_the_same_warm_up_each_schedule_has_its_shape(settings, expected):
    found = rates({"warmup_fraction": 0.1, **settings})[:, 0]
    np.testing.assert_allclose(found[:10], np.arange(1, 11) / 11)
    np.testing.assert_allclose(found[10:], [expected(step) for step in range(10, 100)], atol=1e-12)


def test_each_layer_learns_slower_than_the_one_above_and_the_head_at_its_own_rate():
    model = tiny_condenser()
    optimizer, _ = optimizer_of(model, learning_rate=1.0, layer_decay=0.5, head_learning_rate=3.0)
    rate = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(rate) == len(list(model.parameters()))
    backbone = backbone_of(model.lm)
    embeddings, layers = backbone.embeddings, backbone.layers
    assert {rate[p] for p in model.c_head.parameters()} == {3.0}
    for depth, layer in enumerate(reversed(layers), start=1):
        assert {rate[p] for p in layer.parameters()} == {0.5**depth}
    assert {rate[p] for p in embeddings.parameters()} == {0.5 ** (len(layers) + 1)}
    assert {rate[p] for p in model.lm.cls.predictions.transform.parameters()} == {1.0}


def changed(run, export):
    """Which weights of a run differ from those of the export that it started from."""
    before, now = load_export(export).state_dict(), final_state(run)["state_dict"]
    return {name for name, value in before.items() if not torch.equal(now[f"model.{name}"], value)}


@pytest.fixture
def warm(recipe, tiny_export, tmp_path):
    """Runs two steps from the tiny export; gives the names of the weights that changed."""

    def run(*options):
        start = ["--model.backbone", str(tiny_export), "--model.backbone_config", "{}", "--trainer.max_steps", "2"]
        assert fit(recipe, tmp_path, "warm", *start, *options) == 0
        return changed(tmp_path / "warm", tiny_export)

    return run


def test_the_head_alone_is_trained_at_first(warm):
    names = warm("--model.optimizer.head_only_steps", "2")
    assert names
    assert all(name.startswith("c_head.") for name in names)


def test_frozen_layers_stay_as_they_are_and_reinitialised_ones_are_new_draws(warm, tiny_export, tmp_path):
    names = warm("--model.freeze_embeddings=true", "--model.freeze_layers=1", "--model.reinit_layers=1")
    assert not any("embeddings" in name or ".layer.0." in name for name in names)
    assert all(any(part in name for name in names) for part in (".layer.1.", ".layer.2.", "c_head."))
    now = final_state(tmp_path / "warm")["state_dict"]
    for name, value in load_export(tiny_export).state_dict().items():
        distance = (now[f"model.{name}"] - value).abs().max()
        if ".layer.2." in name and name.endswith("dense.weight"):
            assert distance > 0.01
        elif ".layer.2." not in name:
            assert distance < 0.005  # two steps


def test_weights_decay_toward_where_they_started():
    """AdamW without decay, minus rate * decay * (weight - start), written out."""
    models = tiny_condenser(), tiny_condenser()
    start = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    ours, _ = optimizer_of(models[0], learning_rate=0.1, weight_decay=0.5, decay_to_start=True)
    plain, _ = optimizer_of(models[1], learning_rate=0.1, weight_decay=0.0)
    for seed in range(4):
        for optimizer, model in zip((ours, plain), models, strict=True):
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer.step()
        with torch.no_grad():
            for name, p in models[1].named_parameters():
                if p.ndim >= 2:
                    p -= 0.1 * 0.5 * (before[name] - start[name])
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_with_decay_to_start_a_resumed_run_still_knows_where_it_started(recipe, tiny_export, tmp_path):
    start = ["--model.backbone", str(tiny_export), "--model.backbone_config", "{}"]
    start += ["--model.optimizer.decay_to_start", "true", "--model.optimizer.weight_decay", "0.9"]
    assert fit(recipe, tmp_path, "whole", *start) == 0
    assert fit(recipe, tmp_path, "parts", *start, *STOP, "3") == 0
    assert fit(recipe, tmp_path, "parts", *start) == 0
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


class Counting(torch.optim.SGD):
    """Keeps a number of its own beside those of weights, as MADGRAD does."""

    def step(self, closure=None):
        self.state["k"] = self.state.get("k", 0) + 1
        return super().step(closure)


@pytest.mark.slow
def test_what_an_optimizer_keeps_beside_its_weights_is_saved_and_goes_on(recipe, tmp_path):
    options = ["--model.optimizer.optimizer", f"{__name__}.Counting"]
    assert fit(recipe, tmp_path, "a", *options, *STOP, "3") == 0
    assert final_state(tmp_path / "a")["optimizer_states"][0]["state"]["k"] == 3
    assert fit(recipe, tmp_path, "a", *options) == 0
    assert final_state(tmp_path / "a")["optimizer_states"][0]["state"]["k"] == 8


@pytest.mark.parametrize("path", ["torch.optim.RMSprop", "torch.optim.Adafactor"])
def test_another_optimizer_is_a_class_path(path, recipe, tmp_path):
    assert fit(recipe, tmp_path, "other", "--model.optimizer.optimizer", path, "--trainer.max_steps", "2") == 0
    groups = final_state(tmp_path / "other")["optimizer_states"][0]["param_groups"]
    assert ("alpha" in groups[0]) == (path == "torch.optim.RMSprop")
    assert len(groups) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0}, "must be positive"),
        ({"layer_decay": 1.5}, "layer_decay=1.5"),
        ({"decay_fraction": 2}, "decay_fraction=2"),
        ({"head_only_steps": -1}, "must not be negative"),
        ({"gradient_clip": float("nan")}, "gradient_clip=nan"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"optimizer": torch.optim.SGD, "optimizer_options": {"momentun": 0.9}}, "of SGD: .*'momentun'"),
        ({"optimizer": torch.optim.SGD, "decay_to_start": True}, "needs AdamW"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Optimization(**settings)
