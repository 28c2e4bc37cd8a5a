"""The mesh and which array is split how on it; processes that begin, fail and end together."""
