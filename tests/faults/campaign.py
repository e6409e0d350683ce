"""Hits short runs at random moments, and looks whether what comes out of them is what an undisturbed run gives.

Two processes train a tiny model. Something befalls them: one is killed, stopped, its disk is full, its store is gone.
When all have ended, what still stands in the way is shown to the run once more, so that it says what it is, then put
right; and the run is started until it is done. It survives if weights, optimizer, counters and metrics are then those
of the undisturbed run, bit for bit; nothing waited for more than two minutes; no process is left; no more steps are
done again than lie between two checkpoints, and none where a signal had asked the run to stop.

    make test-faults N=20 SEED=0
    PYTHONPATH=tests python tests/faults/campaign.py --n 5 --faults SIGSTOP KillWorker --folder runs/faults

Its disks are mounted where only its own processes see them, and these end when it does, kill -9 included.
"""

import argparse
import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from befalls import FAULTS
from conftest import make_documents, write_jsonl
from subject import EVERY, N_STEPS, Subject
from test_resume import assert_same_state
from test_training import metrics_of

from condenser.cli import main
from condenser.cluster import signals

KILLED = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGUSR1}
CODES = {0, 1, signals.LOST, signals.STOPPED} | KILLED  # of processes that ended as they may


class Moment(NamedTuple):
    step: int  # that has begun
    seconds: float  # since

    def __str__(self):
        return f"{self.seconds:.2f} s after {'the start' if self.step < 0 else f'step {self.step} began'}"


@dataclass
class Outcome:
    fault: str
    seed: int
    moment: Moment
    struck: bool = False
    wrong: list[str] = field(default_factory=list)
    lost: int = 0
    seconds: float = 0.0
    said: str = ""


def differences(run, whole):
    """What of a finished run is not as in the undisturbed one."""
    wrong = []
    try:
        assert_same_state(whole, run)
    except AssertionError as error:
        wrong.append(str(error))
    rows, expected = metrics_of(run), metrics_of(whole)
    if rows != expected:
        steps = [[(row["step"], bool(row["train/loss"])) for row in each] for each in (rows, expected)]
        wrong.append(f"metrics differ: {sorted(set(steps[0]) ^ set(steps[1])) or 'in values or order'}")
    names, expected = [{path.name for path in (each / "checkpoints").iterdir()} for each in (run, whole)]
    others = {name for name in names - expected if not name.startswith("last")}  # the last but one is where it stopped
    if others or len(names) != len(expected) or f"last-step={N_STEPS}.ckpt" not in names:
        wrong.append(f"checkpoints differ: {sorted(names)}")
    return wrong


def hit(folder, kept, store, whole, kind, seed, to_first_step):
    """One run that a fault befalls at a random moment."""
    rng = random.Random(seed)
    early = rng.random() < 0.2  # before the first step
    moment = Moment(-1, rng.uniform(0, to_first_step)) if early else Moment(rng.randrange(N_STEPS), rng.uniform(0, 0.1))
    outcome = Outcome(kind.__name__, seed, moment)
    subject = Subject(folder, store, f"{kind.__name__}-{seed}")
    try:
        fault = kind(subject, rng)
        if kind.needs_mount and not subject.mounted:
            return outcome
        befall(subject, fault, outcome)
        for _ in range(3):
            if subject.finished() or outcome.wrong:
                break
            attempt = subject.start()
            if not attempt.wait():
                outcome.wrong.append("started again, it hung")
        if not outcome.wrong and not subject.finished():
            outcome.wrong.append(f"not done after three starts: {attempt.said()}")
        if not outcome.wrong:
            outcome.wrong += differences(subject.run, whole)
        outcome.lost = subject.lost()
        # a checkpoint is saved as the next step begins, which is counted here though it is not taken
        if outcome.lost > (0 if kind.signals_first else EVERY + 1):
            outcome.wrong.append(f"{outcome.lost} steps done again")
        return outcome
    finally:
        subject.close(keep=kept if outcome.wrong else None)


def befall(subject, fault, outcome):
    attempt = subject.start()
    while subject.newest_step() < outcome.moment.step and len(attempt.running()) == len(attempt.ranks):
        time.sleep(0.005)
    time.sleep(outcome.moment.seconds)
    struck = time.monotonic()
    if len(attempt.running()) == len(attempt.ranks):
        outcome.struck = fault.strike(attempt) is not False
    if not attempt.wait():
        outcome.wrong.append(f"hung: {attempt.said()}")
    outcome.seconds, outcome.said = time.monotonic() - struck, attempt.said()
    if not outcome.struck:
        return
    if not CODES.issuperset(attempt.codes()):
        outcome.wrong.append(f"ended with {attempt.codes()}: {attempt.said()}")
    if fault.stays and not subject.finished():
        if not attempt.in_one_line():
            outcome.wrong.append(f"no error in one line: {attempt.said()!r}")
        again = subject.start()
        if not again.wait() or not again.in_one_line():
            outcome.wrong.append(f"started before it was put right: {again.codes()} {again.said()!r}")
    if fault.stays:
        fault.mend()


def make_store(folder):
    corpus = write_jsonl(folder / "documents.jsonl", make_documents(400))
    options = ["--tokenizer", "train:200", "--max-length", "32", "--validation-fraction", "0.1", "--workers", "1"]
    assert main(["prepare", "--input", str(corpus), "--output", str(folder / "store"), *options]) == 0
    return folder / "store"


def campaign(kept, n, seed, kinds):
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        folder = Path(folder)
        store = make_store(folder)
        whole = Subject(folder, store, "whole")
        try:
            return against(whole, folder, kept, store, n, seed, kinds)
        finally:
            whole.close()


def against(whole, folder, kept, store, n, seed, kinds):
    whole.start().wait()  # the fork server has to import
    shutil.rmtree(whole.run)
    (whole.folder / "read-0").unlink()
    attempt = whole.start()
    while whole.newest_step() < 0 and attempt.running():
        time.sleep(0.01)
    to_first_step = time.monotonic() - attempt.began
    assert attempt.wait(), "the undisturbed run hung"
    assert attempt.codes() == [0, 0], attempt.said()
    seconds = time.monotonic() - attempt.began
    print(f"undisturbed: {N_STEPS} steps in {seconds:.1f} s, {to_first_step:.1f} before the first")
    outcomes = []
    for number in range(seed, seed + n):
        kind = FAULTS[kinds[number % len(kinds)]]
        outcome = hit(folder, kept, store, whole.run, kind, number, to_first_step)
        outcomes.append(outcome)
        state = "; ".join(outcome.wrong) or ("survived" if outcome.struck else "not struck")
        print(f"{outcome.fault} {number}, {outcome.moment}: {state}; {outcome.lost} steps again")
        print(f"  {outcome.seconds:.0f} s: {outcome.said}", flush=True)
    return outcomes


def table(outcomes):
    lines = ["| fault | times | survived | steps done again, most | seconds until all ended, most | what was said |"]
    lines.append("| --- " * 6 + "|")
    for name in FAULTS:
        struck = [outcome for outcome in outcomes if outcome.fault == name and outcome.struck]
        if struck:
            said = sorted({shortened(outcome.said) for outcome in struck if outcome.said})
            survived = sum(not outcome.wrong for outcome in struck)
            lost, seconds = max(o.lost for o in struck), max(o.seconds for o in struck)
            lines.append(f"| {name} | {len(struck)} | {survived} | {lost} | {seconds:.0f} | {'<br>'.join(said)} |")
    return "\n".join(lines)


def shortened(message, length=160):
    """Without what differs from run to run."""
    words = ["..." + word[word.rindex("/") :] if word.count("/") > 2 else word for word in message.split()]
    text = " ".join(words)
    return text if len(text) <= length else text[: length - 3] + "..."


def mount_for_itself():
    """What is mounted from here on is seen by this process and those that it starts, and goes with the last of them."""
    new_mounts = 0x00020000  # CLONE_NEWNS; os.unshare comes with Python 3.12
    if ctypes.CDLL(None).unshare(new_mounts) == 0:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/faults"), help="where runs that did not survive are kept"
    )
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    mount_for_itself()
    found = campaign(options.folder, options.n, options.seed, options.faults)
    print(table(found))
    failed = [outcome for outcome in found if outcome.wrong]
    where = f"; see {options.folder}" if failed else ""
    print(f"{len(failed)} of {len(found)} did not survive (seed {options.seed}){where}")
    sys.exit(bool(failed))
