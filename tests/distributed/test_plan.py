"""Which artifacts an experiment consists of: no Ray is needed to know."""

from pathlib import Path

import pyarrow as pa
import pytest

from ray_explain.config import Experiment, read_experiment
from ray_explain.distributed.feature_plan import identity
from ray_explain.distributed.pipeline import _notes, _rows_about, all_artifacts, shown_runs
from ray_explain.distributed.plan import Plan
from tests.tiny import EXPERIMENT, config_in


def plan(**changes):
    return Plan(Experiment.model_validate({**EXPERIMENT, "storage": "runs/tiny", **changes}))


def train(**changes):
    return {"train": {**EXPERIMENT["train"], **changes}}


def test_explainers_without_vectors_are_the_targets_own_at_all_of_the_data():
    runs = plan(targets=["llama", "qwen3"], fractions=[0.5, 1.0], **train(text_only=True)).runs()
    blind = [(run.explainer, run.target, run.fraction, run.asked) for run in runs if run.text_only]
    asked = ("patching", "features")
    assert blind == [(name, name, 1.0, asked) for name in ("llama", "qwen3")]
    assert {run.speaker for run in runs} == {"llama", "qwen3", "text only"}
    assert len(set(run.name for run in runs)) == len(runs)


def test_a_task_that_has_no_vector_needs_no_explainer_without():
    ground_truth = {"ablation": EXPERIMENT["ground_truth"]["ablation"]}
    assert not any(run.text_only for run in plan(ground_truth=ground_truth, **train(text_only=True)).runs())


def test_explainers_with_and_without_vectors_are_different_artifacts_and_the_first_stay_where_they_are():
    without, both = plan(), plan(**train(text_only=True))
    one, other = (
        next(run for run in both.runs() if run.explainer == "llama" and run.text_only is kind) for kind in (False, True)
    )
    assert both.explainer(one) != both.explainer(other)
    assert both.explainer(one) == without.explainer(one)
    assert both.answers(one, "patching").parents[-1].config["controls"]
    assert not both.answers(other, "patching").parents[-1].config["controls"]


def test_examples_of_a_task_are_answers_of_the_explainer_that_was_trained_on_it():
    apart = plan(seeds=[3, 4], **train(mixtures=[["patching"], ["ablation"], ["features"]], text_only=True))
    made = {artifact.fingerprint for artifact in all_artifacts(apart)}
    for task in ("patching", "ablation", "features"):
        told = {(task, "llama", name, seed, 1.0) for name in ("llama", "qwen3") for seed in (3, 4)}
        runs = list(shown_runs(apart, task, "llama", told))
        assert [(run.explainer, run.seed, run.tasks) for run in runs] == [(n, 3, (task,)) for n in ("llama", "qwen3")]
        assert all(apart.answers(run, task).fingerprint in made for run in runs)
        assert not list(shown_runs(apart, task, "llama", set()))


def test_of_the_rows_of_a_table_only_those_of_the_examples_are_read():
    table = pa.table({"question_id": ["a", "b", "a", "c"], "text": ["1", "2", "3", "4"]})
    assert [row["text"] for row in _rows_about(["c", "a"], table)] == ["1", "3", "4"]
    assert _rows_about([], table) == []


def test_that_scores_are_of_validation_questions_is_told_at_the_top_of_the_report(tmp_path):
    given = {"storage": str(tmp_path), "evaluate": {**EXPERIMENT["evaluate"], "split": "validation"}}
    (note,) = _notes(plan(**given))
    assert note.startswith("Scored on the validation questions: ")
    assert _notes(plan(storage=str(tmp_path))) == []


@pytest.mark.parametrize(
    "evaluate, ways",
    [
        ({"untrained": False, "shots": [], "selfie": []}, set()),
        ({}, {"untrained", "zero-shot", "4-shot", "SelfIE"}),
        ({"shots": [1, 8], "selfie": []}, {"untrained", "1-shot", "8-shot"}),
    ],
)
def test_untrained_targets_are_asked_in_the_ways_that_are_wanted(evaluate, ways):
    lookups = plan(evaluate=evaluate).untrained()
    assert {one.way for one in lookups} == ways
    assert all(one.task == "features" for one in lookups if one.way == "SelfIE")


def test_each_way_of_asking_is_an_artifact_of_its_own():
    made = plan(evaluate={"shots": [0, 4]})
    answers = [made.untrained_answers(one) for one in made.untrained()]
    assert len({artifact.fingerprint for artifact in answers}) == len(answers)
    assert all(artifact in made.scores().parents for artifact in answers)


def test_files_of_all_layers_tell_a_path_with_a_layer_in_it_from_others(tmp_path: Path) -> None:
    for layer in (1, 2):
        (tmp_path / f"{layer}-source").mkdir()
        (tmp_path / f"{layer}-source" / "batch.jsonl").write_text(f"{layer}")
    place = f"{tmp_path}/{{layer}}-source"
    before = identity(place)
    assert len(before) == 2
    (tmp_path / "2-source" / "batch.jsonl").write_text("33")
    assert identity(place) != before
    assert identity("owner/name/layer_{layer}/x") == "owner/name/layer_{layer}/x", "a hub id is known by its name"


def test_questions_about_spans_of_ones_own_lines_are_others_than_those_about_hints(tmp_path: Path):
    (tmp_path / "own.jsonl").write_text("")
    own = {"ablation": EXPERIMENT["ground_truth"]["ablation"] | {"source": "jsonl", "path": f"{tmp_path}/own.jsonl"}}
    assert plan(ground_truth=own).questions("ablation", "llama").config["spans"] == "quoted"
    assert "spans" not in plan().questions("ablation", "llama").config


def test_questions_about_patches_that_ended_in_two_newlines_are_made_anew():
    truth = EXPERIMENT["ground_truth"]
    assert plan(ground_truth=truth | {"wording": "paper"}).questions("patching", "llama").config["end"] == "one newline"
    assert "end" not in plan().questions("patching", "llama").config


@pytest.mark.parametrize("chat", [{"source": "released", "path": "data/{target}"}, {"form": "chat"}])
def test_questions_that_showed_the_marks_of_a_chat_template_are_made_anew(chat: dict[str, str]):
    own = {"ablation": EXPERIMENT["ground_truth"]["ablation"] | chat}
    assert plan(ground_truth=own).questions("ablation", "llama").config["prompts"] == "as said"
    assert "prompts" not in plan().questions("ablation", "llama").config


def test_workers_find_a_model_at_a_relative_path_wherever_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    models = {"llama": {"path": "models/llama"}, "qwen3": {"path": "Qwen/Qwen3-0.6B"}}
    here = plan(models=models, train={"mixtures": [["patching"]]})
    assert here.model_place("llama")["model"] == str(tmp_path / "models" / "llama")
    assert here.model_place("qwen3")["model"] == "Qwen/Qwen3-0.6B"
    assert here.model("llama").config["path"] == "models/llama"


def test_how_much_memory_rows_may_take_reaches_the_target_and_no_fingerprint():
    less, unset = plan(cluster={"memory_budget": 4096}), plan(cluster={"actors": 4})
    assert less.target_place("llama")["memory_budget"] == 4096
    assert unset.target_place("llama") == plan().model_place("llama") | {"memory_budget": None, "memory_share": 0.25}
    assert plan(cluster={"gpus_per_actor": 0.5}).target_place("llama")["memory_share"] == 0.5
    assert plan(cluster={"gpus_per_actor": 2}).target_place("llama")["memory_share"] == 1
    assert less.scores() == unset.scores() == plan().scores()


def explainers(folder: Path, *overrides: str) -> list[str]:
    """Where the explainers of the tiny experiment lie."""
    made = Plan(read_experiment(config_in(folder), overrides))
    return [made.path(made.explainer(run)) for run in made.runs()]


@pytest.mark.parametrize(
    "override",
    [
        "train.workers=2",
        "train.zero_stage=3",
        "train.offload=true",
        "train.gradient_checkpointing=true",
        "train.micro_batch_size=4",
        "train.validate_every=20",
        "train.validation_questions=8",
        "train.checkpoint_every=5",
        "train.keep_checkpoints=4",
        "train.max_failures=0",
        "train.trackers=[mlflow]",
    ],
)
def test_how_an_explainer_is_trained_says_not_which_one_it_is(override: str, tmp_path: Path) -> None:
    assert explainers(tmp_path, override) == explainers(tmp_path)


@pytest.mark.parametrize(
    "override",
    [
        "train.batch_size=8",
        "train.epochs=2",
        "train.precision=bfloat16",
        "train.lora={rank: 4}",
        "train.weights={features: 2}",
        "train.max_tokens=100",
        "train.injection={projection: linear}",
    ],
)
def test_what_changes_the_steps_makes_another_explainer(override: str, tmp_path: Path) -> None:
    assert not set(explainers(tmp_path, override)) & set(explainers(tmp_path))


def test_ridge_maps_read_the_corpus_where_questions_are_about_features_and_else_not():
    changes = train(injection={"projection": "ridge"}, mixtures=[["patching", "ablation"], ["features"]])
    made = plan(**changes)
    for run in made.runs():
        maps = made.alignment(run)
        assert maps is not None
        assert ("corpus_windows" in {parent.kind for parent in maps.parents}) is ("features" in run.tasks)


def test_an_explainer_takes_the_weights_of_its_own_tasks():
    """Others say nothing about it, neither how it is trained nor which one it is."""
    mixtures = [["patching"], ["ablation", "features"]]
    plain, weighted = plan(**train(mixtures=mixtures)), plan(**train(mixtures=mixtures, weights={"features": 2}))
    for run in plain.runs():
        alone = run.tasks == ("patching",)
        assert weighted.train_config(run).weights == ({} if alone else {"features": 2})
        assert (weighted.explainer(run) == plain.explainer(run)) is alone


@pytest.mark.parametrize("choosing", ["train.keep=best", "sweep.metric=validation_exact"])
def test_validation_makes_another_explainer_where_it_chooses_one(choosing: str, tmp_path: Path) -> None:
    often, seldom, fewer = (
        explainers(tmp_path, choosing, f"train.validate_every={every}", f"train.validation_questions={n}")
        for every, n in [(10, 64), (20, 64), (10, 32)]
    )
    assert not set(often) & set(seldom) and not set(often) & set(fewer)
