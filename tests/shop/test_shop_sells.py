"""What the shop sells, and what it does not: no test sees what another one has bought."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from engineroom import DatabaseSessionManager
from engineroom.testing import assert_round_trips
from examples.shop.app import Entry, Order, Product, faults, shelves
from examples.shop.service import app


@pytest.fixture
def shop(db_sandbox: DatabaseSessionManager) -> Iterator[TestClient]:
    """A client of the shop, which opens with full shelves."""
    with TestClient(app) as client:
        yield client


def lamp(shop: TestClient) -> dict[str, int]:
    """Return the shelf with the lamps, of which there are five; a sequence never goes back."""
    (shelf,) = [shelf for shelf in shop.get("/stock").json() if shelf["name"] == "Lamp"]
    found: dict[str, int] = shelf
    return found


def told_by_shop(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the shop logged, and nobody else."""
    return [record.message for record in caplog.records if record.name == "examples.shop.service"]


def test_what_is_bought_is_ordered_and_off_the_shelf(
    shop: TestClient, db_session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "examples.shop.service"):
        number = lamp(shop)["id"]
        answer = shop.post("/orders", json={"product_id": number, "quantity": 2})

    order = answer.json()
    assert answer.status_code == 201
    assert (order["product_id"], order["quantity"], order["total"]) == (number, 2, 17_998)
    assert lamp(shop)["stock"] == 3
    assert shop.get("/orders").json() == [order]
    assert told_by_shop(caplog) == [f"Order {order['id']} is paid: pack 2 of {number}"]
    assert db_session.scalar(select(func.sum(Entry.amount))) == 0
    assert list(faults(db_session, shelves(db_session), 1)) == []


def test_what_is_sold_out_is_rolled_back(
    shop: TestClient, db_session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "examples.shop.service"):
        answer = shop.post("/orders", json={"product_id": lamp(shop)["id"], "quantity": 6})

    assert answer.status_code == 409
    assert answer.json() == {"detail": "Lamp: there are not so many left"}
    assert (lamp(shop)["stock"], db_session.scalars(select(Order)).all()) == (5, [])
    assert told_by_shop(caplog) == [], "nothing was packed"


@pytest.mark.parametrize(
    ("wanted", "status"),
    [
        ({"product_id": 1_000_000}, 404),
        ({"quantity": 0}, 422),
        ({"quantity": -1}, 422),
        ({"product_id": 2**70}, 422),
    ],
)
def test_what_cannot_be_bought(shop: TestClient, wanted: dict[str, int], status: int) -> None:
    wanted = {"product_id": lamp(shop)["id"], **wanted}
    for path in "/orders", "/deliveries":
        assert shop.post(path, json=wanted).status_code == status
    assert lamp(shop)["stock"] == 5


def test_a_delivery_fills_the_shelf(shop: TestClient, db_session: Session) -> None:
    assert (
        shop.post("/deliveries", json={"product_id": lamp(shop)["id"], "quantity": 7}).status_code
        == 204
    )
    assert lamp(shop)["stock"] == 12
    assert db_session.get_one(Product, lamp(shop)["id"]).delivered == 12
    assert list(faults(db_session, shelves(db_session), 0)) == []


def test_it_opens_again_with_what_was_sold(shop: TestClient) -> None:
    assert shop.post("/orders", json={"product_id": lamp(shop)["id"]}).status_code == 201
    with TestClient(app) as another:
        assert lamp(another)["stock"] == 4


def test_the_shelves_are_one_round_trip(shop: TestClient, db_sandbox: Any) -> None:
    shop.get("/stock")
    with assert_round_trips(1, db_sandbox):
        shop.get("/stock")


def test_openapi_knows_nothing_of_sessions(shop: TestClient) -> None:
    schema = shop.get("/docs/openapi.json").json()
    parameters = {
        f"{verb} {path}": [parameter["name"] for parameter in route.get("parameters", [])]
        for path, verbs in schema["paths"].items()
        for verb, route in verbs.items()
    }
    assert parameters == {
        "get /stock": [],
        "get /orders": [],
        "post /orders": [],
        "post /deliveries": [],
        "get /stats": [],
        "post /hold": ["seconds"],
    }
    bodies = schema["components"]["schemas"]
    assert set(bodies["Purchase"]["properties"]) == {"product_id", "quantity", "pays_after"}


def test_the_page_needs_nothing_from_elsewhere(shop: TestClient) -> None:
    page = shop.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "//" not in page.text.replace("// ", ""), "no address of another host"
    assert shop.get("/ready").json()["database"] == "ok"
