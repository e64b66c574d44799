"""docker-compose.yml is the published quick start: one command, port 8000, cache and logs, a health check."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.dockerfile import parse

ROOT = Path(__file__).parent.parent


@pytest.fixture
def service() -> dict[str, Any]:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    (only,) = document["services"].values()
    assert set(document["volumes"]) == {volume.split(":")[0] for volume in only["volumes"]}
    return dict(only)


def test_it_builds_here_and_listens_on_8000(service: dict[str, Any]) -> None:
    assert service["build"] == "."
    assert service["ports"] == ["8000:8000"]
    assert service["environment"] == {"HOST": "0.0.0.0", "PORT": "8000"}
    assert service["env_file"] == ".env"


def test_its_volumes_are_those_of_the_image(service: dict[str, Any]) -> None:
    steps = parse((ROOT / "Dockerfile").read_text())
    (declared,) = [json.loads(step.rest) for step in steps if step.word == "VOLUME"]

    assert sorted(volume.split(":")[1] for volume in service["volumes"]) == sorted(declared)


def test_its_health_check_is_that_of_the_image(service: dict[str, Any]) -> None:
    health = next(step.rest for step in parse((ROOT / "Dockerfile").read_text()) if step.word == "HEALTHCHECK")
    program = re.search(r'CMD python -c "(.*)"$', health)

    assert program is not None
    assert service["healthcheck"]["test"] == ["CMD", "python", "-c", program[1]]


def test_it_gives_the_container_no_rights(service: dict[str, Any]) -> None:
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert "privileged" not in service


def test_only_what_the_image_copies_reaches_the_builder() -> None:
    """No key, ledger, .env or history in the build context."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [step.rest.split()[:-1] for step in parse((ROOT / "Dockerfile").read_text()) if step.word == "COPY"]
    copied = {name for names in copies for name in names if not names[0].startswith("--from")}

    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"
    assert copied == allowed
