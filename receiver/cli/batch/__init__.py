"""`flora-receiver runs batch`: one run per row of a table. Called by `cli.app`; may import `client` and `flora`."""
