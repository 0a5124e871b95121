"""Does an SAE fit the activations it is given? Figures, and the likely cause where it does not."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ray_explain.features.sae import SAE, Normalisation

NUMBERS_AT_A_TIME = 1 << 26  # of activations, tokens x features: 256 MiB in float32
PROBE_TOKENS = 2048  # on which a possible cause is tried
FVU_SLACK = 0.1  # above what is declared; figures move with the text
FVU_UNDECLARED = 0.5  # worse than this, an SAE whose figures are not declared is refused too
L0_FACTOR = 2.0  # times or parts of what is declared
OTHER_LAYER_FACTOR = 0.8  # another layer is the right one where it leaves this part of the variance unexplained


class UnfitSAE(ValueError):
    """The SAE does not describe these activations. The message gives the figures and the likely cause."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How an SAE does on some activations."""

    l0: float  # features on per token, mean
    fvu: float  # fraction of variance unexplained: 0 is perfect, 1 no better than the mean vector
    dead_fraction: float  # of all features: on nowhere in these tokens
    dense_fraction: float  # of all features: on in more than a tenth of the tokens
    norm_ratio: float  # mean norm of the reconstruction over that of the activations
    n_tokens: int

    def declarable(self) -> dict[str, float]:
        """The figures that an SAE carries with it and the doctor compares."""
        return {name: value for name, value in asdict(self).items() if name in ("l0", "fvu", "dead_fraction")}


@torch.no_grad()
def examine(sae: SAE, activations: Float[Tensor, "tokens d_model"]) -> Figures:
    """Figures of `sae` on these residual vectors, which should not include first tokens (their norms are outliers).

    Raises:
        ValueError: fewer than two tokens, another width, or rows that are not finite.
    """
    if len(activations) < 2:
        raise ValueError(f"{len(activations)} tokens: variance needs at least two, figures worth reading thousands")
    mean = activations.double().mean(dim=0)
    fired = torch.zeros(sae.d_sae, dtype=torch.long, device=activations.device)
    error = variance = norm = norm_out = 0.0
    for x in activations.float().split(max(1, NUMBERS_AT_A_TIME // sae.d_sae)):
        encoded = sae.encode(x)
        decoded = sae.decode(encoded, like=x)
        fired += (encoded > 0).sum(dim=0)
        error += float((x - decoded).double().pow(2).sum())
        variance += float((x.double() - mean).pow(2).sum())
        norm += float(x.norm(dim=1).sum())
        norm_out += float(decoded.norm(dim=1).sum())
    n_tokens = len(activations)
    return Figures(
        l0=float(fired.sum()) / n_tokens,
        fvu=error / max(variance, 1e-12),
        dead_fraction=float((fired == 0).float().mean()),
        dense_fraction=float((fired > n_tokens / 10).float().mean()),
        norm_ratio=norm_out / max(norm, 1e-12),
        n_tokens=n_tokens,
    )


def refuse(
    sae: SAE,
    activations: Float[Tensor, "tokens d_model"],
    elsewhere: Mapping[int, Float[Tensor, "tokens d_model"]] | None = None,
) -> Figures:
    """The figures of an SAE that fits `activations`, the residual stream of its layer on real text.

    `elsewhere`: the same tokens at other layers, by which a wrong layer is told; neighbours suffice.

    Raises:
        UnfitSAE: far from the declared figures, or of use for another layer rather than this; with the likely cause.
        ValueError: as `examine`.
    """
    figures = examine(sae, activations)
    probe = activations[:: max(1, len(activations) // PROBE_TOKENS)]
    layers = {layer: x[:: max(1, len(x) // PROBE_TOKENS)] for layer, x in (elsewhere or {}).items()}
    other = _better_layer(sae, examine(sae, probe), layers)
    complaints = _complaints(figures, sae.declared)
    if other is None and not complaints:
        return figures
    cause = other or _likely_cause(sae, probe)
    raise UnfitSAE(
        f"SAE {sae.origin or 'given'} of layer {sae.layer} does not fit: "
        f"{'; '.join(complaints) or f'fraction of variance unexplained {figures.fvu:.2f}'} "
        f"(on {figures.n_tokens} tokens). Likely cause: {cause}"
    )


def _complaints(figures: Figures, declared: Mapping[str, float]) -> list[str]:
    complaints = []
    fvu_limit = declared["fvu"] + FVU_SLACK if "fvu" in declared else FVU_UNDECLARED
    if not figures.fvu <= fvu_limit:  # true of NaN as well
        against = f"{declared['fvu']:.2f} is declared" if "fvu" in declared else f"at most {fvu_limit:.2f} is expected"
        complaints.append(f"fraction of variance unexplained {figures.fvu:.2f}, {against}")
    if "l0" in declared and not 1 / L0_FACTOR <= figures.l0 / declared["l0"] <= L0_FACTOR:
        complaints.append(f"{figures.l0:.1f} features on per token, {declared['l0']:.1f} are declared")
    return complaints


def _better_layer(sae: SAE, here: Figures, layers: Mapping[int, Float[Tensor, "tokens d_model"]]) -> str | None:
    """An SAE fits its own layer best, whatever it declares."""
    fvu = {layer: examine(sae, x).fvu for layer, x in layers.items()}
    best = min(fvu, key=lambda layer: fvu[layer], default=None)
    if best is None or not fvu[best] < OTHER_LAYER_FACTOR * here.fvu:
        return None
    return f"wrong layer. On layer {best} it leaves {fvu[best]:.2f} of the variance unexplained, here {here.fvu:.2f}"


def _likely_cause(sae: SAE, probe: Float[Tensor, "tokens d_model"]) -> str:
    """The one change to the SAE's settings, or to the tokens, that does most for its figures."""
    as_is = _distance(examine(sae, probe), sae.declared)
    tried = [(_distance(examine(other, probe), sae.declared), cause) for cause, other in _other_readings(sae, probe)]
    ordinary = probe[probe.norm(dim=1) <= 5 * probe.norm(dim=1).median()]
    if 2 <= len(ordinary) < len(probe):
        cause = f"first or other outlier tokens, {len(probe) - len(ordinary)} of {len(probe)}: leave them out"
        tried.append((_distance(examine(sae, ordinary), sae.declared), cause))
    best, cause = min(tried)
    if best < as_is / 2:
        return cause
    return "another layer, site or target: no other reading of its settings fits these activations any better"


def _other_readings(sae: SAE, probe: Float[Tensor, "tokens d_model"]) -> Iterator[tuple[str, SAE]]:
    """What the SAE may be, should its settings have been lost or misread."""
    norm, root = float(probe.norm(dim=1).mean()), math.sqrt(sae.d_model)
    normalisations: tuple[tuple[Normalisation, float, str], ...] = (
        ("none", 1.0, "none"),
        ("scale", root / norm, "scaled to a mean norm of sqrt(d_model)"),
        ("scale", 1 / norm, "scaled to a mean norm of 1"),
        ("token_norm", root, "each scaled to a norm of sqrt(d_model)"),
        ("token_norm", 1.0, "each scaled to a norm of 1"),
        ("layer_norm", 1.0, "a layer norm"),
    )
    for normalisation, scale, words in normalisations:
        if normalisation != sae.normalisation or not math.isclose(scale, sae.scale, rel_tol=0.1):
            changed = replace(sae, normalisation=normalisation, scale=scale)
            yield f"missing or wrong normalisation. Inputs want {words}; it is read with {_words(sae)}", changed
    k = round(sae.declared.get("l0", 0))
    if sae.activation != "topk" and 1 <= k <= sae.d_sae:
        changed = replace(sae, activation="topk", k=k, threshold=None)
        yield f"wrong activation function. Top-{k} fits; it is read as {sae.activation}", changed
    if sae.activation != "relu":
        changed = replace(sae, activation="relu", k=0, threshold=None)
        yield f"wrong activation function. ReLU fits; it is read as {sae.activation}", changed
    yield (
        f"wrong centring. The decoder bias should {'not ' if sae.centre_inputs else ''}be subtracted from inputs",
        replace(sae, centre_inputs=not sae.centre_inputs),
    )
    if sae.activation != "relu":
        yield (
            "wrong weighing. Activations are to be compared "
            f"{'without' if sae.weigh_by_norm else 'weighed by'} the norms of their directions",
            replace(sae, weigh_by_norm=not sae.weigh_by_norm),
        )


def _words(sae: SAE) -> str:
    return f"normalisation {sae.normalisation!r}" + (f", scale {sae.scale:.3g}" if sae.scale != 1 else "")


def _distance(figures: Figures, declared: Mapping[str, float]) -> float:
    """How far figures are from what is declared, or from perfect; halving L0 counts like 0.2 of the variance."""
    distance = max(0.0, figures.fvu - declared.get("fvu", 0.0))
    if "l0" in declared:
        distance += 0.2 * abs(math.log2(max(figures.l0, 1e-3) / declared["l0"]))
    return distance if math.isfinite(distance) else math.inf
