"""The windows of a corpus that show what a feature responds to, found in one pass and little memory.

Kept for each feature: the windows of its highest activations; random windows in which it is off; and near misses, in
which it is off but closest to being on (Bills et al. 2023 and the paper score descriptions on such windows). There is
never a feature x token matrix of the corpus. Each kind is a top-k under a total order, score first and then window
number, so a merge gives the same result however the corpus was split over actors and in whatever order they come.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ray_explain.features.sae import SAE

Kind = Literal["top", "random", "near"]
NUMBERS_AT_A_TIME = 1 << 22  # tokens x features encoded at once: 16 MiB, so that a CPU's caches help
_EMPTY = torch.iinfo(torch.int64).min
_ID_BITS = 0xFFFFFFFF


class Windows(NamedTuple):
    """Windows of the corpus with the residual stream of one layer."""

    ids: Int[Tensor, " windows"]  # numbers in the corpus, the same in every run; 0 to 2**32 - 1
    residual: Float[Tensor, "windows pos d_model"]
    present: Bool[Tensor, "windows pos"]  # False: padding, or a token to be left out, such as the first


@dataclass(frozen=True, eq=False)
class Exemplar:
    """One window of one feature."""

    kind: Kind
    rank: int  # from 0; the highest score first
    window: int
    activations: Float[np.ndarray, " pos"]  # 0 where the window has no token


class Kept(NamedTuple):
    """Windows that were kept, in no order. The higher its key, the better a window of its kind; all keys differ."""

    feature: Int[np.ndarray, " n"]
    key: Int[np.ndarray, " n"]
    window: Int[np.ndarray, " n"]
    activations: Float[np.ndarray, "n pos"]


class _Kept:
    """For each feature, the windows of the highest keys, in no order, and the feature's activations in them."""

    def __init__(self, n_features: int, size: int, positions: int, device: torch.device) -> None:
        self.size = size
        self.keys = torch.full((n_features, size), _EMPTY, dtype=torch.int64, device=device)
        self.activations = torch.zeros(n_features, size, positions, device=device)
        self.lowest = self.keys.new_full((n_features,), _EMPTY)

    def add(self, keys: Int[Tensor, "windows d_sae"], activations: Float[Tensor, "windows pos d_sae"]) -> None:
        if not self.size:
            return
        better = (keys.amax(dim=0) > self.lowest).nonzero().squeeze(1)
        best = torch.cat([self.keys[better], keys[:, better].T], dim=1).topk(self.size, dim=1, sorted=False)
        # Only what changes is copied: each new window takes the place of one that is not among the best any more.
        stays = torch.zeros(len(better), self.size + len(keys), dtype=torch.bool, device=keys.device)
        stays.scatter_(1, best.indices, True)
        row, window = stays[:, self.size :].nonzero(as_tuple=True)
        feature, place = better[row], (~stays[:, : self.size]).nonzero(as_tuple=True)[1]
        self.keys[feature, place] = keys[window, feature]
        self.activations[feature, place] = activations[window, :, feature]
        self.lowest[better] = self.keys[better].amin(dim=1)

    def merge(self, other: "_Kept") -> None:
        if not self.size:
            return
        theirs = other.keys.to(self.keys.device)
        again = ((theirs & _ID_BITS)[:, :, None] == (self.keys & _ID_BITS)[:, None]).any(dim=2)
        best = torch.cat([self.keys, theirs.masked_fill(again, _EMPTY)], dim=1).topk(self.size, dim=1)
        both = torch.cat([self.activations, other.activations.to(self.keys.device)], dim=1)
        places = best.indices[..., None].expand(-1, -1, both.shape[2])
        self.keys, self.activations = best.values, both.gather(1, places)
        self.lowest = self.keys[:, -1].clone()


class TopWindows:
    """Windows of each feature, gathered batch by batch and merged over actors."""

    def __init__(
        self,
        n_features: int,
        positions: int,
        *,
        top: int = 20,
        random: int = 10,
        near: int = 10,
        seed: int = 0,
        device: torch.device | str = "cpu",
        numbers: Sequence[int] | None = None,
    ) -> None:
        """`numbers`: of the features in their dictionary, so that a feature gets the same random windows whatever other
        features are looked at; by default they are all the dictionary has."""
        self.n_features, self.positions, self.seed = n_features, positions, seed
        self.sizes: dict[Kind, int] = {"top": top, "random": random, "near": near}
        where = torch.device(device)
        self._kept = {kind: _Kept(n_features, size, positions, where) for kind, size in self.sizes.items()}
        self._numbers = torch.as_tensor(range(n_features) if numbers is None else numbers, device=where)
        self.n_windows = 0  # seen
        self.fired = torch.zeros(n_features, dtype=torch.int64, device=where)  # windows each feature was on in

    def add(
        self,
        ids: Int[Tensor, " windows"],
        activations: Float[Tensor, "windows pos d_sae"],
        nearness: Float[Tensor, "windows d_sae"] | None = None,
    ) -> None:
        """Take in windows that were not taken in before; activations of absent tokens are 0.

        `nearness`: how near a feature came to being on in a window, such as its largest pre-activation; without it no
        near misses are gathered. A feature is off in a window where all its activations are 0.

        Raises:
            ValueError: another number of features or positions, or a window number out of range.
        """
        self._check(ids, activations)
        if not len(ids):
            return
        score = activations.amax(dim=1)
        off = score <= 0
        self._kept["top"].add(_keys(score, ids).masked_fill_(off, _EMPTY), activations)
        self._kept["random"].add(self._random_keys(ids).masked_fill_(~off, _EMPTY), activations)
        if nearness is not None:
            self._kept["near"].add(_keys(nearness, ids).masked_fill_(~off, _EMPTY), activations)
        self.n_windows += len(ids)
        self.fired += (~off).sum(dim=0)

    def merge(self, other: "TopWindows") -> "TopWindows":
        """This one with what `other` gathered from other windows; `other` stays as it is.

        Raises:
            ValueError: they were made with other sizes or another seed.
        """
        mine, theirs = (self.n_features, self.positions, self.sizes, self.seed), (
            other.n_features, other.positions, other.sizes, other.seed
        )  # fmt: skip
        if mine != theirs:
            raise ValueError(f"features, positions, sizes, seed {mine} and {theirs}: only alike ones can be merged")
        for kind, kept in self._kept.items():
            kept.merge(other._kept[kind])
        self.n_windows += other.n_windows
        self.fired += other.fired.to(self.fired.device)
        return self

    def kept(self, kind: Kind) -> Kept:
        """All windows of a kind, of all features; for merging with those of other searches, by key."""
        kept = self._kept[kind]
        feature, place = (kept.keys != _EMPTY).nonzero(as_tuple=True)
        keys = kept.keys[feature, place]
        return Kept(
            feature.cpu().numpy(),
            keys.cpu().numpy(),
            (_ID_BITS - (keys & _ID_BITS)).cpu().numpy(),
            kept.activations[feature, place].cpu().numpy(),
        )

    def exemplars(self, feature: int) -> list[Exemplar]:
        """The windows of one feature: top first, then random, then near misses; fewer where the corpus has fewer.

        A window can be both random and near.
        """
        found = []
        for kind in get_args(Kind):
            kept = self._kept[kind]
            keys, places = kept.keys[feature].sort(descending=True)
            for rank, (key, place) in enumerate(zip(keys.tolist(), places.tolist(), strict=True)):
                if key != _EMPTY:
                    activations = kept.activations[feature, place].cpu().numpy()
                    found.append(Exemplar(kind, rank, _ID_BITS - (key & _ID_BITS), activations))
        return found

    def __iter__(self) -> Iterator[tuple[int, list[Exemplar]]]:
        for feature in range(self.n_features):
            yield feature, self.exemplars(feature)

    def _random_keys(self, ids: Int[Tensor, " windows"]) -> Int[Tensor, "windows d_sae"]:
        """A priority for each pair, that no other window or feature has a part in: so a sample without replacement."""
        mixed = _hash(_hash(ids + (self.seed << 32))[:, None] ^ _hash(self._numbers.to(ids.device)))
        return (mixed >> 32 << 32) | (_ID_BITS - ids)[:, None]

    def _check(self, ids: Int[Tensor, " windows"], activations: Float[Tensor, "windows pos d_sae"]) -> None:
        if tuple(activations.shape[1:]) != (self.positions, self.n_features):
            raise ValueError(
                f"activations {list(activations.shape)}: these hold windows of {self.positions} positions and "
                f"{self.n_features} features"
            )
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) <= _ID_BITS:
            raise ValueError(f"window numbers {int(ids.min())} to {int(ids.max())}: they must be from 0 to 2**32 - 1")


@torch.no_grad()
def search(
    sae: SAE, batches: Iterable[Windows], found: TopWindows, features: Sequence[int] | None = None
) -> TopWindows:
    """`found`, with the windows of `batches` taken in; of all features, or of these only.

    To search raw directions (neurons, activations, differences), give them as the encoder of a ReLU SAE without biases;
    see `projecting`.

    Raises:
        ValueError: as `SAE.encode` and `TopWindows.add`.
    """
    if features is not None and sae.activation != "topk":
        sae, features = sae.subset(features), None
    columns_of = None if features is None else torch.as_tensor(features, dtype=torch.long)
    n_windows = max(1, NUMBERS_AT_A_TIME // (found.positions * sae.d_sae))
    buffer = None
    for batch in batches:
        if buffer is None:  # one for all: allocating as much anew takes longer than the product itself
            buffer = torch.empty(n_windows * found.positions, sae.d_sae, device=batch.residual.device)
        for columns in zip(*(column.split(n_windows) for column in batch), strict=True):
            _take_in(sae, Windows(*columns), found, buffer, columns_of)
    return found


def _take_in(
    sae: SAE,
    windows: Windows,
    found: TopWindows,
    buffer: Float[Tensor, "tokens d_sae"],
    features: Int[Tensor, " chosen"] | None,
) -> None:
    absent = ~windows.present.reshape(-1, 1)
    padded = bool(absent.any())
    x = windows.residual.flatten(0, 1)
    x = x.masked_fill(absent, 0) if padded else x  # padding may hold anything
    by_window = (len(windows.ids), found.positions, found.n_features)
    pre = sae.pre_activations(x, out=buffer[: len(x)])
    nearness = None
    if found.sizes["near"]:
        own = pre if features is None else pre[:, features.to(pre.device)]
        nearness = (own.masked_fill(absent, -torch.inf) if padded else own).view(by_window).amax(dim=1)
    activations = sae.activate(pre)
    if features is not None:
        activations = activations[:, features.to(pre.device)]
    if padded:
        activations.masked_fill_(absent, 0)
    found.add(windows.ids, activations.view(by_window), nearness)


def projecting(vectors: Float[Tensor, "n d_model"], layer: int) -> SAE:
    """Raw vectors as features: a vector's activation on a token is its dot product with the residual, if positive.

    That is the paper's activation for vectors without an SAE (2.1, out-of-distribution sets), as far as it is known.
    """
    vectors = vectors.float()
    return SAE(
        encoder=vectors,
        encoder_bias=vectors.new_zeros(len(vectors)),
        directions=vectors,
        decoder_bias=vectors.new_zeros(vectors.shape[1]),
        layer=layer,
        origin="projection",
    )


def _keys(score: Float[Tensor, "windows d_sae"], ids: Int[Tensor, " windows"]) -> Int[Tensor, "windows d_sae"]:
    """One integer that sorts as (score, then the lower window number first)."""
    bits = (score + 0.0).view(torch.int32)  # + 0.0 makes one of the two zeros
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the bits of negative floats sort the wrong way round
    return (ordered.to(torch.int64) << 32) | (_ID_BITS - ids)[:, None]


def _hash(numbers: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Mixed bits, the same on every machine (splitmix64's finaliser, in wrapping 64-bit arithmetic)."""
    mixed = (numbers ^ ((numbers >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ ((mixed >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return mixed ^ ((mixed >> 31) & 0x1FFFFFFFF)
