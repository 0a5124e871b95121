"""The steps of an experiment. Each makes what is not there yet, after what it needs; none does anything twice."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ray_explain import storage
from ray_explain.artifacts import Artifact, finish, finished
from ray_explain.config import FeaturesConfig, LocalConfig, Task
from ray_explain.distributed.feature_plan import FeaturePlan, describes, released_folder, tells_all_concepts
from ray_explain.distributed.plan import SELFIE, Plan, Run
from ray_explain.errors import BadInput, JobFailed
from ray_explain.evaluation.baselines import baselines
from ray_explain.evaluation.comparisons import comparisons
from ray_explain.evaluation.controls import under_control
from ray_explain.evaluation.grading import best_of, grade
from ray_explain.evaluation.metrics import scores
from ray_explain.evaluation.simulations import GOLD, answered, gold_answers, labelled, simulated
from ray_explain.explainer.examples import check_end
from ray_explain.ground_truth import cases
from ray_explain.ground_truth.balance import balanced
from ray_explain.ground_truth.dictionaries import SOURCES
from ray_explain.ground_truth.directions import grouped_by_direction
from ray_explain.ground_truth.features import layers_table, split_features
from ray_explain.ground_truth.mmlu import saying
from ray_explain.ground_truth.pairs import Change, layer_blocks
from ray_explain.ground_truth.positions import words_of_tokens
from ray_explain.ground_truth.released_exemplars import write_exemplars
from ray_explain.ground_truth.released_files import read_feature_folder, read_folder, write_folder
from ray_explain.ground_truth.splits import training_rows
from ray_explain.models import check_folder
from ray_explain.questions.ablation import ablation_questions
from ray_explain.questions.features import features_questions
from ray_explain.questions.patching import patching_questions
from ray_explain.questions.prompting import BEST_SELFIE, prompted, selfie_label, shown_examples
from ray_explain.questions.wordings import says
from ray_explain.stages import READ, Result, check_dropped
from ray_explain.world.corpus import replay_texts
from ray_explain.world.facts import World

ROWS_PER_GROUP = 256  # of the Parquet files that actors read slices of
TABLE = "table.parquet"
CONTROL = pa.field("control", pa.string(), nullable=False)  # column of the questions that are asked


@dataclass
class Session:
    """One run of a job: its plan, a console, and Ray, which starts when something first needs it."""

    plan: Plan
    console: Console = field(default_factory=lambda: Console(markup=False))  # errors of others hold [brackets]
    _stack: ExitStack = field(default_factory=ExitStack)
    _started: bool = False
    _trains: bool = False

    def __enter__(self) -> "Session":
        if storage.is_remote(self.plan.root):
            from ray_explain.distributed.checks import check_storage

            check_storage(self.plan.root)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start_ray(self) -> None:
        """Ray is running afterwards.

        Raises:
            BadInput: the cluster is not there, or cannot be used for this experiment.
        """
        # These take a second that a finished experiment can save.
        from ray_explain.distributed.checks import check_gpus, unused_gpus
        from ray_explain.distributed.cluster import check_shared, cluster

        wanted = self.plan.experiment.cluster
        if self._started:
            check_shared(self.plan.experiment.storage, wanted)  # nodes may have come since
        else:
            self._stack.enter_context(cluster(self.plan.experiment.storage, wanted))
            check_gpus(wanted)
            if (told := unused_gpus(wanted)) is not None:
                self.say(told)
            self._started = True
            self._check_workers()

    def start_early(self, ends: Iterable[Artifact], *, trains: bool = False) -> None:
        """Where some of what the job ends with is missing, and is to be made on a cluster of others or with GPUs, Ray
        starts now: who has none is told before anything is read. `trains` says that explainers will be trained.

        Raises:
            BadInput: as `start_ray`.
            JobFailed: the cluster can never have the workers of a training that is still to come.
        """
        self._trains, wanted = self._trains or trains, self.plan.experiment.cluster
        needs_more = os.environ.get("RAY_ADDRESS") or wanted.gpus_per_actor or wanted.gpus_per_worker
        if needs_more and not self._started and self.missing(list(ends)):
            self.start_ray()

    def _check_workers(self) -> None:
        from ray_explain.distributed.capacity import check_capacity, fleet

        plan, wanted = self.plan, self.plan.experiment.cluster
        missing = [run for run in plan.runs() if self.missing([plan.explainer(run)])]
        if self._trains and missing:
            most = max(plan.train_config(run).workers for run in missing)
            check_capacity(most, fleet(wanted), gpus_per_worker=wanted.gpus_per_worker)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def missing(self, artifacts: Sequence[Artifact]) -> list[Artifact]:
        """Those that are not finished."""
        return [artifact for artifact in artifacts if finished(artifact, self.plan.root) is None]

    def table(self, artifact: Artifact, columns: list[str] | None = None) -> pa.Table:
        """The rows of a finished table; all columns unless some are named."""
        return storage.read_table(self.plan.path(artifact), columns)

    def split(self, artifact: Artifact, split: str) -> pa.Table:
        """The rows of a split; those of the others, with their vectors, may be more than the driver's memory holds."""
        rows = np.flatnonzero(pc.equal(self.table(artifact, ["split"])["split"], split))
        return pa.concat_tables(storage.read_rows(self.plan.path(artifact), rows))

    def parts(self, artifact: Artifact) -> Iterator[pa.Table]:
        """The rows of a finished table, some at a time: what was made on the driver lies in one file."""
        return storage.read_batches(self.plan.path(artifact))

    def make_table(self, artifact: Artifact, make: Callable[[], pa.Table | Result]) -> None:
        """A table that is made on the driver, unless it is there."""

        def parts() -> Iterator[Result]:
            made = make()
            yield made if isinstance(made, Result) else Result(made, [])

        self.make_parts(artifact, parts)

    def make_parts(self, artifact: Artifact, parts: Callable[[], Iterator[Result]]) -> None:
        """As `make_table`, part by part; there is at least one."""
        if not self.missing([artifact]):
            return
        started, rows, reasons = time.monotonic(), 0, Counter[str]()
        measured: dict[str, Any] = {}
        with storage.table_writer(f"{self.plan.path(artifact)}/{TABLE}", row_group_size=ROWS_PER_GROUP) as write:
            for made in parts():
                write(made.table)
                rows += made.table.num_rows
                reasons.update(reason for _, reason in made.dropped)
                measured |= made.measured
        seconds = time.monotonic() - started
        finish(artifact, self.plan.root, rows=rows, dropped=reasons, seconds=seconds, measured=measured)


# -- models -----------------------------------------------------------------------------------------------------------


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


def _check_explainers(session: Session) -> None:
    """Raises: BadInput: the tokenizer of an explainer that is still to be trained cannot end an answer."""
    plan = session.plan
    missing = {run.explainer for run in plan.runs() if session.missing([plan.explainer(run)])}
    for name in sorted(missing):
        if plan.experiment.models[name].pretrain is None:
            try:
                check_end(tokenizer_of(plan, name))
            except BadInput as error:
                raise BadInput(f"`models.{name}`: {error}") from error


def _check_describers(session: Session) -> None:
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


# -- ground truth -----------------------------------------------------------------------------------------------------


def make_ground_truth(session: Session) -> None:
    """What the targets really do, and the questions about it.

    Raises:
        BadInput: as `make_models`; a model that is to be an explainer could not end its answers; or one that is to
            describe features cannot be read.
    """
    plan = session.plan
    session.start_early(plan.effects(task, target) for target, task in plan.target_tasks())
    make_models(session)
    _check_explainers(session)
    _check_describers(session)
    released = [(target, task) for target, task in plan.target_tasks() if _is_taken_over(plan, task)]
    for target, task in released:
        session.make_parts(plan.effects(task, target), partial(_released, plan, task, target))
    measured = [pair for pair in plan.target_tasks() if pair not in released]
    for target, task in measured:
        session.make_table(plan.cases(task, target), lambda k=task, t=target: _cases(plan, k, t))  # type: ignore[misc]
    if describes(plan.experiment.ground_truth.features):
        from ray_explain.distributed.features import make_features

        make_features(session, {target: _feature_layers(plan, target) for target in plan.experiment.targets})
        measured = [(target, task) for target, task in measured if task != "features"]
    if session.missing([plan.effects(task, target) for target, task in measured]):
        from ray_explain.distributed.run_stages import run_stages

        session.say("Ground truth: intervening on the targets")
        session.start_ray()
        run_stages([_stage_job(plan, task, target) for target, task in measured], plan.root, plan.experiment.cluster)
    for target, task in plan.target_tasks():
        if not _is_asked(plan, task):
            session.say(f"{task} of {target}: no questions, `ground_truth.wording` has no words for this kind of patch")
            continue
        if task == "features":
            session.make_parts(plan.questions(task, target), partial(_features_questions, session, target))
        else:
            session.make_table(plan.questions(task, target), lambda k=task, t=target: _questions(session, k, t))  # type: ignore[misc]


def export_ground_truth(session: Session) -> None:
    """The effects in the schemas of the paper's released data sets, below `released/` in the storage; features with
    their exemplars, where those were looked for, and vectors that nothing describes in a folder for each kind."""
    plan = session.plan
    make_ground_truth(session)
    for target, task in plan.target_tasks():
        _export_to(session, target, task, task)
        for own in plan.unlabelled(task, target):
            _export_to(session, target, task, f"{task}_{own.section.vectors or own.section.source}", own)


def _export_to(session: Session, target: str, task: Task, name: str, unlabelled: FeaturePlan | None = None) -> None:
    place = f"{session.plan.root}/released/{target}/{name}"
    try:
        with storage.new_folder(place) as folder:
            told = _export(session, target, task, folder, unlabelled)
    except ValueError as error:
        session.say(f"{name} of {target}: not written: {error}")
        return
    counts = ", ".join(
        f"{split} {n:,} rows" + (f" ({left} left out)" if left else "") for split, (n, left) in told.items()
    )
    session.say(f"{name} of {target}: {counts} in {place}")


def _export(
    session: Session, target: str, task: Task, folder: str, unlabelled: FeaturePlan | None
) -> dict[str, tuple[int, int]]:
    """What was written and left out, by split.

    Raises:
        ValueError: the effects have no place in the released schema.
    """
    plan = session.plan
    effects = session.table(unlabelled.effects() if unlabelled else plan.effects(task, target))
    section, tokenizer = getattr(plan.experiment.ground_truth, task), tokenizer_of(plan, target)
    mmlu = section.path if getattr(section, "source", None) == "mmlu" else None
    has_exemplars = task == "features" and (unlabelled is not None or describes(section))
    told = write_folder(effects, task, folder, tokenizer, mmlu=mmlu, listed=has_exemplars)
    if has_exemplars:
        _export_exemplars(session, unlabelled or FeaturePlan(plan, target), effects, folder)
    return told


def _export_exemplars(session: Session, own: FeaturePlan, effects: pa.Table, folder: str) -> None:
    plan, section, target = session.plan, own.section, own.target
    about = {
        "hf_model_id": plan.model_place(target)["model"],
        "hf_dataset_configs": [{"hf_dataset_id": section.path or section.corpus.path or "the synthetic world"}],
        "seed": plan.experiment.seed,
    }
    exemplars = session.table(own.exemplars())
    n, left_out = write_exemplars(exemplars, effects, folder, tokenizer_of(plan, target), about=about)
    lost = "".join(f", {count:,} left out: {reason}" for reason, count in left_out.items())
    session.say(f"features of {target}: {n:,} windows of exemplars{lost}")


def _is_asked(plan: Plan, task: Task) -> bool:
    """Whether there are words for what is measured."""
    section = plan.experiment.ground_truth.patching
    return task != "patching" or section is None or says(plan.experiment.ground_truth.wording, section.kind)


def check_asked(plan: Plan) -> None:
    """Raises: BadInput: there are no words for a question that explainers are to learn."""
    truth = plan.experiment.ground_truth
    for _, task in plan.target_tasks():
        if not _is_asked(plan, task):
            assert truth.patching is not None
            raise BadInput(
                f"`ground_truth.patching.kind` = {truth.patching.kind!r}: `wording` {truth.wording!r} has no words for "
                "it, so nothing can be trained on it; jobs/ground_truth.py and jobs/export.py measure it all the same"
            )


def _is_taken_over(plan: Plan, task: Task) -> bool:
    """Whether the effects are those of a released data set as they are: nothing is described or scored anew."""
    section = getattr(plan.experiment.ground_truth, task)
    is_described = task == "features" and describes(section)
    return getattr(section, "source", None) == "released" and not is_described


def _released(plan: Plan, task: Task, target: str) -> Iterator[Result]:
    """The effects of a released data set, part by part.

    Raises:
        BadInput: none of the target is in the folder.
        JobFailed: too much of it cannot be used.
    """
    section = getattr(plan.experiment.ground_truth, task)
    if task == "features":
        yield from released_features(plan, target, section, _feature_layers(plan, target))
        return
    folder, width = plan.released_folder(task, target), d_model(plan, target)
    parts = read_folder(folder, task, tokenizer_of(plan, target), d_model=width, n=section.cases.model_dump())
    yield from _checked_rows(plan, task, folder, parts)


def released_features(
    plan: Plan, target: str, section: FeaturesConfig, layers: Sequence[int], *, unlabelled: bool = False
) -> Iterator[Result]:
    """The features of a section's released data set with their labels; those without any only if `unlabelled`.

    Raises:
        BadInput, JobFailed: as `_released`.
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


def _feature_layers(plan: Plan, target: str) -> list[int]:
    layers = plan.experiment.ground_truth.features.layers  # type: ignore[union-attr]
    return list(range(n_layers(plan, target))) if layers == "all" else layers


def _cases(plan: Plan, task: Task, target: str) -> pa.Table | Result:
    """What will be tried on the target.

    Raises:
        BadInput: the file of the cases cannot be read, or they do not fit the model or the world.
        JobFailed: too much of it cannot be used.
    """
    try:
        if task == "features":
            return layers_table(_feature_layers(plan, target))
        made = _ablation_cases(plan, target) if task == "ablation" else _patching_cases(plan, target)
    except (ValueError, FileNotFoundError) as error:
        raise BadInput(f"`ground_truth.{task}`: {error}") from error
    section = getattr(plan.experiment.ground_truth, task)
    (made,) = checked([made], f"`ground_truth.{task}`: lines in {section.path}", plan.experiment.cluster.max_dropped)
    _check_splits(plan, f"`ground_truth.{task}`", made)
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


def _stage_job(plan: Plan, task: Task, target: str) -> Any:
    from ray_explain.distributed.run_stages import StageJob
    from ray_explain.ground_truth.ablation import AblationStage
    from ray_explain.ground_truth.features import FeatureStage
    from ray_explain.ground_truth.patching import PatchingStage

    config = plan.target_place(target)
    if task == "features":
        section = plan.experiment.ground_truth.features
        assert section is not None
        config |= section.model_dump(include={"d_sae", "k", "steps", "documents", "min_correlation"}) | {
            "seed": plan.experiment.seed,
            "world": plan.experiment.world.model_dump(),
        }
    stages = {"patching": PatchingStage, "ablation": AblationStage, "features": FeatureStage}
    return StageJob(
        stage=stages[task],  # type: ignore[arg-type]
        config=config,
        source=plan.path(plan.cases(task, target)),
        artifact=plan.effects(task, target),
        rows_per_slice=1 if task == "features" else None,
        expands=task == "features",
    )


def _questions(session: Session, task: Task, target: str) -> Result:
    """Raises: BadInput: the training split or the one to be evaluated is empty."""
    plan = session.plan
    wording, seed = plan.experiment.ground_truth.wording, plan.experiment.seed
    effects, counts = session.table(plan.effects(task, target)), dict[str, Any]()
    balance = plan.balance(task)
    if balance is not None:
        effects, before, after = balanced(effects, balance.by, at_most=balance.at_most, seed=seed)
        counts = {"cases before balancing": before, "cases after balancing": after}
    tokenizer = tokenizer_of(plan, target)
    if task == "patching":
        made = patching_questions(effects, partial(words_of_tokens, tokenizer), wording=wording, seed=seed)
    else:
        width = d_model(plan, target)
        made = ablation_questions(effects, saying(tokenizer), d_model=width, wording=wording, seed=seed)
    _check_splits(plan, f"{task} of {target}", made)
    return made._replace(measured=counts)


def _features_questions(session: Session, target: str) -> Iterator[Result]:
    """Questions about features part by part, so that no more than a part of all vectors is in memory; those that
    nothing describes come last.

    Raises:
        BadInput: as `_questions`.
    """
    plan, splits, dropped = session.plan, set[str](), list[tuple[str, str]]()
    wording, seed = plan.experiment.ground_truth.wording, plan.experiment.seed
    unlabelled = describes(plan.experiment.ground_truth.features)  # else there is nothing to score their answers with
    for features, descriptions in _asked_features(session, target):
        made = features_questions(features, descriptions, wording=wording, seed=seed, unlabelled=unlabelled)
        splits.update(made.table.column("split").to_pylist())
        dropped += made.dropped
        yield made
    _check_found(plan, f"features of {target}", splits, dropped)


def _asked_features(session: Session, target: str) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Features and descriptions, part by part; all at once where splits are to keep directions together."""
    plan, effects = session.plan, session.plan.effects("features", target)
    if plan.groups_features == "feature":
        yield from map(split_features, session.parts(effects))
    else:
        features, descriptions = split_features(session.table(effects))
        yield grouped_by_direction(features, seed=plan.experiment.seed), descriptions
    for own in plan.unlabelled("features", target):
        yield from map(split_features, session.parts(own.effects()))


def _check_splits(plan: Plan, what: str, made: Result) -> None:
    """Raises: BadInput: the training split or the one to be evaluated is empty."""
    _check_found(plan, what, set(made.table.column("split").to_pylist()), made.dropped)


def _check_found(plan: Plan, what: str, splits: set[str], dropped: Sequence[tuple[str, str]]) -> None:
    for split in ("train", plan.experiment.evaluate.split):
        if split not in splits:
            reasons = Counter(reason for _, reason in dropped).most_common(3)
            why = f" ({', '.join(f'{count} dropped: {reason}' for reason, count in reasons)})" if reasons else ""
            raise BadInput(f"{what}: split {split!r} is empty{why}; give more cases, or lines with this `split`")


# -- explainers -------------------------------------------------------------------------------------------------------


def train_explainers(session: Session) -> None:
    """An explainer for each run of the plan.

    Raises:
        BadInput: as `check_asked`.
    """
    plan = session.plan
    check_asked(plan)
    session.start_early(map(plan.explainer, plan.runs()), trains=True)
    make_ground_truth(session)
    _train_missing(session)


def _train_missing(session: Session) -> None:
    plan = session.plan
    missing = [run for run in plan.runs() if session.missing([plan.explainer(run)])]
    if missing:
        from ray_explain.distributed.train import train_all

        session.say(f"Explainers: training {len(missing)}")
        session.start_ray()
        align(session, missing)
        train_all([train_run(session, run) for run in missing], plan.root, plan.experiment.cluster)


def align(session: Session, runs: Sequence[Run]) -> None:
    """The maps that ridge projections of these runs start from; Ray must be running.

    Raises:
        BadInput: the corpus of features cannot be read, or there is too little text.
    """
    from ray_explain.distributed.alignment import AlignmentJob, align_all
    from ray_explain.distributed.features import corpus_of

    plan = session.plan
    jobs = [
        AlignmentJob(
            artifact=artifact,
            target=plan.model_place(run.target),
            explainer=plan.model_place(run.explainer),
            questions=tuple(plan.path(plan.questions(task, run.target)) for task in run.tasks),
            corpus=plan.path(corpus_of(session, run.target)) if "features" in run.tasks else None,
        )
        for run in runs
        if (artifact := plan.alignment(run)) is not None and session.missing([artifact])
    ]
    align_all(jobs, plan.root, gpus=plan.experiment.cluster.gpus_per_actor)


def train_run(session: Session, run: Run) -> Any:
    """What the workers of a run are given; its questions must be there."""
    from ray_explain.distributed.train import TrainRun

    plan = session.plan
    train, questions = plan.train_config(run), [plan.questions(task, run.target) for task in run.tasks]
    n_texts = round(_asked_in(session, questions, run.fraction) * train.replay) if train.replay else 0
    texts = replay_texts(plan.experiment.world.world(), n_texts, run.seed)
    return TrainRun(
        artifact=plan.explainer(run),
        model=plan.model_place(run.explainer),
        target=_target_of(plan, run.target),
        questions=tuple(plan.path(table) for table in questions),
        replay=tuple(texts),
        train=train,
        seed=run.seed,
        wording=plan.experiment.ground_truth.wording,
        text_only=run.text_only,
        fraction=run.fraction,
        alignment=None if (maps := plan.alignment(run)) is None else plan.path(maps),
    )


def _asked_in(session: Session, questions: Iterable[Artifact], fraction: float) -> int:
    tables = (session.table(each, ["split", "group"]) for each in questions)
    return sum(training_rows(table, fraction).num_rows for table in tables)


def _target_of(plan: Plan, name: str) -> dict[str, Any]:
    """What an explainer's sidecar says of its target, and is held against. Weights on S3 are not copied here for it."""
    from ray_explain.models import files_fingerprint

    place = plan.model_place(name)
    at_hand = not storage.is_remote(place["model"])
    weights = files_fingerprint(place["model"], place["revision"]) if at_hand else None
    return {"name": name, "revision": place["revision"], "weights": weights}


# -- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(session: Session) -> None:
    """Every explainer's answers to the held-out questions, and all scores.

    Scores that lack some of a judge's marks are made again with those that it gives now.

    Raises:
        BadInput: as `train_explainers`; or the questions do not allow a control, which is found before any training.
        JobFailed: there are no scores yet, and a judge does not answer.
    """
    plan = session.plan
    check_asked(plan)
    session.start_early([plan.scores()], trains=True)
    make_ground_truth(session)
    make_asked(session)
    _train_missing(session)
    answers = plan.scores().parents
    if session.missing(answers):
        from ray_explain.distributed.run_stages import run_stages

        session.say("Evaluation: asking the explainers")
        session.start_ray()
        run_stages(answer_jobs(plan), plan.root, plan.experiment.cluster)
    if session.missing([plan.scores()]):
        session.say("Evaluation: scoring the answers")
        _make_scores(session)
    elif unscored := marked(plan).get("unscored"):
        session.say(f"Evaluation: asking the judge again about {unscored:,} answers that it did not mark")
        try:
            _make_scores(session)
        except JobFailed as error:
            session.say(f"The scores stay as they were: {error}")


def marked(plan: Plan) -> dict[str, int]:
    """How many `answers` a judge was to mark for the scores, and how many it left `unscored`; empty without a judge and
    without scores."""
    manifest = finished(plan.scores(), plan.root)
    return {} if manifest is None else manifest.measured.get("judge", {})


def make_asked(session: Session) -> None:
    """The questions that are asked for the scores; those of the experiment must be there."""
    for asked in dict.fromkeys(answers.parents[-1] for answers in session.plan.scores().parents):
        session.make_parts(asked, partial(_asked, session, asked))


def _asked(session: Session, asked: Artifact) -> Iterator[Result]:
    """The questions of the split, once for each control, or with answered examples before them."""
    config, every = asked.config, asked.parents[0]
    questions = session.split(every, config["split"])
    if "shots" in config:
        questions = prompted(questions, _examples(session, every, config["shots"], config["seed"]))
    for control in ["none", *config.get("controls", [])]:
        made = under_control(questions, control, config["seed"])
        yield Result(made.append_column(CONTROL, pa.array([control] * made.num_rows)), [])


def _examples(session: Session, questions: Artifact, shots: int, seed: int) -> pa.Table:
    """The training questions that prompts show, in their order there."""
    training = session.table(questions, ["split", "group", "changed"])
    rows = np.flatnonzero(pc.equal(training["split"], "train"))
    shown = rows[shown_examples(training.take(pa.array(rows)), shots=shots, seed=seed)]
    found = pa.concat_tables(storage.read_rows(session.plan.path(questions), np.sort(shown)))
    return found.take(pa.array(np.argsort(np.argsort(shown))))


def answer_jobs(plan: Plan) -> list[Any]:
    """A stage for each of the answers that the scores are made from."""
    from ray_explain.distributed.run_stages import StageJob
    from ray_explain.evaluation.answering import AnswerStage, SelfieStage

    evaluate, longest = plan.experiment.evaluate, plan.experiment.train.max_tokens
    common = {"max_new_tokens": evaluate.max_new_tokens, "batch_size": evaluate.batch_size, "max_tokens": longest}
    injection = plan.experiment.train.injection.model_dump(exclude={"projection"})
    jobs: list[tuple[Any, str, dict[str, Any], Artifact]] = []
    targets = {name: _target_of(plan, name) for name in plan.experiment.targets}
    for run in plan.runs():
        own: dict[str, Any] = {
            "explainer": run.speaker,
            "folder": plan.path(plan.explainer(run)),
            "target": run.target,
            "target_revision": targets[run.target]["revision"],
            "target_weights": targets[run.target]["weights"],
        }
        own |= {"text_only": True} if run.text_only else {}
        jobs += [(AnswerStage, run.target, own, plan.answers(run, task)) for task in run.asked]
    for one in plan.untrained():
        own = {"explainer": one.way, **plan.model_place(one.target), "injection": injection}
        own |= {"max_tokens": longest * (one.shots + 1)} if one.shots else {}
        if one.way == SELFIE:
            own |= {"scales": evaluate.selfie, "brief": plan.experiment.ground_truth.wording == "brief"}
        stage = SelfieStage if one.way == SELFIE else AnswerStage
        jobs.append((stage, one.target, own, plan.untrained_answers(one)))
    return [
        StageJob(
            stage=stage,
            config=common | own | {"d_target": d_model(plan, target)},
            source=plan.path(answers.parents[-1]),
            artifact=answers,
            expands=stage is SelfieStage,
        )
        for stage, target, own, answers in jobs
    ]


def _make_scores(session: Session) -> None:
    """Tables `graded`, `scores` and `comparisons` in the scores' directory."""
    plan, started = session.plan, time.monotonic()
    graded = pa.concat_tables(_graded(session, target, task) for target, task in plan.target_tasks())
    evaluate, seed, folder = plan.experiment.evaluate, plan.experiment.seed, plan.path(plan.scores())
    compared = graded.filter(pc.not_equal(graded["explainer"], GOLD))
    tables = {
        "graded": graded,
        "scores": scores(graded, seed=seed, resamples=evaluate.resamples),
        "comparisons": comparisons(
            compared, trained=plan.experiment.explainers, seed=seed, resamples=evaluate.resamples
        ),
    }
    measured = {"judge": _marked(graded)} if evaluate.judge and "features" in plan.experiment.tasks else {}
    storage.remove(folder)  # scores that lack marks are there already
    for name, table in tables.items():
        storage.write_table(table, f"{folder}/{name}/{TABLE}")
    seconds = time.monotonic() - started
    finish(plan.scores(), plan.root, rows=graded.num_rows, seconds=seconds, measured=measured)


def _marked(graded: pa.Table) -> dict[str, int]:
    """Of answers to questions that have a right one: a judge has nothing to hold others against."""
    judged = graded.filter(pc.and_(pc.equal(graded["task"], "features"), graded["exact"].is_valid()))["judged"]
    return {"answers": len(judged), "unscored": judged.null_count}


def _graded(session: Session, target: str, task: Task) -> pa.Table:
    """All answers about a target on a task held against the truth, those of baselines among them."""
    plan = session.plan
    held_out = session.split(plan.questions(task, target), plan.experiment.evaluate.split)
    given = _given(session, target, task, held_out)
    section = plan.experiment.ground_truth.features if task == "features" else None
    described, of_world = describes(section), section is not None and tells_all_concepts(section)
    descriptions = _descriptions(session, target, held_out) if of_world else None
    marks = _marks(session) if task == "features" else []
    alike: dict[tuple[int, float], list[pa.Table]] = {}
    for seed, fraction, answers in given:
        alike.setdefault((seed, fraction), []).append(answers)
    sets = [(held_out, key, pa.concat_tables(tables)) for key, tables in alike.items()]
    if described and FeaturePlan(plan, target).scores_descriptions:
        known = labelled(held_out)
        sets.append((known, (0, 0.0), gold_answers(known)))
        scored = _scored_answers(session, target, held_out, [said for _, _, said in sets])
        marks.append(partial(simulated, scored=scored))
    parts = []
    for questions, (seed, fraction), said in sets:
        part = grade(questions, said, descriptions, target=target, seed=seed, fraction=fraction)
        for mark in marks:
            part = mark(part, questions, said)
        parts.append(part)
    graded = pa.concat_tables(parts)
    if task != "features" or not plan.experiment.evaluate.selfie:
        return graded
    scales = [selfie_label(scale) for scale in plan.experiment.evaluate.selfie]
    return pa.concat_tables([graded, best_of(graded, scales, BEST_SELFIE)])


def _given(session: Session, target: str, task: Task, held_out: pa.Table) -> list[tuple[int, float, pa.Table]]:
    """Answers of explainers and baselines, each with the seed of its training and its share of the data."""
    plan = session.plan
    runs = [run for run in plan.runs() if _about(run, target, task)]
    given = [(run.seed, run.fraction, session.table(plan.answers(run, task))) for run in runs]
    asked = [one for one in plan.untrained() if (one.target, one.task) == (target, task)]
    given += [(0, 0.0, session.table(plan.untrained_answers(one))) for one in asked]
    for fraction in plan.experiment.fractions:
        with _training(session, plan.questions(task, target), fraction) as known:
            given += [(0, fraction, answers) for answers in baselines(known, held_out)]
    return given


def _training(session: Session, questions: Artifact, fraction: float) -> AbstractContextManager[pa.Table]:
    """The training questions within a fraction, on disk: with their vectors they may be more than memory holds."""
    keys = session.table(questions, ["split", "group"])
    keys = keys.append_column("row", pa.array(np.arange(keys.num_rows)))
    rows = training_rows(keys, fraction)["row"].to_numpy()
    return storage.mapped(storage.read_rows(session.plan.path(questions), rows))


def _scored_answers(session: Session, target: str, questions: pa.Table, answers: Sequence[pa.Table]) -> pa.Table:
    """What a simulator or a detector makes of all answers about the features of a target."""
    from ray_explain.distributed.features import score_answers

    plan = session.plan
    parents = [plan.answers(run, "features") for run in plan.runs() if _about(run, target, "features")]
    parents += [
        plan.untrained_answers(one) for one in plan.untrained() if (one.target, one.task) == (target, "features")
    ]
    own = FeaturePlan(plan, target)
    return pa.concat_tables(
        score_answers(session, one, parents, answered(session.table(one.descriptions()), questions, answers))
        for one in [own, *own.unlabelled]
    )


def _marks(session: Session) -> list[Callable[[pa.Table, pa.Table, pa.Table], pa.Table]]:
    """What marks descriptions beside exact match, as far as the experiment asks for it: of graded answers, questions
    and answers each makes graded answers."""
    evaluate, found = session.plan.experiment.evaluate, list[Callable[[pa.Table, pa.Table, pa.Table], pa.Table]]()
    if evaluate.embedding is not None:
        from ray_explain.evaluation.embeddings import compared, sentence_encoder

        found.append(partial(compared, encoder=sentence_encoder(evaluate.embedding)))
    if evaluate.judge is not None:
        from ray_explain.endpoints import Chat, Endpoint
        from ray_explain.evaluation.judges import Judge, judged

        endpoint = Endpoint(cache=f"{session.plan.root}/judge", **evaluate.judge.model_dump(exclude={"kind"}))
        found.append(partial(judged, judge=Judge(Chat(endpoint))))
    return found


def _descriptions(session: Session, target: str, questions: pa.Table) -> pa.Table:
    """All descriptions, gold or not, of the features that the questions are about."""
    effects = session.table(session.plan.effects("features", target), ["case_id", "descriptions"])
    asked = pc.is_in(effects.column("case_id"), pc.unique(questions.column("case_id")))
    return split_features(effects.filter(asked))[1]


def _about(run: Run, target: str, task: Task) -> bool:
    return run.target == target and task in run.asked
