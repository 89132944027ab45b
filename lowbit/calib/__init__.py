"""Calibrators: pure functions on tensors that read like their papers. No modules, devices, files or loggers here."""
