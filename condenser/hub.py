"""Where models come from: Hugging Face folders and hub names, exports, the authors' checkpoints, training checkpoints.

Foreign formats come in here and go out in export.py; the rest of the project knows `Condenser` only. Nothing is
unpickled but through torch's restricted unpickler, and code that a model folder brings along is not run.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from condenser.data.store import check_file_name, tokenizer_hash
from condenser.data.tokenizers import is_path, vocabulary_size
from condenser.models.backbones.base import build_masked_lm
from condenser.models.condenser import Condenser
from condenser.models.files import load_file
from condenser.models.objective import Objective
from condenser.models.positions import Extension, with_positions

HEAD_FILE = "condenser_head.safetensors"
AUTHORS_FILE = "model.pt"


def warm_start(
    backbone: str | None,
    settings: dict[str, Any],
    tokenizer: Any,
    objective: type[Objective] = Condenser,
    say: Callable[[str], Any] = print,
    max_positions: int | None = None,
    position_extension: Extension = "hierarchical",
    **options: Any,
) -> Objective:
    """The model that training starts from: see `build_masked_lm`; a head found beside the weights is loaded too.

    Args:
        tokenizer: the token store's; the backbone's must be the same.
        say: is told where trained weights get an untrained head.
        max_positions, position_extension: see `with_positions`.
        options: further arguments of the objective.

    Raises:
        ValueError: another tokenizer or vocabulary than the store's, options that the objective does not take, or a
            head of another shape.
    """
    if backbone is not None:
        if is_path(backbone) and not Path(backbone).is_dir():
            raise ValueError(f"model.backbone: no such folder: {backbone}")
        check_same_tokenizer(backbone, tokenizer)
    n_ids = vocabulary_size(tokenizer)
    lm = build_masked_lm(backbone, settings, vocab_size=n_ids, pad_token_id=tokenizer.pad_token_id)
    if lm.config.vocab_size < n_ids:
        raise ValueError(f"the model's vocabulary ({lm.config.vocab_size}) is smaller than the store's ({n_ids})")
    if max_positions is not None:
        lm = with_positions(lm, max_positions, position_extension)
    try:
        model = objective.from_masked_lm(lm, **options)
    except TypeError as error:
        raise ValueError(f"model.objective_options: {error}") from None
    if backbone is not None and model.head_state():
        found = saved_head(Path(backbone)) or {}
        fresh = load_head(model, found, backbone)
        if fresh:
            what = f"other weights beside the backbone's ({', '.join(sorted(parts(found)))})" if found else "no head"
            say(
                f"{backbone} has {what}, so {', '.join(fresh)} of {objective.__name__} begins with random weights: "
                "--model.optimizer.head_only_steps trains what is no backbone alone at first"
            )
    return model


def check_same_tokenizer(backbone: str, tokenizer: Any) -> None:
    from condenser.data.tokenizers import load_tokenizer

    if Path(backbone).is_dir() and not list(Path(backbone).glob("*token*")) + list(Path(backbone).glob("vocab*")):
        return  # bare weights: only the vocabulary's size can be compared
    if tokenizer_hash(load_tokenizer(backbone)) != tokenizer_hash(tokenizer):
        raise ValueError(
            f"the token store was made with another tokenizer than that of {backbone!r}; "
            f"prepare it anew with --tokenizer {backbone}"
        )


def saved_head(folder: Path) -> dict[str, Tensor] | None:
    """The head's weights (keys ``c_head.*``) in an export or in a checkpoint of the authors' code, if there is one.

    Raises:
        ValueError: a damaged file, one that would run code, or one without a head.
    """
    if (folder / HEAD_FILE).is_file():
        return read_safetensors(folder / HEAD_FILE)[0]
    if (folder / AUTHORS_FILE).is_file():
        state = load_file(folder / AUTHORS_FILE)
        head = {key: state[key] for key in state if key.startswith("c_head.")} if isinstance(state, dict) else {}
        if not head:
            raise ValueError(f"{folder / AUTHORS_FILE} holds no head (keys c_head.*): remove it to start without one")
        return head
    return None


def load_head(model: Objective, weights: dict[str, Tensor], origin: str) -> list[str]:
    """Load the parts of a head (``c_head``, ``decoder``, ...) that are there; the names of the others.

    Raises:
        ValueError: a part of another shape.
    """
    own = model.head_state()
    known = parts(own) & parts(weights)
    for name in sorted(own.keys() | weights.keys()):
        shapes = [tuple(state[name].shape) if name in state else "absent" for state in (weights, own)]
        if name.split(".")[0] in known and shapes[0] != shapes[1]:
            raise ValueError(
                f"the head in {origin} has another shape than that of a {type(model).__name__} with {model.settings}: "
                f"{name} is {shapes[0]} there and {shapes[1]} here"
            )
    model.load_state_dict({name: w for name, w in weights.items() if name.split(".")[0] in known}, strict=False)
    return sorted(parts(own) - known)


def parts(head: dict[str, Tensor]) -> set[str]:
    return {name.split(".")[0] for name in head}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Raises ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def n_layers(head: dict[str, Tensor]) -> int:
    return 1 + max((int(key.split(".")[1]) for key in head), default=-1)


def load_authors_checkpoint(directory: str | Path, skip_from: int, late_mlm: bool = True) -> Condenser:
    """A checkpoint as the authors' code saves it (Hugging Face files + ``model.pt``), head included.

    ``skip_from`` and ``late_mlm`` are not in the file. Raises ValueError if the head is missing or does not fit.
    """
    head = saved_head(Path(directory))
    if not head:
        raise ValueError(f"{directory} has no {AUTHORS_FILE}, which holds the head")
    lm = build_masked_lm(str(directory), {})
    model = Condenser.from_masked_lm(lm, skip_from=skip_from, n_head_layers=n_layers(head), late_mlm=late_mlm)
    load_head(model, head, str(directory))
    return model.eval()


def load_export(directory: str | Path) -> Objective:
    """What `condenser export` wrote, head included: training can go on from it.

    Raises:
        ValueError: no export there, or a damaged one.
    """
    if not (Path(directory) / HEAD_FILE).is_file():
        raise ValueError(f"{directory} has no {HEAD_FILE}: not a folder that `condenser export` wrote")
    weights, about = read_safetensors(Path(directory) / HEAD_FILE)
    settings = json.loads(about["head"])
    model = rebuilt(build_masked_lm(str(directory), {}), about.get("objective", class_path(Condenser)), settings)
    if missing := load_head(model, weights, str(directory)):
        raise ValueError(f"{Path(directory) / HEAD_FILE} is damaged: it lacks {', '.join(missing)}")
    return model.eval()


def rebuilt(lm: Any, objective: str, settings: dict[str, Any]) -> Objective:
    """The objective of this class path, if it is one of ours or was imported; of another what a Condenser is of it. (A
    path that a file holds is not imported: it could run anything.)"""
    from condenser.models import cocondenser, retromae  # noqa: F401, they make their classes known

    waiting: list[type[Objective]] = [Objective]
    while waiting:
        known = waiting.pop()
        if class_path(known) == objective:
            return known.from_masked_lm(lm, **settings)
        waiting += known.__subclasses__()
    own = {name: settings[name] for name in ("skip_from", "n_head_layers", "late_mlm", "pruned") if name in settings}
    return Condenser.from_masked_lm(lm, **({"n_head_layers": 0} | own))


def class_of(model: Objective) -> type[Objective]:
    """Its own class: where weights are sharded torch has put one of its making before it."""
    return next(each for each in type(model).__mro__ if not each.__module__.startswith("torch."))


def class_path(objective: type[Objective]) -> str:
    return f"{objective.__module__}.{objective.__qualname__}"


def description(model: Objective, tokenizer: Path, data: dict[str, Any], run_config: str) -> dict[str, Any]:
    """What a checkpoint must hold besides weights so that it can be exported on its own; plain values only."""
    return {
        "config": json.dumps(model.lm.config.to_dict()),
        "objective": class_path(class_of(model)),
        "head": model.settings,
        "tokenizer": {path.name: path.read_text() for path in sorted(tokenizer.glob("[!.]*"))},
        "manifest": json.dumps(data),
        "run_config": run_config,
    }


def described(about: dict[str, Any]) -> Objective:
    """A model as `description` says, with weights still to be loaded."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    values = json.loads(about["config"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    lm = AutoModelForMaskedLM.from_config(config, trust_remote_code=False)
    return rebuilt(lm, about.get("objective", class_path(Condenser)), about["head"])


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
