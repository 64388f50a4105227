"""Before anything is traced: do all ranks mean the same programs?

Ranks whose programs differ, be it in a shape, wait for each other for ever or take each other's messages for their own. So
they first compare what their programs follow from, in one small message whose own shape cannot differ.
"""

from __future__ import annotations

import hashlib

import tensorflow as tf

from mpsdk.backend import Place
from mpsdk.errors import BackendError
from mpsdk.plan import Plan
from mpsdk_tf.comm import all_gather, deadline
from mpsdk_tf.topology import Groups

_VERSION = f"tensorflow {tf.__version__}"


def agree(plan: Plan, place: Place, groups: Groups, digest: str = "") -> None:
    """Return when all ranks have the same plan, the same version of TensorFlow, and the same `digest` of a user's own model.

    Raises BackendError, naming the ranks that differ from rank 0.
    """
    if groups.world is None:
        return
    mine = [_digest(text) for text in (plan.hash, _VERSION, digest)]
    with tf.device(groups.device), deadline(place.timeout, place.rank, "agreeing on the programs"):
        everyone = all_gather(tf.constant([mine], tf.int64), groups.world).numpy()
    different = [rank for rank in range(place.world_size) if (everyone[rank] != everyone[0]).any()]
    if different:
        named = ", ".join(map(str, different))
        if (everyone[:, :2] == everyone[0, :2]).all():
            raise BackendError(
                f"rank {place.rank}: {plan.description.factory} gives other first weights on rank {named} than on rank 0; draw "
                "them from Keras' initializers or from a generator with a fixed seed"
            )
        raise BackendError(
            f"rank {place.rank}: the plan or TensorFlow's version of rank {named} differs from rank 0's; here it is plan "
            f"{plan.hash} on {_VERSION}. Start all ranks from one plan, with one environment"
        )


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
