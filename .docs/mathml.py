"""A Markdown extension: LaTeX, as pymdownx.arithmatex marks it, becomes MathML, so that a page fetches no script."""

from __future__ import annotations

import html
import re
from typing import Any

import math_core
from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor

MARKED = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


class _MathML(Postprocessor):
    def run(self, text: str) -> str:
        convert = math_core.LatexToMathML()
        return MARKED.sub(
            lambda m: str(convert.convert_with_local_state(html.unescape(m["latex"]), displaystyle=m["tag"] == "div")), text
        )


class _Extension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.postprocessors.register(_MathML(md), "mathml", -10)  # after all others


def makeExtension(**settings: Any) -> Extension:
    return _Extension(**settings)
