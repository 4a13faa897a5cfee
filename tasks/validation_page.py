"""The result of a validation as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

import html

from resplit.telemetry.tables import TABLES
from tasks.validate import ValidTelemetry

__all__ = ["render_html"]


def render_html(valid: ValidTelemetry, title: str = "Telemetry") -> str:
    """The page: each rule, the number of rows it checked and the number that failed."""
    rows = "\n".join(
        f'<tr class="{"bad" if fault.failed else "good"}"><td>{fault.table}</td>'
        f"<td>{html.escape(fault.rule.column)}</td><td>{html.escape(fault.rule.reason)}</td>"
        f"<td>{fault.rows}</td><td>{fault.failed}</td></tr>"
        for fault in valid.faults
    )
    kept = {name: len(getattr(valid.telemetry, name)) for name in TABLES}
    summary = ", ".join(f"{name} {count}" for name, count in kept.items())
    files = "".join(f"<li>{html.escape(str(path))}</li>" for path in valid.quarantine)
    return _PAGE.format(title=html.escape(title), summary=summary, rows=rows, files=files or "<li>none</li>")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #1f2328 }}
table {{ border-collapse: collapse; width: 100% }} th, td {{ text-align: left; padding: .3rem .6rem }}
tr {{ border-bottom: 1px solid #dfe3e8 }} .bad td {{ background: #fbe9e4 }} td:nth-child(n+4) {{ text-align: right }}
</style></head><body><h1>{title}</h1><p>Valid rows: {summary}.</p>
<table><thead><tr><th>table</th><th>column</th><th>a row fails if</th><th>rows</th><th>failed</th></tr></thead>
<tbody>
{rows}
</tbody></table><h2>Quarantine</h2><ul>{files}</ul></body></html>
"""
