"""Flask-SQLAlchemy-Lite, as its README shows it: `db.session` in an application context.

The context closes the session, and does not commit: a unit that writes does.
"""

from contextlib import contextmanager

from flask import Flask
from flask_sqlalchemy_lite import SQLAlchemy

from . import Contender, orm, web


def flask_app(url, pool):
    app = Flask("bench")
    app.config["SQLALCHEMY_ENGINES"] = {"default": {"url": url, **pool}}
    return app, SQLAlchemy(app, session_options=orm.SESSION)


@contextmanager
def opened(url, pool):
    app, db = flask_app(url, pool)

    @contextmanager
    def reading():
        with app.app_context():
            yield db.session

    @contextmanager
    def writing():
        with app.app_context():
            yield db.session
            db.session.commit()

    yield {**orm.reading_sync(reading), **orm.writing_sync(writing)}
    with app.app_context():
        db.engine.dispose()


@contextmanager
def application(url, pool):
    app, db = flask_app(url, pool)

    @app.get("/items/<int:key>")
    def read(key):
        return orm.shown(db.session.get_one(orm.Item, key))

    yield {"request": web.flask_request(app)}
    with app.app_context():
        db.engine.dispose()


synchronous = Contender("sync", opened, application)
