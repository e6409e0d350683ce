"""What `--input` names: files, folders, patterns and Hugging Face datasets, as sources in a fixed order.

A file that is named is read or refused. Of those that a folder or a pattern gives, what cannot be read is left out and
named, and so is what systems and people leave beside data.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from condenser.corpus.readers import COMPRESSED, READERS, Columns, Source, suffix_of
from condenser.data.tokenizers import is_path

LEFT_BEHIND = ("~", ".swp", ".swo", ".tmp", ".part", ".partial", ".crdownload")  # how names end
ABOUT_DATA = ("readme", "license", "licence", "notice", "changelog", "copying")  # how names of plain text begin
FORMATS = f"{', '.join(READERS)}, or {', '.join(COMPRESSED)} of it"


def resolve(inputs: list[str], columns: Columns | None = None, split: str = "train") -> tuple[list[Source], list[str]]:
    """Names -> sources in order, and the files that are left out, each with the reason.

    Raises:
        ValueError: a path that is not there, a file that is empty or of no known format, one that is given twice,
            a folder without any, or a split where there are no datasets.
    """
    sources: list[Source] = []
    left_out: list[str] = []
    for name in inputs:
        found, others = sources_of(os.path.expanduser(name))
        if not found:
            raise ValueError(f"{name} gives no file that is read here: {FORMATS}. {in_short(others)}".rstrip())
        sources += found
        left_out += others
    paths = [os.path.realpath(source.name) if source.kind != "hub" else source.name for source in sources]
    if repeated := sorted(path for path, n in Counter(paths).items() if n > 1):
        raise ValueError(f"{repeated[0]} is given twice among the inputs")
    if split != "train" and not any(source.is_dataset for source in sources):
        raise ValueError(f"--split {split}: none of the inputs is a dataset with splits")
    return [replace(source, columns=columns or Columns(), split=split) for source in sources], left_out


def sources_of(name: str) -> tuple[list[Source], list[str]]:
    """Of one name, which may be that of a path although it looks like a pattern."""
    if os.path.isdir(name):
        return chosen(list(within(name)))
    if os.path.exists(name):
        return [file_source(name)], []
    paths = sorted(glob.glob(name, recursive=True))
    if not paths:
        return [hub_source(name)], []
    files: list[str] = []
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
        elif "**" not in name:  # which gives what is in folders, too
            files += within(path)
    return chosen(files)


def within(folder: str) -> Iterator[str]:
    """The files in a folder and its folders, hidden ones too; of a saved dataset the folder."""
    for directory, folders, files in os.walk(folder):
        if is_dataset(directory):
            folders.clear()
            yield directory
        else:
            folders[:] = sorted(each for each in folders if not each.startswith((".", "__")))
            yield from (os.path.join(directory, file) for file in sorted(files))


def is_dataset(folder: str) -> bool:
    """Whether `datasets` has saved one there (its cache has no state.json)."""
    names = ("dataset_dict.json", "state.json")
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def chosen(paths: list[str]) -> tuple[list[Source], list[str]]:
    """Of files that were not named each: those that are read, and why others are not."""
    kinds = {path: "folder" if os.path.isdir(path) else kind_of(path) for path in paths}
    has_records = not {"jsonl", "parquet", "folder"}.isdisjoint(kinds.values())
    sources, left_out = [], []
    for path, kind in kinds.items():
        name = Path(path).name.lower()
        if name.startswith((".", "#")) or name.endswith(LEFT_BEHIND):
            left_out.append(f"{path}: hidden, or left behind")
        elif kind is None:
            left_out.append(f"{path}: no format that is read")
        elif kind == "text" and (has_records or name.startswith(ABOUT_DATA)):
            left_out.append(f"{path}: text beside data")
        elif kind != "folder" and os.path.getsize(path) == 0:
            left_out.append(f"{path}: empty")
        else:
            sources.append(Source(path, kind))
    return sources, left_out


def in_short(left_out: list[str]) -> str:
    """One line: how many files of which endings are not read, and the first of each reason."""
    if not left_out:
        return ""
    reasons: dict[str, list[str]] = {}
    for each in left_out:
        path, _, reason = each.rpartition(": ")
        reasons.setdefault(reason, []).append(path)
    parts = []
    for reason, paths in reasons.items():
        endings = Counter(Path(path).suffix or "without an ending" for path in paths)
        counted = ", ".join(f"{n:,} {ending}" for ending, n in endings.most_common(4))
        parts.append(f"{len(paths):,} {reason} ({counted}; {paths[0]})")
    return f"not read: {'; '.join(parts)}"


def kind_of(path: str) -> str | None:
    return READERS.get(suffix_of(Path(path).stem if suffix_of(path) in COMPRESSED else path))


def file_source(path: str) -> Source:
    kind = kind_of(path)
    if kind is None:
        raise ValueError(f"{path}: not a format that is read here: {FORMATS}")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path} is empty")
    return Source(path, kind)


def hub_source(name: str) -> Source:
    if glob.has_magic(name) or is_path(name) or suffix_of(name) in (*READERS, *COMPRESSED):
        raise ValueError(f"no such file: {name}")
    return Source(name, "hub")
