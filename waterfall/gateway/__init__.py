"""The HTTP surfaces: authenticate, hold, call the upstream, meter, capture, answer."""
