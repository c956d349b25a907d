"""`session.get()` is SQLAlchemy's in all that it does, but for the statement it makes each time."""

from __future__ import annotations

import re
import uuid
from typing import Any, ClassVar

import pytest
from sqlalchemy import Column, ForeignKey, Integer, MetaData, String, Table, event, select, text
from sqlalchemy.exc import ArgumentError, InvalidRequestError, NoInspectionAvailable, NoResultFound
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import (
    Mapped,
    Session,
    lazyload,
    mapped_column,
    registry,
    relationship,
    with_loader_criteria,
)

from engineroom import Base, Database


class Model(Base):
    """The base of the tables of these tests."""

    __abstract__ = True
    metadata = MetaData()


class Shelf(Model):
    """What has its tins with it, by a JOIN that repeats it; its key has another name in Python."""

    __tablename__ = "getting_shelf"
    pk: Mapped[int] = mapped_column("shelf_id", primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(20))
    tins: Mapped[list[Tin]] = relationship(lazy="joined", order_by="Tin.pk")


class Tin(Model):
    """What stands there."""

    __tablename__ = "getting_tin"
    pk: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    shelf: Mapped[int] = mapped_column(ForeignKey(Shelf.pk))


class Animal(Model):
    """A class with subclasses, in its table and in one of their own."""

    __tablename__ = "getting_animal"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(20))
    __mapper_args__: ClassVar = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Cat(Animal):
    __mapper_args__: ClassVar = {"polymorphic_identity": "cat"}


class Dog(Animal):
    __tablename__ = "getting_dog"
    id: Mapped[int] = mapped_column(ForeignKey(Animal.id), primary_key=True)
    name: Mapped[str] = mapped_column(String(20))
    __mapper_args__: ClassVar = {"polymorphic_identity": "dog"}


class Pair(Model):
    """What has a key of two columns."""

    __tablename__ = "getting_pair"
    left: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    right: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Ticket(Model):
    """What has a UUID for a key."""

    __tablename__ = "getting_ticket"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)


TICKET = uuid.UUID(int=7)


@pytest.fixture
def store(open_door: Any, url: str) -> Any:
    """A door to these tables, with something in them."""
    with Database(url) as database:
        Model.metadata.create_all(database.engine)
        with database.session() as db:
            db.add_all([Shelf(pk=1, name="one"), Shelf(pk=2, name="two"), Ticket(id=TICKET)])
            db.add_all([Cat(id=1), Dog(id=2, name="Rex"), Animal(id=3), Pair(left=1, right=2)])
            db.flush()
            db.add_all(Tin(pk=n, shelf=1) for n in range(3))
    return open_door()


def statements(plain: Any, db: Any) -> list[Any]:
    """What a session executes from now on."""
    seen: list[Any] = []
    listened = getattr(plain(db), "sync_session", plain(db))
    event.listen(listened, "do_orm_execute", lambda state: seen.append(state.statement))
    return seen


def test_the_statement_is_made_once_for_a_class(store: Any, plain: Any) -> None:
    for verb in store.session, store.reader:
        with verb() as db:
            seen = statements(plain, db)
            assert db.get(Shelf, 1).name == "one"
            assert db.get_one(Shelf, 2).name == "two"
            assert db.get(Ticket, TICKET).id == TICKET
            first, second, third = seen
            assert first is second is not third


def test_what_is_sent_is_what_sqlalchemy_sends(store: Any, plain: Any) -> None:
    sent: list[tuple[str, Any]] = []
    engine = plain(store).engine
    event.listen(
        getattr(engine, "sync_engine", engine),
        "before_cursor_execute",
        lambda connection, cursor, statement, parameters, *rest: sent.append(
            (re.sub(r" AS \w+", "", statement), parameters)  # 2.0 gives each column another name
        ),
    )
    with store.session() as db:
        for entity, key in (Shelf, 1), (Animal, 1), (Cat, 1), (Dog, 2), (Ticket, TICKET):
            for options in {}, {"execution_options": {"made": "by SQLAlchemy"}}:
                db.expunge_all()
                db.get(entity, key, **options)
    sent = [each for each in sent if each[0].startswith("SELECT")]
    for ours, theirs in zip(sent[::2], sent[1::2], strict=True):
        assert ours == theirs


def test_what_joins_repeat_is_one_object(store: Any) -> None:
    with store.session() as db:
        assert [tin.pk for tin in db.get(Shelf, 1).tins] == [0, 1, 2]
        assert db.get(Shelf, 2).tins == []


def test_what_is_not_there_is_none(store: Any) -> None:
    with store.session() as db:
        assert db.get(Shelf, 9) is None
        with pytest.raises(NoResultFound):
            db.get_one(Shelf, 9)


def test_what_the_session_knows_is_not_asked_for(store: Any, plain: Any) -> None:
    with store.session() as db:
        known = db.get(Shelf, 1)
        seen = statements(plain, db)
        assert db.get(Shelf, 1) is known
        assert seen == []
        db.expire(known)
        db.execute(text("UPDATE getting_shelf SET name = 'new' WHERE shelf_id = 1"))
        assert db.get(Shelf, 1) is known
        assert known.name == "new"


def test_what_was_added_is_sent_first_and_what_was_deleted_is_gone(
    store: Any, open_door: Any
) -> None:
    with store.session() as db:
        db.add(Shelf(pk=3, name="three"))
        assert db.get(Shelf, 3) is None
    with open_door(autoflush=True).session() as db:
        db.delete(db.get(Shelf, 3))
        db.add(Shelf(pk=4, name="four"))
        assert db.get(Shelf, 4).name == "four"
        assert db.get(Shelf, 3) is None
        db.add(Shelf(pk=3, name="three"))


def test_a_class_finds_its_subclasses_and_not_its_sisters(store: Any) -> None:
    with store.session() as db:
        assert isinstance(db.get(Cat, 1), Cat)
        assert db.get(Dog, 1) is None  # known to be a cat
        db.expunge_all()
        assert db.get(Cat, 2) is None
        assert type(db.get(Animal, 2)) is Dog
        assert type(db.get(Animal, 3)) is Animal
        assert db.get(Cat, 3) is None


def test_other_keys_are_sqlalchemys(store: Any) -> None:
    with store.session() as db:
        pair = db.get(Pair, (1, 2))
        assert db.get(Pair, {"left": 1, "right": 2}) is pair
        assert db.get(Shelf, (1,)) is db.get(Shelf, {"pk": 1}) is db.get(Shelf, 1)


def test_criteria_of_the_session_hold_for_it(store: Any, plain: Any) -> None:
    def only_the_second(state: Any) -> None:
        state.statement = state.statement.options(with_loader_criteria(Shelf, Shelf.pk == 2))

    with store.session() as db:
        listened = getattr(plain(db), "sync_session", plain(db))
        event.listen(listened, "do_orm_execute", only_the_second)
        assert db.get(Shelf, 1) is None
        assert db.get(Shelf, 2).name == "two"
    with store.session() as db:  # another session does not meet them
        assert db.get(Shelf, 1).name == "one"


def test_options_hold(store: Any, plain: Any) -> None:
    with store.session() as db:
        seen = statements(plain, db)
        db.get(Animal, 1, with_for_update={})
        assert "FOR UPDATE" in str(seen[0])
        known = db.get(Shelf, 1, options=[lazyload(Shelf.tins)], with_for_update=True)
        assert "tins" not in vars(known)
        known.name = "unsent"
        assert db.get(Shelf, 1, populate_existing=True).name in {"unsent", "one"}
        db.expunge_all()
        assert db.get(Shelf, 2, identity_token="there") is not db.get(Shelf, 2)


@pytest.mark.parametrize(
    ("entity", "key", "error"),
    [
        ("Shelf", 1, NoInspectionAvailable),
        ([Shelf], 1, NoInspectionAvailable),
        (int, 1, NoInspectionAvailable),
        (Shelf.pk, 1, ArgumentError),
        (Pair, 1, InvalidRequestError),
        (Shelf, (1, 2), InvalidRequestError),
    ],
)
def test_nonsense_is_refused_by_sqlalchemy(store: Any, entity: Any, key: Any, error: Any) -> None:
    with store.session() as db, pytest.raises(error):
        db.get(entity, key)


def test_a_class_may_be_mapped_anew(store: Any) -> None:
    """As tests do between `start_mappers()` and `clear_mappers()`."""

    class Plain:
        pass

    for name in "name", "title":
        mappers = registry()
        columns = (
            Column("shelf_id", Integer, primary_key=True),
            Column("name", String(20), key=name),
        )
        mappers.map_imperatively(Plain, Table("getting_shelf", MetaData(), *columns))
        with store.session() as db:
            assert getattr(db.get(Plain, 1), name) == "one"
        mappers.dispose()


class Renaming(Session):
    """Has a `get` of its own."""

    def get(self, entity: Any, ident: Any, **options: Any) -> Any:
        found = super().get(entity, ident, **options)
        found.name = f"{found.name}, renamed"
        return found


class AsyncRenaming(AsyncSession):
    """Brings it along."""

    sync_session_class = Renaming


def test_a_session_class_may_have_a_get_of_its_own(store: Any, open_door: Any, twin: str) -> None:
    classes: dict[str, Any] = {
        "sync": {"session_class": Renaming},
        "async": {"async_session_class": AsyncRenaming},
    }
    with open_door(**classes[twin]).session() as db:
        assert db.get(Shelf, 1).name == "one, renamed"
    with store.session() as db:
        assert db.scalar(select(Shelf.name).where(Shelf.pk == 1)) == "one, renamed"
