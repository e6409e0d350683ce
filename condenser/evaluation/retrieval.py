"""Reading a collection in BEIR's layout:

    corpus.jsonl {_id, title, text}   queries.jsonl {_id, text}   qrels/test.tsv or another, qrels/train.tsv (optional)

each plain or compressed (.gz, .xz, .zst). A title goes before its text, as in BEIR. Other files are not looked at.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from condenser.corpus.readers import COMPRESSED, opened
from condenser.evaluation.search import Qrels, Texts

LARGEST_GRADE = 1000  # of a judgement; trec_eval counts with small whole numbers


@dataclass(frozen=True)
class Collection:
    name: str
    documents: Texts  # title and text
    queries: Texts  # those that `qrels` judges
    qrels: Qrels  # of the split that is scored
    train_queries: Texts  # those that `train_qrels` judges; none without qrels/train.tsv
    train_qrels: Qrels

    @cached_property
    def fingerprint(self) -> str:
        """Of all that it holds, a part at a time."""
        digest = hashlib.sha256(self.name.encode())
        for part in (self.documents, self.queries, self.qrels, self.train_queries, self.train_qrels):
            digest.update(b"\n")
            for item in part.items():
                digest.update(json.dumps(item).encode())
        return digest.hexdigest()[:16]

    @property
    def train_pairs(self) -> list[tuple[str, str]]:
        """Texts of a query and a relevant document."""
        return [
            (self.train_queries[query], self.documents[i])
            for query in self.train_qrels
            for i in self.relevant(query, self.train_qrels)
        ]

    def relevant(self, query: str, qrels: Qrels) -> list[str]:
        """Ids of what is relevant to a query and in the corpus."""
        return [i for i, grade in qrels[query].items() if grade > 0 and i in self.documents]

    @cached_property
    def unseen(self) -> set[str]:
        """The queries that are scored none of whose relevant documents, by their text, is one of training's."""
        seen = {text for _, text in self.train_pairs}
        relevant = {query: {self.documents[i] for i in self.relevant(query, self.qrels)} for query in self.qrels}
        return {query for query, texts in relevant.items() if not texts & seen}


def read_collection(folder: Path, split: str = "test") -> Collection:
    """A BEIR folder, where ``qrels/<split>.tsv`` is scored; ValueError for a missing file, a broken line, or judgements
    that do not belong to the corpus or the queries."""
    if not folder.is_dir():
        raise ValueError(f"no retrieval collection at {folder}: --retrieval takes a folder in BEIR's layout")
    suffixes = tuple(f".tsv{suffix}" for suffix in ("", *COMPRESSED))
    files = [path.name for path in folder.glob("qrels/[!.]*") if path.name.endswith(suffixes)]
    splits = sorted({name.rpartition(".tsv")[0] for name in files})
    if split not in splits:
        raise ValueError(f"{folder} has no qrels/{split}.tsv: --split can be {', '.join(splits) or 'nothing there'}")
    rows = read_rows(folder, "corpus.jsonl")
    documents = {i: f"{row.get('title') or ''} {row['text']}".strip() for i, row in rows.items()}
    queries = {i: row["text"] for i, row in read_rows(folder, "queries.jsonl").items()}
    qrels = read_qrels(folder, f"qrels/{split}.tsv", queries)
    train = read_qrels(folder, "qrels/train.tsv", queries) if "train" in splits else {}
    if not any(judged.keys() & documents.keys() for judged in qrels.values()):
        raise ValueError(f"{folder}: no document of qrels/{split}.tsv is in corpus.jsonl: do they belong together?")
    relevant = {i for judged in qrels.values() for i, grade in judged.items() if grade > 0}
    if lost := relevant - documents.keys():
        print(
            f"{folder}: {len(lost):,} of {len(relevant):,} relevant documents of qrels/{split}.tsv are not in "
            "corpus.jsonl, and count as not found"
        )
    full = folder.resolve()
    return Collection(
        name=full.parent.name if full.name == "beir" else full.name,
        documents=documents,
        queries={query: queries[query] for query in qrels},
        qrels=qrels,
        train_queries={query: queries[query] for query in train},
        train_qrels=train,
    )


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """All lines, from 1, without byte order marks."""
    with opened(path) as (file, _):
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8: {error}") from None


def json_object(where: str, line: str) -> dict[str, Any]:
    """Halves of characters, which JSON can spell and no tokenizer takes, become replacement characters."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: not a JSON object")
    texts = {name: value for name, value in fields.items() if isinstance(value, str)}
    return fields | {name: re.sub("[\ud800-\udfff]", "\ufffd", text) for name, text in texts.items()}


def read_lines(folder: Path, name: str) -> Iterator[tuple[str, str]]:
    """-> (where, line) of those that are not empty"""
    path = next((p for suffix in ("", *COMPRESSED) if (p := folder / (name + suffix)).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no {name} (plain or {', '.join(COMPRESSED)}), which this needs")
    yield from ((f"{path}, line {number}", line) for number, line in numbered_lines(path) if line.strip())


def read_rows(folder: Path, name: str) -> dict[str, dict]:
    """Title and text by id; trec_eval would take an id to end at a null character."""
    rows: dict[str, dict] = {}
    for where, line in read_lines(folder, name):
        row = json_object(where, line)
        if not all(isinstance(value, str) for value in (row.get("_id"), row.get("text"), row.get("title") or "")):
            raise ValueError(f"{where}: not an object with the strings _id and text, and perhaps title")
        if "\0" in row["_id"]:
            raise ValueError(f"{where}: a null character in the _id {row['_id']!r}")
        text = {field: row.get(field) for field in ("title", "text")}
        if rows.setdefault(row["_id"], text) != text:
            raise ValueError(f"{where}: another text of the _id {row['_id']!r}, which an earlier line has too")
    return rows


def read_qrels(folder: Path, name: str, queries: Texts) -> Qrels:
    """Queries with at least one relevant document. A first line whose score is no number is the header."""
    qrels: Qrels = {}
    for number, (where, line) in enumerate(read_lines(folder, name)):
        columns = line.split("\t")
        try:
            query, document, score = columns
            grade = float(score)
            if not grade.is_integer() or abs(grade) > LARGEST_GRADE:
                raise ValueError
        except ValueError:
            if number == 0 and len(columns) == 3 and not any(map(str.isdigit, columns[2])):
                continue
            raise ValueError(f"{where}: not 'query-id<TAB>corpus-id<TAB>score' with a whole score") from None
        judged = qrels.setdefault(query, {})
        if judged.setdefault(document, int(grade)) != grade:
            raise ValueError(f"{where}: an earlier line judges document {document!r} for query {query!r} otherwise")
    qrels = {query: judged for query, judged in qrels.items() if max(judged.values()) > 0}
    if not qrels:
        raise ValueError(f"{folder}: {name} judges no document relevant")
    if missing := qrels.keys() - queries.keys():
        raise ValueError(f"{folder}: {name} judges query {min(missing)!r}, which queries.jsonl lacks")
    return qrels
