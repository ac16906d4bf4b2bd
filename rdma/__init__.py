"""Fabrics: devices, registered memory, and batches of one-sided READs over verbs or tcp."""
