"""An explainer as a folder: weights, tokenizer, and `explainer.json`, which says what it may be used with."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ray_explain.errors import BadInput
from ray_explain.explainer.injection import InjectionConfig
from ray_explain.explainer.markers import Markers, markers_of
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.projection import Projection
from ray_explain.explainer.vocabulary import make_room
from ray_explain.interventions.layout import layout_of
from ray_explain.models import weights_fingerprint

logger = logging.getLogger(__name__)
SIDECAR, EXTRAS, ADAPTER = "explainer.json", "projection.safetensors", "adapter_model.safetensors"
_LATER = {"n_layers", "base_weights", "target_weights"}
_PROBE = "The output would remain unchanged from <<<Paris>>>. 12 34\n\tWhat does it encode?"


class Mismatch(BadInput):
    """An explainer is not what it is to be used as, or its files do not belong together."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Everything an explainer depends on beside its weights. `wordings` holds the version of each wording set that its
    questions were written in; `embedding_norm` is that of the model it started from."""

    target: str
    target_revision: str | None
    base: str  # folder or hub id of the model it was trained from; a LoRA explainer needs it to be loaded
    base_revision: str | None
    lora: bool
    d_target: int
    d_explainer: int
    layers: tuple[int, ...]  # of the target, that a linear projection knows
    projection: str
    injection: dict[str, Any]
    embedding_norm: float | None
    markers: dict[str, Any]
    wordings: dict[str, str]
    tokenizer: str  # `fingerprint_of` it
    n_layers: int | None = None  # of the explainer; this and the next two are missing in sidecars of older versions
    base_weights: str | None = None  # `weights_fingerprint` of the model that adapters change, where there are some
    target_weights: str | None = None  # `files_fingerprint` of the target, where its files were at hand
    versions: dict[str, str] = field(
        default_factory=lambda: {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        }
    )

    def check(
        self,
        *,
        target: str | None = None,
        target_revision: str | None = None,
        d_target: int | None = None,
        target_weights: str | None = None,
        wordings: Mapping[str, str] | None = None,
    ) -> None:
        """What is None is not asked for; neither are the target's weights where they were not known in training.

        Raises:
            Mismatch: it explains another target, or one of another width, revision or weights, or was trained on other
                words than those of `wordings`.
        """
        asked = {"target": target, "target_revision": target_revision, "d_target": d_target}
        if self.target_weights is not None:
            asked["target_weights"] = target_weights
        for name, value in asked.items():
            own = getattr(self, name)
            if value is not None and value != own:
                raise Mismatch(f"this explainer has {name} {own!r}, it cannot be used with {value!r}: train one for it")
        for name, version in (wordings or {}).items():
            if self.wordings.get(name) != version:
                raise Mismatch(
                    f"this explainer was trained on wordings {self.wordings}, not on {name!r} of version {version}: "
                    "ask in its words or train it again"
                )


def sidecar_of(
    explainer: Explainer,
    tokenizer: PreTrainedTokenizerBase,
    *,
    target: str,
    target_revision: str | None = None,
    target_weights: str | None = None,
    base: str,
    base_revision: str | None = None,
    wordings: Mapping[str, str],
    state_dict: Mapping[str, Tensor] | None = None,
) -> Sidecar:
    """The sidecar of an explainer as it is; `state_dict` as in `save_explainer`."""
    projection, lora = explainer.projection, isinstance(explainer.model, PeftModel)
    state = explainer.state_dict() if state_dict is None else state_dict
    return Sidecar(
        target=target,
        target_revision=target_revision,
        base=base,
        base_revision=base_revision,
        lora=lora,
        d_target=projection.d_target,
        d_explainer=projection.d_explainer,
        layers=projection.layers,
        projection=projection.kind,
        injection=asdict(explainer.injection),
        embedding_norm=explainer.embedding_norm,
        markers=asdict(explainer.markers),
        wordings=dict(wordings),
        tokenizer=fingerprint_of(tokenizer),
        n_layers=layout_of(explainer.model).n_layers,
        base_weights=weights_fingerprint(_base_weights(state)) if lora else None,
        target_weights=target_weights,
    )


def _base_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of an explainer's tensors belongs to the model below its adapters, by the names it has there."""
    named = {name.removeprefix("model.base_model.model."): tensor for name, tensor in state.items()}
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in named.items()
        if name not in state and ".lora_" not in name
    }


def fingerprint_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits of the vocabulary, the chat template and how a probe text is cut."""
    parts = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.encode(_PROBE)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def save_explainer(
    explainer: Explainer,
    folder: str | Path,
    sidecar: Sidecar,
    tokenizer: PreTrainedTokenizerBase,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `folder`: a model that plain transformers loads (with LoRA, an adapter that plain peft loads; the markers'
    embeddings are beside it, in `projection.safetensors`), the projection, the tokenizer and, last, the sidecar.

    Args:
        state_dict: Of the explainer, where its own tensors are not whole (ZeRO-3); at least all that is trained.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(explainer.state_dict() if state_dict is None else state_dict)
    empty = [name for name, tensor in state.items() if not tensor.numel()]
    if empty:
        raise ValueError(f"tensors of size 0: {', '.join(empty[:3])}; under ZeRO-3 give the gathered `state_dict`")
    model_state = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
    extras = {name: t.detach().cpu().contiguous() for name, t in state.items() if not name.startswith("model.")}
    # peft asks the hub whether the embedding was resized unless it is told not to save it
    options = {"save_embedding_layers": False} if isinstance(explainer.model, PeftModel) else {}
    explainer.model.save_pretrained(folder, state_dict=model_state, **options)  # type: ignore[operator]
    save_file(extras, folder / EXTRAS)
    tokenizer.save_pretrained(folder)
    (folder / SIDECAR).write_text(json.dumps(asdict(sidecar), indent=2))


def read_sidecar(folder: str | Path) -> Sidecar:
    """Raises: Mismatch: the folder holds no explainer, or one of another version of this program."""
    path = Path(folder) / SIDECAR
    if not path.exists():
        raise Mismatch(f"{folder} holds no {SIDECAR}: it is not an explainer, or was not written to the end")
    values = json.loads(path.read_text())
    differing = (set(values) ^ set(Sidecar.__dataclass_fields__)) - (_LATER - set(values))
    if differing:
        raise Mismatch(f"{path} is of another version of this program: it differs in {', '.join(sorted(differing))}")
    return Sidecar(**{**values, "layers": tuple(values["layers"])})


def load_explainer(
    folder: str | Path, *, base: str | None = None, device: str | torch.device = "cpu"
) -> tuple[Explainer, Sidecar]:
    """An explainer as it was saved, ready to answer; see `load_tokenizer`.

    Of an adapter, `base` is where the model that it changes lies now, if not where the sidecar says.

    Raises:
        Mismatch: tokenizer, markers, weights and sidecar do not belong together, or the base of an adapter is not the
            one that it was trained on.
    """
    folder, sidecar = Path(folder), read_sidecar(folder)
    model = _load_model(folder, base or sidecar.base, sidecar, load_tokenizer(folder))
    extras = load_file(folder / EXTRAS)
    explainer = Explainer(
        model,
        Markers(**sidecar.markers),
        Projection(sidecar.projection, sidecar.d_target, sidecar.d_explainer, sidecar.layers),  # type: ignore[arg-type]
        InjectionConfig(**sidecar.injection),
        embedding_norm=sidecar.embedding_norm,
        train_markers="marker_embeddings" in extras,
    )
    _load_extras(explainer, extras, folder)
    return explainer.to(device).eval(), sidecar


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a saved explainer.

    Raises:
        Mismatch: it is not the one that the explainer was trained with.
    """
    sidecar, tokenizer = read_sidecar(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    found, markers = fingerprint_of(tokenizer), markers_of(tokenizer)
    if found != sidecar.tokenizer:
        raise Mismatch(
            f"the tokenizer in {folder} has fingerprint {found}, the explainer was trained with {sidecar.tokenizer}: "
            "it would read other questions"
        )
    if list(markers.ids) != [sidecar.markers[name] for name in ("begin_id", "slot_id", "end_id")]:
        raise Mismatch(f"the tokenizer in {folder} has other markers than those trained with: {sidecar.markers}")
    return tokenizer


def _load_model(folder: Path, base: str, sidecar: Sidecar, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    source, revision = (base, sidecar.base_revision) if sidecar.lora else (str(folder), None)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source, revision=revision, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    _check_model(model, source, sidecar)
    make_room(model, tokenizer)
    if not sidecar.lora:
        return model
    _check_adapter(adapted := PeftModel.from_pretrained(model, folder), folder)
    return adapted


def _check_model(model: PreTrainedModel, source: str, sidecar: Sidecar) -> None:
    """Raises: Mismatch: it has another size than the explainer, or is not the model that its adapters change."""
    layout = layout_of(model)
    for what, found, own in [
        ("width", layout.d_model, sidecar.d_explainer),
        ("number of layers", layout.n_layers, sidecar.n_layers),
    ]:
        if own is not None and found != own:
            raise Mismatch(f"{source} has {what} {found}, the explainer was trained with {own}")
    if not sidecar.lora:
        return
    if sidecar.base_weights is None:
        logger.warning(
            "this explainer is of an older version of this program and does not say which weights its adapters change: "
            "nobody checked that they are those of %s",
            source,
        )
        return
    weights = weights_fingerprint(model.state_dict())
    if weights != sidecar.base_weights:
        raise Mismatch(
            f"{source} has weights {weights}, the explainer's adapters were trained on {sidecar.base_weights} "
            f"({sidecar.base}): they would change another model than theirs"
        )


def _check_adapter(model: PeftModel, folder: Path) -> None:
    """Raises: Mismatch: adapters are missing from the file, or it has others; peft would only warn, or say nothing."""
    own = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(folder / ADAPTER, "pt") as file:
        found = set(file.keys())
    for what, names in [("lacks", own - found), ("has", found - own)]:
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            tail = ", which the model has a place for" if what == "lacks" else ", for which the model has no place"
            raise Mismatch(f"{folder / ADAPTER} {what} {min(names)}{more}{tail}")


def _load_extras(explainer: Explainer, extras: dict[str, Tensor], folder: Path) -> None:
    own = {name: tensor for name, tensor in explainer.state_dict().items() if not name.startswith("model.")}
    shapes, found = ({name: list(t.shape) for name, t in state.items()} for state in (own, extras))
    if shapes != found:
        raise Mismatch(f"{folder / EXTRAS} holds {found}, the sidecar asks for {shapes}")
    explainer.load_state_dict(extras, strict=False)
