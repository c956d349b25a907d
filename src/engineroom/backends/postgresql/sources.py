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
from ...secrecy import unseen
from ...urls import flaw, masked
from .parameters import KNOWN, OLDEST, SYSTEM, VERSIONS, read_limits, read_parameters

logger: logging.Logger = logging.getLogger("engineroom")

SERVICE = ("service", "servicefile")
SERVICES = Path(".pg_service.conf")  # in the home directory
SYSTEM_SERVICES = Path("/etc/postgresql-common")
PASSWORDS = Path(".pgpass")
OTHERS_MAY = stat.S_IRWXG | stat.S_IRWXO
SOCKET_FOLDERS = ("", "/var/run/postgresql", "/run/postgresql", "/tmp")  # noqa: S108
FIELD = re.compile(r"((?:[^\\:]|\\.)*)(?::|$)")
HEADER = re.compile(r"\s*\[([^\]]*)\]")
SETTING = re.compile(r"(\w+)=(.*)", re.DOTALL)
BLANKS = " \t\n\v\f\r"  # as C knows them
REQUIRE_TLS = "PGREQUIRESSL"  # old, and libpq still hears it
WITHOUT_TLS = ("disable", "allow", "prefer")
FIELDS = 5  # host, port, database, user, password


@unseen
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
        if known.variable in environment
    }
    if environment.get(REQUIRE_TLS, "").startswith("1"):
        variables.setdefault("sslmode", "require")
    named = {name: parameters.pop(name) for name in SERVICE if name in parameters}
    of_variables = {name: variables.pop(name) for name in SERVICE if name in variables}
    wanted = of_variables | named
    if (service := wanted.get("service")) is not None:
        file = wanted.get("servicefile")
        parameters = _read_service(service, file, shown, environment) | parameters
        if named and "service" in of_variables:  # libpq would read that one, unless it is told
            parameters |= {"service": service} | named
    for name, value in variables.items():
        if name not in parameters:
            parameters |= read_parameters({name: value}, f"{KNOWN[name].variable} (for {shown})")
    if parameters.get("sslrootcert") == SYSTEM:
        _mind_system(parameters, shown)
    if parameters.get("sslnegotiation") == "direct":
        _mind_direct(parameters, shown)
    _mind_versions(parameters, shown)
    for name, value in parameters.items():
        _mind_text(value, f"{name} of {shown}")
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


def _mind_direct(parameters: Mapping[str, str], shown: str) -> None:
    """Refuse a mode that does without TLS where there is nothing else, as libpq does."""
    mode = parameters.get("sslmode", "prefer")
    if mode in WITHOUT_TLS:
        raise InvalidURL(
            f"{shown} has sslnegotiation=direct with sslmode={mode}, which may do without TLS. "
            "Write sslmode=require or one that verifies."
        )


def _mind_versions(parameters: Mapping[str, str], shown: str) -> None:
    """Refuse limits between which there is no version of TLS, as libpq does."""
    oldest, newest = read_limits(parameters)
    if newest and oldest and VERSIONS.index(oldest) < VERSIONS.index(newest):
        raise InvalidURL(
            f"{shown} has ssl_min_protocol_version={oldest} (which is {OLDEST} where it is not "
            f"given) with ssl_max_protocol_version={newest}: no version lies between. Correct one."
        )


def _mind_text(text: str, what: str) -> None:
    """Refuse what cannot be sent: the drivers' own errors would print it, and it may be secret."""
    if why := flaw(text):
        raise InvalidURL(f"{what} {why}. Write it in UTF-8, without a zero byte.")


def in_home(path: Path) -> Path | None:
    """Return a path in the home directory; None where there is none: libpq goes on as well."""
    try:
        return Path.home() / path
    except RuntimeError:  # no HOME, and a user whom the system does not know
        return None


def _read(path: Path) -> list[str]:
    """Return the lines of a file, divided as libpq does; others' may be in any encoding."""
    return path.read_bytes().decode("utf-8", "surrogateescape").split("\n")


# -- services -----------------------------------------------------------------------------------


def _read_service(
    service: str, file: str | None, shown: str, environment: Mapping[str, str]
) -> dict[str, str]:
    """Read a service: the user's file first, then the system's.

    Raises:
        InvalidURL: no file has it.
    """
    own = Path(file) if file else in_home(SERVICES)
    system = Path(environment.get("PGSYSCONFDIR") or SYSTEM_SERVICES) / SERVICES.name.lstrip(".")
    looked: list[str] = []
    for path in filter(None, (own, system)):
        try:
            lines = _read(path)
        except OSError as error:
            looked.append(f"{path} ({error.strerror})")
            continue
        if (settings := _find_service(service, lines, path)) is not None:
            return read_parameters(settings, f"The service {service} in {path}")
        names = [header[1] for line in lines if (header := HEADER.match(line))]
        looked.append(f"{path} (which has {', '.join(names) or 'none'})")
    raise InvalidURL(
        f"{shown}: there is no service {service!r}. It was looked for in {' and '.join(looked)}. "
        "Add it there, or say by PGSERVICEFILE where it is."
    )


def _find_service(service: str, lines: list[str], path: Path) -> dict[str, str] | None:
    """Return what a file says of a service: what it says first counts, as with libpq.

    Raises:
        InvalidURL: a line of it is no setting; what it says may be secret.
    """
    found: dict[str, str] | None = None
    for number, line in enumerate((line.strip(BLANKS) for line in lines), 1):
        if line.startswith("["):
            if found is not None:
                break
            found = {} if line.startswith(f"[{service}]") else None
        elif found is not None and line and not line.startswith("#"):
            setting = SETTING.fullmatch(line)
            if setting is None or setting[1] in ("service", "servicefile"):
                why = "is not name=value, without blanks" if setting is None else "names a service"
                raise InvalidURL(
                    f"Line {number} of {path}, in the service {service}, {why}. libpq refuses it "
                    "as well: correct it."
                )
            found.setdefault(setting[1], setting[2])
    return found


# -- sockets ------------------------------------------------------------------------------------


def default_folder(port: int) -> str:
    """Return the folder of sockets where no host is given: libpq has one of them built in."""
    folders = [folder for folder in SOCKET_FOLDERS if folder]
    there = (folder for folder in folders if os.path.exists(f"{folder}/.s.PGSQL.{port}"))  # noqa: PTH110
    return next(there, folders[0])


# -- passwords ----------------------------------------------------------------------------------


def find_password(parameters: Mapping[str, str], host: str, port: int, user: str) -> str | None:
    """Look a password up in the password file, as it is now; None where that has none.

    Args:
        host: One host of the parameters; "" is the default one.
    """
    named = parameters.get("passfile")
    path = Path(named) if named else in_home(PASSWORDS)
    if path is None:
        return None
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # to read it might wait for ever
            logger.warning("%s is ignored: it is not a plain file.", path)
            return None
        if mode & OTHERS_MAY:
            logger.warning("%s is ignored: others may read it. chmod 600 it.", path)
            return None
        lines = _read(path)
    except OSError:
        return None
    wanted = (
        "localhost" if host in SOCKET_FOLDERS else host,
        str(port),
        parameters.get("dbname") or user,
        user,
    )
    for *fields, password in _parse_passwords(lines):
        if all(
            field == "*" or _plain(field) == want
            for field, want in zip(fields, wanted, strict=True)
        ):
            _mind_text(password, f"The password for {user} at {host} in {path}")
            return _plain(password)
    return None


def _parse_passwords(lines: list[str]) -> Iterator[list[str]]:
    """Yield the fields of each line, as they stand there."""
    for line in (line.rstrip("\r") for line in lines):
        if line and not line.startswith("#"):
            fields = [match[1] for match in FIELD.finditer(line)][:FIELDS]
            if len(fields) == FIELDS:
                yield fields


def _plain(field: str) -> str:
    """Return what a field says: a backslash makes the next character an ordinary one."""
    return re.sub(r"\\(.)", r"\1", field)
