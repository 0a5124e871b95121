"""The steps of an experiment. Each makes what is not there yet, after what it needs; none does anything twice."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ray_explain import storage
from ray_explain.artifacts import Artifact, finish, finished
from ray_explain.config import Task
from ray_explain.distributed.plan import Plan, Run
from ray_explain.errors import BadInput
from ray_explain.evaluation.baselines import baselines
from ray_explain.evaluation.comparisons import comparisons
from ray_explain.evaluation.controls import under_control
from ray_explain.evaluation.grading import grade
from ray_explain.evaluation.metrics import scores
from ray_explain.ground_truth import cases
from ray_explain.ground_truth.balance import balanced
from ray_explain.ground_truth.directions import grouped_by_direction
from ray_explain.ground_truth.features import layers_table, split_features
from ray_explain.ground_truth.pairs import layer_blocks
from ray_explain.ground_truth.released_files import read_folder, write_folder
from ray_explain.ground_truth.splits import training_rows
from ray_explain.questions.ablation import ablation_questions
from ray_explain.questions.features import features_questions
from ray_explain.questions.patching import patching_questions
from ray_explain.stages import Result
from ray_explain.world.corpus import replay_texts
from ray_explain.world.facts import World

ROWS_PER_GROUP = 256  # of the Parquet files that actors read slices of
TABLE = "table.parquet"


@dataclass
class Session:
    """One run of a job: its plan, a console, and Ray, which starts when something first needs it."""

    plan: Plan
    console: Console = field(default_factory=Console)
    _stack: ExitStack = field(default_factory=ExitStack)
    _started: bool = False

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start_ray(self) -> None:
        """Ray is running afterwards."""
        from ray_explain.distributed.cluster import cluster  # takes a second that a finished experiment can save

        if not self._started:
            self._started = True
            self._stack.enter_context(cluster(self.plan.experiment.storage))

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def missing(self, artifacts: Sequence[Artifact]) -> list[Artifact]:
        """Those that are not finished."""
        return [artifact for artifact in artifacts if finished(artifact, self.plan.root) is None]

    def table(self, artifact: Artifact) -> pa.Table:
        """The rows of a finished table."""
        return storage.read_table(self.plan.path(artifact))

    def make_table(self, artifact: Artifact, make: Callable[[], pa.Table | Result]) -> None:
        """A table that is made on the driver, unless it is there."""
        if not self.missing([artifact]):
            return
        started, made = time.monotonic(), make()
        made = made if isinstance(made, Result) else Result(made, [])
        storage.write_table(made.table, f"{self.plan.path(artifact)}/{TABLE}", row_group_size=ROWS_PER_GROUP)
        finish(
            artifact,
            self.plan.root,
            rows=made.table.num_rows,
            dropped=Counter(reason for _, reason in made.dropped),
            seconds=time.monotonic() - started,
            measured=made.measured,
        )


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
    folder = Path(place["model"])
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise BadInput(f"`models.{name}.path` = {place['model']!r}: the folder has no *.safetensors weights")
    try:
        with storage.local_folder(place["model"], weights=False) as local:
            return AutoConfig.from_pretrained(local, revision=place["revision"], trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"`models.{name}.path` = {place['model']!r}: no model can be read there: {reason}") from error


def _tokenizer(plan: Plan, name: str) -> PreTrainedTokenizerBase:
    place = plan.model_place(name)
    with storage.local_folder(place["model"], weights=False) as folder:
        return AutoTokenizer.from_pretrained(folder, revision=place["revision"], trust_remote_code=False)


# -- ground truth -----------------------------------------------------------------------------------------------------


def make_ground_truth(session: Session) -> None:
    """What the targets really do, and the questions about it."""
    plan = session.plan
    make_models(session)
    released = [(target, task) for target, task in plan.target_tasks() if _is_released(plan, task)]
    for target, task in released:
        session.make_table(plan.effects(task, target), lambda k=task, t=target: _released(plan, k, t))  # type: ignore[misc]
    measured = [pair for pair in plan.target_tasks() if pair not in released]
    for target, task in measured:
        session.make_table(plan.cases(task, target), lambda k=task, t=target: _cases(plan, k, t))  # type: ignore[misc]
    if session.missing([plan.effects(task, target) for target, task in measured]):
        from ray_explain.distributed.run_stages import run_stages

        session.say("Ground truth: intervening on the targets")
        session.start_ray()
        run_stages([_stage_job(plan, task, target) for target, task in measured], plan.root, plan.experiment.cluster)
    for target, task in plan.target_tasks():
        session.make_table(plan.questions(task, target), lambda k=task, t=target: _questions(session, k, t))  # type: ignore[misc]


def export_ground_truth(session: Session) -> None:
    """The effects in the schemas of the paper's released data sets, below `released/` in the storage."""
    plan = session.plan
    make_ground_truth(session)
    for target, task in plan.target_tasks():
        section = getattr(plan.experiment.ground_truth, task)
        mmlu = section.path if getattr(section, "source", None) == "mmlu" else None
        place = f"{plan.root}/released/{target}/{task}"
        try:
            with storage.new_folder(place) as folder:
                told = write_folder(
                    session.table(plan.effects(task, target)), task, folder, _tokenizer(plan, target), mmlu=mmlu
                )
        except ValueError as error:
            session.say(f"{task} of {target}: not written: {error}")
            continue
        counts = ", ".join(
            f"{split} {n:,} rows" + (f" ({left} left out)" if left else "") for split, (n, left) in told.items()
        )
        session.say(f"{task} of {target}: {counts} in {place}")


def _is_released(plan: Plan, task: Task) -> bool:
    return getattr(getattr(plan.experiment.ground_truth, task), "source", None) == "released"


def _released(plan: Plan, task: Task, target: str) -> Result:
    """Raises: BadInput: no released data set of the target is in the folder."""
    section = getattr(plan.experiment.ground_truth, task)
    try:
        return read_folder(
            plan.released_folder(task, target),
            task,
            _tokenizer(plan, target),
            d_model=d_model(plan, target),
            n=section.cases.model_dump(),
        )
    except (ValueError, OSError) as error:
        raise BadInput(f"`ground_truth.{task}`: {error}") from error


def _cases(plan: Plan, task: Task, target: str) -> pa.Table | Result:
    """Raises: BadInput: the file of the cases cannot be read, or they do not fit the model or the world."""
    try:
        if task == "features":
            layers = plan.experiment.ground_truth.features.layers  # type: ignore[union-attr]
            return layers_table(range(n_layers(plan, target)) if layers == "all" else layers)
        made = _ablation_cases(plan, target) if task == "ablation" else _patching_cases(plan, target)
    except (ValueError, FileNotFoundError) as error:
        raise BadInput(f"`ground_truth.{task}`: {error}") from error
    _check_splits(plan, f"`ground_truth.{task}`", made)
    return made


def _patching_cases(plan: Plan, target: str) -> Result:
    section = plan.experiment.ground_truth.patching
    assert section is not None
    blocks = layer_blocks(n_layers(plan, target), section.blocks) if isinstance(section.blocks, int) else section.blocks
    return cases.patching_cases(
        _source(plan, section.path),
        _tokenizer(plan, target),
        format="counterfact" if section.source == "counterfact" else "jsonl",
        form=section.form,
        n=section.cases.model_dump(),
        blocks=blocks,
        seed=plan.experiment.seed,
    )


def _ablation_cases(plan: Plan, target: str) -> Result:
    section = plan.experiment.ground_truth.ablation
    assert section is not None
    return cases.ablation_cases(
        _source(plan, section.path),
        _tokenizer(plan, target),
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

    config = plan.model_place(target)
    if task == "features":
        section = plan.experiment.ground_truth.features
        assert section is not None
        config |= section.model_dump(exclude={"layers"}) | {
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
    by = getattr(getattr(plan.experiment.ground_truth, task), "balance", [])
    if by:
        effects, before, after = balanced(effects, by, seed=seed)
        counts = {"cases before balancing": before, "cases after balancing": after}
    if task == "features":
        features, descriptions = split_features(effects)
        features = grouped_by_direction(features, seed=seed)
        made = features_questions(features, descriptions, wording=wording, seed=seed)
    elif task == "patching":
        tokenizer = _tokenizer(plan, target)
        made = patching_questions(effects, lambda text: _token_texts(tokenizer, text), wording=wording, seed=seed)
    else:
        made = ablation_questions(effects, d_model=d_model(plan, target), wording=wording, seed=seed)
    _check_splits(plan, f"{task} of {target}", made)
    return made._replace(measured=counts)


def _check_splits(plan: Plan, what: str, made: Result) -> None:
    """Raises: BadInput: the training split or the one to be evaluated is empty."""
    splits = set(made.table.column("split").to_pylist())
    for split in ("train", plan.experiment.evaluate.split):
        if split not in splits:
            reasons = Counter(reason for _, reason in made.dropped).most_common(3)
            why = f" ({', '.join(f'{count} dropped: {reason}' for reason, count in reasons)})" if reasons else ""
            raise BadInput(f"{what}: split {split!r} is empty{why}; give more cases, or lines with this `split`")


def _token_texts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    return [str(tokenizer.decode([token])) for token in tokenizer.encode(text)]


# -- explainers -------------------------------------------------------------------------------------------------------


def train_explainers(session: Session) -> None:
    """An explainer for each run of the plan.

    Raises:
        BadInput: texts are to be replayed, but no model of the experiment has read the world's.
    """
    plan = session.plan
    make_ground_truth(session)
    missing = [run for run in plan.runs() if session.missing([plan.explainer(run)])]
    if missing:
        from ray_explain.distributed.train import train_all

        session.say(f"Explainers: training {len(missing)}")
        session.start_ray()
        _align(plan, missing)
        train_all([_train_run(session, run) for run in missing], plan.root, plan.experiment.cluster)


def _align(plan: Plan, runs: Sequence[Run]) -> None:
    from ray_explain.distributed.alignment import AlignmentJob, align_all

    jobs = [
        AlignmentJob(
            artifact=artifact,
            target=plan.model_place(run.target),
            explainer=plan.model_place(run.explainer),
            questions=tuple(plan.path(plan.questions(task, run.target)) for task in run.tasks),
        )
        for run in runs
        if (artifact := plan.alignment(run)) is not None
    ]
    align_all(jobs, plan.root, gpus=plan.experiment.cluster.gpus_per_actor)


def _train_run(session: Session, run: Run) -> Any:
    from ray_explain.distributed.train import TrainRun

    plan = session.plan
    train, questions = plan.train_config(run), [plan.questions(task, run.target) for task in run.tasks]
    asked = sum(training_rows(session.table(table), run.fraction).num_rows for table in questions)
    if train.replay and plan.experiment.models[run.explainer].pretrain is None:
        raise BadInput(
            "`train.replay` replays texts of the synthetic world, which other models never read: set it to 0"
        )
    texts = replay_texts(plan.experiment.world.world(), round(asked * train.replay), run.seed)
    return TrainRun(
        artifact=plan.explainer(run),
        model=plan.model_place(run.explainer),
        target={"name": run.target, "revision": plan.experiment.models[run.target].revision},
        questions=tuple(plan.path(table) for table in questions),
        replay=tuple(texts),
        train=train,
        seed=run.seed,
        wording=plan.experiment.ground_truth.wording,
        fraction=run.fraction,
        alignment=None if (maps := plan.alignment(run)) is None else plan.path(maps),
    )


# -- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(session: Session) -> None:
    """Every explainer's answers to the held-out questions, and all scores."""
    plan = session.plan
    train_explainers(session)
    for asked in dict.fromkeys(answers.parents[-1] for answers in plan.scores().parents):
        session.make_table(asked, lambda table=asked: _asked(session, table))  # type: ignore[misc]
    answers = plan.scores().parents
    if session.missing(answers):
        from ray_explain.distributed.run_stages import run_stages

        session.say("Evaluation: asking the explainers")
        session.start_ray()
        run_stages(_answer_jobs(plan), plan.root, plan.experiment.cluster)
    if session.missing([plan.scores()]):
        session.say("Evaluation: scoring the answers")
        _make_scores(session)


def _asked(session: Session, asked: Artifact) -> pa.Table:
    """The questions of the split, once for each control."""
    questions = session.table(asked.parents[0])
    questions = questions.filter(pc.equal(questions.column("split"), asked.config["split"]))
    return pa.concat_tables(
        under_control(questions, control, asked.config["seed"]).append_column(
            pa.field("control", pa.string(), nullable=False), pa.array([control] * questions.num_rows)
        )
        for control in ["none", *asked.config["controls"]]
    )


def _answer_jobs(plan: Plan) -> list[Any]:
    from ray_explain.distributed.run_stages import StageJob
    from ray_explain.evaluation.answering import AnswerStage

    evaluate = plan.experiment.evaluate
    common = {
        "max_new_tokens": evaluate.max_new_tokens,
        "batch_size": evaluate.batch_size,
        "max_tokens": plan.experiment.train.max_tokens,
    }
    jobs = []
    for run in plan.runs():
        for task in run.tasks:
            own: dict[str, Any] = {"explainer": run.explainer, "folder": plan.path(plan.explainer(run))}
            jobs.append((run.target, own, plan.answers(run, task)))
    for target, task in plan.target_tasks() if evaluate.untrained else []:
        injection = plan.experiment.train.injection.model_dump(exclude={"projection"})
        own = {"explainer": "untrained", **plan.model_place(target), "injection": injection}
        jobs.append((target, own, plan.untrained_answers(target, task)))
    return [
        StageJob(
            stage=AnswerStage,
            config=common | own | {"d_target": d_model(plan, target)},
            source=plan.path(answers.parents[-1]),
            artifact=answers,
        )
        for target, own, answers in jobs
    ]


def _make_scores(session: Session) -> None:
    """Tables `graded`, `scores` and `comparisons` in the scores' directory."""
    plan, started = session.plan, time.monotonic()
    graded = pa.concat_tables(_graded(session, target, task) for target, task in plan.target_tasks())
    evaluate, seed, folder = plan.experiment.evaluate, plan.experiment.seed, plan.path(plan.scores())
    tables = {
        "graded": graded,
        "scores": scores(graded, seed=seed, resamples=evaluate.resamples),
        "comparisons": comparisons(graded, seed=seed, resamples=evaluate.resamples),
    }
    for name, table in tables.items():
        storage.write_table(table, f"{folder}/{name}/{TABLE}")
    finish(plan.scores(), plan.root, rows=graded.num_rows, seconds=time.monotonic() - started)


def _graded(session: Session, target: str, task: Task) -> pa.Table:
    """All answers about a target on a task held against the truth, those of baselines among them."""
    plan = session.plan
    questions = session.table(plan.questions(task, target))
    held_out = questions.filter(pc.equal(questions.column("split"), plan.experiment.evaluate.split))
    runs = [run for run in plan.runs() if _about(run, target, task)]
    given = [(run.seed, run.fraction, session.table(plan.answers(run, task))) for run in runs]
    if plan.experiment.evaluate.untrained:
        given.append((0, 0.0, session.table(plan.untrained_answers(target, task))))
    for fraction in plan.experiment.fractions:
        known = training_rows(questions, fraction)
        given += [(0, fraction, answers) for answers in baselines(known, held_out)]
    alike: dict[tuple[int, float], list[pa.Table]] = {}
    for seed, fraction, answers in given:
        alike.setdefault((seed, fraction), []).append(answers)
    descriptions = _descriptions(session, target, held_out) if task == "features" else None
    return pa.concat_tables(
        grade(held_out, pa.concat_tables(answers), descriptions, target=target, seed=seed, fraction=fraction)
        for (seed, fraction), answers in alike.items()
    )


def _descriptions(session: Session, target: str, questions: pa.Table) -> pa.Table:
    """All descriptions, gold or not, of the features that the questions are about."""
    effects = session.table(session.plan.effects("features", target))
    asked = pc.is_in(effects.column("case_id"), pc.unique(questions.column("case_id")))
    return split_features(effects.filter(asked))[1]


def _about(run: Run, target: str, task: Task) -> bool:
    return run.target == target and task in run.tasks
