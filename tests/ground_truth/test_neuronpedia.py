import gzip
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pytest

from ray_explain import records, storage
from ray_explain.errors import BadInput
from ray_explain.ground_truth import neuronpedia
from ray_explain.ground_truth.corpora import rows_about
from ray_explain.ground_truth.exemplars import EXEMPLARS
from ray_explain.ground_truth.neuronpedia import (
    NO_DESCRIPTION,
    NO_FEATURE,
    REPEATED,
    UNKNOWN_LAYER,
    check_alignment,
    labels,
)
from tests.serving import serving

N = 60
SOURCE = "3-llamascope-res-131k"


def explanation(number, text, **changes):
    """All columns of Neuronpedia's export of explanations."""
    return {
        "id": f"cm{number}",
        "modelId": "llama3.1-8b",
        "layer": SOURCE,
        "index": str(number),
        "authorId": "clkht01d40000jv08hvalcvly",
        "description": text,
        "embedding": "[0.01,-0.02]",
        "typeName": "oai_token-act-pair",
        "explanationModelName": "gpt-4o-mini",
        **dict.fromkeys(["umap_x", "umap_y", "umap_cluster", "umap_log_feature_sparsity"], 0),
        **changes,
    }


def activation(number, token, **changes):
    """As `explanation`, of activations."""
    return {
        "id": f"cn{number}",
        "tokens": ["the", token, "and"],
        "modelId": "llama3.1-8b",
        "layer": SOURCE,
        "index": str(number),
        "maxValue": 2.5,
        "maxValueTokenIndex": 1,
        "minValue": 0,
        "values": [0, 2.5, 1.0],
        "dfaValues": [],
        "lossValues": [],
        **dict.fromkeys(["dfaTargetIndex", "dfaMaxValue", "logitContributions", "binMin", "qualifyingTokenIndex"]),
        "creatorId": "clkht01d40000jv08hvalcvly",
        "createdAt": "2024-12-01T00:00:00",
        **changes,
    }


def write_source(folder, source=SOURCE, off=0):
    """A source as it lies in the bucket: several batches of each kind, and files that are about the whole."""
    for batch in range(3):
        own = range(batch, N, 3)
        told = [explanation(i + off, f"mentions of {WORDS[i]}", layer=source) for i in own]
        peaks = [activation(i + off, f"\u0120{WORDS[i]}", layer=source) for i in own for _ in range(2)]
        features = [{"modelId": "llama3.1-8b", "layer": source, "index": str(i), "pos_str": ["x"]} for i in own]
        for kind, rows in [("explanations", told), ("activations", peaks), ("features", features)]:
            write(folder, kind, rows, f"batch-{batch}.jsonl.gz", source)
    for name in ("model", "release", "source", "sourceset"):
        (folder / "llama3.1-8b" / source / f"{name}.jsonl").write_text(json.dumps({"id": source}) + "\n")


def write(folder, kind, rows, name="batch-0.jsonl.gz", source=SOURCE):
    path = folder / "llama3.1-8b" / source / kind / name
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
    asked = pa.table({"layer": pa.array([3, 4], pa.int32()), "feature_id": pa.array([5, 2], pa.int32())})
    found = rows_about(table_of(made, tmp_path), asked).to_pylist()
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
    measured = check_alignment([exemplars(WORDS)], folder)
    assert measured["aligned features"] == N - 4  # the outermost have no neighbours to be told from
    assert measured["agreement at offset 0"] == 1 and measured["agreement at offset 1"] == 0


def test_exemplars_part_by_part_are_compared_as_all_at_once_and_labels_read_once_for_each_part(tmp_path, monkeypatch):
    write(tmp_path, "explanations", [explanation(i, f"mentions of {WORDS[i]}") for i in range(N)])
    folder, whole = table_of(labels(str(tmp_path), [3], 32), tmp_path), exemplars(WORDS)
    at_once = check_alignment([whole], folder)
    reads = []
    monkeypatch.setattr(neuronpedia, "rows_about", lambda *asked: reads.append(asked) or rows_about(*asked))
    assert check_alignment((whole.slice(start, 7) for start in range(0, N, 7)), folder) == at_once
    assert len(reads) == 9


@pytest.mark.parametrize("with_tokens", [True, False], ids=["top tokens", "words of descriptions"])
@pytest.mark.parametrize("off", [1, -1])
def test_ids_that_are_off_by_one_are_caught(tmp_path, with_tokens, off):
    write(tmp_path, "explanations", [explanation(i + off, f"mentions of {WORDS[i]}") for i in range(1, N)])
    if with_tokens:
        write(tmp_path, "activations", [activation(i + off, WORDS[i]) for i in range(1, N)])
    folder = table_of(labels(str(tmp_path), [3], 32), tmp_path)
    with pytest.raises(BadInput, match=rf"ids are off by {off}: top tokens agree for 0% of \d+ features as they are"):
        check_alignment([exemplars(WORDS)], folder)


def test_an_off_by_one_is_caught_when_half_of_the_labels_are_noise(tmp_path):
    texts = [f"mentions of {WORDS[i]}" if i % 2 else "something else" for i in range(N)]
    write(tmp_path, "explanations", [explanation(i + 1, text) for i, text in enumerate(texts)])
    folder = table_of(labels(str(tmp_path), [3], 32), tmp_path)
    with pytest.raises(BadInput, match="ids are off by 1"):
        check_alignment([exemplars(WORDS)], folder)


def test_an_export_of_other_features_is_refused_by_its_top_tokens(tmp_path):
    write(tmp_path, "explanations", [explanation(i, f"text {i}") for i in range(N)])
    write(tmp_path, "activations", [activation(i, f"other{i}") for i in range(N)])
    folder = table_of(labels(str(tmp_path), [3], 32), tmp_path)
    with pytest.raises(BadInput, match="the export is of other features: top tokens agree for 0% of 56 features"):
        check_alignment([exemplars(WORDS)], folder)


def test_a_few_features_are_no_evidence(tmp_path):
    write(tmp_path, "explanations", [explanation(i + 1, f"mentions of {WORDS[i]}") for i in range(12)])
    folder = table_of(labels(str(tmp_path), [3], 32), tmp_path)
    assert check_alignment([exemplars(WORDS[:12])], folder) == {"aligned features": 8}


class Bucket(ThreadingHTTPServer):
    """A folder as a public bucket over HTTP, two names a page. Each fifth answer is a 503, each seventh breaks off."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _BucketHandler)
        self.folder, self.asked = folder, []
        self.address = f"http://127.0.0.1:{self.server_port}"


class _BucketHandler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        file = self.server.folder / unquote(path.strip("/"))
        if len(self.server.asked) % 5 == 0:
            self.send_error(503)
        elif query.get("list-type") == ["2"]:
            self.say(self.page(query["prefix"][0], int(query.get("continuation-token", ["0"])[0])))
        elif file.is_file():
            self.say(file.read_bytes())
        else:
            self.send_error(404)

    def page(self, prefix, start):
        folder = self.server.folder
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
        names = [name for name in names if name.startswith(prefix)]
        keys = "".join(f"<Contents><Key>{name}</Key></Contents>" for name in names[start : start + 2])
        more = f"<NextContinuationToken>{start + 2}</NextContinuationToken>" if start + 2 < len(names) else ""
        namespace = "http://s3.amazonaws.com/doc/2006-03-01/"
        return f'<ListBucketResult xmlns="{namespace}">{keys}{more}</ListBucketResult>'.encode()

    def say(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:10] if len(self.server.asked) % 7 == 0 else content)


@pytest.fixture
def bucket(tmp_path):
    with serving(Bucket(tmp_path / "bucket")) as server:
        yield server


def test_the_layout_of_the_bucket_is_read_alike_from_a_folder_and_over_the_web(tmp_path, bucket):
    for layer in (3, 4, 5):
        write_source(tmp_path / "bucket" / "v1", f"{layer}-llamascope-res-131k")
    place = "v1/llama3.1-8b/{layer}-llamascope-res-131k"
    here = labels(f"{tmp_path}/bucket/{place}", [4, 3], 32)
    there = labels(f"{bucket.address}/{place}", [4, 3], 32)
    assert there.table.equals(here.table) and here.dropped == there.dropped == []
    assert here.table["layer"].to_pylist() == [3] * N + [4] * N
    assert here.table["top_tokens"][7].as_py() == [f"\u0120{WORDS[7]}"]
    assert not any("/5-llamascope" in path or "/features/" in path for path in bucket.asked), "more than asked for"
    assert check_alignment([exemplars(WORDS)], table_of(there, tmp_path))["agreement at offset 0"] == 1


def test_a_whole_source_that_is_off_by_one_is_caught(tmp_path):
    write_source(tmp_path, off=1)
    with pytest.raises(BadInput, match="ids are off by 1"):
        check_alignment([exemplars(WORDS)], table_of(labels(str(tmp_path), [3], 32), tmp_path))


def test_a_web_address_without_an_export_is_one_sentence(tmp_path, bucket):
    bucket.folder.mkdir()
    with pytest.raises(BadInput, match="no Neuronpedia export at http"):
        labels(f"{bucket.address}/v1/nobody", [3], 32)
    with pytest.raises(BadInput, match=r"batch-0.jsonl.gz cannot be read: 404 Not Found"):
        labels(f"{bucket.address}/v1/explanations/batch-0.jsonl.gz", [3], 32)
