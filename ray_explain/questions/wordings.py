"""The words a question is asked in: sets of templates, each with an id such as "paper/patching/3".

"paper" holds the templates of "Training Language Models to Explain Their Own Computations" (arXiv 2511.08579) for
explainers without a chat template, byte for byte; "paper_chat" and "paper_qwen" those for chat explainers, whose user
turn they are. "brief" is for small models with one token per word: single spaces, punctuation on its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ray_explain import records

VECTOR = "<vector>"  # stands in a prompt once for each of the question's vectors
CHANGED = "The most likely output would change to <<<{content}>>>."
UNCHANGED = "The output would remain unchanged from <<<{content}>>>."
ANSWERED = "Answer: {word}"  # the content of both about ablations, but in brief

_PATCHING = (
    "If feature {vectors} at layer {layers} is added to tokens {tokens} when processing the text <<<{input}>>>, "
    "how would the output change?",
    "When feature {vectors} at layer {layers} is added at tokens {tokens} in the input <<<{input}>>>, "
    "what happens to the model's output?",
    "Consider the input text: <<<{input}>>>. If we steer layer {layers} towards feature {vectors} at tokens {tokens}, "
    "how does this affect the generated continuation?",
    "Given the text <<<{input}>>>, what would be the effect on the output if feature {vectors} at layer {layers} "
    "is added to tokens {tokens}?",
    "If we steer towards feature {vectors} at layer {layers} and tokens {tokens} when processing <<<{input}>>>, "
    "how would the model's response differ?",
)
_FEATURES_BASE = (
    "At layer {layers}, {vectors} encodes ",
    "{vectors} activates at layer {layers} for ",
    "We can describe {vectors} at layer {layers} as encoding ",
    "Generate a description of this feature at layer {layers}: {vectors}. ",
    "What does {vectors} encode at layer {layers}? ",
    "{vectors} activates at layer {layers} for inputs with the following features: ",
)
_FEATURES_CHAT = (
    "Generate a description of this feature at layer {layers}: {vectors}",
    "What does {vectors} encode at layer {layers}?",
    "{vectors} activates at layer {layers} for inputs with the following features:",
)
_FEATURES_QWEN = (*_FEATURES_CHAT, "What does {vectors} mean at layer {layers}?", "Layer {layers}, {vectors} means?")
_ABLATION = ("{prompt}\n\nIf the hint were removed how would the assistant answer change?",)

_TEMPLATES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "paper": {
        "patching": tuple(template + "\n" for template in _PATCHING),  # base explainers read on from a new line
        "ablation": _ABLATION,
        "features": _FEATURES_BASE,
    },
    "paper_chat": {"patching": _PATCHING, "ablation": _ABLATION, "features": _FEATURES_CHAT},
    "paper_qwen": {"patching": _PATCHING, "ablation": _ABLATION, "features": _FEATURES_QWEN},
    "brief": {
        "patching": (
            "at layers {layers} replace token {positions} <<<{tokens}>>> by {vectors} in : {input} . output ?",
        ),
        "ablation": ("{prompt} if the hint were removed how would the answer change ?",),
        "features": ("what does {vectors} at layer {layers} encode ?",),
    },
}
SETS = tuple(_TEMPLATES)


@dataclass(frozen=True, kw_only=True)
class Wording:
    """One template of a set, and how the set writes lists and answers."""

    id: str  # "paper/patching/3"; the last number counts from 1
    template: str
    brief: bool

    def prompt(self, **fields: str) -> str:
        """The template with its fields filled in."""
        return self.template.format(**fields)

    @property
    def quoting(self) -> "Wording":
        """The same words about a span that they quote, the field `span`, instead of "the hint"."""
        return replace(self, template=self.template.replace("the hint", "<<<{span}>>>"))

    def vectors(self, n: int) -> str:
        """The marks for `n` vectors."""
        return (" " if self.brief else "").join([VECTOR] * n)

    def numbers(self, values: list[int]) -> str:
        """A list of layers or positions: "8, 9, 10" in the paper's words, "8 9 10" in brief."""
        return (" " if self.brief else ", ").join(map(str, values))

    def tokens(self, texts: list[str]) -> str:
        """Texts of patched tokens: as they are in angle brackets, or trimmed in brief."""
        if self.brief:
            return " ".join(text.strip() for text in texts)
        return ", ".join(f"<{text}>" for text in texts)

    def effect(self, changed: bool, content: str) -> str:
        """The paper's sentence that says what an intervention does to the output; `content` is the new output if it
        changes and the old one if not. A leading space of `content` stays, but in brief."""
        return (CHANGED if changed else UNCHANGED).format(content=content.strip() if self.brief else content)


def wordings(name: str, task: str) -> tuple[Wording, ...]:
    """The wordings of a task in a set.

    Raises:
        ValueError: there is no such set or task.
    """
    if name not in _TEMPLATES:
        raise ValueError(f"wording {name!r}: there is {', '.join(SETS)}")
    if task not in _TEMPLATES[name]:
        raise ValueError(f"task {task!r}: there is {', '.join(_TEMPLATES[name])}")
    return tuple(
        Wording(id=f"{name}/{task}/{number}", template=template, brief=name == "brief")
        for number, template in enumerate(_TEMPLATES[name][task], start=1)
    )


def says(name: str, kind: str) -> bool:
    """Whether a set has words for a patch of this kind.

    The paper's say of a vector that replaces another that it is "added": they serve for both kinds. None has words for
    what writes no vector (`zero`, `mean`), nor names a site: an experiment is about one.
    """
    return kind == "replace" or (kind == "add" and name != "brief")


def version(name: str) -> str:
    """An id of all the words of a set, to be kept beside what was trained on them; it changes when a byte of them does.

    Raises:
        ValueError: there is no such set.
    """
    return records.content_id(
        name, CHANGED, UNCHANGED, [[w.template for w in wordings(name, t)] for t in records.TASKS]
    )


def drawing(name: str, task: str, seed: int) -> Callable[[str], Wording]:
    """Draws a case's wording: by the case's id and `seed` alone, so that it is the same in whatever table it stands."""
    choices = wordings(name, task)
    return lambda case_id: choices[int(records.content_id("wording", case_id, seed), 16) % len(choices)]
