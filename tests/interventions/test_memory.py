"""How much memory is taken where nobody says it."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from ray_explain.interventions import memory
from ray_explain.interventions.memory import free_budget

GIB = 2**30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Has 40 GiB to give; the folder of the files that would limit a container on it."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=40 * GIB))
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    return tmp_path


def limit(container: Path, *, to: str, used: int = 0, of_files: int = 0) -> None:
    """As Linux tells it: files that are kept in memory count as used."""
    (container / "memory.max").write_text(f"{to}\n")
    (container / "memory.current").write_text(f"{used + of_files}\n")
    (container / "memory.stat").write_text(f"anon {used}\nfile {of_files}\ninactive_file {of_files}\nactive_file 0\n")


def test_on_a_cpu_it_is_half_of_what_is_free_or_less_shared_by_all_actors(machine: Path) -> None:
    assert free_budget(torch.device("cpu")) == 16 * GIB
    assert free_budget(torch.device("cpu"), 1 / 2) == 8 * GIB
    limit(machine, to="max", used=20 * GIB)
    assert free_budget(torch.device("cpu")) == 16 * GIB


def test_a_container_gives_no_more_than_its_limit(machine: Path) -> None:
    limit(machine, to=f"{10 * GIB}")
    assert free_budget(torch.device("cpu")) == 4 * GIB


def test_what_is_used_in_a_container_is_not_free_but_for_files_kept_in_memory(machine: Path) -> None:
    limit(machine, to=f"{10 * GIB}", used=5 * GIB)
    assert free_budget(torch.device("cpu")) == 2 * GIB
    limit(machine, to=f"{10 * GIB}", used=1 * GIB, of_files=9 * GIB)
    assert free_budget(torch.device("cpu")) == 4 * GIB
    limit(machine, to=f"{100 * GIB}", used=5 * GIB)
    assert free_budget(torch.device("cpu")) == 16 * GIB


def test_a_little_more_or_less_free_memory_makes_no_difference(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=40 * GIB - 12_345_678))
    assert free_budget(torch.device("cpu")) == 16 * GIB


def test_on_a_gpu_it_is_of_what_the_weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (62 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 18 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 16 * GIB)
    assert free_budget(torch.device("cuda:0")) == 32 * GIB
    assert free_budget(torch.device("cuda:0"), 0.5) == 16 * GIB


def test_there_is_some_where_nothing_is_free(machine: Path) -> None:
    limit(machine, to=f"{10 * GIB}", used=11 * GIB)
    assert free_budget(torch.device("cpu")) == 1
