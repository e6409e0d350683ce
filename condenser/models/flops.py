"""Floating-point operations of a Condenser, counted from shapes, and what devices can do.

Legend: H hidden size, I intermediate size, V vocabulary, E width of the embeddings.
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


GATED = ("modernbert",)
TOKENS_AT_ONCE = 65_536  # of a pass, which keep any GPU busy


class Work(NamedTuple):
    """What a batch makes the model compute; all real positions for what is needed, padding too for what is done."""

    tokens: int  # positions
    pairs: int  # of a query and a key, in a layer that runs everywhere
    queries: int  # positions of the last layers
    query_pairs: int  # of a query and a key, in these
    masked: int  # positions at which the vocabulary is scored, per stream

    @classmethod
    def of_real_tokens(cls, batch: Any) -> "Work":
        """The least that the losses of a `StepBatch` need: last layers at the queries alone, no dummies."""
        n = {name: batch.total(name) for name in ("n_tokens", "pairs", "n_sequences", "n_masked", "query_pairs")}
        return cls(n["n_tokens"], n["pairs"], n["n_sequences"] + n["n_masked"], n["query_pairs"], n["n_masked"])


class Sizes(NamedTuple):
    """Of a model, whatever its configuration calls them."""

    h: int
    i: int
    v: int
    e: int
    layers: int

    @classmethod
    def of(cls, config: Any) -> "Sizes":
        h = config.hidden_size
        i = getattr(config, "intermediate_size", None) or config.hidden_dim
        i = i * 3 // 2 if config.model_type in GATED else i  # three matrices instead of two
        layers = config.num_hidden_layers * getattr(config, "inner_group_num", 1)  # of ALBERT's, each is several
        return cls(h, i, config.vocab_size, getattr(config, "embedding_size", h), layers)

    @property
    def mlm_head(self) -> int:
        """Operations of the MLM head at a position."""
        return 2 * self.h * self.e + 2 * self.e * self.v


def training_flops(config: Any, n_head_layers: int, late_mlm: bool, work: Work) -> float:
    """Operations (a multiplication and an addition are two) of matrix products, forward and backward: three times the
    forward pass. Embeddings, normalisation and the like are left out; so is what gradient checkpointing repeats."""
    sizes = Sizes.of(config)
    h, i = sizes.h, sizes.i
    whole = (8 * h * h + 4 * h * i) * work.tokens + 4 * h * work.pairs
    last = 4 * h * h * work.tokens + (4 * h * h + 4 * h * i) * work.queries + 4 * h * work.query_pairs
    n_last = 1 + (n_head_layers > 0)
    n_streams = late_mlm + (n_head_layers > 0)
    scored = n_streams * work.masked * sizes.mlm_head
    return 3.0 * ((sizes.layers + n_head_layers - n_last) * whole + n_last * last + scored)


def bf16_peak(device_name: str) -> float | None:
    """Operations per second at most, None where the device is not known."""
    return next((peak * 1e12 for part, peak in BF16_PEAKS.items() if part in device_name), None)


def affordable_tokens(config: Any, n_layers: int, memory: float, checkpointing: bool, scored_share: float = 0.3) -> int:
    """Tokens of a pass that surely fit into a GPU's ``memory`` (bytes), up to `TOKENS_AT_ONCE`.

    Counted are, of each token, what a layer keeps for the backward pass (in bf16; its input alone with
    ``checkpointing``), and logits of a ``scored_share`` of the tokens (15 % in two streams); of each weight, 20
    bytes.
    """
    h, i, v, e, _ = Sizes.of(config)
    layer, weights = 24 * h + 6 * i, n_layers * (4 * h * h + 2 * h * i) + v * e
    kept = 2 * h * n_layers + layer if checkpointing else n_layers * layer
    return int(max(1, min(TOKENS_AT_ONCE, (0.8 * memory - 20 * weights) / (kept + scored_share * v * 10))))
