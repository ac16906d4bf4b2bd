"""The commands ``memkv-node`` (serve, doctor, status) and ``memkv-bench``."""
