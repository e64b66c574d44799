"""What `divault config` prints: every setting, and of those that may hold a secret nothing that could be one."""

from __future__ import annotations

from typing import get_type_hints

import pytest

from divault.errors import SettingsInvalid
from divault.settings import Settings

URLS = [name for name in Settings.model_fields if name.endswith(("_url", "_urls", "_endpoint"))]


def test_each_setting_that_is_a_url_is_one_of_these() -> None:
    hints = get_type_hints(Settings, include_extras=True)
    checked = {
        name for name, hint in hints.items() if "function _url " in str(hint) or "function _public " in str(hint)
    }

    assert checked | {"web3_provider_url"} == set(URLS)


def shown(**values: str) -> dict[str, str]:
    return Settings.load({name.upper(): value for name, value in values.items()}, env_file=None).redacted()


@pytest.mark.parametrize("name", URLS)
@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://zq:zqkey@example.org/v1/traces", "https://example.org/***"),
        ("https://zqkey@example.org:4318", "https://example.org:4318/***"),
        ("https://example.org/v1/traces?api-key=zqkey", "https://example.org/***"),
        ("https://example.org?api-key=zqkey", "https://example.org/***"),
        ("https://example.org#zqkey", "https://example.org/***"),
        ("https://example.org/zqkey/", "https://example.org/***"),
        ("https://[::1]:8080/zqkey", "https://[::1]:8080/***"),
        ("https://zq:zq/key@example.org", "***"),
        ("zq:zqkey@example.org", "***"),
    ],
)
def test_of_a_url_nothing_is_shown_that_may_be_a_key(name: str, url: str, told: str) -> None:
    if (told == "***" and name != "web3_provider_url") or (name == "divault_public_url" and "@" in url):
        with pytest.raises(SettingsInvalid) as caught:
            shown(**{name: url})
        assert "zq" not in caught.value.detail
        return
    found = shown(**{name: url})

    assert found[name.upper()] == told
    assert "zq" not in str(found)


def test_each_of_several_urls_is_masked() -> None:
    found = shown(divault_gateway_urls="https://a.example/ipfs?t=zqkey, http://zq:zqkey@b.example:81 ,http://c.example")

    assert found["DIVAULT_GATEWAY_URLS"] == "https://a.example/***,http://b.example:81/***,http://c.example"


def test_what_holds_no_secret_is_shown_as_it_is() -> None:
    found = shown(
        divault_otlp_endpoint="http://127.0.0.1:4318",
        divault_cors_origins="https://app.example,https://b.example",
        divault_log_dir="./somewhere",
        lighthouse_api_key="zqkey",
        port="81",
    )

    assert found["DIVAULT_OTLP_ENDPOINT"] == "http://127.0.0.1:4318"
    assert found["DIVAULT_CORS_ORIGINS"] == "https://app.example,https://b.example"
    assert (found["DIVAULT_LOG_DIR"], found["PORT"], found["DIVAULT_STORE_URL"]) == ("somewhere", "81", "")
    assert found["LIGHTHOUSE_API_KEY"] == "***"
    assert set(found) == {name.upper() for name in Settings.model_fields}
