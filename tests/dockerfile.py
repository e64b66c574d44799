"""Reads a Dockerfile and carries out its steps in a folder, where no container engine is at hand.

Absolute paths of the image that a step may write to (`/build`, `/app`, `/opt`) become folders below a root; programs
that change the system's users are stood in for by ones that only note what they were asked.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

_OURS = re.compile(r"(?<![\w.])/(build|app|opt)(?=[/\s:'\"]|$)")
_STOOD_IN_FOR = ("useradd", "chown")


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction: `FROM`, `RUN`, ... and the rest of its (joined) line."""

    word: str
    rest: str


def parse(text: str) -> list[Step]:
    """The instructions of a Dockerfile, in order."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [Step(*line.split(maxsplit=1)) for line in lines]


@dataclass
class Image:
    """What the steps left: the last stage's environment, working folder, command, health check and user."""

    root: Path
    context: Path
    environ: dict[str, str]
    folder: Path = field(init=False)
    command: list[str] = field(default_factory=list)
    health: str = ""
    user: str = "root"
    volumes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = self.root
        stubs = self.root / "stubs"
        stubs.mkdir(parents=True)
        for name in _STOOD_IN_FOR:
            (stubs / name).write_text(f'#!/bin/sh\necho {name} "$@" >>"{self.root}/noted"\n')
            (stubs / name).chmod(0o755)
        self.environ = {**self.environ, "PATH": f"{stubs}{os.pathsep}{self.environ['PATH']}"}
        self._system_path = self.environ["PATH"]

    def build(self, steps: list[Step]) -> None:
        """Carry out every step. Raises CalledProcessError where one fails, ValueError for a word not known here."""
        for step in steps:
            getattr(self, f"_{step.word.lower()}", self._unknown)(step.rest)

    def noted(self) -> str:
        """What was asked of the programs that were stood in for."""
        path = self.root / "noted"
        return path.read_text() if path.exists() else ""

    def mapped(self, text: str) -> str:
        """The text with the image's own folders below the root."""
        return _OURS.sub(lambda found: f"{self.root}/{found[1]}", text)

    def _unknown(self, rest: str) -> None:
        raise ValueError(f"no such instruction here: {rest}")

    def _from(self, rest: str) -> None:
        self.folder, self.user = self.root, "root"
        self.environ = {"PATH": self._system_path, **{k: v for k, v in self.environ.items() if k != "PATH"}}

    def _workdir(self, rest: str) -> None:
        self.folder = Path(self.mapped(rest))
        self.folder.mkdir(parents=True, exist_ok=True)

    def _run(self, rest: str) -> None:
        subprocess.run(["/bin/sh", "-ec", self.mapped(rest)], cwd=self.folder, env=self.environ, check=True)

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        inside = sources[0].startswith("--from=")
        for name in sources[inside:]:
            source = Path(self.mapped(name)) if inside else self.context / name
            place = self.folder / self.mapped(target)
            if inside and source == place:  # one root for all stages: it is there already
                continue
            if source.is_dir():
                shutil.copytree(source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)

    def _env(self, rest: str) -> None:
        for found in re.finditer(r"(\w+)=(\S+)", rest):
            value = self.mapped(found[2])
            tail = f"{os.pathsep}{self._system_path}" if found[1] == "PATH" else ""
            self.environ[found[1]] = value + tail

    def _user(self, rest: str) -> None:
        self.user = rest

    def _volume(self, rest: str) -> None:
        self.volumes = json.loads(rest)

    def _expose(self, rest: str) -> None:
        self.environ.setdefault("EXPOSED", rest)

    def _healthcheck(self, rest: str) -> None:
        self.health = rest.partition("CMD ")[2]

    def _cmd(self, rest: str) -> None:
        self.command = json.loads(rest)
