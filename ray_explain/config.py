"""One YAML file describes an experiment. Read strictly: an unknown key or a wrong value is refused, with the way out.

Imports nothing heavy, so that a mistake is told before torch or Ray are loaded.
"""

import difflib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ray_explain.errors import BadInput
from ray_explain.world.facts import World

Task = Literal["patching", "ablation", "features"]
Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out"]
Kind = Literal["replace", "add", "zero", "mean"]
Control = Literal["shuffled", "no_vector", "other_layer", "random"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # becomes part of a path
BASELINE_NAMES = r"majority|untrained|zero-shot|\d+-shot"  # those that a `Name` can be; the others hold spaces
Place = Annotated[str, AfterValidator(os.path.expanduser)]  # path, s3:// path or hub id


def _none_twice(values: list[Any]) -> list[Any]:
    """Answers and cases have these names: those of what is given twice could not be told apart."""
    names = [f"{one:g}" if isinstance(one, float) else str(one) for one in values]
    if len(set(names)) < len(names):
        raise ValueError(f"names one twice: {', '.join(names)}")
    return values


Different = AfterValidator(_none_twice)
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
_SECRET = re.compile(r"key|token|secret|password", re.IGNORECASE)  # in names of keys that people put credentials at


class Section(BaseModel):
    """A part of the file: no unknown key, no credentials in an address, nothing changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*")
    @classmethod
    def _holds_no_credentials(cls, value: Any) -> Any:
        """What is said does not repeat the address: it would be printed and logged."""
        for text in value.values() if isinstance(value, dict) else [value]:
            parts = urlsplit(text) if isinstance(text, str) and "://" in text else None
            if parts and ("@" in parts.netloc or parts.query or parts.fragment):
                raise ValueError(
                    "keep credentials out of it: an address has no user, password, `?` or `#` here, since configs are "
                    "written beside the results. Keys are read from the environment: AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, or what `key_variable` of an endpoint names; so is AWS_ENDPOINT_URL"
                )
        return value


class WorldConfig(Section):
    """The synthetic world that small targets learn and that cases are drawn from; see `World` for the meaning."""

    seed: int = 0
    persons: int = World.persons
    strangers: int = World.strangers
    cities: int = World.cities
    companies: int = World.companies
    countries: int = World.countries

    @model_validator(mode="after")
    def _possible(self) -> "WorldConfig":
        self.world()
        return self

    def world(self) -> World:
        """Raises: ValueError: too few of a kind, or more entities than there are names."""
        return World(**self.model_dump())


class PretrainConfig(Section):
    """A small target to train on the synthetic world."""

    architecture: Literal["llama", "qwen3"]
    seed: int = 0
    tokens: Positive = 690_000
    d_model: Positive = 96
    n_layers: Positive = 4
    n_heads: Positive = 4


class ModelConfig(Section):
    """A language model: a folder or hub id in `path`, or one to `pretrain`."""

    path: Place | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    pretrain: PretrainConfig | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelConfig":
        if (self.path is None) == (self.pretrain is None):
            raise ValueError("give either `path` (a folder or hub id) or `pretrain`, not both or neither")
        return self


class Splits(Section):
    """How many cases of each split."""

    train: Positive
    validation: Count = 0
    test: Positive


class PatchingBalance(Section):
    """Of each split, equally many cases of each combination of these columns that there is."""

    by: Annotated[list[Literal["first_layer", "role", "stratum", "changed"]], Field(min_length=1)]
    at_most: Positive | None = None  # cases of a combination; unless given, as many as the rarest one has


class AblationBalance(Section):
    """As `PatchingBalance`."""

    by: Annotated[list[Literal["kind", "stratum", "changed"]], Field(min_length=1)]
    at_most: Positive | None = None


class PatchingConfig(Section):
    """Activation patching: cases, and the blocks of layers that are patched."""

    source: Literal["world", "counterfact", "jsonl", "released"] = "world"
    path: Place | None = None  # of the file, for sources other than the world; released: of the folder, {target} in it
    form: Literal["completion", "choice", "chat"] = "completion"  # of CounterFact's prompts
    cases: Splits
    # [first, last] layers, or into how many blocks to cut the model
    blocks: Annotated[list[tuple[Count, Count]], Different] | Positive = 4
    site: Site = "resid_post"  # this and the next: of cases whose JSON line says nothing else
    kind: Kind = "replace"  # which ones can be asked about depends on `wording`, see questions.wordings.says
    balance: PatchingBalance | None = None


class AblationConfig(Section):
    """Input ablation: prompts with a span, mostly a hint, that is removed."""

    source: Literal["world", "mmlu", "jsonl", "released"] = "world"
    path: Place | None = None  # as in `patching`
    form: Literal["completion", "chat"] = "completion"  # of MMLU's prompts
    hint: Literal["random", "right", "sentence"] = "random"  # in MMLU's prompts
    cases: Splits
    balance: AblationBalance | None = None


class EndpointConfig(Section):
    """A chat model at an endpoint that speaks the OpenAI protocol."""

    kind: Literal["endpoint"] = "endpoint"
    model: str
    address: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key
    tries: Positive = 5
    timeout: Annotated[float, Field(gt=0)] = 60.0  # seconds
    threads: Positive = 8  # requests under way at once, from each actor
    input_price: Annotated[float, Field(ge=0)] = 0.0  # of a million tokens
    output_price: Annotated[float, Field(ge=0)] = 0.0


class LocalConfig(Section):
    """A language model that the actors load: a folder or hub id."""

    kind: Literal["local"]
    path: Place
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: Positive = 16


class NeuronpediaConfig(Section):
    """Descriptions that others made: a folder of one of Neuronpedia's bulk exports."""

    kind: Literal["neuronpedia"]
    path: Place | dict[Name, Place]  # of all targets, or of each


class WorldDescriber(Section):
    """The synthetic world's own knowledge of what its words stand for."""

    kind: Literal["world"] = "world"


class SimulatorConfig(LocalConfig):
    """A model trained to foretell activations in the format of the paper's simulator."""

    kind: Literal["simulator"]  # type: ignore[assignment]


class CorpusConfig(Section):
    """The text that features are looked at on."""

    path: Place | None = None  # file or folder of Parquet, JSON lines or text; the synthetic world's texts if left out
    field: str = "text"
    windows: Annotated[int, Field(ge=2)] = 16_384
    tokens: Annotated[int, Field(ge=2)] = 64  # of a window


class SAEConfig(Section):
    """Where a target's SAEs lie: a folder, s3:// path or hub id; one SAE, or one for each layer below it."""

    path: Place | dict[Name, Place]  # of all targets, or of each
    revision: str | None = None  # of a hub id
    check: bool = True  # refuse SAEs that do not fit the target's activations


class ExemplarsConfig(Section):
    """How many windows of each kind are kept for a feature; every second top window is for scoring only."""

    top: Annotated[int, Field(ge=2)] = 20
    random: Count = 10
    near: Count = 10


class UnlabelledConfig(Section):
    """Vectors that nothing describes, to test explainers on."""

    path: Place | None = None  # folder of a released data set, {target} in it; taken from the target if left out
    per_layer: Positive | None = None  # of each layer, drawn at random; all of a released data set's if left out


class FeaturesConfig(Section):
    """Feature descriptions: directions of the target, what describes them, and what scores the descriptions.

    By default the directions are those of a small top-k SAE trained on each layer, and described by what the world
    knows.
    """

    source: Literal["sae", "neurons", "activations", "differences", "released"] = "sae"
    path: Place | None = None  # released: of the folder, {target} in it
    vectors: Literal["activations", "differences"] | None = None  # released: what its vectors are, if it has some
    layers: Annotated[list[Count], Different] | Literal["all"] = "all"
    sae: SAEConfig | None = None  # trained on the corpus if left out
    per_layer: Positive | None = None  # features of each layer, drawn at random; all of an SAE's if left out
    group: Literal["direction", "feature"] = "direction"  # what splits keep together; direction compares all vectors
    corpus: CorpusConfig = CorpusConfig()
    pairs: Place | None = None  # for differences: a file of CounterFact pairs; the world's if left out
    exemplars: ExemplarsConfig = ExemplarsConfig()
    describer: Annotated[
        WorldDescriber | EndpointConfig | LocalConfig | NeuronpediaConfig, Field(discriminator="kind")
    ] = WorldDescriber()
    candidates: Positive = 1  # descriptions asked for, of describers that write them
    simulator: Annotated[SimulatorConfig | EndpointConfig, Field(discriminator="kind")] | None = None
    detector: Annotated[LocalConfig | EndpointConfig, Field(discriminator="kind")] | None = None
    unlabelled: dict[Literal["activations", "differences"], UnlabelledConfig] = {}  # asked about in the test split too
    gold_from: Annotated[float, Field(ge=-1, le=1)] = -1.0  # descriptions that score less are kept, but not as gold
    d_sae: Positive = 384  # this and the next two: of SAEs that are trained
    k: Positive = 8
    steps: Positive = 300
    documents: Positive = 3000  # this and the next: of the describer `world`
    min_correlation: Fraction = 0.35

    @model_validator(mode="after")
    def _fits_together(self) -> "FeaturesConfig":
        if (self.source == "released") != (self.path is not None):
            raise ValueError(
                f"source {self.source!r} and path {self.path!r}: a released data set, and it alone, has one"
            )
        if self.vectors and self.source != "released":
            raise ValueError(f"`vectors` says what a released data set has: leave it out of source {self.source!r}")
        if self.source == "released":
            if self.sae or self.describer.kind == "neuronpedia":
                raise ValueError(
                    "a released data set brings directions and labels: leave `sae` out, and `describer` too, or give "
                    "one of kind endpoint or local that describes its exemplars anew"
                )
        elif self.describer.kind == "world" and (self.source != "sae" or self.sae or self.simulator or self.detector):
            raise ValueError(
                "describer 'world' describes SAEs that are trained on the world's texts, and scores them itself: leave "
                "`source`, `sae`, `simulator` and `detector` out, or give another `describer`"
            )
        if self.sae and self.source != "sae":
            raise ValueError(f"`sae` is for source 'sae', not for {self.source!r}: leave it out")
        if self.source in ("activations", "differences") and not self.per_layer:
            raise ValueError(f"source {self.source!r} needs `per_layer`: how many vectors to take of each layer")
        if self.describer.kind == "neuronpedia" and not (self.source == "sae" and self.sae):
            raise ValueError("describer 'neuronpedia' describes published SAEs: give `sae`, and source 'sae'")
        return self

    @model_validator(mode="after")
    def _unlabelled_can_be_scored(self) -> "FeaturesConfig":
        if self.unlabelled and not (self.simulator or self.detector):
            raise ValueError(
                "`unlabelled` vectors have no right description: give a `simulator` or `detector` that scores answers"
            )
        for kind, own in self.unlabelled.items():
            if kind in (self.source, self.vectors):
                raise ValueError(f"`unlabelled` names {kind!r}, which the features are themselves: leave it out")
            if own.path is None and own.per_layer is None:
                raise ValueError(f"`unlabelled.{kind}` needs `per_layer`: how many vectors to take of each layer")
        return self


class GroundTruthConfig(Section):
    """What is measured on the targets."""

    patching: PatchingConfig | None = None
    ablation: AblationConfig | None = None
    features: FeaturesConfig | None = None
    wording: Literal["paper", "paper_chat", "paper_qwen", "brief"] = "paper"


class LoraConfig(Section):
    """Low-rank adapters instead of full fine-tuning."""

    rank: Positive = 128
    alpha: Positive = 16
    dropout: Fraction = 0.1


class InjectionConfig(Section):
    """How a target's vector enters the explainer."""

    mode: Literal["replace", "add"] = "replace"
    layer: Count | None = None  # for `add`: after which block
    scale: Literal["raw", "unit", "mean_embedding"] = "raw"
    projection: Literal["identity", "linear", "ridge"] = "identity"

    @model_validator(mode="after")
    def _fits_together(self) -> "InjectionConfig":
        if (self.mode == "add") != (self.layer is not None):
            raise ValueError(f"mode {self.mode!r} with layer {self.layer}: `add` needs one, `replace` has none")
        if self.mode == "add" and self.scale != "raw":
            raise ValueError(f"mode 'add' with scale {self.scale!r}: the stream gives the norm, leave `scale` out")
        return self


# Fields of `train` that change how the work is done, not what comes out. Steps and their examples are the same with
# all of them; sums in another order differ in their last digits, and adapters' dropout draws other masks where a step
# is cut otherwise.
HOW_NOT_WHAT = {
    *("workers", "micro_batch_size", "zero_stage", "offload", "gradient_checkpointing"),
    *("checkpoint_every", "keep_checkpoints", "max_failures", "trackers"),
}
VALIDATION = {"validate_every", "validation_questions"}
OF_RUNS = {"mixtures", "text_only"}  # say which explainers there are, not how one of them is trained


class TrainConfig(Section):
    """How an explainer is trained."""

    mixtures: list[list[Task]] = [["patching"], ["ablation"], ["features"]]  # one explainer each; a task is in one
    weights: dict[Task, Annotated[float, Field(gt=0)]] = {}  # how often a task's questions are seen; 1 unless given
    epochs: Positive = 1
    batch_size: Positive = 32  # questions per optimizer step, over all workers
    micro_batch_size: Positive | None = None  # questions per worker and forward pass; all of its share unless given
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-5
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup: Fraction = 0.0  # share of the steps
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    text_only: bool = False  # train each target on its own questions without their vectors as well, as a control
    replay: Annotated[float, Field(ge=0)] = 0.0  # texts of the world per question, against forgetting
    max_tokens: Positive = 500  # longer questions are dropped and counted
    precision: Literal["float32", "bfloat16"] = "float32"
    lora: LoraConfig | None = None
    injection: InjectionConfig = InjectionConfig()
    gradient_checkpointing: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: bool = False
    workers: Positive = 1
    checkpoint_every: Positive = 500  # steps
    keep_checkpoints: Positive = 2  # the last ones, while it trains
    validate_every: Count = 0  # steps; 0: never
    validation_questions: Positive = 64  # of the validation split, asked each time
    keep: Literal["last", "best"] = "last"  # the explainer after the last step, or the best one at validation
    max_failures: Count = 3
    trackers: list[Literal["mlflow", "wandb"]] = []

    @model_validator(mode="after")
    def _best_is_known(self) -> "TrainConfig":
        if self.keep == "best" and not self.validate_every:
            raise ValueError("`keep: best` needs `validate_every`: nothing else says which explainer is the best")
        return self

    @model_validator(mode="after")
    def _can_be_offloaded(self) -> "TrainConfig":
        if self.offload and not self.zero_stage:
            raise ValueError("`offload` moves what ZeRO keeps: give `zero_stage` 1, 2 or 3, or leave it out")
        return self

    def identity(self, *, validated: bool = False) -> dict[str, Any]:
        """What tells one explainer from another. How often it is validated does only where that chooses: which of a
        run's explainers is kept or, if `validated`, which of a sweep's."""
        unseen = set() if validated or self.keep == "best" else VALIDATION
        return self.model_dump(mode="json", exclude=HOW_NOT_WHAT | OF_RUNS | unseen)


class Pairing(Section):
    """An explainer and the target it learns to explain; `train` overrides single fields for this pairing."""

    explainer: Name
    target: Name
    train: dict[str, Any] = {}


class EvaluateConfig(Section):
    """How explainers are asked and scored."""

    split: Literal["validation", "test"] = "test"
    controls: Annotated[list[Control], Different] = ["shuffled", "no_vector", "other_layer", "random"]
    untrained: bool = True  # ask the untrained targets as well
    # prompt them with the form of the answer and so many answered examples
    shots: Annotated[list[Count], Different] = [0, 4]
    # scales at which they are asked SelfIE's question
    selfie: Annotated[list[Annotated[float, Field(gt=0)]], Different] = [1, 5, 10, 25, 50]
    batch_size: Positive = 64
    max_new_tokens: Positive = 50
    judge: EndpointConfig | None = None  # marks descriptions, beside exact match
    embedding: Place | None = None  # folder or hub id of a sentence-transformers model that compares descriptions
    resamples: Annotated[int, Field(ge=100)] = 2000


class AddedNodes(Section):
    """Nodes beside the head that an autoscaler may add, all alike."""

    nodes: Positive  # at a time, those that run already among them
    cpus: Positive  # of each
    gpus: Count = 0


class ClusterConfig(Section):
    """How much of the cluster is used; changes nothing in the results, but which of the longest prompts are dropped."""

    actors: Positive = 2
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    rows_per_slice: Positive = 256
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    concurrent_trainings: Positive = 1
    max_dropped: Fraction = 0.05  # a stage, or a file of cases, of which more is dropped fails the job
    may_add: list[AddedNodes] = []  # where the autoscaler is not one that `ray up` has started on the driver's machine
    # Bytes that a target's rows may take at once beside its weights, on each actor; a row that alone needs more is
    # dropped. Unset: half of what is free on the actor's device, or of its share of it. That is less with more actors:
    # who needs the same rows everywhere sets it. Rows of a finished table stay dropped when it is raised.
    memory_budget: Positive | None = None

    @field_validator("gpus_per_worker")
    @classmethod
    def _is_one_at_most(cls, gpus: float) -> float:
        """With more, DeepSpeed would take another of a machine's GPUs than Ray gave the worker, and NCCL would hang."""
        if gpus > 1:
            raise ValueError(
                f"{gpus:g}: a worker computes on one GPU; set it to 1, and `train.workers` to how many GPUs train "
                "an explainer together"
            )
        return gpus

    @field_validator("gpus_per_actor")
    @classmethod
    def _is_a_share_or_whole(cls, gpus: float) -> float:
        if gpus > 1 and gpus % 1:
            raise ValueError(f"{gpus:g} is refused by Ray, which gives out a share of one GPU or whole GPUs")
        return gpus


class AshaConfig(Section):
    """Early stopping of a sweep's trials that fall behind others of the same explainer, target, tasks, seed and
    fraction of the data: only settings of training compete, never the pairings that are to be compared.
    """

    grace: Share = 0.2  # of a trial's steps, before which it is not stopped
    reduction: Annotated[float, Field(gt=1)] = 2  # of those that come so far, one in so many goes on


class SweepConfig(Section):
    """Training settings that every explainer of the experiment is tried with."""

    parameters: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}  # field of `train` -> values
    metric: Literal["loss", "validation_exact", "validation_uplift"] = "loss"  # by which trials are judged
    asha: AshaConfig | None = None

    @property
    def combinations(self) -> list[dict[str, Any]]:
        """Every choice of one value for each field; one empty choice where there is no field."""
        return [dict(zip(self.parameters, values)) for values in itertools.product(*self.parameters.values())]


class Experiment(Section):
    """The whole file."""

    name: Name
    storage: str
    seed: int = 0
    world: WorldConfig = WorldConfig()
    models: Annotated[dict[Name, ModelConfig], Field(min_length=1)]
    targets: Annotated[list[Name], Field(min_length=1)]
    explainers: Annotated[list[Name], Field(min_length=1)]
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    fractions: Annotated[list[Share], Field(min_length=1)] = [1.0]  # of the training questions, one explainer for each
    ground_truth: GroundTruthConfig
    train: TrainConfig = TrainConfig()
    pairings: list[Pairing] = []  # overrides for single pairings; every explainer meets every target
    sweep: SweepConfig = SweepConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("storage")
    @classmethod
    def _storage_is_a_place(cls, storage: str) -> str:
        scheme, remote, rest = storage.partition("://")
        if storage.startswith("s3:") and not remote:
            raise ValueError("not of the form s3://bucket/folder")
        if not remote or scheme == "file":
            return storage
        if scheme != "s3":
            raise ValueError("give a path, or s3://bucket/folder")
        if not all(rest.rstrip("/").split("/")) or ".." in rest.split("/"):
            raise ValueError("not of the form s3://bucket/folder")
        return storage.rstrip("/")

    @model_validator(mode="after")
    def _names_exist(self) -> "Experiment":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` names one twice: {self.seeds}")
        if len(set(self.fractions)) < len(self.fractions):
            raise ValueError(f"`fractions` names one twice: {self.fractions}")
        for key, names in [("targets", self.targets), ("explainers", self.explainers)]:
            if len(set(names)) < len(names):
                raise ValueError(f"`{key}` names a model twice: {names}")
            for name in names:
                if name not in self.models:
                    raise ValueError(
                        f"`{key}` names {name!r}, which is not among `models`{_nearest(name, self.models)}"
                    )
        for name in self.explainers:
            if re.fullmatch(BASELINE_NAMES, name):
                raise ValueError(
                    f"`explainers` names {name!r}, as a baseline is called, and their scores would be taken for each "
                    "other's: give this model another name"
                )
        named = [(pairing.explainer, pairing.target) for pairing in self.pairings]
        for pairing in self.pairings:
            if named.count((pairing.explainer, pairing.target)) > 1:
                raise ValueError(
                    f"`pairings` has {pairing.explainer!r} of {pairing.target!r} twice: put all overrides in one"
                )
            if pairing.target not in self.targets or pairing.explainer not in self.explainers:
                raise ValueError(
                    f"`pairings` has {pairing.explainer!r} of {pairing.target!r}: not among the explainers and targets"
                )
            for key in OF_RUNS & set(pairing.train):
                raise ValueError(f"`pairings`: {key} is no setting of one explainer: give it in `train`")
            try:
                self.train_config(pairing.explainer, pairing.target)
            except ValidationError as error:
                told = "; ".join(_told(fault, TrainConfig) for fault in error.errors())
                raise ValueError(f"`pairings`, {pairing.explainer!r} of {pairing.target!r}: {told}") from error
        return self

    @model_validator(mode="after")
    def _tasks_have_ground_truth(self) -> "Experiment":
        if not self.tasks:
            raise ValueError("`ground_truth` has none of patching, ablation, features: give at least one")
        for mixture in self.train.mixtures:
            if not mixture:
                raise ValueError("`train.mixtures` holds an empty mixture: name at least one task in each")
        if not {task for mixture in self.train.mixtures for task in mixture} & set(self.tasks):
            raise ValueError(
                f"`train.mixtures` names no task that has `ground_truth` (which are {', '.join(self.tasks)}): nothing "
                "would be trained"
            )
        for task in self.tasks:
            named = sum(mixture.count(task) for mixture in self.train.mixtures)
            if named > 1:  # two explainers of one name would answer the same questions
                raise ValueError(
                    f"`train.mixtures` names {task!r} {named} times: a task belongs to one mixture of an experiment; "
                    "compare mixtures in experiments of their own; below the same `storage` they share the ground truth"
                )
        return self

    @model_validator(mode="after")
    def _sweep_is_possible(self) -> "Experiment":
        for key in OF_RUNS & set(self.sweep.parameters):
            raise ValueError(f"`sweep.parameters`: {key} is no setting of one explainer: give it in `train`")
        if self.sweep.asha is not None and len(self.sweep.combinations) < 2:
            raise ValueError("`sweep.asha` stops settings that fall behind others: give several in `sweep.parameters`")
        if self.sweep.metric != "loss" and not self.train.validate_every:
            raise ValueError(
                f"`sweep.metric` = {self.sweep.metric!r} is measured where `train.validate_every` is given"
            )
        for explainer, target in itertools.product(self.explainers, self.targets):
            self._check_tried(explainer, self.train_config(explainer, target).model_dump())
        return self

    def _check_tried(self, explainer: str, train: Mapping[str, Any]) -> None:
        """Raises: ValueError: a choice of the sweep is none for these settings, or makes the explainer of another."""
        seen: dict[str, Mapping[str, Any]] = {}
        for chosen in self.sweep.combinations:
            try:
                tried = TrainConfig.model_validate({**train, **chosen})
            except ValidationError as error:
                told = "; ".join(_told(fault, TrainConfig) for fault in error.errors())
                raise ValueError(f"`sweep.parameters`: {told}") from error
            self._check_validation(tried)
            if tried.replay and self.models[explainer].pretrain is None:
                raise ValueError(
                    f"`train.replay` = {tried.replay:g}: {explainer!r} never read the texts of the synthetic world, "
                    "which are replayed; set it to 0, for this model in `pairings`"
                )
            identity = tried.identity(validated=self.sweep.metric != "loss")
            twin = seen.setdefault(json.dumps(identity, sort_keys=True), chosen)
            if twin is not chosen:
                raise ValueError(f"`sweep.parameters`: {_the_same(twin, chosen)}")

    def _check_validation(self, train: TrainConfig) -> None:
        """Raises: ValueError: an explainer is to be validated on questions that there will be none of."""
        for mixture in self.train.mixtures if train.validate_every else ():
            own = [task for task in mixture if task in self.tasks]
            if not own or "features" in own:  # these are dealt to all splits, or come with theirs
                continue
            if not any(getattr(self.ground_truth, task).cases.validation for task in own):
                raise ValueError(
                    f"`train.validate_every` = {train.validate_every}: there will be no validation questions about "
                    f"{' and '.join(own)}; give `ground_truth.{own[0]}.cases.validation`, or 0"
                )

    @model_validator(mode="after")
    def _workers_have_a_gpu_each(self) -> "Experiment":
        """NCCL refuses two workers of one training on one GPU ("Duplicate GPU detected"), minutes after the start."""
        if not 0 < self.cluster.gpus_per_worker < 1:
            return self
        together = [self.train_config(*pair).workers for pair in itertools.product(self.explainers, self.targets)]
        if max([*together, *self.sweep.parameters.get("workers", [])]) > 1:
            raise ValueError(
                f"`cluster.gpus_per_worker` = {self.cluster.gpus_per_worker:g}: workers that train an explainer "
                "together need a whole GPU each; set it to 1 or 0, or `train.workers` to 1, of which several trainings "
                "can share a GPU (`cluster.concurrent_trainings`, sweeps)"
            )
        return self

    @model_validator(mode="after")
    def _weights_are_of_tasks_that_are_trained(self) -> "Experiment":
        trained = [task for mixture in self.train.mixtures for task in mixture if task in self.tasks]
        of_pairings = [self.train_config(one.explainer, one.target).weights for one in self.pairings]
        for weights in [self.train.weights, *of_pairings, *self.sweep.parameters.get("weights", [])]:
            for task in weights:
                if task not in trained:
                    raise ValueError(
                        f"`train.weights` names {task!r}, which no explainer is trained on: leave it out, or give it "
                        "`ground_truth` and a place in `train.mixtures`"
                    )
        return self

    @model_validator(mode="after")
    def _paths_are_given(self) -> "Experiment":
        for task in ("patching", "ablation"):
            section = getattr(self.ground_truth, task)
            if section is not None and (section.source == "world") != (section.path is None):
                raise ValueError(
                    f"`ground_truth.{task}`: source {section.source!r} "
                    + ("reads no file, leave `path` out" if section.path else "needs a `path`")
                )
        return self

    @model_validator(mode="after")
    def _layers_exist(self) -> "Experiment":
        for name in {*self.targets, *self.explainers}:
            pretrain = self.models[name].pretrain
            if pretrain is not None:
                self.check_layers(name, pretrain.n_layers)
        return self

    @model_validator(mode="after")
    def _controls_are_possible(self) -> "Experiment":
        patching, features = self.ground_truth.patching, self.ground_truth.features
        of_one_layer = [
            name
            for name, layers in [
                ("patching.blocks", patching and patching.blocks),
                ("features.layers", features and features.layers),
            ]
            if layers == 1 or (isinstance(layers, list) and len(layers) == 1)
        ]
        if "other_layer" in self.evaluate.controls and of_one_layer:
            raise ValueError(
                f"`evaluate.controls` asks for vectors of another layer, but `ground_truth.{of_one_layer[0]}` has only "
                "one: leave `other_layer` out, or add a layer"
            )
        return self

    def check_layers(self, model: str, n_layers: int) -> None:
        """Raises: ValueError: of a model's `n_layers`, `ground_truth` asks for a block or a layer that it does not have
        as a target, or `train.injection` for one that it does not have as an explainer."""
        if model in self.targets:
            self._check_target(model, n_layers)
        explained = self.targets if model in self.explainers else []
        trained = [self.train_config(model, target).model_dump() for target in explained]
        tried = itertools.product(trained, self.sweep.combinations)
        injections = [TrainConfig.model_validate({**train, **chosen}).injection for train, chosen in tried]
        if model in self.targets and (self.evaluate.untrained or self.evaluate.shots):
            injections.append(self.train.injection)
        for layer in (injection.layer for injection in injections):
            if layer is not None and layer >= n_layers:
                raise ValueError(
                    f"`train.injection.layer`: {model!r} has no layer {layer}; it has {n_layers}, numbered from 0"
                )

    def _check_target(self, target: str, n_layers: int) -> None:
        patching, features = self.ground_truth.patching, self.ground_truth.features
        blocks = patching.blocks if patching and isinstance(patching.blocks, list) else []
        for first, last in blocks:
            if not first <= last < n_layers:
                raise ValueError(
                    f"`ground_truth.patching.blocks`: [{first}, {last}] is no block of {target!r}, "
                    f"which has {n_layers} layers, numbered from 0"
                )
        for layer in features.layers if features and isinstance(features.layers, list) else []:
            if layer >= n_layers:
                raise ValueError(
                    f"`ground_truth.features.layers`: {target!r} has no layer {layer}; "
                    f"it has {n_layers}, numbered from 0"
                )

    @property
    def tasks(self) -> list[Task]:
        """The tasks that have ground truth, in the paper's order."""
        return [task for task in ("features", "patching", "ablation") if getattr(self.ground_truth, task) is not None]

    def trained_with(self, settings: Mapping[tuple[str, str], Mapping[str, Any]]) -> "Experiment":
        """The experiment with these fields of `train` for (explainer, target), over all that it says itself."""
        known = {(pairing.explainer, pairing.target): pairing.train for pairing in self.pairings}
        for pair, fields in settings.items():
            known[pair] = {**known.get(pair, {}), **fields}
        pairings = [Pairing(explainer=e, target=t, train=fields) for (e, t), fields in known.items()]
        return self.model_copy(update={"pairings": pairings})

    def train_config(self, explainer: str, target: str) -> TrainConfig:
        """`train` with the overrides of this pairing."""
        values = self.train.model_dump()
        for pairing in self.pairings:
            if (pairing.explainer, pairing.target) == (explainer, target):
                values |= pairing.train
        return TrainConfig.model_validate(values)


def _the_same(chosen: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Why two choices of a sweep would make the same explainer, and what to do."""
    apart = sorted(field for field in chosen if chosen[field] != other[field])
    if not apart:
        return f"{dict(chosen)} is given twice: leave one out"
    values = " and ".join(str({field: of[field] for field in apart}) for of in (chosen, other))
    if set(apart) <= HOW_NOT_WHAT:
        return (
            f"{' and '.join(apart)} says how the work is done, not which explainer comes out of it: {values} would be "
            "one trial; give one value, in `train`"
        )
    if set(apart) <= HOW_NOT_WHAT | VALIDATION:
        return (
            f"{' and '.join(apart)} says how often an explainer is looked at, not which one comes out: {values} would "
            "be one trial; give one value, in `train`, or let validation choose (`sweep.metric`, `train.keep: best`)"
        )
    return f"{values} make the same explainer: leave one out"


def read_experiment(path: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a YAML file, with dotted overrides such as `train.learning_rate=1e-4`.

    A file may name another one in `base`, by its path from there: its keys add to those of the base, and replace them.

    Raises:
        BadInput: the file is missing or no YAML mapping, a key is unknown, or a value is wrong. One line a fault.
    """
    values = _read_file(path)
    for override in overrides:
        _override(values, override)
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        raise BadInput("\n".join(_told(fault, Experiment) for fault in error.errors())) from error


def _read_file(path: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys of a file and of its bases; `above` are the files that led here."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"cannot read the config {path}: {getattr(error, 'strerror', None) or 'it is not text'}"
        ) from error
    values = _yaml(text, f"the config {path}")
    if not isinstance(values, dict):
        raise BadInput(f"the config {path} is not a YAML mapping (`name: ...`)")
    base = values.pop("base", None)
    if base is None:
        return values
    place = str((Path(path).parent / str(base)).resolve())
    if place in above:
        raise BadInput(f"the config {path} has a `base` that leads back to it: {base}")
    return _merged(_read_file(place, (*above, str(Path(path).resolve()))), values)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(under[key], over[key]) for key in over if _are_mappings(under.get(key), over[key])}
    return under | over | both


def _are_mappings(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise BadInput(f"{what} is not YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a text, since it has no dot; people mean a number. YAML forbids a key that comes twice,
    but PyYAML takes the last one and forgets what stood below the first."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node, seen = super().compose_mapping_node(anchor), set[str]()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise BadInput(f"override {override!r} is not of the form key.path=value, such as train.learning_rate=1e-4")
    *parents, last = key.split(".")
    here: Any = values
    for part in parents:
        here = here.setdefault(part, {}) if isinstance(here, dict) else None
        if here is None:
            raise BadInput(f"override {override!r}: {part!r} holds no keys")
    if not isinstance(here, dict):
        raise BadInput(f"override {override!r}: `{'.'.join(parents)}` is a value, it holds no keys")
    here[last] = _yaml(text, f"the value of override {override!r}")


def _told(fault: Any, section: type[BaseModel]) -> str:
    """One line: the key, the value, the rule, and for an unknown key the nearest valid one."""
    where, valid = _place(section, fault["loc"])
    if fault["type"] == "extra_forbidden":
        value = "" if _SECRET.search(where) else _shown(fault["input"])
        return f"`{where}`{value}: no such key{_nearest(str(fault['loc'][-1]), valid)}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"`{where}` is missing"
    if fault["type"] == "union_tag_not_found":
        return f"`{where}.kind` is missing"
    if fault["type"] == "model_type":
        return f"`{where}`{_shown(fault['input'])}: it is a section, which has keys; give some, or leave it out"
    if not where or fault["type"] == "value_error":
        return f"`{where}`: {message}" if where else message
    return f"`{where}`{_shown(fault['input'])}: {message[0].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    """A value that is refused, unless credentials may stand in it."""
    return "" if isinstance(value, dict) or "://" in str(value) else f" = {value!r}"


def _place(section: type[BaseModel], loc: Sequence[int | str]) -> tuple[str, list[str]]:
    """The key that `loc` leads to, as it is written in the file, and the valid keys beside it.

    After a key that takes values of several kinds, pydantic puts a name of the kind, which is in no file.
    """
    parts, inside, is_kind = list[str](), [section], False
    for part in loc:
        if part == "[key]":  # pydantic's way to say that the key itself is wrong
            continue
        if is_kind:
            inside = [one for one in inside if part in get_args(one.model_fields["kind"].annotation)]
            is_kind = False
            continue
        parts.append(str(part))
        field = inside[0].model_fields.get(str(part)) if inside else None
        if field is not None:  # else a key of a mapping or an index of a list: already looked into
            inside = [found for found in _types_in(field.annotation) if issubclass(found, BaseModel)]
            is_kind = _has_kinds(field.annotation)
    return ".".join(parts), [key for one in inside[:1] for key in one.model_fields]


def _has_kinds(annotation: Any) -> bool:
    """Whether it is a union of several types, None aside."""
    if get_origin(annotation) not in (Annotated, Union, UnionType):
        return False
    inner = [one for one in get_args(annotation) if isinstance(one, type) or get_origin(one)]
    return len(inner) - inner.count(NoneType) > 1 or any(map(_has_kinds, inner))


def _types_in(annotation: Any) -> list[type]:
    inner = [found for argument in get_args(annotation) for found in _types_in(argument)]
    return inner or ([annotation] if isinstance(annotation, type) else [])


def _nearest(word: str, valid: Any) -> str:
    near = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    if near:
        return f"; the nearest is `{near[0]}`"
    return f"; there are {', '.join(f'`{key}`' for key in valid)}" if valid else ""
