"""The fixtures of the pytest plugin: databases, sandboxes and sessions of an application.

`pytest_engineroom` loads it where the ini option `engineroom_manager` is set.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any, TypeAlias

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from engineroom.backends import MYSQL
from engineroom.database import Database
from engineroom.ledger import Entry
from engineroom.manager import DatabaseSessionManager
from engineroom.models import Base
from engineroom.schema import find_ini_in
from engineroom.scopes import SessionScope
from engineroom.settings import Options
from engineroom.testing.clones import Template, clones
from engineroom.testing.loops import abandon, session_for_any_loop
from engineroom.testing.sandbox import sandbox
from engineroom.testing.schemas import create_tables, database_url, migrate
from engineroom.testing.sharing import Desk, ask, start_server

Manager: TypeAlias = DatabaseSessionManager | Database

DESK: pytest.StashKey[Desk] = pytest.StashKey()  # on the configuration of xdist's controller
MANAGER: pytest.StashKey[Manager] = pytest.StashKey()  # on a test that is in a sandbox


# -- the databases -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _db_server(pytestconfig: pytest.Config) -> Iterator[str]:
    """The URL of a database on the server that is to hold the tests' own."""
    url = os.environ.get("DATABASE_URL") or os.environ.get("DB_URL")
    desk = getattr(pytestconfig, "workerinput", {}).get("engineroom_desk")
    version = int(pytestconfig.getini("engineroom_postgres"))
    if url:
        yield url
    elif desk:
        yield ask(desk)
    else:
        with start_server(version) as server:
            yield server.url()


@pytest.fixture(scope="session")
def db_options() -> Options:
    """What the application's `init()` takes beside the URL: return it where there is such."""
    return {}


@pytest.fixture(scope="session")
def _db_manager(pytestconfig: pytest.Config, _db_server: str) -> Iterator[Manager]:
    """The application's manager, which need not be open."""
    with database_url(_db_server):  # no module that is imported now may find another database
        yield find_manager(pytestconfig.getini("engineroom_manager"))


@pytest.fixture(scope="session")
def db_prepare(
    pytestconfig: pytest.Config, _db_manager: Manager, db_options: Options
) -> Callable[[str], object]:
    """What fills an empty database, given its URL: the migrations, or `create_all()`."""
    room = _db_manager._room
    metadata = room.metadata if room.life.is_usable else Base.metadata
    metadata = db_options.get("metadata", metadata)
    ini = find_ini_in(pytestconfig.rootpath)
    if ini is None:
        return partial(create_tables, metadata=metadata)

    def run_migrations(url: str) -> None:
        was_open = room.life.is_usable
        try:
            migrate(url, ini, metadata)
        finally:
            if not was_open:  # an env.py may have opened it, and alembic's process ended there
                synchronous(_db_manager).close(0)

    return run_migrations


@pytest.fixture(scope="session")
def _db_template(
    pytestconfig: pytest.Config,
    _db_server: str,
    db_prepare: Callable[[str], object],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Template]:
    """The template of all databases of the run, which xdist's workers share."""
    run = getattr(pytestconfig, "workerinput", {}).get("testrunuid") or uuid.uuid4().hex
    folder = tmp_path_factory.mktemp("engineroom")
    with clones(_db_server, db_prepare, name=run, directory=folder) as template:
        yield template


@pytest.fixture(scope="session")
def db_url(_db_template: Template) -> Iterator[str]:
    """The URL of this process's own database, with its tables; `DATABASE_URL` says the same."""
    url = _db_template.clone()
    with database_url(url):
        yield url


@pytest.fixture(scope="session")
def db_manager(_db_manager: Manager, db_url: str, db_options: Options) -> Iterator[Manager]:
    """The application's manager, open on the database of this process."""
    with opened_on(_db_manager, db_url, db_options):
        yield _db_manager


# -- for one test --------------------------------------------------------------------------------


@pytest.fixture
def db_sandbox(
    request: pytest.FixtureRequest, db_manager: Manager, _db_template: Template
) -> Iterator[Manager]:
    """The manager in a sandbox: whatever is committed through it is gone after the test."""
    inside = sandbox(db_manager)
    if db_manager._room.settings.url.get_backend_name() in MYSQL:  # where DDL ends a transaction
        inside = sandbox(db_manager, isolation="database", template=_db_template)
    with inside, watched(request, db_manager):
        yield db_manager


@pytest.fixture
def db_clone(
    request: pytest.FixtureRequest, db_manager: Manager, _db_template: Template
) -> Iterator[Manager]:
    """The manager on a database that is this test's own, for what one transaction cannot serve."""
    own = sandbox(db_manager, isolation="database", template=_db_template)
    with own, watched(request, db_manager):
        yield db_manager


@pytest.fixture
def db_session(request: pytest.FixtureRequest, db_sandbox: Manager) -> Iterator[Session]:
    """A synchronous session in the sandbox, rolled back at the end."""
    scope: SessionScope = synchronous(db_sandbox).session()
    scope.stand_at(request.function)
    session = scope.__enter__()
    try:
        yield session
    finally:
        scope.is_rollback_only = True
        scope.__exit__(None, None, None)


@pytest.fixture
def async_db_session(request: pytest.FixtureRequest, db_sandbox: Manager) -> Iterator[AsyncSession]:
    """An asynchronous session in the sandbox, for a test in any event loop.

    The fixture itself needs no loop, and so no plugin for asynchronous fixtures.
    """
    if isinstance(db_sandbox, Database):
        raise pytest.UsageError(
            "async_db_session: the manager of engineroom_manager is a Database, which is "
            "synchronous. Use db_session, or name a DatabaseSessionManager."
        )
    scope = db_sandbox.session()
    scope.stand_at(request.function)
    with session_for_any_loop(scope) as session:
        yield session


# -- a session that is left open fails its test --------------------------------------------------


@contextmanager
def watched(request: pytest.FixtureRequest, manager: Manager) -> Generator[None]:
    """Watch the test itself, and fail for what a fixture of it did not end."""
    request.node.stash[MANAGER] = manager
    before = list(manager._room.ledger)
    yield
    del request.node.stash[MANAGER]
    fail_for(left_open(manager, before))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that leaves a session open."""
    manager = item.stash.get(MANAGER, None)
    if manager is None:
        return (yield)
    before = list(manager._room.ledger)
    left: list[str] = []
    try:
        result = yield
    finally:
        left = left_open(manager, before)
    fail_for(left)
    return result


def left_open(manager: Manager, before: list[Entry]) -> list[str]:
    """Say which scopes are open that were not before, and take them for ended."""
    known, left = {id(entry) for entry in before}, []
    for entry in list(manager._room.ledger):  # (what `stats().scopes` describes)
        if id(entry) not in known:
            left.append(f"  {entry}")
            abandon(entry)
    return left


def fail_for(left: list[str]) -> None:
    """Fail the test, with the lines that opened what is open."""
    if left:
        pytest.fail(
            "The test did not end what it had opened:\n" + "\n".join(left) + "\nOpen it by `with` "
            "or `async with`, and wait for the tasks and threads that use it.",
            pytrace=False,
        )


# -- xdist ---------------------------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of xdist where it may ask for a server."""
    if DESK not in node.config.stash:
        node.config.stash[DESK] = Desk(int(node.config.getini("engineroom_postgres")))
    node.workerinput["engineroom_desk"] = node.config.stash[DESK].address


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the server that the workers shared."""
    if (desk := config.stash.get(DESK, None)) is not None:
        desk.close()


# -- the manager ---------------------------------------------------------------------------------


def find_manager(path: str) -> Manager:
    """Import what `package.module:name` names.

    Raises:
        pytest.UsageError: there is no such thing, or it is no manager.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise pytest.UsageError(
            f"engineroom_manager = {path!r} names no manager. Write package.module:name, as in "
            "app.database:session_manager."
        )
    try:
        manager = attrgetter(name)(import_module(module))
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise pytest.UsageError(
            f"engineroom_manager = {path}: there is no module {error.name}. Correct the name, or "
            "add its folder to pytest's option pythonpath."
        ) from None
    except AttributeError as error:
        raise pytest.UsageError(f"engineroom_manager = {path}: {error}.") from None
    if not isinstance(manager, DatabaseSessionManager | Database):
        raise pytest.UsageError(
            f"engineroom_manager = {path} is of type {type(manager).__name__}. Name a "
            "DatabaseSessionManager or a Database."
        )
    return manager


def synchronous(manager: Manager) -> Database:
    """Return the synchronous side."""
    return manager.sync if isinstance(manager, DatabaseSessionManager) else manager


@contextmanager
def opened_on(manager: Manager, url: str, options: Options) -> Generator[None]:
    """Open the manager on another database; one that was open is put back at the end."""
    room, database = manager._room, synchronous(manager)
    before = (room.settings.url, room.given.reveal()[1]) if room.life.is_usable else None
    if before is not None:
        options = {**before[1], **options}
        database.close()
    database.init(url, **options)
    try:
        yield
    finally:
        database.close(0)
        if before is not None:
            database.init(before[0], **before[1])
