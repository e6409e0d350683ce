"""Runs as jobs of a real SLURM: stopped, killed, put back, refused. Needs one: `make test-slurm` makes it."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from test_devices import write_recipe
from test_training import assert_same_weights, metrics_of

from condenser.cli import main
from condenser.runs import checkpoints, step_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

N_STEPS = 24
PUT_BACK = {"JobState": "PENDING", "ExitCode": "0:0", "Restarts": "1"}


def slurm(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", autouse=True)
def cluster():
    reached = shutil.which("sbatch") and subprocess.run(["scontrol", "ping"], capture_output=True, text=True).stdout
    if not reached or " UP" not in reached:
        pytest.skip("needs a SLURM: run `make test-slurm`, or set SLURM_CONF to the configuration of one")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("slurm") / "with a space"


class Job:
    """A run of two processes that `condenser launch` has made a job of."""

    def __init__(self, recipe, folder, name, *options, seconds=0.25, tasks=2):
        self.run, self.seen = folder / "runs" / name, folder / f"{name}-seen"
        folder.mkdir(exist_ok=True)
        watched = {"class_path": "slurm.watched.Watched", "init_args": {"folder": str(self.seen), "seconds": seconds}}
        settings = {"trainer__max_steps": N_STEPS, "trainer__val_check_interval": 10, "trainer__callbacks": [watched]}
        path = write_recipe(recipe, folder / f"{name}.yaml", **settings)
        setup = f"export PYTHONPATH={Path(__file__).parent} MASTER_ADDR=127.0.0.1"  # nodes here have no address
        arguments = ["--config", path, "--runs_dir", folder / "runs", "--name", name, "--gpus", 0, "--tasks", tasks]
        arguments += ["--cpus", 1, "--time", 10, "--setup", setup, *options]
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as said:
            assert main(["launch", *map(str, arguments)]) == 0
        self.number = re.search(r"^job (\d+)\.", said.getvalue(), re.MULTILINE)[1]

    def facts(self, number=None):
        lines = slurm("scontrol", "show", "job", number or self.number)
        return dict(re.findall(r"(JobState|ExitCode|Restarts)=(\S+)", lines))

    def log(self):
        return "\n".join(path.read_text() for path in sorted((self.run / "launch").glob("slurm-*.out")))

    def until(self, condition, seconds=120):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.facts()}\n{self.log()[-3000:]}"
            time.sleep(0.05)

    def outcome(self, number=None):
        """What is known of the job when it has ended or was put back."""
        found = {}

        def ended():
            found.update(self.facts(number))
            waits, new = found["JobState"] == "PENDING", found["Restarts"] == "0"
            return not (new if waits else found["JobState"] in ("RUNNING", "COMPLETING"))

        self.until(ended)
        return found

    def entries(self, rank=0):
        path = self.seen / str(rank)
        return [json.loads(line) for line in path.read_text().splitlines(True)] if path.exists() else []

    def until_step(self, step, start=0):
        self.until(lambda: any(e["start"] == start and e.get("began", -1) >= step for e in self.entries()))

    def steps(self, rank=0):
        return [entry["ended"] for entry in self.entries(rank) if "ended" in entry]

    def signal(self, name):
        slurm("scancel", f"--signal={name}", self.number)

    def release(self, number=None):
        """Start a job soon that was put back; SLURM would wait for two minutes, and start none in the same second."""
        time.sleep(2)
        with contextlib.suppress(subprocess.CalledProcessError):  # it has started by itself
            slurm("scontrol", "update", f"JobId={number or self.number}", "StartTime=now")
        self.until(lambda: self.facts(number)["JobState"] != "PENDING", 30)

    def finish(self):
        """Until it has ended, started again as often as it was put back."""
        while self.outcome()["JobState"] == "PENDING":
            self.release()
        return self.facts()


@pytest.fixture(scope="module")
def whole(recipe, folder):
    """The run that nothing happened to."""
    job = Job(recipe, folder, "whole", seconds=0)
    job.finish()
    return job


def assert_finished_like(job, whole):
    assert job.facts()["JobState"] == "COMPLETED", job.log()
    assert (job.run / "summary.json").is_file()
    assert_same_weights(job.run, whole.run)
    assert metrics_of(job.run) == metrics_of(whole.run)


def test_a_launched_job_trains_on_all_its_processes_with_the_snapshot_and_finishes(whole):
    assert whole.facts() == {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": "0"}
    assert json.loads((whole.run / "summary.json").read_text())["steps"] == N_STEPS
    for rank in range(2):
        assert whole.steps(rank) == list(range(N_STEPS))
        assert {entry["world_size"] for entry in whole.entries(rank)} == {2}
        assert {entry["code"] for entry in whole.entries(rank)} == {f"{whole.run}/launch/code/condenser/__init__.py"}
    assert len({whole.entries(rank)[0]["pid"] for rank in range(2)}) == 2


def test_a_job_that_is_told_that_its_time_is_up_saves_is_put_back_and_goes_on_at_its_next_step(whole, recipe, folder):
    job = Job(recipe, folder, "told", "--data.num_workers", "2")
    job.until_step(5)
    job.signal("USR1")
    assert job.outcome() == PUT_BACK
    assert step_of(checkpoints(job.run)[0]) == max(job.steps()) + 1 < N_STEPS
    assert not (job.run / "summary.json").exists()
    job.finish()
    assert "was asked to stop, and did after step" in job.log()
    assert job.steps(0) == job.steps(1) == list(range(N_STEPS))
    assert_finished_like(job, whole)


def test_a_second_job_of_a_run_is_refused_while_the_first_waits_or_runs(recipe, folder, capsys):
    job = Job(recipe, folder, "once", "--sbatch=--hold")
    arguments = ["--config", folder / "once.yaml", "--runs_dir", folder / "runs", "--name", "once", "--gpus", 0]
    assert main(["launch", *map(str, arguments), "--dry-run"]) == 1
    assert f"once is in the queue already, as job {job.number}: scancel it first" in capsys.readouterr().err
    slurm("scancel", job.number)
    assert main(["launch", *map(str, arguments), "--dry-run"]) == 0


def test_a_signal_while_the_processes_start_is_not_lost(whole, recipe, folder):
    job = Job(recipe, folder, "early")
    job.until(lambda: f"{job.number}.0" in slurm("squeue", "--steps", "--noheader"))
    job.signal("USR1")
    assert job.outcome() == PUT_BACK
    assert len(job.steps()) < 5
    job.finish()
    assert job.steps(0) == job.steps(1) == list(range(N_STEPS))
    assert_finished_like(job, whole)


@pytest.mark.timeout(600)
def test_a_time_limit_costs_no_step(whole, recipe, folder):
    """SLURM sends the signal up to a minute earlier than asked."""
    job = Job(recipe, folder, "limited", "--time", "2", "--notice", "25", seconds=5)
    assert int(job.finish()["Restarts"]) >= 1
    assert job.steps(0) == job.steps(1) == list(range(N_STEPS))
    assert_finished_like(job, whole)


def test_a_job_that_is_told_to_end_saves_and_is_not_put_back(whole, recipe, folder):
    job = Job(recipe, folder, "ended")
    job.until_step(5)
    job.signal("TERM")
    assert job.outcome() == {"JobState": "FAILED", "ExitCode": "75:0", "Restarts": "0"}
    assert step_of(checkpoints(job.run)[0]) == max(job.steps()) + 1 < N_STEPS
    again = Job(recipe, folder, "ended")
    again.finish()
    assert again.steps(0) == again.steps(1) == list(range(N_STEPS))
    assert_finished_like(again, whole)


def test_a_job_that_is_cancelled_saves_and_stays_cancelled(recipe, folder):
    job = Job(recipe, folder, "cancelled")
    job.until_step(5)
    slurm("scancel", job.number)
    assert job.outcome()["JobState"] == "CANCELLED"
    job.until(lambda: not slurm("squeue", "--noheader", "--jobs", job.number))
    assert step_of(checkpoints(job.run)[0]) == max(job.steps()) + 1 < N_STEPS
    time.sleep(2)
    assert job.facts()["JobState"] == "CANCELLED"


def test_when_a_process_is_killed_the_other_says_so_and_the_job_is_put_back(whole, recipe, folder):
    job = Job(recipe, folder, "killed")
    job.until_step(8)
    os.kill(job.entries(1)[-1]["pid"], signal.SIGKILL)
    killed = time.monotonic()
    assert job.outcome() == PUT_BACK
    assert time.monotonic() - killed < 60
    assert re.search("Connection (closed|reset) by peer", job.log())
    last = step_of(checkpoints(job.run)[0])
    assert 6 <= last < N_STEPS
    job.finish()
    steps = job.steps(1)
    assert steps[steps.index(last - 1) + 1 :][-(N_STEPS - last) :] == list(range(last, N_STEPS))
    assert sorted(set(steps)) == list(range(N_STEPS))
    assert_finished_like(job, whole)


class SecondNode:
    """The node n2 of the SLURM that tests/slurm/install.sh has started."""

    def __init__(self, folder):
        self.pid = folder / "slurmd-n2.pid"

    def kill(self, pid):
        """With the process ``pid`` on it, and without a word to anybody."""
        for number in (int(self.pid.read_text()), psutil.Process(pid).ppid(), pid):
            os.kill(number, signal.SIGKILL)

    def is_down(self):
        slurm("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")

    def comes_back(self):
        time.sleep(3)  # a job that is put back must not start in the second in which it has ended, see release()
        slurm("slurmd", "-c", "-N", "n2")
        deadline = time.monotonic() + 30
        while "idle" not in slurm("sinfo", "--noheader", "--nodes=n2", "--format=%T").split():
            assert time.monotonic() < deadline
            time.sleep(0.2)


@pytest.fixture
def second_node():
    node = SecondNode(Path(os.environ.get("SLURM_CONF", "/etc/slurm/slurm.conf")).parent)
    if not node.pid.exists():
        pytest.skip("needs the two nodes of tests/slurm/install.sh")
    return node


@pytest.mark.parametrize("first", ["slurm", "process"])
def test_a_job_that_loses_a_node_is_put_back_whoever_notices_first(first, whole, recipe, folder, second_node):
    job = Job(recipe, folder, f"lost-{first}", "--nodes", 2, "--srun=--wait=5", tasks=1)
    job.until_step(8)
    second_node.kill(job.entries(1)[-1]["pid"])
    if first == "process":
        job.until(lambda: "ended with code 74 and goes back into the queue" in job.log())
    second_node.is_down()
    assert job.outcome()["Restarts"] == "1"
    second_node.comes_back()
    job.finish()
    assert_finished_like(job, whole)


def test_when_one_process_cannot_begin_the_others_do_not_wait_for_it(recipe, folder):
    """And the job is put back, as the reason may be that node, but not for ever."""
    refusal = ["--trainer.callbacks+=slurm.watched.NotOnSecond", "--srun=--wait=5", "--retries=2"]
    job = Job(recipe, folder, "one-refused", *refusal)
    assert job.outcome()["Restarts"] == "1"
    assert "condenser fit: error: " in job.log()
    assert job.finish() == {"JobState": "FAILED", "ExitCode": "137:0", "Restarts": "1"}


def test_a_job_that_fit_refuses_is_not_put_back(recipe, folder):
    job = Job(recipe, folder, "refused", "--model.backbone", "./nowhere")
    assert job.outcome() == {"JobState": "FAILED", "ExitCode": "1:0", "Restarts": "0"}
    assert "condenser fit: error: " in job.log()
    assert "no such folder: ./nowhere" in job.log()


def test_a_task_of_an_array_is_put_back_alone(recipe, folder):
    job = Job(recipe, folder, "array", "--seeds", "1", "2", seconds=0.5, tasks=1)
    job.until_step(4)
    slurm("scancel", "--signal=USR1", f"{job.number}_1")
    assert job.outcome(f"{job.number}_1") == PUT_BACK
    assert job.outcome(f"{job.number}_0") == {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": "0"}
    job.release(f"{job.number}_1")
    assert job.outcome(f"{job.number}_1") == {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": "1"}
    for seed in (1, 2):
        assert (folder / f"runs/array-seed={seed}/summary.json").is_file()
