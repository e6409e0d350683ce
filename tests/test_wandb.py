"""Weights & Biases: one run however often it is started, by one rank; and training goes on whatever becomes of it."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import error_of, fit, slow
from lightning.pytorch import Callback
from servers import WandbServer, serving
from test_devices import DDP, start_ranks, wait_for, write_recipe
from test_training import STOP, assert_same_weights, metrics_of

import condenser
from condenser.cli import main
from condenser.hub import load_export
from condenser.training.tracking import PATIENCE, finished, forget, keep_export, run_id, tracker

KEY = "5ec4e7" * 7
SYNC = Path(sys.executable).with_name("wandb")


@pytest.fixture
def to_server(monkeypatch):
    """W&B's client talks to this address, with this key."""
    import wandb

    def use(url, key=KEY):
        wandb.teardown()
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", key)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "4")

    yield use
    forget(wandb)


def tracked_as(run):
    return (run / "wandb_id").read_text()


def steps_of(server, run):
    return [int(row["trainer/global_step"]) for row in server.history(tracked_as(run))]


def expected_steps(run):
    return [int(row["step"]) for row in metrics_of(run)]


def test_a_run_that_was_stopped_goes_on_in_its_wandb_run(run, recipe, tmp_path, to_server):
    with serving(WandbServer(KEY)) as server:
        to_server(server.url)
        assert fit(recipe, tmp_path, "a", "--wandb", "online", *STOP, "4") == 0
        assert fit(recipe, tmp_path, "a", "--wandb", "online") == 0
    assert list(server.runs) == list(server.configs) == [tracked_as(tmp_path / "a")]
    assert not server.artifacts
    assert not (tmp_path / "a" / "export").exists()
    assert steps_of(server, tmp_path / "a") == expected_steps(tmp_path / "a") == expected_steps(run)
    assert_same_weights(tmp_path / "a", run)


def sync(run, pattern, n_parts=1):
    parts = sorted((run / "wandb").glob(pattern))
    assert len(parts) == n_parts
    subprocess.run([SYNC, "sync", "--yes", "--include-online", *parts], check=True, capture_output=True, cwd=run)


def test_settings_versions_checksums_and_export_are_kept(recipe, store, tmp_path, to_server):
    with serving(WandbServer(KEY)) as server:
        to_server(server.url)
        assert fit(recipe, tmp_path, "a", "--wandb", "online", "--wandb_artifacts", "true") == 0
    (config,) = server.configs.values()
    sha256 = hashlib.sha256((store / "manifest.json").read_bytes()).hexdigest()
    assert config["settings"]["value"]["model"]["init_args"]["skip_from"] == 1
    assert config["stores"]["value"] == {store.name: {"weight": 1.0, "manifest_sha256": sha256}}
    assert {"condenser", "commit", "torch"} <= set(config["versions"]["value"])
    settings, model = (server.artifacts[f"{kind}-{tracked_as(tmp_path / 'a')}"] for kind in ("settings", "model"))
    assert settings["metadata"] == {key: config[key]["value"] for key in ("versions", "stores")}
    assert sorted(settings["files"]) == ["config.yaml", f"{store.name}/manifest.json"]
    assert {"model.safetensors", "condenser_head.safetensors", "1_Pooling/config.json"} <= set(model["files"])
    assert load_export(tmp_path / "a" / "export").skip_from == 1


def test_only_the_first_rank_talks(recipe, tmp_path, to_server):
    path = write_recipe(recipe, tmp_path / "two.yaml", trainer__devices=2, trainer__strategy=DDP, wandb="online")
    with serving(WandbServer(KEY)) as server:
        to_server(server.url)
        fits = [["--config", path, "--runs_dir", tmp_path, "--name", "a"]]
        address = {name: os.environ[name] for name in ("WANDB_BASE_URL", "WANDB_API_KEY")} | {"WANDB_SERVICE": ""}
        wait_for(start_ranks(2, fits, tmp_path / "log", address), tmp_path / "log")
    assert server.asked.count("RunResumeStatus") == len(list((tmp_path / "a" / "wandb").glob("run-*"))) == 1
    assert steps_of(server, tmp_path / "a") == expected_steps(tmp_path / "a")
    assert "wandb" not in (tmp_path / "log-1").read_text()


@contextmanager
def silence(accepts):
    """An address where nobody answers, and connections are accepted or refused."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        if accepts:
            unused.listen(100)
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


@pytest.mark.parametrize("accepts", [slow(True), False])
def test_what_is_written_offline_as_asked_or_for_want_of_a_host_is_one_run_when_synced(
    accepts, run, recipe, tmp_path, to_server, capfd
):
    with serving(WandbServer(KEY)) as server:
        to_server(server.url)
        assert fit(recipe, tmp_path, "a", "--wandb", "offline", *STOP, "5") == 0
        assert not server.asked
    with silence(accepts) as url:
        to_server(url)
        assert fit(recipe, tmp_path, "a", "--wandb", "online") == 0
    assert "W&B cannot be reached (" in capfd.readouterr().err
    assert_same_weights(tmp_path / "a", run)
    with serving(WandbServer(KEY)) as server:
        to_server(server.url)
        sync(tmp_path / "a", "offline-run-*", n_parts=2)
    assert len(server.runs) == 1
    assert steps_of(server, tmp_path / "a") == expected_steps(tmp_path / "a")


class Outage(Callback):
    """The first time that training is at this step, W&B's server (or the process that sends to it) is gone."""

    happens = staticmethod(lambda: None)

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            Outage.happens()


OUTAGE = ["--trainer.callbacks", f"{__name__}.Outage", "--trainer.callbacks.step", "3"]


@pytest.mark.parametrize("artifacts", ["false", slow("true")])
def test_training_goes_on_when_the_server_goes_away(artifacts, run, recipe, tmp_path, to_server, monkeypatch):
    """And what did not reach it is uploaded later."""
    monkeypatch.setitem(PATIENCE, "finish_timeout", 3.0)
    with serving(WandbServer(KEY)) as server:
        to_server(server.url)
        monkeypatch.setattr(Outage, "happens", server.hang)
        assert fit(recipe, tmp_path, "a", "--wandb", "online", "--wandb_artifacts", artifacts, *OUTAGE) == 0
    assert_same_weights(tmp_path / "a", run)
    assert steps_of(server, tmp_path / "a") != expected_steps(run)
    with serving(WandbServer(KEY)) as server:
        to_server(server.url)
        sync(tmp_path / "a", "run-*")
    assert steps_of(server, tmp_path / "a") == expected_steps(tmp_path / "a") == expected_steps(run)


def kill_the_sender():
    for child in psutil.Process().children(recursive=True):
        if "wandb-core" in child.name():
            child.kill()
            child.wait()


def fit_apart(recipe, runs, happens, step):
    """In a process of its own, as one that has lost the process that sends begins no other W&B run."""
    name = happens.__name__
    code = f"import sys, test_wandb as t; t.Outage.happens = t.{name}; sys.exit(t.main(sys.argv[1:]))"
    outage = ["--trainer.callbacks", f"{__name__}.Outage", "--trainer.callbacks.step", step]
    options = ["--config", str(recipe), "--runs_dir", str(runs), "--name", "a", "--wandb", "online", *outage]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(condenser.__file__).parents[1])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", code, "fit", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def ask_all_to_stop():
    """As SLURM does, which signals all processes of a step, W&B's too."""
    kill_the_sender()
    os.kill(os.getpid(), signal.SIGTERM)


def fail():
    raise ValueError("it failed")


@pytest.mark.parametrize(("happens", "step"), [(ask_all_to_stop, "5"), (fail, "6")])
def test_a_run_that_goes_on_sends_the_rows_that_wandb_lacks_and_no_other(
    happens, step, run, recipe, tmp_path, to_server
):
    with serving(WandbServer(KEY)) as server:
        to_server(server.url)
        done = fit_apart(recipe, tmp_path, happens, step)
        assert done.returncode == (1 if happens is fail else 75), done.stderr
        assert fit(recipe, tmp_path, "a", "--wandb", "online") == 0
    assert steps_of(server, tmp_path / "a") == expected_steps(tmp_path / "a") == expected_steps(run)


def test_a_copy_of_a_run_folder_is_a_wandb_run_of_its_own(tmp_path):
    (tmp_path / "a").mkdir()
    before = run_id(tmp_path / "a")
    for copy in ("b", "elsewhere/a"):
        shutil.copytree(tmp_path / "a", tmp_path / copy)
    assert run_id(tmp_path / "b") == run_id(tmp_path / "b") != before
    assert run_id(tmp_path / "elsewhere/a") == run_id(tmp_path / "a") == before
    (tmp_path / "a" / "wandb_id").write_text("0123abcd")  # of an older version
    assert run_id(tmp_path / "a") == "0123abcd"


@pytest.mark.parametrize(("size", "is_kept"), [(7, False), (8, True)])
def test_what_a_killed_start_has_left_empty_does_not_keep_wandb_sync_from_the_rest(size, is_kept, tmp_path):
    left = tmp_path / "a" / "wandb" / "offline-run-20250101_000000-0123abcd" / "run-0123abcd.wandb"
    left.parent.mkdir(parents=True)
    left.write_bytes(b":W&B\xe1\xbe\x00\x00"[:size])
    with finished():
        tracker(tmp_path / "a", "offline", 1)
    assert left.exists() == is_kept
    assert len(list((tmp_path / "a" / "wandb").glob("offline-run-*"))) == 1 + is_kept


def test_a_run_that_begins_anew_is_another_wandb_run_and_one_that_goes_on_is_not(recipe, tmp_path):
    """Which a run that ended before its first checkpoint does, with other settings perhaps."""
    ids = []
    for steps in ("2", "8"):
        outage = ["--trainer.callbacks", f"{__name__}.Outage", "--trainer.callbacks.step", steps]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Outage, "happens", staticmethod(fail))
            fit(recipe, tmp_path, "a", "--wandb", "offline", "--trainer.max_steps", "8", *outage)
        ids.append(tracked_as(tmp_path / "a"))
    assert fit(recipe, tmp_path, "a", "--wandb", "offline", "--trainer.max_steps", "9") == 0
    ids.append(tracked_as(tmp_path / "a"))
    assert ids[0] != ids[1] == ids[2]


def test_a_run_that_was_made_longer_keeps_its_new_export_and_the_one_before(recipe, tmp_path, monkeypatch, capsys):
    kept = []
    monkeypatch.setattr("condenser.training.tracking.keep_files", lambda logger, kind, files, about: kept.append(files))
    for steps in ("4", "8"):
        assert fit(recipe, tmp_path, "a", "--trainer.max_steps", steps) == 0
        for _ in range(2):
            keep_export(None, tmp_path / "a")
    about = [json.loads((tmp_path / "a" / name / "condenser.json").read_text()) for name in ("export-step=4", "export")]
    assert [each["source"]["step"] for each in about] == [4, 8]
    assert len(kept) == 4
    assert "gets no export" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WANDB_MODE", "offline", "--wandb online: the environment has WANDB_MODE=offline: unset it"),
        ("WANDB_PROJECT", "a/b", "--wandb online: Invalid project name 'a/b'"),
        ("WANDB_INIT_TIMEOUT", "soon", "--wandb online: 1 validation error for Settings init_timeout"),
    ],
)
def test_what_the_environment_asks_of_wandb_in_vain_is_said_in_one_line(
    name, value, said, recipe, tmp_path, to_server, monkeypatch, capsys
):
    with serving(WandbServer(KEY)) as server:
        to_server(server.url)
        monkeypatch.setenv(name, value)
        assert fit(recipe, tmp_path, "a", "--wandb", "online") == 1
    errors = capsys.readouterr().err
    assert said in errors
    assert "cannot be reached" not in errors
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_training_goes_on_when_the_process_that_sends_is_killed(run, recipe, tmp_path, to_server):
    with serving(WandbServer(KEY)) as server:
        to_server(server.url)
        done = fit_apart(recipe, tmp_path, kill_the_sender, "3")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B no longer takes metrics") == 1
    assert_same_weights(tmp_path / "a", run)


@pytest.mark.parametrize(
    ("key", "sender", "said"),
    [("0" * 40, "", "user is not logged in"), (KEY, "3-1-tcp-localhost-9", "W&B cannot be reached")],
)
def test_a_key_that_is_no_longer_valid_or_a_sender_that_is_gone_does_not_stop_a_run(
    key, sender, said, recipe, tmp_path, to_server, monkeypatch, capfd
):
    with serving(WandbServer(KEY)) as server:
        to_server(server.url, key)
        monkeypatch.setenv("WANDB_SERVICE", sender)
        assert fit(recipe, tmp_path, "a", "--wandb", "online") == 0
    assert said in capfd.readouterr().err
    assert list((tmp_path / "a" / "wandb").glob("offline-run-*"))


def test_a_missing_key_is_refused(recipe, tmp_path, to_server, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    with serving(WandbServer(KEY)) as server:
        to_server(server.url)
        monkeypatch.delenv("WANDB_API_KEY")
        assert "run `wandb login`, or take offline" in error_of(capsys, fit(recipe, tmp_path, "a", "--wandb", "online"))
        to_server(server.url, "short")
        assert fit(recipe, tmp_path, "a", "--wandb", "online") == 1
        assert "--wandb online: WANDB_API_KEY invalid: API key must have 40+ characters" in capsys.readouterr().err
    assert not server.runs


@pytest.mark.slow
def test_no_secret_is_found_in_the_run_folder(recipe, tmp_path, to_server, monkeypatch):
    """Of the environment, of the remote repository's address, of a netrc."""
    secrets = {"HF_TOKEN": "hf_1111planted", "AWS_SECRET_ACCESS_KEY": "2222planted", "GITHUB_TOKEN": "ghp_3333planted"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text("machine example.org login me password 4444planted\n")
    (tmp_path / "repository").mkdir()
    for arguments in (["init", "-q"], ["remote", "add", "origin", "https://me:5555planted@example.org/a.git"]):
        subprocess.run(["git", *arguments], check=True, cwd=tmp_path / "repository")
    monkeypatch.chdir(tmp_path / "repository")
    with serving(WandbServer(KEY)) as server:
        to_server(server.url)
        options = ["--wandb_artifacts", "true", "--trace_steps", "2"]
        assert fit(recipe, tmp_path, "a", "--wandb", "online", *options) == 0
        assert fit(recipe, tmp_path, "b", "--wandb", "offline") == 0
    where = ["--config", str(recipe), "--runs_dir", str(tmp_path), "--name", "c"]
    assert main(["launch", *where, "--gpus", "0", "--dry-run"]) == 0
    files = [path for name in "abc" for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert len(files) > 30
    for path in files:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        found = [secret for secret in (KEY, "planted") if secret.encode() in content]
        assert not found, path
