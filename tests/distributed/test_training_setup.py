"""What a training starts from."""

from types import SimpleNamespace

import numpy as np
import pytest

from ray_explain.config import TrainConfig
from ray_explain.distributed.training_setup import new_explainer
from ray_explain.explainer.batches import collate
from ray_explain.explainer.examples import Example
from tests.explainer.conftest import MARKERS, tiny_model


@pytest.mark.parametrize("projection", ["identity", "linear", "ridge"])
@pytest.mark.parametrize("width", [20, 32])
def test_questions_without_vectors_are_learned_by_an_explainer_of_any_width(projection: str, width: int) -> None:
    """An ablation's target may be wider or narrower than its explainer, of 32: no vector has to be mapped."""
    train = TrainConfig.model_validate({"injection": {"projection": projection}})
    run = SimpleNamespace(train=train, seed=0, alignment=None)
    examples = [Example([5, 6, 7, 8], 2, np.empty((0, width), np.float32), (), f"q{i}", "ablation") for i in range(3)]
    explainer = new_explainer(run, tiny_model("llama"), MARKERS, examples)  # type: ignore[arg-type]
    outcome = explainer(collate(examples, 0))
    outcome.loss.backward()
    assert outcome.n_tokens == 6 and outcome.loss.isfinite()
