"""Chat templates, rendered within bounds: a template comes with a model, so it is somebody else's program.

jinja2's sandbox keeps a template away from Python: no private attribute, no import, nothing that changes its input. It does not keep one from
making ``'x' * 10**12``, or from counting to that. So here a template also has a budget, MOST_WORK: a character that is made costs 1, an element
of a list ELEMENT, a turn of a loop or a call TURN. What would cost more than is left is refused before it is made. A conversation of a million
characters, or of 20,000 short messages, stays below it.

    loops, and text in them    each turn is paid for as it is taken, each piece of text as it is written
    + * ** %                   jinja2 hands them over before they are computed
    a ~ b, [a, b], {a: b}, a[1:]   are rewritten into filters that look at their parts first
    methods and filters        replace, join, split, format, indent, tojson: by what they would make; those that fill up with spaces are left out
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from ..errors import LoraLabError

MOST_WORK, TURN, ELEMENT = 50_000_000, 100, 20
MOST_BITS = 10_000  # of a whole number
LONGEST_TEMPLATE = 200_000  # characters: known ones have up to 20,000, and compiling takes some 600 bytes for each
LONGEST_MESSAGE = 500  # characters of a template's own error
PADDING = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "maketrans", "format_map", "encode", "to_bytes"))
FILTERS_LEFT_OUT = ("center", "wordwrap", "batch", "slice", "urlize", "xmlattr", "pprint", "filesizeformat", "random")
AT_ONCE = frozenset(("length", "count", "first", "last", "default", "d", "attr"))  # filters that are done as soon, however long a value is
# Filters that make no text of a container
LOOKED_AT = frozenset((
    "list", "select", "reject", "selectattr", "rejectattr", "map", "items", "sort", "unique", "reverse", "min", "max", "dictsort", "groupby",
))  # fmt: skip
_left: ContextVar[list[int]] = ContextVar("work that is left to a template")


def render(template: str, **variables: Any) -> str:
    """Render a chat template in the sandbox, within MOST_WORK.

    Raises LoraLabError for a template that is not valid, refuses its input, reaches for what the sandbox forbids, or does not come to an end.
    """
    import jinja2

    if len(template) > LONGEST_TEMPLATE:
        raise LoraLabError(f"the chat template has {len(template):,} characters, more than {LONGEST_TEMPLATE:,}: it would take too much memory")
    before = _left.set([MOST_WORK])
    try:
        sandbox = _sandbox()
        text = str(sandbox.from_string(_paid(sandbox, template)).render(**variables))
        text.encode("utf-8")  # half a character, which no tokenizer takes, is an error here
        return text
    except jinja2.TemplateError as error:
        raise LoraLabError(f"the chat template refused: {error!s:.{LONGEST_MESSAGE}}") from None
    except Exception as error:  # whatever somebody else's program may raise
        raise LoraLabError(f"the chat template failed on these messages: {type(error).__name__}: {error!s:.{LONGEST_MESSAGE}}") from None
    finally:
        _left.reset(before)


# The budget -----------------------------------------------------------------------------------------------------------------------


def _spend(work: int) -> None:
    left = _left.get()
    left[0] -= work
    if left[0] < 0:
        _refuse(f"it makes more than {MOST_WORK:,} characters, each turn of a loop and each call counted as {TURN}")


def _size(value: Any, text: bool = True, known: dict[int, int] | None = None) -> int:
    """What a value costs to write out (text=False: to make, as a container of what is there); what is in it twice counts twice."""
    if isinstance(value, (str, bytes)) and text:
        return len(value)
    if not isinstance(value, (list, tuple, dict, set, frozenset)):
        return 1 if text else ELEMENT
    known = {} if known is None else known
    if id(value) not in known:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, text, known) for part in parts)
    return known[id(value)]


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict, set, frozenset, range)) else 1


def _check_whole(*numbers: Any, bits: int) -> None:
    if all(isinstance(number, int) for number in numbers) and bits > MOST_BITS:
        _refuse(f"it computes a whole number of more than {MOST_BITS:,} bits")


def _times(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_whole(left, right, bits=left.bit_length() + right.bit_length())
    else:
        _spend(max(_size(left, isinstance(left, str)) * _count(right), _size(right, isinstance(right, str)) * _count(left)))
    return left * right


def _count(value: Any) -> int:
    return max(int(value), 0) if isinstance(value, int) else 0


def _plus(left: Any, right: Any) -> Any:
    _spend(_size(left, isinstance(left, str)) + _size(right, isinstance(right, str)))
    return left + right


def _power(left: Any, right: Any) -> Any:
    _check_whole(left, right, bits=left.bit_length() * abs(right) if isinstance(left, int) and isinstance(right, int) else 0)
    return left**right


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _pay_format(left, "%", right)
    return left % right


def _pay_format(text: str, mark: str, values: Any) -> None:
    """A format's fields may each name the same value, and a width to be filled up to."""
    inside = text.replace("{{", "").replace("}}", "")
    if re.search(r"%[^a-zA-Z%]*\*" if mark == "%" else r"\{[^{}]*:[^{}]*\{", inside):
        _refuse(f"{text!r:.60} takes the width of a field from a value")
    _spend(len(text) + text.count(mark) * _size(values) + sum(int(number) for number in re.findall(r"\d{1,12}", text)))


def _pay_method(name: str, owner: Any, values: tuple[Any, ...]) -> None:
    if name == "replace" and len(values) > 1 and isinstance(owner, str) and isinstance(values[0], str):
        _spend(owner.count(values[0]) * _length(values[1]))
    elif name == "join" and values:
        _pay_join(owner, values[0])
    if name in ("split", "rsplit") and isinstance(owner, str) and values and isinstance(values[0], str):
        _spend(ELEMENT * (owner.count(values[0]) + 1) + _length(owner))  # a mark that is there twice makes three parts, however long they are
    elif "split" in name:
        _spend(ELEMENT * _length(owner))
    _spend(TURN + _length(owner) + sum(map(_length, values)))


def _pay_join(between: Any, values: Any) -> None:
    _spend(_size(values) + _length(values) * _length(between))


# The sandbox ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def _sandbox() -> Any:
    """The environment transformers gives its templates: the same filters, functions and tags, but for those that fill up with spaces."""
    from jinja2 import pass_context, pass_environment
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what is to be learned; here it is only rendered."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(OPERATORS)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            return OPERATORS[operator](left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            builtin = isinstance(obj, (str, bytes, int, float, list, tuple))
            return not (builtin and attr in PADDING) and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            if wrapped is None or value.__name__ == "format_map":
                return None

            def formatted(*values: Any, **named: Any) -> str:
                _pay_format(value.__self__, "{", [*values, *named.values()])
                return wrapped(*values, **named)

            return formatted

        def call(__self, __context: Any, __obj: Any, *values: Any, **named: Any) -> Any:
            _pay_method(getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None), (*values, *named.values()))
            return super().call(__context, __obj, *values, **named)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], finalize=pass_context(_written))
    sandbox.filters.update(tojson=_to_json, join=pass_environment(_join))
    sandbox.filters = {name: _paid_filter(name, each) for name, each in sandbox.filters.items() if name not in FILTERS_LEFT_OUT}
    paying = {"_turns": _turns, "_joined": _joined, "_made": _made, "_copied": _copied}
    sandbox.filters |= {name: pass_context(each) for name, each in paying.items()}
    del sandbox.globals["lipsum"]
    sandbox.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form), range=_range)
    sandbox.globals["dict"] = lambda *items, **named: _made(None, dict(*items, **named))  # the type itself would let dict.update(...) through
    return sandbox


def _paid(sandbox: Any, template: str) -> Any:
    """The template's tree, in which loops, ~ and literal containers pay, and text is written as an expression is."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def through(name: str, node: Any) -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    class Paying(NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            if node.recursive:
                _refuse("a loop that calls itself is not rendered here: a macro can")
            node = self.generic_visit(node)
            node.iter = through("_turns", node.iter)
            return node

        def visit_Concat(self, node: Any) -> Any:
            node = self.generic_visit(node)
            return through("_joined", nodes.List(node.nodes, lineno=node.lineno))

        def visit_List(self, node: Any) -> Any:
            return through("_made", self.generic_visit(node))

        visit_Dict = visit_List

        def visit_Tuple(self, node: Any) -> Any:
            node = self.generic_visit(node)
            return through("_made", node) if node.ctx == "load" else node

        def visit_Getitem(self, node: Any) -> Any:
            node = self.generic_visit(node)
            if isinstance(node.arg, nodes.Slice):
                node.node = through("_copied", node.node)
            return node

        def visit_TemplateData(self, node: Any) -> Any:
            return nodes.Const(node.data, lineno=node.lineno)

    tree = Paying().visit(sandbox.parse(template))
    return tree.set_environment(sandbox)


def _turns(context: Any, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend(TURN)
        yield value


def _joined(context: Any, values: list[Any]) -> str:
    _spend(sum(map(_size, values)))
    return "".join(map(str, values))


def _made(context: Any, value: Any) -> Any:
    _spend(_size(value, text=False))
    return value


def _copied(context: Any, value: Any) -> Any:
    _spend(_length(value))
    return value


def _written(context: Any, value: Any) -> Any:
    _spend(_size(value))
    return value


def _range(*ends: int) -> range:
    numbers = range(*ends)
    _spend(min(len(numbers), MOST_WORK + 1))
    return numbers


def _paid_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is paid for by what is put into it, and by what comes out."""

    @functools.wraps(function)
    def at_once(*given: Any, **named: Any) -> Any:
        _spend(TURN)
        return function(*given, **named)

    @functools.wraps(function)
    def paid(*given: Any, **named: Any) -> Any:
        values = [*given, *named.values()]
        texts: list[Any] = [value for value in values if isinstance(value, (str, bytes, list, tuple, dict, range))]
        work = TURN + sum(map(_length if name in LOOKED_AT else _size, texts)) * (ELEMENT if name in ("list", "sum") else 1)
        if name in ("indent", "tojson", "round"):
            work *= max([1, *(abs(value) for value in values if isinstance(value, int))])
        _spend(work)
        if name == "replace" and all(isinstance(value, str) for value in texts) and len(texts) > 2:
            _spend(texts[0].count(texts[1]) * len(texts[2]))
        if name == "format" and texts:
            _pay_format(str(texts[0]), "%", values)
        result = function(*given, **named)
        _spend(_length(result))
        return result

    return at_once if name in AT_ONCE else paid


def _join(environment: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    """jinja2's, but that it looks at all parts before it joins them."""
    from jinja2.filters import make_attrgetter

    parts = [*value] if attribute is None else [*map(make_attrgetter(environment, attribute), value)]
    _pay_join(d, parts)
    return str(d).join(map(str, parts))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {"+": _plus, "*": _times, "**": _power, "%": _modulo}
