"""Weights, devices and processes: everything that needs a real tensor or a rank."""
