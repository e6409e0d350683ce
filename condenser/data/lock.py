"""One process at work in a folder: it holds a lock there, which the system takes from it when it dies."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def locked(path: Path, busy: str, shared: bool = False) -> Iterator[None]:
    """Holds the lock ``path``, alone or ``shared`` with others, whom nobody names. The file says who does; one that was
    killed has left its name there. Raises ValueError, which says ``busy`` of "{holder}", where another process, here or
    on another host with the same disk, holds it."""
    with opened(path, busy, fcntl.LOCK_SH if shared else fcntl.LOCK_EX) as file:
        if shared:
            yield
            return
        file.seek(0)
        if holder := file.read().strip():
            print(f"{path} was left by {holder}, which has ended without a word: taking over")
        try:
            with suppress(OSError):  # on a full disk the lock holds without a name
                file.truncate(0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            path.unlink(missing_ok=True)


def opened(path: Path, busy: str, kind: int) -> Any:
    """The file, once it is locked and still the one of this name: its last holder may just have removed it."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        os.register_at_fork(after_in_child=file.close)  # workers would hold it after their parent's death
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the second where it is another host's
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(busy.replace("{holder}", holder)) from None
        except OSError as error:  # a file system without locks
            print(f"{path} cannot be locked ({error.strerror}): see to it that nothing else is at work there")
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()
