"""The paper's own count of trainable parameters, from abstract weights."""

import jax

import qlora_jax as qj
from qlora_jax import models
from qlora_jax.models import LlamaConfig
from qlora_jax.quant import quantize_tree

LLAMA_7B = LlamaConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
)


def test_llama_7b_has_as_many_parameters_as_the_paper_says() -> None:
    config = qj.LoraConfig(rank=64, alpha=16)
    dense = models.abstract_params(LLAMA_7B)
    for params in (dense, quantize_tree(dense, qj.NF4())):
        adapters = jax.eval_shape(
            lambda key, params=params: qj.lora.init(key, params, config), jax.random.key(0)
        )
        assert qj.lora.count(adapters) == 159_907_840
