"""What older libraries kept, as their own code says: differences to today's, per token and block."""

from __future__ import annotations

from typing import Any

import pytest

from memory_math import MemoryMathError, activation_formula, predict
from memory_math.versions import versions_of

MODEL = "llama-3-8b"


def per_block(transformers: str | None = None, torch: str | None = None, **request: Any) -> str:
    versions = {name: version for name, version in (("transformers", transformers), ("torch", torch)) if version}
    return str(activation_formula(MODEL, precision="bf16", versions=versions, **request)).removesuffix(" bytes per token and block")


def test_today() -> None:
    assert per_block() == "16h + 4q + 4kv + 8f + 4a + 8"
    assert per_block(attention="eager") == "16h + 8q + 8f + 6a s + 8"


@pytest.mark.parametrize("version", ["4.31", "4.37", "4.53"])
def test_before_4_54_keys_and_values_were_repeated_to_the_width_of_the_queries(version: str) -> None:
    assert per_block(version) == "16h + 8q + 8f + 4a + 8"


def test_before_4_31_norms_kept_their_input_and_scores_their_bound() -> None:
    """4.28.1: variance from a float32 copy, then the 16-bit input times rsqrt; torch.max over the masked scores."""
    assert per_block("4.28", attention="eager") == "20h + 8q + 8f + 8a s + 8"


def test_before_pytorch_2_2_every_norms_mean_kept_its_input() -> None:
    """PyTorch issue 109876: 4 bytes more for each of h, twice a block."""
    assert per_block(torch="2.1") == "24h + 4q + 4kv + 8f + 4a + 8"
    assert per_block(torch="2.1", method="frozen") == "16h + 4q + 4kv + 6f + 4a + 8"


def test_before_pytorch_1_11_softmax_kept_its_input() -> None:
    assert "10a s" in per_block(torch="1.10", attention="eager") and "6a s" in per_block(torch="1.11", attention="eager")


def test_what_softmax_kept_stayed_until_backward() -> None:
    """Input and result are one operation's: both are there after the forward pass, not only counted on the way."""
    request = {"precision": "fp32", "sequence_length": 256, "attention": "eager", "device": "cpu"}
    old, new = (predict("bert-base-uncased", versions=versions, **request) for versions in ({"torch": "1.10"}, None))
    kept = old.saved_bytes - new.saved_bytes
    assert kept >= 12 * 4 * 12 * 256 * 256  # blocks x bytes x heads x s x s
    alive = [footprint.phases["after forward"] - footprint.phases["load"] for footprint in (old, new)]
    gradients = 4 * old.trained  # which stayed as well
    assert alive[0] - alive[1] - gradients == pytest.approx(kept, rel=0.01)


def test_gradients_stayed_through_the_next_forward_before_pytorch_2() -> None:
    """zero_grad(set_to_none=True) is the default since 2.0; before, gradients were filled with zeros and stayed."""
    old, new = (predict("smollm2-135m", sequence_length=64, versions={"torch": version}) for version in ("1.13", "2.0"))
    assert old.phases["forward"] - new.phases["forward"] == pytest.approx(4 * 134_515_008, rel=0.01)


def test_before_pytorch_2_an_optimizer_on_cuda_took_one_tensor_after_another() -> None:
    """pytorch pull request 92306; issue 97712 has 5,515 MiB with 1.13.1 and 6,802 with 2.0.0 for one script."""
    old, new = (predict("smollm2-135m", sequence_length=64, versions={"torch": version}) for version in ("1.13", "2.0"))
    assert (old.request["optimizer_implementation"], new.request["optimizer_implementation"]) == ("for-loop", "foreach")
    assert new.phases["optimizer step"] - old.phases["optimizer step"] > 2 * 134_515_008
    chosen = predict("smollm2-135m", sequence_length=64, versions={"torch": "1.13"}, optimizer_implementation="foreach")
    assert chosen.phases["optimizer step"] == new.phases["optimizer step"]


def test_the_copy_of_the_attentions_output_comes_with_4_48_and_goes_with_4_56() -> None:
    saved = {
        version: predict(MODEL, precision="bf16", sequence_length=1024, device="cuda", versions={"transformers": version}).saved_bytes
        for version in ("4.47", "4.48", "4.55", "4.56")
    }
    copy = 2 * 4096 * 1024 * 32
    assert saved["4.48"] - saved["4.47"] == copy
    assert saved["4.48"] - saved["4.55"] == 2 * 2 * (4096 - 1024) * 1024 * 32  # 4.54 stopped repeating k and v
    assert saved["4.55"] - saved["4.56"] == copy


def test_the_old_loss_made_two_float32_copies_of_the_logits() -> None:
    """Before 4.45: logits.float(), and the shifted logits laid out anew, each as large as the log-softmax that is kept."""
    request = {"precision": "bf16", "sequence_length": 512, "gradient_checkpointing": True}
    new, old = (predict("llama-3.2-1b", versions=versions, **request) for versions in (None, {"transformers": "4.40"}))
    assert old.request["loss"] == "hf_legacy" and new.request["loss"] == "cross_entropy"
    kept = old.phases["after forward"] - new.phases["after forward"]  # the returned logits are float32; their copy is gone with the loss
    assert kept == pytest.approx(2 * 512 * 128_256, rel=0.02)
    assert old.phases["loss"] - new.phases["loss"] == pytest.approx(2 * 512 * 128_256, rel=0.02)
    assert predict("llama-3.2-1b", loss="hf_legacy", **request).phases["loss"] == old.phases["loss"]


def test_a_version_is_the_same_with_and_without_zeros_at_its_end() -> None:
    for library in ("torch", "bitsandbytes"):
        assert [versions_of({library: version}).before(library, "2.0") for version in ("1.13", "2", "2.0", "2.0.0", "2.0.1")] == [True] + 4 * [False]


def test_a_bitsandbytes_of_two_digits_is_newer_than_one_of_one() -> None:
    saved = {
        version: predict(MODEL, method="qlora", precision="bf16", sequence_length=64, versions={"bitsandbytes": version}).saved_bytes
        for version in ("0.41.1", "0.43.1", "0.43.2", "0.100")
    }
    assert saved["0.41.1"] == saved["0.43.1"] > saved["0.43.2"] == saved["0.100"]


def test_a_library_whose_older_versions_are_not_modelled_is_refused() -> None:
    """Accepted and without effect would be a promise that nobody keeps."""
    with pytest.raises(MemoryMathError, match="versions names 'peft', expected torch, transformers, bitsandbytes"):
        predict("llama-2-7b", method="lora", precision="bf16", versions={"peft": "0.10"})
