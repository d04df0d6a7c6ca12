"""The words of captions, and their numbers.

    "A man doesn't run."  ── tokenize ──>  a man does n't run  ── encode ──>  2 5 14 9 8 0  ── sentence ──>  "a man does n't run"

Captions are split as the COCO caption scripts split them before scoring, so that a decoder is trained on the words that are
scored. The scripts run Stanford's PTBTokenizer (CoreNLP 3.4.1, in Java) and drop punctuation. The rules here reproduce that
program without Java; tests/grurcn/models/test_vocabulary.py compares both.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import takewhile

from grurcn.models.decoder import END, PADDING, UNKNOWN

HEADS = ("<end>", "<unk>")  # the words of END and UNKNOWN


class BadCaptions(ValueError):
    """Captions, or a vocabulary, that cannot be used. The message says which and why."""


def tokenize(caption: str) -> list[str]:
    """The words of a caption, in lower case and without most punctuation, as the COCO caption scripts split it.

    A man's T-shirt, don't (2nd)!    a man 's t-shirt do n't -lrb- 2nd -rrb-
    """
    caption = ENTITY.sub(lambda entity: ENTITIES[entity[1].lower()], caption.replace("\0", " ")).translate(PLAIN)
    caption = BEFORE_NUMBER.sub("\\g<0>\0", caption)
    return [word for piece in PIECE.findall(caption) for word in words_of(piece)]


@lru_cache(maxsize=2**16)
def words_of(piece: str) -> tuple[str, ...]:
    """The words of a piece of a caption without blanks. At each place, the rule with the longest match applies."""
    words, place = [], 0
    while place < len(piece):
        matches = [match for rule in RULES if (match := rule.match(piece, place))]
        if matches:
            longest = max(matches, key=lambda match: match.end())  # the first of several
            words += [part for part in longest.groups() if part] or [longest[0]]
            place = longest.end()
        else:
            place += 1  # no rule matches: the character is dropped
    words = [word.lower().translate(BRACKETS) for word in words if not DROPPED.fullmatch(word)]
    return tuple(words)


# Characters with several spellings or a name. Quotation marks and dashes are dropped in the end, so they become blanks.
ENTITIES = {"amp": "&", "lt": "<", "gt": ">", "quot": " ", "apos": "'", "nbsp": " "}
ENTITY = re.compile(f"&({'|'.join(ENTITIES)});", re.IGNORECASE)
PLAIN = str.maketrans(
    dict.fromkeys("\u201c\u201d\u00ab\u00bb\u2039\u203a\u2013\u2014\u2015\u2026", " ")
    | {"\u2018": "'", "\u2019": "'", "\u00ad": ""}  # single quotation marks, the soft hyphen
    | {"\u20ac": " $ ", "\u00a3": " # ", "\u00a2": " cents "}  # euro, pound, cent
    | {"\u00bd": " 1/2 ", "\u2153": " 1/3 ", "\u2154": " 2/3 ", "\u00bc": " 1/4 ", "\u00be": " 3/4 "}
)
BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
DROPPED = re.compile("[-.]+|['\"`?!,:;]")  # the scripts keep ?! and brackets
PIECE = re.compile(r"\S{1,200}")  # at most 200 characters, as a rule may look at the whole rest of a piece


def any_of(words: str) -> str:
    """A pattern that matches one of the words."""
    return f"(?:{'|'.join(words.split())})"


ABBREVIATION = any_of(r"""
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bhd bldg blvd brig bros calif capt cf cie cmdr co col colo
    comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov govs hon inc ind insp
    intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt
    mtg natl neb nev nov oct okla penn pfc ph\.d ph plc ppte ppty pres prof profs pte ptes pty ptys pvt rd rep reps rev rt sen
    sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo
""")
STATES = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"  # words, if they are not capitalised
NUMBERED = any_of("art ca fig figs no nos op pp prop")  # abbreviations in front of a number only
BEFORE_NUMBER = re.compile(rf"(?i)(?<!\w)(?<!\w-){NUMBERED}\.(?=\s+\d)")

# A: a letter, W: a letter or a digit, of any script, or a combining mark.
MARKS = (
    "\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed"
    "\u0900-\u0963\u0966-\u0dff\u0e30-\u0e4e"  # of India's scripts the letters too, and Thai's
)
A, W = rf"(?:[^\W\d_]|[{MARKS}])", rf"(?:[^\W_]|[{MARKS}])"
WORD = rf"(?:(?:[dlno]|[A-HJ-XZ])['`]{W}{{2,}}|{W}+)"  # dog, o'clock, O'Brien
HYPHENATED = rf"(?:{W}(?:{W}|[.,])*(?=-{W})|{WORD})(?:[-_]{WORD})*"  # dog, black-and-white, 3.5-inch, file_name
SLASHED = r"[A-Za-z\d]+(?:-[A-Za-z\d]+)*"

# Each group of a rule is a word. If no group took part in a match, the whole match is one word.
RULES = [
    re.compile(pattern)
    for pattern in (
        # contractions, in front of the rules for words, which match them too
        rf"(?i:({A}*)(n['`]t))(?!{W})",
        rf"(?i:'(?:s|d|m|ll|re|ve))(?!{A})",
        rf"(?i:(can)(not)|(gon)(na)|(got)(ta)|(wan)(na)|(gim)(me)|(lem)(me)|(more)('n))(?!{W})",
        rf"(?i:('t)(is|was)|'em|'till?|'cause|'n'|'n(?!{A}))",
        rf"(?i:d'ye|[djl]'|y'(?={A})|ol'|c'est|c'mon|n?e'er|ma'am|s'mores|hallowe'en|nat'l)",
        # words
        HYPHENATED,
        rf"{SLASHED}(?:/{SLASHED}){{1,2}}",  # man/woman, 1/2
        rf"{A}{W}*(?:[.!?]{A}{W}*)+",  # outside.He, a.k.a
        r"[A-Z]+(?:[&+][A-Z]+)+|[A-Z]+\$",  # R&B, US$
        # words with their full stop
        rf"[A-Za-z](?:\.[A-Za-z])*\.(?:-{WORD})*",  # J. Smith, p.m., U.S.-made
        rf"(?i:{ABBREVIATION})\.",
        rf"(?:{any_of(STATES)}|{any_of(STATES.upper())})\.",
        rf"(?i:{NUMBERED})\.(?=\d|\0)",
        rf"(?=[\d-]*{A}){HYPHENATED}(?:[.!?]{A}{W}*)*\.(?=[,;:])",  # any word, as in "bat.,"
        # numbers
        r"[-+]?(?:\d+(?:[.,:]\d+)*|(?:[.,:]\d+)+)",  # 1,000.50, 12:30, -5, .5
        r"'\d\d(?:[sS](?!\w)|(?![\w'\"-]))",  # the '90s
        # web
        r"[^\s\"<>|(){}]+@[^\s\"<>|(){}.]+(?:\.[^\s\"<>|(){}.]+)*|@+(?:[A-Za-z_]\w*)?",  # me@example.com, @me
        rf"#{A}+|#+",
        r"(?:https?://|www\.)\w[\w-]*(?:\.[\w-]+)+(?:/[\w./?=&%~#+-]*[\w/])?",
        rf"[:;=][-']?[()DPp](?!{W})",  # :-)
        r"</?[A-Za-z!][^<>]*>",
        # everything else that is kept
        r"(?i:-[lr][crs]b-)",  # replaced brackets
        r"[?!]+|-+|\.{3,}|_+|\*+|<<|>>",
        r"[!-/:-@\[-`{-~\u00a1-\u00bf\u00d7\u00f7\u2016-\u2044\u20a0-\u2bff\u3001\u3002\uff01-\uff65]",
    )
]


@dataclass(frozen=True)
class Vocabulary:
    """The words that a decoder knows, by number. Raises BadCaptions for words that do not make a vocabulary."""

    words: tuple[str, ...]

    def __post_init__(self):
        if self.words[:2] != HEADS:
            raise BadCaptions(f"a vocabulary that begins with {shown(self.words[:2])}; expected {shown(HEADS)}")
        for word, count in Counter(self.words).items():
            if count > 1:
                raise BadCaptions(f"a vocabulary where the word {word!r} occurs {count} times; expected each once")
            if word.split() != [word]:
                raise BadCaptions(f"a vocabulary with {word!r} in it; expected words, without blanks")

    @staticmethod
    def build(captions: Iterable[str], max_words: int = 20_000, min_count: int = 1) -> "Vocabulary":
        """END and UNKNOWN, then the words of captions, the most frequent first.

        Equally frequent words are in alphabetical order, so that the order of the captions does not matter. Raises BadCaptions
        if there is no caption, or no word that is frequent enough.
        """
        if max_words < 1 or min_count < 1:
            raise BadCaptions(f"{max_words = }, {min_count = }: expected at least 1 of each")
        counts: Counter[str] = Counter()
        num_captions = 0
        for caption in captions:
            num_captions += 1
            counts.update(word for word in tokenize(caption) if word not in HEADS)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        if not ranked:
            raise BadCaptions(f"no word in {num_captions} captions, so no vocabulary; expected at least one word")
        if counts[ranked[0]] < min_count:
            raise BadCaptions(
                f"every word of {num_captions} captions is rarer than {min_count}: the most frequent, {ranked[0]!r}, occurs "
                f"{counts[ranked[0]]} times; lower min_count or add captions"
            )
        return Vocabulary(HEADS + tuple(word for word in ranked[:max_words] if counts[word] >= min_count))

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each word, without END and UNKNOWN."""
        return {word: number for number, word in enumerate(self.words) if word not in HEADS}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, caption: str, max_words: int = 30) -> list[int]:
        """The numbers of a caption's first max_words words, UNKNOWN for other words, then END."""
        return [*(self.numbers.get(word, UNKNOWN) for word in tokenize(caption)[:max_words]), END]

    def sentence(self, numbers: Iterable[int]) -> str:
        """The words up to the first END or PADDING, joined by blanks."""
        words = takewhile(lambda number: number not in (END, PADDING), numbers)
        return " ".join(self.words[number] for number in words)


def shown(words: Sequence[str]) -> str:
    return ", ".join(map(repr, words)) or "nothing"
