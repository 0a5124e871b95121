"""DeepSpeed: from our training section to an engine, and back to whole weights."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from ray_explain.config import TrainConfig


def zero_config(train: TrainConfig, micro_batch_size: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's config. Clipping is DeepSpeed's; the optimizer and its learning rate are ours.

    `micro_batch_size` is only told to DeepSpeed for its books: our loss is already a mean over the whole step.
    """
    zero: dict[str, Any] = {"stage": train.zero_stage, "overlap_comm": False}
    if train.offload and train.zero_stage >= 1:
        zero["offload_optimizer"] = {"device": "cpu"}
        if train.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.precision == "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def engine_of(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine around `module`; the process group must be there already (Ray Train makes it).

    It reads checkpoints of tensors, plain values and three classes of DeepSpeed; anything else in them is refused.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed  # here: its import looks for the accelerator and takes seconds
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    if not torch.cuda.is_available():
        # On a CPU DeepSpeed would compile a shared-memory extension for a minute, for ranks of one host alone.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.serialization.add_safe_globals([ZeroStageEnum, fragment_address, LossScaler])
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def whole_state(module: nn.Module, zero_stage: int) -> dict[str, Tensor] | None:
    """The module's tensors on the CPU where ZeRO-3 keeps a share on each worker, gathered one after the other; all
    workers must call it. None below stage 3, where the module itself is whole.
    """
    if zero_stage < 3:
        return None
    import deepspeed

    state = {name: buffer.detach().cpu().clone() for name, buffer in module.named_buffers()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            state[name] = parameter.detach().cpu().clone()
    return {name: tensor for name, tensor in state.items() if name in module.state_dict()}
