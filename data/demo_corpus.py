"""The demo corpus: docstrings of the installed libraries, real English text that every installation already holds.

    python data/demo_corpus.py --output data/raw/demo

Sources are found without importing anything and read with ``ast``. Cleaned docstrings of at least 200 characters are
kept, unless more than half of their text is lines that earlier ones had (copies, generated boilerplate). Result:

    documents.jsonl      {id, title, text}: one docstring each, for pre-training
    beir/                a retrieval set in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/{train,test}.tsv
    corpus.json          versions and counts; with the same versions a second call has nothing to do

A query is the summary of a docstring, its one relevant passage the rest *without* the summary. Passages have no title:
the name of a function would give the answer away. Passages and the test split are drawn by a hash of the document's id.
The summaries of test passages are left out of ``documents.jsonl`` too, so pre-training has not seen a test query beside
its answer; the answers themselves, as any unlabelled text, it has.
"""

import argparse
import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rich.progress import track

# fmt: off
PACKAGES = (
    "datasets", "huggingface_hub", "lightning", "matplotlib", "mpmath", "narwhals", "networkx", "numpy", "pandas",
    "scipy", "sentence_transformers", "sklearn", "sympy", "tokenizers", "torch", "torchmetrics", "transformers",
)
# fmt: on
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where it is not the package's name
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
MIN_CHARACTERS = 200  # of a document, and of a passage
SUMMARY_WORDS = range(4, 31)
MAX_PASSAGES = 8000
TEST_SHARE = 10  # one passage in ten
FILES = ("documents.jsonl", "beir/corpus.jsonl", "beir/queries.jsonl", "beir/qrels/train.tsv", "beir/qrels/test.tsv")
SUMMARY_FILE = "corpus.json"
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Document(NamedTuple):
    id: str  # dotted name, e.g. torch.nn.modules.linear.Linear.forward
    title: str  # name within the module, e.g. Linear.forward
    text: str

    @property
    def package(self) -> str:
        return self.id.split(".")[0]


class Pair(NamedTuple):
    id: str
    query: str
    passage: str


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the demo corpus from the installed libraries' docstrings.")
    parser.add_argument("--output", type=Path, default=Path("data/raw/demo"), help="folder (default: %(default)s)")
    output = parser.parse_args(argv).output
    sources = installed_sources(PACKAGES)
    try:
        build(output, sources, installed_versions(sources))
    except ValueError as error:
        print(f"demo_corpus: error: {error}", file=sys.stderr)
        return 1
    return 0


def build(output: Path, sources: Mapping[str, Path], versions: Mapping[str, str]) -> None:
    """Write the corpus of ``sources`` (name -> source folder) to ``output``, unless it is there already."""
    check_own(output)
    summary = output / SUMMARY_FILE
    if summary.exists() and json.loads(summary.read_text())["versions"] == versions:
        print(f"{output}: already built from these versions, nothing to do")
        return
    documents = collect(sources)
    train, test = split(retrieval_pairs(documents))
    counts = write(output, documents, train, test, versions)
    print(
        f"{output}: {counts['documents']:,} documents, {counts['characters'] / 1e6:.1f} million characters; "
        f"{counts['passages']:,} passages, {counts['train_queries']:,} train, {counts['test_queries']:,} test queries"
    )


def installed_sources(packages: Iterable[str]) -> dict[str, Path]:
    """Source folders of the standard library and of those ``packages`` that are installed; none is imported."""
    sources = {"python": Path(sysconfig.get_path("stdlib"))}
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            sources[name] = Path(spec.submodule_search_locations[0])
    return sources


def installed_versions(sources: Iterable[str]) -> dict[str, str]:
    names = {name: DISTRIBUTIONS.get(name, name) for name in sources if name != "python"}
    return {"python": platform.python_version()} | {n: importlib.metadata.version(d) for n, d in names.items()}


def collect(sources: Mapping[str, Path]) -> list[Document]:
    """Documents in the order of ``sources`` and their sorted paths, without short ones and near-duplicates."""
    files = [(name, folder, path) for name, folder in sources.items() for path in source_files(folder)]
    found: list[Document] = []
    gc.disable()  # syntax trees hold no cycles; collecting over and over would more than double the time
    try:
        for name, folder, path in track(files, description="Reading docstrings"):
            found += docstrings(name, folder, path)
    finally:
        gc.enable()
    return list(without_repeats(found))


def source_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(folder).parts))


def docstrings(package: str, folder: Path, path: Path) -> Iterator[Document]:
    """Docstrings of the module, its classes and functions; none for a file that Python cannot parse (a template)."""
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    parts = path.relative_to(folder).with_suffix("").parts
    module = ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))
    for name, text in named_docstrings(tree, ""):
        yield Document(f"{module}.{name}".rstrip("."), name or module, text)


def named_docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, *DEFINITIONS)):
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        if len(text) >= MIN_CHARACTERS:
            yield name, text.encode("utf-8", "ignore").decode()  # a lone surrogate is no text
    for child in getattr(node, "body", []):
        if isinstance(child, DEFINITIONS):
            yield from named_docstrings(child, f"{name}.{child.name}".lstrip("."))
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from named_docstrings(child, name)


def without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    """The first of each id, as long as at least half of its characters are on lines not seen before."""
    ids: set[str] = set()
    lines: set[str] = set()
    for document in documents:
        own = [line.strip() for line in document.text.splitlines()]
        fresh = sum(len(line) for line in own if line not in lines)
        if document.id not in ids and 2 * fresh >= sum(map(len, own)):
            ids.add(document.id)
            lines.update(own)
            yield document


def retrieval_pairs(documents: Iterable[Document]) -> list[Pair]:
    pairs = [pair for document in documents if (pair := summary_and_rest(document))]
    occurrences = Counter(pair.query.lower() for pair in pairs)
    return [pair for pair in pairs if occurrences[pair.query.lower()] == 1]


def summary_and_rest(document: Document) -> Pair | None:
    """First paragraph -> query, rest -> passage; None without a sentence of 4 to 30 words or with too short a rest."""
    first, _, rest = document.text.partition("\n\n")
    query, rest = " ".join(first.split()), rest.strip()
    is_sentence = re.match("[A-Z]", query) and not re.search("={3}|-{3}|::", query)  # no signature, no heading
    if not is_sentence or len(query.split()) not in SUMMARY_WORDS or len(rest) < MIN_CHARACTERS:
        return None
    repeated = query.lower() in " ".join(rest.lower().split())
    return None if repeated else Pair(document.id, query, rest)


def split(pairs: Iterable[Pair]) -> tuple[list[Pair], list[Pair]]:
    """At most ``MAX_PASSAGES`` pairs -> (train, test), both drawn by the hash of the id."""
    drawn = sorted(pairs, key=lambda pair: hashlib.sha256(pair.id.encode()).digest())[:MAX_PASSAGES]
    n_test = len(drawn) // TEST_SHARE
    return drawn[n_test:], drawn[:n_test]


def check_own(output: Path) -> None:
    foreign = {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()} - {*FILES, SUMMARY_FILE}
    if foreign or output.is_file():
        what = "is a file" if output.is_file() else f"holds {min(foreign)!r}, which is not part of a demo corpus"
        raise ValueError(f"{output} {what}; give another --output")


def write(
    output: Path, documents: list[Document], train: list[Pair], test: list[Pair], versions: Mapping[str, str]
) -> dict:
    """Fill a folder beside ``output``, the summary last, then put it in its place. -> the summary"""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "beir/qrels").mkdir(parents=True)
    without_query = {pair.id: pair.passage for pair in test}
    documents = [d._replace(text=without_query.get(d.id, d.text)) for d in documents]
    pairs = sorted(train + test)
    write_lines(partial / FILES[0], (as_json(**d._asdict()) for d in documents))
    write_lines(partial / FILES[1], (as_json(_id=p.id, title="", text=p.passage) for p in pairs))
    write_lines(partial / FILES[2], (as_json(_id=query_id(p), text=p.query) for p in pairs))
    for path, part in zip(FILES[3:], (train, test), strict=True):
        rows = (f"{query_id(p)}\t{p.id}\t1" for p in sorted(part))
        write_lines(partial / path, ("query-id\tcorpus-id\tscore", *rows))
    summary = summarise(documents, train, test, versions)
    (partial / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    return summary


def write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)


def as_json(**fields: str) -> str:
    return json.dumps(fields, ensure_ascii=False)


def query_id(pair: Pair) -> str:
    return "q:" + pair.id  # not the passage's own: evaluation tools drop hits whose id is the query's


def summarise(documents: list[Document], train: list[Pair], test: list[Pair], versions: Mapping[str, str]) -> dict:
    n_documents = Counter(d.package for d in documents)
    n_characters: Counter[str] = Counter()
    for document in documents:
        n_characters[document.package] += len(document.text)
    return {
        "versions": dict(versions),
        "documents": len(documents),
        "characters": n_characters.total(),
        "passages": len(train) + len(test),
        "train_queries": len(train),
        "test_queries": len(test),
        "packages": {p: {"documents": n, "characters": n_characters[p]} for p, n in n_documents.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
