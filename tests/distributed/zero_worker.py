"""Trains explainers with DeepSpeed on the workers of one torchrun, for test_zero. Usage: session folder target question
folders. Session "two" trains `CASES`, leaves checkpoints of `RESUMED` and goes on from others itself; "one" goes on
from them at another ZeRO stage and leaves its own, "again" goes on from those at a third one. "split" trains only
`SPLIT`, on a target that has no markers yet, and tells how many numbers each worker holds before the first step. Each
writes what it saw to <session>.json.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import ray_explain.distributed  # noqa: F401 - sets what DeepSpeed reads
from ray_explain import storage
from ray_explain.config import TrainConfig
from ray_explain.distributed import checkpoints, training_setup, zero
from ray_explain.distributed.checkpoints import load_shares, save_share, state_of
from ray_explain.distributed.training_loop import Taken, train_steps, write_explainer
from ray_explain.distributed.validation import Sample, answers, sample_of, validate
from ray_explain.explainer.module import Outcome
from ray_explain.explainer.sidecar import load_explainer
from ray_explain.explainer.training import NotFinite
from tests.distributed.training_runs import (
    CASES,
    CUT,
    POISONED,
    RESUMED,
    RESUMED_AS_THEY_WERE,
    SPLIT,
    VALIDATED,
    WITHOUT_LOSS,
    later_stage,
    run_of,
)

_config = zero.zero_config


def nothing_stays_whole(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """In models as small as these, ZeRO-3 would otherwise partition nothing."""
    config = _config(*args, **kwargs)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


training_setup.zero_config = nothing_stays_whole
checkpoints._NUMBERS = 2000  # shares of several files


class Place(NamedTuple):
    folder: Path
    target: Path
    questions: tuple[str, ...]

    def run(self, train: TrainConfig, name: str) -> Any:
        return run_of(train, name, self.questions, self.target)

    def sample(self, start: training_setup.Start) -> Sample:
        tables = [storage.read_table(folder) for folder in self.questions]
        markers = start.explainer.markers
        return sample_of(tables, start.tokenizer, markers, n=6, seed=0, max_tokens=100)


def whole_run(name: str, place: Place) -> dict[str, Any]:
    """All steps, with a validation in between, and what the saved explainer is like."""
    run, told = place.run(CASES[name], name), dict[str, Any](losses=[], norms=[])
    start = training_setup.start_of(run, dist.get_world_size())
    engine = training_setup.new_engine(start.explainer, run.train, dist.get_world_size())
    sample, stage = place.sample(start), run.train.zero_stage

    def after(taken: Taken) -> None:
        add(told, taken)
        if taken.number == CUT and name in VALIDATED:
            told["validation"] = validate(engine.module, sample, start.tokenizer, zero_stage=stage)

    train_steps(engine, start.examples, start.steps, run, pad_id=start.pad_id, after=after)
    prompts = [asked.prompt for asked in sample.asked[:3]]  # one worker has less to do than the other
    told["answers"] = answers(engine.module, prompts, start.tokenizer, max_new_tokens=5, zero_stage=stage)
    state = zero.whole_state(engine.module, stage)
    if dist.get_rank() == 0:
        write_explainer(engine.module, run, start.tokenizer, state, str(place.folder / name))
    dist.barrier()
    engine.destroy()
    reloaded, _ = load_explainer(place.folder / name)
    told["reloaded"] = answers(reloaded, prompts, start.tokenizer, max_new_tokens=5, zero_stage=0)
    return told


def part_of_run(name: str, place: Place, *, first: Path | None = None, leave: Path | None = None) -> dict[str, Any]:
    """The steps up to `CUT`, and a checkpoint at `leave`; or those after the checkpoint in `first`."""
    run, told = place.run(CASES[name], name), dict[str, Any](losses=[], norms=[])
    start = training_setup.start_of(run, dist.get_world_size())
    state = state_of(str(first)) if first else None
    engine = training_setup.new_engine(start.explainer, run.train, dist.get_world_size())
    if state:
        load_shares(engine, str(first))

    def after(taken: Taken) -> None:
        add(told, taken)
        if leave and taken.number == CUT:
            raise Enough

    with suppress(Enough):
        first_step = state["step"] if state else 0
        train_steps(engine, start.examples, start.steps, run, pad_id=start.pad_id, first=first_step, after=after)
    if leave:
        with tempfile.TemporaryDirectory() as own:  # as in a training: shares meet where the checkpoint is kept
            save_share(engine, own, {"step": CUT})
            shutil.copytree(own, leave, dirs_exist_ok=True)
        dist.barrier()
    engine.destroy()
    return told


class Enough(Exception):
    """The checkpoint can be made."""


def poisoned_run(name: str, place: Place, poison: Callable[[Any, Callable[[], bool]], None]) -> dict[str, Any]:
    """Three steps, the last of them poisoned: `poison` gets the engine, and what says whether it is time and the worker
    to do it."""
    run, last = place.run(CASES[name], name), 3
    start = training_setup.start_of(run, dist.get_world_size())
    engine = training_setup.new_engine(start.explainer, run.train, dist.get_world_size())
    parameters, before, taken = list(engine.module.parameters()), list[torch.Tensor](), list[int]()

    def own() -> list[torch.Tensor]:
        return [getattr(one, "ds_tensor", one).detach().clone() for one in parameters]

    def after(step: Taken) -> None:
        taken.append(step.number)
        before[:] = own()

    poison(engine, lambda: len(taken) == last - 1 and dist.get_rank() > 0)
    told = "nothing"
    try:
        train_steps(engine, start.examples, start.steps[:last], run, pad_id=start.pad_id, after=after)
    except NotFinite as error:
        told = str(error)
    same = all(torch.equal(*pair) for pair in zip(before, own(), strict=True))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {"told": told, "steps": len(taken), "weights are as before": same})
    engine.destroy()
    ids = [[start.examples[i].question_id for i in part] for part in start.steps[last - 1]]
    return {"workers": everyone, "questions": ids}


def poisoned_gradient(value: float) -> Callable[[Any, Callable[[], bool]], None]:
    """One number of one parameter's gradient becomes `value`; the losses stay finite."""

    def poison(engine: Any, now: Callable[[], bool]) -> None:
        def changed(gradient: torch.Tensor) -> torch.Tensor:
            if not now():
                return gradient
            gradient = gradient.clone()
            gradient.view(-1)[-1] = value
            return gradient

        next(one for one in reversed(list(engine.module.parameters())) if one.requires_grad).register_hook(changed)

    return poison


def poisoned_loss(engine: Any, now: Callable[[], bool]) -> None:
    """The loss becomes NaN."""

    def changed(module: torch.nn.Module, inputs: Any, outcome: Outcome) -> Outcome:
        return outcome._replace(loss=outcome.loss * torch.nan) if now() else outcome

    engine.module.register_forward_hook(changed)


def add(told: dict[str, Any], taken: Taken) -> None:
    dist.all_reduce(taken.sums)
    told["losses"].append((taken.sums[0] / taken.sums[2]).item())
    told["norms"].append(taken.gradient_norm)


def held_at_start(name: str, place: Place) -> list[list[int]]:
    """Of each worker: numbers in the model once it was loaded, and how many the whole model has."""
    model = training_setup.start_of(place.run(CASES[name], name), dist.get_world_size()).explainer.language_model
    own = [getattr(one, "ds_tensor", one).numel() for one in model.parameters()]
    whole = [getattr(one, "ds_numel", one.numel()) for one in model.parameters()]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, [sum(own), sum(whole)])
    return told


def main(session: str, place: Place) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    of_two, of_one = ({name: place.folder / f"{name}-{n}" for name in RESUMED} for n in (2, 1))
    if session == "split":
        told = {name: whole_run(name, place) | {"held": held_at_start(name, place)} for name in SPLIT}
    elif session == "two":
        told = {name: whole_run(name, place) for name in CASES}
        for name in {**dict.fromkeys(RESUMED), **dict.fromkeys(RESUMED_AS_THEY_WERE)}:
            part_of_run(name, place, leave=place.folder / f"{name}-2")
        told["resumed"] = {
            name: part_of_run(name, place, first=place.folder / f"{name}-2") for name in RESUMED_AS_THEY_WERE
        }
        told["poisoned"] = {
            name: poisoned_run(name, place, poisoned_gradient(float(value))) for name, value in POISONED.items()
        }
        told["without loss"] = {name: poisoned_run(name, place, poisoned_loss) for name in WITHOUT_LOSS}
    elif session == "one":
        told = {name: part_of_run(later_stage(name, 1), place, first=of_two[name]) for name in RESUMED}
        for name in RESUMED:
            part_of_run(later_stage(name, 1), place, leave=of_one[name])
    else:
        told = {name: part_of_run(later_stage(name, 3), place, first=of_one[name]) for name in RESUMED}
    if dist.get_rank() == 0:
        (place.folder / f"{session}.json").write_text(json.dumps(told))
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], Place(Path(sys.argv[2]), Path(sys.argv[3]), tuple(sys.argv[4:])))
