"""The models of an experiment: made where they are to be, read and checked where they lie elsewhere."""

import os
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ray_explain import storage
from ray_explain.artifacts import finished
from ray_explain.config import LocalConfig
from ray_explain.distributed.plan import Plan
from ray_explain.distributed.session import Session
from ray_explain.errors import BadInput
from ray_explain.explainer.examples import check_end
from ray_explain.models import check_folder


def make_models(session: Session) -> None:
    """The small targets of the experiment, trained; models that lie elsewhere are looked at.

    Raises:
        BadInput: a model cannot be read, or does not have a layer that is asked for.
    """
    plan = session.plan
    for name in plan.model_names:
        if plan.experiment.models[name].pretrain is None:
            try:
                plan.experiment.check_layers(name, n_layers(plan, name))
            except ValueError as error:
                raise BadInput(str(error)) from error
    missing = session.missing([model for model in map(plan.model, plan.model_names) if model.kind == "models"])
    if missing:
        from ray_explain.distributed.pretrain import pretrain_all

        session.say(f"Targets: training {', '.join(model.label for model in missing)}")
        session.start_ray()
        pretrain_all(missing, plan.root)


def check_explainers(session: Session) -> None:
    """Raises: BadInput: the tokenizer of an explainer that is still to be trained cannot end an answer."""
    plan = session.plan
    missing = {run.explainer for run in plan.runs() if session.missing([plan.explainer(run)])}
    for name in sorted(missing):
        if plan.experiment.models[name].pretrain is None:
            try:
                check_end(tokenizer_of(plan, name))
            except BadInput as error:
                raise BadInput(f"`models.{name}`: {error}") from error


def check_describers(session: Session) -> None:
    """Raises: BadInput: a model that is still to describe features, or to score descriptions, cannot be read. The
    actors would find out after the corpus has been searched."""
    plan = session.plan
    for key in ("describer", "simulator", "detector"):
        section = getattr(plan.experiment.ground_truth.features, key, None)
        if isinstance(section, LocalConfig) and session.missing(
            [plan.effects("features", target) for target in plan.experiment.targets]
        ):
            _config_at(f"ground_truth.features.{key}.path", section.path, section.revision)


def n_layers(plan: Plan, name: str) -> int:
    """Layers of a model of the experiment; for one that lies elsewhere, from its config.

    Raises:
        BadInput: there is no model.
    """
    pretrain = plan.experiment.models[name].pretrain
    return pretrain.n_layers if pretrain else model_config(plan, name).get_text_config().num_hidden_layers


def d_model(plan: Plan, name: str) -> int:
    """Width of a model of the experiment.

    Raises:
        BadInput: there is no model.
    """
    pretrain = plan.experiment.models[name].pretrain
    return pretrain.d_model if pretrain else model_config(plan, name).get_text_config().hidden_size


def model_config(plan: Plan, name: str) -> Any:
    """The transformers config of a model that lies elsewhere, or of a small target that is there already.

    Raises:
        BadInput: there is no model.
    """
    place = plan.model_place(name)
    if plan.experiment.models[name].pretrain and finished(plan.model(name), plan.root) is None:
        raise BadInput(f"`models.{name}` is to be pretrained, and is not there yet: run jobs/pretrain.py first")
    return _config_at(f"models.{name}.path", place["model"], place["revision"])


def _config_at(key: str, place: str, revision: str | None) -> Any:
    """Raises: BadInput: there is no model."""
    try:
        check_folder(place)
        with storage.local_folder(place, weights=False) as local:
            return AutoConfig.from_pretrained(local, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unreadable(key, place, "model", error) from error


def _unreadable(key: str, place: str, what: str, error: Exception) -> BadInput:
    reason = str(error).strip().partition("\n")[0]
    if not (storage.is_remote(place) or place.startswith(("/", ".")) or os.path.isdir(place)):
        reason = f"there is no folder {storage.absolute(place)}, and as a hub id: {reason}"
    return BadInput(f"`{key}` = {place!r}: no {what} can be read there: {reason}")


def tokenizer_of(plan: Plan, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model of the experiment.

    Raises:
        BadInput: there is none.
    """
    place = plan.model_place(name)
    try:
        with storage.local_folder(place["model"], weights=False) as folder:
            return AutoTokenizer.from_pretrained(folder, revision=place["revision"], trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unreadable(f"models.{name}.path", place["model"], "tokenizer", error) from error
