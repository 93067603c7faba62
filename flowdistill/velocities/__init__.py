"""Velocities: those that objectives are trained on, and estimates of those that a student has."""
