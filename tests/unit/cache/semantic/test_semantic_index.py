import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cache.semantic import semantic_index
from cache.semantic.semantic_index import SemanticIndex

VECTORS = st.lists(
    arrays(np.float32, 3, elements=st.floats(-2, 2, width=32)).filter(lambda v: np.linalg.norm(v) > 0.1),
    min_size=1,
    max_size=20,
)


@given(VECTORS, st.data())
def test_the_nearest_is_the_one_with_the_largest_cosine(vectors, data):
    index = SemanticIndex()
    for number, vector in enumerate(vectors):
        index.add(b"g", vector, b"%d" % number)
    asked = data.draw(st.sampled_from(vectors)) * np.float32(3)
    near = index.nearest(b"g", asked)
    cosines = [float(v @ asked / np.linalg.norm(v) / np.linalg.norm(asked)) for v in vectors]
    assert near.similarity == pytest.approx(max(cosines), abs=1e-5)
    assert near.similarity == pytest.approx(1, abs=1e-5)
    assert cosines[int(near.key)] == pytest.approx(max(cosines), abs=1e-5)


def test_groups_and_lengths_are_never_compared():
    index = SemanticIndex()
    index.add(b"g", np.ones(3), b"k")
    assert index.nearest(b"h", np.ones(3)) is None
    assert index.nearest(b"g", np.ones(4)) is None


@pytest.mark.parametrize("vector", [np.zeros(3), np.array([1, np.inf, 0]), np.array([1, np.nan, 0]), np.zeros(0)])
def test_a_vector_without_direction_is_near_nothing(vector):
    index = SemanticIndex()
    index.add(b"g", vector, b"k")
    assert index.nearest(b"g", np.ones(vector.size)) is None
    index.add(b"g", np.ones(3), b"k")
    assert vector.size != 3 or index.nearest(b"g", vector) is None


def test_the_oldest_make_room(monkeypatch):
    monkeypatch.setattr(semantic_index, "_MOST_VECTORS", 3)
    monkeypatch.setattr(semantic_index, "_MOST_GROUPS", 2)
    index = SemanticIndex()
    vectors = np.eye(4)
    for number, vector in enumerate(vectors):
        index.add(b"g", vector, b"%d" % number)
        index.add(b"g", vector, b"%d" % number)
    assert index.nearest(b"g", vectors[0]).similarity == 0
    assert index.nearest(b"g", vectors[3]) == (b"3", 1.0)
    for group in (b"h", b"i"):
        index.add(group, vectors[0], b"k")
    assert index.nearest(b"g", vectors[3]) is None
