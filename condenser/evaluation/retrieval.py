"""Retrieval on a folder in BEIR's layout: reading it, BM25, exact dense search, and trec_eval's metrics.

    corpus.jsonl {_id, title, text}   queries.jsonl {_id, text}   qrels/test.tsv, qrels/train.tsv (optional)

each plain or compressed (.gz, .xz, .zst). A title goes before its text, as in BEIR. Searches return a run,
``{query id: {document id: score}}``, of the ``TOP_K`` best documents per query, over which MAP is taken too.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condenser.data.corpus import COMPRESSED, lines_of, open_lines

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Run = dict[str, dict[str, float]]
Qrels = dict[str, dict[str, int]]
TOP_K = 100
CUTOFF = 10
ENCODE_BATCH = 64
METRICS = ("ndcg@10", "mrr@10", "recall@100", "map")


@dataclass(frozen=True)
class Collection:
    name: str
    documents: dict[str, str]  # id -> title and text
    queries: dict[str, str]  # of all splits
    train: Qrels  # empty without qrels/train.tsv
    test: Qrels
    has_titles: bool
    fingerprint: str

    @property
    def test_queries(self) -> dict[str, str]:
        return {query: self.queries[query] for query in self.test}

    @property
    def train_pairs(self) -> list[tuple[str, str]]:
        """(query, relevant document) texts."""
        judged = ((q, d) for q, relevant in self.train.items() for d, score in relevant.items() if score > 0)
        return [(self.queries[q], self.documents[d]) for q, d in judged if d in self.documents]


def read_collection(folder: Path) -> Collection:
    """Read a BEIR folder.

    Raises:
        ValueError: a missing file, a broken line, or judgements that do not belong to the corpus or the queries.
    """
    if not folder.is_dir():
        raise ValueError(f"no retrieval collection at {folder}: --retrieval takes a folder in BEIR's layout")
    has_train = any((folder / "qrels").glob("train.tsv*"))
    qrels = {split: find(folder, f"qrels/{split}.tsv") for split in ("test", *(["train"] if has_train else []))}
    corpus, queries = find(folder, "corpus.jsonl"), find(folder, "queries.jsonl")
    rows = read_jsonl(corpus)
    full = folder.resolve()
    collection = Collection(
        name=full.parent.name if full.name == "beir" else full.name,
        documents={row["_id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in rows},
        queries={row["_id"]: row["text"] for row in read_jsonl(queries)},
        train=read_qrels(qrels["train"]) if has_train else {},
        test=read_qrels(qrels["test"]),
        has_titles=any(row.get("title") for row in rows),
        fingerprint=hash_files([corpus, queries, *qrels.values()]),
    )
    check_judgements(collection, folder)
    return collection


def find(folder: Path, name: str) -> Path:
    candidates = [folder / (name + suffix) for suffix in ("", *COMPRESSED)]
    found = [path for path in candidates if path.is_file()]
    if not found:
        raise ValueError(f"{folder} has no {name} (plain or {', '.join(COMPRESSED)}), which this needs")
    return found[0]


def read_jsonl(path: Path) -> list[dict]:
    rows = []
    with open_lines(str(path), lambda file, size, name: file) as file:
        for number, line in enumerate(lines_of(file, str(path)), start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in ("_id", "text")):
                raise ValueError(f"{path}, line {number}: not an object with the strings _id and text")
            rows.append(row)
    return rows


def read_qrels(path: Path) -> Qrels:
    """Queries with at least one relevant document. A first line that is no judgement is the header."""
    qrels: Qrels = {}
    with open_lines(str(path), lambda file, size, name: file) as file:
        for number, line in enumerate(lines_of(file, str(path)), start=1):
            try:
                query, document, score = line.decode().rstrip("\r\n").split("\t")
                qrels.setdefault(query, {})[document] = int(score)
            except ValueError:
                if number > 1:
                    raise ValueError(f"{path}, line {number}: not 'query-id<TAB>corpus-id<TAB>score'") from None
    return {query: judged for query, judged in qrels.items() if max(judged.values()) > 0}


def check_judgements(collection: Collection, folder: Path) -> None:
    for split, qrels in (("train", collection.train), ("test", collection.test)):
        if missing := qrels.keys() - collection.queries.keys():
            raise ValueError(f"{folder}: qrels/{split}.tsv judges query {min(missing)!r}, which queries.jsonl lacks")
    if not any(judged.keys() & collection.documents.keys() for judged in collection.test.values()):
        raise ValueError(f"{folder}: no document of qrels/test.tsv is in corpus.jsonl: do they belong together?")


def hash_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def bm25_search(documents: Mapping[str, str], queries: Mapping[str, str]) -> Run:
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


def dense_search(encoder: "SentenceTransformer", documents: Mapping[str, str], queries: Mapping[str, str]) -> Run:
    """Exact search, in chunks, by the encoder's own similarity function."""
    from sentence_transformers.util import SimilarityFunction, semantic_search

    ids = list(documents)
    options: dict[str, Any] = {"batch_size": ENCODE_BATCH, "convert_to_tensor": True, "show_progress_bar": True}
    passages = encoder.encode_document(list(documents.values()), **options)
    questions = encoder.encode_query(list(queries.values()), **options)
    similarity = SimilarityFunction.to_similarity_fn(encoder.similarity_fn_name)
    found = semantic_search(questions, passages, top_k=TOP_K, score_function=similarity)
    return {
        query: {ids[int(hit["corpus_id"])]: hit["score"] for hit in hits}
        for query, hits in zip(queries, found, strict=True)
    }


def score(run: Run, qrels: Qrels) -> dict[str, float]:
    """``METRICS`` by trec_eval, averaged over the queries of ``qrels``; one without hits counts zero."""
    import pytrec_eval

    whole = pytrec_eval.RelevanceEvaluator(qrels, {f"ndcg_cut.{CUTOFF}", f"recall.{TOP_K}", "map"}).evaluate(run)
    cut = {query: dict(best(hits, CUTOFF)) for query, hits in run.items()}
    first = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(cut)
    measured = ((whole, "ndcg_cut_10"), (first, "recip_rank"), (whole, "recall_100"), (whole, "map"))
    return {
        metric: sum(values[measure] for values in found.values()) / len(qrels)
        for metric, (found, measure) in zip(METRICS, measured, strict=True)
    }


def best(hits: Mapping[str, float], n: int) -> list[tuple[str, float]]:
    """The first ``n`` hits in trec_eval's order: by score, ties by id, both downwards."""
    return sorted(hits.items(), key=lambda hit: (hit[1], hit[0]), reverse=True)[:n]
