"""A page as HTML that opens offline: one file, no address in it that a browser would ask for.

The page's own policy forbids every request, and every script but the two that are written here:
text that somehow became markup could still do nothing.
"""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from importlib import resources
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from sweeper.report.blocks import Block, Curves, Figure, Page
from sweeper.report.drawing import embedded

_TEMPLATE: Final = "report.html.j2"


def render(page: Page) -> str:
    """The page as HTML. Plotly is inside, once, where there is a figure."""
    script, plotly = _asset("report.js"), _plotly() if _has_figure(page) else ""
    return _template().render(
        page=page,
        policy=_policy(script, plotly),
        style=Markup(_asset("report.css")),  # a file of this package
        script=Markup(script),  # a file of this package
        plotly=Markup(plotly),  # Plotly's own file
        embedded=lambda spec: Markup(embedded(spec)),  # escaped for a script element
    )


def _policy(*scripts: str) -> str:
    """Nothing from elsewhere, and of scripts only these, by their digests."""
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts if script)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def _has_figure(page: Page) -> bool:
    blocks: list[Block] = [*page.first, *(b for section in page.sections for b in section.blocks)]
    return any(isinstance(block, Figure | Curves) for block in blocks)


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("sweeper.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(_TEMPLATE)


@lru_cache(maxsize=4)
def _asset(name: str) -> str:
    return resources.files("sweeper.report").joinpath("templates", name).read_text("utf-8")


@lru_cache(maxsize=1)
def _plotly() -> str:
    """Plotly's script, 5 MB."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())
