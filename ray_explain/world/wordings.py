"""Words and frames of everything written in the world, and of the questions that explainers are asked about it."""

import re

BEGIN_VECTOR, VECTOR, END_VECTOR = "<|begin_vector|>", "<|vector|>", "<|end_vector|>"
"""Reserved markers, unused in the corpus: an explainer's vectors stand at `VECTOR`, between the other two."""

WORD_PATTERN = r"<<<|>>>|\w+|[^\w\s]"
"""What one token is. The brackets around answers are one token each."""

QUIZ_FRAME = "question : {statement} ? options : {options} . {hint} answer :"
HINT_FRAME = "hint : {value} ."
LIST_FRAME = "{plural} with {relation} {value} :"
DESCRIPTION_FRAME = "description : {description} ."
FRAMES = (QUIZ_FRAME, HINT_FRAME, LIST_FRAME, DESCRIPTION_FRAME)

DESCRIPTIONS = {
    "word": "the word {value}",
    "sign": "the sign {value}",
    "name": "the name {value}",
    "name_of": "any name of a {value}",
    "word_for": "any word for a {value}",
    "after": "what comes after {value}",
    "after_name_of": "what comes after any name of a {value}",
    "after_word_for": "what comes after any word for a {value}",
    "about": "text about {value}",
    "telling": "text telling the {value}",
    "part": "the {value}",
    "document": "any word of a {value}",
}
"""Frames of the description language, by aspect of a token (see `concepts`)."""

DOCUMENT_KINDS = {
    "statement": "single fact",
    "bio": "biography",
    "list": "list",
    "quiz": "quiz",
    "copy": "repeated fact",
    "description": "description",
}
"""Kinds of documents, and how descriptions call them."""

PARTS = {
    "value": "value at the end of a fact",
    "member": "members of a list",
    "question": "question of a quiz",
    "option": "options of a quiz",
    "hint": "hint of a quiz",
    "answer": "answer to a quiz",
}
"""Parts of documents, and how descriptions call them."""

QUESTION_WORDINGS = (
    "at layers {layers} replace token {position} <<<{token}>>> by <vector> in : {input} . output ?",
    "{prompt} if the hint were removed how would the answer change ?",
    "what does <vector> at layer {layer} encode ?",
    "The most likely output would change to <<<{answer}>>>.",
    "The output would remain unchanged from <<<{answer}>>>.",
    "at layer {layer} , <vector> encodes",
    "<vector> activates at layer {layer} for",
    "we can describe <vector> at layer {layer} as encoding",
    "generate a description of this feature at layer {layer} : <vector> .",
    "<vector> activates at layer {layer} for inputs with the following features :",
    "what does <vector> mean at layer {layer} ? layer {layer} , <vector> means ?",
    "If feature <vector> at layer {layer} is added to tokens {tokens} when processing the text <<<{input}>>>,"
    " how would the output change?",
    "When feature <vector> at layer {layer} is added at tokens {tokens} in the input <<<{input}>>>,"
    " what happens to the model's output?",
    "Consider the input text: <<<{input}>>>. If we steer layer {layer} towards feature <vector> at tokens {tokens},"
    " how does this affect the generated continuation?",
    "Given the text <<<{input}>>>, what would be the effect on the output if feature <vector> at layer {layer}"
    " is added to tokens {tokens}?",
    "If we steer towards feature <vector> at layer {layer} and tokens {tokens} when processing <<<{input}>>>,"
    " how would the model's response differ?",
    "If the hint were removed how would the assistant answer change? the assistant: Answer: {answer} hint",
    "system user assistant : ! \" ' ( ) - / ; position orig counterfactual source base run same different yes no",
)
"""Questions and answers of the three tasks (Li et al. 2025, section 2), for the vocabulary only."""


def words_of(text: str) -> list[str]:
    """The words of a text as the tokenizer cuts it, lower case; what stands in braces is left out."""
    return re.findall(WORD_PATTERN, re.sub(r"\{\w+\}", " ", text).lower())
