"""The models that ENCODE is held against, one file each."""
