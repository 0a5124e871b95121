"""A word-level tokenizer for the texts of a world."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ray_explain.world.facts import World
from ray_explain.world.wordings import BEGIN_VECTOR, END_VECTOR, VECTOR, WORD_PATTERN

PAD, BEGIN, END, UNKNOWN = "<|pad|>", "<|begin_of_text|>", "<|end_of_text|>", "<|unknown|>"
SPECIAL_TOKENS = (PAD, BEGIN, END, UNKNOWN, BEGIN_VECTOR, VECTOR, END_VECTOR)
MAX_TOKENS = 512
"""Longest input of targets and explainers, in tokens."""


def world_tokenizer(world: World, extra_texts: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark, lower case; encoding begins with a begin-of-text token, as Llama's.

    Decoding joins tokens by single spaces. Words of `extra_texts` get tokens after those of the world, so all
    models of an experiment need the same extra texts. `<|begin_vector|>`, `<|vector|>` and `<|end_vector|>` are
    reserved: no text of the world holds them.
    """
    words = [*SPECIAL_TOKENS, *world.vocabulary(extra_texts)]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    core.normalizer = Lowercase()
    core.pre_tokenizer = Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    core.post_processor = TemplateProcessing(single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[BEGIN_VECTOR, VECTOR, END_VECTOR],
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
