import pytest

from ray_explain import records
from ray_explain.questions import wordings


def test_the_papers_words_are_as_they_were_published():
    first = wordings.wordings("paper", "patching")[0]
    assert first.id == "paper/patching/1"
    assert first.template == (
        "If feature {vectors} at layer {layers} is added to tokens {tokens} when processing the text <<<{input}>>>, "
        "how would the output change?\n"
    )
    assert [len(wordings.wordings("paper", task)) for task in ("patching", "ablation", "features")] == [5, 1, 6]
    assert [len(wordings.wordings("paper_qwen", task)) for task in ("patching", "ablation", "features")] == [5, 1, 5]
    assert wordings.wordings("paper", "features")[0].template == "At layer {layers}, {vectors} encodes "
    assert first.effect(True, " Hamas") == "The most likely output would change to <<< Hamas>>>."
    assert first.effect(False, " Hamas") == "The output would remain unchanged from <<< Hamas>>>."


def test_chat_explainers_get_the_same_patching_words_without_the_new_line_that_base_explainers_need():
    base, chat = wordings.wordings("paper", "patching"), wordings.wordings("paper_chat", "patching")
    assert [each.template for each in base] == [each.template + "\n" for each in chat]


def test_brief_words_stand_apart_and_answers_are_trimmed():
    (brief,) = wordings.wordings("brief", "patching")
    assert brief.numbers([0, 1]) == "0 1"
    assert brief.vectors(2) == "<vector> <vector>"
    assert brief.tokens([" lives", "in "]) == "lives in"
    assert brief.effect(True, " paris ") == "The most likely output would change to <<<paris>>>."


def test_lists_in_the_papers_words_have_commas_and_tokens_keep_their_space():
    (paper, *_) = wordings.wordings("paper", "patching")
    assert paper.numbers([8, 9, 10]) == "8, 9, 10"
    assert paper.tokens([" Paris"]) == "< Paris>"
    assert paper.vectors(1) == wordings.VECTOR


def test_a_cases_wording_depends_on_its_id_and_the_seed_alone_and_all_are_drawn():
    draw, again = wordings.drawing("paper", "patching", 3), wordings.drawing("paper", "patching", 3)
    ids = [f"case {i}" for i in range(500)]
    assert [draw(i) for i in ids] == [again(i) for i in ids]
    other = wordings.drawing("paper", "patching", 4)
    assert [draw(i) for i in ids] != [other(i) for i in ids]
    counts = [sum(draw(i).id.endswith(f"/{k}") for i in ids) for k in range(1, 6)]
    assert sum(counts) == 500 and min(counts) > 60


def test_a_sets_version_changes_with_a_byte_of_its_words(monkeypatch):
    before = {name: wordings.version(name) for name in wordings.SETS}
    assert len(set(before.values())) == len(wordings.SETS)
    templates = {**wordings._TEMPLATES, "brief": {**wordings._TEMPLATES["brief"], "ablation": ("{prompt} then ?",)}}
    monkeypatch.setattr(wordings, "_TEMPLATES", templates)
    assert wordings.version("brief") != before["brief"]
    assert wordings.version("paper") == before["paper"]


@pytest.mark.parametrize("name", wordings.SETS)
def test_every_set_asks_about_every_task_with_a_mark_for_each_vector(name):
    for task in records.TASKS:
        for wording in wordings.wordings(name, task):
            fields = dict.fromkeys(("layers", "positions", "tokens", "input", "prompt"), "x")
            prompt = wording.prompt(vectors=wording.vectors(2), **fields)
            assert prompt.count(wordings.VECTOR) == (0 if task == "ablation" else 2)


def test_an_unknown_set_or_task_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match="'short': there is paper, paper_chat, paper_qwen, brief"):
        wordings.wordings("short", "patching")
    with pytest.raises(ValueError, match="'steering': there is patching, ablation, features"):
        wordings.wordings("brief", "steering")
