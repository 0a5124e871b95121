"""An experiment is read strictly, and every refusal says the way out."""

import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from ray_explain.config import Experiment, Kind, Site, _Loader, _types_in, read_experiment
from ray_explain.distributed.feature_plan import describes
from ray_explain.errors import BadInput
from ray_explain.evaluation.baselines import BASELINES
from ray_explain.evaluation.simulations import GOLD
from ray_explain.ground_truth.splits import TEST_SHARE, VALIDATION_SHARE
from ray_explain.interventions import hooks, layout
from ray_explain.questions.prompting import BEST_SELFIE, selfie_label, shots_label
from ray_explain.records import TEXT_ONLY
from ray_explain.world.facts import World

SMALL = {
    "name": "small",
    "storage": "runs/small",
    "models": {
        "llama": {"pretrain": {"architecture": "llama", "seed": 1}},
        "qwen3": {"pretrain": {"architecture": "qwen3", "seed": 2}},
    },
    "targets": ["llama", "qwen3"],
    "explainers": ["llama", "qwen3"],
    "ground_truth": {"patching": {"cases": {"train": 10, "validation": 3, "test": 5}}, "features": {}},
    "pairings": [{"explainer": "llama", "target": "qwen3", "train": {"workers": 2}}],
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return str(path)


def test_overrides_reach_single_values(config: str) -> None:
    experiment = read_experiment(config, ["train.learning_rate=1e-4", "models.llama.pretrain.tokens=1000"])
    assert experiment.train.learning_rate == 1e-4
    assert experiment.models["llama"].pretrain.tokens == 1000
    assert experiment.models["qwen3"].pretrain.tokens == 690_000


def test_a_pairing_overrides_training_for_itself_alone(config: str) -> None:
    experiment = read_experiment(config)
    assert experiment.train_config("llama", "qwen3").workers == 2
    assert experiment.train_config("qwen3", "llama").workers == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rat=1", ["train.learning_rat", "no such key", "`learning_rate`"]),
        ("trane.lr=1", ["trane", "`train`"]),
        ("models.llama.pretrain.seeed=3", ["models.llama.pretrain.seeed", "`seed`"]),
        ("train.lora.rnk=3", ["train.lora.rnk", "`rank`"]),
        ("train.learning_rate=-1", ["train.learning_rate", "-1", "greater than 0"]),
        ("cluster.gpus_per_actor=1.5", ["gpus_per_actor", "1.5", "whole GPUs"]),
        ("cluster.gpus_per_worker=8", ["gpus_per_worker", "8: a worker computes on one GPU", "`train.workers`"]),
        ("cluster.gpus_per_worker=0.5", ["gpus_per_worker` = 0.5", "a whole GPU each", "`train.workers` to 1"]),
        ("train.learning_rate=fast", ["train.learning_rate", "'fast'", "number"]),
        ("targets=[llamma]", ["targets", "llamma", "`llama`"]),
        ("targets=[llama, llama]", ["targets", "twice"]),
        ("fractions=[0.5, 0.5]", ["fractions", "twice"]),
        ("evaluate.controls=[shuffled, shuffled]", ["`evaluate.controls`", "names one twice: shuffled, shuffled"]),
        ("evaluate.shots=[4, 4]", ["`evaluate.shots`", "names one twice"]),
        ("evaluate.selfie=[5, 1, 5.0000001]", ["`evaluate.selfie`", "names one twice: 5, 1, 5"]),
        ("ground_truth.features.layers=[1, 2, 1]", ["`ground_truth.features.layers`", "names one twice: 1, 2, 1"]),
        ("ground_truth.patching.blocks=[[0, 1], [0, 1]]", ["`ground_truth.patching.blocks`", "names one twice"]),
        ("fractions=[0]", ["fractions", "greater than 0"]),
        ("ground_truth.patching.blocks=[[0, 7]]", ["[0, 7]", "4 layers", "numbered from 0"]),
        ("ground_truth.features.layers=[4]", ["no layer 4", "numbered from 0"]),
        ("ground_truth.patching.source=counterfact", ["counterfact", "`path`"]),
        ("ground_truth.patching.cases.test=0", ["cases.test", "0", "greater than or equal to 1"]),
        ("train.mixtures=[[patchin]]", ["'patchin'", "'patching'"]),
        ("train.mixtures=[[]]", ["empty mixture"]),
        ("train.mixtures=[[ablation]]", ["train.mixtures", "features, patching", "nothing would be trained"]),
        ("ground_truth.patching.blocks=0", ["`ground_truth.patching.blocks` = 0"]),
        ("ground_truth.features.layers=[1, x]", ["`ground_truth.features.layers.1` = 'x'"]),
        (
            "ground_truth.features.describer={kind: local, pth: x}",
            ["`ground_truth.features.describer.pth`", "the nearest is `path`"],
        ),
        (
            "ground_truth.features.simulator={kind: endpoint, modle: x}",
            ["`ground_truth.features.simulator.modle`", "the nearest is `model`"],
        ),
        ("train.mixtures=[[patching],[patching, ablation]]", ["train.mixtures", "'patching' 2 times", "of their own"]),
        ("train.mixtures=[[patching],[features, features]]", ["train.mixtures", "'features' 2 times"]),
        ("train.weights={ablation: 2}", ["train.weights", "'ablation'", "no explainer", "`train.mixtures`"]),
        ("pairings=[{explainer: llama, target: qwen3, train: {weights: {ablation: 2}}}]", ["train.weights"]),
        ("sweep.parameters={weights: [{patching: 2}, {ablation: 2}]}", ["train.weights", "'ablation'"]),
        (
            "sweep.parameters={workers: [1, 2]}",
            ["sweep.parameters", "workers says how the work is done", "'workers': 2", "`train`"],
        ),
        (
            "sweep.parameters={learning_rate: [1, .5], zero_stage: [2, 3]}",
            ["zero_stage says how the work is done", "one trial"],
        ),
        ("sweep.parameters={validate_every: [5, 10]}", ["validate_every", "how often", "`sweep.metric`"]),
        ("sweep.parameters={learning_rate: [.5, .5]}", ["{'learning_rate': 0.5}", "given twice"]),
        ("sweep.parameters={injection: [{}, {scale: raw}]}", ["'injection': {'scale': 'raw'}", "the same explainer"]),
        ("ground_truth={}", ["ground_truth", "at least one"]),
        ("ground_truth.patching.blocks=1", ["other_layer", "ground_truth.patching.blocks"]),
        ("models.llama.path=/x", ["models.llama", "not both"]),
        ("pairings=[{explainer: llama, target: qwen3, train: {worker: 2}}]", ["'llama' of 'qwen3'", "`workers`"]),
        ("pairings=[{explainer: gpt, target: qwen3}]", ["'gpt'"]),
        ("pairings=[{explainer: llama, target: qwen3, train: {text_only: true}}]", ["text_only is no setting of one"]),
        (
            "pairings=[{explainer: llama, target: qwen3}, {explainer: llama, target: qwen3, train: {epochs: 2}}]",
            ["`pairings` has 'llama' of 'qwen3' twice", "all overrides in one"],
        ),
        ("train.injection.mode=add", ["train.injection`: mode 'add' with layer None", "`add` needs one"]),
        ("train.injection.layer=1", ["train.injection`: mode 'replace' with layer 1", "`replace` has none"]),
        ("train.injection={mode: add, layer: 1, scale: unit}", ["mode 'add' with scale 'unit'", "leave `scale` out"]),
        ("train.injection={mode: add, layer: 4}", ["train.injection.layer", "has no layer 4", "numbered from 0"]),
        ("sweep.parameters={injection: [{}, {mode: add, layer: '4'}]}", ["train.injection.layer", "no layer 4"]),
        ("train={offload: true, zero_stage: 0}", ["`offload`", "`zero_stage` 1, 2 or 3"]),
        ("train=", ["`train` = None: it is a section"]),
        ("train.lora=true", ["`train.lora` = True: it is a section"]),
        ("train.weights={patchin: 2}", ["`train.weights.patchin` = 'patchin'", "'patching'"]),
        ("ground_truth.features.simulator={path: x}", ["`ground_truth.features.simulator.kind` is missing"]),
        (".epochs=3", ["'.epochs=3' is not of the form key.path=value"]),
        ("name=../escape", ["name", "../escape"]),
        ("seed.x=3", ["seed", "holds no keys"]),
        ("learning_rate", ["key.path=value"]),
        ("train.learning_rate=[", ["not YAML"]),
    ],
)
def test_a_wrong_value_or_key_is_named_with_its_rule(config: str, override: str, words: list[str]) -> None:
    with pytest.raises(BadInput) as refused:
        read_experiment(config, ["seed=0", override])
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["sweep.parameters={workers: [2], learning_rate: [.5, 1]}"],  # one value is a setting of all
        ["sweep.parameters={validate_every: [5, 10]}", "sweep.metric=validation_exact", "train.validate_every=5"],
        ["sweep.parameters={validate_every: [5, 10]}", "train.keep=best", "train.validate_every=5"],
    ],
)
def test_what_makes_other_explainers_may_be_swept(config: str, overrides: list[str]) -> None:
    assert len(read_experiment(config, overrides).sweep.combinations) == 2


@pytest.mark.parametrize("key", ["train.validate_every=5", "sweep.parameters={validate_every: [5], clip: [1, 2]}"])
def test_validation_without_questions_is_refused_before_anything_is_measured(config: str, key: str) -> None:
    none = "ground_truth.patching.cases.validation=0"
    with pytest.raises(BadInput, match=r"validate_every.*no validation questions about patching.*cases\.validation"):
        read_experiment(config, [key, none])
    read_experiment(config, ["train.validate_every=5", none, "train.mixtures=[[patching, features]]"])
    read_experiment(config, ["train.validate_every=5"])


def test_only_models_of_the_synthetic_world_can_have_its_texts_replayed(config: str) -> None:
    foreign = ["models.llama={path: /x}", "train.replay=0.5", "targets=[qwen3]", "pairings=[]"]
    with pytest.raises(BadInput, match=r"`train\.replay` = 0\.5: 'llama' never read.*`pairings`"):
        read_experiment(config, foreign)
    spared = "pairings=[{explainer: llama, target: qwen3, train: {replay: 0}}]"
    assert read_experiment(config, [*foreign, spared]).train_config("qwen3", "qwen3").replay == 0.5


def test_no_explainer_can_be_called_as_a_baseline_is(config: str) -> None:
    """Scores are told apart by names alone: the baseline would be pooled with it, as another seed."""
    names = [*BASELINES, GOLD, TEXT_ONLY, BEST_SELFIE, "untrained", shots_label(0), shots_label(4), selfie_label(5)]
    possible = [name for name in names if re.fullmatch(r"[\w.-]+", name)]  # those of others hold spaces
    assert possible == ["majority", "untrained", "zero-shot", "4-shot"]
    for name in possible:
        taken = [f"models.{name}={{path: /x}}", f"explainers=[llama, {name}]"]
        with pytest.raises(BadInput, match=rf"{name!r}, as a baseline is called.*another name"):
            read_experiment(config, taken)


def test_only_targets_need_the_layers_that_are_measured(config: str) -> None:
    small = ["models.small={pretrain: {architecture: llama, n_layers: 2}}", "explainers=[llama, small]", "pairings=[]"]
    asked = [*small, "ground_truth.patching.blocks=[[0, 1], [2, 3]]", "ground_truth.features.layers=[1, 3]"]
    read_experiment(config, asked).check_layers("small", 2)
    with pytest.raises(BadInput, match=r"\[2, 3\] is no block of 'small'"):
        read_experiment(config, [*asked, "targets=[small]"])
    with pytest.raises(BadInput, match=r"train\.injection\.layer`: 'small' has no layer 3"):
        read_experiment(config, [*small, "train.injection={mode: add, layer: 3}"])


def test_sites_and_kinds_are_those_of_the_engine() -> None:
    assert get_args(Site) == layout.SITES
    assert get_args(Kind) == hooks.KINDS


def test_every_fault_is_told_at_once(config: str) -> None:
    with pytest.raises(BadInput) as refused:
        read_experiment(config, ["train.epochs=0", "evaluate.resample=5"])
    assert "train.epochs" in str(refused.value)
    assert "`resamples`" in str(refused.value)


@pytest.mark.parametrize(("content", "word"), [(None, "cannot read"), ("[1, 2]", "mapping"), ("a: [", "not YAML")])
def test_an_unreadable_file_is_refused(tmp_path: Path, content: str | None, word: str) -> None:
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput, match=word):
        read_experiment(str(path))


def test_a_tilde_is_ones_home_wherever_a_place_is_named(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    sections = [
        "models.mine={path: ~/mine}",
        "ground_truth.patching={source: jsonl, path: ~/own.jsonl, cases: {train: 8, test: 4}}",
        "ground_truth.features={sae: {path: {llama: ~/saes, qwen3: google/saes}}, corpus: {path: ~/text}, "
        "describer: {kind: local, path: ~/mine}}",
    ]
    read = read_experiment(config, sections)
    truth = read.ground_truth
    assert read.models["mine"].path == truth.features.describer.path == "/home/ann/mine"
    assert truth.patching.path == "/home/ann/own.jsonl" and truth.features.corpus.path == "/home/ann/text"
    assert truth.features.sae.path == {"llama": "/home/ann/saes", "qwen3": "google/saes"}


def test_a_key_that_comes_twice_is_refused_with_its_line(config: str) -> None:
    """YAML's readers would take the last one, and what stood below the first would be lost unseen."""
    with pytest.raises(BadInput, match="'epochs' is given twice"):
        read_experiment(config, ["train={epochs: 3, epochs: 4}"])
    Path(config).write_text(Path(config).read_text() + "train: {epochs: 3}\nseed: 1\ntrain: {batch_size: 8}\n")
    with pytest.raises(BadInput, match=r"the key 'train' is given twice.*line \d+"):
        read_experiment(config)


def test_the_shipped_configs_are_valid() -> None:
    configs = sorted((Path(__file__).parent.parent / "jobs" / "configs").glob("*.yaml"))
    assert configs
    for path in configs:
        assert read_experiment(str(path)).name == path.stem


def test_the_world_is_of_the_size_asked_for_and_an_impossible_one_is_refused(config: str) -> None:
    assert read_experiment(config).world.world() == World()
    assert read_experiment(config, ["world.persons=40"]).world.world() == World(persons=40)
    with pytest.raises(BadInput, match="`world`: world of 3 city entities: each kind needs 4"):
        read_experiment(config, ["world.cities=3"])


PLACES = [
    "storage",
    "models.llama.path",
    "ground_truth.patching.path",
    "ground_truth.features.corpus.path",
    "ground_truth.features.sae.path",
    "ground_truth.features.sae.path.llama",
    "ground_truth.features.describer.address",
    "ground_truth.features.detector.address",
    "ground_truth.features.simulator.address",
    "evaluate.judge.address",
    "evaluate.embedding",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "address",
    ["https://key:5ecret@host/v1", "https://5ecret@host/v1", "s3://bucket/x?access_key=5ecret", "http://h/#5ecret"],
)
def test_credentials_in_an_address_are_refused_without_being_repeated(config: str, place: str, address: str) -> None:
    """Wherever an address can stand: a config is written beside the results, and into logs."""
    section = place.rpartition(".")[0]
    kind = [f"{section}.kind=endpoint", f"{section}.model=m"] if place.endswith(".address") else []
    with pytest.raises(BadInput, match="keep credentials out of it") as refused:
        read_experiment(config, [*kind, f"{place}={address}"])
    assert "5ecret" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluate.api_key=5ecret", "`evaluate.api_key`: no such key"),
        ("evaluate.Secret=5ecret", "`evaluate.Secret`: no such key"),
        ("evaluate.adress=http://5ecret@host", "`evaluate.adress`: no such key"),
        ("evaluate.judge=http://5ecret@host", "`evaluate.judge`: it is a section"),
        ("ground_truth.features.describer={kind: chat, address: http://5ecret@host}", "found using 'kind'"),
    ],
)
def test_credentials_at_a_wrong_place_are_not_repeated_either(config: str, override: str, said: str) -> None:
    with pytest.raises(BadInput) as refused:
        read_experiment(config, [override])
    assert said in str(refused.value) and "5ecret" not in str(refused.value)


def test_an_address_without_credentials_is_taken(config: str) -> None:
    judged = read_experiment(config, ["evaluate.judge.address=http://127.0.0.1:8000/v1", "evaluate.judge.model=m"])
    assert judged.evaluate.judge is not None and judged.evaluate.judge.address == "http://127.0.0.1:8000/v1"
    assert read_experiment(config, ["storage=s3://bucket/a@b/c"]).storage == "s3://bucket/a@b/c"


@pytest.mark.parametrize("storage", ["s3://key:secret@bucket/x", "s3://bucket/x?endpoint_override=h&access_key=k"])
def test_credentials_in_the_storage_are_refused_without_being_repeated(config: str, storage: str) -> None:
    with pytest.raises(BadInput, match="read from the environment") as refused:
        read_experiment(config, [f"storage={storage}"])
    assert "key:" not in str(refused.value) and "access_key=" not in str(refused.value)


@pytest.mark.parametrize(
    "storage", ["s3://", "s3://bucket/../other", "s3://bucket//x", "s3:/bucket/x", "http://bucket/x"]
)
def test_a_storage_that_is_no_place_is_refused(config: str, storage: str) -> None:
    with pytest.raises(BadInput, match="`storage`: "):
        read_experiment(config, [f"storage={storage}"])


@pytest.mark.parametrize("key", ["name", "models.../x.path"])
def test_names_that_lead_out_of_the_storage_are_refused(config: str, key: str) -> None:
    with pytest.raises(BadInput):
        read_experiment(config, [f"{key}=../../etc"])


def features_of(**section: Any) -> Any:
    return Experiment.model_validate({**EXPERIMENT_OF_FEATURES, "ground_truth": {"features": section}})


EXPERIMENT_OF_FEATURES = {
    "name": "x",
    "storage": "runs/x",
    "models": {"m": {"path": "somewhere"}},
    "targets": ["m"],
    "explainers": ["m"],
}
ASKED = {"kind": "endpoint", "model": "m"}


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"source": "neurons"}, "describer 'world' describes SAEs that are trained on the world's texts"),
        ({"sae": {"path": "x"}}, "give another `describer`"),
        (
            {"source": "neurons", "sae": {"path": "x"}, "describer": ASKED},
            "`sae` is for source 'sae', not for 'neurons'",
        ),
        ({"source": "activations", "describer": ASKED}, "source 'activations' needs `per_layer`"),
        ({"describer": {"kind": "neuronpedia", "path": "x"}}, "describer 'neuronpedia' describes published SAEs"),
        ({"describer": {"kind": "oracle"}}, "oracle"),
        ({"source": "released"}, "source 'released' and path None"),
        ({"source": "released", "path": "x", "sae": {"path": "x"}}, "brings directions and labels: leave `sae` out"),
        (
            {"source": "released", "path": "x", "describer": {"kind": "neuronpedia", "path": "x"}},
            "give one of kind endpoint or local that describes its exemplars anew",
        ),
        ({"unlabelled": {"activations": {"per_layer": 4}}}, "have no right description: give a `simulator` or"),
        (
            {"describer": ASKED, "simulator": ASKED, "unlabelled": {"activations": {}}},
            "`unlabelled.activations` needs `per_layer`",
        ),
        (
            {"source": "released", "path": "x", "vectors": "differences", "simulator": ASKED}
            | {"unlabelled": {"differences": {"path": "y"}}},
            "`unlabelled` names 'differences', which the features are themselves",
        ),
        ({"vectors": "differences"}, "`vectors` says what a released data set has: leave it out of source 'sae'"),
    ],
)
def test_sections_of_features_that_do_not_fit_together_are_refused(section: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(told)):
        features_of(**section)


@pytest.mark.parametrize(
    "section",
    [
        {"simulator": {"kind": "simulator", "path": "x"}},
        {"detector": ASKED},
        {"describer": ASKED, "candidates": 3},
        {"describer": {"kind": "local", "path": "x"}, "vectors": "activations"},
    ],
)
def test_released_features_may_be_described_and_scored_anew(section: dict[str, Any]) -> None:
    place = {"source": "released", "path": "some/folder"}
    assert describes(features_of(**place, **section).ground_truth.features)
    assert not describes(features_of(**place).ground_truth.features), "labels alone are taken as they are"


def test_a_tilde_is_ones_home_also_where_vectors_without_labels_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    section = features_of(describer=ASKED, simulator=ASKED, unlabelled={"differences": {"path": "~/x/{target}"}})
    assert section.ground_truth.features.unlabelled["differences"].path == "/home/ann/x/{target}"


def test_published_presets_are_valid() -> None:
    for path in (Path(__file__).parent.parent / "jobs" / "configs").glob("*.yaml"):
        assert read_experiment(str(path)).tasks


def test_a_file_adds_to_its_base_and_replaces_what_it_sets_anew(config: str, tmp_path: Path) -> None:
    over = tmp_path / "below" / "over.yaml"
    over.parent.mkdir()
    over.write_text(
        yaml.safe_dump({"base": "../small.yaml", "name": "over", "train": {"epochs": 7}, "targets": ["qwen3"]})
    )
    found, under = read_experiment(str(over), ["pairings=[]", "train.batch_size=4"]), read_experiment(config)
    assert (found.name, found.train.epochs, found.train.batch_size, found.targets) == ("over", 7, 4, ["qwen3"])
    assert found.models == under.models and found.ground_truth == under.ground_truth


def test_bases_that_are_missing_or_lead_in_a_circle_are_told(tmp_path: Path) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text("base: other.yaml")
    with pytest.raises(BadInput, match=r"cannot read the config .*other\.yaml"):
        read_experiment(str(one))
    other.write_text("base: one.yaml")
    with pytest.raises(BadInput, match="leads back to it"):
        read_experiment(str(one))


LLAMA = {"patching": "llama", "ablation": "llama-instruct", "features": "llama"}


@pytest.mark.parametrize(
    ("name", "lora", "batch_size", "learning_rate"),
    [("patching", 128, 32, 5e-5), ("ablation", None, 8, 1e-5), ("features", None, 64, 5e-5)],
)
@pytest.mark.parametrize("target", ["llama", "qwen"])
def test_presets_train_as_the_paper_did(
    name: str, target: str, lora: int | None, batch_size: int, learning_rate: float
) -> None:
    """Released configurations: LoRA of rank 128 and alpha 16 for patching alone, constant rates, weight decay .01."""
    experiment = read_experiment(
        str(Path(__file__).parent.parent / "jobs" / "configs" / "paper" / f"{name}-{target}.yaml")
    )
    train, truth = experiment.train, experiment.ground_truth
    assert (truth.wording == "paper_qwen") == (target == "qwen")
    if truth.features is not None:
        assert round((truth.features.per_layer or 0) * (1 - VALIDATION_SHARE - TEST_SHARE)) == 1024
    assert experiment.tasks == [name] and experiment.explainers[0] == {"llama": LLAMA[name], "qwen": "qwen"}[target]
    assert name == "features" or experiment.targets == experiment.explainers[:1]
    assert (train.lora.rank if train.lora else None) == lora and (train.lora is None or train.lora.alpha == 16)
    assert (train.batch_size, train.learning_rate, train.schedule, train.warmup) == (
        batch_size,
        learning_rate,
        "constant",
        0,
    )
    assert (train.weight_decay, train.clip, train.precision) == (0.01, 1.0, "bfloat16")
    assert train.injection.model_dump() == {"mode": "replace", "layer": None, "scale": "raw", "projection": "identity"}


DOCS = Path(__file__).parent.parent / "docs"
TOLD_IN_REPORT_MD = ("evaluate.judge", "evaluate.embedding")


class Key(NamedTuple):
    """A key of the file. Sections are told by the keys that they hold."""

    default: Any
    place: tuple[type, str]  # the section that it was first written in, which several keys may hold, and its name there
    is_section: bool


def keys_below(path: str, section: Any) -> dict[str, Key]:
    found = {}
    for name, field in section.model_fields.items():
        inner = [one for one in _types_in(field.annotation) if issubclass(one, BaseModel)]
        owner = next(one for one in reversed(section.__mro__) if name in inspect.get_annotations(one))
        found[f"{path}.{name}"] = Key(field.default, (owner, name), bool(inner))
        for one in inner:
            found |= keys_below(f"{path}.{name}", one)
    return found


KEYS = {key.removeprefix("."): own for key, own in keys_below("", Experiment).items()}


def keys_of(name: str) -> dict[str, Key]:
    return {key: own for key, own in KEYS.items() if key.partition(".")[0] == name}


def told_on(page: str) -> dict[str, str]:
    """What the first column of the page's tables of settings has -> what the second has, both without marks of code."""
    text = (DOCS / page).read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| (\S.*?) \|", text[text.index("# Settings") :], re.MULTILINE)
    return {key: default.strip("`") for key, default in rows}


@pytest.mark.parametrize("name", Experiment.model_fields)
def test_every_key_of_a_section_is_in_the_docs_with_its_default(name: str) -> None:
    """The keys of a section that stands at several places are told at one of them."""
    rows, keys = told_on("training.md" if name == "train" else "settings.md"), keys_of(name)
    told = {key: rows[way] for key in keys for way in (key, key.removeprefix(f"{name}.")) if way in rows}
    places = {keys[key].place for key in told}
    missing = [key for key, own in keys.items() if key not in told and own.place not in places and not own.is_section]
    assert [key for key in missing if not key.startswith(TOLD_IN_REPORT_MD)] == []
    for key, default in told.items():
        if default != "-" and not isinstance(keys[key].default, BaseModel):
            assert yaml.load(default, Loader=_Loader) == keys[key].default, key


def test_the_docs_tell_of_no_key_that_there_is_not() -> None:
    assert [key for key in told_on("training.md") if f"train.{key}" not in KEYS] == []
    assert [key for key in told_on("settings.md") if not {key, f"ground_truth.{key}"} & set(KEYS)] == []
