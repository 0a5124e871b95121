"""An experiment that the pipeline has run."""

import pytest

from jobs import pipeline
from tests.tiny import config_in


@pytest.fixture(scope="session")
def config(running_ray: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its config; nothing disturbed it, and its storage is a folder."""
    path = config_in(tmp_path_factory.mktemp("tiny"))
    assert pipeline.main(["--config", path]) == 0
    return path
