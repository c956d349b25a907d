"""As much of Amazon's client as docs/credentials.md uses, with its signature."""
# ruff: noqa: N803

from __future__ import annotations

SECRET = "first"
CALLS: list[tuple[str, int, str]] = []


class RDS:
    def generate_db_auth_token(
        self,
        DBHostname: str,
        Port: int,
        DBUsername: str,
        Region: str | None = None,
    ) -> str:
        CALLS.append((DBHostname, Port, DBUsername))
        return SECRET


def client(service_name: str, *, region_name: str) -> RDS:
    assert (service_name, region_name) == ("rds", "eu-central-1")
    return RDS()
