import copy
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from ray_explain.interventions.extraction import residuals
from ray_explain.interventions.hooks import Patch, capturing, writing
from ray_explain.interventions.layout import LayoutError, last_logits, layout_of
from ray_explain.interventions.patching import Intervention, patch_sweep

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


def test_in_half_precision_soft_capped_logits_are_the_models_own_to_the_last_bit(named_model):
    model = copy.deepcopy(named_model("gemma2")).bfloat16()
    with capturing(model, [2]) as streams:
        logits = model(torch.tensor([[3, 4, 5, 6]])).logits
    assert torch.equal(last_logits(layout_of(model), streams[2]), logits.float())


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


def other_family(name: str) -> PreTrainedModel:
    """A random model of a family that works through hooks."""
    grouped = SIZES | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"vocab_size": 101, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    configs = {
        "olmo2": lambda: hf.Olmo2Config(**grouped),
        "cohere": lambda: hf.CohereConfig(**grouped, logit_scale=0.5),  # attention and MLP side by side
        "glm4": lambda: hf.Glm4Config(**grouped, head_dim=8),
        "bloom": lambda: hf.BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4),
        "mpt": lambda: hf.MptConfig(vocab_size=101, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
        "falcon": lambda: hf.FalconConfig(**sizes, parallel_attn=False),
        "falcon, side by side": lambda: hf.FalconConfig(**sizes),
        "bloom, stream after norm": lambda: hf.BloomConfig(
            vocab_size=101, hidden_size=32, n_layer=2, n_head=4, apply_residual_connection_post_layernorm=True
        ),
        "granite": lambda: hf.GraniteConfig(**grouped, residual_multiplier=0.22),
    }
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(configs[name]()).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", ["olmo2", "cohere", "glm4", "bloom", "mpt", "falcon"])
def test_what_attention_and_mlp_give_is_what_is_added_in_other_families_too(name: str):
    model = other_family(name)
    test_what_attention_and_mlp_give_is_what_is_added_to_the_residual_stream(model)
    with (
        capturing(model, [1], "resid_post") as after,
        writing(model, Patch(layer=1, positions=torch.tensor([2]), site="mlp_out", kind="zero")),
        writing(model, Patch(layer=1, positions=torch.tensor([2]), site="attn_out", kind="zero")),
        capturing(model, [1], "resid_pre") as before,
    ):
        model(torch.tensor([[3, 4, 5, 6]]))
    torch.testing.assert_close(after[1][:, 2], before[1][:, 2])


@pytest.mark.parametrize("name", ["falcon, side by side", "bloom, stream after norm", "granite"])
def test_a_family_whose_parts_are_not_what_is_added_is_refused_with_the_difference(name: str):
    model = other_family(name)
    base, ids = [3, 4, 5, 6], torch.tensor([[3, 4, 5, 6]])
    family = name.split(",")[0]
    for site in ("attn_out", "mlp_out"):
        for _ in range(2):  # also when asked again
            with pytest.raises(LayoutError, match=f"this {family} model.* differs by .*use resid_pre or resid_post"):
                residuals(model, [base], [0], site=site)
        change = Intervention(base=0, positions=(1,), first_layer=0, last_layer=1, site=site, kind="zero")
        with pytest.raises(LayoutError, match=family):
            list(patch_sweep(model, [base], [change]))
    with capturing(model, [0]) as after:
        model(ids)
    torch.testing.assert_close(residuals(model, [base], [0])[0][0], after[0][0])


def test_the_check_of_the_parts_does_not_run_the_hooks_of_others():
    model = other_family("olmo2")
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda module, given, out: seen.append(out))
    with capturing(model, [0, 1], "mlp_out"):
        assert seen == []
        model(torch.tensor([[3, 4, 5, 6]]))
    assert len(seen) == 1
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


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
