"""Networks of the checkpoint families, with their files' own names of weights."""
