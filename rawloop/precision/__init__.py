"""How numbers are stored and computed: the modes as rows of one table, and the policy that applies a row."""
