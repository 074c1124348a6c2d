"""The bench: every model of long-term interest on one backbone, on the same data, with the same budget."""
