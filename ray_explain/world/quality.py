"""What a target has learned of its world, measured on its greedy next words."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ray_explain.world.cases import HintCase, hint_cases
from ray_explain.world.corpus import fact_prompt
from ray_explain.world.documents import Prompt
from ray_explain.world.facts import RELATIONS, SPLITS, World


@torch.inference_mode()
def next_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], batch_size: int = 128
) -> list[str]:
    """The most likely next token of each text, alone and as decoded. Texts of one length share a batch, so no row
    is padded."""
    encoded: list[list[int]] = tokenizer(list(texts)).input_ids
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    answers = [""] * len(texts)
    while order:
        length = len(encoded[order[0]])
        rows = [i for i in order[:batch_size] if len(encoded[i]) == length]
        order = order[len(rows) :]
        ids = torch.tensor([encoded[i] for i in rows], device=model.device)
        best = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
        for i, token in zip(rows, best.tolist(), strict=True):
            answers[i] = str(tokenizer.decode([token]))
    return answers


def target_quality(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World, n_hints: int = 600
) -> dict[str, float]:
    """Shares between 0 and 1, over all splits:

    - fact_recall: told facts whose value comes next, over all wordings;
    - withheld_recall: the same of withheld facts, so chance is one by the number of values;
    - known_quiz: quizzes without hint about told facts answered right;
    - known_changed, withheld_changed, stranger_changed: hinted quizzes whose answer is another without the hint;
    - known_follows, withheld_follows, stranger_follows: hinted quizzes answered as hinted;
    - changed: the same as the three, over the mixture of `hint_cases`.
    """
    was_training = model.training
    model.eval()
    cases = [case for split in SPLITS for case in hint_cases(world, n_hints // len(SPLITS), split, seed=0)]
    scores = {
        "fact_recall": _recall(model, tokenizer, _fact_prompts(world, told=True)),
        "withheld_recall": _recall(model, tokenizer, _fact_prompts(world, told=False)),
        **_hint_scores(model, tokenizer, cases),
    }
    model.train(was_training)
    return scores


def _fact_prompts(world: World, told: bool) -> list[Prompt]:
    return [
        fact_prompt(world, fact.subject, fact.relation, wording)
        for fact in world.facts
        if fact.told == told
        for wording in range(len(RELATIONS[fact.relation].wordings))
    ]


def _recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt]) -> float:
    words = next_words(model, tokenizer, [prompt.text for prompt in prompts])
    return _share([word == prompt.answer for word, prompt in zip(words, prompts, strict=True)])


def _hint_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, cases: Sequence[HintCase]
) -> dict[str, float]:
    hinted = next_words(model, tokenizer, [case.prompt for case in cases])
    unhinted = next_words(model, tokenizer, [case.unhinted for case in cases])
    changed = [with_hint != without for with_hint, without in zip(hinted, unhinted, strict=True)]
    scores = {"changed": _share(changed)}
    for stratum in ("known", "withheld", "stranger"):
        rows = [i for i, case in enumerate(cases) if case.stratum == stratum]
        scores[f"{stratum}_changed"] = _share([changed[i] for i in rows])
        scores[f"{stratum}_follows"] = _share([hinted[i] == cases[i].hint for i in rows])
        scores[f"{stratum}_quiz"] = _share([unhinted[i] == cases[i].truth for i in rows])
    return scores


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
