"""engineroom, by each of its doors; the README and docs/fastapi.md, docs/flask.md."""

from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Annotated

from sqlalchemy.ext.asyncio import AsyncSession

from engineroom import Database, DatabaseSessionManager

from . import Contender, orm, web


@asynccontextmanager
async def opened(url, pool, **options):
    manager = DatabaseSessionManager().init(url, **pool, **orm.SESSION, **options)
    yield {**orm.reading(manager.session), **orm.writing(manager.session)}
    await manager.close()


@asynccontextmanager
async def opened_reader(url, pool):
    manager = DatabaseSessionManager().init(url, **pool, **orm.SESSION)
    yield orm.reading(manager.reader)
    await manager.close()


def application(*, reader):
    @asynccontextmanager
    async def running(url, pool):
        from fastapi import Depends, FastAPI

        from engineroom.fastapi import lifespan, session_dependency

        manager = DatabaseSessionManager()
        session = Annotated[AsyncSession, Depends(session_dependency(manager, reader=reader))]
        app = FastAPI(lifespan=lifespan(manager, url=url, **pool, **orm.SESSION))
        async with web.served(web.add_endpoint(app, session)) as units:
            yield units

    return running


@contextmanager
def opened_sync(url, pool, **options):
    with Database(url, **pool, **orm.SESSION, **options) as database:
        yield {**orm.reading_sync(database.session), **orm.writing_sync(database.session)}


@contextmanager
def opened_sync_reader(url, pool):
    with Database(url, **pool, **orm.SESSION) as database:
        yield orm.reading_sync(database.reader)


def application_sync(*, reader):
    @contextmanager
    def running(url, pool):
        from flask import Flask

        from engineroom.flask import EngineRoom

        app = Flask("bench")
        db = EngineRoom(app, url=url, **pool, **orm.SESSION)

        @app.get("/items/<int:key>")
        def read(key):
            if reader:
                with db.database.reader() as session:
                    return orm.shown(session.get_one(orm.Item, key))
            return orm.shown(db.session.get_one(orm.Item, key))

        yield {"request": web.flask_request(app)}
        with app.app_context():
            db.database.close()

    return running


session = Contender("async", opened, application(reader=False))
reader = Contender("async", opened_reader, application(reader=True))
pipelined = Contender("async", partial(opened, pipeline="on"))
sync_session = Contender("sync", opened_sync, application_sync(reader=False))
sync_pipelined = Contender("sync", partial(opened_sync, pipeline="on"))
sync_reader = Contender("sync", opened_sync_reader, application_sync(reader=True))
