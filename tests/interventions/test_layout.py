from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from ray_explain.interventions.hooks import capturing
from ray_explain.interventions.layout import LayoutError, last_logits, layout_of

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_the_parts_are_those_the_model_computes_with(model):
    layout = layout_of(model)
    assert (layout.d_model, layout.n_layers, layout.d_vocab) == (32, 3, 101)
    with capturing(model, [2]) as streams:
        logits = model(torch.tensor([[3, 4, 5, 6]])).logits
    torch.testing.assert_close(last_logits(layout, streams[2]), logits)


def test_what_attention_and_mlp_give_is_what_is_added_to_the_residual_stream(model):
    ids = torch.tensor([[3, 4, 5, 6]])
    with (
        capturing(model, [1], "resid_pre") as before,
        capturing(model, [1], "attn_out") as attention,
        capturing(model, [1], "mlp_out") as mlp,
        capturing(model, [1], "resid_post") as after,
    ):
        model(ids)
    torch.testing.assert_close(before[1] + attention[1] + mlp[1], after[1])


def test_a_model_wrapped_by_peft_or_an_engine_is_the_model_inside():
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    blocks = layout_of(llama).blocks
    engine = nn.Module()
    engine.module = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    assert layout_of(engine).blocks is blocks


def test_vectors_that_are_learned_outside_the_model_are_refused():
    tuned = get_peft_model(
        LlamaForCausalLM(LlamaConfig(**SIZES)), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(LayoutError, match="prompt-learning"):
        layout_of(tuned)


def test_an_unknown_layout_says_what_was_looked_for():
    with pytest.raises(
        LayoutError, match=r"BertModel has no list of blocks at .*gpt_neox\.\{layers,h,blocks\}.*encoder"
    ):
        layout_of(BertModel(BertConfig(**SIZES)))


def test_a_block_without_the_submodule_says_what_was_looked_for():
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=101,
            hidden_size=32,
            ffn_dim=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    )
    layout = layout_of(opt)
    assert layout.module(1, "attn_out") is opt.model.decoder.layers[1].self_attn
    with pytest.raises(LayoutError, match=r"no mlp_out of OPTDecoderLayer: looked for mlp, .*fc1"):
        layout.module(1, "mlp_out")


def test_a_layer_that_is_not_there_is_an_error(tiny_target):
    with pytest.raises(ValueError, match="layer 3 of a llama model: it has 3, numbered from 0"):
        layout_of(tiny_target).checked_layer(3)
