"""A tokenizer made on the spot, and random three-layer targets saved where stages can load them."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from ray_explain import records
from ray_explain.ground_truth.pairs import Pair, SubjectPrompt, patching_case

TEXTS = [
    "Rome lies in Italy. Paris lies in France. Berlin lies in Germany. The capital of Italy is Rome.",
    "Emilio Lussu speaks Italian. Eli Maor is originally from Israel. Lily had a red ball. Tom had a blue boat.",
    "Respond with one of Italian or French or unknown and nothing else. Response: Hint: B Answer: question choices",
]
CONTEXT = 96
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Both trim what is said, as the templates of Llama 3 and Gemma do; the second takes no system turn.
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n\n{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    """The same tokenizer with another chat template."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as Llama 3's: any text has tokens, and a begin-of-text token is put before it."""
    core = Tokenizer(BPE())
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    special = ["<|begin|>", "<|end|>"]
    alphabet = ByteLevel.alphabet()
    core.train_from_iterator(TEXTS, BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet))
    core.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=special[0], eos_token=special[1], chat_template=CHAT
    )


@pytest.fixture(scope="session")
def plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same as Qwen's: it has no begin-of-text token."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = ByteLevelProcessor(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=tokenizer.eos_token, chat_template=CHAT)


@pytest.fixture(params=["begun", "plain"])
def either_tokenizer(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, plain_tokenizer: PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast:
    """With a begin-of-text token, and without."""
    return tokenizer if request.param == "begun" else plain_tokenizer


def random_model(vocabulary: int, family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.4,  # so large that a change somewhere changes the answer
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)) if family == "llama" else Qwen3(Qwen3Config(**sizes))


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return random_model(len(tokenizer)).eval()


@pytest.fixture(scope="session")
def config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return saved(model, tokenizer, tmp_path_factory.mktemp("target"))


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, Any]:
    """The config of a stage that runs this model."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model": str(folder), "dtype": "float32"}


@pytest.fixture(scope="session")
def data() -> Path:
    """Real data and models, which are not part of the repository."""
    folder = Path(os.environ.get("RAY_EXPLAIN_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set RAY_EXPLAIN_DATA to the folder that holds counterfact_2k.jsonl")
    return folder


@pytest.fixture(scope="session")
def case() -> Callable[..., dict[str, Any]]:
    return make_case


def make_case(
    base: str,
    source: str,
    base_position: int,
    source_position: int,
    *,
    block: tuple[int, int] = (1, 1),
    **changes: Any,
) -> dict[str, Any]:
    """A row of records.PATCHING_CASES."""
    pair = Pair(SubjectPrompt(base, (0, 1)), SubjectPrompt(source, (0, 1)), base, "train", "all")
    row = patching_case(pair, "final", block, [base_position], [source_position]) | changes
    return row | {"case_id": records.content_id({name: row[name] for name in row if name != "case_id"})}


def patching_table(rows: list[dict[str, Any]]) -> pa.Table:
    return records.rows_table(rows, records.PATCHING_CASES)
