"""Evaluation: metrics by hand, searches against brute force, the rows of the command, and what it refuses."""

import gzip
import json
import lzma
import math
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from condenser.evaluation import encoders, retrieval
from condenser.evaluation.evaluate import evaluate

ANIMALS = "cat dog horse cow sheep goat hen duck pig mule crow deer wolf bear hare mole newt toad frog seal".split()  # noqa: SIM905
DOCUMENTS = {f"d{i}": f"the {animal} lives on the farm and eats grass" for i, animal in enumerate(ANIMALS)}
QUERIES = {f"q{i}": f"where lives the {animal}" for i, animal in enumerate(ANIMALS)}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny masked LM and its tokenizer as a plain Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    trainer = BertWordPieceTokenizer(lowercase=True)
    trainer.train_from_iterator([*DOCUMENTS.values(), *QUERIES.values()], vocab_size=200, show_progress=False)
    tokenizer = BertTokenizer(vocab=trainer.get_vocab())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def collection_folder(tmp_path):
    return write_collection(tmp_path / "farm")


def write_collection(folder, title=""):
    (folder / "qrels").mkdir(parents=True)
    write_rows(folder / "corpus.jsonl", [{"_id": i, "title": title, "text": t} for i, t in DOCUMENTS.items()])
    write_rows(folder / "queries.jsonl", [{"_id": i, "text": t} for i, t in QUERIES.items()])
    judgements = [f"q{i}\td{i}\t1" for i in range(len(ANIMALS))]
    for name, rows in (("test", judgements[:6]), ("train", judgements[6:])):
        (folder / "qrels" / f"{name}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def results(folder):
    return json.loads((folder / "retrieval.json").read_text())


# --- metrics and searches


def test_metrics_equal_hand_computed_values():
    qrels = {"a": {"x": 1, "y": 1}, "b": {"z": 1}, "c": {"x": 1}}
    run = {"a": {"x": 3.0, "w": 2.0, "y": 1.0}, "b": {f"n{i}": 20.0 - i for i in range(10)} | {"z": 1.0}, "c": {}}
    ndcg_a = (1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    expected = {
        "ndcg@10": ndcg_a / 3,  # b's document has rank 11, c has no hits
        "mrr@10": 1 / 3,
        "recall@100": 2 / 3,
        "map": ((1 + 2 / 3) / 2 + 1 / 11) / 3,
    }
    assert retrieval.score(run, qrels) == pytest.approx(expected)


def test_dense_search_equals_brute_force(model_folder):
    encoder = encoders.load_encoder(model_folder, 32)
    run = retrieval.dense_search(encoder, DOCUMENTS, QUERIES)
    passages, questions = (encoder.encode(list(texts.values())) for texts in (DOCUMENTS, QUERIES))
    passages, questions = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (passages, questions))
    scores = questions @ passages.T
    found = np.array([[run[query][document] for document in DOCUMENTS] for query in QUERIES])
    np.testing.assert_allclose(found, scores, atol=1e-5)


def test_bm25_finds_the_document_with_the_word_and_leaves_out_those_without_a_match():
    run = retrieval.bm25_search(DOCUMENTS, {"q": "wolf", "r": "zebra"})
    assert run == {"q": {f"d{ANIMALS.index('wolf')}": pytest.approx(run["q"][f"d{ANIMALS.index('wolf')}"])}, "r": {}}


# --- collections


@pytest.mark.parametrize(("suffix", "module"), [(".gz", gzip), (".xz", lzma)])
def test_compressed_files_read_the_same(collection_folder, suffix, module):
    plain = retrieval.read_collection(collection_folder)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv", "qrels/train.tsv"):
        path = collection_folder / name
        with module.open(f"{path}{suffix}", "wb") as file:
            file.write(path.read_bytes())
        path.unlink()
    compressed = retrieval.read_collection(collection_folder)
    assert (compressed.documents, compressed.queries) == (plain.documents, plain.queries)
    assert (compressed.qrels, compressed.train_pairs) == (plain.qrels, plain.train_pairs)


def test_titles_go_before_the_text(tmp_path):
    collection = retrieval.read_collection(write_collection(tmp_path / "farm", title="Animals"))
    assert collection.documents["d0"] == "Animals " + DOCUMENTS["d0"]


def test_qrels_without_a_header_lose_no_line(collection_folder):
    (collection_folder / "qrels/test.tsv").write_text("q0\td0\t1\nq1\td1\t1\nq2\td2\t0\n")
    assert retrieval.read_collection(collection_folder).qrels == {"q0": {"d0": 1}, "q1": {"d1": 1}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", '{"_id": "d0", "text": "a"}\n{"_id": \n', r"corpus\.jsonl, line 2: not JSON"),
        ("queries.jsonl", '{"_id": "q0"}\n', r"queries\.jsonl, line 1: .*_id and text"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0 d0 1\n", r"test\.tsv, line 2"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\tother\t1\n", "do they belong together"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nnone\td0\t1\n", r"'none', which queries\.jsonl lacks"),
        ("corpus.jsonl", None, r"has no corpus\.jsonl"),
        ("queries.jsonl", None, r"has no queries\.jsonl"),
        ("qrels/test.tsv", None, r"has no qrels/test\.tsv"),
    ],
)
def test_a_broken_collection_is_named(collection_folder, name, content, message):
    path = collection_folder / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=message):
        retrieval.read_collection(collection_folder)


# --- encoders and fine-tuning


def test_a_plain_folder_gets_cls_pooling_and_a_fixed_fingerprint(model_folder):
    one, two = (encoders.describe(encoders.load_encoder(model_folder, 32)) for _ in range(2))
    assert one == two
    assert one["pooling"] == "cls"


def test_reinitialised_weights_follow_the_seed(model_folder):
    encoder = encoders.load_encoder(model_folder, 32)
    before = weights(encoder)
    hashes = [weights(encoders.reinitialised(encoder, seed)) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert before == weights(encoder) != hashes[0]


def weights(encoder):
    return encoders.describe(encoder)["weights"]


def test_fine_tuning_learns_the_pairs_and_repeats_bit_for_bit(model_folder):
    tuning = {"steps": 60, "batch_size": 10, "learning_rate": 3e-3, "seed": 0}
    pairs = list(zip(QUERIES.values(), DOCUMENTS.values(), strict=True))
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(len(ANIMALS))}
    before, *tuned = (encoders.load_encoder(model_folder, 32) for _ in range(3))
    for encoder in tuned:
        encoders.fine_tune(encoder, pairs, tuning)
    assert weights(tuned[0]) == weights(tuned[1]) != weights(before)
    mrr = [retrieval.score(retrieval.dense_search(e, DOCUMENTS, QUERIES), qrels)["mrr@10"] for e in (before, tuned[0])]
    assert mrr[1] > max(0.9, mrr[0])


def test_fine_tuning_has_no_dropout_and_leaves_nothing_behind(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = encoders.load_encoder(model_folder, 32)
    pairs = list(zip(QUERIES.values(), DOCUMENTS.values(), strict=True))
    encoders.fine_tune(encoder, pairs, {"steps": 1, "batch_size": 4, "learning_rate": 1e-3, "seed": 0})
    assert not encoder.training
    assert all(module.p == 0 for module in encoder.modules() if isinstance(module, torch.nn.Dropout))
    assert not list(tmp_path.iterdir())


# --- the command


def test_rows_of_the_table_and_the_example(model_folder, collection_folder, tmp_path, capsys):
    run = {"retrieval": [str(collection_folder)], "baselines": True, "finetune": True, "max_length": 32}
    run |= {"finetune_steps": 5, "finetune_batch_size": 4, "query": "where lives the wolf"}
    evaluate(model_folder, output=str(tmp_path / "out"), **run)
    found = results(tmp_path / "out")
    rows = {(row["model"], row["fine_tuned"]): row for row in found["rows"]}
    plain, random = rows["pre-trained", False], rows["random initialisation", False]
    assert list(rows) == [
        ("BM25", False),
        ("random initialisation", False),
        ("pre-trained", False),
        ("random initialisation", True),
        ("pre-trained", True),
    ]
    assert rows["BM25", False]["ndcg@10"] == 1.0
    assert any(plain[metric] != random[metric] for metric in retrieval.METRICS)
    assert {(row["collection"], row["queries"], row["documents"]) for row in found["rows"]} == {("farm", 6, 20)}
    assert found["settings"]["pooling"] == "cls"
    assert [hit["rank"] for hit in found["example"]["hits"]] == [1, 2, 3, 4, 5]
    assert "fine-tuned" in found["example"]["answered_by"]
    printed = capsys.readouterr().out
    assert "Compare the fine-tuned rows" in " ".join(printed.split())
    assert "where lives the wolf" in printed


def test_rows_are_computed_once_and_again_when_their_settings_change(model_folder, collection_folder, tmp_path, capsys):
    run = {"output": str(tmp_path / "out"), "retrieval": [str(collection_folder)], "baselines": True, "query": "wolf"}
    evaluate(model_folder, max_length=32, **run)
    before = results(tmp_path / "out")
    capsys.readouterr()
    evaluate(model_folder, max_length=32, **run)
    assert capsys.readouterr().out.count("as before") == 3
    assert results(tmp_path / "out") == before
    evaluate(model_folder, max_length=16, **run)
    assert capsys.readouterr().out.count("as before") == 1  # BM25
    evaluate(model_folder, max_length=16, **run | {"query": "bear"})
    assert capsys.readouterr().out.count("as before") == 2  # all but the one that answers
    assert results(tmp_path / "out")["example"]["query"] == "bear"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./nowhere"}, "no model folder at ./nowhere"),
        ({"retrieval": ["nowhere"]}, "no retrieval collection at nowhere"),
        ({"max_length": 65}, "--max-length 65: .* at most 64 tokens"),
        ({"finetune": True, "finetune_batch_size": 1}, "batch size >= 2"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(model_folder, collection_folder, tmp_path, changes, message):
    call = {"model": model_folder, "retrieval": [str(collection_folder)], "max_length": 32} | changes
    with pytest.raises(ValueError, match=message):
        evaluate(call.pop("model"), output=str(tmp_path / "out"), **call)


def test_a_folder_without_a_model_is_not_looked_for_on_the_hub(collection_folder):
    for folder in (collection_folder, collection_folder / "typo"):
        with pytest.raises(ValueError, match="no model folder at"):
            encoders.load_encoder(str(folder), 32)


def test_fine_tuning_without_train_judgements_is_refused(model_folder, collection_folder, tmp_path):
    (collection_folder / "qrels/train.tsv").unlink()
    with pytest.raises(ValueError, match=r"qrels/train\.tsv"):
        evaluate(model_folder, output=str(tmp_path / "out"), retrieval=[str(collection_folder)], finetune=True)


def test_a_folder_with_other_files_is_refused(model_folder, collection_folder):
    with pytest.raises(ValueError, match="no result of this command"):
        evaluate(model_folder, output=str(collection_folder), retrieval=[str(collection_folder)])


def test_missing_packages_are_named(model_folder, collection_folder, tmp_path, monkeypatch):
    def no_version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", no_version)
    with pytest.raises(ImportError, match=r"accelerate: pip install 'condenser\[eval\]'"):
        evaluate(model_folder, output=str(tmp_path / "out"), retrieval=[str(collection_folder)])
