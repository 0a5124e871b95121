"""Questions about features: what does this direction of the residual stream stand for?"""

import math
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_explain import records
from ray_explain.ground_truth.released import CHOSEN
from ray_explain.questions.asking import asked, plain_columns
from ray_explain.questions.wordings import Wording, drawing
from ray_explain.stages import Result

NO_GOLD = "no gold description"
TESTED = "test"  # split of questions without a right answer


def features_questions(
    features: pa.Table, descriptions: pa.Table, *, wording: str, seed: int, unlabelled: bool = False
) -> Result:
    """One question per feature that has a gold description; the others are dropped.

    With `unlabelled` a feature of the test split that nothing describes is asked about too: its answer is empty, and
    none is right. One whose descriptions are all no gold is dropped all the same.

    The answer is the gold description that a released data set chose, or else the one of the best score (an unscored
    one comes last, ties go by alphabet); all gold descriptions are right answers. The stratum of a question is the
    source of its feature.
    """
    draw, gold = drawing(wording, "features", seed), _gold(descriptions)
    described = set(descriptions["case_id"].to_pylist())
    rows: list[dict[str, Any]] = []
    vectors, dropped = [], []
    for feature, own in zip(plain_columns(features), records.vectors_of(features["vectors"]), strict=True):
        texts = gold.get(feature["case_id"], [])
        bare = unlabelled and feature["split"] == TESTED and feature["case_id"] not in described
        if texts or bare:
            rows.append(_question(feature, texts, draw(feature["case_id"])))
            vectors.append(own)
        else:
            dropped.append((feature["case_id"], NO_GOLD))
    return asked(rows, vectors, features.schema.field("vectors").type.value_type.list_size, dropped)


def _gold(descriptions: pa.Table) -> dict[str, list[str]]:
    """The different gold descriptions of each feature, best first."""
    rows = descriptions.filter(pc.field("gold")).to_pylist()
    rows.sort(
        key=lambda row: (
            row["origin"] != CHOSEN,
            math.inf if row["score"] is None else -row["score"],
            row["description"],
        )
    )
    gold: dict[str, list[str]] = {}
    for row in rows:
        texts = gold.setdefault(row["case_id"], [])
        if row["description"] not in texts:
            texts.append(row["description"])
    return gold


def _question(feature: dict[str, Any], texts: list[str], wording: Wording) -> dict[str, Any]:
    texts = [text.strip() for text in texts] if wording.brief else texts
    return {
        **{name: feature[name] for name in ("case_id", "group", "split")},
        "task": "features",
        "prompt": wording.prompt(vectors=wording.vectors(1), layers=str(feature["layer"])),
        "answer": texts[0] if texts else "",
        "answers": texts,
        "layers": [feature["layer"]],
        "role": "",
        "stratum": feature["source"],
        "changed": None,
        "wording": wording.id,
    }
