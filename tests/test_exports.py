"""`condenser export` for others: vectors as asked for, the authors' layout, ONNX, every step, and the hub."""

import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import error_of, flip_a_bit
from sentence_transformers import SentenceTransformer
from servers import Hub, serving
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from condenser import CondenserForPreTraining
from condenser.cli import main
from condenser.data.lock import locked
from condenser.hub import load_authors_checkpoint, load_export
from condenser.runs import checkpoints, step_of

TEXTS = ["The encoder attends.", "Dense retrieval with masked tokens and a head, ranked and indexed."]


def export(run, folder, *options):
    return main(["export", str(run), "--output", str(folder), *options])


def encoder_of(folder):
    return SentenceTransformer(str(folder), device="cpu")


def inputs_of(folder, kind="pt"):
    return AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors=kind, padding=True)


@pytest.fixture(scope="module")
def states(tiny_export):
    """Last states of the texts, and which of them are of tokens."""
    inputs = inputs_of(tiny_export)
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(tiny_export)(**inputs).last_hidden_state
    return hidden, inputs["attention_mask"][..., None]


def test_vectors_are_pooled_normalised_and_prompted_as_asked(run, states, tmp_path):
    hidden, mask = states
    mean = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    options = ["--pooling", "mean", "--normalize", "--query-prompt", "dense ", "--document-prompt", ""]
    assert export(run, tmp_path / "out", *options) == 0
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    encoder = encoder_of(tmp_path / "out")
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, rtol=1e-3, atol=1e-5)
    assert encoder.similarity_fn_name == "cosine"
    np.testing.assert_allclose(
        encoder.encode(TEXTS, prompt_name="query"), encoder.encode(["dense " + text for text in TEXTS]), atol=1e-6
    )
    assert 'vectors: mean, compared by cosine; prompts: query: "dense "' in (tmp_path / "out/README.md").read_text()
    assert load_export(tmp_path / "out").skip_from == 1


def test_vectors_are_whitened_by_the_texts_given_and_not_by_what_their_file_held_before(run, corpus, tmp_path, capsys):
    file = tmp_path / "texts.jsonl"
    shutil.copy(corpus, file)
    options = ["--whitening", str(file), "--dimensions", "8"]
    assert export(run, tmp_path / "out", *options) == 0
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    vectors = encoder_of(tmp_path / "out").encode(texts)
    assert vectors.shape == (len(texts), 8)
    assert len({path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()}) == 1
    np.testing.assert_allclose(np.cov(vectors, rowvar=False), np.eye(8), atol=0.02)
    np.testing.assert_allclose(vectors.mean(0), 0, atol=0.01)
    assert export(run, tmp_path / "out", *options) == 0
    assert "nothing to do" in capsys.readouterr().out
    file.write_text("".join(corpus.read_text().splitlines(keepends=True)[:100]))
    error_of(capsys, export(run, tmp_path / "out", *options), "with these options (and texts to whiten by); remove it")


def test_layers_are_averaged_where_asked(run, states, tmp_path):
    assert export(run, tmp_path / "out", "--pooling", "last2-cls") == 0
    with torch.inference_mode():
        layers = AutoModel.from_pretrained(tmp_path / "out")(**inputs_of(tmp_path / "out")).hidden_states[-2:]
    expected = torch.stack(layers).mean(0)[:, 0].numpy()
    np.testing.assert_allclose(encoder_of(tmp_path / "out").encode(TEXTS), expected, atol=1e-5)


def test_the_authors_layout_is_what_their_code_reads(run, tiny_export, tmp_path):
    """Plain dicts of tensors in two files, and no other weights."""
    assert export(run, tmp_path / "out", "--layout", "authors") == 0
    head = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert type(head) is dict
    assert {name.split(".")[0] for name in head} == {"c_head"}
    assert not list((tmp_path / "out").glob("*.safetensors"))
    lm = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    written = {**head, **{f"lm.{key}": value for key, value in lm.items()}}
    again = load_authors_checkpoint(tmp_path / "out", skip_from=1).state_dict()
    for name, weight in load_export(tiny_export).state_dict().items():
        assert torch.equal(written[name], weight)
        assert torch.equal(again[name], weight)
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").config.model_type == "bert"


@pytest.mark.slow
def test_onnx_runtime_computes_the_encoder_s_states_and_nearly_in_8_bits(run, states, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert export(run, tmp_path / "out", "--onnx") == 0
    hidden, mask = states
    inputs = inputs_of(tmp_path / "out", "np")
    wanted = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for name, tolerance in (("model.onnx", 1e-4), ("model_qint8.onnx", 0.1)):
        session = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / name, providers=["CPUExecutionProvider"])
        found = session.run(None, wanted)[0]
        real = mask[..., 0].numpy() > 0
        np.testing.assert_allclose(found[real], hidden.numpy()[real], atol=tolerance)
        alone = session.run(None, {key: value[:1, :4] for key, value in wanted.items()})[0]  # of another shape
        assert alone.shape == (1, 4, 32)
    parity = json.loads((tmp_path / "out" / "onnx" / "parity.json").read_text())
    assert parity["model.onnx"]["largest_difference"] < 1e-4
    assert parity["model_qint8.onnx"]["lowest_cosine_of_cls"] > 0.99


def test_every_step_that_a_run_kept_is_exported(run, tmp_path, capsys):
    steps = {step_of(path): path for path in checkpoints(run)}
    assert len(steps) > 1
    assert export(run / "checkpoints", tmp_path / "out", "--all-steps") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"step-{step}" for step in steps}
    for step, path in steps.items():
        weights = torch.load(path, weights_only=True)["state_dict"]
        model = CondenserForPreTraining.from_pretrained(tmp_path / "out" / f"step-{step}")
        assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    capsys.readouterr()
    assert export(run, tmp_path / "out", "--all-steps") == 0
    assert capsys.readouterr().out.count("nothing to do") == len(steps)


def test_a_step_that_the_run_removes_meanwhile_is_left_out(run, tmp_path, monkeypatch, capsys):
    going = shutil.copytree(run, tmp_path / "going")
    newest, *_, oldest = sorted(checkpoints(going), key=step_of, reverse=True)
    monkeypatch.setattr("condenser.export.compare_with_live", lambda folder, model: oldest.unlink(missing_ok=True))
    assert export(going, tmp_path / "out", "--all-steps", "--push", "X/Y", "--dry-run") == 0
    assert (tmp_path / f"out/step-{step_of(newest)}").is_dir()
    assert not (tmp_path / f"out/step-{step_of(oldest)}").exists()
    said = capsys.readouterr().out
    assert f"{oldest} is left out" in said
    assert f"X/Y@step-{step_of(oldest)}" not in said


@pytest.fixture
def hub(monkeypatch):
    with serving(Hub()) as hub:
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        made = huggingface_hub.HfApi
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made(endpoint=hub.url, token="hf_of_a_test"))
        yield hub


def test_what_would_be_sent_is_said_and_nothing_is_sent(run, tmp_path, hub, capsys):
    assert export(run, tmp_path / "out", "--push", "me/model", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "me/model@main: " in said
    assert "model.safetensors" in said
    assert "nothing was sent" in said
    assert hub.files == {"main": {}}


def test_each_step_becomes_a_branch_and_the_newest_is_main(run, tmp_path, hub):
    """Of an earlier push nothing stays."""
    hub.files["main"] = {".gitattributes": b"the hub's", "onnx/model.onnx": b"of other weights"}
    assert export(run, tmp_path / "out", "--all-steps", "--push", "me/model") == 0
    steps = sorted({step_of(path) for path in checkpoints(run)})
    assert sorted(hub.files) == sorted(["main", *(f"step-{step}" for step in steps)])
    for branch, files in hub.files.items():
        folder = tmp_path / "out" / (f"step-{steps[-1]}" if branch == "main" else branch)
        on_disk = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert files == on_disk | {".gitattributes": b"the hub's"}


def test_a_hub_that_refuses_is_one_line_and_the_export_stays(run, tmp_path, hub, capsys):
    hub.refuses = "commit"
    error = error_of(capsys, export(run, tmp_path / "out", "--push", "me/model"))
    assert error.startswith("condenser export: error: --push me/model: ")
    assert str(tmp_path / "out") in error
    assert load_export(tmp_path / "out") is not None


BAD = {
    "two choices": (["--all-steps", "--best"], "--all-steps takes every checkpoint"),
    "dry alone": (["--dry-run"], "--dry-run says what --push would send"),
    "dimensions alone": (["--dimensions", "4"], "--dimensions is of --whitening"),
    "authors and more": (["--layout", "authors", "--normalize"], "--layout authors is for the authors' code"),
    "no such texts": (["--whitening", "nowhere.jsonl"], "nowhere.jsonl"),
    "no such pooling": (["--pooling", "middle"], "no pooling 'middle'"),
    "pooling that is learnt": (["--pooling", "attention"], "it is learnt by fine-tuning"),
    "layers that are not written": (["--pooling", "last2-cls", "--onnx"], "--onnx writes the last"),
    "no dimensions": (["--whitening", "CORPUS", "--dimensions", "0"], "--dimensions 0 must be at least 1"),
    "no repository": (["--push", "me", "--dry-run"], "--push me: give OWNER/NAME"),
    "no place in it": (["--push", "me/..", "--dry-run"], "--push me/..: give OWNER/NAME"),
    "too many dimensions": (["--whitening", "CORPUS", "--dimensions", "64"], "the encoder's vectors have 32"),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_cannot_be_are_one_line_and_leave_nothing(case, run, corpus, tmp_path, capsys):
    options, message = BAD[case]
    assert export(run, tmp_path / "out", *(str(corpus) if each == "CORPUS" else each for each in options)) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_exported_however_it_is_named(run, tmp_path, capsys):
    copy, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, copy)
    newest = step_of(checkpoints(copy)[0])
    for path in [path for path in checkpoints(copy) if step_of(path) == newest]:
        flip_a_bit(path)
    for named in ([path], [copy, "--step", str(newest)]):
        assert "damaged" in error_of(capsys, export(named[0], out, *named[1:]))
        assert not out.exists()
    assert export(copy, out) == 0
    for path in checkpoints(copy):
        path.write_bytes(path.read_bytes()[:-50])
    for options in ([], ["--all-steps"]):
        assert "damaged; export another step" in error_of(capsys, export(copy, tmp_path / "none", *options))
    assert not (tmp_path / "none").exists()


def test_an_export_removes_what_a_killed_one_has_left_and_nothing_else(run, tmp_path, capsys):
    for name in ("out.partial", ".out.unfinished-export", ".out2.unfinished-export"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("written")
    (tmp_path / ".out.lock").write_text("process 1 on nowhere")
    assert export(run, tmp_path / "out") == 0
    assert "was left by process 1 on nowhere" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.partial", ".out2.unfinished-export"}
    assert (tmp_path / "out.partial/weights").read_text() == "written"


@pytest.mark.parametrize("is_there", [True, False])
def test_an_export_to_a_link_is_written_where_it_leads(is_there, run, tmp_path, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "other")
    if is_there:
        (tmp_path / "other").mkdir()
    assert export(run, tmp_path / "out") == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "other" / "config.json").is_file()
    assert export(run, tmp_path / "out") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_link_to_itself_is_one_line(run, tmp_path, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "out")
    assert str(tmp_path / "out") in error_of(capsys, export(run, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_exports_do_not_write_one_folder_at_a_time(run, tmp_path, capsys):
    (tmp_path / ".out.unfinished-export").mkdir()
    with locked(tmp_path / ".out.lock", ""):
        assert f"out is being written by process {os.getpid()} on" in error_of(capsys, export(run, tmp_path / "out"))
        assert {path.name for path in tmp_path.iterdir()} == {".out.lock", ".out.unfinished-export"}


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_an_export_that_has_lost_something_is_not_called_done(how, run, tmp_path, capsys):
    (tmp_path / "out").mkdir()  # which may be there, and empty
    assert export(run, tmp_path / "out") == 0
    weights = tmp_path / "out" / "model.safetensors"
    weights.unlink() if how == "gone" else weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert export(run, tmp_path / "out") == 1
    assert "model.safetensors is missing or has changed since the export: remove" in capsys.readouterr().err


def test_a_model_that_is_no_run_is_told_apart(tiny_export, tmp_path, capsys):
    assert export(tiny_export, tmp_path / "out") == 1
    assert "is a model and no run: CondenserForPreTraining.from_pretrained reads it" in capsys.readouterr().err


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path):
    """Its libraries ask five times a file, with pauses that sum up to half a minute."""
    code = (
        "from condenser.data.tokenizers import load_tokenizer\n"
        "try:\n    load_tokenizer('me/nowhere')\nexcept ValueError as error:\n    print(error)\n"
    )
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True)
    assert "http://127.0.0.1:9 does not answer" in done.stderr
    assert "Retrying" not in done.stderr
    assert done.stdout.splitlines()[0].startswith("no tokenizer could be loaded from 'me/nowhere'")
