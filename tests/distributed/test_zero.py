"""DeepSpeed on two workers, every stage, gives what plain PyTorch gives in one process; and other numbers of workers at
other stages go on from its checkpoints."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ray_explain.distributed.checkpoints import state_of
from ray_explain.explainer.markers import markers_of
from tests.distributed.training_runs import (
    CASES,
    CUT,
    POISONED,
    RESUMED,
    RESUMED_AS_THEY_WERE,
    SPLIT,
    WITHOUT_LOSS,
    plain_losses,
    run_of,
)

pytestmark = pytest.mark.ray
NEAR = [name for name in CASES if "bfloat16" in name]
EXACT = [name for name in CASES if name not in NEAR and "dropout" not in name]


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
    """Losses of the same training in one process in float32; what only says how it is done is left out."""
    same = {
        "zero_stage": 2,
        "micro_batch_size": None,
        "offload": False,
        "gradient_checkpointing": False,
        "precision": "float32",
    }

    @cache
    def losses(key: str) -> list[float]:
        train = CASES[key].model_copy(update=same)
        return plain_losses(run_of(train, key, questions, world_target))

    names = {name: train.model_copy(update=same) for name, train in CASES.items()}
    return lambda name: losses(next(other for other in CASES if names[other] == names[name]))


@pytest.mark.parametrize("name", EXACT)
def test_two_workers_learn_as_plain_adamw_in_one_process(name: str, two: dict[str, Any], plain: Any) -> None:
    found = two[name]["losses"]
    assert len(found) == (24 if "short-steps" in name else 26)
    assert found == pytest.approx(plain(name), abs=1e-4)
    assert found[-1] < found[0] - 0.2


@pytest.mark.parametrize("name", NEAR)
def test_bfloat16_stays_near_plain_float32(name: str, two: dict[str, Any], plain: Any) -> None:
    assert two[name]["losses"] == pytest.approx(plain(name), abs=0.01)


def test_norms_of_gradients_are_those_of_the_whole_step(two: dict[str, Any]) -> None:
    for stage in (1, 2, 3):
        assert two[f"zero-{stage}"]["norms"] == pytest.approx(two["zero-0"]["norms"], rel=1e-3)


@pytest.mark.parametrize("name", POISONED)
def test_a_gradient_that_is_not_finite_stops_all_workers_before_a_weight_is_touched(
    name: str, two: dict[str, Any]
) -> None:
    found = two["poisoned"][name]
    of_step = ", ".join(question for part in found["questions"] for question in part)
    for worker in found["workers"]:
        assert worker["steps"] == 2 and worker["weights are as before"]
        assert worker["told"].startswith("the gradient's norm is ")
        assert f"on questions {of_step}: lower" in worker["told"]


@pytest.mark.parametrize("name", WITHOUT_LOSS)
def test_a_loss_that_is_no_number_on_one_worker_stops_all_with_its_questions(name: str, two: dict[str, Any]) -> None:
    found = two["without loss"][name]
    for worker in found["workers"]:
        assert worker["steps"] == 2 and worker["weights are as before"]
        assert worker["told"].startswith(f"the loss is nan on questions {', '.join(found['questions'][1])}: lower")


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


@pytest.mark.parametrize("name", RESUMED_AS_THEY_WERE)
def test_a_training_that_was_cut_ends_as_one_that_was_not(name: str, two: dict[str, Any]) -> None:
    assert two["resumed"][name]["losses"] == pytest.approx(two[name]["losses"][CUT:], abs=1e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_other_numbers_of_workers_at_other_stages_go_on_from_a_checkpoint(
    name: str, two: dict[str, Any], one: dict[str, Any], again: dict[str, Any]
) -> None:
    near = 0.01 if name in NEAR else 1e-4
    for later in (one, again):
        assert later[name]["losses"] == pytest.approx(two[name]["losses"][CUT:], abs=near)


def test_a_checkpoint_that_was_cut_is_known_as_such(two: dict[str, Any], place: tuple[Path, Path, str, str]) -> None:
    folder = place[0] / "zero-2-2"
    state = state_of(str(folder))
    assert state is not None and (state["step"], state["workers"]) == (CUT, 2)
    share = folder / "share-1-0.safetensors"
    whole = share.read_bytes()
    share.write_bytes(whole[:-1])
    assert state_of(str(folder)) is None
    share.unlink()
    assert state_of(str(folder)) is None
    share.write_bytes(whole)
    (folder / "share-1.json").unlink()
    assert state_of(str(folder)) is None


def test_checkpoints_are_safetensors_and_json(two: dict[str, Any], place: tuple[Path, Path, str, str]) -> None:
    for name in RESUMED:
        files = [path for path in (place[0] / f"{name}-2").rglob("*") if path.is_file()]
        assert {path.suffix for path in files} == {".safetensors", ".json"}


@pytest.fixture(
    scope="module", params=[pytest.param(True, id="tied"), pytest.param(False, id="untied", marks=pytest.mark.long)]
)
def without_markers(
    request: pytest.FixtureRequest, world_target: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A target whose tokenizer knows no markers: its tables get new rows."""
    folder = tmp_path_factory.mktemp("bare")
    AutoTokenizer.from_pretrained(world_target).save_pretrained(folder)
    text = (folder / "tokenizer.json").read_text()
    for marker in markers_of(AutoTokenizer.from_pretrained(world_target)).texts:
        text = text.replace(marker, marker.replace("vector", "nothing"))
    (folder / "tokenizer.json").write_text(text)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            (folder / name).write_text((folder / name).read_text().replace("vector", "nothing"))
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(world_target)
    config.vocab_size = len(AutoTokenizer.from_pretrained(folder))
    config.tie_word_embeddings = request.param
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert markers_of(AutoTokenizer.from_pretrained(folder)).added
    return folder


def test_zero_3_splits_a_model_while_it_loads_also_one_whose_tables_get_new_rows(
    without_markers: Path, questions: tuple[str, str], tmp_path: Path
) -> None:
    found = torchrun(2, "split", tmp_path, without_markers, *questions)
    for name in SPLIT:
        train = CASES[name].model_copy(update={"zero_stage": 2})
        expected = plain_losses(run_of(train, name, questions, without_markers))
        assert found[name]["losses"] == pytest.approx(expected, abs=1e-4)
        new_tables = 2 * 32 * len(AutoTokenizer.from_pretrained(without_markers))  # whole until the engine takes them
        for own, whole in found[name]["held"]:
            assert own < whole / 2 + new_tables + 1000
