"""`condenser bench`: the speed of a training step, from the authors' recipe to everything that is done here.

Each row of the table adds one thing to the row before. All run in one process on one model, in turn, round after round,
over the same samples: machines are shared and noisy, ratios are not. Weights are random; speed does not depend on them.
"""

import os
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from condenser.data.batching import BucketedBatches
from condenser.data.collate import Vocabulary
from condenser.data.store import SPECIAL_TOKENS, TokenStore, read_manifest, write_json
from condenser.data.synthetic import VOCABULARY, SyntheticStore
from condenser.models.backbones.base import build_masked_lm, changed_config
from condenser.models.condenser import Condenser
from condenser.models.flops import bf16_peak
from condenser.models.losses import FUSED_AVAILABLE
from condenser.reports.trial import Precision, Recipe, Trial, matmul_rate
from condenser.runs import read_mapping


def recipes(on_gpu: bool, precision: Precision) -> list[Recipe]:
    """The authors' recipe, and each step of ours added in turn."""
    found = [Recipe("authors' recipe", masked_only=False, bucketed=False, pruned=False, fused_optimizer=False)]

    def add(name: str, **more: bool) -> None:
        found.append(replace(found[-1], name=f"+ {name}", **more))

    add("masked tokens only", masked_only=True)
    add("batches by length", bucketed=True)
    add("pruned last layers", pruned=True)
    add("fused optimizer", fused_optimizer=True)
    if on_gpu and precision == "bf16-mixed":
        add("packed", packed=True)
    if on_gpu and FUSED_AVAILABLE:
        add("fused loss", fused_loss=True)
    add("compiled layers", compiled=True)
    return found


def bench(
    *,
    config: str | None = None,
    store: str | None = None,
    max_length: int = 128,
    sequences: int | None = None,
    micro_batches: int | None = None,
    precision: Precision | None = None,
    steps: int | None = None,
    rounds: int = 5,
    workers: int | None = None,
    json: str | None = None,
) -> None:
    """Measure training steps: the authors' recipe, each of our steps added to it, and everything.

    Shown are medians over the rounds, with half the range, and the ratio to the authors' recipe. FLOPs are those done,
    padding included; MFU counts only those that the real tokens need, against the rate of large matrix products.
    `condenser bench data` measures what comes before training.

    Args:
        config: recipe whose model is built, with random weights; BERT-base with the paper's head by default.
        store: token store whose rows are used; by default rows in memory with the lengths of real text.
        max_length: of the rows in memory.
        sequences: of an optimizer step; 32 on the CPU and 1024 on a GPU by default.
        micro_batches: parts of a step; 2 on the CPU and 8 on a GPU by default.
        precision: 32-true on the CPU and bf16-mixed on a GPU by default.
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
    precision = precision or ("bf16-mixed" if on_gpu else "32-true")
    sequences, micro_batches = sequences or (1024 if on_gpu else 32), micro_batches or (8 if on_gpu else 2)
    steps, workers = steps or (10 if on_gpu else 1), (8 if on_gpu else 0) if workers is None else workers
    samples, vocabulary, n_tokens = open_store(store, max_length, 64 * sequences)
    batches = BucketedBatches(
        samples.lengths, batch_size=sequences, micro_batches_per_step=micro_batches, seed=0, added=SPECIAL_TOKENS
    )
    if batches.steps_per_epoch < steps * rounds + 1:
        raise ValueError(
            f"{steps} steps in each of {rounds} rounds need {steps * rounds + 1} steps of {sequences} sequences; "
            f"{store or 'the rows in memory'} have {batches.steps_per_epoch}. Lower --steps, --rounds or --sequences"
        )
    torch.manual_seed(0)
    model = build_model(config, n_tokens, int(samples.lengths.max()) + SPECIAL_TOKENS).to(device)
    trial = Trial(model, precision, steps, workers, samples, vocabulary, batches)
    if json:
        Path(json).parent.mkdir(parents=True, exist_ok=True)
    console, about = Console(), setting(trial, sequences, micro_batches)
    console.print(about, highlight=False)
    compared = recipes(on_gpu, precision)
    found = trial.run(compared, rounds, console)
    rate = matmul_rate(device, torch.bfloat16 if precision == "bf16-mixed" else torch.float32)
    peak = bf16_peak(torch.cuda.get_device_name()) if on_gpu and precision == "bf16-mixed" else None
    console.print(table(found, rate))
    console.print(f"MFU is of {rate / 1e12:.3g} TFLOP/s, measured with large matrix products", highlight=False)
    if json:
        rates = {"matmul_flops_per_second": rate, "data_sheet_flops_per_second": peak}
        write_json(Path(json), {"setting": about, **rates, "recipes": found})


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
    return Condenser.from_masked_lm(lm, **head).train()


def setting(trial: Trial, sequences: int, micro_batches: int) -> str:
    lengths, config = trial.samples.lengths, trial.model.lm.config
    longest = int(lengths.max()) + SPECIAL_TOKENS
    real = (lengths.mean() + SPECIAL_TOKENS) / longest
    hardware = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    if trial.device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    return (
        f"{config.num_hidden_layers} + {len(trial.model.c_head)} layers of width {config.hidden_size}, "
        f"{config.vocab_size:,} tokens in the vocabulary; {trial.precision}; {hardware}; torch {torch.__version__}\n"
        f"{sequences} sequences a step in {micro_batches} micro-batches, up to {longest} tokens long, on average "
        f"{real:.0%} of that"
    )


def table(found: dict[str, dict[str, list[float]]], rate: float) -> Any:
    from rich import box
    from rich.table import Table

    headers = "tokens/s", "ratio", "padding", "wait", "GFLOP/tok", "MFU", "GB"
    shown = Table("", *headers, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    base = next(iter(found.values()))["tokens_per_second"]
    for name, figures in found.items():
        speed = figures["tokens_per_second"]
        shown.add_row(
            name,
            f"{median(speed):,.0f} ± {(max(speed) - min(speed)) / 2 / median(speed):.0%}",
            f"{median(a / b for a, b in zip(speed, base, strict=True)):.2f}",
            f"{median(figures['padding']):.1%}",
            f"{median(figures['data_wait']):.1%}",
            f"{median(figures['flops_per_token']) / 1e9:.3f}",
            f"{median(figures['needed_flops_per_second']) / rate:.0%}",
            f"{figures['peak_memory_gb'][0]:.2f}",
        )
    for column in shown.columns[1:]:
        column.no_wrap, column.justify = True, "right"
    return shown
