"""Shared small things: a corpus, a store, a recipe. All are made here; nothing is downloaded."""

import gzip
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "WANDB_SILENT": "true"}
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models need no more, and sums depend on it; Lightning sets it else

import numpy as np
import pytest
import torch
import yaml

from condenser.cli import main

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def fit(recipe, runs, name, *options):
    return main(["fit", "--config", str(recipe), "--runs_dir", str(runs), "--name", name, *options])


def slow(*values):
    """Values of a parametrised test that are left to `make test-all`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def error_of(capsys, code, *expected):
    """What a command that ended with this code said, which is one line and holds all that is expected."""
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line and not re.search("INFO|Loading weights", line)
    ]
    assert code in (1, 2)
    assert len(lines) == 1, lines
    assert all(str(text) in lines[0] for text in expected), lines
    return lines[0]


@pytest.fixture(autouse=True)
def nothing_of_a_run_stays():
    """Lightning leaves the variables and the group of a run of several processes; later tests would join it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """Modules of the test's folder can be imported, and are forgotten after it."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if tmp_path in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
            del sys.modules[name]


def write_examples(folder, text):
    """The files of a page's blocks, each of which begins with its name; their contents by name."""
    found = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", text, re.DOTALL))
    for name, content in found.items():
        (folder / name).write_text(content)
    return found


def make_documents(n, seed=0):
    """Documents of 1 to 12 sentences over a small, skewed vocabulary, with words that WordPiece must split."""
    rng = random.Random(seed)
    stems = "encod retriev attend mask token index rank learn layer head dense search".split()  # noqa: SIM905
    words = [stem + end for stem in stems for end in ("", "er", "ing", "ed", "ation", "s")]

    def sentence():
        text = " ".join(rng.choices(words, weights=range(len(words), 0, -1), k=rng.randint(3, 14)))
        return text.capitalize() + rng.choice(".?!")

    return [" ".join(sentence() for _ in range(rng.randint(1, 12))) for _ in range(n)]


def write_rows(path, rows):
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def write_jsonl(path, texts):
    return write_rows(path, ({"id": number, "text": text} for number, text in enumerate(texts)))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "documents.jsonl", make_documents(400))


@pytest.fixture(scope="session")
def store(corpus, tmp_path_factory):
    """A token store of blocks of up to 32 tokens with its own 200-word vocabulary."""
    folder = tmp_path_factory.mktemp("stores") / "tiny"
    options = ["--max-length", "32", "--validation-fraction", "0.1", "--workers", "1"]
    assert main(["prepare", "--input", str(corpus), "--tokenizer", "train:200", "--output", str(folder), *options]) == 0
    return folder


def write_collection(folder, documents, queries):
    """A BEIR folder of texts, in which document i answers query i."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        write_rows(folder / f"{name}.jsonl", ({"_id": str(number), "text": text} for number, text in enumerate(texts)))
    judged = "".join(f"{number}\t{number}\t1\n" for number in range(len(queries)))
    (folder / "qrels/test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    return folder


@pytest.fixture
def copied(store, tmp_path):
    """A copy of the store."""
    return Path(shutil.copytree(store, tmp_path / "copy"))


def data_of(store, **settings):
    """The data of a store, set up for training."""
    from condenser.data.datamodule import CondenserDataModule

    few = {"batch_size": 16, "micro_batches_per_step": 4, "num_workers": 0}
    data = CondenserDataModule(str(store), **few | settings)
    data.setup("fit")
    return data


def flip_a_bit(path, place=0.5):
    """At this share of a file."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr("condenser.corpus.prepare.UNIT_BYTES", (4000, 4000))


def numpy_calls(function, *names):
    """How many calls of these functions of numpy a function makes."""
    calls = []

    def counted(call):
        return lambda *args, **kwargs: calls.append(1) or call(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(np, name, counted(getattr(np, name)))
        function()
    return len(calls)


TINY_MODEL = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "attention_probs_dropout_prob": 0.0,
}


def tiny_recipe(store):
    """Settings that train 8 steps of a tiny Condenser."""
    return {
        "seed_everything": 1,
        "data": {"store": str(store), "batch_size": 32, "micro_batches_per_step": 2, "num_workers": 0},
        "model": {"backbone_config": TINY_MODEL, "skip_from": 1, "optimizer": {"learning_rate": 1e-3}},
        "checkpoint": {"every_n_steps": 3},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 8,
            "log_every_n_steps": 2,
            "val_check_interval": 4,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }


@pytest.fixture(scope="session")
def recipe(store, tmp_path_factory):
    """The recipe's file."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(store)))
    return path


@pytest.fixture(scope="session")
def run(recipe, tmp_path_factory):
    """A finished run of the recipe."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["fit", "--config", str(recipe), "--name", "tiny", "--runs_dir", str(runs)]) == 0
    return runs / "tiny"


@pytest.fixture(scope="session")
def tiny_export(run):
    """The run's export, in the run folder as the demo has it."""
    folder = run.parent / "tiny-export"
    assert main(["export", str(run), "--output", str(folder)]) == 0
    return folder


def write_bert(folder, texts, **sizes):
    """A BERT masked LM with random weights, and a WordPiece tokenizer of these texts."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    trainer = BertWordPieceTokenizer(lowercase=True)
    trainer.train_from_iterator(texts, vocab_size=200, show_progress=False)
    tokenizer = BertTokenizer(vocab=trainer.get_vocab())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def roberta(corpus, tmp_path_factory):
    """A folder with a tiny RoBERTa masked LM and its byte-level tokenizer."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

    trained = ByteLevelBPETokenizer()
    trained.train(str(corpus), vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    model = json.loads(trained.to_str())["model"]
    tokenizer = RobertaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer.save_pretrained(folder)
    RobertaForMaskedLM(RobertaConfig(**TINY_MODEL, vocab_size=len(tokenizer))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def spans(corpus, store, tmp_path_factory):
    """A token store of spans of documents, with the tokenizer of the blocks."""
    folder = tmp_path_factory.mktemp("spans") / "tiny"
    options = ["--kind", "spans", "--max-length", "32", "--validation-fraction", "0.1", "--workers", "1"]
    source = ["--input", str(corpus), "--tokenizer", str(store / "tokenizer")]
    assert main(["prepare", *source, "--output", str(folder), *options]) == 0
    return folder
