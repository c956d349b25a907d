"""The demo keeps its promise, and its proof can fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from scenario import on_a_file
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from engineroom import Database
from engineroom.testing import PostgresServer

CHECKOUT = Path(__file__).parent.parent
SCRIPT = ["examples/shop/app.py"]
MODULE = ["-m", "examples.shop"]
PROOF = "Nothing oversold, and the books balance to the cent."


def start(url: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=CHECKOUT,
        env=os.environ | {"DATABASE_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(url: str, *arguments: str) -> tuple[int, str]:
    """Run the shop to its end; return its exit status and what it said."""
    with start(url, *arguments) as shop:
        said, _ = shop.communicate(timeout=120)
    return shop.returncode, said


def execute(url: str, statement: str) -> None:
    with Database(url) as database, database.session() as db:
        db.execute(text(statement))


@pytest.fixture(scope="module")
def open_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop's SQLite file, after 60 honest orders; its copy has been audited."""
    file = tmp_path_factory.mktemp("shop") / "shop.db"
    status, said = run(f"sqlite:///{file}", *SCRIPT, "--orders", "60", "--buyers", "10")
    assert status == 0, said
    copy = shutil.copy(file, file.with_name("copy.db"))
    status, said = run(f"sqlite:///{copy}", *SCRIPT, "--audit")
    assert (status, PROOF in said) == (0, True), said
    return file


@pytest.mark.parametrize(
    ("url", "program"),
    [("sqlite", MODULE), ("postgresql", SCRIPT)],
    indirect=["url"],
    ids=["sqlite", "postgresql"],
)
def test_the_books_balance(url: str, program: list[str]) -> None:
    status, said = run(url, *program, "--orders", "200", "--buyers", "50")
    assert status == 0, said
    assert PROOF in said
    assert "sold out" in said
    assert "gave up" in said
    assert len(said.splitlines()) < 20, "without a terminal the progress bar is one line"


@on_a_file
def test_it_can_be_run_again(url: str) -> None:
    for orders in 20, 10:
        status, said = run(url, *SCRIPT, "--orders", str(orders))
        assert status == 0, said


TAMPERING = {
    "a piece vanished": "UPDATE engineroom_shop_product SET stock = stock - 1 WHERE id = 1",
    "a cent vanished": "UPDATE engineroom_shop_entry SET amount = amount - 1 WHERE id = 1",
    "a booking is one-sided": "DELETE FROM engineroom_shop_entry WHERE account = 'sales'",
    "an order is worth more": "UPDATE engineroom_shop_order SET total = total + 1 WHERE id = 1",
    "oversold": "UPDATE engineroom_shop_product"
    " SET stock = stock - delivered, delivered = 0 WHERE id = 1",
}


@pytest.mark.parametrize("statement", TAMPERING.values(), ids=TAMPERING.keys())
def test_the_proof_fails_when(statement: str, open_shop: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{shutil.copy(open_shop, tmp_path)}"
    execute(url, statement)

    status, said = run(url, *SCRIPT, "--audit")
    assert (status, PROOF in said) == (1, False), said
    assert "Wrong:" in said


def test_the_proof_fails_on_a_server_too(postgres_url: str) -> None:
    status, said = run(postgres_url, *SCRIPT, "--orders", "20")
    assert status == 0, said

    execute(postgres_url, TAMPERING["a cent vanished"])

    status, said = run(postgres_url, *SCRIPT, "--audit")
    assert (status, PROOF in said) == (1, False), said


FORGETFUL = """
import sys
from examples.shop import app

async def serve(wish):
    return "sold"

app.serve = serve
sys.exit(app.main())
"""


@on_a_file
def test_the_proof_fails_when_a_confirmed_order_is_not_in_the_books(url: str) -> None:
    status, said = run(url, "-c", FORGETFUL, "--orders", "20")
    assert (status, PROOF in said) == (1, False), said
    assert "20 orders were confirmed, 0 are in the books" in said


@on_a_file
def test_ctrl_c_ends_it_neatly(
    url: str, eventually: Callable[[Callable[[], object]], None]
) -> None:
    def is_selling() -> bool:
        try:
            with Database(url) as database, database.reader() as db:
                orders = db.scalar(text("SELECT count(*) FROM engineroom_shop_order"))
        except SQLAlchemyError:  # not open yet
            return False
        return bool(orders)

    with start(url, *SCRIPT, "--orders", "100000") as shop:
        eventually(is_selling)
        shop.send_signal(signal.SIGINT)
        said, _ = shop.communicate(timeout=30)
    assert shop.returncode == 130, said
    assert "Traceback" not in said
    assert "Closed early" in said

    status, said = run(url, *SCRIPT, "--audit")
    assert (status, PROOF in said) == (0, True), said


def test_it_touches_no_tables_but_its_own(
    postgres_url: str, pg18: PostgresServer, database: str
) -> None:
    for table in "shop_order", "product", "entry":
        pg18.execute(f"CREATE TABLE {table} AS SELECT 1 AS mine", database)

    status, said = run(postgres_url, *SCRIPT, "--orders", "20")

    assert status == 0, said
    for table in "shop_order", "product", "entry":
        assert pg18.execute(f"SELECT mine FROM {table}", database) == [["1"]]
