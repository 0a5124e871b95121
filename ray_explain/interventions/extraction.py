"""Activations of many prompts: no further up than the deepest layer asked for, only the positions asked for."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_explain.interventions.hooks import at_site
from ray_explain.interventions.layout import Layout, Site, layout_of
from ray_explain.interventions.patching import MEMORY_BUDGET, checked_prompts
from ray_explain.interventions.walk import Packing, best_bytes, budgeted, obstacle, row_bytes, walk, whole


@dataclass(frozen=True, kw_only=True)
class BlockRequest:
    """The mean of a prompt's residual stream over the layers of a block, at some of its positions."""

    prompt: int
    positions: tuple[int, ...]
    first_layer: int
    last_layer: int


def residuals(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    positions: Sequence[Sequence[int]] | None = None,
    site: Site = "resid_post",
    *,
    memory_budget: int = MEMORY_BUDGET,
) -> list[Float[Tensor, "layers positions d_model"]]:
    """For each prompt its activations at `site` of `layers`, in that order, at its `positions` (default: all of them).

    In the model's dtype and on its device. `memory_budget` bounds, in bytes, what is needed beside the result.

    Raises:
        ValueError: as `patching.checked_prompts`; a layer or a position that is not there; no layers; not one list of
            positions per prompt.
    """
    layout = layout_of(model)
    checked_prompts(layout, prompts)
    wanted = _checked_positions(prompts, positions)
    if not layers:
        raise ValueError("no layers to read: give at least one")
    for layer in layers:
        layout.checked_layer(layer)
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    cost = row_bytes(layout, logits=False)
    chunks = budgeted(order, lambda i: cost(len(prompts[i])), memory_budget, best=best_bytes(layout))
    for some in chunks:
        read = _read(layout, [prompts[i] for i in some], sorted(set(layers)), [wanted[i] for i in some], site)
        stacked = torch.stack([read[layer] for layer in layers])
        for i, part in zip(some, stacked.split([len(wanted[i]) for i in some], dim=1), strict=True):
            found[i] = part
    return found


def block_means(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    requests: Sequence[BlockRequest],
    site: Site = "resid_post",
    *,
    memory_budget: int = MEMORY_BUDGET,
) -> list[Float[Tensor, "positions d_model"]]:
    """The vectors that the paper patches with: float32 means over a block of layers of the source's residual stream.

    Each prompt runs once, whatever the number of requests about it.

    Raises:
        ValueError: as `residuals`; a request about a prompt that is not there, or with its layers out of order.
    """
    for i, request in enumerate(requests):
        if not 0 <= request.prompt < len(prompts):
            raise ValueError(f"request {i} is about prompt {request.prompt}: there are {len(prompts)}, from 0")
        if request.first_layer > request.last_layer:
            raise ValueError(f"request {i}, layers {request.first_layer} to {request.last_layer}: first after last")
    if not requests:
        return []
    wanted: dict[int, set[int]] = defaultdict(set)
    for request in requests:
        wanted[request.prompt].update(request.positions)
    at = {prompt: sorted(some) for prompt, some in sorted(wanted.items())}
    first = min(r.first_layer for r in requests)
    layers = range(first, max(r.last_layer for r in requests) + 1)
    used = [prompts[i] for i in at]
    read = residuals(model, used, layers, list(at.values()), site, memory_budget=memory_budget)
    by_prompt = dict(zip(at, read, strict=True))
    means = []
    for r in requests:
        columns = [at[r.prompt].index(p) for p in r.positions]
        block = by_prompt[r.prompt][r.first_layer - first : r.last_layer - first + 1]
        means.append(block[:, columns].float().mean(0))
    return means


def _checked_positions(
    prompts: Sequence[Sequence[int]], positions: Sequence[Sequence[int]] | None
) -> list[Sequence[int]]:
    if positions is None:
        return [range(len(ids)) for ids in prompts]
    if len(positions) != len(prompts):
        raise ValueError(f"positions for {len(positions)} prompts, but there are {len(prompts)}")
    for i, (ids, some) in enumerate(zip(prompts, positions, strict=True)):
        if len(some) and not 0 <= min(some) <= max(some) < len(ids):
            raise ValueError(f"prompt {i} at positions {list(some)}: it has {len(ids)}, numbered from 0")
    return list(positions)


@torch.no_grad()
def _read(
    layout: Layout, prompts: list[Sequence[int]], layers: list[int], wanted: list[Sequence[int]], site: Site
) -> dict[int, Float[Tensor, "positions d_model"]]:
    """Activations at the wanted positions of all prompts behind one another, by layer."""
    if obstacle(layout, max(map(len, prompts))) is not None:
        return _read_by_hooks(layout, prompts, layers, wanted, site)
    packing = Packing([whole(ids, i) for i, ids in enumerate(prompts)], layout.n_layers, layout.device)
    at = [offset + p for offset, some in zip(packing.offsets, wanted, strict=False) for p in some]
    tokens = torch.tensor(at, dtype=torch.long, device=layout.device)
    found: dict[int, Tensor] = {}

    def visit(here: Site, layer: int, activations: Tensor) -> Tensor:
        if here == site and layer in layers:
            found[layer] = activations[tokens]
        return activations

    inside = [(site, layer) for layer in layers] if site in ("attn_out", "mlp_out") else []
    walk(layout, packing, visit, inside=inside, until=layers[-1] + (site != "resid_pre"))
    return found


class _Deepest(Exception):
    """Ends a forward pass: the deepest layer asked for has been read."""


def _read_by_hooks(
    layout: Layout, prompts: list[Sequence[int]], layers: list[int], wanted: list[Sequence[int]], site: Site
) -> dict[int, Tensor]:
    parts: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * len(prompts) for layer in layers}
    for length in sorted({len(ids) for ids in prompts}):
        here = [i for i, ids in enumerate(prompts) if len(ids) == length]

        def keep(layer: int, activations: Tensor, here: list[int] = here) -> None:
            for i, rows in zip(here, activations, strict=True):
                parts[layer][i] = rows[list(wanted[i])]
            if layer == layers[-1]:
                raise _Deepest

        with ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(at_site(layout, layer, site, partial(keep, layer)))
            with suppress(_Deepest):
                layout.decoder(torch.tensor([prompts[i] for i in here], device=layout.device), use_cache=False)
    return {layer: torch.cat(some) for layer, some in parts.items()}
