import os

import numpy as np
import pytest

from ray_explain.explainer.vector_file import VectorFile


@pytest.fixture
def written() -> tuple[VectorFile, np.ndarray]:
    file, vectors = VectorFile(3), np.arange(15, dtype=np.float32).reshape(5, 3)
    assert [file.add(vectors[:2], 2), file.add(vectors[:0], 0), file.add(vectors[2:], 3)] == [
        slice(0, 2),
        slice(2, 2),
        slice(2, 5),
    ]
    file.flush()
    return file, vectors


def test_rows_are_those_that_were_added_also_after_the_file_is_gone(written):
    file, vectors = written
    rows = file.rows()
    file.remove()
    assert not os.path.exists(file.path)
    assert np.array_equal(rows, vectors) and not rows.flags.writeable


def test_another_process_counts_the_same_rows_and_maps_them(written):
    file, vectors = written
    other = VectorFile(3, keep=False)
    assert other.path is None and other.add(vectors[:0], 5) == slice(0, 5)
    assert np.array_equal(other.rows(file.path), vectors)
    other.remove()
    assert os.path.exists(file.path)


def test_a_file_of_another_length_is_not_taken(written):
    file, vectors = written
    other = VectorFile(3, keep=False)
    other.add(vectors[:0], 4)
    with pytest.raises(AssertionError):
        other.rows(file.path)


def test_no_vectors_are_no_file():
    assert VectorFile(3, keep=False).rows().shape == (0, 3)
