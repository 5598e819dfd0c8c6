"""Models run with torch, one unit's weights in memory at a time."""
