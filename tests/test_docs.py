"""What docs/ holds runs: fine-tuning an export with sentence-transformers, hard negatives for Tevatron's format, three
examples of changing one idea. What pages say of commands, settings, files and numbers: test_pages.py."""

import gzip
import importlib
import itertools
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc import locate

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_MODEL, error_of, fit, write_collection, write_examples, write_rows
from sentence_transformers import SentenceTransformer
from test_training import assert_minimised, metrics_of
from transformers import AutoModel, AutoTokenizer, ErnieConfig, ErnieForMaskedLM

from condenser.cli import main
from condenser.data.datamodule import CondenserDataModule
from condenser.data.tokenizers import load_tokenizer
from condenser.hub import load_export

DOCS = Path(__file__).parents[1] / "docs"


def script(name, arguments):
    runpy.run_path(str(DOCS / f"{name}.py"))["main"](arguments)


@pytest.fixture
def questions(corpus):
    """That are the first words of their passages, in that order of columns, with a negative each."""
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()[:33]]
    return [{"query": a[:30], "answer": a, "negative": b} for a, b in itertools.pairwise(texts)]


@pytest.fixture
def collection(tmp_path, questions):
    """The questions as a BEIR folder."""
    answers, queries = ([row[field] for row in questions] for field in ("answer", "query"))
    return write_collection(tmp_path / "collection", answers, queries)


def encoders_of(*folders):
    return [SentenceTransformer(str(folder), device="cpu") for folder in folders]


def test_the_script_fine_tunes_an_export_to_what_evaluate_reads(tiny_export, questions, collection, tmp_path):
    out, pairs = tmp_path / "retriever", tmp_path / "pairs"
    pairs.mkdir()
    write_rows(pairs / "train.jsonl", questions)
    steps = ["--batch-size", "8", "--mini-batch", "4", "--learning-rate", "1e-3", "--max-steps", "3"]
    export = [str(tiny_export), "--output", str(out), "--dataset", str(pairs)]
    script("finetune_sentence_transformers", [*export, *steps])
    before, after = encoders_of(tiny_export, out)
    assert [after.similarity_fn_name, after[1].pooling_mode] == ["dot", "cls"]
    assert after.max_seq_length == before.max_seq_length
    assert not np.allclose(before.encode(["the encoder attends"]), after.encode(["the encoder attends"]), atol=1e-3)
    result = tmp_path / "evaluation"
    assert main(["evaluate", str(out), "--retrieval", str(collection), "--output", str(result)]) == 0
    assert json.loads((result / "results.json").read_text())["settings"]["similarity"] == "dot"


def test_a_folder_that_tevatron_wrote_is_a_retriever_with_the_exports_four_files(tiny_export, tmp_path):
    """Tevatron saves a Hugging Face folder; the files that are copied say [CLS] and dot product."""
    AutoModel.from_pretrained(tiny_export).save_pretrained(tmp_path / "marco")
    AutoTokenizer.from_pretrained(tiny_export).save_pretrained(tmp_path / "marco")
    copied = (DOCS / "fine-tuning.md").read_text().split("cp -r my-condenser-export/{")[1].split("}")[0].split(",")
    assert len(copied) == 4
    for name in copied:
        source, target = tiny_export / name, tmp_path / "marco" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    before, after = encoders_of(tiny_export, tmp_path / "marco")
    assert after.similarity_fn_name == "dot"
    np.testing.assert_allclose(before.encode(["masked"]), after.encode(["masked"]), rtol=1e-4, atol=1e-5)


def test_mined_negatives_are_ranked_high_and_not_relevant(tmp_path):
    passages = [{"docid": str(i), "title": "", "text": f"passage {i}"} for i in range(9)]
    question = {"query_id": "q", "query": "?", "positive_passages": passages[:2], "negative_passages": []}
    write_rows(tmp_path / "train.jsonl.gz", [question, question | {"query_id": "not ranked"}])
    write_rows(tmp_path / "corpus.jsonl.gz", passages)
    (tmp_path / "rank.tsv").write_text("".join(f"q\t{i}\t{-i}\n" for i in range(9)))
    files = {"train": "train.jsonl.gz", "corpus": "corpus.jsonl.gz", "ranking": "rank.tsv", "output": "mined.jsonl.gz"}
    options = [word for name, file in files.items() for word in (f"--{name}", str(tmp_path / file))]
    script("mine_negatives", [*options, "--depth", "5", "--negatives", "2"])
    with gzip.open(tmp_path / "mined.jsonl.gz", "rt") as file:
        (row,) = map(json.loads, file)
    found = {passage["docid"] for passage in row.pop("negative_passages")}
    assert len(found) == 2
    assert found < {"2", "3", "4"}
    assert row == {key: question[key] for key in row}


@pytest.fixture
def example(own_modules):
    """Writes the files of a page and makes them importable; gives the YAML."""

    def written(page):
        files = write_examples(own_modules, (DOCS / page).read_text())
        lines = [content.count("\n") for name, content in files.items() if not name.startswith("test_")]
        assert len(lines) == 2
        assert sum(lines) <= 40
        return next(own_modules / name for name in files if name.endswith(".yaml"))

    return written


def test_from_python_the_page_s_script_trains_and_its_checkpoint_is_exported(store, tmp_path, monkeypatch):
    (text,) = re.findall(r"```python\n(import lightning.*?)```", (DOCS / "training.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    text = text.replace("data/tokens/demo", str(store)).replace("max_steps=100", "max_steps=2")
    Path("mine.py").write_text(text)
    found = runpy.run_path("mine.py")
    assert found["trainer"].global_step == 2
    assert main(["export", "mine.ckpt", "--output", "mine-export"]) == 0
    exported = AutoModel.from_pretrained("mine-export").state_dict()
    trained = found["module"].model.lm.base_model.state_dict()
    assert all(torch.equal(weight, exported[name]) for name, weight in trained.items())


def test_another_objective_is_a_file_and_a_yaml(recipe, tmp_path, example, monkeypatch, capsys):
    overlay = example("change-objective.md")
    assert fit(recipe, tmp_path, "bag", "-c", str(overlay), "--trainer.log_every_n_steps", "1") == 0
    assert_minimised(tmp_path / "bag", mlm=1, bag=0.25)
    for kind in ("train", "val"):
        losses = [float(row[f"{kind}/bag_loss"]) for row in metrics_of(tmp_path / "bag") if row[f"{kind}/loss"]]
        assert losses[-1] < losses[0]
    monkeypatch.setenv("CONDENSER_IMPORT", "bag_of_words")
    assert main(["export", str(tmp_path / "bag"), "--output", str(tmp_path / "export")]) == 0
    assert "left out" not in capsys.readouterr().out
    assert type(load_export(tmp_path / "export")).__name__ == "BagOfWords"


def test_another_masking_is_a_file_and_a_yaml(recipe, store, tmp_path, example):
    overlay = example("change-masking.md")
    assert fit(recipe, tmp_path, "mine", "-c", str(overlay), "--data.num_workers=1", "--trainer.max_steps=2") == 0
    settings = yaml.safe_load(overlay.read_text())["data"]
    data = CondenserDataModule(str(store), batch_size=64, **settings | {"masking": locate(settings["masking"])})
    data.setup("fit")
    fields = data.train_dataloader().dataset.one_pass(0, np.arange(len(data.train)))
    n_masked = np.diff(fields["cu_seqlens_query"]) - 1
    shares = n_masked / (np.diff(fields["cu_seqlens"]) - 2)
    assert shares.std() > 0.08
    assert 0.2 < n_masked.sum() / fields["n_ordinary"] < 0.4


@pytest.mark.slow
def test_another_backbone_is_a_file_and_a_yaml(recipe, store, tmp_path, example, monkeypatch):
    overlay = example("change-backbone.md")
    ernie = ErnieForMaskedLM(ErnieConfig(**TINY_MODEL, vocab_size=200, use_task_id=True))
    ernie.save_pretrained(tmp_path / "tiny")
    load_tokenizer(store / "tokenizer").save_pretrained(tmp_path / "tiny")
    options = ["--model.backbone", str(tmp_path / "tiny"), "--model.backbone_config", "{}"]
    assert fit(recipe, tmp_path, "ernie", "-c", str(overlay), *options) == 0
    export = ["export", str(tmp_path / "ernie"), "--output", str(tmp_path / "export")]
    alone = subprocess.run([sys.executable, "-m", "condenser", *export], capture_output=True, text=True)
    assert "a backbone of type 'ernie' is not supported" in alone.stderr
    monkeypatch.setenv("CONDENSER_IMPORT", "ernie")
    assert main(export) == 0
    assert AutoModel.from_pretrained(tmp_path / "export").config.model_type == "ernie"
    importlib.import_module("test_ernie").test_the_loss_is_hugging_faces()


def test_a_module_that_cannot_be_imported_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("CONDENSER_IMPORT", "no_such_module")
    assert "No module named 'no_such_module'" in error_of(capsys, main(["inspect", "nowhere"]))
