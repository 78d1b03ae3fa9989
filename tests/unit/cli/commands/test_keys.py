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
