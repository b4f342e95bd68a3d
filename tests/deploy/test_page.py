"""The page about deployment: its commands name what there is, and its settings are settings."""

from __future__ import annotations

import re
import shlex
from typing import Any

import yaml

from perdure.protocol.settings import Settings
from tests.kit.deploy.deployment import compose, understood
from tests.kit.docs.pages import Block, blocks
from tests.kit.places import ROOT

PAGE = ROOT / "docs" / "deployment.md"
LISTED = blocks(PAGE)


def commands() -> list[list[str]]:
    return [
        shlex.split(line.removeprefix("$ "))
        for block in LISTED
        if block.language == "console"
        for line in block.text.splitlines()
    ]


def manifests() -> dict[str, Any]:
    return {
        f"{item['kind'].lower()}/{item['metadata']['name']}": item
        for path in (ROOT / "deploy" / "kubernetes").glob("*.yaml")
        for item in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    }


def check(command: list[str]) -> str:
    """What kind of command it is; fails where it names what there is not."""
    while "=" in command[0]:
        name, command = command[0].split("=")[0], command[1:]
        assert f"${{{name}:-" in (ROOT / "docker-compose.yml").read_text(encoding="utf-8"), name
    match command:
        case ["docker", "compose", *rest]:
            services = compose()["services"]
            if rest[0] == "--profile":
                assert any(rest[1] in service.get("profiles", []) for service in services.values())
                rest = rest[2:]
            verb, *words = rest
            assert verb in ("up", "run", "stop")
            names = [word for word in words if not word.startswith("--")]
            assert set(names[:1]) <= set(services)
            assert verb != "run" or understood(names[1:])
            return "docker"
        case ["kubectl", "apply", "-f", path]:
            assert (ROOT / path).is_file()
        case ["kubectl", "rollout", "status", name]:
            assert name in manifests()
        case ["systemctl", "enable", "--now", *units]:
            for unit in units:
                file = f"{re.sub('@.*', '@', unit)}.service"
                assert (ROOT / "deploy" / "systemd" / file).is_file()
        case _:
            raise AssertionError(f"a command that no test knows: {command}")
    return command[0]


def test_every_command_names_what_there_is():
    assert {check(command) for command in commands()} == {"docker", "kubectl", "systemctl"}


def test_every_variable_of_the_composition_is_described():
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([A-Z_]+)` \| ([^|]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
    assert {name for name, _ in table} == set(used)
    for name, default in table:
        assert default == used[name] or "://" in used[name]


def test_settings_are_settings():
    """And a block of another kind is one that a test has to be written for."""
    found: list[Block] = [block for block in LISTED if block.language != "console"]
    for block in found:
        assert block.language == "ini"
        settings = Settings.from_environment(dict(line.split("=", 1) for line in block.text.splitlines()))
        assert settings.redis_url.startswith("rediss://")
    assert found
