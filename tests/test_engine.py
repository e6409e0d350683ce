"""The training engine: flat = padded, joined = apart, compiled = eager, fused = plain, no waiting, counted work."""

import contextlib
import json
import pickle
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import error_of, fit, slow, write_jsonl
from test_model import DEVICES, tiny_config
from test_training import STOP, assert_minimised, assert_same_weights, checkpoints, metrics_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from condenser.cli import main
from condenser.data.batching import BucketedBatches
from condenser.data.collate import Masking, StepBatch, Vocabulary, collate
from condenser.data.mixing import Mixture
from condenser.data.shapes import Shape, Shapes, filled
from condenser.data.steps import Steps
from condenser.data.store import Rows
from condenser.data.synthetic import SyntheticStore
from condenser.models import attention, losses
from condenser.models.attention import attend, bounds_of
from condenser.models.condenser import Condenser
from condenser.models.flops import Work, affordable_tokens, bf16_peak, training_flops
from condenser.models.losses import predicted_right, token_losses
from condenser.models.objective import COUNTS, Term
from condenser.reports.trial import Authors
from condenser.training.guard import Guard
from condenser.training.logs import Trace
from condenser.training.module import CondenserModule
from condenser.training.passes import inputs_of, pass_loss
from condenser.training.step import TrainingStep

VOCABULARY = Vocabulary(cls_id=2, sep_id=3, pad_id=1, mask_id=4, random_ids=np.arange(5, 90))
DRY = {"attention_probs_dropout_prob": 0.0}
SHAPES = Shapes.of(SyntheticStore(1000, max_length=36).lengths, 0.15)


def flat_pass(rows=9, first=0, shapes=None):
    """Rows of real lengths with ids of the tiny models' vocabulary: arrays."""
    index = np.arange(first, first + rows)
    tokens, word_starts, lengths = SyntheticStore(1000, max_length=36).rows(index)
    fields = collate(Rows(5 + tokens % 85, word_starts, lengths), index, 0, VOCABULARY, Masking(0))
    fields = filled(fields, shapes.fitting(fields)) if shapes else fields
    return fields | {"epoch": 0, "step": 0, "micro_batch": first}


def step_batch(*passes, device="cpu"):
    return StepBatch.of([*passes]).to(device)


def inputs(rows=9, first=0, shapes=None, device="cpu"):
    """What an objective sees of such a pass."""
    (fields,) = step_batch(flat_pass(rows, first, shapes), device=device)
    return inputs_of(fields)


def padded(fields):
    """A pass in padded rows ``[B, L]``."""
    lengths = fields["cu_seqlens"].diff()
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    labels = torch.full_like(fields["input_ids"], -100).index_copy(0, fields["masked_index"], fields["labels"])
    found = {"attention_mask": mask}
    for name, flat, fill in (("input_ids", fields["input_ids"], 1), ("labels", labels, -100)):
        found[name] = torch.full(mask.shape, fill)
        found[name][mask.bool()] = flat
    return found


def tiny_model(family="bert", n_head_layers=2, **settings):
    torch.manual_seed(0)
    config = tiny_config(RobertaConfig if family == "roberta" else BertConfig, **DRY | settings)
    lm = (RobertaForMaskedLM if family == "roberta" else BertForMaskedLM)(config)
    return Condenser.from_masked_lm(lm, skip_from=config.num_hidden_layers // 2, n_head_layers=n_head_layers)


def loss_of(model, fields, score=False):
    return torch.stack([term.sum for term in model.losses(fields, score).values()]).sum()


def loss_and_gradients(model, *passes):
    model.zero_grad()
    found = [loss_of(model, fields) for fields in passes]
    for loss in found:
        loss.backward()
    return torch.stack(found).sum().detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_flat_pass_has_the_loss_and_gradients_of_padded_rows(family, pruned):
    model = tiny_model(family).eval()
    model.pruned = pruned
    flat = loss_and_gradients(model, inputs())
    model.zero_grad()
    out = model(**padded(inputs()))
    n_masked = len(inputs()["labels"])
    (out.loss * n_masked).backward()
    rows = (out.loss * n_masked).detach(), [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(flat, rows, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_micro_batches_may_be_computed_together_and_filled_up_by_dummies(family, pruned, device):
    """Nothing of a dummy is in the loss, in what is counted, or in any gradient."""
    model = tiny_model(family).eval().to(device)
    model.pruned = pruned
    apart = loss_and_gradients(model, *(inputs(9, first, device=device) for first in (0, 9, 18)))
    for shapes in (None, SHAPES, Shapes(30.0, 5.0, 40)):
        together = inputs(27, 0, shapes, device)
        torch.testing.assert_close(loss_and_gradients(model, together), apart, rtol=1e-4, atol=1e-6)
        n_right = sum(int(term.correct.sum()) for term in model.losses(together, score=True).values())
        plain = model.losses(inputs(27, device=device), score=True).values()
        assert n_right == sum(int(term.correct.sum()) for term in plain)


def test_a_pass_of_a_few_tokens_is_filled_up_too():
    row = int(SyntheticStore(1000, max_length=36).lengths.argmin())
    assert flat_pass(1, row)["n_tokens"] < 32
    fields = flat_pass(1, row, SHAPES)
    assert len(fields["input_ids"]) == 2 * SHAPES.longest


@pytest.mark.parametrize("sizes", [(400, 40, 70, 40), (300, 12, 50, 40), (1024, 64, 128, 64)])
def test_a_pass_is_filled_up_by_sequences_that_begin_at_tokens_and_are_not_longer_than_real_ones(sizes):
    tokens, sequences, masked, longest = sizes
    shape = Shape(tokens, sequences, masked, sequences + masked, longest, longest)
    fields = filled(flat_pass(), shape)
    lengths, n_read = np.diff(fields["cu_seqlens"]), np.diff(fields["cu_seqlens_query"])
    assert [len(fields[n]) for n in ("input_ids", "position_ids", "labels", "masked_index", "query_index")] == [
        shape.tokens,
        shape.tokens,
        shape.masked,
        shape.masked,
        shape.queries,
    ]
    assert len(lengths) == len(n_read) == shape.sequences
    assert max(lengths.max(), n_read.max()) <= shape.longest
    assert (n_read[lengths == 0] == 0).all()
    assert (n_read[lengths > 0] > 0).all()
    assert (fields["cu_seqlens"][:-1] < shape.tokens).all()
    assert (fields["cu_seqlens_query"][:-1] < shape.queries).all()
    sequence = np.searchsorted(fields["cu_seqlens"], np.arange(shape.tokens), side="right") - 1
    assert (fields["position_ids"] == np.arange(shape.tokens) - fields["cu_seqlens"][sequence]).all()
    assert (sequence[fields["query_index"]] == np.repeat(np.arange(shape.sequences), n_read)).all()
    assert (fields["labels"][flat_pass()["n_masked"] :] == -100).all()
    assert (fields["n_tokens"], fields["n_masked"]) == (flat_pass()["n_tokens"], flat_pass()["n_masked"])


@pytest.mark.gpu
def test_the_variable_length_kernel_equals_attention_over_rows():
    torch.manual_seed(0)
    cu = [torch.tensor(each, device="cuda") for each in ([0, 3, 9, 10], [0, 7, 40, 41])]
    states = [torch.randn(n, 4, 32, dtype=torch.bfloat16, device="cuda") for n in (10, 41, 41)]
    found = []
    for kernel in (True, False):
        leaves = [each.clone().requires_grad_() for each in states]
        queries, keys = (bounds_of(bounds, 40, int(bounds[-1]), kernel) for bounds in cu)
        attended = attend(leaves[0], torch.stack(leaves[1:], dim=1), queries, keys)
        attended.square().sum().backward()
        found.append([attended.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*found, rtol=3e-2, atol=3e-2)


def test_no_token_of_another_sequence_is_attended_to():
    model, fields = tiny_model().eval(), inputs()
    before = model.losses(fields, score=True)["head_mlm"].losses
    start, end = fields["cu_seqlens"][3:5].tolist()
    ids = fields["input_ids"].clone()
    ids[start + 1 : end - 1] = 7
    changed = (model.losses(fields | {"input_ids": ids}, score=True)["head_mlm"].losses - before).abs() > 1e-6
    own = (fields["masked_index"] >= start) & (fields["masked_index"] < end)
    assert own.any()
    assert torch.equal(changed, own)


def test_attention_dropout_is_applied_where_it_is_asked_for_in_training_alone():
    model, fields = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.3), inputs()
    drawn = {float(loss_of(model.train(), fields).detach()) for _ in range(3)}
    assert len(drawn) == 3
    assert len({float(loss_of(model.eval(), fields).detach()) for _ in range(3)}) == 1
    torch.testing.assert_close(
        loss_of(model.eval(), fields), loss_of(tiny_model(hidden_dropout_prob=0.0).train(), fields)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.skipif(not losses.FUSED_AVAILABLE, reason="torch before 2.13 has no linear_cross_entropy")
def test_the_fused_cross_entropy_gives_the_losses_and_gradients_of_plain_logits(bias, bf16, device):
    torch.manual_seed(0)
    decoder = nn.Linear(24, 300, bias=bias).to(device)
    hidden, targets = torch.randn(50, 24, device=device), torch.randint(0, 300, (50,), device=device)
    targets[7:9] = -100
    results = []
    for fused in (False, True):
        states = hidden.clone().requires_grad_()
        decoder.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            found, correct = token_losses(states, decoder, targets, fused, score=True)
        assert found.dtype == torch.float32
        found.sum().backward()
        results.append([found.detach(), states.grad, *(weight.grad.clone() for weight in decoder.parameters())])
    assert torch.equal(correct, predicted_right(hidden, decoder, targets)) or bf16
    assert not found[7:9].any()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if bf16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(results[0], results[1], **tolerance)


@pytest.mark.skipif(not losses.FUSED_AVAILABLE, reason="torch before 2.13 has no linear_cross_entropy")
def test_a_step_that_is_scored_keeps_no_more_logits_than_others(monkeypatch):
    """Else a run that fits would run out of memory where it logs first."""
    model = tiny_model()
    model.fused_loss = True
    monkeypatch.setattr(losses, "ROWS_AT_ONCE", 10)
    assert len(inputs()["labels"]) > 10  # of each stream

    class Logits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            assert not (torch.is_tensor(output) and output.ndim == 2 and output.shape[1] == 90 and len(output) > 32)
            return output

    with Logits():
        assert loss_of(model, inputs(), score=True).requires_grad


def test_an_older_torch_trains_with_plain_logits_and_refuses_what_it_cannot(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(losses, "FUSED_AVAILABLE", False)
    short = ["--trainer.max_steps", "2"]
    assert fit(recipe, tmp_path, "plain", *short) == 0
    assert fit(recipe, tmp_path, "fused", "--model.fused_loss", "true", *short) == 1
    assert "fused_loss needs torch 2.13 or newer" in capsys.readouterr().err


@pytest.mark.parametrize("bias", [True, False])
def test_logits_over_a_vocabulary_that_is_filled_up_are_the_same_losses(bias, monkeypatch):
    torch.manual_seed(0)
    decoder, hidden, targets = nn.Linear(24, 90, bias=bias), torch.randn(50, 24), torch.randint(0, 90, (50,))
    plain, right = token_losses(hidden, decoder, targets, score=True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with FlopCounterMode(display=False) as counter:
        padded_losses, still_right = token_losses(hidden, decoder, targets, score=True)
    assert counter.get_total_flops() == 2 * 50 * 24 * 128  # the next multiple of 64
    torch.testing.assert_close(padded_losses, plain)
    assert torch.equal(right, still_right)


def training_step(model, **options):
    return TrainingStep(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), **options)


def scale_of(batch):
    return 1 / torch.tensor([batch.total(name) for name in COUNTS])


@pytest.mark.parametrize(
    ("backend", "checkpointing"),
    [("eager", False), slow("aot_eager", False), slow("aot_eager", True)],
)
def test_a_compiled_pass_is_one_graph_for_each_shape_and_equals_an_eager_one(backend, checkpointing, monkeypatch):
    """Dropout off; gradients and scores; nothing is compiled again once every shape has been seen."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))  # what is counted comes before
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    n_graphs = torch._dynamo.utils.counters["stats"]
    batches = [step_batch(flat_pass(9, 0, SHAPES), flat_pass(9, 9, SHAPES)), step_batch(flat_pass(18, 60, SHAPES))]
    found = []
    for compiled in (False, True):
        model = tiny_model(n_head_layers=1, num_hidden_layers=2, hidden_dropout_prob=0.0)
        model.gradient_checkpointing = checkpointing
        step = training_step(model, compiled=compiled)
        passes = [step.passes(batch, scale_of(batch), score=True) for batch in batches]
        found.append([[p.losses for p in passes], [p.shares for p in passes], step.gradients])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    seen = n_graphs["unique_graphs"]
    assert seen == len({len(fields["input_ids"]) for batch in batches for fields in batch})
    for batch in [*batches, *batches]:
        step.take(batch, scale_of(batch), score=False)
    assert n_graphs["unique_graphs"] == seen
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(("fused", "checkpointing"), [(False, True), (True, False), (True, True)])
def test_every_way_to_compute_a_step_draws_the_same_dropout_and_gives_the_same_gradients(fused, checkpointing):
    """Dropout on: what only saves memory must not change what is drawn."""
    if fused and not losses.FUSED_AVAILABLE:
        pytest.skip("torch before 2.13 has no linear_cross_entropy")
    model = tiny_model(hidden_dropout_prob=0.2).train()
    results = []
    for model.fused_loss, model.gradient_checkpointing in ((False, False), (fused, checkpointing)):
        torch.manual_seed(5)
        results.append(loss_and_gradients(model, inputs()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_with_dropout_the_losses_of_pruned_layers_have_the_mean_and_spread_of_whole_ones():
    """200 draws each; a difference of means beyond 4 standard errors would be a fault."""
    found = {}
    for pruned in (True, False):
        model = tiny_model(hidden_dropout_prob=0.3).train()
        model.pruned = pruned
        with torch.no_grad():
            found[pruned] = torch.stack([loss_of(model, inputs()) for _ in range(200)])
    standard_error = ((found[True].var() + found[False].var()) / 200).sqrt()
    assert (found[True].mean() - found[False].mean()).abs() < 4 * standard_error
    assert 0.7 < found[True].std() / found[False].std() < 1.4


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e3])
@pytest.mark.parametrize("optimizer_class", [partial(torch.optim.AdamW, fused=True), torch.optim.RAdam])
def test_a_step_clips_as_torch_does_and_leaves_no_gradient(optimizer_class, clip):
    batch = step_batch(flat_pass(), flat_pass(9, 9))
    models = [tiny_model(hidden_dropout_prob=0.0) for _ in range(2)]
    step = TrainingStep(models[0], optimizer_class(models[0].parameters(), lr=1e-3), clip=clip)
    optimizer = optimizer_class(models[1].parameters(), lr=1e-3)
    buffers = [gradient.data_ptr() for gradient in step.gradients]
    for _ in range(3):
        _, norm = step.take(batch, scale_of(batch))
        total = sum(loss_of(models[1], inputs_of(fields)) for fields in batch) / batch.total("n_masked")
        optimizer.zero_grad()
        total.backward()
        expected = nn.utils.clip_grad_norm_(models[1].parameters(), clip or float("inf"))
        optimizer.step()
        torch.testing.assert_close(norm, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close([*models[0].parameters()], [*models[1].parameters()], rtol=1e-3, atol=2e-6)
    assert [weight.grad.data_ptr() for weight in step.weights] == buffers
    assert not any(gradient.any() for gradient in step.gradients)


def test_a_gradient_that_somebody_lets_go_of_is_taken_up_again():
    batch, found = step_batch(flat_pass()), []
    for lets_go in (False, True):
        model = tiny_model(hidden_dropout_prob=0.0)
        step = training_step(model)
        for _ in range(3):
            if lets_go:
                model.zero_grad(set_to_none=True)
            step.take(batch, scale_of(batch))
        found.append([*model.parameters()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


class Counting(TorchDispatchMode):
    """Counts operations, views left out, and those for which a GPU would make the host wait."""

    WAITS = re.compile(r"aten\.(_local_scalar_dense|nonzero|masked_select|unique|equal|is_nonzero|_assert_async)")
    MAY_CHANGE = re.compile(
        r"aten\.(view|_unsafe_view|t|transpose|detach|alias|select|slice|split|expand|unsqueeze|as_strided)"
    )

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.n += not self.MAY_CHANGE.match(name)
        index = args[1] if name.startswith("aten.index.") else ()
        if self.WAITS.match(name) or any(torch.is_tensor(each) and each.dtype == torch.bool for each in index):
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_dispatches_few_operations_and_none_for_each_weight():
    """Of 12 + 2 layers and eight micro-batches joined to one pass; a GPU is kept waiting by little else."""
    step, batch = training_step(tiny_model(num_hidden_layers=12), clip=1.0), step_batch(flat_pass(72))
    step.take(batch, torch.ones(4))
    with Counting() as whole:
        step.take(batch, torch.ones(4))
    with Counting() as update:
        step.update(torch.ones(()), torch.zeros(()), step.optimizer.step)
    n_weights = len(step.weights)
    assert whole.n - update.n - n_weights < 90 * 14  # adding gradients is an operation for each weight
    assert update.n < 20 < n_weights
    assert not whole.waits


class Watching(CondenserModule):
    """Notes what each training step would wait for; the optimizer skips on the device, as on a GPU."""

    waits: dict[int, list[str]] = {}  # noqa: RUF012

    def training_step(self, batch, batch_idx):
        with Counting() as counting:
            super().training_step(batch, batch_idx)
        self.waits[self.global_step] = counting.waits


def test_no_training_step_waits_for_the_device_but_where_it_logs_and_there_once(recipe, tmp_path, monkeypatch):
    Watching.waits, fetched, tolist = {}, [], torch.Tensor.tolist
    options = ["--model", f"{__name__}.Watching", "--model.late_mlm", "true"]
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: fetched.append(tensor.shape) or tolist(tensor))
    assert fit(recipe, tmp_path, "w", *options) == 0
    assert len(Watching.waits) == 8
    quiet = {step: found for step, found in Watching.waits.items() if step % 2}  # it logs every second step
    assert not any(quiet.values()), quiet
    logging = {step: found for step, found in Watching.waits.items() if step % 2 == 0}
    assert not any(logging.values()), logging  # but for the list of what is logged, which is no operation
    of_logs = [shape for shape in fetched if shape[0] > 10]
    assert len(of_logs) == 4


@pytest.mark.gpu
def test_on_a_gpu_no_training_step_synchronises(recipe, tmp_path):
    options = ["--model", f"{__name__}.Strict", "--trainer.log_every_n_steps", "100"]
    options += ["--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed"]
    assert fit(recipe, tmp_path, "s", *options) == 0


class Strict(CondenserModule):
    def training_step(self, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if self.global_step > 3 else "default")
        super().training_step(batch, batch_idx)
        torch.cuda.set_sync_debug_mode("default")


class StubGraph:
    """Does again what was captured, as far as a CPU can: on the inputs that were kept, into the outputs that were."""

    step, fails = None, False

    def pool(self):
        return "memory"

    def replay(self):
        replays = self.step.replays
        (entry,) = (entry for entry in replays.captured.values() if entry[0] is self)
        _, own, own_scale, (loss, shares, _) = entry
        new_loss, new_shares, _ = replays.run(own, own_scale, True)
        loss.copy_(new_loss)
        for name, value in new_shares.items():
            shares[name].copy_(value)


@pytest.mark.parametrize("fails", [False, True])
def test_replays_copy_their_inputs_keep_gradients_and_do_without_where_a_pass_cannot_be_captured(
    fails, monkeypatch, capsys
):
    """With a stub of CUDA: several shapes within a step, several steps, gradients of earlier passes there."""

    @contextlib.contextmanager
    def graph(captured, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"  # the loader's threads go on
        yield
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    waits = SimpleNamespace(wait_stream=lambda other: None)
    for name, stub in {
        "CUDAGraph": StubGraph,
        "graph": graph,
        "Stream": lambda: waits,
        "current_stream": lambda: waits,
        "stream": lambda stream: contextlib.nullcontext(),
        "get_rng_state": torch.get_rng_state,
        "set_rng_state": torch.set_rng_state,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    batches = [step_batch(flat_pass(27, i, SHAPES), flat_pass(27, i + 40, SHAPES)) for i in (0, 180, 0, 360)]
    found = []
    for replayed in (False, True):
        step = training_step(tiny_model(hidden_dropout_prob=0.1), clip=1.0, replayed=replayed)
        StubGraph.step, results = step, []
        for batch in batches:
            passes, norm = step.take(batch, scale_of(batch), score=True)
            results.append([passes.losses.clone(), passes.shares, norm])
        found.append([results, [weight.detach().clone() for weight in step.weights]])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    n_shapes = len({len(fields["input_ids"]) for batch in batches for fields in batch})
    assert len(step.replays.captured) == (0 if fails else n_shapes)
    assert ("not replayed as CUDA graphs (model.cuda_graphs): operation not" in capsys.readouterr().err) == fails


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_replayed_passes_are_those_that_are_run_one_by_one(compiled):
    """Within what bf16 rounds; dropout off, several shapes, several steps."""
    batches = [step_batch(flat_pass(27, 0, SHAPES), flat_pass(27, 27, SHAPES), device="cuda")]
    batches += [step_batch(flat_pass(40, 60, SHAPES), device="cuda"), *batches]
    found = []
    for ways in ({}, {"replayed": True, "compiled": compiled}):
        step = training_step(tiny_model(hidden_dropout_prob=0.0).cuda().train(), clip=1.0, **ways)
        losses_of_steps = []
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16):
                passes, norm = step.take(batch, scale_of(batch).cuda())
            losses_of_steps.append([*passes.losses, norm])
        found.append(losses_of_steps)
    torch.testing.assert_close(*found, rtol=2e-2, atol=1e-3)


@pytest.mark.gpu
def test_a_replay_draws_dropout_from_its_seed():
    batch = step_batch(flat_pass(27, 0, SHAPES), device="cuda")
    step = training_step(tiny_model(hidden_dropout_prob=0.3).cuda().train(), replayed=True)
    first, again = (float(step.passes(batch, scale_of(batch).cuda(), False).losses) for _ in range(2))
    batch.layout[0]["step"] = 1
    other = float(step.passes(batch, scale_of(batch).cuda(), False).losses)
    assert first == again != other


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("n_head_layers", [0, 1, 2])
def test_counted_operations_agree_with_torchs_counter(n_head_layers, pruned):
    """What is done, whole layers included; attention is laid out, so its pairs are those of rows."""
    model = tiny_model(n_head_layers=n_head_layers, hidden_size=64, intermediate_size=256)
    model.pruned = pruned
    batch, fields = step_batch(flat_pass(30)), inputs(30)
    rows, longest, n_read = batch.total("n_sequences"), fields["max_seqlen"], fields["max_query"]
    needed = Work.of_real_tokens(batch)
    work = needed._replace(pairs=rows * longest**2, query_pairs=rows * longest * n_read)
    if not pruned:
        work = work._replace(queries=work.tokens, query_pairs=work.pairs)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss_of(model, fields).backward()
    flops = training_flops(model.lm.config, n_head_layers, True, work)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_needed_work_is_that_of_the_real_tokens_with_dummies_or_without():
    fields = flat_pass()
    lengths, queries = (np.diff(fields[name]) for name in ("cu_seqlens", "cu_seqlens_query"))
    expected = lengths.sum(), (lengths**2).sum(), queries.sum(), (lengths * queries).sum(), queries.sum() - 9
    assert (
        Work.of_real_tokens(step_batch(fields))
        == Work.of_real_tokens(step_batch(flat_pass(shapes=SHAPES)))
        == tuple(expected)
    )


def test_peaks_are_found_by_the_names_that_devices_have():
    known = {"NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA A100-SXM4-80GB": 312}
    known |= {"NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA GeForce RTX 4090": 165.2, "NVIDIA GH200 480GB": 989}
    assert {name: bf16_peak(name) for name in known} == {name: peak * 1e12 for name, peak in known.items()}
    assert bf16_peak("AMD EPYC") is None


class Poisoned(Condenser):
    """Makes one pass of one step infinite."""

    calls = 0

    def losses(self, batch, score=False):
        Poisoned.calls += self.training
        terms = super().losses(batch, score)
        bad = Poisoned.calls == 4 * 2 + 2 and self.training  # step 5, micro-batch 1
        return {name: Term(term.sum * (float("inf") if bad else 1.0)) for name, term in terms.items()} if bad else terms


@pytest.mark.parametrize(
    "optimizer", [[], ["--model.optimizer.optimizer", "torch.optim.RAdam"]], ids=["fused", "other"]
)
def test_a_step_that_is_not_finite_is_skipped_and_stops_training_with_its_samples_saved(
    optimizer, recipe, tmp_path, capsys
):
    Poisoned.calls = 0
    options = ["--model.objective", f"{__name__}.Poisoned", "--checkpoint.every_n_steps", "1", *optimizer]
    assert fit(recipe, tmp_path, "bad", *options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    saved = torch.load(tmp_path / "bad" / "not-finite-step=5-rank=0.pt", weights_only=True)
    samples = ", ".join(map(str, saved[1]["sample_ids"].tolist()))
    assert f"not finite at step 5: the loss of micro-batch 1, samples {samples}." in error
    assert [path.name for path in checkpoints(tmp_path / "bad")] == [
        "last-step=4.ckpt",
        "best-step=4.ckpt",
        "last-step=3.ckpt",
    ]
    assert all(parameter.isfinite().all() for parameter in final_weights(tmp_path / "bad"))


@pytest.mark.parametrize("writes", [True, False], ids=["no folder yet", "a full disk"])
def test_a_step_that_is_not_finite_is_what_is_said_wherever_its_batch_can_be_kept(writes, tmp_path, monkeypatch):
    def full(*args):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    if not writes:
        monkeypatch.setattr(torch, "save", full)
    guard, batch = Guard(tmp_path / "new"), [{"sample_ids": torch.tensor([7, 9]), "micro_batch": 0}]
    guard.watch(3, batch, torch.tensor([torch.nan]), torch.ones(()), torch.zeros(2))
    kept = "its batch is in .*not-finite-step=3-rank=0.pt" if writes else r"its batch could not be saved \(.*pos 64"
    with pytest.raises(ValueError, match=f"not finite at step 3: .*samples 7, 9. The step was skipped; {kept}"):
        guard.check()


def final_weights(run):
    return torch.load(checkpoints(run)[0], weights_only=True)["state_dict"].values()


@pytest.mark.slow
def test_a_trace_is_written_where_it_is_asked_for(recipe, tmp_path):
    assert fit(recipe, tmp_path, "t", "--trace_steps", "2") == 0
    assert (tmp_path / "t" / "trace.json.gz").stat().st_size > 10_000
    assert "aten::addmm" in (tmp_path / "t" / "trace.txt").read_text()
    assert pickle.loads(pickle.dumps(Trace(tmp_path, 2))).n_steps == 2  # for ddp_spawn


def test_micro_batches_joined_to_passes_take_the_same_steps(recipe, tmp_path):
    dry = ["--model.backbone_config.hidden_dropout_prob", "0", "--data.micro_batches_per_step", "4"]
    assert fit(recipe, tmp_path, "apart", *dry) == 0
    assert fit(recipe, tmp_path, "joined", *dry, "--data.tokens_per_pass", "700") == 0
    assert_same_weights(tmp_path / "apart", tmp_path / "joined", rtol=1e-3, atol=2e-5)
    for ours, theirs in zip(metrics_of(tmp_path / "joined"), metrics_of(tmp_path / "apart"), strict=True):
        for name in ("train/loss", "train/mlm_loss", "train/head_mlm_accuracy", "train/tokens_seen", "val/loss"):
            if theirs[name]:
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_compiled_and_fused_runs_train_to_the_weights_of_a_plain_one(checkpointing, recipe, tmp_path):
    dry = ["--model.backbone_config.hidden_dropout_prob", "0"]
    assert fit(recipe, tmp_path, "plain", *dry) == 0
    fast = ["--model.compile=true", "--data.tokens_per_pass=2000", f"--model.gradient_checkpointing={checkpointing}"]
    assert fit(recipe, tmp_path, "compiled", *dry, *fast) == 0
    assert_same_weights(tmp_path / "plain", tmp_path / "compiled", rtol=1e-3, atol=2e-5)
    assert float(metrics_of(tmp_path / "compiled")[0]["perf/padding_fraction"]) > 0
    if losses.FUSED_AVAILABLE:
        assert fit(recipe, tmp_path, "fused", *dry, "--model.fused_loss", "true") == 0
        assert_same_weights(tmp_path / "plain", tmp_path / "fused", rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_a_compiled_run_that_is_stopped_goes_on_bit_for_bit(recipe, tmp_path):
    fast = ["--model.compile", "true", "--data.tokens_per_pass", "2000"]
    assert fit(recipe, tmp_path, "whole", *fast) == 0
    assert fit(recipe, tmp_path, "parts", *fast, *STOP, "3") == 0
    assert fit(recipe, tmp_path, "parts", *fast) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_as_large_as_a_gpu_affords_surely_fits(checkpointing):
    """By a rehearsal of 6 layers of 384 on 4 GB, of which it takes a good part."""
    from condenser.data.datamodule import CondenserDataModule
    from condenser.reports.rehearsal import Rehearsal, Setting

    sizes = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    module = CondenserModule(backbone_config={"attention_probs_dropout_prob": 0.0, **sizes}, skip_from=3)
    rehearsal = Rehearsal(module, CondenserDataModule(store="not/there"))
    tokens = affordable_tokens(rehearsal.model.lm.config, 8, 4e9, checkpointing)
    setting = Setting("bf16-mixed", checkpointing, fused=False, on_gpu=True)
    peak = sum(rehearsal.peak(setting, np.full(tokens // 128, 126)).values())
    assert peak < 0.85 * 4e9
    assert tokens == 65536 or peak > 0.4 * 4e9


@pytest.mark.parametrize("long_rows", [True, False])
@pytest.mark.parametrize(("batch_size", "micro_batches"), [(8, 1), (32, 2), (256, 8), (1024, 8)])
def test_passes_have_few_shapes_and_a_large_step_few_dummies(batch_size, micro_batches, long_rows):
    """Compilers take a minute for each, and give up after some."""
    store = SyntheticStore(max(3000, 20 * batch_size))
    if not long_rows:
        store.lengths = np.random.default_rng(0).lognormal(3, 0.8, len(store)).clip(1, 126).astype(np.uint16)
    mixture, sizes = Mixture([store], seed=0), {"batch_size": batch_size, "micro_batches_per_step": micro_batches}
    batches = BucketedBatches(mixture, seed=0, added=2, **sizes)
    steps = Steps(mixture, batches, VOCABULARY, Masking(0), tokens_per_pass=65536, few_shapes=True)
    found = [steps[number] for number in range(min(100, batches.steps_per_epoch))]
    shapes = {tuple(len(value) for value in inputs_of(f).values() if torch.is_tensor(value)) for s in found for f in s}
    assert len(shapes) <= 3
    dummies = 1 - sum(step.total("n_tokens") for step in found) / sum(step.n_positions for step in found)
    assert dummies < (0.03 if batch_size == 1024 else 0.3)


@pytest.mark.parametrize("unit", ["word", "span"])
@pytest.mark.parametrize(("batch_size", "micro_batches"), [(8, 2), (32, 2), (64, 1), (1024, 8)])
def test_for_cpus_in_half_precision_products_have_few_sizes_and_passes_few_dummies(batch_size, micro_batches, unit):
    """Each size takes 5 to 15 ms of each product to be made ready for."""
    mixture, sizes = Mixture([SyntheticStore(8000)], seed=0), (batch_size, micro_batches)
    batches = BucketedBatches(mixture, batch_size=sizes[0], micro_batches_per_step=sizes[1], seed=0, added=2)
    plain, filled = (Steps(mixture, batches, VOCABULARY, Masking(0, unit=unit), few_sizes=few) for few in (False, True))
    shapes, found = [], []
    for number in range(min(12, batches.steps_per_epoch)):
        found.append(filled[number])
        for own, more in zip(plain[number], found[-1], strict=True):
            shapes.append([len(more[name]) for name in ("input_ids", "query_index", "masked_index")])
            n, n_read = len(own["input_ids"]), len(own["query_index"])
            assert torch.equal(more["input_ids"][:n], own["input_ids"])
            assert (more["labels"][own["n_masked"] :] == -100).all()
            assert (more["query_index"][n_read:] >= n).all()
            assert more["cu_seqlens"][-1] == len(more["input_ids"]) > n
            assert more["cu_seqlens"].diff().max() <= more["max_seqlen"] == own["max_seqlen"]
            assert more["cu_seqlens_query"].diff().max() <= more["max_query"] == own["max_query"]
    n_sizes = [len(set(sizes)) for sizes in zip(*shapes, strict=True)]
    assert max(n_sizes) <= (10 if batch_size == 8 else 5)
    dummies = 1 - sum(step.total("n_tokens") for step in found) / sum(step.n_positions for step in found)
    assert dummies < 0.035


class Uniform(Condenser):
    """Has a term of its own, over sequences, that says nothing of what it sums; and a weight that is not exported."""

    asks = ("real",)

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.scale = nn.Parameter(torch.ones(()))

    def losses(self, batch, score=False):
        states = self.states(batch)
        cls = states[0][batch["cu_seqlens_query"][:-1]]
        squares = (self.scale * cls).square().mean(-1) * batch["real"]
        norm = Term(squares.sum(), over="n_sequences", weight=0.1)
        return self.terms_of(states, batch, score) | {"norm": norm}


class UniformAtDummies(Uniform):
    def losses(self, batch, score=False):
        return super().losses(batch | {"real": torch.ones_like(batch["real"])}, score)


class Random(Uniform):
    """Has a term that is another each time."""

    def losses(self, batch, score=False):
        noise = Term(torch.rand_like(batch["real"].float()).sum(), over="n_sequences", weight=0.0)
        return super().losses(batch, score) | {"noise": noise}


NORMS = ("train/norm_loss", "val/norm_loss")


def test_a_term_of_ones_own_is_trained_logged_validated_and_left_out_of_the_export(recipe, tmp_path):
    options = ["--model.objective", f"{__name__}.Uniform", "--trainer.log_every_n_steps=1", "--trainer.max_steps=4"]
    assert fit(recipe, tmp_path, "own", *options) == 0
    assert_minimised(tmp_path / "own", mlm=1, head_mlm=1, norm=0.1)
    norms = [float(row[name]) for row in metrics_of(tmp_path / "own") for name in NORMS if row[name]]
    assert 0.1 < min(norms) < max(norms) < 10
    assert main(["export", str(tmp_path / "own"), "--output", str(tmp_path / "export")]) == 0


@pytest.mark.parametrize("objective", [Uniform, Random])
def test_a_term_over_sequences_is_the_same_in_passes_that_are_filled_up(objective, recipe, tmp_path, monkeypatch):
    options = ["--trainer.precision", "64-true", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1"]
    options += [
        "--model.objective",
        f"{__name__}.{objective.__name__}",
        "--model.backbone_config.hidden_dropout_prob=0",
    ]
    settle, norms = CondenserModule.settle, []
    for few in (False, True):
        monkeypatch.setattr(CondenserModule, "settle", lambda self, few=few: settle(self) or fill_up(self, few))
        assert fit(recipe, tmp_path, f"{few}", *options) == 0
        rows = metrics_of(tmp_path / f"{few}")
        norms.append([float(row["train/norm_loss"]) for row in rows if row["train/norm_loss"]])
    assert len(norms[0]) == 2
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def fill_up(module, few):
    module.datamodule.few_sizes = few


def test_a_term_that_counts_dummies_is_refused_before_the_first_step(recipe, tmp_path, capsys):
    options = ["--model.objective", f"{__name__}.UniformAtDummies", "--trainer.precision", "bf16-mixed"]
    said = error_of(capsys, fit(recipe, tmp_path, "own", *options), "term 'norm'", "batch['real']")
    assert "change-objective.md" in said


def test_what_is_logged_goes_by_name_where_other_devices_have_other_terms(recipe, tmp_path, monkeypatch):
    found = []
    for others in ([], ["other_loss"]):
        monkeypatch.setattr(
            "condenser.training.module.on_all_devices", lambda own, others=others: [[*others, *reversed(own)], own]
        )
        options = ["--model.objective", f"{__name__}.Uniform", "--trainer.max_steps", "2"]
        assert fit(recipe, tmp_path, str(len(others)), *options) == 0
        found.append(metrics_of(tmp_path / str(len(others)))[0])
    assert float(found[1].pop("train/other_loss")) == 0
    assert all(value == found[1][name] for name, value in found[0].items() if name.startswith("train/"))
    assert float(found[0]["train/mlm_loss"]) > 4 > 0.5 > float(found[0]["train/mlm_accuracy"])


@pytest.mark.parametrize("fused", ["false", "true"])
def test_a_step_without_a_masked_token_is_taken_without_harm(fused, store, recipe, tmp_path):
    """Rows of one long word each, which no budget takes."""
    if fused == "true" and not losses.FUSED_AVAILABLE:
        pytest.skip("torch before 2.13 has no linear_cross_entropy")
    letters = "retrievencodattendmasktokenindexrank"
    texts = [letters[number % 30 :] + letters[: number % 30] for number in range(40)]
    write_jsonl(tmp_path / "words.jsonl", texts)
    prepared = ["--tokenizer", str(store / "tokenizer"), "--output", str(tmp_path / "words"), "--max-length", "64"]
    assert main(["prepare", "--input", str(tmp_path / "words.jsonl"), *prepared, "--validation-fraction", "0.2"]) == 0
    sizes = ["--data.batch_size", "8", "--data.micro_batches_per_step", "2", "--model.fused_loss", fused]
    positions = ["--model.backbone_config.max_position_embeddings", "64", "--trainer.max_steps", "4"]
    assert fit(recipe, tmp_path, "w", "--data.store", str(tmp_path / "words"), *sizes, *positions) == 0
    rows = metrics_of(tmp_path / "w")
    assert {float(row["train/loss"]) for row in rows if row["train/loss"]} == {0.0}
    assert all(weight.isfinite().all() for weight in final_weights(tmp_path / "w"))


@pytest.mark.slow
def test_bench_measures_a_compiled_pass_too(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    options = ["--config", str(recipe), "--sequences", "8", "--rounds", "1", "--json", str(tmp_path / "b.json")]
    assert main(["bench", *options, "--max-length", "32", "--compile"]) == 0
    _, ours, compiled = json.loads((tmp_path / "b.json").read_text())["recipes"].values()
    assert np.median(compiled["flops_per_token"]) == pytest.approx(np.median(ours["flops_per_token"]), rel=0.5)


def test_bench_measures_the_authors_recipe_and_ours(recipe, store, tmp_path, capsys):
    options = ["--config", str(recipe), "--sequences", "8", "--rounds", "2", "--json", str(tmp_path / "b.json")]
    assert main(["bench", *options, "--store", str(store)]) == 0
    found = json.loads((tmp_path / "b.json").read_text())["recipes"]
    assert list(found) == ["authors' recipe", "flat, pruned"]
    authors, ours = found.values()
    assert np.median(authors["flops_per_token"]) > 1.5 * np.median(ours["flops_per_token"])
    for figures in (authors, ours):
        assert len(figures["tokens_per_second"]) == len(figures["host_ms"]) == 2
        assert figures["launches"][0] > 100
    assert authors["peak_memory_gb"][0] > 1.2 * ours["peak_memory_gb"][0] > 0
    shown = capsys.readouterr().out
    assert re.search(r"MFU +GB +wait +ches +ms", shown), shown
    too_long = "a backbone that takes 40"
    for wrong, message in ((["--steps", "100"], "Lower --steps"), ([], too_long)):
        assert message in error_of(capsys, main(["bench", *options, *wrong]))


@pytest.mark.parametrize("n_head_layers", [0, 2])
def test_the_authors_recipe_of_the_bench_is_the_same_loss(n_head_layers):
    model = tiny_model(n_head_layers=n_head_layers).eval()
    authors, ours = (loss_and_gradients(each, inputs()) for each in (Authors.of(model, 40), model))
    torch.testing.assert_close(authors, ours, rtol=1e-4, atol=1e-6)


def test_what_is_minimised_is_the_weighted_sum_of_means(monkeypatch):
    """By an objective of one's own, whose terms are over different counts."""
    model, batch = tiny_model().eval(), step_batch(flat_pass())
    (fields,) = batch
    weighted = {"a": Term(torch.tensor(6.0), "n_masked", 0.5), "b": Term(torch.tensor(9.0), "n_sequences", 2.0)}
    monkeypatch.setattr(model, "losses", lambda *_: weighted)
    loss, shares, _ = pass_loss(model, inputs_of(fields), scale_of(batch), False)
    assert loss.item() == pytest.approx(0.5 * 6 / fields["n_masked"] + 2 * 9 / 9)
    assert shares["b_loss"].item() == pytest.approx(1)


def test_the_kernel_is_taken_in_half_precision_without_dropout_where_the_gpu_has_it(monkeypatch):
    device = torch.device("cuda:0")
    for capability, dtype, expected in (
        ((8, 0), torch.bfloat16, True),
        ((9, 0), torch.float16, True),
        ((7, 5), torch.float16, False),
        ((9, 0), torch.float32, False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", {device: capability}.get)
        assert attention.has_kernel(device, dtype) == expected
    assert not attention.has_kernel(torch.device("cpu"), torch.bfloat16)
