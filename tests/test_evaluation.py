"""Evaluation: metrics by hand, searches against brute force, the rows of the command, and what it refuses."""

import copy
import gzip
import itertools
import json
import os
import shutil
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import make_documents, write_bert, write_rows
from conftest import write_collection as write_documents
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import AutoTokenizer, BertForMaskedLM

from condenser.cli import main
from condenser.data.lock import locked
from condenser.evaluation import encoders, finetuning, jobs, retrieval, search
from condenser.evaluation.comparison import compare
from condenser.evaluation.evaluate import draw_attention, evaluate
from condenser.evaluation.finetuning import Tuning, fine_tune
from condenser.evaluation.jobs import read_rows
from condenser.evaluation.retrieval import Collection, read_collection
from condenser.export import find_checkpoint

ANIMALS = "cat dog horse cow sheep goat hen duck pig mule crow deer wolf bear hare mole newt toad frog seal".split()  # noqa: SIM905
DOCUMENTS = {f"d{i}": f"the {animal} lives on the farm and eats grass" for i, animal in enumerate(ANIMALS)}
QUERIES = {f"q{i}": f"where lives the {animal}" for i, animal in enumerate(ANIMALS)}
PAIRS = {"query": [*QUERIES.values()], "positive": [*DOCUMENTS.values()]}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    texts = [*DOCUMENTS.values(), *QUERIES.values()]
    return str(write_bert(tmp_path_factory.mktemp("model"), texts, max_position_embeddings=64, **sizes))


@pytest.fixture
def encoder(model_folder):
    return encoders.load_encoder(model_folder, 32)


@pytest.fixture
def collection_folder(tmp_path):
    return write_collection(tmp_path / "farm")


@pytest.fixture
def measure(model_folder, collection_folder, tmp_path):
    """The command on the collection, if it is told nothing else. -> results.json"""

    def evaluated(output="out", model=model_folder, **options):
        asked = {"retrieval": [str(collection_folder)], "max_length": 32} | options
        evaluate(str(model), output=str(tmp_path / output), **asked)
        return json.loads((tmp_path / output / "results.json").read_text())

    return evaluated


def write_collection(folder, title=""):
    (folder / "qrels").mkdir(parents=True)
    write_rows(folder / "corpus.jsonl", [{"_id": i, "title": title, "text": t} for i, t in DOCUMENTS.items()])
    write_rows(folder / "queries.jsonl", [{"_id": i, "text": t} for i, t in QUERIES.items()])
    judgements = [f"q{i}\td{i}\t1" for i in range(len(ANIMALS))]
    for name, rows in (("test", judgements[:6]), ("train", judgements[6:])):
        (folder / "qrels" / f"{name}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    return folder


# --- metrics and searches


@pytest.mark.parametrize(("cut", "left"), [("right", "early"), ("left", "late")])
def test_bm25_reads_no_more_of_a_text_than_the_encoder_does(cut, left, model_folder):
    encoder = encoders.load_encoder(model_folder, 8)  # [CLS], 6 tokens, [SEP]
    encoder.tokenizer.truncation_side = cut
    documents = {"early": "wolf " + "farm " * 9, "late": "farm " * 9 + "wolf"}
    assert set(search.bm25_search(documents, {"q": "wolf"})["q"]) == {"early", "late"}
    assert set(search.bm25_search(documents, {"q": "wolf"}, reader=encoder)["q"]) == {left}
    encoder.prompts["document"] = "the farm and the " * 2  # takes the room of the text, where that is cut at its end
    assert set(search.bm25_search(documents, {"q": "wolf"}, reader=encoder)["q"]) == {left} - {"early"}


# --- collections


def test_compressed_files_read_the_same_and_titles_go_before_the_text(tmp_path):
    collection_folder = write_collection(tmp_path / "farm", title="Animals")
    plain = read_collection(collection_folder)
    assert plain.documents["d0"] == "Animals " + DOCUMENTS["d0"]
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv", "qrels/train.tsv"):
        path = collection_folder / name
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    compressed = read_collection(collection_folder)
    assert compressed == plain


@pytest.mark.parametrize("first", ["q0\td0\t1", "q0\td0\t1.0", "\ufeffq0\td0\t1.0", "query-id\tdoc\tscore\nq0\td0\t1"])
def test_qrels_without_a_header_lose_no_line(collection_folder, first):
    (collection_folder / "qrels/test.tsv").write_text(f"{first}\nq1\td1\t1\nq2\td2\t0\n")
    (collection_folder / "qrels/train.tsv").rename(collection_folder / "qrels/train.tsv.bak")  # is no train.tsv
    collection = read_collection(collection_folder)
    assert (collection.qrels, collection.train_qrels) == ({"q0": {"d0": 1}, "q1": {"d1": 1}}, {})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", '{"_id": "d0", "text": "a"}\n{"_id": \n', r"corpus\.jsonl, line 2: not JSON"),
        ("queries.jsonl", '{"_id": "q0"}\n', r"queries\.jsonl, line 1: .*_id and text"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0 d0 1\n", r"test\.tsv, line 2"),
        ("qrels/test.tsv", "q0\td0\t0.5\n", r"test\.tsv, line 1: .* a whole score"),
        ("qrels/test.tsv", "q0\td0\t1\nq0\td1\tscore\n", r"test\.tsv, line 2"),
        ("qrels/test.tsv", "q0\td0\t1\nq0\td0\t0\n", r"test\.tsv, line 2: an earlier line judges document 'd0'"),
        ("qrels/test.tsv", "q0\td0\t99999999999999999999\n", r"test\.tsv, line 1: .* a whole score"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", r"test\.tsv judges no document relevant"),
        ("corpus.jsonl", "\n", r"no document of qrels/test\.tsv is in corpus\.jsonl"),
        (
            "corpus.jsonl",
            '{"_id": "d", "text": "a"}\n{"_id": "d", "text": "b"}\n',
            r"line 2: another text of the _id 'd'",
        ),
        ("corpus.jsonl", '{"_id": "d", "title": ["a"], "text": "a"}\n', r"line 1: .*_id and text, and perhaps title"),
        ("corpus.jsonl", '{"_id": "d\\u0000", "text": "a"}\n', r"line 1: a null character in the _id 'd\\x000?'"),
        ("corpus.jsonl", '{"_id": ' + "[" * 100_000, r"corpus\.jsonl, line 1: not JSON: maximum recursion depth"),
        ("corpus.jsonl", b'{"_id": "d0", "text": "caf\xe9"}\n', r"corpus\.jsonl, line 1: not UTF-8"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\tother\t1\n", "do they belong together"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nnone\td0\t1\n", r"'none', which queries\.jsonl lacks"),
        ("corpus.jsonl", None, r"has no corpus\.jsonl"),
        ("queries.jsonl", None, r"has no queries\.jsonl"),
        ("qrels/test.tsv", None, r"has no qrels/test\.tsv"),
    ],
)
def test_a_broken_collection_is_named(collection_folder, name, content, message):
    path = collection_folder / name
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_collection(collection_folder)


def test_the_split_that_is_scored_can_be_chosen_and_stands_in_the_row(measure, collection_folder):
    """MS MARCO in BEIR's layout is scored on dev; its folder need not have a test set."""
    (collection_folder / "qrels/test.tsv").rename(collection_folder / "qrels/dev.tsv")
    with pytest.raises(ValueError, match=r"has no qrels/test\.tsv: --split can be dev, train$"):
        measure()
    (row,) = measure(split="dev")["rows"]
    assert (row["split"], row["queries"]) == ("dev", 6)


def test_holes_of_a_corpus_are_said_halves_of_characters_are_read_and_texts_that_are_there_twice_are_one(
    collection_folder, capsys
):
    rows = [{"_id": "d1", "text": "half \ud83d a character", "metadata": {"url": url}} for url in "ab"]
    write_rows(collection_folder / "corpus.jsonl", rows)
    assert read_collection(collection_folder).documents == {"d1": "half \ufffd a character"}
    assert "5 of 6 relevant documents of qrels/test.tsv are not in corpus.jsonl" in capsys.readouterr().out


def test_random_weights_are_as_many_as_there_are_seeds_and_a_damaged_row_is_computed_again(measure, tmp_path, capsys):
    before = measure(baselines=True, seeds=[0, 1, 2])
    assert [row["seed"] for row in before["rows"] if row["model"].startswith("random")] == [0, 1, 2]
    damaged = tmp_path / "out" / "rows" / f"{before['fingerprints'][-1]}.json"
    damaged.write_text("")
    capsys.readouterr()
    assert measure(baselines=True, seeds=[0, 1, 2]) == before
    assert capsys.readouterr().out.count("as before") == len(before["rows"]) - 1


def test_what_the_system_or_a_killed_process_has_left_in_the_folder_is_no_hindrance(measure, tmp_path):
    before, out = measure(), tmp_path / "out"
    mine = [out / name for name in (".DS_Store", ".nfs0001", ".ipynb_checkpoints/a", "rows/mine.partial")]
    left = [out / f"{name}.0123abcd.partial" for name in ("results.json", "rows/0.json", "choices/0.json")]
    for path in (*mine, *left):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{")
    assert measure() == before
    assert [path.exists() for path in (*mine, *left)] == [True] * 4 + [False] * 3


def test_one_call_at_a_time_writes_into_a_folder(measure, tmp_path):
    """Of two, the one that ended last would leave its rows alone in results.json."""
    measure()
    with locked(tmp_path / "out/.lock", ""), pytest.raises(ValueError, match=r"out: process \d+ on .* is at work"):
        measure()
    assert [path.name for path in (tmp_path / "out").glob(".*")] == []


def test_rows_that_differ_otherwise_or_have_no_partner_are_said(measure, tmp_path, capsys):
    measure("a", pooling=["cls"])
    measure("b", pooling=["cls", "mean"], max_length=16)
    capsys.readouterr()
    compare(str(tmp_path / "a"), str(tmp_path / "b"), samples=10)
    said = capsys.readouterr().out
    assert "B alone has 1 more: farm (test): pre-trained, mean" in said
    assert "not the same in farm (test): pre-trained, cls: max_length 32 and 16" in said
    measure("c", finetune=True, finetune_epochs=1, finetune_batch_size=7)
    measure("d", finetune=True, finetune_epochs=1, finetune_batch_size=6, hard_negatives=1)
    compare(str(tmp_path / "c"), str(tmp_path / "d"), samples=10)
    assert "fine-tuned on farm: batch_size 7 and 6, hard_negatives 0 and 1\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"there is nothing at .*nowhere"):
        compare(str(tmp_path / "a"), str(tmp_path / "nowhere"))


# --- encoders and fine-tuning


def test_reinitialised_weights_follow_the_seed_and_nothing_is_left_of_a_projection(encoder):
    encoder.append(Dense(32, 16))
    before = weights(encoder)
    hashes = [weights(encoders.reinitialised(encoder, seed)) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert before == weights(encoder) != hashes[0]
    twin = encoders.reinitialised(encoder, 0)
    for name, value in twin[-1].named_parameters():
        assert not value.equal(encoder[-1].get_parameter(name)), name


def vector(encoder):
    return torch.nn.utils.parameters_to_vector(encoder.parameters()).detach()


def weights(encoder):
    return encoders.describe(encoder)["weights"]


def tuned(encoder, examples=PAIRS, **settings):
    """A fine-tuned copy."""
    copied = copy.deepcopy(encoder)
    fine_tune(copied, examples, Tuning(**settings))
    return copied


def test_fine_tuning_learns_the_pairs_and_repeats_bit_for_bit(encoder):
    one, two = (tuned(encoder, epochs=20, batch_size=10, learning_rate=3e-3) for _ in range(2))
    assert weights(one) == weights(two) != weights(encoder)
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(len(ANIMALS))}
    mrr = [search.score(search.dense_search(e, DOCUMENTS, QUERIES), qrels)["mrr@10"] for e in (encoder, one)]
    assert mrr[1] > max(0.9, mrr[0])


def test_fine_tuning_has_no_dropout_and_leaves_nothing_behind(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = tuned(encoder, epochs=0.2, batch_size=4)
    assert not encoder.training
    assert all(module.p == 0 for module in encoder.modules() if isinstance(module, torch.nn.Dropout))
    assert not list(tmp_path.iterdir())


def test_fine_tuning_shares_nothing_out_after_a_run_of_several_processes(encoder, monkeypatch):
    """Lightning leaves its variables set: a trainer that believed them dropped every batch that is not full."""
    found = []
    for variables in ({}, {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        AcceleratorState._reset_state(reset_partial_state=True)
        found.append(weights(tuned(encoder, epochs=3, batch_size=64, learning_rate=3e-3)))
        assert variables.items() <= os.environ.items()
    assert found[0] == found[1] != weights(encoder)


@pytest.mark.parametrize(
    ("epochs", "n", "steps"),
    [(2.5, 1000, 40), (1, 1, 1), (0.1, 64, 1), (3, 128, 6), (10, 14, 10), (0.1, 1920, 3), (1e-9, 9, 1)],
)
def test_steps_follow_from_the_passes_over_the_examples(epochs, n, steps):
    assert Tuning(epochs=epochs).n_steps(n) == steps


def test_questions_that_share_passages_are_passed_over_as_often_as_others(encoder, monkeypatch):
    """No batch has a text twice, so of 2 passages it has 2 examples, however large it may be."""
    shared, seen = {"query": PAIRS["query"], "positive": PAIRS["positive"][:2] * 10}, []
    of_batch = SentenceTransformerTrainer.compute_loss
    monkeypatch.setattr(
        SentenceTransformerTrainer,
        "compute_loss",
        lambda self, model, inputs, **more: (
            seen.append(len(inputs["query_input_ids"])) or of_batch(self, model, inputs, **more)
        ),
    )
    tuned(encoder, shared, epochs=2, batch_size=10)
    assert seen == [2] * 20
    seen.clear()
    tuned(encoder, PAIRS | {"positive": [*PAIRS["positive"][:15], *PAIRS["positive"][:1] * 5]}, batch_size=10)
    assert 3 * 16 <= sum(seen) <= 3 * 20  # one passage of many is no reason for more


def test_a_bf16_file_is_fine_tuned_in_fp32(model_folder, tmp_path):
    tokenizer, model = AutoTokenizer.from_pretrained(model_folder), BertForMaskedLM.from_pretrained(model_folder)
    model.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = encoders.load_encoder(str(tmp_path), 32)
    old, new = (dict(each.named_parameters()) for each in (encoder, tuned(encoder, learning_rate=1e-5)))
    inner = [name for name in old if "encoder.layer" in name and name.endswith("weight")]
    assert {old[name].dtype for name in inner} == {torch.float32}
    assert min((new[name] != old[name]).float().mean() for name in inner) > 0.9


@pytest.mark.parametrize("prompts", [{"query": "q: ", "document": "d: "}, {"query": "q: ", "passage": "d: "}])
def test_texts_have_the_prompts_of_search_in_fine_tuning(encoder, prompts):
    encoder.prompts = prompts
    columns = {"query": ["a"], "positive": ["b"], "negative_1": ["c"]}
    assert finetuning.arguments(encoder, columns, Tuning(), 1, "").prompts == {
        "query": "q: ", "positive": "d: ", "negative_1": "d: "
    }  # fmt: skip
    encoder.default_prompt_name = "query"
    pairs = {"sentence1": ["a"], "sentence2": ["b"], "score": [1.0]}
    assert finetuning.arguments(encoder, pairs, Tuning(), 1, "").prompts == {"sentence1": "q: ", "sentence2": "q: "}


# --- the command


def test_queries_with_documents_of_training_are_told_apart(measure, collection_folder, tmp_path):
    with open(collection_folder / "qrels/train.tsv", "a") as file:
        file.write("q7\td0\t1\nq8\td1\t1\n")  # what is relevant to q0 and q1 of the test
    measure()
    ((row, values),) = read_rows(tmp_path / "out")
    assert [query for query, found in values.items() if "ndcg@10_unseen" in found] == ["q2", "q3", "q4", "q5"]
    assert row["queries_unseen"] == 4
    assert row["ndcg@10_unseen"] == pytest.approx(np.mean([values[f"q{i}"]["ndcg@10"] for i in range(2, 6)]))


def test_two_collections_or_files_of_one_name_are_two_rows(measure, pairs_folder, tmp_path):
    folders = [str(write_collection(tmp_path / where / "farm")) for where in ("a", "b")]
    files = [str(pairs_folder / name) for name in ("test.tsv", "test.jsonl")]
    write_rows(
        pairs_folder / "test.jsonl", [{"sentence1": a, "sentence2": "x", "score": i} for i, a in enumerate("ab")]
    )
    rows = measure(retrieval=[*folders, folders[0]], similarity=files)["rows"]
    assert [row["collection"] for row in rows] == [*folders, *files]


@pytest.mark.slow
def test_learning_rate_and_similarity_are_chosen_once_on_held_out_questions(
    model_folder, pairs_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(jobs, "LEARNING_RATES", (1e-9, 3e-3))
    monkeypatch.setattr(finetuning, "HELD_OUT", 0.3)
    farm = str(write_collection(tmp_path / "farm"))
    run = ["evaluate", model_folder, "--output", str(tmp_path / "out"), "--retrieval", farm, "--max-length", "32"]
    run += ["--similarity", str(pairs_folder), "--finetune", "--finetune-epochs", "1", "--seeds", "0", "1"]
    assert main([*run, "--finetune-learning-rate", "auto", "--finetune-batch-size", "8"]) == 0
    assert capsys.readouterr().out.count("  tried ") == 4 + 2
    (of_search, of_pairs) = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("out/choices/*"), key=tried))
    for choice in (of_search, of_pairs):
        assert choice["score"] == max(each["score"] for each in choice["tried"])
    found = json.loads((tmp_path / "out/results.json").read_text())
    rows = [row for row in found["rows"] if row["fine_tuned"]]
    assert [row["learning_rate"] for row in rows] == [of_search["learning_rate"]] * 2 + [of_pairs["learning_rate"]] * 2
    assert {row["similarity"] for row in rows[:2]} == {of_search["similarity"]}
    for path in tmp_path.glob("out/choices/*"):
        path.write_text("{")  # damaged, so made again
    shutil.rmtree(tmp_path / "out/rows")
    assert main([*run, "--finetune-learning-rate", "auto", "--finetune-batch-size", "8"]) == 0
    assert json.loads((tmp_path / "out/results.json").read_text()) == found
    part = read_collection(Path(farm)).held_out()
    assert part.queries.keys() | part.train_qrels.keys() == {f"q{i}" for i in range(6, 20)}
    assert not part.queries.keys() & part.train_qrels.keys()


def test_a_learning_rate_that_comes_to_nothing_is_not_chosen(model_folder, pairs_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetuning, "HELD_OUT", 0.3)
    run = ["evaluate", model_folder, "--similarity", str(pairs_folder), "--finetune", "--finetune-epochs", "1"]
    run += ["--finetune-learning-rate", "auto", "--finetune-batch-size", "8", "--output"]
    for rates, code in {(1e30, 1e-3): 0, (1e30,): 1}.items():
        monkeypatch.setattr(jobs, "LEARNING_RATES", rates)
        assert main([*run, str(tmp_path / str(code))]) == code
    rows = json.loads((tmp_path / "0/results.json").read_text())["rows"]
    assert [row["learning_rate"] for row in rows if row["fine_tuned"]] == [1e-3]
    said = capsys.readouterr()
    assert "tried 1e+30: the encoder's vectors are not finite" in said.out
    assert "no learning rate came to anything" in said.err


def tried(path):
    return -len(json.loads(path.read_text())["tried"])


def test_rows_of_the_table_and_the_example(measure, capsys):
    tuning = {"finetune": True, "finetune_epochs": 2, "finetune_batch_size": 4}
    found = measure(baselines=True, query="where lives the wolf", **tuning)
    rows = {(row["model"], row["fine_tuned"]): row for row in found["rows"]}
    plain, random = rows["pre-trained", False], rows["random initialisation", False]
    assert list(rows) == [
        ("BM25, whole texts", False),
        ("BM25, first 32 tokens", False),
        ("random initialisation", False),
        ("pre-trained", False),
        ("random initialisation", True),
        ("pre-trained", True),
    ]
    assert rows["BM25, whole texts", False]["ndcg@10"] == rows["BM25, first 32 tokens", False]["ndcg@10"] == 1.0
    how = ("dtype", "similarity", "scale", "max_length", "epochs", "steps", "learning_rate")
    assert [rows["pre-trained", True][name] for name in how] == ["fp32", "cosine", 20.0, 32, 2, 8, 2e-5]
    assert any(plain[metric] != random[metric] for metric in search.METRICS)
    assert {(row["collection"], row["queries"], row["documents"]) for row in found["rows"]} == {("farm", 6, 20)}
    assert found["settings"]["pooling"] == "cls"
    assert [hit["rank"] for hit in found["example"]["hits"]] == [1, 2, 3, 4, 5]
    assert "fine-tuned" in found["example"]["answered_by"]
    printed = capsys.readouterr().out
    assert "Compare fine-tuned rows" in " ".join(printed.split())
    assert "where lives the wolf" in printed


def test_rows_are_computed_once_and_again_when_their_settings_change(measure, model_folder, tmp_path, capsys):
    before = measure(baselines=True, query="wolf")
    capsys.readouterr()
    assert measure(baselines=True, query="wolf") == before
    assert capsys.readouterr().out.count("as before") == 4
    measure(baselines=True, query="wolf", max_length=16)
    assert capsys.readouterr().out.count("as before") == 1  # BM25 on whole texts
    other = measure(baselines=True, query="bear", max_length=16)
    assert capsys.readouterr().out.count("as before") == 3  # all but the one that answers
    assert other["example"]["query"] == "bear"
    assert measure(baselines=True, query="wolf", max_length=16)["example"]["query"] == "wolf"
    shutil.copytree(model_folder, tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": 2', '"num_attention_heads": 4'))
    capsys.readouterr()
    measure(baselines=True, query="wolf", model=tmp_path / "model")
    assert capsys.readouterr().out.count("as before") == 1  # the weights are the same, the encoder is not


def test_rows_that_are_not_asked_for_are_kept_and_not_shown(measure, pairs_folder, tmp_path, capsys):
    out = tmp_path / "out"
    before, values = measure(), read_rows(out)
    rows = measure(retrieval=None, similarity=[str(pairs_folder)])["rows"]
    assert [row["task"] for row in rows] == [row["task"] for row, _ in read_rows(out)] == ["similarity"]
    capsys.readouterr()
    assert (measure(), read_rows(out)) == (before, values)
    assert "as before" in capsys.readouterr().out
    assert len(list(out.glob("rows/*.json"))) == 2


@pytest.fixture
def pairs_folder(tmp_path):
    """Pairs of animals that are alike where both have even or both odd numbers; the same to train on and to test."""
    (tmp_path / "sts").mkdir()
    pairs = itertools.combinations(range(10), 2)
    rows = [(5.0 * (i % 2 == j % 2), f"the {ANIMALS[i]}", f"the {ANIMALS[j]}") for i, j in pairs]
    for split in ("train", "test"):
        lines = ["score\tsentence1\tsentence2", *("\t".join(map(str, row)) for row in rows)]
        (tmp_path / "sts" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "sts"


@pytest.mark.slow
def test_sizes_seeds_poolings_and_whitening_are_rows_of_their_own(measure, tmp_path, capsys):
    tuning = {"finetune": True, "finetune_epochs": 0.5, "finetune_batch_size": 4, "finetune_learning_rate": 3e-3}
    vectors = {"pooling": ["mean", "last2-cls"], "whitening": [4]}
    rows = measure(train_sizes=["5", "all"], seeds=[0, 1], **tuning, **vectors)["rows"]
    told = [(row["pooling"], row["whitening"], row["train_size"], row["seed"], row["fine_tuned"]) for row in rows]
    tuned = [(size, seed, True) for size in (5, None) for seed in (0, 1)]
    assert told == [
        (pooling, whitening, *tuning)
        for tuning in [(None, None, False), *tuned]
        for pooling in ("mean", "last2-cls")
        for whitening in (None, 4)
    ]
    assert len({json.dumps([row[metric] for metric in search.METRICS]) for row in rows}) > len(rows) / 2
    shown = capsys.readouterr().out
    assert shown.count(" ± ") == 8 * len(Collection.metrics)
    kept = read_rows(tmp_path / "out")
    assert len(kept) == len(rows)
    for row, values in kept:
        assert row in rows
        for metric in search.METRICS:
            assert np.mean([each[metric] for each in values.values()]) == pytest.approx(row[metric])


def test_what_cannot_be_trained_on_is_measured_with_encoders_trained_on_others(measure, collection_folder, tmp_path):
    town = write_collection(tmp_path / "town")
    (town / "qrels/train.tsv").unlink()
    tuning = {"finetune": True, "finetune_epochs": 0.5, "finetune_batch_size": 4}
    rows = measure(retrieval=[str(collection_folder), str(town)], **tuning)["rows"]
    told = [(row["collection"], row["trained_on"]) for row in rows]
    assert told == [("farm", None), ("farm", "farm"), ("town", "farm"), ("town", None)]


def test_a_part_of_the_queries_is_always_the_same(collection_folder):
    parts = [read_collection(collection_folder, n_queries=n) for n in (2, 2, 4, 99)]
    assert [len(part.queries) for part in parts] == [2, 2, 4, 6]
    assert parts[0] == parts[1]
    assert all(part.queries.keys() == part.qrels.keys() for part in parts)
    assert all(part.documents == parts[-1].documents for part in parts)


def test_similarity_is_measured_and_fine_tuned_for(measure, pairs_folder):
    tuning = {"finetune": True, "finetune_epochs": 5, "finetune_batch_size": 8, "finetune_learning_rate": 3e-3}
    plain, tuned = measure(retrieval=None, similarity=[str(pairs_folder)], **tuning)["rows"]
    assert tuned["spearman"] > 0.8 > 0.4 > plain["spearman"]
    assert {"alignment", "uniformity", "pearson"} <= set(plain)


@pytest.mark.slow
def test_attention_is_measured_before_and_after_fine_tuning(run, store, tiny_export, measure, tmp_path):
    """And of an export, its checkpoint and its run the same; what the head reads of [CLS] is in the settings."""
    farm, texts = tmp_path / "farm", make_documents(20)  # in the words of the store
    write_rows(farm / "corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    write_rows(farm / "queries.jsonl", [{"_id": f"q{i}", "text": text[:30]} for i, text in enumerate(texts)])
    tuning = {"finetune": True, "finetune_epochs": 9, "finetune_learning_rate": 3e-3}
    found = measure("a", tiny_export, attention=str(store), max_length=None, **tuning)
    attention = [row for row in found["rows"] if row["task"] == "attention"]
    assert [row["trained_on"] for row in attention] == ["farm", None]
    assert len(attention[0]["cls_entropy"]) == 3
    assert attention[0]["cls_entropy"] != attention[1]["cls_entropy"]
    assert set(found["settings"]["head_loss"]) == {"true", "other", "zeros"}
    assert (tmp_path / "a/attention.svg").is_file()
    assert measure("a", tiny_export, attention=str(store), pooling=["mean", "max"])["rows"][2:] == attention[1:]
    for name, model in (("run", run), ("its", run / "checkpoints"), ("checkpoint", find_checkpoint(str(run)))):
        alone = measure(name, model, retrieval=None, attention=str(store), max_length=None)
        assert alone["rows"] == attention[1:]


def test_the_drawing_of_attention_opens_on_its_own_and_goes_when_its_rows_go(tmp_path):
    path = tmp_path / "attention.svg"
    about = {"model": "pre-trained", "pooling": "cls", "whitening": None, "train_size": None}
    seeds = [about | {"trained_on": "farm", "cls_entropy": [0.9, 0.4 + 0.1 * seed]} for seed in range(2)]
    rows = [about | {"trained_on": None, "cls_entropy": [0.9, 0.5]}, *seeds]
    for each in (path, tmp_path / "again" / path.name):
        each.parent.mkdir(exist_ok=True)
        draw_attention(rows, each)
    text = path.read_text()
    assert text == each.read_text()
    assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"  # nothing but HTML does without
    assert "currentColor" not in text
    assert "var(--" not in text
    for words in ("layer", "pre-trained, cls", "pre-trained, cls, fine-tuned on farm"):
        assert text.count(f"<!-- {words} -->") == 1
    draw_attention([], path)
    assert not path.exists()


def test_tasks_of_mteb_are_measured_once_for_an_encoder_and_again_where_a_file_is_damaged(
    measure, tmp_path, monkeypatch, capsys
):
    asked = []

    def measured(encoder, tasks, **options):
        asked.append(tasks[0].metadata.name)
        found = SimpleNamespace(get_score=lambda: 0.8125, dataset_revision="r1")
        return SimpleNamespace(task_results=[found])

    library = ModuleType("mteb")
    library.__spec__, library.__version__ = ModuleSpec("mteb", None), "2"
    library.evaluate, library.get_benchmark = measured, {}.__getitem__
    of_splits = [{"number_of_characters": 3_000_000}, {"text_statistics": {"total_text_length": 400_000}}]
    of_splits = {f"split {place}": each | {"num_samples": 600} for place, each in enumerate(of_splits)}
    about = {"main_score": "ndcg_at_10", "dataset": {"path": "of/tasks"}, "descriptive_stats": of_splits}
    library.get_task = lambda name: SimpleNamespace(metadata=SimpleNamespace(name=name, **about))
    monkeypatch.setitem(sys.modules, "mteb", library)
    for names, max_length in ((["Toys"], 32), (["Toys", "Tools"], 32), (["Toys"], 16)):
        found = measure(retrieval=None, max_length=max_length, mteb=names)
        _, _, table = capsys.readouterr().out.rpartition("MTEB: ")
        assert "takes of/tasks from the hub, or its cache: 1,200 texts, 3.4 M characters" in table
        assert "0.812" in next(line for line in table.splitlines() if "Toys" in line and "0." in line)
        assert [row["collection"] for row in found["mteb"]] == names
    assert asked == ["Toys", "Tools", "Toys"]
    for file in tmp_path.glob("out/rows/mteb-*.json"):
        file.write_text("")
    assert measure(retrieval=None, max_length=16, mteb=["Toys"]) == found


def test_hard_negatives_are_drawn_from_what_bm25_finds_and_nobody_judged(collection_folder, monkeypatch):
    monkeypatch.setattr(retrieval, "NEGATIVES_FROM", 6)
    collection = read_collection(collection_folder)
    hits = search.bm25_search(collection.documents, collection.train_queries, 6)
    drawn = [collection.examples(Tuning(hard_negatives=2, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert drawn[0]["negative_1"] != drawn[2]["negative_1"]
    assert list(drawn[0]) == ["query", "positive", "negative_1", "negative_2"]
    ids = {text: i for i, text in (collection.documents | collection.train_queries).items()}
    places = set()
    for query, positive, *negatives in zip(*drawn[0].values(), strict=True):
        found = list(hits[ids[query]])
        assert positive not in negatives
        places |= {found.index(ids[text]) for text in negatives}
    assert max(places) > 3  # beyond the first ones


def test_a_question_that_is_a_document_too_is_no_negative_of_its_own(collection_folder):
    """As in ArguAna, where BM25 finds it first; nor is it scored."""
    with open(collection_folder / "corpus.jsonl", "a") as file:
        file.writelines(json.dumps({"_id": i, "text": text}) + "\n" for i, text in QUERIES.items())
    drawn = read_collection(collection_folder).examples(Tuning(hard_negatives=38))
    assert len(drawn["query"]) == 14
    assert not any(query in negatives for query, *negatives in zip(*drawn.values(), strict=True))


def test_a_smaller_draw_of_questions_is_part_of_a_larger_one(collection_folder):
    collection = read_collection(collection_folder)
    drawn = [set(collection.examples(Tuning(train_size=n, seed=3))["query"]) for n in (4, 9)]
    assert drawn[0] < drawn[1]
    assert [len(each) for each in drawn] == [4, 9]
    with pytest.raises(ValueError, match="farm: 0 training questions have 50 hard negatives, which is too few"):
        collection.examples(Tuning(hard_negatives=50))


def test_gradient_caching_changes_memory_and_no_weight(encoder):
    plain, cached = (
        vector(tuned(encoder, epochs=1.5, batch_size=10, learning_rate=1e-3, mini_batch=n)) for n in (0, 3)
    )
    assert (plain - cached).norm() < 0.1 * (plain - vector(encoder)).norm()


@pytest.mark.parametrize(("loss", "mini_batch"), [("ranking", 0), ("cosent", 0), ("ranking", 5)])
def test_length_groups_save_padding_and_change_no_weight(encoder, monkeypatch, loss, mini_batch):
    texts = [" ".join(ANIMALS[: n + 1]) for n in range(len(ANIMALS))]
    examples = {"sentence1": texts, "sentence2": texts[::-1]}
    examples |= {"score": np.linspace(0, 1, len(texts)).tolist()} if loss == "cosent" else {}
    tokens, found = [], []
    encoder[0].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]["input_ids"].numel()))
    for groups in (1, 4):
        monkeypatch.setattr(finetuning, "LENGTH_GROUPS", groups)
        tokens.clear()
        after = tuned(encoder, examples, epochs=1.5, batch_size=10, learning_rate=1e-3, mini_batch=mini_batch)
        assert "forward" not in vars(after)
        found.append((vector(after), sum(tokens)))
    (whole, computed), (grouped, fewer) = found
    assert fewer < 0.8 * computed
    assert (whole - grouped).norm() < 0.01 * (whole - vector(encoder)).norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "nowhere"}, "no token store at nowhere"),
        ({"model": "RUN", "attention": "nowhere"}, "no token store at nowhere"),
        ({"train_sizes": ["15"], "finetune": True}, "--train-sizes 15: there are 14 .* farm"),
        ({"finetune": True, "finetune_learning_rate": "auto", "retrieval": ["FEW"]}, "too few to choose"),
        ({"retrieval": ["BARE"], "finetune": True}, r"nothing to fine-tune on, .*qrels/train\.tsv"),
        ({"output": "BARE"}, "no result of this command"),
        ({"pair_losses": ["cosines"]}, "--pair-losses cosines: there are cosent and cosine"),
        ({"finetune_epochs": 0}, "--finetune-epochs 0 must be positive"),
        ({"train_sizes": ["5"]}, "--train-sizes, .* are settings of --finetune: give it too"),
        ({"whitening": [-1]}, "--whitening -1 must be at least 0"),
        ({"whitening": [20]}, "--whitening 20: .* farm has 20 texts"),
        ({"whitening": [17], "retrieval": ["ALIKE"]}, "to 17 dimensions: the vectors of the 30 texts vary in 0 only"),
        ({"whitening": [2], "retrieval": ["TWICE"]}, "whitening to 2 dimensions needs more .* not 2"),
        ({"finetune": True, "hard_negatives": -1}, "--hard-negatives -1 must be at least 0"),
        ({"queries": 0}, "--queries 0 must be at least 1"),
        ({"query": "x", "retrieval": None, "similarity": ["PAIRS"]}, "--query, .* give --retrieval too"),
        ({"queries": 5, "retrieval": None, "similarity": ["PAIRS"]}, "--queries .* give --retrieval too"),
        ({"split": "dev", "retrieval": None, "similarity": ["PAIRS"]}, "--split .* give --retrieval too"),
        ({"pooling": ["mean"], "retrieval": None, "attention": "nowhere"}, "--pooling .* --retrieval or --sim.* too"),
        ({"finetune": True, "pair_losses": ["cosine"]}, "--pair-losses are of sentence pairs, and none"),
        ({"finetune": True, "hard_negatives": 1, "retrieval": None, "similarity": ["PAIRS"]}, "no collection here"),
        ({"finetune": True, "mini_batch": 1, "retrieval": ["BARE"], "similarity": ["PAIRS"]}, "--mini-batch are of"),
        ({"baselines": True, "seeds": [2**32]}, "--seeds 4294967296: give whole numbers from 0 to 4294967295"),
        ({"seeds": [0, 1]}, "--seeds are of fine-tuning and random weights: give --finetune or --baselines"),
        ({"retrieval": None, "attention": "nowhere"}, "--max-length is of texts: give --retrieval, --sim.*"),
        ({"retrieval": None, "mteb": ["a"], "baselines": True}, "--baselines are none .*--attention too"),
        ({"retrieval": None, "mteb": ["a"], "finetune": True}, "--finetune trains on texts: give --retrieval or"),
        ({"model": "./nowhere"}, "no model folder at ./nowhere"),
        ({"model": "BARE"}, "no model folder at .*bare"),
        ({"model": "STATIC"}, "static is of StaticEmbedding, not a transformer"),
        ({"retrieval": None, "attention": "STORE", "max_length": None}, "another tokenizer than the encoder"),
        ({"split": "train", "finetune": True}, "--split train: what farm would be trained on is what is scored"),
        ({"retrieval": ["nowhere"]}, "no retrieval collection at nowhere"),
        ({"retrieval": None}, "nothing to measure: give --retrieval"),
        ({"train_sizes": ["many"]}, "--train-sizes many: give numbers, or all"),
        ({"pooling": ["median"]}, "no pooling 'median'"),
        ({"max_length": 65}, "--max-length 65: .* at most 64 tokens"),
        ({"finetune": True, "finetune_batch_size": 1}, "--finetune-batch-size 1 must be at least 2"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_measured(
    measure, pairs_folder, store, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr("condenser.evaluation.evaluate.compute", None)
    few, bare = (write_collection(tmp_path / name) for name in ("few", "bare"))
    (few / "qrels/train.tsv").write_text("q7\td7\t1\nq8\td8\t1\n")
    (bare / "qrels/train.tsv").unlink()
    twice = write_documents(tmp_path / "twice", ["a cat", "a dog"] * 20, ["a cat"])
    alike = write_documents(
        tmp_path / "alike", [40 * "the cat " + str(i) for i in range(30)], ["a cat"]
    )  # as far as read
    (tmp_path / "run/checkpoints").mkdir(parents=True)  # is not exported before all else is looked at
    words = StaticEmbedding(AutoTokenizer.from_pretrained(store / "tokenizer").backend_tokenizer, embedding_dim=4)
    SentenceTransformer(modules=[words]).save_pretrained(str(tmp_path / "static"))
    paths = {
        "FEW": few,
        "BARE": bare,
        "PAIRS": pairs_folder,
        "STORE": store,
        "RUN": tmp_path / "run",
        "TWICE": twice,
        "ALIKE": alike,
    }
    paths["STATIC"] = tmp_path / "static"

    def named(value):
        if isinstance(value, list):
            return [named(each) for each in value]
        return str(paths[value]) if value in paths else value

    with pytest.raises(ValueError, match=message):
        measure(**{name: named(value) for name, value in changes.items()})


def test_missing_packages_are_named(measure, monkeypatch):
    def no_version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", no_version)
    with pytest.raises(ImportError, match=r"accelerate: pip install 'condenser\[eval\]'"):
        measure()
