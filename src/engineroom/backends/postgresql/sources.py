"""Where libpq's parameters come from: a URL, then a service file, then `PG*`; and `~/.pgpass`."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from sqlalchemy.engine import URL

from ...errors import InvalidURL
from ...urls import masked
from .parameters import KNOWN, SYSTEM, read_parameters

logger: logging.Logger = logging.getLogger("engineroom")

SERVICES = Path(".pg_service.conf")  # in the home directory
SYSTEM_SERVICES = Path("/etc/postgresql-common")
PASSWORDS = Path(".pgpass")
OTHERS_MAY = stat.S_IRWXG | stat.S_IRWXO
SOCKET_FOLDERS = ("", "/var/run/postgresql", "/run/postgresql", "/tmp")  # noqa: S108
FIELD = re.compile(r"((?:[^\\:]|\\.)*)(?::|$)")
FIELDS = 5  # host, port, database, user, password


def resolve(url: URL, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return all parameters of a connection: what the URL leaves open is looked up elsewhere.

    Raises:
        InvalidURL: one is not known, has a value that it cannot have, or its service is not found.
    """
    shown = masked(url)
    parameters = _of_url(url) | read_parameters(url.query, shown)
    variables = {
        name: environment[known.variable]
        for name, known in KNOWN.items()
        if environment.get(known.variable)
    }
    service = parameters.pop("service", variables.pop("service", None))
    file = parameters.pop("servicefile", variables.pop("servicefile", None))
    if service is not None:
        parameters = _read_service(service, file, shown, environment) | parameters
    for name, value in variables.items():
        if name not in parameters:
            parameters |= read_parameters({name: value}, f"{KNOWN[name].variable} (for {shown})")
    if parameters.get("sslrootcert") == SYSTEM:
        _mind_system(parameters, shown)
    return parameters


def _of_url(url: URL) -> dict[str, str]:
    """Return what stands before a URL's parameters, by libpq's names."""
    parts = {
        "user": url.username,
        "password": url.password,
        "host": url.host,
        "port": None if url.port is None else str(url.port),
        "dbname": url.database,
    }
    return {name: part for name, part in parts.items() if part}


def _mind_system(parameters: dict[str, str], shown: str) -> None:
    """Verify the name as well where anybody may have a certificate, as libpq does."""
    if parameters.setdefault("sslmode", "verify-full") != "verify-full":
        raise InvalidURL(
            f"{shown} has sslrootcert=system with sslmode={parameters['sslmode']}: anybody can get "
            "a certificate that the system trusts. Write sslmode=verify-full."
        )


# -- services -----------------------------------------------------------------------------------


def _read_service(
    service: str, file: str | None, shown: str, environment: Mapping[str, str]
) -> dict[str, str]:
    """Read a service: the user's file first, then the system's.

    Raises:
        InvalidURL: no file has it.
    """
    own = Path(file) if file else Path.home() / SERVICES
    system = Path(environment.get("PGSYSCONFDIR") or SYSTEM_SERVICES) / SERVICES.name.lstrip(".")
    looked: list[str] = []
    for path in (own, system):
        try:
            services = _parse_services(path.read_text())
        except OSError as error:
            looked.append(f"{path} ({error.strerror})")
            continue
        if service in services:
            return read_parameters(services[service], f"The service {service} in {path}")
        looked.append(f"{path} (which has {', '.join(services) or 'none'})")
    raise InvalidURL(
        f"{shown}: there is no service {service!r}. It was looked for in {' and '.join(looked)}. "
        "Add it there, or say by PGSERVICEFILE where it is."
    )


def _parse_services(text: str) -> dict[str, dict[str, str]]:
    services: dict[str, dict[str, str]] = {}
    settings: dict[str, str] = {}
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            settings = services.setdefault(line[1:-1], {})
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            settings[name.strip()] = value.strip()
    return services


# -- passwords ----------------------------------------------------------------------------------


def find_password(parameters: Mapping[str, str], host: str, port: int, user: str) -> str | None:
    """Look a password up in the password file, as it is now; None where that has none.

    Args:
        host: One host of the parameters; "" is the default one.
    """
    named = parameters.get("passfile")
    path = Path(named) if named else Path.home() / PASSWORDS
    try:
        text = path.read_text()
        if path.stat().st_mode & OTHERS_MAY:
            logger.warning("%s is ignored: others may read it. chmod 600 it.", path)
            return None
    except OSError:
        return None
    wanted = (
        "localhost" if host in SOCKET_FOLDERS else host,
        str(port),
        parameters.get("dbname", user),
        user,
    )
    for *fields, password in _parse_passwords(text):
        if all(field in ("*", want) for field, want in zip(fields, wanted, strict=True)):
            return password
    return None


def _parse_passwords(text: str) -> Iterator[list[str]]:
    """Yield the fields of each line; a backslash makes the next character an ordinary one."""
    for line in text.splitlines():
        if line and not line.startswith("#"):
            fields = [match[1] for match in FIELD.finditer(line)][:FIELDS]
            if len(fields) == FIELDS:
                yield [re.sub(r"\\(.)", r"\1", field) for field in fields]
