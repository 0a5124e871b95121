import random
from itertools import islice

import pytest

from ray_explain.world.corpus import (
    HINTED_SHARE,
    MIXTURES,
    RIGHT_HINT_SHARE,
    documents,
    fact_prompt,
    quiz_options,
    quiz_prompt,
    random_hint,
    replay_texts,
)
from ray_explain.world.facts import RELATIONS


@pytest.fixture(scope="module")
def texts(world):
    return list(islice(documents(world, "tests", 1), 6000))


def statements(fact):
    relation = RELATIONS[fact.relation]
    return [relation.statement(wording, fact.subject) for wording in range(len(relation.wordings))]


def test_the_stream_depends_on_its_seed_only(world):
    first, again, other = (
        [document.text for document in islice(documents(world, seed, 1), 50)] for seed in ("a", "a", "b")
    )
    assert first == again != other


def test_withheld_facts_are_in_no_text(world, texts):
    told = " | ".join(document.text for document in texts)
    for fact in world.facts:
        if not fact.told:
            assert not any(statement in told for statement in statements(fact))
            lists = [d.text for d in texts if d.kind == "list" and f"with {fact.relation} {fact.value} :" in d.text]
            assert not any(fact.subject in text.split() for text in lists)


def test_told_facts_are_told_truly_and_in_every_wording(world, texts):
    told = " | ".join(document.text for document in texts if document.kind in ("statement", "bio"))
    seen = [statement for fact in world.told_facts for statement in statements(fact) if statement in told]
    assert len(seen) > 0.9 * sum(len(statements(fact)) for fact in world.told_facts)
    for fact in world.told_facts:
        for statement in statements(fact):
            assert told.count(f"{statement} ") == told.count(f"{statement} {fact.value} .")


def test_strangers_have_another_value_each_time(world, texts):
    values: dict[tuple[str, str], set[str]] = {}
    for document in texts:
        for word in document.words:
            if world.kind_of(word.subject) == "stranger" and word.part in ("value", "answer") and word.text != ":":
                values.setdefault((word.subject, word.relation), set()).add(word.text)
    assert len(values) == 6 * len(world.entities["stranger"])
    assert min(map(len, values.values())) > 3


def test_a_repeated_fact_is_the_same_both_times(texts):
    for document in texts:
        if document.kind == "copy":
            told = [(word.subject, word.relation, word.text) for word in document.words if word.part == "value"]
            assert told[0] == told[-1] and 2 <= len(told) <= 3


def test_all_kinds_of_documents_are_written_in_about_their_shares(texts):
    for kind, share in MIXTURES[1].items():
        assert sum(document.kind == kind for document in texts) / len(texts) == pytest.approx(share, abs=0.03)


def test_quizzes_teach_that_hints_are_often_but_not_always_right(texts):
    quizzes = [document for document in texts if document.kind == "quiz"]
    hinted = [d for d in quizzes if any(word.part == "hint" for word in d.words)]
    right = [d for d in hinted if [w.text for w in d.words if w.part == "hint"][2] == d.words[-2].text]
    assert len(hinted) / len(quizzes) == pytest.approx(HINTED_SHARE, abs=0.04)
    assert len(right) / len(hinted) == pytest.approx(RIGHT_HINT_SHARE, abs=0.04)


def test_values_that_can_be_known_weigh_more_than_words_that_nothing_predicts(texts):
    for document in texts:
        weights = {part: [w.weight for w in document.words if w.part == part] for part in ("option", "hint", "value")}
        if document.kind == "quiz":
            assert document.words[-2].weight == 3 and max(weights["option"] + weights["hint"]) == 0.1
        if document.kind == "copy":
            assert (weights["value"][0], weights["value"][-1]) == (0.1, 3)
        if document.kind in ("statement", "bio"):
            assert set(weights["value"]) == {3}
        names = [word for word in document.words if word.text == word.subject]
        assert all(word.weight == 0.1 for word in names)


def test_a_word_is_about_its_subject_only_once_that_is_named(texts):
    for document in texts:
        if document.kind != "statement":
            continue
        at = next(i for i, word in enumerate(document.words) if word.text == word.subject)
        assert {word.subject for word in document.words[:at]} <= {""}
        assert {word.subject for word in document.words[at:]} == {document.words[at].text}


def test_a_fact_prompt_ends_right_before_its_answer(world, texts):
    told = {document.text for document in texts if document.kind == "statement"}
    prompts = [
        fact_prompt(world, fact.subject, fact.relation, wording)
        for fact in world.told_facts
        for wording in range(len(RELATIONS[fact.relation].wordings))
    ]
    assert told <= {f"{prompt.text} {prompt.answer} ." for prompt in prompts}
    for prompt in prompts:
        start, end = prompt.spans["subject"]
        assert world.kind_of(prompt.text[start:end]) in ("person", "city", "company", "country")


def test_there_is_no_fact_prompt_about_a_stranger(world):
    stranger = world.entities["stranger"][0]
    with pytest.raises(ValueError, match=stranger):
        fact_prompt(world, stranger, "pet", 0)


def test_a_quiz_without_the_hint_span_is_the_same_quiz_unhinted():
    options = ("tea", "milk", "wine", "beer")
    for wording in range(4):
        hinted = quiz_prompt("dorin", "drink", wording, options=options, answer="tea", hint="wine")
        unhinted = quiz_prompt("dorin", "drink", wording, options=options, answer="tea")
        start, end = hinted.spans["hint"]
        assert hinted.text[start:end] == "hint : wine . "
        assert hinted.text[:start] + hinted.text[end:] == unhinted.text
        assert "hint" not in unhinted.spans
        assert {prompt.text[slice(*prompt.spans["subject"])] for prompt in (hinted, unhinted)} == {"dorin"}
        assert unhinted.text.endswith("answer :")


def test_quiz_documents_are_quiz_prompts_with_their_answer(texts):
    quiz = next(document for document in texts if document.kind == "quiz" and "hint" in document.text)
    options = tuple(w.text for w in quiz.words if w.part == "option")[2:-1:2]
    word = quiz.words[-2]
    hint = [w.text for w in quiz.words if w.part == "hint"][2]
    prompts = [
        quiz_prompt(word.subject, word.relation, wording, options=options, answer=word.text, hint=hint)
        for wording in range(4)
    ]
    assert quiz.text in [f"{prompt.text} {prompt.answer} ." for prompt in prompts]


@pytest.mark.parametrize("wrong", [{"answer": "soup"}, {"answer": "tea", "hint": "soup"}])
def test_answer_and_hint_must_be_options(wrong):
    with pytest.raises(ValueError, match="'soup' is not among the options tea, milk"):
        quiz_prompt("dorin", "drink", 0, options=("tea", "milk"), **wrong)


def test_options_are_different_values_of_the_relation_with_the_answer_anywhere(world):
    rng = random.Random(0)
    drawn = [quiz_options(world, "drink", "tea", rng) for _ in range(200)]
    assert {options.index("tea") for options in drawn} == {0, 1, 2, 3}
    assert all(len(set(options)) == 4 and set(options) <= set(world.values("drink")) for options in drawn)


def test_a_wrong_hint_is_another_option():
    rng = random.Random(0)
    hints = [random_hint(("tea", "milk", "wine"), "tea", rng) for _ in range(300)]
    assert set(hints) == {"tea", "milk", "wine"}
    assert hints.count("tea") / 300 == pytest.approx(RIGHT_HINT_SHARE, abs=0.08)


def test_replay_is_true_and_keeps_withheld_facts_withheld(world):
    pairs = replay_texts(world, 2000, seed=0)
    assert pairs == replay_texts(world, 2000, seed=0) != replay_texts(world, 2000, seed=1)
    truth = {(statement, fact.value) for fact in world.told_facts for statement in statements(fact)}
    sentences = [pair for pair in pairs if not pair[0].startswith("question")]
    assert len(sentences) == 1000 and set(sentences) <= truth
    quizzes = [pair for pair in pairs if pair[0].startswith("question")]
    for prompt, answer in quizzes:
        asked = prompt.removeprefix("question : ").split(" ?")[0]
        known = [value for statement, value in truth if statement == asked]
        about_stranger = bool(set(asked.split()) & set(world.entities["stranger"]))
        assert known == [answer] or (about_stranger and f"hint : {answer} ." in prompt)
        assert answer in prompt.split("options : ")[1].split(" . ")[0].split(" , ")
