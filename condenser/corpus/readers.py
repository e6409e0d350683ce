"""What text is read from: JSON lines (plain, .gz, .xz, .zst), parquet, plain text, and Hugging Face datasets.

A source is read in units, whose bounds depend on the source alone. Reading only finds where records end, which is
quick; taking them apart (documents.py) is left to the process that works on the unit.
"""

import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from condenser.data.store import check_file_name
from condenser.online import ask_hub

DECOMPRESSED: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": lambda raw: io.BufferedReader(pa.CompressedInputStream(raw, "zstd")),  # which notices where one is cut off
}
COMPRESSED = tuple(DECOMPRESSED)
READERS = dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl")
READERS |= {".txt": "text", ".text": "text", ".parquet": "parquet"}
LONGEST_RECORD = 1 << 28  # bytes; a file where no record ends for so long is not what it was taken for


@dataclass(frozen=True)
class Source:
    """One input: a file, a dataset folder, or the name of a dataset on the hub (``NAME`` or ``NAME:CONFIGURATION``)."""

    name: str
    kind: str  # jsonl, text, parquet, folder, hub
    text_column: str = "text"  # where the parts of a document are in a record; plain text has only this
    title_column: str | None = None
    id_column: str = "id"
    split: str = "train"  # of a dataset
    found: bool = False  # in a folder or by a pattern, not named itself
    number: int = 0  # among all sources of the store

    @property
    def is_dataset(self) -> bool:
        return self.kind in ("folder", "hub")

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Enough to tell another input: name, size, and a hash of both ends of a file; of a dataset its split, and a
        hash of what its folder says of its files."""
        digest = hashlib.blake2b(digest_size=8)
        if self.is_dataset:
            files = Path(self.name).rglob("[!.]*") if self.kind == "folder" else ()
            for path in sorted(file for file in files if not file.match("cache-*")):  # which `datasets` leaves there
                about = path.read_bytes() if path.suffix == ".json" else b""
                size = 4096 if path.is_dir() else path.stat().st_size  # of a folder each file system has its own
                digest.update(f"{path.relative_to(self.name)} {size}".encode() + about)
            name = Path(self.name).resolve().name if self.kind == "folder" else self.name
            return {"name": name, "split": self.split, "hash": digest.hexdigest()}
        with open(self.name, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, self.size() - (1 << 20)))
            digest.update(file.read())
        return {"name": Path(self.name).name, "bytes": self.size(), "hash": digest.hexdigest()}

    def size(self) -> int:
        """Bytes on disk, 0 for a dataset."""
        return 0 if self.is_dataset else os.path.getsize(self.name)


Payload = bytes | list[dict[str, Any]]  # lines that hold whole records, or the records of a table


class Unit(NamedTuple):
    """A part of a source."""

    source: Source
    number: int  # in its source, from 0
    first: int  # the line in the source that it begins with, or the row of a table, from 1
    payload: Payload
    position: int  # how far the source was read, in bytes on disk

    @property
    def name(self) -> str:
        return f"{self.source.number:05d}-{self.number:05d}"


def place(name: str) -> tuple[int, ...]:
    """The numbers in the name of a unit or of a file of it, to order them by: as a text, 100000 comes before 99999."""
    return tuple(map(int, re.findall(r"\d+", name)))


def units(source: Source, size: int) -> Iterator[Unit]:
    """A source's units of about ``size`` bytes (or characters of a table's text), in order. Raises ValueError for what
    cannot be read to its end, a missing column, or a file where no record ends."""
    parts = parts_of_file(source, size) if source.kind in ("jsonl", "text") else parts_of_table(source, size)
    first = 1
    for number, (payload, position) in enumerate(parts):
        yield Unit(source, number, first, payload, position)
        first += payload.count(b"\n") if isinstance(payload, bytes) else len(payload)


def parts_of_file(source: Source, size: int) -> Iterator[tuple[Payload, int]]:
    """At least ``size`` bytes at a time, and the position after them; they end where a line ends, in plain text where a
    document does."""
    with opened(source.name) as (file, raw):
        while payload := file.read(size):
            rest = bytearray(file.readline(LONGEST_RECORD))
            while source.kind == "text" and len(rest) < LONGEST_RECORD and (line := file.readline(LONGEST_RECORD)):
                rest += line
                if not line.strip():
                    break
            if len(rest) >= LONGEST_RECORD:
                raise ValueError(
                    f"{source.name} holds a document of more than {LONGEST_RECORD >> 20} MB: a new line ends one in "
                    "JSON lines, a blank line in plain text"
                )
            yield payload + rest, raw.tell()


def parts_of_table(source: Source, size: int) -> Iterator[tuple[Payload, int]]:
    """Records of at least ``size`` characters of text at a time, and the position after them."""

    def characters(found: tuple[dict[str, Any], int]) -> int:
        text = found[0][source.text_column]
        return len(text) if isinstance(text, str | bytes) else 0

    for group in groups(table_records(source), size, characters):
        records, positions = zip(*group, strict=True)
        yield list(records), positions[-1]


def groups(items: Iterator[Any], size: int, size_of: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Items in order, as many at a time as make up ``size``."""
    group, filled = [], 0
    for item in items:
        group.append(item)
        filled += size_of(item)
        if filled >= size:
            yield group
            group, filled = [], 0
    if group:
        yield group


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file to read, decompressed by its suffix, and as it is on disk. ValueError if it cannot be read to its end."""
    with open(path, "rb") as raw:
        decompressed = DECOMPRESSED.get(suffix_of(path))
        try:
            yield decompressed(raw) if decompressed else raw, raw
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{path} cannot be decompressed to its end: {error}") from None


def suffix_of(path: str | Path) -> str:
    return Path(path).suffix.lower()


def table_records(source: Source) -> Iterator[tuple[dict[str, Any], int]]:
    """The columns that are needed of each record, and how far the source was read in bytes."""
    try:
        if source.kind == "parquet":
            yield from parquet_records(source)
            return
        for dataset in saved_splits(source) if source.kind == "folder" else [hub_dataset(source)]:
            dataset = dataset.with_format(None)  # which it may have been saved with
            needed = needed_columns(source, list(dataset.features or next(iter(dataset), ())))
            for record in dataset.select_columns(needed):
                yield record, 0
    except (pa.ArrowException, OSError, OverflowError, UnicodeError) as error:
        raise ValueError(f"{source.name} cannot be read to its end: {error}") from None


def saved_splits(source: Source) -> list[Any]:
    import datasets

    folder = Path(source.name)
    check_dataset(folder)
    splits, of_dict = {"train": folder}, folder / "dataset_dict.json"
    if of_dict.is_file():
        splits = {name: folder / name for name in json.loads(of_dict.read_text(encoding="utf-8"))["splits"]}
    wanted = source.split.split("+")
    if missing := [split for split in wanted if split not in splits]:
        raise ValueError(
            f"{source.name} has no split {missing[0]!r} but {', '.join(map(repr, splits))}: name one with --split, or "
            "several (a+b)"
        )
    if twice := [split for split in wanted if wanted.count(split) > 1]:
        raise ValueError(f"--split {source.split} names {twice[0]!r} twice")
    try:
        return [datasets.load_from_disk(str(splits[split])) for split in wanted]
    except Exception as error:  # the library raises many kinds
        raise ValueError(f"{source.name} is no saved dataset, is empty or damaged: {error}") from error


def hub_dataset(source: Source) -> Any:
    ask_hub()
    import datasets

    name, _, configuration = source.name.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=source.split, streaming=True)
    except Exception as error:  # the library raises many kinds, network errors among them
        raise ValueError(f"{source.name} is neither a file nor a dataset that could be loaded: {error}") from error


def check_dataset(folder: Path) -> None:
    """Raises ValueError where a saved dataset has files outside of its folder."""
    for path in (*folder.glob("dataset_dict.json"), *folder.glob("**/state.json")):
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            names = [*about.get("splits", ()), *(file["filename"] for file in about.get("_data_files", ()))]
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged, or not of the saved dataset: {error}") from None
        for name in names:
            check_file_name(name, path)


def parquet_records(source: Source) -> Iterator[tuple[dict[str, Any], int]]:
    import pyarrow.parquet as pq

    with open(source.name, "rb") as file:
        table = pq.ParquetFile(file)
        needed = needed_columns(source, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=256, columns=needed):
            as_bytes = batch.cast(pa.schema([(each.name, bytes_type(each.type)) for each in batch.schema]))
            for record in as_bytes.to_pylist():
                yield record, file.tell()


def bytes_type(kind: pa.DataType) -> pa.DataType:
    """Bytes for texts, however they are stored, so that one that is not UTF-8 spoils its own record only."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.large_binary() if kind in (pa.string(), pa.large_string(), pa.string_view()) else kind


def needed_columns(source: Source, existing: list[str]) -> list[str]:
    text, title = source.text_column, source.title_column
    for column, option in ((text, "--text-column"), (title, "--title-column")):
        if column is not None and column not in existing:
            raise ValueError(f"{source.name}: {missing_column(column, option, existing)}")
    needed = [column for column in dict.fromkeys((text, title, source.id_column)) if column in existing]
    if twice := [column for column in needed if existing.count(column) > 1]:
        raise ValueError(f"{source.name} has several columns {twice[0]!r}: rename all but one")
    return needed


def missing_column(column: str, option: str, existing: list[str]) -> str:
    return f"no column {column!r}; there are {', '.join(map(repr, existing))}: name one with {option}"
