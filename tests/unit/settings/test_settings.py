"""Settings: read from LORAMUX_* variables, refused with name, value and allowed values."""

import os
from pathlib import Path

import pytest

from loramux_shared.faults import SettingsInvalid
from loramux_shared.settings import BuilderSettings, InferenceSettings, Settings, load_settings
from tests.support.cases import cases


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.upper().startswith("LORAMUX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def _refusal(cls: type[Settings], **overrides: object) -> str:
    with pytest.raises(SettingsInvalid) as caught:
        load_settings(cls, **overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Variables become typed settings, and `~` the home folder."""
    monkeypatch.setenv("LORAMUX_DEPLOYMENT", "demo")
    monkeypatch.setenv("LORAMUX_MAX_BATCH_SEQS", "8")
    monkeypatch.setenv("LORAMUX_PREFIX_CACHE", "false")
    monkeypatch.setenv("LORAMUX_KV_MEMORY_GB", "1.5")
    monkeypatch.setenv("LORAMUX_CACHE_DIR", "~/cache")
    settings = load_settings(InferenceSettings)
    assert settings.deployment == "demo"
    assert (settings.max_batch_seqs, settings.prefix_cache, settings.kv_memory_gb) == (8, False, 1.5)
    assert settings.cache_dir == tmp_path / "cache"


def test_overrides_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag beats its variable, and a flag that was not given (None) does not."""
    monkeypatch.setenv("LORAMUX_STORE", "file:///variable")
    monkeypatch.setenv("LORAMUX_GRPC", "0.0.0.0:1")
    settings = load_settings(BuilderSettings, store="file:///flag", grpc=None)
    assert (settings.store, settings.grpc) == ("file:///flag", "0.0.0.0:1")


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable, as container tools pass it on, means the default."""
    monkeypatch.setenv("LORAMUX_GRPC", "")
    monkeypatch.setenv("LORAMUX_LOCAL_ROOTS", "")
    assert load_settings(BuilderSettings) == load_settings(BuilderSettings, grpc="127.0.0.1:50051")


def test_local_roots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Local roots are absolute folders separated as in PATH; one that begins with ~ is below the home."""
    monkeypatch.setenv("LORAMUX_LOCAL_ROOTS", os.pathsep.join(["/srv/a b", "~/adapters"]))
    assert load_settings(BuilderSettings).local_roots == (Path("/srv/a b"), tmp_path / "adapters")
    monkeypatch.setenv("LORAMUX_LOCAL_ROOTS", os.pathsep.join(["/srv", "adapters"]))
    message = _refusal(BuilderSettings)
    assert message == "LORAMUX_LOCAL_ROOTS=adapters: expected absolute folders, separated by ':'"


def test_allowed_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts are read in small letters with their ports; an address is refused."""
    monkeypatch.setenv("LORAMUX_ALLOWED_HOSTS", "Models.example.com, 10.0.0.5:8443,[::1]:443")
    assert load_settings(BuilderSettings).allowed_hosts == ("models.example.com", "10.0.0.5:8443", "[::1]:443")
    monkeypatch.setenv("LORAMUX_ALLOWED_HOSTS", "https://models.example.com/x")
    assert "expected HOST or HOST:PORT" in _refusal(BuilderSettings)


@pytest.mark.parametrize(("name", "value", "allowed"), cases(__file__, "test_a_bad_value"))
def test_a_bad_value(name: str, value: str, allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad value is refused with its name, itself and the allowed values."""
    monkeypatch.setenv("LORAMUX_DEPLOYMENT", "demo")
    monkeypatch.setenv(f"LORAMUX_{name}", value)
    assert _refusal(InferenceSettings).startswith(f"LORAMUX_{name}={value}: expected {allowed}")


@pytest.mark.parametrize("address", ["[::]:50051", "0.0.0.0:0", "builder:50051", "unix:/run/l.sock"])
def test_addresses(address: str) -> None:
    """A server listens on a name, an IPv4 or a bracketed IPv6 address, or a Unix socket."""
    assert load_settings(BuilderSettings, grpc=address).grpc == address


def test_others_may_share_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of the other service, of clients and of secrets are no mistakes, and open nothing."""
    shared = {"DEPLOYMENT": "demo", "MAX_CONCURRENT_BUILDS": "3", "SECRET_hf_access_token": "x"}
    for name, value in {
        **shared,
        **dict.fromkeys(("API_KEY", "TLS_CA", "CLIENT_CERT", "CLIENT_KEY"), "x"),
    }.items():
        monkeypatch.setenv(f"LORAMUX_{name}", value)
    settings = load_settings(BuilderSettings)
    assert (settings.max_concurrent_builds, settings.keys_file, settings.tls_client_ca) == (3, None, None)
    assert settings.api_keys.get_secret_value() == ""
    assert load_settings(InferenceSettings).deployment == "demo"


def test_keys_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that was pasted where its digest belongs is not shown with the settings."""
    monkeypatch.setenv("LORAMUX_API_KEYS", "lmx_pasted")
    assert "pasted" not in repr(load_settings(BuilderSettings))


@pytest.mark.parametrize(
    ("kind", "variables", "flags", "message"), cases(__file__, "test_a_refusal_has_its_name")
)
def test_a_refusal_has_its_name(kind, variables, flags, message, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad flag is named as one, a misspelt variable with the nearest name; no credentials are repeated."""
    for name, value in variables.items():
        monkeypatch.setenv(f"LORAMUX_{name}", value)
    refusal = _refusal({"inference": InferenceSettings, "builder": BuilderSettings}[kind], **flags)
    assert refusal.startswith(message)
    assert "s3cret" not in refusal


def test_kubernetes_service_links_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that Kubernetes sets for services named loramux and loramux-builder do not stop the start."""
    for name, value in cases(__file__, "test_kubernetes_service_links_are_no_settings").items():
        monkeypatch.setenv(name, value)
    assert load_settings(BuilderSettings).max_concurrent_builds == 2
    monkeypatch.setenv("LORAMUX_PORT", "50052")
    assert "LORAMUX_PORT: unknown setting" in _refusal(BuilderSettings)


def test_all_mistakes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One refusal has unknown names, bad values, bad options and missing settings."""
    monkeypatch.setenv("LORAMUX_STOER", "x")
    monkeypatch.setenv("LORAMUX_DEVICE", "gpu")
    message = _refusal(InferenceSettings, threads=0)
    assert all(part in message for part in ("LORAMUX_STOER", "LORAMUX_DEVICE=gpu", "--threads=0"))
    assert "LORAMUX_DEPLOYMENT is not set" in message


def test_every_setting_is_documented() -> None:
    """Every setting has a description."""
    for cls in (BuilderSettings, InferenceSettings):
        assert [name for name, field in cls.model_fields.items() if not field.description] == []
