"""Memory that applications bring: where it lies, and whether a fabric can reach it."""
