"""`condenser export`: a checkpoint, or all that a run has kept, for other tools.

condenser export runs/my-condenser --output my-condenser
condenser export runs/my-condenser --output my-condenser --normalize --query-prompt "query: " --onnx
condenser export runs/my-condenser --output steps --all-steps --push me/my-condenser --dry-run
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

from condenser import export as one
from condenser.corpus.inputs import resolve
from condenser.evaluation.pooling import check_name
from condenser.exports.authors import write_authors_layout
from condenser.exports.onnx import check_installed, write_onnx
from condenser.exports.upload import upload
from condenser.exports.vectors import write_vectors
from condenser.models.objective import Objective
from condenser.runs import checkpoints, step_of


def export(
    checkpoint: str,
    /,
    *,
    output: str,
    best: bool = False,
    step: int | None = None,
    all_steps: bool = False,
    layout: Literal["huggingface", "authors"] = "huggingface",
    pooling: str = "cls",
    normalize: bool = False,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    whitening: list[str] | None = None,
    dimensions: int | None = None,
    onnx: bool = False,
    push: str | None = None,
    dry_run: bool = False,
) -> None:
    """Write one folder that transformers, sentence-transformers and this project load.

    The folder is written under a temporary name, loaded again, compared with the checkpoint, and then put in place. By
    default sentence-transformers takes the [CLS] vector and compares by dot product, as pre-training and the paper do.

    Args:
        checkpoint: a .ckpt file, or a run folder (its last checkpoint).
        output: the folder to write; it must not exist, or hold an earlier export of the same.
        best: of a run folder, the checkpoint with the lowest validation loss.
        step: of a run folder, the checkpoint after so many steps.
        all_steps: of a run folder, every checkpoint there is, each to OUTPUT/step-N; how many are kept is for
            checkpoint.keep_every_n_steps to say.
        layout: authors writes pytorch_model.bin and model.pt, which the authors' own code loads.
        pooling: cls, mean, max, mean+max, last<k>-cls or weighted-layers.
        normalize: make vectors one long, and compare them by cosine.
        query_prompt: what sentence-transformers puts before a query.
        document_prompt: what it puts before a document.
        whitening: texts (as --input of prepare), by the first 20,000 of which vectors are whitened.
        dimensions: how many whitening leaves; all by default.
        onnx: write the encoder for ONNX Runtime too, and with weights of 8 bits (pip install 'condenser[onnx]').
        push: OWNER/NAME of the Hugging Face hub to send it to, each step as a branch step-N, the newest as main.
        dry_run: say what --push would send, and send nothing.

    Raises:
        ValueError: no such checkpoint, weights that are not finite, options that do not go together, or an output
            folder that holds something else.
    """
    prompts = {"query": query_prompt, "document": document_prompt}
    told = {name: text for name, text in prompts.items() if text is not None}
    requested: dict[str, tuple[Any, Any]] = {  # and what there is without asking
        "layout": (layout, "huggingface"),
        "pooling": (pooling, "cls"),
        "normalize": (normalize, False),
        "prompts": (told, {}),
        "whitening": (whitening, None),
        "dimensions": (dimensions, None),
        "onnx": (onnx, False),
    }
    changed = {name: value for name, (value, usual) in requested.items() if value != usual}
    check_options(changed, all_steps and (best or step is not None), dry_run and push is None)
    if push is not None:
        check_repository(push)
    if all_steps:
        paths = {f"step-{step_of(path)}": path for path in all_checkpoints(checkpoint)}
        targets = {branch: (path, Path(output) / branch) for branch, path in paths.items()}
    else:
        targets = {"main": (one.find_checkpoint(checkpoint, best, step), Path(output))}
    for path, target in targets.values():
        one.export(path, target, changed, lambda folder, model: finish(folder, model, changed))
    if push is not None:
        folders = {branch: target for branch, (_, target) in targets.items()}
        newest = next(iter(folders.values()))
        upload(push, {"main": newest} | folders, dry_run)


def check_options(changed: dict[str, Any], two_choices: bool, dry_alone: bool) -> None:
    """Raises ValueError for options that do not go together, or that want what is not there, before any work."""
    if two_choices:
        raise ValueError("--all-steps takes every checkpoint: leave --best and --step out")
    if dry_alone:
        raise ValueError("--dry-run says what --push would send: give it too")
    if "dimensions" in changed and "whitening" not in changed:
        raise ValueError("--dimensions is of --whitening: give the texts to whiten by")
    if changed.get("layout") == "authors" and len(changed) > 1:
        others = ", ".join(sorted(changed.keys() - {"layout"}))
        raise ValueError(f"--layout authors is for the authors' code, which knows no {others}")
    check_name(changed.get("pooling", "cls"))
    if "onnx" in changed and re.match("last|weighted", changed.get("pooling", "cls")):
        raise ValueError(
            f"--pooling {changed['pooling']} reads several layers, and --onnx writes the last: leave one out"
        )
    if changed.get("dimensions", 1) < 1:
        raise ValueError(f"--dimensions {changed['dimensions']} must be at least 1")
    if changed.get("pooling") == "attention":
        raise ValueError("--pooling attention: it is learnt by fine-tuning, and sentence-transformers cannot save it")
    if "onnx" in changed:
        check_installed()
    if "whitening" in changed:
        resolve(changed["whitening"])


def check_repository(name: str) -> None:
    """Raises ValueError for what the hub would not take for OWNER/NAME."""
    part = r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?"
    if not re.fullmatch(f"{part}/{part}", name) or re.search(r"--|\.\.", name):
        raise ValueError(f"--push {name}: give OWNER/NAME, of letters, digits, -, _ and single dots")


def all_checkpoints(name: str) -> list[Path]:
    """One of each step, the newest first; damaged ones are passed over, and said so."""
    if not Path(name).is_dir():
        raise ValueError(f"--all-steps wants a run folder, not {name}")
    one.find_checkpoint(name)  # or there is none that can be read
    by_step: dict[int, Path] = {}
    for path in checkpoints(Path(name)):
        if step_of(path) in by_step:
            continue
        if one.is_intact(path):
            by_step[step_of(path)] = path
        else:
            print(f"{path} is damaged and is passed over")
    return [*by_step.values()]


def finish(folder: Path, model: Objective, changed: dict[str, Any]) -> None:
    """Add to a plain export what else was asked for."""
    if changed.get("layout") == "authors":
        write_authors_layout(folder, model)
    of_vectors = {key: value for key, value in changed.items() if key not in ("layout", "onnx")}
    if of_vectors:
        write_vectors(folder, **of_vectors)
    if "onnx" in changed:
        longest = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
        for name, numbers in write_onnx(folder, longest).items():
            print(
                f"{name}: {numbers['bytes'] / 1e6:,.1f} MB; states differ by at most "
                f"{numbers['largest_difference']:.2g}, the lowest cosine of two [CLS] vectors is "
                f"{numbers['lowest_cosine_of_cls']:.6f}"
            )
