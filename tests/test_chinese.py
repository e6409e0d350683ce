# ruff: noqa: RUF001
"""Chinese through the whole of it: text, Condenser, coCondenser from it, export, pairs of CLUE's kind by CoSENT."""

import json
import random

import pytest
import yaml
from conftest import TINY_MODEL, write_jsonl

from condenser.cli import main

WORDS = ["语言", "模型", "检索", "文档", "向量", "训练", "掩码", "句子", "搜索", "学习", "图书", "城市", "天气", "历史"]
VERBS = ["描述", "比较", "预测", "阅读", "编码", "研究"]


def documents(n, seed=0):
    """Of four to eight sentences about a few words each, without a space."""
    draw = random.Random(seed)
    found = []
    for _ in range(n):
        about = draw.sample(WORDS, 4)
        sentences = (f"{draw.choice(about)}{draw.choice(VERBS)}{draw.choice(about)}" for _ in range(draw.randint(4, 8)))
        found.append("".join(f"{sentence}{draw.choice('。！？')}" for sentence in sentences))
    return found


def pairs(n, seed):
    """1 where both sentences are about the same word."""
    draw = random.Random(seed)
    for _ in range(n):
        first, other = draw.sample(WORDS, 2)
        same = draw.random() < 0.5
        second = first if same else other
        yield {
            "sentence1": f"请问{first}怎么{draw.choice(VERBS)}？",
            "sentence2": f"我想{draw.choice(VERBS)}{second}",
            "label": str(int(same)),
        }


@pytest.mark.slow
def test_chinese_text_becomes_an_encoder_that_tells_pairs_apart(tmp_path):
    corpus = write_jsonl(tmp_path / "texts.jsonl", documents(300))
    stores = {kind: tmp_path / kind for kind in ("blocks", "spans")}
    for kind, store in stores.items():
        tokenizer = ["--tokenizer", "train:300" if kind == "blocks" else str(stores["blocks"] / "tokenizer")]
        options = ["--language", "zh", "--kind", kind, "--max-length", "32", "--validation-fraction", "0.1"]
        assert main(["prepare", "--input", str(corpus), *tokenizer, *options, "--output", str(store)]) == 0

    settings = {
        "data": {"batch_size": 32, "micro_batches_per_step": 1, "num_workers": 0},
        "model": {"skip_from": 1, "optimizer": {"learning_rate": 2e-3}},
        "trainer": {"accelerator": "cpu", "max_steps": 60, "val_check_interval": 30, "check_val_every_n_epoch": None},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    fit = ["fit", "--config", str(tmp_path / "tiny.yaml"), "--runs_dir", str(tmp_path / "runs")]
    scratch = ["--model.backbone_config", json.dumps(TINY_MODEL), "--data.store", str(stores["blocks"])]
    assert main([*fit, "--name", "one", *scratch]) == 0
    assert main(["export", str(tmp_path / "runs/one"), "--output", str(tmp_path / "one")]) == 0
    objective = ["--model.objective", "condenser.models.cocondenser.CoCondenser", "--data.store", str(stores["spans"])]
    assert main([*fit, "--name", "two", "--model.backbone", str(tmp_path / "one"), *objective]) == 0
    assert main(["export", str(tmp_path / "runs/two"), "--output", str(tmp_path / "two")]) == 0

    clue = tmp_path / "clue"
    clue.mkdir()
    for split, n in (("train", 400), ("test", 200)):
        lines = [json.dumps(pair, ensure_ascii=False) for pair in pairs(n, seed=n)]
        (clue / f"{split}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    output = ["--output", str(tmp_path / "evaluation")]
    tuning = ["--finetune", "--finetune-epochs", "4", "--finetune-learning-rate", "2e-3", "--pair-losses", "cosent"]
    assert main(["evaluate", str(tmp_path / "two"), "--similarity", str(clue), *tuning, *output]) == 0
    rows = json.loads((tmp_path / "evaluation/results.json").read_text())["rows"]
    spearman = {bool(row["trained_on"]): row["spearman"] for row in rows}
    assert spearman[True] > 0.6
    assert spearman[True] > spearman[False]
