"""Which artifacts an experiment consists of, and what each is made from: known before anything is made."""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ray_explain import storage
from ray_explain.artifacts import Artifact
from ray_explain.config import Experiment, ModelConfig, Task, TrainConfig
from ray_explain.errors import BadInput
from ray_explain.world import RECIPE

# Fields of the training section that change how the work is done, not what comes out.
_HOW_NOT_WHAT = {"checkpoint_every", "keep_checkpoints", "max_failures", "mixtures", "trackers"}
_EDGE_BYTES = 2**16


class Run(NamedTuple):
    """One explainer to train: of which model, of which target, on which tasks, from which seed, on how much data."""

    explainer: str
    target: str
    tasks: tuple[Task, ...]
    seed: int
    fraction: float = 1.0  # of the training questions

    @property
    def name(self) -> str:
        """For people and paths: "qwen3-of-llama-patching-s0", "qwen3-of-llama-patching-s0-f0.25"."""
        share = "" if self.fraction == 1 else f"-f{self.fraction:g}"
        return f"{self.explainer}-of-{self.target}-{'+'.join(self.tasks)}-s{self.seed}{share}"


class Plan:
    """The artifacts of an experiment below its storage root."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.root = storage.absolute(experiment.storage)

    def path(self, artifact: Artifact) -> str:
        """Where an artifact lies."""
        return artifact.path(self.root)

    # -- models -------------------------------------------------------------------------------------------------------

    @property
    def model_names(self) -> list[str]:
        """The models that are targets, explainers or both."""
        return list(dict.fromkeys([*self.experiment.targets, *self.experiment.explainers]))

    def model(self, name: str) -> Artifact:
        """A pretrained small target, or a stand-in for a model that lies elsewhere, which has no directory here."""
        config = self.experiment.models[name]
        if config.pretrain is not None:
            what = {**config.pretrain.model_dump(), "world": self.experiment.world.model_dump(), "recipe": RECIPE}
            return Artifact(kind="models", label=name, config=what)
        return Artifact(kind="external_models", label=name, config=_identity(config))

    def model_place(self, name: str) -> dict[str, Any]:
        """Config of `load_model` for it: model (folder or hub id), revision, dtype."""
        config = self.experiment.models[name]
        place = config.path if config.path is not None else self.path(self.model(name))
        return {"model": place, "revision": config.revision, "dtype": config.dtype}

    # -- ground truth -------------------------------------------------------------------------------------------------

    def cases(self, task: Task, target: str) -> Artifact:
        """What will be tried on the target; for features, the layers whose features are looked for."""
        section = getattr(self.experiment.ground_truth, task)
        config = section.model_dump(mode="json", exclude={"balance"}) | {
            "seed": self.experiment.seed,
            "world": self.experiment.world.model_dump(),
            "content": self._content(task, target) if getattr(section, "path", None) else None,
        }
        return Artifact(kind=f"{task}_cases", label=target, config=config, parents=(self.model(target),))

    def released_folder(self, task: Task, target: str) -> str:
        """Where the released data set of a target lies."""
        return getattr(self.experiment.ground_truth, task).path.replace("{target}", target)

    def _content(self, task: Task, target: str) -> Any:
        section = getattr(self.experiment.ground_truth, task)
        if section.source != "released":
            return _digest(section.path)
        return _files_of(self.released_folder(task, target), "**/*.parquet")

    def effects(self, task: Task, target: str) -> Artifact:
        """What the target really did."""
        return Artifact(kind=f"{task}_effects", label=target, config={}, parents=(self.cases(task, target),))

    def questions(self, task: Task, target: str) -> Artifact:
        """What explainers are asked about it."""
        config = {
            "wording": self.experiment.ground_truth.wording,
            "seed": self.experiment.seed,
            "balance": getattr(getattr(self.experiment.ground_truth, task), "balance", []),
        }
        return Artifact(kind=f"{task}_questions", label=target, config=config, parents=(self.effects(task, target),))

    # -- explainers ---------------------------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        """Every explainer of the experiment; the self-explainers come first."""
        tasks = self.experiment.tasks
        mixtures = [tuple(t for t in mixture if t in tasks) for mixture in self.experiment.train.mixtures]
        runs = [
            Run(explainer, target, mixture, seed, fraction)
            for fraction in sorted(self.experiment.fractions, reverse=True)
            for seed in self.experiment.seeds
            for target in self.experiment.targets
            for explainer in self.experiment.explainers
            for mixture in mixtures
            if mixture
        ]
        return sorted(runs, key=lambda run: run.explainer != run.target)

    def train_config(self, run: Run) -> TrainConfig:
        """How this explainer is trained."""
        return self.experiment.train_config(run.explainer, run.target)

    def alignment(self, run: Run) -> Artifact | None:
        """The maps that the explainer's ridge projection starts from; None for other projections, and where there is no
        vector to project."""
        if self.train_config(run).injection.projection != "ridge" or run.tasks == ("ablation",):
            return None
        parents = (self.model(run.explainer), *(self.questions(task, run.target) for task in run.tasks))
        label = f"{run.explainer}-of-{run.target}-{'+'.join(run.tasks)}"
        return Artifact(kind="alignments", label=label, config={"method": "ridge"}, parents=parents)

    def explainer(self, run: Run) -> Artifact:
        """The trained explainer of a run."""
        config = self.train_config(run).model_dump(mode="json", exclude=_HOW_NOT_WHAT) | {"seed": run.seed}
        if run.fraction < 1:
            config["fraction"] = run.fraction
        parents = (self.model(run.explainer), *(self.questions(task, run.target) for task in run.tasks))
        return Artifact(kind="explainers", label=run.name, config=config, parents=parents)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def asked(self, task: Task, target: str, *, controls: bool) -> Artifact:
        """The held-out questions, once as they are and, with `controls`, once under each of them."""
        evaluate = self.experiment.evaluate
        # Where there is no vector, there is nothing to control.
        names = evaluate.controls if controls and task != "ablation" else []
        config = {"split": evaluate.split, "controls": names, "seed": self.experiment.seed}
        return Artifact(kind=f"{task}_asked", label=target, config=config, parents=(self.questions(task, target),))

    def answers(self, run: Run, task: Task) -> Artifact:
        """What the explainer of a run answers to the questions of one of its tasks."""
        config = {"max_new_tokens": self.experiment.evaluate.max_new_tokens}
        parents = (self.explainer(run), self.asked(task, run.target, controls=True))
        return Artifact(kind=f"{task}_answers", label=run.name, config=config, parents=parents)

    def untrained_answers(self, target: str, task: Task) -> Artifact:
        """What the target itself answers without any training."""
        config = {
            "max_new_tokens": self.experiment.evaluate.max_new_tokens,
            "injection": self.experiment.train.injection.model_dump(mode="json"),
        }
        parents = (self.model(target), self.asked(task, target, controls=False))
        return Artifact(kind=f"{task}_answers", label=f"untrained-{target}", config=config, parents=parents)

    def scores(self) -> Artifact:
        """All scores and comparisons."""
        evaluate = self.experiment.evaluate
        answers = [self.answers(run, task) for run in self.runs() for task in run.tasks]
        if evaluate.untrained:
            answers += [self.untrained_answers(target, task) for target, task in self.target_tasks()]
        config = {
            "resamples": evaluate.resamples,
            "seed": self.experiment.seed,
            "fractions": sorted(self.experiment.fractions),
        }
        return Artifact(kind="scores", label=self.experiment.name, config=config, parents=tuple(answers))

    def target_tasks(self) -> list[tuple[str, Task]]:
        """Every target with every task."""
        return [(target, task) for target in self.experiment.targets for task in self.experiment.tasks]


def _identity(config: ModelConfig) -> Mapping[str, Any]:
    """What tells one model that lies elsewhere from another: its id and revision, or the edges of its files."""
    named = config.model_dump(exclude={"pretrain"})
    return named | {"files": _files_of(config.path, "*") if config.path else {}}


def _files_of(folder: str, pattern: str) -> dict[str, str]:
    """A digest of each file; none where there is no folder."""
    root = Path(folder)
    files = sorted(path for path in root.glob(pattern) if path.is_file()) if root.is_dir() else []
    return {str(path.relative_to(root)): _edges(str(path), path.stat().st_size) for path in files}


@cache
def _edges(path: str, size: int) -> str:
    """A digest of a file's size, first and last 64 KiB: whole weights of large models would take minutes."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(str(size).encode() + file.read(_EDGE_BYTES))
        file.seek(max(0, size - _EDGE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def _digest(path: str) -> str:
    """A digest of a file of cases.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise BadInput(f"cannot read the cases in {path}: {error.strerror}") from error
