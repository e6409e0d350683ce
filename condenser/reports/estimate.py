"""`condenser estimate`: what a run will cost, before anything is spent.

    condenser estimate --config configs/condenser.yaml [-c OVERLAY.yaml ...] [--model.skip_from 3 ...] [--mfu 0.4]

Takes the settings of `condenser fit` and says how large the model is, how many operations a token and the run need, how
much memory a step takes (by rehearsing it, see rehearsal.py), what fits on named GPUs, and how many hours these need.
No weights are loaded, and no GPU is needed.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from condenser.data.batching import BucketedBatches
from condenser.data.collate import StepBatch
from condenser.data.datamodule import CondenserDataModule
from condenser.data.store import SPECIAL_TOKENS, write_json
from condenser.data.synthetic import SyntheticStore
from condenser.models.condenser import Condenser
from condenser.models.flops import TOKENS_AT_ONCE, Work, bf16_peak
from condenser.models.losses import FUSED_AVAILABLE
from condenser.reports.rehearsal import KINDS, Rehearsal, Setting, one_pass
from condenser.training.fit import DryCLI, run_cli
from condenser.training.module import CondenserModule

GPUS = {"RTX 4090": 24, "A100 40GB": 40, "L40S": 48, "A100 80GB": 80, "H100": 80, "H200": 141}  # GB, 1e9 bytes
USABLE, CONTEXT = 0.9, 1e9  # share of a GPU's memory that fragmentation leaves; bytes that are gone before a run
SAMPLE = 1 << 16  # rows that stand for all of an epoch
BUCKETS = "DDP buckets"


class Rows(NamedTuple):
    """What an epoch of the data holds."""

    lengths: np.ndarray  # [SAMPLE] at most, without special tokens
    n_rows: float  # all of them
    tokens: float  # of all rows, special ones included
    source: str


def estimate(args: Sequence[str]) -> None:
    options, of_the_run = own_parser().parse_known_args(args)
    if not 0 < options.mfu <= 1 or options.gpus < 1 or not options.tokens > 0:
        raise ValueError("--mfu must lie between 0 and 1, --gpus and --tokens must be positive")
    run = run_cli("fit", of_the_run, DryCLI)
    found = costs(run.model, run.datamodule, run.config["fit"].trainer, options)
    show(found)
    if options.json:
        write_json(Path(options.json), found)


def own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="condenser estimate",
        description="What a run will cost: parameters, operations, memory, what fits on named GPUs, and hours.",
        epilog="The settings of `condenser fit` come beside these (--config, -c, --model.*, --data.*, --trainer.*): "
        "see `condenser fit --help`. Unknown ones are refused.",
        allow_abbrev=False,
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="share of a GPU's peak that is reached (default: 0.4)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs that share a step, beside one alone (default: 8)")
    parser.add_argument("--tokens", type=float, default=1e9, help="of an epoch, if there is no store (default: 1e9)")
    parser.add_argument("--json", help="a file for the figures")
    return parser


def costs(module: CondenserModule, datamodule: CondenserDataModule, trainer: Any, options: Any) -> dict[str, Any]:
    """All figures. Raises ValueError for settings that `condenser fit` would refuse too."""
    on_cpu, devices = trainer.accelerator == "cpu", n_devices(trainer)
    here, on_gpu = (configured(module, datamodule, trainer, on_gpu) for on_gpu in (not on_cpu, True))
    rows = rows_of(datamodule, options.tokens)
    rehearsal = Rehearsal(module, datamodule)
    steps, tokens = length_of_run(trainer, datamodule.batch_size, rows)
    micro_batches = first_step(datamodule, rows)
    at_once = datamodule.tokens_per_pass or (1 if on_cpu else TOKENS_AT_ONCE)
    together = max(1, at_once // tokens_of(micro_batches[0]))
    lengths = np.concatenate(micro_batches[:together])
    per_token = flops_per_token(rehearsal, rows.lengths)
    return {
        "parameters": parameters(rehearsal.model),
        "data": {"lengths": rows.source, "rows_per_epoch": rows.n_rows, "tokens_per_epoch": rows.tokens},
        "run": {"steps": steps, "tokens": tokens, "flops_per_token": per_token, "flops": per_token * tokens},
        "pass": {"sequences": len(lengths), "tokens": tokens_of(lengths)},
        "memory": memory(rehearsal, here, lengths, devices),
        "gpus": on_gpus(rehearsal, on_gpu, rows, sum(map(tokens_of, micro_batches)), per_token * tokens, options),
        "assumptions": assumptions(module, on_gpu, options.mfu),
    }


def rows_of(datamodule: CondenserDataModule, tokens: float) -> Rows:
    """The store's rows; rows like those of real text, ``tokens`` in all, where a store does not exist yet."""
    missing = [str(folder) for folder in datamodule.weights if not folder.is_dir()]
    if missing:
        lengths = SyntheticStore(SAMPLE).lengths
        source = (
            f"NOT of your data: there is no token store at {', '.join(missing)}; of Wikipedia's rows, up to 128 tokens"
        )
        return Rows(lengths, tokens / (float(lengths.mean()) + SPECIAL_TOKENS), tokens, source)
    datamodule.setup("fit")
    mixture = datamodule.train
    numbers = np.unique(np.linspace(0, len(mixture) - 1, min(len(mixture), SAMPLE)).astype(np.int64))
    means = [float(store.lengths.mean()) + SPECIAL_TOKENS if len(store) else 0.0 for store in mixture.stores]
    n_tokens = sum(int(n) * mean for n, mean in zip(mixture.quotas, means, strict=True))
    lengths = mixture.lengths[mixture.samples(0, numbers).rows]
    return Rows(lengths, len(mixture), n_tokens, f"of {', '.join(map(str, datamodule.weights))}")


def length_of_run(trainer: Any, batch_size: int, rows: Rows) -> tuple[float, float]:
    """Optimizer steps, and the tokens in them. Raises ValueError for a run without an end."""
    per_epoch = max(1, round(rows.n_rows / batch_size))
    epochs = trainer.max_epochs
    if epochs is None:
        epochs = 1000 if trainer.max_steps == -1 and trainer.max_time is None else -1  # as Lightning has it
    limits = [limit for limit in (epochs * per_epoch, trainer.max_steps) if limit >= 0]
    if not limits:
        raise ValueError("the run has no end that is known before: set trainer.max_epochs or trainer.max_steps")
    return min(limits), min(limits) / per_epoch * rows.tokens


def configured(module: CondenserModule, datamodule: CondenserDataModule, trainer: Any, on_gpu: bool) -> Setting:
    given = str(trainer.precision or 32)
    precision = {"32": "32-true", "bf16": "bf16-mixed"}.get(given, given)
    if precision not in ("32-true", "bf16-mixed"):
        raise ValueError(f"trainer.precision={given} cannot be estimated; use 32-true or bf16-mixed")
    return Setting(precision, module.gradient_checkpointing, module.fused_loss, on_gpu)


def n_devices(trainer: Any) -> int:
    """How many share a step; 1, which needs the most memory, where that is left to the machine."""
    devices = trainer.devices
    each = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    return max(1, each) * int(trainer.num_nodes)


def first_step(datamodule: CondenserDataModule, rows: Rows) -> list[np.ndarray]:
    """The lengths in each micro-batch of a step, the longest rows first."""
    order = BucketedBatches(
        rows.lengths,
        batch_size=datamodule.batch_size,
        micro_batches_per_step=datamodule.micro_batches_per_step,
        seed=datamodule.seed,
        added=SPECIAL_TOKENS,
    )
    return [rows.lengths[part] for part in order.step(0)]


def tokens_of(lengths: np.ndarray) -> int:
    return int(lengths.sum(dtype=np.int64)) + SPECIAL_TOKENS * len(lengths)


def flops_per_token(rehearsal: Rehearsal, lengths: np.ndarray) -> float:
    """Needed by training, of a real token: no padding, last layers at the queries alone."""
    batch = StepBatch.of([one_pass(lengths[:: -(-len(lengths) // 4096)], rehearsal.datamodule)])
    return rehearsal.model.flops(Work.needed(batch)) / batch.total("n_tokens")


def parameters(model: Condenser) -> dict[str, int]:
    pieces = {"total": model, "backbone": model.lm, "its embeddings": model.backbone.embeddings, "head": model.c_head}
    counts = {name: sum(p.numel() for p in piece.parameters()) for name, piece in pieces.items()}
    return counts | {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def memory(rehearsal: Rehearsal, chosen: Setting, lengths: np.ndarray, devices: int) -> list[dict[str, Any]]:
    """GB by kind at the peak of a step, as configured and otherwise, with a pass of these ``lengths``."""
    settings = [Setting(p, c, chosen.fused, chosen.on_gpu) for p in ("32-true", "bf16-mixed") for c in (False, True)]
    if FUSED_AVAILABLE:
        settings.insert(settings.index(chosen) + 1, chosen._replace(fused=not chosen.fused))
    table = []
    for setting in settings:
        found = rehearsal.peak(setting, lengths) | {BUCKETS: buckets(rehearsal, devices)}
        gb = {kind: found[kind] / 1e9 for kind in (*KINDS, BUCKETS)}
        table.append(setting._asdict() | {"configured": setting == chosen} | gb | {"peak": sum(gb.values())})
    return table


def buckets(rehearsal: Rehearsal, devices: int) -> int:
    """Bytes in which DDP holds the gradients once more."""
    return sum(p.numel() * p.element_size() for p in rehearsal.trained.values()) if devices > 1 else 0


def on_gpus(
    rehearsal: Rehearsal, setting: Setting, rows: Rows, step_tokens: int, flops: float, options: Any
) -> list[dict[str, Any]]:
    """What fits on each GPU, and how long it takes. Memory goes with a pass in straight pieces that bend upwards, so
    that between sizes that were rehearsed it is no more than on a line between them."""
    longest, sizes = int(rows.lengths.max()), [1, 16, 256]
    needs = [sum(rehearsal.peak(setting, np.full(n, longest)).values()) for n in sizes]
    sizes.append(1 << 24)
    needs.append(needs[-1] + (needs[-1] - needs[-2]) // 240 * (sizes[-1] - 256))
    table = []
    for name, gb in GPUS.items():
        row: dict[str, Any] = {"gpu": name, "memory": gb}
        for devices in dict.fromkeys((1, options.gpus)):
            budget = USABLE * gb * 1e9 - CONTEXT - buckets(rehearsal, devices)
            n = int(np.interp(budget, needs, sizes, left=0))
            tokens = n * (longest + SPECIAL_TOKENS)
            least = -(-step_tokens // (tokens * devices)) * devices if n else math.inf
            fits = least <= rehearsal.datamodule.batch_size
            hours = flops / ((bf16_peak(name) or math.nan) * options.mfu * devices) / 3600
            row[str(devices)] = {"sequences": n, "tokens": tokens, "micro_batches": least if fits else None}
            row[str(devices)] |= {"hours": hours, "gpu_hours": hours * devices}
        table.append(row)
    return table


def assumptions(module: CondenserModule, setting: Setting, mfu: float) -> list[str]:
    found = [
        f"hours: {mfu:.0%} (--mfu) of the bf16 peak of the data sheet goes into what real tokens need: no padding, "
        "pruned last layers; validation, checkpoints and waiting for data take no time",
        f"fits: {USABLE:.0%} of a GPU's memory less {CONTEXT / 1e9:.0f} GB, for fragmentation, the CUDA context and "
        "libraries' workspaces, which are in no other figure; with several GPUs DDP holds the gradients once more",
        "weights, gradients and optimizer states are whole on every device, not sharded",
    ]
    if setting.precision == "32-true":
        found.append("the hours are those of bf16-mixed; 32-true is several times slower on GPUs")
    if setting.checkpointing:
        found.append("gradient checkpointing repeats the forward pass: give a --mfu a quarter lower than without")
    if setting.on_gpu and module.compiled is not False:
        found.append("memory is that of a pass that is not compiled, which keeps more")
    if module.layers["freeze_embeddings"] or module.layers["freeze_layers"]:
        found.append("operations and hours count frozen layers as if they were trained")
    return found


def show(found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "title_justify": "left"}
    console, run, data = Console(), found["run"], found["data"]
    counts = ", ".join(f"{name} {count / 1e6:,.2f}" for name, count in found["parameters"].items())
    console.print(f"Million parameters: {counts}")
    console.print(f"Lengths: {data['lengths']}; {data['tokens_per_epoch']:,.0f} tokens an epoch")
    amount = f"{run['tokens']:,.0f} tokens of {run['flops_per_token'] / 1e9:.3g} GFLOP each: {run['flops']:.3g} FLOP"
    console.print(f"The run: {run['steps']:,} steps, {amount}\n")

    rows, size = found["memory"], f"{found['pass']['sequences']:,} rows, {found['pass']['tokens']:,} tokens"
    device = "a GPU" if rows[0]["on_gpu"] else "the CPU"
    table = Table("", title=f"GB at the peak of a step on {device}, a pass of {size} (* configured)", **style)
    for row in rows:
        flags = {"fused loss": row["fused"], "recomputed": row["checkpointing"]}
        header = [
            ("* " if row["configured"] else "") + row["precision"].split("-")[0],
            *(name for name, on in flags.items() if on),
        ]
        table.add_column("\n".join(header), justify="right")
    for kind in (*KINDS, BUCKETS, "peak"):
        if any(row[kind] for row in rows):
            table.add_row(kind, *(f"{row[kind]:.3f}" for row in rows))
    console.print(table)

    columns = list(found["gpus"][0])[2:]
    title = "Largest pass (rows of full length), smallest data.micro_batches_per_step, hours"
    table = Table("\n\nGPU", "\n\nGB", "\n\nrows", "\n\ntokens", title=title, **style)
    for column in columns:
        table.add_column(f"micro-\nbatches\non {column}", justify="right")
        table.add_column(f"\nhours\non {column}", justify="right")
    for row in found["gpus"]:
        sizes = [f"{row[columns[0]][key]:,}" for key in ("sequences", "tokens")]
        cells = [(str(row[n]["micro_batches"] or "-"), f"{row[n]['hours']:,.3g}") for n in columns]
        table.add_row(row["gpu"], str(row["memory"]), *sizes, *(cell for pair in cells for cell in pair))
    console.print(table)
    for line in found["assumptions"]:
        console.print(f"- {line}", highlight=False)
