"""Reading and writing weights, ours and others', without executing what a file contains."""
