"""A folder with a tiny model, rows and an adapter, made once; each test gets its own copy."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import CONTEXT, Shop
from tiny_workshop import chat_tokenizer, our_llama, text_rows

from lora_lab.models import loading


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    torch.manual_seed(0)
    shop = Shop(tmp_path_factory.mktemp("shop"))
    loading.save(our_llama(max_position_embeddings=CONTEXT), shop.model, chat_tokenizer())
    shop.rows.write_text("\n".join(json.dumps(row) for row in text_rows()))
    assert shop.finetune() == 0
    return shop


@pytest.fixture
def shop(finished, tmp_path, capsys):
    capsys.readouterr()
    return finished.copied(tmp_path / "shop")
