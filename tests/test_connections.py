"""What nobody can break before a key is read: half requests, endless heads, bodies that never end, unread answers."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest

from runtime.http.connections import ConnectionLimits
from tests.conftest import ServeScripted
from tests.serving import MODEL, SayingEngine, Served

SOON_S = 5.0
"""Half of what the server gives a head, and more than a busy machine stands still."""
QUICK = ConnectionLimits(head_s=0.3, body_s=0.5, unread_s=0.5, connections=40)


def seconds_until_answered(served: Served) -> float:
    began = time.monotonic()
    assert httpx.get(f"{served.url}/health", timeout=30).status_code == 200
    return time.monotonic() - began


def connected(served: Served, sent: bytes = b"") -> socket.socket:
    one = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    one.sendall(sent)
    return one


def read_to_the_end(one: socket.socket) -> bytes:
    """All that comes until the server closes. Fails after the socket's time-out."""
    said = b""
    while piece := _piece(one):
        said += piece
    return said


def _piece(one: socket.socket) -> bytes:
    try:
        return one.recv(65536)
    except ConnectionResetError:
        return b""


HALF = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
BODY_TO_COME = HALF + b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"


@pytest.mark.parametrize(
    ("sent", "status"), [(b"", b""), (b"GET", b"408"), (HALF, b"408"), (BODY_TO_COME, b"408")], ids=repr
)
def test_what_is_not_sent_to_its_end_is_ended(serve_scripted: ServeScripted, sent: bytes, status: bytes) -> None:
    served = serve_scripted(limits_of_connections=QUICK)
    began = time.monotonic()
    said = read_to_the_end(connected(served, sent))
    assert time.monotonic() - began < 5
    assert status in said.split(b"\r\n")[0]


def test_a_drop_now_and_then_keeps_no_request_open(serve_scripted: ServeScripted) -> None:
    """Each byte used to be a reason to wait on."""
    served = serve_scripted(limits_of_connections=QUICK)
    for sent in (HALF + b"x-drip: ", BODY_TO_COME):
        with connected(served, sent) as one:
            began = time.monotonic()
            with pytest.raises(OSError):  # noqa: PT011, PT012 - reset or broken pipe, in the end
                while time.monotonic() - began < 10:
                    one.sendall(b"a")
                    time.sleep(0.05)
            assert time.monotonic() - began < 8


def test_an_endless_head_is_cut_at_its_limit(serve_scripted: ServeScripted) -> None:
    served = serve_scripted()
    for sent in (b"GET /health HTTP/1.1\r\nx-endless: ", b"GET /"):
        with connected(served, sent) as one:
            sent_bytes = 0
            with pytest.raises(OSError):  # noqa: PT011, PT012
                for _ in range(2000):
                    one.sendall(b"a" * 65536)
                    sent_bytes += 65536
            assert sent_bytes < 20 * 2**20
        assert seconds_until_answered(served) < SOON_S


@pytest.mark.parametrize("num_bytes", [40_000, 500_000])
def test_a_head_that_is_too_large_is_told_so_also_in_one_piece(serve_scripted: ServeScripted, num_bytes: int) -> None:
    served = serve_scripted()
    one = connected(served, b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * num_bytes + b"\r\n\r\n")
    assert read_to_the_end(one).startswith(b"HTTP/1.1 431 ") or num_bytes > 100_000  # or reset, while it still sends
    assert seconds_until_answered(served) < SOON_S


def test_heads_that_are_long_but_not_too_long_are_answered(serve_scripted: ServeScripted) -> None:
    served = serve_scripted()
    headers = {"x-long": "a" * 20_000}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello " * 300}], "tools": []}
    assert httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers).status_code == 200


def test_half_requests_take_nobodys_place(serve_scripted: ServeScripted) -> None:
    """More of them than there are places: each newcomer used to wait for ever."""
    served = serve_scripted(limits_of_connections=ConnectionLimits(connections=40))
    with ExitStack() as stack:
        for _ in range(120):
            stack.enter_context(connected(served, HALF))
        assert seconds_until_answered(served) < SOON_S
        assert len(served.server.server_state.connections) <= 41


def test_a_request_that_is_being_answered_keeps_its_place(serve_scripted: ServeScripted, protocol: object) -> None:
    engine = SayingEngine(protocol, "one two three four five six seven eight", pause_s=0.2)  # type: ignore[arg-type]
    served = serve_scripted(engine=engine, limits_of_connections=ConnectionLimits(connections=8))
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "tools": [], "stream": True}
    with (
        httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=30) as answer,
        ExitStack() as stack,
    ):
        lines = answer.iter_lines()
        next(lines)
        for _ in range(30):
            stack.enter_context(connected(served, HALF))
        assert "data: [DONE]" in list(lines)


def test_an_answer_that_nobody_reads_is_given_up(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(limits_of_connections=QUICK)
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.connect(("127.0.0.1", served.port))
    one.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 500)
    deadline = time.monotonic() + 10
    while served.server.server_state.connections and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not served.server.server_state.connections
    one.close()


def test_requests_that_follow_each_other_on_one_connection_are_all_answered(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(limits_of_connections=QUICK)
    with httpx.Client() as client:
        for _ in range(3):
            assert client.get(f"{served.url}/health").status_code == 200
            time.sleep(0.4)  # longer than a head may take: waiting for the next request is no crime
    with connected(served, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 3) as one:
        said = b""
        while said.count(b"HTTP/1.1 200") < 3:
            said += one.recv(65536)


@contextmanager
def few_files(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


ATTACKER = """
import resource, socket, sys, time
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(1100)]
for one in held:
    try:
        one.sendall(b"POST /v1/chat/completions HTTP/1.1\\r\\nhost: localhost\\r\\n")
    except OSError:
        pass
print("held", flush=True)
time.sleep(60)
"""


def test_1100_half_requests_with_1024_files_cost_nothing(serve_scripted: ServeScripted) -> None:
    with few_files(1024):
        served = serve_scripted()
        attacker = subprocess.Popen([sys.executable, "-c", ATTACKER, str(served.port)], stdout=subprocess.PIPE)
        try:
            assert attacker.stdout is not None
            assert attacker.stdout.readline() == b"held\n"
            assert seconds_until_answered(served) < SOON_S
        finally:
            attacker.kill()
            attacker.wait()


def test_streams_finish_within_the_grace_and_are_told_where_they_do_not(
    serve_scripted: ServeScripted, protocol: object
) -> None:
    engine = SayingEngine(protocol, "one two three", " ".join(["word"] * 400), pause_s=0.1)  # type: ignore[arg-type]
    served = serve_scripted(engine=engine, grace_s=2.0)
    with ExitStack() as stack:
        lines: list[Callable[[], list[str]]] = []
        for text in ("a", "b"):
            body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "tools": [], "stream": True}
            stream = httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=30)
            lines.append(stack.enter_context(stream).iter_lines())  # type: ignore[arg-type]
            next(lines[-1])  # type: ignore[call-overload]
        began = time.monotonic()
        served.server.should_exit = True
        short, long = ([line for line in each if line] for each in lines)  # type: ignore[attr-defined]
        assert time.monotonic() - began < 5
    assert short[-1] == "data: [DONE]"
    assert "server_stopping" in long[-1]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health")


CHUNKED = HALF + b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
LAST_CHUNK = CHUNKED + b"2\r\n{}\r\n0\r\n"


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (LAST_CHUNK, b"x: y\r\n" * 10_000),
        (LAST_CHUNK + b"x: ", b"y" * 60_000),
        (CHUNKED + b"1;", b"x" * 60_000),
        (CHUNKED + b"1\r\n \r\n1;", b"x=" * 30_000),
    ],
    ids=["trailers", "one trailer", "a chunk's extension", "a later one"],
)
def test_what_comes_beside_a_body_is_bounded_as_its_head_is(
    serve_scripted: ServeScripted, begin: bytes, piece: bytes
) -> None:
    """Trailers were kept in memory, twenty times as large as they were sent, without a bound and before any key."""
    served = serve_scripted()
    assert num_sent_until_cut(connected(served, begin), piece) < 4 * 2**20
    assert seconds_until_answered(served) < SOON_S


def num_sent_until_cut(one: socket.socket, piece: bytes, most: int = 12 * 2**20) -> int:
    """Bytes that are taken before the connection is closed, if it is."""
    sent = 0
    with suppress(OSError):
        while sent < most:
            one.sendall(piece)
            sent += len(piece)
            time.sleep(0.01)
    return sent


def test_a_trailer_is_no_header(serve_scripted: ServeScripted) -> None:
    """Small ones are taken and dropped: the connection goes on."""
    served = serve_scripted()
    said = b'{"model": "%s", "messages": [{"role": "user", "content": "Hi"}]}' % MODEL.encode()
    body = b"%x\r\n%s\r\n0\r\nx-episode-id: mine\r\nx-api-key: k\r\n\r\n" % (len(said), said)
    one = connected(served, CHUNKED + body)
    one.settimeout(10)
    answer = one.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"x-episode-id: mine" not in answer
    one.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    assert b"HTTP/1.1 200" in read_to_the_end(one)


OFFER = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAA\r\n"


@pytest.mark.parametrize("cut", [None, 1, 200, -1], ids=["whole", "one byte first", "in the head", "last byte alone"])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_who_offers_another_protocol_is_answered_in_this_one(
    serve_scripted: ServeScripted, is_chunked: bool, cut: int | None
) -> None:
    """As Java's client does: the body of its first request was lost, which was refused as no JSON object."""
    served = serve_scripted()
    said = b'{"model": "%s", "messages": [{"role": "user", "content": "Hi"}]}' % MODEL.encode()
    plain = HALF + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(said), said)
    request = CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(said), said) if is_chunked else plain
    request = request.replace(b"\r\n", b"\r\n" + OFFER, 1)
    with connected(served, request[:cut]) as one:
        time.sleep(0.05)
        one.sendall(request[cut:] if cut else b"")
        assert one.recv(65536).startswith(b"HTTP/1.1 200")
        one.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n%s\r\n" % OFFER)
        assert one.recv(65536).startswith(b"HTTP/1.1 200")
        one.sendall(plain.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
        assert read_to_the_end(one).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", HALF + b"no colon\r\n\r\n"], ids=repr
)
def test_what_cannot_be_read_is_refused_in_openais_form(serve_scripted: ServeScripted, sent: bytes) -> None:
    with connected(serve_scripted(), sent) as one:
        answer = read_to_the_end(one)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"no HTTP request" in answer.partition(b'{"error":{"message":')[2]
