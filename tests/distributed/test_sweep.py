"""What a sweep decides: how many trials at a time, which of them stop, and which setting did best."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_explain.artifacts import Artifact, finish
from ray_explain.config import AshaConfig, ClusterConfig, SweepConfig, TrainConfig
from ray_explain.distributed import sweep
from ray_explain.distributed.plan import Run
from ray_explain.distributed.train import TrainRun


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
def test_only_trials_of_the_same_cell_compete_and_none_is_killed(metric: Any, better: float, worse: float) -> None:
    verdicts = Verdicts()
    rules = sweep.PerCell(
        SweepConfig(metric=metric), AshaConfig(grace=0.2), verdicts, {"good": 0, "bad": 0, "alone": 1}
    )
    trials = {name: in_tune(name) for name in ("good", "bad", "alone")}
    for one in trials.values():
        rules.on_trial_add(None, one)
    for progress in (10, 20, 30):
        for name, value in (("good", better), ("bad", worse), ("alone", 99.0 if metric == "loss" else 0.0)):
            told = rules.on_trial_result(None, trials[name], {"progress": progress, metric: value})
            assert told == "CONTINUE"
        assert verdicts.stopped == ([] if progress < 20 else ["bad"])
    rules.on_trial_complete(None, trials["bad"], {"stopped": True})


def cluster_of(
    monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float], later: dict[str, float] | None = None
) -> None:
    state = SimpleNamespace(state=SimpleNamespace(get_max_resources_from_cluster_config=lambda: later))
    monkeypatch.setattr("ray._private.state", state)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 0.0})


def test_as_many_trials_run_as_the_cluster_has_places_for(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = [trial(1e-3)], [trial(1e-3), trial(1e-4, workers=2)]
    cluster_of(monkeypatch, {"CPU": 4.0})  # more than the machine has
    assert [sweep.concurrent(each, ClusterConfig()) for each in (one, two)] == [2, 1]
    cluster_of(monkeypatch, {"CPU": 4.0}, {"CPU": 5.0})
    assert [sweep.concurrent(each, ClusterConfig()) for each in (one, two)] == [9, 4]
    cluster_of(monkeypatch, {"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0})  # the head has no GPU
    assert sweep.concurrent(two, ClusterConfig(gpus_per_worker=1, gpus_per_actor=1)) == 1
    cluster_of(monkeypatch, {"CPU": 8.0}, later={"CPU": 64.0, "GPU": 8.0})  # none there yet
    assert sweep.concurrent(two, ClusterConfig(gpus_per_worker=1)) == 4


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
