"""Measurements side by side: ours and others', in one run, on one machine."""
