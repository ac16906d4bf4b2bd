/* Entry points for Python: the kernels of pages.cu, run on the host. */
#define ENTRY(NAME)                                                                                          \
    extern "C" const char *run_##NAME(unsigned grid, unsigned block, PARAMETERS) {                           \
        return simt::launch(grid, block, [&] { mkv_##NAME(ARGUMENTS); });                                    \
    }
ENTRY(gather_16)
ENTRY(gather_8)
ENTRY(gather_4)
ENTRY(gather_2)
ENTRY(gather_1)
ENTRY(scatter_16)
ENTRY(scatter_8)
ENTRY(scatter_4)
ENTRY(scatter_2)
ENTRY(scatter_1)

extern "C" unsigned run_divided(unsigned n, unsigned divisor, unsigned multiplier, unsigned shift) {
    return divided(n, divisor, multiplier, shift);
}
