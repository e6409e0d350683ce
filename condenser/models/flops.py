"""Floating-point operations of a Condenser, counted from shapes, and what devices can do.

Legend: H hidden size, I intermediate size, V vocabulary.
"""

from typing import Any, NamedTuple

BF16_PEAKS = {  # dense bf16 TFLOP/s of data sheets, by what the device's name contains; the first match counts
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A40": 149.7,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


class Work(NamedTuple):
    """What a batch makes the model compute; all real positions for what is needed, padding too for what is done."""

    tokens: int  # positions
    pairs: int  # of a query and a key, in a layer that runs everywhere
    queries: int  # positions of the last layers
    query_pairs: int  # of a query and a key, in these
    masked: int  # positions at which the vocabulary is scored, per stream

    @classmethod
    def needed(cls, batch: dict[str, Any]) -> "Work":
        """The least that the losses of a micro-batch need: no padding, last layers at the queries alone."""
        queries = batch["n_masked"] + len(batch["sample_ids"])
        return cls(batch["n_tokens"], batch["pairs"], queries, batch["query_pairs"], batch["n_masked"])


def training_flops(config: Any, n_head_layers: int, late_mlm: bool, work: Work) -> float:
    """Operations (a multiplication and an addition are two) of matrix products, forward and backward: three times the
    forward pass. Embeddings, normalisation and the like are left out; so is what gradient checkpointing repeats."""
    h, i, v = config.hidden_size, config.intermediate_size, config.vocab_size
    whole = (8 * h * h + 4 * h * i) * work.tokens + 4 * h * work.pairs
    last = 4 * h * h * work.tokens + (4 * h * h + 4 * h * i) * work.queries + 4 * h * work.query_pairs
    n_last = 1 + (n_head_layers > 0)
    n_streams = late_mlm + (n_head_layers > 0)
    scored = n_streams * work.masked * (2 * h * h + 2 * h * v)
    return 3.0 * ((config.num_hidden_layers + n_head_layers - n_last) * whole + n_last * last + scored)


def bf16_peak(device_name: str) -> float | None:
    """Operations per second at most, None where the device is not known."""
    return next((peak * 1e12 for part, peak in BF16_PEAKS.items() if part in device_name), None)
