"""Where pictures and captions come from, which of them make up a step, and what is drawn for each."""
