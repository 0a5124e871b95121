"""The three tokens that say "here stands a vector": begin, slot, end."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

VECTOR_MARK = "<vector>"
"""What stands for a vector in the prompt of a question, whoever is asked."""

N_MARKERS = 3
RESERVED = (
    ("<|begin_vector|>", "<|vector|>", "<|end_vector|>"),
    ("<|reserved_special_token_10|>", "<|reserved_special_token_12|>", "<|reserved_special_token_11|>"),  # Llama 3
    ("<|vision_start|>", "<|vision_pad|>", "<|vision_end|>"),  # Qwen
    ("<unused10>", "<unused12>", "<unused11>"),  # Gemma
)
"""(begin, slot, end) that a vocabulary may have and no text uses; those of Llama and Qwen are the paper's choice."""


@dataclass(frozen=True)
class Markers:
    """Texts and ids of the three tokens; `added` where they are new to the tokenizer, and the model may lack their
    rows (`make_room`)."""

    begin: str
    slot: str
    end: str
    begin_id: int
    slot_id: int
    end_id: int
    added: bool

    @property
    def texts(self) -> tuple[str, str, str]:
        return (self.begin, self.slot, self.end)

    @property
    def ids(self) -> tuple[int, int, int]:
        return (self.begin_id, self.slot_id, self.end_id)

    @property
    def text(self) -> str:
        """What replaces `VECTOR_MARK` in a prompt."""
        return "".join(self.texts)


def markers_of(tokenizer: PreTrainedTokenizerBase) -> Markers:
    """The reserved tokens of the vocabulary; where it has none that we know, three are added to `tokenizer`.

    Raises:
        ValueError: the tokenizer cuts a marker into pieces.
    """
    vocabulary = tokenizer.get_vocab()
    known = next((texts for texts in RESERVED if all(text in vocabulary for text in texts)), None)
    begin, slot, end = known or RESERVED[0]
    before = len(tokenizer)
    tokenizer.add_special_tokens(  # known ones too: as plain words of the vocabulary they might be cut
        {"extra_special_tokens": [begin, slot, end]}, replace_extra_special_tokens=False
    )
    vocabulary = tokenizer.get_vocab()
    ids = (vocabulary[begin], vocabulary[slot], vocabulary[end])
    markers = Markers(begin, slot, end, *ids, added=len(tokenizer) > before)
    found = tokenizer.encode(f"a {markers.text} a", add_special_tokens=False)
    if [token for token in found if token in markers.ids] != list(markers.ids):
        raise ValueError(
            f"the tokenizer reads {markers.text!r} as {found}, not as the tokens {list(markers.ids)}: "
            "its markers would be cut; use a tokenizer that keeps special tokens whole"
        )
    return markers
