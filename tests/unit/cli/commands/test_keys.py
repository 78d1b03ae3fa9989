"""Creating API keys."""

import pytest

from services.cli.commands import keys
from services.cli.errors import CommandError


@pytest.mark.parametrize(
    ("id", "tenant", "role", "message"),
    [
        (
            "a",
            "acme",
            "operate",
            "a key of a tenant may have the roles infer and read; operate and admin are for no tenant",
        ),
        ("a", "", "infr", "a role is one of infer, read, operate, admin"),
        ("", "", "infer", "id: String should have at least 1 character"),
    ],
)
def test_a_key_that_cannot_be_is_refused_in_plain_words(tmp_path, id, tenant, role, message):
    with pytest.raises(CommandError) as refused:
        keys.create(tmp_path / "keys.jsonl", id, tenant, [role], [], None)
    assert str(refused.value) == message


def test_an_id_that_the_file_has_is_refused(tmp_path):
    file = tmp_path / "keys.jsonl"
    keys.create(file, "app", "", ["infer"], [], None)
    before = file.read_text()
    with pytest.raises(CommandError, match=r"has a key 'app'; choose another id, such as app-2, or remove its line"):
        keys.create(file, "app", "other", ["read"], [], None)
    assert file.read_text() == before
    keys.create(file, "app-2", "", ["infer"], [], None)


def test_no_key_is_added_to_a_file_that_is_damaged(tmp_path):
    file = tmp_path / "keys.jsonl"
    file.write_text("{\n")
    with pytest.raises(CommandError, match="line 1"):
        keys.create(file, "app", "", ["infer"], [], None)
