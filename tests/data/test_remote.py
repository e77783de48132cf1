"""Remote objects arrive complete and correct, or not at all, whatever happens to the connection.

The S3 server is moto's, in another process; a proxy in front of it injects faults.
"""

import hashlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ganscale.data.remote import objects
from ganscale.errors import UnavailableError, UserError
from tests.helpers.fault_server import Fault, FaultServer
from tests.helpers.processes import run_python

CONTENT = np.random.default_rng(0).bytes(3_000_000)
PATH = "/set/a.tar"
STALL = 0.5  # seconds


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer().running() as server:
        server.objects[PATH] = CONTENT
        yield server


def read(url: str, retry_seconds: float = 20.0) -> bytes:
    with objects.open_stream(url, retry_seconds, stall_seconds=STALL) as stream:
        return stream.read()


def test_names_are_joined_to_a_base_of_any_kind():
    assert objects.join("s3://bucket/set/", "a.tar") == "s3://bucket/set/a.tar"
    assert objects.join("/disk/set", "train/a.tar") == "/disk/set/train/a.tar"
    assert (
        objects.join("http://h/set?token=x", "a b?%.tar") == "http://h/set/a%20b%3F%25.tar?token=x"
    )
    command = objects.join("pipe:cat /set/{} | zcat", "a; touch 'b'.tar")
    printed = subprocess.run(
        [
            "sh",
            "-c",
            command.removeprefix("pipe:cat /set/").replace(" | zcat", "").join(["echo ", ""]),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout == "a; touch 'b'.tar\n"
    with pytest.raises(UserError, match=r"needs a \{\}, which"):
        objects.join("pipe:cat", "a.tar")


@pytest.mark.parametrize(
    ("location", "is_remote", "may_be_in_a_manifest"),
    [
        ("http://h/x", True, True),
        ("https://h/x", True, True),
        ("s3://b/x", True, True),
        ("gs://b/x", True, True),
        ("hf://datasets/a/b", True, True),
        ("pipe:cat {}", True, False),
        ("file:///etc", False, False),
        ("simplecache::s3://b/x", True, False),
        ("s3://b/x::file:///etc", True, False),
        ("sftp://h/x", True, False),
        ("memory://x", True, False),
        ("/disk", False, False),
        (".", False, False),
    ],
)
def test_locations_are_told_apart(location, is_remote, may_be_in_a_manifest):
    assert objects.is_remote(location) == is_remote
    assert objects.is_object_store(location) == may_be_in_a_manifest


def test_messages_show_neither_password_nor_signature():
    shown = objects.shown("https://user:secret@host/a.tar?X-Amz-Signature=secret")
    assert shown == "https://host/a.tar"


def test_patterns_expand_as_shells_do_on_disk_and_on_a_server(server, tmp_path):
    for name in ("a-000.tar", "a-001.tar", "b-000.tar", "c.txt"):
        (tmp_path / name).touch()
    here = [str(tmp_path / name) for name in ("a-000.tar", "a-001.tar", "b-000.tar")]
    assert objects.expand(f"{tmp_path}/{{a-{{000..001}},b-000}}.tar") == here
    assert objects.expand(f"{tmp_path}/*.tar") == here
    assert objects.expand(f"{tmp_path}/a-00?.tar") == here[:2]
    assert objects.expand(f"{server.url}/{{08..10}}.tar") == [
        f"{server.url}/{name}.tar" for name in ("08", "09", "10")
    ]
    links = "".join(f'<a href="{name}">x</a>' for name in ("b.tar", "a.tar", "c.txt"))
    server.objects["/listed/"] = server.objects["/listed"] = links.encode()
    assert objects.expand(f"{server.url}/listed/*.tar") == [
        f"{server.url}/listed/{name}.tar" for name in "ab"
    ]
    with pytest.raises(UserError, match=r"no file matches .*/b-001\.tar, from "):
        objects.expand(f"{tmp_path}/b-{{000..001}}.tar")
    with pytest.raises(UserError, match="no file matches"):
        objects.expand(f"{server.url}/listed/*.zip")
    with pytest.raises(UserError, match="do not match"):
        objects.expand(f"{tmp_path}/{{a")


def test_an_object_is_streamed_with_exact_reads_in_one_request(server):
    with objects.open_stream(server.url + PATH, 0) as stream:
        assert stream.read(512) == CONTENT[:512]
        assert stream.read(100_000) == CONTENT[512:100_512]
        assert stream.read() == CONTENT[100_512:]
    assert (server.gets[PATH], server.heads[PATH]) == (1, 0)


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(status=503), Fault(status=500), Fault(status=429)],
        [Fault(cut_after=1_500_000), Fault(cut_after=50_000)],
        [Fault(cut_after=0)],
        [Fault(stall_after=70_000), Fault(status=503), Fault(stall_after=1_000_000)],
        [Fault(stall_after=0)],
        [Fault(cut_after=2_000_000), Fault(status=503), Fault(stall_after=10), Fault(status=408)],
    ],
)
def test_passing_faults_are_retried_and_a_cut_connection_continues_where_it_was(server, faults):
    server.faults[PATH].extend(faults)
    assert read(server.url + PATH) == CONTENT
    assert server.gets[PATH] == len(faults) + 1
    if not any(fault.cut_after for fault in faults):  # a cut may lose what waits in buffers
        assert server.ranges[PATH][-1] == sum(fault.stall_after or 0 for fault in faults)


@pytest.mark.parametrize("has_length", [True, False])
def test_a_server_without_ranges_is_read_again_from_the_start(server, has_length):
    server.has_ranges, server.has_length = False, has_length
    server.faults[PATH].extend([Fault(cut_after=100_000), Fault(cut_after=200_000)])
    url = server.url + PATH
    with objects.RemoteObject(url, 20, expected_size=len(CONTENT), stall_seconds=STALL) as source:
        assert source.readall() == CONTENT
        assert source.size == (len(CONTENT) if has_length else None)
    assert len(server.ranges[PATH]) == 3


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_short_body_without_a_stated_length_is_noticed_by_the_expected_size(server, has_ranges):
    server.has_length, server.has_ranges = False, has_ranges
    short = server.objects[PATH] = CONTENT[:-1000]
    with objects.RemoteObject(server.url + PATH, 20, expected_size=len(CONTENT)) as source:
        sentence = r"has (no byte 2,999,000|2,999,000 bytes, not the expected 3,000,000)"
        with pytest.raises(UserError, match=sentence):
            source.readall()
    assert read(server.url + PATH) == short  # nobody could tell


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (CONTENT[::-1], "changed while it was read"),  # by its ETag
        (CONTENT + b"longer", "changed while it was read"),
        (CONTENT[:50_000], "is shorter than it was: it has no byte 100,000"),
    ],
)
def test_an_object_that_changes_meanwhile_is_not_mixed(server, other, sentence):
    server.has_identity = len(other) == len(CONTENT)
    server.faults[PATH].append(Fault(stall_after=100_000))
    with objects.open_stream(server.url + PATH, 20, stall_seconds=STALL) as stream:
        stream.read(4096)
        server.objects[PATH] = other
        with pytest.raises(objects.ObjectChanged, match=rf"/set/a\.tar {sentence}"):
            stream.read()


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("{server}/set/none.tar", "none.tar: there is no such object"),
        ("nosuch://x/y", "nosuch:// addresses cannot be read"),
        ("http://[x/y", "Invalid"),
    ],
)
def test_permanent_failures_are_reported_at_once(server, url, sentence):
    start = time.monotonic()
    with pytest.raises(UserError, match=sentence):
        read(url.format(server=server.url), retry_seconds=600)
    assert time.monotonic() - start < 300  # it did not retry


@pytest.mark.parametrize("status", [401, 403, 410])
def test_missing_access_is_reported_at_once(server, status):
    server.faults[PATH].append(Fault(status=status))
    with pytest.raises(UserError, match=f"HTTP status {status}"):
        read(server.url + PATH, retry_seconds=60)
    assert server.gets[PATH] == 1


def test_failures_that_last_too_long_ask_for_a_requeue(server):
    server.faults[PATH].extend([Fault(status=503)] * 1000)
    with pytest.raises(UnavailableError, match=r"a\.tar cannot be read.*503.*tried for 1 s"):
        read(server.url + PATH, retry_seconds=1)
    assert 2 <= server.gets[PATH] < 30
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
        read("http://127.0.0.1:9/a.tar", retry_seconds=0)


def test_time_is_counted_from_the_last_byte_that_came(server):
    # Each request brings a little: all of them together take longer than may pass without any.
    server.faults[PATH].extend([Fault(stall_after=20_000)] * 4)
    with objects.open_stream(server.url + PATH, 0.7, stall_seconds=0.4) as stream:
        assert stream.read() == CONTENT


def test_the_output_of_a_command_is_read_and_its_failure_noticed(tmp_path):
    (tmp_path / "a b.tar").write_bytes(CONTENT)
    assert read(objects.join(f"pipe:cat {tmp_path}/{{}}", "a b.tar")) == CONTENT
    half = f"pipe:head -c 1000 '{tmp_path}/a b.tar'; echo it broke >&2; exit 3"
    with pytest.raises(UnavailableError, match="exit code 3: it broke"):
        read(half, retry_seconds=0)
    once = f"if [ -e {tmp_path}/was ]; then cat '{tmp_path}/a b.tar'; "
    once += f"else touch {tmp_path}/was; head -c 1000 '{tmp_path}/a b.tar'; exit 1; fi"
    assert read(f"pipe:{once}") == CONTENT  # started again, what was read is skipped
    with pytest.raises(UserError, match=r"exit code 127: .*not found"):
        read("pipe:no-such-command-anywhere", retry_seconds=60)


def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    command = f"pipe:sh -c 'echo $$ > {tmp_path}/pid; sleep 1000' | cat"
    with pytest.raises(UnavailableError, match=r"printed nothing for 0\.5 s"):
        read(command, retry_seconds=0)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 300
    while Path(f"/proc/{pid}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{pid}").exists()


def test_a_process_that_has_read_ends_without_warnings_of_open_sessions(server, s3):
    s3.put("a.tar", CONTENT)
    program = (
        "import sys; from ganscale.data.remote import objects\n"
        "for url in sys.argv[1:]:\n"
        "    with objects.open_stream(url, 5) as stream: print(len(stream.read()))\n"
        "with objects.open_stream(sys.argv[1], 5) as stream: stream.read(10); sys.exit(0)\n"
    )
    ended = run_python("-W", "error", "-c", program, server.url + PATH, "s3://bucket/a.tar")
    assert ended.stderr == ""
    assert ended.stdout == f"{len(CONTENT)}\n" * 2


def test_s3_objects_are_read_exactly_and_faults_are_retried(s3):
    s3.put("listed/b.tar", b"b")
    s3.put("a.tar", CONTENT)
    assert read("s3://bucket/a.tar") == CONTENT
    assert objects.expand("s3://bucket/list*/*.tar") == ["s3://bucket/listed/b.tar"]
    for fault in (Fault(status=503), Fault(status=500), Fault(cut_after=100_000),
                  Fault(stall_after=5)):  # fmt: skip
        s3.proxy.faults["/bucket/a.tar"].append(fault)
        assert read("s3://bucket/a.tar") == CONTENT
    with objects.RemoteObject("s3://bucket/a.tar", 0, start=250_000) as source:
        assert source.size == len(CONTENT)
        assert source.identity
        assert source.readall() == CONTENT[250_000:]
    digest = hashlib.sha256()
    with objects.open_stream("s3://bucket/a.tar", 0) as stream:
        gets = s3.proxy.gets["/bucket/a.tar"]
        while data := stream.read(10_000):
            digest.update(data)
    assert digest.digest() == hashlib.sha256(CONTENT).digest()
    assert s3.proxy.gets["/bucket/a.tar"] == gets + 1  # small reads are no small requests


def test_refusals_of_s3_are_reported_at_once_and_lasting_failures_ask_for_a_requeue(s3):
    s3.put("a.tar", CONTENT)
    for missing in ("s3://bucket/none.tar", "s3://nowhere/a.tar"):
        with pytest.raises(UserError, match="there is no such object"):
            read(missing)
    s3.proxy.faults["/bucket/a.tar"].append(Fault(status=403))
    with pytest.raises(UserError, match="no access"):
        read("s3://bucket/a.tar")
    s3.proxy.faults["/bucket/a.tar"].extend([Fault(status=503)] * 100)
    with pytest.raises(UnavailableError, match=r"s3://bucket/a\.tar cannot be read"):
        read("s3://bucket/a.tar", retry_seconds=0.5)


def test_a_missing_package_is_named_with_the_extra_that_installs_it():
    program = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from ganscale.data.remote import objects; from ganscale.errors import UserError\n"
        "try: objects.open_stream('s3://bucket/a.tar', 60)\n"
        "except UserError as error: print(error)"
    )
    said = run_python("-c", program).stdout
    assert "s3:// needs a package that is not installed" in said
    assert "pip install 'ganscale[remote]'" in said


def test_s3_without_credentials_is_an_error(s3, monkeypatch, tmp_path):
    from ganscale.data.remote import connections

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    connections._create_filesystem.cache_clear()
    with pytest.raises(UserError, match="no valid credentials"):
        read("s3://bucket/a.tar")
