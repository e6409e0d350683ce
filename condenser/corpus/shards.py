"""Arrow files of a token store: what `TokenStore` maps, and `datasets` reads."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from condenser.data.store import checksum, write_json, written


def write_shard(
    path: Path,
    tokens: np.ndarray,
    word_starts: np.ndarray,
    lengths: np.ndarray,
    token_type: str,
    documents: np.ndarray | None = None,
) -> dict[str, Any]:
    """Write rows to a file; what is known of it.

    Args:
        tokens, word_starts: of all rows, one after the other, ``[lengths.sum()]``.
        lengths, documents: of each row; the number of its document.
    """
    columns = {
        "input_ids": list_array(tokens.astype(token_type), lengths),
        "word_starts": packed_bits(word_starts, lengths),
        "length": pa.array(lengths.astype(np.uint16)),
    }
    if documents is not None:
        columns["document"] = pa.array(documents.astype(np.uint32))
    table = pa.table(columns)
    with written(path) as partial, pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=len(table))  # one record batch: see Shard
    known = {"file": path.name, "rows": len(lengths), "tokens": len(tokens)}
    return known | {"bytes": path.stat().st_size, "blake2b": checksum(path)}


def list_array(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32)), pa.array(values))


def packed_bits(bits: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Eight booleans to a byte, lowest bit first; a row begins with a byte of its own."""
    n_bytes = -(-lengths // 8)
    first = 8 * np.append(0, np.cumsum(n_bytes)[:-1]) - np.append(0, np.cumsum(lengths)[:-1])  # how far each row moves
    spread = np.zeros(8 * n_bytes.sum(), bool)
    spread[np.arange(len(bits)) + np.repeat(first, lengths)] = bits
    return list_array(np.packbits(spread, bitorder="little"), n_bytes)


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
