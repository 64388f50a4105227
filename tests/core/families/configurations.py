"""Small configurations as transformers writes them, and specs to draw at random."""

from __future__ import annotations

from hypothesis import strategies as st

from mpsdk.families import FAMILIES, Dropout, Rotary, TransformerSpec
from tests.family_configs import configs

GPT2 = {
    "activation_function": "gelu_new",
    "add_cross_attention": False,
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 30,
    "dtype": "float32",
    "embd_pdrop": 0.2,
    "eos_token_id": 30,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_embd": 8,
    "n_head": 2,
    "n_inner": None,
    "n_layer": 2,
    "n_positions": 16,
    "pad_token_id": None,
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.3,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "tie_word_embeddings": True,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "vocab_size": 31,
}

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 4,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "vocab_size": 31,
}

sizes = st.integers(1, 4)
probabilities = st.floats(0, 0.5)
small = st.floats(1e-8, 1e-1)
activations = st.sampled_from(["gelu", "gelu_tanh", "relu", "silu"])


@st.composite
def gpt2_specs(draw: st.DrawFn) -> TransformerSpec:
    heads, head_size = draw(sizes), draw(sizes)
    return TransformerSpec(
        family="gpt2",
        vocab_size=draw(st.integers(1, 20)),
        hidden_size=heads * head_size,
        blocks=draw(sizes),
        heads=heads,
        key_value_heads=heads,
        head_size=head_size,
        feed_forward_size=draw(st.integers(1, 40)),
        max_positions=draw(st.integers(1, 20)),
        norm="layernorm",
        norm_epsilon=draw(small),
        positions="learned",
        activation=draw(activations),
        gated=False,
        attention_bias=True,
        attention_output_bias=True,
        feed_forward_bias=True,
        tied=draw(st.booleans()),
        initializer_range=draw(small),
        scale_residual_initialisation=True,
        dropout=Dropout(
            embedding=draw(probabilities), attention=draw(probabilities), residual=draw(probabilities)
        ),
    )


@st.composite
def llama_specs(draw: st.DrawFn) -> TransformerSpec:
    key_value_heads, repeats, head_size = draw(sizes), draw(sizes), 2 * draw(sizes)
    heads = key_value_heads * repeats
    bias = draw(st.booleans())
    scaling = draw(
        st.sampled_from([None, ("linear", 2.5), ("llama3", 8.0, 1.0, 4.0, 32.0)]),
    )
    return TransformerSpec(
        family="llama",
        vocab_size=draw(st.integers(1, 20)),
        hidden_size=heads * draw(sizes),
        blocks=draw(sizes),
        heads=heads,
        key_value_heads=key_value_heads,
        head_size=head_size,
        feed_forward_size=draw(st.integers(1, 40)),
        max_positions=draw(st.integers(1, 20)),
        norm="rmsnorm",
        norm_epsilon=draw(small),
        positions="rotary",
        rotary=Rotary(theta=draw(st.floats(1, 1e6)), scaling=scaling),
        activation=draw(activations),
        gated=True,
        attention_bias=bias,
        attention_output_bias=bias,
        feed_forward_bias=draw(st.booleans()),
        tied=draw(st.booleans()),
        initializer_range=draw(small),
        dropout=Dropout(attention=draw(probabilities)),
    )


@st.composite
def family_specs(draw: st.DrawFn) -> TransformerSpec:
    """A spec of any family, with any of its heads."""
    family = draw(st.sampled_from([*FAMILIES.values()]))
    head = draw(st.sampled_from(family.heads))
    config = draw(configs(family.model_type))
    return family.spec(config, objective=head.form.objective, labels=draw(sizes))


specs = gpt2_specs() | llama_specs() | family_specs()
