"""Questions to train on, about a random target."""

from pathlib import Path

import pytest

from ray_explain import storage
from ray_explain.ground_truth.ablation import AblationStage
from ray_explain.ground_truth.patching import PatchingStage
from ray_explain.ground_truth.world_cases import ablation_cases, patching_cases
from ray_explain.questions.ablation import ablation_questions
from ray_explain.questions.patching import patching_questions
from ray_explain.world.facts import World
from ray_explain.world.tokenizer import world_tokenizer


@pytest.fixture(scope="session")
def questions(world_target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Directories of 64 questions about patching and 32 about ablation, and 16 and 8 of the validation split."""
    folder, world = tmp_path_factory.mktemp("questions"), World()
    tokenizer = world_tokenizer(world)
    config = {"model": str(world_target), "revision": None, "dtype": "float32"}
    effects = PatchingStage(config)(
        patching_cases(world, tokenizer, n={"train": 64, "validation": 16}, layers=[(0, 0), (1, 1)], seed=0)
    )
    asked = patching_questions(
        effects.table, lambda text: [tokenizer.decode([t]) for t in tokenizer.encode(text)], wording="brief", seed=0
    )
    storage.write_table(asked.table, f"{folder}/patching/table.parquet")
    ablated = AblationStage(config)(ablation_cases(world, n={"train": 32, "validation": 8}, seed=0))
    asked = ablation_questions(ablated.table, d_model=32, wording="brief", seed=0)
    storage.write_table(asked.table, f"{folder}/ablation/table.parquet")
    return f"{folder}/patching", f"{folder}/ablation"
