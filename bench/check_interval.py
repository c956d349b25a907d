"""What `client_connection_check_interval` costs a server: CPU of its backend, in interleaved pairs.

The setting has the server look, while a statement runs, whether its client is still there.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import psycopg  # a script beside the library, which imports no driver

from engineroom.testing import postgres

SETTINGS = ("0", "250ms", "1s")
SHORT = 4_000  # statements of a sample
LONG = "SELECT count(*) FROM generate_series(1, 4000000)"  # several intervals of 250 ms


def cpu_of(connection: psycopg.Connection[object], statement: str, count: int) -> float:
    """Run a statement so often; return the milliseconds that its backend was on a CPU (Linux)."""
    clock = Path(f"/proc/{connection.info.backend_pid}/schedstat")
    started = int(clock.read_text().split()[0])
    for _ in range(count):
        connection.execute(statement)
    return (int(clock.read_text().split()[0]) - started) / 1e6


def main() -> None:
    """Measure and print the ratios to a server that does not look."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=30)
    pairs = parser.parse_args().pairs
    with postgres(version=18) as server:
        opened = {
            setting: psycopg.connect(
                server.url(),
                autocommit=True,
                options=f"-c client_connection_check_interval={setting}",
            )
            for setting in SETTINGS
        }
        for name, statement, count in (("short", "SELECT 1", SHORT), ("long", LONG, 1)):
            ratios: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
            for pair in range(pairs + 1):
                order = SETTINGS if pair % 2 else SETTINGS[::-1]
                seen = {setting: cpu_of(opened[setting], statement, count) for setting in order}
                if pair:  # the first one warms up
                    for setting, cost in seen.items():
                        ratios[setting].append(cost / seen["0"])
            for setting, values in ratios.items():
                low, middle, high = statistics.quantiles(values, n=4)
                print(f"{name} statements, {setting}: {middle:.3f} ({low:.3f} to {high:.3f})")
        for connection in opened.values():
            connection.close()


if __name__ == "__main__":
    main()
