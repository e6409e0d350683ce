"""What benchmarks and estimates train on: rows of a token store, or rows in memory with the lengths of real text."""

from pathlib import Path
from typing import Any

from condenser.data.batching import BucketedBatches
from condenser.data.collate import Masking, Vocabulary
from condenser.data.mixing import Mixture
from condenser.data.pairs import Pairs
from condenser.data.steps import Steps
from condenser.data.store import SPECIAL_TOKENS, TokenStore
from condenser.data.synthetic import VOCABULARY, SyntheticStore
from condenser.data.tokenizers import load_tokenizer, vocabulary_size


def open_rows(store: str | None, max_length: int, n_synthetic: int) -> tuple[Any, Vocabulary, int]:
    """Rows, the ids that collation needs, and the size of the vocabulary."""
    if store is None:
        return SyntheticStore(n_synthetic, max_length), VOCABULARY, 30522
    rows = TokenStore(store, "train")
    tokenizer = load_tokenizer(Path(store) / "tokenizer")
    return rows, Vocabulary.of(tokenizer), vocabulary_size(tokenizer)


def steps_over(
    rows: Any,
    batch_size: int,
    micro_batches_per_step: int,
    vocabulary: Vocabulary = VOCABULARY,
    pairs: bool = False,
    **options: Any,
) -> Steps:
    """The optimizer steps over these rows (or over pairs of them, of one document), each once in an epoch; ``options``
    are those of `Steps`."""
    mixture = (Pairs if pairs else Mixture)([rows], seed=0)
    batches = BucketedBatches(
        mixture,
        batch_size=batch_size,
        micro_batches_per_step=micro_batches_per_step,
        seed=0,
        added=SPECIAL_TOKENS,
    )
    return Steps(mixture, batches, vocabulary, Masking(0), **options)
