"""Renders chat templates of others, in a process of its own that may use little memory.

Started by templates.py as a file, so that it imports nothing of ours.  A line of JSON comes in, one
goes out.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def limit_memory(size: int) -> None:
    """No more than so many bytes; where the system has no such limit, time and output alone are limited."""
    try:
        import resource  # noqa: PLC0415  not on every system

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, ValueError, OSError):
        return


def environment() -> Any:
    """What a template may use: nothing that changes or reaches anything outside of it.

    What stands in {% generation %} ... {% endgeneration %} is written between the two texts of `marks`.
    """
    from datetime import datetime  # noqa: PLC0415

    from jinja2 import TemplateError, nodes  # noqa: PLC0415  an optional extra
    from jinja2.ext import Extension, loopcontrols  # noqa: PLC0415
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, indent: int | None = None, **_: object) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    class GenerationBlocks(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            of: Any = self.environment
            begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in of.marks)
            of.blocks += 1
            return nodes.Scope([begin, *body, end])  # what is set inside stays inside

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlocks]
    )
    made.filters["tojson"] = as_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def render(made: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """{"text": ..., "blocks": how many the template has} or {"error": ...}; no variables: it is only read."""
    try:
        made.marks, made.blocks = asked["marks"], 0
        parts, size = [], 0
        template = made.from_string(asked["template"])
        if asked["variables"] is None:
            return {"text": "", "blocks": made.blocks}
        for part in template.generate(**asked["variables"]):
            size += len(part)
            if size > asked["longest"]:
                return {"error": f"it writes more than {asked['longest']:,} characters"}
            parts.append(part)
        return {"text": "".join(parts), "blocks": made.blocks}
    except MemoryError:
        return {"error": "it takes more memory than it may"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as error:  # whatever a template can raise is its fault
        line = getattr(error, "lineno", None)  # of a syntax error
        place = "" if line is None else f"line {line}: "
        return {"error": f"{place}{type(error).__name__}: {error}"[:500]}


def serve(size: int) -> None:
    """Say that it is there, then answer line by line until nothing more comes."""
    made = environment()
    limit_memory(size)
    print(flush=True)
    for line in sys.stdin:
        print(json.dumps(render(made, json.loads(line))), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
