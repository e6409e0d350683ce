"""Condenser (Gao & Callan, EMNLP 2021): a masked LM whose [CLS] vector must carry what a second, shallow head lacks.

    early = layers[:skip_from](embeddings)         the head sees the other tokens only as they were here...
    late  = layers[skip_from:](early)              ...and everything deeper only through the last [CLS]
    head  = c_head([late[CLS]; early[1:]])
    loss  = MLM(head) + MLM(late)                  one MLM head for both, read at masked positions only

Legend: B sequences, L padded length, M masked tokens, Q query positions of a sequence, H hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from condenser.models.attention import checkpoint_layers, flat_positions, padding_mask, run_layer
from condenser.models.backbones import parts


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
        attention_mask: Tensor,
        labels: Tensor,
        masked_index: Tensor | None = None,
        query_index: Tensor | None = None,
        masked_slot: Tensor | None = None,
        score: bool = False,
    ) -> CondenserOutput:
        """Losses of a padded batch: ``input_ids``, ``attention_mask``, ``labels`` ``[B, L]`` (-100 = not scored).

        The collator gives the positions that the loss reads (see `flat_positions`); without them they are derived.
        ``score`` adds whether each masked token was predicted right.
        """
        if masked_index is None:
            masked_index, query_index, masked_slot = flat_positions(labels)
        embeddings, layers, mlm_head = parts(self.lm)
        at = query_index if self.pruned else None
        read_index = masked_slot if self.pruned else masked_index

        early = late = embeddings(input_ids)
        mask = padding_mask(self.lm.config, late, attention_mask)
        for depth, layer in enumerate(layers, start=1):
            late = run_layer(layer, late, mask, at if depth == len(layers) else None)
            if depth == self.skip_from:
                early = late
        streams = [late] if self.late_mlm else []

        head = torch.cat([late[:, :1], early[:, 1:]], dim=1)  # pruned or not, [CLS] comes first
        for depth, layer in enumerate(self.c_head, start=1):
            head = run_layer(layer, head, mask, at if depth == len(self.c_head) else None)
        streams += [head] if self.c_head else []

        logits = mlm_head(torch.cat([hidden.flatten(0, 1)[read_index] for hidden in streams]))  # [2M, V]
        targets = labels.flatten()[masked_index].repeat(len(streams))
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        output = CondenserOutput(*self.by_stream(losses))
        if score:
            output.mlm_correct, output.head_mlm_correct = self.by_stream(logits.detach().argmax(-1) == targets)
        if not self.pruned:
            output.last_hidden_state, output.skip_hidden_state, output.head_hidden_state = late, early, head
        return output

    def by_stream(self, values: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Values ``[2M]`` of both streams (or ``[M]`` of the one there is) -> the backbone's, the head's."""
        if self.late_mlm and self.c_head:
            late, head = values.chunk(2)
            return late, head
        return (values, None) if self.late_mlm else (None, values)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute every layer, the head's too, in the backward pass."""
        checkpoint_layers(parts(self.lm).layers)
        checkpoint_layers(self.c_head)
