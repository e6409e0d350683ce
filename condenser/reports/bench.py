"""`condenser bench`: the speed of a training step, from the authors' recipe to ours.

Each row of the table adds to the row before. All run in one process on one model, in turn, round after round, over the
same samples, by the step that `condenser fit` takes: machines are shared and noisy, ratios are not. Weights are random;
speed does not depend on them.
"""

import os
from argparse import ArgumentError
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from condenser.corpus.work import available_cores
from condenser.data.store import SPECIAL_TOKENS
from condenser.models.condenser import Condenser
from condenser.models.flops import TOKENS_AT_ONCE
from condenser.models.objective import Objective
from condenser.recipes import WRONG, Parser, file_of
from condenser.reports.rehearsal import untrained
from condenser.reports.rows import open_rows, steps_over
from condenser.reports.tables import check_figures, table, write_figures
from condenser.reports.trial import FASTER, FIRST, KINDS, RECIPES, Figures, Precision, Recipe, Trial, matmul_rate
from condenser.runs import at_least, read_mapping
from condenser.training.device import check_rows
from condenser.training.module import CondenserModule


def bench(
    *,
    config: str | None = None,
    objective: str | None = None,
    store: str | None = None,
    max_length: int = 128,
    sequences: int | None = None,
    micro_batches: int | None = None,
    tokens_per_pass: int | None = None,
    precision: Precision | None = None,
    compile: bool | None = None,
    steps: int | None = None,
    rounds: int = 5,
    json: str | None = None,
) -> None:
    """Measure training steps: by the authors' recipe, by ours, compiled and replayed; or an objective beside plain MLM.

    Shown are medians over the rounds, with half the range, and the ratio to the first row. GFLOP of a token are
    those done, padding included; MFU counts only those that the real tokens need, against the rate of large matrix
    products. The host's time is what a step takes it until it can begin the next, launches are kernels on a GPU and
    operations, also within others, on a CPU. `condenser bench data` measures what comes before training.

    Args:
        config: recipe (a file or a name) whose model is built, with random weights; BERT-base with the paper's head by
            default.
        objective: class path of the objective, of which plain MLM is the first row: condenser.models.retromae.RetroMAE;
            by default that of the recipe, and for a Condenser the authors' recipe is the first row.
        store: token store whose rows (or spans) are used; by default rows in memory with the lengths of real text.
        max_length: of the rows in memory.
        sequences: of an optimizer step; 32 on the CPU and 1024 on a GPU by default.
        micro_batches: parts of a step; 2 on the CPU and 8 on a GPU by default.
        tokens_per_pass: tokens computed at once by ours; one micro-batch on the CPU and 65,536 on a GPU by default.
        precision: 32-true on the CPU and bf16-mixed on a GPU by default.
        compile: measure ours compiled too; by default on a GPU.
        steps: optimizer steps per row and round; 1 on the CPU and 10 on a GPU by default.
        rounds: repetitions of everything.
        json: a file for the figures.

    Raises:
        ValueError: no such store or configuration, or too few rows.
    """
    at_least("max-length", max_length, 4)  # special tokens and two of a text
    given = {"sequences": sequences, "micro-batches": micro_batches, "steps": steps, "rounds": rounds}
    for name, value in (given | {"tokens-per-pass": tokens_per_pass}).items():
        at_least(name, value, 1)
    check_figures(json)
    on_gpu = torch.cuda.is_available()
    sequences, steps = sequences or (1024 if on_gpu else 32), steps or (10 if on_gpu else 1)
    rows, vocabulary, n_tokens = open_rows(store, max_length, n_synthetic=64 * sequences)
    module = module_of(config, objective)
    kind = module.objective
    sizes = sequences, micro_batches or (8 if on_gpu else 2)
    made = steps_over(rows, *sizes, vocabulary, pairs=kind.contrast is not None, extras=kind.asks)
    needed = steps * rounds + FIRST
    if made.batches.steps_per_epoch < needed:
        raise ValueError(
            f"{steps} steps in each of {rounds} rounds need {needed} steps of {sequences} sequences; "
            f"{store or 'the rows in memory'} have {made.batches.steps_per_epoch}. "
            "Lower --steps, --rounds or --sequences"
        )
    torch.manual_seed(0)
    trial = Trial(
        model=build_model(module, n_tokens, int(rows.lengths.max()) + SPECIAL_TOKENS).to("cuda" if on_gpu else "cpu"),
        rows=made,
        precision=precision or ("bf16-mixed" if on_gpu else "32-true"),
        steps=steps,
        workers=min(8, available_cores()) if on_gpu else 0,
        tokens_per_pass=tokens_per_pass or (TOKENS_AT_ONCE if on_gpu else 1),
    )
    compile = on_gpu if compile is None else compile
    all_recipes = RECIPES
    if objective is not None or kind is not Condenser:
        all_recipes = (Recipe("plain MLM", mlm=True), Recipe(kind.__name__), *FASTER)
    recipes = [each for each in all_recipes if (compile or not each.compiled) and (on_gpu or not each.replayed)]
    console = Console(highlight=False)
    console.print(setting(trial))
    with console.status("") as status:
        found = trial.run(recipes, rounds, status.update)
    rate = matmul_rate(trial.device, trial.dtype)
    console.print(table_of_speed(found, rate))
    console.print(f"MFU is of {rate / 1e12:.3g} TFLOP/s, measured with large matrix products")
    if trial.kernels:
        console.print(table_of_kernels(trial.kernels))
    figures = {"recipes": found, "kernels": trial.kernels, "matmul_flops_per_second": rate}
    write_figures(json, {"setting": setting(trial), **figures})


def module_of(config: str | None, objective: str | None) -> CondenserModule:
    """By ``model`` of a recipe (a YAML file for `condenser fit`). Raises ValueError if there is none."""
    content = read_mapping(Path(file_of(config))) if config else {}
    model = (content or {}).get("model") or {}
    if content is None or not isinstance(model, dict):
        raise ValueError(f"--config {config}: no such file, or its model is no mapping of settings")
    settings = model.get("init_args", model)
    if objective:
        settings = {**settings, "objective": objective, "objective_options": None}  # which are another's
    parser = Parser()
    parser.add_class_arguments(CondenserModule, "model")
    try:
        return parser.instantiate_classes(parser.parse_object({"model": settings})).model
    except (ArgumentError, *WRONG) as error:
        raise ValueError(f"{config or '--objective'}: {error}") from None


def build_model(module: CondenserModule, n_tokens: int, longest: int) -> Objective:
    """The module's model, with random weights.

    Raises:
        ValueError: a model for fewer tokens or positions than the rows have.
    """
    backbone = os.path.expanduser(module.backbone or "")
    module.backbone = backbone if Path(backbone, "config.json").is_file() else None
    module.backbone_config = {"attention_probs_dropout_prob": 0.0, **module.backbone_config}
    model = untrained(module, vocab_size=n_tokens)
    if model.lm.config.vocab_size < n_tokens:
        raise ValueError(f"the model has vocab_size={model.lm.config.vocab_size}; the rows need {n_tokens}")
    check_rows(model, longest)
    return model


def setting(trial: Trial) -> str:
    batches, config = trial.rows.batches, trial.model.lm.config
    on_gpu = trial.device.type == "cuda"
    hardware = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    n_layers = config.num_hidden_layers
    return (
        f"{n_layers} + {trial.model.n_layers - n_layers} layers of width {config.hidden_size}, "
        f"{config.vocab_size:,} tokens in the vocabulary; {trial.precision}; {hardware}; torch {torch.__version__}\n"
        f"{batches.batch_size} sequences a step in {batches.micro_batches_per_step} micro-batches, of up to "
        f"{trial.longest} tokens, on average {batches.samples.lengths.mean() + SPECIAL_TOKENS:.0f}"
    )


def table_of_speed(found: dict[str, Figures], rate: float) -> Table:
    header = ("", "tokens/s", "ratio", "GFLOP", "MFU", "GB", "data\nwait", "laun-\nches", "host\nms")
    base = next(iter(found.values()))["tokens_per_second"]
    rows = []
    for name, figures in found.items():
        speeds, typical = figures["tokens_per_second"], {key: median(values) for key, values in figures.items()}
        spread = f" ±{(max(speeds) - min(speeds)) / 2 / median(speeds):.0%}" if len(speeds) > 1 else ""
        cells = (
            f"{median(speeds):,.0f}{spread}",
            f"{median(ours / theirs for ours, theirs in zip(speeds, base, strict=True)):.2f}",
            f"{typical['flops_per_token'] / 1e9:.3f}",
            f"{typical['needed_flops_per_second'] / rate:.0%}",
            f"{typical['peak_memory_gb']:.1f}",
            f"{typical['data_wait']:.1%}",
            f"{typical['launches']:,.0f}",
            f"{typical['host_ms']:,.0f}",
        )
        rows.append((name, *cells))
    return table(header, rows)


def table_of_kernels(kernels: dict[str, dict[str, float]]) -> Table:
    """``kernels``: milliseconds by kind, of each recipe."""
    rows = [(kind, *(f"{times.get(kind, 0.0):.1f}" for times in kernels.values())) for kind in KINDS]
    rows.append(("all", *(f"{sum(times.values()):.1f}" for times in kernels.values())))
    return table(("ms of kernels in a step", *kernels), rows)
