"""Files spoilt at random, the same ones for the same seed: bytes, JSON by its structure, headers of safetensors files."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

PATTERNS = ["(.+)+x", "(a|a)*b", "(.*)*$", ".*.*.*.*.*.*.*.*x", "(", "a{99999999999}", r"(a)\1", "(?P<n>.)(?P=n)+", "(?i)q_proj", "(" * 3000,
            ".?" * 60,
            "((((a{9}){9}){9}){9})*", "(?=(.+)+x).*", ".*", "q_proj", "[", "*", "(?:x|y|)*z", "\\", "(?#", "a)|(b"]  # fmt: skip
NAMES = ["", ".", "..", "../beside/canary", "/etc/passwd", "a/b", "a\\b", "x" * 300, "x" * 100_000, "\0", "a\0b", "é", "\ud800", "model.safetensors",
         "__class__", "forward", "layers.0", "lm_head", "weight", "none", "../../../../tmp/x", "C:\\x", "~", "$HOME", "%s%n",
         "{0.__class__}"]  # fmt: skip
NUMBERS = [0, -1, 1, 2, 3, 7, 8, 16, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**12, 10**30, 10**400, -(2**63), 0.5,
           -0.0,
           1e-300, 1e308, float("inf"), -float("inf"), float("nan"), 1.5]  # fmt: skip
OTHERS: list[Any] = [None, True, False, [], {}, [[]], {"": {}}, [None], [1, "a"], [{}], {"a": [{"b": None}]}, "default", "none", "all", "1", "true"]
WORDS = [struct.pack("<Q", number % 2**64) for number in (0, 1, 2, 8, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)]


def nasty(rng: random.Random) -> Any:
    """A value that is seldom what is expected."""
    kind = rng.randrange(6)
    if kind == 5:
        return nested(rng.choice((3, 50, 400)), rng.choice(("list", "object")))
    return copy.deepcopy(rng.choice((PATTERNS, NAMES, NUMBERS, NUMBERS, OTHERS)[kind]))


def nested(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def spoilt_bytes(data: bytes, rng: random.Random, times: int | None = None) -> bytes:
    """Flip, insert, delete, repeat, overwrite with an extreme number, cut."""
    spoilt = bytearray(data)
    for _ in range(times or rng.choice((1, 1, 2, 4))):
        at, span = rng.randrange(len(spoilt) + 1), rng.choice((1, 1, 2, 8, 64))
        match rng.randrange(6):
            case 0 if at < len(spoilt):
                spoilt[at] ^= 1 << rng.randrange(8)
            case 1:
                spoilt[at:at] = rng.randbytes(span)
            case 2:
                del spoilt[at : at + span]
            case 3:
                spoilt[at:at] = spoilt[at : at + span]
            case 4:
                spoilt[at : at + 8] = rng.choice(WORDS)
            case _:
                del spoilt[at + rng.randrange(len(spoilt) - at + 1) :]
    return bytes(spoilt)


def spoilt_json(value: Any, rng: random.Random, keys: tuple[str, ...] = ()) -> Any:
    """One to three values replaced, removed, renamed, moved or added. keys: further ones that might be looked at."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return nasty(rng)
        owner, key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1 | 2:
                owner[key] = nasty(rng)
            case 3:
                del owner[key]
            case 4 if isinstance(owner, dict):
                owner[str(rng.choice((*keys, *NAMES[:8], *map(str, owner))))] = nasty(rng) if rng.random() < 0.6 else owner[key]
            case _:
                other, theirs = rng.choice(places)
                owner[key] = _copied(other[theirs]) if theirs in other or (isinstance(other, list) and theirs < len(other)) else None
    return value


def _copied(value: Any) -> Any:
    """Of what is nested too deep for a copy, itself."""
    try:
        return copy.deepcopy(value)
    except RecursionError:
        return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in it."""
    found: list[tuple[Any, Any]] = []
    for key, part in [*value.items()] if isinstance(value, dict) else [*enumerate(value)] if isinstance(value, list) else ():
        found += [(value, key), *(_places(part) if len(found) < 200 else ())]
    return found


def text_of(value: Any, rng: random.Random) -> bytes:
    """As JSON, now and then spoilt as bytes, too."""
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):
        text = b"[" * 5000
    return spoilt_bytes(text, rng, 1) if rng.random() < 0.05 else text


# safetensors ----------------------------------------------------------------------------------------------------------------------


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, the tensors' bytes) of a good file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


def spoilt_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Bytes, the header's length, its structure, a key twice, a shape with its offsets kept, metadata."""
    header, body = header_of(data)
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)] if names else {}
    match rng.randrange(9):
        case 0:
            return spoilt_bytes(data, rng)
        case 1:
            return rng.choice(WORDS) + data[8:]
        case 2:
            text = json.dumps(header)
            twice = json.dumps({rng.choice(names): header[rng.choice(names)]}) if names else "{}"
            return with_header(f"{text[:-1]}, {twice[1:]}".encode(), body)
        case 3 if names:
            entry["shape"] = rng.choice(([0, 2**62], [2**40, 0], [0], [], [1], [2**64], [-1], [2**32, 2**32], [2] * 40, ["a"], [1.5], [len(body)],
                                         [*reversed(entry["shape"])], entry["shape"] + [1]))  # fmt: skip
            if 0 in entry["shape"]:
                entry["data_offsets"] = [entry["data_offsets"][0]] * 2
        case 4 if names:
            begin, end = entry["data_offsets"]
            entry["data_offsets"] = rng.choice(([0, end], [begin, end + 8], [end, begin], [begin - 8, end], [2**63, 2**64], [begin, len(body) + 1],
                                                [-1, end], [begin], [], None))  # fmt: skip
        case 5 if names:
            entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3",
                                         "C64",
                                         "U16", "U64", "", "f32", "F32\0", None, 3))  # fmt: skip
            sizes = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F16": 2, "BF16": 2, "U16": 2, "I32": 4}
            if rng.random() < 0.7 and entry["shape"] and entry["dtype"]:  # a shape that fits the bytes
                begin, end = entry["data_offsets"]
                entry["shape"] = [(end - begin) // sizes.get(entry["dtype"], 1)]
        case 6 if names:
            header[rng.choice([*NAMES, *names])] = header.pop(rng.choice(names))
        case 7:
            header["__metadata__"] = _spoilt_metadata(header.get("__metadata__") or {}, rng)
        case _:
            header = spoilt_json(header, rng)
            if rng.random() < 0.1:
                body = spoilt_bytes(body, rng)
    try:
        return with_header(header, body)
    except (ValueError, RecursionError):
        return with_header(b"[" * 5000, body)


def _spoilt_metadata(metadata: dict[str, str], rng: random.Random) -> Any:
    """The texts in it are JSON more often than not."""
    if not metadata:
        return nasty(rng)
    key = rng.choice([*metadata])
    try:
        return {**metadata, key: json.dumps(spoilt_json(json.loads(metadata[key]), rng))}
    except (ValueError, RecursionError):
        return spoilt_json(metadata, rng)
