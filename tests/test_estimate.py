"""What `condenser estimate` says, against real steps: memory, operations, hours."""

import functools
import itertools
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_of, slow
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from condenser.cli import main
from condenser.data.collate import StepBatch
from condenser.data.datamodule import CondenserDataModule
from condenser.data.store import TokenStore
from condenser.data.synthetic import SyntheticStore
from condenser.models.backbones.base import build_masked_lm
from condenser.models.condenser import Condenser
from condenser.models.flops import bf16_peak
from condenser.models.losses import FUSED_AVAILABLE
from condenser.reports import estimate as estimating
from condenser.reports.rehearsal import KINDS, Rehearsal, Setting, one_pass
from condenser.training.module import CondenserModule
from condenser.training.optim import Optimization, build_optimizer
from condenser.training.step import TrainingStep

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {
    "vocab_size": 8000,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "attention_probs_dropout_prob": 0.0,
}
LENGTHS = np.sort(SyntheticStore(8, 64).lengths)[::-1].copy()
NO_STORE = CondenserDataModule(store="not/there")


@functools.cache
def rehearsal_of(**settings):
    return Rehearsal(small_module(**settings), NO_STORE)


def small_module(**settings):
    return CondenserModule(**{"backbone_config": SMALL, "skip_from": 2, **settings})


def with_real_model(module):
    lm = build_masked_lm(None, module.backbone_config)
    module.model = Condenser.from_masked_lm(lm, **module.options).train()
    return module


def real_batch(lengths):
    fields = one_pass(lengths, NO_STORE)
    small = {name: fields[name] % 8000 for name in ("input_ids", "labels")}
    return StepBatch.of([fields | small | {"step": 0, "micro_batch": 0}])


def train(module, setting):
    """Two steps on a model that is made here too."""
    model = with_real_model(module).model
    model.gradient_checkpointing, model.fused_loss = setting.checkpointing, setting.fused
    step, batch = TrainingStep(model, build_optimizer(module, module.optimization), clip=1.0), real_batch(LENGTHS)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, setting.precision == "bf16-mixed"):
            step.take(batch, torch.full((3,), 1e-3))


def allocated_at_most(function, *args):
    """By the CPU allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(*args)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]))


PLAIN = Setting("32-true", checkpointing=False, fused=False, on_gpu=False)
CHOICES = itertools.product(("32-true", "bf16-mixed"), (False, True))
SETTINGS = [PLAIN._replace(precision=precision, checkpointing=checkpointing) for precision, checkpointing in CHOICES]
FUSED = Setting("bf16-mixed", checkpointing=True, fused=True, on_gpu=False)
NEEDS_NEW_TORCH = pytest.mark.skipif(not FUSED_AVAILABLE, reason="needs torch 2.13")


QUICK = [(SETTINGS[0], True), (SETTINGS[3], False), pytest.param(FUSED, True, marks=NEEDS_NEW_TORCH)]
OTHERS = [*itertools.product(SETTINGS[1:3], (True, False)), (SETTINGS[0], False), (SETTINGS[3], True)]


@pytest.mark.parametrize(("setting", "pruned"), [*QUICK, *(slow(*each) for each in OTHERS)])
def test_memory_is_that_of_real_steps(setting, pruned):
    rehearsed = rehearsal_of(pruned=pruned).peak(setting, LENGTHS)
    measured = allocated_at_most(train, small_module(pruned=pruned), setting)
    tolerance = 0.15 if setting.fused else 0.015  # its bf16 kernels on the CPU take memory of their own
    assert sum(rehearsed.values()) == pytest.approx(measured, rel=tolerance)


def test_memory_on_a_gpu_goes_with_settings_as_it_should():
    rehearsal = rehearsal_of(pruned=True)
    plain, _, bf16, recomputed = (rehearsal.peak(each._replace(on_gpu=True), LENGTHS) for each in SETTINGS)
    n_bytes = 4 * sum(p.numel() for p in rehearsal.model.parameters())
    assert plain["weights"] == pytest.approx(n_bytes, rel=2e-3)  # buffers too
    assert plain["optimizer"] == pytest.approx(2 * n_bytes, rel=1e-3)
    assert plain["gradients"] == n_bytes
    assert plain["forward"] > bf16["forward"] > recomputed["forward"]


def test_frozen_layers_have_no_gradients_and_no_states():
    frozen = Rehearsal(small_module(freeze_embeddings=True, freeze_layers=3), NO_STORE)
    found = frozen.peak(PLAIN, LENGTHS)
    trainable = estimating.parameters(frozen.model)["trainable"]
    assert trainable < estimating.parameters(frozen.model)["head"] + 30_000  # the MLM head's transform
    assert found["optimizer"] == pytest.approx(8 * trainable, rel=1e-2)
    assert found["gradients"] <= 4 * trainable


def test_starting_values_to_decay_to_are_counted():
    rehearsal = Rehearsal(small_module(optimizer=Optimization(decay_to_start=True)), NO_STORE)
    found = rehearsal.peak(PLAIN, LENGTHS)
    sizes = estimating.parameters(rehearsal.model)
    assert found["optimizer"] == pytest.approx(4 * (2 * sizes["total"] + sizes["backbone"]), rel=1e-2)


@pytest.mark.parametrize("lengths", [np.full(8, 62), np.array([126])])
def test_operations_are_those_that_torch_counts(lengths):
    expected = estimating.flops_per_token(rehearsal_of(pruned=True), lengths)
    module, batch = with_real_model(small_module()), real_batch(lengths)
    (fields,) = batch
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sum(term.sum for term in module.model.losses(fields).values()).backward()
    assert expected == pytest.approx(counter.get_total_flops() / batch.total("n_tokens"), rel=0.02)


def estimated(capsys, tmp_path, *args):
    figures = tmp_path / "new" / "costs.json"
    assert main(["estimate", *map(str, args), "--json", str(figures)]) == 0
    return json.loads(figures.read_text()), " ".join(capsys.readouterr().out.split())


@pytest.fixture
def no_rehearsal(monkeypatch):
    """A byte for each row, and a torch without the fused loss."""
    monkeypatch.setattr(estimating, "FUSED_AVAILABLE", False)
    monkeypatch.setattr(Rehearsal, "peak", lambda self, setting, lengths: dict.fromkeys(KINDS, len(lengths)))


@pytest.mark.parametrize("objective", ["cocondenser.CoCondenser", "retromae.RetroMAE"])
def test_the_other_objectives_are_estimated_over_what_they_train_on(objective, spans, tmp_path, capsys, monkeypatch):
    """The demo's recipe: two spans of 32 tokens of each document."""
    monkeypatch.setattr(estimating, "on_gpus", lambda *_: [])  # which takes a while, and does not look at them
    options = ["--config", CONFIGS / "demo.yaml", "--data.store", spans, "--data.span_length", "12"]
    found, _ = estimated(capsys, tmp_path, *options, "--model.objective", f"condenser.models.{objective}")
    n_documents = len(TokenStore(spans, "train").document_bounds()) - 1
    assert found["data"]["rows_per_epoch"] == 2 * n_documents
    assert found["run"]["steps"] == 2500
    assert found["run"]["tokens"] == pytest.approx(2500 * 64 * 13.7, rel=0.05)  # some spans are shorter than 14
    assert found["parameters"]["head"] > 0
    assert all(row["peak"] > 0 for row in found["memory"])


def test_a_shipped_recipe_over_a_store(store, tmp_path, capsys, no_rehearsal):
    options = ["--data.store", store, "--model.gradient_checkpointing", "true", "--mfu", "0.3", "--gpus", "4"]
    found, shown = estimated(capsys, tmp_path, "--config", CONFIGS / "small.yaml", *options)
    n_rows, lengths = found["data"]["rows_per_epoch"], TokenStore(store, "train").lengths
    tokens = int(lengths.sum(dtype=np.int64)) + 2 * n_rows
    assert n_rows == len(lengths)
    assert found["data"]["tokens_per_epoch"] == pytest.approx(tokens)
    assert found["run"]["steps"] == 300
    assert found["run"]["tokens"] == pytest.approx(300 * 64 * tokens / n_rows, rel=0.05)
    (configured,) = [row for row in found["memory"] if row["configured"]]
    assert (configured["precision"], configured["checkpointing"], configured["on_gpu"]) == ("32-true", True, False)
    for row in found["gpus"]:
        hours = found["run"]["tokens"] * found["run"]["flops_per_token"] / (0.3 * bf16_peak(row["gpu"])) / 3600
        assert row["hours"] == pytest.approx(hours / row["devices"])
        assert row["micro_batches"] == row["devices"]
    assert {row["devices"] for row in found["gpus"]} == {1, 4}
    assert "NOT of your data" not in shown
    assert "32-true is several times slower" in shown
    assert "repeats the forward pass" in shown


def test_a_shipped_recipe_without_a_store_and_an_older_torch(tmp_path, capsys, no_rehearsal):
    options = ["--data.store", tmp_path / "none", "--trainer.max_epochs", "2", "--trainer.max_steps", "-1"]
    small = ["--config", CONFIGS / "small.yaml", "--model.skip_from", "3", "--tokens", "2e9"]
    found, shown = estimated(capsys, tmp_path, *small, *options)
    assert "NOT of your data" in shown
    assert found["run"]["tokens"] == pytest.approx(4e9)
    assert not any(row["fused"] for row in found["memory"])
    assert found["parameters"]["total"] > found["parameters"]["backbone"] > found["parameters"]["its embeddings"]


@pytest.mark.parametrize(
    ("devices", "n"), [("auto", 2), (-1, 2), ("-1", 2), (3, 6), ("3", 6), ([1, 5], 4), ("1,5", 4), ("1,", 2)]
)
def test_devices_are_counted_as_lightning_reads_them(devices, n):
    assert estimating.n_devices(Namespace(devices=devices, num_nodes=2)) == n


def test_the_largest_micro_batch_fits_and_a_larger_one_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(estimating, "GPUS", {"L4": 2})
    two_layers = small_module(backbone_config={**SMALL, "num_hidden_layers": 2}, skip_from=1, n_head_layers=1)
    rehearsal, setting = Rehearsal(two_layers, NO_STORE), PLAIN._replace(on_gpu=True)
    data = estimating.Data(None, np.full(100, 126), 100, 12_800, "")
    alone, two = estimating.on_gpus(rehearsal, setting, data, 1, Namespace(mfu=0.4, gpus=2))
    budget = 0.9 * 2e9 - 1e9
    assert sum(rehearsal.peak(setting, np.full(alone["sequences"], 126)).values()) <= budget
    assert sum(rehearsal.peak(setting, np.full(1 + int(1.1 * alone["sequences"]), 126)).values()) > budget
    assert alone["sequences"] > two["sequences"] > 0
    assert alone["micro_batches"] == -(-1024 * 128 // (alone["sequences"] * 128))
    assert two["micro_batches"] % 2 == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.skip_form", "3"], "skip_form"),
        (["--mfu", "40"], "--mfu"),
        (["--tokens", "inf"], "--tokens must be"),
        (["--trainer.accumulate_grad_batches", "2"], "data.micro_batches_per_step"),
        (["--trainer.precision", "16-mixed"], "bf16-mixed"),
        (["--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"], "trainer.max_epochs or trainer.max_steps"),
        (["--model.skip_from", "9"], "skip_from=9"),
        (["--model.backbone_config.max_position_embeddings", "20"], "and a backbone that takes 20"),
        (["--model.optimizer.optimizer", "torch.optim.Adafactor"], "Adafactor reads values"),
        (["--model.backbone", "nobody/nothing"], "a folder, or --model.backbone null for a BERT of base size"),
    ],
)
def test_what_fit_refuses_is_refused(recipe, capsys, options, message):
    assert message in error_of(capsys, main(["estimate", "--config", str(recipe), *options]))


def test_a_backbone_in_a_folder_is_read_without_its_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "model_type": "roberta"}))
    settings = {"backbone": str(tmp_path), "backbone_config": {"num_hidden_layers": 2}, "skip_from": 1}
    rehearsal = Rehearsal(CondenserModule(**settings), NO_STORE)
    assert rehearsal.model.lm.config.num_hidden_layers == 2
    head = estimating.parameters(rehearsal.model)["head"]
    assert head == 2 * (4 * (128 * 128 + 128) + 2 * 128 * 512 + 512 + 128 + 4 * 128)
    assert rehearsal.peak(PLAIN, LENGTHS)["forward"] > 0
