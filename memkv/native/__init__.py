"""The peer's C core: location cache and the job that looks up, READs and verifies a batch of blocks."""
