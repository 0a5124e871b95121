"""Small top-k SAEs for targets that have none (top-k: Gao et al. 2024, 2.3; resampling: Bricken et al. 2023).

Deterministic in the seed on one device and number of threads. The decoder is applied as a weighted sum of the k rows
in use, so a step costs about a third of the dense one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from ray_explain.features.doctor import examine
from ray_explain.features.sae import SAE

REVIVE_EVERY_STEPS = 25  # features not used once since are put on what is explained worst
MAX_FIGURE_TOKENS = 16_384


def train_sae(
    activations: Float[Tensor, "tokens d_model"],
    *,
    d_sae: int,
    k: int,
    steps: int,
    batch_tokens: int,
    seed: int,
    layer: int = 0,
    learning_rate: float = 3e-3,
    on_step: Callable[[int, float], None] | None = None,
) -> SAE:
    """A top-k SAE of these activations, with unit directions and its own figures under `declared`.

    Leave out first tokens: their norms are often a hundred times the rest, and they would be all it learns.
    `on_step` is called with the number of the step, from 1, and the fraction of the batch's variance unexplained.

    Raises:
        ValueError: fewer tokens than a batch, rows that are not finite, all rows equal, or k above d_sae.
    """
    _check(activations, d_sae=d_sae, k=k, batch_tokens=batch_tokens)
    generator = torch.Generator().manual_seed(seed)
    learner = _Learner(activations, d_sae, k, generator)
    optimizer = torch.optim.Adam(learner.parameters(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)
    warm, cool = max(1, steps // 20), max(1, steps // 3)
    for step, rows in zip(range(1, steps + 1), _batches(len(activations), batch_tokens, generator), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / warm, (steps + 1 - step) / cool)
        batch = activations[rows.to(activations.device)].float()
        if step % REVIVE_EVERY_STEPS == 0 and step <= steps - cool:
            learner.revive(batch, optimizer)
        optimizer.zero_grad(set_to_none=True)
        unexplained = learner.unexplained(batch)
        unexplained.backward()
        learner.drop_radial_gradient()
        optimizer.step()
        learner.normalise_directions()
        if on_step is not None:
            on_step(step, float(unexplained.detach()))
    sae = learner.sae(layer)
    figures = examine(sae, activations[:: max(1, len(activations) // MAX_FIGURE_TOKENS)])
    return replace(sae, declared=figures.declarable())


class _Learner:
    """The parameters of a top-k SAE while it is trained, in normalised units (mean 0, mean norm sqrt(d_model))."""

    def __init__(
        self, activations: Float[Tensor, "tokens d_model"], d_sae: int, k: int, generator: torch.Generator
    ) -> None:
        self.k, d_model = k, activations.shape[1]
        mean = activations.float().mean(dim=0)
        self.scale = float(math.sqrt(d_model) / (activations.float() - mean).norm(dim=1).mean())
        # Starting on data points (with a little noise, as there may be fewer of them) leaves few features dead.
        drawn = torch.randint(len(activations), (d_sae,), generator=generator).to(activations.device)
        noise = torch.randn(d_sae, d_model, generator=generator).to(activations.device)
        start = functional.normalize(activations[drawn].float() - mean, dim=1) + 0.3 * functional.normalize(
            noise, dim=1
        )
        self.directions = functional.normalize(start, dim=1).requires_grad_()
        self.encoder = self.directions.detach().clone().requires_grad_()
        self.encoder_bias = activations.new_zeros(d_sae, dtype=torch.float32).requires_grad_()
        self.decoder_bias = (mean * self.scale).requires_grad_()
        self.used = torch.zeros(d_sae, dtype=torch.bool, device=activations.device)

    def parameters(self) -> list[Tensor]:
        return [self.encoder, self.encoder_bias, self.directions, self.decoder_bias]

    def unexplained(self, raw: Float[Tensor, "batch d_model"]) -> Float[Tensor, ""]:
        """Fraction of the batch's variance that is left unexplained, which is what is minimised."""
        x = raw * self.scale
        return self._error(x).pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum()

    @torch.no_grad()
    def revive(self, raw: Float[Tensor, "batch d_model"], optimizer: torch.optim.Optimizer) -> None:
        """Put each feature that was not used since the last time on a token that is explained badly."""
        error = self._error(raw * self.scale)
        dead = (~self.used).nonzero().squeeze(1)[: len(raw)]
        self.used.zero_()
        worst = error.norm(dim=1).topk(len(dead)).indices
        self.directions[dead] = self.encoder[dead] = functional.normalize(error[worst], dim=1)
        self.encoder_bias[dead] = 0
        for parameter in (self.directions, self.encoder, self.encoder_bias):
            for moment in ("exp_avg", "exp_avg_sq"):  # else the old momentum drags them away again
                optimizer.state[parameter][moment][dead] = 0

    def _error(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_model"]:
        pre = functional.linear(x - self.decoder_bias, self.encoder, self.encoder_bias)
        kept = pre.topk(self.k, dim=1, sorted=False)
        self.used[kept.indices[kept.values > 0]] = True
        weights = kept.values.relu()
        said = functional.embedding_bag(kept.indices, self.directions, per_sample_weights=weights, mode="sum")
        return x - (said + self.decoder_bias)

    @torch.no_grad()
    def drop_radial_gradient(self) -> None:
        """Adam's moments should not be spent on a length that is set to 1 after each step."""
        gradient = self.directions.grad
        assert gradient is not None
        gradient -= (gradient * self.directions).sum(dim=1, keepdim=True) * self.directions

    @torch.no_grad()
    def normalise_directions(self) -> None:
        self.directions.copy_(functional.normalize(self.directions, dim=1))

    def sae(self, layer: int) -> SAE:
        tensors = [parameter.detach().clone() for parameter in self.parameters()]
        return SAE(
            encoder=tensors[0],
            encoder_bias=tensors[1],
            directions=tensors[2],
            decoder_bias=tensors[3],
            activation="topk",
            k=self.k,
            layer=layer,
            normalisation="scale",
            scale=self.scale,
            centre_inputs=True,
            origin="trained",
        )


def _batches(n_tokens: int, batch_tokens: int, generator: torch.Generator) -> Iterator[Int[Tensor, " batch"]]:
    """Row numbers, each row once per pass; the rows left over from a pass are not used in it."""
    while True:
        order = torch.randperm(n_tokens, generator=generator)
        yield from order[: n_tokens - n_tokens % batch_tokens].split(batch_tokens)


def _check(activations: Tensor, *, d_sae: int, k: int, batch_tokens: int) -> None:
    if activations.ndim != 2 or len(activations) < batch_tokens:
        raise ValueError(
            f"activations {list(activations.shape)}: an SAE is trained on [tokens, d_model], and on at least"
            f" one batch of {batch_tokens} tokens"
        )
    if not 1 <= k <= d_sae:
        raise ValueError(f"k={k}, d_sae={d_sae}: a top-k SAE keeps between 1 and all of its features")
    bad = (~torch.isfinite(activations)).any(dim=1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(bad)} activation rows are NaN or infinite: drop them before training"
        )
    if bool((activations == activations[0]).all()):
        raise ValueError("all activation rows are equal: there is nothing to learn from them")
