"""What is said of a file of certificates or keys that cannot be used."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import InvalidCertificate


@contextmanager
def explained(name: str, path: str) -> Iterator[None]:
    """Say which parameter it is that names such a file, and why it cannot be used.

    Raises:
        InvalidCertificate: it cannot.
    """
    try:
        yield
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        why = getattr(error, "strerror", None) or str(error)
        if isinstance(error, ssl.SSLError):
            why = f"{error.reason or why}: see that it is PEM, and that the key belongs to it"
        raise InvalidCertificate(f"{name}={path} cannot be used: {why}.") from None
