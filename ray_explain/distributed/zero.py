"""DeepSpeed: from our training section to an engine, its steps, and back to whole weights."""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ray_explain.config import TrainConfig


def zero_config(train: TrainConfig, micro_batch_size: int, accumulation: int, *, cut: bool = False) -> dict[str, Any]:
    """DeepSpeed's config. Clipping is DeepSpeed's; the optimizer and its learning rate are ours, so that nothing has to
    be compiled (with offload, PyTorch's own fused AdamW runs on the CPU).

    Args:
        micro_batch_size: Only told to DeepSpeed for its books: our loss is already a mean over the whole step.
        cut: The checkpoint to go on from must be cut anew for this number of workers.
    """
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if not torch.cuda.is_available():
        zero["overlap_comm"] = False  # gloo has no streams
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
        "checkpoint": {"load_universal": cut},
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


def take_step(engine: Any) -> float:
    """The optimizer step after the last backward pass of a step; the norm of its gradient before clipping."""
    if engine.zero_optimization_stage() or engine.bfloat16_enabled():
        engine.step()
        return float(engine.get_global_grad_norm())
    # Without ZeRO, DeepSpeed clips and forgets the norm.
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    engine.step()
    return norm


def gathered(parameters: Iterable[nn.Parameter], zero_stage: int) -> AbstractContextManager[Any]:
    """The block sees these parameters whole; under ZeRO-3 all workers must enter it."""
    if zero_stage < 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def whole_state(module: nn.Module, zero_stage: int) -> dict[str, Tensor] | None:
    """The module's tensors on the CPU where ZeRO-3 keeps a share on each worker, gathered one after the other; all
    workers must call it. None below stage 3, where the module itself is whole.
    """
    if zero_stage < 3:
        return None
    state = {name: buffer.detach().cpu().clone() for name, buffer in module.named_buffers()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        with gathered([parameter], zero_stage):
            state[name] = parameter.detach().cpu().clone()
    return {name: tensor for name, tensor in state.items() if name in module.state_dict()}
