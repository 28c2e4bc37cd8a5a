"""A caption made plain, as the text encoder of LlamaGen's text-conditional generators expects it.

The generators were trained on captions that went through one list of replacements, twice: addresses,
tags, file names, codes and most punctuation go, and what is left is lower case. A caption that is
cleaned otherwise has other tokens, so order and patterns are held to examples of the reference in the
tests. Two steps depend on libraries (`LIBRARIES`): the text of HTML, and the repair of mojibake.
"""

from __future__ import annotations

import html
import re
import unicodedata
import urllib.parse
import warnings
from collections.abc import Callable
from functools import cache

from vapi_jax.common.errors import ExpectedError

LIBRARIES = ("ftfy", "beautifulsoup4")
"""What the cleaned text depends on, for the record."""

EXTRA = 'pip install "vapi_jax[text]", or pip install -e ".[text]" in a clone'

_SUFFIXES = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_HOST = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
# Unicode's dashes as of version 8, which the reference lists.
_DASHES = (
    "\\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)

# (pattern, replacement) in order; `_markup` and `_repair` stand where the list calls them.
_BEFORE_MARKUP = (
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", ""),
)
_BEFORE_REPAIR = (
    (r"@\w+\b", ""),
    ("[\u31c0-\u9fff]+", ""),  # Chinese and what goes with it; kana and hangul stay
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.{_SUFFIXES}", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_AFTER_REPAIR = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_SUFFIXES}(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    # White space at the ends stays until the last line, so a mark before it is not a last letter.
    ("^[\"']([\\w\\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def _replace(text: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        text = re.sub(pattern, replacement, text)
    return text


@cache
def _libraries() -> tuple[Callable[[str], str], Callable[[str], str]]:
    """The text of HTML, and text whose mojibake is repaired."""
    try:
        import ftfy
        from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning
    except ImportError as error:
        raise ExpectedError(
            f"cleaning captions needs {' and '.join(LIBRARIES)} ({error}): {EXTRA}; or leave the "
            "captions as they are (clean=False)"
        ) from error

    def text_of(markup: str) -> str:
        with warnings.catch_warnings():  # a caption may well look like a file name
            warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
            return BeautifulSoup(markup, features="html.parser").text

    return text_of, ftfy.fix_text


def _clean_once(text: str, lower: bool) -> str:
    markup, repair = _libraries()
    text = urllib.parse.unquote_plus(text).strip()
    text = markup(_replace(text.lower() if lower else text, _BEFORE_MARKUP))
    text = _replace(text, _BEFORE_REPAIR)
    if len(re.findall("[-_]", text)) > 3:
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(repair(text))).strip()
    return _replace(text, _AFTER_REPAIR).strip()


def clean_caption(text: str, *, clean: bool = True, lower: bool = True) -> str:
    """A caption as the text encoder takes it.

    Args:
      text: any caption.
      clean: apply the reference's replacements, twice; without, white space at the ends goes, no more.
      lower: make it lower case.

    Raises:
      ExpectedError: a library that cleaning needs is not installed.
    """
    if not clean:
        return text.lower().strip() if lower else text.strip()
    return _clean_once(_clean_once(text, lower), lower)


def has_other_script(text: str) -> bool:
    """Whether there are letters that are not Latin, of which T5 knows few or none."""
    return any(c.isalpha() and not unicodedata.name(c, "").startswith("LATIN") for c in text)
