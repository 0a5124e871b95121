"""Small targets trained side by side, each on one core."""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from ray_explain import storage
from ray_explain.artifacts import Artifact, finish, finished
from ray_explain.distributed.checks import check_worker, code_here
from ray_explain.distributed.progress import Teller, watching

_SCRATCH = "unfinished"  # beside the artifact; where an interrupted training goes on from


def pretrain_all(models: Sequence[Artifact], root: str) -> None:
    """Train each small target that is not there yet; an interrupted one goes on from its last checkpoint.

    Raises:
        BadInput: a node runs other code than the driver, or does not see the storage.
    """
    missing = [model for model in models if finished(model, root) is None]
    if not missing:
        return
    if not storage.is_remote(root):
        Path(root).mkdir(parents=True, exist_ok=True)  # a node that then lacks it does not see the storage
    with watching() as board:
        ray.get([_pretrain.remote(model, root, board, code_here()) for model in missing])


@ray.remote(num_cpus=1, max_retries=3)
def _pretrain(artifact: Artifact, root: str, board: Any, code: str) -> None:
    from ray_explain.world.facts import World
    from ray_explain.world.pretraining import TargetSize, pretrain, save_target
    from ray_explain.world.quality import target_quality
    from ray_explain.world.tokenizer import world_tokenizer

    check_worker(root, code)
    config, started = artifact.config, time.monotonic()
    world = World(**config["world"])
    tokenizer, tell = world_tokenizer(world), Teller(board, f"pretrain {artifact.label}")
    scratch = _scratch_folder(artifact.path(root))
    model = pretrain(
        world,
        tokenizer,
        architecture=config["architecture"],
        seed=config["seed"],
        tokens=config["tokens"],
        size=TargetSize(**{key: config[key] for key in ("d_model", "n_layers", "n_heads")}),
        checkpoints=scratch,
        on_step=lambda now: tell(now.step, now.n_steps, f"loss {now.loss:.3f}"),
    )
    quality = target_quality(model, tokenizer, world)
    with storage.new_folder(artifact.path(root)) as folder:
        save_target(model, tokenizer, Path(folder))
    measured = {"quality": quality, "parameters": model.num_parameters()}
    finish(artifact, root, rows=config["tokens"], seconds=time.monotonic() - started, measured=measured)
    shutil.rmtree(scratch, ignore_errors=True)


def _scratch_folder(path: str) -> Path:
    """Local; where storage is remote it lives as long as the machine."""
    if storage.is_remote(path):
        root, _, name = path.rpartition("/")  # other storages of this machine's jobs may have the same model
        return Path(tempfile.gettempdir()) / _SCRATCH / f"{name}-{hashlib.sha256(root.encode()).hexdigest()[:8]}"
    return Path(f"{path}.{_SCRATCH}")
