# ruff: noqa: E501, ERA001  # URLs are longer than a line, and each group has a name
"""URLs as the consoles of providers print them, each told to both drivers as its docs say."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from engineroom.backends import Role, Side
from engineroom.backends.postgresql import PostgreSQL
from engineroom.backends.postgresql.parameters import KNOWN
from engineroom.connecting import revealed
from engineroom.urls import masked, read_url

PASSWORD = "AVNS_k0wn-to.be~secret"


@dataclass
class Meant:
    """What a URL means, by the documentation of who prints it."""

    host: str | None
    port: int = 5432
    user: str | None = "u"
    password: str | None = PASSWORD
    database: str | None = "d"
    sslmode: str = "prefer"
    options: str = ""
    channel_binding: bool = False
    application_name: str = ""


DIGITALOCEAN = "db-postgresql-fra1-1-do-user-1-0.b.db.ondigitalocean.com"
NEON = "ep-cool-darkness-123456.us-east-2.aws.neon.tech"
RDS = "shop.c9akciq32.eu-central-1.rds.amazonaws.com"
AURORA = "shop.cluster-c9akciq32.eu-central-1.rds.amazonaws.com"
CLOUD_SQL = "/cloudsql/project-1:europe-west1:shop"
P = PASSWORD

URLS: dict[str, Meant] = {
    # Heroku: config var DATABASE_URL
    f"postgres://u:{P}@ec2-54-1-2-3.compute-1.amazonaws.com:5432/d": Meant(
        "ec2-54-1-2-3.compute-1.amazonaws.com"
    ),
    f"postgres://u:{P}@c5flugvup2318r.cluster-czrs8kj4isg7.us-east-1.rds.amazonaws.com:5432/d?sslmode=require": Meant(
        "c5flugvup2318r.cluster-czrs8kj4isg7.us-east-1.rds.amazonaws.com", sslmode="require"
    ),
    f"postgres://u:{P}@127.0.0.1:5433/d": Meant("127.0.0.1", 5433),  # its pgbouncer buildpack
    # Render: internal and external
    f"postgresql://u:{P}@dpg-abc123-a/d": Meant("dpg-abc123-a"),
    f"postgresql://u:{P}@dpg-abc123-a.oregon-postgres.render.com/d": Meant(
        "dpg-abc123-a.oregon-postgres.render.com"
    ),
    f"postgresql://u:{P}@dpg-abc123-a.frankfurt-postgres.render.com:5432/d?sslmode=require": Meant(
        "dpg-abc123-a.frankfurt-postgres.render.com", sslmode="require"
    ),
    # Supabase: direct, its pooler in session and in transaction mode, the dedicated one
    f"postgresql://postgres:{P}@db.abcdefghijkl.supabase.co:5432/postgres": Meant(
        "db.abcdefghijkl.supabase.co", user="postgres", database="postgres"
    ),
    f"postgres://postgres.abcdefghijkl:{P}@aws-0-eu-central-1.pooler.supabase.com:5432/postgres": Meant(
        "aws-0-eu-central-1.pooler.supabase.com", user="postgres.abcdefghijkl", database="postgres"
    ),
    f"postgres://postgres.abcdefghijkl:{P}@aws-0-eu-central-1.pooler.supabase.com:6543/postgres": Meant(
        *("aws-0-eu-central-1.pooler.supabase.com", 6543, "postgres.abcdefghijkl"),
        database="postgres",
    ),
    f"postgres://postgres:{P}@db.abcdefghijkl.supabase.co:6543/postgres": Meant(
        "db.abcdefghijkl.supabase.co", 6543, user="postgres", database="postgres"
    ),
    f"postgresql://postgres.ref:{P}@pooler.supabase.com:5432/postgres?options=reference%3Dabc": Meant(
        *("pooler.supabase.com", 5432, "postgres.ref"),
        database="postgres",
        options="reference=abc",
    ),
    # Neon: direct, pooled, with channel binding, with the endpoint as an option
    f"postgresql://u:{P}@{NEON}/d?sslmode=require": Meant(NEON, sslmode="require"),
    f"postgresql://u:{P}@{NEON}/d?sslmode=require&channel_binding=require": Meant(
        NEON, sslmode="require", channel_binding=True
    ),
    f"postgresql://u:{P}@ep-cool-darkness-123456-pooler.us-east-2.aws.neon.tech/d?sslmode=require": Meant(
        "ep-cool-darkness-123456-pooler.us-east-2.aws.neon.tech", sslmode="require"
    ),
    f"postgres://u:{P}@{NEON}/d?options=endpoint%3Dep-cool-darkness-123456&sslmode=require": Meant(
        NEON, sslmode="require", options="endpoint=ep-cool-darkness-123456"
    ),
    # Amazon RDS and Aurora: with the bundle, without a password for IAM, the reader's endpoint
    f"postgresql://u:{P}@{RDS}:5432/d": Meant(RDS),
    f"postgresql://u:{P}@{RDS}:5432/d?sslmode=verify-full&sslrootcert=BUNDLE": Meant(
        RDS, sslmode="verify-full"
    ),
    f"postgresql://u@{RDS}:5432/d?sslmode=verify-ca&sslrootcert=BUNDLE": Meant(
        RDS, password=None, sslmode="verify-ca"
    ),
    f"postgresql://u:{P}@{AURORA}:5432/d?target_session_attrs=any": Meant(AURORA),
    f"postgresql://u:{P}@shop.cluster-ro-c9akciq32.eu-central-1.rds.amazonaws.com/d": Meant(
        "shop.cluster-ro-c9akciq32.eu-central-1.rds.amazonaws.com"
    ),
    # Google Cloud SQL: the socket of the proxy, two spellings, and the proxy on this machine
    f"postgresql://u:{P}@/d?host={CLOUD_SQL}": Meant(CLOUD_SQL),
    f"postgresql+asyncpg://u:{P}@/d?host={CLOUD_SQL}": Meant(CLOUD_SQL),
    f"postgresql://u:{P}@%2Fcloudsql%2Fproject-1%3Aeurope-west1%3Ashop/d": Meant(CLOUD_SQL),
    f"postgresql+psycopg2://u:{P}@127.0.0.1:5432/d": Meant("127.0.0.1"),
    f"postgresql://u%40project-1.iam:{P}@127.0.0.1/d": Meant("127.0.0.1", user="u@project-1.iam"),
    # Azure: flexible server, its PgBouncer, the older single server
    f"postgresql://u:{P}@shop.postgres.database.azure.com:5432/d?sslmode=require": Meant(
        "shop.postgres.database.azure.com", sslmode="require"
    ),
    f"postgres://u:{P}@shop.postgres.database.azure.com/d?sslmode=require": Meant(
        "shop.postgres.database.azure.com", sslmode="require"
    ),
    f"postgresql://u:{P}@shop.postgres.database.azure.com:6432/d?sslmode=require": Meant(
        "shop.postgres.database.azure.com", 6432, sslmode="require"
    ),
    f"postgres://u%40shop:{P}@shop.postgres.database.azure.com/d?sslmode=require": Meant(
        "shop.postgres.database.azure.com", user="u@shop", sslmode="require"
    ),
    # DigitalOcean: database, pool, private network
    f"postgresql://doadmin:{P}@{DIGITALOCEAN}:25060/defaultdb?sslmode=require": Meant(
        DIGITALOCEAN, 25060, "doadmin", database="defaultdb", sslmode="require"
    ),
    f"postgresql://doadmin:{P}@{DIGITALOCEAN}:25061/pool?sslmode=require": Meant(
        DIGITALOCEAN, 25061, "doadmin", database="pool", sslmode="require"
    ),
    f"postgresql://doadmin:{P}@private-{DIGITALOCEAN}:25060/defaultdb?sslmode=require": Meant(
        f"private-{DIGITALOCEAN}", 25060, "doadmin", database="defaultdb", sslmode="require"
    ),
    # Railway: public and private
    f"postgresql://postgres:{P}@shuttle.proxy.rlwy.net:34567/railway": Meant(
        "shuttle.proxy.rlwy.net", 34567, "postgres", database="railway"
    ),
    f"postgresql://postgres:{P}@postgres.railway.internal:5432/railway": Meant(
        "postgres.railway.internal", user="postgres", database="railway"
    ),
    # Fly: attached, and by address
    f"postgres://u:{P}@shop-db.flycast:5432/d?sslmode=disable": Meant(
        "shop-db.flycast", sslmode="disable"
    ),
    f"postgres://u:{P}@[fdaa:0:2e26:a7b:7d17:1:2:3]:5433/d": Meant(
        "fdaa:0:2e26:a7b:7d17:1:2:3", 5433
    ),
    f"postgresql://fly-user:{P}@pgbouncer.abc123.flympg.net/fly-db": Meant(
        "pgbouncer.abc123.flympg.net", user="fly-user", database="fly-db"
    ),
    # Crunchy Bridge
    f"postgres://application:{P}@p.abc123.db.postgresbridge.com:5432/postgres": Meant(
        "p.abc123.db.postgresbridge.com", user="application", database="postgres"
    ),
    f"postgres://application:{P}@p.abc123.db.postgresbridge.com:5431/postgres?sslmode=require": Meant(
        *("p.abc123.db.postgresbridge.com", 5431, "application"),
        database="postgres",
        sslmode="require",
    ),
    # Timescale, and its pooler
    f"postgres://tsdbadmin:{P}@abc.def.tsdb.cloud.timescale.com:31234/tsdb?sslmode=require": Meant(
        *("abc.def.tsdb.cloud.timescale.com", 31234, "tsdbadmin"),
        database="tsdb",
        sslmode="require",
    ),
    # Aiven, with a name to find it by
    f"postgres://avnadmin:{P}@pg-1-shop.a.aivencloud.com:12691/defaultdb?sslmode=require&application_name=shop": Meant(
        *("pg-1-shop.a.aivencloud.com", 12691, "avnadmin"),
        database="defaultdb",
        sslmode="require",
        application_name="shop",
    ),
}


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for known in KNOWN.values():
        monkeypatch.delenv(known.variable or "PG", raising=False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "global-bundle.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    return path


def test_there_are_forty() -> None:
    assert len(URLS) >= 40


def arguments(backend: PostgreSQL, side: Side) -> dict[str, Any]:
    """Return what the driver's `connect` gets in the end, as SQLAlchemy puts it together."""
    url = backend.engine_url(side)
    options = backend.engine_options(side, Role.PRIMARY, {})["connect_args"]
    _, positional = url.get_dialect()().create_connect_args(url)
    return revealed({**positional, **options})


@pytest.mark.parametrize("url", URLS, ids=lambda url: url.partition("@")[2][:60])
def test_what_a_console_prints_works_as_it_is(url: str, bundle: Path) -> None:
    meant = URLS[url]
    url = url.replace("BUNDLE", str(bundle))
    assert PASSWORD not in masked(url)
    backend = PostgreSQL(read_url(url))

    told = arguments(backend, Side.SYNC)
    assert told.get("host") == meant.host
    assert int(told.get("port", 5432)) == meant.port
    assert told.get("user") == meant.user
    assert told.get("password") == meant.password
    assert told.get("dbname") == meant.database
    assert told.get("sslmode", "prefer") == meant.sslmode
    assert told.get("options", "") == meant.options
    assert told.get("application_name", "") == meant.application_name
    assert told.get("channel_binding", "prefer") == (
        "require" if meant.channel_binding else "prefer"
    )

    asynchronous = backend.engine_url(Side.ASYNC).get_driver_name()
    assert asynchronous == ("psycopg" if meant.channel_binding else "asyncpg")
    if asynchronous == "psycopg":
        return
    told = arguments(backend, Side.ASYNC)
    assert told.get("host") == meant.host
    assert told["port"] == meant.port
    assert told.get("user") == meant.user
    assert told.get("password") == meant.password
    assert told.get("database") == meant.database
    settings = told.get("server_settings", {})
    assert settings.get("options", "") == meant.options
    assert settings.get("application_name", "") == meant.application_name
    verifies = {
        "require": (ssl.CERT_NONE, False),
        "verify-ca": (ssl.CERT_REQUIRED, False),
        "verify-full": (ssl.CERT_REQUIRED, True),
    }
    if meant.sslmode in verifies:
        context = told["ssl"]
        assert (context.verify_mode, context.check_hostname) == verifies[meant.sslmode]
    else:
        assert told["ssl"] == (False if meant.sslmode == "disable" else meant.sslmode)
