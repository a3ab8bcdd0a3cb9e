"""The launcher: what runs on a login node or a workstation, and imports no torch."""
