"""Text that is safe to print: names from files and archives may hold commands for a terminal."""

import re

# Controls except tab and newline, also of C1 and of the direction of text; surrogates stand for
# bytes that are not UTF-8.
_UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with escapes such as \\x1b in place of control characters and undecoded bytes."""
    return _UNSAFE.sub(_escape, text)


def echo(text: str) -> None:
    """Prints a line, `printable`."""
    print(printable(text))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # as "surrogateescape" decodes a byte
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
