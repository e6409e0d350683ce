"""Searching a collection and scoring what is found: BM25, dense vectors, trec_eval's metrics.

Searches return a `Run`. Document vectors are made, compared and dropped chunk by chunk, so memory is bounded by a chunk
and the hits that are kept, whatever the size of the corpus.

Shapes: Q queries, C documents of a chunk, K hits that are kept, H width of a vector.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

Texts = dict[str, str]  # by id
Qrels = dict[str, dict[str, int]]
Values = dict[str, dict[str, float]]  # query id -> metric -> value
Index = Literal["exact", "faiss"]

TOP_K = 1000  # hits of a query that are scored, as trec_eval's users have it
KEPT = TOP_K + 1  # by a search: scoring may leave out one, see `score_queries`
CHUNK = 10_000  # documents
QUERY_BLOCK = 256  # queries that are compared with a chunk at once
LOW_BITS = 0xFFFFFFFF
BM25 = "bm25s: k1 0.9, b 0.4 (Anserini's defaults), English stop words, Snowball's English stemmer"
METRICS = {  # trec_eval's names; its reciprocal rank has no cut-off
    "ndcg@10": "ndcg_cut_10",
    "mrr@10": "recip_rank",
    "recall@100": "recall_100",
    "recall@1000": "recall_1000",
    "map": "map",
}


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


def bm25_search(documents: Texts, queries: Texts) -> Run:
    """With the settings in ``BM25``. Documents without a match stay out."""
    import bm25s
    from Stemmer import Stemmer

    words = {"stopwords": "en", "stemmer": Stemmer("english"), "show_progress": False}
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(bm25s.tokenize(list(documents.values()), **words), show_progress=False)
    tokens = bm25s.tokenize(list(queries.values()), **words)
    rows, scores = index.retrieve(tokens, k=min(KEPT, len(documents)), show_progress=False)
    return Run(queries, documents, np.where(scores > 0, rows, -1), scores)


def dense_search(
    encoder: "SentenceTransformer", documents: Texts, queries: Texts, *, index: Index = "exact", chunk: int = CHUNK
) -> Run:
    """All documents compared with all queries in fp32, by the encoder's own similarity function.

    Equal scores are in the order of the documents, except that faiss may choose others among those at the end.

    Args:
        index: "exact" compares with torch, on the encoder's device; "faiss" by a flat index, for cosine or dot product
        chunk: documents that are encoded, sorted by length, and compared at a time
    """
    import torch
    from tqdm import tqdm

    nearest = nearest_by(index, encoder.similarity_fn_name or "cosine")
    one_chunk, terminal = len(documents) <= chunk, sys.stderr.isatty()
    options: Any = {"convert_to_tensor": True, "show_progress_bar": one_chunk and terminal}
    questions = encoder.encode_query(list(queries.values()), **options).float().split(QUERY_BLOCK)
    texts = list(documents.values())
    best = [torch.empty(len(block), 0, dtype=torch.int64, device=block.device) for block in questions]
    starts = range(0, len(texts), chunk)
    for start in tqdm(starts, f"chunks of {chunk:,} documents", leave=False, disable=one_chunk or not terminal):
        passages = encoder.encode_document(texts[start : start + chunk], **options).float()
        if not passages.isfinite().all():
            raise ValueError("the encoder's vectors are not finite: its weights are broken, or too large for its dtype")
        for number, block in enumerate(questions):
            scores, rows = nearest(block, passages)
            keys = torch.cat([best[number], sortable(scores, rows + start)], dim=1)
            best[number] = keys.topk(min(KEPT, keys.shape[1])).values
    scores, rows = unsorted(torch.cat(best).cpu())
    return Run(queries, documents, rows.numpy(), scores.numpy())


def nearest_by(index: Index, similarity: str) -> "Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]":
    """-> a function of questions ``[Q, H]`` and passages ``[C, H]`` that gives scores ``[Q, C]`` and rows ``[C]``, or
    those of the best with faiss, both ``[Q, K]``"""
    import torch
    from sentence_transformers.util import SimilarityFunction, normalize_embeddings

    def exact(questions: "Tensor", passages: "Tensor") -> "tuple[Tensor, Tensor]":
        scores = SimilarityFunction.to_similarity_fn(similarity)(questions, passages)
        return scores, torch.arange(len(passages), device=scores.device)

    def flat(questions: "Tensor", passages: "Tensor") -> "tuple[Tensor, Tensor]":
        device = questions.device
        if similarity == "cosine":
            questions, passages = normalize_embeddings(questions), normalize_embeddings(passages)
        vectors = faiss.IndexFlatIP(passages.shape[1])
        vectors.add(passages.cpu().numpy())
        scores, rows = vectors.search(questions.cpu().numpy(), min(KEPT, len(passages)))
        return torch.from_numpy(scores).to(device), torch.from_numpy(rows).to(device)

    if index == "exact":
        return exact
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"index 'faiss' compares by cosine or dot product, the encoder by {similarity}: use 'exact'")
    try:
        import faiss
    except ImportError:
        raise ImportError("index 'faiss' needs faiss: pip install 'condenser[faiss]'") from None
    return flat


def sortable(scores: "Tensor", rows: "Tensor") -> "Tensor":
    """fp32 scores and rows -> int64 in whose order higher scores come first and, among equals, lower rows."""
    import torch

    bits = (scores + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of negative numbers, higher bits are lower numbers
    return (ordered.long() << 32) | (LOW_BITS - rows)


def unsorted(keys: "Tensor") -> "tuple[Tensor, Tensor]":
    """The scores and rows that `sortable` was given."""
    import torch

    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), LOW_BITS - (keys & LOW_BITS)


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
    """The metrics, averaged over the queries of ``qrels``."""
    return means(score_queries(run, qrels))


def means(values: Values) -> dict[str, float]:
    return {metric: sum(each[metric] for each in values.values()) / len(values) for metric in METRICS}
