"""`condenser estimate`: what a run will cost, before anything is spent.

    condenser estimate --config configs/condenser.yaml [-c OVERLAY.yaml ...] [--model.skip_from 3 ...] [--mfu 0.4]

Takes the settings of `condenser fit` and says how large the model is, how many operations a token and the run need, how
much memory a step takes (by rehearsing it, see rehearsal.py), what fits on named GPUs, and how many hours these need.
No weights are loaded, and no GPU is needed.
"""

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from rich.console import Console
from rich.table import Table

from condenser.data.collate import StepBatch
from condenser.data.datamodule import CondenserDataModule, limited
from condenser.data.steps import Steps
from condenser.data.store import SPECIAL_TOKENS
from condenser.data.synthetic import SyntheticStore
from condenser.models.flops import TOKENS_AT_ONCE, Work, bf16_peak
from condenser.models.losses import FUSED_AVAILABLE
from condenser.models.objective import Objective
from condenser.recipes import parser_beside_fit
from condenser.reports.rehearsal import KINDS, Rehearsal, Setting, one_pass
from condenser.reports.rows import steps_over
from condenser.reports.tables import check_figures, table, write_figures
from condenser.runs import PRECISIONS, length
from condenser.training.fit import DryCLI, run_cli
from condenser.training.module import CondenserModule

GPUS = {"RTX 4090": 24, "A100 40GB": 40, "L40S": 48, "A100 80GB": 80, "H100": 80, "H200": 141}  # GB, 1e9 bytes
USABLE, CONTEXT = 0.9, 1e9  # share of a GPU's memory that fragmentation leaves; bytes that are gone before a run
SAMPLE = 1 << 14  # rows that stand for all of an epoch
BUCKETS = "DDP buckets"


class Data(NamedTuple):
    """What an epoch holds."""

    steps: Steps
    lengths: np.ndarray  # of some rows, without special tokens
    n_rows: float
    tokens: float  # special ones included
    source: str


def estimate(args: Sequence[str]) -> None:
    options, of_the_run = own_parser().parse_known_args(args)
    if not 0 < options.mfu <= 1 or options.gpus < 1 or not 0 < options.tokens < math.inf:
        raise ValueError("--mfu must lie between 0 and 1, --gpus and --tokens must be positive")
    check_figures(options.json)
    run = run_cli("fit", of_the_run, DryCLI)
    found = costs(run.model, run.datamodule, run.config["fit"].trainer, options)
    show(found)
    write_figures(options.json, found)


def own_parser() -> argparse.ArgumentParser:
    about = "What a run will cost: parameters, operations, memory, what fits on named GPUs, and hours."
    parser = parser_beside_fit("condenser estimate", about)
    parser.add_argument("--mfu", type=float, default=0.4, help="share of a GPU's peak that is reached (default: 0.4)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs that share a step, beside one alone (default: 8)")
    parser.add_argument("--tokens", type=float, default=1e9, help="of an epoch, if there is no store (default: 1e9)")
    parser.add_argument("--json", help="a file for the figures")
    return parser


def costs(module: CondenserModule, datamodule: CondenserDataModule, trainer: Any, options: Any) -> dict[str, Any]:
    """All figures. Raises ValueError for settings that `condenser fit` would refuse too."""
    on_gpu = trainer.accelerator != "cpu"
    precision = PRECISIONS.get(str(trainer.precision), trainer.precision)
    if precision not in ("32-true", "bf16-mixed"):
        raise ValueError(f"trainer.precision={precision} cannot be estimated; use 32-true or bf16-mixed")
    setting = Setting(precision, module.gradient_checkpointing, module.fused_loss, on_gpu)
    datamodule.tokens_per_pass = datamodule.tokens_per_pass or (TOKENS_AT_ONCE if on_gpu else 1)
    datamodule.num_workers = 0  # what is read is read here
    datamodule.provide_for(module.objective)
    data = data_of(datamodule, options.tokens)
    steps, tokens = length_of_run(trainer, datamodule.batch_size, data)
    rehearsal = Rehearsal(module, datamodule)
    per_token = flops_per_token(rehearsal, data.lengths)
    first_pass = lengths_of(data.steps, data.steps.parts(0)[0])
    return {
        "parameters": parameters(rehearsal.model),
        "data": {"lengths": data.source, "rows_per_epoch": data.n_rows, "tokens_per_epoch": data.tokens},
        "run": {"steps": steps, "tokens": tokens, "flops_per_token": per_token, "flops": per_token * tokens},
        "pass": {"sequences": len(first_pass), "tokens": int((first_pass + SPECIAL_TOKENS).sum())},
        "memory": memory(rehearsal, setting, first_pass, n_devices(trainer)),
        "gpus": on_gpus(rehearsal, setting, data, per_token * tokens, options),
        "assumptions": list(assumptions(module, setting, options.mfu)),
    }


def data_of(datamodule: CondenserDataModule, tokens: float) -> Data:
    """The store's rows; rows like those of real text, ``tokens`` in all, where a store does not exist yet."""
    missing = ", ".join(str(folder) for folder in datamodule.weights if not folder.is_dir())
    if missing:
        sizes = datamodule.batch_size, datamodule.micro_batches_per_step
        rows = SyntheticStore(max(SAMPLE, datamodule.batch_size))
        steps = steps_over(rows, *sizes, pairs=bool(datamodule.pairs), tokens_per_pass=datamodule.tokens_per_pass)
        source = f"NOT of your data: there is no token store at {missing}; of Wikipedia's rows, up to 128 tokens"
    else:
        datamodule.setup("fit")
        steps = cast(Steps, datamodule.train_dataloader().dataset)
        source = f"of {', '.join(map(str, datamodule.weights))}"
    n = len(steps.mixture) * steps.mixture.each
    lengths = lengths_of(steps, np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64))
    mean = float(lengths.mean()) + SPECIAL_TOKENS
    n_rows = tokens / mean if missing else n
    return Data(steps, lengths, n_rows, n_rows * mean, source)


def lengths_of(steps: Steps, numbers: np.ndarray) -> np.ndarray:
    """Of these sequences of the first epoch, without special tokens."""
    samples, which = np.divmod(numbers, steps.mixture.each)
    return steps.mixture.tokens(0, samples)[np.arange(len(numbers)), which]


def length_of_run(trainer: Any, batch_size: int, data: Data) -> tuple[float, float]:
    """Optimizer steps, and the tokens in them. Raises ValueError for a run without an end."""
    whole = max(1, round(data.n_rows / batch_size))
    per_epoch = limited(whole, trainer.overfit_batches or trainer.limit_train_batches)
    epochs = trainer.max_epochs
    if epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
        epochs = 1000  # as Lightning has it
    steps = length(trainer.max_steps, epochs, per_epoch)
    if steps is None:
        raise ValueError("the run has no end that is known before: set trainer.max_epochs or trainer.max_steps")
    if steps < 1:
        raise ValueError(f"trainer.max_steps={trainer.max_steps}, max_epochs={epochs}: a run of no steps")
    return steps, steps / whole * data.tokens


def n_devices(trainer: Any) -> int:
    """How many share a step; 1, which needs the most memory, where that is left to the machine."""
    devices = trainer.devices
    if isinstance(devices, str) and "," in devices:  # ids; Lightning's own reading of them looks for these GPUs
        devices = [number for number in devices.split(",") if number]
    each = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    return max(1, each) * int(trainer.num_nodes)


def flops_per_token(rehearsal: Rehearsal, lengths: np.ndarray) -> float:
    """Needed by training, of a real token: no padding, last layers at the queries alone."""
    batch = StepBatch.of([one_pass(lengths, rehearsal.datamodule)])
    return rehearsal.model.flops(Work.of_real_tokens(batch)) / batch.total("n_tokens")


def parameters(model: Objective) -> dict[str, int]:
    pieces = {"total": model, "backbone": model.lm, "its embeddings": model.backbone.embeddings}
    counts = {name: sum(p.numel() for p in piece.parameters()) for name, piece in pieces.items()}
    counts["head"] = counts["total"] - counts["backbone"]
    return counts | {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def memory(rehearsal: Rehearsal, chosen: Setting, lengths: np.ndarray, devices: int) -> list[dict[str, Any]]:
    """GB by kind at the peak of a step, as configured and otherwise, with a pass of these ``lengths``."""
    settings = [chosen._replace(precision=p, checkpointing=c) for p in ("32-true", "bf16-mixed") for c in (False, True)]
    if FUSED_AVAILABLE:
        settings.insert(settings.index(chosen) + 1, chosen._replace(fused=not chosen.fused))
    rows = []
    for setting in settings:
        found = rehearsal.peak(setting, lengths) | {BUCKETS: (devices > 1) * rehearsal.gradients}
        gb = {kind: n_bytes / 1e9 for kind, n_bytes in found.items()}
        rows.append(setting._asdict() | {"configured": setting == chosen} | gb | {"peak": sum(gb.values())})
    return rows


def on_gpus(rehearsal: Rehearsal, setting: Setting, data: Data, flops: float, options: Any) -> list[dict[str, Any]]:
    """What fits on GPUs, and how long they take. Memory goes with a pass in straight pieces that bend upwards, so that
    between sizes that were rehearsed it is no more than on a line between them."""
    setting, longest, sizes = setting._replace(on_gpu=True), int(data.lengths.max()), [1, 16, 256]
    needs = [sum(rehearsal.peak(setting, np.full(n, longest)).values()) for n in sizes]
    sizes.append(1 << 24)
    needs.append(needs[-1] + (needs[-1] - needs[-2]) // 240 * (sizes[-1] - 256))
    step_tokens = data.tokens / data.n_rows * rehearsal.datamodule.batch_size
    found = []
    for gpu, devices in itertools.product(GPUS, sorted({1, options.gpus})):
        budget = USABLE * GPUS[gpu] * 1e9 - CONTEXT - (devices > 1) * rehearsal.gradients
        n = int(np.interp(budget, needs, sizes, left=0))
        tokens = n * (longest + SPECIAL_TOKENS)
        least = math.ceil(step_tokens / (tokens * devices)) * devices if n else math.inf
        row = {"gpu": gpu, "memory": GPUS[gpu], "devices": devices, "sequences": n, "tokens": tokens}
        row["micro_batches"] = least if least <= rehearsal.datamodule.batch_size else None
        row["hours"] = flops / ((bf16_peak(gpu) or math.nan) * options.mfu * devices) / 3600
        found.append(row)
    return found


def assumptions(module: CondenserModule, setting: Setting, mfu: float) -> Iterator[str]:
    yield (
        f"hours: {mfu:.0%} (--mfu) of the bf16 peak of the data sheet goes into what real tokens need: no padding, "
        "pruned last layers; validation, checkpoints and waiting for data take no time"
    )
    yield (
        f"fits: {USABLE:.0%} of a GPU's memory less {CONTEXT / 1e9:.0f} GB, for fragmentation, the CUDA context and "
        "libraries' workspaces, which are in no other figure; with several GPUs DDP holds the gradients once more"
    )
    yield "weights, gradients and optimizer states are whole on every device, not sharded"
    if setting.precision == "32-true":
        yield "the hours are those of bf16-mixed; 32-true is several times slower on GPUs"
    if setting.checkpointing:
        yield "gradient checkpointing repeats the forward pass: give a --mfu a quarter lower than without"
    if module.wanted["compile"] is not False:
        yield "memory on GPUs is that of a pass that is not compiled, which keeps more"
    if module.layers["freeze_embeddings"] or module.layers["freeze_layers"]:
        yield "operations and hours count frozen layers as if they were trained"


def show(found: dict[str, Any]) -> None:
    console, run, data = Console(highlight=False, markup=False, emoji=False), found["run"], found["data"]
    counts = ", ".join(f"{name} {count / 1e6:,.2f}" for name, count in found["parameters"].items())
    amount = f"{run['tokens']:,.0f} tokens of {run['flops_per_token'] / 1e9:.3g} GFLOP each: {run['flops']:.3g} FLOP"
    console.print(f"Million parameters: {counts}")
    console.print(f"Lengths: {data['lengths']}; {data['tokens_per_epoch']:,.0f} tokens an epoch")
    console.print(f"The run: {run['steps']:,} steps, {amount}\n")
    rows, size = found["memory"], f"{found['pass']['sequences']:,} rows, {found['pass']['tokens']:,} tokens"
    device = "a GPU" if rows[0]["on_gpu"] else "the CPU"
    kinds = [kind for kind in (*KINDS, BUCKETS, "peak") if any(row[kind] for row in rows)]
    cells = [(in_words(row), *(f"{row[kind]:.3f}" for kind in kinds)) for row in rows]
    console.print(table(("", *kinds), cells, f"GB at the peak of a step on {device}, a pass of {size} (* configured)"))
    console.print(table_of_gpus(found["gpus"]))
    for line in found["assumptions"]:
        console.print(f"- {line}")


def in_words(setting: dict[str, Any]) -> str:
    words = [("* " if setting["configured"] else "") + setting["precision"].split("-")[0]]
    words += ["fused loss"] * setting["fused"] + ["recomputed"] * setting["checkpointing"]
    return ", ".join(words)


def table_of_gpus(gpus: list[dict[str, Any]]) -> Table:
    rows = []
    for gpu in gpus:
        numbers = [f"{gpu[key]:,}" for key in ("memory", "sequences", "tokens")]
        micro_batches = str(gpu["micro_batches"] or "-")
        hours = f"{gpu['hours']:,.3g}" if gpu["hours"] >= 0.01 else "< 0.01"
        rows.append((f"{gpu['devices']} x {gpu['gpu']}", *numbers, micro_batches, hours))
    title = "The largest pass that fits (rows of full length), smallest data.micro_batches_per_step, hours"
    return table(("", "GB", "rows", "tokens", "micro-batches", "hours"), rows, title)
