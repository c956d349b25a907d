"""Who connects: functions that say so, asked at each physical connect."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextvars import copy_context
from typing import Any

from .errors import CredentialsFailed, InvalidOption
from .hooks import is_coroutine_function
from .secrecy import Sealed
from .urls import flaw

ARGUMENTS = {"username": "user", "password": "password"}  # what the drivers call them
LAG = 0.1  # seconds by which a loop may be late
CLEAN_UP = 0.5  # seconds that a function has when its caller was cancelled


class Credentials:
    """The functions among `username=` and `password=`."""

    def __init__(self, username: object = None, password: object = None) -> None:
        given = {"username": username, "password": password}
        self._functions: dict[str, Callable[[], Any]] = {
            name: value for name, value in given.items() if callable(value)
        }

    def __bool__(self) -> bool:
        return bool(self._functions)

    def refuse_coroutines(self) -> None:
        """Refuse coroutine functions where nobody can await them.

        Raises:
            InvalidOption: there is one.
        """
        for name, function in self._functions.items():
            if is_coroutine_function(function):
                raise _not_here(name)

    def ask(self, seconds: float) -> dict[str, Sealed[str]]:
        """Ask, each function in a thread of its own: nothing else can be given up on.

        Args:
            seconds: The time for all of them.

        Raises:
            CredentialsFailed: one raised, was not ready in time, or returned no text.
        """
        account: dict[str, Sealed[str]] = {}
        end = time.monotonic() + seconds
        for name, function in self._functions.items():
            left = max(end - time.monotonic(), 0.0)
            answer = in_thread(function)
            wait([answer], left)  # (what a signal's handler raises here is not the function's)
            if not answer.done():
                answer.add_done_callback(_close_unawaited)
                raise _late(name, left) from TimeoutError()
            if (error := answer.exception()) is not None:
                raise _raised(name, error) from error
            value = answer.result().reveal()
            if inspect.iscoroutine(value):
                value.close()
                raise _not_here(name)
            account[ARGUMENTS[name]] = _sealed(name, value)
        return account

    async def ask_on_loop(self, seconds: float) -> dict[str, Sealed[str]]:
        """Ask: coroutine functions in this event loop, others in a thread, so as not to stop it.

        Args:
            seconds: The time for all of them.

        Raises:
            CredentialsFailed: one raised, was not ready in time, or returned no text.
        """
        account: dict[str, Sealed[str]] = {}
        end = time.monotonic() + seconds
        for name, function in self._functions.items():
            # In a task of its own, for it may swallow its cancellation.
            asking = asyncio.create_task(_answer(name, function))
            asking.add_done_callback(_hear)
            begun = time.monotonic()
            left = max(end - begun, 0.0)
            try:
                await asyncio.wait({asking}, timeout=left)
            except asyncio.CancelledError as error:
                if (took := time.monotonic() - begun) > left + LAG:
                    error.add_note(_stood_still(name, took, left))
                if not asking.cancelling():  # (the loop's end has, and it cleans up already)
                    asking.cancel()
                await asyncio.wait({asking}, timeout=CLEAN_UP)
                raise
            if asking.cancel():
                raise _late(name, left) from TimeoutError()
            account[ARGUMENTS[name]] = asking.result()
        return account


async def _answer(name: str, function: Callable[[], Any]) -> Sealed[str]:
    """Return it sealed: asyncio's debug mode prints the results of tasks and futures."""
    try:
        value = function() if is_coroutine_function(function) else await _from_thread(function)
        value = await value if inspect.isawaitable(value) else value
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise _raised(name, error) from error  # the function's own
    except Exception as error:
        raise _raised(name, error) from error
    return _sealed(name, value)


async def _from_thread(function: Callable[[], Any]) -> Any:
    answer = in_thread(function)
    try:
        return (await asyncio.wrap_future(answer)).reveal()
    except asyncio.CancelledError:
        answer.add_done_callback(_close_unawaited)
        raise


def _close_unawaited(answer: Future[Sealed[Any]]) -> None:
    """Part with the coroutine that a plain function has returned, for which nobody waits now."""
    if answer.cancelled() or answer.exception() is not None:
        return
    if inspect.iscoroutine(coroutine := answer.result().reveal()):
        coroutine.close()


def _hear(asked: asyncio.Future[Any]) -> None:
    """Take the error of one that was given up on, or asyncio would log that nobody did."""
    if not asked.cancelled():
        asked.exception()


def in_thread(function: Callable[[], Any]) -> Future[Sealed[Any]]:
    """Call a function in a thread, for which the end of the process does not wait."""
    answer: Future[Sealed[Any]] = Future()

    def call() -> None:
        if answer.set_running_or_notify_cancel():
            try:
                answer.set_result(Sealed(function()))
            except (StopIteration, SystemExit) as error:  # no future may have it; no process ends
                ended = RuntimeError(f"it raised {type(error).__name__}")
                ended.__cause__ = error
                answer.set_exception(ended)
            except BaseException as error:  # noqa: BLE001  # whoever waits hears of it
                answer.set_exception(error)

    context = copy_context()
    name = "engineroom-credentials"
    threading.Thread(target=context.run, args=[call], name=name, daemon=True).start()
    return answer


def _sealed(name: str, value: object) -> Sealed[str]:
    if not isinstance(value, str) or not value:
        what = "an empty text" if value == "" else type(value).__name__
        cure = " Decode them: .decode()." if isinstance(value, bytes) else ""
        raise CredentialsFailed(f"{name}= returned {what}, where a text (str) is needed.{cure}")
    if why := flaw(value):
        raise CredentialsFailed(
            f"{name}= returned a text that {why}. Return it as it is, decoded from its bytes."
        )
    return Sealed(str.__str__(value))  # of a subclass, which asyncpg refuses, the text alone


def _raised(name: str, error: BaseException) -> CredentialsFailed:
    return CredentialsFailed(
        f"{name}= raised {type(error).__name__}, so nothing was connected. Its own error is the "
        "cause of this one; see that what it asks can be reached from here."
    )


def _late(name: str, seconds: float) -> CredentialsFailed:
    return CredentialsFailed(
        f"{name}= did not answer within {seconds:.1f} s, which is what was left of pool_timeout "
        "or connect_timeout, so nothing was connected. See that what it asks can be reached from "
        "here, and give it a timeout of its own."
    )


def _stood_still(name: str, took: float, seconds: float) -> str:
    return (
        f"{name}= was asked {took:.1f} s before, and was to be given up on after {seconds:.1f} s: "
        "meanwhile the event loop stood still. Something in it waits without await; if that is "
        f"{name}=, have it be a plain function, which is called in a thread."
    )


def _not_here(name: str) -> InvalidOption:
    return InvalidOption(
        f"{name}= is a coroutine function, which the synchronous side cannot await. Give it a "
        "plain function, which serves both sides."
    )
