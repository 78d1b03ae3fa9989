"""The floors of the bench stand on parts of the product, and fall with them."""

import pytest

from tests.bench import peers


@pytest.mark.parametrize("server", ["", "native", "grpcio"])
def test_an_echo_answers_as_many_bytes_as_it_was_told(tmp_path, server):
    with peers.echo("echo", tmp_path, 100, server) as echo:
        assert echo.response_bytes(b"any") == 100


def test_an_echo_behind_envelopes_answers_too(tmp_path):
    with peers.echo_behind_envelopes("echo", tmp_path, 100) as echo:
        assert echo.response_bytes(b"any") == 100
