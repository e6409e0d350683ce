"""How weights begin, and vocabularies that are filled up to a round size.

Weights are drawn from a normal distribution, whose deviation is ``initializer_range`` of the backbone's configuration,
0.02 as in BERT: of states of length sqrt(H), as LayerNorm makes them, logits then have deviation 0.02 * sqrt(H), half a
nat at 768, so the first loss is little above log V, that of knowing nothing. With a much smaller one tokens are hardly
told apart, and training is slow to begin; with a larger one it begins by being sure of what is wrong.
"""

from torch import nn
from transformers import PreTrainedModel

SIZE_BEFORE = "vocab_size_before_filling"  # in a configuration


def draw_truncated(module: nn.Module, std: float) -> None:
    """Draw what `module` has of linear layers and embeddings anew, with nothing beyond two standard deviations, as the
    first BERT did; rows of padding stay 0."""
    for each in module.modules():
        if isinstance(each, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(each.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(each, nn.Embedding) and each.padding_idx is not None:
            each.weight.data[each.padding_idx] = 0


def fill_vocabulary(lm: PreTrainedModel, multiple: int) -> None:
    """Add rows to the embeddings, and to the decoder, until there is a ``multiple`` of them; no token has their ids."""
    size = lm.config.vocab_size
    if size % multiple:
        lm.resize_token_embeddings(size + -size % multiple, mean_resizing=False)
        part_biases(lm)
        setattr(lm.config, SIZE_BEFORE, size)


def cut_vocabulary(lm: PreTrainedModel) -> None:
    """Take such rows off again."""
    if (size := getattr(lm.config, SIZE_BEFORE, None)) is not None:
        lm.resize_token_embeddings(size)
        part_biases(lm)
        delattr(lm.config, SIZE_BEFORE)


def part_biases(lm: PreTrainedModel) -> None:
    """Give an untied decoder a bias of its own: as Hugging Face resizes it, it shares one that nothing reads, and would
    be saved without."""
    decoder = lm.get_output_embeddings()
    if not lm.config.tie_word_embeddings and decoder.bias is not None:
        if hasattr(lm, "lm_head"):
            lm.lm_head.bias = decoder.bias  # of which RoBERTa's kind would keep the old size
        decoder.bias = nn.Parameter(decoder.bias.detach().clone())
