"""What a chat template makes of its arguments.

It finds those that the template never mentions, and words where it asks for yes or no.
"""

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

CLOCK = "strftime_now"
"""What a template calls that writes the day."""
_OF_ALL = {"chat_template", "documents"}  # read by what renders every template
_YES_OR_NO = {"true", "false", "boolean"}  # tests of Jinja
_DEFAULT = {"default", "d"}  # filters of Jinja
_WORDS = {"true", "false", "yes", "no", "on", "off", "1", "0"}  # texts that are meant as truth
_TRUTH = (nodes.If, nodes.CondExpr, nodes.And, nodes.Or, nodes.Not)


class _Generation(Extension):
    """`{% generation %}`, a tag of transformers: read as what it holds."""

    tags = {"generation"}  # noqa: RUF012, as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_names(template: Any) -> list[str]:
    """The names of the templates that a tokenizer lists; one template alone has none."""
    return [] if template is None or isinstance(template, str) else [t["name"] for t in template]


def _texts(template: Any) -> list[str]:
    if isinstance(template, str):
        return [template]
    return [t["template"] for t in template or []]


def doubtful_arguments(template: Any, arguments: Mapping[str, Any]) -> list[str]:
    """A sentence for each argument that a template will not use as it was meant.

    Args:
        template: The Jinja text; or, of a tokenizer that lists several, their names and texts.
        arguments: What the recipe gives to it.
    """
    known = {name for text in _texts(template) for name in mentioned(text)} | _OF_ALL
    tested = {name for text in _texts(template) for name in _tested(text)}
    said = []
    for name, value in arguments.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            said.append(f"the chat template never mentions {name!r}.{hint}")
        elif isinstance(value, str) and value.strip().lower() in _WORDS and name in tested:
            said.append(
                f"{name} is the text {value!r}, and the chat template asks for yes or no: any text "
                "is yes. Write true or false without quotes."
            )
    return [f"warning: data.chat_template_kwargs: {sentence}" for sentence in said]


def reads_the_clock(template: Any) -> bool:
    """Whether a rendering depends on the day."""
    return any(CLOCK in mentioned(text) for text in _texts(template))


@cache
def mentioned(template: str) -> frozenset[str]:
    """The names that a template looks up, those of functions too; none where it is no Jinja."""
    tree = _parsed(template)
    return frozenset(meta.find_undeclared_variables(tree)) if tree else frozenset()


@cache
def _tested(template: str) -> frozenset[str]:
    """The names whose truth a template tests, or that are true or false if they are not given."""
    tree = _parsed(template)
    return (
        frozenset(name for node in _conditions(tree) for name in _names(node))
        if tree
        else frozenset()
    )


def _conditions(tree: nodes.Template) -> Iterator[nodes.Node | None]:
    for node in tree.find_all(_TRUTH):
        if isinstance(node, nodes.If | nodes.CondExpr):
            yield node.test
        else:
            yield from node.iter_child_nodes()
    yield from (test.node for test in tree.find_all(nodes.Test) if test.name in _YES_OR_NO)
    yield from (filtered.node for filtered in tree.find_all(nodes.Filter) if _is_default(filtered))


def _is_default(filtered: nodes.Filter) -> bool:
    """Whether it is `default(true)` or `default(false)`.

    Then what it stands for is true or false too.
    """
    given = filtered.args[0] if filtered.args else None
    return (
        filtered.name in _DEFAULT
        and isinstance(given, nodes.Const)
        and isinstance(given.value, bool)
    )


def _names(node: nodes.Node | None) -> list[str]:
    return [node.name] if isinstance(node, nodes.Name) else []


def _parsed(template: str) -> nodes.Template | None:
    environment = Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    try:
        return environment.parse(template)
    except TemplateError:
        return None  # said when it renders
