"""The tokenizer's files and its chat templates, against transformers', and what a template must not do."""

from __future__ import annotations

import json
import shutil
from datetime import datetime

import pytest
import tokenizers
import transformers
from llama_tools import CHATML, TRICKY, tokenizer

from lora_lab import LoraLabError
from lora_lab.models import Tokenizer
from lora_lab.models.tokenizer import render

CHAT = [
    {"role": "system", "content": "Be brief. <b>\"quoted\"</b> é"},
    {"role": "user", "content": "  Hi!\n"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Again?"},
]
TEMPLATES = {
    "ChatML": CHATML,
    # HuggingFaceTB/SmolLM2-135M-Instruct
    "SmolLM2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # meta-llama/Llama-2-7b-chat-hf
    "Llama 2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }};"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ {'b': 1, 'a': 'é<&>'} | tojson(sort_keys=True, ensure_ascii=True) }}"
    "{{ [1, 2] | tojson(separators=(',', ':')) }}{{ {'é': 1} | tojson(true, 1) }}",
    "the date": "{{ strftime_now('%Y-%m-%d') }}",
    "whitespace": "{%- for m in messages -%}\n    {% if true %}\n  {{ m.content | trim }}\n  {% endif %}\n{% endfor %}\nend\n",
    "tools": "{% if tools is not none %}TOOLS{% endif %}{% if documents is none %}no documents{% endif %}"
    "{% if nothing is not defined %}undefined{% endif %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ dict(a=1).items() | list }}",
    "macro": "{% macro say(m) %}[{{ m.role | upper }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}"
    "{{ bos_token }}{{ pad_token }}{{ none_such }}",
}


def saved(folder, template, **changes):
    """A tokenizer's folder with one of the templates; both libraries read it."""
    tokenizer(template).save(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


# Templates --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_renders_as_in_transformers(tmp_path, template, generation_prompt):
    mine, reference = saved(tmp_path, TEMPLATES[template])
    for chat in (CHAT, CHAT[1:], CHAT[1:2]):
        options = {"tokenize": False, "add_generation_prompt": generation_prompt}
        text = mine.apply_chat_template(chat, **options)
        assert text == reference.apply_chat_template(chat, **options)
    assert text or template in ("loop controls", "generation")
    ids = mine.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=generation_prompt)
    assert ids == mine.encode(mine.apply_chat_template(CHAT, add_generation_prompt=generation_prompt), add_special_tokens=False)
    assert ids == reference.apply_chat_template(CHAT, tokenize=True, return_dict=False, add_generation_prompt=generation_prompt)


def test_the_date_is_todays():
    assert render(TEMPLATES["the date"]) == datetime.now().strftime("%Y-%m-%d")


def test_a_template_that_refuses_says_why():
    mine = tokenizer(TEMPLATES["Llama 2"])
    with pytest.raises(LoraLabError, match="chat template refused: Conversation roles must alternate"):
        mine.apply_chat_template([CHAT[2]])


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.__class__.__init__.__globals__ }}", "{{ raise_exception.__globals__['sys'] }}",
     "{{ strftime_now.__globals__.os }}", "{{ ''['__class__']['__mro__'] }}", "{{ (''|attr('__class__')).__mro__ }}",
     "{{ '{0.__class__.__mro__}'.format('') }}", "{{ lipsum.__globals__['os'].popen('id').read() }}", "{{ cycler.__init__.__globals__.os }}",
     "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}", "{{ messages.append({}) }}", "{{ messages[0].update(role='x') }}",
     "{{ dict.update(messages[0], {'role': 'x'}) }}", "{{ messages.clear() }}"],
)  # fmt: skip
def test_the_sandbox_holds(template):
    """A template comes with a model: it is somebody else's program."""
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(LoraLabError, match="chat template"):
        tokenizer(template).apply_chat_template(messages)
    assert messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "template",
    ["{% if %}", "{{ unclosed", "{{ messages[0].content + 1 }}", "{{ 1 / 0 }}", "{% for i in range(10 ** 9) %}{% endfor %}", "{{ none_such.x.y }}",
     "{{ [] | first + 1 }}", "{% include 'x' %}", "{{ 'a' * {} }}"],
)  # fmt: skip
def test_whatever_a_template_raises_is_one_error_of_ours(template):
    with pytest.raises(LoraLabError, match="chat template"):
        tokenizer(template).apply_chat_template(CHAT)


def test_no_template_is_an_error_that_says_what_to_do():
    with pytest.raises(LoraLabError, match="no chat template.*plain prompts"):
        tokenizer(None).apply_chat_template(CHAT)


@pytest.mark.parametrize(
    ("value", "expected"),
    [([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}], "D"), ([{"name": "tool_use", "template": "T"}], None),
     (None, None)],
)  # fmt: skip
def test_of_several_named_templates_the_default_one_is_taken(tmp_path, value, expected):
    mine, _ = saved(tmp_path, None, chat_template=value)
    assert mine.chat_template == expected


def test_a_template_in_its_own_file_wins(tmp_path):
    tokenizer(CHATML).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("from the file: {{ messages[0].content }} é", encoding="utf-8")
    for words in (Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert words.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "from the file: x é"


# Files --------------------------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_again_by_us_and_by_transformers(tmp_path):
    words = tokenizer()
    words.stop_ids = frozenset({0, 2})
    words.save(tmp_path)
    again, reference = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TRICKY:
        ids = words.encode(text)
        assert again.encode(text) == reference.encode(text) == ids
        assert again.decode(ids) == words.decode(ids) == reference.decode(ids, skip_special_tokens=True), text
    assert again.decode(again.encode("a<|im_end|>"), skip_special_tokens=False) == "a<|im_end|>"
    assert (again.special, again.chat_template, again.stop_ids) == (words.special, words.chat_template, words.stop_ids)
    assert (again.eos_token_id, again.pad_token_id, again.bos_token_id) == (reference.eos_token_id, reference.pad_token_id, reference.bos_token_id)
    assert len(again) == again.vocab_size == len(reference)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [0, 2]


def test_saving_over_older_files_leaves_no_contradiction(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("an older one")
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": 9}')
    words = tokenizer()
    words.stop_ids = frozenset({2})
    words.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert (again.chat_template, again.stop_ids) == (CHATML, {2})
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"temperature": 0.5, "eos_token_id": [2]}


def test_special_tokens_may_be_dicts_or_null_and_flags_are_not_tokens(tmp_path):
    """transformers 4 writes {"content": ..., "lstrip": ...}."""
    tokenizer().save(tmp_path)
    changes = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": None, "add_bos_token": True}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    mine = Tokenizer.from_folder(tmp_path)
    assert mine.special == {"eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    assert (mine.eos_token_id, mine.bos_token_id) == (2, None)


def test_special_tokens_come_from_the_old_map_too(tmp_path):
    tokenizer(None).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["x"]}')
    assert Tokenizer.from_folder(tmp_path).special == {"eos_token": "<|im_end|>"}


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [({"eos_token_id": [2, 0]}, {"eos_token_id": 1}, {2, 0}), ({"eos_token_id": 0}, {}, {0, 2}), (None, {"eos_token_id": 1}, {1, 2}),
     (None, None, {2})],
)  # fmt: skip
def test_what_ends_a_generation_comes_from_every_file_that_says_so(tmp_path, generation, config, expected):
    tokenizer().save(tmp_path)
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    assert Tokenizer.from_folder(tmp_path).end_ids == expected


def test_without_any_special_token_padding_is_zero_and_nothing_ends(tmp_path):
    words = Tokenizer(tokenizer().backend)
    assert (words.pad_token_id, words.eos_token_id, words.end_ids) == (0, None, frozenset())


def test_truncation_and_padding_left_in_the_file_do_not_act(tmp_path):
    """A tokenizer saved after a call with truncation=True remembers it; every later text would be cut without a word."""
    words = tokenizer()
    words.backend.enable_truncation(3)
    words.backend.enable_padding(length=8)
    words.save(tmp_path)
    text = "the quick brown fox jumps over the lazy dog"
    assert len(words.encode(text)) == 8
    mine, reference = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert mine.encode(text) == reference.encode(text)
    assert mine.decode(mine.encode(text)) == text
    assert len(mine.encode("a")) == 1


def test_a_folder_without_tokenizer_json_has_no_tokenizer(tmp_path):
    assert Tokenizer.from_folder(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("tokenizer.json", "{", "tokenizer.json cannot be read"), ("tokenizer.json", '{"model": {"type": "Unheard"}}', "tokenizer.json cannot be read"),
     ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"), ("generation_config.json", "x", "generation_config.json is not JSON"),
     ("special_tokens_map.json", "", "special_tokens_map.json is not JSON")],
)  # fmt: skip
def test_a_broken_file_is_named(tmp_path, name, text, message):
    tokenizer().save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(LoraLabError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_json_is_enough(tmp_path):
    tokenizer().save(tmp_path / "whole")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "whole" / "tokenizer.json", tmp_path / "alone")
    words = Tokenizer.from_folder(tmp_path / "alone")
    assert words.encode("the dog") == tokenizer().encode("the dog")
    assert (words.special, words.chat_template, words.end_ids) == ({}, None, frozenset())


@pytest.mark.parametrize("model", ["Unigram", "BPE"])
def test_blanks_before_punctuation_are_cleaned_up_where_the_config_says_so_and_never_of_bpe(tmp_path, model):
    """transformers wrote clean_up_tokenization_spaces=true into many configurations; T5's summaries are full of " ."."""
    words = ["<unk>", "▁It", "▁is", "▁good", "▁.", "▁do", "▁n't", "▁,", "▁we", "▁'ve"]
    made = {"Unigram": lambda: tokenizers.models.Unigram([(word, -1.0) for word in words], unk_id=0),
            "BPE": lambda: tokenizers.models.BPE({word: place for place, word in enumerate(words)}, [], unk_token="<unk>")}  # fmt: skip
    backend = tokenizers.Tokenizer(made[model]())
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    for cleans in (True, False):
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": cleans}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        ours, theirs = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert ours.decode(range(1, 10)) == theirs.decode(list(range(1, 10)))
        assert (" ." in ours.decode([3, 4])) == (model == "BPE" or not cleans)
        (tmp_path / "again").mkdir(exist_ok=True)
        ours.save(tmp_path / "again")
        assert Tokenizer.from_folder(tmp_path / "again").decode([3, 4]) == ours.decode([3, 4])
