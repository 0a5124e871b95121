"""The questions asked while an explainer learns."""

from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ray_explain import storage
from ray_explain.config import TrainConfig
from ray_explain.distributed.training_loop import _sample
from ray_explain.distributed.training_setup import start_of
from ray_explain.distributed.validation import Sample, _shares, measured, sample_of
from ray_explain.errors import BadInput
from ray_explain.explainer.markers import markers_of
from tests.distributed.training_runs import run_of


@pytest.fixture
def sample(questions: tuple[str, str], world_target: Path) -> Sample:
    return new_sample(questions, world_target, seed=0)


def new_sample(questions: tuple[str, str], world_target: Path, *, seed: int, keep: str = "validation") -> Sample:
    tables = [storage.read_table(folder) for folder in questions]
    tables = [table.filter(pc.equal(table["split"], keep)) for table in tables]
    tokenizer = AutoTokenizer.from_pretrained(world_target)
    return sample_of(tables, tokenizer, markers_of(tokenizer), n=12, seed=seed, max_tokens=100)


def test_every_task_has_its_share_and_only_vectors_are_shuffled(sample: Sample) -> None:
    assert sample.questions["task"].to_pylist() == ["patching"] * 8 + ["ablation"] * 4
    assert set(sample.questions["split"].to_pylist()) == {"validation"}
    own = {asked.question_id: asked.prompt for asked in sample.asked if asked.control == "none"}
    shuffled = {asked.question_id: asked.prompt for asked in sample.asked if asked.control == "shuffled"}
    assert list(own) == sample.questions["question_id"].to_pylist()
    assert set(shuffled) == set(list(own)[:8])
    for question, prompt in shuffled.items():
        assert prompt.input_ids == own[question].input_ids
        assert (prompt.vectors != own[question].vectors).any()


def test_the_sample_is_a_function_of_the_seed(questions: tuple[str, str], world_target: Path, sample: Sample) -> None:
    again, other = (new_sample(questions, world_target, seed=seed) for seed in (0, 1))
    assert again.questions["question_id"].equals(sample.questions["question_id"])
    assert not other.questions["question_id"].equals(sample.questions["question_id"])


def test_uplift_is_what_shuffled_vectors_cost_on_the_questions_that_have_some(sample: Sample) -> None:
    truth = dict(zip(sample.questions["question_id"].to_pylist(), sample.questions["answer"].to_pylist()))
    right = [truth[asked.question_id] for asked in sample.asked]
    assert measured(sample, right) == {"validation_exact": 1.0, "validation_uplift": 0.0}
    texts = ["" if asked.control == "shuffled" else text for asked, text in zip(sample.asked, right)]
    assert measured(sample, texts) == {"validation_exact": 1.0, "validation_uplift": 1.0}
    texts = [
        "" if asked.control == "none" and asked.prompt.layers else text for asked, text in zip(sample.asked, right)
    ]
    assert measured(sample, texts) == {"validation_exact": pytest.approx(4 / 12), "validation_uplift": -1.0}


@given(sizes=st.lists(st.integers(0, 200), min_size=1, max_size=4), n=st.integers(1, 300))
def test_shares_are_whole_questions_and_together_as_many_as_wanted(sizes: list[int], n: int) -> None:
    shares = _shares(sizes, n)
    assert sum(shares) == min(n, sum(sizes))
    for size, share in zip(sizes, shares, strict=True):
        assert 0 <= share <= size
        assert abs(share - min(n, sum(sizes)) * size / max(1, sum(sizes))) <= 1


def test_a_single_question_is_asked_of_equally_large_tasks(questions: tuple[str, str], world_target: Path) -> None:
    tables = [storage.read_table(folder) for folder in questions]
    tables = [table.filter(pc.equal(table["split"], "validation"))[:8] for table in tables]
    tokenizer = AutoTokenizer.from_pretrained(world_target)
    common = {"n": 1, "seed": 0}
    found = sample_of(tables, tokenizer, markers_of(tokenizer), **common, max_tokens=100)
    assert found.questions.num_rows == 1 and found.asked
    with pytest.raises(BadInput, match="none of 1 validation questions can be asked"):
        sample_of(tables, tokenizer, markers_of(tokenizer), **common, max_tokens=3)


def test_an_empty_split_is_told_with_the_way_out(questions: tuple[str, str], world_target: Path) -> None:
    with pytest.raises(BadInput, match=r"validation split is empty; give `cases: \{validation"):
        new_sample(questions, world_target, seed=0, keep="train")


@pytest.mark.parametrize("text_only", [False, True])
def test_an_explainer_is_validated_with_what_it_is_trained_on(
    text_only: bool, questions: tuple[str, str], world_target: Path
) -> None:
    train = TrainConfig(validate_every=1, validation_questions=12, max_tokens=100)
    run = replace(run_of(train, "validated", questions, world_target), text_only=text_only)
    start = start_of(run, workers=1)
    sample = _sample(run, start)
    assert sample is not None and {one.control for one in sample.asked} == {"none", "shuffled"}
    for prompts in [[one.prompt for one in sample.asked], start.examples]:
        assert any(prompt.vectors.any() for prompt in prompts) is not text_only
        assert any(len(prompt.vectors) for prompt in prompts)
