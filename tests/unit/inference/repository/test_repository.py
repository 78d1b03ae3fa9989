import pytest

from services.inference.repository.repository import Directory, RepositoryError, versions


def write(repository, name, version, data=b"model"):
    folder = repository / name / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(data)


def digest(repository):
    (name,) = Directory(repository).names()
    (files,) = versions(repository, name)
    return files.digest("CPUExecutionProvider")


def numbers(repository, name):
    return [files.version for files in versions(repository, name)]


def test_models_are_folders(tmp_path):
    write(tmp_path, "b", "2")
    write(tmp_path, "a", "1")
    (tmp_path / "README").touch()
    (tmp_path / ".git").mkdir()
    assert Directory(tmp_path).names() == ["a", "b"]


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ("", [10]),
        ("version_policy { latest { num_versions: 2 } }", [9, 10]),
        ("version_policy { all {} }", [2, 9, 10]),
        ("version_policy { specific { versions: [2, 10, 11] } }", [2, 10]),
    ],
)
def test_the_policy_chooses_among_the_versions_on_disk(tmp_path, policy, served):
    for version in ("2", "10", "9", "latest"):
        write(tmp_path, "a", version)
    (tmp_path / "a" / "30").mkdir()
    if policy:
        (tmp_path / "a" / "config.pbtxt").write_text(policy)
    assert numbers(tmp_path, "a") == served


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("version_policy { specific { versions: [7] } }", "version_policy selects none of 1, 2$"),
        ('default_model_filename: "net.onnx"', r"has no version, such as 1/net\.onnx$"),
    ],
)
def test_why_no_version_is_served_is_said(tmp_path, config, said):
    for version in ("1", "2"):
        write(tmp_path, "a", version)
    (tmp_path / "a" / "config.pbtxt").write_text(config)
    with pytest.raises(RepositoryError, match=said):
        versions(tmp_path, "a")


@pytest.mark.parametrize("name", ["nobody", "..", "a/1", ""])
def test_a_name_that_is_no_model_is_refused(tmp_path, name):
    write(tmp_path, "a", "1")
    with pytest.raises(RepositoryError):
        versions(tmp_path, name)


def test_the_model_file_may_have_another_name(tmp_path):
    write(tmp_path, "a", "1")
    (tmp_path / "a" / "config.pbtxt").write_text('default_model_filename: "net.onnx"')
    with pytest.raises(RepositoryError, match=r"net\.onnx"):
        versions(tmp_path, "a")
    (tmp_path / "a" / "1" / "model.onnx").rename(tmp_path / "a" / "1" / "net.onnx")
    assert versions(tmp_path, "a")[0].model.name == "net.onnx"


@pytest.mark.parametrize("what", ["missing", "empty", "file"])
def test_a_repository_that_cannot_be_served_is_named(tmp_path, what):
    repository = tmp_path / "repository"
    if what == "empty":
        repository.mkdir()
    elif what == "file":
        repository.touch()
    with pytest.raises(RepositoryError, match=str(repository)):
        Directory(repository).names()


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


def say_what_is_the_default(folder):
    (folder / "m" / "config.pbtxt").write_text("max_batch_size: 0")


def rename(folder):
    (folder / "m").rename(folder / "n")


def renumber(folder):
    (folder / "m" / "1").rename(folder / "m" / "2")


@pytest.mark.parametrize(
    "change",
    [change_weights, add_external_data, add_config, say_what_is_the_default, rename, renumber],
)
def test_whatever_can_change_an_answer_changes_the_digest(tmp_path, change):
    write(tmp_path, "m", "1")
    before = digest(tmp_path)
    change(tmp_path)
    assert digest(tmp_path) != before


def test_the_provider_is_part_of_the_digest(tmp_path):
    write(tmp_path, "m", "1")
    (files,) = versions(tmp_path, "m")
    assert files.digest("CPUExecutionProvider") != files.digest("CUDAExecutionProvider")
