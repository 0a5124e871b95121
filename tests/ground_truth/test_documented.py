"""docs/ground_truth.md says what there is: its blocks run, its keys exist, its reasons are those that are counted."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ray_explain import records
from ray_explain.config import AblationConfig, GroundTruthConfig, PatchingConfig
from ray_explain.ground_truth import counterfact, jsonl, mmlu, outcomes, pairs, patching, positions, target
from ray_explain.ground_truth.positions import prompt_tokens
from ray_explain.interventions.hooks import Patch, capturing, replacing
from ray_explain.questions.asking import SPECIAL
from ray_explain.questions.patching import NO_WORDS

PAGE = (Path(__file__).parents[2] / "docs" / "ground_truth.md").read_text()
ALL = dict.fromkeys(records.SPLITS, 9)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_pages_code_runs_and_gives_what_hooks_give(
    config: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    (code,) = blocks("python")
    names: dict[str, Any] = {}
    exec(code.replace("meta-llama/Llama-3.1-8B", config["model"]), names)
    base, source = (torch.tensor([prompt_tokens(tokenizer, names[name]).ids]) for name in ("base", "source"))
    with torch.no_grad(), capturing(model, range(3)) as stream:
        model(source)
    assert sorted(names["answers"]) == [0, 1, 2]
    for layer, answer in names["answers"].items():
        vector = stream[layer][:, names["origin"]]
        with (
            torch.no_grad(),
            replacing(model, Patch(layer=layer, positions=torch.tensor([names["to"]]), values=vector)),
        ):
            assert answer == tokenizer.decode([int(model(base).logits[0, -1].argmax())])
    rest = torch.tensor([prompt_tokens(tokenizer, "The capital of").ids])
    with torch.no_grad():
        best = [int(model(ids).logits[0, -1].argmax()) for ids in (base, rest)]
    assert names["changed"] == (best[0] != best[1])


def test_the_pages_experiment_can_be_read() -> None:
    (text,) = blocks("yaml")
    truth = GroundTruthConfig.model_validate(yaml.safe_load(text)["ground_truth"])
    assert truth.patching is not None and truth.ablation is not None


def test_every_key_has_its_line() -> None:
    for section, fields in (("patching", PatchingConfig.model_fields), ("ablation", AblationConfig.model_fields)):
        table = PAGE.split(f"## `ground_truth.{section}`")[1].split("\n## ")[0]
        named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
        assert named == set(fields)


def test_the_pages_lines_give_cases(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    makers: list[Callable[[], Any]] = [
        lambda: jsonl.patching_cases(file, tokenizer, blocks=[(0, 0)], n=ALL),
        lambda: jsonl.ablation_cases(file, n=ALL),
    ]
    for lines, make in zip(blocks("json"), makers, strict=True):
        file.write_text(lines)
        made = make()
        assert (made.table.num_rows, made.dropped) == (2, [])


@pytest.mark.parametrize("module", [positions, target, jsonl, pairs, counterfact, mmlu, outcomes, patching])
def test_every_reason_is_told(module: Any) -> None:
    reasons = [
        value
        for name, value in vars(module).items()
        if re.fullmatch(r"(NOT?|UN|OUT|EMPTY|TOO|REP)\w+", name) and isinstance(value, str)
    ]
    assert reasons
    for reason in [*reasons, NO_WORDS, SPECIAL]:
        assert reason in PAGE
