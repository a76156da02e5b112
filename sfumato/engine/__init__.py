"""The DeepSpeed room: nothing outside it calls DeepSpeed's engine or knows how weights are sharded."""

import logging

EXPECTED = ("Setting accelerator to CPU", "untested optimizer", "OVERFLOW! Skipping step")
"""Warnings of DeepSpeed that are no news: a CPU run was asked for, our optimizers are what is tested, and of
a step that was not applied more is said by mishaps.py."""

logging.getLogger("DeepSpeed").addFilter(
    lambda record: not any(text in record.getMessage() for text in EXPECTED)
)
