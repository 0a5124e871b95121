"""What the benchmark of trainings on a GPU counts as work."""

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from ray_explain.explainer.batches import answer_tokens, collate
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.optimise import with_lora
from ray_explain.explainer.projection import Projection
from tests.benchmarks.bench_training import MARKERS, new_examples, training_flops


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_flops_are_those_that_pytorch_counts(tied: bool, lora: bool) -> None:
    """Of a model most of whose weights are tables, as small ones' are; its prompts are short for its width."""
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=4000,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=tied,
        )
    )
    if lora:
        model = with_lora(model.requires_grad_(False), rank=8, alpha=8, dropout=0.0)
    explainer = Explainer(model, MARKERS, Projection("identity", 256, 256), train_markers=lora)
    examples = new_examples(4, 256, 4000, shortest=20, longest=21)
    batch = collate(examples, 0)
    with FlopCounterMode(display=False) as counter:
        explainer(batch).loss.backward()
    n_tokens = batch.input_ids.numel()  # padding is computed too
    expected = training_flops(model, n_tokens, answer_tokens(examples))
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.1)
