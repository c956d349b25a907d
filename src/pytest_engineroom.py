"""What pytest loads wherever engineroom is installed: two ini options, no more unless they are set.

It stands outside of the package, whose import brings SQLAlchemy. The fixtures are in
`engineroom.testing.plugin`.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Name the options of the ini file."""
    parser.addini(
        "engineroom_manager",
        "engineroom: the application's manager, as `package.module:name`; without it, no fixtures",
        default="",
    )
    parser.addini(
        "engineroom_postgres",
        "engineroom: the version of the throwaway PostgreSQL server (16 or 18)",
        default="18",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Bring the fixtures to a project that says which manager it has."""
    if config.getini("engineroom_manager"):
        from engineroom.testing import plugin

        if not config.pluginmanager.is_registered(plugin):  # a conftest.py may name it, too
            config.pluginmanager.register(plugin, "engineroom-fixtures")
