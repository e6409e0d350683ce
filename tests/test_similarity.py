"""Similarity: the layouts of sentence pairs, correlations and geometry by other means, examples, whitening."""

import gzip
import json

import numpy as np
import pytest
import torch
from conftest import make_documents
from scipy.spatial.distance import pdist
from scipy.stats import rankdata
from sentence_transformers import SentenceTransformer

from condenser.evaluation import similarity
from condenser.evaluation.encoders import load_encoder
from condenser.evaluation.finetuning import Tuning
from condenser.evaluation.pooling import fit_whitening, whitened, with_pooling
from condenser.evaluation.similarity import Pairs, Similarity, read_pairs, read_similarity

FIRST = ['A sign says "no diving".', "A man, a plan", "Where?"]
SECOND = ["Boys jump into a pool.", "A canal's plan", '"Here," she said.']
SCORES = [0.5, 5.0, 3.25]
ROWS = list(zip(SCORES, FIRST, SECOND, strict=True))


def quoted(*cells):
    return ",".join('"' + str(cell).replace('"', '""') + '"' for cell in cells)


STSB = "\n".join(f"main\tMSRvid\t2012test\t{i}\t{s}\t{a}\t{b}" for i, (s, a, b) in enumerate(ROWS))
LAYOUTS = {
    "sts-b.csv": STSB + "\tsource of one\tsource of two\n",
    "sick.txt": "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
    + "".join(f"{i}\t{a}\t{b}\t{s}\tNEUTRAL\n" for i, (s, a, b) in enumerate(ROWS)),
    "glue.tsv": "index\tgenre\tsentence1\tsentence2\tscore\r\n"
    + "".join(f"{i}\tnews\t{a}\t{b}\t{s}\r\n" for i, (s, a, b) in enumerate(ROWS)),
    "comma.csv": "\ufeffsentence1,sentence2,label\n" + "".join(quoted(a, b, s) + "\n" for s, a, b in ROWS),
    "first.csv": "".join(quoted(s, a, b) + "\n" for s, a, b in ROWS),
    "last.tsv": "".join(f"{a}\t{b}\t{s}\n\n" for s, a, b in ROWS),
    "scientific.tsv": "".join(f"{s:.3e}\t{a}\t{b}\n" for s, a, b in ROWS),
    "bare.tsv": "".join(f"{a}\t{b}\t{s}\n".replace("\t0.", "\t.") for s, a, b in ROWS),
    "mteb.jsonl": "".join(
        json.dumps({"split": "test", "score": s, "sentence1": a, "sentence2": b}) + "\n" for s, a, b in ROWS
    ),
    "clue.json": "".join(json.dumps({"sentence1": a, "sentence2": b, "label": str(s)}) + "\n" for s, a, b in ROWS),
}


# --- files


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_pairs(tmp_path, name, compressed):
    path, content = tmp_path / name, LAYOUTS[name].encode()
    if compressed:
        path, content = tmp_path / f"{name}.gz", gzip.compress(content)
    path.write_bytes(content)
    found = read_pairs(path)
    assert (found.first, found.second, found.scores.tolist()) == (FIRST, SECOND, SCORES)
    assert found.name == name.split(".")[0]


def test_a_folder_has_test_and_train(tmp_path):
    folder = tmp_path / "sts-b"
    folder.mkdir()
    for name in ("latest.tsv", "contest_strain.tsv"):  # words that hold these
        (folder / name).write_text("broken")
    (folder / "LICENSE").write_text("none")
    (folder / "sts-test.tsv").write_text(LAYOUTS["sts-b.csv"])
    assert read_similarity(folder).train is None
    (folder / "sts-train.csv").write_text(LAYOUTS["comma.csv"])
    (folder / "sts-dev.tsv").write_text("broken")
    found = read_similarity(folder)
    assert (found.name, found.test.name, found.train.name) == ("sts-b", "sts-test", "sts-train")
    alone = read_similarity(folder / "sts-train.csv").test
    assert alone.fingerprint == found.train.fingerprint != found.test.fingerprint
    (folder / "test-2.tsv").write_text(LAYOUTS["sts-b.csv"])
    with pytest.raises(
        ValueError, match=r"one file .* word 'test' in its name, .* sts-test.tsv, sts-train.csv, test-2.tsv"
    ):
        read_similarity(folder)
    with pytest.raises(ValueError, match=r"no sentence pairs at .*nowhere"):
        read_similarity(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", LAYOUTS["sts-b.csv"] + "main\tMSRvid\t2012test\t4\thigh\tone\ttwo\n", r"a\.tsv, line 4: not two"),
        ("a.tsv", LAYOUTS["sts-b.csv"] + "main\tMSRvid\n", "line 4: not two sentences and a score"),
        ("a.tsv", "sentence1\tsentence2\tscore\none\ttwo\t1\n\nthree\tfour\n", "line 4: 2 columns, not 3"),
        ("a.csv", "score,sentence1,sentence2\n1,a man, a plan,b\n", "line 2: 4 columns, not 3"),
        ("a.csv", 'score,sentence1,sentence2\n1,"a man,b\n', r"a\.csv, line 2: not comma-separated"),
        ("a.csv", "score,sentence1,sentence2\n1,,b\n", "line 2: an empty sentence"),
        ("a.csv", "score,sentence1,sentence2\nnan,a,b\n", "line 2: .* not finite"),
        ("a.csv", "score,sentence1,sentence2\n1,a,b\n1,c,d\n", "2 pairs do not differ"),
        ("a.csv", "score,sentence1,sentence2\n1,a,a\n2,a,a\n3,b,b\n", "3 pairs do not differ: all have the same"),
        ("a.csv", "score,sentence1,sentence2\n1,a,b\n2,b,a\n", "2 pairs do not differ: all have the same cosine"),
        ("a.csv", "sentence1,sentence2\na,b\n", r"no column of scores \(such as"),
        ("a.csv", "one,two\na,b\n", r"must name its columns .*\['one', 'two'\]"),
        ("a.csv", "", r"must name its columns .* not \[\]"),
        (
            "a.jsonl",
            '{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a", "score": 1}',
            "line 2: not two",
        ),
        ("a.jsonl", '{"sentence1": "a", "sentence2": 3, "score": 1}\n', "line 1: not two"),
        ("a.tsv", b"a\tb\t1\ncaf\xe9\tb\t2\n", r"a\.tsv, line 2: not UTF-8"),
        ("a.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("a.jsonl", "{\n", "line 1: not JSON"),
        ("a.parquet", "PAR1", r"\.tsv, \.csv, \.txt, \.jsonl"),
        ("a.tsv.gz", "plain", "cannot be decompressed"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / name)


# --- metrics


@pytest.fixture(scope="module")
def encoder(roberta):
    return load_encoder(str(roberta), 32)


@pytest.fixture(scope="module")
def pairs():
    documents = [text.split(".")[0] for text in make_documents(80)]
    scores = np.random.default_rng(0).integers(0, 11, 40) / 2
    return Pairs("made", documents[:40], [*documents[40:75], *documents[:5]], scores)


@pytest.mark.parametrize("search", ["cosine", "dot"])
def test_metrics_equal_other_computations(encoder, pairs, search):
    encoder.similarity_fn_name = search
    metrics, values, _ = Similarity("made", pairs, None).measure(encoder)
    cosines = np.array([each["cosine"] for each in values.values()])
    first, second = (
        torch.nn.functional.normalize(encoder.encode(x, convert_to_tensor=True)) for x in (pairs.first, pairs.second)
    )
    np.testing.assert_allclose(cosines, (first * second).sum(1), atol=1e-6)
    ranks = np.corrcoef(rankdata(cosines), rankdata(pairs.scores))[0, 1]  # the mean rank for ties
    assert metrics["spearman"] == pytest.approx(ranks)
    assert metrics["pearson"] == pytest.approx(np.corrcoef(cosines, pairs.scores)[0, 1])
    positive = pairs.scores >= 4
    assert metrics["alignment"] == pytest.approx(((first - second) ** 2).sum(1).numpy()[positive].mean(), abs=1e-6)
    distinct = encoder.encode(sorted({*pairs.first, *pairs.second}), normalize_embeddings=True)
    geometry = np.log(np.exp(-2 * pdist(distinct, "sqeuclidean")).mean())
    assert metrics["uniformity"] == pytest.approx(geometry, abs=1e-5)
    assert (metrics["pairs"], metrics["positive_pairs"]) == (40, positive.sum())


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_with_one_vector_for_all_nothing_correlates_which_every_reader_of_json_takes(encoder, pairs, monkeypatch):
    monkeypatch.setattr("condenser.evaluation.similarity.encoded", lambda encoder, texts: torch.ones(len(texts), 4))
    metrics = Similarity("made", pairs, None).measure(encoder).metrics
    assert (metrics["spearman"], metrics["pearson"], metrics["alignment"]) == (None, None, 0)
    json.dumps(metrics, allow_nan=False)


def test_uniformity_is_taken_in_blocks_and_of_many_by_a_sample(monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(2500, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    exact = np.log(np.exp(-2 * pdist(vectors, "sqeuclidean")).mean())
    assert similarity.uniformity(vectors) == pytest.approx(exact, abs=1e-6)
    monkeypatch.setattr(similarity, "UNIFORMITY_SENTENCES", 1000)
    sample = similarity.uniformity(vectors)
    assert sample == similarity.uniformity(vectors) == pytest.approx(exact, abs=0.05)
    assert sample != pytest.approx(exact, abs=1e-6)


# --- examples of fine-tuning


def test_subsamples_are_nested_repeat_and_are_scaled(pairs):
    def examples(size, seed):
        return Similarity("made", pairs, pairs).examples(Tuning(train_size=size, seed=seed))

    small, large, other = (examples(size, seed) for size, seed in ((8, 0), (20, 0), (20, 1)))
    assert large == examples(20, 0) != other
    assert {column: values[:8] for column, values in large.items()} == small
    whole = examples(None, 0)
    assert sorted(whole["score"]) == pytest.approx(sorted(pairs.scores / 5))
    known = dict(zip(zip(pairs.first, pairs.second, strict=True), pairs.scores / 5, strict=True))
    assert [known[pair] for pair in zip(small["sentence1"], small["sentence2"], strict=True)] == small["score"]


# --- whitening


@pytest.mark.parametrize("dim", [None, 8])
def test_whitened_vectors_have_mean_0_and_covariance_1_and_load_again(encoder, tmp_path, dim):
    texts = [text.split(".")[0] for text in make_documents(300)]
    mean = with_pooling(encoder, "mean")
    white = whitened(mean, mean.encode(texts), dim)
    vectors = white.encode(texts)
    kept = dim or encoder.get_embedding_dimension() - 1  # what LayerNorm returns lies in a hyperplane
    assert vectors.shape == (300, kept)
    assert white.get_embedding_dimension() == kept
    np.testing.assert_allclose(vectors.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(vectors, rowvar=False), np.eye(kept), atol=1e-4)
    white.save(str(tmp_path))
    np.testing.assert_array_equal(SentenceTransformer(str(tmp_path)).encode(texts[:5]), white.encode(texts[:5]))
    assert len(encoder) == len(white) - 1


def test_whitening_keeps_the_directions_of_largest_variance():
    vectors = np.random.default_rng(0).normal(size=(500, 3)) * [1, 100, 10] + 5
    dense = fit_whitening(vectors, 2)
    found = dense({"sentence_embedding": torch.tensor(vectors, dtype=torch.float32)})["sentence_embedding"]
    correlations = np.corrcoef(found.detach().numpy().T, vectors.T)[:2, 2:]
    np.testing.assert_allclose(np.abs(correlations), [[0, 1, 0], [0, 0, 1]], atol=0.15)


def test_whitening_of_too_few_texts_or_directions_is_refused():
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    for n, dim in ((8, None), (4, 4)):
        with pytest.raises(ValueError, match=f"to {dim or 8} dimensions needs more than so many texts .* not {n}"):
            fit_whitening(vectors[:n], dim)
    with pytest.raises(ValueError, match="to 9 dimensions: the encoder's vectors have 8"):
        fit_whitening(vectors, 9)
    assert fit_whitening(vectors - vectors.mean(axis=1, keepdims=True), 8).get_embedding_dimension() == 7
    flat = vectors @ np.diag([1, 1, 1, 1, 1, 0, 0, 0]).astype(np.float32)
    assert fit_whitening(flat).get_embedding_dimension() == 5
    with pytest.raises(ValueError, match="to 6 dimensions: the vectors of the 50 texts vary in 5 only"):
        fit_whitening(flat, 6)
    with pytest.raises(ValueError, match="vary in 0 only"):
        fit_whitening(np.ones((50, 8)))
