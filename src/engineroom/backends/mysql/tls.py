"""TLS as MySQL's own client does it, in Python's terms: the same for both drivers."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

from ...errors import InvalidURL
from ..certificates import explained

MODE = "ssl_mode"
MODES = ("DISABLED", "PREFERRED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY")
ENCRYPTING = MODES[2:]
TEXTS = ("ssl_ca", "ssl_capath", "ssl_cert", "ssl_key", "ssl_key_password", "ssl_cipher")
AUTHORITIES = ("ssl_ca", "ssl_capath")
# What SQLAlchemy and PyMySQL call the same.
BY_NAME = ("ssl_check_hostname", "ssl_verify_identity")
FLAGS = ("ssl", "ssl_disabled", "ssl_verify_cert", *BY_NAME)


def mode_of(parameters: Mapping[str, Any], shown: str) -> str | None:
    """Return how much TLS is asked for; None where nothing tells.

    An authority means that the server is verified, and its name, as SQLAlchemy has it.

    Raises:
        InvalidURL: two parameters contradict each other.
    """
    asked = parameters.get(MODE) or _implied(parameters)
    if asked is None or asked == "VERIFY_IDENTITY":
        return asked
    vain = [name for name in BY_NAME if parameters.get(name)]
    if asked != "VERIFY_CA":
        vain += [name for name in AUTHORITIES if name in parameters]
        vain += ["ssl_verify_cert"] if parameters.get("ssl_verify_cert") else []
    if asked in ("DISABLED", "PREFERRED"):
        vain += [name for name in TEXTS if name in parameters]
    if vain:
        raise InvalidURL(
            f"{shown} has {vain[0]}=, which says nothing with {MODE}={asked}. Leave it out, or "
            f"write {MODE}=VERIFY_IDENTITY (or VERIFY_CA, without the server's name)."
        )
    return asked


def with_file(
    parameters: Mapping[str, Any], of_file: Mapping[str, str], mode: str | None
) -> dict[str, Any]:
    """Add what a file of options says of TLS to the URL's parameters, which count first.

    Of a file that serves others as well, a mode in the URL leaves out what it has no use for; and
    a socket of this machine needs none of it.

    Args:
        mode: Which the URL asks for.
    """
    if mode in ("DISABLED", "PREFERRED") or (mode is None and "unix_socket" in parameters):
        return dict(parameters)
    vain = AUTHORITIES if parameters.get(MODE) == "REQUIRED" else ()
    return {name: text for name, text in of_file.items() if name not in vain} | dict(parameters)


def make_context(parameters: Mapping[str, Any], mode: str) -> ssl.SSLContext:
    """Make what encrypts a connection, and verifies as much as a mode says.

    Without an authority of its own it trusts those of the machine.

    Raises:
        InvalidCertificate: a file cannot be read, or is none.
        InvalidURL: there is no such cipher.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = mode == "VERIFY_IDENTITY"
    context.verify_mode = ssl.CERT_REQUIRED if mode.startswith("VERIFY") else ssl.CERT_NONE
    authority, folder = (parameters.get(name) for name in AUTHORITIES)
    if authority or folder:
        with explained("ssl_ca" if authority else "ssl_capath", authority or str(folder)):
            context.load_verify_locations(authority, folder)
    elif context.verify_mode is ssl.CERT_REQUIRED:
        context.load_default_certs()
    if "ssl_cert" in parameters or "ssl_key" in parameters:
        certificate, key = parameters.get("ssl_cert"), parameters.get("ssl_key")
        password = parameters.get("ssl_key_password", "")
        with explained("ssl_cert", f"{certificate} with ssl_key={key}"):
            context.load_cert_chain(str(certificate), key, lambda: password)
    if "ssl_cipher" in parameters:
        try:
            context.set_ciphers(parameters["ssl_cipher"])
        except ssl.SSLError:
            raise InvalidURL(
                f"The URL has ssl_cipher={parameters['ssl_cipher']}, and OpenSSL has no cipher of "
                "that name here for TLS 1.2. Write one that `openssl ciphers` lists, or leave it "
                "out."
            ) from None
    return context


def _implied(parameters: Mapping[str, Any]) -> str | None:
    """Return the mode that the other parameters ask for."""
    if parameters.get("ssl_disabled") or parameters.get("ssl") is False:
        return "DISABLED"
    has_authority = any(name in parameters for name in AUTHORITIES)
    if parameters.get("ssl_verify_cert") is not False:
        by_name = [parameters[name] for name in BY_NAME if name in parameters]
        if any(by_name) or (not by_name and has_authority):
            return "VERIFY_IDENTITY"
        if parameters.get("ssl_verify_cert") or has_authority:
            return "VERIFY_CA"
    has_files = any(name in parameters for name in TEXTS)
    return "REQUIRED" if parameters.get("ssl") or has_files else None
