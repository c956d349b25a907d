"""fastapi-sqla, as its README shows it: "Setup the app", "Getting an sqla session".

It is configured by the environment and has one engine of a key in a process. `open_session()` is
what it has for code outside of a request; the dependency `AsyncSession` gives that of the
middleware. It logs by structlog, which prints everything unless told otherwise: here, warnings.
"""

import logging
import os
from contextlib import asynccontextmanager

import fastapi_sqla
import structlog
from fastapi import FastAPI
from fastapi_sqla import async_sqla

from . import Contender, orm, web

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def configure(url, pool):
    for name, value in {"url": url, **pool}.items():
        os.environ[f"sqlalchemy_{name}"] = str(value)


@asynccontextmanager
async def opened(url, pool):
    configure(url, pool)
    await fastapi_sqla.startup()
    scope = fastapi_sqla.open_async_session
    yield {**orm.reading(scope), **orm.writing(scope)}
    await dispose()


@asynccontextmanager
async def application(url, pool):
    configure(url, pool)

    @asynccontextmanager
    async def lifespan(app):
        await fastapi_sqla.startup()
        yield

    app = FastAPI(lifespan=lifespan)
    fastapi_sqla.setup_middlewares(app)
    web.add_endpoint(app, fastapi_sqla.AsyncSession)
    async with web.served(app) as units:
        yield units
    await dispose()


async def dispose():
    """Close the engine, for which it has no verb."""
    async with async_sqla.open_session() as session:
        engine = session.bind
    await engine.dispose()


asynchronous = Contender("async", opened, application, several=False)
