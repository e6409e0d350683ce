"""The demo corpus from a tree of made-up packages: what is kept, what is a query, and that nothing is imported."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "data" / "demo_corpus.py"
VERSIONS = {"python": "3", "alpha": "1.0"}
N_FUNCTIONS = 30


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo_corpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sources(tmp_path):
    """One package: functions, a class, a copy, a short docstring, a test folder, a template, an import bomb."""
    root = tmp_path / "alpha"
    files = {
        "__init__.py": f'"""{docstring(100)}"""',
        "functions.py": "\n".join(function(i) for i in range(N_FUNCTIONS)) + '\ndef short():\n    """Too short."""\n',
        "copies.py": function(0),
        "nested/classes.py": f'class Outer:\n  if True:\n    def method(self):\n      """{docstring(101)}"""',
        "bomb.py": f'"""{docstring(102)}"""\nraise RuntimeError("imported")',
        "template.py": "class {{name}}: pass",
        "tests/test_it.py": function(103),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return {"alpha": root}


def docstring(i: int) -> str:
    body = "\n".join(f"Line {j} of text number {i} says something about topic {i * 100 + j}." for j in range(8))
    return f"Summary number {i} of the package.\n\n{body}"


def function(i: int) -> str:
    body = docstring(i).replace("\n", "\n    ")
    return f'def f{i}():\n    """{body}\n    """\n'


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_documents_are_the_long_distinct_docstrings_and_nothing_is_imported(demo, sources):
    documents = demo.collect(sources)
    ids = [document.id for document in documents]
    assert len(ids) == len(set(ids)) == N_FUNCTIONS + 3
    assert {"alpha", "alpha.bomb", "alpha.nested.classes.Outer.method"} <= set(ids)
    assert sum(document.text.startswith("Summary number 0 ") for document in documents) == 1  # not the copy as well
    assert dict(zip(ids, documents, strict=True))["alpha.nested.classes.Outer.method"].title == "Outer.method"


def test_two_builds_write_the_same_bytes_and_a_third_call_does_nothing(demo, sources, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    for output in (one, two):
        demo.build(output, sources, VERSIONS)
    for name in (*demo.FILES, demo.SUMMARY_FILE):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    before = (one / demo.SUMMARY_FILE).stat().st_mtime_ns
    demo.build(one, {}, VERSIONS)
    assert "nothing to do" in capsys.readouterr().out
    assert (one / demo.SUMMARY_FILE).stat().st_mtime_ns == before


def test_other_versions_build_anew(demo, sources, tmp_path):
    demo.build(tmp_path / "out", sources, VERSIONS)
    demo.build(tmp_path / "out", sources, VERSIONS | {"alpha": "2.0"})
    assert json.loads((tmp_path / "out/corpus.json").read_text())["versions"]["alpha"] == "2.0"


def test_retrieval_set_is_consistent_and_passages_do_not_hold_their_query(demo, sources, tmp_path):
    demo.build(tmp_path / "out", sources, VERSIONS)
    beir = tmp_path / "out" / "beir"
    passages = {row["_id"]: row for row in read(beir / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in read(beir / "queries.jsonl")}
    documents = {row["id"]: row["text"] for row in read(tmp_path / "out/documents.jsonl")}
    judged = {}
    for part in ("train", "test"):
        with (beir / "qrels" / f"{part}.tsv").open() as file:
            judged[part] = [(row["query-id"], row["corpus-id"]) for row in csv.DictReader(file, delimiter="\t")]
    assert len(judged["test"]) == 3
    assert sorted(q for part in judged.values() for q, _ in part) == sorted(queries)
    for query, passage in judged["train"] + judged["test"]:
        assert passages[passage]["title"] == ""
        assert queries[query] not in passages[passage]["text"]
        assert (queries[query] in documents[passage]) == ((query, passage) in judged["train"])


@pytest.mark.parametrize(
    "text",
    [
        "f(x, y) -> returns the sum\n\n" + "word " * 60,
        "Too short.\n\n" + "word " * 60,
        "A fine summary of something.\n\nA short rest.",
        "A fine summary of something.\n\n" + "Word. " * 50 + "A fine\nsummary of something.",
        "=======\nSome Module Heading Here\n=======\n\n" + "word " * 60,
    ],
)
def test_no_query_without_a_sentence_or_without_a_rest(demo, text):
    assert demo.summary_and_rest(demo.Document("a.b", "b", text)) is None


def test_a_folder_with_other_files_is_refused(demo, sources, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        demo.build(tmp_path / "out", sources, VERSIONS)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
