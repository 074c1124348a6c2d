"""Every performance claim is a command here, and compares in one run."""
