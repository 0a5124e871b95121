from collections import Counter, defaultdict

import pytest
from transformers import PreTrainedTokenizerFast

from ray_explain.ground_truth.pairs import REPEATED, Pair, SubjectPrompt, layer_blocks, pair_cases
from ray_explain.ground_truth.positions import OUTSIDE

CITIES = {"Rome": "Italy", "Paris": "France", "Berlin": "Germany", "Emilio Lussu": "Sardinia", "Eli Maor": "Israel"}


def pairs_of(split: str = "train") -> list[Pair]:
    names = list(CITIES)
    prompts = [SubjectPrompt(f"{name} lies in", (0, len(name)), CITIES[name]) for name in names]
    return [
        Pair(base, prompts[i - 1], group=names[i], split=split, stratum="lies in") for i, base in enumerate(prompts)
    ]


@pytest.mark.parametrize(
    ("n_layers", "n_blocks", "blocks"),
    [
        (32, 4, [(0, 7), (8, 15), (16, 23), (24, 31)]),
        (36, 4, [(0, 8), (9, 17), (18, 26), (27, 35)]),
        (5, 4, [(0, 1), (2, 2), (3, 3), (4, 4)]),
        (3, 1, [(0, 2)]),
    ],
)
def test_blocks_are_those_of_the_paper(n_layers: int, n_blocks: int, blocks: list[tuple[int, int]]) -> None:
    assert layer_blocks(n_layers, n_blocks) == blocks


@pytest.mark.parametrize("n_blocks", [0, 4])
def test_there_are_no_empty_blocks(n_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"{n_blocks} blocks of 3 layers"):
        layer_blocks(3, n_blocks)


def test_roles_and_blocks_come_equally_often_and_no_case_twice(tokenizer: PreTrainedTokenizerFast) -> None:
    made = pair_cases(pairs_of(), tokenizer, blocks=[(0, 0), (1, 2)], n={"train": 24}, seed=0)
    rows = made.table.to_pylist()
    assert (len(rows), made.dropped) == (24, [])
    assert len({row["case_id"] for row in rows}) == 24
    counts = Counter((row["role"], row["first_layer"]) for row in rows)
    assert {role for role, _ in counts} == {"subject_first", "subject_last", "relation", "final", "other"}
    assert max(counts.values()) - min(counts[role, at] for role in ("subject_last", "final") for at in (0, 1)) <= 1
    groups = Counter(row["group"] for row in rows)
    assert max(groups.values()) - min(groups.values()) <= 1  # spread over the pairs


def test_a_case_patches_the_token_of_its_role(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = pair_cases(pairs_of(), tokenizer, blocks=[(1, 1)], n={"train": 100}, seed=0).table.to_pylist()
    said = defaultdict(set)
    for row in rows:
        for side in ("base", "source"):
            ids = tokenizer(row[f"{side}_prompt"])["input_ids"]
            (at,) = row[f"{side}_positions"]
            said[row["role"]].add(tokenizer.decode([ids[at]]))
            if row["role"] == "final":
                assert at == len(ids) - 1
    assert said["relation"] == {" lies"}
    assert said["final"] == {" in"}
    assert all(any(name.endswith(text.strip()) for name in CITIES) for text in said["subject_last"])
    assert all(any(name.startswith(text.strip()) for name in CITIES) for text in said["subject_first"])


def test_fewer_cases_come_where_the_pairs_give_no_more(tokenizer: PreTrainedTokenizerFast) -> None:
    n = {"train": 10**6, "validation": 0, "test": 5}
    pairs = [*pairs_of(), *pairs_of(), *pairs_of("validation")]
    rows = pair_cases(pairs, tokenizer, blocks=[(0, 0), (1, 1)], n=n, seed=0).table.to_pylist()
    assert {row["split"] for row in rows} == {"train"}
    cells = Counter((row["group"], row["role"], row["first_layer"]) for row in rows)
    assert set(cells.values()) == {1}
    assert len(cells) == 2 * len({(group, role) for group, role, _ in cells})


def test_a_pair_with_a_span_outside_its_text_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    good = pairs_of()
    bad = good[0]._replace(base=SubjectPrompt("Rome lies in", (0, 99)))
    made = pair_cases([bad, *good], tokenizer, blocks=[(0, 0)], n={"train": 5}, seed=0)
    assert [reason for _, reason in made.dropped] == [OUTSIDE]
    assert made.table.equals(pair_cases(good, tokenizer, blocks=[(0, 0)], n={"train": 5}, seed=0).table)


def test_two_prompts_with_two_truths_give_the_cases_of_the_first_pair_only(tokenizer: PreTrainedTokenizerFast) -> None:
    first, *others = pairs_of()
    again = first._replace(base=first.base._replace(truth="Lazio"), group="another")
    n = {"train": 10**6}
    made = pair_cases([first, again, *others, others[0]], tokenizer, blocks=[(0, 0), (1, 1)], n=n, seed=0)
    assert [reason for _, reason in made.dropped] == [REPEATED, REPEATED]
    rows = made.table.to_pylist()
    assert len({row["case_id"] for row in rows}) == len(rows)
    assert {row["base_truth"] for row in rows if row["base_prompt"] == first.base.text} == {"Italy"}
