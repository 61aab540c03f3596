"""What the installed readers do not do with one another, which is no fault of an export."""

import pytest
import transformers
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.utils import check_peft_version

SEES_CACHES = pytest.mark.skipif(
    not is_cached_attention_module(LlamaAttention(transformers.LlamaConfig(), 0)),
    reason="this compressed-tensors does not know what this transformers calls the cache of an attention",
)


def needs_add_adapter() -> None:
    """Skips where transformers asks for another PEFT than there is."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(str(error))
