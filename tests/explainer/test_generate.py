import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ray_explain.explainer.batches import collate
from ray_explain.explainer.examples import Example
from ray_explain.explainer.generate import generate
from ray_explain.explainer.injection import InjectionConfig
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.optimise import with_lora
from ray_explain.explainer.projection import Projection


class Numbers:
    """A tokenizer of 50 tokens, the names of their ids. A slot ends a text: read again, it would ask for a vector."""

    eos_token_id, pad_token_id, chat_template = 41, 0, None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i == 41))


@pytest.fixture
def prompts(new_example):
    rng = np.random.default_rng(4)
    made = [new_example(rng, n % 3, 2 + 3 * n, 1) for n in range(7)]
    return [example._replace(input_ids=example.input_ids[: example.n_prompt]) for example in made]


def without_cache(explainer, prompt, n: int) -> tuple[list[int], float]:
    """Token by token, the whole text read again for each."""
    ids, logprob = list(prompt.input_ids), 0.0
    for _ in range(n):
        batch = collate([prompt._replace(input_ids=ids)], 0)
        with torch.no_grad(), explainer.reading(batch):
            best = explainer.model(batch.input_ids).logits[0, -1].log_softmax(-1).max(-1)
        ids, logprob = [*ids, best.indices.item()], logprob + best.values.item()
        if ids[-1] == 41:
            break
    return ids[len(prompt.input_ids) :], logprob


@pytest.mark.parametrize("injection", [InjectionConfig(), InjectionConfig(mode="add", layer=1)], ids=["replace", "add"])
def test_generation_with_a_cache_in_batches_equals_that_without(family, new_explainer, prompts, injection):
    explainer = new_explainer(family, injection=injection)
    found = generate(explainer, prompts, Numbers(), max_new_tokens=6, batch_size=3)
    for prompt, generation in zip(prompts, found, strict=True):
        ids, logprob = without_cache(explainer, prompt, 6)
        assert generation.text == " ".join(str(i) for i in ids if i != 41)
        assert generation.n_tokens == len(ids)
        assert generation.logprob == pytest.approx(logprob, abs=1e-3)


def test_vectors_are_read(new_explainer, prompts):
    explainer = new_explainer()
    zeros = [prompt._replace(vectors=np.zeros_like(prompt.vectors)) for prompt in prompts]
    one, other = (generate(explainer, some, Numbers(), max_new_tokens=6, batch_size=8) for some in (prompts, zeros))
    for prompt, a, b in zip(prompts, one, other, strict=True):
        assert (a.logprob != b.logprob) == bool(len(prompt.vectors))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 50])
def test_a_row_does_not_depend_on_its_batch(new_explainer, prompts, batch_size):
    explainer = new_explainer("qwen3")
    alone = [generate(explainer, [prompt], Numbers(), max_new_tokens=6, batch_size=1)[0] for prompt in prompts]
    together = generate(explainer, prompts, Numbers(), max_new_tokens=6, batch_size=batch_size)
    assert [g.text for g in together] == [g.text for g in alone]
    assert [g.logprob for g in together] == pytest.approx([g.logprob for g in alone], abs=1e-4)


def test_nothing_after_the_end_token_counts(new_explainer, prompts):
    """Rows end at different steps: each is what it is alone."""
    explainer = new_explainer()

    class EndsAt(Numbers):
        eos_token_id = int(
            generate(explainer, prompts[:1], Numbers(), max_new_tokens=3, batch_size=1)[0].text.split()[-1]
        )

    found = generate(explainer, prompts, EndsAt(), max_new_tokens=12, batch_size=7)
    assert found[0].n_tokens <= 3 < max(generation.n_tokens for generation in found)
    for prompt, generation in zip(prompts, found, strict=True):
        assert generation == pytest.approx(generate(explainer, [prompt], EndsAt(), max_new_tokens=12, batch_size=1)[0])


def test_with_adapters_and_their_markers_too(new_model, markers, prompts):
    model = with_lora(new_model("llama"), rank=4, alpha=8, dropout=0.5)
    explainer = Explainer(model, markers, Projection("identity", 32, 32), train_markers=True)
    with torch.no_grad():
        for name, parameter in explainer.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 2 if name == "marker_embeddings" else 0.2)
    explainer.train()
    found = generate(explainer, prompts, Numbers(), max_new_tokens=4, batch_size=3)
    assert explainer.training  # as it was; dropout is off while it answers
    explainer.eval()
    for prompt, generation in zip(prompts, found, strict=True):
        assert generation.logprob == pytest.approx(without_cache(explainer, prompt, 4)[1], abs=1e-3)


def test_no_prompts_are_no_answers(new_explainer):
    assert generate(new_explainer(), [], Numbers(), max_new_tokens=4, batch_size=3) == []


def test_text_has_no_special_tokens_and_no_space_around(new_explainer, new_tokenizer):
    tokenizer: PreTrainedTokenizerFast = new_tokenizer("llama_chat")
    prompt = Example([1, 20, 21], 3, np.empty((0, 32), np.float32), (), "q", "text")
    explainer = new_explainer()
    (found,) = generate(explainer, [prompt], tokenizer, max_new_tokens=20, batch_size=1)
    assert found.text == found.text.strip()
    assert not any(special in found.text for special in tokenizer.all_special_tokens if special != "<unk>")
