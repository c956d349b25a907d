"""The recipe: the `database.py` that services copy from each other.

An engine that pings before each use, a context manager that commits, rolls back and closes, and a
`get_db` that yields from it.
"""

from contextlib import asynccontextmanager, contextmanager
from typing import Annotated

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from . import Contender, orm, web


def recipe(url, pool):
    engine = create_async_engine(url, pool_pre_ping=True, **pool)
    factory = async_sessionmaker(engine, **orm.SESSION)

    @asynccontextmanager
    async def get_session():
        session = factory()
        try:
            yield session
            await session.commit()
        except Exception:
            await session.rollback()
            raise
        finally:
            await session.close()

    return engine, get_session


def recipe_sync(url, pool):
    engine = create_engine(url, pool_pre_ping=True, **pool)
    factory = sessionmaker(engine, **orm.SESSION)

    @contextmanager
    def get_session():
        session = factory()
        try:
            yield session
            session.commit()
        except Exception:
            session.rollback()
            raise
        finally:
            session.close()

    return engine, get_session


@asynccontextmanager
async def opened(url, pool):
    engine, get_session = recipe(url, pool)
    yield {**orm.reading(get_session), **orm.writing(get_session)}
    await engine.dispose()


@asynccontextmanager
async def application(url, pool):
    from fastapi import Depends, FastAPI

    engine, get_session = recipe(url, pool)

    async def get_db():
        async with get_session() as session:
            yield session

    app = web.add_endpoint(FastAPI(), Annotated[AsyncSession, Depends(get_db)])
    async with web.served(app) as units:
        yield units
    await engine.dispose()


@contextmanager
def opened_sync(url, pool):
    engine, get_session = recipe_sync(url, pool)
    yield {**orm.reading_sync(get_session), **orm.writing_sync(get_session)}
    engine.dispose()


@contextmanager
def application_sync(url, pool):
    from flask import Flask

    engine, get_session = recipe_sync(url, pool)
    app = Flask("bench")

    @app.get("/items/<int:key>")
    def read(key):
        with get_session() as db:
            return orm.shown(db.get_one(orm.Item, key))

    yield {"request": web.flask_request(app)}
    engine.dispose()


asynchronous = Contender("async", opened, application)
synchronous = Contender("sync", opened_sync, application_sync)
