"""The README's table of features: what it says of ours is held by tests that exist, and some of what it says of PEFT by PEFT itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORKSHOP = ("models", "data", "training", "commands", "tasks", "comparison", "__main__.py", "demo.py", "version.py")

FEATURES = {  # line of the table -> the tests that hold what it says of ours
    "which models": ["lora_lab/test_peft_families.py::test_peft_computes_what_we_save"],
    "the model keeps its class": ["lora_lab/test_traps.py::test_a_model_is_still_known_by_its_class_and_its_forward_by_its_arguments"],
    "the base keeps its keys": ["lora_lab/test_layers.py::test_identity_keys_hooks_isinstance_and_a_subclass_forward_survive"],
    "`nn.Linear`": ["lora_lab/test_layers.py::test_forward_is_the_papers_equation_3"],
    "transformers' `Conv1D`": ["lora_lab/test_layers.py::test_conv1d_is_recognised_without_importing_transformers"],
    "`nn.Embedding`": ["lora_lab/test_kinds.py::test_an_adapted_layer_is_the_layer_with_the_dense_update"],
    "embeddings that multiply (Gemma's)": ["lora_lab/test_traps.py::test_an_embedding_that_scales_what_it_looks_up_scales_the_update"],
    "`nn.Conv1d`, `2d`, `3d`": ["lora_lab/test_kinds.py::test_an_adapted_layer_is_the_layer_with_the_dense_update"],
    "`nn.MultiheadAttention`": ["lora_lab/test_multihead.py::test_the_attention_computes_with_the_dense_update_in_training_and_on_the_fast_path",
                                "lora_lab/test_multihead.py::test_out_proj_alone_trains"],
    "fused qkv, a pair for each": ["lora_lab/test_fused.py::test_it_is_the_function_of_separate_projections_with_the_same_gradients"],
    "raw parameters, stacks of experts": [
        "lora_lab/test_parameters.py::test_forward_and_gradients_are_those_of_the_parameters_replaced_by_W_plus_delta"
    ],
    "rows for new tokens": ["lora_lab/test_token_rows.py::test_output_and_gradients_are_those_of_a_whole_embedding_with_these_rows"],
    "rsLoRA": ["lora_lab/test_injection.py::test_scaling_is_alpha_over_rank_or_over_its_root_with_rslora"],
    "DoRA": ["lora_lab/test_kinds.py::test_an_adapted_layer_is_the_layer_with_the_dense_update",
             "lora_lab/test_kinds.py::test_doras_bias_is_left_alone"],
    "PiSSA": ["lora_lab/test_kinds.py::test_pissa_is_the_papers_function",
              "lora_lab/test_traps.py::test_pissa_does_not_change_the_base_under_other_adapters"],
    "LoRA+": ["lora_lab/test_learning_rates.py::test_every_B_has_the_higher_rate_and_every_trained_tensor_is_in_one_group"],
    "LoRA-FA": ["lora_lab/test_kinds.py::test_with_freeze_A_only_B_trains"],
    "`lora_bias`": ["lora_lab/test_kinds.py::test_peft_reads_what_we_write"],
    "biases that train along": ["lora_lab/test_base_parameters.py::test_with_the_adapter_off_the_model_is_the_base_again"],
    "whole modules that train along": ["lora_lab/test_base_parameters.py::test_files_both_ways_with_peft"],
    "several adapters at once": ["lora_lab/test_injection.py::test_active_adapters_are_summed_and_none_switches_all_off"],
    "one for each row of a batch": ["lora_lab/test_adapters.py::test_a_batch_with_an_adapter_per_row_equals_the_rows_run_alone"],
    "and in training": ["lora_lab/test_adapters.py::test_each_adapter_learns_from_its_own_rows_in_training"],
    "their weighted sum, exactly": ["lora_lab/test_adapters.py::test_cat_is_exactly_the_weighted_sum_of_the_updates"],
    "unmerge gives 16 bits back exactly": ["lora_lab/test_merging.py::test_unmerge_is_exact_in_16_bits_where_subtracting_is_not"],
    "merges checkpoints beyond memory": ["lora_lab/test_streaming.py::test_no_tensor_is_ever_held_whole"],
    "4-bit base": ["lora_lab/test_quantization.py::test_codes_scales_and_values_are_those_bitsandbytes_gave",
                   "lora_lab/test_quantization.py::test_lora_trains_on_a_quantised_base"],
    "reads PEFT's files": ["lora_lab/test_peft_families.py::test_we_compute_what_peft_saves"],
    "writes PEFT's files": ["lora_lab/test_peft_families.py::test_peft_computes_what_we_save"],
    "a name that matches nothing": ["lora_lab/test_injection.py::test_what_makes_no_sense_is_an_error_that_names_it_and_the_model_is_untouched"],
    "a tensor that fits nowhere": ["lora_lab/test_checkpoint.py::test_what_is_damaged_or_foreign_is_refused_and_the_model_is_untouched"],
    "torch.compile": ["lora_lab/test_layers.py::test_compiles_without_a_graph_break"],
    "load into a compiled model": ["lora_lab/test_compile.py::test_replacing_weights_changes_the_output_and_recompiles_nothing"],
    "FSDP2": ["lora_lab/test_distributed.py::test_two_processes_train_the_adapters_that_one_does"],
    "save while sharded": ["lora_lab/test_distributed.py::test_a_sharded_adapter_is_saved_whole"],
    "lines of Python": ["test_feature_table.py::test_the_lines_of_python_are_counted"],
}  # fmt: skip


def table() -> dict[str, list[str]]:
    """The feature table: line -> its cells, ours first."""
    section = README.split("## Beside the others")[1].split("\n## ")[0]
    rows = [line.strip().strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows[2:]}


def test_every_line_of_the_feature_table_is_held_by_tests_that_exist():
    assert list(table()) == list(FEATURES)
    for line, tests in FEATURES.items():
        assert len(table()[line]) == 6 and all(table()[line]), line
        for name in tests:
            file, _, test = name.partition("::")
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            assert any(isinstance(node, ast.FunctionDef) and node.name == test for node in tree.body), name


def test_the_lines_of_python_are_counted():
    """LoRA, its merging, files, quantisation and analysis: all of lora_lab but the workshop it is trained in; to within 5 %."""
    room = ROOT / "lora_lab"
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in room.rglob("*.py") if path.relative_to(room).parts[0] not in WORKSHOP)
    assert lines == pytest.approx(int(table()["lines of Python"][0].replace(",", "")), rel=0.05)


def test_what_the_table_says_of_peft_is_so():
    """In five of its lines: the class and keys of its model, a name that matches nothing, rows in training, 16 bits after unmerge."""
    said = {line: cells[1] for line, cells in table().items()}
    import peft
    import torch
    from torch import nn

    def wrapped(**settings):
        return peft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).bfloat16(), peft.LoraConfig(init_lora_weights=False, **settings))

    model = wrapped(target_modules=["0", "no such name"])
    assert said["the model keeps its class"] == f"`{type(model).__name__}` around it"
    assert said["the base keeps its keys"] == "no (`base_layer`)" and any(".base_layer." in key for key in model.state_dict())
    assert said["a name that matches nothing"] == "an error if none does"
    with pytest.raises(ValueError, match="not found in the base model"):
        wrapped(target_modules=["no such name"])
    assert (said["one for each row of a batch"], said["and in training"]) == ("in inference, not DoRA", "no")
    with pytest.raises(ValueError, match="training mode"):
        model.train()(torch.randn(1, 8).bfloat16(), adapter_names=["default"])
    weight = model.base_model.model[0].base_layer.weight
    before = weight.clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert said["unmerge gives 16 bits back exactly"] == "no, it subtracts" and not torch.equal(weight, before)
