"""Says which extra brings a package that is missing."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def brought_by(extra: str, why: str) -> Generator[None]:
    """Import what an extra brings.

    Args:
        extra: Its name.
        why: What needs it, as the beginning of a sentence that ends with a comma.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{why}, but {error.name} is not installed: pip install "engineroom[{extra}]".',
            name=error.name,
        ) from None
