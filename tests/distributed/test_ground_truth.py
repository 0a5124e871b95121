"""From the experiment's file to the questions: the stages run in this process, no Ray is started."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from ray_explain import records, storage
from ray_explain.artifacts import finished
from ray_explain.config import Experiment
from ray_explain.distributed import run_stages
from ray_explain.distributed.explainers import train_explainers
from ray_explain.distributed.ground_truth import make_ground_truth
from ray_explain.distributed.plan import Plan
from ray_explain.distributed.session import Session
from ray_explain.errors import BadInput
from ray_explain.interventions.hooks import Patch, writing
from ray_explain.models import load_model


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "start_ray", lambda session: None)
    monkeypatch.setattr(run_stages, "run_stages", run_stages.make_here)


def plan_of(folder: Path, target: Path, wording: str, ablation: Any = None, **patching: Any) -> Plan:
    values = {
        "name": "kinds",
        "storage": str(folder),
        "models": {"tiny": {"path": str(target)}},
        "targets": ["tiny"],
        "explainers": ["tiny"],
        "ground_truth": {
            "wording": wording,
            "patching": {"cases": {"train": 24, "test": 8}, "blocks": 2, **patching},
            "ablation": ablation,
        },
    }
    return Plan(Experiment.model_validate(values))


@pytest.mark.parametrize(
    ("site", "kind", "wording"),
    [("attn_out", "add", "paper"), ("resid_pre", "replace", "brief"), ("mlp_out", "zero", "paper")],
)
def test_site_and_kind_go_from_the_experiment_into_cases_effects_and_questions(
    tmp_path: Path, world_target: Path, site: Any, kind: Any, wording: str
) -> None:
    plan = plan_of(tmp_path, world_target, wording, site=site, kind=kind)
    with Session(plan) as session:
        make_ground_truth(session)
    effects = storage.read_table(plan.path(plan.effects("patching", "tiny")))
    assert effects.num_rows == 32
    assert set(zip(effects["site"].to_pylist(), effects["kind"].to_pylist())) == {(site, kind)}
    vectors, loaded = records.vectors_of(effects["vectors"]), load_model(str(world_target))
    for effect, own in zip(effects.drop_columns(["vectors"]).to_pylist(), vectors):
        assert effect["first_layer"] == effect["last_layer"]
        values = torch.tensor(own) if kind != "zero" else None
        assert len(own) == (kind != "zero")
        at = torch.tensor(effect["base_positions"])
        patch = Patch(layer=effect["first_layer"], positions=at, site=site, kind=kind, values=values)
        with writing(loaded.model, patch):
            logits = loaded.model(torch.tensor([loaded.tokenizer(effect["base_prompt"])["input_ids"]])).logits[0, -1]
        assert float(logits.log_softmax(-1).max()) == pytest.approx(effect["patched_logprob"], abs=1e-4)
    asked = finished(plan.questions("patching", "tiny"), plan.root)
    assert (asked is None) == (kind == "zero")
    assert asked is None or asked.rows == 32


def test_explainers_are_not_trained_on_what_has_no_words(tmp_path: Path, world_target: Path) -> None:
    plan = plan_of(tmp_path, world_target, "brief", kind="add")
    with Session(plan) as session, pytest.raises(BadInput, match=r"kind` = 'add': `wording` 'brief'.*ground_truth\.py"):
        train_explainers(session)
    assert not list(tmp_path.iterdir())


def test_what_the_target_answers_with_a_special_token_is_measured_but_not_asked(
    tmp_path: Path, world_target: Path
) -> None:
    plan = plan_of(tmp_path, world_target, "paper")
    with Session(plan) as session:
        make_ground_truth(session)
        effects, questions = (plan.path(made("patching", "tiny")) for made in (plan.effects, plan.questions))
        table, end = storage.read_table(effects), load_model(str(world_target)).tokenizer.eos_token
        for name in ("base_answer", "patched_answer"):
            column = pa.array([end] * table.num_rows)
            table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
        for name in storage.list_files(effects, ".parquet"):
            storage.remove_file(f"{effects}/{name}")
        storage.write_table(table, f"{effects}/all.parquet")
        storage.remove(questions)
        with pytest.raises(BadInput, match=r"'train' is empty \(32 dropped: the answer is a special token"):
            make_ground_truth(session)


def test_lines_that_are_all_one_group_are_told_what_would_part_them(tmp_path: Path, world_target: Path) -> None:
    lines = [{"prompt": f"{word} . sentiment :", "span": [0, len(word)]} for word in ("bread", "beer", "tea", "milk")]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    section = {"source": "jsonl", "path": str(tmp_path / "lines.jsonl"), "cases": {"train": 4, "test": 4}}
    plan = plan_of(tmp_path / "run", world_target, "paper", ablation=section)
    with Session(plan) as session, pytest.raises(BadInput, match=r"ablation.*is empty; .* with groups of their own"):
        make_ground_truth(session)


@pytest.mark.parametrize("balance", [None, {"by": ["changed"]}])
def test_questions_are_made_with_a_part_of_the_vectors_in_memory_and_are_the_same(
    tmp_path: Path, world_target: Path, monkeypatch: pytest.MonkeyPatch, balance: Any
) -> None:
    plan = plan_of(tmp_path, world_target, "paper", balance=balance)
    questions, effects = (plan.path(made("patching", "tiny")) for made in (plan.questions, plan.effects))
    with Session(plan) as session:
        make_ground_truth(session)
        whole, sizes, read, every = storage.read_table(questions), list[int](), storage.read_batches, storage.read_table

        def narrow(uri: str, columns: list[str] | None = None) -> pa.Table:
            assert columns and "vectors" not in columns
            return every(uri, columns)

        told = finished(plan.questions("patching", "tiny"), plan.root)
        storage.remove(questions)
        with monkeypatch.context() as few:
            few.setattr(storage, "read_batches", lambda uri: (sizes.append(t.num_rows) or t for t in read(uri, 5)))
            few.setattr(storage, "read_table", narrow)
            make_ground_truth(session)
    assert sum(sizes) == storage.read_table(effects).num_rows and max(sizes) == 5
    assert storage.read_table(questions).equals(whole) and whole.num_rows
    again = finished(plan.questions("patching", "tiny"), plan.root)
    assert again is not None and told is not None and (again.rows, again.measured) == (told.rows, told.measured)
