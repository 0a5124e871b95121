"""The tables: one Arrow schema each, and the check that a table has it.

A schema that holds vectors depends on their width, so it is a function of `d_model`. Vectors are plain nested Arrow
lists (`list<fixed_size_list<float>[d_model]>`: several vectors a row, readable by anything that reads Parquet).
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

SPLITS = ("train", "validation", "test")
TASKS = ("patching", "ablation", "features")
TEXT_ONLY = "text only"  # name, among explainers, of one that was trained without vectors

_CASE = [
    pa.field("case_id", pa.string(), nullable=False),
    pa.field("group", pa.string(), nullable=False),  # the unit that splits and bootstraps resample
    pa.field("split", pa.string(), nullable=False),
]

PATCHING_CASES = pa.schema(
    [
        *_CASE,
        pa.field("base_prompt", pa.string(), nullable=False),
        pa.field("source_prompt", pa.string(), nullable=False),
        pa.field("first_layer", pa.int32(), nullable=False),
        pa.field("last_layer", pa.int32(), nullable=False),  # inclusive
        pa.field("site", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("base_positions", pa.list_(pa.int32()), nullable=False),  # tokens of the unpadded base prompt
        pa.field("source_positions", pa.list_(pa.int32()), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("stratum", pa.string(), nullable=False),  # what scores are broken down by, such as the relation
        pa.field("base_truth", pa.string()),
        pa.field("source_truth", pa.string()),
    ]
)

ABLATION_CASES = pa.schema(
    [
        *_CASE,
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("span_start", pa.int32(), nullable=False),  # characters of `prompt`
        pa.field("span_end", pa.int32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("stratum", pa.string(), nullable=False),
        pa.field("truth", pa.string()),
    ]
)

ABLATION_EFFECTS = pa.schema(
    [
        *ABLATION_CASES,
        pa.field("full_answer", pa.string(), nullable=False),
        pa.field("ablated_answer", pa.string(), nullable=False),
        pa.field("changed", pa.bool_(), nullable=False),
        pa.field("full_logprob", pa.float32(), nullable=False),  # of full_answer, with the span, in nats
        pa.field("ablated_logprob", pa.float32(), nullable=False),  # of ablated_answer, without the span
        pa.field("kl", pa.float32(), nullable=False),  # from the full to the ablated distribution, in nats
    ]
)

DESCRIPTIONS = pa.schema(
    [
        pa.field("case_id", pa.string(), nullable=False),  # of the feature
        pa.field("description", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),  # who wrote it
        pa.field("score", pa.float32()),  # signed correlation with the activations; null = unscored
        pa.field("gold", pa.bool_(), nullable=False),
    ]
)

ANSWERS = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("explainer", pa.string(), nullable=False),
        pa.field("control", pa.string(), nullable=False),  # none | shuffled | no_vector | other_layer | random
        pa.field("text", pa.string(), nullable=False),
        pa.field("logprob", pa.float32()),  # summed over the generated tokens; null where nothing was generated
        pa.field("n_tokens", pa.int32(), nullable=False),
    ]
)

SCORES = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("explainer", pa.string(), nullable=False),
        pa.field("control", pa.string(), nullable=False),
        pa.field("seed", pa.int32(), nullable=False),
        pa.field("fraction", pa.float64(), nullable=False),  # of the training data that it knows; 0 if untrained
        pa.field("metric", pa.string(), nullable=False),
        pa.field("by", pa.string(), nullable=False),  # "all", "layer=2", "role=subject_last", "changed=true"
        pa.field("value", pa.float64()),  # null where it is undefined, such as F1 without a changed case
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("n", pa.int32(), nullable=False),
        pa.field("unparsed", pa.int32(), nullable=False),
    ]
)


COMPARISONS = pa.schema(
    [  # one explainer minus another on the same questions of one target
        pa.field("task", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("explainer", pa.string(), nullable=False),
        pa.field("against", pa.string(), nullable=False),  # another explainer, a baseline, or a control of the same one
        pa.field("fraction", pa.float64(), nullable=False),  # of the training data, the same on both sides
        pa.field("contrast", pa.string(), nullable=False),  # self_minus_cross | uplift (over a control) | over_baseline
        pa.field("metric", pa.string(), nullable=False),
        pa.field("by", pa.string(), nullable=False),
        pa.field("difference", pa.float64()),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("p_value", pa.float64()),  # sign-flip permutation over groups, two-sided
        pa.field("p_holm", pa.float64()),  # over one task, fraction, contrast, metric and kind of part
        pa.field("n", pa.int32(), nullable=False),
        pa.field("n_groups", pa.int32(), nullable=False),
        pa.field("seeds", pa.int32(), nullable=False),
    ]
)


def vectors_type(d_model: int) -> pa.DataType:
    """Arrow type of a row's vectors: any number of them, each `d_model` wide, float32."""
    return pa.list_(pa.list_(pa.float32(), d_model))


def patching_effects(d_model: int) -> pa.Schema:
    """What a patch did: the case, the vectors written (one per base position) and the answers of both runs."""
    return pa.schema(
        [
            *PATCHING_CASES,
            pa.field("vectors", vectors_type(d_model), nullable=False),
            pa.field("base_answer", pa.string(), nullable=False),
            pa.field("patched_answer", pa.string(), nullable=False),
            pa.field("changed", pa.bool_(), nullable=False),
            pa.field("base_logprob", pa.float32(), nullable=False),  # of base_answer, in the base run, in nats
            pa.field("patched_logprob", pa.float32(), nullable=False),  # of patched_answer, in the patched run
            pa.field("kl", pa.float32(), nullable=False),  # from the base to the patched distribution, in nats
        ]
    )


def features(d_model: int) -> pa.Schema:
    """A direction of the target's residual stream; `vectors` holds exactly one."""
    return pa.schema(
        [
            *_CASE,
            pa.field("layer", pa.int32(), nullable=False),
            pa.field("source", pa.string(), nullable=False),  # sae | neuron | activation | difference
            pa.field("feature_id", pa.int32(), nullable=False),  # its number in the source
            pa.field("vectors", vectors_type(d_model), nullable=False),
        ]
    )


def questions(d_model: int) -> pa.Schema:
    """What an explainer is asked. `prompt` holds one `<vector>` for each of `vectors`."""
    return pa.schema(
        [
            pa.field("question_id", pa.string(), nullable=False),
            *_CASE,
            pa.field("task", pa.string(), nullable=False),
            pa.field("prompt", pa.string(), nullable=False),
            pa.field("answer", pa.string(), nullable=False),  # empty where nobody knows one
            pa.field("answers", pa.list_(pa.string()), nullable=False),  # every right answer, `answer` among them
            pa.field("vectors", vectors_type(d_model), nullable=False),
            pa.field("layers", pa.list_(pa.int32()), nullable=False),  # that the vectors belong to; empty without any
            pa.field("role", pa.string(), nullable=False),  # "" where the task has none
            pa.field("stratum", pa.string(), nullable=False),
            pa.field("changed", pa.bool_()),  # null for features
            pa.field("wording", pa.string(), nullable=False),
        ]
    )


def vectors_array(rows: Sequence[np.ndarray], d_model: int) -> pa.Array:
    """Arrow column of `vectors_type(d_model)`; each row is a float array [n_vectors, d_model], n_vectors may be 0.

    Raises:
        ValueError: a row has another width.
    """
    for row in rows:
        if row.ndim != 2 or row.shape[1] != d_model:
            raise ValueError(f"vectors of shape {list(row.shape)}: each row must be [n, {d_model}]")
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    flat = np.concatenate([np.asarray(row, dtype=np.float32).reshape(-1) for row in rows] or [np.empty(0, np.float32)])
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat, type=pa.float32()), d_model)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def vectors_of(column: pa.ChunkedArray | pa.Array) -> list[np.ndarray]:
    """The rows of a `vectors_type` column as float32 arrays [n_vectors, d_model]; the inverse of `vectors_array`."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    rows: list[np.ndarray] = []
    for chunk in chunks:
        width = chunk.type.value_type.list_size
        flat = chunk.flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        rows.extend(
            np.split(flat, np.cumsum(chunk.value_lengths().to_numpy(zero_copy_only=False))[:-1]) if len(chunk) else []
        )
    return rows


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with the columns of `schema`, in its order and types.

    Raises:
        ValueError: a column is missing, unexpected, of a type that cannot be cast, or has nulls where none may be.
    """
    missing, extra = set(schema.names) - set(table.column_names), set(table.column_names) - set(schema.names)
    if missing or extra:
        raise ValueError(f"table does not have its columns: missing {sorted(missing)}, unexpected {sorted(extra)}")
    for field in schema:
        nulls = table.column(field.name).null_count
        if nulls and not field.nullable:
            raise ValueError(f"column {field.name!r} has {nulls} nulls of {table.num_rows} rows; it may have none")
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"table does not have the types of its schema: {error}") from error


def rows_table(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """A table of `schema` from one mapping per row (no row: an empty table with its columns)."""
    return conform(pa.Table.from_pylist(list(rows), schema=schema), schema)


def content_id(*parts: Any) -> str:
    """A stable id (16 hex digits) of what a row says: the same in every run and on every machine.

    Raises:
        TypeError: a part has no stable JSON form.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]
