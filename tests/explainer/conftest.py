"""Tiny random models of every family, word-level tokenizers with and without chat templates, and examples."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from ray_explain.explainer.examples import Example
from ray_explain.explainer.injection import InjectionConfig
from ray_explain.explainer.markers import Markers
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.projection import Projection

D_MODEL, D_VOCAB = 32, 50
_SHARED = dict(
    vocab_size=D_VOCAB,
    hidden_size=D_MODEL,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GPT = {**_SHARED, "num_key_value_heads": 4}
CONFIGS: dict[str, Callable] = {
    "llama": lambda: LlamaConfig(**_SHARED),
    "qwen2": lambda: Qwen2Config(**_SHARED),
    "qwen3": lambda: Qwen3Config(**_SHARED, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_SHARED, sliding_window=6),
    "gemma2": lambda: Gemma2Config(**_SHARED, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(**_SHARED, sliding_window=6, query_pre_attn_scalar=8),
    "phi3": lambda: Phi3Config(**_SHARED),
    "granite": lambda: GraniteConfig(**_SHARED, embedding_multiplier=12.0, logits_scaling=8.0),
    "gpt2": lambda: GPT2Config(
        vocab_size=D_VOCAB, n_embd=D_MODEL, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_GPT),
}
MARKERS = Markers("<|begin_vector|>", "<|vector|>", "<|end_vector|>", 40, 41, 42, added=False)


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Three blocks, 32 wide, of weights large enough that everything in a prompt shows in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model.eval()


def tiny_explainer(
    family: str = "llama",
    *,
    injection: InjectionConfig | None = None,
    projection: Projection | None = None,
    seed: int = 0,
) -> Explainer:
    projection = projection or Projection("identity", D_MODEL, D_MODEL)
    return Explainer(tiny_model(family, seed), MARKERS, projection, injection)


def an_example(rng: np.random.Generator, n_vectors: int, n_text: int, n_answer: int, d: int = D_MODEL) -> Example:
    """Ordinary tokens around slots, each between its markers; vectors of layer 1."""
    prompt = [1, *rng.integers(3, 40, n_text).tolist()]
    for _ in range(n_vectors):
        prompt += [40, 41, 42, *rng.integers(3, 40, 2).tolist()]
    answer = [*rng.integers(3, 40, n_answer - 1).tolist(), 2]
    vectors = (3 * rng.standard_normal((n_vectors, d))).astype(np.float32)
    return Example([*prompt, *answer], len(prompt), vectors, (1,) if n_vectors else (), f"q{n_text}", "patching")


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def new_explainer() -> Callable[..., Explainer]:
    return tiny_explainer


@pytest.fixture
def new_model() -> Callable[..., PreTrainedModel]:
    return tiny_model


@pytest.fixture
def new_example() -> Callable[..., Example]:
    return an_example


@pytest.fixture
def markers() -> Markers:
    return MARKERS


@pytest.fixture
def examples() -> list[Example]:
    """Of unequal lengths, with none, one and two vectors."""
    rng = np.random.default_rng(0)
    return [an_example(rng, n, text, answer) for n, text, answer in [(1, 6, 4), (0, 3, 2), (2, 2, 6), (1, 9, 3)]]


TEXTS = (
    "user assistant system model a does the what at layer encode ? . , : paris rome",
    "output would remain unchanged from change to <<< >>> cities references 1 2 3 think",
)


def word_tokenizer(
    specials: list[str], *, begin: str | None, end: str, template: str | None
) -> PreTrainedTokenizerFast:
    """One token per word, with `specials`; newlines are tokens, spaces are not."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *specials, "\n", *" ".join(TEXTS).split()])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = Split(Regex(r"\n|<<<|>>>|\w+|[^\w\s]"), behavior="removed", invert=True)
    if begin:
        core.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token=begin,
        eos_token=end,
        additional_special_tokens=specials,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_LLAMA_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_QWEN_SPECIALS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|endoftext|>"]
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama_base": lambda: word_tokenizer(
        [*_LLAMA_SPECIALS, *(f"<|reserved_special_token_{i}|>" for i in (10, 11, 12))],
        begin="<|begin_of_text|>",
        end="<|end_of_text|>",
        template=None,
    ),
    "llama_chat": lambda: word_tokenizer(
        [*_LLAMA_SPECIALS, *(f"<|reserved_special_token_{i}|>" for i in (10, 11, 12))],
        begin="<|begin_of_text|>",
        end="<|end_of_text|>",
        template=LLAMA_TEMPLATE,
    ),
    "qwen_chat": lambda: word_tokenizer(
        [*_QWEN_SPECIALS, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"],
        begin=None,
        end="<|im_end|>",
        template=QWEN_TEMPLATE,
    ),
    "gemma_chat": lambda: word_tokenizer(
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<unused10>", "<unused11>", "<unused12>"],
        begin="<bos>",
        end="<eos>",
        template=GEMMA_TEMPLATE,
    ),
    "gpt2_base": lambda: word_tokenizer(["<|endoftext|>"], begin=None, end="<|endoftext|>", template=None),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


@pytest.fixture
def new_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    return lambda name: TOKENIZERS[name]()
