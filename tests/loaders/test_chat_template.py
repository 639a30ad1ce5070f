from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from losart.errors import CheckpointError, PromptError
from losart.loaders.chat_template import ChatTemplate, read_chat_template
from losart.loaders.tokenizer import read_tokenizer

HELLO = [{"role": "user", "content": "hello"}]


def render(source, messages=HELLO, add_generation_prompt=True, **special_tokens):
    return ChatTemplate(source, Path("x.jinja"), special_tokens).render(messages, add_generation_prompt)


def test_chatml(tiny_checkpoint):
    template = read_chat_template(tiny_checkpoint, {})
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    assert template.render(messages, add_generation_prompt=False) == text
    assert template.render(messages) == text + "<|im_start|>assistant\n"


def test_special_tokens_are_variables():
    assert render("{{ bos_token }}|{{ eos_token }}", bos_token="<s>") == "<s>|"


def test_blocks_are_trimmed():
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_names_that_templates_expect():
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "hello"}]'
    assert render("{{ '<é>' | tojson }}") == '"<é>"'
    assert render("{{ {'a': 1} | tojson(indent=2) }}") == '{\n  "a": 1\n}'
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    assert render("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}") == "2"
    assert render("{{ tools is none }}{{ documents is none }}") == "TrueTrue"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "hello!"


def test_further_keys_of_messages_reach_the_template():
    assert render("{{ messages[0].calls[0].name }}", [HELLO[0] | {"calls": [{"name": "f"}]}]) == "f"


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ("hello", "list of dicts"),
        ({"role": "user", "content": "x"}, "list of dicts"),
        (None, "list of dicts"),
        ([], "not empty"),
        (["hello"], r"messages\[0\] must be a dict"),
        ([{"content": "x"}], r"messages\[0\]\['role'\] must be a string, not None"),
        ([*HELLO, {"role": "user"}], r"messages\[1\]\['content'\] must be a string"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "'content'.* must be a string"),
        ([HELLO[0] | {"extra": object()}], "JSON data"),
    ],
)
def test_bad_messages(messages, what):
    with pytest.raises(PromptError, match=what):
        render("{{ messages }}", messages)


def test_template_that_rejects_the_messages():
    with pytest.raises(PromptError, match=r"x\.jinja: .*rejects the messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ ", "{% nosuchtag %}", "{% for x in y %}", "{{ 1 | nofilter }}"]
)
def test_template_with_a_syntax_error(source):
    with pytest.raises(CheckpointError, match=r"x\.jinja: the chat template is not valid"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ ''['__class__']['__base__'] }}",
        "{{ ('' | attr('__class__')).mro() }}",
        "{{ '{0.__class__.__base__}'.format(messages) }}{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ self._TemplateReference__context.environment.loader.x }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_template_that_reaches_out_of_the_sandbox(source):
    with pytest.raises(CheckpointError, match=r"x\.jinja: the chat template fails"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**12 }}",
        "{{ 10**12 * [0] }}",
        "{{ 9 ** (9**9) }}",
        "{% for i in range(10**12) %}{% endfor %}",
        "{% for i in range(9999) %}{% for i in range(9999) %}0123456789{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_template_that_exhausts_memory(source):
    with pytest.raises(CheckpointError, match=r"x\.jinja: the chat template"):
        render(source)


def test_ordinary_arithmetic_still_works():
    assert (
        render("{{ 3 * 4 }} {{ 2**10 }} {{ '-' * 3 }} {{ 1.5 * 2 }} {{ 2 ** -1 }}") == "12 1024 --- 3.0 0.5"
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("A", "A"),
        ([{"name": "tool_use", "template": "B"}, {"name": "default", "template": "A"}], "A"),
        ([{"name": "tool_use", "template": "B"}], None),
        ([], None),
    ],
)
def test_template_of_tokenizer_config(tmp_path, value, expected):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    template = read_chat_template(tmp_path, {})
    assert (template and template.source) == expected


def test_file_wins_over_tokenizer_config(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "A"}')
    (tmp_path / "chat_template.jinja").write_text("B")
    assert read_chat_template(tmp_path, {}).render(HELLO) == "B"


def test_no_template(tmp_path):
    assert read_chat_template(tmp_path, {}) is None


@pytest.mark.parametrize("value", [3, {"default": "A"}, ["A"], [{"name": "default", "template": 3}]])
def test_malformed_template_entry(tmp_path, value):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template must be"):
        read_chat_template(tmp_path, {})


def test_template_file_that_is_not_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not UTF-8"):
        read_chat_template(tmp_path, {})


def test_opening_a_checkpoint_does_not_import_jinja(tiny_checkpoint):
    code = "import sys, losart.loaders as l; l.open_checkpoint(sys.argv[1]); print('jinja2' in sys.modules)"
    command = [sys.executable, "-c", code, str(tiny_checkpoint)]
    assert subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout == "False\n"


QWEN_LIKE = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content.split('</think>')[-1].lstrip('\\n') }}
        {{- eos_token + '\\n' + (loop.index0 == ns.last)|tojson }}
    {%- endif %}
{%- endfor %}
{%- if tools is none and add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@pytest.mark.parity
@pytest.mark.parametrize("source", [None, QWEN_LIKE], ids=["chatml", "qwen-like"])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_equals_transformers(make_checkpoint, source, generation_prompt):
    transformers = pytest.importorskip("transformers")
    directory = make_checkpoint()
    if source:
        (directory / "chat_template.jinja").write_text(source)
    messages = [
        {"role": "system", "content": "Be <brief> & 'kind'.\n"},
        {"role": "user", "content": "ünï <|im_end|> {{ 1 }}"},
        {"role": "assistant", "content": "<think>hm</think>\n\nyes"},
        *HELLO,
    ]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    template = read_chat_template(directory, read_tokenizer(directory).special_tokens)
    assert template.render(messages, generation_prompt) == expected


def test_templates_are_told_of_tools(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    told = ChatTemplate("{{ tools | tojson if tools is not none else 'no tools' }}", tmp_path)
    assert told.takes_tools
    assert told.render(HELLO) == "no tools"
    assert json.loads(told.render(HELLO, tools=tools)) == tools
    with pytest.raises(PromptError, match="tools must hold only JSON data"):
        told.render(HELLO, tools=[{"function": object()}])
    assert not ChatTemplate("{% set tools = 1 %}{{ messages[0].content }}", tmp_path).takes_tools
    with pytest.raises(CheckpointError, match="not valid Jinja"):
        ChatTemplate("{% for %}", tmp_path).takes_tools  # noqa: B018
