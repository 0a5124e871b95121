"""How much memory interventions may take beside the weights, where nobody says it."""

from pathlib import Path

import psutil
import torch

SHARE = 0.5  # of what is free; the rest is for results, and for what allocators lose between blocks
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def free_budget(device: torch.device, share: float = 1.0) -> int:
    """A memory budget in bytes, once the weights are loaded: of what the device has free, the `share` that is this
    process's, and of that half at most.

    It is a power of two, so that what else takes a little memory does not change which rows run together.
    """
    allowed = max(1, int(_free_bytes(device) * share * SHARE))
    return 1 << (allowed.bit_length() - 1)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    limit = _CONTAINER_LIMIT.read_text().strip() if _CONTAINER_LIMIT.exists() else "max"
    return free if limit == "max" else min(free, int(limit))
