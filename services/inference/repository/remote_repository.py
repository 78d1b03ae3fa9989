"""A model repository in a bucket or behind a web server, cached on disk by content.

    <cache>/objects/<key>     files, each named by its content
    <cache>/models/<key>/<model>/...   the files of a model at one time, as hard links; never changed once made
    <cache>/partial/          downloads in progress; a complete download becomes an object

Workers of one host may share the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NoReturn

from blake3 import blake3

from services.inference.repository import config, repository
from services.inference.repository.config import ModelConfig
from services.inference.repository.repository import (
    CONFIG_FILE,
    MODEL_FILE,
    Fingerprint,
    NoSuchModelError,
    RepositoryError,
    RepositoryUnavailableError,
)
from services.runtime.redacted import without_credentials

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

SCHEMES = ("s3", "gs", "https")
# The output of `sha256sum` for every file, because web servers have no common format for listings.
INDEX = "SHA256SUMS"

_KEPT_SECONDS = 7 * 24 * 3600
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """A file of the repository. `etag` or `sha256` identifies its content. `size`: -1 if the listing does not say."""

    path: PurePosixPath
    size: int
    etag: str = ""
    sha256: str = ""

    def key(self, url: str) -> str:
        """Identifies the content. An etag is unique only together with URL and path."""
        return self.sha256 or blake3(f"{url}\n{self.path}\n{self.etag}\n{self.size}".encode()).hexdigest(32)


class RemoteRepository:
    """The models under an `s3://`, `gs://` or `https://` URL. Implements ModelSource, as Directory does."""

    private = True

    def __init__(self, url: str, cache: Path) -> None:
        """Raises RepositoryError if the URL is invalid, the extra is not installed or the cache cannot be written."""
        self._url = without_credentials(url).rstrip("/")
        self._cache = cache
        self._store = _connect(url)
        with self._full_disk():
            for folder in ("objects", "models", "partial"):
                (cache / folder).mkdir(parents=True, exist_ok=True)
        self._prune()

    def names(self) -> list[str]:
        found = sorted(self._listing())
        if not found:
            raise self._has_no_model()
        return found

    def _has_no_model(self) -> RepositoryError:
        return RepositoryError(f"no model in {self._url}: it should hold <model>/<version>/{MODEL_FILE}")

    def fingerprint(self) -> dict[str, Fingerprint]:
        """Path, size and content id of every file, by model. An empty listing may be one that is being written."""
        if not (listing := self._listing()):
            raise self._has_no_model()
        return {
            name: frozenset((str(found.path), found.size, found.etag or found.sha256) for found in objects)
            for name, objects in listing.items()
        }

    def fetch(self, name: str, override: ModelConfig | None) -> Path:
        """Downloads the versions that the model's policy selects, unless they are in the cache."""
        objects = self._listing(name).get(name, []) if repository.is_name(name) else []
        if not objects:
            raise NoSuchModelError(f"no model {name!r} in {self._url}")
        with self._locked():
            wanted = self._wanted(name, objects, override)
            keys = sorted((str(found.path), found.key(self._url)) for found in wanted)
            made = self._cache / "models" / blake3(repr(keys).encode()).hexdigest(32)
            with self._full_disk():
                if not made.exists():
                    self._make(made, wanted)
                os.utime(made)
        return made

    def _wanted(self, name: str, objects: list[_RemoteFile], override: ModelConfig | None) -> list[_RemoteFile]:
        """The objects without those of versions that are not served, which may be many and large."""
        path = PurePosixPath(name, CONFIG_FILE)
        configured = override
        if configured is None:
            configured = config.NOTHING
            for found in objects:
                if found.path == path:
                    text = self._download(found).read_bytes().decode("utf-8", "replace")
                    configured = config.parse(text, f"{self._url}/{path}", name)
        versions = {int(found.path.parts[1]) for found in objects if _is_of_version(found)}
        wanted = config.wanted_versions(configured, versions)
        return [found for found in objects if not _is_of_version(found) or int(found.path.parts[1]) in wanted]

    def _make(self, made: Path, objects: list[_RemoteFile]) -> None:
        with tempfile.TemporaryDirectory(dir=self._cache / "partial") as partial:
            for found in objects:
                target = Path(partial, "model", found.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(self._download(found), target)
            Path(partial, "model").rename(made)

    def _download(self, found: _RemoteFile) -> Path:
        """The path of an object in the cache, downloaded if needed. Cached objects are always complete."""
        target = self._cache / "objects" / found.key(self._url)
        if target.exists():
            os.utime(target)
            return target
        with self._full_disk(), tempfile.NamedTemporaryFile(dir=self._cache / "partial") as partial:
            hasher, size = hashlib.sha256(), 0
            for chunk in self._read(found):
                hasher.update(chunk)
                size += partial.write(chunk)
            if found.size not in (-1, size) or (found.sha256 and hasher.hexdigest() != found.sha256):
                raise RepositoryUnavailableError(
                    f"{self._url}/{found.path} is not what the listing says: it changed meanwhile, or came damaged"
                )
            partial.flush()
            os.fsync(partial.fileno())
            os.link(partial.name, target)
        return target

    def _read(self, found: _RemoteFile) -> Iterator[memoryview]:
        with _reported(f"{self._url}/{found.path}"):
            answer = self._store.get(str(found.path), options={"if_match": found.etag} if found.etag else None)
            for chunk in answer.stream(min_chunk_size=_CHUNK_BYTES):
                yield memoryview(chunk)

    def _listing(self, name: str | None = None) -> dict[str, list[_RemoteFile]]:
        listed = self._indexed() if self._url.startswith("https:") else self._listed(name)
        models: dict[str, list[_RemoteFile]] = {}
        for found in listed:
            # Skips files outside of model folders. Folders have no entries of their own.
            if len(found.path.parts) > 1 and repository.is_name(found.path.parts[0]):
                models.setdefault(found.path.parts[0], []).append(found)
        return models

    def _listed(self, name: str | None) -> Iterator[_RemoteFile]:
        with _reported(self._url):
            for chunk in self._store.list(name):
                for meta in chunk:
                    yield _RemoteFile(_path(meta["path"], self._url), meta["size"], etag=meta["e_tag"] or "")

    def _indexed(self) -> Iterator[_RemoteFile]:
        where = f"{self._url}/{INDEX}"
        with _reported(where):
            text = bytes(self._store.get(INDEX).bytes()).decode("utf-8", "replace")
        for number, line in enumerate(text.splitlines(), 1):
            match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
            if match is None:
                raise RepositoryError(f"{where}, line {number}: a line should be a SHA-256 and a path, as of sha256sum")
            yield _RemoteFile(_path(match[2], where), -1, sha256=match[1])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Admits one worker of the host at a time. The others then find its downloads in the cache."""
        with self._full_disk(), (self._cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RepositoryUnavailableError(
                f"cannot write the model cache at {self._cache}: {error.strerror}"
            ) from None

    def _prune(self) -> None:
        """Removes files that no worker has used for a week, and the leftovers of killed workers."""
        with self._locked():
            for path in _old((self._cache / "partial").iterdir(), 24 * 3600):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path in _old((self._cache / "models").iterdir(), _KEPT_SECONDS):
                shutil.rmtree(path)
            for path in _old((self._cache / "objects").iterdir(), _KEPT_SECONDS):
                if path.stat().st_nlink == 1:
                    path.unlink()


def _old(paths: Iterable[Path], seconds: float) -> list[Path]:
    return [path for path in paths if path.stat().st_mtime < time.time() - seconds]


def _is_of_version(found: _RemoteFile) -> bool:
    return len(found.path.parts) > 2 and repository.is_version(found.path.parts[1])


def _path(text: str, where: str) -> PurePosixPath:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text or not path.parts:
        raise RepositoryError(f"{where} lists {text!r}; a path lies under the repository")
    return path


def _connect(url: str) -> ObjectStore:
    try:
        from obstore.store import from_url
    except ImportError:
        raise RepositoryError(
            f"{without_credentials(url)} needs the extra `remote`, which is not installed: "
            "pip install 'ringmesh-server[remote]'"
        ) from None
    client: ClientConfig = {
        "connect_timeout": "5s",
        # A large model takes long to download, so only a stall is an error.
        "read_timeout": "30s",
        "timeout": "1day",
        # Takes effect only if a variable such as AWS_ENDPOINT_URL has an http:// URL.
        "allow_http": not url.startswith("https:"),
    }
    retry: RetryConfig = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}
    with _reported(without_credentials(url)):
        store: ObjectStore = from_url(url, client_options=client, retry_config=retry)
        return store


@contextmanager
def _reported(where: str) -> Iterator[None]:
    """Maps errors of the library to RepositoryUnavailableError with a message of one line."""
    import obstore.exceptions

    try:
        yield
    except FileNotFoundError:
        raise RepositoryUnavailableError(f"cannot read {where}: 404 Not Found") from None
    except (obstore.exceptions.BaseError, OSError, ValueError) as error:
        _raise(where, str(error))


def _raise(where: str, text: str) -> NoReturn:
    """Raises RepositoryUnavailableError with a short cause.

    The library's text has the request, then the cause. Details are in S3's XML or in the debug part.
    """
    first, _, debug = text.partition("\n\nDebug source:")
    cause = re.sub(r"(?s)^.* in [0-9.]+\S?s(, after [^-]*)? - (Server returned non-2xx status code: )?", "", first)
    cause = cause.partition("\n")[0].partition(": <")[0]
    code = re.search(r"<Code>(\w+)</Code>", text)
    behind = re.search(r'(?:message|error): "([^"]+)"|InvalidCertificate\(\s*(\w+)', debug)
    if detail := code[1] if code else (behind[1] or f"certificate: {behind[2]}") if behind else "":
        cause = f"{cause} ({detail})"
    raise RepositoryUnavailableError(f"cannot read {where}: {cause}")
