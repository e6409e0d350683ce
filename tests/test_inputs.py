"""What `--input` may name and hold: nothing is left out in silence, nothing else becomes a document."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from decimal import Decimal
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_documents, write_jsonl
from test_prepare import all_tokens, contents, prepare, prepared, refused, rows_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from condenser.cli import main
from condenser.corpus.documents import Document
from condenser.corpus.inputs import FORMATS, in_short, resolve
from condenser.corpus.prepare import prepare as prepare_from_python
from condenser.corpus.readers import Source
from condenser.corpus.repeats import keys_of, runs_of_words
from condenser.corpus.work import do_share
from condenser.data.collate import Vocabulary
from condenser.data.lock import locked
from condenser.data.store import TokenStore, read_manifest
from condenser.data.tokenizers import load_tokenizer, tokenizer_files, vocabulary_size
from condenser.evaluation.retrieval import read_collection
from condenser.evaluation.similarity import read_similarity
from condenser.hub import warm_start
from condenser.models.condenser import Condenser
from condenser.runs import checkpoints


@pytest.fixture
def folder(tmp_path):
    """A folder as people have them."""
    root = tmp_path / "in"
    texts = make_documents(12, seed=1)
    for name in ("b.JSONL", "a.jsonl", "c.ndjson", "deep/er/d.jsonl", "[1] x*?.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(root / name, [f"{name} {texts[0]}", texts[1]])
    pq.write_table(pa.table({"text": ["upper case"]}), root / "e.PARQUET")
    for name in (".hidden.jsonl", "._a.jsonl", "a.jsonl~", "#a.jsonl#", ".a.jsonl.swp", "a.jsonl.part", ".DS_Store"):
        (root / name).write_bytes(b"\0\1 no text")
    (root / "deep/.ipynb_checkpoints").mkdir()
    (root / "deep/.ipynb_checkpoints/a.jsonl").write_text("no JSON")
    (root / "README.txt").write_text("About the data.")
    (root / "~$a.jsonl").write_bytes(b"\5owner")
    (root / "deep" / "dataset_infos.json").write_text('{"default": {"splits": {}}}')
    (root / "f.csv").write_text("text\nsomething\n")
    (root / "g.arrow").write_bytes(b"ARROW1")
    (root / "_SUCCESS.json").touch()
    return root


SMALL = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
READ = ["[1] x*?.jsonl", "a.jsonl", "b.JSONL", "c.ndjson", "e.PARQUET", "deep/er/d.jsonl"]


def read_from(name):
    sources, left_out = resolve([str(name)])
    return [source.name for source in sources], in_short(left_out)


def test_a_folder_gives_all_that_can_be_read_and_names_the_rest(folder, store, tmp_path, capsys):
    found, left_out = read_from(folder)
    assert found == [str(folder / name) for name in READ]
    text = "2 text beside data (1 .txt, 1 .json; "
    for part in ("9 hidden, or left behind", "2 no format that is read", "1 .csv, 1 .arrow", text, "1 empty"):
        assert part in left_out
    assert prepared(folder, store / "tokenizer", tmp_path / "out")["documents"] == 11
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "f.csv" in line]
    assert line == left_out


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**", READ),
        ("**/*.jsonl", ["[1] x*?.jsonl", "a.jsonl", "deep/er/d.jsonl"]),
        ("*.jsonl", ["[1] x*?.jsonl", "a.jsonl"]),
        ("*", READ),
        ("[1] x*?.jsonl", ["[1] x*?.jsonl"]),  # the name of a file, though it looks like a pattern
        ("a.jsonl", ["a.jsonl"]),
        ("deep", ["deep/er/d.jsonl"]),
    ],
)
def test_patterns_are_a_shells_and_names_are_names(pattern, expected, folder):
    found, _ = read_from(folder / pattern)
    assert sorted(found) == sorted(str(folder / name) for name in expected)


def test_links_are_followed_once_and_only_hidden_folders_are_left_out(tmp_path, monkeypatch):
    root = tmp_path / "in"
    for name in ("in/a.jsonl", "real/b.jsonl", "in/__part/c.jsonl", "in/.hidden/d.jsonl", "in/wiki2/e.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, ["text"])
    (root / "link").symlink_to(tmp_path / "real")
    (root / "loop").symlink_to(root)
    (root / "broken.jsonl").symlink_to(tmp_path / "nothing")
    (root / "same.jsonl").symlink_to(root / "a.jsonl")
    expected = [root / name for name in ("a.jsonl", "__part/c.jsonl", "link/b.jsonl", "wiki2/e.jsonl")]
    found, left_out = read_from(root)
    assert found == [*map(str, expected)]
    assert "1 hidden" in left_out
    assert "1 a link to nothing" in left_out
    for pattern in ("**", "**/*.jsonl"):
        assert {os.path.realpath(path) for path in read_from(root / pattern)[0]} >= {
            *map(os.path.realpath, expected[:3])
        }
    assert read_from(root / "**/wiki*")[0] == [str(expected[3])]


def test_a_name_that_is_not_utf8_is_named_and_left_out(tmp_path, capsys, store):
    """As archives of Windows give them: it can be neither noted down nor said."""
    write_jsonl(tmp_path / "a.jsonl", ["Text."])
    write_jsonl(tmp_path / "caf\udce9.jsonl", ["Text."])
    assert prepared(tmp_path, store / "tokenizer", tmp_path / "out")["documents"] == 1
    assert f"1 a name that is not UTF-8 (1 .jsonl; {tmp_path}/caf\\udce9.jsonl)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not UTF-8: rename it"):
        resolve([str(tmp_path / "caf\udce9.jsonl")])


def test_a_file_without_documents_is_named_and_stops_only_where_it_was_named(store, tmp_path, capsys):
    root = tmp_path / "in"
    root.mkdir()
    write_jsonl(root / "a.jsonl", make_documents(3))
    (root / "b.jsonl").write_text("\n")
    with gzip.open(root / "c.jsonl.GZ", "wb"):
        pass
    assert prepare(root, store / "tokenizer", tmp_path / "out") == 0
    assert "2 without a document (1 .jsonl, 1 .GZ" in capsys.readouterr().out
    assert "holds no documents" in refused(capsys, root / "b.jsonl", store / "tokenizer", tmp_path / "no")


@pytest.mark.parametrize("source", ["", "**"], ids=["folder", "pattern"])
def test_a_store_among_its_own_input_is_no_input_and_named(source, store, tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", make_documents(3))
    for output in ("store", "store", "other"):
        assert prepare(tmp_path / source, store / "tokenizer", tmp_path / output) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert f"a token store (1 without an ending; {tmp_path / 'store'})" in out
    assert contents(tmp_path / "store") == contents(tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input", []),
        ("input", [""]),
        ("kind", "foo"),
        ("engine", "foo"),
        ("language", "english"),
        ("language", "EN"),
        ("language", "deu"),
        ("language", "cn"),
        ("shard", "\u00b2/3"),
        ("shard", ""),
    ],
)
def test_from_python_settings_are_looked_at_too(name, value, store, corpus, tmp_path):
    settings = {"input": corpus, "tokenizer": store / "tokenizer", "output": tmp_path / "out"}
    with pytest.raises(ValueError, match=f"--{name}"):
        prepare_from_python(**settings | {name: value})


def test_home_is_known_to_the_name_of_a_file(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert read_from("~/a.jsonl")[0] == [str(folder / "a.jsonl")]


def test_home_is_known_to_every_command_on_its_line_and_in_its_files(recipe, store, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(store)
    (tmp_path / "fit.yaml").write_text("{runs_dir: ~/runs, name: r, data: {store: ~/tiny}, trainer: {max_steps: 2}}")
    (tmp_path / "export.yaml").write_text("output: ~/exported")
    for command in (
        ["fit", "--config", str(recipe), "--config=~/fit.yaml"],
        ["launch", "--config", str(recipe), "-c", "fit.yaml", "--name", "l", "--gpus", "0", "--dry-run"],
        ["export", "~/runs/r", "-c", "export.yaml"],
        ["report", "runs/r", "--output=~/report.html"],
        ["bench", "data", "--batch-size=64", "--rounds=1", "--json=~/figures.json"],
    ):
        assert main(command) == 0
    made = "runs/r/summary.json", "runs/l/launch/job.sh", "exported/config.json", "report.html", "figures.json"
    assert all((tmp_path / name).is_file() for name in made)
    assert not (tmp_path / "~").exists()


def test_a_folder_of_texts_alone_gives_texts_but_what_is_about_them(tmp_path):
    """Data that are hidden or empty are none."""
    for name in ("b.txt", "a.TXT", "README.txt", "LICENSE.txt", ".meta.json"):
        (tmp_path / name).write_text("Words.")
    (tmp_path / "z.json").touch()
    found, left_out = read_from(tmp_path)
    assert found == [str(tmp_path / "a.TXT"), str(tmp_path / "b.txt")]
    assert "2 text beside data" in left_out


@pytest.mark.parametrize(
    ("fixture", "what"), [("run", "a run folder"), ("tiny_export", "an export"), ("store", "a token store")]
)
def test_what_the_commands_made_is_no_text_and_named(fixture, what, request, store, tmp_path, capsys):
    folder = request.getfixturevalue(fixture)
    capsys.readouterr()
    assert f"{folder} is {what}, not text" in refused(capsys, folder, store / "tokenizer", tmp_path / "out")


@pytest.mark.parametrize(("between", "said"), [("\n", True), ("\n\n", False)])
def test_plain_text_without_blank_lines_is_said_to_be_one_document(between, said, store, tmp_path, capsys):
    source = tmp_path / "a.txt"
    source.write_text(between.join(make_documents(40)))
    assert prepared(source, store / "tokenizer", tmp_path / "out")["documents"] == (1 if said else 40)
    out = capsys.readouterr().out
    assert (f"{source}: 1 document in 40 lines: in plain text a blank line ends a document" in out) is said
    assert ("give more than one document" in out) is said


def test_what_is_read_is_the_same_in_the_help_as_in_what_refuses():
    assert FORMATS in " ".join(prepare_from_python.__doc__.split())


@pytest.mark.parametrize("name", ["f.csv", "_SUCCESS.json", "*.csv", "deep/.ipynb_checkpoints/*.json", "nothing/**"])
def test_what_is_named_and_cannot_be_read_is_refused_by_name(name, folder, store, tmp_path, capsys):
    error = refused(capsys, folder / name, store / "tokenizer", tmp_path / "out")
    assert "\n" not in error.strip()
    assert name in error
    assert not (tmp_path / "out").exists()


@pytest.fixture
def splits(tmp_path):
    """A saved DatasetDict of the splits a and b, and the texts of each."""
    texts = {"a": make_documents(5, seed=2), "b": make_documents(4, seed=3)}
    saved = {split: datasets.Dataset.from_dict({"text": some}) for split, some in texts.items()}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved", texts


def test_splits_of_a_dataset_are_named(splits, store, tmp_path, capsys):
    saved, texts = splits
    error = refused(capsys, saved, store / "tokenizer", tmp_path / "out")
    assert "no split 'train' but 'a', 'b': name one with --split" in error
    assert not (tmp_path / "out").exists()
    plain = write_jsonl(tmp_path / "plain.jsonl", texts["a"] + texts["b"])
    for source, output, options in ((saved, "both", ["--split", "a+b"]), (plain, "plain", [])):
        assert prepare(source, store / "tokenizer", tmp_path / output, *options) == 0
    assert all_tokens(tmp_path / "both") == all_tokens(tmp_path / "plain")
    assert prepare(saved, store / "tokenizer", tmp_path / "both", "--split", "a") == 1  # another store than that
    for emptied in (saved / "b").glob("data-*"):
        emptied.unlink()
    assert prepared(saved, store / "tokenizer", tmp_path / "one", "--split", "a")["documents"] == 5  # b is not read
    error = refused(capsys, saved, store / "tokenizer", tmp_path / "no", "--split", "a+b+a")
    assert "--split a+b+a names 'a' twice" in error
    error = refused(capsys, plain, store / "tokenizer", tmp_path / "no", "--split", "a")
    assert "none of the inputs is a dataset" in error


def test_a_dataset_is_the_same_where_it_was_copied_to_or_looked_at(splits, store, tmp_path, capsys):
    """`datasets` leaves files of its own beside it, and folders have other sizes on other disks."""
    saved, _ = splits
    arguments = saved, store / "tokenizer", tmp_path / "out", "--split", "a"
    assert prepare(*arguments) == 0
    datasets.load_from_disk(saved)["a"].filter(lambda record: len(record["text"]) > 9)
    assert list(saved.glob("a/cache-*"))
    for number in range(500):
        (saved / "a" / f".{number}{'x' * 200}").touch()  # the folder grows
    for options in ([], ["--append"]):
        capsys.readouterr()
        assert prepare(*arguments, *options) == 0
        assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"text": pa.array([b"caf\xe9"]).view(pa.string())}, "saved cannot be read to its end"),
        ({"text": [3]}, "saved, row 2: 'text' is not a text but int"),
        ({"body": ["Text."]}, "saved: no column 'text'; there are 'body'"),
    ],
)
def test_what_is_wrong_with_a_split_is_said_of_its_dataset(other, message, store, tmp_path, capsys):
    splits = {"a": {"text": ["Text."]}, "b": other}
    saved = {split: datasets.Dataset(pa.table(columns)) for split, columns in splits.items()}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    assert message in refused(capsys, tmp_path / "saved", store / "tokenizer", tmp_path / "out", "--split", "a+b")


def test_splits_are_added_one_after_the_other_and_other_data_under_the_same_name_are_other_data(
    splits, store, tmp_path, monkeypatch
):
    saved, _ = splits
    assert prepared(saved, store / "tokenizer", tmp_path / "out", "--split", "a")["documents"] == 5
    assert prepared(saved, store / "tokenizer", tmp_path / "out", "--split", "b", "--append")["documents"] == 9
    others = datasets.Dataset.from_dict({"text": make_documents(4, seed=7), "id": [1, 2, 3, 4]})
    (tmp_path / "other").mkdir()
    others.with_format("numpy", columns=["id"]).save_to_disk(tmp_path / "other" / "saved")
    monkeypatch.chdir(tmp_path / "other")
    assert prepared("saved", store / "tokenizer", tmp_path / "out", "--append")["documents"] == 13
    write_jsonl(tmp_path / "other/saved/beside.jsonl", ["beside a dataset"])
    assert [source.kind for source in resolve(["saved"])[0]] == ["folder", "jsonl"]


def test_a_saved_dataset_among_other_files_is_read_as_one(splits, tmp_path):
    write_jsonl(tmp_path / "saved.jsonl", ["beside"])
    sources, _ = resolve([str(tmp_path)], split="a")
    assert [(source.name, source.kind) for source in sources] == [
        (str(tmp_path / "saved.jsonl"), "jsonl"),
        (str(tmp_path / "saved"), "folder"),
    ]


def test_a_file_of_anyones_called_state_is_read_and_a_broken_one_of_a_dataset_is_named(splits, store, tmp_path, capsys):
    root = tmp_path / "in"
    root.mkdir()
    write_jsonl(root / "state.json", ["Alabama.", "Alaska."])
    write_jsonl(root / "a.jsonl", ["Text."])
    assert read_from(root)[0] == [str(root / "a.jsonl"), str(root / "state.json")]
    assert prepared(root, store / "tokenizer", tmp_path / "out")["kept"] == 3
    broken = splits[0] / "a" / "state.json"
    for content in (broken.read_text()[:60], "[]"):
        broken.write_text(content)
        assert f"{broken} is damaged" in refused(capsys, splits[0], store / "tokenizer", tmp_path / "no")


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]


def test_parquet_holds_text_in_any_type_and_ids_are_the_same_as_numbers_and_texts(store, tmp_path):
    texts = make_documents(10, seed=4)
    ids = [pa.array([*range(10)]), pa.array(map(str, range(10))), pa.array(map(float, range(10)))]
    ids.append(pa.array([Decimal(number).scaleb(-2) * 100 for number in range(10)]))  # 1.00
    for number, kind in enumerate(TEXT_TYPES):
        column = pa.array(texts).cast(kind if not pa.types.is_dictionary(kind) else pa.string())
        column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column
        pq.write_table(pa.table({"text": column, "id": ids[number % 4]}), tmp_path / f"{number}.parquet")
        assert prepare(tmp_path / f"{number}.parquet", store / "tokenizer", tmp_path / f"out{number}") == 0
        assert all_tokens(tmp_path / f"out{number}") == all_tokens(tmp_path / "out0")
    write_jsonl(tmp_path / "lines.jsonl", texts)  # its ids are numbers
    files = [*tmp_path.glob("*.parquet"), tmp_path / "lines.jsonl"]
    counts = prepared(files, store / "tokenizer", tmp_path / "all")
    assert (counts["repeated_ids"], counts["repeated_texts"]) == (50, 50)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_line_ends_of_windows_and_byte_order_marks_are_no_tokens(suffix, roberta, tmp_path):
    texts = ["One line.\nAnother line.", "A second document."]
    for name, end, mark in (("unix", "\n", b""), ("windows", "\r\n", b"\xef\xbb\xbf")):
        of_text = [text.replace("\n", end) for text in texts]
        lines = of_text if suffix == ".txt" else [json.dumps({"text": text}) for text in of_text]
        between = 2 * end if suffix == ".txt" else end
        (tmp_path / f"{name}{suffix}").write_bytes(mark + between.join(lines).encode() + end.encode())
        assert prepare(tmp_path / f"{name}{suffix}", roberta, tmp_path / name) == 0
    assert all_tokens(tmp_path / "windows") == all_tokens(tmp_path / "unix")
    assert TokenStore(tmp_path / "unix", "train").lengths.sum() > 0


def test_an_id_need_not_be_a_text_and_never_costs_its_document(store, tmp_path):
    ids = pa.array([bytes(range(240, 256)), bytes(16)], pa.binary(16))
    pq.write_table(pa.table({"text": make_documents(2), "id": ids}), tmp_path / "binary.parquet")
    lines = [b'{"id": "\\ud800", "text": "Good text."}', b'{"id": ' + b"7" * 5000 + b', "text": "Good text, too."}']
    (tmp_path / "lines.jsonl").write_bytes(b"\n".join(lines))
    for name in ("binary.parquet", "lines.jsonl"):
        assert prepared(tmp_path / name, store / "tokenizer", tmp_path / f"{name}.out")["kept"] == 2


def test_lines_of_old_macs_and_a_mark_before_a_blank_line(store, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One line.\rAnother.\r\rA second document.\r\r\rA third.\r")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf\n\nThe first.\n")
    for name, n in (("a.txt", 3), ("b.txt", 1)):
        counts = prepared(tmp_path / name, store / "tokenizer", tmp_path / f"{name}.out")
        assert (counts["documents"], counts["kept"]) == (n, n)


def test_unknown_tokens_are_counted_in_both_splits(store, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["\u2603 rank. " * 4 + str(number) for number in range(20)])
    none, half, most = (
        prepared(source, store / "tokenizer", tmp_path / share, "--validation-fraction", share)["tokens_unknown"]
        for share in ("0", "0.5", "0.99")
    )
    assert none == half == most > 80


def test_what_fails_removes_what_it_made_and_nothing_else(store, corpus, tmp_path):
    out = tmp_path / "out"
    (out / ".git").mkdir(parents=True)
    (out / ".git/HEAD").write_text("ref")
    (out / ".env").write_text("secret")
    before = contents(out)
    assert prepare(corpus, "./no/such/tokenizer", out) == 1
    assert contents(out) == before
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "[MASK]"}\n' * 3)
    assert prepare(bad, store / "tokenizer", out, "--min-length", "20") == 1  # nothing is left of it
    assert contents(out) == before
    assert prepare(corpus, store / "tokenizer", out) == 0
    assert (out / ".env").read_text() == "secret"


@pytest.mark.parametrize("options", [[], ["--deduplicate"]])
def test_a_file_that_changes_while_it_is_read_is_named_and_the_command_starts_anew(
    options, store, tmp_path, capsys, monkeypatch
):
    source, out = write_jsonl(tmp_path / "grows.jsonl", make_documents(60)), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            "condenser.corpus.prepare.do_share",
            lambda *given: write_jsonl(source, make_documents(61)) and do_share(*given),
        )
        assert f"{source} has changed while it was read" in refused(capsys, source, store / "tokenizer", out, *options)
    assert not out.exists()
    assert prepared(source, store / "tokenizer", out, *options)["documents"] == 61


@pytest.mark.parametrize(("options", "read"), [([], 1), (["--deduplicate"], 3)])
def test_a_share_looks_again_at_what_it_has_read_and_at_no_more(options, read, store, tmp_path, monkeypatch):
    """Each of a thousand shares would read both ends of all files else."""
    for n in range(3):
        write_jsonl(tmp_path / f"{n}.jsonl", make_documents(20, seed=n))
    looked, whole = [], Source.fingerprint.func
    fingerprint = property(lambda source: looked.append(source.name) or whole(source))
    monkeypatch.setattr(Source, "fingerprint", fingerprint)
    monkeypatch.setattr("condenser.corpus.prepare.do_share", lambda *given: looked.clear() or do_share(*given))
    pattern, out = tmp_path / "*.jsonl", tmp_path / "out"
    assert prepare(pattern, store / "tokenizer", out, *options, "--shard", "1/3") == 0
    assert len(looked) == read


def test_units_that_are_done_are_kept_where_no_row_is_left_of_them_yet(store, small_units, tmp_path):
    """A broken line after many short texts."""
    source, out = tmp_path / "short.jsonl", tmp_path / "out"
    write_jsonl(source, ["a short one"] * 9000 + ["the last one"])
    whole = source.read_text()
    source.write_text(whole[:-20] + "?" * 19 + "\n")
    assert prepare(source, store / "tokenizer", out, "--min-length", "12") == 1
    kept = contents(out)
    assert "unfinished.json" in kept
    assert any(name.startswith("units/00000-") for name in kept)


@pytest.mark.parametrize("options", [[], ["--deduplicate"]])
def test_after_an_input_that_failed_another_may_be_added(options, store, small_units, tmp_path):
    """As if it had never been: no repeat of what is not there, none overlooked."""
    first = write_jsonl(tmp_path / "first.jsonl", make_documents(60, seed=1))
    failing = write_jsonl(tmp_path / "failing.jsonl", make_documents(60, seed=2) * 2)
    failing.write_text(failing.read_text() + "no JSON\n")
    good = write_jsonl(tmp_path / "good.jsonl", [*make_documents(60, seed=3), *make_documents(60, seed=1)])
    for name in ("out", "clean"):
        assert prepare(first, store / "tokenizer", tmp_path / name, *options) == 0
    assert prepare(failing, store / "tokenizer", tmp_path / "out", "--append", *options) == 1
    for name in ("out", "clean"):
        assert prepared(good, store / "tokenizer", tmp_path / name, "--append", *options)["repeated_texts"] == 60
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


@pytest.mark.parametrize("options", [[], ["--deduplicate"]])
def test_one_who_was_killed_when_all_was_done_but_the_clearing_up_has_finished(options, store, tmp_path, capsys):
    files = [write_jsonl(tmp_path / f"{seed}.jsonl", make_documents(20, seed)) for seed in range(3)]

    def add(name, number):
        return prepare(files[number], store / "tokenizer", tmp_path / name, "--append", *options)

    for name in ("same", "other", "clean"):
        assert add(name, 0) == add(name, 1) == 0
    before = contents(tmp_path / "same")
    for name in ("same", "other"):
        state = {"first_source": 1, "settings": read_manifest(tmp_path / name)["settings"]}
        (tmp_path / name / "unfinished.json").write_text(json.dumps(state))
        (tmp_path / name / "units/share-0-of-1.json").write_text('["00001-00000"]')
    capsys.readouterr()
    assert add("same", 1) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert contents(tmp_path / "same") == before
    for name in ("other", "clean"):
        assert add(name, 2) == 0
    assert contents(tmp_path / "other") == contents(tmp_path / "clean")


def test_one_process_makes_a_store_or_several_shares_of_it(store, corpus, tmp_path, capsys):
    out = tmp_path / "{out}"
    out.mkdir()
    with locked(out / ".lock", "busy"):
        for options in ([], ["--shard", "0/2"]):
            error = refused(capsys, corpus, store / "tokenizer", out, *options)
            assert f"{out} is being made by process {os.getpid()} on" in error
    with locked(out / ".lock", "busy", shared=True):
        assert prepare(corpus, store / "tokenizer", out) == 1
        for index in range(2):
            assert prepare(corpus, store / "tokenizer", out, "--shard", f"{index}/2") == 0
        assert main(["prepare", "merge", str(out)]) == 1
    assert main(["prepare", "merge", str(out)]) == 0
    assert not (out / ".lock").exists()


def test_what_others_have_in_a_folder_stays_and_their_folders_are_refused(store, corpus, tmp_path, capsys):
    out = tmp_path / "train"  # which is also the name of a split
    (out / ".git").mkdir(parents=True)
    (out / ".git/z.partial").touch()
    ours = out / "tokenizer.0123abcd.partial"
    ours.mkdir()
    assert prepare(corpus, store / "tokenizer", out) == 0
    assert (out / ".git/z.partial").exists()
    assert not ours.exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "video.partial").write_text("precious")
    assert "holds no token store" in refused(capsys, corpus, store / "tokenizer", other)
    assert contents(other) == {"video.partial": b"precious"}


def with_words(folder, words):
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    special = {token: number for number, token in enumerate(names.values())}
    backend = Tokenizer(models.WordPiece(special | words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


def with_blank_and_double_lines(folder):
    folder.mkdir()
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "", "word", "the", ".", ""]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')


@pytest.mark.parametrize(
    "made",
    [
        partial(with_words, words={"the": 7, "word": 9, ".": 11}),
        partial(with_words, words={"the": 70_000, "word": 70_001, ".": 5}),
        with_blank_and_double_lines,
    ],
    ids=["a hole", "large ids", "blank and double lines"],
)
def test_a_vocabulary_may_have_ids_without_a_token(made, tmp_path):
    """From text to a model: no id wraps around, none is drawn that does not exist, none is without an embedding."""
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    place = tmp_path / "tokenizer"
    made(place)
    (place / ".DS_Store").write_bytes(b"\0")
    source = write_jsonl(tmp_path / "words.jsonl", ["the word. " * 12] * 8)
    assert prepare(source, place, tmp_path / "out") == 0
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    expected = AutoTokenizer.from_pretrained(place)("the word.", add_special_tokens=False)["input_ids"]
    assert len({*expected}) == 3
    rows = TokenStore(tmp_path / "out", "train").rows(np.arange(2))
    assert rows.tokens[:3].tolist() == expected
    manifest, n_ids = read_manifest(tmp_path / "out"), vocabulary_size(tokenizer)
    assert n_ids == max(tokenizer.get_vocab().values()) + 1 >= max(expected) + 1
    assert manifest["tokenizer"]["vocabulary"] == n_ids == len(np.load(tmp_path / "out" / "token_counts.npy"))
    random_ids = Vocabulary.of(tokenizer).random_ids
    assert {*expected} <= {*random_ids.tolist()} <= {*tokenizer.get_vocab().values()}
    model = warm_start(None, SMALL, tokenizer, Condenser, skip_from=1)
    assert model.lm.config.vocab_size == n_ids


@pytest.fixture(scope="module")
def repeating(tmp_path_factory):
    """Two files with texts that repeat within and between them, under other ids; and the texts, each once."""
    folder, texts = tmp_path_factory.mktemp("repeating"), make_documents(60, seed=6)
    write_jsonl(folder / "a.jsonl", [*texts[:40], *texts[:10]])
    write_jsonl(folder / "b.jsonl", [*texts[30:], texts[59], texts[0]])
    return [folder / "a.jsonl", folder / "b.jsonl"], texts


def test_repeated_texts_are_counted_and_on_request_only_the_first_is_kept(
    repeating, store, small_units, tmp_path, capsys
):
    files, texts = repeating
    every = prepared(files, store / "tokenizer", tmp_path / "all")
    once = prepared(write_jsonl(tmp_path / "once.jsonl", texts), store / "tokenizer", tmp_path / "once")
    first = prepared(files, store / "tokenizer", tmp_path / "first", "--deduplicate")
    assert sorted(all_tokens(tmp_path / "first")) == sorted(all_tokens(tmp_path / "once"))
    assert [counts["repeated_texts"] for counts in (every, first, once)] == [22, 22, 0]
    assert [counts["dropped_repeats"] for counts in (every, first, once)] == [0, 22, 0]
    assert first["documents"] == 82 == first["kept"] + 22
    assert "22 dropped repeats" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "first")]) == 0
    assert "22 dropped repeats" in " ".join(capsys.readouterr().out.split())
    assert "another deduplicate" in refused(capsys, files, store / "tokenizer", tmp_path / "first")


def test_repeats_are_the_same_for_input_that_is_added(repeating, store, small_units, tmp_path):
    files, _ = repeating
    assert prepare(files, store / "tokenizer", tmp_path / "one", "--deduplicate") == 0
    assert prepare(files[:1], store / "tokenizer", tmp_path / "added", "--deduplicate") == 0
    assert prepare(files, store / "tokenizer", tmp_path / "added", "--deduplicate", "--append") == 0
    assert sorted(all_tokens(tmp_path / "added")) == sorted(all_tokens(tmp_path / "one"))
    assert not list(tmp_path.glob("*/units/*.repeats.npy"))


def edited(text, n, rng):
    """With ``n`` of its words exchanged."""
    words = text.split()
    for place in rng.choice(len(words), n, replace=False):
        words[place] = f"other{place}"
    return " ".join(words)


def share_of_runs(one, other):
    one, other = ({*runs_of_words(text)} for text in (one, other))
    return len(one & other) / len(one | other)


def test_near_duplicates_are_dropped_by_how_many_runs_of_words_they_share():
    """As often as the formula at the top of repeats.py says; two texts that share a tenth hardly ever."""
    rng = np.random.default_rng(0)
    dropped, expected = [], []
    for number in range(400):
        text = " ".join(f"word{word}" for word in rng.integers(0, 10**6, 120))
        other = edited(text, [1, 2, 4, 40][number % 4], rng)
        one, two = keys_of([Document(each, 0, 0) for each in (text, other)], near=True)[:, 2:]
        dropped.append(bool((one == two).any()))
        expected.append(1 - (1 - share_of_runs(text, other) ** 8) ** 14)
    dropped, expected = (np.array(each).reshape(-1, 4).mean(0) for each in (dropped, expected))
    assert expected[0] > 0.98 > 0.8 > expected[2] > 0.5 > 0.001 > expected[3]
    np.testing.assert_allclose(dropped, expected, atol=4 * 0.5 / 10)
    assert dropped[3] == 0


def test_near_duplicates_are_dropped_in_languages_with_and_without_spaces(store, tmp_path):
    english = " ".join(make_documents(4, seed=8))
    chinese = "北京是中国的首都它有三千年的历史我们去学校吗很好今天天气不错明天也许会下雨所以请带上雨伞出门"
    texts = [english, chinese, *make_documents(3, seed=9), english + " Rank.", chinese + "啊"]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    assert prepared(source, store / "tokenizer", tmp_path / "all", "--deduplicate")["dropped_repeats"] == 0
    assert prepared(source, store / "tokenizer", tmp_path / "out", "--near-duplicates")["dropped_repeats"] == 2


def test_without_the_library_near_duplicates_are_one_line(corpus, store, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rensa", None)
    error = refused(capsys, corpus, store / "tokenizer", tmp_path / "out", "--near-duplicates")
    assert "pip install 'condenser[near]'" in error
    assert not (tmp_path / "out").exists()


def test_no_text_is_in_both_splits_however_often_it_comes(repeating, store, tmp_path):
    files, _ = repeating
    assert prepare(files, store / "tokenizer", tmp_path / "out", "--validation-fraction", "0.4") == 0
    train, validation = ({*map(tuple, rows_of(tmp_path / "out", split))} for split in ("train", "validation"))
    assert min(len(train), len(validation)) > 10
    assert not {row for row in train if len(row) > 12} & validation  # so many tokens are not the same by chance


def test_from_python_a_path_a_name_or_a_list_will_do(store, corpus, tmp_path):
    options = {"tokenizer": store / "tokenizer", "max_length": 32, "workers": 1}
    for number, source in enumerate((corpus, str(corpus), [corpus], [str(corpus)])):
        prepare_from_python(input=source, output=tmp_path / str(number), **options)
        assert contents(tmp_path / str(number)) == contents(tmp_path / "0")


def test_a_script_needs_no_guard_around_it(store, corpus, tmp_path):
    """Its processes do not run it again."""
    script = tmp_path / "script.py"
    script.write_text(
        "from condenser.corpus.prepare import prepare\n"
        "print('once')\n"
        f"prepare(input={str(corpus)!r}, tokenizer={str(store / 'tokenizer')!r}, output='out', workers=2)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("once") == 1
    assert Path(tmp_path / "out/manifest.json").is_file()


def test_what_systems_leave_behind_is_passed_over_in_collections_runs_and_tokenizers(store, tmp_path):
    """In collections as Windows' editors write them, too."""
    mark, end = b"\xef\xbb\xbf", b"\r\n"
    collection = tmp_path / "collection"
    (collection / "qrels").mkdir(parents=True)
    for name, lines in {
        "corpus.jsonl": [b'{"_id": "d", "text": "A document."}'],
        "queries.jsonl": [b'{"_id": "q", "text": "A query."}'],
        "qrels/test.tsv": [b"q\td\t1"],  # without a header
    }.items():
        (collection / name).write_bytes(mark + end.join(lines) + end)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/test.csv").write_bytes(mark + end.join([b"score,sentence1,sentence2", b"1,a,b", b"2,c,d"]))
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last-step=3.ckpt").touch()
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(store / "tokenizer", tokenizer)
    for folder, name in (
        (collection / "qrels", "._test.tsv"),
        (tmp_path / "pairs", "._test.csv"),
        (tmp_path / "run/checkpoints", "._last-step=3.ckpt"),
        (tokenizer, "._tokenizer.json"),
    ):
        (folder / name).write_bytes(b"\xff\0")
        (folder / ".DS_Store").write_bytes(b"\xff\0")
    read = read_collection(collection)
    assert (read.documents, read.queries, read.qrels) == ({"d": "A document."}, {"q": "A query."}, {"q": {"d": 1}})
    test = read_similarity(tmp_path / "pairs").test
    assert test.first == ["a", "c"]
    assert checkpoints(tmp_path / "run") == [tmp_path / "run/checkpoints/last-step=3.ckpt"]
    assert {*tokenizer_files(tokenizer)} == {path.name for path in store.glob("tokenizer/*")}
