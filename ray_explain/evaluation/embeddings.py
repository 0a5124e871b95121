"""How near two descriptions are in meaning: by the cosine of their sentence embeddings, with a local model."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from ray_explain.errors import BadInput
from ray_explain.evaluation.answers import parse

Encoder = Callable[[Sequence[str]], Float[np.ndarray, "texts d"]]


def sentence_encoder(model: str) -> Encoder:
    """A sentence-transformers model, by its folder or hub id.

    Raises:
        BadInput: the library is not installed, or there is no such model.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise BadInput(
            f"`evaluate.embedding` = {model!r} needs sentence-transformers: pip install 'ray_explain[embedding]', or "
            "leave `embedding` out"
        ) from error
    try:
        loaded = SentenceTransformer(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"`evaluate.embedding` = {model!r}: no sentence model can be read there: {error}") from error
    return lambda texts: np.asarray(loaded.encode(list(texts), show_progress_bar=False), dtype=np.float64)


def compared(graded: pa.Table, questions: pa.Table, answers: pa.Table, encoder: Encoder) -> pa.Table:
    """`graded` with the cosine, -1 to 1, of each described answer and the nearest of the right descriptions; null for
    answers of other tasks and where no right one is known. An empty answer has 0. Each different text is encoded once.

    Raises:
        ValueError: `graded` is not of these questions and answers.
    """
    right = dict(zip(questions["question_id"].to_pylist(), questions["answers"].to_pylist(), strict=True))
    keys = ("question_id", "explainer", "control")
    said = {tuple(row[key] for key in keys): row["text"] for row in answers.to_pylist()}
    rows = graded.select([*keys, "task"]).to_pylist()
    if strange := [row for row in rows if row["question_id"] not in right or tuple(row[k] for k in keys) not in said]:
        raise ValueError(f"{len(strange)} graded answers are not among these answers (such as {strange[0]})")
    pairs = [
        (said[tuple(row[key] for key in keys)].strip(), right[row["question_id"]])
        if row["task"] == "features" and right[row["question_id"]]
        else None
        for row in rows
    ]
    texts = sorted({text for pair in pairs if pair for text in (pair[0], *pair[1])})
    unit = dict(zip(texts, unit_rows(encoder(texts)))) if texts else {}
    cosines = [None if pair is None else _nearest(*pair, unit) for pair in pairs]
    at = graded.column_names.index("embedding")
    return graded.set_column(at, graded.schema.field("embedding"), pa.array(cosines, pa.float64()))


def _nearest(text: str, right: Sequence[str], unit: dict[str, np.ndarray]) -> float:
    if parse(text, "features").content is None:
        return 0.0
    return max(float(unit[text] @ unit[each]) for each in right)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Vectors of norm 1; zero stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)
