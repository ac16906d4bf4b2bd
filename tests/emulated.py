"""Which tests over verbs are run where every instruction is emulated.

A micro-VM without KVM is ten times slower than the machine that it runs on; all tests over verbs take an hour
there. These are the ones that need real verbs most: the fabric itself whole, and of everything above it what
could go differently over verbs than over tcp. The rest runs there with ``script/test --long``, and always
where there is a device or KVM.
"""

from __future__ import annotations

import os

CHOSEN = {
    "rdma/test_channels.py": None,  # all of them
    "rdma/test_devices.py": None,
    "rdma/test_dmabuf.py": None,
    "gpudirect/test_step_down.py": {
        "test_a_real_dma_buf_is_refused_by_the_kernel_and_the_same_calls_are_staged",
        "test_by_address_blocks_go_straight_into_and_out_of_that_memory",
    },
    "cli/test_doctor.py": None,
    "store/test_puts.py": {
        "test_a_put_is_pulled_and_can_be_read",
        "test_a_wrong_checksum_is_corrupt_and_nothing_of_it_stays",
        "test_sources_that_were_not_offered",
        "test_a_region_with_a_wrong_key_breaks_its_own_channel_only",
        "test_a_peer_that_vanishes_in_the_middle_of_a_put_leaves_nothing_behind",
    },
    "store/test_node.py": {
        "test_peers_of_one_namespace_cannot_read_another",
        "test_the_index_grows_and_every_session_has_to_agree",
    },
    "test_peer.py": {
        "test_closing_gives_everything_back",
        "test_every_kind_of_memory_can_be_put_and_got",
        "test_memory_that_is_not_mapped_is_refused_by_the_device",
        "test_hits_and_misses_in_one_batch",
        "test_strict_readers",
        "test_what_was_deleted_is_never_served",
        "test_slabs_that_come_after_connecting",
        "test_eight_threads_at_once",
    },
    "test_peer_async.py": {"test_many_batches_at_once"},
    "test_peer_gpu.py": {
        "test_host_and_gpu_slices_in_one_batch",
        "test_reads_go_on_while_earlier_blocks_are_copied",
        "test_blocks_are_copied_while_the_node_pulls_earlier_ones",
        "test_a_copy_under_way_is_waited_for_beyond_the_deadline",
        "test_closing_the_peer_waits_for_copies",
        "test_threads_at_once",
    },
    "gpudirect/test_peer_cuda.py": {
        "test_a_real_dma_buf_that_the_nic_does_not_take_is_staged",
        "test_memory_that_the_nic_does_reach",
    },
    "test_peer_gpu_direct.py": {
        "test_each_direction_has_a_rung_of_its_own",
        "test_host_direct_and_staged_slices_in_one_batch",
    },
    "test_cluster.py": {"test_a_killed_node_costs_its_own_keys_only"},
    "test_faults.py": {
        "test_a_peer_killed_in_the_middle_of_puts",
        "test_a_node_killed_in_the_middle_of_gets",
        "test_a_stopped_node_goes_on_serving_reads",
        "test_a_channel_that_breaks_under_a_batch",
        "test_blocks_longer_than_the_longest_message",
        "test_too_little_memory_may_be_locked",
    },
    "attacks/test_grace.py": {
        "test_no_wrong_byte_under_churn",
        "test_without_the_time_check_wrong_bytes_are_accepted",
        "test_with_a_frozen_clock_a_plain_reader_accepts_wrong_bytes",
    },
    "attacks/test_buffers.py": {
        "test_nothing_is_written_after_a_get_has_timed_out",
        "test_a_put_that_was_given_up_leaves_no_trace",
    },
    "flash/test_peer_flash.py": {"test_a_working_set_of_ten_arenas"},
    "cli/test_bench.py": {"test_replay_finds_what_the_trace_implies"},
}
REASON = "takes long where every instruction is emulated: a soft-RoCE device, KVM, or script/test --long"


def left_out(file: str, test: str) -> bool:
    """Whether this run leaves out a test over verbs. :param file: below tests/. :param test: without
    parameters.
    """
    if os.environ.get("MEMKV_SOFTROCE_RUNG") != "tcg" or os.environ.get("MEMKV_TEST_LONG"):
        return False
    chosen = CHOSEN.get(file, set())
    return chosen is not None and test not in chosen
