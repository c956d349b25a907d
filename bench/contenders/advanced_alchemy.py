"""advanced-alchemy, as its documentation's pages "Getting Started" and "FastAPI" show it.

`config.get_session()` outside of a request: it does not commit, so a unit that writes does. In a
request `provide_session()`, with `commit_mode="autocommit"` as in its example.
"""

from contextlib import asynccontextmanager
from typing import Annotated

from advanced_alchemy.config import AsyncSessionConfig, EngineConfig
from advanced_alchemy.extensions.fastapi import AdvancedAlchemy, SQLAlchemyAsyncConfig
from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession

from . import Contender, orm, web


def config(url, pool):
    return SQLAlchemyAsyncConfig(
        connection_string=url,
        engine_config=EngineConfig(**pool),
        session_config=AsyncSessionConfig(**orm.SESSION),
        commit_mode="autocommit",
    )


@asynccontextmanager
async def opened(url, pool):
    alchemy = config(url, pool)

    @asynccontextmanager
    async def writing():
        async with alchemy.get_session() as session:
            yield session
            await session.commit()

    yield {**orm.reading(alchemy.get_session), **orm.writing(writing)}
    await alchemy.get_engine().dispose()


@asynccontextmanager
async def application(url, pool):
    app = FastAPI()
    alchemy = AdvancedAlchemy(config=config(url, pool), app=app)
    session = Annotated[AsyncSession, Depends(alchemy.provide_session())]
    web.add_endpoint(app, session)
    async with web.served(app) as units:
        yield units


asynchronous = Contender("async", opened, application)
