"""Encoders to evaluate, by sentence-transformers: loading one, its untrained twin, what identifies it."""

import copy
import hashlib
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers.utils import logging

from condenser.data.store import tokenizer_hash
from condenser.data.tokenizers import is_path
from condenser.export import export, find_checkpoint
from condenser.models.backbones.base import longest_text
from condenser.models.files import is_run, reading
from condenser.online import ask_hub

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer as Encoder
else:
    Encoder = Any  # the library is imported where it is needed, as not every installation has it

TOKENS_AT_ONCE = 65_536  # on a GPU with room for them
ROWS_AT_ONCE = 32  # on a CPU, where more are no quicker
Kind = Literal["query", "document", "sentence"]


def load_encoder(name: str, max_length: int | None) -> Encoder:
    """Load a folder or a model of the hub; texts are cut to ``max_length`` tokens, or to the model's own setting.

    A plain Hugging Face folder gets CLS pooling, which is what Condenser trains; the library's own choice is the mean.
    Weights are fp32 whatever the file's dtype: in bf16, fine-tuning would round most of its steps away.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from sentence_transformers.util import is_sentence_transformer_model

    check_folder(name)
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
    if backbone(encoder) is None:
        raise ValueError(f"{name} is of {', '.join(type(module).__name__ for module in encoder)}, not a transformer")
    encoder.float()
    encoder.tokenizer.padding_side = "right"  # BERT's positions are counted from the left
    longest = longest_text(backbone(encoder).config)
    if max_length and longest and max_length > longest:
        raise ValueError(f"--max-length {max_length}: {name} takes at most {longest} tokens")
    lengths = (max_length or encoder.max_seq_length, longest)
    encoder.max_seq_length = min((n for n in lengths if n), default=None)
    return encoder


def check_folder(name: str) -> None:
    files = [Path(name) / "config.json", Path(name) / "modules.json"]
    if (is_path(name) or Path(name).exists()) and not any(file.is_file() for file in files):
        raise ValueError(f"no model folder at {name}: give a Hugging Face folder or what `condenser export` wrote")


def backbone(encoder: Encoder) -> Any:
    return encoder.transformers_model


def precision(encoder: Encoder) -> str:
    """What it is computed in, encoding and fine-tuning: "bf16-mixed" on GPUs that have the units for it, or "fp32"."""
    return "bf16-mixed" if encoder.device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"


def encoded(encoder: Encoder, texts: Sequence[str], kind: Kind = "sentence") -> Tensor:
    """fp32 vectors ``[N, H]`` on the encoder's device, with the prompt for this kind of text.

    sentence-transformers sorts the texts by length; here as many go together as there is memory for, in `precision`.
    ValueError for vectors that are not finite.
    """
    encode = getattr(encoder, {"query": "encode_query", "document": "encode_document", "sentence": "encode"}[kind])
    options: Any = {"convert_to_tensor": True, "show_progress_bar": sys.stderr.isatty() and len(texts) > 1000}
    with torch.autocast(encoder.device.type, torch.bfloat16, enabled=precision(encoder) == "bf16-mixed"):
        vectors = encode(list(texts), batch_size=rows_at_once(encoder), **options).float()
    if not vectors.isfinite().all():
        raise ValueError("the encoder's vectors are not finite: its weights are broken")
    return vectors


def rows_at_once(encoder: Encoder) -> int:
    """Texts of the encoder's length that are computed together: on a GPU as many as take a quarter of its free memory,
    at 64 bytes for a token and each of the hidden size's numbers."""
    at = encoder.device
    if at.type != "cuda":
        return ROWS_AT_ONCE
    free = torch.cuda.mem_get_info(at)[0] + torch.cuda.memory_reserved(at) - torch.cuda.memory_allocated(at)
    tokens = min(TOKENS_AT_ONCE, free // 4 // (64 * backbone(encoder).config.hidden_size))
    return int(max(1, tokens // (encoder.max_seq_length or 512)))


def prompt_of(encoder: Encoder, kind: Kind) -> str:
    """What goes before such a text, as in `encode_query`, `encode_document` and `encode`; empty for nothing."""
    names = {"query": ["query"], "document": ["document", "passage", "corpus"], "sentence": []}[kind]
    name: Any = next((name for name in names if name in encoder.prompts), encoder.default_prompt_name)
    return encoder.prompts.get(name) or ""


def tokens_read(encoder: Encoder, texts: Sequence[str], kind: Kind) -> list[str]:
    """What the encoder reads of texts: as much as it takes, less its prompt, of where its tokenizer does not cut."""
    prompt, found = prompt_of(encoder, kind), []
    options: Any = {"truncation": True, "max_length": encoder.max_seq_length, "return_offsets_mapping": True}
    for start in range(0, len(texts), 1000):
        some = [prompt + text for text in texts[start : start + 1000]]
        offsets = encoder.tokenizer(some, **options)["offset_mapping"]
        read = ([span for span in spans if any(span)] or [(0, 0)] for spans in offsets)  # special tokens are at 0
        for text, spans in zip(some, read, strict=True):
            found.append(text[max(len(prompt), spans[0][0]) : spans[-1][1]])
    return found


def reinitialised(encoder: Encoder, seed: int) -> Encoder:
    """The same architecture, tokenizer and pooling with weights drawn afresh."""
    twin = copy.deepcopy(encoder)
    torch.manual_seed(seed)
    fresh = type(backbone(twin))(backbone(twin).config)
    backbone(twin).load_state_dict(fresh.state_dict())
    for module in itertools.islice(twin, 1, None):  # such as a trained projection
        parts: Any = module.modules()
        for part in parts:
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    return twin


def describe(encoder: Encoder) -> dict[str, Any]:
    """What its embeddings depend on."""
    weights = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        weights.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    modules: Any = list(encoder)
    parts = [module.get_config_dict() for module in modules if hasattr(module, "get_config_dict")]
    config = backbone(encoder).config.to_dict() | {"_name_or_path": None}
    settings = json.dumps([parts, config, encoder.default_prompt_name, encoder.truncate_dim], sort_keys=True)
    return {
        "weights": weights.hexdigest()[:16],
        "config": hashlib.sha256(settings.encode()).hexdigest()[:16],
        "tokenizer": tokenizer_hash(encoder.tokenizer),
        "modules": [type(module).__name__ for module in encoder],
        "pooling": pooling_of(encoder),
        "similarity": encoder.similarity_fn_name,
        "prompts": encoder.prompts,
        "max_length": encoder.max_seq_length,
        "precision": precision(encoder),
    }


def pooling_of(encoder: Encoder) -> str | None:
    modes: Any = next((module.pooling_mode for module in encoder if hasattr(module, "pooling_mode")), None)
    return "+".join(modes) if isinstance(modes, tuple | list) else modes


@contextmanager
def model_folder(name: str) -> Iterator[str]:
    """A checkpoint or a run folder is exported for as long as it is needed; other models are left as they are."""
    if not is_run(name):
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        export(find_checkpoint(name), Path(folder) / "export")
        yield f"{folder}/export"
