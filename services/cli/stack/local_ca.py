"""A CA of this installation, for `ringmesh up --tls` without a certificate."""

from __future__ import annotations

import socket
from pathlib import Path

from services.cli.errors import CommandError
from services.runtime.rpc.tls import TlsFiles

CA = "ca.pem"


def issue(folder: Path, host: str) -> TlsFiles:
    """Writes a server certificate for this host and `host`; the CA in `folder` is made once. Raises CommandError."""
    try:
        import trustme
    except ImportError:
        raise CommandError("trustme is not installed: pip install 'ringmesh-server[tls]'") from None
    certificate, key = folder / CA, folder / "ca-key.pem"
    files = TlsFiles(folder / "server.pem", folder / "server-key.pem")
    names = {"localhost", "127.0.0.1", "::1", socket.gethostname(), host} - {"0.0.0.0", "::"}  # noqa: S104
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if certificate.exists():
            ca = trustme.CA.from_pem(certificate.read_bytes(), key.read_bytes())
        else:
            ca = trustme.CA(organization_name="Ringmesh", organization_unit_name=str(folder.absolute())[-64:])
            ca.private_key_pem.write_to_path(str(key))
            ca.cert_pem.write_to_path(str(certificate))
        issued = ca.issue_cert(*sorted(names))
        files.certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(files.key))
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot make a certificate in {folder}: {error}") from None
    return files
