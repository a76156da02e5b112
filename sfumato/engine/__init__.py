"""The DeepSpeed room: nothing outside it calls DeepSpeed's engine or knows how weights are sharded."""

import logging

EXPECTED = ("Setting accelerator to CPU", "untested optimizer")
"""Warnings of DeepSpeed that are no news: a CPU run was asked for, and our optimizers are what is tested."""

logging.getLogger("DeepSpeed").addFilter(
    lambda record: not any(text in record.getMessage() for text in EXPECTED)
)
