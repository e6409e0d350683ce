"""DeBERTa of the second and third version: BERT's layers, whose scores also hold what a query says of a distance, and
what a key does (disentangled attention, He et al. 2021)."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from condenser.models.attention import PLAIN, Scores
from condenser.models.backbones.bert import Bert, linear
from condenser.models.dropout import drop


class Deberta(Bert):
    model_types = ("deberta-v2",)
    projections: ClassVar[tuple[str, ...]] = ("query_proj", "key_proj", "value_proj")
    has_kernel = False
    widens_first = True

    def __init__(self, lm: PreTrainedModel):
        super().__init__(lm)
        if self.lm.deberta.encoder.conv is not None:
            raise ValueError("a deberta-v2 with a convolution (conv_kernel_size) is not supported")
        if not self.lm.config.legacy:
            raise ValueError("a deberta-v2 with another MLM head (legacy: false) is not supported")

    @property
    def widening(self) -> nn.Linear | None:
        return self.embeddings.embed_proj

    def scores(self, layer: Any) -> Scores:
        of = layer.attention.self
        if not of.relative_attention:
            return PLAIN
        kinds = [kind for kind in ("c2p", "p2c") if kind in of.pos_att_type]
        scale = (of.attention_head_size * (1 + len(kinds))) ** -0.5

        def bias(distances: Tensor, query: Tensor, key: Tensor) -> Tensor:
            span = of.pos_ebd_size
            behind = -distances
            if of.position_buckets > 0:
                behind = make_log_bucket_position(behind, of.position_buckets, of.max_relative_positions).long()
            index = (behind + span).clamp(0, 2 * span - 1)[:, None]  # [B or 1, 1, Q, K]
            rows = drop(self.lm.deberta.encoder.get_rel_embedding(), of.pos_dropout)[: 2 * span]
            found = query.new_zeros(())
            shape = (*query.shape[:3], key.shape[2])
            if "c2p" in kinds:
                of_rows = self.of_heads(rows, of.key_proj if of.share_att_key else of.pos_key_proj, query)
                found = found + (query @ of_rows.mT).gather(-1, index.expand(shape))
            if "p2c" in kinds:
                of_rows = self.of_heads(rows, of.query_proj if of.share_att_key else of.pos_query_proj, query)
                found = found + (key @ of_rows.mT).gather(-1, index.mT.expand(*shape[:2], shape[3], shape[2])).mT
            return found * scale

        return Scores(scale=scale, bias=bias)

    def of_heads(self, rows: Tensor, layer: nn.Linear, like: Tensor) -> Tensor:
        """A projection of the embeddings of distances: ``[A, 2 * span, D]``."""
        return linear(rows, layer).unflatten(-1, (-1, like.shape[-1])).transpose(0, 1).to(like.dtype)
