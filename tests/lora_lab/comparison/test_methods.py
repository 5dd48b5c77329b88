"""Ways to have a model do a task, on each kind of model: what trains is what each says, memory is as measured, and what was forgotten elsewhere."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from task_tools import decoder, dialogues, encoder, instructions, jsonl, opinions, t5, workbench

from lora_lab import checkpoint, inject, models
from lora_lab.comparison import METHODS, Study, table
from lora_lab.comparison.forgetting import forgetting_probe, own_nearest, pooled
from lora_lab.comparison.methods import LoRAMethod, Method
from lora_lab.models import Pooling, embed
from prompt_tuning_lab.method import METHODS as PROMPTS

KINDS = {"decoder": decoder, "encoder": encoder, "t5": t5}
pytestmark = pytest.mark.filterwarnings("ignore:init='text' gives")  # a byte is a token here


# The methods ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_does_the_task_with_every_kind_of_model(tmp_path, kind):
    """What trains is what each says: nothing, virtual tokens, A and B, everything."""
    bench = workbench(tmp_path, KINDS[kind])
    study = Study(bench, "tiny", {**METHODS, **PROMPTS}, seeds=(0,), sweep_rows=8)
    for name in study.methods:
        study.methods = {**study.methods, name: FewChoices(study.methods[name])}
        study.run(name)
    lines = {line[0]: dict(zip(table(study, [*study.methods])[0], line, strict=True)) for line in table(study, [*study.methods])[1:]}
    assert {*lines} == {"largest class", "zero-shot", "few-shot", "LoRA", "full fine-tuning", "soft prompt"}
    head = 66 if kind == "encoder" else 0
    hidden = bench.fresh().get_input_embeddings().embedding_dim
    learner = inject(bench.learner(bench.material.train), 2, modules_to_save=["classifier"] if head else None)
    expected = {"zero-shot": 0, "few-shot": 0, "soft prompt": 3 * hidden + head,
                "LoRA": sum(p.numel() for p in learner.parameters() if p.requires_grad),
                "full fine-tuning": sum(p.numel() for p in bench.learner(bench.material.train).parameters())}  # fmt: skip
    assert {title: int(lines[title]["trained"].replace(",", "")) for title in expected} == expected
    assert int(lines["full fine-tuning"]["bytes per task"].replace(",", "")) > int(lines["LoRA"]["bytes per task"].replace(",", "")) > 0


def test_an_untaught_model_is_asked_in_the_users_own_words_too(tmp_path):
    """--template is a way like the others."""
    bench = workbench(tmp_path)
    usual = [{"words": way.words} for way in bench.reader.ways()]
    assert METHODS["zero-shot"].choices(bench) == usual
    bench.reader.ask_in("{text} Verdict:")
    assert METHODS["zero-shot"].choices(bench) == [{"words": "{text} Verdict:"}, *usual]


class FewChoices(Method):
    """A method with the first of its choices."""

    def __init__(self, method):
        self.method, self.name, self.title, self.seeded = method, method.name, method.title, method.seeded

    def choices(self, bench):
        return self.method.choices(bench)[:1]

    def teach(self, *args, **options):
        return self.method.teach(*args, **options)


@pytest.mark.parametrize(("kind", "name", "within"), [("decoder", "zero-shot", 0.08), ("decoder", "lora", 0.02), ("decoder", "full", 0.02),
                                                      ("decoder", "prompt", 0.02), ("encoder", "lora", 0.15), ("encoder", "zero-shot", 0.15),
                                                      ("t5", "lora", 0.08)])  # fmt: skip
def test_memory_is_predicted_as_it_is_measured(tmp_path, kind, name, within):
    """Masks of padding are not predicted, nor that a pooled head has no pooler: in a tiny model they are some of it, in all-MiniLM 0.6 %."""
    bench, method = workbench(tmp_path, KINDS[kind]), {**METHODS, **PROMPTS}[name]
    taught = method.teach(bench, bench.material.train, method.choices(bench)[0], 0, measure=True)
    assert taught.memory.predicted == pytest.approx(taught.memory.measured, rel=within) and taught.memory.measured > 10_000


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_model_is_written_once_to_know_its_size(tmp_path, monkeypatch, name):
    """Which is the same for every choice."""
    bench, method, written, save = workbench(tmp_path), METHODS[name], [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **given: written.append(path.name) or save(path, **given))
    taught = [method.teach(bench, bench.material.train, choice, 0) for choice in method.choices(bench)]
    file = next(each for each in written if each.endswith("model.safetensors"))
    (models.save if name == "full" else checkpoint.save)(taught[-1].model, tmp_path / "saved")
    monkeypatch.undo()
    assert {each.file_bytes for each in taught} == {(tmp_path / "saved" / file).stat().st_size}
    assert len(bench.file_bytes) == 1


def test_measuring_leaves_no_trace(tmp_path):
    bench, method = workbench(tmp_path), LoRAMethod()
    scores = [bench.reader.answered(method.teach(bench, bench.material.train, {"learning_rate": 1e-2}, 0, measure).model, bench.material.test, None)
              for measure in (False, True)]  # fmt: skip
    assert torch.equal(*scores)


def test_a_seed_decides_what_is_shown_and_how_an_adapter_begins(tmp_path):
    bench = workbench(tmp_path)
    rows = bench.material.train
    few = [METHODS["few-shot"].teach(bench, rows, {"shots": 2}, seed).way for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    begun = [METHODS["lora"].teach(bench, rows, {"learning_rate": 1e-3}, seed).model for seed in (0, 0, 1)]
    first = [next(p for name, p in model.named_parameters() if "lora_A" in name) for model in begun]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


# What was forgotten -----------------------------------------------------------------------------------------------------------


def test_the_perplexity_elsewhere_changes_with_the_weights_alone(tmp_path):
    bench = workbench(tmp_path)
    other = jsonl(tmp_path / "other.jsonl", instructions(12))
    bench.elsewhere = forgetting_probe(bench.fresh(), bench.reader.tokenizer, bench.reader, "sentiment", str(other))
    study = Study(bench, "tiny", seeds=(0,), sweep_rows=4)
    for name in ("zero-shot", "full"):
        study.methods = {**study.methods, name: FewChoices(study.methods[name])}
        study.run(name)
    before, after = (study.results.of(method=name, stage="test")[0]["elsewhere"] for name in ("zero-shot", "full"))
    assert before[0] == before[1] == after[0] != after[1] and bench.elsewhere.name == "perplexity, other.jsonl"


def test_an_encoder_is_asked_which_summary_is_a_dialogues_own(tmp_path):
    """By the vectors it was trained to make, also with a head on it, an adapter in it or a prompt before it."""
    bench = workbench(tmp_path, encoder)
    model, tokenizer = bench.fresh(), bench.reader.tokenizer
    rows = [{"dialogue": text, "summary": text} for text in ("the cat sat", "a very bad film", "good dog")]
    assert own_nearest(model, tokenizer, rows, bench.reader) == 1.0
    texts = [row["dialogue"] for row in rows]
    plain = embed(model, tokenizer, texts, pooling=Pooling(normalize=False))
    classifier = bench.learner(bench.material.train)
    torch.testing.assert_close(pooled(classifier, tokenizer, texts, bench.reader), plain, rtol=1e-4, atol=1e-5)
    assert classifier.classifier.out_features == 2  # its head is back
    changed = pooled(inject(classifier, 2, init="random"), tokenizer, texts, bench.reader)
    assert not torch.allclose(changed, plain, atol=1e-2)
    prompted = PROMPTS["prompt"].teach(bench, bench.material.train, {"share": 0.3}, 0).model
    assert not torch.allclose(pooled(prompted, tokenizer, texts, bench.reader), plain, atol=1e-3)


def long_decoder():
    return decoder(max_position_embeddings=900)


def test_other_data_is_bundled_for_every_task(tmp_path):
    for make, task, rows, name in ((encoder, "sentiment", opinions(60), "own summary nearest, dialogues"),
                                   (long_decoder, "summarization", dialogues(40), "perplexity, instructions"),
                                   (long_decoder, "instruction", instructions(40), "perplexity, reviews")):  # fmt: skip
        bench = workbench(tmp_path, make, task, rows)
        elsewhere = forgetting_probe(bench.fresh(), bench.reader.tokenizer, bench.reader, task, limit=3)
        assert elsewhere.name == name and math.isfinite(elsewhere.measure(bench.fresh()))
