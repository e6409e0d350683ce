"""What the README says is so: its files, commands and options exist, and its example of a new objective trains."""

import inspect
import re
from pathlib import Path

import pytest
from test_training import metrics_of

from condenser.cli import COMMANDS, OWN_PARSER, load, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_file_it_names_exists():
    names = re.findall(r"\]\(([\w./-]+)\)|`((?:condenser|configs|data|docs)/[\w./-]+)`", README)
    paths = {path for pair in names for path in pair if path and not path.startswith("data/tokens")}
    assert len(paths) > 8
    assert [path for path in paths if not (ROOT / path).exists() and path != "data/raw/"] == []


def commands():
    """Each command line in the shell blocks, continued lines joined."""
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield from re.findall(r"condenser ((?:" + "|".join(COMMANDS) + r") .*)", line)


@pytest.mark.parametrize("line", commands())
def test_every_option_of_its_commands_is_known(line):
    words = line.split()
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
    options = {word.removeprefix("--") for word in words if word.startswith("--")}
    if name in OWN_PARSER:
        configs = [words[i + 1] for i, word in enumerate(words) if word in ("--config", "-c")]
        assert all((ROOT / config).is_file() for config in configs)
    else:
        known = {parameter.replace("_", "-") for parameter in inspect.signature(load(COMMANDS[name][0])).parameters}
        assert options <= known


def test_its_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {a or b for a, b in re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", README, re.MULTILINE)}
    assert named
    assert named <= targets


def test_its_example_of_a_new_objective_trains(recipe, tmp_path, monkeypatch):
    code = re.search(r"```python\n# my_objective.py\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "my_objective.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--model.objective", "my_objective.Weighted", "--trainer.log_every_n_steps", "1"]
    assert main(["fit", "--config", str(recipe), "--runs_dir", str(tmp_path), "--name", "weighted", *options]) == 0
    assert "objective: my_objective.Weighted" in (tmp_path / "weighted" / "config.yaml").read_text()
    for row in metrics_of(tmp_path / "weighted"):
        for kind in ("train", "val"):
            if row[f"{kind}/loss"]:
                expected = float(row[f"{kind}/mlm_loss"]) + 0.3 * float(row[f"{kind}/head_mlm_loss"])
                assert float(row[f"{kind}/loss"]) == pytest.approx(expected, rel=1e-5)
