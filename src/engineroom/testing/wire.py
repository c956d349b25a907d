"""What passes on one connection to PostgreSQL: read, counted and cut into messages; no I/O here."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Moment = Literal["before", "during", "after"]
What = str | Callable[["Message"], bool] | None

_CANCEL, _SSL, _GSS = 80877102, 80877103, 80877104
_NAMES = {
    b"B": "Bind",
    b"C": "Close",
    b"c": "CopyDone",
    b"d": "CopyData",
    b"D": "Describe",
    b"E": "Execute",
    b"f": "CopyFail",
    b"F": "FunctionCall",
    b"H": "Flush",
    b"p": "Password",
    b"P": "Parse",
    b"Q": "Query",
    b"S": "Sync",
    b"X": "Terminate",
}
# The server's message with which a client's is answered: for what changes data that is
# ReadyForQuery, or the client's turn to send COPY data or to log in. CommandComplete is not enough:
# outside of a transaction the server commits after it.
_ANSWERS = {"Parse": b"1E", "Bind": b"2E", "Describe": b"nTE", "Close": b"3E"}
_READY, _TURN = b"Z", b"RGW"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of PostgreSQL's protocol, from a client to the server."""

    kind: str
    """As PostgreSQL's documentation names it: `Query`, `Parse`, `Bind`, `Execute`, `Sync`, …"""
    sql: str
    """The statement that it carries (Query, Parse) or works on (Bind, Execute); of others ""."""
    body: bytes = field(repr=False)
    """What follows its length: the values, too."""

    @property
    def executes(self) -> bool:
        """Whether the server runs a statement for it."""
        return self.kind in ("Query", "Execute")


class Fault:
    """What is to happen at one message; the verbs of `WireProxy` make it and arm it.

    Attributes:
        message: The message that it has struck; None before that.
    """

    def __init__(self, action: str, moment: Moment, what: What, nth: int) -> None:
        if nth < 1:
            raise ValueError(f"nth={nth}: the messages that match are counted from 1")
        self.action = action
        self.moment: Moment = moment
        self.message: Message | None = None
        self._what = what
        self._left = nth
        self._happened = threading.Event()

    @property
    def happened(self) -> bool:
        """Whether it has struck. A test that goes on without asking may have tested nothing."""
        return self._happened.is_set()

    def wait(self, timeout: float = 20.0) -> Message:
        """Wait until it strikes, and return the message; asynchronous code awaits `to_thread`.

        Args:
            timeout: Seconds.

        Raises:
            TimeoutError: No such message came.
        """
        if not self._happened.wait(timeout) or self.message is None:
            raise TimeoutError(f"{self!r} did not happen within {timeout:g} s: nothing matched")
        return self.message

    def disarm(self) -> None:
        """Let all messages pass from now on."""
        self._left = 0

    def is_for(self, message: Message) -> bool:
        """Count a message, if it matches, and say whether it is the one."""
        if self._left < 1 or not self._matches(message):
            return False
        self._left -= 1
        return self._left == 0

    def strike(self, message: Message) -> None:
        """Note that it has happened."""
        self.message = message
        self._happened.set()

    def __repr__(self) -> str:
        return f"<{self.action} {self.moment} {self._what!r}>"

    def _matches(self, message: Message) -> bool:
        if callable(self._what):
            return self._what(message)
        return message.executes and (self._what or "").casefold() in message.sql.casefold()


class Parcel(NamedTuple):
    """What is handed on at once; or, in its place, a fault and the message that it strikes."""

    data: bytes = b""
    kinds: bytes = b""  # the types of the server's messages in it
    fault: tuple[Fault, Message] | None = None


class Wire:
    """One connection: follows the protocol on it and counts."""

    def __init__(self, statements: list[str], faults: Iterable[Fault]) -> None:
        self.trips: int = 0
        self.startup_trips: int = 0
        self.notifications: int = 0
        self.is_new: bool = False  # set by the startup packet, which a cancel request has not
        self._statements = statements
        self._faults = faults
        self._phase = "greeting"  # then "login" and "session", or "cancel"
        self._is_waiting = False
        self._ready_due = 0  # how many ReadyForQuery the client has not got yet
        self._asked = self._answered = 0  # how many it asked for, and how many the server has sent
        self._parsed: dict[bytes, str] = {}
        self._portals: dict[bytes, str] = {}
        self._client_bytes = bytearray()
        self._server_bytes = bytearray()
        self._after: tuple[Fault, Message, int] | None = None
        self._held = bytearray()
        self._held_kinds = b""

    def forget(self) -> None:
        """Set the counts to 0."""
        self.trips = self.startup_trips = self.notifications = 0
        self.is_new = False

    def hear_client(self, data: bytes) -> tuple[list[Parcel], bytes]:
        """Note what the client says; return what the server gets and what the proxy answers."""
        if self._phase == "cancel":
            return [Parcel(data)], b""
        self._client_bytes += data
        if self._phase == "greeting":
            return self._hear_greeting()
        return self._hear_client_messages(b""), b""

    def hear_server(self, data: bytes) -> list[Parcel]:
        """Return what the client gets of what has arrived from the server."""
        self._server_bytes += data
        parcels: list[Parcel] = []
        forward, kinds = bytearray(), b""
        for raw in _split(self._server_bytes):
            kind = raw[:1]
            if self._after is None or self._answered < self._after[2]:
                forward += raw
                kinds += kind
            else:  # the answer that the client shall not have, or not yet
                fault, message, _ = self._after
                self._held += raw
                self._held_kinds += kind
                if kind in _ANSWERS.get(message.kind, _READY + _TURN):
                    parcels += [Parcel(bytes(forward), kinds), Parcel(fault=(fault, message))]
                    forward, kinds = self._held, self._held_kinds
                    self._after, self._held, self._held_kinds = None, bytearray(), b""
            self._answered += kind == _READY
        return [*parcels, Parcel(bytes(forward), kinds)]

    def note_delivery(self, kinds: bytes) -> None:
        """Note what the server says, at the moment when it goes to the client."""
        if self._phase == "greeting":
            self._is_waiting = False  # our own answer to the wish for encryption
            return
        for kind in (kinds[place : place + 1] for place in range(len(kinds))):
            if kind == _READY:
                self._phase = "session"
                self._ready_due = max(0, self._ready_due - 1)
                self._is_waiting = self._ready_due > 0
            elif kind == b"A":
                self.notifications += 1
            elif kind in b"NS":  # a notice, a setting: they may come unasked, as "A" does
                pass
            elif kind in _TURN or self._ready_due == 0:
                # The client's turn: it has to log in or to send COPY data, or had asked to Flush.
                self._is_waiting = False

    def _hear_greeting(self) -> tuple[list[Parcel], bytes]:
        """Hold the untyped packets that open a connection back until they are whole."""
        if len(self._client_bytes) < 8:
            return [], b""
        length, code = struct.unpack_from("!II", self._client_bytes)
        if not 8 <= length <= 10_000:  # the server's own limit
            raise ValueError("this is no PostgreSQL startup packet")
        if len(self._client_bytes) < length:
            return [], b""
        packet = bytes(self._client_bytes[:length])
        del self._client_bytes[:length]
        if code in (_SSL, _GSS):
            self._note_question()
            return [], b"N"
        if code == _CANCEL:
            self._phase = "cancel"
            return [Parcel(packet)], b""
        self._phase = "login"
        self.is_new = True
        self._ready_due = self._asked = 1
        self._note_question()
        return self._hear_client_messages(packet), b""

    def _hear_client_messages(self, before: bytes) -> list[Parcel]:
        """Note whole messages; what is not whole yet is held back, since a fault may strike it."""
        parcels: list[Parcel] = []
        forward = bytearray(before)
        for raw in _split(self._client_bytes):
            asked = self._asked if self._phase == "session" else 0  # a login has no turns
            message = self._note_message(raw[:1], raw[5:])
            fault = next((fault for fault in tuple(self._faults) if fault.is_for(message)), None)
            if fault is None:
                forward += raw
            elif fault.moment == "after":
                forward += raw
                self._after = fault, message, asked
            else:
                struck = len(raw) // 2 if fault.moment == "during" else 0
                forward += raw[:struck]
                parcels += [Parcel(bytes(forward)), Parcel(fault=(fault, message))]
                forward = bytearray(raw[struck:])
        return [*parcels, Parcel(bytes(forward))]

    def _note_message(self, kind: bytes, body: bytes) -> Message:
        sql = ""
        if kind != b"X":  # Terminate: nobody answers
            self._note_question()
        if kind in b"QSF":  # Query, Sync, FunctionCall
            self._ready_due += 1
            self._asked += 1
        if kind == b"Q":
            sql = body[:-1].decode(errors="replace")
            self._statements.append(sql)
        elif kind == b"P":  # name, text, types
            name, text, _ = body.split(b"\0", 2)
            sql = self._parsed[name] = text.decode(errors="replace")
        elif kind == b"B":  # portal, statement, values
            portal, name, _ = body.split(b"\0", 2)
            sql = self._portals[portal] = self._parsed.get(name, "")
            self._statements.append(sql)
        elif kind == b"E":  # portal, number of rows
            sql = self._portals.get(body.split(b"\0", 1)[0], "")
        return Message(_NAMES.get(kind, repr(kind)), sql, body)

    def _note_question(self) -> None:
        if self._is_waiting:
            return
        self._is_waiting = True
        if self._phase == "session":
            self.trips += 1
        else:
            self.startup_trips += 1


def _split(buffer: bytearray) -> list[bytes]:
    """Take the whole messages out of a buffer."""
    messages = []
    start = 0
    while len(buffer) >= start + 5:
        end = start + 1 + int.from_bytes(buffer[start + 1 : start + 5], "big")
        if len(buffer) < end:
            break
        messages.append(bytes(buffer[start:end]))
        start = end
    del buffer[:start]
    return messages
