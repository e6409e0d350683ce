"""Token stores: what `condenser prepare` writes and training reads, without copying it into memory.

    manifest.json      written last: settings, sources, counts, checksums; a store without it is unfinished
    tokenizer/         for AutoTokenizer.from_pretrained
    token_counts.npy   how often each id occurs in the training split (the unigram baseline)
    train/ validation/ a `datasets` Arrow folder each: input_ids (no special tokens), word_starts (bits), length; of
                       stores of spans also document, the number of a row's document in its shard
    units/             what became of each unit of the input; kept so that input can be appended

Legend: B rows, T tokens of all of them.
"""

import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PARTIAL = "." + "[0-9a-f]" * 8 + ".partial"  # ends the names of files that are being written
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
SPECIAL_TOKENS = 2  # [CLS] and [SEP], which a row gets when it is fed


class TokenStore:
    """One split of a store, memory-mapped. Rows are numbered over all shards in order. Raises ValueError for no store,
    an unfinished one, or a shard that is missing or has another size than it had."""

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder)
        files = self.manifest["splits"][split]["shards"]
        self.shards = [Shard(self.folder / split / about["file"], about["bytes"]) for about in files]
        self.lengths = np.concatenate([np.empty(0, np.uint16), *(shard.lengths for shard in self.shards)])
        self.first_rows = np.cumsum([0, *(len(shard.lengths) for shard in self.shards)])[:-1]

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self):
        return TokenStore, (self.folder, self.split)  # a spawned loader worker maps the files again

    def document_bounds(self) -> np.ndarray:
        """Where the documents begin, in rows, and the number of rows ``[D + 1]``. ValueError for a store of blocks."""
        if self.manifest["settings"]["kind"] != "spans":
            raise ValueError(f"{self.folder} holds blocks; pairs of spans need a store of `prepare --kind spans`")
        in_order = zip(self.first_rows, self.shards, strict=True)
        bounds = [first + np.flatnonzero(np.diff(shard.documents, prepend=-1)) for first, shard in in_order]
        return np.concatenate([*bounds, [len(self)]])

    def rows(self, index: np.ndarray) -> "Rows":
        """The rows ``index`` ``[B]``, one after the other."""
        return read_rows(self.shards, self.first_rows, index)


class Rows(NamedTuple):
    """Rows one after the other, without special tokens."""

    tokens: np.ndarray  # [T], of the type they are stored in
    word_starts: np.ndarray  # [T] bool
    lengths: np.ndarray  # [B] int64


def read_rows(shards: "list[Shard]", first_rows: np.ndarray, index: np.ndarray) -> Rows:
    """The rows ``index`` ``[B]``, as they are numbered over all ``shards``, of which ``first_rows`` begin one each."""
    shard_of = np.searchsorted(first_rows, index, side="right") - 1
    places = index - first_rows[shard_of]
    found = [shards[shard].row(place) for shard, place in zip(shard_of.tolist(), places.tolist(), strict=True)]
    tokens, packed = (np.concatenate(parts) for parts in zip(*found, strict=True))
    lengths = np.array([len(of_row) for of_row, _ in found])
    bits = np.unpackbits(packed, bitorder="little")
    n_bits = -(-lengths // 8) * 8  # of each row, which begins with a byte of its own
    skipped = (n_bits.cumsum() - n_bits) - (lengths.cumsum() - lengths)
    return Rows(tokens, bits[np.arange(len(tokens)) + np.repeat(skipped, lengths)].astype(bool), lengths)


class Shard:
    """The flat arrays behind one Arrow file of a single record batch; zero-copy views of the mapped file."""

    def __init__(self, path: Path, size: int):
        import pyarrow as pa

        repair = "the command that made the store makes it anew"
        if not path.is_file():
            raise ValueError(f"{path} is missing; {repair}")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes instead of {size:,}, it is damaged; {repair}")
        try:
            with pa.memory_map(str(path)) as file:  # closed at once, the mapping stays: any number can be open
                table = pa.ipc.open_stream(file).read_all()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, and {repair}") from None
        tokens, bits = (table[name].chunk(0) for name in ("input_ids", "word_starts"))
        self.tokens, self.token_offsets = tokens.values.to_numpy(), tokens.offsets.to_numpy()
        self.bits, self.bit_offsets = bits.values.to_numpy(), bits.offsets.to_numpy()
        self.lengths = table["length"].to_numpy()
        self.documents: Any = table["document"].to_numpy() if "document" in table.column_names else None

    def row(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a row of the shard, and the bytes of its word starts; not copied."""
        tokens, bits = self.token_offsets, self.bit_offsets
        return self.tokens[tokens[place] : tokens[place + 1]], self.bits[bits[place] : bits[place + 1]]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write under; what was written is on disk, and whole, once it has its name."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # pyarrow's, for one, does not name the file
        raise OSError(f"{path} cannot be written: {os.strerror(error.errno) if error.errno else error}") from error
    finally:
        partial.unlink(missing_ok=True)


def leftovers(folder: Path, *names: str) -> list[Path]:
    """The temporary files or folders of these names, or patterns of them, that killed processes have left."""
    return [path for name in names for path in folder.glob(name + PARTIAL) if not path.is_symlink()]


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save_array(path: Path, array: np.ndarray) -> None:
    content = io.BytesIO()  # numpy's own writing to a full disk fails without saying why
    np.save(content, array)
    with atomic_write(path) as partial:
        partial.write_bytes(content.getbuffer())


def load_array(path: Path) -> np.ndarray:
    """Raises ValueError, naming the file, if it is damaged, or holds objects, which loading would run."""
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); prepare the store anew") from None


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest(folder: str | Path) -> str:
    """Of all that a store's splits hold, from the checksums in its manifest."""
    files = shard_files(Path(folder), read_manifest(folder)["splits"])
    text = json.dumps([[path.parent.name, shard["rows"], shard["blake2b"]] for path, shard in files])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_same_stores(digests: Sequence[str], folders: Sequence[Path], checkpoint: str | Path) -> None:
    """Raises ValueError where a run would go on over other stores than it was trained on, or in another order."""
    other_run = "or begin another run from the weights: --model.backbone of its export"
    if len(digests) != len(folders):
        raise ValueError(
            f"{checkpoint} was trained on {len(digests)} store(s), and here are {len(folders)}, "
            f"{', '.join(map(str, folders))}: give the same again; {other_run}"
        )
    for known, folder in zip(digests, folders, strict=True):
        if known != digest(folder):
            raise ValueError(
                f"{folder} is not the store that {checkpoint} was trained on: it was appended to, made anew or "
                f"exchanged. Put it back; {other_run}"
            )


def names_of(folders: Iterable[Path]) -> dict[Path, str]:
    """A name for each store: its folder's, and the whole path where several folders are called so."""
    folders = list(folders)
    names = [folder.name for folder in folders]
    return {folder: folder.name if names.count(folder.name) == 1 else str(folder).strip("/") for folder in folders}


def check_file_name(name: str, where: str | Path) -> None:
    """Raises ValueError if ``name``, given in the file or folder ``where``, is of a file in another folder."""
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{where} names a file {name!r} outside of its folder; do not trust its origin")


def shard_files(folder: Path, splits: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """The shards' paths, and what is known of each. Raises ValueError for a shard outside of the folder."""
    files = [(folder / split / shard["file"], shard) for split, about in splits.items() for shard in about["shards"]]
    for _, shard in files:
        check_file_name(shard["file"], folder)
    return files


def missing_files(folder: Path, splits: dict[str, Any]) -> list[Path]:
    """Shards that are not there, or of another size than they had."""
    files = shard_files(folder, splits)
    return [path for path, shard in files if not path.is_file() or path.stat().st_size != shard["bytes"]]


def verify(folder: Path, splits: dict[str, Any]) -> None:
    """Compare every shard with its checksum. ValueError names all that are missing or damaged."""
    from rich.progress import track

    damaged = [
        str(path)
        for path, shard in track(shard_files(folder, splits), "verifying", transient=True)
        if not path.is_file() or checksum(path) != shard["blake2b"]
    ]
    if damaged:
        raise ValueError(
            f"missing or damaged, their checksums do not agree: {', '.join(damaged)}; "
            "remove them, and the command that made the store makes them anew"
        )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a store. ValueError if there is none, or one that `condenser prepare` has not finished."""
    path = Path(folder) / MANIFEST
    if not Path(folder).is_dir():
        raise ValueError(f"no token store at {folder}: make one with `condenser prepare --output {folder}`")
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST}: an unfinished token store, or none; run `condenser prepare` again"
        )
    manifest = read_json(path, "settings", "tokenizer", "counts", "bad", "units", "splits")
    try:
        settings, counts, splits = manifest["settings"], manifest["counts"], manifest["splits"]
        [settings[name] for name in ("kind", "sources", "max_length")]
        [splits[split][what] for split in SPLITS for what in ("rows", "tokens", "documents", "shards")]
        [shard[what] for _, shard in shard_files(path, splits) for what in ("bytes", "blake2b", "rows")]
        counts["tokens_kept"], manifest["tokenizer"]["hash"]
        for unit in manifest["units"]:
            check_file_name(unit, path)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks {error}: damaged, or of an older version; prepare the store anew") from None
    return manifest


def read_json(path: Path, *keys: str) -> Any:
    """What a file holds. ValueError, naming the file, if that is not JSON, or lacks one of the ``keys``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): damaged, prepare the store anew") from None
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]!r}: damaged, or of an older version; prepare the store anew")
    return value


def in_words(counts: dict[str, int], *names: str) -> str:
    """{"too_short": 1200} -> 1,200 too short"""
    return ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in names)


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what a fast tokenizer does to text: vocabulary, rules and special tokens; not of padding settings."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([state, special], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
