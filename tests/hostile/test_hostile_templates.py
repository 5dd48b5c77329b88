"""A chat template is somebody else's program: it may not reach out, count for ever, or make much out of little."""

from __future__ import annotations

import json

import pytest
from cell import MIB, confined
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_workshop import chat_tokenizer

from lora_lab import LoraLabError, models
from lora_lab.data.chat_templates import CHAT_TEMPLATES
from lora_lab.models import chat_sandbox
from lora_lab.models.chat_sandbox import render

MESSAGES = [{"role": "user", "content": "hi"}]
COUNTING = [
    "{% for i in range(10 ** 9) %}{% endfor %}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n < 99 %}{{ m(n + 1) }}{{ m(n + 1) }}{% endif %}{% endmacro %}{{ m(0) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}", "{{ range(99999999) | map('string') | list | length }}",
    "{% for i in range(1000000) %}x{% endfor %}",
]  # fmt: skip
GROWING = [
    "{{ 'x' * 10 ** 12 }}", "{% set x = 'xx' %}" + "{% set x = x ~ x %}" * 60, "{% set x = 'xx' %}" + "{% set x = x + x %}" * 60,
    "{% set x = [1, 2] %}" + "{% set x = x + x %}" * 60, "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{% set y = [1] %}" + "{% set y = [y, y] %}" * 60 + "{{ x == y }}",
    "{% set x = (1,) %}" + "{% set x = (x, x) %}" * 60, "{% set x = 1 %}" + "{% set x = {'a': x, 'b': x} %}" * 60, "{{ [1] * 10 ** 12 }}",
    "{% set x = 'xy' %}" + "{% set x = x | replace('', x) %}" * 9, "{% set x = 'xy' %}" + "{% set x = x.replace('x', x) %}" * 60,
    "{% set x = 'xy' %}" + "{% set x = x | join(x) %}" * 9, "{% set x = 'xy' %}" + "{% set x = x.join([x, x, x]) %}" * 60,
    "{{ '%999999999999d' % 1 }}", "{{ '%*d' % (10 ** 12, 1) }}", "{{ '{:>999999999999}'.format(1) }}", "{{ '{:{}}'.format(1, 10 ** 12) }}",
    "{{ '%999999999999d' | format(1) }}", "{{ ('%s' * 10000) % (('x' * 100000,) * 10000) }}", "{{ ('{0}' * 100000).format('x' * 100000) }}",
    "{{ 'x'.center(10 ** 12) }}", "{{ 'x'.ljust(10 ** 12) }}", "{{ 'x'.zfill(10 ** 12) }}", "{{ '\t'.expandtabs(10 ** 12) }}",
    "{{ 'x' | center(10 ** 12) }}",
    "{{ (1).to_bytes(10 ** 12, 'big') }}", "{{ messages | tojson(indent=10 ** 12) }}", "{{ ('x\n' * 100000) | indent(10 ** 6) }}",
    "{{ lipsum(10 ** 9) }}",
    "{{ 'x' | wordwrap(1, wrapstring='y' * 10 ** 8) }}", "{{ [1] | batch(10 ** 12, 'x') | list }}", "{{ 'x'.translate({120: 'y' * 10 ** 6}) }}",
    "{{ 9 ** (9 ** 9) }}", "{% set x = 9 %}" + "{% set x = x * x %}" * 60, "{{ 1.5 | round(10 ** 9, 'ceil') }}", "{{ 'x,' * 9000000 | string }}",
    "{% set x %}{% for i in range(1000) %}" + "text" * 30_000 + "{% endfor %}{% endset %}",
    "{% for i in range(1000) %}{{ '" + "x" * 100_000 + "' }}{% endfor %}",
    "{% set ns = namespace(t='xx') %}{% for i in range(99) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "{{ ('a b ' * 9000000).split(' ') | length }}", "{{ ('a ' * 2400000).split(' ') | length }}", "{{ ('a ' * 2400000).split() | length }}",
    "{% set x = 'y' * 9999999 %}{% set z = [" + "x[1:], " * 1000 + "] %}",
    "{% set x = 'y' * 9999999 %}{{ x[1:] == x[2:] or x[3:] == x[4:] or x[5:] }}",
    "{% set x = 'y' * 99999 %}{{ range(99999) | map('replace', '1', x) | join }}", "{{ ('x' * 5000000).encode('utf-32') }}",
]  # fmt: skip
REACHING = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ self.__init__.__globals__ }}", "{{ range.__globals__ }}", "{{ raise_exception.__code__ }}",
    "{{ strftime_now.__closure__ }}", "{{ dict.__globals__ }}", "{{ messages.append(1) }}", "{{ messages[0].update(x=1) }}",
    "{{ messages[0].pop('role') }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends '../../x' %}", "{{ '{0.__class__}'.format(1) }}",
    "{{ '{a.__init__}'.format(a=1) }}",
    "{{ '{0.__class__}' | format(1) }}{{ x.__class__ }}", "{{ (messages | attr('__class__')).x }}",
    "{{ messages | map(attribute='__class__') | list | first + 1 }}",
    "{{ cycler.__init__.__globals__ }}", "{{ namespace.__init__.__globals__ }}", "{{ joiner.__call__.__globals__ }}", "{{ loop.__class__ }}",
    "{% for x in messages %}{{ loop.__init__.__globals__ }}{% endfor %}", "{% macro m() %}{% endmacro %}{{ m.__globals__ }}{{ m._func.__globals__ }}",
    "{{ 'x'.format_map(messages[0]).__class__ }}", "{{ (1).__class__.__base__ }}", "{{ ().__class__ }}{{ {}.__class__ }}",
    "{{ messages | sort(attribute='x.__class__') }}{{ 1.x.y }}",
]  # fmt: skip


@pytest.mark.parametrize("templates", [COUNTING, GROWING, REACHING], ids=["counting", "growing", "reaching"])
def test_what_a_template_must_not_do_is_refused_within_memory_and_work(templates, tmp_path):
    (tmp_path / "chosen").mkdir()

    def work(case):
        for template in templates:
            given = [dict(message) for message in MESSAGES]
            with case(template[:200]):
                try:
                    text = render(template, messages=given)
                except LoraLabError as error:
                    assert str(error).startswith("the chat template ") and len(str(error)) < 1000
                else:
                    assert templates is REACHING and text == "", "it was rendered"  # jinja2's word for what may not be seen
            assert given == MESSAGES

    told = confined(tmp_path / "chosen", work)
    assert told.cases == len(templates)


def test_the_bound_is_told():
    with pytest.raises(LoraLabError, match="refused: it makes more than 50,000,000 characters, each turn of a loop and each call counted as 100"):
        render("{% for i in range(10 ** 6) %}{% endfor %}")


def test_a_template_of_megabytes_is_refused_before_it_is_compiled(tmp_path):
    """Compiled, it would take a GiB."""
    template = "{% set x %}{% endset %}" * 80_000

    def work(case):
        with case("2 MB"), pytest.raises(LoraLabError, match="has 1,840,000 characters, more than 200,000"):
            render(template)

    assert confined(tmp_path / "chosen", work).peak_bytes < 20 * MIB


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_conversation_of_a_million_characters_is_rendered(name):
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"number {n} " + "word " * 1000} for n in range(220)]
    text = render(CHAT_TEMPLATES[name], messages=turns, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    assert len(text) > 1_000_000 and text.count("number") == 220


def test_templates_that_gather_text_have_room_for_long_conversations():
    """Qwen's and DeepSeek's ways: split at a mark in every turn, strip, a namespace that gathers."""
    template = ("{% set ns = namespace(text='', last=messages|length - 1) %}{% for m in messages %}{% set content = m.content %}"
                "{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
                "{% set ns.text = '<' ~ m.role ~ '>' ~ content | trim %}{{ ns.text + '\n' }}"
                "{% if loop.last %}{{ m | tojson }}{% endif %}{% endfor %}")
    turns = [{"role": "user", "content": "<think>much</think>\n" + "x " * 500} for _ in range(1000)]
    assert len(render(template, messages=turns)) > 1_000_000


# The steps of Qwen3's: the last question is looked for from the end, and what was thought is cut out of each answer
THINKING = (
    "{% set ns = namespace(multi=true, last=messages|length - 1) %}{% for m in messages[::-1] %}{% set index = (messages|length - 1) - loop.index0 %}"
    "{% if ns.multi and m.role == 'user' and m.content is string and not (m.content.startswith('<tool_response>') and "
    "m.content.endswith('</tool_response>')) %}{% set ns.multi = false %}{% set ns.last = index %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "{% if m.role == 'user' %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>' + '\n' }}{% else %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + ('\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' if loop.index0 > ns.last else '\n') + content }}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
)  # fmt: skip


@pytest.mark.parametrize(("count", "content"), [
    (20_000, "<think>ab</think> cde"), (1_000, "<think>\n" + "word " * 100 + "</think>\n" + "word " * 100),
    (2, "<think>\n" + "word " * 100_000 + "</think>\n" + "word " * 100_000),
], ids=["20,000 messages", "1,000 messages", "2 messages"])  # fmt: skip
def test_templates_that_cut_out_thoughts_have_room_for_long_conversations(count, content):
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n in range(count)]
    assert len(content) == 21 or len(content) * count >= 1_000_000
    assert render(THINKING, messages=turns).count("<|im_end|>") == count


@pytest.mark.parametrize(
    ("template", "text"),
    [("{{ '**Note** of %d: %s' % (2024, 'x') }}", "**Note** of 2024: x"), ("{{ '{a}: {b:>4}'.format(a=1, b=2) }}", "1:    2"),
     ("""{{ '{{"a": {}}}'.format(3) }}""", '{"a": 3}'), ("{{ '%05.1f' | format(2) }}", "002.0"), ("{{ ['a', 'b'] | join(', ') }}", "a, b"),
     ("{{ messages | map(attribute='role') | join('-') }}", "user"), ("{{ 'a\nb' | indent(2) }}", "a\n  b"), ("{{ 2 ** 10 }}{{ 3 * 'ab' }}",
     "1024ababab"),
     ("{{ 'a-b'.replace('-', '+') }}{{ 'a' ~ 1 ~ none }}", "a+ba1None"), ("{{ [1] + [2] }}{{ (1, 2) }}{{ {'a': 1} }}", "[1, 2](1, 2){'a': 1}")],
)  # fmt: skip
def test_what_honest_templates_do_is_done(template, text):
    assert render(template, messages=MESSAGES) == text


def test_a_refusal_leaves_no_mark_on_the_next_template():
    for _ in range(3):
        with pytest.raises(LoraLabError):
            render(COUNTING[1])
        assert render("{% for i in range(3) %}{{ i }}{% endfor %}") == "012"


PARTS = st.sampled_from(["{{ ", " }}", "{% ", " %}", "for x in ", "messages", "set x = ", "x", " ~ ", " * ", "10 ** 9", "endfor", "'", "|", "tojson",
                         "(", ")",
                         "[", "]", "range", "if ", "endif", ".", "__class__", "macro m()", "endmacro", "m()", "{#", "#}", "recursive", "\x00",
                         "\ud800"])  # fmt: skip


def test_any_text_as_a_template(tmp_path):
    (tmp_path / "chosen").mkdir()

    def work(case):
        chat_sandbox.MOST_WORK = 1_000_000  # in the cell

        @settings(max_examples=300, database=None, derandomize=True)
        @given(st.lists(PARTS | st.text(max_size=5), max_size=14).map("".join))
        def tried(template):
            with case(repr(template)):
                assert isinstance(render(template, messages=MESSAGES), str)

        tried()

    told = confined(tmp_path / "chosen", work)
    assert 0 < told.refused < told.cases


@pytest.mark.parametrize(
    ("name", "value"),
    [("chat_template", [{"name": "default"}]), ("chat_template", [3]), ("chat_template", [{"name": "default", "template": 3}]), ("chat_template",
    {"a": 1})],
)
def test_a_template_that_is_no_text_is_none(name, value, tmp_path):
    chat_tokenizer().save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, name: value}))
    assert models.Tokenizer.from_folder(tmp_path).chat_template is None


@pytest.mark.parametrize("ids", ["2", 1.5, [[1]], {"a": 1}, True, [None]])
def test_ids_that_end_a_text_are_numbers(ids, tmp_path):
    chat_tokenizer().save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(LoraLabError, match="eos_token_id=.*expected a token's id"):
        models.Tokenizer.from_folder(tmp_path)


def test_a_template_file_that_is_no_text_is_named(tmp_path):
    chat_tokenizer().save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(LoraLabError, match="chat_template.jinja is not UTF-8"):
        models.Tokenizer.from_folder(tmp_path)


def test_memory_of_the_largest_text_a_template_may_make(tmp_path):
    (tmp_path / "chosen").mkdir()

    def work(case):
        with case("as much as is allowed"):
            assert len(render("{{ 'x' * 24000000 }}")) == 24_000_000

    assert confined(tmp_path / "chosen", work).peak_bytes < 200 * MIB
