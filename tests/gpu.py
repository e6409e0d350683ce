"""What a GPU makes of this project: all ways to compute a step against each other, a run, and the benchmark. One JSON.

    python tests/gpu.py [--json runs/gpu.json] [--minutes 8] [--only PART ...] [--toy]

Runs from a checkout, needs torch, lightning, transformers and jsonargparse alone, and goes on when one part fails; the
exit code says whether one did. Each part is a process: the checks side by side, as most of their time goes into
compiling, then the benchmarks one by one. `--toy` does everything at toy size, on a CPU too.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM

from condenser.data.collate import Masking, StepBatch
from condenser.data.datamodule import CondenserDataModule
from condenser.data.steps import StepLoader
from condenser.data.synthetic import VOCABULARY, SyntheticStore
from condenser.models.cocondenser import CoCondenser
from condenser.models.condenser import Condenser
from condenser.models.losses import FUSED_AVAILABLE
from condenser.models.objective import COUNTS
from condenser.models.padded import padded
from condenser.models.retromae import RetroMAE
from condenser.reports.rows import steps_over
from condenser.reports.trial import FIRST, RECIPES, Trial, matmul_rate
from condenser.training.logs import Speed, commit
from condenser.training.module import CondenserModule
from condenser.training.step import TrainingStep

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SMALL = {"num_hidden_layers": 12, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
FEW = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
TOY = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
BENCHMARKS = {  # name: settings of the model, longest row, sequences of a step
    "base, length 128": ({}, 128, 1024),
    "12 layers of 384, length 128": (SMALL, 128, 1024),
    "base, length 512": ({}, 512, 256),
}


def model_of(settings, objective=Condenser, **more):
    torch.manual_seed(0)
    dry = {"attention_probs_dropout_prob": 0.0, "vocab_size": 30522, **settings, **more}
    lm = BertForMaskedLM(BertConfig(**dry))
    options = {} if objective is RetroMAE else {"skip_from": lm.config.num_hidden_layers // 2}
    return objective.from_masked_lm(lm, **options).to(DEVICE).train()


def steps_of(sequences, micro_batches, n_steps, max_length=128, **options):
    return steps_over(SyntheticStore(sequences * n_steps, max_length), sequences, micro_batches, **options)


def loss_and_gradients(settings, batch, half, objective=Condenser, **ways):
    """Of one step without dropout, by one of the ways there are to compute it."""
    model = model_of(settings, objective, hidden_dropout_prob=0.0)
    for name in ("gradient_checkpointing", "fused_loss"):
        setattr(model, name, ways.pop(name, False))
    step = TrainingStep(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), **ways)
    scale = 1 / torch.tensor([batch.total(name) for name in COUNTS], device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
        passes = step.passes(batch.to(DEVICE), scale, False)
    return float(passes.losses.sum()), torch.cat([gradient.flatten().double() for gradient in step.gradients])


def check_equality(settings, sequences):
    """Relative differences of loss and gradient from fp32 over padded rows; in bf16 all ways differ by its rounding."""
    micro, joined, full = (
        steps_of(sequences, 4, 2, tokens_per_pass=n, few_shapes=few)[0]
        for n, few in ((1, False), (10**9, False), (10**9, True))
    )
    rows = model_of(settings, hidden_dropout_prob=0.0)
    (fields,) = joined.to(DEVICE)
    mask = (torch.arange(fields["max_seqlen"], device=DEVICE) < fields["cu_seqlens"].diff()[:, None]).long()
    flat_labels = torch.full_like(fields["input_ids"], -100).index_copy(0, fields["masked_index"], fields["labels"])
    labels = padded(flat_labels + 100, mask) - 100
    rows(padded(fields["input_ids"], mask), mask, labels).loss.backward()
    exact = torch.cat([weight.grad.flatten().double() for weight in rows.parameters()])
    loss = float(rows(padded(fields["input_ids"], mask), mask, labels).loss)
    ways = {
        "fp32, flat": (micro, False, {}),
        "fp32, one pass": (joined, False, {}),
        "fp32, dummies": (full, False, {}),
        "fp32, recomputed": (micro, False, {"gradient_checkpointing": True}),
        "bf16, flat": (micro, True, {}),
        "bf16, one pass": (joined, True, {}),
        "bf16, dummies": (full, True, {}),
        "bf16, recomputed": (micro, True, {"gradient_checkpointing": True}),
        "bf16, compiled": (full, True, {"compiled": True}),
    }
    if FUSED_AVAILABLE:
        ways["bf16, fused loss"] = (micro, True, {"fused_loss": True})
    if ON_GPU:
        ways["bf16, compiled, recomputed"] = (full, True, {"compiled": True, "gradient_checkpointing": True})
        ways["bf16, replayed"] = (full, True, {"replayed": True})
        ways["bf16, compiled, replayed"] = (full, True, {"compiled": True, "replayed": True})
    found = {}
    for name, (batch, half, options) in ways.items():
        value, gradient = loss_and_gradients(settings, batch, half, **options)
        found[name] = [abs(value / loss - 1), float((gradient - exact).norm() / exact.norm())]
        limits = (5e-3, 5e-2) if half else (2e-3, 2e-2) if ON_GPU else (1e-5, 1e-4)  # TF32 may be on
        assert all(a < b for a, b in zip(found[name], limits, strict=True)), (name, found)
    return found


def check_objectives(settings, sequences):
    """Relative differences of loss and gradient from fp32, one operation after the other, of the other objectives."""
    found = {}
    for objective in (CoCondenser, RetroMAE):
        pairs = {"pairs": objective is CoCondenser, "extras": objective.asks}
        several, one = (steps_of(sequences, 4, 2, tokens_per_pass=n, few_shapes=True, **pairs)[0] for n in (1, 10**9))
        loss, exact = loss_and_gradients(settings, one, False, objective)
        ways = {
            "fp32, several passes": (several, False, {}),
            "bf16": (one, True, {}),
            "bf16, several passes": (several, True, {}),
            "bf16, compiled": (several, True, {"compiled": True}),
        }
        if ON_GPU:
            ways["bf16, compiled, replayed"] = (several, True, {"compiled": True, "replayed": True})
        for name, (batch, half, options) in ways.items():
            value, gradient = loss_and_gradients(settings, batch, half, objective, **options)
            differs = [abs(value / loss - 1), float((gradient - exact).norm() / exact.norm())]
            found[f"{objective.__name__}, {name}"] = differs
            limits = (1e-2, 1e-1) if half else (2e-3, 2e-2) if ON_GPU else (1e-5, 1e-4)
            assert all(a < b for a, b in zip(differs, limits, strict=True)), found
    return found


def check_replay(settings, sequences):
    """Several steps replayed are those that are computed one operation after the other; dropout comes from its seed."""
    steps = steps_of(sequences, 4, 12, tokens_per_pass=10**9, few_shapes=True)
    losses = {}
    for name, options in {"eager": {}, "replayed": {"compiled": ON_GPU, "replayed": ON_GPU}}.items():
        model = model_of(settings, hidden_dropout_prob=0.0)
        step = TrainingStep(model, torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True), clip=1.0, **options)
        losses[name] = []
        for number in range(8):
            batch = steps[number]
            scale = 1 / torch.tensor([batch.total(name) for name in COUNTS], device=DEVICE)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                losses[name].append(float(step.take(batch.to(DEVICE), scale)[0].losses.sum()))
    a, b = (np.array(each) for each in losses.values())
    assert np.abs(a / b - 1).max() < 5e-3, losses
    model = model_of(settings, hidden_dropout_prob=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    step = TrainingStep(model, optimizer, compiled=ON_GPU, replayed=ON_GPU)
    drawn = []
    for number in (0, 0, 1):
        batch = StepBatch(steps[0].buffer, [{**steps[0].layout[0], "step": number}]).to(DEVICE)
        drawn.append(float(step.passes(batch, torch.full((4,), 1e-3, device=DEVICE), False).losses.sum()))
    assert drawn[0] == drawn[1] != drawn[2], drawn
    return {**losses, "dropout": drawn}


class InMemory(L.LightningDataModule):
    """As much of a data module as training asks for, over rows in memory."""

    tokens_per_pass, affordable, few_shapes, pairs_wanted, weights, masking = None, 1, False, None, {}, Masking(0)
    provide_for = CondenserDataModule.provide_for
    unigram_nats, steps_per_epoch = torch.zeros(30522), 40

    class tokenizer:  # noqa: N801
        pad_token_id, mask_token_id = VOCABULARY.pad_id, VOCABULARY.mask_id

        def get_vocab(self):
            return {str(number): number for number in range(30522)}

    tokenizer = tokenizer()

    def __init__(self, sequences):
        super().__init__()
        self.sequences = sequences

    def train_dataloader(self):
        steps = steps_of(self.sequences, 8, 40, tokens_per_pass=self.affordable, few_shapes=self.few_shapes)
        return StepLoader(steps, True, 2, lambda: self.trainer.global_step)


def check_run(settings, sequences):
    """Lightning trains by all defaults of this device; nothing waits for it between logging steps."""
    waits = []

    class Strict(CondenserModule):
        def training_step(self, batch, batch_idx):
            if ON_GPU:  # by now every shape is compiled and captured
                torch.cuda.set_sync_debug_mode("error" if 9 < self.global_step < 19 else "default")
            try:
                super().training_step(batch, batch_idx)
            except RuntimeError as error:
                waits.append(str(error)[:200])
                raise
            finally:
                if ON_GPU:
                    torch.cuda.set_sync_debug_mode("default")

    module = Strict(backbone_config={"attention_probs_dropout_prob": 0.0, **settings}, skip_from=1)
    logged = {}

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            logged.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    trainer = L.Trainer(
        accelerator="gpu" if ON_GPU else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=30,
        log_every_n_steps=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[Speed(), Keep()],
        default_root_dir="runs/gpu",
    )
    trainer.fit(module, datamodule=InMemory(sequences))
    assert trainer.global_step == 30
    assert not waits
    assert (module.compiled, module.replayed) == (ON_GPU, ON_GPU)
    return logged


def bench(settings, max_length, sequences, n_steps, rounds):
    steps = steps_of(sequences, 8 if ON_GPU else 2, FIRST + rounds * n_steps + 2, max_length)
    trial = Trial(
        model=model_of(settings),
        rows=steps,
        precision="bf16-mixed" if ON_GPU else "32-true",
        steps=n_steps,
        workers=8 if ON_GPU else 0,
        tokens_per_pass=65536 if ON_GPU else 1,
    )
    recipes = [recipe for recipe in RECIPES if recipe.compiled == recipe.replayed and (ON_GPU or not recipe.replayed)]
    found = trial.run(recipes, rounds, lambda text: print("  ", text, flush=True))
    rate = matmul_rate(DEVICE, trial.dtype)
    for name, figures in found.items():
        median = {key: float(np.median(values)) for key, values in figures.items()}
        print(
            f"  {name:18} {median['tokens_per_second']:12,.0f} tokens/s, "
            f"MFU {median['needed_flops_per_second'] / rate:.1%}, {median['launches']:,.0f} launches, "
            f"{median['host_ms']:.1f} ms of the host, wait {median['data_wait']:.1%}, "
            f"{median['peak_memory_gb']:.1f} GB",
            flush=True,
        )
    return {"matmul_flops_per_second": rate, "recipes": found, "kernels_ms": trial.kernels}


def parts_of(toy):
    settings, sequences = (TOY, 8) if toy else (FEW, 256)
    parts = {
        "equality": lambda: check_equality(settings, sequences),
        "objectives": lambda: check_objectives(settings, sequences),
        "replay": lambda: check_replay(settings, sequences),
        "run": lambda: check_run(settings, sequences),
    }
    for name, (of_model, max_length, n) in BENCHMARKS.items():
        sizes = (TOY, max_length, 4, 1, 1) if toy else (of_model, max_length, n, 6, 3)
        parts[f"bench: {name}"] = lambda sizes=sizes: bench(*sizes)
    return parts


def in_processes(names, options, seconds):
    """What the parts of these names found, all at once; of one that failed or took too long, its output."""
    folder, started = Path(options.json).parent, {}
    for number, name in enumerate(names):
        path = folder / f"part-{number}.json"
        path.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--part", name, "--json", str(path), *["--toy"] * options.toy]
        log = open(path.with_suffix(".log"), "w+")  # noqa: SIM115
        started[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), path, log
    deadline, found = time.perf_counter() + seconds, {}
    for name, (process, path, log) in started.items():
        try:
            process.wait(max(1.0, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.seek(0)
        text = log.read()
        found[name] = json.loads(path.read_text()) if path.is_file() else {"failed": text[-4000:]}
        print(f"{name}:\n{text if name.startswith('bench') or not path.is_file() else '  went well'}", flush=True)
        log.close()
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="runs/gpu.json", help="a file for everything that was found")
    parser.add_argument("--minutes", type=float, default=8, help="all of it takes no longer")
    parser.add_argument("--only", nargs="+", metavar="PART", help="some parts, by the beginning of their names")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # to be done in this process
    parser.add_argument("--toy", action="store_true", help="tiny shapes; also on a CPU")
    options = parser.parse_args(argv)
    if not ON_GPU and not options.toy:
        parser.error("there is no GPU; --toy tries everything on the CPU")
    parts = parts_of(options.toy)
    Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    if options.part:
        Path(options.json).write_text(json.dumps(parts[options.part]()))
        return 0
    wanted = [name for name in parts if options.only is None or name.startswith(tuple(options.only))]
    began = time.perf_counter()
    found = {
        "device": torch.cuda.get_device_name() if ON_GPU else f"CPU, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "lightning": L.__version__, "commit": commit()},
    }
    print(found, flush=True)
    checks = [name for name in wanted if not name.startswith("bench")]
    for together in [checks, *([name] for name in wanted if name not in checks)]:
        left = 60 * options.minutes - (time.perf_counter() - began)
        found |= in_processes(together, options, left)
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    failed = [name for name in wanted if "failed" in found[name]]
    seconds = time.perf_counter() - began
    print(f"{len(wanted) - len(failed)} of {len(wanted)} parts went well in {seconds:.0f} s; {options.json}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
