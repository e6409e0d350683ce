"""Signals that ask a run to end soon: noted at once, acted on at the end of a step.

SLURM sends SIGUSR1 some time before a job's limit, as configs/cluster/slurm.sh asks it to, and SIGTERM when it takes
the machines away. A handler that saved by itself could find the ranks in a collective operation and deadlock. Handlers
are set before the slow imports, during which a signal would otherwise end the process.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOP, REQUEUE = signal.SIGTERM, signal.SIGUSR1  # save and end; save, end and be started again
INTERRUPT = signal.SIGINT  # Ctrl-C: while training is under way save and end, a second time end at once
LOST = 74  # exit code of a process that lost another one, or a loader worker (EX_IOERR of sysexits.h)
STOPPED = 75  # exit code of a run that was asked to stop and can go on (EX_TEMPFAIL of sysexits.h)
AGAIN = 76  # the same in a SLURM job that is to be put back into the queue, which configs/cluster/slurm.sh does

received: set[int] = set()


def listen(*more: int) -> None:
    for number in (STOP, REQUEUE, *more):
        signal.signal(number, note)


def note(number: int, frame: Any) -> None:
    if number == INTERRUPT:
        if number in received:
            raise KeyboardInterrupt
        print("stopping after this step; interrupt again to stop at once", file=sys.stderr)
    received.add(number)


@contextmanager
def listening() -> Iterator[None]:
    """Note signals; afterwards they do what they did before."""
    received.clear()
    before = {number: signal.getsignal(number) for number in (STOP, REQUEUE, INTERRUPT)}
    listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
