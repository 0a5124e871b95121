"""Random three-layer models of every family, and the slow judge: one hook per patch, one prompt per forward pass."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

from ray_explain.interventions.hooks import Patch, capturing, writing
from ray_explain.interventions.patching import Intervention

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
WINDOWED = GROUPED | {"sliding_window": 4}
GEMMA = WINDOWED | {"head_dim": 12, "query_pre_attn_scalar": 9}
MIXED: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
CONFIGS: dict[str, Callable] = {
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "llama, tied and eager": lambda: hf.LlamaConfig(**SIZES, **EAGER, tie_word_embeddings=True),
    "qwen2": lambda: hf.Qwen2Config(**WINDOWED, **MIXED, use_sliding_window=True),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=16),
    "mistral": lambda: hf.MistralConfig(**WINDOWED),
    "gemma2": lambda: hf.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**GEMMA, **MIXED),
    "phi3": lambda: hf.Phi3Config(**WINDOWED, pad_token_id=0, rope_parameters=HALF),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=101, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SIZES),
}
FALLBACK: dict[str, Callable] = {
    "stablelm": lambda: hf.StableLmConfig(**GROUPED),
    "gpt2, upcast": lambda: hf.GPT2Config(
        vocab_size=101, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2, reorder_and_upcast_attn=True
    ),
}


@cache
def model_of(family: str) -> PreTrainedModel:
    """Weights large enough that every part matters: norms away from one, biases away from zero."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config((CONFIGS | FALLBACK)[family]()).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="session", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return model_of(request.param)


@pytest.fixture(scope="session", params=FALLBACK)
def fallback_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return model_of(request.param)


@pytest.fixture(scope="session")
def tiny_target() -> PreTrainedModel:
    return model_of("llama")


@pytest.fixture(scope="session")
def named_model():
    return model_of


@pytest.fixture(scope="session")
def judged():
    """Last-position logits of one intervention by the plainest means: hooks, no batch."""

    def logits(model: PreTrainedModel, base: list[int], change: Intervention) -> torch.Tensor:
        ids = torch.tensor([base])
        layers = range(change.first_layer, change.last_layer + 1)
        with capturing(model, layers, change.site) as clean:
            model(ids, use_cache=False)
        patches = []
        for layer in layers:
            for i, position in enumerate(change.positions):
                kind, value = change.kind, None if change.vectors is None else change.vectors[i : i + 1]
                if kind == "mean":
                    kind, value = "replace", clean[layer].mean(1)
                at = torch.tensor([position])
                patches.append(Patch(layer=layer, positions=at, site=change.site, kind=kind, values=value))
        with writing(model, *patches):
            return model(ids, use_cache=False).logits[0, -1]

    return logits
