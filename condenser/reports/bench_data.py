"""`condenser bench data`: how fast text becomes batches, beside what others do.

What is compared runs in one process, in turn, round after round: machines are shared and noisy, ratios are not.
"""

import contextlib
import io
import random
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import torch

from condenser.corpus.documents import Document, documents
from condenser.corpus.readers import Columns, resolve, units
from condenser.corpus.work import available_cores
from condenser.data.batching import BucketedBatches
from condenser.data.collate import Masking, Vocabulary, collate
from condenser.data.store import SPECIAL_TOKENS, TokenStore, read_manifest, write_json
from condenser.data.synthetic import VOCABULARY, SyntheticStore
from condenser.reports.tables import Measured, show, timed


def bench_data(
    *,
    store: str | None = None,
    input: list[str] | None = None,
    tokenizer: str | None = None,
    batch_size: int = 1024,
    micro_batches_per_step: int = 8,
    rows: int = 100_000_000,
    rounds: int = 5,
    json: str | None = None,
) -> None:
    """Measure masking and collation, the order of batches, and the preparation of text.

    Shown are medians and ranges over the rounds, and ratios to what others do.

    Args:
        store: token store whose rows are collated; by default rows in memory with the lengths of real text.
        input: text whose preparation is measured, as for `condenser prepare`; needs --tokenizer.
        tokenizer: a folder or hub name, for --input.
        batch_size: sequences of an optimizer step.
        micro_batches_per_step: parts of a step.
        rows: how many there are in the synthetic store over which the order of batches is measured.
        rounds: repetitions of everything.
        json: a file for the figures.

    Raises:
        ValueError: no such store, or only one of --input and --tokenizer.
    """
    from rich.console import Console

    if bool(input) != bool(tokenizer):
        raise ValueError("give --input and --tokenizer together")
    console, found = Console(), {}
    found["collation"] = collation(store, batch_size, micro_batches_per_step, rounds)
    show(console, "Masking whole words and collating on one core, million tokens/s", found["collation"], compared=True)
    found["order"] = order_of_batches(rows, batch_size, micro_batches_per_step, rounds)
    show(console, f"The order of batches over {rows:,} rows", found["order"])
    if input and tokenizer:
        found["preparation"] = preparation(input, tokenizer, rounds)
        title = f"Preparing {', '.join(input)} on {available_cores()} cores, million tokens/s"
        show(console, title, found["preparation"], compared=True)
    if json:
        write_json(Path(json), found | {"versions": {"numpy": np.__version__, "torch": torch.__version__}})


def collation(folder: str | None, batch_size: int, micro_batches_per_step: int, rounds: int) -> Measured:
    """Million tokens a second of ours, and of the authors' algorithm."""
    from condenser.data.tokenizers import load_tokenizer

    if folder:
        read_manifest(folder)
        store: Any = TokenStore(folder, "train")
        tokenizer = load_tokenizer(Path(folder) / "tokenizer")
        vocabulary, pieces = Vocabulary.of(tokenizer), tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    else:
        store, vocabulary = SyntheticStore(100_000), VOCABULARY
        pieces = [f"{'' if number % 11 else '##'}{number}" for number in range(30522)]
    batches = BucketedBatches(
        store.lengths,
        batch_size=min(batch_size, len(store)),
        micro_batches_per_step=micro_batches_per_step,
        seed=0,
        added=SPECIAL_TOKENS,
    )
    parts = [part for step in range(min(8, batches.steps_per_epoch)) for part in batches.step(step)]
    few = parts[:: max(1, len(parts) // 4)]
    lists = []
    for part in few:
        rows = store.rows(part)
        lists.append([row.tolist() for row in np.split(rows.tokens, rows.lengths.cumsum()[:-1])])
    longest = int(store.lengths.max()) + SPECIAL_TOKENS
    measured: Measured = {"flat": [], "token by token, as the authors' collator": []}
    flat, reference = measured.values()
    torch.set_num_threads(1)
    for _ in range(rounds):
        with timed(flat, tokens_of(store, parts)):
            for part in parts:
                collate(store.rows(part), part, 0, vocabulary, Masking(0))
        with timed(reference, tokens_of(store, few)):
            for rows in lists:
                collate_token_by_token(rows, pieces, vocabulary, longest)
    return measured


def tokens_of(store: Any, parts: list[np.ndarray]) -> float:
    """Million tokens, special ones included."""
    return sum(int(store.lengths[part].sum(dtype=np.int64)) + SPECIAL_TOKENS * len(part) for part in parts) / 1e6


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


def order_of_batches(rows: int, batch_size: int, micro_batches_per_step: int, rounds: int) -> Measured:
    """Time and memory of finding a step's samples in a store of so many rows."""
    lengths = np.resize(SyntheticStore(min(rows, 1_000_000)).lengths, rows)
    sizes: dict[str, Any] = {"batch_size": batch_size, "micro_batches_per_step": micro_batches_per_step}
    sizes["added"] = SPECIAL_TOKENS
    measured: Measured = {"setting up, s": [], "any step, s": [], "the step after it, s": []}
    for number in range(rounds):
        with timed(measured["setting up, s"]):
            batches = BucketedBatches(lengths, **sizes, seed=number)
        step = 5 * batches.steps_per_epoch // 2  # in the middle of the third epoch
        for name, wanted in (("any step, s", step), ("the step after it, s", step + 1)):
            with timed(measured[name]):
                batches.step(wanted)
    tracemalloc.start()
    BucketedBatches(lengths, **sizes, seed=0).step(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return measured | {"lengths, bytes a row": [lengths.nbytes / rows], "all else at the peak, MB": [peak / 1e6]}


def preparation(input: list[str], tokenizer: str, rounds: int) -> Measured:
    """Million tokens a second of `condenser prepare`, and of nothing but tokenizing the same texts in memory."""
    from condenser.corpus.prepare import prepare
    from condenser.data.tokenizers import load_tokenizer

    columns = Columns("text", None, "id")
    found = (
        document
        for source in resolve(input)
        for unit in units(source, columns, 1 << 24)
        for document in documents(unit, source, columns)
    )
    everything = [document.text for document in found if isinstance(document, Document)]
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
