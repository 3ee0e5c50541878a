"""Temporal segmentation."""
