from ray_explain.world.wordings import words_of


def test_brackets_are_single_words_and_braces_are_left_out():
    assert words_of("change to <<<{answer}>>>. It's") == ["change", "to", "<<<", ">>>", ".", "it", "'", "s"]
