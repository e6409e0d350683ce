"""Where models come from: Hugging Face folders and hub names, exports, the authors' checkpoints, training checkpoints.

Foreign formats come in here and in models/pretraining.py, and go out in export.py; the rest of the project knows
objectives only. Nothing is unpickled but through torch's restricted unpickler, and code that a model folder brings
along is not run.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from condenser.data.store import check_file_name, tokenizer_hash
from condenser.data.tokenizers import has_tokenizer, is_path, load_tokenizer, vocabulary_size
from condenser.models.backbones.base import build_masked_lm
from condenser.models.condenser import Condenser
from condenser.models.files import is_run, load_file
from condenser.models.heads import AUTHORS_FILE, HEAD_FILE, load_head, parts
from condenser.models.initial import draw_truncated, fill_vocabulary
from condenser.models.objective import Objective, class_of, class_path
from condenser.models.positions import Extension, with_positions
from condenser.models.pretraining import CondenserConfig, CondenserForPreTraining, Found, made, opened


def warm_start(
    backbone: str | None,
    settings: dict[str, Any],
    tokenizer: Any,
    objective: type[Objective] = Condenser,
    say: Callable[[str], Any] = print,
    max_positions: int | None = None,
    position_extension: Extension = "hierarchical",
    truncated_normal: bool = False,
    vocabulary_multiple: int = 1,
    **options: Any,
) -> Objective:
    """The model that training starts from: see `build_masked_lm`; a head found beside the weights is loaded too.

    Args:
        tokenizer: the token store's; the backbone's must be the same.
        say: is told where trained weights get an untrained head.
        max_positions, position_extension: see `with_positions`.
        truncated_normal, vocabulary_multiple: see `condenser.models.initial`.
        options: further arguments of the objective.

    Raises:
        ValueError: another tokenizer or vocabulary than the store's, options that the objective does not take, or a
            head of another shape.
    """
    if vocabulary_multiple < 1:
        raise ValueError(f"model.vocabulary_multiple={vocabulary_multiple} must be at least 1")
    if truncated_normal and backbone is not None:
        raise ValueError("model.truncated_normal is for random weights: leave it, or model.backbone, out")
    n_ids = vocabulary_size(tokenizer)
    if backbone is None:
        found = Found(build_masked_lm(None, settings, vocab_size=n_ids, pad_token_id=tokenizer.pad_token_id))
    else:
        check_same_tokenizer(backbone, tokenizer)
        found = opened(backbone, settings)
    lm = found.lm
    if lm.config.vocab_size < n_ids:
        raise ValueError(f"the model's vocabulary ({lm.config.vocab_size}) is smaller than the store's ({n_ids})")
    if max_positions is not None:
        lm = with_positions(lm, max_positions, position_extension)
    fill_vocabulary(lm, vocabulary_multiple)
    model = made(objective, lm, options)
    if truncated_normal:
        draw_truncated(model, lm.config.initializer_range)
    if backbone is not None and model.head_state():
        head = found.head or {}
        if fresh := load_head(model, head, backbone):
            what = f"other weights beside the backbone's ({', '.join(sorted(parts(head)))})" if head else "no head"
            say(
                f"{backbone} has {what}, so {', '.join(fresh)} of {objective.__name__} begins with random weights: "
                "--model.optimizer.head_only_steps trains what is no backbone alone at first"
            )
    return model


def check_same_tokenizer(backbone: str, tokenizer: Any) -> None:
    if is_run(backbone) or (Path(backbone).is_dir() and not has_tokenizer(Path(backbone))):
        return  # the one is refused where it is opened, of bare weights only the vocabulary's size can be compared
    if is_path(backbone) and not Path(backbone).is_dir():
        raise ValueError(f"model.backbone: no such folder: {backbone}")
    if tokenizer_hash(load_tokenizer(backbone)) != tokenizer_hash(tokenizer):
        raise ValueError(
            f"the token store was made with another tokenizer than that of {backbone!r}; "
            f"prepare it anew with --tokenizer {backbone}"
        )


def load_authors_checkpoint(directory: str | Path, skip_from: int, late_mlm: bool = True) -> Condenser:
    """A checkpoint as the authors' code saves it (Hugging Face files + ``model.pt``), head included.

    ``skip_from`` and ``late_mlm`` are not in the file. Raises ValueError if the head is missing or does not fit.
    """
    if not (Path(directory) / AUTHORS_FILE).is_file():
        raise ValueError(f"{directory} has no {AUTHORS_FILE}, which holds the head")
    return CondenserForPreTraining.from_pretrained(directory, skip_from=skip_from, late_mlm=late_mlm).model


def load_export(directory: str | Path) -> Objective:
    """What `condenser export` wrote, head included: training can go on from it.

    Raises:
        ValueError: no export there, or a damaged one.
    """
    if not (Path(directory) / HEAD_FILE).is_file():
        raise ValueError(f"{directory} has no {HEAD_FILE}: not a folder that `condenser export` wrote")
    return CondenserForPreTraining.from_pretrained(directory).model


def description(model: Objective, tokenizer: dict[str, str], data: dict[str, Any], run_config: str) -> dict[str, Any]:
    """What a checkpoint must hold besides weights so that it can be exported on its own, of a ``tokenizer`` the text of
    its files by name; plain values only."""
    return {
        "config": json.dumps(model.lm.config.to_dict()),
        "objective": class_path(class_of(model)),
        "head": model.settings,
        "tokenizer": tokenizer,
        "manifest": json.dumps(data),
        "run_config": run_config,
    }


def described(about: dict[str, Any]) -> Objective:
    """A model as `description` says, with weights still to be loaded."""
    path = about.get("objective", class_path(Condenser))
    return CondenserForPreTraining(CondenserConfig(json.loads(about["config"]), path, about["head"])).model


def load_checkpoint(path: str | Path) -> tuple[Objective, dict[str, Any]]:
    """A training checkpoint -> its model, and the checkpoint without weights.

    Raises:
        ValueError: not a readable checkpoint of this project's, or one with files that leave the folder of an export.
    """
    checkpoint = load_file(path)
    try:
        about, state = checkpoint["condenser"], checkpoint.pop("state_dict")
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a checkpoint of a Condenser run") from None
    for name in about["tokenizer"]:
        check_file_name(name, path)
    model = described(about)
    weights = {name.removeprefix("model."): weight for name, weight in state.items()}
    try:
        own = model.state_dict().keys()
        model.load_state_dict({name: weight for name, weight in weights.items() if name in own})
    except RuntimeError as error:
        raise ValueError(f"{path}: weights and configuration do not belong together: {error}") from None
    if left := sorted(weights.keys() - own):
        print(f"{path}: weights that only {about.get('objective')} knows are left out: {', '.join(left)}")
    return model.eval(), checkpoint
