"""Encoders to evaluate, by sentence-transformers: loading one, its untrained twin, fine-tuning, what identifies it."""

import copy
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condenser.data.corpus import is_path
from condenser.data.store import tokenizer_hash
from condenser.models.files import reading

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
    logging.set_verbosity_error()  # the MLM head, unused here, would be reported at length
    torch.manual_seed(0)  # a pooler that the file lacks is drawn at random: unused, but part of the weights' hash
    with reading(name):
        if is_sentence_transformer_model(name):
            encoder = SentenceTransformer(name, trust_remote_code=False)
        else:
            parts = ("config_kwargs", "model_kwargs", "processor_kwargs")
            transformer = Transformer(name, **{part: {"trust_remote_code": False} for part in parts})
            encoder = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "cls")])
    positions = getattr(backbone(encoder).config, "max_position_embeddings", None)
    if max_length and positions and max_length > positions:
        raise ValueError(f"--max-length {max_length}: {name} takes at most {positions} tokens")
    encoder.max_seq_length = max_length or encoder.max_seq_length
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


def fine_tune(encoder: "SentenceTransformer", pairs: list[tuple[str, str]], tuning: dict[str, Any]) -> None:
    """Train in place on (query, relevant passage); a query's negatives are the other passages of its batch.

    By sentence-transformers' trainer: AdamW, 10 % warm-up, linear decay, gradient norm 1, fp32. On a CPU the result is
    a function of the arguments.

    Args:
        tuning: steps, batch_size, learning_rate, seed
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers
    from sentence_transformers.util import SimilarityFunction
    from torch.nn import Dropout
    from transformers import PrinterCallback

    # no dropout: its noise is larger than the first differences between an untrained encoder's [CLS] vectors
    backbone(encoder).config.attention_probs_dropout_prob = 0.0
    for module in encoder.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    queries, passages = zip(*pairs, strict=True)
    similarity = SimilarityFunction.to_similarity_fn(encoder.similarity_fn_name)
    scale = 20.0 if encoder.similarity_fn_name == "cosine" else 1.0
    with tempfile.TemporaryDirectory() as folder:  # the trainer wants one; nothing is kept of it
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=tuning["steps"],
            per_device_train_batch_size=tuning["batch_size"],
            learning_rate=tuning["learning_rate"],
            lr_scheduler_type="linear",
            warmup_steps=tuning["steps"] // 10,
            seed=tuning["seed"],
            batch_sampler=BatchSamplers.NO_DUPLICATES,  # a passage would be its own negative
            prompts={column: prompt for column, prompt in encoder.prompts.items() if prompt},
            use_cpu=encoder.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=not sys.stderr.isatty(),
        )
        arguments._n_gpu = 1  # on several GPUs the trainer would multiply the batch
        trainer = SentenceTransformerTrainer(
            model=encoder,
            args=arguments,
            train_dataset=Dataset.from_dict({"query": queries, "document": passages}),
            loss=MultipleNegativesRankingLoss(encoder, scale=scale, similarity_fct=similarity),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    encoder.eval()


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
        "pooling": next((module.pooling_mode for module in encoder if hasattr(module, "pooling_mode")), None),
        "similarity": encoder.similarity_fn_name,
        "prompts": encoder.prompts,
        "max_length": encoder.max_seq_length,
    }
