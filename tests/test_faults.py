"""Runs that something befalls: a short form of `make test-faults`."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from lightning.pytorch.callbacks import Callback
from test_devices import write_recipe

from condenser.cluster import signals
from condenser.runs import checkpoints

CAMPAIGN = Path(__file__).parent / "faults" / "campaign.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CAMPAIGN.parents[1])}

pytestmark = pytest.mark.slow


@pytest.mark.timeout(1200)
def test_runs_that_are_hit_at_random_moments_end_as_undisturbed_ones_do(tmp_path):
    seed = random.randrange(10**6)
    command = [sys.executable, str(CAMPAIGN), "--n", "10", "--seed", str(seed), "--folder", str(tmp_path / "runs")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()[-5000:] + done.stderr.decode()[-3000:]
    assert f"0 of 10 did not survive (seed {seed})" in done.stdout.decode()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_campaign_that_is_interrupted_leaves_no_process_and_no_mount(number, tmp_path):
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(CAMPAIGN), "--folder", str(tmp_path / "runs")]
    campaign = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    started = []
    while len(started) < 4:  # the fork server, the resource tracker and two ranks
        assert campaign.poll() is None
        time.sleep(0.5)
        started = psutil.Process(campaign.pid).children(recursive=True)
    campaign.send_signal(number)
    assert campaign.wait(timeout=30) != 0
    _, left = psutil.wait_procs(started, timeout=60)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    if number != signal.SIGKILL:
        assert not list(tmp_path.glob("faults-*"))


class SlowToEnd(Callback):
    """The first process still has something to do when the others have ended."""

    def teardown(self, trainer, pl_module, stage):
        if trainer.is_global_zero:
            time.sleep(10)
            print("has done it", flush=True)


@pytest.mark.timeout(300)
def test_processes_that_lightning_started_end_without_cutting_the_first_one_short(recipe, tmp_path):
    """It looks after the others every five seconds, and kills all when one has failed."""
    changes = {"trainer__devices": 2, "trainer__strategy": "ddp", "trainer__max_steps": 100_000}
    callback = {"class_path": "test_faults.SlowToEnd"}
    path = write_recipe(recipe, tmp_path / "two.yaml", trainer__callbacks=[callback], **changes)
    command = [sys.executable, "-m", "condenser", "fit", "--config", path, "--runs_dir", tmp_path, "--name", "two"]
    run = subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    while not checkpoints(tmp_path / "two"):
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == signals.STOPPED
    assert "has done it" in said
    assert "was asked to stop, and did after step" in said
