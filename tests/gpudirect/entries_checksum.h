/* Entry points for Python: the kernels of checksum.cu, run on the host. */
extern "C" const char *run_chunks(unsigned grid, const u64 *pointers, const u64 *lengths, u32 blocks,
                                  u32 most, u32 pitch, u64 *hashes) {
    return simt::launch(grid, THREADS, [&] { mkv_chunks(pointers, lengths, blocks, most, pitch, hashes); });
}

extern "C" const char *run_verdicts(unsigned grid, const u64 *lengths, u32 blocks, u32 pitch, u64 *hashes,
                                    u64 *checksums, const u64 *expected, u8 *verdicts) {
    return simt::launch(grid, THREADS,
                        [&] { mkv_verdicts(lengths, blocks, pitch, hashes, checksums, expected, verdicts); });
}
