"""`Base` names constraints as PostgreSQL itself would: asked of a real server, with and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import (
    CheckConstraint,
    Column,
    Engine,
    Enum,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    text,
)
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from engineroom import Base, Database
from engineroom.models import NAMING_CONVENTION

Build = Callable[[MetaData], object]
LONG = "a_table_whose_name_is_as_long_as_the_patience_of_its_author"  # 59 bytes
WIDE = "eine_tabelle_für_größere_gemüsehändler_und_ähnliche_öltröpfchen"  # 63 characters, 70 bytes


def simple(metadata: MetaData) -> None:
    Table("shop", metadata, Column("id", Integer, primary_key=True))
    Table(
        "item",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("sku", String, unique=True),
        Column("shop_id", ForeignKey("shop.id")),
        Column("price", Integer),
    )


def several_columns(metadata: MetaData) -> None:
    Table(
        "pair",
        metadata,
        Column("a", Integer, primary_key=True),
        Column("b", Integer, primary_key=True),
    )
    Table(
        "child",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("a", Integer),
        Column("b", Integer),
        ForeignKeyConstraint(["a", "b"], ["pair.a", "pair.b"]),
        UniqueConstraint("a", "b"),
        UniqueConstraint("b", "a"),
    )


def several_unnamed(metadata: MetaData) -> None:
    """Several of a kind on one table, some of them over the same columns."""
    Table("other", metadata, Column("id", Integer, primary_key=True))
    table = Table(
        "busy",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("a", Integer),
        Column("b", Integer),
        Column("c", Integer),
        UniqueConstraint("a"),
        UniqueConstraint("b"),
        UniqueConstraint("c", "a"),
        ForeignKeyConstraint(["a"], ["other.id"]),
        ForeignKeyConstraint(["b"], ["other.id"]),
    )
    for constraint in (table.c.a > 0, table.c.a < 9, table.c.b > 0, table.c.a > table.c.b):
        table.append_constraint(CheckConstraint(constraint))
    table.append_constraint(CheckConstraint(table.c.c + table.c.b > 1))


def checks_in_text(metadata: MetaData) -> None:
    """The usual form of a check: a string."""
    Table(
        "priced",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("price", Integer, CheckConstraint("price > 0")),
        Column("stock", Integer),
        CheckConstraint("stock >= 0"),
        CheckConstraint("price > stock"),
    )


def checks_of_types(metadata: MetaData) -> None:
    Table(
        "typed",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("kind", Enum("a", "b", native_enum=False, create_constraint=True)),
        Column("other", Enum("a", "b", native_enum=False, create_constraint=True)),
    )


def long_names(metadata: MetaData) -> None:
    """Names over 63 bytes: the longer of table and columns gives way."""
    Table(
        LONG,
        metadata,
        Column("id", Integer, primary_key=True),
        Column("a_column_with_a_long_name_too", Integer, unique=True),
        Column("x", Integer, ForeignKey(f"{LONG}.id"), unique=True),
    )
    Table(
        "short",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("a" * 50, Integer),
        Column("b" * 50, Integer),
        Column("c" * 61, Integer, ForeignKey(f"{LONG}.id"), unique=True),
        UniqueConstraint("a" * 50, "b" * 50),
    )


def long_names_alike(metadata: MetaData) -> None:
    """Two that become the same name when they are cut."""
    Table(
        LONG,
        metadata,
        Column("id", Integer, primary_key=True),
        Column("the_same_beginning_of_a_name_first", Integer),
        Column("the_same_beginning_of_a_name_second", Integer),
        UniqueConstraint("the_same_beginning_of_a_name_first"),
        UniqueConstraint("the_same_beginning_of_a_name_second"),
    )


def names_of_several_bytes(metadata: MetaData) -> None:
    name = WIDE.encode()[:62].decode(errors="ignore")
    Table(
        name,
        metadata,
        Column("schlüssel", Integer, primary_key=True),
        Column("größe_in_öltröpfchen", Integer, unique=True),
        Column("maß", Integer, ForeignKey(f"{name}.schlüssel"), unique=True),
        Column("ü" * 30, Integer, unique=True),
        Column("a" + "ü" * 30, Integer, unique=True),
    )


def names_that_meet_across_tables(metadata: MetaData) -> None:
    """Two tables whose constraints would get one name: unique keys are relations of the schema."""
    Table(
        "a_b", metadata, Column("id", Integer, primary_key=True), Column("c", Integer, unique=True)
    )
    Table(
        "a",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("b_c", Integer, unique=True),
    )


def quoted_names(metadata: MetaData) -> None:
    Table(
        "Order",
        metadata,
        Column("Id", Integer, primary_key=True),
        Column("User Name", String, unique=True),
        Column("100%", Integer, unique=True),
    )


SCHEMAS: list[Build] = [
    simple,
    several_columns,
    several_unnamed,
    checks_in_text,
    checks_of_types,
    long_names,
    long_names_alike,
    names_of_several_bytes,
    names_that_meet_across_tables,
    quoted_names,
]


@pytest.fixture
def engine(postgres_url: str) -> Any:
    made = create_engine(postgres_url.replace("postgresql://", "postgresql+psycopg://"))
    yield made
    made.dispose()


def names(engine: Engine) -> list[tuple[str, str, str]]:
    """Return the constraints as PostgreSQL has them: the table, the name and what it says."""
    with engine.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)"
                " FROM pg_constraint WHERE connamespace = 'public'::regnamespace"
                " AND contype IN ('p', 'u', 'f', 'c') ORDER BY 1, 3, 2"
            )
        )
        return [(row[0], row[1], row[2]) for row in rows]


@pytest.mark.parametrize("build", SCHEMAS)
def test_names_are_those_that_postgresql_chooses(engine: Engine, build: Build) -> None:
    unnamed, named = MetaData(), MetaData(naming_convention=NAMING_CONVENTION)
    build(unnamed)
    build(named)
    unnamed.create_all(engine)
    chosen = names(engine)
    unnamed.drop_all(engine)
    named.create_all(engine)
    assert names(engine) == chosen


@pytest.mark.parametrize("build", SCHEMAS)
def test_named_constraints_can_be_created_on_sqlite(sqlite_url: str, build: Build) -> None:
    metadata = MetaData(naming_convention=NAMING_CONVENTION)
    build(metadata)
    with Database(sqlite_url) as db:
        db.create_all(metadata)


def test_a_name_of_ones_own_stays() -> None:
    metadata = MetaData(naming_convention=NAMING_CONVENTION)
    table = Table(
        "own",
        metadata,
        Column("id", Integer),
        Column("a", Integer),
        PrimaryKeyConstraint("id", name="my_key"),
        UniqueConstraint("a", name="my_unique"),
        CheckConstraint("a > 0", name="my_check"),
        ForeignKeyConstraint(["a"], ["own.id"], name="my_reference"),
        Index("my_index", "a"),
    )
    found = {constraint.name for constraint in table.constraints} | {
        index.name for index in table.indexes
    }
    assert found == {"my_key", "my_unique", "my_check", "my_reference", "my_index"}


def test_indexes_are_named_as_sqlalchemy_always_named_them() -> None:
    metadata = MetaData(naming_convention=NAMING_CONVENTION)
    table = Table("t", metadata, Column("a", Integer, index=True))
    plain = Table("t", MetaData(), Column("a", Integer, index=True))
    assert (
        [index.name for index in table.indexes]
        == [index.name for index in plain.indexes]
        == ["ix_t_a"]
    )


def test_base_is_what_the_contract_says() -> None:
    """A `DeclarativeBase` with `AsyncAttrs` and `eager_defaults`."""
    assert issubclass(Base, DeclarativeBase)
    assert issubclass(Base, AsyncAttrs)
    assert Base.metadata.naming_convention["pk"] == NAMING_CONVENTION["pk"]

    class Mapping(Base):
        __tablename__ = "models_mapping"
        id: Mapped[int] = mapped_column(primary_key=True)

    assert Mapping.__mapper__.eager_defaults is True
