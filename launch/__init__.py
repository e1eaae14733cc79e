"""Launchers for cloud machines; they contain no training logic."""
