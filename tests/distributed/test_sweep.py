"""What a sweep decides: how many trials at a time, which of them stop, and which setting did best."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.tune import Trainable, TuneError
from ray.tune.execution.class_cache import _ActorClassCache

from jobs import sweep as job
from ray_explain import storage
from ray_explain.artifacts import Artifact, finish
from ray_explain.config import AshaConfig, ClusterConfig, SweepConfig, TrainConfig
from ray_explain.distributed import sweep
from ray_explain.distributed.capacity import HEAD, Fleet, Kind
from ray_explain.distributed.checks import code_here
from ray_explain.distributed.plan import Run
from ray_explain.distributed.run_stages import make_here
from ray_explain.distributed.train import TrainRun
from ray_explain.distributed.training_loop import write_explainer
from ray_explain.distributed.training_setup import start_of
from ray_explain.errors import JobFailed

SWEEP: dict[str, Any] = {
    "name": "sweep",
    "targets": ["llama"],
    "explainers": ["llama"],
    "fractions": [0.5, 1.0],
    "ground_truth": {"wording": "brief", "ablation": {"cases": {"train": 24, "test": 8}}},
    "train": {"mixtures": [["ablation"]], "batch_size": 8},
    "sweep": {"parameters": {"learning_rate": [1e-3, 2e-3, 3e-3, 4e-3]}, "asha": {}},
    "evaluate": {"max_new_tokens": 4, "resamples": 100},
}


def trial(rate: float, *, seed: int = 0, fraction: float = 1.0, workers: int = 1, explainer: str = "a") -> sweep.Trial:
    """A trial of a setting of the learning rate."""
    train = TrainConfig(learning_rate=rate, workers=workers)
    config = {"rate": rate, "seed": seed, "fraction": fraction}
    run = TrainRun(
        artifact=Artifact(kind="explainers", label=explainer, config=config),
        model={},
        target={},
        questions=(),
        replay=(),
        train=train,
        seed=seed,
        wording="brief",
        fraction=fraction,
    )
    return sweep.Trial(
        run=Run(explainer, "t", ("ablation",), seed, fraction),
        parameters={"learning_rate": rate},
        train=run,
        answers=(),
        scores=Artifact(kind="trial_scores", label=explainer, config=config),
        stopped=Artifact(kind="stopped_trials", label=explainer, config=config),
        resamples=100,
    )


class Verdicts:
    """Keeps the names of those that shall stop, as the actor does."""

    def __init__(self) -> None:
        self.stopped: list[str] = []
        self.stop = SimpleNamespace(remote=self.stopped.append)


def in_tune(name: str) -> Any:
    return SimpleNamespace(trial_id=name, config={"trial": {"name": name}})


@pytest.mark.parametrize(("metric", "better", "worse"), [("loss", 1.0, 2.0), ("validation_exact", 0.7, 0.5)])
def test_only_trials_of_the_same_cell_compete_and_none_is_killed(
    metric: Any, better: float, worse: float, tmp_path: Path
) -> None:
    verdicts = Verdicts()
    cells = {"good": 0, "bad": 0, "alone": 1}
    rules = sweep.PerCell(SweepConfig(metric=metric), AshaConfig(grace=0.2), verdicts, cells, str(tmp_path))
    trials = {name: in_tune(name) for name in ("good", "bad", "alone")}
    for one in trials.values():
        rules.on_trial_add(None, one)
    for progress in (10, 20, 30):
        for name, value in (("good", better), ("bad", worse), ("alone", 99.0 if metric == "loss" else 0.0)):
            told = rules.on_trial_result(None, trials[name], {"progress": progress, metric: value})
            assert told == "CONTINUE"
        assert verdicts.stopped == ([] if progress < 20 else ["bad"])
    rules.on_trial_complete(None, trials["bad"], {"stopped": True})


def test_a_sweep_that_is_started_again_holds_its_trials_against_those_of_earlier_starts(tmp_path: Path) -> None:
    """One whose own reports are there is judged on from where it was, and never against itself."""

    def start() -> tuple[sweep.PerCell, list[str]]:
        verdicts, cells = Verdicts(), {"done": 0, "half": 0, "new": 0, "elsewhere": 1}
        return sweep.PerCell(SweepConfig(), AshaConfig(grace=0.2), verdicts, cells, str(tmp_path)), verdicts.stopped

    def report(rules: sweep.PerCell, name: str, *progresses: int, loss: float) -> None:
        rules.on_trial_add(None, in_tune(name))
        for progress in progresses:
            rules.on_trial_result(None, in_tune(name), {"progress": progress, "loss": loss, "steps": 3})

    first, stopped = start()
    report(first, "done", 10, 20, 40, 80, 100, loss=1.0)
    first.on_trial_complete(None, in_tune("done"), {"progress": 100, "loss": 1.0})
    report(first, "half", 10, 20, loss=0.9)
    for _ in range(2):  # also what the second start heard is known to the third
        again, stopped = start()
        report(again, "elsewhere", 20, loss=9.0)
        report(again, "new", 20, loss=2.0)
        report(again, "half", 20, loss=1.5)  # it went on there, and that stays so
        report(again, "half", 40, loss=0.9)
        assert stopped == ["new"]
        (tmp_path / "new.json").unlink()


def test_no_key_is_sent_along_to_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would write it to the log of its runtime environments."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "SECURITY_TOKEN"):
        monkeypatch.setenv(f"AWS_{name}", "secret")
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    sent = _ActorClassCache().get(Trainable)._default_options["runtime_env"]["env_vars"]
    assert "secret" not in sent.values() and sent["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.2"


def test_as_many_trials_run_as_the_cluster_has_places_for(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = [trial(1e-3)], [trial(1e-3), trial(1e-4, workers=2)]

    def at_a_time(
        trials: list[sweep.Trial],
        *nodes: dict[str, float],
        come: Sequence[Kind] = (),
        gpus: float = 0,
        to_answer: float = 0,
    ) -> int:
        found = Fleet(list(nodes), list(come), sum(kind.most for kind in come))
        monkeypatch.setattr(sweep, "fleet", lambda _: found)
        return sweep.concurrent(trials, ClusterConfig(gpus_per_worker=gpus, gpus_per_actor=to_answer))

    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert [at_a_time(each, {"CPU": 4.0}) for each in (one, two)] == [2, 1]  # more than the machine has
    assert [at_a_time(each, {"CPU": 4.0}, {"CPU": 5.0}) for each in (one, two)] == [9, 4]
    assert at_a_time(two, {"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}, gpus=1) == 1  # the head has no GPU
    assert at_a_time(two, {"CPU": 8.0}, come=[Kind({"CPU": 8, "GPU": 1}, 8)], gpus=1) == 4  # none there yet
    assert at_a_time(one, {"CPU": 4.0, HEAD: 1.0}, come=[Kind({"CPU": 8}, 2)]) == 20
    assert at_a_time(two, {"CPU": 8.0, "GPU": 1.0}, gpus=0.5, to_answer=1) == 1  # as a pipeline may run them
    assert at_a_time(one, {"CPU": 8.0, "GPU": 1.0}, gpus=0.25, to_answer=0.5) == 2


def test_a_setting_is_judged_by_the_mean_of_its_runs_on_the_largest_fraction(tmp_path: Path) -> None:
    losses = {
        (1e-3, 0, 1.0): 0.5,
        (1e-3, 1, 1.0): 0.6,
        (1e-4, 0, 1.0): 0.4,
        (1e-4, 1, 1.0): 0.9,
        (1e-4, 0, 0.1): 0.0,  # plays no part
        (1e-5, 0, 1.0): 0.1,  # its other seed did not come to its end
    }
    trials = []
    for (rate, seed, fraction), loss in losses.items():
        trials.append(trial(rate, seed=seed, fraction=fraction))
        finish(trials[-1].train.artifact, str(tmp_path), measured={"loss": loss, "validation_exact": loss})
    trials.append(trial(1e-5, seed=1))
    best = {m: sweep.best_settings(trials, str(tmp_path), SweepConfig(metric=m)) for m in ("loss", "validation_exact")}
    assert best["loss"] == {("a", "t"): {"learning_rate": 1e-3}}
    assert best["validation_exact"] == {("a", "t"): {"learning_rate": 1e-4}}


def test_a_setting_is_not_judged_by_the_control_without_vectors(tmp_path: Path) -> None:
    """Explainers of other models have none: the settings of self would be chosen by another rule than theirs."""
    trials = []
    for rate, loss, without in ((1e-3, 0.5, 0.6), (1e-4, 0.4, 0.9)):
        own, text = trial(rate), trial(rate, seed=1)
        trials += [own, replace(text, run=own.run._replace(text_only=True))]
        for one, value in ((own, loss), (text, without)):
            finish(one.train.artifact, str(tmp_path), measured={"loss": value})
    assert sweep.best_settings(trials, str(tmp_path), SweepConfig()) == {("a", "t"): {"learning_rate": 1e-4}}


def test_where_none_came_to_its_end_on_the_largest_fraction_the_next_decides(tmp_path: Path) -> None:
    """Else the report would be of settings that no trial has, and train them."""
    trials = [trial(rate, fraction=fraction) for fraction in (1.0, 0.3, 0.1) for rate in (1e-3, 1e-4)]
    for one, loss in zip(trials[2:], (0.5, 0.4, 0.1, 0.2)):
        finish(one.train.artifact, str(tmp_path), measured={"loss": loss})
    assert sweep.best_settings(trials, str(tmp_path), SweepConfig()) == {("a", "t"): {"learning_rate": 1e-4}}


def test_a_setting_is_judged_by_the_explainer_that_is_kept(tmp_path: Path) -> None:
    """The first one's last explainer is worse than the second's, but a better one came before it, and was kept."""
    trials = [trial(1e-3), trial(1e-4)]
    for one, measured in zip(
        trials, ({"validation_exact": 0.2, "kept_validation_exact": 0.8}, {"validation_exact": 0.5})
    ):
        finish(one.train.artifact, str(tmp_path), measured=measured)
    best = sweep.best_settings(trials, str(tmp_path), SweepConfig(metric="validation_exact"))
    assert best == {("a", "t"): {"learning_rate": 1e-3}}


@pytest.fixture
def last_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What a trial tells Tune, and who watches, whose training raises this error."""

    def told(error: Exception, code: str = code_here(), root: Path = tmp_path) -> dict[str, Any]:
        def fails(*_: Any, **__: Any) -> None:
            raise error

        one, reports = trial(1e-3), list[dict[str, Any]]()
        monkeypatch.setattr(sweep, "fit", fails)
        monkeypatch.setattr(sweep, "TuneReportCallback", lambda: None)
        monkeypatch.setattr(sweep.tune, "report", reports.append)
        board = Mock()
        known: dict[str, Any] = {"trials": {one.name: one}, "root": str(root), "verdicts": None, "board": board}
        sweep._trial({"trial": one.config}, **known, cluster=ClusterConfig(), code=code)
        [report] = reports
        board.say.remote.assert_called_once_with(f"trial {one.name} failed: {report['failure']}")
        return report

    return told


def test_a_trial_is_listed_with_its_own_error_whatever_that_is(last_word: Callable[..., dict[str, Any]]) -> None:
    assert last_word(OSError("disk\nno space left")) == {"failure": "OSError: no space left"}
    assert last_word(KeyError("lost")) == {"failure": "KeyError: 'lost'"}
    assert last_word(JobFailed("the loss is not finite")) == {"failure": "the loss is not finite"}


@pytest.mark.parametrize(("full", "words"), [(ObjectStoreFullError, "--object-store-memory"), (OutOfDiskError, "disk")])
def test_a_trial_that_meets_a_full_object_store_says_what_to_do(
    full: type[Exception], words: str, last_word: Callable[..., dict[str, Any]]
) -> None:
    of_a_task = RayTaskError("_evaluate", "Traceback\nlast line", full("no room"))
    for error in (full("no room"), of_a_task, of_a_task.as_instanceof_cause()):
        failure = last_word(error)["failure"]
        assert failure.startswith("Ray's object store is full") and words in failure


def test_a_trial_whose_machine_was_lost_is_left_to_tune(last_word: Callable[..., dict[str, Any]]) -> None:
    for lost in (ActorDiedError(), WorkerCrashedError(), NodeDiedError("gone")):
        with pytest.raises(type(lost)):
            last_word(lost)
    outcomes = sweep._Outcomes()
    ended = SimpleNamespace(
        config={"trial": {"name": "a"}}, get_error=lambda: TuneError("Traceback\nNodeDiedError: gone")
    )
    outcomes.on_trial_error(1, [], ended)
    assert outcomes.deaths == {"a": "NodeDiedError: gone"}


def test_a_trial_on_a_node_that_came_later_with_other_code_or_storage_says_so(
    last_word: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    error, other = KeyError(), "Python 3.11.7, code 0123456789ab"
    failure = last_word(error, code=other)["failure"]
    assert "another version" in failure and other in failure and code_here() in failure
    assert "does not see the storage" in last_word(error, root=tmp_path / "elsewhere")["failure"]


class Cluster:
    """Stands in for Ray: stages run in this process, and explainers are saved as they are before training."""

    def __init__(self, fates: dict[float, str]) -> None:
        self.fates = fates  # learning rate -> what becomes of its trials
        self.fates_of_seeds = dict[tuple[float, int], str]()  # (learning rate, seed) -> what becomes of these instead
        self.reports: list[dict[str, Any]] = []

    def fit(self, train: TrainRun, root: str, *_: Any, **__: Any) -> str | None:
        rate = train.train.learning_rate
        fate = self.fates_of_seeds.get((rate, train.seed), self.fates[rate])
        if fate == "failed":
            return "its loss is not finite"
        if fate == "done":
            start = start_of(train, 1)
            with storage.new_folder(train.artifact.path(root)) as folder:
                write_explainer(start.explainer, train, start.tokenizer, None, folder)
            measured = {"loss": train.train.learning_rate, "steps": 7}
            finish(train.artifact, root, rows=len(start.examples), measured=measured)
        return None

    def run(self, trials: Any, plan: Any, n: int, cells: Any) -> dict[str, str]:
        """As `sweep._run`, one after the other."""
        known = {"trials": {one.name: one for one in trials}, "root": plan.root, "verdicts": self, "board": Mock()}
        failures = {}
        for one in trials:
            sweep._trial({"trial": one.config}, **known, cluster=plan.experiment.cluster, code=code_here())
            failures |= {one.name: self.reports[-1]["failure"]} if "failure" in self.reports[-1] else {}
        return failures

    @property
    def end_of(self) -> Any:
        """The verdicts' word on a training that was stopped."""
        return SimpleNamespace(remote=lambda name: {"loss": 9.0, "steps": 3, "progress": 40})


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster({1e-3: "done", 2e-3: "done", 3e-3: "stopped", 4e-3: "failed"})
    monkeypatch.setattr(sweep, "fit", made.fit)
    monkeypatch.setattr(sweep, "_run", made.run)
    monkeypatch.setattr(sweep, "concurrent", lambda *_: 1)
    monkeypatch.setattr(sweep, "TuneReportCallback", lambda: None)
    monkeypatch.setattr(sweep.tune, "report", made.reports.append)
    monkeypatch.setattr(sweep.ray, "get", lambda value: value)
    here = SimpleNamespace(remote=sweep._evaluate._function)
    monkeypatch.setattr(sweep, "_evaluate", SimpleNamespace(options=lambda **_: here))
    monkeypatch.setattr("ray_explain.distributed.session.Session.start_ray", lambda _: None)
    monkeypatch.setattr("ray_explain.distributed.run_stages.run_stages", make_here)
    return made


def test_a_sweep_ends_with_all_trials_listed_and_a_report_of_the_best(
    pretended: Cluster, world_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, config = tmp_path / "run", tmp_path / "sweep.yaml"
    config.write_text(yaml.safe_dump(SWEEP | {"storage": str(root), "models": {"llama": {"path": str(world_target)}}}))
    assert job.main(["--config", str(config)]) == 1
    assert "2 of 8 trials failed" in (said := capsys.readouterr().err) and "loss is not finite" in said
    rows = storage.read_table(f"{root}/sweep/trials").to_pylist()
    told = {(json.loads(row["parameters"])["learning_rate"], row["fraction"]): row for row in rows}
    assert [told[rate, 1.0]["status"] for rate in (1e-3, 2e-3, 3e-3, 4e-3)] == ["done", "done", "stopped", "failed"]
    assert sorted(key for key, row in told.items() if row["chosen"]) == [(1e-3, 0.5), (1e-3, 1.0)]
    assert told[3e-3, 1.0]["steps"] == 3 and "not finite" in told[4e-3, 0.5]["error"]
    scores = storage.read_table(f"{root}/sweep/scores").to_pylist()
    assert {json.loads(row["parameters"])["learning_rate"] for row in scores} == {1e-3, 2e-3}
    report = json.loads((root / "report" / "scores.json").read_text())
    trained = [made for made in report["provenance"] if made["kind"] == "explainers"]
    assert [made["config"]["learning_rate"] for made in trained] == [1e-3, 1e-3]
    assert {row["fraction"] for row in scores} == {0.5, 1.0}
    pretended.fates[4e-3] = "done"  # mended
    pretended.reports.clear()
    assert job.main(["--config", str(config)]) == 0
    assert len(pretended.reports) == 2  # what had ended was left as it was


def test_no_step_of_a_sweep_has_all_questions_with_their_vectors_in_memory(
    pretended: Cluster, world_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those about all features of an 8B model are 64 GiB, twice the memory of the head in cluster.yaml."""
    whole, read = list[str](), storage.read_tables

    def seen(uri: str, columns: list[str] | None = None) -> Any:
        if Path(uri).parent.name.endswith(("_questions", "_asked")) and (columns is None or "vectors" in columns):
            whole.append(uri)
        return read(uri, columns)

    monkeypatch.setattr(storage, "read_tables", seen)
    config, target = tmp_path / "sweep.yaml", {"models": {"llama": {"path": str(world_target)}}}
    alone = {"sweep": {"parameters": {"learning_rate": [1e-3]}}}
    config.write_text(yaml.safe_dump(SWEEP | target | alone | {"storage": str(tmp_path)}))
    assert job.main(["--config", str(config)]) == 0
    assert (tmp_path / "report" / "scores.json").exists() and not whole


def test_seeds_of_the_chosen_settings_that_were_stopped_or_failed_are_said_to_be_missing(
    pretended: Cluster, world_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In what is printed, in the table of trials and in the report."""
    root, config = tmp_path / "run", tmp_path / "sweep.yaml"
    own = {"storage": str(root), "models": {"llama": {"path": str(world_target)}}, "seeds": [0, 1, 2]}
    own["sweep"] = {"parameters": {"learning_rate": [1e-3, 3e-3]}, "asha": {}}
    config.write_text(yaml.safe_dump(SWEEP | own | {"fractions": [1.0]}))
    pretended.fates_of_seeds = {(1e-3, 1): "stopped", (1e-3, 2): "failed"}
    assert job.main(["--config", str(config)]) == 1
    told = "llama of llama, ablation, fraction 1: of 3 seeds 1 stopped early (1) and 1 failed (2), the report has 1"
    said = " ".join(capsys.readouterr().out.split())
    assert told in said and "start it again with sweep.asha=null" in said
    assert told in (root / "report" / "index.html").read_text() and told in (root / "report" / "tables.md").read_text()
    rows = storage.read_table(f"{root}/sweep/trials").to_pylist()
    assert [(row["seed"], row["in_report"]) for row in rows if row["chosen"]] == [(0, True), (1, False), (2, False)]
    assert not any(row["in_report"] for row in rows if not row["chosen"])

    alone = ["sweep.asha=null", "sweep.parameters.learning_rate=[0.001]"]  # as it said
    pretended.fates_of_seeds.clear()
    pretended.reports.clear()
    assert job.main(["--config", str(config), *alone]) == 0
    assert len(pretended.reports) == 2
    assert "came to their end" not in capsys.readouterr().out + (root / "report" / "index.html").read_text()


def test_what_a_report_lacks_is_told_for_each_of_its_series() -> None:
    runs = [Run("a", "t", ("ablation",), seed, share) for share in (1.0, 0.1) for seed in (0, 1)]
    statuses = dict(zip(runs, ["done", "done", "stopped", "stopped"]))
    assert sweep.lacking(statuses) == (
        "Not all trials of the chosen settings came to their end. a of t, ablation, fraction 0.1: of 2 seeds 2 stopped "
        "early (0, 1), the report has none."
    )
    assert sweep.lacking(dict.fromkeys(runs, "done")) == ""


def test_a_sweep_of_which_nothing_is_done_says_that_there_is_no_report(
    pretended: Cluster, world_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, own = tmp_path / "sweep.yaml", {"models": {"llama": {"path": str(world_target)}}}
    config.write_text(yaml.safe_dump(SWEEP | own | {"storage": str(tmp_path / "run"), "fractions": [1.0]}))
    assert job.main(["--config", str(config), "sweep.parameters.learning_rate=[0.003, 0.004]"]) == 1
    assert "No report: no trial of the chosen settings is done" in capsys.readouterr().out
