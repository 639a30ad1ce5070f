"""The alphabet of byte-level BPE: a letter for each byte, as GPT-2 has it."""

from __future__ import annotations

_SEEN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # bytes that are letters themselves
_HIDDEN = [byte for byte in range(256) if byte not in _SEEN]
BYTE_OF = {chr(byte): byte for byte in _SEEN} | {chr(256 + i): byte for i, byte in enumerate(_HIDDEN)}


def bytes_of(token: str) -> bytes:
    """What a token stands for; one with other letters, as added tokens may have, is text."""
    try:
        return bytes(map(BYTE_OF.__getitem__, token))
    except KeyError:
        return token.encode()
