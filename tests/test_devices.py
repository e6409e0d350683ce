"""Exact over devices: however many share a step, and however they share it, it is the same step."""

import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import slow
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from test_training import assert_same_weights, final_state, metrics_of, tiny_condenser

from condenser.cli import main
from condenser.hub import load_checkpoint
from condenser.models.cocondenser import CoCondenser
from condenser.runs import SEAL, SEAL_LENGTH, checkpoints, is_intact
from condenser.training.sharding import shard

DDP = {"class_path": "lightning.pytorch.strategies.DDPStrategy"}
SHARDED = {"class_path": "condenser.training.sharding.FullySharded"}
REDUCE_SCATTER = (
    "reduce_scatter_single" if hasattr(torch.distributed, "reduce_scatter_single") else "reduce_scatter_tensor"
)


def be_a_rank(rank, world_size, port, log, fits, environment):
    """One process of a run, as torchrun or srun would start it; several runs one after the other."""
    with open(f"{log}-{rank}", "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if world_size > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"CONDENSER_TRACEBACK": "1", **environment}
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a process that was not forked
    rank_zero_only.rank = rank  # Lightning reads it when it is imported, which was before
    for arguments in fits:
        if code := main(["fit", *map(str, arguments)]):
            sys.exit(code)


def start_ranks(world_size, fits, log, environment=(), target=be_a_rank):
    """Processes that are forked from one that has imported everything, which takes them 0.1 s instead of 10; from its
    environment, with what is given beside."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["condenser.training.fit", "transformers.models.bert.modeling_bert", "pandas", "pytest"]
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [(rank, world_size, port, str(log), fits, dict(environment)) for rank in range(world_size)]
    ranks = [context.Process(target=target, args=each) for each in arguments]
    for process in ranks:
        process.start()
    return ranks


def wait_for(ranks, log, seconds=240):
    """Until all have ended well; if one has not, the others, which wait for it, are killed."""
    deadline = time.monotonic() + seconds
    while any(process.exitcode is None for process in ranks):
        if time.monotonic() > deadline or any(process.exitcode for process in ranks):
            for process in ranks:
                process.kill()
        time.sleep(0.02)
    logs = "\n".join(Path(f"{log}-{rank}").read_text()[-3000:] for rank in range(len(ranks)))
    assert [process.exitcode for process in ranks] == [0] * len(ranks), logs


def write_recipe(recipe, path, **changes):
    """The recipe with other settings, given as ``data__batch_size=64``."""
    settings = yaml.safe_load(Path(recipe).read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = settings
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    path.write_text(yaml.safe_dump(settings))
    return path


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Observer(Callback):
    """Writes what a step did: gradients before the first one, what all steps sent, what each rank holds.

    Args:
        folder: where to; files are named by rank.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.sent: list[int] = []  # values, in each reduction of gradients
        self.steps = 0

    def on_train_start(self, trainer, pl_module):
        self.folder.mkdir(parents=True, exist_ok=True)
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model.register_comm_hook(None, self.counted_all_reduce)
        self.reduce_scatter = getattr(torch.distributed, REDUCE_SCATTER)
        setattr(torch.distributed, REDUCE_SCATTER, self.counted_reduce_scatter)

    def counted_all_reduce(self, _, bucket):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self.sent.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    def counted_reduce_scatter(self, **tensors):
        self.sent.append(tensors["input"].numel())
        return self.reduce_scatter(**tensors)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps += 1
        if self.steps > 1:
            return
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.requires_grad}
        without = [name for name, gradient in gradients.items() if gradient is None]
        torch.save({n: whole(g) for n, g in gradients.items() if g is not None}, self.file(trainer, "gradients.pt"))
        backbone = pl_module.model.backbone
        embeddings, decoder = backbone.embeddings, backbone.decoder
        model = trainer.strategy.model
        facts = {
            "without_gradient": without,
            "weights": sum(p.numel() for p in pl_module.parameters()),
            "held": sum(getattr(p, "_local_tensor", p).numel() for p in pl_module.parameters()),
            "tied": decoder.weight is embeddings.word_embeddings.weight,
            "looks_for_unused": getattr(model, "find_unused_parameters", False),
        }
        self.file(trainer, "facts.json").write_text(json.dumps(facts))

    def on_train_end(self, trainer, pl_module):
        setattr(torch.distributed, REDUCE_SCATTER, self.reduce_scatter)
        self.file(trainer, "sent.json").write_text(json.dumps({"steps": self.steps, "sent": self.sent}))

    def file(self, trainer, name):
        return self.folder / f"{trainer.global_rank}-{name}"


class Leap(Callback):
    """Says to the optimizer that the gradient is not finite, and whether the step was left out then."""

    def __init__(self, file: str):
        self.path = Path(file)

    def weights(self, module):
        return [whole(parameter.detach()).clone() for parameter in module.parameters()]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before = self.weights(pl_module)
        if trainer.global_step == 1:
            optimizer.found_inf = torch.ones(())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        same = all(torch.equal(a, b) for a, b in zip(self.before, self.weights(pl_module), strict=True))
        if trainer.is_global_zero:
            with open(self.path, "a") as file:
                file.write(f"{same}\n")


STEPS, VALIDATED = 4, 2  # the checkpoint of the validated step is kept as the best, and others go on from it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(scope="module")
def arguments(recipe, folder):
    """Those of a run without dropout over four micro-batches a step."""

    def arguments(name, strategy=None, devices=1, callbacks=(), start=None, **changes):
        observer = {"class_path": "test_devices.Observer", "init_args": {"folder": str(folder / name / "observed")}}
        path = write_recipe(
            recipe,
            folder / f"{name}.yaml",
            data__micro_batches_per_step=4,
            model__backbone_config__hidden_dropout_prob=0.0,
            model__optimizer__gradient_clip=0.0,  # which would hide a gradient of another length
            trainer__callbacks=[observer, *callbacks],
            trainer__devices=devices,
            trainer__strategy=strategy or "auto",
            trainer__log_every_n_steps=1,
            trainer__limit_val_batches=1,
            checkpoint__every_n_steps=VALIDATED,
            checkpoint__keep_every_n_steps=VALIDATED,
            **{"trainer__max_steps": STEPS, "trainer__val_check_interval": VALIDATED, **changes},
        )
        where = ["--config", str(path), "--runs_dir", str(folder), "--name", name]
        checkpoint = folder / str(start) / f"checkpoints/last-step={VALIDATED}.ckpt"
        return [*where, "--ckpt_path", str(checkpoint)] if start else where

    return arguments


BF16, ONE_STEP = {"trainer__precision": "bf16-mixed"}, {"trainer__max_steps": 1}
ON_TWO, SHARDED_ON_TWO = {"strategy": DDP, "devices": 2}, {"strategy": SHARDED, "devices": 2}
DECODER = {"model__objective": "condenser.models.retromae.RetroMAE", **ONE_STEP}


@pytest.fixture(scope="module")
def contrast(spans):
    return {"model__objective": "condenser.models.cocondenser.CoCondenser", "data__store": str(spans), **ONE_STEP}


@pytest.fixture(scope="module")
def few(arguments, contrast, folder):
    """Runs by name; all processes of one number are started once."""
    leap = {"class_path": "test_devices.Leap", "init_args": {"file": str(folder / "leap.txt")}}
    on_two = [
        arguments("ddp", **ON_TWO),
        arguments("ddp-joined", **ON_TWO, **ONE_STEP, data__tokens_per_pass=10**6),
        arguments("sharded", **SHARDED_ON_TWO),
        arguments("sharded-bf16", **SHARDED_ON_TWO, **BF16, **ONE_STEP),
        arguments("one-then-sharded", start="one", **SHARDED_ON_TWO),
        arguments("sharded-then-sharded", start="sharded", **SHARDED_ON_TWO),
        arguments("contrast-ddp", **ON_TWO, **contrast),
        arguments("contrast-sharded", **SHARDED_ON_TWO, **contrast),
        arguments("decoder-ddp", **ON_TWO, **DECODER),
        arguments("leap", callbacks=[leap], **SHARDED_ON_TWO, trainer__max_steps=3),
    ]
    assert main(["fit", *arguments("one")]) == 0
    ranks = start_ranks(2, on_two, folder / "log-of-two")
    for name, settings in {"one-bf16": BF16 | ONE_STEP, "contrast": contrast, "decoder": DECODER}.items():
        assert main(["fit", *arguments(name, **settings)]) == 0
    wait_for(ranks, folder / "log-of-two")
    assert main(["fit", *arguments("sharded-then-one", start="sharded")]) == 0
    return folder


@pytest.fixture(scope="module")
def more(few, arguments, contrast, folder):
    """Runs that hardly go wrong where those above go right; for slow tests."""
    on_two = [
        arguments("ddp-bf16", **ON_TWO, **BF16, **ONE_STEP),
        arguments("sharded-then-ddp", start="sharded", **ON_TWO),
        arguments("decoder-sharded", **SHARDED_ON_TWO, **DECODER),
    ]
    on_four = [
        arguments("ddp-4", DDP, devices=4, **ONE_STEP),
        arguments("ddp-4-bf16", DDP, devices=4, **BF16, **ONE_STEP),
        arguments("contrast-4", DDP, devices=4, **contrast),
    ]
    for devices, fits in ((2, on_two), (4, on_four)):
        wait_for(start_ranks(devices, fits, folder / f"log-of-{devices}"), folder / f"log-of-{devices}")


@pytest.fixture
def runs(request, few):
    if request.node.get_closest_marker("slow"):
        request.getfixturevalue("more")
    return few


def gradient(runs, name, rank=0):
    values = torch.load(runs / name / "observed" / f"{rank}-gradients.pt")
    return torch.cat([value.double().flatten() for _, value in sorted(values.items())])


def facts(runs, name, rank=0, file="facts"):
    return json.loads((runs / name / "observed" / f"{rank}-{file}.json").read_text())


def distance(a, b):
    return float((a - b).norm() / b.norm())


SHARED = [("ddp", 2, "one"), ("sharded", 2, "one"), ("ddp-joined", 2, "one"), slow("ddp-4", 4, "one")]
SHARED += [("contrast-ddp", 2, "contrast"), ("contrast-sharded", 2, "contrast"), slow("contrast-4", 4, "contrast")]
SHARED += [("decoder-ddp", 2, "decoder"), slow("decoder-sharded", 2, "decoder")]


@pytest.mark.parametrize(("name", "devices", "alone"), SHARED)
def test_a_step_has_the_same_gradient_however_it_is_shared(name, devices, alone, runs):
    """Within what the order of summation does in fp32. With a contrast, siblings are on several devices, and vectors
    that hardly differ at the beginning are rounded more (in fp64, which sharding does not take, less than 1e-12)."""
    tolerance = 1e-5 if alone == "contrast" else 1e-6
    for rank in range(devices):
        assert distance(gradient(runs, name, rank), gradient(runs, alone)) < tolerance


@pytest.mark.parametrize(
    ("name", "devices", "share"), [("sharded-bf16", 2, 0.2), slow("ddp-bf16", 2, 0.01), slow("ddp-4-bf16", 4, 0.01)]
)
def test_in_bf16_sharing_a_step_changes_less_than_rounding_does(name, devices, share, runs):
    """Sharded layers add up the gradients of a state that two of them read in another order."""
    rounding = distance(gradient(runs, "one-bf16"), gradient(runs, "one"))
    assert 1e-4 < rounding < 0.05
    for rank in range(devices):
        assert distance(gradient(runs, name, rank), gradient(runs, "one-bf16")) < share * rounding


@pytest.mark.parametrize("name", ["ddp", "sharded", "ddp-joined", slow("ddp-4")])
def test_and_the_same_metrics(name, runs):
    steps = 1 if name in ("ddp-joined", "ddp-4") else STEPS
    ours, theirs = metrics_of(runs / name), metrics_of(runs / "one")
    assert len(ours) >= steps
    counted = ("step", "train/tokens_seen", "train/sequences", "perf/padding_fraction")
    for mine, one in zip(ours[:steps], theirs[:steps], strict=True):
        for key in one:
            if key.startswith("perf/") and key != "perf/padding_fraction":
                continue
            if one[key] and not key.startswith("val/") and key != "train/lr":
                tolerance = 0 if key in counted else 1e-6 if one["step"] == "0" else 1e-3
                assert float(mine[key]) == pytest.approx(float(one[key]), rel=tolerance), (key, one["step"])


@pytest.mark.parametrize("name", ["ddp", "sharded"])
def test_and_trains_to_the_same_weights(name, runs):
    assert_same_weights(runs / name, runs / "one", rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["one", "ddp", "sharded", slow("ddp-4")])
def test_every_weight_has_a_gradient_and_none_is_looked_for(name, runs):
    assert facts(runs, name)["without_gradient"] == []
    assert not facts(runs, name)["looks_for_unused"]
    assert facts(runs, name)["tied"]


@pytest.mark.parametrize("name", ["ddp", "sharded", slow("ddp-4")])
def test_gradients_are_sent_once_a_step_and_not_by_each_pass(name, runs):
    sent, weights = facts(runs, name, file="sent"), facts(runs, name)["weights"]
    padding = 1.05 if name == "sharded" else 1  # shards are made equal
    assert weights <= sum(sent["sent"]) / sent["steps"] <= padding * weights


def test_sharded_ranks_hold_half_of_the_weights_each(runs):
    held = [facts(runs, "sharded", rank)["held"] for rank in range(2)]
    assert sum(held) == facts(runs, "sharded")["weights"] == facts(runs, "ddp")["held"]
    assert max(held) < 0.55 * sum(held)


def test_a_sharded_checkpoint_is_one_file_like_any_other(runs):
    ours, theirs = (final_state(runs / name) for name in ("sharded", "one"))
    for path in checkpoints(runs / "sharded"):
        assert is_intact(path)
        assert path.read_bytes()[-SEAL_LENGTH:].startswith(SEAL)
    assert ours.keys() == theirs.keys()
    assert not any(isinstance(value, torch.distributed.tensor.DTensor) for value in ours["state_dict"].values())
    ours, theirs = (state["optimizer_states"][0] for state in (ours, theirs))
    assert ours["param_groups"] == theirs["param_groups"]
    for number, state in theirs["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(ours["state"][number][name], value, rtol=1e-3, atol=1e-6)


def test_a_sharded_checkpoint_knows_its_objective(runs):
    model, _ = load_checkpoint(checkpoints(runs / "contrast-sharded")[0])
    assert type(model) is CoCondenser


def test_sharded_and_resumed_equals_uninterrupted_bit_for_bit(runs):
    assert_same_weights(runs / "sharded-then-sharded", runs / "sharded")


@pytest.mark.parametrize("name", ["one-then-sharded", "sharded-then-one", slow("sharded-then-ddp")])
def test_a_run_goes_on_sharded_or_not(name, runs):
    assert [row["step"] for row in metrics_of(runs / name) if row["train/loss"]] == ["2", "3"]
    assert_same_weights(runs / name, runs / "one", rtol=1e-3, atol=2e-5)


def test_a_sharded_step_that_is_not_finite_is_left_out_on_the_device(runs):
    assert (runs / "leap.txt").read_text().split() == ["False", "True", "False"]


class Mesh(dict):
    def size(self):
        return 2


@pytest.mark.parametrize(
    ("tensor_parallel", "in_parts", "message"),
    [
        (2, False, "set it to 1 and data_parallel_size to the number of devices, 2"),
        (1, True, "save_distributed_checkpoint"),
    ],
)
def test_devices_without_data_and_checkpoints_in_parts_are_refused(tensor_parallel, in_parts, message):
    mesh = Mesh(tensor_parallel=SimpleNamespace(size=lambda: tensor_parallel))
    strategy = SimpleNamespace(device_mesh=mesh, _save_distributed_checkpoint=in_parts)
    with pytest.raises(ValueError, match=message):
        shard(tiny_condenser(), strategy)


@pytest.mark.slow
def test_two_devices_that_compile_their_passes_take_the_steps_of_one(recipe, tmp_path):
    shared = {"model__backbone_config__hidden_dropout_prob": 0.0, "data__tokens_per_pass": 10**6}
    shared |= {"trainer__log_every_n_steps": 1, "trainer__max_steps": 4}
    one = write_recipe(recipe, tmp_path / "one.yaml", **shared)
    two = {"trainer__devices": 2, "trainer__strategy": DDP, "model__compile": True}
    two = write_recipe(recipe, tmp_path / "two.yaml", **shared, **two)
    arguments = [["--config", str(path), "--runs_dir", str(tmp_path), "--name", path.stem] for path in (one, two)]
    ranks = start_ranks(2, arguments[1:], tmp_path / "log")
    wait_for(ranks, tmp_path / "log")
    assert main(["fit", *arguments[0]]) == 0
    for ours, theirs in zip(metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one"), strict=True):
        for name in ("train/loss", "train/head_mlm_loss", "train/grad_norm", "train/tokens_seen", "val/loss"):
            if theirs[name]:
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-4)
