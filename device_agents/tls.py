"""TLS of the link: a context from the settings, and how long the device's certificate is still good."""

from __future__ import annotations

import ssl
import time
from pathlib import Path

from device_agents.settings import TlsSettings
from edge_adapt.errors import ConfigError

IGNORE_DATES = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, which the ssl module does not name
DAY_S = 86_400.0


class _Tidy(ssl.SSLSocket):
    """Closes itself when the handshake fails; paho would leave it open."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


def tls_context(tls: TlsSettings, *, clock_unset: bool) -> ssl.SSLContext:
    """TLS 1.2 or newer; the broker's name and its chain to our authority are checked.

    Args:
        clock_unset: the wall clock is wrong. Then, and only if the settings allow it, the dates of the broker's
            certificate are not looked at; all else is.
    Raises: ConfigError if a file is missing or is no PEM.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = _Tidy
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if clock_unset and tls.accept_wrong_clock:
        context.verify_flags |= IGNORE_DATES
    try:
        context.load_verify_locations(tls.ca)
        if tls.certificate is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(str(file) for file in (tls.ca, tls.certificate, tls.key) if file is not None)
        raise ConfigError(
            f"a file of `mqtt.tls` cannot be used: {error} ({files})", remedy="expected readable PEM files"
        ) from error
    return context


def days_left(certificate: Path, *, now_s: float | None = None) -> float:
    """Days until a certificate expires; negative afterwards. Raises: ConfigError if it cannot be read."""
    try:
        from cryptography import x509  # only where there is a certificate: a start waits for it

        end = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    except (OSError, ValueError) as error:
        raise ConfigError(f"the certificate {certificate} cannot be read: {error}", remedy="expected PEM") from error
    return (end.timestamp() - (time.time() if now_s is None else now_s)) / DAY_S
