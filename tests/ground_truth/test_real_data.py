"""The real models know no facts of the world: CounterFact and MMLU have to run through. They do copy within a story,
and there a patch has a real effect."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from transformers import AutoTokenizer

from ray_explain.ground_truth.ablation import AblationStage
from ray_explain.ground_truth.cases import ablation_cases, patching_cases
from ray_explain.ground_truth.pairs import Pair, SubjectPrompt, layer_blocks, pair_cases
from ray_explain.ground_truth.patching import PatchingStage

MODELS = ("stories260k", "babyllama_tok361")


@pytest.fixture(scope="module", params=MODELS)
def target(request: pytest.FixtureRequest, data: Path) -> dict[str, Any]:
    return {"model": str(data / "models" / request.param), "dtype": "float32"}


def test_counterfact_runs_through(target: dict[str, Any], data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target["model"])
    path = str(data / "counterfact_2k.jsonl")
    cases = patching_cases(
        path, tokenizer, format="counterfact", n={"train": 60, "test": 20}, blocks=layer_blocks(5, 4), seed=0
    )
    assert cases.table.num_rows == 80
    made = PatchingStage(target)(cases.table)
    assert made.table.num_rows + len(made.dropped) == 80
    assert len(made.dropped) < 4
    own_end = pc.and_(pc.equal(made.table["role"], "final"), pc.equal(made.table["last_layer"], 4))
    assert made.table.filter(own_end).num_rows > 0


def test_mmlu_runs_through(target: dict[str, Any], data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target["model"])
    cases = ablation_cases(
        str(data / "mmlu_1k.jsonl"), tokenizer, format="mmlu", n={"train": 40, "test": 10}, seed=0
    ).table
    made = AblationStage(target)(cases)
    assert made.table.num_rows + len(made.dropped) == cases.num_rows == 50
    # A character a token: hardly a question fits into the smaller context.
    assert set(Counter(reason for _, reason in made.dropped)) <= {"the prompt is longer than the context"}


def test_within_a_story_a_patch_brings_the_other_storys_word(data: Path) -> None:
    folder = str(data / "models" / "stories260k")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    story = "Lily had a red {thing}. She liked to play with it all day. One day, Lily took her red"
    things = ("ball", "car", "hat", "bike")
    prompts = [
        SubjectPrompt(text := story.format(thing=thing), (at := text.index(thing), at + len(thing)), thing)
        for thing in things
    ]
    pairs = [
        Pair(base, source, group=f"{base.truth} {source.truth}", split="test", stratum="copy")
        for base in prompts
        for source in prompts
        if base is not source
    ]
    cases = pair_cases(pairs, tokenizer, blocks=[(i, i) for i in range(5)], n={"test": 10**4}, seed=0).table
    made = PatchingStage({"model": folder, "dtype": "float32"})(cases).table
    last = made.filter(pc.and_(pc.equal(made["role"], "final"), pc.equal(made["last_layer"], 4))).to_pylist()
    copied = {row["base_prompt"]: row["base_answer"] for row in made.to_pylist()}
    assert len(set(copied.values())) > 1  # what it says depends on the story
    assert all(row["patched_answer"] == copied[row["source_prompt"]] for row in last)
    assert any(row["changed"] for row in last)
