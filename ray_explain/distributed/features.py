"""The steps from a corpus and a dictionary to described and scored features."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from ray_explain import records, storage
from ray_explain.artifacts import Artifact, finished
from ray_explain.config import LocalConfig, SimulatorConfig
from ray_explain.distributed.feature_plan import FeaturePlan
from ray_explain.distributed.models import d_model, n_layers, tokenizer_of
from ray_explain.distributed.session import Session
from ray_explain.distributed.sources import checked, released_features
from ray_explain.errors import BadInput
from ray_explain.ground_truth import cases, corpora, neuronpedia
from ray_explain.ground_truth.activations import ActivationStage, difference_cases, text_cases
from ray_explain.ground_truth.describers import DescribeStage, ImportStage, labelled
from ray_explain.ground_truth.dictionaries import DictionaryStage
from ray_explain.ground_truth.exemplars import MergeStage, SearchStage, shards
from ray_explain.ground_truth.features import split_features
from ray_explain.ground_truth.released_exemplars import ReleasedExemplars
from ray_explain.stages import Result
from ray_explain.world.corpus import documents

TARGET_SLICE = 1  # rows of layers and shards: each is much work
READ_AT_A_TIME = 256  # features, with their windows


def make_features(session: Session, layers_of: dict[str, Sequence[int]]) -> None:
    """The effects of the task `features` for these targets, at these layers of each; and those of the vectors that
    nothing describes.

    Raises:
        BadInput: a corpus, an SAE, an export or a released data set cannot be used.
        JobFailed: too much was dropped, or a describer does not answer.
    """
    plans = {target: FeaturePlan(session.plan, target) for target in layers_of}
    steps = [_Steps(session, one, layers_of[target]) for target, own in plans.items() for one in [own, *own.unlabelled]]
    if not session.missing([step.plan.effects() for step in steps]):
        return
    session.say("Features: exemplars, descriptions, scores")
    for step in steps:
        if step.plan.is_released:
            step.read_released()
    _search(session, [step for step in steps if not step.plan.is_released])
    for step in steps:
        step.take_labels()
    _run(session, [job for step in steps for job in step.describe_jobs()])
    _run(session, [step.effects_job() for step in steps])


def _search(session: Session, steps: Sequence["_Steps"]) -> None:
    """The exemplars, found on a corpus."""
    for step in steps:
        step.make_inputs()
    _run(session, [job for step in steps for job in step.vector_jobs()])
    _run(session, [step.feature_job() for step in steps])
    for step in steps:
        session.make_table(step.plan.shards(), step.shards)
    _run(session, [step.search_job() for step in steps])
    _run(session, [step.merge_job() for step in steps])
    for step in steps:
        step.check_alignment()


def corpus_of(session: Session, target: str) -> Artifact:
    """The windows of the features' corpus; made now where no feature was looked at on them.

    Raises:
        BadInput: the corpus cannot be read.
    """
    steps = _Steps(session, FeaturePlan(session.plan, target), [])
    steps.make_windows()
    return steps.plan.windows()


def score_answers(session: Session, plan: FeaturePlan, answers: Sequence[Artifact], answered: pa.Table) -> pa.Table:
    """`answered` (`simulations.answered`) with scores, as the effects' descriptions have them.

    Args:
        answers: What it was made from.
    """
    source, made = plan.answered(answers), plan.answer_scores(answers)
    session.make_table(source, lambda: answered)
    _run(session, [_Steps(session, plan, []).score_job(source, made)])
    return session.table(made)


@contextmanager
def _told() -> Iterator[None]:
    """Raises: BadInput: what is read in this block cannot be."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise BadInput(f"`ground_truth.features`: {error}") from error


def _run(session: Session, jobs: Sequence[Any]) -> None:
    if jobs and session.missing([job.artifact for job in jobs]):
        from ray_explain.distributed.run_stages import run_stages

        session.start_ray()
        run_stages(jobs, session.plan.root, session.plan.experiment.cluster)


class _Steps:
    """The steps for one target's features, or for some of its vectors that nothing describes."""

    def __init__(self, session: Session, plan: FeaturePlan, layers: Sequence[int]) -> None:
        self.session, self.plan, self.target, self.layers = session, plan, plan.target, list(layers)
        self.section, self.place = plan.section, session.plan.target_place(plan.target)

    def make_windows(self) -> None:
        """Raises: BadInput: the corpus cannot be read."""
        with _told():
            self.session.make_table(self.plan.windows(), self._windows)

    def make_inputs(self) -> None:
        """Raises: BadInput: the corpus, the export or the pairs cannot be read."""
        self.make_windows()
        with _told():
            if labels := self.plan.labels():
                self.session.make_table(labels, self._labels)
            if places := self.plan.places():
                self.session.make_table(places, self._places)

    def read_released(self) -> None:
        """Features and exemplars of a released data set: part by part, on the driver's machine.

        Raises:
            BadInput: they cannot be read.
            JobFailed: too many of the features cannot be used.
        """
        plan, make = self.plan, self.session.make_parts
        vectors = plan.vectors()
        assert vectors is not None
        make(vectors, self._released_features)
        with _told():
            make(plan.exemplars(), lambda: self._released_exemplars(vectors))
            self._check_exemplars()

    def take_labels(self) -> None:
        """The descriptions, where those are what came with the features."""
        if self.plan.takes_labels:
            self.session.make_parts(self.plan.descriptions(), self._labelled)

    def _check_exemplars(self) -> None:
        """Raises: ValueError: there are none."""
        made = finished(self.plan.exemplars(), self.session.plan.root)
        if made is not None and not made.rows:
            reasons = ", ".join(f"{count} dropped: {reason}" for reason, count in made.dropped.items())
            raise ValueError(f"no feature has exemplars in {self.plan.released_folder} ({reasons})")

    def vector_jobs(self) -> list[Any]:
        places, vectors = self.plan.places(), self.plan.vectors()
        return [] if places is None or vectors is None else [self._job(ActivationStage, self.place, places, vectors)]

    def feature_job(self) -> Any:
        source, made = self.session.plan.cases("features", self.target), self.plan.features()
        return self._job(DictionaryStage, self._dictionary(), source, made, rows=TARGET_SLICE, expands=True)

    def shards(self) -> pa.Table:
        sizes = self.section.exemplars.model_dump()
        features = self.session.table(self.plan.features(), ["layer"])
        n, positions = self._n_windows(), self.section.corpus.tokens
        return shards(features, n, positions=positions, kept=sum(sizes.values()))

    def search_job(self) -> Any:
        config = self._dictionary() | self._exemplars() | {"features": self._path(self.plan.features())}
        shards, found = self.plan.shards(), self.plan.found()
        return self._job(SearchStage, config, shards, found, rows=TARGET_SLICE, expands=True)

    def merge_job(self) -> Any:
        config = self.place | self._exemplars() | {"found": self._path(self.plan.found())} | self._corpus()
        return self._job(MergeStage, config, self.plan.features(), self.plan.exemplars(), expands=True)

    def check_alignment(self) -> None:
        """Raises: BadInput: the export is of other features."""
        labels = self.plan.labels()
        if labels is not None and self.session.missing([self.plan.descriptions()]):
            parts = storage.read_batches(self._path(self.plan.exemplars()), READ_AT_A_TIME)
            measured = neuronpedia.check_alignment(parts, self._path(labels))
            told = ", ".join(f"{name} {value:g}" for name, value in measured.items())
            self.session.say(f"Neuronpedia's export and {self.target}: {told}")

    def describe_jobs(self) -> list[Any]:
        """None where nothing is described anew."""
        if self.plan.takes_labels:
            return []
        labels = self.plan.labels()
        stage: Any = DescribeStage if labels is None else ImportStage
        config: dict[str, Any] = {"labels": self._path(labels)} if labels else {
            "describer": self._model(self.section.describer), "candidates": self.section.candidates
        }  # fmt: skip
        return [self._job(stage, config, self.plan.exemplars(), self.plan.descriptions(), expands=True)]

    def effects_job(self) -> Any:
        """Without descriptions there is nothing to score: no model is loaded for it."""
        return self.score_job(self.plan.descriptions(), self.plan.effects(), judged=not self.plan.is_unlabelled)

    def score_job(self, source: Artifact, made: Artifact, *, judged: bool = True) -> Any:
        from ray_explain.ground_truth.description_scores import ScoreStage

        config = self._directions() | {
            "d_model": d_model(self.session.plan, self.target),
            "simulator": self._model(self.section.simulator) if judged else None,
            "detector": self._model(self.section.detector) if judged else None,
            "gold_from": self.section.gold_from,
            "seed": self.session.plan.experiment.seed,
        }
        return self._job(ScoreStage, config, source, made)

    # -- what the steps are made from ---------------------------------------------------------------------------------

    def _job(
        self,
        stage: Any,
        config: dict[str, Any],
        source: Artifact,
        made: Artifact,
        *,
        rows: int | None = None,
        expands: bool = False,
    ) -> Any:
        from ray_explain.distributed.run_stages import StageJob

        path = self._path(source)
        return StageJob(stage=stage, config=config, source=path, artifact=made, rows_per_slice=rows, expands=expands)

    def _path(self, artifact: Artifact) -> str:
        return self.session.plan.path(artifact)

    def _corpus(self) -> dict[str, Any]:
        return {"windows": self._path(self.plan.windows()), "n_windows": self._n_windows()}

    def _n_windows(self) -> int:
        manifest = finished(self.plan.windows(), self.session.plan.root)
        assert manifest is not None
        return manifest.rows

    def _exemplars(self) -> dict[str, Any]:
        return {"exemplars": self.section.exemplars.model_dump(), "positions": self.section.corpus.tokens}

    def _directions(self) -> dict[str, Any]:
        """Config of `dictionaries.directions_of`."""
        vectors = self.plan.vectors()
        return {"vectors": self._path(vectors)} if vectors and self.plan.is_released else self._dictionary()

    def _dictionary(self) -> dict[str, Any]:
        labels, vectors = self.plan.labels(), self.plan.vectors()
        return {
            **self.place,
            **self._corpus(),
            **self.section.model_dump(include={"source", "per_layer", "d_sae", "k", "steps"}),
            "sae": self.plan.sae(),
            "check": self.section.sae.check if self.section.sae else False,
            "folder": f"{self._path(self.plan.features())}/dictionaries",
            "seed": self.session.plan.experiment.seed,
            "labels": self._path(labels) if labels else None,
            "vectors": self._path(vectors) if vectors else None,
            "split": "test" if self.plan.is_unlabelled else None,
        }

    def _model(self, section: Any) -> dict[str, Any] | None:
        if section is None:
            return None
        if isinstance(section, LocalConfig | SimulatorConfig):
            return section.model_dump() | {"path": storage.same_everywhere(section.path)}
        return section.model_dump() | {"cache": f"{self.session.plan.root}/endpoint_replies"}

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self.session.plan, self.target)

    def _windows(self) -> pa.Table | Result:
        corpus = self.section.corpus
        sizes = {"n": corpus.windows, "tokens": corpus.tokens}
        if corpus.path is not None:
            return corpora.windows(corpus.path, corpus.field, self._tokenizer(), **sizes)
        return corpora.windows_of_texts(self._world_texts(corpus.windows), self._tokenizer(), **sizes)

    def _world_texts(self, n: int) -> Iterator[str]:
        stream = documents(self.session.plan.experiment.world.world(), "corpus of features", 1)
        return (document.text for document, _ in zip(stream, range(n), strict=False))

    def _released_features(self) -> Iterator[Result]:
        plan, bare = self.session.plan, self.plan.is_unlabelled
        wanted = bare or not self.plan.takes_labels
        parts = released_features(plan, self.target, self.section, self.layers, unlabelled=wanted)
        tested = (part._replace(table=part.table.filter(pc.field("split") == "test")) for part in parts)
        return tested if bare else parts

    def _released_exemplars(self, features: Artifact) -> Iterator[Result]:
        sizes = self.section.exemplars.model_dump(include={"top", "random"})
        bare = self.plan.takes_labels and not self.plan.is_unlabelled
        read = ReleasedExemplars(self.plan.released_folder, self._tokenizer(), **sizes, bare=bare)
        return (read.of(part) for part in storage.read_batches(self._path(features), READ_AT_A_TIME))

    def _labelled(self) -> Iterator[Result]:
        descriptions, features = records.DESCRIPTIONS.empty_table(), self.plan.vectors()
        assert features is not None
        if not self.plan.is_unlabelled:
            told = storage.read_table(self._path(features), ["case_id", "descriptions"])
            _, descriptions = split_features(told)
        parts = storage.read_batches(self._path(self.plan.exemplars()), READ_AT_A_TIME)
        return (labelled(part, descriptions) for part in parts)

    def _labels(self) -> Result:
        return neuronpedia.labels(self.plan.export(), self.layers, n_layers(self.session.plan, self.target))

    def _places(self) -> pa.Table | Result:
        """Activations are of other windows than the last ones, differences of pairs of prompts."""
        tokenizer, n, seed = self._tokenizer(), self.section.per_layer, self.session.plan.experiment.seed
        assert n is not None
        if self.section.source == "activations":
            ids = corpora.read_windows(self._path(self.plan.windows()), range(min(n, self._n_windows())))
            texts = [str(tokenizer.decode(own)) for own in ids.values()]
            return text_cases(texts, tokenizer, layers=self.layers, seed=seed)
        source = self.section.pairs or self.session.plan.experiment.world.world()
        made = cases.patching_cases(
            source,
            tokenizer,
            format="counterfact",
            n={"test": n} if self.plan.is_unlabelled else {"train": n, "test": max(1, n // 3)},
            blocks=[(layer, layer) for layer in self.layers],
            seed=seed,
        )
        what, allowed = f"`ground_truth.features.pairs` = {source}: records", self.session.plan.experiment.cluster
        (made,) = checked([made], what, allowed.max_dropped)
        return Result(_some_of_each_layer(difference_cases(made.table), n), made.dropped)


def _some_of_each_layer(table: pa.Table, n: int) -> pa.Table:
    """`n` cases of each layer, drawn by their ids; those of a prompt side by side, since a slice runs it once."""
    drawn, layers = table.sort_by("case_id"), pc.unique(table["layer"]).to_pylist()
    chosen = pa.concat_tables(drawn.filter(pc.field("layer") == layer).slice(0, n) for layer in layers)
    return chosen.sort_by([(name, "ascending") for name in ("minus_prompt", "prompt", "case_id")])
