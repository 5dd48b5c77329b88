"""The 45 traps of other LoRA libraries: what goes wrong, where it was reported, and the tests that would notice it here, or why it cannot happen.

"repo#N" is an issue or a pull request on GitHub. Tests are named `file::test`, files from this folder on; test_trap_index.py checks that they exist.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trap:
    """wrong: what goes wrong. source: who met it. tests: what would notice it here. why: what else is to be said, or why it cannot happen."""

    wrong: str
    source: str
    tests: tuple[str, ...] = ()
    why: str = ""


TRAPS: dict[int, Trap] = {
    1: Trap(
        "A merge into a head that shares the embedding's weight changes the embedding, or is thrown away when the model is loaded again.",
        "peft#2018, peft#2972, transformers#45127",
        ("test_merging.py::test_a_tied_weight_is_not_changed_behind_the_other_layers_back",
         "test_traps.py::test_a_merge_into_a_tied_head_does_not_collapse_at_the_next_load",
         "test_streaming.py::test_a_change_of_one_of_two_tied_tensors_is_refused_and_untie_writes_both"),
    ),
    2: Trap(
        "Embedding and head trained whole become two matrices that drift apart.",
        "unsloth#9331, unsloth#3711",
        ("test_borrowed.py::test_tied_modules_stay_tied",
         "test_borrowed_files.py::test_two_values_for_one_tied_tensor_are_refused",
         "test_token_rows.py::test_a_tied_head_takes_the_rows_and_an_untied_one_its_own_weight",
         "test_streaming.py::test_embedding_and_head_replaced_by_one_tensor_stay_tied"),
    ),
    3: Trap(
        "The update of a layer that stores its weight [in, out] is added the wrong way round, unnoticed where it is square.",
        "microsoft/LoRA#61, #103, #105, #107; axolotl#3095",
        ("test_layers.py::test_conv1d_is_recognised_without_importing_transformers",
         "test_merging.py::test_whole_models_merge_and_unmerge",
         "test_streaming.py::test_a_square_conv1d_is_known_by_its_model_not_by_the_config"),
    ),
    4: Trap(
        "One pair over a fused qkv is taken for one pair each: as many parameters, another function; and a merge puts the parts in wrong places.",
        "litgpt#629",
        ("test_fused.py::test_it_is_the_function_of_separate_projections_with_the_same_gradients",
         "test_fused.py::test_merge_unmerge_disabled_and_eject",
         "test_fused.py::test_the_part_that_is_not_named_stays_bit_for_bit",
         "test_fused_layouts.py::test_the_parts_are_what_the_attention_reads"),
    ),
    5: Trap(
        "nn.MultiheadAttention reads out_proj.weight without calling the layer: an adapter there is accepted and has no effect.",
        "peft#761, peft#1324, LoRA-Torch#3, helical#405",
        ("test_multihead.py::test_out_proj_alone_trains",
         "test_injection.py::test_an_attention_output_that_pytorch_never_calls_has_an_effect_all_the_same"),
    ),
    6: Trap(
        "nn.TransformerEncoderLayer's fast path in eval mode passes the adapters of linear1 and linear2 by.",
        "peft#761",
        ("test_layers.py::test_an_encoder_layers_eval_fast_path_does_not_skip_the_adapter",
         "test_multihead.py::test_the_attention_computes_with_the_dense_update_in_training_and_on_the_fast_path"),
    ),
    7: Trap(
        "A merge done in 16 bit is an order of magnitude rougher than one rounded once.",
        "peft#1388, peft#2502, peft#1035, peft#2368",
        ("test_merging.py::test_unmerge_is_exact_in_16_bits_where_subtracting_is_not",
         "test_traps.py::test_merging_16_bit_weights_on_a_cpu_is_not_done_in_slow_and_rough_16_bit_products",
         "test_streaming.py::test_a_16_bit_base_is_accumulated_in_float32_and_rounded_once"),
    ),
    8: Trap(
        "Subtracting the update again does not give 16-bit weights back.",
        "loralib, at every eval() and train()",
        ("test_merging.py::test_unmerge_is_exact_in_16_bits_where_subtracting_is_not",),
    ),
    9: Trap(
        "Merged into 4-bit codes, a small update is rounded away.",
        "transformers#31293, peft#1203",
        ("test_traps.py::test_merging_a_quantised_layer_cannot_round_the_adapter_away",),
    ),
    10: Trap(
        "The update is added twice: by merging again, or by saving merged weights as if they were the base's.",
        "peft#1355; loralib",
        ("test_merging.py::test_merging_twice_is_refused_and_adds_nothing",),
    ),
    11: Trap(
        "Of several active adapters one is merged and the others vanish without a word.",
        "peft#3756, peft#3763",
        ("test_merging.py::test_several_active_adapters_are_merged_together_and_one_of_them_alone_is_refused",),
    ),
    12: Trap(
        "Training goes on while merged: the adapter gets no gradient, the head still moves.",
        "PEFT, layer.py",
        ("test_merging.py::test_training_while_merged_is_refused",),
    ),
    13: Trap(
        "A second DoRA adapter is merged with the norm of weights that hold the first already.",
        "peft#3608, peft#3609",
        ("test_traps.py::test_two_dora_adapters_merged_together_do_not_see_each_others_merged_norm",),
    ),
    14: Trap(
        "A convolution's dilation and padding mode are forgotten; a grouped one is merged although its update is no grouped kernel.",
        "peft#3697, peft#3758, peft#2549, peft#2403, peft#2567, peft#637",
        ("test_kinds.py::test_an_adapted_layer_is_the_layer_with_the_dense_update",
         "test_merging.py::test_merge_equals_the_unmerged_forward_and_unmerge_every_bit",
         "test_merging.py::test_a_grouped_convolution_is_not_merged"),
    ),
    15: Trap(
        "An embedding that multiplies what it looks up does not multiply the update.",
        "peft#2809, peft#2825, peft#2831",
        ("test_traps.py::test_an_embedding_that_scales_what_it_looks_up_scales_the_update",
         "test_kinds.py::test_an_adapted_layer_is_the_layer_with_the_dense_update"),
    ),
    16: Trap(
        "Reentrant checkpointing over frozen inputs gives no gradients; at its worst only the layers outside of it train.",
        "peft#137, peft#1142, transformers#42489, transformers#26334, cloneofsimo/lora#26, open-unlearning#178, kohya sd-scripts#91",
        ("test_traps.py::test_layers_that_checkpointing_cuts_off_do_not_stay_untrained_without_a_word",
         "training/test_fit.py::test_a_lora_layer_that_ran_but_got_no_gradient_is_an_error",
         "training/test_gradient_checkpointing.py::test_losses_and_weights_are_those_without_checkpointing"),
    ),
    17: Trap(
        "The recompute of a checkpointed layer drops other elements than its forward pass.",
        "litgpt, finetune/lora.py: preserve_rng_state=False beside dropout 0.05",
        ("test_dropout.py::test_a_checkpointed_recompute_drops_the_same_elements",
         "training/test_gradient_checkpointing.py::test_losses_and_weights_are_those_without_checkpointing"),
    ),
    18: Trap(
        "What trains is stored in float16, and the gradient scaler refuses it.",
        "peft#341, peft#1249, peft#1336, peft#1706, diffusers#8871",
        ("training/test_precision.py::test_adapters_made_in_16_bit_train_in_float32_and_come_back_in_theirs",
         "training/test_precision.py::test_weights_are_stored_and_multiplied_as_the_table_says",
         "test_traps.py::test_a_head_that_trains_along_does_not_break_loss_scaling"),
    ),
    19: Trap(
        "An adapter's dtype depends on the order of loading, on the file or on the kind of base.",
        "peft#1090, peft#2421, peft#2889, peft#2893, peft#1568",
        ("test_layers.py::test_adapters_are_float32_on_a_16_bit_base_and_the_bases_dtype_otherwise",
         "test_checkpoint.py::test_save_dtype_halves_the_file_and_loads_as_float32",
         "test_qlora.py::test_adapters_of_a_quantised_base_are_float32_and_files_fit_the_full_base",
         "test_traps.py::test_a_second_adapter_from_a_16_bit_file_is_not_trained_in_16_bit"),
    ),
    20: Trap(
        "FSDP cannot hold frozen and trained, 16-bit and 32-bit parameters together, and B @ A outside a layer's forward is of pieces.",
        "peft#1702, peft#1984, pytorch#100945, llm-foundry#414, direct-preference-optimization#90",
        ("test_distributed.py::test_two_processes_train_the_adapters_that_one_does",
         "test_distributed.py::test_dora_trains_under_fully_shard_as_it_does_alone",
         "test_distributed.py::test_after_fully_shard_what_changes_whole_parameters_is_refused_and_changes_nothing"),
        "The older FSDP flattens parameters of several layers into one; it is refused by name.",
    ),
    21: Trap(
        "Of a sharded model the piece of one process, or nothing, is saved as the adapter.",
        "peft#1402; PEFT, save_and_load.py",
        ("test_distributed.py::test_a_sharded_adapter_is_saved_whole",
         "test_distributed.py::test_a_tensor_that_zero_3_has_emptied_is_not_saved"),
    ),
    22: Trap(
        "DDP sees a parameter twice under reentrant checkpointing, waits for one that nobody uses, or does not know a late adapter.",
        "peft#313, peft#301, peft#899, trl#4782, accelerate#2017",
        ("test_distributed.py::test_a_head_that_trains_along_leaves_ddp_no_parameter_without_a_gradient",
         "test_distributed.py::test_two_processes_train_the_adapters_that_one_does",
         "test_distributed.py::test_new_adapters_are_not_put_into_a_model_that_is_wrapped_in_ddp"),
        "An adapter put into the model inside a DDP that exists already cannot be seen from there: inject comes first.",
    ),
    23: Trap(
        "A head that was new and trained is not in the file, and is random again when the adapter is loaded.",
        "peft#310, peft#577, peft#876, peft#1070, sentence-transformers#3980",
        ("test_traps.py::test_a_head_that_was_unfrozen_by_hand_is_not_left_out_of_the_file_without_a_word",
         "test_traps.py::test_what_an_adapter_trains_is_all_in_its_file_and_saving_it_warns_of_nothing",
         "test_borrowed.py::test_the_new_head_of_a_classifier_travels_with_a_peft_adapter",
         "test_borrowed.py::test_a_file_that_lacks_what_it_announces_is_refused"),
    ),
    24: Trap(
        "A head that trains along is counted twice, old and new.",
        "PEFT, print_trainable_parameters",
        ("test_traps.py::test_a_head_that_trains_along_is_counted_once",
         "test_published_counts.py::test_the_exact_number_is_what_inject_adds"),
    ),
    25: Trap(
        "The whole embedding lands in the file of a small adapter, or does not fit a vocabulary of another size when it is loaded.",
        "peft#2898, peft#1457, peft#1554, peft#1383",
        ("test_traps.py::test_an_adapted_embedding_does_not_drag_the_whole_matrix_into_the_file",
         "test_borrowed_files.py::test_a_resized_vocabulary_asks_for_the_same_of_the_model",
         "test_borrowed_files.py::test_whole_embeddings_that_are_the_bases_own_are_left_out"),
    ),
    26: Trap(
        "An optimizer holds parameters that are not the model's any more, or not what trains: steps move nothing.",
        "PEFT's troubleshooting guide",
        ("test_traps.py::test_an_optimizer_is_not_left_with_parameters_that_are_gone",
         "test_compile.py::test_an_optimizer_made_before_weights_were_replaced_goes_on_training_them",
         "test_merging.py::test_the_parameters_are_the_same_objects_after_a_round_trip",
         "test_learning_rates.py::test_a_model_of_which_nothing_trains_is_refused"),
        "In a loop written by hand an optimizer made before inject has only frozen parameters, which no library can see; `fit` makes its own.",
    ),
    27: Trap(
        "A loaded adapter is frozen, or in the wrong mode, and training it does nothing.",
        "alpaca-lora#352, trl#6700, transformers#34469",
        ("test_checkpoint.py::test_a_loaded_adapter_is_frozen_unless_asked_to_train",
         "test_traps.py::test_a_loaded_adapter_is_not_trained_in_vain_and_the_mode_stays",
         "training/test_fit.py::test_a_model_in_which_nothing_requires_grad_is_refused"),
    ),
    28: Trap(
        "Keys that do not fit, and values that are not numbers, are passed over while loading.",
        "peft#1932, peft#2084, peft#2118, peft#2699, transformers#34068, diffusers#9622, torchtune#2537",
        ("test_checkpoint.py::test_what_is_damaged_or_foreign_is_refused_and_the_model_is_untouched",
         "test_traps.py::test_an_adapter_called_like_a_part_of_a_key_is_not_lost_on_the_way"),
    ),
    29: Trap(
        "A name or an expression means more than was meant: a vision tower, a Dropout, lm_head for head.",
        "peft#2615, unsloth-zoo#807",
        ("test_traps.py::test_a_vision_tower_gets_no_adapters_that_nobody_meant",
         "test_traps.py::test_a_greedy_expression_meets_layers_only_and_a_head_is_called_by_its_whole_name",
         "test_injection.py::test_a_name_matches_at_dots_only"),
    ),
    30: Trap(
        "A pattern for ranks or layers that matches nothing is ignored.",
        "peft#3582, peft#3610",
        ("test_injection.py::test_what_makes_no_sense_is_an_error_that_names_it_and_the_model_is_untouched",
         "test_traps.py::test_layer_numbers_are_found_in_a_list_at_the_root"),
    ),
    31: Trap(
        "Names from an older release of a model's library match nothing, or its counts are others.",
        "transformers 5: ViT's q_proj, T5's tied head",
        ("test_traps.py::test_names_of_an_older_release_are_an_error_that_lists_todays",
         "test_published_counts.py::test_a_printed_figure_agrees_with_the_exact_number_unless_the_table_says_why_not"),
    ),
    32: Trap(
        "PiSSA and its like change the base, under other adapters and for good.",
        "peft#2184, transformers#34468, peft#1626, peft#1929, peft#2075, peft#2270",
        ("test_traps.py::test_pissa_does_not_change_the_base_under_other_adapters",
         "test_kinds.py::test_pissa_starts_at_the_principal_part_and_leaves_the_weight_alone",
         "test_changed_base.py::test_the_loaded_adapter_computes_what_peft_computes_on_its_changed_base",
         "test_changed_base.py::test_other_changes_of_the_base_are_refused"),
    ),
    33: Trap(
        "The A's and the B's of several adapters are averaged apart, which is not the average of their updates.",
        "PEFT, add_weighted_adapter(combination_type=\"linear\")",
        ("test_adapters.py::test_cat_is_exactly_the_weighted_sum_of_the_updates",
         "test_adapters.py::test_svd_is_the_best_approximation_of_its_rank_and_says_what_it_lost"),
    ),
    34: Trap(
        "With biases that train along, switching the adapter off does not give the base back.",
        "PEFT, a warning",
        ("test_borrowed.py::test_with_the_adapter_off_the_model_is_the_base_again",),
    ),
    35: Trap(
        "Rows that a model folds, or repeats for beams, get other rows' adapters.",
        "peft#1967, peft#1990",
        ("test_traps.py::test_rows_keep_their_adapters_where_the_model_cuts_a_picture_into_windows",
         "test_traps.py::test_beams_keep_their_rows_adapter_in_the_decoder_and_the_encoder",
         "test_adapters.py::test_a_batch_that_is_no_multiple_of_the_names_raises"),
        "Where a model puts the batch last in such a fold the names would be the wrong ones; batch_first=False is known, other layouts are not.",
    ),
    36: Trap(
        "Another adapter, rank or scale means compiling again, and a model that was compiled in place is not recognised.",
        "diffusers#9279, diffusers#9453, peft#2177",
        ("test_compile.py::test_replacing_weights_changes_the_output_and_recompiles_nothing",
         "test_compile.py::test_each_selection_computes_what_it_does_uncompiled_and_is_compiled_once",
         "test_compile.py::test_verbs_that_go_by_names_refuse_the_wrapper_and_point_inside"),
    ),
    37: Trap(
        "Dropout drops the frozen path, is forgotten in some layers, or drops the same features for the whole batch.",
        "peft#2107, peft#2122; loralib; minLoRA",
        ("test_traps.py::test_dropout_of_a_dora_adapter_does_not_drop_the_frozen_path",
         "test_traps.py::test_dropout_is_not_forgotten_and_not_one_mask_for_the_whole_batch",
         "test_layers.py::test_dropout_acts_in_training_only_and_on_the_adapter_only"),
    ),
    38: Trap(
        "DoRA scales the bias in the forward pass and not in the merged weight.",
        "torchtune, dora.py",
        ("test_kinds.py::test_doras_bias_is_left_alone",),
    ),
    39: Trap(
        "The running statistics of BatchNorm move in training and are not in the adapter.",
        "PEFT's troubleshooting guide",
        ("test_traps.py::test_running_statistics_that_trained_with_an_adapter_do_not_stay_behind_in_the_base",
         "test_traps.py::test_running_statistics_of_a_module_that_is_trained_whole_travel_in_the_file"),
        "A BatchNorm that modules_to_save does not name belongs to the base, whose statistics move with it in train(): keep it in eval().",
    ),
    40: Trap(
        "train() and eval() of a layer return nothing or merge on the way; an index beside the parameters stays on the old device.",
        "microsoft/LoRA#34, microsoft/LoRA#61; loralib",
        ("test_traps.py::test_train_and_eval_of_an_adapted_layer_still_return_the_layer",
         "test_traps.py::test_nothing_an_adapted_layer_computes_with_is_left_behind_by_to"),
    ),
    41: Trap(
        "A wrapper has no .weight and no .in_features for those who read them, and wrapping twice nests.",
        "the replacement loop of many tutorials",
        ("test_traps.py::test_what_others_read_of_a_layer_is_still_there_and_injecting_twice_nests_nothing",
         "test_layers.py::test_identity_keys_hooks_isinstance_and_a_subclass_forward_survive"),
    ),
    42: Trap(
        "An adapter file is a pickle, which runs code when it is read.",
        "peft#546, peft#553, peft#1993",
        ("test_traps.py::test_a_pickle_of_a_model_in_memory_keeps_adapters_and_a_folder_never_holds_one",
         "../test_arrows.py::test_the_packages_import_no_oracle_and_no_pickle"),
    ),
    43: Trap(
        "16-bit products on a CPU make a merge 65 times slower, where they work at all.",
        "peft#1977, peft#1978",
        ("test_traps.py::test_merging_16_bit_weights_on_a_cpu_is_not_done_in_slow_and_rough_16_bit_products",),
    ),
    44: Trap(
        "The guard against merging a model with repeated layers looks under the wrong key and never fires.",
        "PEFT, lora/model.py",
        ("test_traps.py::test_a_file_for_a_model_with_repeated_layers_is_not_half_applied",),
        "There are no repeated layers here; a file that asks for them is refused.",
    ),
    45: Trap(
        "Others look the model up by the name of its class, and find a wrapper's.",
        "transformers#27161",
        ("test_traps.py::test_a_model_is_still_known_by_its_class_and_its_forward_by_its_arguments",),
    ),
}
