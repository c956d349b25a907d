"""TLS as libpq does it, in Python's terms: for drivers that do not speak libpq."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Mapping
from pathlib import Path

from ...errors import InvalidCertificate
from ..certificates import explained
from .parameters import SYSTEM, read_limits
from .sources import in_home

FOLDER = Path(".postgresql")  # in the home directory
FILES = {  # and what libpq calls them in that folder
    "sslcert": "postgresql.crt",
    "sslkey": "postgresql.key",
    "sslrootcert": "root.crt",
    "sslcrl": "root.crl",
}
VERIFIES = ("verify-ca", "verify-full")
OWNERS_ONLY, ROOTS = 0o077, 0o027  # what a key's file must not let others do
PROTOCOL = "postgresql"  # for ALPN
BUNDLES = (
    "ca-certificates.crt",
    "ca-bundle.crt",
)  # in the folder of authorities, as systems have it


def uses_files(parameters: Mapping[str, str]) -> bool:
    """Whether a file is named, or needed: then it has to be there."""
    mode = parameters.get("sslmode", "prefer")
    return mode in VERIFIES or (mode != "disable" and any(name in parameters for name in FILES))


def find_files(parameters: Mapping[str, str]) -> dict[str, str]:
    """Return the files of certificates and keys: those that are named, else libpq's if they exist.

    Raises:
        InvalidCertificate: one that is named cannot be read, or a key may be read by others.
    """
    files: dict[str, str] = {}
    for name, default in FILES.items():
        path = in_home(FOLDER / default)
        if named := parameters.get(name):
            files[name] = named
            if named != SYSTEM or name != "sslrootcert":
                with explained(name, named), Path(named).open("rb"):
                    pass
        elif path is not None and os.access(path, os.R_OK):
            files[name] = str(path)
    if "sslkey" in files and "sslcert" in files:
        _mind_key(files["sslkey"])
    return files


def is_home_closed() -> bool:
    """Whether this user may not look for files in HOME, which is another's: drivers fail there."""
    try:
        os.stat(in_home(FOLDER / FILES["sslkey"]) or os.devnull)  # noqa: PTH116
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def find_authorities() -> str | None:
    """Return the file of the authorities that this machine trusts; None where OpenSSL finds them.

    For a libpq that came in a wheel brings an OpenSSL that looks where that wheel was built, so
    nobody is trusted, unless the environment says where to look.
    """
    paths = ssl.get_default_verify_paths()
    if os.environ.get(paths.openssl_cafile_env) or os.environ.get(paths.openssl_capath_env):
        return None
    folder = Path(paths.capath or os.devnull)
    bundles = [paths.cafile, *(str(folder / name) for name in BUNDLES)]
    return next((path for path in bundles if path and os.access(path, os.R_OK)), None)


def make_context(parameters: Mapping[str, str]) -> ssl.SSLContext:
    """Make what encrypts a connection, and verifies as much as `sslmode` says.

    Raises:
        InvalidCertificate: a file cannot be read or is none, or what verifies needs is missing.
    """
    files, mode = find_files(parameters), parameters.get("sslmode", "prefer")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols([PROTOCOL])
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    roots = files.get("sslrootcert")
    if roots == SYSTEM:
        context.load_default_certs()
    elif roots is not None:
        with explained("sslrootcert", roots):
            context.load_verify_locations(roots)
    elif mode in VERIFIES:
        raise InvalidCertificate(
            f"sslmode={mode} verifies the server, and there is no certificate to do it with: "
            f"sslrootcert= is not given, and {Path('~') / FOLDER / FILES['sslrootcert']} does "
            "not exist. Name the provider's file, or write sslrootcert=system for the "
            "authorities that this machine trusts."
        )
    if roots is not None:  # with `require`, too: libpq verifies where it can
        context.verify_mode = ssl.CERT_REQUIRED
        context.check_hostname = mode == "verify-full"
    if "sslcrl" in files and roots is not None:
        with explained("sslcrl", files["sslcrl"]):
            context.load_verify_locations(files["sslcrl"])
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    if "sslcert" in files:
        _load_own(context, files, parameters.get("sslpassword", ""))
    _limit_versions(context, parameters)
    return context


def _load_own(context: ssl.SSLContext, files: Mapping[str, str], password: str) -> None:
    """Load the client's certificate and its key."""
    pair = " with sslkey=".join(files[name] for name in ("sslcert", "sslkey") if name in files)
    with explained("sslcert", pair):
        context.load_cert_chain(files["sslcert"], files.get("sslkey"), lambda: password)


def _limit_versions(context: ssl.SSLContext, parameters: Mapping[str, str]) -> None:
    oldest, newest = (version.replace(".", "_") for version in read_limits(parameters))
    if oldest:
        context.minimum_version = ssl.TLSVersion[oldest]
    if newest:
        context.maximum_version = ssl.TLSVersion[newest]


def _mind_key(path: str) -> None:
    """Refuse a key that others may read, as libpq does."""
    with explained("sslkey", path):
        status = Path(path).stat()
    forbidden = ROOTS if status.st_uid == 0 else OWNERS_ONLY
    if stat.S_IMODE(status.st_mode) & forbidden:
        raise InvalidCertificate(f"sslkey={path} may be read by others. chmod 600 it.")
