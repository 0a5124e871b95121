"""What an experiment consists of, known before anything is made."""

from pathlib import Path

import pytest
import yaml

from ray_explain.config import read_experiment
from ray_explain.distributed.plan import Plan
from tests.test_config import SMALL


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "storage": str(tmp_path / "run")}))
    return str(path)


def test_every_explainer_is_trained_on_every_fraction_the_whole_first(config: str) -> None:
    runs = Plan(read_experiment(config, ["fractions=[0.1, 1.0]", "seeds=[0, 1]"])).runs()
    assert len(runs) == 2 * 2 * 2 * 2 * 2  # explainers, targets, mixtures, seeds, fractions
    of_one = [run.fraction for run in runs if run.name.startswith("llama-of-llama-patching-s0")]
    assert of_one == [1.0, 0.1]
    assert len({run.name for run in runs}) == len(runs)


def test_a_fraction_makes_its_own_explainers_and_leaves_the_others_and_the_questions(config: str) -> None:
    whole, parts = (Plan(read_experiment(config, [f"fractions={f}"])) for f in ("[1.0]", "[0.5, 1.0]"))
    assert [whole.explainer(run) for run in whole.runs()] == [
        parts.explainer(run) for run in parts.runs() if run.fraction == 1
    ]
    half = [parts.explainer(run) for run in parts.runs() if run.fraction == 0.5]
    assert not set(half) & set(map(whole.explainer, whole.runs()))
    assert whole.questions("patching", "llama") == parts.questions("patching", "llama")
    assert whole.scores() != parts.scores()
