from collections import Counter

import pytest

from ray_explain.world.facts import ENTITY_KINDS, RELATIONS, SPLITS, VALUES, WITHHELD_SHARE, World
from ray_explain.world.wordings import words_of


def test_equal_seeds_give_equal_worlds_and_other_seeds_do_not():
    one, same, other = World(seed=5), World(seed=5), World(seed=6)
    assert (one.entities, one.facts) == (same.entities, same.facts)
    assert [one.split_of(name) for name in one.entities["city"]] == [same.split_of(n) for n in same.entities["city"]]
    assert one.entities != other.entities
    assert [fact.value for fact in one.facts] != [fact.value for fact in other.facts]


def test_the_world_is_the_same_on_every_machine():
    world = World(seed=0, persons=100, strangers=50)
    assert world.entities["country"][:2] == ("bredstan", "felesia")
    assert world.fact("bredstan", "export").value == "copper"
    assert [name for name in world.entities["country"] if world.split_of(name) == "test"] == ["gurnesia", "nedland"]


def test_every_name_and_value_is_one_word_with_one_meaning():
    world = World()
    names = [name for kind in ENTITY_KINDS for name in world.entities[kind]]
    values = [word for words in VALUES.values() for word in words]
    assert len({*names, *values}) == len(names) + len(values)
    assert all(words_of(word) == [word] for word in [*names, *values])
    plain = {word for relation in RELATIONS.values() for wording in relation.wordings for word in words_of(wording)}
    assert not plain & {*names, *values}
    assert world.kind_of(names[0]) == "person" and world.kind_of("tea") == "drink" and world.kind_of("the") is None


def test_every_entity_is_in_exactly_one_split_and_shares_hold_for_each_kind():
    world = World()
    for kind in ENTITY_KINDS:
        parts = [set(world.entities_of(kind, split)) for split in SPLITS]
        assert sum(map(len, parts)) == len(world.entities[kind]) == len(set.union(*parts))
        share = {split: len(part) / len(world.entities[kind]) for split, part in zip(SPLITS, parts, strict=True)}
        assert share["test"] == pytest.approx(0.25, abs=0.03) and share["validation"] == pytest.approx(0.10, abs=0.03)


def test_the_same_share_of_facts_about_persons_is_withheld_in_each_split_and_no_other_fact_is():
    world = World()
    assert all(fact.told for fact in world.facts if world.kind_of(fact.subject) != "person")
    for split in SPLITS:
        about = [f for f in world.facts if f.subject in world.entities_of("person", split)]
        assert sum(not fact.told for fact in about) == round(WITHHELD_SHARE * len(about)) > 0


def test_each_subject_of_a_kind_has_each_relation_once_with_a_value_of_its_kind():
    world = World()
    assert len({(fact.subject, fact.relation) for fact in world.facts}) == len(world.facts)
    for relation in RELATIONS.values():
        facts = [fact for fact in world.facts if fact.relation == relation.name]
        assert {fact.subject for fact in facts} == set(world.entities[relation.subject_kind])
        assert {world.kind_of(fact.value) for fact in facts} == {relation.value_kind}


def test_no_value_of_a_relation_is_much_more_frequent_than_another():
    world = World()
    for relation in RELATIONS:
        counts = Counter(fact.value for fact in world.facts if fact.relation == relation)
        assert max(counts.values()) - min(counts[value] for value in world.values(relation)) <= 1


def test_a_statement_has_its_subject_once_and_lacks_only_its_value():
    for relation in RELATIONS.values():
        for wording in range(len(relation.wordings)):
            words = relation.statement(wording, "dorin").split()
            assert words.count("dorin") == 1 and words[-1] != "dorin"


def test_the_last_wording_is_for_test_only():
    relation = RELATIONS["pet"]
    assert set(relation.wordings_of("test")) - set(relation.wordings_of("train")) == {len(relation.wordings) - 1}
    assert relation.wordings_of("train") == relation.wordings_of("validation")


def test_told_about_an_entity_is_what_is_not_withheld(world):
    person = next(fact.subject for fact in world.facts if not fact.told)
    told = {fact.relation for fact in world.told_about(person)}
    assert told == {fact.relation for fact in world.facts if fact.subject == person and fact.told}
    assert world.told_about(world.entities["stranger"][0]) == ()


def test_strangers_have_no_facts(world):
    with pytest.raises(ValueError, match="not the subject of any fact"):
        world.fact(world.entities["stranger"][0], "pet")


def test_a_missing_relation_is_answered_with_those_there_are(world):
    with pytest.raises(ValueError, match="country, dish"):
        world.fact(world.entities["city"][0], "pet")


def test_only_entities_have_a_split(world):
    with pytest.raises(ValueError, match="'tea' has no split"):
        world.split_of("tea")


def test_a_world_too_small_to_split_is_refused():
    with pytest.raises(ValueError, match="3 country entities"):
        World(countries=3)


def test_a_world_with_more_entities_than_names_is_refused():
    with pytest.raises(ValueError, match="638 entities"):
        World(persons=540)


def test_the_vocabulary_has_no_word_twice_and_extra_words_come_last(world):
    plain, extra = world.vocabulary(), world.vocabulary(["Zebra the zebra xylophone?"])
    assert len(set(extra)) == len(extra)
    assert extra == [*plain, "zebra", "xylophone"]
