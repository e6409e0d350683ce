"""RetroMAE (Xiao & Liu, EMNLP 2022): a decoder of one layer rebuilds the whole text, and has little but [CLS] to go by.

    late    = encoder(masked text)                          a moderate rate: data.mask_probability, 30 % in the paper
    query   = late[CLS] + position of i                     (equation 3)
    context = late[CLS], embeddings of the text             position i sees [CLS] and a random half of the others,
    decoded = layer(query, context)                         never itself (equations 4 to 6)
    loss    = MLM(late) + MLM(decoded at all tokens)        one MLM head for both

Which positions a position sees is a hash of (sample, visit, i, j), so it is the same on every device.

Legend: B sequences, L positions of a laid-out sequence, T tokens, M masked tokens, H hidden size.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from condenser.models.attention import Bounds, bounds_of, take
from condenser.models.flops import Work, training_flops
from condenser.models.objective import Objective, Term, identity

WORD = 0xFFFFFFFF  # 32 bits


class RetroMAE(Objective):
    """An encoder and its enhanced decoder.

    Args:
        lm: a Hugging Face masked LM, kept, not copied.
        decoder_mask_rate: share of the other positions that a position does not see, 50 to 70 % in the paper.
        pruned: run the encoder's last layer only at [CLS] and the masked tokens; same loss, same gradients.

    Raises:
        ValueError: a rate that is not between 0 and 1.
    """

    asks: ClassVar[tuple[str, ...]] = ("original_ids", "keys")
    terms = ("mlm", "decoder")
    head_term = "decoder"
    vocabulary_share = 1.3

    def __init__(self, lm: PreTrainedModel, decoder_mask_rate: float = 0.5, pruned: bool = True):
        super().__init__(lm)
        if not 0 < decoder_mask_rate < 1:
            raise ValueError(f"decoder_mask_rate={decoder_mask_rate} must lie between 0 and 1")
        self.decoder_mask_rate, self.pruned = decoder_mask_rate, pruned
        self.decoder = self.backbone.fresh_layer()
        self.decoder.apply(lm._init_weights)
        self.n_layers += 1
        self.condensed: Callable[[Tensor], Tensor] = identity  # what the decoder reads of the last [CLS] states [B, H]

    def losses(self, batch: dict[str, Any], score: bool = False) -> dict[str, Term]:
        return self.cls_and_losses(batch, score)[1]

    def cls_and_losses(self, batch: dict[str, Any], score: bool = False) -> tuple[Tensor, dict[str, Term]]:
        late, _, _ = self.encoded(batch, pruned=self.pruned)
        cls = self.cls_of(late, batch, self.pruned)
        masked = take(late, batch["masked_slot" if self.pruned else "masked_index"])
        decoded = self.decoded(batch, self.condensed(cls))
        streams = {
            "mlm": (masked, batch["labels"], "n_masked"),
            "decoder": (decoded, batch["original_ids"], "n_ordinary"),
        }
        return cls, self.scored(streams, score)

    def decoded(self, batch: dict[str, Any], cls: Tensor) -> Tensor:
        """The decoder's states ``[T, H]`` from the encoder's ``cls`` ``[B, H]``."""
        bounds, position_ids = batch["cu_seqlens"], batch["position_ids"]
        rows = bounds_of(bounds, batch["max_seqlen"], len(position_ids), kernel=False)
        assert rows.slots is not None
        of_token = cls.index_select(0, rows.slots // rows.longest)  # each token's sequence's
        original = torch.where(batch["original_ids"] < 0, batch["input_ids"], batch["original_ids"])
        context = self.backbone.embed(original, position_ids, batch.get("token_type_ids"))
        context = torch.where((position_ids == 0)[:, None], of_token, context)
        query = of_token + self.backbone.position_states(position_ids).to(of_token.dtype)
        seen = self.seen(batch["keys"], rows)
        return self.run_between(self.decoder, query, context, rows._replace(mask=seen))

    def seen(self, keys: Tensor, rows: Bounds) -> Tensor:
        """Which positions each position sees ``[B, 1, L, L]``: the first, and others by a hash of ``keys`` ``[B]``."""
        position = torch.arange(rows.longest, device=keys.device)
        of_query = mixed(keys[:, None] ^ mixed(position + 1))  # [B, L]
        drawn = mixed(of_query[:, :, None] ^ mixed(position + 0x10001))  # [B, L, L]
        chosen = drawn >= int(self.decoder_mask_rate * (WORD + 1))
        chosen = chosen & (position[:, None] != position) & rows.mask[:, 0]  # type: ignore[index]
        return (chosen | (position == 0))[:, None]

    def flops(self, work: Work) -> float:
        config = self.lm.config
        h, i, v = config.hidden_size, config.intermediate_size, config.vocab_size
        decoder = (8 * h * h + 4 * h * i) * work.tokens + 4 * h * work.pairs
        ordinary = work.tokens - 2 * (work.queries - work.masked)
        return training_flops(config, 0, True, work) + 3.0 * (decoder + ordinary * (2 * h * h + 2 * h * v))


def mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers whose output bits each depend on all input bits (Wellons' lowbias32)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & WORD
    return x ^ (x >> 16)
