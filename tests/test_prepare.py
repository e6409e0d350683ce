"""`condenser prepare`: nothing is lost, any format, the same bytes however it was run, clear errors."""

import gzip
import json
import lzma
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import make_documents, write_jsonl
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from condenser.cli import main
from condenser.data.store import TokenStore, read_manifest


def prepare(source, tokenizer, output, *options):
    arguments = ["--input", *map(str, source if isinstance(source, list) else [source]), "--tokenizer", str(tokenizer)]
    return main(["prepare", *arguments, "--output", str(output), "--max-length", "32", "--workers", "1", *options])


def prepared(source, tokenizer, output, *options):
    """Makes a store; gives what it counted."""
    assert prepare(source, tokenizer, output, *options) == 0
    return read_manifest(output)["counts"]


def refused(capsys, *arguments):
    """What is said of what cannot be prepared."""
    assert prepare(*arguments) == 1
    return capsys.readouterr().err


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def all_tokens(folder):
    """The tokens of every row of both splits."""
    return rows_of(folder, "train") + rows_of(folder, "validation")


def rows_of(folder, split):
    store = TokenStore(folder, split)
    return [store.rows(np.array([index])).tokens.tolist() for index in range(len(store))]


def test_the_blocks_put_together_are_the_documents_tokens(store, corpus):
    tokenizer = AutoTokenizer.from_pretrained(store / "tokenizer")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    found = sorted(token for row in all_tokens(store) for token in row)
    assert found == sorted(token for row in expected for token in row)
    counts = read_manifest(store)["counts"]
    assert counts["documents"] == 400
    assert counts["tokens_kept"] == len(found)
    assert counts["tokens_dropped"] == 0


@pytest.fixture(scope="module")
def texts():
    return make_documents(60, seed=5)


@pytest.fixture(scope="module")
def plain(texts, store, tmp_path_factory):
    """The store of `texts` from a plain JSONL file: what every other format must give."""
    folder = tmp_path_factory.mktemp("formats")
    assert prepare(write_jsonl(folder / "plain.jsonl", texts), store / "tokenizer", folder / "out") == 0
    return all_tokens(folder / "out")


def write_text(path, texts):
    path.write_text("\n\n".join(texts) + "\n")


def write_compressed(opener):
    def write(path, texts):
        with opener(path, "wb") as file:
            file.write(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts))

    return write


FORMATS = {
    "documents.jsonl.gz": write_compressed(gzip.open),
    "documents.jsonl.xz": write_compressed(lzma.open),
    "documents.jsonl.zst": write_compressed(zstandard.open),
    "documents.parquet": lambda path, texts: pq.write_table(pa.table({"text": texts}), path),
    "documents.txt": write_text,
    "dataset": lambda path, texts: datasets.Dataset.from_dict({"text": texts}).save_to_disk(path),
    "folder": lambda path, texts: (path.mkdir(), write_jsonl(path / "a.jsonl", texts)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_blocks(name, texts, plain, store, tmp_path):
    FORMATS[name](tmp_path / name, texts)
    assert prepare(tmp_path / name, store / "tokenizer", tmp_path / "out") == 0
    assert sorted(all_tokens(tmp_path / "out")) == sorted(plain)


def test_the_store_is_what_datasets_reads(store):
    dataset = datasets.load_from_disk(str(store / "train"))
    ours = TokenStore(store, "train")
    assert len(dataset) == len(ours)
    tokens, word_starts, lengths = ours.rows(np.array([7, 0]))
    assert tokens.tolist() == dataset[7]["input_ids"] + dataset[0]["input_ids"]
    bits = np.unpackbits(np.array(dataset[7]["word_starts"], np.uint8), bitorder="little")[: lengths[0]]
    assert word_starts[: lengths[0]].tolist() == bits.astype(bool).tolist()
    assert lengths[0] == dataset[7]["length"]


def test_chinese_text_becomes_rows_of_characters_that_end_with_sentences(tmp_path):
    texts = ["语言描述模型。文档预测句子！", "天气比较历史？城市研究图书。", "模型阅读语言。"]  # noqa: RUF001
    source = write_jsonl(tmp_path / "texts.jsonl", texts * 4)
    options = ["--language", "zh", "--validation-fraction", "0"]
    assert prepare(source, "train:200", tmp_path / "out", *options) == 0
    store, tokenizer = TokenStore(tmp_path / "out", "train"), AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    rows = store.rows(np.arange(len(store)))
    assert rows.word_starts.all()
    decoded = {tokenizer.decode(row).replace(" ", "") for row in rows_of(tmp_path / "out", "train")}
    assert decoded == {*texts}


def times(folder, pattern="*"):
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


def test_a_finished_store_is_left_alone(store, corpus, capsys):
    before = times(store)
    options = ["--validation-fraction", "0.1"]
    assert prepare(corpus, "train:200", store, *options) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert "another seed" in refused(capsys, corpus, "train:200", store, *options, "--seed", "3")
    assert times(store) == before


@pytest.mark.slow
def test_training_the_tokenizer_in_another_process_gives_the_same(corpus, store, tmp_path):
    command = [sys.executable, "-m", "condenser", "prepare", "--input", str(corpus), "--tokenizer", "train:200"]
    subprocess.run([*command, "--output", str(tmp_path / "again")], check=True, capture_output=True)
    for path in (store / "tokenizer").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "tokenizer" / path.name).read_bytes()


def test_the_split_follows_the_text_not_the_place(store, tmp_path):
    texts = make_documents(200, seed=9)
    for name, order in (("a", texts), ("b", texts[::-1])):
        source = write_jsonl(tmp_path / f"{name}.jsonl", order)
        assert prepare(source, store / "tokenizer", tmp_path / name, "--validation-fraction", "0.2") == 0
    a, b = (sorted(rows_of(tmp_path / name, "validation")) for name in "ab")
    assert a == b
    assert len({json.dumps(row) for row in a}) > 20


GOOD = json.dumps({"text": "One sentence. And another one."}) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("blank.jsonl", b"\n\n", "holds no documents"),
        ("broken.jsonl", (GOOD + "{oops\n").encode(), "broken.jsonl, line 2: not JSON"),
        ("list.jsonl", b"[1, 2]\n", "line 1: a JSON object was expected, not list; one object a line"),
        ("indented.json", b'{\n "text": "a"\n}\n', "(char 1); one object a line is read"),
        ("column.jsonl", b'{"body": "x", "title": "y"}\n', "no column 'text'; there are 'body', 'title'"),
        ("number.jsonl", b'{"text": 3}\n', "line 1: 'text' is not a text but int"),
        ("latin.txt", b"caf\xe9\n", "latin.txt, line 1: not UTF-8"),
        ("not.parquet", b"PAR0", "not.parquet cannot be read to its end"),
        ("dates.parquet", {"text": ["a"], "id": pa.array([1 << 62], pa.timestamp("us"))}, "dates.parquet cannot be"),
        ("list.parquet", {"text": [["a"]]}, "'text' is not a text but list"),
        ("number.parquet", {"text": [3]}, "'text' is not a text but int"),
        ("column.parquet", {"body": ["x"]}, "no column 'text'; there are 'body'"),
        ("table.csv", b"text\nx\n", "not a format that is read here"),
    ],
)
def test_unreadable_input_is_named_and_nothing_is_written(name, content, message, store, tmp_path, capsys):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        pq.write_table(pa.table(content), tmp_path / name)
    assert message in refused(capsys, tmp_path / name, store / "tokenizer", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("train:x", "whole number"),
        ("train:\u00b2", "whole number"),
        ("train:10000000000", "whole number"),
        ("./nowhere", "no tokenizer folder at ./nowhere"),
    ],
)
def test_an_unsuitable_tokenizer_is_refused(spec, message, corpus, tmp_path, capsys):
    assert message in refused(capsys, corpus, spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("token", ["mask_token", "cls_token"])
def test_a_tokenizer_without_mask_or_cls_is_refused(token, corpus, store, tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    del names[token]
    file = str(store / "tokenizer" / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file, **names).save_pretrained(folder)
    assert f"has no {token.removesuffix('_token')} token" in refused(capsys, corpus, folder, tmp_path / "out")


IMPOSSIBLE = (
    "--max-length=4 --short-fraction=1.5 --validation-fraction=-1 --shard=3/3 --shard=1 --shard=a/b --shard=-1/2 "
    "--shard= --tokenizer= --output= --input= --word-segmenter= --seed=18446744073709551616"
)


@pytest.mark.parametrize("option", IMPOSSIBLE.split())
def test_impossible_settings_are_refused(option, corpus, store, tmp_path, capsys):
    assert option.partition("=")[0] in refused(capsys, corpus, store / "tokenizer", tmp_path / "out", option)
    assert not (tmp_path / "out").exists()


def test_a_list_of_inputs_ends_at_the_next_option(corpus, store, tmp_path):
    """Also at the short one; and an option whose value was forgotten does not take it for one."""
    (tmp_path / "s.yaml").write_text(f"tokenizer: {store / 'tokenizer'}\nmax_length: 32\n")
    wanted = ["prepare", "--output", str(tmp_path / "out"), "--input", str(corpus), "-c", str(tmp_path / "s.yaml")]
    assert main(wanted) == 0
    assert read_manifest(tmp_path / "out")["settings"]["max_length"] == 32
    for following in ("--append", "-c"):
        assert main(["prepare", "--input", str(corpus), "--output", following, str(tmp_path / "s.yaml")]) == 2
