"""What a training starts from."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from ray_explain import storage
from ray_explain.config import TrainConfig
from ray_explain.distributed.training_setup import micro_batches, new_explainer, start_of
from ray_explain.explainer.batches import collate
from ray_explain.explainer.examples import Example
from tests.distributed.training_runs import run_of
from tests.explainer.conftest import MARKERS, tiny_model


@pytest.mark.parametrize("projection", ["identity", "linear", "ridge"])
@pytest.mark.parametrize("width", [20, 32])
def test_questions_without_vectors_are_learned_by_an_explainer_of_any_width(projection: str, width: int) -> None:
    """An ablation's target may be wider or narrower than its explainer, of 32: no vector has to be mapped."""
    train = TrainConfig.model_validate({"injection": {"projection": projection}})
    run = SimpleNamespace(train=train, seed=0, alignment=None)
    examples = [Example([5, 6, 7, 8], 2, np.empty((0, width), np.float32), (), f"q{i}", "ablation") for i in range(3)]
    explainer = new_explainer(run, tiny_model("llama"), MARKERS, examples, [])  # type: ignore[arg-type]
    outcome = explainer(collate(examples, 0))
    outcome.loss.backward()
    assert outcome.n_tokens == 6 and outcome.loss.isfinite()


@pytest.mark.parametrize(
    ("batch_size", "workers", "micro_batch_size", "passes"),
    [(15, 8, 1, 16), (15, 8, None, 8), (15, 8, 2, 8), (32, 1, 1, 32), (32, 1, 5, 7), (4, 8, 1, 8), (100, 3, 10, 12)],
)
def test_no_pass_holds_more_questions_than_allowed(
    batch_size: int, workers: int, micro_batch_size: int | None, passes: int
) -> None:
    train = TrainConfig(batch_size=batch_size, micro_batch_size=micro_batch_size)
    assert micro_batches(train, workers) == passes
    assert passes % workers == 0
    assert -(-batch_size // passes) <= (micro_batch_size or batch_size)


def test_a_projection_knows_layers_that_are_asked_about_but_not_in_the_training_questions(
    questions: tuple[str, str], world_target: Path, tmp_path: Path
) -> None:
    """As where a small share of the training data happens to have none of a layer's features."""
    table = storage.read_table(questions[0])
    rows = [row | {"layers": [2]} if row["split"] == "validation" else row for row in table.to_pylist()]
    storage.write_table(pa.Table.from_pylist(rows, schema=table.schema), f"{tmp_path}/table.parquet")
    train = TrainConfig.model_validate({"injection": {"projection": "linear"}, "max_tokens": 100})
    start = start_of(run_of(train, "shares", (str(tmp_path),), world_target), workers=1)
    assert {layer for example in start.examples for layer in example.layers} == {0, 1}
    assert start.explainer.projection.layers == (0, 1, 2)
