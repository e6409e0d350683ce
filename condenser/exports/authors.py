"""An export in the layout of the authors' code: ``pytorch_model.bin`` and, for the head, ``model.pt``.

Both are pickles of plain tensors, as that code expects; `CondenserForPreTraining` reads them without running anything.
"""

from pathlib import Path

import torch

from condenser.models.condenser import Condenser
from condenser.models.heads import AUTHORS_FILE, HEAD_FILE
from condenser.models.objective import Objective
from condenser.models.pretraining import CondenserForPreTraining


def write_authors_layout(folder: Path, model: Objective) -> None:
    """Turn an export into that layout, read it back, and compare.

    Raises:
        ValueError: a model without a Condenser head, which the layout is for, or one that reads back otherwise.
    """
    if not isinstance(model, Condenser) or not len(model.c_head):
        raise ValueError(f"--layout authors is for a Condenser with its head; this is a {type(model).__name__} without")
    state = {name: weight.clone() for name, weight in model.lm.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    torch.save({name: weight.clone() for name, weight in model.head_state().items()}, folder / AUTHORS_FILE)
    for name in ("model.safetensors", HEAD_FILE):
        (folder / name).unlink()
    again = CondenserForPreTraining.from_pretrained(folder, skip_from=model.skip_from, late_mlm=model.late_mlm).model
    for name, weight in model.state_dict().items():
        if not torch.equal(weight, again.state_dict()[name]):
            raise ValueError(f"{name} reads back otherwise from the authors' layout")
