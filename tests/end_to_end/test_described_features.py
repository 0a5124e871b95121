"""From a target and SAEs that others made to described, scored features and questions, through the jobs' own `main`."""

import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoTokenizer

from jobs import evaluate, export, ground_truth, report
from ray_explain import storage
from ray_explain.artifacts import finished
from ray_explain.ask import main as ask
from ray_explain.config import read_experiment
from ray_explain.distributed.feature_plan import FeaturePlan
from ray_explain.distributed.plan import Plan
from ray_explain.features.sae import SAE
from ray_explain.features.training import train_sae
from ray_explain.ground_truth.released_exemplars import ReleasedExemplars
from ray_explain.ground_truth.target import Target
from ray_explain.interventions.extraction import residuals
from ray_explain.world.corpus import documents
from ray_explain.world.facts import World
from tests.conftest import ChatServer
from tests.serving import serving

pytestmark = pytest.mark.ray
D_SAE, K = 48, 4
EXEMPLARS = {"top": 6, "random": 4, "near": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    stream = documents(World(), "some corpus", 1)
    path.write_text("".join(json.dumps({"text": doc.text}) + "\n" for doc, _ in zip(stream, range(400), strict=False)))
    return path


@pytest.fixture(scope="module")
def saes(world_target: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A top-k SAE for each layer of the target, in SAELens' layout."""
    target = Target({"model": str(world_target), "dtype": "float32"})
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    read = target.read(texts)
    layers = residuals(target.model, [read(text).ids for text in texts], [0, 1])
    folder = tmp_path_factory.mktemp("saes")
    for layer in range(2):
        activations = torch.cat([own[layer, 1:] for own in layers]).float()
        sae = train_sae(activations, d_sae=D_SAE, k=K, steps=150, batch_tokens=512, seed=0, layer=layer)
        write_sae_lens(folder / f"blocks.{layer}.hook_resid_post", sae)
    return folder


def write_sae_lens(folder: Path, sae: SAE) -> None:
    """As SAELens does: the scale of inputs folded into the weights."""
    folder.mkdir()
    tensors = {
        "W_enc": (sae.encoder * sae.scale).T.contiguous(),
        "b_enc": sae.encoder_bias,
        "W_dec": sae.directions / sae.scale,
        "b_dec": sae.decoder_bias / sae.scale,
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": "topk",
        "k": sae.k,
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        "normalize_activations": "none",
        "apply_b_dec_to_input": True,
        "metadata": {"hook_name": f"blocks.{sae.layer}.hook_resid_post"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))


def config_in(folder: Path, target: Path, features: dict[str, Any], **cluster: Any) -> str:
    path = folder / "features.yaml"
    experiment = {
        "name": "features",
        "storage": str(folder / "run"),
        "models": {"small": {"path": str(target)}},
        "targets": ["small"],
        "explainers": ["small"],
        "ground_truth": {"features": features},
        "cluster": {"actors": 1, "rows_per_slice": 40, **cluster},
    }
    path.write_text(yaml.safe_dump(experiment))
    return str(path)


def replies(prompt: str, n: int) -> str | int:
    """A describer that says which tokens are marked, a simulator and a detector that look for the word it said, and a
    judge of words."""
    if "Description:" in prompt:
        return 429 if n % 5 == 0 else f"Description: {marked_word(prompt)}"
    if "Predicted: " in prompt:
        said, right = prompt.split("Predicted: ")[1].split("\nExpected: ")
        return "5" if said == right else "1"
    word = prompt.split("responds to: ")[1].split("\n")[0]
    if "numbered tokens" in prompt:
        tokens = [json.loads(line.split(": ", 1)[1]) for line in prompt.splitlines() if line[:1].isdigit()]
        return json.dumps([10 if token.strip() == word else 0 for token in tokens])
    texts = [line.split(". ", 1)[1] for line in prompt.splitlines() if line[:1].isdigit()]
    return json.dumps([int(word in text.split()) for text in texts])


def marked_word(prompt: str) -> str:
    words = [part.split(">>")[0].strip() for part in prompt.split("<<")[1:]]
    words = [word for word in words if word.isalnum()]
    return max(set(words), key=words.count) if words else "and"


def scored_features(saes: Path, corpus: Path, endpoint: Any) -> dict[str, Any]:
    """Features of SAEs, described, simulated and detected by an endpoint that replies as `replies` does."""
    endpoint.script = replies
    model = {"kind": "endpoint", "model": "m", "address": endpoint.address, "timeout": 5}
    return {
        "sae": {"path": str(saes)},
        "corpus": {"path": str(corpus), "windows": 300, "tokens": 16},
        "exemplars": EXEMPLARS,
        "describer": model | {"input_price": 1.0},
        "simulator": model,
        "detector": model,
        "group": "feature",
    }


class Evaluated(NamedTuple):
    arguments: list[str]  # of the jobs
    plan: Plan

    @property
    def unscored(self) -> int:
        """Answers that the judge did not mark."""
        manifest = finished(self.plan.scores(), self.plan.root)
        assert manifest is not None
        return int(manifest.measured["judge"]["unscored"])

    def scores(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """By explainer, control and metric, those over all questions."""
        rows = storage.read_table(f"{self.plan.path(self.plan.scores())}/scores").to_pylist()
        return {(row["explainer"], row["control"], row["metric"]): row for row in rows if row["by"] == "all"}


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatServer]:
    with serving(ChatServer()) as server:
        yield server


@pytest.fixture(scope="module")
def evaluated(
    running_ray: None, chat: ChatServer, world_target: Path, saes: Path, corpus: Path, tmp_path_factory: Any
) -> Iterator[Evaluated]:
    """Scored by a judge that leaves some answers unmarked, after one that was not there at all; and by embeddings."""
    features = scored_features(saes, corpus, chat) | {"gold_from": 0.0}
    config = config_in(tmp_path_factory.mktemp("evaluated"), world_target, features)
    sizes = ["train.epochs=2", "train.batch_size=8", "evaluate.controls=[shuffled]", "evaluate.resamples=200"]
    judge = f"{{model: judge, address: '{chat.address}', key_variable: TEST_JUDGE_KEY, tries: 1}}"
    arguments = ["--config", config, *sizes, f"evaluate.judge={judge}", "evaluate.embedding=some/model"]
    plan = Plan(read_experiment(config, arguments[2:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray_explain.evaluation.embeddings.sentence_encoder", lambda model: letters)
        patch.setenv("TEST_JUDGE_KEY", "secret")
        chat.script = lambda prompt, n: 503 if "Predicted: " in prompt else replies(prompt, n)
        assert evaluate.main(arguments) == 1
        assert finished(plan.scores(), plan.root) is None
        chat.script = lambda prompt, n: 503 if "Predicted: " in prompt and len(prompt) % 3 == 0 else replies(prompt, n)
        assert evaluate.main(arguments) == 0
        yield Evaluated(arguments, plan)


def letters(texts: Sequence[str]) -> np.ndarray:
    """Stands in for a sentence model: how often each text has each letter."""
    return np.array([[text.count(letter) for letter in string.ascii_lowercase] for text in texts], np.float64)


def test_published_saes_become_described_and_scored_features_and_questions(
    evaluated: Evaluated, world_target: Path, saes: Path
) -> None:
    plan = evaluated.plan
    steps = FeaturePlan(plan, "small")
    made = {name: finished(getattr(steps, name)(), plan.root) for name in ("features", "exemplars", "descriptions")}
    assert made["features"].rows == 2 * D_SAE
    assert made["exemplars"].rows + sum(made["exemplars"].dropped.values()) == 2 * D_SAE
    usage = made["descriptions"].measured
    assert 80 < usage["asked"] <= made["exemplars"].rows and usage["failed: 429"] > 0 and usage["cost"] > 0
    effects = storage.read_table(plan.path(plan.effects("features", "small")))
    assert effects.num_rows == made["descriptions"].rows == made["exemplars"].rows > D_SAE
    told = [row[0] for row in effects["descriptions"].to_pylist()]
    scored = [one for one in told if one["score"] is not None]
    assert len(scored) > 20
    assert all(one["score_low"] <= one["score"] <= one["score_high"] and one["score_n"] for one in scored)
    assert sum(one["score"] for one in scored) / len(scored) > 0.3
    assert sum(one["detection"] for one in told if one["detection"] is not None) / len(told) > 0.6
    questions = storage.read_table(plan.path(plan.questions("features", "small")))
    assert set(questions["answer"].to_pylist()) <= {one["description"] for one in told}
    assert {"train", "test"} <= set(questions["split"].to_pylist())
    layer = read_layer(saes, 1)
    row = effects.filter(pc.field("layer") == 1).slice(3, 1).to_pylist()[0]
    torch.testing.assert_close(torch.tensor(row["vectors"][0]), layer[row["feature_id"]])
    one = storage.read_table(plan.path(steps.exemplars()))
    for artifact in (steps.found(), steps.exemplars(), plan.effects("features", "small")):
        storage.remove(plan.path(artifact))
    assert ground_truth.main([*evaluated.arguments, "cluster.actors=4", "cluster.rows_per_slice=7"]) == 0
    assert storage.read_table(plan.path(steps.exemplars())).equals(one), "exemplars depend on the number of actors"
    assert export.main(evaluated.arguments) == 0
    read = ReleasedExemplars(
        f"{plan.root}/released/small/features", AutoTokenizer.from_pretrained(world_target), top=6, random=4
    )
    assert told_by(read.of(effects).table) == told_by(one), "the same windows come back, but for near misses"


def told_by(exemplars: pa.Table) -> dict[str, list[list[Any]]]:
    keys = ("kind", "rank", "tokens", "activations")
    return {
        row["case_id"]: [[one[key] for key in keys] for one in row["windows"] if one["kind"] != "near"]
        for row in exemplars.to_pylist()
    }


def test_explainers_answers_are_simulated_beside_the_gold_descriptions(evaluated: Evaluated) -> None:
    plan, found = evaluated.plan, evaluated.scores()
    questions = storage.read_table(plan.path(plan.questions("features", "small"))).filter(pc.field("split") == "test")
    told = storage.read_table(plan.path(plan.effects("features", "small")))
    own = {(r["case_id"], d["description"]): d for r in told.to_pylist() for d in r["descriptions"]}
    gold = [own[r["case_id"], r["answer"]] for r in questions.to_pylist()]
    simulated = [one["score"] or 0.0 for one in gold if one["score_n"]]
    detected = [one["detection"] for one in gold if one["detection"] is not None]
    for metric, known in (("simulated", simulated), ("detection", detected)):
        ceiling = found["gold descriptions", "none", metric]
        assert ceiling["n"] == len(known) > 5 and ceiling["value"] == pytest.approx(sum(known) / len(known), abs=1e-6)
        assert ceiling["low"] < ceiling["value"] < ceiling["high"]
        for control in ("none", "shuffled"):
            assert -0.5 <= found["small", control, metric]["value"] < ceiling["value"]
            assert found["small", control, metric]["n"] > 5
        assert ("majority", "none", metric) in found
    assert ("small", "none", "correlation") not in found
    compared = storage.read_table(f"{plan.path(plan.scores())}/comparisons")
    assert {"simulated", "detection", "judged", "embedding"} <= set(compared["metric"].to_pylist())
    assert "gold descriptions" not in compared["against"].to_pylist()
    assert report.main(evaluated.arguments) == 0
    for name in ("tables.md", "index.html"):
        page = Path(f"{plan.root}/report/{name}").read_text()
        assert all(words in page for words in ("simulator correlation", "detection", "the ceiling")), name


def test_answers_are_judged_and_compared_by_their_embeddings(evaluated: Evaluated, chat: ChatServer) -> None:
    found = evaluated.scores()
    assert found["gold descriptions", "none", "embedding"]["value"] == pytest.approx(1)
    assert 0 < found["small", "none", "embedding"]["value"] < 1
    assert found["gold descriptions", "none", "judged"]["value"] == 1
    assert found["majority", "none", "judged"]["value"] < 1
    asked = [(body["model"], key) for _, body, key in chat.asked if "Predicted: " in body["messages"][-1]["content"]]
    assert set(asked) == {("judge", "Bearer secret")}


def test_what_a_judge_left_unmarked_is_told_and_asked_for_again(
    evaluated: Evaluated, chat: ChatServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unscored, before = evaluated.unscored, evaluated.scores()
    gold = ("gold descriptions", "none")
    missing = before[(*gold, "exact_match")]["n"] - before[(*gold, "judged")]["n"]
    assert 0 < missing < unscored
    assert report.main(evaluated.arguments) == 0
    for name in ("tables.md", "index.html"):
        page = Path(f"{evaluated.plan.root}/report/{name}").read_text()
        assert f"gave no mark for {unscored:,} of " in page, name
    assert f"{missing} unscored)" in Path(f"{evaluated.plan.root}/report/tables.md").read_text()

    with monkeypatch.context() as patch:
        patch.setattr("ray_explain.endpoints.GIVEN_UP_AFTER", 1)
        capsys.readouterr()
        assert evaluate.main(evaluated.arguments) == 0
        assert "The scores stay as they were: the model 'judge'" in capsys.readouterr().out
    assert evaluated.scores() == before

    chat.script, so_far = replies, len(chat.asked)
    assert evaluate.main(evaluated.arguments) == 0
    assert evaluated.unscored == 0
    after, again = evaluated.scores(), [body["messages"][-1]["content"] for _, body, _ in chat.asked[so_far:]]
    assert len(again) == len(set(again)) > 0 and all(len(prompt) % 3 == 0 for prompt in again)
    assert after[(*gold, "judged")]["n"] == after[(*gold, "exact_match")]["n"]
    assert {key: row for key, row in after.items() if key[2] != "judged"} == {
        key: row for key, row in before.items() if key[2] != "judged"
    }
    assert evaluate.main(evaluated.arguments) == 0
    assert len(chat.asked) == so_far + len(again)


def test_a_vector_is_tried_on_the_corpus_of_its_experiment(
    evaluated: Evaluated, saes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A feature's right descriptions confirm or refute the answer; of another vector it shows the texts."""
    plan = evaluated.plan
    questions = storage.read_table(plan.path(plan.questions("features", "small")))
    effects = storage.read_table(plan.path(plan.effects("features", "small")))
    row = effects.filter(pc.is_in(effects["case_id"], questions["case_id"].combine_chunks())).to_pylist()[-1]
    [question] = questions.filter(pc.equal(questions["case_id"], row["case_id"])).to_pylist()
    capsys.readouterr()
    assert ask([*evaluated.arguments, "--feature", f"{row['layer']}/{row['feature_id']}"]) == 0
    told = capsys.readouterr().out
    assert f"asked        {question['prompt'].splitlines()[0]}" in told  # in the same of the paper's wordings
    assert f"measured     {question['answer']}" in told and (
        "verdict      confirmed" in told or "verdict      refuted" in told
    )
    vector = read_layer(saes, row["layer"])[row["feature_id"]].numpy()
    np.save(tmp_path / "v.npy", vector)
    assert ask([*evaluated.arguments, "--vector", str(tmp_path / "v.npy"), "--layer", str(row["layer"])]) == 0
    again = capsys.readouterr().out
    assert "where the vector is strongest on texts:" in again and "verdict      open: no description" in again

    def responds(text: str) -> list[str]:
        return [line for line in text.splitlines() if "responds to " in line]

    assert responds(told) == responds(again) and len(responds(told)) == 6


def read_layer(saes: Path, layer: int) -> torch.Tensor:
    from ray_explain.features.readers import read_sae

    return read_sae(saes, layer).directions.float()


def test_an_sae_that_does_not_fit_is_one_sentence_and_exit_code_2(
    running_ray: None, world_target: Path, saes: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "saes" / "blocks.0.hook_resid_post"
    wrong.parent.mkdir()
    sae = train_sae(torch.randn(600, 16), d_sae=8, k=2, steps=5, batch_tokens=64, seed=0, layer=0)
    write_sae_lens(wrong, sae)
    features = {
        "layers": [0],
        "sae": {"path": str(wrong.parent)},
        "corpus": {"path": str(corpus), "windows": 20, "tokens": 16},
        "describer": {"kind": "endpoint", "model": "m"},
    }
    config = config_in(tmp_path, world_target, features)
    capsys.readouterr()
    overrides = ["evaluate.controls=[shuffled]"]  # there is no other layer
    assert ground_truth.main(["--config", config, *overrides]) == 2
    told = capsys.readouterr().err
    assert "is 16 wide, the target 32: not its SAE" in told and "Traceback" not in told


@pytest.mark.long
def test_a_neuronpedia_export_gives_the_papers_questions_and_one_off_by_one_is_refused(
    running_ray: None, world_target: Path, saes: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = peaks(world_target, saes, corpus)
    rows = [line(layer, i + off, f"mentions of {word}") for off in (0,) for (layer, i), word in told.items()]
    rows += [line(1, D_SAE + 5, "a feature that is not there"), "garbage"]
    write_export(tmp_path / "right", rows)
    write_export(tmp_path / "shifted", [line(layer, i + 1, f"mentions of {word}") for (layer, i), word in told.items()])
    features = {
        "sae": {"path": str(saes)},
        "corpus": {"path": str(corpus), "windows": 300, "tokens": 16},
        "exemplars": EXEMPLARS,
        "describer": {"kind": "neuronpedia", "path": str(tmp_path / "shifted")},
    }
    config = config_in(tmp_path, world_target, features)
    assert ground_truth.main(["--config", config]) == 2
    assert "the export's ids are off by 1" in capsys.readouterr().err
    assert ground_truth.main(["--config", config, f"ground_truth.features.describer.path={tmp_path}/right"]) == 0
    plan = Plan(read_experiment(config, [f"ground_truth.features.describer.path={tmp_path}/right"]))
    steps = FeaturePlan(plan, "small")
    labels, chosen = steps.labels(), finished(steps.features(), plan.root)
    assert labels is not None and chosen is not None
    imported = finished(labels, plan.root)
    assert imported is not None and imported.dropped == {"not JSON": 1}
    assert chosen.dropped == {"an id that the SAE does not have": 1} and chosen.rows == len(told)
    questions = storage.read_table(plan.path(plan.questions("features", "small")))
    assert all(answer.startswith("mentions of ") for answer in questions["answer"].to_pylist())


def peaks(target_folder: Path, saes: Path, corpus: Path) -> dict[tuple[int, int], str]:
    """Of each feature, the word on which it is highest in the corpus."""
    from ray_explain.features.readers import read_sae

    target = Target({"model": str(target_folder), "dtype": "float32"})
    texts = [json.loads(each)["text"] for each in corpus.read_text().splitlines()]
    read = target.read(texts)
    ids = [read(text).ids for text in texts]
    stream = residuals(target.model, ids, [0, 1])
    tokens = [token for own in ids for token in own[1:]]
    found = {}
    for layer in range(2):
        active = read_sae(saes, layer).encode(torch.cat([own[layer, 1:] for own in stream]))
        for i, at in enumerate(active.argmax(dim=0).tolist()):
            found[layer, i] = str(target.tokenizer.decode([tokens[at]])).strip()
    return found


def line(layer: int, number: int, text: str) -> dict[str, str]:
    return {"layer": f"{layer}-small-res-48", "index": str(number), "description": text, "explanationModelName": "x"}


def write_export(folder: Path, rows: list[Any]) -> None:
    path = folder / "explanations" / "batch-0.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.mark.long
@pytest.mark.parametrize("source", ["activations", "differences"])
def test_whole_vectors_are_described_by_a_local_model(
    running_ray: None, world_target: Path, tmp_path: Path, source: str
) -> None:
    features = {
        "source": source,
        "per_layer": 30,
        "corpus": {"windows": 120, "tokens": 16},
        "exemplars": EXEMPLARS,
        "describer": {"kind": "local", "path": str(world_target)},
        "simulator": {"kind": "simulator", "path": str(world_target)},
    }
    config = config_in(tmp_path, world_target, features)
    assert ground_truth.main(["--config", config]) == 0
    plan = Plan(read_experiment(config))
    steps = FeaturePlan(plan, "small")
    vectors = storage.read_table(plan.path(steps.vectors()))  # type: ignore[arg-type]
    effects = storage.read_table(plan.path(plan.effects("features", "small")))
    own = dict(zip(vectors["case_id"].to_pylist(), vectors["vectors"].to_pylist()))
    assert effects.num_rows >= 5 and set(effects["source"].to_pylist()) == {source.removesuffix("s")}
    for row in effects.to_pylist():
        assert row["vectors"] == own[row["case_id"]]
        assert row["descriptions"][0]["description"]
    manifest = finished(steps.descriptions(), plan.root)
    assert manifest is not None and manifest.rows + sum(manifest.dropped.values()) == vectors.num_rows
    assert export.main(["--config", config]) == 0
    features |= {"source": "released", "path": f"{plan.root}/released/small/features", "vectors": source}
    (tmp_path / "again").mkdir()
    again = config_in(tmp_path / "again", world_target, features | {"per_layer": None})
    assert ground_truth.main(["--config", again]) == 0
    other = Plan(read_experiment(again))
    read = storage.read_table(other.path(other.effects("features", "small")))
    assert sorted(read["vectors"].to_pylist()) == sorted(effects["vectors"].to_pylist())
    assert set(read["source"].to_pylist()) == {source.removesuffix("s")}
    assert finished(FeaturePlan(other, "small").windows(), other.root) is None, "a corpus is read"
