import json
import math
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ray_explain import records
from ray_explain.ground_truth import outcomes, released
from ray_explain.ground_truth.ablation import AblationStage
from ray_explain.ground_truth.mmlu import SYSTEM, Item, hinted_case
from ray_explain.ground_truth.patching import PatchingStage
from ray_explain.ground_truth.positions import prompt_tokens
from tests.ground_truth.conftest import LLAMA_CHAT, make_case, patching_table, saved, with_template

SUFFIX = "\n\nRespond with one of Italy or France or unknown and nothing else.\n\nResponse:"
BASE, SOURCE = f"Rome lies in{SUFFIX}", f"Paris lies in{SUFFIX}"
ITEMS = [Item("geography", i, f"Where is {i}?", ("Italy", "France", "Spain", "Peru"), "ABCD"[i]) for i in range(4)]
# our prompts with the paper's system text are longer than the tiny target's context
SHORT = [item for item in ITEMS if item.index < 3]


def released_patch(tokenizer: PreTrainedTokenizerFast, *, begun: bool, **changes: Any) -> dict[str, Any]:
    """A row as the release has it; whether its tokens begin with the begin-of-text token is not known."""
    ids = prompt_tokens(tokenizer, BASE).ids[0 if begun else 1 :]
    row = {
        "layer": [8, 9, 10, 11],
        "input_tokens": tokenizer.convert_ids_to_tokens(list(ids)),
        "original_continuation": [" Italy"],
        "ablated_continuation": [" France"],
        "is_different": True,
        "patch_position": {
            "orig_pos": 3,
            "counterfact_pos": 4,
            "orig_text_token": tokenizer.decode([ids[3]]),
            "counterfact_text_token": tokenizer.decode([prompt_tokens(tokenizer, SOURCE).ids[4 if begun else 5]]),
            "intervention_vector": [0.5, -1.5, 2.0, 0.25],
        },
        "counterfactual_text": SOURCE,
        "gt_original_target": "Italy",
        "gt_counterfactual_target": "France",
        "layer_hashable": [8, 9, 10, 11],
        "token_type": "relation_suffix",
    }
    return row | changes


def without_begin(row: dict[str, Any]) -> dict[str, Any]:
    """The same patch of a target that reads no begin-of-text token."""
    place = row["patch_position"]
    moved = {name: place[name] - 1 for name in ("orig_pos", "counterfact_pos")}
    return row | {"input_tokens": row["input_tokens"][1:], "patch_position": place | moved}


def table_of(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema)


def test_a_released_patch_is_read_as_what_it_says(tokenizer: PreTrainedTokenizerFast) -> None:
    for begun in (True, False):
        made = released.read_patching(
            table_of([released_patch(tokenizer, begun=begun)], released.PATCHING), tokenizer, split="test", d_model=4
        )
        (row,) = made.table.to_pylist()
        assert (row["base_prompt"], row["source_prompt"], row["split"]) == (BASE, SOURCE, "test")
        assert (row["first_layer"], row["last_layer"], row["role"]) == (8, 11, "relation_suffix")
        shift = 0 if begun else 1  # our positions count the begin-of-text token
        assert (row["base_positions"], row["source_positions"]) == ([3 + shift], [4 + shift])
        assert (row["base_answer"], row["patched_answer"], row["changed"]) == (" Italy", " France", True)
        assert row["vectors"] == [[0.5, -1.5, 2.0, 0.25]]
        assert row["group"] == "Rome lies in"
        assert all(math.isnan(row[name]) for name in ("base_logprob", "patched_logprob", "kl"))


def test_a_released_patching_table_comes_back_as_it_was(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [
        released_patch(tokenizer, begun=True),
        released_patch(tokenizer, begun=True, is_different=False, ablated_continuation=[" Italy"], token_type="other"),
    ]
    table = table_of(rows, released.PATCHING)
    pq.write_table(table.append_column("__index_level_0__", pa.array([4, 7])), tmp_path / "t.parquet")
    read = released.read_patching(pq.read_table(tmp_path / "t.parquet"), tokenizer, split="train", d_model=4)
    written = released.write_patching(read.table, tokenizer)
    assert read.dropped == written.dropped == []
    assert written.table.equals(table)


def test_a_released_patching_table_of_a_target_without_begin_of_text_comes_back_as_it_was(
    tokenizer: PreTrainedTokenizerFast, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    begun = released_patch(tokenizer, begun=True)
    table = table_of([without_begin(begun), without_begin(begun | {"is_different": False})], released.PATCHING)
    read = released.read_patching(table, plain_tokenizer, split="train", d_model=4)
    assert read.dropped == []
    for row in read.table.to_pylist():
        assert (row["base_prompt"], row["base_positions"], row["source_positions"]) == (BASE, [2], [3])
    written = released.write_patching(read.table, plain_tokenizer)
    assert written.dropped == [] and written.table.equals(table)
    place = written.table["patch_position"][0].as_py()
    own = prompt_tokens(plain_tokenizer, BASE).ids, prompt_tokens(plain_tokenizer, SOURCE).ids
    assert place["orig_text_token"] == plain_tokenizer.decode([own[0][2]])
    assert place["counterfact_text_token"] == plain_tokenizer.decode([own[1][3]])


@pytest.mark.parametrize("begun", [True, False])
def test_our_patching_effects_come_back_from_the_released_schema(
    begun: bool,
    model: PreTrainedModel,
    config: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    plain_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    if not begun:
        tokenizer, config = plain_tokenizer, saved(model, plain_tokenizer, tmp_path)
    cases = [
        make_case(BASE, SOURCE, at, at + 1, block=block, split="test") for at in (3, 9) for block in [(0, 1), (2, 2)]
    ]
    effects = PatchingStage(config)(patching_table(cases)).table
    table = released.write_patching(effects, tokenizer).table
    assert table.schema == released.PATCHING
    assert (table["input_tokens"][0].as_py()[0] == tokenizer.bos_token) is begun
    read = released.read_patching(table, tokenizer, split="test", d_model=32).table
    shared = [
        "base_prompt", "source_prompt", "first_layer", "last_layer", "site", "kind", "base_positions",
        "source_positions", "role", "base_truth", "source_truth", "vectors", "base_answer", "patched_answer", "changed",
    ]  # fmt: skip
    assert read.select(shared).equals(effects.select(shared))


def test_released_patches_that_cannot_be_read_are_dropped_by_their_number(tokenizer: PreTrainedTokenizerFast) -> None:
    good = released_patch(tokenizer, begun=True)
    place = good["patch_position"]
    bad = [
        (good | {"layer": [8, 10]}, released.NO_BLOCK),
        (good | {"original_continuation": ["a", "b"]}, released.NOT_ONE_TOKEN),
        (good | {"ablated_continuation": [tokenizer.eos_token]}, released.ENDS),
        (good | {"input_tokens": ["R", "o", "m", "e"]}, released.OTHER_TOKENS),
        (good | {"patch_position": place | {"orig_pos": 500}}, released.NO_SUCH_POSITION),
        (good | {"patch_position": place | {"intervention_vector": [math.nan] * 4}}, outcomes.NOT_FINITE),
        (good | {"patch_position": place | {"intervention_vector": [0.5, None, 1.0, 2.0]}}, outcomes.NOT_FINITE),
        (good | {"patch_position": place | {"intervention_vector": None}}, released.NO_VECTOR),
        (good | {"patch_position": place | {"intervention_vector": []}}, released.NO_VECTOR),
        (good | {"patch_position": None}, released.NOT_TOLD),
        (good | {"patch_position": place | {"orig_pos": None}}, released.NOT_TOLD),
        (good | {"patch_position": place | {"counterfact_pos": None}}, released.NOT_TOLD),
        (good | {"layer": []}, released.NO_BLOCK),
        (good | {"layer": [8, None]}, released.NOT_TOLD),
        *((good | {name: None}, released.NOT_TOLD) for name in ("layer", "input_tokens", "counterfactual_text")),
        *((good | {name: None}, released.NOT_TOLD) for name in ("original_continuation", "token_type")),
        (good | {"ablated_continuation": [None]}, released.NOT_TOLD),
    ]
    table = table_of([good, *(row for row, _ in bad), good], released.PATCHING)
    made = released.read_patching(table, tokenizer, split="train", d_model=4, first=100)
    assert made.dropped == [(f"row {100 + i}", reason) for i, (_, reason) in enumerate(bad, start=1)]
    assert made.table["vectors"].to_pylist() == [[place["intervention_vector"]]] * 2
    nothing = released.read_patching(table.slice(1, 1), tokenizer, split="train", d_model=4)
    assert (nothing.table.num_rows, nothing.table.schema) == (0, made.table.schema)
    with pytest.raises(ValueError, match=r"missing \['layer'\]"):
        released.read_patching(table.drop_columns(["layer"]), tokenizer, split="train", d_model=4)


def test_whether_a_patched_answer_changed_is_told_by_the_answers_where_the_release_is_silent(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [
        released_patch(tokenizer, begun=True, is_different=None, ablated_continuation=[to]) for to in (" a", " Italy")
    ]
    made = released.read_patching(table_of(rows, released.PATCHING), tokenizer, split="train", d_model=4)
    assert made.table["changed"].to_pylist() == [True, False]


def test_released_patches_are_read_and_written_without_python_numbers_of_their_vectors(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    d_model, n = 4096, 20
    row = released_patch(tokenizer, begun=True)
    row["patch_position"] |= {"intervention_vector": [0.5] * d_model}
    table = table_of([row] * n, released.PATCHING)
    tracemalloc.start()
    made = released.read_patching(table, tokenizer, split="train", d_model=d_model)
    written = released.write_patching(made.table, tokenizer)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert made.table.num_rows == written.table.num_rows == n
    assert peak < 3 * n * d_model * 4  # bytes; a list of Python's numbers takes eight for the reference alone


def test_patches_that_the_release_has_no_words_for_are_dropped(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    cases = [
        make_case(BASE, SOURCE, 3, 3),
        make_case(BASE, SOURCE, 3, 3, kind="add"),
        make_case(BASE, SOURCE, 3, 3, base_positions=[3, 4], source_positions=[3, 4]),
    ]
    made = released.write_patching(PatchingStage(config)(patching_table(cases)).table, tokenizer)
    assert made.table.num_rows == 1
    assert made.dropped == [
        (cases[1]["case_id"], released.NO_REPLACEMENT),
        (cases[2]["case_id"], released.SEVERAL_POSITIONS),
    ]


def released_hint(tokenizer: PreTrainedTokenizerFast, item: Item, letter: str, **changes: Any) -> dict[str, Any]:
    user, hint = item.text, f"Hint: {letter}"
    chat = "<|begin|>[system]{system}\n[user]{user}\n[assistant]Answer:"
    row = {
        "index": item.index,
        "question": item.question,
        "choices": list(item.choices),
        "correct_answer": item.answer,
        "zeroshot_prediction": "A",
        "random_hint_prediction": letter,
        "hint_token_ids": tokenizer(hint, add_special_tokens=False)["input_ids"],
        "original_prompt_full": chat.format(system=SYSTEM, user=user),
        "hint_prompt_full": chat.format(system=SYSTEM, user=f"{user}\n{hint}"),
        "system_prompt": SYSTEM,
        "original_user_prompt": user,
        "hint_user_prompt": f"{user}\n{hint}",
        "hint": hint,
        "changed_pred_bc_hint": letter != "A",
        "ablation_prompt": f"{user}\n{hint}\n\nIf the hint were removed how would the assistant answer change?",
    }
    return row | changes


def test_a_released_ablation_table_comes_back_as_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [released_hint(tokenizer, item, letter) for item, letter in zip(ITEMS, "ABDD")]
    table = table_of(rows, released.ABLATION)
    read = released.read_ablation(table, split="test")
    assert read.effects.dropped == []
    effects = read.effects.table.to_pylist()
    assert [row["changed"] for row in effects] == [False, True, True, True]
    assert [row["stratum"] for row in effects] == ["right hint", "right hint", "wrong hint", "right hint"]
    assert [row["prompt"][row["span_start"] : row["span_end"]] for row in effects] == [
        "\nHint: A", "\nHint: B", "\nHint: D", "\nHint: D",
    ]  # fmt: skip
    written = released.write_ablation(read.effects.table, read.items, tokenizer)
    assert written.dropped == []
    assert written.table.equals(table)


def test_whether_an_answer_changed_is_told_by_the_answers_where_the_release_is_silent(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [released_hint(tokenizer, ITEMS[1], "B", changed_pred_bc_hint=None)]
    read = released.read_ablation(table_of(rows, released.ABLATION), split="test")
    assert read.effects.table["changed"].to_pylist() == [True]


def test_our_ablation_effects_come_back_from_the_released_schema(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    cases = [hinted_case(item, tokenizer, hint="random", form="chat", seed=0) for item in SHORT]
    # the tiny target cannot read the system text: the same cases without it
    cut = len(f"[system]{SYSTEM}\n")
    begin = len(tokenizer.bos_token)
    for case in cases:
        case["prompt"] = case["prompt"][:begin] + case["prompt"][begin + cut :]
        case["span_start"] -= cut
        case["span_end"] -= cut
        case["case_id"] = records.content_id("ablation", case["prompt"], (case["span_start"], case["span_end"]))
        case["split"] = "train"
    effects = AblationStage(config)(records.rows_table(cases, records.ABLATION_CASES)).table
    assert effects.num_rows == len(SHORT)
    table = released.write_ablation(effects, SHORT, tokenizer).table
    read = released.read_ablation(table, split="train")
    told = [name for name in effects.column_names if not name.endswith("logprob") and name != "kl"]
    assert read.effects.table.select(told).equals(effects.select(told))
    missing = released.write_ablation(effects, SHORT[1:], tokenizer)
    assert [reason for _, reason in missing.dropped] == [released.NO_QUESTION]


def test_questions_that_begin_or_end_with_spaces_are_written_where_the_template_trims(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    spaced = [replace(item, question=f" \n{item.question} ") for item in ITEMS]
    trimming = with_template(tokenizer, LLAMA_CHAT)
    outcome = {"full_answer": "A", "ablated_answer": "B", "changed": True}
    outcome |= dict.fromkeys(("full_logprob", "ablated_logprob", "kl"), math.nan)
    cases = [hinted_case(item, trimming, hint="random", form="chat", seed=0) | outcome for item in spaced]
    written = released.write_ablation(records.rows_table(cases, records.ABLATION_EFFECTS), spaced, trimming)
    assert written.dropped == []
    for row, item, plain in zip(written.table.to_pylist(), spaced, ITEMS, strict=True):
        assert row["question"] == item.question
        assert row["original_user_prompt"] == plain.text.replace("?", "? ")
        assert row["hint_user_prompt"] == f"{row['original_user_prompt']}\n{row['hint']}"


def test_released_hints_that_cannot_be_read_are_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        released_hint(tokenizer, ITEMS[0], "B"),
        released_hint(tokenizer, ITEMS[1], "B", original_prompt_full="something else"),
        released_hint(tokenizer, ITEMS[1], "B", choices=["a", None, "c", "d"]),
        *(released_hint(tokenizer, ITEMS[1], "B", **{name: None}) for name in ("hint", "zeroshot_prediction")),
    ]
    read = released.read_ablation(table_of(rows, released.ABLATION), split="test")
    assert read.effects.dropped == [("row 1", released.NO_HINT), *((f"row {i}", released.NOT_TOLD) for i in (2, 3, 4))]
    assert len(read.items) == read.effects.table.num_rows == 1


LABELS: list[list[Any]] = [
    [[0, 2], {"chosen_label": "cats", "all_labels": ["pets", "cats"], "all_label_scores": {"pets": 0.75, "cats": 0.5}}],
    [[1, 0], {"chosen_label": "rain", "all_labels": ["rain"], "all_label_scores": {"rain": None}}],
]
DECODERS = {layer: np.arange(12, dtype=np.float32).reshape(4, 3) + 100 * layer for layer in (0, 1)}


def test_released_labels_come_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "train_explanations.json"
    file.write_text(json.dumps(LABELS))
    read = released.read_features(released.read_labels(file), DECODERS, split="train")
    assert read.features.schema == records.features(4)
    assert read.features["vectors"].to_pylist() == [[[2.0, 5.0, 8.0, 11.0]], [[100.0, 103.0, 106.0, 109.0]]]
    assert read.descriptions["gold"].to_pylist() == [True] * 3
    assert released.write_labels(read.features, read.descriptions) == LABELS
    decoders = released.write_directions(read.features, 3)
    np.testing.assert_array_equal(decoders[1][:, 0], DECODERS[1][:, 0])
    assert not decoders[0][:, :2].any()
    with pytest.raises(ValueError, match="feature 2 of an SAE of 2 features"):
        released.write_directions(read.features, 2)


def test_feature_numbers_may_be_text_and_those_without_direction_are_dropped() -> None:
    labels = [((0, 1), LABELS[0][1]), ((0, 77), LABELS[0][1]), ((9, 0), LABELS[1][1])]
    read = released.read_features(labels, DECODERS, split="test")
    assert read.features["feature_id"].to_pylist() == [1]
    assert [name for name, _ in read.dropped] == ["layer 0 feature 77", "layer 9 feature 0"]


def test_labels_written_with_a_letter_are_read(tmp_path: Path) -> None:
    file = tmp_path / "labels.json"
    file.write_text(json.dumps([[[3, "f123"], LABELS[0][1]], [[3, "7"], LABELS[0][1]]]))
    assert [key for key, _ in released.read_labels(file)] == [(3, 123), (3, 7)]


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    told = "is a pickle, which can run code when it is opened: convert it with {} on a machine that may be lost"
    as_json, as_array = "json.dump(list(...))", "numpy.save(path, torch.load(path).float().numpy())"
    with pytest.raises(ValueError, match=re.escape(told.format(as_json))):
        released.read_labels(tmp_path / "train_explanations.pkl")
    with pytest.raises(ValueError, match=re.escape(told.format(as_json))):
        released.read_numbers(tmp_path / "train_layer_feature_idxs.pkl")
    with pytest.raises(ValueError, match=re.escape(told.format(as_array))):
        released.read_vectors(tmp_path / "train_vectors.pt", 4)
    file = tmp_path / "other.json"
    file.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="is not a list of"):
        released.read_labels(file)


def test_vectors_are_features_of_their_source_numbered_by_their_row() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(3, 4)
    vectors[1, 2] = np.inf
    labels = [((5, 2), None), ((3, 0), LABELS[0][1]), ((3, 1), None), ((3, 3), None)]
    read = released.read_features(labels, dict.fromkeys((3, 5), vectors.T), split="test", source="difference")
    assert read.features["layer"].to_pylist() == [5, 3] and read.features["feature_id"].to_pylist() == [2, 0]
    assert read.features["source"].to_pylist() == ["difference"] * 2
    np.testing.assert_array_equal(np.concatenate(records.vectors_of(read.features["vectors"])), vectors[[2, 0]])
    assert set(read.descriptions["case_id"].to_pylist()) == {read.features["case_id"][1].as_py()}
    assert read.dropped == [("layer 3 feature 1", outcomes.NOT_FINITE), ("layer 3 feature 3", released.NO_VECTOR)]
    assert released.released_numbers(read.features) == [(5, 0), (3, 1)], "the rows that they are written to"


def test_vectors_and_features_of_a_dictionary_are_not_written_as_one_split() -> None:
    parts = [released.read_features([((0, 1), None)], DECODERS, split="test", source=s) for s in ("sae", "activation")]
    mixed = pa.concat_tables(part.features for part in parts)
    with pytest.raises(ValueError, match=r"sources \['activation', 'sae'\] in one split"):
        released.released_numbers(mixed)
