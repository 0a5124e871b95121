from ray_explain.world.documents import span_of_words


def test_a_span_is_the_characters_of_its_words():
    words = ["the", "pet", "of", "dorin"]
    text = " ".join(words)
    for first, last in ((0, 0), (1, 2), (3, 3), (0, 3)):
        start, end = span_of_words(words, first, last)
        assert text[start:end] == " ".join(words[first : last + 1])
