"""Read and write activations during a model's own forward pass."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ray_explain.interventions.layout import FAMILIES, SITES, Layout, LayoutError, Site, layout_of

Kind = Literal["replace", "add", "zero", "mean"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch:
    """One vector per batch row, written at one position of one layer.

    `positions` count padded tokens. `values` is None for `zero` and for `mean`, which writes the mean over all the
    positions of the batch row (no padding, then).

    Raises:
        ValueError: an unknown site or kind, values missing or not wanted, or not one position per row of values.
    """

    layer: int
    positions: Int[Tensor, " batch"]
    values: Float[Tensor, "batch d_model"] | None = None
    site: Site = "resid_post"
    kind: Kind = "replace"

    def __post_init__(self) -> None:
        check_kind(self.site, self.kind, self.values is not None)
        if self.values is not None and self.values.shape[0] != self.positions.shape[0]:
            raise ValueError(
                f"{self.values.shape[0]} vectors for {self.positions.shape[0]} positions: one per batch row"
            )


def check_kind(site: str, kind: str, has_vectors: bool) -> None:
    """Raises ValueError: unknown site or kind, or vectors missing (replace, add) or not wanted (zero, mean)."""
    if site not in SITES:
        raise ValueError(f"site {site!r}: it is one of {', '.join(SITES)}")
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: it is one of {', '.join(KINDS)}")
    if has_vectors != (kind in ("replace", "add")):
        raise ValueError(f"kind {kind!r} {'takes no vectors' if has_vectors else 'needs vectors to write'}")


@contextmanager
def capturing(
    model: nn.Module, layers: Sequence[int], site: Site = "resid_post"
) -> Iterator[dict[int, Float[Tensor, "batch pos d_model"]]]:
    """Collect the activations at `site` of each of `layers` during the next forward pass.

    Layer i of `resid_post` is the residual stream after block i (transformers' hidden state i + 1, but the last one is
    taken before the final norm).
    """
    layout = layout_of(model)
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], None]:
        return lambda activation: found.__setitem__(layer, activation.detach())

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(at_site(layout, layout.checked_layer(layer), site, keep(layer)))
        yield found


@contextmanager
def writing(model: nn.Module, *patches: Patch) -> Iterator[None]:
    """Change the activations as `patches` say, in order, in every forward pass until the block is left."""
    layout = layout_of(model)
    with ExitStack() as hooks:
        for patch in patches:
            layer = layout.checked_layer(patch.layer)
            hooks.enter_context(at_site(layout, layer, patch.site, partial(_written, patch)))
        yield


def replacing(model: nn.Module, *patches: Patch) -> Any:
    """`writing` for patches that overwrite.

    Raises:
        ValueError: a patch of another kind.
    """
    for patch in patches:
        if patch.kind != "replace":
            raise ValueError(f"replacing was given a patch of kind {patch.kind!r}: use writing")
    return writing(model, *patches)


@contextmanager
def at_site(layout: Layout, layer: int, site: Site, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `change` with the activations at a site in every forward pass; what it returns (if anything) goes on.

    The hook is gone when the block is left, also by an error.

    Raises:
        LayoutError: attention and MLP of this layer do not add what their sites read; told when one of them is first
            asked for, by a run of four tokens.
    """
    if site in ("attn_out", "mlp_out") and layout.family not in FAMILIES:
        _check_parts(layout, layer)
    with _hooked(layout.module(layer, site), site, change):
        yield


@contextmanager
def _hooked(module: nn.Module, site: Site, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    if site == "resid_pre":
        handle = module.register_forward_pre_hook(_before(change), with_kwargs=True)
    else:
        handle = module.register_forward_hook(_after(change))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def only_at(module: nn.Module, tokens: Int[Tensor, " some"]) -> Iterator[None]:
    """Let `module`, a function of each token alone, work on these (places in the flattened [batch pos]) and give zeros
    for the others."""
    shapes: list[torch.Size] = []

    def selected(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        shapes.append(args[0].shape[:-1])
        return (args[0].flatten(0, 1)[None, tokens],)

    def scattered(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        shape = shapes.pop()
        return output.new_zeros(shape.numel(), output.shape[-1]).index_copy_(0, tokens, output[0]).unflatten(0, shape)

    # first of its hooks, so that those of others see all tokens
    handles = [module.register_forward_pre_hook(selected), module.register_forward_hook(scattered, prepend=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_checked: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()  # layers of decoders


def _check_parts(layout: Layout, layer: int) -> None:
    """Raises LayoutError: what goes into the block, attn_out and mlp_out do not sum up to what comes out of it."""
    layers = _checked.setdefault(layout.decoder, set())
    if layer in layers:
        return
    found: dict[Site, Tensor] = {}
    batch = torch.tensor([[(7 * i + 3) % layout.embedding.weight.shape[0] for i in range(4)]], device=layout.device)
    with torch.no_grad(), _without_hooks(layout.decoder), ExitStack() as own:
        for site in SITES:
            own.enter_context(_hooked(layout.module(layer, site), site, partial(found.__setitem__, site)))
        layout.decoder(batch, use_cache=False)
    told = f"layer {layer} of this {layout.family} model: attn_out and mlp_out are not what the residual stream gains"
    way_out = "use resid_pre or resid_post"
    if len({activation.shape for activation in found.values()}) > 1 or len(found) < len(SITES):
        raise LayoutError(f"{told} (no such output was seen); {way_out}")
    before, after, attention, mlp = (found[site].float() for site in SITES)
    scale = max(part.abs().max().item() for part in (before, after, attention, mlp))
    difference = (before + attention + mlp - after).abs().max().item()
    if not difference <= 8 * torch.finfo(layout.dtype).eps * scale:
        raise LayoutError(f"{told} (it differs by {difference:.2g}, the largest part is {scale:.2g}); {way_out}")
    layers.add(layer)


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """No hook of the module or of those in it runs while this lasts: they wait for the run that comes afterwards."""
    kept = [(m, name, getattr(m, name)) for m in module.modules() for name in ("_forward_pre_hooks", "_forward_hooks")]
    for m, name, _ in kept:
        setattr(m, name, OrderedDict())
    try:
        yield
    finally:
        for m, name, hooks in kept:
            setattr(m, name, hooks)


def _before(change: Callable[[Tensor], Tensor | None]) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        changed = change(args[0] if args else kwargs["hidden_states"])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    return hook


def _after(change: Callable[[Tensor], Tensor | None]) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        changed = change(output[0] if isinstance(output, tuple) else output)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _written(patch: Patch, activation: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
    rows = torch.arange(activation.shape[0], device=activation.device)
    at = (rows, patch.positions.to(activation.device))
    written = activation.clone()
    if patch.kind == "zero":
        written[at] = 0
    elif patch.kind == "mean":
        written[at] = activation.float().mean(1).to(activation.dtype)
    else:
        values = patch.values.to(activation)  # type: ignore[union-attr]  # checked in Patch
        written[at] = values if patch.kind == "replace" else activation[at] + values
    return written
