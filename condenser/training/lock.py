"""One process trains a run: the first rank holds a lock on its folder, which the system takes from it when it dies."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = "lock"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds the lock of a run folder. The file says who does; one that was killed has left its name there.

    Raises:
        ValueError: another process, here or on another host with the same disk, trains this run.
    """
    path = run / LOCK
    with opened(path) as file:
        file.seek(0)
        if holder := file.read().strip():
            print(f"{run} was left by {holder}, which has ended without a word: taking over")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def opened(path: Path) -> Any:
    """The file, once it is locked and still the one of this name: its last holder may just have removed it."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        os.register_at_fork(after_in_child=file.close)  # loader workers would hold it after their parent's death
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the second where it is another host's
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"{path.parent} is being trained by {holder}: wait for its end, stop it, or give another --name"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"{path} cannot be locked ({error.strerror}): see to it that {path.parent} is not started twice")
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()
