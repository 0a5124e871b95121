"""How much memory interventions may take beside the weights, where nobody says it."""

from math import inf
from pathlib import Path

import psutil
import torch

SHARE = 0.5  # of what is free; the rest is for results, and for what allocators lose between blocks
_CONTAINER = Path("/sys/fs/cgroup")  # where a container sees its own control group (version 2)


def free_budget(device: torch.device, share: float = 1.0) -> int:
    """A memory budget in bytes, once the weights are loaded: of what the device has free, the `share` that is this
    process's, and of that half at most.

    It is a power of two, so that what else takes a little memory does not change which rows run together.
    """
    allowed = max(1, int(_free_bytes(device) * share * SHARE))
    return 1 << (allowed.bit_length() - 1)


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(psutil.virtual_memory().available, _free_in_container())


def _free_in_container() -> float:
    """What its limit leaves beside what its processes use; files kept in memory go once it is needed."""
    limit = _CONTAINER / "memory.max"
    if not limit.exists() or limit.read_text().strip() == "max":
        return inf
    counts = dict(line.split() for line in (_CONTAINER / "memory.stat").read_text().splitlines())
    used = int((_CONTAINER / "memory.current").read_text()) - int(counts["inactive_file"])
    return max(0, int(limit.read_text()) - used)
