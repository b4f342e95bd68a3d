"""Settings: one spelling, and an error that names the variable for every value that cannot be meant."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest

from perdure.protocol.errors import SettingsError
from perdure.protocol.settings import Settings, redact, variable


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("redis_url", " redis://host:1/2 ", "redis://host:1/2"),
        ("tasks", "app.one, app.two,,", ("app.one", "app.two")),
        ("tasks", "", ()),
        ("heartbeat", "0.25", 0.25),
        ("heartbeat_timeout", "2", 2.0),
        ("checkpoint_interval", "1e-2", 0.01),
        ("max_retries", "0", 0),
        ("queue_limit", "0", 0),
        ("drain_timeout", "0", 0.0),
        ("max_payload", " 1024 ", 1024),
        ("health_port", "9100", 9100),
        ("untested_rq", "1", True),
        ("untested_rq", "no", False),
        ("untested_rq", "", False),
        ("dtype", "bfloat16", "bfloat16"),
        ("model", "/models/a b.gguf", "/models/a b.gguf"),
    ],
)
def test_a_value_is_read(name: str, text: str, value: Any) -> None:
    assert getattr(Settings.from_environment({variable(name): text}), name) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("heartbeat", "soon", "a number of seconds, not 'soon'"),
        ("heartbeat", "", "a number of seconds"),
        ("heartbeat", "0", "more than 0"),
        ("heartbeat", "nan", "finite"),
        ("step_timeout", "inf", "finite"),
        ("step_timeout", "-1", "not be negative"),
        ("max_retries", "1.5", "a whole number, not '1.5'"),
        ("max_retries", "-1", "not be negative"),
        ("max_crashes", "0", "more than 0"),
        ("slots", "0", "more than 0"),
        ("untested_rq", "perhaps", "yes or no"),
        ("heartbeat_timeout", "1.5", "at least twice PERDURE_HEARTBEAT"),
        ("health_port", "65536", "at most 65535"),
        ("health_interval", "0", "more than 0"),
        ("retry_cap", "0.5", "less than PERDURE_RETRY_BASE"),
        ("dtype", "float16", "float32 or bfloat16"),
        ("compression", "gzip", "PERDURE_COMPRESSION must be none or zstd, not 'gzip'"),
    ],
)
def test_a_value_that_cannot_be_meant_names_its_variable(name: str, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        Settings.from_environment({variable(name): text})
    assert variable(name) in str(caught.value)


def test_an_unknown_name_is_an_error_with_the_nearest_right_one() -> None:
    with pytest.raises(SettingsError, match=r"PERDURE_HEARTBEET .* did you mean PERDURE_HEARTBEAT\?"):
        Settings.from_environment({"PERDURE_HEARTBEET": "1"}, strict=True)


def test_an_unknown_name_is_a_warning_in_a_library() -> None:
    with pytest.warns(UserWarning, match="PERDURE_QUUX is not a setting of Perdure"):
        assert Settings.from_environment({"PERDURE_QUUX": "1"}) == Settings()


@pytest.mark.parametrize(
    "name",
    [
        "PERDURE_SERVICE_HOST",
        "PERDURE_SERVICE_PORT",
        "PERDURE_SERVICE_PORT_HTTP",
        "PERDURE_PORT",
        "PERDURE_PORT_6379_TCP",
        "PERDURE_PORT_6379_TCP_ADDR",
        "PERDURE_REDIS_SERVICE_HOST",
        "PERDURE_REDIS_PORT",
        "PERDURE_REDIS_PORT_6379_TCP_PROTO",
        "PERDURE_HEALTH_PORT",
    ],
)
def test_variables_of_a_kubernetes_service_are_ignored(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Settings.from_environment({name: "tcp://10.0.0.1:6379"}, strict=True) == Settings()


def test_the_url_falls_back_to_rqs() -> None:
    both = {"PERDURE_REDIS_URL": "redis://ours", "RQ_REDIS_URL": "redis://theirs"}
    assert Settings.from_environment(both).redis_url == "redis://ours"
    assert Settings.from_environment({"RQ_REDIS_URL": "redis://theirs"}).redis_url == "redis://theirs"
    assert Settings.from_environment({}).redis_url == ""


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(redis_url="redis://:pass word@host", tasks=("a.b", "c.d"), heartbeat=0.1, heartbeat_timeout=0.5),
        Settings(untested_rq=True, max_payload=1, retry_base=0.1, drain_timeout=0.0, model="/x y"),
    ],
)
def test_settings_reach_another_process_unchanged(settings: Settings) -> None:
    """``environment()`` is read back as what it was made from, and names nothing that has its default."""
    environment = settings.environment()
    assert Settings.from_environment(environment, strict=True) == settings
    assert set(environment) == {
        variable(field.name) for field in dataclasses.fields(Settings) if getattr(settings, field.name) != field.default
    }


def test_an_unset_flag_changes_nothing() -> None:
    assert Settings(slots=2).replace(slots=None, threads=4) == Settings(slots=2, threads=4)
    with pytest.raises(SettingsError):
        Settings().replace(slots=-1)


def test_every_setting_says_what_it_rules() -> None:
    for field in dataclasses.fields(Settings):
        assert field.metadata.get("help"), field.name


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://:secret@host", "redis://:***@host"),
        ("redis://user:secret@host:1/2", "redis://user:***@host:1/2"),
        ("redis://user:sec@ret@host", "redis://user:***@host"),
        ("rediss://host?password=secret&db=1", "rediss://host?password=***&db=1"),
        ("unix://user:secret@/run/redis.sock?db=2", "unix://user:***@/run/redis.sock?db=2"),
        ("redis://[::1", "(unreadable URL)"),
    ],
)
def test_a_shown_url_has_no_password(url: str, shown: str) -> None:
    assert redact(url) == shown
