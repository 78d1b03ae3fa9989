import os
from pathlib import Path

import pytest

from services.inference.repository.config import ModelConfig
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
    # No message can name these.
    (tmp_path / "line\nbreak").mkdir()
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
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
        (
            'default_model_filename: "net.onnx"',
            r"such as 1/net\.onnx; the folder 2 is ignored: it has no net\.onnx but model\.onnx; rename one, or set",
        ),
    ],
)
def test_why_no_version_is_served_is_said(tmp_path, config, said):
    for version in ("1", "2"):
        write(tmp_path, "a", version)
    (tmp_path / "a" / "config.pbtxt").write_text(config)
    with pytest.raises(RepositoryError, match=said):
        versions(tmp_path, "a")


def test_each_folder_that_is_no_version_is_ignored_with_one_warning(tmp_path, caplog):
    ignored = ("0", "01", "99999999999999999999", "-1", "1abc", "latest", "\u0663", "3")
    for version in ("1", "2", *ignored, "warmup", "initial_state", "configs", ".git"):
        write(tmp_path, "a", version)
    (tmp_path / "a" / "3" / "model.onnx").unlink()
    (tmp_path / "a" / "config.pbtxt").write_text("version_policy { all {} }")
    assert numbers(tmp_path, "a") == [1, 2]
    told = [record.getMessage() for record in caplog.records]
    assert sorted(told) == sorted(
        f"model a: the folder {name} is ignored: "
        + (
            "it is empty, without model.onnx"
            if name == "3"
            else "a version is a whole number from 1, of at most 18 digits, without leading zeros"
        )
        for name in ignored
    )


def link(path, target):
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def test_a_version_that_is_a_link_is_followed_by_the_fingerprint(tmp_path):
    for release in ("one", "two"):
        write(tmp_path / "releases", release, ".", data=release.encode())
        os.utime(tmp_path / "releases" / release / "model.onnx", (1, 1))
    models = tmp_path / "models"
    (models / "a").mkdir(parents=True)
    link(models / "a" / "1", tmp_path / "releases/one")
    link(models / "b", models / "a")
    before = Directory(models).fingerprint()
    assert len(before["a"]) == len(before["b"]) == 1
    link(models / "a" / "1", tmp_path / "releases/two")
    after = Directory(models).fingerprint()
    assert before["a"] != after["a"]
    write(tmp_path / "releases", "two", ".", data=b"2nd")
    assert len({before["a"], after["a"], Directory(models).fingerprint()["a"]}) == 3


def test_a_model_that_cannot_be_read_does_not_settle_and_the_others_do(tmp_path, monkeypatch):
    write(tmp_path, "a", "1")
    write(tmp_path, "b", "1")
    iterdir = Path.iterdir

    def refused(self):
        if self.name == "a":
            raise PermissionError(13, "Permission denied", str(self))
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", refused)
    one, other = (Directory(tmp_path).fingerprint() for _ in range(2))
    assert one["b"] == other["b"]
    assert one["a"] != other["a"]


def test_where_a_model_file_without_a_version_belongs_is_said(tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "net.onnx").touch()
    with pytest.raises(RepositoryError, match=r"no version of 'flat' to serve.*net\.onnx should be flat/1/model\.onnx"):
        versions(tmp_path, "flat")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("1/net.onnx", "the folder 1 is ignored: it has no model.onnx but net.onnx; rename one, or set default_model"),
        ("1/model.pt", "the folder 1 is ignored: it has no model.onnx but model.pt; only ONNX is served"),
        ("1/.part", "the folder 1 is ignored: it is empty, without model.onnx"),
        ("v1/model.onnx", "the folder v1 is ignored: a version is a whole number"),
    ],
)
def test_a_version_folder_that_holds_something_else_is_said(tmp_path, file, said):
    (tmp_path / "a" / file).parent.mkdir(parents=True)
    (tmp_path / "a" / file).touch()
    with pytest.raises(RepositoryError, match=said):
        versions(tmp_path, "a")


def test_a_model_in_place_of_a_repository_is_said(tmp_path):
    write(tmp_path, "a", "1")
    with pytest.raises(RepositoryError, match=f"{tmp_path}/a is a model; name the repository.*: {tmp_path}$"):
        Directory(tmp_path / "a").names()
    write(tmp_path / "numbers", "1", "1")
    assert Directory(tmp_path / "numbers").names() == ["1"]


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


def test_the_model_file_may_be_a_folder_with_the_file(tmp_path):
    write(tmp_path, "a", "1")
    (tmp_path / "a/1/model.onnx").rename(tmp_path / "a/1/file")
    (tmp_path / "a/1/model.onnx").mkdir()
    with pytest.raises(RepositoryError, match=r"it has no model\.onnx/model\.onnx"):
        versions(tmp_path, "a")
    (tmp_path / "a/1/file").rename(tmp_path / "a/1/model.onnx/model.onnx")
    assert versions(tmp_path, "a")[0].model == tmp_path / "a/1/model.onnx/model.onnx"
    (tmp_path / "a/1/model.onnx").rename(tmp_path / "outside")
    (tmp_path / "a/1/model.onnx").symlink_to(tmp_path / "outside")
    with pytest.raises(RepositoryError, match=r"model\.onnx is a link out of it"):
        versions(tmp_path, "a")


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


def label(folder):
    write_labels(folder / "m", 'label_filename: "labels.txt"', "cat")


@pytest.mark.parametrize(
    "change",
    [label, change_weights, add_external_data, add_config, say_what_is_the_default, rename, renumber],
)
def test_whatever_can_change_an_answer_changes_the_digest(tmp_path, change):
    write(tmp_path, "m", "1")
    before = digest(tmp_path)
    change(tmp_path)
    assert digest(tmp_path) != before


def write_labels(folder, field, labels):
    (folder / "config.pbtxt").write_text(f'output {{ name: "y" {field} }}')
    (folder / "labels.txt").write_text(labels)


def test_the_labels_are_part_of_the_digest(tmp_path):
    write(tmp_path, "m", "1")
    write_labels(tmp_path / "m", 'label_filename: "labels.txt"', "cat")
    before = digest(tmp_path)
    write_labels(tmp_path / "m", 'label_filename: "labels.txt"', "dog")
    assert digest(tmp_path) != before


@pytest.mark.parametrize("name", ["none.txt", "../labels.txt", "/etc/hostname", "link", "pipe", "1", "a\\000b"])
def test_labels_that_are_not_of_the_models_folder_are_refused(tmp_path, name):
    write(tmp_path, "m", "1")
    write_labels(tmp_path / "m", f'label_filename: "{name}"', "cat")
    (tmp_path / "labels.txt").touch()
    (tmp_path / "m" / "link").symlink_to(tmp_path / "labels.txt")
    os.mkfifo(tmp_path / "m" / "pipe")
    with pytest.raises(RepositoryError, match="label_filename"):
        versions(tmp_path, "m")


def test_a_configuration_cannot_choose_a_link_out_of_the_version(tmp_path):
    write(tmp_path, "m", "1")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "m/1/link").symlink_to(tmp_path / "secret")
    with pytest.raises(RepositoryError, match="no version"):
        versions(tmp_path, "m", ModelConfig(default_model_filename="link"))


def test_the_provider_is_part_of_the_digest(tmp_path):
    write(tmp_path, "m", "1")
    (files,) = versions(tmp_path, "m")
    assert files.digest("CPUExecutionProvider") != files.digest("CUDAExecutionProvider")
