"""The 30 traps of other prompt tuning libraries: what goes wrong, who met it, and the tests that would notice it here, or why none can.

Numbers are those of the project's reference on prompt tuning. "repo#N" is an issue or a pull request on GitHub. Tests are named `file::test`, files
of this folder; test_prompt_traps.py checks that they exist, and that no test which names a trap is missing here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trap:
    """wrong: what goes wrong. source: who met it. tests: what would notice it here. why: what else is to be said, or why no test can."""

    wrong: str
    source: str
    tests: tuple[str, ...] = ()
    why: str = ""


TRAPS: dict[str, Trap] = {
    "T1": Trap(
        "Logits have P positions more than labels, and evaluators that index them are silently wrong.",
        "lm-evaluation-harness#533, trl#3812, trl#3821, peft#482",
        ("test_prompted_model.py::test_the_loss_is_the_bases_of_prompt_and_text_and_logits_are_the_texts",
         "test_insertion.py::test_labels_of_virtual_tokens_and_of_a_row_s_first_token_do_not_count",
         "test_insertion.py::test_in_training_short_prompts_are_filled_up_behind_the_text_and_nothing_changes",
         "test_prompted_training.py::test_evaluation_reads_the_prompt"),
    ),
    "T2": Trap(
        "The mask of virtual tokens is zero, or makes a mask of whole numbers one of fractions.",
        "sentence-transformers#3000, sentence-transformers#2995; PEFT, peft_model.py",
        ("test_insertion.py::test_the_mask_keeps_its_dtype_and_virtual_tokens_are_seen",),
    ),
    "T3": Trap(
        "Positions count the columns of [prompt][padding][text], so a padded row is another one than the row alone.",
        "peft#54, peft#1093, peft#1212",
        ("test_insertion.py::test_padded_rows_equal_rows_run_alone_without_padding",
         "test_insertion.py::test_positions_count_the_real_tokens_before",
         "test_heads.py::test_hidden_states_and_the_pooler_are_the_texts",
         "test_prefix.py::test_padding_on_either_side_changes_nothing",
         "test_prompt_families.py::test_a_mixed_batch_equals_rows_run_alone",
         "test_prompt_families.py::test_a_robertas_words_behind_a_prefix_have_positions_behind_its_paddings",
         "test_prompt_families.py::test_padding_that_would_be_distance_from_a_prefix_is_refused",
         "test_prompt_generation.py::test_cached_uncached_and_step_by_step_are_the_same"),
    ),
    "T4": Trap(
        "The prompt stands before the padding of its row, where neither positions nor distances are right.",
        "DePT#8, peft#1212",
        ("test_insertion.py::test_padded_rows_equal_rows_run_alone_without_padding",
         "test_insertion.py::test_positions_count_the_real_tokens_before",
         "test_prompt_families.py::test_a_mixed_batch_equals_rows_run_alone"),
    ),
    "T5": Trap(
        "generate begins with an empty cache in place of none, the prompt is never inserted, and the text is the base's.",
        "peft#2123, peft#2043, peft#2379, transformers#32060, transformers#36509",
        ("test_prompt_generation.py::test_cached_uncached_and_step_by_step_are_the_same",
         "test_prompt_generation.py::test_an_encoder_decoder_answers_with_its_prompt",
         "test_prefix.py::test_an_empty_cache_gets_the_prefix_and_grows_behind_it",
         "test_prefix.py::test_transformers_generate_finds_the_prefix"),
    ),
    "T6": Trap(
        "The prompt goes in at every cached step, or the mask is longer by it in the first step alone.",
        "soft-prompt-tuning#7, peft#543",
        ("test_prompt_generation.py::test_cached_uncached_and_step_by_step_are_the_same",
         "test_prefix.py::test_an_empty_cache_gets_the_prefix_and_grows_behind_it",
         "test_prefix.py::test_generation_cached_is_generation_uncached_is_a_loop_by_hand",
         "test_prefix_encoders.py::test_a_t5_writes_under_a_prefix_with_and_without_a_cache"),
    ),
    "T7": Trap(
        "A prefix cannot be generated with where no cache is kept.",
        "PEFT 0.21 before a Llama, transformers 5.23",
        ("test_prefix.py::test_transformers_generate_finds_the_prefix",
         "test_prompt_generation.py::test_tasks_of_every_method_generate_in_one_batch",
         "test_prompt_generation.py::test_an_encoder_decoders_beams_are_the_same_without_a_cache"),
    ),
    "T8": Trap(
        "What generate gives back begins with the caller's ids, or not, and a cache has the prompt in it or not: it is not said.",
        "transformers, generate(inputs_embeds=...)",
        ("test_prompt_generation.py::test_a_cache_that_comes_back_has_the_prompt_in_it",
         "test_prompt_generation.py::test_cached_uncached_and_step_by_step_are_the_same"),
    ),
    "T9": Trap(
        "A step of generation loses the cache, and with it the prefix.",
        "PrefixTuning#37",
        ("test_prefix.py::test_generation_cached_is_generation_uncached_is_a_loop_by_hand",
         "test_prompt_generation.py::test_tasks_of_every_method_generate_in_one_batch"),
    ),
    "T10": Trap(
        "Gradient checkpointing cuts a prefix off, or does nothing under a base in eval mode.",
        "peft#2191, peft#869, transformers#21381, transformers#21598",
        ("test_prefix.py::test_checkpointing_of_our_models_keeps_the_prefix",
         "test_prefix.py::test_checkpointing_of_transformers_is_refused_with_the_way_out",
         "test_prefix_encoders.py::test_checkpointing_of_our_models_keeps_the_prefix",
         "test_prompted_training.py::test_checkpointing_recomputes_under_a_base_in_eval_mode",
         "test_prompted_training.py::test_checkpointing_that_would_switch_dropout_on_is_refused"),
    ),
    "T11": Trap(
        "T5 1.1, trained to fill gaps, copies its input or writes nothing, whatever prompt it reads.",
        "Lester et al. 2021, sections 2.2 and 3.2",
        why="Which checkpoint a prompt is trained on (one that was adapted to language modelling) is the user's choice, and no code's.",
    ),
    "T12": Trap(
        "An encoder-decoder's decoder looks at encoder states and a mask of different lengths.",
        "peft#519",
        ("test_insertion.py::test_t5_reads_prompts_of_different_lengths_at_the_distances_of_rows_alone",
         "test_prompt_families.py::test_bart_reads_prompts_in_its_encoder_and_answers",
         "test_prompt_generation.py::test_an_encoder_decoder_answers_with_its_prompt",
         "test_prompted_model.py::test_t5_is_pefts_and_every_row_of_its_prompt_learns"),
    ),
    "T13": Trap(
        "A T5's prompt has 2P rows, of which the second half is never read, trained nor left out of the count.",
        "PEFT 0.21",
        ("test_prompted_model.py::test_t5_is_pefts_and_every_row_of_its_prompt_learns",
         "test_prompt_files.py::test_of_two_submodules_the_first_rows_are_the_prompt",
         "test_initialization.py::test_of_pefts_rows_for_an_encoder_decoder_the_first_half_begins_a_prompt",
         "test_prompt_counts.py::test_t5_large_counts_half_of_what_peft_prints",
         "test_prompt_commands.py::test_inspect_reads_folders_of_pefts"),
    ),
    "T14": Trap(
        "A T5's prefix is shared out among its layers in fours, and half of it never has a gradient.",
        "PEFT 0.21",
        ("test_prefix_encoders.py::test_every_layer_of_a_t5_has_keys_and_values_of_its_own",
         "test_prefix_encoders.py::test_an_encoders_prefix_matters_and_gets_every_gradient",
         "test_prompt_files.py::test_a_prefix_of_an_encoder_decoder_has_a_type_that_peft_refuses",
         "test_prompt_refusals.py::test_pefts_prefix_of_an_encoder_decoder_is_refused_with_the_reason",
         "test_initialization.py::test_pefts_prefix_of_an_encoder_decoder_begins_nothing",
         "test_prompt_commands.py::test_inspect_tells_what_peft_would_compute_otherwise"),
    ),
    "T15": Trap(
        "A classifier pools a virtual token in place of [CLS], or takes the last column for the last word.",
        "P-tuning-v2#15, P-tuning-v2#16, P-tuning-v2#18; PEFT 0.21",
        ("test_heads.py::test_a_classifier_reads_the_texts_own_first_position",
         "test_heads.py::test_a_decoder_s_classifier_finds_the_last_word",
         "test_heads.py::test_hidden_states_and_the_pooler_are_the_texts",
         "test_prompt_families.py::test_a_pooler_in_two_parts_reads_the_texts_first_position",
         "test_prompt_files.py::test_a_class_is_read_off_the_text_and_not_off_a_virtual_token",
         "test_prompt_commands.py::test_inspect_tells_what_peft_would_compute_otherwise"),
    ),
    "T15b": Trap(
        "Labels of tokens are too few for prompt and text, and the start and end of an answer are not moved by P.",
        "PEFT 0.21; trl#490",
        ("test_heads.py::test_labels_of_tokens_are_the_texts",
         "test_heads.py::test_start_and_end_of_an_answer_are_positions_of_the_text",
         "test_prompt_files_of_heads.py::test_places_that_peft_has_learned_are_too_far_to_the_left_here"),
    ),
    "T16": Trap(
        "What the whole embedding module makes is taken for words, and gets positions and norms a second time.",
        "P-tuning-v2#47",
        ("test_insertion.py::test_embeddings_are_inserted_before_words_and_before_embeddings_alike",),
    ),
    "T17": Trap(
        "Names of adapters for the rows of a batch are accepted and ignored.",
        "peft#759; PEFT 0.21",
        ("test_mixed_tasks.py::test_every_method_in_one_batch_equals_rows_run_alone",
         "test_insertion.py::test_prompts_of_different_lengths_in_one_batch_equal_rows_run_alone",
         "test_prompt_generation.py::test_tasks_of_every_method_generate_in_one_batch"),
    ),
    "T18": Trap(
        "Prompts of different lengths cannot be one batch, or the filled columns are seen and counted.",
        "NeMo#3309",
        ("test_mixed_tasks.py::test_every_method_in_one_batch_equals_rows_run_alone",
         "test_insertion.py::test_prompts_of_different_lengths_in_one_batch_equal_rows_run_alone",
         "test_insertion.py::test_different_lengths_without_a_mask_get_the_one_they_need",
         "test_insertion.py::test_t5_reads_prompts_of_different_lengths_at_the_distances_of_rows_alone",
         "test_insertion.py::test_in_training_short_prompts_are_filled_up_behind_the_text_and_nothing_changes",
         "test_prefix.py::test_rows_with_different_prefixes_and_none_are_as_if_alone",
         "test_prompt_families.py::test_a_mixed_batch_equals_rows_run_alone",
         "test_prompt_generation.py::test_tasks_of_every_method_generate_in_one_batch"),
    ),
    "T19": Trap(
        "A random start is many times as large as words are, and does not learn.",
        "peft#2815, peft#2816, peft#2824",
        ("test_initialization.py::test_random_is_the_papers_uniform_and_its_scale_is_told",
         "test_prefix_shapes.py::test_a_random_prefix_is_small_and_a_texts_is_as_large_as_the_models_own"),
    ),
    "T20": Trap(
        "Special tokens of the tokenizer become virtual tokens; a text is repeated or cut without a word, and an empty one divides by zero.",
        "PEFT 0.21, prompt_tuning/model.py",
        ("test_initialization.py::test_a_text_begins_the_prompt_without_special_tokens_and_the_rest_is_drawn",
         "test_initialization.py::test_a_longer_text_is_cut_and_that_is_told",
         "test_initialization.py::test_bad_requests_are_told_and_leave_the_model_as_it_was"),
    ),
    "T21": Trap(
        "Words are read from the table of an embedding that scales them when it is called.",
        "vllm#36787; soft-prompt-tuning, OpenPrompt",
        ("test_initialization.py::test_words_go_through_a_call_of_the_embedding",
         "test_interpretation.py::test_embeddings_that_scale_are_read_through_their_call",
         "test_tuning.py::test_an_embedding_that_scales_is_measured_by_its_call"),
    ),
    "T22": Trap(
        "The embedding is found by the size of the vocabulary, taken to be as wide as the layers, or trains with a head that is tied to it.",
        "peft#526; PEFT 0.21 before OPT-350m",
        ("test_initialization.py::test_the_width_is_the_embeddings_which_may_not_be_the_hidden_size",
         "test_prompted_model.py::test_only_the_prompt_is_updated"),
    ),
    "T23": Trap(
        "A prompt in 16 bit: small updates are rounded away, and Adam divides by zero.",
        "TROPT#8, peft#68",
        ("test_prompted_model.py::test_prompts_stay_float32_whatever_the_model_becomes",
         "test_prompted_model.py::test_16_bit_bases_and_autocast_read_the_prompt",
         "test_initialization.py::test_a_16_bit_base_gets_a_float32_prompt_of_its_own_words",
         "test_insertion.py::test_what_is_inserted_has_the_embedding_s_dtype_and_no_other_inputs_change",
         "test_prefix.py::test_a_float32_prefix_trains_before_a_16_bit_model",
         "test_prompted_training.py::test_fit_in_16_bit_keeps_the_prompt_in_float32"),
    ),
    "T24": Trap(
        "LoRA and a prompt cannot be in one model.",
        "peft#183, peft#445, peft#720, peft#1022, peft#2307, peft#2595",
        ("test_prompted_training.py::test_the_verbs_of_lora_lab_work_on_the_base",
         "test_prompted_training.py::test_rows_with_a_prompt_rows_with_an_adapter_and_rows_with_both_are_one_batch"),
    ),
    "T25": Trap(
        "A prefix has as many heads as there are queries; a prefix of zeros is taken for none; layers that need ids are given vectors.",
        "peft#1901, peft#2449, peft#3205, peft#3478, adapters#819",
        ("test_prefix_shapes.py::test_the_shape_is_pefts",
         "test_prefix.py::test_logits_loss_and_gradients_are_pefts",
         "test_prefix.py::test_zeros_are_not_nothing",
         "test_prefix_encoders.py::test_an_encoders_prefix_matters_and_gets_every_gradient",
         "test_initialization.py::test_a_prefix_begins_as_the_keys_and_values_of_words",
         "test_prompt_counts.py::test_a_prefix_counts_key_value_heads_not_query_heads",
         "test_prompt_families.py::test_a_model_whose_layers_look_words_up_takes_a_prefix_alone",
         "test_prompt_generation.py::test_tasks_of_every_method_generate_in_one_batch"),
        "Layers that differ in their keys' shape are refused by name (prefix_cache.py).",
    ),
    "T26": Trap(
        "train() turns the dropout of the frozen model on again.",
        "google-research/prompt-tuning sets it to 0; OpenPrompt, plm_eval_mode",
        ("test_prompted_model.py::test_the_frozen_base_draws_no_dropout_in_training",
         "test_prompted_training.py::test_checkpointing_that_would_switch_dropout_on_is_refused"),
    ),
    "T27": Trap(
        "A product of small factors shrinks the start to nothing, or the embedding is multiplied in place in each call.",
        "PEFT 0.21, multitask_prompt_tuning",
        ("test_reparameterization.py::test_it_begins_as_what_it_is_given",
         "test_reparameterization.py::test_calling_it_changes_nothing",
         "test_prefix_shapes.py::test_a_prefix_begins_with_its_own_copy_and_remembers_it"),
    ),
    "T28": Trap(
        "Virtual tokens are forgotten in the model's context, and the start token comes behind the prompt.",
        "adapters#327",
        ("test_prompted_model.py::test_the_prompt_counts_against_the_context",
         "test_prompt_generation.py::test_a_prompt_that_leaves_too_little_room_is_told_before_anything_runs",
         "test_prompt_odd_inputs.py::test_a_row_that_is_done_does_not_stop_the_others_at_the_end_of_the_context",
         "test_ensembling.py::test_the_longest_member_takes_its_part_of_the_context",
         "test_insertion.py::test_the_prompt_can_stand_behind_the_first_token"),
    ),
    "T29": Trap(
        "Padding is found by its id, which may be a word's or the end's.",
        "OpenPrompt, pipeline_base.py",
        ("test_insertion.py::test_masks_are_asked_and_not_the_ids_of_padding",),
        "What is labelled is the data's part: lora_lab.data builds masks and labels from lengths.",
    ),
}
