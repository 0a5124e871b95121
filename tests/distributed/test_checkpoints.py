"""Shares of checkpoints on a worker's machine: few at a time, in files of a bounded size. Needs no running Ray; what is
in them is tested in test_zero."""

import shutil
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from ray_explain.distributed import checkpoints, training_loop
from ray_explain.distributed.checkpoints import load_shares, save_share, state_of


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The only worker, with a folder for temporary files of its own."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def stepped(seed: int) -> Any:
    """An engine without ZeRO after a step."""
    torch.manual_seed(seed)
    module = nn.Sequential(*(nn.Linear(10, 10, bias=False) for _ in range(5)), nn.Linear(10, 30, bias=False))
    adam = torch.optim.AdamW(module.parameters())
    module(torch.randn(4, 10)).square().sum().backward()
    adam.step()
    return SimpleNamespace(
        module=module, optimizer=adam, zero_optimization_stage=lambda: 0, bfloat16_enabled=lambda: False
    )


def test_a_share_goes_through_memory_in_parts_and_comes_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_NUMBERS", 200)
    engine, other = stepped(0), stepped(1)
    save_share(engine, str(tmp_path), {"step": 1})
    files = sorted(tmp_path.glob("*.safetensors"))
    sizes = []
    for file in files:
        with safe_open(file, "pt") as opened:
            sizes.append(sum(opened.get_tensor(key).numel() for key in opened.keys()))  # noqa: SIM118
    assert sizes == [600, 600, 300, 900], "weights and two moments each; one parameter is larger than a part"
    load_shares(other, str(tmp_path))
    for own, its in zip(engine.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(own, its)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(engine.optimizer.state[own][moment], other.optimizer.state[its][moment])
    files[1].unlink()
    assert state_of(str(tmp_path)) is None


def test_a_share_waits_until_the_one_before_it_is_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    lying, said = list[int](), list[str]()

    def taken_up_later(metrics: Any, *, checkpoint: ray.train.Checkpoint, checkpoint_upload_mode: Any) -> None:
        folder = Path(checkpoint.path)
        lying.append(len(list(folder.parent.iterdir())))
        threading.Timer(0.2, shutil.rmtree, [folder]).start()

    monkeypatch.setattr(ray.train, "report", taken_up_later)
    monkeypatch.setattr(training_loop, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(training_loop, "_SECONDS_UNTIL_SAID", 0.05)
    scratch, say = training_loop._scratch(SimpleNamespace(name="run")), SimpleNamespace(remote=said.append)  # type: ignore[arg-type]
    engine = stepped(0)
    for step in (1, 2, 3):
        training_loop._report(engine, {"step": step}, {}, scratch, say)
    assert lying == [1, 1, 1]
    assert "`train.checkpoint_every`" in said[0]


def test_what_a_killed_attempt_left_is_removed_by_the_next_one() -> None:
    run: Any = SimpleNamespace(name="run")
    left = training_loop._scratch(run) / "0-500"
    left.mkdir(parents=True)
    training_loop._scratch(run)
    assert not left.exists()
