"""Documents out of files: JSON lines (plain, .gz, .xz, .zst), parquet, plain text, and Hugging Face datasets.

A reader yields one string a document. What it cannot read is a ValueError that names the file and the line, or, where
bad lines are skipped, a count.
"""

import glob
import gzip
import hashlib
import io
import json
import lzma
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

COMPRESSED = (".gz", ".xz", ".zst")
READERS = {".jsonl": "jsonl", ".json": "jsonl", ".txt": "text", ".text": "text", ".parquet": "parquet"}
Wrap = Callable[[BinaryIO, int, str], BinaryIO]  # (file, bytes, name) -> the file behind a progress bar


@dataclass(frozen=True)
class Source:
    """One input: a file, a dataset folder, or the name of a dataset on the hub (``NAME`` or ``NAME:CONFIGURATION``)."""

    name: str
    kind: str  # jsonl, text, parquet, folder, hub

    def fingerprint(self) -> dict[str, Any]:
        """Enough to tell another input: name, size, and a hash of both ends of a file."""
        if self.kind in ("folder", "hub"):
            return {"name": self.name}
        size = os.path.getsize(self.name)
        digest = hashlib.blake2b(digest_size=8)
        with open(self.name, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
        return {"name": Path(self.name).name, "bytes": size, "hash": digest.hexdigest()}


def resolve(inputs: list[str]) -> list[Source]:
    """Files, glob patterns, folders of files, dataset folders and hub names -> sources, in a fixed order.

    Raises:
        ValueError: a path that is not there, an empty file, or a format that is not known.
    """
    sources = []
    for name in inputs:
        paths = sorted(glob.glob(name)) if glob.has_magic(name) else [name] if os.path.exists(name) else []
        if not paths:
            sources.append(hub_source(name))
        for path in paths:
            sources += folder_sources(path) if os.path.isdir(path) else [file_source(path)]
    return sources


def file_source(path: str) -> Source:
    stem = path[: -len(Path(path).suffix)] if path.endswith(COMPRESSED) else path
    kind = READERS.get(Path(stem).suffix.lower())
    if kind is None:
        raise ValueError(
            f"{path}: not a format that is read here: {', '.join(READERS)}, or {', '.join(COMPRESSED)} of it"
        )
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path} is empty")
    return Source(path, kind)


def folder_sources(folder: str) -> list[Source]:
    if any(os.path.exists(os.path.join(folder, name)) for name in ("dataset_info.json", "dataset_dict.json")):
        return [Source(folder, "folder")]
    readable = [
        str(path) for path in sorted(Path(folder).iterdir()) if READERS.keys() & set(path.suffixes) and path.is_file()
    ]
    if not readable:
        raise ValueError(f"{folder} is neither a dataset folder nor one with {', '.join(READERS)} files")
    return [file_source(path) for path in readable]


def hub_source(name: str) -> Source:
    if glob.has_magic(name) or is_path(name) or Path(name).suffix.lower() in (*READERS, *COMPRESSED):
        raise ValueError(f"no such file: {name}")
    return Source(name, "hub")


def is_path(name: str) -> bool:
    """Whether a name that a folder or the hub may answer to is meant as a path: ``NAME`` and ``OWNER/NAME`` are not,
    unless a folder OWNER is here."""
    parent = Path(name).parent
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (parent != Path() and parent.is_dir())


def documents(
    sources: list[Source], text_column: str, skip_bad_lines: bool, counts: Counter, wrap: Wrap
) -> Iterator[str]:
    """All documents of all sources in order; ``counts["bad"]`` grows by the lines that were skipped.

    Raises:
        ValueError: an unreadable line (unless skipped), a missing text column, or a source without any document.
    """
    for source in sources:
        n = -1
        for n, text in enumerate(read(source, text_column, skip_bad_lines, counts, wrap)):  # noqa: B007
            yield text
        if n < 0:
            raise ValueError(f"{source.name} holds no documents")


def read(source: Source, text_column: str, skip_bad_lines: bool, counts: Counter, wrap: Wrap) -> Iterator[str]:
    if source.kind == "jsonl":
        yield from read_jsonl(source.name, text_column, skip_bad_lines, counts, wrap)
    elif source.kind == "text":
        yield from read_text(source.name, wrap)
    elif source.kind == "parquet":
        yield from read_parquet(source.name, text_column, wrap)
    else:
        yield from read_dataset(source, text_column)


def open_lines(path: str, wrap: Wrap) -> Any:
    """A file opened for reading lines, decompressed by its suffix; ``wrap`` sees the bytes as they are on disk."""
    raw = wrap(open(path, "rb"), os.path.getsize(path), Path(path).name)  # noqa: SIM115, the caller closes it
    if path.endswith(".gz"):
        return gzip.open(raw)
    if path.endswith(".xz"):
        return lzma.open(raw)
    if path.endswith(".zst"):
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))
    return raw


def read_jsonl(path: str, text_column: str, skip_bad_lines: bool, counts: Counter, wrap: Wrap) -> Iterator[str]:
    with open_lines(path, wrap) as file:
        for number, line in enumerate(lines_of(file, path), start=1):
            if not line.strip():
                continue
            try:
                yield text_of_json(line, text_column)
            except ValueError as error:
                if not skip_bad_lines:
                    raise ValueError(f"{path}, line {number}: {error} (--skip-bad-lines goes on)") from None
                counts["bad"] += 1


def lines_of(file: BinaryIO, path: str) -> Iterator[bytes]:
    try:
        yield from file
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be decompressed to its end: {error}") from None


def text_of_json(line: bytes, text_column: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object was expected, not {type(record).__name__}")
    if text_column not in record:
        raise ValueError(missing_column(text_column, list(record)))
    if not isinstance(record[text_column], str):
        raise ValueError(f"{text_column!r} is not a text but {type(record[text_column]).__name__}")
    return record[text_column]


def missing_column(text_column: str, existing: list[str]) -> str:
    return f"no column {text_column!r}; there are {', '.join(map(repr, existing))}: name one with --text-column"


def read_text(path: str, wrap: Wrap) -> Iterator[str]:
    """Plain text: a blank line ends a document."""
    document: list[str] = []
    with open_lines(path, wrap) as file:
        for number, line in enumerate(lines_of(file, path), start=1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8: {error.reason}") from None
            if text.strip():
                document.append(text)
            elif document:
                yield "".join(document).rstrip()
                document = []
    if document:
        yield "".join(document).rstrip()


def read_parquet(path: str, text_column: str, wrap: Wrap) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with wrap(open(path, "rb"), os.path.getsize(path), Path(path).name) as file:
        try:
            table = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a parquet file: {error}") from None
        if text_column not in table.schema_arrow.names:
            raise ValueError(f"{path}: {missing_column(text_column, table.schema_arrow.names)}")
        for batch in table.iter_batches(batch_size=1024, columns=[text_column]):
            yield from (text or "" for text in batch.column(0).to_pylist())


def read_dataset(source: Source, text_column: str) -> Iterator[str]:
    """A dataset saved to a folder, or streamed from the hub: its training split."""
    import datasets

    if source.kind == "folder":
        dataset: Any = datasets.load_from_disk(source.name)
        dataset = dataset["train"] if isinstance(dataset, datasets.DatasetDict) else dataset
    else:
        name, _, configuration = source.name.partition(":")
        try:
            dataset = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        except Exception as error:  # the library raises many kinds, network errors among them
            raise ValueError(f"{source.name} is neither a file nor a dataset that could be loaded: {error}") from error
    columns = list(dataset.features or next(iter(dataset)))
    if text_column not in columns:
        raise ValueError(f"{source.name}: {missing_column(text_column, columns)}")
    for row in dataset.select_columns([text_column]):
        yield row[text_column] or ""
