"""Retrieval on a folder in BEIR's layout: reading it, BM25, exact dense search, and trec_eval's metrics.

    corpus.jsonl {_id, title, text}   queries.jsonl {_id, text}   qrels/test.tsv, qrels/train.tsv (optional)

each plain or compressed (.gz, .xz, .zst). A title goes before its text, as in BEIR. Searches return a run,
``{query id: {document id: score}}``, of the ``TOP_K`` best documents per query, over which MAP is taken too.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condenser.data.corpus import COMPRESSED, opened

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Texts = dict[str, str]  # by id
Run = dict[str, dict[str, float]]
Qrels = dict[str, dict[str, int]]
TOP_K = 100
METRICS = ("ndcg@10", "mrr@10", "recall@100", "map")


@dataclass(frozen=True)
class Collection:
    name: str
    documents: Texts  # title and text
    queries: Texts  # those that `qrels` judges
    qrels: Qrels  # of test
    train_pairs: list[tuple[str, str]]  # texts of a query and a relevant document; none without qrels/train.tsv

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(vars(self)).encode()).hexdigest()[:16]


def read_collection(folder: Path) -> Collection:
    """Read a BEIR folder.

    Raises:
        ValueError: a missing file, a broken line, or judgements that do not belong to the corpus or the queries.
    """
    if not folder.is_dir():
        raise ValueError(f"no retrieval collection at {folder}: --retrieval takes a folder in BEIR's layout")
    documents = {i: f"{row.get('title') or ''} {row['text']}".strip() for i, row in read_rows(folder, "corpus.jsonl")}
    queries = {i: row["text"] for i, row in read_rows(folder, "queries.jsonl")}
    test = read_qrels(folder, "qrels/test.tsv", queries)
    train = read_qrels(folder, "qrels/train.tsv", queries) if any(folder.glob("qrels/train.tsv*")) else {}
    if not any(judged.keys() & documents.keys() for judged in test.values()):
        raise ValueError(f"{folder}: no document of qrels/test.tsv is in corpus.jsonl: do they belong together?")
    relevant = ((query, i) for query, judged in train.items() for i, grade in judged.items() if grade > 0)
    full = folder.resolve()
    return Collection(
        name=full.parent.name if full.name == "beir" else full.name,
        documents=documents,
        queries={query: queries[query] for query in test},
        qrels=test,
        train_pairs=[(queries[query], documents[i]) for query, i in relevant if i in documents],
    )


def read_lines(folder: Path, name: str) -> Iterator[tuple[str, str]]:
    """-> (where, line) of those that are not empty"""
    path = next((p for suffix in ("", *COMPRESSED) if (p := folder / (name + suffix)).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no {name} (plain or {', '.join(COMPRESSED)}), which this needs")
    with opened(path) as (file, _):
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", line.decode(errors="replace").rstrip("\r\n")


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


def bm25_search(documents: Texts, queries: Texts) -> Run:
    """bm25s with its defaults: k1 1.5, b 0.75, English stop words, no stemming. Documents without a match stay out."""
    import bm25s

    ids = list(documents)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(documents.values()), show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(list(queries.values()), show_progress=False)
    rows, scores = index.retrieve(tokens, k=min(TOP_K, len(ids)), show_progress=False)
    return {
        query: {ids[row]: float(score) for row, score in zip(*hits, strict=True) if score > 0}
        for query, *hits in zip(queries, rows, scores, strict=True)
    }


def dense_search(encoder: "SentenceTransformer", documents: Texts, queries: Texts) -> Run:
    """Exact search, in chunks, by the encoder's own similarity function."""
    from sentence_transformers.util import SimilarityFunction, semantic_search

    ids = list(documents)
    options: Any = {"convert_to_tensor": True, "show_progress_bar": sys.stderr.isatty()}
    passages = encoder.encode_document(list(documents.values()), **options)
    questions = encoder.encode_query(list(queries.values()), **options)
    similarity = SimilarityFunction.to_similarity_fn(encoder.similarity_fn_name)
    found = semantic_search(questions, passages, top_k=TOP_K, score_function=similarity)
    return {
        query: {ids[int(hit["corpus_id"])]: hit["score"] for hit in hits}
        for query, hits in zip(queries, found, strict=True)
    }


def score(run: Run, qrels: Qrels) -> dict[str, float]:
    """The metrics by trec_eval, averaged over the queries of ``qrels``; one without hits counts zero."""
    import pytrec_eval

    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recip_rank", f"recall.{TOP_K}", "map"})
    found = list(evaluator.evaluate(run).values())
    for values in found:
        values["mrr_10"] = values["recip_rank"] * (values["recip_rank"] >= 1 / 10)  # trec_eval's has no cut-off
    measures = ("ndcg_cut_10", "mrr_10", "recall_100", "map")
    return {
        metric: sum(values[measure] for values in found) / len(qrels)
        for metric, measure in zip(METRICS, measures, strict=True)
    }
