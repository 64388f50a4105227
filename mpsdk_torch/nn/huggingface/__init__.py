"""State dicts of transformers' models as mpsdk's models take them, and back: a module for each family.

    from mpsdk_torch.nn.huggingface.gpt2 import translate_hf_state_dict_to_smdistributed_gpt2

    model = mpsdk_torch.from_config("path/to/gpt2")
    model.load_state_dict(translate_hf_state_dict_to_smdistributed_gpt2(hf_model.state_dict()))

Each has `translate_state_dict_to_hf_<module>` and `translate_hf_state_dict_to_smdistributed_<module>`, SageMaker's names,
which are the two methods of `mpsdk.families.translate.Translator` for the family. Tensors keep their dtype and device.
"""

from mpsdk_torch.nn.huggingface import (
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
