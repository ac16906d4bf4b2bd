"""The flash tier's Python: what is written on a device besides blocks, and who writes it when."""
