"""Processes that work for the node: the one that opens a sealed model, and those that run models.

This file imports nothing: the short-lived processes start from it.
"""
