"""The papers' tables as grids: what was published, what it claims, and how to run it here (``equiframe reproduce``)."""
