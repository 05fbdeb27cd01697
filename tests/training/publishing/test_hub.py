"""Sending to the loopback Hub: private unless asked for, resumed where it broke off, refused where it must be."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from helpers.hub_server import HubServer
from helpers.publishing import REPO, TOKEN, OwnCheckpoint, files_in

import adfeatures
from training.publishing.hub import upload

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot pin down")


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("option", "private"), [((), True), (("--private",), True), (("--public",), False)])
def test_private_unless_public_is_said(
    own: OwnCheckpoint,
    writable: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    option: tuple[str, ...],
    private: bool,
) -> None:
    assert own.publish("--repo", REPO, *option) == 0
    (request,) = [sent for path, sent in writable.sent if path == "/api/repos/create"]
    assert isinstance(request, dict) and (request["organization"], request["name"]) == ("owner", "name")
    # 0.30 says it by the one word, later versions by the other
    said = request["visibility"] if "visibility" in request else {True: "private", False: "public"}[request["private"]]
    assert said == ("private" if private else "public")
    monkeypatch.delenv("HF_TOKEN")
    if private:
        with pytest.raises(adfeatures.errors.DownloadError):
            adfeatures.create_model(weights=f"hf-hub:{REPO}", cache_dir=own.path.parent / "empty")
    else:
        own.is_served_by(adfeatures.create_model(weights=f"hf-hub:{REPO}"))


def test_a_public_repository_must_be_meant(
    own: OwnCheckpoint, writable: HubServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert own.publish("--repo", REPO, "--public") == 0
    assert own.publish("--repo", REPO, "--license", "mit") == 2
    assert "Say --public" in capsys.readouterr().err
    assert own.publish("--repo", REPO, "--license", "mit", "--public") == 0
    assert len(writable.pushed) == 2


def test_a_private_one_stays_private(
    own: OwnCheckpoint, writable: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert own.publish("--repo", REPO) == 0
    assert own.publish("--repo", REPO, "--license", "mit", "--public") == 0
    assert "private as it was" in capsys.readouterr().out and REPO in writable.tokens


def test_nothing_new_is_no_commit(own: OwnCheckpoint, writable: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert own.publish("--repo", REPO) == 0
    head = writable.branches[REPO]["main"]
    with writable.counting() as requests:
        assert own.publish("--repo", REPO) == 0
    assert "nothing was sent" in capsys.readouterr().out
    assert writable.branches[REPO]["main"] == head and {request.method for request in requests} <= {"GET", "HEAD"}
    assert own.publish("--repo", REPO, "--data", "ours") == 0
    assert [paths for _, _, paths in writable.pushed] == [
        ["config.json", "model.safetensors", "README.md"],
        ["README.md"],
    ]


def test_cut_in_the_middle_of_the_weights(
    own: OwnCheckpoint, writable: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits between its attempts
    writable.fault(method="PUT", origin="storage", cut=1000, times=6)
    assert own.publish("--repo", REPO) == 2
    assert "run the same command again" in capsys.readouterr().err
    assert not writable.pushed and not writable.objects
    with writable.counting() as requests:
        assert own.publish("--repo", REPO) == 0
    assert not any("create" in request.path for request in requests)
    own.is_served_by(adfeatures.create_model(weights=f"hf-hub:{REPO}"))


def test_one_cut_is_mended_at_once(own: OwnCheckpoint, writable: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    writable.fault(method="PUT", origin="storage", cut=1000, times=1)
    assert own.publish("--repo", REPO) == 0
    assert len(writable.pushed) == 1


@pytest.mark.parametrize("fault", [{"status": 500}, {"cut": 0}])
def test_weights_that_arrived_are_not_sent_again(
    own: OwnCheckpoint, writable: HubServer, capsys: pytest.CaptureFixture[str], fault: dict[str, int]
) -> None:
    """The commit fails, or it is made and the answer is lost."""
    writable.fault(method="POST", match="/commit/", times=1, **fault)
    assert own.publish("--repo", REPO) == 2
    assert "run the same command again" in capsys.readouterr().err
    with writable.counting() as requests:
        assert own.publish("--repo", REPO) == 0
    assert not any(request.method == "PUT" for request in requests)
    assert len(writable.pushed) == 1
    own.is_served_by(adfeatures.create_model(weights=f"hf-hub:{REPO}"))


def test_a_server_that_stays_broken(
    own: OwnCheckpoint, writable: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    writable.fail(503, match="/preupload/")
    assert own.publish("--repo", REPO) == 2
    assert "HTTP 503" in capsys.readouterr().err


def test_tokens(
    own: OwnCheckpoint, hub: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.allow(TOKEN, "another")
    assert "needs a token" in refused(capsys, own.publish("--repo", REPO))
    assert not hub.requests
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "not valid (HTTP 401: Invalid credentials" in refused(capsys, own.publish("--repo", REPO))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "may not write to owner (HTTP 403: You don't have the rights" in refused(capsys, own.publish("--repo", REPO))
    assert not hub.branches


def test_names_that_are_taken(own: OwnCheckpoint, writable: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    writable.add("owner/other", "config.json", b'{"architecture": "resnet50"}', lfs=False)
    writable.add("owner/mess", "config.json", b"\xff[]", lfs=False)
    writable.add("owner/data", "train.csv", b"1", lfs=False)
    writable.add("owner/hidden", "x", b"1")
    writable.require_token("owner/hidden", "hf_of_somebody_else")
    heads = dict(writable.branches)
    for name, says in (
        ("owner/other", "holds resnet50, which adpretrain_timm would overwrite"),
        ("owner/mess", "holds something else"),
        ("owner/data", "holds other things: train.csv"),
        ("owner/hidden", "HTTP 409"),
    ):
        assert says in refused(capsys, own.publish("--repo", name, "--public"))
    assert writable.branches == heads and not writable.pushed


def test_somebody_else_was_quicker(own: OwnCheckpoint, writable: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    writable.fail(412, match="/commit/", times=1)
    assert "changed it meanwhile" in refused(capsys, own.publish("--repo", REPO))


def test_what_the_hub_objects_to_is_said(
    own: OwnCheckpoint, writable: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    says = refused(capsys, own.publish("--repo", REPO, "--license", "my own"))
    assert "HTTP 400: license must be one of" in says and "Mend that" in says
    writable.fail(402, match="/preupload/", times=1)
    assert "HTTP 402: fault on demand" in refused(capsys, own.publish("--repo", REPO))


def test_no_network(
    own: OwnCheckpoint, hub: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the connection failed" in refused(capsys, own.publish("--repo", REPO))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(capsys, own.publish("--repo", REPO))
    assert not hub.requests


def test_small_files_are_compared_by_what_git_calls_them(
    own: OwnCheckpoint, writable: HubServer, tmp_path: Path
) -> None:
    assert own.publish("--repo", REPO, "--folder", tmp_path) == 0
    files = [tmp_path / name for name in ("config.json", "model.safetensors", "README.md")]
    assert "has it all: nothing was sent" in upload(files, REPO)
    longer = (tmp_path / "README.md").read_bytes() + b"More.\n"
    (tmp_path / "README.md").write_bytes(longer)
    assert upload(files, REPO) == f"sent README.md to {writable.url}/{REPO}, private"
    assert files_in(writable)["README.md"] == longer


def test_an_endpoint_that_is_no_address(
    own: OwnCheckpoint, writable: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "mirror.example")
    assert "HF_ENDPOINT is 'mirror.example'" in refused(capsys, own.publish("--repo", REPO))
    assert not writable.requests
