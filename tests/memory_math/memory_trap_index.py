"""Where other memory calculators go wrong: what, who met it, and the tests that would notice it here, or why none can.

Numbers are the sections of the project's reference on memory: 4 has the traps of counts, 6 what users complain about, in its order. "repo#N" is an
issue or a pull request on GitHub. Tests are named `file::test`, files of this folder; test_memory_traps.py checks that they exist.
"""

from __future__ import annotations

from traps import Trap

TRAPS: dict[str, Trap] = {
    "4i": Trap(
        "A FLAN-T5 that is built from its config alone is tied, whatever the config says, and counted with one matrix too few.",
        "transformers 5.23",
        ("test_memory_counts.py::test_an_untied_t5_is_known_by_either_field",
         "test_memory_counts.py::test_a_live_model_is_tied_if_it_is",
         "test_memory_presets.py::test_preset_has_exactly_the_published_number_of_parameters"),
    ),
    "4ii": Trap(
        "The total in the index of a tied model's files leaves the head out, or has it twice.",
        "safetensors' model.safetensors.index.json",
        ("test_memory_traps.py::test_the_total_in_an_index_is_not_believed",
         "test_memory_counts.py::test_a_tied_head_counts_nothing_and_an_untied_one_as_much_as_the_embedding"),
    ),
    "4iii": Trap(
        "A published total is rounded, or another model's: T5-3B is 2,851 million, and no 3 billion.",
        "DeepSpeed#965",
        ("test_memory_presets.py::test_preset_has_exactly_the_published_number_of_parameters",
         "test_memory_presets.py::test_preset_has_as_many_parameters_as_the_model_that_transformers_builds"),
    ),
    "6.1": Trap(
        "The model's shape is guessed: two matrices for an MLP of three, a head's width that is not h / a, no window.",
        "cookbook#36, cookbook#5, llama-toolchest#58",
        ("test_memory_counts.py::test_every_tensor_and_linear_layer_is_that_of_the_built_model",
         "test_memory_counts.py::test_a_field_that_is_left_out_means_what_the_class_takes_it_to_be",
         "test_memory_saved_bytes.py::test_our_llama_keeps_exactly_what_is_predicted",
         "test_memory_saved_bytes.py::test_a_sliding_window_that_a_row_fills_has_a_mask"),
    ),
    "6.2": Trap(
        "Keys and values are counted for every query head, or by the rule of another attention.",
        "vllm-fit#14, vllm#29736, unsloth#4757, ollama#17201",
        ("test_memory_in_context.py::test_cache_is_what_a_built_model_keeps",
         "test_memory_in_context.py::test_llama_2_70b_chat_keeps_an_eighth_of_what_it_would_with_64_heads",
         "test_memory_counts.py::test_null_is_not_the_same_as_left_out_for_key_value_heads",
         "test_memory_counts.py::test_a_class_that_is_not_modelled_is_counted_but_has_no_architecture"),
    ),
    "6.3": Trap(
        "Logits of a large vocabulary, and the float32 copies that the loss makes of them, are forgotten.",
        "Qwen3#570, transformers#33902, torchtitan#996, litgpt#2311, trl#5575",
        ("test_memory_predict.py::test_a_llama_3_sized_vocabulary_is_mostly_logits_unless_the_loss_is_chunked",
         "test_memory_versions.py::test_the_old_loss_made_two_float32_copies_of_the_logits",
         "test_memory_saved_bytes.py::test_the_loss_chunk_is_the_labs_own"),
    ),
    "6.4": Trap(
        "Weights, gradients and states are counted, and no activations.",
        "accelerate#3379, DeepSpeed#4527, DeepSpeed#4093, DeepSpeed#2302",
        ("test_memory_saved_bytes.py::test_transformers_keeps_what_is_predicted",
         "test_memory_decoders.py::test_a_decoder_keeps_exactly_what_is_predicted",
         "test_memory_encoders.py::test_what_autograd_keeps_is_predicted_to_the_byte",
         "test_memory_peak.py::test_peak_of_a_transformers_training_step",
         "test_memory_accuracy.py::test_published_gpu_figures_are_met"),
    ),
    "6.5": Trap(
        "A sum has factors that nobody can look up, and ZeRO's stages divide what they do not.",
        "DeepSpeed#5102, DeepSpeed#5099, DeepSpeed#4305; cookbook's misc_mem_gib",
        ("test_memory_parallel.py::test_zero_divides_what_its_paper_says",
         "test_memory_parallel.py::test_figure_1_of_the_zero_paper",
         "test_memory_parallel.py::test_more_devices_never_need_more_memory",
         "test_memory_report.py::test_the_table_has_every_part_phase_and_total_in_bytes"),
    ),
    "6.6": Trap(
        "Eager attention's s by s scores are counted once where several are kept.",
        "llm-analysis#18",
        ("test_memory_saved_bytes.py::test_transformers_keeps_what_is_predicted",
         "test_memory_predict.py::test_eager_attention_adds_s_by_s_scores_and_fused_does_not",
         "test_memory_versions.py::test_before_4_31_norms_kept_their_input_and_scores_their_bound"),
    ),
    "6.7": Trap(
        "What cannot be compared is: GB and GiB, allocated and reserved and nvidia-smi's, full training with a step in backward and LoRA without.",
        "torchtune#794, torchtune#1758, torchtune#961",
        ("test_memory_predict.py::test_a_gpu_reserves_at_least_what_is_allocated_and_nvidia_smi_shows_more",
         "test_memory_predict.py::test_the_totals_are_numbers_of_bytes_that_carry_their_range",
         "test_memory_parallel.py::test_a_step_in_backward_leaves_one_gradient_at_a_time",
         "test_memory_report.py::test_units_stop_at_gib"),
    ),
    "6.8": Trap(
        "The allocator's holes, and what 4-bit products keep of a weight, are taken for nothing or for too much.",
        "mlx#1406, bitsandbytes#1141, bitsandbytes#1270, bitsandbytes#1935",
        ("test_memory_allocator.py::test_a_hole_that_is_too_small_costs_a_new_segment",
         "test_memory_allocator.py::test_reserved_never_falls_below_what_is_alive_and_everything_comes_back",
         "test_memory_questions.py::test_reserved_fits_by_the_interval",
         "test_memory_quantization.py::test_a_quantized_product_keeps_no_input_since_bitsandbytes_0_43_2"),
        "Batches whose lengths change leave holes that depend on their order: no formula has them, and the totals of a GPU have a range for it.",
    ),
    "6.9": Trap(
        "Nobody counts the temporaries of a step, what a frozen base keeps, float32 copies for adapters, virtual tokens and dropout's masks.",
        "the calculators of section 1",
        ("test_memory_predict.py::test_an_adamw_step_needs_temporaries_by_its_implementation",
         "test_memory_predict.py::test_a_frozen_base_keeps_less_than_a_trained_one_and_the_lab_less_than_plain_operations",
         "test_memory_predict.py::test_dropout_keeps_masks_of_one_byte_on_cuda_and_of_the_input_dtype_on_the_cpu_and_bits_in_the_lab",
         "test_memory_methods.py::test_autograd_keeps_exactly_what_is_predicted",
         "test_memory_versions.py::test_a_bitsandbytes_of_two_digits_is_newer_than_one_of_one"),
        "Packing or padding is the data's part: a prediction is for rows of one length.",
    ),
}
