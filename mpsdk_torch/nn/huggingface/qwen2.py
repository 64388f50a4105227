"""Qwen2's weights under Hugging Face's names and under canonical ones: see `mpsdk_torch.nn.huggingface`."""

from mpsdk.families.qwen2 import QWEN2
from mpsdk.families.translate import Translator
from mpsdk_torch.nn.huggingface.tensors import TENSORS

_translator = Translator(QWEN2, TENSORS)
translate_state_dict_to_hf_qwen2 = _translator.to_hugging_face
translate_hf_state_dict_to_smdistributed_qwen2 = _translator.from_hugging_face
