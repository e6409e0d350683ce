"""`condenser bench`: the speed of a training step, from the authors' recipe to ours.

Each row of the table adds to the row before. All run in one process on one model, in turn, round after round, over the
same samples, by the step that `condenser fit` takes: machines are shared and noisy, ratios are not. Weights are random;
speed does not depend on them.
"""

import os
from pathlib import Path
from statistics import median
from typing import Any

import torch

from condenser.data.batching import BucketedBatches
from condenser.data.collate import Vocabulary
from condenser.data.mixing import Mixture
from condenser.data.store import SPECIAL_TOKENS, TokenStore, read_manifest, write_json
from condenser.data.synthetic import VOCABULARY, SyntheticStore
from condenser.models.backbones.base import build_masked_lm, changed_config
from condenser.models.condenser import Condenser
from condenser.models.flops import bf16_peak
from condenser.reports.trial import FIRST, KINDS, RECIPES, Authors, Figures, Precision, Trial, matmul_rate
from condenser.runs import read_mapping


def bench(
    *,
    config: str | None = None,
    store: str | None = None,
    max_length: int = 128,
    sequences: int | None = None,
    micro_batches: int | None = None,
    tokens_per_pass: int | None = None,
    precision: Precision | None = None,
    compile: bool | None = None,
    steps: int | None = None,
    rounds: int = 5,
    workers: int | None = None,
    json: str | None = None,
) -> None:
    """Measure training steps: by the authors' recipe, by ours, and by ours compiled and replayed.

    Shown are medians over the rounds, with half the range, and the ratio to the authors' recipe. GFLOP of a token are
    those done, padding included; MFU counts only those that the real tokens need, against the rate of large matrix
    products. The host's time is what a step takes it until it can begin the next, launches are kernels on a GPU and
    operations on a CPU. `condenser bench data` measures what comes before training.

    Args:
        config: recipe whose model is built, with random weights; BERT-base with the paper's head by default.
        store: token store whose rows are used; by default rows in memory with the lengths of real text.
        max_length: of the rows in memory.
        sequences: of an optimizer step; 32 on the CPU and 1024 on a GPU by default.
        micro_batches: parts of a step; 2 on the CPU and 8 on a GPU by default.
        tokens_per_pass: tokens computed at once by ours; one micro-batch on the CPU and 65,536 on a GPU by default.
        precision: 32-true on the CPU and bf16-mixed on a GPU by default.
        compile: measure ours compiled too; by default on a GPU.
        steps: optimizer steps per row and round; 1 on the CPU and 10 on a GPU by default.
        rounds: repetitions of everything.
        workers: processes that load; 0 on the CPU and 8 on a GPU by default.
        json: a file for the figures.

    Raises:
        ValueError: no such store or configuration, or too few rows.
    """
    from rich.console import Console

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    sequences, micro_batches = sequences or (1024 if on_gpu else 32), micro_batches or (8 if on_gpu else 2)
    steps, workers = steps or (10 if on_gpu else 1), (8 if on_gpu else 0) if workers is None else workers
    samples, vocabulary, n_tokens = open_store(store, max_length, 64 * sequences)
    mixture = Mixture([samples], seed=0)
    batches = BucketedBatches(
        samples.lengths,
        batch_size=sequences,
        micro_batches_per_step=micro_batches,
        seed=0,
        added=SPECIAL_TOKENS,
        mixture=mixture,
    )
    if batches.steps_per_epoch < steps * rounds + FIRST:
        raise ValueError(
            f"{steps} steps in each of {rounds} rounds need {steps * rounds + FIRST} steps of {sequences} sequences; "
            f"{store or 'the rows in memory'} have {batches.steps_per_epoch}. Lower --steps, --rounds or --sequences"
        )
    torch.manual_seed(0)
    model = build_model(config, n_tokens, int(samples.lengths.max()) + SPECIAL_TOKENS).to(device)
    trial = Trial(
        model=model,
        precision=precision or ("bf16-mixed" if on_gpu else "32-true"),
        steps=steps,
        workers=workers,
        tokens_per_pass=tokens_per_pass or (65536 if on_gpu else 1),
        data=(mixture, batches, vocabulary),
    )
    if json:
        Path(json).parent.mkdir(parents=True, exist_ok=True)
    console, about = Console(), setting(trial)
    console.print(about, highlight=False)
    wanted = [
        recipe
        for recipe in RECIPES
        if (not recipe.compiled or (on_gpu if compile is None else compile)) and (on_gpu or not recipe.replayed)
    ]
    with console.status("") as status:
        found = trial.run(wanted, rounds, status.update)
    rate = matmul_rate(device, trial.dtype)
    console.print(table(found, rate))
    console.print(f"MFU is of {rate / 1e12:.3g} TFLOP/s, measured with large matrix products", highlight=False)
    if trial.kernels:
        console.print(table_of_kernels(trial.kernels))
    if json:
        peak = bf16_peak(torch.cuda.get_device_name()) if on_gpu and trial.precision == "bf16-mixed" else None
        rates = {"matmul_flops_per_second": rate, "data_sheet_flops_per_second": peak}
        write_json(Path(json), {"setting": about, **rates, "recipes": found, "kernels": trial.kernels})


def open_store(store: str | None, max_length: int, n_synthetic: int) -> tuple[Any, Vocabulary, int]:
    """Rows, the ids that collation needs, and the size of the vocabulary."""
    if store is None:
        return SyntheticStore(n_synthetic, max_length), VOCABULARY, 30522
    from condenser.data.tokenizers import load_tokenizer

    read_manifest(store)
    tokenizer = load_tokenizer(Path(store) / "tokenizer")
    return TokenStore(store, "train"), Vocabulary.of(tokenizer), len(tokenizer)


def build_model(config: str | None, n_tokens: int, longest: int) -> Condenser:
    """The model of a recipe (a YAML file for `condenser fit`), with random weights.

    Raises:
        ValueError: no such recipe, or a model for fewer tokens or positions than the rows have.
    """
    from transformers import AutoModelForMaskedLM

    if config is not None and not Path(config).is_file():
        raise ValueError(f"--config: no such file: {config}")
    recipe = (read_mapping(Path(config)) if config else {}).get("model", {})
    settings = {"attention_probs_dropout_prob": 0.0, **(recipe.get("backbone_config") or {})}
    head = {key: recipe[key] for key in ("skip_from", "n_head_layers", "late_mlm") if key in recipe}
    if Path(recipe.get("backbone") or "").joinpath("config.json").is_file():
        changed = changed_config(recipe["backbone"], settings)
        lm = AutoModelForMaskedLM.from_config(changed, trust_remote_code=False)
    else:
        lm = build_masked_lm(None, settings, vocab_size=n_tokens)
    for name, needed in (("vocab_size", n_tokens), ("max_position_embeddings", longest)):
        if getattr(lm.config, name) < needed:
            raise ValueError(f"the model has {name}={getattr(lm.config, name)}; the rows need {needed}")
    Authors.longest = longest
    return Condenser.from_masked_lm(lm, **head).train()


def setting(trial: Trial) -> str:
    mixture, batches, _ = trial.data
    lengths, config = mixture.lengths, trial.model.lm.config
    real = (lengths.mean() + SPECIAL_TOKENS) / Authors.longest
    hardware = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    if trial.device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    return (
        f"{config.num_hidden_layers} + {len(trial.model.c_head)} layers of width {config.hidden_size}, "
        f"{config.vocab_size:,} tokens in the vocabulary; {trial.precision}; {hardware}; torch {torch.__version__}\n"
        f"{batches.batch_size} sequences a step in {batches.micro_batches_per_step} micro-batches, up to "
        f"{Authors.longest} tokens long, on average {real:.0%} of that"
    )


def table(found: dict[str, Figures], rate: float) -> Any:
    from rich import box
    from rich.table import Table

    headers = "\ntokens/s", "\nratio", "\nGFLOP", "\nMFU", "\nGB", "data\nwait", "laun-\nches", "host\nms"
    shown = Table("", *headers, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    base = next(iter(found.values()))["tokens_per_second"]
    for name, figures in found.items():
        speed = figures["tokens_per_second"]
        shown.add_row(
            name,
            f"{median(speed):,.0f} ±{(max(speed) - min(speed)) / 2 / median(speed):.0%}",
            f"{median(a / b for a, b in zip(speed, base, strict=True)):.2f}",
            f"{median(figures['flops_per_token']) / 1e9:.3f}",
            f"{median(figures['needed_flops_per_second']) / rate:.0%}",
            f"{figures['peak_memory_gb'][0]:.1f}",
            f"{median(figures['data_wait']):.1%}",
            f"{figures['launches'][0]:,.0f}",
            f"{median(figures['host_ms']):,.0f}",
        )
    for column in shown.columns:
        column.no_wrap, column.justify = True, "right"
    shown.columns[0].justify = "left"
    return shown


def table_of_kernels(kernels: dict[str, dict[str, float]]) -> Any:
    from rich import box
    from rich.table import Table

    shown = Table("ms of kernels in a step", *kernels, box=box.SIMPLE_HEAD)
    for kind in (*KINDS, "element-wise"):
        shown.add_row(kind, *(f"{times.get(kind, 0.0):.1f}" for times in kernels.values()))
    shown.add_row("all", *(f"{sum(times.values()):.1f}" for times in kernels.values()))
    return shown
