"""`condenser bench data`: how fast text becomes batches, beside what others do.

What is compared runs in one process, in turn, round after round: machines are shared and noisy, ratios are not.
"""

import contextlib
import io
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from condenser.corpus.documents import documents
from condenser.corpus.readers import resolve, units
from condenser.corpus.work import available_cores
from condenser.data.batching import BucketedBatches
from condenser.data.collate import Masking, Vocabulary
from condenser.data.datamodule import Steps
from condenser.data.mixing import Mixture
from condenser.data.store import SPECIAL_TOKENS, read_manifest, write_json
from condenser.reports.bench import open_store

Measured = dict[str, list[float]]  # million tokens a second in each round, by what was measured


def bench_data(
    *,
    store: str | None = None,
    input: list[str] | None = None,
    tokenizer: str | None = None,
    batch_size: int = 1024,
    micro_batches_per_step: int = 8,
    rounds: int = 5,
    json: str | None = None,
) -> None:
    """Measure the making of steps, and the preparation of text.

    Shown are medians and ranges over the rounds, and ratios to what others do.

    Args:
        store: token store whose rows make up the steps; by default rows in memory with the lengths of real text.
        input: text whose preparation is measured, as for `condenser prepare`; needs --tokenizer.
        tokenizer: a folder or hub name, for --input.
        batch_size: sequences of an optimizer step.
        micro_batches_per_step: parts of a step.
        rounds: repetitions of everything.
        json: a file for the figures.

    Raises:
        ValueError: no such store, or only one of --input and --tokenizer.
    """
    from rich.console import Console

    if bool(input) != bool(tokenizer):
        raise ValueError("give --input and --tokenizer together")
    console, found = Console(), {"steps": steps(store, batch_size, micro_batches_per_step, rounds)}
    show(console, "Steps on one core: order, reading, whole-word masks, collation; million tokens/s", found["steps"])
    if input and tokenizer:
        found["preparation"] = preparation(input, tokenizer, rounds)
        title = f"Preparing {', '.join(input)} on {available_cores()} cores, million tokens/s"
        show(console, title, found["preparation"])
    if json:
        write_json(Path(json), found | {"versions": {"numpy": np.__version__, "torch": torch.__version__}})


def show(console: Any, title: str, measured: Measured) -> None:
    """A table; ways to do one thing are compared with the last of them."""
    from rich.table import Table

    table = Table("", "median", "range", "ratio", title=title, title_justify="left")
    reference = list(measured.values())[-1]
    for name, figures in measured.items():
        ratio = median(a / b for a, b in zip(figures, reference, strict=True))
        spread = f"{min(figures):.3g} to {max(figures):.3g}"
        table.add_row(name, f"{median(figures):.3g}", spread, f"{ratio:.2f}")
    console.print(table)


@contextlib.contextmanager
def timed(figures: list[float], amount: float) -> Iterator[None]:
    """Adds the ``amount`` per second that the block took."""
    start = time.perf_counter()
    yield
    figures.append(amount / (time.perf_counter() - start))


def steps(folder: str | None, batch_size: int, micro_batches_per_step: int, rounds: int) -> Measured:
    """What a worker of the loader does, and collation by the authors' algorithm."""
    samples, vocabulary, n_tokens = open_store(folder, 128, 64 * batch_size)
    mixture = Mixture([samples], seed=0)
    sizes = {"batch_size": min(batch_size, len(samples)), "micro_batches_per_step": micro_batches_per_step}
    batches = BucketedBatches(samples.lengths, **sizes, seed=0, added=SPECIAL_TOKENS, mixture=mixture)
    made = Steps(mixture, batches, vocabulary, Masking(0))
    some = range(min(8, batches.steps_per_epoch))
    pieces = [f"{'' if number % 11 else '##'}{number}" for number in range(n_tokens)]
    rows = samples.rows(batches.step(0)[0])
    ids = [row.tolist() for row in np.split(rows.tokens, rows.lengths.cumsum()[:-1])]
    longest = int(samples.lengths.max()) + SPECIAL_TOKENS
    measured: Measured = {"ours": [], "collation token by token, as the authors'": []}
    ours, theirs = measured.values()
    torch.set_num_threads(1)
    for number in range(rounds):
        n = sum(made[step].total("n_tokens") for step in some) / 1e6
        with timed(ours, n):
            for step in some:
                made[step + (number + 1) * batches.steps_per_epoch]  # of another epoch, whose order is not known yet
        with timed(theirs, (len(rows.tokens) + SPECIAL_TOKENS * len(ids)) / 1e6):
            collate_token_by_token(ids, pieces, vocabulary, longest)
    return measured


def collate_token_by_token(rows: list[list[int]], pieces: list[str], vocabulary: Vocabulary, length: int) -> tuple:
    """What the published Condenser collator does, without its calls of the tokenizer: whole words by the prefix ##, one
    sample and one token at a time, every row padded to ``length``; the fate of masked tokens is drawn for the batch."""
    batch, flags = [], []
    for ids in rows:
        words: list[list[int]] = []
        for position, token in enumerate([pieces[number] for number in ids]):
            if words and token.startswith("##"):
                words[-1].append(position)
            else:
                words.append([position])
        random.shuffle(words)
        budget, chosen = max(1, round(0.15 * len(ids))), set[int]()
        for word in words:
            if len(chosen) >= budget:
                break
            if len(chosen) + len(word) <= budget:
                chosen.update(word)
        flag = [0, *(int(position in chosen) for position in range(len(ids))), 0]
        batch.append([vocabulary.cls_id, *ids, vocabulary.sep_id] + [vocabulary.pad_id] * (length - len(flag)))
        flags.append(flag + [0] * (length - len(flag)))
    inputs, masked = torch.tensor(batch), torch.tensor(flags).bool()
    labels = torch.where(masked, inputs, -100)
    replaced = torch.bernoulli(torch.full(labels.shape, 0.8)).bool() & masked
    inputs[replaced] = vocabulary.mask_id
    randomised = torch.bernoulli(torch.full(labels.shape, 0.5)).bool() & masked & ~replaced
    inputs[randomised] = torch.randint(len(pieces), labels.shape)[randomised]
    return inputs, (inputs != vocabulary.pad_id).long(), labels


def preparation(input: list[str], tokenizer: str, rounds: int) -> Measured:
    """Million tokens a second of `condenser prepare`, and of nothing but tokenizing the same texts in memory."""
    from condenser.corpus.prepare import prepare
    from condenser.data.tokenizers import load_tokenizer

    found = (documents(unit, skip_bad_lines=True) for source in resolve(input) for unit in units(source, 1 << 24))
    everything = [document.text for good, _ in found for document in good]
    backend = load_tokenizer(tokenizer).backend_tokenizer
    measured: Measured = {"condenser prepare": [], "the tokenizer's batch call alone": []}
    ours, alone = measured.values()
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            started = time.perf_counter()
            prepare(input=input, tokenizer=tokenizer, output=f"{folder}/store")
            seconds = time.perf_counter() - started
            n_tokens = read_manifest(f"{folder}/store")["counts"]["tokens_kept"] / 1e6
        ours.append(n_tokens / seconds)
        with timed(alone, n_tokens):
            for first in range(0, len(everything), 256):
                backend.encode_batch(everything[first : first + 256], add_special_tokens=False)
    return measured
