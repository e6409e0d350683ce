"""What the README and the pages of docs/ say is so: links, commands, settings, files and tables; and versions agree."""

import inspect
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import lightning as L
import pandas as pd
import pytest
import scipy.stats
import yaml
from conftest import fit, write_examples
from test_training import assert_minimised

from condenser.cli import COMMANDS, OWN_PARSER, function_parser, in_full, load
from condenser.cluster import launch
from condenser.data.datamodule import CondenserDataModule
from condenser.reports import estimate
from condenser.training.checkpoints import Checkpointing
from condenser.training.fit import DryCLI, run_cli
from condenser.training.module import CondenserModule
from condenser.training.optim import Optimization

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
README = TEXTS["README.md"]
PIN = re.compile(r"^([\w.-]+)==(\S+)$", re.MULTILINE)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


PINS = {canonical(name): version for name, version in PIN.findall((ROOT / "constraints.txt").read_text())}


def slug(heading):
    """The anchor that GitHub and the site give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).strip().replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_resolves(page):
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL))
    for link in links:
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_named_exists(page):
    names = re.findall(r"`((?:condenser|configs|docs|tests|notebooks)/[\w./-]+)`", TEXTS[page])
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_readme_is_of_one_sitting_and_it_and_the_site_name_every_page():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert README.count("\n") <= 220
    assert set(re.findall(r"\]\(docs/([\w-]+\.md)", README)) == pages
    nav = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(nav) == sorted(pages | {"index.md"})


def blocks(text, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def commands():
    """Each command line in the shell blocks of all pages: its page, and its words after `condenser`."""
    for page, text in TEXTS.items():
        for block in blocks(text, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                at = next((i + 1 for i, word in enumerate(words) if word == "condenser"), None)
                if at and at < len(words):
                    yield pytest.param(words[at:], id=f"{page}: {' '.join(words[at:])}")


@pytest.fixture
def beside_the_examples(own_modules, tmp_path, monkeypatch):
    """A folder as a clone is, with the files that pages have readers write."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for text in TEXTS.values():
        write_examples(tmp_path, text)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words", commands())
def test_every_command_of_a_block_parses(words, beside_the_examples):
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
    rest = words[len(name.split()) :]
    if name not in OWN_PARSER:
        function = load(COMMANDS[name][0])
        options = {word.removeprefix("--").replace("-", "_") for word in rest if word.startswith("--")}
        assert options - {"config"} <= set(inspect.signature(function).parameters)
        if "..." not in rest:
            function_parser(function, name).parse_args(in_full(rest, function))
        return
    if name in ("estimate", "launch"):
        options, rest = {"estimate": estimate, "launch": launch}[name].own_parser().parse_known_args(rest)
    if name == "launch":
        assert options.gpus >= 0
        rest += ["--name", options.name]
    if "TensorBoardLogger" in rest:
        pytest.importorskip("tensorboard")
    run = run_cli("validate" if name == "validate" else "fit", rest, DryCLI)
    assert run.datamodule.weights


def test_options_in_running_text_are_known():
    parsers = [launch.own_parser(), estimate.own_parser()]
    known = {name.strip("-") for parser in parsers for name in parser._option_string_actions}
    known |= {"name", "runs_dir", "wandb", "wandb_artifacts", "trace_steps", "ckpt_path", "seed_everything"}
    known |= {"config", "print_config"}
    for name in COMMANDS.keys() - OWN_PARSER:
        known |= {parameter.replace("_", "-") for parameter in inspect.signature(load(COMMANDS[name][0])).parameters}
    known |= {"extra", "arms", "minutes", "dataset"}  # of uv and of scripts
    known |= {"normalize", "fp16", "bf16", "untie_encoder"}  # of Tevatron
    for page, text in TEXTS.items():
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for code in re.findall(r"`([^`]+)`", text):
            options = re.findall(r"(?<![\w-])--([a-z][\w-]*)(?![\w.-])", code)
            assert set(options) <= known, (page, code)


def test_every_setting_named_exists():
    owners = {"data": CondenserDataModule, "model": CondenserModule, "checkpoint": Checkpointing, "trainer": L.Trainer}
    known = {f"{part}.{name}" for part, owner in owners.items() for name in inspect.signature(owner).parameters}
    known |= {f"model.optimizer.{name}" for name in inspect.signature(Optimization).parameters}
    files = {"model.pt", "model.onnx", "data.md"}
    for page, text in TEXTS.items():
        text = re.sub(r"```python.*?```", "", text, flags=re.DOTALL)
        for name in re.findall(r"(?<![\w./])(?:--)?((?:data|model|checkpoint|trainer)\.[a-z]\w*(?:\.[a-z]\w*)?)", text):
            if page == "docs/fine-tuning.md" or name in files or name.startswith("trainer.logger."):
                continue
            assert name in known, (page, name)
        for block in blocks(text, "yaml"):
            for part, settings in yaml.safe_load(block).items():
                assert {f"{part}.{name}" for name in settings} <= known, page


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    sources = "\n".join([*TEXTS.values(), (ROOT / ".ci" / "run").read_text()])
    named = {a or b for a, b in re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", sources, re.MULTILINE)}
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in steps
    named |= {step.removeprefix("make ") for step in steps if step.startswith("make ") and "$" not in step}
    named |= set(workflow["jobs"]["versions"]["strategy"]["matrix"]["target"])
    assert {"docs", "dist", "test-min", "test-max"} <= named <= targets


def test_the_readmes_example_of_a_new_objective_trains(recipe, tmp_path, own_modules):
    write_examples(own_modules, README)
    options = ["--model.objective", "my_objective.Weighted", "--trainer.log_every_n_steps=1", "--trainer.max_steps=4"]
    assert fit(recipe, tmp_path, "weighted", *options) == 0
    assert "objective: my_objective.Weighted" in (tmp_path / "weighted" / "config.yaml").read_text()
    assert_minimised(tmp_path / "weighted", mlm=1, head_mlm=0.3)


def tables(text):
    """Rows of cells, without the lines under headings."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [cells for row in rows if set(cells := [cell.strip() for cell in row]) != {"---"}]


def test_the_studies_tables_are_of_their_measurements():
    study = ROOT / "configs" / "study"
    table = runpy.run_path(str(study / "study.py"))["table"]
    measured = []
    for plan in ("scratch/plan.yaml", "warm/cpu.yaml"):
        settings = yaml.safe_load((study / plan).read_text())
        kept = pd.read_csv((study / plan).with_name(settings["results"]), dtype={"train_size": str})
        measured.append(tables(table(kept, settings["columns"])))
    assert tables(TEXTS["docs/study.md"]) == [*measured[0], *measured[1]]
    heading, *warm = measured[1]
    columns = [heading.index(name) for name in ("lost with another's [CLS]", "SQuAD", "SQuAD, 1,000", "STS-B")]
    whole = {row[0]: [row[i] for i in columns] for row in warm}
    shown = {row[0].strip("*"): row[1:] for row in tables(README)}
    names = {"random weights": "random initialisation", "BM25, on the same 64 tokens": "BM25, first 64 tokens"}
    names |= {"MLM": "mlm", "Condenser": "condenser", "MLM and contrast, no head": "contrast"}
    names |= {"coCondenser": "cocondenser", "RetroMAE": "retromae"}
    for name, arm in names.items():
        assert shown[name] == whole[arm], name


def test_the_studys_differences_are_of_its_measurements():
    """By seed; and how far arms differ that are none, by Student's t of the spread of all."""
    rows = pd.read_csv(ROOT / "configs/study/warm/results-cpu.csv")
    rows = rows[(rows.metric == "ndcg@10") & (rows.collection == "squad") & (rows.model == "pre-trained")]
    said, spreads = " ".join(TEXTS["docs/study.md"].split()), []
    for tuned, pairs in (
        (False, {("mlm", "contrast"): "rises by {} and {},", ("mlm", "retromae"): "RetroMAE it rises by {} and {},"}),
        (
            True,
            {
                ("mlm", "contrast"): "falls after 1,000 questions by {} and {}.",
                ("mlm", "retromae"): "by {} and {}. Two",
            },
        ),
    ):
        values = rows[rows.trained_on.notna() == tuned].pivot_table("value", "arm", "pretrain_seed")
        spreads.append(values.var(axis=1, ddof=1).mean() ** 0.5)
        for (one, other), words in pairs.items():
            assert words.format(*(f"{abs(each):.3f}" for each in values.loc[other] - values.loc[one])) in said
        for one, other in [("mlm", "condenser"), ("contrast", "cocondenser")] * tuned:
            first, second = values.loc[other] - values.loc[one]
            assert f"{first:+.3f} and {second:+.3f}" in said
    reach = [scipy.stats.t.ppf(0.975, len(values)) * spread for spread in spreads]
    assert f"by {spreads[0]:.3f} from seed to seed as they are and by {spreads[1]:.3f} fine-tuned" in said
    assert f"lie within {reach[0]:.3f} and {reach[1]:.3f}" in said


def test_the_readmes_speeds_are_those_of_the_benchmarks():
    rows = [row for row in tables(README) if "head layers" in row[0] or "layers of" in row[0]]
    assert len(rows) == 4
    measured = [row for row in tables(TEXTS["docs/benchmarks.md"]) if not row[0].endswith(", 512")]
    for name, *numbers in rows:
        model, on_cpu = re.split(r", (?:\d+ tokens|2 CPU)", name)[0], "CPU" in name
        (same,) = (row for row in measured if row[0].startswith(model) and ("tokens/s" in row[1]) == on_cpu)
        assert set(numbers) <= {cell.removesuffix(" tokens/s") for cell in same}


def test_the_costs_are_what_estimate_computes():
    """The hours of base size: the amount of operations, and the data sheets. (Memory takes longer.)"""
    options, rest = estimate.own_parser().parse_known_args(
        ["--config", "condenser", "-c", "gpu", "--model.backbone", "null", "--tokens", "3.3e9"]
    )
    run = run_cli("fit", rest, DryCLI)
    run.datamodule.tokens_per_pass = 65536
    run.datamodule.provide_for(run.model.objective)
    data = estimate.data_of(run.datamodule, options.tokens)
    rehearsal = estimate.Rehearsal(run.model, run.datamodule)
    _, tokens = estimate.length_of_run(run.config["fit"].trainer, run.datamodule.batch_size, data)
    flops = estimate.flops_per_token(rehearsal, data.lengths) * tokens
    rows = [row for row in tables(TEXTS["docs/costs.md"]) if " x " in row[0]]
    assert len(rows) == 2 * len(estimate.GPUS)
    for name, memory, _, hours, *_ in rows:
        devices, gpu = name.split(" x ")
        assert float(memory) == estimate.GPUS[gpu]
        expected = flops / (estimate.bf16_peak(gpu) * options.mfu * int(devices)) / 3600
        assert hours == f"{expected:,.3g}"


def test_versions_are_said_once():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: hook for hook in hooks[0]["hooks"]}
    assert hooks.keys() == {"ruff-check", "ruff-format", "mypy"}
    for name, hook in hooks.items():
        own = hook["entry"] == ".venv/bin/mypy"
        assert own if name == "mypy" else hook["additional_dependencies"] == [f"ruff=={PINS['ruff']}"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == project["version"]
    assert f"## {project['version']}" in TEXTS["CHANGELOG.md"]


def test_the_lock_has_the_versions_of_the_constraints_and_names_pypi_alone():
    text = (ROOT / "uv.lock").read_text()
    locked = {}
    for package in tomllib.loads(text)["package"]:
        locked.setdefault(package["name"], set()).add(package.get("version"))
    assert {name for name in PINS.keys() & locked.keys() if PINS[name] not in locked[name]} == set()
    assert set(re.findall(r"\w+://([^/\"]+)", text)) == {"pypi.org", "files.pythonhosted.org"}


def test_the_wheel_has_every_package_and_every_recipe():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "condenser").rglob("*.py")}
    recipes = {Path("condenser/configs") / sub for sub in (".", "ablations", "cluster", "hardware", "languages")}
    assert {name.replace(".", "/") for name in tool["packages"]} == {str(path) for path in folders | recipes}
