"""A training checkpoint becomes one folder that loads everywhere; `condenser.exports` adds what else is asked for.

It is a Hugging Face folder (the headless encoder with its MLM head, and the tokenizer) that also holds
``condenser_head.safetensors`` (the head, keys ``c_head.*``), the files by which sentence-transformers knows to take the
[CLS] vector, a model card, and the training configuration.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from condenser.card import model_card
from condenser.data.lock import locked
from condenser.hub import load_checkpoint, load_export
from condenser.models.condenser import Condenser
from condenser.models.files import load_file
from condenser.models.heads import HEAD_FILE
from condenser.models.initial import cut_vocabulary
from condenser.models.objective import Objective, class_path, known_class
from condenser.runs import METRICS, RESULTS, checkpoints, flatten, is_intact, read_mapping, read_metrics, step_of

ABOUT_FILE = "condenser.json"  # where the export came from


def export(
    path: Path,
    target: Path,
    options: dict[str, Any] | None = None,
    finish: Callable[[Path, Objective], None] = lambda folder, model: None,
) -> None:
    """Write one folder that transformers, sentence-transformers (CLS pooling) and this project load.

    The folder is written under a temporary name, loaded again, compared with the checkpoint, and then put in place.

    Args:
        path: the checkpoint.
        target: must not exist, or hold an earlier export of the same checkpoint with the same options.
        options: what else is asked for, to be noted in the folder.
        finish: is called with the folder, before it is put in place, and the model.

    Raises:
        ValueError: weights that are not finite, or a target that holds something else.
    """
    source: dict[str, Any] = {"checkpoint": path.name, "sha256": sha256(path), "options": options or {}}
    source["objective"] = read_as(path)
    if target.is_symlink():  # which a folder cannot take the place of
        target = Path(os.path.realpath(target))
    if already_exported(target, source):
        print(f"{target} already holds this checkpoint's export: nothing to do")
        return
    model, content = load_checkpoint(path)
    check_finite(model, path)
    cut_vocabulary(model.lm)
    with whole_folder(target) as folder:
        source["step"] = content["global_step"]
        about = write_export(folder, model, content["condenser"], source, measured(path.parent.parent, source["step"]))
        compare_with_live(folder, model)
        finish(folder, model)
        note_files(folder, about)
    print(f"{target}: step {content['global_step']:,} of {path}, reloaded and compared")


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Gives a hidden folder beside ``target``, which takes its place if nothing fails; ValueError while another process
    is at work on it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished-export")
    busy = f"{target} is being written by {{holder}}: wait for its end, or choose another --output"
    with locked(target.with_name(f".{target.name}.lock"), busy):
        shutil.rmtree(unfinished, ignore_errors=True)  # of one that was killed
        unfinished.mkdir()
        try:
            yield unfinished
            unfinished.rename(target)
        except (SafetensorError, OSError) as error:  # of a full disk, for one
            if isinstance(error, OSError) and (error.filename or not error.errno):
                raise
            raise OSError(f"{unfinished} cannot be written: {error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def read_as(path: Path) -> str:
    """The class path that a checkpoint's model is read as: its own, a Condenser's where that is not imported."""
    content = load_file(path, mmap=True)
    own = content.get("condenser", {}).get("objective") if isinstance(content, dict) else None
    return own if own and known_class(own) else class_path(Condenser)


def find_checkpoint(name: str, best: bool = False, step: int | None = None) -> Path:
    """A .ckpt file, or one of a run folder's: its last that is whole, its best, or that of a ``step``."""
    path = Path(name)
    if best and step is not None:
        raise ValueError("--best and --step: give one of them")
    if path.is_file():
        if best or step is not None:
            raise ValueError(f"{name} is one checkpoint: --best and --step choose among those of a run folder")
        if not is_intact(path):
            raise ValueError(f"{name} is damaged, or no checkpoint: its bytes are not those that were written")
        return path
    found = checkpoints_of(path)
    wanted = [path for path in found if (not best or path.name.startswith("best")) and step in (None, step_of(path))]
    if not wanted:
        there = ", ".join(path.name for path in found)
        raise ValueError(f"{name} has no {'best checkpoint' if best else f'checkpoint of step {step}'}, but {there}")
    return next(whole(wanted))


def checkpoints_of(run: Path) -> list[Path]:
    """Those of a run folder, the newest first. Raises ValueError where there are none."""
    if not run.is_dir():
        raise ValueError(f"no such checkpoint or run folder: {run}")
    found = checkpoints(run.parent if run.name == "checkpoints" else run)
    if not found and (run / "config.json").is_file():
        raise ValueError(
            f"{run} is a model and no run: CondenserForPreTraining.from_pretrained reads it, and its "
            "model.lm.save_pretrained writes the encoder"
        )
    if not found:
        raise ValueError(f"{run} has no checkpoints/*.ckpt: is it a run folder, and has it saved one yet?")
    return found


def whole(paths: list[Path]) -> Iterator[Path]:
    """Without damaged ones, which are named. Raises ValueError where all are."""
    is_left = False
    for path in paths:
        if is_intact(path):
            is_left = True
            yield path
        else:
            print(f"{path} is damaged and is passed over")
    if not is_left:
        raise ValueError(f"{', '.join(map(str, paths))}: damaged; export another step, or go on training")


def already_exported(target: Path, source: dict[str, Any]) -> bool:
    """Raises ValueError where something else is there, or an export that has changed."""
    if not target.exists():
        return False
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
        return False
    content = read_mapping(target / ABOUT_FILE) or {}
    there = content.get("source", {})
    if there.get("objective", source["objective"]) != source["objective"]:
        raise ValueError(f"--output {target} exists, of a model that was read as {there['objective']}; remove it first")
    if (there.get("sha256"), there.get("options", {})) != (source["sha256"], source["options"]):
        raise ValueError(
            f"--output {target} exists and is not this checkpoint's export with these options (and texts to whiten by);"
            " remove it, or choose another folder"
        )
    for name, digest in content.get("files", {}).items():
        if not (target / name).is_file() or sha256(target / name) != digest:
            raise ValueError(f"{target / name} is missing or has changed since the export: remove {target} first")
    return True


def note_files(folder: Path, about: dict[str, Any]) -> None:
    """By their checksums, so that the same command later sees whether they are still what was written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    about = about | {"files": {str(path.relative_to(folder)): sha256(path) for path in files}}
    (folder / ABOUT_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for path in folder.rglob("*.safetensors"):  # which safetensors lets nobody else read
        path.chmod((folder / ABOUT_FILE).stat().st_mode)


def check_finite(model: Objective, path: Path) -> None:
    for name, weight in model.state_dict().items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{path}: {name} holds values that are not finite; export an earlier checkpoint")


def measured(run: Path, step: int) -> dict[str, Any]:
    """What a run folder knows of its model at a step: tokens, the last losses until then, rows of its evaluation."""
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # no run around the checkpoint, or a broken file: weights are enough
        for name, (steps, values) in read_metrics(run / METRICS).items():
            if re.fullmatch("train/tokens_seen|val/.*loss.*", name) and (steps < step).any():
                found[name] = float(values[steps < step][-1])
        found["evaluation"] = (read_mapping(run / RESULTS) or {}).get("rows", [])
    return found


def write_export(
    folder: Path, model: Objective, about: dict[str, Any], source: dict[str, Any], numbers: dict[str, Any]
) -> dict[str, Any]:
    """All but `ABOUT_FILE`, whose content is returned."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # AutoModel will report the MLM head that it leaves out
    logging.disable_progress_bar()
    model.lm.save_pretrained(folder)
    for name, text in about["tokenizer"].items():
        (folder / name).write_text(text, encoding="utf-8")
    head = {name: weight.contiguous() for name, weight in model.head_state().items()}
    known = {"format": "pt", "objective": class_path(type(model)), "head": json.dumps(model.settings)}
    save_file(head, folder / HEAD_FILE, metadata=known)
    manifest = json.loads(about["manifest"])
    write_sentence_transformers_files(folder, model.lm.config.hidden_size, manifest["settings"]["max_length"])
    if about["run_config"]:
        (folder / "training_config.yaml").write_text(about["run_config"], encoding="utf-8")
    card = {"source": source, "head": model.settings, "measured": numbers, "data": manifest}
    config = dict(flatten(yaml.safe_load(about["run_config"]) or {}))
    (folder / "README.md").write_text(model_card(model, card, config.get("model.backbone")), encoding="utf-8")
    return card


def write_sentence_transformers_files(folder: Path, hidden_size: int, max_length: int) -> None:
    """Transformer, then [CLS] pooling: without these files sentence-transformers would take the mean."""
    package = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{package}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{package}.Pooling"},
    ]
    pooling = {"word_embedding_dimension": hidden_size, "pooling_mode_cls_token": True}
    pooling |= {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False}
    (folder / "1_Pooling").mkdir()
    for name, value in {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": max_length},
        "config_sentence_transformers.json": {"similarity_fn_name": "dot"},
    }.items():
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def compare_with_live(folder: Path, model: Objective) -> None:
    """Load the folder in each way and compare with ``model`` on a small batch; ValueError where they differ."""
    from transformers import AutoModel, AutoModelForMaskedLM

    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, model.lm.config.vocab_size, (2, 16), generator=generator)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    with torch.inference_mode():
        again, weights = load_export(folder).state_dict(), model.state_dict()
        pairs = {f"load_export ({name})": (weight, again[name]) for name, weight in weights.items()}
        encoder = getattr(model.lm, model.lm.base_model_prefix)
        states = AutoModel.from_pretrained(folder, trust_remote_code=False)(**batch).last_hidden_state
        pairs["AutoModel"] = encoder(**batch).last_hidden_state, states
        logits = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=False)(**batch).logits
        pairs["AutoModelForMaskedLM"] = model.backbone.mlm_head(encoder(**batch).last_hidden_state), logits
    for loader, (live, loaded) in pairs.items():
        if not torch.allclose(live, loaded, rtol=1e-4, atol=1e-5):
            raise ValueError(
                f"what {loader} reads back differs from the checkpoint by {(live - loaded).abs().max():.2g}"
            )


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
