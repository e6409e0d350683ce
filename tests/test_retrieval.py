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

from condenser.cli import main
from condenser.evaluation import comparison, search
from condenser.evaluation.comparison import interval, paired
from condenser.evaluation.encoders import load_encoder
from condenser.evaluation.jobs import fingerprint, read_rows
from condenser.evaluation.mteb_tasks import find_tasks, run_mteb


class Vectors:
    """An encoder of texts that are numbers of rows."""

    device = torch.device("cpu")

    def __init__(self, documents, queries):
        self.documents, self.queries = documents, queries
        self.encoded, self.alive, self.most_alive = [], [], 0

    def encode_query(self, texts, **options):
        return self.queries[[int(text) for text in texts]]

    def encode_document(self, texts, **options):
        self.most_alive = max(self.most_alive, 1 + sum(reference() is not None for reference in self.alive))
        self.encoded.append(len(texts))
        vectors = self.documents[[int(text) for text in texts]]
        self.alive.append(weakref.ref(vectors))
        return vectors

    def similarity(self, queries, documents):
        return queries @ documents.T


def numbered(letter, n):
    return {f"{letter}{i}": str(i) for i in range(n)}


def integer_vectors(n_documents, n_queries):
    """Of few values: their products are exact and often equal."""
    draw = torch.Generator().manual_seed(0)
    return (torch.randint(-2, 3, (n, 4), generator=draw).float() for n in (n_documents, n_queries))


# --- searches


@pytest.mark.parametrize("chunk", [1, 7, 64, 500, 1000])
def test_search_finds_the_best_of_all_documents_with_one_chunk_of_vectors_in_memory(chunk, monkeypatch):
    monkeypatch.setattr(search, "KEPT", 20)
    monkeypatch.setattr(search, "QUERY_BLOCK", 3)
    documents, queries = integer_vectors(500, 8)
    scores = (queries @ documents.T).tolist()
    encoder = Vectors(documents, queries)
    run = search.dense_search(encoder, numbered("d", 500), numbered("q", 8), chunk=chunk)
    assert max(encoder.encoded) == min(chunk, 500)
    assert encoder.most_alive <= 2  # the last one is let go when the next is there
    assert run.rows.shape == run.scores.shape == (8, 20)
    for q, row in enumerate(scores):
        assert list(run[f"q{q}"].values()) == sorted(row, reverse=True)[:20]
        assert all(row[int(document[1:])] == score for document, score in run[f"q{q}"].items())


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


CHINESE_AND_THAI = {"a": "我们坐火车去北京", "b": "上海的天气很好", "c": "ไปเชียงใหม่โดยรถไฟ", "d": "by train to 京"}


@pytest.mark.parametrize(
    ("documents", "queries", "found"),
    [
        ({"a": "the encoder retrieves", "b": "a fox"}, ["retrieving encoders", "the"], [["a"], []]),  # by stems
        (CHINESE_AND_THAI, ["去北京 的火车", "天气怎么样?", "เชียงใหม่", "京"], [["a"], ["b"], ["c"], ["d"]]),
        ({"a": "", "b": "?"}, ["fox"], [[]]),
        ({"a": "fox"}, [""], [[]]),
    ],
)
def test_bm25_finds_words_whatever_the_script(documents, queries, found):
    run = search.bm25_search(documents, dict(enumerate(queries)))
    assert [list(run[number]) for number in range(len(queries))] == found


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


def write_row(folder, row, values):
    """As the command does: a file for the row, named in results.json."""
    mark, path = fingerprint(row), folder / "results.json"
    marks = json.loads(path.read_text())["fingerprints"] if path.exists() else []
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    (folder / f"rows/{mark}.json").write_text(json.dumps({"row": row, "values": values}))
    path.write_text(json.dumps({"fingerprints": [*marks, mark]}))


def write_folder(folder, shift=0.0, collection="farm", n=50, **row):
    """An output folder with one row of values around 0.5 + shift."""
    base = np.random.default_rng(0).uniform(0.2, 0.6, n)
    noise = np.random.default_rng(1).normal(0, 0.05, n)
    found = base + shift + (noise if shift else 0)
    values = {f"q{i}": {"ndcg@10": float(value), "map": float(value) / 2} for i, value in enumerate(found)}
    write_row(folder, {"collection": collection, "model": "pre-trained", "split": "test"} | row, values)
    return str(folder)


def compared(tmp_path, *folders, **options):
    comparison.compare(*folders, json=str(tmp_path / "found.json"), samples=2000, **options)
    return json.loads((tmp_path / "found.json").read_text())["rows"]


@pytest.mark.parametrize("name", ["a", "a[1]"])  # which is a pattern too
def test_a_model_compared_with_itself_does_not_differ(tmp_path, name):
    folder = write_folder(tmp_path / name)
    (row,) = compared(tmp_path, folder, folder)
    assert (row["difference"], row["low"], row["high"]) == (0, 0, 0)
    assert (row["queries"], row["seeds"], row["split"]) == (50, 1, "test")


def test_the_interval_agrees_with_scipy_and_the_other_order_mirrors_it(tmp_path):
    a, b = write_folder(tmp_path / "a"), write_folder(tmp_path / "b", shift=0.01)
    (one,), (other,) = compared(tmp_path, a, b), compared(tmp_path, b, a)
    assert one["difference"] == pytest.approx(-other["difference"])
    assert (one["low"], one["high"]) == pytest.approx((-other["high"], -other["low"]))
    ours, theirs = (np.array([each["ndcg@10"] for each in read_rows(tmp_path / name)[0][1].values()]) for name in "ab")
    again = scipy.stats.ttest_1samp(theirs - ours, 0).confidence_interval(0.95)
    spread = (theirs - ours).std() / math.sqrt(50)
    assert (one["low"], one["high"]) == pytest.approx(tuple(again), abs=0.1 * spread)


@pytest.mark.parametrize(
    ("n_seeds", "n", "seeds", "queries", "own"),
    [
        (1, 5, 0, 0.2, 0.1),
        (2, 40, 0.05, 0.02, 0.02),
        (3, 40, 0.05, 0.2, 0.1),
        (8, 40, 0.05, 0.2, 0.1),
        (2, 40, 0, 0.2, 0.1),
    ],
)
def test_intervals_hold_the_true_difference_of_queries_and_seeds_as_often_as_they_say(n_seeds, n, seeds, queries, own):
    rng, trials, held = np.random.default_rng(0), 200, 0
    for trial in range(trials):
        of_seeds, of_queries = rng.normal(0, seeds, (n_seeds, 1)), rng.normal(0, queries, (1, n))
        differences = of_seeds + of_queries + rng.normal(0, own, (n_seeds, n))
        found = interval(np.stack([np.zeros_like(differences), differences], axis=-1), "map", 100, seed=trial)
        held += found["low"] <= 0 <= found["high"]
    assert 0.9 < held / trials < 0.99


def test_rows_are_paired_by_collection_model_and_seeds_of_both_kinds(tmp_path, capsys):
    for name, shift in (("a", 0.0), ("b", 0.1)):
        for pretrained in (1, 2):
            folder = tmp_path / f"{name}-{pretrained}"
            for row in ({"fine_tuned": False}, {"fine_tuned": True, "seed": 1}, {"fine_tuned": True, "seed": 2}):
                write_folder(folder, shift=shift, **row)
    write_folder(tmp_path / "b-1", collection="town", fine_tuned=False)
    write_folder(tmp_path / "a-2", fine_tuned=True, seed=5)
    a, b = (str(tmp_path / f"{name}-*") for name in "ab")
    assert main(["evaluate", "compare", a, b, "--samples", "200", "--json", str(tmp_path / "new/found.json")]) == 0
    found = json.loads((tmp_path / "new/found.json").read_text())
    assert sorted((row["fine_tuned"], row["seeds"]) for row in found["rows"]) == [(False, 2), (True, 4)]
    assert (found["metric"], found["samples"], found["seed"]) == ("ndcg@10", 200, 0)
    said = capsys.readouterr().out
    assert "B - A" in said
    assert "A alone has seeds 5 of farm (test): pre-trained" in said


def test_folders_are_paired_by_the_seed_in_their_names_and_those_without_a_partner_are_said(tmp_path, capsys):
    for seed in (0, 1, 2, 10):
        write_folder(tmp_path / f"a-seed={seed}", shift=seed)
    for seed in (2, 10):
        write_folder(tmp_path / f"b-seed={seed}", shift=seed)
    a, b = (str(tmp_path / f"{name}-seed=*") for name in "ab")
    (row,) = compared(tmp_path, a, b)
    assert (row["seeds"], row["difference"], row["low"], row["high"]) == (2, 0, 0, 0)
    left_out = ", ".join(str(tmp_path / f"a-seed={seed}") for seed in (0, 1))
    assert f"left out, as the other has no such seed: {left_out}\n" in capsys.readouterr().out
    (row,) = compared(tmp_path, str(tmp_path / "a-seed=[01]"), b)  # no seed in common: in their order
    assert row["seeds"] == 2


def write_similarity(folder, noise, n=60, **row):
    """Cosines that follow the scores, which have ties, but for noise."""
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 11, n) / 2
    cosines = scores / 5 + noise * rng.normal(size=n)
    values = {str(i): {"cosine": float(cosines[i]), "score": float(scores[i])} for i in range(n)}
    row = {"task": "similarity", "collection": "sts", "model": "pre-trained"} | row
    write_row(folder, row, values)
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

        options = {"paired": True, "vectorized": False, "n_resamples": 1000, "method": "percentile", "rng": 1}
        again = scipy.stats.bootstrap((ours, theirs, scores), difference, **options).confidence_interval
        assert (row["low"], row["high"]) == pytest.approx(tuple(again), abs=0.1 * (again.high - again.low))
        assert (row["pairs"], row["low"] > 0) == (60, True)
    assert "pairs" in capsys.readouterr().out
    few, _, _ = write_similarity(tmp_path / "few", 0.8, n=3)  # some draws have one pair three times
    for one, other in ((a, a), (few, few)):
        (row,) = compared(tmp_path, one, other, metric="spearman")
        assert (row["difference"], row["low"], row["high"]) == (0, 0, 0)


def test_what_cannot_be_compared_is_refused(tmp_path):
    a = write_folder(tmp_path / "a", fine_tuned=True, seed=1)
    for name in ("empty", "lost", "broken", "mangled", "other"):
        (tmp_path / name / "rows").mkdir(parents=True)
    (tmp_path / "mangled/results.json").write_text('{"fingerprints": 3}')
    (tmp_path / "other/results.json").write_text('{"fingerprints": ["0"]}')
    (tmp_path / "other/rows/0.json").write_text('{"row": {}}')
    (tmp_path / "lost/results.json").write_text('{"fingerprints": ["0"]}')
    (tmp_path / "broken/results.json").write_text('{"fingerprints"')
    for name in ("p-1", "p-2"):
        write_folder(tmp_path / name)
    for other, options, message in (
        (str(tmp_path / "empty"), {}, "empty has no rows of retrieval"),
        (str(tmp_path / "lost"), {}, "lost/rows lacks rows, or they are damaged"),
        (str(tmp_path / "mangled"), {}, "mangled/rows lacks rows, or they are damaged"),
        (str(tmp_path / "other"), {}, "other/rows lacks rows, or they are damaged"),
        (str(tmp_path / "broken"), {}, "broken/results.json cannot be read"),
        (str(tmp_path / "p-*"), {}, "these are not equally many: .*/a and .*/p-1, .*/p-2"),
        (write_folder(tmp_path / "b", collection="town"), {}, "share no row: .*farm .test.: pre-trained"),
        (write_folder(tmp_path / "d", split="dev"), {}, "share no row: .*farm .test.*; and farm .dev."),
        (write_folder(tmp_path / "c", n=40, fine_tuned=True, seed=1), {}, "not the same queries"),
        (a, {"metric": "ndcg"}, "--metric ndcg is not among map, ndcg@10"),
        (a, {"samples": 0}, "--samples 0 must be at least 1"),
        (a, {"seed": -1}, "--seed -1 must be at least 0"),
        (a, {"metric": "spearman"}, "no rows of similarity: .* another --metric"),
    ):
        with pytest.raises(ValueError, match=message):
            comparison.compare(a, other, **options)
    with pytest.raises(ValueError, match="not the same queries or pairs"):
        paired({"0": {"cosine": 1, "score": 1}}, {"0": {"cosine": 1, "score": 2}}, "spearman", "here")


# --- MTEB


def test_a_missing_mteb_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ImportError, match=r"condenser\[mteb\]"):
        find_tasks(["SciFact"])


@pytest.mark.skipif(find_spec("mteb") is None, reason="mteb is not installed")
def test_tasks_of_mteb_run_by_name_and_unknown_or_unreachable_ones_are_named(tiny_export, tmp_path, monkeypatch):
    import mteb
    from mteb.mocks.mock_tasks.retrieval import MockRetrievalTask

    encoder = load_encoder(str(tiny_export), 32)
    with pytest.raises(ValueError, match=r"'SciFac': .*Did you mean: 'SciFact'"):
        find_tasks(["NanoBEIR", "SciFac"])
    with pytest.raises(ValueError, match="SciFact could not be loaded"):
        run_mteb(encoder, find_tasks(["SciFact"]), tmp_path)
    monkeypatch.setattr(mteb, "get_task", lambda name: MockRetrievalTask())
    (row,) = run_mteb(encoder, find_tasks(["MockRetrievalTask"]), tmp_path)
    assert (row["collection"], row["metric"]) == ("MockRetrievalTask", "ndcg_at_10")
    assert 0.5 < row["score"] <= 1
