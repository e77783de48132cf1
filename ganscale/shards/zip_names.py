"""The names of a zip's members, of which many do not say how they are encoded."""

from collections.abc import Sequence
from zipfile import ZipInfo

from ganscale.errors import UserError

_IS_UTF8 = 0x800  # a flag of a member
_FORMATS_OWN = "cp437"


def member_names(members: Sequence[ZipInfo], encoding: str = "") -> tuple[list[str], list[str]]:
    """(the name of each member, with / between folders; notes).

    encoding: of the names that are not marked as UTF-8. By default it is UTF-8 where all of them
        can be, as macOS writes them, else code page 437, as the format has it

    Raises UserError for an unknown encoding, and for a name that it cannot have.
    """
    names = [member.filename for member in members]
    unmarked = [
        position
        for position, member in enumerate(members)
        if not (member.flag_bits & _IS_UTF8 or member.filename.isascii())
    ]
    notes = []
    try:
        for position, name in [(i, _decoded(names[i], encoding or "utf-8")) for i in unmarked]:
            names[position] = name
    except UserError:
        if encoding:
            raise
        notes.append(
            f"names whose encoding the zip does not say: {len(unmarked):,}, read as code page 437, "
            f"as {names[unmarked[0]]}; --zip-encoding NAME takes another, such as gbk"
        )
    # Windows writes backslashes into some zips. Only now: in GBK, one may be half a letter.
    return [name.replace("\\", "/") for name in names], notes


def _decoded(name: str, encoding: str) -> str:
    """A name that `zipfile` has decoded by the format's own encoding."""
    try:
        return name.encode(_FORMATS_OWN).decode(encoding)
    except LookupError:
        raise UserError(f"--zip-encoding {encoding}: Python knows no such encoding") from None
    except UnicodeDecodeError:
        raise UserError(f"--zip-encoding {encoding} is not that of {name!r}") from None
