"""Test-time-training layers for pretrained speech language models."""
