"""`condenser bench data`: how fast text becomes batches, beside what others do.

What is compared runs in one process, in turn, round after round: machines are shared and noisy, ratios are not.
"""

import contextlib
import io
import random
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from condenser.corpus.inputs import resolve, texts_of
from condenser.corpus.prepare import prepare
from condenser.corpus.work import available_cores
from condenser.data.collate import Vocabulary
from condenser.data.store import SPECIAL_TOKENS, read_manifest
from condenser.data.tokenizers import load_tokenizer
from condenser.reports.rows import open_rows, steps_over
from condenser.reports.tables import check_figures, table, write_figures
from condenser.runs import at_least

Measured = dict[str, list[float]]  # million tokens a second in each round, by what was measured


def bench_data(
    *,
    store: str | None = None,
    input: list[str] | None = None,
    tokenizer: str | None = None,
    batch_size: int = 1024,
    rounds: int = 5,
    json: str | None = None,
) -> None:
    """Measure the making of steps, and the preparation of text.

    Shown are medians and ranges over the rounds, and ratios to what others do.

    Args:
        store: token store whose rows make up the steps; by default rows in memory with the lengths of real text.
        input: text whose preparation is measured, as for `condenser prepare`; needs --tokenizer.
        tokenizer: a folder or hub name, for --input.
        batch_size: sequences of an optimizer step, in 8 micro-batches.
        rounds: repetitions of everything.
        json: a file for the figures.

    Raises:
        ValueError: no such store, or only one of --input and --tokenizer.
    """
    if bool(input) != bool(tokenizer):
        raise ValueError("give --input and --tokenizer together")
    at_least("rounds", rounds, 1)
    at_least("batch-size", batch_size, 8)  # micro-batches
    check_figures(json)
    if input:
        resolve(input)
    console, found = Console(), {"steps": steps(store, batch_size, rounds)}
    title = "Steps on one core: order, reading, whole-word masks, collation; million tokens/s"
    console.print(compared(title, found["steps"]))
    if input and tokenizer:
        found["preparation"] = preparation(input, tokenizer, rounds)
        title = f"Preparing {', '.join(input)} on {available_cores()} cores, million tokens/s"
        console.print(compared(title, found["preparation"]))
    write_figures(json, found | {"versions": {"numpy": np.__version__, "torch": torch.__version__}})


def compared(title: str, measured: Measured) -> Table:
    """Ways to do one thing, compared with the last of them."""
    reference, rows = list(measured.values())[-1], []
    for name, figures in measured.items():
        ratio = median(ours / theirs for ours, theirs in zip(figures, reference, strict=True))
        spread = f"{min(figures):.3g} to {max(figures):.3g}"
        rows.append((name, f"{median(figures):.3g}", spread, f"{ratio:.2f}"))
    return table(("", "median", "range", "ratio"), rows, title)


def timed(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, float]:
    """What a function gives, and the seconds that it took."""
    start = time.perf_counter()
    return function(*args, **options), time.perf_counter() - start


def steps(folder: str | None, batch_size: int, rounds: int) -> Measured:
    """What a worker of the loader does, and collation by the authors' algorithm."""
    store, vocabulary, n_tokens = open_rows(folder, 128, 64 * batch_size)
    made = steps_over(store, min(batch_size, len(store)), 8, vocabulary)
    per_epoch = made.batches.steps_per_epoch
    rows = store.rows(made.batches.step(0)[0])
    ids = [row.tolist() for row in np.split(rows.tokens, rows.lengths.cumsum()[:-1])]
    pieces = [f"{'' if number % 11 else '##'}{number}" for number in range(n_tokens)]
    longest = int(store.lengths.max()) + SPECIAL_TOKENS
    ours, theirs = list[float](), list[float]()
    torch.set_num_threads(1)
    for epoch in range(rounds):
        some = range(epoch * per_epoch, epoch * per_epoch + min(8, per_epoch))
        batches, seconds = timed(lambda some=some: [made[step] for step in some])
        ours.append(sum(batch.total("n_tokens") for batch in batches) / seconds / 1e6)
        _, seconds = timed(collate_token_by_token, ids, pieces, vocabulary, longest)
        theirs.append((len(rows.tokens) + SPECIAL_TOKENS * len(ids)) / seconds / 1e6)
    return {"ours": ours, "collation token by token, as the authors'": theirs}


def collate_token_by_token(rows: list[list[int]], pieces: list[str], vocabulary: Vocabulary, length: int) -> tuple:
    """What the published Condenser collator does, without its calls of the tokenizer: whole words by the prefix ##, one
    sample and one token at a time, every row padded to ``length``; the fate of masked tokens is drawn for the batch."""
    batch, flags = [], []
    for ids in rows:
        chosen = choose([pieces[number] for number in ids])
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


def choose(tokens: list[str]) -> set[int]:
    """Positions to mask: of whole words in random order, while they fit into 15 %."""
    words: list[list[int]] = []
    for position, token in enumerate(tokens):
        if not (words and token.startswith("##")):
            words.append([])
        words[-1].append(position)
    random.shuffle(words)
    budget, chosen = max(1, round(0.15 * len(tokens))), set[int]()
    for word in words:
        if len(chosen) >= budget:
            break
        if len(chosen) + len(word) <= budget:
            chosen.update(word)
    return chosen


def preparation(input: list[str], tokenizer: str, rounds: int) -> Measured:
    """Million tokens a second of `condenser prepare`, and of nothing but tokenizing the same texts in memory."""
    texts, backend = [*texts_of(input)], load_tokenizer(tokenizer).backend_tokenizer
    pieces = [texts[first : first + 256] for first in range(0, len(texts), 256)]
    ours, alone = list[float](), list[float]()
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            _, seconds = timed(prepare, input=input, tokenizer=tokenizer, output=f"{folder}/store")
            n_tokens = read_manifest(f"{folder}/store")["counts"]["tokens_kept"]
        ours.append(n_tokens / seconds / 1e6)
        _, seconds = timed(lambda: [backend.encode_batch(piece, add_special_tokens=False) for piece in pieces])
        alone.append(n_tokens / seconds / 1e6)
    return {"condenser prepare": ours, "the tokenizer's batch call alone": alone}
