"""Encoders to evaluate, by sentence-transformers: loading one, its untrained twin, what identifies it."""

import copy
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condenser.data.store import tokenizer_hash
from condenser.data.tokenizers import is_path
from condenser.evaluation.probes import probe_store
from condenser.export import export, find_checkpoint
from condenser.hub import load_export
from condenser.models.backbones.base import longest_text
from condenser.models.files import reading
from condenser.models.pretraining import HEAD_FILE
from condenser.online import ask_hub

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_encoder(name: str, max_length: int | None) -> "SentenceTransformer":
    """Load a folder or a model of the hub; texts are cut to ``max_length`` tokens, or to the model's own setting.

    A plain Hugging Face folder gets CLS pooling, which is what Condenser trains; the library's own choice is the mean.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from sentence_transformers.util import is_sentence_transformer_model
    from transformers.utils import logging

    if (is_path(name) or Path(name).exists()) and not any(
        (Path(name) / file).is_file() for file in ("config.json", "modules.json")
    ):
        raise ValueError(f"no model folder at {name}: give a Hugging Face folder or what `condenser export` wrote")
    if not Path(name).is_dir():
        ask_hub()
    logging.set_verbosity_error()  # the MLM head, unused here, would be reported at length
    torch.manual_seed(0)  # a pooler that the file lacks is drawn at random: unused, but part of the weights' hash
    with reading(name):
        if is_sentence_transformer_model(name):
            encoder = SentenceTransformer(name, trust_remote_code=False)
        else:
            parts = ("config_kwargs", "model_kwargs", "processor_kwargs")
            transformer = Transformer(name, **{part: {"trust_remote_code": False} for part in parts})
            encoder = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "cls")])
    longest = longest_text(backbone(encoder).config)
    if max_length and longest and max_length > longest:
        raise ValueError(f"--max-length {max_length}: {name} takes at most {longest} tokens")
    own = max_length or encoder.max_seq_length
    encoder.max_seq_length = min(own, longest) if own and longest else own or longest
    return encoder


def backbone(encoder: "SentenceTransformer") -> Any:
    return encoder.transformers_model


def reinitialised(encoder: "SentenceTransformer", seed: int) -> "SentenceTransformer":
    """The same architecture, tokenizer and pooling with weights drawn afresh."""
    import torch

    twin = copy.deepcopy(encoder)
    torch.manual_seed(seed)
    fresh = type(backbone(twin))(backbone(twin).config)
    backbone(twin).load_state_dict(fresh.state_dict())
    return twin


def describe(encoder: "SentenceTransformer") -> dict[str, Any]:
    """What its embeddings depend on."""
    import torch

    weights = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        weights.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "weights": weights.hexdigest()[:16],
        "tokenizer": tokenizer_hash(encoder.tokenizer),
        "modules": [type(module).__name__ for module in encoder],
        "pooling": pooling_of(encoder),
        "similarity": encoder.similarity_fn_name,
        "prompts": encoder.prompts,
        "max_length": encoder.max_seq_length,
    }


def pooling_of(encoder: "SentenceTransformer") -> str | None:
    modes: Any = next((module.pooling_mode for module in encoder if hasattr(module, "pooling_mode")), None)
    return modes if isinstance(modes, str) or modes is None else "+".join(modes)


@contextmanager
def model_folder(name: str) -> Iterator[str]:
    """A checkpoint or a run folder is exported for as long as it is needed; other models are left as they are."""
    if not (name.endswith(".ckpt") or (Path(name) / "checkpoints").is_dir()):
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        export(find_checkpoint(name), Path(folder) / "export")
        yield f"{folder}/export"


def head_losses(folder: str, store: str) -> dict[str, float] | None:
    """What the head of an export loses without the true [CLS]; None for a model without a head."""
    if not (Path(folder) / HEAD_FILE).is_file():
        return None
    model = load_export(folder)
    return probe_store(model, model.lm, store).get("head_loss")
