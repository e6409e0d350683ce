"""Condenser (Gao & Callan, EMNLP 2021): a masked LM whose [CLS] vector must carry what a second, shallow head lacks.

    early = layers[:skip_from](embeddings)         the head sees the other tokens only as they were here...
    late  = layers[skip_from:](early)              ...and everything deeper only through the last [CLS]
    head  = c_head([late[CLS]; early[1:]])
    loss  = MLM(head) + MLM(late)                  one MLM head for both, read at masked positions only

Legend: B sequences, L padded length, T packed tokens, M masked tokens, Q query positions, H hidden size. States are
[B, L, H] or [1, T, H]; flattened, positions are counted over all sequences.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from condenser.models.attention import PACKED, Sequences, flat_positions, padding_mask, run_layer
from condenser.models.backbones.base import embed, parts
from condenser.models.losses import FUSED_AVAILABLE, predicted_right, token_losses


@dataclass
class CondenserOutput:
    """Cross-entropies of both streams at the M masked tokens, and their means; None for a stream switched off."""

    mlm_token_losses: Tensor | None  # [M] fp32, backbone ("late") stream
    head_mlm_token_losses: Tensor | None  # [M] fp32, head stream
    mlm_correct: Tensor | None = None  # [M] bool, asked for by `score=True`
    head_mlm_correct: Tensor | None = None
    last_hidden_state: Tensor | None = None  # [B, L, H], with pruned=False only
    skip_hidden_state: Tensor | None = None
    head_hidden_state: Tensor | None = None

    @property
    def mlm_loss(self) -> Tensor | None:
        return None if self.mlm_token_losses is None else self.mlm_token_losses.mean()

    @property
    def head_mlm_loss(self) -> Tensor | None:
        return None if self.head_mlm_token_losses is None else self.head_mlm_token_losses.mean()

    @property
    def loss_sum(self) -> Tensor:
        """Sum over masked tokens of both streams' losses: what training normalises by its own count."""
        return torch.stack([losses.sum() for losses in self.streams()]).sum()

    @property
    def loss(self) -> Tensor:
        return torch.stack([losses.mean() for losses in self.streams()]).sum()

    def streams(self) -> list[Tensor]:
        return [losses for losses in (self.mlm_token_losses, self.head_mlm_token_losses) if losses is not None]


class Condenser(nn.Module):
    """A Hugging Face masked LM ``lm`` with a Condenser head ``c_head`` (section 3.2 of the paper)."""

    def __init__(self, lm: PreTrainedModel, c_head: nn.ModuleList, skip_from: int, late_mlm: bool, pruned: bool):
        super().__init__()
        self.lm, self.c_head = lm, c_head
        self.skip_from, self.late_mlm, self.pruned = skip_from, late_mlm, pruned
        self.gradient_checkpointing = False  # recompute every layer in the backward pass, with the same dropout
        self.fused_loss: bool | None = None  # None: on CUDA, if torch offers it; see `token_losses`
        self.run_layer: Callable[..., Tensor] = run_layer
        self.condensed: Callable[[Tensor], Tensor] = identity  # what the head reads of the last [CLS] states [B, H]

    @classmethod
    def from_masked_lm(
        cls, lm: PreTrainedModel, skip_from: int = 6, n_head_layers: int = 2, late_mlm: bool = True, pruned: bool = True
    ) -> "Condenser":
        """Put a freshly initialised head on ``lm``, which is kept, not copied.

        Args:
            skip_from: the layer (1 .. N-1) whose output the head reads for all tokens but [CLS].
            n_head_layers: layers of the head, of the backbone's own class and initialisation; 0 is plain MLM.
            late_mlm: whether the backbone's own MLM loss is added to the head's.
            pruned: run the last layers only at the positions that the loss reads; same loss, same gradients.

        Raises:
            ValueError: a ``skip_from`` outside 1 .. N-1, or nothing to train.
        """
        layers = parts(lm).layers
        if n_head_layers < 0 or (n_head_layers == 0 and not late_mlm):
            raise ValueError(f"n_head_layers={n_head_layers}, late_mlm={late_mlm} leaves no loss to train on")
        if n_head_layers and not 1 <= skip_from < len(layers):
            raise ValueError(
                f"skip_from={skip_from} must be in 1..{len(layers) - 1}: the backbone has {len(layers)} layers"
            )
        c_head = nn.ModuleList(type(layers[0])(lm.config) for _ in range(n_head_layers))
        c_head.apply(lm._init_weights)
        return cls(lm, c_head, skip_from, late_mlm, pruned).train(lm.training)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_query: Tensor | None = None,
        max_seqlen: int = 0,
        max_query: int = 0,
        masked_index: Tensor | None = None,
        query_index: Tensor | None = None,
        masked_slot: Tensor | None = None,
        score: bool = False,
    ) -> CondenserOutput:
        """Losses of a padded or packed micro-batch (see `make_micro_batch` for their fields).

        Padded: ``input_ids``, ``attention_mask``, ``labels`` ``[B, L]`` (-100 = not scored); the positions that the
        loss reads are derived where the collator does not give them. Packed: ``input_ids``, ``position_ids``,
        ``labels`` ``[T]`` and all the rest; needs `pack`. ``score`` adds whether each masked token was predicted right.
        """
        assert labels is not None
        if masked_index is None:
            masked_index, query_index, masked_slot = flat_positions(labels)
        assert query_index is not None
        embeddings, layers, transform, decoder = parts(self.lm)
        early = late = embed(embeddings, input_ids, position_ids)
        if cu_seqlens is None:
            assert attention_mask is not None
            where = Sequences(query_index, padding_mask(self.lm.config, late, attention_mask))
            first = torch.arange(len(input_ids), device=input_ids.device)  # times L, or Q: where the [CLS] are
            cls_index = first * input_ids.shape[1]
            cls_slot = first * query_index.shape[1] if self.pruned else cls_index
        else:
            assert cu_seqlens_query is not None
            where = Sequences(query_index, None, cu_seqlens, cu_seqlens_query, max_seqlen, max_query)
            cls_index = cu_seqlens[:-1].long()
            cls_slot = cu_seqlens_query[:-1] if self.pruned else cls_index

        for depth, layer in enumerate(layers, start=1):
            late = self.run(layer, late, where, self.pruned and depth == len(layers))
            if depth == self.skip_from:
                early = late
        streams = [late] if self.late_mlm else []

        cls = late.flatten(0, 1).index_select(0, cls_slot)
        head = early.flatten(0, 1).index_copy(0, cls_index, self.condensed(cls)).view_as(early)
        for depth, layer in enumerate(self.c_head, start=1):
            head = self.run(layer, head, where, self.pruned and depth == len(self.c_head))
        streams += [head] if self.c_head else []

        read_index = masked_slot if self.pruned else masked_index
        assert read_index is not None
        read = [states.flatten(0, 1).index_select(0, read_index) for states in streams]
        hidden = transform(torch.cat(read))  # [2M, H]
        targets = labels.flatten().index_select(0, masked_index).repeat(len(streams))
        fused = FUSED_AVAILABLE and hidden.is_cuda if self.fused_loss is None else self.fused_loss
        fused = fused and torch.is_grad_enabled()  # validation wants its losses in fp32
        output = CondenserOutput(*self.by_stream(token_losses(hidden, decoder, targets, fused)))
        if score:
            output.mlm_correct, output.head_mlm_correct = self.by_stream(predicted_right(hidden, decoder, targets))
        if not self.pruned:
            output.last_hidden_state, output.skip_hidden_state, output.head_hidden_state = late, early, head
        return output

    def run(self, layer: nn.Module, hidden: Tensor, where: Sequences, pruned: bool) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(self.run_layer, layer, hidden, where, pruned, use_reentrant=False)
        return self.run_layer(layer, hidden, where, pruned)

    def by_stream(self, values: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Values ``[2M]`` of both streams (or ``[M]`` of the one there is) -> the backbone's, the head's."""
        if self.late_mlm and self.c_head:
            late, head = values.chunk(2)
            return late, head
        return (values, None) if self.late_mlm else (None, values)

    def pack(self) -> None:
        """Make the layers take packed micro-batches too.

        Raises:
            ValueError: the backbone has attention dropout, which the kernel has not.
        """
        dropout = self.lm.config.attention_probs_dropout_prob
        if dropout:
            raise ValueError(f"packed sequences need attention_probs_dropout_prob=0, not {dropout}")
        self.lm.set_attn_implementation(PACKED)

    def compile(self) -> None:
        """Compile the layers; all of them share few compiled functions, for any shape of a micro-batch."""
        self.run_layer = torch.compile(run_layer, dynamic=True)


def identity(cls: Tensor) -> Tensor:
    return cls


MODEL_INPUTS = set(inspect.signature(Condenser.forward).parameters) - {"self", "score"}  # fields of a micro-batch
