"""`condenser export`: a checkpoint, or all that a run has kept, for other tools.

condenser export runs/my-condenser --output my-condenser
condenser export runs/my-condenser --output my-condenser --normalize --query-prompt "query: " --onnx
condenser export runs/my-condenser --output steps --all-steps --push me/my-condenser --dry-run
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch

from condenser import export as one
from condenser.corpus.inputs import resolve, texts_of
from condenser.evaluation.pooling import check_name
from condenser.exports.onnx import check_installed, write_onnx
from condenser.exports.vectors import ENOUGH, write_vectors
from condenser.hub import load_authors_checkpoint
from condenser.models.condenser import Condenser
from condenser.models.files import write_file
from condenser.models.heads import AUTHORS_FILE, HEAD_FILE
from condenser.models.objective import Objective
from condenser.runs import at_least, step_of


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
        push: OWNER/NAME of the Hugging Face hub to send it to, in the place of what is there; each step as a branch
            step-N, the newest as main.
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
    if all_steps and (best or step is not None):
        raise ValueError("--all-steps takes every checkpoint: leave --best and --step out")
    if dry_run and push is None:
        raise ValueError("--dry-run says what --push would send: give it too")
    check_options(changed)
    if push is not None:
        check_repository(push)
    if all_steps:
        exports = {f"step-{step_of(path)}": path for path in all_checkpoints(checkpoint)}
        folders = {branch: Path(output) / branch for branch in exports}
    else:
        exports, folders = {"main": one.find_checkpoint(checkpoint, best, step)}, {"main": Path(output)}
    texts = None
    if whitening is not None:
        texts = [*itertools.islice(texts_of(whitening), ENOUGH)]
        digest = hashlib.sha256("\0".join(texts).encode(errors="replace")).hexdigest()
        changed["whitening"] = {"inputs": whitening, "sha256": digest}
    for branch, path in exports.items():
        try:
            one.export(path, folders[branch], changed, lambda folder, model: finish(folder, model, changed, texts))
        except FileNotFoundError:
            if not all_steps or path.exists():
                raise
            print(f"{path} is left out: the run, which goes on, has removed it")
            del folders[branch]
    if push is not None and folders:
        upload(push, {"main": next(iter(folders.values()))} | folders, dry_run)


def check_options(changed: dict[str, Any]) -> None:
    """Raises ValueError for options that do not go together, or that want what is not there, before any work."""
    pooling = changed.get("pooling", "cls")
    if "dimensions" in changed and "whitening" not in changed:
        raise ValueError("--dimensions is of --whitening: give the texts to whiten by")
    if changed.get("layout") == "authors" and len(changed) > 1:
        others = ", ".join(sorted(changed.keys() - {"layout"}))
        raise ValueError(f"--layout authors is for the authors' code, which knows no {others}")
    check_name(pooling)
    if "onnx" in changed and re.match("last|weighted", pooling):
        raise ValueError(f"--pooling {pooling} reads several layers, and --onnx writes the last: leave one out")
    at_least("dimensions", changed.get("dimensions"), 1)
    if pooling == "attention":
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
    """One of each step, the newest first."""
    if not Path(name).is_dir():
        raise ValueError(f"--all-steps wants a run folder, not {name}")
    by_step: dict[int, Path] = {}
    for path in one.whole(one.checkpoints_of(Path(name))):
        by_step.setdefault(step_of(path), path)
    return [*by_step.values()]


def finish(folder: Path, model: Objective, changed: dict[str, Any], texts: list[str] | None) -> None:
    """Add to a plain export what else was asked for; ``texts`` to whiten by."""
    if changed.get("layout") == "authors":
        write_authors_layout(folder, model)
    of_vectors = {key: changed[key] for key in ("pooling", "normalize", "prompts", "dimensions") if key in changed}
    if of_vectors or texts is not None:
        write_vectors(folder, texts=texts, **of_vectors)
    if "onnx" in changed:
        longest = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))["max_seq_length"]
        for name, numbers in write_onnx(folder, longest).items():
            print(
                f"{name}: {numbers['bytes'] / 1e6:,.1f} MB; states differ by at most "
                f"{numbers['largest_difference']:.2g}, the lowest cosine of two [CLS] vectors is "
                f"{numbers['lowest_cosine_of_cls']:.6f}"
            )


def write_authors_layout(folder: Path, model: Objective) -> None:
    """Turn an export into the layout of the authors' code: pickles of plain tensors, ``pytorch_model.bin`` and, for the
    head, ``model.pt``.

    Raises:
        ValueError: a model without a Condenser head, which the layout is for, or one that reads back otherwise.
    """
    if not isinstance(model, Condenser) or not len(model.c_head):
        raise ValueError(f"--layout authors is for a Condenser with its head; this is a {type(model).__name__} without")
    for name, weights in (("pytorch_model.bin", model.lm.state_dict()), (AUTHORS_FILE, model.head_state())):
        with open(folder / name, "wb") as file:
            write_file({key: weight.clone() for key, weight in weights.items()}, file)
    for name in ("model.safetensors", HEAD_FILE):
        (folder / name).unlink()
    again = load_authors_checkpoint(folder, model.skip_from, model.late_mlm).state_dict()
    for name, weight in model.state_dict().items():
        if not torch.equal(weight, again[name]):
            raise ValueError(f"{name} reads back otherwise from the authors' layout")


def upload(repository: str, folders: Mapping[str, Path], dry_run: bool) -> None:
    """Make each folder the content of a branch of a repository on the hub, which is made, private, where it is new.

    Raises:
        ValueError: the hub does not answer, or refuses.
    """
    for branch, folder in folders.items():
        sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
        print(f"{repository}@{branch}: {len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB from {folder}")
        for path in sizes if dry_run else ():
            print(f"  {path.relative_to(folder)}  {sizes[path]:,} bytes")
    if dry_run:
        print("nothing was sent: --dry-run")
        return
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        for branch, folder in folders.items():
            if branch != "main":
                api.create_branch(repository, branch=branch, exist_ok=True)
            about: Any = {"revision": branch, "commit_message": f"{folder.name} by condenser export"}
            api.upload_folder(repo_id=repository, folder_path=folder, delete_patterns="*", **about)
            print(f"{repository}@{branch} is there")
    except Exception as error:  # of the network, the token, the name
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--push {repository}: {reason}; the exports are in {', '.join(map(str, folders.values()))}"
        ) from error
