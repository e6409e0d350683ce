"""`condenser inspect`: what is in a token store, for eyes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from condenser.data.datamodule import CondenserDataModule, Steps
from condenser.data.masking import Unit
from condenser.data.store import SPECIAL_TOKENS, read_manifest
from condenser.data.store import verify as verify_files

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {"mask": "white on red", "random": "black on yellow", "keep": "black on green"}
STEPS_LOOKED_AT = 100  # of an epoch


def inspect_store(
    store: str,
    /,
    *,
    samples: int = 3,
    epoch: int = 0,
    mask_unit: Unit = "word",
    mask_probability: float = 0.15,
    batch_size: int = 1024,
    micro_batches_per_step: int = 8,
    seed: int = 0,
    verify: bool = False,
) -> None:
    """Show what is in a token store: where it came from, how long its rows are, some with their masks, the steps.

    Args:
        store: folder that `condenser prepare` wrote.
        samples: rows to show.
        epoch: the epoch whose masks are shown.
        mask_unit: mask whole words, single tokens, or spans of words.
        mask_probability: share of the tokens to predict.
        batch_size: sequences per optimizer step over all devices.
        micro_batches_per_step: parts of a step.
        seed: seed of order and masks.
        verify: compare every file with its checksum first, which reads all of them.

    Raises:
        ValueError: no store there, or a damaged one.
    """
    from rich.console import Console

    console, manifest = Console(highlight=False), read_manifest(store)
    if verify:
        verify_all(store, manifest, console)
    n_train = manifest["splits"]["train"]["rows"]
    data = CondenserDataModule(
        store,
        batch_size=min(batch_size, max(1, n_train)),
        micro_batches_per_step=max(1, min(micro_batches_per_step, batch_size, n_train)),
        mask_unit=mask_unit,
        mask_probability=mask_probability,
        num_workers=0,
        seed=seed,
    )
    show_manifest(console, store, manifest)
    data.setup("fit")
    steps = data.train_dataloader().dataset
    assert isinstance(steps, Steps)
    show_lengths(console, data.train.lengths)
    show_samples(console, data, steps, epoch, samples)
    show_steps(console, steps, manifest["settings"]["max_length"])


def verify_all(store: str, manifest: dict[str, Any], console: "Console") -> None:
    verify_files(Path(store), manifest["splits"])
    n_files = sum(len(about["shards"]) for about in manifest["splits"].values())
    console.print(f"all {n_files} files agree with their checksums")


def show_manifest(console: "Console", store: str, manifest: dict[str, Any]) -> None:
    settings, counts = manifest["settings"], manifest["counts"]
    n_bytes = sum(shard["bytes"] for about in manifest["splits"].values() for shard in about["shards"])
    rows = {
        name: ", ".join(f"{about[what]:,} {what}" for what in ("rows", "tokens", "documents"))
        for name, about in manifest["splits"].items()
    }
    of_documents = ("documents", "kept", "empty", "too_short", "bad", "repeated_ids")
    rows["documents"] = ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in of_documents)
    rows["tokens"] = ", ".join(f"{n:,} {name[7:]}" for name, n in counts.items() if name.startswith("tokens_"))
    rows["size"] = f"{n_bytes / 1e6:,.1f} MB, {n_bytes / max(1, counts['tokens_kept']):.2f} bytes a token"
    rows["tokenizer"] = f"{settings['tokenizer']}, {manifest['tokenizer']['vocabulary']:,} ids"
    rows["sources"] = "\n".join(source["name"] for source in settings["sources"])
    shown = ("kind", "max_length", "min_length", "short_fraction", "language", "word_segmenter", "title_column", "seed")
    rows["settings"] = ", ".join(f"{name} {settings[name]}" for name in shown if settings[name] is not None)
    rows["bad"] = "\n".join(manifest["bad"]) or "none"
    show_table(console, store, rows)


def show_table(console: "Console", title: str, rows: dict[str, str]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    console.print(table)


def show_lengths(console: "Console", lengths: np.ndarray) -> None:
    """A histogram with a bar for each sixteenth of the longest."""
    width = -(-int(lengths.max()) // 16)
    counts = np.bincount((lengths.astype(np.int64) - 1) // width)
    console.print("\n[bold]lengths[/bold], in tokens without special ones")
    for place, count in enumerate(counts):
        console.print(
            f"{place * width + 1:5} to {(place + 1) * width:4} {'█' * round(40 * count / counts.max())} {count:,}"
        )


def show_samples(console: "Console", data: CondenserDataModule, steps: Steps, epoch: int, n: int) -> None:
    from rich.text import Text

    legend = Text("\nmasks: ").append("[hidden]", COLOURS["mask"]).append(" ")
    console.print(legend.append("[was→is]", COLOURS["random"]).append(" ").append("[left as it is=]", COLOURS["keep"]))
    numbers = np.linspace(0, len(data.train) - 1, max(0, n), dtype=np.int64)
    for number in numbers:
        text = Text().append(f"\nrow {number}: ", "bold")
        for piece, is_start, fate in masked_pieces(data, steps, epoch, int(number)):
            text.append(" " if is_start else "", "").append(piece, COLOURS.get(fate, ""))
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


def show_steps(console: "Console", steps: Steps, max_length: int) -> None:
    batches = steps.batches
    tokens, sequences, shares = about_steps(steps, max_length)
    rows = {
        "steps in an epoch": f"{batches.steps_per_epoch:,}",
        "tokens of a step": f"{tokens.sum(1).mean():,.0f}, from {tokens.sum(1).min():,} to {tokens.sum(1).max():,}",
        "tokens of a micro-batch": f"{tokens.mean():,.0f}, from {tokens.min():,} to {tokens.max():,}",
        "sequences of a micro-batch": f"{sequences.mean():,.0f}, from {sequences.min():,} to {sequences.max():,}",
    }
    rows |= {name: f"{share:.2%}" for name, share in shares.items()}
    title = f"\nsteps of batch_size {batches.batch_size}, {batches.micro_batches_per_step} micro-batches a step"
    show_table(console, title, rows)


def about_steps(steps: Steps, max_length: int) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Tokens and sequences of each micro-batch of the first steps ``[steps, micro-batches]``, and the padding that is
    not computed here: what it would be a share of."""
    batches, everything = steps.batches, []
    for step in range(min(STEPS_LOOKED_AT, batches.steps_per_epoch)):
        numbers = batches.step(step)
        everything.append([steps.mixture.lengths[steps.mixture.samples(0, some).rows] for some in numbers])
    sequences = np.array([[len(part) for part in parts] for parts in everything])
    tokens = np.array([[int(part.sum(dtype=np.int64)) + SPECIAL_TOKENS * len(part) for part in s] for s in everything])
    flat = [part + np.int64(SPECIAL_TOKENS) for parts in everything for part in parts]
    lengths = np.random.default_rng(0).permutation(np.concatenate(flat))
    size = max(1, batches.batch_size // batches.micro_batches_per_step)
    at_random = [lengths[first : first + size] for first in range(0, len(lengths), size)]
    padded = {
        "padding if rows were padded to the longest of their micro-batch": flat,
        "padding if these were drawn at random": at_random,
    }
    shares = {name: 1 - lengths.sum() / sum(len(p) * int(p.max()) for p in parts) for name, parts in padded.items()}
    shares[f"padding if rows were padded to {max_length}"] = 1 - lengths.sum() / (len(lengths) * max_length)
    return tokens, sequences, {name: float(share) for name, share in shares.items()}
