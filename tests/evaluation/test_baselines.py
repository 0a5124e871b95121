import numpy as np
import pyarrow as pa
import pytest
from sklearn.neighbors import NearestNeighbors

from ray_explain.evaluation import baselines as b
from ray_explain.evaluation.grading import grade

D = 4


def texts(table):
    return table["text"].to_pylist()


def test_the_majority_is_the_constant_answer_that_is_right_most_often(questions, answers, say):
    """It passes over the commoner verdict where that has no answer as common."""
    train = questions(
        *[{"changed": True, "content": "rome"}] * 3,
        *[{"changed": False, "content": "oslo"}] * 2,
        *[{"changed": False, "content": "bonn"}, {"changed": False, "content": "kiel"}],
    )
    said = b.majority(train, questions({}, {}))
    assert texts(said) == [say(True, "rome")] * 2
    assert said["explainer"].to_pylist() == ["majority"] * 2

    def exact(text):
        return sum(grade(train, answers(train, [text] * train.num_rows), target="t", seed=0)["exact"].to_pylist())

    assert exact(texts(said)[0]) == max(map(exact, train["answer"].to_pylist())) == 3


def test_the_majority_counts_every_right_description_as_exact_match_does(questions):
    """Two wordings are one answer where exact match says so; ties go by alphabet."""

    def feature(*right):
        return {"task": "features", "answer": right[0], "answers": list(right), "changed": None}

    train = questions(
        feature("rivers", "lakes"), feature("rivers", "rivers"), feature("Lakes"), feature("lakes."), feature("hills")
    )
    assert texts(b.majority(train, questions(feature("x")))) == ["Lakes"]


def test_the_majority_by_layer_and_role_falls_back_on_all_where_nothing_is_known(questions, say):
    train = questions(
        {"layers": [0], "role": "a", "changed": True, "content": "x"},
        *[{"layers": [1], "role": "a", "changed": False, "content": "y"}] * 2,
        {"layers": [0], "role": "b", "changed": True, "content": "z"},
        {"layers": [1], "role": "b", "changed": False, "content": "w"},
    )
    test = questions(*[{"layers": [layer], "role": role} for layer, role in [(0, "a"), (0, "b"), (1, "a"), (5, "a")]])
    said = texts(b.majority_by_layer_role(train, test))
    assert said == [say(True, "x"), say(True, "z"), say(False, "y"), say(False, "y")]


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_nearest_neighbour_is_scikit_learns_by_cosine(questions, chunks, monkeypatch):
    monkeypatch.setattr(b, "_TRAIN_ROWS", 7)
    monkeypatch.setattr(b, "_TEST_ROWS", 5)
    rng = np.random.default_rng(0)
    train_vectors, test_vectors = rng.normal(size=(50, 1, 8)), rng.normal(size=(17, 1, 8))
    train_vectors *= rng.lognormal(size=(50, 1, 1))  # a dot product would prefer long ones
    train = questions(*[{}] * 50, vectors=list(train_vectors.astype(np.float32)))
    train = pa.concat_tables([train.slice(i * 50 // chunks, 50 // chunks + 1) for i in range(chunks)]).slice(0, 50)
    test = questions(*[{}] * 17, vectors=list(test_vectors.astype(np.float32)))
    matrix = np.concatenate([v for c in train["vectors"].chunks for v in [c.flatten().flatten().to_numpy()]]).reshape(
        -1, 8
    )
    search = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(matrix)
    wanted = search.kneighbors(test_vectors[:, 0], return_distance=False)[:, 0]
    answers = train["answer"].to_pylist()
    assert texts(b.nearest_neighbour(train, test, per_layer=False)) == [answers[i] for i in wanted]


def test_per_layer_the_nearest_is_of_the_same_layers_or_of_all_where_there_are_none(questions):
    def vectors(*rows):
        return [np.array([row], np.float32) for row in rows]

    train = questions(
        {"layers": [0], "content": "far"},
        {"layers": [1], "content": "near"},
        {"layers": [0], "content": "further"},
        vectors=vectors([1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]),
    )
    test = questions(*[{"layers": [i]} for i in (0, 1, 2)], vectors=vectors(*[[2, 0.1, 0, 0]] * 3))

    def said(per_layer):
        return [text.split("<<<")[1][:-4] for text in texts(b.nearest_neighbour(train, test, per_layer=per_layer))]

    assert said(False) == ["near"] * 3
    assert said(True) == ["far", "near", "near"]


def test_several_vectors_are_taken_at_their_mean(questions):
    train = questions({}, {}, vectors=[np.eye(4, dtype=np.float32)[:2], np.eye(4, dtype=np.float32)[2:3]])
    test = questions({}, vectors=[np.array([[0.6, 0.6, 0.5, 0]], np.float32)])
    assert texts(b.nearest_neighbour(train, test, per_layer=False)) == train["answer"].to_pylist()[:1]


def test_without_vectors_there_are_only_majorities(questions):
    blind = questions({}, {}, vectors=[np.empty((0, D), np.float32)] * 2)
    assert [table["explainer"][0].as_py() for table in b.baselines(blind, blind)] == list(b.BASELINES[:2])
    assert [table["explainer"][0].as_py() for table in b.baselines(questions({}), questions({}))] == list(b.BASELINES)
    with pytest.raises(ValueError, match="2 test questions hold no vector"):
        b.nearest_neighbour(questions({}), blind, per_layer=False)


def test_without_training_questions_nothing_is_common(questions):
    table = questions({})
    with pytest.raises(ValueError, match="no training questions"):
        b.majority(table.slice(0, 0), table)


@pytest.mark.slow
def test_a_search_among_100_thousand_wide_vectors_takes_less_than_a_gibibyte(questions):
    import tracemalloc

    width, n = 4096, 100_000
    rng = np.random.default_rng(0)
    flat = rng.standard_normal(n * width, dtype=np.float32)
    column = pa.ListArray.from_arrays(
        pa.array(np.arange(n + 1, dtype=np.int32)), pa.FixedSizeListArray.from_arrays(pa.array(flat), width)
    )
    train = pa.table(
        {"vectors": column, "layers": [[0]] * n, "answer": [f"a{i}" for i in range(n)], "changed": [True] * n}
    )
    test = questions(*[{}] * 10, vectors=[flat[i * 999 * width :][:width][None] for i in range(10)])
    tracemalloc.start()
    said = b.nearest_neighbour(train, test, per_layer=False)
    assert tracemalloc.get_traced_memory()[1] < 2**30
    assert texts(said) == [f"a{i * 999}" for i in range(10)]
