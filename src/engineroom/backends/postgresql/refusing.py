"""Whether a server that lets nobody in just now will before long."""

from __future__ import annotations

from collections.abc import Mapping

from .diagnosing import FULL, knock, places

# It starts, stops or recovers; or it has no connection left.
PASSING = ("57P03", "57P01", *FULL)
AWAY = "it refuses connections"


def ask_why(parameters: Mapping[str, str]) -> str:
    """Return why the hosts refuse, if that may pass; "" where one of them would talk to us."""
    whys = [_ask(host, port) for host, port in places(parameters)]
    return next((why for why in whys if why != AWAY), AWAY)


def _ask(host: str, port: int) -> str:
    try:
        state = knock(host, port)
    except (ConnectionError, FileNotFoundError):
        return AWAY
    except OSError:  # no such host, or silence
        return ""
    return state if state in PASSING else ""
