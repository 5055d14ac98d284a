"""Every sentence that docs/numerical-contract.md promises has tests that hold it."""

import importlib
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs/numerical-contract.md").read_text(encoding="utf-8")
SECTION = PAGE.split("\n## What it promises\n")[1].split("\n## ")[0]
PROMISES = [" ".join(item.split()) for item in re.split(r"^- ", SECTION, flags=re.M)[1:]]

# How a sentence begins, and the tests that would fail if it were not true.
HELD_BY = {
    "Every argument is checked": """
        test_errors.test_what_is_no_such_array_is_refused_by_its_name
        test_errors.test_a_wrong_argument_of_any_function_is_refused
        test_errors.test_an_out_that_does_not_suit_is_refused
        test_errors.test_a_k_or_an_out_that_does_not_suit_q_is_refused
        test_gpu.test_arrays_on_different_devices_are_refused""",
    "Nothing is read or written": """
        test_host_cuda.test_a_call_of_any_kind_is_right
        test_host_cuda.test_a_mistake_in_a_kernel_is_seen
        test_properties.test_a_call_agrees_with_the_reference_and_changes_nothing_else
        test_gpu.test_a_call_of_any_kind_is_right""",
    "A position outside the table": """
        test_rotary.test_a_position_beside_the_table_reads_nothing_there
        test_rotary.test_no_position_lies_in_an_empty_table
        test_position_sums.test_the_sum_of_a_position_and_a_batchs_offset
        test_gpu.test_a_table_may_hold_a_million_positions""",
    "What lies outside the rotated slice": """
        test_rotary.test_a_call_of_any_kind_is_right
        test_properties.test_a_call_agrees_with_the_reference_and_changes_nothing_else""",
    "An output may be exactly its input": """
        test_aliasing.test_another_view_of_exactly_x_is_in_place
        test_aliasing.test_an_output_over_a_part_of_x_is_refused
        test_aliasing.test_an_output_over_the_table_or_the_positions_is_refused
        test_aliasing.test_outputs_over_the_other_input_or_the_other_output_are_refused
        test_aliasing.test_an_output_that_overlaps_itself_is_refused
        test_aliasing.test_an_output_is_refused_where_it_shares_an_element_and_only_there""",
    "Views of one buffer": """
        test_aliasing.test_packed_qkv_is_rotated_in_place_and_v_is_left_alone
        test_aliasing.test_an_output_between_the_elements_of_x_is_written""",
    "q and k rotated in one call": """
        test_properties.test_q_and_k_together_equal_q_and_k_apart
        test_rotary.test_q_and_k_together_are_as_each_alone""",
    "The conjugate of a rotation": """
        test_properties.test_the_conjugate_after_the_rotation_returns_the_input""",
    "Infinities, NaNs": """
        test_rotary.test_infinities_and_nans_propagate_as_in_ieee_arithmetic
        test_rotary.test_the_greatest_and_the_least_numbers_are_rotated
        test_rotary.test_at_the_angle_0_every_bit_stays_also_of_a_negative_zero""",
    "Offsets are 64-bit integers": """
        test_host_cuda.test_elements_may_lie_2_31_elements_apart
        test_host_cuda.test_rows_of_a_table_may_lie_2_31_elements_apart
        test_gpu.test_more_than_2_31_elements_are_rotated
        test_gpu.test_every_element_of_a_tensor_that_takes_a_third_of_the_memory_is_rotated""",
    "The kernel runs on the device": """
        test_gpu.test_arrays_on_a_gpu_that_is_not_the_current_one_are_rotated_there""",
    "It runs on the current stream": """
        test_gpu.test_the_launch_is_in_its_turn_on_the_current_stream_and_nothing_waits
        test_gpu.test_the_stream_is_that_of_the_library_that_owns_the_output""",
    "Where an array is another": """
        test_streams.test_a_launch_waits_for_all_that_it_reads_and_is_waited_for_by_outputs
        test_streams.test_a_torch_table_made_on_a_side_stream_is_waited_for_by_cupy_arrays""",
    "On a GPU nothing": """
        test_gpu.test_nothing_is_allocated_but_the_result""",
    "A call that has run before": """
        test_gpu.test_a_graph_repeats_the_launch_on_new_numbers""",
    "Threads may call at once": """
        test_jit.test_threads_that_ask_for_one_kernel_at_once_have_it_compiled_once
        test_jit.test_while_a_launch_blocks_others_launch_and_compile
        test_kernel_cache.test_threads_compile_each_kernel_once
        test_kernel_cache.test_the_first_calls_of_two_threads_find_a_whole_compiler""",
    "Processes may start at once": """
        test_kernel_cache.test_processes_race_for_a_cold_cache_and_later_ones_compile_nothing""",
    "A kernel cache that cannot be": """
        test_kernel_cache.test_a_cache_that_cannot_be_written_is_a_warning_and_the_call_works
        test_kernel_cache.test_a_cached_kernel_that_cannot_be_read_is_compiled_past_it
        test_kernel_cache.test_a_corrupt_cached_kernel_is_compiled_again""",
    "Where CuPy, NVRTC or the driver": """
        test_environment.test_without_a_cupy_that_can_be_imported_it_is_an_error_that_mends_it
        test_environment.test_without_a_driver_arrays_on_a_gpu_are_an_error_that_mends_it
        test_environment.test_what_the_machine_lacks_is_an_error_with_the_command_that_mends_it
        test_environment.test_arrays_of_pytorch_on_the_cpu_need_no_cupy
        test_kernel_cache.test_a_gpu_that_cannot_be_used_is_an_error_that_mends_it""",
    "A gradient is never lost": """
        test_gradients.test_first_and_second_derivatives_of_q_and_k_are_right
        test_gradients.test_a_table_that_requires_a_gradient_is_refused
        test_gradients.test_an_output_that_is_not_the_input_is_refused
        test_gradients.test_in_place_what_autograd_refuses_is_refused_before_anything_is_written
        test_tables.test_a_table_that_comes_to_require_a_gradient_is_refused_from_then_on
        test_fused_torch.test_a_gradient_of_a_scale_is_refused_by_its_name
        test_gradients.test_an_array_of_another_library_that_changes_later_leaves_the_gradient
        test_compile.test_a_transform_of_functions_is_refused_by_a_graph
        test_interop.test_a_trace_which_would_record_an_unwritten_result_is_refused""",
}


def test_every_sentence_has_its_tests():
    assert len(PROMISES) == len(HELD_BY)
    for promise, beginning in zip(PROMISES, HELD_BY, strict=True):
        assert promise.startswith(beginning)
        assert promise.endswith(".") and ". " not in promise, "one sentence each"


@pytest.mark.parametrize("beginning", HELD_BY)
def test_the_tests_that_hold_a_promise_exist(beginning):
    for name in HELD_BY[beginning].split():
        module, _, function = name.partition(".")
        assert callable(getattr(importlib.import_module(module), function))
