"""What a run tells: metrics, pictures and its page."""
