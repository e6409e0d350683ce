"""The design, held by tests: imports run one way, files stay readable, the command table is whole."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from condenser.cli import COMMANDS, load, main

PACKAGE = Path(__file__).parents[1] / "condenser"
MAY_IMPORT = {  # what a part of the package may import from it, besides itself
    "models": set(),
    "data": set(),
    "corpus": {"data"},  # the store alone: see below
    "hub": {"models", "data"},
    "export": {"models", "data", "hub", "runs", "card"},
    "card": {"models"},
    "exports": {"models", "corpus", "evaluation", "hub", "export", "runs"},
    "training": {"models", "data", "hub", "export", "recipes", "runs", "cluster"},
    "evaluation": {"models", "data", "corpus", "hub", "export", "reports", "runs"},
    "reports": {"models", "data", "corpus", "training", "recipes", "runs"},
    "cluster": {"data", "recipes", "runs", "training"},
    "recipes": {"runs"},
    "runs": set(),
    "online": set(),
    "cli": {"cluster", "recipes"},  # imports the commands by name, when they run
    "__main__": {"cli"},
    "__init__": {"models"},
}
ACROSS = {  # and of these, that module alone
    ("corpus", "data"): {"store", "hashing", "tokenizers", "collate", "lock"},
    ("export", "data"): {"lock"},
    ("training", "cluster"): {"signals"},
    ("cli", "cluster"): {"signals"},
    ("evaluation", "reports"): {"figures", "inspection", "tables"},
    ("evaluation", "corpus"): {"readers"},
    ("reports", "corpus"): {"inputs", "readers", "documents", "prepare", "work"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("condenser"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("condenser.")]
        else:
            names = []
        yield from ((name.split(".")[1], name.split(".")[2:]) for name in names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other, inner in imports(path):
        assert other in MAY_IMPORT[part] | {part, "online"}
        if (part, other) in ACROSS:
            assert inner[0] in ACROSS[part, other]


def test_models_need_torch_its_compiler_and_transformers_only():
    allowed = {"torch", "triton", "transformers", "huggingface_hub", "safetensors", "condenser"}
    allowed |= sys.stdlib_module_names
    for path in (PACKAGE / "models").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert name.split(".")[0] in allowed, path


def test_text_files_are_utf_8_whatever_the_locale():
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            modes = [value for value in call.args[1:2] if isinstance(value, ast.Constant)]
            binary = any("b" in str(mode.value) for mode in modes)
            is_text = name in ("read_text", "write_text") or (
                isinstance(call.func, ast.Name) and name == "open" and not binary
            )
            if is_text:
                given = [keyword.arg for keyword in call.keywords]
                assert "encoding" in given, f"{path.relative_to(PACKAGE)}, line {call.lineno}"


def test_every_command_exists_and_teaches_itself(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name, (target, line) in COMMANDS.items():
        assert name in overview
        assert line in overview
        assert callable(load(target))
        assert main([name, "--help"]) == 0
        assert len(capsys.readouterr().out) > 400


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "condenser", "report", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys; from condenser.cli import main; main(['--help']); main(['prepare', '--help']); print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(out.splitlines()[-1].split())
    assert not loaded & {"torch", "lightning", "transformers", "datasets", "wandb", "sentence_transformers"}


PRIVATE = {  # names that libraries keep to themselves and are used here for want of public ones, and whose they are
    "_actions": "argparse.ArgumentParser()",
    "_attn_implementation": "transformers.BertConfig()",
    "_broadcast_sigterm_tensor": "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop",
    "_data_parallel_size": "lightning.pytorch.strategies.ModelParallelStrategy()",
    "_dynamo": "torch",
    "_exit": "os",
    "_foreach_copy_": "torch",
    "_foreach_div_": "torch",
    "_foreach_zero_": "torch",
    "_from_config": "transformers.PreTrainedModel",
    "_init_weights": "transformers.PreTrainedModel",
    "_is_hf_initialized": "transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, hidden_size=12))",
    "_n_gpu": "transformers.TrainingArguments('.', use_cpu=True)",
    "_parser": "lightning.pytorch.cli.LightningCLI",
    "_save_distributed_checkpoint": "lightning.pytorch.strategies.ModelParallelStrategy()",
    "_tied_weights_keys": "transformers.PreTrainedModel",
    "_track_module_params_and_buffers": "torch.distributed._tools.mem_tracker.MemTracker",
}


def test_private_names_of_libraries_are_few_and_there():
    """Where one goes, this says so before a run does."""
    import argparse
    import os

    import lightning.pytorch.cli
    import torch.distributed._tools.mem_tracker
    import transformers

    known = {"argparse": argparse, "os": os, "lightning": lightning, "torch": torch, "transformers": transformers}
    for name, owner in PRIVATE.items():
        assert hasattr(eval(owner, known), name), f"{owner} has no {name} any more"
    assert torch._dynamo.config.recompile_limit > 0
    used = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                used |= {node.attr} - own
    overridden = {"_track_module_params_and_buffers"}
    assert used - {"_replace", "_asdict", "_cached"} | overridden == PRIVATE.keys()
