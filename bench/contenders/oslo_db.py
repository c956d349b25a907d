"""oslo.db, as its documentation's page "Usage" shows it: an enginefacade with readers and writers.

It pings a connection at each checkout. It is for services without one of the web frameworks here.
"""

from contextlib import contextmanager
from functools import partial

from oslo_db.sqlalchemy import enginefacade

from . import Contender, orm


class Context:
    """What carries a session, in the place of a request's context."""


enginefacade.transaction_context_provider(Context)


@contextmanager
def opened(url, pool):
    manager = enginefacade.transaction_context()
    manager.configure(
        connection=url,
        max_pool_size=pool["pool_size"],
        max_overflow=pool["max_overflow"],
        pool_timeout=pool["pool_timeout"],
    )

    def scope(kind):
        return kind.using(Context())

    yield {
        **orm.reading_sync(partial(scope, manager.reader)),
        **orm.writing_sync(partial(scope, manager.writer)),
    }
    manager.dispose_pool()


synchronous = Contender("sync", opened)
