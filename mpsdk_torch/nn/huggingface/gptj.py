"""GPT-J's weights under Hugging Face's names and under canonical ones: see `mpsdk_torch.nn.huggingface`."""

from mpsdk.families.gptj import GPTJ
from mpsdk.families.translate import Translator
from mpsdk_torch.nn.huggingface.tensors import TENSORS

_translator = Translator(GPTJ, TENSORS)
translate_state_dict_to_hf_gptj = _translator.to_hugging_face
translate_hf_state_dict_to_smdistributed_gptj = _translator.from_hugging_face
# A name that SageMaker's documentation has as well.
translate_hf_gptj_state_dict_to_smdistributed_gptj = translate_hf_state_dict_to_smdistributed_gptj
