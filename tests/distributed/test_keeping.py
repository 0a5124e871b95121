"""Which explainer of a training is kept. Needs no running Ray."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from ray_explain import storage
from ray_explain.artifacts import finished
from ray_explain.config import ClusterConfig, TrainConfig
from ray_explain.distributed import train as driver
from ray_explain.distributed import zero
from ray_explain.distributed.train import best_folder
from ray_explain.distributed.training_loop import _Best, _save, write_explainer
from ray_explain.distributed.training_setup import start_of
from ray_explain.distributed.watching import Watch
from ray_explain.explainer.sidecar import load_explainer
from tests.distributed.training_runs import run_of


@pytest.mark.parametrize(
    ("keep", "scores", "kept"),
    [
        ("best", [0.2, 0.6, 0.4, 0.5], 2),
        ("best", [0.6, 0.2, 0.4, 0.6], 4),  # as good as the best one, and has seen more
        ("best", [0.2, 0.3, 0.4, 0.5], 4),
        ("best", [0.0, 0.0, 0.0, 0.0], 4),
        ("last", [0.2, 0.6, 0.4, 0.5], 4),
    ],
)
def test_the_saved_explainer_has_the_weights_of_the_step_that_is_to_be_kept(
    keep: str,
    scores: list[float],
    kept: int,
    questions: tuple[str, str],
    world_target: Path,
    tmp_path: Path,
) -> None:
    train = TrainConfig.model_validate({"validate_every": 1, "keep": keep, "max_tokens": 100})
    run, root = run_of(train, "kept", questions, world_target), str(tmp_path)
    start = start_of(run, workers=1)
    engine: Any = SimpleNamespace(module=start.explainer)
    watch = Watch(None, run, root, len(scores), first=True)
    best = _Best(run, root, start, watch)
    weight = start.explainer.language_model.get_input_embeddings().weight
    for number, score in enumerate(scores, start=1):
        with torch.no_grad():
            weight.fill_(number)
        watch.last = {"steps": number}
        best.offer(engine, score, last=number == len(scores))
    _save(engine, run, root, start, watch, best, {"workers": 1}, seconds=1.0)
    watch.close()
    saved, _ = load_explainer(run.artifact.path(root))
    assert saved.language_model.get_input_embeddings().weight.unique().tolist() == [kept]
    manifest = finished(run.artifact, root)
    assert manifest is not None
    assert manifest.measured.get("kept_validation_exact") == (max(scores) if keep == "best" else None)
    assert not Path(best_folder(run, root)).exists()


def test_a_worker_lost_while_it_keeps_a_better_explainer_does_not_take_the_one_before_along(
    questions: tuple[str, str], world_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of 1 and 2 were kept, that of 3 half. The next attempt goes on from before them, and finds none better."""
    train = TrainConfig.model_validate({"validate_every": 1, "keep": "best", "max_tokens": 100})
    run, root = run_of(train, "lost", questions, world_target), str(tmp_path)
    start = start_of(run, workers=1)
    engine: Any = SimpleNamespace(module=start.explainer)
    weight = start.explainer.language_model.get_input_embeddings().weight

    def offer(best: _Best, number: int, score: float, *, last: bool = False) -> None:
        with torch.no_grad():
            weight.fill_(number)
        best.offer(engine, score, last=last)

    watch = Watch(None, run, root, 4, first=True)
    best = _Best(run, root, start, watch)
    offer(best, 1, 0.2)
    offer(best, 2, 0.5)
    with monkeypatch.context() as lost, pytest.raises(KeyboardInterrupt):

        def torn(uri: str) -> NoReturn:
            """As on S3, where the files come one after the other."""
            storage.remove(uri)
            storage.write_json({}, f"{uri}/config.json")
            raise KeyboardInterrupt

        lost.setattr(storage, "new_folder", torn)
        offer(best, 3, 0.7)
    best = _Best(run, root, start, watch)
    assert best.score == 0.5
    offer(best, 4, 0.4, last=True)
    watch.last = {"steps": 4}
    _save(engine, run, root, start, watch, best, {"workers": 1}, seconds=1.0)
    watch.close()
    saved, _ = load_explainer(run.artifact.path(root))
    assert saved.language_model.get_input_embeddings().weight.unique().tolist() == [2]
    manifest = finished(run.artifact, root)
    assert manifest is not None and manifest.measured["kept_validation_exact"] == 0.5


def test_an_explainer_that_another_job_has_finished_meanwhile_is_neither_replaced_nor_trained_again(
    questions: tuple[str, str], world_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = TrainConfig.model_validate({"max_tokens": 100})
    run, root = run_of(train, "twice", questions, world_target), str(tmp_path)
    start = start_of(run, workers=1)
    engine: Any = SimpleNamespace(module=start.explainer)
    weight = start.explainer.language_model.get_input_embeddings().weight
    for job in (1, 2):
        with torch.no_grad():
            weight.fill_(job)
        watch = Watch(None, run, root, 1, first=True)
        _save(engine, run, root, start, watch, _Best(run, root, start, watch), {"workers": job}, seconds=1.0)
        watch.close()
    saved, _ = load_explainer(run.artifact.path(root))
    assert saved.language_model.get_input_embeddings().weight.unique().tolist() == [1]
    manifest = finished(run.artifact, root)
    assert manifest is not None and manifest.measured["workers"] == 1
    begun = list[Any]()
    monkeypatch.setattr(driver, "fit", lambda *given: begun.append(given))
    assert driver._beside_others(run, root, ClusterConfig(), board=None) is None
    assert not begun


def test_of_the_model_below_adapters_the_first_worker_gathers_only_what_tells_which_it_is(
    questions: tuple[str, str], world_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model of 70B, the rest would be 140 GB of the host's memory, to write adapters of one."""
    train = TrainConfig.model_validate({"lora": {"rank": 2}, "max_tokens": 100})
    run = run_of(train, "adapters", questions, world_target)
    start = start_of(run, workers=1)
    monkeypatch.setattr(zero, "gathered", lambda *given: nullcontext())
    monkeypatch.setattr(zero.dist, "get_rank", lambda: 0)
    state = zero.whole_state(start.explainer, 3)
    assert state is not None
    trained = {name for name, one in start.explainer.named_parameters() if one.requires_grad}
    assert all(len(tensor) <= 64 and tensor.ndim == 1 for name, tensor in state.items() if name not in trained)
    for kept, folder in [(state, "split"), (None, "whole")]:
        write_explainer(start.explainer, run, start.tokenizer, kept, f"{tmp_path}/{folder}")
        load_explainer(f"{tmp_path}/{folder}")  # sees whether its base is the one
    for name in ("adapter_model.safetensors", "projection.safetensors", "explainer.json"):
        assert (tmp_path / "split" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
