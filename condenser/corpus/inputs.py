"""What `--input` names: files, folders, patterns and Hugging Face datasets, as sources in a fixed order.

A file that is named is read or refused. Of those that a folder or a pattern gives, what cannot be read is left out and
named, and so is what systems and people leave beside data.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from condenser.corpus.documents import documents
from condenser.corpus.readers import COMPRESSED, READERS, Source, suffix_of, units
from condenser.corpus.work import UNFINISHED
from condenser.data.store import MANIFEST
from condenser.data.tokenizers import is_path

TEXT_BYTES = 1 << 24  # read at once
LEFT_BEHIND = ("~", ".swp", ".swo", ".tmp", ".part", ".partial", ".crdownload")  # how names end
SYSTEMS_OWN = ("__MACOSX", "__pycache__")  # folders
ABOUT_DATA = ("readme", "license", "licence", "notice", "changelog", "copying")  # how names of plain text begin
OF_DATASETS = {"dataset_dict.json": b'"splits"', "state.json": b'"_data_files"', "dataset_info.json": b""}
OF_THE_HUB = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")  # `datasets` reads none
FORMATS = f"{', '.join(READERS)}, or {', '.join(COMPRESSED)} of it"
OURS = {"a run folder": ("config.yaml", "metrics.csv"), "an export": ("config.json", "condenser.json")}  # what is there
NO_UTF8 = "a name that is not UTF-8"

LeftOut = tuple[str, str]  # a path, and why it is not read


def resolve(inputs: list[str], split: str = "train", **columns: Any) -> tuple[list[Source], list[LeftOut]]:
    """Names -> sources in order, and what is left out. ``columns``: see `Source`. Raises ValueError for no name, a path
    that is not there, is empty, of no known format or given twice, a folder without any, or a split of no dataset."""
    if not inputs or not all(inputs):
        raise ValueError("--input names nothing: give files, folders, patterns or datasets")
    sources: list[Source] = []
    left_out: list[LeftOut] = []
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
    return [replace(source, split=split, **columns) for source in sources], left_out


def sources_of(name: str) -> tuple[list[Source], list[LeftOut]]:
    """Of one name, which may be that of a path although it looks like a pattern."""
    if os.path.isdir(name):
        ours = [what for what, files in OURS.items() if all(Path(name, file).is_file() for file in files)]
        if ours or is_store(name):
            what = ours[0] if ours else "a token store"
            raise ValueError(f"{name} is {what}, not text: give what `condenser prepare` made stores of")
        paths = [name]
    elif os.path.exists(name):
        return [file_source(name)], []
    else:
        paths = sorted(glob.glob(name, recursive=True), key=lambda path: (path.count(os.sep), path))  # round no loop
    if not paths:
        if glob.has_magic(name) or is_path(name) or suffix_of(name) in (*READERS, *COMPRESSED):
            raise ValueError(f"no such file: {name}")
        return [Source(name, "hub")], []
    seen: set[str] = set()
    found: dict[str, str] = {}  # by real path, as links and patterns may give the same several times
    for path in paths:
        path = next(filter(is_store, map(str, [*Path(path).parents, path])), path)  # left out with all that is in it
        for file in within(path, seen) if os.path.isdir(path) and not is_store(path) else [path]:
            found.setdefault(os.path.realpath(file), file)
    return chosen(found.values() if paths == [name] else sorted(found.values()))


def within(folder: str, seen: set[str]) -> Iterator[str]:
    """What is in a folder and its folders, links followed: files, hidden ones too, saved datasets, and the folders that
    are not gone into. ``seen``: real paths of folders that have been, and are."""
    for directory, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if is_dataset(directory):
            folders.clear()
            yield directory
            files = [file for file in files if kind_of(file) and file not in OF_DATASETS]
        stores = {each for each in folders if is_store(os.path.join(directory, each))}
        apart = stores | {each for each in folders if each.startswith(".") or each in SYSTEMS_OWN}
        folders[:] = sorted({*folders} - apart)
        yield from (os.path.join(directory, each) for each in sorted([*files, *apart]))


def is_dataset(folder: str) -> bool:
    """Whether `datasets` has saved one there: its cache has no state.json, and one of another's begins otherwise."""
    files = ((Path(folder, name), mark) for name, mark in OF_DATASETS.items() if mark)
    return any(file.is_file() and mark in file.open("rb").read(1000) for file, mark in files)


def is_store(folder: str) -> bool:
    """Whether a token store is there, or in the making."""
    has = {name for name in ("units", UNFINISHED, MANIFEST) if os.path.exists(os.path.join(folder, name))}
    return UNFINISHED in has or has == {"units", MANIFEST}


def chosen(paths: Iterable[str]) -> tuple[list[Source], list[LeftOut]]:
    """Of what was not named itself: what is read, and why the rest is not."""
    sources, left_out = [], []
    for path in paths:
        kind = "folder" if os.path.isdir(path) else kind_of(path)
        if reason := why_not(path, kind):
            left_out.append((printable(path), reason))
        else:
            sources.append(Source(path, str(kind), found=True))
    data = [source for source in sources if source.kind != "text"]
    if not data:
        return sources, left_out
    return data, left_out + [(source.name, "text beside data") for source in sources if source.kind == "text"]


def why_not(path: str, kind: str | None) -> str | None:
    """Why something is not read. None if it is."""
    name = Path(path).name.lower()
    if path != printable(path):
        return NO_UTF8
    if name.startswith((".", "#", "~$")) or name.endswith(LEFT_BEHIND) or Path(path).name in SYSTEMS_OWN:
        return "hidden, or left behind"
    if kind == "folder":
        return None if is_dataset(path) else "a token store"
    if kind is None:
        return "no format that is read"
    if not os.path.exists(path):
        return "a link to nothing"
    if os.path.getsize(path) == 0:
        return "empty"
    return "text beside data" if name in OF_THE_HUB or (kind == "text" and name.startswith(ABOUT_DATA)) else None


def printable(path: str) -> str:
    """With escapes where it is not UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode()


def in_short(left_out: list[LeftOut]) -> str:
    """One line: how many files of which endings are not read, and the first of each reason."""
    if not left_out:
        return ""
    reasons: dict[str, list[str]] = {}
    for path, reason in left_out:
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
    if path != printable(path):
        raise ValueError(f"{printable(path)} has {NO_UTF8}: rename it")
    return Source(path, kind)


def texts_of(names: list[str]) -> Iterator[str]:
    """Of the documents of inputs; lines that cannot be read are passed over."""
    for source in resolve(names)[0]:
        for unit in units(source, TEXT_BYTES):
            good, _ = documents(unit, skip_bad_lines=True)
            yield from (document.text for document in good)
