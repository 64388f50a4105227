"""What stands on the last block: the output projection of a language model, or a classifier."""

from __future__ import annotations

import keras
import tensorflow as tf

from mpsdk.families.spec import TransformerSpec
from mpsdk_tf.comm import TensorGroup
from mpsdk_tf.dropout import Site, dropout
from mpsdk_tf.nn import DistributedLinear, DistributedOutput, Norm
from mpsdk_tf.nn.feed_forward import ACTIVATIONS
from mpsdk_tf.tensor import Tensor


class Head(keras.layers.Layer):
    """Hidden states -> logits: over this rank's rows of the padded vocabulary, or over all classes.

    A classifier's layers are whole on every tensor-parallel rank. Under sequence parallelism a rank classifies the tokens of
    its own part alone, and `mpsdk_tf.loss.own_labels` leaves the others' to the others.
    """

    def __init__(self, spec: TransformerSpec, vocab_rows: int, group: TensorGroup, *, tied: bool) -> None:
        super().__init__(autocast=False)
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
        self.output_projection = None
        if not head.classifies:
            self.output_projection = DistributedOutput(
                vocab_rows, width, group=group, tied=tied, bias=head.bias
            )
        self.group, self.dropout = group, head.dropout
        self.sites = (Site(-2, "classifier", group.rank if group.sequence_parallel else 0),)
        self.built = True

    def call(
        self,
        hidden: Tensor,
        tied_weight: Tensor | None = None,
        seed: Tensor | None = None,
        pooled: Tensor | None = None,
        training: bool = False,
    ) -> Tensor:
        """`pooled`, (batch,): of which token alone, or None: of each. (batch, length or its part, width) to logits."""
        if pooled is not None:
            hidden = self._state_of(hidden, pooled)
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.output_projection is not None:
            if self.transform is not None and self.transform_norm is not None and self.activation is not None:
                hidden = self.transform_norm(self.activation(self.transform(hidden)))
            return self.output_projection(hidden, tied_weight)
        assert self.classifier is not None
        if self.pooler is not None:
            hidden = tf.tanh(self.pooler(hidden))
        return self.classifier(dropout(hidden, self.dropout, seed, training=training))

    def _state_of(self, hidden: Tensor, index: Tensor) -> Tensor:
        """(batch, width): the states at `index`; of a token that lies in another rank's part, any."""
        part = tf.shape(hidden)[1] if hidden.shape[1] is None else hidden.shape[1]
        local = index - (self.group.rank * part if self.group.sequence_parallel else 0)
        return tf.gather(hidden, tf.clip_by_value(local, 0, part - 1), batch_dims=1)
