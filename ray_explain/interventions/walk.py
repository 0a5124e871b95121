"""Many rows of unequal length up the blocks at once, each from the layer and the position where it starts to matter.

The tokens of all rows lie behind one another in one sequence, so that every matrix product of a block is one large one
without padding. Only attention looks at rows: it replaces the model's attention function while a walk lasts, gathers
each row's keys (its own, and those of its origin for the positions before its start) and calls the library's function
on them. Everything else is the model's own block, called as its own forward pass calls it.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
from transformers.modeling_utils import AttentionInterface

from ray_explain.interventions.hooks import at_site, only_at
from ray_explain.interventions.layout import FAMILIES, Layout, Site

PACKED = "ray_explain_packed"  # name of our attention function in transformers' registry

# On a CPU with 32 MiB of cache, whole prompts in chunks of four times this size take 1.2 times as long (width 256).
CACHED = 1 << 25

T = TypeVar("T")
Visit = Callable[[Site, int, Float[Tensor, "tokens d_model"]], Float[Tensor, "tokens d_model"]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """The part of a prompt that is carried up: its positions from `start` to `length` - 1.

    `origin` is the index of the row that holds the keys and values of the positions before `start`: a whole prompt,
    which has itself as origin. With `ids` the row enters as embeddings; without, as a copy of its origin's residual
    stream before block `join` (after the last block if `join` is the number of layers).
    """

    length: int
    start: int
    origin: int
    join: int = 0
    ids: tuple[int, ...] | None = None

    @property
    def carried(self) -> int:
        return self.length - self.start


def whole(ids: Sequence[int], index: int) -> Row:
    """A clean run of a prompt, to be row `index`."""
    return Row(length=len(ids), start=0, origin=index, ids=tuple(ids))


def obstacle(layout: Layout, longest: int) -> str | None:
    """Why the blocks can't be walked for prompts of up to `longest` tokens; None if they can."""
    config = layout.config
    if layout.family not in FAMILIES:
        return f"blocks of {layout.family} models are not among those known ({', '.join(FAMILIES)})"
    if getattr(config, "reorder_and_upcast_attn", False) or getattr(config, "add_cross_attention", False):
        return "this GPT-2 upcasts its attention or has cross-attention"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention looks ahead"
    if len({p.device for p in layout.decoder.parameters()}) > 1:
        return "its blocks lie on several devices"
    return _rotary_obstacle(getattr(config, "rope_parameters", None) or {}, config, longest)


def _rotary_obstacle(rope: dict, config: Any, longest: int) -> str | None:
    for one in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        original: int = one.get("original_max_position_embeddings") or config.max_position_embeddings
        if one.get("rope_type") in ("dynamic", "longrope") and longest > original:
            return f"{one['rope_type']} rotary frequencies depend on the longest prompt beyond {original} tokens"
    return None


def row_bytes(layout: Layout, *, logits: bool = True) -> Callable[..., int]:
    """How many bytes a row needs at most while it is walked, as a function of (L, C): the tokens of its prompt and how
    many of them it carries (default: all).

    With e bytes per number of the model's dtype, q and kv the widths of all queries and of all keys, and L', C' rounded
    up to powers of two (rows are padded to their bucket's shape):

        C * (5 e max(d_ff, q + kv) + 6 max(e, 4) d_model)       a block's intermediate results
        + L' * 4 e (q + kv) + C' * 4 e q                        gathered keys, values, queries; outputs
        + C' * L' * (2 + 2 e, with eager attention + 3 heads max(e, 4))      masks; scores
        + 16 d_vocab                                            logits, where any are computed
    """
    config, e = layout.config, layout.dtype.itemsize
    heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or layout.d_model // heads
    q, kv = heads * d_head, (getattr(config, "num_key_value_heads", None) or heads) * d_head
    d_ff = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * layout.d_model
    scores = 3 * heads * max(e, 4) if _attends_eagerly(config) else 0
    per_token = 5 * e * max(d_ff, q + kv) + 6 * max(e, 4) * layout.d_model

    def cost(length: int, carried: int | None = None) -> int:
        carried = length if carried is None else carried
        slots, keys = _grid(carried), _grid(length)
        attention = keys * 4 * e * (q + kv) + slots * 4 * e * q + slots * keys * (2 + 2 * e + scores)
        return carried * per_token + attention + 16 * layout.d_vocab * logits

    return cost


def best_bytes(layout: Layout, on_cpu: int = CACHED) -> float:
    """How many bytes of `row_bytes` run fastest at once: on a GPU as many as fit, on a CPU fewer (default: what its
    caches hold)."""
    return on_cpu if layout.device.type == "cpu" else inf


def budgeted(
    items: Iterable[T],
    cost: Callable[[T], int],
    budget: int,
    shared: Callable[[T], tuple[Hashable, int]] = lambda item: (None, 0),
    *,
    best: float = inf,
) -> Iterator[list[T]]:
    """`items` in order, as many at a time as cost at most `budget` bytes, or `best` bytes if that is less; one item may
    cost more than `best`.

    `shared` names what an item needs that costs only once per chunk, and its cost.

    Raises:
        ValueError: one item alone costs more than the budget.
    """
    chunk: list[T] = []
    used: set[Hashable] = set()
    total = 0
    for item in items:
        key, once = shared(item)
        own = cost(item)
        if chunk and total + own + (0 if key in used else once) > min(budget, best):
            yield chunk
            chunk, used, total = [], set(), 0
        total += own + (0 if key in used else once)
        used.add(key)
        if total > budget:
            raise ValueError(f"a memory budget of {budget:,} bytes: one row alone needs {total:,}; give at least that")
        chunk.append(item)
    if chunk:
        yield chunk


@dataclass
class Bucket:
    """Rows of similar shape, in the order in which they join, that attend in one call (padded on the left)."""

    joins: np.ndarray  # block before which each row enters, ascending
    tokens: Int[Tensor, "rows slots"]  # where the queries are; a padded slot repeats the row's first token
    keys: Int[Tensor, "rows keys"]
    query_positions: Int[Tensor, "rows slots"]
    key_positions: Int[Tensor, "rows keys"]  # negative: padding
    padded: Bool[Tensor, "rows slots"]
    real_slots: Int[Tensor, " real"] | None  # flat indices of the slots that hold a token; None: all do
    real_tokens: Int[Tensor, " real"]  # those tokens
    real_until: np.ndarray  # how many real slots the first n rows have, for n from 0
    plain: bool  # every row whole and of the same length: causality is all the mask says
    first: int | None  # the first of the tokens if no other row's lie between them, so that nothing has to be gathered
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, like: Tensor | None) -> Tensor | None:
        """[rows, 1, slots, keys]: True where a query may look, or 0 and -max in the dtype of `like`. None if plain."""
        if self.plain and like is None and (window is None or window >= self.keys.shape[1]):
            return None
        if window not in self.masks:
            allowed = self._allowed(window)
            if like is not None:
                allowed = torch.where(
                    allowed, torch.zeros((), dtype=like.dtype, device=like.device), torch.finfo(like.dtype).min
                )
            self.masks[window] = allowed
        return self.masks[window]

    def taken(self, n: int, q: Tensor, k: Tensor, v: Tensor) -> list[Float[Tensor, "n heads _ d_head"]]:
        """Queries, keys and values of the first n rows, from those of all tokens [tokens, heads, d_head]."""
        if self.first is not None:
            shape = (n, self.tokens.shape[1])
            these = slice(self.first, self.first + n * shape[1])
            return [x[these].unflatten(0, shape).transpose(1, 2) for x in (q, k, v)]
        return [q[self.tokens[:n]].transpose(1, 2), *(x[self.keys[:n]].transpose(1, 2) for x in (k, v))]

    def put(self, n: int, attended: Float[Tensor, "n slots heads d_head"], out: Tensor) -> None:
        """Writes what the first n rows have attended to into `out` [tokens, heads, d_head]."""
        slots = attended.flatten(0, 1)
        real = self.real_until[n]
        if self.first is not None:
            out[self.first : self.first + real] = slots
        else:
            out[self.real_tokens[:real]] = slots if self.real_slots is None else slots[self.real_slots[:real]]

    def _allowed(self, window: int | None) -> Tensor:
        rule: Callable = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
        queries, keys = self.query_positions[:, None, :, None], self.key_positions[:, None, None, :]
        zero = torch.zeros((), dtype=torch.long, device=keys.device)
        # a padded slot may look anywhere: its output is never read, but a row without any key would be NaN
        return (rule(zero, zero, queries, keys) & (keys >= 0)) | self.padded[:, None, :, None]


class Packing:
    """Rows laid behind one another: those with ids first, then those that join, lowest block first."""

    def __init__(self, rows: Sequence[Row], n_layers: int, device: torch.device):
        self.rows, self.device = rows, device
        self.starts = np.array([r.start for r in rows])
        self.lengths = np.array([r.length for r in rows])
        self.joins = np.array([r.join for r in rows])
        carried = self.lengths - self.starts
        self.offsets = np.concatenate([[0], carried.cumsum()])
        self.origins = self.offsets[[r.origin for r in rows]]
        ids = [i for r in rows if r.ids is not None for i in r.ids]
        self.ids = torch.tensor(ids, device=device)
        self.positions = self._on_device(np.concatenate([np.arange(r.start, r.length) for r in rows]))
        self.sources = self._on_device(
            np.concatenate([o + np.arange(r.start, r.length) for o, r in zip(self.origins, rows, strict=True)])
        )
        active_rows = np.searchsorted(self.joins, np.arange(n_layers + 1), side="right")
        self.n_tokens = self.offsets[active_rows]  # before block i, and after the last one
        self.buckets = [self._bucket(members) for members in self._groups()]

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def ends(self, layer: int) -> Int[Tensor, " rows"]:
        """Where the last token is of each row that is there before block `layer`."""
        return self._on_device(self.offsets[1:][self.joins <= layer] - 1)

    @property
    def last_tokens(self) -> Int[Tensor, " rows"]:
        """Where each row's last token is."""
        return self._on_device(self.offsets[1:] - 1)

    def _groups(self) -> Iterator[np.ndarray]:
        groups: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
        for i, row in enumerate(self.rows):
            groups[_grid(row.carried), _grid(row.length), row.start == 0].append(i)
        return (np.array(members) for members in groups.values())

    def _bucket(self, members: np.ndarray) -> Bucket:
        starts, lengths = self.starts[members, None], self.lengths[members, None]
        own, origin = self.offsets[members, None], self.origins[members, None]
        slots, n_keys = (lengths - starts).max(), lengths.max()
        queries = lengths - slots + np.arange(slots)
        keys = lengths - n_keys + np.arange(n_keys)
        at = np.where(keys >= starts, own + keys - starts, origin + keys)
        real = queries >= starts
        tokens = own + np.maximum(queries - starts, 0)
        return Bucket(
            joins=self.joins[members],
            tokens=self._on_device(tokens),
            keys=self._on_device(np.where(keys < 0, own, at)),
            query_positions=self._on_device(queries),
            key_positions=self._on_device(keys),
            padded=self._on_device(~real),
            real_slots=None if real.all() else self._on_device(real.flatten().nonzero()[0]),
            real_tokens=self._on_device(tokens[real]),
            real_until=np.concatenate([[0], real.sum(1).cumsum()]),
            plain=bool((keys >= 0).all() and (starts == 0).all()),
            first=int(own[0, 0]) if (keys >= 0).all() and (np.diff(members) == 1).all() and not starts.any() else None,
        )


def _grid(n: int) -> int:
    """`n` rounded up to a power of two: rows of one bucket differ by less than a factor of two."""
    return 1 << (n - 1).bit_length()


def walk(
    layout: Layout,
    packing: Packing,
    visit: Visit,
    *,
    inside: Collection[tuple[Site, int]] = (),
    until: int | None = None,
    only_ends: bool = False,
) -> Float[Tensor, "tokens d_model"]:
    """The residual stream after block `until` - 1 (default: the last), all rows on board.

    One walk at a time per model: while it lasts the model's own attention is out of service.

    With `only_ends` it is right after the last block only for each row's last token: the others pass by its MLP.

    `visit` is called with the activations before every block (also before block `until`), after every block, and at the
    sites of `inside` (pairs of `attn_out` or `mlp_out` and a layer), and may return others.
    """
    until = layout.n_layers if until is None else until
    positions = packing.positions[None]
    with torch.no_grad(), _packed_attention(layout) as eager, ExitStack() as hooks:
        for site, layer in inside:
            hooks.enter_context(at_site(layout, layer, site, _flat(visit, site, layer)))
        if only_ends:
            hooks.enter_context(only_at(layout.mlp(layout.n_layers - 1), packing.ends(layout.n_layers - 1)))
        hidden = _embedded(layout, packing)
        rotary = _rotary(layout, hidden, positions)
        for layer in range(until + 1):
            hidden = _joined(hidden, packing, layer)
            if layer > 0:
                hidden = visit("resid_post", layer - 1, hidden)
            if layer < layout.n_layers:
                hidden = visit("resid_pre", layer, hidden)
            if layer == until:
                return hidden
            hidden = _block(layout, layer, hidden, positions, rotary, {"packed": packing, "eager": eager})
    raise AssertionError("unreachable: the loop returns at its last step")


def _flat(visit: Visit, site: Site, layer: int) -> Callable[[Tensor], Tensor]:
    return lambda activations: visit(site, layer, activations[0])[None]


def _embedded(layout: Layout, packing: Packing) -> Float[Tensor, "tokens d_model"]:
    hidden = layout.embedding(packing.ids)
    if layout.family == "gpt2":
        hidden = hidden + layout.decoder.wpe(packing.positions[: len(packing.ids)])
    return hidden


def _joined(hidden: Tensor, packing: Packing, layer: int) -> Tensor:
    sources = packing.sources[hidden.shape[0] : packing.n_tokens[layer]]
    return torch.cat([hidden, hidden[sources]]) if len(sources) else hidden


def _block(
    layout: Layout, layer: int, hidden: Tensor, positions: Tensor, rotary: Callable[[int], dict], attending: dict
) -> Tensor:
    n = hidden.shape[0]
    given = {name: tuple(x[:, :n] for x in pair) for name, pair in rotary(layer).items()}
    out = layout.blocks[layer](
        hidden[None], attention_mask=None, position_ids=positions[:, :n], layer=layer, **attending, **given
    )
    return out[0]


def _rotary(layout: Layout, hidden: Tensor, positions: Tensor) -> Callable[[int], dict]:
    """Rotary embeddings as each block takes them; none where positions are learned (GPT-2)."""
    rotary = getattr(layout.decoder, "rotary_emb", None)
    if rotary is None:
        return lambda layer: {}
    if layout.family == "gemma3_text":
        types = layout.config.layer_types
        pairs = {kind: rotary(hidden, positions, kind) for kind in set(types)}
        return lambda layer: {"position_embeddings": pairs[types[layer]]}
    pair = rotary(hidden, positions)
    return lambda layer: {"position_embeddings": pair}


@contextmanager
def _packed_attention(layout: Layout) -> Iterator[bool]:
    """Let the model's attention modules call `_attend` while this lasts; gives whether it calls the eager function."""
    config = layout.config
    before, eager = config._attn_implementation, _attends_eagerly(config)
    config._attn_implementation = PACKED
    try:
        yield eager
    finally:
        config._attn_implementation = before


def _attends_eagerly(config: Any) -> bool:
    """Whether a walk calls the eager function: as the model does, and wherever scores are soft-capped (Gemma 2), which
    the function that stands in for all others, PyTorch's, cannot do."""
    return config._attn_implementation == "eager" or getattr(config, "attn_logit_softcapping", None) is not None


def _attend(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens d_head"],
    key: Float[Tensor, "1 kv_heads tokens d_head"],
    value: Float[Tensor, "1 kv_heads tokens d_head"],
    attention_mask: None,
    *,
    packed: Packing,
    layer: int,
    eager: bool,
    **how: Any,
) -> tuple[Float[Tensor, "1 tokens heads d_head"], None]:
    """Attention within rows, by the library's own function (`how`: scaling, dropout, sliding window, soft-capping)."""
    library: Callable = (
        sys.modules[type(module).__module__].eager_attention_forward if eager else sdpa_attention_forward
    )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for bucket in packed.buckets:
        n = int(np.searchsorted(bucket.joins, layer, side="right"))
        if n == 0:
            continue
        mask = bucket.mask(how.get("sliding_window"), q if eager else None)
        attended, _ = library(module, *bucket.taken(n, q, k, v), None if mask is None else mask[:n], **how)
        bucket.put(n, attended, out)
    return out[None], None


AttentionInterface.register(PACKED, _attend)
