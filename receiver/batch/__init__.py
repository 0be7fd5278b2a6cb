"""One run for each row of a table. Pure apart from the table's own file; called by `cli/batch.py` alone."""
