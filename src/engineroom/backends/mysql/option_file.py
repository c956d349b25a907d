"""A file of options (my.cnf): the drivers pass over one that cannot be read without a word."""

from __future__ import annotations

import re
from collections.abc import Mapping
from configparser import Error, RawConfigParser
from pathlib import Path
from typing import Any

from ...errors import InvalidURL

FILE, GROUP = "read_default_file", "read_default_group"
USUAL = "/etc/my.cnf"  # where both drivers look if there is a group alone
# MySQL's prefixes, and its lines that include other files.
OF_TLS = re.compile(r"((loose|skip|disable|enable)-)*(ssl|tls)|!include")
READ = ("ssl-ca", "ssl-capath", "ssl-cert", "ssl-key", "ssl-cipher")  # by both, of what TLS is


def read_tls(parameters: Mapping[str, Any], shown: str, *, has_mode: bool) -> dict[str, str]:
    """Return what the file says of TLS; see that the drivers can read the rest.

    Args:
        has_mode: Whether the URL itself says how much TLS there is to be.

    Raises:
        InvalidURL: they cannot, or would not.
    """
    if FILE not in parameters and GROUP not in parameters:
        return {}
    path, group = parameters.get(FILE, USUAL), parameters.get(GROUP, "client")
    read = _read(path)
    if isinstance(read, str):
        raise InvalidURL(
            f"{shown} has {FILE}={path}, which cannot be used: {read}. Correct it, or leave it out."
            if FILE in parameters
            else f"{shown} has {GROUP}={group}, and {path} cannot be used: {read}. Name the file: "
            f"{FILE}=…"
        )
    if not read.has_section(group):
        raise InvalidURL(
            f"{shown} has a {FILE} or {GROUP}, and {path} has no group [{group}]. Name one that it "
            f"has with {GROUP}=…, or leave both out."
        )
    names = {name.lower().replace("_", "-"): name for name in read.options(group)}
    unread = [name for name in names if OF_TLS.match(name) and name not in READ]
    if unread and not has_mode:
        raise InvalidURL(
            f"{shown} has {FILE}={path}, and that has {unread[0]}, which the drivers do not read. "
            "Say in the URL how much TLS there is to be: ssl_mode=VERIFY_IDENTITY (or REQUIRED, "
            "DISABLED)."
        )
    values = {name: read.get(group, names[name]) for name in READ if name in names}
    return {name.replace("-", "_"): _unquoted(value) for name, value in values.items() if value}


def _unquoted(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if is_quoted else value


def _read(path: str) -> RawConfigParser | str:
    """Read it as the drivers do; or say why not, but nothing of what is in it."""
    parser = RawConfigParser(allow_no_value=True)
    try:
        with Path(path).expanduser().open() as file:
            parser.read_file(file)
    except OSError as error:
        return error.strerror or str(error)
    except (Error, ValueError):  # (the latter: not UTF-8)
        return "it is not made of groups ([client]) with lines of name = value"
    return parser
