"""`ringmesh sign`, and what a worker with RINGMESH_MODEL_KEYS loads."""

import json
import os
import subprocess

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests import models
from tests.system.conftest import RINGMESH
from tests.unit.inference.repository.test_signatures import write_key, write_keys


def run(*arguments, **settings):
    environment = {**os.environ, **{f"RINGMESH_{name.upper()}": str(value) for name, value in settings.items()}}
    return subprocess.run(
        [*RINGMESH, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120
    )


def test_models_that_were_signed_are_served_and_others_say_why_not(tmp_path):
    key = Ed25519PrivateKey.generate()
    keys, repository = write_keys(tmp_path, key), tmp_path / "models"
    models.mlp(repository)
    signed = run("sign", repository, "--key", write_key(tmp_path, key))
    assert signed.stdout.split() == [str(repository / "mlp" / "1.sig")], signed.stderr
    models.add_sub(repository)
    checked = json.loads(run("check", repository, "--json", model_keys=keys).stdout)["models"]
    errors = {model["name"]: model["error"] for model in checked}
    assert errors["mlp"] == ""
    assert "it is not signed" in errors["add_sub"]


def test_a_key_that_cannot_be_used_is_said_in_one_line(tmp_path):
    models.mlp(tmp_path / "models")
    done = run("sign", tmp_path / "models", "--key", tmp_path / "missing")
    assert done.returncode == 2
    assert "no private key" in done.stderr
    done = run("check", tmp_path / "models", model_keys=tmp_path / "missing")
    assert done.returncode == 2
    assert "RINGMESH_MODEL_KEYS" in done.stderr
