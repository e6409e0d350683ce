"""Checkpoints: whole or not there, kept until later ones are, and a full disk that is told in a line."""

import os
import random
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import error_of, fit, flip_a_bit, slow
from lightning.pytorch.callbacks import Callback
from test_devices import DDP, start_ranks, write_recipe
from test_training import STOP, asked_to_stop, assert_same_weights, metrics_of

from condenser.cli import main
from condenser.corpus.shards import dataset_files
from condenser.data.store import read_manifest
from condenser.runs import checkpoints, is_intact, newest_valid_checkpoint, step_of
from condenser.training.checkpoints import WholeFiles

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@contextmanager
def small_disk(folder, size):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(disk, but):
    """Leave so many bytes free."""
    stat = os.statvfs(disk)
    with open(disk / "filler", "wb") as file:
        file.write(bytes(stat.f_bavail * stat.f_frsize - but))


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "last-step=1.ckpt"
    content = {"state_dict": {"a": torch.arange(40.0), "b": torch.ones(3, 5)}, "global_step": 1, "text": "x" * 50}
    WholeFiles().save_checkpoint(content, path)
    return path, content


def test_a_changed_byte_anywhere_in_a_file_is_found_or_changes_nothing(small_file, tmp_path):
    path, content = small_file
    original, found = path.read_bytes(), 0
    changed, rng = tmp_path / "changed.ckpt", random.Random(0)
    for position in range(len(original)):
        data = bytearray(original)
        data[position] ^= rng.choice([255, 1 << rng.randrange(8)])
        changed.write_bytes(data)
        if is_intact(changed):
            loaded = torch.load(changed, weights_only=True)
            assert all(torch.equal(loaded["state_dict"][key], value) for key, value in content["state_dict"].items())
            assert {**loaded, "state_dict": None} == {**content, "state_dict": None}, position
        else:
            found += 1
    assert found > 0.95 * len(original)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.99])
def test_a_file_that_was_cut_is_found(share, small_file, tmp_path):
    path, _ = small_file
    content = path.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: int(share * len(content))])
    assert not is_intact(tmp_path / "cut.ckpt")


def test_a_file_without_the_checksum_is_looked_at_as_an_archive(small_file, tmp_path):
    _, content = small_file
    torch.save(content, tmp_path / "old.ckpt")
    assert is_intact(tmp_path / "old.ckpt")
    flip_a_bit(tmp_path / "old.ckpt")
    assert not is_intact(tmp_path / "old.ckpt")


def test_the_newest_two_and_every_so_manieth_are_kept(recipe, tmp_path):
    options = ["--checkpoint.every_n_steps", "1", "--checkpoint.keep_every_n_steps", "3"]
    assert fit(recipe, tmp_path, "kept", *options) == 0
    assert names(tmp_path / "kept") == ["best-step=8.ckpt", *(f"last-step={step}.ckpt" for step in (3, 6, 7, 8))]
    assert fit(recipe, tmp_path, "one", "--checkpoint.every_n_steps", "1", "--checkpoint.keep_last", "1") == 0
    assert names(tmp_path / "one") == ["best-step=8.ckpt", "last-step=8.ckpt"]


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(run, recipe, tmp_path, capsys):
    """And what a killed process was writing, and the damaged file, are gone in the end."""
    folder = tmp_path / "hurt" / "checkpoints"
    assert fit(recipe, tmp_path, "hurt", *STOP, "7") == 0
    assert names(tmp_path / "hurt") == ["best-step=4.ckpt", "last-step=6.ckpt", "last-step=7.ckpt"]
    flip_a_bit(folder / "last-step=7.ckpt", 1 / 3)
    (folder / "last-step=9.ckpt.0123abcd.partial").write_bytes(b"half")
    capsys.readouterr()
    assert fit(recipe, tmp_path, "hurt") == 0
    printed = capsys.readouterr().out
    assert printed.count("last-step=7.ckpt is damaged and is passed over") == 1
    assert "goes on from " + str(folder / "last-step=6.ckpt") in printed
    assert names(tmp_path / "hurt") == names(run)
    assert_same_weights(tmp_path / "hurt", run)
    steps = [row["step"] for row in metrics_of(tmp_path / "hurt") if row["train/loss"]]
    assert steps == [row["step"] for row in metrics_of(run) if row["train/loss"]]


class DiesAt(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("died")


@pytest.mark.parametrize("every", ["step", slow("epoch")])
def test_a_validation_that_is_due_when_a_run_is_asked_to_stop_is_done_when_it_goes_on(every, recipe, tmp_path):
    options = ["--trainer.max_steps", "14", "--checkpoint.every_n_steps", "4", "--data.batch_size", "64"]
    if every == "epoch":  # of 4 steps
        options[-1] = "248"
        options += ["--trainer.val_check_interval", "1.0", "--trainer.check_val_every_n_epoch", "1"]
    assert fit(recipe, tmp_path, "whole", *options) == 0
    for step in (4, 12):
        assert fit(recipe, tmp_path, "asked", *options, *asked_to_stop(step - 2)) == 75
        assert step_of(checkpoints(tmp_path / "asked")[0]) == step
        assert not metrics_of(tmp_path / "asked")[-1].get("val/loss")
        for death in (step, step + 1, step + 5)[: 14 - step]:
            dies = ["--trainer.callbacks", f"{__name__}.DiesAt", "--trainer.callbacks.step", str(death)]
            with pytest.raises(RuntimeError, match="died"):
                fit(recipe, tmp_path, "asked", *options, *dies)
    assert fit(recipe, tmp_path, "asked", *options) == 0
    assert names(tmp_path / "asked") == names(tmp_path / "whole")
    assert_same_weights(tmp_path / "asked", tmp_path / "whole")
    assert metrics_of(tmp_path / "asked") == metrics_of(tmp_path / "whole")


@pytest.mark.parametrize("end", [["--trainer.max_epochs", "2", "--trainer.max_steps", "-1"], []])
def test_a_run_that_is_asked_to_stop_at_its_last_step_is_finished(end, recipe, tmp_path):
    options = ["--data.batch_size", "248", "--trainer.val_check_interval", "4" if end else "3", *end]
    assert fit(recipe, tmp_path, "whole", *options) == 0
    assert fit(recipe, tmp_path, "asked", *options, *asked_to_stop(6)) == 0
    assert names(tmp_path / "asked") == names(tmp_path / "whole")
    assert metrics_of(tmp_path / "asked") == metrics_of(tmp_path / "whole")


def test_a_finished_run_whose_end_is_damaged_is_finished_again(run, recipe, tmp_path):
    shutil.copytree(run, tmp_path / "again")
    for path in (tmp_path / "again" / "checkpoints").glob("*step=8.ckpt"):
        path.write_bytes(path.read_bytes()[:1000])
    assert fit(recipe, tmp_path, "again") == 0
    assert names(tmp_path / "again") == names(run)
    assert_same_weights(tmp_path / "again", run)


@pytest.mark.parametrize("what", ["removed", "damaged"])
def test_a_finished_run_without_a_whole_checkpoint_is_not_begun_anew(what, run, recipe, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "done")
    for path in (tmp_path / "done/checkpoints").iterdir():
        path.unlink() if what == "removed" else path.write_bytes(path.read_bytes()[:1000])
    before = {path: path.read_bytes() for path in (tmp_path / "done").rglob("*") if path.is_file()}
    assert fit(recipe, tmp_path, "done", "--model.optimizer.learning_rate", "3e-4") == 1
    assert "has ended (summary.json), and none of its checkpoints is there and whole" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "done").rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_not_taken_for_a_run(recipe, tmp_path, capsys):
    (tmp_path / "app").mkdir()
    (tmp_path / "app/config.yaml").write_text("port: 80\n")
    assert "has a config.yaml and is no run of ours" in error_of(capsys, fit(recipe, tmp_path, "app"))
    assert [path.name for path in (tmp_path / "app").iterdir()] == ["config.yaml"]


def test_a_run_goes_on_beside_what_an_export_and_its_user_left_in_its_folder(run, recipe, tmp_path):
    assert fit(recipe, tmp_path, "r", *STOP, "3") == 0
    (tmp_path / "r/export.partial").mkdir()
    (tmp_path / "r/export.0123abcd.partial").mkdir()
    (tmp_path / "r/notes.partial").write_text("mine")
    (tmp_path / "r/config.yaml.0123abcd.partial").write_text("cut sho")
    assert fit(recipe, tmp_path, "r") == 0
    assert_same_weights(tmp_path / "r", run)
    assert (tmp_path / "r/notes.partial").is_file()
    assert not (tmp_path / "r/config.yaml.0123abcd.partial").exists()


def test_the_time_that_saving_takes_is_logged(run):
    rows = {row["step"]: row["perf/checkpoint_seconds"] for row in metrics_of(run, skip=()) if row["train/loss"]}
    assert {step for step, seconds in rows.items() if seconds} == {"3", "5", "7"}
    assert all(0 < float(seconds) < 5 for seconds in rows.values() if seconds)


@NEEDS_ROOT
@pytest.mark.parametrize("options", [[], ["--layout", "authors"]])
@pytest.mark.parametrize("free", [0, 200_000, 300_000, 420_000])
def test_an_export_to_a_full_disk_is_one_line_that_names_its_folder_and_leaves_nothing(
    free, options, run, tmp_path, capsys
):
    with small_disk(tmp_path / "disk", "5m") as disk:
        fill(disk, but=free)
        if main(["export", str(run), "--output", str(disk / "e"), *options]):
            error_of(capsys, 1, disk, "No space left on device")
            assert [path.name for path in disk.iterdir()] == ["filler"]
        else:
            assert (free, options) in ((300_000, []), (420_000, []))


@NEEDS_ROOT
@pytest.mark.parametrize(("free", "file"), [(0, "dataset_info.json"), (4096, "state.json")])
def test_what_describes_a_split_is_named_where_a_full_disk_keeps_it_out(free, file, store, tmp_path):
    shards = read_manifest(store)["splits"]["validation"]["shards"]
    with small_disk(tmp_path / "disk", "1m") as disk:
        shutil.copy(store / "validation" / shards[0]["file"], disk)
        fill(disk, but=free)
        with pytest.raises(OSError, match=f"{disk / file} cannot be written: No space left on device"):
            dataset_files(disk, shards)


@NEEDS_ROOT
def test_a_run_that_cannot_get_a_folder_says_why(recipe, tmp_path, capsys):
    with small_disk(tmp_path / "disk", "1m") as disk:
        fill(disk, but=0)
        error_of(capsys, fit(recipe, disk, "r"), disk / "r", "No space left on device")
        assert not (disk / "r").exists()


@NEEDS_ROOT
@pytest.mark.parametrize("then", ["stop", "continue"])
def test_a_disk_that_fills_up_keeps_what_is_there(then, run, recipe, tmp_path, capsys):
    with small_disk(tmp_path / "disk", "10m") as disk:
        assert fit(recipe, disk, "full", *STOP, "3") == 0
        fill(disk, but=30_000)
        before = names(disk / "full")
        assert fit(recipe, disk, "full", "--checkpoint.on_full_disk", then) == 1  # the end has to be saved
        errors = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
        first = errors[0].removeprefix("condenser fit: error: ")
        assert first.startswith(str(disk / "full/checkpoints/best-step=4.ckpt"))
        assert "No space left on device; it needs 0." in first
        assert len(errors) == (1 if then == "stop" else 4)
        assert names(disk / "full") == before
        assert is_intact(newest_valid_checkpoint(disk / "full"))
        (disk / "filler").unlink()
        assert fit(recipe, disk, "full") == 0
        assert_same_weights(disk / "full", run)
        rows = [[row for row in metrics_of(each) if row["train/loss"]] for each in (disk / "full", run)]
        assert rows[0] == rows[1]


@pytest.mark.slow
@NEEDS_ROOT
def test_a_full_disk_ends_all_processes_and_one_of_them_says_so(recipe, tmp_path):
    with small_disk(tmp_path / "disk", "10m") as disk:
        path = write_recipe(recipe, tmp_path / "two.yaml", trainer__devices=2, trainer__strategy=DDP)
        fill(disk, but=60_000)
        log = tmp_path / "log"
        ranks = start_ranks(2, [["--config", str(path), "--runs_dir", str(disk), "--name", "two"]], log)
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [1, 1]
        said = [Path(f"{log}-{rank}").read_text() for rank in range(2)]
        assert "last-step=3.ckpt cannot be written: No space left on device" in said[0]
        assert "cannot be written" not in said[1]
        assert "Connection closed" not in said[1]
        assert checkpoints(disk / "two") == []
