"""Text of strangers on a terminal line: names in tars, labels, captions."""

LONGEST = 200  # characters


def printable(text: str) -> str:
    """The first 200 characters of a text, with escapes for those that a terminal would act on (line ends, colours)."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text[:LONGEST]
    )
