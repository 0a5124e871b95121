import gzip
import json

import pytest

from ray_explain import records, storage
from ray_explain.errors import BadInput
from ray_explain.ground_truth.exemplars import EXEMPLARS
from ray_explain.ground_truth.neuronpedia import (
    NO_DESCRIPTION,
    NO_FEATURE,
    REPEATED,
    UNKNOWN_LAYER,
    check_alignment,
    labels,
    read_labels,
)

N = 60
SOURCE = "3-llamascope-res-131k"


def explanation(number, text, **changes):
    return {
        "modelId": "llama3.1-8b",
        "layer": SOURCE,
        "index": str(number),
        "description": text,
        "explanationModelName": "gpt-4o-mini",
        "typeName": "oai_token-act-pair",
        **changes,
    }


def activation(number, token, **changes):
    tokens = ["the", token, "and"]
    return {
        "layer": SOURCE,
        "index": str(number),
        "tokens": tokens,
        "maxValueTokenIndex": 1,
        "maxValue": 2.5,
        **changes,
    }


def write(folder, kind, rows, name="batch-0.jsonl.gz"):
    path = folder / "llama3.1-8b" / SOURCE / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)


def table_of(result, folder):
    storage.write_table(result.table, f"{folder}/labels/table.parquet", row_group_size=8)
    return f"{folder}/labels"


def exemplars(tokens):
    """Feature i is highest on the i-th token."""
    rows = []
    for number, token in enumerate(tokens):
        window = {"kind": "top", "rank": 0, "tokens": [" so", f" {token}", " it"], "activations": [0.0, 2.0, 0.5]}
        own = {"case_id": str(number), "group": str(number), "split": "train", "layer": 3, "source": "sae"}
        rows.append(own | {"feature_id": number, "fired": 3, "seen": 9, "windows": [window]})
    return records.rows_table([dict.fromkeys(EXEMPLARS.names) | row for row in rows], EXEMPLARS)


WORDS = [f"word{i}" for i in range(N)]


def test_descriptions_and_top_tokens_are_joined_by_layer_and_number(tmp_path):
    write(tmp_path, "explanations", [explanation(5, " references to dogs"), explanation(2, "cats")])
    write(tmp_path, "explanations", [explanation(5, "animals that bark")], name="batch-1.jsonl")
    write(tmp_path, "activations", [activation(5, " dog"), activation(5, "Ġhound")])
    write(tmp_path, "features", [{"layer": SOURCE, "index": "5", "pos_str": ["x"]}])
    made = labels(str(tmp_path), [3], 32)
    assert made.dropped == []
    rows = made.table.to_pylist()
    assert [(row["layer"], row["feature_id"], row["description"]) for row in rows] == [
        (3, 2, "cats"),
        (3, 5, "animals that bark"),
        (3, 5, "references to dogs"),
    ]
    assert rows[1]["top_tokens"] == [" dog", "Ġhound"] and rows[1]["origin"] == "gpt-4o-mini"
    found = read_labels(table_of(made, tmp_path), 3, 3, 9)
    assert [row["description"] for row in found] == ["animals that bark", "references to dogs"]


def test_lines_that_give_no_description_are_dropped_and_counted(tmp_path):
    rows = [
        explanation(1, "cats"),
        explanation(1, "cats"),
        explanation(2, "  "),
        explanation(3, None),
        explanation("x", "dogs"),
        {"description": "no layer"},
        explanation(4, "far up", layer="40-llamascope-res-131k"),
        explanation(4, "not asked for", layer="2-llamascope-res-131k"),
        "not json",
    ]
    write(tmp_path, "explanations", rows)
    made = labels(str(tmp_path), [3], 32)
    assert made.table.num_rows == 1
    reasons = [reason for _, reason in made.dropped]
    assert reasons == [REPEATED, NO_DESCRIPTION, NO_DESCRIPTION, NO_FEATURE, NO_FEATURE, UNKNOWN_LAYER, reasons[-1]]


def test_exports_of_two_saes_of_one_layer_are_not_mixed(tmp_path):
    write(tmp_path, "explanations", [explanation(1, "cats"), explanation(1, "dogs", layer="3-llamascope-mlp-32k")])
    with pytest.raises(BadInput, match="layer 3 of several SAEs, '3-llamascope-res-131k' and '3-llamascope-mlp-32k'"):
        labels(str(tmp_path), [3], 32)


def test_no_export_or_a_truncated_one_is_told(tmp_path):
    with pytest.raises(BadInput, match="no Neuronpedia export at"):
        labels(str(tmp_path), [3], 32)
    write(tmp_path, "explanations", [explanation(i, f"text {i}") for i in range(500)])
    [path] = tmp_path.rglob("*.gz")
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(BadInput, match=r"batch-0.jsonl.gz is truncated or damaged .*: fetch it again"):
        labels(str(tmp_path), [3], 32)


@pytest.mark.parametrize("with_tokens", [True, False], ids=["top tokens", "words of descriptions"])
def test_an_export_that_fits_is_let_through(tmp_path, with_tokens):
    write(tmp_path, "explanations", [explanation(i, f"mentions of {WORDS[i]}") for i in range(N)])
    if with_tokens:
        write(tmp_path, "activations", [activation(i, f" {WORDS[i].upper()}") for i in range(N)])
    folder = table_of(labels(str(tmp_path), [3], 32), tmp_path)
    measured = check_alignment(exemplars(WORDS), folder)
    assert measured["aligned features"] == N - 4  # the outermost have no neighbours to be told from
    assert measured["agreement at offset 0"] == 1 and measured["agreement at offset 1"] == 0


@pytest.mark.parametrize("with_tokens", [True, False], ids=["top tokens", "words of descriptions"])
@pytest.mark.parametrize("off", [1, -1])
def test_ids_that_are_off_by_one_are_caught(tmp_path, with_tokens, off):
    write(tmp_path, "explanations", [explanation(i + off, f"mentions of {WORDS[i]}") for i in range(1, N)])
    if with_tokens:
        write(tmp_path, "activations", [activation(i + off, WORDS[i]) for i in range(1, N)])
    folder = table_of(labels(str(tmp_path), [3], 32), tmp_path)
    with pytest.raises(BadInput, match=rf"ids are off by {off}: top tokens agree for 0% of \d+ features as they are"):
        check_alignment(exemplars(WORDS), folder)


def test_an_off_by_one_is_caught_when_half_of_the_labels_are_noise(tmp_path):
    texts = [f"mentions of {WORDS[i]}" if i % 2 else "something else" for i in range(N)]
    write(tmp_path, "explanations", [explanation(i + 1, text) for i, text in enumerate(texts)])
    folder = table_of(labels(str(tmp_path), [3], 32), tmp_path)
    with pytest.raises(BadInput, match="ids are off by 1"):
        check_alignment(exemplars(WORDS), folder)


def test_an_export_of_other_features_is_refused_by_its_top_tokens(tmp_path):
    write(tmp_path, "explanations", [explanation(i, f"text {i}") for i in range(N)])
    write(tmp_path, "activations", [activation(i, f"other{i}") for i in range(N)])
    folder = table_of(labels(str(tmp_path), [3], 32), tmp_path)
    with pytest.raises(BadInput, match="the export is of other features: top tokens agree for 0% of 56 features"):
        check_alignment(exemplars(WORDS), folder)


def test_a_few_features_are_no_evidence(tmp_path):
    write(tmp_path, "explanations", [explanation(i + 1, f"mentions of {WORDS[i]}") for i in range(12)])
    folder = table_of(labels(str(tmp_path), [3], 32), tmp_path)
    assert check_alignment(exemplars(WORDS[:12]), folder) == {"aligned features": 8}
