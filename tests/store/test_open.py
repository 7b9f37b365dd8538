"""URLs: which store they open, how they are spelled, and that nothing secret is ever in them or in what is said about them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import holdfast.store
from holdfast.core.errors import HoldfastError, UsageError
from holdfast.store import LocalStore, MemoryStore, normalise_url, open_store
from holdfast.store.redaction import redact, secrets_among

_CLOUD_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ACCOUNT_NAME")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("./runs/x", "file:///here/runs/x"),
        ("runs/x/", "file:///here/runs/x"),
        ("../x", "file:///x"),
        ("/abs//x/../y/", "file:///abs/y"),
        ("/with space/ü", "file:///with%20space/%C3%BC"),
        ("file:///abs/with%20space", "file:///abs/with%20space"),
        ("file://localhost/abs", "file:///abs"),
        ("FILE:///abs", "file:///abs"),
        ("s3://bucket/runs/x/", "s3://bucket/runs/x"),
        ("S3A://bucket", "s3://bucket"),
        ("gs://bucket/x", "gs://bucket/x"),
        ("gcs://bucket/x", "gs://bucket/x"),
        ("az://container/x", "az://container/x"),
        ("memory://name/x", "memory://name/x"),
    ],
)
def test_one_spelling(url: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getcwd", lambda: "/here")
    assert normalise_url(url) == expected
    assert normalise_url(expected) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://host/x",
        "http://host/x",
        "s3:bucket",
        "s3:/bucket",
        "file://host/x",
        "file://",
        "s3://",
        "s3:///x",
        "s3://bucket//x",
        "s3://bucket/../x",
        "s3://bucket/./x",
        "s3://user:hidden-password@bucket/x",
        "s3://bucket/x?X-Amz-Signature=hidden-password",
        "az://bucket/x#hidden-password",
        "memory://",
        "/a\0b",
    ],
)
def test_what_makes_no_sense_is_refused_without_repeating_secrets(url: str) -> None:
    for function in (normalise_url, open_store):
        with pytest.raises(UsageError) as caught:
            function(url)
        assert "hidden-password" not in str(caught.value)
    if url.startswith("ftp"):
        assert "s3://bucket/prefix" in str(caught.value)


@given(st.text())
def test_any_text_has_a_stable_spelling_or_is_refused(url: str) -> None:
    try:
        canonical = normalise_url(url)
    except HoldfastError:
        return
    assert normalise_url(canonical) == canonical
    assert "@" not in canonical.removeprefix("file://") or canonical.startswith("file://")


def test_folders_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("./a b/ü")
    assert isinstance(store, LocalStore)
    store.put("x", b"1")
    assert (tmp_path / "a b" / "ü" / "x").read_bytes() == b"1"
    assert open_store(store.url).get("x", max_bytes=1) == b"1"
    store.close()
    one, same, other = open_store("memory://one"), open_store("memory://one"), open_store("memory://other")
    assert isinstance(one, MemoryStore)
    one.put("x", b"1")
    assert same.get("x", max_bytes=1) == b"1"
    assert list(other.list()) == []


def test_wrong_settings_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _CLOUD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="colour"):
        open_store("s3://bucket", options={"colour": "blue"})
    with pytest.raises(UsageError, match="Account"):
        open_store("az://container/x")
    with pytest.raises(UsageError) as caught:
        open_store("az://container/x", options={"account_name": "account", "account_key": "hidden-password!"})
    assert "hidden-password" not in str(caught.value)


def test_a_local_run_does_not_pay_for_the_cloud_client(tmp_path: Path) -> None:
    code = f"import sys; from holdfast.store import open_store; open_store({str(tmp_path)!r}); sys.exit('obstore' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(Path(holdfast.store.__file__).parents[2])}
    )


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter2secret@host/path",
        "GET https://host/b/k?X-Amz-Credential=hunter2secret&X-Amz-Signature=hunter2secret failed",
        "https://host/k?sv=2024&sig=hunter2secret%3D",
        "Authorization: Bearer hunter2secret",
        "<StringToSign>AWS4 hunter2secret\n more hunter2secret</StringToSign>",
        "<AWSAccessKeyId>hunter2secret</AWSAccessKeyId>",
        "x-amz-security-token: hunter2secret",
        "the key is given-hunter2secret",
        "AccountKey given-hunter2secret is not valid",
    ],
)
def test_redaction(text: str) -> None:
    assert "hunter2secret" not in redact(text, secrets=["given-hunter2secret"])
    assert "AKIAABCDEFGHIJKLMNOP" not in redact("signed by AKIAABCDEFGHIJKLMNOP today")


def test_redaction_leaves_what_a_reader_needs() -> None:
    text = "GET http://127.0.0.1:9000/bucket/run/a in 3ms: the server answered 503 (SlowDown). Is it up?"
    assert redact(text) == text
    assert len(redact("x" * 10_000)) < 700


def test_which_values_are_secret() -> None:
    options = {"account_key": "one-secret", "region": "eu-west-1", "sas_token": "two-secret"}
    environment = {
        "AWS_SECRET_ACCESS_KEY": "three-secret",
        "GOOGLE_APPLICATION_CREDENTIALS": "/path/to/file.json",
        "HOME_KEY": "not-a-cloud",
        "AWS_REGION": "eu-west-1",
    }
    assert secrets_among(options, environment) == {"one-secret", "two-secret", "three-secret"}
