"""GPT-NeoX's weights under Hugging Face's names and under canonical ones: see `mpsdk_torch.nn.huggingface`."""

from mpsdk.families.gpt_neox import GPT_NEOX
from mpsdk.families.translate import Translator
from mpsdk_torch.nn.huggingface.tensors import TENSORS

_translator = Translator(GPT_NEOX, TENSORS)
translate_state_dict_to_hf_gptneox = _translator.to_hugging_face
translate_hf_state_dict_to_smdistributed_gptneox = _translator.from_hugging_face
