"""Results of `pytest bench/ --benchmark`: their table, a page of charts, and whether a ratio fell."""
