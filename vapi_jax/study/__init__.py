"""Several runs judged under one protocol: arms, seeds, paired differences, a table and a verdict."""
