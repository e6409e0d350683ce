"""Searching a collection and scoring what is found: BM25, dense vectors, trec_eval's metrics.

Searches return a `Run`. Document vectors are made, compared and dropped chunk by chunk, so memory is bounded by a chunk
and the hits that are kept, whatever the size of the corpus.

Shapes: Q queries, C documents of a chunk, K hits that are kept, H width of a vector.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from condenser.evaluation.encoders import Encoder, encoded, tokens_read

Texts = dict[str, str]  # by id
Qrels = dict[str, dict[str, int]]
Values = dict[str, dict[str, float]]  # query id -> metric -> value

TOP_K = 1000  # hits of a query that are scored, as trec_eval's users have it
KEPT = TOP_K + 1  # by a search: scoring may leave out one, see `score_queries`
CHUNK = 10_000  # documents
QUERY_BLOCK = 256  # queries that are compared with a chunk at once
BM25 = (
    "bm25s: k1 0.9, b 0.4 (Anserini's defaults), English stop words, Snowball's English stemmer; pairs of characters "
    "in scripts without spaces"
)
UNSPACED = (  # Thai and Lao, Burmese, Khmer, kana, Han
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORDS = rf"[{UNSPACED}]+|\b\w\w+\b"
METRICS = {  # trec_eval's names; its reciprocal rank has no cut-off
    "ndcg@10": "ndcg_cut_10",
    "mrr@10": "recip_rank",
    "recall@100": "recall_100",
    "recall@1000": "recall_1000",
    "map": "map",
}


class Measured(NamedTuple):
    metrics: dict[str, Any]
    values: Values  # of each query or pair, for paired comparisons
    hits: Sequence[dict[str, Any]] = ()  # the first ones for --query


class Run(Mapping[str, dict[str, float]]):
    """By query id its hits, ``{document id: score}``, best first.

    Held as arrays: as dictionaries, 1,000 hits for each of 10,000 queries would take 0.7 GB.

    Args:
        rows: ``[Q, K]`` places among the documents, -1 for no hit
        scores: ``[Q, K]``
    """

    def __init__(self, queries: Iterable[str], documents: Iterable[str], rows: np.ndarray, scores: np.ndarray):
        self.places = {query: place for place, query in enumerate(queries)}
        self.documents, self.rows, self.scores = list(documents), rows, scores

    def __getitem__(self, query: str) -> dict[str, float]:
        rows, scores = (array[self.places[query]].tolist() for array in (self.rows, self.scores))
        return {self.documents[row]: score for row, score in zip(rows, scores, strict=True) if row >= 0}

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def bm25_search(documents: Texts, queries: Texts, kept: int = KEPT, reader: Encoder | None = None) -> Run:
    """With the settings in ``BM25``, on no more of each text than an encoder, its ``reader``, takes. Documents without
    a match stay out."""
    import bm25s
    from Stemmer import Stemmer

    words = {"token_pattern": WORDS, "stopwords": "en", "stemmer": Stemmer("english"), "show_progress": False}
    passages, questions = list(documents.values()), list(queries.values())
    if reader is not None:
        passages, questions = tokens_read(reader, passages, "document"), tokens_read(reader, questions, "query")
    tokens = bm25s.tokenize([spaced(text) for text in passages], **words)
    if not any(tokens.ids):  # nothing that could be found
        return Run(queries, documents, np.empty((len(queries), 0), int), np.empty((len(queries), 0)))
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(tokens, show_progress=False)
    asked = bm25s.tokenize([spaced(text) for text in questions], **words)
    rows, scores = index.retrieve(asked, k=min(kept, len(documents)), show_progress=False)
    return Run(queries, documents, np.where(scores > 0, rows, -1), scores)


def spaced(text: str) -> str:
    """Text whose runs of characters without spaces are pairs of neighbours, each a word, as in Lucene's CJK analyser.

    >>> spaced("去北京 by rail")
    ' 去北 北京  by rail'
    """
    return re.sub(f"[{UNSPACED}]+", lambda run: f" {' '.join(map(''.join, pairwise(run[0]))) or run[0]} ", text)


def dense_search(encoder: Encoder, documents: Texts, queries: Texts, chunk: int = CHUNK) -> Run:
    """All documents compared with all queries in fp32, by the encoder's own similarity function; a ``chunk`` of them is
    encoded, sorted by length, and compared at a time."""
    texts = list(documents.values())
    blocks = encoded(encoder, list(queries.values()), "query").split(QUERY_BLOCK)
    best = [(block.new_empty(len(block), 0), block.new_empty(len(block), 0, dtype=torch.int64)) for block in blocks]
    for start in range(0, len(texts), chunk):
        passages = encoded(encoder, texts[start : start + chunk], "document")
        for number, block in enumerate(blocks):
            found = encoder.similarity(block, passages).topk(min(KEPT, len(passages)))
            scores = torch.cat([best[number][0], found.values], dim=1)
            rows = torch.cat([best[number][1], found.indices + start], dim=1)
            kept = scores.topk(min(KEPT, scores.shape[1]))
            best[number] = kept.values, rows.gather(1, kept.indices)
    found_scores, found_rows = (torch.cat(parts).cpu().numpy() for parts in zip(*best, strict=True))
    return Run(queries, documents, found_rows, found_scores)


def score_queries(run: Mapping[str, dict[str, float]], qrels: Qrels) -> Values:
    """The metrics by trec_eval for each query of ``qrels``; of one without hits all are zero.

    A document with the query's id is left out, unless it is judged relevant: in some collections of BEIR the queries
    are themselves documents, and its own evaluation leaves them out. trec_eval puts equal scores in order of the ids.
    """
    import pytrec_eval

    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recip_rank", "recall.100,1000", "map"})
    values = {}
    for query, judged in qrels.items():
        hits = (hit for hit in run.get(query, {}).items() if hit[0] != query or judged.get(query, 0) > 0)
        found = evaluator.evaluate({query: dict(islice(hits, TOP_K))})[query]
        values[query] = {metric: found[name] for metric, name in METRICS.items()}
        if values[query]["mrr@10"] < 1 / 10:
            values[query]["mrr@10"] = 0.0
    return values


def score(run: Mapping[str, dict[str, float]], qrels: Qrels) -> dict[str, float]:
    return means(score_queries(run, qrels))


def means(values: Values) -> dict[str, float]:
    """The metrics, averaged over the queries."""
    return {metric: sum(each[metric] for each in values.values()) / len(values) for metric in METRICS}
