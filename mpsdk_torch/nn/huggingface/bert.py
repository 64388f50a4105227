"""BERT's weights under Hugging Face's names and under canonical ones: see `mpsdk_torch.nn.huggingface`."""

from mpsdk.families.bert import BERT
from mpsdk.families.translate import Translator
from mpsdk_torch.nn.huggingface.tensors import TENSORS

_translator = Translator(BERT, TENSORS)
translate_state_dict_to_hf_bert = _translator.to_hugging_face
translate_hf_state_dict_to_smdistributed_bert = _translator.from_hugging_face
