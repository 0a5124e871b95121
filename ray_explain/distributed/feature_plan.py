"""The artifacts on the way to described features, where neither the synthetic world describes them nor all is read."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_explain import storage
from ray_explain.artifacts import Artifact
from ray_explain.config import FeaturesConfig, NeuronpediaConfig, Section, WorldDescriber
from ray_explain.errors import BadInput

if TYPE_CHECKING:
    from ray_explain.distributed.plan import Plan

# Of a language model's section, what changes how the work is done and not what comes out.
_HOW_NOT_WHAT = {"key_variable", "tries", "timeout", "threads", "input_price", "output_price", "batch_size"}
_EDGE_BYTES = 2**16


class FeaturePlan:
    """For one target: windows of the corpus -> features -> exemplars -> descriptions -> effects. Of a released data set
    vectors and exemplars are read: no corpus is.

    Of `unlabelled` vectors of the experiment, `activations` or `differences`: the same way, and no descriptions on it.
    """

    def __init__(self, plan: "Plan", target: str, unlabelled: str | None = None) -> None:
        section = plan.experiment.ground_truth.features
        assert section is not None
        self.plan, self.target, self.is_unlabelled = plan, target, unlabelled is not None
        self.section = section if unlabelled is None else _of_vectors(section, unlabelled)

    @property
    def unlabelled(self) -> list["FeaturePlan"]:
        """Those of the vectors that nothing describes."""
        return [FeaturePlan(self.plan, self.target, kind) for kind in self.section.unlabelled]

    def windows(self) -> Artifact:
        """The corpus in tokens of the target."""
        corpus = self.section.corpus
        world = None if corpus.path else self.plan.experiment.world.model_dump()
        config = corpus.model_dump(exclude={"path"}) | {"content": identity(corpus.path), "world": world}
        return self._artifact("corpus_windows", config, self.plan.model(self.target))

    def labels(self) -> Artifact | None:
        """The descriptions of an export, where the experiment has one."""
        describer = self.section.describer
        if not isinstance(describer, NeuronpediaConfig):
            return None
        config = {"content": identity(self._own(describer.path)), "layers": self.section.layers}
        return self._artifact("features_labels", config, self.plan.model(self.target))

    def places(self) -> Artifact | None:
        """Where vectors are taken from, for activations and differences."""
        if self.section.source not in ("activations", "differences"):
            return None
        config = {
            "source": self.section.source,
            "layers": self.section.layers,
            "per_layer": self.section.per_layer,
            "pairs": identity(self.section.pairs),
            "world": self.plan.experiment.world.model_dump(),
            "seed": self.plan.experiment.seed,
        }
        return self._artifact("features_places", config | self._split, self.windows())

    def vectors(self) -> Artifact | None:
        """The vectors taken there; or all features of a released data set, with its labels."""
        if self.is_released and self.is_unlabelled:
            config = self.section.model_dump(include={"vectors", "layers", "per_layer"}) | {
                "content": identity(self.released_folder),
                "seed": self.plan.experiment.seed,
            }
            return self._artifact("features_vectors", config | self._split, self.plan.model(self.target))
        if self.is_released:
            wanted = {"unlabelled": not self.takes_labels}
            return self._artifact("features_vectors", wanted, self.plan.cases("features", self.target))
        places = self.places()
        return None if places is None else self._artifact("features_vectors", {}, places)

    def features(self) -> Artifact:
        """Which features are asked about, with the figures of their SAEs."""
        section = self.section
        config: dict[str, Any] = section.model_dump(include={"source", "per_layer"}) | {
            "seed": self.plan.experiment.seed
        }
        if section.sae:
            place = self._own(section.sae.path)
            config["sae"] = {"revision": section.sae.revision, "check": section.sae.check, "content": identity(place)}
        elif section.source == "sae":
            config |= section.model_dump(include={"d_sae", "k", "steps"})
        parents = (self.plan.cases("features", self.target), self.windows(), self.labels(), self.vectors())
        return self._artifact("features", config | self._split, *parents)

    def shards(self) -> Artifact:
        """The parts of the corpus that are searched one by one."""
        return self._artifact("features_shards", {"exemplars": self.section.exemplars.model_dump()}, self.features())

    def found(self) -> Artifact:
        """The best windows of each feature in each shard."""
        return self._artifact("features_found", {}, self.shards())

    def exemplars(self) -> Artifact:
        """The best windows of each feature."""
        if self.is_released:
            sizes = self.section.exemplars.model_dump(include={"top", "random"})
            return self._artifact("features_exemplars", {"exemplars": sizes}, self.vectors())
        return self._artifact("features_exemplars", {}, self.found())

    def descriptions(self) -> Artifact:
        """What describers say of them."""
        config: dict[str, Any] = {"describer": _what(self.section.describer), "candidates": self.section.candidates}
        if self.takes_labels and self.section.vectors:
            config["without a label"] = "kept in the test split"
        return self._artifact("features_descriptions", config, self.exemplars(), self.labels())

    def effects(self) -> Artifact:
        """The features' vectors with scored descriptions."""
        judges = {} if self.is_unlabelled else self._judges
        return self._artifact("features_effects", judges | {"gold_from": self.section.gold_from}, self.descriptions())

    @property
    def is_released(self) -> bool:
        """Whether features and exemplars are read from a released data set."""
        return self.section.source == "released"

    @property
    def takes_labels(self) -> bool:
        """Whether nothing describes anew: descriptions are the labels of a released data set, or there are none."""
        return (self.is_released or self.is_unlabelled) and self.section.describer.kind == "world"

    @property
    def released_folder(self) -> str:
        """Where the released data set of the target lies."""
        return released_folder(self.section, self.target)

    @property
    def _split(self) -> dict[str, str]:
        """What sets vectors without labels, which are tested on alone, apart from those that a describer describes."""
        return {"split": "test"} if self.is_unlabelled else {}

    @property
    def _judges(self) -> dict[str, Any]:
        return {"simulator": _what(self.section.simulator), "detector": _what(self.section.detector)}

    @property
    def scores_descriptions(self) -> bool:
        """Whether there is something to score descriptions with."""
        return self.section.simulator is not None or self.section.detector is not None

    def answered(self, answers: Iterable[Artifact]) -> Artifact:
        """The features that explainers were asked about, with what they answered for descriptions."""
        return self._artifact(
            "features_answered", {"fractions": sorted(self.plan.experiment.fractions)}, self.effects(), *answers
        )

    def answer_scores(self, answers: Iterable[Artifact]) -> Artifact:
        """The same, scored as the effects' descriptions are."""
        return self._artifact("features_answer_scores", self._judges, self.answered(answers))

    def sae(self) -> dict[str, Any] | None:
        """Where published SAEs lie, as `dictionaries.dictionary` wants it."""
        if self.section.sae is None:
            return None
        path = storage.same_everywhere(self._own(self.section.sae.path))
        return {"path": path, "revision": self.section.sae.revision}

    def export(self) -> str:
        """The folder of Neuronpedia's export."""
        assert isinstance(self.section.describer, NeuronpediaConfig)
        return self._own(self.section.describer.path)

    def _own(self, path: str | Mapping[str, str]) -> str:
        if isinstance(path, str):
            return path
        if self.target not in path:
            raise BadInput(f"`ground_truth.features`: no path for the target {self.target!r} among {sorted(path)}")
        return path[self.target]

    def _artifact(self, kind: str, config: Mapping[str, Any], *parents: Artifact | None) -> Artifact:
        known = tuple(parent for parent in parents if parent is not None)
        return Artifact(kind=kind, label=self.target, config=config, parents=known)


def _what(section: Section | None) -> dict[str, Any] | None:
    """What defines a language model, or an import, of which the content is known already."""
    if section is None:
        return None
    hidden = _HOW_NOT_WHAT | ({"path"} if isinstance(section, NeuronpediaConfig) else set())
    return section.model_dump(mode="json", exclude=hidden)


def identity(path: str | None) -> Any:
    """What tells the files at a path from others: the sizes and edges of local ones; a remote place by its name.

    A path with {layer} in it stands for those of all layers.
    """
    if path is None or storage.is_remote(path):
        return path
    place = Path(path)
    if "{layer}" in path:
        fixed = list(itertools.takewhile(lambda part: "{layer}" not in part, place.parts))
        found = Path(*fixed).glob(str(place.relative_to(Path(*fixed))).replace("{layer}", "*"))
        return {str(one): identity(str(one)) for one in sorted(found)} or path
    if place.is_file():
        return edges(place)
    if place.is_dir():
        return {str(file.relative_to(place)): edges(file) for file in sorted(place.rglob("*")) if file.is_file()}
    return path


def edges(path: Path) -> str:
    """A digest of a file's size, first and last 64 KiB: whole weights of large models would take minutes."""
    return _edges(str(path), path.stat().st_size)


@cache
def _edges(path: str, size: int) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256(str(size).encode() + file.read(_EDGE_BYTES))
        file.seek(max(0, size - _EDGE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def _of_vectors(section: FeaturesConfig, kind: str) -> FeaturesConfig:
    """The section of `unlabelled` vectors of this kind, as if they were all that is asked about."""
    own = section.unlabelled[kind]  # type: ignore[index]
    origin = {"source": "released", "vectors": kind} if own.path else {"source": kind, "vectors": None}
    changed: dict[str, Any] = {"sae": None, "describer": WorldDescriber(), "candidates": 1, "unlabelled": {}}
    return section.model_copy(update=changed | origin | {"path": own.path, "per_layer": own.per_layer})


def released_folder(section: Any, target: str) -> str:
    """Where the released data set of a target lies that a task's section, or one of `unlabelled`, names."""
    return str(section.path).replace("{target}", target)


def describes(section: FeaturesConfig | None) -> bool:
    """Whether features go this way."""
    if section is None:
        return False
    scored_anew = section.source == "released" and (section.simulator is not None or section.detector is not None)
    return scored_anew or section.describer.kind != "world"


def tells_all_concepts(section: FeaturesConfig) -> bool:
    """Whether each feature comes with every description that can be given, as the world's do, and how it correlates. A
    released data set has a few labels of each, beside which what an explainer says is seldom found."""
    return section.source != "released" and not describes(section)
