"""The prompt formats of well-known instruction models, as chat templates that a tokenizer takes.

    tokenizer.chat_template = chat_template("vicuna")

Rows, `fit`, `answers`, `perplexity` and what is saved with the model follow. A model wants to be asked in the format that it was taught in.

    alpaca        Taori et al. 2023, tatsu-lab/stanford_alpaca, README; the form that rows take without a template
    dolly         Conover et al. 2023, databrickslabs/dolly, training/consts.py
    vicuna        Chiang et al. 2023, lm-sys/FastChat, fastchat/conversation.py: vicuna_v1.1
    koala         Geng et al. 2023, young-geng/EasyLM, docs/koala.md
    baize         Xu et al. 2023, project-baize/baize-chatbot, preprocess.py
    llama-2-chat  Touvron et al. 2023, meta-llama/llama, llama/generation.py: chat_completion
    chatml        OpenAI 2023, openai/openai-python, chatml.md; SmolLM2 and Qwen were taught in it

The tokenizer's own tokens begin a text and end an answer, so that generation stops there; Dolly ended it with "### End", which its tokenizer had as
one token, and Baize with the next "[|Human|]". A system message takes the place of the words that a format begins with. Alpaca and Dolly have a
place for a row's input, the others read it below the instruction; these two knew no second turn, and here it follows in the same form.
"""

from __future__ import annotations

from ..errors import LoraLabError, did_you_mean

SYSTEM = r"""
{%- set turns = messages[1:] if messages[0]["role"] == "system" else messages -%}
{%- set words = messages[0]["content"] if messages[0]["role"] == "system" else words -%}
{%- for message in turns if message["role"] not in ("user", "assistant") -%}
    {{- raise_exception("this format has turns of user and assistant; a system message may stand before them, and there is a " + message["role"]) -}}
{%- endfor -%}
"""
INSTRUCTED = SYSTEM + r"""
{{- bos_token -}}{{- words + "\n\n" -}}
{%- for message in turns -%}
    {%- if message["role"] == "user" -%}
        {{- "### Instruction:\n" + (message["instruction"] or message["content"]) + "\n\n" -}}
        {%- if message["input"] -%}{{- given + "\n" + message["input"] + "\n\n" -}}{%- endif -%}
    {%- else -%}
        {{- "### Response:\n" + message["content"] -}}{{- eos_token -}}{%- if not loop.last -%}{{- "\n\n" -}}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "### Response:\n" -}}{%- endif -%}
"""
ALPACA = r"""
{%- set paired = ", paired with an input that provides further context" if messages[0]["input"] else "" -%}
{%- set words = "Below is an instruction that describes a task" + paired + ". Write a response that appropriately completes the request." -%}
{%- set given = "### Input:" -%}
""" + INSTRUCTED
DOLLY = r"""
{%- set words = "Below is an instruction that describes a task. Write a response that appropriately completes the request." -%}
{%- set given = "Input:" -%}
""" + INSTRUCTED
SIDES = SYSTEM + r"""
{{- bos_token -}}{{- words + gap -}}
{%- for message in turns -%}
    {%- if message["role"] == "user" -%}{{- user + " " + message["content"] + gap -}}
    {%- else -%}{{- assistant + " " + message["content"] -}}{{- eos_token -}}{{- end -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- assistant -}}{%- endif -%}
"""
VICUNA = r"""
{%- set words = "A chat between a curious user and an artificial intelligence assistant. "
              + "The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
{%- set gap, end, user, assistant = " ", "", "USER:", "ASSISTANT:" -%}
""" + SIDES
KOALA = r"""{%- set words, gap, end, user, assistant = "BEGINNING OF CONVERSATION:", " ", "", "USER:", "GPT:" -%}""" + SIDES
BAIZE = r"""
{%- set words = "The conversation between human and AI assistant." -%}
{%- set gap, end, user, assistant = "\n", "\n", "[|Human|]", "[|AI|]" -%}
""" + SIDES
LLAMA_2 = r"""{%- set words = "" -%}""" + SYSTEM + r"""
{%- set words = "<<SYS>>\n" + words + "\n<</SYS>>\n\n" if words else "" -%}
{%- for message in turns -%}
    {%- if message["role"] == "user" -%}
        {{- bos_token -}}{{- "[INST] " + ((words if loop.first else "") + message["content"]).strip() + " [/INST]" -}}
    {%- else -%}{{- " " + message["content"].strip() + " " -}}{{- eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
CHATML = r"""
{%- for message in messages -%}{{- "<|im_start|>" + message["role"] + "\n" + message["content"] + "<|im_end|>\n" -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\n" -}}{%- endif -%}
"""
CHAT_TEMPLATES = {"alpaca": ALPACA, "dolly": DOLLY, "vicuna": VICUNA, "koala": KOALA, "baize": BAIZE, "llama-2-chat": LLAMA_2, "chatml": CHATML}


def chat_template(name: str) -> str:
    """The template of a format, for a tokenizer's `chat_template`. Raises LoraLabError for a name that is none of CHAT_TEMPLATES."""
    if name not in CHAT_TEMPLATES:
        raise LoraLabError(f"chat template {name!r}: expected one of {', '.join(CHAT_TEMPLATES)}{did_you_mean(name, CHAT_TEMPLATES)}")
    return CHAT_TEMPLATES[name]
