"""Prompts, seeds and pictures to pictures, through diffusers' own pipelines."""
