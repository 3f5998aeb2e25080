"""Reading ranges over HTTP: credentials, proxies and certificates of the environment, redirects, kept connections, slow answers."""

import base64
import shutil
import ssl
import subprocess
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from servers import program
from shards import write_shard
from simplejpeg import encode_jpeg

from ssl_locat.data.images.decode import decode_image, find_image, find_label
from ssl_locat.data.shards import pack
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.tar import RawSample, members
from ssl_locat.data.stores import web as web_module
from ssl_locat.data.stores.cache import CachedStore
from ssl_locat.data.stores.remote import Http
from ssl_locat.data.stores.store import Store
from ssl_locat.data.stores.web import Web
from ssl_locat.data.stream.ordered import Unread, read_in_order
from ssl_locat.data.stream.plan import choose_plan
from ssl_locat.data.stream.stream import TrainStream
from ssl_locat.errors import Outage

CONTENT = bytes(range(256)) * 1000


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@contextmanager
def server(answer=None, tls: ssl.SSLContext | None = None):
    """(URL, list of (path, headers) so far, list of connections) of a server of ranges of CONTENT; `answer(handler)` may do it its way."""
    seen, connections = [], []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self):
            connections.append(self)
            super().setup()

        def do_GET(self):
            seen.append((self.path, self.headers))
            (answer or send_range)(self)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    if tls:
        http.socket = tls.wrap_socket(http.socket, server_side=True)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http{'s' * bool(tls)}://127.0.0.1:{http.server_port}", seen, connections
    finally:
        http.shutdown()
        http.server_close()


def send_range(handler) -> None:
    start, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    body = CONTENT[start : end + 1]
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{end}/{len(CONTENT)}")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_one_connection_serves_one_range_after_another():
    with server() as (url, seen, connections):
        web = Http(5)
        for start in (0, 70_000, 3):
            assert web.read(f"{url}/a b.tar?x=ü", start, start + 100_001)[0] == CONTENT[start : start + 100_001]
        assert len(connections) == 1 and {path for path, _ in seen} == {"/a%20b.tar?x=%C3%BC"}


def test_a_connection_that_the_server_ended_is_replaced():
    def once(handler):
        send_range(handler)
        handler.close_connection = True  # without saying so

    with server(once) as (url, _, connections):
        web = Http(5)
        for _ in range(5):
            assert web.read(f"{url}/a", 5, 10)[0] == CONTENT[5:10]
        assert len(connections) == 5


def test_chunked_answers_are_read_whole():
    def chunked(handler):
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-9/{len(CONTENT)}")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"4\r\n" + CONTENT[:4] + b"\r\n6\r\n" + CONTENT[4:10] + b"\r\n0\r\n\r\n")

    with server(chunked) as (url, _, connections):
        web = Http(5)
        assert [web.read(f"{url}/a", 0, 10)[0] for _ in range(2)] == [CONTENT[:10]] * 2
        assert len(connections) == 1


def test_credentials_come_from_the_url_or_netrc(tmp_path):
    with server() as (url, seen, _):
        Http(5).read(url.replace("://", "://me:se%20cret@"), 0, 9)
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login you password word\n")
        Http(5).read(url, 0, 9)
        assert [headers["Authorization"] for _, headers in seen] == [basic("me:se cret"), basic("you:word")]


def test_redirects_are_followed_and_credentials_stay_behind():
    with server() as (storage, behind, _):

        def send_away(handler):
            handler.send_response(302)
            handler.send_header("Location", f"{storage}/signed?key=1")
            handler.send_header("Content-Length", "4")
            handler.end_headers()
            handler.wfile.write(b"away")

        with server(send_away) as (url, seen, connections):
            web = Web(5)
            for _ in range(3):
                with web.get(f"{url}/file", {"Authorization": "Bearer token", "Range": "bytes=7-99"}) as answer:
                    assert answer.read(100) == CONTENT[7:100]
            assert len(connections) == 1 and all(headers["Authorization"] == "Bearer token" for _, headers in seen)
        assert [(path, headers["Authorization"]) for path, headers in behind] == [("/signed?key=1", None)] * 3


def test_a_circle_of_redirects_ends():
    def around(handler):
        handler.send_response(302)
        handler.send_header("Location", "/again")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with server(around) as (url, seen, _), pytest.raises(ConnectionError, match="redirected more than"):
        Http(5).read(url, 0, 9)
    assert len(seen) == 10


def test_proxies_of_the_environment_are_used(monkeypatch):
    with server() as (proxy, seen, _):
        monkeypatch.setenv("http_proxy", proxy.replace("://", "://user:word@"))
        assert Http(5).read("http://store.example/shards/0.tar", 0, 9)[0] == CONTENT[:9]
        assert seen[0][0] == "http://store.example/shards/0.tar" and seen[0][1]["Proxy-Authorization"] == basic("user:word")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with server() as (url, direct, _):
            Http(5).read(f"{url}/0.tar", 0, 9)
            assert [path for path, _ in direct] == ["/0.tar"] and len(seen) == 1


def test_certificates_are_checked(tmp_path, monkeypatch):
    if not program("openssl"):
        pytest.skip("openssl is not installed: no certificate to test with")
    paths = [str(tmp_path / name) for name in ("key.pem", "cert.pem")]
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 -keyout"
    subprocess.run([*command.split(), paths[0], "-out", paths[1]], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(paths[1], paths[0])
    with server(tls=context) as (url, _, connections):
        with pytest.raises(ssl.SSLCertVerificationError):
            Http(5).read(url, 0, 9)
        monkeypatch.setenv("SSL_CERT_FILE", paths[1])
        web = Http(5)
        assert [web.read(url, 0, len(CONTENT))[0] for _ in range(2)] == [CONTENT] * 2
        assert len(connections) == 1


def test_bytes_that_drip_end_in_time(monkeypatch):
    """By a clock that goes on by a second with each byte: six times the timeout after the beginning, it is enough."""
    seconds, looked = 0, threading.Semaphore(0)

    def monotonic() -> float:
        looked.release()
        return seconds

    def drip(handler):
        nonlocal seconds
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-99/{len(CONTENT)}")
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        for byte in CONTENT[:100]:
            seconds += 1
            handler.wfile.write(bytes([byte]))
            if not looked.acquire(timeout=10):  # nobody reads any more
                return

    monkeypatch.setattr(web_module, "time", SimpleNamespace(monotonic=monotonic))
    with server(drip) as (url, _, _), pytest.raises(TimeoutError, match="too slow"):
        Http(5).read(url, 0, 100)
    assert 31 <= seconds <= 33  # the server may be a byte ahead


def test_a_longer_answer_than_asked_for_is_not_taken():
    def endless(handler):
        handler.send_response(206)
        handler.send_header("Content-Range", "bytes 0-9/100")
        handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()

    with server(endless) as (url, _, _), pytest.raises(ConnectionError, match="instead of 10"):
        Http(5).read(url, 0, 10)


def test_what_is_no_web_server_is_an_outage():
    def nonsense(handler):
        handler.wfile.write(b"220 mail.example ESMTP\r\n")
        handler.close_connection = True

    with server(nonsense) as (url, _, _), pytest.raises(Outage, match="BadStatusLine"):
        Store(0.3, 1).read(f"{url}/a.tar", 0, 9)


def test_no_more_is_kept_than_was_asked_for():
    """An answer in chunks has no length: what is more than asked for is dropped as it comes, and the connection with it."""
    sent = []

    def endless(handler):
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-9/{len(CONTENT)}")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        with suppress(OSError):
            while len(sent) < 2000:
                handler.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                sent.append(1)

    with (
        server(endless) as (url, _, _),
        Web(5).get(url, {}) as answer,
        pytest.raises(ConnectionError, match="more than the 10 bytes"),
    ):
        answer.read(10)
    assert len(sent) < 200


@pytest.mark.parametrize("wrong", ["404", "html as 206", "206 without a range", "wrong bytes"])
def test_a_single_wrong_answer_costs_no_sample(tmp_path, monkeypatch, wrong):
    """Asked for again, the store tells the truth."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = write_shard(tmp_path / "a.tar", [f"{i:03d}" for i in range(6)]).read_bytes()
    lies, lying = [], [False]

    def answer(handler):
        start, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        if not handler.path.endswith("a.tar"):
            return handler.send_error(404)
        lie = end > start and len(lies) < 1 and lying[0]
        status, body = 206, content[start : end + 1]
        if lie:
            lies.append(wrong)
            status = 404 if wrong == "404" else 206
            body = (b"<html>" * 10_000)[: len(body)] if wrong != "404" else b""
        handler.send_response(status)
        if not (lie and wrong in ("404", "206 without a range")):
            handler.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(content)}")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    with server(answer) as (url, _, _):
        for phase in ("scan", "read"):
            lies.clear()
            lying[0] = phase == "scan"
            dataset = open_dataset(f"{url}/a.tar", store=Store(20, 5), cache_dir=tmp_path / phase)
            lying[0] = True
            assert [sample.key for sample in dataset.read(0, 6) if isinstance(sample, RawSample)] == [
                f"{i:03d}" for i in range(6)
            ]
            assert lies == [wrong]


# --- payloads -------------------------------------------------------------------------------------------------------------


def pictures(count: int, broken: set[int] = frozenset()) -> list[tuple[str, dict[str, bytes]]]:
    rng = np.random.default_rng(0)
    coded = [encode_jpeg(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(count)]
    return [(f"{i:03d}", {"jpg": data[:200] if i in broken else data}) for i, data in enumerate(coded)]


def decoded(raw: RawSample, seed: int) -> tuple[str, int, int]:
    return raw.key, int(decode_image(find_image(raw.members)).sum()), seed


def serve_with_lies(content: bytes, lies: list):
    """Answers ranges of a shard; while `lies` holds something, the next chunk is sent with other payloads behind its right headers."""
    headers = [m.data - 512 for m in members(lambda at, n: content[at : at + n], 0, len(content)) if m.name]

    def answer(handler):
        if not handler.path.endswith("a.tar"):
            return handler.send_error(404)
        start, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        body = bytearray(content[start : end + 1])
        if lies:
            lies.pop()
            spoilt = bytearray(b"<html>not now</html>" * (len(content) // 20 + 1))[: len(content)]
            for at in headers:
                spoilt[at : at + 512] = content[at : at + 512]
            body = spoilt[start : end + 1]
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        handler.send_header("ETag", '"one"')
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return server(answer)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_wrong_payloads_behind_right_headers_cost_no_sample(tmp_path, monkeypatch, workers, cached):
    """A cache on the way sends other bytes once: the run sees what it sees of a truthful store, and quarantines nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a.tar"
    pack.write_shard(path, pictures(48))
    lies: list = []
    with serve_with_lies(path.read_bytes(), lies) as (url, _, _):
        store = CachedStore(tmp_path / "pages", 1 << 30, 20) if cached else Store(20, 5)
        dataset = open_dataset(f"{url}/a.tar", store=store)
        plan = choose_plan([dataset], [1.0], 0, 16)
        local = open_dataset(str(path))
        options = {"start_samples": 0, "global_batch_size": 16, "quarantine_path": tmp_path / "quarantine.jsonl"}
        expected = []
        with TrainStream([local], plan, decoded, list, **options) as stream:
            for batch in islice(stream, 3):
                expected += batch.payload
        shutil.rmtree(tmp_path / "pages", ignore_errors=True)  # which indexing filled
        lies.append("once")
        with TrainStream([dataset], plan, decoded, list, workers=workers, **options) as stream:
            found = [sample for batch in islice(stream, 3) for sample in batch.payload]
        assert not lies, "the lie was told"
        assert found == expected and not (tmp_path / "quarantine.jsonl").exists()
        if cached:  # what the lie left in the cache is gone as well
            with TrainStream([dataset], plan, decoded, list, workers=workers, **options) as stream:
                assert [sample for batch in islice(stream, 3) for sample in batch.payload] == expected
        shutil.rmtree(tmp_path / "pages", ignore_errors=True)
        lies.append("once")
        kept = list(read_in_order(dataset, np.arange(48), decoded, list, batch_size=48, workers=workers))
        assert not any(isinstance(item, Unread) for batch in kept for item in batch) and not lies


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_sample_costs_one_small_request_more(tmp_path, monkeypatch, workers):
    """Its own bytes are asked for again, not those of the chunk around it; what lacks a member is not asked for at all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pack.write_shard(tmp_path / "a.tar", pictures(96, broken={7, 40, 41}))
    with serve_with_lies((tmp_path / "a.tar").read_bytes(), []) as (url, seen, _):
        dataset = open_dataset(f"{url}/a.tar", store=Store(20, 5))

        def ranges(prepare) -> list[int]:
            """Bytes of each request for one pass."""
            begun = len(seen)
            options = {"batch_size": 32, "workers": workers}
            for _ in read_in_order(dataset, np.arange(96), prepare, list, **options):
                pass
            limits = [headers["Range"].removeprefix("bytes=").split("-") for _, headers in seen[begun:]]
            return sorted(int(end) + 1 - int(start) for start, end in limits)

        whole = ranges(lambda raw, seed: raw.key)
        assert ranges(decoded) == sorted([*whole, *(dataset._block(0)[0][i + 1] - dataset._block(0)[0][i] for i in (7, 40, 41))])
        assert ranges(lambda raw, seed: find_label(raw.members)) == whole
