"""TLS of a server, from PEM files that may be replaced while it runs."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

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
            for path in self._paths():
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
        reload = _Reload(self)
        return grpc.dynamic_ssl_server_credentials(
            self._read(),
            reload.configuration,  # type: ignore[arg-type] # None: nothing changed
            require_client_authentication=self.client_ca is not None,
        )

    def stamp(self) -> tuple[tuple[int, ...], ...]:
        """Changes if a file changes. Raises OSError."""
        status = [path.stat() for path in self._paths()]
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in status)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        self.check()
        ca = self.client_ca.read_bytes() if self.client_ca is not None else None
        return grpc.ssl_server_certificate_configuration([(self.key.read_bytes(), self.certificate.read_bytes())], ca)

    def _paths(self) -> list[Path]:
        return [self.certificate, self.key, *([self.client_ca] if self.client_ca is not None else [])]


class _Reload:
    """The configuration for the next connection. Files that do not fit together change nothing."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._seen: tuple[tuple[int, ...], ...] = ()

    def configuration(self) -> grpc.ServerCertificateConfiguration | None:
        """Returns None if nothing changed."""
        try:
            now = self._files.stamp()
            if now == self._seen:
                return None
            configuration = self._files._read()
            if self._files.stamp() != now:  # written meanwhile: the next connection tries again
                return None
        except (OSError, TlsError) as error:
            log.error("TLS certificates stay as they were: %s", error)
            return None
        self._seen = now
        log.info("TLS certificates were read again")
        return configuration
