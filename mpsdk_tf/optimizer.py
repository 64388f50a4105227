"""The optimizer on this rank's shards: tied and split gradients summed, the global norm, clipping, and the update.

The updates are TensorFlow's own fused kernels, given the numbers that make them PyTorch's AdamW and SGD, which the plan's
conventions are. An overflowed step is skipped, and nothing is read back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain

import tensorflow as tf

from mpsdk.config import Training
from mpsdk_tf.comm import Group, all_reduce
from mpsdk_tf.parameters import Held
from mpsdk_tf.precision import LossScale
from mpsdk_tf.tensor import Tensor
from mpsdk_tf.topology import Groups

SLOTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum",)}


class ShardedOptimizer:
    """AdamW or SGD over the parameters held here.

    Args:
        held: this rank's parameters, by stage.
        loss_scale: what the loss was multiplied by; divided out again here.
    """

    def __init__(
        self, held: Mapping[int, Sequence[Held]], training: Training, groups: Groups, loss_scale: LossScale
    ) -> None:
        self.held: list[Held] = list(chain.from_iterable(held.values()))
        self.training, self.groups, self.loss_scale = training, groups, loss_scale
        self._updated = [
            item for item in self.held if item.local.shape.num_elements() and item.planned.tensor.trainable
        ]
        self.steps = tf.Variable(tf.constant(0, tf.int64), trainable=False)
        self.state: dict[str, dict[str, tf.Variable]] = {  # by parameter: checkpoint slots
            item.name: {slot: tf.Variable(tf.zeros_like(item.local), trainable=False) for slot in self.slots}
            for item in self._updated
        }

    @property
    def slots(self) -> tuple[str, ...]:
        """Checkpoint slots in use."""
        if self.training.optimizer == "sgd" and self.training.momentum == 0.0:
            return ()
        return SLOTS[self.training.optimizer]

    def step(self, gradients: Mapping[str, Tensor], learning_rate: Tensor) -> Tensor:
        """Reduce what is left to reduce, clip, and update. Gives the global gradient norm."""
        found = {item.name: gradients[item.name] for item in self._updated}
        self._sum_tied(found)
        self._sum_split(found)
        norm = self._global_norm(found) / self.loss_scale.scale
        overflowed = ~tf.math.is_finite(norm)
        divisor = self.loss_scale.scale.read_value()
        if self.training.max_grad_norm is not None:
            divisor = divisor * tf.maximum(norm / self.training.max_grad_norm, 1.0)

        def update() -> tf.Operation:
            if self.training.max_grad_norm is None and not self.loss_scale.active:
                return self._update(found, learning_rate)
            return self._update({name: gradient / divisor for name, gradient in found.items()}, learning_rate)

        if not self.loss_scale.active:
            update()
            return norm
        tf.cond(overflowed, lambda: tf.no_op(), update)
        self.loss_scale.update(overflowed)
        return norm

    def _update(self, gradients: Mapping[str, Tensor], learning_rate: Tensor) -> tf.Operation:
        steps = tf.cast(self.steps.assign_add(1), tf.float32)
        rate = tf.identity(learning_rate)
        return (
            self._adamw(gradients, rate, steps)
            if self.training.optimizer == "adamw"
            else self._sgd(gradients, rate)
        )

    def _adamw(self, gradients: Mapping[str, Tensor], learning_rate: Tensor, steps: Tensor) -> tf.Operation:
        """Loshchilov and Hutter 2017 (arXiv:1711.05101), epsilon beside the corrected root, as PyTorch has it.

        TensorFlow's kernel corrects the learning rate and not the root, and subtracts powers of betas from 1, which loses
        digits in the first steps. So it is told powers of zero, and gets the rate and epsilon corrected.

        Args:
            steps: the number of this step, counted from 1.
        """
        first, second = (tf.constant(beta, tf.float32) for beta in self.training.betas)
        corrections = [-tf.math.expm1(steps * math.log(beta)) for beta in self.training.betas]
        root = tf.sqrt(corrections[1])
        rate, epsilon = learning_rate * root / corrections[0], self.training.epsilon * root
        kept = 1.0 - learning_rate * self.training.weight_decay
        zero = tf.zeros((), tf.float32)
        updates: list[tf.Operation] = []
        for item in self._updated:
            if self._decays(item):
                item.local.assign(item.local * kept)
            update = tf.raw_ops.ResourceApplyAdam(
                var=item.local.handle,
                m=self.state[item.name]["exp_avg"].handle,
                v=self.state[item.name]["exp_avg_sq"].handle,
                beta1_power=zero,
                beta2_power=zero,
                lr=rate,
                beta1=first,
                beta2=second,
                epsilon=epsilon,
                grad=gradients[item.name],
            )
            updates.append(update)
        return tf.group(*updates)

    def _sgd(self, gradients: Mapping[str, Tensor], learning_rate: Tensor) -> tf.Operation:
        momentum = tf.constant(self.training.momentum, tf.float32)
        updates: list[tf.Operation] = []
        for item in self._updated:
            gradient = gradients[item.name]
            if self._decays(item):
                gradient = gradient + self.training.weight_decay * item.local
            if not self.slots:
                updates.append(item.local.assign_sub(learning_rate * gradient))
                continue
            update = tf.raw_ops.ResourceApplyMomentum(
                var=item.local.handle,
                accum=self.state[item.name]["momentum"].handle,
                lr=learning_rate,
                grad=gradient,
                momentum=momentum,
            )
            updates.append(update)
        return tf.group(*updates)

    def _decays(self, item: Held) -> bool:
        return self.training.weight_decay > 0 and item.planned.tensor.decay

    def _sum_tied(self, gradients: dict[str, Tensor]) -> None:
        """A tied tensor has a copy on the first stage and one on the last; both get the sum of their gradients."""
        copies = [item.name for item in self._updated if item.planned.tied]
        if self.groups.tied is not None:
            _all_reduce_flat(gradients, copies, self.groups.tied)
        elif copies:  # both stages are here, as in a schedule shaped like a V
            total = tf.add_n([gradients[name] for name in copies])
            gradients |= dict.fromkeys(copies, total)

    def _sum_split(self, gradients: dict[str, Tensor]) -> None:
        """A replicated parameter may see only a part of the sequence, or of the heads, on each tensor-parallel rank."""
        group = self.groups.tensor
        if group.handle is not None:
            split = [
                item.name
                for item in self._updated
                if item.planned.tensor.sums_gradient(sequence_parallel=group.sequence_parallel)
            ]
            _all_reduce_flat(gradients, split, group.handle)

    def _global_norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The 2-norm of the whole model's gradient, each element counted by its one owner."""
        owned = [gradients[item.name] for item in self._updated if item.planned.owned]
        total = tf.zeros((), tf.float32)
        if owned:
            total = tf.square(tf.linalg.global_norm(owned))
        return tf.sqrt(all_reduce(total, self.groups.model))


def _all_reduce_flat(gradients: dict[str, Tensor], names: Sequence[str], group: Group) -> None:
    """Sum the gradients of `names` over `group` in one message."""
    if not names:
        return
    shapes = [gradients[name].shape for name in names]
    flat = tf.concat([tf.reshape(gradients[name], (-1,)) for name in names], axis=0)
    parts = tf.split(all_reduce(flat, group), [shape.num_elements() for shape in shapes])
    gradients |= {
        name: tf.reshape(part, shape) for name, part, shape in zip(names, parts, shapes, strict=True)
    }
