"""What somebody might send to a port of ours, drawn from a seed, and which ports the processes have."""

import random
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack

from engine.movers.cards import Card
from engine.movers.frames import GREETING, LAYOUT, MAGIC, PREFIX, Versions, _sum, frame
from engine.movers.greeting import MOST, OPENING, PROOF, TURNED, greet_blocking, greeting
from engine.movers.words import KINDS

LISTEN = "0A"
PATIENCE_S = 8.0  # a stranger is let go after 5


class Listener:
    """A TCP port that a process of ours listens at; `name` is that of its links, once somebody says it."""

    def __init__(self, pid: int, host: str, port: int):
        self.pid, self.host, self.port, self.name = pid, host, port, ""

    def __repr__(self) -> str:
        return f"{self.host}:{self.port} of {self.pid}"

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), PATIENCE_S)


def listeners(pid: int) -> list[Listener]:
    """The TCP ports where this process listens, as its kernel says."""
    mine, found = set(inodes(pid)), []
    for table, kind in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTEN and inode in mine:
                host, port = local.split(":")
                words = struct.pack(
                    f"={len(host) // 8}I", *(int(host[k : k + 8], 16) for k in range(0, len(host), 8))
                )
                found.append(Listener(pid, socket.inet_ntop(kind, words), int(port, 16)))
    return found


def inodes(pid: int) -> Iterator[str]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            yield target[8:-1]


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident_bytes(pid: int) -> int:
    """Memory of the process."""
    found = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(found.split()[1]) << 10


def recorded(there: Listener, secret: bytes) -> bytes:
    """What a member of the cluster sent in a greeting that the listener took."""
    sent = []

    class Recorder:
        def __init__(self, real: socket.socket):
            self._real = real
            self.gettimeout, self.settimeout, self.recv = real.gettimeout, real.settimeout, real.recv

        def sendall(self, data: bytes) -> None:
            sent.append(data)
            self._real.sendall(data)

    with there.connect() as real:
        card = Card("recorded", there.name, "control", "", None)
        greet_blocking(Recorder(real), secret, card, True, PATIENCE_S)
    return b"".join(sent)


def as_member(there: Listener, secret: bytes, name: str, data: bytes) -> None:
    """Prove the secret, then send nonsense, and wait until that is ended."""
    with there.connect() as end:
        greet_blocking(end, secret, Card(f"{there.name} {name}", there.name, "control", "", None), True, PATIENCE_S)
        end.sendall(data)
        try:
            while end.recv(1 << 12):
                pass
        except ConnectionError:
            pass


class Hostile:
    """Draws what is sent, each time something of another kind. `trap` is a file that a pickle would make."""

    def __init__(self, seed: int, trap: Path, replay: bytes):
        self.rng, self._trap, self._replay = random.Random(seed), trap, replay
        self.kinds: tuple[Callable[[], bytes], ...] = (
            self.noise, self.cut, self.huge, self.other_version, self.replayed, self.pickled, self.spoiled,
            self.out_of_turn, self.deep, self.wrong_proof, self.http,
        )  # fmt: skip

    def draw(self) -> bytes:
        return self.rng.choice(self.kinds)()

    def opening(self) -> bytes:
        return next(greeting(bytes(32), Card("x", "y", "control", "", None), True, Versions(1, 1)))

    def nonsense(self) -> bytes:
        """A frame that is whole, of a kind that there is, with a map that is none of its own."""
        kinds = self.rng.choice([4, *KINDS]), self.rng.randrange(1 << 16)
        words = {
            self.rng.choice(["h", "se", "m", "ss", "x"]): self.rng.choice([None, -1, 1 << 63, b"x", "y" * 300])
        }
        header = self.rng.choice([msgpack.packb(words), self.rng.randbytes(40), b"\xc1", b""])
        return frame(self.rng.choice(kinds), header or b"\0") + self.noise()

    def noise(self) -> bytes:
        return self.rng.randbytes(int(2 ** self.rng.uniform(0, 13)))

    def cut(self) -> bytes:
        whole = self.opening()
        return whole[: self.rng.randrange(len(whole))]

    def huge(self) -> bytes:
        """Right in everything but how much would follow."""
        sizes = self.rng.choice([MOST + 1, 1 << 31, (1 << 32) - 1]), self.rng.choice([0, 1, 1 << 40, (1 << 64) - 1])
        first = LAYOUT.pack(MAGIC, GREETING, self.rng.choice([OPENING, 16, 80]), *sizes, self.rng.getrandbits(64))
        return first + _sum(first) + self.noise()

    def other_version(self) -> bytes:
        return frame(OPENING, self.opening()[PREFIX:], version=self.rng.choice([0, 2, 3, 0xFFFF]))

    def replayed(self) -> bytes:
        return self._replay

    def pickled(self) -> bytes:
        """Would make the file when somebody loads it, bare or as the header of a frame."""
        words = b"cposix\nsystem\n(S'touch " + str(self._trap).encode() + b"'\ntR."
        return words if self.rng.random() < 0.5 else frame(self.rng.choice([OPENING, PROOF, 16, 67]), words)

    def spoiled(self) -> bytes:
        whole = bytearray(self.opening())
        whole[self.rng.randrange(len(whole))] ^= 1 << self.rng.randrange(8)
        return bytes(whole) + self.noise()

    def out_of_turn(self) -> bytes:
        return frame(self.rng.choice([PROOF, TURNED, *range(4, 100)]), self.rng.randbytes(self.rng.randrange(200)))

    def deep(self) -> bytes:
        """Maps and lists in one another, and many of them."""
        depth = self.rng.randrange(1, 3000)
        return frame(OPENING, self.rng.choice([b"\x91", b"\x81\xa1a", b"\xdc\xff\xff"]) * depth)

    def wrong_proof(self) -> bytes:
        proof = {"ma": self.rng.randbytes(32), "ca": self.rng.randbytes(self.rng.randrange(300))}
        return self.opening() + frame(PROOF, msgpack.packb(proof))

    def http(self) -> bytes:
        return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{}"


def send(there: Listener, data: bytes, leave: bool) -> None:
    """Send it on a connection of its own, and leave, or wait until it is ended there."""
    with there.connect() as end:
        try:
            end.sendall(data)
            if not leave:
                end.shutdown(socket.SHUT_WR)
                while end.recv(1 << 12):
                    pass
        except TimeoutError:
            raise
        except OSError:  # ended there already
            pass


class HostileTls:
    """As much to a port that speaks TLS; `folder` has the certificate of a member, who does not know the secret."""

    def __init__(self, seed: int, trap: Path, folder: Path):
        self.rng, self._frames = random.Random(seed), Hostile(seed, trap, b"")
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE
        self._context.load_cert_chain(folder / "cert.pem", folder / "key.pem")

    def send(self, there: Listener) -> None:
        kind = self.rng.choice((self._frames.draw, self.record, self.spoiled_hello, None))
        if kind is not None:
            send(there, kind(), self.rng.random() < 0.1)
            return
        try:
            with there.connect() as raw, self._context.wrap_socket(raw) as wrapped:
                wrapped.sendall(self._frames.draw())
                wrapped.shutdown(socket.SHUT_WR)
                while wrapped.recv(1 << 12):
                    pass
        except (ConnectionError, ssl.SSLError, TimeoutError):
            pass

    def record(self) -> bytes:
        """A record of noise."""
        noise = self.rng.randbytes(self.rng.randrange(300))
        return bytes([self.rng.choice([20, 21, 22, 23, 24]), 3, self.rng.choice([1, 3, 4])]) + struct.pack(
            ">H", self.rng.choice([len(noise), 0xFFFF])
        ) + noise  # fmt: skip

    def spoiled_hello(self) -> bytes:
        """How a handshake begins, with some bits changed or its end missing."""
        out = ssl.MemoryBIO()
        try:
            self._context.wrap_bio(ssl.MemoryBIO(), out).do_handshake()
        except ssl.SSLWantReadError:
            whole = bytearray(out.read())
        for _ in range(self.rng.randrange(4)):
            whole[self.rng.randrange(len(whole))] ^= 1 << self.rng.randrange(8)
        return bytes(whole[: self.rng.choice([len(whole), self.rng.randrange(len(whole))])])
