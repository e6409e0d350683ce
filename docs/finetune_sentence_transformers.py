"""Fine-tune an export for retrieval with sentence-transformers: [CLS] vectors, dot product, negatives in the batch.

    python docs/finetune_sentence_transformers.py my-condenser-export --output my-retriever \\
        --dataset sentence-transformers/msmarco-co-condenser-margin-mse-sym-mnrl-mean-v1 --subset triplet

The dataset is one of the hub, or a .jsonl or .parquet file, or a folder of them. Columns count by their order:
question, relevant passage, then any number of passages that are not relevant. The other passages of a batch are
negatives too. Pooling, similarity and length are the export's own; the result is a sentence-transformers folder.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from sentence_transformers.util import SimilarityFunction


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what `condenser export` wrote")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--dataset", required=True, help="name on the hub, a .jsonl or .parquet file, or a folder")
    parser.add_argument("--subset", help="of a dataset of the hub")
    parser.add_argument("--batch-size", type=int, default=64, help="questions a step")
    parser.add_argument("--mini-batch", type=int, default=32, help="texts computed at a time: memory, not the result")
    parser.add_argument("--learning-rate", type=float, default=5e-6, help="its peak, after 10 %% of the steps")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop earlier")
    parser.add_argument("--max-length", type=int, help="tokens of a text (default: the export's)")
    options = parser.parse_args(arguments)

    examples = read(options.dataset, options.subset)
    model = SentenceTransformer(options.model, trust_remote_code=False)
    model.max_seq_length = options.max_length or model.max_seq_length
    loss = CachedMultipleNegativesRankingLoss(
        model,
        scale=1.0,  # raw dot products, as pre-training's vectors are not of one length
        similarity_fct=SimilarityFunction.to_similarity_fn(model.similarity_fn_name),
        mini_batch_size=options.mini_batch,
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = SentenceTransformerTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=0.1,
            num_train_epochs=options.epochs,
            max_steps=options.max_steps,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),  # autocast; the weights stay in fp32
            batch_sampler=BatchSamplers.NO_DUPLICATES,  # a passage would be its own negative
            save_strategy="no",
            report_to="none",
        )
        SentenceTransformerTrainer(model=model, args=settings, train_dataset=examples, loss=loss).train()
    model.save_pretrained(options.output)
    print(f"wrote {options.output}")


def read(name: str, subset: str | None) -> Dataset:
    path = Path(name)
    if not path.exists():
        return load_dataset(name, subset, split="train")
    files = sorted([*path.glob("*.jsonl*"), *path.glob("*.parquet")]) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{name} holds no .jsonl or .parquet files")
    kind = "parquet" if files[0].suffix == ".parquet" else "json"
    return load_dataset(kind, data_files=[str(file) for file in files], split="train")


if __name__ == "__main__":
    main()
