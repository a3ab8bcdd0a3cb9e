"""The base in NF4, as transformers and bitsandbytes make it by themselves."""

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel


def load_nf4(
    base: object, *, double: bool = True, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model folder quantised while it is loaded, for the CPU."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config)
