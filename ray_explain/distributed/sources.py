"""Where ground truth comes from: the cases that are tried on a target, and released data sets."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from ray_explain import storage
from ray_explain.config import FeaturesConfig, Task
from ray_explain.distributed.feature_plan import released_folder
from ray_explain.distributed.models import d_model, n_layers, tokenizer_of
from ray_explain.distributed.plan import Plan
from ray_explain.errors import BadInput
from ray_explain.ground_truth import cases
from ray_explain.ground_truth.dictionaries import SOURCES
from ray_explain.ground_truth.features import layers_table
from ray_explain.ground_truth.pairs import Change, layer_blocks
from ray_explain.ground_truth.released_files import read_feature_folder, read_folder
from ray_explain.stages import READ, Result, check_dropped
from ray_explain.world.facts import World


def released_effects(plan: Plan, task: Task, target: str) -> Iterator[Result]:
    """The effects of a released data set, part by part.

    Raises:
        BadInput: there is no folder, or none of the target is in it.
        JobFailed: too much of it cannot be used.
    """
    section, place = getattr(plan.experiment.ground_truth, task), plan.released_folder(task, target)
    if not os.path.isdir(place):
        on_disk = "; released data are read from this machine's disk, not from S3" if storage.is_remote(place) else ""
        raise BadInput(f"`ground_truth.{task}.path`: there is no folder {storage.absolute(place)}{on_disk}")
    if task == "features":
        yield from released_features(plan, target, section, feature_layers(plan, target))
        return
    width, n = d_model(plan, target), section.cases.model_dump()
    parts = read_folder(place, task, tokenizer_of(plan, target), d_model=width, n=n)
    yield from _checked_rows(plan, task, place, parts)


def released_features(
    plan: Plan, target: str, section: FeaturesConfig, layers: Sequence[int], *, unlabelled: bool = False
) -> Iterator[Result]:
    """The features of a section's released data set with their labels; those without any only if `unlabelled`.

    Raises:
        BadInput, JobFailed: as `released_effects`.
    """
    folder = released_folder(section, target)
    parts = read_feature_folder(
        folder,
        layers,
        d_model=d_model(plan, target),
        per_layer=section.per_layer,
        seed=plan.experiment.seed,
        vectors=SOURCES[section.vectors] if section.vectors else None,
        unlabelled=unlabelled,
    )
    yield from _checked_rows(plan, "features", folder, parts)


def _checked_rows(plan: Plan, task: Task, folder: str, parts: Iterator[Result]) -> Iterator[Result]:
    try:
        yield from checked(parts, f"`ground_truth.{task}`: rows in {folder}", plan.experiment.cluster.max_dropped)
    except (ValueError, OSError) as error:
        raise BadInput(f"`ground_truth.{task}`: {error}") from error


def checked(parts: Iterable[Result], what: str, max_dropped: float) -> Iterator[Result]:
    """The parts of what was read, up to the one with which too much of it is dropped.

    Raises:
        JobFailed: more than a share `max_dropped`, what is left out by design not counted; the first are shown.
    """
    faults: list[tuple[str, str]] = []
    for made in parts:
        faults += [one for one in made.dropped if one[1] not in cases.BY_DESIGN]
        if faults:
            check_dropped(what, faults, made.measured[READ], max_dropped)
        yield made


def feature_layers(plan: Plan, target: str) -> list[int]:
    """The layers whose features are asked for."""
    layers = plan.experiment.ground_truth.features.layers  # type: ignore[union-attr]
    return list(range(n_layers(plan, target))) if layers == "all" else layers


def cases_of(plan: Plan, task: Task, target: str) -> pa.Table | Result:
    """What will be tried on the target.

    Raises:
        BadInput: the file of the cases cannot be read, or they do not fit the model or the world.
        JobFailed: too much of it cannot be used.
    """
    try:
        if task == "features":
            return layers_table(feature_layers(plan, target))
        made = _ablation_cases(plan, target) if task == "ablation" else _patching_cases(plan, target)
    except (ValueError, FileNotFoundError) as error:
        raise BadInput(f"`ground_truth.{task}`: {error}") from error
    section = getattr(plan.experiment.ground_truth, task)
    (made,) = checked([made], f"`ground_truth.{task}`: lines in {section.path}", plan.experiment.cluster.max_dropped)
    check_splits(plan, f"`ground_truth.{task}`", made)
    return made


def _patching_cases(plan: Plan, target: str) -> Result:
    section = plan.experiment.ground_truth.patching
    assert section is not None
    blocks = layer_blocks(n_layers(plan, target), section.blocks) if isinstance(section.blocks, int) else section.blocks
    return cases.patching_cases(
        _source(plan, section.path),
        tokenizer_of(plan, target),
        format="counterfact" if section.source == "counterfact" else "jsonl",
        form=section.form,
        n=section.cases.model_dump(),
        blocks=blocks,
        seed=plan.experiment.seed,
        change=Change(section.site, section.kind),
    )


def _ablation_cases(plan: Plan, target: str) -> Result:
    section = plan.experiment.ground_truth.ablation
    assert section is not None
    return cases.ablation_cases(
        _source(plan, section.path),
        tokenizer_of(plan, target),
        format="mmlu" if section.source == "mmlu" else "jsonl",
        form=section.form,
        hint=section.hint,
        n=section.cases.model_dump(),
        seed=plan.experiment.seed,
    )


def _source(plan: Plan, path: str | None) -> World | str:
    return plan.experiment.world.world() if path is None else path


def check_splits(plan: Plan, what: str, made: Result) -> None:
    """Raises: BadInput: the training split or the one to be evaluated is empty."""
    check_found(plan, what, set(made.table.column("split").to_pylist()), made.dropped)


def check_found(plan: Plan, what: str, splits: set[str], dropped: Sequence[tuple[str, str]]) -> None:
    """As `check_splits`, of the splits that were found."""
    for split in ("train", plan.experiment.evaluate.split):
        if split not in splits:
            reasons = Counter(reason for _, reason in dropped).most_common(3)
            why = f" ({', '.join(f'{count} dropped: {reason}' for reason, count in reasons)})" if reasons else ""
            way_out = "give more cases, or lines with this `split` or with groups of their own"
            raise BadInput(f"{what}: split {split!r} is empty{why}; {way_out}")
