"""psycopg with the same statements and no ORM: the limit. Its pool is a queue of connections."""

from contextlib import contextmanager
from queue import LifoQueue

import psycopg

from . import Contender, web

COLUMNS = "SELECT item.id, item.name, item.count FROM item"
ONE = f"{COLUMNS} WHERE item.id = %s"


@contextmanager
def pooled(url, pool):
    """Yield what lends a connection; it is opened when it is first needed."""
    idle, opened = LifoQueue(), []
    for _ in range(pool["pool_size"]):
        idle.put(None)

    @contextmanager
    def lent():
        connection = idle.get()
        if connection is None:
            connection = psycopg.connect(url.replace("+psycopg", ""), autocommit=True)
            opened.append(connection)
        try:
            yield connection
        finally:
            idle.put(connection)

    yield lent
    for connection in opened:
        connection.close()


@contextmanager
def opened(url, pool):
    with pooled(url, pool) as lent:

        def empty(key):
            pass

        def get(key):
            with lent() as connection:
                connection.execute(ONE, (key,)).fetchone()

        def change(key):
            with lent() as connection, connection.transaction():
                connection.execute(
                    "UPDATE item SET count=(item.count + 1) WHERE item.id = %s", (key,)
                )

        def insert(key):
            with lent() as connection, connection.transaction():
                connection.execute(
                    "INSERT INTO line (name) SELECT * FROM unnest(%s::varchar[]) RETURNING line.id",
                    ([f"line {key}"] * 10,),
                ).fetchall()

        def rows(key):
            with lent() as connection:
                connection.execute(COLUMNS).fetchall()

        def hold(wait):
            with lent() as connection:
                connection.execute(ONE, (1,)).fetchone()
                wait()

        units = {"empty": empty, "get": get, "update": change, "insert": insert}
        yield {**units, "list": rows, "hold": hold}


@contextmanager
def application(url, pool):
    from flask import Flask

    app = Flask("bench")
    with pooled(url, pool) as lent:

        @app.get("/items/<int:key>")
        def read(key):
            with lent() as connection:
                row = connection.execute(ONE, (key,)).fetchone()
                return dict(zip(("id", "name", "count"), row, strict=True))

        yield {"request": web.flask_request(app)}


synchronous = Contender("sync", opened, application)
