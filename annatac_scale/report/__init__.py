"""What a store or a run has to say for itself: tables and pictures."""
