"""From a checkpoint to files of samples."""
