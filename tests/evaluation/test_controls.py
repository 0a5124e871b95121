import numpy as np
import pytest

from ray_explain import records
from ray_explain.errors import BadInput
from ray_explain.evaluation.controls import CONTROLS, under_control

D = 4


@pytest.fixture
def table(questions):
    """Sixty questions of three layers and twelve groups; vector i is (i, i, i, i) + 1."""
    return questions(*[{"layers": [i % 3], "group": f"g{i // 5}"} for i in range(60)])


def donors(changed):
    return [int(own[0, 0]) - 1 for own in records.vectors_of(changed["vectors"])]


def test_nothing_but_the_vectors_changes_under_any_control(table):
    for control in CONTROLS:
        changed = under_control(table, control, seed=0)
        assert changed.drop_columns(["vectors"]).equals(table.drop_columns(["vectors"]))
        assert changed.schema.equals(table.schema)
        assert not changed["vectors"].equals(table["vectors"])
    assert under_control(table, "none", seed=0).equals(table)


def test_shuffled_vectors_are_a_permutation_within_the_layer_that_leaves_their_group(table):
    given = donors(under_control(table, "shuffled", seed=0))
    assert sorted(given) == list(range(60))
    assert all(donor % 3 == i % 3 and donor // 5 != i // 5 for i, donor in enumerate(given))


def test_shuffling_never_gives_a_question_its_own_vector_back(questions):
    for seed in range(30):
        table = questions(*[{"group": "g"} for _ in range(2 + seed % 4)])
        given = donors(under_control(table, "shuffled", seed=seed))
        assert all(donor != i for i, donor in enumerate(given)) and sorted(given) == list(range(table.num_rows))


def test_a_large_group_that_is_half_of_a_layer_still_gets_vectors_of_others(questions):
    table = questions(*[{"group": "large" if i < 5 else f"g{i}"} for i in range(10)])
    given = donors(under_control(table, "shuffled", seed=0))
    assert all(donor >= 5 for donor in given[:5])


def test_vectors_of_another_layer_are_of_another_layer(table):
    given = donors(under_control(table, "other_layer", seed=0))
    assert all(donor % 3 != i % 3 for i, donor in enumerate(given))


def test_random_vectors_keep_their_norm_and_point_anywhere(questions):
    vectors = [np.random.default_rng(i).normal(size=(2, 50)).astype(np.float32) * 10**i for i in range(3)]
    table = questions({}, {}, {}, vectors=vectors)
    for own, changed in zip(vectors, records.vectors_of(under_control(table, "random", seed=0)["vectors"])):
        assert np.linalg.norm(changed, axis=1) == pytest.approx(np.linalg.norm(own, axis=1), rel=1e-5)
        assert abs(np.sum(own * changed)) < 0.6 * np.linalg.norm(own) * np.linalg.norm(changed)


def test_no_vector_is_zeros_in_its_place(table):
    assert all(
        own.tolist() == [[0.0] * D] for own in records.vectors_of(under_control(table, "no_vector", 0)["vectors"])
    )


def test_vectors_come_from_questions_with_as_many(questions):
    vectors = [np.full((1 + i % 2, D), i, np.float32) for i in range(12)]
    table = questions(*[{"layers": [i // 6]} for i in range(12)], vectors=vectors)
    for control in ("shuffled", "other_layer"):
        changed = records.vectors_of(under_control(table, control, seed=1)["vectors"])
        assert [len(own) for own in changed] == [len(own) for own in vectors]


def test_a_question_alone_with_its_layer_gets_a_vector_of_another_layer_when_shuffled(questions):
    table = questions(*[{"layers": [int(i == 0)]} for i in range(5)])
    given = donors(under_control(table, "shuffled", seed=0))
    assert given[0] != 0 and sorted(given[1:]) == [1, 2, 3, 4]


def test_shuffling_never_gives_a_question_an_equal_vector_of_another_one(questions):
    """Whatever else it has to give up: other groups first, then the same layers."""
    for seed in range(30):
        kinds = [1 + i // 2 for i in range(4)] + [3] * 5  # of vectors: two kinds at layer 0, one at layer 1
        own = [np.full((1, D), kind + i * 1e-7, np.float32) for i, kind in enumerate(kinds)]
        table = questions(
            *[{"layers": [int(kind == 3)], "group": f"g{i}"} for i, kind in enumerate(kinds)], vectors=own
        )
        changed = records.vectors_of(under_control(table, "shuffled", seed=seed)["vectors"])
        given = [round(float(each[0, 0])) for each in changed]
        assert given[:4] == [2, 2, 1, 1] and set(given[4:]) <= {1, 2}


def test_an_equal_vector_is_replaced_by_one_of_another_group_where_there_is_one(questions):
    vectors = [np.full((1, D), kind, np.float32) for kind in (1, 1, 1, 2, 2, 3)]
    table = questions(*[{"group": group} for group in "aabbca"], vectors=vectors)
    for seed in range(30):
        given = [each[0, 0] for each in records.vectors_of(under_control(table, "shuffled", seed=seed)["vectors"])]
        assert given[0] == given[1] == 2  # the 3 is of their own group


@pytest.mark.parametrize("control", ["shuffled", "other_layer", "random"])
def test_a_control_is_the_same_for_the_same_seed_only(table, control):
    first = under_control(table, control, seed=7)
    assert first.equals(under_control(table, control, seed=7))
    assert not first.equals(under_control(table, control, seed=8))


def test_what_cannot_be_controlled_is_told(questions):
    same = questions({}, {})
    with pytest.raises(BadInput, match="'shuffled': no two questions with 1 vectors"):
        under_control(same.slice(0, 1), "shuffled", seed=0)
    with pytest.raises(BadInput, match="'shuffled': no two questions with 1 vectors"):
        under_control(questions({}, {}, vectors=[np.ones((1, D), np.float32)] * 2), "shuffled", seed=0)
    with pytest.raises(BadInput, match=r"'other_layer': no question has 1 vectors but of layers \[0\]"):
        under_control(same, "other_layer", seed=0)
    with pytest.raises(ValueError, match="control 'upside_down'"):
        under_control(same, "upside_down", seed=0)
    with pytest.raises(BadInput, match="none of the 1 questions holds a vector; leave it out"):
        under_control(questions({}, vectors=[np.empty((0, D), np.float32)]), "no_vector", seed=0)


def test_a_features_vector_is_exchanged_for_one_of_its_own_origin(questions):
    def table(task):
        rows = [{"layers": [i % 2], "group": f"g{i}", "stratum": "sae" if i < 8 else "activation"} for i in range(16)]
        return questions(*[row | {"task": task, "changed": None} for row in rows])

    for control, same_layer in (("shuffled", True), ("other_layer", False)):
        given = donors(under_control(table("features"), control, seed=0))
        assert all((donor < 8) == (i < 8) and (donor % 2 == i % 2) is same_layer for i, donor in enumerate(given))
        of_effects = donors(under_control(table("patching"), control, seed=0))
        assert any((donor < 8) != (i < 8) for i, donor in enumerate(of_effects)), "relations are no origin"


def test_a_vector_that_is_alone_of_its_origin_in_its_layer_is_exchanged_all_the_same(questions):
    places = [(0, "sae"), (0, "sae"), (0, "activation"), (1, "activation"), (1, "sae"), (0, "difference")]
    rows = [{"layers": [layer], "group": f"g{i}", "stratum": own} for i, (layer, own) in enumerate(places)]
    table = questions(*[row | {"task": "features", "changed": None} for row in rows])
    shuffled, elsewhere = (donors(under_control(table, name, seed=0)) for name in ("shuffled", "other_layer"))
    assert shuffled[:4] == [1, 0, 3, 2] and shuffled[4] in (0, 1) and shuffled[5] != 5
    assert elsewhere[2:4] == [3, 2] and elsewhere[5] in (3, 4)
