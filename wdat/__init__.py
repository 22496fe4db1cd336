"""W-DAT."""
