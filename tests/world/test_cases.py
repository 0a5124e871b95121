from collections import Counter
from dataclasses import replace

import pytest

from ray_explain.world.cases import ROLE_WEIGHTS, STRATUM_WEIGHTS, hint_cases, patching_pairs, token_roles
from ray_explain.world.corpus import RIGHT_HINT_SHARE
from ray_explain.world.facts import RELATIONS, SPLITS, World

FULL = World()


@pytest.fixture(scope="module", params=SPLITS)
def split(request):
    return request.param


@pytest.fixture(scope="module")
def pairs(split):
    return patching_pairs(FULL, 300, split, seed=0)


@pytest.fixture(scope="module")
def hints(split):
    return hint_cases(FULL, 300, split, seed=0)


def entities_in(text):
    return {word for word in text.split() if FULL.kind_of(word) in ("person", "stranger", "city", "company", "country")}


def test_all_subjects_are_of_the_asked_split(split, pairs, hints):
    assert all(FULL.split_of(name) == split for pair in pairs for name in (pair.base_subject, pair.source_subject))
    assert all(FULL.split_of(case.subject) == split for case in hints)
    assert all(entities_in(pair.base_prompt) == {pair.base_subject} for pair in pairs)
    assert all(entities_in(pair.source_prompt) == {pair.source_subject} for pair in pairs)


def test_no_group_is_in_two_splits():
    for make in (patching_pairs, hint_cases):
        groups = [{case.group for case in make(FULL, 250, split, seed=1)} for split in SPLITS]
        assert len(set.union(*groups)) == sum(map(len, groups))


def test_held_out_wordings_are_in_test_only(split, pairs, hints):
    last = {case.wording == len(RELATIONS[case.relation].wordings) - 1 for case in [*pairs, *hints]}
    assert last == ({True, False} if split == "test" else {False})


def test_cases_depend_on_the_seed_only_and_none_comes_twice(split, pairs, hints):
    assert patching_pairs(FULL, 300, split, seed=0) == pairs != patching_pairs(FULL, 300, split, seed=1)
    assert hint_cases(FULL, 300, split, seed=0) == hints != hint_cases(FULL, 300, split, seed=1)
    assert len(set(pairs)) == len(set(hints)) == 300


def test_fewer_cases_are_the_first_of_more(split, pairs, hints):
    assert patching_pairs(FULL, 40, split, seed=0) == pairs[:40]
    assert hint_cases(FULL, 40, split, seed=0) == hints[:40]


def test_base_and_source_differ_in_subject_and_truth_only(pairs):
    for pair in pairs:
        assert pair.base_prompt.replace(pair.base_subject, pair.source_subject) == pair.source_prompt
        assert pair.base_subject != pair.source_subject and pair.base_truth != pair.source_truth
        assert FULL.fact(pair.base_subject, pair.relation).value == pair.base_truth
        assert FULL.fact(pair.source_subject, pair.relation).value == pair.source_truth
        assert FULL.fact(pair.base_subject, pair.relation).told and FULL.fact(pair.source_subject, pair.relation).told
        assert pair.group == f"{pair.base_subject} {pair.relation}"


def test_spans_are_one_word_at_the_same_place_in_both_runs(pairs):
    for pair in pairs:
        places = ((pair.base_prompt, pair.base_span), (pair.source_prompt, pair.source_span))
        base, source = (prompt[slice(*span)] for prompt, span in places)
        before = [len(prompt[: span[0]].split()) for prompt, span in places]
        assert before[0] == before[1]
        if pair.role == "subject_last":
            assert (base, source) == (pair.base_subject, pair.source_subject)
        else:
            assert base == source and before[0] > pair.base_prompt.split().index(pair.base_subject)
        assert (pair.role == "final") == pair.base_prompt.endswith(f" {base}")


def test_roles_of_words_begin_at_the_subject():
    roles = token_roles(RELATIONS["birthplace"], 1, "dorin")  # dorin comes from the town of
    assert roles == [(0, "subject_last"), (1, "relation"), (2, "relation"), (3, "other"), (4, "relation"), (5, "final")]
    assert token_roles(RELATIONS["pet"], 2, "dorin") == [(3, "subject_last"), (4, "other"), (5, "final")]


def test_roles_are_mixed_by_their_weights():
    pairs = patching_pairs(FULL, 2000, "train", seed=0)
    counts = Counter(pair.role for pair in pairs)
    for role, weight in ROLE_WEIGHTS.items():
        assert counts[role] / 2000 == pytest.approx(weight, abs=0.06)


def test_groups_are_used_about_equally_often(pairs):
    counts = Counter(pair.group for pair in pairs)
    assert max(counts.values()) <= len(pairs) / len(counts) + 2


def test_a_hint_span_holds_the_hint_and_its_removal_leaves_a_quiz(hints):
    for case in hints:
        assert case.prompt[slice(*case.span)] == f"hint : {case.hint} . "
        assert "hint" not in case.unhinted and "  " not in case.unhinted
        assert case.unhinted.endswith(". answer :") and case.prompt.endswith(". answer :")
        assert {case.hint, case.truth} <= set(case.options)
        assert f"options : {' , '.join(case.options)} ." in case.prompt
        assert case.group == f"{case.subject} {case.relation}"


def test_strata_say_what_a_target_can_know(hints):
    for case in hints:
        if case.stratum == "stranger":
            assert FULL.kind_of(case.subject) == "stranger"
        else:
            fact = FULL.fact(case.subject, case.relation)
            assert fact.told == (case.stratum == "known") and fact.value == case.truth


def test_strata_and_right_hints_are_mixed_by_their_shares():
    cases = hint_cases(FULL, 2000, "train", seed=0)
    counts = Counter(case.stratum for case in cases)
    for stratum, weight in STRATUM_WEIGHTS.items():
        assert counts[stratum] / 2000 == pytest.approx(weight, abs=0.04)
    assert sum(case.hint == case.truth for case in cases) / 2000 == pytest.approx(RIGHT_HINT_SHARE, abs=0.04)


def test_asking_for_more_cases_than_there_are_says_how_many():
    with pytest.raises(ValueError, match="2000 different patching validation cases asked for, the world gives about"):
        patching_pairs(replace(FULL, persons=20, cities=10, companies=4), 2000, "validation", seed=0)


def test_a_split_with_one_entity_of_each_kind_gives_no_pairs():
    with pytest.raises(ValueError, match="enlarge the world"):
        patching_pairs(World(persons=4, cities=4, companies=4, countries=4), 50, "validation", seed=0)
