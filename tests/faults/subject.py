"""A short run on two processes, which can be started, watched, waited for and started again."""

import contextlib
import ctypes
import faulthandler
import os
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil
import test_devices
import yaml
from conftest import tiny_recipe
from test_devices import start_ranks
from test_resume import entries

from condenser.cluster import signals

N_STEPS, EVERY = 40, 4  # a checkpoint is saved every so many
TIMEOUT = 15  # seconds after which processes give each other up
LIMIT = 120  # seconds in which all has to have ended
END_WITH_PARENT = 1  # PR_SET_PDEATHSIG
WHERE = signal.SIGUSR2  # a process that hangs writes down where


def be_a_rank(*arguments):
    """One process of a run, in a session by which what it leaves behind is found; it ends with the campaign."""
    os.setsid()
    ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)
    faulthandler.register(WHERE)
    test_devices.be_a_rank(*arguments)


@dataclass
class Attempt:
    """One start of a run."""

    ranks: list
    log: Path
    began: float = field(default_factory=time.monotonic)

    def running(self):
        return [process for process in self.ranks if process.exitcode is None]

    def workers(self):
        found = []
        for process in self.running():
            with contextlib.suppress(psutil.Error):
                found += psutil.Process(process.pid).children()
        return found

    def left(self):
        """Processes of its sessions, ended ones that nobody has asked about aside."""
        sessions, found = {process.pid for process in self.ranks}, []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found

    def wait(self, seconds=LIMIT):
        """Whether all ended by themselves, loader workers included."""
        deadline = time.monotonic() + seconds
        while self.running() or self.left():
            if time.monotonic() > deadline:
                for process in self.running():
                    os.kill(process.pid, WHERE)
                time.sleep(1)
                self.kill()
                return False
            time.sleep(0.05)
        return True

    def kill(self):
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def codes(self):
        return [process.exitcode for process in self.ranks]

    def said(self):
        """What a user would look at: the error in a line, else the last line of a process that was not killed."""
        paths = [Path(f"{self.log}-{rank}") for rank in range(len(self.ranks))]
        logs = [path.read_text(errors="replace") if path.is_file() else "" for path in paths]  # killed before it wrote
        errors = [line for log in logs for line in log.splitlines() if line.startswith("condenser fit: error: ")]
        if errors:
            return errors[0]
        if any(code == signals.STOPPED for code in self.codes()):
            return next((line for log in logs for line in log.splitlines() if "was asked to stop" in line), "")
        alive = [log.strip().splitlines() for log, code in zip(logs, self.codes(), strict=True) if code and code > 0]
        return next((lines[-1] for lines in alive if lines), "")

    def in_one_line(self):
        return self.said().startswith("condenser fit: error: ")


class Subject:
    """A run on a small disk of its own, and a store of its own."""

    def __init__(self, folder, store, name):
        self.folder, self.name = folder / name, name
        self.disk, self.store = self.folder / "disk", self.folder / "store"
        self.disk.mkdir(parents=True)
        shutil.copytree(store, self.store)
        mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(self.disk)]
        self.mounted = subprocess.run(mount, capture_output=True).returncode == 0
        self.run, self.attempts = self.disk / name, []
        self.recipe = self.folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(self.settings()))

    def settings(self):
        diary = {"class_path": "test_resume.Diary", "init_args": {"file": str(self.folder / "read")}}
        ddp = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"timeout": f"0:00:{TIMEOUT}"}}
        settings = tiny_recipe(self.store)
        settings["data"] |= {"batch_size": 64, "num_workers": 2}
        settings["checkpoint"] |= {"every_n_steps": EVERY}
        settings["trainer"] |= {"devices": 2, "strategy": ddp, "callbacks": [diary]}
        settings["trainer"] |= {"max_steps": N_STEPS, "val_check_interval": 6}
        return settings

    def start(self):
        log = self.folder / f"log-{len(self.attempts)}"
        arguments = ["--config", self.recipe, "--runs_dir", self.disk, "--name", self.name]
        ranks = start_ranks(2, [arguments], log, {"CONDENSER_TRACEBACK": ""}, be_a_rank)
        self.attempts.append(Attempt(ranks, log))
        return self.attempts[-1]

    def finished(self):
        return (self.run / "summary.json").is_file()

    def begun(self):
        """The steps that each attempt has begun."""
        found = defaultdict(list)
        for entry in entries(self.folder / "read-0"):
            found[entry["attempt"]].append(entry["step"])
        return list(found.values())

    def newest_step(self):
        return max((step for attempt in self.begun() for step in attempt), default=-1)

    def lost(self):
        """How many steps a start did again, at most."""
        return max((before[-1] + 1 - after[0] for before, after in pairwise(self.begun())), default=0)

    def close(self, keep=None):
        """End and remove all of it; what was seen of the run goes to the folder ``keep``."""
        for attempt in self.attempts:
            attempt.kill()
        if keep is not None:
            shutil.copytree(self.folder, keep / self.name, dirs_exist_ok=True)
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.disk)], check=False, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)
