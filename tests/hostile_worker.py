"""A worker that loads honestly and then breaks one rule: `hostile_worker.py BEHAVIOUR ... SOCKET`. Started by tests."""

from __future__ import annotations

import functools
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from typing import Any

import msgspec

RESULT = b'{"predictions":[1]}'
DESCRIPTION = {
    "format": "hostile",
    "task": "none",
    "device": "cpu",
    "input_schema": {},
    "output_schema": {},
    "example": {"features": [1]},
    "runtime": {"adapter": "hostile", "threads": 1},
}
CHECKS = (
    "fs_read", "fs_write", "net_tcp", "net_udp", "unix", "spawn", "signal", "ptrace", "proc", "mem_limit",
    "descriptors", "environment", "no_core_dump", "no_file_growth", "no_new_privs", "not_dumpable", "no_capability",
    "pid_ns", "net_ns", "proc_limit", "own_user",
)  # fmt: skip
DEEP = functools.reduce(lambda inner, _: [inner], range(300), 1)
MISDESCRIBED: dict[str, dict[str, Any]] = {
    "load_uncanonical": {"runtime": {"threads": 2**60}},
    "load_long_number": {"example": {"features": [2**70]}},
    "load_deep_example": {"example": {"features": DEEP}},
    "load_deep_schema": {"input_schema": {"items": DEEP}},
    "load_for_nobody": {"together": 0},
    "load_for_everybody": {"together": 2**62},
    "load_escape": {"task": "\x1b[31m"},
    "load_long_name": {"device": "x" * 10_000},
}
PROBLEMS: dict[str, dict[str, Any]] = {
    "problem_number": {"field": 2**70},
    "problem_object": {"expected": {"a": 1}},
    "problem_deep": {"example": {"a": DEEP}},
    "problem_no_example": {"example": [1]},
}


class Hostile:
    """One behaviour over one socket."""

    def __init__(self, behaviour: str, connection: socket.socket) -> None:
        self.behaviour = behaviour
        self.connection = connection

    def frame(self) -> dict[str, Any]:
        head = self.exactly(4)
        found: dict[str, Any] = msgspec.msgpack.decode(self.exactly(int.from_bytes(head, "big")))
        return found

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.connection.recv(count - len(data))
            if not piece:
                os._exit(0)
            data += piece
        return data

    def packed(self, body: Any) -> bytes:
        raw = body if isinstance(body, bytes) else msgspec.msgpack.encode(body)
        return len(raw).to_bytes(4, "big") + raw

    def send(self, body: Any) -> None:
        self.connection.sendall(self.packed(body))

    def answers(self, asked: dict[str, Any], *items: dict[str, Any]) -> dict[str, Any]:
        return {"kind": "answers", "id": asked["id"], "v": 1, "items": list(items)}

    def success(self, result: bytes = RESULT, rows: int = 1) -> dict[str, Any]:
        return {"kind": "success", "result": result, "rows": rows}

    def problem(self, code: str, detail: str = "", data: bytes = b"{}") -> dict[str, Any]:
        return {"kind": "problem", "code": code, "detail": detail, "data": data}

    def confine(self, asked: dict[str, Any]) -> None:
        checks = dict.fromkeys(CHECKS, "unknown") | {"mem_limit": "enforced"}
        if self.behaviour == "confined_more":
            checks["<b>safe</b>"] = "enforced"
        if self.behaviour == "confined_less":
            checks = {"mem_limit": "enforced"}
        if self.behaviour == "confined_late":
            return
        self.send({"kind": "confined", "id": asked["id"], "v": 1, "checks": checks})

    def load(self, asked: dict[str, Any]) -> None:
        described: Any = json.dumps(DESCRIPTION | {"together": 16 if self.behaviour == "tagged" else 1}).encode()
        if self.behaviour == "load_undescribed":
            described = b'{"format": "x"}'
        if self.behaviour in MISDESCRIBED:
            described = json.dumps(DESCRIPTION | MISDESCRIBED[self.behaviour]).encode()
        if self.behaviour.startswith("load_known="):
            name = self.behaviour.partition("=")[2]
            self.send({"kind": "known", "id": asked["id"], "v": 1, "template": name})
            time.sleep(600)
        if self.behaviour == "load_hang":
            time.sleep(600)
        if self.behaviour == "load_exit":
            os._exit(1)
        if self.behaviour in ("blab", "die_idle"):
            os.write(2, b"before any run\x1b")
        if self.behaviour == "load_forbidden":
            self.send({"kind": "failed", "id": asked["id"], "v": 1, "problem": self.problem("access_denied")})
            time.sleep(600)
        self.send({"kind": "ready", "id": asked["id"], "v": 1, "description": described})
        if self.behaviour == "unasked":
            time.sleep(0.1)
            self.send(self.answers(asked, self.success()))
        if self.behaviour == "die_idle":
            os._exit(1)

    def serve(self) -> None:
        asked = self.frame()
        self.confine(asked)
        self.load(asked if self.behaviour == "confined_late" else self.frame())
        while True:
            asked = self.frame()
            if asked["kind"] == "ping":
                self.send({"kind": "pong", "id": asked["id"], "v": 1})
            else:
                getattr(self, self.behaviour, self.honest)(asked)

    def honest(self, asked: dict[str, Any]) -> None:
        self.send(self.answers(asked, self.success()))

    def slow(self, asked: dict[str, Any]) -> None:
        time.sleep(0.3)
        self.honest(asked)

    def count(self, asked: dict[str, Any]) -> None:
        """Says how many runs it has seen."""
        self.seen = getattr(self, "seen", 0) + 1
        time.sleep(0.1)
        self.send(self.answers(asked, self.success(str(self.seen).encode())))

    def tagged(self, asked: dict[str, Any]) -> None:
        """Gives each caller his own tag back, with the number of callers in the pass; dies or hangs where one asks."""
        time.sleep(0.02)
        told = [json.loads(item["data"]) for item in asked["items"]]
        if any(one.get("act") == "die" for one in told):
            os._exit(1)
        if any(one.get("act") == "hang" for one in told):
            time.sleep(600)
        answers = [
            self.problem("input_invalid", one["tag"])
            if one.get("act") == "refuse"
            else self.success(json.dumps({"tag": one["tag"], "callers": len(told)}).encode())
            for one in told
        ]
        self.send(self.answers(asked, *answers))

    def pieces(self, asked: dict[str, Any]) -> None:
        """Ten pieces in a second, then all of it; less when it is told to stop."""
        self.connection.settimeout(0.1)
        made = 0
        for number in range(10):
            if asked["pieces"]:
                self.send({"kind": "part", "id": asked["id"], "v": 1, "text": str(number), "index": 0})
            made += 1
            try:
                self.frame()
                break
            except TimeoutError:
                continue
        self.connection.settimeout(None)
        self.send(self.answers(asked, self.success(str(made).encode())))

    def endless_pieces(self, asked: dict[str, Any]) -> None:
        while True:
            self.send({"kind": "part", "id": asked["id"], "v": 1, "text": "x" * 60_000, "index": 0})

    def unwanted_piece(self, asked: dict[str, Any]) -> None:
        self.send({"kind": "part", "id": asked["id"], "v": 1, "text": "x", "index": 0})
        time.sleep(600)

    def hang(self, asked: dict[str, Any]) -> None:
        time.sleep(600)

    def exit(self, asked: dict[str, Any]) -> None:
        os._exit(0)

    def half(self, asked: dict[str, Any]) -> None:
        self.connection.sendall(self.packed(self.answers(asked, self.success()))[:20])
        os._exit(0)

    def giant(self, asked: dict[str, Any]) -> None:
        self.connection.sendall((2**32 - 1).to_bytes(4, "big") + bytes(1000))
        time.sleep(600)

    def large(self, asked: dict[str, Any]) -> None:
        self.send(self.answers(asked, self.success(b'"' + b"x" * (17 << 20) + b'"')))

    def forged(self, asked: dict[str, Any]) -> None:
        self.send(self.answers(asked | {"id": secrets.token_bytes(16)}, self.success()))

    def short_id(self, asked: dict[str, Any]) -> None:
        self.send(self.answers(asked | {"id": b"x"}, self.success()))

    def drip(self, asked: dict[str, Any]) -> None:
        for byte in self.packed(self.answers(asked, self.success())):
            self.connection.sendall(bytes([byte]))
            time.sleep(0.1)

    def garbage(self, asked: dict[str, Any]) -> None:
        self.send(secrets.token_bytes(100))

    def trailing(self, asked: dict[str, Any]) -> None:
        self.send(msgspec.msgpack.encode(self.answers(asked, self.success())) + b"\0")

    def twice(self, asked: dict[str, Any]) -> None:
        self.connection.sendall(self.packed(self.answers(asked, self.success())) * 2)

    def wrong_kind(self, asked: dict[str, Any]) -> None:
        self.send({"kind": "pong", "id": asked["id"], "v": 1})

    def nobody(self, asked: dict[str, Any]) -> None:
        self.send(self.answers(asked))

    def two(self, asked: dict[str, Any]) -> None:
        self.send(self.answers(asked, self.success(), self.success()))

    def nan(self, asked: dict[str, Any]) -> None:
        self.send(self.answers(asked, self.success(b'{"predictions":[NaN]}')))

    def not_json(self, asked: dict[str, Any]) -> None:
        self.send(self.answers(asked, self.success(b'{"predictions":[1]},"receipt":{}')))

    def deep(self, asked: dict[str, Any]) -> None:
        self.send(self.answers(asked, self.success(b"[" * 100_000 + b"]" * 100_000)))

    def many(self, asked: dict[str, Any]) -> None:
        """Nearly as long as an answer may be, and a gigabyte of objects to whoever parses it."""
        self.send(self.answers(asked, self.success(b"[" + (b"[" * 20 + b"]" * 20 + b",") * 400_000 + b"1]")))

    def negative_rows(self, asked: dict[str, Any]) -> None:
        self.send(self.answers(asked, self.success(rows=-1)))

    def forbidden(self, asked: dict[str, Any]) -> None:
        self.send(self.answers(asked, self.problem("access_denied", "pay me instead")))

    def problem_data(self, asked: dict[str, Any]) -> None:
        self.send(self.answers(asked, self.problem("model_failed", "x", b"[1]")))

    def refuse(self, asked: dict[str, Any]) -> None:
        """As the behaviour says, or with texts that would take a terminal over."""
        loud = {"field": "\x1b[31m\u202e" * 10_000, "example": {"gr\u00f6\u00dfe\u202e": ["\x1b[31m", 2**70, 1]}}
        data = json.dumps(PROBLEMS.get(self.behaviour, loud)).encode()
        self.send(self.answers(asked, self.problem("input_invalid", "no", data)))

    problem_number = problem_object = problem_deep = problem_no_example = refuse

    def terminal(self, asked: dict[str, Any]) -> None:
        self.send(self.answers(asked, self.problem("model_failed", "\x1b[31mred\u202e\n" + "x" * 900)))

    def flood(self, asked: dict[str, Any]) -> None:
        for _ in range(80):
            try:
                os.write(2, b"secret input \x1b[2J" * 8192)
            except BrokenPipeError:
                break
        self.honest(asked)

    def blab(self, asked: dict[str, Any]) -> None:
        """Writes what a caller sent where the node's log could come by it, and dies."""
        os.write(2, asked["items"][0]["data"])
        os._exit(1)

    def deaf(self, asked: dict[str, Any]) -> None:
        """Hangs up and lives on."""
        self.connection.close()
        time.sleep(600)

    def spawn(self, asked: dict[str, Any]) -> None:
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.send(self.answers(asked, self.success(str(helper.pid).encode())))


if __name__ == "__main__":
    Hostile(sys.argv[1], socket.socket(fileno=int(sys.argv[-1]))).serve()
