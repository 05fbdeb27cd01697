"""A fuzzer that knows the formats: it damages files within their structure, and keeps those that reach new lines."""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickletools
import random
import signal
import struct
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import PIL

from adfeatures.errors import AdfeaturesError

ROOT = Path(__file__).parents[2]
MAX_SECONDS, MAX_BYTES = 10, 2 << 30
_TRACED = (str(ROOT / "adfeatures"), str(ROOT / "training"), str(Path(PIL.__file__).parent))

_NUMBERS = (0, 1, -1, 2, 127, 255, 65535, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 63, 10**30, 10**400)
_FLOATS = (math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e-45, 1e-38, 1e20, 3e38, -3e38)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "NaN", "x" * 3000, "\0", "../../x", "=1+1", "\ud800", [], {}, [[]], [None], {"": 0}),
    *(*_NUMBERS, *_FLOATS, 0.5, 1e308, 5e-324),
)
# Operations of pickles that honest files hardly hold, and numbers that they do not.
_OPERATIONS = (
    *(b"(", b"t", b"0", b"2", b".", b"N", b"}", b"]", b")", b"R", b"b", b"Q", b"\x81", b"\x86", b"\x87", b"a", b"s"),
    *(b"u", b"e", b"\x89", b"K\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"),
    *(b"\x8a\x20" + b"\x7f" * 32, b"G\x7f\xf0" + b"\0" * 6, b"X\0\0\0\0", b"X\x01\0\0\0x", b"q\0", b"h\0", b"h\x01"),
    *(b"c__torch__\nX\n", b"ctorch\nfloat64\n", b"ctorch\nint8\n", b"ctorch\nSize\n", b"cos\nsystem\n", b"ctorch\nx\n"),
    *(
        b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch\nHalfStorage\n",
        b"cnumpy\ndtype\n",
    ),
    *(
        b"cnumpy.core.multiarray\nscalar\n",
        b"c_codecs\nencode\n",
        b"ctorch._utils\n_rebuild_sparse_tensor\n",
        b"U\x02f8",
    ),
)


@dataclass(frozen=True)
class Target:
    """What reads a kind of files.

    Attributes:
        file: Where it expects them, below a folder.
        seeds: Honest files.
        read: Reads the file, or raises an AdfeaturesError that names it.
        use: Works with what was read, or raises any AdfeaturesError.
    """

    file: str
    seeds: Sequence[bytes]
    read: Callable[[Path], Any]
    use: Callable[[Any], object] = lambda found: None


class Hang(BaseException):
    """Raised into what takes too long. No ``except Exception`` keeps it."""


def fuzz(target: Target, folder: Path, rounds: int = 0, seconds: float = 0, seed: int = 0) -> dict[str, bytes]:
    """Damage the seeds of a target for so many rounds, or processor seconds.

    Returns:
        The first file for each way in which the target failed.
    """
    generator, finds, corpus = random.Random(seed), dict[str, bytes](), list(target.seeds)
    lines: set[tuple[CodeType, int]] = set()
    path, end, number = folder / target.file, time.process_time() + seconds, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    for content in corpus:
        if problem := _failure(target, path, content, lines):
            finds[problem] = content
    while number < rounds or time.process_time() < end:
        number += 1
        content = generator.choice(corpus if generator.random() < 0.7 else corpus[-8:])
        for _ in range(generator.choice((1, 1, 2, 4))):
            content = mutated(content, generator)
        known = len(lines)
        # Tracing makes a reader several times slower.
        if problem := _failure(target, path, content, lines if number % 3 == 0 else None):
            finds.setdefault(problem, content)
        elif len(lines) > known and len(content) < 1 << 18:
            corpus.append(content)
    return finds


def _failure(target: Target, path: Path, content: bytes, lines: set[tuple[CodeType, int]] | None) -> str:
    """How a target fails on a file, "" where it does not."""
    path.write_bytes(content)
    Path("/proc/self/clear_refs").write_text("5")  # From here on, the high-water mark of memory is that of this file.
    start, before = time.monotonic(), _peak()
    with contextlib.suppress(AdfeaturesError), warnings.catch_warnings(), _limited(), _traced(lines):
        warnings.simplefilter("ignore")
        try:
            found = _named(target.read, path)
            target.use(found)
        except AdfeaturesError:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            *_, last = traceback.extract_tb(error.__traceback__)
            return f"{type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})"
    if time.monotonic() - start > MAX_SECONDS:
        return "too slow"
    return "too much memory" if _peak() - before > MAX_BYTES else ""


def _named(read: Callable[[Path], Any], path: Path) -> Any:
    try:
        return read(path)
    except AdfeaturesError as error:
        message = str(error)
        assert str(path.parent) in message, f"the error does not name the file: {message[:300]}"
        assert len(message) < 5000, f"the error has {len(message)} letters"
        raise


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"more than {MAX_SECONDS} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


@contextlib.contextmanager
def _traced(lines: set[tuple[CodeType, int]] | None) -> Iterator[None]:
    if lines is None:
        yield
        return

    def on_line(frame: FrameType, event: str, argument: object) -> Any:
        lines.add((frame.f_code, frame.f_lineno))
        return on_line

    def on_call(frame: FrameType, event: str, argument: object) -> Any:
        return on_line if frame.f_code.co_filename.startswith(_TRACED) else None

    former = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(former)


def mutated(content: bytes, generator: random.Random) -> bytes:
    """A file with one thing changed, within its format where that is known and still to be made out."""
    change = next((change for is_of, change in _FORMATS if is_of(content)), _bytes)
    if generator.random() < 0.1:
        change = _bytes
    try:
        return change(content, generator)
    except Exception:  # It was damaged before.
        return _bytes(content, generator)


def _bytes(content: bytes, generator: random.Random) -> bytes:
    start = generator.randrange(len(content) + 1)
    length = generator.choice((1, 1, 2, 4, 8, 8, 100))
    piece = content[start : start + length]
    new = generator.choice(
        (
            generator.randbytes(length),
            struct.pack(generator.choice("<>") + "Q", generator.choice(_NUMBERS[:-2]) % (1 << 64))[: min(length, 8)],
            struct.pack(generator.choice(("<f", "<e", "<d")), generator.choice(_FLOATS[:8])),
            bytes(length),
            piece + piece,
            b"",
            bytes([piece[0] ^ 1 << generator.randrange(8)]) + piece[1:] if piece else b"\0",
            content[generator.randrange(len(content) + 1) :][:length],
        )
    )
    rest = content[start + (length if generator.random() < 0.9 else 0) :]
    return content[:start] + new + (b"" if generator.random() < 0.02 else rest)


def _floats(content: bytes, generator: random.Random) -> bytes:
    start = generator.randrange(max(1, len(content) // 4)) * 4
    count = generator.choice((1, 1, 16, 1000))
    new = struct.pack("<f", generator.choice(_FLOATS)) * count
    return (content[:start] + new)[: len(content)] + content[start + len(new) :]


def _value(value: Any, generator: random.Random) -> Any:
    """JSON with one node changed; JSON within a text is entered."""
    places = list(_places(value))
    if not places or generator.random() < 0.03:
        return generator.choice(_VALUES)
    holder, key = generator.choice(places)
    old = holder[key]
    if isinstance(old, str) and old[:1] in ("{", "[") and generator.random() < 0.9:
        holder[key] = json.dumps(_value(json.loads(old), generator))
        return value
    match generator.randrange(8):
        case 0:
            del holder[key]
        case 1:
            other, name = generator.choice(places)
            holder[key] = json.loads(json.dumps(other[name])) if name in other or isinstance(name, int) else None
        case 2 if isinstance(holder, list):
            holder += [json.loads(json.dumps(old))] * generator.choice((1, 2, 100))
        case 2:
            holder[generator.choice(("", "x", key + "0", key.upper(), "\0"))] = old
        case 3 | 4 if isinstance(old, (int, float)):
            holder[key] = generator.choice((old + 1, old - 1, -old, old * 2, float(old), str(old), old / 3))
        case 3 if isinstance(old, str):
            holder[key] = _bytes(old.encode(), generator).decode(errors="replace")
        case 4:
            holder[key] = [old]
        case _:
            holder[key] = generator.choice(_VALUES)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _json(content: bytes, generator: random.Random) -> bytes:
    return json.dumps(_value(json.loads(content), generator)).encode()


def _safetensors(content: bytes, generator: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if generator.random() < 0.25:
        return content[: 8 + length] + _floats(data, generator)
    values = json.loads(header)
    metadata = values.get("__metadata__")
    if metadata and generator.random() < 0.6:
        values["__metadata__"] = _value(metadata, generator)
    else:
        values = _value(values, generator)
    header = json.dumps(values).encode()
    return len(header).to_bytes(8, "little") + header + data


def _zip(content: bytes, generator: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    number = generator.randrange(len(members))
    if generator.random() < 0.6:
        number = next(n for n, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    name, data = members[number]
    match generator.randrange(20):
        case 0:
            del members[number]
        case 1:
            members.append(members[number])
        case 2:
            members[number] = (generator.choice(members)[0], data)
        case 3:
            members[number] = (_bytes(name.encode(), generator).decode(errors="replace").replace("\0", ""), data)
        case _ if name.endswith("data.pkl"):
            members[number] = (name, _pickle(data, generator))
        case kind:
            members[number] = (name, (_floats if kind % 2 else _bytes)(data, generator))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", generator.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, data in members:
            archive.writestr(name or "x", data)
    return buffer.getvalue()


def _pickle(content: bytes, generator: random.Random) -> bytes:
    """One operation changed, of one pickle or of several and what is behind them."""
    stream, cuts = io.BytesIO(content), [0]
    with contextlib.suppress(Exception):
        while True:
            for _, _, position in pickletools.genops(stream):
                cuts.append(position or 0)
    cuts = sorted({*cuts, stream.tell() if stream.tell() < len(content) else len(content)})
    pieces = [content[start:end] for start, end in zip(cuts, [*cuts[1:], len(content)], strict=True)]
    number, other = generator.randrange(len(pieces)), generator.randrange(len(pieces))
    piece = pieces[number]
    match generator.randrange(8):
        case 0:
            del pieces[number]
        case 1:
            pieces[number] = piece * generator.choice((2, 2, 100))
        case 2:
            pieces[number], pieces[other] = pieces[other], piece
        case 3:
            pieces[number] = pieces[other]
        case 4:
            pieces[number] += generator.choice(_OPERATIONS)
        case 5 | 6:
            pieces[number] = generator.choice(_OPERATIONS)
        case _:
            pieces[number] = piece[:1] + _bytes(piece[1:], generator)
    return b"".join(pieces)


def _png(content: bytes, generator: random.Random) -> bytes:
    chunks, at = [], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    number = generator.randrange(len(chunks))
    kind, body = chunks[number]
    match generator.randrange(8):
        case 0:
            del chunks[number]
        case 1:
            chunks[number:number] = [chunks[number]] * generator.choice((1, 100))
        case 2:
            kinds = (b"tRNS", b"PLTE", b"gAMA", b"iCCP", b"eXIf", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"sBIT", b"IEND")
            chunks[number:number] = [(generator.choice(kinds), body[: generator.randrange(1, 40)])]
        case 3 if kind == b"IDAT":
            chunks[number] = (kind, zlib.compress(_bytes(zlib.decompress(body), generator)))
        case _:
            chunks[number] = (kind, _bytes(body, generator))
    return content[:8] + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


_FORMATS: Iterable[tuple[Callable[[bytes], bool], Callable[[bytes, random.Random], bytes]]] = (
    (lambda content: content[:2] == b"PK", _zip),
    (lambda content: content[:1] == b"\x80", _pickle),
    (lambda content: content[:4] == b"\x89PNG", _png),
    (lambda content: content[8:9] == b"{", _safetensors),
    (lambda content: content[:1] in (b"{", b"["), _json),
)
