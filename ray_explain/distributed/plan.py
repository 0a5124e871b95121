"""Which artifacts an experiment consists of, and what each is made from: known before anything is made."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ray_explain import storage
from ray_explain.artifacts import Artifact
from ray_explain.config import AblationBalance, Experiment, ModelConfig, PatchingBalance, Task, TrainConfig
from ray_explain.distributed.feature_plan import FeaturePlan, describes, edges, released_folder
from ray_explain.errors import BadInput
from ray_explain.questions.prompting import shots_label
from ray_explain.records import TEXT_ONLY
from ray_explain.world import RECIPE

WITHOUT_VECTORS: tuple[Task, ...] = ("ablation",)
SELFIE = "SelfIE"
_OF_RELEASED_FEATURES = {"source", "layers", "per_layer"}
_OF_WORLD_FEATURES = {"layers", "d_sae", "k", "steps", "documents", "min_correlation"}


class Run(NamedTuple):
    """One explainer to train: of which model, of which target, on which tasks, from which seed, on how much data."""

    explainer: str
    target: str
    tasks: tuple[Task, ...]
    seed: int
    fraction: float = 1.0  # of the training questions
    text_only: bool = False  # trained and asked without vectors

    @property
    def name(self) -> str:
        """For people and paths: "qwen3-of-llama-patching-s0", "qwen3-of-llama-patching-s0-f0.25"."""
        share = "" if self.fraction == 1 else f"-f{self.fraction:g}"
        kind = "-text" if self.text_only else ""
        return f"{self.explainer}-of-{self.target}-{'+'.join(self.tasks)}-s{self.seed}{share}{kind}"

    @property
    def asked(self) -> tuple[Task, ...]:
        """The tasks whose questions it is asked: without vectors, only those that have some."""
        return tuple(task for task in self.tasks if not (self.text_only and task in WITHOUT_VECTORS))

    @property
    def speaker(self) -> str:
        """Its name in tables of answers."""
        return TEXT_ONLY if self.text_only else self.explainer


class Lookup(NamedTuple):
    """A target asked without any training, in one of the ways of `Plan.untrained`."""

    way: str  # "untrained", "zero-shot", "4-shot", "SelfIE"
    shots: int | None
    target: str
    task: Task


class Plan:
    """The artifacts of an experiment below its storage root, but those `without` some of its runs."""

    def __init__(self, experiment: Experiment, *, without: Collection[Run] = ()) -> None:
        self.experiment, self._without = experiment, without
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
        place = self.path(self.model(name)) if config.path is None else storage.same_everywhere(config.path)
        return {"model": place, "revision": config.revision, "dtype": config.dtype}

    def target_place(self, name: str) -> dict[str, Any]:
        """Config of `ground_truth.target.Target` for it: where it is, and the memory that its rows may take. Nothing of
        it is in an artifact's config."""
        pool = self.experiment.cluster
        # Without GPUs, all actors may be on one machine.
        share = min(1.0, pool.gpus_per_actor) or 1 / pool.actors
        return self.model_place(name) | {"memory_budget": pool.memory_budget, "memory_share": share}

    # -- ground truth -------------------------------------------------------------------------------------------------

    def cases(self, task: Task, target: str) -> Artifact:
        """What will be tried on the target; for features, the layers whose features are looked for."""
        section = getattr(self.experiment.ground_truth, task)
        if task == "features" and describes(section) and section.source != "released":
            return Artifact(
                kind="features_cases", label=target, config={"layers": section.layers}, parents=(self.model(target),)
            )
        settings = None
        if task == "features":
            settings = _OF_RELEASED_FEATURES if section.source == "released" else _OF_WORLD_FEATURES
        config = section.model_dump(mode="json", include=settings, exclude={"balance"}) | {
            "seed": self.experiment.seed,
            "world": self.experiment.world.model_dump(),
            "content": self._content(task, target) if getattr(section, "path", None) else None,
        }
        if getattr(section, "vectors", None):
            config["vectors"] = section.vectors
        return Artifact(kind=f"{task}_cases", label=target, config=config, parents=(self.model(target),))

    def balance(self, task: Task) -> PatchingBalance | AblationBalance | None:
        """How the questions are to be balanced, if at all."""
        return getattr(getattr(self.experiment.ground_truth, task), "balance", None)

    def released_folder(self, task: Task, target: str) -> str:
        """Where the released data set of a target lies."""
        return released_folder(getattr(self.experiment.ground_truth, task), target)

    def _content(self, task: Task, target: str) -> Any:
        section = getattr(self.experiment.ground_truth, task)
        if section.source != "released":
            return _digest(section.path)
        return _files_of(self.released_folder(task, target), "**/*" if task == "features" else "**/*.parquet")

    def effects(self, task: Task, target: str) -> Artifact:
        """What the target really did."""
        if task == "features" and describes(self.experiment.ground_truth.features):
            return FeaturePlan(self, target).effects()
        return Artifact(kind=f"{task}_effects", label=target, config={}, parents=(self.cases(task, target),))

    def questions(self, task: Task, target: str) -> Artifact:
        """What explainers are asked about it."""
        config: dict[str, Any] = {
            "wording": self.experiment.ground_truth.wording,
            "seed": self.experiment.seed,
            "balance": None if (balance := self.balance(task)) is None else balance.model_dump(),
        }
        if task == "features" and self.groups_features == "feature":
            config["group"] = "feature"
        ablation = self.experiment.ground_truth.ablation
        if task == "ablation" and ablation is not None and ablation.source == "jsonl":
            config["spans"] = "quoted"
        if task == "ablation" and ablation is not None and (ablation.source == "released" or ablation.form == "chat"):
            config["prompts"] = "as said"
        if task == "patching" and config["wording"] == "paper":
            config["end"] = "one newline"
        parents = (self.effects(task, target), *(own.effects() for own in self.unlabelled(task, target)))
        return Artifact(kind=f"{task}_questions", label=target, config=config, parents=parents)

    def unlabelled(self, task: Task, target: str) -> list[FeaturePlan]:
        """Of the vectors that nothing describes and explainers are tested on."""
        return FeaturePlan(self, target).unlabelled if task == "features" else []

    @property
    def groups_features(self) -> Literal["direction", "feature"]:
        """What splits keep together. Whole activations all point much the same way: their groups stay their texts. What
        was released stays in the split it was released in."""
        section = self.experiment.ground_truth.features
        assert section is not None
        return "feature" if section.source in ("activations", "differences", "released") else section.group

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
        if self.experiment.train.text_only:
            whole = max(self.experiment.fractions)
            own = (run for run in runs if run.explainer == run.target and run.fraction == whole)
            runs += [run._replace(text_only=True) for run in own if set(run.tasks) - set(WITHOUT_VECTORS)]
        runs = [run for run in runs if run not in self._without]
        return sorted(runs, key=lambda run: (run.text_only, run.explainer != run.target))

    def train_config(self, run: Run) -> TrainConfig:
        """How this explainer is trained; of the weights, those of its own tasks."""
        train = self.experiment.train_config(run.explainer, run.target)
        own = {task: weight for task, weight in train.weights.items() if task in run.tasks}
        return train.model_copy(update={"weights": own})

    def alignment(self, run: Run) -> Artifact | None:
        """The maps that the explainer's ridge projection starts from; None for other projections, and where there is no
        vector to project. Questions about features say no text of the target's: its corpus stands in for that."""
        if self.train_config(run).injection.projection != "ridge" or run.tasks == ("ablation",):
            return None
        corpus = (FeaturePlan(self, run.target).windows(),) if "features" in run.tasks else ()
        parents = (self.model(run.explainer), *(self.questions(task, run.target) for task in run.tasks), *corpus)
        label = f"{run.explainer}-of-{run.target}-{'+'.join(run.tasks)}"
        return Artifact(kind="alignments", label=label, config={"method": "ridge"}, parents=parents)

    def explainer(self, run: Run) -> Artifact:
        """The trained explainer of a run."""
        validated = self.experiment.sweep.metric != "loss"  # else it could not be judged by what was never measured
        config = self.train_config(run).identity(validated=validated) | {"seed": run.seed}
        if run.text_only:
            config["text_only"] = True
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
        parents = (self.explainer(run), self.asked(task, run.target, controls=not run.text_only))
        return Artifact(kind=f"{task}_answers", label=run.name, config=config, parents=parents)

    def untrained(self) -> list[Lookup]:
        """The ways in which targets are asked without any training."""
        evaluate, found = self.experiment.evaluate, list[Lookup]()
        for target, task in self.target_tasks():
            if evaluate.untrained:
                found.append(Lookup("untrained", None, target, task))
            found += [Lookup(shots_label(shots), shots, target, task) for shots in evaluate.shots]
            if evaluate.selfie and task == "features":
                found.append(Lookup(SELFIE, None, target, task))
        return found

    def prompted(self, one: Lookup) -> Artifact:
        """What an untrained model is asked: the held-out questions, with examples where there are to be some."""
        evaluate, questions = self.experiment.evaluate, self.questions(one.task, one.target)
        if one.shots is None:
            return self.asked(one.task, one.target, controls=False)
        config = {"split": evaluate.split, "shots": one.shots, "seed": self.experiment.seed}
        return Artifact(kind=f"{one.task}_prompted", label=one.target, config=config, parents=(questions,))

    def untrained_answers(self, one: Lookup) -> Artifact:
        """What the target itself answers without any training."""
        sizes = {"max_new_tokens": self.experiment.evaluate.max_new_tokens}
        injection = {"injection": self.experiment.train.injection.model_dump(mode="json")}
        config: dict[str, Any] = sizes | injection
        if one.way == SELFIE:
            config = {"way": SELFIE, "scales": self.experiment.evaluate.selfie}
        parents = (self.model(one.target), self.prompted(one))
        return Artifact(kind=f"{one.task}_answers", label=f"{one.way}-{one.target}", config=config, parents=parents)

    def scores(self) -> Artifact:
        """All scores and comparisons."""
        evaluate = self.experiment.evaluate
        answers = [self.answers(run, task) for run in self.runs() for task in run.asked]
        answers += [self.untrained_answers(one) for one in self.untrained()]
        config = {
            "resamples": evaluate.resamples,
            "seed": self.experiment.seed,
            "fractions": sorted(self.experiment.fractions),
        }
        if "features" in self.experiment.tasks:
            judge = {"judge": evaluate.judge.model_dump(include={"address", "model"})} if evaluate.judge else {}
            section = self.experiment.ground_truth.features
            if section and describes(section) and (section.simulator or section.detector):
                config["answers"] = "scored as descriptions"
            config |= judge | ({"embedding": evaluate.embedding} if evaluate.embedding else {})
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
    return {str(path.relative_to(root)): edges(path) for path in files}


def _digest(path: str) -> str:
    """A digest of a file of cases.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        reason = "it is not on this machine's disk" if storage.is_remote(path) else error.strerror
        raise BadInput(f"cannot read the cases in {path}: {reason}") from error
