"""From the width of the target's residual stream to that of the explainer's, one linear map per layer of the target."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Kind = Literal["identity", "linear", "none"]


class Projection(nn.Module):
    """Vectors of the target as vectors of the explainer.

    "identity" has no weights. "linear" has one bias-free map for each of `layers`, which starts as the identity where
    the widths agree, else as one random matrix with orthonormal rows or columns (the same for all layers, since all
    share the residual stream's basis), or as given by `set_weights`. "none" is of explainers whose questions have no
    vectors (ablation): their width may be any. A vector that belongs to a block of several layers
    (a patch of a block is the mean of its layers) is mapped by the mean of their maps.

    All weights take part in every forward pass, even of a batch without vectors: under ZeRO-3 all workers then gather
    the same parameters in the same order.

    Raises:
        ValueError: an identity between different widths, or a linear projection of no layer.
    """

    def __init__(
        self, kind: Kind, d_target: int, d_explainer: int, layers: Sequence[int] = (), *, seed: int = 0
    ) -> None:
        super().__init__()
        self.kind, self.d_target, self.d_explainer, self.layers = kind, d_target, d_explainer, tuple(layers)
        self._row = {layer: row for row, layer in enumerate(self.layers)}
        if kind == "identity" and d_target != d_explainer:
            raise ValueError(
                f"target of width {d_target}, explainer of width {d_explainer}: an identity cannot map one to the "
                "other; use a linear projection"
            )
        if kind != "linear":
            self.register_parameter("weight", None)
            return
        if not self.layers:
            raise ValueError("a linear projection of no layer: name the target's layers that vectors come from")
        start = _start(d_target, d_explainer, seed)
        self.weight = nn.Parameter(start.repeat(len(self.layers), 1, 1))

    def set_weights(self, maps: Mapping[int, Float[Tensor, "d_explainer d_target"]]) -> None:
        """Take the maps of each layer, such as those of `RidgeSums.map`.

        Raises:
            ValueError: a layer has no map, or an unknown one has.
        """
        if set(maps) != set(self.layers):
            raise ValueError(f"maps of layers {sorted(maps)} for a projection of layers {list(self.layers)}")
        with torch.no_grad():
            self.weight.copy_(torch.stack([maps[layer] for layer in self.layers]))

    def forward(
        self, vectors: Float[Tensor, "n d_target"], layers: Sequence[tuple[int, ...]]
    ) -> Float[Tensor, "n d_explainer"]:
        """One vector per row, each with the layers it belongs to.

        Raises:
            ValueError: a vector of another width, (linear) one of an unknown layer or of none, or (none) any.
        """
        if vectors.shape[-1] != self.d_target:
            raise ValueError(f"vectors of width {vectors.shape[-1]} of a target of width {self.d_target}")
        if self.kind == "none":
            if len(vectors):
                raise ValueError("this explainer was trained on questions without vectors: it reads none")
            return vectors.new_zeros(0, self.d_explainer)
        if self.weight is None:
            return vectors
        shares, vectors = self._shares(layers), vectors.to(self.weight)
        projected = vectors.new_zeros(len(vectors), self.d_explainer)
        for row, weight in enumerate(self.weight):
            concerned = shares[:, row].nonzero().squeeze(-1)
            share = shares[concerned, row].unsqueeze(-1).to(vectors)
            concerned = concerned.to(vectors.device)
            projected = projected.index_add(0, concerned, share * (vectors[concerned] @ weight.T))
        return projected

    def _shares(self, layers: Sequence[tuple[int, ...]]) -> Float[Tensor, "n n_layers"]:
        shares = torch.zeros(len(layers), len(self.layers))
        for i, block in enumerate(layers):
            unknown = [layer for layer in block if layer not in self._row]
            if unknown or not block:
                raise ValueError(
                    f"a vector of layers {list(block)}: the projection knows layers {', '.join(map(str, self.layers))}"
                )
            for layer in block:
                shares[i, self._row[layer]] += 1 / len(block)
        return shares


def _start(d_target: int, d_explainer: int, seed: int) -> Float[Tensor, "d_explainer d_target"]:
    if d_target == d_explainer:
        return torch.eye(d_target)
    start = torch.empty(d_explainer, d_target)
    nn.init.orthogonal_(start, generator=torch.Generator().manual_seed(seed))
    return start


class RidgeSums:
    """What a ridge regression needs of paired activations, summed batch by batch in float64: the data need not fit in
    memory."""

    def __init__(self, d_target: int, d_explainer: int) -> None:
        self.xx = torch.zeros(d_target, d_target, dtype=torch.float64)
        self.xy = torch.zeros(d_target, d_explainer, dtype=torch.float64)
        self.yy = 0.0

    def add(self, x: Float[Tensor, "n d_target"], y: Float[Tensor, "n d_explainer"]) -> None:
        """Activations of target and explainer at the same places of the same texts."""
        x, y = x.double(), y.double()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += float((y * y).sum())

    def map(self, penalty: float) -> Float[Tensor, "d_explainer d_target"]:
        """The map W that minimises |xW' - y|^2 + penalty * mean eigenvalue of x'x * |W|^2 (no intercept)."""
        d_target = len(self.xx)
        ridge = penalty * self.xx.diagonal().mean() * torch.eye(d_target, dtype=torch.float64)
        return torch.linalg.solve(self.xx + ridge, self.xy).T.float()

    def explained(self, weight: Float[Tensor, "d_explainer d_target"]) -> float:
        """Share of |y|^2 that the map explains, at most 1, on the data that was added."""
        w = weight.double()
        error = self.yy - 2 * float((self.xy.T * w).sum()) + float((w @ self.xx * w).sum())
        return 1 - error / self.yy
