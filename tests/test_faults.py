"""Runs that something befalls: a short form of `make test-faults`."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parent / "faults" / "campaign.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_runs_that_are_hit_at_random_moments_end_as_undisturbed_ones_do(tmp_path):
    seed = random.randrange(10**6)
    command = [sys.executable, str(CAMPAIGN), "--n", "10", "--seed", str(seed), "--folder", str(tmp_path / "runs")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(CAMPAIGN.parents[1])}, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()[-5000:] + done.stderr.decode()[-3000:]
    assert f"0 of 10 did not survive (seed {seed})" in done.stdout.decode()
