"""The wire between the host and a runner, on both of its ends: 4 bytes of length, then one object in JSON.

What comes from a runner is hostile. MAX_FRAME bounds what a frame of nested lists costs the host: 40 times its size.
"""
import json
import socket

MAX_FRAME = 1 << 20                             # bytes


def plain(value):
    """JSON for numpy's scalars and arrays; anything else is refused."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


ENCODER, DECODER = json.JSONEncoder(allow_nan=False, default=plain), json.JSONDecoder()


def send_frame(sock: socket.socket, frame: dict) -> None:
    """Sends nothing but raises TypeError, ValueError or RecursionError for what is not JSON, or too large."""
    data = ENCODER.encode(frame).encode()
    if len(data) > MAX_FRAME:
        raise ValueError(f"{len(data):,} bytes are more than {MAX_FRAME:,}")
    sock.sendall(len(data).to_bytes(4, "big") + data)


def take_frame(inbox: bytearray) -> dict | None:
    """Take the first frame out of the inbox, None while incomplete. ValueError, RecursionError: no frame."""
    end = 4 + int.from_bytes(inbox[:4], "big")
    if end > 4 + MAX_FRAME and len(inbox) >= 4:
        raise ValueError("too large")
    if len(inbox) < end:
        return None
    frame = DECODER.decode(inbox[4:end].decode())
    del inbox[:end]
    if not isinstance(frame, dict):
        raise ValueError("not a frame")
    return frame


def cut(text: str, limit: int) -> str:
    """The first and last part of a long text, and how much is missing."""
    half = limit // 2
    if len(text) <= limit:
        return text
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters cut ...]\n{text[-half:]}"


def valid(text: str) -> str:
    """The text with "?" for halves of surrogate pairs, which JSON can carry, but no file."""
    return text.encode("utf-8", "replace").decode()
