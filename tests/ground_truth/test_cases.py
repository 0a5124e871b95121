import json
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from ray_explain.ground_truth import cases, counterfact, jsonl, pairs
from ray_explain.stages import Result

BLOCKS = [(0, 0), (1, 1), (2, 2)]
NAMES = [f"{first} {last}" for first in ("Emilio", "Eli", "Lily", "Tom", "Rome", "Ball") for last in ("Lussu", "Maor")]
FACTS = [
    {"template": "{} speaks", "subject": name, "target_true": f"French{i}", "target_new": "Dutch"}
    for i, name in enumerate(NAMES)
]


def written(folder: Path, lines: list[dict]) -> str:
    file = folder / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


def test_a_slice_of_the_cases_holds_few_different_prompts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path, n = written(tmp_path, FACTS), {"train": 30, "test": 9}
    made = cases.patching_cases(path, tokenizer, format="counterfact", n=n, blocks=BLOCKS, seed=0).table
    dealt = counterfact.counterfact_cases(path, tokenizer, blocks=BLOCKS, n=n).table
    assert made.sort_by("case_id").equals(dealt.sort_by("case_id"))  # the same cases, in another order
    bases = made["base_prompt"].to_pylist()
    assert len(bases) > 2 * len(set(bases)) > 6
    assert 1 + sum(a != b for a, b in pairwise(bases)) == len(set(bases))
    both = list(zip(bases, made["source_prompt"].to_pylist()))
    assert 1 + sum(a != b for a, b in pairwise(both)) == len(set(both))


def test_lines_of_one_prompt_come_together_wherever_they_stand(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lines = [
        {"base_prompt": f"{base} lies", "source_prompt": f"{source} lies", "base_span": [0, 1], "source_span": [0, 1]}
        for source in ("Ball", "Boat", "Lily")
        for base in ("Rome", "Hint")
    ]
    n = {"train": 99, "validation": 99, "test": 99}
    made = cases.patching_cases(written(tmp_path, lines), tokenizer, n=n, blocks=BLOCKS, seed=0).table
    assert made["base_prompt"].to_pylist() == ["Hint lies"] * 9 + ["Rome lies"] * 9


def test_pairs_of_prompts_that_come_again_are_left_out_by_design(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    again = [fact | {"target_new": "Latin"} for fact in FACTS]  # the same prompts and truths
    made = cases.patching_cases(
        written(tmp_path, FACTS + again), tokenizer, format="counterfact", n={"train": 30}, blocks=BLOCKS, seed=0
    )
    reasons = {reason for _, reason in made.dropped}
    assert pairs.REPEATED in reasons and reasons <= cases.BY_DESIGN


def test_a_table_with_one_case_twice_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = jsonl.ablation_cases
    path = written(tmp_path, [{"prompt": "Rome lies in Italy", "span": [0, 4], "split": "train"}])

    def twice(path: str, n: dict[str, int]) -> Result:
        made = good(path, n=n)
        return made._replace(table=made.table.take([0, 0]))

    monkeypatch.setattr(jsonl, "ablation_cases", twice)
    with pytest.raises(ValueError, match="was made 2 times"):
        cases.ablation_cases(path, tokenizer, n={"train": 9}, seed=0)
