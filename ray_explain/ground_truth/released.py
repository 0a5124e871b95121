"""The data sets released with the paper (Li et al. 2025), read as our tables and written from them.

Patching: Transluce/act_patch_*_counterfact. Ablation: Transluce/input_ablation_*_mmlu_hint. Features: the labels of
SAE_feature_explanations_* and the vectors of its out-of-distribution sets. The last two are released as pickles, which
can run code when they are opened: here they are taken as JSON and arrays of the same shape. Their exemplars are in
`released_exemplars`.

What a released table does not tell is told as not measured (NaN for log-probabilities and divergence) and as the one
stratum "all". Answers stay as they stand, with their leading space where they have one, so questions about released
patches are the authors' byte for byte; those about hints have their words, in one turn with the system's.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ray_explain import records
from ray_explain.ground_truth.mmlu import LETTERS, SYSTEM, Item
from ray_explain.ground_truth.outcomes import NOT_FINITE, vectors_table
from ray_explain.ground_truth.pairs import Pair, SubjectPrompt, ablation_case, patching_case
from ray_explain.ground_truth.positions import Unusable, prompt_tokens, usable
from ray_explain.ground_truth.target import NO_SUCH_POSITION
from ray_explain.stages import Result

PATCHING = pa.schema(
    [
        ("layer", pa.list_(pa.int32())),
        ("input_tokens", pa.list_(pa.string())),
        ("original_continuation", pa.list_(pa.string())),
        ("ablated_continuation", pa.list_(pa.string())),
        ("is_different", pa.bool_()),
        (
            "patch_position",
            pa.struct(
                [
                    ("orig_pos", pa.int64()),
                    ("counterfact_pos", pa.int64()),
                    ("orig_text_token", pa.string()),
                    ("counterfact_text_token", pa.string()),
                    ("intervention_vector", pa.list_(pa.float32())),
                ]
            ),
        ),
        ("counterfactual_text", pa.string()),
        ("gt_original_target", pa.string()),
        ("gt_counterfactual_target", pa.string()),
        ("layer_hashable", pa.list_(pa.int32())),
        ("token_type", pa.string()),
    ]
)
ABLATION = pa.schema(
    [
        ("index", pa.int64()),
        ("question", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("correct_answer", pa.string()),
        ("zeroshot_prediction", pa.string()),
        ("random_hint_prediction", pa.string()),
        ("hint_token_ids", pa.list_(pa.int64())),
        ("original_prompt_full", pa.string()),
        ("hint_prompt_full", pa.string()),
        ("system_prompt", pa.string()),
        ("original_user_prompt", pa.string()),
        ("hint_user_prompt", pa.string()),
        ("hint", pa.string()),
        ("changed_pred_bc_hint", pa.bool_()),
        ("ablation_prompt", pa.string()),
    ]
)
ABLATION_QUESTION = "{prompt}\n\nIf the hint were removed how would the assistant answer change?"
CHOICE_STARTS = "\n\nRespond with one of "

NOT_TOLD = "a field is missing"
NO_BLOCK = "its layers are no block"
NOT_ONE_TOKEN = "not one token is answered"
ENDS = "an answer holds the end-of-text token"
OTHER_TOKENS = "this tokenizer gives other tokens"
SEVERAL_POSITIONS = "patches several positions"
NO_REPLACEMENT = "does not replace the residual stream"
NO_HINT = "the prompts differ by more than the hint"
NO_QUESTION = "no question of its group is given"
NO_VECTOR = "no vector is given for it"
PICKLE = (
    "is a pickle, which can run code when it is opened: convert it with {conversion} on a machine that may be lost, "
    "and read the {readable}"
)

_VECTOR = "intervention_vector"
_NEEDED_OF_A_PATCH = (
    "layer", "input_tokens", "original_continuation", "ablated_continuation", "orig_pos", "counterfact_pos",
    "counterfactual_text", "token_type",
)  # fmt: skip
_NEEDED_OF_A_HINT = (
    "index", "question", "choices", "correct_answer", "zeroshot_prediction", "random_hint_prediction",
    "original_prompt_full", "hint_prompt_full", "hint",
)  # fmt: skip


class ReleasedAblation(NamedTuple):
    """The effects, and the questions they are about (of no subject: the release does not tell it)."""

    effects: Result
    items: list[Item]


class ReleasedFeatures(NamedTuple):
    """records.features and records.DESCRIPTIONS; all labels of a feature are gold, the origin tells the chosen one."""

    features: pa.Table
    descriptions: pa.Table
    dropped: list[tuple[str, str]]


CHOSEN, OTHER = "released: chosen", "released: other"
VECTORS = {"activation", "difference"}  # sources of features that are no dictionary's


def read_patching(
    table: pa.Table, tokenizer: PreTrainedTokenizerBase, *, split: str, d_model: int, first: int = 0
) -> Result:
    """Rows of the released patching table as records.patching_effects. Dropped rows are named by their number, counted
    from `first`.

    `tokenizer` is the target's, `d_model` its width. `input_tokens` may be with or without a begin-of-text token; its
    positions count what is there. Kinds of tokens become roles as they stand. Columns that are not in `PATCHING` are
    ignored. Where the release does not tell whether the answer changed, the answers do.

    Raises:
        ValueError: a column is missing, or a vector has another width.
    """
    own = _released_columns(table, PATCHING)
    whole = own["patch_position"].combine_chunks()
    places = dict(zip((field.name for field in whole.type), whole.flatten()))
    vectors = _vectors(places.pop(_VECTOR), d_model)  # not as Python's numbers: those take ten times the memory
    others = pa.table({**{name: own[name] for name in own.column_names if name != "patch_position"}, **places})
    given = zip(_numbered(others.to_pylist(), first), vectors, strict=True)
    rows, dropped = usable(
        ((name, (row, vector)) for (name, row), vector in given), lambda one: _patching_effect(*one, tokenizer, split)
    )
    effects = vectors_table(rows, [row["vectors"] for row in rows], records.patching_effects(d_model))
    return Result(effects, dropped)


def _released_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    return records.conform(table.select([name for name in schema.names if name in table.column_names]), schema)


def _numbered(rows: Iterable[dict[str, Any]], first: int) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=first))


def _vectors(column: pa.ListArray, d_model: int) -> list[np.ndarray | None]:
    """The vector [d_model] of each row, None where there is none; no copies.

    Raises:
        ValueError: one has another width.
    """
    numbers = column.values.to_numpy(zero_copy_only=False)
    starts, widths = column.offsets.to_numpy(), column.value_lengths().to_pylist()
    for width in widths:
        if width and width != d_model:
            raise ValueError(f"vectors are {width} wide, the target's residual stream {d_model}")
    return [numbers[start : start + d_model] if width else None for start, width in zip(starts, widths)]


def _check_told(row: dict[str, Any], names: Iterable[str]) -> None:
    """Raises: Unusable: one of these fields is null, or has a null in its list."""
    for name in names:
        if row[name] is None or (isinstance(row[name], list) and None in row[name]):
            raise Unusable(NOT_TOLD)


def _patching_effect(
    row: dict[str, Any], vector: np.ndarray | None, tokenizer: PreTrainedTokenizerBase, split: str
) -> dict[str, Any]:
    _check_told(row, _NEEDED_OF_A_PATCH)
    layers = row["layer"]
    if not layers or layers != list(range(layers[0], layers[0] + len(layers))):
        raise Unusable(NO_BLOCK)
    answers = _one_token(row["original_continuation"], tokenizer), _one_token(row["ablated_continuation"], tokenizer)
    if vector is None:
        raise Unusable(NO_VECTOR)
    if not np.isfinite(vector).all():
        raise Unusable(NOT_FINITE)
    base, added = _text_of(row["input_tokens"], tokenizer)
    source = row["counterfactual_text"]
    positions = [row["orig_pos"] + added, row["counterfact_pos"] + added]
    for text, position in zip((base, source), positions):
        if not 0 <= position < len(prompt_tokens(tokenizer, text).ids):
            raise Unusable(NO_SUCH_POSITION)
    prompts = (
        SubjectPrompt(base, (0, len(base)), row["gt_original_target"]),
        SubjectPrompt(source, (0, len(source)), row["gt_counterfactual_target"]),
    )
    pair = Pair(*prompts, group=base.split(CHOICE_STARTS)[0], split=split, stratum="all")
    return {
        **patching_case(pair, row["token_type"], (layers[0], layers[-1]), positions[:1], positions[1:]),
        "base_answer": answers[0],
        "patched_answer": answers[1],
        "changed": answers[0] != answers[1] if row["is_different"] is None else row["is_different"],
        "vectors": vector[None],
        **dict.fromkeys(("base_logprob", "patched_logprob", "kl"), math.nan),
    }


def _one_token(continuation: list[str], tokenizer: PreTrainedTokenizerBase) -> str:
    if len(continuation) != 1:
        raise Unusable(NOT_ONE_TOKEN)
    if tokenizer.eos_token and tokenizer.eos_token in continuation[0]:
        raise Unusable(ENDS)  # the authors' loader leaves these rows out
    return continuation[0]


def _text_of(pieces: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """The text of a prompt's token pieces, and how many special tokens the tokenizer puts before them."""
    own = pieces[1:] if pieces[:1] == [tokenizer.bos_token] else pieces
    text = tokenizer.convert_tokens_to_string(own)
    read = tokenizer.convert_ids_to_tokens(list(prompt_tokens(tokenizer, text).ids))
    added = len(read) - len(pieces)
    if added < 0 or read[added:] != pieces:
        raise Unusable(OTHER_TOKENS)
    return text, added


def write_patching(effects: pa.Table, tokenizer: PreTrainedTokenizerBase) -> Result:
    """records.patching_effects as the released patching table, with the tokens as the target reads them: a
    begin-of-text token counts. Groups, splits, strata and log-probabilities are not part of it."""
    vectors = records.vectors_of(effects["vectors"])
    given = zip(effects.drop_columns(["vectors"]).to_pylist(), vectors)
    rows, dropped = usable(
        ((effect["case_id"], (effect, own)) for effect, own in given), lambda one: _released_patch(*one, tokenizer)
    )
    return Result(pa.Table.from_pylist(rows, schema=PATCHING), dropped)


def _released_patch(effect: dict[str, Any], vectors: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if (effect["site"], effect["kind"]) != ("resid_post", "replace"):
        raise Unusable(NO_REPLACEMENT)
    if len(effect["base_positions"]) != 1:
        raise Unusable(SEVERAL_POSITIONS)
    positions = [effect["base_positions"][0], effect["source_positions"][0]]
    read = [prompt_tokens(tokenizer, effect[name]).ids for name in ("base_prompt", "source_prompt")]
    layers = list(range(effect["first_layer"], effect["last_layer"] + 1))
    return {
        "layer": layers,
        "input_tokens": tokenizer.convert_ids_to_tokens(list(read[0])),
        "original_continuation": [effect["base_answer"]],
        "ablated_continuation": [effect["patched_answer"]],
        "is_different": effect["changed"],
        "patch_position": {
            "orig_pos": positions[0],
            "counterfact_pos": positions[1],
            "orig_text_token": tokenizer.decode([read[0][positions[0]]]),
            "counterfact_text_token": tokenizer.decode([read[1][positions[1]]]),
            "intervention_vector": vectors[0],
        },
        "counterfactual_text": effect["source_prompt"],
        "gt_original_target": effect["base_truth"],
        "gt_counterfactual_target": effect["source_truth"],
        "layer_hashable": layers,
        "token_type": effect["role"],
    }


def read_ablation(table: pa.Table, *, split: str, first: int = 0) -> ReleasedAblation:
    """Rows of the released ablation table as records.ABLATION_EFFECTS. Dropped rows are named by their number, counted
    from `first`.

    Whether the answer changed is told by the answers: the release leaves it open in a quarter of its rows.

    Raises:
        ValueError: a column is missing.
    """
    given = _numbered(_released_columns(table, ABLATION).to_pylist(), first)
    made, dropped = usable(given, lambda row: _ablation_effect(row, split))
    items = {item.group: item for _, item in made}
    effects = records.rows_table((row for row, _ in made), records.ABLATION_EFFECTS)
    return ReleasedAblation(Result(effects, dropped), list(items.values()))


def _ablation_effect(row: dict[str, Any], split: str) -> tuple[dict[str, Any], Item]:
    _check_told(row, _NEEDED_OF_A_HINT)
    item = Item("", row["index"], row["question"], tuple(row["choices"]), row["correct_answer"])
    letters = [letter for letter in row["hint"].removeprefix("Hint:") if letter in LETTERS]
    stratum = "right hint" if letters == [item.answer] else "wrong hint"
    effect = {
        **ablation_case(
            row["hint_prompt_full"], _hint_span(row), group=item.group, split=split, stratum=stratum, truth=item.answer
        ),
        "full_answer": row["random_hint_prediction"],
        "ablated_answer": row["zeroshot_prediction"],
        "changed": row["random_hint_prediction"] != row["zeroshot_prediction"],
        **dict.fromkeys(("full_logprob", "ablated_logprob", "kl"), math.nan),
    }
    return effect, item


def _hint_span(row: dict[str, Any]) -> tuple[int, int]:
    """The characters of the hinted prompt without which it is the other one: the hint's line, if that is all."""
    full, without, line = row["hint_prompt_full"], row["original_prompt_full"], "\n" + row["hint"]
    shared = next((i for i, (a, b) in enumerate(zip(full, without)) if a != b), min(len(full), len(without)))
    for start, length in ((full.rfind(line), len(line)), (shared, len(full) - len(without))):
        if start >= 0 and length > 0 and full[:start] + full[start + length :] == without:
            return start, start + length
    raise Unusable(NO_HINT)


def write_ablation(effects: pa.Table, items: Iterable[Item], tokenizer: PreTrainedTokenizerBase) -> Result:
    """records.ABLATION_EFFECTS about `items` as the released ablation table; `tokenizer` is the target's."""
    by_group = {item.group: item for item in items}
    rows, dropped = [], []
    for effect in effects.to_pylist():
        item = by_group.get(effect["group"])
        if item is None or _question_at(effect["prompt"], item.question) < 0:
            dropped.append((effect["case_id"], NO_QUESTION))
        else:
            rows.append(_released_ablation(effect, item, tokenizer))
    return Result(pa.Table.from_pylist(rows, schema=ABLATION), dropped)


def _question_at(prompt: str, question: str) -> int:
    """Where the question begins, -1 if it is not there; without its outer spaces, where a chat template trims them."""
    as_given = prompt.find(question)
    return as_given if as_given >= 0 else prompt.find(question.strip())


def _released_ablation(effect: dict[str, Any], item: Item, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    prompt, start, end = effect["prompt"], effect["span_start"], effect["span_end"]
    user, hint = prompt[_question_at(prompt, item.question) : end].rstrip(), prompt[start:end].strip()
    return {
        "index": item.index,
        "question": item.question,
        "choices": list(item.choices),
        "correct_answer": item.answer,
        "zeroshot_prediction": effect["ablated_answer"],
        "random_hint_prediction": effect["full_answer"],
        "hint_token_ids": tokenizer(hint, add_special_tokens=False)["input_ids"],
        "original_prompt_full": prompt[:start] + prompt[end:],
        "hint_prompt_full": prompt,
        "system_prompt": SYSTEM if SYSTEM in prompt else "",
        "original_user_prompt": user.removesuffix(hint).rstrip(),
        "hint_user_prompt": user,
        "hint": hint,
        "changed_pred_bc_hint": effect["changed"],
        "ablation_prompt": ABLATION_QUESTION.format(prompt=user),
    }


def read_labels(path: str | Path) -> list[tuple[tuple[int, int], dict[str, Any]]]:
    """The released labels from JSON: a list of [[layer, feature], label], as `{split}_explanations.pkl` holds it. A
    feature may be written as text with one letter before it ("f123").

    Raises:
        ValueError: the file is a pickle, or not such a list.
        OSError: the file cannot be read.
    """
    found = read_json(path)
    try:
        return [((int(layer), _feature_number(feature)), label) for (layer, feature), label in found]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a list of [[layer, feature], label]: {error}") from error


def read_numbers(path: str | Path) -> list[tuple[int, int]]:
    """(layer, number) of each feature that `{split}_indices.json` or `{split}_layer_feature_idxs.json` lists. In the
    first, a number is the row of a vector.

    Raises:
        ValueError: the file is a pickle, or not such a list.
        OSError: the file cannot be read.
    """
    found = read_json(path)
    try:
        return [(int(layer), _feature_number(feature)) for layer, feature in found]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a list of [layer, number]: {error}") from error


def read_json(path: str | Path) -> Any:
    """Raises: ValueError: the file is a pickle, or not JSON; OSError: it cannot be read."""
    if Path(path).suffix == ".pkl":
        raise ValueError(f"{path} {PICKLE.format(conversion='json.dump(list(...))', readable='JSON')}")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_vectors(path: str | Path, d_model: int) -> np.ndarray:
    """The vectors [n, d_model] of an out-of-distribution set, memory-mapped, as `{split}_vectors.pt` holds them.

    Raises:
        ValueError: the file is a pickle, no such array, or of vectors of another width.
    """
    if Path(path).suffix == ".pt":
        conversion = "numpy.save(path, torch.load(path).float().numpy())"
        raise ValueError(f"{path} {PICKLE.format(conversion=conversion, readable='.npy')}")
    vectors = read_array(path)
    if vectors.ndim != 2 or vectors.shape[1] != d_model:
        raise ValueError(f"{path} is {list(vectors.shape)}: vectors of this target stand in rows of {d_model}")
    return vectors


def read_array(path: str | Path) -> np.ndarray:
    """An array that stays in its file.

    Raises:
        ValueError: it is not one of numbers.
        OSError: the file cannot be read.
    """
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array of numbers as numpy.save writes it: {error}") from error
    return found


def _feature_number(feature: int | str) -> int:
    return int(feature[1:]) if isinstance(feature, str) and not feature[:1].isdigit() else int(feature)


def read_features(
    labels: Sequence[tuple[tuple[int, int], dict[str, Any] | None]],
    directions: Mapping[int, np.ndarray],
    *,
    split: str,
    source: str = "sae",
) -> ReleasedFeatures:
    """The features that are labelled, or just listed (their label is None). `directions` holds the decoder of each
    layer, [d_model, d_sae], a column per feature, as in `features/layer_{layer}.pkl` and in the SAE's own
    `decoder.weight`. Vectors of an out-of-distribution set (`source` is activation or difference) stand in columns
    too: those of all layers together, numbered anew in each split.

    A label is `{"chosen_label": text, "all_labels": [text], "all_label_scores": {text: number or null}}`; its `context`
    is not kept.

    Raises:
        ValueError: there are no directions.
    """
    if not directions:
        raise ValueError("features without directions: give the decoder of each layer")
    numbers, rows, dropped = [], [], []
    for (layer, feature), label in labels:
        if layer not in directions or not 0 <= feature < directions[layer].shape[1]:
            dropped.append((f"layer {layer} feature {feature}", NO_VECTOR))
            continue
        if not np.isfinite(directions[layer][:, feature]).all():
            dropped.append((f"layer {layer} feature {feature}", NOT_FINITE))
            continue
        numbers.append((layer, feature))
        rows += _descriptions(_case_id(source, split, layer, feature), label) if label else []
    vectors = [np.asarray(directions[layer][:, feature], dtype=np.float32)[None] for layer, feature in numbers]
    table = _feature_table(numbers, vectors, next(iter(directions.values())).shape[0], source, split)
    return ReleasedFeatures(table, records.rows_table(rows, records.DESCRIPTIONS), dropped)


def _case_id(source: str, split: str, layer: int, number: int) -> str:
    own = ("feature",) if source == "sae" else (source, split)
    return records.content_id(" ".join(["released", *own]), layer, number)


def _feature_table(
    numbers: Sequence[tuple[int, int]], vectors: Sequence[np.ndarray], d_model: int, source: str, split: str
) -> pa.Table:
    """A vector that is asked about at several layers is one group."""
    is_sae = source == "sae"
    columns = {
        "case_id": [_case_id(source, split, layer, number) for layer, number in numbers],
        "group": [f"layer {layer} feature {n}" if is_sae else f"{split} {source} {n}" for layer, n in numbers],
        "split": [split] * len(numbers),
        "layer": pa.array([layer for layer, _ in numbers], type=pa.int32()),
        "source": [source] * len(numbers),
        "feature_id": pa.array([number for _, number in numbers], type=pa.int32()),
        "vectors": records.vectors_array(vectors, d_model),
    }
    return records.conform(pa.table(columns), records.features(d_model))


def _descriptions(case_id: str, label: dict[str, Any]) -> list[dict[str, Any]]:
    chosen, scores = label["chosen_label"], label.get("all_label_scores") or {}
    return [
        {
            "case_id": case_id,
            "description": text,
            "origin": CHOSEN if text == chosen else OTHER,
            "score": scores.get(text),
            "gold": True,
        }
        for text in dict.fromkeys([*label.get("all_labels", []), chosen])
    ]


def write_labels(features: pa.Table, descriptions: pa.Table) -> list[list[Any]]:
    """What `read_labels` reads (with json.dump), of the features that have a gold description. The chosen label is the
    one that was chosen before or, in our own tables, the gold one of the best score."""
    told: dict[str, list[dict[str, Any]]] = {}
    for row in descriptions.to_pylist():
        if row["gold"]:
            told.setdefault(row["case_id"], []).append(row)
    labels: list[list[Any]] = []
    for case_id, (layer, number) in zip(features["case_id"].to_pylist(), released_numbers(features), strict=True):
        if rows := told.get(case_id):
            best = max(rows, key=lambda row: (row["origin"] == CHOSEN, row["score"] is not None, row["score"] or 0.0))
            scores = {row["description"]: row["score"] for row in rows}
            label = {"chosen_label": best["description"], "all_labels": list(scores), "all_label_scores": scores}
            labels.append([[layer, number], label])
    return labels


def released_numbers(features: pa.Table) -> list[tuple[int, int]]:
    """(layer, number) under which the release has each of these features of one split. A dictionary's features keep
    their numbers. That of a vector is a row of the split's vectors: its own where all have one each, or its place here.

    Raises:
        ValueError: vectors and features of a dictionary are mixed, which no split of the release has.
    """
    layers, numbers = features["layer"].to_pylist(), features["feature_id"].to_pylist()
    if are_vectors(features) and sorted(numbers) != list(range(len(numbers))):
        numbers = list(range(len(numbers)))
    return list(zip(layers, numbers))


def are_vectors(features: pa.Table) -> bool:
    """Whether these features of one split are vectors of no dictionary. Raises: as `released_numbers`."""
    sources = set(features["source"].to_pylist())
    if sources & VECTORS and sources - VECTORS:
        raise ValueError(
            f"features of sources {sorted(sources)} in one split: the release has vectors apart from others"
        )
    return bool(sources) and sources <= VECTORS


def write_directions(features: pa.Table, d_sae: int) -> dict[int, np.ndarray]:
    """The vectors of each layer as a decoder [d_model, d_sae]; columns of features that are not in the table are 0.

    Raises:
        ValueError: a feature's number is not below `d_sae`.
    """
    found: dict[int, np.ndarray] = {}
    places = zip(features["layer"].to_pylist(), features["feature_id"].to_pylist())
    for (layer, feature), own in zip(places, records.vectors_of(features["vectors"])):
        if feature >= d_sae:
            raise ValueError(f"feature {feature} of an SAE of {d_sae} features: they are numbered from 0")
        found.setdefault(layer, np.zeros((own.shape[1], d_sae), np.float32))[:, feature] = own[0]
    return found
