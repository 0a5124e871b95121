"""One in-memory form for sparse autoencoders, whatever wrote them: encode, decode, decoder directions.

An SAE writes a residual vector as a sparse, non-negative sum of directions (Bricken et al. 2023; top-k: Gao et al.
2024, 2.3; JumpReLU: Rajamanoharan et al. 2024, 3). Batch top-k is read as JumpReLU with its calibrated threshold, so
that a token's features never depend on the other tokens of its batch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from ray_explain.features.weights import open_weights

Activation = Literal["relu", "jumprelu", "topk"]
Normalisation = Literal["none", "scale", "token_norm", "layer_norm"]
WEIGHTS_FILE, SETTINGS_FILE = "sae.safetensors", "sae.json"
_ROWS_AT_A_TIME = 8192
_TENSORS = ("encoder", "encoder_bias", "directions", "decoder_bias", "threshold")


class Restore(NamedTuple):
    """What undoes a normalisation: `normal / factor + shift` is in the target's units again."""

    factor: Float[Tensor, "tokens 1"]
    shift: Float[Tensor, "tokens 1"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SAE:
    """A sparse autoencoder of one layer. Tensors may be memory-mapped, transposed views, or half precision.

    Raises:
        ValueError: a shape, the activation, or the normalisation does not fit the others.
    """

    encoder: Float[Tensor, "d_sae d_model"]
    encoder_bias: Float[Tensor, " d_sae"]
    directions: Float[Tensor, "d_sae d_model"]  # at the norm the file gives them
    decoder_bias: Float[Tensor, " d_model"]
    threshold: Float[Tensor, " d_sae"] | None = None  # jumprelu: a feature is on above it
    activation: Activation = "relu"
    k: int = 0  # topk: features kept per token
    layer: int = 0
    site: str = "residual"
    normalisation: Normalisation = "none"  # of inputs; outputs of `decode` have it undone
    scale: float = 1.0  # "scale": inputs are multiplied by it; "token_norm": the norm each input is brought to
    centre_inputs: bool = False  # the decoder bias is subtracted before encoding
    weigh_by_norm: bool = False  # threshold and top-k look at activation x norm of the direction
    declared: dict[str, float] = field(default_factory=dict)  # figures its makers give: l0, fvu, dead_fraction
    origin: str = ""

    def __post_init__(self) -> None:
        d_sae, d_model = self.encoder.shape
        wanted = {"encoder_bias": [d_sae], "directions": [d_sae, d_model], "decoder_bias": [d_model]}
        if self.threshold is not None:
            wanted["threshold"] = [d_sae]
        for name, shape in wanted.items():
            if list(getattr(self, name).shape) != shape:
                raise ValueError(
                    f"{name} of the SAE {self.origin or 'given'} is {list(getattr(self, name).shape)}: an encoder of "
                    f"{d_sae} features of width {d_model} needs {shape}"
                )
        self._check_settings(d_sae)

    def _check_settings(self, d_sae: int) -> None:
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation {self.activation!r}: an SAE here has one of {get_args(Activation)}")
        if self.normalisation not in get_args(Normalisation):
            raise ValueError(f"normalisation {self.normalisation!r}: use one of {get_args(Normalisation)}")
        if self.activation == "topk" and not 1 <= self.k <= d_sae:
            raise ValueError(f"k={self.k}: a top-k SAE keeps between 1 and all {d_sae} features")
        if (self.activation == "jumprelu") != (self.threshold is not None):
            raise ValueError(f"activation {self.activation!r}: thresholds belong to a jumprelu SAE, and only to one")
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale}: inputs are multiplied by it, so it must be above 0")

    @property
    def d_sae(self) -> int:
        return self.encoder.shape[0]

    @property
    def d_model(self) -> int:
        return self.encoder.shape[1]

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "SAE":
        """A copy with its tensors there, contiguous: the memory map, if any, is read in full."""
        moved: dict[str, Any] = {name: old.to(device, dtype).contiguous() for name, old in self._tensors.items()}
        return replace(self, **moved)

    def subset(self, features: Sequence[int]) -> "SAE":
        """These features alone, whose activations stay what they are; for exemplars, not for decoding.

        Raises:
            ValueError: a top-k SAE: which of its features are on depends on all of them.
        """
        if self.activation == "topk":
            raise ValueError("a top-k SAE has no subset: which features are on depends on all of them")
        rows = torch.as_tensor(features, dtype=torch.long)
        return replace(
            self,
            encoder=self.encoder[rows],
            encoder_bias=self.encoder_bias[rows],
            directions=self.directions[rows],
            threshold=None if self.threshold is None else self.threshold[rows],
        )

    def normalise(self, x: Float[Tensor, "tokens d_model"]) -> tuple[Float[Tensor, "tokens d_model"], Restore]:
        """`x` as the encoder was trained to see it, and what undoes it."""
        one, zero = x.new_ones(len(x), 1), x.new_zeros(len(x), 1)
        if self.normalisation == "none":
            return x, Restore(one, zero)
        if self.normalisation == "scale":
            return x * self.scale, Restore(one * self.scale, zero)
        shift = x.mean(dim=1, keepdim=True) if self.normalisation == "layer_norm" else zero
        spread = (x - shift).norm(dim=1, keepdim=True).clamp_min(1e-6)
        # A layer norm brings the (unbiased) standard deviation to 1, and so the norm to this.
        goal = (self.d_model - 1) ** 0.5 if self.normalisation == "layer_norm" else self.scale
        factor = goal / spread
        return (x - shift) * factor, Restore(factor, shift)

    def pre_activations(
        self, x: Float[Tensor, "tokens d_model"], out: Float[Tensor, "tokens d_sae"] | None = None
    ) -> Float[Tensor, "tokens d_sae"]:
        """What the activation function sees, float32; in `out` if given, which saves an allocation."""
        normal, _ = self.normalise(self._checked(x))
        centred = normal - self.decoder_bias.to(normal) if self.centre_inputs else normal
        bias = self.encoder_bias.to(centred)
        if self.encoder.dtype == torch.float32:
            return torch.addmm(bias, centred, self.encoder.T, out=out)
        out = centred.new_empty(len(x), self.d_sae) if out is None else out
        for start in range(0, self.d_sae, _ROWS_AT_A_TIME):  # never a full float32 copy of the encoder
            part = slice(start, start + _ROWS_AT_A_TIME)
            out[:, part] = torch.addmm(bias[part], centred, self.encoder[part].to(centred).T)
        return out

    def activate(self, pre: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, "tokens d_sae"]:
        """Activations from pre-activations, written over them; never negative."""
        if self.activation == "relu":
            return pre.relu_()
        judged = pre * self.direction_norms().to(pre) if self.weigh_by_norm else pre
        if self.activation == "jumprelu":
            assert self.threshold is not None
            off = judged <= self.threshold.to(judged)
            return pre.relu_().masked_fill_(off, 0)
        indices = judged.topk(self.k, dim=1, sorted=False).indices
        kept = pre.gather(1, indices).relu_()
        return pre.zero_().scatter_(1, indices, kept)

    def encode(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_sae"]:
        """Activations of every feature on every token, float32, never negative.

        Raises:
            ValueError: `x` has another width than the SAE, or holds NaN or infinite rows.
        """
        return self.activate(self.pre_activations(x))

    def decode(
        self, activations: Float[Tensor, "tokens d_sae"], like: Float[Tensor, "tokens d_model"] | None = None
    ) -> Float[Tensor, "tokens d_model"]:
        """The residual vectors that `activations` stand for, in the target's units.

        `like`: the encoded vectors; their norms are needed where each token is normalised by its own.

        Raises:
            ValueError: the SAE normalises each token and `like` is not given.
        """
        normal = torch.zeros(len(activations), self.d_model, dtype=activations.dtype, device=activations.device)
        for start in range(0, self.d_sae, _ROWS_AT_A_TIME):
            rows = self.directions[start : start + _ROWS_AT_A_TIME].to(activations)
            normal += activations[:, start : start + _ROWS_AT_A_TIME] @ rows
        normal += self.decoder_bias.to(normal)
        if self.normalisation in ("token_norm", "layer_norm"):
            if like is None:
                raise ValueError(f"decoding an SAE with normalisation {self.normalisation!r} needs `like`, its inputs")
            _, restore = self.normalise(like.to(normal))
            return normal / restore.factor + restore.shift
        return normal / self.scale if self.normalisation == "scale" else normal

    def direction_norms(self) -> Float[Tensor, " d_sae"]:
        return torch.cat([rows.float().norm(dim=1) for rows in self.directions.split(_ROWS_AT_A_TIME)])

    def _checked(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        if x.ndim != 2 or x.shape[1] != self.d_model:
            raise ValueError(
                f"activations of shape {list(x.shape)} for an SAE of width {self.d_model}: give [tokens, d_model] of "
                "the target it was trained on"
            )
        bad = (~torch.isfinite(x)).any(dim=1)
        if bad.any():
            raise ValueError(
                f"{int(bad.sum())} of {len(x)} activation rows are NaN or infinite, the first is row "
                f"{int(bad.nonzero()[0])}: run the target in float32 or bfloat16, or drop those rows"
            )
        return x.float()

    def save(self, folder: str | Path) -> None:
        """Write `sae.safetensors` and then `sae.json`, so that a folder with the JSON is whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self._tensors
        if self.directions is self.encoder:
            tensors["directions"] = self.directions.clone()  # the file may not hold one tensor twice
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
        settings = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _TENSORS}
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=1, sort_keys=True, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "SAE":
        """An SAE that `save` wrote, memory-mapped.

        Raises:
            FileNotFoundError: no `sae.json` there.
            ValueError: the files are damaged, or do not fit each other.
        """
        folder = Path(folder)
        settings: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text())
        known = {item.name for item in fields(cls)} - set(_TENSORS)
        if set(settings) != known:
            raise ValueError(
                f"{folder / SETTINGS_FILE}: its keys differ from the known ones by {set(settings) ^ known}"
            )
        file = open_weights(folder / WEIGHTS_FILE)
        tensors: dict[str, Any] = {name: file.mapped(name) for name in file.names()}
        return cls(**settings, **tensors)
