"""State dicts of transformers' models as mpsdk's models take them, and back: a module for each family.

    from mpsdk_tf.nn.huggingface.gpt2 import translate_hf_state_dict_to_smdistributed_gpt2

    model = mpsdk_tf.from_config("path/to/gpt2")
    weights = translate_hf_state_dict_to_smdistributed_gpt2(safetensors.numpy.load_file("path/to/gpt2/model.safetensors"))
    for name, variable in named_parameters(model):  # of mpsdk_tf.transformer
        variable.assign(weights[name])

Each has `translate_state_dict_to_hf_<module>` and `translate_hf_state_dict_to_smdistributed_<module>`, the names that
SageMaker has for PyTorch, which are the two methods of `mpsdk.families.translate.Translator` for the family. A state dict maps
names to numpy's arrays, TensorFlow's tensors or variables; numpy's stay numpy's, others become tensors. All keep their dtype.
"""

from mpsdk_tf.nn.huggingface import (
    bert,
    gpt2,
    gptj,
    gptneo,
    gptneox,
    llama,
    mistral,
    qwen2,
    qwen3,
    roberta,
)

__all__ = [
    "bert",
    "gpt2",
    "gptj",
    "gptneo",
    "gptneox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "roberta",
]
