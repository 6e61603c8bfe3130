"""Fetching from URLs that nobody vouches for, against a TLS server of its own and name servers that lie."""

import asyncio
import ssl
import threading

import pytest
import trustme
from starlette.testclient import TestClient

from memphi.errors import MediaError, RequestError
from memphi.server.app import make_app
from memphi.server.fetch import AT_ONCE, REDIRECTS, Fetcher, HostRule, connector, is_public, resolver
from memphi.server.settings import ServerSettings
from tests.server.fakes import FakeEngine

PUBLIC = "93.184.216.34"
RULES = (
    "images.test",
    "*.cdn.test",
    "port.test:8443",
    PUBLIC,
    "[2606:4700::1111]",
    "2130706433",
    "0x7f.1",
    "localhost",
)
PICTURE = b"\x89PNG\r\n\x1a\n and so on"
CERTIFIED = ("images.test", "a.cdn.test", "port.test", "0x7f.1", "localhost", PUBLIC, "2606:4700::1111")


@pytest.fixture(scope="session")
def authority():
    return trustme.CA()


@pytest.fixture(scope="session")
def theirs(authority):
    """The server's side of TLS, with a certificate for each of its names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*CERTIFIED).configure_cert(context)
    return context


@pytest.fixture
def web(authority, theirs):
    return Web(authority, theirs)


def answer(content=PICTURE, status=200, **headers):
    """A response as bytes; its length is told unless headers say otherwise."""
    told = {"Content-Length": len(content), **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = [f"HTTP/1.1 {status} So", *(f"{name}: {value}" for name, value in told.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


def moved(url, status=302):
    return answer(b"", status, Location=url)


class Web:
    """A server of everything, on one local port, and a name server; both note who asked."""

    def __init__(self, authority, theirs):
        self.pages = {"/": answer()}
        """By target: a response, or pieces of one and times to wait in between."""
        self.names = {}
        """Addresses by name, or a function that gives them anew each time; all other names lead to PUBLIC."""
        self.asked, self.connected, self.requests = [], [], []
        self.open = self.most_open = 0
        self.dead = ()
        """Addresses that nobody answers at."""
        self._theirs = theirs
        self._trust = ssl.create_default_context()
        authority.configure_trust(self._trust)

    def fetch(self, *urls, limit_bytes=1000, seconds=30.0, trust=None):
        """What is fetched, by URL."""
        return asyncio.run(self._fetch(urls, limit_bytes, seconds, trust or self._trust))

    async def _fetch(self, urls, limit_bytes, seconds, trust):
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._theirs)
        port = server.sockets[0].getsockname()[1]
        real = connector(trust)

        async def connect(address, wanted_port, host):
            self.connected.append((address, wanted_port, host))
            if address in self.dead:
                raise OSError("nobody is there")
            return await real("127.0.0.1", port, host)

        rules = tuple(map(HostRule.parse, RULES))
        fetcher = Fetcher(rules, limit_bytes, seconds, resolve=self._resolve, connect=connect)
        try:
            return await fetcher.fetch(urls)
        finally:
            await asyncio.wait_for(self._all_closed(), 20)
            server.close()

    async def _all_closed(self):
        while self.open:
            await asyncio.sleep(0.005)

    async def _resolve(self, host, port):
        self.asked.append(host)
        found = self.names.get(host, [PUBLIC])
        if callable(found):
            found = found()
        if isinstance(found, Exception):
            raise found
        return found

    async def _serve(self, reader, writer):
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(head.decode())
            page = self.pages.get(head.split()[1].decode(), answer(b"", 404))
            for piece in [page] if isinstance(page, bytes) else page:
                if isinstance(piece, bytes):
                    writer.write(piece)
                    await writer.drain()
                elif await self._is_left(reader, piece):
                    break
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _is_left(self, reader, seconds):
        """Wait; whether the client has hung up meanwhile."""
        try:
            await asyncio.wait_for(reader.read(), seconds)
        except TimeoutError:
            return False
        return True

    def refusal(self, url, **limits):
        """Why a URL is not fetched."""
        (refused,) = self.fetch(url, **limits).values()
        assert isinstance(refused, MediaError), refused
        assert "\n" not in str(refused)
        return str(refused)


def test_what_a_url_holds(web):
    web.pages["/a/b.png?size=2"] = answer()
    url = "https://images.test/a/b.png?size=2#part"
    assert web.fetch(url) == {url: PICTURE}
    assert web.connected == [(PUBLIC, 443, "images.test")]
    (request,) = web.requests
    assert request.startswith("GET /a/b.png?size=2 HTTP/1.1\r\nHost: images.test\r\n")
    assert not {"cookie", "authorization", "referer"} & {
        line.partition(":")[0].lower() for line in request.split("\r\n")
    }


@pytest.mark.parametrize(
    ("url", "connected"),
    [
        ("https://IMAGES.test", (PUBLIC, 443, "images.test")),
        ("HTTPS://images.test:443/", (PUBLIC, 443, "images.test")),
        ("https://images.test:/", (PUBLIC, 443, "images.test")),
        ("https://a.cdn.test/", (PUBLIC, 443, "a.cdn.test")),
        ("https://port.test:8443/", (PUBLIC, 8443, "port.test")),
        (f"https://{PUBLIC}/", (PUBLIC, 443, PUBLIC)),
        ("https://[2606:4700::1111]/", (PUBLIC, 443, "2606:4700::1111")),
    ],
)
def test_hosts_that_are_named(web, url, connected):
    assert web.fetch(url) == {url: PICTURE}
    assert web.connected == [connected]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://images.test/", "only https"),
        ("file:///etc/passwd", "only https"),
        ("ftp://images.test/", "only https"),
        ("data:image/png;base64,AAAA", "only https"),
        ("gopher://images.test/", "only https"),
        ("//images.test/", "only https"),
        ("images.test", "only https"),
        ("https:images.test", "does not fetch from"),
        ("https:///images.test/", "does not fetch from"),
        ("https://", "does not fetch from"),
        ("https://evil.test/", "does not fetch from evil.test on port 443"),
        ("https://cdn.test/", "does not fetch from"),
        ("https://evilcdn.test/", "does not fetch from"),
        ("https://.cdn.test/", "does not fetch from"),
        ("https://a..cdn.test/", "does not fetch from"),
        ("https://images.test.evil.test/", "does not fetch from"),
        ("https://images.test./", "does not fetch from"),
        ("https://images.test:8443/", "on port 8443"),
        ("https://port.test/", "on port 443"),
        ("https://images.test:0/", "on port 0"),
        ("https://images.test:99999/", "is no URL"),
        ("https://images.test:4x3/", "is no URL"),
        ("https://[images.test/", "is no URL"),
        ("https://[::1/", "is no URL"),
        ("https://[fe80::1%25eth0]/", "does not fetch from"),
        ("https://user@images.test/", "user name or password"),
        ("https://user:word@images.test/", "user name or password"),
        ("https://@images.test/", "user name or password"),
        ("https://images.test@evil.test/", "user name or password"),
        ("https://evil.test#@images.test/", "does not fetch from evil.test"),
        ("https://evil.test?@images.test/", "does not fetch from evil.test"),
        ("https://evil.test\\@images.test/", "characters that no URL has"),
        ("https://images.test\\.evil.test/", "characters that no URL has"),
        ("https://images.test%2eevil.test/", "does not fetch from"),
        ("https://images.test%00.evil.test/", "does not fetch from"),
        ("https://images.test/ HTTP/1.1\r\nX: y", "characters that no URL has"),
        ("https://images.test/\n", "characters that no URL has"),
        ("\thttps://images.test/", "characters that no URL has"),
        ("https://im\tages.test/", "characters that no URL has"),
        ("https://bücher.test/", "as xn--"),
        ("https://images。test/", "as xn--"),
        ("https://ⓘmages.test/", "as xn--"),
        ("https://images.test/ü.png", "percent-encoded"),
        ("https://127.0.0.1/", "does not fetch from"),
        ("https://[::1]/", "does not fetch from"),
        ("https://[::ffff:127.0.0.1]/", "does not fetch from"),
        ("https://0177.0.0.1/", "does not fetch from"),
        ("https://017700000001/", "does not fetch from"),
        ("https://127.1/", "does not fetch from"),
        ("", "characters that no URL has"),
    ],
)
def test_nothing_is_asked_or_connected_to_for_any_other_url(web, url, reason):
    assert reason in web.refusal(url)
    assert web.asked == web.connected == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "localhost", "images.test"])
def test_a_name_that_is_allowed_and_leads_inside(web, host):
    web.names[host] = ["127.0.0.1"]
    assert "does not lead to the public internet" in web.refusal(f"https://{host}/")
    assert web.connected == []


NOT_PUBLIC = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.8",
    "192.0.0.170",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:93.184.216.34",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::5db8:d822",
    "64:ff9b:1::a00:1",
    "100::1",
    "2001::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:5db8:d822::",
    "3fff::1",
    "4000::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "2606:4700::1111%eth0",
    "fec0::1",
    "ff02::1",
    "127.1",
    "2130706433",
    "0177.0.0.1",
    "",
    "images.test",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_never_connected_to(web, address):
    assert not is_public(address)
    for names in ([address], [PUBLIC, address], [address, PUBLIC]):
        web.names["images.test"] = names
        assert "public internet" in web.refusal("https://images.test/")
    assert web.connected == []


@pytest.mark.parametrize(
    "address",
    [PUBLIC, "1.1.1.1", "172.15.0.1", "172.32.0.1", "192.0.1.1", "223.255.255.254", "2606:4700::1111", "2a00::1"],
)
def test_addresses_of_the_public_internet(address):
    assert is_public(address)


@pytest.mark.parametrize("found", [[], OSError("no such name")])
def test_a_name_that_leads_nowhere(web, found):
    web.names["images.test"] = found
    assert "images.test" in web.refusal("https://images.test/")


def test_a_name_is_looked_up_once_and_what_was_checked_is_connected_to(web):
    answers = iter([[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]])
    web.names["images.test"] = lambda: next(answers)
    assert web.fetch("https://images.test/") == {"https://images.test/": PICTURE}
    assert web.asked == ["images.test"]
    assert web.connected == [(PUBLIC, 443, "images.test")]


def test_a_name_that_changes_its_mind_for_a_redirect(web):
    answers = iter([[PUBLIC], ["169.254.169.254"]])
    web.names["images.test"] = lambda: next(answers)
    web.pages["/"] = moved("/again")
    assert "public internet" in web.refusal("https://images.test/")
    assert web.connected == [(PUBLIC, 443, "images.test")]


def test_an_address_that_does_not_answer_gives_way_to_the_next(web):
    web.names["images.test"] = ["2606:4700::1111", PUBLIC]
    web.dead = ("2606:4700::1111",)
    assert web.fetch("https://images.test/") == {"https://images.test/": PICTURE}
    web.dead = ("2606:4700::1111", PUBLIC)
    assert "nobody is there" in web.refusal("https://images.test/")


def test_a_certificate_of_another_name(web):
    assert "certificate" in web.refusal("https://b.cdn.test/").lower()
    assert web.requests == []


def test_a_certificate_that_nobody_vouches_for(web):
    assert "certificate verify failed" in web.refusal("https://images.test/", trust=ssl.create_default_context())
    assert web.requests == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "target", ["there?x=1", "/a/there?x=1", "https://a.cdn.test/a/there?x=1", "//a.cdn.test/a/there?x=1"]
)
def test_redirects_are_followed(web, status, target):
    web.pages |= {"/a/here": moved(target, status), "/a/there?x=1": answer()}
    assert web.fetch("https://images.test/a/here") == {"https://images.test/a/here": PICTURE}
    assert web.asked == ["images.test", "a.cdn.test" if "cdn" in target else "images.test"]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://images.test/", "only https"),
        ("file:///etc/passwd", "only https"),
        ("data:image/png;base64,AAAA", "only https"),
        ("https://evil.test/", "does not fetch from evil.test"),
        ("//evil.test/", "does not fetch from evil.test"),
        ("https://127.0.0.1/", "does not fetch from 127.0.0.1"),
        ("https://images.test:22/", "on port 22"),
        ("https://user:word@images.test/", "user name or password"),
        ("https://[broken/", "is no URL"),
        ("https://b\xfccher.test/", "as xn--"),
        ("/a b", "characters that no URL has"),
        ("", "characters that no URL has"),
    ],
)
def test_redirects_are_checked_like_any_url(web, target, reason):
    web.pages["/"] = moved(target)
    assert reason in web.refusal("https://images.test/")
    assert {host for *_, host in web.connected} == {"images.test"}


def test_redirects_that_never_end(web):
    web.pages["/"] = moved("/")
    assert f"more than {REDIRECTS} times" in web.refusal("https://images.test/")
    assert len(web.requests) == REDIRECTS + 1


def test_as_many_redirects_as_are_followed(web):
    web.pages |= {f"/{number}": moved(f"/{number + 1}") for number in range(REDIRECTS)} | {f"/{REDIRECTS}": answer()}
    assert web.fetch("https://images.test/0") == {"https://images.test/0": PICTURE}


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 401, 403, 404, 407, 500, 503])
def test_any_other_status(web, status):
    web.pages["/"] = answer(b"", status, Content_Length=None if status in (204, 304) else 0)
    assert f"images.test answered {status}" in web.refusal("https://images.test/")


@pytest.mark.parametrize(
    "page",
    [
        answer(bytes(1000)),
        answer(bytes(1000), Content_Length=None, Connection="close"),
        answer(b"3e8\r\n" + bytes(1000) + b"\r\n0\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked"),
        b"HTTP/1.1 103 Early\r\n\r\n" + answer(bytes(1000)),
        b"HTTP/1.0 200 Old\r\n\r\n" + bytes(1000),
    ],
)
def test_as_many_bytes_as_are_taken(web, page):
    web.pages["/"] = page
    assert web.fetch("https://images.test/") == {"https://images.test/": bytes(1000)}
    assert "999 bytes" in web.refusal("https://images.test/", limit_bytes=999)


def test_a_length_that_is_too_large_is_not_waited_for(web):
    web.pages["/"] = [answer(b"x", Content_Length=10**12), 60.0]
    assert "1000 bytes" in web.refusal("https://images.test/")


def test_bytes_are_counted_over_all_urls_of_a_request(web):
    web.pages |= {"/1": answer(bytes(600)), "/2": [0.1, answer(bytes(600))]}
    first, second = web.fetch("https://images.test/1", "https://images.test/2").values()
    assert first == bytes(600)
    assert "1000 bytes" in str(second)


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"no HTTP\r\n\r\n",
        b"HTTP/1.1 200 So\r\nContent-Length: 100\r\n\r\nless",
        b"HTTP/1.1 200 So\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 So\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nfour",
        b"HTTP/1.1 200 So\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\n\r\n",
        b"HTTP/1.1 200 So\r\nX: " + b"x" * 200_000,
        b"\x00" * 1000,
    ],
)
def test_what_is_no_whole_response(web, page):
    web.pages["/"] = page
    assert "images.test cannot be fetched from (" in web.refusal("https://images.test/")


def test_what_is_compressed_is_not_unpacked(web):
    web.pages["/"] = answer(Content_Encoding="gzip")
    assert "compressed" in web.refusal("https://images.test/")
    assert "Accept-Encoding: identity" in web.requests[0]


@pytest.mark.parametrize(
    "page",
    [
        [60.0],
        [b"HTTP/1.1 200 So\r\n", *[b"X: y\r\n", 0.05] * 1000],
        [b"HTTP/1.1 200 So\r\n\r\n", *[b"x", 0.05] * 1000],
        [*[b"HTTP/1.1 100 Wait\r\n\r\n", 0.05] * 1000],
    ],
)
def test_what_comes_drop_by_drop_has_a_deadline_in_all(web, page):
    web.pages["/"] = page
    assert "within 0.5 seconds" in web.refusal("https://images.test/", seconds=0.5)


def test_many_urls_are_fetched_a_few_at_a_time_each_once(web):
    urls = [f"https://images.test/{number}" for number in range(3 * AT_ONCE)]
    web.pages |= {f"/{number}": [0.02, answer(b"%d" % number)] for number in range(len(urls))}
    found = web.fetch(*urls, *urls)
    assert found == {url: b"%d" % number for number, url in enumerate(urls)}
    assert len(web.requests) == len(urls)
    assert 1 < web.most_open <= AT_ONCE


def test_one_url_that_fails_leaves_the_others(web):
    good, bad, foreign = "https://images.test/", "https://images.test/nowhere", "https://evil.test/"
    found = web.fetch(good, bad, foreign)
    assert found[good] == PICTURE
    assert "404" in str(found[bad])
    assert "evil.test" in str(found[foreign])


def test_no_proxy_is_asked(web, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert web.fetch("https://images.test/") == {"https://images.test/": PICTURE}


@pytest.mark.parametrize(
    "text",
    ["", "*", "*.", "*.*.test", "a*.test", "https://images.test", "images.test/", "images.test:", "images.test:x",
     "a b", "bücher.test", "images.test.", ".test", "user@images.test", "*.[::1]", "::1"],
)  # fmt: skip
def test_rules_that_name_no_host(text):
    with pytest.raises(RequestError, match="is no host to fetch from"):
        HostRule.parse(text)


def test_cancelling_ends_the_connections(web):
    web.pages["/"] = [60.0]

    async def run():
        task = asyncio.create_task(web._fetch(["https://images.test/"], 1000, 30.0, web._trust))
        while not web.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    asyncio.run(run())


def test_a_defect_ends_the_other_fetches():
    begun, ended = asyncio.Event(), []

    async def look_up(host, port):
        if host == "images.test":
            await begun.wait()
            raise ZeroDivisionError
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(host)

    async def run():
        fetcher = Fetcher((HostRule.parse("*.test"), HostRule.parse("images.test")), 1000, resolve=look_up)
        with pytest.raises(ExceptionGroup) as raised:
            await fetcher.fetch(["https://images.test/", "https://other.test/"])
        assert raised.group_contains(ZeroDivisionError)
        assert ended == ["other.test"]

    asyncio.run(run())


def test_look_ups_that_hang_keep_no_other_work_waiting(monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: go_on.wait(60) and [(None, None, None, "", (PUBLIC, 0))])

    async def run():
        resolve = resolver()
        hanging = [asyncio.create_task(resolve("images.test", 443)) for _ in range(100)]
        try:
            async with asyncio.timeout(30):
                await asyncio.sleep(0)  # Now all of them have begun.
                assert await asyncio.to_thread(lambda: "done") == "done"
        finally:
            go_on.set()
        assert await asyncio.gather(*hanging) == [[PUBLIC]] * 100

    asyncio.run(run())


@pytest.mark.parametrize(
    ("allowed", "reason"), [((), "fetches no URLs"), (("images.test",), "does not fetch from evil.test")]
)
def test_a_request_is_told_which_of_its_urls_is_not_fetched(allowed, reason):
    app = make_app(FakeEngine(), ServerSettings("demo", allow_urls=allowed))
    image = {"type": "input_image", "image_url": "https://evil.test/"}
    with TestClient(app, base_url="http://localhost") as client:
        response = client.post("/v1/responses", json={"input": [{"role": "user", "content": [image]}]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert reason in error["message"]
    assert error["param"] == "input[0].content[0].image_url"


def test_a_server_does_not_start_with_a_rule_that_names_no_host():
    with pytest.raises(RequestError, match="is no host to fetch from"):
        make_app(FakeEngine(), ServerSettings("demo", allow_urls=("https://images.test",)))
