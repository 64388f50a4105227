"""RoBERTa's weights under Hugging Face's names and under canonical ones: see `mpsdk_torch.nn.huggingface`."""

from mpsdk.families.roberta import ROBERTA
from mpsdk.families.translate import Translator
from mpsdk_torch.nn.huggingface.tensors import TENSORS

_translator = Translator(ROBERTA, TENSORS)
translate_state_dict_to_hf_roberta = _translator.to_hugging_face
translate_hf_state_dict_to_smdistributed_roberta = _translator.from_hugging_face
# A name that SageMaker's documentation has as well.
translate_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_roberta
