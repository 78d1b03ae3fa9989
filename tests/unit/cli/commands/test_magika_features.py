"""Features are the ones that magika itself would give to its model."""

import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cli.commands.magika_features import MagikaFeatures, model_folder

magika = pytest.importorskip("magika")
OURS = MagikaFeatures.load(model_folder())
THEIRS = magika.Magika()

space = st.sampled_from([b"", b" ", b"\n\t \r", b" " * 1023, b" " * 1024, b"\n" * 4096, b" " * 5000])
size = st.sampled_from([0, 1, 7, 8, 9, 1023, 1024, 1025, 2047, 2048, 4095, 4096, 4097, 9000])
content = st.builds(lambda length, seed: (seed * length)[:length], size, st.binary(min_size=1))


@given(space, content, space, content, space)
def test_features_are_magikas(before, first, between, second, after):
    data = before + first + between + second + after
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        ours = OURS.extract(Path(file.name))
    result, features = THEIRS._get_result_or_features_from_seekable(magika.magika.Seekable(io.BytesIO(data)))
    if ours is None:
        assert result is not None
    else:
        assert ours.dtype == "int32"
        assert ours.shape == (1, 2048)
        assert ours[0].tolist() == features.beg + features.end


def test_there_is_a_label_for_every_score():
    assert len(OURS.labels) == len(set(OURS.labels)) == 214
