import numpy as np
import pyarrow as pa

from ray_explain import records
from ray_explain.questions.features import NO_GOLD, features_questions

D = 3


def feature_table(*case_ids):
    columns = {
        "case_id": list(case_ids),
        "group": list(case_ids),
        "split": ["test"] * len(case_ids),
        "layer": pa.array(range(len(case_ids)), pa.int32()),
        "source": ["sae"] * len(case_ids),
        "feature_id": pa.array(range(len(case_ids)), pa.int32()),
        "vectors": records.vectors_array([np.full((1, D), i, np.float32) for i in range(len(case_ids))], D),
    }
    return records.conform(pa.table(columns), records.features(D))


def descriptions(*rows):
    names = ("case_id", "description", "score", "gold")
    return records.rows_table([dict(zip(names, row)) | {"origin": "x"} for row in rows], records.DESCRIPTIONS)


def test_the_answer_is_the_best_scored_gold_and_all_gold_is_right():
    told = descriptions(
        ("f", "cities", 0.4, True),
        ("f", "rivers", None, True),
        ("f", "people", 0.9, False),
        ("f", "capitals", 0.7, True),
        ("f", "cities", 0.4, True),
    )
    (row,) = features_questions(feature_table("f"), told, wording="brief", seed=0).table.to_pylist()
    assert row["answer"] == "capitals"
    assert row["answers"] == ["capitals", "cities", "rivers"]
    assert row["prompt"] == "what does <vector> at layer 0 encode ?"
    assert (row["layers"], row["role"], row["stratum"], row["changed"]) == ([0], "", "sae", None)


def test_a_negative_score_is_below_every_other_but_above_none():
    told = descriptions(("f", "a", None, True), ("f", "b", -0.5, True))
    assert features_questions(feature_table("f"), told, wording="brief", seed=0).table["answer"].to_pylist() == ["b"]


def test_features_without_gold_are_dropped_and_vectors_stay_with_the_others():
    told = descriptions(("f", "x", 0.5, False), ("g", "y", 0.5, True))
    table, dropped, _ = features_questions(feature_table("e", "f", "g"), told, wording="paper", seed=0)
    assert dropped == [("e", NO_GOLD), ("f", NO_GOLD)]
    assert table["case_id"].to_pylist() == ["g"]
    assert records.vectors_of(table["vectors"])[0].tolist() == [[2.0] * D]


def test_what_nothing_describes_is_asked_about_in_the_test_split_and_no_answer_is_right():
    features, told = feature_table("e", "f", "g", "h"), descriptions(("f", "x", 0.5, False), ("g", "y", 0.5, True))
    features = features.set_column(2, features.schema.field("split"), pa.array(["test", "test", "test", "train"]))
    table, dropped, _ = features_questions(features, told, wording="brief", seed=0, unlabelled=True)
    assert dropped == [("f", NO_GOLD), ("h", NO_GOLD)], "bad descriptions are not no descriptions"
    assert table["case_id"].to_pylist() == ["e", "g"]
    assert (table["answer"].to_pylist(), table["answers"].to_pylist()) == (["", "y"], [[], ["y"]])
    assert table["prompt"][0].as_py() == "what does <vector> at layer 0 encode ?"
