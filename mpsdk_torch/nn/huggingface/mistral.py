"""Mistral's weights under Hugging Face's names and under canonical ones: see `mpsdk_torch.nn.huggingface`."""

from mpsdk.families.mistral import MISTRAL
from mpsdk.families.translate import Translator
from mpsdk_torch.nn.huggingface.tensors import TENSORS

_translator = Translator(MISTRAL, TENSORS)
translate_state_dict_to_hf_mistral = _translator.to_hugging_face
translate_hf_state_dict_to_smdistributed_mistral = _translator.from_hugging_face
