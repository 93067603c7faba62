"""Turns the formulas of a page into MathML, which browsers show without scripts or fonts from elsewhere."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_LONG = 40  # characters of a formula that may not fit a phone
_FUNCTION = re.compile(r"(<mi>(?:arctan|cos|exp|log|sin)</mi>)(?=<m(?:frac|i|n|row|sub|sup)>|<msubsup>)")


def _mathml(match: re.Match[str]) -> str:
    kind, formula = match.groups()
    made: str = convert(html.unescape(formula), display="block" if kind == "div" else "inline")
    made = made.replace(r"\lVert", "&#x02016;").replace(r"\rVert", "&#x02016;")  # large ones are left as they are
    made = re.sub(r"<mo>(&#x02016;|&#x0007C;)</mo>", r'<mo stretchy="false">\1</mo>', made)  # one height left and right
    made = _FUNCTION.sub(r'\1<mspace width="0.17em"></mspace>', made)
    return f'<{kind} class="formula">{made}</{kind}>' if kind == "div" or len(formula) > _LONG else made


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of every page."""
    return _FORMULA.sub(_mathml, content)
