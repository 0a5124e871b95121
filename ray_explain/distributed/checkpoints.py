"""Checkpoints of a training: every worker writes its share, and any number of workers can go on from them."""

import json
import os
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TAG = "engine"  # of DeepSpeed's part of a checkpoint
_UNIVERSAL = "engine_universal"  # the same, cut for any number of workers
_STATE = "state.json"


def save_share(engine: Any, folder: str, state: dict[str, Any]) -> None:
    """Write this worker's share of a checkpoint to its own `folder`; all workers must call it.

    Frozen parameters are left out: those of a LoRA explainer are the base model's. Beside the share lies how large each
    of its files is, so that a checkpoint that was cut is known as such.
    """
    engine.save_checkpoint(folder, tag=TAG, exclude_frozen_parameters=True)
    rank = dist.get_rank()
    if rank == 0:
        Path(folder, _STATE).write_text(json.dumps({**state, "workers": dist.get_world_size()}))
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
    Path(folder, f"share-{rank}.json").write_text(json.dumps(sizes))


def state_of(folder: str) -> dict[str, Any] | None:
    """What was saved with a checkpoint, and the number of `workers` that wrote it; None if any of its files is missing
    or cut."""
    try:
        state = json.loads(Path(folder, _STATE).read_text())
        for rank in range(state["workers"]):
            for name, size in json.loads(Path(folder, f"share-{rank}.json").read_text()).items():
                if os.path.getsize(Path(folder, name)) != size:
                    return None
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return state


def must_be_cut(folder: str, workers: int) -> bool:
    """Whether a whole checkpoint holds shares of the optimizer's state for another number of workers. Without ZeRO
    every worker has all of it."""
    state = state_of(folder)
    return state is not None and state["workers"] != workers and any(Path(folder, TAG).glob("*_optim_states.pt"))


def load_shares(engine: Any, folder: str) -> None:
    """Let the engine go on from the checkpoint in `folder`; all workers must call it.

    One that `must_be_cut` is first cut for any number of workers (DeepSpeed's universal checkpoint), once on each
    machine; the engine must have been made for that (`zero_config`).
    """
    if not engine.load_universal_checkpoint():
        engine.load_checkpoint(folder, tag=TAG, load_module_strict=False)
        return
    first = int(os.environ["LOCAL_RANK"]) == 0
    cut = Path(tempfile.gettempdir(), f"ray_explain-universal-{os.path.basename(os.path.realpath(folder))}")
    if first:
        _cut(folder, cut)
    dist.barrier()
    adam = engine.optimizer.optimizer
    decays = [group["weight_decay"] for group in adam.param_groups]
    engine.load_checkpoint(str(cut), tag=_UNIVERSAL, load_module_strict=False)
    _mend(adam, decays)
    dist.barrier()
    if first:
        shutil.rmtree(cut)


def _mend(adam: torch.optim.Optimizer, decays: list[float]) -> None:
    """What DeepSpeed (0.19.8, stage 3) gets wrong there: all groups get the weight decay of the first one, and share
    one counter of steps, which then counts each step once for every group."""
    for group, decay in zip(adam.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in adam.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _cut(folder: str, cut: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(cut, ignore_errors=True)
    ds_to_universal.main(
        Namespace(
            input_folder=str(Path(folder, TAG)),
            output_folder=str(cut / _UNIVERSAL),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
