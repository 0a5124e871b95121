"""Checkpoints of a training: every worker writes its share; any number of workers at any ZeRO stage goes on from it.

A share is some safetensors files. They hold, for each trained parameter, the piece that the worker has of its float32
weights and of Adam's moments, and where in the whole parameter (flattened) the piece begins. Who reads takes from all
shares what it needs.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_STATE = "state.json"
_NUMBERS = 2**27  # of the parameters in a file, 1.6 GB with Adam's: so much is copied to the host's memory at a time
_WEIGHTS, _MOMENTS = "weights", ("exp_avg", "exp_avg_sq")


class _Piece(NamedTuple):
    """What this worker has of a parameter."""

    name: str
    start: int  # in the whole parameter
    flat: Tensor  # what Adam steps: float32, maybe of several parameters
    place: slice  # of the piece in `flat`

    @property
    def numel(self) -> int:
        return self.place.stop - self.place.start

    def of(self, whole: Tensor) -> Float[Tensor, " numel"]:
        """The piece's part of `flat`, or of one of Adam's moments of it."""
        return whole.detach().view(-1)[self.place]


def save_share(engine: Any, folder: str, state: dict[str, Any]) -> None:
    """Write this worker's share of a checkpoint to its own `folder`; all workers must call it, after a first step.

    Frozen parameters are left out: those of a LoRA explainer are the base model's. Beside the share lies how large each
    of its files is, so that a checkpoint that was cut is known as such.
    """
    rank, adam = dist.get_rank(), _adam(engine)
    is_split = engine.zero_optimization_stage() > 0  # else all workers have the same
    for number, pieces in enumerate(_portions(_pieces(engine)) if is_split or rank == 0 else ()):
        tensors = dict[str, Tensor]()
        for piece in pieces:
            known = adam.state.get(piece.flat, {})  # nothing for a parameter that has had no gradient yet
            wholes = {_WEIGHTS: piece.flat} | {moment: known[moment] for moment in _MOMENTS if moment in known}
            # A copy, since some pieces are parts of one tensor.
            tensors |= {f"{what} {piece.name}": piece.of(whole).to("cpu", copy=True) for what, whole in wholes.items()}
        starts = {piece.name: str(piece.start) for piece in pieces}
        save_file(tensors, f"{folder}/{_share(rank)}-{number}.safetensors", metadata=starts)
    if rank == 0:
        told = {**state, "workers": dist.get_world_size(), "adam_steps": _adam_steps(adam)}
        Path(folder, _STATE).write_text(json.dumps(told))
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
    Path(folder, f"{_share(rank)}.json").write_text(json.dumps(sizes))


def state_of(folder: str) -> dict[str, Any] | None:
    """What was saved with a checkpoint, and the number of `workers` that wrote it; None if any of its files is missing
    or cut."""
    try:
        state = json.loads(Path(folder, _STATE).read_text())
        for rank in range(state["workers"]):
            for name, size in json.loads(Path(folder, f"{_share(rank)}.json").read_text()).items():
                if os.path.getsize(Path(folder, name)) != size:
                    return None
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return state


def load_shares(engine: Any, folder: str) -> None:
    """Let the engine go on from the whole checkpoint in `folder`, before its first step; all workers must call it."""
    adam, n_steps = _adam(engine), json.loads(Path(folder, _STATE).read_text())["adam_steps"]
    with ExitStack() as stack, torch.no_grad():
        shares = _Shares(folder, stack)
        for piece in _pieces(engine):
            known = adam.state[piece.flat]
            for moment in _MOMENTS:
                known.setdefault(moment, torch.zeros_like(piece.flat))
                shares.read(moment, piece, known[moment])
            known["step"] = torch.tensor(float(n_steps), device=piece.flat.device)
            shares.read(_WEIGHTS, piece, piece.flat)
    _take_up_weights(engine)


class _Shares:
    """The shares of all workers that wrote a checkpoint; `stack` closes their files."""

    def __init__(self, folder: str, stack: ExitStack) -> None:
        self._found: dict[str, list[tuple[int, Any]]] = defaultdict(list)  # name in a file -> starts and slices
        for path in sorted(Path(folder).glob(f"{_share('*')}.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            starts = file.metadata()
            for key in file.keys():  # noqa: SIM118 - no dictionary
                self._found[key].append((int(starts[key.partition(" ")[2]]), file.get_slice(key)))

    def read(self, what: str, piece: _Piece, whole: Tensor) -> None:
        """Fill the piece's part of `whole` with what the checkpoint has of it.

        Raises:
            KeyError: it has no weights of the parameter.
        """
        into, key = piece.of(whole), f"{what} {piece.name}"
        if what == _WEIGHTS and key not in self._found:
            raise KeyError(f"the checkpoint has no weights of {piece.name}")
        for start, part in self._found[key]:
            first = max(start, piece.start)
            stop = min(start + part.get_shape()[0], piece.start + piece.numel)
            if first < stop:
                into[first - piece.start : stop - piece.start] = part[first - start : stop - start].to(into.device)


def _portions(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """As many in a row as have `_NUMBERS` together, or a single larger one. A file of S3 has 10,000 parts at most."""
    portion, size = list[_Piece](), 0
    for piece in pieces:
        if portion and size + piece.numel > _NUMBERS:
            yield portion
            portion, size = [], 0
        portion.append(piece)
        size += piece.numel
    if portion:
        yield portion


def _share(rank: int | str) -> str:
    return f"share-{rank}"


def _adam(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed was given, out of what it wraps around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _adam_steps(adam: torch.optim.Optimizer) -> int:
    return max((int(known["step"]) for known in adam.state.values() if "step" in known), default=0)


def _pieces(engine: Any) -> Iterator[_Piece]:
    """This worker's pieces of all trained parameters, as DeepSpeed (0.19.8) keeps them."""
    names = {id(one): name for name, one in engine.module.named_parameters() if one.requires_grad}
    stage, wrapped = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        for flat, group in zip(wrapped.fp32_partitioned_groups_flat, wrapped.fp16_groups, strict=True):
            offset = 0
            for one in group:  # all shares of a parameter are of one size; the last may end in padding
                size = one.ds_tensor.numel()
                start = size * dist.get_rank()
                stop = offset + max(0, min(size, one.ds_numel - start))
                yield _Piece(names[id(one)], start, flat, slice(offset, stop))
                offset += size
    elif stage:
        for flat, group in zip(wrapped.single_partition_of_fp32_groups, wrapped.bit16_groups, strict=True):
            for one in group:
                if (mapped := one._hp_mapping) is not None:  # else others have all of it
                    here = mapped.hp_fragment_address
                    start = mapped.lp_fragment_address.start
                    yield _Piece(names[id(one)], start, flat, slice(here.start, here.start + here.numel))
    else:
        for one, flat in _beside(engine):
            yield _Piece(names[id(one)], 0, flat, slice(0, flat.numel()))


def _beside(engine: Any) -> list[tuple[Tensor, Tensor]]:
    """Without ZeRO: each trained parameter and what Adam steps, the parameter itself or its float32 copy."""
    if engine.bfloat16_enabled():
        groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        return [pair for own, copies in groups for pair in zip(own, copies, strict=True)]
    every = [one for group in engine.optimizer.param_groups for one in group["params"]]
    return list(zip(every, every, strict=True))


def _take_up_weights(engine: Any) -> None:
    """Let the model have the float32 weights."""
    stage, wrapped = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        wrapped.checkpoint_event_prologue()
        for number in range(len(wrapped.fp16_groups)):
            wrapped._reassign_or_swap_out_partitioned_parameters(number)
        wrapped.checkpoint_event_epilogue()  # gathers what is always whole
    elif stage:
        wrapped.update_lp_params()
    else:
        with torch.no_grad():
            for one, flat in _beside(engine):
                one.copy_(flat)
