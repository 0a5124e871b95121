"""Load a target or an explainer from a folder or a hub id, and check that it can be read and written."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ray_explain.errors import BadInput
from ray_explain.interventions.hooks import Patch, capturing, replacing
from ray_explain.interventions.layout import Layout, layout_of
from ray_explain.interventions.patching import clean_logits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Disagreement beyond rounding, as a share of the largest magnitude: two ways to compute the same in this dtype.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

NUMBERS_READ = 64  # of each tensor, for a fingerprint; fewer than any embedding has, so that added rows do not count


class ModelError(BadInput):
    """The model cannot be loaded or fails its self-check; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in eval mode without gradients, and its tokenizer.

    `revision` is the hub commit that was loaded, or None for a folder. `pad_id` is safe to pad with: the tokenizer's
    padding token or, without one, its end of text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    layout: Layout

    @property
    def d_model(self) -> int:
        return self.layout.d_model

    @property
    def n_layers(self) -> int:
        return self.layout.n_layers

    @property
    def d_vocab(self) -> int:
        return self.layout.d_vocab

    @property
    def device(self) -> torch.device:
        return self.layout.device

    @property
    def pad_id(self) -> int:
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else end if end is not None else 0


def load_model(
    path_or_id: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    whole: bool = True,
) -> Loaded:
    """A causal language model with its tokenizer, checked by `self_check`.

    Only safetensors are read and no code from the hub is run. `device` defaults to the first GPU, or the CPU. A model
    that is not `whole`, since several processes hold a share each, cannot run yet and is not checked.

    Raises:
        ModelError: unknown dtype; a folder that lacks its config, weights or tokenizer; a hub id that cannot be read; a
            model that fails its self-check.
        LayoutError: the model is not built like a decoder we know.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: it is one of {', '.join(DTYPES)}")
    check_folder(path_or_id)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _named(path_or_id, revision):
        config = AutoConfig.from_pretrained(path_or_id, revision=revision, trust_remote_code=False)
        commit = getattr(config, "_commit_hash", None)
        same: dict[str, Any] = {"revision": commit or revision, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, **same)
        model = AutoModelForCausalLM.from_pretrained(path_or_id, dtype=DTYPES[dtype], use_safetensors=True, **same)
    model.eval().requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]  # transformers decorates it
    if whole:
        self_check(model, path_or_id)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        name=path_or_id,
        revision=commit,
        layout=layout_of(model),
    )


def self_check(model: PreTrainedModel, name: str) -> None:
    """Runs eight tokens: what is captured must be transformers' own hidden states, writing a vector must matter where
    writing the same one back does not, the fast path must agree with the model's own forward pass, and nothing may be
    left behind.

    Raises:
        ModelError: one of these does not hold; the message says which and by how much.
    """
    layout = layout_of(model)
    ids = [(7 * i + 3) % layout.embedding.weight.shape[0] for i in range(8)]
    batch = torch.tensor([ids], device=layout.device)
    with torch.no_grad():
        out = model(input_ids=batch, output_hidden_states=True, use_cache=False)
        hooks = _count_hooks(model)  # those that transformers adds for its hidden states stay
        with capturing(model, range(layout.n_layers)) as captured:
            model(input_ids=batch, use_cache=False)
        if not torch.isfinite(out.logits).all():
            raise ModelError(f"{name} gives logits that are not finite in {layout.dtype}")
        for layer in range(layout.n_layers):
            last = layer == layout.n_layers - 1
            stream = layout.final_norm(captured[layer]) if last else captured[layer]
            _check_equal(f"{name}, layer {layer}: captured and own hidden state", stream, out.hidden_states[layer + 1])
        clean = out.logits[:, -1]
        stream, position = captured[layer := layout.n_layers // 2], torch.tensor([3])
        with replacing(model, Patch(layer=layer, positions=position, values=stream[:, 3])):
            _check_equal(f"{name}: logits with a vector written back", model(input_ids=batch).logits[:, -1], clean)
        with replacing(model, Patch(layer=layer, positions=position + 4, values=-stream[:, 3])):
            if torch.equal(model(input_ids=batch).logits[:, -1], clean):
                raise ModelError(f"{name}: writing another vector at layer {layer} changes nothing")
    _check_equal(f"{name}: logits of the fast path", clean_logits(model, [ids]), clean)
    if _count_hooks(model) != hooks:
        raise ModelError(f"{name}: the self-check left {_count_hooks(model) - hooks} hooks behind")


def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of the first numbers of each tensor, rounded to bfloat16: the same whatever the dtype, the files or
    rows added to a vocabulary. Cheap also for large models: a few pages of each tensor are read."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        numbers = tensors[name].detach().flatten()[:NUMBERS_READ].to("cpu", torch.bfloat16)
        digest.update(f"{name}\0".encode() + numbers.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def files_fingerprint(path_or_id: str, revision: str | None = None) -> str | None:
    """`weights_fingerprint` of a model's files, without loading it; None where not all of them are on this machine."""
    folder = Path(path_or_id)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(path_or_id, revision=revision, local_files_only=True))
        except (OSError, ValueError):  # not in the cache, or no hub id
            return None
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    if not all((folder / shard).is_file() for shard in shards):
        return None
    tensors: dict[str, Tensor] = {}
    for shard in sorted(shards):
        with safe_open(folder / shard, "pt") as file:
            names = file.keys()
            tensors |= {name: _first_rows(file.get_slice(name)) for name in names}
    return weights_fingerprint(tensors)


def _first_rows(tensor: Any) -> Tensor:
    """Of a safetensors slice: rows enough for a fingerprint."""
    shape = tensor.get_shape()
    return tensor[: -(-NUMBERS_READ // max(1, math.prod(shape[1:])))] if shape else tensor[...]


def check_folder(path_or_id: str) -> None:
    """Raises: ModelError: a folder that is not there, or lacks its config, weights or tokenizer."""
    folder = Path(path_or_id)
    if not folder.is_dir():
        if path_or_id.startswith(("/", ".")):  # else the id of a model on the hub, perhaps
            raise ModelError(f"there is no folder {folder}")
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: it is not a saved transformers model")
    if not any(folder.glob("*.safetensors")):
        other = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "none of another kind either"
        raise ModelError(f"{folder} has no *.safetensors weights ({other}): save with model.save_pretrained(folder)")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ModelError(f"{folder} has no tokenizer: save it there with tokenizer.save_pretrained(folder)")


@contextmanager
def _named(path_or_id: str, revision: str | None) -> Iterator[None]:
    """Says which model it was that transformers could not read."""
    try:
        yield
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        at, reason = f" at revision {revision}" if revision else "", str(error).strip().partition("\n")[0]
        raise ModelError(f"{path_or_id}{at} is no folder or hub id that can be loaded: {reason}") from error


def _check_equal(what: str, one: Tensor, other: Tensor) -> None:
    difference = (one.float() - other.float()).abs().max().item()
    allowed = ROUNDING.get(other.dtype, ROUNDING[torch.float32]) * max(1.0, other.float().abs().max().item())
    if not difference <= allowed:
        raise ModelError(f"{what} differ by {difference:.2e}; rounding explains {allowed:.2e}")


def _count_hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
