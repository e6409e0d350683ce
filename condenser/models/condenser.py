"""Condenser (Gao & Callan, EMNLP 2021): a masked LM whose [CLS] vector must carry what a second, shallow head lacks.

    early = layers[:skip_from](embeddings)         the head sees the other tokens only as they were here...
    late  = layers[skip_from:](early)              ...and everything deeper only through the last [CLS]
    head  = c_head([late[CLS]; early[1:]])
    loss  = MLM(head) + MLM(late)                  one MLM head for both, read at masked positions only

Legend: B sequences, L padded length, T tokens of all sequences, Q positions read in the last layers ([CLS] and masked
tokens), M masked tokens, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from condenser.models.attention import take
from condenser.models.flops import Work, training_flops
from condenser.models.objective import Objective, Term, identity
from condenser.models.padded import flattened, padded


@dataclass
class CondenserOutput:
    """Mean cross-entropies over masked tokens."""

    loss: Tensor  # their weighted sum
    means: dict[str, Tensor]  # of each stream that is on
    last_hidden_state: Tensor | None = None  # [B, L, H], with pruned=False only; 0 at padding
    skip_hidden_state: Tensor | None = None
    head_hidden_state: Tensor | None = None

    @property
    def mlm_loss(self) -> Tensor | None:  # the backbone's ("late")
        return self.means.get("mlm")

    @property
    def head_mlm_loss(self) -> Tensor | None:
        return self.means.get("head_mlm")


class Condenser(Objective):
    """A Hugging Face masked LM ``lm`` with a freshly initialised Condenser head ``c_head`` (section 3.2 of the paper).

    Args:
        lm: kept, not copied.
        skip_from: the layer (1 .. N-1) whose output the head, if any, reads for all tokens but [CLS].
        n_head_layers: layers of the head, of the backbone's own class and initialisation; 0 is plain MLM.
        late_mlm: whether the backbone's own MLM loss is added to the head's.
        pruned: run the last layers only at the positions that the loss reads; same loss, same gradients.

    Raises:
        ValueError: a ``skip_from`` outside 1 .. N-1, or nothing to train.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        skip_from: int = 6,
        n_head_layers: int = 2,
        late_mlm: bool = True,
        pruned: bool = True,
    ):
        super().__init__(lm)
        n_layers = self.n_layers
        if n_head_layers < 0:
            raise ValueError(f"n_head_layers={n_head_layers} must not be negative")
        if not (n_head_layers or late_mlm or self.contrast is not None):
            raise ValueError(f"n_head_layers={n_head_layers}, late_mlm={late_mlm} leaves no loss to train on")
        if n_head_layers and n_layers < 2:
            raise ValueError(
                "a head reads a layer below the last, and the backbone has one: n_head_layers=0 is plain MLM"
            )
        if n_head_layers and skip_from not in range(1, n_layers):
            raise ValueError(f"skip_from={skip_from} must be in 1..{n_layers - 1}: the backbone has {n_layers} layers")
        self.skip_from, self.n_head_layers, self.late_mlm, self.pruned = skip_from, n_head_layers, late_mlm, pruned
        self.c_head = nn.ModuleList(self.backbone.fresh_layer() for _ in range(n_head_layers))
        self.c_head.apply(lm._init_weights)
        self.n_layers += n_head_layers
        self.head_term = "head_mlm" if n_head_layers else ""
        self.streams = tuple(name for name, on in (("mlm", late_mlm), ("head_mlm", n_head_layers > 0)) if on)
        self.cls_hook: Callable[[Tensor], Tensor] = identity  # what the head reads of the last [CLS] states [B, H]

    def cls_and_losses(self, batch: dict[str, Any], score: bool = False) -> tuple[Tensor, dict[str, Term]]:
        states = self.states(batch)
        return self.cls_of(states[0], batch, self.pruned), self.terms_of(states, batch, score)

    def flops(self, work: Work) -> float:
        return training_flops(self.lm.config, len(self.c_head), self.late_mlm, work)

    def states(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Last, early and head states ``[T, H]``; with ``pruned`` the last and the head's at the queries ``[Q, H]``.
        Without a head the early states stand for the head's."""
        late, early, sequences = self.encoded(batch, self.skip_from, self.pruned)
        if not len(self.c_head):
            return late, early, early
        cls = self.cls_hook(self.cls_of(late, batch, self.pruned))
        head = early.index_copy(0, batch["cu_seqlens"][:-1], cls.to(early.dtype))
        for depth, layer in enumerate(self.c_head, start=1):
            head = self.run(layer, head, sequences, at_queries=self.pruned and depth == len(self.c_head))
        return late, early, self.backbone.last(head)

    def terms_of(self, states: tuple[Tensor, Tensor, Tensor], batch: dict[str, Any], score: bool) -> dict[str, Term]:
        """Cross-entropies at the masked tokens, of both streams by one product with the vocabulary."""
        if not self.streams:
            return {}
        late, _, head = states
        read_at = batch["masked_slot"] if self.pruned else batch["masked_index"]
        states_of = {"mlm": late, "head_mlm": head}
        streams = {name: (take(states_of[name], read_at), batch["labels"], "n_masked") for name in self.streams}
        return self.mlm_terms(streams, score)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> CondenserOutput:
        """MLM losses of padded rows ``[B, L]``, in which ``labels`` are -100 where nothing is scored. (All that a
        subclass minimises, a contrast too, is in `condenser.CondenserForPreTraining`.)"""
        batch = flattened(self.backbone, input_ids, attention_mask, labels, token_type_ids)
        states = self.states(batch)
        terms = self.terms_of(states, batch, score=False)
        means = {name: term.sum / max(batch["n_masked"], 1) for name, term in terms.items()}
        loss = sum((terms[name].weight * mean for name, mean in means.items()), start=states[0].new_zeros(()))
        output = CondenserOutput(loss, means)
        if not self.pruned:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            late, early, head = (padded(each, mask) for each in states)
            output.last_hidden_state, output.skip_hidden_state, output.head_hidden_state = late, early, head
        return output
