"""What a model answers with and without a span of its input."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_explain.interventions.layout import Layout, last_logits, layout_of
from ray_explain.interventions.patching import MEMORY_BUDGET, checked_prompts, clean_logits
from ray_explain.interventions.walk import Packing, Row, best_bytes, budgeted, obstacle, row_bytes, walk, whole


def ablated_logits(
    model: nn.Module,
    full: Sequence[Sequence[int]],
    ablated: Sequence[Sequence[int]],
    *,
    memory_budget: int = MEMORY_BUDGET,
) -> tuple[Float[Tensor, "rows d_vocab"], Float[Tensor, "rows d_vocab"]]:
    """Float32 logits for the token after each full prompt and after the same prompt without a span.

    The tokens before the first difference are computed once.

    Raises:
        ValueError: as `patching.checked_prompts`; not as many ablated prompts as full ones; one pair alone needs more
            than `memory_budget` bytes (`pair_bytes`).
    """
    if len(full) != len(ablated):
        raise ValueError(f"{len(full)} full prompts, but {len(ablated)} ablated ones")
    layout = layout_of(model)
    checked_prompts(layout, full)
    checked_prompts(layout, ablated)
    if full and obstacle(layout, max(map(len, [*full, *ablated]))) is not None:
        budget = {"memory_budget": memory_budget}
        return clean_logits(model, full, **budget), clean_logits(model, ablated, **budget)
    both = torch.empty(2, len(full), layout.d_vocab, device=layout.device)
    order = sorted(range(len(full)), key=lambda i: len(full[i]))
    cost, best = pair_bytes(layout), best_bytes(layout, MEMORY_BUDGET)
    for some in budgeted(order, lambda i: cost(full[i], ablated[i]), memory_budget, best=best):
        both[:, some] = _walked_pairs(layout, [full[i] for i in some], [ablated[i] for i in some])
    return both[0], both[1]


def pair_bytes(layout: Layout) -> Callable[[Sequence[int], Sequence[int]], int]:
    """How many bytes a full and an ablated prompt need at most where they run alone (`walk.row_bytes`)."""
    cost = row_bytes(layout)

    def of(full: Sequence[int], ablated: Sequence[int]) -> int:
        together = cost(len(full)) + cost(len(ablated), len(ablated) - _shared(full, ablated))
        return max(together, cost(len(ablated)))  # where nothing can be shared, each runs for itself

    return of


@torch.no_grad()
def _walked_pairs(
    layout: Layout, full: list[Sequence[int]], ablated: list[Sequence[int]]
) -> Float[Tensor, "2 rows d_vocab"]:
    rows = [whole(ids, i) for i, ids in enumerate(full)]
    for i, ids in enumerate(ablated):
        start = _shared(full[i], ids)
        rows.append(Row(length=len(ids), start=start, origin=i, ids=tuple(ids[start:])))
    packing = Packing(rows, layout.n_layers, layout.device)
    hidden = walk(layout, packing, lambda site, layer, activations: activations, only_ends=True)
    return last_logits(layout, hidden[packing.last_tokens]).view(2, len(full), -1)


def _shared(full: Sequence[int], ablated: Sequence[int]) -> int:
    """Tokens both begin with, leaving at least one of `ablated` to be run."""
    n = 0
    while n < min(len(full), len(ablated) - 1) and full[n] == ablated[n]:
        n += 1
    return n
