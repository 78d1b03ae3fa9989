"""Only what the holder of a key signed is loaded: any change of name, version, files, labels or configuration shows."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from services.inference.models.model_store import ModelStore, Overrides
from services.inference.repository.repository import Directory, versions
from services.inference.repository.signatures import Signatures, SigningKeyError, UnsignedError, sign
from services.runtime.errors import InvalidArgumentError
from tests import models
from tests.unit.inference.loaded import open_model


def write_keys(folder, *keys):
    file = folder / "keys.pem"
    file.write_bytes(b"".join(_public(key) for key in keys))
    return file


def _public(key):
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def write_key(folder, key):
    file = folder / "key.pem"
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return file


KEY = Ed25519PrivateKey.generate()


@pytest.fixture
def repository(tmp_path):
    """A signed model."""
    folder = tmp_path / "models"
    models.mlp(folder)
    (folder / "mlp" / "labels.txt").write_text("cat\ndog\n")
    (folder / "mlp" / "config.pbtxt").write_text('output [{ name: "y" label_filename: "labels.txt" }]')
    (files,) = versions(folder, "mlp")
    sign(files, write_key(tmp_path, KEY))
    return folder


def check(repository, *keys, name="mlp"):
    (files,) = versions(repository, name)
    Signatures(write_keys(repository.parent, *(keys or (KEY,)))).check(files.hashed())


def test_what_one_of_the_keys_signed_is_taken(repository):
    check(repository)
    check(repository, Ed25519PrivateKey.generate(), KEY)


def change(path, data):
    path.write_bytes(data)


CHANGES = {
    "the model": lambda folder: change(folder / "1" / "model.onnx", b"other"),
    "another file": lambda folder: change(folder / "1" / "weights.bin", b"more"),
    "the labels": lambda folder: change(folder / "labels.txt", b"dog\ncat\n"),
    "the configuration": lambda folder: change(folder / "config.pbtxt", b"max_batch_size: 1"),
    "the version": lambda folder: ((folder / "1").rename(folder / "2"), (folder / "1.sig").rename(folder / "2.sig")),
    "warm-up data": lambda folder: ((folder / "warmup").mkdir(), change(folder / "warmup" / "x", b"x")),
    "the signature": lambda folder: change(folder / "1.sig", b"AAAA"),
    "no signature": lambda folder: (folder / "1.sig").unlink(),
    "a signature that is no text": lambda folder: change(folder / "1.sig", b"\xff" * 90),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_changed_is_refused(repository, change):
    change(repository / "mlp")
    with pytest.raises(UnsignedError, match=r"\.sig"):
        check(repository)


def test_a_signature_is_for_one_name(repository):
    shutil.copytree(repository / "mlp", repository / "other")
    with pytest.raises(UnsignedError):
        check(repository, name="other")


def test_what_somebody_else_signed_is_refused(repository):
    with pytest.raises(UnsignedError, match="by a key in RINGMESH_MODEL_KEYS"):
        check(repository, Ed25519PrivateKey.generate())


@pytest.mark.parametrize("text", [b"", b"no key", _public(ec.generate_private_key(ec.SECP256R1()))])
def test_a_file_without_keys_is_an_error(tmp_path, text):
    (tmp_path / "keys.pem").write_bytes(text)
    with pytest.raises(SigningKeyError, match=r"keys\.pem"):
        Signatures(tmp_path / "keys.pem")


def test_what_is_no_private_key_signs_nothing(repository):
    (files,) = versions(repository, "mlp")
    for file in (write_keys(repository.parent, KEY), Path("missing")):
        with pytest.raises(SigningKeyError):
            sign(files, file)


async def test_a_model_without_signature_is_not_loaded_and_the_others_are(repository):
    models.add_sub(repository)
    with ThreadPoolExecutor(1) as executor:
        signatures = Signatures(write_keys(repository.parent, KEY))
        store = ModelStore(Directory(repository), open_model, executor, signatures=signatures)
        await store.load_all()
        assert [held.model.name for held in store.held] == ["mlp"]
        reason = next(line.reason for line in await store.index() if line.name == "add_sub")
        assert "it is not signed" in reason
        uploaded = {"1/model.onnx": (repository / "add_sub" / "1" / "model.onnx").read_bytes()}
        for overrides in (Overrides("max_batch_size: 4", {}), Overrides("{}", uploaded)):
            with pytest.raises(InvalidArgumentError, match="sig"):
                await store.load("mlp", overrides)
        await store.close()
