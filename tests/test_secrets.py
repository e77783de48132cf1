"""What settings hold that others should not read is taken out wherever they are shown."""

import json
import sys
from pathlib import Path

import pytest

from ganscale.cli.main import main
from ganscale.config import resolve
from ganscale.data.remote import objects
from ganscale.run_folder import RunFolder, append_json_line
from ganscale.runtime import Runtime
from ganscale.secrets import without_secrets
from ganscale.tracking.sessions import session_facts
from ganscale.tracking.wandb_identity import wandb_identity
from tests.helpers.processes import REPOSITORY
from tests.helpers.runs import Runs


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:SECRET@host/set", "https://host/set"),
        ("https://SECRET@host/set", "https://host/set"),
        ("https://user:SE@CRET@host/set", "https://host/set"),
        ("HTTPS://h/{}?X-Amz-Signature=SECRET", "HTTPS://h/{}"),
        ("http://h/my set/{000..9}.tar?a=b c&s=SECRET", "http://h/my set/{000..9}.tar"),
        ("{https://h/a?SECRET,https://h/b?SECRET}", "{https://h/a"),
        ("cache::https://u:SECRET@h/a?SECRET", "cache::https://h/a"),
        ("s3://KEY:SECRET@bucket/x-??.tar", "s3://bucket/x-??.tar"),
        ("abfs://container@account.net/x", "abfs://container@account.net/x"),
        ('pipe:curl -H "Authorization: SECRET" https://h/{}', "pipe:curl ..."),
        ("pipe: curl -n\nSECRET", "pipe: curl ..."),
        ("pipe:TOKEN=SECRET curl {}", "pipe: ..."),
        ("pipe:cat", "pipe:cat"),
        ("data.path=https://u:SECRET@h/x?SECRET", "data.path=https://h/x"),
        ("data={shards: 'pipe:aws --key SECRET', lanes: 4}", "data={shards: 'pipe:aws ..."),
        ("/disk/what?/a@b/x-?.tar", "/disk/what?/a@b/x-?.tar"),
        ("https://host:8080/path@v1/x", "https://host:8080/path@v1/x"),
    ],
)
def test_passwords_signatures_and_commands_are_taken_out_and_the_rest_stays(text, shown):
    assert without_secrets(text) == shown
    assert without_secrets({"a": [text, (1, None)]}) == {"a": [shown, (1, None)]}
    assert without_secrets(shown) == shown
    assert objects.shown(text) == shown


def test_the_printed_settings_are_without_secrets_and_say_so(capsys):
    config = str(REPOSITORY / "configs" / "demo.yaml")
    settings = ["data.path=https://user:SECRET@host/set", "data.shards=pipe:curl -H SECRET {}"]
    for options in ([], ["--explain"]):
        assert main(["config", config, *settings, *options]) == 0
        printed = capsys.readouterr()
        assert "SECRET" not in printed.out
        assert 'path: "https://***@host/set"  # command line' in printed.out
        assert 'shards: "pipe:curl ***"  # command line' in printed.out
        assert "passwords" in printed.err
    assert main(["config", config]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("data.path=https://user:SECRET@127.0.0.1:9/set", "data.path"),
        ("data.path=https://127.0.0.1:9/set?sig=SECRET", "data.path"),
        ("data.path=pipe:curl -H SECRET {}", "data.path"),
        ("data.shards=s3://KEY:SECRET@bucket", "data.shards"),
        ("data.shards=pipe:TOKEN=SECRET curl {}", "data.shards"),
    ],
)
def test_a_config_that_was_printed_without_secrets_is_refused_when_its_data_are_opened(
    tmp_path, capsys, setting, key
):
    assert main(["config", "demo", setting]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    for command in (["train", "--dry-run"], ["train"], ["plan"]):
        assert main([*command, str(tmp_path / "printed.yaml"), f"run.folder={tmp_path}"]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"error: {key} is as `ganscale config` shows it, with ***")
        assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["printed.yaml"]


def test_neither_wandb_nor_the_sessions_get_secrets(tmp_path, monkeypatch):
    asked = [
        "run.name=secrets",
        "data.path=https://user:SECRET@host/set",
        "data.shards='https://h/{}?X-Amz-Signature=SECRET'",
        "data.resolution=8",
    ]
    config = resolve([str(REPOSITORY / "configs" / "demo.yaml"), *asked]).config
    folder = RunFolder(tmp_path)
    folder.identity.write_text('{"id": "1"}')
    monkeypatch.setattr(sys, "argv", ["ganscale", *asked, "pipe:curl -H SECRET"])
    append_json_line(folder.sessions, session_facts(Runtime.start(), "1", 0, "fingerprint"))
    assert "SECRET" not in folder.sessions.read_text()
    # An older session, from when commands were kept as they were
    append_json_line(folder.sessions, {"command": asked, "images_seen": 0})
    shown = json.dumps(wandb_identity(config, folder).config)
    assert "SECRET" not in shown
    assert "https://host/set" in shown
    assert "SECRET" in config.data.path


def test_of_a_runs_files_only_its_settings_hold_secrets(runs: Runs, digits: Path):
    shard = next(digits.glob("*.tar"))
    settings = [f"data.path=pipe:cat {shard}; : SECRET", "training.total_images=32"]
    assert "SECRET" not in runs.finish("streamed", *settings)
    files = [path for path in (runs.folder / "streamed").rglob("*") if path.is_file()]
    assert [path.name for path in files if b"SECRET" in path.read_bytes()] == ["config.yaml"]
