import numpy as np
import pyarrow as pa
import pytest

from ray_explain.errors import BadInput
from ray_explain.evaluation.embeddings import compared, sentence_encoder
from ray_explain.evaluation.grading import grade
from ray_explain.evaluation.metrics import scores

WORDS = ("cities", "of", "europe", "stock", "markets")


def bag(texts):
    """Counts of known words: its cosines can be worked out by hand."""
    return np.array([[text.split().count(word) for word in WORDS] for text in texts])


def feature(i, *right):
    return {"question_id": f"q{i}", "task": "features", "answer": right[0], "answers": list(right), "changed": None}


def test_an_answer_is_compared_with_the_nearest_right_description(questions, answers):
    asked = questions(feature(0, "cities of europe", "stock"), feature(1, "stock markets"), feature(2, "europe"))
    said = answers(asked, ["stock markets", "cities", ""])
    graded = compared(grade(asked, said, target="a", seed=0), asked, said, bag)
    assert graded["embedding"].to_pylist() == pytest.approx([1 / np.sqrt(2), 0, 0])
    rows = [row for row in scores(graded, seed=0, resamples=100).to_pylist() if row["metric"] == "embedding"]
    assert rows[0]["value"] == pytest.approx(1 / np.sqrt(2) / 3)


def test_answers_of_other_tasks_have_none_and_each_text_is_encoded_once(questions, answers):
    asked = questions({"question_id": "q0"}, feature(1, "stock"), feature(2, "stock"))
    said = answers(asked, ["x", "stock", "stock"])
    seen = []

    def encoder(texts):
        seen.extend(texts)
        return bag(texts)

    graded = compared(grade(asked, said, target="a", seed=0), asked, said, encoder)
    assert graded["embedding"].to_pylist() == pytest.approx([None, 1, 1])
    assert seen == ["stock"]


def test_answers_of_another_table_are_refused(questions, answers):
    asked, other = questions(feature(0, "stock")), questions(feature(1, "stock"))
    said = answers(asked, ["stock"])
    with pytest.raises(ValueError, match="1 graded answers are not among these"):
        compared(grade(asked, said, target="a", seed=0), other, said, bag)


def test_a_missing_library_is_told_with_the_way_out(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(BadInput, match=r"pip install 'ray_explain\[embedding\]'"):
        sentence_encoder("some/model")


def test_nothing_described_needs_no_encoder(questions, answers):
    asked = questions({"question_id": "q0"})
    said = answers(asked, ["x"])
    graded = grade(asked, said, target="a", seed=0)
    assert compared(graded, asked, said, bag).equals(graded) and isinstance(graded, pa.Table)


def test_a_local_sentence_model_compares_answers(questions, answers, tmp_path):
    """A tiny random one, written and read as sentence-transformers does; the metric is the cosine of what it says."""
    library = pytest.importorskip("sentence_transformers", reason="the extra `embedding` is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    made = library.SentenceTransformer(str(tmp_path / "bert"), device="cpu")  # with a pooling by means
    made.save(str(tmp_path / "sentences"))
    asked = questions(feature(0, "cities of europe", "stock"), feature(1, "stock markets"), feature(2, "europe"))
    said = answers(asked, ["stock markets", "stock markets", ""])
    encoder = sentence_encoder(str(tmp_path / "sentences"))
    graded = compared(grade(asked, said, target="a", seed=0), asked, said, encoder)
    a, b, c = made.encode(["stock markets", "cities of europe", "stock"])
    nearest = max(a @ right / np.linalg.norm(a) / np.linalg.norm(right) for right in (b, c))
    assert graded["embedding"].to_pylist() == pytest.approx([nearest, 1, 0], abs=1e-5)
    with pytest.raises(BadInput, match="no sentence model can be read there"):
        sentence_encoder(str(tmp_path / "nowhere"))


def test_where_nothing_is_right_nothing_is_near(questions, answers):
    asked = questions(feature(0, "stock"), feature(1, "") | {"answers": []})
    said = answers(asked, ["stock", "stock"])
    assert compared(grade(asked, said, target="a", seed=0), asked, said, bag)["embedding"].to_pylist() == [1, None]
