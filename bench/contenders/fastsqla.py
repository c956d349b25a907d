"""FastSQLA, as its README shows it: `lifespan`, the dependency `Session`, and `open_session()`.

It has one engine in a process. It logs each session by structlog, which prints everything unless
told otherwise: here, warnings.
"""

import logging
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI
from fastsqla import Session, new_lifespan, open_session

from . import Contender, orm, web

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


@asynccontextmanager
async def opened(url, pool):
    async with new_lifespan(url, **pool)(None):
        yield {**orm.reading(open_session), **orm.writing(open_session)}


@asynccontextmanager
async def application(url, pool):
    app = FastAPI(lifespan=new_lifespan(url, **pool))
    web.add_endpoint(app, Session)
    async with web.served(app) as units:
        yield units


asynchronous = Contender("async", opened, application, several=False)
