"""`condenser export`: a training checkpoint becomes one folder that loads everywhere.

It is a Hugging Face folder (the headless encoder with its MLM head, and the tokenizer) that also holds
``condenser_head.safetensors`` (the head, keys ``c_head.*``), the files by which sentence-transformers knows to take the
[CLS] vector, a model card, and the training configuration.
"""

import contextlib
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from condenser.hub import HEAD_FILE, class_path, load_checkpoint, load_export
from condenser.models.objective import Objective
from condenser.runs import METRICS, RESULTS, checkpoints, flatten, is_whole, read_mapping, read_metrics, step_of

ABOUT_FILE = "condenser.json"  # where the export came from


def export(checkpoint: str, /, *, output: str, best: bool = False, step: int | None = None) -> None:
    """Write one folder that transformers, sentence-transformers (CLS pooling) and this project load.

    The folder is written under a temporary name, loaded again, compared with the checkpoint, and then put in place.

    Args:
        checkpoint: a .ckpt file, or a run folder (its last checkpoint).
        output: the folder to write; it must not exist, or hold an earlier export of the same checkpoint.
        best: of a run folder, the checkpoint with the lowest validation loss.
        step: of a run folder, the checkpoint after so many steps.

    Raises:
        ValueError: no such checkpoint, weights that are not finite, or an output folder that holds something else.
    """
    path = find_checkpoint(checkpoint, best, step)
    target = Path(output)
    source: dict[str, Any] = {"checkpoint": path.name, "sha256": sha256(path)}
    if already_exported(target, source):
        print(f"{output} already holds this checkpoint's export: nothing to do")
        return
    model, content = load_checkpoint(path)
    check_finite(model, path)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        source["step"] = content["global_step"]
        write_export(partial, model, content["condenser"], source, measured(path.parent.parent, source["step"]))
        compare_with_live(partial, model)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{output}: step {content['global_step']:,} of {path}, reloaded and compared")


def find_checkpoint(name: str, best: bool = False, step: int | None = None) -> Path:
    """A .ckpt file, or one of a run folder's: its last that is whole, its best, or that of a ``step``."""
    path = Path(name)
    if best and step is not None:
        raise ValueError("--best and --step: give one of them")
    if path.is_file():
        if best or step is not None:
            raise ValueError(f"{name} is one checkpoint: --best and --step choose among those of a run folder")
        return path
    if not path.is_dir():
        raise ValueError(f"no such checkpoint or run folder: {name}")
    found = checkpoints(path)
    if not found:
        raise ValueError(f"{name} has no checkpoints/*.ckpt: is it a run folder, and has it saved one yet?")
    wanted = [path for path in found if (not best or path.name.startswith("best")) and step in (None, step_of(path))]
    if not wanted:
        there = ", ".join(path.name for path in found)
        raise ValueError(f"{name} has no {'best checkpoint' if best else f'checkpoint of step {step}'}, but {there}")
    for path in wanted:
        if is_whole(path):
            return path
        print(f"{path} is damaged and is passed over")
    return wanted[0]


def already_exported(target: Path, source: dict[str, Any]) -> bool:
    if not target.exists():
        return False
    about = target / ABOUT_FILE
    if about.is_file() and json.loads(about.read_text())["source"]["sha256"] == source["sha256"]:
        return True
    raise ValueError(
        f"--output {target} exists and is not this checkpoint's export; remove it, or choose another folder"
    )


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
) -> None:
    model.lm.save_pretrained(folder)
    for name, text in about["tokenizer"].items():
        (folder / name).write_text(text)
    head = {name: weight.contiguous() for name, weight in model.head_state().items()}
    known = {"format": "pt", "objective": class_path(type(model)), "head": json.dumps(model.settings)}
    save_file(head, folder / HEAD_FILE, metadata=known)
    manifest = json.loads(about["manifest"])
    write_sentence_transformers_files(folder, model.lm.config.hidden_size, manifest["settings"]["max_length"])
    if about["run_config"]:
        (folder / "training_config.yaml").write_text(about["run_config"])
    card = {"source": source, "head": model.settings, "measured": numbers, "data": manifest}
    (folder / ABOUT_FILE).write_text(json.dumps(card, indent=1) + "\n")
    config = dict(flatten(yaml.safe_load(about["run_config"]) or {}))
    (folder / "README.md").write_text(model_card(model, card, config.get("model.backbone")))


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
        (folder / name).write_text(json.dumps(value, indent=1) + "\n")


PAPERS = {
    "Condenser": "Gao & Callan, EMNLP 2021",
    "CoCondenser": "Gao & Callan, ACL 2022",
    "RetroMAE": "Xiao & Liu, EMNLP 2022",
    "DupMAE": "Xiao et al., ACL 2023",
}


def model_card(model: Objective, card: dict[str, Any], backbone: str | None) -> str:
    """The page that the hub shows; its first part is the hub's metadata."""
    config, data, numbers = model.lm.config, card["data"], card["measured"]
    about: dict[str, Any] = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    about |= {"license": "unknown", "language": data["settings"].get("language", "en")}
    about |= {"tags": ["condenser", "dense-retrieval", "masked-lm"]}
    if backbone and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", backbone) and not Path(backbone).exists():
        about["base_model"] = backbone  # of the hub
    files = ", ".join(source["name"] for source in data["settings"]["sources"])
    name = type(model).__name__
    control = name == "Condenser" and not model.head_state()
    objective = "plain MLM" if control else name
    method = "Pre-trained as the control of" if control else "Its `[CLS]` vector is made ready for dense retrieval by"
    seen = f"{numbers['train/tokens_seen']:,.0f}" if "train/tokens_seen" in numbers else "not recorded"
    losses = [f"`{name}` {value:.3f}" for name, value in numbers.items() if name.startswith("val/")]
    rows = [
        f"- {row['collection']}, {row['model']}, fine-tuned: {row['trained_on'] or 'no'}, nDCG@10: {row['ndcg@10']:.3f}"
        for row in numbers.get("evaluation", [])
        if "ndcg@10" in row
    ]
    return f"""---
{yaml.safe_dump(about, sort_keys=False)}---
# A {config.model_type} encoder pre-trained with {objective}

{method} {name} ({PAPERS.get(name, "an objective of one's own")}).
**It is not fine-tuned for retrieval: fine-tune it first**; before that, `[CLS]` similarity says little. How, on
MS MARCO and others, with sentence-transformers or Tevatron: `docs/fine-tuning.md` of the project that made it.

- {config.num_hidden_layers} layers, hidden size {config.hidden_size}, vocabulary {config.vocab_size:,}
- started from: {backbone or "random weights"}
- head: {json.dumps(card["head"])}
- training: step {card["source"]["step"]:,}, tokens seen: {seen}; settings in `training_config.yaml`
- data: {files}; {data["counts"]["tokens_kept"]:,} tokens in rows of up to {data["settings"]["max_length"]}; all of its
  manifest in `condenser.json`
- pooling: `[CLS]`, compared by dot product; sequences are cut at {data["settings"]["max_length"]} tokens, the length of
  pre-training, unless you raise `max_seq_length`
- licence: not stated; it depends on the text and on the weights that training started from

## Measured

Validation losses at this step: {", ".join(losses) or "not recorded"}.

{chr(10).join(rows) or "Retrieval: not evaluated when this was written."}

## Use

```python
from sentence_transformers import SentenceTransformer  # to fine-tune, then to encode: SentenceTransformer(folder)
from transformers import AutoModel, AutoModelForMaskedLM  # .from_pretrained(folder): encoder; encoder with MLM head
from condenser.hub import load_export  # load_export(folder): with its head, to go on pre-training
```

Limits: it knows what its text says, with its errors and biases, in its language and of its time.
"""


def compare_with_live(folder: Path, model: Objective) -> None:
    """Load the folder in each way and compare with ``model`` on a small batch; ValueError where they differ."""
    from transformers import AutoModel, AutoModelForMaskedLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # AutoModel reports the MLM head that it leaves out
    logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, model.lm.config.vocab_size, (2, 16), generator=generator)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    with torch.inference_mode():
        again = load_export(folder)
        pairs = {
            f"load_export ({name})": (weight, again.state_dict()[name]) for name, weight in model.state_dict().items()
        }
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
