"""The local page: one small server on the device, loopback by default."""
