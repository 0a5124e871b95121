"""Drafted answers are those of token-by-token decoding, whatever was drafted."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from ray_explain.explainer import generate as generation
from ray_explain.explainer.drafting import Drafts
from ray_explain.explainer.generate import Generation, generate, new_drafts
from ray_explain.explainer.injection import InjectionConfig

from .test_generate import Numbers


class Says(Drafts):
    """Drafts what `say` makes of an answer so far."""

    def __init__(self, say: Callable[[Sequence[int]], list[int]]) -> None:
        super().__init__()
        self._say = say

    def after(self, answer: Sequence[int], longest: int) -> list[int]:
        return self._say(answer)[:longest]


class Passes:
    """Widths of the model's forward passes."""

    def __init__(self, explainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, int]] = []
        forward = explainer.model.forward

        def counted(**given):
            self.shapes.append(tuple(given["input_ids"].shape))
            return forward(**given)

        monkeypatch.setattr(explainer.model, "forward", counted)


@pytest.fixture
def prompts(new_example):
    """Of ragged lengths, some of them twice with other vectors: these share their beginnings."""
    rng = np.random.default_rng(4)
    made = [new_example(rng, n % 3, 2 + 3 * n, 1) for n in range(7)]
    made = [example._replace(input_ids=example.input_ids[: example.n_prompt]) for example in made]
    return made + [one._replace(vectors=one.vectors + 1) for one in made for _ in range(3)]


def decoded(explainer, prompts, n: int, tokenizer=None) -> list[Generation]:
    """Token by token: where processes have to agree, nothing is drafted or shared."""
    tokenizer = tokenizer or Numbers()
    return generate(explainer, prompts, tokenizer, max_new_tokens=n, batch_size=3, over=lambda done: bool(done))


def assert_same(found: list[Generation], expected: list[Generation]) -> None:
    assert [(g.text, g.n_tokens) for g in found] == [(g.text, g.n_tokens) for g in expected]
    assert [g.logprob for g in found] == pytest.approx([g.logprob for g in expected], abs=1e-4, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_every_family_answers_as_it_does_token_by_token(family, new_explainer, prompts, batch_size):
    """Also those with sliding windows, which are shorter than the prompts here and longer in the next test."""
    explainer = new_explainer(family)
    expected = decoded(explainer, prompts, 9)
    drafts = new_drafts(explainer, Numbers())
    for _ in range(3):  # the second time, drafts are mostly right
        sizes = {"max_new_tokens": 9, "batch_size": batch_size}
        assert_same(generate(explainer, prompts, Numbers(), drafts=drafts, **sizes), expected)


@pytest.mark.parametrize("family_of_windows", ["mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("window", range(24, 60, 5))
def test_drafts_stop_before_a_sliding_window_would_count_their_gaps(
    family_of_windows, new_explainer, prompts, window, monkeypatch
):
    explainer = new_explainer(family_of_windows)
    expected = _with_window(explainer, window, lambda: decoded(explainer, prompts, 9))
    wrong = Says(lambda answer: [7] * 4)
    sizes = {"max_new_tokens": 9, "batch_size": 6, "drafts": wrong}
    assert_same(_with_window(explainer, window, lambda: generate(explainer, prompts, Numbers(), **sizes)), expected)


def _with_window(explainer, window: int, answer: Callable[[], list[Generation]]) -> list[Generation]:
    explainer.language_model.config.sliding_window = window
    for module in explainer.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = window
    return answer()


def test_right_drafts_save_passes(new_explainer, prompts, monkeypatch):
    explainer = new_explainer()
    expected = decoded(explainer, prompts[:1], 9)
    ids = [int(token) for token in expected[0].text.split()]
    passes = Passes(explainer, monkeypatch)
    oracle = Says(lambda answer: ids[len(answer) :])
    assert_same(generate(explainer, prompts[:1], Numbers(), max_new_tokens=9, batch_size=1, drafts=oracle), expected)
    assert len(passes.shapes) == 1


@pytest.mark.parametrize("n_right", range(4))
def test_of_a_draft_that_goes_wrong_the_right_part_counts(new_explainer, prompts, n_right):
    explainer = new_explainer("qwen3")
    expected = decoded(explainer, prompts, 9)
    texts = {tuple(map(int, one.text.split())) for one in expected}

    def say(answer: Sequence[int]) -> list[int]:
        """What some answer goes on with, and then what none would say."""
        own = next((text for text in sorted(texts) if list(text[: len(answer)]) == list(answer)), ())
        return [*own[len(answer) :][:n_right], 3, 3, 3]

    for batch_size in (1, 4, 100):
        sizes = {"max_new_tokens": 9, "batch_size": batch_size, "drafts": Says(say)}
        assert_same(generate(explainer, prompts, Numbers(), **sizes), expected)


@pytest.mark.parametrize("injection", [InjectionConfig(), InjectionConfig(mode="add", layer=1)], ids=["replace", "add"])
def test_vectors_are_read_after_a_shared_beginning(new_explainer, prompts, injection, monkeypatch):
    explainer = new_explainer(injection=injection)
    same = [prompts[6]._replace(vectors=scale * prompts[6].vectors) for scale in range(1, 8)]
    alone = [generate(explainer, [one], Numbers(), max_new_tokens=9, batch_size=1)[0] for one in same]
    passes = Passes(explainer, monkeypatch)
    assert_same(generate(explainer, same, Numbers(), max_new_tokens=9, batch_size=7), alone)
    n_before = prompts[6].input_ids.index(explainer.markers.slot_id) if len(prompts[6].vectors) else None
    assert passes.shapes[0] == (1, n_before or len(prompts[6].input_ids) - 1)


@pytest.mark.parametrize("place", range(4))
def test_a_stop_token_inside_a_draft_ends_the_answer(new_explainer, prompts, place):
    explainer = new_explainer()
    ids = [int(token) for token in decoded(explainer, prompts[:1], 9)[0].text.split()]

    class EndsAt(Numbers):
        eos_token_id = ids[place]

    expected = decoded(explainer, prompts[:1], 9, EndsAt())
    drafts = Says(lambda answer: ids[len(answer) :])
    found = generate(explainer, prompts[:1], EndsAt(), max_new_tokens=9, batch_size=1, drafts=drafts)
    assert found[0].n_tokens == ids.index(ids[place]) + 1
    assert_same(found, expected)


@pytest.mark.parametrize("longest", range(1, 6))
def test_the_longest_answer_cuts_a_draft(new_explainer, prompts, longest):
    explainer = new_explainer()
    ids = [int(token) for token in decoded(explainer, prompts[:1], 9)[0].text.split()]
    drafts = Says(lambda answer: ids[len(answer) :])
    found = generate(explainer, prompts[:1], Numbers(), max_new_tokens=longest, batch_size=1, drafts=drafts)
    assert_same(found, decoded(explainer, prompts[:1], longest))
    assert found[0].n_tokens == longest


def test_logits_of_large_vocabularies_bound_drafts(new_explainer, prompts, monkeypatch):
    explainer = new_explainer()
    passes = Passes(explainer, monkeypatch)
    monkeypatch.setattr(generation, "_LOGITS_AT_ONCE", 50 * 4 * 3)
    many = Says(lambda answer: [7] * 20)
    generate(explainer, prompts[:4], Numbers(), max_new_tokens=9, batch_size=4, drafts=many)
    assert max(width for _, width in passes.shapes[1:]) == 3


def test_nothing_is_foretold_before_it_was_seen_twice():
    drafts = Drafts()
    assert not drafts and drafts.after([], 5) == []
    drafts.learn([10, 11, 12])
    assert drafts.after([], 5) == []
    drafts.learn([10, 11, 12])
    assert drafts and drafts.after([], 5) == [10, 11, 12]
    assert drafts.after([10], 1) == [11]


def test_a_draft_ends_where_answers_part_and_goes_on_after_an_unknown_word():
    drafts = Drafts(never=[2])
    for word in range(20, 30):
        drafts.learn([10, 11, word, 12, 13, 2])
    assert drafts.after([], 9) == [10, 11]
    assert drafts.after([10, 11, 25], 9) == [12, 13]  # a word that came once
    assert drafts.after([10, 11, 99], 9) == [12, 13]  # one that never came
    assert drafts.after([10, 11, 25, 12, 13], 9) == []  # the end is not drafted


def test_logits_are_of_the_tokens_answered_alone(new_explainer, prompts, monkeypatch):
    """None of padding, of prompts, of answers that are at their end: over 128,000 words they would cost most."""
    explainer, n_logits = new_explainer(), 0
    ids = [token for one in decoded(explainer, prompts, 9) for token in map(int, one.text.split())]

    class Ends(Numbers):
        eos_token_id = max(set(ids), key=ids.count)

    likeliest = generation._likeliest

    def counted(logits):
        nonlocal n_logits
        n_logits += len(logits)
        return likeliest(logits)

    monkeypatch.setattr(generation, "_likeliest", counted)
    expected = decoded(explainer, prompts, 9, Ends())
    assert n_logits == sum(one.n_tokens for one in expected) < 9 * len(prompts)
    nothing = Says(lambda answer: [])
    n_logits = 0
    assert_same(generate(explainer, prompts, Ends(), max_new_tokens=9, batch_size=100, drafts=nothing), expected)
    assert n_logits == sum(one.n_tokens for one in expected)
