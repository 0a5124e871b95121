from collections import Counter

import pytest
from transformers import PreTrainedTokenizerFast

from ray_explain.ground_truth.cases import ablation_cases as any_ablation_cases
from ray_explain.ground_truth.cases import patching_cases as any_patching_cases
from ray_explain.ground_truth.world_cases import ablation_cases, patching_cases
from ray_explain.world.cases import patching_pairs
from ray_explain.world.facts import World
from ray_explain.world.tokenizer import world_tokenizer

WORLD, N, BLOCKS = World(seed=2), {"train": 120, "validation": 0, "test": 40}, [(0, 0), (1, 2)]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return world_tokenizer(WORLD)


def test_every_case_is_of_its_split_and_there_once(words: PreTrainedTokenizerFast) -> None:
    for table in (patching_cases(WORLD, words, n=N, layers=BLOCKS, seed=0), ablation_cases(WORLD, n=N, seed=0)):
        assert Counter(table["split"].to_pylist()) == {"train": 120, "test": 40}
        assert len(set(table["case_id"].to_pylist())) == 160
        assert all(
            WORLD.split_of(group.split()[0]) == split
            for group, split in zip(table["group"].to_pylist(), table["split"].to_pylist())
        )


def test_the_token_that_is_patched_is_the_one_the_world_means(words: PreTrainedTokenizerFast) -> None:
    pairs = patching_pairs(WORLD, 120, "train", 0)
    rows = patching_cases(WORLD, words, n={"train": 120}, layers=BLOCKS, seed=0).to_pylist()
    for pair, row in zip(pairs, rows, strict=True):
        for side in ("base", "source"):
            text, span = getattr(pair, f"{side}_prompt"), getattr(pair, f"{side}_span")
            (at,) = row[f"{side}_positions"]
            assert words.decode([words(text)["input_ids"][at]]) == text[slice(*span)]
        assert (row["role"], row["stratum"], row["source_truth"]) == (pair.role, pair.relation, pair.source_truth)


def test_blocks_are_equally_frequent_within_each_role(words: PreTrainedTokenizerFast) -> None:
    table = patching_cases(WORLD, words, n={"train": 200}, layers=BLOCKS, seed=0)
    counts = Counter(zip(table["role"].to_pylist(), table["first_layer"].to_pylist()))
    assert len(counts) == 8
    assert all(abs(counts[role, 0] - counts[role, 1]) <= 1 for role, _ in counts)


def test_cases_are_the_same_in_every_run_and_others_with_another_seed(words: PreTrainedTokenizerFast) -> None:
    one, again, other = (patching_cases(WORLD, words, n=N, layers=BLOCKS, seed=seed) for seed in (0, 0, 1))
    assert one.equals(again) and not one.equals(other)


def test_without_its_span_a_quiz_has_no_hint() -> None:
    for row in ablation_cases(WORLD, n=N, seed=0).to_pylist():
        assert row["prompt"][row["span_start"] :].startswith("hint : ")
        bare = row["prompt"][: row["span_start"]] + row["prompt"][row["span_end"] :]
        assert "hint" not in bare and bare.endswith(". answer :") and "  " not in bare


def test_cases_from_anywhere_are_those_of_their_source(words: PreTrainedTokenizerFast) -> None:
    made = any_patching_cases(WORLD, words, n=N, blocks=BLOCKS, seed=0).table.sort_by("case_id")
    assert made.equals(patching_cases(WORLD, words, n=N, layers=BLOCKS, seed=0).sort_by("case_id"))
    assert any_ablation_cases(WORLD, words, n=N, seed=0).table.equals(ablation_cases(WORLD, n=N, seed=0))


def test_more_cases_than_the_world_gives_are_refused(words: PreTrainedTokenizerFast) -> None:
    small = World(seed=0, persons=4, strangers=4, cities=4, companies=4, countries=4)
    with pytest.raises(ValueError):
        patching_cases(small, world_tokenizer(small), n={"train": 10**4}, layers=BLOCKS, seed=0)
