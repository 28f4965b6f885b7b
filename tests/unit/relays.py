"""Proxies and servers of a few lines, which do on the wire what a library would not."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

# What is done with the bytes of a response: what to send instead. Fewer bytes are the last ones before a reset.
Change = Callable[[bytes], bytes]
T = TypeVar("T", bound="Listener")
_KEY_USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


class Listener:
    """A server on a free port of the loopback interface, with a thread for each of its connections."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._open: list[socket.socket] = []

    def __enter__(self: T) -> T:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        # Shut down first: closing alone would not wake the thread that accepts.
        for sock in (self._listening, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def serve(self, client: socket.socket) -> None:
        """Do with one connection what this server is for."""
        raise NotImplementedError

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listening.accept()[0]
                self._open.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # ValueError: the socket was closed at the end of the test.
        with contextlib.suppress(OSError, ValueError), client:
            self.serve(client)


class RawServer(Listener):
    """
    Responds to each request with the same bytes, and hangs up.

    :param response: the bytes, from the status line on.
    :ivar requests: the heads of the requests so far.
    """

    def __init__(self, response: bytes = b"") -> None:
        super().__init__()
        self.response = response
        self.requests: list[bytes] = []

    def serve(self, client: socket.socket) -> None:
        head, _ = read_head(client)
        self.requests.append(head)
        client.sendall(self.response)
        client.shutdown(socket.SHUT_WR)
        # Until the client has read all of it: a close with unread bytes would reset the connection.
        client.settimeout(2)
        while client.recv(65536):
            pass


class Relay(Listener):
    """
    Passes bytes on to a server, and the response back as long as nothing goes wrong.

    :param port: the server's.
    :param change: what is done with each piece of the response.
    :ivar connections: how many came.
    """

    def __init__(self, port: int, change: Change = lambda piece: piece) -> None:
        super().__init__()
        self._port = port
        self._change = change
        self.connections = 0

    def serve(self, client: socket.socket) -> None:
        self.connections += 1
        self.pass_on(client, b"")

    def pass_on(self, client: socket.socket, first: bytes) -> None:
        """Pass both directions on until one ends."""
        with socket.create_connection(("127.0.0.1", self._port)) as server:
            server.sendall(first)
            # In one thread: a socket that another one reads would stay open after its close.
            while True:
                ready, _, _ = select.select([client, server], [], [])
                for sock in ready:
                    piece = sock.recv(65536)
                    if not piece:
                        return
                    changed = self._change(piece) if sock is server else piece
                    (client if sock is server else server).sendall(changed)
                    if len(changed) < len(piece):
                        reset(client)
                        return


class ForwardProxy(Relay):
    """A proxy for http: takes requests for absolute URLs. ``heads`` are those of the requests so far."""

    def __init__(self, port: int, change: Change = lambda piece: piece) -> None:
        super().__init__(port, change)
        self.heads: list[bytes] = []

    def serve(self, client: socket.socket) -> None:
        self.connections += 1
        head, rest = read_head(client)
        self.heads.append(head)
        line, _, headers = head.partition(b"\r\n")
        method, url, version = line.split(b" ")
        path = b"/" + url.split(b"/", 3)[3]
        self.pass_on(client, b"%b %b %b\r\n%b%b" % (method, path, version, headers, rest))


class TunnelProxy(ForwardProxy):
    """
    A proxy for https: opens a tunnel with ``CONNECT``.

    :param refusal: the response to each ``CONNECT``, instead of a tunnel.
    """

    def __init__(self, port: int, change: Change = lambda piece: piece, *, refusal: bytes = b"") -> None:
        super().__init__(port, change)
        self._refusal = refusal

    def serve(self, client: socket.socket) -> None:
        self.connections += 1
        head, rest = read_head(client)
        self.heads.append(head)
        if self._refusal:
            client.sendall(self._refusal)
            return
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        self.pass_on(client, rest)


class SocksProxy(Relay):
    """
    A proxy for anything: opens a connection as SOCKS 5 describes (RFC 1928).

    :param refuses: whether it says that the server can't be reached, instead.
    :param takes_password: whether it asks for a user and a password (RFC 1929), and takes any.
    :ivar names: the names of servers that it was asked to look up.
    :ivar passwords: the users and passwords that came.
    """

    def __init__(
        self,
        port: int,
        change: Change = lambda piece: piece,
        *,
        refuses: bool = False,
        takes_password: bool = False,
    ) -> None:
        super().__init__(port, change)
        self._refuses = refuses
        self._takes_password = takes_password
        self.names: list[bytes] = []
        self.passwords: list[tuple[bytes, bytes]] = []

    def serve(self, client: socket.socket) -> None:
        self.connections += 1
        # The version and the ways to log in that the client knows; then where it wants to go. Each comes in one piece.
        client.recv(262)
        client.sendall(b"\x05\x02" if self._takes_password else b"\x05\x00")
        if self._takes_password:
            login = client.recv(513)
            user, rest = login[2 : 2 + login[1]], login[2 + login[1] :]
            self.passwords.append((user, rest[1 : 1 + rest[0]]))
            client.sendall(b"\x01\x00")
        wanted = client.recv(262)
        if wanted[3:4] == b"\x03":
            self.names.append(wanted[5 : 5 + wanted[4]])
        client.sendall(b"\x05%b\x00\x01\x00\x00\x00\x00\x00\x00" % (b"\x05" if self._refuses else b"\x00"))
        if not self._refuses:
            self.pass_on(client, b"")


def read_head(client: socket.socket) -> tuple[bytes, bytes]:
    """Return a request's line and headers, and the beginning of its body."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = client.recv(65536)
        if not piece:
            break
        received += piece
    head, separator, rest = received.partition(b"\r\n\r\n")
    return head + separator, rest


def reset(sock: socket.socket) -> None:
    """Close a connection so that the other side gets a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def make_certificate(folder: Path, *names: str, names_issuer: bool = True) -> tuple[ssl.SSLContext, Path]:
    """
    Make a certificate that signs itself, or one of an authority.

    :param folder: where its file goes.
    :param names: the host names that it is for, beside 127.0.0.1.
    :param names_issuer: whether it signs itself; else an authority does, of which it has no Authority Key Identifier.
    :return: a server's TLS settings, and the file that a client has to trust.
    """
    key, authority_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    subjects: list[x509.GeneralName] = [x509.IPAddress(ipaddress.IPv4Address("127.0.0.1")), *map(x509.DNSName, names)]
    alternatives = x509.SubjectAlternativeName(subjects)
    if names_issuer:
        certificate = trusted = _certificate("stand-in", key, "stand-in", key, alternatives, _issuer(key))
    else:
        certificate = _certificate("stand-in", key, "authority", authority_key, alternatives, is_authority=False)
        signs = x509.KeyUsage(**dict.fromkeys(_KEY_USES, False), key_cert_sign=True)
        trusted = _certificate("authority", authority_key, "authority", authority_key, _issuer(authority_key), signs)
    key_file, certificate_file, bundle = (folder / f"{name}.pem" for name in ("key", "certificate", "bundle"))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    bundle.write_bytes(trusted.public_bytes(serialization.Encoding.PEM))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate_file, key_file)
    return server, bundle


def _issuer(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *extensions: x509.ExtensionType,
    is_authority: bool = True,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())
