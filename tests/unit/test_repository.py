import pytest

from services.inference.repository import RepositoryError, scan


def write(repository, name, version, data=b"model"):
    folder = repository / name / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(data)


def digest(repository):
    (files,) = scan(repository)
    return files.digest("CPUExecutionProvider")


def test_every_version_is_found_and_what_is_no_version_is_not(tmp_path):
    for name, version in (("b", "2"), ("a", "10"), ("a", "9"), ("a", "latest")):
        write(tmp_path, name, version)
    (tmp_path / "a" / "3").mkdir()
    (tmp_path / "README").touch()
    assert [(files.name, files.version) for files in scan(tmp_path)] == [("a", 9), ("a", 10), ("b", 2)]


@pytest.mark.parametrize("what", ["missing", "empty", "file"])
def test_a_repository_that_cannot_be_served_is_named(tmp_path, what):
    repository = tmp_path / "repository"
    if what == "empty":
        repository.mkdir()
    elif what == "file":
        repository.touch()
    with pytest.raises(RepositoryError, match=str(repository)):
        scan(repository)


def test_the_digest_is_the_same_for_the_same_files(tmp_path):
    write(tmp_path / "one", "m", "1")
    write(tmp_path / "two", "m", "1")
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert len(digest(tmp_path / "one")) == 16


def change_weights(folder):
    (folder / "m" / "1" / "model.onnx").write_bytes(b"other")


def add_external_data(folder):
    (folder / "m" / "1" / "weights.bin").write_bytes(b"w")


def add_config(folder):
    (folder / "m" / "config.pbtxt").write_text('name: "m"')


def rename(folder):
    (folder / "m").rename(folder / "n")


def renumber(folder):
    (folder / "m" / "1").rename(folder / "m" / "2")


@pytest.mark.parametrize("change", [change_weights, add_external_data, add_config, rename, renumber])
def test_whatever_can_change_an_answer_changes_the_digest(tmp_path, change):
    write(tmp_path, "m", "1")
    before = digest(tmp_path)
    change(tmp_path)
    assert digest(tmp_path) != before


def test_the_provider_is_part_of_the_digest(tmp_path):
    write(tmp_path, "m", "1")
    (files,) = scan(tmp_path)
    assert files.digest("CPUExecutionProvider") != files.digest("CUDAExecutionProvider")
