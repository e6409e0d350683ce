"""The design, held by tests: imports run one way, files stay readable, the command table is whole."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from condenser.cli import COMMANDS, load, main

PACKAGE = Path(__file__).parents[1] / "condenser"
MAY_IMPORT = {  # what a part of the package may import from it, besides itself
    "models": set(),
    "data": {"signals"},
    "hub": {"models", "data"},
    "export": {"models", "hub", "runs"},
    "training": {"models", "data", "hub", "export", "runs", "signals"},
    "signals": set(),
    "launch": {"data", "runs", "training"},
    "evaluation": {"models", "data", "hub", "export", "figures", "runs"},
    "estimate": {"models", "data", "training", "rehearsal"},
    "rehearsal": {"models", "data", "training"},
    "benchmarks": {"data", "models", "runs"},
    "figures": {"runs"},
    "reference": {"figures", "runs"},
    "report": {"figures", "reference", "runs"},
    "runs": set(),
    "cli": {"signals"},  # imports the commands by name, when they run
    "__main__": {"cli"},
    "__init__": set(),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("condenser"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("condenser."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert set(imports(path)) <= MAY_IMPORT[part] | {part}


def test_models_need_torch_and_transformers_only_and_data_no_model():
    for folder, allowed in (("models", {"torch", "transformers"}), ("data", None)):
        for path in (PACKAGE / folder).glob("*.py"):
            names = {
                (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
            } - set(sys.stdlib_module_names)
            if allowed is not None:
                assert names <= allowed | {"condenser"}, path


def test_every_command_exists_and_teaches_itself(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name, (target, line) in COMMANDS.items():
        assert name in overview
        assert line in overview
        assert callable(load(target))
        assert main([name, "--help"]) == 0
        assert len(capsys.readouterr().out) > 400


def test_an_unknown_command_is_refused(capsys):
    assert main(["pretrain"]) == 2
    assert "no command 'pretrain'" in capsys.readouterr().err


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys; from condenser.cli import main; main(['--help']); main(['prepare', '--help']); print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(out.splitlines()[-1].split())
    assert not loaded & {"torch", "lightning", "transformers", "datasets", "wandb", "sentence_transformers"}
