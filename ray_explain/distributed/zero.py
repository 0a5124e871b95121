"""DeepSpeed: from our training section to an engine, its steps, and back to whole weights."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ray_explain.config import TrainConfig
from ray_explain.explainer.training import check_norm
from ray_explain.models import NUMBERS_READ


def zero_config(train: TrainConfig, micro_batch_size: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's config. The optimizer and its learning rate are ours, so that nothing has to be compiled (with
    offload, PyTorch's own fused AdamW runs on the CPU); clipping is DeepSpeed's where it has an optimizer of its own
    around ours, else that of `take_step`.

    Args:
        micro_batch_size: Only told to DeepSpeed for its books: our loss is already a mean over the whole step.
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
        "gradient_clipping": 0.0 if _is_bare(train.zero_stage, train.precision == "bfloat16") else train.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.precision == "bfloat16"},
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # waits for the GPU in every pass
    }


def engine_of(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine around `module`; the process group must be there already (Ray Train makes it)."""
    deepspeed = _deepspeed()
    if config["bf16"]["enabled"]:
        _round_all(module)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    if dist.get_world_size() == 1 and _is_bare(engine.zero_optimization_stage(), engine.bfloat16_enabled()):
        engine.enable_backward_allreduce = False  # it would copy all gradients to add them to nobody's
    if config["bf16"]["enabled"] and not engine.zero_optimization_stage():
        _take_back_step(engine.optimizer)
    return engine


@torch.no_grad()
def _take_back_step(wrapped: Any) -> None:
    """Where it keeps float32 copies without ZeRO, DeepSpeed (0.19.8) makes Adam's state by a step of no gradients: the
    copies have decayed, and Adam would take the first steps too small, as if one had been before them."""
    wrapped.optimizer.state.clear()
    for own, copies in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True):
        for one, copy in zip(own, copies, strict=True):
            copy.copy_(one)


def _round_all(module: nn.Module) -> None:
    """All parameters in bfloat16, as DeepSpeed itself has them at every stage: it trains float32 copies of them. Of a
    model that was loaded split it takes for granted that they are, but adapters and projections are made in float32.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


@contextmanager
def splitting(config: dict[str, Any]) -> Iterator[None]:
    """Under ZeRO-3, a transformers model that is loaded in this block is split over the workers while it comes from its
    file: no worker ever holds all of it (the first one maps the file). All workers must load the same one.

    Its parameters are empty from then on, outside `gathered`, and it runs only once `engine_of` has taken it.
    """
    if config["zero_optimization"]["stage"] < 3:
        yield
        return
    _deepspeed()
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(config)  # transformers looks at it by a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


def _deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed  # here: its import looks for the accelerator and takes seconds

    if not torch.cuda.is_available():
        # On a CPU DeepSpeed would compile a shared-memory extension for a minute, for ranks of one host alone.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def take_step(engine: Any, clip: float, question_ids: Sequence[str]) -> float:
    """The optimizer step after the last backward pass of a step; the norm of its gradient before clipping.

    Raises:
        NotFinite: the norm is NaN or infinite; no weight was touched. It names the questions of the whole step.
    """
    if not _is_bare(engine.zero_optimization_stage(), engine.bfloat16_enabled()):
        engine.step()  # leaves the weights alone where the norm is not finite, and goes on as if nothing were
        norm = float(engine.get_global_grad_norm())
        check_norm(norm, question_ids)
        return norm
    # DeepSpeed's own clipping goes through parameters one by one, and forgets the norm.
    norm = float(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), clip))
    check_norm(norm, question_ids)
    engine.step()
    return norm


def _is_bare(zero_stage: int, is_bfloat16: bool) -> bool:
    """Whether DeepSpeed uses the optimizer it is given as it is, with gradients where PyTorch leaves them."""
    return not zero_stage and not is_bfloat16


def gathered(parameters: Iterable[nn.Parameter], zero_stage: int) -> AbstractContextManager[Any]:
    """The block sees these parameters whole, and must not change them; under ZeRO-3 all workers must enter it."""
    if zero_stage < 3:
        return nullcontext()
    return _deepspeed().zero.GatheredParameters(list(parameters))


def whole_state(module: nn.Module, zero_stage: int) -> dict[str, Tensor] | None:
    """The module's tensors on the first worker's CPU where ZeRO-3 keeps a share on each, gathered one after the other;
    all workers must call it, the others get an empty dictionary. None below stage 3, where the module itself is whole.

    Of frozen parameters, those of the model below adapters, only the numbers that tell which model it is.
    """
    if zero_stage < 3:
        return None
    first, kept = dist.get_rank() == 0, set(module.state_dict())
    state = {name: buffer.detach().cpu().clone() for name, buffer in module.named_buffers() if first and name in kept}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        with gathered([parameter], zero_stage):
            if first and name in kept:
                part = parameter if parameter.requires_grad else parameter.flatten()[:NUMBERS_READ]
                state[name] = part.detach().cpu().clone()
    return state
