"""Searches against brute force, metrics and BM25 written out by hand, and the comparison of two models."""

import json
import math
import random
import sys
import weakref
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from condenser.cli import main
from condenser.evaluation import comparison, search
from condenser.evaluation.comparison import paired, paired_bootstrap, read_queries, write_queries
from condenser.evaluation.mteb_tasks import run_mteb


class Vectors:
    """An encoder of texts that are numbers of rows."""

    def __init__(self, documents, queries, similarity="dot"):
        self.documents, self.queries, self.similarity_fn_name = documents, queries, similarity
        self.encoded, self.alive, self.most_alive = [], [], 0

    def encode_query(self, texts, **options):
        return self.queries[[int(text) for text in texts]]

    def encode_document(self, texts, **options):
        self.most_alive = max(self.most_alive, 1 + sum(reference() is not None for reference in self.alive))
        self.encoded.append(len(texts))
        vectors = self.documents[[int(text) for text in texts]]
        self.alive.append(weakref.ref(vectors))
        return vectors


def numbered(letter, n):
    return {f"{letter}{i}": str(i) for i in range(n)}


def integer_vectors(n_documents, n_queries, seed=0):
    """Of few values: their products are exact and often equal."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randint(-2, 3, (n, 4), generator=draw).float() for n in (n_documents, n_queries))


def order(run):
    return {query: list(hits.items()) for query, hits in run.items()}


# --- searches


@pytest.mark.parametrize("chunk", [1, 7, 64, 500, 1000])
def test_chunks_do_not_change_what_is_found_and_equal_scores_keep_the_order_of_the_documents(chunk, monkeypatch):
    monkeypatch.setattr(search, "KEPT", 20)
    monkeypatch.setattr(search, "QUERY_BLOCK", 3)
    documents, queries = integer_vectors(500, 8)
    scores = (queries @ documents.T).tolist()
    best = [sorted(range(500), key=lambda i, of=row: (-of[i], i))[:20] for row in scores]
    run = search.dense_search(Vectors(documents, queries), numbered("d", 500), numbered("q", 8), chunk=chunk)
    assert order(run) == {f"q{q}": [(f"d{i}", scores[q][i]) for i in rows] for q, rows in enumerate(best)}


def test_memory_holds_one_chunk_of_vectors_and_the_hits_that_are_kept(monkeypatch):
    monkeypatch.setattr(search, "KEPT", 20)
    documents, queries = integer_vectors(500, 8)
    encoder = Vectors(documents, queries)
    run = search.dense_search(encoder, numbered("d", 500), numbered("q", 8), chunk=40)
    assert encoder.encoded == [40] * 12 + [20]
    assert encoder.most_alive <= 2  # the last one is let go when the next is there
    assert run.rows.shape == run.scores.shape == (8, 20)


@given(st.lists(st.tuples(st.floats(width=32, allow_nan=False), st.integers(0, 2**32 - 1)), min_size=1, max_size=20))
def test_sortable_keys_are_ordered_by_score_then_row_and_can_be_undone(hits):
    scores, rows = torch.tensor([score for score, _ in hits]), torch.tensor([row for _, row in hits])
    keys = search.sortable(scores, rows)
    again = search.unsorted(keys)
    assert torch.equal(again[0], scores)
    assert torch.equal(again[1], rows)
    by_key = sorted(range(len(hits)), key=lambda i: -int(keys[i]))
    assert [hits[i] for i in by_key] == sorted(hits, key=lambda hit: (-hit[0], hit[1]))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_faiss_finds_what_exact_search_finds(similarity, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(search, "KEPT", 30)
    draw = torch.Generator().manual_seed(1)
    encoder = Vectors(*(torch.randn(n, 16, generator=draw) for n in (400, 6)), similarity)
    exact, flat = (
        search.dense_search(encoder, numbered("d", 400), numbered("q", 6), index=index, chunk=150)
        for index in ("exact", "faiss")
    )
    for query, hits in exact.items():
        assert list(flat[query]) == list(hits)
        assert list(flat[query].values()) == pytest.approx(list(hits.values()), abs=1e-5)


def test_faiss_is_refused_where_it_cannot_compare_or_is_not_installed(monkeypatch):
    for similarity, kind, message in (
        ("euclidean", ValueError, "by euclidean: use 'exact'"),
        ("dot", ImportError, r"condenser\[faiss\]"),
    ):
        monkeypatch.setitem(sys.modules, "faiss", None)
        encoder = Vectors(*integer_vectors(5, 2), similarity)
        with pytest.raises(kind, match=message):
            search.dense_search(encoder, numbered("d", 5), numbered("q", 2), index="faiss")


def test_vectors_of_half_precision_are_compared_in_fp32():
    documents, queries = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).half() for n in (30, 4))
    run = search.dense_search(Vectors(documents, queries), numbered("d", 30), numbered("q", 4))
    found = [[run[f"q{q}"][f"d{d}"] for d in range(30)] for q in range(4)]
    np.testing.assert_allclose(found, (queries.double() @ documents.double().T).numpy(), rtol=1e-5, atol=1e-5)


def test_vectors_that_are_not_finite_are_refused():
    documents, queries = integer_vectors(5, 2)
    documents[3, 1] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        search.dense_search(Vectors(documents, queries), numbered("d", 5), numbered("q", 2))


def test_bm25_equals_the_formula():
    words = ["tin", "cup", "sun", "red", "fox"]  # neither stopped nor stemmed
    draw = random.Random(0)
    documents = {f"d{i}": " ".join(draw.choices(words, k=draw.randint(1, 9))) for i in range(30)}
    queries = {"a": "red fox", "b": "tin", "c": "moon"}
    counts = {i: Counter(text.split()) for i, text in documents.items()}
    average = sum(map(Counter.total, counts.values())) / len(counts)

    def weight(word, i):
        held, tf = sum(word in count for count in counts.values()), counts[i][word]
        idf = math.log(1 + (len(counts) - held + 0.5) / (held + 0.5)) if held else 0.0
        return idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * counts[i].total() / average))

    run = search.bm25_search(documents, queries)
    for query, text in queries.items():
        expected = {i: sum(weight(word, i) for word in text.split()) for i in documents}
        assert run[query] == pytest.approx({i: value for i, value in expected.items() if value > 0}, rel=1e-5)


def test_bm25_stems():
    run = search.bm25_search({"a": "the encoder retrieves", "b": "a fox"}, {"q": "retrieving encoders", "none": "the"})
    assert {query: list(hits) for query, hits in run.items()} == {"q": ["a"], "none": []}


# --- metrics


def metrics_by_hand(hits, judged):
    """trec_eval's for one query. hits: {document: score}"""
    ranked = sorted(hits, key=lambda i: (hits[i], i), reverse=True)[:1000]  # of equal scores the last id first
    relevant = {i for i, grade in judged.items() if grade > 0}
    places = [rank for rank, i in enumerate(ranked, start=1) if i in relevant]
    gains = [max(judged.get(i, 0), 0) for i in ranked[:10]]
    ideal = sorted((judged[i] for i in relevant), reverse=True)[:10]

    def dcg(grades):
        return sum(grade / math.log2(rank + 1) for rank, grade in enumerate(grades, start=1))

    return {
        "ndcg@10": dcg(gains) / dcg(ideal),
        "mrr@10": 1 / places[0] if places and places[0] <= 10 else 0.0,
        "recall@100": sum(rank <= 100 for rank in places) / len(relevant),
        "recall@1000": len(places) / len(relevant),
        "map": sum(n / rank for n, rank in enumerate(places, start=1)) / len(relevant),
    }


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_those_written_out_by_hand(seed):
    draw = random.Random(seed)
    documents = [f"d{i}" for i in range(1500)]
    qrels, run = {}, {}
    for q in range(40):
        judged = draw.sample(documents, draw.randint(1, 200))
        qrels[f"q{q}"] = {judged[0]: 2} | {i: draw.choice([-1, 0, 0, 1, 1, 2, 3]) for i in judged[1:]}
        found = draw.sample(documents, draw.choice([0, 1, 5, 30, 400, 1000]))
        found = list(dict.fromkeys([*found, *judged[: len(found) // 3]]))[:1000]
        levels = draw.choice([3, 50, 10**6])  # few levels: many equal scores
        hits = {i: float(draw.randrange(levels)) for i in found}
        run[f"q{q}"] = dict(sorted(hits.items(), key=lambda hit: -hit[1]))
    del run["q7"]
    values = search.score_queries(run, qrels)
    assert list(values) == list(qrels)
    for query, judged in qrels.items():
        assert values[query] == pytest.approx(metrics_by_hand(run.get(query, {}), judged), abs=1e-12), query
    means = {metric: sum(each[metric] for each in values.values()) / 40 for metric in search.METRICS}
    assert search.score(run, qrels) == pytest.approx(means)
    assert values["q7"] == dict.fromkeys(search.METRICS, 0.0)


def test_a_query_that_is_itself_a_document_is_left_out_unless_judged_relevant():
    hits = {"x": 3.0, "y": 2.0, "z": 1.0}
    qrels = {"x": {"y": 1}, "y": {"x": 0, "y": 1}, "z": {"x": 1, "z": 0}}
    values = search.score_queries(dict.fromkeys(qrels, hits), qrels)
    assert {query: each["mrr@10"] for query, each in values.items()} == {"x": 1.0, "y": 1 / 2, "z": 1.0}


def test_a_thousand_hits_are_scored_beside_the_query_itself():
    documents = {"q": "1500"} | numbered("d", 1500)
    descending = torch.arange(1501, 0, -1.0)[:, None].roll(-1, 0)  # d0 first, and "q" before all
    descending[1500] = 2000
    run = search.dense_search(Vectors(descending, torch.ones(1, 1)), documents, {"q": "0"}, chunk=400)
    assert list(run["q"])[:2] == ["q", "d0"]
    qrels = {"q": {"d0": 1, "d999": 1, "d1000": 1}}
    assert search.score(run, qrels)["recall@1000"] == pytest.approx(2 / 3)


# --- two models


def write_folder(folder, shift=0.0, collection="farm", n=50, **row):
    """An output folder with one row of values around 0.5 + shift."""
    base = np.random.default_rng(0).uniform(0.2, 0.6, n)
    noise = np.random.default_rng(1).normal(0, 0.05, n)
    found = base + shift + (noise if shift else 0)
    values = {f"q{i}": {"ndcg@10": float(value), "map": float(value) / 2} for i, value in enumerate(found)}
    write_queries(folder, f"{collection}{row}", {"collection": collection, "model": "pre-trained"} | row, values)
    return str(folder)


def compared(tmp_path, *folders, **options):
    comparison.compare(*folders, json=str(tmp_path / "found.json"), samples=2000, **options)
    return json.loads((tmp_path / "found.json").read_text())["rows"]


def test_values_of_queries_are_kept_beside_their_row(tmp_path):
    values = {"q1": {"map": 0.25}, "q2": {"map": 1.0}}
    write_queries(tmp_path, "abc", {"collection": "farm"}, values)
    assert json.loads((tmp_path / "queries/abc.json").read_text()) == {"row": {"collection": "farm"}, "values": values}
    assert read_queries(tmp_path) == [({"collection": "farm"}, values)]


def test_a_model_compared_with_itself_does_not_differ(tmp_path):
    folder = write_folder(tmp_path / "a")
    (row,) = compared(tmp_path, folder, folder)
    assert (row["difference"], row["low"], row["high"], row["p"], row["queries"]) == (0, 0, 0, 1, 50)


def test_the_other_order_gives_the_mirror_image(tmp_path):
    a, b = write_folder(tmp_path / "a"), write_folder(tmp_path / "b", shift=0.01)
    (one,), (other,) = compared(tmp_path, a, b, metric="map"), compared(tmp_path, b, a, metric="map")
    assert one["difference"] == -other["difference"] == pytest.approx(one["b"] - one["a"])
    assert (one["low"], one["high"]) == pytest.approx((-other["high"], -other["low"]))
    assert one["p"] == other["p"]
    assert one["low"] < one["difference"] < one["high"]


def test_interval_and_p_value_agree_with_scipy():
    differences = np.random.default_rng(3).gamma(1.0, 0.1, 60) - 0.085  # skewed
    low, high, p = paired_bootstrap(differences, 20_000, seed=0)
    theirs = scipy.stats.bootstrap((differences,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    spread = differences.std() / math.sqrt(60)
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.06 * spread)
    signs = scipy.stats.permutation_test(
        (differences, np.zeros(60)), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=20_000, rng=1
    )
    assert 0.01 < p < 0.5
    assert p == pytest.approx(signs.pvalue, abs=0.03)


def test_intervals_hold_the_true_difference_as_often_as_they_say():
    rng = np.random.default_rng(0)
    trials, held, rejected = 600, 0, 0
    for trial in range(trials):
        low, high, p = paired_bootstrap(rng.choice([-0.5, 0.0, 0.0, 0.5], 80), 500, seed=trial)
        held += low <= 0 <= high
        rejected += p < 0.05
    assert 0.92 < held / trials < 0.98
    assert 0.02 < rejected / trials < 0.08


def test_rows_are_paired_by_collection_model_and_seed(tmp_path, capsys):
    for name, shift in (("a", 0.0), ("b", 0.1)):
        for row in ({"fine_tuned": False}, {"fine_tuned": True, "seed": 1}, {"fine_tuned": True, "seed": 2}):
            write_folder(tmp_path / name, shift=shift, **row)
    write_folder(tmp_path / "b", collection="town", fine_tuned=False)
    a, b = (str(tmp_path / name) for name in "ab")
    assert main(["evaluate", "compare", a, b, "--samples", "200", "--json", str(tmp_path / "new/found.json")]) == 0
    found = json.loads((tmp_path / "new/found.json").read_text())
    assert sorted((row["fine_tuned"], row["seed"] or 0) for row in found["rows"]) == [(False, 0), (True, 1), (True, 2)]
    assert (found["metric"], found["samples"], found["seed"]) == ("ndcg@10", 200, 0)
    assert "B - A" in capsys.readouterr().out


def write_similarity(folder, noise, n=60, **row):
    """Cosines that follow the scores, which have ties, but for noise."""
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 11, n) / 2
    cosines = scores / 5 + noise * rng.normal(size=n)
    values = {str(i): {"cosine": float(cosines[i]), "score": float(scores[i])} for i in range(n)}
    row = {"task": "similarity", "collection": "sts", "model": "pre-trained"} | row
    write_queries(folder, f"similarity{row}", row, values)
    return str(folder), cosines, scores


def test_similarity_is_compared_by_correlations_of_drawn_pairs(tmp_path, capsys):
    a, ours, scores = write_similarity(tmp_path / "a", 0.8)
    b, theirs, _ = write_similarity(tmp_path / "b", 0.5)
    write_folder(tmp_path / "a")  # of retrieval, left alone
    for metric, function in (("spearman", scipy.stats.spearmanr), ("pearson", scipy.stats.pearsonr)):
        (row,) = compared(tmp_path, a, b, metric=metric)
        expected = [function(cosines, scores).statistic for cosines in (ours, theirs)]
        assert [row["a"], row["b"]] == pytest.approx(expected)
        assert row["difference"] == pytest.approx(expected[1] - expected[0])

        def difference(x, y, z, of=function):
            return of(y, z).statistic - of(x, z).statistic

        again = scipy.stats.bootstrap(
            (ours, theirs, scores), difference, paired=True, vectorized=False, n_resamples=2000, method="percentile",
            rng=1,
        ).confidence_interval  # fmt: skip
        assert (row["low"], row["high"]) == pytest.approx(tuple(again), abs=0.1 * (again.high - again.low))
        assert (row["pairs"], row["low"] > 0, row["p"] < 0.05) == (60, True, True)
    assert "pairs" in capsys.readouterr().out
    (row,) = compared(tmp_path, a, a, metric="spearman")
    assert (row["difference"], row["p"]) == (0, 1)


def test_a_row_is_compared_with_one_of_the_same_split(tmp_path):
    a, b = write_folder(tmp_path / "a"), write_folder(tmp_path / "b", shift=0.1, split="test")  # test is the default
    assert compared(tmp_path, a, b)[0]["split"] == "test"
    with pytest.raises(ValueError, match=r"share no row: .* split test; and .* split dev"):
        comparison.compare(a, write_folder(tmp_path / "c", split="dev"))


def test_what_cannot_be_compared_is_refused(tmp_path):
    a = write_folder(tmp_path / "a", fine_tuned=True, seed=1)
    (tmp_path / "empty").mkdir()
    for other, options, message in (
        (str(tmp_path / "empty"), {}, r"empty has no queries/\*\.json"),
        (write_folder(tmp_path / "b", collection="town"), {}, "share no row: .*farm: pre-trained, fine-tuned, seed 1"),
        (write_folder(tmp_path / "c", n=40, fine_tuned=True, seed=1), {}, "not the same queries"),
        (a, {"metric": "ndcg"}, "--metric ndcg is not among map, ndcg@10"),
        (a, {"samples": 0}, "--samples 0"),
        (a, {"metric": "spearman"}, "of similarity: .* another --metric"),
    ):
        with pytest.raises(ValueError, match=message):
            comparison.compare(a, other, **options)
    with pytest.raises(ValueError, match="not the same queries or pairs"):
        paired({"0": {"cosine": 1, "score": 1}}, {"0": {"cosine": 1, "score": 2}}, "spearman", "here")
    write_queries(tmp_path / "a", "stale", *read_queries(tmp_path / "a")[0])
    with pytest.raises(ValueError, match="twice: evaluate again"):
        comparison.compare(a, a)


# --- MTEB


def test_a_missing_mteb_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ImportError, match=r"condenser\[mteb\]"):
        run_mteb(None, ["SciFact"], [])


@pytest.mark.skipif(find_spec("mteb") is None, reason="mteb is not installed")
def test_tasks_of_mteb_run_by_name_and_unknown_or_unreachable_ones_are_named(tiny_export, monkeypatch):
    import mteb
    from mteb.mocks.mock_tasks.retrieval import MockRetrievalTask

    from condenser.evaluation.encoders import load_encoder

    encoder = load_encoder(str(tiny_export), 32)
    with pytest.raises(ValueError, match=r"'SciFac': .*Did you mean: 'SciFact'"):
        run_mteb(encoder, ["NanoBEIR", "SciFac"], [])
    with pytest.raises(ValueError, match="SciFact could not be loaded"):
        run_mteb(encoder, ["SciFact"], [])
    monkeypatch.setattr(mteb, "get_task", lambda name: MockRetrievalTask())
    (row,) = run_mteb(encoder, ["MockRetrievalTask"], [])
    assert (row["collection"], row["metric"]) == ("MockRetrievalTask", "ndcg_at_10")
    assert 0.5 < row["score"] <= 1
