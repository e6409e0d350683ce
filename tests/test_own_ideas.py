"""An idea of one's own is a file and a YAML (here a masking; all three: test_docs.py); recipes by name."""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import error_of, fit
from test_training import metrics_of

from condenser.cli import main
from condenser.data.collate import Masking, Vocabulary, collate
from condenser.data.datamodule import CondenserDataModule
from condenser.data.masking import mask_flat
from condenser.data.store import Rows
from condenser.models.backbones.base import families
from condenser.models.backbones.bert import Bert
from condenser.models.condenser import Condenser
from condenser.recipes import CLONED, file_of, recipes
from condenser.reports.bench import module_of, table_of_speed
from condenser.training.fit import DryCLI, run_cli
from condenser.training.module import CondenserModule


@dataclasses.dataclass(frozen=True)
class Shares(Masking):
    """Samples with an even id are masked at another rate."""

    even: float = 0.5

    def mask(self, rows, visits, sample_ids, vocabulary):
        share = np.where(sample_ids % 2, self.probability, self.even)
        options = {"mask_id": vocabulary.mask_id, "random_ids": vocabulary.random_ids}
        return mask_flat(*rows, seed=self.seed, epoch=visits, sample_ids=sample_ids, probability=share, **options)


def wrong(name, mask):
    return type(name, (Masking,), {"mask": mask})


def shifted(self, rows, visits, sample_ids, vocabulary):
    return np.roll(rows.tokens.astype(np.int64), 1), np.array([0])


def of_the_pass(self, rows, visits, sample_ids, vocabulary):  # the first token of a pass, whoever's it is
    return rows.tokens.astype(np.int64), np.array([0])


def drawn_elsewhere(self, rows, visits, sample_ids, vocabulary):
    inputs = rows.tokens.astype(np.int64)
    chosen = np.flatnonzero(np.random.random(len(inputs)) < 0.5)
    inputs[chosen] = vocabulary.mask_id
    return inputs, chosen


def in_place(self, rows, visits, sample_ids, vocabulary):
    rows.tokens[0] = vocabulary.mask_id
    return rows.tokens, np.array([0])


def of_a_text(self, rows, visits, sample_ids, vocabulary):
    return rows.tokens + np.array("five"), np.array([0])


WRONG = {
    "mask writes into the rows that it is given": in_place,
    "mask failed on 16 samples": of_a_text,
    "must return two arrays": lambda self, rows, *_: None,
    r"must return integers, tokens \[\d+\] and places \[M\]; it returned float64": lambda self, rows, *_: (
        rows.tokens / 1.0,
        np.array([0]),
    ),
    "must return places ascending, each once": lambda self, rows, *_: (rows.tokens, np.array([0, 0])),
    "tokens that are not among those to predict": shifted,
    "masks a sample otherwise when it is asked again, or beside other samples": of_the_pass,
    "masks a sample otherwise when it is asked again": drawn_elsewhere,
}


def rows_of(n=64, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, n)
    return Rows(rng.integers(5, 900, lengths.sum()).astype(np.uint16), rng.random(lengths.sum()) < 0.6, lengths)


VOCABULARY = Vocabulary(1, 2, 0, 4, np.arange(5, 900))


def test_a_masking_of_ones_own_is_a_function_of_seed_visit_and_sample():
    masking, rows, ids = Shares(3), rows_of(), np.arange(64)
    masking.check(rows, VOCABULARY)
    inputs, chosen = masking.masked(rows, 5, ids, VOCABULARY)
    fields = collate(rows, ids, 5, VOCABULARY, masking)
    assert fields["n_masked"] == len(chosen) > 0
    np.testing.assert_array_equal(fields["labels"], rows.tokens[chosen])
    for other, visit in ((dataclasses.replace(masking, seed=4), 5), (masking, 6)):
        assert not np.array_equal(other.mask(rows, visit, ids, VOCABULARY)[0], inputs)
    begins = np.append(0, rows.lengths.cumsum())
    for i, (a, b) in enumerate(itertools.pairwise(begins)):
        one = Rows(rows.tokens[a:b], rows.word_starts[a:b], rows.lengths[i : i + 1])
        np.testing.assert_array_equal(masking.mask(one, 5, ids[i : i + 1], VOCABULARY)[0], inputs[a:b])


def test_shares_may_differ_by_sample():
    rows = rows_of(4000)
    _, chosen = Shares(3, 0.1).mask(rows, 0, np.arange(4000), VOCABULARY)
    sample = np.repeat(np.arange(4000), rows.lengths)[chosen]
    n = np.bincount(sample % 2, minlength=2) / np.bincount(np.repeat(np.arange(4000) % 2, rows.lengths))
    np.testing.assert_allclose(n, [0.5, 0.1], atol=0.02)


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_masking_is_refused_before_training(store, message):
    data = CondenserDataModule(str(store), batch_size=32, masking=wrong("Mine", WRONG[message]))
    with pytest.raises(ValueError, match="data.masking: Mine.*" + message):
        data.setup("fit")


@pytest.mark.parametrize(
    ("masking", "options", "message"),
    [
        (Shares, {"odd": 0.1}, "Shares has no odd; it has even"),
        (wrong("Plain", shifted), {"even": 0.1}, "Plain has no even; it has none"),
        (Shares, {"probability": 0.1}, "Shares has no probability; it has even"),
        (type("Own", (Masking,), {"__init__": lambda self: None}), {}, "the fields of a frozen dataclass"),
    ],
)
def test_options_are_the_fields_of_the_class(store, masking, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CondenserDataModule(str(store), masking=masking, masking_options=options)


def test_a_yaml_names_a_masking_and_its_run_does_not_depend_on_workers(recipe, tmp_path, capsys):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(yaml.safe_dump({"data": {"masking": "test_own_ideas.Shares", "masking_options": {"even": 0.3}}}))
    for workers in ("0", "1"):
        assert fit(recipe, tmp_path, workers, "-c", str(overlay), "--data.num_workers", workers) == 0
    losses = [[row["train/loss"] for row in metrics_of(tmp_path / name)] for name in ("0", "1")]
    assert losses[0] == losses[1]
    for options, said in (
        (["--data.masking_options", "{even: 0.4}"], "another data.masking_options.even"),
        (["--data.masking", "test_own_ideas.rows_of"], "rows_of"),
    ):
        error_of(capsys, fit(recipe, tmp_path, "0", "-c", str(overlay), *options), said)


def test_inspect_shows_what_a_masking_does(store, capsys):
    options = ["--masking", "test_own_ideas.Shares", "--masking-options", "{even: 0.9}", "--samples", "1"]
    assert main(["inspect", str(store), *options]) == 0
    assert capsys.readouterr().out.count("[") > 5


def test_every_recipe_has_a_name_and_no_two_the_same():
    folders = (CLONED, CLONED / "hardware", CLONED / "languages", CLONED / "ablations")
    files = [path for folder in folders for path in folder.glob("*.yaml")]
    assert sorted(recipes().values()) == sorted(files)
    assert len(recipes()) == len(files) > 10


def test_a_name_is_a_recipes_unless_it_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "condenser").mkdir()
    assert Path(file_of("condenser")) == CLONED / "condenser.yaml"
    assert [file_of(given) for given in ("configs/small.yaml", "{a: 1}")] == ["configs/small.yaml", "{a: 1}"]
    given = ["--config=demo", "-c", "cpu", "--name", "small", "--config", "{data: {num_workers: 1}}"]
    settings = run_cli("fit", given, DryCLI).config["fit"]
    assert (settings.name, settings.data.batch_size, settings.data.num_workers) == ("small", 64, 1)
    (tmp_path / "demo").write_text("name: own")
    assert file_of("demo") == "demo"


@pytest.mark.parametrize("command", ["fit", "validate", "estimate", "launch", "bench"])
def test_an_unknown_name_is_one_line_with_those_that_there_are(command, capsys):
    error = error_of(capsys, main([command, "--config", "condensed"]))
    assert "--config condensed is neither a file nor a recipe; there are" in error
    assert all(name in error for name in recipes())


def test_an_objective_that_cannot_be_imported_is_one_line_of_the_bench(own_modules, capsys):
    (own_modules / "mine.py").write_text("import not_there\n")
    (own_modules / "recipe.yaml").write_text("model: {objective: mine.Objective}\n")
    for words in (["--objective", "mine.Objective"], ["--config", str(own_modules / "recipe.yaml")]):
        assert "No module named 'not_there'" in error_of(capsys, main(["bench", *words]))


@pytest.mark.parametrize("given", ["./mine.py", "Condenser", "not_there.Mine", "mine.Mine"])
@pytest.mark.parametrize("way", ["option", "file"])
def test_an_objective_that_is_not_found_ends_with_what_to_write(given, way, recipe, own_modules, capsys):
    (own_modules / "mine.py").write_text("")
    (own_modules / "mine.yaml").write_text(yaml.safe_dump({"model": {"objective": given}}))
    words = ["--model.objective", given] if way == "option" else ["-c", str(own_modules / "mine.yaml")]
    error = error_of(capsys, main(["fit", "--config", str(recipe), "--name", "x", *words]))
    assert "give a class path such as my_objective.Weighted, with PYTHONPATH=. for a file beside you" in error
    assert ("mine.yaml: " in error) == (way == "file")
    assert not any(word in error for word in ("Given value: {", "CondenserModule", "backbone_config"))


OF_TORCH = "torch.nn.CrossEntropyLoss()(torch.ones(2, 3), batch['labels'])"


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("losses(self, batch, score=False): raise ValueError('odd')", 3),
        (f"losses(self, batch, score=False):\n        {OF_TORCH}", 4),
        ("__init__(self, lm):\n        super().__init__(lm, skip_from=1)\n        self.size = lm.config.odd", 5),
    ],
)
def test_an_error_in_a_file_of_ones_own_is_one_line_with_its_place(method, line, recipe, own_modules, capsys):
    text = f"import torch\nclass Odd(__import__('condenser').models.condenser.Condenser):\n    def {method}\n"
    (own_modules / "odd.py").write_text(text)
    code = fit(recipe, own_modules, "odd", "--model.objective", "odd.Odd")
    assert error_of(capsys, code).endswith(f" ({own_modules / 'odd.py'}:{line})")
    code = fit(recipe, own_modules, "plain", "--model.skip_from", "7")
    assert error_of(capsys, code, "skip_from=7").endswith("3 layers")


def test_of_two_families_of_one_model_type_the_named_one_is_taken():
    class One(Bert):
        model_types = ("odd",)

    class Two(One):
        pass

    for named in (One, Two):
        assert CondenserModule(backbone_family=named).backbone_family is families()["odd"] is named
    assert CondenserModule().backbone_family is None
    assert families()["odd"] is Two  # the later


def test_the_bench_takes_a_recipe_without_a_model_and_the_settings_of_a_run(run, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model:\n")
    assert module_of(str(path), None).objective is module_of(None, None).objective is Condenser
    assert module_of(str(run / "config.yaml"), None).options["skip_from"] == 1
    for content, message in (("3", "its model is no mapping"), ("{skip_form: 3}", "recipe.yaml: .*skip_form.*mean")):
        path.write_text(f"model: {content}\n")
        with pytest.raises(ValueError, match=message):
            module_of(str(path), None)
    assert module_of("cocondenser", None).options["similarity"] == "dot"
    assert "similarity" not in module_of("cocondenser", "condenser.models.retromae.RetroMAE").options


@pytest.mark.parametrize(("speeds", "shown"), [([5.0], "5"), ([5.0, 5.0], "5 ±0%"), ([4.0, 6.0], "5 ±20%")])
def test_the_bench_says_how_far_rounds_differ_where_there_are_several(speeds, shown):
    names = ("flops_per_token", "needed_flops_per_second", "peak_memory_gb", "data_wait", "launches", "host_ms")
    figures = {"tokens_per_second": speeds, **{name: [1.0] * len(speeds) for name in names}}
    assert next(iter(table_of_speed({"ours": figures}, 1.0).columns[1].cells)).plain == shown
