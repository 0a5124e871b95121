"""Ridge maps of an experiment, and a training that starts from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_explain import records
from ray_explain.artifacts import finished
from ray_explain.config import Experiment
from ray_explain.distributed.explainers import align, train_run
from ray_explain.distributed.plan import Plan, Run
from ray_explain.distributed.session import Session
from ray_explain.distributed.training_setup import start_of
from ray_explain.errors import BadInput
from ray_explain.explainer.training import PlainTraining, train_plain
from ray_explain.interventions.extraction import residuals
from ray_explain.models import load_model
from ray_explain.questions.features import features_questions

pytestmark = pytest.mark.ray
WORDS = ("cities", "persons", "years", "rivers")


@pytest.fixture
def session(world_target: Path, tmp_path: Path) -> Session:
    return Session(Plan(experiment(world_target, tmp_path)))


def experiment(target: Path, folder: Path, **corpus: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "mapped",
            "storage": str(folder / "run"),
            "models": {"m": {"path": str(target)}},
            "targets": ["m"],
            "explainers": ["m"],
            "ground_truth": {"wording": "brief", "features": {"layers": [0, 1], "corpus": corpus}},
            "train": {"max_tokens": 50, "injection": {"projection": "ridge", "scale": "mean_embedding"}},
        }
    )


def ask(session: Session, target: Path) -> Run:
    """Questions about 40 directions, which mean one of `WORDS`; the run that is trained on them."""
    rng, names = np.random.default_rng(0), [f"f{i}" for i in range(40)]
    kinds = rng.standard_normal((len(WORDS), 32))
    vectors = [(kinds[[i % 4]] + 0.1 * rng.standard_normal((1, 32))).astype(np.float32) for i in range(40)]
    columns = {
        **{"case_id": names, "group": names, "split": ["train"] * 40, "source": ["sae"] * 40},
        "layer": pa.array([i % 2 for i in range(40)], pa.int32()),
        "feature_id": pa.array(range(40), pa.int32()),
        "vectors": records.vectors_array(vectors, 32),
    }
    features = records.conform(pa.table(columns), records.features(32))
    told = [
        {"case_id": name, "description": WORDS[i % 4], "score": None, "gold": True, "origin": "test"}
        for i, name in enumerate(names)
    ]
    described = records.rows_table(told, records.DESCRIPTIONS)
    [run] = session.plan.runs()
    questions = session.plan.questions("features", "m")
    session.make_table(questions, lambda: features_questions(features, described, wording="brief", seed=0))
    return run


def test_maps_for_features_are_fitted_on_the_corpus_and_trainings_start_from_them(
    running_ray: None, session: Session, world_target: Path
) -> None:
    run = ask(session, world_target)
    align(session, [run])
    maps = session.plan.alignment(run)
    assert maps is not None
    manifest = finished(maps, session.plan.root)
    assert manifest is not None and manifest.measured["pairs"] > 10_000
    assert all(share > 0.99 for share in manifest.measured["explained"].values())  # the model is its own target
    start = start_of(train_run(session, run), workers=1)
    weight = start.explainer.projection.weight.detach().clone()
    loaded = load_model(str(world_target))
    [own] = residuals(loaded.model, [loaded.tokenizer("was born in")["input_ids"]], [0, 1])
    for row in range(2):
        mapped = own[row] @ weight[row].T
        assert (mapped - own[row]).norm() < 0.1 * own[row].norm()
    plain = PlainTraining(epochs=10, batch_size=8, learning_rate=3e-3)
    losses = train_plain(start.explainer, start.examples, plain, pad_id=start.pad_id)
    assert losses[-1] < losses[0] - 1
    assert (start.explainer.projection.weight != weight).any()


def test_too_small_a_corpus_is_told_with_the_way_out(running_ray: None, world_target: Path, tmp_path: Path) -> None:
    small = Session(Plan(experiment(world_target, tmp_path, windows=2, tokens=8)))
    run = ask(small, world_target)
    with pytest.raises(BadInput, match=r"too few; give a larger `ground_truth.features.corpus`, or use a linear one"):
        align(small, [run])
