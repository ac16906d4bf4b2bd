"""The store: formats, index, arena and everything else that makes a node."""
