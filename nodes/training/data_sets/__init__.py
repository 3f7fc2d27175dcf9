"""Nodes for the data sets of clips, and for measuring a video against a true one."""
