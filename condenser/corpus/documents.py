"""Records to documents: the fields of a JSON object or of a table's row, or a run of lines of plain text.

What cannot be used is named, with its file and line, in an error, or in a list where it is to be skipped.
"""

import codecs
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple

from condenser.corpus.readers import Source, Unit, missing_column, units

ONE_A_LINE = "one object a line is read"


class Document(NamedTuple):
    text: str
    content: int  # 64-bit hash of the text
    key: int  # 64-bit hash of its id, or of its text where it has none


def check(sources: list[Source], skip_bad_lines: bool) -> list[Source]:
    """Read the beginning of every source, so that what cannot work stops before any work; gives those without any
    document that were not named themselves. Plain text that is one document of many lines is named. Raises ValueError
    as `units` and `documents`, or for a source that was named, or all, without any document."""
    empty, undivided = [], []
    for source in sources:
        found = (documents(unit, skip_bad_lines) for unit in units(source, 1 << 16))
        good, bad = next((pair for pair in found if any(pair)), ([], []))
        n_lines = good[0].text.count("\n") + 1 if good else 0
        if not (good or bad):
            empty.append(source)
        elif source.kind == "text" and n_lines >= 20 and len(good) == 1 and not any(map(any, found)):  # and no more
            undivided.append(f"{source.name}: 1 document in {n_lines:,} lines")
    if undivided:
        more = f" ({len(undivided) - 1:,} more such files)" if undivided[1:] else ""
        print(f"{undivided[0]}: in plain text a blank line ends a document{more}")
    for source in empty:
        if not source.found or len(empty) == len(sources):
            raise ValueError(f"{source.name} holds no documents")
    return empty


def documents(unit: Unit, skip_bad_lines: bool) -> tuple[list[Document], list[str]]:
    """A unit's documents; and which of its records hold none that can be used, and why. Raises ValueError with the
    first of these, unless they are skipped."""
    good: list[Document] = []
    bad: list[str] = []
    for number, record in records(unit):
        try:
            good.append(document_of(record, unit.source))
        except ValueError as error:
            place = "row" if isinstance(record, dict) else "line"
            bad.append(f"{unit.source.name}, {place} {number}: {error}")
            if not skip_bad_lines:
                raise ValueError(f"{bad[0]} (--skip-bad-lines goes on)") from None
    return good, bad


def records(unit: Unit) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """The records of a table, the lines that are not blank, or the runs of such lines, with the number of each (of its
    first line)."""
    if not isinstance(unit.payload, bytes):
        yield from enumerate(unit.payload, unit.first)
        return
    payload = unit.payload.removeprefix(codecs.BOM_UTF8) if unit.first == 1 else unit.payload
    if unit.source.kind == "text":
        payload = payload.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines = enumerate(payload.split(b"\n"), unit.first)
    if unit.source.kind == "jsonl":
        yield from ((number, line) for number, line in lines if line.strip())
        return
    for is_blank, run in itertools.groupby(lines, lambda numbered: not numbered[1].strip()):
        if not is_blank:
            numbers, document = zip(*run, strict=True)
            yield numbers[0], b"\n".join(document).rstrip()


def document_of(record: bytes | dict[str, Any], source: Source) -> Document:
    """Raises ValueError for what is not a record, a field that is missing or no text, and text that is none."""
    if isinstance(record, bytes):
        record = {source.text_column: decoded(record)} if source.kind == "text" else json_object(record)
    text = field(record, source.text_column, "--text-column")
    if source.title_column is not None and (title := field(record, source.title_column, "--title-column")):
        text = f"{title}\n{text}"
    if "\0" in text:
        raise ValueError("holds NUL characters: binary data, or a damaged file")
    identity = record.get(source.id_column)
    try:
        content = hash64(text.encode())
        has_none = identity is None or identity != identity  # tables hold NaN where a number is missing
        return Document(text, content, content if has_none else hash64(same_id(identity)))
    except UnicodeEncodeError as error:
        raise ValueError(f"no valid Unicode: {error.reason}") from None


def decoded(record: bytes) -> str:
    try:
        return record.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None


def json_object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(decoded(line), parse_int=number)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}; {ONE_A_LINE}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object was expected, not {type(record).__name__}; {ONE_A_LINE}")
    return record


def number(digits: str) -> int | str:
    return int(digits) if len(digits) < 4000 else digits  # which Python refuses, and only an id may be


def field(record: dict[str, Any], column: str, option: str) -> str:
    if column not in record:
        raise ValueError(missing_column(column, option, list(record)))
    value = "" if record[column] is None else record[column]
    if not isinstance(value, str | bytes):
        raise ValueError(f"{column!r} is not a text but {type(value).__name__}")
    text = decoded(value) if isinstance(value, bytes) else value
    return text.replace("\r\n", "\n").replace("\r", "\n")


def same_id(identity: Any) -> bytes:
    """The same for an id, whether a file holds it as a text, as bytes, or as a number; it need not be a text."""
    if isinstance(identity, bytes):
        return identity
    if isinstance(identity, float | Decimal) and math.isfinite(identity) and identity == int(identity):
        identity = int(identity)
    return str(identity).encode("utf-8", "surrogatepass")


def hash64(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
