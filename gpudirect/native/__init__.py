"""The compiled core of this room: lanes of copies, and their stand-in for machines without a GPU."""
