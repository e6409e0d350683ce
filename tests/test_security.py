"""What came from elsewhere is read, never run: pickles, YAML, code in model folders, names that leave their folder.

Each malicious file would make a folder if it were trusted; the first test shows that they would.
"""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import error_of, fit, make_documents, write_collection, write_jsonl
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file

import condenser
from condenser.cli import main
from condenser.data.datamodule import CondenserDataModule
from condenser.data.store import TokenStore
from condenser.hub import load_authors_checkpoint
from condenser.runs import checkpoints

REFERENCE = Path(__file__).parent / "golden" / "reference-checkpoint"
SOURCES = sorted(Path(condenser.__path__[0]).rglob("*.py"))


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.fixture
def trace(tmp_path):
    """The folder that the payload would make."""
    path = tmp_path / "payload-was-run"
    yield path
    assert not path.exists()


def yaml_payload(trace):
    return f"!!python/object/apply:os.mkdir [{trace}]"


def script(trace):
    return f"import os\nos.mkdir({str(trace)!r})\n"


def victim(recipe, folder, *options):
    return fit(recipe, folder, "victim", *map(str, options))


def test_the_payloads_would_run_where_they_are_trusted(tmp_path):
    torch.save({"c_head.0.weight": Payload(tmp_path / "a")}, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)
    np.save(tmp_path / "array.npy", np.array([Payload(tmp_path / "b")]), allow_pickle=True)
    np.load(tmp_path / "array.npy", allow_pickle=True)
    yaml.unsafe_load(yaml_payload(tmp_path / "c"))
    exec(script(tmp_path / "d"))
    assert all((tmp_path / name).is_dir() for name in "abcd")


# --- pickles


def zipped(content, path):
    torch.save(content, path)


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


def cut(content, path):
    torch.save({"c_head.0.weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-300])


def text(content, path):
    path.write_text("<html>404</html>")


FILES = [(zipped, "posix.mkdir"), (legacy, "posix.mkdir"), (bare, "cannot be read"), (cut, "cannot be read")]
FILES += [(text, "is damaged, or was not written by torch")]


@pytest.fixture
def backbone(tiny_export, tmp_path):
    """A folder as the authors' code leaves it, for the tokenizer of the store."""
    folder = tmp_path / "backbone"
    shutil.copytree(tiny_export, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(tiny_export / "model.safetensors"), folder / "pytorch_model.bin")
    torch.save(load_file(tiny_export / "condenser_head.safetensors"), folder / "model.pt")
    return folder


def of_backbone(folder):
    return "--model.backbone", folder, "--model.backbone_config", "{}"


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
@pytest.mark.parametrize(("write", "why"), FILES)
def test_weights_that_would_run_code_or_are_damaged_are_named(
    write, why, name, backbone, recipe, trace, tmp_path, capsys
):
    write({"c_head.0.weight": Payload(trace)}, backbone / name)
    error_of(capsys, victim(recipe, tmp_path, *of_backbone(backbone)), backbone / name, why)
    with pytest.raises(ValueError, match=name):
        load_authors_checkpoint(backbone, skip_from=1)


@pytest.fixture
def evaluated(tmp_path):
    """Runs `condenser evaluate` on a collection of three passages."""
    pytest.importorskip("sentence_transformers")
    folder = write_collection(tmp_path / "collection", make_documents(3), make_documents(1))

    def evaluate(model):
        options = ["--retrieval", str(folder), "--output", str(tmp_path / "evaluation")]
        return main(["evaluate", str(model), *options])

    return evaluate


@pytest.mark.parametrize("pooling", [True, False], ids=["sentence-transformers", "plain"])
@pytest.mark.parametrize(("write", "why"), [FILES[0], FILES[3]])
def test_evaluating_weights_that_would_run_code_or_are_damaged(write, why, pooling, backbone, evaluated, trace, capsys):
    if not pooling:
        (backbone / "modules.json").unlink()
    write({"bert.embeddings.word_embeddings.weight": Payload(trace)}, backbone / "pytorch_model.bin")
    error_of(capsys, evaluated(backbone), backbone / "pytorch_model.bin", why)


def malicious(checkpoint, path, trace):
    """The checkpoint, with a payload beside the optimizer's states."""
    content = torch.load(checkpoint, weights_only=True)
    content["optimizer_states"][0]["payload"] = Payload(trace)
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--ckpt_path", "CHECKPOINT"],
        ["fit", "--ckpt_path", "CHECKPOINT", "--weights_only", "false"],
        ["fit"],  # goes on from the run folder's newest
        ["validate", "--ckpt_path", "CHECKPOINT"],
        ["export", "CHECKPOINT", "--output", "OUT"],
    ],
    ids=" ".join,
)
def test_a_checkpoint_that_would_run_code_is_not_read(words, run, recipe, trace, tmp_path, capsys):
    folder = tmp_path / ("victim" if words == ["fit"] else "elsewhere") / "checkpoints"
    folder.mkdir(parents=True)
    path = malicious(checkpoints(run)[0], folder / "last-step=4.ckpt", trace)
    places = {"CHECKPOINT": str(path), "OUT": str(tmp_path / "out")}
    command, *options = (places.get(word, word) for word in words)
    if command != "export":
        options += ["--config", str(recipe), "--name", "victim", "--runs_dir", str(tmp_path)]
    assert f"{path} cannot be read: it would run code (posix.mkdir)" in error_of(capsys, main([command, *options]))
    assert not (tmp_path / "out").exists()


def in_the_making(folder):
    """As a store is before its shares are merged."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    (folder / "unfinished.json").write_text(json.dumps({"first_source": 0, "settings": manifest["settings"]}))


def test_arrays_of_a_store_are_not_unpickled(copied, trace, capsys):
    payload = np.array([Payload(trace)])
    np.save(copied / "token_counts.npy", payload, allow_pickle=True)
    with pytest.raises(ValueError, match=str(copied / "token_counts.npy")):
        _ = CondenserDataModule(str(copied)).unigram_nats
    unit = sorted((copied / "units").glob("*.npy"))[0]
    np.save(unit, payload, allow_pickle=True)
    names = sorted(path.stem for path in (copied / "units").glob("*.json"))
    (copied / "units" / "share-0-of-1.json").write_text(json.dumps(names))
    in_the_making(copied)
    error_of(capsys, main(["prepare", "merge", str(copied)]), unit)


# --- YAML


@pytest.mark.parametrize("command", [["fit"], ["validate"], ["estimate"], ["bench"], ["launch", "--name", "x"]])
def test_a_recipe_that_would_run_code_is_refused(command, recipe, trace, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.read_text() + f"name: {yaml_payload(trace)}\n")
    assert "os.mkdir" in error_of(capsys, main([*command, "--config", str(path)]))


@pytest.mark.parametrize("command", ["fit", "launch", "report"])
def test_a_run_whose_settings_would_run_code_is_not_read(command, run, recipe, trace, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "victim")
    path = tmp_path / "victim" / "config.yaml"
    path.write_text(f"name: {yaml_payload(trace)}\n")
    of_fit = ["--config", str(recipe), "--name", "victim", "--runs_dir", str(tmp_path)]
    of_report = [str(path.parent), "--output", str(tmp_path / "report.html")]
    options = {"fit": of_fit, "launch": [*of_fit, "--gpus", "0", "--dry-run"], "report": of_report}
    error_of(capsys, main([command, *options[command]]), path, "os.mkdir")


# --- names that leave their folder


@pytest.mark.parametrize("relative", [True, False])
def test_a_manifest_whose_shards_lie_elsewhere_is_refused(relative, copied, recipe, tmp_path, capsys):
    shutil.copy(next((copied / "train").glob("*.arrow")), tmp_path / "outside.arrow")
    manifest = json.loads((copied / "manifest.json").read_text())
    name = "../../outside.arrow" if relative else str(tmp_path / "outside.arrow")
    manifest["splits"]["train"]["shards"][0]["file"] = name
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="outside of its folder"):
        TokenStore(copied, "train")
    error_of(capsys, victim(recipe, tmp_path, "--data.store", copied), copied, repr(name), "outside of its folder")
    error_of(capsys, main(["inspect", str(copied)]), copied, repr(name), "outside of its folder")


def test_units_and_records_of_a_store_in_the_making_stay_in_it(copied, tmp_path, capsys):
    in_the_making(copied)
    shutil.copy(next((copied / "train").glob("*.arrow")), tmp_path / "outside.arrow")
    unit = sorted((copied / "units").glob("*.json"))[0]
    share = copied / "units" / "share-0-of-1.json"
    shutil.copy(unit, tmp_path / "00000-00000.json")
    share.write_text(json.dumps(["../../00000-00000"]))
    error_of(
        capsys,
        main(["prepare", "merge", str(copied)]),
        copied / "units",
        "'../../00000-00000'",
        "outside of its folder",
    )
    record = json.loads(unit.read_text())
    record["train"]["shards"][0]["file"] = "../../outside.arrow"
    unit.write_text(json.dumps(record))
    share.write_text(json.dumps([unit.stem]))
    error_of(
        capsys,
        main(["prepare", "merge", str(copied)]),
        copied,
        "'../../outside.arrow'",
        "outside of its folder",
    )
    assert not (copied / "manifest.json").exists()


def test_units_in_a_manifest_stay_in_the_store(copied, capsys):
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | {"units": ["../../x"]}))
    error_of(capsys, main(["inspect", str(copied)]), copied / "manifest.json", "'../../x'")


@pytest.mark.parametrize("name", ["../../evil", "/absolute/evil", ".."])
def test_a_checkpoint_whose_files_leave_the_export_is_refused(name, run, tmp_path, capsys):
    content = torch.load(checkpoints(run)[0], weights_only=True)
    content["condenser"]["tokenizer"][name] = "evil"
    torch.save(content, tmp_path / "a.ckpt")
    error_of(
        capsys,
        main(["export", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "deep" / "out")]),
        tmp_path / "a.ckpt",
        repr(name),
        "outside of its folder",
    )
    assert {path.name for path in tmp_path.rglob("*")} <= {"a.ckpt", "deep"}


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_weights_in_several_files_are_those_of_the_folder(name, backbone, recipe, evaluated, tmp_path, capsys):
    weights = load_file(REFERENCE / "batch.safetensors")
    (backbone / "pytorch_model.bin").rename(tmp_path / "outside.bin")
    save_file(weights, tmp_path / "outside.safetensors")
    suffix = "safetensors" if "safetensors" in name else "bin"
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, f"../outside.{suffix}")}
    (backbone / name).write_text(json.dumps(index))
    error_of(capsys, victim(recipe, tmp_path, *of_backbone(backbone)), backbone, name, f"'../outside.{suffix}'")
    error_of(capsys, evaluated(backbone), backbone, name)


@pytest.mark.parametrize("many", [True, False], ids=["splits", "one"])
def test_a_saved_dataset_is_read_from_its_folder(many, store, tmp_path, capsys):
    saved = Dataset.from_dict({"text": make_documents(3)})
    saved.save_to_disk(tmp_path / "outside")
    data = tmp_path / "data"
    (DatasetDict({"train": saved}) if many else saved).save_to_disk(data)
    path = data / ("dataset_dict.json" if many else "state.json")
    other = {"splits": ["train", "../outside"]} if many else {"_data_files": [{"filename": "../outside/x.arrow"}]}
    options = ["--tokenizer", str(store / "tokenizer"), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(["prepare", "--input", str(data), *options]) == 0
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    error_of(capsys, main(["prepare", "--input", str(data), *options]), path, "outside of its folder")


# --- code in model folders


def with_code(folder, trace, **config):
    """Let a folder's configuration ask for code of its own, which lies beside it."""
    (folder / "custom.py").write_text(script(trace))
    own = {name: f"custom.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForMaskedLM")}
    for name, more in (("config.json", {"auto_map": own}), ("tokenizer_config.json", {"auto_map": TOKENIZER})):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | more | (config if name == "config.json" else {})))


TOKENIZER = {"AutoTokenizer": ["custom.Tokenizer", "custom.Tokenizer"]}


def test_code_in_a_backbone_of_a_known_type_is_passed_over(backbone, recipe, evaluated, trace, tmp_path):
    with_code(backbone, trace)
    assert victim(recipe, tmp_path, *of_backbone(backbone), "--trainer.max_steps", 1) == 0
    assert evaluated(backbone) == 0


def test_a_backbone_that_needs_its_own_code_is_refused_unasked(
    backbone, recipe, evaluated, trace, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda prompt: "y")  # transformers would ask
    with_code(backbone, trace, model_type="custom")
    (backbone / "modules.json").unlink()
    error_of(capsys, victim(recipe, tmp_path, *of_backbone(backbone)), backbone, "custom code")
    error_of(capsys, evaluated(backbone), backbone, "custom code")


def test_modules_of_sentence_transformers_are_not_taken_from_the_folder(backbone, evaluated, trace, capsys):
    (backbone / "custom.py").write_text(script(trace))
    modules = json.loads((backbone / "modules.json").read_text())
    modules[1]["type"] = "custom.Pooling"
    (backbone / "modules.json").write_text(json.dumps(modules))
    error_of(capsys, evaluated(backbone), backbone, "custom.Pooling")


def test_a_folder_of_data_with_a_loading_script_is_read_without_it(store, trace, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "data.py").write_text(script(trace))
    write_jsonl(data / "documents.jsonl", make_documents(3))
    options = ["--tokenizer", str(store / "tokenizer"), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(["prepare", "--input", str(data), *options]) == 0


# --- the code itself


def calls(path):
    """Every call in a file: its name as written, and its keywords."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}


def unsafe(name, keywords):
    last = name.split(".")[-1]
    return (
        keywords.get("shell", "False") != "False"
        or keywords.get("allow_pickle", "False") != "False"
        or keywords.get("trust_remote_code", "False") != "False"
        or name in ("os.system", "os.popen", "eval", "exec", "subprocess.getoutput")
        or last in ("unsafe_load", "full_load", "Unpickler", "load_from_checkpoint")
        or name in ("yaml.load", "pickle.load", "pickle.loads", "joblib.load", "dill.load")
        or (name == "torch.load" and keywords.get("weights_only") != "True")
        or (name.startswith("Auto") and last == "from_pretrained" and "trust_remote_code" not in keywords)
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(SOURCES[0].parent)))
def test_nothing_is_unpickled_or_given_to_a_shell(path):
    assert [(name, keywords) for name, keywords in calls(path) if unsafe(name, keywords)] == []


def test_torch_load_is_called_in_one_place():
    assert [path.name for path in SOURCES if any(name == "torch.load" for name, _ in calls(path))] == ["files.py"]


@pytest.mark.parametrize(
    "line",
    [
        "subprocess.run('ls', shell=True)",
        "os.system('ls')",
        "pickle.load(file)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_what_is_unsafe_is_found(line, tmp_path):
    (tmp_path / "a.py").write_text(line)
    assert [unsafe(*call) for call in calls(tmp_path / "a.py")] == [True]
