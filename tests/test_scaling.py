"""The tables of docs/scaling.md are those of its formulas and of the figures beside it."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "tests" / "benchmarks" / "scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_the_tables_of_its_figures(scaling: ModuleType) -> None:
    text = scaling.PAGE.read_text()
    assert scaling.page(text, json.loads(scaling.INPUTS.read_text())) == text


def test_work_of_whole_slices_is_not_shared_by_more_gpus_than_slices(scaling: ModuleType) -> None:
    given = json.loads(scaling.INPUTS.read_text())
    layers, training = (scaling.Work("", 1e18, slices, 0) for slices in (32, 0))
    assert scaling.hours(layers, 32, given) == scaling.hours(layers, 64, given) < scaling.hours(layers, 16, given)
    assert scaling.hours(layers, 33, given) == scaling.hours(layers, 32, given)
    assert scaling.hours(training, 64, given) < scaling.hours(training, 32, given)


def test_the_model_foretells_actors_that_share_two_cores(scaling: ModuleType) -> None:
    seconds = {1: 10.0 + 60, 2: 10.0 + 30, 4: 2 * 10.0 + 30, 6: 3 * 10.0 + 30}
    assert scaling.predicted(seconds, cores=2) == pytest.approx(seconds)
    assert scaling.predicted({1: 70.0, 2: 40.0, 4: 25.0}, cores=4) == pytest.approx({1: 70.0, 2: 40.0, 4: 25.0})
