"""What the user sees when another process, or a loader worker, fails: one line, and an end that waits for nobody."""

import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

AGAIN = "Look at what it said last; the same command goes on from the newest checkpoint"
LESS_MEMORY = "Lower data.tokens_per_pass, or set model.gradient_checkpointing; `condenser estimate` says what fits"
LOST = ("Connection closed", "Connection reset", "connection reset", "timed out", "Timed out", "Broken pipe")


@contextmanager
def explained() -> Iterator[None]:
    """Raises errors of communication as ConnectionError; after any error no loader worker is left.

    A worker passes SIGTERM over, as it ends with the process that started it; one that was not told to end, because the
    error came in between, would be waited for without end when this process exits.
    """
    others = set(active_children())
    try:
        yield
    except BaseException as error:
        end(set(active_children()) - others)
        if isinstance(error, MisconfigurationException) or said_by_lightning(error):
            raise ValueError(one_line(error)) from error  # type: ignore[arg-type]
        if isinstance(error, torch.OutOfMemoryError):
            raise ValueError(f"{one_line(error)}. {LESS_MEMORY}") from error
        message = explanation(error) if isinstance(error, RuntimeError) else None
        if message is None:
            raise
        raise ConnectionError(message) from error


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Whatever Lightning or torch say of settings becomes a ValueError."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


def said_by_lightning(error: BaseException) -> bool:
    """Whether Lightning itself raised a RuntimeError, which it does for settings too, or put its words into torch's."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    by_lightning = frame.f_globals.get("__name__", "").startswith("lightning.") or "LightningModule" in str(error)
    return type(error) is RuntimeError and by_lightning


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def end(workers: set) -> None:
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise an error for each
    for worker in workers:
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, handler)


def explanation(error: RuntimeError) -> str | None:
    text = one_line(error)
    if "DataLoader worker" in text:
        return f"a process that loads data has ended ({text.removesuffix('.')}). {AGAIN}"
    if "DataLoader timed out" in text:
        return f"the processes that load data give nothing any more ({text}): is the disk there? {AGAIN}"
    if any(word in text for word in LOST):
        text = text.split("] ", 1)[-1].split(". This is")[0]
        return f"another process of this run has ended, or does not answer ({text}). {AGAIN}"
    return None
