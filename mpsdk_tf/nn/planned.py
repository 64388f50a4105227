"""The parallel twins of Keras' own layers. Each takes what the layer takes and gives what it gives, or a part of it, as its
style says.

| layer                | style                   | input         | output        | cut                                     |
|----------------------|-------------------------|---------------|---------------|-----------------------------------------|
| Dense, EinsumDense   | `colwise_gather_output` | whole         | whole         | by outputs                              |
|                      | `colwise`               | whole         | own features  | by outputs                              |
|                      | `rowwise`               | own features  | whole         | by inputs                               |
|                      | `rowwise_split_input`   | whole         | whole         | by inputs                               |
| Embedding,           | `embedding_colwise`     | ids           | whole         | by features                             |
| ReversibleEmbedding  | `embedding_rowwise`     | ids           | whole         | by rows                                 |
| MultiHeadAttention   |                         | whole         | whole         | by heads                                |

Without a style, a linear layer takes and gives whole tensors and is cut by its outputs, or by its inputs where more ranks,
up to 8, can share those; an embedding by its features. The logits of a model that ends in a linear layer cut by outputs, or
in its own embedding where up to 8 ranks can share the rows, stay cut: the loss takes them so.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from mpsdk_tf.comm import enter_parallel, gather_features, leave_parallel, split_features
from mpsdk_tf.tensor import Tensor
from mpsdk_tf.twins import Twin, tensor_group

LINEAR = ("colwise_gather_output", "colwise", "rowwise", "rowwise_split_input")
_ACROSS_FEATURES = tuple(
    getattr(keras.activations, name) for name in ("softmax", "log_softmax", "glu", "sparsemax")
)
_RANKS = 8  # a power of two that dividing a dimension by is enough
EMBEDDING = ("embedding_colwise", "embedding_rowwise")


class PlannedEinsum(keras.layers.Layer):
    """In the place of a Dense or an EinsumDense: activation(einsum(equation, inputs, kernel) + bias).

    Args:
        kernel_shape, bias_shape: of the whole layer; `bias_shape` None: it has no bias.
        bias_axes: the letters of the output that the bias has.
        ends: the result is the model's logits.
    """

    def __init__(
        self,
        equation: str,
        *,
        kernel_shape: tuple[int, ...],
        bias_shape: tuple[int, ...] | None,
        bias_axes: str,
        activation: Any,
        style: str | None = None,
        ends: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.supports_masking = True
        self.equation, self.activation, self.group = (
            equation,
            keras.activations.get(activation),
            tensor_group(),
        )
        inputs, kernel, output = equation.replace("->", ",").split(",")
        sizes = dict(zip(kernel, kernel_shape, strict=True))
        columns = [letter for letter in kernel if letter in output and letter not in inputs]
        rows = [letter for letter in kernel if letter in inputs and letter not in output]
        self.style, letter = _choice(equation, style, columns, rows, sizes)
        self._by_column = letter in columns
        if ends and style is None and self._by_column and _is_linear(self.activation):
            self.style = "colwise"
        if self.style == "colwise" and self.activation in _ACROSS_FEATURES:
            name = self.activation.__name__
            raise ValueError(
                f"style 'colwise' gives a rank its own features, and {name} looks at all of them"
            )
        self._axis = _axis_of(letter, output if self._by_column else inputs)
        self.cuts: dict[str, int] = {"kernel": kernel.index(letter)}
        self.kernel = self.add_weight(
            name="kernel", shape=self._part(kernel_shape, self.cuts["kernel"]), initializer="zeros"
        )
        self.bias: keras.Variable | None = None
        if bias_shape is not None:
            if self._by_column and letter in bias_axes:
                first = min(output.index(each) for each in bias_axes)
                self.cuts["bias"] = output.index(letter) - first
                bias_shape = self._part(bias_shape, self.cuts["bias"])
            self.bias = self.add_weight(name="bias", shape=bias_shape, initializer="zeros")
        self.built = True

    def _part(self, shape: tuple[int, ...], dimension: int) -> tuple[int, ...]:
        return (*shape[:dimension], shape[dimension] // self.group.size, *shape[dimension + 1 :])

    def call(self, inputs: Tensor) -> Tensor:
        group, bias = self.group, self.bias
        if self._by_column:
            result = ops.einsum(self.equation, enter_parallel(inputs, group), self.kernel)
            if bias is not None and "bias" in self.cuts:
                result, bias = result + ops.convert_to_tensor(bias), None
            if self.style == "colwise":
                if (
                    bias is not None
                ):  # it is whole, and used for this rank's features alone: its gradient is a part
                    bias = enter_parallel(ops.convert_to_tensor(bias), group)
            else:
                result = gather_features(result, group, self._axis)
        else:
            own = split_features(inputs, group, self._axis) if self.style == "rowwise_split_input" else inputs
            result = leave_parallel(ops.einsum(self.equation, own, self.kernel), group)
        if bias is not None:
            result = result + ops.convert_to_tensor(bias)
        return result if self.activation is None else self.activation(result)


def _choice(
    equation: str, style: str | None, columns: list[str], rows: list[str], sizes: dict[str, int]
) -> tuple[str, str]:
    """The style, and the letter of the equation that is cut."""
    if style is not None and style not in LINEAR:
        raise ValueError(f"style is {style!r}; it must be one of {', '.join(LINEAR)}")
    by_column = style is None or style.startswith("colwise")
    by_row = style is None or style.startswith("rowwise")
    letters = [*(columns if by_column else ()), *(rows if by_row else ())]
    if not letters:
        raise ValueError(f"{equation!r} has no dimension that style {style!r} could cut")
    letter = max(letters, key=lambda each: min(sizes[each] & -sizes[each], _RANKS))  # the first of equals
    return style or ("colwise_gather_output" if letter in columns else "rowwise_split_input"), letter


def _axis_of(letter: str, term: str) -> int:
    """Where a letter stands in a term of an equation, counted from the end where an ellipsis comes first."""
    return term.index(letter) - len(term) if term.startswith("...") else term.index(letter)


def _is_linear(activation: Any) -> bool:
    return activation is None or activation is keras.activations.linear


class PlannedEmbedding(keras.layers.Layer):
    """In the place of an Embedding or a ReversibleEmbedding: this rank's features of all rows, or all features of its rows.

    Args:
        reverse_dtype, logit_soft_cap: of a ReversibleEmbedding, which projects back to its rows.
        ends: it is the last layer too: its result is the model's logits.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        *,
        style: str | None = None,
        reverse_dtype: str | None = None,
        logit_soft_cap: float | None = None,
        ends: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options, autocast=False)
        self.supports_masking = True
        if style is not None and style not in EMBEDDING:
            raise ValueError(f"style is {style!r}; it must be one of {', '.join(EMBEDDING)}")
        by_rows = style == "embedding_rowwise" or (style is None and ends and input_dim % _RANKS == 0)
        self._by_rows, self._ends, self.group = by_rows, ends, tensor_group()
        self._reverse_dtype, self._soft_cap = reverse_dtype, logit_soft_cap
        self.cuts = {"embeddings": 0 if by_rows else 1}
        size = self.group.size
        shape = (input_dim // size, output_dim) if by_rows else (input_dim, output_dim // size)
        self.embeddings = self.add_weight(name="embeddings", shape=shape, initializer="zeros")
        self.built = True

    def call(self, inputs: Tensor, reverse: bool = False) -> Tensor:
        table: Tensor = ops.convert_to_tensor(self.embeddings)
        if reverse:
            return self._project(inputs, table)
        ids = inputs if inputs.dtype.is_integer else tf.cast(inputs, tf.int32)
        if not self._by_rows:
            return gather_features(tf.cast(tf.gather(table, ids), self.compute_dtype), self.group)
        local = ids - tf.cast(self.group.rank * table.shape[0], ids.dtype)
        outside = (local < 0) | (local >= table.shape[0])
        found = tf.cast(tf.gather(table, tf.where(outside, tf.zeros_like(local), local)), self.compute_dtype)
        return leave_parallel(tf.where(outside[..., tf.newaxis], tf.zeros_like(found), found), self.group)

    def _project(self, hidden: Tensor, table: Tensor) -> Tensor:
        dtype = self._reverse_dtype or self.compute_dtype
        hidden, table = tf.cast(hidden, dtype), tf.cast(table, dtype)
        if self._by_rows:
            logits = ops.matmul(enter_parallel(hidden, self.group), tf.transpose(table))
            logits = logits if self._ends else gather_features(logits, self.group)
        else:
            own = split_features(hidden, self.group)
            logits = leave_parallel(ops.matmul(own, tf.transpose(table)), self.group)
        return logits if self._soft_cap is None else ops.tanh(logits / self._soft_cap) * self._soft_cap


class PlannedAttention(keras.layers.MultiHeadAttention):
    """In the place of a MultiHeadAttention: this rank's heads of it, and the sum over the ranks of what they give."""

    draws_apart = ("dropout_layer",)

    def __init__(self, num_heads: int, **options: Any) -> None:
        self.group = tensor_group()
        super().__init__(num_heads // self.group.size, **options)
        self.cuts: dict[str, int] = {}

    def build(self, query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
        super().build(query_shape, value_shape, key_shape)
        for name in ("query_dense", "key_dense", "value_dense", "gate_dense"):
            if getattr(self, f"_{name}", None) is not None:
                self.cuts |= {f"{name}/kernel": 1} | ({f"{name}/bias": 0} if self.use_bias else {})
        self.cuts["output_dense/kernel"] = 0
        output = self.output_dense

        def summed(inputs: Tensor, training: bool | None = None) -> Tensor:
            whole = leave_parallel(ops.einsum(output.equation, inputs, output.kernel), self.group)
            return whole if output.bias is None else whole + ops.convert_to_tensor(output.bias)

        output.__dict__["call"] = summed

    def call(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor | None = None,
        query_mask: Tensor | None = None,
        value_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Any:
        if return_attention_scores:
            raise ValueError(
                "attention scores are of this rank's heads alone; leave the layer whole with "
                "mpsdk_tf.set_tensor_parallelism(layer, False)"
            )
        entered: dict[int, Tensor] = {}
        for tensor in (query, value, key):
            if tensor is not None and id(tensor) not in entered:
                entered[id(tensor)] = inside = enter_parallel(tensor, self.group)
                if (
                    mask := getattr(tensor, "_keras_mask", None)
                ) is not None:  # taken by the layer, and taken off
                    inside._keras_mask, tensor._keras_mask = mask, None
        return super().call(
            entered[id(query)],
            entered[id(value)],
            None if key is None else entered[id(key)],
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            training=training,
            use_causal_mask=use_causal_mask,
        )


def _of_dense(layer: keras.layers.Dense) -> tuple[tuple[str], dict[str, Any]]:
    return ("...x,xy->...y",), _linear(layer, "y")


def _of_einsum_dense(layer: keras.layers.EinsumDense) -> tuple[tuple[str], dict[str, Any]]:
    return (layer.equation.replace(" ", ""),), _linear(layer, layer.bias_axes or "")


def _linear(layer: Any, bias_axes: str) -> dict[str, Any]:
    _refuse_changed(layer)
    return {
        "kernel_shape": tuple(layer.kernel.shape),
        "bias_shape": None if layer.bias is None else tuple(layer.bias.shape),
        "bias_axes": bias_axes,
        "activation": layer.activation,
        "dtype": layer.dtype_policy,
        "trainable": layer.trainable,
    }


def _of_embedding(layer: keras.layers.Embedding) -> tuple[tuple[int, int], dict[str, Any]]:
    _refuse_changed(layer)
    return (layer.input_dim, layer.output_dim), {"dtype": layer.dtype_policy, "trainable": layer.trainable}


def _of_reversible_embedding(layer: Any) -> tuple[tuple[int, int], dict[str, Any]] | None:
    if (
        not layer.tie_weights or layer.mask_zero
    ):  # two tables; or a mask that the layer itself puts on its result
        return None
    arguments, settings = _of_embedding(layer)
    return arguments, {
        **settings,
        "reverse_dtype": layer.reverse_dtype,
        "logit_soft_cap": layer.logit_soft_cap,
    }


def _of_attention(layer: keras.layers.MultiHeadAttention) -> tuple[tuple[()], dict[str, Any]]:
    return (), {**layer.get_config(), "kernel_initializer": "zeros"}


def _refuse_changed(layer: Any) -> None:
    if layer.lora_rank or getattr(layer, "quantization_mode", None) is not None:
        raise ValueError("the layer has low-rank or quantised weights beside its own")


OWN_TWINS: dict[type[keras.layers.Layer], Twin] = {
    keras.layers.Dense: Twin(PlannedEinsum, _of_dense, can_end=True),
    keras.layers.EinsumDense: Twin(PlannedEinsum, _of_einsum_dense),
    keras.layers.Embedding: Twin(PlannedEmbedding, _of_embedding),
    keras.layers.MultiHeadAttention: Twin(PlannedAttention, _of_attention),
    keras.layers.ReversibleEmbedding: Twin(PlannedEmbedding, _of_reversible_embedding, can_end=True),
}
