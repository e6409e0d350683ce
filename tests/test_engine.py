"""The training engine: packed = padded, compiled = eager, fused = plain, no waiting for the device, counted work."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from test_model import DEVICES, tiny_config
from test_training import assert_same_weights, checkpoints, fit, metrics_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from condenser.cli import main
from condenser.data.collate import Masking, Vocabulary, make_micro_batch
from condenser.data.synthetic import SyntheticStore
from condenser.models import losses
from condenser.models.attention import attend_packed
from condenser.models.condenser import MODEL_INPUTS, Condenser
from condenser.models.flops import Work, bf16_peak, training_flops
from condenser.models.losses import predicted_right, token_losses
from condenser.reports.trial import full_loss_sum
from condenser.training.module import CondenserModule

VOCABULARY = Vocabulary(cls_id=2, sep_id=3, pad_id=1, mask_id=4, random_ids=np.arange(5, 90))


def micro_batch(layout, rows=9, first=0, device="cpu"):
    """Rows of real lengths with ids of the tiny models' vocabulary."""
    store, index = SyntheticStore(1000, max_length=36), np.arange(first, first + rows)
    input_ids, word_starts, lengths = store.rows(index)
    batch = make_micro_batch(
        (5 + input_ids % 85, word_starts, lengths),
        index,
        0,
        VOCABULARY,
        Masking(0),
        layout,  # type: ignore[arg-type]
    )
    moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    return moved, {name: value for name, value in moved.items() if name in MODEL_INPUTS}


def tiny_model(family="bert", **settings):
    torch.manual_seed(0)
    dry = {"attention_probs_dropout_prob": 0.0, **settings}
    if family == "roberta":
        return Condenser.from_masked_lm(RobertaForMaskedLM(tiny_config(RobertaConfig, **dry)), skip_from=2)
    return Condenser.from_masked_lm(BertForMaskedLM(tiny_config(**dry)), skip_from=2)


def loss_and_gradients(model, inputs):
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out.loss, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_packed_gives_the_loss_and_gradients_of_padded(family, pruned, device):
    model = tiny_model(family).eval().to(device)
    model.pruned = pruned
    padded = loss_and_gradients(model, micro_batch("padded", device=device)[1])
    model.pack()
    packed = loss_and_gradients(model, micro_batch("packed", device=device)[1])
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-6)
    still = loss_and_gradients(model, micro_batch("padded", device=device)[1])  # a packing model takes padded ones too
    torch.testing.assert_close(still, padded, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_the_variable_length_kernel_equals_its_reference():
    torch.manual_seed(0)
    bounds, of_queries = (torch.tensor(each, dtype=torch.int32) for each in ([0, 7, 40, 41], [0, 3, 9, 10]))
    query, key, value = (torch.randn(1, 4, n, 32, dtype=torch.bfloat16) for n in (10, 41, 41))
    reference = attend_packed(query.double(), key.double(), value.double(), of_queries, bounds, 6, 33)
    states = [each.cuda().requires_grad_() for each in (query, key, value)]
    attended = attend_packed(*states, of_queries.cuda(), bounds.cuda(), 6, 33)
    torch.testing.assert_close(attended.cpu().double(), reference, rtol=2e-2, atol=2e-2)
    attended.sum().backward()
    assert all(state.grad.isfinite().all() for state in states)


def test_no_token_of_another_sequence_is_attended_to():
    model = tiny_model().eval()
    model.pack()
    _, inputs = micro_batch("packed")
    before = model(**inputs).head_mlm_token_losses
    start, end = inputs["cu_seqlens"][3:5].tolist()
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][start + 1 : end - 1] = 7
    changed = (model(**inputs).head_mlm_token_losses - before).abs() > 1e-6
    own = (inputs["masked_index"] >= start) & (inputs["masked_index"] < end)
    assert own.any()
    assert torch.equal(changed, own)


def test_attention_dropout_is_refused_where_sequences_are_packed(recipe, tmp_path, capsys):
    options = ["--data.layout", "packed", "--model.backbone_config.attention_probs_dropout_prob", "0.1"]
    assert fit(recipe, tmp_path, "r", *options) == 1
    assert "packed sequences need attention_probs_dropout_prob=0, not 0.1" in capsys.readouterr().err


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.skipif(not losses.FUSED_AVAILABLE, reason="torch before 2.13 has no linear_cross_entropy")
def test_the_fused_cross_entropy_gives_the_losses_and_gradients_of_plain_logits(bf16, device):
    torch.manual_seed(0)
    decoder = nn.Linear(24, 300).to(device)
    hidden, targets = torch.randn(50, 24, device=device), torch.randint(0, 300, (50,), device=device)
    results = []
    for fused in (False, True):
        states = hidden.clone().requires_grad_()
        decoder.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            found = token_losses(states, decoder, targets, fused)
        assert found.dtype == torch.float32
        found.sum().backward()
        results.append([found.detach(), states.grad, decoder.weight.grad.clone(), decoder.bias.grad.clone()])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if bf16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(results[0], results[1], **tolerance)
    right = predicted_right(hidden, decoder, targets, chunk=7)
    assert torch.equal(right, decoder(hidden).argmax(-1) == targets)


@pytest.mark.skipif(not losses.FUSED_AVAILABLE, reason="torch before 2.13 has no linear_cross_entropy")
def test_a_step_that_is_scored_keeps_no_more_logits_than_others(monkeypatch):
    """Else a run that fits would run out of memory where it logs first."""
    model, inputs = tiny_model(), micro_batch("padded")[1]
    model.fused_loss = True
    monkeypatch.setattr(model.lm.cls.predictions.decoder, "forward", lambda hidden: pytest.fail("all logits"))
    monkeypatch.setattr("condenser.models.condenser.predicted_right", lambda hidden, decoder, targets: targets > 0)
    assert model(**inputs, score=True).loss.requires_grad


def test_an_older_torch_trains_with_plain_logits_and_refuses_what_it_cannot(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(losses, "FUSED_AVAILABLE", False)
    monkeypatch.setattr("condenser.models.condenser.FUSED_AVAILABLE", False)
    short = ["--trainer.max_steps", "2"]
    assert fit(recipe, tmp_path, "plain", *short) == 0
    assert fit(recipe, tmp_path, "fused", "--model.fused_loss", "true", *short) == 1
    assert "fused_loss needs torch 2.13 or newer" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_compiled_layers_equal_eager_ones_and_are_compiled_once_for_all_shapes(layout, monkeypatch):
    """Two functions: a layer that runs everywhere and one that runs at the queries; for any layer, any shape."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # what is counted comes before
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model().eval()
    if layout == "packed":
        model.pack()
    eager = loss_and_gradients(model, micro_batch(layout)[1])
    model.compile()
    torch.testing.assert_close(loss_and_gradients(model, micro_batch(layout)[1]), eager, rtol=1e-4, atol=1e-6)
    n_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for rows in (2, 3, 8, 17, 30):
        loss_and_gradients(model, micro_batch(layout, rows=rows, first=rows)[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == n_graphs
    assert n_graphs == {"padded": 2, "packed": 2}[layout]
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_every_way_to_compute_a_step_draws_the_same_dropout_and_gives_the_same_gradients(layout, fused, checkpointing):
    """Dropout on: what only saves memory must not change what is drawn."""
    if fused and not losses.FUSED_AVAILABLE:
        pytest.skip("torch before 2.13 has no linear_cross_entropy")
    model = tiny_model(hidden_dropout_prob=0.2).train()
    if layout == "packed":
        model.pack()
    results = []
    for model.fused_loss, model.gradient_checkpointing in ((False, False), (fused, checkpointing)):
        torch.manual_seed(5)
        results.append(loss_and_gradients(model, micro_batch(layout)[1]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_with_dropout_pruned_and_packed_losses_have_the_mean_and_spread_of_whole_layers():
    """200 draws each; a difference of means beyond 4 standard errors would be a fault."""
    found = {}
    for name, pruned, layout in (("whole", False, "padded"), ("pruned", True, "padded"), ("packed", True, "packed")):
        model = tiny_model(hidden_dropout_prob=0.3).train()
        model.pruned = pruned
        if layout == "packed":
            model.pack()
        inputs = micro_batch(layout)[1]
        with torch.no_grad():
            found[name] = torch.stack([model(**inputs).loss for _ in range(200)])
    for name in ("pruned", "packed"):
        standard_error = ((found[name].var() + found["whole"].var()) / 200).sqrt()
        assert (found[name].mean() - found["whole"].mean()).abs() < 4 * standard_error
        assert 0.7 < found[name].std() / found["whole"].std() < 1.4


WAITS = re.compile(r"aten\.(_local_scalar_dense|nonzero|masked_select|unique|equal|is_nonzero|_assert_async)")


class Waiting(TorchDispatchMode):
    """Counts the operations for which a GPU would make the host wait."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        boolean = (
            any(torch.is_tensor(index) and index.dtype == torch.bool for index in (args[1:2] and args[1]) or ())
            if str(function).startswith("aten.index.")
            else False
        )
        if WAITS.match(str(function)) or boolean:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


class Watching(CondenserModule):
    """Notes what each training step would wait for; the optimizer skips on the device, as on a GPU."""

    waits: dict[int, list[str]] = {}  # noqa: RUF012

    def training_step(self, micro_batches, batch_idx):
        with Waiting() as waiting:
            super().training_step(micro_batches, batch_idx)
        self.waits[self.global_step] = waiting.found


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_no_training_step_waits_for_the_device_but_where_it_logs(layout, recipe, tmp_path):
    Watching.waits = {}
    options = ["--model", f"{__name__}.Watching", "--data.layout", layout, "--model.late_mlm", "true"]
    assert fit(recipe, tmp_path, "w", *options) == 0
    quiet = {step: found for step, found in Watching.waits.items() if step % 2}  # it logs every second step
    assert len(quiet) == 4
    assert not any(quiet.values()), quiet


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_on_a_gpu_no_training_step_synchronises(layout, recipe, tmp_path):
    options = ["--model", f"{__name__}.Strict", "--data.layout", layout, "--trainer.log_every_n_steps", "100"]
    options += ["--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed"]
    assert fit(recipe, tmp_path, "s", *options) == 0


class Strict(CondenserModule):
    def training_step(self, micro_batches, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if self.global_step > 1 else "default")
        super().training_step(micro_batches, batch_idx)
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("n_head_layers", [0, 1, 2])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_counted_operations_agree_with_torchs_counter(layout, n_head_layers, pruned):
    """What is done: padding and whole layers included. The counter knows attention by its products only."""
    torch.manual_seed(0)
    config = tiny_config(attention_probs_dropout_prob=0.0, hidden_size=64, intermediate_size=256)
    model = Condenser.from_masked_lm(BertForMaskedLM(config), skip_from=2, n_head_layers=n_head_layers, pruned=pruned)
    batch, inputs = micro_batch(layout, rows=30)
    if layout == "packed":
        model.pack()
        n_keys, n_queries = len(inputs["input_ids"]), len(inputs["query_index"])  # the reference attends everywhere
        pairs, query_pairs = n_keys**2, n_queries * n_keys
    else:
        rows, n_keys = inputs["input_ids"].shape
        n_queries = inputs["query_index"].numel()
        pairs, query_pairs = rows * n_keys**2, n_queries * n_keys
    work = Work(batch["area"], pairs, n_queries, query_pairs, batch["n_masked"])
    if not pruned:
        work = work._replace(queries=work.tokens, query_pairs=work.pairs)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    assert training_flops(config, n_head_layers, True, work) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_needed_work_is_that_of_the_real_tokens():
    for layout in ("padded", "packed"):
        batch, _ = micro_batch(layout)
        lengths = np.diff(micro_batch("packed")[1]["cu_seqlens"])
        queries = np.diff(micro_batch("packed")[1]["cu_seqlens_query"])
        expected = lengths.sum(), (lengths**2).sum(), queries.sum(), (lengths * queries).sum(), queries.sum() - 9
        assert Work.needed(batch) == tuple(expected)


def test_peaks_are_found_by_the_names_that_devices_have():
    known = {"NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA A100-SXM4-80GB": 312}
    known |= {"NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA GeForce RTX 4090": 165.2, "NVIDIA GH200 480GB": 989}
    assert {name: bf16_peak(name) for name in known} == {name: peak * 1e12 for name, peak in known.items()}
    assert bf16_peak("AMD EPYC") is None


class Poisoned(CondenserModule):
    """Makes one micro-batch of one step infinite."""

    def step_loss(self, output):
        self.calls = getattr(self, "calls", 0) + 1
        return super().step_loss(output) * (float("inf") if self.calls == 4 * 4 + 3 else 1.0)  # step 5, micro-batch 2


@pytest.mark.parametrize(
    "optimizer", [[], ["--model.optimizer.optimizer", "torch.optim.RAdam"]], ids=["fused", "other"]
)
def test_a_step_that_is_not_finite_is_skipped_and_stops_training_with_its_samples_saved(
    optimizer, recipe, tmp_path, capsys
):
    options = ["--model", f"{__name__}.Poisoned", "--checkpoint.every_n_steps", "1", *optimizer]
    assert fit(recipe, tmp_path, "bad", *options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    saved = torch.load(tmp_path / "bad" / "not-finite-step=5-rank=0.pt", weights_only=True)
    samples = ", ".join(map(str, saved[2]["sample_ids"].tolist()))
    assert f"not finite at step 5: the loss of micro-batch 2, samples {samples}." in error
    assert [path.name for path in checkpoints(tmp_path / "bad")] == [
        "last-step=4.ckpt",
        "best-step=4.ckpt",
        "last-step=3.ckpt",
    ]
    assert fit(recipe, tmp_path, "good", "--trainer.max_steps", "8", *optimizer, "--checkpoint.every_n_steps", "1") == 0
    assert all(parameter.isfinite().all() for parameter in final_weights(tmp_path / "bad"))


def final_weights(run):
    return torch.load(checkpoints(run)[0], weights_only=True)["state_dict"].values()


def test_the_optimizer_skips_a_step_on_the_device():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    optimizer.found_inf = torch.tensor(1.0)
    weight.grad = torch.tensor([1.0, float("nan"), 1.0])
    optimizer.step()
    assert torch.equal(weight, torch.ones(3))
    optimizer.found_inf = torch.tensor(0.0)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert (weight < 1).all()


def test_a_trace_is_written_where_it_is_asked_for(recipe, tmp_path):
    assert fit(recipe, tmp_path, "t", "--trace_steps", "2") == 0
    assert (tmp_path / "t" / "trace.json.gz").stat().st_size > 10_000
    assert "aten::addmm" in (tmp_path / "t" / "trace.txt").read_text()


@pytest.mark.slow
def test_packed_compiled_and_fused_runs_train_to_the_weights_of_a_plain_one(recipe, tmp_path):
    dry = ["--model.backbone_config.hidden_dropout_prob", "0"]
    assert fit(recipe, tmp_path, "plain", *dry) == 0
    fast = ["--data.layout", "packed", "--model.compile", "true"]
    fast += ["--model.fused_loss", "true"] if losses.FUSED_AVAILABLE else []
    assert fit(recipe, tmp_path, "fast", *dry, *fast) == 0
    assert_same_weights(tmp_path / "plain", tmp_path / "fast", rtol=1e-3, atol=2e-5)
    assert float(metrics_of(tmp_path / "fast")[0]["perf/padding_fraction"]) == 0


def test_bench_measures_the_authors_recipe_and_each_of_our_steps(recipe, store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    options = ["--config", str(recipe), "--sequences", "8", "--rounds", "2", "--json", str(tmp_path / "b.json")]
    assert main(["bench", *options, "--max-length", "32"]) == 0  # rows in memory
    found = json.loads((tmp_path / "b.json").read_text())["recipes"]
    names = ["authors' recipe", "+ masked tokens only", "+ batches by length", "+ pruned last layers"]
    assert list(found) == [*names, "+ fused optimizer", "+ compiled layers"]
    work = [np.median(figures["flops_per_token"]) for figures in found.values()]
    assert work[0] > work[1] > work[2] > work[3] == work[4] == work[5]
    assert all(len(figures["tokens_per_second"]) == 2 for figures in found.values())
    memory = [figures["peak_memory_gb"][0] for figures in found.values()]
    assert memory[0] > 2 * memory[3] > 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in found)
    assert main(["bench", *options, "--store", str(store), "--rounds", "1"]) == 0
    too_long = "max_position_embeddings=40; the rows need 128"
    for wrong, message in ((["--steps", "100"], "Lower --steps"), ([], too_long)):
        assert main(["bench", *options, *wrong]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("n_head_layers", [0, 2])
def test_the_authors_recipe_of_the_bench_is_the_same_loss(n_head_layers):
    torch.manual_seed(0)
    model = Condenser.from_masked_lm(BertForMaskedLM(tiny_config()), skip_from=2, n_head_layers=n_head_layers).eval()
    batch, inputs = micro_batch("padded")
    torch.testing.assert_close(full_loss_sum(model, batch), model(**inputs).loss_sum)
