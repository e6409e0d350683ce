"""Reading a collection in BEIR's layout:

    corpus.jsonl {_id, title, text}   queries.jsonl {_id, text}   qrels/test.tsv or another, qrels/train.tsv (optional)

each plain or compressed (.gz, .xz, .zst). A title goes before its text, as in BEIR.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from condenser.corpus.readers import COMPRESSED, opened
from condenser.evaluation.search import Qrels, Texts


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
        return hashlib.sha256(json.dumps(vars(self)).encode()).hexdigest()[:16]

    @property
    def train_pairs(self) -> list[tuple[str, str]]:
        """Texts of a query and a relevant document."""
        return [
            (self.train_queries[query], self.documents[i])
            for query, judged in self.train_qrels.items()
            for i, grade in judged.items()
            if grade > 0 and i in self.documents
        ]


def read_collection(folder: Path, split: str = "test") -> Collection:
    """Read a BEIR folder; ``qrels/<split>.tsv`` is what will be scored.

    Raises:
        ValueError: a missing file, a broken line, or judgements that do not belong to the corpus or the queries.
    """
    if not folder.is_dir():
        raise ValueError(f"no retrieval collection at {folder}: --retrieval takes a folder in BEIR's layout")
    splits = sorted({path.name.partition(".tsv")[0] for path in folder.glob("qrels/[!.]*.tsv*")})
    if split not in splits:
        raise ValueError(f"{folder} has no qrels/{split}.tsv: --split can be {', '.join(splits) or 'nothing there'}")
    documents = {i: f"{row.get('title') or ''} {row['text']}".strip() for i, row in read_rows(folder, "corpus.jsonl")}
    queries = {i: row["text"] for i, row in read_rows(folder, "queries.jsonl")}
    qrels = read_qrels(folder, f"qrels/{split}.tsv", queries)
    train = read_qrels(folder, "qrels/train.tsv", queries) if "train" in splits else {}
    if not any(judged.keys() & documents.keys() for judged in qrels.values()):
        raise ValueError(f"{folder}: no document of qrels/{split}.tsv is in corpus.jsonl: do they belong together?")
    full = folder.resolve()
    return Collection(
        name=full.parent.name if full.name == "beir" else full.name,
        documents=documents,
        queries={query: queries[query] for query in qrels},
        qrels=qrels,
        train_queries={query: queries[query] for query in train},
        train_qrels=train,
    )


def read_lines(folder: Path, name: str) -> Iterator[tuple[str, str]]:
    """-> (where, line) of those that are not empty"""
    path = next((p for suffix in ("", *COMPRESSED) if (p := folder / (name + suffix)).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no {name} (plain or {', '.join(COMPRESSED)}), which this needs")
    with opened(path) as (file, _):
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", line.decode("utf-8-sig", errors="replace").rstrip("\r\n")


def read_rows(folder: Path, name: str) -> Iterator[tuple[str, dict]]:
    for where, line in read_lines(folder, name):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in ("_id", "text")):
            raise ValueError(f"{where}: not an object with the strings _id and text")
        yield row["_id"], row


def read_qrels(folder: Path, name: str, queries: Texts) -> Qrels:
    """Queries with at least one relevant document. A first line that is no judgement is the header."""
    qrels: Qrels = {}
    for number, (where, line) in enumerate(read_lines(folder, name)):
        try:
            query, document, grade = line.split("\t")
            qrels.setdefault(query, {})[document] = int(grade)
        except ValueError:
            if number > 0:
                raise ValueError(f"{where}: not 'query-id<TAB>corpus-id<TAB>score'") from None
    qrels = {query: judged for query, judged in qrels.items() if max(judged.values()) > 0}
    if missing := qrels.keys() - queries.keys():
        raise ValueError(f"{folder}: {name} judges query {min(missing)!r}, which queries.jsonl lacks")
    return qrels
