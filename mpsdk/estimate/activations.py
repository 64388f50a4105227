"""Bytes of activations that one microbatch keeps on a rank from its forward until its backward.

After Korthikanti et al. 2022 (arXiv:2205.05198, sections 4 and 5), with our own layers: a fused attention kernel keeps no
weights of token pairs, and what is kept depends on the kernels (`Kernels`). Each function gives a table from what is
kept to its bytes; an entry is one buffer, which several operations may keep at once, and has one name in all tables.
"""

from __future__ import annotations

from mpsdk.config import ActivationCheckpointing
from mpsdk.estimate.frameworks import Attention, Kernels, attention_kernel
from mpsdk.estimate.sizes import FP32, INDEX, Sizes
from mpsdk.families.spec import TransformerSpec

Kept = dict[str, int]

SEED = 16  # bytes of the seed of one mask


def embedding_kept(spec: TransformerSpec, sizes: Sizes, kernels: Kernels) -> Kept:
    """What the embedding keeps. The ids themselves belong to the batch."""
    kept: Kept = {}
    if (
        sizes.tensor_parallel > 1 and kernels.keeps_masks
    ):  # ids shifted into this rank's rows, and which of them lie outside
        kept["embedding.indices"] = sizes.tokens * INDEX
        kept["embedding.outside"] = sizes.tokens
    if spec.dropout.embedding:
        kept |= (
            {"embedding.dropout": _dropout(sizes, kernels)}
            if kernels.keeps_masks
            else {"embedding.seeds": SEED}
        )
    if spec.embedding_norm:
        kept |= _norm("embedding.summed", spec, sizes, kernels)
    return kept


def block_kept(spec: TransformerSpec, sizes: Sizes, kernels: Kernels) -> Kept:
    """What one block keeps when nothing in it is computed again."""
    masks = spec.dropout.residual and kernels.keeps_masks
    dropout = {".dropout": _dropout(sizes, kernels)} if masks else {}
    return {
        **_entering(spec, sizes, kernels),
        **_attention(spec, sizes, kernels),
        **{f"attention{name}": size for name, size in dropout.items()},
        **_feed_forward(spec, sizes),
        **{f"feed_forward{name}": size for name, size in dropout.items()},
        **_seeds(spec, kernels),
    }


def _entering(spec: TransformerSpec, sizes: Sizes, kernels: Kernels) -> Kept:
    """What the norms and the first linear layers of a block's two parts keep of what comes in."""
    both = {"attention.input": sizes.whole_hidden, "feed_forward.input": sizes.whole_hidden}
    if spec.norm_position == "after":
        if not sizes.sequence_parallel:
            both["input"] = both.pop("attention.input")  # nothing stands between the two
        return both | _norm("middle", spec, sizes, kernels) | _norm("summed", spec, sizes, kernels)
    if spec.residual == "sequential":
        return _norm("input", spec, sizes, kernels) | both | _norm("middle", spec, sizes, kernels)
    first = _norm("input", spec, sizes, kernels)
    if spec.residual == "parallel":  # the second norm keeps the same input, and all else once more
        again = {name.replace("input", "middle"): size for name, size in first.items() if name != "input"}
        return first | both | again
    if not sizes.sequence_parallel:
        both.pop("feed_forward.input")  # which is attention's
    return first | both


def head_kept(spec: TransformerSpec, sizes: Sizes, kernels: Kernels) -> Kept:
    """What the head and the loss keep; logits themselves are dropped as soon as the loss has read them."""
    kept: Kept = {}
    if spec.norm_position == "before":
        kept |= _norm("output", spec, sizes, kernels)
    if spec.head.classifies:
        dense = 2 if spec.head.pooler else 1
        logits = sizes.part * spec.head.labels * FP32
        return kept | {"head.input": dense * sizes.hidden, "loss.probabilities": logits}
    if spec.head.transform:
        kept |= _norm("head.transformed", spec, sizes, kernels)
        kept |= {"head.transform.input": sizes.hidden, "head.transform.result": sizes.hidden}
    kept["head.input"] = sizes.whole_hidden
    rows = sizes.vocabulary if kernels.keeps_padding else min(sizes.vocabulary, spec.vocab_size)
    kept["loss.exponentials"] = sizes.tokens * rows * FP32
    kept["loss.factors"] = sizes.tokens * FP32
    return kept


def recompute_kept(
    spec: TransformerSpec, sizes: Sizes, kernels: Kernels, recompute: ActivationCheckpointing
) -> Kept:
    """What one block keeps under `recompute`: its input and, if selective, the results of the chosen operations."""
    if recompute.mode == "none":
        return block_kept(spec, sizes, kernels)
    kept = {"input": sizes.hidden, **_seeds(spec, kernels)}
    if recompute.mode == "selective":
        if "attention" in recompute.keep:
            kept |= _attention_results(spec, sizes, kernels)
        if "matmul" in recompute.keep:
            kept |= _matmul_results(spec, sizes, kernels)
    return kept


def block_put_off(sizes: Sizes, *, gated: bool) -> Kept:
    """What one block keeps from its backward of inputs until that of its weights: of every linear layer, what came in
    and the gradient of what came out (Qi et al. 2024, arXiv:2401.10241)."""
    queries, pairs, inner = (
        sizes.tokens * count * sizes.compute for count in (sizes.queries, sizes.pairs, sizes.features)
    )
    return {
        "attention.input": sizes.whole_hidden,
        "attention.mixed": queries,
        "feed_forward.input": sizes.whole_hidden,
        "feed_forward.product" if gated else "feed_forward.activated": inner,
        "gradients of query, key, value": queries + 2 * pairs,
        "gradients of attention.output, feed_forward.down": 2 * sizes.whole_hidden,
        "gradients of feed_forward.up, feed_forward.gate": 2 * inner if gated else inner,
    }


def head_put_off(sizes: Sizes) -> Kept:
    """The same of the head."""
    return {
        "head.input": sizes.whole_hidden,
        "gradients of logits": sizes.tokens * sizes.vocabulary * sizes.compute,
    }


def block_workspace(
    spec: TransformerSpec, sizes: Sizes, kernels: Kernels, recompute: ActivationCheckpointing
) -> int:
    """The most that comes and goes within one block's backward: what is computed again, and gradients of activations."""
    whole, kept = block_kept(spec, sizes, kernels), recompute_kept(spec, sizes, kernels, recompute)
    again = sum(size for name, size in whole.items() if name not in kept)
    inner = sizes.tokens * sizes.features * sizes.compute
    weight = sizes.width * sizes.features * sizes.compute
    # First the down projection gives two gradients, then a gate takes one and gives two.
    feed_forward = max(inner + weight, 2 * inner if spec.gated else 0)
    # By the time of attention's backward, what the feed-forward part kept is gone.
    freed = sum(size for name, size in whole.items() if name.startswith(("feed_forward.", "middle")))
    if _attention_kernel(spec, sizes, kernels) == "fused":
        attention = 2 * sizes.tokens * (sizes.queries + sizes.pairs) * sizes.compute
    else:
        attention = 2 * _token_pairs(sizes) * FP32
    residual = sizes.hidden + (sizes.whole_hidden if sizes.sequence_parallel else 0)
    return again + residual + max(feed_forward, attention - freed)


def loss_workspace(sizes: Sizes, kernels: Kernels) -> int:
    """Beside the fp32 exponentials that are kept: the logits, or their gradient; where all is in place and in fp32, they
    take the logits' memory."""
    in_place = kernels.loss_in_place and sizes.compute == FP32
    return 0 if in_place else sizes.tokens * sizes.vocabulary * sizes.compute


def head_workspace(sizes: Sizes, kernels: Kernels) -> int:
    """Gradients of the logits, of the output projection and of its input, when the loss has let its exponentials go if
    they are turned into the gradient; else beside them."""
    logits, weight = sizes.tokens * sizes.vocabulary, sizes.width * sizes.vocabulary
    if not kernels.loss_in_place:
        return 2 * logits * FP32 + weight * sizes.compute + sizes.whole_hidden
    return max(0, (logits + weight) * sizes.compute + sizes.whole_hidden - logits * FP32)


def _norm(hidden: str, spec: TransformerSpec, sizes: Sizes, kernels: Kernels) -> Kept:
    """What a norm of the hidden states called `hidden` keeps of them."""
    if spec.norm == "layernorm":
        bytes_each = FP32 if kernels.fp32_statistics else sizes.compute
        return {hidden: sizes.hidden, f"{hidden}.statistics": 2 * sizes.part * bytes_each}
    return _rms_norm(hidden, sizes.part, sizes.width, sizes, kernels)


def _rms_norm(name: str, rows: int, width: int, sizes: Sizes, kernels: Kernels) -> Kept:
    """What an RMSNorm of so many rows, called `name`, keeps of them."""
    statistics = {f"{name}.statistics": rows * FP32}
    if kernels.fused_rms_norm:
        return {name: rows * width * sizes.compute, **statistics}
    wide = name if sizes.compute == FP32 else f"{name}.fp32"
    return {wide: rows * width * FP32, **statistics, f"{name}.normalised": rows * width * FP32}


def _attention(spec: TransformerSpec, sizes: Sizes, kernels: Kernels) -> Kept:
    queries, pairs = sizes.tokens * sizes.queries, sizes.tokens * sizes.pairs
    mixed = {"attention.mixed": queries * sizes.compute}
    if spec.query_key_norm:
        for name, elements in (("query", queries), ("key", pairs)):
            rows = elements // sizes.head_size
            mixed |= _rms_norm(f"attention.projected_{name}", rows, sizes.head_size, sizes, kernels)
    if spec.masks and kernels.fused_attention:  # which takes a mask of what is out of reach as numbers
        padded = spec.head.objective != "causal-lm"
        mixed["attention.reach"] = (sizes.microbatch_size if padded else 1) * sizes.length**2 * sizes.compute
    weights, kernel = _token_pairs(sizes), _attention_kernel(spec, sizes, kernels)
    if kernel != "math":
        statistics = {"attention.logsumexp": _logsumexp(sizes, kernels)}
        return {
            "attention.query": queries * sizes.compute,
            "attention.key": pairs * sizes.compute,
            "attention.value": pairs * sizes.compute,
            **(statistics if kernel == "fused" else {"attention.weights": weights * sizes.compute}),
            **mixed,
        }
    kept = {  # in fp32, keys and values repeated for every query head
        "attention.query": queries * FP32,
        "attention.key": queries * FP32,
        "attention.value": queries * FP32,
        "attention.weights": weights * FP32,
    }
    if spec.dropout.attention:
        kept["attention.weights_dropout"] = weights * (1 if kernels.fused_dropout else FP32)
        kept["attention.weights_dropped"] = weights * FP32
    return kept | mixed


def _feed_forward(spec: TransformerSpec, sizes: Sizes) -> Kept:
    inner = sizes.tokens * sizes.features * sizes.compute
    # An activation keeps its input; relu, whose derivative its result tells, only that.
    entering = {"feed_forward.gate" if spec.gated else "feed_forward.up": inner}
    kept: Kept = {} if spec.activation == "relu" else entering
    kept["feed_forward.activated"] = inner
    if spec.gated:
        kept |= {"feed_forward.up": inner, "feed_forward.product": inner}
    return kept


def _attention_results(spec: TransformerSpec, sizes: Sizes, kernels: Kernels) -> Kept:
    kernel = _attention_kernel(spec, sizes, kernels)
    if kernel == "math":
        return {}  # no attention operation runs that could be kept, only its parts
    mixed = sizes.tokens * sizes.queries * sizes.compute
    if kernel == "weights":
        return {"attention.result": mixed}  # the same as mixed, in another order
    return {"attention.mixed": mixed, "attention.logsumexp": _logsumexp(sizes, kernels)}


def _matmul_results(spec: TransformerSpec, sizes: Sizes, kernels: Kernels) -> Kept:
    """Results of matrix products; those of row-parallel layers are whole partial sums, before they are reduced."""
    queries, pairs = (sizes.tokens * count * sizes.compute for count in (sizes.queries, sizes.pairs))
    inner = sizes.tokens * sizes.features * sizes.compute
    results: Kept = {"query": queries, "key": pairs, "value": pairs}
    # What attention itself keeps is the same buffer, unless it was turned by its position or cast on the way.
    kernel = _attention_kernel(spec, sizes, kernels)
    apart = {"query", "key"} if spec.positions == "rotary" else set[str]()
    if kernel != "fused":
        apart = {"query", "key", "value"}
    results = {
        f"attention.{'projected_' if name in apart else ''}{name}": size for name, size in results.items()
    }
    if kernel == "math":
        results["attention.scores"] = _token_pairs(sizes) * FP32
        results["attention.mixed_fp32"] = sizes.tokens * sizes.queries * FP32
    results["attention.output"] = sizes.whole_hidden
    if spec.gated:
        results["feed_forward.gate"] = inner
    results["feed_forward.up"] = inner
    return results | ({"feed_forward.down": sizes.whole_hidden} if kernels.keeps_unread else {})


def _attention_kernel(spec: TransformerSpec, sizes: Sizes, kernels: Kernels) -> Attention:
    return attention_kernel(spec, kernels, fp32=sizes.compute == FP32)


def _token_pairs(sizes: Sizes) -> int:
    return sizes.microbatch_size * sizes.heads * sizes.length**2


def _logsumexp(sizes: Sizes, kernels: Kernels) -> int:
    multiple = kernels.statistics_rows if sizes.compute == FP32 else 1
    rows = -(-sizes.length // multiple) * multiple
    return sizes.microbatch_size * sizes.heads * rows * FP32


def _seeds(spec: TransformerSpec, kernels: Kernels) -> Kept:
    """What a block's masks are made again from."""
    made_again = (spec.dropout.attention or spec.dropout.residual) and not kernels.keeps_masks
    return {"seeds": 3 * SEED} if made_again else {}


def _dropout(sizes: Sizes, kernels: Kernels) -> int:
    return sizes.part * sizes.width * (1 if kernels.fused_dropout else sizes.compute)
