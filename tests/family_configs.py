"""Configurations of every family, drawn at random, as transformers has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

VOCABULARY, POSITIONS, LABELS = 61, 40, 3
ACTIVATIONS = st.sampled_from(["gelu", "gelu_new", "relu", "silu"])
Draw = Callable[[st.SearchStrategy[Any]], Any]


def _sizes(draw: Draw, *, even: bool = False) -> tuple[int, int]:
    """Heads, and features of each."""
    return draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([2, 4, 8] if even else [3, 4, 8]))


def _common(draw: Draw, *, even: bool = False) -> dict[str, Any]:
    heads, size = _sizes(draw, even=even)
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * size,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.sampled_from([12, 17])),
        "max_position_embeddings": POSITIONS,
        "hidden_act": draw(ACTIVATIONS),
        "initializer_range": 0.02,
        "pad_token_id": 0,
    }


def _openai(draw: Draw, *, even: bool = False) -> dict[str, Any]:
    heads, size = _sizes(draw, even=even)
    return {
        "vocab_size": VOCABULARY,
        "n_embd": heads * size,
        "n_head": heads,
        "n_layer": draw(st.integers(1, 3)),
        "n_inner": draw(st.sampled_from([None, 17])),
        "n_positions": POSITIONS,
        "activation_function": draw(ACTIVATIONS),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def _encoder(draw: Draw) -> dict[str, Any]:
    return _common(draw) | {
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-5])),
        "type_vocab_size": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
    }


def _gated(draw: Draw) -> dict[str, Any]:
    config = _common(draw, even=True)
    heads = config["num_attention_heads"]
    return config | {
        "num_key_value_heads": draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from([100.0, 10000.0]))},
        "bos_token_id": 1,
        "eos_token_id": 1,
    }


def _windowed(draw: Draw, config: dict[str, Any]) -> dict[str, Any]:
    blocks = config["num_hidden_layers"]
    return config | {
        "use_sliding_window": draw(st.booleans()),
        "sliding_window": draw(st.sampled_from([1, 3, 64])),
        "max_window_layers": draw(st.integers(0, blocks)),
    }


def _gptj(draw: Draw) -> dict[str, Any]:
    config = _openai(draw, even=True)
    size = config["n_embd"] // config["n_head"]
    return config | {"rotary_dim": draw(st.sampled_from([n for n in (2, 4, 8) if n <= size]))}


def _gpt_neo(draw: Draw) -> dict[str, Any]:
    config = _common(draw)
    config["num_heads"], config["num_layers"] = (
        config.pop("num_attention_heads"),
        config.pop("num_hidden_layers"),
    )
    kinds = [draw(st.sampled_from(["global", "local"])) for _ in range(config["num_layers"])]
    return config | {
        "activation_function": config.pop("hidden_act"),
        "attention_types": [[[kind], 1] for kind in kinds],
        "window_size": draw(st.sampled_from([1, 3, 64])),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": 1,
        "eos_token_id": 1,
    }


def _gpt_neox(draw: Draw) -> dict[str, Any]:
    config = _common(draw, even=True)
    size = config["hidden_size"] // config["num_attention_heads"]
    turning = draw(st.sampled_from([n for n in (2, 4, 8) if n <= size]))
    return config | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": turning / size,
        },
        "attention_bias": draw(st.booleans()),
        "use_parallel_residual": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": 1,
        "eos_token_id": 1,
    }


DRAWS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "gpt2": _openai,
    "bert": _encoder,
    "roberta": lambda draw: _encoder(draw) | {"pad_token_id": draw(st.integers(0, 3))},
    "gptj": _gptj,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "llama": lambda draw: (
        _gated(draw) | {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    ),
    "mistral": lambda draw: _gated(draw) | {"sliding_window": draw(st.sampled_from([None, 1, 3, 64]))},
    "qwen2": lambda draw: _windowed(draw, _gated(draw)),
    "qwen3": lambda draw: (
        _windowed(draw, _gated(draw))
        | {"head_dim": draw(st.sampled_from([4, 6])), "attention_bias": draw(st.booleans())}
    ),
}


@st.composite
def configs(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """A configuration of `family` without dropout, with its `model_type`."""
    dropped = dict.fromkeys(
        (
            "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob",
            "attention_dropout", "embed_dropout", "resid_dropout", "hidden_dropout", "classifier_dropout",
        ),
        0.0,
    )  # fmt: skip
    known = {
        "gpt2": ("attn_pdrop", "embd_pdrop", "resid_pdrop", "classifier_dropout"),
        "gptj": ("attn_pdrop", "embd_pdrop", "resid_pdrop"),
        "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
        "roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    }.get(family, ())
    return {"model_type": family, **{name: dropped[name] for name in known}, **DRAWS[family](draw)}
