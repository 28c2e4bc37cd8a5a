"""Pure functional networks with parity to their references, the contract of a generator, and sampling."""
