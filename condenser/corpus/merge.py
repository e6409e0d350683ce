"""`condenser prepare merge`: the shares of the work, put together to a finished store; the end of every preparation."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from condenser.corpus.readers import place
from condenser.corpus.repeats import ID, TEXT, repeated
from condenser.corpus.shards import dataset_files
from condenser.corpus.work import BAD_NAMED, UNFINISHED, at_work, keys_path, read_outcome
from condenser.data.store import (
    MANIFEST,
    SPLITS,
    Shard,
    check_file_name,
    in_words,
    leftovers,
    read_json,
    read_manifest,
    save_array,
    tokenizer_hash,
    verify,
    write_json,
)
from condenser.data.tokenizers import load_tokenizer, vocabulary_size


class UselessError(ValueError):
    """What was made of the input is nothing to go on from."""


def merge(store: str, /) -> None:
    """Put the shares of a store together.

    Run it once `condenser prepare ... --shard I/N` has ended for every I from 0 to N - 1, on any machines that share
    the folder. It verifies that every share is there and every file whole, then writes the manifest: the store is byte
    for byte the one that a single machine makes.

    Args:
        store: the folder that `condenser prepare --shard I/N` wrote to.

    Raises:
        ValueError: a share that is not finished, or a damaged file.
    """
    folder = Path(store)
    if not (folder / UNFINISHED).is_file():
        raise ValueError(f"{store} is no store in the making: there is nothing to merge")
    with at_work(folder):
        put_together(folder)


def put_together(folder: Path) -> None:
    """What is left to do when all shares are done, see `merge`."""
    state = read_json(folder / UNFINISHED, "settings", "first_source")
    first = state["first_source"]
    added = [name for name in shared_units(folder) if place(name) >= (first,)]
    names = sorted([*earlier_units(folder, first), *added], key=place)
    outcomes = [read_outcome(folder, name) for name in names]
    tokenizer = load_tokenizer(folder / "tokenizer")
    splits = {split: totals([outcome[split] for outcome in outcomes]) for split in SPLITS}
    counts = {name: sum(outcome["counts"][name] for outcome in outcomes) for name in outcomes[0]["counts"]}
    bad = [bad for outcome in outcomes for bad in outcome["bad"]][:BAD_NAMED]
    if not any(about["rows"] for about in splits.values()):
        reasons = in_words(counts, "bad", "empty", "too_short", "dropped_repeats")
        raise UselessError(f"nothing is left of {counts['documents']} documents: {reasons}. {' '.join(bad[:1])}")
    verify(folder, splits)
    n_ids = vocabulary_size(tokenizer)
    by_split = {split: token_counts(folder / split, about["shards"], n_ids) for split, about in splits.items()}
    save_array(folder / "token_counts.npy", by_split["train"])
    counts["kept"] = sum(about["documents"] for about in splits.values())
    keys = [keys_path(folder, name) for name in names]
    counts["repeated_ids"], counts["repeated_texts"] = repeated(keys, ID), repeated(keys, TEXT)
    unknown = [tokenizer.unk_token_id] if tokenizer.unk_token else []
    counts["tokens_unknown"] = int(sum(of_split[unknown].sum() for of_split in by_split.values()))
    for split, about in splits.items():
        dataset_files(folder / split, about["shards"])
    manifest = {
        "settings": state["settings"],
        "tokenizer": {"hash": tokenizer_hash(tokenizer), "vocabulary": n_ids},
        "counts": counts,
        "bad": bad,
        "units": names,
        "splits": splits,
    }
    write_json(folder / MANIFEST, manifest)
    remove_leftovers(folder)
    print(summary(folder, manifest))


def remove_leftovers(folder: Path) -> None:
    """What a store needed while it was in the making, and what those who were killed have left."""
    needed = [*folder.glob("units/share-*.json"), *folder.glob("units/*.repeats.npy")]
    remove([*needed, *partial_files(folder), folder / UNFINISHED])


def remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def partial_files(folder: Path) -> list[Path]:
    """The temporary files and folders that the making of a store has left in it, and no others."""
    of_splits = (f"{split}/*" for split in SPLITS)
    return leftovers(folder, "tokenizer", UNFINISHED, MANIFEST, "token_counts.npy", "units/*", *of_splits)


def earlier_units(folder: Path, first_source: int) -> list[str]:
    """Of the sources before this one, in a store that was finished then."""
    units = read_manifest(folder)["units"] if first_source else []
    return [name for name in units if place(name) < (first_source,)]


def shared_units(folder: Path) -> list[str]:
    """The units of all shares. Raises ValueError if any is missing, or is outside of the folder."""
    shares: dict[int, dict[int, list[str]]] = {}
    for path in folder.glob("units/share-*-of-*.json"):
        _, index, _, count = path.stem.split("-")
        shares.setdefault(int(count), {})[int(index)] = read_json(path)
    for n, done in shares.items():
        if len(done) == n:
            names = [name for names in done.values() for name in names]
            for name in names:
                check_file_name(name, folder / "units")
            return names
    missing = ", ".join(f"{index}/{n}" for n, done in shares.items() for index in range(n) if index not in done)
    raise ValueError(f"{folder} is unfinished: first run `condenser prepare` with --shard {missing or 'I/N'}")


def totals(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A split, of what each unit gave to it."""
    shards = [shard for part in parts for shard in part["shards"]]
    n_documents = sum(part["documents"] for part in parts)
    rows, tokens = (sum(shard[what] for shard in shards) for what in ("rows", "tokens"))
    return {"documents": n_documents, "rows": rows, "tokens": tokens, "shards": shards}


def token_counts(folder: Path, shards: list[dict[str, Any]], n_ids: int) -> np.ndarray:
    """How often each id occurs in a split."""
    counts = np.zeros(n_ids, np.int64)
    for shard in shards:
        counts += np.bincount(Shard(folder / shard["file"], shard["bytes"]).tokens, minlength=n_ids)
    return counts


def summary(store: Path, manifest: dict[str, Any]) -> str:
    counts, splits = manifest["counts"], manifest["splits"]
    lines = [f"{store}: for {split} {in_words(about, 'rows', 'tokens')}" for split, about in splits.items()]
    of_documents = "documents", "kept", "empty", "too_short", "bad", "dropped_repeats"
    lines.append(in_words(counts, *of_documents, "repeated_ids", "repeated_texts"))
    lines.append(in_words(counts, "tokens_kept", "tokens_dropped", "tokens_unknown", "special_tokens_as_text"))
    lines += [f"bad: {bad}" for bad in manifest["bad"][:3]]
    if not splits["validation"]["rows"]:
        advice = "raise --validation-fraction" if counts["kept"] > 1 else "give more than one document"
        lines.append(f"no document is in the validation split: {advice} to validate during training")
    return "\n".join(lines)
