import pytest

from ray_explain.world.facts import World
from ray_explain.world.tokenizer import world_tokenizer


@pytest.fixture(scope="session")
def world():
    return World(seed=3, persons=24, strangers=12, cities=12, companies=8, countries=4)


@pytest.fixture(scope="session")
def tokenizer(world):
    return world_tokenizer(world)
