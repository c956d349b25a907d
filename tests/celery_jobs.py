"""The application of `test_celery`: `celery -A celery_jobs worker`, configured by variables."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from celery import Celery
from scenario import Item
from sqlalchemy import text

from engineroom import Database

FOLDER, RESULTS, DATABASE = "JOBS_FOLDER", "JOBS_RESULTS", "JOBS_DATABASE"


def make_app(folder: Path, results: str) -> Celery:
    """Return an application whose broker is a folder."""
    for name in ("queue", "control"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    made = Celery("jobs", broker="filesystem://", backend=results, set_as_current=False)
    made.conf.update(
        broker_transport_options={
            "data_folder_in": str(folder / "queue"),
            "data_folder_out": str(folder / "queue"),
            "control_folder": str(folder / "control"),
            "polling_interval": 0.05,  # not a second
        },
        broker_connection_retry_on_startup=True,
        result_extended=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_lost_wait=1.0,  # seconds; a killed child's job is taken up again after ten otherwise
        worker_prefetch_multiplier=4,
        worker_hijack_root_logger=False,
    )
    return made


if FOLDER in os.environ:
    app = make_app(Path(os.environ[FOLDER]), os.environ[RESULTS])
    database = Database(os.environ[DATABASE])  # before the fork, and used by all of its children
    with database.session() as db:
        db.execute(text("SELECT 1"))

    @app.task(name="double")
    def double(number: int) -> tuple[int, int]:
        with database.session() as db:
            return int(db.scalar(text(f"SELECT 2 * {number:d}"))), os.getpid()

    @app.task(name="find")
    def find(number: int) -> int | None:
        with database.session() as db:
            item = db.get(Item, number)
            return None if item is None else item.value

    @app.task(name="fail")
    def fail(number: int) -> None:
        raise LookupError(number)

    @app.task(name="die_once")
    def die_once(mark: str) -> str:
        """Be killed in the middle of a transaction, the first time."""
        with database.session() as db:
            db.execute(text("SELECT 1"))
            if not Path(mark).exists():
                Path(mark).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return "survived"
