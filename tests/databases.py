"""Fresh databases of a server. What is like new again is used again: to make one takes the system
longer than most of the tests.
"""

from __future__ import annotations

import psycopg
from psycopg.rows import tuple_row

from engineroom.testing import PostgresServer

# A database has as many rows in each of these as it had when it was new, and none that was written
# later (an ALTER or a GRANT on something of the system's own writes its row anew), or something is
# left.
CATALOGS = (
    *("am", "amop", "amproc", "cast", "class", "collation", "constraint", "conversion"),
    *("default_acl", "enum", "event_trigger", "extension", "foreign_data_wrapper"),
    *("foreign_server", "foreign_table", "language", "largeobject_metadata", "opclass", "operator"),
    *("opfamily", "policy", "proc", "publication", "rewrite", "sequence", "statistic_ext"),
    *("subscription", "transform", "trigger", "ts_config", "ts_config_map", "ts_dict"),
    *("ts_parser", "ts_template", "type", "user_mapping"),
)
ROWS = " UNION ALL ".join(
    f"SELECT concat_ws(' ', '{name}', count(*), max(xmin::text::bigint)) FROM pg_{name}"
    for name in CATALOGS
) + (
    " UNION ALL SELECT concat_ws(' ', (SELECT count(*) FROM pg_description),"
    " (SELECT count(*) FROM pg_depend WHERE deptype = 'e'))"
    " UNION ALL SELECT string_agg(nspname || coalesce(nspacl::text, ''), ' ' ORDER BY nspname)"
    " FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp_'"
    " UNION ALL SELECT concat_ws(' ', datdba, datconnlimit, datacl, datistemplate,"
    " shobj_description(d.oid, 'pg_database'), (SELECT string_agg(setconfig::text, ' ')"
    " FROM pg_db_role_setting WHERE setdatabase = d.oid))"
    " FROM pg_database d WHERE datname = current_database()"
)
CLEAN = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid();
DO $$
DECLARE name text;
BEGIN
    FOR name IN SELECT nspname FROM pg_namespace
        WHERE nspname <> 'information_schema' AND nspname !~ '^pg_'
    LOOP
        EXECUTE format('DROP SCHEMA %I CASCADE', name);
    END LOOP;
END $$;
CREATE SCHEMA public AUTHORIZATION pg_database_owner;
GRANT USAGE ON SCHEMA public TO PUBLIC;
COMMENT ON SCHEMA public IS 'standard public schema';
"""


class Databases:
    """The databases of one server, lent to one test at a time."""

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        self._idle: list[str] = []
        self._new: list[str] = []  # what `ROWS` says of one that nobody has used

    def lend(self) -> str:
        """Return the name of a database in which there is nothing."""
        if self._idle:
            return self._idle.pop()
        name = self.server.create_database()
        if not self._new:
            self._new = self._look(name)
        return name

    def take_back(self, name: str) -> None:
        """Empty a database, and end the connections that are still in it; drop it if that fails."""
        try:
            is_new = self._look(name, CLEAN) == self._new
        except psycopg.Error:
            is_new = False
        if is_new:
            self._idle.append(name)
        else:
            self.server.drop_database(name)

    def _look(self, name: str, before: str = "") -> list[str]:
        with psycopg.connect(
            self.server.url(name), autocommit=True, row_factory=tuple_row
        ) as connection:
            if before:
                connection.execute(before)
            return [value for (value,) in connection.execute(ROWS)]
