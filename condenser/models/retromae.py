"""RetroMAE (Xiao & Liu, EMNLP 2022): a decoder of one layer rebuilds the whole text, and has little but [CLS] to go by.

    late    = encoder(masked text)                          a moderate rate: data.mask_probability, 30 % in the paper
    query   = late[CLS] + position of i                     (equation 3)
    context = late[CLS], embeddings of the text             position i sees [CLS] and a random half of the other
    decoded = layer(query, context)                         tokens, not itself (equations 4 to 6)
    loss    = MLM(late) + MLM(decoded at all tokens)        one MLM head for both

Which positions a position sees is a hash of (sample, visit, i, j), so it is the same on every device.

DupMAE (Xiao et al., ACL 2023) teaches the other tokens' states too, from which a bag of words is to be read:

    word    = max over tokens of the MLM head's logits      [V] for each sequence
    loss   += cross-entropy of ``word`` with the set of its words, each alike

Legend: B sequences, L positions of a laid-out sequence, T tokens, M masked tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from condenser.models.attention import Bounds, bounds_of, take
from condenser.models.dropout import mixed
from condenser.models.flops import Sizes, Work, training_flops
from condenser.models.losses import at_least_fp32, logits_of
from condenser.models.objective import Objective, Term, identity

LEAST = -1e4  # a logit that has no probability in fp32


class RetroMAE(Objective):
    """An encoder and its enhanced decoder.

    Args:
        decoder_mask_rate: share of the other positions that a position does not see, 50 to 70 % in the paper.
        pruned: run the encoder's last layer only at [CLS] and the masked tokens; same loss, same gradients.

    Raises:
        ValueError: a rate that is not between 0 and 1.
    """

    asks: ClassVar[tuple[str, ...]] = ("original_ids", "keys")
    head_term = "decoder"

    def __init__(self, lm: PreTrainedModel, decoder_mask_rate: float = 0.5, pruned: bool = True):
        super().__init__(lm)
        if not 0 < decoder_mask_rate < 1:
            raise ValueError(f"decoder_mask_rate={decoder_mask_rate} must lie between 0 and 1")
        self.decoder_mask_rate, self.pruned = decoder_mask_rate, pruned
        self.decoder = self.backbone.fresh_layer()
        self.decoder.apply(lm._init_weights)
        self.n_layers += 1
        self.cls_hook: Callable[[Tensor], Tensor] = identity  # what the decoder reads of the last [CLS] states [B, H]

    def cls_and_losses(self, batch: dict[str, Any], score: bool = False) -> tuple[Tensor, dict[str, Term]]:
        late, _, _ = self.encoded(batch, pruned=self.pruned)
        cls = self.cls_of(late, batch, self.pruned)
        return cls, self.terms_of(late, cls, batch, score)

    def terms_of(self, late: Tensor, cls: Tensor, batch: dict[str, Any], score: bool) -> dict[str, Term]:
        """Of the encoder's last states ``[Q, H]``, ``[T, H]`` where it is not ``pruned``, and those at [CLS]."""
        masked = take(late, batch["masked_slot" if self.pruned else "masked_index"])
        decoded = self.decoded(batch, self.cls_hook(cls))
        streams = {
            "mlm": (masked, batch["labels"], "n_masked"),
            "decoder": (decoded, batch["original_ids"], "n_ordinary"),
        }
        return self.mlm_terms(streams, score)

    def decoded(self, batch: dict[str, Any], cls: Tensor) -> Tensor:
        """The decoder's states ``[T, H]`` from the encoder's ``cls`` ``[B, H]``."""
        bounds, position_ids = batch["cu_seqlens"], batch["position_ids"]
        rows = bounds_of(bounds, batch["max_seqlen"], len(position_ids), kernel=False)
        assert rows.slots is not None
        of_token = cls.index_select(0, rows.slots // rows.longest)  # each token's sequence's
        original = torch.where(batch["original_ids"] < 0, batch["input_ids"], batch["original_ids"])
        context = self.backbone.embed(original, position_ids, batch.get("token_type_ids"))
        context = context.index_copy(0, bounds[:-1], cls.to(context.dtype))
        query = of_token + self.backbone.position_states(position_ids).to(of_token.dtype)
        seen = self.seen(batch["keys"], rows)
        seeing = rows._replace(mask=seen)
        return self.backbone.last(self.run_cross(self.decoder, query, context, seeing, position_ids))

    def seen(self, keys: Tensor, rows: Bounds) -> Tensor:
        """Which positions each position sees ``[B, 1, L, L]``: the first, and others by a hash of ``keys`` ``[B]``."""
        position = torch.arange(rows.longest, dtype=torch.int32, device=keys.device)
        of_query = mixed(keys.int()[:, None] ^ mixed(position + 1))  # [B, L]
        drawn = mixed(of_query[:, :, None] ^ mixed(position + 0x10001)) >> 8 & 0xFFFFFF  # [B, L, L], of 24 bits
        chosen = drawn >= round(self.decoder_mask_rate * 2**24)
        chosen = chosen & (position[:, None] != position) & rows.mask[:, 0]  # type: ignore[index]
        return (chosen | (position == 0))[:, None]

    def scored_share(self, masked: float) -> float:
        return masked + 1

    def flops(self, work: Work) -> float:
        sizes = Sizes.of(self.lm.config)
        h, i = sizes.h, sizes.i
        decoder = (8 * h * h + 4 * h * i) * work.tokens + 4 * h * work.pairs
        n_sequences = work.queries - work.masked  # each is read at [CLS] and at its masked tokens
        ordinary = work.tokens - 2 * n_sequences  # without [CLS] and [SEP]
        return training_flops(self.lm.config, 0, True, work) + 3.0 * (decoder + ordinary * sizes.mlm_head)


class DupMAE(RetroMAE):
    """RetroMAE whose other tokens must tell which words a text has.

    Args:
        bag_of_words_weight: of the third loss.

    Raises:
        ValueError: a rate that is not between 0 and 1, a weight that is negative.
    """

    def __init__(self, lm: PreTrainedModel, decoder_mask_rate: float = 0.5, bag_of_words_weight: float = 1.0):
        super().__init__(lm, decoder_mask_rate, pruned=False)
        if not bag_of_words_weight >= 0:
            raise ValueError(f"bag_of_words_weight={bag_of_words_weight} must not be negative")
        self.bag_of_words_weight = bag_of_words_weight

    def terms_of(self, late: Tensor, cls: Tensor, batch: dict[str, Any], score: bool) -> dict[str, Term]:
        bag = Term(self.bag_losses(late, batch).sum(), "n_sequences", self.bag_of_words_weight)
        return super().terms_of(late, cls, batch, score) | {"bag_of_words": bag}

    def bag_losses(self, late: Tensor, batch: dict[str, Any]) -> Tensor:
        """Of each sequence ``[B]``; 0 where it has no ordinary token."""
        bounds, original = batch["cu_seqlens"], batch["original_ids"]
        n, ordinary = len(bounds) - 1, original >= 0
        rows = bounds_of(bounds, batch["max_seqlen"], len(original), kernel=False)
        assert rows.slots is not None
        logits = logits_of(self.backbone.transform(late), self.backbone.decoder)
        logits = logits.masked_fill(~ordinary[:, None], LEAST)
        laid_out = logits.new_full((n * rows.longest, logits.shape[1]), LEAST).index_copy(0, rows.slots, logits)
        strongest = laid_out.view(n, rows.longest, -1).amax(1)  # [B, V]
        word = rows.slots // rows.longest * logits.shape[1] + original.clamp(min=0)
        times = torch.zeros(strongest.numel(), dtype=torch.float32, device=late.device)
        times = times.index_add(0, word, ordinary.float())
        words = (times > 0).view(strongest.shape)
        nats = -at_least_fp32(strongest).log_softmax(-1)
        return (nats * words).sum(1) / words.sum(1).clamp(min=1)

    def scored_share(self, masked: float) -> float:
        return masked + 2

    def flops(self, work: Work) -> float:
        config = self.lm.config
        everywhere = work._replace(queries=work.tokens, query_pairs=work.pairs)
        last = training_flops(config, 0, False, everywhere) - training_flops(config, 0, False, work)
        return super().flops(work) + last + 3.0 * work.tokens * Sizes.of(config).mlm_head
