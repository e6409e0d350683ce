"""Token stores: what `condenser prepare` writes and training reads, without copying it into memory.

    manifest.json      written last: source, tokenizer hash, settings, counts; a store without it is unfinished
    tokenizer/         for AutoTokenizer.from_pretrained
    token_counts.npy   how often each id occurs in the training split (the unigram baseline)
    train/ validation/ a `datasets` Arrow folder each: input_ids (no special tokens), word_starts (bits), length

Legend: B samples, L longest length among them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

MANIFEST = "manifest.json"
SPLITS = ("train", "validation")


class TokenStore:
    """One split of a store, memory-mapped. Rows are numbered over all shards in order: the sample ids.

    Raises:
        ValueError: no such store, or one without a manifest.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder)
        tables = [
            pa.ipc.open_stream(pa.memory_map(str(self.folder / split / shard["file"]))).read_all()
            for shard in self.manifest["splits"][split]["shards"]
        ]
        self.shards = [Shard(table) for table in tables]
        lengths = [table["length"].to_numpy() for table in tables]
        self.lengths = np.concatenate([np.empty(0, np.uint16), *lengths])
        self.first_rows = np.cumsum([0, *map(len, lengths)])[:-1]

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self):
        return TokenStore, (self.folder, self.split)  # a spawned loader worker maps the files again

    def rows(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples ``index`` ``[B]`` -> input_ids and word_starts ``[B, L]`` (0 past a row's end), lengths ``[B]``."""
        lengths = self.lengths[index].astype(np.int64)
        positions = np.arange(lengths.max())
        input_ids = np.zeros((len(index), len(positions)), np.int64)
        word_starts = np.zeros(input_ids.shape, bool)
        shard_of = np.searchsorted(self.first_rows, index, side="right") - 1
        for number in np.unique(shard_of):
            here = shard_of == number
            local = index[here] - self.first_rows[number]
            input_ids[here], word_starts[here] = self.shards[number].read(local, positions)
        real = positions < lengths[:, None]
        return input_ids * real, word_starts & real, lengths


class Shard:
    """The flat arrays behind one Arrow file of a single record batch; zero-copy views of the mapped file."""

    def __init__(self, table: pa.Table):
        tokens, bits = (table[name].chunk(0) for name in ("input_ids", "word_starts"))
        self.tokens, self.token_offsets = tokens.values.to_numpy(), tokens.offsets.to_numpy()
        self.bits, self.bit_offsets = bits.values.to_numpy(), bits.offsets.to_numpy()

    def read(self, rows: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and word starts at ``positions`` of ``rows``; past a row's end they are its neighbours'."""
        at = self.token_offsets[rows].astype(np.int64)[:, None] + positions
        byte = self.bit_offsets[rows].astype(np.int64)[:, None] + (positions >> 3)
        tokens = self.tokens.take(at, mode="clip")
        starts = self.bits.take(byte, mode="clip") >> (positions & 7).astype(np.uint8) & 1
        return tokens, starts.astype(bool)


def shard_table(blocks: list[np.ndarray], word_starts: list[np.ndarray], token_type: str) -> pa.Table:
    """Blocks of token ids and their word starts -> the columns of a shard; bits are packed, lowest first."""
    packed = [np.packbits(starts, bitorder="little") for starts in word_starts]
    columns = {
        "input_ids": list_array(blocks, np.dtype(token_type)),
        "word_starts": list_array(packed, np.dtype(np.uint8)),
        "length": pa.array(np.array([len(block) for block in blocks], np.uint16)),
    }
    return pa.table(columns)


def list_array(rows: list[np.ndarray], dtype: np.dtype) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    values = np.concatenate([np.empty(0, dtype), *rows]).astype(dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def write_table(path: Path, table: pa.Table) -> None:
    partial = path.with_suffix(".partial")
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, len(table)))  # one record batch: see store.Shard
    partial.replace(path)


def dataset_files(folder: Path, shards: list[dict[str, Any]]) -> None:
    """What lets `datasets.load_from_disk` read the shards of a split."""
    from datasets import DatasetInfo, Features

    if shards:
        with pa.memory_map(str(folder / shards[0]["file"])) as file:
            schema = pa.ipc.open_stream(file).schema
        DatasetInfo(features=Features.from_arrow_schema(schema)).write_to_directory(str(folder))
    fingerprint = hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]
    state: dict[str, Any] = {"_data_files": [{"filename": shard["file"]} for shard in shards]}
    state |= {"_fingerprint": fingerprint, "_format_columns": None, "_format_kwargs": {}, "_format_type": None}
    write_json(folder / "state.json", state | {"_output_all_columns": False, "_split": None})


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a finished store.

    Raises:
        ValueError: the folder is missing, is no store, or is one that `condenser prepare` has not finished.
    """
    path = Path(folder) / MANIFEST
    if not Path(folder).is_dir():
        raise ValueError(f"no token store at {folder}: make one with `condenser prepare --output {folder}`")
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST}: an unfinished token store, or none; run `condenser prepare` again"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): the store is damaged, prepare it anew") from None


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what a fast tokenizer does to text: vocabulary, rules and special tokens; not of padding settings."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([state, special], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)
