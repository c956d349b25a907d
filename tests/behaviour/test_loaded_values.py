"""What was loaded stays readable after the scope, however it ended (guarantee 12)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import ForeignKey, ForeignKeyConstraint, String, event, func, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Mapped, mapped_column, relationship, selectinload

from engineroom import Base, Database
from engineroom.errors import SessionClosed


class Author(Base):
    __tablename__ = "loaded_author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)
    made: Mapped[str] = mapped_column(String(50), server_default=text("'fresh'"))
    touched: Mapped[str] = mapped_column(
        String(50), server_default=text("'never'"), onupdate=func.lower("TOUCHED")
    )
    books: Mapped[list[Book]] = relationship(back_populates="author")


class Book(Base):
    __tablename__ = "loaded_book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(50))
    author_id: Mapped[int] = mapped_column(
        ForeignKey(Author.id, deferrable=True, initially="DEFERRED")
    )
    author: Mapped[Author] = relationship(back_populates="books")


@compiles(ForeignKeyConstraint, "mysql")
def immediate(constraint: Any, compiler: Any, **kw: Any) -> str:
    """Leave out what MySQL does not know: it checks at each statement."""
    ddl: str = compiler.visit_foreign_key_constraint(constraint, **kw)
    return ddl.replace(" DEFERRABLE INITIALLY DEFERRED", "")


@pytest.fixture
def library(open_door: Any, url: str) -> Any:
    """A door to a database with one author who has two books."""
    tables = [Author.__table__, Book.__table__]
    with Database(url) as maker:
        Base.metadata.create_all(maker.engine, tables)
        with maker.session() as db:
            db.add(Author(name="Ada", books=[Book(title="one"), Book(title="two")]))
    return open_door()


def load(db: Any) -> Author:
    author: Author = db.scalars(select(Author).options(selectinload(Author.books))).one()
    return author


def is_readable(author: Author, name: str = "Ada") -> bool:
    """Read everything that was loaded, relationships and their columns too."""
    assert (author.id, author.name, author.made) == (1, name, "fresh")
    assert [book.title for book in author.books] == ["one", "two"]
    return True


def commits(library: Any, use: Callable[[Any], None]) -> None:
    with library.session() as db:
        use(db)


def raises(library: Any, use: Callable[[Any], None]) -> None:
    with pytest.raises(ValueError, match="mine"), library.session() as db:
        use(db)
        raise ValueError("mine")


def is_interrupted(library: Any, use: Callable[[Any], None]) -> None:
    with pytest.raises(KeyboardInterrupt), library.session() as db:
        use(db)
        raise KeyboardInterrupt


def fails_at_flush(library: Any, use: Callable[[Any], None]) -> None:
    with pytest.raises(IntegrityError), library.session() as db:
        use(db)
        db.add_all([Author(name="twin"), Author(name="twin")])


def fails_at_commit(library: Any, use: Callable[[Any], None]) -> None:
    """The COMMIT itself is refused: a deferred foreign key. On MySQL it is the flush before."""
    with pytest.raises(IntegrityError), library.session() as db:
        use(db)
        db.add(Book(title="orphan", author_id=99))


def fails_in_the_body(library: Any, use: Callable[[Any], None]) -> None:
    """A statement fails, and with it PostgreSQL's whole transaction."""
    with pytest.raises(DBAPIError), library.session() as db:
        use(db)
        db.execute(text("SELECT nonsense FROM nowhere"))


def fails_at_a_flush_of_the_body(library: Any, use: Callable[[Any], None]) -> None:
    """SQLAlchemy rolls back in the flush already, before the scope knows of it."""
    with pytest.raises(IntegrityError), library.session() as db:
        use(db)
        db.add_all([Author(name="twin"), Author(name="twin")])
        db.flush()


def closes_early(library: Any, use: Callable[[Any], None]) -> None:
    with library.session() as db:
        use(db)
        db.close()


def reads_only(library: Any, use: Callable[[Any], None]) -> None:
    with library.session(read_only=True) as db:
        use(db)


def reads_only_and_raises(library: Any, use: Callable[[Any], None]) -> None:
    with pytest.raises(ValueError, match="mine"), library.session(read_only=True) as db:
        use(db)
        raise ValueError("mine")


def reader_raises(library: Any, use: Callable[[Any], None]) -> None:
    with pytest.raises(ValueError, match="mine"), library.reader() as db:
        use(db)
        raise ValueError("mine")


WRITING_ENDS = [
    commits,
    raises,
    is_interrupted,
    fails_at_flush,
    fails_at_a_flush_of_the_body,
    fails_at_commit,
    fails_in_the_body,
]
ENDS = [*WRITING_ENDS, closes_early, reads_only, reads_only_and_raises, reader_raises]


@pytest.mark.parametrize("end", ENDS)
def test_what_was_loaded_stays_readable(library: Any, end: Any) -> None:
    seen: list[Author] = []
    end(library, lambda db: seen.append(load(db)))
    assert is_readable(seen[0])


@pytest.mark.parametrize("end", WRITING_ENDS)
def test_what_was_changed_shows_what_was_last_seen(library: Any, end: Any) -> None:
    """After a rollback that is not what is stored."""
    seen: list[Author] = []

    def rename(db: Any) -> None:
        author = load(db)
        author.name = "Lovelace"
        db.flush()
        seen.append(author)

    end(library, rename)
    assert is_readable(seen[0], "Lovelace")


@pytest.mark.parametrize("end", WRITING_ENDS)
def test_new_objects_stay_readable_with_what_the_server_gave_them(library: Any, end: Any) -> None:
    seen: list[Author] = []

    def create(db: Any) -> None:
        author = Author(name="Grace", books=[Book(title="three")])
        db.add(author)
        db.flush()
        seen.append(author)

    end(library, create)
    assert (seen[0].id, seen[0].name, seen[0].made, seen[0].touched) == (
        2,
        "Grace",
        "fresh",
        "never",
    )
    assert [book.title for book in seen[0].books] == ["three"]


def test_new_objects_that_were_never_flushed_stay_readable(library: Any) -> None:
    seen: list[Author] = []

    def create(db: Any) -> None:
        seen.append(Author(name="Grace"))
        db.add(seen[0])

    raises(library, create)
    assert seen[0].name == "Grace"


@pytest.mark.parametrize("end", WRITING_ENDS)
def test_deleted_objects_stay_readable(library: Any, end: Any) -> None:
    seen: list[Author] = []

    def delete(db: Any) -> None:
        author = load(db)
        for book in list(author.books):
            db.delete(book)
        db.flush()
        seen.append(author)
        seen.extend(author.books)  # type: ignore[arg-type]

    end(library, delete)
    assert seen[0].name == "Ada"
    assert [book.title for book in seen[1:]] == ["one", "two"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("end", WRITING_ENDS)
def test_what_the_server_computed_at_an_update_is_there(library: Any, end: Any) -> None:
    """`eager_defaults` fetches a server-side `onupdate` with the UPDATE itself."""
    seen: list[Author] = []

    def touch(db: Any) -> None:
        author = load(db)
        author.made = "stale"
        db.flush()
        seen.append(author)

    end(library, touch)
    assert (seen[0].made, seen[0].touched) == ("stale", "touched")


def test_a_savepoints_rollback_inside_the_scope_is_sqlalchemys_own(library: Any) -> None:
    """No cleverness inside the scope: there the values are those of the database again."""
    with library.session() as db:
        author = load(db)
        with pytest.raises(ValueError, match="mine"), db.begin_nested():
            author.name = "Lovelace"
            db.flush()
            raise ValueError("mine")
        db.refresh(author)
        assert author.name == "Ada"
    assert author.name == "Ada"


def test_what_the_application_keeps_on_an_object_is_its_own(library: Any) -> None:
    """What a listener takes off as the object is emptied stays off, and keeps nothing open."""

    def forget(author: Author, names: object) -> None:
        vars(author).pop("cached", None)

    event.listen(Author, "expire", forget)
    try:
        with library.session() as db:
            author = db.get(Author, 1)
            author.cached = 5
            db.rollback()
    finally:
        event.remove(Author, "expire", forget)
    assert author.name == "Ada"
    with pytest.raises(SessionClosed):
        db.execute(text("SELECT 1"))
