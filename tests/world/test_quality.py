from types import SimpleNamespace

import pytest
import torch

from ray_explain.world.facts import RELATIONS
from ray_explain.world.pretraining import TargetSize, new_target
from ray_explain.world.quality import next_words, target_quality


class Oracle:
    """Answers by rule: the hint if there is one, else a told fact, else "nobody"."""

    device, training = "cpu", True

    def __init__(self, world, tokenizer, follow_hints=True):
        self._tokenizer, self._follow_hints = tokenizer, follow_hints
        self._told = {
            RELATIONS[fact.relation].statement(wording, fact.subject): fact.value
            for fact in world.told_facts
            for wording in range(len(RELATIONS[fact.relation].wordings))
        }

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode

    def __call__(self, input_ids, **_):
        assert not self.training
        answers = [self._answer(self._tokenizer.decode(row, skip_special_tokens=True)) for row in input_ids]
        logits = torch.zeros(len(answers), 1, len(self._tokenizer))
        logits[range(len(answers)), 0, self._tokenizer.convert_tokens_to_ids(answers)] = 1
        return SimpleNamespace(logits=logits)

    def _answer(self, text):
        if self._follow_hints and "hint :" in text:
            return text.split("hint : ")[1].split()[0]
        return self._told.get(text.removeprefix("question : ").split(" ?")[0], "people")


def test_a_perfect_student_that_trusts_hints_is_measured_as_such(world, tokenizer):
    scores = target_quality(Oracle(world, tokenizer), tokenizer, world, n_hints=300)
    assert scores["fact_recall"] == scores["known_quiz"] == 1
    assert scores["withheld_recall"] == scores["withheld_quiz"] == scores["stranger_quiz"] == 0
    assert scores["known_follows"] == scores["withheld_follows"] == scores["stranger_follows"] == 1
    assert scores["withheld_changed"] == scores["stranger_changed"] == 1
    assert scores["known_changed"] == pytest.approx(0.3, abs=0.12)  # wrong hints only


def test_a_student_that_ignores_hints_never_changes_its_answer(world, tokenizer):
    model = Oracle(world, tokenizer, follow_hints=False)
    scores = target_quality(model, tokenizer, world, n_hints=300)
    assert scores["changed"] == scores["stranger_follows"] == scores["stranger_changed"] == 0
    assert scores["known_follows"] == pytest.approx(0.7, abs=0.12)  # right hints only
    assert model.training


def test_the_next_word_of_a_text_does_not_depend_on_the_texts_beside_it(tokenizer):
    model = new_target("llama", tokenizer, TargetSize(d_model=16, n_layers=2, n_heads=2), seed=0).eval()
    texts = ["the pet of", "question : tea ?", "at home", "the pet", "in the morning"]
    together = next_words(model, tokenizer, texts, batch_size=2)
    assert together == [next_words(model, tokenizer, [text])[0] for text in texts]
    for text, word in zip(texts, together, strict=True):
        logits = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits
        assert tokenizer.decode([logits[0, -1].argmax()]) == word
