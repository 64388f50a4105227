"""What stands on the last block: the output projection of a language model, or a classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpsdk.families.spec import TransformerSpec
from mpsdk_torch.comm import TensorGroup
from mpsdk_torch.dropout import Moment, Site, dropout
from mpsdk_torch.nn import DistributedLinear, DistributedOutput, Norm
from mpsdk_torch.nn.feed_forward import ACTIVATIONS


class Head(nn.Module):
    """Hidden states -> logits: over this rank's rows of the padded vocabulary, or over all classes.

    A classifier's layers are whole on every tensor-parallel rank. Under sequence parallelism a rank classifies the tokens of
    its own part alone, and `mpsdk_torch.loss.own_labels` leaves the others' to the others.
    """

    def __init__(self, spec: TransformerSpec, vocab_rows: int, group: TensorGroup, *, tied: bool) -> None:
        super().__init__()
        width, head = spec.hidden_size, spec.head

        def norm() -> Norm:
            return Norm(width, kind=spec.norm, epsilon=spec.norm_epsilon)

        def dense(out: int, *, bias: bool = True) -> DistributedLinear:
            return DistributedLinear(width, out, cut="column", bias=bias, group=TensorGroup())

        self.norm = norm() if spec.norm_position == "before" else None
        self.transform = dense(width) if head.transform else None
        self.transform_norm = norm() if head.transform else None
        self.activation = ACTIVATIONS[head.transform] if head.transform else None
        self.pooler = dense(width) if head.pooler else None
        self.classifier = dense(head.labels, bias=head.bias) if head.classifies else None
        self.output = None
        if not head.classifies:
            self.output = DistributedOutput(vocab_rows, width, group=group, tied=tied, bias=head.bias)
        self.group, self.dropout = group, head.dropout
        self.site = Site(-2, "classifier", group.rank if group.sequence_parallel else 0)

    def forward(
        self, hidden: Tensor, tied_weight: Tensor | None, moment: Moment | None, pooled: Tensor | None
    ) -> Tensor:
        """`pooled`, (batch,): of which token alone, or None: of each. (batch, length or its part, width) to logits."""
        if pooled is not None:
            hidden = self._state_of(hidden, pooled)
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.output is not None:
            if self.transform is not None and self.transform_norm is not None and self.activation is not None:
                hidden = self.transform_norm(self.activation(self.transform(hidden)))
            return self.output(hidden, tied_weight)
        assert self.classifier is not None
        if self.pooler is not None:
            hidden = torch.tanh(self.pooler(hidden))
        return self.classifier(dropout(hidden, self.dropout, moment, self.site, training=self.training))

    def _state_of(self, hidden: Tensor, index: Tensor) -> Tensor:
        """(batch, width): the states at `index`; of a token that lies in another rank's part, any."""
        part = hidden.shape[1]
        local = index - (self.group.rank * part if self.group.sequence_parallel else 0)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), local.clamp(0, part - 1)]
