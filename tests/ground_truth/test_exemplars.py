"""Stages from dictionaries to exemplars, on a random target and the world's texts, without Ray."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from ray_explain import records, storage
from ray_explain.errors import BadInput
from ray_explain.features.exemplars import projecting
from ray_explain.features.sae import SAE
from ray_explain.features.training import train_sae
from ray_explain.ground_truth import dictionaries, exemplars, published
from ray_explain.ground_truth.corpora import windows_of_texts
from ray_explain.ground_truth.dictionaries import DictionaryStage, Windowed, neuron_outputs
from ray_explain.ground_truth.exemplars import NEVER_ACTIVE, MergeStage, SearchStage, shards, token_texts
from ray_explain.ground_truth.neuronpedia import LABELS, UNKNOWN
from ray_explain.ground_truth.published import fetched
from ray_explain.ground_truth.target import Target
from ray_explain.world.corpus import documents
from ray_explain.world.facts import World

LAYERS = pa.table({"layer": pa.array([0, 1], type=pa.int32())})
SIZES = {"top": 4, "random": 3, "near": 2}
N_WINDOWS, POSITIONS, D_SAE = 90, 12, 32


@pytest.fixture(scope="module")
def target(world_target):
    return Target({"model": str(world_target), "dtype": "float32"})


@pytest.fixture(scope="module")
def windows(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    stream = (document.text for document in documents(World(), "test", 1))
    table = windows_of_texts((text for text, _ in zip(stream, range(200))), target.tokenizer, n=N_WINDOWS, tokens=12)
    storage.write_table(table, f"{folder}/table.parquet", row_group_size=16)
    return str(folder)


@pytest.fixture(scope="module")
def saes(target, windows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saes")
    for layer, activations in enumerate(Windowed(target, windows).tokens_of(N_WINDOWS, [0, 1], 10_000)):
        train_sae(activations, d_sae=D_SAE, k=3, steps=150, batch_tokens=256, seed=0, layer=layer).save(
            folder / f"layer_{layer}"
        )
    return str(folder)


@pytest.fixture
def config(world_target, windows, saes, tmp_path):
    return {
        "model": str(world_target),
        "revision": None,
        "dtype": "float32",
        "windows": windows,
        "n_windows": N_WINDOWS,
        "source": "sae",
        "sae": {"path": saes, "revision": None},
        "check": True,
        "folder": str(tmp_path / "dictionaries"),
        "per_layer": None,
        "d_sae": D_SAE,
        "k": 3,
        "steps": 60,
        "seed": 0,
        "labels": None,
        "vectors": None,
        "split": None,
        "exemplars": SIZES,
        "positions": POSITIONS,
    }


def merged(config, folder, features=None):
    """What the three stages make, one after another."""
    if features is None:
        features = DictionaryStage(config)(LAYERS).table
    storage.write_table(features, f"{folder}/features/part.parquet")
    stage = SearchStage(config | {"features": f"{folder}/features"})
    todo = shards(features, N_WINDOWS, positions=POSITIONS, kept=sum(SIZES.values()))
    for row in range(todo.num_rows):
        made = stage(todo.slice(row, 1)).table
        storage.write_table(records.conform(made, stage.schema_out), f"{folder}/found/part-{row:03d}.parquet")
    return MergeStage(config | {"found": f"{folder}/found"})(features)


def test_exemplars_are_the_same_however_the_corpus_is_cut(config, tmp_path, monkeypatch):
    whole = merged(config, tmp_path / "whole")
    monkeypatch.setattr(exemplars, "SHARD_WINDOWS", 17)
    monkeypatch.setattr(exemplars, "KEPT_BYTES", 1)  # a layer at a time
    parts = merged(config, tmp_path / "parts")
    assert len(list((tmp_path / "parts" / "found").iterdir())) == 2 * math.ceil(N_WINDOWS / 17)
    assert rounded(parts.table) == rounded(whole.table)
    assert parts.dropped == whole.dropped
    assert whole.table.num_rows + len(whole.dropped) == 2 * D_SAE


def rounded(table):
    rows = table.to_pylist()
    for row in rows:
        for window in row["windows"]:
            window["activations"] = [round(value, 3) for value in window["activations"]]
    return rows


def test_exemplars_are_those_of_the_whole_matrix(config, target, windows, saes, tmp_path):
    made = merged(config, tmp_path).table.filter(pc.field("layer") == 1).to_pylist()
    sae = SAE.load(f"{saes}/layer_1")
    read = Windowed(target, windows).residual(range(N_WINDOWS), [1])
    active = [sae.encode(vectors[0].float()) for _, vectors in read]
    best = torch.stack([own.amax(dim=0) for own in active])
    assert len(made) > 5
    for feature in made:
        number = feature["feature_id"]
        tops = [window for window in feature["windows"] if window["kind"] == "top"]
        expected = best[:, number].sort(descending=True).values[: len(tops)]
        np.testing.assert_allclose([max(top["activations"]) for top in tops], expected, rtol=1e-4)
        at = int(best[:, number].argmax())
        np.testing.assert_allclose(tops[0]["activations"], active[at][:, number], rtol=1e-3, atol=1e-4)
        assert "".join(tops[0]["tokens"]) == target.tokenizer.decode(read[at][0])
        off = [window for window in feature["windows"] if window["kind"] != "top"]
        assert all(max(window["activations"]) == 0 for window in off)
        assert feature["fired"] == int((best[:, number] > 0).sum()) and feature["seen"] == N_WINDOWS


def test_features_that_are_never_on_are_dropped_and_counted(config, saes, tmp_path):
    sae = SAE.load(f"{saes}/layer_0")
    bias = sae.encoder_bias.clone()
    bias[[3, 7]] = -1e4
    for layer in (0, 1):
        dead = SAE(**{**sae.__dict__, "encoder_bias": bias, "layer": layer, "declared": {}})
        dead.save(tmp_path / "dead" / f"layer_{layer}")
    made = merged(config | {"sae": {"path": str(tmp_path / "dead"), "revision": None}, "check": False}, tmp_path)
    features = storage.read_table(str(tmp_path / "features")).to_pylist()
    dead_ids = {row["case_id"] for row in features if row["feature_id"] in (3, 7)}
    assert dead_ids <= {case for case, reason in made.dropped if reason == NEVER_ACTIVE}


def test_ids_of_features_come_from_their_directions_not_from_where_files_lie(config, saes, tmp_path):
    one = DictionaryStage(config)(LAYERS).table
    moved = tmp_path / "elsewhere"
    for layer in (0, 1):
        SAE.load(f"{saes}/layer_{layer}").save(moved / f"layer_{layer}")
    other = DictionaryStage(config | {"sae": {"path": str(moved), "revision": None}})(LAYERS).table
    assert one["case_id"].equals(other["case_id"]) and len(set(one["case_id"].to_pylist())) == 2 * D_SAE


def test_the_commit_that_saes_came_from_is_told(config, saes, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc123"
    for layer in (0, 1):
        SAE.load(f"{saes}/layer_{layer}").save(snapshot / f"layer_{layer}")
    place = {"path": f"{snapshot}/layer_{{layer}}", "revision": None}
    assert DictionaryStage(config | {"sae": place})(LAYERS).measured == {"layers of commit abc123": 2}
    assert not DictionaryStage(config)(LAYERS).measured


def test_the_doctors_figures_are_kept_and_an_sae_of_another_layer_is_refused(config, saes, tmp_path):
    table = DictionaryStage(config)(LAYERS).table
    assert all(0 < value < 0.5 for value in table["fvu"].to_pylist())
    sae = SAE.load(f"{saes}/layer_0")
    SAE(**{**sae.__dict__, "activation": "relu", "k": 0}).save(tmp_path / "wrong" / "layer_0")
    wrong = config | {"sae": {"path": str(tmp_path / "wrong"), "revision": None}}
    with pytest.raises(BadInput, match="Likely cause: wrong activation function"):
        DictionaryStage(wrong)(LAYERS.slice(0, 1))


def test_an_sae_of_another_width_is_refused(config, tmp_path):
    projecting(torch.randn(5, 16), 0).save(tmp_path / "narrow" / "layer_0")
    with pytest.raises(BadInput, match=r"layer 0: the SAE in .* is 16 wide, the target 32: not its SAE"):
        DictionaryStage(config | {"sae": {"path": str(tmp_path / "narrow"), "revision": None}})(LAYERS.slice(0, 1))


def test_an_sae_of_another_place_than_the_residual_stream_is_refused_even_unchecked(config, saes, tmp_path):
    replace(SAE.load(f"{saes}/layer_0"), site="mlp").save(tmp_path / "mlp" / "layer_0")
    config = config | {"sae": {"path": str(tmp_path / "mlp"), "revision": None}, "check": False}
    with pytest.raises(BadInput, match="is of mlp: features are read in the residual stream"):
        DictionaryStage(config)(LAYERS.slice(0, 1))


@pytest.mark.parametrize("damage", ["truncated", "NaN", "absent"])
def test_a_damaged_sae_is_one_clear_error(config, saes, tmp_path, damage):
    folder = tmp_path / "damaged" / "layer_0"
    sae = SAE.load(f"{saes}/layer_0")
    if damage == "NaN":
        directions = sae.directions.clone()
        directions[4, 1] = math.nan
        sae = SAE(**{**sae.__dict__, "directions": directions})
    sae.save(folder)
    if damage == "truncated":
        weights = folder / "sae.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    layer = 1 if damage == "absent" else 0
    told = {"truncated": "truncated or damaged", "NaN": "the first is feature 4", "absent": "no SAE of layer 1"}
    with pytest.raises(BadInput, match=rf"`ground_truth.features.sae`, layer {layer}: .*{told[damage]}"):
        DictionaryStage(config | {"sae": {"path": str(tmp_path / "damaged"), "revision": None}})(LAYERS.slice(layer, 1))


def test_a_sample_of_features_is_the_same_each_time_and_keeps_their_exemplars(config, tmp_path):
    few = DictionaryStage(config | {"per_layer": 5})(LAYERS).table
    again = DictionaryStage(config | {"per_layer": 5})(LAYERS).table
    assert few.num_rows == 10 and few.equals(again)
    whole = {row["case_id"]: row for row in rounded(merged(config, tmp_path / "whole").table)}
    for row in rounded(merged(config, tmp_path / "few", few).table):
        assert row == whole[row["case_id"]]


def test_only_chosen_rows_of_a_relu_sae_are_moved_to_the_device_and_give_the_same_exemplars(
    config, saes, tmp_path, monkeypatch
):
    for layer in (0, 1):  # as relu each feature stands for itself, unlike in a top-k SAE
        sae = SAE.load(f"{saes}/layer_{layer}")
        replace(sae, activation="relu", k=0, declared={}).save(tmp_path / "relu" / f"layer_{layer}")
    config = config | {"sae": {"path": str(tmp_path / "relu"), "revision": None}, "check": False}
    whole = {row["case_id"]: row for row in rounded(merged(config, tmp_path / "whole").table)}
    few = DictionaryStage(config | {"per_layer": 5})(LAYERS).table
    moved, to = [], SAE.to
    monkeypatch.setattr(SAE, "to", lambda self, *where: moved.append(self.d_sae) or to(self, *where))
    made = rounded(merged(config, tmp_path / "few", few).table)
    assert moved == [5, 5]
    assert len(made) > 5 and all(row == whole[row["case_id"]] for row in made)


def test_only_described_features_are_taken_and_unknown_ids_counted(config, tmp_path):
    rows = [
        {"layer": 0, "feature_id": i, "description": "d", "origin": "o", "top_tokens": []} for i in (2, 9, 31, 32, 99)
    ]
    storage.write_table(records.rows_table(rows, LABELS), f"{tmp_path}/labels/table.parquet")
    made = DictionaryStage(config | {"labels": str(tmp_path / "labels")})(LAYERS)
    assert made.table["feature_id"].to_pylist() == [2, 9, 31]
    assert made.dropped == [("layer 0 feature 32", UNKNOWN), ("layer 0 feature 99", UNKNOWN)]


def test_a_target_without_saes_gets_its_own_with_figures(config, tmp_path):
    made = merged(config | {"sae": None}, tmp_path)
    features = storage.read_table(str(tmp_path / "features"))
    assert features.num_rows == 2 * D_SAE
    assert all(0 < value < 0.7 for value in features["fvu"].to_pylist())
    assert made.table.num_rows > D_SAE


def test_a_neurons_exemplars_are_where_it_is_active_and_its_vector_is_what_it_writes(config, target, windows, tmp_path):
    made = merged(config | {"sae": None, "source": "neurons"}, tmp_path).table
    row = made.filter(pc.field("layer") == 1).slice(2, 1).to_pylist()[0]
    mlp, highest = target.model.model.layers[1].mlp, 0.0
    kept = []
    hook = mlp.down_proj.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0][0]))
    for ids, _ in Windowed(target, windows).residual(range(N_WINDOWS), [0]):
        kept.clear()
        target.model(torch.tensor([[target.tokenizer.bos_token_id, *ids]]))
        highest = max(highest, float(kept[0][1:, row["feature_id"]].max()))
    hook.remove()
    assert max(row["windows"][0]["activations"]) == pytest.approx(highest, rel=1e-4)
    assert row["source"] == "neuron"
    vector = neuron_outputs(target.layout, 1)[row["feature_id"]]
    assert torch.equal(vector, mlp.down_proj.weight[:, row["feature_id"]])


def test_windows_of_one_length_run_together_and_give_the_neurons_they_give_alone(target, windows):
    corpus, passes = Windowed(target, windows), []
    hook = target.layout.decoder.register_forward_pre_hook(lambda *_: passes.append(1))
    together = corpus.neurons(range(30), [1, 0])
    hook.remove()
    assert len(passes) <= len({len(ids) for ids, _ in together}) + 1 < 30
    for number, (ids, values) in enumerate(together):
        [(own_ids, own)] = corpus.neurons([number], [1, 0])
        assert ids == own_ids
        torch.testing.assert_close(values, own)


def test_whole_vectors_keep_their_cases_and_groups(config, target, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    table = pa.table(
        {
            "case_id": [f"case {i}" for i in range(6)],
            "group": [f"text {i // 2}" for i in range(6)],
            "split": ["train"] * 6,
            "layer": pa.array([0, 1] * 3, type=pa.int32()),
            "source": ["activation"] * 6,
            "feature_id": pa.array(range(6), type=pa.int32()),
            "vectors": records.vectors_array([vector[None] for vector in vectors], 32),
        }
    )
    storage.write_table(records.conform(table, records.features(32)), f"{tmp_path}/vectors/part.parquet")
    made = DictionaryStage(config | {"sae": None, "source": "activations", "vectors": f"{tmp_path}/vectors"})(
        LAYERS
    ).table.to_pylist()
    assert [(row["case_id"], row["group"], row["layer"], row["feature_id"]) for row in made] == [
        (f"case {i}", f"text {i // 2}", i % 2, i // 2) for i in (0, 2, 4, 1, 3, 5)
    ]
    found = dictionaries.read_directions(fetched(f"{tmp_path}/dictionaries", 1), 1, [2, 0])
    np.testing.assert_allclose(found, vectors[[5, 1]])


@pytest.mark.parametrize("ids", [[], [5], [5, 6, 7, 8]])
def test_texts_of_tokens_join_to_the_text(target, ids):
    texts = token_texts(target.tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == target.tokenizer.decode(ids)


def test_a_character_of_several_tokens_belongs_to_the_last():
    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", errors="replace")

    ids = list("aé€b".encode())
    assert token_texts(Bytes(), ids) == ["a", "", "é", "", "", "€", "b"]


@pytest.fixture
def bucket(monkeypatch):
    """An S3 on this machine."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    storage._s3.cache_clear()  # of the address that another test's bucket of this name had
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    server.stop()


def upload(bucket, saes):
    for path in saes.rglob("*.*"):
        bucket.upload_file(str(path), "bucket", f"saes/{path.relative_to(saes)}")


def test_an_sae_is_fetched_from_s3_alone_and_whole(bucket, saes, tmp_path, monkeypatch):
    upload(bucket, Path(saes))
    monkeypatch.setattr(storage, "own_scratch", lambda: tmp_path / "cache")
    folder = fetched("s3://bucket/saes", 1)
    assert torch.equal(SAE.load(folder).directions, SAE.load(f"{saes}/layer_1").directions)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/saes: no SAE of layer 5 among \['layer_0', 'layer_1'\]"):
        fetched("s3://bucket/saes", 5)
    bucket.delete_object(Bucket="bucket", Key="saes/layer_0/sae.safetensors")
    assert fetched("s3://bucket/saes", 1) == folder, "nothing changed there"


def test_an_sae_whose_fetch_broke_off_is_fetched_whole_and_one_that_was_replaced_anew(
    bucket, saes, tmp_path, monkeypatch
):
    upload(bucket, Path(saes))
    monkeypatch.setattr(storage, "own_scratch", lambda: tmp_path / "cache")
    breaks, copy_files = [True], published.fs.copy_files

    def copied(*args, **kwargs):
        if breaks:
            breaks.clear()
            raise OSError("the connection was cut")
        copy_files(*args, **kwargs)

    monkeypatch.setattr(published.fs, "copy_files", copied)
    before = fetched("s3://bucket/saes", 1)
    assert torch.equal(SAE.load(before).directions, SAE.load(f"{saes}/layer_1").directions)
    projecting(torch.eye(4), 1).save(tmp_path / "other" / "layer_1")
    upload(bucket, tmp_path / "other")
    assert SAE.load(fetched("s3://bucket/saes", 1)).d_sae == 4
