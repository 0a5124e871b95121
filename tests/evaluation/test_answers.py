import pytest

from ray_explain.evaluation.answers import Parsed, first_answer, normalise, parse
from ray_explain.questions import wordings


@pytest.mark.parametrize("name", wordings.SETS)
@pytest.mark.parametrize("changed", [True, False])
def test_every_wording_of_an_effect_is_read_back(name, changed):
    answer = wordings.wordings(name, "patching")[0].effect(changed, " New York")
    assert parse(answer, "patching") == Parsed("changed" if changed else "unchanged", "new york")


@pytest.mark.parametrize(
    "text",
    [
        "The output would remain unchanged from <<<Paris>>>.",
        "the output would remain unchanged from <<< paris >>> .",
        "  The output would remain  unchanged from <<<Paris>>>",
        "The output would remain unchanged\nfrom <<<paris>>> . ",
    ],
)
def test_case_spaces_beside_brackets_and_the_final_stop_make_no_difference(text):
    assert normalise(text) == "the output would remain unchanged from <<<paris>>>"
    assert parse(text, "ablation") == Parsed("unchanged", "paris")


@pytest.mark.parametrize("one, other", [("<<<a>>>", "<<<b>>>"), ("remain unchanged", "change"), ("a b", "ab")])
def test_texts_that_say_something_else_stay_different(one, other):
    assert normalise(one) != normalise(other)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris",
        "The output would remain unchanged from paris.",
        "The output would change to <<<paris",
        "It would change to <<<rome>>> or remain unchanged from <<<paris>>>.",
        "It would change to <<<rome>>> or change to <<<paris>>>.",
    ],
)
def test_an_answer_without_one_plain_verdict_cannot_be_read(text):
    assert parse(text, "patching") == Parsed(None, None)


@pytest.mark.parametrize("content", [">", "->", "a >> b", "<", "."])
def test_content_may_hold_brackets_of_its_own(content):
    assert parse(wordings.CHANGED.format(content=content), "patching") == Parsed("changed", content)


def test_content_may_be_white_space():
    assert parse("The output would remain unchanged from <<<\n>>>.", "patching") == Parsed("unchanged", "")


def test_a_description_has_no_verdict_and_an_empty_one_cannot_be_read():
    assert parse(" Names of  Cities. ", "features") == Parsed(None, "names of cities")
    assert parse(" . ", "features") == Parsed(None, None)


@pytest.mark.parametrize("after", ["\n\nGiven the text <<<The capital of", " at layers 1 replace", "\n", ""])
@pytest.mark.parametrize(
    "said", ["The output would remain unchanged from <<< Paris>>>.", "... change to <<<a > b>>> ."]
)
def test_who_goes_on_after_an_answer_has_said_the_answer(said, after):
    assert first_answer(f"\n {said}{after}") == said


@pytest.mark.parametrize("said", ["references to Paris", "text about <<< and >"])
def test_a_description_ends_with_its_line(said):
    assert first_answer(f"{said}\nWhat does V encode at layer 3?") == said
