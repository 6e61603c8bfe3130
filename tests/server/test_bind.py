"""Where a server may listen."""

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from memphi.errors import RequestError
from memphi.server.bind import check_address, check_keys, check_names, check_tls, is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_machine_needs_no_key(host):
    assert is_loopback(host)
    check_address(host, (), insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "8.8.8.8", "", "0", "no such host", "x" * 300])
def test_elsewhere_needs_a_key_or_a_person_who_insists(host):
    with pytest.raises(RequestError, match=r"--api-key.*--insecure"):
        check_address(host, (), insecure=False)
    check_address(host, ("a key",), insecure=False)
    check_address(host, (), insecure=True)


@pytest.mark.parametrize("key", ["", " ", "two words", "tab\tinside", "new\nline", "clé", "trailing "])
def test_a_key_that_no_client_can_send(key):
    check_keys(("good", "sk-0123456789abcdef+/=_"))
    with pytest.raises(RequestError, match="visible ASCII"):
        check_keys(("good", key))


@pytest.mark.parametrize("name", ["", "http://chat.lan", "chat.lan:8000", "[::1]", "a b", ".lan", "chat.lan/"])
def test_a_name_that_no_host_header_has(name):
    check_names(("chat.lan", "x", "192.168.1.4", "fd00::1"))
    with pytest.raises(RequestError, match="--allowed-host"):
        check_names((name,))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of PEM files: a certificate with its key, another key, the key encrypted, and no PEM."""
    folder = tmp_path_factory.mktemp("tls")
    issued, other = (trustme.CA().issue_cert("memphi.test") for _ in range(2))
    issued.cert_chain_pems[0].write_to_path(folder / "cert")
    issued.private_key_pem.write_to_path(folder / "key")
    other.private_key_pem.write_to_path(folder / "other")
    key = load_pem_private_key(issued.private_key_pem.bytes(), None)
    encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (folder / "encrypted").write_bytes(encrypted)
    (folder / "text").write_text("no PEM")
    return folder


def test_tls_files_that_belong_together(files):
    check_tls(None, None)
    check_tls(str(files / "cert"), str(files / "key"))


@pytest.mark.parametrize(
    ("certificate", "key", "reason"),
    [
        ("cert", None, "go together"),
        (None, "key", "go together"),
        ("cert", "other", "cannot be used for TLS: .*MISMATCH"),
        ("cert", "nowhere", "No such file"),
        ("text", "key", "cannot be used for TLS"),
        ("cert", "encrypted", "without a password"),
    ],
)
def test_tls_files_that_do_not(files, certificate, key, reason):
    with pytest.raises(RequestError, match=reason):
        check_tls(certificate and str(files / certificate), key and str(files / key))
