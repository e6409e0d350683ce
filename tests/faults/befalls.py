"""What may befall a run, and how it is put right where it stays."""

import contextlib
import os
import resource
import signal
import subprocess
import time

from subject import TIMEOUT


class Fault:
    """Something that befalls a run; what stays after it has to be put right by ``mend``."""

    signals_first = False  # the run is asked to stop, and has the time to
    stays = False
    needs_mount = False

    def __init__(self, subject, rng):
        self.subject, self.rng = subject, rng

    def strike(self, attempt):
        raise NotImplementedError

    def mend(self):
        pass


class KillRank(Fault):
    def strike(self, attempt):
        self.rng.choice(attempt.ranks).kill()


class KillAll(Fault):
    def strike(self, attempt):
        for process in attempt.ranks:
            process.kill()


class KillWorker(Fault):
    def strike(self, attempt):
        while not (workers := attempt.workers()) and attempt.running():
            time.sleep(0.01)
        if not workers:
            return False
        self.rng.choice(workers).kill()


class Asked(Fault):
    signals_first = True
    number: int

    def strike(self, attempt):
        for process in self.rng.choice([attempt.ranks, attempt.ranks[:1], attempt.ranks[1:]]):
            os.kill(process.pid, self.number)


class SIGTERM(Asked):
    number = signal.SIGTERM


class SIGUSR1(Asked):
    number = signal.SIGUSR1


class SIGSTOP(Fault):
    """A process that does not answer for longer than the others wait, and then goes on."""

    def strike(self, attempt):
        process = self.rng.choice(attempt.ranks)
        os.kill(process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + TIMEOUT + 10
        while len(attempt.running()) == 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGCONT)


class FullDisk(Fault):
    stays = needs_mount = True

    def strike(self, attempt):
        with open(self.subject.disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))

    def mend(self):
        (self.subject.disk / "filler").unlink()


class FileLimit(Fault):
    """Files cannot grow beyond a size: what is left of a checkpoint looks as it would on a full disk."""

    def strike(self, attempt):
        for process in attempt.ranks:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


class ReadOnly(Fault):
    stays = needs_mount = True

    def remount(self, how):
        deadline = time.monotonic() + 10
        command = ["mount", "-o", f"remount,{how}", str(self.subject.disk)]
        while (done := subprocess.run(command, capture_output=True)).returncode and time.monotonic() < deadline:
            time.sleep(0.001)  # while a file is open for writing
        return done.returncode == 0

    def strike(self, attempt):
        return self.remount("ro")

    def mend(self):
        assert self.remount("rw")


class StoreGone(Fault):
    stays = True

    def strike(self, attempt):
        files = [path for path in self.subject.store.rglob("*") if path.is_file()]
        self.path = self.rng.choice([self.subject.store, *files])
        self.path.rename(self.subject.folder / "gone")

    def mend(self):
        (self.subject.folder / "gone").rename(self.path)


FAULTS = {
    kind.__name__: kind
    for kind in (KillRank, KillAll, KillWorker, SIGTERM, SIGUSR1, SIGSTOP, FullDisk, FileLimit, ReadOnly, StoreGone)
}
