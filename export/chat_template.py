"""A chat as the text its model expects, through the model's template. Templates come with models: they are untrusted.

They run in jinja2's sandbox, and see nothing but plain data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from vte_compile.errors import EngineError, InputError

_OLDEST_JINJA = (3, 1, 6)
"""Ways out of the sandbox of older ones are known."""


class ChatTemplate:
    """A template that was compiled.

    Args:
        source: Its text.
        variables: What else it may use, such as "bos_token".

    Raises:
        EngineError: It cannot be compiled, or jinja2 is missing or too old.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        try:
            import jinja2
            from jinja2.ext import Extension, loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise EngineError("The chat template needs jinja2: pip install 'vte-compile[onnx]'.") from error
        if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdecimal()) < _OLDEST_JINJA:
            raise EngineError(f"jinja2 {jinja2.__version__} has holes in its sandbox: pip install -U jinja2.")

        class Generation(Extension):
            """The block that marks answers for training; here, what is in it."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise EngineError(f"The engine's chat template cannot be compiled: {error}") from error
        self._variables = dict(variables)
        self._errors = jinja2.TemplateError

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a chat, up to where the answer begins.

        Raises:
            InputError: The template does not take these messages.
        """
        plain = [_plain(message) for message in messages]
        try:
            return self._template.render(messages=plain, tools=None, add_generation_prompt=True, **self._variables)
        except (self._errors, TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
            raise InputError(f"messages: the chat template does not take them: {error}") from error


def _plain(value: Any) -> Any:
    """Data without objects whose methods a template could call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    # jinja2's own filter of this name is for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
