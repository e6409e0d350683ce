"""What is in a token store, for eyes: `condenser inspect STORE`."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from condenser.data.datamodule import CondenserDataModule
from condenser.data.steps import Steps
from condenser.data.store import in_words, read_manifest
from condenser.data.store import verify as verify_files
from condenser.reports.tables import table
from condenser.runs import at_least

COLOURS = {"mask": "white on red", "random": "black on yellow", "keep": "black on green"}
STEPS_LOOKED_AT = 20  # of an epoch
OF_DOCUMENTS = ("documents", "kept", "empty", "too_short", "bad", "dropped_repeats", "repeated_ids", "repeated_texts")


def inspect_store(
    store: str, samples: int, epoch: int, batch_size: int, micro_batches_per_step: int, verify: bool, **masking: Any
) -> None:
    """Show what is in a token store: where it came from, how long its rows are, some with their masks, the steps.

    Args:
        store, samples, epoch, batch_size, micro_batches_per_step, verify: see `condenser inspect`.
        masking: settings of the data module that say what is masked.

    Raises:
        ValueError: no store there, or a damaged one.
    """
    least = {"samples": (samples, 0), "epoch": (epoch, 0), "batch_size": (batch_size, 1)}
    for name, limits in (least | {"micro_batches_per_step": (micro_batches_per_step, 1)}).items():
        at_least(name, *limits)
    console, manifest = Console(highlight=False), read_manifest(store)
    if verify:
        verify_files(Path(store), manifest["splits"])
        console.print("all files agree with their checksums")
    n_train = manifest["splits"]["train"]["rows"]
    data = CondenserDataModule(
        store,
        batch_size=min(batch_size, max(1, n_train)),
        micro_batches_per_step=max(1, min(micro_batches_per_step, batch_size, n_train)),
        num_workers=0,
        **masking,
    )
    data.setup("fit")
    steps: Any = data.train_dataloader().dataset
    console.print(table(("", ""), about(manifest).items(), store, justify="left"))
    console.print(histogram(data.train.lengths))
    show_samples(console, data, steps, epoch, samples)
    console.print(about_steps(steps))


def about(manifest: dict[str, Any]) -> dict[str, str]:
    """What a manifest says, in words."""
    settings, counts = manifest["settings"], manifest["counts"]
    splits = manifest["splits"]
    n_bytes = sum(shard["bytes"] for split in splits.values() for shard in split["shards"])
    shown = ("kind", "max_length", "min_length", "short_fraction", "language", "word_segmenter", "title_column", "seed")
    return {
        **{name: in_words(split, "rows", "tokens", "documents") for name, split in splits.items()},
        "documents": in_words(counts, *(name for name in OF_DOCUMENTS if name in counts)),
        "tokens": in_words(counts, *(name for name in counts if "tokens_" in name)),
        "size": f"{n_bytes / 1e6:,.1f} MB, {n_bytes / max(1, counts['tokens_kept']):.2f} bytes a token",
        "tokenizer": f"{settings['tokenizer']}, {manifest['tokenizer']['vocabulary']:,} ids",
        "sources": "\n".join(source["name"] for source in settings["sources"]),
        "settings": ", ".join(f"{name} {settings[name]}" for name in shown if settings[name] is not None),
        "bad": "\n".join(manifest["bad"]) or "none",
    }


def histogram(lengths: np.ndarray) -> Table:
    """A bar for each sixteenth of the longest."""
    width = -(-int(lengths.max()) // 16)
    counts = np.bincount((lengths.astype(np.int64) - 1) // width)
    rows = [
        (f"{n * width + 1} to {(n + 1) * width}", "█" * round(40 * count / counts.max()), f"{count:,}")
        for n, count in enumerate(counts)
    ]
    return table(("", "", ""), rows, "lengths, in tokens without special ones", justify="left")


def show_samples(console: Console, data: CondenserDataModule, steps: Steps, epoch: int, n: int) -> None:
    legend = Text("masks:")
    for example, fate in (("[hidden]", "mask"), ("[was→is]", "random"), ("[left as it is=]", "keep")):
        legend.append(" ").append(example, COLOURS[fate])
    console.print(legend)
    for number in np.linspace(0, len(data.train) - 1, min(n, len(data.train)), dtype=np.int64):
        text = Text().append(f"\nrow {number}: ", "bold")
        for piece, is_start, fate in masked_pieces(data, steps, epoch, int(number)):
            text.append(" " if is_start else "").append(piece, COLOURS.get(fate))
        console.print(text)


def masked_pieces(data: CondenserDataModule, steps: Steps, epoch: int, number: int) -> list[tuple[str, bool, str]]:
    """A sample's tokens: the text of each, whether a word begins, and its fate: mask, random, keep or none."""
    fields = steps.one_pass(epoch, np.array([number]))
    originals = dict(zip(fields["masked_index"].tolist(), fields["labels"].tolist(), strict=True))
    starts = data.train.read(data.train.samples(epoch, np.array([number])).rows).word_starts

    def text(token: int) -> str:
        return data.tokenizer.decode([token]).removeprefix("##").strip()

    found = []
    for place, is_start in enumerate(starts.tolist(), start=1):
        now = int(fields["input_ids"][place])
        label = originals.get(place)
        if label is None:
            found.append((text(now), is_start, ""))
        elif now == data.tokenizer.mask_token_id:
            found.append((f"[{text(label)}]", is_start, "mask"))
        elif now == label:
            found.append((f"[{text(label)}=]", is_start, "keep"))
        else:
            found.append((f"[{text(label)}→{text(now)}]", is_start, "random"))
    return found


def about_steps(steps: Steps) -> Table:
    """How large steps and micro-batches are, by the first of them."""
    batches = steps.batches
    looked_at = [steps[number] for number in range(min(STEPS_LOOKED_AT, batches.steps_per_epoch))]
    micro_batches = [fields for step in looked_at for fields in step]
    rows = {
        "steps in an epoch": f"{batches.steps_per_epoch:,}",
        "tokens of a step": spread([step.total("n_tokens") for step in looked_at]),
        "tokens of a micro-batch": spread([fields["n_tokens"] for fields in micro_batches]),
        "sequences of a micro-batch": spread([fields["n_sequences"] for fields in micro_batches]),
    }
    title = f"steps of batch_size {batches.batch_size}, {batches.micro_batches_per_step} micro-batches a step"
    return table(("", ""), rows.items(), title, justify="left")


def spread(numbers: list[int]) -> str:
    return f"{np.mean(numbers):,.0f}, from {min(numbers):,} to {max(numbers):,}"
