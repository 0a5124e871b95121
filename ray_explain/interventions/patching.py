"""What a model answers when activations of a base run are overwritten, added to or ablated.

A patch leaves everything before its layer and before its position as it was. So in a sweep a patched row starts as a
copy of the clean run at its first layer, carries only the positions from the patch on, reads earlier ones from the
clean run's keys and values, and only its last position goes through the unembedding. Clean and patched rows go up
together (`walk`), so nothing of the clean run has to be kept from one block to the next.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ray_explain.interventions.hooks import KINDS, Kind, at_site, check_kind
from ray_explain.interventions.layout import SITES, Layout, Site, last_logits, layout_of
from ray_explain.interventions.walk import Packing, Row, best_bytes, budgeted, obstacle, row_bytes, walk, whole

logger = logging.getLogger(__name__)
MEMORY_BUDGET = 1 << 30  # bytes; on a CPU, no more than these run at once under a larger budget either


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention:
    """One change of one base run.

    `positions` (one, or a span) count the base prompt's own tokens from 0, without padding. `vectors` has one row per
    position and is written at every layer from `first_layer` to `last_layer`, inclusive; it is None for `zero`, and for
    `mean`, which writes the mean of the clean base run over all its positions, at each layer that layer's. For the mean
    over some other set of prompts, `replace` with it.

    Raises:
        ValueError: unknown site or kind, no or repeated positions, layers out of order, vectors missing or of the wrong
            shape.
    """

    base: int
    positions: tuple[int, ...]
    first_layer: int
    last_layer: int
    site: Site = "resid_post"
    kind: Kind = "replace"
    vectors: Float[Tensor, "n_positions d_model"] | None = None

    def __post_init__(self) -> None:
        check_kind(self.site, self.kind, self.vectors is not None)
        if not self.positions or len(set(self.positions)) < len(self.positions):
            raise ValueError(f"positions {self.positions}: give at least one, each once")
        if self.first_layer > self.last_layer:
            raise ValueError(f"layers {self.first_layer} to {self.last_layer}: the first comes after the last")
        if self.vectors is not None and (self.vectors.ndim != 2 or len(self.vectors) != len(self.positions)):
            raise ValueError(f"vectors of shape {tuple(self.vectors.shape)} for {len(self.positions)} positions")

    @property
    def join(self) -> int:
        """The block before which a row with this change parts from the clean run."""
        return self.first_layer + (self.site == "resid_post")


class PairedChunk(NamedTuple):
    """Some interventions of a sweep: their indices, and float32 last-position logits with and without the change."""

    indices: list[int]
    patched: Float[Tensor, "rows d_vocab"]
    clean: Float[Tensor, "rows d_vocab"]


def clean_logits(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, memory_budget: int = MEMORY_BUDGET
) -> Float[Tensor, "prompts d_vocab"]:
    """Float32 logits for the token after each prompt.

    Raises:
        ValueError: as `checked_prompts`, and if one prompt alone needs more than `memory_budget` bytes.
    """
    layout = layout_of(model)
    checked_prompts(layout, prompts)
    logits = torch.empty(len(prompts), layout.d_vocab, device=layout.device)
    cost = row_bytes(layout)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    best = best_bytes(layout, MEMORY_BUDGET)
    for some in budgeted(order, lambda i: cost(len(prompts[i])), memory_budget, best=best):
        logits[some] = _logits(layout, [prompts[i] for i in some], [], [], with_clean=True)[0]
    return logits


def patch_sweep(
    model: nn.Module,
    bases: Sequence[Sequence[int]],
    interventions: Sequence[Intervention],
    *,
    memory_budget: int = MEMORY_BUDGET,
) -> Iterator[tuple[list[int], Float[Tensor, "rows d_vocab"]]]:
    """Every intervention's float32 last-position logits, in chunks of (indices into `interventions`, logits).

    Each intervention comes once; the order is not that of `interventions`. A row's logits do not depend on the rows
    beside it, beyond rounding. `paired_sweep` gives the clean run's logits as well.

    A chunk holds as many rows as fit: the sum of `walk.row_bytes` over its clean and patched rows stays under
    `memory_budget` bytes, and so does the peak of what is allocated beyond the weights (chunks handed out before are
    the caller's).

    Raises:
        ValueError: as `checked_prompts`; an intervention that does not fit its base or the model; one intervention that
            alone needs more than `memory_budget`.
    """
    for chunk in _sweep(model, bases, interventions, memory_budget, with_clean=False):
        yield chunk.indices, chunk.patched


def paired_sweep(
    model: nn.Module,
    bases: Sequence[Sequence[int]],
    interventions: Sequence[Intervention],
    *,
    memory_budget: int = MEMORY_BUDGET,
) -> Iterator[PairedChunk]:
    """As `patch_sweep`, with the logits of each row's clean base run beside the patched ones."""
    return _sweep(model, bases, interventions, memory_budget, with_clean=True)


def sweep_bytes(layout: Layout) -> Callable[[int, int], int]:
    """How many bytes an intervention needs at most where it runs alone, its clean run included (`walk.row_bytes`), as a
    function of the tokens of its base and the first of its positions."""
    patched, clean = _patched_bytes(layout), row_bytes(layout)
    return lambda length, first: patched(length, first) + clean(length)


def _patched_bytes(layout: Layout) -> Callable[[int, int], int]:
    """As `sweep_bytes`, without the clean run."""
    cost, why_not = row_bytes(layout), cache(lambda length: obstacle(layout, length))
    return lambda length, first: cost(length, length - first if why_not(length) is None else None)


def checked_prompts(layout: Layout, prompts: Sequence[Sequence[int]]) -> None:
    """Raises ValueError: a prompt is empty, longer than the model's context, or has a token the model does not know."""
    vocabulary = layout.embedding.weight.shape[0]
    for i, ids in enumerate(prompts):
        if not len(ids):
            raise ValueError(f"prompt {i} is empty: a prompt has at least one token")
        if layout.max_positions is not None and len(ids) > layout.max_positions:
            raise ValueError(f"prompt {i} has {len(ids)} tokens: the model's context holds {layout.max_positions}")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError(f"prompt {i} has a token outside 0..{vocabulary - 1}: {min(ids)} or {max(ids)}")


def _checked(layout: Layout, bases: Sequence[Sequence[int]], i: int, intervention: Intervention) -> None:
    if not 0 <= intervention.base < len(bases):
        raise ValueError(f"intervention {i} is on base {intervention.base}: there are {len(bases)}, numbered from 0")
    length = len(bases[intervention.base])
    if min(intervention.positions) < 0 or max(intervention.positions) >= length:
        raise ValueError(f"intervention {i} at positions {intervention.positions}: its base has {length}, from 0")
    layout.checked_layer(intervention.first_layer)
    layout.checked_layer(intervention.last_layer)
    if intervention.vectors is not None and intervention.vectors.shape[1] != layout.d_model:
        raise ValueError(
            f"intervention {i} writes vectors {intervention.vectors.shape[1]} wide: d_model is {layout.d_model}"
        )


def _sweep(
    model: nn.Module,
    bases: Sequence[Sequence[int]],
    interventions: Sequence[Intervention],
    memory_budget: int,
    with_clean: bool,
) -> Iterator[PairedChunk]:
    layout = layout_of(model)
    checked_prompts(layout, bases)
    for i, intervention in enumerate(interventions):
        _checked(layout, bases, i, intervention)
    for indices in _chunks(layout, bases, interventions, memory_budget):
        used = sorted({interventions[i].base for i in indices})
        rank = {base: row for row, base in enumerate(used)}
        local = [rank[interventions[i].base] for i in indices]
        changes = [interventions[i] for i in indices]
        clean, patched = _logits(layout, [bases[b] for b in used], changes, local, with_clean)
        yield PairedChunk(indices, patched, clean[local] if with_clean else clean)


def _chunks(
    layout: Layout, bases: Sequence[Sequence[int]], interventions: Sequence[Intervention], memory_budget: int
) -> Iterator[list[int]]:
    """Indices of interventions that run together: bases of like length side by side, rows in the order they join."""

    def key(i: int) -> tuple[int, int, int]:
        return len(bases[interventions[i].base]), interventions[i].base, interventions[i].join

    def length(i: int) -> int:
        return len(bases[interventions[i].base])

    def row(i: int) -> int:
        return patched(length(i), min(interventions[i].positions))

    def clean(i: int) -> tuple[int, int]:
        return interventions[i].base, cost(length(i))

    cost, patched = row_bytes(layout), _patched_bytes(layout)
    order = sorted(range(len(interventions)), key=key)
    for chunk in budgeted(order, row, memory_budget, clean, best=best_bytes(layout, MEMORY_BUDGET)):
        yield sorted(chunk, key=lambda i: interventions[i].join)


@torch.no_grad()
def _logits(
    layout: Layout,
    bases: Sequence[Sequence[int]],
    changes: Sequence[Intervention],
    base_of: Sequence[int],
    with_clean: bool,
) -> tuple[Float[Tensor, "bases d_vocab"], Float[Tensor, "changes d_vocab"]]:
    """Clean (empty unless asked for) and patched logits; `changes` in the order in which their rows join."""
    reason = obstacle(layout, max(map(len, bases)))
    if reason is None:
        return _walked_logits(layout, bases, changes, base_of, with_clean)
    _tell_once(type(layout.model).__name__, reason)
    return _hooked_logits(layout, bases, changes, base_of, with_clean)


@cache
def _tell_once(model: str, reason: str) -> None:
    logger.warning("%s: %s; interventions run as full batches with hooks, which is slower", model, reason)


def _walked_logits(
    layout: Layout,
    bases: Sequence[Sequence[int]],
    changes: Sequence[Intervention],
    base_of: Sequence[int],
    with_clean: bool,
) -> tuple[Tensor, Tensor]:
    rows = [whole(ids, i) for i, ids in enumerate(bases)]
    for change, base in zip(changes, base_of, strict=True):
        rows.append(Row(length=len(bases[base]), start=min(change.positions), origin=base, join=change.join))
    packing = Packing(rows, layout.n_layers, layout.device)
    firsts = (packing.offsets[:-1] - packing.starts)[len(bases) :]
    writes = _Writes(layout, changes, firsts, base_of, [len(ids) for ids in bases])
    hidden = walk(layout, packing, writes, inside=writes.inside, only_ends=not writes.averages_at(layout.n_layers - 1))
    n_clean = len(bases) if with_clean else 0
    logits = last_logits(layout, hidden[packing.last_tokens[len(bases) - n_clean :]])
    return logits[:n_clean], logits[n_clean:]


def _hooked_logits(
    layout: Layout,
    bases: Sequence[Sequence[int]],
    changes: Sequence[Intervention],
    base_of: Sequence[int],
    with_clean: bool,
) -> tuple[Tensor, Tensor]:
    """The same by the model's own forward pass, one for each length of base: whole rows, no padding."""
    clean = torch.empty(len(bases) if with_clean else 0, layout.d_vocab, device=layout.device)
    patched = torch.empty(len(changes), layout.d_vocab, device=layout.device)
    for length in sorted({len(ids) for ids in bases}):
        here = [b for b, ids in enumerate(bases) if len(ids) == length]
        rows = [i for i, b in enumerate(base_of) if b in here]
        # whole rows read nothing from the clean runs but the means of these
        run = here if with_clean or any(changes[i].kind == "mean" for i in rows) else []
        local = [here.index(base_of[i]) for i in rows]
        firsts = (np.arange(len(rows)) + len(run)) * length
        writes = _Writes(layout, [changes[i] for i in rows], firsts, local, [length] * len(run))
        batch = torch.tensor([bases[b] for b in run] + [bases[base_of[i]] for i in rows], device=layout.device)
        with ExitStack() as hooks:
            for site, layer in writes.sites:
                hooks.enter_context(at_site(layout, layer, site, _on_rows(writes, site, layer)))
            logits = model_logits(layout, batch)
        patched[rows] = logits[len(run) :]
        if with_clean:
            clean[here] = logits[: len(here)]
    return clean, patched


def _on_rows(writes: "_Writes", site: Site, layer: int) -> Callable[[Tensor], Tensor]:
    return lambda x: writes(site, layer, x.flatten(0, 1)).view_as(x)


def model_logits(layout: Layout, batch: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch d_vocab"]:
    """Float32 last-position logits of the model's own forward pass; every row is a whole prompt."""
    takes_few = "logits_to_keep" in inspect.signature(layout.model.forward).parameters
    out = layout.model(input_ids=batch, use_cache=False, **({"logits_to_keep": 1} if takes_few else {}))
    return out.logits[:, -1].float()


class _Writes:
    """What is written where in the tokens of one batch; called at a site, gives the activations as they go on.

    The clean runs of the bases are the first tokens, at least where a mean over them is written. `firsts` is where
    position 0 of each change's prompt is or would be, `base_of` its base.
    """

    def __init__(
        self,
        layout: Layout,
        changes: Sequence[Intervention],
        firsts: np.ndarray,
        base_of: Sequence[int],
        base_lengths: Sequence[int],
    ):
        n_positions = [len(c.positions) for c in changes]
        self.tokens = np.array([first + p for first, c in zip(firsts, changes, strict=True) for p in c.positions], int)
        self.bases = np.repeat(np.array(base_of, int), n_positions)
        self.first = np.repeat(np.array([c.first_layer for c in changes], int), n_positions)
        self.last = np.repeat(np.array([c.last_layer for c in changes], int), n_positions)
        self.site = np.repeat(np.array([SITES.index(c.site) for c in changes], int), n_positions)
        self.kind = np.repeat(np.array([KINDS.index(c.kind) for c in changes], int), n_positions)
        self.lengths = torch.tensor(base_lengths, device=layout.device)
        given = {c.vectors.device for c in changes if c.vectors is not None}
        zeros = torch.zeros(1, layout.d_model, device=next(iter(given), layout.device))
        rows = [zeros.expand(len(c.positions), -1) if c.vectors is None else c.vectors for c in changes]
        self.vectors = torch.cat(rows or [zeros]).to(layout.device, layout.dtype)

    @property
    def sites(self) -> set[tuple[Site, int]]:
        """Every site and layer where something is written."""
        each = np.unique(np.stack([self.site, self.first, self.last]), axis=1).T
        return {(SITES[site], layer) for site, first, last in each for layer in range(first, last + 1)}

    @property
    def inside(self) -> set[tuple[Site, int]]:
        """Those of `sites` that lie within a block."""
        return {(site, layer) for site, layer in self.sites if site in ("attn_out", "mlp_out")}

    def averages_at(self, layer: int) -> bool:
        """Whether a mean over all positions is taken after attention in this layer."""
        here = (self.kind == KINDS.index("mean")) & (self.first <= layer) & (layer <= self.last)
        return bool((here & (self.site != SITES.index("resid_pre"))).any())

    def __call__(self, site: Site, layer: int, activations: Tensor) -> Tensor:
        here = (self.site == SITES.index(site)) & (self.first <= layer) & (layer <= self.last)
        if not here.any():
            return activations
        at = torch.from_numpy(here.nonzero()[0]).to(activations.device)
        tokens = torch.from_numpy(self.tokens[here]).to(activations.device)
        new = self.vectors[at]
        if (adding := self.kind[here] == KINDS.index("add")).any():
            adds = torch.from_numpy(adding).to(activations.device)
            new[adds] += activations[tokens[adds]]
        if (averaging := self.kind[here] == KINDS.index("mean")).any():
            means = self._means(activations)[torch.from_numpy(self.bases[here][averaging]).to(activations.device)]
            new[torch.from_numpy(averaging).to(activations.device)] = means
        return activations.index_copy(0, tokens, new)

    def _means(self, activations: Tensor) -> Float[Tensor, "bases d_model"]:
        bases = torch.arange(len(self.lengths), device=activations.device).repeat_interleave(self.lengths)
        sums = torch.zeros(len(self.lengths), activations.shape[1], device=activations.device)
        sums.index_add_(0, bases, activations[: len(bases)].float())
        return (sums / self.lengths[:, None]).to(activations.dtype)
