"""The report: numbers, table, figures; and the landscape around the weights."""
