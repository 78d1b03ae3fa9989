"""TLS of a server, from PEM files that may be replaced while it runs."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import grpc

from services.runtime.file_stamp import stamp

Value = TypeVar("Value")
log = logging.getLogger(__name__)


class TlsError(Exception):
    """A file cannot be used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: a certificate chain, its key, and the CAs of clients' certificates (None: clients need none)."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def check(self) -> None:
        """Raises TlsError unless the files can be read and the key is that of the certificate."""
        try:
            for path in self.paths():
                path.read_bytes()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # The password is asked for on the terminal otherwise.
            context.load_cert_chain(self.certificate, self.key, password=lambda: b"")
        except ssl.SSLError as error:
            raise TlsError(f"{self.certificate} and {self.key} are not a certificate and its key: {error}") from None
        except OSError as error:
            raise TlsError(f"cannot read {error.filename}: {error.strerror}") from None
        try:
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
        except ssl.SSLError as error:
            raise TlsError(f"{self.client_ca} has no certificates: {error}") from None

    def credentials(self) -> grpc.ServerCredentials:
        """Returns credentials that follow changes of the files: new connections get what is there. Raises TlsError."""
        followed = Followed(self, self._read, "TLS certificates")
        return grpc.dynamic_ssl_server_credentials(
            followed.value,
            lambda: followed.value if followed.follow() else None,  # type: ignore[arg-type, return-value]
            require_client_authentication=self.client_ca is not None,
        )

    def context(self) -> ssl.SSLContext:
        """Returns likewise what asyncio and uvicorn take. Raises TlsError."""
        followed = Followed(self, self._context, "TLS certificates")
        context = self._context()

        def follow(connection: ssl.SSLSocket | ssl.SSLObject, _name: str, _context: ssl.SSLContext) -> None:
            followed.follow()
            connection.context = followed.value

        context.sni_callback = follow
        return context

    def _context(self) -> ssl.SSLContext:
        self.check()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        # A resumed session would not look at certificates again, and TLS 1.2 resumes without tickets too.
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0
        if self.client_ca is not None:
            context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _read(self) -> grpc.ServerCertificateConfiguration:
        self.check()
        ca = self.client_ca.read_bytes() if self.client_ca is not None else None
        return grpc.ssl_server_certificate_configuration([(self.key.read_bytes(), self.certificate.read_bytes())], ca)

    def paths(self) -> list[Path]:
        """All of them."""
        return [self.certificate, self.key, *([self.client_ca] if self.client_ca is not None else [])]


class Followed(Generic[Value]):
    """The `value` that `read` makes of the files, made again when they change.

    Files that cannot be read or do not fit together change nothing, and the log says so of `what`.
    """

    def __init__(self, files: TlsFiles, read: Callable[[], Value], what: str) -> None:
        """Raises TlsError."""
        self._files, self._read, self._what = files, read, what
        self._seen = stamp(files.paths())
        self.value = read()

    def follow(self) -> bool:
        """Returns whether the value is a new one."""
        now = stamp(self._files.paths())
        if now == self._seen:
            return False
        try:
            value = self._read()
        except (OSError, TlsError) as error:
            log.error("%s stay as they were: %s", self._what, error)
            return False
        if stamp(self._files.paths()) != now:  # written meanwhile: to be read the next time
            return False
        self._seen, self.value = now, value
        log.info("%s were read again", self._what)
        return True
