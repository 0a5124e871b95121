"""The whole method on tiny models, through the jobs' own `main`."""

import html
import re
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from jobs import evaluate, export, ground_truth, pipeline
from ray_explain import storage
from ray_explain.artifacts import finished
from ray_explain.config import read_experiment
from ray_explain.distributed.plan import Plan
from ray_explain.evaluation.grading import grade
from ray_explain.evaluation.receipts import Receipt, Witness
from ray_explain.explainer.sidecar import read_sidecar
from ray_explain.models import files_fingerprint
from ray_explain.records import TEXT_ONLY
from ray_explain.stages import Result
from tests.interrupting import interrupt
from tests.tiny import EXPERIMENT, config_in, plan_of

pytestmark = pytest.mark.ray


def test_the_report_is_one_page_that_shows_every_pairing(config: str) -> None:
    report = Path(plan_of(config).root, "report")
    page = html.unescape((report / "index.html").read_text())
    assert "nan" not in page.lower().split()
    for word in (
        "llama",
        "qwen3",
        "majority",
        "nearest neighbour",
        "untrained",
        "shuffled",
        "2-shot",
        "SelfIE",
    ):
        assert word in page, word
    assert (report / "tables.md").exists() and (report / "scores.json").exists()


def test_targets_are_ordinary_hugging_face_folders(config: str) -> None:
    plan = plan_of(config)
    folder = plan.path(plan.model("llama"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("question :", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, 3, len(tokenizer))


def test_explainers_are_ordinary_hugging_face_folders_too(config: str) -> None:
    plan = plan_of(config)
    for run in plan.runs():
        model = AutoModelForCausalLM.from_pretrained(plan.path(plan.explainer(run)))
        assert all(parameter.numel() for parameter in model.parameters())


def test_every_explainer_says_which_target_it_is_for(config: str) -> None:
    plan = plan_of(config)
    for run in plan.runs():
        weights = files_fingerprint(plan.path(plan.model(run.target)))
        assert weights is not None
        read_sidecar(plan.path(plan.explainer(run))).check(target=run.target, target_weights=weights)


def test_every_case_is_accounted_for(config: str) -> None:
    plan = plan_of(config)
    for task in ("patching", "ablation"):
        cases, effects = (finished(make(task, "llama"), plan.root) for make in (plan.cases, plan.effects))
        assert cases is not None and effects is not None
        assert effects.rows + sum(effects.dropped.values()) == cases.rows > 0


def test_no_group_is_in_two_splits(config: str) -> None:
    plan = plan_of(config)
    for task in plan.experiment.tasks:
        splits = defaultdict(set)
        questions = storage.read_table(plan.path(plan.questions(task, "llama")))
        for group, split in zip(questions["group"].to_pylist(), questions["split"].to_pylist()):
            splits[group].add(split)
        assert {"train", "test"} <= set().union(*splits.values())
        assert all(len(found) == 1 for found in splits.values()), task


def test_what_is_finished_is_not_done_again(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(config)
    before = _made_at(plan.root)
    monkeypatch.setattr("ray_explain.distributed.session.Session.start_ray", _not_again)
    assert pipeline.main(["--config", config]) == 0
    assert _made_at(plan.root) == before


def _not_again(*_: object) -> None:
    raise AssertionError("a finished experiment started Ray")


def _made_at(root: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(root).glob("*/*/manifest.json")}


def test_a_changed_setting_makes_anew_only_what_depends_on_it(config: str) -> None:
    one = plan_of(config)
    other = Plan(read_experiment(config, ["train.learning_rate=1e-3"]))
    assert one.effects("patching", "llama") == other.effects("patching", "llama")
    assert one.asked("patching", "llama", controls=True) == other.asked("patching", "llama", controls=True)
    assert one.explainer(one.runs()[0]) != other.explainer(other.runs()[0])
    assert one.scores() != other.scores()


@pytest.mark.long  # in `make test` the short chaos kills a driver, on a cluster; here its own Ray dies with it
def test_a_job_killed_in_the_middle_goes_on_and_ends_with_the_same_tables(config: str, tmp_path: Path) -> None:
    """The driver and all its actors are killed with the first effects on disk; then the job is started again."""
    again = config_in(tmp_path)
    plan = plan_of(again)
    folder = plan.path(plan.effects("features", "llama"))  # the first to be made, and the slowest
    interrupt("ground_truth", again, when=lambda: storage.list_files(folder, ".parquet"))
    assert finished(plan.effects("features", "llama"), plan.root) is None
    assert ground_truth.main(["--config", again]) == 0
    undisturbed = plan_of(config)
    for task in ("patching", "ablation"):
        one, other = (storage.read_table(p.path(p.effects(task, "llama"))).to_pylist() for p in (plan, undisturbed))
        keys = ("case_id", *(("patched_answer",) if task == "patching" else ("ablated_answer",)), "changed")
        assert [[row[key] for key in keys] for row in one] == [[row[key] for key in keys] for row in other]


def test_exported_ground_truth_is_read_again_as_a_released_data_set(config: str, tmp_path: Path) -> None:
    """Neither writing nor reading measures anything anew."""
    plan = plan_of(config)
    assert export.main(["--config", config]) == 0
    section = {
        "source": "released",
        "path": f"{plan.root}/released/{{target}}/patching",
        "balance": {"by": ["changed"]},
    }
    again = config_in(
        tmp_path,
        models={"llama": {"path": plan.path(plan.model("llama"))}},
        explainers=["llama"],
        ground_truth={
            "wording": "brief",
            "patching": {**section, "cases": {"train": 80, "test": 40}},
            "features": {"source": "released", "path": f"{plan.root}/released/{{target}}/features"},
        },
        train=EXPERIMENT["train"] | {"replay": 0.0},
    )
    assert ground_truth.main(["--config", again]) == 0
    other = plan_of(again)
    one, two = (storage.read_table(p.path(p.effects("patching", "llama"))).to_pylist() for p in (plan, other))
    keys = ("split", "base_prompt", "first_layer", "base_answer", "patched_answer", "changed", "vectors")
    # in another order: cases lie by their prompts, a released data set by its splits
    assert sorted([row[key] for key in keys] for row in one) == sorted([row[key] for key in keys] for row in two)
    features, read_again = (questions_about_features(p) for p in (plan, other))
    assert features and {key: own for key, own in read_again.items() if key in features} == features
    counts = finished(other.questions("patching", "llama"), other.root)
    assert counts is not None
    before, after = (counts.measured[f"cases {when} balancing"] for when in ("before", "after"))
    assert sum(before.values()) == 120
    for split in ("train", "test"):
        assert len({n for cell, n in after.items() if split in cell}) == 1


def questions_about_features(plan: Plan) -> dict[tuple[int, int], tuple[str, list[list[float]]]]:
    """Answer and vector, by layer and number of the feature."""
    effects = storage.read_table(plan.path(plan.effects("features", "llama"))).to_pylist()
    rows = storage.read_table(plan.path(plan.questions("features", "llama"))).to_pylist()
    asked = {row["case_id"]: row for row in rows}
    return {
        (effect["layer"], effect["feature_id"]): (asked[effect["case_id"]]["answer"], effect["vectors"])
        for effect in effects
        if effect["case_id"] in asked
    }


def test_a_target_trained_without_vectors_stands_beside_its_explainers(config: str) -> None:
    """Of patching and features; an ablation has no vector to do without."""
    plan = plan_of(config)
    rows = storage.read_table(f"{plan.path(plan.scores())}/scores").to_pylist()
    found = {row["task"]: row for row in rows if row["explainer"] == TEXT_ONLY and row["metric"] == "exact_match"}
    assert set(found) == {"patching", "features"}
    for task, row in found.items():
        beside = next(r for r in rows if (r["task"], r["explainer"], r["by"]) == (task, "llama", row["by"]))
        assert row["n"] == beside["n"] > 0 and row["value"] is not None and row["control"] == "none"
    compared = storage.read_table(f"{plan.path(plan.scores())}/comparisons").to_pylist()
    against = {(row["task"], row["contrast"]) for row in compared if row["against"] == TEXT_ONLY}
    assert against == {("patching", "over_baseline"), ("features", "over_baseline")}
    for name in ("index.html", "tables.md"):
        assert "trained without vectors" in Path(plan.root, "report", name).read_text(), name


def test_the_next_experiment_is_planned_from_a_finished_one(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = _made_at(plan_of(config).root)
    assert evaluate.main(["--config", config, "--power"]) == 0
    told = capsys.readouterr().out
    for task, n in (("activation patching", 40), ("input ablation", 30)):
        assert re.search(
            rf"^{task}, exact match, llama itself against qwen3 \({n} questions, 1 seed\): ", told, re.MULTILINE
        ), task
    assert "One seed says nothing of how much seeds differ" in told
    assert _made_at(plan_of(config).root) == before
    assert evaluate.main(["--config", config, "--power", "evaluate.resamples=300"]) == 2
    assert "plans from finished scores" in capsys.readouterr().err


def receipts_of(plan: Plan, witness: Witness, task: str, tokenizer: PreTrainedTokenizerBase) -> list[Receipt]:
    """Of the test split: each case is run on the target anew, and asked about anew."""
    if task == "features":
        rows = held_out(plan, "features").to_pylist()
        return [
            witness.feature(row["vectors"][0], row["layers"][0], row["answers"], case_id=row["case_id"]) for row in rows
        ]
    cases = storage.read_table(plan.path(plan.cases(task, "llama")))
    cases = cases.filter(pc.equal(cases["split"], "test"))
    return (witness.patches if task == "patching" else witness.ablations)(cases, tokenizer)


def held_out(plan: Plan, task: str) -> pa.Table:
    questions = storage.read_table(plan.path(plan.questions(task, "llama")))
    return questions.filter(pc.equal(questions["split"], "test"))


@pytest.mark.parametrize("task", ["patching", "ablation", "features"])
def test_live_receipts_confirm_what_was_right_offline(config: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An explainer's own answers, and those of one that knows every second truth."""
    plan = plan_of(config)
    run = next(run for run in plan.runs() if run.explainer == run.target and not run.text_only)
    target = {"target": "llama", "target_revision": None, "d_target": 32}
    asking = target | {"explainer": "llama", "folder": plan.path(plan.explainer(run)), "batch_size": 64}
    sizes = {"max_new_tokens": 8, "max_tokens": plan.experiment.train.max_tokens}
    witness = Witness(asking | sizes, plan.model_place("llama"), wording="brief", seed=plan.experiment.seed)
    tokenizer = AutoTokenizer.from_pretrained(plan.path(plan.model("llama")))
    receipts = receipts_of(plan, witness, task, tokenizer)
    graded = storage.read_table(f"{plan.path(plan.scores())}/graded")
    rows = graded.filter((pc.field("task") == task) & (pc.field("explainer") == "llama"))
    answers = storage.read_table(plan.path(plan.answers(run, task))).filter(pc.field("control") == "none")
    assert [receipt.answer for receipt in receipts] == answers["text"].to_pylist()
    assert len(receipts) >= (20 if task == "features" else 30)
    assert [one.confirmed for one in receipts] == rows.filter(pc.field("control") == "none")["exact"].to_pylist()

    questions = held_out(plan, task)
    said = answers["text"].to_pylist()
    said = [right if i % 2 else text for i, (right, text) in enumerate(zip(questions["answer"].to_pylist(), said))]
    answers = answers.set_column(answers.column_names.index("text"), answers.schema.field("text"), [said])
    numbers = iter(range(len(said)))

    def knowing(asked: pa.Table) -> Result:
        told = answers.take([next(numbers) for _ in range(asked.num_rows)])
        return Result(told.set_column(0, told.schema.field("question_id"), asked["question_id"]), [])

    monkeypatch.setattr(witness, "_answering", knowing)
    confirmed = [receipt.confirmed for receipt in receipts_of(plan, witness, task, tokenizer)]
    assert confirmed == grade(questions, answers, target="llama", seed=0)["exact"].to_pylist()
    assert 0 < sum(map(bool, confirmed)) < len(confirmed)
