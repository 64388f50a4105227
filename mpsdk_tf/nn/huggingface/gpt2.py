"""GPT-2's weights under Hugging Face's names and under canonical ones: see `mpsdk_tf.nn.huggingface`."""

from mpsdk.families.gpt2 import GPT2
from mpsdk.families.translate import Translator
from mpsdk_tf.nn.huggingface.tensors import TENSORS

_translator = Translator(GPT2, TENSORS)
translate_state_dict_to_hf_gpt2 = _translator.to_hugging_face
translate_hf_state_dict_to_smdistributed_gpt2 = _translator.from_hugging_face
