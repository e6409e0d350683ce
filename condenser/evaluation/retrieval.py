"""A collection in BEIR's layout: reading it, searching in it, and what fine-tuning trains on.

    corpus.jsonl {_id, title, text}   queries.jsonl {_id, text}   qrels/test.tsv or another, qrels/train.tsv (optional)

each plain or compressed (.gz, .xz, .zst). A title goes before its text, as in BEIR. Other files are not looked at.
"""

import hashlib
import json
import random
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from condenser.corpus.readers import COMPRESSED, opened
from condenser.data.hashing import permuted
from condenser.evaluation.encoders import Encoder, Kind
from condenser.evaluation.finetuning import NEGATIVES_FROM, Tuning, is_held_out
from condenser.evaluation.search import (
    METRICS,
    Measured,
    Qrels,
    Run,
    Texts,
    bm25_search,
    dense_search,
    means,
    score_queries,
)

LARGEST_GRADE = 1000  # of a judgement; trec_eval counts with small whole numbers
HELD_OUT_QUERIES = 500  # at most
UNSEEN = "ndcg@10_unseen"  # on queries whose relevant documents are none of training's
EXAMPLE = "\N{NULL}example"  # id of --query among the queries of a collection
EXAMPLE_HITS = 5


@dataclass(frozen=True)
class Collection:
    name: str
    split: str  # that is scored
    documents: Texts  # title and text
    queries: Texts  # those that `qrels` judges
    qrels: Qrels
    train_queries: Texts  # those that `train_qrels` judges; none without qrels/train.tsv
    train_qrels: Qrels

    kind: ClassVar = "retrieval"
    texts_are: ClassVar[Kind] = "document"
    metrics: ClassVar = (*METRICS, UNSEEN)

    @cached_property
    def fingerprint(self) -> str:
        """Of all that it holds, a part at a time."""
        digest = hashlib.sha256(Path(self.name).name.encode())  # the same where it is called by its path
        for part in (self.documents, self.queries, self.qrels, self.train_queries, self.train_qrels):
            digest.update(b"\n")
            for item in part.items():
                digest.update(json.dumps(item).encode())
        return f"{self.name} {digest.hexdigest()[:16]}"

    def relevant(self, query: str, qrels: Qrels) -> list[str]:
        """Ids of what is relevant to a query and in the corpus."""
        return [i for i, grade in qrels[query].items() if grade > 0 and i in self.documents]

    @cached_property
    def train_pairs(self) -> list[tuple[str, str]]:
        """Texts of a query and a relevant document."""
        relevant = ((query, i) for query in self.train_qrels for i in self.relevant(query, self.train_qrels))
        return [(self.train_queries[query], self.documents[i]) for query, i in relevant]

    @property
    def trains(self) -> bool:
        return bool(self.train_pairs) and self.split != "train"

    @property
    def n_train(self) -> int:
        return len(self.train_qrels)

    def texts(self) -> list[str]:
        return list(self.documents.values())

    def part(self, queries: list[str]) -> "Collection":
        """With some of the queries."""
        return replace(self, queries={i: self.queries[i] for i in queries}, qrels={i: self.qrels[i] for i in queries})

    def held_out(self) -> "Collection":
        """A tenth of the training questions is scored, the others are trained on; those with one relevant document are
        on one side."""
        held = {i for i in self.train_qrels if is_held_out(min(self.relevant(i, self.train_qrels), default=i))}
        trained = {i: judged for i, judged in self.train_qrels.items() if i not in held}
        if not held or len(trained) < 2:
            raise ValueError(f"{self.name}: {self.n_train} training questions are too few to choose a learning rate by")
        whole = replace(self, queries=self.train_queries, qrels=self.train_qrels, train_qrels=trained)
        return whole.part(sorted(held)[:HELD_OUT_QUERIES])

    def examples(self, tuning: Tuning) -> dict[str, list[str]]:
        """Columns of questions, relevant passages and hard negatives; ValueError if there are too few of either."""
        judged, n = sorted(self.train_qrels), tuning.hard_negatives
        size = tuning.train_size or len(judged)
        drawn = permuted(np.arange(size), len(judged), tuning.seed)  # a smaller draw is part of a larger one
        questions = {judged[i]: self.train_queries[judged[i]] for i in drawn}
        hits = bm25_search(self.documents, questions, NEGATIVES_FROM) if n else {}
        rows, left_out = [], 0
        for query, question in questions.items():
            relevant = [self.documents[i] for i in self.relevant(query, self.train_qrels)]
            known = {query, *self.train_qrels[query]}  # some collections' questions are documents
            others = [self.documents[i] for i in hits.get(query, ()) if i not in known]
            others = [text for text in dict.fromkeys(others) if text not in relevant]
            if len(others) >= n:
                negatives = random.Random(f"{tuning.seed} {query}").sample(others, n)
                rows += [(question, text, *negatives) for text in relevant]
            else:
                left_out += 1
        if left_out:
            print(
                f"{self.name}: {left_out:,} of {len(questions):,} training questions are left out, with fewer than {n} "
                "hard negatives"
            )
        if len({text for _, text, *_ in rows}) < 2:
            raise ValueError(
                f"{self.name}: {len(rows)} training questions have {n} hard negatives, which is too few; take fewer "
                "hard negatives, or more questions"
            )
        names = ["query", "positive", *(f"negative_{k}" for k in range(1, n + 1))]
        return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))

    def measure(self, encoder: Encoder, query: str | None = None) -> Measured:
        asked = self.queries | ({EXAMPLE: query} if query else {})
        return self.scored(dense_search(encoder, self.documents, asked))

    def measure_bm25(self, reader: Encoder | None) -> Measured:
        return self.scored(bm25_search(self.documents, self.queries, reader=reader))

    def scored(self, found: Run) -> Measured:
        values = score_queries(found, self.qrels)
        about: dict[str, Any] = {"queries": len(self.queries), "documents": len(self.documents)}
        if self.train_qrels:
            seen = {text for _, text in self.train_pairs}
            relevant = {query: {self.documents[i] for i in self.relevant(query, self.qrels)} for query in values}
            unseen = [each for query, each in values.items() if not relevant[query] & seen]
            for each in unseen:
                each[UNSEEN] = each["ndcg@10"]
            mean = sum(each[UNSEEN] for each in unseen) / len(unseen) if unseen else None
            about |= {UNSEEN: mean, "queries_unseen": len(unseen)}
        best = islice(found.get(EXAMPLE, {}).items(), EXAMPLE_HITS)
        hits = [
            {"rank": rank, "id": i, "score": value, "text": textwrap.shorten(self.documents[i], 300)}
            for rank, (i, value) in enumerate(best, start=1)
        ]
        return Measured({"split": self.split} | means(values) | about, values, hits)


def read_collection(folder: Path, split: str = "test", n_queries: int | None = None) -> Collection:
    """A BEIR folder, where ``qrels/<split>.tsv`` is scored, or ``n_queries`` of it, always the same; ValueError for a
    missing file, a broken line, or judgements that do not belong to the corpus or the queries."""
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
    whole = Collection(
        name=full.parent.name if full.name == "beir" else full.name,
        split=split,
        documents=documents,
        queries={query: queries[query] for query in qrels},
        qrels=qrels,
        train_queries={query: queries[query] for query in train},
        train_qrels=train,
    )
    if n_queries is None or n_queries >= len(qrels):
        return whole
    return whole.part(random.Random(0).sample(sorted(qrels), n_queries))


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
