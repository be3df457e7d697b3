"""``launch canary`` with options, files and servers that cannot be used."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lockstep.launch.client.answers import default_prompts, read_prompts
from lockstep.launch.client.server import AddressError, server_at
from lockstep.launch.commands.main import app

NOWHERE = "http://127.0.0.1:9"


def canary(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["canary", *map(str, arguments)])


@contextmanager
def answering(reply: bytes | None) -> Iterator[str]:
    """A server that answers every connection with these bytes, or never."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with ExitStack() as kept:
                while True:
                    try:
                        client = kept.enter_context(listener.accept()[0])
                    except OSError:
                        return
                    client.recv(1 << 16)
                    if reply is not None:
                        client.sendall(reply)
                        client.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10.0)


def stored(**changes: Any) -> dict[str, Any]:
    token = {"id": 5, "token": "a", "logprob": -0.5, "alternatives": [["a", -0.5]]}
    answer = {"asked": {"name": "one", "prompt": "text"}, "prompt_ids": [1], "tokens": [token]}
    return {"form": 1, "model": "demo", "version": "0.1.0", "max_tokens": 4, "answers": [answer]} | changes


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:81/v1/", "http://h:81"),
        ("https://h", "https://h:443"),
        ("http://[::1]:8/x", "http://[::1]:8/x"),
        ("http://h/v1", "http://h:80"),
    ],
)
def test_a_server_is_named_with_or_without_v1(url: str, base: str) -> None:
    assert server_at(url, 1.0).url == base


@pytest.mark.parametrize("url", ["", "h:80", "ftp://h", "http://", "http://h:x", "http://u@h", "http://h?a"])
def test_other_urls_are_refused_by_option(url: str) -> None:
    with pytest.raises(AddressError, match=r"^--against .*should be http://HOST"):
        server_at(url, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --save FILE and --answers FILE"),
        (["--save", "x", "--answers", "y"], "give one of --save FILE and --answers FILE"),
        (["--answers", "y", "--max-tokens", "3"], "--prompts and --max-tokens go with --save"),
        (["--save", "x", "--api-key-env", "NOT_SET_ANYWHERE"], "--api-key-env NOT_SET_ANYWHERE: not set"),
        (["--save", "/no/such/file"], "--save /no/such/file: cannot be written; should be a file"),
        (["--save", "/tmp"], "--save /tmp: cannot be written"),
        (["--answers", "/no/such"], "--answers /no/such: cannot be read: No such file"),
        (["--save", "x", "--prompts", "/no/such"], "--prompts /no/such: cannot be read: No such file"),
    ],
)
def test_options_that_contradict(arguments: list[str], message: str) -> None:
    result = canary("--against", NOWHERE, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        (json.dumps(stored(form=2)), "form = 2: should be 1"),
        (json.dumps(stored(model=3)), "model: Expected `str`, got `int`"),
        (json.dumps(stored(answers=[])), "answers: Expected `array` of length >= 1"),
        (
            json.dumps(stored()).replace("-0.5,", '"x",', 1),
            "answers[0].tokens[0].logprob: Expected `float`",
        ),
        (json.dumps(stored()).replace('"prompt"', '"text"'), "unknown field `text`"),
        (
            json.dumps(stored()).replace(', "prompt": "text"', ""),
            "answers[0].asked: should have one of prompt",
        ),
    ],
)
def test_a_file_of_answers_is_refused_by_field(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "answers.json"
    file.write_text(content)
    result = canary("--against", NOWHERE, "--answers", file)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds 0 prompts"),
        ('{"name": "a", "prompt": "x"}\n{"name": "a", "prompt": "y"}', "line 2: name = 'a': duplicate name"),
        ('{"name": "a"}', "line 1: should have one of prompt (text) and messages"),
        ('{"name": "a", "prompt": "x", "max_tokens": 0}', "line 1: max_tokens: Expected `int` >= 1"),
        ('{"prompt": "x"}', "line 1: Object missing required field `name`"),
    ],
)
def test_a_file_of_prompts_is_refused_by_line_and_field(tmp_path: Path, lines: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines)
    result = canary("--against", NOWHERE, "--save", tmp_path / "x", "--prompts", file)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_packaged_prompts_are_what_a_file_may_hold(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"name": each.name, "prompt": each.prompt}) for each in default_prompts()]
    file.write_text("\n".join(lines))
    assert read_prompts(file) == default_prompts()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (None, "sent nothing for 1 s; waited for the answer to GET /v1/models"),
        (b"", "the server closed the connection during GET /v1/models"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "does not speak HTTP"),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhm",
            "the answer to GET /v1/models is not JSON: b'hm'",
        ),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", "closed the connection during GET /v1/models"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "/v1/models lists no models"),
        (b"HTTP/1.1 502 Bad\r\ncontent-length: 4\r\n\r\ngone", "GET /v1/models: HTTP 502: gone"),
    ],
)
def test_a_server_that_gives_no_answer(tmp_path: Path, reply: bytes | None, message: str) -> None:
    with answering(reply) as url:
        seconds = "1" if reply is None else "20"
        result = canary("--against", url, "--save", tmp_path / "x", "--timeout", seconds)
    assert (result.exit_code, message in result.stderr) == (3, True), result.stderr
    assert not (tmp_path / "x").exists()


@contextmanager
def encrypted(folder: Path) -> Iterator[str]:
    """A server that lists one model, behind TLS with a certificate of its own in ``folder``."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the program openssl makes the certificate")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    made = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    made += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key]
    subprocess.run([openssl, *made, "-out", certificate], check=True, capture_output=True, timeout=60)

    class Models(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"data": [{"id": "only"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Silent."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        server.handle_error = lambda request, address: None  # type: ignore[method-assign]
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"https://localhost:{server.server_port}"
        server.shutdown()
        thread.join(10.0)


def test_a_certificate_that_nobody_vouches_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the certificate in SSL_CERT_FILE the server is spoken to."""
    with encrypted(tmp_path) as url:
        arguments = ("--against", url, "--save", tmp_path / "x", "--model", "other")
        result = canary(*arguments)
        assert result.exit_code == 3
        assert "certificate verify failed" in result.stderr.lower()
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
        result = canary(*arguments)
    assert result.exit_code == 2
    assert f"--model other: {url} serves only" in result.stderr


def test_a_name_that_no_dns_can_have(tmp_path: Path) -> None:
    result = canary("--against", f"http://{'a' * 64}.example", "--save", tmp_path / "x")
    assert result.exit_code == 3
    assert "(GET /v1/models)" in result.stderr


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    result = canary("--against", f"http://127.0.0.1:{port}", "--save", tmp_path / "x")
    assert result.exit_code == 3
    assert f"error: http://127.0.0.1:{port}: " in result.stderr
    assert "(GET /v1/models)" in result.stderr
