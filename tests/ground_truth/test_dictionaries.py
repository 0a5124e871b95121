"""What is taken for the direction of a feature, on random targets of several families."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn.functional import cosine_similarity

from ray_explain.ground_truth.dictionaries import down_projection, neuron_outputs
from ray_explain.interventions.hooks import capturing
from ray_explain.interventions.layout import layout_of

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "gemma2": lambda: hf.Gemma2Config(**SIZES),
    "gemma3": lambda: hf.Gemma3TextConfig(**SIZES),
    "olmo2": lambda: hf.Olmo2Config(**SIZES),
    "glm4": lambda: hf.Glm4Config(**SIZES),
    "bloom": lambda: hf.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_activations_of_all_neurons_times_their_vectors_point_where_the_mlp_writes(family):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms away from one
        parameter += 0.3 * torch.randn_like(parameter)
    layout, entering = layout_of(model), []
    part = down_projection(layout, 1)
    if getattr(part, "bias", None) is not None:
        part.bias.zero_()
    hook = part.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    with capturing(model, [1], "mlp_out") as written:
        entering.clear()
        model(torch.tensor([[3, 14, 15, 9, 26]]))
    hook.remove()
    said = entering[0][0] @ neuron_outputs(layout, 1)
    torch.testing.assert_close(cosine_similarity(said, written[1][0]), torch.ones(5))
