"""A target's vector in place of a token of the explainer's prompt: one way for all families, by hooks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ray_explain.interventions.layout import Layout, layout_of

Mode = Literal["replace", "add"]
Scale = Literal["raw", "unit", "mean_embedding"]
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True)
class InjectionConfig:
    """How vectors enter.

    replace: the vector is the embedding of its slot, at its own norm ("raw", the paper's way), at norm 1 or at the mean
    norm of the token embeddings. add: after block `layer`, it is added to the residual stream at its slot, with the
    norm that the stream has there (Activation Oracles, arXiv 2512.15674).

    Raises:
        ValueError: an unknown mode or scale, a layer without `add` or the reverse, or a scale with `add`.
    """

    mode: Mode = "replace"
    layer: int | None = None
    scale: Scale = "raw"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode) or self.scale not in get_args(Scale):
            raise ValueError(
                f"injection {self.mode!r} with scale {self.scale!r}: the mode is one of {', '.join(get_args(Mode))}, "
                f"the scale one of {', '.join(get_args(Scale))}"
            )
        if (self.mode == "add") != (self.layer is not None):
            raise ValueError(f"injection {self.mode!r} with layer {self.layer}: `add` needs one, `replace` has none")
        if self.mode == "add" and self.scale != "raw":
            raise ValueError(
                f"injection 'add' with scale {self.scale!r}: the stream gives its norm, leave the scale out"
            )


@contextmanager
def injecting(
    model: nn.Module,
    slot_id: int,
    vectors: Float[Tensor, "n_slots d_explainer"],
    injection: InjectionConfig | None = None,
    embedding_norm: float | None = None,
) -> Iterator[None]:
    """Let each slot token stand for one of `vectors`, in reading order, in the forward passes of this context.

    The first pass and every longer than one token must hold all slots; later passes of one token each are steps of
    generation with a cache, which read the slots there. Gradients flow into `vectors` and the rest of the model.
    Families that scale embeddings (Gemma, Granite) get the vector at the same norm in their residual stream as others.

    Args:
        embedding_norm: `mean_embedding_norm` of the model, for that scale.

    Raises:
        ValueError: in the pass: the batch holds some other number of slots, or the vectors have another width.
    """
    injection = injection or InjectionConfig()
    layout = layout_of(model)
    scaled = rescaled(vectors, injection.scale, embedding_norm)
    with ExitStack() as hooks:
        if injection.mode == "replace":
            hooks.enter_context(_replacing_embeddings(layout, slot_id, scaled / embedding_multiplier(layout)))
        else:
            hooks.enter_context(_adding_after_block(layout, slot_id, scaled, injection.layer or 0))
        yield


@contextmanager
def overriding_tokens(
    model: nn.Module, token_ids: Int[Tensor, " n"], rows: Float[Tensor, "n d_explainer"]
) -> Iterator[None]:
    """Let `rows` be the embeddings of `token_ids` (distinct), while the model's own table stays as it is.

    `rows` are as the embedding module gives them out, after its scaling where it has one.
    """

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        ids = _token_ids(args, kwargs)
        for token_id, row in zip(token_ids, rows):  # tensors: reading them would wait for the GPU at every token
            output = torch.where((ids == token_id).unsqueeze(-1), row.to(output), output)
        return output

    with _hook(layout_of(model).embedding.register_forward_hook(hook, with_kwargs=True)):
        yield


@torch.no_grad()
def mean_embedding_norm(model: nn.Module) -> float:
    """Mean norm of the token embeddings as the first block's input sees them (positions not counted).

    Under ZeRO-3 the embedding has to be gathered around this call.
    """
    layout = layout_of(model)
    ids = torch.arange(layout.embedding.weight.shape[0], device=layout.embedding.weight.device)
    norms = [layout.embedding(chunk).float().norm(dim=-1) for chunk in ids.split(_ROWS_AT_ONCE)]
    return torch.cat(norms).mean().item() * embedding_multiplier(layout)


def embedding_multiplier(layout: Layout) -> float:
    """What the model multiplies embeddings by after the embedding module (Granite); Gemma does so within it."""
    return float(getattr(layout.model.config.get_text_config(), "embedding_multiplier", None) or 1.0)


def rescaled(vectors: Float[Tensor, "n d"], scale: Scale, embedding_norm: float | None) -> Float[Tensor, "n d"]:
    """`vectors` at the norm that `scale` says; a zero vector stays zero.

    Raises:
        ValueError: "mean_embedding" without the norm.
    """
    if scale == "raw":
        return vectors
    if scale == "mean_embedding" and embedding_norm is None:
        raise ValueError("scale 'mean_embedding' needs `embedding_norm`: give mean_embedding_norm(model)")
    norm = 1.0 if scale == "unit" or embedding_norm is None else embedding_norm
    return (norm * nn.functional.normalize(vectors.float(), dim=-1)).to(vectors.dtype)


def _replacing_embeddings(layout: Layout, slot_id: int, vectors: Tensor) -> AbstractContextManager[None]:
    finder = _SlotFinder(slot_id, len(vectors))

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        slots = finder(_token_ids(args, kwargs))
        if slots is None:
            return None
        _check_width(vectors, output)
        return output.masked_scatter(slots.unsqueeze(-1), vectors.to(output))

    return _hook(layout.embedding.register_forward_hook(hook, with_kwargs=True))


@contextmanager
def _adding_after_block(layout: Layout, slot_id: int, vectors: Tensor, layer: int) -> Iterator[None]:
    finder = _SlotFinder(slot_id, len(vectors))
    found: list[Bool[Tensor, "batch pos"] | None] = [None]

    def look(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        found[0] = finder(_token_ids(args, kwargs))

    def add(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        if found[0] is None:
            return None
        stream = output[0] if isinstance(output, tuple) else output
        added = _added(stream, found[0], vectors)
        return (added, *output[1:]) if isinstance(output, tuple) else added

    block = layout.blocks[layout.checked_layer(layer)]
    with (
        _hook(layout.embedding.register_forward_hook(look, with_kwargs=True)),
        _hook(block.register_forward_hook(add)),
    ):
        yield


def _added(
    stream: Float[Tensor, "batch pos d"], slots: Bool[Tensor, "batch pos"], vectors: Float[Tensor, "n d"]
) -> Float[Tensor, "batch pos d"]:
    _check_width(vectors, stream)
    norms = stream.detach()[slots].float().norm(dim=-1, keepdim=True)
    direction = nn.functional.normalize(vectors.float(), dim=-1).to(stream.device)
    return stream + torch.zeros_like(stream).masked_scatter(slots.unsqueeze(-1), (norms * direction).to(stream))


class _SlotFinder:
    """Where the slots of a pass are; None in a step of generation."""

    def __init__(self, slot_id: int, n_vectors: int) -> None:
        self.slot_id, self.n_vectors, self.passes = slot_id, n_vectors, 0

    def __call__(self, ids: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"] | None:
        self.passes += 1
        if self.passes > 1 and ids.shape[1] == 1:
            return None
        slots = ids == self.slot_id
        n_slots = int(slots.sum())
        if n_slots != self.n_vectors:
            raise ValueError(
                f"the batch holds {n_slots} slot tokens ({self.slot_id}) but there are {self.n_vectors} vectors: "
                "give one vector per slot, in reading order"
            )
        return slots


def _token_ids(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["input"]


def _check_width(vectors: Tensor, stream: Tensor) -> None:
    if vectors.shape[-1] != stream.shape[-1]:
        raise ValueError(
            f"vectors of width {vectors.shape[-1]} for an explainer of width {stream.shape[-1]}: project them first"
        )


@contextmanager
def _hook(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def keeping_positions(unembedding: nn.Module, keep: Bool[Tensor, "batch pos"]) -> Iterator[None]:
    """Let the unembedding see only the positions that `keep` marks: logits then are [1, n_kept, d_vocab].

    What a family does to logits afterwards (Gemma 2's cap, scales) stays its own code.
    """

    def hook(module: nn.Module, args: tuple) -> tuple:
        return (args[0][keep].unsqueeze(0), *args[1:])

    with _hook(unembedding.register_forward_pre_hook(hook)):
        yield
