"""Other people's SAEs: SAELens, Llama Scope, Gemma Scope, EleutherAI sparsify, dictionary_learning, and our own.

`read_sae` gives the one in-memory form, memory-mapped, one layer at a time. `read_directions` reads some decoder
directions alone, and no more than a few thousand at a time, whatever the size of the file.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ray_explain.features.sae import SAE, SETTINGS_FILE, WEIGHTS_FILE
from ray_explain.features.weights import WeightsFile, open_weights

ROWS_AT_A_TIME = 4096


class Stored(NamedTuple):
    """A matrix of the file, and which of its axes counts features."""

    name: str
    axis: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a format keeps what an SAE is made of."""

    weights: Path
    encoder: Stored
    directions: Stored
    encoder_bias: str
    decoder_bias: str
    threshold: str | float | None = None  # a tensor's name, or one number for all features
    layer: int | None = None  # None: the files do not say
    settings: dict[str, Any] = field(default_factory=dict)  # of the SAE: activation, normalisation, declared, ...


class Format(NamedTuple):
    """How to recognise a folder of a format, and how to read it."""

    marker: Callable[[Path], bool]
    layout: Callable[[Path], Layout]


def read_sae(folder: str | Path, layer: int | None = None) -> SAE:
    """The SAE in a local folder; its large tensors stay in the file, memory-mapped.

    `folder` is that of one SAE, or one that holds an SAE for each layer; then `layer` says which. `layer` is also
    needed where neither the files nor the folder's name tell it.

    Raises:
        FileNotFoundError: no SAE of a known format there.
        ValueError: several SAEs fit, the SAE is of another layer, a file is damaged or not finite, or the SAE is of a
            kind that cannot be represented (gated, groupmax, with a skip connection, of attention heads).
    """
    folder = find_folder(folder, layer)
    layout = layout_of(folder)
    if layout.layer is not None and layer is not None and layout.layer != layer:
        raise ValueError(f"{folder} holds an SAE of layer {layout.layer}, not of layer {layer}")
    known = layout.layer if layout.layer is not None else layer
    if known is None:
        raise ValueError(f"{folder}: neither its files nor its name say which layer it is of; give `layer`")
    file = _opened(layout)
    sae = SAE(
        encoder=_mapped(file, layout.encoder),
        encoder_bias=file.mapped(layout.encoder_bias).float(),
        directions=_mapped(file, layout.directions),
        decoder_bias=file.mapped(layout.decoder_bias).float(),
        threshold=_threshold(file, layout),
        layer=known,
        **{"origin": str(folder), **layout.settings},
    )
    _refuse_not_finite(sae, layout)
    return sae


def count_features(folder: str | Path, layer: int | None = None) -> int:
    """d_sae of the SAE in a folder; no weights are read.

    Raises:
        as `read_sae`.
    """
    layout = layout_of(find_folder(folder, layer))
    return int(_opened(layout).mapped(layout.directions.name).shape[layout.directions.axis])


def read_directions(folder: str | Path, layer: int, chosen: Sequence[int]) -> Float[Tensor, "chosen d_model"]:
    """Decoder directions of some features, in the order given, at the norm the file gives them, float32.

    Beside them, resident memory is that of one part of `ROWS_AT_A_TIME` features.

    Raises:
        as `read_sae`, and ValueError: a direction is not finite.
    """
    layout = layout_of(find_folder(folder, layer))
    file, stored = _opened(layout), layout.directions
    found: dict[int, Tensor] = {}
    for _, some in groupby(sorted(set(chosen)), key=lambda i: i // ROWS_AT_A_TIME):
        numbers = list(some)
        part = _part(layout, file, stored, numbers[0], numbers[-1] + 1)
        found |= {number: part[number - numbers[0]].clone() for number in numbers}
    return torch.stack([found[number] for number in chosen])


def find_folder(folder: str | Path, layer: int | None = None) -> Path:
    """The folder of one SAE: `folder` itself, or the one below it that is of `layer`.

    Raises:
        FileNotFoundError: no SAE of a known format there, or none of that layer.
        ValueError: several SAEs fit.
    """
    folder = Path(folder)
    if _format_of(folder):
        return folder
    found = sorted(below for below in folder.rglob("*") if below.is_dir() and _format_of(below))
    if not found:
        raise FileNotFoundError(f"{folder}: no SAE there; known formats are {', '.join(FORMATS)}")
    fitting = [below for below in found if layer is None or layout_of(below).layer == layer]
    if not fitting:
        raise FileNotFoundError(
            f"{folder}: no SAE of layer {layer} among {[str(f.relative_to(folder)) for f in found]}"
        )
    if len(fitting) > 1:
        raise ValueError(f"{folder}: several SAEs fit; choose one of {[str(f.relative_to(folder)) for f in fitting]}")
    return fitting[0]


def layout_of(folder: Path) -> Layout:
    """What the configuration in the folder of an SAE says; no weights are read."""
    name = _format_of(folder)
    if name is None:
        raise FileNotFoundError(f"{folder}: no SAE there; known formats are {', '.join(FORMATS)}")
    try:
        return FORMATS[name].layout(folder)
    except KeyError as error:
        raise ValueError(f"{folder}: its {name} configuration lacks {error}") from error


def _format_of(folder: Path) -> str | None:
    return next((name for name, kind in FORMATS.items() if kind.marker(folder)), None)


def _mapped(file: WeightsFile, stored: Stored) -> Float[Tensor, "d_sae d_model"]:
    matrix = file.mapped(stored.name)
    return matrix if stored.axis == 0 else matrix.T


def _threshold(file: WeightsFile, layout: Layout) -> Float[Tensor, " d_sae"] | None:
    if layout.threshold is None:
        return None
    d_sae = file.mapped(layout.encoder_bias).shape[0]
    if isinstance(layout.threshold, float):
        return torch.full((d_sae,), layout.threshold)
    threshold = file.mapped(layout.threshold).float()
    if threshold.ndim == 0 and not threshold >= 0:
        raise ValueError(f"{layout.weights}: threshold {float(threshold)} was never calibrated; train it to the end")
    return threshold.expand(d_sae).contiguous()


def _refuse_not_finite(sae: SAE, layout: Layout) -> None:
    vectors = {"encoder bias": sae.encoder_bias, "decoder bias": sae.decoder_bias, "threshold": sae.threshold}
    for name, vector in vectors.items():
        if vector is not None and not bool(torch.isfinite(vector).all()):
            raise ValueError(f"{layout.weights}: its {name} holds NaN or infinite values; the file is not usable")
    file = _opened(layout)
    for stored in (layout.encoder, layout.directions):
        d_sae = file.mapped(stored.name).shape[stored.axis]
        for start in range(0, d_sae, ROWS_AT_A_TIME):  # reading a part checks it
            _part(layout, file, stored, start, min(start + ROWS_AT_A_TIME, d_sae))


def _opened(layout: Layout) -> WeightsFile:
    file = open_weights(layout.weights)
    wanted = {layout.encoder.name, layout.directions.name, layout.encoder_bias, layout.decoder_bias}
    if isinstance(layout.threshold, str):
        wanted.add(layout.threshold)
    if missing := wanted - file.names():
        raise ValueError(f"{layout.weights} lacks {sorted(missing)}; it has {sorted(file.names())}")
    return file


def _part(layout: Layout, file: WeightsFile, stored: Stored, start: int, stop: int) -> Float[Tensor, "rows d_model"]:
    part = file.rows(stored.name, start, stop, stored.axis)
    part = (part if stored.axis == 0 else part.T).float().contiguous()
    bad = (~torch.isfinite(part)).any(dim=1)
    if bad.any():
        first = start + int(bad.nonzero()[0])
        raise ValueError(
            f"{layout.weights}: {int(bad.sum())} rows of {stored.name!r} between features {start} and "
            f"{stop - 1} are NaN or infinite, the first is feature {first}; the file is not usable"
        )
    return part


# The formats. Each function turns a configuration into a layout, and refuses what the in-memory form cannot say.

_MATRICES: dict[str, Any] = {
    "encoder": Stored("W_enc", 1),
    "directions": Stored("W_dec", 0),
    "encoder_bias": "b_enc",
    "decoder_bias": "b_dec",
}


def _linear(decoder_bias: str) -> dict[str, Any]:
    """The names of two PyTorch modules, but for that of the decoder's bias."""
    weights = {"encoder": Stored("encoder.weight", 0), "directions": Stored("decoder.weight", 1)}
    return {**weights, "encoder_bias": "encoder.bias", "decoder_bias": decoder_bias}


def _own(folder: Path) -> Layout:
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    return Layout(
        weights=folder / WEIGHTS_FILE,
        encoder=Stored("encoder", 0),
        directions=Stored("directions", 0),
        encoder_bias="encoder_bias",
        decoder_bias="decoder_bias",
        threshold="threshold" if settings["activation"] == "jumprelu" else None,
        layer=settings.pop("layer"),
        settings=settings,
    )


def _sae_lens(folder: Path) -> Layout:
    """Versions 1 to 6: the hook's name stood beside the other keys, then under `meta`, then under `metadata`."""
    config = json.loads((folder / "cfg.json").read_text())
    meta = {**config, **config.get("meta", {}), **config.get("metadata", {})}
    if config.get("reshape_activations", "none") != "none":
        raise ValueError(f"{folder}: an SAE of attention heads ({config['reshape_activations']}), not of the residual")
    if config.get("finetuning_scaling_factor"):
        raise ValueError(f"{folder}: finetuning_scaling_factor is set; save the SAE with it folded into the decoder")
    activation, k = _sae_lens_activation(folder, config)
    layer, site = _hook(str(meta.get("hook_name", meta.get("hook_point", ""))))
    return Layout(
        weights=folder / "sae_weights.safetensors",
        **_MATRICES,
        threshold="threshold" if activation == "jumprelu" else None,
        layer=layer,
        settings={
            "site": site,
            "activation": activation,
            "k": k,
            "centre_inputs": bool(config.get("apply_b_dec_to_input", True)),
            "weigh_by_norm": bool(config.get("rescale_acts_by_decoder_norm", False)),
            "declared": {"l0": float(k)} if k else {},
            **_sae_lens_normalisation(folder, config),
        },
    )


def _sae_lens_activation(folder: Path, config: dict[str, Any]) -> tuple[str, int]:
    architecture = config.get("architecture", "standard")
    function = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if architecture == "topk" or (architecture == "standard" and function == "topk"):
        return "topk", int(config["k"] if "k" in config else config["activation_fn_kwargs"]["k"])
    if architecture == "jumprelu":
        return "jumprelu", 0
    if architecture == "standard" and function == "relu":
        return "relu", 0
    raise ValueError(
        f"{folder}: architecture {architecture!r} with {function!r} is not one of standard, topk, jumprelu"
    )


def _sae_lens_normalisation(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    kind = config.get("normalize_activations") or "none"
    if kind in ("none", "expected_average_only_in", True):
        return {"normalisation": "none"}  # an expected average is folded into the weights before they are saved
    if kind == "constant_norm_rescale":
        return {"normalisation": "token_norm", "scale": math.sqrt(config["d_in"])}
    if kind == "layer_norm":
        return {"normalisation": "layer_norm"}
    raise ValueError(f"{folder}: normalize_activations {kind!r} is not a known one")


def _llama_scope(folder: Path) -> Layout:
    """He et al. 2024. The threshold is declared for directions of unit norm and activations that are not normalised.

    Hence it is scaled here as the inputs are, and compared with activation x norm of the direction.
    """
    config = json.loads((folder / "hyperparams.json").read_text())
    if config["act_fn"] != "jumprelu" or config.get("use_glu_encoder"):
        raise ValueError(
            f"{folder}: act_fn {config['act_fn']!r}, GLU {config.get('use_glu_encoder')}: only jumprelu is known"
        )
    if config["hook_point_in"] != config["hook_point_out"]:
        raise ValueError(
            f"{folder}: a transcoder from {config['hook_point_in']} to {config['hook_point_out']}, not an SAE"
        )
    layer, site = _hook(config["hook_point_in"])
    normalisation, scale = _llama_scope_normalisation(config)
    return Layout(
        weights=folder / "checkpoints" / "final.safetensors",
        **_linear("decoder.bias"),
        threshold=float(config["jump_relu_threshold"]) * (scale if normalisation == "scale" else 1.0),
        layer=layer,
        settings={
            "site": site,
            "activation": "jumprelu",
            "centre_inputs": bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
            "weigh_by_norm": bool(config.get("sparsity_include_decoder_norm", True)),
            "normalisation": normalisation,
            "scale": scale,
            "declared": {"l0": float(config["top_k"])} if "top_k" in config else {},
        },
    )


def _llama_scope_normalisation(config: dict[str, Any]) -> tuple[str, float]:
    root = math.sqrt(config["d_model"])
    return {
        "dataset-wise": lambda: ("scale", root / config["dataset_average_activation_norm"]["in"]),
        "token-wise": lambda: ("token_norm", root),
        "inference": lambda: ("none", 1.0),
    }[config["norm_activation"]]()


def _gemma_scope(folder: Path) -> Layout:
    """Lieberum et al. 2024; the layer and the mean number of active features stand in the folders' names."""
    layer = re.search(r"layer_(\d+)", "/".join(folder.parts[-3:]))
    l0 = re.search(r"average_l0_(\d+)", folder.name)
    return Layout(
        weights=folder / "params.npz",
        **_MATRICES,
        threshold="threshold",
        layer=int(layer.group(1)) if layer else None,
        settings={"activation": "jumprelu", "declared": {"l0": float(l0.group(1))} if l0 else {}},
    )


def _sparsify(folder: Path) -> Layout:
    config = json.loads((folder / "cfg.json").read_text())
    if config.get("activation", "topk") != "topk":
        raise ValueError(f"{folder}: activation {config['activation']!r}; of sparsify's SAEs only top-k ones are known")
    if config.get("transcode") or config.get("skip_connection"):
        raise ValueError(f"{folder}: a transcoder or one with a skip connection, not an SAE")
    layer, site = _hook(folder.name)
    return Layout(
        weights=folder / "sae.safetensors",
        encoder=Stored("encoder.weight", 0),
        directions=Stored("W_dec", 0),
        encoder_bias="encoder.bias",
        decoder_bias="b_dec",
        layer=layer,
        settings={
            "site": site,
            "activation": "topk",
            "k": int(config["k"]),
            "centre_inputs": True,
            "declared": {"l0": float(config["k"])},
        },
    )


_NAMES: dict[str, tuple[dict[str, Any], str | None, bool]] = {
    # of dictionary_learning's classes: names of tensors, of the threshold, whether inputs are centred
    "AutoEncoder": (_linear("bias"), None, True),
    "AutoEncoderNew": (_linear("decoder.bias"), None, False),
    "AutoEncoderTopK": (_linear("b_dec"), None, True),
    "BatchTopKSAE": (_linear("b_dec"), "threshold", True),
    "MatryoshkaBatchTopKSAE": (_MATRICES, "threshold", True),
    "JumpReluAutoEncoder": (_MATRICES, "threshold", False),
}


def _dictionary_learning(folder: Path) -> Layout:
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    kind = trainer["dict_class"]
    if kind not in _NAMES:
        raise ValueError(f"{folder}: dict_class {kind!r} is not one of {sorted(_NAMES)}")
    names, threshold, centre = _NAMES[kind]
    topk = kind == "AutoEncoderTopK"
    return Layout(
        weights=folder / "ae.pt",
        **names,
        threshold=threshold,
        layer=trainer.get("layer"),
        settings={
            "site": _hook(trainer.get("submodule_name") or "")[1],
            "activation": "topk" if topk else "jumprelu" if threshold else "relu",
            "k": int(trainer["k"]) if topk else 0,
            "centre_inputs": centre,
            "declared": {"l0": float(trainer["k"])} if "k" in trainer else {},
        },
    )


def _hook(name: str) -> tuple[int | None, str]:
    """Layer and site of a hook's or a module's name, such as blocks.7.hook_resid_post, layers.7 or layers.7.mlp.

    The stream before block i is that after block i - 1, hence of layer i - 1 (-1: the embeddings).
    """
    number = re.search(r"(?:blocks|layers|h)\.(\d+)", name)
    layer = int(number.group(1)) if number else None
    if "resid_pre" in name and layer is not None:
        return layer - 1, "residual"
    for mark, site in (("resid_mid", "residual_mid"), ("mlp", "mlp"), ("att", "attention")):
        if mark in name:
            return layer, site
    return layer, "residual"


def _has(*names: str) -> Callable[[Path], bool]:
    return lambda folder: all((folder / name).exists() for name in names)


FORMATS: dict[str, Format] = {
    "ray_explain": Format(_has(SETTINGS_FILE), _own),
    "sae_lens": Format(_has("cfg.json", "sae_weights.safetensors"), _sae_lens),
    "llama_scope": Format(_has("hyperparams.json"), _llama_scope),
    "gemma_scope": Format(_has("params.npz"), _gemma_scope),
    "sparsify": Format(_has("cfg.json", "sae.safetensors"), _sparsify),
    "dictionary_learning": Format(_has("ae.pt", "config.json"), _dictionary_learning),
}
