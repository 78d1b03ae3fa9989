"""The secret of an installation: set, or generated once; and processes that would not find each other without one."""

import secrets
import stat
import threading

import pytest

from cache.settings import CacheSettings
from services.cli.errors import CommandError
from services.cli.stack.key_secret import key_secret
from services.runtime.rpc.server import StartError


@pytest.fixture(autouse=True)
def _no_secret(monkeypatch):
    monkeypatch.delenv("RINGMESH_KEY_SECRET", raising=False)


def test_each_installation_has_a_secret_of_its_own_and_keeps_it(tmp_path):
    first = key_secret(tmp_path / "one")
    assert len(bytes.fromhex(first)) == 32
    assert key_secret(tmp_path / "one") == first
    assert key_secret(tmp_path / "other") != first


def test_only_the_owner_can_read_it_and_nothing_else_is_left_there(tmp_path):
    key_secret(tmp_path)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_variable_wins_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("RINGMESH_KEY_SECRET", "ours")
    assert key_secret(tmp_path / "state") == "ours"
    assert not (tmp_path / "state").exists()


def test_two_that_start_at_once_have_the_same(tmp_path, monkeypatch):
    together = threading.Barrier(2)
    generate = secrets.token_hex

    def slow(size):
        together.wait(10)
        return generate(size)

    monkeypatch.setattr("services.cli.stack.key_secret.secrets.token_hex", slow)
    monkeypatch.setattr("services.cli.stack.key_secret.os.getpid", threading.get_ident)
    found = []
    threads = [threading.Thread(target=lambda: found.append(key_secret(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(set(found)) == 1


def test_a_file_that_cannot_be_used_is_an_error_that_names_it(tmp_path):
    (tmp_path / "key-secret").write_text("\n")
    with pytest.raises(CommandError, match="key-secret is empty"):
        key_secret(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="RINGMESH_KEY_SECRET"):
        key_secret(tmp_path / "file")


@pytest.mark.parametrize("shared", [{"redis_url": "redis://127.0.0.1:1"}, {"peer_regions": "eu=127.0.0.1:1"}])
def test_a_process_that_shares_answers_does_not_start_without_a_secret(shared):
    with pytest.raises(StartError, match="RINGMESH_KEY_SECRET is not set"):
        CacheSettings(**shared).secret()
    assert CacheSettings(**shared, key_secret="ours").secret() == "ours"


def test_a_process_that_shares_nothing_has_a_random_secret():
    settings = CacheSettings()
    assert len(settings.secret()) == 64
    assert settings.secret() != settings.secret()
