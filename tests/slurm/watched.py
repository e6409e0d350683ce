"""Callbacks for runs in SLURM jobs: slow steps, each noted by each rank as it begins and as it ends; a refusal."""

import json
import os
import time
from pathlib import Path

from lightning.pytorch.callbacks import Callback

import condenser


class Watched(Callback):
    """Args:
    folder: where to; a file for each rank.
    seconds: that each step lasts at least.
    """

    def __init__(self, folder: str, seconds: float):
        self.folder, self.seconds = Path(folder), seconds

    def note(self, trainer, **more):
        self.folder.mkdir(parents=True, exist_ok=True)
        start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        facts = {"start": start, "pid": os.getpid(), "code": condenser.__file__, "world_size": trainer.world_size}
        with open(self.folder / str(trainer.global_rank), "a") as file:
            file.write(json.dumps({**facts, **more}) + "\n")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.note(trainer, began=trainer.global_step)
        time.sleep(self.seconds)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note(trainer, ended=trainer.global_step - 1)


class NotOnSecond(Callback):
    """The second process of a job cannot begin."""

    def __init__(self):
        if os.environ.get("SLURM_PROCID") == "1":
            raise ValueError("cannot begin here")
