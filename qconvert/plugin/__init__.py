"""The plugin side: hooks, the Quantizer and Observer contracts, and the manager that finds plugins."""

from pluggy import HookimplMarker

hookimpl = HookimplMarker("qconvert")
