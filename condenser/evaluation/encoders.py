"""Encoders to evaluate: loading one as sentence-transformers does, its untrained twin, and what identifies it.

A plain Hugging Face folder gets CLS pooling here, which is what Condenser trains; the library on its own would silently
take the mean.
"""

import copy
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condenser.data.store import tokenizer_hash

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_encoder(name: str, max_length: int) -> "SentenceTransformer":
    """Load a folder or a model of the hub, cut to ``max_length`` tokens.

    Raises:
        ValueError: no such folder, or a length beyond what the model was made for.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from sentence_transformers.util import is_sentence_transformer_model

    check_exists(name)
    torch.manual_seed(0)  # a pooler that the file lacks is drawn at random: unused, but part of the fingerprint
    if is_sentence_transformer_model(name):
        encoder = SentenceTransformer(name)
    else:
        transformer = Transformer(name)
        encoder = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "cls")])
    positions = getattr(backbone(encoder).config, "max_position_embeddings", max_length)
    limit = min(encoder.max_seq_length or max_length, positions)
    if max_length > limit:
        raise ValueError(f"--max-length {max_length}: {name} takes at most {limit} tokens")
    encoder.max_seq_length = max_length
    return encoder


def backbone(encoder: "SentenceTransformer") -> Any:
    """The Hugging Face model inside."""
    return encoder.transformers_model


def check_exists(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
            raise ValueError(f"{name} has no config.json: give a Hugging Face folder or what `condenser export` wrote")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or (path.parent != Path() and path.parent.is_dir()):
        raise ValueError(f"no model folder at {name}")


def reinitialised(encoder: "SentenceTransformer", seed: int) -> "SentenceTransformer":
    """The same architecture, tokenizer and pooling with weights drawn afresh."""
    import torch

    twin = copy.deepcopy(encoder)
    model = backbone(twin)
    torch.manual_seed(seed)
    fresh = type(model)(model.config).state_dict()
    model.load_state_dict({name: fresh[name] for name in model.state_dict()})
    return twin


def describe(encoder: "SentenceTransformer") -> dict:
    """What its embeddings depend on: weights and tokenizer (hashes), pooling, similarity and length."""
    modules = [type(module).__name__ for module in encoder]
    pooling = [module.pooling_mode for module in encoder if type(module).__name__ == "Pooling"]
    return {
        "weights": hash_weights(encoder),
        "tokenizer": tokenizer_hash(encoder.tokenizer),
        "modules": modules,
        "pooling": pooling[0] if pooling else None,
        "similarity": encoder.similarity_fn_name,
        "prompts": encoder.prompts,
        "max_length": encoder.max_seq_length,
    }


def hash_weights(encoder: "SentenceTransformer") -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def fingerprint(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
