"""fastapi-async-sqlalchemy, as its README shows it.

The middleware makes the engine; `db()` is the session outside of a request, with
`commit_on_exit=True` in a unit that writes, and `db.session` the one in a request.
"""

from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db

from . import Contender, orm, web


def given(url, pool):
    return {"db_url": url, "engine_args": pool, "session_args": orm.SESSION}


@asynccontextmanager
async def session(**options):
    async with db(**options):
        yield db.session


@asynccontextmanager
async def opened(url, pool):
    middleware = SQLAlchemyMiddleware(FastAPI(), **given(url, pool))
    yield {**orm.reading(session), **orm.writing(partial(session, commit_on_exit=True))}
    await middleware.dispose()


@asynccontextmanager
async def application(url, pool):
    app = FastAPI()
    app.add_middleware(SQLAlchemyMiddleware, **given(url, pool))

    @app.get("/items/{key}")
    async def read(key: int):
        return orm.shown(await db.session.get_one(orm.Item, key))

    async with web.served(app) as units:
        yield units


asynchronous = Contender("async", opened, application, several=False)
