"""Arrow files of a token store: what `TokenStore` maps, and `datasets` reads."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from condenser.corpus.blocks import Cut
from condenser.data.store import atomic_write, checksum, write_json


def write_shard(path: Path, rows: Cut, token_type: str, with_documents: bool) -> dict[str, Any]:
    """Write rows to a file, if asked with the number of each one's document; gives what is known of the file."""
    tokens, lengths = np.concatenate(rows.tokens), np.array([*map(len, rows.tokens)])
    columns = {
        "input_ids": list_array(tokens.astype(token_type), lengths),
        "word_starts": packed_bits(np.concatenate(rows.word_starts), lengths),
        "length": pa.array(lengths.astype(np.uint16)),
    }
    if with_documents:
        columns["document"] = pa.array(np.array(rows.documents, np.uint32))
    table = pa.table(columns)
    with (
        atomic_write(path) as partial,
        pa.OSFile(str(partial), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
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
    from datasets import Features

    if shards:
        with pa.memory_map(str(folder / shards[0]["file"])) as file:
            schema = pa.ipc.open_stream(file).schema
        write_json(folder / "dataset_info.json", {"features": Features.from_arrow_schema(schema).to_dict()})
    fingerprint = hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]
    state: dict[str, Any] = {"_data_files": [{"filename": shard["file"]} for shard in shards]}
    state |= {"_fingerprint": fingerprint, "_format_columns": None, "_format_kwargs": {}, "_format_type": None}
    write_json(folder / "state.json", state | {"_output_all_columns": False, "_split": None})
