"""`condenser prepare` on what users really have: every document is accounted for, every fault named with its place."""

import gzip
import itertools
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import make_documents, slow, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import all_tokens, contents, prepare, prepared, refused
from transformers import AutoTokenizer

from condenser.cli import main
from condenser.corpus.documents import documents
from condenser.corpus.readers import Source, Unit, units
from condenser.data.store import TokenStore, read_manifest


def accounted(*arguments):
    """Makes a store; what it counted, of which nothing is missing."""
    counts = prepared(*arguments)
    assert counts["documents"] == counts["kept"] + counts["empty"] + counts["too_short"] + counts["bad"]
    return counts


def test_every_document_is_accounted_for_and_bad_ones_are_named(store, tmp_path, capsys):
    good = {"id": 1, "text": "Encoding heads. Ranking."}
    lines = [
        json.dumps(good).encode(),
        b'{"text": "caf\xe9"}',  # not UTF-8
        b'{"text": "a\\u0000b"}',  # NUL
        b'{"text": "a\x00b"}',
        b'{"id": 7, "text": "\\ud800"}',  # half of a surrogate pair
        b'{"text": ["list"]}',
        b"",  # blank lines are none
        b'{"text": ""}',
        b'{"text": null}',
        '{"text": " \u200b\u00a0\\n\\t"}'.encode(),  # nothing that a tokenizer keeps
        json.dumps(good).encode(),
        b'{"text": "Mask."}',
    ]
    source = tmp_path / "mixed.jsonl"
    source.write_bytes(b"\n".join(lines))
    counts = accounted(source, store / "tokenizer", tmp_path / "out", "--skip-bad-lines", "--min-length", "3")
    expected = {"documents": 11, "kept": 2, "empty": 3, "too_short": 1, "bad": 5, "repeated_ids": 2}
    assert {name: counts[name] for name in expected} == expected  # two repeat: the good one, and the empty text
    named = read_manifest(tmp_path / "out")["bad"]
    assert [line.split(": ")[0] for line in named] == [f"{source}, line {n}" for n in (2, 3, 4, 5, 6)]
    for words, line in zip(("not UTF-8", "NUL", "not JSON", "Unicode", "not a text but list"), named, strict=True):
        assert words in line
    assert "bad: " in capsys.readouterr().out


@pytest.mark.parametrize("n_good", [0, 400])
def test_without_skipping_the_first_bad_line_stops_it_and_is_named(n_good, store, small_units, tmp_path, capsys):
    source = write_jsonl(tmp_path / "some.jsonl", make_documents(n_good))
    source.write_bytes(source.read_bytes() + b'{"text": "caf\xe9"}\n')
    error = refused(capsys, source, store / "tokenizer", tmp_path / "out")
    assert f"some.jsonl, line {n_good + 1}: not UTF-8" in error


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_compressed_file_that_is_cut_off_is_named(suffix, store, tmp_path, capsys):
    text = "".join(json.dumps({"text": document}) + "\n" for document in make_documents(3000)).encode()
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    whole = compress(text)
    for name, content in (("cut", whole[: len(whole) // 2]), ("damaged", whole[:-2000] + b"x" * 1500 + whole[-500:])):
        path = tmp_path / f"{name}.jsonl{suffix}"
        path.write_bytes(content)
        assert f"{path} cannot be decompressed" in refused(capsys, path, store / "tokenizer", tmp_path / "out")
        assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_byte_order_mark_is_no_text_and_deep_nesting_is_no_crash(store, tmp_path):
    source = tmp_path / "bom.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"text": "Mask."}\n{"a": ' + b"[" * 200_000 + b"\n")
    assert accounted(source, store / "tokenizer", tmp_path / "out", "--skip-bad-lines")["kept"] == 1
    assert "line 2: not JSON" in read_manifest(tmp_path / "out")["bad"][0]


def test_when_nothing_is_left_that_is_an_error_with_the_reason_and_no_store(store, tmp_path, capsys):
    source = tmp_path / "other.jsonl"
    source.write_text('{"body": "x"}\n' * 5)
    error = refused(capsys, source, store / "tokenizer", tmp_path / "out", "--skip-bad-lines")
    assert "nothing is left of 5 documents: 5 bad" in error
    assert "line 1: no column 'text'; there are 'body'" in error
    assert not (tmp_path / "out").exists()


def test_an_input_given_twice_is_refused(corpus, store, tmp_path, capsys):
    assert "given twice" in refused(capsys, [corpus, corpus], store / "tokenizer", tmp_path / "out")


def test_a_row_of_a_table_that_is_not_utf8_is_named_and_can_be_skipped(store, tmp_path, capsys):
    texts = pa.array([b"Mask.", b"caf\xe9", b"Heads"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    asked = tmp_path / "a.parquet", store / "tokenizer", tmp_path / "out"
    assert "a.parquet, row 2: not UTF-8" in refused(capsys, *asked)
    assert accounted(*asked, "--skip-bad-lines")["kept"] == 2


def test_a_damaged_table_is_named(store, tmp_path, capsys):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": make_documents(5000)}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[2000:4000] = os.urandom(2000)
    path.write_bytes(content)
    assert f"{path} cannot be read to its end" in refused(capsys, path, store / "tokenizer", tmp_path / "out")


def test_a_table_with_a_column_twice_is_refused(store, tmp_path, capsys):
    columns = [pa.array(["Mask.", "Heads."]), pa.array(["Rank.", "Layers."])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "a.parquet")
    assert "several columns 'text'" in refused(capsys, tmp_path / "a.parquet", store / "tokenizer", tmp_path / "out")


def test_titles_are_put_before_the_text_and_the_manifest_says_so(store, tmp_path, capsys):
    source = tmp_path / "titled.jsonl"
    source.write_text('{"title": "Encoders", "text": "Heads rank."}\n{"title": null, "text": "Mask."}\n')
    assert prepare(source, store / "tokenizer", tmp_path / "out", "--title-column", "title") == 0
    tokenizer = AutoTokenizer.from_pretrained(store / "tokenizer")
    assert sorted(tokenizer.decode(row) for row in all_tokens(tmp_path / "out")) == ["encoders heads rank.", "mask."]
    settings_ = read_manifest(tmp_path / "out")["settings"]
    assert (settings_["title_column"], settings_["title_prepended"]) == ("title", True)
    error = refused(capsys, source, store / "tokenizer", tmp_path / "none", "--title-column", "headline")
    assert "no column 'headline'; there are 'title', 'text': name one with --title-column" in error


@pytest.mark.parametrize("gap", [slow(" "), ""])
def test_a_line_of_megabytes_is_one_document_and_nothing_of_it_is_lost(gap, store, small_units, tmp_path):
    """Longer than what is read and what is tokenized at a time."""
    words = ["encoding", "heads", "ranked."] * 80_000
    source = tmp_path / "long.jsonl"
    source.write_text(json.dumps({"text": gap.join(words)}) + "\n" + json.dumps({"text": "Mask."}) + "\n")
    counts = accounted(source, store / "tokenizer", tmp_path / "out")
    assert (counts["documents"], counts["kept"], counts["tokens_dropped"]) == (2, 2, 0)
    if gap:
        one = len(AutoTokenizer.from_pretrained(store / "tokenizer")("encoding heads ranked. ")["input_ids"]) - 2
        assert counts["tokens_kept"] == 80_000 * one + 2


def test_a_file_without_ends_of_documents_is_refused(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("condenser.corpus.readers.LONGEST_RECORD", 10_000)
    source = tmp_path / "endless.txt"
    source.write_text("one line\n" * 20_000)
    assert "endless.txt holds a document of more than" in refused(capsys, source, store / "tokenizer", tmp_path / "out")


LINES = st.lists(st.sampled_from([b'{"text": "a"}', b"\n", b"\n\n", b"\r\n", b"{", b"\x00", b"\xff", b" "]))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400) | LINES.map(b"".join))
def test_readers_survive_any_bytes_and_number_every_line(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    for name, kind in (("fuzz.jsonl", "jsonl"), ("fuzz.txt", "text")):
        path = folder / name
        path.write_bytes(content)
        source = Source(str(path), kind)
        found = []
        for size in (1 << 20, 7):  # in one unit, and in many
            parts = list(units(source, size))
            assert b"".join(unit.payload for unit in parts) == content
            assert all(unit.first == 1 + content[: sum(len(u.payload) for u in parts[:n])].count(b"\n")
                       for n, unit in enumerate(parts))  # fmt: skip
            good_and_bad = zip(*(documents(unit, skip_bad_lines=True) for unit in parts), strict=True)
            found.append([list(itertools.chain(*each)) for each in good_and_bad])
        assert found[0] == found[1]
        for number, line in enumerate(content.split(b"\n") if kind == "jsonl" else [], start=1):
            good, bad = documents(Unit(source, 0, number, line, 0), skip_bad_lines=True)
            assert len(good) + len(bad) == bool(line.strip())
            assert all(f"line {number}: " in message for message in bad)


# --- killed, and short of room


SMALL_UNITS = 20_000, 20_000  # bytes


@pytest.fixture
def many(store, tmp_path, monkeypatch):
    """The command for a folder, with units small enough to be hit in the middle of."""
    monkeypatch.setattr("condenser.corpus.prepare.UNIT_BYTES", SMALL_UNITS)
    corpus = write_jsonl(tmp_path / "big.jsonl", make_documents(2000))
    arguments = ["prepare", "--input", str(corpus), "--tokenizer", str(store / "tokenizer"), "--max-length", "32"]
    return lambda name: [*arguments, "--output", str(tmp_path / name), "--workers", "2"]


def in_a_process(command, **how):
    code = f"import sys, condenser.cli as c, condenser.corpus.prepare as p; p.UNIT_BYTES = {SMALL_UNITS}; "
    arguments = [sys.executable, "-c", code + "c.main(sys.argv[1:])", *command]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, **{"stderr": subprocess.DEVNULL, **how})


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_with_the_same_bytes(many, tmp_path):
    started = time.monotonic()
    assert in_a_process(many("whole")).wait() == 0
    duration = time.monotonic() - started
    for moment in np.random.default_rng(0).uniform(0.1, 0.9, 10):
        process = in_a_process(many("killed"), start_new_session=True)
        time.sleep(moment * duration)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert main(many("killed")) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("killed", ["the one who started the workers", "a worker"])
def test_after_a_process_is_killed_no_other_stays_and_the_command_goes_on(killed, many, tmp_path):
    out = tmp_path / "out"
    process = in_a_process(many("out"), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(out.glob("units/*.json")))
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
    assert len(workers) >= 2
    (random.Random(0).choice(workers) if killed == "a worker" else process).kill()
    _, errors = process.communicate(timeout=60)
    assert ("a worker process was killed" in errors) is (killed == "a worker")
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    with pytest.raises(ValueError, match="unfinished"):
        TokenStore(out, "train")
    kept = {path: path.stat().st_mtime_ns for path in out.glob("units/*.json")}
    assert main([*many("out"), "--workers", "1"]) == 0
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert read_manifest(out)["counts"]["kept"] == 2000


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_disk_that_fills_up_leaves_the_store_and_the_command_goes_on(corpus, store, tmp_path, capsys):
    disk, more = tmp_path / "disk", write_jsonl(tmp_path / "more.jsonl", make_documents(3000, seed=8))
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    first, appended = ((each, store / "tokenizer", disk / "out") for each in (corpus, more))
    try:
        assert "No space left on device" in refused(capsys, *first)
        subprocess.run(["mount", "-o", "remount,size=450k", str(disk)], check=True)
        accounted(*first)
        before = contents(disk / "out")
        assert "No space left on device" in refused(capsys, *appended, "--append")
        assert before.items() <= contents(disk / "out").items()
        assert main(["inspect", str(disk / "out"), "--verify"]) == 0
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert accounted(*appended, "--append")["kept"] == 3400
        assert not list((disk / "out").rglob("*.partial"))
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_a_command_without_standard_output_ends_as_with_one(store, monkeypatch):
    """Such as of a daemon, or after `>&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["inspect", str(store), "--samples", "0"]) == 0
