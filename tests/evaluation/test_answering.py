import numpy as np
import pyarrow as pa
import pytest

from ray_explain import records
from ray_explain.errors import BadInput
from ray_explain.evaluation.answering import AnswerStage, SelfieStage, asked_schema
from ray_explain.explainer.baselines import untrained
from ray_explain.explainer.generate import Generation
from ray_explain.explainer.sidecar import save_explainer, sidecar_of
from ray_explain.models import load_model
from ray_explain.questions import wordings

D = 32
SIZES = {"max_new_tokens": 6, "batch_size": 4, "max_tokens": 60, "d_target": D}


@pytest.fixture
def place(world_target):
    return {"model": str(world_target), "revision": None, "dtype": "float32"}


@pytest.fixture
def asked():
    """Six questions in the same words about different vectors."""
    rng = np.random.default_rng(0)
    prompt = "what does <vector> at layer 0 encode ?"
    rows = [
        {
            **{name: f"{name} {i}" for name in ("question_id", "case_id", "group")},
            **{"split": "test", "task": "features", "prompt": prompt, "answer": "a", "answers": ["a"], "layers": [0]},
            **{"role": "", "stratum": "sae", "changed": None, "wording": "brief/features/1", "control": "none"},
        }
        for i in range(6)
    ]
    vectors = [3 * rng.standard_normal((1, D)).astype(np.float32) for _ in rows]
    columns = {
        field.name: records.vectors_array(vectors, D)
        if field.name == "vectors"
        else pa.array([row[field.name] for row in rows], field.type)
        for field in asked_schema(D)
    }
    return records.conform(pa.table(columns), asked_schema(D))


def stage(place, **config):
    return AnswerStage(SIZES | place | {"explainer": "x", "injection": {"scale": "mean_embedding"}} | config)


@pytest.fixture(scope="module")
def trained(world_target, tmp_path_factory):
    """Folder of an explainer of the target "t", trained on the words "brief" as they are now."""
    folder, loaded = tmp_path_factory.mktemp("explainer"), load_model(str(world_target))
    explainer, words = untrained(loaded.model, loaded.tokenizer, d_target=D), {"brief": wordings.version("brief")}
    of = {"target": "t", "target_revision": "1", "target_weights": "a1", "base": str(world_target), "wordings": words}
    save_explainer(explainer, folder, sidecar_of(explainer, loaded.tokenizer, **of), loaded.tokenizer)
    return {"explainer": "x", "folder": str(folder), "target": "t", "target_revision": "1"}


def test_an_explainer_answers_about_its_own_target_in_its_own_words(trained, asked):
    assert all(AnswerStage(SIZES | trained)(asked).table["n_tokens"].to_pylist())


@pytest.mark.parametrize(
    "other, said",
    [
        ({"target": "u"}, "has target 't', it cannot be used with 'u'"),
        ({"target_revision": "2"}, "has target_revision '1'"),
        ({"target_weights": "b2"}, "has target_weights 'a1', it cannot be used with 'b2'"),
        ({"d_target": 48}, "has d_target 32, it cannot be used with 48"),
    ],
)
def test_an_explainer_of_another_target_is_refused_with_what_differs(trained, other, said):
    with pytest.raises(BadInput, match=said):
        AnswerStage(SIZES | trained | other)


def test_questions_in_other_words_than_an_explainer_was_trained_on_are_refused(trained, asked):
    at = asked.column_names.index("wording")
    other = asked.set_column(at, asked.schema.field("wording"), pa.array(["paper/features/1"] * asked.num_rows))
    with pytest.raises(BadInput, match=r"was trained on wordings .* not on 'paper' of version"):
        AnswerStage(SIZES | trained)(other)


def logprobs(stage, table):
    return [row["logprob"] for row in stage(table).table.to_pylist()]


def test_answers_hang_on_the_vectors_and_without_vectors_on_the_words_alone(place, asked):
    assert len(set(np.round(logprobs(stage(place), asked), 4))) == 6
    assert len(set(np.round(logprobs(stage(place, text_only=True), asked), 4))) == 1


def test_a_question_longer_than_the_models_context_is_not_asked(place, asked):
    with_room = stage(place, max_tokens=10_000)
    at = asked.column_names.index("prompt")
    long = pa.array(["the " * 520 + "<vector>", *asked["prompt"].to_pylist()[1:]])
    answers = with_room(asked.set_column(at, asked.schema.field("prompt"), long)).table.to_pylist()
    assert answers[0]["logprob"] is None and all(answer["n_tokens"] for answer in answers[1:])


def test_selfie_answers_each_question_once_at_each_scale(place, asked):
    made = SelfieStage(place | {"d_target": D, "batch_size": 4, "scales": [1.0, 10.0], "brief": True})
    answers = made(asked).table
    assert answers.num_rows == 12 and not made(asked).dropped
    names = set(zip(answers["question_id"].to_pylist(), answers["explainer"].to_pylist()))
    assert names == {(f"question_id {i}", name) for i in range(6) for name in ("SelfIE x1", "SelfIE x10")}


def test_of_an_untrained_model_the_first_answer_counts_and_a_trained_one_is_taken_at_its_word(
    place, trained, asked, monkeypatch
):
    said = "The output would remain unchanged from <<<rome>>>. at layers 1 replace"
    monkeypatch.setattr(
        "ray_explain.evaluation.answering.generate",
        lambda _, prompts, *others, **sizes: [Generation(said, -1.0, 9)] * len(prompts),
    )
    first, whole = (made(asked).table["text"].to_pylist() for made in (stage(place), AnswerStage(SIZES | trained)))
    assert set(first) == {"The output would remain unchanged from <<<rome>>>."}
    assert set(whole) == {said}
