"""What docs/ holds runs: fine-tuning an export with sentence-transformers, hard negatives for Tevatron's format."""

import gzip
import importlib.util
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel, AutoTokenizer

from condenser.cli import main

DOCS = Path(__file__).parents[1] / "docs"


def script(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pairs(tmp_path, corpus):
    """Questions that are the first words of their passages, in that order of columns, with a negative each."""
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()[:33]]
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = [{"query": a[:30], "answer": a, "negative": b} for a, b in itertools.pairwise(texts)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def collection(tmp_path, pairs):
    """The pairs as a BEIR folder."""
    folder = tmp_path / "collection"
    (folder / "qrels").mkdir(parents=True)
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    for name, field in (("corpus", "answer"), ("queries", "query")):
        lines = [json.dumps({"_id": str(i), "text": row[field]}) for i, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "qrels" / "test.tsv").write_text("".join(f"{i}\t{i}\t1\n" for i in range(len(rows))))
    return folder


def test_the_script_fine_tunes_an_export_to_what_evaluate_reads(tiny_export, pairs, collection, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    out = tmp_path / "retriever"
    steps = ["--batch-size", "8", "--mini-batch", "4", "--learning-rate", "1e-3", "--max-steps", "3"]
    fine_tune = script("finetune_sentence_transformers").main
    fine_tune([str(tiny_export), "--output", str(out), "--dataset", str(pairs), *steps])
    before, after = (sentence_transformers.SentenceTransformer(str(f), device="cpu") for f in (tiny_export, out))
    assert [after.similarity_fn_name, after[1].pooling_mode] == ["dot", "cls"]
    assert after.max_seq_length == before.max_seq_length
    assert not np.allclose(before.encode(["the encoder attends"]), after.encode(["the encoder attends"]), atol=1e-3)
    result = tmp_path / "evaluation"
    assert main(["evaluate", str(out), "--retrieval", str(collection), "--output", str(result)]) == 0
    assert json.loads((result / "results.json").read_text())["settings"]["similarity"] == "dot"


def test_a_folder_that_tevatron_wrote_is_a_retriever_with_the_exports_four_files(tiny_export, tmp_path):
    """Tevatron saves a Hugging Face folder; the files that are copied say [CLS] and dot product."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    AutoModel.from_pretrained(tiny_export).save_pretrained(tmp_path / "marco")
    AutoTokenizer.from_pretrained(tiny_export).save_pretrained(tmp_path / "marco")
    copied = (DOCS / "fine-tuning.md").read_text().split("cp -r my-condenser-export/{")[1].split("}")[0].split(",")
    assert len(copied) == 4
    for name in copied:
        source, target = tiny_export / name, tmp_path / "marco" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    before, after = (
        sentence_transformers.SentenceTransformer(str(f), device="cpu") for f in (tiny_export, tmp_path / "marco")
    )
    assert after.similarity_fn_name == "dot"
    np.testing.assert_allclose(before.encode(["masked"]), after.encode(["masked"]), rtol=1e-4, atol=1e-5)


def test_mined_negatives_are_ranked_high_and_not_relevant(tmp_path):
    def write(name, rows):
        with gzip.open(tmp_path / name, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    passages = [{"docid": str(i), "title": "", "text": f"passage {i}"} for i in range(9)]
    question = {"query_id": "q", "query": "?", "positive_passages": passages[:2], "negative_passages": []}
    write("train.jsonl.gz", [question, question | {"query_id": "not ranked"}])
    write("corpus.jsonl.gz", passages)
    (tmp_path / "rank.tsv").write_text("".join(f"q\t{i}\t{-i}\n" for i in range(9)))
    files = {"train": "train.jsonl.gz", "corpus": "corpus.jsonl.gz", "ranking": "rank.tsv", "output": "mined.jsonl.gz"}
    options = [word for name, file in files.items() for word in (f"--{name}", str(tmp_path / file))]
    script("mine_negatives").main([*options, "--depth", "5", "--negatives", "2"])
    with gzip.open(tmp_path / "mined.jsonl.gz", "rt") as file:
        (row,) = map(json.loads, file)
    found = {passage["docid"] for passage in row.pop("negative_passages")}
    assert len(found) == 2
    assert found < {"2", "3", "4"}
    assert row == {key: question[key] for key in row}
