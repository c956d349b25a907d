"""SQLAlchemy tuned by hand: nothing more than is needed.

It follows "Using Sessions: Framing out a begin / commit / rollback block" of SQLAlchemy's own
documentation: `sessionmaker.begin()`, on an engine that does not ping. What only reads has, beside
that, an engine of "DBAPI AUTOCOMMIT", as the page "Working with Engines and Connections" shows it.
"""

from contextlib import asynccontextmanager, contextmanager
from typing import Annotated

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from . import Contender, orm, web


@asynccontextmanager
async def opened(url, pool):
    engine = create_async_engine(url, **pool)
    scope = async_sessionmaker(engine, **orm.SESSION).begin
    yield {**orm.reading(scope), **orm.writing(scope)}
    await engine.dispose()


@asynccontextmanager
async def opened_to_read(url, pool):
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT", **pool)
    yield orm.reading(async_sessionmaker(engine, **orm.SESSION))
    await engine.dispose()


@asynccontextmanager
async def application(url, pool):
    from fastapi import Depends, FastAPI

    engine = create_async_engine(url, **pool)
    factory = async_sessionmaker(engine, **orm.SESSION)

    async def get_db():
        async with factory.begin() as session:
            yield session

    app = web.add_endpoint(FastAPI(), Annotated[AsyncSession, Depends(get_db)])
    async with web.served(app) as units:
        yield units
    await engine.dispose()


@contextmanager
def opened_sync(url, pool):
    engine = create_engine(url, **pool)
    scope = sessionmaker(engine, **orm.SESSION).begin
    yield {**orm.reading_sync(scope), **orm.writing_sync(scope)}
    engine.dispose()


@contextmanager
def opened_to_read_sync(url, pool):
    engine = create_engine(url, isolation_level="AUTOCOMMIT", **pool)
    yield orm.reading_sync(sessionmaker(engine, **orm.SESSION))
    engine.dispose()


@contextmanager
def application_sync(url, pool):
    from flask import Flask

    engine = create_engine(url, **pool)
    scope = sessionmaker(engine, **orm.SESSION).begin
    app = Flask("bench")

    @app.get("/items/<int:key>")
    def read(key):
        with scope() as db:
            return orm.shown(db.get_one(orm.Item, key))

    yield {"request": web.flask_request(app)}
    engine.dispose()


asynchronous = Contender("async", opened, application)
autocommit = Contender("async", opened_to_read)
synchronous = Contender("sync", opened_sync, application_sync)
sync_autocommit = Contender("sync", opened_to_read_sync)
