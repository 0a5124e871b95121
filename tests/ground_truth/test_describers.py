"""What is asked of a describer, what is taken for a description, and what happens when there is none."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_explain import records, storage
from ray_explain.endpoints import ENOUGH, Ask, Endpoint
from ray_explain.errors import JobFailed
from ray_explain.features.exemplars import projecting
from ray_explain.ground_truth.describers import (
    UNDESCRIBED,
    DescribeStage,
    EndpointModel,
    LocalModel,
    description_in,
    held_out,
    labelled,
    language_model,
    marked,
    shown,
)
from ray_explain.ground_truth.description_scores import ScoreStage, lists_of_numbers, numbers_in
from ray_explain.ground_truth.exemplars import EXEMPLARS


def window(kind, rank, words, activations):
    return {"kind": kind, "rank": rank, "tokens": [f" {word}" for word in words], "activations": activations}


def feature(number, word, n=12):
    """On where the word stands; top windows of falling activation, random ones without the word."""
    tops = [window("top", i, ["the", word, f"filler{i}"], [0.0, 9.0 - i / 2, 0.0]) for i in range(n)]
    off = [window("random", i, ["some", f"other{i}", "text"], [0.0, 0.0, 0.0]) for i in range(n)]
    own = {"case_id": f"f{number}", "group": f"g{number}", "split": "train", "layer": 1, "source": "sae"}
    return own | {"feature_id": number, "fired": n, "seen": 99, "windows": tops + off}


def table_of(features):
    return records.rows_table([dict.fromkeys(EXEMPLARS.names) | row for row in features], EXEMPLARS)


@pytest.fixture
def section(endpoint, tmp_path):
    return {
        "kind": "endpoint",
        "model": "m",
        "address": endpoint.address,
        "cache": str(tmp_path / "cache"),
        "pause": 0.01,
        "tries": 2,
        "timeout": 1.0,
    }


def whole(_, reply):
    return reply


def describing(section, candidates=1):
    return DescribeStage({"describer": section, "candidates": candidates})


def test_a_describer_sees_every_second_top_window_and_no_other(endpoint, section):
    endpoint.script = lambda prompt, n: "Description: dogs"
    made = describing(section)(table_of([feature(0, "dog")]))
    prompt = endpoint.asked[0][1]["messages"][-1]["content"]
    assert "the<< dog>> filler0" in prompt and "filler2" in prompt
    assert all(hidden not in prompt for hidden in ("filler1 ", "filler3", "other"))
    assert made.table["descriptions"].to_pylist() == [[{"description": "dogs", "origin": "m"}]]
    windows = feature(0, "dog")["windows"]
    assert {w["rank"] for w in shown(windows)}.isdisjoint(w["rank"] for w in held_out(windows) if w["kind"] == "top")
    assert len(shown(windows)) + len(held_out(windows)) == len(windows)


def test_windows_to_score_on_hold_each_text_once_and_none_that_a_describer_saw():
    words = [["the", "dog"], ["the", "dog"], ["a", "dog"], ["my", "dog"]]
    tops = [window("top", rank, own, [0.0, 1.0]) for rank, own in enumerate(words)]
    off = [window(kind, 0, own, [0.0]) for kind in ("random", "near") for own in (["cat"], [kind])]
    kept = [(one["kind"], "".join(one["tokens"])) for one in held_out(tops + off)]
    assert kept == [("top", " my dog"), ("random", " cat"), ("random", " random"), ("near", " near")]


def test_several_candidates_are_kept_once_each(endpoint, section):
    endpoint.script = lambda prompt, n: f"Description: dogs {n % 2}"
    made = describing(section | {"threads": 1}, candidates=3)(table_of([feature(0, "dog")]))
    assert [told["description"] for told in made.table["descriptions"][0].as_py()] == ["dogs 1", "dogs 0"]
    assert [asked[1]["temperature"] for asked in endpoint.asked] == [0.0, 0.7, 0.7]


@pytest.mark.parametrize("trouble", [429, 500, "", "I am sorry.\nI cannot do that.", b"garbage", 1.5])
def test_a_feature_without_a_description_is_dropped_and_counted_and_never_a_text(endpoint, section, trouble):
    endpoint.script = lambda prompt, n: trouble if "cat" in prompt else "Description: dogs"
    made = describing(section)(table_of([feature(0, "dog"), feature(1, "cat")]))
    assert made.table["case_id"].to_pylist() == ["f0"]
    assert made.dropped == [("f1", UNDESCRIBED)]
    counts = made.measured
    assert counts["unanswered"] == 1 and counts["asked"] == 2 and counts["calls"] == 3
    assert sum(n for name, n in counts.items() if name.startswith("failed: ")) == 2


def test_an_endpoint_that_answers_nothing_stops_the_job_so_that_it_can_go_on_later(endpoint, section):
    endpoint.script = lambda prompt, n: 503
    with pytest.raises(JobFailed, match=r"answered none of 9 requests \(18 x 503\); start again"):
        describing(section | {"timeout": 20.0})(table_of([feature(i, f"dog{i}") for i in range(9)]))


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("Description: references to dogs", "references to dogs"),
        ('  **Description:** "words for dogs"\n', "words for dogs"),
        ("Sure!\ndescription: dogs\nI hope this helps.", "dogs"),
        ("names of dogs", "names of dogs"),
        ("Sure!\nHere it is.", None),
        ("Description:", None),
        ("Description: ...", None),
        ("", None),
        ("dogs " * 200, None),
    ],
)
def test_what_is_taken_for_a_description(reply, said):
    assert description_in(reply) == said


def test_marks_stand_around_neighbouring_tokens_together_and_texts_on_one_line():
    one = window("top", 0, ["a", "b", "c", "d", "e\n"], [0.0, 8.0, 6.0, 1.0, 8.0])
    assert marked(one) == "a<< b c>> d<< e >>"


@pytest.mark.parametrize(
    ("reply", "numbers"),
    [
        ("[0, 3, 10]", [0.0, 3.0, 10.0]),
        ("```json\n[0, 2.5, 1]\n```", [0.0, 2.5, 1.0]),
        ("[0, 3]", None),
        ("[0, 3, 11]", None),
        ("[0, -1, 3]", None),
        ('[0, "3", 1]', None),
        ("[true, 0, 1]", None),
        ("0, 3, 10", None),
        ("[0, 3,", None),
    ],
)
def test_a_list_of_the_wrong_length_or_range_is_no_answer(reply, numbers):
    assert numbers_in(reply, length=3, top=10) == numbers


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def scoring(tmp_path, section):
    projecting(torch.eye(4), 1).save(tmp_path / "saes" / "layer_1")
    return {
        "source": "sae",
        "sae": None,
        "folder": str(tmp_path / "saes"),
        "vectors": None,
        "d_model": 4,
        "simulator": section,
        "detector": section,
        "gold_from": 0.2,
        "seed": 0,
    }


def described(features, texts):
    told = pa.array([[{"description": text, "origin": "m"} for text in own] for own in texts])
    return table_of(features).append_column("descriptions", told)


def knowing(prompt, n):
    """A simulator and a detector that take a description for the word to look for."""
    word = prompt.split("responds to: ")[1].split("\n")[0]
    if "numbered tokens" in prompt:
        tokens = [json.loads(line.split(": ", 1)[1]) for line in prompt.splitlines() if line[:1].isdigit()]
        return json.dumps([7 if token.strip() == word else 0 for token in tokens])
    texts = [line.split(". ", 1)[1] for line in prompt.splitlines() if line[:1].isdigit()]
    return json.dumps([int(word in text.split()) for text in texts])


def test_scores_tell_right_descriptions_from_wrong_ones_with_their_sign(endpoint, scoring):
    endpoint.script = knowing
    made = ScoreStage(scoring)(described([feature(2, "dog")], [["dog", "the", "moon"]]))
    right, opposite, silent = made.table["descriptions"][0].as_py()
    assert right["score"] > 0.95 and right["score_low"] > 0.9 and right["gold"]
    assert right["score_n"] == 6 + 12 and right["detection"] == 1.0 and right["detection_low"] < 1
    assert opposite["score"] < 0 and not opposite["gold"]
    assert silent["score"] is None and silent["score_n"] == 6 + 12 and silent["detection"] == 0.5 and silent["gold"]
    np.testing.assert_array_equal(made.table["vectors"][0].as_py(), [[0, 0, 1, 0]])


def test_what_could_not_be_scored_is_null_and_counted(endpoint, scoring):
    endpoint.script = lambda prompt, n: 500 if "moon" in prompt else knowing(prompt, n)
    made = ScoreStage(scoring)(described([feature(0, "dog"), feature(1, "cat")], [["dog"], ["moon"]]))
    assert [told[0]["score"] is None for told in made.table["descriptions"].to_pylist()] == [False, True]
    counts = made.measured
    assert counts["simulator: unanswered"] == 18 and counts["detector: unanswered"] == 1


def test_windows_of_one_length_that_a_model_cannot_count_do_not_end_the_work(endpoint, scoring):
    long = [window("random", i, ["some", f"long{i}", "text", "here"], [0.0] * 4) for i in range(ENOUGH)]
    hard = feature(0, "dog") | {"windows": feature(0, "dog")["windows"] + long}
    endpoint.script = lambda prompt, n: "[0, 0]" if "long" in prompt and "numbered" in prompt else knowing(prompt, n)
    made = ScoreStage(scoring)(described([hard, feature(1, "cat")], [["dog"], ["cat"]]))
    assert [told[0]["score"] is None for told in made.table["descriptions"].to_pylist()] == [True, False]


def test_of_a_feature_without_windows_nothing_is_asked_and_its_descriptions_stay_gold(endpoint, scoring):
    endpoint.script = knowing
    bare = feature(0, "dog") | {"windows": [], "fired": 0, "seen": 0}
    made = ScoreStage(scoring)(described([bare, feature(1, "cat")], [["dog"], ["cat"]]))
    (without,), (told,) = made.table["descriptions"].to_pylist()
    assert told["score"] > 0.95 and told["detection"] == 1
    assert without["gold"] and all(without[name] is None for name in ("score", "score_n", "detection", "detection_n"))
    assert not any("responds to: dog" in body["messages"][-1]["content"] for _, body, _ in endpoint.asked)


def test_a_feature_that_is_on_in_no_window_to_score_on_is_unscored_and_nothing_is_asked(endpoint, scoring):
    """No description of it could be right or wrong there: a correlation with zeros is no 0."""
    endpoint.script = knowing
    once = feature(0, "dog", n=1)  # its only window is shown to describers
    made = ScoreStage(scoring)(described([once, feature(1, "cat")], [["dog"], ["cat"]]))
    (alone,), (told,) = made.table["descriptions"].to_pylist()
    assert told["score"] > 0.95 and told["detection"] == 1
    assert alone["gold"] and all(alone[name] is None for name in ("score", "score_n", "detection", "detection_n"))
    assert not any("responds to: dog" in body["messages"][-1]["content"] for _, body, _ in endpoint.asked)


def test_directions_that_no_dictionary_holds_come_from_their_table(scoring, tmp_path):
    own = [feature(number, "dog") for number in (3, 0, 7)]
    vectors = np.arange(12, dtype=np.float32).reshape(3, 4)
    columns = {name: [row[name] for row in own] for name in ("case_id", "layer")}
    table = pa.table(columns | {"vectors": records.vectors_array(list(vectors[:, None]), 4)})
    storage.write_table(table, f"{tmp_path}/vectors/table.parquet")
    config = {**scoring, "vectors": f"{tmp_path}/vectors", "simulator": None, "detector": None}
    made = ScoreStage(config)(described([own[2], own[0]], [["dog"], ["dog"]]))
    assert made.table["vectors"].to_pylist() == [[vectors[2].tolist()], [vectors[0].tolist()]]


def test_descriptions_that_came_with_the_features_are_kept_in_their_order():
    told = [("f1", "cats", "b"), ("f0", "dogs", "a"), ("f1", "animals", "c")]
    rows = [
        {"case_id": case, "description": text, "origin": origin, "score": 0.5, "gold": True}
        for case, text, origin in told
    ]
    own = table_of([feature(i, "dog") for i in range(3)])
    made = labelled(own, records.rows_table(rows, records.DESCRIPTIONS))
    assert made.table["descriptions"].to_pylist() == [
        [{"description": "dogs", "origin": "a"}],
        [{"description": "cats", "origin": "b"}, {"description": "animals", "origin": "c"}],
    ]
    assert made.dropped == [("f2", UNDESCRIBED)]


def test_features_without_a_description_are_kept_where_answers_about_them_can_be_scored():
    cases = [("test", feature(0, "dog")), ("train", feature(1, "dog")), ("test", feature(2, "dog") | {"windows": []})]
    one = feature(3, "dog", n=1)
    cases.append(("test", one))  # a describer would have seen its only window
    own = table_of([row | {"split": split} for split, row in cases])
    made = labelled(own, records.DESCRIPTIONS.empty_table())
    assert (made.table["case_id"].to_pylist(), made.table["descriptions"].to_pylist()) == (["f0"], [[]])
    assert made.dropped == [(case, UNDESCRIBED) for case in ("f1", "f2", "f3")]


def test_without_simulator_and_detector_nothing_is_scored_and_all_is_gold(scoring):
    made = ScoreStage(scoring | {"simulator": None, "detector": None})(described([feature(0, "dog")], [["dog"]]))
    [told] = made.table["descriptions"][0].as_py()
    assert told["gold"] and told["score"] is None and told["detection"] is None


def test_a_list_that_does_not_fit_is_asked_for_again(endpoint, section):
    endpoint.script = lambda prompt, n: "[1, 1]" if n == 1 else "[1, 1, 0]"
    model = language_model(section)
    assert lists_of_numbers(model, [(Ask("a", max_tokens=5), 3)], 1) == [[1.0, 1.0, 0.0]]
    assert len(endpoint.asked) == 2


# -- local models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(world_target):
    model = AutoModelForCausalLM.from_pretrained(world_target).eval()
    return LocalModel(model, AutoTokenizer.from_pretrained(world_target), batch_size=3)


def test_a_local_models_replies_do_not_depend_on_the_other_requests(local):
    words = ("question", "options", "answer", "hint", "the")
    asks = [Ask("the " * i + word, max_tokens=6) for i, word in enumerate(words)]
    together = local.replies(asks, whole)
    assert together == [local.replies([ask], whole)[0] for ask in asks]
    assert len(set(together)) > 1


def test_a_local_models_samples_differ_from_each_other_and_not_from_run_to_run(local):
    asks = [Ask("question : the", max_tokens=8, temperature=1.0, sample=i) for i in range(4)]
    replies = local.replies(asks, whole)
    assert len(set(replies)) > 1 and local.replies(asks[::-1], whole) == replies[::-1]


def test_a_local_model_says_what_transformers_would(local, world_target):
    model = AutoModelForCausalLM.from_pretrained(world_target).eval()
    tokenizer = AutoTokenizer.from_pretrained(world_target)
    ids = tokenizer("question :\n", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert local.replies([Ask("question :", max_tokens=5)], whole) == [tokenizer.decode(out, skip_special_tokens=True)]


def test_a_plain_request_ends_in_no_end_of_text(local, world_target):
    tokenizer = AutoTokenizer.from_pretrained(world_target)
    end = ("the", tokenizer.convert_tokens_to_ids("the"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A the", special_tokens=[end])
    ids = LocalModel(local._model, tokenizer)._ids(Ask("question :", max_tokens=2))
    assert tokenizer.decode(ids).split() == ["question", ":"]


def test_a_chat_model_reads_the_request_as_a_chat(world_target):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world_target), AutoTokenizer.from_pretrained(world_target)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} . {% endfor %}{% if add_generation_prompt %}answer :{% endif %}"
    )
    ids = LocalModel(model, tokenizer)._ids(Ask("the question", max_tokens=2, system="hint"))
    assert tokenizer.decode(ids).split() == ["hint", ".", "the", "question", ".", "answer", ":"]


def test_a_chat_model_without_a_system_turn_still_reads_the_whole_request_and_does_not_think(world_target):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world_target), AutoTokenizer.from_pretrained(world_target)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{{ messages[0].content }} {% if enable_thinking is false %}answer :{% endif %}"
    )
    ids = LocalModel(model, tokenizer)._ids(Ask("the question", max_tokens=2, system="hint"))
    assert tokenizer.decode(ids).split() == ["hint", "the", "question", "answer", ":"]


def test_a_request_too_long_for_a_local_model_keeps_its_end(local):
    most = local._model.config.max_position_embeddings
    ids = local._ids(Ask("the " * most + "question", max_tokens=4))
    assert len(ids) == most - 4
    assert local.replies([Ask("the " * most, max_tokens=4)], lambda _, reply: reply or "-")[0]


def test_what_a_local_model_says_uselessly_is_undescribed(world_target):
    section = {"kind": "local", "path": str(world_target), "revision": None, "dtype": "float32", "batch_size": 4}
    made = DescribeStage({"describer": section, "candidates": 1})(table_of([feature(i, "the") for i in range(3)]))
    assert made.table.num_rows + len(made.dropped) == 3
    assert made.measured["asked"] == 1  # the three see the same windows


def test_endpoints_count_anew_for_every_slice(endpoint, section):
    endpoint.script = lambda prompt, n: "Description: dogs"
    model = EndpointModel(Endpoint(**{name: value for name, value in section.items() if name != "kind"}))
    model.replies([Ask("a", max_tokens=5)], whole)
    assert model.usage_so_far()["calls"] == 1
    assert model.usage_so_far() == {}
