"""How an encoder's token vectors become one: a backbone under several poolings, by sentence-transformers' modules.

    cls, mean, max      of the last layer
    mean+max            both, the maximum first: twice the dimensions
    last<k>-cls         mean of the [CLS] vectors of the last k layers
    weighted-layers     weighted mean of the [CLS] vectors of all layers; the weights start equal and are fine-tuned

The mean over layers is `WeightedLayerPooling` before CLS pooling, which is the same as the mean of [CLS] vectors. A
module of our own would not load: sentence-transformers 6 refuses foreign classes without ``trust_remote_code``.
"""

import copy
import re
from typing import TYPE_CHECKING

from condenser.evaluation.encoders import backbone

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MODES = {"cls": "cls", "mean": "mean", "max": "max", "mean+max": ("max", "mean")}
POOLINGS = (*MODES, "last4-cls", "weighted-layers")  # for a study; any k for last<k>-cls


def with_pooling(encoder: "SentenceTransformer", name: str) -> "SentenceTransformer":
    """A copy of the encoder (Transformer, Pooling, perhaps Normalize) with another pooling.

    Raises:
        ValueError: an unknown pooling, more layers than there are, or an encoder with other modules.
    """
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling, WeightedLayerPooling

    layers = backbone(encoder).config.num_hidden_layers
    averaged = layers_averaged(name, layers)
    twin = copy.deepcopy(encoder)
    transformer, *rest = (module for module in twin if not isinstance(module, Pooling | WeightedLayerPooling))
    if not (isinstance(transformer, Transformer) and all(isinstance(module, Normalize) for module in rest)):
        modules = ", ".join(type(module).__name__ for module in encoder)
        raise ValueError(f"another pooling needs an encoder of Transformer, Pooling and Normalize, not of {modules}")
    size = transformer.get_embedding_dimension()
    backbone(twin).config.output_hidden_states = averaged > 0  # hands all layers to the module that averages them
    del twin[1:]
    if averaged:
        average = WeightedLayerPooling(size, num_hidden_layers=layers, layer_start=layers + 1 - averaged)
        twin.append(average.requires_grad_(name == "weighted-layers"))
    for module in (Pooling(size, MODES.get(name, "cls")), *rest):
        twin.append(module)
    return twin.to(encoder.device)


def layers_averaged(name: str, layers: int) -> int:
    """How many of the last layers a pooling averages, 0 if it takes the last one as it is."""
    if name in MODES:
        return 0
    if name == "weighted-layers":
        return layers
    last = re.fullmatch(r"last([1-9]\d*)-cls", name)
    if not last:
        raise ValueError(f"no pooling {name!r}: there are {', '.join(MODES)}, last<k>-cls and weighted-layers")
    if int(last[1]) > layers:
        raise ValueError(f"pooling {name!r}: the encoder has {layers} layers")
    return int(last[1])
