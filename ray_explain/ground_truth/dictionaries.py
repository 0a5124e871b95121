"""The directions whose meaning is asked for, layer by layer, each with what tells where it is active.

All come in one form, an SAE: a published one, one trained here, or vectors (neurons' outputs, activations,
differences) whose activation is their dot product with the residual stream.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_explain import records, storage
from ray_explain.errors import BadInput
from ray_explain.features.doctor import Figures, examine, refuse
from ray_explain.features.exemplars import projecting
from ray_explain.features.readers import (
    ROWS_AT_A_TIME,
    count_features,
    read_directions,
    read_sae,
)
from ray_explain.features.sae import SAE
from ray_explain.features.training import train_sae
from ray_explain.ground_truth.corpora import read_windows, rows_where
from ray_explain.ground_truth.neuronpedia import UNKNOWN
from ray_explain.ground_truth.positions import special_prefix
from ray_explain.ground_truth.published import commit_of, fetched
from ray_explain.ground_truth.splits import split_of
from ray_explain.ground_truth.target import Target
from ray_explain.interventions.extraction import residuals
from ray_explain.interventions.layout import Layout
from ray_explain.interventions.walk import best_bytes, budgeted, row_bytes
from ray_explain.stages import Result

CHECKED_TOKENS = 4096  # that the doctor looks at
TRAINING_NUMBERS = 1 << 28  # of activations that an SAE is trained on: 1 GiB in float32
BATCH_TOKENS = 1024
_DOWN_PROJECTIONS = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "w2")

LAYERS = pa.schema([pa.field("layer", pa.int32(), nullable=False)])
FEATURES = pa.schema(
    [
        *(records.PATCHING_CASES.field(name) for name in ("case_id", "group", "split")),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # sae | neuron | activation | difference
        pa.field("feature_id", pa.int32(), nullable=False),  # its number in the dictionary
        pa.field("l0", pa.float32()),  # this and the next two: the doctor's figures of the layer's SAE
        pa.field("fvu", pa.float32()),
        pa.field("dead_fraction", pa.float32()),
    ]
)


class Windowed:
    """The corpus as a target reads it: windows with the residual stream behind their tokens."""

    def __init__(self, target: Target, folder: str) -> None:
        self._target, self._folder = target, folder
        self._prefix = special_prefix(target.tokenizer)

    @property
    def skipped(self) -> int:
        """Tokens at the start of a window that are left out: a first token's norm is often a hundred times the rest.

        None where a special token stands first.
        """
        return 0 if self._prefix else 1

    def residual(
        self, numbers: Sequence[int], layers: Sequence[int]
    ) -> list[tuple[list[int], Float[Tensor, "layers pos d_model"]]]:
        """Of each of these windows, its tokens that are not skipped, and the residual stream behind them."""
        prompts, first = self._prompts(numbers)
        at = [range(first, len(prompt)) for prompt in prompts]
        read = residuals(self._target.model, prompts, layers, at, memory_budget=self._target.memory_budget)
        return [(prompt[first:], vectors) for prompt, vectors in zip(prompts, read, strict=True)]

    @torch.no_grad()
    def neurons(
        self, numbers: Sequence[int], layers: Sequence[int]
    ) -> list[tuple[list[int], Float[Tensor, "layers pos d_mlp"]]]:
        """As `residual`, with what enters the down projection of each layer's MLP."""
        prompts, first = self._prompts(numbers)
        found: dict[int, Tensor] = {}
        layout = self._target.layout
        hooks = [
            down_projection(layout, layer).register_forward_pre_hook(
                lambda _, inputs, layer=layer: found.__setitem__(layer, inputs[0])
            )
            for layer in layers
        ]
        read: list[Tensor] = [torch.empty(0)] * len(prompts)
        try:
            for some in self._alike(prompts):
                layout.decoder(torch.tensor([prompts[i] for i in some], device=layout.device), use_cache=False)
                inside = torch.stack([found[layer][:, first:] for layer in layers], dim=1)
                for i, own in zip(some, inside, strict=True):
                    read[i] = own
        finally:
            for hook in hooks:
                hook.remove()
        return [(prompt[first:], own) for prompt, own in zip(prompts, read, strict=True)]

    def _alike(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Which prompts run together: of the same length, as many as fit."""
        cost, best = row_bytes(self._target.layout, logits=False), best_bytes(self._target.layout)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for _, alike in groupby(order, key=lambda i: len(prompts[i])):
            yield from budgeted(alike, lambda i: cost(len(prompts[i])), self._target.memory_budget, best=best)

    def _prompts(self, numbers: Sequence[int]) -> tuple[list[list[int]], int]:
        """Special tokens and window, of each; and where the tokens begin that are not skipped."""
        ids = read_windows(self._folder, numbers)
        return [[*self._prefix, *ids[number]] for number in numbers], max(len(self._prefix), self.skipped)

    def tokens_of(self, n_windows: int, layers: Sequence[int], most: int) -> Float[Tensor, "layers tokens d_model"]:
        """About `most` tokens, from windows spread over the corpus, float32."""
        ids = read_windows(self._folder, range(min(n_windows, 64)))
        wanted = max(2, most // max(1, round(float(np.mean([len(own) for own in ids.values()])))))
        numbers = range(0, n_windows, max(1, n_windows // wanted))
        return torch.cat([vectors.float() for _, vectors in self.residual(numbers, layers)], dim=1)[:, :most]


class DictionaryStage:
    """The features of each layer that are asked about. SAEs that do not fit the target are refused; what is no
    published SAE is made and kept below `folder`.

    Config: that of `Target`, and `source`, `sae` (path and revision, or None), `folder`, `windows` (folder of the
    table and `n_windows`), `per_layer`, `d_sae`, `k`, `steps`, `check`, `seed`, `labels` (folder of a table
    `neuronpedia.LABELS`, to ask only about features described there, or None), `vectors` (folder of a table
    records.features, for activations and differences, or None), `split` (of all features; if None, groups are dealt).
    """

    schema_in: ClassVar[pa.Schema] = LAYERS
    schema_out: ClassVar[pa.Schema] = FEATURES

    def __init__(self, config: dict[str, Any]) -> None:
        self._config, self._target = config, Target(config)
        self._corpus = Windowed(self._target, config["windows"])

    def __call__(self, table: pa.Table) -> Result:
        made = [self._of_layer(layer) for layer in table["layer"].to_pylist()]
        commits = Counter(name for part in made for name in part.measured)
        return Result(
            pa.concat_tables(part.table for part in made), [lost for part in made for lost in part.dropped], commits
        )

    def _of_layer(self, layer: int) -> Result:
        self._target.layout.checked_layer(layer)
        figures = self._examined(layer) if self._config["sae"] else self._made(layer)
        with dictionary(self._config, layer) as folder:
            d_sae = count_features(folder, layer)
            known = self._known(layer, d_sae)
            chosen = self._chosen(layer, [number for number in known if number < d_sae])
            ids = self._ids(folder, layer, chosen)
            commit = commit_of(folder)
        measured = figures.declarable() if figures else {"l0": None, "fvu": None, "dead_fraction": None}
        rows = [
            {"case_id": case_id, "group": group, "layer": layer, "feature_id": number, **measured}
            | {"split": self._split(group), "source": SOURCES[self._config["source"]]}
            for number, (case_id, group) in zip(chosen, ids, strict=True)
        ]
        unknown = [(f"layer {layer} feature {number}", UNKNOWN) for number in known if number >= d_sae]
        return Result(records.rows_table(rows, FEATURES), unknown, {f"layers of commit {commit}": 1} if commit else {})

    def _split(self, group: str) -> str:
        return self._config["split"] or split_of(group, salt=str(self._config["seed"]))

    def _ids(self, folder: Path, layer: int, chosen: Sequence[int]) -> list[tuple[str, str]]:
        """Of each chosen feature its case and its group: by content, wherever the files lie."""
        if self._config["vectors"]:
            own = self._table_of(layer)
            every = list(zip(own["case_id"].to_pylist(), own["group"].to_pylist(), strict=True))
            return [every[number] for number in chosen]
        found = []
        for start in range(0, len(chosen), ROWS_AT_A_TIME):
            some = chosen[start : start + ROWS_AT_A_TIME]
            for number, row in zip(some, read_directions(folder, layer, some).numpy(), strict=True):
                digest = hashlib.sha256(row.tobytes()).hexdigest()
                found.append(records.content_id("feature", self._config["source"], layer, number, digest))
        return [(each, each) for each in found]

    def _examined(self, layer: int) -> Figures | None:
        """Raises: BadInput: the SAE cannot be read, is of another width, or does not fit."""
        try:
            with dictionary(self._config, layer) as folder:
                sae = read_sae(folder, layer)
                d_model = self._target.layout.d_model
                if sae.d_model != d_model:
                    raise BadInput(f"the SAE in {folder} is {sae.d_model} wide, the target {d_model}: not its SAE")
                if sae.site != "residual":
                    raise BadInput(f"the SAE in {folder} is of {sae.site}: features are read in the residual stream")
                return self._refused(sae, layer) if self._config["check"] else None
        except (ValueError, FileNotFoundError) as error:
            raise BadInput(f"`ground_truth.features.sae`, layer {layer}: {error}") from error

    def _refused(self, sae: SAE, layer: int) -> Figures:
        layers = [near for near in (layer, layer - 1, layer + 1) if 0 <= near < self._target.layout.n_layers]
        here, *elsewhere = self._corpus.tokens_of(self._config["n_windows"], layers, CHECKED_TOKENS)
        return refuse(sae.to(here.device), here, dict(zip(layers[1:], elsewhere, strict=True)))

    def _made(self, layer: int) -> Figures | None:
        """Makes the dictionary of a layer, unless an earlier run did."""
        place = f"{self._config['folder']}/layer_{layer}"
        source = self._config["source"]
        if source == "sae":
            [activations] = self._corpus.tokens_of(
                self._config["n_windows"], [layer], TRAINING_NUMBERS // self._target.layout.d_model
            )
            sae = trained(activations, layer, self._config)
            figures = examine(sae, activations[:CHECKED_TOKENS])
        else:
            vectors = neuron_outputs(self._target.layout, layer) if source == "neurons" else self._vectors_of(layer)
            sae, figures = projecting(vectors.cpu(), layer), None
        with storage.new_folder(place) as folder:
            sae.save(folder)
        return figures

    def _vectors_of(self, layer: int) -> Float[Tensor, "n d_model"]:
        """Raises: BadInput: there is none of this layer."""
        own = self._table_of(layer)
        if not own.num_rows:
            raise BadInput(f"`ground_truth.features`: no {self._config['source']} of layer {layer} could be taken")
        return torch.from_numpy(np.concatenate(records.vectors_of(own["vectors"])))

    def _table_of(self, layer: int) -> pa.Table:
        every = storage.read_batches(self._config["vectors"])
        return pa.concat_tables(part.filter(pc.field("layer") == layer) for part in every)

    def _known(self, layer: int, d_sae: int) -> Sequence[int]:
        """The features that can be asked about: all, or those that an export describes."""
        if self._config["labels"] is None:
            return range(d_sae)
        described = rows_where(self._config["labels"], ds.field("layer") == layer)
        return sorted(pc.unique(described["feature_id"]).to_pylist())

    def _chosen(self, layer: int, possible: Sequence[int]) -> Sequence[int]:
        wanted = self._config["per_layer"]
        if wanted is None or wanted >= len(possible):
            return possible
        return sorted(random.Random(f"{self._config['seed']} {layer}").sample(possible, wanted))


def trained(activations: Float[Tensor, "tokens d_model"], layer: int, config: Mapping[str, Any]) -> SAE:
    """The SAE of these activations; `config` has `d_sae`, `k`, `steps` and `seed`."""
    sizes = {name: config[name] for name in ("d_sae", "k", "steps", "seed")}
    return train_sae(activations, **sizes, batch_tokens=min(BATCH_TOKENS, len(activations)), layer=layer)


SOURCES = {"sae": "sae", "neurons": "neuron", "activations": "activation", "differences": "difference"}


def down_projection(layout: Layout, layer: int) -> Any:
    """The last part of a layer's MLP, which neurons write through.

    Raises:
        BadInput: the MLP has none that we know, such as one of experts.
    """
    mlp: Any = layout.mlp(layer)
    for name in _DOWN_PROJECTIONS:
        part: Any = getattr(mlp, name, None)
        if layout.d_model in getattr(getattr(part, "weight", None), "shape", ()):
            return part
    raise BadInput(f"neurons of {layout.family}: its MLP has none of {', '.join(_DOWN_PROJECTIONS)}")


def neuron_outputs(layout: Layout, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """What each neuron of a layer's MLP writes into the residual stream; where a norm follows the MLP (Gemma 2 and 3,
    OLMo 2), up to a factor that the norm gives all neurons of a token.

    Raises:
        BadInput: as `down_projection`.
    """
    part: Any = down_projection(layout, layer)
    matrix = part.weight.detach().float()
    matrix = matrix.T if isinstance(part, nn.Linear) else matrix  # GPT-2's Conv1D is the other way round
    norm = layout.module(layer, "mlp_out")
    if norm is not part and norm is not layout.mlp(layer):
        with torch.no_grad():  # the weights of an RMS norm, of which some families keep the difference from 1
            matrix = matrix * norm(matrix.new_ones(layout.d_model, dtype=layout.dtype)).float()
    return matrix.contiguous()


def directions_of(config: Mapping[str, Any], features: pa.Table) -> Float[np.ndarray, "n d_model"]:
    """The direction of each of these features (a table of FEATURES and more), float32: out of its dictionary, or the
    table `vectors`, where those are given. `config` is that of `DictionaryStage`, or has `vectors` alone."""
    if config["vectors"]:
        layers, cases = (ds.field(name).isin(pc.unique(features[name])) for name in ("layer", "case_id"))
        found = rows_where(config["vectors"], layers & cases)
        own = dict(zip(found["case_id"].to_pylist(), records.vectors_of(found["vectors"]), strict=True))
        return np.concatenate([own[case_id] for case_id in features["case_id"].to_pylist()])
    at, numbers = np.array(features["layer"]), np.array(features["feature_id"])
    parts = {}
    for layer in np.unique(at).tolist():
        with dictionary(config, layer) as folder:
            parts[layer] = read_directions(folder, layer, numbers[at == layer].tolist()).numpy()
    vectors = np.empty((len(at), next(iter(parts.values())).shape[1]), dtype=np.float32)
    for layer, part in parts.items():
        vectors[at == layer] = part
    return vectors


@contextmanager
def dictionary(config: Mapping[str, Any], layer: int) -> Iterator[Path]:
    """A local folder with the SAE of a layer: the published one, or the one that `DictionaryStage` made.

    Raises:
        FileNotFoundError, ValueError: there is none, or several.
    """
    if config["sae"]:
        yield fetched(config["sae"]["path"], layer, config["sae"]["revision"])
        return
    with storage.local_folder(f"{config['folder']}/layer_{layer}") as folder:
        yield Path(folder)
