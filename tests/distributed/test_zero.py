"""DeepSpeed on two workers, every stage, gives what plain PyTorch gives in one process; and other numbers of workers go
on from its checkpoints."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ray_explain.distributed.checkpoints import state_of
from tests.distributed.training_runs import CASES, CUT, RESUMED, plain_losses, run_of

pytestmark = pytest.mark.ray
EXACT = [name for name in CASES if "bfloat16" not in name]


def torchrun(workers: int, session: str, *arguments: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    worker = Path(__file__).with_name("zero_worker.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    done = subprocess.run(
        [*command, str(worker), session, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((Path(arguments[0]) / f"{session}.json").read_text())


@pytest.fixture(scope="module")
def place(
    questions: tuple[str, str], world_target: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, str, str]:
    return tmp_path_factory.mktemp("zero"), world_target, *questions


@pytest.fixture(scope="module")
def two(place: tuple[Path, Path, str, str]) -> dict[str, Any]:
    return torchrun(2, "two", *place)


@pytest.fixture(scope="module")
def plain(questions: tuple[str, str], world_target: Path) -> Any:
    """Losses of the same training in one process; what only says how it is done is left out."""
    same = {"zero_stage": 2, "micro_batch_size": None, "offload": False, "gradient_checkpointing": False}

    @cache
    def losses(key: str) -> list[float]:
        train = CASES[key].model_copy(update=same)
        return plain_losses(run_of(train, key, questions, world_target))

    names = {name: train.model_copy(update=same) for name, train in CASES.items()}
    return lambda name: losses(next(other for other in CASES if names[other] == names[name]))


@pytest.mark.parametrize("name", EXACT)
def test_two_workers_learn_as_plain_adamw_in_one_process(name: str, two: dict[str, Any], plain: Any) -> None:
    found = two[name]["losses"]
    assert len(found) == 26
    assert found == pytest.approx(plain(name), abs=1e-4)
    assert found[-1] < found[0] - 0.2


@pytest.mark.parametrize("name", sorted(set(CASES) - set(EXACT)))
def test_bfloat16_stays_near(name: str, two: dict[str, Any]) -> None:
    assert two[name]["losses"] == pytest.approx(two["zero-2"]["losses"], abs=0.1)


def test_norms_of_gradients_are_those_of_the_whole_step(two: dict[str, Any]) -> None:
    for stage in (1, 2, 3):
        assert two[f"zero-{stage}"]["norms"] == pytest.approx(two["zero-0"]["norms"], rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_explainer_is_whole_and_answers_as_before(
    name: str, two: dict[str, Any], place: tuple[Path, Path, str, str]
) -> None:
    folder = place[0] / name
    for file in folder.glob("*.safetensors"):
        assert all(tensor.numel() for tensor in load_file(file).values())
    near = 0.05 if "bfloat16" in name else 1e-3
    for before, after in zip(two[name]["answers"], two[name]["reloaded"], strict=True):
        assert after == [before[0], pytest.approx(before[1], abs=near), before[2]]
    if "lora" in name:
        model = AutoModelForCausalLM.from_pretrained(place[1])
        peft.PeftModel.from_pretrained(model, folder)
    else:
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def one(two: dict[str, Any], place: tuple[Path, Path, str, str]) -> dict[str, Any]:
    return torchrun(1, "one", *place)


@pytest.fixture(scope="module")
def again(one: dict[str, Any], place: tuple[Path, Path, str, str]) -> dict[str, Any]:
    return torchrun(2, "again", *place)


@pytest.mark.parametrize("name", RESUMED)
def test_other_numbers_of_workers_go_on_from_a_checkpoint(
    name: str, two: dict[str, Any], one: dict[str, Any], again: dict[str, Any]
) -> None:
    assert one[name]["losses"] == pytest.approx(two[name]["losses"][CUT:], abs=1e-4)
    assert again[name]["losses"] == pytest.approx(two[name]["losses"][CUT:], abs=1e-4)


def test_a_checkpoint_that_was_cut_is_known_as_such(two: dict[str, Any], place: tuple[Path, Path, str, str]) -> None:
    folder = place[0] / "zero-2-2"
    assert state_of(str(folder)) == {"step": CUT, "workers": 2}
    share = next(folder.glob("engine/*optim_states.pt"))
    whole = share.read_bytes()
    share.write_bytes(whole[:-1])
    assert state_of(str(folder)) is None
    share.unlink()
    assert state_of(str(folder)) is None
    share.write_bytes(whole)
    (folder / "share-1.json").unlink()
    assert state_of(str(folder)) is None
